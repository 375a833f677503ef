//! Services, as they go over the agent's socket.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Parameters of `service.list`, `service.get` and `service.backends`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServiceGet {
    /// Only of this namespace.
    pub namespace: Option<String>,
    /// Only of this name.
    pub name: Option<String>,
}

/// One port of a service in one family: an answer to `service.list` and `service.get` is a list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceInfo {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The port's name, or its number if it has none.
    pub port: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// 4 or 6.
    pub ip_version: u8,
    /// `enforced`, `pending`, or `error: why` (then the last good state is in force).
    pub state: String,
    /// Its number in the tables; 0 while it has none.
    pub id: u32,
    /// The most public of the ways that it is reached: `ClusterIP`, `NodePort`, `LoadBalancer`, `HostPort`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where it is reached.
    pub frontends: Vec<FrontendInfo>,
    /// Backends that new connections may be given.
    pub ready: usize,
    /// All backends.
    pub total: usize,
    /// Backends that clients inside the cluster may be given.
    pub inside: usize,
    /// Backends that clients outside may be given.
    pub outside: usize,
    /// `random` or `maglev`.
    pub algorithm: String,
    /// `snat`, `dsr-option` or `dsr-ipip`.
    pub forwarding: String,
    /// How long a client keeps its backend, seconds; 0: not at all.
    pub affinity_s: u32,
    /// Which clients outside are let in; empty: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_ranges: Vec<String>,
    /// Turns `source_ranges` around: whom they name is kept out.
    #[serde(default)]
    pub source_ranges_deny: bool,
    /// Who serves; only in answers to `service.get`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backends: Vec<BackendInfo>,
    /// What is wrong with the service; not in answers to `service.backends`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// An address and port that are served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendInfo {
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalIP`, `HostPort`.
    pub kind: String,
    /// The address; absent: the node's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// The port.
    pub port: u16,
}

/// Who serves.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackendInfo {
    /// `namespace/name:port/protocol` of what it serves.
    pub service: String,
    /// Its number in the tables; 0 while it has none.
    pub number: u32,
    /// Its address.
    pub ip: IpAddr,
    /// Its port.
    pub port: u16,
    /// `active`, `draining`, `down`.
    pub state: String,
    /// Share of new connections, relative to the others.
    pub weight: u16,
    /// The node it runs on, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// `namespace/pod`, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Whether clients inside the cluster may be given it.
    pub inside: bool,
    /// Whether clients outside may be given it.
    pub outside: bool,
    /// Connections that it was given on this node.
    pub connections: u64,
    /// Packets of clients to it.
    pub packets: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Packets of its answers that came by here.
    pub answers: u64,
}

/// Services, in the agent's status.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ServicesStatus {
    /// Services that have something to serve.
    pub services: usize,
    /// Their ports, each family by itself.
    pub ports: usize,
    /// Addresses and ports that are served.
    pub frontends: usize,
    /// Backends that may be given connections.
    pub ready: usize,
    /// All backends.
    pub backends: usize,
    /// What is wrong: with a service, as `shop/web: why`.
    pub problems: Vec<String>,
    /// How the node's devices are served.
    pub devices: Vec<EdgeInfo>,
    /// Translation in the system call.
    pub socket: SocketInfo,
    /// Ports that answer how many local backends a service has.
    pub health_checks: Vec<HealthCheckInfo>,
}

/// How a device of the node is served.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EdgeInfo {
    /// The device.
    pub device: String,
    /// `xdp-native`, `xdp-generic` or `tc`.
    pub mode: String,
    /// Why.
    pub reason: String,
}

/// Translation in the system call.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SocketInfo {
    /// Whether it is on.
    pub on: bool,
    /// `all`, `host` or `off`, as configured.
    pub mode: String,
    /// The control group that the programs are attached to.
    pub cgroup: String,
    /// Why it is off although it should be on; empty if nothing is wrong.
    pub error: String,
    /// Local workloads whose packets are translated instead.
    pub per_packet: usize,
}

/// A port that answers how many local backends a service has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheckInfo {
    /// The port, on all addresses of the node.
    pub port: u16,
    /// `namespace/name`.
    pub service: String,
    /// Ready backends on this node.
    pub local: usize,
    /// Why it does not answer; empty if it does.
    pub error: String,
}
