//! Services: from manifests to the rows that the packet path looks up.
//!
//! Two steps, each incremental. [`Services`] holds resources and answers which [`ServicePort`]s
//! changed: one port of one service in one family, with its addresses, its backends and who of them
//! may be chosen. [`table::Tables`] gives service ports and backends their numbers and answers with
//! [`table::Write`]s, in the order in which they are to be carried out. Whoever has service ports
//! from elsewhere (the load balancer that runs alone) uses the second step only.

pub mod maglev;
mod services;
pub mod table;

pub use services::{HealthCheck, Problem, ServiceName, Services};

use cirri_abi::{Addr, Algorithm, Forwarding, proto};
use ipnet::IpNet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// One port of one service, in one family.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId {
    /// Namespace of the service.
    pub namespace: String,
    /// Name of the service.
    pub service: String,
    /// Name of the port; its number if it has none.
    pub port: String,
    /// IP protocol.
    pub protocol: u8,
    /// IPv6.
    pub v6: bool,
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PortId { namespace, service, port, .. } = self;
        let family = if self.v6 { "IPv6" } else { "IPv4" };
        write!(f, "{namespace}/{service}:{port}/{} ({family})", protocol_name(self.protocol))
    }
}

/// The name of an IP protocol that services have.
pub fn protocol_name(protocol: u8) -> &'static str {
    match protocol {
        proto::TCP => "TCP",
        proto::UDP => "UDP",
        proto::SCTP => "SCTP",
        _ => "unknown",
    }
}

/// Why an address is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrontendKind {
    /// An address inside the cluster.
    ClusterIp,
    /// A port of every node.
    NodePort,
    /// An address for the world.
    LoadBalancer,
    /// An address for the world that the service's owner brings.
    ExternalIp,
    /// A port of this node that a pod asked for.
    HostPort,
}

impl FrontendKind {
    /// The name that people see.
    pub const fn name(self) -> &'static str {
        match self {
            FrontendKind::ClusterIp => "ClusterIP",
            FrontendKind::NodePort => "NodePort",
            FrontendKind::LoadBalancer => "LoadBalancer",
            FrontendKind::ExternalIp => "ExternalIP",
            FrontendKind::HostPort => "HostPort",
        }
    }
}

/// Where a service port is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Frontend {
    /// The address. Unspecified ([`Addr::ANY_V4`], [`Addr::UNSPECIFIED`]): the node's own.
    pub addr: Addr,
    /// The port, host order.
    pub port: u16,
    /// Why.
    pub kind: FrontendKind,
    /// Whether the address is also used for other things than services, as a node's own is: what no
    /// service has there is left alone then, otherwise it is refused.
    pub shared: bool,
}

/// Who serves.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Backend {
    /// Where.
    pub addr: IpAddr,
    /// On which port.
    pub port: u16,
    /// `cirri_abi::BackendState`. Who stands in a set is `ACTIVE`, or `DRAINING` where nobody else is
    /// left.
    pub state: u8,
    /// Share of new connections, relative to the others; 1 unless given, 0: none.
    pub weight: u16,
    /// The node it runs on.
    pub node: Option<Arc<str>>,
    /// The name that people see, such as `shop/web-1`.
    pub name: Option<Arc<str>>,
}

/// What the tables are to hold for one service port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// Whose this is.
    pub id: PortId,
    /// Where it is reached.
    pub frontends: Vec<Frontend>,
    /// Everyone who serves, or keeps what he was given.
    pub backends: Vec<Backend>,
    /// Whom clients inside the cluster may be given: indexes into `backends`.
    pub inside: Vec<usize>,
    /// Whom clients outside may be given: indexes into `backends`.
    pub outside: Vec<usize>,
    /// Whom clients inside the cluster may be given at the service's addresses for the world (its
    /// internal traffic policy does not concern these): indexes into `backends`; `None`: as `inside`.
    pub within: Option<Vec<usize>>,
    /// Whether its cluster addresses are for clients inside only.
    pub inside_only_cluster_ip: bool,
    /// How long a client keeps its backend, seconds; 0: not at all.
    pub affinity: u32,
    /// `cirri_abi::Algorithm`.
    pub algorithm: u8,
    /// Slots of its Maglev table, one of [`maglev::SIZES`]; `None`: by the number of backends.
    pub maglev_size: Option<u32>,
    /// `cirri_abi::Forwarding`.
    pub forwarding: u8,
    /// The pool that translated connections get their source from; 0: the node's own.
    pub pool: u32,
    /// Which clients outside are let in at [`FrontendKind::LoadBalancer`] and
    /// [`FrontendKind::ExternalIp`] addresses; empty: all. Those of the other family match nobody.
    pub ranges: Vec<IpNet>,
    /// Turns `ranges` around: whom they name is kept out.
    pub ranges_deny: bool,
}

impl ServicePort {
    /// A service port with nothing in it yet: random choice, forwarding by SNAT.
    pub fn new(id: PortId) -> ServicePort {
        ServicePort {
            id,
            frontends: Vec::new(),
            backends: Vec::new(),
            inside: Vec::new(),
            outside: Vec::new(),
            within: None,
            inside_only_cluster_ip: true,
            affinity: 0,
            algorithm: Algorithm::RANDOM,
            maglev_size: None,
            forwarding: Forwarding::SNAT,
            pool: 0,
            ranges: Vec::new(),
            ranges_deny: false,
        }
    }
}

/// How connections from outside reach backends on other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// With the node's own source.
    #[default]
    Snat,
    /// With the client's source; the backend's node answers.
    Dsr,
    /// TCP like [`Mode::Dsr`], the rest like [`Mode::Snat`].
    Hybrid,
}

/// How the service's address travels with [`Mode::Dsr`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Dispatch {
    /// In an IP option of the first packets.
    #[default]
    Option,
    /// In IPIP around every packet.
    Ipip,
}

impl Mode {
    /// `cirri_abi::Forwarding` for one protocol.
    pub fn forwarding(self, dispatch: Dispatch, protocol: u8) -> u8 {
        match (self, dispatch) {
            (Mode::Snat, _) => Forwarding::SNAT,
            (Mode::Hybrid, _) if protocol != proto::TCP => Forwarding::SNAT,
            (_, Dispatch::Option) => Forwarding::DSR_OPTION,
            (_, Dispatch::Ipip) => Forwarding::DSR_IPIP,
        }
    }
}

/// What this node's services depend on besides resources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Name of this node.
    pub node: String,
    /// Its addresses: endpoints there are backends of this node even if nothing names theirs.
    pub node_addresses: Vec<IpAddr>,
    /// Ports that NodePort services may have, first and last.
    pub node_ports: (u16, u16),
    /// `cirri_abi::Algorithm` where no annotation chooses.
    pub algorithm: u8,
    /// Forwarding where no annotation chooses.
    pub forwarding: Mode,
    /// How DSR carries the service's address.
    pub dispatch: Dispatch,
    /// Slots of Maglev tables, one of [`maglev::SIZES`]; `None`: by the number of backends, which
    /// then decides when all flows move to a larger table.
    pub maglev_size: Option<u32>,
    /// Whether cluster addresses serve clients outside.
    pub external_cluster_ips: bool,
    /// Whether topology hints are followed.
    pub topology: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            node: String::new(),
            node_addresses: Vec::new(),
            node_ports: (30_000, 32_767),
            algorithm: Algorithm::RANDOM,
            forwarding: Mode::Snat,
            dispatch: Dispatch::Option,
            maglev_size: None,
            external_cluster_ips: false,
            topology: false,
        }
    }
}
