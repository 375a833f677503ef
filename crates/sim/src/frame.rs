//! Packets: as bytes at a hook, and built from what they should say.

use std::net::{IpAddr, SocketAddr};

use cirri_abi::proto;
use cirri_datapath::{Cursor, Packet, TunnelKey, Wire, adjusted};

/// A packet at a hook, from its Ethernet header on.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Frame {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// It carries a VLAN tag.
    pub tagged: bool,
    /// Its Ethernet address is not the device's.
    pub of_others: bool,
    /// The device it is met on.
    pub ifindex: u32,
    /// From the overlay: what its outer headers said.
    pub tunnel: Option<TunnelKey>,
    /// Into the overlay: the node (IPv4, network order) and the VNI that were set.
    pub tunnel_to: Option<(u32, u32)>,
    /// Marked as decided on.
    pub decided: bool,
    /// Marked as meant for us.
    pub for_us: bool,
}

/// Flags of a TCP header.
pub type TcpFlags = u8;

/// What to build; see [`build`].
#[derive(Clone, Debug)]
pub struct Build {
    source: SocketAddr,
    destination: SocketAddr,
    transport: Transport,
    payload: Vec<u8>,
    options: Vec<u8>,
    fragment: Option<Fragment>,
}

#[derive(Clone, Debug)]
enum Transport {
    Tcp(TcpFlags),
    Udp { checksum: bool },
    Icmp(Icmp),
    Other(u8),
}

/// An ICMP message; types are chosen by the family.
#[derive(Clone, Debug)]
pub enum Icmp {
    /// Echo request with an identifier.
    Request(u16),
    /// Echo reply with an identifier.
    Reply(u16),
    /// Too big (fragmentation needed), quoting a packet from its IP header on.
    TooBig(Vec<u8>),
    /// Port unreachable, quoting a packet.
    Unreachable(Vec<u8>),
}

#[derive(Clone, Copy, Debug)]
struct Fragment {
    id: u32,
    /// In units of eight bytes.
    offset: u16,
    more: bool,
}

/// Builds packets with correct lengths and checksums.
pub mod build {
    use super::*;

    /// A TCP segment.
    pub fn tcp(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>, flags: TcpFlags) -> Build {
        Build::new(source.into(), destination.into(), Transport::Tcp(flags))
    }

    /// A UDP datagram.
    pub fn udp(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Build {
        Build::new(source.into(), destination.into(), Transport::Udp { checksum: true })
    }

    /// A UDP datagram without checksum (IPv4).
    pub fn udp_unchecked(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Build {
        Build::new(source.into(), destination.into(), Transport::Udp { checksum: false })
    }

    /// An ICMP message.
    pub fn icmp(source: IpAddr, destination: IpAddr, message: Icmp) -> Build {
        Build::new(SocketAddr::new(source, 0), SocketAddr::new(destination, 0), Transport::Icmp(message))
    }

    /// A packet of another protocol.
    pub fn other(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>, protocol: u8) -> Build {
        Build::new(source.into(), destination.into(), Transport::Other(protocol))
    }

    /// An ARP request of `sender` (address and Ethernet address) for `target`.
    pub fn arp(sender: [u8; 4], mac: [u8; 6], target: [u8; 4]) -> Frame {
        let mut bytes = vec![0xff; 6];
        bytes.extend(mac);
        bytes.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
        bytes.extend(mac);
        bytes.extend(sender);
        bytes.extend([0; 6]);
        bytes.extend(target);
        Frame { bytes, ..Frame::default() }
    }

    /// A neighbour solicitation of `sender` for `target`, with the source link-layer option.
    pub fn solicitation(sender: [u8; 16], mac: [u8; 6], target: [u8; 16]) -> Frame {
        let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
        message.extend(target);
        message.extend([1, 1]);
        message.extend(mac);
        let mut group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 0];
        group[13..].copy_from_slice(&target[13..]);
        let sum = transport_checksum(&sender, &group, proto::ICMPV6, &message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut bytes = vec![0x33, 0x33, 0xff, target[13], target[14], target[15]];
        bytes.extend(mac);
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, proto::ICMPV6, 255]);
        bytes.extend(sender);
        bytes.extend(group);
        bytes.extend(message);
        Frame { bytes, ..Frame::default() }
    }
}

impl Build {
    fn new(source: SocketAddr, destination: SocketAddr, transport: Transport) -> Build {
        assert_eq!(source.is_ipv4(), destination.is_ipv4(), "both ends are of one family");
        Build { source, destination, transport, payload: Vec::new(), options: Vec::new(), fragment: None }
    }

    /// Bytes after the transport header.
    pub fn payload(mut self, payload: impl Into<Vec<u8>>) -> Build {
        self.payload = payload.into();
        self
    }

    /// IPv4 options (a multiple of four bytes), or IPv6 destination options (6 bytes more than a
    /// multiple of eight).
    pub fn options(mut self, options: impl Into<Vec<u8>>) -> Build {
        self.options = options.into();
        self
    }

    /// Makes it a fragment. With an offset (in units of eight bytes) it carries only the payload.
    pub fn fragment(mut self, id: u32, offset: u16, more: bool) -> Build {
        self.fragment = Some(Fragment { id, offset, more });
        self
    }

    /// The packet from its IP header on.
    pub fn packet(&self) -> Vec<u8> {
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let (protocol, body) = self.body(&source.octets(), &destination.octets());
                let header = 20 + self.options.len();
                let mut out = vec![0x40 | (header / 4) as u8, 0];
                out.extend((header as u16 + body.len() as u16).to_be_bytes());
                let (id, at) = match self.fragment {
                    Some(Fragment { id, offset, more }) => (id as u16, offset | u16::from(more) << 13),
                    None => (0, 0x4000),
                };
                out.extend(id.to_be_bytes());
                out.extend(at.to_be_bytes());
                out.extend([64, protocol, 0, 0]);
                out.extend(source.octets());
                out.extend(destination.octets());
                out.extend(&self.options);
                let sum = !fold(sum(&out));
                out[10..12].copy_from_slice(&sum.to_be_bytes());
                out.extend(body);
                out
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let (protocol, body) = self.body(&source.octets(), &destination.octets());
                let mut next = protocol;
                let mut extensions = Vec::new();
                if let Some(Fragment { id, offset, more }) = self.fragment {
                    let mut header = vec![next, 0];
                    header.extend((offset << 3 | u16::from(more)).to_be_bytes());
                    header.extend(id.to_be_bytes());
                    extensions.splice(0..0, header);
                    next = 44;
                }
                if !self.options.is_empty() {
                    let mut header = vec![next, ((self.options.len() + 2) / 8 - 1) as u8];
                    header.extend(&self.options);
                    extensions.splice(0..0, header);
                    next = 60;
                }
                let mut out = vec![0x60, 0, 0, 0];
                out.extend((extensions.len() as u16 + body.len() as u16).to_be_bytes());
                out.extend([next, 64]);
                out.extend(source.octets());
                out.extend(destination.octets());
                out.extend(extensions);
                out.extend(body);
                out
            }
            _ => unreachable!("both ends are of one family"),
        }
    }

    /// The packet as a frame on a device.
    pub fn on(&self, ifindex: u32) -> Frame {
        let mut bytes = vec![0x02, 0xc1, 0x44, 0x12, 0x10, 0x01, 0x02, 0, 0, 0, 0, 0x99];
        bytes.extend(if self.source.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] });
        bytes.extend(self.packet());
        Frame { bytes, ifindex, ..Frame::default() }
    }

    fn body(&self, source: &[u8], destination: &[u8]) -> (u8, Vec<u8>) {
        let v4 = source.len() == 4;
        let protocol = match &self.transport {
            Transport::Tcp(_) => proto::TCP,
            Transport::Udp { .. } => proto::UDP,
            Transport::Icmp(_) if v4 => proto::ICMP,
            Transport::Icmp(_) => proto::ICMPV6,
            Transport::Other(protocol) => *protocol,
        };
        if matches!(self.fragment, Some(Fragment { offset: 1.., .. })) {
            return (protocol, self.payload.clone());
        }
        let mut ports = self.source.port().to_be_bytes().to_vec();
        ports.extend(self.destination.port().to_be_bytes());
        let (mut body, checksum) = match &self.transport {
            Transport::Tcp(flags) => {
                ports.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, *flags, 0xff, 0xff, 0, 0, 0, 0]);
                (ports, Some(16))
            }
            Transport::Udp { checksum } => {
                ports.extend((8 + self.payload.len() as u16).to_be_bytes());
                ports.extend([0, 0]);
                (ports, checksum.then_some(6))
            }
            Transport::Icmp(message) => (message.bytes(v4), Some(2)),
            Transport::Other(proto::SCTP) => {
                ports.extend([0; 8]);
                (ports, None)
            }
            Transport::Other(_) => (Vec::new(), None),
        };
        body.extend(&self.payload);
        if let Some(at) = checksum {
            let sum = if protocol == proto::ICMP {
                !fold(sum(&body))
            } else {
                transport_checksum(source, destination, protocol, &body)
            };
            body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        (protocol, body)
    }
}

impl Icmp {
    fn bytes(&self, v4: bool) -> Vec<u8> {
        let pick = |four: [u8; 2], six: [u8; 2]| if v4 { four } else { six };
        let (kind, rest, quoted): (_, [u8; 4], &[u8]) = match self {
            Icmp::Request(id) => (pick([8, 0], [128, 0]), [(id >> 8) as u8, *id as u8, 0, 1], &[]),
            Icmp::Reply(id) => (pick([0, 0], [129, 0]), [(id >> 8) as u8, *id as u8, 0, 1], &[]),
            Icmp::TooBig(quoted) => (pick([3, 4], [2, 0]), [0, 0, 5, 0], quoted),
            Icmp::Unreachable(quoted) => (pick([3, 3], [1, 4]), [0; 4], quoted),
        };
        let mut out = kind.to_vec();
        out.extend([0, 0]);
        out.extend(rest);
        out.extend(quoted);
        out
    }
}

impl Packet for Frame {
    const RAW: bool = false;

    fn load<W: Wire>(&self, offset: u32) -> Option<W> {
        let start = offset as usize;
        let bytes = self.bytes.get(start..start + W::SIZE)?;
        Some(W::read(&mut Cursor::new(bytes)))
    }

    fn store<W: Wire>(&mut self, offset: u32, value: &W) -> bool {
        let start = offset as usize;
        let Some(bytes) = self.bytes.get_mut(start..start + W::SIZE) else {
            return false;
        };
        value.write(bytes, &mut 0);
        true
    }

    fn length(&self) -> u32 {
        self.bytes.len() as u32
    }

    fn tagged(&self) -> bool {
        self.tagged
    }

    fn is_for_us(&self) -> bool {
        !self.of_others
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn pull(&mut self, _length: u32) {}

    fn open(&mut self, at: u32, bytes: u32) -> bool {
        let at = at as usize;
        if at > self.bytes.len() {
            return false;
        }
        self.bytes.splice(at..at, vec![0; bytes as usize]);
        true
    }

    fn close(&mut self, bytes: u32) -> bool {
        let end = 14 + bytes as usize;
        // As in the kernel, another header of the family must be left.
        let header = if self.bytes.get(12..14) == Some(&[0x86, 0xdd]) { 40 } else { 20 };
        if end + header > self.bytes.len() {
            return false;
        }
        self.bytes.drain(14..end);
        true
    }

    fn resize(&mut self, length: u32) -> bool {
        self.bytes.resize(length as usize, 0);
        true
    }

    fn is_segmented(&self) -> bool {
        false
    }

    fn update_l3_checksum(&mut self, offset: u32, delta: u32) -> bool {
        let Some(old) = self.load::<u16>(offset) else {
            return false;
        };
        self.store(offset, &adjusted(old, delta))
    }

    fn update_l4_checksum(&mut self, offset: u32, delta: u32, _pseudo: bool, udp: bool, _v6: bool) -> bool {
        let Some(old) = self.load::<u16>(offset) else {
            return false;
        };
        if udp && old == 0 {
            return true;
        }
        let new = adjusted(old, delta);
        self.store(offset, &if udp && new == 0 { 0xffff } else { new })
    }

    fn tunnel_key(&self) -> Option<TunnelKey> {
        self.tunnel
    }

    fn set_tunnel_key(&mut self, peer: u32, vni: u32) -> bool {
        self.tunnel_to = Some((peer, vni & 0xff_ffff));
        true
    }

    fn decided(&self) -> bool {
        self.decided
    }

    fn set_decided(&mut self) {
        self.decided = true;
    }

    fn set_for_us(&mut self) {
        self.for_us = true;
    }
}

/// A frame before the stack, as XDP sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RawFrame(pub Frame);

impl Packet for RawFrame {
    const RAW: bool = true;

    fn load<W: Wire>(&self, offset: u32) -> Option<W> {
        self.0.load(offset)
    }

    fn store<W: Wire>(&mut self, offset: u32, value: &W) -> bool {
        self.0.store(offset, value)
    }

    fn length(&self) -> u32 {
        self.0.length()
    }

    fn tagged(&self) -> bool {
        false
    }

    fn is_for_us(&self) -> bool {
        self.0.bytes.first().is_some_and(|byte| byte & 1 == 0)
    }

    fn ifindex(&self) -> u32 {
        self.0.ifindex
    }

    fn pull(&mut self, _length: u32) {}

    fn open(&mut self, at: u32, bytes: u32) -> bool {
        self.0.open(at, bytes)
    }

    fn close(&mut self, bytes: u32) -> bool {
        self.0.close(bytes)
    }

    fn resize(&mut self, length: u32) -> bool {
        self.0.resize(length)
    }

    fn is_segmented(&self) -> bool {
        false
    }

    fn update_l3_checksum(&mut self, offset: u32, delta: u32) -> bool {
        self.0.update_l3_checksum(offset, delta)
    }

    fn update_l4_checksum(&mut self, offset: u32, delta: u32, pseudo: bool, udp: bool, v6: bool) -> bool {
        self.0.update_l4_checksum(offset, delta, pseudo, udp, v6)
    }

    fn tunnel_key(&self) -> Option<TunnelKey> {
        None
    }

    fn set_tunnel_key(&mut self, _peer: u32, _vni: u32) -> bool {
        false
    }

    fn decided(&self) -> bool {
        false
    }

    fn set_decided(&mut self) {}

    fn set_for_us(&mut self) {}
}

/// Which checksums of a frame are wrong; empty if all hold. Knows what [`build`] builds.
pub fn checksum_errors(frame: &Frame) -> Vec<&'static str> {
    let mut errors = Vec::new();
    let Some(packet) = frame.bytes.get(14..) else {
        return vec!["frame"];
    };
    let (source, destination, mut protocol, mut body) = match packet.first().map(|byte| byte >> 4) {
        Some(4) => {
            let header = usize::from(packet[0] & 0xf) * 4;
            if fold(sum(&packet[..header])) != 0xffff {
                errors.push("ip");
            }
            if u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0 {
                return errors;
            }
            (packet[12..16].to_vec(), packet[16..20].to_vec(), packet[9], &packet[header..])
        }
        Some(6) => (packet[8..24].to_vec(), packet[24..40].to_vec(), packet[6], &packet[40..]),
        _ => return vec!["version"],
    };
    while protocol == 60 {
        protocol = body[0];
        body = &body[(usize::from(body[1]) + 1) * 8..];
    }
    let whole = match protocol {
        proto::ICMP => fold(sum(body)),
        proto::UDP if body[6..8] == [0, 0] => 0xffff,
        proto::TCP | proto::UDP | proto::ICMPV6 => !transport_checksum(&source, &destination, protocol, body),
        _ => 0xffff,
    };
    if whole != 0xffff {
        errors.push("transport");
    }
    errors
}

fn transport_checksum(source: &[u8], destination: &[u8], protocol: u8, body: &[u8]) -> u16 {
    !fold(sum(source) + sum(destination) + u64::from(protocol) + body.len() as u64 + sum(body))
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
