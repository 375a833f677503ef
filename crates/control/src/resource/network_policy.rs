//! networking.k8s.io/v1 NetworkPolicy.

use super::{
    Metadata, Protocol, ResourceError, decode, syntax,
    tree::{Cursor, Object},
};
use crate::cut::cut;
use ipnet::IpNet;
use serde::Serialize;
use std::collections::BTreeMap;

/// networking.k8s.io/v1 NetworkPolicy, valid and with its defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetworkPolicy {
    /// Name and namespace.
    pub metadata: Metadata,
    /// Whom it selects and what it allows.
    pub spec: NetworkPolicySpec,
}

impl NetworkPolicy {
    /// The policy's namespace.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or(super::DEFAULT_NAMESPACE)
    }
}

/// Whom a policy selects and what it allows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkPolicySpec {
    /// The pods of its namespace that it isolates. Empty: all of them.
    pub pod_selector: LabelSelector,
    /// The directions that it isolates; at least one. A section outside them is not enforced.
    pub policy_types: Vec<PolicyType>,
    /// What may come in.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<IngressRule>,
    /// What may go out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<EgressRule>,
}

/// A direction that a policy isolates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum PolicyType {
    /// Into the selected pods.
    Ingress,
    /// Out of them.
    Egress,
}

/// One rule of what may come in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct IngressRule {
    /// From whom; empty: from anywhere.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<PolicyPeer>,
    /// To which ports; empty: any protocol and port.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PolicyPort>,
}

/// One rule of what may go out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EgressRule {
    /// To whom; empty: to anywhere.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<PolicyPeer>,
    /// To which ports; empty: any protocol and port.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PolicyPort>,
}

/// A peer: pods by selectors, or addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum PolicyPeer {
    /// Addresses, whoever has them: the world, pods and nodes alike.
    #[serde(rename_all = "camelCase")]
    Addresses {
        /// The addresses.
        ip_block: IpBlock,
    },
    /// Pods. Both selectors must match; without a namespace selector, pods of the policy's own
    /// namespace. At least one is present.
    #[serde(rename_all = "camelCase")]
    Pods {
        /// Which pods; absent: all of the namespaces.
        #[serde(skip_serializing_if = "Option::is_none")]
        pod_selector: Option<LabelSelector>,
        /// Pods of which namespaces; absent: the policy's own.
        #[serde(skip_serializing_if = "Option::is_none")]
        namespace_selector: Option<LabelSelector>,
    },
}

/// A prefix without some smaller ones inside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct IpBlock {
    /// The prefix.
    pub cidr: IpNet,
    /// What of it does not count; each strictly inside `cidr`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub except: Vec<IpNet>,
}

/// Ports of one protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyPort {
    /// TCP unless given.
    pub protocol: Protocol,
    /// Absent: every port of the protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<PortRef>,
    /// Last port of a range that begins at a numeric `port`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_port: Option<u16>,
}

/// A port by number or by the name that the receiving pod gives it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(untagged)]
pub enum PortRef {
    /// 1 to 65535.
    Number(u16),
    /// Resolved on the receiver.
    Name(String),
}

/// Selects by labels: everything stated must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LabelSelector {
    /// Labels with exactly this value.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// Further conditions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<SelectorRequirement>,
}

/// One condition on one label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SelectorRequirement {
    /// The label.
    pub key: String,
    /// The condition.
    pub operator: Operator,
    /// Values, for `In` and `NotIn`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// The condition of a [`SelectorRequirement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Operator {
    /// The label is there, with one of the values.
    In,
    /// The label is absent or has none of the values.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

/// The annotation of a policy that stands in for a document which cannot be read.
pub const STAND_IN: &str = "cirri.io/stand-in";

pub(super) fn decode(cursor: &Cursor<'_>) -> Result<NetworkPolicy, ResourceError> {
    // `status` was part of the API until Kubernetes 1.28 and still stands in exported files.
    let root = cursor.object(&["apiVersion", "kind", "metadata", "spec", "status"])?;
    let metadata = decode::metadata(&root.required("metadata")?, true, syntax::dns_subdomain)?;
    let spec = match root.get("spec") {
        Some(spec) => decode_spec(&spec)?,
        None => no_spec(),
    };
    Ok(NetworkPolicy { metadata, spec })
}

/// As the API server reads it: all pods isolated for ingress, nothing allowed.
fn no_spec() -> NetworkPolicySpec {
    NetworkPolicySpec {
        pod_selector: LabelSelector::default(),
        policy_types: vec![PolicyType::Ingress],
        ingress: Vec::new(),
        egress: Vec::new(),
    }
}

const SPEC: &[&str] = &["podSelector", "policyTypes", "ingress", "egress"];

fn decode_spec(cursor: &Cursor<'_>) -> Result<NetworkPolicySpec, ResourceError> {
    let spec = cursor.object(SPEC)?;
    let pod_selector = spec.get("podSelector").map(|s| selector(&s)).transpose()?.unwrap_or_default();
    let mut ingress = Vec::new();
    for rule in spec.items("ingress")? {
        let fields = rule.object(&["from", "ports"])?;
        ingress.push(IngressRule { from: peers(&fields.items("from")?)?, ports: ports(&fields.items("ports")?)? });
    }
    let mut egress = Vec::new();
    for rule in spec.items("egress")? {
        let fields = rule.object(&["to", "ports"])?;
        egress.push(EgressRule { to: peers(&fields.items("to")?)?, ports: ports(&fields.items("ports")?)? });
    }
    let mut policy_types = policy_types(&spec)?;
    if policy_types.is_empty() {
        policy_types.push(PolicyType::Ingress);
        if !egress.is_empty() {
            policy_types.push(PolicyType::Egress);
        }
    }
    Ok(NetworkPolicySpec { pod_selector, policy_types, ingress, egress })
}

fn policy_types(spec: &Object<'_>) -> Result<Vec<PolicyType>, ResourceError> {
    let mut policy_types = Vec::new();
    for item in spec.items("policyTypes")? {
        let one = match item.string()? {
            "Ingress" => PolicyType::Ingress,
            "Egress" => PolicyType::Egress,
            other => {
                return Err(item.error(format!("\"{}\" is not a policy type", cut(other)), "use Ingress or Egress"));
            }
        };
        if policy_types.contains(&one) {
            return Err(item.error("stands here twice", "remove one of them"));
        }
        policy_types.push(one);
    }
    Ok(policy_types)
}

/// What is surely meant by a policy that cannot be read as a whole, and lets nothing pass that it may forbid: its
/// whole spec if the mistake is elsewhere; else it selects the pods that it names and allows nothing. Of a selector
/// that can be read in part that part is used, which selects more. `None` if nothing says which pods are meant.
pub(super) fn stand_in(cursor: &Cursor<'_>, metadata: &Metadata) -> Option<NetworkPolicy> {
    let spec = match cursor.any_object().ok()?.get("spec") {
        Some(at) => decode_spec(&at).ok().or_else(|| isolation(&at))?,
        None => no_spec(),
    };
    let mut metadata = metadata.clone();
    metadata.annotations.insert(STAND_IN.to_owned(), "true".to_owned());
    Some(NetworkPolicy { metadata, spec })
}

fn isolation(cursor: &Cursor<'_>) -> Option<NetworkPolicySpec> {
    let spec = cursor.any_object().ok()?;
    // A field that nobody knows may be any of them, misspelt.
    let known = cursor.object(SPEC).is_ok();
    let pod_selector = match spec.get("podSelector") {
        Some(at) => readable_part(&at)?,
        None if known => LabelSelector::default(),
        None => return None,
    };
    let policy_types = match policy_types(&spec) {
        _ if !known => vec![PolicyType::Ingress, PolicyType::Egress],
        Ok(given) if !given.is_empty() => given,
        Ok(_) => match spec.get("egress").map(|at| at.list()) {
            Some(Ok(rules)) if rules.is_empty() => vec![PolicyType::Ingress],
            Some(_) => vec![PolicyType::Ingress, PolicyType::Egress],
            None => vec![PolicyType::Ingress],
        },
        Err(_) => vec![PolicyType::Ingress, PolicyType::Egress],
    };
    Some(NetworkPolicySpec { pod_selector, policy_types, ingress: Vec::new(), egress: Vec::new() })
}

/// The conditions of a selector that can be read; `None` if none can.
fn readable_part(cursor: &Cursor<'_>) -> Option<LabelSelector> {
    if let Ok(whole) = selector(cursor) {
        return Some(whole);
    }
    let fields = cursor.any_object().ok()?;
    let mut part = LabelSelector::default();
    if let Some(labels) = fields.get("matchLabels") {
        part.match_labels = labels.readable_strings(syntax::label_key, syntax::label_value);
    }
    for item in fields.items("matchExpressions").unwrap_or_default() {
        part.match_expressions.extend(requirement(&item));
    }
    (part != LabelSelector::default()).then_some(part)
}

fn peers(items: &[Cursor<'_>]) -> Result<Vec<PolicyPeer>, ResourceError> {
    items.iter().map(peer).collect()
}

fn peer(cursor: &Cursor<'_>) -> Result<PolicyPeer, ResourceError> {
    let fields = cursor.object(&["podSelector", "namespaceSelector", "ipBlock"])?;
    let pod_selector = fields.get("podSelector").map(|s| selector(&s)).transpose()?;
    let namespace_selector = fields.get("namespaceSelector").map(|s| selector(&s)).transpose()?;
    match (fields.get("ipBlock"), pod_selector.is_some() || namespace_selector.is_some()) {
        (Some(_), true) => Err(cursor.error(
            "has an ipBlock and a selector",
            "make them two entries of the list (a '-' each): pods are selected by labels, addresses by ipBlock",
        )),
        (Some(block), false) => Ok(PolicyPeer::Addresses { ip_block: ip_block(&block)? }),
        (None, true) => Ok(PolicyPeer::Pods { pod_selector, namespace_selector }),
        (None, false) => Err(cursor.error(
            "names no peer",
            "add podSelector, namespaceSelector or ipBlock; to allow every peer, remove the whole list",
        )),
    }
}

fn ip_block(cursor: &Cursor<'_>) -> Result<IpBlock, ResourceError> {
    let fields = cursor.object(&["cidr", "except"])?;
    let cidr = fields.required("cidr")?.parsed(syntax::cidr)?;
    let mut except = Vec::new();
    for item in fields.items("except")? {
        let net = item.parsed(syntax::cidr)?;
        if !cidr.contains(&net) || net.prefix_len() <= cidr.prefix_len() {
            return Err(item.error(format!("{net} is not strictly inside {cidr}"), "use a smaller prefix inside cidr"));
        }
        except.push(net);
    }
    Ok(IpBlock { cidr, except })
}

fn ports(items: &[Cursor<'_>]) -> Result<Vec<PolicyPort>, ResourceError> {
    items.iter().map(port).collect()
}

fn port(cursor: &Cursor<'_>) -> Result<PolicyPort, ResourceError> {
    let fields = cursor.object(&["protocol", "port", "endPort"])?;
    let protocol = decode::protocol(fields.get("protocol"))?;
    let port = match fields.get("port") {
        Some(value) if value.is_string() => Some(PortRef::Name(value.checked(syntax::port_name)?.to_string())),
        Some(value) => Some(PortRef::Number(value.port()?)),
        None => None,
    };
    let end_port = match fields.get("endPort") {
        None => None,
        Some(value) => {
            let last = value.port()?;
            match &port {
                Some(PortRef::Number(first)) if *first <= last => Some(last),
                Some(PortRef::Number(first)) => {
                    return Err(value.error(format!("{last} is below port {first}"), "make it at least `port`"));
                }
                Some(PortRef::Name(_)) => {
                    return Err(value.error("stands with a named port", "use a number as `port`, or remove endPort"));
                }
                None => return Err(value.error("stands without `port`", "add the first port of the range as `port`")),
            }
        }
    };
    Ok(PolicyPort { protocol, port, end_port })
}

fn selector(cursor: &Cursor<'_>) -> Result<LabelSelector, ResourceError> {
    let fields = cursor.object(&["matchLabels", "matchExpressions"])?;
    let match_labels = fields
        .get("matchLabels")
        .map(|labels| labels.string_map(syntax::label_key, syntax::label_value))
        .transpose()?
        .unwrap_or_default();
    let match_expressions =
        fields.items("matchExpressions")?.iter().map(requirement).collect::<Result<Vec<_>, ResourceError>>()?;
    Ok(LabelSelector { match_labels, match_expressions })
}

fn requirement(cursor: &Cursor<'_>) -> Result<SelectorRequirement, ResourceError> {
    let fields = cursor.object(&["key", "operator", "values"])?;
    let key = fields.required("key")?.checked(syntax::label_key)?.to_string();
    let at = fields.required("operator")?;
    let operator = match at.string()? {
        "In" => Operator::In,
        "NotIn" => Operator::NotIn,
        "Exists" => Operator::Exists,
        "DoesNotExist" => Operator::DoesNotExist,
        other => {
            let problem = format!("\"{}\" is not an operator", cut(other));
            return Err(at.error(problem, "use In, NotIn, Exists or DoesNotExist"));
        }
    };
    let mut values = Vec::new();
    for item in fields.items("values")? {
        values.push(item.checked(syntax::label_value)?.to_string());
    }
    match operator {
        Operator::In | Operator::NotIn if values.is_empty() => {
            Err(cursor.error("has no values", "add at least one value, or use Exists or DoesNotExist"))
        }
        Operator::Exists | Operator::DoesNotExist if !values.is_empty() => {
            Err(cursor.error("has values that its operator does not use", "remove them, or use In or NotIn"))
        }
        _ => Ok(SelectorRequirement { key, operator, values }),
    }
}
