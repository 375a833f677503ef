//! `verify`: what the kernel's verifier makes of each program, against the bill in `verify/budget.toml`.
//!
//! A program that quietly grows is met here, before some older kernel refuses to load it.

use crate::build::{self, Profile};
use crate::setup::{self, Need};
use crate::{host, product, sh, table};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// No program may cost the verifier more than this, budget or not: a fifth of what it allows.
const MOST_VERIFIED: u64 = 200_000;
/// How much a figure may grow, in per cent.
const SLACK: u64 = 10;

/// What writes the budget of this machine's kernel.
const COMMAND: &str = "cargo xtask verify";

pub fn command(bless: bool) -> Result<()> {
    product::need_root("verify")?;
    setup::ensure(&[Need::Build, Need::Lab])?;
    build::object()?;
    let binary = build::binary(Profile::Debug)?;
    if bless {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        self::bless(&budget_path(), COMMAND, &kernel, &measure(&binary)?)
    } else {
        check(&binary)
    }
}

/// Measures the programs in `binary`, prints the comparison, and fails when one is over budget.
pub fn check(binary: &Path) -> Result<()> {
    compare_with(&budget_path(), COMMAND, &measure(binary)?)
}

/// The budget of another kernel.
pub fn budget_of(series: &str) -> PathBuf {
    host::workspace().join(format!("verify/linux-{series}.toml"))
}

/// Holds what `cirri bench verify -o json` printed against a budget, prints the comparison, and fails when a
/// program is over it. `command` is what writes the budget.
pub fn compare_with(path: &Path, command: &str, json: &str) -> Result<()> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{} is missing: `{command} --bless` writes it", path.display()))?;
    let budget = parse_budget(&text).with_context(|| format!("{} cannot be read", path.display()))?;
    let (rows, faults) = compare(&budget, &parse_measured(json)?);
    println!("{}", table::render(&["program", "verified", "stack", "xlated", "jited"], &rows));
    if !faults.is_empty() {
        bail!("{}\nIf the growth is worth it: `{command} --bless`, and say why in the commit", faults.join("\n"));
    }
    Ok(())
}

/// Writes what was measured as the budget.
pub fn bless(path: &Path, command: &str, kernel: &str, json: &str) -> Result<()> {
    let measured = parse_measured(json)?;
    let over: Vec<String> = measured.iter().filter_map(|(name, bill)| too_costly(name, bill)).collect();
    if !over.is_empty() {
        bail!("{}", over.join("\n"));
    }
    let directory = path.parent().context("the budget's path has no directory")?;
    std::fs::create_dir_all(directory)?;
    std::fs::write(path, write_budget(&measured, command, kernel, host::architecture()?))?;
    println!("{} programs written to {}", measured.len(), path.display());
    Ok(())
}

/// What one program costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Bill {
    /// Instructions the verifier walked.
    verified: u64,
    /// Bytes of stack, over the deepest chain of calls.
    stack: u64,
    /// Bytes of BPF instructions after the kernel's rewriting.
    xlated: u64,
    /// Bytes of machine code. Shown, not judged: it depends on the processor.
    jited: u64,
}

const FIGURES: [&str; 4] = ["verified", "stack", "xlated", "jited"];

impl Bill {
    fn figures(&self) -> [u64; 4] {
        [self.verified, self.stack, self.xlated, self.jited]
    }

    fn set(&mut self, figure: &str, value: u64) -> Result<()> {
        match figure {
            "verified" => self.verified = value,
            "stack" => self.stack = value,
            "xlated" => self.xlated = value,
            "jited" => self.jited = value,
            other => bail!("`{other}` is no figure of a program; there are {}", FIGURES.join(", ")),
        }
        Ok(())
    }
}

type Bills = BTreeMap<String, Bill>;

fn budget_path() -> PathBuf {
    host::workspace().join("verify/budget.toml")
}

fn measure(binary: &Path) -> Result<String> {
    sh::capture(product::command(binary).args(["bench", "verify", "-o", "json"]))
}

/// A list of programs, each with its name and the four figures.
fn parse_measured(json: &str) -> Result<Bills> {
    let value: serde_json::Value =
        serde_json::from_str(json).context("`cirri bench verify -o json` answered what this command cannot read")?;
    let programs = value.get("programs").unwrap_or(&value).as_array().context("no list of programs")?;
    let mut bills = Bills::new();
    for program in programs {
        let name = program.get("name").and_then(|n| n.as_str()).context("a program without a `name`")?;
        let mut bill = Bill::default();
        for figure in FIGURES {
            let value = program.get(figure).and_then(serde_json::Value::as_u64);
            bill.set(figure, value.with_context(|| format!("program {name} without a number `{figure}`"))?)?;
        }
        bills.insert(name.to_owned(), bill);
    }
    if bills.is_empty() {
        bail!("the list of programs is empty");
    }
    Ok(bills)
}

/// The rows to print and what is wrong.
fn compare(budget: &Bills, measured: &Bills) -> (Vec<Vec<String>>, Vec<String>) {
    let mut faults = Vec::new();
    let mut rows = Vec::new();
    for (name, bill) in measured {
        faults.extend(too_costly(name, bill));
        let planned = budget.get(name);
        if planned.is_none() {
            faults.push(format!("{name} has no budget"));
        }
        let mut row = vec![name.clone()];
        for (i, (figure, now)) in FIGURES.iter().zip(bill.figures()).enumerate() {
            let before = planned.and_then(|p| p.figures().get(i).copied());
            row.push(difference(before, now));
            if let Some(before) = before
                && *figure != "jited"
                && now * 100 > before * (100 + SLACK)
            {
                faults.push(format!("{name}: {figure} grew from {before} to {now}, more than {SLACK} %"));
            }
        }
        rows.push(row);
    }
    for name in budget.keys().filter(|name| !measured.contains_key(*name)) {
        faults.push(format!("{name} has a budget, but the object has no such program"));
    }
    (rows, faults)
}

fn too_costly(name: &str, bill: &Bill) -> Option<String> {
    (bill.verified > MOST_VERIFIED).then(|| {
        format!("{name}: the verifier walked {} instructions, more than the {MOST_VERIFIED} allowed", bill.verified)
    })
}

fn difference(before: Option<u64>, now: u64) -> String {
    match before {
        None => format!("{now} (new)"),
        Some(before) if before == now => now.to_string(),
        Some(before) => {
            let change = i128::from(now) - i128::from(before);
            let percent = if before == 0 { 100.0 } else { change as f64 * 100.0 / before as f64 };
            format!("{now} ({change:+}, {percent:+.1} %)")
        }
    }
}

fn write_budget(bills: &Bills, command: &str, kernel: &str, architecture: &str) -> String {
    let mut text = format!(
        "# What each program may cost the verifier. Written by `{command} --bless`\n\
         # on Linux {kernel}, {architecture}; `{command}` fails at more than +{SLACK} %.\n\
         # verified: instructions walked; stack, xlated, jited: bytes (jited is shown, not judged).\n"
    );
    for (name, bill) in bills {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n[{name}]\n");
        for (figure, value) in FIGURES.iter().zip(bill.figures()) {
            let _ = writeln!(text, "{figure} = {value}");
        }
    }
    text
}

/// Reads the subset of TOML that [`write_budget`] writes, and refuses anything else.
fn parse_budget(text: &str) -> Result<Bills> {
    let mut bills = Bills::new();
    let mut program: Option<String> = None;
    for (number, line) in text.lines().enumerate().map(|(i, l)| (i + 1, l.trim())) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            if bills.insert(name.to_owned(), Bill::default()).is_some() {
                bail!("line {number}: program {name} stands here twice");
            }
            program = Some(name.to_owned());
            continue;
        }
        let assignment = line.split_once('=').and_then(|(k, v)| Some((k.trim(), v.trim().parse::<u64>().ok()?)));
        let (Some((figure, value)), Some(bill)) = (assignment, program.as_ref().and_then(|p| bills.get_mut(p))) else {
            bail!("line {number}: expected `[program]` or `figure = number` below one, found `{line}`");
        };
        bill.set(figure, value).with_context(|| format!("line {number}"))?;
    }
    Ok(bills)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bills(verified: u64, stack: u64) -> Bills {
        Bills::from([("from_workload".to_owned(), Bill { verified, stack, xlated: 5000, jited: 3000 })])
    }

    #[test]
    fn a_budget_reads_back_as_it_was_written() {
        let written = bills(1500, 240);
        assert_eq!(parse_budget(&write_budget(&written, COMMAND, "6.18", "x86_64")).unwrap(), written);
    }

    #[test]
    fn a_budget_that_is_not_ours_is_refused_with_its_line() {
        for (text, says) in [
            ("[p]\nverified = many\n", "line 2"),
            ("verified = 3\n", "line 1"),
            ("[p]\ncolour = 3\n", "colour"),
            ("[p]\n[p]\n", "twice"),
        ] {
            let error = format!("{:#}", parse_budget(text).unwrap_err());
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }

    #[test]
    fn ten_per_cent_pass_and_more_does_not() {
        assert!(compare(&bills(1000, 200), &bills(1100, 220)).1.is_empty());
        assert!(compare(&bills(1000, 200), &bills(10, 20)).1.is_empty());
        let faults = compare(&bills(1000, 200), &bills(1101, 200)).1;
        assert_eq!(faults.len(), 1);
        assert!(faults.iter().all(|f| f.contains("verified grew from 1000 to 1101")), "{faults:?}");
        assert_eq!(compare(&bills(1000, 200), &bills(1000, 221)).1.len(), 1);
    }

    #[test]
    fn programs_must_be_the_same_on_both_sides() {
        assert!(compare(&Bills::new(), &bills(1, 1)).1.iter().any(|f| f.contains("no budget")));
        assert!(compare(&bills(1, 1), &Bills::new()).1.iter().any(|f| f.contains("no such program")));
    }

    #[test]
    fn no_budget_allows_a_program_over_the_limit() {
        let huge = bills(MOST_VERIFIED + 1, 8);
        assert!(compare(&huge, &huge).1.iter().any(|f| f.contains("more than the 200000 allowed")));
    }

    #[test]
    fn the_products_answer_is_read_with_or_without_a_frame() {
        let program = r#"{"name":"from_workload","verified":1500,"stack":240,"xlated":5000,"jited":3000}"#;
        let list = format!("[{program}]");
        assert_eq!(parse_measured(&list).unwrap(), bills(1500, 240));
        assert_eq!(parse_measured(&format!("{{\"programs\":{list}}}")).unwrap(), bills(1500, 240));
        assert!(parse_measured("[]").is_err());
        let error = parse_measured(r#"[{"name":"p","verified":1}]"#).unwrap_err().to_string();
        assert!(error.contains("program p without a number `stack`"), "{error}");
    }
}
