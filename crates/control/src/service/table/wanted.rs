//! What a service port asks for, checked, without duplicates and still without numbers.

use super::TableError;
use crate::service::{FrontendKind, ServicePort, maglev};
use cirri_abi::{Addr, Algorithm, Port, RangeKey, ServiceKey, service_flag};
use ipnet::IpNet;
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;

/// Where a backend is: what makes it the same one.
pub type Place = (Addr, u16);

/// One service port's wishes.
pub struct Wanted {
    /// The rows' keys and flags, and whether they are addresses for the world.
    pub rows: Vec<(ServiceKey, u32, bool)>,
    /// Keys whose addresses have other uses too.
    pub shared: Vec<ServiceKey>,
    /// Keys whose addresses were given to the service as a whole: what it does not name there is refused.
    pub refusing: Vec<ServiceKey>,
    /// Place and state. Where several are given for one place, the first counts.
    pub backends: Vec<(Place, u8)>,
    /// Who may be given to clients inside, outside, and inside at addresses for the world: indexes into
    /// `backends`, with weight.
    pub sets: [Vec<(usize, u16)>; 3],
    /// How sets are made.
    pub make: Make,
    /// Keys of the ranges of clients; the service's number is still missing.
    pub ranges: Vec<RangeKey>,
}

/// How a set of slots is made from its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Make {
    /// Each member as often as its weight says.
    Random,
    /// A Maglev table of this size.
    Maglev(u32),
}

impl Wanted {
    /// Checks and sorts out what the port asks for.
    pub fn of(port: &ServicePort) -> Result<Wanted, TableError> {
        let id = || Box::new(port.id.clone());
        let mut rows: Vec<(ServiceKey, u32, bool)> = Vec::with_capacity(port.frontends.len());
        let mut known: HashMap<ServiceKey, usize> = HashMap::with_capacity(port.frontends.len());
        let mut shared = Once::default();
        let mut refusing = Once::default();
        for frontend in &port.frontends {
            if is_v6(frontend.addr) != port.id.v6 {
                return Err(TableError::FrontendFamily { id: id(), addr: frontend.addr.into() });
            }
            if frontend.port == 0 {
                return Err(TableError::NoPort { id: id() });
            }
            let key =
                ServiceKey { addr: frontend.addr, port: Port::new(frontend.port), proto: port.id.protocol, _pad: 0 };
            if frontend.shared {
                shared.push(key);
            }
            if is_given(frontend.kind) {
                refusing.push(key);
            }
            let flags = flags(port, frontend.kind);
            let world = !matches!(frontend.kind, FrontendKind::ClusterIp | FrontendKind::HostPort);
            match known.get(&key) {
                // One address for two reasons: what either of them opens is open, what either of
                // them restricts is restricted.
                Some(at) => {
                    let all = &mut rows[*at].1;
                    let inside_only = *all & flags & service_flag::INSIDE_ONLY;
                    *all = (*all | flags) & !service_flag::INSIDE_ONLY | inside_only;
                }
                None => {
                    known.insert(key, rows.len());
                    rows.push((key, flags, world));
                }
            }
        }
        let mut backends: Vec<(Place, u8)> = Vec::with_capacity(port.backends.len());
        let mut places: HashMap<Place, usize> = HashMap::with_capacity(port.backends.len());
        let mut index = Vec::with_capacity(port.backends.len());
        let mut weights = Vec::with_capacity(port.backends.len());
        for backend in &port.backends {
            if backend.addr.is_ipv6() != port.id.v6 {
                return Err(TableError::Family { id: id(), backend: backend.addr });
            }
            if backend.port == 0 {
                return Err(TableError::NoPort { id: id() });
            }
            let place = (Addr::from(backend.addr), backend.port);
            index.push(*places.entry(place).or_insert_with(|| {
                backends.push((place, backend.state));
                weights.push(backend.weight);
                backends.len() - 1
            }));
        }
        let members = |set: &[usize]| {
            let mut out: Vec<(usize, u16)> = Vec::with_capacity(set.len());
            let mut seen = vec![false; backends.len()];
            for &at in set {
                let Some(&index) = index.get(at) else { continue };
                if weights[index] > 0 && !std::mem::replace(&mut seen[index], true) {
                    out.push((index, weights[index]));
                }
            }
            out.sort_by_key(|(index, _)| (backends[*index].0.0.octets(), backends[*index].0.1));
            out
        };
        let (inside, outside) = (members(&port.inside), members(&port.outside));
        let within = match &port.within {
            Some(within) if rows.iter().any(|(_, _, world)| *world) => members(within),
            _ => inside.clone(),
        };
        let make = match (port.algorithm, port.maglev_size) {
            (Algorithm::MAGLEV, Some(size)) if !maglev::SIZES.contains(&size) => {
                return Err(TableError::MaglevSize { id: id(), size });
            }
            (Algorithm::MAGLEV, Some(size)) => Make::Maglev(size),
            (Algorithm::MAGLEV, None) => Make::Maglev(maglev::size_for(backends.len())),
            _ => Make::Random,
        };
        let mut ranges = Once::default();
        for net in port.ranges.iter().filter(|net| matches!(net, IpNet::V6(_)) == port.id.v6) {
            ranges.push(range_key(net));
        }
        let (shared, refusing, ranges) = (shared.all, refusing.all, ranges.all);
        Ok(Wanted { rows, shared, refusing, backends, sets: [inside, outside, within], make, ranges })
    }
}

/// Each once, in the order in which they came.
struct Once<T> {
    all: Vec<T>,
    known: HashSet<T>,
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Once { all: Vec::new(), known: HashSet::new() }
    }
}

impl<T: Copy + Eq + Hash> Once<T> {
    fn push(&mut self, one: T) {
        if self.known.insert(one) {
            self.all.push(one);
        }
    }
}

impl Make {
    /// How many slots a set of these weights takes.
    pub fn count(self, weights: &[u16]) -> u32 {
        match self {
            _ if weights.len() < 2 => weights.len() as u32,
            Make::Maglev(size) => size,
            Make::Random => repeats(weights).iter().sum(),
        }
    }

    /// The set: for each slot an index into `members`, which are names and weights (none is 0).
    pub fn slots(self, members: &[(&str, u16)]) -> Vec<u32> {
        match self {
            _ if members.len() < 2 => (0..members.len() as u32).collect(),
            Make::Maglev(size) => maglev::table(members, size),
            Make::Random => {
                let weights: Vec<u16> = members.iter().map(|(_, weight)| *weight).collect();
                let repeated = repeats(&weights).into_iter().zip(0..);
                repeated.flat_map(|(times, index)| (0..times).map(move |_| index)).collect()
            }
        }
    }
}

/// How often each stands in a set of random choice: as its weight says, in lowest terms, and rounded
/// (but at least once) where that would take too many slots.
fn repeats(weights: &[u16]) -> Vec<u32> {
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    let total: u64 = weights.iter().map(|weight| u64::from(weight / divisor)).sum();
    // At this size a share is off by a few percent of the smallest at most.
    let limit = (weights.len() as u64 * 32).max(1024);
    let scaled = |weight: &u16| {
        let weight = u64::from(weight / divisor);
        if total <= limit { weight } else { ((weight * limit + total / 2) / total).max(1) }
    };
    weights.iter().map(|weight| scaled(weight) as u32).collect()
}

fn gcd(a: u16, b: u16) -> u16 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Whether an address of this kind is the service's, with all of its ports. One that its owner brings may be anybody's:
/// he must not be able to cut others off from the rest of it.
fn is_given(kind: FrontendKind) -> bool {
    matches!(kind, FrontendKind::ClusterIp | FrontendKind::LoadBalancer)
}

fn flags(port: &ServicePort, kind: FrontendKind) -> u32 {
    match kind {
        FrontendKind::ClusterIp if port.inside_only_cluster_ip => service_flag::INSIDE_ONLY,
        FrontendKind::LoadBalancer | FrontendKind::ExternalIp if !port.ranges.is_empty() => {
            service_flag::RANGES | if port.ranges_deny { service_flag::RANGES_DENY } else { 0 }
        }
        FrontendKind::HostPort => service_flag::THIS_NODE,
        _ => 0,
    }
}

fn range_key(net: &IpNet) -> RangeKey {
    let net = net.trunc();
    let family = if matches!(net, IpNet::V4(_)) { 96 } else { 0 };
    let prefix_len = 32 + family + u32::from(net.prefix_len());
    RangeKey { prefix_len, service: 0, addr: net.addr().into() }
}

fn is_v6(addr: Addr) -> bool {
    matches!(IpAddr::from(addr), IpAddr::V6(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_repeats_in_lowest_terms() {
        assert_eq!(repeats(&[1, 1, 1]), [1, 1, 1]);
        assert_eq!(repeats(&[100, 50, 200]), [2, 1, 4]);
        assert_eq!(repeats(&[7]), [1]);
    }

    #[test]
    fn weights_that_would_take_too_many_slots_are_rounded_and_nobody_is_lost() {
        let repeats = repeats(&[65_535, 65_534, 1]);
        assert_eq!(repeats, [512, 512, 1]);
    }

    #[test]
    fn a_set_of_one_takes_one_slot() {
        for make in [Make::Random, Make::Maglev(16_381)] {
            assert_eq!((make.count(&[9]), make.slots(&[("a", 9)])), (1, vec![0]));
            assert_eq!((make.count(&[]), make.slots(&[])), (0, vec![]));
        }
        assert_eq!(Make::Maglev(251).count(&[1, 2]), 251);
    }
}
