//! The node's sides of workloads' devices, and workloads that went without a word.

use std::time::{Duration, Instant};

use cirri_abi::GATEWAY_MAC;
use cirri_loader::net::{Link, NetError};

use super::Findings;
use crate::agent::core::Core;
use crate::agent::endpoint::Endpoint;
use crate::agent::problems::Finding;
use crate::agent::{attach, start};
use crate::api::ProblemKind;
use crate::workload;

/// What is wrong with a device, and how to make it right.
enum Wrong<'a> {
    Name(&'a str),
    Bridge,
    Address,
    Mtu(u32),
    Alias,
    Down,
}

impl Core {
    /// Devices that are there are made right. One that is gone is named; if its namespace is gone as well,
    /// [`Core::release_gone`] takes the workload away after a grace time.
    pub(super) async fn compare_workloads(
        &mut self,
        links: &[Link],
        now: Instant,
        findings: &mut Findings,
    ) -> anyhow::Result<()> {
        let mut gone = Vec::new();
        for endpoint in self.endpoints.values().filter(|endpoint| endpoint.ifindex != 0) {
            let Some(link) = links.iter().find(|link| link.index == endpoint.ifindex) else {
                gone.push(endpoint.id);
                continue;
            };
            // One that an earlier version attached has none noted: what it has at the first look counts.
            let first = *self.drift.mtus.entry(link.index).or_insert(link.mtu);
            let mtu = if endpoint.mtu == 0 { first } else { endpoint.mtu };
            let object = &endpoint.host_ifname;
            if link.up && !link.carrier {
                let remedy =
                    format!("bring {} up in the container: nothing reaches it until then", endpoint.attachment.ifname);
                let finding = Finding::new("its other end, in the container, is down", remedy).wanted("up");
                findings.push((ProblemKind::Device, object.clone(), finding));
            }
            let Some(wrong) = wrong_with(link, endpoint, mtu) else { continue };
            let (found, wanted) = wrong.in_words(endpoint, link, mtu);
            if !self.drift.repair(ProblemKind::Device, object, &found, &wanted, now) {
                continue;
            }
            let repaired = async {
                match wrong {
                    Wrong::Name(name) => {
                        self.net.set_down(name).await?;
                        self.net.rename(name, object).await?;
                        self.net.set_up(object).await
                    }
                    Wrong::Bridge => self.net.unset_controller(object).await,
                    Wrong::Address => self.net.set_mac(object, GATEWAY_MAC).await,
                    Wrong::Mtu(mtu) => self.net.set_mtu(object, mtu).await,
                    Wrong::Alias => self.net.set_alias(link.index, &workload::owner(&endpoint.attachment)).await,
                    Wrong::Down => self.net.set_up(object).await,
                }
            };
            let outcome: Result<(), NetError> = repaired.await;
            if let Err(error) = outcome {
                let finding = Finding::new(format!("{found}; it cannot be made right: {error}"), "see `ip link`");
                findings.push((ProblemKind::Device, object.clone(), finding.wanted(wanted)));
            }
        }
        let is_there =
            |stray: &&Link| links.iter().any(|link| (link.index, &link.alias) == (stray.index, &stray.alias));
        for stray in self.strays.iter().filter(is_there) {
            let (object, finding) = start::stray(stray);
            findings.push((ProblemKind::Endpoint, object, finding));
        }
        let known: Vec<u32> = self.endpoints.values().map(|endpoint| endpoint.ifindex).collect();
        self.drift.mtus.retain(|ifindex, _| known.contains(ifindex));
        self.drift.gone.retain(|id, _| gone.contains(id));
        let grace = self.config.node.release_after_seconds;
        for id in gone {
            let Some(endpoint) = self.endpoints.get(&id) else { continue };
            self.drift.gone.entry(id).or_insert(now);
            let found = format!("its device {} is gone", endpoint.host_ifname);
            let finding = if self.way_into(endpoint, None).is_some() {
                Finding::new(found, "delete the container and add it again: its namespace lives, its device does not")
            } else {
                let found = format!("{found}, and so is its network namespace, and nobody said DEL");
                Finding::new(found, format!("none; its addresses are free again {grace} s after that"))
            };
            findings.push((ProblemKind::Endpoint, name(endpoint), finding.wanted("as it was attached")));
        }
        Ok(())
    }

    /// What is written about workloads is written again where it is gone: files, of which whole directories are looked
    /// for, and pins of what the kernel keeps.
    pub(super) fn compare_kept(&mut self, now: Instant) {
        let Core { endpoints, ledger, drift, .. } = self;
        for directory in ledger.directories().filter(|directory| !endpoints.is_empty() && !directory.exists()) {
            let object = directory.display().to_string();
            if !drift.repair(ProblemKind::File, &object, "it was removed", "what is known of each workload", now) {
                continue;
            }
            for endpoint in endpoints.values() {
                if let Err(error) = ledger.save(endpoint) {
                    tracing::warn!(endpoint = endpoint.id, %error, "it is not written anew");
                }
            }
        }
        for endpoint in endpoints.values() {
            let pin = ledger.pin(endpoint.id);
            let object = pin.display().to_string();
            if !pin.exists()
                && drift.repair(ProblemKind::Pin, &object, "it was removed", "pinned", now)
                && let Err(error) = ledger.save(endpoint)
            {
                tracing::warn!(endpoint = endpoint.id, %error, "it is not written anew");
            }
        }
    }

    /// Takes away workloads whose device and namespace have been gone for long; whether there were any.
    pub(super) async fn release_gone(&mut self, now: Instant) -> bool {
        let grace = Duration::from_secs(self.config.node.release_after_seconds);
        let over = self.drift.gone.iter().filter(|(_, since)| now.duration_since(**since) >= grace);
        let over: Vec<u16> = over.map(|(id, _)| *id).collect();
        let mut any = false;
        for id in over {
            // One that lost only its names, and lives by its processes, still has its device.
            let is_gone = |endpoint: &&Endpoint| self.way_into(endpoint, None).is_none();
            let Some(endpoint) = self.endpoints.get(&id).filter(is_gone) else { continue };
            let Endpoint { attachment, namespace, pod, .. } = endpoint.clone();
            tracing::warn!(endpoint = id, namespace, pod, "its network namespace is gone without DEL; it is released");
            match attach::remove(self, &attachment, None).await {
                Ok(_) => any |= self.drift.gone.remove(&id).is_some(),
                Err(error) => tracing::warn!(endpoint = id, %error, "it cannot be released; it is tried again"),
            }
        }
        any
    }
}

/// What a workload is called in status.
pub(super) fn name(endpoint: &Endpoint) -> String {
    format!("{}/{} ({})", endpoint.namespace, endpoint.pod, endpoint.attachment.container_id)
}

fn wrong_with<'a>(link: &'a Link, endpoint: &Endpoint, mtu: u32) -> Option<Wrong<'a>> {
    if link.name != endpoint.host_ifname {
        Some(Wrong::Name(&link.name))
    } else if link.controller.is_some() {
        Some(Wrong::Bridge)
    } else if link.mac != Some(GATEWAY_MAC) {
        Some(Wrong::Address)
    } else if link.mtu != mtu {
        Some(Wrong::Mtu(mtu))
    } else if link.alias != workload::owner(&endpoint.attachment) {
        Some(Wrong::Alias)
    } else if !link.up {
        Some(Wrong::Down)
    } else {
        None
    }
}

impl Wrong<'_> {
    fn in_words(&self, endpoint: &Endpoint, link: &Link, mtu: u32) -> (String, String) {
        match self {
            Wrong::Name(name) => (format!("it is called {name} now"), endpoint.host_ifname.clone()),
            Wrong::Bridge => ("it is a port of a bridge".to_owned(), "no bridge's port".to_owned()),
            Wrong::Address => {
                let shown = |mac| workload::mac_text(mac);
                let there = link.mac.map(shown).unwrap_or_default();
                (format!("its Ethernet address is {there}"), shown(GATEWAY_MAC))
            }
            Wrong::Mtu(_) => (format!("its MTU is {}", link.mtu), format!("MTU {mtu}")),
            Wrong::Alias => (format!("its alias is {:?}", link.alias), workload::owner(&endpoint.attachment)),
            Wrong::Down => ("it is down".to_owned(), "up".to_owned()),
        }
    }
}
