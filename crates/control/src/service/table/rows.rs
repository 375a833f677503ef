//! What belongs to an address as a whole: who has its rows, whether it refuses the rest, and the bits
//! of the node's own ports.

use super::{Owner, Tables, Write, epoch_of};
use crate::service::PortId;
use cirri_abi::{Addr, Service, ServiceKey, service_flag};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// The row of an address alone.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Refusal {
    /// How many other rows say that the address was given to their service as a whole: it refuses the rest.
    pub refusing: u32,
    /// How many say that the address has other uses too: it refuses nothing then.
    pub shared: u32,
    /// Whether it stands in the table.
    pub stands: bool,
}

/// The ports of the node's own addresses: how many rows each has, and the bits in the kernel.
#[derive(Clone, Debug, Default)]
pub(super) struct NodePorts {
    pub rows: HashMap<u16, u32>,
    pub words: BTreeMap<u32, u64>,
}

impl NodePorts {
    /// Sets the port's bit, for a row that is new or one that was there.
    pub fn open(&mut self, port: u16, new: bool) -> Option<Write> {
        *self.rows.entry(port).or_default() += u32::from(new);
        let word = self.words.entry(u32::from(port) / 64).or_default();
        let bits = *word | 1 << (port % 64);
        (std::mem::replace(word, bits) != bits).then_some(Write::NodePorts { word: u32::from(port) / 64, bits })
    }

    /// Clears the port's bit with the last of its rows.
    pub fn close(&mut self, port: u16) -> Option<Write> {
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

impl Tables {
    /// Books a row. If a process before this one left it to another service, it has just been replaced
    /// in place.
    pub(super) fn claim(&mut self, key: ServiceKey, id: &Arc<PortId>, writes: &mut Vec<Write>) {
        let before = self.owners.insert(key, Owner::Port(id.clone()));
        if let Some(Owner::Inherited(number)) = before
            && let Some(live) = self.inherited.get_mut(&number)
        {
            live.rows.retain(|(known, _)| *known != key);
            if let Some(at) = live.refusing.iter().position(|known| *known == key) {
                live.refusing.swap_remove(at);
                self.refuse(&[], &[key]);
            }
        }
        if is_own(key.addr) {
            writes.extend(self.node_ports.open(key.port.number(), before.is_none()));
        }
    }

    /// Takes a row away.
    pub(super) fn release(&mut self, key: ServiceKey, writes: &mut Vec<Write>) {
        self.owners.remove(&key);
        writes.push(Write::RemoveService(key));
        if is_own(key.addr) {
            writes.extend(self.node_ports.close(key.port.number()));
        }
    }

    /// Books which rows' addresses have other uses. They may be the node's own, whose packets are looked
    /// at only on ports that have a bit.
    pub(super) fn share(&mut self, now: &[ServiceKey], before: &[ServiceKey], writes: &mut Vec<Write>) {
        let [in_now, in_before] = [now, before].map(|keys| keys.iter().collect::<HashSet<_>>());
        for key in now.iter().filter(|key| !in_before.contains(key)) {
            self.addresses.entry(key.addr).or_default().shared += 1;
            writes.extend(self.node_ports.open(key.port.number(), true));
        }
        for key in before.iter().filter(|key| !in_now.contains(key)) {
            if let Some(refusal) = self.addresses.get_mut(&key.addr) {
                refusal.shared -= 1;
            }
            writes.extend(self.node_ports.close(key.port.number()));
        }
    }

    /// Books which rows' addresses were given to their service as a whole.
    pub(super) fn refuse(&mut self, now: &[ServiceKey], before: &[ServiceKey]) {
        let [in_now, in_before] = [now, before].map(|keys| keys.iter().collect::<HashSet<_>>());
        for key in now.iter().filter(|key| !in_before.contains(key)) {
            self.addresses.entry(key.addr).or_default().refusing += 1;
        }
        for key in before.iter().filter(|key| !in_now.contains(key)) {
            if let Some(refusal) = self.addresses.get_mut(&key.addr) {
                refusal.refusing -= 1;
            }
        }
    }

    /// Writes or removes the row of an address alone, as its other rows have it.
    pub(super) fn settle_refusal(&mut self, addr: Addr, writes: &mut Vec<Write>) {
        let Some(refusal) = self.addresses.get_mut(&addr) else { return };
        let wanted = refusal.refusing > 0 && refusal.shared == 0 && !is_own(addr);
        let stood = std::mem::replace(&mut refusal.stands, wanted);
        if refusal.refusing == 0 && refusal.shared == 0 {
            self.addresses.remove(&addr);
        }
        let key = ServiceKey { addr, ..ServiceKey::default() };
        match (stood, wanted) {
            (false, true) => {
                self.refusals += 1;
                let slot = epoch_of(0);
                writes.push(Write::Service(key, Service { flags: service_flag::REFUSE, slot, ..Service::default() }));
            }
            (true, false) => {
                self.refusals -= 1;
                writes.push(Write::RemoveService(key));
            }
            _ => {}
        }
    }
}

/// Whether rows with this address are for the node's own addresses.
pub(super) fn is_own(addr: Addr) -> bool {
    addr == Addr::ANY_V4 || addr == Addr::UNSPECIFIED
}
