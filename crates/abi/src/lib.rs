//! Every byte that crosses the boundary between the kernel programs and user space: keys, values,
//! events, drop reasons, and the names and sizes of the maps.
//!
//! Both sides compile this same crate, without features, so that a layout cannot drift. Types are
//! [`Plain`]: `repr(C)`, no padding, every bit pattern valid (no `bool`, no `enum`, no `Option`).
//! [`ABI_HASH`] changes whenever a layout or a map changes; it names the directory that maps are
//! pinned in, so that programs never meet a map of another shape.
//!
//! Byte order: addresses and ports stand in network order exactly as in the packet; everything else
//! is in host order. Times are [`Tick`]s unless the name says `_ns`.

#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod address;
mod endpoint;
mod event;
mod flow;
mod identity;
mod layout;
mod maps;
mod policy;
mod reason;
mod service;

pub use address::{Addr, GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, Port};
pub use endpoint::{Endpoint, Ipcache, IpcacheKey, NodeConfig, endpoint_flag, ipcache_flag, node_flag};
pub use event::{Counter, CounterIndex, Direction, EventKind, FlowEvent, event_flag};
pub use flow::{Action, FlowKey4, FragmentKey, FragmentPorts, Hook, Recipe, Rewrite, State, Tick, Tuple, recipe_flag};
pub use identity::Identity;
pub use layout::{ABI_HASH, Plain, abi_text};
pub use maps::{Map, MapKind, epoch, epoch_slot, map};
pub use policy::{Cookie, PolicyEntry, PolicyKey, RulesetSlot, Verdict, policy_flag, precedence};
pub use reason::DropReason;
pub use service::{
    Affinity, AffinityKey, Algorithm, Backend, BackendCounter, BackendState, Forwarding, RangeKey, Service, ServiceKey,
    ServiceSlot, SnatPool, SocketService, SocketServices, dsr, service_flag,
};

/// IP protocol numbers (IANA) that the packet path tells apart.
pub mod proto {
    /// ICMP for IPv4 (RFC 792).
    pub const ICMP: u8 = 1;
    /// TCP (RFC 9293).
    pub const TCP: u8 = 6;
    /// UDP (RFC 768).
    pub const UDP: u8 = 17;
    /// ICMP for IPv6 (RFC 4443).
    pub const ICMPV6: u8 = 58;
    /// SCTP (RFC 9260).
    pub const SCTP: u8 = 132;
}

/// UDP port of the VXLAN overlay, the one Cilium uses (its contract N1.4), not IANA's 4789.
pub const VXLAN_PORT: u16 = 8472;
