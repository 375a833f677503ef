//! Services: which addresses are served, by whom, and how one of them is chosen.
//!
//! # How a service is looked up
//!
//! 1. ([`ServiceKey`]) address, port and protocol of the packet, exactly.
//! 2. If the address is one of this node (a loopback address counts, in the socket hooks) or, from
//!    inside, another node's, and [`crate::map::NODE_PORTS`] has the port's bit: the same with the
//!    unspecified address of the family ([`Addr::ANY_V4`], [`Addr::UNSPECIFIED`]).
//! 3. The address alone: port 0, protocol 0. Its row says [`service_flag::REFUSE`].
//!
//! # How a backend is chosen
//!
//! `SERVICE_SLOTS[first + index]` with `index` below `count`, from a random number or a hash of the
//! flow ([`Algorithm`]); weights are slots that name a backend several times. A set of slots never
//! changes once it is live: a change writes another and replaces the service's row.

use crate::{Addr, Port, Tick, layout::plain};

plain! {
    /// An address that is served.
    pub struct ServiceKey = 20 {
        /// The address. Unspecified: the node's own addresses.
        pub addr: Addr,
        /// The port; 0 with protocol 0 for all that is not named.
        pub port: Port,
        /// IP protocol.
        pub proto: u8,
        /// Zero.
        pub _pad: u8,
    }
    /// What is served there.
    pub struct Service = 40 {
        /// Number of the service's port, from 1. All addresses of it share the number, and with it
        /// affinity and source ranges.
        pub id: u32,
        /// [`service_flag`].
        pub flags: u32,
        /// First slot of the backends for clients inside the cluster.
        pub inside_first: u32,
        /// How many; 0: nobody serves them.
        pub inside_count: u32,
        /// First slot of the backends for clients outside.
        pub outside_first: u32,
        /// How many.
        pub outside_count: u32,
        /// How long a client keeps its backend, seconds since it last began a connection; 0: not at all.
        pub affinity: u32,
        /// Which [`SnatPool`] connections from outside get their source from; 0: the node's own.
        pub pool: u32,
        /// Epoch slot that moves when this service changes.
        pub slot: u16,
        /// [`Algorithm`].
        pub algorithm: u8,
        /// [`Forwarding`].
        pub forwarding: u8,
        /// Zero.
        pub _pad: u32,
    }
    /// Who serves. Its number, which slots and recipes hold, belongs to one port of one service.
    pub struct Backend = 32 {
        /// Where.
        pub addr: Addr,
        /// On which port.
        pub port: Port,
        /// IP protocol.
        pub proto: u8,
        /// [`BackendState`].
        pub state: u8,
        /// [`Service::id`].
        pub service: u32,
        /// Zero.
        pub _pad: [u32; 2],
    }
    /// One place of a set of backends.
    pub struct ServiceSlot = 4 {
        /// Number of the backend.
        pub backend: u32,
    }
    /// Who keeps its backend.
    pub struct AffinityKey = 24 {
        /// The client's address; in the socket hooks the cookie of its network namespace, in the last
        /// two words.
        pub client: Addr,
        /// [`Service::id`].
        pub service: u32,
        /// 1 for a cookie.
        pub cookie: u32,
    }
    /// The backend that a client keeps.
    pub struct Affinity = 8 {
        /// Its number.
        pub backend: u32,
        /// When the client last began a connection.
        pub last_used: Tick,
    }
    /// A range of clients that a service names; longest prefix.
    pub struct RangeKey = 24 {
        /// 32 and the significant bits of the address (IPv4 counts from bit 96).
        pub prefix_len: u32,
        /// [`Service::id`].
        pub service: u32,
        /// The address; bits past the prefix are zero.
        pub addr: Addr,
    }
    /// Where connections of a service get their source from, when they are translated.
    pub struct SnatPool = 40 {
        /// IPv4 address, or [`Addr::UNSPECIFIED`].
        pub v4: Addr,
        /// IPv6 address, or [`Addr::UNSPECIFIED`].
        pub v6: Addr,
        /// First port.
        pub first: Port,
        /// Number of ports, a power of two, minus one (a mask). Host order.
        pub mask: u16,
        /// Zero.
        pub _pad: u32,
    }
    /// What a backend has been given.
    pub struct BackendCounter = 32 {
        /// Connections (for datagrams: flows) that were given to it.
        pub connections: u64,
        /// Packets of clients to it.
        pub packets: u64,
        /// Bytes of them.
        pub bytes: u64,
        /// Packets of its answers that came by here.
        pub answers: u64,
    }
    /// One service that a socket has been translated for.
    pub struct SocketService = 40 {
        /// The service's address as the program named it ...
        pub service: Addr,
        /// ... and the backend's.
        pub backend: Addr,
        /// The service's port.
        pub service_port: Port,
        /// The backend's port.
        pub backend_port: Port,
        /// Number of the backend; 0: an empty place.
        pub id: u32,
    }
    /// The services that a socket has been translated for: the last four, in its own storage.
    pub struct SocketServices = 168 {
        /// Place that is written next.
        pub next: u32,
        /// Zero.
        pub _pad: u32,
        /// The services.
        pub known: [SocketService; 4],
    }
}

/// Bits of [`Service::flags`].
pub mod service_flag {
    /// Row of an address alone: what no other row serves there is refused.
    pub const REFUSE: u32 = 1;
    /// Only for clients inside the cluster: a cluster address is nobody's business outside.
    pub const INSIDE_ONLY: u32 = 2;
    /// Clients outside must be in one of the service's source ranges ...
    pub const RANGES: u32 = 4;
    /// ... or, with this, in none.
    pub const RANGES_DENY: u32 = 8;
    /// A row of the unspecified address that holds for this node's own addresses only, and not for other
    /// nodes' (a workload's port on its host).
    pub const THIS_NODE: u32 = 16;
}

/// How a backend is chosen.
pub struct Algorithm;

impl Algorithm {
    /// By a random number.
    pub const RANDOM: u8 = 0;
    /// By a hash of the flow, out of a Maglev table: every node answers alike.
    pub const MAGLEV: u8 = 1;
}

/// How a connection from outside reaches a backend of another node.
pub struct Forwarding;

impl Forwarding {
    /// With this node's address as its source; the answers come back through this node.
    pub const SNAT: u8 = 0;
    /// With its own source, the service's address in an IP option of the first packets; the
    /// backend's node answers the client itself.
    pub const DSR_OPTION: u8 = 1;
    /// Untouched, in IPIP; likewise.
    pub const DSR_IPIP: u8 = 2;

    /// The name that people see.
    pub const fn name(forwarding: u8) -> &'static str {
        match forwarding {
            Self::SNAT => "snat",
            Self::DSR_OPTION => "dsr-option",
            Self::DSR_IPIP => "dsr-ipip",
            _ => "unknown",
        }
    }
}

/// What may be done with a backend.
pub struct BackendState;

impl BackendState {
    /// There is none under this number. Streams that it was given stay, datagrams go to another.
    pub const ABSENT: u8 = 0;
    /// Takes connections.
    pub const ACTIVE: u8 = 1;
    /// Keeps its connections and gets no new ones: it terminates, is not ready, or is drained.
    pub const DRAINING: u8 = 2;
    /// Has failed: what it was given goes to another.
    pub const DOWN: u8 = 3;

    /// The name that people see.
    pub const fn name(state: u8) -> &'static str {
        match state {
            Self::ABSENT => "absent",
            Self::ACTIVE => "active",
            Self::DRAINING => "draining",
            Self::DOWN => "down",
            _ => "unknown",
        }
    }
}

/// Protocol numbers, option and layout of the options that carry a service's address to its backend
/// (Cilium's contract N3.4).
pub mod dsr {
    /// IPv4 option: copied into fragments, class 0, number 26.
    pub const OPTION_V4: u8 = 0x9a;
    /// Bytes of the IPv4 option: type, length, port, address.
    pub const LENGTH_V4: u32 = 8;
    /// IPv6 destination option; unknown ones are skipped.
    pub const OPTION_V6: u8 = 0x1b;
    /// Bytes of the IPv6 extension header: next, length, option type, option length, address, port, zeroes.
    pub const LENGTH_V6: u32 = 24;
    /// IP protocol of IPv4 in IP (RFC 2003).
    pub const IPIP: u8 = 4;
    /// IP protocol of IPv6 in IP (RFC 2473).
    pub const IPV6: u8 = 41;
}
