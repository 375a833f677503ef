//! Direct server return: the service's address travels with the packet, and the backend's node answers
//! the client itself. Either in an IP option of the first packets, or by sending the packet, untouched,
//! in IPIP. Layouts: `cirri_abi::dsr`.

use cirri_abi::{Addr, DropReason, Forwarding, Hook, Port, Recipe, dsr, node_flag};

use crate::{
    parse::{Class, parse_network},
    place::{is_host, is_peer},
    service,
    slow::Scratch,
    traits::{Packet, Tables},
    wire::{self, L3},
};

/// Hop limit of outer headers.
const TTL: u8 = 64;
const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;

/// Bytes that a packet grows by on its way.
#[inline(always)]
pub(crate) const fn overhead(forwarding: u8, v6: bool) -> u32 {
    match forwarding {
        Forwarding::DSR_OPTION if v6 => dsr::LENGTH_V6,
        Forwarding::DSR_OPTION => dsr::LENGTH_V4,
        Forwarding::DSR_IPIP if v6 => IPV6_HEADER,
        Forwarding::DSR_IPIP => IPV4_HEADER,
        _ => 0,
    }
}

/// Whether a packet that grows by `overhead` is too long for the recipe's way.
#[inline(always)]
pub(crate) fn is_too_long<P: Packet>(packet: &P, recipe: &Recipe, overhead: u32) -> bool {
    recipe.mtu != 0 && packet.length() - L3 + overhead > recipe.mtu as u32 && !packet.is_segmented()
}

/// Puts the service's address, which is the packet's own destination before it is rewritten, into an
/// option behind the IP header.
#[inline(always)]
pub(crate) fn write_option<P: Packet>(packet: &mut P, vip: &Addr, port: Port) -> bool {
    if vip.is_v4() { write_option_v4(packet, vip, port) } else { write_option_v6(packet, vip, port) }
}

#[inline(always)]
fn write_option_v4<P: Packet>(packet: &mut P, vip: &Addr, port: Port) -> bool {
    let Some(mut ip) = packet.load::<wire::Ipv4>(L3) else {
        return false;
    };
    // The header has room for ten words of options, and ours is the first.
    if ip.version_ihl & 0xf > 13 {
        return false;
    }
    let addr = vip.word();
    let option = wire::ServiceOption4 {
        kind: dsr::OPTION_V4,
        length: dsr::LENGTH_V4 as u8,
        port: port.be,
        addr: [addr as u16, (addr >> 16) as u16],
    };
    let old = [u16::from_ne_bytes([ip.version_ihl, ip.tos]), ip.length];
    ip.version_ihl += (dsr::LENGTH_V4 / 4) as u8;
    ip.length = (u16::from_be(ip.length).wrapping_add(dsr::LENGTH_V4 as u16)).to_be();
    let sum = (!ip.checksum) as u64
        + (!old[0]) as u64
        + u16::from_ne_bytes([ip.version_ihl, ip.tos]) as u64
        + (!old[1]) as u64
        + ip.length as u64
        + u16::from_ne_bytes([option.kind, option.length]) as u64
        + option.port as u64
        + addr as u64;
    ip.checksum = !wire::fold_checksum(sum);
    packet.open(L3 + IPV4_HEADER, dsr::LENGTH_V4) && packet.store(L3, &ip) && packet.store(L3 + IPV4_HEADER, &option)
}

#[inline(always)]
fn write_option_v6<P: Packet>(packet: &mut P, vip: &Addr, port: Port) -> bool {
    let Some(mut ip) = packet.load::<wire::Ipv6>(L3) else {
        return false;
    };
    let option = wire::ServiceOption6 {
        next: ip.next,
        length: (dsr::LENGTH_V6 / 8 - 1) as u8,
        kind: dsr::OPTION_V6,
        option_length: dsr::LENGTH_V6 as u8 - 4,
        addr: vip.words,
        port: port.be,
        zero: 0,
    };
    ip.next = DESTINATION_OPTIONS;
    ip.length = (u16::from_be(ip.length).wrapping_add(dsr::LENGTH_V6 as u16)).to_be();
    packet.open(L3 + IPV6_HEADER, dsr::LENGTH_V6) && packet.store(L3, &ip) && packet.store(L3 + IPV6_HEADER, &option)
}

/// The IPv6 destination options header's protocol number.
pub(crate) const DESTINATION_OPTIONS: u8 = 60;

/// Notes the service's address that another node has put into the packet's first option, at `at`, if it
/// stands there and may be believed.
#[inline(always)]
pub(crate) fn read_option<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch, at: u32) {
    if !matches!(s.hook, Hook::FROM_NETWORK | Hook::FROM_OVERLAY) {
        return;
    }
    let (ours, addr, port, protocol) = if s.parsed.tuple.src.is_v4() {
        let Some(option) = packet.load::<wire::ServiceOption4>(at) else {
            return;
        };
        let addr = option.addr[0] as u32 | (option.addr[1] as u32) << 16;
        let ours = option.kind == dsr::OPTION_V4 && option.length as u32 == dsr::LENGTH_V4;
        (ours, Addr::v4_word(addr), option.port, s.parsed.tuple.proto)
    } else {
        let Some(option) = packet.load::<wire::ServiceOption6>(at) else {
            return;
        };
        let ours = option.kind == dsr::OPTION_V6
            && option.option_length as u32 == dsr::LENGTH_V6 - 4
            && option.length as u32 == dsr::LENGTH_V6 / 8 - 1;
        let protocol = match packet.load::<wire::Fragment6>(at + dsr::LENGTH_V6) {
            // A datagram's first fragment.
            Some(fragment) if option.next == wire::FRAGMENT6 => fragment.next,
            _ => option.next,
        };
        (ours, Addr { words: option.addr }, option.port, protocol)
    };
    if ours && is_genuine(tables, &addr, Port { be: port }, protocol) {
        s.option_addr = addr;
        s.option_port = Port { be: port };
    }
}

/// Puts the packet into IPIP for a recipe's backend. The outer identification (IPv4) or flow label
/// (IPv6) holds the backend's port: a packet that may not be fragmented needs no identification
/// (RFC 6864), and plain receivers look at neither.
#[inline(always)]
pub(crate) fn wrap<P: Packet, T: Tables>(packet: &mut P, tables: &T, recipe: &Recipe, v6: bool) -> bool {
    let Some(node) = tables.node() else {
        return false;
    };
    let port = recipe.destination_port.be;
    let length = packet.length() - L3;
    if v6 {
        let ip = wire::Ipv6 {
            version_class_flow: (0x6000_0000 | u16::from_be(port) as u32).to_be(),
            length: (length as u16).to_be(),
            next: dsr::IPV6,
            hop_limit: TTL,
            src: node.v6.words,
            dst: recipe.destination.words,
        };
        packet.open(L3, IPV6_HEADER) && packet.store(L3, &ip)
    } else {
        let total = length.wrapping_add(IPV4_HEADER) as u16;
        let ip = wire::ipv4_header(node.v4.word(), recipe.destination.word(), dsr::IPIP, total, port, TTL);
        packet.open(L3, IPV4_HEADER) && packet.store(L3, &ip)
    }
}

/// Takes a packet from the network out of its IPIP header, if that leads to a backend of this node: its
/// address and port then stand in `outer_dst` and `outer_port`. Everything else stays as it is.
#[inline(always)]
pub(crate) fn unwrap<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Result<(), DropReason> {
    let tuple = &s.parsed.tuple;
    let v6 = match tuple.proto {
        dsr::IPIP if tuple.src.is_v4() && s.parsed.l4 == L3 + IPV4_HEADER && !s.parsed.fragment => false,
        dsr::IPV6 if !tuple.src.is_v4() && s.parsed.l4 == L3 + IPV6_HEADER => true,
        _ => return Ok(()),
    };
    // Anybody else's packet in a packet would come past every filter that looked at the outer one.
    if !is_peer(tables, &tuple.src) || !is_backend(tables, &tuple.dst) {
        return Ok(());
    }
    let port = if v6 {
        match packet.load::<wire::Ipv6>(L3) {
            Some(ip) => Port { be: (u32::from_be(ip.version_class_flow) as u16).to_be() },
            None => return Err(DropReason::INVALID_PACKET),
        }
    } else {
        Port { be: s.parsed.fragment_id as u16 }
    };
    s.outer_dst = tuple.dst;
    s.outer_port = port;
    if !packet.close(if v6 { IPV6_HEADER } else { IPV4_HEADER }) {
        return Err(DropReason::WRITE_ERROR);
    }
    parse_network(packet, &mut s.parsed)?;
    // Only the family that was announced, and no second header.
    if s.parsed.class != Class::Flow || s.parsed.tuple.src.is_v4() == v6 || s.parsed.tuple.proto == dsr::IPIP {
        return Err(DropReason::INVALID_PACKET);
    }
    Ok(())
}

/// Whether an address is of a workload of this node, or of this node itself if it serves.
#[inline(always)]
fn is_backend<T: Tables>(tables: &T, addr: &Addr) -> bool {
    if tables.endpoint(addr).is_some() {
        return true;
    }
    let serves = match tables.node() {
        Some(node) => node.flags & node_flag::HOST_BACKENDS != 0,
        None => false,
    };
    serves && is_host(tables, addr)
}

/// Whether an option may be believed: it names a service that is forwarded so. Anybody could write one,
/// to be answered from an address of their choice.
#[inline(always)]
pub(crate) fn is_genuine<T: Tables>(tables: &T, addr: &Addr, port: Port, protocol: u8) -> bool {
    // The address may be another node's, with a node port.
    match service::find(tables, addr, port, protocol, true) {
        Some(service) => service.forwarding == Forwarding::DSR_OPTION,
        None => false,
    }
}
