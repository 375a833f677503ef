//! What the fuzz targets do with their input. Kept apart from libFuzzer, so that every crash that was
//! found runs again under plain `cargo test` (`tests/regressions.rs`).

use std::net::IpAddr;

use cirri_abi::{
    Addr, Backend, BackendState, Cookie, Endpoint, EventKind, Forwarding, Hook, Identity, Ipcache, IpcacheKey,
    NodeConfig, PolicyEntry, PolicyKey, Port, Service, ServiceKey, ipcache_flag, node_flag, policy_flag, proto,
    service_flag,
};
use cirri_control::policy::Cluster;
use cirri_control::resource::{Resource, parse_documents};
use cirri_datapath::{NextHop, TunnelKey, Verdict};
use cirri_sim::{Frame, Node, Ruleset};

const WORKLOADS: [u32; 2] = [10, 11];
const NETWORK: u32 = 2;
const OVERLAY: u32 = 3;
/// Packets from the network before the stack: no hook has this number.
const EDGE: u8 = 0x83;
/// Bytes of an outer IPv6 header, the longest that a packet is given.
const LONGEST_ADDITION: usize = 40;

/// Sends packets through a node with two workloads, a peer, the outside, and services.
///
/// The input is a list of packets: a byte that picks hook and device, a byte of length (in units of
/// eight), the bytes. Whatever they are, the packet path must not panic, a dropped or refused packet must
/// be a counted one, and what passes before the stack must be as it came.
pub fn packets(mut input: &[u8]) {
    let node = node();
    let mut refused = 0;
    while let [kind, length, rest @ ..] = input {
        let length = (usize::from(*length) * 8).min(rest.len());
        let (bytes, next) = rest.split_at(length);
        input = next;
        let hook = [1, 2, 3, 5, 6, 4, 3, EDGE][usize::from(kind & 7)];
        let ifindex = match hook {
            Hook::FROM_NETWORK | Hook::TO_NETWORK | EDGE => NETWORK,
            Hook::FROM_OVERLAY | Hook::TO_OVERLAY => OVERLAY,
            _ => WORKLOADS[usize::from(kind >> 3 & 1)],
        };
        let key = TunnelKey { vni: [500, 1, 0, 300][usize::from(kind >> 4 & 3)], remote: peer() };
        let tunnel = (hook == Hook::FROM_OVERLAY).then_some(key);
        let frame = Frame { bytes: bytes.to_vec(), ifindex, tunnel, ..Frame::default() };
        let ran = if hook == EDGE { node.run_edge(frame) } else { node.run(hook, frame) };
        // Who is refused may be told: such a packet goes, as an answer.
        let said = node.take_events().iter().any(|event| event.kind == EventKind::DROP);
        refused += u64::from(said || matches!(ran.verdict, Verdict::Drop(_)));
        if hook == EDGE && ran.verdict == Verdict::Continue {
            assert_eq!(ran.frame.bytes, bytes, "what passes is as it came");
        }
        assert!(said || ran.frame.bytes.len() <= bytes.len() + LONGEST_ADDITION, "nothing else makes it longer");
    }
    let counted: u64 = (2..512).map(|index| node.counter(index).packets).sum();
    assert_eq!(counted, refused, "every drop is counted, and nothing else");
}

/// Reads manifests and compiles the rule sets of their pods. Whatever they are, that must not panic,
/// and a rule set that compiles must be complete.
pub fn policies(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let Ok(resources) = parse_documents("fuzz.yaml", text) else { return };
    let mut cluster = Cluster::default();
    for resource in &resources {
        if let Resource::NetworkPolicy(policy) = resource {
            // A refusal is an answer.
            let _ = cluster.upsert_policy(policy);
        }
        let again = Resource::from_json(&resource.to_json()).expect("what was read can be stored and read again");
        assert_eq!(again.to_json(), resource.to_json());
    }
    let filter = cluster.label_filter();
    for (number, resource) in (256..).zip(&resources) {
        if let Resource::Pod(pod) = resource {
            let labels = cirri_control::labels::IdentityLabels::of_pod(pod, None, "default", &filter);
            cluster.upsert_identity(Identity { id: number }, labels);
        }
    }
    for number in (256..).take(resources.len()) {
        let identity = Identity { id: number };
        if cluster.labels(identity).is_some()
            && let Ok(ruleset) = cluster.compile(identity)
        {
            for direction in [0, 1] {
                let key = PolicyKey { prefix_len: PolicyKey::STATIC_BITS, direction, ..PolicyKey::default() };
                assert!(ruleset.entries.iter().any(|(other, _)| *other == key), "a rule set answers to everything");
            }
        }
    }
}

fn node() -> Node {
    let mut node = Node::new(NodeConfig {
        flags: node_flag::TUNNEL
            | node_flag::MASQUERADE_V4
            | node_flag::MASQUERADE_V6
            | node_flag::HOST_BACKENDS,
        overlay_ifindex: OVERLAY,
        v4: addr("192.168.0.1"),
        v6: addr("fd01::1"),
        masquerade_first: Port::new(50_000),
        masquerade_mask: 7,
        ..NodeConfig::default()
    });
    let rule = |direction, peer, flags, cookie| {
        let prefix_len = PolicyKey::STATIC_BITS;
        let entry = PolicyEntry { flags, cookie, prefix_len: prefix_len as u8, ..PolicyEntry::default() };
        (PolicyKey { prefix_len, peer, direction, ..PolicyKey::default() }, entry)
    };
    let closed =
        [rule(0, 0, 0, Cookie::DEFAULT_DENY), rule(0, 500, policy_flag::ALLOW, 16), rule(1, 0, policy_flag::ALLOW, 1)];
    node.put_ruleset(1, Ruleset::new(closed));
    node.put_ruleset(2, Ruleset::new([rule(0, 0, policy_flag::ALLOW, 1), rule(1, 0, policy_flag::ALLOW, 1)]));
    for (number, (ifindex, v4, v6)) in
        (1..).zip([(WORKLOADS[0], "10.0.1.4", "fd00:0:0:1::4"), (WORKLOADS[1], "10.0.1.5", "fd00:0:0:1::5")])
    {
        let identity = Identity { id: 300 + u32::from(number) };
        let (v4, v6) = (addr(v4), addr(v6));
        node.put_endpoint(Endpoint { ifindex, identity, id: number, ruleset: number, v4, v6, ..Endpoint::default() });
        for addr in [v4, v6] {
            node.put_ipcache(IpcacheKey { prefix_len: 128, addr }, Ipcache { identity, ..Ipcache::default() });
        }
    }
    let remote = ipcache_flag::REMOTE;
    for (net, length, identity, flags) in [
        ("192.168.0.1", 128, Identity::HOST, ipcache_flag::HOST),
        ("fd01::1", 128, Identity::HOST, ipcache_flag::HOST),
        ("10.0.1.0", 120, Identity::UNMANAGED, ipcache_flag::LOCAL_POOL),
        ("fd00:0:0:1::", 64, Identity::UNMANAGED, ipcache_flag::LOCAL_POOL),
        ("10.0.2.0", 120, Identity { id: 500 }, remote),
        ("fd00:0:0:2::", 64, Identity { id: 500 }, remote),
        ("192.168.0.2", 128, Identity::REMOTE_NODE, remote),
        ("0.0.0.0", 96, Identity::WORLD_IPV4, 0),
        ("::", 0, Identity::WORLD_IPV6, 0),
    ] {
        let peer = if flags == remote { peer() } else { 0 };
        let slot = if flags == remote { 4096 } else { 0 };
        let entry = Ipcache { identity, flags, peer, slot, ..Ipcache::default() };
        node.put_ipcache(IpcacheKey { prefix_len: length, addr: addr(net) }, entry);
    }
    let hop = NextHop { ifindex: NETWORK, mac: [2, 0, 0, 0, 0, 2], own_mac: [2, 0, 0, 0, 0, 1], mtu: 1500, ..NextHop::default() };
    node.put_route(addr("0.0.0.0"), 96, NextHop { peer: u32::from_ne_bytes([192, 168, 0, 254]), ..hop });
    node.put_route(addr("::"), 0, hop);
    serve(&mut node);
    node
}

/// Services of every forwarding at several addresses, with backends everywhere; and addresses that refuse.
fn serve(node: &mut Node) {
    let families = [
        ["10.96.0.10", "0.0.0.0", "192.0.2.10", "10.0.1.4", "10.0.2.4", "192.168.0.1", "198.51.100.7"],
        ["fd00:0:0:96::10", "::", "2001:db8:192::10", "fd00:0:0:1::4", "fd00:0:0:2::4", "fd01::1", "2001:db8::7"],
    ];
    for (family, [cluster, own, outside, backends @ ..]) in (0u32..).zip(families) {
        for (protocol, proto) in (0u32..).zip([proto::TCP, proto::UDP]) {
            let service = 1 + family * 2 + protocol;
            let first = service * 10;
            for (number, backend) in (first..).zip(backends) {
                let (port, state) = (Port::new(8080), BackendState::ACTIVE);
                let row = Backend { addr: addr(backend), port, proto, state, service, ..Backend::default() };
                node.put_backend(number, row);
                node.put_slots(number, &[number]);
            }
            let fronts = [
                (cluster, 80, Forwarding::SNAT, service_flag::INSIDE_ONLY),
                (own, 30080, Forwarding::SNAT, 0),
                (outside, 80, Forwarding::DSR_OPTION, 0),
                (outside, 443, Forwarding::DSR_IPIP, service_flag::RANGES | service_flag::RANGES_DENY),
            ];
            for (front, port, forwarding, flags) in fronts {
                let count = backends.len() as u32;
                let row = Service {
                    id: service,
                    flags,
                    inside_first: first,
                    inside_count: count,
                    outside_first: first,
                    outside_count: count,
                    affinity: u32::from(port == 443) * 60,
                    forwarding,
                    ..Service::default()
                };
                node.put_service(ServiceKey { addr: addr(front), port: Port::new(port), proto, _pad: 0 }, row);
            }
        }
        for front in [cluster, outside] {
            let refuse = Service { flags: service_flag::REFUSE, ..Service::default() };
            node.put_service(ServiceKey { addr: addr(front), ..ServiceKey::default() }, refuse);
        }
    }
    node.put_node_port(Port::new(30080));
}

fn peer() -> u32 {
    u32::from_ne_bytes([192, 168, 0, 2])
}

fn addr(text: &str) -> Addr {
    Addr::from(text.parse::<IpAddr>().expect("an address"))
}
