//! What agents tell each other through the store, beside resources.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cirri_abi::Identity;
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// `nodes/<name>`, bound to the agent's lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Name of the node.
    pub name: String,
    /// Its IPv4 address, which packets for its workloads are sent to.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Option<Ipv6Addr>,
    /// Its workloads' IPv4 range.
    pub pod_v4: Option<Ipv4Net>,
    /// Its workloads' IPv6 range.
    pub pod_v6: Option<Ipv6Net>,
}

/// `ips/<node>/<ip>`, bound to the agent's lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpRecord {
    /// The address.
    pub ip: IpAddr,
    /// Who is there.
    pub identity: u32,
    /// The node that it is on.
    pub node: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
}

/// `enforced/<node>`, bound to the agent's lease: what the others may rely on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnforcedRecord {
    /// Revision of the newest identity that the node's rule sets in force were made with knowledge of;
    /// so they know every earlier one.
    pub identities: u64,
}

/// `identities/labels/<hash>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityRecord {
    /// The number.
    pub id: u32,
    /// The labels' canonical line.
    pub labels: String,
}

impl IdentityRecord {
    /// Whether it is one that can have been allocated.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), String> {
        if !(Identity::MIN_ALLOCATED..=Identity::MAX_ALLOCATED).contains(&self.id) {
            return Err(format!("identity {} is given to no labels", self.id));
        }
        Ok(())
    }
}

/// The whole key of a node's record.
pub fn node_key(name: &str) -> String {
    format!("{}nodes/{name}", cirri_store::PREFIX)
}

/// The whole key of what a node enforces.
pub fn enforced_key(name: &str) -> String {
    format!("{}enforced/{name}", cirri_store::PREFIX)
}

/// The whole key of an address's record.
pub fn ip_key(node: &str, ip: IpAddr) -> String {
    format!("{}ips/{node}/{ip}", cirri_store::PREFIX)
}

/// Prefix of the records of a node's addresses.
pub fn ip_prefix(node: &str) -> String {
    format!("{}ips/{node}/", cirri_store::PREFIX)
}

/// The whole key of an identity by number.
pub fn identity_key(id: u32) -> String {
    format!("{}identities/id/{id}", cirri_store::PREFIX)
}

/// The whole key of an identity by the hash of its labels.
pub fn labels_key(hash: &str) -> String {
    format!("{}identities/labels/{hash}", cirri_store::PREFIX)
}

/// Prefix of the keys that say which node has which range, `family` being `v4` or `v6`.
pub fn pool_prefix(family: &str) -> String {
    format!("{}pools/{family}/", cirri_store::PREFIX)
}

/// The whole key that a node writes to see what was written before it; bound to its lease.
pub fn caught_up_key(node: &str) -> String {
    format!("{}caught-up/{node}", cirri_store::PREFIX)
}

/// Prefix of the texts of policies that are refused, by namespace and name. An agent saves them for its next start; they
/// are in no store.
pub fn refused_prefix() -> String {
    format!("{}refused/", cirri_store::PREFIX)
}

/// The key of a resource whose text is saved as refused under this one.
pub fn refused_resource(key: &str) -> Option<String> {
    Some(format!("{}NetworkPolicy/{}", resource_prefix(), key.strip_prefix(&refused_prefix())?))
}

/// Prefix of resources.
pub fn resource_prefix() -> String {
    format!("{}resources/", cirri_store::PREFIX)
}
