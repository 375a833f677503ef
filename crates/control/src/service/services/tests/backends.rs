//! Who serves.

use super::*;

const CLUSTER: &str = "clusterIP: 10.96.0.1, ports: [{port: 80}]";
const NODE_PORT: &str = "type: NodePort, ipFamilies: [IPv4], ports: [{port: 80, nodePort: 30080}]";

fn web(rest: &str) -> String {
    format!("shop/web:80/TCP (IPv4) @ ClusterIP 10.96.0.1:80: {rest}")
}

#[track_caller]
fn expect_web(manifests: &str, rest: &str) {
    expect(manifests, &[&web(rest)]);
}

/// An endpoint of a slice, on a node.
fn at(address: &str, node: &str, rest: &str) -> String {
    format!("{{addresses: ['{address}'], nodeName: {node}, {rest}}}")
}

fn ipv4(name: &str, endpoints: &[String]) -> String {
    slice(name, &format!("addressType: IPv4, ports: [{{port: 8080}}], endpoints: [{}]", endpoints.join(", ")))
}

const TERMINATING: &str = "conditions: {ready: false, serving: true, terminating: true}";
const ENDED: &str = "conditions: {ready: false, serving: false, terminating: true}";
const NOT_READY: &str = "conditions: {ready: false}";

#[test]
fn slices_count_instead_of_pods() {
    let manifests = service(CLUSTER) + &two_pods() + &ipv4("web-x", &[at("10.0.9.9", "n1", "")]);
    expect_web(&manifests, "in 10.0.9.9:8080, out 10.0.9.9:8080");
    let empty = service(CLUSTER) + &two_pods() + &ipv4("web-x", &[]);
    expect_web(&empty, "in , out ");
    let stranger = ipv4("other", &[at("10.0.9.9", "n1", "")]).replace("service-name: web", "service-name: other");
    expect_web(&(service(CLUSTER) + &two_pods() + &stranger), "in web-1 web-2, out web-1 web-2");
}

#[test]
fn slices_of_a_service_are_one_set_and_each_place_counts_once() {
    let manifests = service(CLUSTER)
        + &ipv4("web-x", &[at("10.0.0.2", "n1", ""), at("10.0.0.1", "n1", NOT_READY)])
        + &ipv4("web-y", &[at("10.0.0.1", "n1", ""), at("10.0.0.3", "n1", NOT_READY)]);
    expect_web(&manifests, "in 10.0.0.1:8080 10.0.0.2:8080, out 10.0.0.1:8080 10.0.0.2:8080, kept (10.0.0.3:8080)");
}

#[test]
fn slices_match_by_the_name_of_the_port_and_may_differ_in_its_number() {
    let port = |number: u16| format!("ports: [{{name: http, port: {number}}}, {{name: all}}]");
    let one = |name: &str, number, address: &str| {
        slice(name, &format!("addressType: IPv4, {}, endpoints: [{{addresses: [{address}]}}]", port(number)))
    };
    let two = "clusterIP: 10.96.0.1, ports: [{name: http, port: 80, targetPort: web}, {name: all, port: 81}]";
    expect(
        &(service(two) + &one("web-x", 8080, "10.0.0.1") + &one("web-y", 9090, "10.0.0.2")),
        &[
            "shop/web:all/TCP (IPv4) @ ClusterIP 10.96.0.1:81: in , out ",
            "shop/web:http/TCP (IPv4) @ ClusterIP 10.96.0.1:80: in 10.0.0.1:8080 10.0.0.2:9090, out 10.0.0.1:8080 10.0.0.2:9090",
        ],
    );
    let udp =
        slice("web-x", "addressType: IPv4, ports: [{port: 80, protocol: UDP}], endpoints: [{addresses: [10.0.0.1]}]");
    expect_web(&(service(CLUSTER) + &udp), "in , out ");
}

#[test]
fn slices_of_each_family_serve_their_own() {
    let six = slice("web-6", "addressType: IPv6, ports: [{port: 8080}], endpoints: [{addresses: ['fd00::1']}]");
    let names = slice("web-n", "addressType: FQDN, ports: [{port: 8080}], endpoints: [{addresses: [example.com]}]");
    expect(
        &(service("clusterIPs: [10.96.0.1, 'fd00:96::1'], ports: [{port: 80}]")
            + &ipv4("web-4", &[at("10.0.0.1", "n1", "")])
            + &six
            + &names),
        &[
            "shop/web:80/TCP (IPv4) @ ClusterIP 10.96.0.1:80: in 10.0.0.1:8080, out 10.0.0.1:8080",
            "shop/web:80/TCP (IPv6) @ ClusterIP [fd00:96::1]:80: in [fd00::1]:8080, out [fd00::1]:8080",
        ],
    );
}

#[test]
fn a_named_target_port_is_each_pods_own() {
    let with = |name: &str, ports: &str, address: &str| {
        let spec = format!("nodeName: n1, containers: [{{name: a}}, {{name: b, ports: [{ports}]}}]");
        pod_with(name, "", &spec, &format!("podIPs: [{{ip: {address}}}]"))
    };
    let manifests = service("clusterIP: 10.96.0.1, ports: [{port: 80, targetPort: web}]")
        + &with("web-1", "{name: web, containerPort: 8080}", "10.0.0.1")
        + &with("web-2", "{name: dns, containerPort: 53, protocol: UDP}, {name: web, containerPort: 9090}", "10.0.0.2")
        + &with("web-3", "{name: web, containerPort: 7070, protocol: UDP}", "10.0.0.3")
        + &with("web-4", "", "10.0.0.4");
    let world = expect(&manifests, &[&web("in web-1 web-2, out web-1 web-2")]);
    assert_eq!(world.one().backends.iter().map(|backend| backend.port).collect::<Vec<_>>(), [8080, 9090]);
}

#[test]
fn a_named_target_port_may_be_that_of_an_init_container_that_goes_on() {
    let spec = |policy: &str| {
        format!(
            "nodeName: n1, containers: [{{name: a}}], \
             initContainers: [{{name: b{policy}, ports: [{{name: web, containerPort: 8080}}]}}]"
        )
    };
    let pod = |policy: &str| pod_with("web-1", "", &spec(policy), "podIPs: [{ip: 10.0.0.1}]");
    let manifests = service("clusterIP: 10.96.0.1, ports: [{port: 80, targetPort: web}]");
    expect(&(manifests.clone() + &pod(", restartPolicy: Always")), &[&web("in web-1, out web-1")]);
    expect(&(manifests + &pod("")), &[&web("in , out ")]);
}

#[test]
fn readiness_of_a_pod() {
    let manifest = |metadata: &str, status: &str| {
        service(CLUSTER) + &pod_with("web-1", metadata, "nodeName: n1, containers: [{name: c}]", status)
    };
    let ips = "podIPs: [{ip: 10.0.0.1}]";
    let no = "conditions: [{type: Ready, status: 'False'}]";
    let yes = "conditions: [{type: Ready, status: 'True'}]";
    let ending = "deletionTimestamp: 2026-01-01T00:00:00Z";
    let ready = "in web-1, out web-1";
    for (metadata, status, expected) in [
        ("", ips.to_string(), ready),
        ("", format!("phase: Running, {ips}"), ready),
        ("", format!("{yes}, phase: Running, {ips}"), ready),
        ("", format!("{no}, phase: Running, {ips}"), "in , out , kept (web-1)"),
        ("", format!("phase: Pending, {ips}"), "in , out , kept (web-1)"),
        ("", format!("{yes}, phase: Succeeded, {ips}"), "in , out "),
        ("", format!("phase: Failed, {ips}"), "in , out "),
        ("", "phase: Running".to_string(), "in , out "),
        // It still serves, and nobody else does.
        (ending, format!("{yes}, {ips}"), "in (web-1), out (web-1)"),
        (ending, format!("{no}, {ips}"), "in , out , kept (web-1)"),
    ] {
        expect_web(&manifest(metadata, &status), expected);
    }
}

#[test]
fn not_ready_addresses_are_published_where_the_service_says_so() {
    let manifests = service(&format!("{CLUSTER}, publishNotReadyAddresses: true"))
        + &pod_with(
            "web-1",
            "",
            "containers: [{name: c}]",
            "podIPs: [{ip: 10.0.0.1}], conditions: [{type: Ready, status: 'False'}]",
        );
    expect_web(&manifests, "in web-1, out web-1");
}

#[test]
fn addresses_that_cirri_gave_count_instead_of_the_status() {
    let mut world = World::new(&(service(CLUSTER) + &two_pods()));
    world.services.set_pod_addresses("shop", "web-1", &[ip("10.7.0.1"), ip("fd00::1")], Some("n1"));
    assert_eq!(world.take(), ["shop/web:80/TCP (IPv4)"]);
    assert_eq!(world.one().backends.iter().map(|b| b.addr.to_string()).collect::<Vec<_>>(), ["10.0.0.2", "10.7.0.1"]);
    world.services.set_pod_addresses("shop", "web-1", &[ip("10.7.0.1"), ip("fd00::1")], Some("n1"));
    assert_eq!(world.take(), Vec::<String>::new());
    world.services.set_pod_addresses("shop", "web-1", &[], None);
    world.take();
    assert_eq!(world.one().backends[0].addr, ip("10.0.0.1"));
    // They may come before the pod is known.
    world.services.set_pod_addresses("shop", "web-3", &[ip("10.7.0.3")], Some("n3"));
    assert_eq!(world.take(), Vec::<String>::new());
    world.apply(&pod_with("web-3", "", "containers: [{name: c}]", ""));
    let backend = world.one().backends.last().unwrap();
    assert_eq!((backend.addr, backend.node.as_deref()), (ip("10.7.0.3"), Some("n3")));
}

#[test]
fn a_pod_on_the_node_itself_has_the_nodes_address() {
    let spec = |node: &str| format!("hostNetwork: true, nodeName: {node}, containers: [{{name: c}}]");
    let manifests =
        service(CLUSTER) + &pod_with("web-1", "", &spec("n1"), "") + &pod_with("web-2", "", &spec("n2"), "");
    let mut world = World::new(&manifests);
    let addresses = |world: &World| world.one().backends.iter().map(|b| b.addr.to_string()).collect::<Vec<_>>();
    assert_eq!(addresses(&world), ["192.0.2.1"], "of the other node nothing is known yet");
    world.apply(&node("n2", "b", "192.0.2.2"));
    assert_eq!(addresses(&world), ["192.0.2.1", "192.0.2.2"]);
}

#[test]
fn local_policies_leave_the_backends_of_this_node() {
    let pods = two_pods();
    let of = |policies: &str| World::new(&(service(&format!("{NODE_PORT}, {policies}")) + &pods)).lines().join("\n");
    let head = "shop/web:80/TCP (IPv4) @ NodePort 30080: ";
    for (policies, rest) in [
        ("", "in web-1 web-2, out web-1 web-2"),
        ("externalTrafficPolicy: Local", "in web-1 web-2, out web-1"),
        ("internalTrafficPolicy: Local", "in web-1, out web-1 web-2, at world addresses in web-1 web-2"),
        (
            "internalTrafficPolicy: Local, externalTrafficPolicy: Local",
            "in web-1, out web-1, at world addresses in web-1 web-2",
        ),
    ] {
        assert_eq!(of(policies), format!("{head}{rest}"), "{policies}");
    }
    let elsewhere =
        service(&format!("{NODE_PORT}, externalTrafficPolicy: Local")) + &pod("web-2", "n2", "[{ip: 10.0.0.2}]");
    expect(&elsewhere, &[&format!("{head}in web-2, out ")]);
    let unnamed = slice("web-x", "addressType: IPv4, ports: [{port: 8080}], endpoints: [{addresses: [192.0.2.1]}]");
    let local = service(&format!("{NODE_PORT}, externalTrafficPolicy: Local")) + &unnamed;
    expect(&local, &[&format!("{head}in 192.0.2.1:8080, out 192.0.2.1:8080")]);
}

#[test]
fn terminating_backends_serve_where_nobody_else_is_left() {
    let local = format!("{NODE_PORT}, externalTrafficPolicy: Local");
    let (one, two) = (|rest: &str| at("10.0.0.1", "n1", rest), |rest: &str| at("10.0.0.2", "n2", rest));
    let (a, b) = ("10.0.0.1:8080", "10.0.0.2:8080");
    for (spec, endpoints, rest) in [
        (NODE_PORT, [one(TERMINATING), two("")], format!("in {b}, out {b}, kept ({a})")),
        (NODE_PORT, [one(TERMINATING), two(TERMINATING)], format!("in ({a}) ({b}), out ({a}) ({b})")),
        (NODE_PORT, [one(TERMINATING), two(NOT_READY)], format!("in ({a}), out ({a}), kept ({b})")),
        (NODE_PORT, [one(ENDED), two(NOT_READY)], format!("in , out , kept ({a}) ({b})")),
        // Each node looks at its own.
        (local.as_str(), [one(TERMINATING), two("")], format!("in {b}, out ({a})")),
        (local.as_str(), [one(ENDED), two("")], format!("in {b}, out , kept ({a})")),
    ] {
        let manifests = service(spec) + &ipv4("web-x", &endpoints);
        expect(&manifests, &[&format!("shop/web:80/TCP (IPv4) @ NodePort 30080: {rest}")]);
    }
}

#[test]
fn weights_come_from_the_slice_and_zero_takes_no_new_connections() {
    let weighted = |name: &str, weight: &str, address: &str| {
        let rest = format!("addressType: IPv4, ports: [{{port: 8080}}], endpoints: [{{addresses: [{address}]}}]");
        slice_with(name, &format!("service.cilium.io/weight: '{weight}'"), &rest)
    };
    let manifests = service(CLUSTER) + &weighted("a", "3", "10.0.0.1") + &weighted("b", "0", "10.0.0.2");
    let world = expect(&manifests, &[&web("in 10.0.0.1:8080, out 10.0.0.1:8080, kept 10.0.0.2:8080")]);
    assert_eq!(world.one().backends.iter().map(|backend| backend.weight).collect::<Vec<_>>(), [3, 0]);
    for wrong in ["65536", "-1", "much"] {
        let world = World::new(&(service(CLUSTER) + &weighted("a", wrong, "10.0.0.1")));
        assert_eq!(world.one().backends[0].weight, 1);
        assert_eq!(
            world.problems(),
            [format!(
                "EndpointSlice shop/a: the weight \"{wrong}\" is no number from 0 to 65535; 1 is used, correct it"
            )]
        );
    }
}

#[test]
fn hints_are_followed_inside_if_all_ready_endpoints_have_them() {
    let hint = |zone: &str| format!("hints: {{forZones: [{{name: {zone}}}]}}");
    let manifests = |hints: [&str; 3]| {
        let endpoints: Vec<String> =
            (1..).zip(hints).map(|(n, hints)| at(&format!("10.0.0.{n}"), "n9", hints)).collect();
        service(CLUSTER) + &ipv4("web-x", &endpoints) + &node("n1", "a", "192.0.2.1")
    };
    let topology = || Settings { topology: true, ..settings() };
    let inside = |settings: Settings, hints: [&str; 3]| {
        let world = World::with(settings, &manifests(hints));
        assert_eq!(world.one().outside.len(), world.one().backends.iter().filter(|b| b.state == 1).count());
        world.one().inside.clone()
    };
    let (a, b) = (&*hint("a"), &*hint("b"));
    assert_eq!(inside(topology(), [a, b, a]), [0, 2]);
    assert_eq!(inside(settings(), [a, b, a]), [0, 1, 2], "not asked for");
    assert_eq!(inside(topology(), [a, b, ""]), [0, 1, 2], "one has none");
    assert_eq!(inside(topology(), [b, b, b]), [0, 1, 2], "nobody is meant for here");
    assert_eq!(inside(topology(), [a, b, NOT_READY]), [0], "who is not ready need not have any");
    let node_hint = "hints: {forNodes: [{name: n1}], forZones: [{name: a}]}";
    let other = "hints: {forNodes: [{name: n2}], forZones: [{name: a}]}";
    assert_eq!(inside(topology(), [node_hint, other, other]), [0]);
    assert_eq!(inside(topology(), [other, other, a]), [0, 1, 2], "nobody on this node: the zone");
    let mut nowhere = World::with(
        topology(),
        &(service(CLUSTER) + &ipv4("web-x", &[at("10.0.0.1", "n9", a), at("10.0.0.2", "n9", b)])),
    );
    assert_eq!(nowhere.one().inside, [0, 1], "this node's zone is not known");
    nowhere.apply(&node("n1", "b", "192.0.2.1"));
    assert_eq!(nowhere.one().inside, [1]);
}

#[test]
fn traffic_distribution_keeps_pods_of_the_zone_or_node_where_nobody_makes_slices() {
    let nodes = node("n1", "a", "192.0.2.1") + &node("n2", "a", "192.0.2.2") + &node("n3", "b", "192.0.2.3");
    let pods = two_pods() + &pod("web-3", "n3", "[{ip: 10.0.0.3}]");
    let inside = |distribution: &str| {
        let manifests = service(&format!("{CLUSTER}, trafficDistribution: {distribution}")) + &nodes + &pods;
        World::with(Settings { topology: true, ..settings() }, &manifests).one().inside.clone()
    };
    assert_eq!(inside("PreferClose"), [0, 1]);
    assert_eq!(inside("PreferSameZone"), [0, 1]);
    assert_eq!(inside("PreferSameNode"), [0]);
    assert_eq!(inside("''"), [0, 1, 2]);
}
