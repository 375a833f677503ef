//! Asking from inside a node: a process in the node's control group, with a thread in each source's namespace.
//!
//! A socket belongs to the control group of the process that makes it, so that probes of a node and of its pods are
//! made by a process of that node, the hidden command `cirri lab __ask`. It reads a [`Request`] and prints the answers.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::prober::{self, Job, Outcome, Patience};
use super::process::own_binary;
use super::{cgroup, netns};
use crate::output;

/// Arguments of the hidden command.
#[derive(Debug, clap::Args)]
pub struct AskArgs {
    /// The control group to ask from.
    group: PathBuf,
}

/// Questions of one source.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Asker {
    /// Its network namespace.
    pub netns: PathBuf,
    /// What it asks.
    pub jobs: Vec<Job>,
}

/// What one process asks.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    patience: Patience,
    askers: Vec<Asker>,
}

/// For each asker, for each of its jobs, the outcome of each try.
type Answers = Vec<Vec<Vec<Outcome>>>;

/// Asks everything, all groups at once; the answers come in the order of the questions.
///
/// # Errors
/// A namespace or a group cannot be entered.
pub fn ask(groups: Vec<(PathBuf, Vec<Asker>)>, patience: Patience) -> anyhow::Result<Vec<Answers>> {
    let answers: Vec<anyhow::Result<Answers>> = std::thread::scope(|scope| {
        let asking: Vec<_> = groups
            .into_iter()
            .map(|(group, askers)| scope.spawn(move || ask_from(&group, &Request { patience, askers })))
            .collect();
        asking.into_iter().map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    answers.into_iter().collect()
}

fn ask_from(group: &Path, request: &Request) -> anyhow::Result<Answers> {
    cgroup::add(group)?;
    let mut child = Command::new(own_binary()?)
        .args(["lab", "__ask"])
        .arg(group)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start a prober")?;
    let mut input = child.stdin.take().context("the prober has no standard input")?;
    // One that fails before it reads says why on its standard error.
    let _ = input.write_all(&serde_json::to_vec(request)?);
    drop(input);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim().trim_start_matches("cirri: "));
    }
    serde_json::from_slice(&output.stdout).context("a prober's answer cannot be read")
}

/// The process that asks.
///
/// # Errors
/// As for [`ask`].
pub fn run(args: &AskArgs) -> anyhow::Result<ExitCode> {
    super::echo::raise_file_limit();
    cgroup::enter(&args.group)?;
    let mut text = Vec::new();
    std::io::stdin().read_to_end(&mut text)?;
    let request: Request = serde_json::from_slice(&text).context("the questions cannot be read")?;
    let answers: Vec<anyhow::Result<_>> = std::thread::scope(|scope| {
        let asking: Vec<_> = request
            .askers
            .into_iter()
            .map(|Asker { netns, jobs }| {
                scope.spawn(move || netns::within_async(&netns, || prober::probe_all(jobs, request.patience)))
            })
            .collect();
        asking.into_iter().map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let answers: Answers = answers.into_iter().collect::<anyhow::Result<_>>()?;
    output::write_out(&serde_json::to_string(&answers)?)?;
    Ok(ExitCode::SUCCESS)
}
