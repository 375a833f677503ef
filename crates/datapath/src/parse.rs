//! What a packet says about itself.

use cirri_abi::{Addr, DropReason, FragmentKey, FragmentPorts, Port, Tuple, proto};

use crate::{
    neighbour::is_link_local,
    traits::{Packet, Tables},
    wire::{self, Ipv4, Ipv6, L3},
};

/// A packet, taken apart completely.
#[derive(Clone, Copy, Default, Debug)]
pub struct Parsed {
    /// Addresses and ports. A later fragment has those of its first.
    pub tuple: Tuple,
    /// Offset of the transport header; for a later fragment, of its payload.
    pub l4: u32,
    /// From the IP header on, bytes.
    pub length: u32,
    /// What kind of packet.
    pub class: Class,
    /// TCP flags.
    pub tcp_flags: u8,
    /// ICMP type and code.
    pub icmp: [u8; 2],
    /// A fragment without transport header.
    pub later_fragment: bool,
    /// A fragment.
    pub fragment: bool,
    /// Identification of the datagram it is of, as in the packet.
    pub fragment_id: u32,
}

/// Kinds of packet that are treated differently.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Class {
    /// Neither IP nor ARP.
    #[default]
    Other = 0,
    /// ARP.
    Arp,
    /// Belongs to a flow of its own.
    Flow,
    /// An ICMP error: belongs to the flow that it quotes.
    IcmpError,
    /// IPv6 neighbour or router discovery, multicast listener discovery: link-local business.
    LinkLocal,
}

impl Parsed {
    /// Whether the first `length` bytes of the transport header are in the IP packet. What stands
    /// behind its end can be read, but is not there for its receiver.
    #[inline(always)]
    fn holds(&self, length: u32) -> bool {
        self.l4 - L3 + length <= self.length
    }

    /// Neighbour or listener discovery to another than its own link. Nobody counts the hop limit down
    /// between workloads, so its receiver would believe that it came from its link.
    #[inline(always)]
    pub(crate) fn is_routed_discovery(&self) -> bool {
        self.tuple.proto == proto::ICMPV6 && is_discovery(self.icmp[0]) && !is_on_link(&self.tuple.dst)
    }
}

/// Most IPv6 extension headers that are walked; more make the packet invalid.
pub(crate) const MAX_EXTENSIONS: u32 = 6;
/// Bytes of a TCP header without options.
const TCP_HEADER: u32 = 20;
/// Where the transport header must begin at the latest.
const MAX_L4: u32 = 1024;

/// Reads the Ethernet and IP headers. IPv6 extension headers are still to be stepped over.
#[inline(always)]
pub(crate) fn parse_network<P: Packet>(packet: &P, out: &mut Parsed) -> Result<(), DropReason> {
    *out = Parsed::default();
    let Some(eth) = packet.load::<wire::Ethernet>(0) else {
        return Err(DropReason::INVALID_PACKET);
    };
    match u16::from_be(eth.ethertype) {
        wire::ETHERTYPE_IPV4 => {
            out.class = Class::Flow;
            parse_v4(packet, out)?;
        }
        wire::ETHERTYPE_IPV6 => {
            out.class = Class::Flow;
            parse_v6(packet, out)?;
        }
        wire::ETHERTYPE_ARP => out.class = Class::Arp,
        _ => {}
    }
    if out.length > present(packet) { Err(DropReason::INVALID_PACKET) } else { Ok(()) }
}

#[inline(always)]
fn parse_v4<P: Packet>(packet: &P, out: &mut Parsed) -> Result<(), DropReason> {
    let Some(ip) = packet.load::<Ipv4>(L3) else {
        return Err(DropReason::INVALID_PACKET);
    };
    let header = (ip.version_ihl as u32 & 0xf) * 4;
    out.length = u16::from_be(ip.length) as u32;
    if out.length == 0 {
        out.length = present(packet);
    }
    if ip.version_ihl >> 4 != 4 || header < 20 || out.length < header {
        return Err(DropReason::INVALID_PACKET);
    }
    out.tuple.src = Addr::v4_word(ip.src);
    out.tuple.dst = Addr::v4_word(ip.dst);
    out.tuple.proto = ip.proto;
    out.l4 = L3 + header;
    out.fragment_id = ip.id as u32;
    out.later_fragment = ip.fragment & wire::FRAGMENT_OFFSET != 0;
    out.fragment = ip.fragment & wire::FRAGMENT_MASK != 0;
    // It could write over the header that its first fragment was judged by (RFC 1858, RFC 3128).
    let at = u16::from_be(ip.fragment & wire::FRAGMENT_OFFSET) as u32 * 8;
    if ip.proto == proto::TCP && out.later_fragment && at < TCP_HEADER {
        return Err(DropReason::INVALID_PACKET);
    }
    Ok(())
}

/// Bytes from the IP header on. A segment of the kernel's that is too large to say it says 0. A packet
/// that says more than there are was cut off: its receiver would drop it, and no recipe could keep
/// its checksums true.
#[inline(always)]
fn present<P: Packet>(packet: &P) -> u32 {
    packet.length().wrapping_sub(L3)
}

#[inline(always)]
fn parse_v6<P: Packet>(packet: &P, out: &mut Parsed) -> Result<(), DropReason> {
    let Some(ip) = packet.load::<Ipv6>(L3) else {
        return Err(DropReason::INVALID_PACKET);
    };
    if u32::from_be(ip.version_class_flow) >> 28 != 6 {
        return Err(DropReason::INVALID_PACKET);
    }
    out.tuple.src = Addr { words: ip.src };
    out.tuple.dst = Addr { words: ip.dst };
    // A mapped address on the wire would pass for IPv4 in our tables.
    if out.tuple.src.is_v4() || out.tuple.dst.is_v4() {
        return Err(DropReason::INVALID_PACKET);
    }
    out.length = match u16::from_be(ip.length) {
        0 => present(packet),
        length => length as u32 + 40,
    };
    out.tuple.proto = ip.next;
    out.l4 = L3 + 40;
    Ok(())
}

/// Steps over one IPv6 extension header. `Ok(false)`: there is none, or nothing follows that could
/// be walked.
#[inline(always)]
pub(crate) fn step_over<P: Packet>(packet: &P, out: &mut Parsed) -> Result<bool, DropReason> {
    let offset = out.l4;
    if offset > MAX_L4 {
        return Err(DropReason::INVALID_EXTENSION_HEADER);
    }
    match out.tuple.proto {
        // Hop-by-hop, routing, authentication, destination options, mobility, HIP, shim6.
        0 | 43 | 51 | 60 | 135 | 139 | 140 => {
            let Some(ext) = packet.load::<wire::Extension>(offset) else {
                return Err(DropReason::INVALID_EXTENSION_HEADER);
            };
            // Authentication counts in words of four, less two; the others in words of eight, less one.
            let length = if out.tuple.proto == 51 { (ext.length as u32 + 2) * 4 } else { (ext.length as u32 + 1) * 8 };
            out.l4 = offset + length;
            out.tuple.proto = ext.next;
            Ok(true)
        }
        wire::FRAGMENT6 => {
            let Some(ext) = packet.load::<wire::Fragment6>(offset) else {
                return Err(DropReason::INVALID_EXTENSION_HEADER);
            };
            let at = u16::from_be(ext.offset);
            out.l4 = offset + 8;
            out.tuple.proto = ext.next;
            out.fragment_id = ext.id;
            out.later_fragment = at & 0xfff8 != 0;
            out.fragment = at & 0xfff9 != 0;
            Ok(!out.later_fragment)
        }
        _ => Ok(false),
    }
}

/// Whether a protocol number is an extension header's.
#[inline(always)]
pub(crate) const fn is_extension(protocol: u8) -> bool {
    matches!(protocol, 0 | 43 | wire::FRAGMENT6 | 51 | 60 | 135 | 139 | 140)
}

/// Reads the transport header, or finds what the first fragment of the datagram said.
#[inline(always)]
pub(crate) fn parse_transport<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    out: &mut Parsed,
) -> Result<(), DropReason> {
    if out.later_fragment {
        let Some(ports) = tables.fragment(&fragment_key(out)) else {
            return Err(DropReason::FIRST_FRAGMENT_MISSING);
        };
        out.tuple.sport = ports.sport;
        out.tuple.dport = ports.dport;
        return Ok(());
    }
    match out.tuple.proto {
        proto::TCP => {
            let Some(tcp) = packet.load::<wire::Tcp>(out.l4) else {
                return Err(DropReason::CT_INVALID_HEADER);
            };
            if tcp.offset >> 4 < 5 || !out.holds(TCP_HEADER) {
                return Err(DropReason::CT_INVALID_HEADER);
            }
            out.tuple.sport = Port { be: tcp.sport };
            out.tuple.dport = Port { be: tcp.dport };
            out.tcp_flags = tcp.flags;
        }
        proto::UDP | proto::SCTP => {
            let Some(ports) = packet.load::<wire::Ports>(out.l4) else {
                return Err(DropReason::CT_INVALID_HEADER);
            };
            if !out.holds(8) {
                return Err(DropReason::CT_INVALID_HEADER);
            }
            out.tuple.sport = Port { be: ports.sport };
            out.tuple.dport = Port { be: ports.dport };
        }
        proto::ICMP if out.tuple.src.is_v4() => parse_icmp(packet, out, 8, 0)?,
        proto::ICMPV6 if !out.tuple.src.is_v4() => parse_icmp(packet, out, 128, 129)?,
        // Other protocols have no ports; policy can still allow their peers.
        _ => {}
    }
    Ok(())
}

/// Lets the later fragments of a datagram follow its first, once that may pass: ports that somebody
/// else forged must not reach them.
#[inline(always)]
pub(crate) fn remember_ports<T: Tables>(tables: &T, parsed: &Parsed) {
    if parsed.fragment && !parsed.later_fragment {
        let ports = FragmentPorts { sport: parsed.tuple.sport, dport: parsed.tuple.dport };
        tables.remember_fragment(&fragment_key(parsed), &ports);
    }
}

#[inline(always)]
fn parse_icmp<P: Packet>(packet: &P, out: &mut Parsed, request: u8, reply: u8) -> Result<(), DropReason> {
    let Some(icmp) = packet.load::<wire::Icmp>(out.l4) else {
        return Err(DropReason::CT_INVALID_HEADER);
    };
    if !out.holds(8) {
        return Err(DropReason::CT_INVALID_HEADER);
    }
    out.icmp = [icmp.kind, icmp.code];
    if icmp.kind == request {
        out.tuple.sport = Port { be: icmp.id };
    } else if icmp.kind == reply {
        out.tuple.dport = Port { be: icmp.id };
    } else if out.tuple.proto == proto::ICMP {
        // Unreachable, time exceeded, parameter problem (RFC 792, 1122).
        if matches!(icmp.kind, 3 | 11 | 12) {
            out.class = Class::IcmpError;
        }
    } else {
        match icmp.kind {
            // Unreachable, too big, time exceeded, parameter problem (RFC 4443).
            1..=4 => out.class = Class::IcmpError,
            // To another than this link's addresses it has been routed, and is like any packet.
            kind if is_discovery(kind) && is_on_link(&out.tuple.dst) => out.class = Class::LinkLocal,
            _ => {}
        }
    }
    Ok(())
}

/// Listener discovery (RFC 2710, 3810), router and neighbour discovery (RFC 4861).
#[inline(always)]
const fn is_discovery(kind: u8) -> bool {
    matches!(kind, 130..=137 | 143)
}

/// Whether packets for an address stay on their link: multicast and `fe80::/10`.
#[inline(always)]
fn is_on_link(addr: &Addr) -> bool {
    u32::from_be(addr.words[0]) >> 24 == 0xff || is_link_local(addr)
}

#[inline(always)]
fn fragment_key(parsed: &Parsed) -> FragmentKey {
    let Tuple { src, dst, proto, .. } = parsed.tuple;
    FragmentKey { src, dst, id: parsed.fragment_id, proto, _pad: 0, _pad2: 0 }
}
