//! Routes and neighbours of ours, and whether the kernel follows them.

use std::collections::BTreeMap;
use std::time::Instant;

use cirri_loader::net::{Lookup, Route, has_main_rule, lookup};
use ipnet::IpNet;

use super::Findings;
use crate::agent::core::Core;
use crate::agent::problems::Finding;
use crate::agent::rows::RouteRow;
use crate::api::ProblemKind;

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
        for (net, RouteRow { route, .. }) in self.rows.routes.iter() {
            let ruled = rules[usize::from(net.addr().is_ipv6())];
            let done = self.rows.routes.state(net).as_deref() == Some("done");
            if !ruled || !done || !self.drift.up.contains(&route.device) {
                continue;
            }
            let way = lookup(net.addr())?;
            if way != Lookup::Device(route.device) {
                let found = match way {
                    Lookup::Device(other) => format!("packets to {} leave by device {other}", net.addr()),
                    Lookup::Here => format!("packets to {} are taken for this node's own", net.addr()),
                    Lookup::Nowhere => format!("packets to {} are refused", net.addr()),
                };
                let remedy = format!(
                    "a rule or route of somebody else comes first: see `ip rule` and `ip route get {}`",
                    net.addr()
                );
                let wanted = format!("by device {}", route.device);
                findings.push((ProblemKind::Route, net.to_string(), Finding::new(found, remedy).wanted(wanted)));
            }
        }
        Ok(())
    }

    /// Whether all packets of a family are led to the main table at last.
    fn check_rules(&self, v6: bool, findings: &mut Findings) -> anyhow::Result<bool> {
        if v6 && self.node.v6.is_none() {
            return Ok(true);
        }
        let there = has_main_rule(v6)?;
        if !there {
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
        for route in self.net.routes().await? {
            let Ok(net) = IpNet::new(route.to, route.prefix) else { continue };
            let neighbour = neighbours
                .iter()
                .find(|neighbour| neighbour.ip == route.to && neighbour.device == route.device)
                .map(|neighbour| neighbour.mac);
            let row = RouteRow { route, neighbour };
            // Of several to one network the one that was left there counts.
            if !found.contains_key(&net) || self.rows.routes.desired(&net) == Some(&row) {
                found.insert(net, row);
            }
        }
        Ok(found)
    }
}

fn in_words(found: Option<RouteRow>, wanted: Option<RouteRow>) -> (String, String) {
    let shown = |row: RouteRow| {
        let neighbour = row.neighbour.map(|mac| format!(", neighbour {}", crate::workload::mac_text(mac)));
        format!("{}{}", row.route, neighbour.unwrap_or_default())
    };
    match (found, wanted) {
        (None, wanted) => ("it is gone".to_owned(), wanted.map(shown).unwrap_or_default()),
        (Some(found), None) => (shown(found), "no such route of Cirri's".to_owned()),
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
