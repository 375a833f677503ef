//! Typed Kubernetes resources, read from YAML or JSON at the door.
//!
//! Reading does what the API server would do: it fills in defaults and refuses what cannot be
//! valid, naming file, line, column, object and field. Each document stands for itself: a refused
//! one yields nothing, and says which object it is about if that can be read. Whoever holds the last
//! good version of it keeps it, so that a mistake never opens anything.
//!
//! YAML is read as version 1.2: a bare `yes`, `no`, `on` or `y` is a string. JSON is a part of it.

mod decode;
mod documents;
mod endpoint_slice;
mod limits;
mod network_policy;
mod service;
#[cfg(test)]
mod service_tests;
mod syntax;
#[cfg(test)]
mod tests;
mod tree;

pub use documents::{Documents, MAX_ERRORS, parse_documents, read_documents};
pub use endpoint_slice::{
    AddressType, Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, HEADLESS_LABEL,
    SERVICE_NAME_LABEL, TargetRef,
};
pub use limits::{MAX_FILE_BYTES, past_limit, yaml_options};
pub use network_policy::{
    EgressRule, IngressRule, IpBlock, LabelSelector, NetworkPolicy, NetworkPolicySpec, Operator, PolicyPeer,
    PolicyPort, PolicyType, PortRef, STAND_IN, SelectorRequirement,
};
pub use service::{
    ClusterIps, IpFamily, IpFamilyPolicy, LoadBalancerIngress, LoadBalancerStatus, SERVICE_PROXY_NAME_LABEL, Service,
    ServicePortSpec, ServiceSpec, ServiceStatus, ServiceType, TrafficPolicy,
};
pub use syntax::{dns_label, dns_subdomain};

use ipnet::IpNet;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

/// A resource that Cirri reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    /// core/v1 Namespace.
    Namespace(Namespace),
    /// core/v1 Pod.
    Pod(Pod),
    /// networking.k8s.io/v1 NetworkPolicy.
    NetworkPolicy(NetworkPolicy),
    /// core/v1 Node.
    Node(Node),
    /// core/v1 Service.
    Service(Service),
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice(EndpointSlice),
}

impl Resource {
    /// `Pod`, `NetworkPolicy` and so on.
    pub fn kind(&self) -> &'static str {
        match self {
            Resource::Namespace(_) => "Namespace",
            Resource::Pod(_) => "Pod",
            Resource::NetworkPolicy(_) => "NetworkPolicy",
            Resource::Node(_) => "Node",
            Resource::Service(_) => "Service",
            Resource::EndpointSlice(_) => "EndpointSlice",
        }
    }

    /// Its namespace, unless the kind is cluster-wide.
    pub fn namespace(&self) -> Option<&str> {
        self.metadata().namespace.as_deref()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.metadata().name
    }

    /// Name, namespace, labels and annotations.
    pub fn metadata(&self) -> &Metadata {
        match self {
            Resource::Namespace(it) => &it.metadata,
            Resource::Pod(it) => &it.metadata,
            Resource::NetworkPolicy(it) => &it.metadata,
            Resource::Node(it) => &it.metadata,
            Resource::Service(it) => &it.metadata,
            Resource::EndpointSlice(it) => &it.metadata,
        }
    }

    /// Where it stands in the store: `resources/KIND/NAMESPACE/NAME`, with `_` for no namespace.
    pub fn store_key(&self) -> String {
        format!("resources/{}/{}/{}", self.kind(), self.namespace().unwrap_or("_"), self.name())
    }

    /// The document as JSON, defaults filled in; the same resource always gives the same text.
    pub fn to_json(&self) -> String {
        match self {
            Resource::Namespace(it) => json("v1", self.kind(), it),
            Resource::Pod(it) => json("v1", self.kind(), it),
            Resource::NetworkPolicy(it) => json("networking.k8s.io/v1", self.kind(), it),
            Resource::Node(it) => json("v1", self.kind(), it),
            Resource::Service(it) => json("v1", self.kind(), it),
            Resource::EndpointSlice(it) => json("discovery.k8s.io/v1", self.kind(), it),
        }
    }

    /// Reads what [`Resource::to_json`] wrote (or any other single document), checked like a file.
    pub fn from_json(text: &str) -> Result<Resource, ResourceError> {
        // A store holds tens of thousands of them, and a reader that knows every value's place takes
        // seventy times as long. It is asked when something is wrong, and for what is no plain JSON.
        const SOURCE: tree::Source<'_> = tree::Source { file: "(store)", lines_before: 0 };
        let mut quick = Documents::default();
        if let Some(tree) = tree::json(text) {
            decode::document(&tree.cursor(SOURCE), &mut quick);
        }
        let mut all = match quick.resources.len() {
            1 if quick.is_whole() => quick.resources,
            _ => parse_documents(SOURCE.file, text)?,
        };
        match (all.pop(), all.is_empty()) {
            (Some(one), true) => Ok(one),
            _ => Err(ResourceError::Field {
                at: SOURCE.position((0, 0)),
                object: Box::default(),
                field: "document".into(),
                problem: "expected exactly one resource".into(),
                hint: "write one object per key".into(),
            }),
        }
    }
}

/// Why a document was refused, where, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResourceError {
    /// Not YAML at all, or too much of it.
    #[error("{at}: {}not valid YAML: {message}; correct the document, it is not used until then", of(.object))]
    Syntax {
        /// Where.
        at: Position,
        /// What it seems to be, such as `NetworkPolicy web`; empty if nothing tells.
        object: String,
        /// What the parser says.
        message: String,
    },
    /// YAML, but not a valid resource.
    #[error("{at}: {}{field}: {problem}; {hint}", of(.object))]
    Field {
        /// Where.
        at: Position,
        /// Kind, and namespace and name as far as they are known: `NetworkPolicy shop/web`.
        object: Box<str>,
        /// The path of the field, such as `spec.ingress[0].ports[1].endPort`.
        field: Box<str>,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// A resource of a kind that other programs read. It concerns no object here.
    #[error(
        "{at}: kind: \"{kind}\" is not a kind that is read here, the document is passed over; move it elsewhere, or \
         use Namespace, Pod, NetworkPolicy, Node, Service, EndpointSlice or List"
    )]
    Kind {
        /// Where.
        at: Position,
        /// As it stands there, cut if it is long.
        kind: String,
    },
}

impl ResourceError {
    /// Where the mistake is.
    pub fn position(&self) -> &Position {
        match self {
            ResourceError::Syntax { at, .. } | ResourceError::Field { at, .. } | ResourceError::Kind { at, .. } => at,
        }
    }

    /// The same error, about this object.
    fn about(mut self, name: &str) -> ResourceError {
        if let ResourceError::Field { object, .. } = &mut self {
            *object = name.into();
        }
        self
    }
}

/// The object in front of what is wrong with it.
fn of(object: &str) -> String {
    if object.is_empty() { String::new() } else { format!("{object}: ") }
}

/// A place in a file. Lines and columns count from 1; 0 is unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The file, as it was named to the parser.
    pub file: String,
    /// Line.
    pub line: u64,
    /// Column, in characters.
    pub column: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.line, self.column) {
            (0, _) => f.write_str(&self.file),
            (line, 0) => write!(f, "{}:{line}", self.file),
            (line, column) => write!(f, "{}:{line}:{column}", self.file),
        }
    }
}

/// What every resource carries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    /// The name.
    pub name: String,
    /// The namespace; `None` for kinds that are cluster-wide.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// What tells it from others that have its name before or after it; none if nobody gave it one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// When it was created, if somebody kept a record: RFC 3339, in UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<String>,
    /// When it is to be gone; present as soon as its deletion was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deletion_timestamp: Option<String>,
}

/// core/v1 Namespace. Always carries the label `kubernetes.io/metadata.name`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Namespace {
    /// Name and labels.
    pub metadata: Metadata,
}

/// core/v1 Pod, as far as networking and the lab need it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pod {
    /// Name, namespace, labels.
    pub metadata: Metadata,
    /// What was asked for.
    pub spec: PodSpec,
    /// What was observed.
    #[serde(skip_serializing_if = "PodStatus::is_empty")]
    pub status: PodStatus,
}

impl Pod {
    /// The pod's namespace.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE)
    }
}

/// What a pod asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// The node it must run on; `None` leaves the choice open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Service account; `default` unless given.
    pub service_account_name: String,
    /// Whether it lives in the node's own network namespace.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub host_network: bool,
    /// Its containers, at least one.
    pub containers: Vec<Container>,
    /// Of those that start first, the ones that go on beside the others (`restartPolicy: Always`). What is over
    /// before the pod runs is not kept.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub init_containers: Vec<Container>,
}

impl PodSpec {
    /// The containers that run while the pod does. Of two that name a port alike, the first has the name.
    pub fn running(&self) -> impl Iterator<Item = &Container> {
        self.containers.iter().chain(&self.init_containers)
    }
}

/// One container of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// The name, unique in the pod.
    pub name: String,
    /// The image; may be empty where nothing pulls images (the lab).
    #[serde(skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// The program.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Its arguments.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Environment variables with a plain value.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<EnvVar>,
    /// Ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ContainerPort>,
    /// `Always` for one that starts first and goes on; `None` for all others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<&'static str>,
}

/// An environment variable. One that comes from elsewhere (`valueFrom`) is empty here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EnvVar {
    /// The name.
    pub name: String,
    /// The value.
    pub value: String,
}

/// A port that a container declares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerPort {
    /// The name that policies may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The number.
    pub container_port: u16,
    /// TCP unless given.
    pub protocol: Protocol,
    /// The port of the node that leads here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_port: Option<u16>,
    /// The one address of the node where `host_port` leads here; `None`: all.
    #[serde(rename = "hostIP", skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// What was observed of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed` or `Unknown`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// The condition `Ready`, if it was given; the others are not kept.
    #[serde(rename = "conditions", serialize_with = "conditions", skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
    /// Its addresses.
    #[serde(rename = "podIPs", skip_serializing_if = "Vec::is_empty")]
    pub pod_ips: Vec<PodIp>,
}

impl PodStatus {
    fn is_empty(&self) -> bool {
        *self == PodStatus::default()
    }
}

/// One address of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PodIp {
    /// The address.
    pub ip: IpAddr,
}

/// core/v1 Node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// Name and labels.
    pub metadata: Metadata,
    /// What was asked for.
    pub spec: NodeSpec,
    /// What was observed.
    #[serde(skip_serializing_if = "NodeStatus::is_empty")]
    pub status: NodeStatus,
}

/// What a node asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NodeSpec {
    /// Its pod ranges.
    #[serde(rename = "podCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub pod_cidrs: Vec<IpNet>,
}

/// What was observed of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NodeStatus {
    /// Its addresses.
    pub addresses: Vec<NodeAddress>,
}

impl NodeStatus {
    fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }
}

/// One address of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP`, `Hostname` and so on.
    #[serde(rename = "type")]
    pub kind: String,
    /// The address or name.
    pub address: String,
}

/// A transport protocol that policies and ports name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

    /// As manifests write it.
    pub const fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        }
    }

    /// IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => cirri_abi::proto::TCP,
            Protocol::Udp => cirri_abi::proto::UDP,
            Protocol::Sctp => cirri_abi::proto::SCTP,
        }
    }

    /// From the name as manifests write it.
    pub fn from_name(name: &str) -> Option<Protocol> {
        Protocol::ALL.into_iter().find(|p| p.name() == name)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The namespace of a resource that names none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// The label that every namespace carries with its own name.
pub const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

fn conditions<S: Serializer>(ready: &Option<bool>, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Condition {
        r#type: &'static str,
        status: &'static str,
    }
    let condition = |ready: &bool| Condition { r#type: "Ready", status: if *ready { "True" } else { "False" } };
    serializer.collect_seq(ready.iter().map(condition))
}

fn json<T: Serialize>(api_version: &'static str, kind: &'static str, body: &T) -> String {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Document<'a, T> {
        api_version: &'static str,
        kind: &'static str,
        #[serde(flatten)]
        body: &'a T,
    }
    serde_json::to_string(&Document { api_version, kind, body }).expect("string keys and plain values always serialize")
}
