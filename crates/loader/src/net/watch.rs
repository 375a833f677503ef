//! News of routes that others change.

use futures::{StreamExt, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    MulticastGroup, new_multicast_connection,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol},
    },
    sys::SocketAddr,
};

use super::{Namespace, NetError, ROUTE_PROTOCOL};

/// Hears of every route of the main table that somebody else adds or removes.
///
/// Recipes hold the neighbour that a route led to, so whoever keeps them must know.
pub struct ForeignRoutes {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
}

impl ForeignRoutes {
    /// Listens in the calling thread's namespace. Must be called on a tokio runtime.
    pub fn here() -> Result<ForeignRoutes, NetError> {
        let groups = [MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
        let (connection, _, messages) =
            new_multicast_connection(&groups).map_err(|error| match Namespace::current() {
                Ok(namespace) => {
                    NetError::Namespace { path: namespace.path().into(), action: "listen for routes in", error }
                }
                Err(unknown) => unknown,
            })?;
        tokio::spawn(connection);
        Ok(ForeignRoutes { messages })
    }

    /// Waits for the next change. `false`: there will be none any more.
    pub async fn changed(&mut self) -> bool {
        while let Some((message, _)) = self.messages.next().await {
            if let NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
            ) = message.payload
                && concerns(&route)
            {
                return true;
            }
        }
        false
    }
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
    use std::net::IpAddr;

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
