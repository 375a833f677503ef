//! The workload's gateway: a link-local address that only the packet path answers for.

use cirri_abi::{Addr, DropReason, Endpoint, GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, proto};

use crate::{
    Packed,
    parse::Parsed,
    traits::Packet,
    wire::{self, L3},
};

const GATEWAY_WORDS: [u16; 3] = wire::mac_words(GATEWAY_MAC);
const ARP_REQUEST: u16 = 1u16.to_be();
const ARP_REPLY: u16 = 2u16.to_be();
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Router, solicited, override (RFC 4861, 4.4).
const ADVERTISEMENT_FLAGS: u32 = 0xe000_0000u32.to_be();
/// Router, override: nobody is known to have asked.
const UNASKED_FLAGS: u32 = 0xa000_0000u32.to_be();
/// Length of a neighbour message with its one option, and without.
const ADVERTISEMENT_LENGTH: u32 = 32;
const PROBE_LENGTH: u32 = 24;
/// The option that holds such a number.
const NONCE: u8 = 14;
/// Where an answer goes to who has no address (RFC 4861, 7.2.4), and its Ethernet address (RFC 2464, 7).
const ALL_NODES: Addr = Addr::v6([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
const ALL_NODES_MAC: [u16; 3] = wire::mac_words([0x33, 0x33, 0, 0, 0, 1]);

/// A workload's ARP. The gateway's address is answered; nothing else on this link is anybody's.
#[inline(always)]
pub(crate) fn answer_arp<P: Packet>(packet: &mut P, endpoint: &Endpoint) -> Result<Packed, DropReason> {
    let Some(mut arp) = packet.load::<wire::Arp>(L3) else {
        return Err(DropReason::INVALID_PACKET);
    };
    let sender = word(arp.sender_ip);
    // Who probes whether an address is taken has none yet (RFC 5227, 2.1.1).
    if sender != endpoint.v4.word() && sender != 0 {
        return Err(DropReason::INVALID_SOURCE_IP);
    }
    if arp.operation != ARP_REQUEST || word(arp.target_ip) != GATEWAY_V4.word() {
        return Err(DropReason::UNKNOWN_L3_TARGET);
    }
    let asker = arp.sender_mac;
    arp.operation = ARP_REPLY;
    arp.target_mac = asker;
    arp.target_ip = arp.sender_ip;
    arp.sender_mac = GATEWAY_WORDS;
    let gateway = GATEWAY_V4.word().to_ne_bytes();
    arp.sender_ip = [u16::from_ne_bytes([gateway[0], gateway[1]]), u16::from_ne_bytes([gateway[2], gateway[3]])];
    if !packet.store(L3, &arp) || !packet.store(0, &wire::Macs { dst: asker, src: GATEWAY_WORDS }) {
        return Err(DropReason::WRITE_ERROR);
    }
    packet.set_for_us();
    Ok(Packed::local(packet.ifindex()))
}

/// A workload's neighbour solicitation for its gateway. `Err` for all other link-local business.
#[inline(always)]
pub(crate) fn answer_solicitation<P: Packet>(
    packet: &mut P,
    parsed: &Parsed,
    endpoint: &Endpoint,
) -> Result<Packed, DropReason> {
    let asker = parsed.tuple.src;
    // Who looks whether an address is taken has none yet, and names no Ethernet address (RFC 4862, 5.4.2); Linux
    // puts a number there that tells its own from others (RFC 7527).
    let probe = asker == Addr::UNSPECIFIED;
    let short = probe && parsed.length == 40 + PROBE_LENGTH;
    let whole = parsed.length == 40 + ADVERTISEMENT_LENGTH
        && !(probe && packet.load::<u8>(L3 + 40 + PROBE_LENGTH) != Some(NONCE));
    if parsed.icmp[0] != SOLICITATION || !(short || whole) || parsed.l4 != L3 + 40 {
        return Err(DropReason::FORBIDDEN_ICMPV6);
    }
    if asker != endpoint.v6 && !is_link_local(&asker) && !probe {
        return Err(DropReason::INVALID_SOURCE_IP);
    }
    if packet.load::<[u32; 4]>(L3 + 40 + 8) != Some(GATEWAY_V6.words) {
        return Err(DropReason::FORBIDDEN_ICMPV6);
    }
    if short && !packet.resize(L3 + 40 + ADVERTISEMENT_LENGTH) {
        return Err(DropReason::WRITE_ERROR);
    }
    let Some(mut message) = packet.load::<wire::Neighbour>(L3 + 40) else {
        return Err(DropReason::INVALID_PACKET);
    };
    let Some(macs) = packet.load::<wire::Macs>(0) else {
        return Err(DropReason::INVALID_PACKET);
    };
    let Some(mut ip) = packet.load::<wire::Ipv6>(L3) else {
        return Err(DropReason::INVALID_PACKET);
    };
    message.kind = ADVERTISEMENT;
    message.code = 0;
    message.checksum = 0;
    message.flags = if probe { UNASKED_FLAGS } else { ADVERTISEMENT_FLAGS };
    message.option = 2;
    message.option_length = 1;
    message.mac = GATEWAY_WORDS;
    ip.src = GATEWAY_V6.words;
    ip.dst = if probe { ALL_NODES.words } else { asker.words };
    ip.length = (ADVERTISEMENT_LENGTH as u16).to_be();
    ip.hop_limit = 255;
    message.checksum = checksum(&ip, &message);
    if !packet.store(L3 + 40, &message)
        || !packet.store(L3, &ip)
        || !packet.store(0, &wire::Macs { dst: if probe { ALL_NODES_MAC } else { macs.src }, src: GATEWAY_WORDS })
    {
        return Err(DropReason::WRITE_ERROR);
    }
    packet.set_for_us();
    Ok(Packed::local(packet.ifindex()))
}

/// Whether an address is of `fe80::/10`.
#[inline(always)]
pub(crate) fn is_link_local(addr: &Addr) -> bool {
    u32::from_be(addr.words[0]) >> 22 == 0xfe80 >> 6
}

/// The ICMPv6 checksum (RFC 4443, 2.3). Sums in memory order work as in network order (RFC 1071).
#[inline(always)]
fn checksum(ip: &wire::Ipv6, message: &wire::Neighbour) -> u16 {
    let mut sum = 0u64;
    let mut i = 0;
    while i < 4 {
        sum += ip.src[i] as u64 + ip.dst[i] as u64 + message.target[i] as u64;
        i += 1;
    }
    sum += ADVERTISEMENT_LENGTH.to_be() as u64 + (proto::ICMPV6 as u32).to_be() as u64 + message.flags as u64;
    sum += u16::from_ne_bytes([message.kind, message.code]) as u64;
    sum += u16::from_ne_bytes([message.option, message.option_length]) as u64;
    sum += message.mac[0] as u64 + message.mac[1] as u64 + message.mac[2] as u64;
    !wire::fold_checksum(sum)
}

#[inline(always)]
fn word(halves: [u16; 2]) -> u32 {
    let (a, b) = (halves[0].to_ne_bytes(), halves[1].to_ne_bytes());
    u32::from_ne_bytes([a[0], a[1], b[0], b[1]])
}
