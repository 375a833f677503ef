//! Services in the system calls of real sockets, in a cgroup of their own. Needs root.
//!
//! The sockets' threads are put into the cgroup, not processes: it is a threaded one.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cirri_abi::{
    Addr, Backend, BackendState, Ipcache, IpcacheKey, NodeConfig, Port, Service, ServiceKey, ServiceSlot, ipcache_flag,
    proto, service_flag,
};
use cirri_e2e::kernel::{TestInstance, TestNamespace};
use cirri_loader::{Datapath, Tables, cgroup_root};
use socket2::{Domain, Socket, Type};

/// Addresses of services: nobody has them, and no route leads there.
const VIPS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0x96, 0, 0, 0, 0x10))];
const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
/// How long something that must happen may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A threaded cgroup below the test's own, that goes with its guard.
struct ThreadedCgroup(PathBuf);

impl ThreadedCgroup {
    fn new() -> ThreadedCgroup {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let own = fs::read_to_string("/proc/self/cgroup").expect("read");
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).expect("a hierarchy of version 2");
        let name = format!("svctest-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = cgroup_root().expect("a hierarchy of version 2").join(own).join(name);
        fs::create_dir(&dir).expect("the kernel tests need root");
        fs::write(dir.join("cgroup.type"), "threaded").expect("it has no processes yet");
        ThreadedCgroup(dir)
    }

    /// Puts the calling thread into it: the sockets that it makes from now on are the cgroup's.
    fn enter(&self) {
        fs::write(self.0.join("cgroup.threads"), "0").expect("the thread may move");
    }
}

impl Drop for ThreadedCgroup {
    fn drop(&mut self) {
        let removed = fs::remove_dir(&self.0);
        if !std::thread::panicking() {
            removed.expect("its threads have ended");
        }
    }
}

/// A node of its own with the programs on a cgroup.
struct Ground {
    // In this order: the cgroup's programs go before it does.
    datapath: Datapath,
    instance: TestInstance,
    cgroup: ThreadedCgroup,
    place: TestNamespace,
}

impl Ground {
    async fn new() -> Ground {
        let (instance, cgroup, place) = (TestInstance::new(), ThreadedCgroup::new(), TestNamespace::new());
        place.net().set_up("lo").await.expect("brought up");
        let mut datapath = instance.load();
        datapath.attach_sockets(&cgroup.0).expect("attached");
        let cookie = place.namespace.cookie().expect("asked");
        let node = NodeConfig { netns_cookie: cookie, ..NodeConfig::default() };
        datapath.tables().set_node(&node).expect("written");
        Ground { datapath, instance, cgroup, place }
    }

    fn tables(&self) -> &Tables {
        self.datapath.tables()
    }

    /// On the node, outside of the cgroup.
    fn outside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        self.place.namespace.run(run).expect("entered")
    }

    /// On the node, in the cgroup.
    fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        let cgroup = &self.cgroup;
        self.outside(move || {
            cgroup.enter();
            run()
        })
    }

    /// Number `id` of services, with backends of numbers from `id * 10` on.
    fn serve(&self, front: (Addr, u16), protocol: u8, id: u32, backends: &[SocketAddr]) {
        for (number, at) in (id * 10..).zip(backends) {
            self.backend(number, id, protocol, Some(*at));
            self.tables().slots.put(&number, &ServiceSlot { backend: number }).expect("written");
        }
        let row = Service { id, inside_first: id * 10, inside_count: backends.len() as u32, ..Service::default() };
        let key = ServiceKey { addr: front.0, port: Port::new(front.1), proto: protocol, _pad: 0 };
        self.tables().services.put(&key, &row).expect("written");
        let refused = Service { flags: service_flag::REFUSE, ..Service::default() };
        let key = ServiceKey { addr: front.0, ..ServiceKey::default() };
        self.tables().services.put(&key, &refused).expect("written");
    }

    fn backend(&self, number: u32, service: u32, proto: u8, at: Option<SocketAddr>) {
        let row = at.map(|at| {
            let (addr, port, state) = (Addr::from(at.ip()), Port::new(at.port()), BackendState::ACTIVE);
            Backend { addr, port, proto, state, service, ..Backend::default() }
        });
        self.tables().backends.put(&number, &row.unwrap_or_default()).expect("written");
    }

    fn node_port(&self, port: u16) {
        let bits = 1u64 << (port % 64);
        self.tables().node_ports.put(&u32::from(port / 64), &bits).expect("written");
    }

    fn connections(&self, backend: u32) -> u64 {
        self.tables().backend_counters([backend]).expect("read")[0].1.connections
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let detached = self.datapath.detach_sockets();
        if !std::thread::panicking() {
            detached.expect("detached");
            assert!(self.instance.dir().exists());
        }
    }
}

fn udp(at: IpAddr) -> UdpSocket {
    let socket = UdpSocket::bind((at, 0)).expect("bound");
    socket.set_read_timeout(Some(PATIENCE)).expect("set");
    socket
}

/// Answers one datagram of a socket with another.
fn answer(socket: &UdpSocket) -> SocketAddr {
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).expect("asked");
    socket.send_to(&buffer[..length], from).expect("answered");
    from
}

/// An address of the family, not yet chosen.
fn unspecified(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

#[tokio::test]
async fn a_connection_reaches_a_backend_and_its_peer_is_the_service() {
    let ground = Ground::new().await;
    for (id, (vip, loopback)) in (1..).zip(VIPS.into_iter().zip(LOOPBACKS)) {
        let listener = ground.outside(|| TcpListener::bind((loopback, 0)).expect("bound"));
        let backend = listener.local_addr().expect("bound");
        ground.serve((vip.into(), 80), proto::TCP, id, &[backend]);
        let mut stream = ground.inside(|| TcpStream::connect((vip, 80)).expect("connected"));
        assert_eq!(stream.peer_addr().expect("asked"), SocketAddr::new(vip, 80));
        let (mut accepted, from) = listener.accept().expect("accepted");
        assert_eq!(from, stream.local_addr().expect("asked"));
        stream.write_all(b"ping").expect("written");
        let mut got = [0; 4];
        accepted.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"ping");
        assert_eq!(ground.connections(id * 10), 1);
        let elsewhere = ground.outside(|| TcpStream::connect((vip, 80)).expect_err("no route leads there"));
        assert_ne!(elsewhere.kind(), ErrorKind::ConnectionRefused, "nobody translates outside of the cgroup");
    }
}

#[tokio::test]
async fn a_mapped_address_is_the_service_of_the_address_in_it() {
    let ground = Ground::new().await;
    let (vip, mapped) = (VIPS[0], Ipv4Addr::new(10, 96, 0, 10).to_ipv6_mapped());
    let listener = ground.outside(|| TcpListener::bind((LOOPBACKS[0], 0)).expect("bound"));
    ground.serve((vip.into(), 80), proto::TCP, 1, &[listener.local_addr().expect("bound")]);
    let stream = ground.inside(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).expect("made");
        socket.connect(&SocketAddr::from((mapped, 80)).into()).expect("connected");
        TcpStream::from(socket)
    });
    assert_eq!(stream.peer_addr().expect("asked"), SocketAddr::from((mapped, 80)));
    listener.accept().expect("accepted");

    let server = ground.outside(|| udp(LOOPBACKS[0]));
    ground.serve((vip.into(), 53), proto::UDP, 2, &[server.local_addr().expect("bound")]);
    let client = ground.inside(|| udp(unspecified(true)));
    client.send_to(b"one", (mapped, 53)).expect("sent");
    answer(&server);
    let (_, from) = client.recv_from(&mut [0; 64]).expect("answered");
    assert_eq!(from, SocketAddr::from((mapped, 53)));
}

#[tokio::test]
async fn datagrams_go_to_one_backend_and_their_answers_come_from_the_service() {
    let ground = Ground::new().await;
    for (id, (vip, loopback)) in (1..).zip(VIPS.into_iter().zip(LOOPBACKS)) {
        let servers: Vec<UdpSocket> = (0..4).map(|_| ground.outside(|| udp(loopback))).collect();
        let backends: Vec<SocketAddr> = servers.iter().map(|server| server.local_addr().expect("bound")).collect();
        ground.serve((vip.into(), 53), proto::UDP, id, &backends);
        let client = ground.inside(|| udp(unspecified(vip.is_ipv6())));
        let asked = |client: &UdpSocket| {
            client.send_to(b"ask", (vip, 53)).expect("sent");
            // It is there when the call returns: both are on one loopback device.
            let asked = servers.iter().position(|server| {
                server.set_nonblocking(true).expect("set");
                server.peek_from(&mut [0; 8]).is_ok()
            });
            let asked = asked.expect("one of them was asked");
            answer(&servers[asked]);
            let (length, from) = client.recv_from(&mut [0; 64]).expect("answered");
            assert_eq!((length, from), (3, SocketAddr::new(vip, 53)));
            asked
        };
        let first = asked(&client);
        assert!((0..20).all(|_| asked(&client) == first), "it stays with its backend");
        ground.backend(id * 10 + first as u32, id, proto::UDP, None);
        let second = asked(&client);
        assert_ne!(second, first, "the first serves no more");
        assert!((0..20).all(|_| asked(&client) == second));

        let stranger = ground.outside(|| udp(loopback));
        stranger.send_to(b"hello", (loopback, client.local_addr().expect("bound").port())).expect("sent");
        let (_, from) = client.recv_from(&mut [0; 64]).expect("received");
        assert_eq!(from, stranger.local_addr().expect("bound"), "others keep their names");
    }
}

#[tokio::test]
async fn a_connected_datagram_socket_has_the_service_as_its_peer() {
    let ground = Ground::new().await;
    for (id, (vip, loopback)) in (1..).zip(VIPS.into_iter().zip(LOOPBACKS)) {
        let server = ground.outside(|| udp(loopback));
        ground.serve((vip.into(), 53), proto::UDP, id, &[server.local_addr().expect("bound")]);
        let client = ground.inside(|| udp(unspecified(vip.is_ipv6())));
        client.connect((vip, 53)).expect("connected");
        assert_eq!(client.peer_addr().expect("asked"), SocketAddr::new(vip, 53));
        client.send(b"ask").expect("sent");
        answer(&server);
        assert_eq!(client.recv_from(&mut [0; 64]).expect("answered"), (3, SocketAddr::new(vip, 53)));
    }
}

#[tokio::test]
async fn what_nobody_serves_is_refused_at_once() {
    let ground = Ground::new().await;
    for (id, vip) in (1..).zip(VIPS) {
        ground.serve((vip.into(), 80), proto::TCP, id, &[]);
        ground.serve((vip.into(), 80), proto::UDP, id + 2, &[]);
        for port in [80, 81] {
            let stream = ground.inside(|| TcpStream::connect((vip, port))).expect_err("nobody is there");
            assert_eq!(stream.kind(), ErrorKind::ConnectionRefused, "{vip} {port}");
            let client = ground.inside(|| udp(unspecified(vip.is_ipv6())));
            let send = client.send_to(b"x", (vip, port)).expect_err("nobody is there");
            assert_eq!(send.kind(), ErrorKind::ConnectionRefused, "{vip} {port}");
        }
    }
}

#[tokio::test]
async fn a_node_port_is_on_the_nodes_loopback_and_nobody_is_bound_there() {
    let ground = Ground::new().await;
    ground.node_port(30080);
    for (id, loopback) in (1..).zip(LOOPBACKS) {
        let any = if loopback.is_ipv4() { Addr::ANY_V4 } else { Addr::UNSPECIFIED };
        let listener = ground.outside(|| TcpListener::bind((loopback, 0)).expect("bound"));
        ground.serve((any, 30080), proto::TCP, id, &[listener.local_addr().expect("bound")]);
        let stream = ground.inside(|| TcpStream::connect((loopback, 30080)).expect("connected"));
        assert_eq!(stream.peer_addr().expect("asked"), SocketAddr::new(loopback, 30080));
        listener.accept().expect("accepted");
        for at in [loopback, unspecified(loopback.is_ipv6())] {
            let bound = ground.inside(|| TcpListener::bind((at, 30080))).expect_err("a service is there");
            assert_eq!(bound.kind(), ErrorKind::PermissionDenied, "{at}");
            ground.inside(|| TcpListener::bind((at, 30081))).expect("nobody is there");
            ground.inside(|| UdpSocket::bind((at, 30080))).expect("the service is TCP's");
        }
    }
    // Another namespace has a loopback of its own.
    let other = TestNamespace::new();
    other.net().set_up("lo").await.expect("brought up");
    let bound = other.namespace.run(|| {
        ground.cgroup.enter();
        let listener = TcpListener::bind((LOOPBACKS[0], 30080)).expect("its own");
        TcpStream::connect((LOOPBACKS[0], 30080)).expect("its own");
        listener.accept().expect("its own").1
    });
    assert_eq!(bound.expect("entered").ip(), LOOPBACKS[0]);
}

#[tokio::test]
async fn a_node_port_is_found_at_the_addresses_of_nodes() {
    let ground = Ground::new().await;
    ground.node_port(30080);
    let listener = ground.outside(|| TcpListener::bind((LOOPBACKS[0], 0)).expect("bound"));
    ground.serve((Addr::ANY_V4, 30080), proto::TCP, 1, &[listener.local_addr().expect("bound")]);
    let nodes = [
        (Ipv4Addr::new(192, 0, 2, 1), cirri_abi::Identity::HOST, ipcache_flag::HOST),
        (Ipv4Addr::new(192, 0, 2, 2), cirri_abi::Identity::REMOTE_NODE, ipcache_flag::REMOTE),
    ];
    for (node, identity, flags) in nodes {
        let key = IpcacheKey { prefix_len: 128, addr: Addr::from(IpAddr::V4(node)) };
        ground.tables().ipcache.put(&key, &Ipcache { identity, flags, ..Ipcache::default() }).expect("written");
        let stream = ground.inside(|| TcpStream::connect((node, 30080)).expect("connected"));
        assert_eq!(stream.peer_addr().expect("asked"), SocketAddr::from((node, 30080)));
        listener.accept().expect("accepted");
    }
    let nobody = Ipv4Addr::new(192, 0, 2, 3);
    ground.inside(|| TcpStream::connect((nobody, 30080))).expect_err("no node, and no route");
}
