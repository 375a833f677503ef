//! Devices, addresses, routes and namespaces on the kernel's netlink. Needs root.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use cirri_e2e::kernel::{TestNamespace, veth};
use cirri_loader::net::{Address, Namespace, Neighbour, Net, Route, VethEnd, in_netns};

const MAC: [u8; 6] = [2, 0xc1, 0x44, 0, 0, 1];
/// How often a packet is sent, and how long each is waited for.
const TRIES: usize = 50;
const AGAIN: Duration = Duration::from_millis(100);

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
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

    let mut routes = node_net.routes().await.expect("listed");
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
    assert_eq!(net.routes().await.expect("listed"), [Route::host(pod, two, None)]);
    for (network, prefix) in [("10.99.0.0", 16), ("fd99::", 64)] {
        let nowhere = Route::unreachable(ip(network), prefix);
        net.put_route(&nowhere).await.expect("set");
        assert!(net.routes().await.expect("listed").contains(&nowhere), "{nowhere:?}");
        assert!(net.delete_route(&nowhere).await.expect("deleted"));
        assert!(!net.routes().await.expect("listed").contains(&nowhere), "{nowhere:?}");
    }
    let pods =
        Route { to: ip("10.8.0.0"), prefix: 24, via: Some(ip("192.168.9.9")), device: one, source: None, onlink: true };
    net.put_route(&pods).await.expect("a router that no route reaches");
    assert!(net.routes().await.expect("listed").contains(&pods));
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
    assert_eq!(net.routes().await.expect("listed"), []);
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
    let shown = std::process::Command::new("nsenter").args([&path, "ip", "-d", "link", "show", "cirri_vxlan"]).output();
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
