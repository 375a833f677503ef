//! A lab for a test: the real `cirri lab`, brought up before and taken down after, whatever happens.
//!
//! With `CIRRI_KEEP=1` the lab of a test that failed stays up, and the test says how to enter it.

mod flood;
mod recipes;
mod traffic;
mod verdicts;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use cirri_loader::net::Namespace;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use flood::{Flood, Flooded};
pub use recipes::{Recipe, Recipes};
pub use traffic::{Conversation, LOAD_PATIENCE, Load, LoadReport, LongReport, QUIET};
pub use verdicts::is_of;

/// A lab that is up. Dropping it takes it down.
#[derive(Debug)]
pub struct Lab {
    name: String,
    folder: PathBuf,
}

/// Why a lab did not do what was asked. `{:?}` says the same as `{}`, so that `unwrap` reads well.
#[derive(thiserror::Error)]
pub enum LabError {
    /// The binary is not there.
    #[error("{0} is not there: `cargo build -p cirri`, or name the binary in CIRRI_BIN")]
    NoBinary(PathBuf),
    /// The lab has no such node or pod.
    #[error("the lab has no {0}")]
    Unknown(String),
    /// It could not be started, or a file could not be written.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It ended with an error.
    #[error("`{command}` ended with {status}:\n{stderr}")]
    Failed {
        /// The command.
        command: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// What it said.
        stderr: String,
    },
    /// It printed something else than the JSON that is documented.
    #[error("`{command}` printed no such JSON: {problem}:\n{stdout}")]
    Answer {
        /// The command.
        command: String,
        /// Where it went wrong.
        problem: String,
        /// The beginning of what it printed.
        stdout: String,
    },
}

/// A lab, as `cirri lab list -o json` tells it.
#[derive(Debug, Clone, Deserialize)]
pub struct Listed {
    /// `up`, `degraded`, `changing` or `crashed`.
    pub state: String,
    /// Where its logs, records and agents' states are.
    pub directory: PathBuf,
    /// The namespace of the bridge and etcd.
    pub net: PathBuf,
    /// The host outside.
    pub world: ListedWorld,
    /// Its nodes.
    pub nodes: Vec<ListedNode>,
    /// Its pods.
    pub pods: Vec<ListedPod>,
}

/// The host outside.
#[derive(Debug, Clone, Deserialize)]
pub struct ListedWorld {
    /// Its namespace.
    pub netns: PathBuf,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// A node.
#[derive(Debug, Clone, Deserialize)]
pub struct ListedNode {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub netns: PathBuf,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// `ready`, `starting` or `down`.
    pub state: String,
    /// Its agent's process.
    pub pid: Option<i32>,
    /// Its agent's socket.
    pub socket: PathBuf,
    /// Its agent's log.
    pub log: PathBuf,
}

/// A pod.
#[derive(Debug, Clone, Deserialize)]
pub struct ListedPod {
    /// Its namespace in manifests.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// `running`, or what is wrong.
    pub state: String,
}

/// One cell of `cirri lab probe -o json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Probed {
    /// `namespace/pod`, `node:name` or `world`.
    #[serde(rename = "source", alias = "from")]
    pub from: String,
    /// Likewise.
    #[serde(rename = "destination", alias = "to")]
    pub to: String,
    /// The address that was tried.
    pub address: IpAddr,
    /// Absent for ICMP.
    pub port: Option<u16>,
    /// `tcp`, `udp` or `icmp`.
    pub protocol: String,
    /// 4 or 6.
    pub family: u8,
    /// `allowed`, `denied`, `refused` or `error`.
    pub verdict: String,
    /// Why, unless it was allowed.
    pub error: Option<String>,
    /// Milliseconds that the last try took.
    #[serde(rename = "time_ms", alias = "ms")]
    pub ms: f64,
    /// The pod that answered, if its server says so.
    pub answered_by: Option<String>,
    /// How often it was tried.
    pub tries: u32,
    /// Who answered, and how often.
    pub answers: Vec<Answered>,
}

/// Answers of one pod to one client.
#[derive(Debug, Clone, Deserialize)]
pub struct Answered {
    /// The pod.
    pub by: String,
    /// The client's address that it saw.
    pub client: IpAddr,
    /// How often.
    pub count: u32,
}

impl Lab {
    /// Brings up a lab of that many nodes, called `node1`, `node2` and so on. Its name is `name` (at
    /// most 10 letters) and the number of this process; what is left of such a lab whose process is
    /// gone goes first.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn up(name: &str, nodes: usize, more: &[&str]) -> Result<Lab, LabError> {
        sweep(name)?;
        let lab = Lab::named(name);
        let nodes = nodes.to_string();
        let mut arguments = vec!["lab", "up", "--name", &lab.name, "--nodes", &nodes];
        arguments.extend(more);
        run(arguments)?;
        Ok(lab)
    }

    /// The guard of a lab that something else brings up, or half up. Dropping it takes it down.
    pub fn named(name: &str) -> Lab {
        let name = format!("{name}_{}", base36(std::process::id()));
        let folder = std::env::temp_dir().join(format!("cirri-e2e-{name}"));
        Lab { name, folder }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    // === Manifests and probes ===

    /// Makes the lab equal to these manifests and waits until they are enforced everywhere.
    ///
    /// # Errors
    /// If they are refused, or not enforced in time.
    pub fn apply(&self, manifests: &str) -> Result<(), LabError> {
        let output = self.try_apply(manifests)?;
        succeeded(&["lab", "apply"], output).map(drop)
    }

    /// The same, with the outcome whatever it is.
    ///
    /// # Errors
    /// If it could not be tried.
    pub fn try_apply(&self, manifests: &str) -> Result<Output, LabError> {
        self.hand_in(manifests, &["--wait"])
    }

    /// Hands the manifests in, and waits for nothing.
    ///
    /// # Errors
    /// If they are refused.
    pub fn write(&self, manifests: &str) -> Result<(), LabError> {
        let output = self.hand_in(manifests, &[])?;
        succeeded(&["lab", "apply"], output).map(drop)
    }

    fn hand_in(&self, manifests: &str, more: &[&str]) -> Result<Output, LabError> {
        let io = |source| LabError::Io { what: format!("cannot write {}", self.folder.display()), source };
        std::fs::create_dir_all(&self.folder).map_err(io)?;
        std::fs::write(self.folder.join("all.yaml"), manifests).map_err(io)?;
        let arguments = ["lab", "apply", "--name", &self.name].map(OsStr::new);
        let from = [OsStr::new("-f"), self.folder.as_os_str()];
        output(arguments.into_iter().chain(more.iter().map(OsStr::new)).chain(from))
    }

    /// Probes with these arguments beside `-o json`. That something is denied is no error.
    ///
    /// # Errors
    /// If it could not probe at all.
    pub fn probe(&self, arguments: &[&str]) -> Result<Vec<Probed>, LabError> {
        let mut all = vec!["lab", "probe", "--name", &self.name, "-o", "json"];
        all.extend(arguments);
        let output = output(&all)?;
        parse(&all, &output)
    }

    // === What there is ===

    /// Everything that `cirri lab list` knows of it.
    ///
    /// # Errors
    /// If the lab cannot be listed.
    pub fn list(&self) -> Result<Listed, LabError> {
        let arguments = ["lab", "list", "--name", &self.name, "-o", "json"];
        let output = run(arguments)?;
        let labs: Vec<Listed> = parse(&arguments, &output)?;
        labs.into_iter().next().ok_or_else(|| LabError::Unknown(self.name.clone()))
    }

    /// The addresses of every pod (`namespace/name`), every node (`name`) and `world`, the host
    /// outside, as it uses them unless told otherwise.
    ///
    /// # Errors
    /// If the lab cannot be listed.
    pub fn addresses(&self) -> Result<BTreeMap<String, Vec<IpAddr>>, LabError> {
        let lab = self.list()?;
        let mut addresses = BTreeMap::new();
        addresses.insert("world".to_string(), lab.world.addresses.into_iter().take(2).collect());
        addresses.extend(lab.nodes.into_iter().map(|node| (node.name, node.addresses)));
        let pods = lab.pods.into_iter();
        addresses.extend(pods.map(|pod| (format!("{}/{}", pod.namespace, pod.name), pod.addresses)));
        Ok(addresses)
    }

    /// One node.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn node(&self, name: &str) -> Result<ListedNode, LabError> {
        let found = self.list()?.nodes.into_iter().find(|node| node.name == name);
        found.ok_or_else(|| LabError::Unknown(format!("node {name}")))
    }

    /// The network namespace of a pod (`namespace/name`), of `node:NAME` or of `world`.
    ///
    /// # Errors
    /// If there is none such.
    pub fn netns(&self, whose: &str) -> Result<Namespace, LabError> {
        let unknown = || LabError::Unknown(whose.to_string());
        let lab = self.list()?;
        let path = if whose == "world" {
            lab.world.netns
        } else if let Some(name) = whose.strip_prefix("node:") {
            lab.nodes.into_iter().find(|node| node.name == name).ok_or_else(unknown)?.netns
        } else {
            let pod = lab.pods.into_iter().find(|pod| format!("{}/{}", pod.namespace, pod.name) == whose);
            pod.ok_or_else(unknown)?.netns
        };
        Namespace::open(path).map_err(|error| LabError::Unknown(format!("namespace of {whose}: {error}")))
    }

    // === Agents ===

    /// Asks a node's agent: `cirri ARGUMENTS -o json`.
    ///
    /// # Errors
    /// If it does not answer, or something else than was expected.
    pub fn ask<T: DeserializeOwned>(&self, node: &str, arguments: &[&str]) -> Result<T, LabError> {
        let socket = self.socket(node);
        let mut all = vec!["--socket", &socket];
        all.extend(arguments);
        all.extend(["-o", "json"]);
        let output = run(&all)?;
        parse(&all, &output)
    }

    /// The path of a node's agent's socket.
    pub fn socket(&self, node: &str) -> String {
        format!("/run/cirri/lab/{}/nodes/{node}/state/agent.sock", self.name)
    }

    /// Packets that a node counted under a name, as `cirri status` shows it.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn counter(&self, node: &str, name: &str) -> Result<u64, LabError> {
        let status: Value = self.ask(node, &["status"])?;
        Ok(status["counters"][name]["packets"].as_u64().unwrap_or_default())
    }

    /// The drops that a node remembers, those that `filter` lets pass, as `cirri observe` prints them.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn drops(&self, node: &str, filter: &[&str]) -> Result<Vec<Value>, LabError> {
        self.flows(node, &[&["--verdict", "dropped"], filter].concat())
    }

    /// The same of all that it remembers, the oldest first.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn flows(&self, node: &str, filter: &[&str]) -> Result<Vec<Value>, LabError> {
        let socket = self.socket(node);
        let arguments = [&["--socket", &socket, "observe", "-o", "json"], filter].concat();
        let output = run(&arguments)?;
        let lines = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| parse(&arguments, &Output { stdout: line.to_vec(), ..output.clone() })).collect()
    }

    /// The established connections of a node, both families.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn recipes(&self, node: &str) -> Result<Recipes, LabError> {
        Recipes::of(self, node)
    }

    /// Kills a node's agent (SIGKILL), which then stays away.
    ///
    /// # Errors
    /// If it is not running.
    pub fn kill_agent(&self, node: &str) -> Result<(), LabError> {
        let pid = self.node(node)?.pid.ok_or_else(|| LabError::Unknown(format!("agent of {node}")))?;
        kill(pid)
    }

    /// Restarts a node's agent with these arguments of `cirri lab restart`.
    ///
    /// # Errors
    /// If it does not come back.
    pub fn restart(&self, node: &str, more: &[&str]) -> Result<(), LabError> {
        let mut arguments = vec!["lab", "restart", "--name", &self.name, node];
        arguments.extend(more);
        run(arguments).map(drop)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let failing = std::thread::panicking();
        if failing && std::env::var_os("CIRRI_KEEP").is_some() {
            eprintln!("the lab stays: `cirri lab list --name {0}`, `cirri lab down --name {0}`", self.name);
            return;
        }
        // What failed may point to a log; the next test of that name sweeps it away.
        let logs = failing.then_some("--keep-logs");
        let gone = run(["lab", "down", "--name", &self.name].into_iter().chain(logs));
        // Gone already if nothing was applied.
        let _ = std::fs::remove_dir_all(&self.folder);
        if !failing {
            gone.expect("the lab of a test goes with it");
        }
    }
}

impl fmt::Debug for LabError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The binary under test: `CIRRI_BIN`, else that of the last `cargo build`.
///
/// # Errors
/// If it is not there.
pub fn binary() -> Result<PathBuf, LabError> {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/cirri");
    let path = std::env::var_os("CIRRI_BIN").map_or_else(built, PathBuf::from);
    path.canonicalize().map_err(|_| LabError::NoBinary(path))
}

/// Runs `cirri` with these arguments to its end.
///
/// # Errors
/// If it ends with anything but success.
pub fn run<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<Output, LabError> {
    let arguments: Vec<A> = arguments.into_iter().collect();
    let output = output(&arguments)?;
    succeeded(&arguments, output)
}

/// The same, with the outcome whatever it is.
///
/// # Errors
/// If it cannot be started.
pub fn output<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<Output, LabError> {
    let binary = binary()?;
    Command::new(&binary)
        .args(arguments)
        .output()
        .map_err(|source| LabError::Io { what: format!("cannot start {}", binary.display()), source })
}

/// Kills one process (SIGKILL) and waits until it is gone.
///
/// # Errors
/// If it is not there.
pub fn kill(pid: i32) -> Result<(), LabError> {
    let failed = |source| LabError::Io { what: format!("cannot kill {pid}"), source };
    let killed = Command::new("kill").args(["-9", &pid.to_string()]).status().map_err(failed)?;
    if !killed.success() {
        return Err(LabError::Unknown(format!("process {pid}")));
    }
    let process = Path::new("/proc").join(pid.to_string());
    eventually("a killed process is gone", Duration::from_secs(5), || {
        // One that nobody waits for stays as a zombie, whose threads have all ended when it is alone.
        let zombie = std::fs::read_to_string(process.join("stat")).map_or(true, |stat| stat.contains(") Z "));
        zombie && std::fs::read_dir(process.join("task")).map_or(true, |threads| threads.count() <= 1)
    });
    Ok(())
}

/// What a program prints that runs inside a network namespace; panics unless it succeeds.
pub fn printed(inside: &Namespace, argv: &[&str]) -> String {
    let output = inside.run(|| Command::new(argv[0]).args(&argv[1..]).output()).expect("the namespace can be entered");
    let output = output.unwrap_or_else(|error| panic!("{argv:?}: {error}"));
    assert!(output.status.success(), "{argv:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits until something is so; panics with its name if it does not come to that. For what nothing announces.
pub fn eventually(what: &str, patience: Duration, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Takes down labs of this name whose process is gone.
fn sweep(name: &str) -> Result<(), LabError> {
    for entry in std::fs::read_dir("/run/cirri/lab").into_iter().flatten().flatten() {
        let there = entry.file_name().to_string_lossy().into_owned();
        let owner = there
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('_').and_then(|pid| u32::from_str_radix(pid, 36).ok()));
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            run(["lab", "down", "--name", &there])?;
        }
    }
    Ok(())
}

/// As short as letters and digits make it: a lab's name has 16 of them.
fn base36(number: u32) -> String {
    let rest = if number < 36 { String::new() } else { base36(number / 36) };
    rest + &char::from_digit(number % 36, 36).map(String::from).unwrap_or_default()
}

fn succeeded<A: AsRef<OsStr>>(arguments: &[A], output: Output) -> Result<Output, LabError> {
    if output.status.success() {
        return Ok(output);
    }
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(LabError::Failed { command: spelled(arguments), status: output.status, stderr })
}

fn parse<T: DeserializeOwned, A: AsRef<OsStr>>(arguments: &[A], output: &Output) -> Result<T, LabError> {
    serde_json::from_slice(&output.stdout).map_err(|error| {
        let told = [output.stderr.as_slice(), output.stdout.as_slice()].concat();
        LabError::Answer {
            command: spelled(arguments),
            problem: error.to_string(),
            stdout: String::from_utf8_lossy(&told).chars().take(2000).collect(),
        }
    })
}

fn spelled<A: AsRef<OsStr>>(arguments: &[A]) -> String {
    let words = arguments.iter().map(|argument| argument.as_ref().to_string_lossy());
    std::iter::once("cirri".into()).chain(words).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_a_process_takes_five_letters_at_most_and_can_be_read_back() {
        for number in [0, 35, 36, 32_768, 4_194_304] {
            let text = base36(number);
            assert_eq!(u32::from_str_radix(&text, 36), Ok(number));
            assert!(text.len() <= 5, "{text}");
        }
    }
}
