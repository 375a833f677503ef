//! `cirri lab list`: the labs of this machine, their nodes and pods.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use super::echo::Port;
use super::state::{Lab, LabName, Node, PodRecord, Routing};
use super::up::WORLD_PORTS;
use super::{cluster, netns, pods, traces, underlay};
use crate::api::{EndpointInfo, Status};
use crate::client;
use crate::output::{self, OutputArgs, Table};

/// How long an agent may take to answer. A list says what there is now: one that hangs is shown as such.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The state of a pod without a network.
const DETACHED: &str = "detached";
/// The state of a lab without records.
const CRASHED: &str = "crashed";
/// That of one whose records are being made or removed.
const CHANGING: &str = "changing";

/// Arguments of `cirri lab list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// One lab instead of all.
    #[arg(long)]
    name: Option<LabName>,
    #[command(flatten)]
    output: OutputArgs,
}

/// One lab, the unit of `-o json`.
#[derive(Debug, Serialize)]
struct LabInfo {
    name: LabName,
    /// `up`, `degraded` (an agent is down), `changing` (it has no records, and another command is at it) or `crashed` (it
    /// has none: `down` removes it).
    state: &'static str,
    routing: Option<Routing>,
    directory: PathBuf,
    /// Where its etcd listens, inside `net`.
    etcd: Option<String>,
    /// The namespace of the bridge and etcd.
    net: PathBuf,
    world: World,
    nodes: Vec<NodeInfo>,
    pods: Vec<PodInfo>,
}

#[derive(Debug, Serialize)]
struct World {
    netns: PathBuf,
    addresses: Vec<IpAddr>,
    ports: Vec<String>,
}

#[derive(Debug, Serialize)]
struct NodeInfo {
    name: String,
    netns: PathBuf,
    addresses: Vec<IpAddr>,
    pod_cidrs: Vec<String>,
    /// `ready`, `starting` (the process runs, but does not answer) or `down`.
    state: &'static str,
    /// The agent's process.
    pid: Option<i32>,
    socket: PathBuf,
    log: PathBuf,
}

#[derive(Debug, Serialize)]
struct PodInfo {
    namespace: String,
    name: String,
    node: String,
    netns: PathBuf,
    addresses: Vec<IpAddr>,
    /// Its identity's number, if its node's agent answers.
    identity: Option<u32>,
    /// Its endpoint on its node.
    endpoint: Option<u16>,
    /// `running`, `ended` (a program has), `failed` (it was not made completely), `detached` (it has no device, or its
    /// agent does not know it), else what its agent says.
    state: String,
    error: Option<String>,
    programs: Vec<ProgramInfo>,
}

#[derive(Debug, Serialize)]
struct ProgramInfo {
    /// The container; `_echo` for the built-in echo server.
    name: String,
    pid: Option<i32>,
    log: PathBuf,
}

/// Carries the command out.
///
/// # Errors
/// There is no lab of the name that was asked for.
pub fn run(args: ListArgs) -> anyhow::Result<ExitCode> {
    let labs = match &args.name {
        Some(name) => vec![describe(&Lab::load(name)?)?],
        None => {
            let mut labs = Vec::new();
            for name in traces::all() {
                labs.extend(look(&name)?);
            }
            labs
        }
    };
    output::print(args.output.output, &labs, |labs| table(labs))?;
    Ok(ExitCode::SUCCESS)
}

impl LabInfo {
    fn new(name: &LabName, state: &'static str) -> Self {
        Self {
            name: name.clone(),
            state,
            routing: None,
            directory: name.directory(),
            etcd: None,
            net: netns::path(&name.net_namespace()),
            world: World {
                netns: netns::path(&name.world_namespace()),
                addresses: underlay::WORLD.to_vec(),
                ports: WORLD_PORTS.iter().map(Port::to_string).collect(),
            },
            nodes: Vec::new(),
            pods: Vec::new(),
        }
    }
}

/// One of all labs, which others bring up and take down meanwhile; `None`: it is gone.
fn look(name: &LabName) -> anyhow::Result<Option<LabInfo>> {
    let unread = match Lab::load(name).map(|lab| describe(&lab)) {
        Ok(Ok(lab)) => return Ok(Some(lab)),
        Ok(Err(error)) => Err(error),
        Err(_no_records) => Ok(CRASHED),
    };
    // Asked in this order: a command that ends in between leaves a lab whole or nothing of it.
    let is_changing = name.is_locked();
    if !traces::exists(name) {
        return Ok(None);
    }
    let state = if is_changing { CHANGING } else { unread? };
    Ok(Some(LabInfo::new(name, state)))
}

fn describe(lab: &Lab) -> anyhow::Result<LabInfo> {
    let answers = cluster::each_node(lab, |node| Ok(describe_node(lab, node)))?;
    let (mut endpoints, mut answering) = (BTreeMap::new(), BTreeSet::new());
    let mut nodes = Vec::new();
    for (node, found) in answers {
        answering.extend(found.is_some().then(|| node.name.clone()));
        nodes.push(node);
        endpoints.extend(found.into_iter().flatten().map(|endpoint| (endpoint.container_id.clone(), endpoint)));
    }
    let described = |pod: PodRecord| {
        let known = answering.contains(&pod.node).then(|| endpoints.get(&pod.container_id));
        describe_pod(lab, &pod, known)
    };
    let pods = lab.pods()?.into_iter().map(described).collect();
    let state = if nodes.iter().all(|node| node.state == "ready") { "up" } else { "degraded" };
    Ok(LabInfo {
        routing: Some(lab.routing),
        etcd: lab.has_etcd().then(cluster::etcd_url),
        nodes,
        pods,
        ..LabInfo::new(&lab.name, state)
    })
}

/// The node, and what its agent knows of endpoints, if it answers.
fn describe_node(lab: &Lab, node: &Node) -> (NodeInfo, Option<Vec<EndpointInfo>>) {
    let socket = lab.agent_socket(&node.name);
    let status = client::call::<Status>(&socket, "status", &json!({}), ANSWER_TIMEOUT).ok();
    // One that hangs is waited for once.
    let ask = || cluster::endpoints(lab, &node.name, ANSWER_TIMEOUT).ok();
    let endpoints = status.as_ref().and_then(|_| ask());
    let process = lab.agent_process(&node.name);
    let info = NodeInfo {
        name: node.name.clone(),
        netns: node.netns.clone(),
        addresses: vec![node.ipv4.into(), node.ipv6.into()],
        state: match (&process, &status) {
            (None, _) => "down",
            (Some(_), None) => "starting",
            (Some(_), Some(_)) => "ready",
        },
        pid: process.map(|process| process.pid),
        pod_cidrs: status.map(|status| status.pod_cidrs).unwrap_or_default(),
        log: lab.node_directory(&node.name).join("agent.log"),
        socket,
    };
    (info, endpoints)
}

/// `known` is what its node's agent says of it, if that answers.
fn describe_pod(lab: &Lab, pod: &PodRecord, known: Option<Option<&EndpointInfo>>) -> PodInfo {
    let endpoint = known.flatten();
    let unknown = known.is_some_and(|endpoint| endpoint.is_none()) && !pod.spec.host_network;
    let directory = lab.pod_directory(&pod.key);
    let programs: Vec<ProgramInfo> = pod
        .programs(lab)
        .into_iter()
        .map(|(name, process)| ProgramInfo {
            log: directory.join(format!("{name}.log")),
            pid: process.map(|process| process.pid),
            name,
        })
        .collect();
    let state = if !pod.complete {
        "failed".to_owned()
    } else if unknown || !pods::is_attached(pod) {
        DETACHED.to_owned()
    } else if programs.iter().any(|program| program.pid.is_none()) {
        "ended".to_owned()
    } else {
        match endpoint {
            Some(endpoint) if endpoint.state != "done" => endpoint.state.clone(),
            _ => "running".to_owned(),
        }
    };
    PodInfo {
        namespace: pod.key.namespace.clone(),
        name: pod.key.name.clone(),
        node: pod.node.clone(),
        netns: pod.netns.clone(),
        addresses: pod.addresses.clone(),
        identity: endpoint.map(|endpoint| endpoint.identity),
        endpoint: endpoint.map(|endpoint| endpoint.id),
        state,
        error: pod.error.clone(),
        programs,
    }
}

fn table(labs: &[LabInfo]) -> String {
    if labs.is_empty() {
        return "there are no labs: start one with `cirri lab up`\n".into();
    }
    let mut text = String::new();
    for lab in labs {
        let routing = lab.routing.map_or(String::new(), |routing| format!(", {routing} routing"));
        text += &format!("lab {} ({}{routing})\n", lab.name, lab.state);
        if lab.state == CRASHED {
            text += &format!("  `cirri lab down --name {}` removes what is left of it\n", lab.name);
        }
        let mut nodes = Table::new(["node", "state", "addresses", "pod networks"]);
        for node in &lab.nodes {
            nodes.row([node.name.clone(), node.state.to_owned(), join(&node.addresses), node.pod_cidrs.join(" ")]);
        }
        let mut pods = Table::new(["pod", "node", "state", "identity", "addresses", "network namespace"]);
        for pod in &lab.pods {
            pods.row([
                format!("{}/{}", pod.namespace, pod.name),
                pod.node.clone(),
                pod.state.clone(),
                pod.identity.map_or("-".to_owned(), |identity| identity.to_string()),
                join(&pod.addresses),
                pod.netns.display().to_string(),
            ]);
        }
        // Not cut to the terminal's width: paths and addresses are here to be copied.
        let tables = [(lab.nodes.len(), nodes), (lab.pods.len(), pods)];
        let tables = tables.iter().filter(|(rows, _)| *rows > 0).map(|(_, table)| indent(&table.render(None)));
        text += &tables.collect::<Vec<_>>().join("\n");
        for pod in lab.pods.iter().filter_map(|pod| Some((pod, pod.error.as_ref()?))) {
            text += &format!("{}/{}: {}\n", pod.0.namespace, pod.0.name, pod.1);
        }
        text.push('\n');
    }
    text
}

fn join(addresses: &[IpAddr]) -> String {
    let all: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
    all.join(" ")
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_of_which_little_is_left_is_named_with_the_way_out() {
        let name: LabName = "t".parse().unwrap();
        assert_eq!(
            table(&[LabInfo::new(&name, CRASHED)]),
            "lab t (crashed)\n  `cirri lab down --name t` removes what is left of it\n\n"
        );
    }

    #[test]
    fn pods_follow_their_nodes() {
        let name: LabName = "t".parse().unwrap();
        let node = NodeInfo {
            name: "node1".into(),
            netns: PathBuf::new(),
            addresses: vec!["172.31.255.11".parse().unwrap()],
            pod_cidrs: Vec::new(),
            state: "ready",
            pid: None,
            socket: PathBuf::new(),
            log: PathBuf::new(),
        };
        let lab = LabInfo { nodes: vec![node], ..LabInfo::new(&name, "up") };
        let head = "lab t (up)\n  NODE   STATE  ADDRESSES      POD NETWORKS\n  node1  ready  172.31.255.11\n";
        assert_eq!(table(&[lab]), format!("{head}\n"));
    }
}
