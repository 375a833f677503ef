//! News of routes, devices and neighbours.

use std::{collections::HashMap, net::IpAddr};

use futures::{StreamExt, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    MulticastGroup, new_multicast_connection,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol},
    },
    sys::SocketAddr,
};
use tokio::task::JoinHandle;

use super::{Namespace, NetError, ROUTE_PROTOCOL};

/// Hears of every route of the main table that somebody else adds or removes.
///
/// Recipes hold the neighbour that a route led to, so whoever keeps them must know.
pub struct ForeignRoutes {
    messages: Messages,
}

pub(super) type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

impl ForeignRoutes {
    /// Listens in the calling thread's namespace. Must be called on a tokio runtime.
    pub fn here() -> Result<ForeignRoutes, NetError> {
        let groups = [MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
        Ok(ForeignRoutes { messages: listen(&groups, "listen for routes in")? })
    }

    /// Waits for the next change. `false`: there will be none any more.
    pub async fn changed(&mut self) -> bool {
        while let Some((message, _)) = self.messages.next().await {
            match message.payload {
                NetlinkPayload::InnerMessage(
                    RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
                ) if concerns(&route) => return true,
                // There was more than the kernel had room for: it may have been a route.
                NetlinkPayload::Overrun(_) => return true,
                _ => {}
            }
        }
        false
    }
}

/// Hears of every device and every address of one that comes, goes or changes.
pub struct DeviceNews {
    messages: Messages,
}

impl DeviceNews {
    /// Listens in the calling thread's namespace. Must be called on a tokio runtime.
    pub fn here() -> Result<DeviceNews, NetError> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        Ok(DeviceNews { messages: listen(&groups, "listen for devices in")? })
    }

    /// Waits for the next change. `false`: there will be none any more.
    pub async fn changed(&mut self) -> bool {
        self.messages.next().await.is_some()
    }
}

/// Hears of every change of devices, addresses, routes and rules in a namespace, from outside of it. The namespace lives as
/// long as this does.
#[derive(Debug)]
pub struct NamespaceNews {
    messages: Messages,
    connection: JoinHandle<()>,
}

impl NamespaceNews {
    /// Listens in a namespace. Must be called on a tokio runtime.
    pub fn of(namespace: &Namespace) -> Result<NamespaceNews, NetError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        let runtime = tokio::runtime::Handle::current();
        let opened = namespace.run(|| {
            let _registers_here = runtime.enter();
            new_multicast_connection(&groups)
        })?;
        let action = "listen for changes in";
        let (connection, _, messages) =
            opened.map_err(|error| NetError::Namespace { path: namespace.path().into(), action, error })?;
        Ok(NamespaceNews { messages, connection: runtime.spawn(connection) })
    }

    /// Waits for the next change. `false`: there will be none any more.
    pub async fn changed(&mut self) -> bool {
        self.messages.next().await.is_some()
    }
}

impl Drop for NamespaceNews {
    fn drop(&mut self) {
        // It would wait for news, and keep the namespace.
        self.connection.abort();
    }
}

/// Hears of every neighbour that the kernel finds, loses or finds elsewhere. Those that somebody made known
/// for good are not among them.
pub struct Neighbours {
    messages: Messages,
    known: HashMap<(u32, IpAddr), [u8; 6]>,
}

/// What became of a neighbour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NeighbourChange {
    /// Its address.
    pub ip: IpAddr,
    /// The device.
    pub device: u32,
    /// Its Ethernet address; `None`: it does not answer, or the kernel forgot it.
    pub mac: Option<[u8; 6]>,
}

impl Neighbours {
    /// Listens in the calling thread's namespace. Must be called on a tokio runtime.
    ///
    /// Of neighbours that are known already one hears when the kernel makes sure of them again.
    pub fn here() -> Result<Neighbours, NetError> {
        let messages = listen(&[MulticastGroup::Neigh], "listen for neighbours in")?;
        Ok(Neighbours { messages, known: HashMap::new() })
    }

    /// Waits for the next change. `None`: there will be none any more.
    pub async fn changed(&mut self) -> Option<NeighbourChange> {
        while let Some((message, _)) = self.messages.next().await {
            let change = match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(neighbour)) => told(&neighbour),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(neighbour)) => {
                    told(&neighbour).map(|change| NeighbourChange { mac: None, ..change })
                }
                _ => None,
            };
            if let Some(change) = change.filter(|change| self.is_news(change)) {
                return Some(change);
            }
        }
        None
    }

    /// The kernel tells of every step of a neighbour's life; few change what its frames are sent to.
    fn is_news(&mut self, change: &NeighbourChange) -> bool {
        let key = (change.device, change.ip);
        match change.mac {
            Some(mac) => self.known.insert(key, mac) != Some(mac),
            None => self.known.remove(&key).is_some(),
        }
    }
}

pub(super) fn listen(groups: &[MulticastGroup], action: &'static str) -> Result<Messages, NetError> {
    let (connection, _, messages) = new_multicast_connection(groups).map_err(|error| match Namespace::current() {
        Ok(namespace) => NetError::Namespace { path: namespace.path().into(), action, error },
        Err(unknown) => unknown,
    })?;
    tokio::spawn(connection);
    Ok(messages)
}

/// What a message says, if it is about one that the kernel looks after.
fn told(message: &NeighbourMessage) -> Option<NeighbourChange> {
    let ip = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })?;
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice().try_into().ok(),
        _ => None,
    });
    let mac = match message.header.state {
        NeighbourState::Permanent | NeighbourState::Noarp => return None,
        NeighbourState::Failed | NeighbourState::Incomplete | NeighbourState::None => None,
        _ => mac,
    };
    Some(NeighbourChange { ip, device: message.header.ifindex, mac })
}

/// Not ours, of the main table, and not a device's own link-local network.
fn concerns(route: &RouteMessage) -> bool {
    let link_local = route.attributes.iter().any(|attribute| {
        matches!(attribute, RouteAttribute::Destination(RouteAddress::Inet6(to)) if to.is_unicast_link_local())
    });
    route.header.protocol != RouteProtocol::from(ROUTE_PROTOCOL)
        && route.header.table == RouteHeader::RT_TABLE_MAIN
        && !link_local
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `RT_TABLE_LOCAL`.
    const LOCAL_TABLE: u8 = 255;

    fn route(protocol: RouteProtocol, table: u8, to: Option<&str>) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.protocol = protocol;
        message.header.table = table;
        if let Some(to) = to {
            message.attributes.push(RouteAttribute::Destination(match to.parse().expect("an address") {
                IpAddr::V4(to) => RouteAddress::Inet(to),
                IpAddr::V6(to) => RouteAddress::Inet6(to),
            }));
        }
        message
    }

    fn neighbour(state: NeighbourState, mac: u8) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = 7;
        message.header.state = state;
        let ip = NeighbourAddress::Inet([192, 0, 2, 1].into());
        message.attributes =
            vec![NeighbourAttribute::Destination(ip), NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, mac])];
        message
    }

    #[test]
    fn a_neighbour_is_news_when_it_is_found_found_elsewhere_and_lost() {
        let (_, messages) = futures::channel::mpsc::unbounded();
        let mut neighbours = Neighbours { messages, known: HashMap::new() };
        let steps = [
            (NeighbourState::Incomplete, 0, false),
            (NeighbourState::Reachable, 1, true),
            (NeighbourState::Stale, 1, false),
            (NeighbourState::Probe, 1, false),
            (NeighbourState::Reachable, 2, true),
            (NeighbourState::Failed, 2, true),
            (NeighbourState::Failed, 2, false),
        ];
        for (state, mac, news) in steps {
            let change = told(&neighbour(state, mac)).expect("the kernel's own");
            assert_eq!(neighbours.is_news(&change), news, "{change:?}");
        }
        assert_eq!(told(&neighbour(NeighbourState::Permanent, 1)), None);
        assert_eq!(told(&neighbour(NeighbourState::Noarp, 1)), None);
    }

    #[test]
    fn only_foreign_routes_of_the_main_table_are_news() {
        let main = RouteHeader::RT_TABLE_MAIN;
        assert!(concerns(&route(RouteProtocol::Static, main, None)));
        assert!(concerns(&route(RouteProtocol::Kernel, main, Some("192.0.2.0"))));
        assert!(!concerns(&route(RouteProtocol::from(ROUTE_PROTOCOL), main, Some("10.0.0.1"))));
        assert!(!concerns(&route(RouteProtocol::Kernel, main, Some("fe80::"))));
        assert!(!concerns(&route(RouteProtocol::Kernel, LOCAL_TABLE, Some("192.0.2.1"))));
    }
}
