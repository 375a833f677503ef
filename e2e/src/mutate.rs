//! Malformed packets: valid frames of the fixtures, changed by somebody who knows the formats.
//!
//! The same seed makes the same packets. They meet a small world with policies, in which some
//! connections are open, so that mutations of their packets come near to passing.

use cirri_abi::{
    Algorithm, Backend, Cookie, Forwarding, Hook, Identity, Ipcache, Port, Service, dsr, ipcache_flag, node_flag,
    service_flag,
};
use cirri_datapath::TunnelKey;
use cirri_sim::Frame;
use fastrand::Rng;

use crate::fixtures::{
    A, ANY, B, Change, Devices, EDGE, RULESET_A, RULESET_B, Step, UNWRAP, World, addresses, all, allow, config, deny,
    entry,
};

/// Identity of pod c of node n2.
pub const C: Identity = Identity { id: 500 };

/// Addresses and ports of services, of TCP and UDP: in the cluster only; of nodes; outside with direct return
/// by option; and by IPIP.
pub const FRONTS: [(&str, u16); 4] = [("vip", 80), (ANY, 30080), ("lb", 80), ("lb", 443)];
/// Who serves behind each of them.
pub const BACKENDS: [(&str, u16); 5] = [("b", 8080), ("c", 8080), ("w", 8443), ("n1", 8080), ("a", 80)];

/// Makes packets.
pub struct Mutator {
    rng: Rng,
    devices: Devices,
    corpus: Vec<(u8, Frame)>,
}

/// The tables that packets meet. `ports`: ports of masquerade, a power of two.
///
/// Pod a may speak to b, to c, and to port 443 (TCP) of anybody; it lets b in at port 80 (TCP). Pod b
/// may speak to everybody; it lets a in at port 80 (TCP), c everywhere, and anybody at 8080 (TCP).
///
/// [`FRONTS`] are services, all with the same [`BACKENDS`].
pub fn tables(devices: Devices, ports: u16) -> Vec<Change> {
    let mut tables = World::new(false, devices).tables;
    for v6 in [false, true] {
        let mut world = World { v6, devices, tables: Vec::new() };
        for front in FRONTS {
            world = world.service(front, &BACKENDS, |row| {
                // Chance is not the same on two hosts.
                row.algorithm = Algorithm::MAGLEV;
                match front {
                    ("vip", _) => row.flags |= service_flag::INSIDE_ONLY,
                    ("lb", 80) => row.forwarding = Forwarding::DSR_OPTION,
                    ("lb", _) => row.forwarding = Forwarding::DSR_IPIP,
                    _ => {}
                }
            });
        }
        // Numbers of backends and slots are each family's own.
        tables.extend(world.tables.into_iter().map(|change| if v6 { shifted(change) } else { change }));
    }
    let mut node = config(devices);
    node.flags |= node_flag::HOST_BACKENDS;
    (node.masquerade_first, node.masquerade_mask) = (Port::new(50_000), ports - 1);
    tables.push(Change::Config(node));
    let (ingress, egress) = (0, 1);
    tables.push(Change::Ruleset(
        RULESET_A,
        vec![
            deny(0, egress, 0, Cookie::DEFAULT_DENY),
            allow(B.id, egress, 0, 20),
            allow(C.id, egress, 0, 21),
            allow(0, egress, 443, 22),
            deny(0, ingress, 0, Cookie::DEFAULT_DENY),
            allow(B.id, ingress, 80, 23),
        ],
    ));
    tables.push(Change::Ruleset(
        RULESET_B,
        vec![
            allow(0, egress, 0, Cookie::DEFAULT_ALLOW),
            deny(0, ingress, 0, Cookie::DEFAULT_DENY),
            allow(A.id, ingress, 80, 24),
            allow(C.id, ingress, 0, 25),
            allow(0, ingress, 8080, 26),
        ],
    ));
    // The link's own addresses are nobody's: what leads there depends on the kernel's own routes.
    for net in ["192.168.0.0/24", "fd01::/64", "fe80::/10", "127.0.0.0/8"] {
        let value = Ipcache { flags: ipcache_flag::LOCAL_POOL, ..Ipcache::default() };
        tables.push(entry(net.parse().expect("a network"), value));
    }
    tables
}

/// Moves a service and its backends to numbers that the other family does not use.
fn shifted(change: Change) -> Change {
    match change {
        Change::Backend(number, backend) => {
            Change::Backend(number + 20, Backend { service: backend.service + 2, ..backend })
        }
        Change::Slots(first, backends) => {
            Change::Slots(first + 200, backends.into_iter().map(|number| number + 20).collect())
        }
        Change::Service(key, row) if row.id != 0 => {
            let (inside_first, outside_first) = (row.inside_first + 200, row.outside_first + 200);
            Change::Service(key, Service { id: row.id + 2, inside_first, outside_first, ..row })
        }
        other => other,
    }
}

impl Mutator {
    /// From a seed.
    pub fn new(seed: u64, devices: Devices) -> Mutator {
        let mut corpus = Vec::new();
        for step in all(devices).into_iter().flat_map(|fixture| fixture.steps) {
            if let Step::Packet(step) = step {
                // A node has no such hook; what comes in IPIP it meets at its network.
                let hook = if step.hook == UNWRAP { Hook::FROM_NETWORK } else { step.hook };
                corpus.push((hook, step.frame));
            }
        }
        Mutator { rng: Rng::with_seed(seed), devices, corpus }
    }

    /// The next packet and its hook. One in five is valid, so that connections open and speak.
    pub fn packet(&mut self) -> (u8, Frame) {
        let (mut hook, mut frame) = self.rng.choice(&self.corpus).cloned().unwrap_or_default();
        if self.rng.u8(0..5) == 0 {
            return (hook, frame);
        }
        for _ in 0..self.rng.u8(1..=4) {
            self.mutate(&mut frame);
        }
        if self.rng.u8(0..20) == 0 {
            self.elsewhere(&mut hook, &mut frame);
        }
        if self.rng.u8(0..12) == 0 {
            self.wrap(&mut hook, &mut frame);
        }
        (hook, frame)
    }

    /// In IPIP from another node, for somebody here.
    fn wrap(&mut self, hook: &mut u8, frame: &mut Frame) {
        let v6 = frame.bytes.get(12..14) == Some(&[0x86, 0xdd]);
        let Some(inner) = frame.bytes.get(14..).filter(|_| v6 || frame.bytes.get(12..14) == Some(&[8, 0])) else {
            return;
        };
        let (inner, from, to) = (inner.to_vec(), ["n2", "n2", "n2", "w"], ["a", "b", "n1", "n1", "c"]);
        let ends = [self.rng.choice(from).unwrap_or("n2"), self.rng.choice(to).unwrap_or("n1")];
        let mut outer = if v6 { vec![0x60, 0, 0x1f, 0x90] } else { vec![0x45, 0] };
        if v6 {
            outer.extend((inner.len() as u16).to_be_bytes());
            outer.extend([dsr::IPV6, 64]);
        } else {
            outer.extend((20 + inner.len() as u16).to_be_bytes());
            outer.extend([0x1f, 0x90, 0x40, 0, 64, dsr::IPIP, 0, 0]);
        }
        for name in ends {
            match addresses(name)[usize::from(v6)] {
                std::net::IpAddr::V4(ip) => outer.extend(ip.octets()),
                std::net::IpAddr::V6(ip) => outer.extend(ip.octets()),
            }
        }
        frame.bytes.truncate(14);
        frame.bytes.extend(outer);
        frame.bytes.extend(inner);
        (*hook, frame.ifindex, frame.tunnel) =
            (if self.rng.u8(0..4) == 0 { EDGE } else { Hook::FROM_NETWORK }, self.devices.eth, None);
    }

    /// Another hook or another door.
    fn elsewhere(&mut self, hook: &mut u8, frame: &mut Frame) {
        let Devices { a, b, eth, overlay } = self.devices;
        *hook = self.rng.choice([1, 1, 2, 3, 3, 4, 5, 6, EDGE, EDGE]).unwrap_or(Hook::FROM_WORKLOAD);
        frame.ifindex = match *hook {
            Hook::FROM_WORKLOAD | Hook::TO_WORKLOAD => self.rng.choice([a, b]).unwrap_or(a),
            Hook::FROM_NETWORK | Hook::TO_NETWORK | EDGE => eth,
            _ => overlay,
        };
        let (vni, node) = (self.rng.choice([0, 1, 300, 500, 777]), self.rng.choice([2, 2, 2, 3]));
        frame.tunnel = (*hook == Hook::FROM_OVERLAY).then(|| TunnelKey {
            vni: vni.unwrap_or(C.id),
            remote: u32::from_ne_bytes([192, 168, 0, node.unwrap_or(2)]),
        });
    }

    fn mutate(&mut self, frame: &mut Frame) {
        let v6 = frame.bytes.get(12..14) == Some(&[0x86, 0xdd]);
        let (addresses, width, transport) = if v6 { (22, 16, 54) } else { (26, 4, 34) };
        match self.rng.u8(0..20) {
            0..3 => self.flip(frame),
            3 => {
                let at = self.rng.usize(0..=frame.bytes.len());
                frame.bytes.truncate(at.max(14));
            }
            4 => {
                let at = frame.bytes.len();
                frame.bytes.resize(at + self.rng.usize(1..64), 0);
                self.put(frame, at, 64);
            }
            // Lengths that lie: IP, header, UDP, TCP.
            5 => self.put(frame, if v6 { 18 } else { 16 }, 2),
            6 if !v6 => {
                let length = self.rng.u8(0..16);
                self.set(frame, 14, 0x40 | length);
            }
            6 => self.put(frame, 14, 1),
            7 => self.put(frame, transport + 4, 2),
            8 => self.put(frame, transport + 12, 1),
            // Ends exchanged, or somebody else's.
            9 => self.exchange(frame, addresses, addresses + width, width),
            10 => self.exchange(frame, transport, transport + 2, 2),
            11 => {
                let at = addresses + if self.rng.bool() { width } else { 0 };
                self.party(frame, at, v6);
            }
            12 => {
                let port = self
                    .rng
                    .choice([0u16, 53, 80, 443, 5000, 8080, 8443, 8472, 30_080, 40_000, 50_000, 50_001])
                    .unwrap_or(80);
                let at = transport + if self.rng.bool() { 2 } else { 0 };
                for (i, byte) in port.to_be_bytes().into_iter().enumerate() {
                    self.set(frame, at + i, byte);
                }
            }
            13 => {
                let protocols = [0, 1, 6, 17, 43, 44, 47, 50, 51, 58, 59, 60, 132, 135, 139, 255];
                let protocol = self.rng.choice(protocols).unwrap_or(6);
                self.set(frame, if v6 { 20 } else { 23 }, protocol);
            }
            14 if v6 => self.extend(frame),
            14 => self.put(frame, 20, 2),
            15 => {
                let kinds = [[8, 0], [8, 6], [0x86, 0xdd], [0x81, 0], [0x88, 0xcc]];
                let kind = self.rng.choice(kinds).unwrap_or([8, 0]);
                self.set(frame, 12, kind[0]);
                self.set(frame, 13, kind[1]);
            }
            16 => {
                let kind =
                    self.rng.choice([0, 1, 2, 3, 8, 11, 12, 128, 129, 133, 134, 135, 136, 137, 143]).unwrap_or(8);
                self.set(frame, transport, kind);
            }
            17 => self.put(frame, transport + 13, 1),
            // The end of another packet.
            18 => {
                let other = self.rng.choice(&self.corpus).map(|(_, frame)| frame.bytes.clone()).unwrap_or_default();
                let at = self.rng.usize(14..=frame.bytes.len().max(14));
                frame.bytes.truncate(at);
                frame.bytes.extend(other.get(at..).unwrap_or_default());
            }
            _ => {
                let at = self.rng.usize(0..frame.bytes.len().max(1));
                self.put(frame, at, 1);
            }
        }
    }

    fn flip(&mut self, frame: &mut Frame) {
        let at = self.rng.usize(0..frame.bytes.len().clamp(1, 120));
        let bit = 1 << self.rng.u8(0..8);
        if let Some(byte) = frame.bytes.get_mut(at) {
            *byte ^= bit;
        }
    }

    /// Random bytes, often at the edges.
    fn put(&mut self, frame: &mut Frame, at: usize, width: usize) {
        for i in 0..width {
            let byte = match self.rng.u8(0..4) {
                0 => 0,
                1 => 0xff,
                _ => self.rng.u8(..),
            };
            self.set(frame, at + i, byte);
        }
    }

    fn set(&self, frame: &mut Frame, at: usize, value: u8) {
        if let Some(byte) = frame.bytes.get_mut(at) {
            *byte = value;
        }
    }

    fn exchange(&self, frame: &mut Frame, one: usize, other: usize, width: usize) {
        if frame.bytes.len() >= other + width {
            for i in 0..width {
                frame.bytes.swap(one + i, other + i);
            }
        }
    }

    fn party(&mut self, frame: &mut Frame, at: usize, v6: bool) {
        let parties = [
            "a", "b", "c", "n1", "n2", "w", "w2", "plain", "nowhere", "gone", "vip", "vip", "lb", "lb", "gateway",
            "router",
        ];
        let name = self.rng.choice(parties).unwrap_or("a");
        let octets = match addresses(name)[usize::from(v6)] {
            std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
            std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        for (i, byte) in octets.into_iter().enumerate() {
            self.set(frame, at + i, byte);
        }
    }

    /// One more IPv6 extension header.
    fn extend(&mut self, frame: &mut Frame) {
        let Some(next) = frame.bytes.get(20).copied().filter(|_| frame.bytes.len() >= 54) else { return };
        let kind = self.rng.choice([0, 43, 44, 51, 60, 135]).unwrap_or(60);
        let mut header = [next, 0, 0, 0, 0, 0, 0, 0];
        if kind == 44 {
            header[3] = self.rng.choice([0, 0, 1, 8, 9]).unwrap_or(0);
            header[7] = self.rng.u8(0..3);
        }
        self.set(frame, 20, kind);
        frame.bytes.splice(54..54, header);
    }
}
