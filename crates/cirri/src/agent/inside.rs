//! The container's side of an attachment: made by ADD, compared by CHECK and when there is news of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cirri_abi::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6};
use cirri_loader::net::{
    self, Asked, Link, ListedRoute, Lookup, MAIN_TABLE, Namespace, Net, NetError, Route, SourceRoute, lookup,
};
use ipnet::IpNet;

use super::endpoint::Endpoint;
use crate::api::{Address, Told, ToldRoute};
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

/// How the container's side was found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The number of its device there.
    pub device: Option<u32>,
    /// The Ethernet address of that.
    pub mac: Option<[u8; 6]>,
    /// What is not as it should be, each in a sentence.
    pub differences: Vec<String>,
}

/// Compares the container's side with what [`set_up`] made and what the runtime was told in the end: a later plugin of
/// the chain may have changed things, and says so in the result, as far as the result can say it.
pub async fn compare(endpoint: &Endpoint, told: &Told, inside: Namespace) -> Result<Found, NetError> {
    compare_with(endpoint, told, true, inside).await
}

/// Compares it with what [`set_up`] made alone. Where else packets may go is the container's own affair.
pub async fn compare_made(endpoint: &Endpoint, inside: Namespace) -> Result<Vec<String>, NetError> {
    let everywhere = |ip: IpAddr| {
        let unspecified: IpAddr =
            if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        ToldRoute { to: Address { ip: unspecified, prefix: 0 }, via: gateway(ip) }
    };
    let routes = endpoint.addresses().map(everywhere).collect();
    let made = Told { routes, ..Told::default() };
    Ok(compare_with(endpoint, &made, false, inside).await?.differences)
}

async fn compare_with(endpoint: &Endpoint, told: &Told, ways: bool, inside: Namespace) -> Result<Found, NetError> {
    let net = Net::of(inside)?;
    let name = &endpoint.attachment.ifname;
    let Some(link) = net.find_link(name).await?.filter(|link| link.name == *name) else {
        return Ok(Found { differences: vec![format!("there is no {name} in the container")], ..Found::default() });
    };
    let mut found = of_device(endpoint, told, &link);
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
    let added = told.addresses.iter().map(|it| net::Address { ip: it.ip, prefix: it.prefix, device: link.index });
    for address in addresses(endpoint, link.index).chain(added.filter(|it| !endpoint.addresses().any(|ip| ip == it.ip)))
    {
        if !there.contains(&address) {
            found.push(format!("{name} does not have the address {}/{}", address.ip, address.prefix));
        }
    }
    found.extend(of_routes(endpoint, told, &net, link.index, ways).await?);
    Ok(Found { device: Some(link.index), mac: link.mac, differences: found })
}

/// What differs of the device itself.
fn of_device(endpoint: &Endpoint, told: &Told, link: &Link) -> Vec<String> {
    let name = &link.name;
    let mut found = Vec::new();
    if link.kind != "veth" || link.peer != Some(endpoint.ifindex) {
        found.push(format!("{name} is another device than the one that was attached"));
    }
    if !link.up {
        found.push(format!("{name} is down"));
    }
    let mac = told.mac.clone().unwrap_or_else(|| workload::mac_text(endpoint.mac));
    let possible = workload::parse_mac(&mac).filter(|mac| *mac != GATEWAY_MAC);
    if link.mac.is_none() || link.mac != possible {
        let now = link.mac.map_or_else(|| "none".to_owned(), workload::mac_text);
        found.push(format!("{name} has the address {now}, not {mac}"));
    }
    let fits = match told.mtu {
        Some(mtu) => link.mtu == mtu,
        // Nobody could have told of a smaller one. It does no harm, a larger one does.
        None => endpoint.mtu == 0 || link.mtu <= endpoint.mtu,
    };
    if !fits {
        found.push(format!("{name} has the MTU {}, not {}", link.mtu, told.mtu.unwrap_or(endpoint.mtu)));
    }
    found
}

/// Which routes are not there. Ours may stand in another table by now, if a rule leads all packets from the address to
/// it: then they leave as they should. `ways`: whether to ask the kernel, too, which way packets go.
async fn of_routes(
    endpoint: &Endpoint,
    told: &Told,
    net: &Net,
    device: u32,
    ways: bool,
) -> Result<Vec<String>, NetError> {
    let name = &endpoint.attachment.ifname;
    let routes = net.table_routes().await?;
    let mut found = Vec::new();
    for ip in endpoint.addresses() {
        let is_told = |route: &&ToldRoute| route.via == gateway(ip);
        let (everywhere, more): (Vec<ToldRoute>, Vec<ToldRoute>) =
            told.routes.iter().filter(is_told).partition(|route| route.to.prefix == 0);
        for ToldRoute { to, via } in more {
            let net = |ip, prefix| IpNet::new(ip, prefix).map(|net| net.trunc());
            let is_it = |route: &Route| route.via == Some(via) && net(route.to, route.prefix) == net(to.ip, to.prefix);
            if !routes.iter().any(|(_, listed)| is_it(&listed.route)) {
                found.push(format!("there is no route to {}/{} via {via}", to.ip, to.prefix));
            }
        }
        if !endpoint.has_default.get(ip) {
            let wanted = source_route(endpoint, ip, device);
            if !net.has_source_route(&wanted).await? {
                found.push(format!("there is no route for {wanted} by {name}"));
            }
            continue;
        }
        if endpoint.answered.get(ip) && everywhere.is_empty() {
            continue;
        }
        let led_to = net.tables_from(ip).await?;
        for wanted in default_routes(ip, device) {
            let is_it = |(table, ListedRoute { route, plain }): &(u32, ListedRoute)| {
                (*table == MAIN_TABLE || led_to.contains(table)) && *plain && unasked(*route) == unasked(wanted)
            };
            if !routes.iter().any(is_it) {
                found.push(format!("there is no route to {}/{} by {name} as it was made", wanted.to, wanted.prefix));
            }
        }
        if ways {
            found.extend(of_way(told, net, ip, Lookup::Leaves { device, via: Some(gateway(ip)) })?);
        }
    }
    Ok(found)
}

/// The same route; whether its router is asked for makes no difference.
fn unasked(route: Route) -> Route {
    Route { onlink: false, ..route }
}

/// Packets from an address that do not go the way of the default route, whatever rule or narrower route takes them from
/// it. The kernel is asked for one far address in each half of the family, but for what the runtime was told of.
fn of_way(told: &Told, net: &Net, from: IpAddr, wanted: Lookup) -> Result<Vec<String>, NetError> {
    let far: [IpAddr; 2] = match from {
        IpAddr::V4(_) => [Ipv4Addr::new(8, 0, 0, 1).into(), Ipv4Addr::new(192, 0, 2, 1).into()],
        IpAddr::V6(_) => {
            let first = |word| Ipv6Addr::new(word, 0xdb8, 0, 0, 0, 0, 0, 1).into();
            [first(0x2001), first(0xc001)]
        }
    };
    let leads = |route: &ToldRoute, to: &IpAddr| {
        route.to.prefix > 0 && IpNet::new(route.to.ip, route.to.prefix).is_ok_and(|net| net.contains(to))
    };
    let mut found = Vec::new();
    for to in far.into_iter().filter(|to| !told.routes.iter().any(|route| leads(route, to))) {
        let asked = Asked { to, from: Some(from), by: None };
        let way = net.namespace().run(|| lookup(asked))?;
        if way.is_ok_and(|way| way != wanted) {
            found.push(format!("packets from {from} to {to} do not leave as they did"));
        }
    }
    Ok(found)
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
