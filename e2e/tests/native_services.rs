//! Services beyond single packets: who is chosen how often, who keeps a backend, and sockets.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cirri_abi::{Addr, Algorithm, Backend, BackendState, Hook, Port, Service, proto, service_flag};
use cirri_datapath::{Attempt, SocketVerdict, Verdict};
use cirri_e2e::fixtures::{ANY, Change, Devices, Host, Native, World};
use cirri_sim::{SimSocket, build};

const DEVICES: Devices = Devices { a: 10, b: 11, eth: 2, overlay: 3 };
const SYN: u8 = 2;
const ACK: u8 = 16;
/// The node's own network namespace, and another.
const NODE: u64 = 77;
const POD: u64 = 1 << 40 | 5;

fn native(world: &World) -> Native {
    let mut native = Native::new(DEVICES);
    world.tables.iter().for_each(|change| native.change(change));
    native
}

fn addr(world: &World, name: &str) -> Addr {
    Addr::from(world.ip(name))
}

/// A SYN from the outside, before the stack and, if it passes there, behind it; whether it went to
/// another node.
fn leaves(native: &mut Native, world: &World, from: (IpAddr, u16)) -> bool {
    let frame = build::tcp(from, world.at("n1", 30080), SYN).on(DEVICES.eth);
    match native.node().run_edge(frame.clone()).verdict {
        Verdict::Device { .. } => true,
        Verdict::Continue => match native.node().run(Hook::FROM_NETWORK, frame).verdict {
            Verdict::Local { .. } => false,
            Verdict::Neighbour { .. } => true,
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_backend_of_this_node_gets_its_share_also_when_packets_are_met_before_the_stack() {
    for v6 in [false, true] {
        let world = World::new(v6, DEVICES)
            .direct()
            .configured(|config| {
                config.flags &= !cirri_abi::node_flag::TUNNEL;
                config.masquerade_mask = 0x3fff;
            })
            .service((ANY, 30080), &[("b", 8080), ("c", 8080)], |row| row.algorithm = Algorithm::RANDOM);
        let mut native = native(&world);
        let away = (1..=4000).filter(|port| leaves(&mut native, &world, (world.ip("w"), *port))).count();
        assert!((1800..2200).contains(&away), "{away} of 4000 went to the other node's one of two backends");
    }
}

#[test]
fn a_connection_whose_beginning_a_flood_has_evicted_goes_on_with_its_backend_and_port() {
    for v6 in [false, true] {
        let world = World::new(v6, DEVICES)
            .direct()
            .configured(|config| {
                config.flags &= !cirri_abi::node_flag::TUNNEL;
                config.masquerade_mask = 0x3fff;
            })
            .service((ANY, 30080), &[("c", 8080), ("c", 8081)], |row| row.algorithm = Algorithm::MAGLEV);
        let mut native = native(&world);
        native.node().limit_flows(1024, 64);
        let mut leaves_with = |port, flags| {
            let frame = build::tcp((world.ip("w"), port), world.at("n1", 30080), flags).on(DEVICES.eth);
            let ran = native.node().run(Hook::FROM_NETWORK, frame);
            assert!(matches!(ran.verdict, Verdict::Neighbour { .. }), "{:?}", ran.verdict);
            let at = if v6 { 54 } else { 34 };
            ran.frame.bytes[at..at + 4].to_vec()
        };
        let begun = leaves_with(1000, SYN);
        for port in 2000..2200 {
            leaves_with(port, SYN);
        }
        // The answer came back before; its ACK is late.
        assert_eq!(leaves_with(1000, ACK), begun);
    }
}

/// Which of the backends b:8080.. (ports from 8080 on) a connection of pod a was given.
fn given(native: &mut Native, world: &World, from: (&str, u16)) -> u16 {
    let frame = build::tcp(world.at(from.0, from.1), world.at("vip", 80), SYN).on(DEVICES.a);
    let ran = native.node().run(Hook::FROM_WORKLOAD, frame);
    assert!(matches!(ran.verdict, Verdict::Local { ifindex } if ifindex == DEVICES.b), "{:?}", ran.verdict);
    let at = if world.v6 { 56 } else { 36 };
    u16::from_be_bytes([ran.frame.bytes[at], ran.frame.bytes[at + 1]])
}

/// A service with that many backends in pod b, ports from 8080 on.
fn many(v6: bool, backends: u16, change: impl Fn(&mut Service)) -> World {
    let ports: Vec<(&str, u16)> = (0..backends).map(|n| ("b", 8080 + n)).collect();
    World::new(v6, DEVICES).service(("vip", 80), &ports, change)
}

#[test]
fn chance_gives_every_backend_its_share() {
    for algorithm in [Algorithm::RANDOM, Algorithm::MAGLEV] {
        let world = many(false, 8, |row| row.algorithm = algorithm);
        let mut native = native(&world);
        let mut shares = BTreeMap::new();
        for port in 1..=8000 {
            *shares.entry(given(&mut native, &world, ("a", port))).or_insert(0) += 1;
        }
        assert_eq!(shares.len(), 8);
        assert!(shares.values().all(|share| (850..1150).contains(share)), "{algorithm}: {shares:?}");
        let counted: Vec<u64> = (1..=8).map(|number| native.node().backend_counter(number).connections).collect();
        assert_eq!(counted, shares.values().copied().collect::<Vec<u64>>(), "counted as given");
    }
}

#[test]
fn a_backend_that_stands_twice_gets_two_shares() {
    let world = many(true, 2, |row| row.inside_count = 3).with(Change::Slots(100, vec![1, 2, 2]));
    let mut native = native(&world);
    let twice = (1..=6000).filter(|port| given(&mut native, &world, ("a", *port)) == 8081).count();
    assert!((3800..4200).contains(&twice), "{twice} of 6000");
}

#[test]
fn with_maglev_every_node_answers_alike() {
    for v6 in [false, true] {
        let world = many(v6, 5, |row| row.algorithm = Algorithm::MAGLEV);
        let (mut one, mut other) = (native(&world), native(&world));
        // The other has seen another past.
        for port in 60_000..60_050 {
            given(&mut other, &world, ("a", port));
        }
        for port in 1..=500 {
            assert_eq!(given(&mut one, &world, ("a", port)), given(&mut other, &world, ("a", port)));
        }
    }
}

#[test]
fn a_client_keeps_its_backend_as_long_as_it_comes_back_in_time_and_the_backend_serves() {
    const SECOND: u64 = 1_000_000_000;
    for v6 in [false, true] {
        let world = many(v6, 8, |row| row.affinity = 60);
        let mut native = native(&world);
        let first = given(&mut native, &world, ("a", 1000));
        for port in 1001..1020 {
            // Each time counts anew: twenty minutes in all.
            native.node().advance(55 * SECOND);
            assert_eq!(given(&mut native, &world, ("a", port)), first);
        }
        let late: Vec<u16> = (2000..2020)
            .map(|port| {
                native.node().advance(65 * SECOND);
                given(&mut native, &world, ("a", port))
            })
            .collect();
        assert!(late.iter().any(|backend| *backend != late[0]), "nobody waits for ever: {late:?}");

        let kept = *late.last().expect("twenty");
        let number = u32::from(kept - 8079);
        native.change(&world.backend_is(number, ("b", kept), BackendState::DRAINING));
        let others: Vec<u16> = (1..=8).filter(|n| *n != kept - 8079).map(|n| n + 8079).collect();
        let slots: Vec<u32> = others.iter().map(|port| u32::from(port - 8079)).collect();
        native.change(&Change::Slots(100, [slots.clone(), vec![slots[0]]].concat()));
        let moved = given(&mut native, &world, ("a", 3000));
        assert!(others.contains(&moved), "one that drains gets nothing new: {moved}");
        assert_eq!(given(&mut native, &world, ("a", 3001)), moved, "and the client keeps the next");
    }
}

#[test]
fn slots_that_name_backends_that_have_failed_are_stepped_over() {
    let world = many(false, 4, |_| ());
    let mut native = native(&world);
    for number in [1, 2] {
        native.change(&world.backend_is(number, ("b", 8079 + number as u16), BackendState::DOWN));
    }
    native.change(&Change::Backend(4, Backend::default()));
    assert!((1..200).all(|port| given(&mut native, &world, ("a", port)) == 8082));
}

fn socket(world: &World, netns: u64, protocol: u8, to: (&str, u16)) -> SimSocket {
    let addr = match to.0 {
        "loopback" if world.v6 => Addr::v6(std::net::Ipv6Addr::LOCALHOST.octets()),
        "loopback" => Addr::v4([127, 0, 0, 53]),
        "nothing" if world.v6 => Addr::UNSPECIFIED,
        "nothing" => Addr::ANY_V4,
        name => addr(world, name),
    };
    let mut socket = SimSocket::default();
    (socket.addr, socket.port, socket.protocol, socket.netns) = (addr, Port::new(to.1), protocol, netns);
    socket
}

fn names(socket: &mut SimSocket, addr: Addr, port: u16) {
    (socket.addr, socket.port) = (addr, Port::new(port));
}

/// The service behind vip and node port 30080, with that many backends in pod b.
fn served(v6: bool, backends: u16) -> World {
    let ports: Vec<(&str, u16)> = (0..backends).map(|n| ("b", 8080 + n)).collect();
    World::new(v6, DEVICES)
        .configured(|config| config.netns_cookie = NODE)
        .service(("vip", 80), &ports, |_| ())
        .service((ANY, 30080), &ports, |_| ())
}

#[test]
fn a_connection_goes_to_a_backend_and_its_peer_is_the_service() {
    for v6 in [false, true] {
        let world = served(v6, 1);
        let mut native = native(&world);
        for (protocol, number) in [(proto::TCP, 1), (proto::UDP, 11)] {
            for (name, port) in [("vip", 80), ("n1", 30080), ("n2", 30080)] {
                let mut socket = socket(&world, POD, protocol, (name, port));
                assert_eq!(native.node().reach(Attempt::Connect, &mut socket), SocketVerdict::Proceed);
                assert_eq!((socket.addr, socket.port), (addr(&world, "b"), Port::new(8080)));
                native.node().restore(&mut socket);
                assert_eq!((socket.addr, socket.port), (addr(&world, name), Port::new(port)), "getpeername");
                names(&mut socket, addr(&world, "w"), 8080);
                native.node().restore(&mut socket);
                assert_eq!(socket.addr, addr(&world, "w"), "another sender is not renamed");
            }
            assert_eq!(native.node().backend_counter(number).connections, 3);
        }
        let mut stranger = socket(&world, POD, proto::UDP, ("b", 8080));
        native.node().restore(&mut stranger);
        assert_eq!(stranger.addr, addr(&world, "b"), "a socket that used no service is told the truth");
    }
}

#[test]
fn what_nobody_serves_is_refused_and_what_is_no_service_is_left_alone() {
    for v6 in [false, true] {
        let world = served(v6, 1).service(("lb", 80), &[], |_| ());
        let mut native = native(&world);
        for (protocol, to, refused) in [
            (proto::TCP, ("vip", 81), true),
            (proto::UDP, ("vip", 81), true),
            (proto::ICMP, ("vip", 0), true),
            (proto::TCP, ("lb", 80), true),
            (proto::UDP, ("lb", 80), true),
            (proto::TCP, ("w", 80), false),
            (proto::TCP, ("n1", 22), false),
            (proto::SCTP, ("n1", 30080), false),
            (proto::TCP, ("b", 30080), false),
        ] {
            for (attempt, netns) in [Attempt::Connect, Attempt::Send].into_iter().flat_map(|it| [(it, POD), (it, NODE)])
            {
                let mut socket = socket(&world, netns, protocol, to);
                let before = (socket.addr, socket.port);
                // Resolvers and ping connect datagram sockets to learn their address: nothing is sent, nothing
                // refused. For a service without backends the node's own packets would meet nobody who refuses them.
                let asks = attempt == Attempt::Connect && protocol == proto::UDP;
                let sorts = asks && (netns == POD || to == ("vip", 81));
                let expected = if refused && !sorts { SocketVerdict::Refused } else { SocketVerdict::Proceed };
                assert_eq!(native.node().reach(attempt, &mut socket), expected, "{to:?}");
                assert_eq!((socket.addr, socket.port), before, "{to:?}");
                assert!(socket.services.is_none(), "{to:?}");
            }
        }
    }
}

#[test]
fn datagrams_of_a_socket_stay_with_a_backend_while_it_serves() {
    for v6 in [false, true] {
        let world = served(v6, 6);
        let mut native = native(&world);
        let mut sender = socket(&world, POD, proto::UDP, ("vip", 80));
        let mut send = |native: &mut Native| {
            names(&mut sender, addr(&world, "vip"), 80);
            assert_eq!(native.node().reach(Attempt::Send, &mut sender), SocketVerdict::Proceed);
            let port = sender.port.number();
            native.node().restore(&mut sender);
            assert_eq!((sender.addr, sender.port), (addr(&world, "vip"), Port::new(80)), "who answers");
            port
        };
        let first = send(&mut native);
        assert!((0..30).all(|_| send(&mut native) == first));
        let number = u32::from(first - 8080) + 11;
        native.change(&world.backend_is(number, ("b", first), BackendState::DRAINING));
        assert_eq!(send(&mut native), first, "one that drains keeps what it has");
        native.change(&Change::Backend(number, Backend::default()));
        let second = send(&mut native);
        assert_ne!(second, first);
        assert!((0..30).all(|_| send(&mut native) == second));
        native.change(&world.backend_is(u32::from(second - 8080) + 11, ("b", second), BackendState::DOWN));
        assert_ne!(send(&mut native), second);
    }
}

#[test]
fn a_socket_remembers_its_last_four_services() {
    let mut world = World::new(false, DEVICES);
    for port in 1..=5 {
        world = world.service(("vip", port), &[("b", 8080)], |_| ());
        let key = world.service_key(("vip", port), proto::UDP);
        let (number, id) = (u32::from(port) + 11, u32::from(port) + 2);
        let Change::Backend(_, backend) = world.backend_is(number, ("b", 9000 + port), BackendState::ACTIVE) else {
            panic!("a backend");
        };
        let row = Service { id, inside_first: id * 100, inside_count: 1, ..Service::default() };
        world = world
            .with(Change::Backend(number, Backend { service: id, ..backend }))
            .with(Change::Slots(id * 100, vec![number]))
            .with(Change::Service(key, row));
    }
    let mut native = native(&world);
    let mut sender = socket(&world, POD, proto::UDP, ("vip", 1));
    let mut known = |native: &mut Native, used: &[u16]| -> Vec<u16> {
        for port in used {
            names(&mut sender, addr(&world, "vip"), *port);
            native.node().reach(Attempt::Connect, &mut sender);
        }
        let told = |port: &u16| {
            names(&mut sender, addr(&world, "b"), 9000 + port);
            native.node().restore(&mut sender);
            sender.addr == addr(&world, "vip") && sender.port == Port::new(*port)
        };
        (1..=5).filter(told).collect()
    };
    assert_eq!(known(&mut native, &[1, 2, 3, 4, 4, 4]), [1, 2, 3, 4], "what is used again takes no other place");
    let after = known(&mut native, &[5]);
    assert_eq!(after.len(), 4, "{after:?}");
    assert!(after.contains(&5) && after.contains(&4), "{after:?}");
}

#[test]
fn node_ports_are_on_loopback_in_the_nodes_namespace_only() {
    for v6 in [false, true] {
        let world = served(v6, 1);
        let mut native = native(&world);
        for name in ["loopback", "nothing"] {
            let mut own = socket(&world, NODE, proto::TCP, (name, 30080));
            assert_eq!(native.node().reach(Attempt::Connect, &mut own), SocketVerdict::Proceed);
            assert_eq!((own.addr, own.port), (addr(&world, "b"), Port::new(8080)));
            let mut other = socket(&world, POD, proto::TCP, (name, 30080));
            let before = (other.addr, other.port);
            assert_eq!(native.node().reach(Attempt::Connect, &mut other), SocketVerdict::Proceed);
            assert_eq!((other.addr, other.port), before);
            let mut elsewhere = socket(&world, NODE, proto::TCP, (name, 30081));
            let before = (elsewhere.addr, elsewhere.port);
            assert_eq!(native.node().reach(Attempt::Connect, &mut elsewhere), SocketVerdict::Proceed);
            assert_eq!((elsewhere.addr, elsewhere.port), before);
        }
    }
}

#[test]
fn ports_of_workloads_on_their_host_are_not_on_other_nodes() {
    for v6 in [false, true] {
        let world = World::new(v6, DEVICES).configured(|config| config.netns_cookie = NODE).service(
            (ANY, 8443),
            &[("b", 8080)],
            |row| row.flags |= service_flag::THIS_NODE,
        );
        let mut native = native(&world);
        for (name, found) in [("n1", true), ("n2", false)] {
            let mut socket = socket(&world, POD, proto::TCP, (name, 8443));
            assert_eq!(native.node().reach(Attempt::Connect, &mut socket), SocketVerdict::Proceed);
            assert_eq!(socket.addr == addr(&world, "b"), found, "{name}");
        }
    }
}

#[test]
fn nobody_on_the_node_is_bound_where_a_service_would_take_its_packets() {
    for v6 in [false, true] {
        let world = served(v6, 1);
        let mut native = native(&world);
        for (netns, protocol, at, may) in [
            (NODE, proto::TCP, ("nothing", 30080), false),
            (NODE, proto::UDP, ("n1", 30080), false),
            (NODE, proto::TCP, ("loopback", 30080), false),
            (NODE, proto::TCP, ("nothing", 30081), true),
            (NODE, proto::TCP, ("nothing", 0), true),
            (NODE, proto::SCTP, ("nothing", 30080), true),
            (POD, proto::TCP, ("nothing", 30080), true),
        ] {
            let mut socket = socket(&world, netns, protocol, at);
            assert_eq!(native.node().bind(&mut socket), may, "{netns} {protocol} {at:?}");
        }
    }
}

#[test]
fn sockets_of_a_namespace_that_is_translated_per_packet_are_left_alone() {
    for v6 in [false, true] {
        let world = served(v6, 1);
        let mut native = native(&world);
        native.node().set_per_packet(POD);
        for to in [("vip", 80), ("vip", 81), ("n1", 30080)] {
            let mut socket = socket(&world, POD, proto::TCP, to);
            let before = (socket.addr, socket.port);
            assert_eq!(native.node().reach(Attempt::Connect, &mut socket), SocketVerdict::Proceed);
            assert_eq!((socket.addr, socket.port), before);
        }
        let mut other = socket(&world, POD + 1, proto::TCP, ("vip", 80));
        native.node().reach(Attempt::Connect, &mut other);
        assert_eq!(other.addr, addr(&world, "b"));
    }
}

#[test]
fn all_sockets_of_a_namespace_keep_one_backend_if_the_service_says_so() {
    let ports: Vec<(&str, u16)> = (0..8).map(|n| ("b", 8080 + n)).collect();
    for algorithm in [Algorithm::RANDOM, Algorithm::MAGLEV] {
        let world = World::new(false, DEVICES)
            .service(("vip", 80), &ports, |row| (row.affinity, row.algorithm) = (100, algorithm));
        let mut native = native(&world);
        let mut chosen = |netns| {
            let mut socket = socket(&world, netns, proto::TCP, ("vip", 80));
            native.node().reach(Attempt::Connect, &mut socket);
            socket.port
        };
        let all: Vec<Port> = (0..40).map(|n| chosen(POD + n)).collect();
        assert!((0..40).all(|n| chosen(POD + n) == all[n as usize]));
        assert!(all.iter().any(|port| *port != all[0]), "not all namespaces the same");
    }
}
