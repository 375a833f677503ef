//! Where the figures stand beside the project's goals.

use super::load::Mode;
use super::packets::Line;
use super::report::Report;
use super::sockets::{self, Call};
use super::traffic::Line as Traffic;

/// What a peer takes for the same: least and first quartile, ns. `None`: not known.
#[derive(Clone, Copy)]
struct Peer {
    name: &'static str,
    min: Option<f64>,
    p25: Option<f64>,
}

const fn peer(name: &'static str, min: f64, p25: f64) -> Peer {
    Peer { name, min: Some(min), p25: Some(p25) }
}

const CILIUM_IPIP: Peer = peer("Cilium", 251.0, 259.0);
const KATRAN_IPIP: Peer = peer("Katran", 130.0, 134.0);
const CILIUM_SNAT: Peer = peer("Cilium", 410.0, 426.0);
const CILIUM_SNAT_16K: Peer = Peer { name: "Cilium", min: None, p25: Some(2144.0) };
const CILIUM_IPIP_16K: Peer = Peer { name: "Cilium", min: None, p25: Some(614.0) };
const KATRAN_IPIP_16K: Peer = Peer { name: "Katran", min: None, p25: Some(485.0) };
const CILIUM_NEW_SNAT: Peer = peer("Cilium", 2628.0, 3414.0);
const CILIUM_NEW_IPIP: Peer = peer("Cilium", 850.0, 984.0);
const KATRAN_NEW_IPIP: Peer = peer("Katran", 818.0, 921.0);

/// What Cilium adds to `connect` on one socket, and to `socket`, `connect`, `close`, ns.
const CILIUM_CONNECT: f64 = 402.0;
const CILIUM_WHOLE: f64 = 1490.0;

/// Writes the section.
pub fn write(report: &Report, text: &mut String) {
    text.push_str(
        "\n## Where it stands\n\nThe peers' figures (Cilium 1.19-dev, compiled as an agent sets it; Katran) were measured on the same \
         kind of machine, through a wrapper like ours, in another run; ratios to them carry that caveat. Those to plain routing, \
         iptables and nftables are of this run.\n\n\
         | goal | | mark | here | what bounds it |\n|---|---|---|---|---|\n",
    );
    let mut row = |cells: [&str; 5]| text.push_str(&format!("| {} |\n", cells.join(" | ")));
    packets(report, &mut row);
    row([
        "7",
        "added time of `connect` to a service, over Cilium's (+402 ns); of `socket`, `connect`, `close` (+1490 ns)",
        "≤ 0.65; ≤ 0.4",
        &connect(report),
        "the hook itself is more than half of what `connect` pays, as the call to what is no service shows; a new socket also \
         gets storage for what it was translated for, which is allocated, and freed when it closes",
    ]);
    traffic(report, &mut row);
}

fn packets(report: &Report, row: &mut impl FnMut([&str; 5])) {
    let lines = report.measures.as_ref().map(|it| it.lines.as_slice()).unwrap_or_default();
    let over = |case: &str, tables: &str, flows: u64, peers: &[Peer]| over_peers(lines, case, tables, flows, peers);
    row([
        "1",
        "XDP, DSR by IPIP, established, one flow",
        "≤ 0.45 of Cilium, ≤ 0.85 of Katran",
        &over("edge-dsr-ipip", "fresh", 1, &[CILIUM_IPIP, KATRAN_IPIP]),
        "one flow lookup, three epochs, the outer header; a counter of the backend",
    ]);
    row([
        "2",
        "XDP, SNAT, established, one flow",
        "≤ 0.30 of Cilium",
        &over("edge-snat", "fresh", 1, &[CILIUM_SNAT]),
        "the same; the recipe holds addresses, ports, checksum difference and Ethernet addresses: nothing else is asked",
    ]);
    row([
        "3",
        "the same with 16,384 flows, tables full",
        "≤ 0.30 of Cilium; ≤ 0.75 of Katran (IPIP)",
        &[
            over("edge-snat", "full", 16_384, &[CILIUM_SNAT_16K]),
            over("edge-dsr-ipip", "full", 16_384, &[CILIUM_IPIP_16K, KATRAN_IPIP_16K]),
        ]
        .join("; "),
        "three to four cold lines a flow: the bucket, the entry, the recipe's second half",
    ]);
    row([
        "4",
        "a new flow with each packet",
        "≤ 0.45 of Cilium (SNAT); ≤ 0.6 of Cilium's DSR and of Katran (IPIP)",
        &[
            over("new-edge-snat", "fresh", 0, &[CILIUM_NEW_SNAT]),
            over("new-edge-dsr-ipip", "fresh", 0, &[CILIUM_NEW_IPIP, KATRAN_NEW_IPIP]),
        ]
        .join("; "),
        "one decision for both hooks: service, both ends, a route, a port, one or two inserts into the kernel's LRU hash \
         (about 0.7 us each when cold), and an event; Katran and Cilium's XDP decide no policy and report nothing",
    ]);
    row([
        "5",
        "pod egress to another node, policy on, established, ns over `bpf_lxc` (466 / 482; VXLAN 496 / 504)",
        "≤ 0.35",
        &[
            over("pod-to-remote-direct", "fresh", 1, &[peer("Cilium", 466.0, 482.0)]),
            over("pod-to-remote-overlay", "fresh", 1, &[peer("Cilium", 496.0, 504.0)]),
            over("pod-to-service-far", "fresh", 1, &[peer("Cilium with services per packet", 732.0, 740.0)]),
        ]
        .join("; "),
        "the flow lookup and the helper that redirects; into the tunnel, setting its key (about 35 ns); to a service, the \
         helpers that adjust checksums",
    ]);
    row([
        "6",
        "pod to pod on one node, policy of both sides, over `bpf_lxc` egress + ingress (840 / 851)",
        "≤ 0.25",
        &over("pod-to-pod", "fresh", 1, &[peer("Cilium", 840.0, 851.0)]),
        "one flow lookup for both sides; with 16K flows, one or two cold lines of the flow table",
    ]);
}

fn traffic(report: &Report, row: &mut impl FnMut([&str; 5])) {
    let served = report.services.as_ref().map(|it| it.lines.as_slice()).unwrap_or_default();
    let most = if served.iter().any(|it| it.way == "socket-10000") { 10_000 } else { 1000 };
    let beside = |way: &str, rivals: [String; 2]| {
        let [iptables, nftables] = rivals.map(|rival| over_way(served, way, &rival, Mode::Connections));
        format!("{}, over iptables {iptables}, over nftables {nftables}", rates(served, &[way], Mode::Connections))
    };
    let rivals = || [format!("iptables-{most}"), format!("nftables-{most}")];
    row([
        "8",
        &format!("connections/s with policy and services ({most}) over plain routing; over iptables; over nftables"),
        "≥ 1.05; ≥ 1.7; ≥ 1.2",
        &[beside(&format!("socket-{most}"), rivals()), beside(&format!("packet-{most}"), rivals())].join("; "),
        "a connection is mostly the two TCP stacks and the calls; a new one costs two decisions' worth of slow path and an event, \
         and its reader shares the processor",
    ]);
    let flat = |kind: &str| {
        let ratio = over_way(served, &format!("{kind}-{most}"), &format!("{kind}-10"), Mode::Connections);
        format!("{kind}: {ratio}")
    };
    row([
        "9",
        &format!("connections/s at {most} over 10 services; at 1,000 over 1 policy rule"),
        "≥ 0.98",
        &[
            flat("socket"),
            flat("packet"),
            rates(&report.traffic, &["overlay-near-1000-rules", "direct-far-1000-rules"], Mode::Connections),
        ]
        .join("; "),
        "a service is one lookup in a hash; a rule set is asked once a connection, by longest prefix: depth, not number of rules",
    ]);
    row([
        "10",
        "one change among 10,000 services, seen to in force, p99; issue: from its write, p99; all from nothing",
        "≤ 1 ms; < 50 ms; < 10 s",
        &report.tenk.as_ref().map_or_else(String::new, |it| {
            format!(
                "{:.2} ms; {:.1} ms; {:.1} s ({} services × {})",
                it.seen_p99_ms,
                it.change_p99_ms,
                it.applied_ms / 1e3,
                it.services,
                it.backends
            )
        }),
        "from the write: etcd's own commit and watch, and a writer on the same processors; in the agent: what changed is found by \
         name, and a handful of map updates",
    ]);
    row([
        "12",
        "connections/s with reported connections over without",
        "≥ 0.98",
        &visibility(&report.traffic),
        "an established packet pays nothing; a new connection pays an event, and the agent that reads and names it shares the \
         processor with the traffic",
    ]);
    row([
        "17",
        "requests on one connection over plain routing",
        "≥ 1.08",
        &[
            rates(&report.traffic, &["overlay-near", "direct-near", "direct-far"], Mode::Requests),
            rates(served, &[&format!("socket-{most}"), &format!("packet-{most}")], Mode::Requests),
        ]
        .join("; "),
        "the node's stack is left out on the way to a local pod; between nodes only on one side",
    ]);
}

fn over_peers(lines: &[Line], case: &str, tables: &str, flows: u64, peers: &[Peer]) -> String {
    let ours = lines.iter().find(|it| it.case == case && it.family == 4 && it.tables == tables && it.flows == flows);
    let Some(ours) = ours.map(|it| it.gross) else { return format!("{case}: not measured") };
    let one = |peer: &Peer| {
        let min = peer.min.map(|min| format!("{:.2} (min), ", ours.min / min)).unwrap_or_default();
        let p25 = peer.p25.map(|p25| format!("{:.2} (p25)", ours.p25 / p25)).unwrap_or_default();
        format!("{min}{p25} of {}", peer.name)
    };
    let ratios: Vec<String> = peers.iter().map(one).collect();
    format!("{case} {:.0} / {:.0} ns: {}", ours.min, ours.p25, ratios.join(", "))
}

fn connect(report: &Report) -> String {
    let shown = |call: Call, peer: f64| {
        let to_service = |it: &&sockets::Line| it.call == call && it.to == "service" && it.services.is_some();
        let each = report.sockets.iter().filter(to_service).map(|it| {
            let services = it.services.unwrap_or_default();
            format!("+{:.0} at {services} services: {:.2}", it.added.min, it.added.min / peer)
        });
        each.collect::<Vec<_>>().join(", ")
    };
    let nothing = |it: &&sockets::Line| it.call == Call::Connect && it.to == "other" && it.services == Some(10_000);
    let other = report.sockets.iter().find(nothing).map_or_else(String::new, |it| format!("{:.0}", it.added.min));
    format!(
        "{}; {}; `connect` to what is no service: +{other}",
        shown(Call::Connect, CILIUM_CONNECT),
        shown(Call::Whole, CILIUM_WHOLE)
    )
}

fn rates(lines: &[Traffic], ways: &[&str], mode: Mode) -> String {
    let found = ways.iter().filter_map(|way| lines.iter().find(|it| it.way == *way && it.mode == mode));
    let shown = |it: &Traffic| format!("{}: {:.2} (cpu {:.2})", it.way, it.rate_ratio, it.cpu_ratio);
    found.map(shown).collect::<Vec<_>>().join("; ")
}

/// One way over another, by what both are over what they are beside.
fn over_way(lines: &[Traffic], way: &str, other: &str, mode: Mode) -> String {
    let of = |name: &str| lines.iter().find(|it| it.way == name && it.mode == mode);
    of(way).zip(of(other)).map_or_else(
        || "not measured".to_owned(),
        |(own, other)| {
            let (rate, cpu) = (own.rate_ratio / other.rate_ratio, own.cpu_ratio / other.cpu_ratio);
            format!("{rate:.2} (cpu {cpu:.2})")
        },
    )
}

fn visibility(lines: &[Traffic]) -> String {
    let quiet = lines.iter().filter(|it| it.way.ends_with("-unreported") && it.mode == Mode::Connections);
    let shown = |it: &Traffic| format!("{}: {:.2} (cpu {:.2})", it.beside, 1.0 / it.rate_ratio, 1.0 / it.cpu_ratio);
    quiet.map(shown).collect::<Vec<_>>().join("; ")
}
