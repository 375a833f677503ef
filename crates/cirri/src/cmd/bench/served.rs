//! Services to measure with: a lane of addresses for each kind of forwarding, and ten thousand other
//! services beside them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use cirri_abi::{
    Addr, Algorithm, Backend, BackendState, Forwarding, Port, Service, ServiceKey, ServiceSlot, epoch_slot, proto,
    service_flag,
};
use cirri_loader::Tables;

use super::ground::{Ground, NODE};

/// One service for each family, at [`PORTS`] ports of one address, so that flows which differ in both
/// ports are all of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lane {
    /// From 1; no two cases that make new flows share one.
    pub number: u8,
    /// [`Forwarding`].
    pub forwarding: u8,
    pub behind: Behind,
}

/// Who serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Behind {
    /// [`REMOTES`] workloads of the peer, at a cluster or an external address.
    Peer,
    /// A workload of this node that pods may reach.
    Server,
    /// A workload of this node that anybody may reach, behind a port of the node.
    NodePort,
}

/// Ports of a lane's address. Each has room for 16,384 flows.
pub const PORTS: u16 = 128;
/// The port that every backend listens on.
pub const BACKEND_PORT: u16 = 8080;
/// Backends of the peer.
pub const REMOTES: u8 = 64;
/// The port of [`others`].
pub const OTHER_PORT: u16 = 80;
/// Services that nobody asks for, with ten backends each.
const OTHERS: u32 = 10_000;
const OTHERS_FIRST: u32 = 20_000;

const fn lane(number: u8, forwarding: u8, behind: Behind) -> Lane {
    Lane { number, forwarding, behind }
}

pub const SNAT: Lane = lane(1, Forwarding::SNAT, Behind::Peer);
pub const OPTION: Lane = lane(2, Forwarding::DSR_OPTION, Behind::Peer);
pub const IPIP: Lane = lane(3, Forwarding::DSR_IPIP, Behind::Peer);
pub const NEAR: Lane = lane(4, Forwarding::SNAT, Behind::Server);
pub const FAR: Lane = lane(5, Forwarding::SNAT, Behind::Peer);
pub const NODE_PORT: Lane = lane(6, Forwarding::SNAT, Behind::NodePort);
pub const NEW_SNAT: Lane = lane(7, Forwarding::SNAT, Behind::Peer);
pub const NEW_OPTION: Lane = lane(8, Forwarding::DSR_OPTION, Behind::Peer);
pub const NEW_IPIP: Lane = lane(9, Forwarding::DSR_IPIP, Behind::Peer);
pub const NEW_SNAT_TC: Lane = lane(10, Forwarding::SNAT, Behind::Peer);
pub const NEW_OPTION_TC: Lane = lane(11, Forwarding::DSR_OPTION, Behind::Peer);
pub const NEW_IPIP_TC: Lane = lane(12, Forwarding::DSR_IPIP, Behind::Peer);
pub const NEW_NEAR: Lane = lane(13, Forwarding::SNAT, Behind::Server);
pub const NEW_FAR: Lane = lane(14, Forwarding::SNAT, Behind::Peer);
pub const NEW_NODE_PORT: Lane = lane(15, Forwarding::SNAT, Behind::NodePort);

const ALL: [Lane; 15] = [
    SNAT,
    OPTION,
    IPIP,
    NEAR,
    FAR,
    NODE_PORT,
    NEW_SNAT,
    NEW_OPTION,
    NEW_IPIP,
    NEW_SNAT_TC,
    NEW_OPTION_TC,
    NEW_IPIP_TC,
    NEW_NEAR,
    NEW_FAR,
    NEW_NODE_PORT,
];

impl Lane {
    /// Where clients send.
    pub fn address(self, v6: bool) -> IpAddr {
        match (self.behind, v6) {
            (Behind::NodePort, _) => NODE.of(v6),
            (_, false) => Ipv4Addr::new(203, 0, 113, self.number).into(),
            (_, true) => Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, self.number.into()).into(),
        }
    }

    /// The first of its ports.
    pub fn port(self) -> u16 {
        match self.behind {
            Behind::NodePort => 30_000 + u16::from(self.number) * PORTS,
            _ => 8080,
        }
    }

    /// Who serves.
    pub fn backends(self, ground: &Ground, v6: bool) -> Vec<IpAddr> {
        match self.behind {
            Behind::Peer => (0..REMOTES).map(|n| remote(n, v6)).collect(),
            Behind::Server => vec![ground.server.at.of(v6)],
            Behind::NodePort => vec![ground.open.at.of(v6)],
        }
    }

    fn id(self, v6: bool) -> u32 {
        u32::from(self.number) * 2 + u32::from(v6)
    }

    /// First number of its backends, and of its slots.
    fn first(self, v6: bool) -> u32 {
        self.id(v6) * u32::from(REMOTES)
    }
}

/// A workload of the peer that serves.
pub fn remote(number: u8, v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0x100 + u16::from(number)).into()
    } else {
        Ipv4Addr::new(10, 244, 1, 64 + number).into()
    }
}

/// Fills the tables of services as an agent would.
pub fn fill(ground: &Ground, tables: &Tables) -> Result<()> {
    for lane in ALL {
        for v6 in [false, true] {
            fill_lane(ground, tables, lane, v6)?;
        }
    }
    others(tables, OTHERS, proto::TCP)
}

fn fill_lane(ground: &Ground, tables: &Tables, lane: Lane, v6: bool) -> Result<()> {
    let (id, first) = (lane.id(v6), lane.first(v6));
    let backends: Vec<(u32, Backend)> =
        (first..).zip(lane.backends(ground, v6)).map(|(number, ip)| (number, backend(ip, id))).collect();
    let slots: Vec<(u32, ServiceSlot)> =
        backends.iter().map(|(number, _)| (*number, ServiceSlot { backend: *number })).collect();
    tables.backends.put_all(&backends)?;
    tables.slots.put_all(&slots)?;
    let service = service(id, first, backends.len() as u32, lane.forwarding);
    let node_port = lane.behind == Behind::NodePort;
    let addr = match (node_port, v6) {
        (false, _) => Addr::from(lane.address(v6)),
        (true, false) => Addr::ANY_V4,
        (true, true) => Addr::UNSPECIFIED,
    };
    let key = |port: u16, proto: u8| ServiceKey { addr, port: Port::new(port), proto, ..ServiceKey::default() };
    let ports = lane.port()..lane.port() + PORTS;
    let mut rows: Vec<(ServiceKey, Service)> = ports.clone().map(|port| (key(port, proto::TCP), service)).collect();
    if node_port {
        for port in ports {
            let word = u32::from(port / 64);
            let bits = tables.node_ports.get(&word)?.unwrap_or_default();
            tables.node_ports.put(&word, &(bits | 1 << (port % 64)))?;
        }
    } else {
        rows.push((key(0, 0), Service { flags: service_flag::REFUSE, ..service }));
    }
    Ok(tables.services.put_all(&rows)?)
}

/// Where one of [`others`] is.
pub fn other(n: u32) -> IpAddr {
    let [.., high, low] = n.to_be_bytes();
    Ipv4Addr::new(10, 96, high, low).into()
}

/// So many services of a protocol, with ten backends each.
pub fn others(tables: &Tables, count: u32, protocol: u8) -> Result<()> {
    let (mut rows, mut backends, mut slots) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..count {
        let (id, first) = (OTHERS_FIRST + n, OTHERS_FIRST + n * 10);
        let port = Port::new(OTHER_PORT);
        let key = ServiceKey { addr: other(n).into(), port, proto: protocol, ..ServiceKey::default() };
        rows.push((key, service(id, first, 10, Forwarding::SNAT)));
        for number in first..first + 10 {
            let [.., high, low] = number.to_be_bytes();
            let ip = Ipv4Addr::new(10, 245, high, low).into();
            backends.push((number, Backend { proto: protocol, ..backend(ip, id) }));
            slots.push((number, ServiceSlot { backend: number }));
        }
    }
    tables.backends.put_all(&backends)?;
    tables.slots.put_all(&slots)?;
    Ok(tables.services.put_all(&rows)?)
}

/// A backend that takes connections.
pub fn backend(ip: IpAddr, service: u32) -> Backend {
    Backend {
        addr: ip.into(),
        port: Port::new(BACKEND_PORT),
        proto: proto::TCP,
        state: BackendState::ACTIVE,
        service,
        ..Backend::default()
    }
}

/// A service with one set of backends for everybody.
pub fn service(id: u32, first: u32, count: u32, forwarding: u8) -> Service {
    Service {
        id,
        inside_first: first,
        inside_count: count,
        outside_first: first,
        outside_count: count,
        slot: epoch_slot::FIRST_SERVICE + (id % 1000) as u16,
        algorithm: Algorithm::RANDOM,
        forwarding,
        ..Service::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_share_neither_numbers_nor_backends_with_others() {
        for (n, lane) in (1..).zip(ALL) {
            assert_eq!(lane.number, n);
            assert!(lane.first(true) + u32::from(REMOTES) <= OTHERS_FIRST);
            assert!(lane.port().checked_add(PORTS).is_some());
        }
    }
}
