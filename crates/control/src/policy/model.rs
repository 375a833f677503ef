//! Policies as the compiler sees them, whatever kind of resource they come from.

use super::selector::{Scope, Selector};
use crate::labels::{self, IdentityLabels};
use crate::resource::{IpBlock, NetworkPolicy, PolicyPeer, PolicyPort, PolicyType, PortRef, Protocol};
use cirri_abi::{Direction as AbiDirection, PolicyKey, precedence};
use std::fmt;

/// A policy: whom it means, which directions it closes, and its rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its name.
    pub id: PolicyId,
    /// Whom it means.
    pub subject: Selector,
    /// Whether what no rule allows is denied coming in.
    pub isolates_ingress: bool,
    /// Whether what no rule allows is denied going out.
    pub isolates_egress: bool,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// Names a policy. The order of names decides between rules that are equal otherwise.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyId {
    /// Kind of the resource, such as `NetworkPolicy`.
    pub kind: &'static str,
    /// Namespace; empty for kinds that are cluster-wide.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Whether it is no policy of the source, but what stands in for one that is refused.
    pub is_stand_in: bool,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Whether it is about what comes in or what goes out.
    pub direction: Direction,
    /// Its place in the policy's list for that direction, from 0.
    pub index: usize,
    /// Its tier.
    pub tier: Tier,
    /// Its place in the tier; lower is stronger.
    pub order: u16,
    /// What it says.
    pub verdict: RuleVerdict,
    /// About whom; at least one of them.
    pub peers: Vec<Peer>,
    /// Which ports; at least one of them.
    pub ports: Vec<PortMatch>,
}

/// Direction as the subject sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// Into it.
    Ingress,
    /// Out of it.
    Egress,
}

/// Tiers, strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// What the cluster's administrator demands.
    Admin = 0,
    /// What namespaces ask for.
    Normal = 1,
    /// What the administrator gives to those who ask for nothing.
    Baseline = 2,
}

/// What a rule says about what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleVerdict {
    /// It may pass.
    Allow,
    /// It may not.
    Deny,
}

/// Whom a rule is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Anybody.
    Any,
    /// Pods.
    Pods(Selector),
    /// Whoever has these addresses.
    Addresses(IpBlock),
}

/// Which ports of the receiver a rule is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortMatch {
    /// Any protocol and port.
    Any,
    /// Any port of the protocol.
    Protocol(Protocol),
    /// The ports from `first` to `last`.
    Range {
        /// Protocol.
        protocol: Protocol,
        /// First port.
        first: u16,
        /// Last port, at least `first`.
        last: u16,
    },
    /// The port that the receiver gives this name. A receiver that does not is not matched.
    Named {
        /// Protocol.
        protocol: Protocol,
        /// Name.
        name: String,
    },
}

/// What people see of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleInfo {
    /// Its number in rule sets, flows and events.
    pub cookie: u32,
    /// Kind of its policy.
    pub kind: &'static str,
    /// Namespace of its policy; empty if cluster-wide.
    pub namespace: String,
    /// Name of its policy.
    pub policy: String,
    /// Direction.
    pub direction: Direction,
    /// Its place in the policy's list for that direction, from 0.
    pub index: usize,
    /// One line in words.
    pub text: String,
}

/// What a NetworkPolicy means. A section outside `policyTypes` is not enforced.
impl From<&NetworkPolicy> for Policy {
    fn from(policy: &NetworkPolicy) -> Policy {
        let spec = &policy.spec;
        let isolates_ingress = spec.policy_types.contains(&PolicyType::Ingress);
        let isolates_egress = spec.policy_types.contains(&PolicyType::Egress);
        let mut rules = Vec::new();
        let rule = |direction, index, peers, ports| Rule {
            direction,
            index,
            tier: Tier::Normal,
            order: 0,
            verdict: RuleVerdict::Allow,
            peers: peers_of(peers, policy.namespace()),
            ports: ports_of(ports),
        };
        if isolates_ingress {
            let ingress = spec.ingress.iter().enumerate();
            rules.extend(ingress.map(|(i, r)| rule(Direction::Ingress, i, &r.from, &r.ports)));
        }
        if isolates_egress {
            let egress = spec.egress.iter().enumerate();
            rules.extend(egress.map(|(i, r)| rule(Direction::Egress, i, &r.to, &r.ports)));
        }
        Policy {
            id: PolicyId::network_policy(policy.namespace(), &policy.metadata.name),
            subject: Selector::new(Some(&spec.pod_selector), Scope::Named(policy.namespace())),
            isolates_ingress,
            isolates_egress,
            rules,
        }
    }
}

impl Policy {
    pub(super) fn isolates(&self, direction: Direction) -> bool {
        match direction {
            Direction::Ingress => self.isolates_ingress,
            Direction::Egress => self.isolates_egress,
        }
    }

    /// What is in force of it while it is refused: never more open than it is. It selects the same pods, closes the
    /// same directions, and allows nothing; where it has a rule that denies, everything is denied as strongly.
    pub(super) fn stand_in(&self) -> Policy {
        let denial = |direction| {
            let denying = |rule: &&Rule| rule.direction == direction && rule.verdict == RuleVerdict::Deny;
            let strongest = self.rules.iter().filter(denying).max_by_key(|rule| rule.precedence())?;
            Some(Rule { peers: vec![Peer::Any], ports: vec![PortMatch::Any], ..strongest.clone() })
        };
        Policy {
            id: self.id.stand_in(),
            subject: self.subject.without_reserved(),
            isolates_ingress: self.isolates_ingress,
            isolates_egress: self.isolates_egress,
            rules: Direction::BOTH.into_iter().filter_map(denial).collect(),
        }
    }

    /// Every selector in it that stands for peers.
    pub(super) fn peer_selectors(&self) -> Vec<Selector> {
        let mut all = Vec::new();
        for rule in &self.rules {
            for peer in &rule.peers {
                match peer {
                    Peer::Pods(selector) => all.push(selector.clone()),
                    // Anybody who gives a port that name; only pods do.
                    Peer::Any if rule.names_port_of_peer() => all.push(Selector::every_pod()),
                    Peer::Any | Peer::Addresses(_) => {}
                }
            }
        }
        all
    }

    /// Keys of the labels that it selects pods by.
    pub(super) fn pod_keys(&self) -> Vec<String> {
        let selectors = self.peer_selectors();
        selectors.iter().chain([&self.subject]).flat_map(Selector::pod_keys).map(str::to_string).collect()
    }

    /// A label that it selects pods by and that never counts as a pod's own.
    pub(super) fn reserved_key(&self) -> Option<String> {
        self.pod_keys().into_iter().find(|key| labels::is_reserved(key))
    }

    /// Every address block in it.
    pub(super) fn address_blocks(&self) -> impl Iterator<Item = &IpBlock> {
        self.rules.iter().flat_map(|rule| &rule.peers).filter_map(|peer| match peer {
            Peer::Addresses(block) => Some(block),
            Peer::Any | Peer::Pods(_) => None,
        })
    }
}

impl PolicyId {
    /// The name of a NetworkPolicy.
    pub fn network_policy(namespace: &str, name: &str) -> PolicyId {
        PolicyId { kind: "NetworkPolicy", namespace: namespace.into(), name: name.into(), is_stand_in: false }
    }

    /// The name of the policy that it is, or stands in for.
    pub fn of_source(&self) -> PolicyId {
        PolicyId { is_stand_in: false, ..self.clone() }
    }

    /// The name of its stand-in.
    pub fn stand_in(&self) -> PolicyId {
        PolicyId { is_stand_in: true, ..self.clone() }
    }
}

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.is_empty() {
            true => write!(f, "{} {}", self.kind, self.name)?,
            false => write!(f, "{} {}/{}", self.kind, self.namespace, self.name)?,
        }
        f.write_str(if self.is_stand_in { " (refused)" } else { "" })
    }
}

impl Direction {
    /// Both.
    pub const BOTH: [Direction; 2] = [Direction::Ingress, Direction::Egress];

    /// As it stands in tables and events.
    pub const fn number(self) -> u8 {
        match self {
            Direction::Ingress => AbiDirection::INGRESS,
            Direction::Egress => AbiDirection::EGRESS,
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(AbiDirection::name(self.number()))
    }
}

impl Rule {
    /// Its precedence word.
    pub fn precedence(&self) -> u32 {
        let priority = ((self.tier as u32) << 16) | u32::from(self.order);
        match self.verdict {
            RuleVerdict::Allow => precedence(priority, 1),
            RuleVerdict::Deny => precedence(priority, 255),
        }
    }

    pub(super) fn names_port_of_peer(&self) -> bool {
        let named = |port: &PortMatch| matches!(port, PortMatch::Named { .. });
        self.direction == Direction::Egress && self.ports.iter().any(named)
    }
}

/// The rule in words, complete: rules with the same words mean the same.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.verdict {
            RuleVerdict::Allow => "allow",
            RuleVerdict::Deny => "deny",
        })?;
        f.write_str(match self.direction {
            Direction::Ingress => " from ",
            Direction::Egress => " to ",
        })?;
        f.write_str(&list(&self.peers, " or "))?;
        write!(f, " on {}", list(&self.ports, ", "))?;
        if self.tier != Tier::Normal || self.order != 0 {
            write!(f, " ({:?} tier, order {})", self.tier, self.order)?;
        }
        Ok(())
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Any => f.write_str("anywhere"),
            Peer::Pods(selector) => selector.fmt(f),
            Peer::Addresses(block) if block.except.is_empty() => write!(f, "addresses in {}", block.cidr),
            Peer::Addresses(block) => {
                write!(f, "addresses in {} except {}", block.cidr, list(&block.except, ", "))
            }
        }
    }
}

impl Peer {
    /// The selector, if it means pods.
    pub(super) fn selector(&self) -> Option<&Selector> {
        match self {
            Peer::Pods(selector) => Some(selector),
            Peer::Any | Peer::Addresses(_) => None,
        }
    }
}

impl PortMatch {
    /// The name, if it asks for one.
    pub(super) fn name(&self) -> Option<(&str, Protocol)> {
        match self {
            PortMatch::Named { protocol, name } => Some((name, *protocol)),
            _ => None,
        }
    }

    /// The prefixes of ports that it covers, given who receives.
    pub(super) fn prefixes(&self, receiver: &IdentityLabels, mut each: impl FnMut(PortPrefix)) {
        match self {
            PortMatch::Any => each(PortPrefix { bits: PolicyKey::STATIC_BITS, proto: 0, port: 0 }),
            PortMatch::Protocol(p) => each(PortPrefix { bits: PolicyKey::PROTO_BITS, proto: p.number(), port: 0 }),
            PortMatch::Range { protocol, first, last } => cover(protocol.number(), *first, *last, &mut each),
            PortMatch::Named { protocol, name } => {
                if let Some(port) = receiver.named_port(name, *protocol) {
                    each(PortPrefix { bits: PolicyKey::FULL_BITS, proto: protocol.number(), port });
                }
            }
        }
    }

    /// Its protocol, if it asks for one.
    pub(super) fn protocol(&self) -> Option<Protocol> {
        match self {
            PortMatch::Any => None,
            PortMatch::Protocol(protocol) | PortMatch::Range { protocol, .. } | PortMatch::Named { protocol, .. } => {
                Some(*protocol)
            }
        }
    }
}

impl fmt::Display for PortMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortMatch::Any => f.write_str("any port"),
            PortMatch::Protocol(protocol) => write!(f, "any {protocol} port"),
            PortMatch::Range { protocol, first, last } if first == last => write!(f, "{protocol} {first}"),
            PortMatch::Range { protocol, first, last } => write!(f, "{protocol} {first}-{last}"),
            PortMatch::Named { protocol, name } => write!(f, "{protocol} \"{name}\""),
        }
    }
}

/// The part of a [`PolicyKey`] that says protocol and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PortPrefix {
    /// 0 if the prefix leaves it out.
    pub proto: u8,
    /// Host order; bits past the prefix are 0.
    pub port: u16,
    /// `prefix_len` of the key.
    pub bits: u32,
}

impl PortPrefix {
    /// Whether a packet with this protocol and port is inside.
    pub fn contains(&self, proto: u8, port: u16) -> bool {
        let free = PolicyKey::FULL_BITS - self.bits.max(PolicyKey::PROTO_BITS);
        let mask = ((u32::from(u16::MAX) << free) & u32::from(u16::MAX)) as u16;
        self.bits == PolicyKey::STATIC_BITS || (self.proto == proto && self.port == port & mask)
    }
}

/// The fewest prefixes that make up the ports from `first` to `last`.
fn cover(proto: u8, first: u16, last: u16, each: &mut impl FnMut(PortPrefix)) {
    let (mut at, end) = (u32::from(first), u32::from(last) + 1);
    while at < end {
        let aligned = if at == 0 { 16 } else { at.trailing_zeros().min(16) };
        let fits = (end - at).ilog2();
        let free = aligned.min(fits);
        each(PortPrefix { proto, port: at as u16, bits: PolicyKey::FULL_BITS - free });
        at += 1 << free;
    }
}

fn peers_of(peers: &[PolicyPeer], own: &str) -> Vec<Peer> {
    if peers.is_empty() {
        return vec![Peer::Any];
    }
    let one = |peer: &PolicyPeer| match peer {
        PolicyPeer::Addresses { ip_block } => Peer::Addresses(ip_block.clone()),
        PolicyPeer::Pods { pod_selector, namespace_selector } => {
            let scope = namespace_selector.as_ref().map_or(Scope::Named(own), Scope::Labelled);
            Peer::Pods(Selector::new(pod_selector.as_ref(), scope))
        }
    };
    peers.iter().map(one).collect()
}

fn ports_of(ports: &[PolicyPort]) -> Vec<PortMatch> {
    if ports.is_empty() {
        return vec![PortMatch::Any];
    }
    let one = |port: &PolicyPort| match &port.port {
        None => PortMatch::Protocol(port.protocol),
        Some(PortRef::Name(name)) => PortMatch::Named { protocol: port.protocol, name: name.clone() },
        Some(PortRef::Number(first)) => {
            PortMatch::Range { protocol: port.protocol, first: *first, last: port.end_port.unwrap_or(*first) }
        }
    };
    ports.iter().map(one).collect()
}

fn list<T: fmt::Display>(items: &[T], between: &str) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(between)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prefixes(first: u16, last: u16) -> Vec<PortPrefix> {
        let mut all = Vec::new();
        cover(6, first, last, &mut |prefix| all.push(prefix));
        all
    }

    #[test]
    fn a_range_takes_few_prefixes() {
        assert_eq!(prefixes(80, 80).len(), 1);
        assert_eq!(prefixes(0, 65_535), [PortPrefix { proto: 6, port: 0, bits: PolicyKey::PROTO_BITS }]);
        assert_eq!(prefixes(1024, 65_535).len(), 6);
        assert_eq!(prefixes(1, 65_534).len(), 30, "the worst case");
    }

    #[test]
    fn tiers_and_verdicts_stand_in_order() {
        let at = |tier, order, verdict| {
            let direction = Direction::Ingress;
            Rule { direction, index: 0, tier, order, verdict, peers: vec![], ports: vec![] }.precedence()
        };
        let falling = [
            at(Tier::Admin, 0, RuleVerdict::Deny),
            at(Tier::Admin, 0, RuleVerdict::Allow),
            at(Tier::Admin, u16::MAX, RuleVerdict::Deny),
            at(Tier::Normal, 0, RuleVerdict::Deny),
            at(Tier::Normal, 0, RuleVerdict::Allow),
            at(Tier::Baseline, 0, RuleVerdict::Allow),
            0,
        ];
        assert!(falling.windows(2).all(|pair| pair[0] > pair[1]), "{falling:x?}");
    }

    proptest! {
        #[test]
        fn prefixes_cover_exactly_the_range(a in any::<u16>(), b in any::<u16>(), port in any::<u16>()) {
            let (first, last) = (a.min(b), a.max(b));
            let all = prefixes(first, last);
            for port in [port, first, last, first.wrapping_sub(1), last.wrapping_add(1)] {
                let hits = all.iter().filter(|prefix| prefix.contains(6, port)).count();
                prop_assert_eq!(hits, usize::from((first..=last).contains(&port)));
            }
            prop_assert!(all.iter().all(|prefix| !prefix.contains(17, first)));
        }
    }
}
