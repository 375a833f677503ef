//! The kernel as others leave it: what the agent made there is watched, compared again at intervals, and
//! made right, or named in `cirri status` if that cannot be.
//!
//! The kernel tells of devices, addresses, routes, neighbours and rules ([`NetworkNews`]); of programs, pins,
//! maps and settings it tells nothing, so these are looked at every [`EVERY`], the others too now and then. Nothing is decided here
//! about what should be there: rows that differ become work for the reconcilers again.
//!
//! Two who manage the same thing could repair it for ever, so repairs of one thing are rationed: a few at
//! once, then one every [`REFILL`]. Until it has been left alone for a while it is a problem of status.

mod devices;
mod programs;
mod routes;
mod settings;
mod tables;
mod workloads;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cirri_abi::RulesetSlot;
use cirri_loader::net::NetworkNews;

use super::Shared;
use super::core::Core;
use super::problems::Finding;
use crate::api::ProblemKind;

/// How often that is looked at of which the kernel tells nothing.
const EVERY: Duration = Duration::from_secs(2);
/// How many times more rarely the network is compared unasked.
const NETWORK: u32 = 8;
/// At least this many times as long as a comparison took passes before the next one: on a node with ten thousand
/// services it takes longer.
const IDLE: u32 = 500;
/// The longest that may become.
const RARELY: Duration = Duration::from_secs(60);
/// How long news are gathered: daemons change things in bursts.
const BURST: Duration = Duration::from_millis(20);
/// The same for news that come again and again: as many times as long as a comparison took.
const BUSY: u32 = 20;
/// How many times one thing is repaired at once.
const ALLOWANCE: u32 = 5;
/// How often after that.
const REFILL: Duration = Duration::from_secs(10);

/// What is known about how the kernel drifts.
#[derive(Debug, Default)]
pub struct Drift {
    /// Things that were repaired lately.
    repairs: BTreeMap<(ProblemKind, String), Repairs>,
    /// Repairs since the start, by kind.
    repaired: BTreeMap<ProblemKind, u64>,
    /// Who changed the network last, as far as the kernel says: a process.
    changed_by: u32,
    /// The kernel's numbers of rule sets that were read and are right.
    rulesets: BTreeMap<RulesetSlot, u32>,
    /// Sizes of workloads' devices as they were first seen, by the device's number.
    mtus: BTreeMap<u32, u32>,
    /// Devices that were there at the last look, by number.
    present: BTreeSet<u32>,
    /// Those of them that were up.
    up: BTreeSet<u32>,
    /// Since when workloads have no device any more.
    gone: BTreeMap<u16, Instant>,
}

#[derive(Debug)]
struct Repairs {
    /// How many may still be made.
    left: u32,
    /// When the last one was added to these.
    refilled: Instant,
    /// All of them.
    count: u64,
    /// What is wrong, as long as it is held back.
    held: Option<Finding>,
}

/// What a comparison found that it does not repair.
type Findings = Vec<(ProblemKind, String, Finding)>;

/// Looks after the kernel, for ever.
pub async fn watch(shared: Arc<Shared>, mut news: NetworkNews) {
    let mut pause = EVERY;
    let mut next = tokio::time::Instant::now() + EVERY;
    let mut deaf = false;
    let mut round = u32::MAX;
    loop {
        let told = tokio::select! {
            change = news.next(), if !deaf => match change {
                Some(change) => Some(change),
                None => {
                    tracing::error!("the network is not watched any more; it is compared every {} s", EVERY.as_secs());
                    deaf = true;
                    continue;
                }
            },
            () = tokio::time::sleep_until(next) => None,
        };
        let mut by = 0;
        if let Some(change) = told {
            tokio::time::sleep(pause.min(BURST)).await;
            by = change.by;
            while let Some(change) = news.known() {
                by = if change.by == 0 { by } else { change.by };
            }
        }
        let began = cpu_time();
        let rest = told.is_none();
        round = if rest { round.wrapping_add(1) } else { round };
        let network = !rest || deaf || round.is_multiple_of(NETWORK);
        shared.compare(network, rest, by).await;
        let took = cpu_time().saturating_sub(began);
        if rest {
            next = tokio::time::Instant::now() + took.saturating_mul(IDLE).clamp(EVERY, RARELY);
        } else {
            // The news of our own repairs are among the next ones.
            pause = BURST;
            tokio::time::sleep(took.saturating_mul(BUSY).min(EVERY)).await;
        }
    }
}

impl Shared {
    /// Compares the network, the rest, or both, and wakes those who make it right.
    async fn compare(self: &Arc<Self>, network: bool, rest: bool, by: u32) {
        let now = Instant::now();
        let mut core = self.core.lock().await;
        if by != 0 {
            core.drift.changed_by = by;
        }
        let mut outcome = if network { core.compare_network(now).await } else { Ok(()) };
        if rest && outcome.is_ok() {
            outcome = core.compare_rest(now);
            if core.release_gone(now).await {
                // Who is gone for good is no problem any more.
                outcome = outcome.and(core.compare_network(now).await);
            }
        }
        if let Err(error) = outcome {
            tracing::warn!(%error, "the kernel cannot be compared with what should be there; it is tried again");
        }
        let work = !core.rows.is_done() || !core.serving.is_done();
        drop(core);
        if work {
            self.desired();
        }
    }
}

impl Core {
    /// Devices, addresses, routes, neighbours, rules.
    async fn compare_network(&mut self, now: Instant) -> anyhow::Result<()> {
        let mut findings = Findings::new();
        let links = self.net.links().await?;
        self.drift.present = links.iter().map(|link| link.index).collect();
        self.drift.up = links.iter().filter(|link| link.up).map(|link| link.index).collect();
        self.compare_devices(&links, now, &mut findings).await?;
        self.compare_workloads(&links, now, &mut findings).await?;
        self.compare_addresses(&mut findings).await?;
        self.desire();
        if self.filled {
            self.compare_routes(now, &mut findings).await?;
        }
        let kinds = [ProblemKind::Device, ProblemKind::Endpoint, ProblemKind::Address, ProblemKind::Route];
        self.note_drift(&kinds, findings, now);
        Ok(())
    }

    /// What the kernel tells nothing about.
    fn compare_rest(&mut self, now: Instant) -> anyhow::Result<()> {
        let mut findings = Findings::new();
        self.compare_settings(now, &mut findings)?;
        if self.filled {
            self.compare_tables(now)?;
            self.compare_programs(now, &mut findings)?;
        }
        let kinds = [ProblemKind::Setting, ProblemKind::Map, ProblemKind::Program, ProblemKind::Pin];
        self.note_drift(&kinds, findings, now);
        Ok(())
    }

    /// Says what was found of these kinds, and what is held back.
    fn note_drift(&mut self, kinds: &[ProblemKind], findings: Findings, now: Instant) {
        self.drift.repairs.retain(|_, repairs| !repairs.is_over(now));
        for kind in kinds {
            let held = self.drift.repairs.iter().filter(|((of, _), _)| of == kind);
            let held = held.filter_map(|((_, object), repairs)| Some((object.clone(), repairs.held.clone()?)));
            let found = findings.iter().filter(|(of, ..)| of == kind);
            let found = found.map(|(_, object, finding)| (object.clone(), finding.clone()));
            // Of one thing, that somebody changes it again and again says more than what it is now.
            self.problems.replace(*kind, found.chain(held).collect::<Vec<_>>());
        }
    }

    /// Repairs since the start, by kind.
    pub fn repaired(&self) -> BTreeMap<ProblemKind, u64> {
        self.drift.repaired.clone()
    }
}

impl Drift {
    /// Something is not as it was left; whether it may be repaired now. Says so in the log and counts it.
    fn repair(&mut self, what: ProblemKind, object: &str, found: &str, wanted: &str, now: Instant) -> bool {
        let repairs = self.repairs.entry((what, object.to_owned())).or_insert_with(|| Repairs {
            left: ALLOWANCE,
            refilled: now,
            count: 0,
            held: None,
        });
        repairs.refill(now);
        let by = process_name(self.changed_by);
        if repairs.left == 0 {
            let count = repairs.count;
            if repairs.held.is_none() {
                tracing::error!(%what, object, found, wanted, count, by, "changed again and again; repaired less often");
            }
            let remedy = format!(
                "it was repaired {count} times, and somebody{} changes it again and again: find out who, and stop that",
                if by.is_empty() { String::new() } else { format!(" (the last one to change the network was {by})") }
            );
            repairs.held = Some(Finding::new(found, remedy).wanted(wanted));
            return false;
        }
        repairs.left -= 1;
        repairs.count += 1;
        *self.repaired.entry(what).or_default() += 1;
        tracing::warn!(%what, object, found, wanted, by, "drift: it is made right");
        true
    }
}

impl Repairs {
    fn refill(&mut self, now: Instant) {
        while self.left < ALLOWANCE && now.duration_since(self.refilled) >= REFILL {
            self.left += 1;
            self.refilled += REFILL;
        }
        if self.left == ALLOWANCE {
            self.refilled = now;
        }
    }

    /// Whether it has been left alone for long.
    fn is_over(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.left == ALLOWANCE
    }
}

/// `name (pid)` of a process that still runs; else nothing. The agent itself is not named.
fn process_name(pid: u32) -> String {
    if pid == 0 || pid == std::process::id() {
        return String::new();
    }
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    comm.map(|name| format!("{} ({pid})", name.trim())).unwrap_or_default()
}

/// Processor time of this thread.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.try_into().unwrap_or_default(), now.tv_nsec.try_into().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repairs_of_one_thing_are_rationed_named_and_forgotten_when_it_is_left_alone() {
        let start = Instant::now();
        let mut drift = Drift::default();
        let repair = |drift: &mut Drift, object: &str, at: u64| {
            drift.repair(ProblemKind::Route, object, "gone", "there", start + Duration::from_millis(at))
        };
        let made = (0..100).filter(|step| repair(&mut drift, "a", step * 100)).count();
        assert_eq!(made, ALLOWANCE as usize, "within {REFILL:?}");
        assert!(repair(&mut drift, "b", 9_900), "another thing has nothing to do with it");
        let key = (ProblemKind::Route, "a".to_owned());
        let held = drift.repairs[&key].held.clone().unwrap();
        assert!(held.remedy.contains("5 times") && held.found == "gone" && held.wanted == "there", "{held:?}");
        assert!(repair(&mut drift, "a", 10_100) && !repair(&mut drift, "a", 10_200), "one every {REFILL:?}");
        assert_eq!(drift.repaired[&ProblemKind::Route], 7);
        let over =
            |drift: &mut Drift, at| drift.repairs.get_mut(&key).unwrap().is_over(start + Duration::from_secs(at));
        assert!(!over(&mut drift, 50) && over(&mut drift, 80));
    }
}
