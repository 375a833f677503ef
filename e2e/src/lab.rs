//! A lab for a test: the real `cirri lab`, brought up before and taken down after, whatever happens.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde::Deserialize;

/// A lab that is up. Dropping it takes it down.
#[derive(Debug)]
pub struct Lab {
    name: String,
    binary: PathBuf,
    folder: PathBuf,
}

/// Why a lab did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The binary is not where the environment says.
    #[error("CIRRI_BIN is not set: run the lab tests with `cargo xtask e2e`")]
    NoBinary,
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
    /// `allowed`, `denied` or `error`.
    pub verdict: String,
    /// Why, unless it was allowed.
    pub error: Option<String>,
    /// Milliseconds that the last try took.
    #[serde(rename = "time_ms", alias = "ms")]
    pub ms: f64,
    /// The pod that answered, if its server says so.
    pub answered_by: Option<String>,
}

impl Lab {
    /// Brings up a lab of that many nodes, called `node1`, `node2` and so on. What is left of an
    /// earlier lab of this name goes first.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn up(name: &str, nodes: usize, more: &[&str]) -> Result<Lab, LabError> {
        let binary = std::env::var_os("CIRRI_BIN").map(PathBuf::from).ok_or(LabError::NoBinary)?;
        let folder = std::env::temp_dir().join(format!("cirri-e2e-{name}-{}", std::process::id()));
        let lab = Lab { name: name.to_string(), binary, folder };
        lab.run(["lab", "down", "--name", name])?;
        let nodes = nodes.to_string();
        let mut arguments = vec!["lab", "up", "--name", name, "--nodes", &nodes];
        arguments.extend(more);
        lab.run(arguments)?;
        Ok(lab)
    }

    /// Makes the lab equal to these manifests and waits until they are enforced everywhere.
    ///
    /// # Errors
    /// If they are refused, or not enforced in time.
    pub fn apply(&self, manifests: &str) -> Result<(), LabError> {
        let io = |source| LabError::Io { what: format!("cannot write {}", self.folder.display()), source };
        std::fs::create_dir_all(&self.folder).map_err(io)?;
        std::fs::write(self.folder.join("all.yaml"), manifests).map_err(io)?;
        let arguments = ["lab", "apply", "--name", &self.name, "--wait", "-f"].map(OsStr::new);
        self.run(arguments.into_iter().chain([self.folder.as_os_str()])).map(|_| ())
    }

    /// Probes with these arguments beside `-o json`. That something is denied is no error.
    ///
    /// # Errors
    /// If it could not probe at all.
    pub fn probe(&self, arguments: &[&str]) -> Result<Vec<Probed>, LabError> {
        let mut all = vec!["lab", "probe", "--name", &self.name, "-o", "json"];
        all.extend(arguments);
        let output = self.output(&all)?;
        parse(&all, &output)
    }

    /// The addresses of every pod (`namespace/name`), every node (`name`) and `world`, the host
    /// outside, as it uses them unless told otherwise.
    ///
    /// # Errors
    /// If the lab cannot be listed.
    pub fn addresses(&self) -> Result<BTreeMap<String, Vec<IpAddr>>, LabError> {
        let arguments = ["lab", "list", "--name", &self.name, "-o", "json"];
        let output = self.run(arguments)?;
        let labs: Vec<Listed> = parse(&arguments, &output)?;
        let mut addresses = BTreeMap::new();
        for lab in labs {
            addresses.insert("world".to_string(), lab.world.addresses.into_iter().take(2).collect());
            addresses.extend(lab.nodes.into_iter().map(|node| (node.name, node.addresses)));
            let pods = lab.pods.into_iter();
            addresses.extend(pods.map(|pod| (format!("{}/{}", pod.namespace, pod.name), pod.addresses)));
        }
        Ok(addresses)
    }

    /// Runs `cirri` with these arguments to its end.
    ///
    /// # Errors
    /// If it ends with anything but success.
    pub fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Output, LabError> {
        let arguments: Vec<A> = arguments.into_iter().collect();
        let output = self.output(&arguments)?;
        if output.status.success() {
            return Ok(output);
        }
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(LabError::Failed { command: spelled(&arguments), status: output.status, stderr })
    }

    fn output<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<Output, LabError> {
        Command::new(&self.binary)
            .args(arguments)
            .output()
            .map_err(|source| LabError::Io { what: format!("cannot start {}", self.binary.display()), source })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.run(["lab", "down", "--name", &self.name]) {
            eprintln!("{error}");
        }
        // Gone already if nothing was applied.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[derive(Deserialize)]
struct Listed {
    world: ListedWorld,
    nodes: Vec<ListedNode>,
    pods: Vec<ListedPod>,
}

#[derive(Deserialize)]
struct ListedWorld {
    addresses: Vec<IpAddr>,
}

#[derive(Deserialize)]
struct ListedNode {
    name: String,
    addresses: Vec<IpAddr>,
}

#[derive(Deserialize)]
struct ListedPod {
    namespace: String,
    name: String,
    addresses: Vec<IpAddr>,
}

fn parse<T: serde::de::DeserializeOwned, A: AsRef<OsStr>>(arguments: &[A], output: &Output) -> Result<T, LabError> {
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
