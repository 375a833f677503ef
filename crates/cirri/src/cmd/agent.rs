//! `cirri agent`.

use std::io::IsTerminal;

use crate::agent;
use crate::cmd::config::ConfigSource;
use crate::exit::{Because, Failure, Result};

/// Runs the node's agent: reads what the cluster's state says and keeps the packet path, devices
/// and routes of this network namespace like that.
///
/// Stopping it (SIGTERM, SIGINT, even kill -9) leaves the packet path at work: connections go on,
/// policies stay enforced, and the next start takes over what it finds. `--cleanup` removes it all.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
A configuration for one node, with manifests in a directory:
  store:
    kind: folder
    folder: /etc/cirri/manifests

One of a cluster:
  node: {name: a}
  store:
    kind: etcd
    etcd: {endpoints: [\"http://10.0.0.1:2379\"]}

`cirri config` prints every key with its value and where it came from.")]
pub struct AgentArgs {
    #[command(flatten)]
    source: ConfigSource,
    /// Remove everything that this instance made (programs, pins, devices, routes), put back settings, then exit
    #[arg(long)]
    cleanup: bool,
}

/// Runs it.
pub fn run(args: &AgentArgs) -> Result<()> {
    let loaded = args.source.load()?;
    let filter = tracing_subscriber::EnvFilter::try_new(&loaded.config.log.level)
        .map_err(|error| format!("log.level `{}`: {error}", loaded.config.log.level))
        .because(Failure::BadInput)?;
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().because(Failure::Failed)?;
    if args.cleanup { runtime.block_on(agent::cleanup(&loaded.config)) } else { runtime.block_on(agent::run(loaded)) }
}
