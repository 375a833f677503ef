//! Services in the system calls: a program that connects, or sends, to a service is connected to a
//! backend at once, and its packets need no translation. What was translated stands in the socket's own
//! storage, so that it ends with the socket.

use cirri_abi::{
    Addr, BackendState, Port, Service, ServiceKey, SocketService, SocketServices, Tuple, proto, service_flag,
};

use crate::{
    service::{self, Client, choose, flow_hash},
    traits::Services,
};

/// A socket in a system call.
pub trait Socket {
    /// The address that the call names (or, when it returns, that the caller is told).
    fn address(&self) -> Addr;
    /// Its port.
    fn port(&self) -> Port;
    /// Replaces both.
    fn set(&mut self, addr: &Addr, port: Port);
    /// IP protocol.
    fn protocol(&self) -> u8;
    /// Cookie of the socket's network namespace.
    fn netns_cookie(&self) -> u64;
    /// Whether this namespace's packets are translated, not its sockets.
    fn is_per_packet(&self, cookie: u64) -> bool;
    /// What the socket has been translated for, if anything.
    fn services(&mut self) -> Option<&mut SocketServices>;
    /// The same, made if there is none.
    fn services_or_new(&mut self) -> Option<&mut SocketServices>;
}

/// Which call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attempt {
    /// `connect`.
    Connect,
    /// `sendmsg` and its like, with an address.
    Send,
}

/// What becomes of the call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SocketVerdict {
    /// It goes on, perhaps with another address.
    Proceed,
    /// Nobody serves there: `ECONNREFUSED`.
    Refused,
}

/// A program connects or sends to an address.
#[inline(always)]
pub fn reach<S: Socket, T: Services>(attempt: Attempt, socket: &mut S, tables: &T) -> SocketVerdict {
    let (addr, port, protocol) = (socket.address(), socket.port(), socket.protocol());
    let Some(service) = find(socket, tables, &addr, port, protocol) else {
        forget(socket, &addr, port);
        return SocketVerdict::Proceed;
    };
    let cookie = socket.netns_cookie();
    if socket.is_per_packet(cookie) {
        return SocketVerdict::Proceed;
    }
    // Programs connect datagram sockets to learn their own address (resolvers, ping), and send nothing. What is
    // sent is refused at the device. Of the node's own datagrams only those to ports that no service has are: for
    // one without backends the node's program is told at once.
    let asks = attempt == Attempt::Connect && protocol == proto::UDP;
    if service.flags & service_flag::REFUSE != 0 {
        return if asks { SocketVerdict::Proceed } else { SocketVerdict::Refused };
    }
    let refused = if asks && !is_of_node(socket, tables) { SocketVerdict::Proceed } else { SocketVerdict::Refused };
    if attempt == Attempt::Send
        && let Some(known) = known_backend(socket, tables, &addr, port, service.id)
    {
        socket.set(&known.backend, known.backend_port);
        return SocketVerdict::Proceed;
    }
    let key = Addr { words: [0, 0, cookie as u32, (cookie >> 32) as u32] };
    let tuple = Tuple { src: key, dst: addr, dport: port, proto: protocol, ..Tuple::default() };
    // A socket has no source yet: chance takes its place, unless the client is to keep its backend.
    let chance = if service.affinity != 0 { 0 } else { tables.random() };
    let client = Client { key, cookie: 1, hash: flow_hash(&tuple, true) ^ chance, twice: false, inside: true };
    let Some((number, backend)) = choose(tables, service, &client) else {
        return refused;
    };
    let done = SocketService {
        service: addr,
        backend: backend.addr,
        service_port: port,
        backend_port: backend.port,
        id: number,
    };
    let Some(services) = socket.services_or_new() else {
        // Without it the answers would come from a stranger: the packets are translated instead.
        return SocketVerdict::Proceed;
    };
    note(services, &done);
    tables.count_connection(number);
    socket.set(&done.backend, done.backend_port);
    SocketVerdict::Proceed
}

/// A program is told an address: of its peer, or of who sent a datagram. A backend's becomes the service's.
#[inline(always)]
pub fn restore<S: Socket>(socket: &mut S) {
    let (addr, port) = (socket.address(), socket.port());
    let Some(services) = socket.services() else {
        return;
    };
    let mut found = None;
    for known in &services.known {
        if known.id != 0 && known.backend == addr && known.backend_port == port {
            found = Some((known.service, known.service_port));
            break;
        }
    }
    if let Some((service, port)) = found {
        socket.set(&service, port);
    }
}

/// Whether a socket of the node's may be bound to a port: not where a service would take its packets.
#[inline(always)]
pub fn bind<S: Socket, T: Services>(socket: &mut S, tables: &T) -> bool {
    let port = socket.port();
    if port.be == 0 || !tables.node_port(port) || !is_of_node(socket, tables) {
        return true;
    }
    let addr = socket.address();
    let proto = socket.protocol();
    let serves = |addr| tables.service(&ServiceKey { addr, port, proto, _pad: 0 }).is_some();
    // A socket of all IPv6 addresses is mostly one of all IPv4 addresses too.
    !(serves(any(&addr)) || addr == Addr::UNSPECIFIED && serves(Addr::ANY_V4))
}

/// As [`service::find`], and with the node's ports on its loopback address.
#[inline(always)]
fn find<'a, S: Socket, T: Services>(
    socket: &S,
    tables: &'a T,
    addr: &Addr,
    port: Port,
    protocol: u8,
) -> Option<&'a Service> {
    if !is_loopback(addr) {
        return service::find(tables, addr, port, protocol, true);
    }
    if !tables.node_port(port) || !is_of_node(socket, tables) {
        return None;
    }
    tables.service(&ServiceKey { addr: any(addr), port, proto: protocol, _pad: 0 })
}

/// The backend that a socket has for a service, if that still serves.
#[inline(always)]
fn known_backend<S: Socket, T: Services>(
    socket: &mut S,
    tables: &T,
    addr: &Addr,
    port: Port,
    service: u32,
) -> Option<SocketService> {
    let services = socket.services()?;
    let mut found = SocketService::default();
    for known in &services.known {
        if known.id != 0 && known.service == *addr && known.service_port == port {
            found = *known;
            break;
        }
    }
    if found.id == 0 {
        return None;
    }
    let backend = tables.backend(found.id)?;
    let serves = backend.state == BackendState::ACTIVE || backend.state == BackendState::DRAINING;
    (serves && backend.service == service && backend.addr == found.backend && backend.port == found.backend_port)
        .then_some(found)
}

/// A program names a backend itself: it is to be told of the backend, not of the service.
#[inline(always)]
fn forget<S: Socket>(socket: &mut S, addr: &Addr, port: Port) {
    let Some(services) = socket.services() else {
        return;
    };
    for known in &mut services.known {
        if known.backend == *addr && known.backend_port == port {
            known.id = 0;
        }
    }
}

/// Writes a service over what the socket knew of it, or over the oldest.
#[inline(always)]
fn note(services: &mut SocketServices, done: &SocketService) {
    let mut place = services.next & PLACES;
    let mut i = 0;
    while i <= PLACES {
        let known = &services.known[i as usize];
        if known.id != 0 && known.service == done.service && known.service_port == done.service_port {
            place = i;
        }
        i += 1;
    }
    if place == services.next & PLACES {
        services.next = services.next.wrapping_add(1);
    }
    services.known[(place & PLACES) as usize] = *done;
}

/// Number of the last place.
const PLACES: u32 = 3;

#[inline(always)]
fn any(addr: &Addr) -> Addr {
    if addr.is_v4() { Addr::ANY_V4 } else { Addr::UNSPECIFIED }
}

/// `127.0.0.0/8`, `::1`, and the unspecified addresses, which `connect` takes for them.
#[inline(always)]
fn is_loopback(addr: &Addr) -> bool {
    if addr.is_v4() {
        let first = u32::from_be(addr.word()) >> 24;
        return first == 127 || addr.word() == 0;
    }
    let [a, b, c, d] = addr.words;
    a == 0 && b == 0 && c == 0 && u32::from_be(d) <= 1
}

/// Whether the socket is in the node's own network namespace.
#[inline(always)]
fn is_of_node<S: Socket, T: Services>(socket: &S, tables: &T) -> bool {
    match tables.node() {
        Some(node) => node.netns_cookie != 0 && node.netns_cookie == socket.netns_cookie(),
        None => false,
    }
}
