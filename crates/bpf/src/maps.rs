//! The maps, sized and named by the ABI.

use aya_ebpf::{
    btf_maps::{Array, HashMap, HashOfMaps, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SkStorage},
    macros::btf_map,
};
use cirri_abi::{
    Addr, Affinity, AffinityKey, Backend, BackendCounter, Counter, CounterIndex, Endpoint, FlowEvent, FlowKey4,
    FragmentKey, FragmentPorts, Ipcache, NodeConfig, PolicyEntry, Recipe, Service, ServiceKey, ServiceSlot, SnatPool,
    SocketServices, Tuple, map,
};
use cirri_datapath::Scratch;

/// The bytes of `cirri_abi::PolicyKey` after its prefix length.
#[repr(C)]
pub struct PolicyData([u32; 2]);

/// The bytes of `cirri_abi::RangeKey` after its prefix length.
#[repr(C)]
pub struct RangeData([u32; 5]);

const fn entries(map: &cirri_abi::Map) -> usize {
    map.max_entries as usize
}

const fn flags(map: &cirri_abi::Map) -> usize {
    map.flags as usize
}

#[btf_map]
pub static FLOWS4: LruHashMap<FlowKey4, Recipe, { entries(&map::FLOWS4) }> = LruHashMap::new();
#[btf_map]
pub static FLOWS6: LruHashMap<Tuple, Recipe, { entries(&map::FLOWS6) }> = LruHashMap::new();
#[btf_map]
pub static PENDING4: LruHashMap<FlowKey4, Recipe, { entries(&map::PENDING4) }> = LruHashMap::new();
#[btf_map]
pub static PENDING6: LruHashMap<Tuple, Recipe, { entries(&map::PENDING6) }> = LruHashMap::new();
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, { entries(&map::FRAGMENTS) }> = LruHashMap::new();
#[btf_map]
pub static ENDPOINTS: HashMap<Addr, Endpoint, { entries(&map::ENDPOINTS) }, { flags(&map::ENDPOINTS) }> =
    HashMap::new();
#[btf_map]
pub static DEVICES: HashMap<u32, Endpoint, { entries(&map::DEVICES) }, { flags(&map::DEVICES) }> = HashMap::new();
#[btf_map]
pub static IPCACHE: LpmTrie<Addr, Ipcache, { entries(&map::IPCACHE) }, { flags(&map::IPCACHE) }> = LpmTrie::new();
#[btf_map]
pub static EPOCHS: Array<u32, { entries(&map::EPOCHS) }> = Array::new();
#[btf_map]
pub static RULESETS: HashOfMaps<
    u32,
    LpmTrie<PolicyData, PolicyEntry, { entries(&map::RULESET) }, { flags(&map::RULESET) }>,
    { entries(&map::RULESETS) },
> = HashOfMaps::new();
#[btf_map]
pub static NODE: Array<NodeConfig, { entries(&map::NODE) }> = Array::new();
#[btf_map]
pub static SERVICES: HashMap<ServiceKey, Service, { entries(&map::SERVICES) }, { flags(&map::SERVICES) }> =
    HashMap::new();
#[btf_map]
pub static BACKENDS: Array<Backend, { entries(&map::BACKENDS) }> = Array::new();
#[btf_map]
pub static SERVICE_SLOTS: Array<ServiceSlot, { entries(&map::SERVICE_SLOTS) }> = Array::new();
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, { entries(&map::AFFINITY) }> = LruHashMap::new();
#[btf_map]
pub static SOURCE_RANGES: LpmTrie<RangeData, u32, { entries(&map::SOURCE_RANGES) }, { flags(&map::SOURCE_RANGES) }> =
    LpmTrie::new();
#[btf_map]
pub static SNAT_POOLS: Array<SnatPool, { entries(&map::SNAT_POOLS) }> = Array::new();
#[btf_map]
pub static NODE_PORTS: Array<u64, { entries(&map::NODE_PORTS) }> = Array::new();
#[btf_map]
pub static IDENTITIES: Array<u64, { entries(&map::IDENTITIES) }> = Array::new();
#[btf_map]
pub static EDGE_DEVICES: Array<u32, { entries(&map::EDGE_DEVICES) }> = Array::new();
#[btf_map]
pub static BACKEND_COUNTERS: PerCpuArray<BackendCounter, { entries(&map::BACKEND_COUNTERS) }> = PerCpuArray::new();
#[btf_map]
pub static PER_PACKET: HashMap<u64, u32, { entries(&map::PER_PACKET) }, { flags(&map::PER_PACKET) }> = HashMap::new();
#[btf_map]
pub static SOCKETS: SkStorage<SocketServices> = SkStorage::new();
#[btf_map]
pub static COUNTERS: PerCpuArray<Counter, { CounterIndex::COUNT as usize }> = PerCpuArray::new();
#[btf_map]
pub static EVENTS: RingBuf<FlowEvent, { entries(&map::EVENTS) }> = RingBuf::new();

/// What the slow path works on. Not part of the ABI: nobody else reads it.
#[btf_map]
pub static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();
