//! Packets to measure with, built from their fields.

use std::net::IpAddr;

use cirri_abi::proto;

/// An Ethernet frame with a TCP segment or a UDP datagram in it.
#[derive(Clone, Debug)]
pub struct Frame {
    pub to: [u8; 6],
    pub from: [u8; 6],
    pub src: IpAddr,
    pub dst: IpAddr,
    pub sport: u16,
    pub dport: u16,
    /// TCP flags; `None` for UDP.
    pub tcp: Option<u8>,
}

/// TCP flags.
pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;

/// Bytes of every frame, whatever the family and protocol, so that figures compare.
pub const LENGTH: usize = 96;
const ETHERNET: usize = 14;

impl Frame {
    /// The bytes, with good checksums.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(LENGTH);
        out.extend(self.to);
        out.extend(self.from);
        let protocol = if self.tcp.is_some() { proto::TCP } else { proto::UDP };
        let transport = LENGTH - ETHERNET - if self.src.is_ipv4() { 20 } else { 40 };
        let (src, dst) = (octets(self.src), octets(self.dst));
        if self.src.is_ipv4() {
            out.extend([0x08, 0x00]);
            let mut ip = vec![0x45, 0];
            ip.extend((transport as u16 + 20).to_be_bytes());
            ip.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
            ip.extend(src.iter().chain(&dst));
            let sum = checksum(&ip);
            put(&mut ip, 10, sum);
            out.extend(ip);
        } else {
            out.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            out.extend((transport as u16).to_be_bytes());
            out.extend([protocol, 64]);
            out.extend(src.iter().chain(&dst));
        }
        let mut segment = self.sport.to_be_bytes().to_vec();
        segment.extend(self.dport.to_be_bytes());
        let checksum_at = match self.tcp {
            Some(flags) => {
                segment.extend([0, 0, 3, 0xe8, 0, 0, 7, 0xd0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
                16
            }
            None => {
                segment.extend((transport as u16).to_be_bytes());
                segment.extend([0, 0]);
                6
            }
        };
        segment.resize(transport, b'x');
        let mut summed = src;
        summed.extend(dst);
        summed.extend([0, protocol]);
        summed.extend((transport as u16).to_be_bytes());
        summed.extend(&segment);
        let sum = checksum(&summed);
        put(&mut segment, checksum_at, sum);
        out.extend(segment);
        out
    }

    /// Reads a frame that [`Frame::bytes`] made and a program perhaps rewrote.
    pub fn read(bytes: &[u8]) -> Option<Frame> {
        let v6 = bytes.get(12..14)? == [0x86, 0xdd];
        let (protocol, addresses, transport) = if v6 { (20, 22, 54) } else { (23, 26, 34) };
        let address = |at: usize| -> Option<IpAddr> {
            Some(if v6 {
                <[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?.into()
            } else {
                <[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?.into()
            })
        };
        let port = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        Some(Frame {
            to: bytes.get(0..6)?.try_into().ok()?,
            from: bytes.get(6..12)?.try_into().ok()?,
            src: address(addresses)?,
            dst: address(addresses + if v6 { 16 } else { 4 })?,
            sport: port(transport)?,
            dport: port(transport + 2)?,
            tcp: if *bytes.get(protocol)? == proto::TCP { Some(*bytes.get(transport + 13)?) } else { None },
        })
    }

    /// The answer, with these TCP flags if it is TCP.
    pub fn answer(&self, flags: u8) -> Frame {
        Frame {
            to: self.from,
            from: self.to,
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            tcp: self.tcp.map(|_| flags),
        }
    }

    /// The same with other TCP flags, if it is TCP.
    pub fn flagged(&self, flags: u8) -> Frame {
        Frame { tcp: self.tcp.map(|_| flags), ..self.clone() }
    }
}

/// An address as it stands in a packet.
pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    for (byte, new) in bytes.iter_mut().skip(at).zip(value.to_be_bytes()) {
        *byte = new;
    }
}

/// The Internet checksum (RFC 1071); 0 over bytes that hold a good one.
pub fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match *pair {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(src: &str, dst: &str, tcp: Option<u8>) -> Frame {
        Frame {
            to: [2, 0, 0, 0, 0, 1],
            from: [2, 0, 0, 0, 0, 2],
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            sport: 10_000,
            dport: 80,
            tcp,
        }
    }

    #[test]
    fn frames_have_one_length_and_read_back() {
        for (src, dst) in [("10.1.2.3", "10.4.5.6"), ("fd00::1", "fd00::2")] {
            for tcp in [Some(SYN | ACK), None] {
                let built = frame(src, dst, tcp);
                let bytes = built.bytes();
                assert_eq!(bytes.len(), LENGTH);
                let read = Frame::read(&bytes).unwrap();
                assert_eq!((read.src, read.dst, read.sport, read.dport), (built.src, built.dst, 10_000, 80));
                assert_eq!((read.tcp, read.to), (tcp, built.to));
            }
        }
    }

    #[test]
    fn checksums_verify() {
        let bytes = frame("10.1.2.3", "10.4.5.6", Some(ACK)).bytes();
        assert_eq!(checksum(&bytes[14..34]), 0);
        let mut pseudo = bytes[26..34].to_vec();
        pseudo.extend([0, proto::TCP]);
        pseudo.extend(((LENGTH - 34) as u16).to_be_bytes());
        pseudo.extend(&bytes[34..]);
        assert_eq!(checksum(&pseudo), 0);
    }
}
