//! `cirri lab`: nodes and pods on one machine, out of network namespaces.
//!
//! A lab is a small cluster whose nodes run the real agent, whose pods are attached by the real CNI plugin and
//! whose manifests are plain Kubernetes YAML. Nothing in it is imitated but the machines: the demo, the end-to-end
//! tests and the benchmarks stand on it, and so does anyone who wants to try a policy before it ships.
//!
//! What a lab called `lab` consists of (all of it goes with `cirri lab down`):
//!
//! | what | where |
//! |---|---|
//! | the underlay: a bridge, the router to the world, etcd | namespace `cirri-lab-net` |
//! | one agent per node | namespaces `cirri-lab-<node>` |
//! | a host outside the cluster | namespace `cirri-lab-world` |
//! | pods | namespaces `cirri-lab-pod-<namespace>-<pod>` |
//! | control groups of nodes and pods | `cirri-lab-lab/<node>/<namespace>_<pod>` |
//! | logs, records, the agents' state | `/run/cirri/lab/lab/` |
//! | pinned maps and programs | `/sys/fs/bpf/cirri/lab-lab-<node>/` |
//!
//! Exit codes: 0 done; 1 it failed; 2 the input is wrong and nothing was changed; 3 an agent or the store cannot be
//! reached; 4 a single probe did not get through; 130 interrupted. `exec` ends with the exit code of the program it ran.

pub mod agent;
mod allot;
pub mod apply;
mod ask;
pub mod cgroup;
pub mod cluster;
pub mod disk;
pub mod down;
mod echo;
mod exec;
mod expand;
pub mod interrupt;
mod list;
mod load;
mod lock;
pub mod logs;
mod manifests;
mod matrix;
mod names;
pub mod netns;
pub mod pods;
mod probe;
mod prober;
pub mod process;
mod ready;
mod restart;
mod routes;
mod service;
mod spaces;
pub mod state;
mod status;
mod traces;
pub mod underlay;
pub mod up;

use std::process::ExitCode;

use clap::{Args, Subcommand};

use self::cluster::NotReachable;
use self::interrupt::Interrupted;
use self::manifests::Rejected;
use crate::exit::{Error, Failure};
use crate::output;

/// Exit code of a single probe that did not get through.
const EXIT_DENIED: u8 = 4;
/// Exit code after SIGINT, as shells count it.
const EXIT_INTERRUPTED: u8 = 130;

/// Nodes and pods on this machine, out of network namespaces.
#[derive(Debug, Args)]
pub struct LabArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Bring a lab up: its nodes, each with a real agent, and a host outside.
    Up(up::UpArgs),
    /// Make the lab equal to a folder of manifests (Namespace, Pod, NetworkPolicy, Node).
    Apply(apply::ApplyArgs),
    /// Run a program inside a pod, a node or the outside host.
    Exec(exec::ExecArgs),
    /// Make real connections and say what gets through.
    Probe(probe::ProbeArgs),
    /// Print what a pod's programs wrote.
    Logs(exec::LogsArgs),
    /// List labs with their nodes and pods.
    List(list::ListArgs),
    /// Restart a node's agent; its packet path goes on meanwhile.
    Restart(restart::RestartArgs),
    /// Take a lab down, also one that crashed half-way.
    Down(down::DownArgs),
    /// The built-in echo server of pods that only declare ports.
    #[command(name = "__echo", hide = true)]
    Echo(echo::EchoArgs),
    /// Ask on behalf of a node and its pods.
    #[command(name = "__ask", hide = true)]
    Ask(ask::AskArgs),
    /// Become a program inside a control group.
    #[command(name = "__in", hide = true)]
    In(cgroup::InArgs),
    /// Steady connections and one long transfer against an echo server, with every failure counted.
    #[command(name = "__load", hide = true)]
    Load(load::LoadArgs),
}

/// Carries out one `cirri lab` command.
pub fn run(args: LabArgs) -> ExitCode {
    // On this very thread: while another thread's program replaces the process, the process looks like a zombie.
    let outcome = if matches!(args.verb, Verb::In(_)) {
        dispatch(args)
    } else {
        // A thread of its own, so that it does not matter whether the caller already runs inside an async runtime.
        let outcome = std::thread::scope(|scope| scope.spawn(|| dispatch(args)).join());
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    };
    outcome.unwrap_or_else(|error| report(&error))
}

/// Prints why something with a lab ended early, and gives the exit code for it.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if error.is::<Interrupted>() {
        output::complain(&error.to_string());
        return ExitCode::from(EXIT_INTERRUPTED);
    }
    let failure = match error {
        error if error.is::<Rejected>() => Failure::BadInput,
        error if error.is::<NotReachable>() => Failure::NotReachable,
        _ => Failure::Failed,
    };
    Error::new(failure, format!("{error:#}")).report()
}

fn dispatch(args: LabArgs) -> anyhow::Result<ExitCode> {
    if !matches!(args.verb, Verb::Ask(_) | Verb::Echo(_) | Verb::In(_) | Verb::Load(_)) {
        require_root()?;
    }
    match args.verb {
        Verb::Up(args) => up::run(args),
        Verb::Apply(args) => apply::run(args),
        Verb::Exec(args) => exec::run(args),
        Verb::Probe(args) => probe::run(args),
        Verb::Logs(args) => exec::logs(args),
        Verb::List(args) => list::run(args),
        Verb::Restart(args) => restart::run(args),
        Verb::Down(args) => down::run(args),
        Verb::Echo(args) => echo::run(args),
        Verb::Ask(args) => ask::run(&args),
        Verb::In(args) => cgroup::run(args),
        Verb::Load(args) => load::run(args),
    }
}

/// Fails unless the process is root, which namespaces and eBPF need, and reading a lab's records too.
fn require_root() -> anyhow::Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let program = std::env::args().next().unwrap_or_else(|| "cirri".to_owned());
    anyhow::bail!("a lab needs root: run `sudo {program} lab …`")
}
