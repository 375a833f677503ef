//! Random small worlds: pods, policies and packets for the test that holds the reference evaluator,
//! the simulator and the kernel against each other.
//!
//! A world is small on purpose: few labels, few ports, addresses close together, so that selectors,
//! ranges and nested blocks overlap all the time and a wrong precedence shows. The same seed always
//! makes the same scenario.
//!
//! One thing is left out, because the API documentation does not say what it means: a named port in
//! an egress rule that has an ipBlock among its peers.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fastrand::Rng;
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::reference::{Connection, Direction, Judgement, Protocol, World};

/// The node whose hooks the packets meet; half of the pods live here.
pub const THIS_NODE: &str = "n1";
/// The other node.
pub const OTHER_NODE: &str = "n2";

const NAMESPACES: [&str; 3] = ["red", "green", "blue"];
const PORT_NAMES: [&str; 3] = ["http", "dns", "sync"];
/// Ports close to each other and at the edges of powers of two, where ranges are cut into prefixes.
const PORTS: [u16; 10] = [1, 53, 79, 80, 81, 82, 127, 128, 8080, 19_999];
/// Source ports start here, above every port of a policy, and are never used twice: no packet is the
/// reply to another.
const FIRST_SOURCE_PORT: u16 = 20_000;

/// A world with what happens in it.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// What it was made from.
    pub seed: u64,
    /// Namespaces, pods (with `spec.nodeName`) and policies: YAML documents in JSON's form.
    pub manifests: String,
    /// The same for the reference evaluator, with everybody's addresses.
    pub world: World,
    /// First packets of connections, each with another source port.
    pub packets: Vec<Packet>,
}

/// The first packet of a connection, at the hook where the node meets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// Protocol; ICMP and ICMPv6 mean an echo request.
    pub protocol: Protocol,
    /// Source port; the identifier of an echo request.
    pub sport: u16,
    /// Destination port; 0 for an echo request.
    pub dport: u16,
    /// Where it comes by.
    pub hook: Hook,
}

/// Hooks of [`THIS_NODE`], named as the programs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// A pod of this node sends. Its egress is decided here, and the receiver's ingress too if that
    /// is a pod of this node.
    FromWorkload,
    /// This node itself sends to one of its pods.
    ToWorkload,
    /// A pod of the other node, or that node itself, sends to a pod of this node.
    FromOverlay,
    /// The outside sends to a pod of this node.
    FromNetwork,
}

/// The pod networks of a node: `10.0.N.0/24` and `fd00:0:0:N::/64`.
pub fn pod_networks(node: &str) -> [IpNet; 2] {
    let number = node_number(node);
    [
        IpNet::new_assert(Ipv4Addr::new(10, 0, number, 0).into(), 24),
        IpNet::new_assert(Ipv6Addr::new(0xfd00, 0, 0, number.into(), 0, 0, 0, 0).into(), 64),
    ]
}

impl Scenario {
    /// Makes a scenario with that many packets (at most 40,000).
    ///
    /// # Panics
    /// If the generator writes a manifest that the API server would refuse: a defect of the generator.
    pub fn generate(seed: u64, packets: u16) -> Scenario {
        let mut maker = Maker { rng: Rng::with_seed(seed), parties: Vec::new() };
        let documents = maker.documents();
        let manifests = documents.iter().map(|document| format!("---\n{document}\n")).collect::<String>();
        let mut world = World::read(&manifests).unwrap_or_else(|error| panic!("seed {seed}: {error}\n{manifests}"));
        for party in &maker.parties {
            for address in party.addresses {
                world.give_address(&party.name, address);
            }
        }
        let packets = (0..packets).map(|index| maker.packet(index)).collect();
        Scenario { seed, manifests, world, packets }
    }

    /// Whether the packet passes the hook that it meets: whether each end that is decided there lets it.
    pub fn expected(&self, packet: &Packet) -> bool {
        self.judgements(packet).iter().all(|(_, judgement)| judgement.allows())
    }

    /// What each end that is decided at the packet's hook says.
    pub fn judgements(&self, packet: &Packet) -> Vec<(Direction, Judgement)> {
        let connection = Connection { from: packet.src, to: packet.dst, protocol: packet.protocol, port: packet.dport };
        let directions: &[Direction] = match packet.hook {
            Hook::FromWorkload if self.is_local(packet.dst) => &[Direction::Egress, Direction::Ingress],
            Hook::FromWorkload => &[Direction::Egress],
            Hook::ToWorkload | Hook::FromOverlay | Hook::FromNetwork => &[Direction::Ingress],
        };
        directions.iter().map(|direction| (*direction, self.world.judge(&connection, *direction))).collect()
    }

    /// Everything that someone needs who looks into a packet that went wrong.
    pub fn describe(&self, packet: &Packet) -> String {
        let who = |address: IpAddr| {
            let pod = self.world.pods.iter().find(|pod| pod.addresses.contains(&address));
            let node = self.world.nodes.iter().find(|node| node.addresses.contains(&address));
            pod.map(|pod| format!("{} {:?} on {}", pod.full_name(), pod.labels, pod.node))
                .or(node.map(|node| node.name.clone()))
                .unwrap_or_else(|| "outside".to_string())
        };
        let (src, dst, judgements) = (who(packet.src), who(packet.dst), self.judgements(packet));
        format!("seed {}: {packet}\nfrom {src}\nto {dst}\nreference: {judgements:?}\n{}", self.seed, self.manifests)
    }

    fn is_local(&self, address: IpAddr) -> bool {
        self.world.pods.iter().any(|pod| pod.node == THIS_NODE && pod.addresses.contains(&address))
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Packet { src, dst, protocol, sport, dport, hook } = self;
        write!(f, "{hook:?}: {protocol} {src} port {sport} -> {dst} port {dport}")
    }
}

/// Somebody with addresses: IPv4 first.
struct Party {
    name: String,
    place: Place,
    addresses: [IpAddr; 2],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    ThisPod,
    OtherPod,
    ThisNode,
    OtherNode,
    Outside,
}

struct Maker {
    rng: Rng,
    parties: Vec<Party>,
}

impl Maker {
    fn documents(&mut self) -> Vec<Value> {
        let mut documents = Vec::new();
        for (node, place) in [(THIS_NODE, Place::ThisNode), (OTHER_NODE, Place::OtherNode)] {
            // Beside the pods' networks and inside the same /16, so that wide blocks hold both.
            let number = node_number(node);
            documents.push(json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": node}}));
            self.party(node, place, [10, 0, 0, number], Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, number.into()));
        }
        // Outside, and yet in the /16 of the cluster; then two neighbours far away.
        self.party("outside-near", Place::Outside, [10, 0, 3, 5], Ipv6Addr::new(0xfd00, 0, 0, 3, 0, 0, 0, 5));
        self.party("outside-far", Place::Outside, [198, 51, 100, 7], Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7));
        self.party(
            "outside-far-too",
            Place::Outside,
            [198, 51, 100, 6],
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 6),
        );

        for namespace in NAMESPACES {
            documents.push(json!({
                "kind": "Namespace", "apiVersion": "v1",
                "metadata": {"name": namespace, "labels": self.labels("team")},
            }));
        }
        for index in 0..self.rng.u8(5..=9) {
            let node = if index % 2 == 0 { THIS_NODE } else { OTHER_NODE };
            documents.push(self.pod(index, node));
        }
        for index in 0..self.rng.u8(2..=8) {
            documents.push(self.policy(index));
        }
        documents
    }

    fn party(&mut self, name: &str, place: Place, v4: [u8; 4], v6: Ipv6Addr) {
        self.parties.push(Party { name: name.to_string(), place, addresses: [v4.into(), v6.into()] });
    }

    fn pod(&mut self, index: u8, node: &str) -> Value {
        let namespace = self.pick(&NAMESPACES);
        let name = format!("p{index}");
        let place = if node == THIS_NODE { Place::ThisPod } else { Place::OtherPod };
        // Hosts 4.. next to each other: blocks of /29 to /31 hold some of them.
        let (number, host) = (node_number(node), 4 + index / 2);
        let v6 = Ipv6Addr::new(0xfd00, 0, 0, number.into(), 0, 0, 0, host.into());
        self.party(&format!("{namespace}/{name}"), place, [10, 0, number, host], v6);
        let mut ports: Vec<Value> = Vec::new();
        for port_name in PORT_NAMES {
            if self.rng.bool() {
                let (number, protocol) = (self.pick(&PORTS), self.pick(&["TCP", "UDP", "SCTP", "TCP"]));
                ports.push(json!({"name": port_name, "containerPort": number, "protocol": protocol}));
            }
        }
        json!({
            "kind": "Pod", "apiVersion": "v1",
            "metadata": {"namespace": namespace, "name": name, "labels": self.labels("app")},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "none", "ports": ports}]},
        })
    }

    /// One of two values for `key`, or no such label; sometimes a tier.
    fn labels(&mut self, key: &str) -> Value {
        let mut labels = serde_json::Map::new();
        if self.chance(85) {
            labels.insert(key.to_string(), self.value().into());
        }
        if self.chance(40) {
            labels.insert("tier".to_string(), self.value().into());
        }
        Value::Object(labels)
    }

    fn value(&mut self) -> &'static str {
        self.pick(&["one", "two"])
    }

    fn policy(&mut self, index: u8) -> Value {
        let mut spec = serde_json::Map::new();
        spec.insert("podSelector".to_string(), self.selector("app"));
        let types = [json!(["Ingress"]), json!(["Egress"]), json!(["Ingress", "Egress"]), json!([])];
        if self.chance(70) {
            spec.insert("policyTypes".to_string(), self.pick(&types));
        }
        for (section, peers) in [("ingress", "from"), ("egress", "to")] {
            if self.chance(75) {
                let rules: Vec<Value> = (0..self.rng.u8(0..=3)).map(|_| self.rule(peers)).collect();
                spec.insert(section.to_string(), rules.into());
            }
        }
        json!({
            "kind": "NetworkPolicy", "apiVersion": "networking.k8s.io/v1",
            "metadata": {"namespace": self.pick(&NAMESPACES), "name": format!("np{index}")},
            "spec": spec,
        })
    }

    fn rule(&mut self, section: &str) -> Value {
        let mut rule = serde_json::Map::new();
        let mut has_block = false;
        if self.chance(80) {
            let peers: Vec<Value> = (0..self.rng.u8(0..=3)).map(|_| self.peer()).collect();
            has_block = peers.iter().any(|peer| peer.get("ipBlock").is_some());
            rule.insert(section.to_string(), peers.into());
        }
        if self.chance(60) {
            let named = section == "from" || !has_block;
            let ports: Vec<Value> = (0..self.rng.u8(0..=3)).map(|_| self.policy_port(named)).collect();
            rule.insert("ports".to_string(), ports.into());
        }
        Value::Object(rule)
    }

    fn peer(&mut self) -> Value {
        match self.rng.u8(0..10) {
            0..3 => json!({"podSelector": self.selector("app")}),
            3..5 => json!({"namespaceSelector": self.selector("team")}),
            5..6 => json!({"namespaceSelector": self.selector("team"), "podSelector": self.selector("app")}),
            _ => json!({"ipBlock": self.block()}),
        }
    }

    fn selector(&mut self, key: &str) -> Value {
        let key = if self.chance(25) { "tier" } else { key };
        match self.rng.u8(0..10) {
            0..3 => json!({}),
            3..6 => json!({"matchLabels": {key: self.value()}}),
            6 => json!({"matchExpressions": [{"key": key, "operator": "In", "values": ["one", "two"]}]}),
            7 => json!({"matchExpressions": [{"key": key, "operator": "NotIn", "values": [self.value()]}]}),
            8 => json!({"matchExpressions": [{"key": key, "operator": "Exists"}]}),
            _ => json!({"matchExpressions": [{"key": key, "operator": "DoesNotExist"}]}),
        }
    }

    /// A block around somebody, with exceptions around others in it or next to them.
    fn block(&mut self) -> Value {
        let family = self.rng.usize(0..2);
        let lengths: &[u8] = if family == 0 {
            &[0, 8, 16, 22, 24, 29, 30, 31, 32]
        } else {
            &[0, 8, 32, 62, 64, 112, 125, 126, 127, 128]
        };
        let cidr = self.block_around_somebody(family, lengths);
        // The API server takes an address with its host bits for the network that holds it.
        let cidr = if self.chance(80) { cidr.trunc() } else { cidr };
        let mut except = Vec::new();
        for _ in 0..self.pick(&[0, 0, 1, 2, 3]) {
            let inner = self.block_around_somebody(family, lengths);
            if cidr.contains(&inner) && inner.prefix_len() > cidr.prefix_len() {
                except.push(inner.to_string());
            }
        }
        json!({"cidr": cidr.to_string(), "except": except})
    }

    fn block_around_somebody(&mut self, family: usize, lengths: &[u8]) -> IpNet {
        let anchor = self.rng.usize(0..self.parties.len());
        let length = self.pick(lengths);
        IpNet::new_assert(self.parties[anchor].addresses[family], length)
    }

    fn policy_port(&mut self, named: bool) -> Value {
        let mut port = serde_json::Map::new();
        if self.chance(75) {
            port.insert("protocol".to_string(), self.pick(&["TCP", "TCP", "UDP", "SCTP"]).into());
        }
        match self.rng.u8(0..10) {
            0 => {}
            1..4 if named => {
                port.insert("port".to_string(), self.pick(&PORT_NAMES).into());
            }
            4..7 => {
                let (one, other) = (self.near_port(), self.near_port());
                port.insert("port".to_string(), one.min(other).into());
                port.insert("endPort".to_string(), one.max(other).into());
            }
            _ => {
                port.insert("port".to_string(), self.pick(&PORTS).into());
            }
        }
        Value::Object(port)
    }

    /// One of [`PORTS`] or the next one below or above, and now and then the ends of all ports.
    fn near_port(&mut self) -> u16 {
        match self.rng.u8(0..10) {
            0 => 65_535,
            1 => 1,
            2..6 => self.pick(&PORTS),
            6..8 => self.pick(&PORTS).saturating_sub(1).max(1),
            _ => self.pick(&PORTS) + 1,
        }
    }

    fn packet(&mut self, index: u16) -> Packet {
        let pods = |parties: &[Party]| -> Vec<usize> {
            (0..parties.len()).filter(|index| parties[*index].place == Place::ThisPod).collect()
        };
        let own = self.pick(&pods(&self.parties));
        let peer = loop {
            let peer = self.rng.usize(0..self.parties.len());
            if peer != own {
                break peer;
            }
        };
        let place = self.parties[peer].place;
        let (from, to, hook) = match place {
            Place::ThisPod => (peer, own, Hook::FromWorkload),
            _ if self.rng.bool() => (own, peer, Hook::FromWorkload),
            Place::ThisNode => (peer, own, Hook::ToWorkload),
            Place::OtherPod | Place::OtherNode => (peer, own, Hook::FromOverlay),
            Place::Outside => (peer, own, Hook::FromNetwork),
        };
        let family = self.rng.usize(0..2);
        let echo = if family == 0 { 1 } else { 58 };
        let protocol = match self.rng.u8(0..20) {
            0..10 => Protocol::Tcp,
            10..16 => Protocol::Udp,
            16..19 => Protocol::Sctp,
            _ => Protocol::Other(echo),
        };
        let dport = if matches!(protocol, Protocol::Other(_)) { 0 } else { self.port_of_packet() };
        let [src, dst] = [from, to].map(|party| self.parties[party].addresses[family]);
        Packet { src, dst, protocol, sport: FIRST_SOURCE_PORT + index, dport, hook }
    }

    /// Below [`FIRST_SOURCE_PORT`].
    fn port_of_packet(&mut self) -> u16 {
        if self.chance(70) { self.pick(&PORTS) } else { self.near_port().min(FIRST_SOURCE_PORT - 1) }
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.rng.usize(0..from.len())].clone()
    }

    fn chance(&mut self, percent: u8) -> bool {
        self.rng.u8(0..100) < percent
    }
}

fn node_number(node: &str) -> u8 {
    if node == THIS_NODE { 1 } else { 2 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Hook, Packet, Scenario, THIS_NODE, pod_networks};
    use crate::reference::{Judgement, Protocol};

    fn scenarios() -> impl Iterator<Item = Scenario> {
        (0..300).map(|seed| Scenario::generate(seed, 40))
    }

    #[test]
    fn a_seed_always_makes_the_same_scenario() {
        for seed in 0..20 {
            let (one, other) = (Scenario::generate(seed, 30), Scenario::generate(seed, 30));
            assert_eq!((one.manifests, one.packets), (other.manifests, other.packets), "seed {seed}");
        }
        assert_ne!(Scenario::generate(1, 1).manifests, Scenario::generate(2, 1).manifests);
    }

    #[test]
    fn every_kind_of_verdict_is_common() {
        let (mut total, mut allowed, mut by_rule, mut denied, mut free, mut own_node) = (0, 0, 0, 0, 0, 0);
        for scenario in scenarios() {
            for packet in &scenario.packets {
                total += 1;
                allowed += usize::from(scenario.expected(packet));
                for (_, judgement) in scenario.judgements(packet) {
                    match judgement {
                        Judgement::Allowed(_) => by_rule += 1,
                        Judgement::Denied(_) => denied += 1,
                        Judgement::NotIsolated => free += 1,
                        Judgement::OwnNode => own_node += 1,
                        Judgement::Itself | Judgement::NotAPod => panic!("{}", scenario.describe(packet)),
                    }
                }
            }
        }
        assert!(allowed * 4 > total && allowed * 4 < total * 3, "{allowed} of {total} allowed");
        for (what, count) in [("by rule", by_rule), ("denied", denied), ("free", free)] {
            assert!(count * 10 > total, "{what}: {count} of {total}");
        }
        assert!(own_node * 50 > total, "own node: {own_node} of {total}");
    }

    #[test]
    fn every_hook_protocol_and_feature_appears() {
        let packets: Vec<Packet> = scenarios().flat_map(|scenario| scenario.packets).collect();
        let hooks: BTreeSet<Hook> = packets.iter().map(|packet| packet.hook).collect();
        assert_eq!(hooks.len(), 4);
        let protocols: BTreeSet<Protocol> = packets.iter().map(|packet| packet.protocol).collect();
        assert_eq!(protocols.len(), 5);
        let manifests: String = scenarios().map(|scenario| scenario.manifests).collect();
        for feature in ["endPort", "\"except\":[\"", "\"port\":\"", "NotIn", "DoesNotExist", "/128\"", "/0\""] {
            assert!(manifests.matches(feature).count() > 30, "{feature}");
        }
    }

    #[test]
    fn packets_fit_their_hook_and_are_no_replies_to_each_other() {
        for scenario in scenarios() {
            let local = |address| pod_networks(THIS_NODE).iter().any(|network| network.contains(&address));
            let mut source_ports = BTreeSet::new();
            for packet in &scenario.packets {
                assert_eq!(packet.hook == Hook::FromWorkload, local(packet.src), "{packet}");
                assert!(packet.hook == Hook::FromWorkload || local(packet.dst), "{packet}");
                assert_ne!(packet.src, packet.dst);
                assert!(source_ports.insert(packet.sport) && packet.dport < packet.sport, "{packet}");
            }
        }
    }
}
