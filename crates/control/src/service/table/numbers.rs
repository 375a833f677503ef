//! Numbers and ranges that are handed out, and reused as late as possible: the packet path may still
//! be on its way with one that was given back a moment ago.

use std::collections::{BTreeSet, VecDeque};

/// Numbers from 1 up to a limit. Those never used come first, then the one given back longest ago.
#[derive(Clone, Debug)]
pub struct Numbers {
    fresh: u32,
    last: u32,
    back: VecDeque<u32>,
}

impl Numbers {
    /// Numbers 1 to `last`.
    pub fn new(last: u32) -> Numbers {
        Numbers { fresh: 1, last, back: VecDeque::new() }
    }

    /// All but those that are taken already; what is beyond the last number is not counted.
    pub fn without(last: u32, taken: &BTreeSet<u32>) -> Numbers {
        let fresh = taken.range(1..=last).next_back().map_or(1, |highest| highest + 1);
        let back = (1..fresh).filter(|number| !taken.contains(number)).collect();
        Numbers { fresh, last, back }
    }

    /// How many are free.
    pub fn free(&self) -> u32 {
        (self.last + 1).saturating_sub(self.fresh) + self.back.len() as u32
    }

    /// One of them.
    pub fn take(&mut self) -> Option<u32> {
        if self.fresh <= self.last {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        self.back.pop_front()
    }

    /// Gives one back; what was never one of them is passed over.
    pub fn give_back(&mut self, number: u32) {
        if (1..=self.last).contains(&number) {
            self.back.push_back(number);
        }
    }
}

/// Ranges of slots. They come in powers of two (the sizes of Maglev tables lie just below), split and
/// joined like buddies; what is given back is joined only when nothing else is left.
#[derive(Clone, Debug)]
pub struct Ranges {
    /// First slots of the free ranges, by the power of two.
    free: Vec<BTreeSet<u32>>,
    /// Given back: first slot and power of two.
    back: VecDeque<(u32, u32)>,
    used: u32,
}

impl Ranges {
    /// Slots 0 to `count - 1`.
    pub fn new(count: u32) -> Ranges {
        let mut free = vec![BTreeSet::new(); 32];
        let mut first = 0;
        for order in (0..31).rev() {
            if count & (1 << order) != 0 {
                free[order as usize].insert(first);
                first += 1 << order;
            }
        }
        Ranges { free, back: VecDeque::new(), used: 0 }
    }

    /// Slots that a range of this many takes.
    pub fn cost(count: u32) -> u32 {
        1 << order_of(count)
    }

    /// Slots that are taken.
    pub fn used(&self) -> u32 {
        self.used
    }

    /// The first slot of a range of `count`; `None` if no place is left for it.
    pub fn take(&mut self, count: u32) -> Option<u32> {
        let order = order_of(count);
        loop {
            if let Some(first) = self.split(order) {
                self.used += 1 << order;
                return Some(first);
            }
            let (first, order) = self.back.pop_front()?;
            self.join(first, order);
        }
    }

    /// Takes the range that begins at `first`. False if it is not free as a whole.
    pub fn reserve(&mut self, first: u32, count: u32) -> bool {
        let order = order_of(count);
        if !first.is_multiple_of(1 << order) {
            return false;
        }
        let holder = (order..31).find(|&o| self.free[o as usize].contains(&(first & !((1 << o) - 1))));
        let Some(holder) = holder else { return false };
        self.free[holder as usize].remove(&(first & !((1 << holder) - 1)));
        for smaller in (order..holder).rev() {
            let half = first & !((1 << smaller) - 1);
            self.free[smaller as usize].insert(half ^ (1 << smaller));
        }
        self.used += 1 << order;
        true
    }

    /// Gives a range back.
    pub fn give_back(&mut self, first: u32, count: u32) {
        let order = order_of(count);
        self.used -= 1 << order;
        self.back.push_back((first, order));
    }

    /// Gives a range back that nobody has been told of: it may be reused at once.
    pub fn undo(&mut self, first: u32, count: u32) {
        let order = order_of(count);
        self.used -= 1 << order;
        self.join(first, order);
    }

    fn split(&mut self, order: u32) -> Option<u32> {
        let holder = (order..31).find(|&o| !self.free[o as usize].is_empty())?;
        let first = self.free[holder as usize].pop_first()?;
        for smaller in order..holder {
            self.free[smaller as usize].insert(first + (1 << smaller));
        }
        Some(first)
    }

    fn join(&mut self, mut first: u32, mut order: u32) {
        while order < 30 && self.free[order as usize].remove(&(first ^ (1 << order))) {
            first &= !(1 << order);
            order += 1;
        }
        self.free[order as usize].insert(first);
    }
}

/// The power of two that holds this many.
fn order_of(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_number_is_reused_as_late_as_possible() {
        let mut numbers = Numbers::new(3);
        assert_eq!((numbers.take(), numbers.take(), numbers.free()), (Some(1), Some(2), 1));
        numbers.give_back(2);
        numbers.give_back(1);
        let order = [numbers.take(), numbers.take(), numbers.take(), numbers.take()];
        assert_eq!(order, [Some(3), Some(2), Some(1), None]);
        let mut numbers = Numbers::without(5, &BTreeSet::from([2, 4, 9]));
        let order: Vec<u32> = std::iter::from_fn(|| numbers.take()).collect();
        assert_eq!(order, [5, 1, 3].to_vec(), "nine is beyond the last");
    }

    #[test]
    fn a_range_is_reused_as_late_as_possible() {
        let mut ranges = Ranges::new(16);
        let first = ranges.take(3).unwrap();
        ranges.give_back(first, 3);
        for _ in 0..3 {
            assert_ne!(ranges.take(4), Some(first), "something else was free");
        }
        assert_eq!((ranges.take(4), ranges.take(1)), (Some(first), None));
    }

    #[test]
    fn a_whole_table_comes_back() {
        let mut ranges = Ranges::new(100);
        let taken: Vec<u32> = std::iter::from_fn(|| ranges.take(1)).collect();
        assert_eq!((taken.len(), ranges.used()), (100, 100));
        for first in taken {
            ranges.give_back(first, 1);
        }
        assert_eq!(
            (ranges.take(64), ranges.take(32), ranges.take(4), ranges.take(1)),
            (Some(0), Some(64), Some(96), None)
        );
    }

    proptest! {
        #[test]
        fn ranges_never_overlap(steps in proptest::collection::vec((0u32..20, any::<prop::sample::Index>()), 1..200)) {
            let mut ranges = Ranges::new(64);
            let mut live: Vec<(u32, u32)> = Vec::new();
            for (count, index) in steps {
                if count == 0 {
                    if !live.is_empty() {
                        let (first, count) = live.swap_remove(index.index(live.len()));
                        ranges.give_back(first, count);
                    }
                } else if let Some(first) = ranges.take(count) {
                    prop_assert!(first + count <= 64);
                    prop_assert!(live.iter().all(|(f, c)| first + count <= *f || f + c <= first));
                    live.push((first, count));
                }
            }
            let mut again = Ranges::new(64);
            for (first, count) in &live {
                prop_assert!(again.reserve(*first, *count));
                prop_assert!(!again.reserve(*first, *count));
            }
            prop_assert_eq!(again.used(), ranges.used());
        }
    }
}
