//! How services are reached.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Services.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Services {
    /// Translation in the system call.
    pub socket: Socket,
    /// Ports of the nodes' addresses that services may have, `FIRST-LAST`.
    pub node_ports: NodePorts,
    /// How a backend is chosen, unless a service says otherwise.
    pub algorithm: Algorithm,
    /// Places of a Maglev table; 0: the smallest table with 100 places for each backend.
    pub maglev_size: u32,
    /// How connections from outside reach a backend of another node, unless a service says otherwise.
    pub forwarding: Forwarding,
    /// How a backend's node learns which service a connection was for; for direct server return.
    pub dispatch: Dispatch,
    /// Where the node's devices are served.
    pub acceleration: Acceleration,
    /// Whether cluster addresses are served to clients outside the cluster.
    pub external_cluster_ips: bool,
    /// Whether hints of EndpointSlices restrict the choice to backends close by.
    pub topology: bool,
}

/// Translation in the system call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Socket {
    /// Whose.
    pub mode: SocketMode,
    /// Control group (v2) of the programs that are meant; empty: all of the machine.
    pub cgroup: PathBuf,
}

/// Whose system calls are translated; what is not is translated packet by packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SocketMode {
    /// The node's and its pods', but of those that are annotated otherwise.
    #[default]
    All,
    /// The node's own, and those of pods that are annotated for it.
    Host,
    /// Nobody's. The node itself then reaches no service.
    Off,
}

/// Ports from the first to the last, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodePorts {
    /// First.
    pub first: u16,
    /// Last.
    pub last: u16,
}

/// How a backend is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// By a random number.
    #[default]
    Random,
    /// By a hash of the connection; all nodes answer alike.
    Maglev,
}

/// How connections from outside reach a backend of another node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Forwarding {
    /// With this node's address as their source; answers come back this way.
    #[default]
    Snat,
    /// With their own; the backend's node answers the client itself (direct server return).
    Dsr,
    /// TCP with its own source, all else with the node's.
    Hybrid,
}

/// How a backend's node learns which service a connection was for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dispatch {
    /// An IP option of the first packets.
    #[default]
    Option,
    /// Every packet travels in another, IP in IP.
    Ipip,
}

/// Where the node's devices are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Acceleration {
    /// In the traffic control layer alone.
    #[default]
    Off,
    /// In XDP as every device has it: for trying it out.
    Generic,
    /// In XDP in the device's driver; an error where the driver has none.
    Native,
    /// In the driver if it can, else in generic XDP, else in traffic control.
    BestEffort,
}

impl Default for NodePorts {
    fn default() -> NodePorts {
        NodePorts { first: 30_000, last: 32_767 }
    }
}

impl TryFrom<String> for NodePorts {
    type Error = String;

    fn try_from(text: String) -> Result<NodePorts, String> {
        let wrong = || format!("`{text}` is no range of ports; write FIRST-LAST, as 30000-32767");
        let (first, last) = text.split_once('-').ok_or_else(wrong)?;
        let first: u16 = first.trim().parse().map_err(|_| wrong())?;
        let last: u16 = last.trim().parse().map_err(|_| wrong())?;
        if first == 0 || first > last { Err(wrong()) } else { Ok(NodePorts { first, last }) }
    }
}

impl From<NodePorts> for String {
    fn from(ports: NodePorts) -> String {
        format!("{}-{}", ports.first, ports.last)
    }
}
