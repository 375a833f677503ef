//! A client and a server for real traffic: connections, requests and bulk data between two network
//! namespaces, each end on a thread of its own, both on one processor unless told otherwise.
//!
//! Connections are counted as connect, one byte each way, close by RST, so that nothing piles up in
//! TIME_WAIT. With both ends on one processor, connections a second are the inverse of what one
//! costs.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::stats;
use crate::lab::netns;

/// Where servers listen: one byte back for each byte, and nothing back.
const ECHO: u16 = 8080;
const SINK: u16 = 8081;
const PATIENCE: Duration = Duration::from_secs(2);
const BULK: usize = 128 * 1024;

/// What the client does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// A connection for each byte there and back.
    Connections,
    /// A byte there and back on one connection.
    Requests,
    /// As much as one connection takes.
    Bulk,
}

/// One window of one mode.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Operations a second; for bulk, bits a second.
    pub rate: f64,
    /// Of an operation, microseconds; 0 for bulk.
    pub p50: f64,
    pub p99: f64,
    /// Processor time of both threads for an operation, microseconds; for bulk, seconds a gigabyte.
    pub cpu: f64,
}

/// A server in a namespace; ends with its guard.
pub struct Server {
    stop: Arc<AtomicBool>,
    /// Processor time its threads have used, ns.
    used: Arc<AtomicU64>,
    addresses: Vec<SocketAddr>,
    listeners: Vec<TcpListener>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens for both kinds of clients on `ip`.
    pub fn start(netns: &Path, ip: IpAddr, cpu: usize) -> Result<Server> {
        let mut server = Server {
            stop: Arc::default(),
            used: Arc::default(),
            addresses: Vec::new(),
            listeners: Vec::new(),
            threads: Vec::new(),
        };
        for (port, cpu) in [(ECHO, cpu), (SINK, other(cpu))] {
            let address = SocketAddr::new(ip, port);
            let listener = netns::within(netns, || TcpListener::bind(address))?
                .with_context(|| format!("cannot listen on {address} in {}", netns.display()))?;
            server.listeners.push(listener.try_clone()?);
            let (stop, used) = (Arc::clone(&server.stop), Arc::clone(&server.used));
            server.threads.push(std::thread::spawn(move || serve(&listener, cpu, &stop, &used)));
            server.addresses.push(address);
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for listener in &self.listeners {
            // Wakes its thread up, which looks at `stop` then.
            let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, cpu: usize, stop: &AtomicBool, used: &AtomicU64) {
    let _ = stay_on(cpu);
    let mut buffer = vec![0; BULK];
    let echo = listener.local_addr().is_ok_and(|address| address.port() == ECHO);
    let mut spent = own_time();
    for stream in listener.incoming() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        // A client that resets is how every connection ends.
        let _ = stream.and_then(|stream| answer(stream, echo, &mut buffer));
        let now = own_time();
        used.fetch_add((now - spent).as_nanos() as u64, Ordering::Relaxed);
        spent = now;
    }
}

fn answer(mut stream: TcpStream, echo: bool, buffer: &mut [u8]) -> io::Result<()> {
    // A connection whose end got lost must not hold the next one up.
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    loop {
        let length = stream.read(buffer)?;
        if length == 0 {
            return Ok(());
        }
        if echo {
            stream.write_all(buffer.get(..length).unwrap_or_default())?;
        }
    }
}

/// Runs one window from `netns` against a server; if it is behind a service, by that address.
pub fn run(
    netns: &Path,
    server: &Server,
    service: Option<SocketAddr>,
    mode: Mode,
    length: Duration,
    cpu: usize,
) -> Result<Window> {
    let port = if mode == Mode::Bulk { SINK } else { ECHO };
    let own = server.addresses.iter().find(|address| address.port() == port);
    let to = &service.or(own.copied()).context("a server without a port")?;
    let before = server.used.load(Ordering::Relaxed);
    let client = netns::within(netns, || {
        stay_on(cpu)?;
        let begun = own_time();
        let counted = match mode {
            Mode::Connections => connections(*to, length),
            Mode::Requests => requests(*to, length),
            Mode::Bulk => bulk(*to, length),
        };
        counted.map(|counted| (counted, own_time() - begun))
    })?;
    let (counted, own) = client.with_context(|| format!("{mode:?} to {to} from {}", netns.display()))?;
    // The server counts when a connection ends, which it sees a moment after the client.
    std::thread::sleep(Duration::from_millis(5));
    let theirs = Duration::from_nanos(server.used.load(Ordering::Relaxed) - before);
    let cpu = (own + theirs).as_secs_f64();
    if mode == Mode::Bulk {
        let bytes = counted.done as f64;
        let rate = bytes * 8.0 / counted.took.as_secs_f64();
        return Ok(Window { rate, p50: 0.0, p99: 0.0, cpu: cpu / (bytes / 1e9) });
    }
    let quantile = |q: f64| stats::quantile(&counted.latencies, q).unwrap_or_default();
    Ok(Window {
        rate: counted.done as f64 / counted.took.as_secs_f64(),
        p50: quantile(0.5),
        p99: quantile(0.99),
        cpu: cpu * 1e6 / counted.done as f64,
    })
}

struct Counted {
    /// Operations or bytes.
    done: u64,
    took: Duration,
    /// Microseconds.
    latencies: Vec<f64>,
}

fn connections(to: SocketAddr, length: Duration) -> io::Result<Counted> {
    repeated(length, || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        exchange(&mut stream)
    })
}

fn requests(to: SocketAddr, length: Duration) -> io::Result<Counted> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    repeated(length, || exchange(&mut stream))
}

fn exchange(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])
}

fn repeated(length: Duration, mut once: impl FnMut() -> io::Result<()>) -> io::Result<Counted> {
    let mut latencies = Vec::with_capacity(1 << 16);
    let begun = Instant::now();
    let mut last = begun;
    while last - begun < length {
        once()?;
        let now = Instant::now();
        latencies.push((now - last).as_secs_f64() * 1e6);
        last = now;
    }
    Ok(Counted { done: latencies.len() as u64, took: last - begun, latencies })
}

fn bulk(to: SocketAddr, length: Duration) -> io::Result<Counted> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let data = vec![b'x'; BULK];
    let begun = Instant::now();
    let mut done = 0;
    while begun.elapsed() < length {
        stream.write_all(&data)?;
        done += data.len() as u64;
    }
    Ok(Counted { done, took: begun.elapsed(), latencies: Vec::new() })
}

/// Keeps the calling thread on a processor.
pub fn stay_on(cpu: usize) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// Another processor than this, if there is one.
fn other(cpu: usize) -> usize {
    let there = std::thread::available_parallelism().map_or(1, usize::from);
    if there > 1 { (cpu + 1) % there } else { cpu }
}

/// Processor time of the calling thread.
fn own_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// Waits until a server can be reached, as it may take a moment after its policy is there.
pub fn await_reachable(netns: &Path, server: &Server, service: Option<SocketAddr>) -> Result<()> {
    let Some(to) = &service.or(server.addresses.first().copied()) else { bail!("a server without a port") };
    let begun = Instant::now();
    loop {
        match netns::within(netns, || TcpStream::connect_timeout(to, PATIENCE))? {
            Ok(_) => return Ok(()),
            Err(error) if begun.elapsed() > Duration::from_secs(10) => {
                return Err(error).with_context(|| format!("{to} cannot be reached from {}", netns.display()));
            }
            Err(_) => {}
        }
    }
}
