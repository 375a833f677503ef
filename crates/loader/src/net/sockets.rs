//! Sockets of other processes.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use netlink_packet_sock_diag::{
    SockDiagDestroy, SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_UDP},
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;

use super::{
    Namespace, NetError,
    wire::{Scope, ask},
};

/// Ends the UDP sockets in a namespace whose remote end `is_over` says is over: whoever uses one next
/// gets `ECONNABORTED`, once, and the socket is connected to nobody. Answers how many.
///
/// A connected UDP socket never hears that its remote end is gone, and a service's address is translated
/// only when it connects. Sockets that are not connected are left alone. IPv4 addresses of IPv6 sockets are
/// given as IPv4.
///
/// # Errors
/// The kernel cannot end sockets ([`NetError::Unsupported`]: it will not tomorrow either), or refuses.
pub fn end_datagrams(
    namespace: &Namespace,
    is_over: impl Fn(SocketAddr) -> bool + Send + Sync,
) -> Result<usize, NetError> {
    let ended = namespace.run(|| end_here(&is_over))?;
    ended.map_err(|error| {
        let namespace = namespace.path().into();
        match error.raw_os_error() {
            // Of a dump: no module answers for UDP. Of an end: built without.
            Some(libc::EOPNOTSUPP | libc::ENOENT | libc::EPROTONOSUPPORT) => NetError::Unsupported {
                namespace,
                what: "sockets cannot be ended",
                hint: "it needs CONFIG_INET_UDP_DIAG and CONFIG_INET_DIAG_DESTROY; without them, programs with \
                       connected UDP sockets keep talking to backends that are gone until they connect anew",
                error,
            },
            _ => NetError::Kernel { namespace, object: "UDP sockets".into(), action: "end", error },
        }
    })
}

fn end_here(is_over: &(impl Fn(SocketAddr) -> bool + Send + Sync)) -> io::Result<usize> {
    let mut ended = 0;
    loop {
        let (mut now, mut hidden) = (0, 0);
        for family in [AF_INET, AF_INET6] {
            for socket in connected(family)? {
                if !is_over(remote(&socket)) {
                    continue;
                }
                match end(family, socket) {
                    Ok(()) => now += 1,
                    Err(error) => match error.raw_os_error() {
                        // Gone by itself.
                        Some(libc::ENOENT) => {}
                        // Another socket with the same addresses was found in its place.
                        Some(libc::ESTALE) => hidden += 1,
                        _ => return Err(error),
                    },
                }
            }
        }
        ended += now;
        // Those that stood in front are away now.
        if hidden == 0 || now == 0 {
            return Ok(ended);
        }
    }
}

/// The connected UDP sockets of a family.
fn connected(family: u8) -> io::Result<Vec<SocketId>> {
    let any = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    let answers = ask(NETLINK_SOCK_DIAG, SockDiagMessage::InetRequest(request(family, any)), Scope::All)?;
    let id = |answer| match answer {
        SockDiagMessage::InetResponse(socket) => Some(socket.header.socket_id),
        _ => None,
    };
    Ok(answers.into_iter().filter_map(id).collect())
}

fn end(family: u8, socket: SocketId) -> io::Result<()> {
    let request = SockDiagDestroy::new(SockDiagMessage::InetRequest(request(family, socket)));
    ask(NETLINK_SOCK_DIAG, request, Scope::One).map(drop)
}

fn request(family: u8, socket_id: SocketId) -> InetRequest {
    InetRequest {
        family,
        protocol: IPPROTO_UDP,
        extensions: ExtensionFlags::empty(),
        // Of UDP: connected.
        states: StateFlags::ESTABLISHED,
        socket_id,
    }
}

fn remote(socket: &SocketId) -> SocketAddr {
    let address: IpAddr = socket.destination_address;
    SocketAddr::new(address.to_canonical(), socket.destination_port)
}
