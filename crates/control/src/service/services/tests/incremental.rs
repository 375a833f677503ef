//! Changes come to the same as a fresh start, and cost what they touch.

use super::*;
use crate::work::{assert_in_proportion, cost_of};
use proptest::prelude::*;
use std::time::Duration;

#[test]
fn only_what_a_change_touches_is_answered() {
    let mut world = World::new(&(service("clusterIP: 10.96.0.1, ports: [{port: 80}]") + &two_pods()));
    let none = Vec::<String>::new();
    let web = ["shop/web:80/TCP (IPv4)"];
    assert_eq!(world.take(), none);
    assert_eq!(world.apply(&two_pods()), none, "the same again");
    assert_eq!(world.apply(&service("clusterIP: 10.96.0.1, ports: [{port: 80}]")), none);
    let other = pod("x", "n1", "[{ip: 10.0.0.3}]").replace("app: web", "app: x");
    assert_eq!(world.apply(&other), none);
    assert_eq!(world.apply(&pod("x", "n1", "[{ip: 10.0.0.3}]")), web, "its label changed");
    assert_eq!(world.apply(&other), web, "and changed back");
    assert_eq!(world.apply(&pod("x", "n1", "[{ip: 10.0.0.3}]").replace("namespace: shop", "namespace: other")), none);
    assert_eq!(world.remove("Pod", "web-1"), web);
    assert_eq!(world.apply(&slice("s", "addressType: IPv4, endpoints: []")), web);
    assert_eq!(world.remove("EndpointSlice", "s"), web);
    assert_eq!(world.remove("Service", "web"), web);
    assert_eq!((world.lines(), world.remove("Service", "web")), (none.clone(), none));
}

#[test]
fn a_selector_that_changes_selects_others() {
    let spec = "clusterIP: 10.96.0.1, ports: [{port: 80}]";
    let mut world = World::new(&(service(spec) + &two_pods()));
    world.apply(&service(spec).replace("selector: {app: web}", "selector: {app: x}"));
    assert_eq!(world.one().backends, []);
    world.apply(&pod("web-3", "n1", "[{ip: 10.0.0.3}]"));
    assert_eq!(world.one().backends, []);
    world.apply(&service(spec));
    assert_eq!(world.one().backends.len(), 3);
    world.apply(&service(spec).replace("selector: {app: web}", "selector: {}"));
    assert_eq!(world.one().backends, [], "nobody is selected by nothing");
}

#[test]
fn a_slice_that_moves_to_another_service_changes_both() {
    let spec = "ports: [{port: 80}], clusterIP";
    let rest = "addressType: IPv4, ports: [{port: 80}], endpoints: [{addresses: [10.0.0.1]}]";
    let mut world = World::new(
        &(service(&format!("{spec}: 10.96.0.1"))
            + &named_service("b", &format!("{spec}: 10.96.0.2"))
            + &slice("s", rest)),
    );
    let moved = slice("s", rest).replace("service-name: web", "service-name: b");
    assert_eq!(world.apply(&moved), ["shop/b:80/TCP (IPv4)", "shop/web:80/TCP (IPv4)"]);
    assert_eq!(world.ports.values().map(|port| port.backends.len()).collect::<Vec<_>>(), [1, 0]);
}

#[test]
fn services_may_exchange_their_addresses() {
    let text = |a: u8, b: u8| {
        named_service("a", &format!("clusterIP: 10.96.0.{a}, ports: [{{port: 80}}]"))
            + &named_service("b", &format!("clusterIP: 10.96.0.{b}, ports: [{{port: 80}}]"))
    };
    let mut world = World::new(&text(1, 2));
    world.apply(&text(2, 1));
    assert_eq!(
        world.lines(),
        [
            "shop/a:80/TCP (IPv4) @ ClusterIP 10.96.0.2:80: in , out ",
            "shop/b:80/TCP (IPv4) @ ClusterIP 10.96.0.1:80: in , out "
        ]
    );
    assert_eq!(world.problems(), Vec::<String>::new());
}

/// A cluster of services in one namespace, each with its pods.
fn large(services: usize, pods: usize) -> Vec<Resource> {
    let mut out = Vec::new();
    let (service, pod) = (service("clusterIP: 10.96.0.1, ports: [{port: 80}]"), pod("p", "n1", "[{ip: 10.0.0.1}]"));
    let (service, pod) = (parse_documents("s", &service).unwrap(), parse_documents("p", &pod).unwrap());
    for n in 0..services {
        let Resource::Service(mut service) = service[0].clone() else { panic!("not a service") };
        service.metadata.name = format!("s{n}");
        service.spec.selector.insert("app".into(), format!("s{n}"));
        service.spec.selector.insert("part-of".into(), "all".into());
        service.spec.cluster_ips =
            crate::resource::ClusterIps::Given(vec![std::net::Ipv4Addr::from(0x0a60_0000 + n as u32).into()]);
        out.push(Resource::Service(service));
        for i in 0..pods {
            let Resource::Pod(mut pod) = pod[0].clone() else { panic!("not a pod") };
            pod.metadata.name = format!("s{n}-{i}");
            pod.metadata.labels.insert("app".into(), format!("s{n}"));
            pod.metadata.labels.insert("part-of".into(), "all".into());
            pod.status.pod_ips[0].ip = std::net::Ipv4Addr::from(0x0af4_0000 + (n * pods + i) as u32).into();
            out.push(Resource::Pod(pod));
        }
    }
    out
}

/// What a number of services with ten pods each costs, and one change among them.
fn costs(count: usize) -> [Duration; 2] {
    let resources = large(count, 10);
    let mut services = Services::new(settings());
    let mut tables = Tables::new(Capacity::default());
    let (all, ()) = cost_of(|| {
        for resource in &resources {
            services.upsert(resource);
        }
        let changes = services.changes();
        assert_eq!(changes.len(), count);
        for (_, port) in changes {
            tables.set(&port.unwrap()).unwrap();
        }
    });
    let pods = resources.iter().filter(|resource| resource.kind() == "Pod").step_by(count / 100);
    let pods: Vec<&Resource> = pods.take(1000).collect();
    let (some, ()) = cost_of(|| {
        for pod in &pods {
            services.remove("Pod", pod.namespace(), pod.name());
            let changes = services.changes();
            assert_eq!(changes.len(), 1);
            for (_, port) in changes {
                assert!(!tables.set(&port.unwrap()).unwrap().is_empty());
            }
        }
    });
    [all, some / pods.len() as u32]
}

#[test]
fn ten_times_as_many_services_cost_ten_times_as_much_and_a_change_costs_what_it_touches() {
    assert_in_proportion(costs(1_000), costs(10_000));
}

/// Something small enough that resources meet.
fn step() -> impl Strategy<Value = String> {
    let service =
        ("[ab]", 0..3u8, any::<bool>(), 0..4usize, 0..3u8).prop_map(|(name, app, node_port, external, address)| {
            // The second two are others' cluster addresses and this node's own.
            let external = ["198.51.100.0", "198.51.100.1", "10.96.0.1", "192.0.2.1"][external];
            let rest =
                if node_port { "type: NodePort, ports: [{port: 80, nodePort: 30080}]" } else { "ports: [{port: 80}]" };
            named_service(&name, &format!("clusterIP: 10.96.0.{address}, externalIPs: [{external}], {rest}"))
                .replace("app: web", &format!("app: '{app}'"))
        });
    let pod = ("[pqr]", 0..3u8, 0..3u8, any::<bool>(), any::<bool>()).prop_map(|(name, app, ip, host, ready)| {
        let port = if host { "hostPort: 8080, containerPort: 1" } else { "containerPort: 1" };
        let status = format!("podIPs: [{{ip: 10.0.0.{}}}], conditions: [{{type: Ready, status: '{ready}'}}]", ip + 1);
        pod_with(&name, "", &format!("nodeName: n1, containers: [{{name: c, ports: [{{{port}}}]}}]"), &status)
            .replace("app: web", &format!("app: '{app}'"))
            .replace("'true'", "'True'")
    });
    let slice = ("[st]", "[ab]", 0..5usize, any::<bool>()).prop_map(|(name, service, ip, node_port)| {
        let ip = ["10.0.1.1", "10.0.1.2", "198.51.100.0", "10.96.0.1", "192.0.2.1"][ip];
        let port = if node_port { 30_080 } else { 80 };
        let rest = format!("addressType: IPv4, ports: [{{port: {port}}}], endpoints: [{{addresses: [{ip}]}}]");
        slice(&name, &rest).replace("service-name: web", &format!("service-name: {service}"))
    });
    let removal = prop_oneof![
        "[ab]".prop_map(|name| format!("Service {name}")),
        "[pqr]".prop_map(|name| format!("Pod {name}")),
        "[st]".prop_map(|name| format!("EndpointSlice {name}")),
    ];
    prop_oneof![3 => service, 4 => pod, 2 => slice, 2 => removal]
}

proptest! {
    #[test]
    fn any_history_comes_to_the_same_as_a_fresh_start(steps in proptest::collection::vec((step(), any::<bool>()), 1..30)) {
        let mut world = World::new("");
        let mut standing: BTreeMap<(String, String), String> = BTreeMap::new();
        for (step, at_once) in steps {
            match step.split_once(' ') {
                Some((kind, name)) if !step.starts_with("---") => {
                    world.services.remove(kind, Some("shop"), name);
                    standing.remove(&(kind.to_string(), name.to_string()));
                }
                _ => {
                    let resource = parse_documents("test.yaml", &step).unwrap().pop().unwrap();
                    standing.insert((resource.kind().to_string(), resource.name().to_string()), step);
                    world.services.upsert(&resource);
                }
            }
            if at_once {
                world.take();
            }
        }
        world.take();
        let all: String = standing.values().map(String::as_str).collect();
        let fresh = World::new(&all);
        prop_assert_eq!(&world.ports, &fresh.ports);
        prop_assert_eq!(world.problems(), fresh.problems());
    }
}
