//! EndpointSlices, by the service that they belong to.

use super::ServiceName;
use crate::resource::{
    AddressType, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, HEADLESS_LABEL,
    SERVICE_PROXY_NAME_LABEL,
};
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// The annotation of a slice that gives its endpoints their weight.
const WEIGHT: &str = "service.cilium.io/weight";

/// What services need of a slice.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    service: Arc<ServiceName>,
    /// Its family; `None`: names.
    pub v6: Option<bool>,
    /// Share of new connections of each of its endpoints; `Err`: what stands there instead.
    pub weight: Result<u16, String>,
    /// What its endpoints serve.
    pub ports: Vec<EndpointPort>,
    /// Its endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct SliceEndpoint {
    /// Its address.
    pub addr: IpAddr,
    /// What may be done with it.
    pub conditions: EndpointConditions,
    /// Its node.
    pub node: Option<Arc<str>>,
    /// Who is to use it.
    pub hints: Option<Arc<EndpointHints>>,
    /// What it is.
    pub name: Option<Arc<str>>,
}

impl Slice {
    /// The slice, if it belongs to a service.
    pub fn of(slice: &EndpointSlice) -> Option<Slice> {
        let namespace = slice.namespace();
        let service = Arc::new(ServiceName { namespace: namespace.into(), name: slice.service()?.into() });
        let v6 = match slice.address_type {
            AddressType::IPv4 => Some(false),
            AddressType::IPv6 => Some(true),
            AddressType::Fqdn => None,
        };
        let weight = match slice.metadata.annotations.get(WEIGHT) {
            Some(text) => text.trim().parse().map_err(|_| text.clone()),
            None => Ok(1),
        };
        let mut names: BTreeMap<&str, Arc<str>> = BTreeMap::new();
        // As kube-proxy has it: such a slice is another program's. That there is one still says that somebody makes
        // slices for the service.
        let labels = &slice.metadata.labels;
        let others = [SERVICE_PROXY_NAME_LABEL, HEADLESS_LABEL].iter().any(|label| labels.contains_key(*label));
        let endpoints = slice.endpoints.iter().filter(|_| !others).filter_map(|endpoint| {
            let node = endpoint.node_name.as_deref();
            let target = endpoint.target_ref.as_ref().filter(|target| !target.name.is_empty());
            let name = target.map(|target| {
                let namespace = if target.namespace.is_empty() { namespace } else { &target.namespace };
                Arc::from(format!("{namespace}/{}", target.name))
            });
            Some(SliceEndpoint {
                addr: *endpoint.addresses.first()?,
                conditions: endpoint.conditions,
                node: node.map(|node| names.entry(node).or_insert_with(|| node.into()).clone()),
                hints: endpoint.hints.clone().map(Arc::new),
                name,
            })
        });
        let endpoints = endpoints.collect();
        Some(Slice { service, v6, weight, ports: slice.ports.clone(), endpoints })
    }
}

/// All slices.
#[derive(Clone, Debug, Default)]
pub struct Slices {
    by_service: HashMap<Arc<ServiceName>, BTreeMap<Arc<str>, Slice>>,
    /// The service of each, by its namespace and name.
    services: HashMap<(String, Arc<str>), Arc<ServiceName>>,
}

impl Slices {
    /// A slice as it is now; `None`: it is gone, or belongs to nobody. Answers whom that concerns.
    pub fn set(&mut self, namespace: &str, name: &str, slice: Option<Slice>) -> Vec<Arc<ServiceName>> {
        let name: Arc<str> = name.into();
        let key = (namespace.to_string(), name.clone());
        let before = self.services.get(&key).cloned();
        let known = before.as_ref().and_then(|service| self.by_service.get(service)?.get(&name));
        if known == slice.as_ref() {
            return Vec::new();
        }
        let mut concerned = Vec::new();
        if let Some(before) = before {
            self.services.remove(&key);
            if let Some(all) = self.by_service.get_mut(&before) {
                all.remove(&name);
                if all.is_empty() {
                    self.by_service.remove(&before);
                }
            }
            concerned.push(before);
        }
        if let Some(slice) = slice {
            concerned.push(slice.service.clone());
            self.services.insert(key, slice.service.clone());
            self.by_service.entry(slice.service.clone()).or_default().insert(name, slice);
        }
        concerned
    }

    /// The slices of a service, by name.
    pub fn of(&self, service: &ServiceName) -> Option<&BTreeMap<Arc<str>, Slice>> {
        self.by_service.get(service)
    }
}
