//! Whether the kernel's tables still hold what was written.

use super::wanted::Wanted;
use super::{Installed, Live, Restored, Set, Tables, Write, epoch_of, slots_of};
use cirri_abi::{Backend, RangeKey, Service, ServiceKey, service_flag};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};

/// An entry that somebody else changed, and how to make it right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which, for people.
    pub object: String,
    /// What is there.
    pub found: &'static str,
    /// What makes it right.
    pub write: Write,
}

/// Nothing where something was written.
const MISSING: &str = "it is gone";
/// Something else.
const ALTERED: &str = "it was changed";
/// Something where nothing was written.
const STRAY: &str = "nobody here wrote it";

impl Tables {
    /// Compares the kernel's tables with what was written into them; only when every write was carried out.
    /// The writes that come back are to be carried out in the order of kinds (backends, slots, rows).
    pub fn compare(&self, found: &Restored) -> Vec<Difference> {
        let mut all = Vec::new();
        let lives = || self.ports.values().map(|installed| &installed.live).chain(self.inherited.values());
        self.compare_backends(lives(), found, &mut all);
        self.compare_slots(found, &mut all);
        compare_ranges(lives(), found, &mut all);
        self.compare_rows(found, &mut all);
        self.compare_node_ports(found, &mut all);
        if !all.is_empty() {
            // Recipes may have been made from what was wrong: those of every service whose row concerns them.
            let mut slots: BTreeSet<u16> = BTreeSet::new();
            for difference in &all {
                slots.extend(self.concerned(&difference.write));
            }
            all.extend(slots.into_iter().map(|slot| Difference {
                object: format!("epoch {slot}"),
                found: ALTERED,
                write: Write::Bump(slot),
            }));
        }
        all
    }

    /// The largest number of a backend that is in use; 0 if there is none.
    pub fn last_backend(&self) -> u32 {
        let lives = self.ports.values().map(|installed| &installed.live).chain(self.inherited.values());
        let numbers = lives.flat_map(|live| live.backends.values()).map(|(number, _)| *number);
        numbers.chain(self.strays.iter().copied()).max().unwrap_or_default()
    }

    /// The keys of all rows of addresses that were written.
    pub fn written_rows(&self) -> Vec<ServiceKey> {
        self.wanted_rows().into_keys().collect()
    }

    /// The words of `NODE_PORTS` that were written.
    pub fn written_node_ports(&self) -> Vec<u32> {
        self.node_ports.words.keys().copied().collect()
    }

    /// Every row of an address, as it was written.
    fn wanted_rows(&self) -> HashMap<ServiceKey, Service> {
        let lives = self.ports.values().map(|installed| &installed.live).chain(self.inherited.values());
        let mut wanted: HashMap<ServiceKey, Service> = lives.flat_map(|live| live.rows.iter().copied()).collect();
        for (addr, _) in self.addresses.iter().filter(|(_, refusal)| refusal.stands) {
            let row = Service { flags: service_flag::REFUSE, slot: epoch_of(0), ..Service::default() };
            wanted.insert(ServiceKey { addr: *addr, ..ServiceKey::default() }, row);
        }
        wanted
    }

    fn compare_backends<'a>(&self, lives: impl Iterator<Item = &'a Live>, found: &Restored, all: &mut Vec<Difference>) {
        let wanted: BTreeMap<u32, Backend> = lives.flat_map(|live| live.backends.values().copied()).collect();
        let there: HashMap<u32, Backend> = found.backends.iter().copied().collect();
        let object = |number: u32, row: &Backend| {
            let at = SocketAddr::new(IpAddr::from(row.addr), row.port.number());
            format!("BACKENDS {number} ({at})")
        };
        for (number, row) in wanted.iter().filter(|(number, row)| there.get(number) != Some(row)) {
            if *row == Backend::default() {
                continue;
            }
            let what = if there.contains_key(number) { ALTERED } else { MISSING };
            all.push(Difference { object: object(*number, row), found: what, write: Write::Backend(*number, *row) });
        }
        for (number, row) in &found.backends {
            if !wanted.contains_key(number) && !self.strays.contains(number) && *row != Backend::default() {
                let write = Write::Backend(*number, Backend::default());
                all.push(Difference { object: object(*number, row), found: STRAY, write });
            }
        }
    }

    fn compare_slots(&self, found: &Restored, all: &mut Vec<Difference>) {
        for installed in self.ports.values() {
            for set in &installed.live.sets {
                let (first, end) = (set.first as usize, set.first as usize + set.count as usize);
                // What was not read, because no row leads there now, is compared once the rows are right.
                if found.slots.get(first..end).is_none_or(|slots| digest(slots) == set.digest) {
                    continue;
                }
                let Some(backends) = slots_again(installed, set) else { continue };
                let object = format!("SERVICE_SLOTS {first}..{end} ({})", installed.port.id);
                all.push(Difference { object, found: ALTERED, write: Write::Slots { first: set.first, backends } });
            }
        }
    }

    fn compare_rows(&self, found: &Restored, all: &mut Vec<Difference>) {
        let wanted = self.wanted_rows();
        let there: HashMap<ServiceKey, Service> = found.services.iter().copied().collect();
        for (key, row) in wanted.iter().filter(|(key, row)| there.get(key) != Some(row)) {
            let what = if there.contains_key(key) { ALTERED } else { MISSING };
            all.push(Difference { object: row_name(key), found: what, write: Write::Service(*key, *row) });
        }
        for (key, _) in found.services.iter().filter(|(key, _)| !wanted.contains_key(key)) {
            all.push(Difference { object: row_name(key), found: STRAY, write: Write::RemoveService(*key) });
        }
    }

    fn compare_node_ports(&self, found: &Restored, all: &mut Vec<Difference>) {
        let there: BTreeMap<u32, u64> = found.node_ports.iter().copied().collect();
        let words: BTreeSet<u32> = there.keys().chain(self.node_ports.words.keys()).copied().collect();
        for word in words {
            let bits = self.node_ports.words.get(&word).copied().unwrap_or_default();
            if there.get(&word).copied().unwrap_or_default() != bits {
                let object = format!("NODE_PORTS {}..{}", word * 64, word * 64 + 63);
                all.push(Difference { object, found: ALTERED, write: Write::NodePorts { word, bits } });
            }
        }
    }

    /// The epochs of recipes that may rest on an entry.
    fn concerned(&self, write: &Write) -> Vec<u16> {
        let number = match write {
            Write::Backend(_, row) if row.service != 0 => row.service,
            Write::Service(_, row) => row.id,
            Write::Range(key) | Write::RemoveRange(key) => key.service,
            Write::Slots { first, .. } => {
                let of = |installed: &&Installed| installed.live.sets.iter().any(|set| set.first == *first);
                self.ports.values().find(of).map_or(0, |installed| installed.live.number)
            }
            // Whose it was nobody knows.
            _ => 0,
        };
        if number != 0 {
            return vec![epoch_of(number)];
        }
        let numbers = self.ports.values().map(|installed| installed.live.number);
        numbers.chain([0]).map(epoch_of).collect()
    }
}

/// The number by which slots are told from others.
pub(super) fn digest(slots: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    slots.hash(&mut hasher);
    hasher.finish()
}

/// The slots of a set of a service port, made again; `None`: they cannot be told any more.
fn slots_again(installed: &Installed, set: &Set) -> Option<Vec<u32>> {
    let wanted = Wanted::of(&installed.port).ok()?;
    let number = |index: usize| installed.live.backends.get(&wanted.backends[index].0).map_or(0, |(number, _)| *number);
    let made = wanted.sets.iter().filter(|members| !members.is_empty()).map(|it| slots_of(&wanted, it, number));
    made.into_iter().find(|slots| digest(slots) == set.digest)
}

fn compare_ranges<'a>(lives: impl Iterator<Item = &'a Live>, found: &Restored, all: &mut Vec<Difference>) {
    let wanted: HashSet<RangeKey> = lives.flat_map(|live| live.ranges.iter().copied()).collect();
    let there: HashSet<RangeKey> = found.ranges.iter().copied().collect();
    let object = |key: &RangeKey| format!("SOURCE_RANGES of service {}", key.service);
    for key in wanted.difference(&there) {
        all.push(Difference { object: object(key), found: MISSING, write: Write::Range(*key) });
    }
    for key in there.difference(&wanted) {
        all.push(Difference { object: object(key), found: STRAY, write: Write::RemoveRange(*key) });
    }
}

fn row_name(key: &ServiceKey) -> String {
    format!("SERVICES {}/{}", SocketAddr::new(IpAddr::from(key.addr), key.port.number()), key.proto)
}
