//! Addresses and ports, as they stand in the packet.

use crate::layout::plain;

plain! {
    /// An IPv6 address, or an IPv4 address in its IPv4-mapped form (`::ffff:a.b.c.d`, RFC 4291).
    ///
    /// Every table but the IPv4 flow table is keyed by this one form, so that the slow path, the
    /// address cache and the endpoint tables know one family only. A real IPv6 packet that carries
    /// a mapped address is refused when it is parsed, so the two can never be confused.
    ///
    /// The words hold the packet's bytes in memory order: network order.
    pub struct Addr = 16 {
        /// The sixteen bytes, four to a word.
        pub words: [u32; 4],
    }
    /// A transport port in network order. For ICMP echo it holds the identifier.
    pub struct Port = 2 {
        /// The two bytes as they stand in the packet.
        pub be: u16,
    }
}

const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// The gateway that every workload routes IPv4 through; link-local, answered by the packet path.
pub const GATEWAY_V4: Addr = Addr::v4([169, 254, 1, 1]);
/// The gateway that every workload routes IPv6 through; link-local, answered by the packet path.
pub const GATEWAY_V6: Addr = Addr::v6([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
/// The Ethernet address of that gateway, and of the node's side of every workload device.
/// Locally administered; the same everywhere, so that it never has to be looked up.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xc1, 0x44, 0x12, 0x10, 0x01];

impl Addr {
    /// The unspecified IPv6 address, `::`.
    pub const UNSPECIFIED: Addr = Addr { words: [0; 4] };
    /// The unspecified IPv4 address, 0.0.0.0, in mapped form.
    pub const ANY_V4: Addr = Addr::v4([0; 4]);

    /// An IPv4 address from its four bytes, in the order they are written.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Addr {
        Addr::v4_word(u32::from_ne_bytes(octets))
    }

    /// An IPv4 address from the word that stands in the packet (network order in memory).
    #[inline(always)]
    pub const fn v4_word(word: u32) -> Addr {
        Addr { words: [0, 0, MAPPED, word] }
    }

    /// An IPv6 address from its sixteen bytes.
    pub const fn v6(o: [u8; 16]) -> Addr {
        Addr {
            words: [
                u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
                u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
                u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
                u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
            ],
        }
    }

    /// Whether this is an IPv4 address in mapped form.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// The IPv4 address as it stands in the packet; meaningful only if [`Addr::is_v4`].
    #[inline(always)]
    pub const fn word(&self) -> u32 {
        self.words[3]
    }

    /// The sixteen bytes in network order.
    pub const fn octets(&self) -> [u8; 16] {
        let mut out = [0; 16];
        let mut i = 0;
        while i < 16 {
            out[i] = self.words[i / 4].to_ne_bytes()[i % 4];
            i += 1;
        }
        out
    }
}

impl From<core::net::IpAddr> for Addr {
    fn from(ip: core::net::IpAddr) -> Addr {
        match ip {
            core::net::IpAddr::V4(v4) => Addr::v4(v4.octets()),
            core::net::IpAddr::V6(v6) => Addr::v6(v6.octets()),
        }
    }
}

impl From<Addr> for core::net::IpAddr {
    fn from(addr: Addr) -> core::net::IpAddr {
        if addr.is_v4() {
            core::net::IpAddr::V4(addr.word().to_ne_bytes().into())
        } else {
            core::net::IpAddr::V6(addr.octets().into())
        }
    }
}

impl core::fmt::Display for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::net::IpAddr::from(*self).fmt(f)
    }
}

impl Port {
    /// A port from its number in host order.
    #[inline(always)]
    pub const fn new(number: u16) -> Port {
        Port { be: number.to_be() }
    }

    /// The number in host order.
    #[inline(always)]
    pub const fn number(self) -> u16 {
        u16::from_be(self.be)
    }
}
