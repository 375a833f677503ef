//! Workloads of this node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cirri_abi::{Addr, Identity};
use cirri_control::resource::{Namespace, Pod, Resource};
use serde::{Deserialize, Serialize};

use crate::api::Attachment;

/// A workload of this node. Each is written down ([`super::ledger`]), so that a restart finds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Number on this node.
    pub id: u16,
    /// The runtime's name for the container, and the device inside.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// Path of its network namespace when it was attached.
    pub netns: String,
    /// The kernel's number of that; 0 if not known.
    #[serde(default)]
    pub netns_cookie: u64,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Its UID; empty as long as nobody said it.
    #[serde(default)]
    pub pod_uid: String,
    /// Its identity.
    pub identity: u32,
    /// Who other nodes are told that it is, as long as they may not know its identity; 0: that.
    #[serde(default)]
    pub tunnel_identity: u32,
    /// Who it is: the canonical line. What the identity stands for, unless it is unnumbered.
    pub labels: String,
    /// Whether its labels have no number (yet). Then the identity is that of its former labels.
    #[serde(default)]
    pub unnumbered: bool,
    /// Ethernet address inside.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Option<Ipv6Addr>,
    /// The node's side of its device.
    pub host_ifname: String,
    /// Index of that device; 0 until it is made.
    pub ifindex: u32,
    /// Largest packet, bytes; 0 if not known.
    #[serde(default)]
    pub mtu: u32,
    /// Which of the container's default routes lead by its device.
    #[serde(default)]
    pub has_default: HasDefault,
    /// Which of them ADD's answer named. What was named, and is not in the result of the whole chain, a later plugin
    /// took away.
    #[serde(default)]
    pub answered: HasDefault,
    /// Whether it was looked what later plugins of the chain have made otherwise in the container.
    #[serde(default)]
    pub chain_noted: bool,
    /// What that was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chained: Vec<String>,
    /// Whether GC may take it away.
    #[serde(default)]
    pub gc: bool,
    /// Slot of its rule set; 0: none is left, and nothing passes.
    pub ruleset: u16,
    /// How long attaching took, milliseconds.
    pub ready_ms: f64,
    /// Where its labels come from.
    #[serde(default)]
    pub seen: Seen,
}

/// What the store said last of a workload's pod and namespace: should it say nothing any more while
/// the workload still runs, this holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(into = "SeenText", try_from = "SeenText")]
pub struct Seen {
    /// The pod, as far as it matters here.
    pub pod: Option<Pod>,
    /// The namespace, likewise.
    pub namespace: Option<Namespace>,
}

/// The same, as it is written.
#[derive(Clone, Default, Serialize, Deserialize)]
struct SeenText {
    #[serde(default)]
    pod: Option<String>,
    #[serde(default)]
    namespace: Option<String>,
}

impl Seen {
    /// Takes in what the store says now; nothing takes nothing away. Whether it differs.
    pub fn update(&mut self, pod: Option<&Pod>, namespace: Option<&Namespace>) -> bool {
        let mut now = self.clone();
        if let Some(pod) = pod {
            let mut pod = pod.clone();
            // Changes often and says nothing about who it is.
            pod.status = Default::default();
            now.pod = Some(pod);
        }
        if let Some(namespace) = namespace {
            now.namespace = Some(namespace.clone());
        }
        let differs = now != *self;
        *self = now;
        differs
    }
}

impl From<Seen> for SeenText {
    fn from(seen: Seen) -> SeenText {
        SeenText {
            pod: seen.pod.map(|pod| Resource::Pod(pod).to_json()),
            namespace: seen.namespace.map(|namespace| Resource::Namespace(namespace).to_json()),
        }
    }
}

impl TryFrom<SeenText> for Seen {
    type Error = String;

    fn try_from(text: SeenText) -> Result<Seen, String> {
        let read = |text: Option<String>| text.map(|text| Resource::from_json(&text)).transpose();
        let pod = match read(text.pod).map_err(|error| error.to_string())? {
            Some(Resource::Pod(pod)) => Some(pod),
            Some(other) => return Err(format!("`seen.pod` is a {}", other.kind())),
            None => None,
        };
        let namespace = match read(text.namespace).map_err(|error| error.to_string())? {
            Some(Resource::Namespace(namespace)) => Some(namespace),
            Some(other) => return Err(format!("`seen.namespace` is a {}", other.kind())),
            None => None,
        };
        Ok(Seen { pod, namespace })
    }
}

/// Families whose default route leads by a device of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HasDefault {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

impl Default for HasDefault {
    /// As an earlier version did it.
    fn default() -> HasDefault {
        HasDefault { v4: true, v6: true }
    }
}

impl HasDefault {
    /// That of the family of an address.
    pub fn get(self, of: IpAddr) -> bool {
        if of.is_ipv4() { self.v4 } else { self.v6 }
    }

    /// The same, to be changed.
    pub fn set(&mut self, of: IpAddr, has: bool) {
        *(if of.is_ipv4() { &mut self.v4 } else { &mut self.v6 }) = has;
    }
}

/// Annotation of the Pod that mirrors one which a node's kubelet runs by itself: what the kubelet calls its UID.
const STATIC_UID: &str = "kubernetes.io/config.hash";

/// Whether a Pod is the one that runs on this node with that UID (empty: not known). Another may have its name,
/// before and after it, and here or elsewhere: a container keeps its labels while it runs.
pub fn is_meant(pod: &Pod, uid: &str, node: &str) -> bool {
    match &pod.metadata.uid {
        Some(theirs) if !uid.is_empty() => {
            theirs == uid || pod.metadata.annotations.get(STATIC_UID).is_some_and(|config| config == uid)
        }
        _ => pod.spec.node_name.as_deref().is_none_or(|on| on == node),
    }
}

impl Endpoint {
    /// Its addresses, IPv4 first.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }

    /// Its identity.
    pub fn identity(&self) -> Identity {
        Identity { id: self.identity }
    }

    /// Whose rule set it has, as a key of slots: that of its identity, or its own while it is unnumbered.
    pub fn ruleset_of(&self) -> u32 {
        if self.unnumbered { Identity::MAX_ALLOCATED + 1 + u32::from(self.id) } else { self.identity }
    }

    /// Whether a Pod of the store with its name is its own: see [`is_meant`].
    pub fn is_of(&self, pod: &Pod, node: &str) -> bool {
        is_meant(pod, &self.pod_uid, node)
    }

    /// Takes in what the store says of its pod and namespace now: see [`Seen::update`]. Whether anything differs.
    pub fn remember(&mut self, pod: Option<&Pod>, namespace: Option<&Namespace>) -> bool {
        let mut differs = self.seen.update(pod, namespace);
        if let Some(uid) = pod.and_then(|pod| pod.metadata.uid.as_ref()).filter(|_| self.pod_uid.is_empty()) {
            self.pod_uid.clone_from(uid);
            differs = true;
        }
        differs
    }

    /// As the packet path knows it.
    pub fn row(&self) -> cirri_abi::Endpoint {
        cirri_abi::Endpoint {
            ifindex: self.ifindex,
            identity: self.identity(),
            id: self.id,
            ruleset: self.ruleset,
            mac: self.mac,
            flags: 0,
            _pad: 0,
            tunnel_identity: Identity { id: self.tunnel_identity },
            v4: self.v4.map_or(Addr::UNSPECIFIED, |v4| Addr::v4(v4.octets())),
            v6: self.v6.map_or(Addr::UNSPECIFIED, |v6| Addr::v6(v6.octets())),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    #[test]
    fn a_pod_is_known_by_its_uid_else_by_its_node() {
        let pod = |uid: &str, node: &str, annotations: &str| {
            let on = if node.is_empty() { String::new() } else { format!(r#""nodeName":"{node}","#) };
            let text = format!(
                r#"{{"apiVersion":"v1","kind":"Pod",
                    "metadata":{{"name":"a","namespace":"s","uid":"{uid}","annotations":{{{annotations}}}}},
                    "spec":{{{on}"containers":[{{"name":"c"}}]}}}}"#
            );
            match Resource::from_json(&text).unwrap() {
                Resource::Pod(pod) => pod,
                other => panic!("{other:?}"),
            }
        };
        let mirror = r#""kubernetes.io/config.hash":"u""#;
        for (pod, uid, meant) in [
            (pod("u", "n", ""), "u", true),
            (pod("u", "other", ""), "u", true),
            (pod("v", "n", ""), "u", false),
            (pod("v", "n", mirror), "u", true),
            (pod("v", "n", mirror), "w", false),
            (pod("", "n", ""), "u", true),
            (pod("", "", ""), "u", true),
            (pod("", "other", ""), "u", false),
            (pod("u", "other", ""), "", false),
            (pod("u", "n", ""), "", true),
        ] {
            assert_eq!(is_meant(&pod, uid, "n"), meant, "{:?} {uid}", pod.metadata);
        }
    }

    /// One as an earlier version wrote it.
    pub fn endpoint() -> Endpoint {
        let text = r#"{"id":3,"container_id":"c","ifname":"eth0","netns":"/run/netns/x","namespace":"shop","pod":"web",
            "identity":300,"labels":"k8s:app=web","mac":[2,0,0,0,0,1],"v4":"10.244.0.5","v6":null,
            "host_ifname":"lxc1","ifindex":9,"ruleset":1,"ready_ms":1.5}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_file_of_an_earlier_version_is_read() {
        let endpoint = endpoint();
        assert_eq!(endpoint.attachment.network, "", "of no network that GC could be asked for");
        assert!(endpoint.has_default.v4 && !endpoint.gc && !endpoint.unnumbered);
    }
}
