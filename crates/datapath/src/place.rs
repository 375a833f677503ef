//! The two ends of a packet: who they are, and how they are reached.

use cirri_abi::{Addr, DropReason, Endpoint, GATEWAY_V4, Identity, Ipcache, RulesetSlot, ipcache_flag};

use crate::{
    neighbour::is_link_local,
    traits::{Services, Tables, TunnelKey},
};

/// One end of a connection.
#[derive(Clone, Copy, Default, Debug)]
pub struct Place {
    /// Who.
    pub identity: Identity,
    /// Local: who other nodes are told that it is.
    pub tunnel_identity: Identity,
    /// The policy CIDR block that its address is in, 0 for none.
    pub block: u32,
    /// Local: the node's side of its device.
    pub ifindex: u32,
    /// Remote: the node it is behind (IPv4, network order).
    pub peer: u32,
    /// What its place rests on: a rule set's slot if local, a peer's if remote, else 0.
    pub slot: u16,
    /// Local: its number.
    pub endpoint: u16,
    /// Local: its Ethernet address.
    pub mac: [u8; 6],
    /// How it is reached.
    pub kind: PlaceKind,
    /// World that is reached without masquerade.
    pub plain: bool,
}

/// How an end is reached.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum PlaceKind {
    /// Outside the cluster, through the node's routes.
    #[default]
    World = 0,
    /// A workload of this node.
    Local,
    /// This node itself.
    Host,
    /// Behind another node of the cluster, or that node itself.
    Remote,
}

impl Place {
    /// The rule set that decides for this end; `None` if this node does not decide for it.
    #[inline(always)]
    pub fn ruleset(&self) -> Option<RulesetSlot> {
        (self.kind == PlaceKind::Local).then_some(self.slot)
    }

    /// A workload of this node.
    #[inline(always)]
    pub(crate) fn set_endpoint(&mut self, endpoint: &Endpoint, block: u32) {
        self.identity = endpoint.identity;
        self.tunnel_identity = match endpoint.tunnel_identity {
            Identity::UNKNOWN => endpoint.identity,
            other => other,
        };
        self.block = block;
        self.ifindex = endpoint.ifindex;
        self.peer = 0;
        self.slot = endpoint.ruleset;
        self.endpoint = endpoint.id;
        self.mac = endpoint.mac;
        self.kind = PlaceKind::Local;
        self.plain = false;
    }

    /// Where an address is. `Err`: nobody can be there.
    #[inline(always)]
    pub(crate) fn set_address<T: Tables>(&mut self, tables: &T, addr: &Addr) -> Result<(), DropReason> {
        if is_no_place(addr) {
            return Err(DropReason::UNKNOWN_L3_TARGET);
        }
        let Some(entry) = tables.ipcache(addr) else {
            return Err(DropReason::NO_CONFIG);
        };
        if let Some(endpoint) = tables.endpoint(addr) {
            self.set_endpoint(endpoint, entry.block);
            return Ok(());
        }
        if entry.flags & ipcache_flag::LOCAL_POOL != 0 {
            return Err(DropReason::NO_LOCAL_ENDPOINT);
        }
        self.set_entry(entry);
        Ok(())
    }

    /// An address that is no workload of this node.
    #[inline(always)]
    pub(crate) fn set_entry(&mut self, entry: &Ipcache) {
        self.identity = entry.identity;
        self.block = entry.block;
        self.ifindex = 0;
        self.peer = entry.peer;
        self.slot = entry.slot;
        self.endpoint = 0;
        self.kind = kind_of(entry);
        self.plain = entry.flags & ipcache_flag::NO_MASQUERADE != 0;
    }
}

/// The block of an address, 0 for none.
#[inline(always)]
pub(crate) fn block_of<T: Tables>(tables: &T, addr: &Addr) -> u32 {
    match tables.ipcache(addr) {
        Some(entry) => entry.block,
        None => 0,
    }
}

/// Whether an address is this node's own.
#[inline(always)]
pub(crate) fn is_host<T: Services>(tables: &T, addr: &Addr) -> bool {
    match tables.ipcache(addr) {
        Some(entry) => entry.flags & ipcache_flag::HOST != 0,
        None => false,
    }
}

/// Whether an address is another node's own.
#[inline(always)]
pub(crate) fn is_peer<T: Services>(tables: &T, addr: &Addr) -> bool {
    match tables.ipcache(addr) {
        Some(entry) => entry.identity.id == Identity::REMOTE_NODE.id,
        None => false,
    }
}

/// Whether an address lives behind the very node that the outer header names.
#[inline(always)]
pub(crate) fn is_behind(entry: &Ipcache, key: &TunnelKey) -> bool {
    entry.flags & ipcache_flag::REMOTE != 0 && entry.peer == key.remote
}

/// The identity that a VNI stands for here: what is the host to its node is a remote node to us.
#[inline(always)]
pub(crate) fn peer_identity(vni: u32) -> Identity {
    if vni == Identity::HOST.id { Identity::REMOTE_NODE } else { Identity { id: vni } }
}

/// Whether a sender that a packet stands for and the one that its address is known for are different workloads.
#[inline(always)]
pub(crate) fn is_disputed(said: Identity, known: Identity) -> bool {
    said != known && said.id >= Identity::MIN_ALLOCATED && known.id >= Identity::MIN_ALLOCATED
}

#[inline(always)]
fn kind_of(entry: &Ipcache) -> PlaceKind {
    if entry.flags & ipcache_flag::HOST != 0 {
        PlaceKind::Host
    } else if entry.flags & ipcache_flag::REMOTE != 0 {
        PlaceKind::Remote
    } else {
        PlaceKind::World
    }
}

/// Whether an address is no single place that routes lead to: multicast, broadcast, unspecified,
/// loopback, one link's, or the workloads' gateway. Other IPv4 link-local addresses are places: clouds
/// have services there that the node's routes lead to.
#[inline(always)]
pub(crate) fn is_no_place(addr: &Addr) -> bool {
    if addr.is_v4() {
        let first = (u32::from_be(addr.word()) >> 24) as u8;
        first >= 224 || first == 0 || first == 127 || addr.word() == GATEWAY_V4.word()
    } else {
        let [a, b, c, d] = addr.words;
        let loopback_or_unspecified = a == 0 && b == 0 && c == 0 && u32::from_be(d) <= 1;
        u32::from_be(a) >> 24 == 0xff || is_link_local(addr) || loopback_or_unspecified
    }
}
