//! Devices, addresses, routes and namespaces on the kernel's netlink. Needs root.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;
use std::{io, process::Command};

use cirri_e2e::kernel::{TestNamespace, veth};
use cirri_loader::net::{
    Address, Asked, DeviceSettings, Lookup, Namespace, Neighbour, NeighbourChange, Neighbours, Net, OpenSettings,
    Route, Rules, Selector, VethEnd, Vxlan, in_netns, lookup, rules, sockets,
};
use socket2::{Domain, Protocol, Socket, Type};

const MAC: [u8; 6] = [2, 0xc1, 0x44, 0, 0, 1];
/// How often a packet is sent, and how long each is waited for.
const TRIES: usize = 50;
const AGAIN: Duration = Duration::from_millis(100);

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Cirri's routes, which are no more than they say.
async fn own_routes(net: &Net) -> Vec<Route> {
    let all = net.routes().await.expect("listed");
    assert!(all.iter().all(|own| own.plain), "{all:?}");
    all.into_iter().map(|own| own.route).collect()
}

fn run(place: &TestNamespace, line: &str) {
    let path = format!("--net={}", place.namespace.path().display());
    let ran = Command::new("nsenter").arg(path).args(line.split(' ')).output().expect("it runs");
    assert!(ran.status.success(), "{line}: {}", String::from_utf8_lossy(&ran.stderr));
}

async fn up(net: &Net, name: &str) -> u32 {
    net.set_up(name).await.expect("brought up");
    net.link(name).await.expect("there").index
}

#[tokio::test]
async fn a_veth_pair_is_made_across_namespaces_with_names_addresses_and_sizes_at_once() {
    let (node, pod) = (TestNamespace::new(), TestNamespace::new());
    let (node_net, pod_net) = (node.net(), pod.net());
    let outside = VethEnd { name: "lxc1".into(), mac: Some(MAC), mtu: Some(1450), namespace: None };
    let inside =
        VethEnd { name: "eth0".into(), mtu: Some(1450), namespace: Some(pod.namespace.clone()), ..VethEnd::default() };
    node_net.create_veth(&outside, &inside).await.expect("made");
    node_net.create_veth(&outside, &inside).await.expect("making it twice is no error");

    let outside = node_net.link("lxc1").await.expect("outside");
    let inside = pod_net.link("eth0").await.expect("inside");
    assert_eq!((outside.mac, outside.mtu, outside.up, outside.kind.as_str()), (Some(MAC), 1450, false, "veth"));
    assert_eq!((inside.mtu, outside.peer, inside.peer), (1450, Some(inside.index), Some(outside.index)));
    assert_eq!(node_net.find_link("eth0").await.expect("asked"), None);
    assert_eq!(node_net.find_link_by_index(outside.index).await.expect("asked"), Some(outside));

    assert!(node_net.delete_link("lxc1").await.expect("deleted"));
    assert!(!node_net.delete_link("lxc1").await.expect("deleted again"));
    assert_eq!(pod_net.find_link("eth0").await.expect("asked"), None);
}

#[tokio::test]
async fn a_workload_reaches_its_node_over_the_routes_that_cirri_sets() {
    let (node, pod) = (TestNamespace::new(), TestNamespace::new());
    let (node_net, pod_net) = (node.net(), pod.net());
    let outside = VethEnd { name: "lxc1".into(), mac: Some(MAC), ..VethEnd::default() };
    let inside = VethEnd { name: "eth0".into(), namespace: Some(pod.namespace.clone()), ..VethEnd::default() };
    node_net.create_veth(&outside, &inside).await.expect("made");
    let (lo, lxc, eth) = (up(&node_net, "lo").await, up(&node_net, "lxc1").await, up(&pod_net, "eth0").await);
    let pod_mac = pod_net.link("eth0").await.expect("inside").mac.expect("a veth has one");

    for (node_ip, pod_ip, gateway, bits) in [
        (ip("192.168.7.1"), ip("10.7.0.5"), ip("169.254.1.1"), 32),
        (ip("fd00:7::1"), ip("fd00:10::5"), ip("fe80::1"), 128),
    ] {
        for _twice in 0..2 {
            node_net.add_address(&Address { ip: node_ip, prefix: bits, device: lo }).await.expect("node address");
            node_net.put_route(&Route::host(pod_ip, lxc, Some(node_ip))).await.expect("route to the pod");
            node_net.put_neighbour(&Neighbour { ip: pod_ip, mac: pod_mac, device: lxc }).await.expect("the pod's mac");
            pod_net.add_address(&Address { ip: pod_ip, prefix: bits, device: eth }).await.expect("pod address");
            if gateway.is_ipv4() {
                pod_net.put_route(&Route::host(gateway, eth, None)).await.expect("route to the gateway");
            }
            pod_net.put_route(&Route::default_via(gateway, eth)).await.expect("default route");
            // The packet path would answer for the gateway.
            pod_net.put_neighbour(&Neighbour { ip: gateway, mac: MAC, device: eth }).await.expect("the gateway's mac");
        }
        let server = node.namespace.run(|| UdpSocket::bind((node_ip, 0))).expect("entered").expect("bound");
        let port = server.local_addr().expect("bound").port();
        server.set_read_timeout(Some(AGAIN)).expect("set");
        let client = pod.namespace.run(|| UdpSocket::bind((pod_ip, 0))).expect("entered").expect("bound");
        let mut heard = [0; 16];
        // A device that just came up loses what is sent before the kernel got round to it.
        let arrived = (0..TRIES).find_map(|_| {
            client.send_to(b"hello", (node_ip, port)).expect("sent");
            server.recv_from(&mut heard).ok()
        });
        let (length, from) = arrived.expect("it arrives");
        assert_eq!((&heard[..length], from.ip()), (b"hello".as_slice(), pod_ip));
    }

    let mut routes = own_routes(&node_net).await;
    routes.sort();
    let expected = [
        Route::host(ip("10.7.0.5"), lxc, Some(ip("192.168.7.1"))),
        Route::host(ip("fd00:10::5"), lxc, Some(ip("fd00:7::1"))),
    ];
    assert_eq!(routes, expected, "what is listed is what was set, and nothing of the kernel's own");
    assert_eq!(node_net.neighbours().await.expect("listed").len(), 2);
    assert_eq!(pod_net.default_route(false).await.expect("asked").map(|route| route.device), Some(eth));
    assert_eq!(pod_net.default_route(true).await.expect("asked").and_then(|route| route.via), Some(ip("fe80::1")));

    assert!(node_net.delete_route(&expected[0]).await.expect("deleted"));
    assert!(!node_net.delete_route(&expected[0]).await.expect("deleted again"));
    assert!(node_net.delete_neighbour(lxc, ip("10.7.0.5")).await.expect("deleted"));
    assert!(!node_net.delete_neighbour(lxc, ip("10.7.0.5")).await.expect("deleted again"));
    let address = Address { ip: ip("192.168.7.1"), prefix: 32, device: lo };
    assert!(node_net.addresses().await.expect("listed").contains(&address));
    assert!(node_net.delete_address(&address).await.expect("deleted"));
    assert!(!node_net.delete_address(&address).await.expect("deleted again"));
}

#[tokio::test]
async fn a_route_is_replaced_when_its_device_or_source_changes() {
    let place = TestNamespace::new();
    let net = place.net();
    let one = veth(&net, "one", "one-peer").await;
    let two = veth(&net, "two", "two-peer").await;
    for name in ["lo", "one", "one-peer", "two", "two-peer"] {
        net.set_up(name).await.expect("brought up");
    }
    let pod = ip("10.7.0.5");
    net.put_route(&Route::host(pod, one, None)).await.expect("set");
    net.put_route(&Route::host(pod, two, None)).await.expect("replaced");
    assert_eq!(own_routes(&net).await, [Route::host(pod, two, None)]);
    for (network, prefix) in [("10.99.0.0", 16), ("fd99::", 64)] {
        let nowhere = Route::unreachable(ip(network), prefix);
        net.put_route(&nowhere).await.expect("set");
        assert!(own_routes(&net).await.contains(&nowhere), "{nowhere:?}");
        assert!(net.delete_route(&nowhere).await.expect("deleted"));
        assert!(!own_routes(&net).await.contains(&nowhere), "{nowhere:?}");
    }
    let pods =
        Route { to: ip("10.8.0.0"), prefix: 24, via: Some(ip("192.168.9.9")), device: one, source: None, onlink: true };
    net.put_route(&pods).await.expect("a router that no route reaches");
    assert!(own_routes(&net).await.contains(&pods));
}

#[tokio::test]
async fn a_route_of_cirris_protocol_that_says_more_is_told_from_one_of_cirris() {
    let place = TestNamespace::new();
    let net = place.net();
    let device = veth(&net, "one", "one-peer").await;
    net.set_up("one").await.expect("brought up");
    let [nowhere, pod] = [Route::unreachable(ip("10.99.0.0"), 16), Route::host(ip("10.7.0.5"), device, None)];
    for (wanted, lines) in [
        (
            nowhere,
            &["prohibit 10.99.0.0/16 proto 193", "throw 10.99.0.0/16 proto 193", "blackhole 10.99.0.0/16 proto 193"][..],
        ),
        (pod, &["10.7.0.5 dev one scope link proto 193 mtu lock 600"]),
    ] {
        for line in lines {
            run(&place, &format!("ip route replace {line}"));
            let found = net.routes().await.expect("listed");
            assert!(matches!(found[..], [own] if !own.plain), "{line}: {found:?}");
            net.put_route(&wanted).await.expect("replaced");
            assert_eq!(own_routes(&net).await, [wanted], "{line}");
        }
        assert!(net.delete_route(&wanted).await.expect("deleted"));
    }
}

#[tokio::test]
async fn the_way_of_packets_is_asked_for_with_their_source_and_device_and_names_the_router() {
    let place = TestNamespace::new();
    let net = place.net();
    let (one, two) = (veth(&net, "one", "one-peer").await, veth(&net, "two", "two-peer").await);
    for name in ["lo", "one", "one-peer", "two", "two-peer"] {
        up(&net, name).await;
    }
    for line in [
        "ip addr add 192.168.1.1/24 dev one",
        "ip addr add 192.168.2.1/24 dev two",
        "ip route add 10.8.0.0/24 via 192.168.1.9",
        "ip route add 10.8.0.7 via 192.168.1.8",
        "ip route add 10.9.0.0/24 dev two",
        "ip rule add pref 10 from 192.168.2.1 lookup 100",
        "ip rule add pref 11 iif two to 10.8.0.0/24 blackhole",
        "ip rule add pref 12 fwmark 7 iif two lookup 100",
        "ip route add default via 192.168.2.9 table 100",
    ] {
        run(&place, line);
    }
    net.set_sysctl("ipv4/ip_forward", "1").expect("set");
    net.set_sysctl("ipv4/conf/all/rp_filter", "0").expect("set");
    net.set_sysctl("ipv4/conf/two/rp_filter", "0").expect("set");
    let asked = place.namespace.run(|| {
        let way = |from: Option<&str>, by| lookup(Asked { to: ip("10.8.0.3"), from: from.map(ip), by }).expect("told");
        let by_router = |device, via| Lookup::Leaves { device, via: Some(ip(via)) };
        assert_eq!(way(None, None), by_router(one, "192.168.1.9"));
        assert_eq!(way(Some("192.168.2.1"), None), by_router(two, "192.168.2.9"));
        assert_eq!(way(Some("10.7.0.5"), Some(two)), Lookup::Nowhere);
        assert_eq!(way(Some("10.7.0.5"), Some(one)), by_router(one, "192.168.1.9"));
        rules(false).expect("told")
    });
    let from = Selector { from: Some((ip("192.168.2.1"), 32)), by: None };
    let by = Selector { from: None, by: Some("two".into()) };
    assert_eq!(asked.expect("entered"), Rules { has_main: true, selectors: vec![from, by] });
    let ranges = [(ip("10.8.0.0"), 24), (ip("10.9.0.0"), 24)];
    assert_eq!(net.strange_routes(&ranges).await.expect("listed"), [(ip("10.8.0.7"), 32)]);
}

#[tokio::test]
async fn a_device_is_looked_up_where_no_port_is_left_for_sockets() {
    let place = TestNamespace::new();
    let net = place.net();
    let device = veth(&net, "one", "one-peer").await;
    net.set_sysctl("ipv4/ip_local_reserved_ports", "1-65535").expect("set");
    assert_eq!(net.device_number("one").expect("told"), device);
    assert_eq!(net.device_name(device).expect("told").as_deref(), Some("one"));
}

#[tokio::test]
async fn the_settings_of_all_devices_are_told_at_once() {
    let place = TestNamespace::new();
    let net = place.net();
    let device = veth(&net, "one", "one-peer").await;
    for (forwarding, filter) in [("1", "2"), ("0", "0")] {
        net.set_sysctl("ipv4/conf/one/forwarding", forwarding).expect("set");
        net.set_sysctl("ipv6/conf/one/forwarding", forwarding).expect("set");
        net.set_sysctl("ipv4/conf/one/rp_filter", filter).expect("set");
        let (forwarding, rp_filter) = (forwarding.parse().ok(), filter.parse().ok());
        let expected = DeviceSettings { forwarding_v4: forwarding, rp_filter, forwarding_v6: forwarding };
        assert_eq!(net.device_settings(true).expect("told").get(&device), Some(&expected));
        let without = DeviceSettings { forwarding_v6: None, ..expected };
        assert_eq!(net.device_settings(false).expect("told").get(&device), Some(&without));
    }
}

#[tokio::test]
async fn an_overlay_device_that_does_more_is_told_from_ours() {
    let place = TestNamespace::new();
    let net = place.net();
    net.create_vxlan("ours", cirri_abi::VXLAN_PORT, 1450).await.expect("made");
    let ours = net.link("ours").await.expect("there");
    let wanted = Vxlan { port: cirri_abi::VXLAN_PORT, collect_metadata: true, odd: false };
    assert_eq!((ours.vxlan, ours.noarp), (Some(wanted), true));
    run(&place, "ip link set ours arp on");
    assert!(!net.link("ours").await.expect("there").noarp);
    net.set_noarp("ours").await.expect("set");
    assert!(net.link("ours").await.expect("there").noarp);
    net.delete_link("ours").await.expect("deleted");
    for (more, odd) in [("", false), ("vnifilter", true), ("gpe", true), ("gbp", true), ("local 192.0.2.1", true)] {
        let line = format!("ip link add other type vxlan external dstport {} nolearning {more}", wanted.port);
        run(&place, line.trim());
        let other = net.link("other").await.expect("there").vxlan;
        assert_eq!(other, Some(Vxlan { odd, ..wanted }), "{more}");
        net.delete_link("other").await.expect("deleted");
    }
}

#[tokio::test]
async fn a_static_route_works_like_any_other_and_is_not_taken_for_one_of_cirris() {
    let place = TestNamespace::new();
    let net = place.net();
    let device = veth(&net, "one", "one-peer").await;
    for name in ["lo", "one"] {
        net.set_up(name).await.expect("brought up");
    }
    let route = Route::default_via(ip("192.168.9.1"), device);
    for _twice in 0..2 {
        net.put_static_route(&route).await.expect("set");
    }
    assert_eq!(net.default_route(false).await.expect("asked"), Some(route));
    assert_eq!(own_routes(&net).await, []);
}

#[tokio::test]
async fn the_overlay_device_takes_its_peers_from_metadata_and_makes_no_noise() {
    let place = TestNamespace::new();
    let net = place.net();
    net.create_vxlan("cirri_vxlan", cirri_abi::VXLAN_PORT, 1450).await.expect("made");
    net.create_vxlan("cirri_vxlan", cirri_abi::VXLAN_PORT, 1450).await.expect("making it twice is no error");
    net.set_up("cirri_vxlan").await.expect("brought up");
    let link = net.link("cirri_vxlan").await.expect("there");
    assert_eq!((link.kind.as_str(), link.mtu, link.up), ("vxlan", 1450, true));
    let path = format!("--net={}", place.namespace.path().display());
    let shown = Command::new("nsenter").args([&path, "ip", "-d", "link", "show", "cirri_vxlan"]).output();
    let shown = String::from_utf8_lossy(&shown.expect("ip runs").stdout).into_owned();
    for part in ["external", "NOARP", "dstport 8472", "nolearning"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
}

#[tokio::test]
async fn devices_can_be_changed_renamed_moved_and_bridged() {
    let (one, two) = (TestNamespace::new(), TestNamespace::new());
    let (net, other) = (one.net(), two.net());
    veth(&net, "a", "b").await;
    net.set_mtu("a", 1400).await.expect("set");
    net.set_mac("a", MAC).await.expect("set");
    net.rename("a", "c").await.expect("renamed");
    net.create_bridge("br0").await.expect("made");
    net.set_controller("c", "br0").await.expect("a port");
    let bridge = net.link("br0").await.expect("there").index;
    let link = net.link("c").await.expect("there");
    assert_eq!((link.mtu, link.mac, link.controller), (1400, Some(MAC), Some(bridge)));
    net.set_up("c").await.expect("up");
    net.set_down("c").await.expect("down");
    assert!(!net.link("c").await.expect("there").up);
    net.move_to("b", &two.namespace).await.expect("moved");
    assert_eq!(other.link("b").await.expect("there").kind, "veth");
    assert_eq!(net.find_link("b").await.expect("asked"), None);
}

#[tokio::test]
async fn settings_are_those_of_the_namespace_and_not_of_this_process() {
    let place = TestNamespace::new();
    let net = place.net();
    let outside = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("read");
    let flipped = if outside.trim() == "1" { "0" } else { "1" };
    net.set_sysctl("ipv4/ip_forward", flipped).expect("written");
    net.set_sysctl("ipv4/ip_forward", flipped).expect("written again");
    assert_eq!(net.sysctl("ipv4/ip_forward").expect("read"), flipped);
    assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("read"), outside);
    let error = net.set_sysctl("ipv4/no_such_thing", "1").expect_err("must fail").to_string();
    assert!(error.contains("no_such_thing") && error.contains(place.name()), "{error}");
}

#[tokio::test]
async fn settings_that_stay_open_are_those_of_the_device_that_has_the_name_now() {
    let (place, other) = (TestNamespace::new(), TestNamespace::new());
    let net = place.net();
    let names = ["ipv4/conf/lxc1/rp_filter", "ipv6/conf/lxc1/accept_ra", "ipv4/ip_forward", "ipv4/conf/lxc2/rp_filter"];
    let mut open = OpenSettings::default();
    let mut read = || -> Vec<Option<String>> { open.read(&net, names).expect("read") };
    let filter = |value: &str| net.set_sysctl(names[0], value).expect("written");
    let shown = |found: &[Option<String>]| found.iter().map(|it| it.clone().unwrap_or_default()).collect::<Vec<_>>();

    assert_eq!(read()[0], None, "no device yet");
    veth(&net, "lxc1", "eth0").await;
    net.set_sysctl(names[1], "0").expect("written");
    net.set_sysctl(names[2], "0").expect("written");
    for value in ["0", "1", "2"] {
        filter(value);
        assert_eq!(shown(&read()), [value, "0", "0", ""]);
    }
    assert!(net.delete_link("lxc1").await.expect("deleted"));
    assert_eq!(shown(&read()), ["", "", "0", ""]);

    veth(&net, "lxc1", "eth0").await;
    filter("1");
    assert_eq!(shown(&read())[0], "1");
    // Made anew between two looks.
    assert!(net.delete_link("lxc1").await.expect("deleted"));
    veth(&net, "lxc1", "eth0").await;
    filter("2");
    assert_eq!(shown(&read())[0], "2");
    // Under another name, and then another device under this one.
    net.rename("lxc1", "lxc2").await.expect("renamed");
    assert_eq!(shown(&read()), ["", "", "0", "2"]);
    veth(&net, "lxc1", "eth1").await;
    filter("1");
    assert_eq!(shown(&read()), ["1", "1", "0", "2"]);
    // In another namespace.
    let moved = ["link", "set", "lxc1", "netns", other.name()];
    let done = place.namespace.run(|| Command::new("ip").args(moved).status()).expect("entered").expect("ip runs");
    assert!(done.success());
    assert_eq!(shown(&read()), ["", "", "0", "2"]);
}

#[tokio::test]
async fn no_more_settings_stay_open_than_a_process_can_afford() {
    let place = TestNamespace::new();
    let net = place.net();
    for n in 0..100 {
        veth(&net, &format!("many{n}"), &format!("many{}", n + 100)).await;
    }
    let of_each = |setting: &str| (0..200).map(|n| setting.replace('*', &format!("many{n}"))).collect::<Vec<_>>();
    let (filters, sizes) = (of_each("ipv4/conf/*/rp_filter"), of_each("ipv6/conf/*/mtu"));
    let stay_open = || {
        let files = std::fs::read_dir("/proc/self/fd").expect("listed").flatten();
        let paths = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        paths.filter(|path| path.to_string_lossy().contains("/conf/many")).count()
    };
    let mut open = OpenSettings::default();
    for (names, left) in [([&*filters, &*sizes].concat(), 384), (filters, 200)] {
        for _twice in 0..2 {
            let read = open.read(&net, names.iter().map(String::as_str)).expect("read");
            assert!(read.iter().all(Option::is_some), "{read:?}");
            assert_eq!(stay_open(), left);
        }
    }
}

#[tokio::test]
async fn code_runs_inside_a_namespace_and_the_caller_stays_outside() {
    let place = TestNamespace::new();
    veth(&place.net(), "only-here", "peer").await;
    let seen = |names: Vec<String>| names.iter().any(|name| name == "only-here");
    let names = || std::fs::read_to_string("/proc/thread-self/net/dev").map(|text| vec![text]).expect("read");
    let text = in_netns(place.namespace.path(), || names()[0].clone()).expect("entered");
    assert!(text.contains("only-here"));
    let inside = place.namespace.run_async(|| async {
        let net = Net::here().expect("opened");
        net.links().await.expect("listed").into_iter().map(|link| link.name).collect::<Vec<_>>()
    });
    assert!(seen(inside.await.expect("entered")));
    assert!(!names()[0].contains("only-here"));
}

#[tokio::test]
async fn a_name_can_be_made_twice_repaired_after_a_crash_and_removed_twice() {
    let place = TestNamespace::new();
    veth(&place.net(), "mark", "peer").await;
    let again = Namespace::create(place.name()).expect("made again");
    assert!(Net::of(again).expect("opened").find_link("mark").await.expect("asked").is_some(), "it is the same one");
    assert!(Namespace::create_new(place.name()).is_err(), "the name is taken");

    let name = format!("{}-crashed", place.name());
    std::fs::write(Namespace::path_of(&name), "").expect("what a crash leaves: a file without a mount");
    assert!(Namespace::open(Namespace::path_of(&name)).is_err());
    assert!(Namespace::create_new(&name).is_err(), "the name is somebody's");
    Namespace::create(&name).expect("repaired");
    assert!(Namespace::delete(&name).expect("removed"));
    assert!(!Namespace::delete(&name).expect("removed again"));
}

#[test]
fn the_cookie_of_a_namespace_is_its_own_and_stays() {
    let (one, two) = (TestNamespace::new(), TestNamespace::new());
    let cookie = |place: &TestNamespace| place.namespace.cookie().expect("asked");
    assert_eq!(cookie(&one), cookie(&one));
    assert_ne!(cookie(&one), cookie(&two));
    let again = Namespace::open(one.namespace.path()).expect("opened again");
    assert_eq!(again.cookie().expect("asked"), cookie(&one));
}

/// A UDP socket in a namespace, connected to an address; with `local` it shares its port with others.
fn connected(place: &TestNamespace, local: Option<SocketAddr>, to: SocketAddr) -> UdpSocket {
    let open = || -> io::Result<UdpSocket> {
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
        if let Some(local) = local {
            socket.set_reuse_port(true)?;
            socket.bind(&local.into())?;
        }
        socket.connect(&to.into())?;
        socket.set_read_timeout(Some(AGAIN))?;
        Ok(socket.into())
    };
    place.namespace.run(open).expect("entered").expect("connected")
}

#[tokio::test]
async fn connected_datagram_sockets_are_ended_by_their_remote_end_in_one_namespace_only() {
    let (place, other) = (TestNamespace::new(), TestNamespace::new());
    for place in [&place, &other] {
        up(&place.net(), "lo").await;
    }
    let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
    let (gone, gone6, alive) = (at("127.0.0.1:5353"), at("[::1]:5353"), at("127.0.0.1:5354"));
    let ended = [
        connected(&place, None, gone),
        // A program that speaks IPv6 only, to an IPv4 address.
        connected(&place, None, at("[::ffff:127.0.0.1]:5353")),
        connected(&place, None, gone6),
        // Two that only their number tells apart.
        connected(&place, Some(at("127.0.0.1:7000")), gone),
        connected(&place, Some(at("127.0.0.1:7000")), gone),
    ];
    let left = [connected(&place, None, alive), connected(&other, None, gone)];
    let unconnected = place.namespace.run(|| UdpSocket::bind("127.0.0.1:0")).expect("entered").expect("bound");

    let count = sockets::end_datagrams(&place.namespace, |remote| [gone, gone6].contains(&remote)).expect("ended");
    assert_eq!(count, ended.len());
    for socket in &ended {
        let error = socket.recv(&mut [0; 8]).expect_err("it was ended").kind();
        assert_eq!(error, io::ErrorKind::ConnectionAborted);
        assert!(socket.peer_addr().is_err(), "it is connected to nobody");
    }
    for socket in &left {
        assert_eq!(socket.recv(&mut [0; 8]).expect_err("nobody sends").kind(), io::ErrorKind::WouldBlock);
        assert!(socket.peer_addr().is_ok());
    }
    unconnected.send_to(b"hello", alive).expect("it goes on");
    let again = sockets::end_datagrams(&place.namespace, |remote| [gone, gone6].contains(&remote)).expect("asked");
    assert_eq!(again, 0);
}

#[tokio::test]
async fn neighbours_that_the_kernel_finds_and_loses_are_heard_of_and_others_are_not() {
    let (one, two) = (TestNamespace::new(), TestNamespace::new());
    let (net, other) = (one.net(), two.net());
    let near = VethEnd { name: "eth0".into(), ..VethEnd::default() };
    let far = VethEnd { name: "eth0".into(), namespace: Some(two.namespace.clone()), ..VethEnd::default() };
    net.create_veth(&near, &far).await.expect("made");
    let (here, there) = (up(&net, "eth0").await, up(&other, "eth0").await);
    let mac = other.link("eth0").await.expect("there").mac.expect("a veth has one");
    let (near, far) = (ip("192.0.2.1"), ip("192.0.2.2"));
    net.add_address(&Address { ip: near, prefix: 24, device: here }).await.expect("an address");
    other.add_address(&Address { ip: far, prefix: 24, device: there }).await.expect("an address");
    let client = one.namespace.run(|| UdpSocket::bind((near, 0))).expect("entered").expect("bound");

    let heard = one.namespace.run_async(move || async move {
        let mut neighbours = Neighbours::here().expect("listening");
        let net = Net::here().expect("opened");
        // Made known by somebody: no news.
        let known = Neighbour { ip: ip("192.0.2.77"), mac: MAC, device: here };
        net.put_neighbour(&known).await.expect("made known");
        let mut next = async || loop {
            let change = tokio::time::timeout(Duration::from_secs(10), neighbours.changed()).await.expect("in time");
            let change = change.expect("there is more to come");
            // The devices make their own link-local addresses known to each other.
            if change.ip.is_ipv4() {
                return change;
            }
        };
        client.send_to(b"hello", (far, 9)).expect("sent");
        let found = next().await;
        net.delete_neighbour(here, far).await.expect("forgotten");
        (found, next().await)
    });
    let (found, lost) = heard.await.expect("entered");
    assert_eq!(found, NeighbourChange { ip: far, device: here, mac: Some(mac) });
    assert_eq!(lost, NeighbourChange { mac: None, ..found });
}

#[tokio::test]
async fn errors_name_the_object_and_the_namespace() {
    let place = TestNamespace::new();
    let net = place.net();
    let errors = [
        net.set_up("eth9").await.expect_err("no such device").to_string(),
        net.put_route(&Route::host(ip("10.7.0.5"), 99, None)).await.expect_err("no such device").to_string(),
        net.add_address(&Address { ip: ip("10.7.0.5"), prefix: 32, device: 99 }).await.expect_err("none").to_string(),
    ];
    for (error, object) in errors.iter().zip(["eth9", "10.7.0.5/32", "10.7.0.5/32"]) {
        assert!(error.contains(object) && error.contains(place.name()), "{error}");
    }
    let error = Namespace::open("/etc/passwd").expect_err("no namespace").to_string();
    assert!(error.contains("/etc/passwd"), "{error}");
}
