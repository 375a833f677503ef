//! The rows that follow from the node, its workloads and its peers.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use cirri_abi::{Addr, Identity, Ipcache, NodeConfig, Port, ipcache_flag, node_flag};
use cirri_control::policy::Blocks;
use cirri_loader::net::Route;
use ipnet::IpNet;

use super::core::Core;
use super::endpoint::Endpoint;
use super::records::{self, IpRecord, NodeRecord};
use super::rows::{Attached, Role, RouteRow};
use super::services::SOCKETS;
use crate::config::{RoutingMode, Socket, SocketMode};

/// Annotation of a pod: whether its sockets are translated or its packets.
const TRANSLATION: &str = "cirri.io/service-translation";
const TRANSLATE_SOCKETS: &str = "socket";
const TRANSLATE_PACKETS: &str = "packet";

impl Core {
    /// Fills every table but the rule sets'.
    pub(super) fn desire_rows(&mut self) {
        self.rows.node.set("node", self.node_config());
        self.rows.endpoints.replace(self.endpoints.values().map(|endpoint| (endpoint.id, endpoint.row())).collect());
        self.number_peers();
        let ipcache = with_blocks(self.addresses(), self.cluster.blocks());
        self.rows.ipcache.replace(ipcache);
        self.desire_routes();
        self.rows.attachments.replace(self.attachments());
        self.rows.published.replace(self.records());
    }

    /// Fills the table of routes.
    pub(super) fn desire_routes(&mut self) {
        self.rows.routes.replace(self.routes());
    }

    /// Every other node, by name.
    pub fn peers(&self) -> impl Iterator<Item = &NodeRecord> {
        self.view.nodes.values().filter(|record| record.name != self.node.name)
    }

    /// Which workloads' packets are translated because their sockets are not.
    pub(super) fn desire_per_packet(&mut self) {
        let usual = match self.config.services.socket.mode {
            SocketMode::All => TRANSLATE_SOCKETS,
            SocketMode::Host => TRANSLATE_PACKETS,
            // Then nobody asks.
            SocketMode::Off => return self.rows.per_packet.replace(BTreeMap::new()),
        };
        let wanted = |endpoint: &&Endpoint| {
            let annotated = self.pod_of(endpoint).and_then(|pod| pod.metadata.annotations.get(TRANSLATION));
            endpoint.netns_cookie != 0 && annotated.map_or(usual, String::as_str) == TRANSLATE_PACKETS
        };
        let rows = self.endpoints.values().filter(wanted).map(|endpoint| (endpoint.netns_cookie, 1)).collect();
        self.rows.per_packet.replace(rows);
    }

    /// Whose sockets are translated.
    pub(super) fn desire_sockets(&mut self) {
        let Socket { mode, cgroup } = &self.config.services.socket;
        self.serving.socket_error.clear();
        let cgroup = match (mode, cgroup.as_os_str().is_empty()) {
            (SocketMode::Off, _) => None,
            (_, false) => Some(cgroup.clone()),
            (_, true) => cirri_loader::cgroup_root()
                .map_err(|error| {
                    tracing::warn!(%error, "services are translated packet by packet alone");
                    self.serving.socket_error = error.to_string();
                })
                .ok(),
        };
        self.rows.sockets.set(SOCKETS, cgroup);
    }

    pub(super) fn node_config(&self) -> NodeConfig {
        let masquerade = &self.config.masquerade;
        let mut flags = 0;
        let mut set = |wanted: bool, flag: u32| flags |= if wanted { flag } else { 0 };
        set(masquerade.ipv4, node_flag::MASQUERADE_V4);
        set(masquerade.ipv6 && self.node.v6.is_some(), node_flag::MASQUERADE_V6);
        set(self.config.routing.mode == RoutingMode::Overlay, node_flag::TUNNEL);
        set(self.serving.has_host_backends(), node_flag::HOST_BACKENDS);
        NodeConfig {
            flags,
            overlay_ifindex: self.node.overlay.as_ref().map_or(0, |link| link.index),
            v4: Addr::v4(self.node.v4.octets()),
            v6: self.node.v6.map_or(Addr::UNSPECIFIED, |v6| Addr::v6(v6.octets())),
            masquerade_first: Port::new(masquerade.ports.first),
            masquerade_mask: (masquerade.ports.count() - 1) as u16,
            netns_cookie: self.node.netns_cookie,
            ..NodeConfig::default()
        }
    }

    /// Every peer gets an epoch slot; those of peers that left are free again.
    fn number_peers(&mut self) {
        let present: Vec<_> = self.peers().filter_map(|peer| peer.v4).collect();
        let gone: Vec<_> = self.peer_slots.iter().map(|(v4, _)| *v4).filter(|v4| !present.contains(v4)).collect();
        for v4 in gone {
            self.peer_slots.release(&v4);
        }
        for v4 in present {
            if self.peer_slots.take(&v4).is_none() {
                tracing::error!(peer = %v4, "more peers than epoch slots; it is not reached");
            }
        }
    }

    /// The address cache, without blocks.
    fn addresses(&self) -> BTreeMap<IpNet, Ipcache> {
        let mut rows = BTreeMap::new();
        let plain = |identity| Ipcache { identity, ..Ipcache::default() };
        let (world_v4, world_v6) = match self.node.v6 {
            Some(_) => (Identity::WORLD_IPV4, Identity::WORLD_IPV6),
            None => (Identity::WORLD, Identity::WORLD),
        };
        for (everything, world) in [("0.0.0.0/0", world_v4), ("::/0", world_v6)] {
            if let Ok(everything) = everything.parse::<IpNet>() {
                rows.insert(everything, plain(world));
            }
        }
        for pool in &self.pools {
            let row = Ipcache { flags: ipcache_flag::LOCAL_POOL, ..plain(Identity::UNMANAGED) };
            rows.insert(pool.cidr(), row);
        }
        let mut behind = BTreeMap::new();
        for peer in self.peers() {
            let Some(v4) = peer.v4 else { continue };
            let Some(slot) = self.peer_slots.get(&v4) else { continue };
            let row = |identity| Ipcache {
                identity,
                block: 0,
                peer: u32::from_ne_bytes(v4.octets()),
                slot,
                flags: ipcache_flag::REMOTE,
            };
            for cidr in [peer.pod_v4.map(IpNet::V4), peer.pod_v6.map(IpNet::V6)].into_iter().flatten() {
                rows.insert(cidr.trunc(), row(Identity::UNMANAGED));
            }
            rows.insert(IpNet::from(IpAddr::V4(v4)), row(Identity::REMOTE_NODE));
            if let Some(v6) = peer.v6 {
                rows.insert(IpNet::from(IpAddr::V6(v6)), row(Identity::REMOTE_NODE));
            }
            behind.insert(peer.name.as_str(), row(Identity::UNKNOWN));
        }
        for (ip, record) in &self.view.ips {
            if let Some(row) = behind.get(record.node.as_str()) {
                rows.insert(IpNet::from(*ip), Ipcache { identity: Identity { id: record.identity }, ..*row });
            }
        }
        for endpoint in self.endpoints.values() {
            for ip in endpoint.addresses() {
                rows.insert(IpNet::from(ip), plain(endpoint.identity()));
            }
        }
        for ip in &self.node.addresses {
            rows.insert(IpNet::from(*ip), Ipcache { flags: ipcache_flag::HOST, ..plain(Identity::HOST) });
        }
        rows
    }

    fn routes(&self) -> BTreeMap<IpNet, RouteRow> {
        let source = |v6: bool| if v6 { self.node.v6.map(IpAddr::V6) } else { Some(IpAddr::V4(self.node.v4)) };
        let mut rows = BTreeMap::new();
        for cidr in self.pools.iter().map(|pool| pool.cidr().trunc()) {
            // An address that no workload has must not follow the default route: the network would
            // send it back here, round and round.
            let route = Route::unreachable(cidr.network(), cidr.prefix_len());
            rows.insert(cidr, RouteRow { route, neighbour: None, plain: true });
        }
        for endpoint in self.endpoints.values().filter(|endpoint| self.raising != Some(endpoint.id)) {
            for ip in endpoint.addresses() {
                let route = Route::host(ip, endpoint.ifindex, source(ip.is_ipv6()));
                rows.insert(IpNet::from(ip), RouteRow { route, neighbour: Some(endpoint.mac), plain: true });
            }
        }
        for peer in self.peers() {
            for cidr in [peer.pod_v4.map(IpNet::V4), peer.pod_v6.map(IpNet::V6)].into_iter().flatten() {
                let cidr = cidr.trunc();
                let v6 = cidr.addr().is_ipv6();
                let (via, device) = match (&self.node.overlay, self.config.routing.mode) {
                    (Some(overlay), RoutingMode::Overlay) => (None, overlay.index),
                    _ => {
                        let via = if v6 { peer.v6.map(IpAddr::V6) } else { peer.v4.map(IpAddr::V4) };
                        if via.is_none() {
                            continue;
                        }
                        (via, self.node.uplink)
                    }
                };
                let route = Route {
                    to: cidr.network(),
                    prefix: cidr.prefix_len(),
                    via,
                    device,
                    source: source(v6),
                    onlink: false,
                };
                rows.insert(cidr, RouteRow { route, neighbour: None, plain: true });
            }
        }
        rows
    }

    fn attachments(&self) -> BTreeMap<String, Attached> {
        let mut rows = BTreeMap::new();
        for device in &self.node.devices {
            rows.insert(device.name.clone(), Attached { role: Role::Network, ifindex: device.index });
        }
        if let Some(overlay) = &self.node.overlay {
            rows.insert(overlay.name.clone(), Attached { role: Role::Overlay, ifindex: overlay.index });
        }
        for endpoint in self.endpoints.values() {
            let attached = Attached { role: Role::Workload, ifindex: endpoint.ifindex };
            rows.insert(endpoint.host_ifname.clone(), attached);
        }
        rows
    }

    fn records(&self) -> BTreeMap<String, Vec<u8>> {
        let mut rows = BTreeMap::new();
        let v4 = |cidr: Option<IpNet>| match cidr {
            Some(IpNet::V4(v4)) => Some(v4),
            _ => None,
        };
        let v6 = |cidr: Option<IpNet>| match cidr {
            Some(IpNet::V6(v6)) => Some(v6),
            _ => None,
        };
        let node = NodeRecord {
            name: self.node.name.clone(),
            v4: Some(self.node.v4),
            v6: self.node.v6,
            pod_v4: v4(self.pod_cidr(false)),
            pod_v6: v6(self.pod_cidr(true)),
        };
        insert_json(&mut rows, records::node_key(&self.node.name), &node);
        rows.extend([self.enforced_record()]);
        for endpoint in self.endpoints.values() {
            for ip in endpoint.addresses() {
                insert_json(&mut rows, records::ip_key(&self.node.name, ip), &self.ip_record(endpoint, ip));
            }
        }
        rows
    }

    /// What others know of a workload's address. Who it is there is what its packets say.
    pub(super) fn ip_record(&self, endpoint: &Endpoint, ip: IpAddr) -> IpRecord {
        IpRecord {
            ip,
            identity: if endpoint.tunnel_identity == 0 { endpoint.identity } else { endpoint.tunnel_identity },
            node: self.node.name.clone(),
            namespace: endpoint.namespace.clone(),
            pod: endpoint.pod.clone(),
        }
    }
}

/// Adds what policies name: every row learns the most specific block that holds it, and every block
/// gets a row of its own, which inherits all else from the row that holds it.
fn with_blocks(mut rows: BTreeMap<IpNet, Ipcache>, blocks: &Blocks) -> BTreeMap<IpNet, Ipcache> {
    let numbers: HashMap<IpNet, u32> = blocks.iter().collect();
    if numbers.is_empty() {
        return rows;
    }
    // Rows are many and lengths few, so only lengths that some block has are tried, longest first.
    let mut lengths: Vec<(bool, u8)> =
        numbers.keys().map(|block| (block.addr().is_ipv6(), block.prefix_len())).collect();
    lengths.sort_unstable_by_key(|(v6, length)| (Reverse(*length), *v6));
    lengths.dedup();
    let block_of = |net: IpNet| {
        let fits = |&&(v6, length): &&(bool, u8)| v6 == net.addr().is_ipv6() && length <= net.prefix_len();
        let wider = lengths.iter().filter(fits).filter_map(|(_, length)| IpNet::new(net.addr(), *length).ok());
        wider.map(|wider| wider.trunc()).find_map(|wider| numbers.get(&wider).copied()).unwrap_or_default()
    };
    let mut inherited = Vec::new();
    for (block, number) in &numbers {
        if !rows.contains_key(block)
            && let Some(holder) = holder(&rows, *block)
        {
            inherited.push((*block, Ipcache { block: *number, ..holder }));
        }
    }
    for (net, row) in &mut rows {
        row.block = block_of(*net);
    }
    rows.extend(inherited);
    rows
}

fn holder(rows: &BTreeMap<IpNet, Ipcache>, net: IpNet) -> Option<Ipcache> {
    (0..net.prefix_len())
        .rev()
        .filter_map(|length| IpNet::new(net.addr(), length).ok())
        .find_map(|wider| rows.get(&wider.trunc()).copied())
}

fn insert_json(rows: &mut BTreeMap<String, Vec<u8>>, key: String, value: &impl serde::Serialize) {
    match serde_json::to_vec(value) {
        Ok(json) => {
            rows.insert(key, json);
        }
        // Plain structs of numbers and strings: this cannot happen, and must not stop the agent.
        Err(error) => tracing::error!(key, %error, "a record cannot be written as JSON"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cirri_control::policy::Cluster;
    use cirri_control::resource::{Resource, parse_documents};

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn a_block_inherits_from_the_row_that_holds_it_and_rows_learn_their_block() {
        let policy = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: shop}
spec:
  podSelector: {}
  egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.128.0/17]}}]}]
  policyTypes: [Egress]
";
        let mut cluster = Cluster::default();
        match parse_documents("p.yaml", policy).unwrap().remove(0) {
            Resource::NetworkPolicy(policy) => cluster.upsert_policy(&policy).unwrap(),
            other => panic!("expected a policy, got {other:?}"),
        };
        let row = |id, slot| Ipcache { identity: Identity { id }, slot, ..Ipcache::default() };
        let rows = BTreeMap::from([
            (net("0.0.0.0/0"), row(9, 0)),
            (net("10.1.0.0/16"), row(3, 4096)),
            (net("10.1.200.7/32"), row(300, 4096)),
        ]);
        let rows = with_blocks(rows, cluster.blocks());
        let number = |text: &str| cluster.blocks().block_of(net(text));
        let (wide, narrow) = (number("10.0.0.0/8"), number("10.1.128.0/17"));
        assert!(wide != 0 && narrow != 0 && wide != narrow);
        let expected = BTreeMap::from([
            (net("0.0.0.0/0"), row(9, 0)),
            (net("10.0.0.0/8"), Ipcache { block: wide, ..row(9, 0) }),
            (net("10.1.0.0/16"), Ipcache { block: wide, ..row(3, 4096) }),
            (net("10.1.128.0/17"), Ipcache { block: narrow, ..row(3, 4096) }),
            (net("10.1.200.7/32"), Ipcache { block: narrow, ..row(300, 4096) }),
        ]);
        assert_eq!(rows, expected);
    }
}
