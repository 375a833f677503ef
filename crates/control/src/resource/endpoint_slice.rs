//! discovery.k8s.io/v1 EndpointSlice.

use super::{Metadata, Protocol, ResourceError, decode, syntax, tree::Cursor};
use crate::cut::cut;
use serde::{Serialize, Serializer};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// discovery.k8s.io/v1 EndpointSlice, valid and with its defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// Name, namespace, and the label that names the service.
    pub metadata: Metadata,
    /// What its addresses are. Every endpoint's are of this kind.
    pub address_type: AddressType,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Ports that every endpoint of it serves.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<EndpointPort>,
}

impl EndpointSlice {
    /// The slice's namespace.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or(super::DEFAULT_NAMESPACE)
    }

    /// The service that it belongs to, in its own namespace.
    pub fn service(&self) -> Option<&str> {
        self.metadata.labels.get(SERVICE_NAME_LABEL).map(String::as_str)
    }
}

/// What a slice's addresses are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum AddressType {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
    /// Names; nobody can be forwarded to by name, so such a slice has no endpoints here.
    #[serde(rename = "FQDN")]
    Fqdn,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Its addresses, at least one. They are interchangeable: the first is used.
    pub addresses: Vec<IpAddr>,
    /// What may be done with it.
    pub conditions: EndpointConditions,
    /// The node it runs on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The zone it runs in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Who is to use it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hints: Option<EndpointHints>,
    /// What it is, mostly a pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_ref: Option<TargetRef>,
}

/// What may be done with an endpoint. What is not said has the API's defaults: ready, serving, not
/// terminating.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct EndpointConditions {
    /// It takes connections.
    pub ready: bool,
    /// It would take connections if it did not terminate.
    pub serving: bool,
    /// It is about to end.
    pub terminating: bool,
}

/// Who is to use an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointHints {
    /// Clients of these zones.
    #[serde(serialize_with = "named", skip_serializing_if = "Vec::is_empty")]
    pub for_zones: Vec<String>,
    /// Clients of these nodes.
    #[serde(serialize_with = "named", skip_serializing_if = "Vec::is_empty")]
    pub for_nodes: Vec<String>,
}

/// The object behind an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TargetRef {
    /// Mostly `Pod`.
    pub kind: String,
    /// Its namespace; empty: the slice's.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// A port that a slice's endpoints serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EndpointPort {
    /// The name of the service's port; empty if that has none.
    pub name: String,
    /// TCP unless given.
    pub protocol: Protocol,
    /// The number; `None` is no port that can be forwarded to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// The label of a slice whose service is headless: it is for DNS, not to be forwarded to.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// The label of a slice that names its service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

pub(super) fn decode(cursor: &Cursor<'_>) -> Result<EndpointSlice, ResourceError> {
    let root = cursor.object(&["apiVersion", "kind", "metadata", "addressType", "endpoints", "ports"])?;
    let metadata = decode::metadata(&root.required("metadata")?, true, syntax::dns_subdomain)?;
    let at = root.required("addressType")?;
    let address_type = match at.string()? {
        "IPv4" => AddressType::IPv4,
        "IPv6" => AddressType::IPv6,
        "FQDN" => AddressType::Fqdn,
        other => return Err(at.error(format!("\"{}\" is not a type of address", cut(other)), "use IPv4, IPv6 or FQDN")),
    };
    let mut endpoints = Vec::new();
    for item in root.items("endpoints")? {
        endpoints.extend(endpoint(&item, address_type)?);
    }
    let mut ports: Vec<EndpointPort> = Vec::new();
    let mut names = BTreeSet::new();
    for item in root.items("ports")? {
        let fields = item.object(&["name", "protocol", "port", "appProtocol"])?;
        let name = match fields.get("name") {
            Some(at) if !at.string()?.is_empty() => at.checked(syntax::dns_label)?.to_string(),
            _ => String::new(),
        };
        if !names.insert(name.clone()) {
            return Err(item.error(format!("a second port is named \"{name}\""), "give each its own name"));
        }
        let port = fields.get("port").map(|at| at.port()).transpose()?;
        ports.push(EndpointPort { name, protocol: decode::protocol(fields.get("protocol"))?, port });
    }
    Ok(EndpointSlice { metadata, address_type, endpoints, ports })
}

/// An endpoint; `None` if it has a name where an address is needed.
fn endpoint(cursor: &Cursor<'_>, address_type: AddressType) -> Result<Option<Endpoint>, ResourceError> {
    let fields = cursor.object(ENDPOINT)?;
    let at = fields.required("addresses")?;
    let items = at.list()?;
    if items.is_empty() {
        return Err(at.error("has no address", "add at least one"));
    }
    if address_type == AddressType::Fqdn {
        return Ok(None);
    }
    let mut addresses = Vec::new();
    for item in items {
        let address = item.parsed(syntax::address)?;
        if address.is_ipv6() != (address_type == AddressType::IPv6) {
            let problem = format!("{address} is not {address_type:?}, which the slice's addressType says");
            return Err(item.error(problem, "put addresses of each family into a slice of their own"));
        }
        if !syntax::is_one_hosts(address) {
            return Err(item.error(format!("{address} is nobody's alone"), "use the endpoint's own address"));
        }
        addresses.push(address);
    }
    let mut conditions = EndpointConditions { ready: true, serving: true, terminating: false };
    if let Some(at) = fields.get("conditions") {
        let given = at.object(&["ready", "serving", "terminating"])?;
        let condition = |name| given.get(name).map(|at| at.bool()).transpose();
        conditions.ready = condition("ready")?.unwrap_or(true);
        conditions.serving = condition("serving")?.unwrap_or(true);
        conditions.terminating = condition("terminating")?.unwrap_or(false);
    }
    let mut hints = None;
    if let Some(at) = fields.get("hints") {
        let given = at.object(&["forZones", "forNodes"])?;
        let names = |name: &str| -> Result<Vec<String>, ResourceError> {
            let name_of = |item: &Cursor<'_>| Ok(item.object(&["name"])?.required("name")?.string()?.to_string());
            given.items(name)?.iter().map(name_of).collect()
        };
        hints = Some(EndpointHints { for_zones: names("forZones")?, for_nodes: names("forNodes")? });
    }
    let mut target_ref = None;
    if let Some(at) = fields.get("targetRef") {
        let given = at.any_object()?;
        let text = |name| given.string(name).map(Option::unwrap_or_default);
        target_ref = Some(TargetRef { kind: text("kind")?, namespace: text("namespace")?, name: text("name")? });
    }
    let text = |name| fields.string(name).map(|text| text.filter(|text| !text.is_empty()));
    Ok(Some(Endpoint {
        addresses,
        conditions,
        node_name: text("nodeName")?,
        zone: text("zone")?,
        hints: hints.filter(|hints| *hints != EndpointHints::default()),
        target_ref,
    }))
}

fn named<S: Serializer>(names: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Named<'a> {
        name: &'a str,
    }
    serializer.collect_seq(names.iter().map(|name| Named { name }))
}

const ENDPOINT: &[&str] =
    &["addresses", "conditions", "hostname", "targetRef", "deprecatedTopology", "nodeName", "zone", "hints"];
