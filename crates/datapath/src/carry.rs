//! Carrying a recipe out.

use cirri_abi::{Action, DropReason, GATEWAY_MAC, Hook, Port, Recipe, Rewrite, Tuple, proto};

use crate::{
    Packed, dsr,
    parse::Parsed,
    traits::{Packet, Tables},
    wire::{self, L3},
};

/// What a rewrite must know of the packet's headers.
#[derive(Clone, Copy)]
pub(crate) struct Headers {
    /// Offset of the transport header; 0 if there is none (a later fragment).
    pub l4: u32,
    pub sport: Port,
    pub dport: Port,
    pub proto: u8,
    pub v6: bool,
}

impl Headers {
    #[inline(always)]
    pub fn parsed(parsed: &Parsed) -> Self {
        Headers {
            l4: if parsed.later_fragment { 0 } else { parsed.l4 },
            sport: parsed.tuple.sport,
            dport: parsed.tuple.dport,
            proto: parsed.tuple.proto,
            v6: !parsed.tuple.src.is_v4(),
        }
    }
}

/// Rewrites the packet and says where it goes.
#[inline(always)]
pub(crate) fn carry<P: Packet, T: Tables>(packet: &mut P, tables: &T, recipe: &Recipe, headers: &Headers) -> Packed {
    if !has_hop(packet, recipe, headers.v6) {
        return refuse(tables, packet, DropReason::TTL_EXCEEDED);
    }
    if recipe.rewrite != Rewrite::NONE && !rewrite(packet, recipe, headers) {
        return refuse(tables, packet, DropReason::WRITE_ERROR);
    }
    if recipe.action == Action::IPIP && !dsr::wrap(packet, tables, recipe, headers.v6) {
        return refuse(tables, packet, DropReason::WRITE_ERROR);
    }
    dispatch(packet, tables, recipe)
}

/// Whether the packet has a hop left, where a recipe hands it on through this node. It has one less then.
#[inline(always)]
pub(crate) fn has_hop<P: Packet>(packet: &mut P, recipe: &Recipe, v6: bool) -> bool {
    let goes_on = matches!(recipe.action, Action::DEVICE | Action::TUNNEL | Action::IPIP)
        && matches!(recipe.hook, Hook::FROM_NETWORK | Hook::FROM_OVERLAY);
    !goes_on || age(packet, v6).is_some()
}

/// Whether a recipe can be carried out before the stack: its next hop is known by its Ethernet address,
/// and its device takes such frames.
#[inline(always)]
pub(crate) fn is_raw<P: Packet, T: Tables>(packet: &P, tables: &T, recipe: &Recipe) -> bool {
    matches!(recipe.action, Action::DEVICE | Action::IPIP)
        && recipe.mac != [0; 6]
        && (recipe.out == packet.ifindex() || tables.edge_device(recipe.out) != 0)
}

/// Whether a packet's checksum is left to a device: then it holds the sum of the pseudo header alone. This
/// machine's own packets and its guests' can be so, and only the stack knows how to go on with one. Of
/// others one in 65,536 looks like it, and takes the same way.
#[inline(always)]
pub(crate) fn is_left_to_device<P: Packet>(packet: &P, headers: &Headers) -> bool {
    let Some(checksum) = wire::checksum_offset(headers.proto) else {
        return false;
    };
    if headers.l4 == 0 || !matches!(headers.proto, proto::TCP | proto::UDP) {
        return false;
    }
    let Some(stated) = packet.load::<u16>(headers.l4 + checksum) else {
        return true;
    };
    let mut sum = (headers.proto as u16).to_be() as u64;
    if headers.v6 {
        let Some(ip) = packet.load::<wire::Ipv6>(L3) else {
            return true;
        };
        let length = (u16::from_be(ip.length) as u32).wrapping_sub(headers.l4 - L3 - 40) as u16;
        sum += length.to_be() as u64;
        let mut i = 0;
        while i < 4 {
            sum += ip.src[i] as u64 + ip.dst[i] as u64;
            i += 1;
        }
    } else {
        let Some(ip) = packet.load::<wire::Ipv4>(L3) else {
            return true;
        };
        let length = (u16::from_be(ip.length) as u32).wrapping_sub(headers.l4 - L3) as u16;
        sum += length.to_be() as u64 + ip.src as u64 + ip.dst as u64;
    }
    stated == wire::fold_checksum(sum)
}

/// How many more hops a packet may take.
#[inline(always)]
pub(crate) fn hops<P: Packet>(packet: &P, v6: bool) -> u8 {
    packet.load::<u8>(if v6 { L3 + 7 } else { L3 + 8 }).unwrap_or_default()
}

/// Counts down the hops of a packet that goes on through this node: without it two nodes that send each
/// other a packet would do so for ever. `None`: it has none left.
#[inline(always)]
fn age<P: Packet>(packet: &mut P, v6: bool) -> Option<()> {
    if v6 {
        let hops = packet.load::<u8>(L3 + 7)?;
        return (hops > 1 && packet.store(L3 + 7, &(hops - 1))).then_some(());
    }
    let [ttl, protocol] = packet.load::<[u8; 2]>(L3 + 8)?;
    if ttl <= 1 {
        return None;
    }
    let aged = [ttl - 1, protocol];
    let delta = difference(u16::from_ne_bytes([ttl, protocol]) as u32, u16::from_ne_bytes(aged) as u32);
    (packet.store(L3 + 8, &aged) && packet.update_l3_checksum(L3 + 10, delta)).then_some(())
}

/// Sends the packet the recipe's way, as it is.
#[inline(always)]
pub(crate) fn dispatch<P: Packet, T: Tables>(packet: &mut P, tables: &T, recipe: &Recipe) -> Packed {
    match recipe.action {
        Action::LOCAL => {
            let macs = wire::Macs { dst: wire::mac_words(recipe.mac), src: wire::mac_words(GATEWAY_MAC) };
            if !packet.store(0, &macs) {
                return refuse(tables, packet, DropReason::WRITE_ERROR);
            }
            if recipe.hook != Hook::FROM_WORKLOAD {
                packet.set_for_us();
            }
            Packed::local(recipe.out)
        }
        Action::TUNNEL => {
            if !packet.set_tunnel_key(recipe.peer, recipe.src_identity.id) {
                return refuse(tables, packet, DropReason::NO_TUNNEL_PEER);
            }
            packet.set_decided();
            Packed::device(recipe.out)
        }
        Action::DEVICE | Action::IPIP if P::RAW => {
            let macs = wire::Macs { dst: wire::mac_words(recipe.mac), src: wire::mac_words(recipe.own_mac) };
            if !packet.store(0, &macs) {
                return refuse(tables, packet, DropReason::WRITE_ERROR);
            }
            Packed::device(recipe.out)
        }
        Action::DEVICE | Action::IPIP => {
            packet.set_decided();
            Packed::neighbour(recipe.out, recipe.peer)
        }
        _ => Packed::CONTINUE,
    }
}

#[inline(always)]
fn refuse<P: Packet, T: Tables>(tables: &T, packet: &P, reason: DropReason) -> Packed {
    tables.count(cirri_abi::CounterIndex::reason(reason.code, cirri_abi::Direction::EGRESS), packet.length());
    Packed::drop(reason)
}

/// Replaces the ends' addresses and ports, checksums included.
#[inline(always)]
fn rewrite<P: Packet>(packet: &mut P, recipe: &Recipe, headers: &Headers) -> bool {
    let (source, destination) = (recipe.rewrite & Rewrite::SOURCE != 0, recipe.rewrite & Rewrite::DESTINATION != 0);
    let addressed = if headers.v6 {
        (!source || packet.store(L3 + 8, &recipe.source.words))
            && (!destination || packet.store(L3 + 24, &recipe.destination.words))
    } else {
        (!source || packet.store(L3 + 12, &recipe.source.word()))
            && (!destination || packet.store(L3 + 16, &recipe.destination.word()))
            && packet.update_l3_checksum(L3 + 10, recipe.csum_delta)
    };
    if !addressed {
        return false;
    }
    if headers.l4 == 0 {
        return true;
    }
    let Some(checksum) = wire::checksum_offset(headers.proto) else {
        return true;
    };
    let checksum = headers.l4 + checksum;
    let udp = headers.proto == proto::UDP;
    if headers.proto != proto::ICMP && !packet.update_l4_checksum(checksum, recipe.csum_delta, true, udp, headers.v6) {
        return false;
    }
    let echo = matches!(headers.proto, proto::ICMP | proto::ICMPV6);
    let mut delta = 0;
    if source && headers.sport != recipe.source_port {
        let at = if echo { headers.l4 + 4 } else { headers.l4 };
        if !packet.store(at, &recipe.source_port.be) {
            return false;
        }
        delta = difference(headers.sport.be as u32, recipe.source_port.be as u32);
    }
    if destination && headers.dport != recipe.destination_port {
        let at = if echo { headers.l4 + 4 } else { headers.l4 + 2 };
        if !packet.store(at, &recipe.destination_port.be) {
            return false;
        }
        delta = fold(delta as u64 + difference(headers.dport.be as u32, recipe.destination_port.be as u32) as u64);
    }
    delta == 0 || packet.update_l4_checksum(checksum, delta, false, udp, headers.v6)
}

/// Ones'-complement difference of one word, as `bpf_csum_diff` forms it.
#[inline(always)]
pub(crate) const fn difference(old: u32, new: u32) -> u32 {
    fold(!old as u64 + new as u64)
}

/// The difference between the addresses of two tuples.
#[inline(always)]
pub(crate) fn tuple_difference(old: &Tuple, new: &Tuple) -> u32 {
    let mut sum = 0u64;
    let mut i = 0;
    while i < 4 {
        sum += !old.src.words[i] as u64 + new.src.words[i] as u64;
        sum += !old.dst.words[i] as u64 + new.dst.words[i] as u64;
        i += 1;
    }
    fold(sum)
}

#[inline(always)]
const fn fold(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    ((sum & 0xffff_ffff) + (sum >> 32)) as u32
}
