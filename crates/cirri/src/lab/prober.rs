//! Probes from inside one namespace: real connections, datagrams and echo requests, many at once.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use futures::StreamExt;
use serde::Serialize;
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
#[derive(Clone, Debug)]
pub struct Job {
    /// Where to.
    pub to: IpAddr,
    /// The port and protocol.
    pub port: Port,
    /// The address to send from, if not the one the kernel would choose.
    pub source: Option<IpAddr>,
    /// Whether the echo server listens there, so that silence after the handshake means that packets are lost.
    pub echo: bool,
}

/// How patient to be.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long one try waits for an answer.
    pub timeout: Duration,
    /// How often a try that met silence is repeated: one lost packet must not look like a policy.
    pub retries: u32,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It got there and back.
    Allowed,
    /// Silence, or a message that it is forbidden.
    Denied,
    /// It was neither allowed nor denied: nobody listens there, there is no way to it.
    Error,
}

/// Carries out all jobs from the calling thread's namespace; the outcomes come in the order of the jobs.
pub async fn probe_all(jobs: Vec<Job>, patience: Patience) -> Vec<Outcome> {
    futures::stream::iter(jobs).map(|job| probe(job, patience)).buffered(PARALLEL).collect().await
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
            socket.connect(SocketAddr::new(job.to, job.port.number)).await?;
            let answer = ask(&socket, b"probe\n", limit).await?;
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
    let deadline = Instant::now() + limit;
    let socket = if job.to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(source) = job.source {
        socket.bind(SocketAddr::new(source, 0))?;
    }
    let address = SocketAddr::new(job.to, job.port.number);
    let connection =
        timeout(limit, socket.connect(address)).await.map_err(|_| Failure::Silence("no answer to the handshake"))??;
    let patience = if job.echo { deadline.saturating_duration_since(Instant::now()) } else { GRACE };
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
    let any = if job.to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    job.source.unwrap_or(any)
}

/// What an error of the socket says about the path.
fn judge(error: &io::Error, port: Port) -> (Verdict, String) {
    match error.kind() {
        io::ErrorKind::PermissionDenied => (Verdict::Denied, format!("forbidden: {error}")),
        io::ErrorKind::ConnectionRefused => (Verdict::Error, format!("refused: nothing listens on {port} there")),
        io::ErrorKind::TimedOut => (Verdict::Denied, "no answer".to_owned()),
        _ => (Verdict::Error, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::netns::block_on;
    use super::*;

    const PATIENCE: Patience = Patience { timeout: Duration::from_millis(200), retries: 1 };

    fn job(port: u16, protocol: Transport, echo: bool) -> Job {
        Job { to: Ipv4Addr::LOCALHOST.into(), port: Port { number: port, protocol }, source: None, echo }
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
                probe_all(jobs, PATIENCE).await.into_iter().map(|outcome| outcome.verdict).collect();
            assert_eq!(verdicts, [Verdict::Denied, Verdict::Denied, Verdict::Allowed, Verdict::Error]);
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
            assert_eq!((outcomes[0].verdict, outcomes[0].answered_by.as_deref()), (Verdict::Allowed, None));
        })
        .unwrap();
    }
}
