//! The container's side of an attachment: made by ADD, compared by CHECK.

use std::net::IpAddr;

use cirri_abi::{GATEWAY_V4, GATEWAY_V6};
use cirri_loader::net::{self, Namespace, Net, NetError, Route, SourceRoute};

use super::endpoint::Endpoint;
use crate::workload;

/// Settings of the device when it has an IPv6 address: below `ipv6/conf/DEVICE`.
const SETTINGS_V6: [(&str, &str); 3] = [("disable_ipv6", "0"), ("accept_dad", "0"), ("accept_ra", "0")];
/// Tables of routes in a container: this and the number of the endpoint.
const TABLES: u32 = 193_000_000;

/// Brings the device up, with its addresses and routes. A family that has its default route by another
/// device already keeps it: the first attachment has the default route. Packets from this one's address
/// leave by its device all the same, or answers would take a way that is not theirs.
pub async fn set_up(endpoint: &mut Endpoint, inside: Namespace) -> Result<(), NetError> {
    let net = Net::of(inside)?;
    let name = &endpoint.attachment.ifname;
    let device = net.link(name).await?.index;
    if endpoint.v6.is_some() {
        for (setting, value) in SETTINGS_V6 {
            net.set_sysctl(&format!("ipv6/conf/{name}/{setting}"), value)?;
        }
    }
    net.set_up("lo").await?;
    net.set_up(name).await?;
    for address in addresses(endpoint, device) {
        net.add_address(&address).await?;
    }
    for ip in endpoint.addresses() {
        if net.default_route(ip.is_ipv6()).await?.is_none() {
            put_default(&net, ip, device).await?;
            endpoint.has_default.set(ip, true);
        } else {
            net.put_source_route(&source_route(endpoint, ip, device)).await?;
            endpoint.has_default.set(ip, false);
        }
    }
    Ok(())
}

/// The attachment that had the default route is gone: makes this one have it, in each family in which it
/// has an address and nobody else has the route. Whether anything changed.
pub async fn take_default(endpoint: &mut Endpoint, inside: Namespace) -> Result<bool, NetError> {
    let net = Net::of(inside)?;
    let device = net.link(&endpoint.attachment.ifname).await?.index;
    let mut taken = false;
    for ip in endpoint.addresses() {
        if !endpoint.has_default.get(ip) && net.default_route(ip.is_ipv6()).await?.is_none() {
            put_default(&net, ip, device).await?;
            endpoint.has_default.set(ip, true);
            taken = true;
        }
    }
    Ok(taken)
}

/// Removes what does not go with the device: the rules that led to its tables.
pub async fn clear(endpoint: &Endpoint, inside: Namespace) -> Result<(), NetError> {
    let net = Net::of(inside)?;
    for ip in endpoint.addresses() {
        net.delete_source_rule(ip, table(endpoint)).await?;
    }
    Ok(())
}

/// What is not as [`set_up`] made it, each in a sentence about the device; with the number of the device.
pub async fn differences(endpoint: &Endpoint, inside: Namespace) -> Result<(Option<u32>, Vec<String>), NetError> {
    let net = Net::of(inside)?;
    let name = &endpoint.attachment.ifname;
    let Some(link) = net.find_link(name).await?.filter(|link| link.name == *name) else {
        return Ok((None, vec![format!("there is no {name} in the container")]));
    };
    let mut found = Vec::new();
    if link.kind != "veth" || link.peer != Some(endpoint.ifindex) {
        found.push(format!("{name} is another device than the one that was attached"));
    }
    if !link.up {
        found.push(format!("{name} is down"));
    }
    if link.mac != Some(endpoint.mac) {
        let now = link.mac.map_or_else(|| "none".to_owned(), workload::mac_text);
        found.push(format!("{name} has the address {now}, not {}", workload::mac_text(endpoint.mac)));
    }
    if endpoint.mtu != 0 && link.mtu != endpoint.mtu {
        found.push(format!("{name} has the MTU {}, not {}", link.mtu, endpoint.mtu));
    }
    if !net.find_link("lo").await?.is_some_and(|lo| lo.up) {
        found.push("lo is down".to_owned());
    }
    if endpoint.v6.is_some() {
        for (setting, value) in SETTINGS_V6 {
            let setting = format!("ipv6/conf/{name}/{setting}");
            // A container without IPv6 has no such file.
            let now = net.sysctl(&setting).unwrap_or_else(|_| "gone".to_owned());
            if now != value {
                found.push(format!("the setting {setting} is {now}, not {value}"));
            }
        }
    }
    let there = net.addresses().await?;
    for address in addresses(endpoint, link.index) {
        if !there.contains(&address) {
            found.push(format!("{name} does not have the address {}/{}", address.ip, address.prefix));
        }
    }
    let routes = net.main_routes().await?;
    for ip in endpoint.addresses() {
        if !endpoint.has_default.get(ip) {
            let wanted = source_route(endpoint, ip, link.index);
            if !net.has_source_route(&wanted).await? {
                found.push(format!("there is no route for {wanted} by {name}"));
            }
            continue;
        }
        for wanted in default_routes(ip, link.index) {
            let is_it = |route: &Route| {
                (route.to, route.prefix, route.via, route.device)
                    == (wanted.to, wanted.prefix, wanted.via, wanted.device)
            };
            if !routes.iter().any(is_it) {
                found.push(format!("there is no route to {}/{} by {name}", wanted.to, wanted.prefix));
            }
        }
    }
    Ok((Some(link.index), found))
}

async fn put_default(net: &Net, ip: IpAddr, device: u32) -> Result<(), NetError> {
    for route in default_routes(ip, device) {
        net.put_route(&route).await?;
    }
    Ok(())
}

fn default_routes(ip: IpAddr, device: u32) -> Vec<Route> {
    let gateway = gateway(ip);
    let default = Route::default_via(gateway, device);
    match gateway {
        // A router that no route leads to can be used, but not asked.
        IpAddr::V4(_) => vec![Route::host(gateway, device, None), default],
        IpAddr::V6(_) => vec![default],
    }
}

fn addresses(endpoint: &Endpoint, device: u32) -> impl Iterator<Item = net::Address> + use<> {
    let whole = |ip: IpAddr| if ip.is_ipv4() { 32 } else { 128 };
    endpoint.addresses().map(move |ip| net::Address { ip, prefix: whole(ip), device })
}

fn source_route(endpoint: &Endpoint, from: IpAddr, device: u32) -> SourceRoute {
    SourceRoute { from, via: gateway(from), device, table: table(endpoint) }
}

fn table(endpoint: &Endpoint) -> u32 {
    TABLES + u32::from(endpoint.id)
}

fn gateway(of: IpAddr) -> IpAddr {
    if of.is_ipv4() { GATEWAY_V4.into() } else { GATEWAY_V6.into() }
}
