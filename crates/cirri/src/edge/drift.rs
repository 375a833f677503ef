//! The kernel as others leave it: what the load balancer made there is compared again and again, and made right or
//! named in `cirri lb status`. Devices and addresses are the administrator's: see [`super::follow`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use cirri_loader::Place;

use super::core::Core;
use super::{Here, Shared};
use crate::agent::{COMPARE_EVERY, Finding, Findings, Pace, Problems, Reach, Repairs, cpu_time, judge_programs};
use crate::api::{Problem, ProblemKind};
use crate::listener::ServerSocket;

/// What is known about how the kernel drifts.
#[derive(Debug, Default)]
pub struct Drift {
    repairs: Repairs,
    problems: Problems,
    maps: Pace,
    /// How often the maps were compared.
    compared: u32,
    /// The socket, once there is one.
    server_socket: Option<Arc<ServerSocket>>,
}

/// Maps are compared whole once in so many times: that costs what they can hold, and an idle load balancer is to be idle.
const WHOLE: u32 = 4;

impl Drift {
    /// What is not well.
    pub fn problems(&self) -> Vec<Problem> {
        self.problems.list()
    }

    /// This socket is looked after from now on.
    pub fn watch(&mut self, server_socket: Arc<ServerSocket>) {
        self.server_socket = Some(server_socket);
    }

    /// Of this kind there are exactly these problems, by object. The new ones are said in the log.
    pub fn name(&mut self, kind: ProblemKind, findings: impl IntoIterator<Item = (String, Finding)>) {
        let before: BTreeSet<String> = self.problems.list().into_iter().map(|it| it.object).collect();
        self.problems.replace(kind, findings);
        for problem in self.problems.list().iter().filter(|it| it.what == kind && !before.contains(&it.object)) {
            tracing::warn!(%problem, "named in status until it is well");
        }
    }

    /// Repairs since the start, by kind.
    pub fn repaired(&self) -> BTreeMap<ProblemKind, u64> {
        self.repairs.count()
    }
}

/// Looks after the kernel, for ever. It tells nothing of what is compared here.
pub async fn watch(shared: Arc<Shared>) {
    let mut pause = tokio::time::interval(COMPARE_EVERY);
    pause.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        pause.tick().await;
        let mut here = shared.machine.lock().await;
        let mut core = shared.core.lock().await;
        if let Err(error) = compare(&mut here, &mut core, Instant::now()).await {
            tracing::warn!(%error, "the kernel cannot be compared with what should be there; it is tried again");
            shared.wake.notify_one();
        }
    }
}

/// What cannot be compared keeps nothing else from it.
async fn compare(here: &mut Here, core: &mut Core, now: Instant) -> anyhow::Result<()> {
    let mut findings = Findings::new();
    let mut kinds = vec![ProblemKind::Setting, ProblemKind::Program, ProblemKind::Pin, ProblemKind::File];
    if let Some(server_socket) = &here.drift.server_socket {
        server_socket
            .look(|object, texts| here.drift.repairs.ask(ProblemKind::File, object, texts, "", now), &mut findings);
    }
    let programs = compare_programs(here, core, now, &mut findings).await;
    let mut outcome = compare_settings(here, core, now, &mut findings).await.and(programs);
    // Rows that the kernel refused are tried again by others.
    if core.behind.is_none() && here.drift.maps.is_due(now) {
        let began = cpu_time();
        outcome = outcome.and(compare_maps(here, core, now));
        here.drift.maps.took(now, cpu_time().saturating_sub(began));
        kinds.push(ProblemKind::Map);
    }
    for kind in kinds {
        let held = here.drift.repairs.held(kind, now);
        let found = findings.iter().filter(|(of, ..)| *of == kind);
        let found: Vec<_> = found.map(|(_, object, finding)| (object.clone(), finding.clone())).collect();
        here.drift.problems.replace(kind, found.into_iter().chain(held));
    }
    outcome
}

async fn compare_settings(here: &mut Here, core: &Core, now: Instant, findings: &mut Findings) -> anyhow::Result<()> {
    if let Some(record) = here.settings.lost_record()? {
        let texts = ["what was before this one's changes does not stand there any more", "as recorded"];
        if here.drift.repairs.ask(ProblemKind::Setting, &record.display().to_string(), texts, "", now) {
            here.settings.record_again()?;
        }
    }
    let mut drifted = here.settings.drifted(&[])?;
    if !drifted.is_empty() {
        // The settings of a device that was made anew are fresh, and its news may be on the way still.
        here.look(core).await;
        drifted = here.settings.drifted(&[])?;
    }
    for drifted in drifted {
        let texts = [drifted.found.as_str(), drifted.wanted.as_str()];
        if !here.drift.repairs.ask(ProblemKind::Setting, &drifted.name, texts, "", now) {
            continue;
        }
        if let Err(error) = here.settings.restore(&drifted) {
            let found = format!("{}; it cannot be written: {error}", drifted.found);
            let finding = Finding::new(found, "see whether /proc/sys can be written").wanted(drifted.wanted);
            findings.push((ProblemKind::Setting, drifted.name, finding));
        }
    }
    Ok(())
}

async fn compare_programs(here: &mut Here, core: &Core, now: Instant, findings: &mut Findings) -> anyhow::Result<()> {
    let places: Vec<Place> = here.attached.places().collect();
    let mut audit = here.datapath.audit(&places)?;
    // A device that went took its programs along, and its news may be on the way still. Also what could not be attached
    // last time: the kernel does not tell when it could.
    if !audit.misplaced.is_empty() || here.attached.is_lacking(&here.machine) {
        here.look(core).await;
    }
    let Here { settings, datapath, machine, attached, drift, trouble, .. } = here;
    let there: BTreeSet<Place> = attached.places().collect();
    audit.misplaced.retain(|it| there.contains(&it.place));
    let mut ask =
        |what, object: &str, found: &str, wanted: &str| drift.repairs.ask(what, object, [found, wanted], "", now);
    let again = judge_programs(audit, |ifindex| attached.name(ifindex), &mut ask, findings);
    for ifindex in again.iter().filter_map(Place::device) {
        attached.suspect(ifindex);
    }
    if !again.is_empty() {
        *trouble = attached.follow(&core.plan, machine, datapath, settings).err().map(|error| error.to_string());
    }
    for (device, why) in attached.fallen() {
        let remedy = format!(
            "make room for it (another program goes with `ip link set dev {device} xdp off`), or say `acceleration: \
             off`; tc serves the device until then, and it is tried again by itself"
        );
        findings.push((ProblemKind::Program, device.clone(), Finding::new(why.clone(), remedy)));
    }
    Ok(())
}

fn compare_maps(here: &mut Here, core: &mut Core, now: Instant) -> anyhow::Result<()> {
    let Here { machine, drift, .. } = here;
    let mut ask =
        |object: &str, found: &str, wanted: &str| drift.repairs.ask(ProblemKind::Map, object, [found, wanted], "", now);
    if machine.tell(&core.plan, &core.tables)? {
        // It is done, and disturbs nobody: it is only said and counted.
        ask("NODE and IPCACHE", "altered", "as written");
    }
    for (slot, there, written) in core.tables.altered_epochs()? {
        if ask(&format!("EPOCHS {slot}"), &there.to_string(), &written.to_string()) {
            core.tables.renew_epoch(slot)?;
        }
    }
    let reach = if drift.compared.is_multiple_of(WHOLE) { Reach::Whole } else { Reach::Written };
    drift.compared = drift.compared.wrapping_add(1);
    core.repair(reach, |object, found| ask(object, found, "as written"))?;
    Ok(())
}
