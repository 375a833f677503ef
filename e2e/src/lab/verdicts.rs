//! Who reaches whom, on a machine that may be busy.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use super::{Lab, LabError, Probed};

/// For how long a probe is made again when somebody was silent who should not be.
const PATIENCE: Duration = Duration::from_secs(20);

impl Lab {
    /// The verdicts of a probe of one TCP port, by family.
    ///
    /// # Errors
    /// If it could not probe at all.
    pub fn verdicts(&self, from: &str, to: &str, port: u16) -> Result<BTreeMap<u8, String>, LabError> {
        let probed = self.probe(&["--from", from, "--to", to, "--port", &port.to_string()])?;
        Ok(by_family(probed))
    }

    /// The verdicts where all should be `wanted`. On a busy machine a server or a prober can be late, which looks like
    /// silence: who should be allowed and was denied is asked again for a while, each time as briefly. It was late if
    /// there is an answer then, and no agent has seen a packet of the pair dropped.
    ///
    /// # Errors
    /// If it could not probe at all.
    pub fn verdicts_wanted(
        &self,
        wanted: &str,
        from: &str,
        to: &str,
        port: u16,
    ) -> Result<BTreeMap<u8, String>, LabError> {
        let (since, begun) = (SystemTime::now(), Instant::now());
        let port = port.to_string();
        let question = ["--from", from, "--to", to, "--port", &port];
        let is_silent = |probed: &[Probed]| probed.iter().any(|cell| cell.verdict == "denied");
        let mut probed = self.probe(&question)?;
        if wanted != "allowed" || !is_silent(&probed) {
            return Ok(by_family(probed));
        }
        while is_silent(&probed) && begun.elapsed() < PATIENCE {
            probed = self.probe(&question)?;
        }
        let drops = self.drops_since(since)?;
        let addresses = self.addresses()?;
        let own = addresses.get(from.strip_prefix("node:").unwrap_or(from)).map_or(&[][..], Vec::as_slice);
        for cell in &mut probed {
            let own = own.iter().copied().find(|own| own.is_ipv4() == cell.address.is_ipv4());
            if let Some(drop) = drops.iter().find(|drop| is_of(drop, own, cell)) {
                cell.verdict = format!("dropped: {} at {}", drop["drop"]["name"], drop["hook"]);
            }
            println!("{from} -> {to} ({}): {} after {:?}", cell.address, cell.verdict, begun.elapsed());
        }
        Ok(by_family(probed))
    }

    /// What agents have seen dropped since then. One that is away remembers nothing.
    fn drops_since(&self, since: SystemTime) -> Result<Vec<Value>, LabError> {
        let since = since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let since = cirri_flow::rfc3339(since.as_nanos() as u64);
        let nodes = self.list()?.nodes;
        let kept = nodes.iter().filter_map(|node| self.drops(&node.name, &[]).ok()).flatten();
        Ok(kept.filter(|record| record["time"].as_str() >= Some(since.as_str())).collect())
    }
}

/// Whether a dropped packet is a probe's, or answers it. Of one to a service, whoever of its backends it went to.
pub fn is_of(drop: &Value, from: Option<IpAddr>, probed: &Probed) -> bool {
    let address = |end: &str| drop[end]["ip"].as_str().and_then(|ip| ip.parse().ok());
    let is_to = |end: &str| {
        let port = drop[end]["port"].as_u64();
        let is_it = (address(end), port) == (Some(probed.address), probed.port.map(u64::from));
        is_it || probed.to.starts_with("svc:")
    };
    let is = |from_end: &str, to_end: &str| address(from_end) == from && is_to(to_end);
    let protocol = drop["protocol"].as_str().is_some_and(|name| name.eq_ignore_ascii_case(&probed.protocol));
    protocol && (is("source", "destination") || is("destination", "source"))
}

fn by_family(probed: Vec<Probed>) -> BTreeMap<u8, String> {
    probed.into_iter().map(|cell| (cell.family, cell.verdict)).collect()
}
