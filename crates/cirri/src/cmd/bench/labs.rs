//! Labs to measure in: made and asked through the command line, as anybody would.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use cirri_loader::Tables;
use serde::Deserialize;

use crate::lab::cgroup;

/// A lab; taken down with its guard.
pub struct BenchLab {
    name: String,
    /// Manifests go here.
    pub folder: PathBuf,
}

/// What `cirri lab list -o json` says, as far as it is needed.
#[derive(Debug, Deserialize)]
pub struct Info {
    /// The namespace of its etcd.
    pub net: PathBuf,
    pub nodes: Vec<NodeInfo>,
    pub pods: Vec<PodInfo>,
}

#[derive(Debug, Deserialize)]
pub struct NodeInfo {
    pub pid: Option<i32>,
    pub socket: PathBuf,
    pub log: PathBuf,
}

#[derive(Debug, Deserialize)]
pub struct PodInfo {
    pub name: String,
    pub netns: PathBuf,
    pub addresses: Vec<IpAddr>,
}

impl BenchLab {
    /// Brings one up. `tag` tells the labs of this process apart.
    pub fn up(tag: &str, nodes: usize, routing: &str) -> Result<BenchLab> {
        let name = format!("bench{}{tag}", std::process::id());
        let folder = std::env::temp_dir().join(format!("cirri-{name}"));
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let lab = BenchLab { name, folder };
        lab.cirri(&["up", "--nodes", &nodes.to_string(), "--routing", routing])?;
        Ok(lab)
    }

    /// Makes it equal to its folder, and waits until that is enforced.
    pub fn apply(&self) -> Result<()> {
        let folder = self.folder.to_string_lossy().into_owned();
        self.cirri(&["apply", "-f", &folder, "--wait", "--timeout", "600"]).map(drop)
    }

    /// Writes a manifest into the folder.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.folder.join(file);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// What it is made of.
    pub fn info(&self) -> Result<Info> {
        let text = self.cirri(&["list", "-o", "json"])?;
        let labs: Vec<Info> = serde_json::from_str(&text).context("`cirri lab list` answered something else")?;
        labs.into_iter().next().context("the lab is gone")
    }

    /// The instances of its agents, below a pin root.
    pub fn instances(&self, pin_root: &Path) -> Result<Vec<String>> {
        let prefix = format!("lab-{}-", self.name);
        let entries = std::fs::read_dir(pin_root).with_context(|| format!("cannot list {}", pin_root.display()))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.filter(|name| name.starts_with(&prefix)).collect())
    }

    /// The control group of a node, which the programs on its sockets are attached to.
    pub fn group(&self, node: &str) -> Result<PathBuf> {
        cgroup::of(&self.name.parse().map_err(anyhow::Error::msg)?, node)
    }

    /// The tables of a lab of one node.
    pub fn tables(&self, pin_root: &Path) -> Result<Tables> {
        let instances = self.instances(pin_root)?;
        let instance = instances.first().context("a lab without an agent")?;
        Ok(Tables::open(pin_root, instance)?)
    }

    fn cirri(&self, words: &[&str]) -> Result<String> {
        let [verb, rest @ ..] = words else { bail!("no verb") };
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["lab", verb, "--name", &self.name]).args(rest);
        let output = command.output().with_context(|| format!("cannot run `cirri lab {verb}`"))?;
        if !output.status.success() {
            bail!("`cirri lab {verb}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}

impl Drop for BenchLab {
    fn drop(&mut self) {
        if let Err(error) = self.cirri(&["down"]) {
            eprintln!("cirri: {error:#}");
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Info {
    /// Namespace and IPv4 address of a pod.
    pub fn pod(&self, name: &str) -> Result<(PathBuf, IpAddr)> {
        let pod = self.pods.iter().find(|pod| pod.name == name).with_context(|| format!("there is no pod {name}"))?;
        let v4 = pod.addresses.iter().find(|ip| ip.is_ipv4()).with_context(|| format!("pod {name} has no IPv4"))?;
        Ok((pod.netns.clone(), *v4))
    }
}

/// A pod that only exists.
pub fn pod(name: &str, node: &str, role: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: bench, labels: {{role: {role}}}}}\n\
         spec: {{nodeName: {node}, containers: [{{name: idle, image: none}}]}}\n"
    )
}

/// The namespace that they are in.
pub const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: bench}\n";

/// A policy that lets the client in by its last rule, after `rules - 1` rules about others.
pub fn policy(name: &str, role: &str, rules: usize) -> String {
    let mut text = format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: bench}}\n\
         spec:\n  podSelector: {{matchLabels: {{role: {role}}}}}\n  policyTypes: [Ingress]\n  ingress:\n"
    );
    let ports = "ports: [{port: 8080, protocol: TCP}, {port: 8081, protocol: TCP}]";
    for n in 0..rules.saturating_sub(1) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  - from: [{{ipBlock: {{cidr: 10.{}.{}.0/24}}}}]\n    {ports}", 100 + n / 250, n % 250);
    }
    let _ = writeln!(text, "  - from: [{{podSelector: {{matchLabels: {{role: client}}}}}}]\n    {ports}");
    text
}
