//! What goes over the load balancer's socket: one line of JSON asks, one line answers, as with the agent.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::api::{CounterInfo, Problem, ProblemKind};

/// How the load balancer is doing; answer to `status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version.
    pub version: String,
    /// Name of the instance, which its pins are under.
    pub instance: String,
    /// Hash of the layouts shared with the kernel.
    pub abi: String,
    /// Process number.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// Resident memory, bytes.
    pub memory_bytes: u64,
    /// The file.
    pub config: ConfigStatus,
    /// Sources of translated connections.
    pub addresses: Vec<IpAddr>,
    /// The devices.
    pub devices: Vec<DeviceStatus>,
    /// How many services.
    pub services: usize,
    /// Services that nobody serves: they refuse connections.
    pub refusing: Vec<String>,
    /// Backends by state.
    pub backends: BTreeMap<String, usize>,
    /// Checks and what came of them; only of backends that are checked.
    pub health: Vec<HealthStatus>,
    /// Sources of translated connections that ran out of ports.
    pub pools: Vec<PoolStatus>,
    /// Entries of the tables that grow with the load.
    pub tables: Vec<TableUse>,
    /// Packets and bytes by name: forwarded and dropped by reason, and the rest.
    pub counters: BTreeMap<String, CounterInfo>,
    /// Drops by reason with the clients of the newest ones, the most frequent first.
    pub drops: Vec<DropStatus>,
    /// What somebody should look at.
    pub warnings: Vec<String>,
    /// What in the kernel is not as it was made.
    #[serde(default)]
    pub problems: Vec<Problem>,
    /// What was made right since the start, by kind.
    #[serde(default)]
    pub repaired: BTreeMap<ProblemKind, u64>,
}

/// The file, as far as it is in force.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConfigStatus {
    /// Its path.
    pub file: String,
    /// Whether what the file says now is in force.
    pub in_force: bool,
    /// What is wrong with it; empty if nothing. What was in force before still is.
    pub error: String,
    /// Seconds since what is in force was read.
    pub age_s: u64,
    /// How often it was read with success since the start.
    pub loads: u64,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// `native`, `generic`, `tc`, or `missing`.
    pub mode: String,
    /// Why not a better one.
    pub reason: String,
}

/// A check and what came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HealthStatus {
    /// Name of the service.
    pub service: String,
    /// Name of the backend.
    pub backend: String,
    /// What is tried, as `http 10.1.0.11:8080/healthy`.
    pub check: String,
    /// `up`, `down` or `unknown`.
    pub state: String,
    /// Seconds since it is so.
    pub since_s: u64,
    /// How often it changed since the start.
    pub changes: u64,
    /// What the last check said: `ok (1.2 ms)`, or what went wrong.
    pub last: String,
}

/// A source of translated connections.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Its name; `default` for the load balancer's own addresses.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its ports, `FIRST-LAST`.
    pub ports: String,
    /// Ports in use towards the backend that takes most of them.
    pub used: usize,
    /// How many there are towards each backend.
    pub size: usize,
    /// Connections in all.
    pub connections: usize,
    /// Who holds most of them, most first.
    pub clients: Vec<PoolClient>,
}

/// A client of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolClient {
    /// Its address.
    pub address: IpAddr,
    /// Connections, each with a port.
    pub connections: usize,
}

/// How full a table is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TableUse {
    /// What it holds.
    pub name: String,
    /// Entries in use.
    pub used: u64,
    /// Entries that fit.
    pub size: u64,
}

/// Drops for one reason.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DropStatus {
    /// The reason's number.
    pub reason: u8,
    /// The reason in words.
    pub text: String,
    /// Packets since the maps were made.
    pub packets: u64,
    /// Clients of the drops since this process started, most first.
    pub clients: Vec<DropClient>,
}

/// A client whose packets were dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropClient {
    /// Its address.
    pub address: IpAddr,
    /// Where it wanted to go, as `203.0.113.10:80/TCP`: the last of them.
    pub destination: String,
    /// Drops that were reported.
    pub drops: u64,
}

/// A service with its backends; answer to `list` is a list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceInfo {
    /// Its name.
    pub name: String,
    /// The address that clients use.
    pub address: IpAddr,
    /// The port that clients use.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// `maglev` or `random`.
    pub algorithm: String,
    /// Places in its table of backends.
    pub slots: u32,
    /// `snat`, `dsr-option` or `dsr-ipip`.
    pub forwarding: String,
    /// Seconds that a client keeps its backend; 0: not at all.
    pub affinity_s: u32,
    /// The pool that translated connections get their source from; empty: the load balancer's own.
    pub pool: String,
    /// Clients that may connect; empty: all.
    pub source_ranges: Vec<String>,
    /// `serving`, or `refusing` if there is nobody to serve.
    pub state: String,
    /// Its backends.
    pub backends: Vec<BackendInfo>,
}

/// A backend.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackendInfo {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its weight.
    pub weight: u16,
    /// `active`, `draining` or `down`.
    pub state: String,
    /// Why it is not active: `drained by hand`, `weight 0`, or what its check said.
    pub reason: String,
    /// Part of the new connections that it gets, 0 to 1.
    pub share: f64,
    /// Its number in the tables; 0 if it is not in them.
    pub number: u32,
}

/// What was given to whom; answer to `stats`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stats {
    /// Seconds of the monotonic clock, to tell rates between two answers.
    pub at_s: f64,
    /// The services.
    pub services: Vec<ServiceStats>,
}

/// What was given to the backends of one service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceStats {
    /// Its name.
    pub name: String,
    /// Where clients reach it, as `203.0.113.10:80/TCP`.
    pub frontend: String,
    /// All of its backends together.
    pub total: Traffic,
    /// Its backends.
    pub backends: Vec<BackendStats>,
}

/// What was given to one backend.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackendStats {
    /// Its name.
    pub name: String,
    /// Where it serves, as `10.1.0.11:8080`.
    pub address: String,
    /// What it was given.
    pub total: Traffic,
}

/// Counts since the backend got its number, and rates if they were asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// Connections; for datagrams: flows.
    pub connections: u64,
    /// Packets of clients.
    pub packets: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Packets of answers that came by here; none with direct server return.
    pub answers: u64,
    /// The same each second, between two looks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rates: Option<Rates>,
}

/// Counts each second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Connections.
    pub connections: f64,
    /// Packets of clients.
    pub packets: f64,
    /// Bytes of them.
    pub bytes: f64,
    /// Packets of answers.
    pub answers: f64,
}

/// Parameters of `drain` and `undrain`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// A backend's name, `SERVICE/NAME`, address, or address and port; all that it fits are meant.
    pub backend: String,
}

/// Answer to `drain` and `undrain`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Drained {
    /// Whom it was done to, `SERVICE/NAME`.
    pub backends: Vec<String>,
}

/// Parameters of `pools`: which ones, all if empty.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pools {
    /// Names.
    pub names: Vec<String>,
}

impl Traffic {
    /// Both together.
    pub fn plus(self, other: Traffic) -> Traffic {
        Traffic {
            connections: self.connections + other.connections,
            packets: self.packets + other.packets,
            bytes: self.bytes + other.bytes,
            answers: self.answers + other.answers,
            rates: None,
        }
    }

    /// With the rates since an earlier look. Nothing is negative: a number that was given to another
    /// backend begins anew.
    pub fn since(self, before: Traffic, seconds: f64) -> Traffic {
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let rates = Rates {
            connections: rate(self.connections, before.connections),
            packets: rate(self.packets, before.packets),
            bytes: rate(self.bytes, before.bytes),
            answers: rate(self.answers, before.answers),
        };
        Traffic { rates: Some(rates), ..self }
    }
}
