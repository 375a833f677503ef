//! The slow path: everything that is not an established packet.

use cirri_abi::{
    Action, Addr, CounterIndex, Direction, DropReason, EventKind, FlowEvent, Forwarding, Hook, Port, Recipe, State,
    Tuple, Verdict as Said, epoch_slot, event_flag, node_flag, proto, recipe_flag,
};

use crate::{
    Packed, carry, connection, door, dsr, echo, ends, icmp, neighbour,
    parse::{Class, MAX_EXTENSIONS, Parsed, is_extension, parse_network, parse_transport, step_over},
    place::{Place, PlaceKind, is_host},
    policy::{Judgement, judge},
    service::{self, Served},
    traits::{Packet, Tables},
    translate,
    wire::{self, TCP_ACK, TCP_SYN},
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
    /// The packet's tuple as its receiver will see it, its source aside: a service's backend in place of
    /// the service.
    pub translated: Tuple,
    /// What its service decided.
    pub served: Served,
    /// The backend that another node has chosen, as the IPIP header said that was taken off ...
    pub outer_dst: Addr,
    /// ... with its port.
    pub outer_port: Port,
    /// The port ...
    pub option_port: Port,
    /// ... and the address of the service that another node received the packet for, as its option says.
    pub option_addr: Addr,
    /// The longest packet that its sender may send, where this one is too long; else 0.
    pub mtu: u16,
    /// The ICMP type that policy is asked for.
    pub icmp_type: u8,
    /// Where the packet was met.
    pub hook: u8,
    /// The range of ports to choose from: the first, and a mask.
    pub ports: (u16, u16),
    /// The answers' recipe is in its table: it claims a port.
    pub claimed: bool,
    /// An established connection of the same tuple has to go.
    pub replaces: bool,
    /// The connection that was found is a pending one.
    pub pending: bool,
    /// It must be renewed before it is obeyed.
    pub stale: bool,
    /// It comes from another node under an identity that the rules here know nothing of.
    pub foreign: bool,
    /// Policy is asked for another sender than the address cache names: one of them is behind.
    pub disputed: bool,
    /// Its opener begins anew.
    pub reopened: bool,
    /// The recipe that this packet is to obey.
    pub current: Current,
    /// Room for [`Tables::promote`], and for the recipe that is carried out.
    pub spare: Recipe,
    /// The tick in which this processor answered last ...
    pub answered_at: u32,
    /// ... and how often in it. What is answered must stay a small part of what anybody can send.
    pub answered: u32,
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

    /// Whether an outer header was taken off. Then the packet is for a service, or nobody's: whatever filter
    /// the outer one went through has not seen this one.
    #[inline(always)]
    pub(crate) fn is_unwrapped(&self) -> bool {
        self.outer_dst != Addr::UNSPECIFIED
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
    /// Answer an echo request for a service's address.
    Echo,
    /// Find the service that it is for, and choose a backend.
    Serve,
    /// Ask policy.
    Judge,
    /// Draft the recipes of both directions.
    Draft,
    /// Put in what becomes of its addresses: a service's backend, masquerade, direct return.
    Translate,
    /// No source port was free: take one back.
    Reclaim,
    /// Write the recipes of both directions.
    Write,
    /// Put the service's address into the packet, for the backend's node.
    Mark,
    /// Make the answer to what is refused; [`Next::Carry`] leaves it to the next.
    Answer,
    /// The same for ICMPv6.
    AnswerV6,
    /// Send it back.
    SendBack,
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
    Done(Packed),
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
    /// The sender is told, by a reset or an ICMP error.
    pub answer: bool,
}

impl Refusal {
    /// A refusal that the sender is told of.
    #[inline(always)]
    pub(crate) const fn answered(reason: DropReason) -> Refusal {
        Refusal { reason, quiet: false, answer: true }
    }
}

impl From<DropReason> for Refusal {
    #[inline(always)]
    fn from(reason: DropReason) -> Refusal {
        Refusal { reason, quiet: false, answer: false }
    }
}

#[inline(always)]
pub(crate) const fn quiet(reason: DropReason) -> Refusal {
    Refusal { reason, quiet: true, answer: false }
}

/// Decides on a packet from the beginning, remembers the decision, reports it, carries it out.
#[inline(always)]
pub fn slow_path<P: Packet, T: Tables>(hook: u8, packet: &mut P, tables: &T, scratch: &mut Scratch) -> Packed {
    scratch.hook = hook;
    match decide(packet, tables, scratch) {
        Ok(Next::Done(verdict)) => verdict,
        Ok(_) => {
            // From one place, whichever recipe it is: the verifier walks what follows once.
            scratch.spare = *scratch.current();
            carry::carry(packet, tables, &scratch.spare, &carry::Headers::parsed(&scratch.parsed))
        }
        Err(refusal) => refuse(packet, tables, scratch, refusal),
    }
}

/// What a recipe's first packets need beyond the recipe.
#[inline(always)]
fn prepare<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    if P::RAW && !carry::is_raw(packet, tables, s.current()) {
        return Ok(Next::Done(Packed::CONTINUE));
    }
    if s.current().flags & recipe_flag::ONE_WAY == 0 {
        return Ok(Next::Carry);
    }
    tables.stage(Stage::Mark, packet, s)?;
    Ok(Next::Carry)
}

/// Counts a refusal, tells user space, and the sender if that is due.
#[inline(always)]
fn refuse<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch, refusal: Refusal) -> Packed {
    tables.count(CounterIndex::reason(refusal.reason.code, s.judgement.direction), packet.length());
    if refusal.quiet {
        return Packed::drop(refusal.reason);
    }
    s.event.kind = EventKind::DROP;
    s.event.reason = refusal.reason.code;
    let _ = tables.stage(Stage::Report, packet, s);
    if refusal.answer && answer(packet, tables, s).is_ok() {
        return back(s.hook, packet.ifindex());
    }
    Packed::drop(refusal.reason)
}

/// The way back of what a packet was made into.
#[inline(always)]
pub(crate) fn back(hook: u8, ifindex: u32) -> Packed {
    match hook {
        Hook::FROM_WORKLOAD => Packed::local(ifindex),
        // The node's own stack asked.
        Hook::TO_NETWORK => Packed::up(ifindex),
        _ => Packed::device(ifindex),
    }
}

/// Turns the packet into an answer to itself.
#[inline(always)]
fn answer<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Result<(), Refusal> {
    if let Next::Carry = tables.stage(Stage::Answer, packet, s)? {
        tables.stage(Stage::AnswerV6, packet, s)?;
    }
    tables.stage(Stage::SendBack, packet, s)?;
    Ok(())
}

#[inline(always)]
fn decide<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    match read(packet, tables, s)? {
        Next::Go => {}
        // The only thing that can be done, said so that no other verdict seems possible.
        _ if P::RAW => return Ok(Next::Done(Packed::CONTINUE)),
        other => return Ok(other),
    }
    match s.parsed.class {
        Class::Flow if s.hook == Hook::TO_OVERLAY => return ends::host_to_overlay(packet, tables, &s.parsed),
        Class::IcmpError if s.hook == Hook::TO_OVERLAY => return ends::host_to_overlay(packet, tables, &s.parsed),
        Class::Flow => {}
        // The tables of workloads and of the overlay are the stack's to reach.
        _ if P::RAW => return Ok(Next::Done(Packed::CONTINUE)),
        Class::IcmpError => {
            if s.hook == Hook::FROM_WORKLOAD {
                tables.stage(Stage::CheckSource, packet, s)?;
            }
            return tables.stage(Stage::Related, packet, s);
        }
        Class::Arp | Class::LinkLocal | Class::Other => return tables.stage(Stage::LinkLocal, packet, s),
    }
    if P::RAW && carry::is_left_to_device(packet, &carry::Headers::parsed(&s.parsed)) {
        return Ok(Next::Done(Packed::CONTINUE));
    }
    match tables.stage(Stage::Meet, packet, s)? {
        Next::Carry if P::RAW && !carry::is_raw(packet, tables, &s.old) => return Ok(Next::Done(Packed::CONTINUE)),
        Next::Carry if !P::RAW && s.is_unwrapped() && !s.old.is_to_backend() => {
            return Err(DropReason::UNSUPPORTED_DSR.into());
        }
        Next::Carry => return known(packet, tables, s),
        _ => {}
    }
    s.translated = s.parsed.tuple;
    // The network's senders are checked after: the node's own traffic must not pay for it.
    if matches!(s.hook, Hook::FROM_WORKLOAD | Hook::FROM_OVERLAY) {
        tables.stage(Stage::CheckSource, packet, s)?;
    }
    if echo::asks(&s.parsed)
        && matches!(s.hook, Hook::FROM_WORKLOAD | Hook::FROM_NETWORK | Hook::TO_NETWORK)
        && let done @ Next::Done(_) = tables.stage(Stage::Echo, packet, s)?
    {
        return Ok(done);
    }
    match s.hook {
        // What the node's stack sends is its own, unless it answers.
        Hook::TO_NETWORK => return service::refuse_own(tables, s),
        Hook::TO_WORKLOAD => {}
        // Out of the overlay only a port of the node itself can be a service.
        Hook::FROM_OVERLAY if !tables.node_port(s.parsed.tuple.dport) => {}
        _ => {
            tables.stage(Stage::Serve, packet, s)?;
        }
    }
    if s.hook == Hook::FROM_NETWORK && !s.served.yes && !concerns_workload(tables, s, P::RAW) {
        return Ok(Next::Done(Packed::CONTINUE));
    }
    if matches!(s.hook, Hook::FROM_NETWORK | Hook::TO_WORKLOAD) {
        tables.stage(Stage::CheckSource, packet, s)?;
    }
    match tables.stage(Stage::Locate, packet, s)? {
        Next::Go => {}
        // The only thing that can be done, said so that no other verdict seems possible.
        _ if P::RAW => return Ok(Next::Done(Packed::CONTINUE)),
        other => return Ok(other),
    }
    if P::RAW && !matches!(s.to.kind, PlaceKind::World | PlaceKind::Remote) {
        return Ok(Next::Done(Packed::CONTINUE));
    }
    s.opener = s.parsed.tuple;
    s.answer = s.translated.turned();
    s.icmp_type = s.parsed.icmp[0];
    connection::snapshot(tables, s);
    tables.stage(Stage::Judge, packet, s)?;
    tables.count(CounterIndex::DECIDED, packet.length());
    tables.stage(Stage::Draft, packet, s)?;
    if P::RAW && !carry::is_raw(packet, tables, &s.forward) {
        return Ok(Next::Done(Packed::CONTINUE));
    }
    // The door it did come through, which may be another than the one it should have.
    s.forward.hook = s.hook;
    s.forward.door = door(s.hook, packet);
    if s.hook == Hook::TO_WORKLOAD {
        s.forward.action = Action::CONTINUE;
    }
    if let Next::Carry = tables.stage(Stage::Translate, packet, s)? {
        tables.stage(Stage::Reclaim, packet, s)?;
    }
    tables.stage(Stage::Write, packet, s)?;
    tables.count(CounterIndex::reason(0, s.judgement.direction), packet.length());
    s.event.kind = EventKind::NEW;
    tables.stage(Stage::Report, packet, s)?;
    prepare(packet, tables, s)
}

/// Whether a packet from the network that is for no service is for a workload, or for a backend of this
/// node by another node's choice.
#[inline(always)]
fn concerns_workload<T: Tables>(tables: &T, s: &Scratch, raw: bool) -> bool {
    !raw && (s.option_addr != Addr::UNSPECIFIED || tables.endpoint(&s.parsed.tuple.dst).is_some())
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
    prepare(packet, tables, s)
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
/// unless it is for a workload, or was taken out of another packet.
#[inline(always)]
fn unreadable<T: Tables>(tables: &T, s: &Scratch, reason: DropReason) -> Outcome {
    let from_network = s.hook == Hook::FROM_NETWORK && !s.is_unwrapped();
    if s.hook == Hook::TO_NETWORK || (from_network && tables.endpoint(&s.parsed.tuple.dst).is_none()) {
        return Ok(Next::Done(Packed::CONTINUE));
    }
    Err(reason.into())
}

/// Runs a stage. See [`Tables::stage`].
#[inline(always)]
pub fn run_stage<P: Packet, T: Tables>(stage: Stage, packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    match stage {
        Stage::Parse => take_apart(packet, tables, s),
        Stage::Extension => {
            if s.parsed.tuple.proto == dsr::DESTINATION_OPTIONS {
                dsr::read_option(packet, tables, s, s.parsed.l4);
            }
            match step_over(packet, &mut s.parsed) {
                Ok(true) => Ok(Next::Go),
                Ok(false) => Ok(Next::Carry),
                Err(reason) => unreadable(tables, s, reason),
            }
        }
        Stage::Transport => transport(packet, tables, s),
        Stage::LinkLocal => link_local(packet, tables, s),
        Stage::Related => icmp::related(packet, tables, s),
        Stage::Meet => connection::meet(packet, tables, s),
        Stage::Revisit => connection::revisit(packet, tables, s),
        Stage::Replace => connection::replace(packet, tables, s),
        Stage::Advance => connection::advance(packet, tables, s),
        Stage::CheckSource => ends::check_source(packet, tables, s),
        Stage::Locate => ends::locate(packet, tables, s),
        Stage::Echo => echo::answer(packet, tables, s),
        Stage::Serve => service::serve(packet, tables, s),
        Stage::Judge => {
            judge(tables, &s.from, &s.to, &s.translated, s.icmp_type, &mut s.judgement)?;
            Ok(Next::Go)
        }
        Stage::Draft => {
            connection::draft(tables, s)?;
            Ok(Next::Go)
        }
        Stage::Translate => translate::translate(tables, s),
        Stage::Reclaim => {
            translate::reclaim(tables, s)?;
            Ok(Next::Go)
        }
        Stage::Write => connection::write(packet, tables, s),
        Stage::Mark => mark(packet, s),
        Stage::Answer => crate::answer::compose(packet, tables, s),
        Stage::AnswerV6 => crate::answer::compose_v6(packet, s),
        Stage::SendBack => crate::answer::send_back(packet, s),
        Stage::Report => report(packet, tables, s),
    }
}

/// A packet whose answers take another way: it must fit, and until its connection is established it
/// carries the service's address.
#[inline(always)]
fn mark<P: Packet>(packet: &mut P, s: &mut Scratch) -> Outcome {
    let tuple = s.parsed.tuple;
    let v6 = !tuple.src.is_v4();
    let first = s.current().packets <= 1;
    let recipe = s.current();
    if recipe.action == Action::IPIP {
        let overhead = dsr::overhead(Forwarding::DSR_IPIP, v6);
        if dsr::is_too_long(packet, recipe, overhead) {
            s.mtu = recipe.mtu.wrapping_sub(overhead as u16);
            return Err(Refusal::answered(DropReason::FRAGMENTATION_NEEDED));
        }
        return Ok(Next::Carry);
    }
    let opens = if tuple.proto == proto::TCP { is_syn(&s.parsed) } else { recipe.state == State::NEW };
    if recipe.flags & recipe_flag::DSR_OPTION == 0 || !opens || s.parsed.later_fragment {
        return Ok(Next::Carry);
    }
    let overhead = dsr::overhead(Forwarding::DSR_OPTION, v6);
    if dsr::is_too_long(packet, recipe, overhead) {
        if !first {
            // Its backend's node may know the connection from an earlier packet.
            return Ok(Next::Carry);
        }
        s.mtu = recipe.mtu.wrapping_sub(overhead as u16);
        return Err(Refusal::answered(DropReason::FRAGMENTATION_NEEDED));
    }
    if !dsr::write_option(packet, &tuple.dst, tuple.dport) {
        return Err(DropReason::UNSUPPORTED_DSR.into());
    }
    s.parsed.l4 += overhead;
    Ok(Next::Carry)
}

/// Bytes that the slow path may look at: the longest headers it walks, and a quoted packet.
const PULL: u32 = 256;

/// Before the stack: whether a frame has another Ethernet address than its device's, if that is known.
#[inline(always)]
fn is_for_other<P: Packet, T: Tables>(packet: &P, tables: &T) -> bool {
    if !P::RAW {
        return false;
    }
    let own = tables.edge_device(packet.ifindex());
    own != 0 && packet.load::<[u16; 2]>(2) != Some([own as u16, (own >> 16) as u16])
}

#[inline(always)]
fn take_apart<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    s.from = Place::default();
    s.to = Place::default();
    s.current = Current::Forward;
    s.forward.flags = 0;
    s.forward.action = 0;
    s.forward.out = 0;
    s.forward.backend = 0;
    s.forward.packets = 0;
    s.replaces = false;
    s.claimed = false;
    s.stale = false;
    s.foreign = false;
    s.disputed = false;
    s.event.reason = 0;
    s.mtu = 0;
    s.outer_dst = Addr::UNSPECIFIED;
    s.option_addr = Addr::UNSPECIFIED;
    s.served = Served::default();
    s.places = tables.epoch(epoch_slot::PLACES);
    let direction = if s.hook == Hook::FROM_WORKLOAD { Direction::EGRESS } else { Direction::INGRESS };
    s.judgement = Judgement { direction, ..Judgement::default() };
    s.parsed = Parsed::default();
    if packet.tagged() {
        // At the network it is for the VLAN's own device. A workload's tag would go out with the packet,
        // into a network that the node is in and the workload is not.
        return match s.hook {
            Hook::FROM_NETWORK | Hook::TO_NETWORK => Ok(Next::Done(Packed::CONTINUE)),
            _ => Err(DropReason::UNSUPPORTED_L2.into()),
        };
    }
    if s.hook == Hook::FROM_NETWORK && (!packet.is_for_us() || is_for_other(packet, tables)) {
        // Another's: seen because the device listens to all, or broadcast.
        return Ok(Next::Done(Packed::CONTINUE));
    }
    packet.pull(PULL);
    if let Err(reason) = parse_network(packet, &mut s.parsed) {
        return unreadable(tables, s, reason);
    }
    if s.hook == Hook::FROM_NETWORK && !P::RAW {
        dsr::unwrap(packet, tables, s)?;
    }
    if s.parsed.class == Class::Flow && s.parsed.tuple.src.is_v4() && s.parsed.l4 >= wire::L3 + 28 {
        dsr::read_option(packet, tables, s, wire::L3 + 20);
    }
    Ok(Next::Go)
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
        _ if s.is_unwrapped() => return Err(DropReason::UNSUPPORTED_DSR.into()),
        _ => return Ok(Next::Done(Packed::CONTINUE)),
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
    let backend = if s.served.backend != 0 { s.served.backend } else { s.current().backend };
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
    event.backend = backend;
    tables.emit(event);
    Ok(Next::Go)
}

/// Whether a segment asks for a new connection.
#[inline(always)]
pub(crate) const fn is_syn(parsed: &Parsed) -> bool {
    parsed.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
}
