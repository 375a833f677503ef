//! New flows at a steady rate, out of one namespace: every datagram is of a flow that nobody has seen.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cirri_loader::net::Namespace;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// What to offer.
#[derive(Debug, Clone, Copy)]
pub struct Offer {
    /// To whom.
    pub to: Ipv4Addr,
    /// On which UDP port.
    pub port: u16,
    /// New flows a second.
    pub rate: u32,
}

/// What was offered.
#[derive(Debug, Clone, Copy)]
pub struct Offered {
    /// Datagrams that the namespace's stack took.
    pub sent: u64,
    /// Datagrams that it did not: its queue was full.
    pub refused: u64,
    /// How long it took.
    pub took: Duration,
    /// Most datagrams that were sent within one second.
    pub peak: u64,
}

/// IPv4 and UDP headers and eight bytes.
const LENGTH: usize = 36;
/// `IPPROTO_RAW`: the header is in the packet.
const RAW: i32 = 255;
/// `ENOBUFS`.
const NO_BUFFERS: i32 = 105;
/// Datagrams between two looks at the clock.
const BURST: u64 = 64;

impl Offer {
    /// Offers flows until it is told to stop. What falls behind is made up for. `peak` is [`Offered::peak`] so far.
    ///
    /// # Errors
    /// A datagram cannot be sent for another reason than a full queue.
    pub fn run(&self, inside: &Namespace, stop: &AtomicBool, peak: &AtomicU64) -> io::Result<Offered> {
        inside.run(|| self.send(stop, peak)).map_err(|error| io::Error::other(error.to_string()))?
    }

    fn send(&self, stop: &AtomicBool, peak: &AtomicU64) -> io::Result<Offered> {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW)))?;
        socket.set_send_buffer_size(4 << 20)?;
        let target: SockAddr = SocketAddr::new(self.to.into(), 0).into();
        let mut packet = self.packet();
        let (mut sent, mut refused) = (0, 0);
        let begun = Instant::now();
        let (mut second, mut sent_before) = (begun, 0);
        while !stop.load(Ordering::Relaxed) {
            if second.elapsed() >= Duration::from_secs(1) {
                let rate = (sent - sent_before) as f64 / second.elapsed().as_secs_f64();
                peak.fetch_max(rate as u64, Ordering::Relaxed);
                (second, sent_before) = (Instant::now(), sent);
            }
            let due = (begun.elapsed().as_secs_f64() * f64::from(self.rate)) as u64;
            if due < sent + refused {
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
            for number in sent + refused..sent + refused + BURST {
                // 10.128.0.0/9 and 32,768 ports: more flows than any test offers.
                let [_, b, c, d] = ((number >> 15) as u32 & 0x7f_ffff | 0x80_0000).to_be_bytes();
                packet[12..16].copy_from_slice(&[10, b, c, d]);
                packet[20..22].copy_from_slice(&(number as u16 | 0x8000).to_be_bytes());
                match socket.send_to(&packet, &target) {
                    Ok(_) => sent += 1,
                    Err(error) if error.raw_os_error() == Some(NO_BUFFERS) => refused += 1,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(Offered { sent, refused, took: begun.elapsed(), peak: peak.load(Ordering::Relaxed) })
    }

    fn packet(&self) -> [u8; LENGTH] {
        let mut packet = [0; LENGTH];
        packet[..12].copy_from_slice(&[0x45, 0, 0, LENGTH as u8, 0, 0, 0x40, 0, 64, 17, 0, 0]);
        packet[16..20].copy_from_slice(&self.to.octets());
        packet[22..24].copy_from_slice(&self.port.to_be_bytes());
        packet[24..26].copy_from_slice(&(LENGTH as u16 - 20).to_be_bytes());
        packet
    }
}

impl Offered {
    /// Datagrams a second.
    pub fn rate(&self) -> f64 {
        self.sent as f64 / self.took.as_secs_f64()
    }
}
