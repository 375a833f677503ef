//! The agent's desired tables, and what their rows are.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use cirri_abi::{Addr, Ipcache, IpcacheKey, NodeConfig, PolicyEntry, PolicyKey, RulesetSlot};
use cirri_loader::net::Route;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::table::Table;
use crate::api::TableStatus;

/// Every table. The reconcilers stand in `reconcile`.
#[derive(Debug)]
pub struct Rows {
    /// The node's configuration, one row.
    pub node: Table<&'static str, NodeConfig>,
    /// Compiled rule sets by slot.
    pub rulesets: Table<RulesetSlot, Arc<Vec<(PolicyKey, PolicyEntry)>>>,
    /// Which identities the rule sets know: bits, by word.
    pub identities: Table<u32, u64>,
    /// Workloads of this node by number.
    pub endpoints: Table<u16, cirri_abi::Endpoint>,
    /// The address cache.
    pub ipcache: Table<IpNet, Ipcache>,
    /// Routes and permanent neighbours.
    pub routes: Table<IpNet, RouteRow>,
    /// Programs on devices, by device name.
    pub attachments: Table<String, Attached>,
    /// Programs on sockets: one row, the control group; `None` for nowhere.
    pub sockets: Table<&'static str, Option<PathBuf>>,
    /// Network namespaces whose packets are translated instead, by cookie.
    pub per_packet: Table<u64, u32>,
    /// Records in the store, by whole key.
    pub published: Table<String, Vec<u8>>,
}

/// A route of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteRow {
    /// The route.
    pub route: Route,
    /// Ethernet address of the workload that it leads to, for a permanent neighbour.
    pub neighbour: Option<[u8; 6]>,
    /// Whether the route is no more than `route` says.
    pub plain: bool,
}

/// Programs on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Which programs.
    pub role: Role,
    /// Index of the device; a new device of the same name needs them anew.
    pub ifindex: u32,
}

/// What a device is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A workload's.
    Workload,
    /// It leads to the network.
    Network,
    /// The overlay.
    Overlay,
}

impl Rows {
    /// All empty.
    pub fn new() -> Rows {
        Rows {
            node: Table::new("node"),
            rulesets: Table::new("rulesets"),
            identities: Table::new("identities"),
            endpoints: Table::new("endpoints"),
            ipcache: Table::new("ipcache"),
            routes: Table::new("routes"),
            attachments: Table::new("attachments"),
            sockets: Table::new("sockets"),
            per_packet: Table::new("per-packet"),
            published: Table::new("published"),
        }
    }

    /// Whether every row of every table is as desired.
    pub fn is_done(&self) -> bool {
        self.node.is_done()
            && self.rulesets.is_done()
            && self.identities.is_done()
            && self.endpoints.is_done()
            && self.ipcache.is_done()
            && self.routes.is_done()
            && self.attachments.is_done()
            && self.sockets.is_done()
            && self.per_packet.is_done()
            && self.published.is_done()
    }

    /// When the next failed row of a kernel table is due.
    pub fn next_due(&self) -> Option<Instant> {
        [
            self.node.next_due(),
            self.rulesets.next_due(),
            self.identities.next_due(),
            self.endpoints.next_due(),
            self.ipcache.next_due(),
            self.routes.next_due(),
            self.attachments.next_due(),
            self.sockets.next_due(),
            self.per_packet.next_due(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// For `cirri status`.
    pub fn status(&self) -> Vec<TableStatus> {
        vec![
            self.node.status(),
            self.rulesets.status(),
            self.identities.status(),
            self.endpoints.status(),
            self.ipcache.status(),
            self.routes.status(),
            self.attachments.status(),
            self.sockets.status(),
            self.per_packet.status(),
            self.published.status(),
        ]
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Workload => "workload",
            Role::Network => "network",
            Role::Overlay => "overlay",
        })
    }
}

/// Puts the entries of a rule set into one order, so that what is read back from the kernel compares.
pub fn sort(entries: &mut [(PolicyKey, PolicyEntry)]) {
    entries.sort_by_key(|(key, _)| (key.direction, key.peer, key.prefix_len, key.proto, key.port));
}

/// A prefix as the address cache is keyed.
pub fn ipcache_key(net: IpNet) -> IpcacheKey {
    let prefix_len = match net {
        IpNet::V4(v4) => u32::from(v4.prefix_len()) + 96,
        IpNet::V6(v6) => u32::from(v6.prefix_len()),
    };
    IpcacheKey { prefix_len, addr: Addr::from(net.network()) }
}

/// The prefix of a key of the address cache; `None` for a length that no prefix has.
pub fn ipcache_net(key: &IpcacheKey) -> Option<IpNet> {
    let length = u8::try_from(key.prefix_len).ok()?;
    match IpAddr::from(key.addr) {
        IpAddr::V4(v4) => Some(IpNet::V4(Ipv4Net::new(v4, length.checked_sub(96)?).ok()?)),
        IpAddr::V6(v6) => Some(IpNet::V6(Ipv6Net::new(v6, length).ok()?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_of_both_families_read_back_from_the_address_cache() {
        for text in ["0.0.0.0/0", "10.1.0.0/16", "10.1.2.3/32", "::/0", "fd00::/8", "fd00::1/128"] {
            let net: IpNet = text.parse().unwrap();
            assert_eq!(ipcache_net(&ipcache_key(net)), Some(net), "{text}");
        }
        assert_eq!(ipcache_key("10.0.0.0/8".parse().unwrap()).prefix_len, 104);
    }
}
