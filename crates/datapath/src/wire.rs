//! Headers as they stand in the packet. Fields are in network order unless a method turns them.

/// A header, or a piece of one, that can be read from and written to a packet byte for byte.
///
/// Every bit pattern is a valid value. The kernel host reads it in place; hosts without unsafe code
/// go through [`Wire::read`] and [`Wire::write`].
pub trait Wire: Copy + 'static {
    /// Bytes on the wire; equal to the size in memory.
    const SIZE: usize;
    /// Takes the value off the front of `bytes`. Missing bytes read as zero.
    fn read(bytes: &mut Cursor<'_>) -> Self;
    /// Puts the value to the front of `bytes`. What does not fit is left out.
    fn write(&self, bytes: &mut [u8], at: &mut usize);
}

/// Bytes being read, front to back.
pub struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// Reads from the front of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes }
    }

    fn byte(&mut self) -> u8 {
        match self.bytes.split_first() {
            Some((first, rest)) => {
                self.bytes = rest;
                *first
            }
            None => 0,
        }
    }
}

impl Wire for u8 {
    const SIZE: usize = 1;
    fn read(bytes: &mut Cursor<'_>) -> Self {
        bytes.byte()
    }
    fn write(&self, bytes: &mut [u8], at: &mut usize) {
        if let Some(slot) = bytes.get_mut(*at) {
            *slot = *self;
        }
        *at += 1;
    }
}

impl<const N: usize> Wire for [u8; N] {
    const SIZE: usize = N;
    fn read(bytes: &mut Cursor<'_>) -> Self {
        let mut out = [0; N];
        for byte in &mut out {
            *byte = bytes.byte();
        }
        out
    }
    fn write(&self, bytes: &mut [u8], at: &mut usize) {
        for byte in self {
            byte.write(bytes, at);
        }
    }
}

impl Wire for u16 {
    const SIZE: usize = 2;
    fn read(bytes: &mut Cursor<'_>) -> Self {
        u16::from_ne_bytes(Wire::read(bytes))
    }
    fn write(&self, bytes: &mut [u8], at: &mut usize) {
        self.to_ne_bytes().write(bytes, at);
    }
}

impl Wire for u32 {
    const SIZE: usize = 4;
    fn read(bytes: &mut Cursor<'_>) -> Self {
        u32::from_ne_bytes(Wire::read(bytes))
    }
    fn write(&self, bytes: &mut [u8], at: &mut usize) {
        self.to_ne_bytes().write(bytes, at);
    }
}

impl<const N: usize> Wire for [u16; N] {
    const SIZE: usize = 2 * N;
    fn read(bytes: &mut Cursor<'_>) -> Self {
        core::array::from_fn(|_| Wire::read(bytes))
    }
    fn write(&self, bytes: &mut [u8], at: &mut usize) {
        for word in self {
            word.write(bytes, at);
        }
    }
}

impl<const N: usize> Wire for [u32; N] {
    const SIZE: usize = 4 * N;
    fn read(bytes: &mut Cursor<'_>) -> Self {
        core::array::from_fn(|_| Wire::read(bytes))
    }
    fn write(&self, bytes: &mut [u8], at: &mut usize) {
        for word in self {
            word.write(bytes, at);
        }
    }
}

macro_rules! header {
    ($($(#[$meta:meta])* struct $name:ident { $($field:ident: $ty:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[repr(C)]
            #[derive(Clone, Copy, PartialEq, Eq, Debug)]
            pub(crate) struct $name { $(pub $field: $ty,)* }

            impl Wire for $name {
                const SIZE: usize = 0 $(+ <$ty as Wire>::SIZE)*;
                fn read(bytes: &mut Cursor<'_>) -> Self {
                    $name { $($field: Wire::read(bytes),)* }
                }
                fn write(&self, bytes: &mut [u8], at: &mut usize) {
                    $(self.$field.write(bytes, at);)*
                }
            }
            const _: () = assert!(core::mem::size_of::<$name>() == <$name as Wire>::SIZE);
        )*
    };
}

header! {
    /// Ethernet II.
    struct Ethernet {
        dst: [u16; 3],
        src: [u16; 3],
        ethertype: u16,
    }
    /// The Ethernet addresses alone.
    struct Macs {
        dst: [u16; 3],
        src: [u16; 3],
    }
    /// IPv4 without options (RFC 791).
    struct Ipv4 {
        version_ihl: u8,
        tos: u8,
        length: u16,
        id: u16,
        fragment: u16,
        ttl: u8,
        proto: u8,
        checksum: u16,
        src: u32,
        dst: u32,
    }
    /// IPv6 (RFC 8200).
    struct Ipv6 {
        version_class_flow: u32,
        length: u16,
        next: u8,
        hop_limit: u8,
        src: [u32; 4],
        dst: [u32; 4],
    }
    /// Start of every IPv6 extension header but AH and the fragment header.
    struct Extension {
        next: u8,
        length: u8,
    }
    /// IPv6 fragment header.
    struct Fragment6 {
        next: u8,
        reserved: u8,
        offset: u16,
        id: u32,
    }
    /// TCP up to its flags (RFC 9293).
    struct Tcp {
        sport: u16,
        dport: u16,
        seq: [u16; 2],
        ack: [u16; 2],
        offset: u8,
        flags: u8,
    }
    /// TCP without options.
    struct TcpFull {
        sport: u16,
        dport: u16,
        seq: [u16; 2],
        ack: [u16; 2],
        offset: u8,
        flags: u8,
        window: u16,
        checksum: u16,
        urgent: u16,
    }
    /// A service's address in an IPv4 option; see `cirri_abi::dsr`.
    struct ServiceOption4 {
        kind: u8,
        length: u8,
        port: u16,
        addr: [u16; 2],
    }
    /// A service's address in an IPv6 destination options header; see `cirri_abi::dsr`.
    struct ServiceOption6 {
        next: u8,
        length: u8,
        kind: u8,
        option_length: u8,
        addr: [u32; 4],
        port: u16,
        zero: u16,
    }
    /// The ports alone: TCP, UDP, SCTP.
    struct Ports {
        sport: u16,
        dport: u16,
    }
    /// UDP (RFC 768).
    struct Udp {
        sport: u16,
        dport: u16,
        length: u16,
        checksum: u16,
    }
    /// ICMP and ICMPv6: echo and the start of errors.
    struct Icmp {
        kind: u8,
        code: u8,
        checksum: u16,
        id: u16,
        seq: u16,
    }
    /// ARP for IPv4 over Ethernet (RFC 826).
    struct Arp {
        hardware: u16,
        protocol: u16,
        lengths: [u8; 2],
        operation: u16,
        sender_mac: [u16; 3],
        sender_ip: [u16; 2],
        target_mac: [u16; 3],
        target_ip: [u16; 2],
    }
    /// Neighbour solicitation or advertisement with its one link-layer option (RFC 4861).
    struct Neighbour {
        kind: u8,
        code: u8,
        checksum: u16,
        flags: u32,
        target: [u32; 4],
        option: u8,
        option_length: u8,
        mac: [u16; 3],
    }
}

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Offset of the IP header.
pub(crate) const L3: u32 = 14;
/// Protocol number of the IPv6 fragment header (RFC 8200, 4.5).
pub(crate) const FRAGMENT6: u8 = 44;
/// Length of that header.
pub(crate) const FRAGMENT6_LENGTH: u32 = 8;
/// More-fragments bit and fragment offset, as they stand in the packet.
pub(crate) const FRAGMENT_MASK: u16 = 0x3fffu16.to_be();
/// The fragment offset alone.
pub(crate) const FRAGMENT_OFFSET: u16 = 0x1fffu16.to_be();

/// The don't-fragment bit.
pub(crate) const DONT_FRAGMENT: u16 = 0x4000u16.to_be();

pub(crate) const TCP_FIN: u8 = 0x01;
pub(crate) const TCP_SYN: u8 = 0x02;
pub(crate) const TCP_RST: u8 = 0x04;
pub(crate) const TCP_ACK: u8 = 0x10;
/// Flags that change state: such segments take the slow path.
pub(crate) const TCP_STATE_FLAGS: u8 = TCP_FIN | TCP_SYN | TCP_RST;

/// An IPv4 header without options, its checksum included. `length` is of the whole packet, bytes.
#[inline(always)]
pub(crate) fn ipv4_header(src: u32, dst: u32, proto: u8, length: u16, id: u16, ttl: u8) -> Ipv4 {
    let mut ip = Ipv4 {
        version_ihl: 0x45,
        tos: 0,
        length: length.to_be(),
        id,
        fragment: DONT_FRAGMENT,
        ttl,
        proto,
        checksum: 0,
        src,
        dst,
    };
    let sum = u16::from_ne_bytes([0x45, 0]) as u64
        + ip.length as u64
        + id as u64
        + DONT_FRAGMENT as u64
        + u16::from_ne_bytes([ttl, proto]) as u64
        + src as u64
        + dst as u64;
    ip.checksum = !fold_checksum(sum);
    ip
}

/// Folds a sum of words in memory order, which works as in network order (RFC 1071).
#[inline(always)]
pub(crate) const fn fold_checksum(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// A checksum after a difference, as `bpf_csum_diff` forms it (RFC 1624).
#[inline(always)]
pub const fn adjusted(old: u16, delta: u32) -> u16 {
    let sum = (!old) as u64 + delta as u64;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

/// Offset of the checksum in each transport header.
#[inline(always)]
pub(crate) const fn checksum_offset(protocol: u8) -> Option<u32> {
    match protocol {
        cirri_abi::proto::TCP => Some(16),
        cirri_abi::proto::UDP => Some(6),
        cirri_abi::proto::ICMP | cirri_abi::proto::ICMPV6 => Some(2),
        _ => None,
    }
}

/// An Ethernet address as words of two bytes.
#[inline(always)]
pub(crate) const fn mac_words(mac: [u8; 6]) -> [u16; 3] {
    [u16::from_ne_bytes([mac[0], mac[1]]), u16::from_ne_bytes([mac[2], mac[3]]), u16::from_ne_bytes([mac[4], mac[5]])]
}
