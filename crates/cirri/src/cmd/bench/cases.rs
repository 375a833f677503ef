//! What is measured: who sends what to whom, and what the packet path should make of it.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cirri_abi::{CounterIndex, DropReason, Forwarding, GATEWAY_MAC, Recipe, State, Tuple, VXLAN_PORT, recipe_flag};
use cirri_loader::trial::{Landing, Shot, action, edge_action};
use cirri_loader::{Tables, Trial};

use super::frame::{ACK, Frame, SYN};
use super::ground::{Ground, NODE, PEER, REMOTE, REMOTE_IDENTITY, Routing, UPLINK_MAC, WORLD, Workload};
use super::packets::Stage;
use super::served::{self, Lane};

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
    /// The service that packets are for; [`Case::to`] is where its backends are.
    pub lane: Option<Lane>,
    /// What comes from the network is met before the stack, at XDP.
    pub edge: bool,
}

/// Who sends or receives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    Client,
    Server,
    Closed,
    Open,
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

use End::{Client, Closed, Host, Open, Remote, Server, World};
use Kind::{Answers, Decided, Dropped, Established, New, Passed};
use Routing::{Direct, OnePort, Overlay};

const fn case(name: &'static str, from: End, to: End, routing: Routing, kind: Kind, about: &'static str) -> Case {
    Case { name, about, from, to, routing, udp: false, kind, lane: None, edge: false }
}

const fn serve(name: &'static str, from: End, to: End, lane: Lane, kind: Kind, about: &'static str) -> Case {
    Case { lane: Some(lane), ..case(name, from, to, Direct, kind, about) }
}

const fn edge(case: Case) -> Case {
    Case { edge: true, ..case }
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
    edge(serve(
        "edge-snat",
        World,
        Remote,
        served::SNAT,
        Established,
        "a client outside, source and destination rewritten",
    )),
    edge(serve("edge-snat-answers", World, Remote, served::SNAT, Answers, "what the backend answers, on its way back")),
    edge(serve(
        "edge-dsr-option",
        World,
        Remote,
        served::OPTION,
        Established,
        "destination rewritten; the option was in the SYN",
    )),
    edge(serve("edge-dsr-ipip", World, Remote, served::IPIP, Established, "put into IPIP, else untouched")),
    edge(serve(
        "new-edge-snat",
        World,
        Remote,
        served::NEW_SNAT,
        New,
        "service, backend, route, port, two recipes, event",
    )),
    edge(serve(
        "new-edge-dsr-option",
        World,
        Remote,
        served::NEW_OPTION,
        New,
        "the same with one recipe and an option, no port",
    )),
    edge(serve("new-edge-dsr-ipip", World, Remote, served::NEW_IPIP, New, "the same with one recipe, in IPIP")),
    edge(case("edge-to-host", World, Host, Direct, Passed, "what XDP costs the node's own traffic")),
    edge(case(
        "edge-to-pod",
        Remote,
        Server,
        Direct,
        Passed,
        "what XDP costs traffic between pods: one lookup of its own",
    )),
    serve("tc-snat", World, Remote, served::SNAT, Established, "the same as at the edge, at tc"),
    serve("tc-snat-answers", World, Remote, served::SNAT, Answers, "likewise"),
    serve("tc-dsr-option", World, Remote, served::OPTION, Established, "likewise"),
    serve("tc-dsr-ipip", World, Remote, served::IPIP, Established, "likewise; one packet a run"),
    serve("new-tc-snat", World, Remote, served::NEW_SNAT_TC, New, "likewise"),
    serve("new-tc-dsr-option", World, Remote, served::NEW_OPTION_TC, New, "likewise; one packet a run"),
    serve("new-tc-dsr-ipip", World, Remote, served::NEW_IPIP_TC, New, "likewise; one packet a run"),
    serve(
        "pod-to-service-near",
        Client,
        Server,
        served::NEAR,
        Established,
        "per packet: a cluster address, backend on this node",
    ),
    serve("pod-to-service-far", Client, Remote, served::FAR, Established, "the same, backend on another node"),
    serve("node-port-near", World, Open, served::NODE_PORT, Established, "a port of the node, backend on this node"),
    serve(
        "new-pod-to-service-near",
        Client,
        Server,
        served::NEW_NEAR,
        New,
        "decision of both sides, service, two recipes, event",
    ),
    serve("new-pod-to-service-far", Client, Remote, served::NEW_FAR, New, "the same, with two route lookups"),
    serve("new-node-port-near", World, Open, served::NEW_NODE_PORT, New, "from outside, with a route lookup"),
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
/// Flows of a service that are opened at once: no more than the table of unfinished ones takes with ease.
const AT_ONCE: u64 = 16_384;
/// How long a connection whose answers take another way lasts before the packet path believes in it.
const LASTED: Duration = Duration::from_millis(2500);
/// Flows of one address: 16,384 at each of its ports.
pub const MOST_FLOWS: u64 = 16_384 * served::PORTS as u64;

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

    /// Whether the programs' answer grows its packet by a header that no wrapper takes off at tc again:
    /// such packets are run one at a time.
    pub fn one_at_a_time(&self) -> bool {
        let forwarding = self.lane.map_or(Forwarding::SNAT, |lane| lane.forwarding);
        !self.edge && (forwarding == Forwarding::DSR_IPIP || (forwarding == Forwarding::DSR_OPTION && self.kind == New))
    }

    /// Numbers of flows that it can be measured with.
    pub fn flows(&self) -> &'static [u64] {
        // The answers to a service's clients differ in more than their source port.
        if self.lane.is_some() && self.kind == Answers { &[1] } else { &[1, 1024, 16_384] }
    }

    /// The case whose connections it is measured with.
    pub fn opener_case(&self) -> &'static str {
        let same = |other: &&Case| other.established() && other.lane.is_some() && other.lane == self.lane;
        ALL.iter().find(same).map_or(self.name, |case| case.name)
    }

    /// Whether there is such a packet of IPv6: outer packets are IPv4.
    pub fn has_v6(&self) -> bool {
        !(self.udp && self.kind == Passed)
    }

    /// The packet to measure with, flow 0. For connections that are there these must have been
    /// [established](Case::establish).
    pub fn measured(&self, ground: &Ground, v6: bool, answer: Option<&Frame>) -> Measured {
        match (self.kind, answer) {
            (Answers, Some(answer)) => {
                let leg = self.answer_leg(ground);
                Measured { packet: leg.met(&answer.flagged(ACK)).bytes(), leg }
            }
            (New | Dropped, _) => self.opener(ground, v6, SYN),
            _ => self.opener(ground, v6, ACK),
        }
    }

    fn opener(&self, ground: &Ground, v6: bool, flags: u8) -> Measured {
        let leg = self.opener_leg(ground);
        Measured { packet: leg.met(&self.frame(ground, v6, 0).flagged(flags)).bytes(), leg }
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

    /// Opens connections `0..flows` of a service with the programs themselves. Flow `n` differs from flow 0 as
    /// `wrap` counts: in its source port, and in its destination port from flow 16,384 on. Answers what answers
    /// flow 0, unless its answers take another way.
    ///
    /// Those whose answers take another way are all unfinished at once: their table must have room.
    pub fn open(&self, stage: &mut Stage<'_>, ground: &Ground, v6: bool, flows: u64) -> Result<Option<Frame>> {
        let (opener, answerer) = (self.opener_leg(ground), self.answer_leg(ground));
        let opens = self.opener(ground, v6, SYN).packet;
        let goes_on = self.opener(ground, v6, ACK).packet;
        let returns_directly = self.lane.is_some_and(|lane| lane.forwarding != Forwarding::SNAT);
        let at_once = if returns_directly { flows } else { AT_ONCE };
        let established = |tables: &Tables| tables.counter(CounterIndex::PROMOTED).map(|counter| counter.packets);
        let before = established(&stage.tables)?;
        let mut first_answer = None;
        for first in (0..flows).step_by(at_once as usize) {
            let many = at_once.min(flows - first) as u32;
            let all = |stage: &mut Stage<'_>, packet: &[u8]| -> Result<()> {
                let landed = stage.trial.run(opener.program, &opener.shot(packet, MOST_FLOWS, first, many))?;
                if opener.refuses(landed.action) {
                    bail!("{}: {} refuses what should open a connection", self.name, opener.program);
                }
                Ok(())
            };
            all(stage, &opens)?;
            if returns_directly {
                std::thread::sleep(LASTED);
            } else {
                for answer in self.answers(&stage.tables, v6)? {
                    self.pass(&mut stage.trial, &answer, &answerer)?;
                    let is_first = answer.dst == self.from.address(ground, v6) && answer.dport == FIRST_PORT;
                    if first_answer.is_none() || is_first {
                        first_answer = Some(answer);
                    }
                }
            }
            all(stage, &goes_on)?;
        }
        let opened = established(&stage.tables)? - before;
        if opened != flows {
            bail!("{}: {opened} of {flows} connections are established", self.name);
        }
        Ok(first_answer)
    }

    /// What answers the connections that are waited for.
    fn answers(&self, tables: &Tables, v6: bool) -> Result<Vec<Frame>> {
        let waiting: Vec<(Tuple, Recipe)> = if v6 {
            tables.pending6.entries()?
        } else {
            tables.pending4.entries()?.into_iter().map(|(key, recipe)| (key.tuple(), recipe)).collect()
        };
        let answer = |(tuple, recipe): (Tuple, Recipe)| {
            let yes = recipe.flags & recipe_flag::REPLY != 0 && recipe.state == State::NEW;
            yes.then(|| Frame {
                to: GATEWAY_MAC,
                from: [0x02, 0xbe, 1, 0, 0, 0],
                src: tuple.src.into(),
                dst: tuple.dst.into(),
                sport: tuple.sport.number(),
                dport: tuple.dport.number(),
                tcp: Some(SYN | ACK),
            })
        };
        Ok(waiting.into_iter().filter_map(answer).collect())
    }

    fn pass(&self, trial: &mut Trial<'_>, frame: &Frame, leg: &Leg) -> Result<Landing> {
        let packet = leg.met(frame).bytes();
        let mut answer = 0;
        // Masquerade may not find a port at once; a real opener would try again too.
        for _ in 0..ATTEMPTS {
            let mut landed = trial.run(leg.program, &leg.shot(&packet, 0, 0, 1))?;
            if leg.program == "edge" && landed.action == edge_action::PASS {
                // By chance its checksum looks like one left to the device: it is tc's to carry out.
                landed = trial.run("from_network", &leg.shot(&packet, 0, 0, 1))?;
                if landed.action == action::REDIRECT {
                    return Ok(landed);
                }
            }
            if !leg.refuses(landed.action) {
                return Ok(landed);
            }
            answer = landed.action;
        }
        bail!("{}: {} refused {frame:?}, which should open a connection: {answer}", self.name, leg.program);
    }

    /// The opener's packet of a flow; TCP flags are for the caller to set.
    fn frame(&self, ground: &Ground, v6: bool, flow: u16) -> Frame {
        let vxlan = self.udp && self.kind == Passed;
        let (sport, dport) = match (self.kind, self.lane) {
            (_, Some(lane)) => (FIRST_PORT + flow, lane.port()),
            // Answers vary in their source port, which is the opener's destination.
            (Answers, None) => (33_333, FIRST_PORT + flow),
            _ if vxlan => (FIRST_PORT + flow, VXLAN_PORT),
            _ => (FIRST_PORT + flow, SERVICE_PORT),
        };
        Frame {
            to: GATEWAY_MAC,
            from: self.from.workload(ground).map_or([0x02, 0xbe, 1, 0, 0, 0], |workload| workload.mac),
            src: self.from.address(ground, v6),
            dst: self.lane.map_or_else(|| self.to.address(ground, v6), |lane| lane.address(v6)),
            sport,
            dport,
            tcp: (!self.udp).then_some(ACK),
        }
    }

    fn opener_leg(&self, ground: &Ground) -> Leg {
        self.at_edge(leg(ground, self.from, self.to, self.routing, self.kind == Decided))
    }

    fn answer_leg(&self, ground: &Ground) -> Leg {
        self.at_edge(leg(ground, self.to, self.from, self.routing, false))
    }

    fn at_edge(&self, leg: Leg) -> Leg {
        if self.edge && leg.program == "from_network" { Leg { program: "edge", ..leg } } else { leg }
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
    /// A frame as it comes there: what the network sends to the node has its device's address.
    fn met(&self, frame: &Frame) -> Frame {
        let from_network = matches!(self.program, "from_network" | "edge");
        Frame { to: if from_network { UPLINK_MAC } else { frame.to }, ..frame.clone() }
    }

    /// Whether this answer of its program is none that a packet of a connection gets.
    pub fn refuses(&self, answer: u32) -> bool {
        match self.program {
            "edge" => !matches!(answer, edge_action::TX | edge_action::REDIRECT),
            _ => answer == action::SHOT,
        }
    }

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
            Open => Some(ground.open),
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
