//! A node's agent: its configuration, and how it is started.
//!
//! What a start needs is made and opened before an agent that runs is stopped: one that cannot be started again had
//! better go on.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::cgroup;
use super::cluster;
use super::interrupt::Interrupt;
use super::netns;
use super::process::{Start, append_to, own_binary};
use super::ready::Readiness;
use super::state::{Lab, Node};
use super::traces;

/// Starts a node's agent and waits until it answers.
///
/// # Errors
/// Its files cannot be written, or it cannot be started, ends, or does not answer in time.
pub fn start(lab: &Lab, node: &Node, interrupt: &Interrupt) -> anyhow::Result<()> {
    Prepared::new(lab, node)?.start(interrupt)
}

/// An agent that can be started: all that it takes is there.
pub struct Prepared<'a> {
    lab: &'a Lab,
    node: &'a Node,
    argv: Vec<String>,
    group: PathBuf,
    log: PathBuf,
    ready: Readiness,
}

impl<'a> Prepared<'a> {
    /// Makes and opens what a start takes.
    ///
    /// # Errors
    /// What is missing.
    pub fn new(lab: &'a Lab, node: &'a Node) -> anyhow::Result<Self> {
        // Settings that another version took.
        lab.has_xdp()?;
        let directory = lab.node_directory(&node.name);
        for part in ["state", "manifests"] {
            let part = directory.join(part);
            fs::create_dir_all(&part).with_context(|| format!("cannot make {}", part.display()))?;
        }
        let group = cgroup::of(&lab.name, &node.name)?;
        cgroup::create(&group)?;
        if netns::id(&node.netns).is_none() {
            let (name, path) = (&lab.name, node.netns.display());
            bail!("{path} is gone: `cirri lab down --name {name}` and `cirri lab up --name {name}` start afresh");
        }
        let file = directory.join("agent.yaml");
        // In one step: an agent that goes on reads its old one whole.
        crate::files::write_atomic(&file, agent_configuration(lab, node, &group).as_bytes())
            .with_context(|| format!("cannot write {}", file.display()))?;
        let mut argv = vec![own_binary()?, "agent".into(), "--config".into(), file.display().to_string()];
        argv.extend(lab.settings.iter().flat_map(|setting| ["--set".to_owned(), setting.clone()]));
        let log = directory.join("agent.log");
        append_to(&log)?;
        let ready = Readiness::listen(directory.join("agent.notify"))?;
        Ok(Self { lab, node, argv, group, log, ready })
    }

    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// It cannot be started, ends, or does not answer in time.
    pub fn start(self, interrupt: &Interrupt) -> anyhow::Result<()> {
        let Self { lab, node, argv, group, log, ready } = self;
        let directory = lab.node_directory(&node.name);
        let child = Start {
            netns: &node.netns,
            cgroup: &group,
            argv: &argv,
            env: &ready.env(),
            directory: &directory,
            log: &log,
            pipe_stdout: false,
        }
        .spawn(&directory.join("agent.pid"))?;
        ready.wait(&format!("the agent of {}", node.name), &child, &log, lab.patience(), interrupt)
    }
}

/// The configuration of a node's agent: what differs from the defaults.
fn agent_configuration(lab: &Lab, node: &Node, group: &Path) -> String {
    let directory = lab.node_directory(&node.name);
    let store = if lab.has_etcd() {
        format!("  kind: etcd\n  etcd:\n    endpoints: [\"{}\"]\n", cluster::etcd_url())
    } else {
        format!("  kind: folder\n  folder: {}\n", quoted(&directory.join("manifests")))
    };
    format!(
        "# Written by `cirri lab up`.\n\
         node:\n  name: {name}\n  devices: [eth0]\n  ipv4: {ipv4}\n  ipv6: \"{ipv6}\"\n\
         routing:\n  mode: {routing}\n\
         store:\n{store}\
         stateDir: {state}\n\
         services:\n  socket:\n    cgroup: {group}\n\
         bpf:\n  pinRoot: {pins}\n  instance: {instance}\n",
        name = quoted(Path::new(&node.name)),
        ipv4 = node.ipv4,
        ipv6 = node.ipv6,
        routing = lab.routing,
        group = quoted(group),
        state = quoted(&directory.join("state")),
        pins = traces::PIN_ROOT,
        instance = lab.name.bpf_instance(&node.name),
    )
}

/// A path as a YAML string, so that a name such as `1` or `null` stays one.
fn quoted(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::super::state::{LabName, Routing};
    use super::*;

    #[test]
    fn a_node_with_a_name_that_yaml_reads_otherwise_keeps_it() {
        let name: LabName = "t".parse().unwrap();
        let lab = Lab::described(&name, &["1e3".into()], Routing::Direct, &[]);
        let text = agent_configuration(&lab, &lab.nodes[0], Path::new("/group"));
        assert!(text.contains("name: \"1e3\"\n"), "{text}");
        assert!(text.contains("kind: folder"), "{text}");
    }
}
