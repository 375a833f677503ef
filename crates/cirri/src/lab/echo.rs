//! The built-in echo server: stands in for the program of a container that only declares ports.
//!
//! A connection is greeted at once with one JSON line ([`Greeting`]), then gets back whatever it sends, for as long
//! as it likes. A datagram is answered with the same line, from the address it was sent to.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::netns::block_on;

/// The line on standard output that says that every port is open.
pub const READY: &str = "ready";
/// Connections served at once on all ports together; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 8192;
const BACKLOG: i32 = 4096;

/// Arguments of the hidden command.
#[derive(Debug, clap::Args)]
pub struct EchoArgs {
    /// Who answers, as NAMESPACE/POD.
    #[arg(long)]
    name: String,
    /// Addresses to answer datagrams on, besides the loopback ones.
    #[arg(long = "address")]
    addresses: Vec<IpAddr>,
    /// Ports to listen on, as 80/tcp or 53/udp.
    #[arg(required = true)]
    ports: Vec<Port>,
}

/// A port with its protocol, written `80/tcp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Port {
    /// The number; 0 for ICMP, which has none.
    pub number: u16,
    /// The protocol.
    pub protocol: Transport,
}

/// What a probe speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
    /// Echo requests.
    Icmp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            Transport::Icmp => f.write_str("icmp"),
            protocol => write!(f, "{}/{protocol}", self.number),
        }
    }
}

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.eq_ignore_ascii_case("icmp") {
            return Ok(Self { number: 0, protocol: Transport::Icmp });
        }
        let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            _ => return Err(format!("\"{text}\" is not a port: write 80/tcp, 53/udp or icmp")),
        };
        match number.parse() {
            Ok(number) if number > 0 => Ok(Self { number, protocol }),
            _ => Err(format!("\"{text}\" is not a port: numbers go from 1 to 65535")),
        }
    }
}

/// What the server says to whoever reaches it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// Who answers, as `namespace/pod`.
    pub pod: String,
    /// The client's address and port as the server sees them.
    pub client: SocketAddr,
    /// The address and port the client reached.
    pub server: SocketAddr,
    /// How it was reached.
    pub protocol: Transport,
}

impl Greeting {
    fn line(&self) -> Vec<u8> {
        // Serialising plain strings and addresses cannot fail.
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line
    }
}

/// Opens every port, says [`READY`] on standard output, and serves until killed.
///
/// # Errors
/// A port that cannot be opened.
pub fn run(args: EchoArgs) -> anyhow::Result<ExitCode> {
    raise_file_limit();
    block_on(async {
        let name: Arc<str> = args.name.into();
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let addresses: BTreeSet<IpAddr> =
            args.addresses.into_iter().chain([Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]).collect();
        for port in BTreeSet::from_iter(args.ports) {
            match port.protocol {
                Transport::Tcp => {
                    let listener = listen(port.number).with_context(|| format!("cannot listen on {port}"))?;
                    tokio::spawn(accept(listener, Arc::clone(&name), Arc::clone(&permits)));
                }
                // One socket an address: the answer then comes from the address that was asked.
                Transport::Udp => {
                    for address in &addresses {
                        let local = SocketAddr::new(*address, port.number);
                        let socket =
                            UdpSocket::bind(local).await.with_context(|| format!("cannot listen on {local}/udp"))?;
                        tokio::spawn(answer(socket, local, Arc::clone(&name)));
                    }
                }
                Transport::Icmp => {}
            }
        }
        let mut stdout = io::stdout();
        writeln!(stdout, "{READY}").and_then(|()| stdout.flush()).context("cannot report readiness")?;
        std::future::pending::<anyhow::Result<ExitCode>>().await
    })?
}

async fn accept(listener: TcpListener, name: Arc<str>, permits: Arc<Semaphore>) {
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        // An error concerns one connection that is gone already (or the file limit, which the permits keep away).
        let Ok((connection, client)) = listener.accept().await else { continue };
        let name = Arc::clone(&name);
        tokio::spawn(async move {
            // A client that breaks off is not the server's error.
            let _ = serve(connection, client, &name).await;
            drop(permit);
        });
    }
}

async fn serve(mut connection: TcpStream, client: SocketAddr, name: &str) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let greeting = Greeting {
        pod: name.to_owned(),
        client: canonical(client),
        server: canonical(connection.local_addr()?),
        protocol: Transport::Tcp,
    };
    connection.write_all(&greeting.line()).await?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = connection.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        connection.write_all(&buffer[..read]).await?;
    }
}

async fn answer(socket: UdpSocket, server: SocketAddr, name: Arc<str>) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        // An error is an ICMP message about an earlier answer: that client is gone.
        let Ok((_, client)) = socket.recv_from(&mut buffer).await else { continue };
        let greeting = Greeting { pod: name.to_string(), client, server, protocol: Transport::Udp };
        let _ = socket.send_to(&greeting.line(), client).await;
    }
}

/// A listener for both families, or for IPv4 alone where the kernel has no IPv6.
fn listen(port: u16) -> io::Result<TcpListener> {
    let (domain, any): (Domain, IpAddr) = match Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)) {
        Ok(_) => (Domain::IPV6, Ipv6Addr::UNSPECIFIED.into()),
        Err(_) => (Domain::IPV4, Ipv4Addr::UNSPECIFIED.into()),
    };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::new(any, port).into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// An IPv4 client of a socket for both families, written as IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Lifts the soft limit of open files to the hard one; what cannot be lifted stays as it is.
pub fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, BufReader};

    use super::*;

    #[test]
    fn ports_are_read_with_their_protocol() {
        assert_eq!("80".parse::<Port>().unwrap().to_string(), "80/tcp");
        assert_eq!("53/UDP".parse::<Port>().unwrap().to_string(), "53/udp");
        assert_eq!("icmp".parse::<Port>().unwrap().to_string(), "icmp");
        for bad in ["0/tcp", "65536/tcp", "80/sctp", "", "x"] {
            assert!(bad.parse::<Port>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_connection_is_greeted_in_both_families_and_then_echoed() {
        block_on(async {
            let listener = listen(0).unwrap();
            let port = listener.local_addr().unwrap().port();
            tokio::spawn(accept(listener, "ns/pod".into(), Arc::new(Semaphore::new(4))));
            for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
                let connection = TcpStream::connect((address, port)).await.unwrap();
                let local = connection.local_addr().unwrap();
                let mut lines = BufReader::new(connection);
                let mut line = String::new();
                lines.read_line(&mut line).await.unwrap();
                let greeting: Greeting = serde_json::from_str(&line).unwrap();
                assert_eq!((greeting.pod.as_str(), greeting.client), ("ns/pod", local));
                lines.write_all(b"hello\n").await.unwrap();
                line.clear();
                lines.read_line(&mut line).await.unwrap();
                assert_eq!(line, "hello\n");
            }
        })
        .unwrap();
    }
}
