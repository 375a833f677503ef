//! `cirri lab down`: removes a lab, from whatever is left of it.

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;

use super::cgroup;
use super::disk;
use super::lock::LockError;
use super::logs;
use super::netns::{self, NsId};
use super::process;
use super::state::{DEFAULT_NAME, LabName};
use super::traces;
use crate::output;

/// Rounds of killing: a process may start another while the first round looks for it.
const KILL_ROUNDS: usize = 5;

/// Arguments of `cirri lab down`.
#[derive(Debug, clap::Args)]
pub struct DownArgs {
    /// The lab.
    #[arg(long, default_value = DEFAULT_NAME, conflicts_with = "all")]
    name: LabName,
    /// Every lab of this machine.
    #[arg(long)]
    all: bool,
    /// Leave its logs where they are, until the next `up` or `down` of that name.
    #[arg(long)]
    keep_logs: bool,
}

/// Carries the command out.
///
/// # Errors
/// What would not go.
pub fn run(args: DownArgs) -> anyhow::Result<ExitCode> {
    let names = if args.all { traces::all() } else { vec![args.name] };
    let mut problems = Vec::new();
    for name in &names {
        match one(name, args.keep_logs) {
            Ok(true) => output::progress(&format!("lab \"{name}\" is gone")),
            Ok(false) => output::progress(&format!("there is no lab \"{name}\"")),
            Err(problem) => problems.push(format!("lab \"{name}\": {:#}", disk::explain(name, problem))),
        }
    }
    if names.is_empty() {
        output::progress("there are no labs");
    }
    if problems.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    bail!("{}", problems.join("\ncirri: "))
}

fn one(name: &LabName, keep_logs: bool) -> anyhow::Result<bool> {
    let _lock = match name.lock() {
        // Who else would change it needs a file of that kind, too, so that it can be taken down without.
        Err(LockError::Unmade { .. }) => None,
        other => Some(other?),
    };
    if keep_logs { remove_all_but_logs(name) } else { remove(name) }
}

/// Removes everything that belongs to a lab and nothing else: the processes in its namespaces and control groups
/// and those its records name, its namespaces, its control groups, its pins, its state directory. Says whether there was anything.
///
/// # Errors
/// What would not go; the rest is removed all the same.
pub fn remove(name: &LabName) -> anyhow::Result<bool> {
    take_down(name, |directory| fs::remove_dir_all(directory))
}

/// The same, but logs stay where they are: errors point to them.
///
/// # Errors
/// As for [`remove`].
pub fn remove_all_but_logs(name: &LabName) -> anyhow::Result<bool> {
    take_down(name, logs::keep)
}

fn take_down(name: &LabName, clear: impl FnOnce(&Path) -> io::Result<()>) -> anyhow::Result<bool> {
    let namespaces = netns::list(&name.prefix());
    let directory = name.directory();
    let existed = traces::exists(name);

    let own = netns::id(Path::new("/proc/self/ns/net"));
    let ids: Vec<NsId> = namespaces.iter().filter_map(|name| netns::id(&netns::path(name))).collect();
    if own.is_some_and(|own| ids.contains(&own)) {
        bail!("this command runs inside the lab \"{name}\": run it from outside");
    }
    let group = cgroup::of_lab(name);
    let mut problems = Vec::new();
    for _ in 0..KILL_ROUNDS {
        let mut processes = process::inside(&ids);
        processes.extend(process::recorded_below(&directory));
        processes.extend(group.iter().flat_map(|group| cgroup::inside(group)));
        processes.sort();
        processes.dedup();
        if processes.is_empty() {
            break;
        }
        if let Err(problem) = process::kill(&processes) {
            problems.push(format!("{problem:#}"));
            break;
        }
    }
    for namespace in &namespaces {
        if let Err(problem) = netns::delete(namespace) {
            problems.push(format!("cannot remove the network namespace {namespace}: {problem}"));
        }
    }
    // Looked up only now: an agent that had just started may have pinned until it was killed. Before the control group
    // goes, by whose lock other mount namespaces know that somebody is at it.
    let mut removed: Vec<_> = traces::pins(name).into_iter().map(|pins| (fs::remove_dir_all(&pins), pins)).collect();
    match group.map(|group| cgroup::remove(&group)) {
        Ok(Ok(())) => {}
        Ok(Err(problem)) => problems.push(format!("{problem:#}")),
        // Of a lab that was not there there are none.
        Err(_) if !existed => {}
        Err(problem) => problems.push(format!("its control groups cannot be looked for: {problem:#}")),
    }
    // What agents changed in the namespaces went with them.
    if let Err(problem) = crate::settings::forget(&format!("agent {}", name.bpf_instance(""))) {
        problems.push(format!("cannot remove the records of settings: {problem}"));
    }
    removed.push((clear(&directory), directory));
    for (outcome, directory) in removed {
        match outcome {
            Err(problem) if problem.kind() != io::ErrorKind::NotFound => {
                problems.push(format!("cannot remove {}: {problem}", directory.display()));
            }
            _ => {}
        }
    }
    if problems.is_empty() {
        return Ok(existed);
    }
    bail!("the rest of it is gone, but {}", problems.join("; "))
}
