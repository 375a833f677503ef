//! Programs on devices and sockets, and the pins that keep them and their maps.

use std::collections::BTreeSet;
use std::time::Instant;

use cirri_loader::{Audit, EdgeMode, Misplaced, Place};

use super::Findings;
use crate::agent::core::Core;
use crate::agent::problems::Finding;
use crate::agent::rows::Role;
use crate::agent::services::SOCKETS;
use crate::api::ProblemKind;

/// Asked about each thing that is not as it was left, with what is found and what is wanted: whether it may be
/// made right now.
pub type Ask<'a> = dyn FnMut(ProblemKind, &str, &str, &str) -> bool + 'a;

/// What is to be done after programs and pins were compared: answers the places whose programs are to be attached
/// again. `name`: of a device, by its number.
pub fn judge(
    audit: Audit,
    name: impl Fn(u32) -> String,
    ask: &mut Ask<'_>,
    findings: &mut Findings,
) -> BTreeSet<Place> {
    let Audit { misplaced, repinned, unpinned, rewritten, taken } = audit;
    // Those are done and disturb nobody: they are not rationed, only said and counted.
    for pin in repinned {
        ask(ProblemKind::Pin, &pin, "it was removed", "pinned");
    }
    for entry in rewritten {
        ask(ProblemKind::Map, &entry, "it was altered", "as written");
    }
    for (pin, why) in unpinned {
        let remedy = "mount a BPF file system there, or restart with another bpf.pinRoot; without pins the packet path \
                      ends with this process";
        findings.push((ProblemKind::Pin, pin, Finding::new(format!("it cannot be pinned: {why}"), remedy)));
    }
    if let Some(instance) = taken {
        let remedy = "stop one of the two: each takes the other's programs away";
        let finding = Finding::new("its directory was removed, and another process has claimed the new one", remedy);
        findings.push((ProblemKind::Pin, instance, finding.wanted("this process's")));
    }
    let mut again = BTreeSet::new();
    for Misplaced { place, program, found } in misplaced {
        let name = place.device().map_or_else(|| "the cgroup's sockets".to_owned(), &name);
        if ask(ProblemKind::Program, &format!("{program} on {name}"), &found.to_string(), found.wanted()) {
            again.insert(place);
        }
    }
    again
}

impl Core {
    /// Programs that were taken off or replaced are attached again; pins that are gone are put back.
    pub(super) fn compare_programs(&mut self, now: Instant, findings: &mut Findings) -> anyhow::Result<()> {
        let places = self.places_of_programs();
        let audit = self.datapath.audit(&places)?;
        let Core { drift, rows, .. } = self;
        let name = |ifindex: u32| {
            let found = rows.attachments.iter().find(|(_, attached)| attached.ifindex == ifindex);
            found.map_or_else(|| ifindex.to_string(), |(device, _)| device.clone())
        };
        let mut ask = |what, object: &str, found: &str, wanted: &str| drift.repair(what, object, found, wanted, now);
        let again = judge(audit, name, &mut ask, findings);
        let devices: BTreeSet<Option<String>> = again.iter().map(|place| place.device().map(name)).collect();
        for device in devices {
            match device {
                Some(device) => rows.attachments.suspect(&device),
                None => rows.sockets.suspect(&SOCKETS),
            }
        }
        Ok(())
    }

    /// Where programs were put, as far as that is done.
    fn places_of_programs(&self) -> Vec<Place> {
        let mut places = Vec::new();
        for (device, attached) in self.rows.attachments.iter() {
            let done = self.rows.attachments.state(device).as_deref() == Some("done");
            if !done || !self.drift.present.contains(&attached.ifindex) {
                continue;
            }
            match attached.role {
                Role::Workload => places.push(Place::Workload(attached.ifindex)),
                Role::Overlay => places.push(Place::Overlay(attached.ifindex)),
                Role::Network => {
                    places.push(Place::Network(attached.ifindex));
                    if self.serving.edges.get(device).is_some_and(|edge| edge.mode != EdgeMode::Tc) {
                        places.push(Place::Edge(attached.ifindex));
                    }
                }
            }
        }
        let sockets = self.rows.sockets.desired(&SOCKETS).is_some_and(Option::is_some);
        if sockets && self.rows.sockets.state(&SOCKETS).as_deref() == Some("done") {
            places.push(Place::Sockets);
        }
        places
    }
}
