//! Where addresses are: workloads of this node, peers, the world; and the node itself.

use crate::{Addr, Identity, Port, RulesetSlot, layout::plain};

plain! {
    /// A workload of this node. Found by its device (from the workload) and by its addresses.
    pub struct Endpoint = 56 {
        /// The node's side of the workload's device.
        pub ifindex: u32,
        /// Who it is.
        pub identity: Identity,
        /// Number of the endpoint on this node, 1 to 65535; what people see in lists.
        pub id: u16,
        /// Its rule set. 0: none yet, and everything is dropped.
        pub ruleset: RulesetSlot,
        /// Ethernet address inside the workload.
        pub mac: [u8; 6],
        /// [`endpoint_flag`].
        pub flags: u8,
        /// Zero.
        pub _pad: u8,
        /// Who other nodes are told that it is, by the VNI, as long as they may not know its identity;
        /// 0: that.
        pub tunnel_identity: Identity,
        /// Its IPv4 address, or [`Addr::UNSPECIFIED`].
        pub v4: Addr,
        /// Its IPv6 address, or [`Addr::UNSPECIFIED`].
        pub v6: Addr,
    }
    /// Key of the address cache: a prefix of an [`Addr`]. IPv4 prefixes count from bit 96.
    pub struct IpcacheKey = 20 {
        /// Significant bits, 0 to 128.
        pub prefix_len: u32,
        /// The address; bits past the prefix are zero.
        pub addr: Addr,
    }
    /// What is known about an address.
    pub struct Ipcache = 16 {
        /// Who is there.
        pub identity: Identity,
        /// The most specific CIDR block that policies name and that holds this address; 0 for
        /// none. A second dimension beside the identity, so that `ipBlock` matches workloads and
        /// nodes too and identities stay few.
        pub block: u32,
        /// IPv4 address of the node that it is behind, network order; 0 if not behind a peer.
        pub peer: u32,
        /// Epoch slot of the route to that peer; 0 for none.
        pub slot: u16,
        /// [`ipcache_flag`].
        pub flags: u16,
    }
    /// What the programs know about their node.
    pub struct NodeConfig = 64 {
        /// [`node_flag`].
        pub flags: u32,
        /// The overlay device, 0 with direct routing.
        pub overlay_ifindex: u32,
        /// The address that IPv4 masquerade uses, or [`Addr::UNSPECIFIED`].
        pub v4: Addr,
        /// The address that IPv6 masquerade uses, or [`Addr::UNSPECIFIED`].
        pub v6: Addr,
        /// First port of masquerade.
        pub masquerade_first: Port,
        /// Number of ports of masquerade, a power of two, minus one (a mask). Host order.
        pub masquerade_mask: u16,
        /// Zero.
        pub _pad: u32,
        /// Cookie of the node's network namespace: its sockets may not be bound to node ports.
        pub netns_cookie: u64,
        /// Zero.
        pub _pad2: [u32; 2],
    }
}

/// Bits of [`Endpoint::flags`].
pub mod endpoint_flag {
    /// Let the workload send from any address (a router or a VPN inside it).
    pub const ANY_SOURCE: u8 = 1;
}

/// Bits of [`Ipcache::flags`].
pub mod ipcache_flag {
    /// An address of this node itself.
    pub const HOST: u16 = 1;
    /// Behind the peer in [`super::Ipcache::peer`].
    pub const REMOTE: u16 = 2;
    /// In this node's pod range. Without an endpoint there is nobody.
    pub const LOCAL_POOL: u16 = 4;
    /// Reached without masquerade (a native-routing range).
    pub const NO_MASQUERADE: u16 = 8;
}

/// Bits of [`NodeConfig::flags`].
pub mod node_flag {
    /// Masquerade IPv4 to the world.
    pub const MASQUERADE_V4: u32 = 1;
    /// Masquerade IPv6 to the world.
    pub const MASQUERADE_V6: u32 = 2;
    /// Peers are reached through the overlay; without it, through routes.
    pub const TUNNEL: u32 = 4;
    /// Report nothing but drops.
    pub const DROPS_ONLY: u32 = 8;
    /// Some service has a backend in this node's own network namespace: its answers leave by the
    /// node's stack, and have to be looked at there.
    pub const HOST_BACKENDS: u32 = 16;
    /// A load balancer alone: backends are plain hosts outside, which direct return may be used for.
    pub const ALONE: u32 = 32;
}
