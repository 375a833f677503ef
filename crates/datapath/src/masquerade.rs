//! Masquerade: workloads speak to the world from their node's address.

use cirri_abi::{Addr, DropReason, NodeConfig, Port, Rewrite, VXLAN_PORT, node_flag, proto};

use crate::{
    carry::address_difference,
    place::PlaceKind,
    slow::Scratch,
    traits::{Table, Tables},
};

/// Whether what is `addressed` to this node's address and that port cannot be the answer to a masqueraded
/// connection.
#[inline(always)]
pub(crate) fn is_for_node<T: Tables>(tables: &T, addressed: impl FnOnce(&NodeConfig) -> bool, port: Port) -> bool {
    match tables.node() {
        Some(node) if addressed(node) => {
            port.number().wrapping_sub(node.masquerade_first.number()) > node.masquerade_mask
        }
        _ => false,
    }
}

/// Ports tried before the connection is refused (Cilium's contract N1.8 tries as many).
const ATTEMPTS: u16 = 32;

/// Whether this new connection leaves from the node's address.
#[inline(always)]
pub(crate) fn wanted<T: Tables>(tables: &T, s: &Scratch) -> Result<bool, DropReason> {
    if s.from.kind != PlaceKind::Local || s.to.kind != PlaceKind::World || s.to.plain {
        return Ok(false);
    }
    let Some(node) = tables.node() else {
        return Err(DropReason::NO_CONFIG);
    };
    let flag = if s.opener.src.is_v4() { node_flag::MASQUERADE_V4 } else { node_flag::MASQUERADE_V6 };
    if node.flags & flag == 0 {
        return Ok(false);
    }
    let echo = s.parsed.icmp[0] == if s.opener.src.is_v4() { 8 } else { 128 };
    match s.opener.proto {
        // The receiver may be a node by an address that nobody told us. From our node's own address it
        // would take this for the overlay's, whose VNI could then be any identity.
        proto::UDP if s.opener.dport == Port::new(VXLAN_PORT) => Err(DropReason::ENCAPSULATION_PROHIBITED),
        proto::TCP | proto::UDP => Ok(true),
        proto::ICMP | proto::ICMPV6 if echo => Ok(true),
        _ => Err(DropReason::MASQUERADE_UNSUPPORTED),
    }
}

/// Takes a port whose answers no other connection expects, and puts the rewrite into both recipes.
///
/// The answer's pending entry is the claim: it is inserted only if it is new, so two CPUs cannot
/// take the same port. Then the established are asked, in this order: a connection is in their table
/// before it leaves the pending one.
#[inline(always)]
pub(crate) fn bind<T: Tables>(tables: &T, s: &mut Scratch) -> Result<(), DropReason> {
    let Some(node) = tables.node() else {
        return Err(DropReason::NO_CONFIG);
    };
    let address = if s.opener.src.is_v4() { node.v4 } else { node.v6 };
    if address == Addr::UNSPECIFIED {
        return Err(DropReason::NO_MASQUERADE_PORT);
    }
    let (first, mask) = (node.masquerade_first.number(), node.masquerade_mask);
    s.forward.rewrite = Rewrite::SOURCE;
    s.forward.source = address;
    s.forward.csum_delta = address_difference(&s.opener.src, &address);
    s.reverse.rewrite = Rewrite::DESTINATION;
    s.reverse.destination = s.opener.src;
    s.reverse.destination_port = s.opener.sport;
    s.reverse.csum_delta = address_difference(&address, &s.opener.src);

    // The workload's own port if it is in the range: easier to follow for people.
    let own = s.opener.sport.number().wrapping_sub(first);
    let start = if own <= mask { own } else { tables.random() as u16 };
    for i in 0..ATTEMPTS {
        let port = Port::new(first.wrapping_add(start.wrapping_add(i) & mask));
        s.forward.source_port = port;
        s.answer.dst = address;
        s.answer.dport = port;
        if !tables.insert(Table::Pending, &s.answer, &s.reverse, true) {
            continue;
        }
        if tables.flow(Table::Flows, &s.answer).is_none() {
            return Ok(());
        }
        tables.remove(Table::Pending, &s.answer);
    }
    Err(DropReason::NO_MASQUERADE_PORT)
}
