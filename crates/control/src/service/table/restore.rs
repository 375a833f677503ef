//! What a process before this one left in the tables: the same things keep their numbers.

use super::audit::digest;
use super::{Live, Made, NodePorts, Numbers, Owner, Ranges, Refusal, Set, Tables, Write, is_own};
use cirri_abi::{RangeKey, Service, ServiceKey};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// The kernel's tables as they were found.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// `SERVICES`.
    pub services: Vec<(ServiceKey, Service)>,
    /// `BACKENDS`, those that are not empty.
    pub backends: Vec<(u32, cirri_abi::Backend)>,
    /// `SERVICE_SLOTS` from slot 0 on: backend numbers. It may end early; sets beyond are written anew.
    pub slots: Vec<u32>,
    /// `SOURCE_RANGES`.
    pub ranges: Vec<RangeKey>,
    /// `NODE_PORTS`: word and bits, those that are not zero.
    pub node_ports: Vec<(u32, u64)>,
}

impl Tables {
    /// Begins with what a process before this one left. Whoever is set takes over the numbers of the
    /// service that had the first of its addresses and ports; as long as nobody does, nothing of it
    /// changes, and traffic flows as before. [`Tables::sweep`] ends that.
    ///
    /// Everything known until now is forgotten: call it first.
    pub fn restore(&mut self, found: Restored) {
        *self = Tables::new(self.capacity);
        let mut live: BTreeMap<u32, Live> = BTreeMap::new();
        let service = |live: &mut BTreeMap<u32, Live>, number: u32| {
            live.entry(number).or_insert_with(|| Live { number, ..Live::default() }).number
        };
        let mut taken = BTreeSet::new();
        for (number, backend) in found.backends {
            if backend == cirri_abi::Backend::default() {
                continue;
            }
            taken.insert(number);
            let id = service(&mut live, backend.service);
            let place = (backend.addr, backend.port.number());
            let Some(one) = live.get_mut(&id) else { continue };
            // Two of the same place: a broken table. The one that is not kept is emptied by the sweep.
            if let Some(twin) = one.backends.insert(place, (number, backend)) {
                self.strays.push(twin.0);
            }
        }
        self.backends = Numbers::without(self.capacity.backends.saturating_sub(1), &taken);
        let (alone, rows): (Vec<_>, Vec<_>) =
            found.services.into_iter().partition(|(key, _)| key.port.number() == 0 && key.proto == 0);
        for (key, _) in alone {
            self.addresses.entry(key.addr).or_default().stands = true;
            self.refusals += 1;
        }
        for (key, row) in rows {
            let id = service(&mut live, row.id);
            if let Some(one) = live.get_mut(&id) {
                one.rows.push((key, row));
                // Which of them it stands for is not known: as long as one is there, it does.
                if let Some(refusal) = self.addresses.get_mut(&key.addr) {
                    refusal.refusing += 1;
                    one.refusing.push(key);
                }
            }
            self.owners.insert(key, Owner::Inherited(id));
            if is_own(key.addr) {
                *self.node_ports.rows.entry(key.port.number()).or_default() += 1;
            }
        }
        for key in found.ranges {
            let id = service(&mut live, key.service);
            if let Some(one) = live.get_mut(&id) {
                one.ranges.push(key);
            }
            self.ranges += 1;
        }
        self.node_ports.words = found.node_ports.into_iter().collect();
        for one in live.values_mut() {
            one.sets = sets(&one.rows, &found.slots, &mut self.slots);
        }
        self.numbers = Numbers::without(self.capacity.services, &live.keys().copied().collect());
        self.inherited = live.into_iter().collect::<HashMap<_, _>>();
    }

    /// Everything that there is has been set: takes away what nobody has claimed.
    pub fn sweep(&mut self) -> Vec<Write> {
        let mut writes = Vec::new();
        let mut unclaimed: Vec<Live> = std::mem::take(&mut self.inherited).into_values().collect();
        unclaimed.sort_by_key(|live| live.number);
        for live in unclaimed {
            writes.extend(self.clear(live));
        }
        for number in std::mem::take(&mut self.strays) {
            self.give_back_backend(number, &mut writes);
        }
        let forgotten = |refusal: &Refusal| refusal.refusing == 0;
        let addresses: Vec<_> = self.addresses.iter().filter(|(_, it)| forgotten(it)).map(|(addr, _)| *addr).collect();
        for addr in addresses {
            self.settle_refusal(addr, &mut writes);
        }
        writes.extend(self.node_ports.sweep());
        writes
    }
}

impl NodePorts {
    /// Clears the bits of ports that have no row.
    fn sweep(&mut self) -> Vec<Write> {
        let mut right: BTreeMap<u32, u64> = BTreeMap::new();
        for port in self.rows.keys() {
            *right.entry(u32::from(*port) / 64).or_default() |= 1 << (port % 64);
        }
        let mut writes = Vec::new();
        for (word, bits) in &mut self.words {
            let wanted = right.get(word).copied().unwrap_or(0);
            if std::mem::replace(bits, wanted) != wanted {
                writes.push(Write::NodePorts { word: *word, bits: wanted });
            }
        }
        writes
    }
}

/// The ranges that a service's rows lead to. One that cannot be (it overlaps another's, or lies
/// beyond the table) is left out: its rows are then written anew as soon as somebody claims them.
fn sets(rows: &[(ServiceKey, Service)], slots: &[u32], ranges: &mut Ranges) -> Vec<Set> {
    let mut sets: Vec<Set> = Vec::new();
    for (_, row) in rows {
        for (first, count) in [(row.inside_first, row.inside_count), (row.outside_first, row.outside_count)] {
            if count == 0 || sets.iter().any(|set| (set.first, set.count) == (first, count)) {
                continue;
            }
            if ranges.reserve(first, count) {
                let content = slots.get(first as usize..first as usize + count as usize);
                let digest = digest(content.unwrap_or_default());
                let made = Made::Found(content.map(<[u32]>::to_vec).unwrap_or_default());
                sets.push(Set { first, count, made, digest });
            }
        }
    }
    sets
}
