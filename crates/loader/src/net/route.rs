//! Addresses, routes and neighbours.

use std::{fmt, net::IpAddr};

use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
        },
    },
};

use super::{Net, NetError, absent_is_false, host_bits, wire};

/// The routing protocol number of Cirri's routes, so that a restart knows which are its own.
pub const ROUTE_PROTOCOL: u8 = 193;

/// The number of the table that has all routes that nobody put elsewhere.
pub const MAIN_TABLE: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// An address of a device.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// The device.
    pub device: u32,
}

/// A route of the main table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Route {
    /// Where to.
    pub to: IpAddr,
    /// Bits of that network; 0 with the unspecified address is the default route.
    pub prefix: u8,
    /// The router; without one the destination is on the device's link.
    pub via: Option<IpAddr>,
    /// The device to leave by; 0 for a network that is nowhere: packets to it are refused.
    pub device: u32,
    /// The address that this node's own packets get.
    pub source: Option<IpAddr>,
    /// The router is on the link although no route says so.
    pub onlink: bool,
}

/// A route as the kernel lists it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListedRoute {
    /// The route.
    pub route: Route,
    /// Whether this is all: Cirri's routes have no other type than these fields say, and no metrics.
    pub plain: bool,
}

/// A neighbour that is known for good.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Neighbour {
    /// Its address.
    pub ip: IpAddr,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// The device.
    pub device: u32,
}

impl Route {
    /// To everything of the family of `via`, through `via`, which is on the link of `device`.
    pub fn default_via(via: IpAddr, device: u32) -> Route {
        let to = match via {
            IpAddr::V4(_) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        };
        Route { to, prefix: 0, via: Some(via), device, source: None, onlink: true }
    }

    /// To one host, which is on the link of `device`.
    pub fn host(to: IpAddr, device: u32, source: Option<IpAddr>) -> Route {
        Route { to, prefix: host_bits(to), via: None, device, source, onlink: false }
    }

    /// What has no narrower route in this network is not to be found by a wider one.
    pub fn unreachable(to: IpAddr, prefix: u8) -> Route {
        Route { to, prefix, via: None, device: 0, source: None, onlink: false }
    }

    fn is_unreachable(&self) -> bool {
        self.device == 0
    }
}

impl Net {
    /// Adds an address, without duplicate address detection.
    pub async fn add_address(&self, address: &Address) -> Result<(), NetError> {
        let Address { ip, prefix, device } = *address;
        let mut request = self.handle.address().add(device, ip, prefix).replace();
        if ip.is_ipv6() {
            let message = request.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        self.checked(|| format!("address {ip}/{prefix} of device {device}"), "add", request.execute().await)
    }

    /// Removes an address; whether there was one.
    pub async fn delete_address(&self, address: &Address) -> Result<bool, NetError> {
        let Address { ip, prefix, device } = *address;
        let mut message = AddressMessage::default();
        message.header.family = family(ip);
        message.header.index = device;
        message.header.prefix_len = prefix;
        if ip.is_ipv4() {
            message.attributes.push(AddressAttribute::Local(ip));
        }
        message.attributes.push(AddressAttribute::Address(ip));
        absent_is_false(self.handle.address().del(message).execute().await)
            .map_err(|error| self.failed(format!("address {ip}/{prefix} of device {device}"), "delete", error))
    }

    /// The addresses of all devices, link-local ones included.
    pub async fn addresses(&self) -> Result<Vec<Address>, NetError> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let all = self.list("addresses", request, wire::Scope::All, |message| match message {
            RouteNetlinkMessage::NewAddress(address) => Some(address),
            _ => None,
        })?;
        let described = |message: &AddressMessage| {
            // The local address where there is one: on a point-to-point device the other is the peer's.
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            });
            let any = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            });
            Some(Address { ip: local.or(any)?, prefix: message.header.prefix_len, device: message.header.index })
        };
        Ok(all.iter().filter_map(described).collect())
    }

    /// Adds a route, in place of another to the same network if there is one.
    pub async fn put_route(&self, route: &Route) -> Result<(), NetError> {
        self.put(route, RouteProtocol::from(ROUTE_PROTOCOL)).await
    }

    /// The same for a route that is the administrator's and not Cirri's: [`Net::routes`] does not list it.
    pub async fn put_static_route(&self, route: &Route) -> Result<(), NetError> {
        self.put(route, RouteProtocol::Static).await
    }

    async fn put(&self, route: &Route, protocol: RouteProtocol) -> Result<(), NetError> {
        let mut message = self.message(route)?;
        message.header.protocol = protocol;
        self.checked(|| shown(route), "add", self.handle.route().add(message).replace().execute().await)
    }

    /// Removes a route; whether there was one.
    pub async fn delete_route(&self, route: &Route) -> Result<bool, NetError> {
        let deleted = self.handle.route().del(self.message(route)?).execute().await;
        absent_is_false(deleted).map_err(|error| self.failed(shown(route), "delete", error))
    }

    /// Cirri's own routes ([`ROUTE_PROTOCOL`]) of both families. The kernel picks them out: others may have a hundred
    /// thousand.
    pub async fn routes(&self) -> Result<Vec<ListedRoute>, NetError> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            request.header.protocol = RouteProtocol::from(ROUTE_PROTOCOL);
            request.header.table = RouteHeader::RT_TABLE_MAIN;
            all.extend(self.route_list(request, wire::Scope::Picked)?);
        }
        Ok(all.iter().filter_map(listed).collect())
    }

    /// Networks inside these that routes of others in the main tables lead to.
    pub async fn strange_routes(&self, within: &[(IpAddr, u8)]) -> Result<Vec<(IpAddr, u8)>, NetError> {
        let all = self.route_messages().await?;
        Ok(all.iter().filter_map(|message| stranger(message, within)).collect())
    }

    /// The device and the router of the default route with the smallest metric, whoever made it.
    pub async fn default_route(&self, v6: bool) -> Result<Option<Route>, NetError> {
        let wanted = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let metric = |message: &RouteMessage| {
            message.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Priority(metric) => Some(*metric),
                _ => None,
            })
        };
        let all = self.route_messages().await?;
        let defaults = all.iter().filter(|message| {
            message.header.address_family == wanted
                && message.header.destination_prefix_length == 0
                && message.header.kind == RouteType::Unicast
        });
        Ok(defaults.min_by_key(|message| metric(message).unwrap_or_default()).and_then(described))
    }

    /// Makes a neighbour known for good.
    pub async fn put_neighbour(&self, neighbour: &Neighbour) -> Result<(), NetError> {
        let Neighbour { ip, mac, device } = *neighbour;
        let request = self.handle.neighbours().add(device, ip).link_layer_address(&mac).replace();
        self.checked(|| format!("neighbour {ip} of device {device}"), "add", request.execute().await)
    }

    /// Forgets a neighbour; whether it was known.
    pub async fn delete_neighbour(&self, device: u32, ip: IpAddr) -> Result<bool, NetError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(ip);
        message.header.ifindex = device;
        message.attributes.push(NeighbourAttribute::Destination(match ip {
            IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
            IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
        }));
        absent_is_false(self.handle.neighbours().del(message).execute().await)
            .map_err(|error| self.failed(format!("neighbour {ip} of device {device}"), "delete", error))
    }

    /// The neighbours that are known for good.
    pub async fn neighbours(&self) -> Result<Vec<Neighbour>, NetError> {
        self.neighbours_in(|state| state == NeighbourState::Permanent).await
    }

    /// All neighbours that the kernel found by itself and still knows.
    pub async fn neighbours_found(&self) -> Result<Vec<Neighbour>, NetError> {
        self.neighbours_in(|state| state != NeighbourState::Permanent && state != NeighbourState::Failed).await
    }

    async fn neighbours_in(&self, wanted: impl Fn(NeighbourState) -> bool) -> Result<Vec<Neighbour>, NetError> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        let all = self.list("neighbours", request, wire::Scope::All, |message| match message {
            RouteNetlinkMessage::NewNeighbour(neighbour) => Some(neighbour),
            _ => None,
        })?;
        let described = |message: &NeighbourMessage| {
            let ip = message.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
                _ => None,
            })?;
            let mac = message.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice().try_into().ok(),
                _ => None,
            })?;
            Some(Neighbour { ip, mac, device: message.header.ifindex })
        };
        Ok(all.iter().filter(|message| wanted(message.header.state)).filter_map(described).collect())
    }

    /// All routes of all tables, whoever made them, as far as they lead somewhere or are unreachable, each with the
    /// number of its table.
    pub async fn table_routes(&self) -> Result<Vec<(u32, ListedRoute)>, NetError> {
        let all = self.all_route_messages().await?;
        Ok(all.iter().filter_map(|message| Some((table(message), listed(message)?))).collect())
    }

    async fn route_messages(&self) -> Result<Vec<RouteMessage>, NetError> {
        let mut all = self.all_route_messages().await?;
        all.retain(|route| table(route) == MAIN_TABLE);
        Ok(all)
    }

    /// All routes of all tables.
    pub(super) async fn all_route_messages(&self) -> Result<Vec<RouteMessage>, NetError> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            all.extend(self.route_list(request, wire::Scope::All)?);
        }
        Ok(all)
    }

    fn route_list(&self, request: RouteMessage, scope: wire::Scope) -> Result<Vec<RouteMessage>, NetError> {
        let listed = self.list("routes", RouteNetlinkMessage::GetRoute(request), scope, |message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        });
        match listed {
            // A kernel without this family has no routes of it, and one without a table none in that.
            Err(NetError::Kernel { error, .. })
                if [libc::EAFNOSUPPORT, libc::ENOENT].map(Some).contains(&error.raw_os_error()) =>
            {
                Ok(Vec::new())
            }
            listed => listed,
        }
    }

    pub(super) fn message(&self, route: &Route) -> Result<RouteMessage, NetError> {
        let refuse = |error: String| self.failed(shown(route), "describe", std::io::Error::other(error));
        let on_link = route.via.is_none() && route.to.is_ipv4() && !route.is_unreachable();
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(route.to, route.prefix)
            .map_err(|error| refuse(error.to_string()))?
            .protocol(RouteProtocol::from(ROUTE_PROTOCOL))
            .scope(if on_link { RouteScope::Link } else { RouteScope::Universe });
        builder = match route.is_unreachable() {
            true => builder.kind(RouteType::Unreachable),
            false => builder.output_interface(route.device),
        };
        if let Some(source) = route.source {
            builder = builder.pref_source(source).map_err(|error| refuse(error.to_string()))?;
        }
        if let Some(via) = route.via {
            builder = builder.gateway(via).map_err(|error| refuse(error.to_string()))?;
        }
        if route.onlink {
            builder = builder.onlink();
        }
        Ok(builder.build())
    }
}

/// The network that a route of somebody else leads to, if that is a main table's and inside one of these.
pub(super) fn stranger(message: &RouteMessage, within: &[(IpAddr, u8)]) -> Option<(IpAddr, u8)> {
    let foreign = message.header.protocol != RouteProtocol::from(ROUTE_PROTOCOL);
    let to = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(to) => ip(to),
        _ => None,
    })?;
    let prefix = message.header.destination_prefix_length;
    let inside = within.iter().any(|(net, bits)| *bits < prefix && first_bits(*net, *bits) == first_bits(to, *bits));
    (foreign && table(message) == u32::from(RouteHeader::RT_TABLE_MAIN) && inside).then_some((to, prefix))
}

/// The network of an address; of IPv4 with a bit that no address of IPv6 has.
fn first_bits(ip: IpAddr, bits: u8) -> (bool, u128) {
    let (all, width) = match ip {
        IpAddr::V4(ip) => (u128::from(ip.to_bits()), 32u32),
        IpAddr::V6(ip) => (ip.to_bits(), 128),
    };
    (ip.is_ipv4(), all.checked_shr(width.saturating_sub(bits.into())).unwrap_or_default())
}

/// Whether a route is no more than [`described`] says.
pub(super) fn listed(message: &RouteMessage) -> Option<ListedRoute> {
    Some(ListedRoute { route: described(message)?, plain: is_plain(message) })
}

fn is_plain(message: &RouteMessage) -> bool {
    let more = message.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Metrics(_)));
    matches!(message.header.kind, RouteType::Unicast | RouteType::Unreachable) && !more
}

/// The number of its table.
pub(super) fn table(message: &RouteMessage) -> u32 {
    let wide = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    wide.unwrap_or_else(|| message.header.table.into())
}

pub(super) fn described(message: &RouteMessage) -> Option<Route> {
    let unspecified = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut route = Route {
        to: unspecified,
        prefix: message.header.destination_prefix_length,
        via: None,
        device: 0,
        source: None,
        onlink: message.header.flags.contains(RouteFlags::Onlink),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => route.to = ip(to)?,
            RouteAttribute::Gateway(via) => route.via = ip(via),
            RouteAttribute::PrefSource(source) => route.source = ip(source),
            RouteAttribute::Oif(device) => route.device = *device,
            _ => {}
        }
    }
    if message.header.kind == RouteType::Unreachable {
        // The kernel lists those of IPv6 on the loopback device.
        route.device = 0;
    }
    Some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

pub(super) fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn shown(route: &Route) -> String {
    route.to_string()
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Route { to, prefix, via, device, .. } = self;
        match via {
            None if self.is_unreachable() => write!(f, "unreachable route to {to}/{prefix}"),
            Some(via) => write!(f, "route to {to}/{prefix} via {via} by device {device}"),
            None => write!(f, "route to {to}/{prefix} by device {device}"),
        }
    }
}
