//! Longest-prefix tables that behave like the kernel's tries.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

/// A table from prefixes to values. `K` is a key whose bits past the prefix are cleared.
#[derive(Clone, Debug)]
pub struct Prefixes<K, V> {
    entries: HashMap<(u32, K), V>,
    lengths: BTreeSet<u32>,
}

impl<K, V> Default for Prefixes<K, V> {
    fn default() -> Self {
        Prefixes { entries: HashMap::new(), lengths: BTreeSet::new() }
    }
}

impl<K: Eq + Hash + Copy, V> Prefixes<K, V> {
    /// Inserts or replaces.
    pub fn insert(&mut self, length: u32, key: K, value: V) {
        self.lengths.insert(length);
        self.entries.insert((length, key), value);
    }

    /// Removes.
    pub fn remove(&mut self, length: u32, key: K) {
        self.entries.remove(&(length, key));
    }

    /// The value under the longest prefix; `cut(length)` is the key with the bits past it cleared.
    pub fn longest(&self, cut: impl Fn(u32) -> K) -> Option<&V> {
        self.lengths.iter().rev().find_map(|length| self.entries.get(&(*length, cut(*length))))
    }
}

/// Clears the bits of `bytes` past the first `length`.
pub fn cut<const N: usize>(mut bytes: [u8; N], length: u32) -> [u8; N] {
    for (i, byte) in bytes.iter_mut().enumerate() {
        let kept = length.saturating_sub(i as u32 * 8).min(8);
        *byte &= !(0xffu16 >> kept) as u8;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_clears_exactly_the_bits_past_the_prefix() {
        assert_eq!(cut([0xff, 0xff, 0xff], 0), [0, 0, 0]);
        assert_eq!(cut([0xff, 0xff, 0xff], 12), [0xff, 0xf0, 0]);
        assert_eq!(cut([0xff, 0xff, 0xff], 24), [0xff, 0xff, 0xff]);
    }

    #[test]
    fn the_longest_prefix_answers() {
        let mut table = Prefixes::default();
        table.insert(0, [0u8; 2], "all");
        table.insert(8, [10, 0], "ten");
        table.insert(16, [10, 1], "ten-one");
        let find = |address: [u8; 2]| table.longest(|length| cut(address, length)).copied();
        assert_eq!(find([10, 1]), Some("ten-one"));
        assert_eq!(find([10, 2]), Some("ten"));
        assert_eq!(find([11, 2]), Some("all"));
    }
}
