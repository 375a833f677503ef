//! Pods, and which services select them.
//!
//! Both ways are indexed by labels: a service is filed under that label of its selector that the
//! fewest others are filed under, a pod under all of its labels. So a change of a pod finds its
//! services, and a new service its pods, without a look at all of the others.

use super::ServiceName;
use crate::hash::fnv64;
use crate::resource::{Pod, PortRef, Protocol};
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// A pod: namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodKey {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What services need of a pod.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownPod {
    /// Namespace and name, as people see them.
    pub name: Arc<str>,
    /// Whose it is.
    pub key: PodKey,
    /// When it was created.
    pub created: Option<String>,
    /// Its node.
    pub node: Option<Arc<str>>,
    /// It lives on the node itself.
    pub host_network: bool,
    /// It takes connections, as far as it says.
    pub ready: bool,
    /// It is about to end.
    pub terminating: bool,
    /// It has run and is over.
    pub over: bool,
    /// Its ports.
    pub ports: Vec<PodPort>,
    labels: BTreeMap<String, String>,
    status: Vec<IpAddr>,
}

/// One port of one of its containers.
#[derive(Clone, Debug, PartialEq)]
pub struct PodPort {
    /// Its name.
    pub name: Option<String>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number.
    pub number: u16,
    /// The port of the node that leads here.
    pub host_port: Option<u16>,
    /// And the one address of the node where it does.
    pub host_ip: Option<IpAddr>,
}

impl KnownPod {
    fn of(key: &PodKey, pod: &Pod) -> KnownPod {
        let ports = pod.spec.running().flat_map(|container| &container.ports).map(|port| PodPort {
            name: port.name.clone(),
            protocol: port.protocol,
            number: port.container_port,
            host_port: port.host_port,
            host_ip: port.host_ip,
        });
        let phase = pod.status.phase.as_deref();
        KnownPod {
            name: format!("{}/{}", key.namespace, key.name).into(),
            key: key.clone(),
            created: pod.metadata.creation_timestamp.clone(),
            node: pod.spec.node_name.as_deref().map(Arc::from),
            host_network: pod.spec.host_network,
            // Whoever keeps no status says nothing against it.
            ready: pod.status.ready.unwrap_or(!matches!(phase, Some("Pending" | "Unknown"))),
            terminating: pod.metadata.deletion_timestamp.is_some(),
            over: matches!(phase, Some("Succeeded" | "Failed")),
            ports: ports.collect(),
            labels: pod.metadata.labels.clone(),
            status: pod.status.pod_ips.iter().map(|one| one.ip).collect(),
        }
    }

    /// The number of a service's target port here.
    pub fn resolve(&self, target: &PortRef, protocol: Protocol) -> Option<u16> {
        match target {
            PortRef::Number(number) => Some(*number),
            PortRef::Name(name) => {
                let same = |port: &&PodPort| port.protocol == protocol && port.name.as_deref() == Some(name);
                self.ports.iter().find(same).map(|port| port.number)
            }
        }
    }

    fn is_selected(&self, selector: &BTreeMap<String, String>) -> bool {
        selector.iter().all(|(key, value)| self.labels.get(key) == Some(value))
    }

    fn has_host_ports(&self) -> bool {
        !self.host_network && self.ports.iter().any(|port| port.host_port.is_some())
    }
}

/// What Cirri gave a pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its node.
    pub node: Option<Arc<str>>,
}

/// Whom a change of a pod concerns.
#[derive(Clone, Debug, Default)]
pub struct Concerned {
    /// Services that select it, or did.
    pub services: Vec<Arc<ServiceName>>,
    /// Its own ports of the node.
    pub host_ports: bool,
}

/// A service and whom it selects.
#[derive(Clone, Debug)]
struct Filed {
    service: Arc<ServiceName>,
    selector: BTreeMap<String, String>,
}

/// All pods.
#[derive(Clone, Debug, Default)]
pub struct Pods {
    pods: Vec<Option<KnownPod>>,
    free: Vec<u32>,
    numbers: HashMap<PodKey, u32>,
    given: HashMap<PodKey, Given>,
    /// Pods by the hash of a label.
    by_label: HashMap<u64, Vec<u32>>,
    /// Services by the hash of one label of their selector.
    by_anchor: HashMap<u64, Vec<Filed>>,
    /// Under which label a service is filed.
    anchors: HashMap<Arc<ServiceName>, u64>,
}

impl Pods {
    /// A pod as it is now. `None`: nothing that services need has changed.
    pub fn upsert(&mut self, key: &PodKey, pod: &Pod) -> Option<Concerned> {
        let now = KnownPod::of(key, pod);
        if self.get(key).is_some_and(|old| *old == now) {
            return None;
        }
        let mut concerned = self.take_out(key).unwrap_or_default();
        let more = self.concerned(&now);
        concerned.host_ports |= more.host_ports;
        concerned.services.extend(more.services);
        let number = self.free.pop().unwrap_or(self.pods.len() as u32);
        for label in labels_of(&now) {
            self.by_label.entry(label).or_default().push(number);
        }
        self.numbers.insert(key.clone(), number);
        match self.pods.get_mut(number as usize) {
            Some(place) => *place = Some(now),
            None => self.pods.push(Some(now)),
        }
        Some(concerned)
    }

    /// A pod is gone.
    pub fn remove(&mut self, key: &PodKey) -> Option<Concerned> {
        self.take_out(key)
    }

    /// What Cirri gave a pod; no addresses: nothing any more.
    pub fn give(&mut self, key: &PodKey, addresses: &[IpAddr], node: Option<&str>) -> Option<Concerned> {
        let now = Given { addresses: addresses.to_vec(), node: node.map(Arc::from) };
        let old = match addresses {
            [] => self.given.remove(key),
            _ => self.given.insert(key.clone(), now.clone()),
        };
        let same = old.as_ref() == Some(&now) || old.is_none() && addresses.is_empty();
        match same {
            true => None,
            false => Some(self.get(key).map(|pod| self.concerned(pod)).unwrap_or_default()),
        }
    }

    /// Files a service under its selector.
    pub fn note_selector(&mut self, service: &Arc<ServiceName>, selector: &BTreeMap<String, String>) {
        let labels = selector.iter().map(|(key, value)| label_hash(&service.namespace, key, value));
        let Some(anchor) = labels.min_by_key(|label| self.by_anchor.get(label).map_or(0, Vec::len)) else { return };
        self.by_anchor.entry(anchor).or_default().push(Filed { service: service.clone(), selector: selector.clone() });
        self.anchors.insert(service.clone(), anchor);
    }

    /// Takes a service out of the files.
    pub fn forget_selector(&mut self, service: &ServiceName, selector: &BTreeMap<String, String>) {
        let Some(anchor) = self.anchors.remove(service).filter(|_| !selector.is_empty()) else { return };
        if let Some(all) = self.by_anchor.get_mut(&anchor) {
            all.retain(|other| *other.service != *service);
            if all.is_empty() {
                self.by_anchor.remove(&anchor);
            }
        }
    }

    /// The pods of a namespace that a selector selects, by name. An empty one selects none: somebody
    /// else says who is behind such a service.
    pub fn selected(&self, namespace: &str, selector: &BTreeMap<String, String>) -> Vec<&KnownPod> {
        let labels = selector.iter().map(|(key, value)| label_hash(namespace, key, value));
        let numbers = labels.map(|label| self.by_label.get(&label).map_or(&[][..], Vec::as_slice));
        let Some(fewest) = numbers.min_by_key(|numbers| numbers.len()) else { return Vec::new() };
        let pods = fewest.iter().filter_map(|number| self.pods.get(*number as usize)?.as_ref());
        let mut found: Vec<&KnownPod> =
            pods.filter(|pod| pod.key.namespace == namespace && pod.is_selected(selector)).collect();
        found.sort_by(|a, b| a.key.name.cmp(&b.key.name));
        found
    }

    /// One pod.
    pub fn get(&self, key: &PodKey) -> Option<&KnownPod> {
        self.pods.get(*self.numbers.get(key)? as usize)?.as_ref()
    }

    /// A pod's addresses and node: those that Cirri gave it, else those of its status.
    pub fn place<'a>(&'a self, pod: &'a KnownPod) -> (&'a [IpAddr], Option<&'a Arc<str>>) {
        match self.given.get(&pod.key) {
            Some(given) => (&given.addresses, given.node.as_ref().or(pod.node.as_ref())),
            None => (&pod.status, pod.node.as_ref()),
        }
    }

    /// The pods that live on a node itself and say no addresses, with whom they concern.
    pub fn on_host_network(&self, node: &str) -> Vec<(PodKey, Concerned)> {
        let there = |pod: &&KnownPod| pod.host_network && pod.status.is_empty() && pod.node.as_deref() == Some(node);
        let pods = self.pods.iter().flatten().filter(there);
        pods.map(|pod| (pod.key.clone(), self.concerned(pod))).collect()
    }

    /// The pods that ask for ports of their node.
    pub fn with_host_ports(&self) -> impl Iterator<Item = PodKey> + '_ {
        self.pods.iter().flatten().filter(|pod| pod.has_host_ports()).map(|pod| pod.key.clone())
    }

    fn take_out(&mut self, key: &PodKey) -> Option<Concerned> {
        let number = self.numbers.remove(key)?;
        let pod = self.pods.get_mut(number as usize)?.take()?;
        self.free.push(number);
        for label in labels_of(&pod) {
            if let Some(all) = self.by_label.get_mut(&label) {
                if let Some(at) = all.iter().position(|other| *other == number) {
                    all.swap_remove(at);
                }
                if all.is_empty() {
                    self.by_label.remove(&label);
                }
            }
        }
        Some(self.concerned(&pod))
    }

    fn concerned(&self, pod: &KnownPod) -> Concerned {
        let filed = labels_of(pod).filter_map(|label| self.by_anchor.get(&label)).flatten();
        let selecting =
            filed.filter(|filed| filed.service.namespace == pod.key.namespace && pod.is_selected(&filed.selector));
        let services = selecting.map(|filed| filed.service.clone()).collect();
        Concerned { services, host_ports: pod.has_host_ports() }
    }
}

fn labels_of(pod: &KnownPod) -> impl Iterator<Item = u64> + '_ {
    pod.labels.iter().map(|(key, value)| label_hash(&pod.key.namespace, key, value))
}

/// Labels that share a hash only share candidates: selectors are compared whole.
fn label_hash(namespace: &str, key: &str, value: &str) -> u64 {
    fnv64([namespace, key, value].join("\0").as_bytes())
}
