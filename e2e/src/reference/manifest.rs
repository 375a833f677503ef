//! Reads Kubernetes manifests the way the API server would take them: its defaults filled in, and
//! refused where it refuses.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::{Direction, Labels, Protocol, World};

/// A pod, as far as policy can see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: Labels,
    /// `spec.nodeName`; empty if not placed yet.
    pub node: String,
    /// Addresses of both families.
    pub addresses: Vec<std::net::IpAddr>,
    /// Container ports that have a name.
    pub ports: Vec<NamedPort>,
}

/// A container port with a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPort {
    /// Its name.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number.
    pub number: u16,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Name.
    pub name: String,
    /// Addresses of both families.
    pub addresses: Vec<std::net::IpAddr>,
}

/// A NetworkPolicy after defaulting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Which pods of the namespace it is about.
    pub pods: Selector,
    /// In which directions it isolates them; a section of another direction says nothing.
    pub types: Vec<Direction>,
    /// What may come in.
    pub ingress: Vec<Rule>,
    /// What may go out.
    pub egress: Vec<Rule>,
}

/// One item of an ingress or egress list. Absent and empty lists mean the same here: no restriction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// `from` or `to`.
    pub peers: Vec<Peer>,
    /// `ports`.
    pub ports: Vec<PolicyPort>,
}

/// One item of `from` or `to`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Addresses.
    IpBlock(IpBlock),
    /// Pods. At least one of the two is given; an empty selector is not an absent one.
    Selectors {
        /// `namespaceSelector`.
        namespaces: Option<Selector>,
        /// `podSelector`.
        pods: Option<Selector>,
    },
}

/// Addresses, less some of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpBlock {
    /// The block.
    pub cidr: IpNet,
    /// What is cut out of it.
    pub except: Vec<IpNet>,
}

/// One item of `ports`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyPort {
    /// "If not specified, this field defaults to TCP."
    pub protocol: Protocol,
    /// Absent: all ports of the protocol.
    pub port: Option<PortRef>,
    /// Last port of a range that starts at `port`.
    pub end_port: Option<u16>,
}

/// A port by number or by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortRef {
    /// By number.
    Number(u16),
    /// By the name that a container port of the called pod has.
    Name(String),
}

/// A label selector.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector {
    /// `matchLabels`.
    pub labels: Labels,
    /// `matchExpressions`.
    pub expressions: Vec<Expression>,
}

/// One item of `matchExpressions`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expression {
    /// Label key.
    pub key: String,
    /// What is asked of its value.
    pub operator: Operator,
}

/// The operator of an expression, with its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operator {
    /// The value is one of these.
    In(Vec<String>),
    /// The value is none of these, or there is no such key.
    NotIn(Vec<String>),
    /// There is such a key.
    Exists,
    /// There is no such key.
    DoesNotExist,
}

/// Why a manifest was refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not YAML.
    #[error("not readable as YAML 1.2: {0}")]
    Yaml(String),
    /// Not the shape of its kind.
    #[error("document {document} ({kind}): {problem}")]
    Shape {
        /// Counted from 1.
        document: usize,
        /// What it calls itself.
        kind: String,
        /// What is wrong and where.
        problem: String,
    },
}

/// Reads all documents of `yaml`.
pub(super) fn read(yaml: &str) -> Result<World, ManifestError> {
    // YAML 1.2: a bare `y` is a name, not a boolean.
    let options = serde_saphyr::options! { strict_booleans: true };
    let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(yaml, options)
        .map_err(|error| ManifestError::Yaml(error.to_string()))?;
    let mut world = World::default();
    for (index, document) in documents.into_iter().enumerate() {
        let kind = document["kind"].as_str().unwrap_or("no kind").to_string();
        read_one(&mut world, &kind, document).map_err(|problem| ManifestError::Shape {
            document: index + 1,
            kind,
            problem,
        })?;
    }
    Ok(world)
}

/// The API server puts a label with its name on every namespace.
pub(super) fn namespace_labels(name: &str, mut labels: Labels) -> Labels {
    labels.insert("kubernetes.io/metadata.name".to_string(), name.to_string());
    labels
}

/// Problems inside one document are told as text; [`ManifestError::Shape`] says which document.
type Told<T> = Result<T, String>;

fn read_one(world: &mut World, kind: &str, document: Value) -> Told<()> {
    match kind {
        "Namespace" => {
            let raw: RawNamespace = shape(document)?;
            let labels = namespace_labels(&raw.metadata.name, raw.metadata.labels);
            world.namespaces.insert(raw.metadata.name, labels);
        }
        "Node" => {
            let raw: RawNamespace = shape(document)?;
            world.nodes.push(Node { name: raw.metadata.name, addresses: Vec::new() });
        }
        "Pod" => world.pods.push(pod(shape(document)?)?),
        "NetworkPolicy" => world.policies.push(policy(shape(document)?)?),
        other => return Err(format!("kind {other:?} is none of Namespace, Node, Pod, NetworkPolicy")),
    }
    Ok(())
}

fn shape<T: serde::de::DeserializeOwned>(document: Value) -> Told<T> {
    serde_json::from_value(document).map_err(|error| error.to_string())
}

fn pod(raw: RawPod) -> Told<Pod> {
    let mut ports = Vec::new();
    let beside = raw.spec.init_containers.into_iter().filter(|it| it.restart_policy.as_deref() == Some("Always"));
    for port in raw.spec.containers.into_iter().chain(beside).flat_map(|container| container.ports) {
        if let Some(name) = port.name {
            let protocol = protocol(port.protocol.as_deref())?;
            ports.push(NamedPort { name, protocol, number: port.container_port });
        }
    }
    Ok(Pod {
        namespace: raw.metadata.namespace,
        name: raw.metadata.name,
        labels: raw.metadata.labels,
        node: raw.spec.node_name.unwrap_or_default(),
        addresses: Vec::new(),
        ports,
    })
}

fn policy(raw: RawPolicy) -> Told<NetworkPolicy> {
    let ingress = rules(raw.spec.ingress.unwrap_or_default(), "from", "to")?;
    let egress = rules(raw.spec.egress.unwrap_or_default(), "to", "from")?;
    let types = match raw.spec.policy_types.unwrap_or_default() {
        // "If this field is not specified, it will default based on the existence of ingress or
        // egress rules; policies that contain an egress section are assumed to affect egress, and
        // all policies (whether or not they contain an ingress section) are assumed to affect
        // ingress." An egress list without rules counts as none.
        given if given.is_empty() && egress.is_empty() => vec![Direction::Ingress],
        given if given.is_empty() => vec![Direction::Ingress, Direction::Egress],
        given => given.iter().map(|name| direction(name)).collect::<Told<_>>()?,
    };
    Ok(NetworkPolicy {
        namespace: raw.metadata.namespace,
        name: raw.metadata.name,
        pods: selector(raw.spec.pod_selector.unwrap_or_default())?,
        types,
        ingress,
        egress,
    })
}

fn direction(name: &str) -> Told<Direction> {
    match name {
        "Ingress" => Ok(Direction::Ingress),
        "Egress" => Ok(Direction::Egress),
        other => Err(format!("policyTypes: {other:?} is neither Ingress nor Egress")),
    }
}

fn rules(raw: Vec<RawRule>, peers: &str, wrong: &str) -> Told<Vec<Rule>> {
    raw.into_iter()
        .map(|mut rule| {
            let given = if peers == "from" { rule.from.take() } else { rule.to.take() };
            if rule.from.is_some() || rule.to.is_some() {
                return Err(format!("a rule has {wrong:?} where only {peers:?} has a meaning"));
            }
            Ok(Rule {
                peers: given.unwrap_or_default().into_iter().map(peer).collect::<Told<_>>()?,
                ports: rule.ports.unwrap_or_default().into_iter().map(policy_port).collect::<Told<_>>()?,
            })
        })
        .collect()
}

fn peer(raw: RawPeer) -> Told<Peer> {
    match (raw.ip_block, raw.namespace_selector, raw.pod_selector) {
        (Some(block), None, None) => {
            for except in &block.except {
                if !block.cidr.contains(except) || block.cidr.prefix_len() >= except.prefix_len() {
                    return Err(format!("ipBlock: except {except} is not a strict part of {}", block.cidr));
                }
            }
            Ok(Peer::IpBlock(IpBlock { cidr: block.cidr, except: block.except }))
        }
        (Some(_), _, _) => Err("ipBlock stands beside a selector; a peer has one or the other".to_string()),
        (None, None, None) => Err("a peer names neither a selector nor an ipBlock".to_string()),
        (None, namespaces, pods) => Ok(Peer::Selectors {
            namespaces: namespaces.map(selector).transpose()?,
            pods: pods.map(selector).transpose()?,
        }),
    }
}

fn policy_port(raw: RawPolicyPort) -> Told<PolicyPort> {
    let protocol = protocol(raw.protocol.as_deref())?;
    let port = match raw.port {
        None => None,
        Some(Value::Number(number)) => match number.as_u64().and_then(|n| u16::try_from(n).ok()) {
            None | Some(0) => return Err(format!("port {number} is not in 1..65535")),
            Some(number) => Some(PortRef::Number(number)),
        },
        // "This must be an IANA_SVC_NAME": at least one letter.
        Some(Value::String(name)) if name.contains(|c: char| c.is_ascii_lowercase()) => Some(PortRef::Name(name)),
        Some(other) => return Err(format!("port {other} is neither a number nor a port's name")),
    };
    match (&port, raw.end_port) {
        (_, None) => {}
        (Some(PortRef::Number(first)), Some(last)) if *first <= last => {}
        (Some(PortRef::Number(first)), Some(last)) => return Err(format!("endPort {last} is less than port {first}")),
        (_, Some(last)) => return Err(format!("endPort {last} stands without a numerical port")),
    }
    Ok(PolicyPort { protocol, port, end_port: raw.end_port })
}

fn protocol(name: Option<&str>) -> Told<Protocol> {
    match name {
        None | Some("TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(format!("protocol {other:?} is none of TCP, UDP, SCTP")),
    }
}

fn selector(raw: RawSelector) -> Told<Selector> {
    let expressions = raw
        .match_expressions
        .unwrap_or_default()
        .into_iter()
        .map(|raw| {
            let operator = match (raw.operator.as_str(), raw.values.is_empty()) {
                ("In", false) => Operator::In(raw.values),
                ("NotIn", false) => Operator::NotIn(raw.values),
                ("Exists", true) => Operator::Exists,
                ("DoesNotExist", true) => Operator::DoesNotExist,
                (operator, _) => return Err(format!("operator {operator:?} does not go with {:?}", raw.values)),
            };
            Ok(Expression { key: raw.key, operator })
        })
        .collect::<Told<_>>()?;
    Ok(Selector { labels: raw.match_labels.unwrap_or_default(), expressions })
}

// === the shapes as they are written ===

#[derive(Deserialize)]
struct RawMetadata {
    name: String,
    #[serde(default = "default_namespace")]
    namespace: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

fn default_namespace() -> String {
    "default".to_string()
}

#[derive(Deserialize)]
struct RawNamespace {
    metadata: RawMetadata,
}

#[derive(Deserialize)]
struct RawPod {
    metadata: RawMetadata,
    spec: RawPodSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPodSpec {
    node_name: Option<String>,
    containers: Vec<RawContainer>,
    #[serde(default)]
    init_containers: Vec<RawContainer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawContainer {
    restart_policy: Option<String>,
    #[serde(default)]
    ports: Vec<RawContainerPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawContainerPort {
    name: Option<String>,
    container_port: u16,
    protocol: Option<String>,
}

#[derive(Deserialize)]
struct RawPolicy {
    metadata: RawMetadata,
    spec: RawPolicySpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPolicySpec {
    pod_selector: Option<RawSelector>,
    policy_types: Option<Vec<String>>,
    ingress: Option<Vec<RawRule>>,
    egress: Option<Vec<RawRule>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    from: Option<Vec<RawPeer>>,
    to: Option<Vec<RawPeer>>,
    ports: Option<Vec<RawPolicyPort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPeer {
    pod_selector: Option<RawSelector>,
    namespace_selector: Option<RawSelector>,
    ip_block: Option<RawIpBlock>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawIpBlock {
    cidr: IpNet,
    #[serde(default)]
    except: Vec<IpNet>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPolicyPort {
    protocol: Option<String>,
    port: Option<Value>,
    end_port: Option<u16>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSelector {
    match_labels: Option<Labels>,
    match_expressions: Option<Vec<RawExpression>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawExpression {
    key: String,
    operator: String,
    #[serde(default)]
    values: Vec<String>,
}
