//! What happens to a packet.
//!
//! This is the packet path: the same source runs in the kernel (`bpf`), in the simulator and under
//! fuzz (`sim`). It sees the world through two traits, [`Packet`] and [`Tables`], and answers with a
//! [`Verdict`]. It has no clock, no allocation, no panic and no unsafe code.
//!
//! # The path
//!
//! [`process`] looks the packet up in the flow table, once. A hit whose epochs still hold carries
//! its recipe out ([`carry`]). Everything else goes through [`slow_path`]: parse completely, find
//! both ends, ask policy, bind a masquerade port, write the recipes of both directions, report.
//!
//! # Layout for the verifier
//!
//! Everything is `#[inline(always)]` and generic; where to cut the code into kernel subprograms is
//! `bpf`'s business, which hands [`process`] the slow path as a closure. What is too large for the
//! 512-byte stack lives in a [`Scratch`] that the host provides.

#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod answer;
mod carry;
mod connection;
mod dsr;
mod echo;
mod ends;
mod icmp;
mod neighbour;
mod parse;
mod place;
mod plain;
mod policy;
mod service;
mod slow;
mod socket;
mod traits;
mod translate;
mod verdict;
mod wire;

pub use echo::may_be_echo_request;
pub use parse::Parsed;
pub use place::{Place, PlaceKind};
pub use plain::unwrap_for_host;
pub use service::{Served, may_be_datagram_for_service};
pub use slow::{Current, Next, Outcome, Refusal, Scratch, Stage, run_stage, slow_path};
pub use socket::{Attempt, Socket, SocketVerdict, bind, reach, restore};
pub use traits::{Flow, NextHop, Packet, Services, Table, Tables, TunnelKey};
pub use verdict::{Packed, Verdict};
pub use wire::{Cursor, Wire, adjusted};

use cirri_abi::{Action, Addr, FlowKey4, Hook, Port, Recipe, Tick, Tuple, node_flag, proto, recipe_flag};

/// One packet at one hook.
///
/// `slow` runs [`slow_path`]; in the kernel it is a subprogram of its own.
#[inline(always)]
pub fn process<P: Packet, T: Tables>(
    hook: u8,
    packet: &mut P,
    tables: &T,
    slow: impl FnOnce(&mut P, &T) -> Packed,
) -> Verdict {
    let packed = match fast_path(hook, packet, tables) {
        Some(packed) => packed,
        None => slow(packet, tables),
    };
    packed.verdict()
}

/// The first half of [`process`]; `None` asks for [`slow_path`].
#[inline(always)]
pub fn fast_path<P: Packet, T: Tables>(hook: u8, packet: &mut P, tables: &T) -> Option<Packed> {
    match established(hook, packet, tables) {
        None if hook == Hook::TO_NETWORK
            && !may_answer(packet, tables)
            && !may_be_datagram_for_service(packet, tables) =>
        {
            Some(Packed::CONTINUE)
        }
        other => other,
    }
}

/// Whether what the node's stack sends may be of a connection that a table knows. Most of it is not, and
/// must not pay for more.
#[inline(always)]
fn may_answer<P: Packet, T: Tables>(packet: &P, tables: &T) -> bool {
    let Some(eth) = packet.load::<wire::Ethernet>(0) else {
        return false;
    };
    let mut tuple = Tuple::default();
    let l4 = match u16::from_be(eth.ethertype) {
        wire::ETHERTYPE_IPV4 => {
            let Some(ip) = packet.load::<wire::Ipv4>(wire::L3) else {
                return false;
            };
            tuple.src = Addr::v4_word(ip.src);
            tuple.dst = Addr::v4_word(ip.dst);
            tuple.proto = ip.proto;
            // It has no ports: its first fragment says whose it is.
            if ip.fragment & wire::FRAGMENT_OFFSET != 0 {
                return true;
            }
            wire::L3 + 20
        }
        wire::ETHERTYPE_IPV6 => {
            let Some(ip) = packet.load::<wire::Ipv6>(wire::L3) else {
                return false;
            };
            tuple.src = Addr { words: ip.src };
            tuple.dst = Addr { words: ip.dst };
            tuple.proto = ip.next;
            if parse::is_extension(ip.next) {
                return true;
            }
            wire::L3 + 40
        }
        _ => return false,
    };
    if matches!(tuple.proto, proto::ICMP | proto::ICMPV6) {
        return true;
    }
    let Some(ports) = packet.load::<wire::Ports>(l4) else {
        return false;
    };
    tuple.sport = Port { be: ports.sport };
    tuple.dport = Port { be: ports.dport };
    tables.flow(Table::Flows, &tuple).is_some() || tables.flow(Table::Pending, &tuple).is_some()
}

/// The established packet: parse just enough, one lookup, obey.
///
/// What the network sends to the node's own address is the node's, and the overlay's among it, unless
/// it is for a port of masquerade: it is not looked up.
///
/// `None` sends the packet to the slow path: no flow, another door, an epoch that moved, a TCP flag
/// that changes state, a fragment, IP options, ICMP, a VLAN tag, anything unusual.
#[inline(always)]
fn established<P: Packet, T: Tables>(hook: u8, packet: &mut P, tables: &T) -> Option<Packed> {
    if packet.tagged() {
        return None;
    }
    let eth: wire::Ethernet = packet.load(0)?;
    let (flow, headers) = match u16::from_be(eth.ethertype) {
        wire::ETHERTYPE_IPV4 => {
            let ip: wire::Ipv4 = packet.load(wire::L3)?;
            if ip.version_ihl != 0x45 || ip.fragment & wire::FRAGMENT_MASK != 0 {
                return None;
            }
            let (sport, dport) = established_ports(packet, wire::L3 + 20, ip.proto)?;
            let key = FlowKey4 { src: ip.src, dst: ip.dst, sport, dport, proto: ip.proto, _pad: 0, _pad2: 0 };
            if hook == Hook::FROM_NETWORK
                && translate::is_for_node(tables, |node| node.v4.word() == ip.dst, dport)
                && !is_of_host_backend(tables, || key.tuple())
            {
                return Some(Packed::CONTINUE);
            }
            (tables.flow4(&key)?, carry::Headers { l4: wire::L3 + 20, sport, dport, proto: ip.proto, v6: false })
        }
        wire::ETHERTYPE_IPV6 => {
            let ip: wire::Ipv6 = packet.load(wire::L3)?;
            let (sport, dport) = established_ports(packet, wire::L3 + 40, ip.next)?;
            let [s0, s1, s2, s3] = ip.src;
            let [d0, d1, d2, d3] = ip.dst;
            let key = Tuple {
                src: cirri_abi::Addr { words: [s0, s1, s2, s3] },
                dst: cirri_abi::Addr { words: [d0, d1, d2, d3] },
                sport,
                dport,
                proto: ip.next,
                _pad: 0,
                _pad2: 0,
            };
            if hook == Hook::FROM_NETWORK
                && translate::is_for_node(tables, |node| node.v6.words == ip.dst, dport)
                && !is_of_host_backend(tables, || key)
            {
                return Some(Packed::CONTINUE);
            }
            (tables.flow6(&key)?, carry::Headers { l4: wire::L3 + 40, sport, dport, proto: ip.next, v6: true })
        }
        _ => return None,
    };
    let recipe = flow.recipe();
    if recipe.hook != hook || recipe.door != door(hook, packet) || epochs(tables, &recipe.slots) != recipe.epoch {
        return None;
    }
    if P::RAW && (!carry::is_raw(packet, tables, recipe) || carry::is_left_to_device(packet, &headers)) {
        return Some(Packed::CONTINUE);
    }
    if recipe.action == Action::IPIP && dsr::is_too_long(packet, recipe, if headers.v6 { 40 } else { 20 }) {
        return None;
    }
    flow.touch(tables.now(), packet.length());
    if recipe.flags & recipe_flag::SERVED != 0 {
        tables.count_backend(recipe.backend, recipe.flags & recipe_flag::REPLY != 0, packet.length());
    }
    Some(carry::carry(packet, tables, recipe, &headers))
}

/// Whether a packet for the node itself is of a connection that another node gave it as a backend, with
/// direct return: the answers leave translated, and it is by the client's packets that a connection becomes
/// established. Where the node is nobody's backend its own traffic does not pay for that.
#[inline(always)]
fn is_of_host_backend<T: Tables>(tables: &T, tuple: impl FnOnce() -> Tuple) -> bool {
    let serves = match tables.node() {
        Some(node) => node.flags & node_flag::HOST_BACKENDS != 0,
        None => false,
    };
    if !serves {
        return false;
    }
    let tuple = tuple();
    tables.flow(Table::Flows, &tuple).is_some() || tables.flow(Table::Pending, &tuple).is_some()
}

/// Ports of a TCP segment that changes no state, or of a UDP datagram.
#[inline(always)]
fn established_ports<P: Packet>(packet: &P, offset: u32, protocol: u8) -> Option<(Port, Port)> {
    match protocol {
        proto::TCP => {
            let tcp: wire::Tcp = packet.load(offset)?;
            if tcp.flags & wire::TCP_STATE_FLAGS != 0 {
                return None;
            }
            Some((Port { be: tcp.sport }, Port { be: tcp.dport }))
        }
        proto::UDP => {
            let udp: wire::Udp = packet.load(offset)?;
            Some((Port { be: udp.sport }, Port { be: udp.dport }))
        }
        _ => None,
    }
}

/// The sum that a recipe's epoch must equal; see [`Recipe::epoch`].
#[inline(always)]
fn epochs<T: Tables>(tables: &T, slots: &[u16; 3]) -> u32 {
    tables.epoch(slots[0]).wrapping_add(tables.epoch(slots[1])).wrapping_add(tables.epoch(slots[2]))
}

/// What a packet must have come through, as [`Recipe::door`] holds it: the device; from the
/// overlay, the identity that its VNI names; from the network, nothing (routes may be asymmetric).
#[inline(always)]
fn door<P: Packet>(hook: u8, packet: &P) -> u32 {
    match hook {
        Hook::FROM_OVERLAY => match packet.tunnel_key() {
            Some(key) => place::peer_identity(key.vni).id,
            None => NO_DOOR,
        },
        Hook::FROM_NETWORK | Hook::TO_NETWORK => 0,
        _ => packet.ifindex(),
    }
}

/// The door of a packet that says it is from the overlay and has no tunnel key: never a recipe's.
const NO_DOOR: u32 = u32::MAX;

/// Whether `last_seen` must be written: at most once a tick.
#[inline(always)]
pub const fn stale(last_seen: Tick, now: Tick) -> bool {
    last_seen.count != now.count
}

const _: () = assert!(core::mem::size_of::<Recipe>() == 128);
