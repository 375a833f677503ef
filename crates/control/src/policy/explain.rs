//! Why something is allowed or not, from the rules themselves.

use super::{Cluster, Direction, Peer, PolicyId, PortMatch, Rule, RuleInfo, RuleVerdict};
use crate::labels::IdentityLabels;
use cirri_abi::{Cookie, Identity, PolicyKey};
use ipnet::IpNet;
use std::fmt;
use std::net::IpAddr;

/// One side of a connection.
#[derive(Clone, Debug)]
pub struct Party {
    /// Its identity; only [`Identity::HOST`] (its own node) matters by itself, the others count by
    /// their labels.
    pub identity: Identity,
    /// Its labels, also ones that nobody has yet.
    pub labels: IdentityLabels,
    /// Its address, if it is to be matched with `ipBlock`.
    pub address: Option<IpAddr>,
}

/// May `from` reach `to`, as the rules of one of them see it?
#[derive(Clone, Debug)]
pub struct Question {
    /// Egress asks the rules of `from`, ingress those of `to`.
    pub direction: Direction,
    /// Who opens the connection.
    pub from: Party,
    /// Who receives it.
    pub to: Party,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port; for ICMP the type.
    pub port: u16,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Allowed or denied.
    pub verdict: RuleVerdict,
    /// Cookie of the entry that decides.
    pub cookie: u32,
    /// The rule that decides; `None` for a built-in entry.
    pub rule: Option<RuleInfo>,
    /// The policies that close this direction.
    pub isolated_by: Vec<PolicyId>,
    /// If denied: the rules that came nearest to allowing it, and what would have had to differ.
    pub nearest: Vec<NearMiss>,
}

/// A rule that would have allowed it, but for something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NearMiss {
    /// The rule.
    pub rule: RuleInfo,
    /// What would have had to differ.
    pub differs: Vec<Difference>,
}

/// Something that would have had to differ. Each holds what the rule asks for, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The other side.
    Peer(String),
    /// The protocol.
    Protocol(String),
    /// The port.
    Port(String),
    /// Everything matches, but this stronger rule denies it.
    Overruled(String),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::Peer(wanted) => write!(f, "peer would have to be {wanted}"),
            Difference::Protocol(wanted) => write!(f, "protocol would have to be {wanted}"),
            Difference::Port(wanted) => write!(f, "port would have to be {wanted}"),
            Difference::Overruled(by) => write!(f, "overruled: {by}"),
        }
    }
}

impl Cluster {
    /// Answers the question and says why. The verdict is that of the compiled tables, provided
    /// that the parties are who they say.
    pub fn explain(&self, question: &Question) -> Explanation {
        let (subject, peer) = match question.direction {
            Direction::Ingress => (&question.to, &question.from),
            Direction::Egress => (&question.from, &question.to),
        };
        let selected: Vec<_> =
            self.policies.values().filter(|installed| installed.policy.subject.matches(&subject.labels)).collect();
        let closing = selected.iter().filter(|installed| installed.policy.isolates(question.direction));
        let isolated_by: Vec<PolicyId> = closing.map(|installed| installed.policy.id.clone()).collect();
        let isolated = !isolated_by.is_empty();

        if peer.identity == Identity::HOST {
            // The packet path does not even ask the tables.
            let (verdict, cookie) = (RuleVerdict::Allow, Cookie::OWN_NODE);
            return Explanation { verdict, cookie, rule: None, isolated_by, nearest: Vec::new() };
        }
        let mut winner = Hit::built_in(isolated);
        let mut misses = Vec::new();
        for installed in selected {
            let rules = installed.rules().filter(|(rule, _)| rule.direction == question.direction);
            for (rule, cookie) in rules.filter(|(rule, _)| rule.applies(isolated)) {
                match rule.hit(question, peer) {
                    Ok((bits, kind)) => {
                        let hit = Hit { rank: (rule.precedence(), bits, kind), verdict: rule.verdict, cookie };
                        // Of equals the first stays, as in the tables.
                        if hit.rank > winner.rank {
                            winner = hit;
                        }
                        misses.push((rule, cookie, Vec::new()));
                    }
                    Err(differs) => misses.push((rule, cookie, differs)),
                }
            }
        }

        let nearest =
            if winner.verdict == RuleVerdict::Deny { self.nearest(misses, winner.cookie) } else { Vec::new() };
        Explanation {
            verdict: winner.verdict,
            cookie: winner.cookie,
            rule: self.rule(winner.cookie).cloned(),
            isolated_by,
            nearest,
        }
    }

    /// Of the rules that allow, those with the fewest differences, in order of policies.
    fn nearest(&self, misses: Vec<(&Rule, u32, Vec<Difference>)>, denied_by: u32) -> Vec<NearMiss> {
        let overruled = || match self.rule(denied_by) {
            Some(rule) => vec![Difference::Overruled(rule.text.clone())],
            None => Vec::new(),
        };
        let allowing: Vec<NearMiss> = misses
            .into_iter()
            .filter(|(rule, _, _)| rule.verdict == RuleVerdict::Allow)
            .filter_map(|(_, cookie, differs)| {
                let differs = if differs.is_empty() { overruled() } else { differs };
                Some(NearMiss { rule: self.rule(cookie)?.clone(), differs })
            })
            .collect();
        let least = allowing.iter().map(|miss| miss.differs.len()).min().unwrap_or(0);
        allowing.into_iter().filter(|miss| miss.differs.len() == least).take(MOST_NEAREST).collect()
    }
}

/// What matched, and how strongly: precedence, prefix length, kind of peer.
struct Hit {
    rank: (u32, u32, u8),
    verdict: RuleVerdict,
    cookie: u32,
}

impl Hit {
    fn built_in(isolated: bool) -> Hit {
        let (verdict, cookie) = match isolated {
            true => (RuleVerdict::Deny, Cookie::DEFAULT_DENY),
            false => (RuleVerdict::Allow, Cookie::DEFAULT_ALLOW),
        };
        Hit { rank: (0, PolicyKey::STATIC_BITS, BY_NOTHING), verdict, cookie }
    }
}

impl Rule {
    /// The longest matching prefix and the kind of peer that matched, or what differs.
    fn hit(&self, question: &Question, peer: &Party) -> Result<(u32, u8), Vec<Difference>> {
        let meant = self.peers.iter().filter_map(|one| Some((one, one.matches(peer)?)));
        let pairs = meant.flat_map(|(one, kind)| self.ports.iter().map(move |port| (one, kind, port)));
        let best = pairs.filter_map(|(one, kind, port)| {
            let bits = port.covers(question)?;
            match (port, self.direction, one) {
                // A port has a name only where its pod is known by labels, not by address.
                (PortMatch::Named { .. }, Direction::Egress, Peer::Addresses(_)) => None,
                // The table holds the number under whoever gives a port that name.
                (PortMatch::Named { .. }, Direction::Egress, Peer::Any) => Some((bits, BY_IDENTITY)),
                _ => Some((bits, kind)),
            }
        });
        if let Some(best) = best.max() {
            return Ok(best);
        }
        let mut differs = Vec::new();
        if !self.peers.iter().any(|one| one.matches(peer).is_some()) {
            differs.push(Difference::Peer(words(&self.peers)));
        }
        let same_protocol =
            |port: &&PortMatch| port.protocol().is_none_or(|protocol| protocol.number() == question.protocol);
        if !self.ports.iter().any(|port| same_protocol(&port)) {
            differs.push(Difference::Protocol(words(&self.ports)));
        } else if !self.ports.iter().any(|port| port.covers(question).is_some()) || differs.is_empty() {
            let wanted: Vec<_> = self.ports.iter().filter(same_protocol).cloned().collect();
            differs.push(Difference::Port(words(&wanted)));
        }
        Err(differs)
    }
}

impl Peer {
    /// In which way the party is meant, if it is.
    fn matches(&self, party: &Party) -> Option<u8> {
        match self {
            Peer::Any => Some(BY_NOTHING),
            Peer::Pods(selector) => selector.matches(&party.labels).then_some(BY_IDENTITY),
            Peer::Addresses(block) => {
                let address = IpNet::from(party.address?);
                let meant = block.cidr.contains(&address) && !block.except.iter().any(|e| e.contains(&address));
                meant.then_some(BY_BLOCK)
            }
        }
    }
}

impl PortMatch {
    /// The longest prefix of it that holds the question's port.
    fn covers(&self, question: &Question) -> Option<u32> {
        let mut longest = None;
        self.prefixes(&question.to.labels, |prefix| {
            if prefix.contains(question.protocol, question.port) {
                longest = longest.max(Some(prefix.bits));
            }
        });
        longest
    }
}

fn words<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(" or ")
}

/// Ways to match a peer, weakest first: the order in which tables break ties.
const BY_NOTHING: u8 = 0;
const BY_BLOCK: u8 = 1;
const BY_IDENTITY: u8 = 2;

/// More than a few near misses are noise.
const MOST_NEAREST: usize = 5;
