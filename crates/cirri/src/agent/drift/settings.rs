//! Settings of the kernel.

use std::time::Instant;

use super::Findings;
use crate::agent::core::Core;
use crate::agent::node;
use crate::agent::problems::Finding;
use crate::api::ProblemKind;

impl Core {
    /// Settings that somebody changed are changed back.
    pub(super) fn compare_settings(&mut self, now: Instant, findings: &mut Findings) -> anyhow::Result<()> {
        let v6 = node::has_ipv6(&self.net);
        let devices = self.endpoints.values().map(|endpoint| endpoint.host_ifname.as_str());
        let overlay = self.node.overlay.iter().map(|link| link.name.as_str());
        let ours: Vec<_> = devices.chain(overlay).flat_map(|device| node::quiet_settings(device, v6)).collect();
        for drifted in self.settings.drifted(&ours)? {
            if !self.drift.repair(ProblemKind::Setting, &drifted.name, &drifted.found, &drifted.wanted, now) {
                continue;
            }
            if let Err(error) = self.settings.restore(&drifted) {
                let found = format!("{}; it cannot be written: {error}", drifted.found);
                let finding = Finding::new(found, "see whether /proc/sys can be written").wanted(drifted.wanted);
                findings.push((ProblemKind::Setting, drifted.name, finding));
            }
        }
        Ok(())
    }
}
