//! What becomes of a new connection's addresses: a service's backend, masquerade, direct return.

use cirri_abi::{
    Action, Addr, DropReason, Forwarding, GATEWAY_V4, GATEWAY_V6, Hook, Identity, NodeConfig, Port, Recipe, Rewrite,
    State, Tuple, VXLAN_PORT, node_flag, proto, recipe_flag,
};

use crate::{
    carry::tuple_difference,
    place::PlaceKind,
    service::flow_hash,
    slow::{Next, Outcome, Scratch},
    traits::{Flow, Table, Tables},
};

/// Whether what is `addressed` to this node's address and that port is the node's own business: no
/// answer to a translated connection, and for no service.
#[inline(always)]
pub(crate) fn is_for_node<T: Tables>(tables: &T, addressed: impl FnOnce(&NodeConfig) -> bool, port: Port) -> bool {
    match tables.node() {
        Some(node) if addressed(node) => {
            port.number().wrapping_sub(node.masquerade_first.number()) > node.masquerade_mask && !tables.node_port(port)
        }
        _ => false,
    }
}

/// The stage: puts the rewrites into both drafts, and claims a source port where one is needed.
/// [`Next::Carry`]: none was found.
#[inline(always)]
pub(crate) fn translate<T: Tables>(tables: &T, s: &mut Scratch) -> Outcome {
    if s.served.yes {
        let alone = match tables.node() {
            Some(node) => node.flags & node_flag::ALONE != 0,
            None => false,
        };
        if is_returned_directly(s, alone) {
            return_directly(s);
            return Ok(Next::Go);
        }
        if s.served.backend != 0 {
            s.forward.backend = s.served.backend;
            s.reverse.backend = s.served.backend;
            s.forward.flags |= recipe_flag::SERVED;
            s.reverse.flags |= recipe_flag::SERVED;
        }
        s.forward.rewrite = Rewrite::DESTINATION;
        s.forward.destination = s.translated.dst;
        s.forward.destination_port = s.translated.dport;
        s.reverse.rewrite = Rewrite::SOURCE;
        s.reverse.source = s.opener.dst;
        s.reverse.source_port = s.opener.dport;
        if s.hook == Hook::FROM_OVERLAY {
            // The client asked the node, and has the node answer.
            s.reverse.src_identity = Identity::HOST;
        }
    } else if s.option_addr != Addr::UNSPECIFIED && s.from.kind == PlaceKind::World {
        s.forward.flags |= recipe_flag::HALF;
        s.reverse.flags |= recipe_flag::HALF;
        s.reverse.rewrite = Rewrite::SOURCE;
        s.reverse.source = s.option_addr;
        s.reverse.source_port = s.option_port;
    }
    if s.opener.proto == proto::SCTP && (s.served.yes && s.translated.dport != s.opener.dport) {
        // Its checksum covers the ports, and is none that could be adjusted.
        return Err(DropReason::MASQUERADE_UNSUPPORTED.into());
    }
    if let Some(source) = wanted_source(tables, s)? {
        return bind(tables, s, &source);
    }
    s.forward.csum_delta = tuple_difference(&s.opener, &s.opener.rewritten(&s.forward));
    s.reverse.csum_delta = tuple_difference(&s.answer, &s.answer.rewritten(&s.reverse));
    Ok(Next::Go)
}

/// Whether the backend's node answers the client itself. Of clients in the cluster it would believe no
/// option.
#[inline(always)]
fn is_returned_directly(s: &Scratch, alone: bool) -> bool {
    // A host outside the cluster knows nothing of it, unless this is a load balancer alone.
    let away = s.to.kind == PlaceKind::Remote || (s.to.kind == PlaceKind::World && alone);
    let possible = match s.served.forwarding {
        Forwarding::DSR_OPTION => true,
        Forwarding::DSR_IPIP => s.forward.action == Action::DEVICE,
        _ => false,
    };
    s.hook == Hook::FROM_NETWORK && s.from.kind == PlaceKind::World && away && possible
}

#[inline(always)]
fn return_directly(s: &mut Scratch) {
    s.forward.backend = s.served.backend;
    s.forward.flags |= recipe_flag::SERVED;
    s.forward.destination = s.translated.dst;
    s.forward.destination_port = s.translated.dport;
    if s.served.forwarding == Forwarding::DSR_IPIP {
        s.forward.action = Action::IPIP;
        s.forward.flags |= recipe_flag::ONE_WAY;
    } else {
        s.forward.rewrite = Rewrite::DESTINATION;
        s.forward.flags |= recipe_flag::ONE_WAY | recipe_flag::DSR_OPTION;
        s.forward.csum_delta = tuple_difference(&s.opener, &s.translated);
    }
}

/// Where a connection gets its source from.
struct Source {
    addr: Addr,
    first: u16,
    mask: u16,
    /// Its own port is as good as any, also outside the range; another only if it is taken.
    own: bool,
}

/// Whether this new connection may need another source than its own, and which.
#[inline(always)]
fn wanted_source<T: Tables>(tables: &T, s: &Scratch) -> Result<Option<Source>, DropReason> {
    let v4 = s.opener.src.is_v4();
    let Some(node) = tables.node() else {
        return Err(DropReason::NO_CONFIG);
    };
    let (first, mask) = (node.masquerade_first.number(), node.masquerade_mask);
    // Clients use one port towards several services and their backends at once, and these may have a backend in
    // common: then the second connection needs another port, or its answers would be taken for the first one's.
    let ports = matches!(s.opener.proto, proto::TCP | proto::UDP);
    let same = ports.then_some(Source { addr: s.opener.src, first, mask, own: true });
    if s.from.kind == PlaceKind::Local {
        if s.served.yes && s.to.kind == PlaceKind::Local && s.to.ifindex == s.from.ifindex {
            // It reaches itself: without another source it would answer itself directly.
            return Ok(Some(Source { addr: if v4 { GATEWAY_V4 } else { GATEWAY_V6 }, first, mask, own: true }));
        }
        let flag = if v4 { node_flag::MASQUERADE_V4 } else { node_flag::MASQUERADE_V6 };
        if s.to.kind != PlaceKind::World || s.to.plain || node.flags & flag == 0 {
            return Ok(same);
        }
    } else if !s.served.yes
        || !matches!(s.hook, Hook::FROM_NETWORK | Hook::FROM_OVERLAY)
        || !matches!(s.to.kind, PlaceKind::Remote | PlaceKind::World)
    {
        return Ok(same);
    }
    // The receiver may be a node, also by an address that nobody told us. From our node's own address it
    // would take this for the overlay's, whose VNI could then be any identity.
    if s.opener.proto == proto::UDP && s.translated.dport == Port::new(VXLAN_PORT) {
        return Err(DropReason::ENCAPSULATION_PROHIBITED);
    }
    let echo = s.parsed.icmp[0] == if v4 { 8 } else { 128 };
    match s.opener.proto {
        proto::TCP | proto::UDP => {}
        proto::ICMP | proto::ICMPV6 if echo => {}
        _ => return Err(DropReason::MASQUERADE_UNSUPPORTED),
    }
    if s.served.yes
        && s.served.pool != 0
        && let Some(pool) = tables.snat_pool(s.served.pool)
    {
        let addr = if v4 { pool.v4 } else { pool.v6 };
        return source(addr, pool.first.number(), pool.mask);
    }
    source(if v4 { node.v4 } else { node.v6 }, first, mask)
}

#[inline(always)]
fn source(addr: Addr, first: u16, mask: u16) -> Result<Option<Source>, DropReason> {
    if addr == Addr::UNSPECIFIED {
        return Err(DropReason::NO_MASQUERADE_PORT);
    }
    Ok(Some(Source { addr, first, mask, own: false }))
}

/// Ports tried before the connection is refused (Cilium's contract N1.8 tries as many).
const ATTEMPTS: u16 = 32;

/// Takes a port whose answers no other connection expects, and puts the rewrite into both recipes.
///
/// The answer's pending entry is the claim: it is inserted only if it is new, so two CPUs cannot
/// take the same port. Then the established are asked, in this order: a connection is in their table
/// before it leaves the pending one.
#[inline(always)]
fn bind<T: Tables>(tables: &T, s: &mut Scratch, source: &Source) -> Outcome {
    s.reverse.destination = s.opener.src;
    s.reverse.destination_port = s.opener.sport;
    s.forward.rewrite |= Rewrite::SOURCE;
    s.forward.source = source.addr;
    s.reverse.rewrite |= Rewrite::DESTINATION;
    s.answer.dst = source.addr;
    // Ports are in no difference of addresses, so these hold for every port.
    s.forward.csum_delta = tuple_difference(&s.opener, &s.opener.rewritten(&s.forward));
    s.reverse.csum_delta = tuple_difference(&s.answer, &s.answer.rewritten(&s.reverse));

    // The client's own port if it may be: easier to follow for people. Else one that follows from the flow:
    // a connection that is decided again, since a flood evicted its beginning, finds the port it had.
    let own = s.opener.sport.number();
    let kept = source.own || own.wrapping_sub(source.first) <= source.mask;
    let mut port = if kept { own } else { pick(flow_hash(&s.opener, false), source) };
    if source.own && source.addr == s.opener.src {
        // Nothing changes then, and the recipes say so.
        s.forward.rewrite &= !Rewrite::SOURCE;
        s.reverse.rewrite &= !Rewrite::DESTINATION;
        s.answer.dport = Port::new(port);
        if claim(tables, s) {
            return Ok(Next::Go);
        }
        // Its own from earlier, and what is over, make way.
        let (opener, over) = (s.opener, |recipe: &Recipe| recipe.state == State::CLOSING);
        vacate(tables, s, Table::Pending, |recipe, other| *other == opener || over(recipe));
        vacate(tables, s, Table::Flows, |recipe, other| *other == opener || over(recipe));
    }
    // Two ports in a row, then anywhere: neighbours of a taken port are more likely taken than others.
    for i in 0..ATTEMPTS {
        if i == 1 {
            s.forward.rewrite |= Rewrite::SOURCE;
            s.reverse.rewrite |= Rewrite::DESTINATION;
            port = source.first.wrapping_add(port.wrapping_sub(source.first).wrapping_add(1) & source.mask);
        } else if i > 1 {
            port = pick(tables.random(), source);
        }
        s.forward.source_port = Port::new(port);
        s.answer.dport = Port::new(port);
        if claim(tables, s) {
            return Ok(Next::Go);
        }
    }
    s.ports = (source.first, source.mask);
    Ok(Next::Carry)
}

/// Takes the port that stands in the drafts, if it is free.
#[inline(always)]
fn claim<T: Tables>(tables: &T, s: &mut Scratch) -> bool {
    if !tables.insert(Table::Pending, &s.answer, &s.reverse, true) {
        return false;
    }
    if tables.flow(Table::Flows, &s.answer).is_none() {
        s.claimed = true;
        return true;
    }
    tables.remove(Table::Pending, &s.answer);
    false
}

/// The stage when ports are scarce: takes one back from a connection that is over, or that nobody has
/// answered for a while. Those who only begin connections lose theirs first.
#[inline(always)]
pub(crate) fn reclaim<T: Tables>(tables: &T, s: &mut Scratch) -> Result<(), DropReason> {
    for _ in 0..RECLAIM_ATTEMPTS {
        let port = Port::new(s.ports.0.wrapping_add(tables.random() as u16 & s.ports.1));
        s.forward.source_port = port;
        s.answer.dport = port;
        let now = tables.now().count;
        let silent = |recipe: &Recipe, ticks| now.wrapping_sub(recipe.last_seen.count) >= ticks;
        vacate(tables, s, Table::Pending, |recipe, _| silent(recipe, PATIENCE));
        vacate(tables, s, Table::Flows, |recipe, _| recipe.state == State::CLOSING && silent(recipe, SILENCE));
        if claim(tables, s) {
            return Ok(());
        }
    }
    Err(DropReason::NO_MASQUERADE_PORT)
}

/// Ports that are looked at for one that can be taken back. Under a flood of beginnings, or of short
/// connections, nearly every one can.
const RECLAIM_ATTEMPTS: u32 = 3;
/// Ticks that a connection may wait for its first answer while others need its port: two repetitions of
/// a SYN.
const PATIENCE: u32 = 4;
/// Ticks of silence after which a connection that was ended is over.
const SILENCE: u32 = 2;

/// Takes away the connection that stands in the place of this one's answers, if it may go: asked with its
/// recipe there, and its opener's tuple.
#[inline(always)]
pub(crate) fn vacate<T: Tables>(tables: &T, s: &Scratch, table: Table, may_go: impl FnOnce(&Recipe, &Tuple) -> bool) {
    let Some(flow) = tables.flow(table, &s.answer) else {
        return;
    };
    let recipe = flow.recipe();
    let opener = s.answer.opposite(recipe);
    if may_go(recipe, &opener) {
        tables.remove(table, &s.answer);
        tables.remove(table, &opener);
    }
}

#[inline(always)]
fn pick(random: u32, source: &Source) -> u16 {
    source.first.wrapping_add(random as u16 & source.mask)
}
