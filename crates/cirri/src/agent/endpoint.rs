//! Workloads of this node, and the files that let them outlive the agent.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use cirri_abi::{Addr, Identity};
use serde::{Deserialize, Serialize};

use crate::api::Attachment;
use crate::files;

/// A workload of this node. One small file each, so that a restart finds them.
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
    /// Its identity.
    pub identity: u32,
    /// What the identity stands for: the canonical line.
    pub labels: String,
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
    /// Whether GC may take it away.
    #[serde(default)]
    pub gc: bool,
    /// Slot of its rule set.
    pub ruleset: u16,
    /// How long attaching took, milliseconds.
    pub ready_ms: f64,
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

impl Endpoint {
    /// Its addresses, IPv4 first.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }

    /// Its identity.
    pub fn identity(&self) -> Identity {
        Identity { id: self.identity }
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
            _pad: [0; 5],
            v4: self.v4.map_or(Addr::UNSPECIFIED, |v4| Addr::v4(v4.octets())),
            v6: self.v6.map_or(Addr::UNSPECIFIED, |v6| Addr::v6(v6.octets())),
        }
    }

    /// Writes its file.
    ///
    /// # Errors
    /// The file system's; the old file stays.
    pub fn save(&self, state_dir: &Path) -> io::Result<()> {
        files::write_atomic(&path(state_dir, self.id), &serde_json::to_vec_pretty(self)?)
    }

    /// Removes its file.
    ///
    /// # Errors
    /// The file system's.
    pub fn forget(&self, state_dir: &Path) -> io::Result<()> {
        files::remove(&path(state_dir, self.id))
    }
}

/// Every endpoint that has a file. One that cannot be read is left where it is and warned about.
///
/// # Errors
/// The directory cannot be read.
pub fn load_all(state_dir: &Path) -> io::Result<Vec<Endpoint>> {
    let mut endpoints = Vec::new();
    for (path, text) in files::read_all(&state_dir.join("endpoints"))? {
        match serde_json::from_slice::<Endpoint>(&text) {
            Ok(endpoint) => endpoints.push(endpoint),
            Err(error) => tracing::warn!(path = %path.display(), %error, "an endpoint's file cannot be read"),
        }
    }
    endpoints.sort_by_key(|endpoint| endpoint.id);
    Ok(endpoints)
}

fn path(state_dir: &Path, id: u16) -> PathBuf {
    state_dir.join("endpoints").join(format!("{id}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_an_earlier_version_is_read() {
        let text = r#"{"id":3,"container_id":"c","ifname":"eth0","netns":"/run/netns/x","namespace":"shop","pod":"web",
            "identity":300,"labels":"k8s:app=web","mac":[2,0,0,0,0,1],"v4":"10.244.0.5","v6":null,
            "host_ifname":"lxc1","ifindex":9,"ruleset":1,"ready_ms":1.5}"#;
        let endpoint: Endpoint = serde_json::from_str(text).unwrap();
        assert_eq!(endpoint.attachment.network, "", "of no network that GC could be asked for");
        assert!(endpoint.has_default.v4 && !endpoint.gc);
    }

    #[test]
    fn an_endpoint_survives_in_its_file_and_a_broken_file_harms_nobody() {
        let dir = std::env::temp_dir().join(format!("cirri-endpoints-{}", std::process::id()));
        let endpoint = Endpoint {
            id: 3,
            attachment: Attachment { network: "n".into(), container_id: "c".into(), ifname: "eth0".into() },
            netns: "/run/netns/x".into(),
            netns_cookie: 77,
            namespace: "shop".into(),
            pod: "web".into(),
            identity: 300,
            labels: "k8s:app=web".into(),
            mac: [2, 0, 0, 0, 0, 1],
            v4: Some([10, 244, 0, 5].into()),
            v6: None,
            host_ifname: "lxc1".into(),
            ifindex: 9,
            mtu: 1450,
            has_default: HasDefault { v4: true, v6: false },
            gc: true,
            ruleset: 1,
            ready_ms: 1.5,
        };
        endpoint.save(&dir).unwrap();
        files::write_atomic(&dir.join("endpoints/4.json"), b"{").unwrap();
        assert_eq!(load_all(&dir).unwrap(), std::slice::from_ref(&endpoint));
        endpoint.forget(&dir).unwrap();
        assert!(load_all(&dir).unwrap().is_empty());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
