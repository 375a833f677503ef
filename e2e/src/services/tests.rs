use cirri_control::resource::{self, Resource};

use super::*;

fn pods_by_name() -> BTreeMap<String, resource::Pod> {
    let all = resource::parse_documents("pods.yaml", &pods().unwrap()).unwrap();
    let pods = all.into_iter().filter_map(|one| match one {
        Resource::Pod(pod) => Some((pod.metadata.name.clone(), pod)),
        _ => None,
    });
    pods.collect()
}

/// Addresses that look like real ones.
fn invented() -> Addresses {
    let names = pods_by_name().into_keys().map(|name| format!("{NAMESPACE}/{name}"));
    let names = names.chain(["world", "node1", "node2"].map(String::from));
    let both =
        |index: usize| vec![format!("10.0.0.{index}").parse().unwrap(), format!("fd00::{index}").parse().unwrap()];
    Addresses(names.enumerate().map(|(index, name)| (name, both(index + 1))).collect())
}

fn services(case: &Case) -> BTreeMap<String, resource::Service> {
    let text = case.manifests(&invented()).unwrap();
    let all = resource::parse_documents(&case.name, &text).unwrap_or_else(|error| panic!("{error}"));
    let services = all.into_iter().filter_map(|one| match one {
        Resource::Service(service) => Some((service.metadata.name.clone(), service)),
        Resource::EndpointSlice(_) => None,
        other => panic!("{}: a {}", case.name, other.kind()),
    });
    services.collect()
}

#[test]
fn there_are_at_least_eighty_cases_and_every_manifest_is_read() {
    let cases = all().unwrap();
    assert!(cases.len() >= 80, "{}", cases.len());
    let mut names = BTreeSet::new();
    for case in &cases {
        assert!(case.text.because.len() > 40 && !case.text.probes.is_empty(), "{}", case.name);
        assert!(!case.text.labs.is_empty(), "{}", case.name);
        for name in services(case).into_keys() {
            assert!(names.insert(name.clone()), "{}: the service {name} is in another case too", case.name);
        }
    }
}

#[test]
fn every_probe_names_what_is_there() {
    let pods = pods_by_name();
    let is_place = |place: &str| {
        pods.contains_key(place) || matches!(place, "node:node1" | "node:node2") || place.starts_with("world")
    };
    for case in all().unwrap() {
        let services = services(&case);
        for probe in &case.text.probes {
            let name = &case.name;
            assert!(probe.from.iter().all(|from| is_place(from)), "{name}: {:?}", probe.from);
            let to = probe.to.clone().unwrap_or_else(|| case.services()[0].to_string());
            let to_pod = to.strip_prefix("pod:").is_some_and(|pod| pods.contains_key(pod));
            let known = services.contains_key(&to) || to_pod || to.starts_with("node:") || to.parse::<IpAddr>().is_ok();
            assert!(known, "{name}: {to}");
            if let (Some(service), Some(port)) = (services.get(&to), &probe.port)
                && port.parse::<u16>().is_err()
            {
                let named = service.spec.ports.iter().any(|known| known.name.as_ref() == Some(port));
                assert!(named, "{name}: no port {port}");
            }
            let Expected::Served(served) = &probe.expect else {
                let Expected::Refusal(refusal) = &probe.expect else { unreachable!() };
                assert!(!refusal.refusal.is_empty(), "{name}");
                assert!(refusal.refusal.iter().all(|kind| matches!(kind.as_str(), "refused" | "denied")), "{name}");
                continue;
            };
            let is_backend = |backend: &String| pods.contains_key(backend) || backend == "world";
            assert!(!served.backends.is_empty() && served.backends.iter().all(is_backend), "{name}");
            for backend in &served.backends {
                let client = served.client_of(backend).unwrap_or("client");
                assert!(matches!(client, "client" | "node:node1" | "node:node2"), "{name}: {client}");
            }
            assert!(served.shares.keys().all(|backend| served.backends.contains(backend)), "{name}");
            // A fair choice among two misses one in 24 tries once in eight million times.
            assert!(!served.all || probe.tries >= 24 || served.backends.len() == 1, "{name}: too few tries");
            assert!(!(served.all && served.one), "{name}");
        }
    }
}

/// A dual-stack service whose pods are all ready has the expected backends among the pods that it selects.
#[test]
fn expected_backends_are_pods_that_the_service_selects() {
    let pods = pods_by_name();
    for case in all().unwrap() {
        let services = services(&case);
        for probe in &case.text.probes {
            let to = probe.to.as_deref().or(case.services().first().copied()).unwrap_or_default().to_string();
            let (Some(service), Expected::Served(served)) = (services.get(&to), &probe.expect) else { continue };
            if service.spec.selector.is_empty() {
                continue;
            }
            for backend in &served.backends {
                let labels = &pods[backend].metadata.labels;
                let selected = service.spec.selector.iter().all(|(key, value)| labels.get(key) == Some(value));
                assert!(selected, "{}: {backend} is no pod of {to}", case.name);
            }
        }
    }
}

#[test]
fn every_dimension_is_covered() {
    let mut seen = BTreeSet::new();
    for case in all().unwrap() {
        for service in services(&case).into_values() {
            seen.insert(format!("{:?}", service.spec.kind));
            seen.insert(format!("internal {:?}", service.spec.internal_traffic_policy));
            seen.insert(format!("external {:?}", service.spec.external_traffic_policy));
            seen.insert(format!("affinity {}", service.spec.client_ip_timeout.is_some()));
            seen.insert(format!("headless {}", service.spec.cluster_ips == resource::ClusterIps::Headless));
            seen.insert(format!("external IPs {}", !service.spec.external_ips.is_empty()));
            seen.insert(format!("ranges {}", !service.spec.load_balancer_source_ranges.is_empty()));
            seen.insert(format!("selector {}", !service.spec.selector.is_empty()));
            let mode = service.metadata.annotations.get("service.cilium.io/forwarding-mode");
            seen.insert(format!("mode {}", mode.map_or("default", String::as_str)));
        }
        seen.extend(case.text.labs.iter().map(|lab| format!("{lab:?}")));
        for probe in &case.text.probes {
            seen.extend(probe.proto.all().iter().map(|protocol| protocol.name().to_string()));
            seen.insert(format!("vip {}", probe.vip.as_deref().unwrap_or("cluster")));
            seen.insert(format!("family {}", probe.family.as_deref().unwrap_or("both")));
            seen.insert(format!("socket {}", probe.socket.as_deref().unwrap_or("plain")));
            seen.extend(probe.from.iter().map(|from| format!("from {from}")));
        }
    }
    let wanted = "ClusterIP NodePort LoadBalancer Overlay Direct Ipip Xdp tcp udp";
    let more = [
        "internal Local",
        "internal Cluster",
        "external Local",
        "external Cluster",
        "affinity true",
        "headless true",
        "external IPs true",
        "ranges true",
        "selector false",
        "mode snat",
        "mode dsr",
        "mode default",
        "vip cluster",
        "vip node:node1",
        "vip loopback",
        "vip lb",
        "vip external",
        "family 4",
        "family 6",
        "family both",
        "socket mapped",
        "socket unconnected",
        "from web1",
        "from client1",
        "from client2",
        "from pkt1",
        "from node:node1",
        "from world",
        "from hp2",
    ];
    for dimension in wanted.split(' ').chain(more) {
        assert!(seen.contains(dimension), "no case covers {dimension}");
    }
}
