//! Connections of which both ends are held by the test, and steady load between pods.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::Deserialize;

use super::{Lab, LabError, binary};

/// How long nothing must arrive before it counts as stopped: several times TCP's first
/// retransmission timeout.
pub const QUIET: Duration = Duration::from_millis(900);
/// How long what passes may take: beyond any retransmission that a short loss needs, and a machine that stands still.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long one connection of a load may take, in milliseconds: whether it works is asked, not how soon.
pub const LOAD_PATIENCE: &str = "60000";

/// An established TCP connection, both ends of which the test holds.
#[derive(Debug)]
pub struct Conversation {
    client: TcpStream,
    server: TcpStream,
    /// The opener's address and port.
    pub from: SocketAddr,
    /// The other's.
    pub to: SocketAddr,
}

impl Conversation {
    /// Opens one from one pod (or `world`, `node:NAME`) to an address of another.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(lab: &Lab, from: &str, to: &str, address: IpAddr) -> Result<Conversation, LabError> {
        Ok(Conversation::open_many(lab, from, to, address, 1)?.remove(0))
    }

    /// Opens many.
    ///
    /// # Errors
    /// If one cannot be opened.
    pub fn open_many(
        lab: &Lab,
        from: &str,
        to: &str,
        address: IpAddr,
        count: usize,
    ) -> Result<Vec<Conversation>, LabError> {
        let what = || format!("opening connections from {from} to {to} ({address})");
        let io = |source: io::Error| LabError::Io { what: what(), source };
        let net = |error: cirri_loader::net::NetError| io(io::Error::other(error.to_string()));
        let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let listener = lab.netns(to)?.run(|| TcpListener::bind((any, 0))).map_err(net)?.map_err(io)?;
        let port = listener.local_addr().map_err(io)?.port();
        let server = SocketAddr::new(address, port);
        let from = lab.netns(from)?;
        from.run(|| {
            (0..count)
                .map(|_| {
                    let client = TcpStream::connect_timeout(&server, PATIENCE)?;
                    let (server, _) = listener.accept()?;
                    for end in [&client, &server] {
                        end.set_nodelay(true)?;
                    }
                    let (from, to) = (client.local_addr()?, client.peer_addr()?);
                    Ok(Conversation { client, server, from, to })
                })
                .collect::<io::Result<Vec<_>>>()
        })
        .map_err(net)?
        .map_err(io)
    }

    /// Whether a byte from the opener arrives in good time. After a `false` it may still be on its
    /// way, retransmitted, so that the next answer may be about this one.
    ///
    /// # Errors
    /// If the connection broke.
    pub fn there(&mut self, patience: Duration) -> io::Result<bool> {
        arrives(&mut self.client, &mut self.server, patience)
    }

    /// The same from the other end.
    ///
    /// # Errors
    /// If the connection broke.
    pub fn back(&mut self, patience: Duration) -> io::Result<bool> {
        arrives(&mut self.server, &mut self.client, patience)
    }

    /// One byte there and one back; panics unless both arrive.
    pub fn exchange(&mut self) {
        let name = format!("{} -> {}", self.from, self.to);
        assert!(self.there(PATIENCE).unwrap_or_else(|error| panic!("{name}: {error}")), "{name}: nothing arrives");
        assert!(self.back(PATIENCE).unwrap_or_else(|error| panic!("{name}: {error}")), "{name}: nothing comes back");
    }
}

fn arrives(from: &mut TcpStream, to: &mut TcpStream, patience: Duration) -> io::Result<bool> {
    from.write_all(&[1])?;
    to.set_read_timeout(Some(patience))?;
    match to.read(&mut [0]) {
        Ok(0) => Err(io::Error::other("closed")),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// New connections at a steady rate and one long transfer, against an echo server.
#[derive(Debug)]
pub struct Load {
    child: Option<Child>,
    name: String,
}

/// What came of it.
#[derive(Debug, Deserialize)]
pub struct LoadReport {
    /// Connections tried.
    pub connections: u64,
    /// Connections that failed in any way.
    pub failed: u64,
    /// The failures by reason.
    pub errors: std::collections::BTreeMap<String, u64>,
    /// The slowest that worked, milliseconds.
    pub max_ms: f64,
    /// The long transfers together.
    pub long: LongReport,
}

/// The long transfers: one that lasted the whole time, unless it was asked for several shorter ones.
#[derive(Debug, Deserialize)]
pub struct LongReport {
    /// Whether all lasted until their end.
    pub ok: bool,
    /// How many there were.
    pub transfers: u64,
    /// Bytes there and back.
    pub bytes: u64,
    /// The longest time without a byte coming back, milliseconds.
    pub longest_gap_ms: f64,
    /// Why the first of them broke.
    pub error: Option<String>,
}

impl Load {
    /// Starts `rate` connections a second from a pod for that long.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(lab: &Lab, pod: &str, to: SocketAddr, rate: u32, seconds: u64) -> Result<Load, LabError> {
        let (rate, seconds) = (rate.to_string(), seconds.to_string());
        let arguments = ["--rate", &rate, "--seconds", &seconds, "--timeout", LOAD_PATIENCE];
        Load::with(lab, pod, to, &arguments)
    }

    /// Starts one from a pod, or from `world`, with these arguments.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn with(lab: &Lab, from: &str, to: SocketAddr, arguments: &[&str]) -> Result<Load, LabError> {
        let name = format!("{from} -> {to}");
        let binary = binary()?;
        let from = if from == "world" { "--world" } else { from };
        let child = Command::new(&binary)
            .args(["lab", "exec", "--name", lab.name(), from, "--"])
            .arg(&binary)
            .args(["lab", "__load", "--to", &to.to_string()])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| LabError::Io { what: format!("load {name}"), source })?;
        Ok(Load { child: Some(child), name })
    }

    /// Who loads whom.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Ends it before its time.
    ///
    /// # Errors
    /// If it cannot be told, or reports nothing.
    pub fn stop(self) -> Result<LoadReport, LabError> {
        let pid = self.child.as_ref().map(|child| child.id().to_string());
        let pid = pid.ok_or_else(|| LabError::Unknown(self.name.clone()))?;
        let told = Command::new("kill").args(["-TERM", &pid]).status();
        told.map_err(|source| LabError::Io { what: format!("load {}", self.name), source })?;
        self.finish()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it reports nothing.
    pub fn finish(mut self) -> Result<LoadReport, LabError> {
        let child = self.child.take().ok_or_else(|| LabError::Unknown(self.name.clone()))?;
        let output =
            child.wait_with_output().map_err(|source| LabError::Io { what: format!("load {}", self.name), source })?;
        super::parse(&["lab", "__load", &self.name], &output)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Ended already, perhaps.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
