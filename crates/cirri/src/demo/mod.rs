//! `cirri demo`: see it work in half a minute.
//!
//! A small shop of real programs on a lab of two nodes: its traffic before and after a policy, the flows and the rule
//! behind each, a connection that a policy stops in the middle, agents that are killed while traffic goes on, a service
//! in front of two replicas, and replicas that terminate or die while clients go on.
//! Every claim it prints is checked. It is also a test: `cargo xtask demo` fails if any check does.

mod acts;
mod requests;
mod stage;
mod traffic;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;

use self::stage::Stage;
use crate::lab::interrupt::{Interrupt, Interrupted};
use crate::lab::state::{DEFAULT_PATIENCE, Lab, LabName};
use crate::lab::{self, disk, down, process};

/// Programs it needs, and the Debian package of each.
const PROGRAMS: [(&str, &str); 6] = [
    ("etcd", "etcd-server"),
    ("nginx", "nginx-light"),
    ("redis-server", "redis-server"),
    ("redis-cli", "redis-tools"),
    ("curl", "curl"),
    ("timeout", "coreutils"),
];

/// See it work: two nodes, real programs, a policy, the flows and the rule behind each drop, a service.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "It needs root, and etcd, nginx, redis and curl (`cargo xtask setup` installs them). Everything it
makes lives in network namespaces of its own and is removed at the end, after Ctrl-C too. After SIGKILL the next run
cleans up, or `cirri lab down --name demo`. Exit code: 0 if every check held, 1 if not,
3 if an agent or the store of its lab was not reachable, 130 if interrupted."
)]
pub struct DemoArgs {
    /// Leave the lab up at the end, and say what to try next
    #[arg(long)]
    keep: bool,
    /// The name of its lab: two demos at once need two names
    #[arg(long, default_value = "demo")]
    name: LabName,
    /// How long anything may take before it counts as failed, in seconds. It is waited for what happens, so that a busy
    /// machine takes longer and fails nothing
    #[arg(long, default_value_t = DEFAULT_PATIENCE, value_name = "SECONDS", value_parser = crate::span::seconds())]
    timeout: u64,
}

/// Carries the command out.
pub fn run(args: &DemoArgs) -> ExitCode {
    match play(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => lab::report(&error),
    }
}

/// Whether every check held.
fn play(args: &DemoArgs) -> anyhow::Result<bool> {
    require()?;
    // Held to the end: no other command changes the lab meanwhile.
    let _lock = args.name.lock()?;
    let interrupt = Interrupt::install()?;
    let begun = Instant::now();
    let stage = Stage::new();
    if down::remove(&args.name)? {
        stage.line("Removed what an earlier run had left.");
    }
    let teardown = Teardown { name: &args.name, armed: true };
    stage.line("Cirri's demo: a small shop on two nodes, policies and services. It runs in network namespaces of");
    stage.line("its own and removes everything at the end; Ctrl-C stops it at any time.");
    let played = acts::play(&stage, &args.name, args.timeout, &interrupt);
    // What goes wrong because of an interruption is not the news.
    let played = interrupt.check().map_err(anyhow::Error::from).and(played);
    let played =
        played.map_err(|error| if error.is::<Interrupted>() { error } else { disk::explain(&args.name, error) });
    let mut kept = None;
    match played {
        Ok(lab) if args.keep => {
            teardown.keep();
            kept = Some(lab);
        }
        played => {
            // An error points to logs.
            let failed = played.as_ref().is_err_and(|error| !error.is::<Interrupted>());
            let gone = if failed { teardown.all_but_logs() } else { teardown.now() };
            if let Err(error) = played {
                match gone {
                    Ok(()) if failed => {
                        eprintln!("cirri: the demo stops early; everything it made is removed but its logs");
                    }
                    Ok(()) => eprintln!("cirri: the demo stops early; everything it made is removed"),
                    Err(problem) => eprintln!("cirri: {problem:#}: `cirri lab down --name {}` tries again", args.name),
                }
                return Err(error);
            }
            let seen = gone.map(|()| String::new()).map_err(|problem| format!("{problem:#}"));
            stage.check("everything is removed: namespaces, processes, pinned maps, files", seen);
        }
    }
    let (passed, failed) = stage.checks();
    let seconds = begun.elapsed().as_secs_f64();
    match failed {
        0 => stage.verdict(true, &format!("All {passed} checks held, in {seconds:.1} s.")),
        _ => {
            let hint = if args.keep { "" } else { " `cirri demo --keep` leaves the lab for a look around." };
            stage.verdict(false, &format!("{failed} of {} checks failed.{hint}", passed + failed));
        }
    }
    if let Some(lab) = kept {
        next(&stage, &lab);
    }
    Ok(failed == 0)
}

/// Fails unless everything is there that the demo needs.
fn require() -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the demo needs root, for network namespaces and eBPF: run `sudo cirri demo`");
    }
    let missing: Vec<(&str, &str)> = PROGRAMS.into_iter().filter(|(program, _)| !process::installed(program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let programs: Vec<&str> = missing.iter().map(|(program, _)| *program).collect();
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    let (programs, packages) = (programs.join(", "), packages.join(" "));
    bail!("not installed: {programs}: run `cargo xtask setup`, or `apt-get install --no-install-recommends {packages}`")
}

/// What to try on a lab that stays.
fn next(stage: &Stage, lab: &Lab) {
    let name = &lab.name;
    stage.line("\nThe lab stays up. Try:");
    stage.text(&format!("cirri lab list --name {name}"));
    stage.text(&format!("cirri lab probe --name {name} --all-pairs"));
    stage.text(&format!("cirri lab exec --name {name} front/ui -- ip addr"));
    if let Some(node) = lab.nodes.last() {
        stage.text(&format!("export CIRRI_SOCKET={}", lab.agent_socket(&node.name).display()));
    }
    stage.text("cirri observe --follow --verdict dropped");
    stage.text("cirri policy explain --from guest/scan --to shop/web --port 80");
    stage.text("cirri service get market/stall");
    stage.text(&format!("cirri lab probe --name {name} --from world --to svc:market/stall-dsr --vip node:node1 -n 20"));
    stage.text("cirri status");
    stage.text(&format!("cirri lab down --name {name}"));
}

/// Takes the lab down when dropped, whatever the way out was.
struct Teardown<'a> {
    name: &'a LabName,
    armed: bool,
}

impl Teardown<'_> {
    fn now(mut self) -> anyhow::Result<()> {
        self.armed = false;
        down::remove(self.name).map(drop)
    }

    fn all_but_logs(mut self) -> anyhow::Result<()> {
        self.armed = false;
        down::remove_all_but_logs(self.name).map(drop)
    }

    fn keep(mut self) {
        self.armed = false;
    }
}

impl Drop for Teardown<'_> {
    fn drop(&mut self) {
        if self.armed
            && let Err(problem) = down::remove(self.name)
        {
            eprintln!("cirri: {problem:#}: `cirri lab down --name {}` tries again", self.name);
        }
    }
}
