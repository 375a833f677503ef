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
use super::check::{self, Checked};
use super::ground::{Ground, Routing};
use super::instance::{self, Instance};
use super::many;
use super::stats::Spread;
use crate::output::Table;

/// How much to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    pub rounds: usize,
    /// Packets of a case in a round.
    pub packets: u32,
    /// Connections that go through the tables before they count as full.
    pub others: u32,
    /// Connections to a service that are there at once, where that is what is measured; a power of two.
    pub many: u64,
    /// The processor to stay on.
    pub cpu: usize,
    /// Only cases with this in their names.
    pub only: String,
}

impl Plan {
    /// Whether a case is to be measured.
    pub fn wants(&self, case: &Case) -> bool {
        case.name.contains(&self.only)
    }
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

/// Packets with an event each between two looks of the reader: fewer than it is woken for early.
const BURST: u32 = 1000;
/// So many new flows that no two packets of a run are of the same; those of a service are
/// [`cases::MOST_FLOWS`].
const NEVER_TWICE: u64 = 1 << 28;
const EDGE: &str = "edge";
const FLOOR_EDGE: &str = "floor_edge";
/// Flows of which each is met twice in a round; of more, a round meets a part.
const MOST_OF_A_ROUND: u64 = 16_384;
/// So many times fewer packets where each is a run of its own.
const SINGLES: u32 = 20;
/// Of which each case has its own: some have the same ends.
const FLOWS_OF_A_CASE: u64 = 1 << 22;

/// Measures everything.
pub fn run(pin_root: &Path, plan: &Plan) -> Result<Measures> {
    instance::sweep(pin_root);
    let ground = Ground::new(&std::process::id().to_string())?;
    let namespace = ground.namespace.clone();
    namespace.run(|| {
        pin_to(plan.cpu)?;
        // Events are read through it.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _inside = runtime.enter();
        let mut measures = measure(pin_root, plan, &ground)?;
        measures.lines.extend(many::measure(pin_root, plan, &ground)?);
        Ok(measures)
    })?
}

fn measure(pin_root: &Path, plan: &Plan, ground: &Ground) -> Result<Measures> {
    let (established, others): (Vec<&'static Case>, Vec<_>) =
        cases::ALL.iter().filter(|case| plan.wants(case)).partition(|case| case.established());
    let owners: Vec<&'static Case> =
        cases::ALL.iter().filter(|owner| established.iter().any(|case| case.opener_case() == owner.name)).collect();
    let mut instances = (0..=owners.len()).map(|n| Instance::load(pin_root, n)).collect::<Result<Vec<_>>>()?;
    let mut events = match instances.last_mut() {
        Some(shared) => shared.datapath.events()?.context("somebody else reads the events")?,
        None => bail!("nothing to measure"),
    };
    let mut stages = stages(&mut instances)?;
    let mut measures = Measures { lines: Vec::new(), checked: Vec::new() };
    for (rounds_before, state) in (0..).zip(["fresh", "full"]) {
        for (i, stage) in stages.iter_mut().enumerate() {
            let routing = owners.get(i).map_or(Routing::Overlay, |case| case.routing);
            if state == "full" {
                let_others_through(&stage.tables, plan.others)?;
            } else {
                ground.fill(&stage.tables, routing)?;
            }
        }
        let mut runs = Vec::new();
        for (i, owner) in owners.iter().enumerate() {
            let stage = stages.get_mut(i).context("an instance for every case")?;
            for v6 in [false, true] {
                let answer = match owner.lane {
                    Some(_) => owner.open(stage, ground, v6, 16_384)?,
                    None => Some(owner.establish(&mut stage.trial, ground, v6, 16_384)?),
                };
                for case in established.iter().filter(|case| case.opener_case() == owner.name) {
                    let measured = case.measured(ground, v6, answer.as_ref());
                    measures.check(case, stage, ground, v6, &measured)?;
                    let each = |flows: &u64| Run::new(i, Some(case), v6, *flows, measured.clone());
                    runs.extend(case.flows().iter().map(each));
                }
            }
        }
        let shared = stages.len() - 1;
        for (i, case) in others.iter().enumerate() {
            for v6 in [false, true].into_iter().filter(|v6| !v6 || case.has_v6()) {
                let new = matches!(case.kind, Kind::New | Kind::Dropped);
                let measured = case.measured(ground, v6, None);
                let stage = stages.get_mut(shared).context("an instance for every run")?;
                ground.set_routing(&stage.tables, case.routing)?;
                measures.check(case, stage, ground, v6, &measured)?;
                let used = rounds_before * u64::from(plan.packets) * plan.rounds as u64;
                let (mask, next) = match (new, case.lane) {
                    (false, _) => (1, 0),
                    // Flow 0 was checked with.
                    (true, Some(_)) => (cases::MOST_FLOWS, 1 + used),
                    (true, None) => (NEVER_TWICE, i as u64 * FLOWS_OF_A_CASE + used),
                };
                let run = Run::new(shared, Some(case), v6, if new { 0 } else { 1 }, measured);
                runs.push(Run { mask, next, ..run });
            }
        }
        runs.extend(floors(&runs, shared));
        progress(&format!("{state} tables: {} runs in each of {} rounds", runs.len(), plan.rounds));
        take_turns(&mut runs, &mut stages, ground, plan, &mut events)?;
        measures.lines.extend(summed_up(&runs, state)?);
    }
    Ok(measures)
}

/// The programs and tables of instances.
pub fn stages(instances: &mut [Instance]) -> Result<Vec<Stage<'_>>> {
    instances.iter_mut().map(stage).collect()
}

fn stage(instance: &mut Instance) -> Result<Stage<'_>> {
    let tables = instance.datapath.tables().clone();
    Ok(Stage { trial: instance.datapath.trial()?, tables })
}

/// Every run in every round.
pub fn take_turns(
    runs: &mut [Run],
    stages: &mut [Stage<'_>],
    ground: &Ground,
    plan: &Plan,
    events: &mut Events,
) -> Result<()> {
    for _ in 0..plan.rounds {
        for run in &mut *runs {
            let stage = stages.get_mut(run.stage).context("an instance for every run")?;
            run.once(stage, ground, plan, events)?;
        }
    }
    Ok(())
}

/// What was measured, and seen.
#[derive(Clone, Debug, Serialize)]
pub struct Measures {
    #[serde(rename = "packets")]
    pub lines: Vec<Line>,
    /// Packets of services that came out, one of each case.
    pub checked: Vec<Checked>,
}

impl Measures {
    fn check(
        &mut self,
        case: &'static Case,
        stage: &mut Stage<'_>,
        ground: &Ground,
        v6: bool,
        measured: &Measured,
    ) -> Result<()> {
        let family = if v6 { 6 } else { 4 };
        if !self.checked.iter().any(|it| it.case == case.name && it.family == family) {
            self.checked.extend(check::check(case, stage, ground, v6, measured)?);
        }
        Ok(())
    }
}

/// Loaded programs and their tables.
pub struct Stage<'a> {
    pub trial: Trial<'a>,
    pub tables: Tables,
}

/// One case in one of its forms.
pub struct Run {
    pub stage: usize,
    /// `None`: the floor.
    pub case: Option<&'static Case>,
    pub v6: bool,
    /// 0: every packet is of a flow of its own.
    pub flows: u64,
    /// How many flows there are to take from, a power of two.
    pub mask: u64,
    /// Every packet is a run of its own.
    single: bool,
    packet: Vec<u8>,
    leg: Leg,
    /// Number of the next flow, where each packet or round has others.
    pub next: u64,
    rounds: Vec<f64>,
}

impl Run {
    /// A run of a case with so many flows.
    pub fn new(stage: usize, case: Option<&'static Case>, v6: bool, flows: u64, measured: Measured) -> Run {
        let Measured { packet, leg } = measured;
        let single = case.is_some_and(Case::one_at_a_time);
        // Runs with other numbers of flows must not warm up this one's.
        let next = flows / 2;
        Run { stage, case, v6, flows, mask: flows, single, packet, leg, next, rounds: Vec::new() }
    }

    fn once(&mut self, stage: &mut Stage<'_>, ground: &Ground, plan: &Plan, events: &mut Events) -> Result<()> {
        if let Some(case) = self.case {
            ground.set_routing(&stage.tables, case.routing)?;
        }
        let before = Counts::read(&stage.tables, self.case)?;
        let varied = if self.mask == 1 { 0 } else { self.mask };
        let (repeat, bursts) = self.amount(plan);
        let (mut took, mut answer) = (0.0, 0);
        for burst in 1..=bursts {
            let shot = self.leg.shot(&self.packet, varied, self.next, repeat / bursts);
            let landed = stage.trial.run(self.leg.program, &shot)?;
            self.next += u64::from(repeat / bursts);
            took += landed.each.as_nanos() as f64;
            answer = landed.action;
            if !self.single || burst % BURST == 0 || burst == bursts {
                drain(events)?;
            }
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

    /// Packets of a round, and in how many runs.
    fn amount(&self, plan: &Plan) -> (u32, u32) {
        // What makes an event a packet comes in bursts that a reader keeps up with.
        let makes_events = self.flows == 0 && self.case.is_some();
        let packets = plan.packets.max((self.flows.min(MOST_OF_A_ROUND) * 2) as u32);
        if self.single {
            let packets = plan.packets / SINGLES;
            (packets, packets)
        } else if makes_events {
            let bursts = plan.packets.div_ceil(BURST);
            (plan.packets / bursts * bursts, bursts)
        } else {
            (packets, 1)
        }
    }

    /// What makes the way to the program cost more or less.
    fn way(&self) -> Way {
        Way {
            v6: self.v6,
            tunnel: self.leg.tunnel.is_some(),
            varied: self.mask > 1,
            single: self.single,
            edge: matches!(self.leg.program, EDGE | FLOOR_EDGE),
        }
    }
}

/// How a packet gets to the program under test.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Way {
    v6: bool,
    tunnel: bool,
    varied: bool,
    single: bool,
    edge: bool,
}

impl Way {
    /// The empty program at its end, and what the table calls that.
    fn floor(self) -> (&'static str, &'static str) {
        match self {
            Way { edge: true, .. } => (FLOOR_EDGE, "floor-edge"),
            Way { tunnel: true, .. } => ("floor", "floor-overlay"),
            Way { single: true, .. } => ("floor", "floor-one-a-run"),
            _ => ("floor", "floor"),
        }
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
pub fn floors(runs: &[Run], stage: usize) -> Vec<Run> {
    let mut floors: Vec<Run> = Vec::new();
    for run in runs {
        if floors.iter().any(|floor| floor.way() == run.way()) {
            continue;
        }
        let leg = Leg { program: run.way().floor().0, ..run.leg };
        let flows = if run.mask > 1 { 16_384 } else { 1 };
        let floor = Run::new(stage, None, run.v6, flows, Measured { packet: run.packet.clone(), leg });
        floors.push(Run { single: run.single, ..floor });
    }
    floors
}

/// The lines of runs that are over.
pub fn summed_up(runs: &[Run], tables: &'static str) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for run in runs {
        let gross = Spread::of(&run.rounds).context("a run without rounds")?;
        let floor = runs.iter().find(|other| other.case.is_none() && other.way() == run.way());
        let floor = floor.and_then(|floor| Spread::of(&floor.rounds)).context("a run without a floor")?;
        lines.push(Line {
            case: run.case.map_or(run.way().floor().1, |case| case.name).to_owned(),
            program: run.leg.program.to_owned(),
            family: if run.v6 { 6 } else { 4 },
            flows: run.flows,
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
pub fn table(measures: &Measures) -> String {
    let lines = &measures.lines;
    let mut table = Table::new(["case", "ip", "tables", "1 flow", "1K flows", "16K flows", "512K flows", "new flows"]);
    let mut rows: Vec<(&str, u8, &str)> = Vec::new();
    for line in lines.iter().filter(|line| line.tables != "many") {
        let row = (line.case.as_str(), line.family, line.tables);
        if rows.contains(&row) {
            continue;
        }
        rows.push(row);
        let cell = |flows| {
            let found = lines.iter().find(|it| (it.case.as_str(), it.family, it.tables) == row && it.flows == flows);
            found.map_or_else(|| "-".to_owned(), |it| shown(&it.gross))
        };
        let many = lines.iter().find(|it| it.tables == "many" && (it.case.as_str(), it.family) == (row.0, row.1));
        let many = many.filter(|_| row.2 == "full").map_or_else(|| "-".to_owned(), |it| shown(&it.gross));
        let family = format!("v{}", row.1);
        table.row([row.0.to_owned(), family, row.2.to_owned(), cell(1), cell(1024), cell(16_384), many, cell(0)]);
    }
    let mut text = table.render(crate::output::terminal_width());
    for it in &measures.checked {
        text += &format!("{} (IPv{}): {}\n", it.case, it.family, it.packet);
    }
    text
}

/// Min, p25 and median.
pub fn shown(spread: &Spread) -> String {
    format!("{:.0} / {:.0} / {:.0}", spread.min, spread.p25, spread.median)
}
