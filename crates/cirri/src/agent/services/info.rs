//! Answers about services.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use cirri_abi::{Addr, Algorithm, BackendCounter, BackendState, Forwarding, Port, ServiceKey};
use cirri_control::service::{FrontendKind, PortId, Problem, ServicePort, protocol_name};
use cirri_flow::Served;

use super::Serving;
use crate::agent::core::Core;
use crate::api::{BackendInfo, EdgeInfo, FrontendInfo, ServiceGet, ServiceInfo, ServicesStatus, SocketInfo};
use crate::config::SocketMode;

impl Serving {
    /// The service ports that were asked for, without backends.
    pub fn infos(&self, wanted: &ServiceGet) -> Vec<ServiceInfo> {
        let waiting = self.waiting();
        let mut all: Vec<_> = self
            .books
            .ports()
            .filter(|(_, port)| is_wanted(&port.id, wanted))
            .map(|(number, port)| self.info(number, port, &waiting))
            .collect();
        // What never fitted is in no table.
        let never = |(id, _): &(&PortId, _)| self.books.port(id).is_none() && is_wanted(id, wanted);
        all.extend(self.refused.iter().filter(never).map(|(_, (port, _))| self.info(0, port, &waiting)));
        all
    }

    /// The same with what is wrong with them.
    pub fn detailed(&self, wanted: &ServiceGet) -> Vec<ServiceInfo> {
        let mut by_name: BTreeMap<&str, Vec<&Problem>> = BTreeMap::new();
        let problems = self.sources.problems();
        for problem in &problems {
            let name = problem.subject.split(' ').next_back().unwrap_or_default();
            by_name.entry(name).or_default().push(problem);
        }
        let mut all = self.infos(wanted);
        for info in &mut all {
            let name = format!("{}/{}", info.namespace, info.name);
            // Its own, and those of slices and pods that are named after it.
            let own = by_name.get(name.as_str());
            let prefix = format!("{name}-");
            let near = by_name.range(prefix.as_str()..).take_while(|(other, _)| other.starts_with(&prefix));
            let of = own.into_iter().chain(near.map(|(_, problems)| problems)).flatten();
            info.problems = of.map(|problem| problem.text.clone()).collect();
        }
        all
    }

    /// Every backend of the service ports that were asked for, without what it was given.
    pub fn backend_infos(&self, wanted: &ServiceGet) -> Vec<BackendInfo> {
        let ports = self.books.ports().filter(|(_, port)| is_wanted(&port.id, wanted));
        ports.flat_map(|(_, port)| self.backends_of(port)).collect()
    }

    /// What a number of a backend stands for.
    pub fn served(&self, number: u32) -> Option<Served> {
        let (id, backend) = self.books.backend(number)?;
        Some(Served { service: name(id), ip: backend.addr, port: backend.port })
    }

    /// The service behind an address, port and protocol.
    pub fn service_at(&self, ip: IpAddr, port: u16, proto: u8) -> Option<cirri_flow::ServicePort> {
        let any = if ip.is_ipv4() { Addr::ANY_V4 } else { Addr::UNSPECIFIED };
        let addr = if self.own.contains(&ip) { any } else { Addr::from(ip) };
        self.books.owner(&ServiceKey { addr, port: Port::new(port), proto, _pad: 0 }).map(name)
    }

    /// Everything that is wrong with services, for people.
    pub fn problems(&self) -> Vec<String> {
        let refused = self.refused.values().map(|(_, error)| format!("{error}; its last good state is in force"));
        self.sources.problems().iter().map(ToString::to_string).chain(refused).collect()
    }

    fn info(&self, number: u32, port: &ServicePort, waiting: &BTreeSet<Arc<PortId>>) -> ServiceInfo {
        let id = &port.id;
        let state = match (self.refused.get(id), &self.failure) {
            (Some((_, error)), _) => format!("error: {error}"),
            (None, Some(failure)) if waiting.contains(id) => format!("error: {}", failure.why),
            _ if waiting.contains(id) => "pending".to_owned(),
            _ => "enforced".to_owned(),
        };
        let frontends = port.frontends.iter().map(|frontend| FrontendInfo {
            kind: frontend.kind.name().to_owned(),
            ip: Some(IpAddr::from(frontend.addr)).filter(|ip| !ip.is_unspecified()),
            port: frontend.port,
        });
        ServiceInfo {
            namespace: id.namespace.clone(),
            name: id.service.clone(),
            port: id.port.clone(),
            protocol: protocol_name(id.protocol).to_owned(),
            ip_version: if id.v6 { 6 } else { 4 },
            state,
            id: number,
            kind: kind(port).to_owned(),
            frontends: frontends.collect(),
            ready: ready(port),
            total: port.backends.len(),
            inside: port.inside.len(),
            outside: port.outside.len(),
            algorithm: if port.algorithm == Algorithm::MAGLEV { "maglev" } else { "random" }.to_owned(),
            forwarding: Forwarding::name(port.forwarding).to_owned(),
            affinity_s: port.affinity,
            source_ranges: port.ranges.iter().map(ToString::to_string).collect(),
            source_ranges_deny: port.ranges_deny,
            backends: Vec::new(),
            problems: Vec::new(),
        }
    }

    fn backends_of(&self, port: &ServicePort) -> Vec<BackendInfo> {
        let numbered = self.books.backends(&port.id);
        let numbers: HashMap<_, u32> = numbered.iter().map(|(number, backend)| (*backend, *number)).collect();
        let inside: HashSet<usize> = port.inside.iter().copied().collect();
        let outside: HashSet<usize> = port.outside.iter().copied().collect();
        let one = |(index, backend): (usize, &cirri_control::service::Backend)| BackendInfo {
            service: format!(
                "{}/{}:{}/{}",
                port.id.namespace,
                port.id.service,
                port.id.port,
                protocol_name(port.id.protocol)
            ),
            number: numbers.get(backend).copied().unwrap_or_default(),
            ip: backend.addr,
            port: backend.port,
            state: BackendState::name(backend.state).to_owned(),
            weight: backend.weight,
            node: backend.node.as_deref().map(str::to_owned),
            pod: backend.name.as_deref().map(str::to_owned),
            inside: inside.contains(&index),
            outside: outside.contains(&index),
            connections: 0,
            packets: 0,
            bytes: 0,
            answers: 0,
        };
        port.backends.iter().enumerate().map(one).collect()
    }

    fn waiting(&self) -> BTreeSet<Arc<PortId>> {
        self.queue.iter().filter_map(|group| group.id.clone()).collect()
    }
}

impl Core {
    /// For `cirri status`.
    pub fn services_status(&self) -> ServicesStatus {
        let serving = &self.serving;
        let mut status = ServicesStatus {
            problems: serving.problems(),
            socket: self.socket_info(),
            health_checks: serving.health.clone(),
            ..ServicesStatus::default()
        };
        let mut last = None;
        for (_, port) in serving.books.ports() {
            let service = (&port.id.namespace, &port.id.service);
            status.services += usize::from(last != Some(service));
            last = Some(service);
            status.ports += 1;
            status.frontends += port.frontends.len();
            status.ready += ready(port);
            status.backends += port.backends.len();
        }
        status.devices = serving
            .edges
            .values()
            .map(|edge| EdgeInfo {
                device: edge.device.clone(),
                mode: edge.mode.to_string(),
                reason: edge.reason.clone(),
            })
            .collect();
        status
    }

    fn socket_info(&self) -> SocketInfo {
        let mode = match self.config.services.socket.mode {
            SocketMode::All => "all",
            SocketMode::Host => "host",
            SocketMode::Off => "off",
        };
        let cgroup = self.rows.sockets.desired(&super::SOCKETS).and_then(Option::as_ref);
        let state = self.rows.sockets.state(&super::SOCKETS).unwrap_or_default();
        SocketInfo {
            on: cgroup.is_some() && state == "done",
            mode: mode.to_owned(),
            cgroup: cgroup.map(|path| path.display().to_string()).unwrap_or_default(),
            error: match state.strip_prefix("error: ") {
                Some(why) => why.to_owned(),
                None => self.serving.socket_error.clone(),
            },
            per_packet: self.rows.per_packet.iter().count(),
        }
    }
}

/// Adds to backends what they were given.
pub fn count(tables: &cirri_loader::Tables, backends: &mut [BackendInfo]) -> Result<(), cirri_loader::MapError> {
    let numbers: Vec<u32> = backends.iter().map(|backend| backend.number).filter(|number| *number != 0).collect();
    let counters: BTreeMap<u32, BackendCounter> = tables.backend_counters(numbers)?.into_iter().collect();
    for backend in backends {
        if let Some(counter) = counters.get(&backend.number).filter(|_| backend.number != 0) {
            backend.connections = counter.connections;
            backend.packets = counter.packets;
            backend.bytes = counter.bytes;
            backend.answers = counter.answers;
        }
    }
    Ok(())
}

fn is_wanted(id: &PortId, wanted: &ServiceGet) -> bool {
    wanted.namespace.as_ref().is_none_or(|want| *want == id.namespace)
        && wanted.name.as_ref().is_none_or(|want| *want == id.service)
}

/// Backends that new connections may be given.
fn ready(port: &ServicePort) -> usize {
    port.inside.iter().chain(&port.outside).collect::<BTreeSet<_>>().len()
}

/// The most public of the ways that it is reached.
fn kind(port: &ServicePort) -> &'static str {
    let has = |kind| port.frontends.iter().any(|frontend| frontend.kind == kind);
    let ways = [
        FrontendKind::HostPort,
        FrontendKind::LoadBalancer,
        FrontendKind::NodePort,
        FrontendKind::ExternalIp,
        FrontendKind::ClusterIp,
    ];
    ways.into_iter().find(|kind| has(*kind)).unwrap_or(FrontendKind::ClusterIp).name()
}

fn name(id: &PortId) -> cirri_flow::ServicePort {
    cirri_flow::ServicePort { namespace: id.namespace.clone(), name: id.service.clone(), port: id.port.clone() }
}
