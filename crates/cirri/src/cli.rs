//! The command line: what there is, and who does it.

use std::io;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::client::ClientArgs;
use crate::exit::{self, Failure};
use crate::{cmd, cni, demo, lab};

/// Identity-based networking, security and observability for Linux workloads.
#[derive(Debug, Parser)]
#[command(
    name = "cirri",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = exit::HELP,
    after_long_help = LONG_HELP,
    disable_help_subcommand = true
)]
struct Cli {
    #[command(flatten)]
    client: ClientArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node's agent: it keeps the packet path as the cluster's state says
    Agent(cmd::agent::AgentArgs),
    /// Attach a container: the CNI plugin (1.1.0), driven by a runtime through its environment
    #[command(long_about = cni::ABOUT)]
    Cni,
    /// See it work: two nodes, real programs, a policy, the flows and the rule behind each drop
    Demo(demo::DemoArgs),
    /// Balance connections among backends, alone: no agent, no cluster, one file
    Lb(cmd::lb::LbArgs),
    /// Nodes and pods out of network namespaces on this machine, from plain Kubernetes YAML
    Lab(lab::LabArgs),
    /// How the agent is doing: store, tables, peers, drops
    Status(cmd::status::StatusArgs),
    /// Watch connections: who talked to whom, what was dropped, and the rule that decided
    Observe(cmd::observe::ObserveArgs),
    /// Watch the packet path's events as they come, with their numbers
    Monitor(cmd::monitor::MonitorArgs),
    /// The workloads of this node
    Endpoint(cmd::endpoint::EndpointArgs),
    /// The identities of the cluster and the labels they stand for
    Identity(cmd::identity::IdentityArgs),
    /// Policies: what is enforced, why a connection passes or not, and checking a file
    Policy(cmd::policy::PolicyArgs),
    /// Services: where they are reached, who serves them, what is wrong with them
    Service(cmd::service::ServiceArgs),
    /// The packet path's maps
    Map(cmd::map::MapArgs),
    /// Every value of the configuration and where it came from
    Config(cmd::config::ConfigArgs),
    /// Measure the packet path and the agent
    Bench(cmd::bench::BenchArgs),
}

const LONG_HELP: &str = "\
Try it on one machine, from plain Kubernetes YAML and without Kubernetes:
  cirri lab up --nodes 2
  cirri lab apply -f DIR --wait
  cirri lab probe --all-pairs

Look at a node (the agent's socket: --socket or CIRRI_SOCKET):
  cirri status                                   is it well, and what is not done
  cirri observe --follow --verdict dropped       drops as they happen, with the rule
  cirri policy explain --from shop/client --to shop/web --port 80
  cirri service get shop/web                     where it is reached, who serves it, what is wrong
  cirri endpoint list -o json                    for programs

Exit codes:
  0  done
  1  tried and failed
  2  wrong command line, file or manifest
  3  agent or store not reachable
  4  answered with no: a probe or a verdict was denied";

/// Runs the command that was asked for.
pub fn main() -> ExitCode {
    if cni::invoked_as_plugin() {
        return cni::main();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            let printed = error.print();
            return match (asked, printed) {
                (true, Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => {
                    ExitCode::from(Failure::Failed as u8)
                }
                (true, _) => ExitCode::SUCCESS,
                (false, _) => ExitCode::from(Failure::BadInput as u8),
            };
        }
    };
    let client = &cli.client;
    let outcome = match cli.command {
        Command::Agent(args) => cmd::agent::run(&args),
        Command::Cni => return cni::main(),
        Command::Demo(args) => return demo::run(&args),
        Command::Lab(args) => return lab::run(args),
        Command::Lb(args) => cmd::lb::run(client, &args),
        Command::Status(args) => cmd::status::run(client, &args),
        Command::Observe(args) => cmd::observe::run(client, &args),
        Command::Monitor(args) => cmd::monitor::run(client, &args),
        Command::Endpoint(args) => cmd::endpoint::run(client, &args),
        Command::Identity(args) => cmd::identity::run(client, &args),
        Command::Policy(args) => cmd::policy::run(client, &args),
        Command::Service(args) => cmd::service::run(client, &args),
        Command::Map(args) => cmd::map::run(client, &args),
        Command::Config(args) => cmd::config::run(&args),
        Command::Bench(args) => cmd::bench::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    /// Every option that is a span of time, with the commands before it.
    fn spans(command: &clap::Command, path: &[String]) -> Vec<Vec<String>> {
        let is_span = |arg: &&clap::Arg| {
            arg.get_value_names()
                .is_some_and(|names| names.iter().any(|name| ["SECONDS", "MS"].contains(&name.as_str())))
        };
        let own = command.get_arguments().filter(is_span).filter_map(clap::Arg::get_long);
        let mut all: Vec<_> = own.map(|long| [path, &[format!("--{long}")]].concat()).collect();
        for below in command.get_subcommands() {
            all.extend(spans(below, &[path, &[below.get_name().to_owned()]].concat()));
        }
        all
    }

    #[test]
    fn a_span_longer_than_a_clock_can_count_is_refused_with_what_is_allowed() {
        let found = spans(&Cli::command(), &["cirri".to_owned()]);
        assert!(found.len() >= 10, "{found:?}");
        for mut words in found {
            words.push(u64::MAX.to_string());
            let error = Cli::command().try_get_matches_from(&words).expect_err(&words.join(" "));
            assert_eq!(error.kind(), ErrorKind::ValueValidation, "{words:?}: {error}");
        }
    }

    #[test]
    fn the_long_help_holds_the_exit_codes() {
        assert!(LONG_HELP.ends_with(exit::HELP));
    }
}
