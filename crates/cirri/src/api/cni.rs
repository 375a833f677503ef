//! What the CNI plugin asks the agent, and what it is answered.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Parameters of `endpoint.add`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointAdd {
    /// Name of the network; empty if the plugin is of a version that does not say it.
    #[serde(default)]
    pub network: String,
    /// The runtime's name for the container.
    pub container_id: String,
    /// Name of the device inside.
    pub ifname: String,
    /// Path of its network namespace.
    pub netns: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Whether the runtime named the pod: then the store must hold it. A name that was made up need not be there.
    #[serde(default)]
    pub pod_named: bool,
    /// UID of the pod, if the runtime says it: a Pod of another is not meant.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod_uid: String,
    /// Ethernet address wanted inside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Addresses wanted, at most one of each family; the node chooses the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Whether GC may take it away: the version of CNI that it is attached by has GC.
    #[serde(default)]
    pub gc: bool,
}

impl EndpointAdd {
    /// The attachment that is asked for.
    pub fn attachment(&self) -> Attachment {
        Attachment {
            network: self.network.clone(),
            container_id: self.container_id.clone(),
            ifname: self.ifname.clone(),
        }
    }
}

/// Answer to `endpoint.add`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EndpointAdded {
    /// Number of the endpoint on its node.
    pub id: u16,
    /// Its identity.
    pub identity: u32,
    /// The node's side of its device.
    pub host_ifname: String,
    /// Ethernet address of the node's side.
    pub host_mac: String,
    /// Ethernet address inside.
    pub mac: String,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// The IPv4 gateway, if it has an IPv4 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_v4: Option<IpAddr>,
    /// The IPv6 gateway, if it has an IPv6 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_v6: Option<IpAddr>,
    /// Whether the container's IPv4 default route leads by this device.
    pub default_v4: bool,
    /// Whether the container's IPv6 default route leads by this device.
    pub default_v6: bool,
    /// From the request to the rules being in force, milliseconds.
    pub ready_ms: f64,
}

/// An address with its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Bits of its prefix.
    pub prefix: u8,
}

/// Names one attachment.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// Name of the network; empty for one that an earlier version attached, which did not ask.
    #[serde(default)]
    pub network: String,
    /// The runtime's name for the container.
    pub container_id: String,
    /// Name of the device inside.
    pub ifname: String,
}

/// Parameters of `endpoint.delete`, and the note of a deletion that the agent did not carry out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointDelete {
    /// The attachment.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// A path of the container's network namespace, if the runtime says one: that of ADD may lead nowhere any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
}

/// Parameters of `endpoint.check`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointCheck {
    /// The attachment.
    pub attachment: Attachment,
    /// Path of the container's network namespace.
    pub netns: String,
    /// What the runtime was told of it; `None`: nothing.
    #[serde(default)]
    pub told: Option<Told>,
}

/// What a runtime was told of an attachment when all plugins of a chain had answered: `prevResult`. A later plugin may
/// have changed what ours made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Told {
    /// Ethernet address of the device inside, if it was told.
    pub mac: Option<String>,
    /// Its largest packet, if it was told: versions before 1.1.0 cannot.
    pub mtu: Option<u32>,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Routes with a router, whoever's: nothing says by which device they lead.
    pub routes: Vec<ToldRoute>,
}

/// A route that a runtime was told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToldRoute {
    /// Where to.
    pub to: Address,
    /// The router.
    pub via: IpAddr,
}

/// Answer to `endpoint.ready`: what would keep the next ADD from working; empty if nothing would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// Each of them.
    pub obstacles: Vec<Obstacle>,
}

/// Something that keeps ADD from working.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Obstacle {
    /// Of what kind.
    pub reason: NotReady,
    /// What is wrong.
    pub found: String,
    /// What to do.
    pub remedy: String,
}

/// Kinds of [`Obstacle`]; lower case with `-` in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NotReady {
    /// The store was not seen whole yet, or the node has no pod range.
    NotJoined,
    /// The store does not answer, and `pods.unseen` refuses what it does not show.
    Store,
    /// No address is free, or no number.
    Exhausted,
    /// An attachment cannot be written down.
    StateDir,
}

/// Parameters of `endpoint.gc`: every attachment of a network that is not named goes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointGc {
    /// Name of the network.
    pub network: String,
    /// What the runtime knows of it.
    pub valid: Vec<ValidAttachment>,
}

/// An attachment that its runtime knows. What else the runtime says of it is passed over: then it names fewer, and
/// more stay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValidAttachment {
    /// The runtime's name for the container.
    #[serde(alias = "containerID")]
    pub container_id: String,
    /// Name of the device inside.
    pub ifname: String,
}

/// Answer to `endpoint.gc` and `endpoint.delete`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Removed {
    /// How many endpoints were removed.
    pub removed: usize,
}
