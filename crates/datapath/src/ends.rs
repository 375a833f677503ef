//! Both ends of a new connection: who may have sent its first packet, and where that leads.

use cirri_abi::{Addr, DropReason, Hook, Identity, Port, VXLAN_PORT, endpoint_flag, ipcache_flag, node_flag, proto};

use crate::{
    Packed, carry, neighbour,
    parse::Parsed,
    place::{Place, PlaceKind, block_of, is_behind, is_disputed, is_host, is_peer, peer_identity},
    slow::{Next, Outcome, Refusal, Scratch, quiet},
    traits::{Packet, Tables},
};

/// Who may have sent this, as far as the hook can tell. Leaves the sender's place in `from`.
#[inline(always)]
pub(crate) fn check_source<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch) -> Outcome {
    let src = &s.parsed.tuple.src;
    match s.hook {
        Hook::FROM_WORKLOAD => {
            let Some(endpoint) = tables.device(packet.ifindex()) else {
                return Err(DropReason::NOT_READY.into());
            };
            s.from.set_endpoint(endpoint, block_of(tables, src));
            let own = if src.is_v4() { *src == endpoint.v4 } else { *src == endpoint.v6 };
            if !(own && *src != Addr::UNSPECIFIED) && endpoint.flags & endpoint_flag::ANY_SOURCE == 0 {
                // A workload's stack talks from its link-local address before it has another.
                let chatter = !src.is_v4() && (neighbour::is_link_local(src) || *src == Addr::UNSPECIFIED);
                return Err(Refusal { quiet: chatter, ..DropReason::INVALID_SOURCE_IP.into() });
            }
        }
        Hook::FROM_OVERLAY => {
            let Some(key) = packet.tunnel_key() else {
                return Err(DropReason::NO_TUNNEL_KEY.into());
            };
            if s.option_addr != Addr::UNSPECIFIED && is_peer(tables, &Addr::v4_word(key.remote)) {
                return client_of_peer(tables, s);
            }
            let Some(entry) = tables.ipcache(src) else {
                return Err(DropReason::NO_CONFIG.into());
            };
            if !is_behind(entry, &key) {
                return Err(DropReason::UNKNOWN_SENDER.into());
            }
            if key.vni == Identity::UNKNOWN.id {
                return Err(DropReason::INVALID_IDENTITY.into());
            }
            s.from.set_entry(entry);
            s.from.identity = peer_identity(key.vni);
            s.disputed = is_disputed(s.from.identity, entry.identity);
        }
        _ => {
            // From the node's stack, or from the network: the address says who it is, so it must
            // not be one that can only come another way.
            // A packet for a service has been asked for already.
            let known = s.served.yes && s.hook == Hook::FROM_NETWORK;
            if !known && let Err(reason) = s.from.set_address(tables, src) {
                return Err(match s.hook {
                    // Nobody can be there, or it is one of our own addresses that nobody has yet.
                    Hook::FROM_NETWORK if reason != DropReason::NO_CONFIG => DropReason::INVALID_SOURCE_IP.into(),
                    _ => quiet(reason),
                });
            }
            if s.hook == Hook::FROM_NETWORK && !comes_by_network(tables, &s.from) {
                return Err(DropReason::INVALID_SOURCE_IP.into());
            }
        }
    }
    Ok(Next::Go)
}

/// Whether packets of a sender come by the network at all.
#[inline(always)]
pub(crate) fn comes_by_network<T: Tables>(tables: &T, from: &Place) -> bool {
    let tunnel = match tables.node() {
        Some(node) => node.flags & node_flag::TUNNEL != 0,
        None => true,
    };
    match from.kind {
        PlaceKind::World => true,
        PlaceKind::Remote => !tunnel || from.identity == Identity::REMOTE_NODE,
        PlaceKind::Local | PlaceKind::Host => false,
    }
}

/// A client of a service, whose packet another node hands on with the client's own address. It must be
/// from outside: everybody else comes with its own node's headers.
#[inline(always)]
fn client_of_peer<T: Tables>(tables: &T, s: &mut Scratch) -> Outcome {
    s.from.set_address(tables, &s.parsed.tuple.src)?;
    if s.from.kind != PlaceKind::World {
        return Err(DropReason::UNKNOWN_SENDER.into());
    }
    Ok(Next::Go)
}

/// The other end of a connection that no table knows: of a service, its backend.
#[inline(always)]
pub(crate) fn locate<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    let dst = &s.translated.dst;
    match s.hook {
        Hook::FROM_WORKLOAD => {
            if let Err(reason) = s.to.set_address(tables, dst) {
                return Err(Refusal { quiet: reason == DropReason::UNKNOWN_L3_TARGET, ..reason.into() });
            }
            let node = s.to.kind == PlaceKind::Host || s.to.identity == Identity::REMOTE_NODE;
            if node && s.translated.proto == proto::UDP && s.translated.dport == Port::new(VXLAN_PORT) {
                return Err(DropReason::ENCAPSULATION_PROHIBITED.into());
            }
        }
        Hook::TO_WORKLOAD => {
            let Some(endpoint) = tables.device(packet.ifindex()) else {
                return Err(DropReason::NOT_READY.into());
            };
            if *dst != endpoint.v4 && *dst != endpoint.v6 {
                return Err(quiet(DropReason::UNKNOWN_L3_TARGET));
            }
            s.to.set_endpoint(endpoint, block_of(tables, dst));
        }
        _ => {
            s.to.set_address(tables, dst)?;
            match s.to.kind {
                PlaceKind::Local => {}
                PlaceKind::Host if s.served.yes => {}
                // Before anything is remembered of it, or a port taken.
                _ if s.served.yes && carry::hops(packet, !dst.is_v4()) <= 1 => {
                    return Err(DropReason::TTL_EXCEEDED.into());
                }
                _ if s.served.yes => {}
                // An answer of its stack must find the service's address again.
                PlaceKind::Host if s.option_addr != Addr::UNSPECIFIED => {}
                PlaceKind::Host => {
                    // Out of the overlay it may still carry the workload's gateway as its receiver.
                    packet.set_for_us();
                    return Ok(Next::Done(Packed::CONTINUE));
                }
                _ => return Err(DropReason::UNROUTABLE.into()),
            }
        }
    }
    Ok(Next::Go)
}

/// The node's own traffic to another node's workloads. Packets of workloads come here too, already
/// decided on.
#[inline(always)]
pub(crate) fn host_to_overlay<P: Packet, T: Tables>(packet: &mut P, tables: &T, parsed: &Parsed) -> Outcome {
    let Some(entry) = tables.ipcache(&parsed.tuple.dst) else {
        return Err(DropReason::NO_CONFIG.into());
    };
    if entry.flags & ipcache_flag::REMOTE == 0 {
        return Err(quiet(DropReason::NO_TUNNEL_PEER));
    }
    if !is_host(tables, &parsed.tuple.src) {
        return Err(DropReason::INVALID_SOURCE_IP.into());
    }
    if !packet.set_tunnel_key(entry.peer, Identity::HOST.id) {
        return Err(DropReason::NO_TUNNEL_PEER.into());
    }
    Ok(Next::Done(Packed::CONTINUE))
}
