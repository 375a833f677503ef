//! What a lab remembers about itself: names, addresses, directories, records of pods.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use cirri_control::resource::{self, Pod, Protocol};
use serde::{Deserialize, Serialize};

use super::echo::{Port, Transport};
use super::lock::Lock;
use super::process::{self, ProcessId, write_json};
use super::{disk, expand, names, traces};
use crate::config::{self, Acceleration, ConfigError};

/// Where labs keep their state. In memory, like the namespaces themselves: neither survives a reboot.
pub const ROOT: &str = "/run/cirri/lab";
/// The name of a lab when none is given.
pub const DEFAULT_NAME: &str = "lab";
const NAME_MAX: usize = 16;
/// Longest `bpf.instance`.
const INSTANCE_MAX: usize = 64;

/// A lab's name: letters, digits and underscores. No hyphen, because the hyphen ends the name in the names of the
/// lab's namespaces and pins, and a lab must never mistake another's for its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl FromStr for LabName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(fits) {
            return Err(format!("a lab's name is 1 to {NAME_MAX} of a-z, 0-9 and _ (no hyphen)"));
        }
        Ok(Self(name.into()))
    }
}

impl TryFrom<String> for LabName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        name.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> Self {
        name.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl LabName {
    /// What the names of all its namespaces begin with.
    pub fn prefix(&self) -> String {
        format!("cirri-{}-", self.0)
    }

    /// The namespace of the bridge, the router and etcd.
    pub fn net_namespace(&self) -> String {
        format!("cirri-{}-net", self.0)
    }

    /// The namespace of the host outside the cluster.
    pub fn world_namespace(&self) -> String {
        format!("cirri-{}-world", self.0)
    }

    /// The `bpf.instance` of a node's agent. A node's name may have dots and be longer.
    pub fn bpf_instance(&self, node: &str) -> String {
        names::fitting(&format!("lab-{}-{}", self.0, node.replace('.', "_")), INSTANCE_MAX)
    }

    /// Its state directory.
    pub fn directory(&self) -> PathBuf {
        Path::new(ROOT).join(&self.0)
    }
}

/// How packets travel between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Routing {
    /// Encapsulated in VXLAN, the identity of the sender in the header.
    Overlay,
    /// As they are, by routes to the other nodes' pod networks.
    Direct,
}

impl fmt::Display for Routing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Overlay => "overlay",
            Self::Direct => "direct",
        })
    }
}

/// A lab, as written to `lab.json` in its state directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Lab {
    /// Its name.
    pub name: LabName,
    /// How packets travel between its nodes.
    pub routing: Routing,
    /// Its nodes, in the order of their addresses.
    pub nodes: Vec<Node>,
    /// What its agents' configuration has beside what the lab itself puts there, as `KEY=VALUE`.
    #[serde(default)]
    pub settings: Vec<String>,
    /// How long what should happen may take before that counts as a failure, in seconds: a bound for what hangs. What
    /// is waited for announces itself, so that a short one gains nothing and fails on a machine that is busy.
    #[serde(default = "default_patience")]
    pub patience_s: u64,
}

/// Patience when none is given, in seconds.
pub const DEFAULT_PATIENCE: u64 = 300;

fn default_patience() -> u64 {
    DEFAULT_PATIENCE
}

/// One node of a lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Its name, unique in the lab.
    pub name: String,
    /// Its path under `/run/netns`.
    pub netns: PathBuf,
    /// Its underlay address.
    pub ipv4: Ipv4Addr,
    /// Its underlay address.
    pub ipv6: Ipv6Addr,
}

impl Lab {
    /// Reads a lab that is up.
    ///
    /// # Errors
    /// There is none of that name; it says which there are.
    pub fn load(name: &LabName) -> anyhow::Result<Self> {
        let file = name.directory().join("lab.json");
        let read = fs::read_to_string(&file);
        if let Err(error) = &read
            && ![io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind())
        {
            bail!("cannot read {}: {error}", file.display());
        }
        let Ok(text) = read else {
            let there = traces::all();
            if there.contains(name) {
                bail!("the lab \"{name}\" is not whole: remove what is left of it with `cirri lab down --name {name}`");
            }
            let choice = if name.0 == DEFAULT_NAME { String::new() } else { format!(" --name {name}") };
            let start = format!("there is no lab \"{name}\": start one with `cirri lab up{choice}`");
            if there.is_empty() {
                bail!("{start}");
            }
            let there: Vec<&str> = there.iter().map(|other| other.0.as_str()).collect();
            bail!("{start}, or choose with --name: {}", there.join(", "));
        };
        serde_json::from_str(&text).with_context(|| {
            format!("{} is damaged: take the lab down with `cirri lab down --name {name}`", file.display())
        })
    }

    /// The same with the lab's lock: nobody takes it down in between.
    ///
    /// # Errors
    /// There is none of that name, or another command is changing it.
    pub fn locked(name: &LabName) -> anyhow::Result<(Self, Lock)> {
        // Of one that is not there nothing is locked.
        Self::load(name)?;
        let lock = name.lock().map_err(|error| disk::explain(name, error.into()))?;
        Ok((Self::load(name)?, lock))
    }

    /// Writes `lab.json`.
    ///
    /// # Errors
    /// The file system refused.
    pub fn save(&self) -> anyhow::Result<()> {
        write_json(&self.name.directory().join("lab.json"), self)
    }

    /// [`Lab::patience_s`].
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.patience_s)
    }

    /// The node of that name.
    ///
    /// # Errors
    /// There is none; it says which there are.
    pub fn node(&self, name: &str) -> anyhow::Result<&Node> {
        self.nodes.iter().find(|node| node.name == name).with_context(|| {
            let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
            format!("the lab \"{}\" has no node {name}; it has {}", self.name, names.join(", "))
        })
    }

    /// Whether its cluster state lives in etcd (more than one node) rather than in a folder.
    pub fn has_etcd(&self) -> bool {
        self.nodes.len() > 1
    }

    /// Whether its agents serve the nodes' devices in XDP.
    ///
    /// # Errors
    /// A setting that is none.
    pub fn has_xdp(&self) -> Result<bool, ConfigError> {
        let settings = [vec![format!("routing.mode={}", self.routing)], self.settings.clone()].concat();
        let loaded = config::load(None, |_| None, &settings)?;
        Ok(loaded.config.services.acceleration != Acceleration::Off)
    }

    /// The directory of one node: `agent.yaml`, `agent.log`, `agent.pid`, `state/`, `manifests/`.
    pub fn node_directory(&self, node: &str) -> PathBuf {
        self.name.directory().join("nodes").join(node)
    }

    /// The API socket of one node's agent.
    pub fn agent_socket(&self, node: &str) -> PathBuf {
        self.node_directory(node).join("state").join("agent.sock")
    }

    /// The agent process of one node, if it runs.
    pub fn agent_process(&self, node: &str) -> Option<ProcessId> {
        process::recorded(&self.node_directory(node).join("agent.pid"))
    }

    /// The directory of one pod's programs: their logs, pids and working directory.
    pub fn pod_directory(&self, key: &PodKey) -> PathBuf {
        self.name.directory().join("pods").join(key.file_name())
    }

    /// All pods it has, by key.
    ///
    /// # Errors
    /// A record that is damaged or cannot be read.
    pub fn pods(&self) -> anyhow::Result<Vec<PodRecord>> {
        read_pods(&self.name.directory().join("pods"))
    }

    /// The pod of that name.
    ///
    /// # Errors
    /// There is none; it says which one may be meant, or how to see which there are.
    pub fn pod(&self, key: &PodKey) -> anyhow::Result<PodRecord> {
        let pods = self.pods()?;
        if let Some(pod) = pods.iter().find(|pod| pod.key == *key) {
            return Ok(pod.clone());
        }
        let namesakes: Vec<String> =
            pods.iter().filter(|pod| pod.key.name == key.name).map(|pod| pod.key.to_string()).collect();
        let hint = if namesakes.is_empty() {
            format!("`cirri lab list --name {}` shows those there are", self.name)
        } else {
            format!("is it {}?", namesakes.join(" or "))
        };
        bail!("the lab \"{}\" has no pod {key}: {hint}", self.name)
    }
}

fn read_pods(directory: &Path) -> anyhow::Result<Vec<PodRecord>> {
    // What cannot be read is not what is not there: a pod that is overlooked is never removed.
    let unreadable = |path: &Path| format!("cannot read {}", path.display());
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| unreadable(directory))?,
    };
    let mut pods = Vec::new();
    for entry in entries {
        let file = match entry {
            // The directory went while it was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            other => other.with_context(|| unreadable(directory))?.path().join("pod.json"),
        };
        let text = match fs::read_to_string(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.with_context(|| unreadable(&file))?,
        };
        let pod: PodRecord = serde_json::from_str(&text).with_context(|| format!("{} is damaged", file.display()))?;
        pods.push(pod);
    }
    pods.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(pods)
}

/// A pod's namespace and name, written `namespace/name`; without a namespace it is `default`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PodKey {
    /// The Kubernetes namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
}

impl PodKey {
    /// Where the pod's manifest stands in the store.
    pub fn store_key(&self) -> String {
        format!("resources/Pod/{}/{}", self.namespace, self.name)
    }

    /// As one word: `underscore` separates, because neither part may contain one.
    pub fn file_name(&self) -> String {
        names::fitting(&format!("{}_{}", self.namespace, self.name), names::LONGEST)
    }
}

impl FromStr for PodKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        let fits = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.')
        };
        if !fits(namespace) || !fits(name) {
            return Err(format!("\"{text}\" is not a pod: write NAMESPACE/POD, or POD for the namespace default"));
        }
        Ok(Self { namespace: namespace.into(), name: name.into() })
    }
}

impl TryFrom<String> for PodKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PodKey> for String {
    fn from(key: PodKey) -> Self {
        key.to_string()
    }
}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.namespace, self.name))
    }
}

/// What a lab remembers of one pod, from before its namespace is made until after it is gone.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodRecord {
    /// Its name.
    pub key: PodKey,
    /// The node it runs on.
    pub node: String,
    /// The path of its network namespace.
    pub netns: PathBuf,
    /// The name the container runtime would know it by, handed to the CNI plugin.
    pub container_id: String,
    /// Its addresses, as the CNI plugin answered; none before it is attached.
    pub addresses: Vec<IpAddr>,
    /// What runs in it.
    pub spec: PodSpec,
    /// Whether it is complete: attached and all programs started. A pod that is not is made anew by the next apply.
    pub complete: bool,
    /// What went wrong when it was made.
    pub error: Option<String>,
}

/// The part of a pod's manifest that decides what runs; a change of it restarts the pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PodSpec {
    /// Whether it shares the node's network instead of having its own.
    pub host_network: bool,
    /// Its containers.
    pub containers: Vec<Container>,
}

/// One container of a pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Container {
    /// Its name, unique in the pod.
    pub name: String,
    /// The program and its arguments; empty if there is no program.
    pub argv: Vec<String>,
    /// Its environment.
    pub env: BTreeMap<String, String>,
    /// The ports it declares, those of SCTP left out: the lab does not speak it.
    pub ports: BTreeSet<Port>,
}

impl From<&Pod> for PodSpec {
    fn from(pod: &Pod) -> Self {
        let containers = pod.spec.running().map(|container| {
            let variables = container.env.iter().map(|variable| (variable.name.as_str(), variable.value.as_str()));
            let env = expand::environment(variables);
            let argv = container.command.iter().chain(&container.args).map(|word| expand::text(word, &env)).collect();
            Container { name: container.name.clone(), argv, env, ports: ports(container) }
        });
        Self { host_network: pod.spec.host_network, containers: containers.collect() }
    }
}

fn ports(container: &resource::Container) -> BTreeSet<Port> {
    let port = |port: &resource::ContainerPort| {
        let protocol = match port.protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => return None,
        };
        Some(Port { number: port.container_port, protocol })
    };
    container.ports.iter().filter_map(port).collect()
}

impl Container {
    /// Whether the built-in echo server stands in for its program.
    pub fn is_echo(&self) -> bool {
        self.argv.is_empty() && !self.ports.is_empty()
    }

    /// Whether anything runs for it at all.
    pub fn runs(&self) -> bool {
        !self.argv.is_empty() || self.is_echo()
    }
}

impl PodRecord {
    /// The processes of this pod that its records know, by container.
    pub fn programs(&self, lab: &Lab) -> Vec<(String, Option<ProcessId>)> {
        let directory = lab.pod_directory(&self.key);
        self.spec
            .program_names()
            .into_iter()
            .map(|name| {
                let process = process::recorded(&directory.join(format!("{name}.pid")));
                (name, process)
            })
            .collect()
    }

    /// Writes the record.
    ///
    /// # Errors
    /// The file system refused.
    pub fn save(&self, lab: &Lab) -> anyhow::Result<()> {
        let directory = lab.pod_directory(&self.key);
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        write_json(&directory.join("pod.json"), self)
    }
}

/// The program name of the one echo server that serves all containers of a pod that only declare ports. No container
/// can be called so: an underscore is not allowed in their names.
pub const ECHO_PROGRAM: &str = "_echo";

impl PodSpec {
    /// The programs that run in the pod: its containers with a command, and the echo server if it needs one.
    pub fn program_names(&self) -> Vec<String> {
        let commands = self.containers.iter().filter(|c| !c.argv.is_empty()).map(|c| c.name.clone());
        let echo = self.containers.iter().any(Container::is_echo).then(|| ECHO_PROGRAM.to_owned());
        commands.chain(echo).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_name_can_never_begin_another_labs_namespaces() {
        assert!("a-b".parse::<LabName>().is_err());
        assert!("".parse::<LabName>().is_err());
        assert!("../x".parse::<LabName>().is_err());
        assert!("a".repeat(NAME_MAX + 1).parse::<LabName>().is_err());
        let (a, ab): (LabName, LabName) = ("a".parse().unwrap(), "ab".parse().unwrap());
        assert!(!ab.net_namespace().starts_with(&a.prefix()));
    }

    #[test]
    fn every_node_has_an_instance_of_its_own_that_its_agent_takes() {
        let lab: LabName = "a".repeat(NAME_MAX).parse().unwrap();
        let long = "n".repeat(253);
        let instances = ["node1", "node.one", &long, &long[1..]].map(|node| lab.bpf_instance(node));
        for (index, instance) in instances.iter().enumerate() {
            assert!(
                instance.starts_with(&lab.bpf_instance("")) && !instances[..index].contains(instance),
                "{instance}"
            );
            let settings = [format!("bpf.instance={instance}")];
            assert!(config::load(None, |_| None, &settings).is_ok(), "{instance}");
        }
    }

    #[test]
    fn a_pod_without_a_namespace_is_in_default_and_no_name_leaves_the_state_directory() {
        assert_eq!("web".parse::<PodKey>().unwrap().to_string(), "default/web");
        assert_eq!("shop/web-0.a".parse::<PodKey>().unwrap().namespace, "shop");
        for bad in ["", "/web", "shop/", "a/b/c", "../x", "a/..", "A/b"] {
            assert!(bad.parse::<PodKey>().is_err(), "{bad}");
        }
    }

    #[test]
    fn pods_that_go_while_they_are_read_are_not_there() {
        let root = tempfile::tempdir().unwrap();
        let pods = root.path().join("pods");
        let key: PodKey = "web".parse().unwrap();
        let record = PodRecord {
            key,
            node: "node1".into(),
            netns: PathBuf::new(),
            container_id: String::new(),
            addresses: Vec::new(),
            spec: PodSpec::default(),
            complete: true,
            error: None,
        };
        let text = serde_json::to_vec(&record).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for pod in ["a", "b", "c"] {
                        fs::create_dir_all(pods.join(pod)).unwrap();
                        fs::write(root.path().join("tmp"), &text).unwrap();
                        fs::rename(root.path().join("tmp"), pods.join(pod).join("pod.json")).unwrap();
                    }
                    fs::remove_dir_all(&pods).unwrap();
                }
            });
            let mut seen = 0;
            let outcome = loop {
                match read_pods(&pods) {
                    Ok(pods) => seen += pods.len(),
                    Err(error) => break Err(error),
                }
                if seen > 5000 {
                    break Ok(());
                }
            };
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            outcome.unwrap();
        });
    }

    #[test]
    fn one_echo_server_serves_every_container_without_a_command() {
        let echo = |name: &str| Container {
            name: name.into(),
            ports: ["80/tcp".parse().unwrap()].into(),
            ..Container::default()
        };
        let program = Container { argv: vec!["nginx".into()], ..echo("web") };
        let idle = Container { name: "idle".into(), ..Container::default() };
        let spec = PodSpec { containers: vec![echo("a"), echo("b"), program, idle], ..PodSpec::default() };
        assert_eq!(spec.program_names(), ["web", ECHO_PROGRAM]);
    }
}
