//! Routes for packets of one source: a table of their own, and the rule that leads to it.

use std::net::IpAddr;

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAttribute, RouteMessage, RouteProtocol},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use super::{ListedRoute, Net, NetError, ROUTE_PROTOCOL, Route, absent_is_false, host_bits, kernel, route, wire};

/// Where the rules stand: after the one for the machine's own addresses (0), before the main table (32766).
const PRIORITY: u32 = 19_300;

/// Packets from an address leave by a router of their own, wherever the main table would send them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceRoute {
    /// The source address.
    pub from: IpAddr,
    /// The router, which is on the link of `device`.
    pub via: IpAddr,
    /// The device.
    pub device: u32,
    /// The table of this route; above 255, and nobody else's.
    pub table: u32,
}

impl Net {
    /// Makes the table and the rule.
    pub async fn put_source_route(&self, wanted: &SourceRoute) -> Result<(), NetError> {
        // The rule last: until then nothing changes for anybody.
        let mut message = self.message(&wanted.route())?;
        message.attributes.push(RouteAttribute::Table(wanted.table));
        let put = self.handle.route().add(message).replace().execute().await;
        self.checked(|| wanted.to_string(), "add the route of", put)?;
        let mut request = self.handle.rule().add();
        *request.message_mut() = wanted.rule();
        match request.execute().await.map_err(kernel) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => {
                Err(self.failed(wanted.to_string(), "add the rule of", error))
            }
            _ => Ok(()),
        }
    }

    /// Whether table and rule are there.
    pub async fn has_source_route(&self, wanted: &SourceRoute) -> Result<bool, NetError> {
        let rules = self.rules(wanted.from).await?;
        if !rules.iter().any(|rule| leads(rule, wanted.from, wanted.table)) {
            return Ok(false);
        }
        let in_table = |message: &&RouteMessage| route::table(message) == wanted.table;
        let routes = self.all_route_messages().await?;
        Ok(routes.iter().filter(in_table).filter_map(route::listed).any(|ListedRoute { route, plain }| {
            (route.prefix, route.via, route.device) == (0, Some(wanted.via), wanted.device)
                && (plain, route.source) == (true, None)
                && route.to.is_ipv4() == wanted.from.is_ipv4()
        }))
    }

    /// The tables that rules for every packet from an address lead to, whoever made them.
    pub async fn tables_from(&self, from: IpAddr) -> Result<Vec<u32>, NetError> {
        let tables = self.rules(from).await?.into_iter().filter(|rule| is_for_all(rule, from)).filter_map(|rule| {
            rule.attributes.iter().find_map(|attribute| match attribute {
                RuleAttribute::Table(table) => Some(*table),
                _ => None,
            })
        });
        Ok(tables.collect())
    }

    /// Removes the rule of an address; whether there was one. The routes go with their device.
    pub async fn delete_source_rule(&self, from: IpAddr, table: u32) -> Result<bool, NetError> {
        let deleted = self.handle.rule().del(rule(from, table)).execute().await;
        absent_is_false(deleted).map_err(|error| self.failed(format!("rule of {from}"), "delete", error))
    }

    async fn rules(&self, family: IpAddr) -> Result<Vec<RuleMessage>, NetError> {
        let mut request = RuleMessage::default();
        request.header.family = if family.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        self.list("rules", RouteNetlinkMessage::GetRule(request), wire::Scope::All, |message| match message {
            RouteNetlinkMessage::NewRule(rule) => Some(rule),
            _ => None,
        })
    }
}

impl SourceRoute {
    fn route(&self) -> Route {
        Route::default_via(self.via, self.device)
    }

    fn rule(&self) -> RuleMessage {
        rule(self.from, self.table)
    }
}

impl std::fmt::Display for SourceRoute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "packets from {} via {} (table {})", self.from, self.via, self.table)
    }
}

fn rule(from: IpAddr, table: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = route::family(from);
    message.header.src_len = host_bits(from);
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Source(from),
        RuleAttribute::Table(table),
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::Protocol(RouteProtocol::from(ROUTE_PROTOCOL)),
    ];
    message
}

/// Whether a rule leads all packets from an address to a table: it asks for nothing else.
fn is_for_all(message: &RuleMessage, from: IpAddr) -> bool {
    let asks = |attribute: &RuleAttribute| {
        !matches!(
            attribute,
            RuleAttribute::Source(_)
                | RuleAttribute::Priority(_)
                | RuleAttribute::Table(_)
                | RuleAttribute::Protocol(_)
                | RuleAttribute::SuppressPrefixLen(u32::MAX)
                | RuleAttribute::SuppressIfGroup(u32::MAX)
        )
    };
    message.header.action == RuleAction::ToTable
        && (message.header.src_len, message.header.dst_len, message.header.tos) == (host_bits(from), 0, 0)
        && message.attributes.contains(&RuleAttribute::Source(from))
        && !message.attributes.iter().any(asks)
}

fn leads(message: &RuleMessage, from: IpAddr, table: u32) -> bool {
    message.header.action == RuleAction::ToTable
        && message.header.src_len == host_bits(from)
        && message.attributes.contains(&RuleAttribute::Source(from))
        && message.attributes.contains(&RuleAttribute::Table(table))
}
