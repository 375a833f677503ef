//! What ADD asks for, checked before anything changes.

use std::net::IpAddr;

use cirri_abi::GATEWAY_MAC;
use cirri_control::ipam::{IpamError, Pool};
use cirri_control::resource::{dns_label, dns_subdomain};
use cirri_loader::net::{Namespace, NetError};

use super::core::Core;
use super::endpoint::Endpoint;
use crate::api::{ApiError, Attachment, EndpointAdd};
use crate::workload;

/// What ADD asks for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The attachment.
    pub attachment: Attachment,
    /// Path of the network namespace.
    pub netns: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Its UID; empty if the runtime does not say it.
    pub pod_uid: String,
    /// Ethernet address, if it must be this one.
    pub mac: Option<[u8; 6]>,
    /// IPv4 address, if it must be this one.
    pub v4: Option<IpAddr>,
    /// IPv6 address, if it must be this one.
    pub v6: Option<IpAddr>,
    /// Whether GC may take it away.
    pub gc: bool,
}

/// The container's network namespace.
#[derive(Debug)]
pub struct Place {
    /// The namespace.
    pub inside: Namespace,
    /// The kernel's number of it.
    pub cookie: u64,
}

impl Wanted {
    /// Reads what a runtime asks for.
    ///
    /// # Errors
    /// `bad-name`, `bad-mac`, `bad-address`: what cannot be what it is said to be.
    pub fn of(asked: &EndpointAdd) -> Result<Wanted, ApiError> {
        let bad = |code: &str, message: String| ApiError::new(code, message);
        let named = |what: &str, name: &str, rule: Result<(), &str>| {
            rule.map_err(|rule| {
                bad("bad-name", format!("CNI_ARGS: {what} `{}` {rule}", shown(name)))
                    .hint("give the container a name that a pod can have")
            })
        };
        named("K8S_POD_NAMESPACE", &asked.namespace, dns_label(&asked.namespace))?;
        // A name that the plugin made up is the beginning of the container's id; there is no pod of that name.
        let made_up = !asked.pod_named && !asked.pod.is_empty() && asked.container_id.starts_with(&asked.pod);
        if !made_up {
            named("K8S_POD_NAME", &asked.pod, dns_subdomain(&asked.pod))?;
        }
        let mac = match &asked.mac {
            None => None,
            Some(text) => {
                let mac = workload::parse_mac(text).filter(|mac| *mac != GATEWAY_MAC);
                let refused =
                    || bad("bad-mac", format!("`{}` is no Ethernet address that a container can have", shown(text)));
                Some(mac.ok_or_else(refused)?)
            }
        };
        let (mut v4, mut v6) = (None, None);
        for ip in &asked.addresses {
            let family = if ip.is_ipv4() { &mut v4 } else { &mut v6 };
            match family.replace(*ip) {
                Some(other) if other != *ip => {
                    return Err(bad("bad-address", format!("both {other} and {ip} are asked for"))
                        .hint("a container gets one address of each family"));
                }
                _ => {}
            }
        }
        Ok(Wanted {
            attachment: asked.attachment(),
            netns: asked.netns.clone(),
            namespace: asked.namespace.clone(),
            pod: asked.pod.clone(),
            pod_uid: asked.pod_uid.clone(),
            mac,
            v4,
            v6,
            gc: asked.gc,
        })
    }

    /// Opens the container's namespace.
    ///
    /// # Errors
    /// `bad-netns`: it is none, or the node's own, or another container's.
    pub fn place(&self, core: &Core) -> Result<Place, ApiError> {
        let bad = |error: NetError| {
            ApiError::new("bad-netns", error).hint("the runtime must create the network namespace before ADD")
        };
        let inside = Namespace::open(&self.netns).map_err(bad)?;
        // By what they are: there are many paths to one namespace. Where /proc does not show the machine's
        // first process there is nothing to compare with, and nothing to reach by its path either.
        let of_node = inside.is_same(core.net.namespace()).map_err(bad)?
            || Namespace::of_init().and_then(|machine| inside.is_same(&machine)).unwrap_or(false);
        if of_node {
            return Err(ApiError::new("bad-netns", format!("{} is the node's own network namespace", self.netns))
                .hint("a container with the node's network is not attached; make it a namespace of its own"));
        }
        let cookie = inside.cookie().map_err(bad)?;
        let others = |endpoint: &&Endpoint| {
            endpoint.netns_cookie == cookie && endpoint.attachment.container_id != self.attachment.container_id
        };
        if let Some(other) = core.endpoints.values().find(others) {
            let Endpoint { namespace, pod, attachment, .. } = other;
            let text = format!(
                "{} is the network namespace of {namespace}/{pod} (container {})",
                self.netns, attachment.container_id
            );
            return Err(ApiError::new("bad-netns", text).hint("delete that container first"));
        }
        Ok(Place { inside, cookie })
    }

    /// Whether an attachment that is there already is what is asked for.
    ///
    /// # Errors
    /// `conflict`: it is of another pod, or has other addresses.
    pub fn agrees_with(&self, endpoint: &Endpoint) -> Result<(), ApiError> {
        let Endpoint { namespace, pod, pod_uid, .. } = endpoint;
        let other_uid = ![pod_uid, &self.pod_uid].iter().any(|uid| uid.is_empty()) && *pod_uid != self.pod_uid;
        if (namespace, pod) != (&self.namespace, &self.pod) || other_uid {
            // Who it is decides which policies hold.
            let uid = if other_uid { format!(" (UID {})", shown(pod_uid)) } else { String::new() };
            let text = format!("it is attached already as {namespace}/{pod}{uid}");
            return Err(ApiError::new("conflict", text).hint("delete it first"));
        }
        let same = self.mac.is_none_or(|mac| mac == endpoint.mac)
            && [self.v4, self.v6].into_iter().flatten().all(|ip| endpoint.addresses().any(|has| has == ip));
        if same {
            return Ok(());
        }
        let has: Vec<String> = endpoint.addresses().map(|ip| ip.to_string()).collect();
        let text = format!("it is attached already, with {} and {}", has.join(", "), workload::mac_text(endpoint.mac));
        Err(ApiError::new("conflict", text).hint("delete it first"))
    }

    /// Takes its addresses out of the node's ranges: those asked for, else the next free ones. Only all or none.
    ///
    /// # Errors
    /// `exhausted`: none is free. `conflict`: the one asked for is another's. `bad-address`: it is in none of the
    /// node's ranges.
    pub fn take_addresses(&self, core: &mut Core) -> Result<Vec<IpAddr>, ApiError> {
        let ranges: Vec<String> = core.pools.iter().map(|pool| pool.cidr().to_string()).collect();
        let fits = |ip: &IpAddr| core.pools.iter().any(|pool| pool.cidr().contains(ip));
        if let Some(stranger) = [self.v4, self.v6].iter().flatten().find(|ip| !fits(ip)) {
            let text = format!("{stranger} is in none of this node's ranges ({})", ranges.join(", "));
            return Err(ApiError::new("bad-address", text).hint("ask for one of theirs, or for none"));
        }
        let mut taken = Vec::new();
        for index in 0..core.pools.len() {
            let wanted = if core.pools[index].cidr().addr().is_ipv4() { self.v4 } else { self.v6 };
            match take(&mut core.pools[index], wanted) {
                Ok(ip) => taken.push(ip),
                Err(error) => {
                    core.release(&taken);
                    return Err(core.refusal(error));
                }
            }
        }
        core.save_turns();
        Ok(taken)
    }

    /// The Ethernet address of its device.
    ///
    /// # Errors
    /// `conflict`: the one asked for is another's.
    pub fn choose_mac(&self, core: &Core) -> Result<[u8; 6], ApiError> {
        let Some(mac) = self.mac else { return Ok(workload::default_mac(&self.attachment)) };
        match core.endpoints.values().find(|endpoint| endpoint.mac == mac) {
            None => Ok(mac),
            Some(Endpoint { namespace, pod, .. }) => {
                let text = format!("{} is the Ethernet address of {namespace}/{pod}", workload::mac_text(mac));
                Err(ApiError::new("conflict", text).hint("ask for another, or for none"))
            }
        }
    }
}

impl Core {
    /// Why an address is not given.
    fn refusal(&self, error: IpamError) -> ApiError {
        match error {
            IpamError::InUse { address } => {
                let owner = self.endpoint_at(address);
                let owner = owner.map(|owner| format!(" by {}/{}", owner.namespace, owner.pod)).unwrap_or_default();
                ApiError::new("conflict", format!("{address} is in use{owner}")).hint("ask for another, or for none")
            }
            IpamError::Outside { address, cidr } => {
                ApiError::new("bad-address", format!("{address} is not an address that {cidr} gives out"))
                    .hint("ask for another, or for none")
            }
            other => ApiError::new("exhausted", other),
        }
    }
}

fn take(pool: &mut Pool, wanted: Option<IpAddr>) -> Result<IpAddr, IpamError> {
    match wanted {
        Some(ip) => pool.reserve(ip).map(|()| ip),
        None => pool.allocate(),
    }
}

/// As much of a stranger's text as an error needs.
fn shown(text: &str) -> String {
    const MOST: usize = 100;
    text.chars().take(MOST).flat_map(char::escape_debug).collect()
}
