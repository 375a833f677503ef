//! One node: the tables, the clock, and packets run through it.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use cirri_abi::{
    Addr, Counter, CounterIndex, Endpoint, FlowEvent, FlowKey4, FragmentKey, FragmentPorts, Hook, Ipcache, IpcacheKey,
    NodeConfig, PolicyEntry, PolicyKey, Recipe, RulesetSlot, SnatPool, Tick, Tuple, epoch, epoch_slot,
};
use cirri_datapath::{Flow, NextHop, Scratch, Table, Tables, Verdict, process, slow_path, unwrap_for_host};

use crate::frame::{Frame, RawFrame};
use crate::prefix::{Prefixes, cut};
use crate::services::ServiceTables;

/// The tables of one node, and its clock.
///
/// Two kinds of methods: those that take `&mut self` change what user space owns in the kernel's
/// maps (and move the epoch that the change concerns, as the agent does); [`Node::run`] and what
/// reads results take `&self`.
#[derive(Default)]
pub struct Node {
    endpoints: HashMap<Addr, Endpoint>,
    devices: HashMap<u32, Endpoint>,
    pub(crate) ipcache: Prefixes<[u8; 16], Ipcache>,
    rulesets: HashMap<RulesetSlot, Ruleset>,
    epochs: HashMap<u16, u32>,
    identities: HashSet<u32>,
    routes: Prefixes<[u8; 16], NextHop>,
    pub(crate) config: NodeConfig,
    pub(crate) services: ServiceTables,
    established: FlowTable,
    pending: FlowTable,
    fragments: RefCell<HashMap<FragmentKey, FragmentPorts>>,
    counters: RefCell<HashMap<u32, Counter>>,
    events: RefCell<Vec<FlowEvent>>,
    pub(crate) now_ns: Cell<u64>,
}

/// One compiled rule set.
#[derive(Clone, Default, Debug)]
pub struct Ruleset(Prefixes<[u8; 8], PolicyEntry>);

/// What became of a packet.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Where it goes.
    pub verdict: Verdict,
    /// As it leaves.
    pub frame: Frame,
}

impl Ruleset {
    /// A rule set of compiled entries.
    pub fn new(entries: impl IntoIterator<Item = (PolicyKey, PolicyEntry)>) -> Ruleset {
        let mut table = Prefixes::default();
        for (key, entry) in entries {
            table.insert(key.prefix_len, cut(policy_bytes(&key), key.prefix_len), entry);
        }
        Ruleset(table)
    }

    /// The entry under the longest prefix of a complete key.
    pub fn get(&self, key: &PolicyKey) -> Option<&PolicyEntry> {
        let bytes = policy_bytes(key);
        self.0.longest(|length| cut(bytes, length))
    }
}

impl Node {
    /// A node with empty tables. Nothing passes until it is configured.
    pub fn new(config: NodeConfig) -> Node {
        Node { config, now_ns: Cell::new(1 << 40), ..Node::default() }
    }

    /// Puts a workload behind its device and under its addresses.
    pub fn put_endpoint(&mut self, endpoint: Endpoint) {
        self.devices.insert(endpoint.ifindex, endpoint);
        for addr in [endpoint.v4, endpoint.v6] {
            if addr != Addr::UNSPECIFIED {
                self.endpoints.insert(addr, endpoint);
            }
        }
        self.bump(endpoint.ruleset);
    }

    /// Takes a workload away.
    pub fn remove_endpoint(&mut self, ifindex: u32) {
        if let Some(endpoint) = self.devices.remove(&ifindex) {
            self.endpoints.retain(|_, other| other.ifindex != ifindex);
            self.bump(endpoint.ruleset);
        }
    }

    /// Says what is known about a prefix. The caller bumps the epoch that it concerns.
    pub fn put_ipcache(&mut self, key: IpcacheKey, entry: Ipcache) {
        self.ipcache.insert(key.prefix_len, cut(key.addr.octets(), key.prefix_len), entry);
    }

    /// Forgets a prefix.
    pub fn remove_ipcache(&mut self, key: IpcacheKey) {
        self.ipcache.remove(key.prefix_len, cut(key.addr.octets(), key.prefix_len));
    }

    /// Flips a slot to a new rule set and moves its epoch.
    pub fn put_ruleset(&mut self, slot: RulesetSlot, ruleset: Ruleset) {
        self.rulesets.insert(slot, ruleset);
        self.step(slot);
    }

    /// Adds a route. `length` counts from bit 96 for IPv4.
    pub fn put_route(&mut self, addr: Addr, length: u32, next: NextHop) {
        self.routes.insert(length, cut(addr.octets(), length), next);
        self.bump(epoch_slot::NODE);
    }

    /// Changes the node's configuration.
    pub fn set_config(&mut self, config: NodeConfig) {
        self.config = config;
        self.bump(epoch_slot::NODE);
    }

    /// The rule sets were made with knowledge of an identity.
    pub fn know_identity(&mut self, identity: u32) {
        self.identities.insert(identity);
    }

    /// Rule sets and places are being changed from now on, or not any more.
    pub fn set_writing(&mut self, writing: bool) {
        let now = Tick::from_ns(self.now_ns.get()).count;
        self.epochs.insert(epoch_slot::WRITING, if writing { now } else { 0 });
    }

    /// Moves an epoch.
    pub fn bump(&mut self, slot: u16) {
        let there = self.epochs.entry(slot).or_default();
        *there = epoch::moved(*there);
    }

    /// Moves an epoch, by less in the middle of a change.
    fn step(&mut self, slot: u16) {
        if self.epochs.get(&epoch_slot::WRITING).is_none_or(|since| *since == 0) {
            return self.bump(slot);
        }
        let there = self.epochs.entry(slot).or_default();
        // Twice in one change is as once.
        if there.is_multiple_of(epoch::STEP) {
            *there = epoch::moving(*there);
        }
    }

    /// Limits the flow tables; the least recently used entry makes room.
    pub fn limit_flows(&mut self, established: usize, pending: usize) {
        self.established.capacity = Some(established);
        self.pending.capacity = Some(pending);
    }

    /// Lets time pass.
    pub fn advance(&self, ns: u64) {
        self.now_ns.set(self.now_ns.get() + ns);
    }

    /// Sends a packet through a hook.
    pub fn run(&self, hook: u8, mut frame: Frame) -> Ran {
        let mut scratch = Scratch::default();
        let verdict = process(hook, &mut frame, self, |frame, node| slow_path(hook, frame, node, &mut scratch));
        Ran { verdict, frame }
    }

    /// Sends a packet from the network through XDP.
    pub fn run_edge(&self, frame: Frame) -> Ran {
        let mut scratch = Scratch::default();
        let hook = Hook::FROM_NETWORK;
        let mut frame = RawFrame(frame);
        let verdict = process(hook, &mut frame, self, |frame, node| slow_path(hook, frame, node, &mut scratch));
        Ran { verdict, frame: frame.0 }
    }

    /// Takes a packet out of its outer header, as a plain host behind a load balancer does.
    pub fn run_unwrap(&self, mut frame: Frame) -> Ran {
        let verdict = unwrap_for_host(&mut frame, self).verdict();
        Ran { verdict, frame }
    }

    /// The recipe of a tuple in a table.
    pub fn recipe(&self, table: Table, tuple: &Tuple) -> Option<Recipe> {
        self.table(table).entries.borrow().get(tuple).map(|cell| cell.get())
    }

    /// Every flow of a table, in no order.
    pub fn flows(&self, table: Table) -> Vec<(Tuple, Recipe)> {
        self.table(table).entries.borrow().iter().map(|(tuple, cell)| (*tuple, cell.get())).collect()
    }

    /// A counter.
    pub fn counter(&self, index: u32) -> Counter {
        self.counters.borrow().get(&index).copied().unwrap_or_default()
    }

    /// The events since the last call.
    pub fn take_events(&self) -> Vec<FlowEvent> {
        self.events.take()
    }

    fn table(&self, table: Table) -> &FlowTable {
        match table {
            Table::Flows => &self.established,
            Table::Pending => &self.pending,
        }
    }
}

#[derive(Default)]
struct FlowTable {
    entries: RefCell<HashMap<Tuple, Rc<Cell<Recipe>>>>,
    /// Least recently used first; only kept where there is a limit.
    order: RefCell<Vec<Tuple>>,
    capacity: Option<usize>,
}

impl FlowTable {
    fn get(&self, tuple: &Tuple) -> Option<Handle> {
        let cell = self.entries.borrow().get(tuple).cloned()?;
        self.used(tuple);
        Some(Handle { seen: cell.get(), cell })
    }

    fn insert(&self, tuple: &Tuple, recipe: &Recipe, new: bool) -> bool {
        let mut entries = self.entries.borrow_mut();
        if new && entries.contains_key(tuple) {
            return false;
        }
        if let Some(capacity) = self.capacity
            && entries.len() >= capacity
            && !entries.contains_key(tuple)
        {
            let oldest = self.order.borrow_mut().remove(0);
            entries.remove(&oldest);
        }
        entries.insert(*tuple, Rc::new(Cell::new(*recipe)));
        drop(entries);
        self.used(tuple);
        true
    }

    fn remove(&self, tuple: &Tuple) {
        self.entries.borrow_mut().remove(tuple);
        self.order.borrow_mut().retain(|other| other != tuple);
    }

    fn used(&self, tuple: &Tuple) {
        if self.capacity.is_some() {
            let mut order = self.order.borrow_mut();
            order.retain(|other| other != tuple);
            order.push(*tuple);
        }
    }
}

/// A recipe in a table, and what it was when it was looked up.
#[derive(Clone)]
pub struct Handle {
    cell: Rc<Cell<Recipe>>,
    seen: Recipe,
}

impl Handle {
    fn change(&self, change: impl FnOnce(&mut Recipe)) {
        let mut recipe = self.cell.get();
        change(&mut recipe);
        self.cell.set(recipe);
    }
}

impl Flow for Handle {
    fn recipe(&self) -> &Recipe {
        &self.seen
    }

    fn copy_to(&self, out: &mut Recipe) {
        *out = self.cell.get();
    }

    fn touch(&self, now: Tick, length: u32) {
        self.change(|recipe| {
            recipe.packets = recipe.packets.wrapping_add(1);
            recipe.bytes = recipe.bytes.wrapping_add(length.into());
            recipe.last_seen = now;
        });
    }

    fn set_state(&self, state: u8, tcp_flags: u8) {
        self.change(|recipe| {
            recipe.state = state;
            recipe.tcp_flags |= tcp_flags;
        });
    }
}

impl Tables for Node {
    type Flow = Handle;

    fn flow4(&self, key: &FlowKey4) -> Option<Handle> {
        self.established.get(&key.tuple())
    }

    fn flow6(&self, key: &Tuple) -> Option<Handle> {
        // The kernel's IPv6 table holds no IPv4 flows; ours holds both.
        if key.src.is_v4() { None } else { self.established.get(key) }
    }

    fn flow(&self, table: Table, tuple: &Tuple) -> Option<Handle> {
        self.table(table).get(tuple)
    }

    fn insert(&self, table: Table, tuple: &Tuple, recipe: &Recipe, new: bool) -> bool {
        self.table(table).insert(tuple, recipe, new)
    }

    fn promote(&self, tuple: &Tuple, flow: &Handle, _spare: &mut Recipe) -> bool {
        self.established.insert(tuple, &flow.cell.get(), false)
    }

    fn remove(&self, table: Table, tuple: &Tuple) {
        self.table(table).remove(tuple);
    }

    fn epoch(&self, slot: u16) -> u32 {
        self.epochs.get(&slot).copied().unwrap_or_default()
    }

    fn knows_identity(&self, identity: u32) -> bool {
        self.identities.contains(&identity)
    }

    fn endpoint(&self, addr: &Addr) -> Option<&Endpoint> {
        self.endpoints.get(addr)
    }

    fn device(&self, ifindex: u32) -> Option<&Endpoint> {
        self.devices.get(&ifindex)
    }

    fn policy(&self, ruleset: u16, key: &PolicyKey) -> Option<&PolicyEntry> {
        self.rulesets.get(&ruleset)?.get(key)
    }

    fn edge_device(&self, ifindex: u32) -> u32 {
        self.services.edge_devices.get(&ifindex).copied().unwrap_or_default()
    }

    fn snat_pool(&self, number: u32) -> Option<&SnatPool> {
        self.services.pools.get(&number)
    }

    fn count_backend(&self, backend: u32, answer: bool, bytes: u32) {
        let mut counters = self.services.counters.borrow_mut();
        let counter = counters.entry(backend).or_default();
        if answer {
            counter.answers += 1;
        } else {
            counter.packets += 1;
            counter.bytes += u64::from(bytes);
        }
    }

    fn route(&self, tuple: &Tuple) -> Option<NextHop> {
        let bytes = tuple.dst.octets();
        self.routes.longest(|length| cut(bytes, length)).copied()
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        self.fragments.borrow().get(key).copied()
    }

    fn remember_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        self.fragments.borrow_mut().insert(*key, *ports);
    }

    fn count(&self, index: u32, bytes: u32) {
        assert!(index < CounterIndex::COUNT, "counter {index} is outside its table");
        let mut counters = self.counters.borrow_mut();
        let counter = counters.entry(index).or_default();
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }

    fn emit(&self, event: &mut FlowEvent) {
        event.time_ns = self.now_ns.get();
        self.events.borrow_mut().push(*event);
    }
}

/// The bytes of a policy key that the trie compares.
fn policy_bytes(key: &PolicyKey) -> [u8; 8] {
    let peer = key.peer.to_ne_bytes();
    [peer[0], peer[1], peer[2], peer[3], key.direction, key.proto, key.port[0], key.port[1]]
}
