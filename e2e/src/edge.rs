//! A client, a load balancer and backends, each in a network namespace, on one Ethernet.
//!
//! ```text
//!   client 10.77.0.2     lb 10.77.0.1      b1 10.77.0.11, b2 .12, b3 .13
//!        |                   |                  |
//!        +-------------- a switch --------------+
//! ```
//!
//! The client reaches the services' addresses by way of the load balancer; backends with direct server
//! return answer it past the load balancer. IPv6 alike: fd77::2, fd77::1, fd77::11 and so on.
//!
//! What XDP in the driver needs of a veth pair, and a network card brings along: frames that XDP touches
//! must have their checksums (no offload on the way in), and the other end must have an XDP program, too.
//! The kernel wakes the receiver of what XDP sends back (`XDP_TX`) only then; without it such frames lie
//! about until the next other one comes by. What is redirected to another device wakes it with GRO alone.

mod offer;

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::kernel::{TestInstance, TestNamespace};
use crate::lab::{binary, eventually, printed};
use cirri_loader::EdgeWanted;
use cirri_loader::net::Namespace;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use offer::{Offer, Offered};

/// How long what works may take.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// After how long a datagram is sent again: a busy machine's queues lose some.
const AGAIN: Duration = Duration::from_millis(250);
/// The services' addresses.
pub const VIP: &str = "203.0.113.10";
/// The IPv6 one.
pub const VIP6: &str = "2001:db8::10";

/// The namespaces and, once started, the load balancer.
pub struct EdgeLab {
    /// The client's.
    pub client: TestNamespace,
    /// The load balancer's.
    pub lb: TestNamespace,
    /// The backends', by name.
    pub backends: BTreeMap<String, TestNamespace>,
    switch: TestNamespace,
    _passing: TestInstance,
    directory: tempfile::TempDir,
    instance: String,
    daemon: Option<Child>,
}

impl EdgeLab {
    /// Brings the namespaces up, with backends `b1` and so on.
    pub fn new(backends: usize) -> EdgeLab {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let switch = TestNamespace::new();
        run(&switch, "ip link add br0 type bridge");
        run(&switch, "ip link set br0 up");
        let client = host(&switch, "client", 2);
        let lb = host(&switch, "lb", 1);
        let backends = (1..=backends).map(|n| (format!("b{n}"), host(&switch, &format!("b{n}"), 10 + n))).collect();
        let passing = TestInstance::new();
        let attached = switch.namespace.run(|| passing.load().attach_edge("p-lb", EdgeWanted::Native));
        attached.expect("entered").expect("a program that knows no services passes everything on");
        run(&client, "ip route add 203.0.113.0/24 via 10.77.0.1");
        run(&client, "ip -6 route add 2001:db8::/64 via fd77::1");
        let instance = format!("edge-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = tempfile::tempdir().expect("a directory");
        EdgeLab { client, lb, backends, switch, _passing: passing, directory, instance, daemon: None }
    }

    /// Another host on the switch, at 10.77.0.`number`.
    pub fn host(&self, name: &str, number: usize) -> TestNamespace {
        host(&self.switch, name, number)
    }

    /// Starts a second load balancer in another namespace, with the same services, in TC. Its directory
    /// goes with the lab's; dropping it takes it away.
    pub fn second(&self, place: TestNamespace, services: &str) -> Second {
        self.start_second(place.namespace.clone(), Some(place), services)
    }

    /// The same beside the first one, on the same device.
    pub fn beside(&self, services: &str) -> Second {
        self.start_second(self.lb.namespace.clone(), None, services)
    }

    fn start_second(&self, place: Namespace, kept: Option<TestNamespace>, services: &str) -> Second {
        let file = self.directory.path().join("second.yaml");
        let state = self.directory.path().join("second");
        let head = format!("devices: [eth0]\nacceleration: off\nstateDir: {}\n", state.display());
        let instance = format!("{}-second", self.instance);
        std::fs::write(&file, format!("{head}bpf: {{instance: {instance}, maps: {MAPS}}}\n{services}\n"))
            .expect("written");
        let log = std::fs::File::options().create(true).append(true).open(self.log()).expect("a log");
        let (binary, at) = (binary().expect("built"), file.clone());
        let child = place.run(move || {
            Command::new(binary).args(["lb", "--config"]).arg(at).stdin(Stdio::null()).stderr(log).spawn()
        });
        let second = Second { child: child.expect("entered").expect("started"), file, place, _kept: kept };
        eventually("the second one answers", Duration::from_secs(60), || state.join("lb.sock").exists());
        second
    }

    /// Writes the load balancer's file, as an editor does: another one, renamed into place. The test
    /// says services and what else it wants; devices, state and pins are the lab's.
    pub fn write(&self, rest: &str) {
        let state = self.directory.path().join("state");
        let head = if rest.contains("devices:") { "" } else { "devices: [eth0]\n" };
        let text = format!(
            "{head}stateDir: {}\nbpf: {{instance: {}, maps: {MAPS}}}\n{rest}\n",
            state.display(),
            self.instance
        );
        let next = self.directory.path().join("next");
        std::fs::write(&next, text).expect("written");
        std::fs::rename(next, self.file()).expect("renamed");
    }

    /// The load balancer's file.
    pub fn file(&self) -> PathBuf {
        self.directory.path().join("lb.yaml")
    }

    /// Starts the load balancer and waits until it answers.
    pub fn start(&mut self) {
        assert!(self.daemon.is_none(), "one at a time");
        let log = std::fs::File::options().create(true).append(true).open(self.log()).expect("a log");
        let (binary, file) = (binary().expect("built"), self.file());
        let child = self.lb.namespace.run(move || {
            Command::new(binary).args(["lb", "--config"]).arg(file).stdin(Stdio::null()).stderr(log).spawn()
        });
        self.daemon = Some(child.expect("entered").expect("started"));
        let begun = Instant::now();
        while !self.socket().exists() || !self.ask_raw(&["status"]).status.success() {
            let child = self.daemon.as_mut().expect("started");
            if let Some(status) = child.try_wait().expect("asked") {
                panic!("the load balancer ended with {status}:\n{}", self.log_text());
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "it does not answer:\n{}", self.log_text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Tells it to stop, and waits.
    pub fn stop(&mut self) {
        let mut child = self.daemon.take().expect("it runs");
        let killed = Command::new("kill").arg(child.id().to_string()).status().expect("kill runs");
        assert!(killed.success());
        assert!(child.wait().expect("waited").success(), "{}", self.log_text());
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut child = self.daemon.take().expect("it runs");
        child.kill().expect("killed");
        child.wait().expect("waited");
    }

    /// A signal by its name.
    pub fn signal(&self, name: &str) {
        let pid = self.daemon.as_ref().expect("it runs").id();
        assert!(Command::new("kill").args(["-s", name, &pid.to_string()]).status().expect("kill runs").success());
    }

    /// `cirri lb COMMAND --config FILE -o json`.
    pub fn ask<T: DeserializeOwned>(&self, command: &[&str]) -> T {
        let output = self.ask_raw(command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{command:?}: {said}{}", self.log_text());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("{command:?}: {error}: {}", String::from_utf8_lossy(&output.stdout));
        })
    }

    fn ask_raw(&self, command: &[&str]) -> Output {
        let file = self.file();
        let mut all = vec!["lb"];
        all.extend(command);
        let mut process = Command::new(binary().expect("built"));
        process.args(all).arg("--config").arg(file).args(["-o", "json"]).output().expect("cirri runs")
    }

    /// `cirri lb COMMAND...` in the load balancer's namespace, whatever comes of it.
    pub fn command(&self, arguments: &[&str]) -> Output {
        command_in(&self.lb.namespace, arguments)
    }

    /// Waits until `cirri lb status` is as wanted.
    pub fn status_when(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let status: Value = self.ask(&["status"]);
            if wanted(&status) {
                return status;
            }
            let late = begun.elapsed() > 2 * PATIENCE;
            assert!(!late, "not {what}: {status:#}\n{}", self.log_text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the file was read once more than so often, with success.
    pub fn loaded_after(&self, loads: u64) {
        self.status_when("reloaded", |status| status["config"]["loads"].as_u64() > Some(loads));
    }

    /// How often the file was read with success.
    pub fn loads(&self) -> u64 {
        let status: Value = self.ask(&["status"]);
        status["config"]["loads"].as_u64().expect("a number")
    }

    /// Writes the file and waits until it is in force.
    pub fn reload(&self, rest: &str) {
        let loads = self.loads();
        self.write(rest);
        self.loaded_after(loads);
    }

    /// What the load balancer said.
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("state/lb.sock")
    }

    /// Its pins.
    pub fn pins(&self) -> PathBuf {
        PathBuf::from("/sys/fs/bpf/cirri").join(&self.instance)
    }

    /// Servers on every backend, at this port of both families.
    pub fn serve(&self, port: u16) -> BTreeMap<String, Server> {
        self.backends.iter().map(|(name, place)| (name.clone(), Server::start(place, name, port))).collect()
    }

    /// A TCP connection of the client that has been told who serves it.
    pub fn connect(&self, to: &str) -> io::Result<Talk> {
        let to: SocketAddr = to.parse().expect("an address and port");
        let stream = self.client.namespace.run(|| TcpStream::connect_timeout(&to, PATIENCE)).expect("entered")?;
        Talk::begin(stream)
    }

    /// Many.
    pub fn connect_many(&self, to: &str, count: usize) -> Vec<Talk> {
        (0..count).map(|_| self.connect(to).unwrap_or_else(|error| panic!("{to}: {error}"))).collect()
    }

    /// A UDP socket of the client, connected.
    pub fn datagrams(&self, to: &str) -> UdpSocket {
        let to: SocketAddr = to.parse().expect("an address and port");
        let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
        let socket = self.client.namespace.run(|| UdpSocket::bind(any)).expect("entered").expect("bound");
        socket.connect(to).expect("connected");
        socket.set_read_timeout(Some(AGAIN)).expect("set");
        socket
    }
}

/// A second load balancer.
pub struct Second {
    child: Child,
    file: PathBuf,
    place: Namespace,
    _kept: Option<TestNamespace>,
}

impl Drop for Second {
    fn drop(&mut self) {
        // Ended already, perhaps.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let down = command_in(&self.place, &["down", "--config", &self.file.to_string_lossy()]);
        assert!(down.status.success() || std::thread::panicking(), "{}", String::from_utf8_lossy(&down.stderr));
    }
}

impl Drop for EdgeLab {
    fn drop(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            // Ended already, perhaps.
            let _ = child.kill();
            let _ = child.wait();
        }
        let failing = std::thread::panicking();
        if failing {
            eprintln!("what the load balancer said:\n{}", self.log_text());
            // The file may be what the test broke.
            self.write("services: []");
        }
        let file = self.file();
        if file.exists() {
            let down = self.command(&["down", "--config", &file.to_string_lossy()]);
            if !failing && self.pins().exists() {
                panic!("pins stay: {}", String::from_utf8_lossy(&down.stderr));
            }
        }
    }
}

/// Small enough that a test starts in a moment, large enough for its load.
const MAPS: &str = "{flows: 131072, pending: 65536, slots: 262144, backends: 4096, services: 4096}";

/// `cirri lb ARGUMENTS` inside a namespace.
pub fn command_in(place: &Namespace, arguments: &[&str]) -> Output {
    let binary = binary().expect("built");
    let ran = place.run(|| Command::new(binary).arg("lb").args(arguments).output());
    ran.expect("entered").expect("cirri runs")
}

/// Runs a command line inside a namespace; panics unless it succeeds.
pub fn run(place: &TestNamespace, line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    printed(&place.namespace, &words)
}

/// A host on the switch.
fn host(switch: &TestNamespace, name: &str, number: usize) -> TestNamespace {
    let place = TestNamespace::new();
    let port = format!("p-{name}");
    run(switch, &format!("ip link add {port} type veth peer name eth0 netns {}", place.name()));
    run(switch, &format!("ip link set {port} master br0"));
    run(switch, &format!("ip link set {port} up"));
    // What is redirected to it, see above.
    run(switch, &format!("ethtool -K {port} gro on"));
    run(&place, "ethtool -K eth0 tx off");
    run(&place, "sysctl -qw net.ipv6.conf.eth0.accept_dad=0");
    run(&place, "ip link set lo up");
    run(&place, "ip link set eth0 up");
    run(&place, &format!("ip address add 10.77.0.{number}/24 dev eth0"));
    run(&place, &format!("ip address add fd77::{number}/64 dev eth0 nodad"));
    place
}

// === Servers ===

/// A backend's server: TCP tells who it is and whom it sees, then echoes lines; UDP answers the same with
/// what it was sent.
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Server {
    /// At this port of all addresses of both families.
    pub fn start(place: &TestNamespace, name: &str, port: u16) -> Server {
        Server::at(place, name, &format!("[::]:{port}"))
    }

    /// At this address and port. Answers to datagrams come from the address that they were for only from a
    /// socket that has it.
    pub fn at(place: &TestNamespace, name: &str, address: &str) -> Server {
        let at: SocketAddr = address.parse().expect("an address and port");
        let (tcp, udp) = place.namespace.run(|| (TcpListener::bind(at), UdpSocket::bind(at))).expect("entered");
        let (tcp, udp) = (tcp.expect("bound"), udp.expect("bound"));
        let (stop, open) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        // A look at `stop` now and then.
        tcp.set_nonblocking(true).expect("set");
        udp.set_read_timeout(Some(LOOK)).expect("set");
        let threads = vec![
            {
                let (stop, open, name) = (Arc::clone(&stop), Arc::clone(&open), name.to_owned());
                std::thread::spawn(move || accept(&tcp, &name, &stop, &open))
            },
            {
                let (stop, name) = (Arc::clone(&stop), name.to_owned());
                std::thread::spawn(move || datagrams(&udp, &name, &stop))
            },
        ];
        Server { stop, threads, open }
    }

    /// Closes the port and every connection, as the end of a process does.
    pub fn end(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("a server does not panic");
        }
        for stream in self.open.lock().expect("held by nobody").drain(..) {
            // Closed by the client, perhaps.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.finish();
        }
    }
}

const LOOK: Duration = Duration::from_millis(20);

fn accept(listener: &TcpListener, name: &str, stop: &AtomicBool, open: &Mutex<Vec<TcpStream>>) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, from)) => {
                let greeting = format!("{name} {}\n", canonical(from));
                open.lock().expect("held by nobody").push(stream.try_clone().expect("cloned"));
                std::thread::spawn(move || {
                    // The client goes away when it likes.
                    let _ = echo(stream, &greeting);
                });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("{name}: {error}"),
        }
    }
}

fn echo(mut stream: TcpStream, greeting: &str) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.write_all(greeting.as_bytes())?;
    let mut buffer = [0; 64 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

fn datagrams(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let mut answer = format!("{name} {} ", canonical(from)).into_bytes();
        answer.extend(&buffer[..length]);
        // Nobody is there any more, perhaps.
        let _ = socket.send_to(&answer, from);
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

// === Clients ===

/// A TCP connection that has been told who serves it.
pub struct Talk {
    stream: BufReader<TcpStream>,
    /// The backend.
    pub backend: String,
    /// Whom the backend sees.
    pub seen: SocketAddr,
    /// The client's own address and port.
    pub own: SocketAddr,
}

impl Talk {
    /// Reads what the server says first.
    pub fn begin(stream: TcpStream) -> io::Result<Talk> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let own = stream.local_addr()?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let (backend, seen) = line.trim().split_once(' ').ok_or_else(|| io::Error::other("closed at once"))?;
        let seen = seen.parse().map_err(io::Error::other)?;
        Ok(Talk { backend: backend.to_owned(), seen, own, stream })
    }

    /// A line there and back.
    pub fn exchange(&mut self) -> io::Result<()> {
        self.stream.get_mut().write_all(b"still there\n")?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        match line.as_str() {
            "still there\n" => Ok(()),
            "" => Err(io::Error::other("closed")),
            other => Err(io::Error::other(format!("answered {other:?}"))),
        }
    }

    /// The same; panics unless it works.
    pub fn goes_on(&mut self) {
        self.exchange().unwrap_or_else(|error| panic!("{} to {}: {error}", self.own, self.backend));
    }
}

/// Who answers a datagram, and whom it sees. Sent again until there is an answer, as a resolver does.
///
/// # Errors
/// Nobody answers, or what answers is no [`Server`].
pub fn ask_datagram(socket: &UdpSocket) -> io::Result<(String, IpAddr)> {
    let mut buffer = [0; 2048];
    // What answered an earlier question says nothing of now.
    socket.set_nonblocking(true)?;
    while socket.recv(&mut buffer).is_ok() {}
    socket.set_nonblocking(false)?;
    let deadline = Instant::now() + PATIENCE;
    let length = loop {
        socket.send(b"who")?;
        match socket.recv(&mut buffer) {
            Ok(length) => break length,
            // A machine that was paused interrupts who waits.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {}
            Err(error) => return Err(error),
        }
    };
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    let mut words = text.split_whitespace();
    let (name, seen) = words.next().zip(words.next()).ok_or_else(|| io::Error::other(format!("answered {text:?}")))?;
    let seen: SocketAddr = seen.parse().map_err(io::Error::other)?;
    Ok((name.to_owned(), seen.ip()))
}

/// How many of them each backend has.
pub fn spread<'a>(talks: impl IntoIterator<Item = &'a Talk>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for talk in talks {
        *counts.entry(talk.backend.clone()).or_default() += 1;
    }
    counts
}
