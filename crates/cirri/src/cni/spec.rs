//! What the CNI specification says of configuration and errors.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use cirri_control::cut::cut_message;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::api::ValidAttachment;

/// Versions of the specification that are spoken, oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The network configuration, as far as this plugin reads it. Other keys are the runtime's.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetConf {
    /// Version of the specification that the runtime speaks.
    #[serde(default = "oldest")]
    pub cni_version: String,
    /// Name of the network.
    #[serde(default)]
    pub name: String,
    /// The agent's socket.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// The agent's state directory; the socket's directory unless given.
    #[serde(default)]
    pub state_dir: Option<PathBuf>,
    /// What the runtime passes by capability.
    #[serde(default)]
    pub runtime_config: RuntimeConfig,
    /// Arguments of a runtime that uses the `args` convention.
    #[serde(default)]
    pub args: Args,
    /// What ADD answered; given to CHECK and DEL.
    #[serde(default)]
    pub prev_result: Option<Value>,
    /// What still exists; given to GC.
    #[serde(default, rename = "cni.dev/valid-attachments")]
    pub valid_attachments: Option<Vec<ValidAttachment>>,
}

/// What the runtime passes by capability.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct RuntimeConfig {
    /// Ethernet address wanted inside.
    #[serde(default)]
    pub mac: Option<String>,
    /// Addresses wanted, with or without a prefix.
    #[serde(default)]
    pub ips: Vec<String>,
}

/// The `args` convention.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Args {
    /// For every plugin.
    #[serde(default)]
    pub cni: RuntimeConfig,
}

/// An error as the specification wants it: on standard output, with a code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CniError {
    /// The code.
    pub code: u32,
    /// In one sentence.
    pub msg: String,
    /// What to do about it.
    pub details: String,
}

/// Codes of the specification.
pub mod code {
    /// The version is not spoken.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// The container is not known.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// A variable of the environment is missing or wrong.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// Reading or writing failed.
    pub const IO: u32 = 5;
    /// Something cannot be decoded.
    pub const DECODE: u32 = 6;
    /// The network configuration is wrong.
    pub const INVALID_CONFIG: u32 = 7;
    /// The network namespace is none, or not one that a container can have (`ErrInvalidNetNS` of libcni).
    pub const INVALID_NETNS: u32 = 8;
    /// Not now; the runtime should try again.
    pub const TRY_AGAIN_LATER: u32 = 11;
    /// STATUS: ADD would not work now.
    pub const NOT_AVAILABLE: u32 = 50;
    /// Ours: the agent refused.
    pub const REFUSED: u32 = 100;
    /// Ours: CHECK found something wrong.
    pub const CHECK_FAILED: u32 = 101;
}

impl NetConf {
    /// Whether the version of the configuration has a command.
    ///
    /// # Errors
    /// It is older than the first that has it.
    pub fn is_at_least(&self, first: &str, command: &str) -> Result<(), CniError> {
        let age = |version: &str| VERSIONS.iter().position(|known| *known == version);
        if age(&self.cni_version) >= age(first) {
            return Ok(());
        }
        Err(CniError::new(
            code::INCOMPATIBLE_VERSION,
            format!("cniVersion {} has no {command}", self.cni_version),
            format!("{command} is there from {first} on"),
        ))
    }

    /// The Ethernet address that the runtime asks for: of the ways to say it the newest that it used.
    pub fn mac(&self, args: &mut Arguments) -> Option<String> {
        let old = args.take("MAC");
        [&self.runtime_config.mac, &self.args.cni.mac, &old].into_iter().flatten().next().cloned()
    }

    /// The addresses that the runtime asks for, by the same rule.
    ///
    /// # Errors
    /// One is no address.
    pub fn addresses(&self, args: &mut Arguments) -> Result<Vec<IpAddr>, CniError> {
        let old: Vec<String> = args.take("IP").into_iter().collect();
        let ways = [
            ("runtimeConfig.ips", code::INVALID_CONFIG, &self.runtime_config.ips),
            ("args.cni.ips", code::INVALID_CONFIG, &self.args.cni.ips),
            ("CNI_ARGS: IP", code::INVALID_ENVIRONMENT, &old),
        ];
        let Some((way, number, texts)) = ways.into_iter().find(|(_, _, texts)| !texts.is_empty()) else {
            return Ok(Vec::new());
        };
        let address = |text: &String| {
            let (ip, prefix) = text.split_once('/').unwrap_or((text, "0"));
            let ip: IpAddr = ip.parse().ok()?;
            let longest = if ip.is_ipv4() { 32 } else { 128 };
            prefix.parse::<u8>().is_ok_and(|prefix| prefix <= longest).then_some(ip.to_canonical())
        };
        let wrong = |text: &String| {
            let text: String = text.chars().take(100).collect();
            CniError::new(number, format!("{way}: `{text}` is no address"), "write 10.1.2.3, or 10.1.2.3/24")
        };
        texts.iter().map(|text| address(text).ok_or_else(|| wrong(text))).collect()
    }
}

impl CniError {
    /// With advice.
    pub fn new(code: u32, msg: impl fmt::Display, details: impl fmt::Display) -> CniError {
        CniError { code, msg: cut_message(&msg.to_string()).into_owned(), details: details.to_string() }
    }

    /// As it goes out.
    pub fn to_json(&self, version: &str) -> Value {
        json!({ "cniVersion": version, "code": self.code, "msg": self.msg, "details": self.details })
    }
}

/// The answer to VERSION, in the version of the question (CNI specification 1.1.0, "VERSION").
pub fn versions(question: &str) -> Value {
    let question: Value = serde_json::from_str(question).unwrap_or_default();
    let asked = question["cniVersion"].as_str().filter(|version| is_plain(version));
    json!({ "cniVersion": asked.unwrap_or(VERSIONS[VERSIONS.len() - 1]), "supportedVersions": VERSIONS })
}

/// Whether a text can be the name of a network or a container's id.
pub fn is_plain(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c: char| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// What `CNI_ARGS` says: `K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web`.
#[derive(Clone, Debug)]
pub struct Arguments(BTreeMap<String, String>);

impl Arguments {
    /// Those that this plugin knows.
    const KNOWN: [&str; 7] = [
        "IgnoreUnknown",
        "K8S_POD_NAMESPACE",
        "K8S_POD_NAME",
        "K8S_POD_INFRA_CONTAINER_ID",
        "K8S_POD_UID",
        "IP",
        "MAC",
    ];

    /// Reads them as libcni does.
    ///
    /// # Errors
    /// A part that is no `KEY=VALUE`; a key with two values; an unknown key, unless `IgnoreUnknown` is true.
    pub fn parse(text: &str) -> Result<Arguments, CniError> {
        let wrong = |message: String, advice: &str| {
            let message: String = message.chars().take(200).collect();
            CniError::new(code::INVALID_ENVIRONMENT, format!("CNI_ARGS: {message}"), advice)
        };
        let mut args = BTreeMap::new();
        for part in text.split(';').filter(|part| !part.is_empty()) {
            let pair = part.split_once('=').filter(|(key, value)| !key.is_empty() && !value.contains('='));
            let (key, value) = pair.ok_or_else(|| wrong(format!("`{part}` is no KEY=VALUE"), "separate with ;"))?;
            match args.insert(key.to_owned(), value.to_owned()) {
                Some(other) if other != value => {
                    return Err(wrong(format!("{key} is both `{other}` and `{value}`"), "say it once"));
                }
                _ => {}
            }
        }
        let ignore = match args.get("IgnoreUnknown").map(|value| value.to_ascii_lowercase()) {
            None => false,
            Some(value) if ["0", "false"].contains(&value.as_str()) => false,
            Some(value) if ["1", "true"].contains(&value.as_str()) => true,
            Some(value) => return Err(wrong(format!("IgnoreUnknown is `{value}`"), "use 1 or 0")),
        };
        match args.keys().find(|key| !Self::KNOWN.contains(&key.as_str())) {
            Some(key) if !ignore => Err(wrong(format!("`{key}` is not known"), "leave it out, or add IgnoreUnknown=1")),
            _ => Ok(Arguments(args)),
        }
    }

    /// The value of a key, which is then used up.
    pub fn take(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }
}

fn oldest() -> String {
    VERSIONS[0].to_owned()
}

fn default_socket() -> PathBuf {
    PathBuf::from("/run/cirri/agent.sock")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(text: &str) -> NetConf {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn addresses_are_read_from_the_newest_way_that_a_runtime_used() {
        let of = |json: &str, args: &str| conf(json).addresses(&mut Arguments::parse(args).unwrap());
        let all = r#"{"runtimeConfig":{"ips":["10.1.2.3/24","fd00::5"]},"args":{"cni":{"ips":["10.9.9.9"]}}}"#;
        assert_eq!(of(all, "IP=10.8.8.8"), Ok(vec!["10.1.2.3".parse().unwrap(), "fd00::5".parse().unwrap()]));
        let older = r#"{"args":{"cni":{"ips":["10.9.9.9"]}}}"#;
        assert_eq!(of(older, "IP=10.8.8.8"), Ok(vec!["10.9.9.9".parse().unwrap()]));
        assert_eq!(of("{}", "IP=10.8.8.8"), Ok(vec!["10.8.8.8".parse().unwrap()]));
        assert_eq!(of("{}", ""), Ok(Vec::new()));
        assert_eq!(of("{}", "IP=10.8.8").unwrap_err().code, code::INVALID_ENVIRONMENT);
        for bad in ["10.1.2.3/33", "10.1.2.3/", "web", "", "fd00::1/129"] {
            let text = json!({ "runtimeConfig": { "ips": [bad] } }).to_string();
            assert_eq!(of(&text, "").unwrap_err().code, code::INVALID_CONFIG, "{bad}");
        }
    }

    #[test]
    fn a_version_has_what_came_with_it_or_before() {
        let has = |version: &str, first: &str| {
            conf(&json!({ "cniVersion": version }).to_string()).is_at_least(first, "GC").is_ok()
        };
        assert!(has("1.1.0", "1.1.0") && has("1.0.0", "0.4.0") && has("0.4.0", "0.4.0"));
        assert!(!has("1.0.0", "1.1.0") && !has("0.3.1", "0.4.0"));
    }

    #[test]
    fn arguments_are_read_as_libcni_reads_them() {
        let mut args = Arguments::parse("IgnoreUnknown=1;K8S_POD_NAME=web;X=y;;IgnoreUnknown=1").unwrap();
        assert_eq!(args.take("K8S_POD_NAME").as_deref(), Some("web"));
        assert!(Arguments::parse("").is_ok() && Arguments::parse("IgnoreUnknown=True;X=").is_ok());
        for bad in ["x", "=x", "A=b=c", "X=y", "IgnoreUnknown=0;X=y", "IgnoreUnknown=maybe", "IP=10.0.0.1;IP=10.0.0.2"]
        {
            assert_eq!(Arguments::parse(bad).unwrap_err().code, code::INVALID_ENVIRONMENT, "{bad}");
        }
    }

    #[test]
    fn gc_reads_the_valid_attachments() {
        let text =
            r#"{"cniVersion":"1.1.0","name":"n","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}"#;
        let conf: NetConf = serde_json::from_str(text).unwrap();
        assert_eq!(conf.valid_attachments.unwrap()[0].container_id, "a");
    }
}
