//! The maps of a node, each with its types, and what goes beyond one map's reads and writes.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cirri_abi::{
    Addr, Affinity, AffinityKey, Backend, BackendCounter, Counter, CounterIndex, Endpoint, FlowKey4, FragmentKey,
    FragmentPorts, Ipcache, IpcacheKey, Map, MapKind, NodeConfig, Plain, PolicyEntry, PolicyKey, RangeKey, Recipe,
    RulesetSlot, Service, ServiceKey, ServiceSlot, SnatPool, Tick, Tuple, epoch, epoch_slot, map,
};

use crate::{
    error::{LoadError, MapError},
    pins::Pins,
    plain::{bytes, bytes_of_all, read},
    rulesets,
    sys::RawMap,
    table::{self, BATCH, Table},
};

/// All tables of one node. Cheap to clone; clones share the maps and may outlive [`crate::Datapath`].
///
/// Writers follow one order: write the entry, then [`Tables::bump`] the epoch that recipes made
/// from it rest on. There is one writer per node, the agent.
#[derive(Clone, Debug)]
pub struct Tables {
    /// Established IPv4 connections.
    pub flows4: Table<FlowKey4, Recipe>,
    /// Established IPv6 connections.
    pub flows6: Table<Tuple, Recipe>,
    /// Unfinished IPv4 connections.
    pub pending4: Table<FlowKey4, Recipe>,
    /// Unfinished IPv6 connections.
    pub pending6: Table<Tuple, Recipe>,
    /// Ports of fragmented datagrams.
    pub fragments: Table<FragmentKey, FragmentPorts>,
    /// Workloads of this node by address.
    pub endpoints: Table<Addr, Endpoint>,
    /// Workloads of this node by device.
    pub devices: Table<u32, Endpoint>,
    /// Identity, block and peer of addresses. [`Table::get`] matches the longest prefix.
    pub ipcache: Table<IpcacheKey, Ipcache>,
    /// Addresses that are served.
    pub services: Table<ServiceKey, Service>,
    /// Who serves, by number; 0 is nobody.
    pub backends: Table<u32, Backend>,
    /// Sets of backends, one after the other; [`Service::inside_first`] and its like count here.
    pub slots: Table<u32, ServiceSlot>,
    /// Clients that keep their backend.
    pub affinity: Table<AffinityKey, Affinity>,
    /// Ranges of clients that services name. [`Table::get`] matches the longest prefix.
    pub source_ranges: Table<RangeKey, u32>,
    /// Sources for translated connections, by number; 0 is not used.
    pub snat_pools: Table<u32, SnatPool>,
    /// Ports of the node's own addresses that a service may be behind: bit `port % 64` of word
    /// `port / 64`.
    pub node_ports: Table<u32, u64>,
    /// `IDENTITIES`: bits of identities that the rule sets know.
    pub identities: Table<u32, u64>,
    /// Devices that take frames before the stack.
    pub(crate) edge_devices: Table<u32, u32>,
    /// Network namespaces (by [`crate::net::Namespace::cookie`]) whose packets are translated, not
    /// their sockets. The value says nothing.
    pub per_packet: Table<u64, u32>,
    epochs: Table<u32, u32>,
    /// What was last written into them here, by slot.
    written: Arc<Mutex<BTreeMap<u16, u32>>>,
    node: Table<u32, NodeConfig>,
    rulesets: Arc<RawMap>,
    all: Arc<BTreeMap<&'static str, Arc<RawMap>>>,
}

/// Key and value of an entry as bytes.
pub type RawEntry = (Vec<u8>, Vec<u8>);

/// One map, as `cirri map list` shows it.
#[derive(Clone, Debug)]
pub struct MapStatus {
    /// Name.
    pub name: &'static str,
    /// What it is for.
    pub about: &'static str,
    /// The kernel's number of it.
    pub id: u32,
    /// The most entries it can hold; bytes for the ring of events.
    pub max_entries: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Kernel memory it takes, bytes.
    pub memory: u64,
}

impl Tables {
    pub(crate) fn new(maps: BTreeMap<&'static str, RawMap>) -> Result<Tables, MapError> {
        let all: BTreeMap<&'static str, Arc<RawMap>> =
            maps.into_iter().map(|(name, raw)| (name, Arc::new(raw))).collect();
        let raw = |map: &Map| find(&all, map.name).cloned();
        Ok(Tables {
            flows4: Table::new(raw(&map::FLOWS4)?, &map::FLOWS4)?,
            flows6: Table::new(raw(&map::FLOWS6)?, &map::FLOWS6)?,
            pending4: Table::new(raw(&map::PENDING4)?, &map::PENDING4)?,
            pending6: Table::new(raw(&map::PENDING6)?, &map::PENDING6)?,
            fragments: Table::new(raw(&map::FRAGMENTS)?, &map::FRAGMENTS)?,
            endpoints: Table::new(raw(&map::ENDPOINTS)?, &map::ENDPOINTS)?,
            devices: Table::new(raw(&map::DEVICES)?, &map::DEVICES)?,
            ipcache: Table::new(raw(&map::IPCACHE)?, &map::IPCACHE)?,
            services: Table::new(raw(&map::SERVICES)?, &map::SERVICES)?,
            backends: Table::new(raw(&map::BACKENDS)?, &map::BACKENDS)?,
            slots: Table::new(raw(&map::SERVICE_SLOTS)?, &map::SERVICE_SLOTS)?,
            affinity: Table::new(raw(&map::AFFINITY)?, &map::AFFINITY)?,
            source_ranges: Table::new(raw(&map::SOURCE_RANGES)?, &map::SOURCE_RANGES)?,
            snat_pools: Table::new(raw(&map::SNAT_POOLS)?, &map::SNAT_POOLS)?,
            node_ports: Table::new(raw(&map::NODE_PORTS)?, &map::NODE_PORTS)?,
            identities: Table::new(raw(&map::IDENTITIES)?, &map::IDENTITIES)?,
            edge_devices: Table::new(raw(&map::EDGE_DEVICES)?, &map::EDGE_DEVICES)?,
            per_packet: Table::new(raw(&map::PER_PACKET)?, &map::PER_PACKET)?,
            epochs: Table::new(raw(&map::EPOCHS)?, &map::EPOCHS)?,
            written: Arc::default(),
            node: Table::new(raw(&map::NODE)?, &map::NODE)?,
            rulesets: raw(&map::RULESETS)?,
            all: Arc::new(all),
        })
    }

    /// The tables of an instance that an agent runs, for tools beside it. The agent stays their
    /// writer: whatever else is written here, its next reconciliation may write over.
    pub fn open(pin_root: &Path, instance: &str) -> Result<Tables, LoadError> {
        let maps = Pins::open(pin_root, instance)?.open_live()?;
        Ok(Tables::new(maps)?)
    }

    /// A map by its name.
    pub(crate) fn raw(&self, name: &str) -> Option<&RawMap> {
        self.all.get(name).map(AsRef::as_ref)
    }

    /// The maps by the kernel's numbers of them.
    pub(crate) fn ids(&self) -> BTreeMap<u32, &'static str> {
        self.all.iter().map(|(name, raw)| (raw.info().id, *name)).collect()
    }

    // === The node and its epochs ===

    /// What the programs know about their node.
    pub fn node(&self) -> Result<NodeConfig, MapError> {
        Ok(self.node.get(&0)?.unwrap_or_default())
    }

    /// Tells the programs about their node. Bump [`epoch_slot::NODE`] afterwards.
    pub fn set_node(&self, config: &NodeConfig) -> Result<(), MapError> {
        self.node.put(&0, config)
    }

    /// The epoch in a slot.
    pub fn epoch(&self, slot: u16) -> Result<u32, MapError> {
        Ok(self.epochs.get(&slot.into())?.unwrap_or_default())
    }

    /// Moves the epoch in a slot on: every recipe that rests on it is decided again with its next
    /// packet. Answers the new epoch.
    pub fn bump(&self, slot: u16) -> Result<u32, MapError> {
        let next = epoch::moved(self.newest(slot)?);
        self.write_epoch(slot, next)?;
        Ok(next)
    }

    /// The newest epoch of a slot that may have been seen: there, or written and altered since.
    fn newest(&self, slot: u16) -> Result<u32, MapError> {
        let there = self.epoch(slot)?;
        Ok(self.written().get(&slot).map_or(there, |written| there.max(*written)))
    }

    /// Says that rule sets and places are being changed, as of that tick, or not any more. What is known goes
    /// on as it was decided meanwhile; a writer that takes longer than a second says so again. Before it ends
    /// the change it bumps every slot that the change concerns.
    pub fn set_writing(&self, since: Option<Tick>) -> Result<(), MapError> {
        // 0 says that nobody writes.
        self.write_epoch(epoch_slot::WRITING, since.map_or(0, |tick| tick.count.max(1)))
    }

    /// Epochs that are not as they were written here: the slot, what is there, and what was written. Those that were
    /// not moved since the start are not looked at.
    pub fn altered_epochs(&self) -> Result<Vec<(u16, u32, u32)>, MapError> {
        let mut altered = Vec::new();
        for (slot, written) in self.written().iter() {
            let there = self.epoch(*slot)?;
            if there != *written {
                altered.push((*slot, there, *written));
            }
        }
        Ok(altered)
    }

    /// Makes an epoch right that was altered. One that was put back would make recipes good again that are out of
    /// date: it moves on instead.
    pub fn renew_epoch(&self, slot: u16) -> Result<(), MapError> {
        if slot == epoch_slot::WRITING { self.set_writing(None) } else { self.bump(slot).map(drop) }
    }

    fn write_epoch(&self, slot: u16, epoch: u32) -> Result<(), MapError> {
        self.epochs.put(&slot.into(), &epoch)?;
        self.written().insert(slot, epoch);
        Ok(())
    }

    fn written(&self) -> MutexGuard<'_, BTreeMap<u16, u32>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // === Rule sets ===

    /// Makes a rule set live: builds its table beside the old one, reads it back, flips the outer
    /// entry and moves the slot's epoch. No packet sees a mix; if anything fails before the flip,
    /// the old rule set stays in force. In the middle of a change ([`Tables::set_writing`]) the epoch
    /// moves by one only, however often: bump it at the end. Answers the new epoch.
    pub fn install_ruleset(&self, slot: RulesetSlot, entries: &[(PolicyKey, PolicyEntry)]) -> Result<u32, MapError> {
        let inner = self.build_ruleset(slot, entries)?;
        self.make_live(slot, &inner)?;
        self.move_epoch(slot)
    }

    /// The same for several: they become live right after each other, and take hardly longer than one. Answers what came
    /// of each, in their order; the failure of one is no other's.
    pub fn install_rulesets(
        &self,
        rulesets: &[(RulesetSlot, &[(PolicyKey, PolicyEntry)])],
    ) -> Vec<Result<u32, MapError>> {
        let mut failed = BTreeMap::new();
        let (mut slots, mut built) = (Vec::new(), Vec::new());
        for (slot, entries) in rulesets {
            match self.build_ruleset(*slot, entries) {
                Ok(inner) => {
                    slots.push(*slot);
                    built.push(inner);
                }
                Err(error) => drop(failed.insert(*slot, error)),
            }
        }
        let keys: Vec<u32> = slots.iter().map(|slot| u32::from(*slot)).collect();
        if self.rulesets.update_inner_batch(bytes_of_all(&keys), &built).is_err() {
            // Each for itself, to know which.
            for (slot, inner) in slots.into_iter().zip(&built) {
                failed.extend(self.make_live(slot, inner).err().map(|error| (slot, error)));
            }
        }
        let outcome = |slot| failed.remove(&slot).map_or_else(|| self.move_epoch(slot), Err);
        rulesets.iter().map(|(slot, _)| *slot).map(outcome).collect()
    }

    /// A rule set's table, complete, which nothing leads to yet.
    fn build_ruleset(&self, slot: RulesetSlot, entries: &[(PolicyKey, PolicyEntry)]) -> Result<RawMap, MapError> {
        check_slot(slot)?;
        let ruleset = &map::RULESET;
        let capacity = u32::try_from(entries.len()).unwrap_or(u32::MAX).max(1);
        if capacity > ruleset.max_entries {
            return Err(MapError::Full { map: format!("rule set {slot}"), max_entries: ruleset.max_entries });
        }
        let name = format!("ruleset_{slot}");
        let inner = rulesets::inner(capacity, &name).map_err(|error| MapError::Kernel {
            map: name.clone(),
            action: "create",
            error,
        })?;
        for chunk in entries.chunks(BATCH) {
            let keys: Vec<PolicyKey> = chunk.iter().map(|entry| entry.0).collect();
            let values: Vec<PolicyEntry> = chunk.iter().map(|entry| entry.1).collect();
            inner
                .update_batch(bytes_of_all(&keys), bytes_of_all(&values), chunk.len())
                .map_err(|(_, error)| table::failed(&name, inner.info(), "update", error))?;
        }
        // Entries that collapse into one key (bits past the prefix) would be lost silently.
        let written = walk(&inner, &name, |_, _| true)?;
        if written != entries.len() {
            return Err(MapError::Incomplete { slot, written, wanted: entries.len() });
        }
        inner.freeze().map_err(|error| MapError::Kernel { map: name, action: "freeze", error })?;
        Ok(inner)
    }

    fn make_live(&self, slot: RulesetSlot, inner: &RawMap) -> Result<(), MapError> {
        self.rulesets
            .update_inner(bytes(&u32::from(slot)), inner)
            .map_err(|error| table::failed(map::RULESETS.name, self.rulesets.info(), "update", error))
    }

    /// After a rule set became live; answers the new epoch.
    fn move_epoch(&self, slot: RulesetSlot) -> Result<u32, MapError> {
        let is_writing = self.written().get(&epoch_slot::WRITING).is_some_and(|since| *since != 0);
        if !is_writing {
            return self.bump(slot);
        }
        let there = self.newest(slot)?;
        if !there.is_multiple_of(epoch::STEP) && self.written().get(&slot) == Some(&there) {
            // Twice in one change: what was in force when it began is still told by the same step.
            return Ok(there);
        }
        let next = epoch::moving(there);
        self.write_epoch(slot, next)?;
        Ok(next)
    }

    /// Takes a rule set away; whether there was one. Endpoints that still name the slot are then
    /// closed: without a rule set nothing passes.
    pub fn remove_ruleset(&self, slot: RulesetSlot) -> Result<bool, MapError> {
        check_slot(slot)?;
        let there = self
            .rulesets
            .delete(bytes(&u32::from(slot)))
            .map_err(|error| table::failed(map::RULESETS.name, self.rulesets.info(), "delete", error))?;
        if there {
            self.bump(slot)?;
        }
        Ok(there)
    }

    /// The rule set that is live, `None` if there is none; to compare with after a restart.
    pub fn read_ruleset(&self, slot: RulesetSlot) -> Result<Option<Vec<(PolicyKey, PolicyEntry)>>, MapError> {
        check_slot(slot)?;
        let mut id = [0; 4];
        let there = self
            .rulesets
            .lookup(bytes(&u32::from(slot)), &mut id)
            .map_err(|error| table::failed(map::RULESETS.name, self.rulesets.info(), "lookup", error))?;
        if !there {
            return Ok(None);
        }
        let name = format!("rule set {slot}");
        let inner = RawMap::from_id(u32::from_ne_bytes(id)).map_err(|error| MapError::Kernel {
            map: name.clone(),
            action: "open",
            error,
        })?;
        table::compatible(inner.info(), &map::RULESET, inner.info().max_entries)?;
        let mut entries = Vec::new();
        walk(&inner, &name, |key, value| {
            entries.extend(read(key).zip(read(value)));
            true
        })?;
        Ok(Some(entries))
    }

    /// The slots that hold a rule set, each with the kernel's number of it. A rule set that is live never changes: the
    /// number tells whether it is another's.
    pub fn ruleset_ids(&self) -> Result<BTreeMap<RulesetSlot, u32>, MapError> {
        let mut ids = BTreeMap::new();
        walk(&self.rulesets, map::RULESETS.name, |key, id| {
            let slot = read::<u32>(key).and_then(|slot| RulesetSlot::try_from(slot).ok());
            ids.extend(slot.zip(read::<u32>(id)));
            true
        })?;
        Ok(ids)
    }

    // === Counters ===

    /// All counters, summed over the CPUs; see [`CounterIndex`].
    pub fn counters(&self) -> Result<Vec<Counter>, MapError> {
        let raw = find(&self.all, map::COUNTERS.name)?;
        let mut counters = vec![Counter::default(); CounterIndex::COUNT as usize];
        walk(raw, map::COUNTERS.name, |key, per_cpu| {
            if let Some(sum) = read::<u32>(key).and_then(|index| counters.get_mut(index as usize)) {
                *sum = summed(per_cpu);
            }
            true
        })?;
        Ok(counters)
    }

    /// One counter, summed over the CPUs.
    pub fn counter(&self, index: u32) -> Result<Counter, MapError> {
        let raw = find(&self.all, map::COUNTERS.name)?;
        let mut per_cpu = vec![0; raw.value_bytes()];
        raw.lookup(bytes(&index), &mut per_cpu)
            .map_err(|error| table::failed(map::COUNTERS.name, raw.info(), "lookup", error))?;
        Ok(summed(&per_cpu))
    }

    /// What these backends have been given, summed over the CPUs; numbers outside the table are left out.
    pub fn backend_counters(
        &self,
        numbers: impl IntoIterator<Item = u32>,
    ) -> Result<Vec<(u32, BackendCounter)>, MapError> {
        let raw = find(&self.all, map::BACKEND_COUNTERS.name)?;
        let mut per_cpu = vec![0; raw.value_bytes()];
        let mut counters = Vec::new();
        for number in numbers {
            let found = raw
                .lookup(bytes(&number), &mut per_cpu)
                .map_err(|error| table::failed(map::BACKEND_COUNTERS.name, raw.info(), "lookup", error))?;
            if found {
                counters.push((number, summed_backend(&per_cpu)));
            }
        }
        Ok(counters)
    }

    /// Begins to count a backend from zero, as is due when its number goes to another. What another CPU
    /// counts meanwhile may survive.
    pub fn clear_backend_counter(&self, number: u32) -> Result<(), MapError> {
        let raw = find(&self.all, map::BACKEND_COUNTERS.name)?;
        raw.update(bytes(&number), &vec![0; raw.value_bytes()])
            .map_err(|error| table::failed(map::BACKEND_COUNTERS.name, raw.info(), "update", error))
    }

    // === Any map ===

    /// Every map with its size and the kernel memory it takes.
    pub fn status(&self) -> Result<Vec<MapStatus>, MapError> {
        let of = |map: &Map| {
            let raw = find(&self.all, map.name)?;
            let memory = raw.memory().map_err(|error| MapError::Kernel {
                map: map.name.into(),
                action: "asking its memory",
                error,
            })?;
            let info = raw.info();
            // Before Linux 6.4 the kernel tells no memory of a ring.
            let memory = if map.kind == MapKind::RingBuf { memory.max(info.max_entries.into()) } else { memory };
            Ok(MapStatus {
                name: map.name,
                about: map.about,
                id: info.id,
                max_entries: info.max_entries,
                key_size: info.key_size,
                value_size: info.value_size,
                memory,
            })
        };
        map::ALL.iter().map(of).collect()
    }

    /// Up to `limit` entries of any map as bytes. Values of per-CPU maps have one part for each
    /// possible CPU.
    pub fn dump(&self, name: &str, limit: usize) -> Result<Vec<RawEntry>, MapError> {
        let raw = find(&self.all, name)?;
        for (kind, holds) in [(MapKind::RingBuf, "events"), (MapKind::SkStorage, "values inside sockets")] {
            if raw.info().kind == kind as u32 {
                return Err(MapError::NoEntries { map: name.into(), holds });
            }
        }
        let mut entries = Vec::new();
        if limit == 0 {
            return Ok(entries);
        }
        walk(raw, name, |key, value| {
            entries.push((key.to_vec(), value.to_vec()));
            entries.len() < limit
        })?;
        Ok(entries)
    }
}

/// Shows every entry until `each` answers false; how many it showed.
fn walk(raw: &RawMap, name: &str, mut each: impl FnMut(&[u8], &[u8]) -> bool) -> Result<usize, MapError> {
    let mut seen = 0;
    let mut at = None;
    loop {
        let batch = raw.lookup_batch(at.as_ref(), BATCH).map_err(|error| MapError::Kernel {
            map: name.into(),
            action: "walking it",
            error,
        })?;
        let keys = batch.keys.chunks_exact(raw.info().key_size as usize);
        for (key, value) in keys.zip(batch.values.chunks_exact(raw.value_bytes())) {
            seen += 1;
            if !each(key, value) {
                return Ok(seen);
            }
        }
        match batch.next {
            Some(next) => at = Some(next),
            None => return Ok(seen),
        }
    }
}

fn summed(per_cpu: &[u8]) -> Counter {
    parts(per_cpu).fold(Counter::default(), |sum, one: Counter| Counter {
        packets: sum.packets.wrapping_add(one.packets),
        bytes: sum.bytes.wrapping_add(one.bytes),
    })
}

fn summed_backend(per_cpu: &[u8]) -> BackendCounter {
    parts(per_cpu).fold(BackendCounter::default(), |sum, one: BackendCounter| BackendCounter {
        connections: sum.connections.wrapping_add(one.connections),
        packets: sum.packets.wrapping_add(one.packets),
        bytes: sum.bytes.wrapping_add(one.bytes),
        answers: sum.answers.wrapping_add(one.answers),
    })
}

/// The values of the CPUs; each begins at a multiple of eight bytes.
fn parts<T: Plain>(per_cpu: &[u8]) -> impl Iterator<Item = T> {
    per_cpu.chunks_exact(size_of::<T>().next_multiple_of(8)).filter_map(read)
}

fn find<'a>(all: &'a BTreeMap<&'static str, Arc<RawMap>>, name: &str) -> Result<&'a Arc<RawMap>, MapError> {
    all.get(name).ok_or_else(|| MapError::Unknown {
        name: name.into(),
        known: all.keys().copied().collect::<Vec<_>>().join(", "),
    })
}

fn check_slot(slot: RulesetSlot) -> Result<(), MapError> {
    if (epoch_slot::FIRST_RULESET..=epoch_slot::LAST_RULESET).contains(&slot) {
        return Ok(());
    }
    Err(MapError::Slot { slot })
}
