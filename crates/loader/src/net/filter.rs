//! Filters of a device's clsact qdisc.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use rtnetlink::{
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
    },
    sys::protocols::NETLINK_ROUTE,
};

use super::wire::{Scope, ask};

/// The number of the program in the filter with this priority and handle, if that is on a device of the calling
/// thread's namespace. A device or qdisc that is gone has none.
pub(crate) fn filter_on(ifindex: u32, ingress: bool, priority: u16, handle: u32) -> io::Result<Option<u32>> {
    const CLSACT: u16 = 0xffff;
    const INGRESS: u16 = 0xfff2;
    const EGRESS: u16 = 0xfff3;
    let mut request = TcMessage::default();
    request.header.index = i32::try_from(ifindex).map_err(io::Error::other)?;
    request.header.parent = TcHandle { major: CLSACT, minor: if ingress { INGRESS } else { EGRESS } };
    let answers = match ask(NETLINK_ROUTE, RouteNetlinkMessage::GetTrafficFilter(request), Scope::All) {
        Ok(answers) => answers,
        Err(error) if [libc::ENODEV, libc::EINVAL].map(Some).contains(&error.raw_os_error()) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewTrafficFilter(filter) => {
            let placed = filter.header.info >> 16 == u32::from(priority) && u32::from(filter.header.handle) == handle;
            placed.then(|| program_of(&filter))
        }
        _ => None,
    }))
}

/// The number of a filter's program; 0: it has none.
fn program_of(filter: &TcMessage) -> u32 {
    let options = filter.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let program = options.flatten().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgId(program)) => Some(*program),
        _ => None,
    });
    program.unwrap_or_default()
}

/// Puts a classifier on what comes in by a device of the calling thread's namespace that has such a qdisc.
pub(crate) fn put_filter(ifindex: u32, program: BorrowedFd<'_>) -> io::Result<()> {
    /// `ETH_P_ALL`, in network order as the kernel wants it.
    const ALL: u32 = 0x0003u16.to_be() as u32;
    const PRIORITY: u32 = 1;
    let mut request = TcMessage::with_index(ifindex.cast_signed());
    request.header.parent = TcHandle { major: TcHandle::CLSACT.major, minor: TcHandle::MIN_INGRESS };
    request.header.info = PRIORITY << 16 | ALL;
    let options = vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned())),
        TcOption::Bpf(TcFilterBpfOption::ProgName("trial".into())),
    ];
    request.attributes = vec![TcAttribute::Kind("bpf".into()), TcAttribute::Options(options)];
    ask(NETLINK_ROUTE, RouteNetlinkMessage::NewTrafficFilter(request), Scope::New).map(drop)
}
