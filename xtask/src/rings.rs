//! `test` and `e2e`: the checks and the three rings, each streamed, all counted in one last line.
//!
//! Ring 1 is native and needs no privilege; ring 2 runs the real programs under `BPF_PROG_TEST_RUN`;
//! ring 3 runs real agents in network namespaces. A test that did not run looks like one that passed,
//! so an ignored test, or a privileged ring without tests, counts as a failure.

use crate::build::{self, Profile};
use crate::setup::{self, Need};
use crate::{arch, host, kernels, product, sh, table, verify};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Everything that must hold before a change lands.
pub fn test() -> Result<()> {
    let mut report = Report::default();
    let mut binary = None;
    report.check("build", || {
        build::expect(Profile::Debug);
        if host::is_root() {
            setup::ensure(Need::ALL)?;
        }
        build::object()?;
        binary = Some(build::binary(Profile::Debug)?);
        Ok(())
    });
    if let Some(binary) = binary {
        // Other kernels are slow. They are over before the rings whose tests look at clocks.
        let loading = kernels::begin_loading(&binary);
        report.check("fmt", format);
        report.check("clippy", clippy);
        report.check("arch", || arch::check().map(|_| ()));
        report.ring("ring 1: native", native);
        report.check("kernels: every program loads", || loading?.finish());
        report.privileged("ring 2: kernel", || suite("kernel", &binary, &[]));
        report.privileged("ring 3: lab", || suite("lab", &binary, &[]));
        report.check("verify", || {
            product::need_root("verify")?;
            verify::check(&binary)
        });
    }
    report.finish()
}

/// Ring 3 alone, or those of its tests whose name contains the filter.
pub fn e2e(arguments: &[String]) -> Result<()> {
    product::need_root("e2e")?;
    build::expect(Profile::Debug);
    setup::ensure(&[Need::Build, Need::Lab, Need::Test])?;
    build::object()?;
    let binary = build::binary(Profile::Debug)?;
    let mut report = Report::default();
    report.privileged("ring 3: lab", || suite("lab", &binary, arguments));
    report.finish()
}

fn format() -> Result<()> {
    for manifest in ["Cargo.toml", "crates/bpf/Cargo.toml"] {
        let manifest = host::workspace().join(manifest);
        if manifest.exists() {
            sh::run(host::cargo().args(["fmt", "--all", "--check", "--manifest-path"]).arg(manifest))?;
        }
    }
    Ok(())
}

fn clippy() -> Result<()> {
    sh::run(host::cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

fn native() -> Result<Counts> {
    let mut counts = stream(cargo_test(&["--workspace", "--exclude", "cirri-e2e"], &[], None))?;
    let mut own: Vec<String> = vec!["-p".into(), "cirri-e2e".into(), "--lib".into()];
    for suite in suites()?.into_iter().filter(|s| s.ring == "native") {
        own.extend(["--test".to_owned(), suite.name]);
    }
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    counts.add(stream(cargo_test(&own, &[], None))?);
    Ok(counts)
}

/// The tests in `e2e/tests/<ring>_*.rs`: two files at a time, of each one test at a time. They share the machine's kernel,
/// and wait for events for much of their time.
fn suite(ring: &str, binary: &Path, filter: &[String]) -> Result<Counts> {
    let names: Vec<String> = suites()?.into_iter().filter(|s| s.ring == ring).map(|s| s.name).collect();
    if names.is_empty() {
        return Ok(Counts::default());
    }
    let mut build = host::cargo();
    build.args(["test", "--no-run", "-p", "cirri-e2e"]);
    build.args(names.iter().flat_map(|name| ["--test", name]));
    sh::run(&mut build)?;
    let logs = host::target().join("tests");
    std::fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;

    let (alone, mut beside): (Vec<String>, Vec<String>) =
        names.into_iter().partition(|name| ALONE.contains(&name.as_str()));
    beside.sort_by_key(|name| LONGEST.iter().position(|long| long == name).unwrap_or(LONGEST.len()));
    let queue = Mutex::new(beside.into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = |name: String| {
        eprintln!("    {name} begins");
        let mut command = cargo_test(&["-p", "cirri-e2e", "--test", &name], &harness(filter), Some(binary));
        let (status, text) = sh::in_one_piece(&mut command, &logs.join(&name).with_extension("log"))?;
        let mut tally = Tally::default();
        text.lines().for_each(|line| tally.read(line));
        Ok(tally.end(status, &sh::line(&command)))
    };
    let lane = || {
        let mut counts = Counts::default();
        while let Some(name) = next() {
            counts.add(run(name)?);
        }
        anyhow::Ok(counts)
    };
    let lanes = std::thread::scope(|scope| {
        let lanes = [scope.spawn(lane), scope.spawn(lane)];
        lanes.map(|lane| lane.join().unwrap_or_else(|_| bail!("a thread of the tests panicked")))
    });
    let mut counts = Counts::default();
    for outcome in lanes.into_iter().chain(alone.into_iter().map(run)) {
        counts.add(outcome?);
    }
    Ok(counts)
}

fn harness(filter: &[String]) -> Vec<&str> {
    std::iter::once("--test-threads=1").chain(filter.iter().map(String::as_str)).collect()
}

/// What loads a whole machine, and shows little beside others.
const ALONE: [&str; 2] = ["lab_edge_load", "lab_flood"];

/// What takes minutes begins first, so that it does not end last.
const LONGEST: [&str; 6] =
    ["lab_drift", "lab_vault", "lab_networkpolicy", "lab_services_agent", "lab_identity_change", "kernel_pins"];

/// A file of privileged or shared tests.
#[derive(Debug, PartialEq, Eq)]
struct Suite {
    name: String,
    ring: &'static str,
}

fn suites() -> Result<Vec<Suite>> {
    let directory = host::workspace().join("e2e/tests");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        if is_test_target(&path)
            && let Some(stem) = path.file_stem()
        {
            names.push(stem.to_string_lossy().into_owned());
        }
    }
    names.sort();
    names.into_iter().map(sort_into_ring).collect()
}

/// What cargo takes for a test: a file, or a directory with a `main.rs`.
fn is_test_target(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "rs") || path.join("main.rs").exists()
}

fn sort_into_ring(name: String) -> Result<Suite> {
    for ring in ["native", "kernel", "lab"] {
        if name.strip_prefix(ring).is_some_and(|rest| rest.starts_with('_')) {
            return Ok(Suite { name, ring });
        }
    }
    bail!("e2e/tests/{name} belongs to no ring: its name must start with native_, kernel_ or lab_")
}

fn cargo_test(selection: &[&str], harness: &[&str], binary: Option<&Path>) -> Command {
    let mut command: Command = host::cargo();
    command.arg("test").args(selection).arg("--no-fail-fast").env("PATH", host::search_path());
    if let Some(binary) = binary {
        command.env("CIRRI_BIN", binary);
    }
    command.arg("--").args(harness);
    command
}

/// Runs tests, each line shown as it comes.
fn stream(mut command: Command) -> Result<Counts> {
    let mut tally = Tally::default();
    let status = sh::stream(&mut command, |line| tally.read(line))?;
    Ok(tally.end(status, &sh::line(&command)))
}

/// What a run of `cargo test` printed.
#[derive(Default)]
struct Tally {
    counts: Counts,
    /// Binaries whose tests began, and ended.
    started: u64,
    ended: u64,
}

impl Tally {
    fn read(&mut self, line: &str) {
        self.counts.read(line);
        self.started +=
            u64::from(line.starts_with("running ") && (line.ends_with(" test") || line.ends_with(" tests")));
        self.ended += u64::from(line.starts_with(RESULT));
    }

    fn end(self, status: ExitStatus, line: &str) -> Counts {
        let mut counts = self.counts;
        // A test that ends its process takes the result of its binary with it.
        counts.failed += self.started.saturating_sub(self.ended);
        if !status.success() && counts.failed == 0 {
            eprintln!("`{line}` failed, but no test says so: it did not compile");
            counts.failed = 1;
        }
        counts
    }
}

/// How the line starts that a binary's tests end with.
const RESULT: &str = "test result: ";

/// How many tests did what.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Counts {
    fn add(&mut self, other: Counts) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }

    /// Takes the counts from a line such as
    /// `test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s`.
    fn read(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix(RESULT).and_then(|rest| rest.split_once(". ")) else {
            return;
        };
        for part in counts.split("; ") {
            match part.split_once(' ').map(|(n, what)| (n.parse::<u64>(), what)) {
                Some((Ok(n), "passed")) => self.passed += n,
                Some((Ok(n), "failed")) => self.failed += n,
                Some((Ok(n), "ignored")) => self.ignored += n,
                _ => {}
            }
        }
    }
}

/// What ran, and how it ended.
#[derive(Default)]
struct Report {
    rows: Vec<(String, Counts, Duration, String)>,
}

impl Report {
    /// Something that holds or does not: it counts as one.
    fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        self.record(name, || check().map(|()| Counts { passed: 1, ..Counts::default() }), |_| None);
    }

    fn ring(&mut self, name: &str, run: impl FnOnce() -> Result<Counts>) {
        self.record(name, run, fault);
    }

    /// A ring that needs root. Without, it fails: it did not run.
    fn privileged(&mut self, name: &str, run: impl FnOnce() -> Result<Counts>) {
        self.ring(name, || {
            if !host::is_root() {
                bail!("needs root, and you are not: nothing of it ran");
            }
            run()
        });
    }

    fn record(
        &mut self,
        name: &str,
        run: impl FnOnce() -> Result<Counts>,
        judge: impl FnOnce(&Counts) -> Option<String>,
    ) {
        if sh::interrupted() {
            return;
        }
        sh::step(name);
        let start = Instant::now();
        let (mut counts, mut remark) = (Counts { failed: 1, ..Counts::default() }, String::new());
        match run() {
            Ok(ran) => {
                counts = ran;
                if let Some(fault) = judge(&ran) {
                    // What did not run has not passed.
                    counts.failed += ran.ignored.max(u64::from(ran.failed == 0));
                    remark = fault;
                }
            }
            Err(error) => {
                eprintln!("{} {name}: {error:#}", sh::red("error:"));
                remark = first_line(&format!("{error:#}"));
            }
        }
        self.rows.push((name.to_owned(), counts, start.elapsed(), remark));
    }

    /// Prints the table and, as the very last line, the counts that CI reads.
    fn finish(self) -> Result<()> {
        if sh::interrupted() {
            bail!("interrupted");
        }
        let total = self.total();
        let rows: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|(name, counts, took, remark)| {
                let seconds = format!("{:.1}", took.as_secs_f64());
                vec![name.clone(), counts.passed.to_string(), counts.failed.to_string(), seconds, remark.clone()]
            })
            .collect();
        println!("\n{}", table::render(&["what", "passed", "failed", "seconds", ""], &rows));
        println!("{} passed, {} failed", total.passed, total.failed);
        if total.failed > 0 {
            // Nothing may follow the line above.
            std::process::exit(1);
        }
        Ok(())
    }

    fn total(&self) -> Counts {
        let mut total = Counts::default();
        self.rows.iter().for_each(|(_, counts, _, _)| total.add(*counts));
        total
    }
}

/// What is wrong with a ring whose tests themselves may all have passed.
fn fault(counts: &Counts) -> Option<String> {
    if counts.ignored > 0 {
        Some(format!("{} ignored: a test that does not run must not be there", counts.ignored))
    } else if counts.passed + counts.failed == 0 {
        Some("ran no test".to_owned())
    } else {
        None
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(passed: u64, failed: u64, ignored: u64) -> Counts {
        Counts { passed, failed, ignored }
    }

    fn report_of(run: impl FnOnce() -> Result<Counts>) -> Counts {
        let mut report = Report::default();
        report.ring("ring", run);
        report.total()
    }

    #[test]
    fn results_add_up_over_binaries() {
        let mut all = Counts::default();
        for line in [
            "running 5 tests",
            "test a ... ok",
            "test result: ok. 4 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 9 filtered out; finished in 1.20s",
            "a test that prints: 7 passed; 7 failed",
        ] {
            all.read(line);
        }
        assert_eq!(all, counts(6, 3, 1));
    }

    #[test]
    fn a_ring_that_ran_nothing_fails() {
        assert_eq!(report_of(|| Ok(counts(0, 0, 0))), counts(0, 1, 0));
        assert_eq!(report_of(|| Ok(counts(3, 0, 0))), counts(3, 0, 0));
    }

    #[test]
    fn an_ignored_test_is_a_failed_one() {
        assert_eq!(report_of(|| Ok(counts(3, 0, 2))), counts(3, 2, 2));
        assert_eq!(report_of(|| Ok(counts(3, 1, 2))), counts(3, 3, 2));
    }

    #[test]
    fn a_ring_that_could_not_start_fails_once() {
        assert_eq!(report_of(|| bail!("no")), counts(0, 1, 0));
    }

    #[test]
    fn every_suite_belongs_to_a_ring() {
        assert_eq!(sort_into_ring("lab_policy".into()).unwrap().ring, "lab");
        assert_eq!(sort_into_ring("kernel_fixtures".into()).unwrap().ring, "kernel");
        assert_eq!(sort_into_ring("native_oracle".into()).unwrap().ring, "native");
        assert!(sort_into_ring("labour".into()).is_err());
    }
}
