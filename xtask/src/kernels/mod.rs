//! `kernels`: the programs, and the node around them, on kernels other than this machine's.
//!
//! Each of Debian's kernels is booted under qemu, without acceleration, with a file system in memory that holds the
//! binary, the tests and what both need. What a guest does is one list of steps ([`steps::STEPS`]); what came of it is
//! read off its console. Nothing is installed on this machine but qemu and a static busybox; packages of kernels are
//! taken apart under `target/kernels`.

mod guest;
mod image;
mod steps;

use crate::build::{self, Profile};
use crate::setup::{self, Need};
use crate::{host, product, sh, table, verify};
use anyhow::{Result, bail};
use guest::Outcome;
use image::Kernel;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use steps::Step;

/// The kernels that are tried, oldest first. The first is the oldest that Cirri is for
/// (`cirri_loader::OLDEST_KERNEL`).
pub const SERIES: [&str; 2] = ["6.1", "6.12"];

/// What the command was asked for.
struct Wanted {
    bless: bool,
    only_load: bool,
    /// Steps by name; none are all.
    steps: Vec<String>,
    kernels: Vec<Source>,
}

/// Where a kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    /// A series such as 6.1, of the package archive.
    Series(String),
    /// A package that somebody has.
    Package(PathBuf),
}

/// Every step on the kernels named, or on all.
pub fn command(arguments: &[String]) -> Result<()> {
    let wanted = parse(arguments)?;
    product::need_root("kernels")?;
    setup::ensure(&[Need::Build, Need::Lab, Need::Kernels])?;
    build::object()?;
    let binary = build::binary(Profile::Debug)?;
    let steps = |old: bool| -> Vec<&'static Step> {
        let all = if old { steps::REFUSAL } else { steps::STEPS };
        let is_named =
            |step: &&Step| old || wanted.steps.is_empty() || wanted.steps.iter().any(|name| name == step.name);
        all.iter().filter(|step| step.loads || !wanted.only_load).filter(is_named).collect()
    };
    let machines = prepare(&binary, &wanted.kernels, steps)?;
    let mut ran = Vec::new();
    for machine in machines {
        sh::step(&format!("Linux {}: {} steps under qemu", machine.kernel.release, machine.steps.len()));
        ran.push(machine.run(|line| println!("{line}"))?);
    }
    conclude(&ran, wanted.bless)
}

/// Kernels that load every program while other checks run.
pub struct Loading(JoinHandle<Result<Vec<Ran>>>);

/// Begins to load every program on every kernel, on a thread of its own.
pub fn begin_loading(binary: &Path) -> Result<Loading> {
    let kernels = SERIES.map(|series| Source::Series(series.to_owned()));
    let machines = prepare(binary, &kernels, |_| steps::STEPS.iter().filter(|step| step.loads).collect())?;
    let releases: Vec<&str> = machines.iter().map(|machine| machine.kernel.release.as_str()).collect();
    sh::step(&format!("in the background: every program on Linux {}", releases.join(" and ")));
    let all = move || machines.into_iter().map(|machine| machine.run(|_| ())).collect();
    Ok(Loading(std::thread::spawn(all)))
}

impl Loading {
    /// Waits for it, and says what came of it.
    pub fn finish(self) -> Result<()> {
        if !self.0.is_finished() {
            eprintln!("it is still at work");
        }
        let ran = self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        conclude(&ran, false)
    }
}

/// A kernel with a file system, ready to be booted.
struct Machine {
    kernel: Kernel,
    image: PathBuf,
    steps: Vec<&'static Step>,
}

/// One that was.
struct Ran {
    kernel: Kernel,
    steps: Vec<&'static Step>,
    outcome: Outcome,
}

impl Machine {
    fn run(self, show: impl Fn(&str)) -> Result<Ran> {
        let outcome = guest::run(&self.kernel, &self.image, show)?;
        Ok(Ran { kernel: self.kernel, steps: self.steps, outcome })
    }
}

/// Gets the kernels and makes their file systems. `steps` says what is done, also on a kernel that is too old.
fn prepare(binary: &Path, kernels: &[Source], steps: impl Fn(bool) -> Vec<&'static Step>) -> Result<Vec<Machine>> {
    let mut chosen = Vec::new();
    for source in kernels {
        let kernel = match source {
            Source::Series(series) => image::kernel(series)?,
            Source::Package(path) => image::kernel_of(path)?,
        };
        let steps = steps(is_too_old(&kernel.series()));
        chosen.push((kernel, steps));
    }
    let all: Vec<&Step> = chosen.iter().flat_map(|(_, steps)| steps).copied().collect();
    let programs = image::programs(binary, &all)?;
    let machine = |(kernel, steps): (Kernel, Vec<&'static Step>)| {
        let image = image::build(&kernel, &programs, &guest::script(&steps))?;
        Ok(Machine { kernel, image, steps })
    };
    chosen.into_iter().map(machine).collect()
}

fn is_too_old(series: &str) -> bool {
    let numbers = |series: &str| -> Vec<u32> { series.split('.').filter_map(|part| part.parse().ok()).collect() };
    numbers(series) < numbers(SERIES[0])
}

/// Shows the table; fails if something did not go well.
fn conclude(ran: &[Ran], bless: bool) -> Result<()> {
    let mut faults = Vec::new();
    for Ran { kernel, steps, outcome } in ran {
        let series = kernel.series();
        faults.extend(judge(outcome, &series, steps));
        if let Some(json) = outcome.printed(steps::LOAD) {
            faults.extend(budget(&series, &kernel.release, json, bless));
        }
    }
    println!("{}", show(ran));
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    Ok(())
}

/// What did not go well, in words.
fn judge(outcome: &Outcome, series: &str, steps: &[&Step]) -> Vec<String> {
    let failed = |step: &&&Step| outcome.code(step.name) != Some(0);
    let fault = |step: &&Step| {
        let what = match outcome.code(step.name) {
            Some(code) => format!("ended with {code}"),
            None => "was not reached".to_owned(),
        };
        format!("Linux {series}: {} {what}; the console is in {}", step.name, outcome.log.display())
    };
    let missed = |step: &&&Step| {
        outcome.code(step.name) == Some(0) && step.parts.iter().any(|part| outcome.code(part.name).is_none())
    };
    let silent = |step: &&Step| format!("Linux {series}: {} left out a part of what it does", step.name);
    let failures = steps.iter().filter(failed).map(fault);
    failures.chain(steps.iter().filter(missed).map(silent)).collect()
}

/// What the verifier of this kernel walked, against its budget.
fn budget(series: &str, release: &str, json: &str, bless: bool) -> Option<String> {
    let path = verify::budget_of(series);
    println!("Linux {release}: what its verifier walked");
    let done =
        if bless { verify::bless(&path, COMMAND, release, json) } else { verify::compare_with(&path, COMMAND, json) };
    done.err().map(|error| format!("Linux {series}: {error:#}"))
}

/// What writes the budgets of kernels.
const COMMAND: &str = "cargo xtask kernels";

/// A row for each step and each part of one, a column for each kernel.
fn show(ran: &[Ran]) -> String {
    let mut head = vec!["step"];
    head.extend(ran.iter().map(|ran| ran.kernel.release.as_str()));
    let mut rows: Vec<(&str, &str)> = Vec::new();
    for step in ran.iter().flat_map(|ran| &ran.steps) {
        let of_step = std::iter::once((step.name, step.about));
        let new = of_step.chain(step.parts.iter().map(|part| (part.name, part.about)));
        new.for_each(|row| {
            if !rows.contains(&row) {
                rows.push(row)
            }
        });
    }
    let cells: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(name, about)| std::iter::once(about.to_owned()).chain(ran.iter().map(|ran| ran.cell(name))).collect())
        .collect();
    table::render(&head, &cells)
}

impl Ran {
    fn cell(&self, name: &str) -> String {
        let does = |step: &&Step| step.name == name || step.parts.iter().any(|part| part.name == name);
        match (self.outcome.code(name), self.outcome.times(name)) {
            _ if !self.steps.iter().any(does) => "-".to_owned(),
            (Some(0), Some((seconds, took))) => format!("ok, {seconds} s ({} here)", sh::clock(took)),
            (Some(code), _) => format!("FAILED ({code})"),
            (None, _) => "not reached".to_owned(),
        }
    }
}

fn parse(arguments: &[String]) -> Result<Wanted> {
    let mut wanted = Wanted { bless: false, only_load: false, steps: Vec::new(), kernels: Vec::new() };
    for argument in arguments {
        match argument.as_str() {
            "--bless" => wanted.bless = true,
            "--load" => wanted.only_load = true,
            name if steps::STEPS.iter().any(|step| step.name == name) => wanted.steps.push(name.to_owned()),
            package if package.ends_with(".deb") => wanted.kernels.push(Source::Package(package.into())),
            series if series.starts_with(|c: char| c.is_ascii_digit()) => {
                wanted.kernels.push(Source::Series(series.to_owned()));
            }
            other => bail!(
                "`{COMMAND}` takes --load, --bless, steps ({}), versions such as 6.12 and packages of kernels (….deb), \
                 but got `{other}`",
                steps::STEPS.iter().map(|step| step.name).collect::<Vec<_>>().join(", ")
            ),
        }
    }
    if wanted.kernels.is_empty() {
        wanted.kernels = SERIES.map(|series| Source::Series(series.to_owned())).to_vec();
    }
    Ok(wanted)
}

/// Where packages, file systems and consoles are.
fn directory() -> PathBuf {
    host::target().join("kernels")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guide_and_the_loader_name_the_oldest_kernel_that_is_tried() {
        let read = |path: &str| std::fs::read_to_string(host::workspace().join(path)).unwrap();
        let oldest = SERIES[0];
        let says = format!("Linux {oldest} or newer");
        for path in ["README.md", "CONTRIBUTING.md", "docs/guide/install.md"] {
            assert!(read(path).contains(&says), "{path} does not say `{says}`");
        }
        let (major, minor) = oldest.split_once('.').unwrap();
        let constant = format!("pub const OLDEST_KERNEL: (u8, u8) = ({major}, {minor});");
        assert!(read("crates/loader/src/features.rs").contains(&constant), "{constant}");
        let refusal = format!("Cirri needs Linux {oldest} or later");
        assert!(steps::REFUSAL.iter().any(|step| step.line.contains(&refusal)), "no step waits for `{refusal}`");
    }

    #[test]
    fn all_kernels_are_tried_unless_some_are_named() {
        assert_eq!(parse(&[]).unwrap().kernels.len(), SERIES.len());
        let wanted = parse(&["6.12", "--load", "a.deb", "lb"].map(str::to_owned)).unwrap();
        assert_eq!(wanted.kernels, [Source::Series("6.12".to_owned()), Source::Package("a.deb".into())]);
        assert!(wanted.only_load && !wanted.bless);
        assert_eq!(wanted.steps, ["lb"]);
        assert!(parse(&["--laod".to_owned()]).is_err());
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert!(is_too_old("5.10") && is_too_old("4.19"));
        assert!(!is_too_old("6.1") && !is_too_old("6.12"));
    }
}
