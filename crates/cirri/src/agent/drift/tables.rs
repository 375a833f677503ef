//! The maps of the packet path.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::sync::Arc;
use std::time::Instant;

use cirri_abi::Addr;

use super::Drift;
use crate::agent::core::Core;
use crate::agent::rows::{ipcache_net, sort};
use crate::agent::table::{Difference, Table};
use crate::api::ProblemKind;

impl Core {
    /// Rows that were deleted, altered or added are due again.
    pub(super) fn compare_tables(&mut self, now: Instant) -> anyhow::Result<()> {
        let drift = &mut self.drift;
        let node = BTreeMap::from([("node", self.tables.node()?)]);
        compare("NODE", &mut self.rows.node, &node, drift, now);
        let entries = self.tables.ipcache.entries()?;
        let ipcache = entries.into_iter().filter_map(|(key, row)| Some((ipcache_net(&key)?, row))).collect();
        compare("IPCACHE", &mut self.rows.ipcache, &ipcache, drift, now);
        let per_packet = self.tables.per_packet.entries()?.into_iter().collect();
        compare("PER_PACKET", &mut self.rows.per_packet, &per_packet, drift, now);
        let bits = self.tables.identities.entries()?.into_iter().filter(|(_, bits)| *bits != 0).collect();
        compare("IDENTITIES", &mut self.rows.identities, &bits, drift, now);
        self.compare_epochs(now)?;
        self.compare_rulesets(now)?;
        self.compare_endpoints(now)?;
        self.compare_services(now)
    }

    fn compare_epochs(&mut self, now: Instant) -> anyhow::Result<()> {
        for (slot, there, written) in self.tables.altered_epochs()? {
            let (object, there, written) = (format!("EPOCHS {slot}"), there.to_string(), written.to_string());
            if self.drift.repair(ProblemKind::Map, &object, &there, &written, now) {
                self.tables.renew_epoch(slot)?;
            }
        }
        Ok(())
    }

    /// A rule set that is live does not change: its number tells whether it is the one that was read.
    fn compare_rulesets(&mut self, now: Instant) -> anyhow::Result<()> {
        let mut found = BTreeMap::new();
        let mut known = std::mem::take(&mut self.drift.rulesets);
        for (slot, id) in self.tables.ruleset_ids()? {
            let desired = self.rows.rulesets.desired(&slot);
            let entries = match desired.filter(|_| known.get(&slot) == Some(&id)) {
                Some(desired) => Arc::clone(desired),
                None => {
                    let Some(mut entries) = self.tables.read_ruleset(slot)? else { continue };
                    sort(&mut entries);
                    // One that was narrowed is in force as it was written.
                    let in_force = self.narrowed.rules.get(&slot).or(desired.map(Arc::as_ref));
                    match desired.filter(|_| in_force == Some(&entries)) {
                        Some(desired) => {
                            self.drift.rulesets.insert(slot, id);
                            Arc::clone(desired)
                        }
                        None => Arc::new(entries),
                    }
                }
            };
            if known.remove(&slot) == Some(id) {
                self.drift.rulesets.insert(slot, id);
            }
            found.insert(slot, entries);
        }
        for difference in self.rows.rulesets.differences(&found) {
            let object = format!("RULESETS {}", difference.key);
            let count = |entries: &Option<Arc<Vec<_>>>| match entries {
                Some(entries) => format!("a rule set of {} entries", entries.len()),
                None => "none".to_owned(),
            };
            let (there, wanted) = (count(&difference.found), count(&difference.wanted));
            self.drift.rulesets.remove(&difference.key);
            if self.drift.repair(ProblemKind::Map, &object, &there, &wanted, now) {
                self.rows.rulesets.found(difference);
            }
        }
        Ok(())
    }

    /// A workload stands in two maps: by its device and by each address.
    fn compare_endpoints(&mut self, now: Instant) -> anyhow::Result<()> {
        let devices = self.tables.devices.entries()?;
        let addresses: HashMap<Addr, cirri_abi::Endpoint> = self.tables.endpoints.entries()?.into_iter().collect();
        let mut found = BTreeMap::new();
        for (ifindex, row) in &devices {
            let named = [row.v4, row.v6].into_iter().filter(|ip| *ip != Addr::UNSPECIFIED);
            let whole = row.ifindex == *ifindex && named.clone().all(|ip| addresses.get(&ip) == Some(row));
            // One that is in a part of its places is written again, in all of them.
            if whole || self.rows.endpoints.desired(&row.id).is_none() {
                found.insert(row.id, *row);
            }
        }
        for difference in self.rows.endpoints.differences(&found) {
            let object = format!("ENDPOINTS and DEVICES, endpoint {}", difference.key);
            let (there, wanted) = shown(&difference);
            if self.drift.repair(ProblemKind::Map, &object, &there, &wanted, now) {
                self.rows.endpoints.found(difference);
            }
        }
        // Entries that lead to nobody, or to somebody else than they stand under.
        let known: BTreeMap<u32, cirri_abi::Endpoint> =
            self.rows.endpoints.iter().map(|(_, row)| (row.ifindex, *row)).collect();
        for (ifindex, row) in &devices {
            let misplaced = row.ifindex != *ifindex || self.rows.endpoints.desired(&row.id).is_some();
            let stray = !known.contains_key(ifindex) && misplaced;
            let object = format!("DEVICES {ifindex}");
            if stray && self.drift.repair(ProblemKind::Map, &object, "a workload", "none", now) {
                self.tables.devices.delete(ifindex)?;
            }
        }
        for (ip, row) in &addresses {
            let owner = self.rows.endpoints.iter().find(|(_, known)| known.v4 == *ip || known.v6 == *ip);
            let stray = owner.is_none() && self.rows.endpoints.state(&row.id).is_none_or(|state| state == "done");
            let object = format!("ENDPOINTS {ip}");
            if stray && self.drift.repair(ProblemKind::Map, &object, "a workload", "none", now) {
                self.tables.endpoints.delete(ip)?;
            }
        }
        Ok(())
    }

    fn compare_services(&mut self, now: Instant) -> anyhow::Result<()> {
        let Core { serving, tables, drift, .. } = self;
        let repair = |object: &str, found: &str| drift.repair(ProblemKind::Map, object, found, "as written", now);
        serving.compare(tables, repair)?;
        Ok(())
    }
}

fn compare<K, V>(name: &str, rows: &mut Table<K, V>, found: &BTreeMap<K, V>, drift: &mut Drift, now: Instant)
where
    K: Ord + Clone + Display,
    V: Clone + PartialEq + std::fmt::Debug,
{
    for difference in rows.differences(found) {
        let object = format!("{name} {}", difference.key);
        let (there, wanted) = shown(&difference);
        if drift.repair(ProblemKind::Map, &object, &there, &wanted, now) {
            rows.found(difference);
        }
    }
}

fn shown<K, V: std::fmt::Debug>(difference: &Difference<K, V>) -> (String, String) {
    let one = |value: &Option<V>| value.as_ref().map_or_else(|| "no entry".to_owned(), |value| format!("{value:?}"));
    (one(&difference.found), one(&difference.wanted))
}
