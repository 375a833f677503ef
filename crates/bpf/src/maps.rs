//! The maps, sized and named by the ABI.

use aya_ebpf::{
    btf_maps::{Array, HashMap, HashOfMaps, LpmTrie, LruHashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use cirri_abi::{
    Addr, Counter, CounterIndex, Endpoint, FlowEvent, FlowKey4, FragmentKey, FragmentPorts, Ipcache, NodeConfig,
    PolicyEntry, Recipe, Tuple, map,
};
use cirri_datapath::Scratch;

/// The bytes of `cirri_abi::PolicyKey` after its prefix length.
#[repr(C)]
pub struct PolicyData([u32; 2]);

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
pub static COUNTERS: PerCpuArray<Counter, { CounterIndex::COUNT as usize }> = PerCpuArray::new();
#[btf_map]
pub static EVENTS: RingBuf<FlowEvent, { entries(&map::EVENTS) }> = RingBuf::new();

/// What the slow path works on. Not part of the ABI: nobody else reads it.
#[btf_map]
pub static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();
