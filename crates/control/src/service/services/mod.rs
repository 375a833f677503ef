//! Kubernetes resources in, service ports out.
//!
//! Every service, and every pod of this node that asks for ports of it, is a *source* of service
//! ports. A resource marks the sources that it concerns; [`Services::changes`] makes those anew and
//! answers what came out differently. Who has an address that several want is decided in [`claims`].

mod build;
mod choose;
mod claims;
mod doubts;
mod nodes;
mod pods;
mod slices;
#[cfg(test)]
mod tests;

use super::{Frontend, PortId, ServicePort, Settings};
use crate::resource::{EndpointSlice, Node, Pod, Resource, Service};
use build::Built;
use claims::{Claims, Source};
use nodes::Nodes;
use pods::{PodKey, Pods};
use slices::{Slice, Slices};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

/// A service: namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Something that is not served as somebody wanted it, for people to see.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// Whose: `Service shop/web`, `EndpointSlice shop/web-x1`, `Pod shop/web-1`.
    pub subject: String,
    /// What is wrong, what happens instead, and what to do.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.text)
    }
}

/// What the health check port of a service answers on this node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HealthCheck {
    /// The port.
    pub port: u16,
    /// Whose.
    pub service: ServiceName,
    /// Its endpoints on this node that are ready, each pod once.
    pub local_endpoints: usize,
}

/// Everything that service ports are made of.
///
/// Legal order: none. Resources may come and go in any order and the same contents always make the
/// same service ports. Nothing is made before [`Services::changes`] is called, so that a whole cluster
/// can be taken in at once; [`Services::problems`] and [`Services::health_checks`] are as of that call.
#[derive(Clone, Debug)]
pub struct Services {
    settings: Settings,
    services: BTreeMap<Arc<ServiceName>, Arc<Service>>,
    slices: Slices,
    pods: Pods,
    nodes: Nodes,
    claims: Claims,
    /// What was made of each source.
    made: HashMap<Source, Made>,
    /// Their health checks: asked for after every change, so they are not looked for each time.
    health: BTreeSet<HealthCheck>,
    dirty: BTreeSet<Source>,
}

/// What a source came to.
#[derive(Clone, Debug, Default)]
struct Made {
    /// Its service ports as they were last answered: their hash, and where they are reached.
    ports: BTreeMap<PortId, (u128, Vec<Frontend>)>,
    problems: Vec<Problem>,
    health: Option<HealthCheck>,
}

/// What [`Services::changes`] answers.
#[derive(Default)]
struct Changed {
    gone: BTreeSet<PortId>,
    handing_over: BTreeMap<PortId, ServicePort>,
    there: BTreeMap<PortId, ServicePort>,
}

impl Services {
    /// Nothing yet.
    pub fn new(settings: Settings) -> Services {
        let mut nodes = Nodes::default();
        nodes.set_own(&settings.node_addresses);
        Services {
            settings,
            services: BTreeMap::new(),
            slices: Slices::default(),
            pods: Pods::default(),
            nodes,
            claims: Claims::default(),
            made: HashMap::new(),
            health: BTreeSet::new(),
            dirty: BTreeSet::new(),
        }
    }

    /// Takes other settings; everything is looked at again.
    pub fn set_settings(&mut self, settings: Settings) {
        if self.settings != settings {
            self.nodes.set_own(&settings.node_addresses);
            self.settings = settings;
            self.mark_all();
        }
    }

    /// Takes a resource, new or changed. Kinds that services are not made of pass by.
    pub fn upsert(&mut self, resource: &Resource) {
        match resource {
            Resource::Service(service) => self.upsert_service(service),
            Resource::EndpointSlice(slice) => self.upsert_slice(slice),
            Resource::Pod(pod) => self.upsert_pod(pod),
            Resource::Node(node) => self.change_node(&node.metadata.name, Some(node)),
            Resource::Namespace(_) | Resource::NetworkPolicy(_) => {}
        }
    }

    /// Takes a resource away, by its kind, namespace (`None`: cluster-wide) and name.
    pub fn remove(&mut self, kind: &str, namespace: Option<&str>, name: &str) {
        let namespace = namespace.unwrap_or_default();
        match kind {
            "Service" => {
                let id = ServiceName { namespace: namespace.into(), name: name.into() };
                if let Some((id, service)) = self.services.remove_entry(&id) {
                    self.pods.forget_selector(&id, &service.spec.selector);
                    self.dirty.insert(Source::Service(id));
                }
            }
            "EndpointSlice" => {
                let concerned = self.slices.set(namespace, name, None);
                self.mark_services(concerned);
            }
            "Pod" => {
                let key = PodKey { namespace: namespace.into(), name: name.into() };
                let concerned = self.pods.remove(&key);
                self.mark_pod(&key, concerned);
            }
            "Node" => self.change_node(name, None),
            _ => {}
        }
    }

    /// The addresses that Cirri itself gave a pod, and the node that it is on. They count instead of
    /// the ones in the pod's status; none: the status counts again.
    pub fn set_pod_addresses(&mut self, namespace: &str, pod: &str, addresses: &[IpAddr], node: Option<&str>) {
        let key = PodKey { namespace: namespace.into(), name: pod.into() };
        let concerned = self.pods.give(&key, addresses, node);
        self.mark_pod(&key, concerned);
    }

    /// What changed since the last call; `None`: it is gone. To be taken over in this order: what is gone
    /// comes first, and who hands an address over to another comes twice, the first time without the
    /// addresses that are new. So an address is always free when its next owner is set.
    pub fn changes(&mut self) -> Vec<(PortId, Option<ServicePort>)> {
        let mut changed = Changed::default();
        // First who wants what: whoever loses or wins an address by that is marked too.
        let mut seen = BTreeSet::new();
        while let Some(source) = self.dirty.pop_first() {
            if seen.contains(&source) {
                continue;
            }
            let (rank, wanted) = self.wants(&source);
            self.dirty.extend(self.claims.set(&source, &rank, wanted));
            seen.insert(source);
        }
        for source in seen {
            let built = self.build(&source).unwrap_or_default();
            self.settle(source, built, &mut changed);
        }
        let gone = changed.gone.into_iter().map(|id| (id, None));
        let there = changed.handing_over.into_iter().chain(changed.there);
        gone.chain(there.map(|(id, port)| (id, Some(port)))).collect()
    }

    /// What is wrong, by whom.
    pub fn problems(&self) -> Vec<Problem> {
        let mut all: Vec<Problem> = self.made.values().flat_map(|made| made.problems.iter().cloned()).collect();
        all.sort();
        all.dedup();
        all
    }

    /// The health check ports of this node, by number.
    pub fn health_checks(&self) -> Vec<HealthCheck> {
        self.health.iter().cloned().collect()
    }

    /// The addresses of a node, as far as Cirri knows them besides what resources say; none: not any more.
    pub fn set_node_addresses(&mut self, node: &str, addresses: &[IpAddr]) {
        let concerned = self.nodes.give(node, addresses);
        self.mark_at(concerned);
    }

    fn upsert_service(&mut self, service: &Service) {
        let id = Arc::new(ServiceName { namespace: service.namespace().into(), name: service.metadata.name.clone() });
        match self.services.get(&id) {
            Some(old) if **old == *service => return,
            Some(old) if old.spec.selector == service.spec.selector => {}
            Some(old) => {
                self.pods.forget_selector(&id, &old.spec.selector);
                self.pods.note_selector(&id, &service.spec.selector);
            }
            None => self.pods.note_selector(&id, &service.spec.selector),
        }
        self.services.insert(id.clone(), Arc::new(service.clone()));
        self.dirty.insert(Source::Service(id));
    }

    fn upsert_slice(&mut self, slice: &EndpointSlice) {
        let concerned = self.slices.set(slice.namespace(), &slice.metadata.name, Slice::of(slice));
        self.mark_services(concerned);
    }

    fn upsert_pod(&mut self, pod: &Pod) {
        let key = PodKey { namespace: pod.namespace().into(), name: pod.metadata.name.clone() };
        let concerned = self.pods.upsert(&key, pod);
        self.mark_pod(&key, concerned);
    }

    fn change_node(&mut self, name: &str, node: Option<&Node>) {
        let change = self.nodes.set(name, node);
        if change.zone && self.settings.topology {
            self.mark_all();
        }
        if change.addresses.is_empty() {
            return;
        }
        self.mark_at(change.addresses);
        // Pods that live on the node itself have its addresses.
        for (key, concerned) in self.pods.on_host_network(name) {
            self.mark_pod(&key, Some(concerned));
        }
    }

    /// Marks what a change of a pod concerns; `None`: nothing changed.
    fn mark_pod(&mut self, key: &PodKey, concerned: Option<pods::Concerned>) {
        let Some(concerned) = concerned else { return };
        self.mark_services(concerned.services);
        if concerned.host_ports {
            self.dirty.insert(Source::Pod(Arc::new(key.clone())));
        }
    }

    /// Marks whoever has to do with these addresses.
    fn mark_at(&mut self, addresses: Vec<IpAddr>) {
        for address in addresses {
            self.dirty.extend(self.claims.at(address.into()));
        }
    }

    fn mark_services(&mut self, services: impl IntoIterator<Item = Arc<ServiceName>>) {
        self.dirty.extend(services.into_iter().map(Source::Service));
    }

    fn mark_all(&mut self) {
        self.dirty.extend(self.services.keys().cloned().map(Source::Service));
        self.dirty.extend(self.made.keys().cloned());
        self.dirty.extend(self.pods.with_host_ports().map(|key| Source::Pod(Arc::new(key))));
    }

    /// Takes from the built ports what belongs to others, and answers what came out differently.
    fn settle(&mut self, source: Source, built: Built, changed: &mut Changed) {
        let Built { ports, health, problems, watched } = built;
        self.claims.watch(&source, watched);
        let mut before = self.made.remove(&source).unwrap_or_default();
        let mut made = Made { problems, ..Made::default() };
        for mut port in ports {
            let protocol = port.id.protocol;
            port.frontends.retain(|frontend| self.is_ours(&source, frontend, protocol, &mut made.problems));
            if port.frontends.is_empty() {
                continue;
            }
            let now = (hash_of(&port), port.frontends.clone());
            let id = port.id.clone();
            match before.ports.remove(&id) {
                Some(old) if old == now => {}
                old => {
                    let had = old.map(|(_, frontends)| frontends).unwrap_or_default();
                    if had.iter().any(|frontend| self.is_lost(&source, frontend, protocol)) {
                        let had: HashSet<_> = had.iter().map(|old| (old.addr, old.port)).collect();
                        let mut rest = port.clone();
                        rest.frontends.retain(|now| had.contains(&(now.addr, now.port)));
                        changed.handing_over.insert(id.clone(), rest);
                    }
                    changed.there.insert(id.clone(), port);
                }
            }
            made.ports.insert(id, now);
        }
        made.health = health.filter(|check| {
            let frontend = claims::health_check(check.port);
            self.is_ours(&source, &frontend, cirri_abi::proto::TCP, &mut made.problems)
        });
        changed.gone.extend(before.ports.into_keys());
        if let Some(check) = &before.health {
            self.health.remove(check);
        }
        self.health.extend(made.health.clone());
        if !(made.ports.is_empty() && made.problems.is_empty() && made.health.is_none()) {
            self.made.insert(source, made);
        }
    }

    /// Whether a frontend that the source had belongs to another now.
    fn is_lost(&self, source: &Source, frontend: &Frontend, protocol: u8) -> bool {
        self.claims.owner(&claims::place(frontend, protocol)).is_some_and(|(_, owner)| owner != source)
    }

    /// Whether a frontend belongs to the source; notes the problem if not.
    fn is_ours(&self, source: &Source, frontend: &Frontend, protocol: u8, problems: &mut Vec<Problem>) -> bool {
        let refusal = self.refusal(source, frontend, protocol);
        let is_ours = refusal.is_none();
        problems.extend(refusal.map(|text| Problem { subject: source.to_string(), text }));
        is_ours
    }
}

/// Two hashes of 64 bits: what is equal in both is the same.
fn hash_of(port: &ServicePort) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        port.hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(1) << 64 | half(2)
}
