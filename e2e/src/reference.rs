//! What the documentation of the `networking.k8s.io/v1` NetworkPolicy says, as plainly as it says it.
//!
//! This is the oracle: it shares no code with the policy compiler, the packet path or the simulator,
//! reads the YAML by itself ([`manifest`]), and walks every policy for every question. Where it and
//! the product differ, one of them misreads the API documentation, whose sentences stand beside the
//! lines that follow them.

mod manifest;

pub use manifest::{
    Expression, IpBlock, ManifestError, NamedPort, NetworkPolicy, Node, Operator, Peer, Pod, PolicyPort, PortRef, Rule,
    Selector,
};

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

/// Labels of a pod or a namespace.
pub type Labels = BTreeMap<String, String>;

/// Everything that a NetworkPolicy can speak of. An address that is neither a pod's nor a node's is
/// outside the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct World {
    /// Labels of each namespace, `kubernetes.io/metadata.name` included.
    pub namespaces: BTreeMap<String, Labels>,
    /// All pods; their addresses come from [`World::give_address`].
    pub pods: Vec<Pod>,
    /// All nodes with their addresses.
    pub nodes: Vec<Node>,
    /// All policies.
    pub policies: Vec<NetworkPolicy>,
}

/// Protocol above IP. NetworkPolicy names three; the rest can only be meant by a rule without ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// Any other, by its IANA number; it has no ports.
    Other(u8),
}

/// The first packet of a connection. Replies are not asked about: "reply traffic for those allowed
/// connections will also be implicitly allowed".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// Who opens it.
    pub from: IpAddr,
    /// Who is called, after any translation of a service's address.
    pub to: IpAddr,
    /// Protocol.
    pub protocol: Protocol,
    /// Destination port; 0 for a protocol without ports.
    pub port: u16,
}

/// Which of a policy's two sections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Into the pod.
    Ingress,
    /// Out of the pod.
    Egress,
}

/// What one end of a connection says to it, and why. Policies are given as `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judgement {
    /// This end is no pod: no NetworkPolicy speaks for it.
    NotAPod,
    /// "A Pod cannot block access to itself."
    Itself,
    /// "Traffic to and from the node where a Pod is running is always allowed."
    OwnNode,
    /// No policy selects the pod in this direction.
    NotIsolated,
    /// These policies each have a rule that allows it.
    Allowed(Vec<String>),
    /// These policies isolate the pod in this direction, and none has a rule that allows it.
    Denied(Vec<String>),
}

impl Judgement {
    /// Whether this end lets the connection be.
    pub fn allows(&self) -> bool {
        !matches!(self, Judgement::Denied(_))
    }
}

impl World {
    /// Reads Kubernetes manifests (YAML 1.2, many documents), with the API server's defaulting.
    /// Kinds: Namespace, Pod, Node, NetworkPolicy. Pods have no addresses yet.
    ///
    /// # Errors
    /// What the API server would refuse.
    pub fn read(yaml: &str) -> Result<World, ManifestError> {
        manifest::read(yaml)
    }

    /// Gives an address to a pod (`namespace/name`) or a node (`name`). Unknown names are ignored.
    pub fn give_address(&mut self, name: &str, address: IpAddr) {
        for pod in self.pods.iter_mut().filter(|pod| pod.full_name() == name) {
            pod.addresses.push(address);
        }
        for node in self.nodes.iter_mut().filter(|node| node.name == name) {
            node.addresses.push(address);
        }
    }

    /// "For a connection from a source pod to a destination pod to be allowed, both the egress policy
    /// on the source pod and the ingress policy on the destination pod need to allow the connection.
    /// If either side does not allow the connection, it will not happen."
    pub fn allowed(&self, connection: &Connection) -> bool {
        self.judge(connection, Direction::Egress).allows() && self.judge(connection, Direction::Ingress).allows()
    }

    /// What the source (for egress) or the destination (for ingress) says.
    pub fn judge(&self, connection: &Connection, direction: Direction) -> Judgement {
        let (own, peer) = match direction {
            Direction::Egress => (connection.from, connection.to),
            Direction::Ingress => (connection.to, connection.from),
        };
        let Some(pod) = self.pod_at(own) else { return Judgement::NotAPod };
        if pod.addresses.contains(&peer) {
            return Judgement::Itself;
        }
        if self.nodes.iter().any(|node| node.name == pod.node && node.addresses.contains(&peer)) {
            return Judgement::OwnNode;
        }

        // "By default, a pod is non-isolated for egress; all outbound connections are allowed. A pod
        // is isolated for egress if there is any NetworkPolicy that both selects the pod and has
        // 'Egress' in its policyTypes", and the same for ingress.
        let isolating: Vec<&NetworkPolicy> =
            self.policies.iter().filter(|policy| policy.selects(pod) && policy.types.contains(&direction)).collect();
        if isolating.is_empty() {
            return Judgement::NotIsolated;
        }

        // "Network policies do not conflict; they are additive."
        let allowing: Vec<String> = isolating
            .iter()
            .filter(|policy| policy.rules(direction).iter().any(|rule| self.permits(policy, rule, peer, connection)))
            .map(|policy| policy.full_name())
            .collect();
        if allowing.is_empty() {
            Judgement::Denied(isolating.iter().map(|policy| policy.full_name()).collect())
        } else {
            Judgement::Allowed(allowing)
        }
    }

    /// "Each rule allows traffic which matches both the from/to and ports sections."
    fn permits(&self, policy: &NetworkPolicy, rule: &Rule, peer: IpAddr, connection: &Connection) -> bool {
        // "Items in this list are combined using a logical OR operation. If this field is empty or
        // missing, this rule matches all sources (traffic not restricted by source)."
        let peer_matches = rule.peers.is_empty() || rule.peers.iter().any(|p| self.is_peer(policy, p, peer));
        // "If this field is empty or missing, this rule matches all ports (traffic not restricted by
        // port)."
        let port_matches = rule.ports.is_empty() || rule.ports.iter().any(|p| self.is_port(p, connection));
        peer_matches && port_matches
    }

    fn is_peer(&self, policy: &NetworkPolicy, peer: &Peer, address: IpAddr) -> bool {
        match peer {
            // "except is a slice of CIDRs that should not be included within an ipBlock." The block
            // speaks of addresses, whoever has them: pods, nodes and the outside alike.
            Peer::IpBlock(block) => {
                block.cidr.contains(&address) && !block.except.iter().any(|except| except.contains(&address))
            }
            Peer::Selectors { namespaces, pods } => {
                let Some(pod) = self.pod_at(address) else { return false };
                // "If namespaceSelector is also set, then the NetworkPolicyPeer as a whole selects the
                // pods matching podSelector in the namespaces selected by namespaceSelector. Otherwise
                // it selects the pods matching podSelector in the policy's own namespace."
                let in_namespace = match namespaces {
                    Some(selector) => selector.matches(&self.namespace_labels(&pod.namespace)),
                    None => pod.namespace == policy.namespace,
                };
                // A namespaceSelector alone "selects all pods in the namespaces".
                in_namespace && pods.as_ref().is_none_or(|selector| selector.matches(&pod.labels))
            }
        }
    }

    fn is_port(&self, wanted: &PolicyPort, connection: &Connection) -> bool {
        if wanted.protocol != connection.protocol {
            return false;
        }
        match &wanted.port {
            // "If this field is not provided, this matches all port names and numbers."
            None => true,
            // "endPort indicates that the range of ports from port to endPort if set, inclusive,
            // should be allowed by the policy."
            Some(PortRef::Number(first)) => (*first..=wanted.end_port.unwrap_or(*first)).contains(&connection.port),
            // "a numerical or named port on a pod": on the pod that is called, in either direction.
            Some(PortRef::Name(name)) => self.pod_at(connection.to).is_some_and(|pod| {
                pod.ports.iter().any(|port| {
                    port.name == *name && port.protocol == connection.protocol && port.number == connection.port
                })
            }),
        }
    }

    fn pod_at(&self, address: IpAddr) -> Option<&Pod> {
        self.pods.iter().find(|pod| pod.addresses.contains(&address))
    }

    /// A pod may be known before its namespace is; the API server's own label is certain.
    fn namespace_labels(&self, namespace: &str) -> Labels {
        self.namespaces.get(namespace).cloned().unwrap_or_else(|| manifest::namespace_labels(namespace, Labels::new()))
    }
}

impl Pod {
    /// `namespace/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

impl NetworkPolicy {
    /// `namespace/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// "podSelector selects the pods to which this NetworkPolicy object applies. [...] An empty
    /// selector matches all pods in the policy's namespace."
    fn selects(&self, pod: &Pod) -> bool {
        self.namespace == pod.namespace && self.pods.matches(&pod.labels)
    }

    fn rules(&self, direction: Direction) -> &[Rule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

impl Selector {
    /// "The result of matchLabels and matchExpressions are ANDed. An empty label selector matches all
    /// objects."
    pub fn matches(&self, labels: &Labels) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.expressions.iter().all(|expression| expression.matches(labels))
    }
}

impl Expression {
    fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            // An object without the key matches too.
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Protocol::Tcp => f.write_str("tcp"),
            Protocol::Udp => f.write_str("udp"),
            Protocol::Sctp => f.write_str("sctp"),
            Protocol::Other(number) => write!(f, "proto-{number}"),
        }
    }
}

#[cfg(test)]
mod tests;
