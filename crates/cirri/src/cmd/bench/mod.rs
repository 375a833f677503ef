//! `cirri bench`: what the packet path and the agent cost.

mod cases;
mod check;
mod control;
mod frame;
mod goals;
mod ground;
mod group;
mod instance;
mod labs;
mod load;
mod many;
mod packets;
mod pin;
mod plain;
mod report;
mod rivals;
mod served;
mod services;
mod sockets;
mod stats;
mod tenk;
mod traffic;
mod verify;

use std::path::PathBuf;
use std::time::Duration;

use crate::exit::{Error, Failure, Result};
use crate::output::{self, OutputArgs};

/// Measure the packet path and the agent.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, clap::Subcommand)]
enum BenchCommand {
    /// What each program costs the verifier: instructions walked, stack, size
    Verify {
        #[command(flatten)]
        pins: PinArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Nanoseconds a packet, by BPF_PROG_TEST_RUN, the packet restored before each run
    Packets {
        #[command(flatten)]
        pins: PinArgs,
        #[command(flatten)]
        amount: AmountArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Connections, requests and bulk data between pods, beside plain kernel routing (needs a lab)
    Traffic {
        #[command(flatten)]
        pins: PinArgs,
        #[command(flatten)]
        amount: AmountArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// What services in the system call cost connect
    Sockets {
        #[command(flatten)]
        pins: PinArgs,
        #[command(flatten)]
        amount: AmountArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Connections to services, beside plain routing, iptables and nftables (needs a lab)
    Services {
        #[command(flatten)]
        pins: PinArgs,
        #[command(flatten)]
        amount: AmountArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// From a manifest to its enforcement, attaching pods, memory of the agent (needs a lab)
    Control {
        #[command(flatten)]
        amount: AmountArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Ten thousand services on a real agent: until in force, one change, memory (needs a lab)
    Tenk {
        #[command(flatten)]
        amount: AmountArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// All of it, written to DIR/latest.json and DIR/README.md
    All {
        /// Where to
        #[arg(long, value_name = "DIR", default_value = "docs/bench")]
        out: PathBuf,
        #[command(flatten)]
        pins: PinArgs,
        #[command(flatten)]
        amount: AmountArgs,
    },
    /// Load, fill and pin a case for a harness from outside (docs/bench/pin.md)
    Pin {
        /// The case, as `cirri bench packets` names it
        case: String,
        /// A directory on a BPF file system, to be made
        dir: PathBuf,
        /// Let so many other connections through the flow tables first
        #[arg(long, value_name = "N")]
        others: Option<u32>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Remove what `pin` made
    Unpin {
        /// The directory
        dir: PathBuf,
    },
}

#[derive(Clone, Debug, clap::Args)]
struct PinArgs {
    /// A directory on a BPF file system for the maps to measure with
    #[arg(long, default_value = "/sys/fs/bpf/cirri")]
    pin_root: PathBuf,
}

#[derive(Clone, Debug, clap::Args)]
struct AmountArgs {
    /// A few rounds instead of many: to see that it works, not to quote
    #[arg(long)]
    quick: bool,
    /// The processor to measure on
    #[arg(long, default_value_t = 1)]
    cpu: usize,
    /// So many rounds of packets
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// So many windows of each way and mode of traffic
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Only packets of cases with this in their names
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
}

impl AmountArgs {
    fn plan(&self) -> packets::Plan {
        let (rounds, packets, others, many) =
            if self.quick { (5, 4000, 600_000, 1 << 17) } else { (41, 20_000, 700_000, 1 << 19) };
        let rounds = self.rounds.unwrap_or(rounds);
        packets::Plan { rounds, packets, others, many, cpu: self.cpu, only: self.only.clone() }
    }

    fn traffic(&self) -> traffic::Plan {
        let (rounds, window) = if self.quick { (2, 150) } else { (10, 500) };
        let rounds = self.windows.unwrap_or(rounds);
        traffic::Plan { rounds, window: Duration::from_millis(window), cpu: self.cpu }
    }

    fn sockets(&self) -> sockets::Plan {
        sockets::Plan { rounds: if self.quick { 20 } else { 200 }, calls: 500, cpu: self.cpu }
    }

    fn services(&self) -> services::Plan {
        services::Plan { traffic: self.traffic(), many: !self.quick, more: if self.quick { 3 } else { 5 } }
    }

    fn tenk(&self) -> tenk::Plan {
        if self.quick {
            tenk::Plan { services: 1000, changes: 20 }
        } else {
            tenk::Plan { services: 10_000, changes: 200 }
        }
    }

    fn everything(&self) -> report::Plan {
        report::Plan {
            packets: self.plan(),
            sockets: self.sockets(),
            services: self.services(),
            tenk: self.tenk(),
            traffic: self.traffic(),
            control: self.control(),
            quick: self.quick,
        }
    }

    fn control(&self) -> control::Plan {
        if self.quick {
            control::Plan { policies: &[10, 100], more: 3, pods: 10 }
        } else {
            control::Plan { policies: &[10, 100, 1000], more: 5, pods: 50 }
        }
    }
}

/// Runs it.
pub fn run(args: &BenchArgs) -> Result<()> {
    match &args.command {
        BenchCommand::Verify { pins, output } => {
            let bills = verify::run(&pins.pin_root).map_err(failed)?;
            output::print(output.output, &bills, |bills| verify::table(bills))
        }
        BenchCommand::Packets { pins, amount, output } => {
            let measures = packets::run(&pins.pin_root, &amount.plan()).map_err(failed)?;
            output::print(output.output, &measures, packets::table)
        }
        BenchCommand::Traffic { pins, amount, output } => {
            let lines = traffic::run(&pins.pin_root, &amount.traffic()).map_err(failed)?;
            output::print(output.output, &lines, |lines| traffic::table(lines))
        }
        BenchCommand::Sockets { pins, amount, output } => {
            let lines = sockets::run(&pins.pin_root, &amount.sockets()).map_err(failed)?;
            output::print(output.output, &lines, |lines| sockets::table(lines))
        }
        BenchCommand::Services { pins, amount, output } => {
            let services = services::run(&pins.pin_root, &amount.services()).map_err(failed)?;
            output::print(output.output, &services, services::table)
        }
        BenchCommand::Control { amount, output } => {
            let control = control::run(&amount.control()).map_err(failed)?;
            output::print(output.output, &control, control::shown)
        }
        BenchCommand::Tenk { amount, output } => {
            let tenk = tenk::run(&amount.tenk()).map_err(failed)?;
            output::print(output.output, &tenk, tenk::shown)
        }
        BenchCommand::All { out, pins, amount } => {
            report::run(&pins.pin_root, &amount.everything(), out).map_err(failed)
        }
        BenchCommand::Pin { case, dir, others, output } => {
            let pinned = pin::pin(case, dir, *others).map_err(failed)?;
            output::print(output.output, &pinned, pin::shown)
        }
        BenchCommand::Unpin { dir } => pin::unpin(dir).map_err(failed),
    }
}

fn failed(error: anyhow::Error) -> Error {
    Error::new(Failure::Failed, format!("{error:#}"))
}
