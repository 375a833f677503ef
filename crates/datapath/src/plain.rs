//! A plain host behind a load balancer that sends in IPIP: it has no connections and no policy, only a
//! list of the addresses of services that it answers for.

use cirri_abi::{Addr, CounterIndex, Direction, DropReason, Port, ServiceKey, dsr, proto};

use crate::{
    icmp,
    parse::{Class, MAX_EXTENSIONS, Parsed, is_extension, parse_network, parse_transport, step_over},
    place::{is_host, is_no_place},
    traits::{Packet, Services, Tables},
    verdict::Packed,
    wire::{self, L3},
};

const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;

/// Takes the outer header off a packet for one of the host's services, so that the stack sees it as its
/// client sent it. Everything else in IPIP, and everything that is not, stays as it is; what comes out of
/// the header and is for no service after all is dropped, since no filter has seen it yet.
#[inline(always)]
pub fn unwrap_for_host<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Packed {
    if !packet.is_for_us() {
        return Packed::CONTINUE;
    }
    let Some(header) = outer_header(packet, tables) else {
        return Packed::CONTINUE;
    };
    match unwrap(packet, tables, header) {
        Ok(()) => Packed::CONTINUE,
        Err(reason) => {
            tables.count(CounterIndex::reason(reason.code, Direction::INGRESS), packet.length());
            Packed::drop(reason)
        }
    }
}

/// The length of a packet's outer IP header, bytes, if it holds another packet of its family, is for this
/// host, and the other for an address of a service here.
#[inline(always)]
fn outer_header<P: Packet, T: Services>(packet: &P, tables: &T) -> Option<u32> {
    let eth = packet.load::<wire::Ethernet>(0)?;
    let (outer, inner, header) = match u16::from_be(eth.ethertype) {
        wire::ETHERTYPE_IPV4 => {
            let ip = packet.load::<wire::Ipv4>(L3)?;
            if ip.version_ihl != 0x45 || ip.proto != dsr::IPIP || ip.fragment & wire::FRAGMENT_MASK != 0 {
                return None;
            }
            let within = packet.load::<wire::Ipv4>(L3 + IPV4_HEADER)?;
            (Addr::v4_word(ip.dst), Addr::v4_word(within.dst), IPV4_HEADER)
        }
        wire::ETHERTYPE_IPV6 => {
            let ip = packet.load::<wire::Ipv6>(L3)?;
            if ip.next != dsr::IPV6 {
                return None;
            }
            let within = packet.load::<wire::Ipv6>(L3 + IPV6_HEADER)?;
            (Addr { words: ip.dst }, Addr { words: within.dst }, IPV6_HEADER)
        }
        _ => return None,
    };
    (is_host(tables, &outer) && is_service(tables, &inner)).then_some(header)
}

/// Whether this host answers for an address of a service: then it has the row of the address.
#[inline(always)]
fn is_service<T: Services>(tables: &T, addr: &Addr) -> bool {
    tables.service(&ServiceKey { addr: *addr, port: Port { be: 0 }, proto: 0, _pad: 0 }).is_some()
}

#[inline(always)]
fn unwrap<P: Packet, T: Tables>(packet: &mut P, tables: &T, header: u32) -> Result<(), DropReason> {
    if !packet.close(header) {
        return Err(DropReason::WRITE_ERROR);
    }
    packet.pull(PULL);
    let mut parsed = Parsed::default();
    parse_network(packet, &mut parsed)?;
    if parsed.class != Class::Flow || parsed.tuple.src.is_v4() == (header == IPV6_HEADER) {
        return Err(DropReason::INVALID_PACKET);
    }
    if header == IPV6_HEADER {
        walk_extensions(packet, &mut parsed)?;
    }
    // The host's own stack puts fragments together, and drops what it has no beginning of.
    if !parsed.later_fragment {
        parse_transport(packet, tables, &mut parsed)?;
    }
    let served = matches!(parsed.tuple.proto, proto::TCP | proto::UDP | proto::SCTP);
    let about_service = parsed.class == Class::IcmpError && is_to_sender(packet, &parsed);
    if !served && !about_service {
        return Err(DropReason::UNSUPPORTED_DSR);
    }
    // A client is somewhere, and not here.
    if is_no_place(&parsed.tuple.src) || is_host(tables, &parsed.tuple.src) {
        return Err(DropReason::INVALID_SOURCE_IP);
    }
    Ok(())
}

/// Bytes that may be looked at.
const PULL: u32 = 256;

#[inline(always)]
fn walk_extensions<P: Packet>(packet: &P, parsed: &mut Parsed) -> Result<(), DropReason> {
    for _ in 0..MAX_EXTENSIONS {
        if !is_extension(parsed.tuple.proto) || !step_over(packet, parsed)? {
            break;
        }
    }
    if is_extension(parsed.tuple.proto) && !parsed.later_fragment {
        return Err(DropReason::INVALID_EXTENSION_HEADER);
    }
    Ok(())
}

/// Whether an ICMP error goes to the sender of what it quotes.
#[inline(always)]
fn is_to_sender<P: Packet>(packet: &P, parsed: &Parsed) -> bool {
    let mut about = cirri_abi::Tuple::default();
    let v6 = !parsed.tuple.src.is_v4();
    icmp::quoted(packet, parsed.l4 + 8, v6, &mut about).is_ok() && about.src == parsed.tuple.dst
}
