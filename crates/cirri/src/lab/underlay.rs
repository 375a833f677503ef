//! The network below a lab: one Ethernet segment for the nodes, a router, and a host outside.
//!
//! ```text
//!   cirri-lab-node1        cirri-lab-node2                cirri-lab-world
//!   172.31.255.11          172.31.255.12                  198.51.100.10, .20, 203.0.113.10
//!   fd00:c1:ab::11         fd00:c1:ab::12                 2001:db8:100::10, ::20, 2001:db8:200::10
//!      eth0                   eth0                           eth0
//!       │                      │                              │
//!  ─────┴──── bridge "lan" ────┴─────── cirri-lab-net ────────┴── "world", 198.51.100.1, 2001:db8:100::1
//!             172.31.255.1, fd00:c1:ab::1 (router; etcd listens here)
//! ```
//!
//! Every lab has the same addresses: its namespaces keep it apart from the others. The router also knows the way to
//! the pod networks, as the router of a data centre would, so that connections from outside to pods can be tried.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::Context;
use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::netns::{self, sysctl};
use super::state::{Lab, LabName, Node};

/// The router's address on the nodes' segment.
pub const ROUTER_V4: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 1);
/// The router's address on the nodes' segment.
pub const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xc1, 0xab, 0, 0, 0, 0, 1);
/// Most nodes of one lab: their addresses count from 11 in one /24.
pub const NODES_MAX: usize = 200;

const BRIDGE: &str = "lan";
const WORLD_PORT: &str = "world";
const DEVICE: &str = "eth0";
const WORLD_GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const WORLD_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 1);
const ANY_V4: IpNet = IpNet::new_assert(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
const ANY_V6: IpNet = IpNet::new_assert(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);

/// The addresses of the host outside. The first of each family is the one it uses by itself; the others are there
/// so that policies can tell parts of the outside apart (`ipBlock` with `except`).
pub const WORLD: [IpAddr; 6] = [
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 10)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x10)),
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 20)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x20)),
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 10)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x200, 0, 0, 0, 0, 0x10)),
];

/// The record of a node called `name`, the `index`th from 0.
pub fn node(lab: &LabName, name: &str, index: usize) -> Node {
    let host = u8::try_from(11 + index).unwrap_or(u8::MAX);
    // Written the same way in both families: node 1 is .11 and ::11.
    let digits = u16::from_str_radix(&host.to_string(), 16).unwrap_or(u16::MAX);
    Node {
        name: name.to_owned(),
        netns: netns::path(&format!("{}{name}", lab.prefix())),
        ipv4: Ipv4Addr::new(172, 31, 255, host),
        ipv6: Ipv6Addr::new(0xfd00, 0xc1, 0xab, 0, 0, 0, 0, digits),
    }
}

/// Makes the bridge, the router and the host outside.
///
/// # Errors
/// What the kernel refused.
pub fn create_core(lab: &LabName) -> anyhow::Result<()> {
    let net = netns::create(&lab.net_namespace())?;
    let world = netns::create(&lab.world_namespace())?;
    netns::within_async(&net, || async {
        forward()?;
        let links = Links::open()?;
        links.handle.link().add(LinkBridge::new(BRIDGE).mcast_snooping(false).up().build()).execute().await?;
        let bridge = links.index(BRIDGE).await?;
        links.address(bridge, ROUTER_V4.into(), 24).await?;
        links.address(bridge, ROUTER_V6.into(), 64).await
    })?
    .context("cannot make the bridge")?;
    connect(&world, WORLD_PORT, &net)?;
    netns::within_async(&net, || async {
        let links = Links::open()?;
        let port = links.index(WORLD_PORT).await?;
        links.up(port).await?;
        links.address(port, WORLD_GATEWAY_V4.into(), 24).await?;
        links.address(port, WORLD_GATEWAY_V6.into(), 64).await
    })?
    .context("cannot connect the outside host")?;
    netns::within_async(&world, || async {
        let links = Links::open()?;
        let device = links.index(DEVICE).await?;
        links.up(device).await?;
        for address in WORLD {
            links.address(device, address, if is_far(address) { full(address) } else { on_link(address) }).await?;
        }
        // The source is named: of several addresses the kernel prefers the last for IPv6.
        links.route(ANY_V4, WORLD_GATEWAY_V4.into(), Some(WORLD[0])).await?;
        links.route(ANY_V6, WORLD_GATEWAY_V6.into(), Some(WORLD[1])).await
    })?
    .context("cannot make the outside host")?;
    netns::within_async(&net, || async {
        let links = Links::open()?;
        for address in WORLD.into_iter().filter(|address| is_far(*address)) {
            let gateway = if address.is_ipv4() { WORLD[0] } else { WORLD[1] };
            links.route(IpNet::from(address), gateway, None).await?;
        }
        Ok::<(), anyhow::Error>(())
    })?
    .context("cannot route to the outside host")
}

/// Makes a node's namespace and connects it to the bridge.
///
/// # Errors
/// What the kernel refused.
pub fn create_node(lab: &LabName, node: &Node) -> anyhow::Result<()> {
    let net = netns::path(&lab.net_namespace());
    let namespace = format!("{}{}", lab.prefix(), node.name);
    let port = format!("port{}", node.ipv4.octets()[3]);
    let path = netns::create(&namespace)?;
    connect(&path, &port, &net).with_context(|| format!("cannot connect the node {}", node.name))?;
    netns::within_async(&net, || async {
        let links = Links::open()?;
        let (bridge, port) = (links.index(BRIDGE).await?, links.index(&port).await?);
        let plugged = LinkUnspec::new_with_index(port).controller(bridge).up().build();
        links.handle.link().change(plugged).execute().await?;
        Ok::<(), anyhow::Error>(())
    })?
    .with_context(|| format!("cannot connect the node {}", node.name))?;
    netns::within_async(&path, || async {
        forward()?;
        let links = Links::open()?;
        let device = links.index(DEVICE).await?;
        links.up(device).await?;
        links.address(device, node.ipv4.into(), 24).await?;
        links.address(device, node.ipv6.into(), 64).await?;
        links.route(ANY_V4, ROUTER_V4.into(), None).await?;
        links.route(ANY_V6, ROUTER_V6.into(), None).await
    })?
    .with_context(|| format!("cannot make the node {}", node.name))
}

/// Tells the router the way to each node's pod networks.
///
/// # Errors
/// What the kernel refused.
pub fn route_pods(lab: &Lab, pod_networks: &[(&Node, Vec<IpNet>)]) -> anyhow::Result<()> {
    netns::within_async(&netns::path(&lab.name.net_namespace()), || async {
        let links = Links::open()?;
        for (node, networks) in pod_networks {
            for network in networks {
                let gateway = if network.addr().is_ipv4() { node.ipv4.into() } else { node.ipv6.into() };
                links.route(*network, gateway, None).await?;
            }
        }
        Ok::<(), anyhow::Error>(())
    })?
    .context("cannot set the router's routes to the pods")
}

/// Brings the loopback of the calling thread's namespace up.
///
/// # Errors
/// What the kernel refused.
pub async fn loopback_up() -> anyhow::Result<()> {
    let links = Links::open()?;
    let loopback = links.index("lo").await?;
    links.up(loopback).await
}

/// Makes a pair of devices: `eth0` in the namespace `near`, and `port` in the namespace `far`.
fn connect(near: &Path, port: &str, far: &Path) -> anyhow::Result<()> {
    let target = File::open(far).with_context(|| format!("cannot open {}", far.display()))?;
    netns::within_async(near, || async {
        let links = Links::open()?;
        links.handle.link().add(LinkVeth::new(DEVICE, port).build()).execute().await?;
        let moved = LinkUnspec::new_with_index(links.index(port).await?).setns_by_fd(target.as_raw_fd()).build();
        links.handle.link().change(moved).execute().await?;
        Ok::<(), anyhow::Error>(())
    })?
}

/// Whether an address of the outside host lies beyond the segment it shares with the router.
fn is_far(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.octets()[..3] != WORLD_GATEWAY_V4.octets()[..3],
        IpAddr::V6(address) => address.segments()[..4] != WORLD_GATEWAY_V6.segments()[..4],
    }
}

fn on_link(address: IpAddr) -> u8 {
    if address.is_ipv4() { 24 } else { 64 }
}

fn full(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The links of the calling thread's namespace.
struct Links {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Links {
    fn open() -> anyhow::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    async fn index(&self, name: &str) -> anyhow::Result<u32> {
        let mut found = self.handle.link().get().match_name(name.to_owned()).execute();
        let link = found.try_next().await.with_context(|| format!("cannot find the device {name}"))?;
        Ok(link.with_context(|| format!("there is no device {name}"))?.header.index)
    }

    async fn up(&self, index: u32) -> anyhow::Result<()> {
        Ok(self.handle.link().change(LinkUnspec::new_with_index(index).up().build()).execute().await?)
    }

    async fn address(&self, index: u32, address: IpAddr, prefix: u8) -> anyhow::Result<()> {
        let mut request = self.handle.address().add(index, address, prefix);
        // Usable at once: nobody else can have it, and routes that name it as their source need it now.
        request.message_mut().header.flags = AddressHeaderFlags::Nodad;
        request.execute().await.with_context(|| format!("cannot add the address {address}/{prefix}"))
    }

    async fn route(&self, to: IpNet, via: IpAddr, source: Option<IpAddr>) -> anyhow::Result<()> {
        let mut route =
            RouteMessageBuilder::<IpAddr>::new().destination_prefix(to.network(), to.prefix_len())?.gateway(via)?;
        if let Some(source) = source {
            route = route.pref_source(source)?;
        }
        let request = self.handle.route().add(route.build()).replace();
        request.execute().await.with_context(|| format!("cannot add the route to {to} via {via}"))
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn forward() -> anyhow::Result<()> {
    sysctl("net.ipv4.ip_forward", "1")?;
    sysctl("net.ipv6.conf.all.forwarding", "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_addresses_read_the_same_in_both_families() {
        let name: LabName = "lab".parse().unwrap();
        let node = node(&name, "b", 1);
        assert_eq!((node.ipv4.to_string(), node.ipv6.to_string()), ("172.31.255.12".into(), "fd00:c1:ab::12".into()));
        assert_eq!(node.netns, Path::new("/run/netns/cirri-lab-b"));
    }
}
