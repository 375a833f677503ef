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
//! the pod networks, as the router of a data centre would, so that connections from outside to pods can be tried, and
//! to the addresses of services ([`super::routes`]).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;

use anyhow::{Context, bail};
use cirri_loader::net::{Address, Namespace, Net, NetError, Route, VethEnd};
use cirri_loader::{Datapath, EdgeWanted, LoadOptions};
use ipnet::IpNet;

use super::netns::{self, block_on};
use super::state::{Lab, LabName, Node};
use super::traces;

/// The router's address on the nodes' segment.
pub const ROUTER_V4: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 1);
/// The router's address on the nodes' segment.
pub const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xc1, 0xab, 0, 0, 0, 0, 1);
/// Most nodes of one lab: their addresses count from 11 in one /24.
pub const NODES_MAX: usize = 200;

/// Entries of maps that nothing is put into.
const XDP_MAP_SIZE: u32 = 1024;
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
    let router = netns::create(&lab.net_namespace())?;
    let world = netns::create(&lab.world_namespace())?;
    let made = block_on(async {
        let (router, world) = (Net::of(router)?, Net::of(world)?);
        forward(&router)?;
        router.create_bridge(BRIDGE).await?;
        bring_up(&router, BRIDGE, &[(ROUTER_V4.into(), 24), (ROUTER_V6.into(), 64)]).await?;

        connect(&world, WORLD_PORT, &router).await?;
        let gateways = [(WORLD_GATEWAY_V4.into(), 24), (WORLD_GATEWAY_V6.into(), 64)];
        let port = bring_up(&router, WORLD_PORT, &gateways).await?;
        let addresses = WORLD.map(|address| (address, if is_far(address) { full(address) } else { on_link(address) }));
        let device = bring_up(&world, DEVICE, &addresses).await?;
        // The source is named: of several addresses the kernel prefers the last for IPv6.
        route(&world, ANY_V4, WORLD_GATEWAY_V4.into(), device, Some(WORLD[0])).await?;
        route(&world, ANY_V6, WORLD_GATEWAY_V6.into(), device, Some(WORLD[1])).await?;
        for address in WORLD.into_iter().filter(|address| is_far(*address)) {
            let gateway = if address.is_ipv4() { WORLD[0] } else { WORLD[1] };
            route(&router, IpNet::from(address), gateway, port, None).await?;
        }
        Ok::<(), NetError>(())
    });
    made?.context("cannot make the lab's network")
}

/// Makes a node's namespace and connects it to the bridge.
///
/// # Errors
/// What the kernel refused.
pub fn create_node(lab: &LabName, node: &Node) -> anyhow::Result<()> {
    let namespace = netns::create(&format!("{}{}", lab.prefix(), node.name))?;
    let port = port(node);
    let made = block_on(async {
        let router = Net::of(Namespace::open(netns::path(&lab.net_namespace()))?)?;
        let net = Net::of(namespace)?;
        forward(&net)?;
        connect(&net, &port, &router).await?;
        router.set_controller(&port, BRIDGE).await?;
        router.set_up(&port).await?;
        let device = bring_up(&net, DEVICE, &[(node.ipv4.into(), 24), (node.ipv6.into(), 64)]).await?;
        route(&net, ANY_V4, ROUTER_V4.into(), device, None).await?;
        route(&net, ANY_V6, ROUTER_V6.into(), device, None).await
    });
    made?.with_context(|| format!("cannot make the node {}", node.name))
}

/// Prepares the nodes' wires for XDP, which finds there what a network card brings along: every packet has its
/// checksum when it arrives, which a pair of devices would otherwise leave to the receiver's stack, and the other end
/// takes what XDP sends back at once, which the kernel sees to only if that end has an XDP program, too.
///
/// # Errors
/// `ethtool` is not installed, or the kernel refused.
pub fn prepare_xdp(lab: &Lab) -> anyhow::Result<()> {
    let router = Namespace::open(netns::path(&lab.name.net_namespace()))?;
    router.run(|| {
        let sizes = ["FLOWS4", "FLOWS6", "PENDING4", "PENDING6", "IPCACHE"].map(|map| (map.to_owned(), XDP_MAP_SIZE));
        // Its tables stay empty: what no service is for passes on.
        let mut passing = Datapath::load(&LoadOptions {
            pin_root: traces::PIN_ROOT.into(),
            instance: lab.name.bpf_instance("net"),
            sizes: sizes.into(),
            hooking: None,
            uses: Vec::new(),
        })?;
        for node in &lab.nodes {
            let port = port(node);
            let done = Command::new("ethtool").args(["-K", &port, "tx", "off", "gro", "on"]).output();
            let done = done.context("cannot start ethtool, which XDP in a lab needs: `apt-get install ethtool`")?;
            if !done.status.success() {
                bail!("ethtool -K {port}: {}", String::from_utf8_lossy(&done.stderr).trim());
            }
            passing.attach_edge(&port, EdgeWanted::Native)?;
        }
        Ok(())
    })?
}

/// Takes the router's routes to these addresses away, and tells it that these networks are at these nodes.
///
/// # Errors
/// What the kernel refused.
pub fn change_routes(lab: &Lab, gone: &[IpAddr], put: &[(&Node, IpNet)]) -> anyhow::Result<()> {
    let set = block_on(async {
        let router = Net::of(Namespace::open(netns::path(&lab.name.net_namespace()))?)?;
        let bridge = router.link(BRIDGE).await?.index;
        for address in gone {
            let prefix = full(*address);
            let route = Route { to: *address, prefix, via: None, device: bridge, source: None, onlink: false };
            router.delete_route(&route).await?;
        }
        for (node, network) in put {
            let gateway = if network.addr().is_ipv4() { node.ipv4.into() } else { node.ipv6.into() };
            route(&router, *network, gateway, bridge, None).await?;
        }
        Ok::<(), NetError>(())
    });
    set?.context("cannot set the router's routes to the nodes")
}

/// The router's end of a node's wire.
fn port(node: &Node) -> String {
    format!("port{}", node.ipv4.octets()[3])
}

/// Makes a pair of devices: `eth0` in `near`, and `port` in `far`.
async fn connect(near: &Net, port: &str, far: &Net) -> Result<(), NetError> {
    let inside = VethEnd { name: DEVICE.into(), ..VethEnd::default() };
    let outside = VethEnd { name: port.into(), namespace: Some(far.namespace().clone()), ..VethEnd::default() };
    near.create_veth(&inside, &outside).await
}

/// Brings a device up, gives it these addresses, and answers its number.
async fn bring_up(net: &Net, name: &str, addresses: &[(IpAddr, u8)]) -> Result<u32, NetError> {
    net.set_up(name).await?;
    let device = net.link(name).await?.index;
    for (ip, prefix) in addresses.iter().copied() {
        net.add_address(&Address { ip, prefix, device }).await?;
    }
    Ok(device)
}

/// A route that is not the agent's: it removes those of its own that it does not know.
async fn route(net: &Net, to: IpNet, via: IpAddr, device: u32, source: Option<IpAddr>) -> Result<(), NetError> {
    let (prefix, to) = (to.prefix_len(), to.network());
    net.put_static_route(&Route { to, prefix, via: Some(via), device, source, onlink: false }).await
}

fn forward(net: &Net) -> Result<(), NetError> {
    net.set_sysctl("ipv4/ip_forward", "1")?;
    net.set_sysctl("ipv6/conf/all/forwarding", "1")
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn node_addresses_read_the_same_in_both_families() {
        let name: LabName = "lab".parse().unwrap();
        let node = node(&name, "b", 1);
        assert_eq!((node.ipv4.to_string(), node.ipv6.to_string()), ("172.31.255.12".into(), "fd00:c1:ab::12".into()));
        assert_eq!(node.netns, Path::new("/run/netns/cirri-lab-b"));
    }
}
