//! Kubernetes resources in, service ports out.

use super::{PortId, ServicePort, Settings};
use crate::resource::Resource;
use std::fmt;
use std::net::IpAddr;

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
#[derive(Clone, Debug)]
pub struct Services {
    settings: Settings,
}

impl Services {
    /// Nothing yet.
    pub fn new(settings: Settings) -> Services {
        Services { settings }
    }

    /// Takes other settings; everything is looked at again.
    pub fn set_settings(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// Takes a resource, new or changed. Kinds that services are not made of pass by.
    pub fn upsert(&mut self, _resource: &Resource) {}

    /// Takes a resource away, by its kind, namespace (`None`: cluster-wide) and name.
    pub fn remove(&mut self, _kind: &str, _namespace: Option<&str>, _name: &str) {}

    /// The addresses that Cirri itself gave a pod, and the node that it is on. They count instead of
    /// the ones in the pod's status; none: the status counts again.
    pub fn set_pod_addresses(&mut self, _namespace: &str, _pod: &str, _addresses: &[IpAddr], _node: Option<&str>) {}

    /// What changed since the last call; `None`: it is gone.
    pub fn changes(&mut self) -> Vec<(PortId, Option<ServicePort>)> {
        Vec::new()
    }

    /// What is wrong, by whom.
    pub fn problems(&self) -> Vec<Problem> {
        Vec::new()
    }

    /// The health check ports of this node, by number.
    pub fn health_checks(&self) -> Vec<HealthCheck> {
        Vec::new()
    }
}
