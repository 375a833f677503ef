//! The two doors of the room: the packet, and the tables.

use cirri_abi::{
    Addr, Affinity, AffinityKey, Backend, Endpoint, FlowEvent, FlowKey4, FragmentKey, FragmentPorts, Ipcache,
    NodeConfig, PolicyEntry, PolicyKey, Port, Recipe, Service, ServiceKey, SnatPool, Tick, Tuple,
};

use crate::{Outcome, Scratch, Stage, Wire};

/// A packet at a hook, from its Ethernet header on.
///
/// Offsets are bytes from the start of the Ethernet header. Every access is checked by the host;
/// `None` and `false` mean that the packet is too short or the kernel refused.
pub trait Packet {
    /// Met before the stack (XDP): it can be dropped, passed on, or sent out of a device to a next hop
    /// whose Ethernet address is known; nothing else.
    const RAW: bool;

    /// Reads a header.
    fn load<W: Wire>(&self, offset: u32) -> Option<W>;
    /// Writes a header.
    fn store<W: Wire>(&mut self, offset: u32, value: &W) -> bool;
    /// Length in bytes, Ethernet header included.
    fn length(&self) -> u32;
    /// Whether it carries a VLAN tag, which the kernel keeps beside the bytes.
    fn tagged(&self) -> bool;
    /// Whether its Ethernet address is this device's, as far as the host can tell: others' frames are met
    /// where a device listens to all.
    fn is_for_us(&self) -> bool;
    /// The device that the packet is met on.
    fn ifindex(&self) -> u32;
    /// Makes sure that the first `length` bytes (or all, if there are fewer) can be loaded.
    fn pull(&mut self, length: u32);
    /// Opens `bytes` of room behind the first `at` bytes: behind the Ethernet header (14), for an outer
    /// IP header of the packet's own family (20 or 40) or more, or behind the IP header without options,
    /// for options.
    fn open(&mut self, at: u32, bytes: u32) -> bool;
    /// Takes away `bytes` behind the Ethernet header: an outer IP header of the inner one's family.
    fn close(&mut self, bytes: u32) -> bool;
    /// Cuts the packet to `length` bytes. Few hosts can make it longer.
    fn resize(&mut self, length: u32) -> bool;
    /// Whether it stands for several packets that are cut to size when they leave.
    fn is_segmented(&self) -> bool;
    /// Adds a difference (as `bpf_csum_diff` forms it) to the IPv4 header checksum at `offset`.
    fn update_l3_checksum(&mut self, offset: u32, delta: u32) -> bool;
    /// Adds a difference to the transport checksum at `offset`. `pseudo`: the difference is of
    /// addresses, which stand in the pseudo header. `udp`: a checksum of zero means none and stays.
    fn update_l4_checksum(&mut self, offset: u32, delta: u32, pseudo: bool, udp: bool, v6: bool) -> bool;
    /// From the overlay: who sent it, as the outer headers say.
    fn tunnel_key(&self) -> Option<TunnelKey>;
    /// Before it goes into the overlay: to which node (IPv4, network order) and as whom.
    fn set_tunnel_key(&mut self, peer: u32, vni: u32) -> bool;
    /// Whether a hook of this node has already decided on it (only ever set by this node).
    fn decided(&self) -> bool;
    /// Marks it as decided on.
    fn set_decided(&mut self);
    /// Marks it as meant for us, whatever Ethernet address it carried.
    fn set_for_us(&mut self);
}

/// Outer headers of a packet from the overlay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TunnelKey {
    /// The VNI: the sender's identity, 24 bits.
    pub vni: u32,
    /// The sending node's IPv4 address, network order.
    pub remote: u32,
}

/// Which of the flow tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Table {
    /// Connections that both sides have agreed to.
    Flows,
    /// Connections that only one side has spoken for. A flood fills this one only.
    Pending,
}

/// A recipe in its table. Other CPUs may write to it meanwhile.
pub trait Flow {
    /// Looks at the recipe where it stands.
    fn recipe(&self) -> &Recipe;
    /// Copies the recipe to where it is needed whole.
    fn copy_to(&self, out: &mut Recipe);
    /// Counts a packet of `length` bytes, and notes the time if the tick moved.
    fn touch(&self, now: Tick, length: u32);
    /// Sets the state and adds TCP flags.
    fn set_state(&self, state: u8, tcp_flags: u8);
}

/// Where a route leads.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct NextHop {
    /// Device to leave by.
    pub ifindex: u32,
    /// IPv4 neighbour in network order; 0 to let the kernel ask its routes.
    pub peer: u32,
    /// Its Ethernet address, zeroes if nobody knows.
    pub mac: [u8; 6],
    /// The Ethernet address of the device; zeroes with `mac`.
    pub own_mac: [u8; 6],
    /// Longest packet, bytes from the IP header on; 0: unknown.
    pub mtu: u16,
}

/// What is asked to find a service and choose a backend, at every hook and in the system calls.
pub trait Services {
    /// The service of exactly this key.
    fn service(&self, key: &ServiceKey) -> Option<&Service>;
    /// A backend by its number.
    fn backend(&self, number: u32) -> Option<&Backend>;
    /// The backend in a slot; 0 for none.
    fn service_slot(&self, index: u32) -> u32;
    /// The backend that a client keeps.
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    /// Lets a client keep a backend.
    fn keep_affinity(&self, key: &AffinityKey, affinity: &Affinity);
    /// Whether a service (by number) names the range that an address is in.
    fn in_range(&self, service: u32, addr: &Addr) -> bool;
    /// Whether a service may be behind this port of the node's addresses.
    fn node_port(&self, port: Port) -> bool;
    /// What is known about an address, by longest prefix.
    fn ipcache(&self, addr: &Addr) -> Option<&Ipcache>;
    /// This node.
    fn node(&self) -> Option<&NodeConfig>;
    /// The tick of now.
    fn now(&self) -> Tick;
    /// A number that a sender cannot foresee.
    fn random(&self) -> u32;
    /// Counts a connection that was given to a backend.
    fn count_connection(&self, backend: u32);
}

/// Everything the packet path remembers or is told.
pub trait Tables: Services {
    /// A recipe in its table.
    type Flow: Flow;

    /// Looks an IPv4 flow up among the established.
    fn flow4(&self, key: &FlowKey4) -> Option<Self::Flow>;
    /// Looks an IPv6 flow up among the established.
    fn flow6(&self, key: &Tuple) -> Option<Self::Flow>;
    /// Looks a flow of either family up.
    fn flow(&self, table: Table, tuple: &Tuple) -> Option<Self::Flow>;
    /// Inserts or replaces. `false`: the table is full, or with `new` the key exists.
    fn insert(&self, table: Table, tuple: &Tuple, recipe: &Recipe, new: bool) -> bool;
    /// Inserts a pending connection's recipe, as it stands, into the flow table. `false` also if it
    /// does not stand there any more. `spare` is overwritten.
    fn promote(&self, tuple: &Tuple, flow: &Self::Flow, spare: &mut Recipe) -> bool;
    /// Removes, if it is there.
    fn remove(&self, table: Table, tuple: &Tuple);

    /// The epoch of a slot; see `cirri_abi::epoch_slot`.
    fn epoch(&self, slot: u16) -> u32;
    /// Whether the rule sets in force were made with knowledge of an identity.
    fn knows_identity(&self, identity: u32) -> bool;
    /// The workload of this node that has this address.
    fn endpoint(&self, addr: &Addr) -> Option<&Endpoint>;
    /// The workload of this node behind this device.
    fn device(&self, ifindex: u32) -> Option<&Endpoint>;
    /// What a rule set answers; see `cirri_abi::policy` for how keys are asked. `None` also if the
    /// slot holds no rule set.
    fn policy(&self, ruleset: u16, key: &PolicyKey) -> Option<&PolicyEntry>;
    /// For a device that takes frames that were met before the stack of another: the last four bytes of
    /// its Ethernet address, as in the packet; else 0.
    fn edge_device(&self, ifindex: u32) -> u32;
    /// Where connections of a service get their source from.
    fn snat_pool(&self, number: u32) -> Option<&SnatPool>;
    /// Where the node's routes lead for a packet of this tuple.
    fn route(&self, tuple: &Tuple) -> Option<NextHop>;

    /// Ports of a datagram whose first fragment was seen.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts>;
    /// Remembers them.
    fn remember_fragment(&self, key: &FragmentKey, ports: &FragmentPorts);

    /// Counts a packet of `bytes` to a backend, or its answer.
    fn count_backend(&self, backend: u32, answer: bool, bytes: u32);
    /// Adds a packet of `bytes` to a counter; see `cirri_abi::CounterIndex`.
    fn count(&self, index: u32, bytes: u32);
    /// Fills in the time and reports. A full ring counts a lost event.
    fn emit(&self, event: &mut FlowEvent);

    /// Runs one stage of the slow path. A host with a small stack gives each a frame of its own.
    #[inline(always)]
    fn stage<P: Packet>(&self, stage: Stage, packet: &mut P, scratch: &mut Scratch) -> Outcome
    where
        Self: Sized,
    {
        crate::run_stage(stage, packet, self, scratch)
    }
}
