//! Numbers and rows: service ports in, writes out.
//!
//! # The order of writes
//!
//! The packet path reads while user space writes, so after every single [`Write`] what stands in the
//! tables is sound: a row leads to slots that are complete, slots to backends that exist and belong
//! to the row's service. Hence new backends first, then a new range of slots, then the row (one
//! atomic replacement), and only then are backends that went away emptied. A range that a row leads
//! to is never written again; ranges and numbers that were given back are reused as late as possible.
//! The epoch moves last.

mod audit;
mod change;
mod error;
mod numbers;
mod restore;
mod rows;
#[cfg(test)]
mod tests;
mod wanted;

pub use audit::Difference;
pub use error::TableError;
pub use restore::Restored;

use super::{Backend, PortId, ServicePort};
use change::{Change, Planned};
use cirri_abi::{Addr, BackendState, RangeKey, Service, ServiceKey, epoch_slot, map};
use numbers::{Numbers, Ranges};
use rows::{NodePorts, Refusal, is_own};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use wanted::{Make, Place, Wanted};

/// How much the tables hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Rows of addresses.
    pub services: u32,
    /// Backends, number 0 (nobody) included.
    pub backends: u32,
    /// Slots.
    pub slots: u32,
    /// Ranges of clients.
    pub ranges: u32,
}

impl Default for Capacity {
    fn default() -> Capacity {
        Capacity {
            services: map::SERVICES.max_entries,
            backends: map::BACKENDS.max_entries,
            slots: map::SERVICE_SLOTS.max_entries,
            ranges: map::SOURCE_RANGES.max_entries,
        }
    }
}

/// One change of a kernel table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// The backend with this number; all zero: there is none any more. A number that comes into use
    /// had another owner before: clear its counter.
    Backend(u32, cirri_abi::Backend),
    /// A range of slots, from `first` on.
    Slots {
        /// First slot.
        first: u32,
        /// Backend numbers.
        backends: Vec<u32>,
    },
    /// A row of an address.
    Service(ServiceKey, Service),
    /// No such row any more.
    RemoveService(ServiceKey),
    /// A range of clients.
    Range(RangeKey),
    /// No such range any more.
    RemoveRange(RangeKey),
    /// Bits of the ports that services have at the node's own addresses.
    NodePorts {
        /// Index in `NODE_PORTS`.
        word: u32,
        /// All 64 bits of it.
        bits: u64,
    },
    /// Move this epoch on.
    Bump(u16),
}

/// How full the tables are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Service ports.
    pub ports: u32,
    /// Rows of addresses.
    pub services: u32,
    /// Backends.
    pub backends: u32,
    /// Slots.
    pub slots: u32,
    /// Ranges of clients.
    pub ranges: u32,
}

/// What stands in the tables, by whom.
///
/// Legal order: [`Tables::restore`] first, if at all; then [`Tables::set`] and [`Tables::remove`] in
/// any order; [`Tables::sweep`] once everything that there is has been set. Every [`Write`] that comes
/// back must be carried out, in order, before the next call's.
#[derive(Clone, Debug)]
pub struct Tables {
    capacity: Capacity,
    ports: BTreeMap<Arc<PortId>, Installed>,
    /// Service ports by number.
    by_number: HashMap<u32, Arc<PortId>>,
    /// Backends by number: whose, and which of theirs.
    by_backend: HashMap<u32, (Arc<PortId>, usize)>,
    owners: HashMap<ServiceKey, Owner>,
    /// Every address whose rows decide about the rest of it (the node's own left out).
    addresses: HashMap<Addr, Refusal>,
    /// How many of them have their own row.
    refusals: u32,
    node_ports: NodePorts,
    numbers: Numbers,
    backends: Numbers,
    slots: Ranges,
    ranges: u32,
    /// What a process before this one left, by the service's number, until somebody claims it.
    inherited: HashMap<u32, Live>,
    /// Backend numbers that a broken table left, until the sweep.
    strays: Vec<u32>,
}

/// A service port and its rows.
#[derive(Clone, Debug)]
struct Installed {
    port: ServicePort,
    live: Live,
    /// Backends of it were withdrawn, because a change did not fit.
    withdrawn: bool,
}

/// What stands in the kernel's tables under one service number.
#[derive(Clone, Debug, Default)]
struct Live {
    number: u32,
    rows: Vec<(ServiceKey, Service)>,
    backends: HashMap<Place, (u32, cirri_abi::Backend)>,
    /// Those of the rows whose addresses have other uses too.
    shared: Vec<ServiceKey>,
    /// Those whose addresses were given to the service as a whole.
    refusing: Vec<ServiceKey>,
    ranges: Vec<RangeKey>,
    sets: Vec<Set>,
}

/// A range of slots and what is in it.
#[derive(Clone, Debug, PartialEq)]
struct Set {
    first: u32,
    count: u32,
    made: Made,
    /// Of its slots, so that what stands in the kernel can be compared without making them again.
    digest: u64,
}

/// What tells whether a set is the wanted one.
#[derive(Clone, Debug, PartialEq)]
enum Made {
    /// It was made so, of these backend numbers and weights.
    Of(Make, Vec<(u32, u16)>),
    /// It was found so.
    Found(Vec<u32>),
}

#[derive(Clone, Debug, PartialEq)]
enum Owner {
    Port(Arc<PortId>),
    /// What was there before, under this service number.
    Inherited(u32),
}

impl Tables {
    /// Nothing in it.
    pub fn new(capacity: Capacity) -> Tables {
        Tables {
            capacity,
            ports: BTreeMap::new(),
            by_number: HashMap::new(),
            by_backend: HashMap::new(),
            owners: HashMap::new(),
            addresses: HashMap::new(),
            refusals: 0,
            node_ports: NodePorts::default(),
            numbers: Numbers::new(capacity.services),
            backends: Numbers::new(capacity.backends.saturating_sub(1)),
            slots: Ranges::new(capacity.slots),
            ranges: 0,
            inherited: HashMap::new(),
            strays: Vec::new(),
        }
    }

    /// Takes a service port, new or changed. Nothing changed: no writes.
    ///
    /// # Errors
    /// If it is not valid, if somebody else has one of its addresses and ports, or if it does not fit
    /// beside what it replaces. Nothing changes then.
    pub fn set(&mut self, port: &ServicePort) -> Result<Vec<Write>, TableError> {
        if self.ports.get(&port.id).is_some_and(|old| old.port == *port && !old.withdrawn) {
            return Ok(Vec::new());
        }
        let wanted = Wanted::of(port)?;
        self.check_owners(port, &wanted)?;
        let heir = match self.ports.get(&port.id) {
            Some(_) => None,
            None => self.heir(&wanted),
        };
        let nothing = Live::default();
        let old = match (self.ports.get(&port.id), heir) {
            (Some(installed), _) => &installed.live,
            (None, Some(number)) => self.inherited.get(&number).unwrap_or(&nothing),
            (None, None) => &nothing,
        };
        self.check_room(port, &wanted, old)?;
        let known =
            wanted.backends.iter().map(|(place, _)| old.backends.get(place).map(|(n, _)| *n)).collect::<Vec<_>>();
        let planned = [0, 1, 2].map(|at| match wanted.sets[..at].iter().position(|other| *other == wanted.sets[at]) {
            Some(other) => Planned::SameAs(other),
            None => self.plan(&wanted, &wanted.sets[at], &known, old),
        });
        let places = self.places(port, &planned)?;
        // Nothing can fail from here on.
        let old = match (self.ports.remove(&port.id), heir.and_then(|number| self.inherited.remove(&number))) {
            (Some(installed), _) => installed.live,
            (None, Some(live)) => live,
            (None, None) => Live::default(),
        };
        let mut change = Change { port, wanted, old, planned, places };
        Ok(self.carry_out(&mut change))
    }

    /// What can be done of a change that [`Tables::set`] did not take, because it does not fit: whoever it
    /// gives to nobody any more gets no new connections, so that nothing is sent to addresses that others
    /// have now. All else stays as it was, until the port is set again.
    pub fn withdraw(&mut self, port: &ServicePort) -> Vec<Write> {
        let (Ok(wanted), Some(installed)) = (Wanted::of(port), self.ports.get_mut(&port.id)) else {
            return Vec::new();
        };
        let chosen: HashSet<usize> = wanted.sets.iter().flatten().map(|(index, _)| *index).collect();
        let states: HashMap<Place, (u8, bool)> = (wanted.backends.iter().enumerate())
            .map(|(index, (place, state))| (*place, (*state, chosen.contains(&index))))
            .collect();
        let mut writes = Vec::new();
        for (place, (number, row)) in &mut installed.live.backends {
            let state = match states.get(place) {
                Some((BackendState::DOWN, _)) => BackendState::DOWN,
                // Slots may still name it: whoever drains could be chosen there.
                Some((_, false)) if row.state == BackendState::ACTIVE => BackendState::ABSENT,
                Some(_) => row.state,
                None => BackendState::ABSENT,
            };
            if std::mem::replace(&mut row.state, state) != state {
                writes.push((*number, *row));
            }
        }
        if writes.is_empty() {
            return Vec::new();
        }
        installed.withdrawn = true;
        writes.sort_unstable_by_key(|(number, _)| *number);
        let bump = Write::Bump(epoch_of(installed.live.number));
        writes.into_iter().map(|(number, row)| Write::Backend(number, row)).chain([bump]).collect()
    }

    /// Takes a service port away.
    pub fn remove(&mut self, id: &PortId) -> Vec<Write> {
        let Some(Installed { live, .. }) = self.ports.remove(id) else { return Vec::new() };
        self.by_number.remove(&live.number);
        self.clear(live)
    }

    /// Gives a service port another pool of sources; 0 is the node's own addresses.
    ///
    /// # Errors
    /// As [`Tables::set`].
    pub fn set_pool(&mut self, id: &PortId, pool: u32) -> Result<Vec<Write>, TableError> {
        let Some(installed) = self.ports.get(id) else { return Ok(Vec::new()) };
        let port = ServicePort { pool, ..installed.port.clone() };
        self.set(&port)
    }

    /// Every service port with its number, by name.
    pub fn ports(&self) -> impl Iterator<Item = (u32, &ServicePort)> {
        self.ports.values().map(|installed| (installed.live.number, &installed.port))
    }

    /// A service port, with its number.
    pub fn port(&self, id: &PortId) -> Option<(u32, &ServicePort)> {
        self.ports.get(id).map(|installed| (installed.live.number, &installed.port))
    }

    /// The service port with this number (`Service::id`, `Backend::service`).
    pub fn by_number(&self, number: u32) -> Option<&ServicePort> {
        let id = self.by_number.get(&number)?;
        self.ports.get(id).map(|installed| &installed.port)
    }

    /// The backend with this number, and whose it is.
    pub fn backend(&self, number: u32) -> Option<(&PortId, &Backend)> {
        let (id, index) = self.by_backend.get(&number)?;
        let installed = self.ports.get(id)?;
        Some((&installed.port.id, installed.port.backends.get(*index)?))
    }

    /// The numbers of a service port's backends, each with the backend, by number.
    pub fn backends(&self, id: &PortId) -> Vec<(u32, &Backend)> {
        let Some(installed) = self.ports.get(id) else { return Vec::new() };
        let number = |backend: &Backend| installed.live.backends.get(&(backend.addr.into(), backend.port));
        let mut all: Vec<_> =
            installed.port.backends.iter().filter_map(|backend| Some((number(backend)?.0, backend))).collect();
        all.sort_by_key(|(number, _)| *number);
        all
    }

    /// Who has an address and port.
    pub fn owner(&self, key: &ServiceKey) -> Option<&PortId> {
        match self.owners.get(key)? {
            Owner::Port(id) => Some(id),
            Owner::Inherited(_) => None,
        }
    }

    /// How full the tables are.
    pub fn usage(&self) -> Usage {
        Usage {
            ports: self.ports.len() as u32,
            services: self.rows(),
            backends: self.capacity.backends.saturating_sub(1) - self.backends.free(),
            slots: self.slots.used(),
            ranges: self.ranges,
        }
    }

    /// How much the tables hold.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn rows(&self) -> u32 {
        self.owners.len() as u32 + self.refusals
    }

    fn check_owners(&self, port: &ServicePort, wanted: &Wanted) -> Result<(), TableError> {
        for (key, ..) in &wanted.rows {
            if let Some(owner) = self.owner(key).filter(|owner| **owner != port.id) {
                return Err(TableError::Taken {
                    wanted: Box::new(port.id.clone()),
                    owner: Box::new(owner.clone()),
                    addr: key.addr.into(),
                    port: key.port.number(),
                });
            }
        }
        Ok(())
    }

    /// The number that this port had in the process before: that of the first of its rows that is
    /// still unclaimed.
    fn heir(&self, wanted: &Wanted) -> Option<u32> {
        wanted.rows.iter().find_map(|(key, ..)| match self.owners.get(key)? {
            Owner::Inherited(number) => Some(*number),
            Owner::Port(_) => None,
        })
    }

    /// Counts before anything changes. Old and new stand side by side for a moment.
    fn check_room(&self, port: &ServicePort, wanted: &Wanted, old: &Live) -> Result<(), TableError> {
        let room = |what, needed: usize, free: u32, capacity| {
            let needed = needed as u32;
            match needed <= free {
                true => Ok(()),
                false => Err(TableError::Full { id: Box::new(port.id.clone()), what, needed, free, capacity }),
            }
        };
        let Capacity { services, backends, ranges, .. } = self.capacity;
        let mut rows = 0;
        let mut addresses = HashSet::new();
        let [refusing, shared] = [&wanted.refusing, &wanted.shared].map(|keys| keys.iter().collect::<HashSet<_>>());
        for (key, ..) in &wanted.rows {
            rows += usize::from(!self.owners.contains_key(key));
            let refuses = !is_own(key.addr) && refusing.contains(key) && !shared.contains(key);
            if refuses && !self.addresses.get(&key.addr).is_some_and(|refusal| refusal.stands) {
                addresses.insert(key.addr);
            }
        }
        room("rows of addresses", rows + addresses.len(), services.saturating_sub(self.rows()), services)?;
        room("numbers of services", usize::from(old.number == 0), self.numbers.free(), services)?;
        let new = wanted.backends.iter().filter(|(place, _)| !old.backends.contains_key(place)).count();
        room("backends", new, self.backends.free(), backends)?;
        let before: HashSet<&RangeKey> = old.ranges.iter().collect();
        let known = |key: &RangeKey| before.contains(&RangeKey { service: old.number, ..*key });
        let new = wanted.ranges.iter().filter(|key| !known(key)).count();
        room("ranges of clients", new, ranges.saturating_sub(self.ranges), ranges)
    }

    /// What becomes of one set: an old range, if one is made of the same, or a new one.
    fn plan(&self, wanted: &Wanted, members: &[(usize, u16)], known: &[Option<u32>], old: &Live) -> Planned {
        if members.is_empty() {
            return Planned::Empty;
        }
        let numbered: Option<Vec<(u32, u16)>> =
            members.iter().map(|(index, weight)| Some(((*known.get(*index)?)?, *weight))).collect();
        if let Some(numbered) = numbered {
            let same = old.sets.iter().find(|set| match &set.made {
                Made::Of(make, members) => *make == wanted.make && *members == numbered,
                Made::Found(slots) => {
                    let weights: Vec<u16> = numbered.iter().map(|(_, weight)| *weight).collect();
                    slots.len() as u32 == wanted.make.count(&weights)
                        && *slots == slots_of(wanted, members, |index| known[index].unwrap_or(0))
                }
            });
            if let Some(set) = same {
                let made = Made::Of(wanted.make, numbered);
                return Planned::Kept(Set { first: set.first, count: set.count, made, digest: set.digest });
            }
        }
        let weights: Vec<u16> = members.iter().map(|(_, weight)| *weight).collect();
        Planned::New(wanted.make.count(&weights))
    }

    /// The first slots of what is new; all or none.
    fn places(&mut self, port: &ServicePort, planned: &[Planned; 3]) -> Result<[u32; 3], TableError> {
        let counts = planned.each_ref().map(|one| if let Planned::New(count) = one { *count } else { 0 });
        let mut taken = [0; 3];
        for at in 0..3 {
            if counts[at] == 0 {
                continue;
            }
            let free = self.capacity.slots - self.slots.used();
            let Some(first) = self.slots.take(counts[at]) else {
                for before in (0..at).rev().filter(|before| counts[*before] > 0) {
                    self.slots.undo(taken[before], counts[before]);
                }
                let (id, capacity) = (Box::new(port.id.clone()), self.capacity.slots);
                return Err(TableError::Full { id, what: "slots", needed: Ranges::cost(counts[at]), free, capacity });
            };
            taken[at] = first;
        }
        Ok(taken)
    }
}

/// The epoch slot of the service with this number.
fn epoch_of(number: u32) -> u16 {
    let slots = u32::from(epoch_slot::LAST_SERVICE - epoch_slot::FIRST_SERVICE) + 1;
    epoch_slot::FIRST_SERVICE + (number % slots) as u16
}

/// Backend numbers of a set, slot for slot. Sets are made by name, never by number: nodes number
/// their backends differently and must choose alike.
fn slots_of(wanted: &Wanted, members: &[(usize, u16)], number: impl Fn(usize) -> u32) -> Vec<u32> {
    let names: Vec<String> = members.iter().map(|(index, _)| name_of(wanted.backends[*index].0)).collect();
    let named: Vec<(&str, u16)> =
        names.iter().zip(members).map(|(name, (_, weight))| (name.as_str(), *weight)).collect();
    wanted.make.slots(&named).into_iter().map(|at| number(members[at as usize].0)).collect()
}

/// The name of a backend in Maglev tables: address and port as people write them.
fn name_of(place: Place) -> String {
    std::net::SocketAddr::new(place.0.into(), place.1).to_string()
}
