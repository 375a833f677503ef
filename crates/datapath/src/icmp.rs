//! ICMP errors: they belong to the flow that they quote.

use cirri_abi::{Action, Addr, DropReason, Hook, Port, Rewrite, Tuple, proto};

use crate::{
    Packed,
    carry::{self, difference, tuple_difference},
    door, dsr, epochs,
    place::is_host,
    slow::{Next, Outcome, Scratch},
    traits::{Flow, Packet, Table, Tables},
    wire::{self, L3},
};

/// Finds the flow that the error's quoted packet belongs to and sends the error its way, so that
/// path-MTU messages and unreachables arrive, translated, and nothing else does.
///
/// The error must be for the sender of what it quotes: another receiver would get it past policy.
#[inline(always)]
pub(crate) fn related<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    let hook = s.hook;
    let inner = s.parsed.l4 + 8;
    let v6 = !s.parsed.tuple.src.is_v4();
    let ports = match quoted(packet, inner, v6, &mut s.opener) {
        Ok(ports) => ports,
        // The node's stack may still read something in it.
        Err(_) if matches!(hook, Hook::FROM_NETWORK | Hook::TO_NETWORK) => return unrelated(packet, tables, s),
        Err(reason) => return Err(reason.into()),
    };
    if s.opener.src != s.parsed.tuple.dst {
        return unrelated(packet, tables, s);
    }
    // The error travels against the packet that it quotes: the way of that packet's answers.
    s.answer = s.opener.turned();
    let flow = match tables.flow(Table::Flows, &s.answer) {
        Some(flow) => Some(flow),
        None => tables.flow(Table::Pending, &s.answer),
    };
    let Some(flow) = flow else {
        return unrelated(packet, tables, s);
    };
    flow.copy_to(&mut s.forward);
    let through = match hook {
        // Any node on the way may report; who it is does not matter.
        Hook::FROM_OVERLAY => true,
        _ => door(hook, packet) == s.forward.door,
    };
    if s.forward.hook != hook || !through || (s.is_unwrapped() && !s.forward.is_to_backend()) {
        return unrelated(packet, tables, s);
    }
    if epochs(tables, &s.forward.slots) != s.forward.epoch {
        return Err(DropReason::UNKNOWN_STATE.into());
    }
    s.from.identity = s.forward.src_identity;
    s.to.identity = s.forward.dst_identity;
    if !carry::has_hop(packet, &s.forward, v6) {
        return Err(DropReason::TTL_EXCEEDED.into());
    }
    if s.forward.rewrite != Rewrite::NONE && !translate(packet, s, inner, ports, v6) {
        return Err(DropReason::WRITE_ERROR.into());
    }
    if s.forward.action == Action::IPIP && !dsr::wrap(packet, tables, &s.forward, v6) {
        return Err(DropReason::WRITE_ERROR.into());
    }
    Ok(Next::Done(carry::dispatch(packet, tables, &s.forward)))
}

/// An error about no flow of a workload: the node's own business, or nobody's. A workload tells its
/// node about packets to itself only: it has no say in other connections of the node.
#[inline(always)]
fn unrelated<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &Scratch) -> Outcome {
    let own = match s.hook {
        Hook::FROM_NETWORK | Hook::TO_NETWORK => true,
        Hook::FROM_WORKLOAD => s.opener.dst == s.parsed.tuple.src && is_host(tables, &s.parsed.tuple.dst),
        Hook::TO_WORKLOAD => is_host(tables, &s.parsed.tuple.src),
        _ => is_host(tables, &s.parsed.tuple.dst),
    };
    if !own || s.is_unwrapped() {
        return Err(DropReason::UNKNOWN_STATE.into());
    }
    if s.hook == Hook::FROM_OVERLAY {
        packet.set_for_us();
    }
    Ok(Next::Done(Packed::CONTINUE))
}

/// The tuple of the quoted packet; answers the offset of its transport header.
#[inline(always)]
pub(crate) fn quoted<P: Packet>(packet: &P, inner: u32, v6: bool, out: &mut Tuple) -> Result<u32, DropReason> {
    *out = Tuple::default();
    let l4 = if v6 {
        let Some(ip) = packet.load::<wire::Ipv6>(inner) else {
            return Err(DropReason::CT_INVALID_HEADER);
        };
        out.src.words = ip.src;
        out.dst.words = ip.dst;
        out.proto = ip.next;
        // A datagram's first fragment: that one was too big.
        match packet.load::<wire::Fragment6>(inner + 40) {
            Some(fragment) if ip.next == wire::FRAGMENT6 && u16::from_be(fragment.offset) & 0xfff8 == 0 => {
                out.proto = fragment.next;
                inner + 48
            }
            _ => inner + 40,
        }
    } else {
        let Some(ip) = packet.load::<wire::Ipv4>(inner) else {
            return Err(DropReason::CT_INVALID_HEADER);
        };
        if ip.version_ihl & 0xf < 5 {
            return Err(DropReason::CT_INVALID_HEADER);
        }
        out.src = Addr::v4_word(ip.src);
        out.dst = Addr::v4_word(ip.dst);
        out.proto = ip.proto;
        inner + (ip.version_ihl as u32 & 0xf) * 4
    };
    match out.proto {
        proto::TCP | proto::UDP | proto::SCTP => {
            let Some(ports) = packet.load::<wire::Ports>(l4) else {
                return Err(DropReason::CT_INVALID_HEADER);
            };
            out.sport = Port { be: ports.sport };
            out.dport = Port { be: ports.dport };
        }
        proto::ICMP | proto::ICMPV6 => {
            let Some(icmp) = packet.load::<wire::Icmp>(l4) else {
                return Err(DropReason::CT_INVALID_HEADER);
            };
            match icmp.kind {
                8 | 128 => out.sport = Port { be: icmp.id },
                0 | 129 => out.dport = Port { be: icmp.id },
                _ => {}
            }
        }
        _ => {}
    }
    Ok(l4)
}

/// Rewrites the error as the recipe rewrites the flow, and its quotation the other way round.
///
/// The quoted IP header stays valid, so it adds nothing to the ICMP checksum; only the port does,
/// and in IPv6 the addresses (outer in the pseudo header, quoted in the body). The outer source may be
/// any router's, so its difference is another than the recipe's. The quoted transport checksum is left:
/// nobody checks it, and it is mostly cut off.
#[inline(always)]
fn translate<P: Packet>(packet: &mut P, s: &Scratch, inner: u32, l4: u32, v6: bool) -> bool {
    let recipe = &s.forward;
    let (source, destination) = (recipe.rewrite & Rewrite::SOURCE != 0, recipe.rewrite & Rewrite::DESTINATION != 0);
    let checksum = s.parsed.l4 + 2;
    let outer = tuple_difference(&s.parsed.tuple, &s.parsed.tuple.rewritten(recipe));
    let echo = matches!(s.opener.proto, proto::ICMP | proto::ICMPV6);
    // Quoted the other way round: where the flow's source changes, the quotation's destination does.
    let addressed = if v6 {
        (!source || packet.store(L3 + 8, &recipe.source.words) && packet.store(inner + 24, &recipe.source.words))
            && (!destination
                || packet.store(L3 + 24, &recipe.destination.words)
                    && packet.store(inner + 8, &recipe.destination.words))
            && packet.update_l4_checksum(checksum, outer, true, false, true)
            && packet.update_l4_checksum(checksum, recipe.csum_delta, false, false, true)
    } else {
        (!source || packet.store(L3 + 12, &recipe.source.word()) && packet.store(inner + 16, &recipe.source.word()))
            && (!destination
                || packet.store(L3 + 16, &recipe.destination.word())
                    && packet.store(inner + 12, &recipe.destination.word()))
            && packet.update_l3_checksum(L3 + 10, outer)
            && packet.update_l3_checksum(inner + 10, recipe.csum_delta)
    };
    addressed
        && (!source
            || translate_port(packet, checksum, l4 + if echo { 4 } else { 2 }, s.opener.dport, recipe.source_port, v6))
        && (!destination
            || translate_port(
                packet,
                checksum,
                l4 + if echo { 4 } else { 0 },
                s.opener.sport,
                recipe.destination_port,
                v6,
            ))
}

#[inline(always)]
fn translate_port<P: Packet>(packet: &mut P, checksum: u32, at: u32, old: Port, new: Port, v6: bool) -> bool {
    old == new
        || packet.store(at, &new.be)
            && packet.update_l4_checksum(checksum, difference(old.be as u32, new.be as u32), false, false, v6)
}
