//! Routes of others in the place of one that is to be Cirri's: told, so that they can be written again.
//!
//! A place is a network with type of service and metric, in the main table: the kernel keeps one route there unless it
//! is asked to append.

use std::fmt;

use rtnetlink::packet_core::{Emitable, Parseable};
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol},
};

use super::{Net, NetError, ROUTE_PROTOCOL, Route, kernel, route, wire};

/// The metric of a route of IPv6 that was made without one (`IP6_RT_PRIO_USER`).
const METRIC_V6: u32 = 1024;

/// A route as somebody else made it, whatever it has of next hops, metrics and encapsulation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ForeignRoute {
    message: RouteMessage,
}

impl ForeignRoute {
    /// As the kernel writes it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.message.buffer_len()];
        self.message.emit(&mut bytes);
        bytes
    }

    /// What [`ForeignRoute::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Option<ForeignRoute> {
        (bytes.len() >= RouteMessage::default().buffer_len())
            .then(|| RouteMessage::parse(bytes).ok())
            .flatten()
            .map(|message| ForeignRoute { message })
    }

    /// What of a listed route makes it: what the kernel tells beside that, it would refuse or ignore.
    fn of(mut message: RouteMessage) -> ForeignRoute {
        message.header.flags &= RouteFlags::Onlink;
        let by_number = message.attributes.iter().any(|it| matches!(it, RouteAttribute::NhId(_)));
        message.attributes.retain(|attribute| match attribute {
            RouteAttribute::CacheInfo(_) => false,
            // Of a next hop that is an object of its own the kernel tells what it says, and refuses both.
            RouteAttribute::Oif(_)
            | RouteAttribute::Gateway(_)
            | RouteAttribute::Via(_)
            | RouteAttribute::MultiPath(_)
            | RouteAttribute::Encap(_)
            | RouteAttribute::EncapType(_) => !by_number,
            _ => true,
        });
        for attribute in &mut message.attributes {
            if let RouteAttribute::MultiPath(hops) = attribute {
                hops.iter_mut().for_each(|hop| hop.flags &= RouteNextHopFlags::Onlink);
            }
        }
        ForeignRoute { message }
    }
}

impl fmt::Display for ForeignRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let described = route::described(&self.message);
        described.map_or(Ok(()), |it| write!(f, "{it} (protocol {})", u8::from(self.message.header.protocol)))
    }
}

impl Net {
    /// Adds a route if its place is free; whether it was.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn add_route(&self, route: &Route) -> Result<bool, NetError> {
        let added = self.handle.route().add(self.message(route)?).execute().await;
        self.taken_is_false(route.to_string(), added)
    }

    /// The route of somebody else in the place of one of ours; none if ours or nothing stands there.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn foreign_route(&self, route: &Route) -> Result<Option<ForeignRoute>, NetError> {
        let ours = self.message(route)?;
        let mut request = RouteMessage::default();
        request.header.address_family = ours.header.address_family;
        request.header.table = RouteHeader::RT_TABLE_MAIN;
        let all = self.list("routes", RouteNetlinkMessage::GetRoute(request), wire::Scope::Picked, |it| match it {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })?;
        // The kernel replaces the first one of several.
        let first = all.into_iter().find(|other| place(other) == place(&ours));
        let is_foreign = |it: &RouteMessage| it.header.protocol != RouteProtocol::from(ROUTE_PROTOCOL);
        Ok(first.filter(is_foreign).map(ForeignRoute::of))
    }

    /// Writes a route of somebody else again if its place is free; whether it was.
    ///
    /// # Errors
    /// The kernel's: its device may be gone.
    pub async fn put_back(&self, foreign: &ForeignRoute) -> Result<bool, NetError> {
        let added = self.handle.route().add(foreign.message.clone()).execute().await;
        self.taken_is_false(foreign.to_string(), added)
    }

    fn taken_is_false(&self, object: String, added: Result<(), rtnetlink::Error>) -> Result<bool, NetError> {
        match added.map_err(kernel) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(self.failed(object, "add", error)),
        }
    }
}

/// Where a route stands: the kernel has one for each of these in a table.
fn place(message: &RouteMessage) -> (Option<&RouteAttribute>, u8, u8, u32, u32) {
    let is_v6 = message.header.address_family == AddressFamily::Inet6;
    let find = |wanted: fn(&RouteAttribute) -> bool| message.attributes.iter().find(|it| wanted(it));
    let to = find(|it| matches!(it, RouteAttribute::Destination(_)));
    let metric = match find(|it| matches!(it, RouteAttribute::Priority(_))) {
        Some(RouteAttribute::Priority(metric)) => *metric,
        _ if is_v6 => METRIC_V6,
        _ => 0,
    };
    let tos = if is_v6 { 0 } else { message.header.tos };
    (to, message.header.destination_prefix_length, tos, metric, route::table(message))
}
