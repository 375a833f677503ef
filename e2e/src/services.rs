//! Cases of services as files: `cases/services/NNN-name.yaml`, over the pods of `pods.yaml`.
//!
//! - `because`: why it must come out so, from the API's documentation.
//! - `labs`: in which of the [`Setting`]s it is tried.
//! - `manifests`: services and slices, in the namespace `svc`. Addresses are written as `{{ip4:svc/web1}}`.
//! - `probes`: who asks what, and what must come of it. `from` names pods of `svc`, `node:NAME`, `world` or
//!   `world@ADDRESS`; `to` a service of `svc` (the first of the case if absent), `pod:NAME`, `node:NAME` or an address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::cases::{Addresses, CaseError};

/// The namespace of everything in these cases.
pub const NAMESPACE: &str = "svc";

/// Why a case cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ServiceCaseError {
    /// A file is missing or unreadable.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {problem}")]
    Text {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A placeholder names nobody.
    #[error(transparent)]
    Placeholder(#[from] CaseError),
}

/// How a lab is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Setting {
    /// VXLAN between the nodes.
    Overlay,
    /// Routes between the nodes; options carry the service's address in direct server return.
    Direct,
    /// Routes; direct server return in IPIP unless a service says otherwise.
    Ipip,
    /// Routes; the nodes' devices are served in XDP; direct server return for TCP unless a service says otherwise.
    Xdp,
}

impl Setting {
    /// All of them.
    pub const ALL: [Setting; 4] = [Setting::Overlay, Setting::Direct, Setting::Ipip, Setting::Xdp];

    /// The arguments of `cirri lab up`.
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Setting::Overlay => &["--routing", "overlay"],
            Setting::Direct => &["--routing", "direct"],
            Setting::Ipip => {
                &["--routing", "direct", "--set", "services.forwarding=dsr", "--set", "services.dispatch=ipip"]
            }
            Setting::Xdp => {
                &["--routing", "direct", "--set", "services.forwarding=hybrid", "--set", "services.acceleration=native"]
            }
        }
    }
}

/// One case.
#[derive(Debug, Clone)]
pub struct Case {
    /// Name of the file, without its ending.
    pub name: String,
    /// What it says.
    pub text: Text,
}

/// The contents of a case's file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Text {
    /// Why it must come out so.
    pub because: String,
    /// Where it is tried.
    pub labs: BTreeSet<Setting>,
    /// What it adds to the pods.
    #[serde(default)]
    pub manifests: Vec<Value>,
    /// What is tried.
    pub probes: Vec<Probe>,
}

/// One question, or several that must come out alike.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// Who asks.
    pub from: Vec<String>,
    /// Who is asked.
    pub to: Option<String>,
    /// At which of a service's addresses.
    pub vip: Option<String>,
    /// The port, a name or a number; absent: the only one of the protocol.
    pub port: Option<String>,
    /// By which protocols.
    pub proto: OneOrMore<Protocol>,
    /// 4 or 6; absent: both.
    pub family: Option<String>,
    /// The kind of socket.
    pub socket: Option<String>,
    /// How often.
    #[serde(default = "once")]
    pub tries: u32,
    /// What must come of it.
    pub expect: Expected,
}

fn once() -> u32 {
    1
}

/// A protocol that the lab speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// As arguments have it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// One, or a list.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum OneOrMore<T> {
    /// One.
    One(T),
    /// A list.
    More(Vec<T>),
}

impl<T> OneOrMore<T> {
    /// All of them.
    pub fn all(&self) -> &[T] {
        match self {
            OneOrMore::One(one) => std::slice::from_ref(one),
            OneOrMore::More(all) => all,
        }
    }
}

/// What must come of a probe.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Expected {
    /// Answers.
    Served(Served),
    /// None.
    Refusal(Refusal),
}

/// Answers, of these.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Served {
    /// Who may answer: pods of `svc`, or `world`.
    pub backends: BTreeSet<String>,
    /// What they must have seen as the client; absent: it is not said.
    pub client: Option<Client>,
    /// Each of them must have answered.
    #[serde(default)]
    pub all: bool,
    /// One of them must have given all answers.
    #[serde(default)]
    pub one: bool,
    /// The least and the greatest share of the answers, by backend.
    #[serde(default)]
    pub shares: BTreeMap<String, (f64, f64)>,
}

/// What a backend sees as the client: `client`, one of the asker's own addresses, or `node:NAME`, one of that node's.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Client {
    /// All see this.
    Everywhere(String),
    /// By backend.
    Each(BTreeMap<String, String>),
}

/// No answer.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// `refused` (at once, by a TCP reset or an ICMP error), `denied` (silence), or either.
    pub refusal: BTreeSet<String>,
}

/// All cases, in the order of their numbers.
///
/// # Errors
/// If a file cannot be read.
pub fn all() -> Result<Vec<Case>, ServiceCaseError> {
    let folder = folder();
    let unreadable = |source| ServiceCaseError::File { path: folder.clone(), source };
    let entries = std::fs::read_dir(&folder).map_err(unreadable)?;
    let mut cases = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_string();
        if !name.starts_with(|first: char| first.is_ascii_digit()) {
            continue;
        }
        let text = serde_saphyr::from_str(&read(&path)?)
            .map_err(|error| ServiceCaseError::Text { path: path.clone(), problem: error.to_string() })?;
        cases.push(Case { name, text });
    }
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(cases)
}

/// The manifests that all cases share.
///
/// # Errors
/// If the file cannot be read.
pub fn pods() -> Result<String, ServiceCaseError> {
    read(&folder().join("pods.yaml"))
}

impl Case {
    /// Its manifests as documents, with the addresses filled in.
    ///
    /// # Errors
    /// If one is asked for that nobody has.
    pub fn manifests(&self, addresses: &Addresses) -> Result<String, ServiceCaseError> {
        let documents = self.text.manifests.iter().map(|document| format!("---\n{document}\n"));
        Ok(addresses.fill_in(&documents.collect::<String>())?)
    }

    /// The names of its services, in order.
    pub fn services(&self) -> Vec<&str> {
        let services = self.text.manifests.iter().filter(|document| document["kind"] == "Service");
        services.filter_map(|service| service["metadata"]["name"].as_str()).collect()
    }
}

impl Probe {
    /// The arguments of `cirri lab probe` for one asker and protocol.
    pub fn arguments(&self, case: &Case, from: &str, protocol: Protocol) -> Vec<String> {
        let service = || case.services().first().copied().unwrap_or_default().to_string();
        let to = match &self.to {
            None => format!("svc:{NAMESPACE}/{}", service()),
            Some(to) if to.starts_with("node:") || to.parse::<IpAddr>().is_ok() => to.clone(),
            Some(to) => match to.strip_prefix("pod:") {
                Some(pod) => format!("{NAMESPACE}/{pod}"),
                None => format!("svc:{NAMESPACE}/{to}"),
            },
        };
        let from = if from.starts_with("node:") || from.starts_with("world") {
            from.to_string()
        } else {
            format!("{NAMESPACE}/{from}")
        };
        let tries = self.tries.to_string();
        let mut arguments: Vec<String> =
            ["--from", &from, "--to", &to, "--proto", protocol.name(), "-n", &tries].map(String::from).into();
        let options =
            [("--vip", &self.vip), ("--port", &self.port), ("--family", &self.family), ("--kind", &self.socket)];
        for (option, value) in options {
            if let Some(value) = value {
                arguments.extend([option.to_string(), value.clone()]);
            }
        }
        arguments
    }
}

impl Served {
    /// What this backend must see as the client, if it is said.
    pub fn client_of(&self, backend: &str) -> Option<&str> {
        match self.client.as_ref()? {
            Client::Everywhere(client) => Some(client),
            Client::Each(clients) => clients.get(backend).map(String::as_str),
        }
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cases/services")
}

fn read(path: &Path) -> Result<String, ServiceCaseError> {
    std::fs::read_to_string(path).map_err(|source| ServiceCaseError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests;
