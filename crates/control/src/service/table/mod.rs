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

mod error;
mod numbers;
mod restore;
#[cfg(test)]
mod tests;
mod wanted;

pub use error::TableError;
pub use restore::Restored;

use super::{Backend, PortId, ServicePort};
use cirri_abi::{Addr, Port, RangeKey, Service, ServiceKey, epoch_slot, map, service_flag};
use numbers::{Numbers, Ranges};
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
    /// Every address that has rows (the node's own left out).
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
}

/// What stands in the kernel's tables under one service number.
#[derive(Clone, Debug, Default)]
struct Live {
    number: u32,
    rows: Vec<(ServiceKey, Service)>,
    backends: HashMap<Place, (u32, cirri_abi::Backend)>,
    ranges: Vec<RangeKey>,
    sets: Vec<Set>,
}

/// A range of slots and what is in it.
#[derive(Clone, Debug, PartialEq)]
struct Set {
    first: u32,
    count: u32,
    made: Made,
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

/// The row of an address alone.
#[derive(Clone, Copy, Debug, Default)]
struct Refusal {
    /// How many other rows the address has.
    rows: u32,
    /// Whether it stands in the table.
    stands: bool,
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
        if self.ports.get(&port.id).is_some_and(|old| old.port == *port) {
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
        let inside = self.plan(&wanted, &wanted.inside, &known, old);
        let outside = match wanted.inside == wanted.outside {
            true => Planned::Shared,
            false => self.plan(&wanted, &wanted.outside, &known, old),
        };
        let places = self.places(port, [&inside, &outside])?;
        // Nothing can fail from here on.
        let old = match (self.ports.remove(&port.id), heir.and_then(|number| self.inherited.remove(&number))) {
            (Some(installed), _) => installed.live,
            (None, Some(live)) => live,
            (None, None) => Live::default(),
        };
        let mut change = Change { port, wanted, old, planned: [inside, outside], places };
        Ok(self.carry_out(&mut change))
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
        for (key, _) in &wanted.rows {
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
        wanted.rows.iter().find_map(|(key, _)| match self.owners.get(key)? {
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
        for (key, _) in &wanted.rows {
            rows += usize::from(!self.owners.contains_key(key));
            if !is_own(key.addr) && !self.addresses.contains_key(&key.addr) {
                addresses.insert(key.addr);
            }
        }
        room("rows of addresses", rows + addresses.len(), services.saturating_sub(self.rows()), services)?;
        room("numbers of services", usize::from(old.number == 0), self.numbers.free(), services)?;
        let new = wanted.backends.iter().filter(|(place, _)| !old.backends.contains_key(place)).count();
        room("backends", new, self.backends.free(), backends)?;
        let known = |key: &RangeKey| old.ranges.contains(&RangeKey { service: old.number, ..*key });
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
                return Planned::Kept(Set { first: set.first, count: set.count, made });
            }
        }
        let weights: Vec<u16> = members.iter().map(|(_, weight)| *weight).collect();
        Planned::New(wanted.make.count(&weights))
    }

    /// The first slots of what is new; both or none.
    fn places(&mut self, port: &ServicePort, planned: [&Planned; 2]) -> Result<[u32; 2], TableError> {
        let counts = planned.map(|one| if let Planned::New(count) = one { *count } else { 0 });
        let mut taken = [0; 2];
        for at in 0..2 {
            if counts[at] == 0 {
                continue;
            }
            let free = self.capacity.slots - self.slots.used();
            let Some(first) = self.slots.take(counts[at]) else {
                if at == 1 && counts[0] > 0 {
                    self.slots.undo(taken[0], counts[0]);
                }
                let (id, capacity) = (Box::new(port.id.clone()), self.capacity.slots);
                return Err(TableError::Full { id, what: "slots", needed: Ranges::cost(counts[at]), free, capacity });
            };
            taken[at] = first;
        }
        Ok(taken)
    }

    /// Carries a change out in these books and answers how to do it in the kernel's tables.
    fn carry_out(&mut self, change: &mut Change<'_>) -> Vec<Write> {
        let Change { port, wanted, old, planned, places } = change;
        let number = match old.number {
            0 => self.numbers.take().unwrap_or_default(),
            number => number,
        };
        let id = Arc::new(port.id.clone());
        let mut writes = Vec::new();
        let mut live = Live { number, ..Live::default() };
        let mut late = Vec::new();

        // Backends: those that begin to take connections before the rows, the others after them.
        let mut numbers = Vec::with_capacity(wanted.backends.len());
        for (place, state) in &wanted.backends {
            let before = old.backends.remove(place);
            let n = before.map_or_else(|| self.backends.take().unwrap_or_default(), |(n, _)| n);
            let row = cirri_abi::Backend {
                addr: place.0,
                port: Port::new(place.1),
                proto: port.id.protocol,
                state: *state,
                service: number,
                _pad: [0; 2],
            };
            match before {
                Some((_, known)) if known == row => {}
                Some(_) if *state != cirri_abi::BackendState::ACTIVE => late.push(Write::Backend(n, row)),
                _ => writes.push(Write::Backend(n, row)),
            }
            numbers.push(n);
            live.backends.insert(*place, (n, row));
        }
        let mut gone: Vec<u32> = old.backends.values().map(|(n, _)| *n).collect();
        gone.sort_unstable();

        let inside = self.settle(&planned[0], places[0], wanted, &wanted.inside, &numbers, &mut writes);
        let outside = match planned[1] {
            Planned::Shared => inside.clone(),
            _ => self.settle(&planned[1], places[1], wanted, &wanted.outside, &numbers, &mut writes),
        };
        for key in &wanted.ranges {
            let key = RangeKey { service: number, ..*key };
            match old.ranges.iter().position(|known| *known == key) {
                Some(at) => {
                    old.ranges.swap_remove(at);
                }
                None => {
                    self.ranges += 1;
                    writes.push(Write::Range(key));
                }
            }
            live.ranges.push(key);
        }
        let part = |set: &Option<Set>| set.as_ref().map_or((0, 0), |set| (set.first, set.count));
        let ((inside_first, inside_count), (outside_first, outside_count)) = (part(&inside), part(&outside));
        for (key, flags) in &wanted.rows {
            let row = Service {
                id: number,
                flags: *flags,
                inside_first,
                inside_count,
                outside_first,
                outside_count,
                affinity: port.affinity,
                pool: port.pool,
                slot: epoch_of(number),
                algorithm: port.algorithm,
                forwarding: port.forwarding,
                _pad: 0,
            };
            let before = old.rows.iter().position(|(known, _)| known == key).map(|at| old.rows.swap_remove(at).1);
            if before != Some(row) {
                writes.push(Write::Service(*key, row));
            }
            self.claim(*key, &id, &mut writes);
            live.rows.push((*key, row));
        }
        for (key, _) in std::mem::take(&mut old.rows) {
            self.release(key, &mut writes);
        }
        writes.append(&mut late);
        for n in gone {
            self.give_back_backend(n, &mut writes);
        }
        for key in std::mem::take(&mut old.ranges) {
            self.ranges -= 1;
            writes.push(Write::RemoveRange(key));
        }
        if !writes.is_empty() {
            writes.push(Write::Bump(epoch_of(number)));
        }

        live.sets.extend(inside);
        live.sets.extend(outside.filter(|set| live.sets.first().is_none_or(|inside| inside.first != set.first)));
        for set in &old.sets {
            if !live.sets.iter().any(|kept| kept.first == set.first) {
                self.slots.give_back(set.first, set.count);
            }
        }
        for (index, backend) in port.backends.iter().enumerate().rev() {
            if let Some((n, _)) = live.backends.get(&(backend.addr.into(), backend.port)) {
                self.by_backend.insert(*n, (id.clone(), index));
            }
        }
        self.by_number.insert(number, id.clone());
        self.ports.insert(id, Installed { port: (*port).clone(), live });
        writes
    }

    fn settle(
        &self,
        planned: &Planned,
        first: u32,
        wanted: &Wanted,
        members: &[(usize, u16)],
        numbers: &[u32],
        writes: &mut Vec<Write>,
    ) -> Option<Set> {
        match planned {
            Planned::Empty | Planned::Shared => None,
            Planned::Kept(set) => Some(set.clone()),
            Planned::New(count) => {
                let backends = slots_of(wanted, members, |index| numbers[index]);
                writes.push(Write::Slots { first, backends });
                let numbered = members.iter().map(|(index, weight)| (numbers[*index], *weight)).collect();
                Some(Set { first, count: *count, made: Made::Of(wanted.make, numbered) })
            }
        }
    }

    /// Books a row, and writes what belongs to its address. If a process before this one left the row
    /// to another service, it has just been replaced in place.
    fn claim(&mut self, key: ServiceKey, id: &Arc<PortId>, writes: &mut Vec<Write>) {
        let before = self.owners.insert(key, Owner::Port(id.clone()));
        if let Some(Owner::Inherited(number)) = before
            && let Some(live) = self.inherited.get_mut(&number)
        {
            live.rows.retain(|(known, _)| *known != key);
        }
        if is_own(key.addr) {
            writes.extend(self.node_ports.open(key.port.number(), before.is_none()));
            return;
        }
        let refusal = self.addresses.entry(key.addr).or_default();
        refusal.rows += u32::from(before.is_none());
        if !std::mem::replace(&mut refusal.stands, true) {
            self.refusals += 1;
            writes.push(Write::Service(refuse_key(key.addr), refuse_row()));
        }
    }

    /// Takes a row away, and the address's own with the last of them.
    fn release(&mut self, key: ServiceKey, writes: &mut Vec<Write>) {
        self.owners.remove(&key);
        writes.push(Write::RemoveService(key));
        if is_own(key.addr) {
            writes.extend(self.node_ports.close(key.port.number()));
            return;
        }
        if let Some(refusal) = self.addresses.get_mut(&key.addr) {
            refusal.rows -= 1;
            if refusal.rows == 0 {
                self.forget(key.addr, writes);
            }
        }
    }

    /// Takes an address's own row away.
    fn forget(&mut self, addr: Addr, writes: &mut Vec<Write>) {
        if self.addresses.remove(&addr).is_some_and(|refusal| refusal.stands) {
            self.refusals -= 1;
            writes.push(Write::RemoveService(refuse_key(addr)));
        }
    }

    fn give_back_backend(&mut self, number: u32, writes: &mut Vec<Write>) {
        writes.push(Write::Backend(number, cirri_abi::Backend::default()));
        self.by_backend.remove(&number);
        self.backends.give_back(number);
    }

    /// Takes everything away that stands under a service number.
    fn clear(&mut self, live: Live) -> Vec<Write> {
        let mut writes = Vec::new();
        for (key, _) in live.rows {
            self.release(key, &mut writes);
        }
        let mut gone: Vec<u32> = live.backends.values().map(|(n, _)| *n).collect();
        gone.sort_unstable();
        for number in gone {
            self.give_back_backend(number, &mut writes);
        }
        for key in live.ranges {
            self.ranges -= 1;
            writes.push(Write::RemoveRange(key));
        }
        for set in live.sets {
            self.slots.give_back(set.first, set.count);
        }
        self.numbers.give_back(live.number);
        writes.push(Write::Bump(epoch_of(live.number)));
        writes
    }
}

/// A change that has been checked.
struct Change<'a> {
    port: &'a ServicePort,
    wanted: Wanted,
    old: Live,
    /// Inside, outside.
    planned: [Planned; 2],
    /// First slots of those that are new.
    places: [u32; 2],
}

/// What becomes of one set.
enum Planned {
    Empty,
    /// It stands already.
    Kept(Set),
    /// It is to be written and takes this many slots.
    New(u32),
    /// Outside is the same as inside.
    Shared,
}

/// The ports of the node's own addresses: how many rows each has, and the bits in the kernel.
#[derive(Clone, Debug, Default)]
struct NodePorts {
    rows: HashMap<u16, u32>,
    words: BTreeMap<u32, u64>,
}

impl NodePorts {
    /// Sets the port's bit, for a row that is new or one that was there.
    fn open(&mut self, port: u16, new: bool) -> Option<Write> {
        *self.rows.entry(port).or_default() += u32::from(new);
        let word = self.words.entry(u32::from(port) / 64).or_default();
        let bits = *word | 1 << (port % 64);
        (std::mem::replace(word, bits) != bits).then_some(Write::NodePorts { word: u32::from(port) / 64, bits })
    }

    /// Clears the port's bit with the last of its rows.
    fn close(&mut self, port: u16) -> Option<Write> {
        let rows = self.rows.get_mut(&port)?;
        *rows -= 1;
        if *rows > 0 {
            return None;
        }
        self.rows.remove(&port);
        let word = self.words.get_mut(&(u32::from(port) / 64))?;
        *word &= !(1 << (port % 64));
        Some(Write::NodePorts { word: u32::from(port) / 64, bits: *word })
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

/// Whether rows with this address are for the node's own addresses.
fn is_own(addr: Addr) -> bool {
    addr == Addr::ANY_V4 || addr == Addr::UNSPECIFIED
}

fn refuse_key(addr: Addr) -> ServiceKey {
    ServiceKey { addr, ..ServiceKey::default() }
}

fn refuse_row() -> Service {
    Service { flags: service_flag::REFUSE, slot: epoch_of(0), ..Service::default() }
}
