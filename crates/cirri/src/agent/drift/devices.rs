//! The node's own devices, the overlay's, and the node's addresses.

use std::net::IpAddr;
use std::time::Instant;

use cirri_loader::net::Link;

use super::Findings;
use crate::agent::core::Core;
use crate::agent::node::{self, OVERLAY};
use crate::agent::problems::Finding;
use crate::api::ProblemKind;
use crate::config::RoutingMode;

impl Core {
    /// The devices that lead to the network are the administrator's: what is wrong with them is said, and one
    /// that comes back is taken up again. The overlay's is ours: it is made right.
    pub(super) async fn compare_devices(
        &mut self,
        links: &[Link],
        now: Instant,
        findings: &mut Findings,
    ) -> anyhow::Result<()> {
        self.follow_node_devices(links, findings)?;
        if self.config.routing.mode == RoutingMode::Overlay {
            self.compare_overlay(links, now, findings).await?;
        }
        Ok(())
    }

    fn follow_node_devices(&mut self, links: &[Link], findings: &mut Findings) -> anyhow::Result<()> {
        let mut moved = false;
        for known in &mut self.node.devices {
            let wanted = format!("{} up, with number {}", known.name, known.index);
            let mut note = |found: String, remedy: &str| {
                let finding = Finding::new(found, remedy).wanted(wanted.clone());
                findings.push((ProblemKind::Device, known.name.clone(), finding));
            };
            let renamed = links.iter().find(|link| link.index == known.index && link.name != known.name);
            match links.iter().find(|link| link.name == known.name) {
                Some(link) => {
                    if !link.up {
                        note("it is down".to_owned(), "bring it up; nothing leaves the node by it until then");
                    } else if !link.carrier {
                        note("it has no carrier".to_owned(), "see its cable, or its other end: nothing leaves by it");
                    }
                    if link.index != known.index {
                        tracing::warn!(device = known.name, was = known.index, now = link.index, "device is back");
                        if self.node.uplink == known.index {
                            self.node.uplink = link.index;
                        }
                        // Its settings are fresh, too.
                        for (setting, value) in node::device_settings(&known.name, self.node.v6.is_some()) {
                            self.settings.set(&setting, value)?;
                        }
                        moved = true;
                    }
                    known.clone_from(link);
                }
                None if let Some(link) = renamed => note(
                    format!("it is called {} now", link.name),
                    "give it its name back, or correct node.devices and restart the agent",
                ),
                None => note("it is gone".to_owned(), "bring it back; it is taken up again by itself"),
            }
        }
        if moved {
            self.touch();
        }
        Ok(())
    }

    async fn compare_overlay(&mut self, links: &[Link], now: Instant, findings: &mut Findings) -> anyhow::Result<()> {
        let known = self.node.overlay.as_ref().map_or(0, |link| link.index);
        let here = links.iter().find(|link| link.name == OVERLAY);
        let by_number = links.iter().find(|link| link.index == known);
        let wanted = format!(
            "{OVERLAY}, a VXLAN device for UDP port {}, MTU {}, no ARP, up",
            cirri_abi::VXLAN_PORT,
            self.node.mtu
        );
        let found = match (here, by_number) {
            (None, None) => "it is gone".to_owned(),
            (None, Some(link)) => format!("it is called {} now", link.name),
            (Some(link), _) if !node::is_overlay(link) => format!("a device of kind {:?} made otherwise", link.kind),
            (Some(link), _) if link.controller.is_some() => "it is a port of a bridge".to_owned(),
            (Some(link), _) if link.mtu != self.node.mtu => format!("its MTU is {}", link.mtu),
            (Some(link), _) if !link.noarp => "it asks for Ethernet addresses".to_owned(),
            (Some(link), _) if !link.up => "it is down".to_owned(),
            (Some(link), _) if link.index != known => "it was made anew".to_owned(),
            (Some(_), _) => return Ok(()),
        };
        if !self.drift.repair(ProblemKind::Device, OVERLAY, &found, &wanted, now) {
            return Ok(());
        }
        let repaired = async {
            match (here, by_number) {
                (None, Some(link)) => {
                    // Before Linux 6.2 a device that is up keeps its name.
                    self.net.set_down(&link.name).await?;
                    self.net.rename(&link.name, OVERLAY).await?;
                }
                (Some(link), _) if !node::is_overlay(link) => drop(self.net.delete_link(OVERLAY).await?),
                (Some(link), _) if link.controller.is_some() => self.net.unset_controller(OVERLAY).await?,
                _ => {}
            }
            node::make_overlay(&self.net, self.node.mtu).await
        };
        match repaired.await {
            Ok(link) => {
                if link.index != known {
                    self.touch();
                }
                self.node.overlay = Some(link);
            }
            Err(error) => {
                let remedy =
                    "see what holds its name or its UDP port: `ip -d link show type vxlan`, in every namespace";
                let finding = Finding::new(format!("{found}; it cannot be made right: {error}"), remedy).wanted(wanted);
                findings.push((ProblemKind::Device, OVERLAY.to_owned(), finding));
            }
        }
        Ok(())
    }

    /// The node's own addresses are the administrator's.
    pub(super) async fn compare_addresses(&mut self, findings: &mut Findings) -> anyhow::Result<()> {
        let addresses = node::addresses(&self.net).await?;
        for ip in [Some(IpAddr::V4(self.node.v4)), self.node.v6.map(IpAddr::V6)].into_iter().flatten() {
            if !addresses.contains(&ip) {
                let remedy = "give it back to its device; other nodes reach this one there";
                let finding = Finding::new("no device has it", remedy).wanted("an address of this node");
                findings.push((ProblemKind::Address, ip.to_string(), finding));
            }
        }
        if self.node.addresses != addresses {
            tracing::info!(?addresses, "the node's addresses changed");
            self.set_addresses(addresses);
        }
        Ok(())
    }
}
