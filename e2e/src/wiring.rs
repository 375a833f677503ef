//! A random world as the tables of its node n1: what an agent would put there, for packets of
//! [`crate::random`] to meet.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cirri_abi::{
    Addr, Endpoint, Hook as At, Identity, Ipcache, NodeConfig, PolicyEntry, PolicyKey, RulesetSlot, ipcache_flag,
    node_flag,
};
use cirri_control::labels::IdentityLabels;
use cirri_control::policy::Cluster;
use cirri_control::resource::{Pod, Resource, parse_documents};
use cirri_datapath::TunnelKey;
use cirri_sim::{Frame, Icmp, build};
use ipnet::IpNet;

use crate::fixtures::{Change, Devices, EPOCH_OF_PEER, entry, mac};
use crate::random::{Hook, OTHER_NODE, Packet, Scenario, THIS_NODE, pod_networks};
use crate::reference::Protocol;

/// Where n2 is on the wire, whatever address the scenario gives it: the kernel host speaks VXLAN
/// from there.
const PEER: [u8; 4] = [192, 168, 0, 2];

/// A scenario's node n1.
pub struct Wiring {
    /// What its tables hold.
    pub tables: Vec<Change>,
    direct: bool,
    devices: Devices,
    identities: BTreeMap<IpAddr, Identity>,
    ports: BTreeMap<IpAddr, u32>,
}

impl Wiring {
    /// Compiles the scenario's policies and writes everybody down. With direct routing remote pods
    /// come by the network; else through the overlay.
    ///
    /// # Panics
    /// If the compiler refuses what the generator made, or there are more pods than devices.
    pub fn new(scenario: &Scenario, direct: bool, devices: Devices, workloads: &[u32]) -> Wiring {
        let resources = parse_documents("scenario", &scenario.manifests)
            .unwrap_or_else(|error| panic!("seed {}: {error}\n{}", scenario.seed, scenario.manifests));
        let mut wiring =
            Wiring { tables: Vec::new(), direct, devices, identities: BTreeMap::new(), ports: BTreeMap::new() };
        let (cluster, pods) = cluster(scenario, &resources);
        wiring.configure();
        let mut entries = wiring.everybody(scenario, &cluster);
        let mut slots: BTreeMap<u32, RulesetSlot> = BTreeMap::new();
        let mut free = workloads.iter();
        for (number, (name, identity)) in (1u16..).zip(&pods) {
            let pod = scenario.world.pods.iter().find(|pod| pod.full_name() == *name).expect("the same pods");
            let local = pod.node == THIS_NODE;
            for address in &pod.addresses {
                wiring.identities.insert(*address, *identity);
                let value =
                    if local { Ipcache { identity: *identity, ..Ipcache::default() } } else { remote(*identity) };
                entries.insert(IpNet::from(*address), value);
            }
            if !local {
                continue;
            }
            let ifindex = *free.next().expect("a device for each pod");
            let next = slots.len() as RulesetSlot + 1;
            let slot = *slots.entry(identity.id).or_insert(next);
            if slot == next {
                let compiled = cluster.compile(*identity).unwrap_or_else(|error| panic!("{error}"));
                let rules: Vec<(PolicyKey, PolicyEntry)> = compiled.entries.into_iter().collect();
                wiring.tables.push(Change::Ruleset(slot, rules));
            }
            let [v4, v6] = [pod.addresses[0], pod.addresses[1]].map(Addr::from);
            wiring.ports.extend(pod.addresses.iter().map(|address| (*address, ifindex)));
            let endpoint = Endpoint {
                ifindex,
                identity: *identity,
                id: number,
                ruleset: slot,
                mac: mac(number),
                v4,
                v6,
                ..Endpoint::default()
            };
            wiring.tables.push(Change::Endpoint(endpoint));
        }
        for (net, value) in entries {
            let block = cluster.blocks().block_of(net);
            wiring.tables.push(entry(net, Ipcache { block, ..value }));
        }
        wiring
    }

    /// The packet at its hook.
    pub fn frame(&self, packet: &Packet) -> (u8, Frame) {
        let (from, to) = ((packet.src, packet.sport), (packet.dst, packet.dport));
        let packet_out = match packet.protocol {
            Protocol::Tcp => build::tcp(from, to, 2),
            Protocol::Udp => build::udp(from, to),
            Protocol::Sctp => build::other(from, to, cirri_abi::proto::SCTP),
            Protocol::Other(_) => build::icmp(packet.src, packet.dst, Icmp::Request(packet.sport)),
        };
        match packet.hook {
            Hook::FromWorkload => (At::FROM_WORKLOAD, packet_out.on(self.ports[&packet.src])),
            Hook::ToWorkload => (At::TO_WORKLOAD, packet_out.on(self.ports[&packet.dst])),
            Hook::FromOverlay if !self.direct => {
                let mut frame = packet_out.on(self.devices.overlay);
                let sender = self.identities[&packet.src];
                // To its own node a node is the host.
                let vni = if sender == Identity::REMOTE_NODE { Identity::HOST.id } else { sender.id };
                frame.tunnel = Some(TunnelKey { vni, remote: u32::from_ne_bytes(PEER) });
                (At::FROM_OVERLAY, frame)
            }
            Hook::FromOverlay | Hook::FromNetwork => (At::FROM_NETWORK, packet_out.on(self.devices.eth)),
        }
    }

    fn configure(&mut self) {
        let flags = if self.direct { 0 } else { node_flag::TUNNEL };
        let config = NodeConfig { flags, overlay_ifindex: self.devices.overlay, ..NodeConfig::default() };
        self.tables.push(Change::Config(config));
    }

    /// The address cache without the pods.
    fn everybody(&mut self, scenario: &Scenario, cluster: &Cluster) -> BTreeMap<IpNet, Ipcache> {
        let mut entries: BTreeMap<IpNet, Ipcache> = BTreeMap::new();
        let world = |net: &IpNet| Ipcache {
            identity: if net.addr().is_ipv4() { Identity::WORLD_IPV4 } else { Identity::WORLD_IPV6 },
            ..Ipcache::default()
        };
        let all = ["0.0.0.0/0", "::/0"].map(|net| net.parse::<IpNet>().expect("a network"));
        for net in all.into_iter().chain(cluster.blocks().iter().map(|(net, _)| net)) {
            entries.insert(net, world(&net));
        }
        for net in pod_networks(THIS_NODE) {
            let (identity, flags) = (Identity::UNMANAGED, ipcache_flag::LOCAL_POOL);
            entries.insert(net, Ipcache { identity, flags, ..Ipcache::default() });
        }
        for net in pod_networks(OTHER_NODE) {
            entries.insert(net, remote(Identity::UNMANAGED));
        }
        for node in &scenario.world.nodes {
            for address in &node.addresses {
                let host = Ipcache { identity: Identity::HOST, flags: ipcache_flag::HOST, ..Ipcache::default() };
                let value = if node.name == THIS_NODE { host } else { remote(Identity::REMOTE_NODE) };
                self.identities.insert(*address, value.identity);
                entries.insert(IpNet::from(*address), value);
            }
        }
        entries
    }
}

/// The policies and identities, and each pod's.
fn cluster(scenario: &Scenario, resources: &[Resource]) -> (Cluster, Vec<(String, Identity)>) {
    let mut cluster = Cluster::default();
    for resource in resources {
        if let Resource::NetworkPolicy(policy) = resource {
            cluster.upsert_policy(policy).unwrap_or_else(|error| panic!("seed {}: {error}", scenario.seed));
        }
    }
    let mut numbers: BTreeMap<String, Identity> = BTreeMap::new();
    let mut pods = Vec::new();
    for resource in resources {
        if let Resource::Pod(pod) = resource {
            let labels = labels(pod, resources, &cluster);
            let next = Identity { id: Identity::MIN_ALLOCATED + numbers.len() as u32 };
            let identity = *numbers.entry(labels.canonical()).or_insert(next);
            cluster.upsert_identity(identity, labels);
            pods.push((format!("{}/{}", pod.namespace(), resource.name()), identity));
        }
    }
    (cluster, pods)
}

fn labels(pod: &Pod, resources: &[Resource], cluster: &Cluster) -> IdentityLabels {
    let namespace = resources.iter().find_map(|resource| match resource {
        Resource::Namespace(namespace) if resource.name() == pod.namespace() => Some(namespace),
        _ => None,
    });
    IdentityLabels::of_pod(pod, namespace, "default", &cluster.label_filter())
}

/// Behind n2.
fn remote(identity: Identity) -> Ipcache {
    let (peer, flags) = (u32::from_ne_bytes(PEER), ipcache_flag::REMOTE);
    Ipcache { identity, peer, slot: EPOCH_OF_PEER, flags, ..Ipcache::default() }
}
