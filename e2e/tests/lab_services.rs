//! Every case of services on real labs of two nodes: real clients, TCP and UDP, both families.
//!
//! `CIRRI_CASE=loopback` runs only the cases whose name contains that.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use cirri_e2e::cases::Addresses;
use cirri_e2e::lab::{Lab, Probed};
use cirri_e2e::services::{self, Case, Expected, NAMESPACE, Probe, Protocol, Served, Setting};

/// Probes under way at once.
const PARALLEL: usize = 4;

#[test]
fn every_case_comes_out_as_expected_over_the_overlay() {
    come_out_as_expected("svc_ovl", Setting::Overlay);
}

#[test]
fn every_case_comes_out_as_expected_with_direct_routing() {
    come_out_as_expected("svc_dir", Setting::Direct);
}

#[test]
fn every_case_comes_out_as_expected_with_ipip() {
    come_out_as_expected("svc_ipip", Setting::Ipip);
}

#[test]
fn every_case_comes_out_as_expected_in_xdp() {
    come_out_as_expected("svc_xdp", Setting::Xdp);
}

fn come_out_as_expected(name: &str, setting: Setting) {
    let wanted = std::env::var("CIRRI_CASE").unwrap_or_default();
    let cases: Vec<Case> = services::all()
        .unwrap()
        .into_iter()
        .filter(|case| case.text.labs.contains(&setting) && case.name.contains(&wanted))
        .collect();
    // Asked for by name, a case is not in every lab.
    assert!(!cases.is_empty() || !wanted.is_empty(), "no case is for {setting:?}");
    if cases.is_empty() {
        return;
    }
    let lab = Lab::up(name, 2, setting.arguments()).unwrap_or_else(|error| panic!("{error}"));
    let pods = services::pods().unwrap();
    lab.apply(&pods).unwrap();
    // The pods first: slices name their addresses.
    let addresses = Addresses(lab.addresses().unwrap());
    let mut manifests = pods;
    for case in &cases {
        manifests.push_str(&case.manifests(&addresses).unwrap());
    }
    lab.apply(&manifests).unwrap();

    let questions: Vec<Question<'_>> = cases.iter().flat_map(questions).collect();
    let (next, wrong, compared) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                while let Some(question) = questions.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = question.ask(&lab, &addresses);
                    compared.fetch_add(outcome.compared, Ordering::Relaxed);
                    let key = question.case.name.as_str();
                    if !outcome.wrong.is_empty() {
                        let mut wrong = wrong.lock().unwrap();
                        wrong.entry(key).or_insert_with(Vec::new).extend(outcome.wrong);
                    }
                }
            });
        }
    });
    let (wrong, compared) = (wrong.into_inner().unwrap(), compared.into_inner());
    let mut report = String::new();
    for (name, problems) in &wrong {
        let because = cases.iter().find(|case| case.name == *name).map_or("", |case| case.text.because.trim());
        let _ = writeln!(report, "\n{name}: {because}");
        for problem in problems {
            let _ = writeln!(report, "  {problem}");
        }
    }
    cirri_e2e::say(format!("{setting:?}: {} cases, {compared} answers compared, {} wrong", cases.len(), wrong.len()));
    assert!(compared >= questions.len(), "only {compared} answers to {} questions", questions.len());
    assert!(report.is_empty(), "{} of {} cases came out wrong ({setting:?})\n{report}", wrong.len(), cases.len());
}

/// One asker's question by one protocol.
struct Question<'a> {
    case: &'a Case,
    probe: &'a Probe,
    from: &'a str,
    protocol: Protocol,
}

/// What came of a question.
struct Outcome {
    compared: usize,
    wrong: Vec<String>,
}

fn questions(case: &Case) -> Vec<Question<'_>> {
    let mut all = Vec::new();
    for probe in &case.text.probes {
        for from in &probe.from {
            let each = probe.proto.all().iter();
            all.extend(each.map(|protocol| Question { case, probe, from, protocol: *protocol }));
        }
    }
    all
}

impl Question<'_> {
    fn ask(&self, lab: &Lab, addresses: &Addresses) -> Outcome {
        let arguments = self.probe.arguments(self.case, self.from, self.protocol);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let said = arguments.join(" ");
        let cells = match lab.probe(&arguments) {
            Ok(cells) => cells,
            Err(error) => return Outcome { compared: 0, wrong: vec![format!("probe {said}: {error}")] },
        };
        let mut wrong = Vec::new();
        if cells.len() != self.families() {
            wrong.push(format!("probe {said}: {} families instead of {}", cells.len(), self.families()));
        }
        for cell in &cells {
            if let Some(problem) = self.problem(cell, addresses) {
                wrong.push(format!("probe {said} (IPv{}, {}): {problem}", cell.family, cell.address));
            }
        }
        Outcome { compared: cells.len(), wrong }
    }

    /// How many families the question is about.
    fn families(&self) -> usize {
        let one_service = || {
            let to = self.probe.to.as_deref().or(self.case.services().first().copied());
            let service = self
                .case
                .text
                .manifests
                .iter()
                .find(|document| document["kind"] == "Service" && document["metadata"]["name"].as_str() == to);
            let single = |service: &serde_json::Value| service["spec"]["ipFamilyPolicy"].is_null();
            service.is_some_and(single) && !matches!(self.probe.vip.as_deref(), Some(vip) if vip.starts_with("node"))
        };
        let to_address = self.probe.to.as_ref().is_some_and(|to| to.parse::<IpAddr>().is_ok());
        let one = self.probe.family.is_some() || self.from.contains('@') || to_address || one_service();
        if one { 1 } else { 2 }
    }

    fn problem(&self, cell: &Probed, addresses: &Addresses) -> Option<String> {
        let seen = || {
            let answers = cell.answers.iter();
            let answers: Vec<String> =
                answers.map(|answer| format!("{} x {} saw {}", answer.count, answer.by, answer.client)).collect();
            let why = cell.error.as_deref().map(|error| format!(" ({error})")).unwrap_or_default();
            format!("{}{why} [{}]", cell.verdict, answers.join(", "))
        };
        match &self.probe.expect {
            Expected::Refusal(expected) => {
                let fits = expected.refusal.contains(&cell.verdict) && cell.answers.is_empty();
                let wanted: Vec<&str> = expected.refusal.iter().map(String::as_str).collect();
                (!fits).then(|| format!("expected {}, seen {}", wanted.join(" or "), seen()))
            }
            Expected::Served(expected) => {
                let problem = if cell.verdict != "allowed" {
                    Some(format!("answers of {:?}", expected.backends))
                } else {
                    self.unexpected(expected, cell, addresses)
                };
                problem.map(|problem| format!("expected {problem}, seen {}", seen()))
            }
        }
    }

    /// What was expected and is not so, of answers that came.
    fn unexpected(&self, expected: &Served, cell: &Probed, addresses: &Addresses) -> Option<String> {
        let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
        for answer in &cell.answers {
            let backend = answer.by.strip_prefix(NAMESPACE).and_then(|name| name.strip_prefix('/'));
            let backend = backend.unwrap_or(&answer.by);
            *counts.entry(backend).or_default() += answer.count;
            if !expected.backends.contains(backend) {
                return Some(format!("only {:?}", expected.backends));
            }
            if let Some(client) = expected.client_of(backend) {
                let may_be = self.addresses_of(client, cell.family, addresses);
                if !may_be.contains(&answer.client) {
                    return Some(format!("{backend} to see {client} ({may_be:?})"));
                }
            }
        }
        let answers: u32 = counts.values().sum();
        if answers != cell.tries {
            return Some(format!("{} answers", cell.tries));
        }
        if expected.all && counts.len() != expected.backends.len() {
            return Some(format!("all of {:?}", expected.backends));
        }
        if expected.one && counts.len() != 1 {
            return Some("one backend for all".to_string());
        }
        expected.shares.iter().find_map(|(backend, (least, most))| {
            let share = f64::from(counts.get(backend.as_str()).copied().unwrap_or_default()) / f64::from(answers);
            (share < *least || share > *most).then(|| format!("{backend} to give {least} to {most} of the answers"))
        })
    }

    /// The addresses, of one family, of `client` (who asks) or `node:NAME`.
    fn addresses_of(&self, client: &str, family: u8, addresses: &Addresses) -> BTreeSet<IpAddr> {
        let of_family = |all: &[IpAddr]| all.iter().copied().filter(|a| a.is_ipv4() == (family == 4)).collect();
        let name = if client == "client" { self.from } else { client };
        if let Some(address) = name.strip_prefix("world@").and_then(|address| address.parse().ok()) {
            return of_family(&[address]);
        }
        let name = match name.strip_prefix("node:") {
            Some(node) => node.to_string(),
            None if name == "world" => name.to_string(),
            None => format!("{NAMESPACE}/{name}"),
        };
        of_family(addresses.0.get(&name).map_or(&[], Vec::as_slice))
    }
}
