//! Settings of the kernel.

use std::time::Instant;

use cirri_loader::net::DeviceSettings;

use super::Findings;
use crate::agent::core::Core;
use crate::agent::node;
use crate::agent::problems::Finding;
use crate::api::ProblemKind;
use crate::settings::Drifted;

impl Core {
    /// Settings that somebody changed are changed back.
    pub(super) fn compare_settings(&mut self, now: Instant, findings: &mut Findings) -> anyhow::Result<()> {
        let v6 = node::has_ipv6(&self.net);
        let devices = self.endpoints.values().map(|it| (it.host_ifname.as_str(), it.ifindex, it.mtu));
        let overlay = self.node.overlay.iter().map(|link| (link.name.as_str(), link.index, self.node.mtu));
        let devices: Vec<(&str, u32, u32)> = devices.chain(overlay).collect();
        // What the kernel tells of all devices at once needs no look into a file of each.
        let told = self.net.device_settings(v6)?;
        let mut drifted: Vec<Drifted> =
            devices.iter().flat_map(|(name, index, _)| told_of(name, told.get(index))).collect();
        let is_told =
            |(setting, _): &(String, &str)| setting.ends_with("/forwarding") || setting.ends_with("/rp_filter");
        // Of one that an earlier version attached no MTU is noted.
        let has_v6 = |mtu: u32| v6 && (mtu == 0 || mtu >= node::IPV6_MTU);
        let ours = devices.iter().flat_map(|(name, _, mtu)| node::quiet_settings(name, has_v6(*mtu)));
        let ours: Vec<_> = ours.filter(|setting| !is_told(setting)).collect();
        drifted.extend(self.settings.drifted(&ours)?);
        if let Some(record) = self.settings.lost_record()? {
            let object = record.display().to_string();
            let found = "what was before this agent's changes does not stand there any more";
            if self.drift.repair(ProblemKind::Setting, &object, found, "as recorded", now) {
                self.settings.record_again()?;
            }
        }
        for drifted in drifted {
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

/// What is not as it should be of a device's settings, as far as the kernel told them; nothing of one that is gone.
fn told_of(device: &str, told: Option<&DeviceSettings>) -> Vec<Drifted> {
    let Some(told) = told else { return Vec::new() };
    let all = [
        (node::rp_filter(device), told.rp_filter, 0),
        (node::forwarding(device, false), told.forwarding_v4, 1),
        (node::forwarding(device, true), told.forwarding_v6, 1),
    ];
    let differ = all.into_iter().filter_map(|(name, found, wanted)| Some((name, found?, wanted)));
    let differ = differ.filter(|(_, found, wanted)| found != wanted);
    differ.map(|(name, found, wanted)| Drifted { name, found: found.to_string(), wanted: wanted.to_string() }).collect()
}
