//! Which filters are on a device's clsact qdisc.

use std::io;

use rtnetlink::{
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcHandle, TcMessage},
    },
    sys::protocols::NETLINK_ROUTE,
};

use super::wire::{Scope, ask};

/// Whether a filter with this priority and handle is on a device of the calling thread's namespace. A device
/// or qdisc that is gone has none.
pub(crate) fn filter_on(ifindex: u32, ingress: bool, priority: u16, handle: u32) -> io::Result<bool> {
    const CLSACT: u16 = 0xffff;
    const INGRESS: u16 = 0xfff2;
    const EGRESS: u16 = 0xfff3;
    let mut request = TcMessage::default();
    request.header.index = i32::try_from(ifindex).map_err(io::Error::other)?;
    request.header.parent = TcHandle { major: CLSACT, minor: if ingress { INGRESS } else { EGRESS } };
    let answers = match ask(NETLINK_ROUTE, RouteNetlinkMessage::GetTrafficFilter(request), Scope::All) {
        Ok(answers) => answers,
        Err(error) if [libc::ENODEV, libc::EINVAL].map(Some).contains(&error.raw_os_error()) => return Ok(false),
        Err(error) => return Err(error),
    };
    Ok(answers.iter().any(|answer| match answer {
        RouteNetlinkMessage::NewTrafficFilter(filter) => {
            filter.header.info >> 16 == u32::from(priority) && u32::from(filter.header.handle) == handle
        }
        _ => false,
    }))
}
