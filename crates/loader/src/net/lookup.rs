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
    Route, host_bits,
    wire::{Scope, ask},
};

/// What the kernel does with a packet to an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// It leaves.
    Leaves {
        /// By this device.
        device: u32,
        /// To this router; without one to its receiver.
        via: Option<IpAddr>,
    },
    /// It is for this node itself.
    Here,
    /// It is refused or dropped: there is no way.
    Nowhere,
}

/// Packets of which the kernel can be asked where it sends them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Asked {
    /// Where they are sent to.
    pub to: IpAddr,
    /// Who sent them; without, the kernel chooses an address of the node.
    pub from: Option<IpAddr>,
    /// The device that they came in by; without, the node itself sent them.
    pub by: Option<u32>,
}

/// The policy rules of a family, as far as they decide about Cirri's packets.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Rules {
    /// Whether one leads every packet to the main table at last.
    pub has_main: bool,
    /// What those of others ask for that concern some packets alone.
    pub selectors: Vec<Selector>,
}

/// Which packets a policy rule is for. All that is said must hold.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Selector {
    /// Their source is in this network.
    pub from: Option<(IpAddr, u8)>,
    /// They came in by the device of this name; `lo` is the node itself.
    pub by: Option<String>,
}

impl Lookup {
    /// Where packets leave that a route leads.
    pub fn of(route: &Route) -> Lookup {
        Lookup::Leaves { device: route.device, via: route.via }
    }
}

/// Asks the kernel for the way of packets, in the calling thread's namespace.
///
/// # Errors
/// The kernel does not tell.
pub fn lookup(asked: Asked) -> io::Result<Lookup> {
    let Asked { to, from, by } = asked;
    let address = |ip| match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    };
    let mut request = RouteMessage::default();
    request.header.address_family = family(to.is_ipv6());
    request.header.destination_prefix_length = host_bits(to);
    request.attributes.push(RouteAttribute::Destination(address(to)));
    if let Some(from) = from {
        request.header.source_prefix_length = host_bits(from);
        request.attributes.push(RouteAttribute::Source(address(from)));
    }
    request.attributes.extend(by.map(RouteAttribute::Iif));
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
    let (mut device, mut via) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(number) => device = Some(*number),
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => via = Some(IpAddr::V4(*ip)),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => via = Some(IpAddr::V6(*ip)),
            _ => {}
        }
    }
    Ok(match (route.header.kind, device) {
        (RouteType::Local, _) => Lookup::Here,
        (RouteType::Unicast, Some(device)) => Lookup::Leaves { device, via },
        _ => Lookup::Nowhere,
    })
}

/// The policy rules of a family, in the calling thread's namespace.
///
/// # Errors
/// The kernel does not tell.
pub fn rules(v6: bool) -> io::Result<Rules> {
    let mut request = RuleMessage::default();
    request.header.family = family(v6);
    let answers = ask(NETLINK_ROUTE, RouteNetlinkMessage::GetRule(request), Scope::All)?;
    let mut rules = Rules::default();
    for answer in &answers {
        if let RouteNetlinkMessage::NewRule(rule) = answer {
            rules.has_main |= leads_to_main(rule);
            rules.selectors.extend(selector(rule));
        }
    }
    Ok(rules)
}

/// What a rule asks for, if that is a source or a device. One that asks for a mark, a user or a protocol as well is for
/// packets that cannot be asked about.
fn selector(rule: &RuleMessage) -> Option<Selector> {
    let mut selector = Selector::default();
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Source(from) => selector.from = Some((*from, rule.header.src_len)),
            RuleAttribute::Iifname(name) => selector.by = Some(name.clone()),
            RuleAttribute::FwMark(1..)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_) => return None,
            _ => {}
        }
    }
    (selector != Selector::default()).then_some(selector)
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

    #[test]
    fn a_rule_asks_for_a_source_or_a_device_or_cannot_be_asked_about() {
        let source = RuleAttribute::Source([10, 0, 0, 1].into());
        let mut from = rule(100, vec![source.clone(), RuleAttribute::Priority(9)]);
        from.header.src_len = 32;
        let by = rule(100, vec![RuleAttribute::Iifname("lxc1".into())]);
        let asked = |rule: &RuleMessage| selector(rule);
        assert_eq!(asked(&from), Some(Selector { from: Some(([10, 0, 0, 1].into(), 32)), by: None }));
        assert_eq!(asked(&by), Some(Selector { from: None, by: Some("lxc1".into()) }));
        assert_eq!(asked(&rule(100, vec![source, RuleAttribute::FwMark(7)])), None);
        assert_eq!(asked(&rule(254, vec![RuleAttribute::Priority(32766)])), None);
    }

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
