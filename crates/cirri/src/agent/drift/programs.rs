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

impl Core {
    /// Programs that were taken off or replaced are attached again; pins that are gone are put back.
    pub(super) fn compare_programs(&mut self, now: Instant, findings: &mut Findings) -> anyhow::Result<()> {
        let places = self.places_of_programs();
        let Audit { misplaced, repinned, unpinned } = self.datapath.audit(&places)?;
        for pin in repinned {
            // Putting back a pin disturbs nobody: it is not rationed, only said and counted.
            self.drift.repair(ProblemKind::Pin, &pin, "it was removed", "pinned", now);
        }
        for (pin, why) in unpinned {
            let remedy = "mount a BPF file system there, or restart the agent with another bpf.pinRoot; without pins \
                          the packet path ends with the agent";
            findings.push((ProblemKind::Pin, pin, Finding::new(format!("it cannot be pinned: {why}"), remedy)));
        }
        let mut devices = BTreeSet::new();
        for Misplaced { place, program, found } in misplaced {
            let (ifindex, name) = match place {
                Place::Sockets => (0, "the cgroup's sockets".to_owned()),
                Place::Workload(ifindex)
                | Place::Network(ifindex)
                | Place::Edge(ifindex)
                | Place::Overlay(ifindex)
                | Place::Unwrap(ifindex) => (ifindex, self.device_name(ifindex)),
            };
            let object = format!("{program} on {name}");
            if !self.drift.repair(ProblemKind::Program, &object, &found.to_string(), "attached", now) {
                continue;
            }
            if ifindex == 0 {
                self.rows.sockets.suspect(&SOCKETS);
            } else {
                devices.insert(name);
            }
        }
        for device in devices {
            self.rows.attachments.suspect(&device);
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

    fn device_name(&self, ifindex: u32) -> String {
        let found = self.rows.attachments.iter().find(|(_, attached)| attached.ifindex == ifindex);
        found.map_or_else(|| ifindex.to_string(), |(device, _)| device.clone())
    }
}
