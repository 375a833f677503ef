//! News that something of the node's network changed, whoever changed it.

use futures::{FutureExt, StreamExt};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{RouteNetlinkMessage, neighbour::NeighbourState},
};

use super::{
    NetError,
    watch::{Messages, listen},
};

/// Hears of every change of devices, addresses, routes, permanent neighbours and policy rules.
pub struct NetworkNews {
    messages: Messages,
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
    /// A neighbour that is known for good, or one that is not known any more.
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
        Ok(NetworkNews { messages: listen(&groups, "listen for changes in")? })
    }

    /// Waits for the next change. `None`: there will be none any more.
    pub async fn next(&mut self) -> Option<NetworkChange> {
        while let Some((message, _)) = self.messages.next().await {
            if let Some(change) = change(&message) {
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

fn change(message: &NetlinkMessage<RouteNetlinkMessage>) -> Option<NetworkChange> {
    let what = match &message.payload {
        NetlinkPayload::InnerMessage(inner) => match inner {
            RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => Changed::Device,
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => Changed::Address,
            RouteNetlinkMessage::NewRoute(_) | RouteNetlinkMessage::DelRoute(_) => Changed::Route,
            RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => Changed::Rule,
            RouteNetlinkMessage::DelNeighbour(_) => Changed::Neighbour,
            RouteNetlinkMessage::NewNeighbour(neighbour) => match neighbour.header.state {
                // What the kernel finds by itself comes and goes all the time.
                NeighbourState::Permanent => Changed::Neighbour,
                _ => return None,
            },
            _ => return None,
        },
        NetlinkPayload::Overrun(_) => Changed::Unknown,
        _ => return None,
    };
    Some(NetworkChange { what, by: message.header.port_number })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::packet_route::{neighbour::NeighbourMessage, route::RouteMessage};

    fn told(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<Changed> {
        let mut message = NetlinkMessage::new(Default::default(), payload);
        message.header.port_number = 7;
        change(&message).map(|change| {
            assert_eq!(change.by, 7);
            change.what
        })
    }

    fn neighbour(state: NeighbourState) -> NetlinkPayload<RouteNetlinkMessage> {
        let mut message = NeighbourMessage::default();
        message.header.state = state;
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message))
    }

    #[test]
    fn what_the_kernel_finds_by_itself_is_no_news_and_what_it_could_not_tell_is() {
        assert_eq!(told(neighbour(NeighbourState::Reachable)), None);
        assert_eq!(told(neighbour(NeighbourState::Permanent)), Some(Changed::Neighbour));
        let route = NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(RouteMessage::default()));
        assert_eq!(told(route), Some(Changed::Route));
        assert_eq!(told(NetlinkPayload::Overrun(Vec::new())), Some(Changed::Unknown));
    }
}
