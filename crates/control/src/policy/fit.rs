//! The rule set of whoever has no complete one: never more open than its policies, and what was allowed goes on.

use super::compile::{Cell, Meant, Place, Subject, Table, Workloads};
use super::model::PortPrefix;
use super::{Cluster, Direction, PolicyId, RuleVerdict, Ruleset};
use cirri_abi::{Cookie, Identity, PolicyEntry, PolicyKey, policy_flag};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

/// The entries of a rule set.
type Entries = [(PolicyKey, PolicyEntry)];

/// As much of a rule set as fits its table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fitted {
    /// It.
    pub ruleset: Ruleset,
    /// By policy, how many peers of its rules are not allowed because they do not fit.
    pub left_out: BTreeMap<PolicyId, usize>,
}

/// What is left of policies that nobody can read: the directions that a rule set of then closed, and what it allowed
/// by rules that are nobody's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    closed: BTreeSet<Direction>,
    entries: Vec<(PolicyKey, PolicyEntry)>,
}

impl Cluster {
    /// As much of the rule set of workloads as fits. All that is denied is in it, and every direction that a policy
    /// closes is closed; what does not fit is not allowed. Whole peers of rules go in: first those of `before`, the
    /// rule set that was in force, so that what was allowed and still is goes on.
    pub fn compile_what_fits(&self, workloads: &Workloads<'_>, before: &Entries) -> Fitted {
        let subject = self.subject(workloads);
        let mut table = Table::new(&subject, self.limit);
        let mut left_out = BTreeMap::new();
        let rules = subject.rules();
        let (denying, allowing): (Vec<_>, Vec<_>) =
            rules.into_iter().partition(|(_, rule, _)| rule.verdict == RuleVerdict::Deny);
        for (_, rule, cookie) in denying {
            let (meant, cell) = (self.meant(rule, subject.labels), Cell::of(rule, cookie));
            let all = meant
                .everybody()
                .try_for_each(|peer| self.places_of(&meant, peer, &mut |place| table.add(place, cell)));
            if all.is_break() {
                return Fitted { ruleset: closed(subject.identity), left_out };
            }
        }
        table.prune();
        if table.is_too_large() {
            return Fitted { ruleset: closed(subject.identity), left_out };
        }
        let known = Known::of(before);
        for familiarity in Familiarity::ALL {
            for (id, rule, cookie) in &allowing {
                let (meant, cell) = (self.meant(rule, subject.labels), Cell::of(rule, *cookie));
                for peer in meant.everybody().filter(|peer| known.familiarity(*cookie, *peer) == familiarity) {
                    // Of what was in force most places may be there already, as another rule's. Others are not looked
                    // at one by one where they might not fit: there may be far too many.
                    let try_it = familiarity == Familiarity::Rule || meant.most_places_of(peer) <= table.room();
                    let places = try_it.then(|| self.new_places(&meant, peer, &table));
                    match places.filter(|places| places.len() <= table.room()) {
                        Some(places) => places.into_iter().for_each(|place| table.put(place, cell)),
                        None => *left_out.entry((*id).clone()).or_default() += 1,
                    }
                }
            }
        }
        let _ = self.traces(&subject, &mut |place, cell| match table.room() {
            0 => ControlFlow::Break(()),
            _ => table.add(place, cell),
        });
        table.prune();
        Fitted { ruleset: subject.ruleset(table), left_out }
    }

    /// The places of a peer at which the table has nothing.
    fn new_places(&self, meant: &Meant<'_>, peer: u32, table: &Table) -> Vec<Place> {
        let mut places = Vec::new();
        let _ = self.places_of(meant, peer, &mut |place| {
            places.extend((!table.contains(&place)).then_some(place));
            ControlFlow::Continue(())
        });
        places
    }

    /// Goes through the entries of the subject's trace whose peer still means somebody.
    pub(super) fn traces(
        &self,
        subject: &Subject<'_>,
        each: &mut dyn FnMut(Place, Cell) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let entries = subject.trace.iter().flat_map(|trace| &trace.entries);
        let is_somebody = |peer: u32| peer == 0 || peer >= Identity::MIN_BLOCK || self.identities.contains_key(&peer);
        for (key, entry) in entries.filter(|(key, _)| is_somebody(key.peer)) {
            let Some(direction) = direction_of(key) else { continue };
            let ports = PortPrefix { proto: key.proto, port: u16::from_be_bytes(key.port), bits: key.prefix_len };
            let cell = Cell { precedence: entry.precedence, cookie: entry.cookie, allow: true };
            each(Place { direction, peer: key.peer, ports }, cell)?;
        }
        ControlFlow::Continue(())
    }
}

impl Trace {
    /// What policies left in a rule set that was made when they could be read; `is_known` says of which rules
    /// (by cookie) it is known what they said and who said it.
    pub fn of(ruleset: &Entries, is_known: impl Fn(u32) -> bool) -> Trace {
        let is_allow = |entry: &PolicyEntry| entry.flags & policy_flag::ALLOW != 0;
        let denied = ruleset.iter().filter(|(_, entry)| entry.cookie == Cookie::DEFAULT_DENY && !is_allow(entry));
        let closed = denied.filter_map(|(key, _)| direction_of(key)).collect();
        let strange = |(_, entry): &&(PolicyKey, PolicyEntry)| {
            is_allow(entry) && entry.cookie >= Cookie::FIRST_RULE && !is_known(entry.cookie)
        };
        Trace { closed, entries: ruleset.iter().filter(strange).copied().collect() }
    }

    pub(super) fn closes(&self, direction: Direction) -> bool {
        self.closed.contains(&direction)
    }
}

/// What a rule set says of a connection: whether its first packet may pass. As the packet path asks it: of who the peer
/// is, of the block that its address is in, and of anybody the longest prefix each, and the strongest of these.
pub fn allows(ruleset: &Entries, peers: [u32; 2], direction: Direction, proto: u8, port: u16) -> bool {
    let holds = |key: &PolicyKey| {
        let ports = PortPrefix { proto: key.proto, port: u16::from_be_bytes(key.port), bits: key.prefix_len };
        key.direction == direction.number() && ports.contains(proto, port)
    };
    let longest = |peer: u32| {
        let of_peer = ruleset.iter().filter(|(key, _)| key.peer == peer && holds(key));
        of_peer.max_by_key(|(key, _)| key.prefix_len).map(|(_, entry)| entry)
    };
    let [identity, block] = peers;
    // Of equals the first wins.
    let found = [longest(0), longest(block), longest(identity)].into_iter().flatten();
    found
        .max_by_key(|entry| (entry.precedence, entry.prefix_len))
        .is_some_and(|entry| entry.flags & policy_flag::ALLOW != 0)
}

fn direction_of(key: &PolicyKey) -> Option<Direction> {
    Direction::BOTH.into_iter().find(|direction| direction.number() == key.direction)
}

/// A rule set that lets nothing pass.
pub fn closed(identity: Identity) -> Ruleset {
    let key = |direction: Direction| PolicyKey {
        prefix_len: PolicyKey::STATIC_BITS,
        direction: direction.number(),
        ..PolicyKey::default()
    };
    let deny = PolicyEntry {
        cookie: Cookie::DEFAULT_DENY,
        prefix_len: PolicyKey::STATIC_BITS as u8,
        ..PolicyEntry::default()
    };
    let entries = Direction::BOTH.map(|direction| (key(direction), deny)).to_vec();
    Ruleset { identity, isolates_ingress: true, isolates_egress: true, entries }
}

/// How well a peer of a rule was known before, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Familiarity {
    /// The rule had an entry for it.
    Rule,
    /// Another rule had: perhaps an earlier version.
    Peer,
    /// Neither.
    Stranger,
}

impl Familiarity {
    const ALL: [Familiarity; 3] = [Familiarity::Rule, Familiarity::Peer, Familiarity::Stranger];
}

/// Whom a rule set allows, and by which rules.
struct Known {
    pairs: BTreeSet<(u32, u32)>,
    peers: BTreeSet<u32>,
}

impl Known {
    fn of(before: &Entries) -> Known {
        Known {
            pairs: before.iter().map(|(key, entry)| (entry.cookie, key.peer)).collect(),
            peers: before.iter().map(|(key, _)| key.peer).collect(),
        }
    }

    fn familiarity(&self, cookie: u32, peer: u32) -> Familiarity {
        if self.pairs.contains(&(cookie, peer)) {
            Familiarity::Rule
        } else if self.peers.contains(&peer) {
            Familiarity::Peer
        } else {
            Familiarity::Stranger
        }
    }
}
