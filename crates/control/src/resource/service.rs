//! core/v1 Service.

use super::{Metadata, PortRef, Protocol, ResourceError, decode, syntax, tree::Cursor, tree::Object};
use crate::cut::cut;
use ipnet::IpNet;
use serde::{Serialize, Serializer};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// core/v1 Service, valid and with its defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Service {
    /// Name, namespace, annotations.
    pub metadata: Metadata,
    /// What was asked for.
    pub spec: ServiceSpec,
    /// What was given.
    #[serde(skip_serializing_if = "ServiceStatus::is_empty")]
    pub status: ServiceStatus,
}

impl Service {
    /// The service's namespace.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or(super::DEFAULT_NAMESPACE)
    }
}

/// What a service asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// `ClusterIP` unless given.
    #[serde(rename = "type")]
    pub kind: ServiceType,
    /// Labels of the pods behind it; empty: somebody else says who is behind it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub selector: BTreeMap<String, String>,
    /// Its ports; names are unique, and only a single port may have none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ServicePortSpec>,
    /// Its addresses inside the cluster.
    #[serde(rename = "clusterIPs", skip_serializing_if = "ClusterIps::is_empty")]
    pub cluster_ips: ClusterIps,
    /// The families it wants, the first being its main one; empty: not said.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ip_families: Vec<IpFamily>,
    /// How many families it wants, if it says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_family_policy: Option<IpFamilyPolicy>,
    /// Addresses of the world that its owner brings to the nodes.
    #[serde(rename = "externalIPs", skip_serializing_if = "Vec::is_empty")]
    pub external_ips: Vec<IpAddr>,
    /// The address that its owner wishes its load balancer to have. Never served: only what its status says is.
    #[serde(rename = "loadBalancerIP", skip_serializing_if = "Option::is_none")]
    pub load_balancer_ip: Option<IpAddr>,
    /// Which clients may use the load balancer's addresses; empty: all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub load_balancer_source_ranges: Vec<IpNet>,
    /// Whose load balancer it is, if not the cluster's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_balancer_class: Option<String>,
    /// Whether a load balancer also gets node ports; it does unless this says no.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocate_load_balancer_node_ports: Option<bool>,
    /// How long a client keeps its backend, seconds; `None`: not at all.
    #[serde(flatten, serialize_with = "affinity", skip_serializing_if = "Option::is_none")]
    pub client_ip_timeout: Option<u32>,
    /// Which endpoints clients inside the cluster may be given.
    pub internal_traffic_policy: TrafficPolicy,
    /// Which endpoints clients outside may be given.
    pub external_traffic_policy: TrafficPolicy,
    /// The port of every node that says whether the node has endpoints of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_check_node_port: Option<u16>,
    /// Whether endpoints count as ready whatever they say.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub publish_not_ready_addresses: bool,
    /// Which endpoints are preferred.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traffic_distribution: Option<String>,
    /// The name that an `ExternalName` stands for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub external_name: Option<String>,
}

/// Kind of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum ServiceType {
    /// Inside the cluster.
    #[default]
    ClusterIP,
    /// And at a port of every node.
    NodePort,
    /// And at addresses for the world.
    LoadBalancer,
    /// Only a name in DNS.
    ExternalName,
}

/// A service's addresses inside the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClusterIps {
    /// It has none and wants none.
    Headless,
    /// These, at most one of each family; none: not given yet.
    Given(Vec<IpAddr>),
}

impl ClusterIps {
    /// The addresses.
    pub fn addresses(&self) -> &[IpAddr] {
        match self {
            ClusterIps::Headless => &[],
            ClusterIps::Given(addresses) => addresses,
        }
    }

    fn is_empty(&self) -> bool {
        *self == ClusterIps::default()
    }
}

impl Default for ClusterIps {
    fn default() -> ClusterIps {
        ClusterIps::Given(Vec::new())
    }
}

impl Serialize for ClusterIps {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            ClusterIps::Headless => ["None"].serialize(serializer),
            ClusterIps::Given(addresses) => addresses.serialize(serializer),
        }
    }
}

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum IpFamily {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

impl IpFamily {
    /// The family of an address.
    pub fn of(address: IpAddr) -> IpFamily {
        if address.is_ipv6() { IpFamily::IPv6 } else { IpFamily::IPv4 }
    }
}

/// How many families a service wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum IpFamilyPolicy {
    /// One.
    SingleStack,
    /// Two where the cluster has two.
    PreferDualStack,
    /// Two.
    RequireDualStack,
}

/// Which endpoints clients may be given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum TrafficPolicy {
    /// All.
    #[default]
    Cluster,
    /// Those of the node that the client came to.
    Local,
}

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePortSpec {
    /// Its name, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// TCP unless given.
    pub protocol: Protocol,
    /// The number, at the service's addresses.
    pub port: u16,
    /// The pods' port: the same number unless given, or a name that each pod resolves.
    pub target_port: PortRef,
    /// The port of every node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_port: Option<u16>,
}

/// What a service was given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    /// By the load balancer.
    pub load_balancer: LoadBalancerStatus,
}

impl ServiceStatus {
    fn is_empty(&self) -> bool {
        self.load_balancer.ingress.is_empty()
    }
}

/// What a load balancer gave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LoadBalancerStatus {
    /// Addresses that lead to the service. Names, and addresses that only the load balancer itself
    /// answers (`ipMode: Proxy`), are left out.
    pub ingress: Vec<LoadBalancerIngress>,
}

/// One address of a load balancer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LoadBalancerIngress {
    /// The address.
    pub ip: IpAddr,
}

/// The label of a service that another program forwards, and of its slices: they are left alone.
pub const SERVICE_PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

pub(super) fn decode(cursor: &Cursor<'_>) -> Result<Service, ResourceError> {
    let root = cursor.object(&["apiVersion", "kind", "metadata", "spec", "status"])?;
    let metadata = decode::metadata(&root.required("metadata")?, true, syntax::dns_label)?;
    let spec = decode_spec(&root.required("spec")?)?;
    let mut status = ServiceStatus::default();
    if let Some(at) = root.get("status")
        && let Some(at) = at.any_object()?.get("loadBalancer")
    {
        for item in at.object(&["ingress"])?.items("ingress")? {
            let fields = item.object(&["ip", "ipMode", "hostname", "ports"])?;
            let answers_itself = fields.string("ipMode")?.as_deref() == Some("Proxy");
            if let Some(ip) = fields.get("ip").filter(|_| !answers_itself) {
                let ip = ip.parsed(syntax::address)?;
                // Whoever wrote that balances on its own host; the service's other addresses are good.
                if syntax::is_one_hosts(ip) {
                    status.load_balancer.ingress.push(LoadBalancerIngress { ip });
                }
            }
        }
    }
    let addresses = spec.external_ips.len() + status.load_balancer.ingress.len();
    if addresses * spec.ports.len() > MOST_FRONTENDS {
        let (ports, most) = (spec.ports.len(), MOST_FRONTENDS);
        return Err(cursor.error(
            format!(
                "{addresses} addresses with {ports} ports each come to more than the {most} that one service may have"
            ),
            "make several services of it, or remove addresses or ports",
        ));
    }
    Ok(Service { metadata, spec, status })
}

/// Addresses with a port that one service may have from outside: they multiply, and the tables are everybody's.
const MOST_FRONTENDS: usize = 8192;

fn decode_spec(cursor: &Cursor<'_>) -> Result<ServiceSpec, ResourceError> {
    let fields = cursor.object(SPEC)?;
    let kind = choice(
        &fields,
        "type",
        &[
            ("ClusterIP", ServiceType::ClusterIP),
            ("NodePort", ServiceType::NodePort),
            ("LoadBalancer", ServiceType::LoadBalancer),
            ("ExternalName", ServiceType::ExternalName),
        ],
    )?
    .unwrap_or_default();
    let cluster_ips = cluster_ips(&fields)?;
    let external_ips = addresses(&fields, "externalIPs")?;
    let ports = ports(&fields, kind)?;
    let needs_ports = kind != ServiceType::ExternalName && cluster_ips != ClusterIps::Headless;
    if ports.is_empty() && needs_ports {
        return Err(match fields.get("ports") {
            Some(at) => at.error("has no port", "add at least one, or make the service headless (`clusterIP: None`)"),
            None => cursor.error("has no ports", "add `ports`, or make the service headless (`clusterIP: None`)"),
        });
    }
    if kind == ServiceType::ExternalName && fields.get("externalName").is_none() {
        return Err(cursor.error("is an ExternalName without a name", "add `externalName`"));
    }
    if matches!(kind, ServiceType::NodePort | ServiceType::LoadBalancer) && cluster_ips == ClusterIps::Headless {
        return Err(cursor.error("is headless and wants a port of the nodes", "remove `clusterIP: None` or `type`"));
    }
    let policies = &[("Cluster", TrafficPolicy::Cluster), ("Local", TrafficPolicy::Local)];
    let external_traffic_policy = choice(&fields, "externalTrafficPolicy", policies)?.unwrap_or_default();
    let spec = ServiceSpec {
        kind,
        selector: match fields.get("selector") {
            Some(at) => at.string_map(syntax::label_key, syntax::label_value)?,
            None => BTreeMap::new(),
        },
        ports,
        ip_families: families(&fields, &cluster_ips)?,
        ip_family_policy: choice(
            &fields,
            "ipFamilyPolicy",
            &[
                ("SingleStack", IpFamilyPolicy::SingleStack),
                ("PreferDualStack", IpFamilyPolicy::PreferDualStack),
                ("RequireDualStack", IpFamilyPolicy::RequireDualStack),
            ],
        )?,
        cluster_ips,
        external_ips,
        load_balancer_ip: given(&fields, "loadBalancerIP")?.map(|at| at.parsed(syntax::address)).transpose()?,
        load_balancer_source_ranges: source_ranges(&fields, kind)?,
        load_balancer_class: fields.string("loadBalancerClass")?,
        allocate_load_balancer_node_ports: fields
            .get("allocateLoadBalancerNodePorts")
            .map(|at| at.bool())
            .transpose()?,
        client_ip_timeout: client_ip_timeout(&fields)?,
        internal_traffic_policy: choice(&fields, "internalTrafficPolicy", policies)?.unwrap_or_default(),
        external_traffic_policy,
        health_check_node_port: health_check_node_port(&fields, kind, external_traffic_policy)?,
        publish_not_ready_addresses: fields
            .get("publishNotReadyAddresses")
            .map(|at| at.bool())
            .transpose()?
            .unwrap_or(false),
        traffic_distribution: choice(
            &fields,
            "trafficDistribution",
            &["PreferClose", "PreferSameZone", "PreferSameNode"].map(|name| (name, name.to_string())),
        )?,
        external_name: fields.string("externalName")?.filter(|name| !name.is_empty()),
    };
    let outside = spec.kind != ServiceType::ClusterIP || !spec.external_ips.is_empty();
    match fields.get("externalTrafficPolicy") {
        Some(at) if external_traffic_policy == TrafficPolicy::Local && !outside => {
            Err(at.error("the service is not reached from outside", "set type NodePort or LoadBalancer, or remove it"))
        }
        _ => Ok(spec),
    }
}

fn ports(fields: &Object<'_>, kind: ServiceType) -> Result<Vec<ServicePortSpec>, ResourceError> {
    let items = fields.items("ports")?;
    let mut out: Vec<ServicePortSpec> = Vec::new();
    let (mut names, mut numbers, mut node_ports) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for item in &items {
        let one = port(item, kind)?;
        if one.name.is_none() && items.len() > 1 {
            return Err(item.error("has no name", "with more than one port each needs a `name`"));
        }
        if !names.insert(one.name.clone()) {
            let name = one.name.unwrap_or_default();
            return Err(item.error(format!("a second port is named \"{name}\""), "give it another name"));
        }
        if !numbers.insert((one.protocol, one.port)) {
            let problem = format!("a second port is {} {}", one.protocol, one.port);
            return Err(item.error(problem, "remove one of them"));
        }
        if one.node_port.is_some_and(|number| !node_ports.insert((one.protocol, number))) {
            return Err(item.error("a second port has this nodePort", "give each its own"));
        }
        out.push(one);
    }
    Ok(out)
}

fn port(cursor: &Cursor<'_>, kind: ServiceType) -> Result<ServicePortSpec, ResourceError> {
    let fields = cursor.object(&["name", "protocol", "appProtocol", "port", "targetPort", "nodePort"])?;
    let port = fields.required("port")?.port()?;
    // The API server fills in 0 and "" where nothing was given.
    let target_port = match fields.get("targetPort") {
        Some(at) if at.is_string() && !at.string()?.is_empty() => {
            PortRef::Name(at.checked(syntax::port_name)?.to_string())
        }
        Some(at) if !at.is_string() && !at.is_zero() => PortRef::Number(at.port()?),
        _ => PortRef::Number(port),
    };
    let node_port = match fields.get("nodePort").filter(|at| !at.is_zero()) {
        Some(at) if !matches!(kind, ServiceType::NodePort | ServiceType::LoadBalancer) => {
            return Err(at.error("the service has no node ports", "set type NodePort or LoadBalancer, or remove it"));
        }
        Some(at) => Some(at.port()?),
        None => None,
    };
    Ok(ServicePortSpec {
        name: given(&fields, "name")?.map(|at| at.checked(syntax::dns_label).map(str::to_string)).transpose()?,
        protocol: decode::protocol(fields.get("protocol"))?,
        port,
        target_port,
        node_port,
    })
}

fn cluster_ips(fields: &Object<'_>) -> Result<ClusterIps, ResourceError> {
    let first = given(fields, "clusterIP")?;
    let mut items = fields.items("clusterIPs")?;
    if let Some(first) = &first {
        match items.first() {
            Some(other) if other.string()? != first.string()? => {
                return Err(first.error("is not the first of clusterIPs", "make them the same, or remove one of them"));
            }
            Some(_) => {}
            None => items.push(first.clone()),
        }
    }
    let headless = |at: &Cursor<'_>| at.string().is_ok_and(|text| text == "None");
    if items.first().is_some_and(headless) {
        return match items.get(1) {
            Some(at) => Err(at.error("stands beside None", "use None alone, or addresses")),
            None => Ok(ClusterIps::Headless),
        };
    }
    let mut out: Vec<IpAddr> = Vec::new();
    for item in &items {
        let address = item.parsed(syntax::address)?;
        if out.iter().any(|known| known.is_ipv6() == address.is_ipv6()) {
            return Err(item.error("is a second address of this family", "use at most one of each family"));
        }
        out.push(address);
    }
    Ok(ClusterIps::Given(out))
}

fn families(fields: &Object<'_>, cluster_ips: &ClusterIps) -> Result<Vec<IpFamily>, ResourceError> {
    let mut out = Vec::new();
    for item in fields.items("ipFamilies")? {
        let family = match item.string()? {
            "IPv4" => IpFamily::IPv4,
            "IPv6" => IpFamily::IPv6,
            other => return Err(item.error(format!("\"{}\" is not a family", cut(other)), "use IPv4 or IPv6")),
        };
        if out.contains(&family) {
            return Err(item.error("stands here twice", "remove one of them"));
        }
        match cluster_ips.addresses().get(out.len()) {
            Some(address) if IpFamily::of(*address) != family => {
                return Err(
                    item.error(format!("the cluster address {address} is not {family:?}"), "correct one of them")
                );
            }
            _ => out.push(family),
        }
    }
    let unnamed = cluster_ips.addresses().iter().map(|address| IpFamily::of(*address)).skip(out.len());
    out.extend(unnamed.collect::<Vec<_>>());
    Ok(out)
}

fn addresses(fields: &Object<'_>, name: &str) -> Result<Vec<IpAddr>, ResourceError> {
    let mut out = Vec::new();
    for item in fields.items(name)? {
        let address = item.parsed(syntax::address)?;
        if !syntax::is_one_hosts(address) {
            return Err(item.error(format!("{address} is nobody's alone"), "use an address that leads to the nodes"));
        }
        out.push(address);
    }
    Ok(out)
}

fn source_ranges(fields: &Object<'_>, kind: ServiceType) -> Result<Vec<IpNet>, ResourceError> {
    let items = fields.items("loadBalancerSourceRanges")?;
    match items.first() {
        Some(at) if kind != ServiceType::LoadBalancer => {
            Err(at.error("the service is no load balancer", "set type LoadBalancer, or remove the ranges"))
        }
        _ => items.iter().map(|item| item.parsed(|text| syntax::cidr(text.trim()))).collect(),
    }
}

fn client_ip_timeout(fields: &Object<'_>) -> Result<Option<u32>, ResourceError> {
    let client_ip = choice(fields, "sessionAffinity", &[("None", false), ("ClientIP", true)])?.unwrap_or(false);
    let mut seconds = DEFAULT_TIMEOUT;
    if let Some(at) = fields.get("sessionAffinityConfig") {
        if !client_ip {
            return Err(at.error("goes with `sessionAffinity: ClientIP` only", "set that, or remove this"));
        }
        if let Some(at) = at.object(&["clientIP"])?.get("clientIP")
            && let Some(at) = at.object(&["timeoutSeconds"])?.get("timeoutSeconds")
        {
            seconds = at.integer(1..=86_400)? as u32;
        }
    }
    Ok(client_ip.then_some(seconds))
}

fn health_check_node_port(
    fields: &Object<'_>,
    kind: ServiceType,
    policy: TrafficPolicy,
) -> Result<Option<u16>, ResourceError> {
    let Some(at) = fields.get("healthCheckNodePort").filter(|at| !at.is_zero()) else { return Ok(None) };
    if kind != ServiceType::LoadBalancer || policy != TrafficPolicy::Local {
        return Err(
            at.error("goes with a load balancer of `externalTrafficPolicy: Local` only", "set both, or remove this")
        );
    }
    at.port().map(Some)
}

/// The field, unless it is empty: the API server's clients write "" for what is not given.
fn given<'a>(fields: &Object<'a>, name: &str) -> Result<Option<Cursor<'a>>, ResourceError> {
    match fields.get(name) {
        Some(at) if at.string()?.is_empty() => Ok(None),
        other => Ok(other),
    }
}

/// One of several words; `None` if the field is absent or empty.
fn choice<T: Clone>(fields: &Object<'_>, name: &str, words: &[(&str, T)]) -> Result<Option<T>, ResourceError> {
    let Some(at) = given(fields, name)? else { return Ok(None) };
    let text = at.string()?;
    match words.iter().find(|(word, _)| *word == text) {
        Some((_, value)) => Ok(Some(value.clone())),
        None => {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            Err(at.error(format!("\"{}\" is not known", cut(text)), format!("use {}", known.join(" or "))))
        }
    }
}

fn affinity<S: Serializer>(timeout: &Option<u32>, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Affinity {
        session_affinity: &'static str,
        session_affinity_config: BTreeMap<&'static str, BTreeMap<&'static str, u32>>,
    }
    let seconds = timeout.unwrap_or(DEFAULT_TIMEOUT);
    let config = BTreeMap::from([("clientIP", BTreeMap::from([("timeoutSeconds", seconds)]))]);
    Affinity { session_affinity: "ClientIP", session_affinity_config: config }.serialize(serializer)
}

/// Three hours, as the API server has it.
const DEFAULT_TIMEOUT: u32 = 10_800;

const SPEC: &[&str] = &[
    "allocateLoadBalancerNodePorts",
    "clusterIP",
    "clusterIPs",
    "externalIPs",
    "externalName",
    "externalTrafficPolicy",
    "healthCheckNodePort",
    "internalTrafficPolicy",
    "ipFamilies",
    "ipFamilyPolicy",
    "loadBalancerClass",
    "loadBalancerIP",
    "loadBalancerSourceRanges",
    "ports",
    "publishNotReadyAddresses",
    "selector",
    "sessionAffinity",
    "sessionAffinityConfig",
    "trafficDistribution",
    "type",
];
