//! Services: finding the one that a packet or a system call is for, and choosing who serves it.
//!
//! There is one way to find and one to choose, for all hooks. The tables' contract is in
//! `cirri_abi::service`.

use cirri_abi::{
    Addr, Affinity, AffinityKey, Algorithm, Backend, BackendState, DropReason, Forwarding, Hook, Port, Service,
    ServiceKey, Tick, Tuple, VXLAN_PORT, proto, service_flag,
};

use crate::{
    Packed, ends,
    place::{PlaceKind, is_host, is_peer},
    slow::{Next, Outcome, Refusal, Scratch},
    traits::{Packet, Services, Tables},
    wire,
};

/// What a packet's service decided for it, as far as the later stages need it.
#[derive(Clone, Copy, Default, Debug)]
pub struct Served {
    /// Number of the backend; 0 also for one that another node has chosen.
    pub backend: u32,
    /// Epoch slot of the service, 0 for none.
    pub slot: u16,
    /// [`Forwarding`].
    pub forwarding: u8,
    /// Number of the pool of sources.
    pub pool: u32,
    /// The packet is for a service.
    pub yes: bool,
}

/// Who asks: what affinity is kept for, and what the flow's hash is made of.
#[derive(Clone, Copy)]
pub(crate) struct Client {
    /// See [`AffinityKey::client`].
    pub key: Addr,
    /// See [`AffinityKey::cookie`].
    pub cookie: u32,
    /// Hash of the flow, for Maglev, and where chance must not choose.
    pub hash: u32,
    /// The packet is met before the stack and, if its backend is of this node, again behind it. Chosen by
    /// chance each time, backends of this node would lose theirs twice.
    pub twice: bool,
    /// In the cluster.
    pub inside: bool,
}

/// The service behind an address, if there is one; see `cirri_abi::service` for the order.
#[inline(always)]
pub(crate) fn find<'a, T: Services>(
    tables: &'a T,
    addr: &Addr,
    port: Port,
    protocol: u8,
    inside: bool,
) -> Option<&'a Service> {
    // The overlay's own port: no service takes a node's.
    if port == Port::new(VXLAN_PORT) && protocol == proto::UDP && (is_host(tables, addr) || is_peer(tables, addr)) {
        return None;
    }
    // Rows of the unspecified address are nobody's address.
    if *addr == Addr::ANY_V4 || *addr == Addr::UNSPECIFIED {
        return None;
    }
    let exact = tables.service(&ServiceKey { addr: *addr, port, proto: protocol, _pad: 0 });
    if exact.is_some() {
        return exact;
    }
    if tables.node_port(port) {
        let own = is_host(tables, addr);
        if own || (inside && is_peer(tables, addr)) {
            let any = if addr.is_v4() { Addr::ANY_V4 } else { Addr::UNSPECIFIED };
            if let Some(service) = tables.service(&ServiceKey { addr: any, port, proto: protocol, _pad: 0 })
                && (own || service.flags & service_flag::THIS_NODE == 0)
            {
                return Some(service);
            }
        }
    }
    tables.service(&ServiceKey { addr: *addr, port: Port { be: 0 }, proto: 0, _pad: 0 })
}

/// Whether a packet of the node's own may be a datagram for a service's address, asked of a packet that was not taken
/// apart. Connected sockets send those that no service's port was found for.
#[inline(always)]
pub fn may_be_datagram_for_service<P: Packet, T: Services>(packet: &P, tables: &T) -> bool {
    let Some(eth) = packet.load::<wire::Ethernet>(0) else {
        return false;
    };
    let addr = match u16::from_be(eth.ethertype) {
        wire::ETHERTYPE_IPV4 if packet.load::<u8>(wire::L3 + 9) == Some(proto::UDP) => {
            packet.load::<u32>(wire::L3 + 16).map(Addr::v4_word)
        }
        wire::ETHERTYPE_IPV6 if packet.load::<u8>(wire::L3 + 6) == Some(proto::UDP) => {
            packet.load::<wire::Ipv6>(wire::L3).map(|ip| Addr { words: ip.dst })
        }
        _ => None,
    };
    addr.is_some_and(|addr| tables.service(&ServiceKey { addr, port: Port { be: 0 }, proto: 0, _pad: 0 }).is_some())
}

/// What the node's own stack sends, and answers nothing: a datagram to a port of a service's address that no service
/// has is refused.
#[inline(always)]
pub(crate) fn refuse_own<T: Services>(tables: &T, s: &Scratch) -> Outcome {
    let Tuple { dst, dport, proto, .. } = s.parsed.tuple;
    if proto == proto::UDP
        && let Some(service) = find(tables, &dst, dport, proto, true)
        && service.flags & service_flag::REFUSE != 0
    {
        return Err(Refusal::answered(DropReason::NO_BACKEND));
    }
    Ok(Next::Done(Packed::CONTINUE))
}

/// Chooses a backend for a new connection and lets the client keep it, if the service says so.
/// `None`: nobody serves.
#[inline(always)]
pub(crate) fn choose<'a, T: Services>(tables: &'a T, service: &Service, client: &Client) -> Option<(u32, &'a Backend)> {
    let now = tables.now();
    let key = AffinityKey { client: client.key, service: service.id, cookie: client.cookie };
    if service.affinity != 0
        && let Some(kept) = tables.affinity(&key)
        && is_within(kept.last_used, now, service.affinity)
        && let Some(backend) = tables.backend(kept.backend)
        && backend.state == BackendState::ACTIVE
        && backend.service == service.id
    {
        tables.keep_affinity(&key, &Affinity { backend: kept.backend, last_used: now });
        return Some((kept.backend, backend));
    }
    let (first, count) = if client.inside {
        (service.inside_first, service.inside_count)
    } else {
        (service.outside_first, service.outside_count)
    };
    if count == 0 {
        return None;
    }
    let by_hash = client.twice || service.algorithm == Algorithm::MAGLEV;
    let mut index = if by_hash { client.hash } else { tables.random() } % count;
    // A set may name a backend that has failed a moment ago.
    for _ in 0..ATTEMPTS {
        let number = tables.service_slot(first.wrapping_add(index));
        if let Some(backend) = tables.backend(number)
            && can_be_chosen(backend)
            && backend.service == service.id
        {
            if service.affinity != 0 {
                tables.keep_affinity(&key, &Affinity { backend: number, last_used: now });
            }
            return Some((number, backend));
        }
        index = if index + 1 < count { index + 1 } else { 0 };
    }
    None
}

/// Slots that are looked at for one connection.
const ATTEMPTS: u32 = 4;

/// Slots may also name backends that drain: when no other is left.
#[inline(always)]
fn can_be_chosen(backend: &Backend) -> bool {
    backend.state == BackendState::ACTIVE || backend.state == BackendState::DRAINING
}

/// Whether a client that last came at `last` still keeps its backend.
#[inline(always)]
fn is_within(last: Tick, now: Tick, seconds: u32) -> bool {
    let age_ns = (now.count.wrapping_sub(last.count) as u64) << Tick::SHIFT;
    age_ns <= seconds as u64 * 1_000_000_000
}

/// Whether what was given to a backend stays with it. Streams stay when it has left the service:
/// another could only reset them. Nothing stays with one that has failed.
#[inline(always)]
pub(crate) fn is_kept<T: Services>(tables: &T, number: u32, addr: &Addr, port: Port, protocol: u8) -> bool {
    match tables.backend(number) {
        Some(backend) if backend.addr == *addr && backend.port == port => match backend.state {
            BackendState::ACTIVE | BackendState::DRAINING => true,
            BackendState::DOWN => false,
            _ => is_stream(protocol),
        },
        _ => is_stream(protocol),
    }
}

/// Whether a backend is there, and takes new connections while there are others.
#[inline(always)]
pub(crate) fn takes_new<T: Services>(tables: &T, number: u32, addr: &Addr, port: Port) -> bool {
    match tables.backend(number) {
        Some(backend) => backend.addr == *addr && backend.port == port && backend.state == BackendState::ACTIVE,
        None => false,
    }
}

#[inline(always)]
const fn is_stream(protocol: u8) -> bool {
    matches!(protocol, proto::TCP | proto::SCTP)
}

/// The same number on every node for the same flow. A client that keeps its backend has one for all
/// of its ports.
#[inline(always)]
pub(crate) fn flow_hash(tuple: &Tuple, affinity: bool) -> u32 {
    let ports = tuple.dport.be as u64 | (tuple.proto as u64) << 16;
    let ports = if affinity { ports } else { ports | (tuple.sport.be as u64) << 32 };
    let mut hash = mix(SEED, ports);
    hash = mix(hash, tuple.src.words[0] as u64 | (tuple.src.words[1] as u64) << 32);
    hash = mix(hash, tuple.src.words[2] as u64 | (tuple.src.words[3] as u64) << 32);
    hash = mix(hash, tuple.dst.words[2] as u64 | (tuple.dst.words[3] as u64) << 32);
    (hash >> 32) as u32
}

/// Any odd constants with many ones do; these are from the expansion of the golden ratio and of pi.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
const MULTIPLIER: u64 = 0x2437_54a1_5b2c_6d7d;

#[inline(always)]
const fn mix(hash: u64, word: u64) -> u64 {
    let product = (hash ^ word).wrapping_mul(MULTIPLIER);
    product ^ product >> 29
}

/// The stage: finds the service of a connection that no table knows, and its backend. Leaves the tuple
/// as the backend will see it in `translated`.
#[inline(always)]
pub(crate) fn serve<P: Packet, T: Tables>(_packet: &P, tables: &T, s: &mut Scratch) -> Outcome {
    s.served = Served::default();
    let Tuple { src, dst, dport, proto, .. } = s.parsed.tuple;
    let workload = s.hook == Hook::FROM_WORKLOAD;
    // What another node has handed on may be for one of its own ports.
    let any_node = workload || s.is_unwrapped();
    let Some(service) = find(tables, &dst, dport, proto, any_node) else {
        // What another node has packed up is for a service, or nobody's.
        return if s.is_unwrapped() { Err(DropReason::UNSUPPORTED_DSR.into()) } else { Ok(Next::Go) };
    };
    // Nobody is refused, and so told, in another's name.
    if s.hook == Hook::FROM_NETWORK
        && (s.from.set_address(tables, &src).is_err() || !ends::comes_by_network(tables, &s.from))
    {
        return Err(DropReason::INVALID_SOURCE_IP.into());
    }
    let inside = s.hook != Hook::FROM_NETWORK || s.from.kind == PlaceKind::Remote;
    let slot = service.slot;
    s.served = Served { backend: 0, slot, forwarding: service.forwarding, pool: service.pool, yes: true };
    if service.flags & service_flag::REFUSE != 0 {
        return Err(Refusal::answered(DropReason::NO_BACKEND));
    }
    if !inside && service.flags & service_flag::INSIDE_ONLY != 0 {
        return Err(DropReason::CLUSTER_IP.into());
    }
    if !inside && service.flags & service_flag::RANGES != 0 {
        let named = tables.in_range(service.id, &src);
        if named == (service.flags & service_flag::RANGES_DENY != 0) {
            return Err(DropReason::SOURCE_RANGE.into());
        }
    }
    if s.is_unwrapped() {
        // Another node has chosen, and sent it here in IPIP.
        if service.forwarding != Forwarding::DSR_IPIP {
            return Err(DropReason::UNSUPPORTED_DSR.into());
        }
        s.translated.dst = s.outer_dst;
        s.translated.dport = s.outer_port;
        return Ok(Next::Go);
    }
    let hash = flow_hash(&s.parsed.tuple, service.affinity != 0);
    let client = Client { key: src, cookie: 0, hash, twice: s.hook == Hook::FROM_NETWORK, inside };
    let Some((number, backend)) = choose(tables, service, &client) else {
        return Err(Refusal::answered(DropReason::NO_BACKEND));
    };
    s.served.backend = number;
    s.translated.dst = backend.addr;
    s.translated.dport = backend.port;
    Ok(Next::Go)
}
