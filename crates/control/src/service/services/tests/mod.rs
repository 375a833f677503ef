//! Small manifests, and what comes out of them. This node is `n1` in zone `a`.
//!
//! A service port is shown as one line, such as
//! `shop/web:80/TCP (IPv4) @ ClusterIP 10.96.0.1:80: in web-1 web-2, out web-1, kept web-3`:
//! whom clients inside and outside may be given, and who only keeps what he has. Where clients inside may
//! be given others at addresses for the world, these stand there too.

mod backends;
mod doubts;
mod frontends;
mod incremental;

use super::*;
use crate::resource::parse_documents;
use crate::service::table::{Capacity, Tables};
use crate::service::{Dispatch, Mode};
use std::net::SocketAddr;

/// A cluster, and what stands in the tables after the changes so far.
struct World {
    services: Services,
    ports: BTreeMap<PortId, ServicePort>,
    tables: Tables,
}

impl World {
    fn new(manifests: &str) -> World {
        World::with(settings(), manifests)
    }

    fn with(settings: Settings, manifests: &str) -> World {
        let mut world = World {
            services: Services::new(settings),
            ports: BTreeMap::new(),
            tables: Tables::new(Capacity::default()),
        };
        world.apply(manifests);
        world
    }

    /// Takes manifests; answers the names of the service ports that changed.
    fn apply(&mut self, manifests: &str) -> Vec<String> {
        for resource in parse_documents("test.yaml", manifests).unwrap_or_else(|error| panic!("{error}")) {
            self.services.upsert(&resource);
        }
        self.take()
    }

    fn remove(&mut self, kind: &str, name: &str) -> Vec<String> {
        self.services.remove(kind, Some("shop"), name);
        self.take()
    }

    /// Takes changes over; each must find its addresses free.
    fn take(&mut self) -> Vec<String> {
        let mut names = BTreeSet::new();
        for (id, port) in self.services.changes() {
            names.insert(id.to_string());
            match port {
                Some(port) => {
                    assert_eq!(port.id, id);
                    self.tables.set(&port).unwrap_or_else(|error| panic!("{error}"));
                    self.ports.insert(id, port);
                }
                None => {
                    assert!(!self.tables.remove(&id).is_empty(), "{id} was not there");
                    self.ports.remove(&id);
                }
            }
        }
        names.into_iter().collect()
    }

    fn lines(&self) -> Vec<String> {
        self.ports.values().map(line).collect()
    }

    /// The only service port.
    fn one(&self) -> &ServicePort {
        assert_eq!(self.ports.len(), 1, "{:?}", self.lines());
        self.ports.values().next().unwrap()
    }

    fn problems(&self) -> Vec<String> {
        self.services.problems().iter().map(ToString::to_string).collect()
    }
}

/// A service port as one line.
fn line(port: &ServicePort) -> String {
    let frontends: Vec<String> = port.frontends.iter().map(claims::describe).collect();
    let name = |index: &usize| {
        let backend = &port.backends[*index];
        let name = backend.name.as_deref().map(|name| name.rsplit('/').next().unwrap().to_string());
        let name = name.unwrap_or_else(|| SocketAddr::new(backend.addr, backend.port).to_string());
        if backend.state == cirri_abi::BackendState::ACTIVE { name } else { format!("({name})") }
    };
    let set = |set: &[usize]| set.iter().map(name).collect::<Vec<_>>().join(" ");
    let chosen: BTreeSet<usize> =
        port.inside.iter().chain(&port.outside).chain(port.within.iter().flatten()).copied().collect();
    let within =
        port.within.as_ref().map_or(String::new(), |within| format!(", at world addresses in {}", set(within)));
    let kept: Vec<usize> = (0..port.backends.len()).filter(|index| !chosen.contains(index)).collect();
    let mut line =
        format!("{} @ {}: in {}, out {}", port.id, frontends.join(" "), set(&port.inside), set(&port.outside));
    line += &within;
    if !kept.is_empty() {
        line += &format!(", kept {}", set(&kept));
    }
    line
}

fn settings() -> Settings {
    Settings { node: "n1".into(), node_addresses: vec![ip("192.0.2.1"), ip("2001:db8::1")], ..Settings::default() }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A service `web` that selects `app: web`.
fn service(spec: &str) -> String {
    named_service("web", spec)
}

fn named_service(name: &str, spec: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: shop}}, spec: {{selector: {{app: web}}, {spec}}}}}\n"
    )
}

/// A pod with the label `app: web`, on a node.
fn pod(name: &str, node: &str, ips: &str) -> String {
    pod_with(name, "", &format!("nodeName: {node}, containers: [{{name: c}}]"), &format!("podIPs: {ips}"))
}

fn pod_with(name: &str, metadata: &str, spec: &str, status: &str) -> String {
    let metadata = format!("name: {name}, namespace: shop, labels: {{app: web}}, {metadata}");
    format!("---\n{{apiVersion: v1, kind: Pod, metadata: {{{metadata}}}, spec: {{{spec}}}, status: {{{status}}}}}\n")
}

/// A slice of the service `web`.
fn slice(name: &str, rest: &str) -> String {
    slice_with(name, "", rest)
}

fn slice_with(name: &str, annotations: &str, rest: &str) -> String {
    format!(
        "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: {name}, namespace: shop, \
         labels: {{kubernetes.io/service-name: web}}, annotations: {{{annotations}}}}}, {rest}}}\n"
    )
}

fn node(name: &str, zone: &str, address: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Node, metadata: {{name: {name}, labels: {{topology.kubernetes.io/zone: {zone}}}}}, \
         status: {{addresses: [{{type: InternalIP, address: {address}}}, {{type: Hostname, address: {name}}}]}}}}\n"
    )
}

/// Two ready pods, one on each node.
fn two_pods() -> String {
    pod("web-1", "n1", "[{ip: 10.0.0.1}]") + &pod("web-2", "n2", "[{ip: 10.0.0.2}]")
}

#[track_caller]
fn expect(manifests: &str, lines: &[&str]) -> World {
    let world = World::new(manifests);
    assert_eq!(world.lines(), lines, "{manifests}");
    assert_eq!(world.problems(), Vec::<String>::new(), "{manifests}");
    world
}
