//! The tables of services, as maps of the kernel: what every hook and every system call asks.

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns},
};
use cirri_abi::{
    Addr, Affinity, AffinityKey, Backend, Ipcache, IpcacheKey, NodeConfig, Port, RangeKey, Service, ServiceKey, Tick,
};
use cirri_datapath::Services;

use crate::{
    maps::{AFFINITY, BACKEND_COUNTERS, BACKENDS, IPCACHE, NODE, NODE_PORTS, SERVICE_SLOTS, SERVICES, SOURCE_RANGES},
    tables::{Context, Kernel, deref, lookup, update},
};

/// The maps, where there is no packet.
pub struct Maps;

impl Services for Maps {
    #[inline(always)]
    fn service(&self, key: &ServiceKey) -> Option<&Service> {
        deref(lookup(&raw const SERVICES, key))
    }

    #[inline(always)]
    fn backend(&self, number: u32) -> Option<&Backend> {
        BACKENDS.get(number)
    }

    #[inline(always)]
    fn service_slot(&self, index: u32) -> u32 {
        match SERVICE_SLOTS.get(index) {
            Some(slot) => slot.backend,
            None => 0,
        }
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        deref::<Affinity>(lookup(&raw const AFFINITY, key)).copied()
    }

    #[inline(always)]
    fn keep_affinity(&self, key: &AffinityKey, affinity: &Affinity) {
        update(&raw const AFFINITY, key, affinity, BPF_ANY as u64);
    }

    #[inline(always)]
    fn in_range(&self, service: u32, addr: &Addr) -> bool {
        let key = RangeKey { prefix_len: 160, service, addr: *addr };
        lookup::<_, _, u32>(&raw const SOURCE_RANGES, &key).is_some()
    }

    #[inline(always)]
    fn node_port(&self, port: Port) -> bool {
        let number = port.number();
        match NODE_PORTS.get(number as u32 / 64) {
            Some(word) => *word & (1 << (number % 64)) != 0,
            None => false,
        }
    }

    #[inline(always)]
    fn ipcache(&self, addr: &Addr) -> Option<&Ipcache> {
        deref(lookup(&raw const IPCACHE, &IpcacheKey { prefix_len: 128, addr: *addr }))
    }

    #[inline(always)]
    fn node(&self) -> Option<&NodeConfig> {
        NODE.get(0)
    }

    #[inline(always)]
    fn now(&self) -> Tick {
        // SAFETY: helper without arguments.
        Tick::from_ns(unsafe { bpf_ktime_get_coarse_ns() })
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: helper without arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn count_connection(&self, backend: u32) {
        if let Some(counter) = BACKEND_COUNTERS.get_ptr_mut(backend) {
            // SAFETY: this CPU's own slot; a system call that is interrupted here by a packet costs one
            // count.
            unsafe { (*counter).connections = (*counter).connections.wrapping_add(1) };
        }
    }
}

impl<C: Context> Services for Kernel<C> {
    #[inline(always)]
    fn service(&self, key: &ServiceKey) -> Option<&Service> {
        Maps.service(key)
    }

    #[inline(always)]
    fn backend(&self, number: u32) -> Option<&Backend> {
        Maps.backend(number)
    }

    #[inline(always)]
    fn service_slot(&self, index: u32) -> u32 {
        Maps.service_slot(index)
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        Maps.affinity(key)
    }

    #[inline(always)]
    fn keep_affinity(&self, key: &AffinityKey, affinity: &Affinity) {
        Maps.keep_affinity(key, affinity);
    }

    #[inline(always)]
    fn in_range(&self, service: u32, addr: &Addr) -> bool {
        Maps.in_range(service, addr)
    }

    #[inline(always)]
    fn node_port(&self, port: Port) -> bool {
        Maps.node_port(port)
    }

    #[inline(always)]
    fn ipcache(&self, addr: &Addr) -> Option<&Ipcache> {
        Maps.ipcache(addr)
    }

    #[inline(always)]
    fn node(&self) -> Option<&NodeConfig> {
        Maps.node()
    }

    #[inline(always)]
    fn now(&self) -> Tick {
        Maps.now()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        Maps.random()
    }

    #[inline(always)]
    fn count_connection(&self, backend: u32) {
        Maps.count_connection(backend);
    }
}
