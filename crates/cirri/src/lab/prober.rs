//! Probes from inside one namespace: real connections, datagrams and echo requests, many at once.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use futures::StreamExt;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::{Instant, timeout};

use super::echo::{Greeting, Port, Transport};

/// Probes of one source under way at once: enough to hide the waiting, few enough not to lose packets to a flood.
const PARALLEL: usize = 96;
/// How long a server that is not known to greet may take to do so before its silence counts as "answers otherwise".
const GRACE: Duration = Duration::from_millis(100);
/// Longest greeting that is read.
const GREETING_MAX: u64 = 4096;

/// One question: does this get through?
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Where to.
    pub to: IpAddr,
    /// The port and protocol.
    pub port: Port,
    /// The address to send from, if not the one the kernel would choose.
    pub source: Option<IpAddr>,
    /// Whether the echo server listens there, so that silence after the handshake means that packets are lost.
    pub echo: bool,
    /// The kind of socket.
    pub socket: SocketKind,
}

/// The kind of socket that asks: programs differ in it, and a service must look the same to all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SocketKind {
    /// Connected, of the address's own family.
    #[default]
    Plain,
    /// Connected, of IPv6 with an IPv4-mapped address (for IPv4 addresses).
    Mapped,
    /// For datagrams: not connected, each datagram names its receiver.
    Unconnected,
}

/// How patient to be.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Patience {
    /// How long one try waits for an answer; one over TCP as long for the handshake, and then for data.
    pub timeout: Duration,
    /// How often a try that met silence is repeated: one lost packet must not look like a policy.
    pub retries: u32,
    /// How often everything is asked, one after the other.
    pub count: u32,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// What it comes to.
    pub verdict: Verdict,
    /// Why, unless it got through.
    pub error: Option<String>,
    /// How long the last try took, in milliseconds.
    pub time_ms: f64,
    /// The pod that answered, if its server says so.
    pub answered_by: Option<String>,
    /// The client's address as the server saw it, if it says so.
    pub seen_client: Option<IpAddr>,
}

/// What a probe comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It got there and back.
    Allowed,
    /// Silence, or a message that it is forbidden.
    Denied,
    /// Somebody answered at once that nobody serves this: a TCP reset, or ICMP "port unreachable".
    Refused,
    /// None of these: there is no way to it, the connection broke, the answer came from another address.
    Error,
}

/// Carries out all jobs from the calling thread's namespace; the outcomes of all tries come in the order of the jobs.
pub async fn probe_all(jobs: Vec<Job>, patience: Patience) -> Vec<Vec<Outcome>> {
    futures::stream::iter(jobs).map(|job| probe_often(job, patience)).buffered(PARALLEL).collect().await
}

/// One after the other, so that each finds what the one before left (a client that keeps its backend, for one).
async fn probe_often(job: Job, patience: Patience) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for _ in 0..patience.count {
        outcomes.push(probe(job.clone(), patience).await);
    }
    outcomes
}

async fn probe(job: Job, patience: Patience) -> Outcome {
    let mut retries = patience.retries;
    loop {
        let begun = Instant::now();
        let answer = attempt(&job, patience.timeout).await;
        let time_ms = super::load::milliseconds(begun.elapsed());
        if retries > 0 && matches!(answer, Err(Failure::Silence(_))) {
            retries -= 1;
            continue;
        }
        let (verdict, error, greeting) = match answer {
            Ok(greeting) => (Verdict::Allowed, None, greeting),
            Err(Failure::Silence(what)) => (Verdict::Denied, Some(what.to_owned()), None),
            Err(Failure::Io(error)) => {
                let (verdict, error) = judge(&error, job.port);
                (verdict, Some(error), None)
            }
        };
        let (answered_by, seen_client) = greeting.map(|g| (g.pod, g.client.ip())).unzip();
        return Outcome { verdict, error, time_ms, answered_by, seen_client };
    }
}

enum Failure {
    /// Nothing came back in time.
    Silence(&'static str),
    /// The kernel had something to say.
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

async fn attempt(job: &Job, limit: Duration) -> Result<Option<Greeting>, Failure> {
    match job.port.protocol {
        Transport::Tcp => connect(job, limit).await,
        Transport::Udp => {
            let socket = UdpSocket::bind(SocketAddr::new(source_or_any(job), 0)).await?;
            let answer = match job.socket {
                SocketKind::Unconnected => ask_unconnected(&socket, job.target(), limit).await?,
                _ => {
                    socket.connect(job.target()).await?;
                    job.check_peer(socket.peer_addr()?)?;
                    ask(&socket, b"probe\n", limit).await?
                }
            };
            Ok(serde_json::from_slice(&answer).ok())
        }
        Transport::Icmp => {
            let socket = ping_socket(job)?;
            socket.connect(SocketAddr::new(job.to, 0)).await?;
            // Type, code, checksum and identifier (the kernel fills both in), sequence number 1.
            let request = [if job.to.is_ipv4() { 8 } else { 128 }, 0, 0, 0, 0, 0, 0, 1, b'c', b'i', b'r', b'r', b'i'];
            ask(&socket, &request, limit).await?;
            Ok(None)
        }
    }
}

async fn connect(job: &Job, limit: Duration) -> Result<Option<Greeting>, Failure> {
    let target = job.target();
    let socket = if target.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(source) = job.source {
        socket.bind(SocketAddr::new(job.in_family(source), 0))?;
    }
    let connection =
        timeout(limit, socket.connect(target)).await.map_err(|_| Failure::Silence("no answer to the handshake"))??;
    job.check_peer(connection.peer_addr()?)?;
    // Not only what the handshake has left: who is late to see that it is over, on a busy machine, would not wait at
    // all, and call silence what is on its way.
    let patience = if job.echo { limit } else { GRACE };
    let mut line = String::new();
    let mut reader = BufReader::new(connection.take(GREETING_MAX));
    match timeout(patience, reader.read_line(&mut line)).await {
        Ok(read) => {
            read?;
            Ok(serde_json::from_str(&line).ok())
        }
        Err(_) if job.echo => Err(Failure::Silence("connected, but no data came through")),
        // The handshake got through; a server that waits for a question is no reason to doubt it.
        Err(_) => Ok(None),
    }
}

impl Job {
    /// Where the socket is told to go.
    fn target(&self) -> SocketAddr {
        SocketAddr::new(self.in_family(self.to), self.port.number)
    }

    /// An address as the socket's family writes it.
    fn in_family(&self, address: IpAddr) -> IpAddr {
        match (self.socket, address) {
            (SocketKind::Mapped, IpAddr::V4(address)) => address.to_ipv6_mapped().into(),
            (_, address) => address,
        }
    }

    /// Whoever serves, a program is told that it talks to the address that it named.
    fn check_peer(&self, peer: SocketAddr) -> io::Result<()> {
        if peer == self.target() {
            return Ok(());
        }
        Err(io::Error::other(format!("getpeername says {peer}")))
    }
}

async fn ask_unconnected(socket: &UdpSocket, target: SocketAddr, limit: Duration) -> Result<Vec<u8>, Failure> {
    let mut answer = vec![0; 2048];
    socket.send_to(b"probe\n", target).await?;
    let (length, from) =
        timeout(limit, socket.recv_from(&mut answer)).await.map_err(|_| Failure::Silence("no answer"))??;
    if from != target {
        return Err(io::Error::other(format!("answered from {from}")).into());
    }
    answer.truncate(length);
    Ok(answer)
}

async fn ask(socket: &UdpSocket, question: &[u8], limit: Duration) -> Result<Vec<u8>, Failure> {
    let mut answer = vec![0; 2048];
    socket.send(question).await?;
    let length = timeout(limit, socket.recv(&mut answer)).await.map_err(|_| Failure::Silence("no answer"))??;
    answer.truncate(length);
    Ok(answer)
}

/// A socket for echo requests: the kernel sets the identifier and hands over the answers to it alone.
fn ping_socket(job: &Job) -> io::Result<UdpSocket> {
    let (domain, protocol) =
        if job.to.is_ipv4() { (Domain::IPV4, Protocol::ICMPV4) } else { (Domain::IPV6, Protocol::ICMPV6) };
    let socket = Socket::new(domain, Type::DGRAM, Some(protocol))?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::new(source_or_any(job), 0).into())?;
    UdpSocket::from_std(socket.into())
}

fn source_or_any(job: &Job) -> IpAddr {
    let any = if job.target().is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    job.source.map_or(any, |source| job.in_family(source))
}

/// What an error of the socket says about the path.
fn judge(error: &io::Error, port: Port) -> (Verdict, String) {
    match error.kind() {
        io::ErrorKind::PermissionDenied => (Verdict::Denied, format!("forbidden: {error}")),
        io::ErrorKind::ConnectionRefused => (Verdict::Refused, format!("nothing serves {port} there")),
        io::ErrorKind::TimedOut => (Verdict::Denied, "no answer".to_owned()),
        _ => (Verdict::Error, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::netns::block_on;
    use super::*;

    /// Longer than the runtime's clock takes to go on.
    const LITTLE: Duration = Duration::from_millis(2);
    const PATIENCE: Patience = Patience { timeout: Duration::from_millis(200), retries: 1, count: 1 };

    fn job(port: u16, protocol: Transport, echo: bool) -> Job {
        let (port, socket) = (Port { number: port, protocol }, SocketKind::Plain);
        Job { to: Ipv4Addr::LOCALHOST.into(), port, source: None, echo, socket }
    }

    #[test]
    fn silence_is_a_denial_and_a_refusal_is_not() {
        block_on(async {
            let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
            let jobs = vec![
                job(silent.local_addr().unwrap().port(), Transport::Udp, true),
                job(mute.local_addr().unwrap().port(), Transport::Tcp, true),
                job(mute.local_addr().unwrap().port(), Transport::Tcp, false),
                job(closed, Transport::Tcp, true),
            ];
            let verdicts: Vec<Verdict> =
                probe_all(jobs, PATIENCE).await.into_iter().map(|outcomes| outcomes[0].verdict).collect();
            assert_eq!(verdicts, [Verdict::Denied, Verdict::Denied, Verdict::Allowed, Verdict::Refused]);
        })
        .unwrap();
    }

    #[test]
    fn who_is_late_to_see_the_end_of_the_handshake_waits_for_data_all_the_same() {
        block_on(async {
            let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let job = job(server.local_addr().unwrap().port(), Transport::Tcp, true);
            let busy = async {
                // The handshake is under way, and the machine does something else for longer than it may take. The
                // data are on their way a little longer.
                for pause in [2 * PATIENCE.timeout, LITTLE, LITTLE, LITTLE] {
                    std::thread::sleep(pause);
                    tokio::task::yield_now().await;
                }
                let (mut connection, _) = server.accept().unwrap();
                connection.write_all(b"not a greeting\n").unwrap();
                connection
            };
            let (outcome, _open) = tokio::join!(probe(job, Patience { retries: 0, ..PATIENCE }), busy);
            assert_eq!(outcome.verdict, Verdict::Allowed, "{outcome:?}");
        })
        .unwrap();
    }

    #[test]
    fn a_lost_datagram_is_asked_again() {
        block_on(async {
            let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let port = server.local_addr().unwrap().port();
            let answering = async {
                let mut buffer = [0; 16];
                // The first question is lost.
                server.recv_from(&mut buffer).await.unwrap();
                let (_, client) = server.recv_from(&mut buffer).await.unwrap();
                server.send_to(b"not a greeting", client).await.unwrap();
            };
            let (outcomes, ()) = tokio::join!(probe_all(vec![job(port, Transport::Udp, true)], PATIENCE), answering);
            let first = &outcomes[0][0];
            assert_eq!((first.verdict, first.answered_by.as_deref()), (Verdict::Allowed, None));
        })
        .unwrap();
    }

    #[test]
    fn every_kind_of_socket_asks_and_an_answer_from_elsewhere_is_an_error() {
        block_on(async {
            let (server, other) = (UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await);
            let (port, other) = (server.local_addr().unwrap().port(), other.unwrap());
            let kinds = [SocketKind::Plain, SocketKind::Mapped, SocketKind::Unconnected];
            let jobs = kinds.map(|socket| Job { socket, ..job(port, Transport::Udp, true) });
            let answering = async {
                let mut buffer = [0; 16];
                for _ in 0..6 {
                    let (_, client) = server.recv_from(&mut buffer).await.unwrap();
                    server.send_to(b"not a greeting", client).await.unwrap();
                }
                let (_, client) = server.recv_from(&mut buffer).await.unwrap();
                other.send_to(b"not a greeting", client).await.unwrap();
            };
            let asking = async {
                let twice = Patience { count: 2, ..PATIENCE };
                let outcomes = probe_all(jobs.to_vec(), twice).await;
                let last = probe(jobs[2].clone(), PATIENCE).await;
                (outcomes, last)
            };
            let ((outcomes, last), ()) = tokio::join!(asking, answering);
            let verdicts: Vec<Vec<Verdict>> = outcomes.iter().map(|o| o.iter().map(|o| o.verdict).collect()).collect();
            assert_eq!(verdicts, [[Verdict::Allowed; 2]; 3]);
            assert_eq!(last.verdict, Verdict::Error, "{last:?}");
        })
        .unwrap();
    }
}
