//! Which XDP program is on a device.

use std::io;

use rtnetlink::{
    packet_route::{
        RouteNetlinkMessage,
        link::{LinkAttribute, LinkMessage, LinkXdp, XdpAttached},
    },
    sys::protocols::NETLINK_ROUTE,
};

use super::wire::{Scope, ask};
use crate::EdgeMode;

/// The XDP program of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct XdpNow {
    /// The kernel's number of it.
    pub program: u32,
    /// Where it runs.
    pub mode: EdgeMode,
}

/// The program on a device of the calling thread's namespace.
pub(crate) fn xdp_on(ifindex: u32) -> io::Result<Option<XdpNow>> {
    let mut request = LinkMessage::default();
    request.header.index = ifindex;
    let answers = ask(NETLINK_ROUTE, RouteNetlinkMessage::GetLink(request), Scope::One)?;
    let attributes = answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => Some(link.attributes),
        _ => None,
    });
    Ok(attributes.into_iter().flatten().find_map(|attribute| match attribute {
        LinkAttribute::Xdp(parts) => now(&parts),
        _ => None,
    }))
}

fn now(parts: &[LinkXdp]) -> Option<XdpNow> {
    let mode = parts.iter().find_map(|part| match part {
        LinkXdp::Attached(XdpAttached::Driver) => Some(EdgeMode::Native),
        LinkXdp::Attached(XdpAttached::SocketBuffer) => Some(EdgeMode::Generic),
        _ => None,
    })?;
    let program = parts.iter().find_map(|part| match part {
        LinkXdp::ProgId(program) => Some(*program),
        _ => None,
    })?;
    Some(XdpNow { program, mode })
}
