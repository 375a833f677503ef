//! `cirri bench packets`: nanoseconds a packet.
//!
//! Every established case has programs and tables of its own, so that its flows are the only ones
//! in a fresh table. All cases take turns in every round: what else the machine does meanwhile hits
//! all of them alike.

use std::path::Path;

use anyhow::{Context, Result, bail};
use cirri_abi::{Addr, CounterIndex, Direction, FlowKey4, Port, Recipe, Tuple};
use cirri_loader::{Events, Tables, Trial};
use futures::FutureExt;
use serde::Serialize;

use super::cases::{self, Case, Kind, Leg, Measured};
use super::ground::Ground;
use super::instance::{self, Instance};
use super::stats::Spread;
use crate::output::Table;

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub rounds: usize,
    /// Packets of a case in a round.
    pub packets: u32,
    /// Connections that go through the tables before they count as full.
    pub others: u32,
    /// The processor to stay on.
    pub cpu: usize,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub case: String,
    pub program: String,
    pub family: u8,
    /// Connections that the packets belong to, round robin; 0: every packet to another.
    pub flows: u64,
    /// `fresh`, or `full`: after other connections went through.
    pub tables: &'static str,
    /// As measured, the way to the program included.
    pub gross: Spread,
    /// Without what the program `floor` takes in the same rounds.
    pub net: Spread,
}

const FLOWS: [u64; 3] = [1, 1024, 16_384];
/// Packets with an event each between two looks of the reader: fewer than it is woken for early.
const BURST: u32 = 1000;
/// So many new flows that no two packets of a run are of the same.
const NEVER_TWICE: u64 = 1 << 28;
/// Of which each case has its own: some have the same ends.
const FLOWS_OF_A_CASE: u64 = 1 << 22;

/// Measures everything.
pub fn run(pin_root: &Path, plan: &Plan) -> Result<Vec<Line>> {
    instance::sweep(pin_root);
    let ground = Ground::new(&std::process::id().to_string())?;
    let namespace = ground.namespace.clone();
    namespace.run(|| {
        pin_to(plan.cpu)?;
        // Events are read through it.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _inside = runtime.enter();
        measure(pin_root, plan, &ground)
    })?
}

fn measure(pin_root: &Path, plan: &Plan, ground: &Ground) -> Result<Vec<Line>> {
    let established: Vec<&Case> = cases::ALL.iter().filter(|case| case.established()).collect();
    let mut instances = (0..=established.len()).map(|n| Instance::load(pin_root, n)).collect::<Result<Vec<_>>>()?;
    let tables: Vec<Tables> = instances.iter().map(|instance| instance.datapath.tables().clone()).collect();
    let mut events = match instances.last_mut() {
        Some(shared) => shared.datapath.events()?.context("somebody else reads the events")?,
        None => bail!("nothing to measure"),
    };
    let trials = instances.iter_mut().map(|instance| instance.datapath.trial()).collect::<Result<Vec<_>, _>>()?;
    let mut stages: Vec<Stage<'_>> =
        trials.into_iter().zip(tables).map(|(trial, tables)| Stage { trial, tables }).collect();

    let mut lines = Vec::new();
    for (rounds_before, state) in (0..).zip(["fresh", "full"]) {
        for (i, stage) in stages.iter_mut().enumerate() {
            let routing = established.get(i).map_or(super::ground::Routing::Overlay, |case| case.routing);
            if state == "full" {
                let_others_through(&stage.tables, plan.others)?;
            } else {
                ground.fill(&stage.tables, routing)?;
            }
        }
        let mut runs = Vec::new();
        for (i, case) in established.iter().enumerate() {
            for v6 in [false, true] {
                let stage = stages.get_mut(i).context("an instance for every case")?;
                let answer = case.establish(&mut stage.trial, ground, v6, 16_384)?;
                let measured = case.measured(ground, v6, Some(&answer));
                runs.extend(FLOWS.map(|flows| Run::new(i, Some(case), v6, flows, measured.clone())));
            }
        }
        let shared = stages.len() - 1;
        for (i, case) in cases::ALL.iter().enumerate().filter(|(_, case)| !case.established()) {
            for v6 in [false, true].into_iter().filter(|v6| !v6 || case.has_v6()) {
                let flows = if matches!(case.kind, Kind::New | Kind::Dropped) { NEVER_TWICE } else { 1 };
                let run = Run::new(shared, Some(case), v6, flows, case.measured(ground, v6, None));
                let used = rounds_before * u64::from(plan.packets) * plan.rounds as u64;
                runs.push(Run { next: i as u64 * FLOWS_OF_A_CASE + used, ..run });
            }
        }
        let floors = floors(&runs, shared);
        runs.extend(floors);
        progress(&format!("{state} tables: {} runs in each of {} rounds", runs.len(), plan.rounds));
        for _ in 0..plan.rounds {
            for run in &mut runs {
                let stage = stages.get_mut(run.stage).context("an instance for every run")?;
                run.once(stage, ground, plan, &mut events)?;
            }
        }
        lines.extend(summed_up(&runs, state)?);
    }
    Ok(lines)
}

/// Loaded programs and their tables.
struct Stage<'a> {
    trial: Trial<'a>,
    tables: Tables,
}

/// One case in one of its forms.
struct Run {
    stage: usize,
    /// `None`: the floor.
    case: Option<&'static Case>,
    v6: bool,
    flows: u64,
    packet: Vec<u8>,
    leg: Leg,
    /// Number of the next new flow.
    next: u64,
    rounds: Vec<f64>,
}

impl Run {
    fn new(stage: usize, case: Option<&'static Case>, v6: bool, flows: u64, measured: Measured) -> Run {
        let Measured { packet, leg } = measured;
        Run { stage, case, v6, flows, packet, leg, next: 0, rounds: Vec::new() }
    }

    fn once(&mut self, stage: &mut Stage<'_>, ground: &Ground, plan: &Plan, events: &mut Events) -> Result<()> {
        let every_flow_twice = if self.flows < NEVER_TWICE { self.flows * 2 } else { 0 };
        let repeat = plan.packets.max(every_flow_twice as u32);
        if let Some(case) = self.case {
            ground.set_routing(&stage.tables, case.routing)?;
        }
        let before = Counts::read(&stage.tables, self.case)?;
        let varied = if self.flows == 1 { 0 } else { self.flows };
        // What makes an event a packet comes in bursts that a reader keeps up with.
        let bursts = if self.flows == NEVER_TWICE { repeat.div_ceil(BURST) } else { 1 };
        let (repeat, mut took, mut answer) = (repeat / bursts * bursts, 0.0, 0);
        for _ in 0..bursts {
            let shot = self.leg.shot(&self.packet, varied, self.next, repeat / bursts);
            let landed = stage.trial.run(self.leg.program, &shot)?;
            self.next += u64::from(repeat / bursts);
            took += landed.each.as_nanos() as f64;
            answer = landed.action;
            drain(events)?;
        }
        self.rounds.push(took / f64::from(bursts));
        let Some(case) = self.case else { return Ok(()) };
        let moved = Counts::read(&stage.tables, self.case)?.since(&before);
        let expected = match case.kind {
            Kind::New => Counts { decided: repeat.into(), ..Counts::default() },
            Kind::Dropped => Counts { dropped: repeat.into(), ..Counts::default() },
            _ => Counts::default(),
        };
        if moved != expected {
            bail!(
                "{} did not do what it is there to show: {moved:?} instead of {expected:?}, answer {answer}",
                case.name
            );
        }
        Ok(())
    }

    /// What makes the way to the program cost more or less.
    fn way(&self) -> (bool, bool, bool) {
        (self.v6, self.leg.tunnel.is_some(), self.flows > 1)
    }
}

/// Counters that tell whether a run did what it should.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Counts {
    decided: u64,
    renewed: u64,
    dropped: u64,
}

impl Counts {
    fn read(tables: &Tables, case: Option<&Case>) -> Result<Counts> {
        let count = |index| tables.counter(index).map(|counter| counter.packets);
        let mut dropped = 0;
        if let Some(reason) = case.and_then(Case::reason) {
            for direction in [Direction::INGRESS, Direction::EGRESS] {
                dropped += count(CounterIndex::reason(reason.code, direction))?;
            }
        }
        Ok(Counts { decided: count(CounterIndex::DECIDED)?, renewed: count(CounterIndex::RENEWED)?, dropped })
    }

    fn since(&self, before: &Counts) -> Counts {
        Counts {
            decided: self.decided - before.decided,
            renewed: self.renewed - before.renewed,
            dropped: self.dropped - before.dropped,
        }
    }
}

/// A run of the empty program for every way that a packet takes to one.
fn floors(runs: &[Run], stage: usize) -> Vec<Run> {
    let mut floors: Vec<Run> = Vec::new();
    for run in runs {
        if floors.iter().any(|floor| floor.way() == run.way()) {
            continue;
        }
        let leg = Leg { program: "floor", ..run.leg };
        let flows = if run.flows > 1 { 16_384 } else { 1 };
        floors.push(Run::new(stage, None, run.v6, flows, Measured { packet: run.packet.clone(), leg }));
    }
    floors
}

fn summed_up(runs: &[Run], tables: &'static str) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for run in runs {
        let gross = Spread::of(&run.rounds).context("a run without rounds")?;
        let floor = runs.iter().find(|other| other.case.is_none() && other.way() == run.way());
        let floor = floor.and_then(|floor| Spread::of(&floor.rounds)).context("a run without a floor")?;
        let way = if run.leg.tunnel.is_some() { "floor-overlay" } else { "floor" };
        lines.push(Line {
            case: run.case.map_or(way, |case| case.name).to_owned(),
            program: run.leg.program.to_owned(),
            family: if run.v6 { 6 } else { 4 },
            flows: if run.flows == NEVER_TWICE { 0 } else { run.flows },
            tables,
            gross,
            net: gross.without(&floor),
        });
    }
    Ok(lines)
}

/// Takes the connections that are there out, and lets `others` go through both flow tables.
pub fn let_others_through(tables: &Tables, others: u32) -> Result<()> {
    let old = tables.flows4.entries()?;
    let recipe = old.first().map(|entry| entry.1).unwrap_or_default();
    tables.flows4.delete_all(old.iter().map(|entry| &entry.0))?;
    let old = tables.flows6.entries()?;
    tables.flows6.delete_all(old.iter().map(|entry| &entry.0))?;
    let other = |n: u32| Tuple {
        src: Addr::v4_word((0x0a40_0000 + n / 50_000).to_be()),
        dst: Addr::v4([10, 244, 0, 11]),
        sport: Port::new((n % 50_000) as u16 + 1024),
        dport: Port::new(443),
        proto: cirri_abi::proto::TCP,
        ..Tuple::default()
    };
    let v4: Vec<(FlowKey4, Recipe)> = (0..others).map(|n| (other(n).key4(), recipe)).collect();
    tables.flows4.put_all(&v4)?;
    let wide = |addr: Addr| Addr { words: [0xfd00_0000_u32.to_be(), 0, 0, addr.word()] };
    let v6 = |n: u32| Tuple { src: wide(other(n).src), dst: wide(other(n).dst), ..other(n) };
    let v6: Vec<(Tuple, Recipe)> = (0..others).map(|n| (v6(n), recipe)).collect();
    tables.flows6.put_all(&v6)?;
    Ok(())
}

/// Empties the ring, so that the next run's events find room, as with a reader that keeps up.
fn drain(events: &mut Events) -> Result<()> {
    while let Some(batch) = events.next().now_or_never() {
        batch?;
    }
    Ok(())
}

fn pin_to(cpu: usize) -> Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("cannot stay on processor {cpu}"))
}

fn progress(what: &str) {
    eprintln!("cirri: {what}");
}

/// The lines as columns: a row for each case and family, min and p25 of each number of flows.
pub fn table(lines: &[Line]) -> String {
    let mut table = Table::new(["case", "ip", "tables", "1 flow", "1K flows", "16K flows", "new flows"]);
    let mut rows: Vec<(&str, u8, &str)> = Vec::new();
    for line in lines {
        let row = (line.case.as_str(), line.family, line.tables);
        if rows.contains(&row) {
            continue;
        }
        rows.push(row);
        let cell = |flows| {
            let found = lines.iter().find(|it| (it.case.as_str(), it.family, it.tables) == row && it.flows == flows);
            found.map_or_else(|| "-".to_owned(), |it| shown(&it.gross))
        };
        let state = line.tables.to_owned();
        table.row([row.0.to_owned(), format!("v{}", row.1), state, cell(1), cell(1024), cell(16_384), cell(0)]);
    }
    table.render(crate::output::terminal_width())
}

/// Min, p25 and median.
pub fn shown(spread: &Spread) -> String {
    format!("{:.0} / {:.0} / {:.0}", spread.min, spread.p25, spread.median)
}
