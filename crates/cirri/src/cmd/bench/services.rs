//! `cirri bench services`: connections to services, beside plain routing and the kernel's packet filters.
//!
//! A client, a node and a server each, all ways in the same rounds: kernel routing without any service; the rules
//! that kube-proxy would make, by iptables and by nftables; and Cirri with policy on, translating in the system call
//! or per packet. Each with few and with many services.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use cirri_abi::proto;
use serde::Serialize;

use super::labs::{self, BenchLab};
use super::load::Server;
use super::plain::{NEAR, Plain};
use super::rivals::{Filter, Rival};
use super::served;
use super::stats::Spread;
use super::traffic::{self, Line, SHORT, Way};
use crate::output::{self, Table};

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub traffic: traffic::Plan,
    /// Whether ten thousand services are among it: loading so many chains of nftables takes minutes.
    pub many: bool,
    /// How often one service more is added to each.
    pub more: usize,
}

/// The result.
#[derive(Clone, Debug, Serialize)]
pub struct Services {
    pub lines: Vec<Line>,
    pub rules: Vec<Rules>,
}

/// What it takes to tell a packet filter about services.
#[derive(Clone, Debug, Serialize)]
pub struct Rules {
    pub way: &'static str,
    pub services: u32,
    /// All of them into an empty filter.
    pub loaded_ms: f64,
    /// One more: only what is new is written.
    pub one_more_ms: Spread,
}

/// Services, and the names of ways with so many: iptables, nftables, in the system call, per packet.
const STEPS: [(u32, [&str; 4]); 3] = [
    (10, ["iptables-10", "nftables-10", "socket-10", "packet-10"]),
    (1000, ["iptables-1000", "nftables-1000", "socket-1000", "packet-1000"]),
    (10_000, ["iptables-10000", "nftables-10000", "socket-10000", "packet-10000"]),
];
const PLAIN: &str = "plain";
/// The service that leads to the server.
const LIVE: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 1);

/// Measures.
pub fn run(pin_root: &Path, plan: &Plan) -> Result<Services> {
    super::instance::sweep(pin_root);
    let plain = Plain::small(PLAIN)?;
    let mut servers = vec![Server::start(&plain.netns("near"), NEAR.into(), plan.traffic.cpu)?];
    let way = |name, client, server| Way {
        name,
        beside: PLAIN,
        client,
        server,
        service: None,
        group: None,
        visible: None,
        modes: SHORT,
    };
    let mut ways = vec![way(PLAIN, plain.netns("client"), 0)];
    let (mut rivals, mut guards, mut tables) = (Vec::new(), Vec::new(), Vec::new());
    for (count, [iptables, nftables, socket, packet]) in
        STEPS.into_iter().filter(|(count, _)| plan.many || *count < 10_000)
    {
        for (name, filter) in [(iptables, Filter::Iptables), (nftables, Filter::Nftables)] {
            eprintln!("cirri: loading {name}");
            let rival = Rival::up(filter, count)?;
            servers.push(Server::start(&rival.place.netns("near"), NEAR.into(), plan.traffic.cpu)?);
            let client = rival.place.netns("client");
            ways.push(Way { service: Some(rival.service()), ..way(name, client, servers.len() - 1) });
            rivals.push((name, count, rival));
        }
        let lab = lab(count)?;
        let info = lab.info()?;
        let own = lab.tables(pin_root)?;
        served::others(&own, count, proto::TCP)?;
        let (netns, ip) = info.pod("server")?;
        servers.push(Server::start(&netns, ip, plan.traffic.cpu)?);
        for (name, pod, group) in [(socket, "client", Some(lab.group("node1")?)), (packet, "client-by-packet", None)] {
            let (client, _) = info.pod(pod)?;
            let service = Some(SocketAddr::new(IpAddr::V4(LIVE), served::OTHER_PORT));
            let way = way(name, client, servers.len() - 1);
            ways.push(Way { service, group, visible: Some(true), ..way });
        }
        tables.push(own);
        guards.push(lab);
    }
    let lines = traffic::measure(&plan.traffic, &ways, &servers, &tables)?;
    let rules = rivals.iter_mut().map(|(name, count, rival)| told(name, *count, rival, plan)).collect::<Result<_>>()?;
    Ok(Services { lines, rules })
}

fn told(way: &'static str, services: u32, rival: &mut Rival, plan: &Plan) -> Result<Rules> {
    let more = (0..plan.more).map(|_| Ok(rival.add_one()?.as_secs_f64() * 1e3)).collect::<Result<Vec<f64>>>()?;
    let one_more_ms = Spread::of(&more).context("no rounds")?;
    Ok(Rules { way, services, loaded_ms: rival.loaded_in.as_secs_f64() * 1e3, one_more_ms })
}

/// One node with a service in front of a pod that a policy lets the clients into.
fn lab(count: u32) -> Result<BenchLab> {
    eprintln!("cirri: bringing up a lab for {count} services");
    let begun = Instant::now();
    let lab = BenchLab::up(&format!("s{count}"), 1, "direct")?;
    let by_packet = labs::pod("client-by-packet", "node1", "client")
        .replace("namespace: bench,", "namespace: bench, annotations: {cirri.io/service-translation: packet},");
    let service = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: live, namespace: bench}}\n\
         spec: {{clusterIP: {LIVE}, selector: {{role: one}}, ports: [{{port: 80, targetPort: 8080}}]}}\n"
    );
    let pods = [labs::pod("client", "node1", "client"), by_packet, labs::pod("server", "node1", "one")].concat();
    lab.write("all.yaml", &format!("{}{pods}{}{service}", labs::NAMESPACE, labs::policy("one", "one", 1)))?;
    lab.apply()?;
    eprintln!("cirri: it took {:.1} s", begun.elapsed().as_secs_f64());
    Ok(lab)
}

/// As columns.
pub fn table(services: &Services) -> String {
    let mut text = traffic::table(&services.lines);
    let mut table = Table::new(["rules", "services", "all at once ms", "one more ms: min / median"]);
    for it in &services.rules {
        let Spread { min, median, .. } = it.one_more_ms;
        let cells = [it.services.to_string(), format!("{:.0}", it.loaded_ms), format!("{min:.1} / {median:.1}")];
        let [services, loaded, more] = cells;
        table.row([it.way.to_owned(), services, loaded, more]);
    }
    text += "\n";
    text + &table.render(output::terminal_width())
}

/// The part of a report.
pub fn write(services: &Services, text: &mut String) {
    text.push_str(
        "\n## Connections to services\n\nA client, a node and a server on it each; client and server threads on one processor; all ways take \
         turns in every round. *plain*: kernel routing, no service. *iptables*, *nftables*: the rules that kube-proxy makes in these modes, \
         three endpoints a service, the service in the middle; no policy. *socket*, *packet*: Cirri with policy on, translated in the system \
         call or per packet; the service that is asked stands in its tables beside so many others of 10 backends each, which the bench \
         writes. Columns as below.\n\n",
    );
    traffic::write_rows(&services.lines, text);
    text.push_str(
        "\nWhat the packet filters take to be told (Cirri: next section):\n\n\
         | rules | services | all at once, ms | one more: min / p25 / median, ms |\n|---|---|---|---|\n",
    );
    for it in &services.rules {
        let Spread { min, p25, median } = it.one_more_ms;
        let row =
            format!("| {} | {} | {:.0} | {min:.1} / {p25:.1} / {median:.1} |\n", it.way, it.services, it.loaded_ms);
        text.push_str(&row);
    }
}
