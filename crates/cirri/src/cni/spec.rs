//! What the CNI specification says: configuration, results, errors.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use cirri_control::cut::cut_message;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::api::{Attachment, EndpointAdded};

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
}

/// The `args` convention.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Args {
    /// For every plugin.
    #[serde(default)]
    pub cni: RuntimeConfig,
}

/// One attachment that still exists.
#[derive(Clone, Debug, Deserialize)]
pub struct ValidAttachment {
    /// The container.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// The device inside.
    pub ifname: String,
}

impl From<ValidAttachment> for Attachment {
    fn from(valid: ValidAttachment) -> Attachment {
        Attachment { container_id: valid.container_id, ifname: valid.ifname }
    }
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
    /// Not now; the runtime should try again.
    pub const TRY_AGAIN_LATER: u32 = 11;
    /// STATUS: ADD would not work now.
    pub const NOT_AVAILABLE: u32 = 50;
    /// Ours: the agent refused.
    pub const REFUSED: u32 = 100;
    /// Ours: CHECK found something wrong.
    pub const CHECK_FAILED: u32 = 101;
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

/// The answer to VERSION.
pub fn versions() -> Value {
    json!({ "cniVersion": VERSIONS[VERSIONS.len() - 1], "supportedVersions": VERSIONS })
}

/// The answer to ADD.
pub fn added(version: &str, ifname: &str, netns: &str, added: &EndpointAdded) -> Value {
    // Before 1.0.0 an address had to say its family; since then it must not.
    let with_family = version.starts_with("0.");
    let mut ips = Vec::new();
    let mut routes = Vec::new();
    for address in &added.addresses {
        let (gateway, everything, family) =
            if address.ip.is_ipv4() { (added.gateway_v4, "0.0.0.0/0", "4") } else { (added.gateway_v6, "::/0", "6") };
        let mut ip = json!({ "interface": 1, "address": format!("{}/{}", address.ip, address.prefix) });
        if let Some(gateway) = gateway {
            ip["gateway"] = json!(gateway);
            routes.push(json!({ "dst": everything, "gw": gateway }));
        }
        if with_family {
            ip["version"] = json!(family);
        }
        ips.push(ip);
    }
    json!({
        "cniVersion": version,
        "interfaces": [
            { "name": added.host_ifname, "mac": added.host_mac },
            { "name": ifname, "mac": added.mac, "sandbox": netns },
        ],
        "ips": ips,
        "routes": routes,
        "dns": {},
    })
}

/// `K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web` as a map.
///
/// # Errors
/// A part without `=`.
pub fn parse_args(text: &str) -> Result<BTreeMap<String, String>, CniError> {
    let mut args = BTreeMap::new();
    for part in text.split(';').filter(|part| !part.is_empty()) {
        let (key, value) = part.split_once('=').ok_or_else(|| {
            CniError::new(code::INVALID_ENVIRONMENT, format!("CNI_ARGS: `{part}` is no KEY=VALUE"), "separate with ;")
        })?;
        args.insert(key.to_owned(), value.to_owned());
    }
    Ok(args)
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
    use crate::api::Address;

    fn answer() -> EndpointAdded {
        EndpointAdded {
            id: 1,
            identity: 300,
            host_ifname: "lxc01234567".into(),
            host_mac: "02:c1:44:12:10:01".into(),
            mac: "02:00:00:00:00:01".into(),
            mtu: 1450,
            addresses: vec![
                Address { ip: [10, 244, 0, 5].into(), prefix: 32 },
                Address { ip: "fd00::5".parse().unwrap(), prefix: 128 },
            ],
            gateway_v4: Some([169, 254, 1, 1].into()),
            gateway_v6: Some("fe80::1".parse().unwrap()),
            ready_ms: 1.0,
        }
    }

    #[test]
    fn a_result_names_the_container_side_with_mac_and_sandbox() {
        let result = added("1.1.0", "eth0", "/run/netns/x", &answer());
        assert_eq!(
            result["interfaces"][1],
            json!({ "name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x" })
        );
        assert_eq!(result["ips"][0], json!({ "interface": 1, "address": "10.244.0.5/32", "gateway": "169.254.1.1" }));
        assert_eq!(result["routes"][1], json!({ "dst": "::/0", "gw": "fe80::1" }));
    }

    #[test]
    fn old_versions_want_the_family_of_an_address() {
        let result = added("0.4.0", "eth0", "/run/netns/x", &answer());
        assert_eq!((&result["ips"][0]["version"], &result["ips"][1]["version"]), (&json!("4"), &json!("6")));
    }

    #[test]
    fn arguments_are_read_and_nonsense_is_refused() {
        let args = parse_args("IgnoreUnknown=1;K8S_POD_NAME=web").unwrap();
        assert_eq!(args["K8S_POD_NAME"], "web");
        assert_eq!(parse_args("x").unwrap_err().code, code::INVALID_ENVIRONMENT);
    }

    #[test]
    fn gc_reads_the_valid_attachments() {
        let text =
            r#"{"cniVersion":"1.1.0","name":"n","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}"#;
        let conf: NetConf = serde_json::from_str(text).unwrap();
        assert_eq!(conf.valid_attachments.unwrap()[0].container_id, "a");
    }
}
