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

/// `ETH_P_ALL`, in network order as the kernel wants it.
const ALL: u32 = 0x0003u16.to_be() as u32;

/// A filter of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Filter {
    pub ifindex: u32,
    pub ingress: bool,
    /// Packets get the filters of chain 0, and others if one of those says so.
    pub chain: u32,
    pub priority: u16,
    pub handle: u32,
    /// The number of its program; 0: it has none.
    pub program: u32,
    /// The name that its program was given; empty if it has none.
    pub name: String,
}

/// What the kernel answers of a device or qdisc that is gone, or if it has no filters at all (no `CONFIG_NET_CLS`, where
/// programs are attached by tcx).
const NONE: [i32; 4] = [libc::ENODEV, libc::ENOENT, libc::EINVAL, libc::EOPNOTSUPP];

/// The filters of a device of the calling thread's namespace, those of a chain in the order in which they run. A device
/// or qdisc that is gone has none.
pub(crate) fn filters_on(ifindex: u32, ingress: bool) -> io::Result<Vec<Filter>> {
    let mut request = TcMessage::with_index(ifindex.cast_signed());
    request.header.parent = place(ingress);
    let answers = match ask(NETLINK_ROUTE, RouteNetlinkMessage::GetTrafficFilter(request), Scope::All) {
        Ok(answers) => answers,
        Err(error) if NONE.map(Some).contains(&error.raw_os_error()) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let filter = |answer| if let RouteNetlinkMessage::NewTrafficFilter(it) = answer { Some(it) } else { None };
    // Each priority is told of, too, without a handle.
    let filters = answers.into_iter().filter_map(filter).map(|it| described(&it, ifindex, ingress));
    Ok(filters.filter(|it| it.handle != 0).collect())
}

/// Removes a filter; one that is gone is no error.
pub(crate) fn delete_filter(filter: &Filter) -> io::Result<()> {
    let mut request = TcMessage::with_index(filter.ifindex.cast_signed());
    request.header.parent = place(filter.ingress);
    request.header.handle = filter.handle.into();
    request.header.info = u32::from(filter.priority) << 16 | ALL;
    gone_is_well(ask(NETLINK_ROUTE, RouteNetlinkMessage::DelTrafficFilter(request), Scope::One))
}

/// Removes the qdisc that filters are on, with all that are there; one that is gone is no error.
pub(crate) fn delete_clsact(ifindex: u32) -> io::Result<()> {
    let mut request = TcMessage::with_index(ifindex.cast_signed());
    request.header.parent = TcHandle::CLSACT;
    request.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    gone_is_well(ask(NETLINK_ROUTE, RouteNetlinkMessage::DelQueueDiscipline(request), Scope::One))
}

fn gone_is_well(answer: io::Result<Vec<RouteNetlinkMessage>>) -> io::Result<()> {
    match answer {
        Err(error) if !NONE.map(Some).contains(&error.raw_os_error()) => Err(error),
        _ => Ok(()),
    }
}

fn place(ingress: bool) -> TcHandle {
    let minor = if ingress { TcHandle::MIN_INGRESS } else { TcHandle::MIN_EGRESS };
    TcHandle { major: TcHandle::CLSACT.major, minor }
}

fn described(filter: &TcMessage, ifindex: u32, ingress: bool) -> Filter {
    let (priority, handle) = ((filter.header.info >> 16) as u16, filter.header.handle.into());
    let mut described = Filter { ifindex, ingress, chain: 0, priority, handle, program: 0, name: String::new() };
    for attribute in &filter.attributes {
        let options = match attribute {
            TcAttribute::Options(options) => options,
            TcAttribute::Chain(chain) => {
                described.chain = *chain;
                continue;
            }
            _ => continue,
        };
        for option in options {
            match option {
                TcOption::Bpf(TcFilterBpfOption::ProgId(program)) => described.program = *program,
                TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => described.name.clone_from(name),
                _ => {}
            }
        }
    }
    described
}

/// Puts a classifier on what comes in by a device of the calling thread's namespace that has such a qdisc.
pub(crate) fn put_filter(ifindex: u32, program: BorrowedFd<'_>) -> io::Result<()> {
    const PRIORITY: u32 = 1;
    let mut request = TcMessage::with_index(ifindex.cast_signed());
    request.header.parent = place(true);
    request.header.info = PRIORITY << 16 | ALL;
    let options = vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned())),
        TcOption::Bpf(TcFilterBpfOption::ProgName("trial".into())),
    ];
    request.attributes = vec![TcAttribute::Kind("bpf".into()), TcAttribute::Options(options)];
    ask(NETLINK_ROUTE, RouteNetlinkMessage::NewTrafficFilter(request), Scope::New).map(drop)
}
