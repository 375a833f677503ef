//! Numbers dealt out of a range: rule set slots, peers' epoch slots, endpoint numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

/// Numbers of a range, one per key. Numbers go round: a released one comes last.
#[derive(Clone, Debug)]
pub struct Slots<K> {
    range: RangeInclusive<u16>,
    by_key: BTreeMap<K, u16>,
    used: BTreeSet<u16>,
    next: u16,
}

impl<K: Ord + Clone> Slots<K> {
    /// All free.
    pub fn new(range: RangeInclusive<u16>) -> Slots<K> {
        Slots { next: *range.start(), range, by_key: BTreeMap::new(), used: BTreeSet::new() }
    }

    /// The key's number, if it has one.
    pub fn get(&self, key: &K) -> Option<u16> {
        self.by_key.get(key).copied()
    }

    /// Whether every number is taken.
    pub fn is_full(&self) -> bool {
        self.used.len() == self.range.len()
    }

    /// The key's number, a new one if it has none; `None` if all are taken.
    pub fn take(&mut self, key: &K) -> Option<u16> {
        if let Some(slot) = self.get(key) {
            return Some(slot);
        }
        let (first, last) = (*self.range.start(), *self.range.end());
        let slot = (self.next..=last).chain(first..self.next).find(|slot| !self.used.contains(slot))?;
        self.next = if slot == last { first } else { slot + 1 };
        self.used.insert(slot);
        self.by_key.insert(key.clone(), slot);
        Some(slot)
    }

    /// The key had this number before a restart. False if the number is out of range or another's.
    pub fn adopt(&mut self, key: K, slot: u16) -> bool {
        if self.get(&key) == Some(slot) {
            return true;
        }
        if !self.range.contains(&slot) || self.by_key.contains_key(&key) || !self.used.insert(slot) {
            return false;
        }
        if slot >= self.next {
            self.next = if slot == *self.range.end() { *self.range.start() } else { slot + 1 };
        }
        self.by_key.insert(key, slot);
        true
    }

    /// The key needs no number any more.
    pub fn release(&mut self, key: &K) -> Option<u16> {
        let slot = self.by_key.remove(key)?;
        self.used.remove(&slot);
        Some(slot)
    }

    /// Every key and its number.
    pub fn iter(&self) -> impl Iterator<Item = (&K, u16)> {
        self.by_key.iter().map(|(key, slot)| (key, *slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_keeps_its_number_and_a_released_one_comes_last() {
        let mut slots = Slots::new(1..=3);
        assert_eq!((slots.take(&"a"), slots.take(&"b"), slots.take(&"a")), (Some(1), Some(2), Some(1)));
        slots.release(&"a");
        assert_eq!((slots.take(&"c"), slots.take(&"d"), slots.take(&"e")), (Some(3), Some(1), None));
    }

    #[test]
    fn numbers_of_an_earlier_run_are_kept() {
        let mut slots = Slots::new(1..=3);
        assert!(slots.adopt("a", 2) && slots.adopt("a", 2));
        assert!(!slots.adopt("b", 2) && !slots.adopt("c", 9) && !slots.adopt("a", 1));
        assert_eq!(slots.take(&"b"), Some(3));
    }
}
