//! The address blocks that policies name, and their numbers.

use crate::hash::fnv64;
use crate::resource::IpBlock;
use cirri_abi::Identity;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};

/// Every prefix that stands in an `ipBlock`, as `cidr` or as `except`, with a number.
///
/// An address belongs to the most specific of them that contains it, and a rule means all blocks
/// inside its `cidr` and not inside its exceptions. A number depends on its prefix alone (but for
/// the rare collision), so that it survives restarts and is not soon given to another prefix.
///
/// When blocks change, tables are written in the order that never opens anything: a new block
/// first in the address cache, then in the rule sets; a removed one first from the rule sets.
#[derive(Clone, Debug, Default)]
pub struct Blocks {
    blocks: BTreeMap<IpNet, Block>,
    numbers: BTreeSet<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    number: u32,
    users: usize,
}

impl Blocks {
    /// Number of the most specific block that contains the whole prefix; 0 if there is none.
    pub fn block_of(&self, prefix: IpNet) -> u32 {
        (0..=prefix.prefix_len())
            .rev()
            .filter_map(|length| IpNet::new(prefix.addr(), length).ok())
            .find_map(|net| self.blocks.get(&net.trunc()))
            .map_or(0, |block| block.number)
    }

    /// Every block with its number, in order of prefixes.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, u32)> + '_ {
        self.blocks.iter().map(|(net, block)| (*net, block.number))
    }

    /// The prefix of a number.
    pub fn prefix(&self, number: u32) -> Option<IpNet> {
        self.iter().find(|(_, n)| *n == number).map(|(net, _)| net)
    }

    /// Numbers of the blocks whose addresses at least one of the `ipBlock`s means, each once.
    ///
    /// Costs what they and the blocks inside them come to, not every one of these for every other.
    pub(super) fn meant_by(&self, meant: &[&IpBlock]) -> Vec<u32> {
        let mut walk = Walk::new(meant);
        let mut numbers = Vec::new();
        for root in outermost(meant) {
            for (net, block) in self.blocks.range(root..).take_while(|(net, _)| root.contains(*net)) {
                crate::work::step();
                if walk.is_meant(net) {
                    numbers.push(block.number);
                }
            }
        }
        numbers
    }

    /// Adds one use of each prefix of the block. Answers those that are new.
    pub(super) fn acquire(&mut self, block: &IpBlock) -> Vec<IpNet> {
        let mut new = Vec::new();
        for net in prefixes(block) {
            if let Some(known) = self.blocks.get_mut(&net) {
                known.users += 1;
                continue;
            }
            let number = self.free_number(net);
            self.numbers.insert(number);
            self.blocks.insert(net, Block { number, users: 1 });
            new.push(net);
        }
        new
    }

    /// Takes one use of each prefix of the block away. Answers those that are gone.
    pub(super) fn release(&mut self, block: &IpBlock) -> Vec<IpNet> {
        let mut gone = Vec::new();
        for net in prefixes(block) {
            let Some(known) = self.blocks.get_mut(&net) else { continue };
            known.users -= 1;
            if known.users == 0 {
                self.numbers.remove(&known.number);
                self.blocks.remove(&net);
                gone.push(net);
            }
        }
        gone
    }

    fn free_number(&self, net: IpNet) -> u32 {
        let count = Identity::MAX_BLOCK - Identity::MIN_BLOCK + 1;
        let mut at = (fnv64(net.to_string().as_bytes()) % u64::from(count)) as u32;
        while self.numbers.contains(&(Identity::MIN_BLOCK + at)) {
            at = (at + 1) % count;
        }
        Identity::MIN_BLOCK + at
    }
}

/// The widest of the prefixes, in order.
fn outermost(meant: &[&IpBlock]) -> Vec<IpNet> {
    let mut nets: Vec<IpNet> = meant.iter().map(|block| block.cidr.trunc()).collect();
    nets.sort_unstable();
    // What contains a prefix comes before it.
    nets.dedup_by(|next, widest| widest.contains(&*next));
    nets
}

/// Goes through prefixes in order, and knows at each how many of some `ipBlock`s mean it.
struct Walk {
    /// Prefixes at which an `ipBlock` begins to mean what is inside, or (`true`) ceases to; the next one last.
    ahead: Vec<(IpNet, usize, bool)>,
    /// Those that contain the prefix that was looked at last.
    inside: Vec<(IpNet, usize, bool)>,
    /// By `ipBlock`, how many of its exceptions do.
    excepted: Vec<u32>,
    /// How many `ipBlock`s mean it.
    count: usize,
}

impl Walk {
    fn new(meant: &[&IpBlock]) -> Walk {
        let marks = meant.iter().enumerate().flat_map(|(index, block)| {
            let except = block.except.iter().map(move |net| (net.trunc(), index, true));
            std::iter::once((block.cidr.trunc(), index, false)).chain(except)
        });
        let mut ahead: Vec<_> = marks.collect();
        ahead.sort_unstable_by(|one, other| other.cmp(one));
        Walk { ahead, inside: Vec::new(), excepted: vec![0; meant.len()], count: 0 }
    }

    /// Whether one means the prefix; each that is asked for comes after the one before.
    fn is_meant(&mut self, net: &IpNet) -> bool {
        while let Some(mark) = self.ahead.pop_if(|(next, ..)| *next <= *net) {
            self.leave(&mark.0);
            let (_, index, ends) = mark;
            self.excepted[index] += u32::from(ends);
            match (ends, self.excepted[index]) {
                (true, 1) => self.count -= 1,
                (false, _) => self.count += 1,
                _ => {}
            }
            self.inside.push(mark);
        }
        self.leave(net);
        self.count > 0
    }

    /// Leaves what does not contain the prefix.
    fn leave(&mut self, net: &IpNet) {
        while let Some((_, index, ends)) = self.inside.pop_if(|(around, ..)| !around.contains(net)) {
            match (ends, self.excepted[index]) {
                (true, 1) => self.count += 1,
                (false, _) => self.count -= 1,
                _ => {}
            }
            self.excepted[index] -= u32::from(ends);
        }
    }
}

fn prefixes(block: &IpBlock) -> impl Iterator<Item = IpNet> + '_ {
    std::iter::once(block.cidr).chain(block.except.iter().copied()).map(|net| net.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(cidr: &str, except: &[&str]) -> IpBlock {
        IpBlock { cidr: cidr.parse().unwrap(), except: except.iter().map(|e| e.parse().unwrap()).collect() }
    }

    fn of(blocks: &Blocks, prefix: &str) -> Option<String> {
        blocks.prefix(blocks.block_of(prefix.parse().unwrap())).map(|net| net.to_string())
    }

    #[test]
    fn an_address_belongs_to_the_most_specific_block() {
        let mut blocks = Blocks::default();
        assert_eq!(blocks.block_of("10.0.0.1/32".parse().unwrap()), 0);
        blocks.acquire(&block("0.0.0.0/0", &["10.0.0.0/8"]));
        blocks.acquire(&block("10.1.0.0/16", &[]));
        blocks.acquire(&block("fd00::/8", &[]));
        assert_eq!(of(&blocks, "10.1.2.3/32").as_deref(), Some("10.1.0.0/16"));
        assert_eq!(of(&blocks, "10.1.0.0/16").as_deref(), Some("10.1.0.0/16"));
        assert_eq!(of(&blocks, "10.0.0.0/9").as_deref(), Some("10.0.0.0/8"));
        assert_eq!(of(&blocks, "8.8.8.8/32").as_deref(), Some("0.0.0.0/0"));
        assert_eq!(of(&blocks, "0.0.0.0/0").as_deref(), Some("0.0.0.0/0"));
        assert_eq!(of(&blocks, "fd00::1/128").as_deref(), Some("fd00::/8"));
        assert_eq!(of(&blocks, "2001:db8::1/128"), None);
    }

    #[test]
    fn exceptions_may_lie_inside_each_other_and_side_by_side() {
        let mut blocks = Blocks::default();
        let wide = block(
            "10.0.0.0/8",
            &["10.1.2.0/24", "10.1.0.0/16", "10.1.0.0/24", "10.3.0.0/16", "10.2.255.0/24", "10.1.255.255/32"],
        );
        blocks.acquire(&wide);
        for net in ["10.1.3.0/24", "10.2.0.0/24", "10.2.255.7/32", "10.3.255.0/24", "10.4.0.0/16", "10.0.0.0/16"] {
            blocks.acquire(&block(net, &[]));
        }
        let mut meant: Vec<String> =
            blocks.meant_by(&[&wide]).into_iter().map(|n| blocks.prefix(n).unwrap().to_string()).collect();
        meant.sort();
        assert_eq!(meant, ["10.0.0.0/16", "10.0.0.0/8", "10.2.0.0/24", "10.4.0.0/16"]);
    }

    #[test]
    fn a_block_means_what_is_inside_it_but_not_inside_its_exceptions() {
        let mut blocks = Blocks::default();
        let wide = block("10.0.0.0/8", &["10.1.0.0/16"]);
        blocks.acquire(&wide);
        blocks.acquire(&block("10.1.2.0/24", &[]));
        blocks.acquire(&block("10.2.0.0/16", &[]));
        blocks.acquire(&block("0.0.0.0/0", &[]));
        let mut meant: Vec<String> =
            blocks.meant_by(&[&wide]).into_iter().map(|n| blocks.prefix(n).unwrap().to_string()).collect();
        meant.sort();
        assert_eq!(meant, ["10.0.0.0/8", "10.2.0.0/16"]);
    }

    #[test]
    fn numbers_do_not_depend_on_order_and_blocks_stay_while_somebody_names_them() {
        let (mut a, mut b) = (Blocks::default(), Blocks::default());
        let (x, y) = (block("10.0.0.0/8", &["10.1.0.0/16"]), block("10.1.0.0/16", &[]));
        a.acquire(&x);
        assert_eq!(a.acquire(&y), []);
        b.acquire(&y);
        b.acquire(&x);
        assert!(a.iter().eq(b.iter()));
        assert_eq!(a.release(&x), ["10.0.0.0/8".parse::<IpNet>().unwrap()]);
        assert_eq!(of(&a, "10.1.0.1/32").as_deref(), Some("10.1.0.0/16"));
        a.release(&y);
        assert_eq!(a.iter().count(), 0);
    }

    /// As the definition has it, one by one.
    fn meant_one_by_one(blocks: &Blocks, meant: &[IpBlock]) -> BTreeSet<u32> {
        let means = |one: &IpBlock, net: &IpNet| {
            one.cidr.contains(net) && !one.except.iter().any(|except| except.contains(net))
        };
        let of = blocks.iter().filter(|(net, _)| meant.iter().any(|one| means(one, net)));
        of.map(|(_, number)| number).collect()
    }

    proptest::proptest! {
        #[test]
        fn several_blocks_mean_what_each_of_them_means(
            wanted in proptest::collection::vec((0u8..4, 0u8..16, proptest::collection::vec((0u8..16, 1u8..4), 0..4)), 0..8),
            others in proptest::collection::vec((0u8..8, 0u8..16), 0..8),
        ) {
            let net = |length: u8, bits: u8| IpNet::new([bits << 4, 0, 0, 0].into(), length).unwrap().trunc();
            let wanted: Vec<IpBlock> = wanted.into_iter().map(|(length, bits, except)| {
                let cidr = net(length, bits);
                let inside = |(more, deeper): (u8, u8)| net(length + deeper, bits & !(15 >> length) | more >> length);
                let except = except.into_iter().map(inside).filter(|it| cidr.contains(it) && it.prefix_len() > length);
                IpBlock { cidr, except: except.collect() }
            }).collect();
            let mut blocks = Blocks::default();
            wanted.iter().for_each(|block| drop(blocks.acquire(block)));
            others.iter().for_each(|(length, bits)| drop(blocks.acquire(&IpBlock { cidr: net(*length, *bits), except: vec![] })));
            let found = blocks.meant_by(&wanted.iter().collect::<Vec<_>>());
            proptest::prop_assert_eq!(found.len(), found.iter().collect::<BTreeSet<_>>().len());
            proptest::prop_assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), meant_one_by_one(&blocks, &wanted));
        }
    }
}
