//! Asking policy. The contract of the tables is in `cirri_abi::policy`.

use cirri_abi::{
    Cookie, Direction, DropReason, Identity, PolicyEntry, PolicyKey, RulesetSlot, Tuple, policy_flag, proto,
};

use crate::{
    place::{Place, PlaceKind},
    traits::Tables,
};

/// What policy said about a connection, at both ends as far as this node decides for them.
#[derive(Clone, Copy, Default, Debug)]
pub struct Judgement {
    /// The rule asked for leaving the sender.
    pub egress_cookie: u32,
    /// The rule asked for entering the receiver.
    pub ingress_cookie: u32,
    /// Epoch of the rule set that had the last word.
    pub generation: u32,
    /// The endpoint whose rule set had the last word; 0 for none.
    pub endpoint: u16,
    /// Its direction.
    pub direction: u8,
    /// Some rule would have denied it, but only audits.
    pub audit: bool,
}

/// Asks for a connection from `from` to `to`, whose first packet has (or had) `tuple`.
///
/// `Err`: denied; `out` then says by whom.
#[inline(always)]
pub(crate) fn judge<T: Tables>(
    tables: &T,
    from: &Place,
    to: &Place,
    tuple: &Tuple,
    icmp_type: u8,
    out: &mut Judgement,
) -> Result<(), DropReason> {
    *out = Judgement { direction: Direction::INGRESS, ..Judgement::default() };
    let port = match tuple.proto {
        proto::ICMP | proto::ICMPV6 => [0, icmp_type],
        _ => tuple.dport.be.to_ne_bytes(),
    };
    if let Some(ruleset) = from.ruleset() {
        out.direction = Direction::EGRESS;
        out.endpoint = from.endpoint;
        out.generation = tables.epoch(ruleset);
        ask(tables, ruleset, Direction::EGRESS, to, tuple.proto, port, &mut out.egress_cookie, &mut out.audit)?;
    }
    if let Some(ruleset) = to.ruleset() {
        out.direction = Direction::INGRESS;
        out.endpoint = to.endpoint;
        out.generation = tables.epoch(ruleset);
        ask(tables, ruleset, Direction::INGRESS, from, tuple.proto, port, &mut out.ingress_cookie, &mut out.audit)?;
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "inlined into one caller; a struct would cost stack in the kernel")]
#[inline(always)]
fn ask<T: Tables>(
    tables: &T,
    ruleset: RulesetSlot,
    direction: u8,
    peer: &Place,
    protocol: u8,
    port: [u8; 2],
    cookie: &mut u32,
    audit: &mut bool,
) -> Result<(), DropReason> {
    // NetworkPolicy API: traffic between a workload and its own node is always allowed.
    if peer.kind == PlaceKind::Host {
        *cookie = Cookie::OWN_NODE;
        return Ok(());
    }
    let mut best = PolicyEntry::default();
    let mut found = false;
    let mut consider = |id: u32| {
        let key = PolicyKey::full(Identity { id }, direction, protocol, port);
        if let Some(entry) = tables.policy(ruleset, &key)
            && (!found || beats(entry, &best))
        {
            best = *entry;
            found = true;
        }
    };
    if peer.identity.id != Identity::UNKNOWN.id {
        consider(peer.identity.id);
    }
    if peer.block != 0 {
        consider(peer.block);
    }
    consider(0);
    if !found {
        return Err(DropReason::NO_POLICY);
    }
    *cookie = best.cookie;
    if best.flags & policy_flag::ALLOW != 0 {
        return Ok(());
    }
    if best.flags & policy_flag::AUDIT != 0 {
        *audit = true;
        return Ok(());
    }
    Err(if best.cookie == Cookie::DEFAULT_DENY { DropReason::POLICY_DENIED } else { DropReason::POLICY_DENIED_BY_RULE })
}

#[inline(always)]
fn beats(a: &PolicyEntry, b: &PolicyEntry) -> bool {
    a.precedence > b.precedence || (a.precedence == b.precedence && a.prefix_len > b.prefix_len)
}
