//! The maps: names, kinds, sizes.

use core::mem::size_of;

use crate::{
    Addr, Affinity, AffinityKey, Backend, BackendCounter, Counter, Endpoint, FlowKey4, FragmentKey, FragmentPorts,
    Ipcache, IpcacheKey, NodeConfig, PolicyEntry, PolicyKey, RangeKey, Recipe, Service, ServiceKey, ServiceSlot,
    SnatPool, SocketServices, Tuple,
};

/// Kinds of map, by what they promise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapKind {
    /// `BPF_MAP_TYPE_HASH`.
    Hash = 1,
    /// `BPF_MAP_TYPE_ARRAY`.
    Array = 2,
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`.
    PerCpuArray = 6,
    /// `BPF_MAP_TYPE_LRU_HASH`.
    LruHash = 9,
    /// `BPF_MAP_TYPE_LPM_TRIE`.
    LpmTrie = 11,
    /// `BPF_MAP_TYPE_ARRAY_OF_MAPS` or `HASH_OF_MAPS`; values are rule sets.
    HashOfMaps = 13,
    /// `BPF_MAP_TYPE_SK_STORAGE`: a value in every socket that asked for one.
    SkStorage = 24,
    /// `BPF_MAP_TYPE_RINGBUF`.
    RingBuf = 27,
}

/// One map as both sides know it.
#[derive(Clone, Copy, Debug)]
pub struct Map {
    /// Name in the object, in the pin directory and in `cirri map list`.
    pub name: &'static str,
    /// Kind.
    pub kind: MapKind,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Entries unless configuration says otherwise; bytes for the ring.
    pub max_entries: u32,
    /// Creation flags (`BPF_F_*`).
    pub flags: u32,
    /// What it is for, in one line.
    pub about: &'static str,
}

const NO_PREALLOC: u32 = 1;

/// Every map.
pub mod map {
    use super::*;

    const fn new<K, V>(name: &'static str, kind: MapKind, max_entries: u32, flags: u32, about: &'static str) -> Map {
        Map {
            name,
            kind,
            key_size: size_of::<K>() as u32,
            value_size: size_of::<V>() as u32,
            max_entries,
            flags,
            about,
        }
    }

    /// Established IPv4 connections.
    pub const FLOWS4: Map =
        new::<FlowKey4, Recipe>("FLOWS4", MapKind::LruHash, 524_288, 0, "established IPv4 connections");
    /// Established IPv6 connections.
    pub const FLOWS6: Map =
        new::<Tuple, Recipe>("FLOWS6", MapKind::LruHash, 262_144, 0, "established IPv6 connections");
    /// Unfinished IPv4 connections.
    pub const PENDING4: Map =
        new::<FlowKey4, Recipe>("PENDING4", MapKind::LruHash, 65_536, 0, "unfinished IPv4 connections");
    /// Unfinished IPv6 connections.
    pub const PENDING6: Map =
        new::<Tuple, Recipe>("PENDING6", MapKind::LruHash, 65_536, 0, "unfinished IPv6 connections");
    /// Ports of fragmented datagrams.
    pub const FRAGMENTS: Map =
        new::<FragmentKey, FragmentPorts>("FRAGMENTS", MapKind::LruHash, 8192, 0, "ports of fragmented datagrams");
    /// Endpoints by address.
    pub const ENDPOINTS: Map =
        new::<Addr, Endpoint>("ENDPOINTS", MapKind::Hash, 16_384, NO_PREALLOC, "workloads of this node by address");
    /// Endpoints by device.
    pub const DEVICES: Map =
        new::<u32, Endpoint>("DEVICES", MapKind::Hash, 8192, NO_PREALLOC, "workloads of this node by device");
    /// Identity, block and peer of addresses.
    pub const IPCACHE: Map = new::<IpcacheKey, Ipcache>(
        "IPCACHE",
        MapKind::LpmTrie,
        524_288,
        NO_PREALLOC,
        "identity, block and peer of addresses",
    );
    /// Counters that recipes rest on.
    pub const EPOCHS: Map = new::<u32, u32>("EPOCHS", MapKind::Array, 65_536, 0, "counters that recipes rest on");
    /// Rule sets by slot.
    pub const RULESETS: Map = new::<u32, u32>("RULESETS", MapKind::HashOfMaps, 4096, 0, "compiled rule sets by slot");
    /// One rule set: what [`RULESETS`] holds.
    pub const RULESET: Map =
        new::<PolicyKey, PolicyEntry>("ruleset", MapKind::LpmTrie, 65_536, NO_PREALLOC, "one compiled rule set");
    /// The node's configuration.
    pub const NODE: Map = new::<u32, NodeConfig>("NODE", MapKind::Array, 1, 0, "this node");
    /// Addresses that are served.
    pub const SERVICES: Map =
        new::<ServiceKey, Service>("SERVICES", MapKind::Hash, 131_072, NO_PREALLOC, "addresses that are served");
    /// Who serves, by number; 0 is nobody.
    pub const BACKENDS: Map = new::<u32, Backend>("BACKENDS", MapKind::Array, 131_072, 0, "backends by number");
    /// Sets of backends, one after the other.
    pub const SERVICE_SLOTS: Map =
        new::<u32, ServiceSlot>("SERVICE_SLOTS", MapKind::Array, 2_097_152, 0, "sets of backends to choose from");
    /// Clients that keep their backend.
    pub const AFFINITY: Map =
        new::<AffinityKey, Affinity>("AFFINITY", MapKind::LruHash, 65_536, 0, "clients that keep their backend");
    /// Ranges of clients that services name; the value says nothing.
    pub const SOURCE_RANGES: Map = new::<RangeKey, u32>(
        "SOURCE_RANGES",
        MapKind::LpmTrie,
        65_536,
        NO_PREALLOC,
        "ranges of clients that services name",
    );
    /// Sources for translated connections, by number; 0 is not used.
    pub const SNAT_POOLS: Map =
        new::<u32, SnatPool>("SNAT_POOLS", MapKind::Array, 1024, 0, "sources for translated connections");
    /// A bit for each port of the node's own addresses that a service may be behind: word `port / 64`,
    /// bit `port % 64`.
    pub const NODE_PORTS: Map =
        new::<u32, u64>("NODE_PORTS", MapKind::Array, 1024, 0, "ports of the node that services are behind (bits)");
    /// A bit for each identity that the rule sets in force were made with knowledge of: word
    /// `identity / 64`, bit `identity % 64`.
    pub const IDENTITIES: Map =
        new::<u32, u64>("IDENTITIES", MapKind::Array, 1024, 0, "identities that the rule sets know (bits)");
    /// Devices (by number) that take frames before the stack: the last four bytes of their Ethernet
    /// address, as in a packet; 0 for others.
    pub const EDGE_DEVICES: Map =
        new::<u32, u32>("EDGE_DEVICES", MapKind::Array, 4096, 0, "devices that take frames before the stack");
    /// What backends have been given.
    pub const BACKEND_COUNTERS: Map = new::<u32, BackendCounter>(
        "BACKEND_COUNTERS",
        MapKind::PerCpuArray,
        131_072,
        0,
        "connections, packets and bytes by backend",
    );
    /// Network namespaces (by cookie) whose sockets are not translated: their packets are.
    pub const PER_PACKET: Map = new::<u64, u32>(
        "PER_PACKET",
        MapKind::Hash,
        8192,
        NO_PREALLOC,
        "network namespaces translated per packet (by cookie)",
    );
    /// What a socket has been translated for.
    pub const SOCKETS: Map = new::<u32, SocketServices>(
        "SOCKETS",
        MapKind::SkStorage,
        0,
        NO_PREALLOC,
        "services of a socket, in the socket",
    );
    /// Counters.
    pub const COUNTERS: Map = new::<u32, Counter>(
        "COUNTERS",
        MapKind::PerCpuArray,
        crate::CounterIndex::COUNT,
        0,
        "packets and bytes by reason and direction",
    );
    /// Events.
    pub const EVENTS: Map = Map {
        name: "EVENTS",
        kind: MapKind::RingBuf,
        key_size: 0,
        value_size: 0,
        max_entries: 4 * 1024 * 1024,
        flags: 0,
        about: "events on their way to user space (bytes)",
    };

    /// All of them, [`RULESET`] left out: it has no name of its own in the kernel.
    pub const ALL: &[Map] = &[
        FLOWS4,
        FLOWS6,
        PENDING4,
        PENDING6,
        FRAGMENTS,
        ENDPOINTS,
        DEVICES,
        IPCACHE,
        EPOCHS,
        RULESETS,
        NODE,
        SERVICES,
        BACKENDS,
        SERVICE_SLOTS,
        AFFINITY,
        SOURCE_RANGES,
        SNAT_POOLS,
        NODE_PORTS,
        IDENTITIES,
        EDGE_DEVICES,
        BACKEND_COUNTERS,
        PER_PACKET,
        SOCKETS,
        COUNTERS,
        EVENTS,
    ];
}

/// How the slots of the table of epochs are dealt out.
pub mod epoch_slot {
    /// The node's configuration, and all that has no slot of its own.
    pub const NODE: u16 = 0;
    /// First slot of rule sets; the slot is the [`crate::RulesetSlot`].
    pub const FIRST_RULESET: u16 = 1;
    /// Last slot of rule sets.
    pub const LAST_RULESET: u16 = 4095;
    /// First slot of routes to peers.
    pub const FIRST_PEER: u16 = 4096;
    /// Last slot of routes to peers.
    pub const LAST_PEER: u16 = 20_479;
    /// Moves with every change of endpoints and of the address cache, *before* the slots that the
    /// change concerns. No recipe rests on it: the packet path asks it at the beginning and at the end
    /// of a decision, to see whether what it found in between still led to the right slots.
    pub const PLACES: u16 = 20_480;
    /// No epoch: while user space changes places and rule sets, the [`crate::Tick`] of its last sign of
    /// life; else 0. Rule sets and addresses disagree meanwhile, so what was in force when the change
    /// began goes on as it was decided, for two ticks at the most. What was out of date before (see
    /// [`crate::epoch`]) is decided again: it may be a connection that policy has closed since.
    pub const WRITING: u16 = 20_481;
    /// First slot of services. With more services than slots, several share one.
    pub const FIRST_SERVICE: u16 = 20_482;
    /// Last slot of services.
    pub const LAST_SERVICE: u16 = 65_535;
}

/// How an epoch moves.
///
/// A change that is written in one piece takes it to the next multiple of [`STEP`]. While a larger change is going
/// on (see [`epoch_slot::WRITING`]), it moves by one, and to the next multiple at the end. The sum of three epochs
/// thus tells whether what rests on them was in force when the change began.
pub mod epoch {
    /// What a whole change moves an epoch to a multiple of.
    pub const STEP: u32 = 8;

    /// An epoch after a change, or after the end of a larger one.
    pub const fn moved(epoch: u32) -> u32 {
        (epoch | (STEP - 1)).wrapping_add(1)
    }

    /// An epoch in the middle of a larger change. One that an interrupted change has left in the middle moves on
    /// further: what rests on it is older than this change.
    pub const fn moving(epoch: u32) -> u32 {
        let began = if epoch.is_multiple_of(STEP) { epoch } else { moved(epoch) };
        began.wrapping_add(1)
    }

    /// Whether what was decided under the sum `decided` of three epochs was in force when the change began that is
    /// going on now, where their sum is `now`: since then each has moved by one at the most.
    #[inline(always)]
    pub const fn held_before(decided: u32, now: u32) -> bool {
        now.wrapping_sub(decided) <= 3
    }
}
