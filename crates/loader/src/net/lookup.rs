//! Where the kernel would send a packet, whatever rules and tables lead there.

use std::{io, net::IpAddr};

use rtnetlink::{
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
    sys::protocols::NETLINK_ROUTE,
};

use super::{
    host_bits,
    wire::{Scope, ask},
};

/// What the kernel does with a packet to an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// It leaves by this device.
    Device(u32),
    /// It is for this node itself.
    Here,
    /// It is refused or dropped: there is no way.
    Nowhere,
}

/// Asks the kernel for the way to an address, in the calling thread's namespace.
///
/// # Errors
/// The kernel does not tell.
pub fn lookup(to: IpAddr) -> io::Result<Lookup> {
    let mut request = RouteMessage::default();
    request.header.address_family = family(to.is_ipv6());
    request.header.destination_prefix_length = host_bits(to);
    request.attributes.push(RouteAttribute::Destination(match to {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    }));
    const NO_WAY: [i32; 5] = [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EINVAL, libc::EACCES, libc::ESRCH];
    let answers = match ask(NETLINK_ROUTE, RouteNetlinkMessage::GetRoute(request), Scope::One) {
        Ok(answers) => answers,
        Err(error) if error.raw_os_error().is_some_and(|code| NO_WAY.contains(&code)) => return Ok(Lookup::Nowhere),
        Err(error) => return Err(error),
    };
    let route = answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewRoute(route) => Some(route),
        _ => None,
    });
    let Some(route) = route else { return Ok(Lookup::Nowhere) };
    let device = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(device) => Some(*device),
        _ => None,
    });
    Ok(match (route.header.kind, device) {
        (RouteType::Local, _) => Lookup::Here,
        (RouteType::Unicast, Some(device)) => Lookup::Device(device),
        _ => Lookup::Nowhere,
    })
}

/// Whether a policy rule leads every packet of a family to the main table at last, in the calling thread's
/// namespace.
///
/// # Errors
/// The kernel does not tell.
pub fn has_main_rule(v6: bool) -> io::Result<bool> {
    let mut request = RuleMessage::default();
    request.header.family = family(v6);
    let answers = ask(NETLINK_ROUTE, RouteNetlinkMessage::GetRule(request), Scope::All)?;
    Ok(answers.iter().any(|answer| matches!(answer, RouteNetlinkMessage::NewRule(rule) if leads_to_main(rule))))
}

fn leads_to_main(rule: &RuleMessage) -> bool {
    let for_all = rule.header.src_len == 0 && rule.header.dst_len == 0 && rule.header.action == RuleAction::ToTable;
    let main = u32::from(RouteHeader::RT_TABLE_MAIN);
    let table = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let narrow = rule.attributes.iter().any(|attribute| {
        matches!(
            attribute,
            RuleAttribute::FwMark(1..)
                | RuleAttribute::Iifname(_)
                | RuleAttribute::Oifname(_)
                | RuleAttribute::UidRange(_)
                | RuleAttribute::IpProtocol(_)
        )
    });
    for_all && !narrow && table.unwrap_or(rule.header.table.into()) == main
}

fn family(v6: bool) -> AddressFamily {
    if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(table: u8, attributes: Vec<RuleAttribute>) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.header.table = table;
        rule.attributes = attributes;
        rule
    }

    #[test]
    fn only_a_rule_for_every_packet_leads_all_to_the_main_table() {
        let main = RouteHeader::RT_TABLE_MAIN;
        assert!(leads_to_main(&rule(main, vec![RuleAttribute::Priority(32766)])));
        assert!(!leads_to_main(&rule(main, vec![RuleAttribute::FwMark(7)])));
        assert!(!leads_to_main(&rule(main, vec![RuleAttribute::Iifname("eth0".into())])));
        assert!(!leads_to_main(&rule(100, Vec::new())));
        assert!(leads_to_main(&rule(252, vec![RuleAttribute::Table(254)])));
    }
}
