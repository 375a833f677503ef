//! Connections: finding one, drafting its two recipes, and its states.
//!
//! A connection lives in the pending table until both sides have spoken for it (TCP: until the
//! opener's ACK), then moves to the flow table. What can be forged in bulk thus never evicts what
//! is established.

use cirri_abi::{
    Action, CounterIndex, DropReason, EventKind, Hook, Recipe, State, Tick, Tuple, node_flag, proto, recipe_flag,
};

use crate::{
    door, epochs,
    place::{Place, PlaceKind, peer_identity},
    policy::judge,
    slow::{Next, Outcome, Scratch, Stage, is_syn},
    traits::{Flow, NextHop, Packet, Table, Tables},
    wire::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};

/// Finds the packet's connection and moves its state on. [`Next::Carry`]: it holds; [`Next::Go`]:
/// the packet belongs to none.
#[inline(always)]
pub(crate) fn meet<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    let (pending, flow) = match tables.flow(Table::Flows, &s.parsed.tuple) {
        Some(flow) => (false, flow),
        None => match tables.flow(Table::Pending, &s.parsed.tuple) {
            Some(flow) => (true, flow),
            None => return Ok(Next::Go),
        },
    };
    flow.copy_to(&mut s.old);
    s.pending = pending;
    s.replaces = !pending;
    let door = door(s.hook, packet);
    // From the overlay another identity than expected is news about the sender, not a stranger.
    if s.old.hook != s.hook || (door != Some(s.old.door) && s.hook != Hook::FROM_OVERLAY) {
        return Ok(Next::Go);
    }
    let syn = is_syn(&s.parsed);
    if syn && s.old.flags & recipe_flag::REPLY != 0 {
        // The other side opens a connection of its own with the same ports.
        return Ok(Next::Go);
    }
    let holds = door == Some(s.old.door) && epochs(tables, &s.old.slots) == s.old.epoch;
    if holds && !(syn && !pending) {
        s.forward = s.old;
        s.from.identity = s.old.src_identity;
        s.to.identity = s.old.dst_identity;
    } else {
        tables.stage(Stage::Renew, packet, s)?;
    }
    flow.touch(tables.now(), packet.length());
    advance(packet, tables, s, &flow);
    if s.event.kind == EventKind::CLOSE {
        tables.stage(Stage::Report, packet, s)?;
    }
    Ok(Next::Carry)
}

/// Asks policy again for a connection that something it rests on has changed for, or whose opener
/// begins anew. Keeps the bindings, and both directions' counters.
#[inline(always)]
pub(crate) fn renew<P: Packet, T: Tables>(packet: &mut P, tables: &T, s: &mut Scratch) -> Outcome {
    let table = if s.pending { Table::Pending } else { Table::Flows };
    let reply = s.old.flags & recipe_flag::REPLY != 0;
    let reopened = is_syn(&s.parsed) && !s.pending;
    // The opener's tuple and the answers', whichever of the two this packet has.
    s.opener = s.parsed.tuple;
    s.answer = s.parsed.tuple.rewritten(&s.old).turned();
    if reply {
        core::mem::swap(&mut s.opener, &mut s.answer);
    }
    let answer = s.answer;
    if let Err(reason) = rejudge(packet, tables, s, reply) {
        tables.remove(table, &s.opener);
        tables.remove(table, &answer);
        s.forward.flags = s.old.flags;
        return Err(reason.into());
    }
    s.answer = answer;
    let other = if reply { &s.opener } else { &s.answer };
    let Some(opposite) = tables.flow(table, other) else {
        // Half of the pair was evicted. Begin again: the opener's next packet writes both.
        tables.remove(table, &s.parsed.tuple);
        return Err(DropReason::UNKNOWN_STATE.into());
    };
    let kept = if reply { &mut s.reverse } else { &mut s.forward };
    keep(kept, &s.old, reopened);
    if let Some(door) = door(s.hook, packet) {
        kept.door = door;
    }
    opposite.copy_to(&mut s.old);
    keep(if reply { &mut s.forward } else { &mut s.reverse }, &s.old, reopened);
    tables.insert(table, &s.opener, &s.forward, false);
    tables.insert(table, &s.answer, &s.reverse, false);
    tables.count(CounterIndex::RENEWED, packet.length());
    if reply {
        s.forward = s.reverse;
    }
    s.old = s.forward;
    s.event.kind = if reopened { EventKind::NEW } else { EventKind::RENEWED };
    tables.stage(Stage::Report, packet, s)
}

#[inline(always)]
fn rejudge<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch, reply: bool) -> Result<(), DropReason> {
    s.from.set_address(tables, &s.opener.src)?;
    s.to.set_address(tables, &s.opener.dst)?;
    if s.hook == Hook::FROM_OVERLAY
        && let Some(key) = packet.tunnel_key()
    {
        let sender = if reply { &mut s.to } else { &mut s.from };
        sender.identity = peer_identity(key.vni);
    }
    snapshot(tables, s);
    let echo = if s.opener.proto == proto::ICMPV6 { ECHO_REQUEST_V6 } else { ECHO_REQUEST };
    judge(tables, &s.from, &s.to, &s.opener, echo, &mut s.judgement)?;
    draft(tables, s)
}

/// The only ICMP that opens a connection and can be answered.
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;

/// Takes over from the recipe that a new one replaces.
#[inline(always)]
fn keep(new: &mut Recipe, old: &Recipe, reopened: bool) {
    new.hook = old.hook;
    new.door = old.door;
    if old.hook == Hook::TO_WORKLOAD {
        new.action = Action::CONTINUE;
    }
    new.rewrite = old.rewrite;
    new.address = old.address;
    new.port = old.port;
    new.csum_delta = old.csum_delta;
    new.state = old.state;
    if reopened {
        new.state = State::ESTABLISHED;
        return;
    }
    new.tcp_flags = old.tcp_flags;
    new.packets = old.packets;
    new.bytes = old.bytes;
    new.since = old.since;
}

/// Notes the epochs that the decision will rest on. Must come before policy and places are asked:
/// what changes after this makes the recipe stale, not wrong.
#[inline(always)]
pub(crate) fn snapshot<T: Tables>(tables: &T, s: &mut Scratch) {
    s.slots = [s.from.slot, s.to.slot, 0];
    s.epoch = epochs(tables, &s.slots);
}

/// Drafts both directions' recipes from what is in the scratch. No rewrite yet.
#[inline(always)]
pub(crate) fn draft<T: Tables>(tables: &T, s: &mut Scratch) -> Result<(), DropReason> {
    s.answer = s.opener.turned();
    let tunnel = match tables.node() {
        Some(node) if node.flags & node_flag::TUNNEL != 0 => node.overlay_ifindex,
        Some(_) => 0,
        None => return Err(DropReason::NO_CONFIG),
    };
    let now = tables.now();
    direction(tables, &s.from, &s.to, &s.opener, tunnel, now, &mut s.forward)?;
    direction(tables, &s.to, &s.from, &s.answer, tunnel, now, &mut s.reverse)?;
    s.reverse.flags = recipe_flag::REPLY;
    for recipe in [&mut s.forward, &mut s.reverse] {
        recipe.slots = s.slots;
        recipe.epoch = s.epoch;
        recipe.egress_cookie = s.judgement.egress_cookie;
        recipe.ingress_cookie = s.judgement.ingress_cookie;
    }
    Ok(())
}

/// The recipe of packets from `from` to `to`: where they come in, where they go.
#[inline(always)]
fn direction<T: Tables>(
    tables: &T,
    from: &Place,
    to: &Place,
    tuple: &Tuple,
    overlay: u32,
    now: Tick,
    recipe: &mut Recipe,
) -> Result<(), DropReason> {
    *recipe = Recipe::default();
    recipe.src_identity = from.identity;
    recipe.dst_identity = to.identity;
    recipe.last_seen = now;
    recipe.since = now;
    (recipe.hook, recipe.door) = match from.kind {
        PlaceKind::Local => (Hook::FROM_WORKLOAD, from.ifindex),
        PlaceKind::Host => (Hook::TO_WORKLOAD, to.ifindex),
        PlaceKind::Remote if overlay != 0 => (Hook::FROM_OVERLAY, from.identity.id),
        PlaceKind::Remote | PlaceKind::World => (Hook::FROM_NETWORK, 0),
    };
    match to.kind {
        PlaceKind::Local if recipe.hook == Hook::TO_WORKLOAD => recipe.action = Action::CONTINUE,
        PlaceKind::Local => {
            recipe.action = Action::LOCAL;
            recipe.out = to.ifindex;
            recipe.mac = to.mac;
        }
        PlaceKind::Host => recipe.action = Action::CONTINUE,
        PlaceKind::Remote if overlay != 0 => {
            recipe.action = Action::TUNNEL;
            recipe.out = overlay;
            recipe.peer = to.peer;
        }
        PlaceKind::Remote | PlaceKind::World => {
            let Some(NextHop { ifindex, peer }) = tables.route(tuple) else {
                return Err(DropReason::FIB_FAILED);
            };
            recipe.action = Action::DEVICE;
            recipe.out = ifindex;
            recipe.peer = peer;
        }
    }
    Ok(())
}

/// Writes the recipes of a new connection and counts its first packet.
#[inline(always)]
pub(crate) fn write<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch) -> Outcome {
    if s.replaces {
        tables.remove(Table::Flows, &s.opener);
        tables.remove(Table::Flows, &s.answer);
    }
    s.forward.packets = 1;
    s.forward.bytes = packet.length() as u64;
    s.forward.tcp_flags = s.parsed.tcp_flags;
    if !tables.insert(Table::Pending, &s.answer, &s.reverse, false)
        || !tables.insert(Table::Pending, &s.opener, &s.forward, false)
    {
        return Err(DropReason::FLOW_INSERT_FAILED.into());
    }
    Ok(Next::Go)
}

/// Moves a connection's state on by one of its packets, whose recipe stands in `forward`.
#[inline(always)]
fn advance<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch, flow: &T::Flow) {
    s.event.kind = 0;
    let tuple = &s.parsed.tuple;
    let flags = s.parsed.tcp_flags;
    let reply = s.forward.flags & recipe_flag::REPLY != 0;
    let tcp = tuple.proto == proto::TCP;
    if !s.pending {
        if flags & (TCP_FIN | TCP_RST) == 0 {
            return;
        }
        if s.forward.tcp_flags & (TCP_FIN | TCP_RST) == 0 {
            s.event.kind = EventKind::CLOSE;
        }
        flow.set_state(State::CLOSING, flags);
        if flags & TCP_RST != 0 {
            s.answer = tuple.rewritten(&s.forward).turned();
            if let Some(opposite) = tables.flow(Table::Flows, &s.answer) {
                opposite.set_state(State::CLOSING, TCP_RST);
            }
        }
        return;
    }
    let answered = tcp && reply && s.forward.state == State::NEW;
    let complete = if tcp {
        !reply && s.forward.state == State::REPLIED && flags & (TCP_ACK | TCP_SYN) == TCP_ACK
    } else {
        reply
    };
    if !answered && !complete && flags & TCP_RST == 0 {
        return;
    }
    s.answer = tuple.rewritten(&s.forward).turned();
    if flags & TCP_RST != 0 {
        tables.remove(Table::Pending, tuple);
        tables.remove(Table::Pending, &s.answer);
        return;
    }
    let Some(opposite) = tables.flow(Table::Pending, &s.answer) else {
        return;
    };
    if answered {
        flow.set_state(State::REPLIED, flags);
        opposite.set_state(State::REPLIED, 0);
        return;
    }
    // Both sides have spoken: from the pending table to the flow table.
    opposite.set_state(State::ESTABLISHED, 0);
    flow.set_state(if flags & TCP_FIN != 0 { State::CLOSING } else { State::ESTABLISHED }, flags);
    if tables.promote(&s.answer, &opposite) && tables.promote(tuple, flow) {
        tables.remove(Table::Pending, tuple);
        tables.remove(Table::Pending, &s.answer);
        tables.count(CounterIndex::PROMOTED, packet.length());
    }
}
