//! Every NetworkPolicy case on a real lab of two nodes: real connections, both families, every cell.
//!
//! `CIRRI_CASE=named-port` runs only the cases whose name contains that, in either routing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::{Duration, SystemTime};

use cirri_e2e::cases::{self, Addresses, Case, Cell, Family, Matrix, PROBES};
use cirri_e2e::lab::{Lab, LabError, Probed, is_of};
use serde_json::Value;

const NODES: [&str; 2] = ["node1", "node2"];
/// How a case is probed: most of its time goes into waiting for those who must not be answered. Silence is tried once
/// more.
const BRIEF: [&str; 2] = ["--timeout", "500"];
/// How it is probed again when somebody was silent who should not be.
const PATIENT: [&str; 4] = ["--timeout", "10000", "--retries", "0"];
/// Pairs of one case whose differences are printed.
const SHOWN: usize = 24;

/// Without the overlay an identity is found by address alone. What differs is how a packet travels,
/// not what is decided, so that every third case will do.
const DIRECT_STEP: usize = 3;

#[test]
fn every_case_comes_out_as_expected_on_two_nodes() {
    come_out_as_expected("e2e_np", "overlay", cases());
}

#[test]
fn every_third_case_comes_out_the_same_with_direct_routing() {
    come_out_as_expected("e2e_npd", "direct", cases().into_iter().step_by(DIRECT_STEP).collect());
}

fn cases() -> Vec<Case> {
    let wanted = std::env::var("CIRRI_CASE").unwrap_or_default();
    let cases: Vec<Case> = cases::all().unwrap().into_iter().filter(|case| case.name.contains(&wanted)).collect();
    assert!(!cases.is_empty(), "no case is called {wanted:?}");
    cases
}

fn come_out_as_expected(name: &str, routing: &str, cases: Vec<Case>) {
    let lab = Lab::up(name, 2, &["--routing", routing]).unwrap_or_else(|error| panic!("{error}"));
    let mut bench = Bench { lab, surroundings: String::new(), addresses: Addresses::default() };
    let (mut compared, mut failed, mut report) = (0, 0, String::new());
    for case in &cases {
        let outcome = run(&mut bench, case).unwrap_or_else(Outcome::failed);
        compared += outcome.compared;
        println!("{}: {} cells, {} wrong", case.name, outcome.compared, outcome.wrong.len());
        if !outcome.wrong.is_empty() {
            failed += 1;
            let _ = writeln!(report, "\n{}: {}", case.name, case.about);
            for ((pair, problem), cells) in outcome.wrong.iter().take(SHOWN) {
                let _ = writeln!(report, "  {pair}: {problem}: {}", cells.join(", "));
            }
            if outcome.wrong.len() > SHOWN {
                let _ = writeln!(report, "  and {} more pairs", outcome.wrong.len() - SHOWN);
            }
        }
    }
    println!("{} cases, {compared} cells compared", cases.len());
    assert!(compared >= cases.len() * 9 * 9 * 8, "only {compared} cells of {} cases were compared", cases.len());
    assert!(report.is_empty(), "{failed} of {} cases came out wrong\n{report}", cases.len());
}

/// The lab with what is in it besides policies.
struct Bench {
    lab: Lab,
    surroundings: String,
    addresses: Addresses,
}

/// What one case came to.
#[derive(Default)]
struct Outcome {
    compared: usize,
    /// By pair and problem: the ports and families concerned.
    wrong: BTreeMap<(String, String), Vec<String>>,
}

impl Outcome {
    fn failed(error: String) -> Outcome {
        Outcome { compared: 0, wrong: BTreeMap::from([(("the case could not be run".to_string(), error), Vec::new())]) }
    }

    fn wrong(&mut self, cell: &Cell, problem: String) {
        let pair = format!("{} -> {}", cell.from, cell.to);
        self.wrong.entry((pair, problem)).or_default().push(format!("{} {}", cell.probe, cell.family));
    }
}

fn run(bench: &mut Bench, case: &Case) -> Result<Outcome, String> {
    let told = |error: LabError| error.to_string();
    let surroundings = case.surroundings();
    if bench.surroundings != surroundings {
        // The pods first: the policies' placeholders need their addresses.
        bench.lab.apply(&surroundings).map_err(told)?;
        bench.addresses = Addresses(bench.lab.addresses().map_err(told)?);
        bench.surroundings.clone_from(&surroundings);
    }
    let lab = &bench.lab;
    let policies = case.policies(&bench.addresses).map_err(|error| error.to_string())?;
    lab.apply(&format!("{surroundings}\n---\n{policies}")).map_err(told)?;

    let expected = case.expected().map_err(|error| error.to_string())?;
    let since = SystemTime::now();
    let mut answers = probe(lab, &expected, &BRIEF)?;
    let denied: BTreeSet<&Cell> =
        answers.iter().filter(|(_, it)| it.verdict == "denied").map(|(cell, _)| cell).collect();
    if expected.cells().any(|(cell, passes)| passes && denied.contains(cell)) {
        look_again(bench, &expected, &mut answers, since)?;
    }
    Ok(compare(&expected, answers))
}

fn probe(lab: &Lab, expected: &Matrix, patience: &[&str]) -> Result<BTreeMap<Cell, Probed>, String> {
    let told = |error: LabError| error.to_string();
    let ports = PROBES.map(|probe| format!("{}/{}", probe.port, probe.protocol)).join(",");
    let everyone = [&["--all-pairs", "--with-world", "--with-nodes", "--ports", &ports], patience].concat();
    let mut probed = lab.probe(&everyone).map_err(told)?;
    probed.extend(towards_nodes(lab, expected, patience).map_err(told)?);
    probed.into_iter().map(|answer| Ok((cell(&answer)?, answer))).collect()
}

/// On a busy machine a server or a prober can be late, which looks like silence. It was nothing else if no node has
/// dropped a packet of the pair and the answer comes to who waits for it. Who was denied as he should is asked again
/// as patiently: an answer to him, however late, is a failure.
fn look_again(
    bench: &Bench,
    expected: &Matrix,
    answers: &mut BTreeMap<Cell, Probed>,
    since: SystemTime,
) -> Result<(), String> {
    let mut drops = Vec::new();
    for node in NODES {
        let told = |error: LabError| format!("{node}: {error}");
        let kept = bench.lab.flows(node, &[]).map_err(told)?;
        let status: Value = bench.lab.ask(node, &["status"]).map_err(told)?;
        let capacity = status["flows"]["capacity"].as_u64().unwrap_or_default();
        drops.extend(dropped_since(since, kept, capacity).map_err(|why| format!("{node}: {why}"))?);
    }
    let passes: BTreeSet<&Cell> = expected.cells().filter(|(_, passes)| *passes).map(|(cell, _)| cell).collect();
    for (cell, patient) in probe(&bench.lab, expected, &PATIENT)? {
        let Some(brief) = answers.get_mut(&cell).filter(|brief| brief.verdict == "denied") else { continue };
        if passes.contains(&cell) {
            let from = bench.addresses.get(&cell.from, cell.family);
            if let Some(drop) = drops.iter().find(|drop| is_of(drop, from, brief)) {
                let [node, reason, hook] = [&drop["node"], &drop["drop"]["name"], &drop["hook"]];
                brief.error = Some(format!("{node} dropped it: {reason} at {hook}").replace('"', ""));
                continue;
            }
            println!(
                "{} -> {} {} {}: late, {} after {} ms",
                cell.from, cell.to, cell.probe, cell.family, patient.verdict, patient.ms
            );
        }
        *brief = patient;
    }
    Ok(())
}

/// What a node has dropped since then, if it still knows all of that: of `capacity` records it keeps the newest.
fn dropped_since(since: SystemTime, mut kept: Vec<Value>, capacity: u64) -> Result<Vec<Value>, String> {
    let since = since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let since = cirri_flow::rfc3339(since.as_nanos() as u64);
    let is_full = kept.len() as u64 >= capacity;
    let is_since = |record: &Value| record["time"].as_str() >= Some(since.as_str());
    let forgotten = is_full && kept.first().is_none_or(is_since);
    kept.retain(is_since);
    if forgotten || kept.iter().any(|record| record["record"] == "lost") {
        return Err("it does not know any more all that it dropped, and whether an answer was only late".to_owned());
    }
    kept.retain(|record| record["verdict"] == "dropped");
    Ok(kept)
}

#[test]
fn a_node_that_does_not_know_all_that_it_dropped_says_nothing_of_who_was_late() {
    let at = |second: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(second);
    let flow = |second: u64, verdict: &str| {
        let time = cirri_flow::rfc3339(second * 1_000_000_000);
        serde_json::json!({"record": "flow", "time": time, "verdict": verdict})
    };
    let kept = vec![flow(10, "dropped"), flow(20, "forwarded"), flow(30, "dropped")];
    assert_eq!(dropped_since(at(15), kept.clone(), 3).unwrap(), [flow(30, "dropped")]);
    assert_eq!(dropped_since(at(5), kept.clone(), 4).unwrap().len(), 2);
    assert!(dropped_since(at(5), kept.clone(), 3).is_err(), "an older one may have been let go");
    let lost = |second: u64| serde_json::json!({"record": "lost", "time": flow(second, "")["time"], "count": 1});
    let with = |second: u64| [&kept[..], &[lost(second)]].concat();
    assert!(dropped_since(at(15), with(40), 9).is_err(), "nobody knows what was lost");
    assert!(dropped_since(at(45), with(40), 9).unwrap().is_empty());
}

/// Pods calling nodes, in the cases that forbid some of it. Nothing listens there, so that a refusal
/// of the node's own stack is what shows that the packet got through.
fn towards_nodes(lab: &Lab, expected: &Matrix, patience: &[&str]) -> Result<Vec<Probed>, LabError> {
    let pairs: BTreeSet<(&str, &str)> = expected
        .cells()
        .filter(|(cell, _)| cell.probe == PROBES[0] && is_node(&cell.to))
        .map(|(cell, _)| (cell.from.as_str(), cell.to.as_str()))
        .collect();
    if expected.cells().all(|(cell, passes)| passes || !is_node(&cell.to)) {
        return Ok(Vec::new());
    }
    let answers: Vec<Result<Vec<Probed>, LabError>> = std::thread::scope(|scope| {
        let asking: Vec<_> = pairs
            .into_iter()
            .map(|(from, to)| {
                scope.spawn(move || {
                    let to = format!("node:{to}");
                    lab.probe(&[&["--from", from, "--to", &to, "--port", "80"], patience].concat())
                })
            })
            .collect();
        asking.into_iter().map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    Ok(answers.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
}

fn compare(expected: &Matrix, mut answers: BTreeMap<Cell, Probed>) -> Outcome {
    let mut outcome = Outcome::default();
    for (cell, passes) in expected.cells() {
        let Some(answer) = answers.remove(cell) else {
            if !is_node(&cell.to) {
                outcome.wrong(cell, "was not probed".to_string());
            }
            continue;
        };
        outcome.compared += 1;
        let problem = answer.error.as_deref().unwrap_or("no reason given");
        match (passes, answer.verdict.as_str()) {
            (true, "allowed") if answer.answered_by.as_ref().is_some_and(|by| is_pod(&cell.to) && *by != cell.to) => {
                outcome.wrong(cell, format!("answered by {:?}", answer.answered_by));
            }
            (true, "allowed") | (false, "denied") => {}
            (true, "refused") if !is_pod(&cell.to) => {}
            (true, verdict) => outcome.wrong(cell, format!("should pass, is {verdict}: {problem}")),
            (false, verdict) => outcome.wrong(cell, format!("should be dropped, is {verdict}: {problem}")),
        }
    }
    for cell in answers.keys().filter(|cell| is_pod(&cell.from) || is_pod(&cell.to)) {
        outcome.wrong(cell, "was probed, and the case does not speak of it".to_string());
    }
    outcome
}

fn cell(answer: &Probed) -> Result<Cell, String> {
    let wanted = format!("{}/{}", answer.protocol, answer.port.unwrap_or_default());
    let probe = PROBES.into_iter().find(|probe| probe.to_string() == wanted);
    Ok(Cell {
        family: if answer.family == 4 { Family::V4 } else { Family::V6 },
        probe: probe.ok_or_else(|| format!("the lab probed {wanted}, which nobody asked for"))?,
        from: participant(&answer.from),
        to: participant(&answer.to),
    })
}

/// The lab writes nodes as `node:NAME`.
fn participant(name: &str) -> String {
    name.strip_prefix("node:").unwrap_or(name).to_string()
}

fn is_pod(name: &str) -> bool {
    name.contains('/')
}

fn is_node(name: &str) -> bool {
    !is_pod(name) && name != cases::OUTSIDE
}
