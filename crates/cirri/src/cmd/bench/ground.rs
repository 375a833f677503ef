//! Where packets are measured: a network namespace with devices and routes, and tables filled for
//! a node with four workloads, a peer and the world.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context, Result};
use cirri_abi::{
    Addr, Cookie, Direction, Endpoint, Identity, Ipcache, IpcacheKey, NodeConfig, PolicyEntry, PolicyKey, Port,
    VXLAN_PORT, endpoint_flag, epoch_slot, ipcache_flag, node_flag, policy_flag, precedence, proto,
};
use cirri_loader::Tables;
use cirri_loader::net::{Address, Namespace, Neighbour, Net, Route, VethEnd};

/// Rules of every rule set besides those that the cases need.
const OTHER_RULES: u32 = 1000;
const PREFIX: &str = "cirri-bench-";
const OVERLAY: &str = "cirri_vxlan";
const UPLINK: &str = "uplink";

/// Both addresses of one end.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Pair {
    const fn new(v4: [u8; 4], v6: [u16; 8]) -> Pair {
        let ([a, b, c, d], [e, f, g, h, i, j, k, l]) = (v4, v6);
        Pair { v4: Ipv4Addr::new(a, b, c, d), v6: Ipv6Addr::new(e, f, g, h, i, j, k, l) }
    }

    /// The one of a family.
    pub fn of(self, v6: bool) -> IpAddr {
        if v6 { self.v6.into() } else { self.v4.into() }
    }
}

pub const NODE: Pair = Pair::new([10, 0, 0, 1], [0xfd00, 0xc1, 0, 0, 0, 0, 0, 1]);
pub const PEER: Pair = Pair::new([10, 0, 0, 2], [0xfd00, 0xc1, 0, 0, 0, 0, 0, 2]);
/// The device to the network's own Ethernet address.
pub const UPLINK_MAC: [u8; 6] = [0x02, 0xbe, 2, 0, 0, 3];
/// Ethernet addresses of the router and of the peer, which the node knows for good.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xbe, 2, 0, 0, 1];
pub const PEER_MAC: [u8; 6] = [0x02, 0xbe, 2, 0, 0, 2];
const GATEWAY: Pair = Pair::new([10, 0, 0, 254], [0xfd00, 0xc1, 0, 0, 0, 0, 0, 0xfe]);
const LOCAL_PODS: Pair = Pair::new([10, 244, 0, 0], [0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0]);
/// Workloads of the peer that serve: 64 addresses.
const REMOTE_SERVERS: Pair = Pair::new([10, 244, 1, 64], [0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0x100]);
const REMOTE_PODS: Pair = Pair::new([10, 244, 1, 0], [0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0]);
/// A workload of the peer.
pub const REMOTE: Pair = Pair::new([10, 244, 1, 20], [0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0x20]);
pub const WORLD: Pair = Pair::new([198, 51, 100, 7], [0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 7]);

/// Who [`REMOTE`] is.
pub const REMOTE_IDENTITY: u32 = 1003;

/// A workload of this node.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    pub at: Pair,
    pub mac: [u8; 6],
    /// The node's side of its device.
    pub ifindex: u32,
    device: &'static str,
    inside: &'static str,
    number: u16,
}

impl Workload {
    const fn new(number: u8, device: &'static str, inside: &'static str) -> Workload {
        Workload {
            at: Pair::new([10, 244, 0, 10 + number], [0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0x10 + number as u16]),
            mac: [0x02, 0xbe, 0, 0, 0, number],
            ifindex: 0,
            device,
            inside,
            number: number as u16,
        }
    }

    /// Numbers below are those that no rule set of the ground holds otherwise.
    fn identity(&self) -> Identity {
        Identity { id: 1000 + u32::from(self.number) }
    }
}

/// The namespace; removed when dropped, unless it is kept.
pub struct Ground {
    name: String,
    kept: bool,
    pub namespace: Namespace,
    /// May open connections to [`Ground::server`], [`REMOTE`] and [`WORLD`].
    pub client: Workload,
    /// May be reached by the client and by [`REMOTE`].
    pub server: Workload,
    /// May be reached by nobody.
    pub closed: Workload,
    /// May be reached by everybody.
    pub open: Workload,
    /// The device to the network.
    pub uplink: u32,
    pub overlay: u32,
}

/// How packets leave the node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Routing {
    Overlay,
    Direct,
    /// Direct, and all connections to the world share one masquerade port: only with this can
    /// answers differ in nothing but their source port.
    OnePort,
}

impl Ground {
    /// Makes one.
    pub fn new(name: &str) -> Result<Ground> {
        let name = format!("{PREFIX}{name}");
        let namespace = Namespace::create(&name)?;
        let mut ground = Ground {
            name,
            kept: false,
            namespace: namespace.clone(),
            client: Workload::new(1, "lxc1", "pod1"),
            server: Workload::new(2, "lxc2", "pod2"),
            closed: Workload::new(4, "lxc4", "pod4"),
            open: Workload::new(5, "lxc5", "pod5"),
            uplink: 0,
            overlay: 0,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { ground.build(&Net::of(namespace)?).await }).context("making devices to measure on")?;
        Ok(ground)
    }

    /// Leaves it there when this is dropped.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// Its file.
    pub fn path(&self) -> PathBuf {
        Namespace::path_of(&self.name)
    }

    /// Removes a kept one; whether there was one.
    pub fn remove(name: &str) -> Result<bool> {
        Ok(Namespace::delete(&format!("{PREFIX}{name}"))?)
    }

    async fn build(&mut self, net: &Net) -> Result<()> {
        for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            net.set_sysctl(setting, "1")?;
        }
        net.set_sysctl("ipv6/conf/default/accept_dad", "0")?;
        net.set_up("lo").await?;
        self.uplink = pair(net, UPLINK, "network").await?;
        net.set_mac(UPLINK, UPLINK_MAC).await?;
        for workload in [&mut self.client, &mut self.server, &mut self.closed, &mut self.open] {
            workload.ifindex = pair(net, workload.device, workload.inside).await?;
        }
        net.create_vxlan(OVERLAY, VXLAN_PORT, 1450).await?;
        net.set_up(OVERLAY).await?;
        self.overlay = net.link(OVERLAY).await?.index;
        for v6 in [false, true] {
            let device = self.uplink;
            let (prefix, pods) = if v6 { (64, 112) } else { (24, 24) };
            net.add_address(&Address { ip: NODE.of(v6), prefix, device }).await?;
            net.put_route(&Route::default_via(GATEWAY.of(v6), device)).await?;
            let via = Some(PEER.of(v6));
            let to = REMOTE_PODS.of(v6);
            net.put_route(&Route { to, prefix: pods, via, device, source: None, onlink: true }).await?;
            for (ip, mac) in [(GATEWAY.of(v6), GATEWAY_MAC), (PEER.of(v6), PEER_MAC)] {
                net.put_neighbour(&Neighbour { ip, mac, device }).await?;
            }
        }
        Ok(())
    }

    // === Tables ===

    /// Fills the tables as an agent would.
    pub fn fill(&self, tables: &Tables, routing: Routing) -> Result<()> {
        self.set_routing(tables, routing)?;
        self.fill_addresses(tables)?;
        for workload in [&self.client, &self.server, &self.closed, &self.open] {
            let endpoint = Endpoint {
                ifindex: workload.ifindex,
                identity: workload.identity(),
                id: workload.number,
                ruleset: workload.number,
                mac: workload.mac,
                v4: workload.at.of(false).into(),
                v6: workload.at.of(true).into(),
                ..Endpoint::default()
            };
            tables.devices.put(&workload.ifindex, &endpoint)?;
            for v6 in [false, true] {
                tables.endpoints.put(&workload.at.of(v6).into(), &endpoint)?;
            }
        }
        let world = [Identity::WORLD_IPV4.id, Identity::WORLD_IPV6.id];
        let (client, server) = (self.client.identity().id, self.server.identity().id);
        let rules = |egress: &[u32], ingress: &[u32]| ruleset(egress, ingress);
        tables.install_ruleset(self.client.number, &rules(&[server, REMOTE_IDENTITY, world[0], world[1]], &[]))?;
        tables.install_ruleset(self.server.number, &rules(&[], &[client, REMOTE_IDENTITY]))?;
        tables.install_ruleset(self.closed.number, &rules(&[], &[]))?;
        tables.install_ruleset(self.open.number, &rules(&[], &[client, REMOTE_IDENTITY, world[0], world[1]]))?;
        super::served::fill(self, tables)?;
        for slot in [epoch_slot::NODE, PEER_SLOT] {
            tables.bump(slot)?;
        }
        Ok(())
    }

    /// Tells the programs how packets leave. Recipes that are there stay good: no epoch moves.
    pub fn set_routing(&self, tables: &Tables, routing: Routing) -> Result<()> {
        let masquerade = node_flag::MASQUERADE_V4 | node_flag::MASQUERADE_V6;
        let tunnel = if routing == Routing::Overlay { node_flag::TUNNEL } else { 0 };
        // Twice as many ports as there are flows to one destination, and none of the workloads' own.
        let (first, mask) = if routing == Routing::OnePort { (40_000, 0) } else { (27_000, 32_767) };
        let config = NodeConfig {
            flags: masquerade | tunnel,
            overlay_ifindex: self.overlay,
            v4: NODE.of(false).into(),
            v6: NODE.of(true).into(),
            masquerade_first: Port::new(first),
            masquerade_mask: mask,
            ..NodeConfig::default()
        };
        Ok(tables.set_node(&config)?)
    }

    /// Lets the client send from any address: for harnesses that vary it to make new flows.
    pub fn allow_any_source(&self, tables: &Tables) -> Result<()> {
        let mut endpoint = tables.devices.get(&self.client.ifindex)?.context("the tables are not filled")?;
        endpoint.flags |= endpoint_flag::ANY_SOURCE;
        tables.devices.put(&self.client.ifindex, &endpoint)?;
        tables.bump(self.client.number)?;
        Ok(())
    }

    fn fill_addresses(&self, tables: &Tables) -> Result<()> {
        let local = Ipcache { identity: Identity::UNMANAGED, flags: ipcache_flag::LOCAL_POOL, ..Ipcache::default() };
        let host = Ipcache { identity: Identity::HOST, flags: ipcache_flag::HOST, ..Ipcache::default() };
        let IpAddr::V4(peer) = PEER.of(false) else { return Ok(()) };
        let behind = |id: u32| Ipcache {
            identity: Identity { id },
            peer: u32::from_ne_bytes(peer.octets()),
            slot: PEER_SLOT,
            flags: ipcache_flag::REMOTE,
            ..Ipcache::default()
        };
        for v6 in [false, true] {
            let (all, pods) = if v6 { (0, 112) } else { (96, 96 + 24) };
            let world = Ipcache {
                identity: if v6 { Identity::WORLD_IPV6 } else { Identity::WORLD_IPV4 },
                ..Ipcache::default()
            };
            let anywhere: IpAddr = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
            let mut entries = vec![
                (anywhere, all, world),
                (NODE.of(v6), 128, host),
                (PEER.of(v6), 128, behind(Identity::REMOTE_NODE.id)),
                (LOCAL_PODS.of(v6), pods, local),
                (REMOTE_PODS.of(v6), pods, behind(Identity::UNMANAGED.id)),
                (REMOTE.of(v6), 128, behind(REMOTE_IDENTITY)),
                (REMOTE_SERVERS.of(v6), 122, behind(REMOTE_IDENTITY)),
            ];
            for workload in [&self.client, &self.server, &self.closed, &self.open] {
                let entry = Ipcache { identity: workload.identity(), ..Ipcache::default() };
                entries.push((workload.at.of(v6), 128, entry));
            }
            for (address, prefix_len, entry) in entries {
                tables.ipcache.put(&IpcacheKey { prefix_len, addr: Addr::from(address) }, &entry)?;
            }
        }
        Ok(())
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = Namespace::delete(&self.name)
        {
            eprintln!("cirri: {error}");
        }
    }
}

const PEER_SLOT: u16 = epoch_slot::FIRST_PEER;

/// A pair of devices, both up; the number of the first.
async fn pair(net: &Net, name: &str, peer: &str) -> Result<u32> {
    let end = |name: &str| VethEnd { name: name.to_owned(), ..VethEnd::default() };
    net.create_veth(&end(name), &end(peer)).await?;
    net.set_up(peer).await?;
    net.set_up(name).await?;
    Ok(net.link(name).await?.index)
}

/// Closed in both directions but for these peers over TCP and UDP, and the usual number of rules
/// about others.
fn ruleset(egress: &[u32], ingress: &[u32]) -> Vec<(PolicyKey, PolicyEntry)> {
    let mut rules = Vec::new();
    for (direction, peers) in [(Direction::EGRESS, egress), (Direction::INGRESS, ingress)] {
        let key = PolicyKey { prefix_len: PolicyKey::STATIC_BITS, direction, ..PolicyKey::default() };
        let entry = PolicyEntry {
            cookie: Cookie::DEFAULT_DENY,
            prefix_len: PolicyKey::STATIC_BITS as u8,
            ..PolicyEntry::default()
        };
        rules.push((key, entry));
        let allow = |prefix_len: u32, n: u32| PolicyEntry {
            precedence: precedence(1000, 1),
            cookie: Cookie::FIRST_RULE + n,
            flags: policy_flag::ALLOW,
            prefix_len: prefix_len as u8,
            ..PolicyEntry::default()
        };
        for (n, peer) in peers.iter().enumerate() {
            for protocol in [proto::TCP, proto::UDP] {
                let prefix_len = PolicyKey::PROTO_BITS;
                let key = PolicyKey { prefix_len, peer: *peer, direction, proto: protocol, port: [0; 2] };
                rules.push((key, allow(prefix_len, n as u32)));
            }
        }
        for n in 0..OTHER_RULES / 2 {
            let peer = Identity { id: 2000 + n };
            let key = PolicyKey::full(peer, direction, proto::TCP, 80u16.to_be_bytes());
            rules.push((key, allow(PolicyKey::FULL_BITS, 100 + n)));
        }
    }
    rules
}
