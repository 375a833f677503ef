//! `cirri lab up`: the underlay, etcd if there are several nodes, one agent a node, and a host outside.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use cirri_control::resource::Resource;
use ipnet::IpNet;

use super::agent;
use super::apply::apply;
use super::cgroup;
use super::cluster;
use super::disk;
use super::down;
use super::echo::{Port, Transport};
use super::interrupt::{Interrupt, Interrupted};
use super::manifests::{self, Rejected};
use super::netns;
use super::pods::{await_ready, echo_argv};
use super::process::{self, Start};
use super::ready::Readiness;
use super::routes;
use super::state::{DEFAULT_NAME, DEFAULT_PATIENCE, Lab, LabName, Node, Routing};
use super::traces;
use super::underlay::{self, NODES_MAX};
use crate::{output, span};

/// The ports the outside host answers on.
pub const WORLD_PORTS: [Port; 8] = [tcp(80), tcp(81), tcp(443), tcp(8080), udp(53), udp(80), udp(81), udp(443)];

const ETCD_PEER_PORT: u16 = 2380;
/// Longest path of a UNIX socket.
const SOCKET_PATH_MAX: usize = 107;

/// Arguments of `cirri lab up`.
#[derive(Debug, clap::Args)]
#[command(after_help = "The nodes are 172.31.255.11, .12, … and fd00:c1:ab::11, ::12, …; the outside host is
198.51.100.10, 198.51.100.20 and 203.0.113.10, 2001:db8:100::10, 2001:db8:100::20 and 2001:db8:200::10, and answers
on tcp 80, 81, 443, 8080 and udp 53, 80, 81, 443. Every lab has namespaces of its own, so that these never collide.")]
pub struct UpArgs {
    /// Its name: letters, digits and underscores.
    #[arg(long, default_value = DEFAULT_NAME)]
    name: LabName,
    /// How many nodes: node1, node2, … (one, or those that the manifests declare, if absent). More than one share an etcd.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=NODES_MAX as i64))]
    nodes: Option<u16>,
    /// How packets travel between nodes.
    #[arg(long, value_enum, default_value = "overlay")]
    routing: Routing,
    /// One value of every agent's configuration, as `services.forwarding=dsr`; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Manifests to apply right away, waiting until they are enforced; Node manifests name the nodes.
    #[arg(short = 'f', long = "filename", value_name = "DIR|FILE")]
    files: Vec<PathBuf>,
    /// How long anything may take before it counts as failed, in seconds: etcd and agents to be ready, manifests to be
    /// enforced; also later, by other commands.
    #[arg(long, default_value_t = DEFAULT_PATIENCE, value_name = "SECONDS", value_parser = span::seconds())]
    timeout: u64,
}

const fn tcp(number: u16) -> Port {
    Port { number, protocol: Transport::Tcp }
}

const fn udp(number: u16) -> Port {
    Port { number, protocol: Transport::Udp }
}

/// Carries the command out. Failed, it leaves its logs behind, to which errors point, and nothing else; interrupted,
/// nothing.
///
/// # Errors
/// What is missing or went wrong, and what to do.
pub fn run(args: UpArgs) -> anyhow::Result<ExitCode> {
    // Everything that can be wrong with the input is found before anything is made.
    let resources = manifests::read(&args.files)?;
    let names = node_names(&args, &resources)?;
    check_socket_paths(&args.name, &names, &args.files)?;
    let described = Lab::described(&args.name, &names, args.routing, &args.settings);
    let lab = Lab { patience_s: args.timeout, ..described };
    lab.has_xdp().map_err(|problem| Rejected(vec![problem.to_string()]))?;
    manifests::check(&resources, &lab)?;
    if names.len() > 1 {
        require_etcd()?;
    }
    cgroup::of_lab(&args.name)?;
    let _lock = args.name.lock().map_err(|error| disk::explain(&args.name, error.into()))?;
    if traces::exists(&args.name) {
        bail!(
            "there is a lab \"{0}\" already (or what is left of it): `cirri lab down --name {0}` removes it, --name chooses another",
            args.name
        );
    }
    let interrupt = Interrupt::install()?;
    let outcome = begin(&args, &lab, resources, &interrupt).map_err(|error| disk::explain_start(&lab.name, error));
    if let Err(error) = &outcome {
        let interrupted = error.is::<Interrupted>();
        let logs = if interrupted { "" } else { "; its logs stay" };
        output::complain(&format!("taking down what is there of the lab \"{}\"{logs}", args.name));
        let remove = if interrupted { down::remove } else { down::remove_all_but_logs };
        if let Err(problem) = remove(&args.name) {
            output::complain(&format!("{problem:#}"));
        }
    }
    outcome.map(|()| ExitCode::SUCCESS)
}

fn begin(args: &UpArgs, lab: &Lab, resources: Vec<Resource>, interrupt: &Interrupt) -> anyhow::Result<()> {
    let begun = Instant::now();
    let step = |what: &str| output::progress(&format!("[{:5.2} s] {what}", begun.elapsed().as_secs_f64()));
    bring_up(lab, interrupt, &step)?;
    if !args.files.is_empty() {
        apply(lab, resources, Some(lab.patience()), interrupt, &output::progress)?;
    }
    interrupt.check()?;
    summarise(lab, begun);
    Ok(())
}

/// Brings an empty lab up. The caller holds its lock, knows that nothing of that name is there, and takes down what
/// is there if this fails. `report` is told what is ready.
///
/// # Errors
/// What could not be made or does not get ready; [`super::interrupt::Interrupted`].
pub fn bring_up(lab: &Lab, interrupt: &Interrupt, report: &dyn Fn(&str)) -> anyhow::Result<()> {
    // Without it nothing of a lab runs. Locked until its programs say whose it is.
    let _group = lab.name.make_group()?;
    let directory = lab.name.directory();
    // The logs of a lab of this name that did not come up.
    crate::files::remove_tree(&directory)?;
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    lab.save()?;

    interrupt.check()?;
    underlay::create_core(&lab.name)?;
    for node in &lab.nodes {
        interrupt.check()?;
        underlay::create_node(&lab.name, node)?;
    }
    if lab.has_xdp()? {
        underlay::prepare_xdp(lab)?;
    }
    report("network ready");
    start_world(lab)?;
    if lab.has_etcd() {
        start_etcd(lab, interrupt)?;
        report("etcd ready");
    }
    cluster::each_node(lab, |node| agent::start(lab, node, interrupt))?;
    cluster::settle(lab, lab.patience(), interrupt)?;
    route_pods(lab)?;
    routes::put_ranges(lab)?;
    report(if lab.nodes.len() == 1 { "agent ready" } else { "agents ready" });
    Ok(())
}

impl Lab {
    /// A lab that is not there yet.
    pub fn described(name: &LabName, nodes: &[String], routing: Routing, settings: &[String]) -> Self {
        let nodes = nodes.iter().enumerate().map(|(index, node)| underlay::node(name, node, index)).collect();
        Self { name: name.clone(), routing, nodes, settings: settings.to_vec(), patience_s: DEFAULT_PATIENCE }
    }
}

fn summarise(lab: &Lab, begun: Instant) {
    let (name, routing, seconds) = (&lab.name, lab.routing, begun.elapsed().as_secs_f64());
    let nodes: Vec<String> = lab.nodes.iter().map(|node| format!("{} ({})", node.name, node.ipv4)).collect();
    output::progress(&format!(
        "lab \"{name}\" is up after {seconds:.1} s: {}; {routing} routing\nnext:",
        nodes.join(", ")
    ));
    let choice = if name.to_string() == DEFAULT_NAME { String::new() } else { format!(" --name {name}") };
    for verb in ["apply -f DIR --wait", "probe --all-pairs", "list", "down"] {
        let (verb, arguments) = verb.split_once(' ').unwrap_or((verb, ""));
        output::progress(format!("  cirri lab {verb}{choice} {arguments}").trim_end());
    }
    if let Some(node) = lab.nodes.first() {
        output::progress(&format!("  cirri --socket {} status", lab.agent_socket(&node.name).display()));
    }
}

/// The names of the nodes: those that the manifests declare, else `node1`, `node2`, …
fn node_names(args: &UpArgs, resources: &[Resource]) -> anyhow::Result<Vec<String>> {
    let declared = manifests::node_names(resources);
    let wanted = args.nodes.map(usize::from);
    if declared.is_empty() {
        return Ok((1..=wanted.unwrap_or(1)).map(|number| format!("node{number}")).collect());
    }
    let problem = if wanted.is_some_and(|wanted| wanted != declared.len()) {
        format!("the manifests declare {} nodes: leave --nodes out, or make them agree", declared.len())
    } else if let Some(taken) = declared.iter().find(|name| matches!(name.as_str(), "net" | "world")) {
        format!("node {taken}: the lab uses this name for itself: choose another")
    } else if declared.len() > NODES_MAX {
        format!("{} nodes are more than a lab can have ({NODES_MAX})", declared.len())
    } else {
        return Ok(declared);
    };
    Err(Rejected(vec![problem]).into())
}

fn check_socket_paths(name: &LabName, nodes: &[String], files: &[PathBuf]) -> Result<(), Rejected> {
    let path = |node: &str| name.directory().join("nodes").join(node).join("state/agent.sock");
    let room = SOCKET_PATH_MAX + 1 - path("x").as_os_str().len();
    let long = |node: &&String| node.len() > room;
    let problem = |node: &String| {
        let file = manifests::file_of_node(files, node).map_or(String::new(), |file| format!("{}: ", file.display()));
        let length = node.len();
        format!(
            "{file}node {node}: metadata.name: it has {length} characters, and a lab called \"{name}\" has room for {room}, \
             since a socket's path has no more: shorten it"
        )
    };
    let problems: Vec<String> = nodes.iter().filter(long).map(problem).collect();
    if problems.is_empty() { Ok(()) } else { Err(Rejected(problems)) }
}

fn require_etcd() -> anyhow::Result<()> {
    if process::installed("etcd") {
        return Ok(());
    }
    bail!(
        "a lab of several nodes needs etcd, which is not in PATH: install it with `cargo xtask setup` or `apt-get install etcd-server`, or take one node (--nodes 1)"
    )
}

fn start_world(lab: &Lab) -> anyhow::Result<()> {
    let directory = lab.name.directory();
    let addresses: Vec<IpAddr> = underlay::WORLD.to_vec();
    let argv = echo_argv("world", &addresses, &WORLD_PORTS)?;
    let log = directory.join("world.log");
    let child = Start {
        netns: &netns::path(&lab.name.world_namespace()),
        cgroup: &cgroup::of(&lab.name, "world")?,
        argv: &argv,
        env: &BTreeMap::new(),
        directory: &directory,
        log: &log,
        pipe_stdout: true,
    }
    .spawn(&directory.join("world.pid"))?;
    await_ready(child, &log)
}

/// Starts etcd and waits for its word that it serves clients, which it gives the way systemd asks for.
fn start_etcd(lab: &Lab, interrupt: &Interrupt) -> anyhow::Result<()> {
    let directory = lab.name.directory();
    let log = directory.join("etcd.log");
    let (client, peer) = (cluster::etcd_url(), format!("http://127.0.0.1:{ETCD_PEER_PORT}"));
    let data = directory.join("etcd").into_os_string().into_string().map_err(|_| anyhow::anyhow!("bad path"))?;
    let argv: Vec<String> = [
        "etcd",
        "--name=lab",
        &format!("--data-dir={data}"),
        &format!("--listen-client-urls={client}"),
        &format!("--advertise-client-urls={client}"),
        &format!("--listen-peer-urls={peer}"),
        &format!("--initial-advertise-peer-urls={peer}"),
        &format!("--initial-cluster=lab={peer}"),
    ]
    .map(str::to_owned)
    .into();
    let ready = Readiness::listen(directory.join("etcd.notify"))?;
    let net = netns::path(&lab.name.net_namespace());
    let child = Start {
        netns: &net,
        cgroup: &cgroup::of(&lab.name, "net")?,
        argv: &argv,
        env: &ready.env(),
        directory: &directory,
        log: &log,
        pipe_stdout: false,
    }
    .spawn(&directory.join("etcd.pid"))?;
    ready.wait("etcd", &child, &log, lab.patience(), interrupt)
}

/// Tells the router where the pods are, as the agents know it.
fn route_pods(lab: &Lab) -> anyhow::Result<()> {
    let networks = cluster::each_node(lab, |node| {
        let status =
            cluster::status(lab, &node.name).with_context(|| format!("the agent of {} does not answer", node.name))?;
        let parsed: Result<Vec<IpNet>, _> = status.pod_cidrs.iter().map(|network| network.parse()).collect();
        parsed.with_context(|| format!("the agent of {} names pod networks that are none", node.name))
    })?;
    let each = lab.nodes.iter().zip(networks);
    let networks: Vec<(&Node, IpNet)> = each.flat_map(|(node, all)| all.into_iter().map(move |n| (node, n))).collect();
    underlay::change_routes(lab, &[], &networks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_path_that_the_kernel_would_refuse_is_refused_first() {
        let name: LabName = "t".parse().unwrap();
        assert!(check_socket_paths(&name, &["node1".into()], &[]).is_ok());
        assert!(check_socket_paths(&name, &["n".repeat(90)], &[]).is_err());
    }
}
