//! The demo's own traffic: `curl` and `redis-cli` run inside pods, and connections that are held open.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::lab::netns;

/// What the web server answers.
const GREETING: &str = "welcome to the shop";
/// How long a connection may take before it counts as denied, seconds: long enough for a retransmitted SYN.
const PATIENCE: &str = "1.5";
/// How long a request of the steady stream may take before it counts as failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// Between two requests of the steady stream.
const PACE: Duration = Duration::from_millis(5);
/// Longest line or body that is read.
const ANSWER_MAX: u64 = 4096;

/// Who asks: a name and where it lives.
#[derive(Clone, Debug)]
pub struct Client {
    /// As `front/ui`, or `world`.
    pub name: String,
    /// Its network namespace.
    pub netns: PathBuf,
}

/// Who is asked: a name and its addresses, one of each family.
#[derive(Clone, Debug)]
pub struct Server {
    /// `web` or `redis`.
    pub service: &'static str,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// One connection that was tried.
#[derive(Clone, Debug)]
pub struct Reach {
    /// Who asked.
    pub from: String,
    /// Who was asked.
    pub service: &'static str,
    /// Its address.
    pub address: IpAddr,
    /// 4 or 6.
    pub family: u8,
    /// What came of it; the reason if it did not work.
    pub outcome: Result<(), String>,
}

/// Every client asks every server in each family, all at once: `curl` the web server, `redis-cli` the other.
///
/// # Errors
/// A client's namespace cannot be entered, or a program cannot be started.
pub fn everyone(clients: &[Client], servers: &[Server]) -> anyhow::Result<Vec<Reach>> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = clients
            .iter()
            // A web server that fetches its own page shows nothing.
            .flat_map(|client| servers.iter().map(move |server| (client, server)))
            .filter(|(client, server)| client.name != format!("shop/{}", server.service))
            .flat_map(|(client, server)| server.addresses.iter().map(move |address| (client, server, *address)))
            .map(|(client, server, address)| {
                scope.spawn(move || -> anyhow::Result<Reach> {
                    let outcome = netns::within(&client.netns, || match server.service {
                        "web" => http_get(address),
                        _ => redis_set_get(address, &client.name),
                    })??;
                    let family = if address.is_ipv4() { 4 } else { 6 };
                    Ok(Reach { from: client.name.clone(), service: server.service, address, family, outcome })
                })
            })
            .collect();
        asked.into_iter().map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

fn http_get(address: IpAddr) -> anyhow::Result<Result<(), String>> {
    let url = format!("http://{}/", SocketAddr::new(address, 80));
    let (code, text) = run(&["curl", "-gsS", "--noproxy", "*", "--max-time", PATIENCE, &url], "")?;
    Ok(match code {
        Some(0) if text.trim() == GREETING => Ok(()),
        Some(0) => Err(format!("another answer than the shop's: {text:?}")),
        _ => Err(text.trim().to_owned()),
    })
}

fn redis_set_get(address: IpAddr, who: &str) -> anyhow::Result<Result<(), String>> {
    let host = address.to_string();
    let question = format!("SET from:{who} hello\nGET from:{who}\n");
    // redis-cli itself waits for a connection as long as the kernel tries.
    let (code, text) = run(&["timeout", PATIENCE, "redis-cli", "-h", &host], &question)?;
    Ok(match (code, text.lines().collect::<Vec<_>>().as_slice()) {
        (Some(0), ["OK", "hello"]) => Ok(()),
        (Some(124), _) => Err(format!("no answer within {PATIENCE} s")),
        (_, lines) => Err(format!("redis-cli: {}", lines.join(" "))),
    })
}

/// Runs a program to its end; its exit code and what it wrote.
fn run(argv: &[&str], input: &str) -> anyhow::Result<(Option<i32>, String)> {
    let (program, arguments) = argv.split_first().context("no program")?;
    let mut child = Command::new(program)
        .args(arguments)
        // Ctrl-C at the terminal is for the demo alone: a client it killed would look like one that was denied.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ended before it read says why by its exit code.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
}

/// A connection that is kept open.
#[derive(Debug)]
pub struct Held {
    connection: BufReader<TcpStream>,
    /// Its end at the client.
    pub local: SocketAddr,
}

impl Held {
    /// Connects from inside a namespace.
    ///
    /// # Errors
    /// It does not connect in time.
    pub fn open(netns: &Path, to: SocketAddr) -> anyhow::Result<Self> {
        let stream = netns::within(netns, || TcpStream::connect_timeout(&to, REQUEST_TIMEOUT))?
            .with_context(|| format!("no connection to {to}"))?;
        stream.set_nodelay(true)?;
        let local = stream.local_addr()?;
        Ok(Self { connection: BufReader::new(stream), local })
    }

    /// Sends a redis command and waits for the one line that answers.
    ///
    /// # Errors
    /// No answer in time, or the connection broke.
    pub fn redis(&mut self, command: &str, patience: Duration) -> std::io::Result<String> {
        self.connection.get_mut().write_all(format!("{command}\r\n").as_bytes())?;
        self.line(patience)
    }

    /// Waits for a line.
    ///
    /// # Errors
    /// None in time, or the connection broke.
    pub fn line(&mut self, patience: Duration) -> std::io::Result<String> {
        self.connection.get_mut().set_read_timeout(Some(patience))?;
        let mut line = String::new();
        if self.connection.by_ref().take(ANSWER_MAX).read_line(&mut line)? == 0 {
            return Err(std::io::Error::other("closed by the other end"));
        }
        Ok(line.trim_end().to_owned())
    }

    /// Fetches a page and leaves the connection open for the next.
    ///
    /// # Errors
    /// No answer in time, another one than the shop's, or the connection broke.
    pub fn get(&mut self, patience: Duration) -> std::io::Result<()> {
        match self.fetch(patience)?.1 {
            page if page == GREETING => Ok(()),
            other => Err(std::io::Error::other(format!("another answer than the shop's: {other:?}"))),
        }
    }

    /// Fetches a page from whoever of a service is at the other end, which answers with its name; leaves the
    /// connection open for the next.
    ///
    /// # Errors
    /// No answer in time, none with a name, or the connection broke.
    pub fn served_by(&mut self, patience: Duration) -> std::io::Result<String> {
        let (headers, _) = self.fetch(patience)?;
        let name = headers.iter().find_map(|header| header.strip_prefix("Served-By: "));
        name.map(str::to_owned).ok_or_else(|| std::io::Error::other(format!("nobody's name is in {headers:?}")))
    }

    /// The headers and the one line of a page.
    fn fetch(&mut self, patience: Duration) -> std::io::Result<(Vec<String>, String)> {
        self.connection.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")?;
        let mut headers = Vec::new();
        loop {
            match self.line(patience)? {
                end if end.is_empty() => return Ok((headers, self.line(patience)?)),
                header => headers.push(header),
            }
        }
    }
}

/// What came of a steady stream of requests.
#[derive(Debug, Default)]
pub struct Steady {
    /// Requests, each on a connection of its own.
    pub requests: usize,
    /// Those that failed, by reason.
    pub failed: BTreeMap<String, usize>,
    /// The slowest of those that worked.
    pub slowest: Duration,
}

/// Fetches the page over new connections, a few hundred a second, until `stop`.
///
/// # Errors
/// The namespace cannot be entered.
pub fn steady(netns: &Path, to: &[SocketAddr], stop: &AtomicBool) -> anyhow::Result<Steady> {
    netns::within(netns, || {
        let mut steady = Steady::default();
        for to in to.iter().cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
            let begun = Instant::now();
            steady.requests += 1;
            match fetch(*to) {
                Ok(()) => steady.slowest = steady.slowest.max(begun.elapsed()),
                Err(error) => *steady.failed.entry(format!("{to}: {error}")).or_default() += 1,
            }
            std::thread::sleep(PACE.saturating_sub(begun.elapsed()));
        }
        steady
    })
    .context("cannot enter the client's namespace")
}

fn fetch(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, REQUEST_TIMEOUT)?;
    stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: shop\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_MAX).read_to_string(&mut answer)?;
    if answer.starts_with("HTTP/1.1 200 ") && answer.trim_end().ends_with(GREETING) {
        return Ok(());
    }
    Err(std::io::Error::other(format!("another answer than the shop's: {answer:?}")))
}
