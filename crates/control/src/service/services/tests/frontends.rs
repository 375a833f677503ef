//! Where services are reached.

use super::*;
use cirri_abi::{Algorithm, Forwarding};

#[test]
fn a_cluster_ip_leads_to_the_pods_that_the_selector_selects() {
    let others =
        pod_with("other", "", "containers: [{name: c}]", "podIPs: [{ip: 10.0.0.9}]").replace("app: web", "app: x");
    let manifests = service("clusterIP: 10.96.0.1, ports: [{port: 80, targetPort: 8080}]") + &two_pods() + &others;
    let world =
        expect(&manifests, &["shop/web:80/TCP (IPv4) @ ClusterIP 10.96.0.1:80: in web-1 web-2, out web-1 web-2"]);
    let port = world.one();
    assert_eq!(port.backends[0].port, 8080);
    assert_eq!((port.backends[0].node.as_deref(), port.backends[0].name.as_deref()), (Some("n1"), Some("shop/web-1")));
    assert!(port.inside_only_cluster_ip);
}

#[test]
fn each_port_of_a_service_is_one_of_its_own() {
    expect(
        &(service(
            "clusterIP: 10.96.0.1, ports: [{name: http, port: 80}, {name: dns, port: 53, protocol: UDP}, \
             {name: sig, port: 80, protocol: SCTP}]",
        ) + &pod("web-1", "n1", "[{ip: 10.0.0.1}]")),
        &[
            "shop/web:dns/UDP (IPv4) @ ClusterIP 10.96.0.1:53: in web-1, out web-1",
            "shop/web:http/TCP (IPv4) @ ClusterIP 10.96.0.1:80: in web-1, out web-1",
            "shop/web:sig/SCTP (IPv4) @ ClusterIP 10.96.0.1:80: in web-1, out web-1",
        ],
    );
}

#[test]
fn both_families_are_served_each_by_its_own_addresses() {
    expect(
        &(service("clusterIPs: [10.96.0.1, 'fd00:96::1'], ports: [{port: 80}]")
            + &pod("web-1", "n1", "[{ip: 10.0.0.1}, {ip: 'fd00::1'}]")
            + &pod("web-2", "n2", "[{ip: 'fd00::2'}]")),
        &[
            "shop/web:80/TCP (IPv4) @ ClusterIP 10.96.0.1:80: in web-1, out web-1",
            "shop/web:80/TCP (IPv6) @ ClusterIP [fd00:96::1]:80: in web-1 web-2, out web-1 web-2",
        ],
    );
}

#[test]
fn node_ports_are_at_the_nodes_own_addresses_of_the_services_families() {
    let port = "ports: [{port: 80, nodePort: 30080}]";
    let v4 = "shop/web:80/TCP (IPv4) @ ClusterIP 10.96.0.1:80 NodePort 30080: in , out ";
    expect(&service(&format!("type: NodePort, clusterIP: 10.96.0.1, {port}")), &[v4]);
    let both = "clusterIP: 10.96.0.1, ipFamilies: [IPv4, IPv6]";
    let v6 = "shop/web:80/TCP (IPv6) @ NodePort 30080: in , out ";
    let world = expect(&service(&format!("type: NodePort, {both}, {port}")), &[v4, v6]);
    let addrs: Vec<_> = world.ports.values().map(|port| port.frontends.last().unwrap().addr).collect();
    assert_eq!(addrs, [cirri_abi::Addr::ANY_V4, cirri_abi::Addr::UNSPECIFIED]);
    let neither = format!("type: NodePort, {port}");
    assert_eq!(World::new(&service(&neither)).ports.len(), 2, "no family named: both");
    assert_eq!(World::new(&service(&format!("{neither}, ipFamilyPolicy: SingleStack"))).ports.len(), 1);
}

#[test]
fn a_load_balancer_has_the_addresses_it_was_given_and_not_those_that_it_wishes_for() {
    let spec = "type: LoadBalancer, clusterIP: 10.96.0.1, loadBalancerIP: 203.0.113.7, externalIPs: [198.51.100.1], ports: [{port: 80}]";
    expect(&service(spec), &["shop/web:80/TCP (IPv4) @ ClusterIP 10.96.0.1:80 ExternalIP 198.51.100.1:80: in , out "]);
    expect(
        &given(&service(spec), "203.0.113.9"),
        &[
            "shop/web:80/TCP (IPv4) @ ClusterIP 10.96.0.1:80 LoadBalancer 203.0.113.9:80 ExternalIP 198.51.100.1:80: in , out ",
        ],
    );
}

/// A service with an address in its status.
fn given(service: &str, address: &str) -> String {
    service.replace("}}\n", &format!("}}, status: {{loadBalancer: {{ingress: [{{ip: {address}}}]}}}}}}\n"))
}

#[test]
fn what_has_no_address_of_its_own_is_no_service_port() {
    for spec in
        ["clusterIP: None, ports: [{port: 80}]", "type: ExternalName, externalName: example.com", "ports: [{port: 80}]"]
    {
        expect(&(service(spec) + &two_pods()), &[]);
    }
}

#[test]
fn an_external_address_that_is_a_nodes_own_is_shared() {
    let manifests = service("externalIPs: [192.0.2.1, 192.0.2.2, 198.51.100.1], ports: [{port: 80}]");
    let shared = |world: &World| world.one().frontends.iter().map(|frontend| frontend.shared).collect::<Vec<_>>();
    let mut world = World::new(&manifests);
    assert_eq!(shared(&world), [true, false, false], "this node's");
    world.apply(&node("n2", "b", "192.0.2.2"));
    assert_eq!(shared(&world), [true, true, false], "and another's, which pods here may want to reach");
    world.services.remove("Node", None, "n2");
    world.take();
    assert_eq!(shared(&world), [true, false, false]);
}

#[test]
fn a_node_port_out_of_range_is_refused_and_the_rest_is_served() {
    let world = World::new(&service("type: NodePort, clusterIP: 10.96.0.1, ports: [{port: 80, nodePort: 8080}]"));
    assert_eq!(world.lines(), ["shop/web:80/TCP (IPv4) @ ClusterIP 10.96.0.1:80: in , out "]);
    assert_eq!(
        world.problems(),
        ["Service shop/web: nodePort 8080 is outside of 30000-32767 and is not served; choose one inside or change \
          services.nodePorts of the agents"]
    );
}

#[test]
fn an_address_and_port_belong_to_one_and_both_are_named() {
    let spec = "clusterIP: 10.96.0.1, externalIPs: [198.51.100.1], ports: [{port: 80}]";
    let second = "clusterIP: 10.96.0.2, externalIPs: [198.51.100.1], ports: [{port: 80}]";
    let (a, b) = (named_service("a", spec), named_service("b", second));
    let lines = [
        "shop/a:80/TCP (IPv4) @ ClusterIP 10.96.0.1:80 ExternalIP 198.51.100.1:80: in , out ",
        "shop/b:80/TCP (IPv4) @ ClusterIP 10.96.0.2:80: in , out ",
    ];
    let problem = "Service shop/b: ExternalIP 198.51.100.1:80/TCP belongs to Service shop/a, which comes first \
                   (ClusterIP before NodePort, LoadBalancer, ExternalIP and HostPort; then the older, then by name), and is \
                   not served for this one; give one of them another address or port";
    for order in [format!("{a}{b}"), format!("{b}{a}")] {
        let mut world = World::new(&order);
        assert_eq!((world.lines(), world.problems()), (lines.map(String::from).to_vec(), vec![problem.to_string()]));
        world.remove("Service", "a");
        assert_eq!(
            world.lines(),
            ["shop/b:80/TCP (IPv4) @ ClusterIP 10.96.0.2:80 ExternalIP 198.51.100.1:80: in , out "]
        );
        assert_eq!(world.problems(), Vec::<String>::new());
        world.apply(&a);
        assert_eq!((world.lines(), world.problems()), (lines.map(String::from).to_vec(), vec![problem.to_string()]));
    }
    // The older one comes first, whatever its name.
    let dated = |text: &str, day: u8| {
        text.replace("namespace: shop", &format!("namespace: shop, creationTimestamp: 2026-01-0{day}T00:00:00Z"))
    };
    let world = World::new(&(dated(&a, 2) + &dated(&b, 1)));
    assert!(
        world.problems()[0].starts_with("Service shop/a: ExternalIP 198.51.100.1:80/TCP belongs to Service shop/b")
    );
    // Another port or protocol is another place.
    let udp = named_service("b", "externalIPs: [198.51.100.1], ports: [{port: 80, protocol: UDP}]");
    assert_eq!(World::new(&(a + &udp)).problems(), Vec::<String>::new());
}

#[test]
fn annotations_choose_algorithm_and_forwarding_and_unknown_words_are_named() {
    let text = |annotations: &str| {
        service("clusterIP: 10.96.0.1, ports: [{port: 80}]")
            .replace("namespace: shop", &format!("namespace: shop, annotations: {{{annotations}}}"))
    };
    for (annotations, algorithm, forwarding) in [
        ("", Algorithm::RANDOM, Forwarding::SNAT),
        ("service.cilium.io/lb-algorithm: maglev", Algorithm::MAGLEV, Forwarding::SNAT),
        ("cirri.io/lb-algorithm: maglev, service.cilium.io/lb-algorithm: random", Algorithm::MAGLEV, Forwarding::SNAT),
        ("service.cilium.io/forwarding-mode: dsr", Algorithm::RANDOM, Forwarding::DSR_OPTION),
        ("cirri.io/forwarding-mode: hybrid", Algorithm::RANDOM, Forwarding::DSR_OPTION),
    ] {
        let world = World::new(&text(annotations));
        assert_eq!((world.one().algorithm, world.one().forwarding), (algorithm, forwarding), "{annotations}");
        assert_eq!(world.problems(), Vec::<String>::new());
    }
    let world = World::new(&text("service.cilium.io/lb-algorithm: fair, cirri.io/forwarding-mode: DSR"));
    assert_eq!((world.one().algorithm, world.one().forwarding), (Algorithm::RANDOM, Forwarding::SNAT));
    assert_eq!(
        world.problems(),
        [
            "Service shop/web: the annotation cirri.io/forwarding-mode says \"DSR\", which is not known, and is passed \
             over; use snat or dsr or hybrid",
            "Service shop/web: the annotation service.cilium.io/lb-algorithm says \"fair\", which is not known, and is \
             passed over; use random or maglev",
        ]
    );
}

#[test]
fn hybrid_is_dsr_for_tcp_and_snat_for_the_rest() {
    let manifests = service(
        "clusterIP: 10.96.0.1, ports: [{name: a, port: 1}, {name: b, port: 2, protocol: UDP}, {name: c, port: 3, protocol: SCTP}]",
    );
    let forwarding = |mode, dispatch| {
        let settings = Settings { forwarding: mode, dispatch, ..settings() };
        World::with(settings, &manifests).ports.values().map(|port| port.forwarding).collect::<Vec<_>>()
    };
    let (snat, option, ipip) = (Forwarding::SNAT, Forwarding::DSR_OPTION, Forwarding::DSR_IPIP);
    assert_eq!(forwarding(Mode::Snat, Dispatch::Ipip), [snat, snat, snat]);
    assert_eq!(forwarding(Mode::Dsr, Dispatch::Option), [option, option, option]);
    assert_eq!(forwarding(Mode::Hybrid, Dispatch::Option), [option, snat, snat]);
    assert_eq!(forwarding(Mode::Hybrid, Dispatch::Ipip), [ipip, snat, snat]);
}

#[test]
fn affinity_and_source_ranges_go_into_the_port() {
    let manifests = service(
        "type: LoadBalancer, ipFamilies: [IPv4], sessionAffinity: ClientIP, \
         loadBalancerSourceRanges: [192.0.2.0/24], ports: [{port: 80}]",
    );
    let manifests = given(&manifests, "203.0.113.1");
    let world = World::new(&manifests);
    let port = world.one();
    assert_eq!((port.affinity, port.ranges_deny), (10_800, false));
    assert_eq!(port.ranges, ["192.0.2.0/24".parse().unwrap()]);
    let deny = manifests
        .replace("namespace: shop", "namespace: shop, annotations: {service.cilium.io/src-ranges-policy: deny}");
    assert!(World::new(&deny).one().ranges_deny);
}

#[test]
fn settings_reach_every_port() {
    let manifests = service("clusterIP: 10.96.0.1, ports: [{port: 80}]");
    let mut world = World::new(&manifests);
    let settings =
        Settings { external_cluster_ips: true, algorithm: Algorithm::MAGLEV, maglev_size: Some(251), ..settings() };
    world.services.set_settings(settings);
    assert_eq!(world.take(), ["shop/web:80/TCP (IPv4)"]);
    let port = world.one();
    assert_eq!((port.inside_only_cluster_ip, port.algorithm, port.maglev_size), (false, Algorithm::MAGLEV, Some(251)));
}

fn host_pod(name: &str, node: &str, port: &str) -> String {
    let spec = format!("nodeName: {node}, containers: [{{name: c, ports: [{{containerPort: 80, {port}}}]}}]");
    pod_with(name, "", &spec, "podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]")
}

#[test]
fn a_host_port_is_served_on_the_pods_own_node() {
    expect(
        &host_pod("web-1", "n1", "hostPort: 8080"),
        &[
            "shop/pod/web-1:8080/TCP (IPv4) @ HostPort 8080: in web-1, out web-1",
            "shop/pod/web-1:8080/TCP (IPv6) @ HostPort 8080: in web-1, out web-1",
        ],
    );
    expect(
        &host_pod("web-1", "n1", "hostPort: 8080, hostIP: 192.0.2.1"),
        &["shop/pod/web-1:8080@192.0.2.1/TCP (IPv4) @ HostPort 192.0.2.1:8080: in web-1, out web-1"],
    );
    let one = expect(
        &host_pod("web-1", "n1", "hostPort: 8080, hostIP: 127.0.0.1"),
        &["shop/pod/web-1:8080@127.0.0.1/TCP (IPv4) @ HostPort 127.0.0.1:8080: in web-1, out web-1"],
    );
    assert!(one.one().frontends[0].shared, "other ports of that address are none of its business");
    expect(&host_pod("web-1", "n2", "hostPort: 8080"), &[]);
    let over = host_pod("web-1", "n1", "hostPort: 8080").replace("status: {", "status: {phase: Succeeded, ");
    expect(&over, &[]);
    let own = host_pod("web-1", "n1", "hostPort: 80").replace("spec: {", "spec: {hostNetwork: true, ");
    expect(&own, &[]);
}

#[test]
fn a_host_port_among_the_node_ports_is_refused() {
    let world = World::new(&host_pod("web-1", "n1", "hostPort: 30080"));
    assert_eq!(world.lines(), Vec::<String>::new());
    assert_eq!(
        world.problems(),
        ["Pod shop/web-1: hostPort 30080 is inside of 30000-32767, which belongs to NodePort services, and is not \
          served; choose one outside"]
    );
}

#[test]
fn a_host_port_goes_to_the_successor_as_soon_as_the_pod_terminates() {
    let mut world =
        World::new(&(host_pod("web-1", "n1", "hostPort: 8080") + &host_pod("web-2", "n1", "hostPort: 8080")));
    assert!(world.lines()[0].starts_with("shop/pod/web-1:8080/TCP (IPv4)"));
    assert!(world.problems()[0].starts_with("Pod shop/web-2: HostPort 8080/TCP belongs to Pod shop/web-1"));
    let ending = host_pod("web-1", "n1", "hostPort: 8080")
        .replace("namespace: shop", "namespace: shop, deletionTimestamp: 2026-01-01T00:00:00Z");
    world.apply(&ending);
    assert!(world.lines()[0].starts_with("shop/pod/web-2:8080/TCP (IPv4)"), "{:?}", world.lines());
    world.remove("Pod", "web-1");
    assert_eq!(world.problems(), Vec::<String>::new());
}

#[test]
fn health_check_ports_count_the_ready_endpoints_of_this_node() {
    let spec = "type: LoadBalancer, clusterIP: 10.96.0.1, externalTrafficPolicy: Local, healthCheckNodePort: 30999, \
                ports: [{name: a, port: 80}, {name: b, port: 81}]";
    let mut world = World::new(&(service(spec) + &two_pods()));
    let check = |world: &World| {
        let one = |check: HealthCheck| (check.port, check.service.to_string(), check.local_endpoints);
        world.services.health_checks().into_iter().map(one).collect::<Vec<_>>()
    };
    assert_eq!(check(&world), [(30999, "shop/web".into(), 1)], "a pod counts once, whatever it serves");
    world.apply(&pod_with(
        "web-1",
        "",
        "nodeName: n1, containers: [{name: c}]",
        "podIPs: [{ip: 10.0.0.1}], conditions: [{type: Ready, status: 'False'}]",
    ));
    assert_eq!(check(&world), [(30999, "shop/web".into(), 0)]);
    world.apply(&named_service("a", &spec.replace("10.96.0.1", "10.96.0.2")));
    assert_eq!(check(&world), [(30999, "shop/a".into(), 0)]);
    assert!(world.problems()[0].starts_with("Service shop/web: NodePort 30999/TCP belongs to Service shop/a"));
    world.remove("Service", "a");
    world.remove("Service", "web");
    assert_eq!(check(&world), []);
}

#[test]
fn a_service_that_another_program_forwards_is_left_alone() {
    let labelled = |text: &str| {
        text.replacen("namespace: shop", "namespace: shop, labels: {service.kubernetes.io/service-proxy-name: ours}", 1)
    };
    let manifests = service("type: NodePort, clusterIP: 10.96.0.1, ports: [{port: 80, nodePort: 30080}]");
    let mut world = expect(&(labelled(&manifests) + &two_pods()), &[]);
    // Neither does it take anything from others.
    let other = named_service("zz", "type: NodePort, clusterIP: 10.96.0.2, ports: [{port: 80, nodePort: 30080}]");
    world.apply(&other);
    assert_eq!((world.ports.len(), world.problems()), (1, Vec::new()), "{:?}", world.lines());
    world.remove("Service", "zz");
    // The label comes and goes.
    world.apply(&manifests);
    assert!(!world.ports.is_empty());
    world.apply(&labelled(&manifests));
    assert_eq!(world.lines(), Vec::<String>::new());
}

#[test]
fn a_slice_of_another_program_or_for_dns_alone_is_not_forwarded_to() {
    let manifests = service("clusterIP: 10.96.0.1, ports: [{port: 80}]");
    let slice = |label: &str| {
        slice("web-x", "addressType: IPv4, ports: [{port: 8080}], endpoints: [{addresses: [192.0.2.9]}]")
            .replace("service-name: web", &format!("service-name: web{label}"))
    };
    assert_eq!(World::new(&(manifests.clone() + &slice(""))).one().backends.len(), 1);
    for label in [", service.kubernetes.io/service-proxy-name: ours", ", service.kubernetes.io/headless: ''"] {
        let world = World::new(&(manifests.clone() + &slice(label) + &two_pods()));
        assert_eq!(world.one().backends.len(), 0, "{label}");
    }
}

#[test]
fn sctp_to_another_port_is_a_problem_that_is_named() {
    let sctp = |ports: &str| service(&format!("clusterIP: 10.96.0.1, ports: [{{protocol: SCTP, {ports}}}]"));
    let problems = |manifests: &str| World::new(manifests).problems();
    let named = |name: &str, number: u16| {
        pod_with(
            "web-1",
            "",
            &format!(
                "nodeName: n1, containers: [{{name: c, ports: [{{name: {name}, containerPort: {number}, protocol: SCTP}}]}}]"
            ),
            "podIPs: [{ip: 10.0.0.1}]",
        )
    };
    for good in [
        sctp("port: 3868") + &two_pods(),
        sctp("port: 3868, targetPort: 3868"),
        sctp("port: 3868, targetPort: dia"),
        sctp("port: 3868, targetPort: dia") + &named("dia", 3868),
        sctp("port: 3868, targetPort: 3869").replace("SCTP", "TCP"),
    ] {
        assert_eq!(problems(&good), Vec::<String>::new(), "{good}");
    }
    let node_port = "type: NodePort, clusterIP: 10.96.0.1, ports: [{protocol: SCTP, port: 3868, nodePort: 30000}]";
    for (bad, frontend) in [
        (sctp("port: 3868, targetPort: 3869") + &two_pods(), "ClusterIP 10.96.0.1:3868"),
        (sctp("port: 3868, targetPort: 3869"), "ClusterIP 10.96.0.1:3868"),
        (sctp("port: 3868, targetPort: dia") + &named("dia", 3869), "ClusterIP 10.96.0.1:3868"),
        (service(node_port) + &two_pods(), "NodePort 30000"),
        (named("dia", 3868).replace("protocol: SCTP", "protocol: SCTP, hostPort: 3869"), "HostPort 3869"),
    ] {
        let problems = problems(&bad);
        assert!(!problems.is_empty(), "{bad}");
        let expected = format!("SCTP packets to {frontend} are dropped");
        assert!(problems.iter().all(|text| text.contains(&expected)), "{bad}: {problems:?}");
    }
}
