//! Connections: finding one, drafting its two recipes, and its states.
//!
//! A connection lives in the pending table until both sides have spoken for it (TCP: until the
//! opener's ACK), then moves to the flow table. What can be forged in bulk thus never evicts what
//! is established.

use cirri_abi::{
    Action, Addr, CounterIndex, DropReason, EventKind, Hook, Identity, Recipe, State, Tick, Tuple, epoch, epoch_slot,
    node_flag, proto, recipe_flag,
};

use crate::{
    door, epochs,
    parse::remember_ports,
    place::{Place, PlaceKind, is_behind, is_disputed, is_peer, peer_identity},
    service::{self, Served},
    slow::{Current, Next, Outcome, Scratch, is_syn},
    traits::{Flow, NextHop, Packet, Table, Tables},
    translate::vacate,
    wire::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};

/// Finds the packet's connection. [`Next::Carry`]: it is there, and `old` holds its recipe, which
/// must be renewed first if `stale` is set; [`Next::Go`]: the packet belongs to none.
#[inline(always)]
pub(crate) fn meet<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch) -> Outcome {
    s.pending = false;
    let flow = match tables.flow(Table::Flows, &s.parsed.tuple) {
        Some(flow) => flow,
        None => {
            s.pending = true;
            match tables.flow(Table::Pending, &s.parsed.tuple) {
                Some(flow) => flow,
                None => return Ok(Next::Go),
            }
        }
    };
    flow.copy_to(&mut s.old);
    if s.pending && s.old.state == State::NEW && s.old.flags & (recipe_flag::REPLY | recipe_flag::ONE_WAY) == 0 {
        // Without the entry for its answers, which may have been evicted, they would be strangers.
        let answer = s.parsed.tuple.opposite(&s.old);
        if tables.flow(Table::Pending, &answer).is_none() && tables.flow(Table::Flows, &answer).is_none() {
            return Ok(Next::Go);
        }
    }
    s.replaces = !s.pending;
    // From the overlay another identity than expected is news about the sender, not a stranger.
    let same = door(s.hook, packet) == s.old.door;
    if s.old.hook != s.hook || (!same && !is_known_sender(packet, tables, s)) {
        return Ok(Next::Go);
    }
    let syn = is_syn(&s.parsed);
    // A request with the identifier 0 has the tuple of an answer.
    let echo = s.parsed.tuple.proto != proto::TCP && matches!(s.parsed.icmp[0], ECHO_REQUEST | ECHO_REQUEST_V6);
    if (syn || echo) && s.old.flags & recipe_flag::REPLY != 0 {
        // The other side opens a connection of its own with the same ports.
        return Ok(Next::Go);
    }
    let may_go = s.pending || s.old.state == State::CLOSING || s.old.flags & recipe_flag::HALF != 0;
    if syn && s.option_addr != Addr::UNSPECIFIED && may_go {
        // The client may be at another service by now. What came without an option is not ended by one.
        return Ok(Next::Go);
    }
    // A service would choose anew, and break what lives: there the old one must be over. Else the receiver
    // answers as RFC 5961 has it.
    s.reopened = syn && if s.old.backend != 0 { s.old.state == State::CLOSING } else { !s.pending };
    s.foreign = !same && !syn && is_foreign(packet, tables, s);
    let other_sender = !same && !s.foreign;
    let now = epochs(tables, &s.old.slots);
    s.stale = s.reopened || other_sender || now != s.old.epoch;
    s.current = Current::Old;
    if s.stale && !keeps_backend(tables, s) {
        return Ok(Next::Go);
    }
    // In the middle of a change it would be judged by halves. It stays stale in its table. One that was stale
    // before may be closed since, and so may one whose sender is somebody else by now.
    let held = !s.reopened && !other_sender && epoch::held_before(s.old.epoch, now);
    s.stale = s.stale && !(held && is_being_written(tables));
    s.from.identity = s.old.src_identity;
    s.to.identity = s.old.dst_identity;
    Ok(Next::Carry)
}

/// Whether the connection stays with the backend that its service gave it. If not, it begins anew, with
/// another; what its old one still answers goes its way.
#[inline(always)]
fn keeps_backend<T: Tables>(tables: &T, s: &mut Scratch) -> bool {
    if s.old.backend == 0 || s.old.flags & recipe_flag::REPLY != 0 {
        return true;
    }
    // Who asks for a connection has no stream there. Its last one may even have lost its end, if that came
    // when the backend was gone already.
    let protocol = if is_syn(&s.parsed) { proto::UDP } else { s.parsed.tuple.proto };
    let (to, port) = (s.old.destination, s.old.destination_port);
    let kept = !s.reopened
        && if is_syn(&s.parsed) && s.pending && s.old.state == State::NEW {
            // Nothing was answered: it may have been refused where this node does not see it, and the next client has
            // the port.
            service::takes_new(tables, s.old.backend, &to, port)
        } else {
            service::is_kept(tables, s.old.backend, &to, port, protocol)
        };
    if !kept {
        let answer = s.parsed.tuple.opposite(&s.old);
        let table = if s.pending { Table::Pending } else { Table::Flows };
        tables.remove(table, &s.parsed.tuple);
        tables.remove(table, &answer);
        s.replaces = false;
        s.reopened = false;
        s.stale = false;
        s.current = Current::Forward;
    }
    kept
}

/// Whether the node that lives there vouches for a sender from the overlay.
#[inline(always)]
fn is_known_sender<P: Packet, T: Tables>(packet: &P, tables: &T, s: &Scratch) -> bool {
    if s.hook != Hook::FROM_OVERLAY {
        return false;
    }
    match (packet.tunnel_key(), tables.ipcache(&s.parsed.tuple.src)) {
        (Some(key), Some(entry)) => is_behind(entry, &key) && key.vni != Identity::UNKNOWN.id,
        _ => false,
    }
}

/// Whether a known sender has an identity that the rules here were made without. They cannot judge it, so
/// its connections stay with what was said of it before: those of the same node, and no new ones.
#[inline(always)]
fn is_foreign<P: Packet, T: Tables>(packet: &P, tables: &T, s: &Scratch) -> bool {
    let (Some(key), Some(entry)) = (packet.tunnel_key(), tables.ipcache(&s.parsed.tuple.src)) else {
        return false;
    };
    let sender = if s.old.flags & recipe_flag::REPLY != 0 { s.old.slots[1] } else { s.old.slots[0] };
    entry.slot == sender && key.vni >= Identity::MIN_ALLOCATED && !tables.knows_identity(key.vni)
}

/// Whether user space is changing what decisions rest on, and lives.
#[inline(always)]
fn is_being_written<T: Tables>(tables: &T) -> bool {
    let since = tables.epoch(epoch_slot::WRITING);
    since != 0 && tables.now().count.wrapping_sub(since) < WRITING_TICKS
}

/// Ticks without a sign of life after which nobody is writing any more.
const WRITING_TICKS: u32 = 2;

/// Before policy is asked again for a connection that something it rests on has changed for, or
/// whose opener begins anew: both tuples, whichever of the two this packet has, and both ends.
#[inline(always)]
pub(crate) fn revisit<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch) -> Outcome {
    let reply = s.old.flags & recipe_flag::REPLY != 0;
    if reply {
        s.opener = s.parsed.tuple.opposite(&s.old);
        s.answer = s.parsed.tuple;
        (s.from.identity, s.to.identity) = (s.old.dst_identity, s.old.src_identity);
    } else {
        s.opener = s.parsed.tuple;
        s.answer = s.parsed.tuple.opposite(&s.old);
    }
    s.translated = s.answer.turned();
    s.translated.src = s.opener.src;
    s.translated.sport = s.opener.sport;
    if s.old.action == Action::IPIP {
        s.translated.dst = s.old.destination;
        s.translated.dport = s.old.destination_port;
    }
    s.served = Served { backend: s.old.backend, slot: s.old.slots[2], ..Served::default() };
    s.from.set_address(tables, &s.opener.src)?;
    s.to.set_address(tables, &s.translated.dst)?;
    if s.hook == Hook::FROM_OVERLAY
        && let Some(key) = packet.tunnel_key()
    {
        let sender = if reply { &mut s.to } else { &mut s.from };
        let known = sender.identity;
        if !s.foreign {
            sender.identity = peer_identity(key.vni);
        } else if !tables.knows_identity(known.id) {
            // Its address has the new one already. Else it may be one that was refused after who opened it.
            sender.identity = s.old.src_identity;
        }
        s.disputed = is_disputed(sender.identity, known);
    }
    snapshot(tables, s);
    s.icmp_type = if s.opener.proto == proto::ICMPV6 { ECHO_REQUEST_V6 } else { ECHO_REQUEST };
    Ok(Next::Go)
}

/// Policy still allows it: new recipes in place of the old, with the bindings and counters of these.
#[inline(always)]
pub(crate) fn replace<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch) -> Outcome {
    let table = if s.pending { Table::Pending } else { Table::Flows };
    let reply = s.old.flags & recipe_flag::REPLY != 0;
    let (own, other) = if reply { (&mut s.reverse, &mut s.forward) } else { (&mut s.forward, &mut s.reverse) };
    keep(own, &s.old, s.reopened);
    // A foreign sender is looked at with every packet, until it is known.
    through(own, s.hook, if s.foreign { s.old.door } else { door(s.hook, packet) });
    let kind = if s.reopened {
        EventKind::NEW
    } else if s.disputed && own.door == s.old.door {
        // It is renewed with every packet.
        0
    } else {
        EventKind::RENEWED
    };
    if own.flags & recipe_flag::ONE_WAY != 0 {
        tables.insert(table, &s.opener, own, false);
        tables.count(CounterIndex::RENEWED, packet.length());
        s.current = Current::Forward;
        s.event.kind = kind;
        return Ok(Next::Go);
    }
    let opposite_tuple = if reply { &s.opener } else { &s.answer };
    let opposite = match tables.flow(table, opposite_tuple) {
        Some(opposite) if is_answered_by(opposite_tuple, opposite.recipe(), &s.parsed.tuple) => opposite,
        _ => {
            // Half of the pair was evicted, and perhaps another connection has its place. Begin again:
            // the opener's next packet writes both.
            tables.remove(table, &s.parsed.tuple);
            return Err(DropReason::UNKNOWN_STATE.into());
        }
    };
    keep(other, opposite.recipe(), s.reopened);
    if reply && other.hook != opposite.recipe().hook {
        // The opener's packets may come through another door than its place says.
        through(other, opposite.recipe().hook, opposite.recipe().door);
    }
    tables.insert(table, &s.opener, &s.forward, false);
    tables.insert(table, &s.answer, &s.reverse, false);
    tables.count(CounterIndex::RENEWED, packet.length());
    s.current = if reply { Current::Reverse } else { Current::Forward };
    s.event.kind = kind;
    Ok(Next::Go)
}

/// The only ICMP that opens a connection and can be answered.
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;

/// Whether packets of `other` are the answers to those of `tuple`, which obey `recipe`.
#[inline(always)]
fn is_answered_by(tuple: &Tuple, recipe: &Recipe, other: &Tuple) -> bool {
    tuple.opposite(recipe) == *other
}

/// Sets where a recipe's packets come in.
#[inline(always)]
fn through(recipe: &mut Recipe, hook: u8, door: u32) {
    recipe.hook = hook;
    recipe.door = door;
    if hook == Hook::TO_WORKLOAD {
        recipe.action = Action::CONTINUE;
    }
}

/// Flags that a connection keeps for as long as it lives.
const BOUND: u8 = recipe_flag::ONE_WAY | recipe_flag::DSR_OPTION | recipe_flag::HALF | recipe_flag::SERVED;

/// Takes over from the recipe that a new one replaces.
#[inline(always)]
fn keep(new: &mut Recipe, old: &Recipe, reopened: bool) {
    new.rewrite = old.rewrite;
    new.source = old.source;
    new.source_port = old.source_port;
    new.destination = old.destination;
    new.destination_port = old.destination_port;
    new.backend = old.backend;
    new.flags |= old.flags & BOUND;
    if old.action == Action::IPIP {
        new.action = Action::IPIP;
    }
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

/// Notes the epochs that the decision will rest on. Must come before policy is asked: what changes
/// after this makes the recipe stale, not wrong.
///
/// The slots follow from the places, which were asked for before. If any of these changed meanwhile,
/// the recipe is stale from the beginning.
#[inline(always)]
pub(crate) fn snapshot<T: Tables>(tables: &T, s: &mut Scratch) {
    s.slots = [s.from.slot, s.to.slot, s.served.slot];
    s.epoch = epochs(tables, &s.slots);
    // A backend that was taken away since it was chosen stands there as absent before the epoch moves.
    let chosen = s.served.backend;
    let held = chosen == 0
        || service::is_kept(
            tables,
            chosen,
            &s.translated.dst,
            s.translated.dport,
            if s.stale { s.opener.proto } else { 0 },
        );
    // With a disputed sender each direction asks for itself: what one says must not hold for the other.
    if !held || s.disputed || tables.epoch(epoch_slot::PLACES) != s.places {
        s.epoch = s.epoch.wrapping_sub(epoch::STEP);
    }
}

/// Drafts both directions' recipes from what is in the scratch. No rewrite yet.
#[inline(always)]
pub(crate) fn draft<T: Tables>(tables: &T, s: &mut Scratch) -> Result<(), DropReason> {
    let tunnel = match tables.node() {
        Some(node) if node.flags & node_flag::TUNNEL != 0 => node.overlay_ifindex,
        Some(_) => 0,
        None => return Err(DropReason::NO_CONFIG),
    };
    let now = tables.now();
    let asked = asked_by_network(s);
    let opener = if is_by_network(tables, &s.from, &s.opener.src, &s.to, asked) { 0 } else { tunnel };
    let other = if is_by_network(tables, &s.to, &s.translated.dst, &s.from, false) { 0 } else { tunnel };
    direction(tables, &s.from, &s.to, &s.translated, [opener, other], now, &mut s.forward)?;
    direction(tables, &s.to, &s.from, &s.translated.turned(), [other, opener], now, &mut s.reverse)?;
    s.reverse.flags = recipe_flag::REPLY;
    for recipe in [&mut s.forward, &mut s.reverse] {
        recipe.slots = s.slots;
        recipe.epoch = s.epoch;
        recipe.egress_cookie = s.judgement.egress_cookie;
        recipe.ingress_cookie = s.judgement.ingress_cookie;
    }
    Ok(())
}

/// The recipe of packets from `from` to `to`: where they come in, where they go. `overlay` is the device
/// that each of them is behind, 0 for the network.
#[inline(always)]
fn direction<T: Tables>(
    tables: &T,
    from: &Place,
    to: &Place,
    tuple: &Tuple,
    overlay: [u32; 2],
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
        PlaceKind::Host if to.kind == PlaceKind::Local => (Hook::TO_WORKLOAD, to.ifindex),
        PlaceKind::Host => (Hook::TO_NETWORK, 0),
        PlaceKind::Remote if overlay[0] != 0 => (Hook::FROM_OVERLAY, from.identity.id),
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
        PlaceKind::Remote if overlay[1] != 0 => {
            recipe.action = Action::TUNNEL;
            if from.kind == PlaceKind::Local {
                recipe.src_identity = from.tunnel_identity;
            }
            recipe.out = overlay[1];
            recipe.peer = to.peer;
        }
        PlaceKind::Remote | PlaceKind::World => {
            if recipe.hook == Hook::TO_NETWORK {
                // The stack has routed it.
                recipe.action = Action::CONTINUE;
                return Ok(());
            }
            let Some(NextHop { ifindex, peer, mac, own_mac, mtu }) = tables.route(tuple) else {
                return Err(DropReason::FIB_FAILED);
            };
            recipe.action = Action::DEVICE;
            recipe.out = ifindex;
            recipe.peer = peer;
            recipe.mac = mac;
            recipe.own_mac = own_mac;
            recipe.mtu = mtu;
        }
    }
    Ok(())
}

/// Whether another node itself is met by the network and not through the overlay: it sends to addresses of
/// nodes and of the outside by the network, and looks for their packets there. Only at its own address: it
/// may send in the name of a node from any other, through the overlay.
#[inline(always)]
fn is_by_network<T: Tables>(tables: &T, node: &Place, addr: &Addr, other: &Place, asked: bool) -> bool {
    node.identity.id == Identity::REMOTE_NODE.id && (asked || other.kind != PlaceKind::Local) && is_peer(tables, addr)
}

/// Whether the opener has asked for a service at an address that leads by the network: it knows nothing of
/// the backend behind that.
#[inline(always)]
fn asked_by_network(s: &Scratch) -> bool {
    if s.stale && s.old.flags & recipe_flag::REPLY != 0 {
        return s.old.backend != 0 && s.old.action == Action::DEVICE;
    }
    s.hook == Hook::FROM_NETWORK && (s.served.yes || s.served.backend != 0)
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
    let answered = s.claimed || s.forward.flags & recipe_flag::ONE_WAY != 0;
    if !answered {
        // One that is over, perhaps of a service with the same backend, would answer in its own name.
        vacate(tables, s, Table::Flows, |recipe, _| recipe.state == State::CLOSING);
    }
    if (!answered && !tables.insert(Table::Pending, &s.answer, &s.reverse, false))
        || !tables.insert(Table::Pending, &s.opener, &s.forward, false)
    {
        return Err(DropReason::FLOW_INSERT_FAILED.into());
    }
    if s.served.backend != 0 {
        tables.count_connection(s.served.backend);
        tables.count_backend(s.served.backend, false, packet.length());
    }
    remember_ports(tables, &s.parsed);
    Ok(Next::Go)
}

/// Counts the packet and moves its connection's state on.
#[inline(always)]
pub(crate) fn advance<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch) -> Outcome {
    let table = if s.pending { Table::Pending } else { Table::Flows };
    let tuple = &s.parsed.tuple;
    let Some(flow) = tables.flow(table, tuple) else {
        return Ok(Next::Go);
    };
    flow.touch(tables.now(), packet.length());
    remember_ports(tables, &s.parsed);
    if s.current().flags & recipe_flag::ONE_WAY != 0 {
        return advance_one_way(packet, tables, s, &flow);
    }
    let recipe = s.current();
    if recipe.backend != 0 {
        tables.count_backend(recipe.backend, recipe.flags & recipe_flag::REPLY != 0, packet.length());
    }
    let flags = s.parsed.tcp_flags;
    let reply = recipe.flags & recipe_flag::REPLY != 0;
    let tcp = tuple.proto == proto::TCP;
    let answered = s.pending && tcp && reply && recipe.state == State::NEW;
    let complete = s.pending
        && if tcp { !reply && recipe.state == State::REPLIED && flags & (TCP_ACK | TCP_SYN) == TCP_ACK } else { reply };
    let closing = flags & (TCP_FIN | TCP_RST) != 0;
    if !answered && !complete && !closing {
        return Ok(Next::Go);
    }
    let first_close = closing && recipe.tcp_flags & (TCP_FIN | TCP_RST) == 0;
    s.answer = tuple.opposite(recipe);
    if s.pending && flags & TCP_RST != 0 {
        tables.remove(Table::Pending, tuple);
        tables.remove(Table::Pending, &s.answer);
        return Ok(Next::Go);
    }
    let Some(opposite) = tables.flow(table, &s.answer) else {
        return Ok(Next::Go);
    };
    if answered {
        flow.set_state(State::REPLIED, flags);
        opposite.set_state(State::REPLIED, 0);
    } else if complete {
        // Both sides have spoken: from the pending table to the flow table.
        opposite.set_state(State::ESTABLISHED, 0);
        flow.set_state(if closing { State::CLOSING } else { State::ESTABLISHED }, flags);
        if tables.promote(&s.answer, &opposite, &mut s.spare) && tables.promote(&s.parsed.tuple, &flow, &mut s.spare) {
            tables.remove(Table::Pending, tuple);
            tables.remove(Table::Pending, &s.answer);
            tables.count(CounterIndex::PROMOTED, packet.length());
        }
    } else {
        flow.set_state(State::CLOSING, flags);
        if flags & TCP_RST != 0 {
            opposite.set_state(State::CLOSING, TCP_RST);
        }
        if first_close {
            s.event.kind = EventKind::CLOSE;
        }
    }
    Ok(Next::Go)
}

/// Ticks that a connection whose answers take another way stays among the unfinished. A flood of forged
/// ones drives itself out of their table meanwhile.
const ONE_WAY_AGE: u32 = 2;

/// A connection whose answers take another way counts as established when its opener has sent what it
/// sends only with an answer in hand (a stream of datagrams, a second), and has lasted a second.
#[inline(always)]
fn advance_one_way<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch, flow: &T::Flow) -> Outcome {
    let recipe = s.current();
    let flags = s.parsed.tcp_flags;
    let tcp = s.parsed.tuple.proto == proto::TCP;
    let closing = flags & (TCP_FIN | TCP_RST) != 0;
    tables.count_backend(recipe.backend, false, packet.length());
    let first_close = closing && recipe.tcp_flags & (TCP_FIN | TCP_RST) == 0;
    // Anybody can send two packets: what evicts others' connections must have lasted.
    let lasts = tables.now().count.wrapping_sub(recipe.since.count) >= ONE_WAY_AGE;
    if s.pending && lasts && !(tcp && flags & TCP_SYN != 0) {
        flow.set_state(if closing { State::CLOSING } else { State::ESTABLISHED }, flags);
        if tables.promote(&s.parsed.tuple, flow, &mut s.spare) {
            tables.remove(Table::Pending, &s.parsed.tuple);
            tables.count(CounterIndex::PROMOTED, packet.length());
        }
    } else if closing {
        flow.set_state(State::CLOSING, flags);
        if first_close {
            s.event.kind = EventKind::CLOSE;
        }
    }
    Ok(Next::Go)
}
