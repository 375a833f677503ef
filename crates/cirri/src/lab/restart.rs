//! `cirri lab restart`: a node's agent stops and comes back, while its packet path goes on.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::Signal;

use super::interrupt::Interrupt;
use super::state::{DEFAULT_NAME, Lab, LabName};
use super::{agent, cluster, disk, process};
use crate::{output, span};

/// Arguments of `cirri lab restart`.
#[derive(Debug, clap::Args)]
pub struct RestartArgs {
    /// The lab.
    #[arg(long, default_value = DEFAULT_NAME)]
    name: LabName,
    /// The node.
    node: String,
    /// Kill the agent (SIGKILL) instead of asking it to stop.
    #[arg(long)]
    kill: bool,
    /// Leave it stopped for so long, in milliseconds.
    #[arg(long, default_value_t = 0, value_name = "MS", value_parser = span::milliseconds())]
    pause: u64,
    /// How long the agent may take to stop, and to enforce everything again, in seconds [default: that of `lab up`]
    #[arg(long, value_name = "SECONDS", value_parser = span::seconds())]
    timeout: Option<u64>,
}

/// Carries the command out; returns when the agent enforces everything again.
///
/// # Errors
/// No such node, or the agent does not stop or does not come back.
pub fn run(args: RestartArgs) -> anyhow::Result<ExitCode> {
    let (mut lab, _lock) = Lab::locked(&args.name)?;
    lab.patience_s = args.timeout.unwrap_or(lab.patience_s);
    let node = lab.node(&args.node)?;
    let interrupt = Interrupt::install()?;
    let agent = agent::Prepared::new(&lab, node).map_err(|error| disk::explain(&lab.name, error));
    let agent =
        agent.with_context(|| format!("the agent of {0} cannot be started, and is left as it is", node.name))?;
    let begun = Instant::now();
    match lab.agent_process(&node.name) {
        None => output::progress(&format!("the agent of {} was not running", node.name)),
        Some(agent) if args.kill => process::kill(&[agent])?,
        Some(agent) => {
            if !process::end(&[agent], Signal::TERM, lab.patience()) {
                let seconds = lab.patience_s;
                bail!("the agent of {} does not stop within {seconds} s (--kill makes it)", node.name);
            }
        }
    }
    let stopped = begun.elapsed();
    std::thread::sleep(Duration::from_millis(args.pause));
    let started = Instant::now();
    agent.start(&interrupt).map_err(|error| disk::explain(&lab.name, cluster::explain(&lab, error)))?;
    let ready = started.elapsed();
    cluster::settle_node(&lab, node, None, lab.patience(), &interrupt)?;
    output::progress(&format!(
        "{}: stopped in {} ms, answering after {} ms, everything enforced after {} ms",
        node.name,
        stopped.as_millis(),
        ready.as_millis(),
        started.elapsed().as_millis()
    ));
    Ok(ExitCode::SUCCESS)
}
