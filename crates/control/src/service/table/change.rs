//! One change: the books move on, and the writes come out in order.

use super::audit::digest;
use super::wanted::Wanted;
use super::{Installed, Live, Made, Set, Tables, Write, epoch_of, slots_of};
use crate::service::ServicePort;
use cirri_abi::{Port, RangeKey, Service, ServiceKey};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// A change that has been checked.
pub(super) struct Change<'a> {
    pub port: &'a ServicePort,
    pub wanted: Wanted,
    pub old: Live,
    /// Inside, outside, inside at addresses for the world.
    pub planned: [Planned; 3],
    /// First slots of those that are new.
    pub places: [u32; 3],
}

/// What becomes of one set.
pub(super) enum Planned {
    Empty,
    /// It stands already.
    Kept(Set),
    /// It is to be written and takes this many slots.
    New(u32),
    /// It is the same as this one before it.
    SameAs(usize),
}

impl Tables {
    /// Carries a change out in these books and answers how to do it in the kernel's tables.
    pub(super) fn carry_out(&mut self, change: &mut Change<'_>) -> Vec<Write> {
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

        let mut sets: [Option<Set>; 3] = [None, None, None];
        for at in 0..sets.len() {
            sets[at] = match &planned[at] {
                Planned::Empty => None,
                Planned::SameAs(other) => sets[*other].clone(),
                Planned::Kept(set) => Some(set.clone()),
                Planned::New(count) => {
                    let (first, members) = (places[at], &wanted.sets[at]);
                    let backends = slots_of(wanted, members, |index| numbers[index]);
                    let digest = digest(&backends);
                    writes.push(Write::Slots { first, backends });
                    let numbered = members.iter().map(|(index, weight)| (numbers[*index], *weight)).collect();
                    Some(Set { first, count: *count, made: Made::Of(wanted.make, numbered), digest })
                }
            };
        }
        let known: HashSet<RangeKey> = old.ranges.iter().copied().collect();
        live.ranges = wanted.ranges.iter().map(|key| RangeKey { service: number, ..*key }).collect();
        for key in live.ranges.iter().filter(|key| !known.contains(key)) {
            self.ranges += 1;
            writes.push(Write::Range(*key));
        }
        let kept: HashSet<RangeKey> = live.ranges.iter().copied().collect();
        old.ranges.retain(|key| !kept.contains(key));
        let part = |set: &Option<Set>| set.as_ref().map_or((0, 0), |set| (set.first, set.count));
        let [inside, (outside_first, outside_count), within] = sets.each_ref().map(part);
        let mut before: HashMap<ServiceKey, Service> = old.rows.iter().copied().collect();
        for (key, flags, world) in &wanted.rows {
            let (inside_first, inside_count) = if *world { within } else { inside };
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
            if before.remove(key) != Some(row) {
                writes.push(Write::Service(*key, row));
            }
            self.claim(*key, &id, &mut writes);
            live.rows.push((*key, row));
        }
        live.shared = std::mem::take(&mut wanted.shared);
        self.share(&live.shared, &old.shared, &mut writes);
        live.refusing = std::mem::take(&mut wanted.refusing);
        self.refuse(&live.refusing, &old.refusing);
        let gone_rows: Vec<ServiceKey> =
            old.rows.iter().map(|(key, _)| *key).filter(|key| before.contains_key(key)).collect();
        for key in &gone_rows {
            self.release(*key, &mut writes);
        }
        for key in live.rows.iter().map(|(key, _)| key).chain(&gone_rows) {
            self.settle_refusal(key.addr, &mut writes);
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

        for set in sets.into_iter().flatten() {
            if !live.sets.iter().any(|known| known.first == set.first) {
                live.sets.push(set);
            }
        }
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
        self.ports.insert(id, Installed { port: (*port).clone(), live, withdrawn: false });
        writes
    }

    pub(super) fn give_back_backend(&mut self, number: u32, writes: &mut Vec<Write>) {
        writes.push(Write::Backend(number, cirri_abi::Backend::default()));
        self.by_backend.remove(&number);
        self.backends.give_back(number);
    }

    /// Takes everything away that stands under a service number.
    pub(super) fn clear(&mut self, live: Live) -> Vec<Write> {
        let mut writes = Vec::new();
        self.share(&[], &live.shared, &mut writes);
        self.refuse(&[], &live.refusing);
        for (key, _) in live.rows {
            self.release(key, &mut writes);
            self.settle_refusal(key.addr, &mut writes);
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
