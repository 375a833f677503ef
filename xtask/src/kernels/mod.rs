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
use steps::Step;

/// The kernels that are tried, oldest first. The first is the oldest that Cirri is for
/// (`cirri_loader::OLDEST_KERNEL`).
pub const SERIES: [&str; 2] = ["6.1", "6.12"];

/// What the command was asked for.
struct Wanted {
    bless: bool,
    only_load: bool,
    series: Vec<String>,
}

/// Every step on the kernels named, or on all.
pub fn command(arguments: &[String]) -> Result<()> {
    let wanted = parse(arguments)?;
    product::need_root("kernels")?;
    setup::ensure(&[Need::Build, Need::Kernels])?;
    build::object()?;
    let binary = build::binary(Profile::Debug)?;
    let steps = steps::STEPS.iter().filter(|step| !wanted.only_load || step.loads).collect::<Vec<_>>();
    run(&binary, &wanted.series, &steps, wanted.bless)
}

fn run(binary: &std::path::Path, series: &[String], steps: &[&Step], bless: bool) -> Result<()> {
    let programs = image::programs(binary, steps)?;
    let mut columns = Vec::new();
    let mut faults = Vec::new();
    for series in series {
        let kernel = image::kernel(series)?;
        let image = image::build(&kernel, &programs, &guest::script(steps))?;
        sh::step(&format!("Linux {}: {} steps under qemu", kernel.release, steps.len()));
        let outcome = guest::run(&kernel, &image)?;
        faults.extend(judge(&outcome, series, steps));
        if let Some(json) = outcome.printed(steps::LOAD) {
            faults.extend(budget(series, &kernel.release, json, bless));
        }
        columns.push((kernel.release, outcome));
    }
    println!("{}", show(steps, &columns));
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
    steps.iter().filter(failed).map(fault).collect()
}

/// What the verifier of this kernel walked, against its budget.
fn budget(series: &str, release: &str, json: &str, bless: bool) -> Option<String> {
    let path = verify::budget_of(series);
    let done = if bless { verify::bless(&path, release, json) } else { verify::compare_with(&path, json) };
    done.err().map(|error| format!("Linux {series}: {error:#}"))
}

/// A row for each step, a column for each kernel.
fn show(steps: &[&Step], columns: &[(String, Outcome)]) -> String {
    let mut head = vec!["step"];
    head.extend(columns.iter().map(|(release, _)| release.as_str()));
    let cell = |outcome: &Outcome, step: &Step| match (outcome.code(step.name), outcome.seconds(step.name)) {
        (Some(0), Some(seconds)) => format!("ok ({seconds} s)"),
        (Some(0), None) => "ok".to_owned(),
        (Some(code), _) => format!("FAILED ({code})"),
        (None, _) => "not reached".to_owned(),
    };
    let rows: Vec<Vec<String>> = steps
        .iter()
        .map(|step| {
            let cells = columns.iter().map(|(_, outcome)| cell(outcome, step));
            std::iter::once(step.about.to_owned()).chain(cells).collect()
        })
        .collect();
    table::render(&head, &rows)
}

fn parse(arguments: &[String]) -> Result<Wanted> {
    let mut wanted = Wanted { bless: false, only_load: false, series: Vec::new() };
    for argument in arguments {
        match argument.as_str() {
            "--bless" => wanted.bless = true,
            "--load" => wanted.only_load = true,
            series if series.starts_with(|c: char| c.is_ascii_digit()) => wanted.series.push(series.to_owned()),
            other => bail!("`cargo xtask kernels` takes --load, --bless and versions such as 6.12, but got `{other}`"),
        }
    }
    if wanted.series.is_empty() {
        wanted.series = SERIES.map(str::to_owned).to_vec();
    }
    Ok(wanted)
}

/// Where packages, file systems and consoles are.
fn directory() -> std::path::PathBuf {
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
    }

    #[test]
    fn all_kernels_are_tried_unless_some_are_named() {
        assert_eq!(parse(&[]).unwrap().series, SERIES);
        let wanted = parse(&["6.12".to_owned(), "--load".to_owned()]).unwrap();
        assert_eq!((wanted.series.as_slice(), wanted.only_load), (["6.12".to_owned()].as_slice(), true));
        assert!(parse(&["--laod".to_owned()]).is_err());
    }
}
