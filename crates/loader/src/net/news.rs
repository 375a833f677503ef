//! News that something of the node's network changed, whoever changed it.

use std::{collections::HashSet, net::IpAddr};

use futures::{FutureExt, StreamExt};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
    },
};

use super::{
    NetError, route,
    watch::{Messages, listen},
};

/// Hears of every change of devices, addresses, routes and policy rules, and of the neighbours that it was told of.
pub struct NetworkNews {
    messages: Messages,
    watched: Watched,
}

/// What somebody else may have changed among many things that are none of Cirri's.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Watched {
    /// Neighbours, by device and address. The kernel finds and forgets others all the time.
    pub neighbours: HashSet<(u32, IpAddr)>,
    /// Networks in which narrower routes of others would come first.
    pub networks: Vec<(IpAddr, u8)>,
}

/// That something changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NetworkChange {
    /// What.
    pub what: Changed,
    /// The netlink port of whoever changed it, which mostly is the number of the process; 0 is the kernel.
    pub by: u32,
}

/// What changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Changed {
    /// A device.
    Device,
    /// An address of a device.
    Address,
    /// A route.
    Route,
    /// A route of somebody else to a part of a watched network.
    Stranger,
    /// A neighbour that is watched.
    Neighbour,
    /// A policy rule.
    Rule,
    /// The kernel had more to say than there was room for: anything may have changed.
    Unknown,
}

impl NetworkNews {
    /// Listens in the calling thread's namespace. Must be called on a tokio runtime.
    pub fn here() -> Result<NetworkNews, NetError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        Ok(NetworkNews { messages: listen(&groups, "listen for changes in")?, watched: Watched::default() })
    }

    /// Hears of these from now on, and of no others of their kinds.
    pub fn watch(&mut self, watched: Watched) {
        self.watched = watched;
    }

    /// Waits for the next change. `None`: there will be none any more.
    pub async fn next(&mut self) -> Option<NetworkChange> {
        while let Some((message, _)) = self.messages.next().await {
            if let Some(change) = change(&message, &self.watched) {
                return Some(change);
            }
        }
        None
    }

    /// A change that is known already, without waiting.
    pub fn known(&mut self) -> Option<NetworkChange> {
        self.next().now_or_never().flatten()
    }
}

fn change(message: &NetlinkMessage<RouteNetlinkMessage>, watched: &Watched) -> Option<NetworkChange> {
    let what = match &message.payload {
        NetlinkPayload::InnerMessage(inner) => match inner {
            RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => Changed::Device,
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => Changed::Address,
            RouteNetlinkMessage::NewRoute(told) | RouteNetlinkMessage::DelRoute(told) => {
                match route::stranger(told, &watched.networks) {
                    Some(_) => Changed::Stranger,
                    None => Changed::Route,
                }
            }
            RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => Changed::Rule,
            RouteNetlinkMessage::NewNeighbour(told) | RouteNetlinkMessage::DelNeighbour(told)
                if is_watched(told, watched) =>
            {
                Changed::Neighbour
            }
            _ => return None,
        },
        NetlinkPayload::Overrun(_) => Changed::Unknown,
        _ => return None,
    };
    Some(NetworkChange { what, by: message.header.port_number })
}

fn is_watched(message: &NeighbourMessage, watched: &Watched) -> bool {
    let ip = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    });
    ip.is_some_and(|ip| watched.neighbours.contains(&(message.header.ifindex, ip)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::packet_route::{
        neighbour::NeighbourState,
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage},
    };

    fn told(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<Changed> {
        let mut message = NetlinkMessage::new(Default::default(), payload);
        message.header.port_number = 7;
        let watched = Watched {
            neighbours: HashSet::from([(3, [10, 0, 1, 7].into())]),
            networks: vec![([10, 0, 1, 0].into(), 24)],
        };
        change(&message, &watched).map(|change| {
            assert_eq!(change.by, 7);
            change.what
        })
    }

    fn neighbour(device: u32, last: u8, state: NeighbourState) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        (message.header.ifindex, message.header.state) = (device, state);
        message.attributes = vec![NeighbourAttribute::Destination(NeighbourAddress::Inet([10, 0, 1, last].into()))];
        message
    }

    fn route(to: [u8; 4], prefix: u8) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.destination_prefix_length = prefix;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.attributes = vec![RouteAttribute::Destination(RouteAddress::Inet(to.into()))];
        message
    }

    #[test]
    fn of_neighbours_those_that_are_watched_are_news_in_any_state_and_no_others() {
        let new = |told| NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(told));
        let gone = |told| NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(told));
        for state in [NeighbourState::Permanent, NeighbourState::Reachable, NeighbourState::Failed] {
            assert_eq!(told(new(neighbour(3, 7, state))), Some(Changed::Neighbour));
            assert_eq!(told(gone(neighbour(3, 7, state))), Some(Changed::Neighbour));
            for other in [neighbour(4, 7, state), neighbour(3, 8, state)] {
                assert_eq!(told(new(other.clone())), None);
                assert_eq!(told(gone(other)), None, "what the kernel forgets comes and goes all the time");
            }
        }
        // As a bridge tells of its table.
        assert_eq!(told(gone(NeighbourMessage::default())), None);
    }

    #[test]
    fn a_route_of_somebody_else_inside_a_watched_network_is_told_apart() {
        let new = |told| NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(told));
        assert_eq!(told(new(route([10, 0, 1, 9], 32))), Some(Changed::Stranger));
        for other in [route([10, 0, 1, 0], 24), route([10, 0, 2, 9], 32), route([10, 0, 0, 0], 16)] {
            assert_eq!(told(new(other)), Some(Changed::Route));
        }
        let mut ours = route([10, 0, 1, 9], 32);
        ours.header.protocol = crate::net::ROUTE_PROTOCOL.into();
        assert_eq!(told(new(ours)), Some(Changed::Route));
    }

    #[test]
    fn what_the_kernel_could_not_tell_is_news() {
        assert_eq!(told(NetlinkPayload::Overrun(Vec::new())), Some(Changed::Unknown));
    }
}
