//! Whether backends serve: checks, each at its own pace, and what follows from their outcomes.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::MissedTickBehavior;

use super::plan::{Check, Plan, Probe};

/// A backend of a service, by their names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Name of the service.
    pub service: String,
    /// Name of the backend.
    pub backend: String,
}

/// What one check said.
#[derive(Debug)]
pub struct Outcome {
    /// Whose.
    pub target: Target,
    /// How long a good answer took, or what went wrong.
    pub result: Result<Duration, String>,
}

/// The checks that are running.
pub struct Checks {
    running: BTreeMap<Target, Running>,
    /// What their moments are counted from.
    since: Instant,
    /// So many at a time: a thousand backends must not want a thousand sockets at once.
    at_once: Arc<Semaphore>,
    outcomes: mpsc::UnboundedSender<Outcome>,
}

struct Running {
    check: Check,
    address: SocketAddr,
    task: AbortHandle,
}

/// Checks that may be on their way at the same time.
const AT_ONCE: usize = 128;
/// Connections that one check asks for, as long as none is answered.
const CONNECTS: usize = 4;
/// Bytes of an answer that its first line may take.
const LONGEST_LINE: usize = 4096;
/// The first check of a backend comes within this time, so that a dead one is found early.
const FIRST_WITHIN: Duration = Duration::from_secs(1);
/// Checks begin at moments that they share: to be woken costs an idle process more than one check more does. There are
/// several in an interval, so that backends are not all asked at once ...
const MOMENTS: u128 = 8;
/// ... and never so long apart.
const LONGEST_MOMENT: Duration = Duration::from_millis(250);

impl Checks {
    /// None yet. Outcomes go to the receiver.
    pub fn new() -> (Checks, mpsc::UnboundedReceiver<Outcome>) {
        let (outcomes, receiver) = mpsc::unbounded_channel();
        let at_once = Arc::new(Semaphore::new(AT_ONCE));
        (Checks { running: BTreeMap::new(), since: Instant::now(), at_once, outcomes }, receiver)
    }

    /// Makes them those of a plan. What stays the same goes on undisturbed. Must be called within a
    /// runtime.
    pub fn follow(&mut self, plan: &Plan) {
        let mut wanted = BTreeMap::new();
        for service in &plan.services {
            let Some(check) = &service.health else { continue };
            for backend in &service.backends {
                let target = Target { service: service.name.clone(), backend: backend.name.clone() };
                let address = SocketAddr::new(backend.address, check.port.unwrap_or(backend.port));
                wanted.insert(target, (check, address));
            }
        }
        self.running.retain(|target, running| {
            let same = wanted
                .get(target)
                .is_some_and(|(check, address)| **check == running.check && *address == running.address);
            if !same {
                running.task.abort();
            }
            same
        });
        for (target, (check, address)) in wanted {
            if !self.running.contains_key(&target) {
                let begin = self.since + first_moment(self.since.elapsed(), check.interval, random());
                let (at_once, outcomes) = (Arc::clone(&self.at_once), self.outcomes.clone());
                let task =
                    tokio::spawn(keep_checking(target.clone(), check.clone(), address, begin, at_once, outcomes));
                let running = Running { check: check.clone(), address, task: task.abort_handle() };
                self.running.insert(target, running);
            }
        }
    }

    /// What is tried, in words; none if the backend is not checked.
    pub fn describe(&self, target: &Target) -> Option<String> {
        let running = self.running.get(target)?;
        Some(match &running.check.probe {
            Probe::Tcp => format!("tcp {}", running.address),
            Probe::Http { path, .. } => format!("http {}{path}", running.address),
        })
    }
}

/// What is known of one backend's health.
#[derive(Clone, Debug)]
pub struct Health {
    up: bool,
    /// Whether `up` is more than an assumption.
    known: bool,
    /// Outcomes in a row that speak against `up`.
    against: u32,
    /// When `up` last changed, or was first known.
    pub since: Instant,
    /// How often it changed.
    pub changes: u64,
    /// What the last check said.
    pub last: String,
}

impl Health {
    /// A backend that nothing is known of counts as up, and its first check decides by itself. What an
    /// earlier process found out, up or down, stays until as many checks as the thresholds ask say otherwise.
    pub fn new(found_up: Option<bool>, now: Instant) -> Health {
        let (up, known) = (found_up.unwrap_or(true), found_up.is_some());
        Health { up, known, against: 0, since: now, changes: 0, last: String::new() }
    }

    /// Takes in an outcome; whether the backend went up or down by it.
    pub fn note(&mut self, result: &Result<Duration, String>, check: &Check, now: Instant) -> bool {
        self.last = match result {
            Ok(took) => format!("ok ({:.1} ms)", took.as_secs_f64() * 1000.0),
            Err(error) => error.clone(),
        };
        let first = !std::mem::replace(&mut self.known, true);
        if result.is_ok() == self.up {
            self.against = 0;
            return false;
        }
        self.against += 1;
        let enough = if self.up { check.fall } else { check.rise };
        if !first && self.against < enough {
            return false;
        }
        self.up = !self.up;
        self.against = 0;
        self.since = now;
        self.changes += 1;
        true
    }

    /// Whether it may be given connections.
    pub fn is_up(&self) -> bool {
        self.up
    }

    /// `up`, `down` or `unknown`.
    pub fn state(&self) -> &'static str {
        match (self.known, self.up) {
            (false, _) => "unknown",
            (true, true) => "up",
            (true, false) => "down",
        }
    }
}

async fn keep_checking(
    target: Target,
    check: Check,
    address: SocketAddr,
    begin: Instant,
    at_once: Arc<Semaphore>,
    outcomes: mpsc::UnboundedSender<Outcome>,
) {
    let mut ticks = tokio::time::interval_at(begin.into(), check.interval);
    // One that is late keeps its moments.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut late = false;
    loop {
        ticks.tick().await;
        let Ok(_permit) = at_once.acquire().await else { return };
        let begun = Instant::now();
        let result = match tokio::time::timeout(check.timeout, probe(&check.probe, address, check.timeout)).await {
            Ok(Ok(())) => Ok(begun.elapsed()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) if was_starved(begun.elapsed(), check.timeout) => {
                if !std::mem::replace(&mut late, true) {
                    let Target { service, backend } = &target;
                    tracing::warn!(
                        service,
                        backend,
                        "checks are late and not counted: this process gets too little processor time"
                    );
                }
                continue;
            }
            Err(_) => Err(format!("no answer within {:?}", check.timeout)),
        };
        late = false;
        if outcomes.send(Outcome { target: target.clone(), result }).is_err() {
            return;
        }
    }
}

/// Whether a check without an answer says something of this process alone: it got no processor in time to ask again,
/// or to see the answer.
fn was_starved(elapsed: Duration, timeout: Duration) -> bool {
    elapsed > timeout + timeout / CONNECTS as u32
}

async fn probe(probe: &Probe, address: SocketAddr, timeout: Duration) -> io::Result<()> {
    let Probe::Http { path, host, expect } = probe else {
        return connect(address, timeout, Handshake::Whole).await.map(drop);
    };
    let mut stream = connect(address, timeout, Handshake::EndsWithRequest).await?;
    let host = host.clone().unwrap_or_else(|| address.to_string());
    let version = env!("CARGO_PKG_VERSION");
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: cirri-lb/{version}\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.contains(&b'\n') && answer.len() < LONGEST_LINE {
        if stream.read_buf(&mut answer).await? == 0 {
            break;
        }
    }
    let line = String::from_utf8_lossy(answer.split(|byte| *byte == b'\n').next().unwrap_or_default()).into_owned();
    match status_code(&line) {
        Some(code) if (expect.first..=expect.last).contains(&code) => Ok(()),
        Some(code) => Err(io::Error::other(format!("answered {code}, not {}-{}", expect.first, expect.last))),
        None => Err(io::Error::other("answered, but not in HTTP")),
    }
}

/// How a connection is made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Handshake {
    /// The server is told at once that its answer came.
    Whole,
    /// The request tells it: a packet less for both sides.
    EndsWithRequest,
}

/// Connects, and asks again while nobody answers: a packet that a busy way loses is no failed backend. The kernel
/// repeats a SYN after a second (RFC 6298, section 2), when many a check is over.
async fn connect(address: SocketAddr, timeout: Duration, handshake: Handshake) -> io::Result<TcpStream> {
    let pause = timeout / CONNECTS as u32;
    let mut again = tokio::time::interval_at(tokio::time::Instant::now() + pause, pause);
    // The first does not wait for a timer: one that is due now wakes the process up to a millisecond later.
    let mut attempts = FuturesUnordered::from_iter([attempt(address, handshake)]);
    loop {
        tokio::select! {
            _ = again.tick(), if attempts.len() < CONNECTS => attempts.push(attempt(address, handshake)),
            Some(outcome) = attempts.next() => return outcome,
        }
    }
}

async fn attempt(address: SocketAddr, handshake: Handshake) -> io::Result<TcpStream> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }?;
    // A reset at the end: no port of this machine waits out its time for every check.
    socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO))?;
    if handshake == Handshake::EndsWithRequest {
        rustix::net::sockopt::set_tcp_quickack(&socket, false)?;
    }
    socket.connect(address).await
}

/// The code of a status line (RFC 9112, section 4).
fn status_code(line: &str) -> Option<u16> {
    let (version, rest) = line.split_once(' ')?;
    version.strip_prefix("HTTP/1.")?;
    rest.get(..3)?.parse().ok().filter(|code| (100..=599).contains(code))
}

/// When a check first comes: at one of the moments of its interval that follow, which all checks with that interval
/// share. Times are since the first of them; `random` is from 0 to 1.
fn first_moment(now: Duration, interval: Duration, random: f64) -> Duration {
    let parts = interval.as_nanos().div_ceil(LONGEST_MOMENT.as_nanos()).max(MOMENTS);
    let moment = (interval.as_nanos() / parts).max(1);
    let within = interval.min(FIRST_WITHIN).mul_f64(random).as_nanos();
    let next = ((now.as_nanos() + within) / moment).max(now.as_nanos().div_ceil(moment));
    Duration::from_nanos(u64::try_from(next * moment).unwrap_or(u64::MAX))
}

fn random() -> f64 {
    (RandomState::new().build_hasher().finish() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::config::CodeRange;
    use tokio::net::TcpListener;

    fn check(rise: u32, fall: u32) -> Check {
        let (interval, timeout) = (Duration::from_millis(50), Duration::from_millis(200));
        Check { probe: Probe::Tcp, port: None, interval, timeout, rise, fall }
    }

    fn note(health: &mut Health, good: bool, check: &Check) -> bool {
        let result = if good { Ok(Duration::from_millis(1)) } else { Err("refused".to_owned()) };
        health.note(&result, check, Instant::now())
    }

    #[test]
    fn thresholds_count_outcomes_in_a_row() {
        let check = check(2, 3);
        let mut health = Health::new(None, Instant::now());
        assert_eq!((health.is_up(), health.state()), (true, "unknown"));
        assert!(!note(&mut health, true, &check));
        for good in [false, false, true, false, false] {
            assert!(!note(&mut health, good, &check));
        }
        assert!(note(&mut health, false, &check));
        assert_eq!((health.is_up(), health.state(), health.changes), (false, "down", 1));
        for good in [true, false, true] {
            assert!(!note(&mut health, good, &check));
        }
        assert!(note(&mut health, true, &check));
        assert_eq!((health.is_up(), health.changes), (true, 2));
    }

    #[test]
    fn the_first_check_of_a_new_backend_decides_and_that_of_a_known_one_does_not() {
        let check = check(2, 3);
        let mut fresh = Health::new(None, Instant::now());
        assert!(note(&mut fresh, false, &check));
        assert!(!fresh.is_up());
        let mut serving = Health::new(Some(true), Instant::now());
        assert!(!note(&mut serving, false, &check) && !note(&mut serving, false, &check));
        assert!(serving.is_up());
        assert!(note(&mut serving, false, &check));
        let mut known = Health::new(Some(false), Instant::now());
        assert_eq!(known.state(), "down");
        assert!(!note(&mut known, true, &check));
        assert!(note(&mut known, true, &check));
        assert!(known.is_up());
    }

    #[test]
    fn silence_counts_only_if_the_check_itself_was_in_time() {
        let timeout = Duration::from_secs(1);
        assert!(!was_starved(Duration::from_millis(1010), timeout));
        assert!(was_starved(Duration::from_millis(1300), timeout));
    }

    #[test]
    fn checks_of_one_interval_share_their_moments_also_with_later_ones() {
        let (second, interval) = (Duration::from_secs(1), Duration::from_millis(2100));
        let mut moments = std::collections::BTreeSet::new();
        for (now, random) in [(0, 0.0), (0, 0.4), (0, 0.99), (7, 0.2), (7, 0.8), (1000, 0.5)] {
            let now = second * now + Duration::from_micros(10);
            let first = first_moment(now, interval, random);
            assert!(first >= now && first <= now + second, "{first:?}");
            moments.insert(first.as_nanos() % interval.as_nanos() / 1000);
        }
        let apart = interval.as_micros() / 9;
        assert!(moments.iter().all(|at| at % apart < 9 || at % apart > apart - 9), "{moments:?}");
        assert!(first_moment(second * 50, Duration::from_secs(60), 1.0) <= second * 51);
        assert_eq!(first_moment(second, Duration::ZERO, 0.5), second, "nothing that could fail");
    }

    #[test]
    fn a_status_line_has_one_code() {
        assert_eq!(status_code("HTTP/1.1 204 No Content\r"), Some(204));
        assert_eq!(status_code("HTTP/1.0 503"), Some(503));
        for line in ["", "HTTP/1.1", "HTTP/1.1 99 x", "SSH-2.0-OpenSSH", "HTTP/2 200"] {
            assert_eq!(status_code(line), None, "{line}");
        }
    }

    #[tokio::test]
    async fn a_request_ends_the_handshake_by_itself_and_a_check_without_one_ends_it_at_once() {
        // The kernel gives a connection away when its handshake is over.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let (address, patience) = (listener.local_addr().unwrap(), Duration::from_secs(5));
        let whole = connect(address, patience, Handshake::Whole).await.unwrap();
        listener.accept().unwrap();
        drop(whole);
        let mut half = connect(address, patience, Handshake::EndsWithRequest).await.unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        half.write_all(b"GET").await.unwrap();
        listener.accept().unwrap();
    }

    #[tokio::test]
    async fn an_http_check_reads_the_code() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            for answer in ["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 500 No\r\n\r\n", "hello\n", ""] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 1024];
                let length = stream.read(&mut request).await.unwrap();
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                assert!(request.starts_with("GET /healthy HTTP/1.1\r\nHost: shop\r\n"), "{request}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let expect = CodeRange { first: 200, last: 399 };
        let http = Probe::Http { path: "/healthy".to_owned(), host: Some("shop".to_owned()), expect };
        let patience = Duration::from_secs(5);
        probe(&http, address, patience).await.unwrap();
        for wanted in ["answered 500, not 200-399", "not in HTTP", "not in HTTP"] {
            let error = probe(&http, address, patience).await.unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        server.await.unwrap();
        assert!(probe(&http, address, patience).await.is_err(), "nobody listens any more");
    }
}
