//! The kernel as others leave it: what the agent made there is watched, compared again at intervals, and
//! made right, or named in `cirri status` if that cannot be.
//!
//! The kernel tells of devices, addresses, routes, neighbours and rules ([`NetworkNews`]); of programs, pins,
//! maps and settings it tells nothing, so these are looked at every [`EVERY`], the others too now and then.
//! Nothing is decided here about what should be there: rows that differ become work for the reconcilers again.
//!
//! Two who manage the same thing could repair it for ever, so repairs of one thing are rationed ([`Repairs`]).
//! Until it has been left alone for a while it is a problem of status.

mod containers;
mod devices;
mod files;
mod programs;
mod records;
mod repairs;
mod routes;
mod settings;
mod tables;
mod workloads;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cirri_abi::RulesetSlot;
use cirri_loader::net::{Changed, NetworkNews, Watched};

use super::Shared;
use super::core::Core;
use super::problems::Finding;
use crate::api::ProblemKind;
use crate::listener::ServerSocket;

pub use containers::Containers;
pub use files::{Instead, OpenFile};
pub use programs::judge;
pub use records::Mend;
pub use repairs::Repairs;
use routes::Strangers;

/// How often that is looked at of which the kernel tells nothing.
pub const EVERY: Duration = Duration::from_secs(3);
/// How many times more rarely the network is compared unasked.
const NETWORK: u32 = 8;
/// At least this many times as long as it took to compare the maps passes before they are compared again: on a node
/// with ten thousand services it takes longer.
const IDLE: u32 = 1000;
/// The longest that may become.
const RARELY: Duration = Duration::from_secs(60);
/// How long news are gathered: daemons change things in bursts.
const BURST: Duration = Duration::from_millis(20);
/// After news nothing is compared for this many times as long as the comparison took: there may be more and more.
const BUSY: u32 = 20;

/// What is known about how the kernel drifts.
#[derive(Debug, Default)]
pub struct Drift {
    /// What was repaired.
    repairs: Repairs,
    /// How often the maps are compared.
    maps: Pace,
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
    /// Whether the store had news of what this node wrote there, since it was compared last.
    pub stored: bool,
    /// Files that are kept open.
    pub files: Vec<OpenFile>,
    /// Those of them that were removed.
    removed: Vec<PathBuf>,
    /// The socket, once there is one.
    pub server_socket: Option<Arc<ServerSocket>>,
    /// Networks of others' routes inside networks of ours.
    strangers: Strangers,
    /// What is heard from inside of containers.
    pub containers: Containers,
    /// Since when workloads have no device any more.
    gone: BTreeMap<u16, Instant>,
}

/// How often something is compared that may take long.
#[derive(Debug, Default)]
pub struct Pace {
    next: Option<Instant>,
}

impl Pace {
    /// Whether it is time.
    pub fn is_due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| next <= now)
    }

    /// It was compared, and took that much processor time.
    pub fn took(&mut self, now: Instant, took: Duration) {
        self.next = Some(now + took.saturating_mul(IDLE).min(RARELY));
    }
}

/// What a comparison found that it does not repair.
pub type Findings = Vec<(ProblemKind, String, Finding)>;

/// Looks after the kernel, for ever.
pub async fn watch(shared: Arc<Shared>, mut news: NetworkNews) {
    let mut next = Instant::now() + EVERY;
    let mut deaf = false;
    let mut round = 0u32;
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
            () = tokio::time::sleep_until(next.into()) => None,
        };
        let mut by = 0;
        let mut strangers = deaf;
        if let Some(change) = told {
            tokio::time::sleep(BURST).await;
            let mut next = Some(change);
            while let Some(change) = next {
                by = if change.by == 0 { by } else { change.by };
                strangers |= matches!(change.what, Changed::Stranger | Changed::Unknown);
                next = news.known();
            }
        }
        let rest = Instant::now() >= next;
        round = round.wrapping_add(rest.into());
        let network = told.is_some() || deaf || round.is_multiple_of(NETWORK);
        let took = shared.compare(network, rest, strangers, by).await;
        if network {
            news.watch(shared.core.lock().await.watched());
        }
        tracing::debug!(?took, network, rest, "compared");
        if rest {
            next = Instant::now() + EVERY;
        }
        if told.is_some() {
            // The news of our own repairs are among the next ones.
            tokio::time::sleep(took.saturating_mul(BUSY).min(EVERY)).await;
        }
    }
}

impl Shared {
    /// Compares the network, the rest, or both, and wakes those who make it right. Answers how much processor time
    /// that took.
    async fn compare(self: &Arc<Self>, network: bool, rest: bool, strangers: bool, by: u32) -> Duration {
        let mut core = self.core.lock().await;
        let (now, began) = (Instant::now(), cpu_time());
        if strangers {
            core.drift.strangers.suspect();
        }
        if by != 0 {
            core.drift.changed_by = by;
        }
        // What is held back may be repaired, or be right again, without any news.
        let network = network || core.drift.repairs.next_look().is_some_and(|look| look <= now);
        let mut outcome = if network { core.compare_network(now).await } else { Ok(()) };
        if rest {
            outcome = outcome.and(core.compare_rest(now));
            if core.release_gone(now).await {
                // Who is gone for good is no problem any more.
                outcome = outcome.and(core.compare_network(now).await);
            }
        }
        if rest {
            self.follow_containers(&mut core);
        }
        core.compare_stored(now);
        if let Err(error) = outcome {
            tracing::warn!(%error, "the kernel cannot be compared with what should be there; it is tried again");
        }
        let work = !core.rows.is_done() || !core.serving.is_done() || !core.mends.is_empty();
        drop(core);
        self.write_removed().await;
        if work {
            self.desired();
        }
        cpu_time().saturating_sub(began)
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
        self.compare_containers(&links, &mut findings);
        self.compare_addresses(&mut findings).await?;
        self.desire();
        if self.filled {
            self.compare_routes(now, &mut findings).await?;
        }
        let kinds = [ProblemKind::Device, ProblemKind::Endpoint, ProblemKind::Address, ProblemKind::Route];
        self.note_drift(&kinds, findings, now);
        Ok(())
    }

    /// What of the many neighbours and routes of a node may be changed to Cirri's harm.
    fn watched(&self) -> Watched {
        let neighbours = self.rows.routes.iter().filter(|(_, row)| row.neighbour.is_some());
        let neighbours = neighbours.map(|(net, row)| (row.route.device, net.addr())).collect();
        Watched { neighbours, networks: self.networks() }
    }

    /// What the kernel tells nothing about. What cannot be compared keeps nothing else from it.
    fn compare_rest(&mut self, now: Instant) -> anyhow::Result<()> {
        let mut findings = Findings::new();
        let mut outcome = self.compare_settings(now, &mut findings);
        self.compare_files(now, &mut findings);
        let mut kinds = vec![ProblemKind::Setting, ProblemKind::File];
        if self.filled {
            outcome = outcome.and(self.compare_programs(now, &mut findings));
            self.compare_kept(now);
            kinds.extend([ProblemKind::Program, ProblemKind::Pin]);
            if self.drift.maps.is_due(now) {
                let began = cpu_time();
                outcome = outcome.and(self.compare_tables(now));
                self.drift.maps.took(now, cpu_time().saturating_sub(began));
                kinds.push(ProblemKind::Map);
            }
        }
        self.note_drift(&kinds, findings, now);
        outcome
    }

    /// Says what was found of these kinds, and what is held back.
    fn note_drift(&mut self, kinds: &[ProblemKind], findings: Findings, now: Instant) {
        for kind in kinds {
            let held = self.drift.repairs.held(*kind, now);
            let found = findings.iter().filter(|(of, ..)| of == kind);
            let found = found.map(|(_, object, finding)| (object.clone(), finding.clone()));
            // Of one thing, that somebody changes it again and again says more than what it is now.
            self.problems.replace(*kind, found.chain(held).collect::<Vec<_>>());
        }
    }

    /// Repairs since the start, by kind.
    pub fn repaired(&self) -> BTreeMap<ProblemKind, u64> {
        self.drift.repairs.count()
    }
}

impl Drift {
    /// Something is not as it was left; whether it may be repaired now. Says so in the log and counts it.
    fn repair(&mut self, what: ProblemKind, object: &str, found: &str, wanted: &str, now: Instant) -> bool {
        self.repairs.ask(what, object, [found, wanted], &process_name(self.changed_by), now)
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
pub fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.try_into().unwrap_or_default(), now.tv_nsec.try_into().unwrap_or_default())
}
