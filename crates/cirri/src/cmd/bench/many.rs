//! Half a million connections to a service at once, which no processor's cache holds.

use std::path::Path;

use anyhow::{Context, Result};
use cirri_abi::Forwarding;

use super::cases::{self, Case, End};
use super::ground::{Ground, Routing};
use super::instance::Instance;
use super::packets::{Line, Plan, Run, floors, stages, summed_up, take_turns};

/// Cases met so: connections from outside to backends elsewhere, at the edge and at tc.
fn concerned(case: &Case) -> bool {
    let passes_through = (case.from, case.to) == (End::World, End::Remote);
    case.established() && case.lane.is_some() && passes_through && case.flows().len() > 1
}

/// Measures. A round meets a part of the connections, the next round the next: each is as cold as it
/// can be. Tables have room for them and a quarter more, so that none is evicted.
pub fn measure(pin_root: &Path, plan: &Plan, ground: &Ground) -> Result<Vec<Line>> {
    let all: Vec<&'static Case> = cases::ALL.iter().filter(|case| concerned(case) && plan.wants(case)).collect();
    let owners: Vec<&'static Case> =
        cases::ALL.iter().filter(|owner| all.iter().any(|case| case.opener_case() == owner.name)).collect();
    if owners.is_empty() {
        return Ok(Vec::new());
    }
    let instance = |(number, owner): (usize, &&Case)| {
        let returns_directly = owner.lane.is_some_and(|lane| lane.forwarding != Forwarding::SNAT);
        let entries = plan.many as u32 * if returns_directly { 1 } else { 2 } / 4 * 5;
        let maps = ["FLOWS4", "FLOWS6", "PENDING4", "PENDING6"].map(|map| (map, entries));
        Instance::load_with(pin_root, FIRST + number, &maps)
    };
    let mut instances = owners.iter().enumerate().map(instance).collect::<Result<Vec<_>>>()?;
    let events = instances.last_mut().context("nothing to measure")?.datapath.events()?;
    let mut events = events.context("somebody else reads the events")?;
    let mut stages = stages(&mut instances)?;
    let mut runs = Vec::new();
    for (i, owner) in owners.iter().enumerate() {
        let stage = stages.get_mut(i).context("an instance for every case")?;
        ground.fill(&stage.tables, Routing::Direct)?;
        for v6 in [false, true] {
            eprintln!("cirri: {} connections for {} (IPv{})", plan.many, owner.name, if v6 { 6 } else { 4 });
            let answer = owner.open(stage, ground, v6, plan.many)?;
            for case in all.iter().filter(|case| case.opener_case() == owner.name) {
                runs.push(Run::new(i, Some(case), v6, plan.many, case.measured(ground, v6, answer.as_ref())));
            }
        }
    }
    runs.extend(floors(&runs, 0));
    eprintln!("cirri: {} connections: {} runs in each of {} rounds", plan.many, runs.len(), plan.rounds);
    take_turns(&mut runs, &mut stages, ground, plan, &mut events)?;
    Ok(summed_up(&runs, "many")?.into_iter().filter(|line| line.flows == plan.many).collect())
}

/// Instances of the other measurements have lower numbers.
const FIRST: usize = 100;
