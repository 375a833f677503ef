//! Makes the kernel like the desired tables. One reconciler a table, in an order that never opens
//! anything and lets nothing lead to a rule set or a workload that is not there.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cirri_abi::{Addr, Identity, Ipcache, RulesetSlot, Tick, epoch, epoch_slot, ipcache_flag};
use cirri_control::policy::{Closing, closing};
use cirri_loader::net::Neighbour;
use cirri_loader::{EdgeWanted, MapError, gc};
use ipnet::IpNet;

use super::core::Core;
use super::narrowed::NO_ROOM;
use super::rows::{Attached, Role, RouteRow, ipcache_key, ipcache_net, sort};
use super::rulesets::{Rules, sorted};
use super::table::Due;
use crate::config::Acceleration;
use crate::settings::SettingsError;

/// How often a long change says that somebody is still at it.
const SIGN_OF_LIFE: Duration = Duration::from_millis(200);

/// How long the packet path certainly waits for the next such sign: one tick.
const LONGEST_SILENCE: Duration = Duration::from_nanos(1 << Tick::SHIFT);

/// Since when a change goes on in which nothing disagrees: no connection goes on without being judged by what is
/// in force already. That it stands there tells the next run that this one was interrupted.
const LONG_AGO: Tick = Tick { count: 1 };

/// How many rule sets become live together: so many that the kernel's grace period does not count, so few that one that
/// waits for each of them (before Linux 6.8) leaves no longer silence than [`SIGN_OF_LIFE`].
const TOGETHER: usize = 16;
/// How many entries they may have, which are there twice meanwhile.
const ENTRIES_TOGETHER: usize = 65_536;

/// A row of the address cache to work on.
type DueAddress = Due<IpNet, Ipcache>;

impl Core {
    /// Takes over what an earlier run left in the kernel: from here on only differences are work.
    ///
    /// # Errors
    /// A table cannot be read.
    pub async fn adopt(&mut self) -> anyhow::Result<()> {
        self.interrupted = self.tables.epoch(epoch_slot::WRITING)? != 0 || self.has_epoch_between();
        self.rows.node.adopt("node", self.tables.node()?);
        for slot in self.tables.ruleset_ids()?.into_keys() {
            if let Some(mut entries) = self.tables.read_ruleset(slot)? {
                sort(&mut entries);
                self.rows.rulesets.adopt(slot, Arc::new(entries));
            }
        }
        for (_, endpoint) in self.tables.devices.entries()? {
            self.rows.endpoints.adopt(endpoint.id, endpoint);
        }
        for (key, row) in self.tables.ipcache.entries()? {
            if let Some(net) = ipcache_net(&key) {
                if row.flags & ipcache_flag::REMOTE != 0 {
                    self.peer_slots.adopt(row.peer.to_ne_bytes().into(), row.slot);
                }
                self.rows.ipcache.adopt(net, row);
            }
        }
        for (word, bits) in self.tables.identities.entries()?.into_iter().filter(|(_, bits)| *bits != 0) {
            self.rows.identities.adopt(word, bits);
        }
        for (cookie, value) in self.tables.per_packet.entries()? {
            self.rows.per_packet.adopt(cookie, value);
        }
        self.serving.adopt(&self.tables)?;
        for (net, row) in self.routes_found().await? {
            self.rows.routes.adopt(net, row);
        }
        Ok(())
    }

    /// Works on every row that is due. Rows that fail are due again later. Nothing before the tables
    /// were filled once: what an earlier run left stays in force until then.
    pub async fn reconcile(&mut self, now: Instant) {
        self.write_rows(now).await;
        // A rule set that went leaves its slot to a workload that has none.
        if self.has_slot_for_another() {
            self.desire();
            self.write_rows(now).await;
        }
    }

    async fn write_rows(&mut self, now: Instant) {
        if !self.filled {
            return;
        }
        let interrupted = std::mem::take(&mut self.interrupted);
        if interrupted {
            // Before this change begins, so that nothing from before the other goes on in the middle of it.
            self.bump(self.slots_in_use().collect());
        }
        self.rulesets_behind.retain(|slot| self.rows.rulesets.state(slot).is_some());
        let mut bumps = BTreeSet::new();
        // Rule sets alone, or addresses alone, are right after each write: nothing disagrees meanwhile.
        let rulesets = self.rows.rulesets.due(now).iter().any(|due| due.desired.is_some());
        let places = self.rows.node.is_due(now) || self.rows.ipcache.is_due(now) || self.rows.endpoints.is_due(now);
        let disagree = rulesets && places;
        let began = Instant::now();
        if rulesets || places {
            self.set_writing(Some(if disagree { gc::now() } else { LONG_AGO }));
        }
        let mut seen = disagree.then_some(began);
        let closed = self.close_rulesets(places, now, &mut seen);
        self.reconcile_node(now, &mut bumps);
        let (early, late) = self.split_ipcache(now);
        let rows_tried = !early.is_empty() || !late.is_empty();
        self.reconcile_ipcache(early, now, &mut bumps);
        if rows_tried {
            self.note_mistaken(&closed);
        }
        bumps.extend(closed);
        let changed_rulesets = self.reconcile_rulesets(now, &mut seen);
        self.reconcile_endpoints(now, &mut bumps);
        // What was decided meanwhile is decided again.
        bumps.extend(changed_rulesets);
        self.reconcile_ipcache(self.without_needed(late), now, &mut bumps);
        self.bump(bumps);
        if (interrupted || rulesets || places) && !self.interrupted {
            self.set_writing(None);
        }
        self.reconcile_per_packet(now);
        self.serving.carry_out(&self.tables, now);
        self.reconcile_routes(now).await;
        self.reconcile_attachments(now);
        self.reconcile_sockets(now);
        self.remove_rulesets(now);
        self.reconcile_identities(now);
    }

    /// Once everything is reconciled: removes the tables of other versions, which nothing uses any more.
    pub fn retire(&mut self) {
        if std::mem::replace(&mut self.retired, true) {
            return;
        }
        match self.datapath.retire() {
            Ok(retired) if retired.map_sets.is_empty() => {}
            Ok(retired) => tracing::info!(sets = ?retired.map_sets, "tables of other versions removed"),
            Err(error) => tracing::warn!(%error, "pins of an earlier run stay until the next start"),
        }
    }

    /// See `epoch_slot::WRITING`.
    fn set_writing(&self, since: Option<Tick>) {
        if let Err(error) = self.tables.set_writing(since) {
            tracing::warn!(%error, "established connections may lose packets while tables change");
        }
    }

    /// Moves epochs: first that something changed, then for whom; see [`epoch_slot::PLACES`].
    fn bump(&mut self, slots: BTreeSet<u16>) {
        let first = (!slots.is_empty()).then_some(epoch_slot::PLACES);
        for slot in first.into_iter().chain(slots) {
            if let Err(error) = self.tables.bump(slot) {
                tracing::error!(slot, %error, "connections do not feel the last change yet; it is tried again");
                self.interrupted = true;
            }
        }
    }

    /// The epochs that recipes may rest on, also of what is gone; but those of services, which are written apart.
    fn slots_in_use(&self) -> impl Iterator<Item = u16> {
        let moved = |slot: &u16| self.tables.epoch(*slot).is_ok_and(|epoch| epoch != 0);
        (epoch_slot::NODE..=epoch_slot::LAST_PEER).filter(moved)
    }

    /// Whether an epoch stands in the middle of a change, or is an earlier version's.
    fn has_epoch_between(&self) -> bool {
        let between = |slot| self.tables.epoch(slot).is_ok_and(|epoch| epoch != epoch::moved(epoch.wrapping_sub(1)));
        (epoch_slot::NODE..=epoch_slot::LAST_PEER).any(between)
    }

    /// The rule sets know these identities from now on: those that all of them were made with.
    fn reconcile_identities(&mut self, now: Instant) {
        if !self.rows.rulesets.is_done() {
            return;
        }
        for Due { key, desired, .. } in self.rows.identities.due(now) {
            let outcome = self.tables.identities.put(&key, &desired.unwrap_or_default());
            report("identities", &key, &outcome);
            self.rows.identities.settle(&key, desired, outcome, now);
        }
    }

    fn reconcile_node(&mut self, now: Instant, bumps: &mut BTreeSet<u16>) {
        for Due { key, desired, .. } in self.rows.node.due(now) {
            let outcome = match &desired {
                Some(config) => self.tables.set_node(config),
                None => Ok(()),
            };
            bumps.insert(epoch_slot::NODE);
            report("node", &key, &outcome);
            self.rows.node.settle(&key, desired, outcome, now);
        }
    }

    /// Rows to write before the rule sets, and rows to write after: a block that is new must be in
    /// the address cache first, one that is gone must leave the rule sets first.
    fn split_ipcache(&self, now: Instant) -> (Vec<DueAddress>, Vec<DueAddress>) {
        let due = self.rows.ipcache.due(now);
        if due.is_empty() {
            return (due, Vec::new());
        }
        let live: BTreeSet<u32> = self.cluster.blocks().iter().map(|(_, number)| number).collect();
        due.into_iter().partition(|due| {
            due.desired.is_some() && due.actual.is_none_or(|actual| actual.block == 0 || live.contains(&actual.block))
        })
    }

    /// Without the rows whose block a rule set in force may still ask for: one that could not be written yet would
    /// take their addresses for those of the network around them.
    fn without_needed(&self, late: Vec<DueAddress>) -> Vec<DueAddress> {
        let all_written = self.rulesets_behind.is_empty();
        let needed = |due: &DueAddress| due.actual.is_some_and(|actual| actual.block != 0);
        late.into_iter().filter(|due| all_written || !needed(due)).collect()
    }

    fn reconcile_ipcache(&mut self, due: Vec<DueAddress>, now: Instant, bumps: &mut BTreeSet<u16>) {
        for Due { key, desired, actual } in due {
            let outcome = match &desired {
                Some(row) => self.tables.ipcache.put(&ipcache_key(key), row),
                None => self.tables.ipcache.delete(&ipcache_key(key)).map(drop),
            };
            report("ipcache", &key, &outcome);
            bumps.extend(self.concerned(key, desired, actual));
            self.rows.ipcache.settle(&key, desired, outcome, now);
        }
    }

    /// The epochs of recipes that rest on a row of the address cache.
    fn concerned(&self, net: IpNet, desired: Option<Ipcache>, actual: Option<Ipcache>) -> Vec<u16> {
        let differs_in_block_only = match (desired, actual) {
            (Some(desired), Some(actual)) => Ipcache { block: 0, ..desired } == Ipcache { block: 0, ..actual },
            // A block's own row inherits everything else from the row around it.
            (one, other) => one.or(other).is_some_and(|row| is_world(row.identity) && net.prefix_len() > 0),
        };
        if differs_in_block_only {
            // Rule sets that ask for the block changed with it, and their epochs moved.
            return Vec::new();
        }
        let peers: Vec<u16> =
            [desired, actual].into_iter().flatten().map(|row| row.slot).filter(|slot| *slot != 0).collect();
        if !peers.is_empty() {
            return peers;
        }
        match self.endpoint_at(net.addr()) {
            Some(endpoint) => vec![endpoint.ruleset],
            // A workload that left: its recipes ended with its device, see `reconcile_endpoints`.
            None if self.pools.iter().any(|pool| pool.cidr().contains(&net) && pool.cidr() != net) => Vec::new(),
            None => vec![epoch_slot::NODE],
        }
    }

    /// Before any rule set opens, and before anybody is somebody else: installs what the others close. A connection that
    /// was not allowed and will not be must not pass because its sender's rule set is there before its receiver's.
    /// Answers the slots whose epoch moved; `seen` as for [`Core::reconcile_rulesets`].
    fn close_rulesets(&mut self, places: bool, now: Instant, seen: &mut Option<Instant>) -> Vec<RulesetSlot> {
        let due: Vec<_> = self.rows.rulesets.due(now).into_iter().filter(|due| due.desired.is_some()).collect();
        if due.len() < 2 && !places {
            // It comes into force at once.
            return Vec::new();
        }
        let closing = due.into_iter().filter_map(|Due { key, desired, actual }| {
            let (before, after) = (self.narrowed.rules.get(&key).or(actual.as_deref())?, desired?);
            let step = match self.narrow(&after) {
                Some(narrowed) => closing(before, &narrowed),
                None => closing(before, &after),
            };
            match step {
                Closing::Nothing => None,
                Closing::All => Some((key, after)),
                Closing::Part(part) => Some((key, Arc::new(sorted(part)))),
            }
        });
        let closing: Vec<_> = closing.collect();
        self.install(&closing, now, seen)
    }

    /// Installs rule sets; answers the slots whose epoch moved. `seen` is the last sign of life, while connections
    /// go on as they were decided.
    fn reconcile_rulesets(&mut self, now: Instant, seen: &mut Option<Instant>) -> Vec<RulesetSlot> {
        let due = self.rows.rulesets.due(now).into_iter();
        let due: Vec<_> = due.filter_map(|due| Some((due.key, due.desired?))).collect();
        self.install(&due, now, seen)
    }

    fn install(
        &mut self,
        mut rulesets: &[(RulesetSlot, Arc<Rules>)],
        now: Instant,
        seen: &mut Option<Instant>,
    ) -> Vec<RulesetSlot> {
        let slots = rulesets.iter().map(|(slot, _)| *slot).collect();
        while !rulesets.is_empty() {
            let (together, rest) = rulesets.split_at(how_many_together(rulesets));
            if let Some(last) = seen.filter(|last| last.elapsed() > SIGN_OF_LIFE) {
                // After a longer silence connections are judged again, and what was refused stays so.
                *seen = (last.elapsed() < LONGEST_SILENCE).then(Instant::now);
                self.set_writing(Some(if seen.is_some() { gc::now() } else { LONG_AGO }));
            }
            let narrowed: Vec<Option<Rules>> = together.iter().map(|(_, entries)| self.narrow(entries)).collect();
            let tables: Vec<_> = together
                .iter()
                .zip(&narrowed)
                .map(|((slot, entries), narrowed)| (*slot, narrowed.as_deref().unwrap_or(entries)))
                .collect();
            let outcomes = self.tables.install_rulesets(&tables);
            for (((slot, entries), narrowed), outcome) in together.iter().zip(narrowed).zip(outcomes) {
                self.settle_ruleset(*slot, entries, narrowed, outcome.map(drop), now);
            }
            rulesets = rest;
        }
        slots
    }

    /// What came of a rule set; `narrowed` is what was written in its place.
    fn settle_ruleset(
        &mut self,
        slot: RulesetSlot,
        entries: &Arc<Rules>,
        narrowed: Option<Rules>,
        outcome: Result<(), MapError>,
        now: Instant,
    ) {
        match outcome {
            Ok(()) => self.rulesets_behind.remove(&slot),
            Err(_) => self.rulesets_behind.insert(slot),
        };
        self.narrowed.rules.remove(&slot);
        if let Some(rules) = narrowed.filter(|_| outcome.is_ok()) {
            tracing::error!(slot, "{NO_ROOM}");
            self.narrowed.rules.insert(slot, rules);
        }
        report("rule set", &slot, &outcome);
        self.rows.rulesets.settle(&slot, Some(Arc::clone(entries)), outcome, now);
    }

    /// Removes rule sets that no workload has any more; last, when nothing leads to them.
    fn remove_rulesets(&mut self, now: Instant) {
        for Due { key, desired, .. } in self.rows.rulesets.due(now) {
            if desired.is_some() {
                continue;
            }
            let outcome = self.tables.remove_ruleset(key).map(drop);
            report("rule set", &key, &outcome);
            self.narrowed.rules.remove(&key);
            self.rows.rulesets.settle(&key, None, outcome, now);
        }
        // A slot is free once its rule set is gone and no workload has it, in the kernel either: a row that could not be
        // written still leads to the former one.
        let written = self.rows.endpoints.written().map(|row| row.ruleset);
        let used: BTreeSet<u16> = self.endpoints.values().map(|endpoint| endpoint.ruleset).chain(written).collect();
        let free: Vec<u32> = self
            .ruleset_slots
            .iter()
            .filter(|(_, slot)| !used.contains(slot) && self.rows.rulesets.state(slot).is_none())
            .map(|(key, _)| *key)
            .collect();
        for key in free {
            self.ruleset_slots.release(&key);
        }
    }

    fn reconcile_endpoints(&mut self, now: Instant, bumps: &mut BTreeSet<u16>) {
        for Due { key, desired, actual } in self.rows.endpoints.due(now) {
            let outcome = self.write_endpoint(desired, actual);
            report("endpoint", &key, &outcome);
            bumps.extend([desired, actual].into_iter().flatten().map(|row| row.ruleset).filter(|slot| *slot != 0));
            self.rows.endpoints.settle(&key, desired, outcome, now);
        }
    }

    fn write_endpoint(
        &self,
        desired: Option<cirri_abi::Endpoint>,
        actual: Option<cirri_abi::Endpoint>,
    ) -> Result<(), MapError> {
        if let Some(old) = actual {
            let stays = |ip: Addr| desired.is_some_and(|new| new.v4 == ip || new.v6 == ip);
            // An address or device number may be another workload's by now.
            for ip in [old.v4, old.v6] {
                let owned = self.tables.endpoints.get(&ip)?.is_some_and(|row| row.id == old.id);
                if ip != Addr::UNSPECIFIED && owned && !stays(ip) {
                    self.tables.endpoints.delete(&ip)?;
                }
            }
            let owned = self.tables.devices.get(&old.ifindex)?.is_some_and(|row| row.id == old.id);
            if owned && desired.is_none_or(|new| new.ifindex != old.ifindex) {
                self.tables.devices.delete(&old.ifindex)?;
            }
        }
        if let Some(new) = desired {
            for ip in [new.v4, new.v6] {
                if ip != Addr::UNSPECIFIED {
                    self.tables.endpoints.put(&ip, &new)?;
                }
            }
            self.tables.devices.put(&new.ifindex, &new)?;
        }
        Ok(())
    }

    async fn reconcile_routes(&mut self, now: Instant) {
        // A route can only be put where an old one does not stand in the way: removals first.
        let (removals, writes): (Vec<_>, Vec<_>) =
            self.rows.routes.due(now).into_iter().partition(|due| due.desired.is_none());
        for Due { key, desired, actual } in removals.into_iter().chain(writes) {
            let outcome = self.write_route(key, desired, actual).await;
            report("route", &key, &outcome);
            self.rows.routes.settle(&key, desired, outcome, now);
        }
    }

    async fn write_route(
        &mut self,
        network: IpNet,
        desired: Option<RouteRow>,
        actual: Option<RouteRow>,
    ) -> Result<(), SettingsError> {
        if let Some(old) = actual
            && desired.is_none_or(|new| new.route != old.route)
        {
            self.net.delete_route(&old.route).await?;
            if old.neighbour.is_some() {
                self.net.delete_neighbour(old.route.device, old.route.to).await?;
            }
        }
        let Some(new) = desired else {
            match self.settings.put_route_back(network).await {
                Ok(Some(foreign)) => tracing::info!(%foreign, "put back, as it was before a route of Cirri's"),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "a route that was there before one of Cirri's is lost"),
            }
            return Ok(());
        };
        if let Some(mac) = new.neighbour {
            let neighbour = Neighbour { ip: new.route.to, mac, device: new.route.device };
            self.net.put_neighbour(&neighbour).await?;
        }
        if !self.net.add_route(&new.route).await? {
            if let Some(foreign) = self.net.foreign_route(&new.route).await? {
                tracing::warn!(%foreign, "replaced by Cirri's; it is put back when that goes");
                self.settings.replace_route(network, &foreign)?;
            }
            self.net.put_route(&new.route).await?;
        }
        Ok(())
    }

    fn reconcile_attachments(&mut self, now: Instant) {
        for Due { key, desired, actual } in self.rows.attachments.due(now) {
            let outcome = self.write_attachment(&key, desired, actual);
            report("attachment", &key, &outcome);
            self.rows.attachments.settle(&key, desired, outcome, now);
        }
    }

    fn reconcile_per_packet(&mut self, now: Instant) {
        for Due { key, desired, .. } in self.rows.per_packet.due(now) {
            let outcome = match &desired {
                Some(value) => self.tables.per_packet.put(&key, value),
                None => self.tables.per_packet.delete(&key).map(drop),
            };
            report("per-packet", &key, &outcome);
            self.rows.per_packet.settle(&key, desired, outcome, now);
        }
    }

    /// Sockets are translated as soon as there is something to translate them with.
    fn reconcile_sockets(&mut self, now: Instant) {
        for Due { key, desired, .. } in self.rows.sockets.due(now) {
            let outcome = match desired.iter().flatten().next() {
                Some(cgroup) => self.datapath.attach_sockets(cgroup),
                None => self.datapath.detach_sockets().map(drop),
            };
            report("sockets", &key, &outcome);
            self.rows.sockets.settle(&key, desired, outcome, now);
        }
    }

    fn write_attachment(
        &mut self,
        device: &str,
        desired: Option<Attached>,
        actual: Option<Attached>,
    ) -> Result<(), cirri_loader::LoadError> {
        if let Some(old) = actual
            && desired.is_none_or(|new| new.ifindex != old.ifindex)
        {
            self.datapath.detach(old.ifindex)?;
            self.serving.edges.remove(device);
        }
        match desired.map(|new| new.role) {
            Some(Role::Workload) => self.datapath.attach_workload(device).map(drop),
            Some(Role::Network) => {
                self.datapath.attach_network(device)?;
                let reached = self.serving.edges.get(device).map(|edge| edge.mode);
                let wanted = wanted_edge(self.config.services.acceleration).again(reached);
                let edge = self.datapath.attach_edge(device, wanted)?;
                self.serving.edges.insert(device.to_owned(), edge);
                Ok(())
            }
            Some(Role::Overlay) => self.datapath.attach_overlay(device).map(drop),
            None => Ok(()),
        }
    }
}

fn wanted_edge(acceleration: Acceleration) -> EdgeWanted {
    match acceleration {
        Acceleration::Off => EdgeWanted::Off,
        Acceleration::Generic => EdgeWanted::Generic,
        Acceleration::Native => EdgeWanted::Native,
        Acceleration::BestEffort => EdgeWanted::BestEffort,
    }
}

fn is_world(identity: Identity) -> bool {
    [Identity::WORLD, Identity::WORLD_IPV4, Identity::WORLD_IPV6].contains(&identity)
}

/// How many of some rule sets, from the first on, become live together; at least one of any.
fn how_many_together(rulesets: &[(RulesetSlot, Arc<Rules>)]) -> usize {
    let sums = rulesets.iter().scan(0, |sum, (_, entries)| {
        *sum += entries.len();
        Some(*sum)
    });
    sums.take(TOGETHER).take_while(|sum| *sum <= ENTRIES_TOGETHER).count().max(1)
}

fn report<E: Display>(table: &str, key: &dyn Display, outcome: &Result<(), E>) {
    match outcome {
        Ok(()) => tracing::debug!(table, %key, "done"),
        Err(error) => tracing::warn!(table, %key, %error, "not done; it is tried again"),
    }
}
