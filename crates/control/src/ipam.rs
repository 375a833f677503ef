//! Addresses: the cluster's pool cut into one range per node, and the addresses of a range.

use crate::hash::fnv64;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// The cluster's pool of one family, cut into ranges of equal size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterPool {
    cidr: IpNet,
    node_prefix: u8,
}

impl ClusterPool {
    /// A pool whose nodes get ranges of `node_prefix` bits each.
    pub fn new(cidr: IpNet, node_prefix: u8) -> Result<ClusterPool, IpamError> {
        if node_prefix < cidr.prefix_len() || node_prefix > cidr.max_prefix_len().saturating_sub(2) {
            return Err(IpamError::NodePrefix {
                cidr,
                node_prefix,
                least: cidr.prefix_len(),
                most: cidr.max_prefix_len() - 2,
            });
        }
        Ok(ClusterPool { cidr: cidr.trunc(), node_prefix })
    }

    /// The whole pool.
    pub fn cidr(&self) -> IpNet {
        self.cidr
    }

    /// How many nodes find room; `u64::MAX` stands for that many or more.
    pub fn capacity(&self) -> u64 {
        1u64.checked_shl(u32::from(self.node_prefix - self.cidr.prefix_len())).unwrap_or(u64::MAX)
    }

    /// Whether the range is one of this pool's.
    pub fn owns(&self, range: IpNet) -> bool {
        range.prefix_len() == self.node_prefix && self.cidr.contains(&range)
    }

    /// A range that is not in `taken`, for `node` to try to create in the store. It begins at a place that the
    /// node's name says, so that a node that comes back finds its own range and nodes that start together seldom
    /// want the same. On a refusal, add that range to `taken` and ask again.
    pub fn propose(&self, node: &str, taken: &BTreeSet<IpNet>) -> Result<IpNet, IpamError> {
        let capacity = self.capacity();
        let start = fnv64(node.as_bytes()) % capacity;
        // Of any `taken + 1` ranges in a row one is free.
        let tries = capacity.min(taken.len() as u64 + 1);
        (0..tries)
            .map(|i| self.range(((u128::from(start) + u128::from(i)) % u128::from(capacity)) as u64))
            .find(|range| !taken.contains(range))
            .ok_or(IpamError::NoRange { cidr: self.cidr, node_prefix: self.node_prefix, nodes: taken.len() })
    }

    fn range(&self, index: u64) -> IpNet {
        let shift = u32::from(self.cidr.max_prefix_len() - self.node_prefix);
        let base = bits(self.cidr.network()) + (u128::from(index) << shift);
        match self.cidr {
            IpNet::V4(_) => IpNet::V4(Ipv4Net::new_assert((base as u32).into(), self.node_prefix)),
            IpNet::V6(_) => IpNet::V6(Ipv6Net::new_assert(base.into(), self.node_prefix)),
        }
    }
}

/// The addresses of one node's range.
///
/// The network's own address is never given out, nor IPv4's last (broadcast). Addresses go round:
/// one that was released is given out again only when the rest of the range had its turn, the one that was released
/// first before the others, so that late packets to its former owner do not reach a stranger, and a node that has not
/// heard of the change does not take the one for the other. [`Turn`] carries that over a restart.
#[derive(Clone, Debug)]
pub struct Pool {
    cidr: IpNet,
    first: u128,
    last: u128,
    used: BTreeSet<u128>,
    next: u128,
    /// Whether that is known from turns, and not guessed.
    is_turn_known: bool,
    /// Released, with a number that grows.
    released: BTreeMap<u128, u64>,
    releases: u64,
}

/// Whose turn it is in a range.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Turn {
    /// The range.
    pub cidr: IpNet,
    /// The address after the one that was given out last.
    pub next: IpAddr,
    /// Addresses that were released, in this order.
    pub released: Vec<IpAddr>,
}

/// As many released addresses are remembered: of more, those come back when they have their turn.
const REMEMBERED: usize = 1024;

impl Pool {
    /// All of `cidr` free.
    pub fn new(cidr: IpNet) -> Result<Pool, IpamError> {
        let (low, high) = (bits(cidr.network()), bits(cidr.broadcast()));
        let last = if cidr.addr().is_ipv4() { high.saturating_sub(1) } else { high };
        let first = low + 1;
        if high == low || first > last {
            return Err(IpamError::TooSmall { cidr });
        }
        let (used, released) = (BTreeSet::new(), BTreeMap::new());
        Ok(Pool { cidr: cidr.trunc(), first, last, used, next: first, is_turn_known: false, released, releases: 0 })
    }

    /// Whose turn it is.
    pub fn turn(&self) -> Turn {
        let mut released: Vec<(u64, u128)> = self.released.iter().map(|(number, when)| (*when, *number)).collect();
        released.sort_unstable();
        let released = released.into_iter().map(|(_, number)| self.address(number)).collect();
        Turn { cidr: self.cidr, next: self.address(self.next), released }
    }

    /// Goes on where an earlier run was. What it says of another range is left.
    pub fn resume(&mut self, turn: &Turn) {
        if turn.cidr != self.cidr {
            return;
        }
        self.next = self.number(turn.next).unwrap_or(self.first);
        self.is_turn_known = true;
        turn.released.iter().for_each(|address| self.note_release(*address));
    }

    /// The range.
    pub fn cidr(&self) -> IpNet {
        self.cidr
    }

    /// How many addresses are given out.
    pub fn used(&self) -> usize {
        self.used.len()
    }

    /// How many can be given out in all; `u64::MAX` stands for that many or more.
    pub fn capacity(&self) -> u64 {
        u64::try_from(self.last - self.first + 1).unwrap_or(u64::MAX)
    }

    /// The next free address that was not released lately or, if all were, the one that was released first.
    pub fn allocate(&mut self) -> Result<IpAddr, IpamError> {
        let fresh = self.free_from(self.next, self.last).or_else(|| self.free_from(self.first, self.last));
        let oldest = || self.released.iter().min_by_key(|(_, when)| **when).map(|(number, _)| *number);
        let Some(number) = fresh.or_else(oldest) else {
            return Err(IpamError::Exhausted { cidr: self.cidr, used: self.used.len() });
        };
        self.take(number);
        self.next = self.after(number);
        self.is_turn_known = true;
        Ok(self.address(number))
    }

    /// Takes one particular address.
    pub fn reserve(&mut self, address: IpAddr) -> Result<(), IpamError> {
        let number = self.number(address).ok_or(IpamError::Outside { address, cidr: self.cidr })?;
        if self.used.contains(&number) {
            return Err(IpamError::InUse { address });
        }
        self.take(number);
        Ok(())
    }

    /// An earlier run gave this address out: unless more is known of its turn, what comes next comes after the highest
    /// such.
    pub fn note_given(&mut self, address: IpAddr) {
        if let Some(number) = self.number(address).filter(|number| !self.is_turn_known && *number >= self.next) {
            self.next = self.after(number);
        }
    }

    /// Gives an address back. Answers false if it was not given out.
    pub fn release(&mut self, address: IpAddr) -> bool {
        let was_used = self.number(address).is_some_and(|number| self.used.remove(&number));
        if was_used {
            self.note_release(address);
        }
        was_used
    }

    fn take(&mut self, number: u128) {
        self.used.insert(number);
        self.released.remove(&number);
    }

    fn note_release(&mut self, address: IpAddr) {
        let Some(number) = self.number(address).filter(|number| !self.used.contains(number)) else { return };
        self.releases += 1;
        self.released.insert(number, self.releases);
        if self.released.len() > REMEMBERED
            && let Some(oldest) = self.released.iter().min_by_key(|(_, when)| **when).map(|(number, _)| *number)
        {
            self.released.remove(&oldest);
        }
    }

    /// Whether the address is given out.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.number(address).is_some_and(|number| self.used.contains(&number))
    }

    fn after(&self, number: u128) -> u128 {
        if number == self.last { self.first } else { number + 1 }
    }

    fn free_from(&self, from: u128, to: u128) -> Option<u128> {
        let is_free = |number: &u128| !self.used.contains(number) && !self.released.contains_key(number);
        // As many are not free at the most.
        let most = (self.used.len() + self.released.len()) as u128;
        (from..=to.min(from.saturating_add(most))).find(is_free)
    }

    fn number(&self, address: IpAddr) -> Option<u128> {
        let number = bits(address);
        (self.cidr.contains(&address) && (self.first..=self.last).contains(&number)).then_some(number)
    }

    fn address(&self, number: u128) -> IpAddr {
        match self.cidr {
            IpNet::V4(_) => IpAddr::V4((number as u32).into()),
            IpNet::V6(_) => IpAddr::V6(number.into()),
        }
    }
}

/// Why there is no address or no range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// The size of a node's range does not fit the pool.
    #[error("a node's range of /{node_prefix} does not fit the pool {cidr}; use /{least} to /{most}")]
    NodePrefix {
        /// The pool.
        cidr: IpNet,
        /// What was asked for.
        node_prefix: u8,
        /// Shortest possible prefix.
        least: u8,
        /// Longest possible prefix.
        most: u8,
    },
    /// Every range has its node.
    #[error(
        "every /{node_prefix} of the pool {cidr} is taken ({nodes} nodes); enlarge cluster.podCidr or use a longer prefix per node"
    )]
    NoRange {
        /// The pool.
        cidr: IpNet,
        /// Size of a node's range.
        node_prefix: u8,
        /// How many are taken.
        nodes: usize,
    },
    /// A range in which nothing is left once its own addresses are taken off.
    #[error("the range {cidr} has no address to give; use a shorter prefix")]
    TooSmall {
        /// The range.
        cidr: IpNet,
    },
    /// Every address is given out.
    #[error("all {used} addresses of {cidr} are in use; delete pods or give the node a larger range")]
    Exhausted {
        /// The range.
        cidr: IpNet,
        /// How many are given out.
        used: usize,
    },
    /// The address is not one that this range gives out.
    #[error("{address} is not an address that {cidr} gives out; release it where it came from")]
    Outside {
        /// The address.
        address: IpAddr,
        /// The range.
        cidr: IpNet,
    },
    /// Somebody has the address.
    #[error("{address} is in use already; choose another or leave the choice to the pool")]
    InUse {
        /// The address.
        address: IpAddr,
    },
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn a_small_range_gives_all_but_its_edges_and_then_says_so() {
        let mut pool = Pool::new(net("10.0.0.0/29")).unwrap();
        let got: Vec<String> = (0..6).map(|_| pool.allocate().unwrap().to_string()).collect();
        assert_eq!(got, ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
        assert!(matches!(pool.allocate(), Err(IpamError::Exhausted { used: 6, .. })));
        let mut v6 = Pool::new(net("fd00::/126")).unwrap();
        let got: Vec<String> = (0..3).map(|_| v6.allocate().unwrap().to_string()).collect();
        assert_eq!(got, ["fd00::1", "fd00::2", "fd00::3"]);
        assert!(matches!(Pool::new(net("10.0.0.0/31")), Err(IpamError::TooSmall { .. })));
        assert!(matches!(Pool::new(net("fd00::1/128")), Err(IpamError::TooSmall { .. })));
        assert!(Pool::new(net("0.0.0.0/0")).is_ok() && Pool::new(net("::/0")).is_ok());
    }

    #[test]
    fn a_released_address_waits_for_its_turn() {
        let mut pool = Pool::new(net("10.0.0.0/29")).unwrap();
        let first = pool.allocate().unwrap();
        assert!(pool.release(first));
        assert!(!pool.release(first));
        assert_ne!(pool.allocate().unwrap(), first);
    }

    #[test]
    fn what_was_released_first_comes_first_when_nothing_else_is_left_and_a_restart_changes_nothing() {
        for restart in [false, true] {
            let mut pool = Pool::new(net("10.0.0.0/29")).unwrap();
            let address = |last: u8| IpAddr::from([10, 0, 0, last]);
            // Somebody asks for the one that comes next but one, and leaves again.
            pool.reserve(address(2)).unwrap();
            assert!(pool.release(address(2)));
            assert_eq!([pool.allocate(), pool.allocate(), pool.allocate()], [1, 3, 4].map(|last| Ok(address(last))));
            for last in [4, 1] {
                assert!(pool.release(address(last)));
            }
            if restart {
                let turn = serde_json::to_string(&pool.turn()).unwrap();
                pool = Pool::new(net("10.0.0.0/29")).unwrap();
                pool.resume(&serde_json::from_str(&turn).unwrap());
                pool.reserve(address(3)).unwrap();
                // Known already, and no news of the turn.
                pool.note_given(address(6));
            }
            let got: Vec<IpAddr> = std::iter::from_fn(|| pool.allocate().ok()).collect();
            assert_eq!(got, [5, 6, 2, 4, 1].map(address), "restart: {restart}");
        }
        let mut other = Pool::new(net("10.0.1.0/29")).unwrap();
        other.resume(&Pool::new(net("10.0.0.0/29")).unwrap().turn());
        assert_eq!(other.allocate().unwrap().to_string(), "10.0.1.1");
    }

    #[test]
    fn a_restart_reserves_what_is_in_use_and_goes_on_after_it() {
        let mut pool = Pool::new(net("10.0.0.0/24")).unwrap();
        pool.reserve("10.0.0.7".parse().unwrap()).unwrap();
        pool.note_given("10.0.0.7".parse().unwrap());
        assert!(matches!(pool.reserve("10.0.0.7".parse().unwrap()), Err(IpamError::InUse { .. })));
        for outside in ["10.0.1.1", "10.0.0.0", "10.0.0.255", "fd00::1"] {
            assert!(matches!(pool.reserve(outside.parse().unwrap()), Err(IpamError::Outside { .. })), "{outside}");
        }
        assert_eq!(pool.allocate().unwrap().to_string(), "10.0.0.8");
    }

    #[test]
    fn nodes_get_ranges_of_their_own_until_the_pool_is_full() {
        let pool = ClusterPool::new(net("10.244.0.0/22"), 24).unwrap();
        let mut taken = BTreeSet::new();
        for node in ["a", "b", "c", "d"] {
            let range = pool.propose(node, &taken).unwrap();
            assert!(pool.owns(range) && taken.insert(range), "{range}");
        }
        assert!(matches!(pool.propose("e", &taken), Err(IpamError::NoRange { nodes: 4, .. })));
        assert_eq!(pool.propose("a", &BTreeSet::new()), pool.propose("a", &BTreeSet::new()));
        let v6 = ClusterPool::new(net("fd00:10:244::/48"), 112).unwrap();
        assert!(v6.owns(v6.propose("a", &BTreeSet::new()).unwrap()));
        assert!(matches!(ClusterPool::new(net("10.0.0.0/24"), 16), Err(IpamError::NodePrefix { .. })));
        assert!(matches!(ClusterPool::new(net("10.0.0.0/24"), 32), Err(IpamError::NodePrefix { .. })));
    }

    proptest! {
        #[test]
        fn no_address_is_given_twice(releases in proptest::collection::vec(any::<prop::sample::Index>(), 0..60)) {
            let mut pool = Pool::new(net("10.0.0.0/28")).unwrap();
            let mut held: Vec<IpAddr> = Vec::new();
            for index in releases {
                match pool.allocate() {
                    Ok(address) => {
                        prop_assert!(!held.contains(&address));
                        held.push(address);
                    }
                    Err(_) => prop_assert_eq!(held.len(), 14),
                }
                if held.len() > 7 {
                    let gone = held.swap_remove(index.index(held.len()));
                    prop_assert!(pool.release(gone));
                }
            }
            prop_assert_eq!(pool.used(), held.len());
        }
    }
}
