//! From the rules that select an identity to the entries of its table.

use super::model::PortPrefix;
use super::{
    Change, Cluster, Direction, Installed, Peer, Policy, PolicyId, PortMatch, Rule, RuleVerdict, Selector, Tier,
};
use crate::labels::IdentityLabels;
use crate::resource::IpBlock;
use cirri_abi::{Cookie, Identity, PolicyEntry, PolicyKey, policy_flag};
use std::collections::{BTreeMap, BTreeSet};

/// The complete table of one identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// Whose.
    pub identity: Identity,
    /// Whether policies close the way in.
    pub isolates_ingress: bool,
    /// Whether policies close the way out.
    pub isolates_egress: bool,
    /// The entries, each key once, in a fixed order.
    pub entries: Vec<(PolicyKey, PolicyEntry)>,
}

/// Why there is no rule set. The one that was in force stays in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// The labels of the identity are not known (yet).
    #[error("identity {identity} is not known here; wait until the store has told its labels")]
    UnknownIdentity {
        /// The identity.
        identity: Identity,
    },
    /// It would not fit its table.
    #[error(
        "the rules of identity {identity} take {entries} table entries, {limit} fit; {direction} rule {rule} of {policy} takes {rule_entries} of them: narrow its peers or its ports, or split the workloads that it selects"
    )]
    TooLarge {
        /// The identity.
        identity: Identity,
        /// How many entries it would take.
        entries: usize,
        /// How many fit.
        limit: usize,
        /// Policy of the costliest rule.
        policy: PolicyId,
        /// Direction of the costliest rule.
        direction: Direction,
        /// Place of the costliest rule in its list, from 0.
        rule: usize,
        /// How many entries the costliest rule takes.
        rule_entries: usize,
    },
}

impl CompileError {
    /// Whose rule set it is about.
    pub fn identity(&self) -> Identity {
        match self {
            CompileError::UnknownIdentity { identity } | CompileError::TooLarge { identity, .. } => *identity,
        }
    }

    pub(super) fn entries(&self) -> usize {
        match self {
            CompileError::UnknownIdentity { .. } => 0,
            CompileError::TooLarge { entries, .. } => *entries,
        }
    }
}

impl Cluster {
    /// The rule set of an identity.
    pub fn compile(&self, identity: Identity) -> Result<Ruleset, CompileError> {
        let table = self.table(identity)?;
        self.check_size(identity, table.len())?;
        Ok(Ruleset {
            identity,
            isolates_ingress: self.isolated(identity.id, Direction::Ingress),
            isolates_egress: self.isolated(identity.id, Direction::Egress),
            entries: table.into_iter().map(|(place, cell)| (place.key(), cell.entry(place))).collect(),
        })
    }

    /// How many entries the rule set of an identity takes, whether they fit or not.
    pub fn entries_of(&self, identity: Identity) -> usize {
        self.table(identity).map_or(0, |table| table.len())
    }

    /// Those of a change's identities whose rule set does not fit now that the policy is in.
    pub(super) fn oversized(&mut self, change: &Change, policy: &Policy) -> Vec<CompileError> {
        let cost = policy.rules.iter().map(|rule| self.most_entries(rule)).sum::<usize>();
        let mut refused = Vec::new();
        for identity in change.identities() {
            // Adding up is quick and never too little. Only who might not fit is counted exactly.
            let mut bound = self.bounds.get(&identity.id).map_or(usize::MAX, |known| known + cost);
            if bound > self.limit {
                bound = self.bound(identity);
            }
            if bound > self.limit {
                bound = self.entries_of(identity);
            }
            match self.check_size(identity, bound) {
                Ok(()) => {
                    self.bounds.insert(identity.id, bound);
                }
                Err(error) => refused.push(error),
            }
        }
        refused
    }

    fn check_size(&self, identity: Identity, entries: usize) -> Result<(), CompileError> {
        if entries <= self.limit {
            return Ok(());
        }
        let mut costliest: Option<(usize, &Installed, &Rule)> = None;
        for installed in self.installed_for(identity.id) {
            for (rule, _) in installed.rules() {
                let mut places = BTreeSet::new();
                self.places(rule, self.known(identity)?, |place| {
                    places.insert(place);
                });
                // The first of equals stays, so that the answer is always the same.
                if costliest.is_none_or(|(most, _, _)| places.len() > most) {
                    costliest = Some((places.len(), installed, rule));
                }
            }
        }
        match costliest {
            Some((rule_entries, installed, rule)) => Err(CompileError::TooLarge {
                identity,
                entries,
                limit: self.limit,
                policy: installed.policy.id.clone(),
                direction: rule.direction,
                rule: rule.index,
                rule_entries,
            }),
            // Without a rule there are but the built-in entries, and they fit every table.
            None => Ok(()),
        }
    }

    /// No less than the entries of the identity's rule set.
    fn bound(&self, identity: Identity) -> usize {
        let rules = self.installed_for(identity.id).flat_map(|installed| &installed.policy.rules);
        BUILT_IN + rules.map(|rule| self.most_entries(rule)).sum::<usize>()
    }

    /// No less than the entries that the rule takes, whomever it is for.
    fn most_entries(&self, rule: &Rule) -> usize {
        let peers = rule.peers.iter().map(|peer| match peer {
            Peer::Any if rule.names_port_of_peer() => 1 + self.index.matched(&Selector::every_pod()).len(),
            Peer::Any => 1,
            Peer::Pods(selector) => self.index.matched(selector).len(),
            Peer::Addresses(_) => 0,
        });
        (peers.sum::<usize>() + self.blocks.meant_by(&rule.address_blocks()).len()) * rule.most_ports()
    }

    fn known(&self, identity: Identity) -> Result<&IdentityLabels, CompileError> {
        self.labels(identity).ok_or(CompileError::UnknownIdentity { identity })
    }

    pub(super) fn isolated(&self, identity: u32, direction: Direction) -> bool {
        self.installed_for(identity).any(|installed| installed.policy.isolates(direction))
    }

    fn table(&self, identity: Identity) -> Result<BTreeMap<Place, Cell>, CompileError> {
        let labels = self.known(identity)?;
        let mut table = BTreeMap::new();
        for direction in Direction::BOTH {
            let isolated = self.isolated(identity.id, direction);
            let any = PortPrefix { proto: 0, port: 0, bits: PolicyKey::STATIC_BITS };
            let default = match isolated {
                true => Cell { precedence: 0, cookie: Cookie::DEFAULT_DENY, allow: false },
                false => Cell { precedence: 0, cookie: Cookie::DEFAULT_ALLOW, allow: true },
            };
            table.insert(Place { direction, peer: ANYBODY, ports: any }, default);
            for installed in self.installed_for(identity.id) {
                for (rule, cookie) in installed.rules() {
                    if rule.direction != direction || !rule.applies(isolated) {
                        continue;
                    }
                    let allow = rule.verdict == RuleVerdict::Allow;
                    let cell = Cell { precedence: rule.precedence(), cookie, allow };
                    self.places(rule, labels, |place| {
                        // Of equals the first stays: policies come in the order of their names.
                        let held = table.entry(place).or_insert(cell);
                        if held.precedence < cell.precedence {
                            *held = cell;
                        }
                    });
                }
            }
        }
        remove_shadowed(&mut table);
        Ok(table)
    }

    /// Every place of the table of a workload with `subject` labels that the rule means.
    fn places(&self, rule: &Rule, subject: &IdentityLabels, mut each: impl FnMut(Place)) {
        let direction = rule.direction;
        // What names no port of the peer is the same for all peers.
        let mut common = BTreeSet::new();
        for port in &rule.ports {
            let receiver = match direction {
                Direction::Ingress => subject,
                // The receiver is the peer: nobody yet, so that only numbers resolve here.
                Direction::Egress => &IdentityLabels::default(),
            };
            port.prefixes(receiver, |ports| {
                common.insert(ports);
            });
        }
        let all_common = |peer: u32, each: &mut dyn FnMut(Place)| {
            common.iter().for_each(|&ports| each(Place { direction, peer, ports }));
        };
        let named = |peer: u32, each: &mut dyn FnMut(Place)| {
            if !rule.names_port_of_peer() {
                return;
            }
            let Some(receiver) = self.identities.get(&peer) else { return };
            // The others are common to all peers and stand there.
            for port in rule.ports.iter().filter(|port| matches!(port, PortMatch::Named { .. })) {
                port.prefixes(receiver, |ports| each(Place { direction, peer, ports }));
            }
        };
        for peer in &rule.peers {
            match peer {
                Peer::Any => {
                    all_common(ANYBODY, &mut each);
                    if rule.names_port_of_peer() {
                        self.index.matched(&Selector::every_pod()).for_each(|id| named(id, &mut each));
                    }
                }
                Peer::Pods(selector) => {
                    for id in self.index.matched(selector) {
                        all_common(id, &mut each);
                        named(id, &mut each);
                    }
                }
                Peer::Addresses(_) => {}
            }
        }
        self.blocks.meant_by(&rule.address_blocks()).into_iter().for_each(|number| all_common(number, &mut each));
    }
}

impl Rule {
    /// No less than the entries that it takes for one peer.
    fn most_ports(&self) -> usize {
        let mut ports = 0;
        for port in &self.ports {
            match port {
                // At most one at each receiver.
                PortMatch::Named { .. } => ports += 1,
                _ => port.prefixes(&IdentityLabels::default(), |_| ports += 1),
            }
        }
        ports
    }
}

impl Policy {
    /// No less than the entries that one more address block makes in the rule set of whom it selects.
    pub(super) fn most_entries_of_a_block(&self) -> usize {
        self.rules.iter().filter(|rule| !rule.address_blocks().is_empty()).map(Rule::most_ports).sum()
    }
}

impl Installed {
    /// Its rules with their cookies.
    pub(super) fn rules(&self) -> impl Iterator<Item = (&Rule, u32)> {
        self.policy.rules.iter().zip(self.cookies.iter().copied())
    }
}

impl Rule {
    /// Its peers that are addresses.
    fn address_blocks(&self) -> Vec<&IpBlock> {
        let blocks = self.peers.iter().filter_map(|peer| match peer {
            Peer::Addresses(block) => Some(block),
            _ => None,
        });
        blocks.collect()
    }

    /// Baseline rules are for workloads that no policy closes.
    pub(super) fn applies(&self, isolated: bool) -> bool {
        self.tier != Tier::Baseline || !isolated
    }
}

/// Where an entry stands. In this order a prefix comes right before all that it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    direction: Direction,
    peer: u32,
    ports: PortPrefix,
}

impl Place {
    fn covers(&self, other: &Place) -> bool {
        self.direction == other.direction
            && self.peer == other.peer
            && self.ports.bits <= other.ports.bits
            && self.ports.contains(other.ports.proto, other.ports.port)
    }

    fn key(&self) -> PolicyKey {
        PolicyKey {
            prefix_len: self.ports.bits,
            peer: self.peer,
            direction: self.direction.number(),
            proto: self.ports.proto,
            port: self.ports.port.to_be_bytes(),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    precedence: u32,
    cookie: u32,
    allow: bool,
}

impl Cell {
    fn entry(&self, place: Place) -> PolicyEntry {
        PolicyEntry {
            precedence: self.precedence,
            cookie: self.cookie,
            proxy_port: 0,
            flags: if self.allow { policy_flag::ALLOW } else { 0 },
            prefix_len: place.ports.bits as u8,
        }
    }
}

/// Takes out every entry that a stronger one of the same peer covers with a shorter prefix: the
/// table answers with the longest prefix only, so the weaker one would hide the stronger one.
fn remove_shadowed(table: &mut BTreeMap<Place, Cell>) {
    let mut covering: Vec<(Place, u32)> = Vec::new();
    table.retain(|place, cell| {
        while covering.last().is_some_and(|(above, _)| !above.covers(place)) {
            covering.pop();
        }
        let shadowed = covering.last().is_some_and(|(_, precedence)| *precedence > cell.precedence);
        if !shadowed {
            covering.push((*place, cell.precedence));
        }
        !shadowed
    });
}

/// Peer 0: whoever it is.
const ANYBODY: u32 = 0;

/// Entries that every table has: the default of each direction.
const BUILT_IN: usize = 2;
