//! The node as it is: its devices and addresses, and the settings that the packet path needs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cirri_abi::VXLAN_PORT;
use cirri_loader::net::{Link, Net, NetError, Vxlan};

use crate::config::{Config, RoutingMode};
use crate::settings::{Settings, SettingsError};

/// Name of the overlay device.
pub const OVERLAY: &str = "cirri_vxlan";
/// Bytes that the overlay puts before a packet: outer IPv4, UDP, VXLAN, inner Ethernet.
pub const OVERLAY_COST: u32 = 50;
/// The smallest MTU with which the kernel gives a device IPv6.
pub const IPV6_MTU: u32 = 1280;

/// What was found out about this node when the agent started.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its IPv4 address; peers send to it.
    pub v4: Ipv4Addr,
    /// Its IPv6 address; without one its workloads have IPv4 only.
    pub v6: Option<Ipv6Addr>,
    /// Why workloads have no IPv6 although the node has it, or would have.
    pub without_v6: Option<String>,
    /// Devices that lead to the network.
    pub devices: Vec<Link>,
    /// The one of them that has the address.
    pub uplink: u32,
    /// The overlay device, with the overlay.
    pub overlay: Option<Link>,
    /// Every address of the node, for the address cache.
    pub addresses: Vec<IpAddr>,
    /// Largest packet of a workload, bytes from the IP header on.
    pub mtu: u32,
    /// The kernel's number of its network namespace.
    pub netns_cookie: u64,
}

/// A node that the agent cannot run on as it is.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The network cannot be asked or changed.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A setting cannot be recorded or changed, or another instance has the namespace.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// No address to be reached at.
    #[error("no IPv4 address found for this node; set node.ipv4, or node.devices to the device that has it")]
    NoAddress,
    /// The configured address is on no device.
    #[error("no device has {0}; correct node.ipv4 and node.ipv6, or give the address to a device first")]
    ForeignAddress(IpAddr),
    /// No name.
    #[error("the host has no name; set node.name")]
    NoName,
    /// IPv6 is wanted, and there is no room for its packets.
    #[error(
        "cluster.podCidrV6 asks for pods with IPv6, but {0}, or leave cluster.podCidrV6 out: pods have IPv4 alone then"
    )]
    SmallMtu(String),
}

/// What an instance claims of a network namespace, so that there is no other beside it: its routes and devices.
pub const CLAIM: &str = "node";

/// Looks around, applies settings, makes the overlay device. `asked`: whether the configuration names IPv6 itself.
///
/// # Errors
/// See [`NodeError`].
pub async fn prepare(config: &Config, asked: bool, net: &Net, settings: &mut Settings) -> Result<Node, NodeError> {
    let mut node = discover(config, net).await?;
    match &node.without_v6 {
        Some(why) if asked => return Err(NodeError::SmallMtu(why.clone())),
        Some(why) => tracing::warn!("pods have IPv4 alone: {why}"),
        None => {}
    }
    // Before anything is touched that another instance may have made.
    settings.claim(CLAIM)?;
    apply_settings(config, settings, &node)?;
    if config.routing.mode == RoutingMode::Overlay {
        if net.find_link(OVERLAY).await?.is_some_and(|link| !is_overlay(&link)) {
            net.delete_link(OVERLAY).await?;
        }
        node.overlay = Some(make_overlay(net, node.mtu).await?);
    } else {
        // What an earlier run with the overlay left.
        net.delete_link(OVERLAY).await?;
    }
    Ok(node)
}

/// Makes the overlay device, or what is there of it as it should be.
///
/// # Errors
/// The kernel refuses.
pub async fn make_overlay(net: &Net, mtu: u32) -> Result<Link, NetError> {
    net.create_vxlan(OVERLAY, VXLAN_PORT, mtu).await?;
    net.set_mtu(OVERLAY, mtu).await?;
    net.set_noarp(OVERLAY).await?;
    quiet(net, OVERLAY, mtu)?;
    net.set_up(OVERLAY).await?;
    net.link(OVERLAY).await
}

/// Whether a device is made as the overlay's must be; what can be changed later does not matter.
pub fn is_overlay(link: &Link) -> bool {
    link.vxlan == Some(Vxlan { port: VXLAN_PORT, collect_metadata: true, odd: false })
}

/// Every address of the node that packets may be for: not of loopback, not IPv6 link-local.
///
/// # Errors
/// The kernel does not tell.
pub async fn addresses(net: &Net) -> Result<Vec<IpAddr>, NetError> {
    let mut all: Vec<IpAddr> = net.addresses().await?.iter().map(|address| address.ip).filter(is_global).collect();
    all.sort();
    all.dedup();
    Ok(all)
}

/// Makes a device of ours, of this MTU, have its [`quiet_settings`].
///
/// # Errors
/// A setting cannot be written.
pub fn quiet(net: &Net, device: &str, mtu: u32) -> Result<(), NetError> {
    let v6 = has_ipv6(net) && mtu >= IPV6_MTU;
    quiet_settings(device, v6).iter().try_for_each(|(setting, value)| net.set_sysctl(setting, value))
}

/// Settings of a device of ours, with IPv6 or without (the namespace has none, or the device's MTU is below
/// [`IPV6_MTU`]): IPv6 as the namespace has it, those of [`device_settings`], no address of its own by router, no wait
/// before an address is used.
pub fn quiet_settings(device: &str, v6: bool) -> Vec<(String, &'static str)> {
    let mut settings = Vec::new();
    if v6 {
        // First: while it is set the others have no effect. Devices that are made anew may come so.
        settings.push((format!("ipv6/conf/{device}/disable_ipv6"), "0"));
    }
    settings.extend(device_settings(device, v6));
    if v6 {
        settings.push((format!("ipv6/conf/{device}/accept_dad"), "0"));
        settings.push((format!("ipv6/conf/{device}/accept_ra"), "0"));
    }
    settings
}

/// Whether the namespace has IPv6 at all.
pub fn has_ipv6(net: &Net) -> bool {
    net.sysctl("ipv6/conf/all/disable_ipv6").is_ok_and(|disabled| disabled == "0")
}

async fn discover(config: &Config, net: &Net) -> Result<Node, NodeError> {
    let links = net.links().await?;
    let all = net.addresses().await?;
    let named = |name: &str| links.iter().find(|link| link.name == name);
    let mut devices = Vec::new();
    for name in &config.node.devices {
        devices.push(net.link(name).await?);
    }
    let first_of = |device: u32, v6: bool| {
        all.iter()
            .filter(|address| address.device == device && address.ip.is_ipv6() == v6)
            .map(|address| address.ip)
            .find(is_global)
    };
    let default_device = net.default_route(false).await?.map(|route| route.device);
    let v4 = match config.node.ipv4 {
        Some(v4) => v4,
        None => {
            let device = devices.first().map(|link| link.index).or(default_device);
            match device.and_then(|device| first_of(device, false)) {
                Some(IpAddr::V4(v4)) => v4,
                _ => return Err(NodeError::NoAddress),
            }
        }
    };
    let device_of = |ip: IpAddr| {
        all.iter().find(|address| address.ip == ip).map(|address| address.device).ok_or(NodeError::ForeignAddress(ip))
    };
    let uplink = device_of(IpAddr::V4(v4))?;
    let v6 = match config.node.ipv6 {
        Some(v6) => {
            device_of(IpAddr::V6(v6))?;
            Some(v6)
        }
        None => match first_of(uplink, true) {
            Some(IpAddr::V6(v6)) => Some(v6),
            _ => None,
        },
    };
    if devices.is_empty() {
        devices.extend(links.iter().find(|link| link.index == uplink).cloned());
    }
    let narrowest = devices.iter().min_by_key(|link| link.mtu);
    let underlay = narrowest.map_or(1500, |link| link.mtu);
    let cost = if config.routing.mode == RoutingMode::Overlay { OVERLAY_COST } else { 0 };
    let v6 = v6.filter(|_| has_ipv6(net));
    let lacks = underlay < IPV6_MTU + cost && has_ipv6(net) && (v6.is_some() || underlay < IPV6_MTU);
    let without_v6 = narrowest.filter(|_| lacks).map(|link| without_v6(link, cost));
    Ok(Node {
        name: name(config)?,
        v4,
        v6: v6.filter(|_| !lacks),
        without_v6,
        devices,
        uplink,
        overlay: named(OVERLAY).cloned(),
        addresses: addresses(net).await?,
        mtu: underlay.saturating_sub(cost),
        netns_cookie: net.namespace().cookie()?,
    })
}

/// Why there is no IPv6 behind a device, and what to do.
fn without_v6(link: &Link, cost: u32) -> String {
    let Link { name, mtu, .. } = link;
    let overlay = if cost > 0 { format!(", of which the overlay takes {cost}") } else { String::new() };
    let least = IPV6_MTU + cost;
    format!("{name} has an MTU of {mtu}{overlay}, and IPv6 needs {IPV6_MTU}; give {name} an MTU of {least} or more")
}

fn apply_settings(config: &Config, settings: &mut Settings, node: &Node) -> Result<(), SettingsError> {
    settings.set("ipv4/ip_forward", "1")?;
    if node.v6.is_some() {
        settings.set("ipv6/conf/all/forwarding", "1")?;
    }
    // Masqueraded connections use these source ports; the node's own sockets must not.
    if config.masquerade.ipv4 || config.masquerade.ipv6 {
        settings.reserve(config.masquerade.ports)?;
    }
    // After those of all devices, of which the kernel makes each one's.
    for (setting, value) in node.devices.iter().flat_map(|device| device_settings(&device.name, node.v6.is_some())) {
        settings.set(&setting, value)?;
    }
    // The kernel takes the larger of this and the device's.
    settings.set(&rp_filter("all"), "0")
}

/// Settings of every device that packets of workloads pass: they are forwarded, by whatever way they come. The kernel
/// has one for each device, whatever that of all devices says.
pub fn device_settings(device: &str, v6: bool) -> Vec<(String, &'static str)> {
    let mut settings = vec![(rp_filter(device), "0"), (forwarding(device, false), "1")];
    settings.extend(v6.then(|| (forwarding(device, true), "1")));
    settings
}

/// The setting that lets the kernel send on what came in by a device.
pub fn forwarding(device: &str, v6: bool) -> String {
    format!("ipv{}/conf/{device}/forwarding", if v6 { 6 } else { 4 })
}

/// The setting that makes the kernel drop what comes by another way than answers leave.
pub fn rp_filter(device: &str) -> String {
    format!("ipv4/conf/{device}/rp_filter")
}

/// The node's name: the configured one, or the host's.
///
/// # Errors
/// There is none.
pub fn name(config: &Config) -> Result<String, NodeError> {
    if !config.node.name.is_empty() {
        return Ok(config.node.name.clone());
    }
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { Err(NodeError::NoName) } else { Ok(name) }
}

fn is_global(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}
