//! What goes over the agent's socket: one line of JSON asks, lines of JSON answer.

mod cni;
mod problems;
mod services;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use cirri_control::cut::cut_message;

use serde::{Deserialize, Serialize};

pub use cni::{
    Address, Attachment, EndpointAdd, EndpointAdded, EndpointCheck, EndpointDelete, EndpointGc, NotReady, Obstacle,
    Readiness, Removed, Told, ToldRoute, ValidAttachment,
};
pub use problems::{Problem, ProblemKind};
pub use services::{
    BackendInfo, EdgeInfo, FrontendInfo, HealthCheckInfo, ServiceGet, ServiceInfo, ServicesStatus, SocketInfo,
};

/// A question.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Which one, as `endpoint.list`.
    pub method: String,
    /// What it needs to know.
    #[serde(default)]
    pub params: serde_json::Value,
}

/// One line of an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// It worked.
    Result(serde_json::Value),
    /// It did not.
    Error(ApiError),
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// `bad-request`, of ADD more closely `bad-netns`, `bad-name`, `bad-mac`, `bad-address`; `not-found`, `conflict`,
    /// `exhausted`, `timeout`, `unavailable`, `denied`, `internal`.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What to do next; may be empty.
    #[serde(default)]
    pub hint: String,
}

impl ApiError {
    /// A refusal without advice.
    pub fn new(code: &str, message: impl fmt::Display) -> ApiError {
        ApiError { code: code.to_owned(), message: cut_message(&message.to_string()).into_owned(), hint: String::new() }
    }

    /// Adds what to do next.
    pub fn hint(mut self, hint: impl fmt::Display) -> ApiError {
        self.hint = hint.to_string();
        self
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.hint.is_empty() { Ok(()) } else { write!(f, " ({})", self.hint) }
    }
}

impl std::error::Error for ApiError {}

/// A workload of this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EndpointInfo {
    /// Its number on this node.
    pub id: u16,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// `pending`, `done`, or `error: why`.
    pub state: String,
    /// Its identity.
    pub identity: u32,
    /// Who other nodes are told that it is, as long as they may not know its identity; 0: that.
    #[serde(default)]
    pub tunnel_identity: u32,
    /// What the identity stands for.
    pub labels: Vec<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The node's side of its device.
    pub host_ifname: String,
    /// Index of that device.
    pub ifindex: u32,
    /// Ethernet address inside.
    pub mac: String,
    /// Name of the network that it was attached to.
    pub network: String,
    /// The runtime's name for the container.
    pub container_id: String,
    /// Name of the device inside.
    pub ifname: String,
    /// Path of its network namespace, as it was when it was attached.
    pub netns: String,
    /// Slot of its rule set.
    pub ruleset: u16,
    /// Entries of its rule set.
    pub entries: usize,
    /// Generation of its rule set: the epoch of its slot.
    pub generation: u32,
    /// How long attaching took, milliseconds.
    pub ready_ms: f64,
}

/// Parameters of `endpoint.get`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointGet {
    /// Its number on this node.
    pub id: u16,
}

/// An identity.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IdentityInfo {
    /// The number.
    pub id: u32,
    /// What it stands for.
    pub labels: Vec<String>,
    /// How many endpoints of this node have it.
    pub endpoints: usize,
    /// Slot of its rule set on this node; 0 for none.
    pub ruleset: u16,
}

/// Parameters of `policy.get`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyGet {
    /// Only of this namespace.
    pub namespace: Option<String>,
    /// Only of this name.
    pub name: Option<String>,
}

/// A policy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyInfo {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Store revision it was last changed at.
    pub revision: u64,
    /// `enforced`; `pending`; `in part: why` (some peers of its rules do not fit and are not allowed); or `refused: why`
    /// (what it selects is closed, and its last good version stays in force, if there is one: it says which).
    pub state: String,
    /// How many endpoints of this node it selects.
    pub endpoints: usize,
    /// Its rules.
    pub rules: Vec<RuleInfo>,
}

/// A rule of a policy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RuleInfo {
    /// `ingress` or `egress`.
    pub direction: String,
    /// Which one, from 0.
    pub index: u32,
    /// What it allows, in words.
    pub text: String,
    /// Its number in tables and events.
    pub cookie: u32,
}

/// Parameters of `policy.explain`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyExplain {
    /// `namespace/pod`, or an address.
    pub from: String,
    /// `namespace/pod`, or an address.
    pub to: String,
    /// Destination port.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub proto: String,
}

/// Answer to `policy.explain`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// `allow` or `deny`.
    pub verdict: String,
    /// Who asks.
    pub from: ExplainedParty,
    /// Who is asked.
    pub to: ExplainedParty,
    /// Leaving the sender; absent if the sender is no workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<ExplainedDirection>,
    /// Entering the receiver; absent if the receiver is no workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<ExplainedDirection>,
}

/// One end of an explained connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExplainedParty {
    /// As it was asked for.
    pub name: String,
    /// Its identity.
    pub identity: u32,
    /// What the identity stands for.
    pub labels: Vec<String>,
    /// The policies' CIDR block it is in; 0 for none.
    pub block: u32,
}

/// What one direction answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExplainedDirection {
    /// `allow` or `deny`.
    pub verdict: String,
    /// The rule that decides.
    pub rule: String,
    /// Its number in tables and events.
    pub cookie: u32,
}

/// A map of the packet path.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapInfo {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// Entries now; absent where counting makes no sense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entries: Option<u64>,
    /// Most entries it can hold; bytes for the ring.
    pub max_entries: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Kernel memory it takes, bytes.
    #[serde(default)]
    pub memory_bytes: u64,
    /// What it is for.
    pub about: String,
}

/// Parameters of `map.dump`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MapDump {
    /// Its name.
    pub name: String,
    /// At most so many entries; 0 for all.
    #[serde(default)]
    pub limit: usize,
}

/// An entry of a map.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapEntry {
    /// The key in words.
    pub key: String,
    /// The value in words.
    pub value: String,
}

/// Parameters of `observe`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Observe {
    /// Go on with what comes.
    pub follow: bool,
    /// Start with so many of the newest that match; absent: all that are kept, or none with `follow`.
    pub last: Option<usize>,
    /// Which ones.
    pub filter: cirri_flow::Filter,
}

/// Parameters of `wait`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Wait {
    /// Store revision to wait for. Absent: everything that stands in the store (or the folder) now.
    pub revision: Option<u64>,
    /// How long at most, milliseconds.
    pub timeout_ms: Option<u64>,
}

/// Answer to `wait`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Waited {
    /// Store revision that is now enforced.
    pub enforced_revision: u64,
    /// How long it took, milliseconds.
    pub waited_ms: u64,
}

/// How the agent is doing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Name of the node.
    pub node: String,
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
    /// `overlay` or `direct`.
    pub routing: String,
    /// The node's addresses.
    pub addresses: Vec<IpAddr>,
    /// The node's pod ranges.
    pub pod_cidrs: Vec<String>,
    /// Why pods have IPv4 alone on a node that has, or could have, IPv6; empty if they have both.
    #[serde(default)]
    pub without_v6: String,
    /// The store.
    pub store: StoreStatus,
    /// Newest store revision seen.
    pub seen_revision: u64,
    /// Newest store revision that every table is reconciled for.
    pub enforced_revision: u64,
    /// Whether the store holds more than was seen: then what is enforced is not all there is.
    #[serde(default)]
    pub is_behind: bool,
    /// How long the newest changes took from being seen to being in force.
    #[serde(default)]
    pub latency: LatencyInfo,
    /// Endpoints on this node.
    pub endpoints: usize,
    /// The tables and their rows.
    pub tables: Vec<TableStatus>,
    /// The other nodes.
    pub peers: Vec<PeerStatus>,
    /// Programs attached: device and programs.
    pub attachments: Vec<String>,
    /// Services.
    #[serde(default)]
    pub services: ServicesStatus,
    /// Flow events.
    pub flows: FlowStatus,
    /// What is not well; empty if all is.
    pub problems: Vec<Problem>,
    /// How often something in the kernel that others had changed was made right since the start, by kind.
    #[serde(default)]
    pub repaired: BTreeMap<ProblemKind, u64>,
    /// Packets and bytes by name: forwarded and dropped by reason and direction, and the rest.
    pub counters: BTreeMap<String, CounterInfo>,
}

/// The store, as the agent sees it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StoreStatus {
    /// `folder` or `etcd`.
    pub kind: String,
    /// Whether it answers.
    pub healthy: bool,
    /// What is wrong; empty if nothing.
    pub error: String,
    /// Since when it does not answer, RFC 3339; empty if it does.
    #[serde(default)]
    pub since: String,
    /// Whether everything in it was seen at least once since the start.
    pub synced: bool,
}

/// How long the newest changes (4096 at most) took from being seen to being in force, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencyInfo {
    /// Changes since the start; what came at once counts as one.
    pub count: u64,
    /// The last one.
    pub last_us: u64,
    /// Half of them took no longer.
    pub p50_us: u64,
    /// 99 of 100 took no longer.
    pub p99_us: u64,
    /// None took longer.
    pub max_us: u64,
}

/// A table of desired rows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TableStatus {
    /// Its name.
    pub name: String,
    /// Rows that are as desired.
    pub done: usize,
    /// Rows that are being worked on.
    pub pending: usize,
    /// Rows that failed and are tried again.
    pub errors: Vec<RowError>,
}

/// A row that failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RowError {
    /// Which row.
    pub key: String,
    /// Why.
    pub error: String,
    /// How often it was tried.
    pub attempts: u32,
}

/// Another node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its pod ranges.
    pub pod_cidrs: Vec<String>,
    /// Workload addresses known behind it.
    pub workloads: usize,
}

/// Flow events, as the agent sees them.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct FlowStatus {
    /// Records kept.
    pub kept: usize,
    /// Records that can be kept.
    pub capacity: usize,
    /// Records seen since the start.
    pub seen: u64,
    /// Events that found the kernel's ring full.
    pub lost: u64,
}

/// Packets and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterInfo {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// One value of the configuration and where it came from; answer to `config.get` is a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConfigValue {
    /// Its path, as `routing.mode`.
    pub key: String,
    /// The value.
    pub value: serde_json::Value,
    /// `default`, `file NAME`, `env NAME` or `flag`.
    pub source: String,
}
