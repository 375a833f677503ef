//! `cirri lb`.

mod tables;

use std::io::IsTerminal;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::client::{self, CallError, ClientArgs};
use crate::edge::api::{Drain, Drained, PoolStatus, Pools, ServiceInfo, Stats, Status};
use crate::edge::backend::BackendHost;
use crate::edge::{self, Plan};
use crate::exit::{self, Because, Error, Failure, Result};
use crate::output::{self, OutputArgs};

/// Balances the connections of addresses among backends: in the kernel, from one file, without an
/// agent, without Kubernetes and without etcd.
///
/// `cirri lb --config FILE` runs in the foreground, as a service manager wants it. It reads the file,
/// fills the tables, attaches the packet path to the devices (XDP if they can, else TC), checks backends
/// and follows changes of the file. Stopping it (SIGTERM, even kill -9) leaves the packet path at work:
/// connections go on, new ones are balanced among those that were well. The next start, also of another
/// version, takes over without losing a connection. `cirri lb down` removes it all.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, after_help = exit::HELP, after_long_help = EXAMPLE)]
pub struct LbArgs {
    /// Run a load balancer from this file (YAML)
    #[arg(short, long, env = "CIRRI_LB_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<LbCommand>,
}

#[derive(Debug, clap::Subcommand)]
enum LbCommand {
    /// Read a file and say what is wrong with it; nothing is started
    Check {
        #[command(flatten)]
        file: RequiredFile,
    },
    /// How it is doing: devices, the file, health of backends, drops and whose they are
    Status {
        /// Exit 1 unless the file is in force, every backend is up and nothing is wrong
        #[arg(long)]
        check: bool,
        #[command(flatten)]
        file: File,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Services and their backends: state, weight, share of new connections
    List {
        /// Only services of this name
        service: Option<String>,
        #[command(flatten)]
        file: File,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Connections, packets, bytes and answers of every service and backend, with their rates
    Stats {
        /// Only services of this name
        service: Option<String>,
        /// Seconds between the two looks that rates are told from; 0: no rates
        #[arg(long, default_value_t = 1.0, value_name = "SECONDS", value_parser = seconds)]
        over: f64,
        #[command(flatten)]
        file: File,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Give a backend no new connections; those that it has go on
    #[command(after_long_help = "\
A backend is drained until `cirri lb undrain`, also over restarts of the load balancer. That it is gone from
the file ends it, too. To take a backend out for good, drain it, wait until `cirri lb stats` shows no packets
to it, then remove it from the file.")]
    Drain {
        /// NAME, SERVICE/NAME, an address, or an address and port; all backends that it fits
        backend: String,
        #[command(flatten)]
        file: File,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Give a drained backend connections again
    Undrain {
        /// NAME, SERVICE/NAME, an address, or an address and port; all backends that it fits
        backend: String,
        #[command(flatten)]
        file: File,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Who holds the source ports of translated connections
    Pools {
        /// Only these; `default` is what services have that name no pool
        names: Vec<String>,
        #[command(flatten)]
        file: File,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Remove everything that a load balancer made (programs, pins, state) and put back settings. It must not be running
    Down {
        #[command(flatten)]
        file: RequiredFile,
    },
    /// On a host that serves behind `forwarding: dsr-ipip`: take packets out of their IPIP wrapping
    #[command(after_long_help = BACKEND_HELP)]
    Backend {
        /// Device that wrapped packets come in by; may be given several times
        #[arg(long = "device", required_unless_present = "check", value_name = "DEVICE")]
        devices: Vec<String>,
        /// Give this address of a service to the host's loopback device; may be given several times
        #[arg(long = "vip", value_name = "ADDRESS")]
        vips: Vec<IpAddr>,
        /// Take it away again: the programs of these devices, and what was set and added for them
        #[arg(long)]
        remove: bool,
        /// Say what is not as it was made (program, addresses, settings), of these devices or of all; exit 1 if anything is
        #[arg(long, conflicts_with = "remove")]
        check: bool,
        /// Directory of a BPF file system that the program is pinned under
        #[arg(long, default_value = "/sys/fs/bpf/cirri", value_name = "PATH")]
        pin_root: PathBuf,
        /// Name of its directory there
        #[arg(long, default_value = "lb-backend", value_name = "NAME")]
        instance: String,
    },
}

/// How to find a load balancer that runs.
#[derive(Clone, Debug, clap::Args)]
struct File {
    /// The load balancer's file, which names its state directory; not needed for one in /run/cirri-lb
    #[arg(short, long, env = "CIRRI_LB_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

/// The file that it is all about.
#[derive(Clone, Debug, clap::Args)]
struct RequiredFile {
    /// The load balancer's file
    #[arg(short, long, env = "CIRRI_LB_CONFIG", value_name = "FILE")]
    config: PathBuf,
}

const EXAMPLE: &str = "\
A file:
  devices: [eth0]
  services:
    - name: web
      address: 203.0.113.10
      port: 80
      backends:
        - {name: web-1, address: 10.1.0.11, port: 8080}
        - {name: web-2, address: 10.1.0.12, port: 8080, weight: 2}
      health: {type: http, path: /healthy, interval: 2s}

Then:
  cirri lb check --config lb.yaml
  cirri lb --config lb.yaml                      run it (foreground)
  cirri lb status                                devices, file, health
  cirri lb list                                  who serves what, and how much of it
  cirri lb stats --over 5                        connections, packets, bytes, with rates
  cirri lb drain web-1                           no new connections to it

A change of the file is in force when the file is saved (or with SIGHUP); no connection notices. A file with
a mistake changes nothing: the last good one stays in force, and `cirri lb status` says what is wrong.

Every key: docs/guide/load-balancer.md

Exit codes:
  0  done
  1  tried and failed
  2  wrong command line, file or manifest
  3  agent or store not reachable
  4  answered with no: a probe or a verdict was denied";

const BACKEND_HELP: &str = "\
With dsr-ipip the load balancer wraps a client's packet and sends it to the backend as it is: for the address
of the service. The backend needs that address, and something that unwraps (the kernel's ipip device does,
where there is one). The answer goes to the client itself, so the load balancer sees half of the traffic.

  cirri lb backend --device eth0 --vip 203.0.113.10
  cirri lb backend --check                       is it all as it was made? exit 1 if not
  cirri lb backend --device eth0 --vip 203.0.113.10 --remove

Without --vip the address is the administrator's business: it must be there before, on `lo`, and devices should
not answer ARP for it (sysctls arp_ignore=1, arp_announce=2), which --vip sees to. The program stays until --remove or a
reboot; no process runs, so nobody puts back what others take away: let a timer run --check, and where it exits 1, the
command that set it up once more. MTU: a wrapped packet is 20 bytes longer (IPv6: 40).";

/// Runs it.
pub fn run(client: &ClientArgs, args: &LbArgs) -> Result<()> {
    let Some(command) = &args.command else {
        let Some(file) = &args.config else {
            return Err(Error::new(Failure::BadInput, "there is no file to run from").hint(
                "`cirri lb --config FILE` runs a load balancer; `cirri lb --help` shows a file and the commands",
            ));
        };
        return serve(file);
    };
    match command {
        LbCommand::Check { file } => {
            let plan = Plan::read(&file.config).because(Failure::BadInput)?;
            let backends: usize = plan.services.iter().map(|service| service.backends.len()).sum();
            output::write_out(&format!("{} services, {backends} backends: well\n", plan.services.len()))
        }
        LbCommand::Status { check, file, output } => {
            let status: Status = call(client, file, "status", ())?;
            output::print(output.output, &status, tables::status)?;
            if *check && !is_well(&status) {
                return Err(Error::new(Failure::Failed, "not everything is well"));
            }
            Ok(())
        }
        LbCommand::List { service, file, output } => {
            let mut services: Vec<ServiceInfo> = call(client, file, "list", ())?;
            let all: Vec<String> = services.iter().map(|service| service.name.clone()).collect();
            only(&mut services, service.as_ref(), &all, |service| &service.name)?;
            output::print(output.output, &services, |services| tables::list(services))
        }
        LbCommand::Stats { service, over, file, output } => {
            let stats = stats(client, file, *over)?;
            let all: Vec<String> = stats.services.iter().map(|service| service.name.clone()).collect();
            let mut stats = stats;
            only(&mut stats.services, service.as_ref(), &all, |service| &service.name)?;
            output::print(output.output, &stats, tables::stats)
        }
        LbCommand::Drain { backend, file, output } => drain(client, file, output, "drain", backend),
        LbCommand::Undrain { backend, file, output } => drain(client, file, output, "undrain", backend),
        LbCommand::Pools { names, file, output } => {
            let pools: Vec<PoolStatus> = call(client, file, "pools", Pools { names: names.clone() })?;
            output::print(output.output, &pools, |pools| tables::pools(pools))
        }
        LbCommand::Down { file } => {
            let plan = Plan::read(&file.config).because(Failure::BadInput)?;
            block_on(edge::remove(&plan))?;
            output::progress(&format!("removed what load balancer {} made", plan.bpf.instance));
            Ok(())
        }
        LbCommand::Backend { devices, vips, remove, check, pin_root, instance } => {
            let (pin_root, instance) = (pin_root.clone(), instance.clone());
            let host = BackendHost { devices: devices.clone(), vips: vips.clone(), pin_root, instance };
            let devices = devices.join(", ");
            if *check {
                block_on(check_backend(&host))?;
            } else if *remove {
                block_on(host.remove())?;
                output::progress(&format!("{devices}: packets stay wrapped"));
            } else {
                block_on(host.set_up())?;
                output::progress(&format!("{devices}: IPIP packets for this host are unwrapped"));
            }
            Ok(())
        }
    }
}

async fn check_backend(host: &BackendHost) -> Result<()> {
    let all = host.look().await?;
    let of = |(device, flaws): &(String, Vec<String>)| match flaws.as_slice() {
        [] => format!("{device}: well\n"),
        flaws => flaws.iter().map(|flaw| format!("{device}: {flaw}\n")).collect(),
    };
    output::write_out(&all.iter().map(of).collect::<String>())?;
    if all.iter().all(|(_, flaws)| flaws.is_empty()) {
        return Ok(());
    }
    let hint = "bring up what is down, then run the command again that set it up: it makes right what differs";
    Err(Error::new(Failure::Failed, "not everything is well").hint(hint))
}

fn serve(file: &std::path::Path) -> Result<()> {
    let plan = Plan::read(file).because(Failure::BadInput)?;
    let filter = tracing_subscriber::EnvFilter::try_new(&plan.log)
        .map_err(|error| format!("{}: log `{}`: {error}", file.display(), plan.log))
        .because(Failure::BadInput)?;
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    block_on(edge::run(file.to_owned(), plan))
}

fn block_on(future: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().because(Failure::Failed)?;
    runtime.block_on(future)
}

fn drain(client: &ClientArgs, file: &File, output: &OutputArgs, method: &str, backend: &str) -> Result<()> {
    let drained: Drained = call(client, file, method, Drain { backend: backend.to_owned() })?;
    output::print(output.output, &drained, |drained| {
        let lines = drained.backends.iter().map(|backend| format!("{backend}: {method}ed\n"));
        lines.collect()
    })
}

fn stats(client: &ClientArgs, file: &File, over: f64) -> Result<Stats> {
    let first: Stats = call(client, file, "stats", ())?;
    if over == 0.0 {
        return Ok(first);
    }
    std::thread::sleep(Duration::from_secs_f64(over));
    let second: Stats = call(client, file, "stats", ())?;
    Ok(with_rates(&first, second))
}

fn with_rates(before: &Stats, mut now: Stats) -> Stats {
    let seconds = (now.at_s - before.at_s).max(f64::EPSILON);
    for service in &mut now.services {
        let old = before.services.iter().find(|old| old.name == service.name);
        let mut sum = crate::edge::api::Traffic::default();
        for backend in &mut service.backends {
            let old = old.and_then(|old| old.backends.iter().find(|old| old.name == backend.name));
            let before = old.map_or(backend.total, |old| old.total);
            sum = sum.plus(before);
            backend.total = backend.total.since(before, seconds);
        }
        service.total = service.total.since(sum, seconds);
    }
    now
}

fn only<T>(all: &mut Vec<T>, wanted: Option<&String>, names: &[String], name: impl Fn(&T) -> &String) -> Result<()> {
    let Some(wanted) = wanted else { return Ok(()) };
    all.retain(|one| name(one) == wanted);
    if all.is_empty() {
        return Err(Error::new(Failure::BadInput, format!("there is no service {wanted}"))
            .hint(format!("services: {}", names.join(", "))));
    }
    Ok(())
}

fn is_well(status: &Status) -> bool {
    status.config.in_force
        && status.warnings.is_empty()
        && status.problems.is_empty()
        && status.refusing.is_empty()
        && !status.backends.contains_key("down")
        && status.devices.iter().all(|device| device.mode != "missing")
}

fn call<T: DeserializeOwned>(client: &ClientArgs, file: &File, method: &str, params: impl Serialize) -> Result<T> {
    const PATIENCE: Duration = Duration::from_secs(30);
    let socket = socket(client, file)?;
    client::call(&socket, method, &params, PATIENCE).map_err(|error| match error {
        CallError::NoAgent { .. } if let Some(pid) = client::runs_without(&socket) => {
            let what = format!("the load balancer runs (pid {pid}), but its socket {} is not there", socket.display());
            Error::new(Failure::NotReachable, what).hint(client::MADE_AGAIN)
        }
        CallError::NoAgent { ref source, .. } => {
            let why = match source.kind() {
                std::io::ErrorKind::PermissionDenied => "only root may ask",
                _ => {
                    "start it with `cirri lb --config FILE`, or name its file with --config or its socket with --socket"
                }
            };
            let what = format!("no load balancer answers on {}: {source}", socket.display());
            Error::new(Failure::NotReachable, what).hint(why)
        }
        CallError::Refused(error) => {
            let failure = match error.code.as_str() {
                "bad-request" | "not-found" => Failure::BadInput,
                _ => Failure::Failed,
            };
            let message = Error::new(failure, &error.message);
            if error.hint.is_empty() { message } else { message.hint(&error.hint) }
        }
        other => Error::new(Failure::Failed, other),
    })
}

/// The socket that was named, else that of the file, else that of the usual directory.
fn socket(client: &ClientArgs, file: &File) -> Result<PathBuf> {
    match (&client.socket, &file.config) {
        (Some(named), _) => Ok(named.clone()),
        (None, Some(file)) => Ok(edge::socket(&Plan::state_dir_of(file).because(Failure::BadInput)?)),
        (None, None) => Ok(edge::socket(edge::STATE_DIR.as_ref())),
    }
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("write seconds, 0 to 3600".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::api::{BackendStats, ServiceStats, Traffic};

    fn at(at_s: f64, connections: u64) -> Stats {
        let total = Traffic { connections, ..Traffic::default() };
        let backend = BackendStats { name: "b".into(), address: "10.0.0.1:80".into(), total };
        let service =
            ServiceStats { name: "s".into(), frontend: "1.2.3.4:80/TCP".into(), total, backends: vec![backend] };
        Stats { at_s, services: vec![service] }
    }

    #[test]
    fn rates_are_what_came_between_two_looks() {
        let stats = with_rates(&at(10.0, 100), at(12.0, 300));
        let rates = stats.services[0].total.rates.unwrap();
        assert!((rates.connections - 100.0).abs() < 1e-9);
        assert_eq!(stats.services[0].backends[0].total.rates, Some(rates));
        // A backend whose number began anew has no negative rate.
        let stats = with_rates(&at(10.0, 100), at(12.0, 20));
        assert_eq!(stats.services[0].total.rates.unwrap().connections, 0.0);
    }

    #[test]
    fn the_long_help_holds_the_exit_codes() {
        assert!(EXAMPLE.ends_with(exit::HELP));
    }
}
