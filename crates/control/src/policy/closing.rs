//! The way from one rule set to the next where several change together.
//!
//! A connection passes if its sender's rule set and its receiver's allow it. Rule sets come into force one after the
//! other: if one that opens its workload came before one that closes its own, a connection might pass that was not
//! allowed before and is not allowed after. So whatever closes comes first.

use super::fit::closed;
use cirri_abi::{Identity, PolicyEntry, PolicyKey, map, policy_flag};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// The entries of a rule set.
type Entries = [(PolicyKey, PolicyEntry)];

/// What of a change must be in force before any rule set of the same change opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Closing {
    /// Nothing: it closes nothing.
    Nothing,
    /// All of it: it opens nothing.
    All,
    /// This rule set, which allows what both allow.
    Part(Vec<(PolicyKey, PolicyEntry)>),
}

/// What of the change from one rule set to another must come first.
///
/// [`Closing::Part`] never allows what one of the two does not allow. It allows all that both allow, but for peers that
/// are one's by their identity and the other's by their address block; and nothing if it would not fit its table.
pub fn closing(before: &Entries, after: &Entries) -> Closing {
    let (before, after) = (Rules::of(before), Rules::of(after));
    if before.entries == after.entries {
        return Closing::Nothing;
    }
    let keys = keys_of(&before, &after);
    let (mut opens, mut closes) = (false, false);
    if let Some(keys) = &keys {
        // Where nobody but anybody is denied something, it does not matter which rule allows.
        let by_strength = before.denies_somebody || after.denies_somebody;
        for key in keys {
            let [was, is] = [&before, &after].map(|rules| rules.strength(key));
            opens |= is > was && (by_strength || was <= 0);
            closes |= is < was && (by_strength || is <= 0);
        }
    } else {
        for key in before.entries.keys().chain(after.entries.keys()) {
            let [was, is] = [&before, &after].map(|rules| rules.longest(key).map_or(0, rank));
            opens |= is > was;
            closes |= is < was;
        }
    }
    match (opens, closes) {
        (_, false) => Closing::Nothing,
        (false, true) => Closing::All,
        (true, true) => Closing::Part(keys.map_or_else(
            || closed(Identity::UNKNOWN).entries,
            |keys| keys.into_iter().map(|key| (key, both(&before, &after, &key))).collect(),
        )),
    }
}

/// Every prefix of every peer inside which neither says anything else, of the peer or of anybody; `None`: more than fit
/// a table.
fn keys_of(before: &Rules, after: &Rules) -> Option<Vec<PolicyKey>> {
    let limit = map::RULESET.max_entries as usize;
    let own = || before.entries.keys().chain(after.entries.keys());
    let of_anybody: BTreeMap<_, _> =
        own().filter(|key| key.peer == ANYBODY).map(|key| (sorted_by(key), *key)).collect();
    let mut keys = BTreeMap::new();
    for key in own() {
        keys.insert(sorted_by(key), *key);
        let as_anybody = PolicyKey { peer: ANYBODY, ..*key };
        let inside = of_anybody.range(sorted_by(&as_anybody)..).take_while(|(_, it)| covers(&as_anybody, it));
        for (_, it) in inside {
            let it = PolicyKey { peer: key.peer, ..*it };
            keys.insert(sorted_by(&it), it);
            if keys.len() > limit {
                return None;
            }
        }
    }
    (keys.len() <= limit).then(|| keys.into_values().collect())
}

/// What both say of a prefix of one peer, of whom neither says anything with a longer one.
fn both(before: &Rules, after: &Rules, key: &PolicyKey) -> PolicyEntry {
    let said = [after, before].map(|rules| rules.strongest(key));
    let denial = said.iter().find(|entry| !entry.is_some_and(passes));
    // It counts what it says of anybody in, and always beats it. Between an identity and a block the stronger denial
    // and the weaker permission count, and of equals the denial.
    let own = |entry: &Option<&PolicyEntry>| entry.map_or(0, |entry| entry.precedence);
    let precedence = match denial {
        _ if key.peer == ANYBODY => 0,
        Some(_) => said.iter().filter(|it| !it.is_some_and(passes)).map(own).max().unwrap_or(0).saturating_add(1),
        None => said.iter().map(own).min().unwrap_or(0),
    };
    let decisive = denial.unwrap_or(&said[0]).copied().unwrap_or_default();
    PolicyEntry { precedence, prefix_len: key.prefix_len as u8, ..decisive }
}

/// A rule set as the packet path asks it, see `cirri_abi::policy`.
struct Rules {
    entries: HashMap<PolicyKey, PolicyEntry>,
    /// The lengths of its prefixes.
    lengths: BTreeSet<u32>,
    /// Whether it denies something to one peer, not to anybody.
    denies_somebody: bool,
}

impl Rules {
    fn of(entries: &Entries) -> Rules {
        Rules {
            entries: entries.iter().copied().collect(),
            lengths: entries.iter().map(|(key, _)| key.prefix_len).collect(),
            denies_somebody: entries.iter().any(|(key, entry)| key.peer != ANYBODY && !passes(entry)),
        }
    }

    /// What it says of a whole prefix of the same peer.
    fn longest(&self, key: &PolicyKey) -> Option<&PolicyEntry> {
        let lengths = self.lengths.range(..=key.prefix_len).rev();
        lengths.map(|length| shortened(key, *length)).find_map(|wider| self.entries.get(&wider))
    }

    /// The same with what it says of anybody.
    fn strongest(&self, key: &PolicyKey) -> Option<&PolicyEntry> {
        let anybody = self.longest(&PolicyKey { peer: ANYBODY, ..*key });
        // Of equals the peer's own.
        [anybody, self.longest(key)].into_iter().flatten().max_by_key(|entry| (entry.precedence, entry.prefix_len))
    }

    /// How far what it says of a prefix opens: less of one with a lower number. Between an identity and a block, of
    /// equals what is said of one of them beats what is said of anybody.
    fn strength(&self, key: &PolicyKey) -> i64 {
        let Some(entry) = self.strongest(key) else { return 0 };
        let own = self.longest(key).is_some_and(|own| std::ptr::eq(own, entry));
        rank(entry) * 2 + if passes(entry) { i64::from(own) } else { -i64::from(own) }
    }
}

/// How far an entry opens: what is put in the place of one of the same peer with a lower number can only open.
fn rank(entry: &PolicyEntry) -> i64 {
    let rank = 1 + (i64::from(entry.precedence) << 8 | i64::from(entry.prefix_len));
    if passes(entry) { rank } else { -rank }
}

fn passes(entry: &PolicyEntry) -> bool {
    entry.flags & (policy_flag::ALLOW | policy_flag::AUDIT) != 0
}

/// In this order a prefix comes right before all that it covers.
fn sorted_by(key: &PolicyKey) -> (u8, u32, u8, u16, u32) {
    (key.direction, key.peer, key.proto, u16::from_be_bytes(key.port), key.prefix_len)
}

fn covers(wide: &PolicyKey, key: &PolicyKey) -> bool {
    wide.prefix_len <= key.prefix_len && shortened(key, wide.prefix_len) == *wide
}

/// The prefix of that length which covers this one.
fn shortened(key: &PolicyKey, length: u32) -> PolicyKey {
    let proto = if length < PolicyKey::PROTO_BITS { 0 } else { key.proto };
    let free = PolicyKey::FULL_BITS - length.max(PolicyKey::PROTO_BITS);
    let port = (u32::from(u16::from_be_bytes(key.port)) >> free << free) as u16;
    PolicyKey { prefix_len: length, proto, port: port.to_be_bytes(), ..*key }
}

/// Peer 0: whoever it is.
const ANYBODY: u32 = 0;
