//! From one source to its service ports.

use super::choose::{Endpoint, Near, choose};
use super::claims::{self, Place, Rank, Source};
use super::pods::{KnownPod, PodKey, PodPort};
use super::{HealthCheck, Problem, ServiceName, Services};
use crate::resource::{
    ClusterIps, EndpointHints, IpFamily, IpFamilyPolicy, Metadata, PortRef, Protocol, SERVICE_PROXY_NAME_LABEL,
    Service, ServicePortSpec, ServiceType, TrafficPolicy,
};
use crate::service::{Backend, Frontend, FrontendKind, Mode, PortId, ServicePort};
use cirri_abi::{Addr, Algorithm, BackendState, proto};
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// What a source asks for, before others' claims are looked at.
#[derive(Debug, Default)]
pub struct Built {
    /// Its service ports.
    pub ports: Vec<ServicePort>,
    /// Its health check port.
    pub health: Option<HealthCheck>,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
    /// Places, besides those that it wants, on whose owners it depends what came out.
    pub watched: Vec<Place>,
}

impl Services {
    /// The places that a source asks for, and how it stands among others.
    pub(super) fn wants(&self, source: &Source) -> (Rank, Vec<(Place, FrontendKind)>) {
        let place = |frontend: &Frontend, protocol| (claims::place(frontend, protocol), frontend.kind);
        match source {
            Source::Service(name) => {
                let Some(service) = self.services.get(name) else { return Default::default() };
                let rank = rank(service.metadata.creation_timestamp.as_deref());
                let mut wanted = Vec::new();
                if has_addresses(service) {
                    for port in &service.spec.ports {
                        let frontends = families(service)
                            .into_iter()
                            .flat_map(|v6| self.frontends(service, port, v6, &mut Notes::default()));
                        wanted.extend(frontends.map(|frontend| place(&frontend, port.protocol.number())));
                    }
                    let health = service.spec.health_check_node_port.map(claims::health_check);
                    wanted.extend(health.map(|frontend| place(&frontend, proto::TCP)));
                }
                (rank, wanted)
            }
            Source::Pod(key) => {
                let Some(pod) = self.pods.get(key) else { return Default::default() };
                let rank = Rank { terminating: pod.terminating, ..rank(pod.created.as_deref()) };
                let ports = self.build_host_ports(key, pod).ports;
                let wanted = ports.iter().flat_map(|port| port.frontends.iter().map(|f| place(f, port.id.protocol)));
                (rank, wanted.collect())
            }
        }
    }

    /// What comes of a source, now that it is known who has which place; `None`: it is not there.
    pub(super) fn build(&self, source: &Source) -> Option<Built> {
        let mut built = match source {
            Source::Service(name) => self.build_service(name, self.services.get(name)?),
            Source::Pod(key) => self.build_host_ports(key, self.pods.get(key)?),
        };
        for port in &built.ports {
            let protocol = port.id.protocol;
            let shared = port.frontends.iter().filter(|frontend| frontend.shared);
            built.watched.extend(shared.map(|f| claims::node_place(f.addr.into(), f.port, protocol)));
        }
        Some(built)
    }

    fn build_service(&self, name: &ServiceName, service: &Service) -> Built {
        let spec = &service.spec;
        let mut notes = Notes { subject: format!("Service {name}"), problems: Vec::new() };
        if !has_addresses(service) {
            return Built::default();
        }
        let mut watched = Vec::new();
        let mut ports = Vec::new();
        let mut ready_here: BTreeSet<String> = BTreeSet::new();
        let traits = self.traits(service, &mut notes);
        for port in &spec.ports {
            for v6 in families(service) {
                let frontends = self.frontends(service, port, v6, &mut notes);
                if frontends.is_empty() {
                    continue;
                }
                let mut endpoints = self.endpoints(name, service, port, v6, &mut notes.problems);
                self.note_sctp(port, &frontends, &endpoints, &mut notes);
                let protocol = port.protocol.number();
                watched.extend(endpoints.iter().flat_map(|endpoint| self.watched(endpoint, protocol)));
                endpoints.retain(|endpoint| {
                    let doubt = self.doubt(name, endpoint, protocol);
                    doubt.map(|text| notes.add(text)).is_none()
                });
                let local = endpoints.iter().filter(|endpoint| endpoint.local && endpoint.ready);
                ready_here.extend(local.map(|e| e.name.as_deref().map_or_else(|| e.addr.to_string(), str::to_string)));
                let id = PortId {
                    namespace: name.namespace.clone(),
                    service: name.name.clone(),
                    port: port.name.clone().unwrap_or_else(|| port.port.to_string()),
                    protocol: port.protocol.number(),
                    v6,
                };
                let near = Near { node: &self.settings.node, zone: self.nodes.zone(&self.settings.node) };
                let inside_policy = spec.internal_traffic_policy;
                ports.push(ServicePort {
                    frontends,
                    inside: choose(&endpoints, inside_policy, self.settings.topology.then_some(near)),
                    outside: choose(&endpoints, spec.external_traffic_policy, None),
                    within: (inside_policy == TrafficPolicy::Local)
                        .then(|| choose(&endpoints, TrafficPolicy::Cluster, self.settings.topology.then_some(near))),
                    backends: endpoints.into_iter().map(backend).collect(),
                    inside_only_cluster_ip: !self.settings.external_cluster_ips,
                    affinity: spec.client_ip_timeout.unwrap_or(0),
                    algorithm: traits.algorithm,
                    maglev_size: self.settings.maglev_size,
                    forwarding: traits.mode.forwarding(self.settings.dispatch, id.protocol),
                    ranges: spec.load_balancer_source_ranges.clone(),
                    ranges_deny: traits.ranges_deny,
                    ..ServicePort::new(id)
                });
            }
        }
        let health = spec.health_check_node_port.map(|port| HealthCheck {
            port,
            service: name.clone(),
            local_endpoints: ready_here.len(),
        });
        Built { ports, health, problems: notes.take(), watched }
    }

    /// What annotations choose, or settings.
    fn traits(&self, service: &Service, notes: &mut Notes) -> Traits {
        let metadata = &service.metadata;
        let algorithms = [("random", Algorithm::RANDOM), ("maglev", Algorithm::MAGLEV)];
        let modes = [("snat", Mode::Snat), ("dsr", Mode::Dsr), ("hybrid", Mode::Hybrid)];
        Traits {
            algorithm: annotation(metadata, "lb-algorithm", &algorithms, notes).unwrap_or(self.settings.algorithm),
            mode: annotation(metadata, "forwarding-mode", &modes, notes).unwrap_or(self.settings.forwarding),
            ranges_deny: annotation(metadata, "src-ranges-policy", &[("allow", false), ("deny", true)], notes)
                .unwrap_or(false),
        }
    }

    fn frontends(&self, service: &Service, port: &ServicePortSpec, v6: bool, notes: &mut Notes) -> Vec<Frontend> {
        let spec = &service.spec;
        let mut out: Vec<Frontend> = Vec::new();
        let mut add = |kind: FrontendKind, addresses: &mut dyn Iterator<Item = IpAddr>| {
            for address in addresses.filter(|address| address.is_ipv6() == v6) {
                let shared = self.nodes.is_node(address);
                out.push(Frontend { addr: address.into(), port: port.port, kind, shared });
            }
        };
        add(FrontendKind::ClusterIp, &mut spec.cluster_ips.addresses().iter().copied());
        if spec.kind == ServiceType::LoadBalancer {
            // Not `spec.loadBalancerIP`: that is a wish of whoever wrote the service, and any address can
            // be wished for. Whoever hands out addresses writes them into the status.
            let given = &service.status.load_balancer.ingress;
            add(FrontendKind::LoadBalancer, &mut given.iter().map(|one| one.ip));
        }
        add(FrontendKind::ExternalIp, &mut spec.external_ips.iter().copied());
        let (first, last) = self.settings.node_ports;
        match port.node_port {
            Some(number) if (first..=last).contains(&number) => {
                let addr = if v6 { Addr::UNSPECIFIED } else { Addr::ANY_V4 };
                out.push(Frontend { addr, port: number, kind: FrontendKind::NodePort, shared: true });
            }
            Some(number) => notes.add(format!(
                "nodePort {number} is outside of {first}-{last} and is not served; choose one inside or change \
                 services.nodePorts of the agents"
            )),
            None => {}
        }
        out
    }

    /// SCTP's checksum covers its ports and cannot be adjusted, so its packets can only be forwarded to the port that
    /// they came to.
    fn note_sctp(&self, port: &ServicePortSpec, frontends: &[Frontend], endpoints: &[Endpoint], notes: &mut Notes) {
        if port.protocol != Protocol::Sctp {
            return;
        }
        let declared = match &port.target_port {
            PortRef::Number(number) => Some(*number),
            PortRef::Name(_) => None,
        };
        let numbers = endpoints.iter().map(|endpoint| endpoint.port).chain(declared.filter(|_| endpoints.is_empty()));
        let numbers: BTreeSet<u16> = numbers.collect();
        for frontend in frontends {
            if let Some(other) = numbers.iter().find(|number| **number != frontend.port) {
                notes.add(sctp_problem(frontend, *other));
            }
        }
    }

    /// The endpoints of a service port in one family, each place once.
    fn endpoints(
        &self,
        name: &ServiceName,
        service: &Service,
        port: &ServicePortSpec,
        v6: bool,
        problems: &mut Vec<Problem>,
    ) -> Vec<Endpoint> {
        let all = match self.slices.of(name) {
            Some(_) => self.sliced(name, port, v6, problems),
            None => self.selected(service, port, v6),
        };
        let mut out: Vec<Endpoint> = Vec::with_capacity(all.len());
        let mut places: HashMap<(IpAddr, u16), usize> = HashMap::with_capacity(all.len());
        for endpoint in all {
            match places.get(&(endpoint.addr, endpoint.port)) {
                // Slices may overlap while endpoints move between them: the better news counts.
                Some(at) => {
                    let known = &mut out[*at];
                    if (endpoint.ready, endpoint.lingering) > (known.ready, known.lingering) {
                        *known = endpoint;
                    }
                }
                None => {
                    places.insert((endpoint.addr, endpoint.port), out.len());
                    out.push(endpoint);
                }
            }
        }
        out.sort_by_key(|endpoint| (endpoint.addr, endpoint.port));
        out
    }

    /// Endpoints from slices.
    fn sliced(
        &self,
        name: &ServiceName,
        port: &ServicePortSpec,
        v6: bool,
        problems: &mut Vec<Problem>,
    ) -> Vec<Endpoint> {
        let mut out = Vec::new();
        let wanted = port.name.as_deref().unwrap_or_default();
        for (slice_name, slice) in self.slices.of(name).into_iter().flatten() {
            let weight = match &slice.weight {
                Ok(weight) => *weight,
                Err(text) => {
                    let subject = format!("EndpointSlice {}/{slice_name}", name.namespace);
                    let text = format!("the weight \"{text}\" is no number from 0 to 65535; 1 is used, correct it");
                    let problem = Problem { subject, text };
                    problems.push(problem);
                    1
                }
            };
            let served = slice.ports.iter().find(|one| one.name == wanted && one.protocol == port.protocol);
            let Some(number) = served.and_then(|one| one.port).filter(|_| slice.v6 == Some(v6)) else { continue };
            for endpoint in &slice.endpoints {
                let conditions = endpoint.conditions;
                out.push(Endpoint {
                    addr: endpoint.addr,
                    port: number,
                    ready: conditions.ready,
                    lingering: conditions.serving && conditions.terminating,
                    local: self.is_local(endpoint.node.as_deref(), endpoint.addr),
                    weight,
                    node: endpoint.node.clone(),
                    name: endpoint.name.clone(),
                    hints: endpoint.hints.clone(),
                });
            }
        }
        out
    }

    /// Endpoints from pods, for services that nobody makes slices for.
    fn selected(&self, service: &Service, port: &ServicePortSpec, v6: bool) -> Vec<Endpoint> {
        let spec = &service.spec;
        let pods = self.pods.selected(service.namespace(), &spec.selector).into_iter().filter(|pod| !pod.over);
        let endpoint = |pod: &KnownPod| {
            let (addr, node) = self.address(pod, v6)?;
            let ready = spec.publish_not_ready_addresses || pod.ready && !pod.terminating;
            Some(Endpoint {
                addr,
                port: pod.resolve(&port.target_port, port.protocol)?,
                ready,
                lingering: pod.ready && pod.terminating,
                local: self.is_local(node.as_deref(), addr),
                weight: 1,
                hints: self.hints(spec.traffic_distribution.as_deref(), node.as_deref()),
                node,
                name: Some(pod.name.clone()),
            })
        };
        pods.filter_map(endpoint).collect()
    }

    /// A pod's address in one family, and its node.
    fn address(&self, pod: &KnownPod, v6: bool) -> Option<(IpAddr, Option<Arc<str>>)> {
        let (addresses, node) = self.pods.place(pod);
        let of_node = match node {
            // A pod on the node itself that says no address has the node's.
            Some(node) if pod.host_network && addresses.is_empty() => match self.nodes.addresses(node) {
                [] if **node == *self.settings.node => self.settings.node_addresses.as_slice(),
                known => known,
            },
            _ => &[],
        };
        let addr = addresses.iter().chain(of_node).find(|addr| addr.is_ipv6() == v6)?;
        Some((*addr, node.cloned()))
    }

    /// What whoever makes slices would hint at.
    fn hints(&self, distribution: Option<&str>, node: Option<&str>) -> Option<Arc<EndpointHints>> {
        let (distribution, node) = (distribution.filter(|_| self.settings.topology)?, node?);
        let for_nodes = if distribution == "PreferSameNode" { vec![node.to_string()] } else { Vec::new() };
        let for_zones = self.nodes.zone(node).map(str::to_string).into_iter().collect();
        Some(Arc::new(EndpointHints { for_zones, for_nodes }))
    }

    fn is_local(&self, node: Option<&str>, addr: IpAddr) -> bool {
        match node {
            Some(node) => node == self.settings.node,
            None => self.nodes.is_own(addr),
        }
    }

    /// The ports of this node that a pod asks for.
    fn build_host_ports(&self, key: &PodKey, pod: &KnownPod) -> Built {
        let mut built = Built::default();
        let mut known = BTreeSet::new();
        let mut notes = Notes { subject: format!("Pod {}", pod.name), problems: Vec::new() };
        let here = self.pods.place(pod).1.is_some_and(|node| **node == *self.settings.node);
        if !here || pod.over || pod.host_network {
            return built;
        }
        let (first, last) = self.settings.node_ports;
        for port in &pod.ports {
            let Some(host_port) = port.host_port else { continue };
            if (first..=last).contains(&host_port) {
                notes.add(format!(
                    "hostPort {host_port} is inside of {first}-{last}, which belongs to NodePort services, and is not \
                     served; choose one outside"
                ));
                continue;
            }
            for v6 in [false, true] {
                let Some((addr, node)) = self.address(pod, v6) else { continue };
                let Some(frontend) = host_frontend(port, host_port, v6) else { continue };
                if port.protocol == Protocol::Sctp && port.number != host_port {
                    notes.add(sctp_problem(&frontend, port.number));
                }
                let id = PortId {
                    namespace: key.namespace.clone(),
                    // No service can have that name.
                    service: format!("pod/{}", key.name),
                    // Another container may have the same number at another address of the node.
                    port: match IpAddr::from(frontend.addr) {
                        addr if addr.is_unspecified() => host_port.to_string(),
                        addr => format!("{host_port}@{addr}"),
                    },
                    protocol: port.protocol.number(),
                    v6,
                };
                if !known.insert(id.clone()) {
                    notes.add(format!("hostPort {host_port} is asked for twice, and the first container's is served"));
                    continue;
                }
                built.ports.push(ServicePort {
                    frontends: vec![frontend],
                    backends: vec![Backend {
                        addr,
                        port: port.number,
                        state: BackendState::ACTIVE,
                        weight: 1,
                        node,
                        name: Some(pod.name.clone()),
                    }],
                    inside: vec![0],
                    outside: vec![0],
                    ..ServicePort::new(id)
                });
            }
        }
        built.problems = notes.take();
        built
    }
}

/// What annotations choose.
struct Traits {
    algorithm: u8,
    mode: Mode,
    ranges_deny: bool,
}

/// What is found on the way.
#[derive(Default)]
struct Notes {
    subject: String,
    problems: Vec<Problem>,
}

impl Notes {
    fn add(&mut self, text: String) {
        self.problems.push(Problem { subject: self.subject.clone(), text });
    }

    /// All of it, each once.
    fn take(self) -> Vec<Problem> {
        let mut seen = BTreeSet::new();
        self.problems.into_iter().filter(|problem| seen.insert(problem.clone())).collect()
    }
}

fn sctp_problem(frontend: &Frontend, port: u16) -> String {
    format!(
        "SCTP packets to {} are dropped: its endpoints serve port {port}, and SCTP's checksum does not let ports be \
         translated; give both the same number",
        claims::describe(frontend)
    )
}

fn rank(created: Option<&str>) -> Rank {
    Rank { undated: created.is_none(), created: created.unwrap_or_default().to_string(), ..Rank::default() }
}

/// Whether a service has addresses of its own that are served here.
fn has_addresses(service: &Service) -> bool {
    let others = service.metadata.labels.contains_key(SERVICE_PROXY_NAME_LABEL);
    !others && service.spec.kind != ServiceType::ExternalName && service.spec.cluster_ips != ClusterIps::Headless
}

/// The families that a service has addresses of, or would have.
fn families(service: &Service) -> Vec<bool> {
    let spec = &service.spec;
    let said = |family: IpFamily| spec.ip_families.contains(&family);
    match (spec.ip_families.is_empty(), spec.ip_family_policy) {
        (false, _) => {
            // An address that somebody brings is served even if the service does not name its family.
            let brought = |v6: bool| spec.external_ips.iter().any(|address| address.is_ipv6() == v6);
            let wants = |v6| said(if v6 { IpFamily::IPv6 } else { IpFamily::IPv4 }) || brought(v6);
            [false, true].into_iter().filter(|v6| wants(*v6)).collect()
        }
        (true, Some(IpFamilyPolicy::SingleStack)) => vec![false],
        (true, _) => vec![false, true],
    }
}

/// The value of `cirri.io/NAME`, or else of `service.cilium.io/NAME`, if it is one of these words.
fn annotation<T: Copy>(metadata: &Metadata, name: &str, words: &[(&str, T)], notes: &mut Notes) -> Option<T> {
    let keys = ["cirri.io", "service.cilium.io"].map(|domain| format!("{domain}/{name}"));
    let (key, text) = keys.iter().find_map(|key| Some((key, metadata.annotations.get(key)?)))?;
    let found = words.iter().find(|(word, _)| word == text).map(|(_, value)| *value);
    if found.is_none() {
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        notes.add(format!(
            "the annotation {key} says \"{text}\", which is not known, and is passed over; use {}",
            known.join(" or ")
        ));
    }
    found
}

fn backend(endpoint: Endpoint) -> Backend {
    Backend {
        addr: endpoint.addr,
        port: endpoint.port,
        // Whoever is not ready keeps what he has.
        state: if endpoint.ready { BackendState::ACTIVE } else { BackendState::DRAINING },
        weight: endpoint.weight,
        node: endpoint.node,
        name: endpoint.name,
    }
}

/// Where a pod's port of the node is reached in one family.
fn host_frontend(port: &PodPort, host_port: u16, v6: bool) -> Option<Frontend> {
    let any = if v6 { Addr::UNSPECIFIED } else { Addr::ANY_V4 };
    let addr = match port.host_ip {
        Some(address) if address.is_ipv6() != v6 => return None,
        Some(address) if !address.is_unspecified() => address.into(),
        _ => any,
    };
    Some(Frontend { addr, port: host_port, kind: FrontendKind::HostPort, shared: true })
}
