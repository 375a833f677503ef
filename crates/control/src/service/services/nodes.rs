//! Nodes: their zones and addresses.

use crate::resource::Node;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

/// The label of a node that names its zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// What is known of the nodes.
#[derive(Clone, Debug, Default)]
pub struct Nodes {
    nodes: BTreeMap<String, Known>,
    /// What Cirri knows by itself.
    given: BTreeMap<String, Vec<IpAddr>>,
    /// This node's addresses, by settings.
    own: BTreeSet<IpAddr>,
    /// How many nodes have an address.
    addresses: HashMap<IpAddr, usize>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Known {
    zone: Option<String>,
    addresses: Vec<IpAddr>,
}

/// What a change of a node means.
#[derive(Debug, Default)]
pub struct NodeChange {
    /// Its zone is another.
    pub zone: bool,
    /// Addresses that it got or lost.
    pub addresses: Vec<IpAddr>,
}

impl Nodes {
    /// This node's addresses.
    pub fn set_own(&mut self, addresses: &[IpAddr]) {
        self.own = addresses.iter().copied().collect();
    }

    /// A node as it is now; `None`: it is gone.
    pub fn set(&mut self, name: &str, node: Option<&Node>) -> NodeChange {
        let now = node.map(known).unwrap_or_default();
        let old = match node {
            Some(_) => self.nodes.insert(name.into(), now.clone()),
            None => self.nodes.remove(name),
        };
        let old = old.unwrap_or_default();
        NodeChange { zone: old.zone != now.zone, addresses: self.count(&old.addresses, &now.addresses) }
    }

    /// The addresses of a node besides what its resource says; none: not any more. Answers those that it
    /// got or lost.
    pub fn give(&mut self, name: &str, now: &[IpAddr]) -> Vec<IpAddr> {
        let old = match now {
            [] => self.given.remove(name),
            _ => self.given.insert(name.into(), now.to_vec()),
        };
        self.count(&old.unwrap_or_default(), now)
    }

    /// Counts who has which address. Answers those that came or went.
    fn count(&mut self, old: &[IpAddr], now: &[IpAddr]) -> Vec<IpAddr> {
        for address in now {
            *self.addresses.entry(*address).or_default() += 1;
        }
        for address in old {
            if let Some(count) = self.addresses.get_mut(address) {
                *count -= 1;
                if *count == 0 {
                    self.addresses.remove(address);
                }
            }
        }
        let lost = old.iter().filter(|address| !now.contains(address));
        lost.chain(now.iter().filter(|address| !old.contains(address))).copied().collect()
    }

    /// The zone of a node.
    pub fn zone(&self, node: &str) -> Option<&str> {
        self.nodes.get(node)?.zone.as_deref()
    }

    /// The addresses of a node.
    pub fn addresses(&self, node: &str) -> &[IpAddr] {
        self.nodes.get(node).map_or(&[], |known| &known.addresses)
    }

    /// Whether an address is this node's.
    pub fn is_own(&self, address: IpAddr) -> bool {
        self.own.contains(&address)
    }

    /// Whether an address is any node's.
    pub fn is_node(&self, address: IpAddr) -> bool {
        self.own.contains(&address) || self.addresses.contains_key(&address)
    }
}

fn known(node: &Node) -> Known {
    let mut addresses: Vec<IpAddr> = Vec::new();
    // The address inside the cluster is the one that pods of the node are reached at.
    for kind in ["InternalIP", "ExternalIP"] {
        let of_kind = node.status.addresses.iter().filter(|address| address.kind == kind);
        for address in of_kind.filter_map(|address| address.address.parse().ok()) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    Known { zone: node.metadata.labels.get(ZONE_LABEL).cloned(), addresses }
}
