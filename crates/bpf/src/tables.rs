//! The tables, as maps of the kernel.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST, BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, bpf_fib_lookup as FibParams},
    helpers::{
        bpf_fib_lookup, bpf_ktime_get_ns, bpf_map_delete_elem, bpf_map_lookup_elem, bpf_map_update_elem,
        bpf_ringbuf_query,
    },
};
use cirri_abi::{
    Addr, Counter, CounterIndex, Endpoint, FlowEvent, FlowKey4, FragmentKey, FragmentPorts, PolicyEntry, PolicyKey,
    Recipe, SnatPool, Tick, Tuple,
};
use cirri_datapath::{Flow, NextHop, Outcome, Packet, Scratch, Stage, Table, Tables};

use crate::{
    maps::{
        BACKEND_COUNTERS, COUNTERS, DEVICES, EDGE_DEVICES, ENDPOINTS, EPOCHS, EVENTS, FLOWS4, FLOWS6, FRAGMENTS,
        IDENTITIES, PENDING4, PENDING6, RULESETS, SNAT_POOLS,
    },
    skb::AF_INET,
};

const AF_INET6: u8 = 10;
/// An event in the ring: itself and the kernel's header of 8 bytes.
const EVENT_IN_RING: u64 = size_of::<FlowEvent>() as u64 + 8;
/// Each time that so many bytes more have gathered in the ring of events its reader is woken: once for
/// about 1,100 events of 40,000. Not for each event beyond: a flood would pay for every one.
const WAKE_AT: u64 = 128 * 1024;
const FIB_SUCCESS: i64 = 0;
const FIB_NO_NEIGHBOUR: i64 = 7;

/// What a program was called with.
pub trait Context: Copy {
    /// As helpers want it.
    fn pointer(self) -> *mut c_void;
    /// The device that the packet is met on.
    fn ifindex(self) -> u32;
    /// Runs a stage in a subprogram of its own.
    fn run(self, stage: Stage, scratch: &mut Scratch) -> Outcome;
}

/// The maps of this object, and the packet's context where a helper wants it.
pub struct Kernel<C>(pub C);

/// A recipe in its map.
#[derive(Clone, Copy)]
pub struct FlowRef(*mut Recipe);

impl Flow for FlowRef {
    #[inline(always)]
    fn recipe(&self) -> &Recipe {
        // SAFETY: a live map value; the program holds RCU, so it is not freed. An evicted entry may
        // be reused by another flow: such a packet obeys a recipe that was true a moment ago.
        unsafe { &*self.0 }
    }

    #[inline(always)]
    fn touch(&self, now: Tick, length: u32) {
        // SAFETY: as above. Lost counts between CPUs are documented at `Recipe::packets`.
        unsafe {
            (*self.0).packets = (*self.0).packets.wrapping_add(1);
            (*self.0).bytes = (*self.0).bytes.wrapping_add(length as u64);
            if cirri_datapath::stale((*self.0).last_seen, now) {
                (*self.0).last_seen = now;
            }
        }
    }

    #[inline(always)]
    fn copy_to(&self, out: &mut Recipe) {
        // SAFETY: as above.
        *out = unsafe { ptr::read(self.0) };
    }

    #[inline(always)]
    fn set_state(&self, state: u8, tcp_flags: u8) {
        // SAFETY: as above.
        unsafe {
            (*self.0).state = state;
            (*self.0).tcp_flags |= tcp_flags;
        }
    }
}

impl<C: Context> Tables for Kernel<C> {
    type Flow = FlowRef;

    #[inline(always)]
    fn flow4(&self, key: &FlowKey4) -> Option<FlowRef> {
        lookup(&raw const FLOWS4, key).map(FlowRef)
    }

    #[inline(always)]
    fn flow6(&self, key: &Tuple) -> Option<FlowRef> {
        lookup(&raw const FLOWS6, key).map(FlowRef)
    }

    #[inline(always)]
    fn flow(&self, table: Table, tuple: &Tuple) -> Option<FlowRef> {
        if tuple.src.is_v4() {
            let key = tuple.key4();
            lookup(select4(table), &key).map(FlowRef)
        } else {
            lookup(select6(table), tuple).map(FlowRef)
        }
    }

    #[inline(always)]
    fn insert(&self, table: Table, tuple: &Tuple, recipe: &Recipe, new: bool) -> bool {
        let flags = if new { BPF_NOEXIST } else { BPF_ANY } as u64;
        if tuple.src.is_v4() {
            update(select4(table), &tuple.key4(), recipe, flags)
        } else {
            update(select6(table), tuple, recipe, flags)
        }
    }

    #[inline(always)]
    fn promote(&self, tuple: &Tuple, flow: &FlowRef, spare: &mut Recipe) -> bool {
        flow.copy_to(spare);
        // An evicted entry is reused at once, by another connection: its recipe must not become this
        // one's. What is still found here after the copy was not reused before it.
        match self.flow(Table::Pending, tuple) {
            Some(again) if again.0 == flow.0 => self.insert(Table::Flows, tuple, spare, false),
            _ => false,
        }
    }

    #[inline(always)]
    fn remove(&self, table: Table, tuple: &Tuple) {
        if tuple.src.is_v4() {
            delete(select4(table), &tuple.key4());
        } else {
            delete(select6(table), tuple);
        }
    }

    #[inline(always)]
    fn epoch(&self, slot: u16) -> u32 {
        match EPOCHS.get(slot as u32) {
            Some(epoch) => *epoch,
            None => 0,
        }
    }

    #[inline(always)]
    fn knows_identity(&self, identity: u32) -> bool {
        match IDENTITIES.get(identity / 64) {
            Some(word) => *word & (1 << (identity % 64)) != 0,
            None => false,
        }
    }

    #[inline(always)]
    fn endpoint(&self, addr: &Addr) -> Option<&Endpoint> {
        deref(lookup(&raw const ENDPOINTS, addr))
    }

    #[inline(always)]
    fn device(&self, ifindex: u32) -> Option<&Endpoint> {
        deref(lookup(&raw const DEVICES, &ifindex))
    }

    #[inline(always)]
    fn policy(&self, ruleset: u16, key: &PolicyKey) -> Option<&PolicyEntry> {
        let inner: *mut c_void = lookup(&raw const RULESETS, &(ruleset as u32))?;
        deref(lookup(inner.cast_const(), key))
    }

    #[inline(always)]
    fn edge_device(&self, ifindex: u32) -> u32 {
        match EDGE_DEVICES.get(ifindex) {
            Some(address) => *address,
            None => 0,
        }
    }

    #[inline(always)]
    fn snat_pool(&self, number: u32) -> Option<&SnatPool> {
        SNAT_POOLS.get(number)
    }

    #[inline(always)]
    fn route(&self, tuple: &Tuple) -> Option<NextHop> {
        // SAFETY: zeroes are a valid parameter block.
        let mut params: FibParams = unsafe { core::mem::zeroed() };
        params.l4_protocol = tuple.proto;
        // As for a packet that came in where this one did.
        params.ifindex = self.0.ifindex();
        // Any length makes the kernel tell the route's MTU; a packet that is too large now does not
        // make the route a bad one.
        params.__bindgen_anon_1.tot_len = 1;
        let v4 = tuple.src.is_v4();
        if v4 {
            params.family = AF_INET as u8;
            params.__bindgen_anon_3.ipv4_src = tuple.src.word();
            params.__bindgen_anon_4.ipv4_dst = tuple.dst.word();
        } else {
            params.family = AF_INET6;
            params.__bindgen_anon_3.ipv6_src = tuple.src.words;
            params.__bindgen_anon_4.ipv6_dst = tuple.dst.words;
        }
        // SAFETY: the block lives on this stack and its size is passed.
        let answer = unsafe { bpf_fib_lookup(self.0.pointer(), &mut params, size_of::<FibParams>() as i32, 0) };
        let mut hop = NextHop::default();
        if answer == FIB_SUCCESS {
            hop.mac = params.dmac;
            hop.own_mac = params.smac;
            // SAFETY: the kernel leaves the MTU where it read the length.
            hop.mtu = unsafe { params.__bindgen_anon_1.mtu_result };
        } else if answer != FIB_NO_NEIGHBOUR {
            return None;
        }
        hop.ifindex = params.ifindex;
        if v4 {
            // SAFETY: for IPv4 the kernel leaves the next hop here; all zeroes and addresses are valid.
            hop.peer = unsafe { params.__bindgen_anon_4.ipv4_dst };
        }
        Some(hop)
    }

    #[inline(always)]
    fn count_backend(&self, backend: u32, answer: bool, bytes: u32) {
        if let Some(counter) = BACKEND_COUNTERS.get_ptr_mut(backend) {
            // SAFETY: this CPU's own slot. A packet may come in between two that are counted at different
            // hooks, and cost one count.
            unsafe {
                if answer {
                    (*counter).answers = (*counter).answers.wrapping_add(1);
                } else {
                    (*counter).packets = (*counter).packets.wrapping_add(1);
                    (*counter).bytes = (*counter).bytes.wrapping_add(bytes as u64);
                }
            }
        }
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        deref::<FragmentPorts>(lookup(&raw const FRAGMENTS, key)).copied()
    }

    #[inline(always)]
    fn remember_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        update(&raw const FRAGMENTS, key, ports, BPF_ANY as u64);
    }

    #[inline(always)]
    fn count(&self, index: u32, bytes: u32) {
        if let Some(counter) = COUNTERS.get_ptr_mut(index) {
            // SAFETY: this CPU's own slot; programs at tc hooks are not re-entered on one CPU.
            unsafe {
                let Counter { packets, bytes: total } = *counter;
                *counter = Counter { packets: packets.wrapping_add(1), bytes: total.wrapping_add(bytes as u64) };
            }
        }
    }

    #[inline(always)]
    fn emit(&self, event: &mut FlowEvent) {
        // SAFETY: helper without arguments.
        event.time_ns = unsafe { bpf_ktime_get_ns() };
        // Without a flag the kernel wakes the reader if it has read all before this event, as one does that
        // sleeps; while there is traffic it lets events gather, and is woken when that are many.
        // SAFETY: the map is a ring buffer.
        let gathered = unsafe { bpf_ringbuf_query((&raw const EVENTS).cast_mut().cast(), BPF_RB_AVAIL_DATA as u64) };
        let crosses = gathered / WAKE_AT != (gathered + EVENT_IN_RING) / WAKE_AT;
        let flags = if crosses { BPF_RB_FORCE_WAKEUP } else { 0 };
        if EVENTS.output_untyped::<FlowEvent>(&*event, flags as u64).is_err() {
            self.count(CounterIndex::LOST_EVENTS, 0);
        }
    }

    #[inline(always)]
    fn stage<P: Packet>(&self, stage: Stage, _packet: &mut P, scratch: &mut Scratch) -> Outcome {
        self.0.run(stage, scratch)
    }
}

#[inline(always)]
const fn select4(table: Table) -> *const c_void {
    match table {
        Table::Flows => (&raw const FLOWS4).cast(),
        Table::Pending => (&raw const PENDING4).cast(),
    }
}

#[inline(always)]
const fn select6(table: Table) -> *const c_void {
    match table {
        Table::Flows => (&raw const FLOWS6).cast(),
        Table::Pending => (&raw const PENDING6).cast(),
    }
}

#[inline(always)]
pub fn lookup<M, K, V>(map: *const M, key: &K) -> Option<*mut V> {
    // SAFETY: `map` is a map of this object whose keys are `K` (its declaration, or the caller's
    // choice by table); the kernel reads exactly one key.
    let value = unsafe { bpf_map_lookup_elem(map.cast_mut().cast(), ptr::from_ref(key).cast()) };
    if value.is_null() { None } else { Some(value.cast()) }
}

#[inline(always)]
pub fn update<M, K, V>(map: *const M, key: &K, value: &V, flags: u64) -> bool {
    // SAFETY: as in `lookup`, and for one value.
    unsafe {
        bpf_map_update_elem(map.cast_mut().cast(), ptr::from_ref(key).cast(), ptr::from_ref(value).cast(), flags) == 0
    }
}

#[inline(always)]
fn delete<M, K>(map: *const M, key: &K) {
    // SAFETY: as in `lookup`. A key that is not there is no error.
    unsafe { bpf_map_delete_elem(map.cast_mut().cast(), ptr::from_ref(key).cast()) };
}

/// A value for reading. Values of these maps are written by user space only, whole.
#[inline(always)]
pub fn deref<'a, V>(value: Option<*mut V>) -> Option<&'a V> {
    // SAFETY: a live map value; the program holds RCU until it returns.
    value.map(|value| unsafe { &*value })
}
