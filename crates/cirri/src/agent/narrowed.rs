//! Rule sets while the table of addresses has no room for some networks.
//!
//! An address whose own network has no row is taken for one of the network around it. A rule set that allows that one and
//! not its own would let it pass: it allows neither until there is room.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use cirri_abi::{PolicyEntry, PolicyKey, RulesetSlot, policy_flag};
use ipnet::IpNet;

use super::core::Core;
use super::rulesets::Rules;

/// What is said of such a rule set.
pub const NO_ROOM: &str = "networks that it does not allow cannot be told from those around them, which it allows: none of \
                           these is allowed";

/// A network without a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistaken {
    /// The block that its addresses are taken for.
    for_block: u32,
    /// Their own.
    block: u32,
}

/// What cannot be told apart, and what came of it.
#[derive(Debug, Default)]
pub struct Narrowed {
    mistaken: BTreeSet<Mistaken>,
    /// The rule sets in force that allow less than they should, by slot.
    pub rules: BTreeMap<RulesetSlot, Rules>,
}

impl Core {
    /// Looks what cannot be told apart by now. Rule sets that were narrowed because of something else are made again, and
    /// those in `slots`, which were installed by what could be told apart before.
    pub(super) fn note_mistaken(&mut self, slots: &[RulesetSlot]) {
        let mistaken = self.mistaken();
        if mistaken == self.narrowed.mistaken {
            return;
        }
        self.narrowed.mistaken = mistaken;
        for slot in self.narrowed.rules.keys().chain(slots) {
            self.rows.rulesets.suspect(slot);
        }
    }

    /// What a rule set allows less for the time being, if that is anything.
    pub(super) fn narrow(&self, entries: &Rules) -> Option<Rules> {
        narrow(entries, &self.narrowed.mistaken)
    }

    fn mistaken(&self) -> BTreeSet<Mistaken> {
        let rows = &self.rows.ipcache;
        let lacking = rows.failed().filter(|(_, row)| row.block != 0);
        let taken_for = |net: &IpNet| {
            let wider = (0..=net.prefix_len()).rev().filter_map(|length| IpNet::new(net.addr(), length).ok());
            wider.map(|wider| wider.trunc()).find_map(|wider| rows.actual(&wider).map(|row| row.block))
        };
        let mistaken = lacking.filter_map(|(net, row)| Some(Mistaken { for_block: taken_for(net)?, block: row.block }));
        mistaken.filter(|it| it.for_block != 0 && it.for_block != it.block).collect()
    }
}

/// Without what it allows to a block, and not just so to those that are taken for it.
fn narrow(entries: &Rules, mistaken: &BTreeSet<Mistaken>) -> Option<Rules> {
    if mistaken.is_empty() {
        return None;
    }
    let by_key: HashMap<PolicyKey, PolicyEntry> = entries.iter().copied().collect();
    let is_too_wide = |(key, entry): &(PolicyKey, PolicyEntry)| {
        let from = Mistaken { for_block: key.peer, block: 0 };
        let taken = mistaken.range(from..).take_while(|it| it.for_block == key.peer);
        let allows_just_so = |it: &Mistaken| {
            let own = by_key.get(&PolicyKey { peer: it.block, ..*key });
            own.is_some_and(|own| own.flags == entry.flags && own.precedence == entry.precedence)
        };
        passes(entry) && !taken.into_iter().all(allows_just_so)
    };
    entries.iter().any(is_too_wide).then(|| entries.iter().filter(|entry| !is_too_wide(entry)).copied().collect())
}

fn passes(entry: &PolicyEntry) -> bool {
    entry.flags & (policy_flag::ALLOW | policy_flag::AUDIT) != 0
}

#[cfg(test)]
mod tests {
    use cirri_abi::{Direction, Identity};

    use super::*;

    const WIDE: u32 = Identity::MIN_BLOCK;
    const OWN: u32 = Identity::MIN_BLOCK + 1;

    fn rule(peer: u32, direction: u8, flags: u8) -> (PolicyKey, PolicyEntry) {
        let key = PolicyKey { peer, direction, ..PolicyKey::default() };
        (key, PolicyEntry { flags, ..PolicyEntry::default() })
    }

    #[test]
    fn a_network_is_allowed_only_with_all_that_are_taken_for_it() {
        let mistaken = BTreeSet::from([Mistaken { for_block: WIDE, block: OWN }]);
        let wide = rule(WIDE, Direction::EGRESS, policy_flag::ALLOW);
        let audited = rule(WIDE, Direction::INGRESS, policy_flag::AUDIT);
        let own = rule(OWN, Direction::EGRESS, policy_flag::ALLOW);
        let (other, refused) = (rule(OWN + 1, Direction::EGRESS, policy_flag::ALLOW), rule(WIDE, 9, 0));
        assert_eq!(narrow(&vec![wide, audited, other, refused], &mistaken), Some(vec![other, refused]));
        // It is allowed just so.
        assert_eq!(narrow(&vec![wide, own, other], &mistaken), None);
        // In one direction only, by a rule that another beats, or refused.
        assert_eq!(narrow(&vec![audited, own], &mistaken), Some(vec![own]));
        let beaten = (own.0, PolicyEntry { precedence: 1, ..own.1 });
        assert_eq!(narrow(&vec![wide, beaten], &mistaken), Some(vec![beaten]));
        assert_eq!(narrow(&vec![wide, rule(OWN, Direction::EGRESS, 0)], &mistaken).map(|rules| rules.len()), Some(1));
        assert_eq!(narrow(&vec![wide, audited], &BTreeSet::new()), None);
    }
}
