//! Who a packet is from or for.

use crate::layout::plain;

plain! {
    /// The number that stands for a set of labels.
    ///
    /// Laid out as Cilium does (its contract C1): bits 0-15 the number, 16-23 the cluster, the top
    /// byte the scope (0 cluster-wide or reserved, 1 a CIDR block known to this node only).
    /// 24 bits travel between nodes, as the VNI of the overlay.
    pub struct Identity = 4 {
        /// The number.
        pub id: u32,
    }
}

impl Identity {
    /// Not known (yet). No policy allows it by name.
    pub const UNKNOWN: Identity = Identity { id: 0 };
    /// The node that the packet path runs on.
    pub const HOST: Identity = Identity { id: 1 };
    /// Outside the cluster, either family.
    pub const WORLD: Identity = Identity { id: 2 };
    /// In a pod range, but no workload that Cirri manages (or not known yet).
    pub const UNMANAGED: Identity = Identity { id: 3 };
    /// A node's health endpoint.
    pub const HEALTH: Identity = Identity { id: 4 };
    /// A workload whose labels are not known yet.
    pub const INIT: Identity = Identity { id: 5 };
    /// Any other node of the cluster.
    pub const REMOTE_NODE: Identity = Identity { id: 6 };
    /// The Kubernetes API server.
    pub const KUBE_APISERVER: Identity = Identity { id: 7 };
    /// The ingress proxy.
    pub const INGRESS: Identity = Identity { id: 8 };
    /// Outside the cluster, IPv4, on a node with both families.
    pub const WORLD_IPV4: Identity = Identity { id: 9 };
    /// Outside the cluster, IPv6, on a node with both families.
    pub const WORLD_IPV6: Identity = Identity { id: 10 };

    /// First number given to a set of labels.
    pub const MIN_ALLOCATED: u32 = 256;
    /// Last number given to a set of labels in cluster 0.
    pub const MAX_ALLOCATED: u32 = 65_535;
    /// First number given to a CIDR block of policy ([`crate::Ipcache::block`]); node-local.
    pub const MIN_BLOCK: u32 = 0x0100_0001;
    /// Last number given to a CIDR block of policy.
    pub const MAX_BLOCK: u32 = 0x01ff_ffff;

    /// The name of a reserved identity, as in the label `reserved:NAME`.
    pub const fn reserved_name(self) -> Option<&'static str> {
        Some(match self.id {
            0 => "unknown",
            1 => "host",
            2 => "world",
            3 => "unmanaged",
            4 => "health",
            5 => "init",
            6 => "remote-node",
            7 => "kube-apiserver",
            8 => "ingress",
            9 => "world-ipv4",
            10 => "world-ipv6",
            _ => return None,
        })
    }
}

impl core::fmt::Display for Identity {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.reserved_name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{}", self.id),
        }
    }
}
