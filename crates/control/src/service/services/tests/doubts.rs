//! Who comes first to an address, what nobody gets, and which endpoints are not used.

use super::*;

/// A service of this namespace, with other documents as they are.
fn of(namespace: &str, service: &str) -> String {
    service.replace("namespace: shop", &format!("namespace: {namespace}"))
}

fn endpoint(service: &str, address: &str, port: &str) -> String {
    let rest = format!("addressType: IPv4, ports: [{{{port}}}], endpoints: [{{addresses: [{address}]}}]");
    slice(&format!("{service}-{}", address.replace('.', "-")), &rest)
        .replace("service-name: web", &format!("service-name: {service}"))
}

fn backends(world: &World, service: &str) -> Vec<String> {
    let of = |port: &&ServicePort| port.id.service == service;
    let ports = world.ports.values().filter(of).flat_map(|port| &port.backends);
    ports.map(|backend| SocketAddr::new(backend.addr, backend.port).to_string()).collect()
}

#[test]
fn who_brings_an_address_does_not_take_it_from_those_who_are_given_it_later() {
    let dated =
        |text: &str| text.replace("namespace: shop", "namespace: shop, creationTimestamp: 2026-01-01T00:00:00Z");
    let port = "ports: [{port: 80, nodePort: 30080}]";
    let squatter = dated(&named_service(
        "a",
        "externalIPs: [10.96.0.9, 203.0.113.9, 192.0.2.1], ports: [{name: a, port: 80}, {name: b, port: 30080}]",
    ));
    let mut world = World::new(&squatter);
    assert_eq!(world.problems(), Vec::<String>::new());
    let late = named_service("z", &format!("type: LoadBalancer, ipFamilies: [IPv4], clusterIP: 10.96.0.9, {port}"))
        .replace("}}\n", "}, status: {loadBalancer: {ingress: [{ip: 203.0.113.9}]}}}\n");
    world.apply(&late);
    let all = world.lines();
    assert_eq!(
        all,
        [
            "shop/a:a/TCP (IPv4) @ ExternalIP 192.0.2.1:80: in , out ",
            "shop/a:b/TCP (IPv4) @ ExternalIP 10.96.0.9:30080 ExternalIP 203.0.113.9:30080: in , out ",
            "shop/z:80/TCP (IPv4) @ ClusterIP 10.96.0.9:80 LoadBalancer 203.0.113.9:80 NodePort 30080: in , out ",
        ],
        "a node port is one of every node's addresses"
    );
    assert_eq!(world.problems().len(), 3, "{:?}", world.problems());
    assert!(world.problems().iter().all(|text| text.starts_with("Service shop/a:") && text.contains("Service shop/z")));
    assert_eq!(all, World::new(&(late + &squatter)).lines());
    world.remove("Service", "z");
    assert_eq!((world.lines(), world.problems()), (World::new(&squatter).lines(), Vec::new()));
}

#[test]
fn the_overlays_port_of_a_node_is_nobodys() {
    let udp = |addresses: &str| {
        format!("clusterIP: 10.96.0.1, externalIPs: [{addresses}], ports: [{{port: 8472, protocol: UDP}}]")
    };
    let refused = |frontend: &str| {
        format!(
            "{frontend}/UDP is where nodes send each other the packets of pods, and is not served; choose another port"
        )
    };
    let mut world = World::new(&service(&udp("192.0.2.1, 192.0.2.2, 198.51.100.1")));
    let line = |addresses: &str| {
        vec![format!(
            "shop/web:8472/UDP (IPv4) @ ClusterIP 10.96.0.1:8472 {addresses}ExternalIP 198.51.100.1:8472: in , out "
        )]
    };
    let problem = |address: &str| format!("Service shop/web: {}", refused(&format!("ExternalIP {address}:8472")));
    assert_eq!((world.lines(), world.problems()), (line("ExternalIP 192.0.2.2:8472 "), vec![problem("192.0.2.1")]));
    // Another node is known by its resource, or from what nodes tell each other.
    world.services.set_node_addresses("n2", &[ip("192.0.2.2")]);
    world.take();
    assert_eq!((world.lines(), world.problems()), (line(""), vec![problem("192.0.2.1"), problem("192.0.2.2")]));
    world.apply(&node("n2", "b", "192.0.2.2"));
    world.services.set_node_addresses("n2", &[]);
    world.take();
    assert_eq!(world.lines(), line(""));
    world.services.remove("Node", None, "n2");
    world.take();
    assert_eq!(world.lines(), line("ExternalIP 192.0.2.2:8472 "));

    let spec = "nodeName: n1, containers: [{name: c, ports: [{containerPort: 1, hostPort: 8472, protocol: UDP}]}]";
    for host_ip in ["", "hostIP: 192.0.2.1, "] {
        let spec = spec.replace("hostPort", &format!("{host_ip}hostPort"));
        let world = World::new(&pod_with("web-1", "", &spec, "podIPs: [{ip: 10.0.0.1}]"));
        let place = if host_ip.is_empty() { "HostPort 8472" } else { "HostPort 192.0.2.1:8472" };
        assert_eq!((world.lines(), world.problems()), (vec![], vec![format!("Pod shop/web-1: {}", refused(place))]));
    }
}

#[test]
fn an_endpoint_that_is_a_nodes_overlay_is_not_used() {
    let manifests = service("clusterIP: 10.96.0.1, ports: [{name: a, port: 1, protocol: UDP}, {name: b, port: 1}]")
        + &endpoint("web", "192.0.2.2", "name: a, port: 8472, protocol: UDP")
        + &endpoint("web", "10.0.0.2", "name: a, port: 8472, protocol: UDP")
        + &endpoint("web", "192.0.2.1", "name: b, port: 8472");
    let mut world = World::new(&manifests);
    assert_eq!(backends(&world, "web"), ["10.0.0.2:8472", "192.0.2.2:8472", "192.0.2.1:8472"]);
    world.services.set_node_addresses("n2", &[ip("192.0.2.2")]);
    world.take();
    assert_eq!(backends(&world, "web"), ["10.0.0.2:8472", "192.0.2.1:8472"]);
    assert_eq!(
        world.problems(),
        [
            "Service shop/web: the endpoint 192.0.2.2:8472/UDP is where a node takes the packets of pods from others, and \
          is not used; serve from another port"
        ]
    );
    world.services.set_node_addresses("n2", &[]);
    world.take();
    assert_eq!(backends(&world, "web").len(), 3);
}

#[test]
fn an_endpoint_that_is_a_service_itself_is_not_used_and_both_are_named() {
    let web = service("clusterIP: 10.96.0.1, ports: [{port: 80}]");
    let alone = |address: &str, port: u16| web.clone() + &endpoint("web", address, &format!("port: {port}"));
    let other = "clusterIP: 10.96.0.2, ports: [{port: 80, nodePort: 30080}], ipFamilies: [IPv4]";
    let given = named_service("b", &format!("type: LoadBalancer, {other}"))
        .replace("}}\n", "}, status: {loadBalancer: {ingress: [{ip: 203.0.113.9}, {ip: 192.0.2.1}]}}}\n");
    let brought = named_service("b", &format!("type: NodePort, externalIPs: [198.51.100.1, 192.0.2.1], {other}"));
    for (address, port, other, frontend) in [
        ("10.96.0.2", 80, &given, Some("ClusterIP 10.96.0.2:80")),
        ("203.0.113.9", 80, &given, Some("LoadBalancer 203.0.113.9:80")),
        ("192.0.2.1", 30080, &given, Some("NodePort 30080")),
        ("198.51.100.1", 80, &brought, Some("ExternalIP 198.51.100.1:80")),
        ("10.96.0.2", 81, &given, None),
        ("192.0.2.7", 30080, &given, None),
        // A program of the node listens there.
        ("192.0.2.1", 80, &given, None),
        ("192.0.2.1", 80, &brought, None),
        // Who brings an address takes nobody's endpoint elsewhere.
        ("198.51.100.1", 80, &of("x", &brought), None),
        ("203.0.113.9", 80, &of("x", &given), Some("LoadBalancer 203.0.113.9:80")),
    ] {
        let name = if other.contains("namespace: x") { "x/b" } else { "shop/b" };
        let place = format!("{address}:{port}");
        let mut world = World::new(&alone(address, port));
        assert_eq!(backends(&world, "web"), [&*place]);
        world.apply(other);
        let (used, problems) = match frontend {
            None => (vec![place.clone()], vec![]),
            Some(frontend) => (
                vec![],
                vec![format!(
                    "Service shop/web: the endpoint {place}/TCP is {frontend} of Service {name} itself, so that packets \
                     could go round for ever, and is not used; name the endpoints behind it instead"
                )],
            ),
        };
        assert_eq!((backends(&world, "web"), world.problems()), (used, problems), "{place}");
        world.services.remove("Service", Some(name.split_once('/').unwrap().0), "b");
        world.take();
        assert_eq!((backends(&world, "web"), world.problems()), (vec![place], vec![]));
    }
    // Its own.
    let own = World::new(&alone("10.96.0.1", 80));
    assert_eq!(backends(&own, "web"), Vec::<String>::new());
    assert!(own.problems()[0].contains("is ClusterIP 10.96.0.1:80 of Service shop/web itself"), "{:?}", own.problems());
    // The others serve as if it were not there, even those that only do so where nobody else is left.
    let last = slice(
        "last",
        "addressType: IPv4, ports: [{port: 80}], endpoints: [{addresses: [10.0.0.9], conditions: {ready: false, \
         serving: true, terminating: true}}]",
    );
    let world = World::new(&(alone("10.96.0.1", 80) + &last));
    assert_eq!((world.one().inside.clone(), backends(&world, "web")), (vec![0], vec!["10.0.0.9:80".to_string()]));
}

#[test]
fn containers_may_have_one_number_at_several_addresses_of_the_node() {
    let ports = "ports: [{containerPort: 80, hostPort: 8080, hostIP: 192.0.2.1}]}, {name: d, ports: [{containerPort: 81, \
                 hostPort: 8080, hostIP: 127.0.0.1}]}]";
    let spec = format!("nodeName: n1, containers: [{{name: c, {ports}");
    let world = World::new(&pod_with("web-1", "", &spec, "podIPs: [{ip: 10.0.0.1}]"));
    assert_eq!(
        world.lines(),
        [
            "shop/pod/web-1:8080@127.0.0.1/TCP (IPv4) @ HostPort 127.0.0.1:8080: in web-1, out web-1",
            "shop/pod/web-1:8080@192.0.2.1/TCP (IPv4) @ HostPort 192.0.2.1:8080: in web-1, out web-1",
        ]
    );
    assert_eq!(world.ports.values().map(|port| port.backends[0].port).collect::<Vec<_>>(), [81, 80]);
    let twice = spec.replace("127.0.0.1", "192.0.2.1");
    let world = World::new(&pod_with("web-1", "", &twice, "podIPs: [{ip: 10.0.0.1}]"));
    assert_eq!(world.one().backends[0].port, 80);
    assert_eq!(
        world.problems(),
        ["Pod shop/web-1: hostPort 8080 is asked for twice, and the first container's is served"]
    );
}
