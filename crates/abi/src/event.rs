//! What the packet path tells user space.

use crate::{Identity, Tuple, layout::plain};

plain! {
    /// One thing that happened to a flow.
    pub struct FlowEvent = 104 {
        /// When, ns since boot (CLOCK_MONOTONIC).
        pub time_ns: u64,
        /// The packet's addresses and ports as it arrived at the hook.
        pub tuple: Tuple,
        /// Who sent it.
        pub src_identity: Identity,
        /// Whom it is for.
        pub dst_identity: Identity,
        /// The rule asked for leaving the sender; see [`crate::Cookie`].
        pub egress_cookie: u32,
        /// The rule asked for entering the receiver.
        pub ingress_cookie: u32,
        /// Epoch of the rule set that decided.
        pub generation: u32,
        /// The device it was met on.
        pub ifindex: u32,
        /// The device it leaves by, if the verdict names one.
        pub out: u32,
        /// Length from the Ethernet header on, bytes.
        pub length: u32,
        /// The CIDR block of the peer that policy was asked with, 0 for none.
        pub block: u32,
        /// The endpoint of this node that the verdict is about (its number); 0 for none.
        pub endpoint: u16,
        /// [`EventKind`].
        pub kind: u8,
        /// [`crate::Verdict`].
        pub verdict: u8,
        /// [`crate::DropReason`], 0 if it was not dropped.
        pub reason: u8,
        /// [`crate::Hook`].
        pub hook: u8,
        /// [`Direction`] of the verdict, as the endpoint sees it.
        pub direction: u8,
        /// TCP flags.
        pub tcp_flags: u8,
        /// [`event_flag`].
        pub flags: u8,
        /// [`crate::Action`].
        pub action: u8,
        /// ICMP type and code, if it is ICMP.
        pub icmp: [u8; 2],
        /// Number of the backend that a service chose, 0 for none.
        pub backend: u32,
        /// Zero.
        pub _pad: [u8; 4],
    }
    /// Packets and bytes.
    pub struct Counter = 16 {
        /// Packets.
        pub packets: u64,
        /// Bytes, from the Ethernet header on.
        pub bytes: u64,
    }
}

/// What [`FlowEvent::kind`] says.
pub struct EventKind;

impl EventKind {
    /// A connection was decided on and may begin.
    pub const NEW: u8 = 1;
    /// A packet was dropped.
    pub const DROP: u8 = 2;
    /// A connection was decided on again, because something it rests on changed.
    pub const RENEWED: u8 = 3;
    /// A FIN or RST went by.
    pub const CLOSE: u8 = 4;
}

/// Bits of [`FlowEvent::flags`].
pub mod event_flag {
    /// The packet answers.
    pub const REPLY: u8 = 1;
}

/// Direction as an endpoint sees it.
pub struct Direction;

impl Direction {
    /// Into it.
    pub const INGRESS: u8 = 0;
    /// Out of it.
    pub const EGRESS: u8 = 1;

    /// The name that people see.
    pub const fn name(direction: u8) -> &'static str {
        if direction == Self::EGRESS { "egress" } else { "ingress" }
    }
}

/// Where things are counted in the table of counters (per CPU).
pub struct CounterIndex;

impl CounterIndex {
    /// Packets that a first packet's decision forwarded, and drops: `reason * 2 + direction`, with
    /// reason 0 for forwarded.
    #[inline(always)]
    pub const fn reason(reason: u8, direction: u8) -> u32 {
        reason as u32 * 2 + (direction & 1) as u32
    }
    /// Events that found the ring full.
    pub const LOST_EVENTS: u32 = 512;
    /// Decisions of the slow path: misses in both tables.
    pub const DECIDED: u32 = 513;
    /// Recipes decided on again because an epoch moved.
    pub const RENEWED: u32 = 514;
    /// Connections that moved from the table of unfinished ones to the flow table.
    pub const PROMOTED: u32 = 515;
    /// Entries of the table.
    pub const COUNT: u32 = 516;
}
