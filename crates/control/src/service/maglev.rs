//! Maglev tables: which backend a hash means, so that nodes agree and little moves when one goes.
//!
//! Every backend walks the table in an order of its own (from a hash of its name) until it has as many
//! slots as its weight earns. A slot that two of them want goes to the one that comes to it earlier in
//! its walk; the other one goes on. In the paper backends take turns and whoever comes first keeps the
//! slot; letting the better claim win instead (a stable matching) halves what moves when a backend
//! goes, with shares as even. Nothing depends on numbers, on the order of the input or on what was
//! there before: the same names and weights give the same table everywhere.

use crate::hash::fnv128;

/// The sizes that a table may have, all prime: each walk then meets every slot.
pub const SIZES: [u32; 10] = [251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071];

/// The size for this many backends: the smallest of at least 100 slots for each, so that a backend
/// that goes moves at most a hundredth of the others' slots. The largest if none is.
pub fn size_for(backends: usize) -> u32 {
    rounded_up(backends.saturating_mul(100))
}

/// The table: for each slot the index in `backends` of who has it.
///
/// `backends` are names and weights; names are to be unique. Who has weight 0 gets no slot, and if
/// nobody has another, the table is empty. `size` is one of [`SIZES`]; anything else counts as the
/// next of them.
pub fn table(backends: &[(&str, u16)], size: u32) -> Vec<u32> {
    let size = rounded_up(size as usize);
    let mut walks: Vec<Walk<'_>> = backends
        .iter()
        .zip(0..)
        .filter(|((_, weight), _)| *weight > 0)
        .map(|(&(name, weight), index)| Walk::new(name, weight, index, size))
        .collect();
    walks.sort_by(|a, b| a.name.cmp(b.name));
    let mut owed = shares(&walks, size);
    // Who has a slot, and how early in its walk that was.
    let mut slots: Vec<Option<(Claim, usize)>> = vec![None; if walks.is_empty() { 0 } else { size as usize }];
    let mut walking: Vec<usize> = (0..walks.len()).rev().collect();
    while let Some(who) = walking.pop() {
        // There are as many slots as are owed, so whoever is owed one finds one before its walk ends.
        while owed[who] > 0 {
            let (slot, claim) = walks[who].step(size);
            let held = &mut slots[slot as usize];
            match *held {
                Some((better, holder)) if (better, holder) < (claim, who) => continue,
                Some((_, loser)) => {
                    owed[loser] += 1;
                    walking.push(loser);
                }
                None => {}
            }
            *held = Some((claim, who));
            owed[who] -= 1;
        }
    }
    slots.into_iter().flatten().map(|(_, who)| walks[who].index).collect()
}

/// How early in its walk a backend came to a slot, in relation to its weight; less is earlier.
type Claim = u64;

/// One backend on its way through the table.
struct Walk<'a> {
    name: &'a str,
    weight: u64,
    index: u32,
    /// Slot that it looks at next.
    at: u32,
    /// How far it goes on from one to the next.
    skip: u32,
    /// Slots that it has looked at.
    steps: u64,
}

impl<'a> Walk<'a> {
    fn new(name: &'a str, weight: u16, index: u32, size: u32) -> Walk<'a> {
        let hash = fnv128(name.as_bytes());
        let low = mixed(hash as u64);
        let high = mixed((hash >> 64) as u64 ^ low);
        let at = (low % u64::from(size)) as u32;
        let skip = (high % u64::from(size - 1)) as u32 + 1;
        Walk { name, weight: weight.into(), index, at, skip, steps: 0 }
    }

    /// The next slot of the walk, and the claim to it.
    fn step(&mut self, size: u32) -> (u32, Claim) {
        let at = self.at;
        self.at = (self.at + self.skip) % size;
        self.steps += 1;
        (at, (self.steps << 32) / self.weight)
    }
}

/// How many slots each is owed: in proportion to weight, rounded down, and what is left over to those
/// who lost most by that, in order of name. All slots together.
fn shares(walks: &[Walk<'_>], size: u32) -> Vec<u32> {
    let total = walks.iter().map(|walk| walk.weight).sum::<u64>().max(1);
    let earned = |walk: &Walk<'_>| u64::from(size) * walk.weight;
    let mut owed: Vec<u32> = walks.iter().map(|walk| (earned(walk) / total) as u32).collect();
    let left = size as usize - owed.iter().sum::<u32>() as usize;
    let mut by_loss: Vec<usize> = (0..walks.len()).collect();
    by_loss.sort_by_key(|who| std::cmp::Reverse(earned(&walks[*who]) % total));
    for who in by_loss.into_iter().take(left) {
        owed[who] += 1;
    }
    owed
}

/// Spreads the bits of a hash: each bit in moves half of the bits out (the finalizer of SplitMix64).
fn mixed(hash: u64) -> u64 {
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

fn rounded_up(least: usize) -> u32 {
    SIZES.into_iter().find(|size| *size as usize >= least).unwrap_or(SIZES[SIZES.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u32 = 16_381;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("10.244.{}.{}:8080", i / 250, i % 250 + 1)).collect()
    }

    fn even(names: &[String]) -> Vec<(&str, u16)> {
        names.iter().map(|name| (name.as_str(), 1)).collect()
    }

    fn counted(table: &[u32], backends: usize) -> Vec<f64> {
        let mut shares = vec![0.0; backends];
        for &index in table {
            shares[index as usize] += 1.0;
        }
        shares
    }

    #[test]
    fn a_hundred_backends_have_even_shares() {
        let names = names(100);
        let fair = f64::from(SIZE) / 100.0;
        for share in counted(&table(&even(&names), SIZE), 100) {
            assert!((share - fair).abs() <= fair * 0.01, "{share} slots where {fair} are fair");
        }
    }

    #[test]
    fn weights_are_kept_within_two_percent() {
        let names = names(100);
        let weighted: Vec<(&str, u16)> =
            even(&names).into_iter().zip((1..=4).cycle()).map(|((n, _), w)| (n, w)).collect();
        let total: f64 = weighted.iter().map(|(_, w)| f64::from(*w)).sum();
        for ((name, weight), share) in weighted.iter().zip(counted(&table(&weighted, SIZE), 100)) {
            let fair = f64::from(SIZE) * f64::from(*weight) / total;
            assert!((share - fair).abs() <= fair * 0.02, "{name}: {share} slots where {fair} are fair");
        }
    }

    #[test]
    fn removing_any_one_backend_moves_at_most_a_hundredth_of_the_others_slots() {
        let names = names(100);
        let before = table(&even(&names), SIZE);
        for gone in 0..100 {
            let mut left = names.clone();
            left.remove(gone);
            let after = table(&even(&left), SIZE);
            let moved = (0..SIZE as usize).filter(|&slot| {
                let was = before[slot] as usize;
                was != gone && names[was] != left[after[slot] as usize]
            });
            let (moved, others) = (moved.count(), SIZE as usize * 99 / 100);
            assert!(moved * 100 <= others, "without {}: {moved} of {others} slots moved", names[gone]);
        }
    }

    #[test]
    fn the_table_stays_what_it_is() {
        // Nodes of different builds share flows: a change of the hash or of the order of turns is a
        // change of the protocol between them.
        let names = ["10.0.0.1:80", "10.0.0.2:80", "[fd00::1]:80"];
        let slots = table(&[(names[0], 1), (names[1], 2), (names[2], 1)], 251);
        let text: String = slots.iter().map(|index| char::from(b'a' + *index as u8)).collect();
        assert_eq!(format!("{:032x}", fnv128(text.as_bytes())), "1061be8b550f95d4fdb6767d4395f9d3");
    }

    #[test]
    fn sizes_are_prime_and_chosen_by_the_number_of_backends() {
        for size in SIZES {
            assert!((2..size).take_while(|d| d * d <= size).all(|d| size % d != 0), "{size}");
        }
        assert_eq!(
            [0, 1, 2, 3, 100, 163, 164, 5000].map(size_for),
            [251, 251, 251, 509, 16_381, 16_381, 32_749, 131_071]
        );
        assert_eq!(table(&[("a", 1)], 1).len(), 251);
    }

    #[test]
    fn who_has_no_weight_gets_no_slot() {
        let slots = table(&[("a", 0), ("b", 3), ("c", 0)], 251);
        assert!(slots.iter().all(|index| *index == 1));
        assert!(table(&[("a", 0)], 251).is_empty());
        assert!(table(&[], 251).is_empty());
    }

    #[test]
    fn more_backends_than_slots_fill_the_table_once() {
        let names = names(300);
        let slots = table(&even(&names), 251);
        assert!(counted(&slots, 300).iter().all(|share| *share <= 1.0));
    }

    proptest! {
        #[test]
        fn the_order_of_the_input_changes_nothing(
            backends in proptest::collection::btree_map("[a-z0-9.:]{1,12}", 1u16..100, 1..40),
            shuffle in any::<u64>(),
        ) {
            let one: Vec<(&str, u16)> = backends.iter().map(|(name, weight)| (name.as_str(), *weight)).collect();
            let mut other = one.clone();
            other.sort_by_key(|(name, _)| mixed(fnv128(name.as_bytes()) as u64 ^ shuffle));
            let (a, b) = (table(&one, 1021), table(&other, 1021));
            for (x, y) in a.iter().zip(&b) {
                prop_assert_eq!(one[*x as usize].0, other[*y as usize].0);
            }
        }

        #[test]
        fn every_share_is_within_one_slot_of_fair(
            backends in proptest::collection::btree_map("[a-z0-9.:]{1,12}", 1u16..=u16::MAX, 1..30),
        ) {
            let list: Vec<(&str, u16)> = backends.iter().map(|(name, weight)| (name.as_str(), *weight)).collect();
            let total: f64 = list.iter().map(|(_, weight)| f64::from(*weight)).sum();
            for ((_, weight), share) in list.iter().zip(counted(&table(&list, 4093), list.len())) {
                let fair = 4093.0 * f64::from(*weight) / total;
                prop_assert!((share - fair).abs() < 1.0, "{} {}", share, fair);
            }
        }
    }
}
