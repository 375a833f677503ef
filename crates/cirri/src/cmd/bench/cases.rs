//! What is measured: who sends what to whom, and what the packet path should make of it.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use cirri_abi::{DropReason, GATEWAY_MAC, VXLAN_PORT};
use cirri_loader::Trial;
use cirri_loader::trial::{Landing, Shot, action};

use super::frame::{ACK, Frame, SYN};
use super::ground::{Ground, NODE, PEER, REMOTE, REMOTE_IDENTITY, Routing, WORLD, Workload};

/// One thing that packets do.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub name: &'static str,
    /// What it shows, for the table's notes.
    pub about: &'static str,
    pub from: End,
    pub to: End,
    pub routing: Routing,
    pub udp: bool,
    pub kind: Kind,
}

/// Who sends or receives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    Client,
    Server,
    Closed,
    Remote,
    World,
    Host,
}

/// What the packets are to the packet path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Of connections that both sides have agreed to.
    Established,
    /// Answers of such connections.
    Answers,
    /// First packets, never of the same connection twice.
    New,
    /// The same, and policy refuses every one.
    Dropped,
    /// Nothing that the packet path decides on.
    Passed,
    /// As above, for packets that a hook of this node has decided on.
    Decided,
}

use End::{Client, Closed, Host, Remote, Server, World};
use Kind::{Answers, Decided, Dropped, Established, New, Passed};
use Routing::{Direct, OnePort, Overlay};

const fn case(name: &'static str, from: End, to: End, routing: Routing, kind: Kind, about: &'static str) -> Case {
    Case { name, about, from, to, routing, udp: false, kind }
}

/// All of them, in the order of the table.
pub const ALL: &[Case] = &[
    case("pod-to-pod", Client, Server, Overlay, Established, "both on this node, policy of both sides"),
    Case { udp: true, ..case("pod-to-pod-udp", Client, Server, Overlay, Established, "the same with UDP") },
    case("pod-to-remote-overlay", Client, Remote, Overlay, Established, "into the tunnel: its key is set"),
    case("pod-to-remote-direct", Client, Remote, Direct, Established, "out of the node's device by routes"),
    case("pod-to-world-masquerade", Client, World, Direct, Established, "source address and port rewritten"),
    case("remote-to-pod-overlay", Remote, Server, Overlay, Established, "out of the tunnel into a pod"),
    case("remote-to-pod-direct", Remote, Server, Direct, Established, "from the network into a pod"),
    case("world-to-pod-answers", Client, World, OnePort, Answers, "destination address and port rewritten back"),
    case("host-to-pod", Host, Server, Direct, Established, "from the node's own stack"),
    case("pod-to-host", Client, Host, Direct, Established, "to the node's own stack"),
    case("new-pod-to-pod", Client, Server, Overlay, New, "decision, two recipes, event"),
    case("new-pod-to-remote-overlay", Client, Remote, Overlay, New, "the same towards another node"),
    case("new-pod-to-remote-direct", Client, Remote, Direct, New, "the same, with two route lookups"),
    case("new-pod-to-world-masquerade", Client, World, Direct, New, "the same, and a port is bound"),
    case("new-remote-to-pod-overlay", Remote, Server, Overlay, New, "from another node"),
    case("new-remote-to-pod-direct", Remote, Server, Direct, New, "from another node, with a route lookup"),
    case("drop-at-sender", Client, Closed, Overlay, Dropped, "refused by the sender's policy, with event"),
    case("drop-from-network", World, Server, Direct, Dropped, "refused by the receiver's policy, with event"),
    case("network-to-host", Remote, Host, Direct, Passed, "the node's own traffic: TCP from a peer's pod"),
    Case {
        udp: true,
        ..case("network-to-host-vxlan", World, Host, Overlay, Passed, "an outer packet on its way to the overlay")
    },
    case("host-to-overlay", Host, Remote, Overlay, Passed, "the node's own traffic into the tunnel"),
    case("decided-to-overlay", Client, Remote, Overlay, Decided, "a pod's packet at the tunnel, decided on before"),
];

/// The case with this name.
pub fn find(name: &str) -> Option<&'static Case> {
    ALL.iter().find(|case| case.name == name)
}

/// How packets of one direction are met.
#[derive(Clone, Copy, Debug)]
pub struct Leg {
    pub program: &'static str,
    pub ifindex: u32,
    pub mark: u32,
    pub tunnel: Option<(u32, u32)>,
}

/// What `crates/bpf` marks packets with that a hook has decided on.
const MARK_DECIDED: u32 = 0x0400;
/// First port of flows, as `wrap` counts them.
const FIRST_PORT: u16 = 10_000;
const SERVICE_PORT: u16 = 8080;
const ATTEMPTS: usize = 20;

/// A packet of a case, and how it is met.
#[derive(Clone, Debug)]
pub struct Measured {
    pub packet: Vec<u8>,
    pub leg: Leg,
}

impl Case {
    /// Whether connections are there before it is measured.
    pub fn established(&self) -> bool {
        matches!(self.kind, Established | Answers)
    }

    /// Whether there is such a packet of IPv6: outer packets are IPv4.
    pub fn has_v6(&self) -> bool {
        !(self.udp && self.kind == Passed)
    }

    /// The packet to measure with, flow 0. For connections that are there these must have been
    /// [established](Case::establish).
    pub fn measured(&self, ground: &Ground, v6: bool, answer: Option<&Frame>) -> Measured {
        match (self.kind, answer) {
            (Answers, Some(answer)) => Measured { packet: answer.flagged(ACK).bytes(), leg: self.answer_leg(ground) },
            (New | Dropped, _) => self.opener(ground, v6, SYN),
            _ => self.opener(ground, v6, ACK),
        }
    }

    fn opener(&self, ground: &Ground, v6: bool, flags: u8) -> Measured {
        Measured { packet: self.frame(ground, v6, 0).flagged(flags).bytes(), leg: self.opener_leg(ground) }
    }

    /// Opens connections `0..flows` with the programs themselves: the opener's packet, its answer,
    /// and for TCP the opener's ACK. Answers what answers flow 0.
    pub fn establish(&self, trial: &mut Trial<'_>, ground: &Ground, v6: bool, flows: u16) -> Result<Frame> {
        let (opener, answerer) = (self.opener_leg(ground), self.answer_leg(ground));
        let mut first = None;
        let numbers: Vec<u16> = (0..flows).collect();
        // One program at a time: to change it costs more than to run it.
        for chunk in numbers.chunks(1024) {
            let openers: Vec<Frame> = chunk.iter().map(|n| self.frame(ground, v6, *n).flagged(SYN)).collect();
            let mut answers = Vec::with_capacity(chunk.len());
            for frame in &openers {
                let landed = self.pass(trial, frame, &opener)?;
                let left = Frame::read(&landed.packet).context("a program made a packet that cannot be read")?;
                answers.push(left.answer(SYN | ACK));
            }
            for frame in &answers {
                self.pass(trial, frame, &answerer)?;
            }
            if !self.udp {
                for frame in &openers {
                    self.pass(trial, &frame.flagged(ACK), &opener)?;
                }
            }
            first = first.or_else(|| answers.first().cloned());
        }
        first.context("no connection to open")
    }

    fn pass(&self, trial: &mut Trial<'_>, frame: &Frame, leg: &Leg) -> Result<Landing> {
        let packet = frame.bytes();
        // Masquerade may not find a port at once; a real opener would try again too.
        for _ in 0..ATTEMPTS {
            let landed = trial.run(leg.program, &leg.shot(&packet, 0, 0, 1))?;
            if landed.action != action::SHOT {
                return Ok(landed);
            }
        }
        bail!("{}: {} dropped {frame:?}, which should open a connection", self.name, leg.program);
    }

    /// The opener's packet of a flow; TCP flags are for the caller to set.
    fn frame(&self, ground: &Ground, v6: bool, flow: u16) -> Frame {
        let vxlan = self.udp && self.kind == Passed;
        let (sport, dport) = match self.kind {
            // Answers vary in their source port, which is the opener's destination.
            Answers => (33_333, FIRST_PORT + flow),
            _ if vxlan => (FIRST_PORT + flow, VXLAN_PORT),
            _ => (FIRST_PORT + flow, SERVICE_PORT),
        };
        Frame {
            to: GATEWAY_MAC,
            from: self.from.workload(ground).map_or([0x02, 0xbe, 1, 0, 0, 0], |workload| workload.mac),
            src: self.from.address(ground, v6),
            dst: self.to.address(ground, v6),
            sport,
            dport,
            tcp: (!self.udp).then_some(ACK),
        }
    }

    fn opener_leg(&self, ground: &Ground) -> Leg {
        leg(ground, self.from, self.to, self.routing, self.kind == Decided)
    }

    fn answer_leg(&self, ground: &Ground) -> Leg {
        leg(ground, self.to, self.from, self.routing, false)
    }

    /// Why its packets are dropped.
    pub fn reason(&self) -> Option<DropReason> {
        (self.kind == Dropped).then_some(DropReason::POLICY_DENIED)
    }
}

/// Where packets from one end to another are met.
fn leg(ground: &Ground, from: End, to: End, routing: Routing, decided: bool) -> Leg {
    let plain = |program, ifindex| Leg { program, ifindex, mark: 0, tunnel: None };
    if decided {
        return Leg { mark: MARK_DECIDED, ..plain("to_overlay", ground.overlay) };
    }
    match (from.workload(ground), to.workload(ground)) {
        (Some(sender), _) => plain("from_workload", sender.ifindex),
        (None, Some(receiver)) if from == Host => plain("to_workload", receiver.ifindex),
        (None, _) if from == Host => plain("to_overlay", ground.overlay),
        (None, _) if from == Remote && routing == Overlay => {
            let IpAddr::V4(peer) = PEER.of(false) else { return plain("from_overlay", ground.overlay) };
            Leg { tunnel: Some((REMOTE_IDENTITY, peer.to_bits())), ..plain("from_overlay", ground.overlay) }
        }
        (None, _) => plain("from_network", ground.uplink),
    }
}

impl Leg {
    /// A run of it.
    pub fn shot<'a>(&self, packet: &'a [u8], flows: u64, first: u64, repeat: u32) -> Shot<'a> {
        Shot { packet, ifindex: self.ifindex, mark: self.mark, tunnel: self.tunnel, flows, first, repeat }
    }
}

impl End {
    fn workload(self, ground: &Ground) -> Option<Workload> {
        match self {
            Client => Some(ground.client),
            Server => Some(ground.server),
            Closed => Some(ground.closed),
            _ => None,
        }
    }

    fn address(self, ground: &Ground, v6: bool) -> IpAddr {
        match (self.workload(ground), self) {
            (Some(workload), _) => workload.at.of(v6),
            (None, Remote) => REMOTE.of(v6),
            (None, World) => WORLD.of(v6),
            (None, _) => NODE.of(v6),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        for case in ALL {
            assert_eq!(ALL.iter().filter(|other| other.name == case.name).count(), 1, "{}", case.name);
            assert!(find(case.name).is_some());
        }
    }
}
