//! From the rules that select an identity to the entries of its table.

use super::fit::Trace;
use super::model::PortPrefix;
use super::{Cluster, Direction, Installed, Peer, Policy, PolicyId, PortMatch, Rule, RuleVerdict, Selector, Tier};
use crate::labels::IdentityLabels;
use crate::resource::{IpBlock, Protocol};
use cirri_abi::{Cookie, Identity, PolicyEntry, PolicyKey, policy_flag};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

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

/// Why there is no complete rule set; see [`Cluster::compile_what_fits`].
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
        "the rules of identity {identity} take more table entries than there are: {limit} fit; {direction} rule {rule} of {policy} takes {rule_entries}: narrow its peers or its ports, or split the workloads that it selects"
    )]
    TooLarge {
        /// The identity.
        identity: Identity,
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
}

/// Whom a rule set is for.
#[derive(Clone, Copy, Debug)]
pub struct Workloads<'a> {
    /// Their number.
    pub identity: Identity,
    /// Who they are. What the number stands for may differ.
    pub labels: &'a IdentityLabels,
    /// What is left of policies that nobody can read.
    pub trace: Option<&'a Trace>,
}

impl Cluster {
    /// The rule set of an identity.
    pub fn compile(&self, identity: Identity) -> Result<Ruleset, CompileError> {
        let labels = self.labels(identity).ok_or(CompileError::UnknownIdentity { identity })?;
        self.compile_for(&Workloads { identity, labels, trace: None })
    }

    /// The rule set of workloads.
    pub fn compile_for(&self, workloads: &Workloads<'_>) -> Result<Ruleset, CompileError> {
        let subject = self.subject(workloads);
        match self.table(&subject, self.limit) {
            Some(table) => Ok(subject.ruleset(table)),
            None => Err(self.too_large(&subject)),
        }
    }

    /// How many entries the rule set of an identity takes, whether they fit or not.
    #[cfg(test)]
    pub(super) fn entries_of(&self, identity: Identity) -> usize {
        let subject = self.subject_of(identity);
        subject.map_or(0, |subject| self.table(&subject, usize::MAX).expect("no limit").cells.len())
    }

    /// How many entries the rule set of an identity takes, or why it has none. Looks at no more of them than about
    /// twice as many as fit, and at no product of peers and ports.
    pub(super) fn count(&self, identity: Identity) -> Result<usize, CompileError> {
        let subject = self.subject_of(identity)?;
        match self.table(&subject, self.limit) {
            Some(table) => Ok(table.cells.len()),
            None => Err(self.too_large(&subject)),
        }
    }

    /// No less than the entries of the identity's rule set.
    pub(super) fn bound(&self, identity: Identity) -> usize {
        let policies = self.installed_for(identity.id);
        BUILT_IN + policies.map(|installed| self.most_entries_of(&installed.policy)).sum::<usize>()
    }

    /// No less than the entries that the policy takes, whomever it is for.
    pub(super) fn most_entries_of(&self, policy: &Policy) -> usize {
        policy.rules.iter().map(|rule| self.most_entries(rule)).sum()
    }

    fn most_entries(&self, rule: &Rule) -> usize {
        let peers = rule.peers.iter().map(|peer| match peer {
            Peer::Any if rule.names_port_of_peer() => 1 + self.index.matched(&Selector::every_pod()).len(),
            Peer::Any => 1,
            Peer::Pods(selector) => self.index.matched(selector).len(),
            Peer::Addresses(_) => 0,
        });
        (peers.sum::<usize>() + self.blocks.meant_by(&rule.address_blocks()).len()) * rule.most_ports()
    }

    fn subject_of(&self, identity: Identity) -> Result<Subject<'_>, CompileError> {
        let labels = self.labels(identity).ok_or(CompileError::UnknownIdentity { identity })?;
        Ok(self.subject(&Workloads { identity, labels, trace: None }))
    }

    pub(super) fn subject<'a>(&'a self, workloads: &Workloads<'a>) -> Subject<'a> {
        let Workloads { identity, labels, trace } = *workloads;
        let policies = match self.labels(identity) == Some(labels) {
            true => self.installed_for(identity.id).collect(),
            // The number stands for others, and the index knows only numbers.
            false => self.policies.values().filter(|installed| installed.policy.subject.matches(labels)).collect(),
        };
        Subject { identity, labels, policies, trace }
    }

    fn too_large(&self, subject: &Subject<'_>) -> CompileError {
        let mut costliest: Option<(usize, &Installed, &Rule)> = None;
        for installed in &subject.policies {
            for (rule, _) in installed.rules() {
                let entries = self.entries_of_rule(&self.meant(rule, subject.labels));
                // The first of equals stays, so that the answer is always the same.
                if costliest.is_none_or(|(most, _, _)| entries > most) {
                    costliest = Some((entries, installed, rule));
                }
            }
        }
        match costliest {
            Some((rule_entries, installed, rule)) => CompileError::TooLarge {
                identity: subject.identity,
                limit: self.limit,
                policy: installed.policy.id.clone(),
                direction: rule.direction,
                rule: rule.index,
                rule_entries,
            },
            // Without a rule there are but the built-in entries, and they fit every table.
            None => CompileError::UnknownIdentity { identity: subject.identity },
        }
    }

    /// How many entries a rule takes; named ports of peers are counted until there are more than fit.
    fn entries_of_rule(&self, meant: &Meant<'_>) -> usize {
        let mut named = 0;
        let _ = meant.receivers.iter().try_for_each(|peer| {
            self.named_places(meant, *peer, &mut |place| {
                named += usize::from(!meant.peers.contains(peer) || !meant.ports.contains(&place.ports));
                if named > self.limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
        });
        meant.peers.len() * meant.ports.len() + named
    }

    /// The table; none if it takes more than `limit` entries.
    fn table(&self, subject: &Subject<'_>, limit: usize) -> Option<Table> {
        let mut table = Table::new(subject, limit);
        let all = subject.rules().into_iter().try_for_each(|(_, rule, cookie)| {
            let cell = Cell::of(rule, cookie);
            let meant = self.meant(rule, subject.labels);
            self.places(&meant, &mut |place| table.add(place, cell))
        });
        let all = all.is_continue() && self.traces(subject, &mut |place, cell| table.add(place, cell)).is_continue();
        table.prune();
        (all && !table.is_too_large()).then_some(table)
    }

    /// What the rule means for workloads with `subject` labels.
    pub(super) fn meant<'a>(&self, rule: &'a Rule, subject: &IdentityLabels) -> Meant<'a> {
        let direction = rule.direction;
        let receiver = match direction {
            Direction::Ingress => subject,
            // The receiver is the peer: nobody yet, so that only numbers resolve here.
            Direction::Egress => &IdentityLabels::default(),
        };
        let mut ports = BTreeSet::new();
        for port in &rule.ports {
            port.prefixes(receiver, |prefix| {
                ports.insert(prefix);
            });
        }
        let mut peers: BTreeSet<u32> = self.blocks.meant_by(&rule.address_blocks()).into_iter().collect();
        let mut receivers = BTreeSet::new();
        // One that stands there often means no more.
        let selectors: BTreeSet<&Selector> = rule.peers.iter().filter_map(Peer::selector).collect();
        for selector in selectors {
            peers.extend(self.index.matched(selector));
        }
        let mut names = BTreeSet::new();
        if rule.names_port_of_peer() {
            names.extend(rule.ports.iter().filter_map(PortMatch::name));
            receivers.clone_from(&peers);
        }
        if rule.peers.iter().any(|peer| matches!(peer, Peer::Any)) {
            peers.insert(ANYBODY);
            if !names.is_empty() {
                receivers.extend(self.index.matched(&Selector::every_pod()));
            }
        }
        Meant { direction, peers, ports, receivers, names }
    }

    /// Every place of the table that is meant, until `each` breaks.
    fn places(&self, meant: &Meant<'_>, each: &mut Each<'_>) -> ControlFlow<()> {
        meant.everybody().try_for_each(|peer| self.places_of(meant, peer, each))
    }

    /// Those of one peer.
    pub(super) fn places_of(&self, meant: &Meant<'_>, peer: u32, each: &mut Each<'_>) -> ControlFlow<()> {
        let direction = meant.direction;
        if meant.peers.contains(&peer) {
            for &ports in &meant.ports {
                crate::work::step();
                each(Place { direction, peer, ports })?;
            }
        }
        self.named_places(meant, peer, each)
    }

    /// Those of the ports of a peer that have a name, which is the peer's own.
    fn named_places(&self, meant: &Meant<'_>, peer: u32, each: &mut Each<'_>) -> ControlFlow<()> {
        let receiver = self.identities.get(&peer).filter(|_| meant.receivers.contains(&peer));
        let Some(receiver) = receiver else { return ControlFlow::Continue(()) };
        let direction = meant.direction;
        let mut place = |(_, protocol): (&str, Protocol), port| {
            crate::work::step();
            let ports = PortPrefix { bits: PolicyKey::FULL_BITS, proto: protocol.number(), port };
            each(Place { direction, peer, ports })
        };
        if meant.names.len() <= FEW {
            let mut found =
                meant.names.iter().filter_map(|named| Some((*named, receiver.named_port(named.0, named.1)?)));
            return found.try_for_each(|(named, port)| place(named, port));
        }
        let mut asked = receiver.named_ports().filter(|(named, _)| meant.names.contains(named));
        asked.try_for_each(|(named, port)| place(named, port))
    }
}

/// Takes a place, and says whether it wants more of them.
pub(super) type Each<'a> = dyn FnMut(Place) -> ControlFlow<()> + 'a;

/// What a rule means in the table of somebody: all ports at all peers, and at some peers the ports of these names.
pub(super) struct Meant<'a> {
    direction: Direction,
    /// Identities, numbers of blocks, or anybody.
    pub peers: BTreeSet<u32>,
    pub ports: BTreeSet<PortPrefix>,
    /// Identities whose own ports are meant by name.
    receivers: BTreeSet<u32>,
    names: BTreeSet<(&'a str, Protocol)>,
}

impl Meant<'_> {
    /// Every peer that it may have a place for, once.
    pub(super) fn everybody(&self) -> impl Iterator<Item = u32> {
        self.peers.union(&self.receivers).copied()
    }

    /// No less than the places that it has for one peer.
    pub(super) fn most_places_of(&self, peer: u32) -> usize {
        let of = |count: usize, is_so: bool| if is_so { count } else { 0 };
        of(self.ports.len(), self.peers.contains(&peer)) + of(self.names.len(), self.receivers.contains(&peer))
    }
}

/// Whom a table is for, and by what.
pub(super) struct Subject<'a> {
    pub identity: Identity,
    pub labels: &'a IdentityLabels,
    /// The policies that select it, by name.
    policies: Vec<&'a Installed>,
    pub trace: Option<&'a Trace>,
}

impl<'a> Subject<'a> {
    pub(super) fn isolated(&self, direction: Direction) -> bool {
        self.trace.is_some_and(|trace| trace.closes(direction))
            || self.policies.iter().any(|installed| installed.policy.isolates(direction))
    }

    /// The rules that apply, with their cookies: the strongest first, and of equals in the order of policies' names.
    pub(super) fn rules(&self) -> Vec<(&'a PolicyId, &'a Rule, u32)> {
        let isolated = Direction::BOTH.map(|direction| self.isolated(direction));
        let of = |installed: &'a Installed| {
            installed.rules().map(move |(rule, cookie)| (&installed.policy.id, rule, cookie))
        };
        let all = self.policies.iter().copied().flat_map(of);
        let mut rules: Vec<_> = all.filter(|(_, rule, _)| rule.applies(isolated[rule.direction as usize])).collect();
        rules.sort_by_key(|(_, rule, _)| Reverse(rule.precedence()));
        rules
    }

    pub(super) fn ruleset(&self, table: Table) -> Ruleset {
        Ruleset {
            identity: self.identity,
            isolates_ingress: self.isolated(Direction::Ingress),
            isolates_egress: self.isolated(Direction::Egress),
            entries: table.cells.into_iter().map(|(place, cell)| (place.key(), cell.entry(place))).collect(),
        }
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

/// Where an entry stands. In this order a prefix comes right before all that it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub direction: Direction,
    pub peer: u32,
    pub ports: PortPrefix,
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
pub(super) struct Cell {
    pub precedence: u32,
    pub cookie: u32,
    pub allow: bool,
}

impl Cell {
    pub(super) fn of(rule: &Rule, cookie: u32) -> Cell {
        Cell { precedence: rule.precedence(), cookie, allow: rule.verdict == RuleVerdict::Allow }
    }

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

/// Entries on their way into a table that has room for so many.
pub(super) struct Table {
    cells: BTreeMap<Place, Cell>,
    limit: usize,
}

impl Table {
    /// With the default of each direction alone.
    pub(super) fn new(subject: &Subject<'_>, limit: usize) -> Table {
        let default = |direction| {
            let any = PortPrefix { proto: 0, port: 0, bits: PolicyKey::STATIC_BITS };
            let cell = match subject.isolated(direction) {
                true => Cell { precedence: 0, cookie: Cookie::DEFAULT_DENY, allow: false },
                false => Cell { precedence: 0, cookie: Cookie::DEFAULT_ALLOW, allow: true },
            };
            (Place { direction, peer: ANYBODY, ports: any }, cell)
        };
        Table { cells: Direction::BOTH.map(default).into(), limit }
    }

    /// Takes an entry in, unless one that is as strong stands there. Of equals the first stays: policies come in the
    /// order of their names.
    pub(super) fn put(&mut self, place: Place, cell: Cell) {
        let held = self.cells.entry(place).or_insert(cell);
        if held.precedence < cell.precedence {
            *held = cell;
        }
    }

    /// The same. The strongest come first: what is too much already does not become less by what follows, and `Break`
    /// says so.
    pub(super) fn add(&mut self, place: Place, cell: Cell) -> ControlFlow<()> {
        self.put(place, cell);
        if self.cells.len() > self.limit.saturating_mul(2) {
            self.prune();
            if self.is_too_large() {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    pub(super) fn is_too_large(&self) -> bool {
        self.cells.len() > self.limit
    }

    /// How many more entries fit.
    pub(super) fn room(&self) -> usize {
        self.limit.saturating_sub(self.cells.len())
    }

    pub(super) fn contains(&self, place: &Place) -> bool {
        self.cells.contains_key(place)
    }

    /// Takes out every entry that a stronger one of the same peer covers with a shorter prefix: the
    /// table answers with the longest prefix only, so the weaker one would hide the stronger one.
    pub(super) fn prune(&mut self) {
        let mut covering: Vec<(Place, u32)> = Vec::new();
        self.cells.retain(|place, cell| {
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
}

/// Peer 0: whoever it is.
const ANYBODY: u32 = 0;

/// Entries that every table has: the default of each direction.
const BUILT_IN: usize = 2;

/// So many names are looked up one by one; of more, those that the peer has are looked through.
const FEW: usize = 16;
