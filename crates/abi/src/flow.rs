//! The flow table: one recipe per direction of a connection.

use crate::{Addr, Identity, Port, layout::plain};

plain! {
    /// The addresses and ports of a packet, as they stood when it arrived at a hook.
    ///
    /// Key of the IPv6 flow tables. ICMP echo: a request has its identifier as source port and 0 as
    /// destination port, a reply the other way round, so that turning a tuple gives its answer's.
    pub struct Tuple = 40 {
        /// Source address.
        pub src: Addr,
        /// Destination address.
        pub dst: Addr,
        /// Source port.
        pub sport: Port,
        /// Destination port.
        pub dport: Port,
        /// IP protocol.
        pub proto: u8,
        /// Zero.
        pub _pad: u8,
        /// Zero.
        pub _pad2: u16,
    }
    /// Key of the IPv4 flow tables.
    pub struct FlowKey4 = 16 {
        /// Source address, as in the packet.
        pub src: u32,
        /// Destination address, as in the packet.
        pub dst: u32,
        /// Source port.
        pub sport: Port,
        /// Destination port.
        pub dport: Port,
        /// IP protocol.
        pub proto: u8,
        /// Zero.
        pub _pad: u8,
        /// Zero.
        pub _pad2: u16,
    }
    /// What to do with the packets of one direction of a connection.
    ///
    /// Two cache lines; the first is all that an established packet without a rewrite touches.
    pub struct Recipe = 128 {
        /// Sum (wrapping) of the epochs in `slots` when this was decided. An epoch only grows, so
        /// the sum is equal exactly as long as none of them moved.
        pub epoch: u32,
        /// The device that packets of this direction come through ...
        pub door: u32,
        /// What the decision rests on: epoch slots of the two ends and of the service; 0 is the node's
        /// configuration.
        pub slots: [u16; 3],
        /// ... and the [`Hook`]. A packet that comes another way is not of this connection.
        pub hook: u8,
        /// [`Action`].
        pub action: u8,
        /// [`Rewrite`], a set of bits.
        pub rewrite: u8,
        /// [`recipe_flag`].
        pub flags: u8,
        /// [`State`].
        pub state: u8,
        /// TCP flags seen in this direction.
        pub tcp_flags: u8,
        /// Ethernet address of the receiver, for [`Action::LOCAL`]; of the next hop, if it is known,
        /// for [`Action::DEVICE`] and [`Action::IPIP`]. Zeroes: the kernel finds it.
        pub mac: [u8; 6],
        /// New source port, for [`Rewrite::SOURCE`].
        pub source_port: Port,
        /// Device to leave by.
        pub out: u32,
        /// Node to tunnel to (IPv4, network order), for [`Action::TUNNEL`]; the neighbour to send
        /// to for [`Action::DEVICE`] with IPv4, 0 to ask the routes.
        pub peer: u32,
        /// Who sends in this direction.
        pub src_identity: Identity,
        /// When the last packet came.
        pub last_seen: Tick,
        /// New destination port, for [`Rewrite::DESTINATION`].
        pub destination_port: Port,
        /// Longest packet that the way takes, bytes from the IP header on, for what makes packets
        /// longer; 0: not limited.
        pub mtu: u16,
        /// Packets in this direction. Exact for a flow that one CPU handles.
        pub packets: u64,
        /// Bytes in this direction, from the Ethernet header on.
        pub bytes: u64,
        /// Who receives in this direction.
        pub dst_identity: Identity,
        /// The rule that allowed the connection to leave its sender; see [`crate::Cookie`].
        pub egress_cookie: u32,
        /// The rule that allowed the connection to enter its receiver.
        pub ingress_cookie: u32,
        /// When the connection began.
        pub since: Tick,
        /// Ones'-complement difference of all addresses, for checksums (see `bpf_csum_diff`).
        pub csum_delta: u32,
        /// Number of the backend that a service chose, 0 for none.
        pub backend: u32,
        /// Ethernet address of the device to leave by, where [`Recipe::mac`] is a next hop's.
        pub own_mac: [u8; 6],
        /// Zero.
        pub _pad: u16,
        /// New source address, for [`Rewrite::SOURCE`].
        pub source: Addr,
        /// New destination address, for [`Rewrite::DESTINATION`]; the backend's, for [`Action::IPIP`].
        pub destination: Addr,
    }
    /// Names the fragments of one datagram.
    pub struct FragmentKey = 40 {
        /// Source address.
        pub src: Addr,
        /// Destination address.
        pub dst: Addr,
        /// Identification of the datagram; network order.
        pub id: u32,
        /// IP protocol.
        pub proto: u8,
        /// Zero.
        pub _pad: u8,
        /// Zero.
        pub _pad2: u16,
    }
    /// The ports that its first fragment carried.
    pub struct FragmentPorts = 4 {
        /// Source port.
        pub sport: Port,
        /// Destination port.
        pub dport: Port,
    }
    /// Coarse time since boot: units of 2^30 ns (1.074 s), from `bpf_ktime_get_coarse_ns`.
    pub struct Tick = 4 {
        /// The count.
        pub count: u32,
    }
}

impl Tick {
    /// Bits to shift nanoseconds by.
    pub const SHIFT: u32 = 30;

    /// The tick that a time since boot (ns, CLOCK_MONOTONIC) falls in.
    #[inline(always)]
    pub const fn from_ns(ns: u64) -> Tick {
        Tick { count: (ns >> Self::SHIFT) as u32 }
    }
}

/// Where a packet was met. Stands in recipes and events.
pub struct Hook;

impl Hook {
    /// Coming out of a workload (tcx ingress of its device).
    pub const FROM_WORKLOAD: u8 = 1;
    /// Going into a workload from this node's stack (tcx egress of its device).
    pub const TO_WORKLOAD: u8 = 2;
    /// Coming in from the network (XDP, or tcx ingress, of a node's device).
    pub const FROM_NETWORK: u8 = 3;
    /// Going out to the network from this node's stack (tcx egress of a node's device).
    pub const TO_NETWORK: u8 = 4;
    /// Coming out of the overlay (tcx ingress of the overlay device).
    pub const FROM_OVERLAY: u8 = 5;
    /// Going into the overlay from this node's stack (tcx egress of the overlay device).
    pub const TO_OVERLAY: u8 = 6;

    /// The name that people see.
    pub const fn name(hook: u8) -> &'static str {
        match hook {
            Self::FROM_WORKLOAD => "from-workload",
            Self::TO_WORKLOAD => "to-workload",
            Self::FROM_NETWORK => "from-network",
            Self::TO_NETWORK => "to-network",
            Self::FROM_OVERLAY => "from-overlay",
            Self::TO_OVERLAY => "to-overlay",
            _ => "unknown",
        }
    }
}

/// What a recipe does with the packet once it is rewritten.
pub struct Action;

impl Action {
    /// Straight into a workload of this node: set the Ethernet addresses, `bpf_redirect_peer`.
    pub const LOCAL: u8 = 1;
    /// Into the overlay: set the tunnel key, redirect to the overlay device.
    pub const TUNNEL: u8 = 2;
    /// Out of a device: `bpf_redirect_neigh`.
    pub const DEVICE: u8 = 3;
    /// Go on to where it was going: this node's stack, or the workload behind the hook.
    pub const CONTINUE: u8 = 4;
    /// Put into IPIP for the backend in [`Recipe::destination`], then as [`Action::DEVICE`].
    pub const IPIP: u8 = 5;

    /// The name that people see.
    pub const fn name(action: u8) -> &'static str {
        match action {
            Self::LOCAL => "local",
            Self::TUNNEL => "tunnel",
            Self::DEVICE => "device",
            Self::CONTINUE => "continue",
            Self::IPIP => "ipip",
            _ => "unknown",
        }
    }
}

/// Which ends of the packet a recipe rewrites: a set of bits.
pub struct Rewrite;

impl Rewrite {
    /// Nothing.
    pub const NONE: u8 = 0;
    /// The source becomes [`Recipe::source`] and [`Recipe::source_port`].
    pub const SOURCE: u8 = 1;
    /// The destination becomes [`Recipe::destination`] and [`Recipe::destination_port`].
    pub const DESTINATION: u8 = 2;
    /// Both do.
    pub const BOTH: u8 = 3;
}

/// Bits of [`Recipe::flags`].
pub mod recipe_flag {
    /// This direction answers: policy was asked for the opposite one.
    pub const REPLY: u8 = 1;
    /// The answers take another way (DSR): there is no recipe for the opposite direction.
    pub const ONE_WAY: u8 = 2;
    /// The opposite direction's packets arrive translated: another node received them for a service, and
    /// this direction alone puts the service's address back.
    pub const HALF: u8 = 8;
    /// A service chose [`super::Recipe::backend`], and its packets are counted to it.
    pub const SERVED: u8 = 16;
    /// Until it is established its packets carry the service's address in an IP option.
    pub const DSR_OPTION: u8 = 4;
}

/// How far a connection has come. The same in both directions' recipes, as far as each has seen.
pub struct State;

impl State {
    /// Only the opener has sent. Lives in the table of unfinished connections.
    pub const NEW: u8 = 0;
    /// The other side has answered. TCP: the opener's ACK is still missing.
    pub const REPLIED: u8 = 1;
    /// Both sides have spoken. Lives in the flow table.
    pub const ESTABLISHED: u8 = 2;
    /// A FIN or RST went by; the entry stays for a short while.
    pub const CLOSING: u8 = 3;

    /// The name that people see.
    pub const fn name(state: u8) -> &'static str {
        match state {
            Self::NEW => "new",
            Self::REPLIED => "replied",
            Self::ESTABLISHED => "established",
            Self::CLOSING => "closing",
            _ => "unknown",
        }
    }
}

impl Tuple {
    /// The tuple of the answer.
    #[inline(always)]
    pub const fn turned(&self) -> Tuple {
        Tuple {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            proto: self.proto,
            _pad: 0,
            _pad2: 0,
        }
    }

    /// The tuple that leaves when `recipe` has been carried out on a packet of this one.
    #[inline(always)]
    pub const fn rewritten(&self, recipe: &Recipe) -> Tuple {
        let mut out = *self;
        if recipe.rewrite & Rewrite::SOURCE != 0 {
            out.src = recipe.source;
            out.sport = recipe.source_port;
        }
        if recipe.rewrite & Rewrite::DESTINATION != 0 {
            out.dst = recipe.destination;
            out.dport = recipe.destination_port;
        }
        out
    }

    /// The tuple that the opposite direction's packets arrive with, if packets of this one obey `recipe`.
    #[inline(always)]
    pub const fn opposite(&self, recipe: &Recipe) -> Tuple {
        if recipe.flags & recipe_flag::HALF != 0 { self.turned() } else { self.rewritten(recipe).turned() }
    }

    /// The key of the IPv4 tables; meaningful only if the addresses are IPv4.
    #[inline(always)]
    pub const fn key4(&self) -> FlowKey4 {
        FlowKey4 {
            src: self.src.word(),
            dst: self.dst.word(),
            sport: self.sport,
            dport: self.dport,
            proto: self.proto,
            _pad: 0,
            _pad2: 0,
        }
    }
}

impl Recipe {
    /// Whether packets of this go to a service's backend.
    #[inline(always)]
    pub const fn is_to_backend(&self) -> bool {
        self.flags & recipe_flag::REPLY == 0 && self.slots[2] != 0
    }
}

impl FlowKey4 {
    /// The same in the form of both families.
    #[inline(always)]
    pub const fn tuple(&self) -> Tuple {
        Tuple {
            src: Addr::v4_word(self.src),
            dst: Addr::v4_word(self.dst),
            sport: self.sport,
            dport: self.dport,
            proto: self.proto,
            _pad: 0,
            _pad2: 0,
        }
    }
}
