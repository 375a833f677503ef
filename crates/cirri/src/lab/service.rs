//! Services as the lab's store has them: what the lab fills in, what a probe asks for.
//!
//! A view of the JSON in the store, of the fields that the lab needs and no others. What a service means is the
//! agents' business.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use anyhow::{Context, bail};
use serde::Deserialize;

use super::cluster;
use super::echo::{Port, Transport};
use super::state::{Lab, Node, PodKey, PodRecord};
use super::underlay;

/// The annotation that names the node to which the router sends packets for the service's own addresses.
pub const VIA: &str = "lab.cirri.io/via";

/// The label of a slice that names its service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// A service.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Service {
    /// Annotations.
    pub metadata: Metadata,
    /// What was asked for.
    pub spec: Spec,
    /// What the lab gave it.
    pub status: Status,
}

/// The part of the metadata that concerns the lab.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Metadata {
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// What a service asks for.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Spec {
    /// `ClusterIP` (also if empty), `NodePort`, `LoadBalancer` or `ExternalName`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The first cluster address, or `None` as a word.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    /// All of them.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
    /// Addresses of the world that its owner brings.
    #[serde(rename = "externalIPs")]
    pub external_ips: Vec<IpAddr>,
    /// The address that a load balancer is to have.
    #[serde(rename = "loadBalancerIP")]
    pub load_balancer_ip: Option<IpAddr>,
    /// `IPv4`, `IPv6`, in the order of the cluster addresses.
    pub ip_families: Vec<String>,
    /// `SingleStack` (also if absent), `PreferDualStack` or `RequireDualStack`.
    pub ip_family_policy: Option<String>,
    /// `Local` or `Cluster`.
    pub external_traffic_policy: Option<String>,
    /// Whether a load balancer also gets node ports; it does unless this says no.
    pub allocate_load_balancer_node_ports: Option<bool>,
    /// Where each node says whether it has backends; 0 for none.
    pub health_check_node_port: u16,
    /// Labels of its pods.
    pub selector: BTreeMap<String, String>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
}

/// A port of a service.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServicePort {
    /// Its name, if it has one.
    pub name: Option<String>,
    /// Its number.
    pub port: u16,
    /// `TCP` (also if absent), `UDP` or `SCTP`.
    pub protocol: Option<String>,
    /// The port of every node that leads to it; 0 for none.
    pub node_port: u16,
}

/// What was given to a service.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Status {
    /// By the load balancer, which is the lab.
    pub load_balancer: LoadBalancer,
}

/// What a load balancer gave.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct LoadBalancer {
    /// Addresses.
    pub ingress: Vec<Ingress>,
}

/// One address.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Ingress {
    /// The address, unless it is a name.
    pub ip: Option<IpAddr>,
}

/// Which address of a service a probe uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vip {
    /// The cluster addresses.
    Cluster,
    /// The node port, at a node's addresses.
    Node(String),
    /// The node port, at the loopback addresses of whoever asks.
    Loopback,
    /// The load balancer's addresses.
    LoadBalancer,
    /// The external addresses.
    External,
}

/// A service's address and port, to be asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The addresses, one or none for each family.
    pub addresses: Vec<IpAddr>,
    /// The port.
    pub port: Port,
    /// Whether the echo server plays all of the backends.
    pub echo: bool,
}

impl FromStr for Vip {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "cluster" => Ok(Self::Cluster),
            "loopback" => Ok(Self::Loopback),
            "lb" => Ok(Self::LoadBalancer),
            "external" => Ok(Self::External),
            _ => text.strip_prefix("node:").map(|node| Self::Node(node.to_owned())).ok_or_else(|| {
                format!("\"{text}\" is no address of a service: write cluster, node:NAME, loopback, lb or external")
            }),
        }
    }
}

impl fmt::Display for Vip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster => f.write_str("cluster"),
            Self::Node(node) => write!(f, "node:{node}"),
            Self::Loopback => f.write_str("loopback"),
            Self::LoadBalancer => f.write_str("lb"),
            Self::External => f.write_str("external"),
        }
    }
}

impl Service {
    /// Reads one from the store's JSON.
    ///
    /// # Errors
    /// It is none.
    pub fn read(json: &str) -> anyhow::Result<Self> {
        serde_json::from_str(json).context("the store holds a service that cannot be read")
    }

    /// Whether it has no cluster address on purpose.
    pub fn is_headless(&self) -> bool {
        self.spec.cluster_ip == "None" || self.spec.cluster_ips.first().is_some_and(|first| first == "None")
    }

    /// Its cluster addresses.
    pub fn cluster_ips(&self) -> Vec<IpAddr> {
        let all = self.spec.cluster_ips.iter().chain([&self.spec.cluster_ip]);
        let mut found: Vec<IpAddr> = Vec::new();
        for address in all.filter_map(|address| address.parse().ok()) {
            if !found.contains(&address) {
                found.push(address);
            }
        }
        found
    }

    /// The addresses that its load balancer gave it.
    pub fn load_balancer_ips(&self) -> Vec<IpAddr> {
        self.status.load_balancer.ingress.iter().filter_map(|ingress| ingress.ip).collect()
    }

    fn addresses(&self, vip: &Vip, nodes: &[Node]) -> anyhow::Result<Vec<IpAddr>> {
        Ok(match vip {
            Vip::Cluster => self.cluster_ips(),
            Vip::LoadBalancer => self.load_balancer_ips(),
            Vip::External => self.spec.external_ips.clone(),
            Vip::Loopback => vec![IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])],
            Vip::Node(name) => {
                let node = nodes.iter().find(|node| node.name == *name);
                let node = node.with_context(|| format!("--vip node:{name}: the lab has no such node"))?;
                vec![node.ipv4.into(), node.ipv6.into()]
            }
        })
    }
}

impl ServicePort {
    /// How it is spoken to; `None` for SCTP, which the lab does not speak.
    pub fn transport(&self) -> Option<Transport> {
        match self.protocol.as_deref() {
            None | Some("TCP") => Some(Transport::Tcp),
            Some("UDP") => Some(Transport::Udp),
            _ => None,
        }
    }

    fn is(&self, wanted: &str) -> bool {
        self.name.as_deref() == Some(wanted) || wanted.parse() == Ok(self.port)
    }
}

/// Where `svc:NAMESPACE/NAME` leads: the port is a name or a number of the service's, or absent if it has only one of
/// that protocol. A number that it does not name is asked for all the same: that it is refused is worth knowing.
///
/// # Errors
/// No such service, port or address; it says which there are.
pub fn target(lab: &Lab, key: &PodKey, vip: &Vip, port: Option<&str>, protocol: Transport) -> anyhow::Result<Target> {
    let stored = cluster::resources(lab)?;
    let json = stored.get(&format!("resources/Service/{}/{}", key.namespace, key.name)).with_context(|| {
        let known = stored.keys().filter_map(|key| key.strip_prefix("resources/Service/"));
        let known: Vec<&str> = known.collect();
        format!("the lab \"{}\" has no service {key}; it has {}", lab.name, known.join(", "))
    })?;
    let service = Service::read(json)?;
    let of_protocol: Vec<&ServicePort> =
        service.spec.ports.iter().filter(|port| port.transport() == Some(protocol)).collect();
    let found = match port {
        Some(wanted) => of_protocol.iter().find(|port| port.is(wanted)).copied(),
        None => match of_protocol.as_slice() {
            [only] => Some(*only),
            all => bail!("the service {key} has {} ports of {protocol}: choose one with --port", all.len()),
        },
    };
    let of_node = matches!(vip, Vip::Node(_) | Vip::Loopback);
    let number = match found {
        Some(found) if of_node => found.node_port,
        Some(found) => found.port,
        None => {
            let wanted = port.unwrap_or_default();
            let known = of_protocol.iter().map(|port| port.name.clone().unwrap_or_else(|| port.port.to_string()));
            let known: Vec<String> = known.collect();
            wanted.parse().ok().filter(|number| *number > 0).with_context(|| {
                format!("the service {key} has no port {wanted}/{protocol}; it has {}", known.join(", "))
            })?
        }
    };
    if number == 0 {
        bail!("the service {key} has no node port there (its type is {})", service.spec.kind);
    }
    let addresses = service.addresses(vip, &lab.nodes)?;
    if addresses.is_empty() {
        bail!("the service {key} has no address of this kind (--vip {vip})");
    }
    let echo = only_echo(&service, &stored, &lab.pods()?, key);
    Ok(Target { addresses, port: Port { number, protocol }, echo })
}

/// Whether the echo server plays everyone who serves: pods that the service selects, or endpoints of its slices.
fn only_echo(service: &Service, stored: &BTreeMap<String, String>, pods: &[PodRecord], key: &PodKey) -> bool {
    let is_echo = |pod: &PodRecord| pod.spec.containers.iter().all(|container| container.is_echo());
    if service.spec.selector.is_empty() {
        let serves = |address: &IpAddr| {
            let pod = pods.iter().find(|pod| pod.addresses.contains(address));
            pod.map_or_else(|| underlay::WORLD.contains(address), is_echo)
        };
        let endpoints = endpoints(stored, key);
        return !endpoints.is_empty() && endpoints.iter().all(serves);
    }
    let selected = pods.iter().filter(|pod| {
        let labels = stored.get(&pod.key.store_key()).map(|json| labels(json));
        let selects =
            |labels: Labels| service.spec.selector.iter().all(|(name, value)| labels.get(name) == Some(value));
        pod.key.namespace == key.namespace && labels.is_some_and(selects)
    });
    let mut selected = selected.peekable();
    selected.peek().is_some() && selected.all(is_echo)
}

/// The addresses of the endpoints in a service's slices.
fn endpoints(stored: &BTreeMap<String, String>, key: &PodKey) -> Vec<IpAddr> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Slice {
        endpoints: Vec<Endpoint>,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Endpoint {
        addresses: Vec<IpAddr>,
    }
    let prefix = format!("resources/EndpointSlice/{}/", key.namespace);
    let of_service = |json: &&String| labels(json).get(SERVICE_NAME_LABEL) == Some(&key.name);
    let slices = stored.iter().filter(|(key, _)| key.starts_with(&prefix)).map(|(_, json)| json).filter(of_service);
    let slices = slices.filter_map(|json| serde_json::from_str::<Slice>(json).ok());
    slices.flat_map(|slice| slice.endpoints).flat_map(|endpoint| endpoint.addresses).collect()
}

type Labels = BTreeMap<String, String>;

/// The labels of a resource, from its JSON.
fn labels(json: &str) -> Labels {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Labelled {
        metadata: Labelling,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Labelling {
        labels: Labels,
    }
    serde_json::from_str::<Labelled>(json).unwrap_or_default().metadata.labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_apart() {
        for text in ["cluster", "node:node1", "loopback", "lb", "external"] {
            assert_eq!(text.parse::<Vip>().unwrap().to_string(), text);
        }
        assert!("somewhere".parse::<Vip>().is_err());
    }

    #[test]
    fn a_service_is_read_with_all_its_addresses() {
        let json = r#"{"kind":"Service","spec":{"clusterIP":"10.96.0.7","clusterIPs":["10.96.0.7","fd00::7"],
            "externalIPs":["192.0.2.1"],"ports":[{"name":"http","port":80,"nodePort":30080},
            {"port":53,"protocol":"UDP"}]},"status":{"loadBalancer":{"ingress":[{"ip":"203.0.113.130"},{"hostname":"x"}]}}}"#;
        let service = Service::read(json).unwrap();
        assert_eq!(service.cluster_ips().len(), 2);
        assert_eq!(service.load_balancer_ips(), ["203.0.113.130".parse::<IpAddr>().unwrap()]);
        assert!(service.spec.ports[0].is("http") && service.spec.ports[0].is("80") && !service.spec.ports[0].is("81"));
        assert_eq!(service.spec.ports[1].transport(), Some(Transport::Udp));
        assert!(!service.is_headless());
    }

    #[test]
    fn who_plays_the_backends_is_known_of_selected_pods_and_of_endpoints() {
        let pod = |name: &str, address: &str, argv: &[&str]| PodRecord {
            key: format!("shop/{name}").parse().unwrap(),
            node: "n1".into(),
            netns: "/run/netns/x".into(),
            container_id: "x".into(),
            addresses: vec![address.parse().unwrap()],
            spec: super::super::state::PodSpec {
                host_network: false,
                containers: vec![super::super::state::Container {
                    ports: ["80/tcp".parse().unwrap()].into(),
                    argv: argv.iter().map(|word| word.to_string()).collect(),
                    ..super::super::state::Container::default()
                }],
            },
            complete: true,
            error: None,
        };
        let pods = [pod("echo", "10.0.0.1", &[]), pod("real", "10.0.0.2", &["nginx"])];
        let labelled = |app: &str| format!(r#"{{"metadata":{{"labels":{{"app":"{app}"}}}}}}"#);
        let slice = |service: &str, address: &str| {
            format!(
                r#"{{"metadata":{{"labels":{{"kubernetes.io/service-name":"{service}"}}}},"endpoints":[{{"addresses":["{address}"]}}]}}"#
            )
        };
        let stored = BTreeMap::from([
            ("resources/Pod/shop/echo".to_owned(), labelled("a")),
            ("resources/Pod/shop/real".to_owned(), labelled("b")),
            ("resources/EndpointSlice/shop/x".to_owned(), slice("x", "10.0.0.1")),
            ("resources/EndpointSlice/shop/y".to_owned(), slice("y", "10.0.0.2")),
            ("resources/EndpointSlice/shop/z".to_owned(), slice("z", "198.51.100.10")),
        ]);
        let is_echo = |name: &str, app: Option<&str>| {
            let mut service = Service::default();
            service.spec.selector.extend(app.map(|app| ("app".to_owned(), app.to_owned())));
            only_echo(&service, &stored, &pods, &format!("shop/{name}").parse().unwrap())
        };
        assert!(is_echo("s", Some("a")) && !is_echo("s", Some("b")) && !is_echo("s", Some("c")));
        assert!(is_echo("x", None) && !is_echo("y", None) && is_echo("z", None) && !is_echo("nobody", None));
    }
}
