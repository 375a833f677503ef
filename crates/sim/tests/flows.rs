//! What floods and time do to the flow tables.

use std::net::Ipv4Addr;

use cirri_abi::{
    Addr, Cookie, CounterIndex, Endpoint, Hook, Identity, Ipcache, IpcacheKey, NodeConfig, PolicyEntry, PolicyKey,
    Port, State, Tuple, policy_flag, proto,
};
use cirri_datapath::{Table, Verdict};
use cirri_sim::{Node, Ruleset, build};

const A: u32 = 10;
const B: u32 = 11;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// Two workloads that may do everything.
fn node() -> Node {
    let mut node = Node::new(NodeConfig::default());
    let allow = |direction| {
        let key = PolicyKey { prefix_len: PolicyKey::STATIC_BITS, direction, ..PolicyKey::default() };
        let prefix_len = PolicyKey::STATIC_BITS as u8;
        let flags = policy_flag::ALLOW;
        (key, PolicyEntry { cookie: Cookie::DEFAULT_ALLOW, flags, prefix_len, ..PolicyEntry::default() })
    };
    node.put_ruleset(1, Ruleset::new([allow(0), allow(1)]));
    for (ifindex, address) in [(A, address(1)), (B, address(2))] {
        let identity = Identity { id: 256 + ifindex };
        let v4 = Addr::v4(address.octets());
        node.put_endpoint(Endpoint { ifindex, identity, ruleset: 1, v4, ..Endpoint::default() });
        node.put_ipcache(IpcacheKey { prefix_len: 128, addr: v4 }, Ipcache { identity, ..Ipcache::default() });
    }
    node
}

fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 1, last)
}

fn segment(node: &Node, from: (u32, u8, u16), to: (u8, u16), flags: u8) -> Verdict {
    let packet = build::tcp((address(from.1), from.2), (address(to.0), to.1), flags);
    node.run(Hook::FROM_WORKLOAD, packet.on(from.0)).verdict
}

fn connect(node: &Node, port: u16) {
    for (from, to, flags) in
        [((A, 1, port), (2, 80), SYN), ((B, 2, 80), (1, port), SYN | ACK), ((A, 1, port), (2, 80), ACK)]
    {
        assert!(matches!(segment(node, from, to, flags), Verdict::Local { .. }), "port {port}");
    }
}

fn tuple(port: u16) -> Tuple {
    Tuple {
        src: Addr::v4(address(1).octets()),
        dst: Addr::v4(address(2).octets()),
        sport: Port::new(port),
        dport: Port::new(80),
        proto: proto::TCP,
        ..Tuple::default()
    }
}

#[test]
fn a_flood_of_syns_fills_the_pending_table_only_and_established_connections_stay() {
    let mut node = node();
    node.limit_flows(64, 64);
    for port in 1..=16 {
        connect(&node, port);
    }
    let before = node.flows(Table::Flows).len();
    for port in 10_000..30_000 {
        assert!(matches!(segment(&node, (A, 1, port), (2, 443), SYN), Verdict::Local { .. }));
    }
    assert_eq!(node.flows(Table::Pending).len(), 64, "full, and no more than that");
    assert_eq!((before, node.flows(Table::Flows).len()), (32, 32));
    for port in 1..=16 {
        assert!(node.recipe(Table::Flows, &tuple(port)).is_some_and(|recipe| recipe.state == State::ESTABLISHED));
        assert!(matches!(segment(&node, (A, 1, port), (2, 80), ACK), Verdict::Local { ifindex: B }));
    }
    assert_eq!(node.counter(CounterIndex::DECIDED).packets, 20_016, "no established segment was decided on");
}

#[test]
fn connections_still_open_during_a_flood() {
    let mut node = node();
    node.limit_flows(64, 64);
    for port in 10_000..20_000 {
        segment(&node, (A, 1, port), (2, 443), SYN);
        if port % 1000 == 0 {
            connect(&node, port / 1000);
        }
    }
    assert_eq!(node.counter(CounterIndex::PROMOTED).packets, 10);
    assert_eq!(node.flows(Table::Flows).len(), 20);
}

#[test]
fn a_connection_of_which_half_was_evicted_begins_again() {
    let mut node = node();
    connect(&node, 5000);
    // Room for three of four entries: the least recently used is the first connection's opener.
    node.limit_flows(3, 64);
    assert!(matches!(segment(&node, (B, 2, 80), (1, 5000), ACK), Verdict::Local { .. }));
    node.bump(1);
    connect(&node, 5001);
    let left: Vec<bool> =
        [tuple(5000), tuple(5000).turned()].iter().map(|one| node.recipe(Table::Flows, one).is_some()).collect();
    assert_ne!(left[0], left[1], "half of it is gone");
    let survivor = if left[0] { ((A, 1, 5000), (2, 80)) } else { ((B, 2, 80), (1, 5000)) };
    assert!(matches!(segment(&node, survivor.0, survivor.1, ACK), Verdict::Drop(_)), "nothing to renew it with");
    assert!(matches!(segment(&node, (A, 1, 5000), (2, 80), ACK), Verdict::Local { .. }), "decided on anew");
}

#[test]
fn the_time_of_the_last_packet_is_the_tick_that_it_came_in() {
    let node = node();
    connect(&node, 5000);
    let seen = || node.recipe(Table::Flows, &tuple(5000)).map(|recipe| (recipe.since.count, recipe.last_seen.count));
    let (since, first) = seen().expect("established");
    node.advance(10 << 30);
    segment(&node, (A, 1, 5000), (2, 80), ACK);
    assert_eq!(seen(), Some((since, first + 10)));
}
