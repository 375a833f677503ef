//! The agent's configuration: one typed YAML file, and where every value came from.
//!
//! Sources, weakest first: defaults, the file, environment variables (`CIRRI_ROUTING_MODE`), the
//! command line (`--set routing.mode=direct`). A key that nobody knows is refused, whichever source
//! it stands in (environment variables are looked up by name, so a misspelt one is never read).

mod load;
mod services;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

pub use load::{ConfigError, Loaded, load};
pub use services::{Acceleration, Algorithm, Dispatch, Forwarding, Services, Socket, SocketMode};

/// Everything that can be set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// This node.
    pub node: Node,
    /// The cluster that it belongs to; the same on all of its nodes.
    pub cluster: Cluster,
    /// How packets reach other nodes.
    pub routing: Routing,
    /// What leaves the cluster under the node's address.
    pub masquerade: Masquerade,
    /// Pods that are attached.
    pub pods: Pods,
    /// Services.
    pub services: Services,
    /// Where the cluster's state lives.
    pub store: Store,
    /// Directory for the agent's socket and what survives a restart.
    pub state_dir: StateDir,
    /// The packet path.
    pub bpf: Bpf,
    /// The flow log.
    pub flows: Flows,
    /// What the agent says.
    pub log: Log,
}

/// This node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Node {
    /// Its name; empty: the host name.
    pub name: String,
    /// Devices that lead to the network; empty: the one that has the node's address.
    pub devices: Vec<String>,
    /// Its IPv4 address; none: the first global one of the device of the default route.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address; none: the first global one of the same device, if there is one.
    pub ipv6: Option<Ipv6Addr>,
    /// Seconds until the addresses of a workload are free again whose network namespace went without DEL.
    pub release_after_seconds: u64,
}

impl Default for Node {
    fn default() -> Node {
        Node { name: String::new(), devices: Vec::new(), ipv4: None, ipv6: None, release_after_seconds: 60 }
    }
}

/// The cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Cluster {
    /// Its name, which stands in identities.
    pub name: String,
    /// Range that the nodes' IPv4 pod ranges are cut from.
    pub pod_cidr_v4: Ipv4Net,
    /// Prefix length of a node's IPv4 pod range.
    pub pod_cidr_v4_per_node: u8,
    /// Range that the nodes' IPv6 pod ranges are cut from.
    pub pod_cidr_v6: Ipv6Net,
    /// Prefix length of a node's IPv6 pod range.
    pub pod_cidr_v6_per_node: u8,
    /// Seconds, 0 to 300, that a workload whose labels changed is known to other nodes by its old identity
    /// at the most, if not all of them have said that they know the new one. With the overlay only.
    pub identity_grace_seconds: u64,
}

impl Cluster {
    /// [`Cluster::identity_grace_seconds`].
    pub fn identity_grace(&self) -> Duration {
        Duration::from_secs(self.identity_grace_seconds)
    }
}

/// How packets reach other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Routing {
    /// The way.
    pub mode: RoutingMode,
}

/// Ways to other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RoutingMode {
    /// VXLAN, UDP 8472.
    #[default]
    Overlay,
    /// Routes to each node's pod range by way of the node.
    Direct,
}

/// What leaves the cluster under the node's address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Masquerade {
    /// IPv4 connections to the world.
    pub ipv4: bool,
    /// IPv6 connections to the world.
    pub ipv6: bool,
    /// Source ports that they get, `FIRST-LAST`; a power of two of them.
    pub ports: PortRange,
}

/// Ports from the first to the last, both included; a power of two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortRange {
    /// First.
    pub first: u16,
    /// Last.
    pub last: u16,
}

/// Pods that are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Pods {
    /// What becomes of one that the store does not show in time.
    pub unseen: Unseen,
    /// Seconds that attaching waits until the agent has seen what the store held when it was asked,
    /// and the pod that the runtime names. 1 to 25: the CNI plugin waits 30.
    pub patience_seconds: u64,
}

/// What becomes of a pod that the store does not show in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unseen {
    /// It is not attached; the runtime tries again.
    #[default]
    Refuse,
    /// It is attached by what is known: its labels as last seen, or its namespace alone.
    Attach,
}

/// Where the cluster's state lives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Store {
    /// Which kind.
    pub kind: StoreKind,
    /// Directory of manifests; with `kind: folder`.
    pub folder: PathBuf,
    /// The etcd cluster; with `kind: etcd`.
    pub etcd: EtcdConfig,
}

/// Kinds of store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// One node: manifests in a directory, the rest in a file of the state directory.
    #[default]
    Folder,
    /// Many nodes: everything in etcd.
    Etcd,
}

/// The etcd cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct EtcdConfig {
    /// Its members, as `http://10.0.0.1:2379`.
    pub endpoints: Vec<String>,
    /// Seconds that the other nodes keep this one and its workloads when its agent is silent. The
    /// packet path works without its agent, so this should outlast any repair.
    pub lease_seconds: u64,
}

/// A directory, `/run/cirri` unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StateDir(pub PathBuf);

/// The packet path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Bpf {
    /// Directory of a bpffs that pins are kept under.
    pub pin_root: PathBuf,
    /// Name of this agent's directory in it; one per agent on a machine.
    pub instance: String,
    /// Sizes of maps that grow with the load, entries; 0: the built-in size.
    pub maps: MapSizes,
}

/// Sizes of maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct MapSizes {
    /// Established IPv4 connections; IPv6 gets half of it.
    pub flows: u32,
    /// Unfinished connections of each family.
    pub pending: u32,
    /// Addresses of the whole cluster.
    pub ipcache: u32,
    /// Addresses and ports that are served.
    pub services: u32,
    /// Backends of all services.
    pub backends: u32,
    /// Places of all services' sets of backends; Maglev takes at least 100 for each backend.
    pub slots: u32,
}

/// The flow log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Flows {
    /// Records kept in memory.
    pub keep: usize,
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,cirri_store=debug`.
    pub level: String,
}

impl Config {
    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.state_dir.0.join("agent.sock")
    }
}

impl Default for Cluster {
    fn default() -> Cluster {
        Cluster {
            name: "default".to_owned(),
            pod_cidr_v4: Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16),
            pod_cidr_v4_per_node: 24,
            pod_cidr_v6: Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0), 48),
            pod_cidr_v6_per_node: 64,
            identity_grace_seconds: 5,
        }
    }
}

impl Default for Masquerade {
    fn default() -> Masquerade {
        Masquerade { ipv4: true, ipv6: true, ports: PortRange { first: 49152, last: 65535 } }
    }
}

impl Default for Pods {
    fn default() -> Pods {
        Pods { unseen: Unseen::default(), patience_seconds: 20 }
    }
}

impl Default for Store {
    fn default() -> Store {
        Store { kind: StoreKind::default(), folder: PathBuf::from("/etc/cirri/manifests"), etcd: EtcdConfig::default() }
    }
}

impl Default for EtcdConfig {
    fn default() -> EtcdConfig {
        EtcdConfig { endpoints: vec!["http://127.0.0.1:2379".to_owned()], lease_seconds: 900 }
    }
}

impl Default for StateDir {
    fn default() -> StateDir {
        StateDir(PathBuf::from("/run/cirri"))
    }
}

impl Default for Bpf {
    fn default() -> Bpf {
        Bpf { pin_root: PathBuf::from("/sys/fs/bpf/cirri"), instance: "default".to_owned(), maps: MapSizes::default() }
    }
}

impl Default for Flows {
    fn default() -> Flows {
        Flows { keep: 8192 }
    }
}

impl Default for Log {
    fn default() -> Log {
        Log { level: "info".to_owned() }
    }
}

impl MapSizes {
    /// What is not left to the built-in sizes, by the names of the maps.
    pub fn by_name(&self) -> BTreeMap<String, u32> {
        let all = [
            ("FLOWS4", self.flows),
            ("FLOWS6", self.flows / 2),
            ("PENDING4", self.pending),
            ("PENDING6", self.pending),
            ("IPCACHE", self.ipcache),
            ("SERVICES", self.services),
            ("BACKENDS", self.backends),
            ("SERVICE_SLOTS", self.slots),
        ];
        all.into_iter().filter(|(_, size)| *size > 0).map(|(name, size)| (name.to_owned(), size)).collect()
    }
}

impl PortRange {
    /// How many ports.
    pub fn count(self) -> u32 {
        u32::from(self.last) - u32::from(self.first) + 1
    }
}

impl TryFrom<String> for PortRange {
    type Error = String;

    fn try_from(text: String) -> Result<PortRange, String> {
        let wrong = || format!("`{text}` is no range of ports; write FIRST-LAST, as 49152-65535");
        let (first, last) = text.split_once('-').ok_or_else(wrong)?;
        let first: u16 = first.trim().parse().map_err(|_| wrong())?;
        let last: u16 = last.trim().parse().map_err(|_| wrong())?;
        if first == 0 || first > last {
            return Err(wrong());
        }
        let range = PortRange { first, last };
        if !range.count().is_power_of_two() {
            return Err(format!(
                "`{text}` holds {} ports; the number must be a power of two, as 49152-65535 (16384) or 32768-65535 (32768)",
                range.count()
            ));
        }
        Ok(range)
    }
}

impl From<PortRange> for String {
    fn from(range: PortRange) -> String {
        format!("{}-{}", range.first, range.last)
    }
}
