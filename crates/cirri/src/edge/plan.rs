//! From the file's text to what is to be balanced: read, filled in, checked. Pure.
//!
//! Whatever is wrong is found here, before anything is changed, and every error says where it stands
//! and what to do.

mod check;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cirri_abi::Algorithm as AlgorithmNumber;
use cirri_control::cut::cut_message;
use cirri_control::resource::{past_limit, yaml_options};
use cirri_control::service::{PortId, maglev};
use ipnet::IpNet;

use super::config::{self, Bpf, CodeRange, File, ForwardingName, Protocol};
use crate::config::{Acceleration, Algorithm, PortRange};

/// What is to be balanced. Good in itself; whether the machine has the devices is another matter.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Devices that packets come in by.
    pub devices: Vec<String>,
    /// Where they are taken.
    pub acceleration: Acceleration,
    /// IPv4 source of translated connections, if the file names one.
    pub address: Option<Ipv4Addr>,
    /// IPv6 source, likewise.
    pub address6: Option<Ipv6Addr>,
    /// Source ports of translated connections.
    pub snat_ports: PortRange,
    /// Other sources.
    pub pools: Vec<Pool>,
    /// The services, in the file's order.
    pub services: Vec<Service>,
    /// Directory for the socket and what survives a restart.
    pub state_dir: PathBuf,
    /// The packet path.
    pub bpf: Bpf,
    /// What the process says.
    pub log: String,
}

/// A source that services name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// Its IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Option<Ipv6Addr>,
    /// Its ports.
    pub ports: PortRange,
}

/// One address, port and protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// The address that clients use.
    pub address: IpAddr,
    /// The port that clients use.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// How a backend is chosen.
    pub algorithm: Algorithm,
    /// Places of its Maglev table, if the file says how many.
    pub maglev_size: Option<u32>,
    /// How packets reach a backend.
    pub forwarding: ForwardingName,
    /// Seconds that a client keeps its backend; 0: not at all.
    pub affinity: u32,
    /// Clients that may connect; empty: all.
    pub source_ranges: Vec<IpNet>,
    /// Name of the pool that translated connections get their source from.
    pub pool: Option<String>,
    /// Who serves.
    pub backends: Vec<Backend>,
    /// How they are checked.
    pub health: Option<Check>,
}

/// One that serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its name, unique in its service.
    pub name: String,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its share; 0: no new connections.
    pub weight: u16,
}

/// How a backend is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What is tried.
    pub probe: Probe,
    /// The port; none: the backend's.
    pub port: Option<u16>,
    /// From the start of one check to that of the next.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Good checks in a row that bring a backend back.
    pub rise: u32,
    /// Failed checks in a row that take it out.
    pub fall: u32,
}

/// What a check tries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A TCP connection.
    Tcp,
    /// An HTTP/1.1 GET.
    Http {
        /// The path.
        path: String,
        /// The `Host` header; none: address and port.
        host: Option<String>,
        /// Codes that mean health.
        expect: CodeRange,
    },
}

/// A file that cannot be used. The text begins with the file, and line and column where there are any.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PlanError(String);

impl Plan {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or what [`Plan::parse`] says.
    pub fn read(path: &Path) -> Result<Plan, PlanError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| PlanError(format!("cannot read {}: {error}", path.display())))?;
        Plan::parse(path, &text)
    }

    /// Makes sense of a file's text.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn parse(path: &Path, text: &str) -> Result<Plan, PlanError> {
        let file: File = serde_saphyr::from_str_with_options(text, yaml_options(text)).map_err(|error| {
            let said = said(text, &error);
            let what = &*cut_message(said.lines().next().unwrap_or_default());
            let Some(at) = error.location() else { return PlanError(format!("{}: {what}", path.display())) };
            let place = format!(" at line {}, column {}", at.line(), at.column());
            let what = what.strip_suffix(&place).unwrap_or(what);
            PlanError(format!("{}:{}:{}: {what}", path.display(), at.line(), at.column()))
        })?;
        check::plan(path, file)
    }

    /// The state directory that a file names, whatever else is in it: to find who runs from it.
    ///
    /// # Errors
    /// It cannot be read, or is no YAML.
    pub fn state_dir_of(path: &Path) -> Result<PathBuf, PlanError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| PlanError(format!("cannot read {}: {error}", path.display())))?;
        let tree: serde_json::Value = serde_saphyr::from_str_with_options(&text, yaml_options(&text))
            .map_err(|error| PlanError(format!("{}: {}", path.display(), cut_message(&said(&text, &error)))))?;
        let named = tree.get("stateDir").and_then(serde_json::Value::as_str);
        Ok(PathBuf::from(named.unwrap_or(config::STATE_DIR)))
    }

    /// Places that all sets of backends take, and as many again for the largest while it changes.
    pub fn slots(&self) -> usize {
        let all = self.services.iter().map(Service::slots);
        all.clone().sum::<usize>() + all.max().unwrap_or_default()
    }

    /// The pool of that name.
    pub fn pool(&self, name: &str) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.name == name)
    }

    /// The addresses of all pools.
    pub fn pool_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let both = self.pools.iter().flat_map(|pool| [pool.v4.map(IpAddr::V4), pool.v6.map(IpAddr::V6)]);
        both.flatten()
    }
}

/// What is wrong with a text: the limit that it is past, or what the parser says.
fn said(text: &str, error: &serde_saphyr::Error) -> String {
    past_limit(text, error).unwrap_or_else(|| error.without_snippet().to_string())
}

impl Service {
    /// Its number-giving name in the tables.
    pub fn id(&self) -> PortId {
        PortId {
            namespace: NAMESPACE.to_owned(),
            service: self.name.clone(),
            port: self.port.to_string(),
            protocol: self.protocol.number(),
            v6: self.address.is_ipv6(),
        }
    }

    /// The algorithm's number in the tables.
    pub fn algorithm_number(&self) -> u8 {
        match self.algorithm {
            Algorithm::Maglev => AlgorithmNumber::MAGLEV,
            Algorithm::Random => AlgorithmNumber::RANDOM,
        }
    }

    /// The algorithm's name, as the file has it.
    pub fn algorithm_name(&self) -> &'static str {
        match self.algorithm {
            Algorithm::Maglev => "maglev",
            Algorithm::Random => "random",
        }
    }

    /// Places that its set of backends takes when all of them are up.
    fn slots(&self) -> usize {
        match self.algorithm {
            Algorithm::Maglev => self.maglev_size.unwrap_or_else(|| maglev::size_for(self.backends.len())) as usize,
            Algorithm::Random => self.backends.iter().map(|backend| usize::from(backend.weight)).sum(),
        }
    }
}

/// The namespace of services that have none.
pub const NAMESPACE: &str = "lb";

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", SocketText(self.address, self.port))?;
        write!(f, "/{}", self.protocol)
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketText(self.address, self.port).fmt(f)
    }
}

struct SocketText(IpAddr, u16);

impl fmt::Display for SocketText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::net::SocketAddr::new(self.0, self.1).fmt(f)
    }
}

#[cfg(test)]
mod tests;
