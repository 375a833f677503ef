//! Routes and neighbours of ours, and whether the kernel follows them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use cirri_loader::net::{Asked, ListedRoute, Lookup, Route, Rules, Selector, lookup, rules};
use ipnet::IpNet;

use super::Findings;
use crate::agent::core::Core;
use crate::agent::problems::Finding;
use crate::agent::rows::RouteRow;
use crate::api::ProblemKind;
use crate::config::RoutingMode;

/// Routes of others to parts of networks that ours lead to.
#[derive(Debug, Default)]
pub struct Strangers {
    all: Vec<IpNet>,
    /// The networks; none: they are to be listed.
    within: Option<Vec<(IpAddr, u8)>>,
}

impl Strangers {
    /// There may be others.
    pub fn suspect(&mut self) {
        self.within = None;
    }
}

impl Core {
    /// Routes and neighbours that are gone or otherwise are due again. Where the kernel does not follow one that
    /// is right, somebody's rule or route stands before it: that is said.
    pub(super) async fn compare_routes(&mut self, now: Instant, findings: &mut Findings) -> anyhow::Result<()> {
        let found = self.routes_found().await?;
        for difference in self.rows.routes.differences(&found) {
            // Without its device or its source a route cannot be; that is said of them.
            if difference.wanted.is_some_and(|wanted| !self.is_possible(&wanted)) {
                continue;
            }
            let object = difference.key.to_string();
            let (there, wanted) = in_words(difference.found, difference.wanted);
            if self.drift.repair(ProblemKind::Route, &object, &there, &wanted, now) {
                self.rows.routes.found(difference);
            }
        }
        let rules = [self.check_rules(false, findings)?, self.check_rules(true, findings)?];
        let probes = [self.probes(&rules[0]), self.probes(&rules[1])];
        for (net, RouteRow { route, .. }) in self.rows.routes.iter() {
            let family = usize::from(net.addr().is_ipv6());
            if !rules[family].has_main || !self.is_in_force(net, route) {
                continue;
            }
            let plain = Asked { to: net.addr(), from: None, by: None };
            // Packets of others pass a workload's device by its program alone, whatever the node's routes say.
            let of_others = |asked: &&Asked| asked.by.is_none() || route.via.is_some();
            let probes = probes[family]
                .iter()
                .filter(|probe| probe.to.is_ipv6() == net.addr().is_ipv6())
                .map(|probe| Asked { to: net.addr(), ..*probe });
            let all: Vec<Asked> = std::iter::once(plain).chain(probes).collect();
            for asked in all.iter().filter(of_others) {
                let way = lookup(*asked)?;
                if way != Lookup::of(route) {
                    findings.push((ProblemKind::Route, net.to_string(), elsewhere(*asked, way, route)));
                    break;
                }
            }
        }
        self.compare_strangers(findings).await
    }

    fn is_in_force(&self, net: &IpNet, route: &Route) -> bool {
        self.rows.routes.state(net).as_deref() == Some("done") && self.drift.up.contains(&route.device)
    }

    /// Routes of others to parts of networks that ours lead to. They are listed again only when there was news of one:
    /// there may be a hundred thousand others.
    async fn compare_strangers(&mut self, findings: &mut Findings) -> anyhow::Result<()> {
        let networks = self.networks();
        if self.drift.strangers.within.as_ref() != Some(&networks) {
            let strange = self.net.strange_routes(&networks).await?;
            let strange = strange.into_iter().filter_map(|(to, prefix)| IpNet::new(to, prefix).ok());
            self.drift.strangers = Strangers { all: strange.collect(), within: Some(networks) };
        }
        for strange in &self.drift.strangers.all {
            let around = self.rows.routes.iter().filter(|(net, _)| net.contains(strange));
            let Some((net, row)) = around.max_by_key(|(net, _)| net.prefix_len()) else { continue };
            if !self.is_in_force(net, &row.route) {
                continue;
            }
            let asked = Asked { to: strange.addr(), from: None, by: None };
            let way = lookup(asked)?;
            if way != Lookup::of(&row.route) {
                findings.push((ProblemKind::Route, strange.to_string(), elsewhere(asked, way, &row.route)));
            }
        }
        Ok(())
    }

    /// The networks that routes of ours lead to, as the kernel is asked about them.
    pub(super) fn networks(&self) -> Vec<(IpAddr, u8)> {
        let ranges = self.rows.routes.iter().filter(|(_, row)| row.neighbour.is_none());
        ranges.map(|(net, _)| (net.network(), net.prefix_len())).collect()
    }

    /// What else to ask the kernel about each network, because somebody's rule is for some packets alone: of the node
    /// itself, and with direct routing of workloads.
    fn probes(&self, rules: &Rules) -> Vec<Asked> {
        let inside = |from: &Option<(IpAddr, u8)>, ip: IpAddr| {
            from.is_none_or(|(net, prefix)| IpNet::new(net, prefix).is_ok_and(|net| net.contains(&ip)))
        };
        let mut probes = Vec::new();
        for Selector { from, by } in &rules.selectors {
            let own = [Some(IpAddr::V4(self.node.v4)), self.node.v6.map(IpAddr::V6)].into_iter().flatten();
            let of_node = by.as_deref().is_none_or(|by| by == "lo");
            let own = own.filter(|ip| from.is_some() && of_node && inside(from, *ip));
            probes.extend(own.map(|ip| Asked { to: ip, from: Some(ip), by: None }));
            if self.config.routing.mode == RoutingMode::Overlay {
                continue;
            }
            let on = self.endpoints.values().filter(|it| by.as_ref().is_none_or(|by| *by == it.host_ifname));
            let on = on.filter(|endpoint| self.drift.up.contains(&endpoint.ifindex));
            let theirs =
                on.flat_map(|it| it.addresses().map(|ip| Asked { to: ip, from: Some(ip), by: Some(it.ifindex) }));
            let theirs: Vec<Asked> = theirs.filter(|asked| inside(from, asked.to)).collect();
            // One of many that the rule is for stands for all.
            for v6 in [false, true] {
                probes.extend(theirs.iter().find(|asked| asked.to.is_ipv6() == v6));
            }
        }
        probes
    }

    /// The policy rules of a family, one of which must lead all packets to the main table at last.
    fn check_rules(&self, v6: bool, findings: &mut Findings) -> anyhow::Result<Rules> {
        if v6 && self.node.v6.is_none() {
            return Ok(Rules { has_main: true, ..Rules::default() });
        }
        let there = rules(v6)?;
        if !there.has_main {
            let (object, ip) = if v6 { ("policy rules of IPv6", "-6") } else { ("policy rules of IPv4", "-4") };
            let remedy = format!("ip {ip} rule add pref 32766 table main");
            let finding = Finding::new("no rule leads all packets to table main", remedy);
            findings.push((ProblemKind::Route, object.to_owned(), finding.wanted("a rule for table main")));
        }
        Ok(there)
    }

    fn is_possible(&self, row: &RouteRow) -> bool {
        let Route { device, source, .. } = row.route;
        (device == 0 || self.drift.up.contains(&device)) && source.is_none_or(|ip| self.node.addresses.contains(&ip))
    }

    /// Cirri's routes in the kernel, each with the permanent neighbour at its end.
    pub(in crate::agent) async fn routes_found(&self) -> anyhow::Result<BTreeMap<IpNet, RouteRow>> {
        let neighbours = self.net.neighbours().await?;
        let mut found: BTreeMap<IpNet, RouteRow> = BTreeMap::new();
        for ListedRoute { route, plain } in self.net.routes().await? {
            let Ok(net) = IpNet::new(route.to, route.prefix) else { continue };
            let neighbour = neighbours
                .iter()
                .find(|neighbour| neighbour.ip == route.to && neighbour.device == route.device)
                .map(|neighbour| neighbour.mac);
            let row = RouteRow { route, neighbour, plain };
            // Of several to one network the one that was left there counts.
            if !found.contains_key(&net) || self.rows.routes.desired(&net) == Some(&row) {
                found.insert(net, row);
            }
        }
        Ok(found)
    }
}

/// That packets go elsewhere than a route of ours says.
fn elsewhere(asked: Asked, way: Lookup, route: &Route) -> Finding {
    let Asked { to, from, by } = asked;
    let from = from.map(|ip| format!(" from {ip}")).unwrap_or_default();
    let by = by.map(|device| format!(" iif {device}")).unwrap_or_default();
    let packets = format!("packets{from} to {to}");
    let found = match way {
        Lookup::Leaves { device, via: Some(via) } => format!("{packets} leave by device {device} to router {via}"),
        Lookup::Leaves { device, via: None } => format!("{packets} leave by device {device}"),
        Lookup::Here => format!("{packets} are taken for this node's own"),
        Lookup::Nowhere => format!("{packets} are refused"),
    };
    let remedy = format!(
        "a rule or route of somebody else comes first: see `ip rule` and `ip route get {to}{from}{by}` (the device by its \
         name)"
    );
    let via = route.via.map(|via| format!(" to router {via}")).unwrap_or_default();
    Finding::new(found, remedy).wanted(format!("by device {}{via}", route.device))
}

fn in_words(found: Option<RouteRow>, wanted: Option<RouteRow>) -> (String, String) {
    let shown = |row: RouteRow| {
        let neighbour = row.neighbour.map(|mac| format!(", neighbour {}", crate::workload::mac_text(mac)));
        format!("{}{}", row.route, neighbour.unwrap_or_default())
    };
    match (found, wanted) {
        (None, wanted) => ("it is gone".to_owned(), wanted.map(shown).unwrap_or_default()),
        (Some(found), None) => (shown(found), "no such route of Cirri's".to_owned()),
        (Some(found), Some(wanted)) if !found.plain => {
            (format!("{}, of another type or with settings of its own", shown(found)), shown(wanted))
        }
        (Some(found), Some(wanted)) if found.route == wanted.route => {
            let neighbour = |row: RouteRow| match row.neighbour {
                Some(mac) => format!("neighbour {}", crate::workload::mac_text(mac)),
                None => "no permanent neighbour".to_owned(),
            };
            (neighbour(found), neighbour(wanted))
        }
        (Some(found), Some(wanted)) => (shown(found), shown(wanted)),
    }
}
