//! Echo requests for services' addresses. No machine has these, so whoever meets the request first answers
//! it: people ask so whether an address is served here. It says nothing about backends.

use cirri_abi::{Addr, CounterIndex, DropReason, Hook, Port, ServiceKey, proto};

use crate::{
    answer::{is_enough, send_back},
    carry::difference,
    ends,
    parse::{Parsed, remember_ports},
    slow::{Next, Outcome, Scratch, back},
    traits::{Packet, Tables},
    wire::{self, L3},
};

const REQUEST: u8 = 8;
const REPLY: u8 = 0;
const REQUEST_V6: u8 = 128;
const REPLY_V6: u8 = 129;
/// Hop limit of the reply.
const TTL: u8 = 64;

/// Whether a packet is an echo request or part of one, without options and other extension headers.
///
/// A later fragment has the ports of its first, and of all ICMP messages that are remembered only replies have a
/// destination port. Nothing but a request is remembered on its way to a service's address ([`answer`]).
#[inline(always)]
pub(crate) fn asks(parsed: &Parsed) -> bool {
    let (kind, header) = match parsed.tuple.proto {
        proto::ICMP => (REQUEST, 20),
        proto::ICMPV6 if parsed.fragment => (REQUEST_V6, 40 + wire::FRAGMENT6_LENGTH),
        proto::ICMPV6 => (REQUEST_V6, 40),
        _ => return false,
    };
    let request = if parsed.later_fragment { parsed.tuple.dport.be == 0 } else { parsed.icmp[0] == kind };
    request && parsed.l4 == L3 + header
}

/// Whether that is worth a closer look, asked of a packet that was not taken apart.
#[inline(always)]
pub fn may_be_echo_request<P: Packet>(packet: &P) -> bool {
    let Some(eth) = packet.load::<wire::Ethernet>(0) else {
        return false;
    };
    match u16::from_be(eth.ethertype) {
        wire::ETHERTYPE_IPV4 => {
            packet.load::<u8>(L3 + 9) == Some(proto::ICMP)
                && (packet.load::<u8>(L3 + 20) == Some(REQUEST)
                    || packet.load::<u16>(L3 + 6).is_some_and(|fragment| fragment & wire::FRAGMENT_OFFSET != 0))
        }
        wire::ETHERTYPE_IPV6 => match packet.load::<u8>(L3 + 6) {
            Some(proto::ICMPV6) => packet.load::<u8>(L3 + 40) == Some(REQUEST_V6),
            Some(wire::FRAGMENT6) => packet.load::<u8>(L3 + 40) == Some(proto::ICMPV6),
            _ => false,
        },
        _ => false,
    }
}

/// The stage: makes the reply out of the request and sends it back. [`Next::Go`]: it is for no service.
///
/// A reply has the length and the parts of its request, so each fragment becomes one of the reply where it is met:
/// nothing is put together. The first lets the others follow.
#[inline(always)]
pub(crate) fn answer<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    let (src, dst) = (s.parsed.tuple.src, s.parsed.tuple.dst);
    // The row of an address is that of all its ports.
    let row = ServiceKey { addr: dst, port: Port { be: 0 }, proto: 0, _pad: 0 };
    if dst == Addr::UNSPECIFIED || dst == Addr::ANY_V4 || s.is_unwrapped() || tables.service(&row).is_none() {
        return Ok(Next::Go);
    }
    if s.hook == Hook::FROM_NETWORK {
        if s.from.set_address(tables, &src).is_err() || !ends::comes_by_network(tables, &s.from) {
            return Err(DropReason::INVALID_SOURCE_IP.into());
        }
        if is_enough(tables.now().count, s) {
            return Err(DropReason::NO_BACKEND.into());
        }
    }
    let written = if dst.is_v4() { reply_v4(packet, s) } else { reply_v6(packet, s) };
    if !written {
        return Err(DropReason::WRITE_ERROR.into());
    }
    remember_ports(tables, &s.parsed);
    send_back(packet, s)?;
    tables.count(CounterIndex::reason(0, s.judgement.direction), packet.length());
    Ok(Next::Done(back(s.hook, packet.ifindex())))
}

/// Ends exchanged: that changes no sum.
#[inline(always)]
fn reply_v4<P: Packet>(packet: &mut P, s: &Scratch) -> bool {
    let Some(mut ip) = packet.load::<wire::Ipv4>(L3) else {
        return false;
    };
    let hops = difference(u16::from_ne_bytes([ip.ttl, ip.proto]) as u32, u16::from_ne_bytes([TTL, ip.proto]) as u32);
    (ip.src, ip.dst, ip.ttl) = (ip.dst, ip.src, TTL);
    packet.store(L3, &ip) && packet.update_l3_checksum(L3 + 10, hops) && becomes(packet, s, REPLY)
}

#[inline(always)]
fn reply_v6<P: Packet>(packet: &mut P, s: &Scratch) -> bool {
    let Some(mut ip) = packet.load::<wire::Ipv6>(L3) else {
        return false;
    };
    (ip.src, ip.dst, ip.hop_limit) = (ip.dst, ip.src, TTL);
    packet.store(L3, &ip) && becomes(packet, s, REPLY_V6)
}

/// Another kind of ICMP message. Its header is in the first fragment, and its checksum is of all of them: only what
/// differs there counts.
#[inline(always)]
fn becomes<P: Packet>(packet: &mut P, s: &Scratch, kind: u8) -> bool {
    if s.parsed.later_fragment {
        return true;
    }
    let l4 = s.parsed.l4;
    let (old, new) = (s.parsed.icmp, [kind, s.parsed.icmp[1]]);
    let delta = difference(u16::from_ne_bytes(old) as u32, u16::from_ne_bytes(new) as u32);
    packet.store(l4, &new) && packet.update_l4_checksum(l4 + 2, delta, false, false, kind == REPLY_V6)
}
