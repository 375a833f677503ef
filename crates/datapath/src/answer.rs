//! Answers to what is refused: a reset, or an ICMP error, made out of the packet itself.

use cirri_abi::{DropReason, GATEWAY_MAC, Hook, proto};

use crate::{
    slow::{Next, Outcome, Scratch},
    traits::{Packet, Tables},
    wire::{self, L3, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};

/// Hop limit of what we say ourselves.
const TTL: u8 = 64;
/// Bytes of the refused packet that an ICMP error quotes: its IP header and eight more. RFC 792 asks
/// for no more, and RFC 4443 allows it.
const QUOTED_V4: u32 = 28;
const QUOTED_V6: u32 = 48;

/// The first half of an answer: the packet becomes a reset, or an ICMP error. `s.mtu` is not 0 where the
/// packet is too long.
#[inline(always)]
pub(crate) fn compose<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    let reason = DropReason { code: s.event.reason };
    // Nothing may answer a later fragment (RFC 1122), or what came by another road; of ICMP only a request.
    let asks = match s.parsed.tuple.proto {
        proto::ICMP => s.parsed.icmp[0] == 8,
        proto::ICMPV6 => s.parsed.icmp[0] == 128,
        _ => true,
    };
    let by_own_road = matches!(s.hook, Hook::FROM_WORKLOAD | Hook::FROM_NETWORK | Hook::TO_NETWORK);
    if s.parsed.later_fragment || !asks || !by_own_road {
        return Err(reason.into());
    }
    if s.hook == Hook::FROM_NETWORK && is_enough(tables.now().count, s) {
        return Err(reason.into());
    }
    let said = if s.parsed.tuple.proto == proto::TCP && s.mtu == 0 {
        reset(packet, s)
    } else if s.parsed.tuple.src.is_v4() {
        unreachable_v4(packet, s)
    } else {
        return Ok(Next::Carry);
    };
    if said { Ok(Next::Go) } else { Err(reason.into()) }
}

/// Answers to the network in one tick and on one processor. Their receivers may not have asked: sources can
/// be forged (RFC 4443, 2.4 f).
const ANSWERS: u32 = 1000;

/// Whether enough was answered in this tick.
#[inline(always)]
pub(crate) fn is_enough(now: u32, s: &mut Scratch) -> bool {
    if s.answered_at != now {
        s.answered_at = now;
        s.answered = 0;
    }
    s.answered += 1;
    s.answered > ANSWERS
}

/// The same for ICMPv6, which quotes more.
#[inline(always)]
pub(crate) fn compose_v6<P: Packet>(packet: &mut P, s: &mut Scratch) -> Outcome {
    if unreachable_v6(packet, s) { Ok(Next::Go) } else { Err(DropReason { code: s.event.reason }.into()) }
}

/// The second half: the Ethernet header of what goes back to where the packet came from.
#[inline(always)]
pub(crate) fn send_back<P: Packet>(packet: &mut P, s: &Scratch) -> Outcome {
    let reason = DropReason { code: s.event.reason };
    let Some(macs) = packet.load::<wire::Macs>(0) else {
        return Err(reason.into());
    };
    let workload = s.hook == Hook::FROM_WORKLOAD;
    let src = if workload { wire::mac_words(GATEWAY_MAC) } else { macs.dst };
    if !packet.store(0, &wire::Macs { dst: macs.src, src }) {
        return Err(reason.into());
    }
    if workload {
        packet.set_for_us();
    }
    Ok(Next::Go)
}

/// A TCP reset as RFC 9293 (3.10.7.1) makes it for a port where nobody listens.
#[inline(always)]
fn reset<P: Packet>(packet: &mut P, s: &Scratch) -> bool {
    let Some(old) = packet.load::<wire::Tcp>(s.parsed.l4) else {
        return false;
    };
    let Some(sum) = packet.load::<u16>(s.parsed.l4 + 16) else {
        return false;
    };
    if old.flags & TCP_RST != 0 {
        return false;
    }
    let header = s.parsed.l4 - L3 + (old.offset as u32 >> 4) * 4;
    let data = s.parsed.length.wrapping_sub(header);
    let virtual_bytes = (old.flags & TCP_SYN != 0) as u32 + (old.flags & TCP_FIN != 0) as u32;
    let end = u32::from_be(number(old.seq)).wrapping_add(data).wrapping_add(virtual_bytes);
    let (seq, ack, flags) =
        if old.flags & TCP_ACK != 0 { (number(old.ack), 0, TCP_RST) } else { (0, end.to_be(), TCP_RST | TCP_ACK) };
    let mut tcp = wire::TcpFull {
        sport: old.dport,
        dport: old.sport,
        seq: halves(seq),
        ack: halves(ack),
        offset: 5 << 4,
        flags,
        window: 0,
        checksum: 0,
        urgent: 0,
    };
    let v6 = !s.parsed.tuple.src.is_v4();
    let pseudo = pseudo_header(s, proto::TCP, 20);
    let whole = pseudo
        + tcp.sport as u64
        + tcp.dport as u64
        + seq as u64
        + ack as u64
        + u16::from_ne_bytes([tcp.offset, tcp.flags]) as u64;
    // A packet of this machine's own may leave its checksum to the device: then it holds the pseudo
    // header's sum alone, and so must what takes its place.
    let left_to_device = sum == wire::fold_checksum(pseudo_header(s, proto::TCP, s.parsed.length - (s.parsed.l4 - L3)));
    tcp.checksum = if left_to_device { wire::fold_checksum(pseudo) } else { !wire::fold_checksum(whole) };
    let l4 = L3 + if v6 { 40 } else { 20 };
    packet.resize(l4 + 20) && header_back(packet, s, proto::TCP, 20) && packet.store(l4, &tcp)
}

/// Port unreachable; or, with an MTU, fragmentation needed. The refused packet stays where it is, as the
/// quotation: room is opened before it and it is cut behind, since XDP has room in front only.
#[inline(always)]
fn unreachable_v4<P: Packet>(packet: &mut P, s: &mut Scratch) -> bool {
    let code = if s.mtu != 0 { FRAGMENTATION_NEEDED } else { PORT_UNREACHABLE };
    let mut icmp = wire::Icmp { kind: UNREACHABLE, code, checksum: 0, id: 0, seq: s.mtu.to_be() };
    let sum = u16::from_ne_bytes([icmp.kind, icmp.code]) as u64 + icmp.seq as u64;
    let Some(quoted) = sum_of::<P, { QUOTED_V4 / 4 }>(packet) else {
        return false;
    };
    icmp.checksum = !wire::fold_checksum(sum + quoted);
    packet.open(L3, 20 + 8)
        && packet.resize(L3 + 20 + 8 + QUOTED_V4)
        && header_back(packet, s, proto::ICMP, 8 + QUOTED_V4)
        && packet.store(L3 + 20, &icmp)
}

/// Port unreachable; or, with an MTU, too big.
#[inline(always)]
fn unreachable_v6<P: Packet>(packet: &mut P, s: &mut Scratch) -> bool {
    let kind = if s.mtu != 0 { TOO_BIG_V6 } else { UNREACHABLE_V6 };
    let code = if s.mtu != 0 { 0 } else { PORT_UNREACHABLE_V6 };
    let mut icmp = wire::Icmp { kind, code, checksum: 0, id: 0, seq: s.mtu.to_be() };
    let mut sum = pseudo_header(s, proto::ICMPV6, 8 + QUOTED_V6);
    sum += u16::from_ne_bytes([icmp.kind, icmp.code]) as u64 + icmp.seq as u64;
    let Some(quoted) = sum_of::<P, { QUOTED_V6 / 4 }>(packet) else {
        return false;
    };
    icmp.checksum = !wire::fold_checksum(sum + quoted);
    packet.open(L3, 40 + 8)
        && packet.resize(L3 + 40 + 8 + QUOTED_V6)
        && header_back(packet, s, proto::ICMPV6, 8 + QUOTED_V6)
        && packet.store(L3 + 40, &icmp)
}

/// Sum of the refused packet's first words.
#[inline(always)]
fn sum_of<P: Packet, const WORDS: u32>(packet: &P) -> Option<u64> {
    let mut sum = 0;
    let mut i = 0;
    while i < WORDS {
        sum += packet.load::<u32>(L3 + i * 4)? as u64;
        i += 1;
    }
    Some(sum)
}

/// ICMP types and codes (RFC 792, 4443).
const UNREACHABLE: u8 = 3;
const PORT_UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
const UNREACHABLE_V6: u8 = 1;
const PORT_UNREACHABLE_V6: u8 = 4;
const TOO_BIG_V6: u8 = 2;

/// Writes an IP header from the refused packet's receiver to its sender.
#[inline(always)]
fn header_back<P: Packet>(packet: &mut P, s: &Scratch, protocol: u8, length: u32) -> bool {
    let tuple = &s.parsed.tuple;
    if !tuple.src.is_v4() {
        let ip = wire::Ipv6 {
            version_class_flow: 0x6000_0000u32.to_be(),
            length: (length as u16).to_be(),
            next: protocol,
            hop_limit: TTL,
            src: tuple.dst.words,
            dst: tuple.src.words,
        };
        return packet.store(L3, &ip);
    }
    let ip = wire::ipv4_header(tuple.dst.word(), tuple.src.word(), protocol, length as u16 + 20, 0, TTL);
    packet.store(L3, &ip)
}

/// Sum of the pseudo header, the same in both directions.
#[inline(always)]
fn pseudo_header(s: &Scratch, protocol: u8, length: u32) -> u64 {
    let tuple = &s.parsed.tuple;
    let ends = if tuple.src.is_v4() {
        tuple.src.word() as u64 + tuple.dst.word() as u64
    } else {
        let mut sum = 0;
        let mut i = 0;
        while i < 4 {
            sum += tuple.src.words[i] as u64 + tuple.dst.words[i] as u64;
            i += 1;
        }
        sum
    };
    ends + length.to_be() as u64 + (protocol as u32).to_be() as u64
}

#[inline(always)]
fn number(halves: [u16; 2]) -> u32 {
    halves[0] as u32 | (halves[1] as u32) << 16
}

#[inline(always)]
fn halves(number: u32) -> [u16; 2] {
    [number as u16, (number >> 16) as u16]
}
