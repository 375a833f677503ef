//! The slow path: everything that is not an established packet.

use cirri_abi::{
    Action, Addr, CounterIndex, Direction, DropReason, EventKind, FlowEvent, Hook, Identity, Port, Recipe, Tuple,
    VXLAN_PORT, Verdict as Said, endpoint_flag, epoch_slot, event_flag, ipcache_flag, node_flag, proto, recipe_flag,
};

use crate::{
    Verdict, carry, connection, door, icmp, masquerade, neighbour,
    parse::{Class, MAX_EXTENSIONS, Parsed, is_extension, parse_network, parse_transport, step_over},
    place::{Place, PlaceKind, block_of, is_behind, is_host, peer_identity},
    policy::{Judgement, judge},
    traits::{Packet, Tables},
    wire::{TCP_ACK, TCP_SYN},
};

/// What the slow path works on. Too large for the kernel's stack; all zeroes is a valid start.
#[derive(Clone, Copy, Default, Debug)]
pub struct Scratch {
    /// The packet.
    pub parsed: Parsed,
    /// The connection's opener ...
    pub from: Place,
    /// ... and the other end.
    pub to: Place,
    /// What policy said.
    pub judgement: Judgement,
    /// The opener's tuple, as its packets arrive.
    pub opener: Tuple,
    /// The tuple of the answers, as they arrive.
    pub answer: Tuple,
    /// Recipe of the opener's direction.
    pub forward: Recipe,
    /// Recipe of the answers.
    pub reverse: Recipe,
    /// The recipe that was found.
    pub old: Recipe,
    /// What is reported.
    pub event: FlowEvent,
    /// What the decision rests on, and
    pub slots: [u16; 3],
    /// the sum of its epochs when it began.
    pub epoch: u32,
    /// The epoch of [`epoch_slot::PLACES`] when the packet came.
    pub places: u32,
    /// The ICMP type that policy is asked for.
    pub icmp_type: u8,
    /// Where the packet was met.
    pub hook: u8,
    /// An established connection of the same tuple has to go.
    pub replaces: bool,
    /// The connection that was found is a pending one.
    pub pending: bool,
    /// It must be renewed before it is obeyed.
    pub stale: bool,
    /// Its opener begins anew.
    pub reopened: bool,
    /// The recipe that this packet is to obey.
    pub current: Current,
    /// Room for [`Tables::promote`].
    pub spare: Recipe,
    /// For the host: what a stage answered, where it keeps that in memory.
    pub word: u64,
}

/// Which of the recipes in the scratch.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Current {
    /// [`Scratch::forward`].
    #[default]
    Forward = 0,
    /// [`Scratch::reverse`].
    Reverse,
    /// [`Scratch::old`].
    Old,
}

impl Scratch {
    /// The recipe that this packet is to obey.
    #[inline(always)]
    pub fn current(&self) -> &Recipe {
        match self.current {
            Current::Forward => &self.forward,
            Current::Reverse => &self.reverse,
            Current::Old => &self.old,
        }
    }
}

/// Stages of the slow path, in the order that a new connection goes through them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Read the Ethernet and IP headers.
    Parse,
    /// Step over one IPv6 extension header; [`Next::Carry`] if nothing more can be walked.
    Extension,
    /// Read the transport header, or recall it for a fragment.
    Transport,
    /// ARP and neighbour discovery.
    LinkLocal,
    /// An ICMP error: find the flow that it quotes.
    Related,
    /// Find the packet's connection.
    Meet,
    /// A known connection that something it rests on has changed for: find both ends again.
    Revisit,
    /// Policy still allows it.
    Replace,
    /// Count the packet, move the connection's state on.
    Advance,
    /// May this sender send this?
    CheckSource,
    /// Find the receiver.
    Locate,
    /// Ask policy.
    Judge,
    /// Draft the recipes of both directions.
    Draft,
    /// Give the connection the node's address, if it leaves for the world.
    Masquerade,
    /// Write the recipes of both directions.
    Write,
    /// Tell user space.
    Report,
}

/// How the slow path goes on after a stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// With the next stage.
    Go,
    /// Carry out [`Scratch::current`].
    Carry,
    /// The verdict is there.
    Done(Verdict),
}

/// What a stage answers.
pub type Outcome = Result<Next, Refusal>;

/// Why the packet path refused. Every refusal is counted; a quiet one is not reported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The reason.
    pub reason: DropReason,
    /// Ordinary link-local chatter.
    pub quiet: bool,
}

impl From<DropReason> for Refusal {
    #[inline(always)]
    fn from(reason: DropReason) -> Refusal {
        Refusal { reason, quiet: false }
    }
}

#[inline(always)]
pub(crate) const fn quiet(reason: DropReason) -> Refusal {
    Refusal { reason, quiet: true }
}

/// Decides on a packet from the beginning, remembers the decision, reports it, carries it out.
#[inline(always)]
pub fn slow_path<P: Packet, T: Tables>(hook: u8, packet: &mut P, tables: &T, scratch: &mut Scratch) -> Verdict {
    scratch.hook = hook;
    match decide(packet, tables, scratch) {
        Ok(Next::Done(verdict)) => verdict,
        Ok(_) => carry::carry(packet, tables, scratch.current(), &carry::Headers::parsed(&scratch.parsed)),
        Err(refusal) => {
            tables.count(CounterIndex::reason(refusal.reason.code, scratch.judgement.direction), packet.length());
            if !refusal.quiet {
                scratch.event.kind = EventKind::DROP;
                scratch.event.reason = refusal.reason.code;
                let _ = tables.stage(Stage::Report, packet, scratch);
            }
            Verdict::Drop(refusal.reason)
        }
    }
}

#[inline(always)]
fn decide<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    match read(packet, tables, s)? {
        Next::Go => {}
        other => return Ok(other),
    }
    match s.parsed.class {
        Class::Flow if s.hook == Hook::TO_OVERLAY => return host_to_overlay(packet, tables, &s.parsed),
        Class::IcmpError if s.hook == Hook::TO_OVERLAY => return host_to_overlay(packet, tables, &s.parsed),
        Class::Flow => {}
        Class::IcmpError => {
            if s.hook == Hook::FROM_WORKLOAD {
                tables.stage(Stage::CheckSource, packet, s)?;
            }
            return tables.stage(Stage::Related, packet, s);
        }
        Class::Arp | Class::LinkLocal | Class::Other => return tables.stage(Stage::LinkLocal, packet, s),
    }
    // The node's own traffic must not pay for what follows.
    match tables.stage(Stage::Meet, packet, s)? {
        Next::Carry => return known(packet, tables, s),
        _ if s.hook == Hook::FROM_NETWORK && tables.endpoint(&s.parsed.tuple.dst).is_none() => {
            return Ok(Next::Done(Verdict::Continue));
        }
        _ => {}
    }
    tables.stage(Stage::CheckSource, packet, s)?;
    match tables.stage(Stage::Locate, packet, s)? {
        Next::Go => {}
        other => return Ok(other),
    }
    s.opener = s.parsed.tuple;
    s.answer = s.parsed.tuple.turned();
    s.icmp_type = s.parsed.icmp[0];
    connection::snapshot(tables, s);
    tables.stage(Stage::Judge, packet, s)?;
    tables.count(CounterIndex::DECIDED, packet.length());
    tables.stage(Stage::Draft, packet, s)?;
    // The door it did come through, which may be another than the one it should have.
    s.forward.hook = s.hook;
    s.forward.door = door(s.hook, packet);
    if s.hook == Hook::TO_WORKLOAD {
        s.forward.action = Action::CONTINUE;
    }
    tables.stage(Stage::Masquerade, packet, s)?;
    tables.stage(Stage::Write, packet, s)?;
    tables.count(CounterIndex::reason(0, s.judgement.direction), packet.length());
    s.event.kind = EventKind::NEW;
    tables.stage(Stage::Report, packet, s)?;
    Ok(Next::Carry)
}

/// A packet of a connection that a table knows.
#[inline(always)]
fn known<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    s.event.kind = 0;
    if s.stale {
        tables.stage(Stage::Revisit, packet, s)?;
        // If policy now refuses it, the recipes stay as they are, stale: they remember who opened it.
        // Without them the other side's next segment would look like a connection of its own, and
        // bring this one back as the answers to it.
        tables.stage(Stage::Judge, packet, s)?;
        tables.stage(Stage::Draft, packet, s)?;
        tables.stage(Stage::Replace, packet, s)?;
    }
    tables.stage(Stage::Advance, packet, s)?;
    if s.event.kind != 0 {
        tables.stage(Stage::Report, packet, s)?;
    }
    Ok(Next::Carry)
}

/// Takes the packet apart: into `parsed`.
#[inline(always)]
fn read<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    match tables.stage(Stage::Parse, packet, s)? {
        Next::Go if s.parsed.class == Class::Flow => {}
        other => return Ok(other),
    }
    if !s.parsed.tuple.src.is_v4() {
        match walk_extensions(packet, tables, s)? {
            Next::Go => {}
            other => return Ok(other),
        }
    }
    tables.stage(Stage::Transport, packet, s)
}

#[inline(always)]
fn walk_extensions<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    for _ in 0..MAX_EXTENSIONS {
        if !is_extension(s.parsed.tuple.proto) {
            return Ok(Next::Go);
        }
        match tables.stage(Stage::Extension, packet, s)? {
            Next::Go => {}
            Next::Carry => return Ok(Next::Go),
            done => return Ok(done),
        }
    }
    if is_extension(s.parsed.tuple.proto) {
        return unreadable(tables, s, DropReason::INVALID_EXTENSION_HEADER);
    }
    Ok(Next::Go)
}

/// What the packet path cannot read, and the node's stack perhaps can, is the node's own business
/// unless it is for a workload.
#[inline(always)]
fn unreadable<T: Tables>(tables: &T, s: &Scratch, reason: DropReason) -> Outcome {
    if s.hook == Hook::FROM_NETWORK && tables.endpoint(&s.parsed.tuple.dst).is_none() {
        return Ok(Next::Done(Verdict::Continue));
    }
    Err(reason.into())
}

/// Runs a stage. See [`Tables::stage`].
#[inline(always)]
pub fn run_stage<P: Packet, T: Tables>(stage: Stage, packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    match stage {
        Stage::Parse => take_apart(packet, tables, s),
        Stage::Extension => match step_over(packet, &mut s.parsed) {
            Ok(true) => Ok(Next::Go),
            Ok(false) => Ok(Next::Carry),
            Err(reason) => unreadable(tables, s, reason),
        },
        Stage::Transport => transport(packet, tables, s),
        Stage::LinkLocal => link_local(packet, tables, s),
        Stage::Related => icmp::related(packet, tables, s),
        Stage::Meet => connection::meet(packet, tables, s),
        Stage::Revisit => connection::revisit(packet, tables, s),
        Stage::Replace => connection::replace(packet, tables, s),
        Stage::Advance => connection::advance(packet, tables, s),
        Stage::CheckSource => check_source(packet, tables, s),
        Stage::Locate => locate(packet, tables, s),
        Stage::Judge => {
            judge(tables, &s.from, &s.to, &s.opener, s.icmp_type, &mut s.judgement)?;
            Ok(Next::Go)
        }
        Stage::Draft => {
            connection::draft(tables, s)?;
            Ok(Next::Go)
        }
        Stage::Masquerade => {
            if masquerade::wanted(tables, s)? {
                masquerade::bind(tables, s)?;
            }
            Ok(Next::Go)
        }
        Stage::Write => connection::write(packet, tables, s),
        Stage::Report => report(packet, tables, s),
    }
}

/// Bytes that the slow path may look at: the longest headers it walks, and a quoted packet.
const PULL: u32 = 256;

#[inline(always)]
fn take_apart<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    s.from = Place::default();
    s.to = Place::default();
    s.current = Current::Forward;
    s.forward.flags = 0;
    s.forward.action = 0;
    s.forward.out = 0;
    s.replaces = false;
    s.stale = false;
    s.event.reason = 0;
    s.places = tables.epoch(epoch_slot::PLACES);
    let direction = if s.hook == Hook::FROM_WORKLOAD { Direction::EGRESS } else { Direction::INGRESS };
    s.judgement = Judgement { direction, ..Judgement::default() };
    s.parsed = Parsed::default();
    if packet.tagged() {
        // At the network it is for the VLAN's own device. A workload's tag would go out with the packet,
        // into a network that the node is in and the workload is not.
        return match s.hook {
            Hook::FROM_NETWORK => Ok(Next::Done(Verdict::Continue)),
            _ => Err(DropReason::UNSUPPORTED_L2.into()),
        };
    }
    packet.pull(PULL);
    match parse_network(packet, &mut s.parsed) {
        Ok(()) => Ok(Next::Go),
        Err(reason) => unreadable(tables, s, reason),
    }
}

/// The table of fragments remembers datagrams of workloads only. Later fragments of the node's own
/// traffic go on without ports: no connection has none, and the node does not ask for them.
#[inline(always)]
fn transport<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch) -> Outcome {
    match parse_transport(packet, tables, &mut s.parsed) {
        Ok(()) if s.hook == Hook::FROM_WORKLOAD && s.parsed.is_routed_discovery() => {
            Err(DropReason::FORBIDDEN_ICMPV6.into())
        }
        Ok(()) => Ok(Next::Go),
        Err(DropReason::FIRST_FRAGMENT_MISSING)
            if s.hook == Hook::TO_OVERLAY || (s.hook == Hook::FROM_OVERLAY && is_host(tables, &s.parsed.tuple.dst)) =>
        {
            Ok(Next::Go)
        }
        Err(reason) => unreadable(tables, s, reason),
    }
}

#[inline(always)]
fn link_local<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &Scratch) -> Outcome {
    match s.hook {
        Hook::FROM_WORKLOAD => {}
        // No node sends such a thing through the overlay.
        Hook::FROM_OVERLAY => return Err(quiet(DropReason::UNSUPPORTED_L2)),
        _ => return Ok(Next::Done(Verdict::Continue)),
    }
    let Some(endpoint) = tables.device(packet.ifindex()) else {
        return Err(quiet(DropReason::NOT_READY));
    };
    let answer = match s.parsed.class {
        Class::Arp => neighbour::answer_arp(packet, endpoint),
        Class::LinkLocal => neighbour::answer_solicitation(packet, &s.parsed, endpoint),
        _ => return Err(DropReason::UNSUPPORTED_L2.into()),
    };
    match answer {
        Ok(verdict) => Ok(Next::Done(verdict)),
        Err(reason) => Err(quiet(reason)),
    }
}

/// Who may have sent this, as far as the hook can tell. Leaves the sender's place in `from`.
#[inline(always)]
fn check_source<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch) -> Outcome {
    let src = &s.parsed.tuple.src;
    match s.hook {
        Hook::FROM_WORKLOAD => {
            let Some(endpoint) = tables.device(packet.ifindex()) else {
                return Err(DropReason::NOT_READY.into());
            };
            s.from.set_endpoint(endpoint, block_of(tables, src));
            let own = if src.is_v4() { *src == endpoint.v4 } else { *src == endpoint.v6 };
            if !(own && *src != Addr::UNSPECIFIED) && endpoint.flags & endpoint_flag::ANY_SOURCE == 0 {
                // A workload's stack talks from its link-local address before it has another.
                let chatter = !src.is_v4() && (neighbour::is_link_local(src) || *src == Addr::UNSPECIFIED);
                return Err(Refusal { reason: DropReason::INVALID_SOURCE_IP, quiet: chatter });
            }
        }
        Hook::FROM_OVERLAY => {
            let Some(key) = packet.tunnel_key() else {
                return Err(DropReason::NO_TUNNEL_KEY.into());
            };
            let Some(entry) = tables.ipcache(src) else {
                return Err(DropReason::NO_CONFIG.into());
            };
            if !is_behind(entry, &key) {
                return Err(DropReason::UNKNOWN_SENDER.into());
            }
            if key.vni == Identity::UNKNOWN.id {
                return Err(DropReason::INVALID_IDENTITY.into());
            }
            s.from.set_entry(entry);
            s.from.identity = peer_identity(key.vni);
        }
        _ => {
            // From the node's stack, or from the network: the address says who it is, so it must
            // not be one that can only come another way.
            if let Err(reason) = s.from.set_address(tables, src) {
                return Err(match s.hook {
                    // Nobody can be there, or it is one of our own addresses that nobody has yet.
                    Hook::FROM_NETWORK if reason != DropReason::NO_CONFIG => DropReason::INVALID_SOURCE_IP.into(),
                    _ => quiet(reason),
                });
            }
            if s.hook == Hook::FROM_NETWORK {
                let Some(node) = tables.node() else {
                    return Err(DropReason::NO_CONFIG.into());
                };
                let tunnelled = node.flags & node_flag::TUNNEL != 0
                    && s.from.kind == PlaceKind::Remote
                    && s.from.identity != Identity::REMOTE_NODE;
                if s.from.kind == PlaceKind::Local || s.from.kind == PlaceKind::Host || tunnelled {
                    return Err(DropReason::INVALID_SOURCE_IP.into());
                }
            }
        }
    }
    Ok(Next::Go)
}

/// The other end of a connection that no table knows.
#[inline(always)]
fn locate<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    let dst = &s.parsed.tuple.dst;
    match s.hook {
        Hook::FROM_WORKLOAD => {
            if let Err(reason) = s.to.set_address(tables, dst) {
                return Err(Refusal { reason, quiet: reason == DropReason::UNKNOWN_L3_TARGET });
            }
            let node = s.to.kind == PlaceKind::Host || s.to.identity == Identity::REMOTE_NODE;
            if node && s.parsed.tuple.proto == proto::UDP && s.parsed.tuple.dport == Port::new(VXLAN_PORT) {
                return Err(DropReason::ENCAPSULATION_PROHIBITED.into());
            }
        }
        Hook::TO_WORKLOAD => {
            let Some(endpoint) = tables.device(packet.ifindex()) else {
                return Err(DropReason::NOT_READY.into());
            };
            if *dst != endpoint.v4 && *dst != endpoint.v6 {
                return Err(quiet(DropReason::UNKNOWN_L3_TARGET));
            }
            s.to.set_endpoint(endpoint, block_of(tables, dst));
        }
        _ => {
            s.to.set_address(tables, dst)?;
            match s.to.kind {
                PlaceKind::Local => {}
                PlaceKind::Host => {
                    // Out of the overlay it may still carry the workload's gateway as its receiver.
                    packet.set_for_us();
                    return Ok(Next::Done(Verdict::Continue));
                }
                _ => return Err(DropReason::UNROUTABLE.into()),
            }
        }
    }
    Ok(Next::Go)
}

/// The node's own traffic to another node's workloads. Packets of workloads come here too, already
/// decided on.
#[inline(always)]
fn host_to_overlay<P: Packet, T: Tables>(packet: &mut P, tables: &T, parsed: &Parsed) -> Outcome {
    let Some(entry) = tables.ipcache(&parsed.tuple.dst) else {
        return Err(DropReason::NO_CONFIG.into());
    };
    if entry.flags & ipcache_flag::REMOTE == 0 {
        return Err(quiet(DropReason::NO_TUNNEL_PEER));
    }
    if !is_host(tables, &parsed.tuple.src) {
        return Err(DropReason::INVALID_SOURCE_IP.into());
    }
    if !packet.set_tunnel_key(entry.peer, Identity::HOST.id) {
        return Err(DropReason::NO_TUNNEL_PEER.into());
    }
    Ok(Next::Done(Verdict::Continue))
}

/// Tells user space what happened. The kind, and for a drop the reason, already stand in the event.
#[inline(always)]
fn report<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch) -> Outcome {
    if s.event.kind != EventKind::DROP
        && let Some(node) = tables.node()
        && node.flags & node_flag::DROPS_ONLY != 0
    {
        return Ok(Next::Go);
    }
    let (out, action, flags) = (s.current().out, s.current().action, s.current().flags);
    let event = &mut s.event;
    event.tuple = s.parsed.tuple;
    // An answer that was judged anew was judged as its opener's, the other way round.
    let turned = s.stale && flags & recipe_flag::REPLY != 0;
    (event.src_identity, event.dst_identity) =
        if turned { (s.to.identity, s.from.identity) } else { (s.from.identity, s.to.identity) };
    event.egress_cookie = s.judgement.egress_cookie;
    event.ingress_cookie = s.judgement.ingress_cookie;
    event.generation = s.judgement.generation;
    event.ifindex = packet.ifindex();
    event.out = out;
    event.length = packet.length();
    event.block = if s.judgement.direction == Direction::EGRESS { s.to.block } else { s.from.block };
    event.endpoint = s.judgement.endpoint;
    event.verdict = if event.kind == EventKind::DROP {
        Said::DROPPED
    } else if s.judgement.audit {
        Said::AUDIT
    } else {
        Said::FORWARDED
    };
    event.hook = s.hook;
    event.direction = s.judgement.direction;
    event.tcp_flags = s.parsed.tcp_flags;
    event.flags = if flags & recipe_flag::REPLY != 0 { event_flag::REPLY } else { 0 };
    event.action = action;
    event.icmp = s.parsed.icmp;
    tables.emit(event);
    Ok(Next::Go)
}

/// Whether a segment asks for a new connection.
#[inline(always)]
pub(crate) const fn is_syn(parsed: &Parsed) -> bool {
    parsed.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
}
