//! The demo's own traffic: `curl` and `redis-cli` run inside pods, and connections that are held open.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::lab::netns;

/// What the web server answers.
pub const GREETING: &str = "welcome to the shop";
/// How long who is to be denied asks: long enough for a retransmitted SYN. That it was denied is told by the drop, not
/// by silence, which a busy machine also makes.
pub const SILENCE: Duration = Duration::from_millis(1500);
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
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It works.
    Works,
    /// It was dropped, and an agent has said so.
    Denied,
    /// Neither; why.
    Unclear(String),
}

/// A client, a server, and one of its addresses.
pub type Cell<'a> = (&'a Client, &'a Server, IpAddr);

/// Every client asks every server in each family, all at once: `curl` the web server, `redis-cli` the other. Who is
/// `allowed` has `patience` for an answer; who is not asks until it works or `dropped` tells of a drop, for as long.
///
/// # Errors
/// A client's namespace cannot be entered, a program cannot be started, or what `dropped` met.
pub fn everyone(
    clients: &[Client],
    servers: &[Server],
    patience: Duration,
    allowed: impl Fn(&str, &str) -> bool,
    dropped: impl Fn(Cell<'_>) -> anyhow::Result<bool> + Sync,
) -> anyhow::Result<Vec<Reach>> {
    let dropped = &dropped;
    std::thread::scope(|scope| {
        let asked: Vec<_> = clients
            .iter()
            // A web server that fetches its own page shows nothing.
            .flat_map(|client| servers.iter().map(move |server| (client, server)))
            .filter(|(client, server)| client.name != format!("shop/{}", server.service))
            .flat_map(|(client, server)| server.addresses.iter().map(move |address| (client, server, *address)))
            .map(|cell| {
                let allowed = allowed(&cell.0.name, cell.1.service);
                scope.spawn(move || -> anyhow::Result<Reach> {
                    let outcome = if allowed { answered(cell, patience)? } else { denied(cell, patience, dropped)? };
                    let (client, server, address) = cell;
                    let family = if address.is_ipv4() { 4 } else { 6 };
                    Ok(Reach { from: client.name.clone(), service: server.service, address, family, outcome })
                })
            })
            .collect();
        asked.into_iter().map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// Asks somebody who is to answer.
fn answered(cell: Cell<'_>, patience: Duration) -> anyhow::Result<Outcome> {
    Ok(ask(cell, patience)?.map_or_else(Outcome::Unclear, |()| Outcome::Works))
}

/// Asks somebody who is not to answer.
fn denied(
    cell: Cell<'_>,
    patience: Duration,
    dropped: &impl Fn(Cell<'_>) -> anyhow::Result<bool>,
) -> anyhow::Result<Outcome> {
    let deadline = crate::span::from_now(patience);
    loop {
        let Err(why) = ask(cell, SILENCE)? else { return Ok(Outcome::Works) };
        if dropped(cell)? {
            return Ok(Outcome::Denied);
        }
        if Instant::now() >= deadline {
            return Ok(Outcome::Unclear(format!("{why}; no agent tells of a drop")));
        }
    }
}

fn ask((client, server, address): Cell<'_>, patience: Duration) -> anyhow::Result<Result<(), String>> {
    netns::within(&client.netns, || match server.service {
        "web" => http_get(address, patience),
        _ => redis_set_get(address, &client.name, patience),
    })?
}

fn http_get(address: IpAddr, patience: Duration) -> anyhow::Result<Result<(), String>> {
    let url = format!("http://{}/", SocketAddr::new(address, 80));
    let seconds = seconds(patience);
    let (code, text) = run(&["curl", "-gsS", "--noproxy", "*", "--max-time", &seconds, &url], "")?;
    Ok(match code {
        Some(0) if text.trim() == GREETING => Ok(()),
        Some(0) => Err(format!("another answer than the shop's: {text:?}")),
        _ => Err(text.trim().to_owned()),
    })
}

fn redis_set_get(address: IpAddr, who: &str, patience: Duration) -> anyhow::Result<Result<(), String>> {
    let (host, seconds) = (address.to_string(), seconds(patience));
    let question = format!("SET from:{who} hello\nGET from:{who}\n");
    // redis-cli itself waits for a connection as long as the kernel tries.
    let (code, text) = run(&["timeout", &seconds, "redis-cli", "-h", &host], &question)?;
    Ok(match (code, text.lines().collect::<Vec<_>>().as_slice()) {
        (Some(0), ["OK", "hello"]) => Ok(()),
        (Some(124), _) => Err(format!("no answer within {seconds} s")),
        (_, lines) => Err(format!("redis-cli: {}", lines.join(" "))),
    })
}

/// As `curl` and `timeout` read it.
pub fn seconds(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64())
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
    pub fn open(netns: &Path, to: SocketAddr, patience: Duration) -> anyhow::Result<Self> {
        let stream = netns::within(netns, || TcpStream::connect_timeout(&to, patience))?
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

/// Fetches the page over new connections, a few hundred a second, until `stop`; tells of each that has ended.
///
/// # Errors
/// The namespace cannot be entered.
pub fn steady(
    netns: &Path,
    to: &[SocketAddr],
    patience: Duration,
    stop: &AtomicBool,
    ended: &Sender<()>,
) -> anyhow::Result<Steady> {
    netns::within(netns, || {
        let mut steady = Steady::default();
        for to in to.iter().cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
            let begun = Instant::now();
            steady.requests += 1;
            match fetch(*to, patience) {
                Ok(()) => steady.slowest = steady.slowest.max(begun.elapsed()),
                Err(error) => *steady.failed.entry(format!("{to}: {error}")).or_default() += 1,
            }
            // Nobody waits for it any more.
            let _ = ended.send(());
            std::thread::sleep(PACE.saturating_sub(begun.elapsed()));
        }
        steady
    })
    .context("cannot enter the client's namespace")
}

fn fetch(to: SocketAddr, patience: Duration) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: shop\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_MAX).read_to_string(&mut answer)?;
    if answer.starts_with("HTTP/1.1 200 ") && answer.trim_end().ends_with(GREETING) {
        return Ok(());
    }
    Err(std::io::Error::other(format!("another answer than the shop's: {answer:?}")))
}
