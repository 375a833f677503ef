//! `cirri bench sockets`: what services in the system call cost `connect`.
//!
//! UDP sockets, so that nothing but the call is timed. The programs of two nodes, one with few services and
//! one with many, take turns on this process's control group with no programs at all.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use cirri_abi::proto;
use serde::Serialize;
use socket2::{Domain, SockAddr, Socket, Type};

use super::ground::{Ground, Routing};
use super::group::{Group, Home};
use super::instance::{self, Instance};
use super::load::stay_on;
use super::served;
use super::stats::Spread;
use crate::output::{self, Table};

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub rounds: usize,
    /// Calls of a kind in a round.
    pub calls: u32,
    pub cpu: usize,
}

/// One kind of call.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Services that the programs know; `None`: no programs.
    pub services: Option<u32>,
    /// `service`, `other`.
    pub to: &'static str,
    pub call: Call,
    pub ns: Spread,
    /// More than without programs.
    pub added: Spread,
}

/// What is timed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Call {
    /// `connect`, again and again on one socket.
    Connect,
    /// `socket`, `connect`, `close`.
    Whole,
}

/// Numbers of services.
const SERVICES: [u32; 2] = [10, 10_000];
/// Not a service.
const OTHER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 245, 0, 1)), 8080);

/// Measures.
pub fn run(pin_root: &Path, plan: &Plan) -> Result<Vec<Line>> {
    instance::sweep(pin_root);
    let ground = Ground::new(&format!("{}-s", std::process::id()))?;
    let namespace = ground.namespace.clone();
    let group = Group::new()?;
    let mut home = Home::new()?;
    home.enter(Some(group.path()))?;
    namespace.run(|| measure(pin_root, plan, &ground, &group))?
}

struct Run {
    services: Option<u32>,
    to: (&'static str, SocketAddr),
    call: Call,
    rounds: Vec<f64>,
}

fn measure(pin_root: &Path, plan: &Plan, ground: &Ground, group: &Group) -> Result<Vec<Line>> {
    stay_on(plan.cpu)?;
    let mut nodes = Vec::new();
    for (number, count) in SERVICES.into_iter().enumerate() {
        let node = Instance::load(pin_root, number)?;
        ground.set_routing(node.datapath.tables(), Routing::Direct)?;
        served::others(node.datapath.tables(), count, proto::UDP)?;
        nodes.push((count, node));
    }
    let targets =
        |count: u32| [("service", SocketAddr::new(served::other(count / 2), served::OTHER_PORT)), ("other", OTHER)];
    let mut runs = Vec::new();
    for call in [Call::Connect, Call::Whole] {
        let run = |services, to| Run { services, to, call, rounds: Vec::new() };
        runs.extend(targets(10).map(|to| run(None, to)));
        runs.extend(SERVICES.iter().flat_map(|count| targets(*count).map(|to| run(Some(*count), to))));
    }
    for (count, node) in &mut nodes {
        node.datapath.attach_sockets(group.path())?;
        let [(_, service), _] = targets(*count);
        let socket = datagram()?;
        socket.connect(&SockAddr::from(service))?;
        let told = socket.peer_addr()?.as_socket();
        node.datapath.detach_sockets()?;
        let actual = socket.peer_addr()?.as_socket();
        let backend = actual.is_some_and(|it| it.port() == served::BACKEND_PORT && it != service);
        ensure!(told == Some(service) && backend, "a socket for {service} is told {told:?} and reaches {actual:?}");
    }
    eprintln!("cirri: {} kinds of calls in each of {} rounds", runs.len(), plan.rounds);
    for _ in 0..plan.rounds {
        timed(&mut runs, None, plan)?;
        for (count, node) in &mut nodes {
            node.datapath.attach_sockets(group.path())?;
            timed(&mut runs, Some(*count), plan)?;
            node.datapath.detach_sockets()?;
        }
    }
    summed_up(&runs)
}

/// A round of the calls that are to be made with these programs.
fn timed(runs: &mut [Run], services: Option<u32>, plan: &Plan) -> Result<()> {
    for run in runs.iter_mut().filter(|run| run.services == services) {
        let to = SockAddr::from(run.to.1);
        let begun = match run.call {
            Call::Connect => {
                let socket = datagram()?;
                socket.connect(&to)?;
                let begun = Instant::now();
                for _ in 0..plan.calls {
                    socket.connect(&to)?;
                }
                begun
            }
            Call::Whole => {
                let begun = Instant::now();
                for _ in 0..plan.calls {
                    datagram()?.connect(&to)?;
                }
                begun
            }
        };
        run.rounds.push(begun.elapsed().as_nanos() as f64 / f64::from(plan.calls));
    }
    Ok(())
}

fn datagram() -> Result<Socket> {
    Ok(Socket::new(Domain::IPV4, Type::DGRAM, None)?)
}

fn summed_up(runs: &[Run]) -> Result<Vec<Line>> {
    let line = |run: &Run| {
        let ns = Spread::of(&run.rounds).context("a call that was never made")?;
        let plain = runs.iter().find(|it| it.services.is_none() && it.to.0 == run.to.0 && it.call == run.call);
        let plain = plain.and_then(|it| Spread::of(&it.rounds)).context("nothing to compare with")?;
        Ok(Line { services: run.services, to: run.to.0, call: run.call, ns, added: ns.without(&plain) })
    };
    runs.iter().map(line).collect()
}

/// As columns.
pub fn table(lines: &[Line]) -> String {
    let mut table = Table::new(["call", "to", "services", "ns: min / p25 / median", "added: min / p25"]);
    for line in lines {
        table.row(cells(line));
    }
    table.render(output::terminal_width())
}

/// What a line says, for people.
pub fn cells(line: &Line) -> [String; 5] {
    let call = match line.call {
        Call::Connect => "connect",
        Call::Whole => "socket + connect + close",
    };
    let services = line.services.map_or_else(|| "no programs".to_owned(), |count| count.to_string());
    let Spread { min, p25, median } = line.ns;
    let added = line.services.map_or_else(String::new, |_| format!("{:.0} / {:.0}", line.added.min, line.added.p25));
    [call.to_owned(), line.to.to_owned(), services, format!("{min:.0} / {p25:.0} / {median:.0}"), added]
}

/// The part of a report.
pub fn write(lines: &[Line], text: &mut String) {
    text.push_str(
        "\n## Services in the system call\n\nNanoseconds of a call on UDP sockets: min / p25 / median of interleaved rounds of 500 \
         calls, without programs, and with those of a node that knows so many services with 10 backends each. *added*: more than \
         the same call without programs; nobody else's programs may be attached to sockets anywhere on the machine, or the \
         kernel looks for them in every call. Checked before: the socket is told the service's address and is connected to a backend.\n\n\
         | call | to | services | ns | added: min / p25 |\n|---|---|---|---|---|\n",
    );
    for line in lines {
        text.push_str(&format!("| {} |\n", cells(line).join(" | ")));
    }
}
