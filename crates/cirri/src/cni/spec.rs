//! What the CNI specification says of configuration and errors.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use cirri_control::cut::cut_message;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::api::ValidAttachment;

/// The agent's socket, unless the configuration names another.
const SOCKET: &str = "/run/cirri/agent.sock";
/// Versions of the specification that are spoken, oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The network configuration, as far as this plugin reads it. Other keys are the runtime's.
///
/// `null` is what Go writes for what is not there, and is taken so for every key. What one verb alone reads is looked
/// at when it does: DEL must not fail by what only ADD wants.
#[derive(Clone, Debug)]
pub struct NetConf {
    /// Version of the specification that the runtime speaks.
    pub cni_version: String,
    /// Name of the network.
    pub name: String,
    /// The agent's socket.
    pub socket: PathBuf,
    /// The agent's state directory; the socket's directory unless given.
    pub state_dir: Option<PathBuf>,
    /// All of it.
    whole: Value,
}

/// What a runtime asks for, and by which of the ways to say it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked<T> {
    /// What.
    pub value: T,
    /// The way: the newest that it used.
    pub way: Way,
}

/// Where a runtime says what a container shall have, and the code for what is wrong there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// In words.
    name: &'static str,
    code: u32,
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
    /// Reads a configuration.
    ///
    /// # Errors
    /// It is no JSON object, or of a version that is not spoken; its name or a key that every verb needs is wrong.
    pub fn read(input: &str) -> Result<NetConf, CniError> {
        let undecoded = |why: &dyn fmt::Display| {
            let text = format!("the network configuration is no JSON object: {why}");
            CniError::new(code::DECODE, text, "see the CNI specification")
        };
        let whole: Value = serde_json::from_str(input).map_err(|error| undecoded(&error))?;
        if !whole.is_object() {
            return Err(undecoded(&"it is another value"));
        }
        let text = |key: &'static str| match present(&whole[key]) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(wrong_kind(key, "a text")),
        };
        let cni_version = text("cniVersion")?.unwrap_or_else(|| VERSIONS[0].to_owned());
        if !VERSIONS.contains(&cni_version.as_str()) {
            return Err(CniError::new(
                code::INCOMPATIBLE_VERSION,
                format!("cniVersion {cni_version} is not spoken"),
                format!("use one of {}", VERSIONS.join(", ")),
            ));
        }
        let name = text("name")?
            .filter(|name| !name.is_empty())
            .ok_or_else(|| CniError::new(code::INVALID_CONFIG, "the network configuration has no `name`", "add one"))?;
        if !is_plain(&name) {
            let rule = "letters, digits, `_`, `.` and `-`, the first a letter or digit";
            return Err(CniError::new(code::INVALID_CONFIG, "the `name` of the network is not valid", rule));
        }
        let socket = text("socket")?.map_or_else(|| PathBuf::from(SOCKET), PathBuf::from);
        let state_dir = text("stateDir")?.map(PathBuf::from);
        Ok(NetConf { cni_version, name, socket, state_dir, whole })
    }

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

    /// The Ethernet address that the runtime asks for: of the ways to say it the newest that it used. An empty one is
    /// none.
    ///
    /// # Errors
    /// It is said by something else than a text.
    pub fn mac(&self, args: &mut Arguments) -> Result<Option<Asked<String>>, CniError> {
        let old = Way::of_args("CNI_ARGS: MAC");
        for way in [Way::of_conf("runtimeConfig.mac"), Way::of_conf("args.cni.mac")] {
            match self.at(way.name)? {
                None => {}
                Some(Value::String(text)) if text.is_empty() => {}
                Some(Value::String(text)) => return Ok(Some(Asked { value: text.clone(), way })),
                Some(_) => return Err(wrong_kind(way.name, "a text")),
            }
        }
        Ok(args.take_asked("MAC").map(|value| Asked { value, way: old }))
    }

    /// The addresses that the runtime asks for, by the same rule.
    ///
    /// # Errors
    /// One is no address.
    pub fn addresses(&self, args: &mut Arguments) -> Result<Option<Asked<Vec<IpAddr>>>, CniError> {
        let old = args.take_asked("IP").map(|text| (Way::of_args("CNI_ARGS: IP"), vec![text]));
        let mut asked = None;
        for way in [Way::of_conf("runtimeConfig.ips"), Way::of_conf("args.cni.ips")] {
            let Some(value) = self.at(way.name)? else { continue };
            let texts: Vec<String> =
                Vec::deserialize(value).map_err(|_| wrong_kind(way.name, "a list of addresses"))?;
            if !texts.is_empty() {
                asked = Some((way, texts));
                break;
            }
        }
        let Some((way, texts)) = asked.or(old) else { return Ok(None) };
        let wrong = |text: &String| {
            let text: String = text.chars().take(100).collect();
            way.refusal(format!("`{text}` is no address"), "write 10.1.2.3, or 10.1.2.3/24")
        };
        let value: Result<Vec<IpAddr>, CniError> =
            texts.iter().map(|text| address(text).map(|(ip, _)| ip).ok_or_else(|| wrong(text))).collect();
        Ok(Some(Asked { value: value?, way }))
    }

    /// What ADD answered (given to CHECK and DEL), or plugins before this one (given to ADD).
    ///
    /// # Errors
    /// It is no object.
    pub fn previous_result(&self) -> Result<Option<&Value>, CniError> {
        match present(&self.whole["prevResult"]) {
            Some(previous) if !previous.is_object() => Err(wrong_kind("prevResult", "an object")),
            previous => Ok(previous),
        }
    }

    /// What still exists; given to GC. `null` is an empty list: so Go writes a list that nothing was put into.
    ///
    /// # Errors
    /// It is not there, or no such list.
    pub fn valid_attachments(&self) -> Result<Vec<ValidAttachment>, CniError> {
        const KEY: &str = "cni.dev/valid-attachments";
        match self.whole.get(KEY) {
            None => Err(CniError::new(
                code::INVALID_CONFIG,
                format!("GC needs `{KEY}`"),
                "without it everything would be removed; pass an empty list if that is meant",
            )),
            Some(Value::Null) => Ok(Vec::new()),
            Some(list) => Vec::deserialize(list).map_err(|_| wrong_kind(KEY, "a list of containerID and ifname")),
        }
    }

    /// What stands at the end of a path of keys.
    fn at(&self, path: &'static str) -> Result<Option<&Value>, CniError> {
        let mut value = &self.whole;
        for key in path.split('.') {
            if !value.is_object() {
                let above = path.split('.').take_while(|it| *it != key).collect::<Vec<_>>().join(".");
                return Err(wrong_kind(&above, "an object"));
            }
            let Some(found) = present(&value[key]) else { return Ok(None) };
            value = found;
        }
        Ok(Some(value))
    }
}

impl Way {
    fn of_conf(name: &'static str) -> Way {
        Way { name, code: code::INVALID_CONFIG }
    }

    fn of_args(name: &'static str) -> Way {
        Way { name, code: code::INVALID_ENVIRONMENT }
    }

    /// The error for what was asked for in this way.
    pub fn refusal(self, why: impl fmt::Display, advice: impl fmt::Display) -> CniError {
        CniError::new(self.code, format!("{}: {why}", self.name), advice)
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

/// The version that a configuration asks for, spoken here or not, as far as it can be read: answers carry it.
pub fn asked_version(input: &str) -> Option<String> {
    let input: Value = serde_json::from_str(input).ok()?;
    input["cniVersion"].as_str().filter(|version| is_plain(version)).map(str::to_owned)
}

/// The answer to VERSION, in the version of the question (CNI specification 1.1.0, "VERSION").
pub fn versions(question: &str) -> Value {
    let asked = asked_version(question).unwrap_or_else(|| VERSIONS[VERSIONS.len() - 1].to_owned());
    json!({ "cniVersion": asked, "supportedVersions": VERSIONS })
}

/// An address, with the bits of its prefix if it has one.
pub fn address(text: &str) -> Option<(IpAddr, Option<u8>)> {
    let (ip, prefix) = text.split_once('/').map_or((text, None), |(ip, prefix)| (ip, Some(prefix)));
    let ip: IpAddr = ip.parse().ok()?;
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        None => None,
        Some(prefix) => Some(prefix.parse::<u8>().ok().filter(|prefix| *prefix <= longest)?),
    };
    Some((ip.to_canonical(), prefix))
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

    /// The same for what the container shall have: an empty value asks for nothing.
    fn take_asked(&mut self, key: &str) -> Option<String> {
        self.take(key).filter(|value| !value.is_empty())
    }
}

fn present(value: &Value) -> Option<&Value> {
    (!value.is_null()).then_some(value)
}

fn wrong_kind(key: &str, kind: &str) -> CniError {
    CniError::new(code::INVALID_CONFIG, format!("`{key}` of the network configuration is not {kind}"), "correct it")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration with these keys.
    fn conf(more: &Value) -> NetConf {
        let mut whole = json!({ "cniVersion": "1.1.0", "name": "n" });
        whole.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        NetConf::read(&whole.to_string()).unwrap()
    }

    #[test]
    fn addresses_are_read_from_the_newest_way_that_a_runtime_used() {
        let of = |more: Value, args: &str| {
            let asked = conf(&more).addresses(&mut Arguments::parse(args).unwrap());
            asked.map(|asked| asked.map_or_else(Vec::new, |asked| asked.value))
        };
        let all = json!({"runtimeConfig": {"ips": ["10.1.2.3/24", "fd00::5"]}, "args": {"cni": {"ips": ["10.9.9.9"]}}});
        assert_eq!(of(all, "IP=10.8.8.8"), Ok(vec!["10.1.2.3".parse().unwrap(), "fd00::5".parse().unwrap()]));
        let older = json!({"runtimeConfig": {"ips": []}, "args": {"cni": {"ips": ["10.9.9.9"]}}});
        assert_eq!(of(older, "IP=10.8.8.8"), Ok(vec!["10.9.9.9".parse().unwrap()]));
        assert_eq!(of(json!({}), "IP=10.8.8.8"), Ok(vec!["10.8.8.8".parse().unwrap()]));
        assert_eq!(of(json!({}), ""), Ok(Vec::new()));
        assert_eq!(of(json!({}), "IP=10.8.8").unwrap_err().code, code::INVALID_ENVIRONMENT);
        for bad in ["10.1.2.3/33", "10.1.2.3/", "web", "", "fd00::1/129"] {
            let more = json!({ "runtimeConfig": { "ips": [bad] } });
            assert_eq!(of(more, "").unwrap_err().code, code::INVALID_CONFIG, "{bad}");
        }
        for bad in [json!("10.1.2.3"), json!([7]), json!([null]), json!({})] {
            let error = of(json!({ "args": { "cni": { "ips": bad } } }), "").unwrap_err();
            assert!(error.code == code::INVALID_CONFIG && error.msg.contains("args.cni.ips"), "{bad}: {error:?}");
        }
    }

    #[test]
    fn null_is_absent_and_an_empty_wish_is_none() {
        for more in [
            json!({"runtimeConfig": null, "args": null}),
            json!({"runtimeConfig": {"ips": null, "mac": null}, "args": {"cni": null}}),
            json!({"runtimeConfig": {"mac": ""}, "args": {"cni": {"ips": null, "mac": ""}}}),
            json!({"socket": null, "stateDir": null, "prevResult": null}),
        ] {
            let conf = conf(&more);
            let mut args = Arguments::parse("MAC=;IP=").unwrap();
            assert_eq!(conf.mac(&mut args), Ok(None), "{more}");
            assert_eq!(conf.addresses(&mut args), Ok(None), "{more}");
            assert_eq!(conf.previous_result(), Ok(None), "{more}");
            assert_eq!((conf.socket.to_str(), conf.state_dir), (Some(SOCKET), None), "{more}");
        }
        let read = |text: &str| NetConf::read(text);
        assert_eq!(read(r#"{"cniVersion": null, "name": "n"}"#).unwrap().cni_version, "0.3.1");
        assert_eq!(read(r#"{"cniVersion": "1.1.0", "name": null}"#).unwrap_err().code, code::INVALID_CONFIG);
        let older = conf(&json!({"runtimeConfig": {"mac": ""}, "args": {"cni": {"mac": "02:00:00:00:00:01"}}}));
        let asked = older.mac(&mut Arguments::parse("MAC=02:00:00:00:00:02").unwrap()).unwrap().unwrap();
        assert_eq!(asked.value, "02:00:00:00:00:01", "the newest that says something");
        assert_eq!(asked.way.refusal("no", "").msg, "args.cni.mac: no");
        for bad in [json!({"runtimeConfig": 7}), json!({"args": {"cni": []}}), json!({"runtimeConfig": {"mac": 7}})] {
            let error = conf(&bad).mac(&mut Arguments::parse("").unwrap()).unwrap_err();
            assert_eq!(error.code, code::INVALID_CONFIG, "{bad}");
        }
    }

    #[test]
    fn a_version_has_what_came_with_it_or_before() {
        let has = |version: &str, first: &str| conf(&json!({ "cniVersion": version })).is_at_least(first, "GC").is_ok();
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
    fn gc_reads_the_valid_attachments_and_takes_null_for_a_list_of_none() {
        let of = |list: Value| conf(&json!({ "cni.dev/valid-attachments": list })).valid_attachments();
        let named = of(json!([{ "containerID": "a", "ifname": "eth0", "netns": "/run/netns/a" }])).unwrap();
        assert_eq!((named.len(), named[0].container_id.as_str()), (1, "a"));
        assert_eq!(of(Value::Null), Ok(Vec::new()));
        assert_eq!(conf(&json!({})).valid_attachments().unwrap_err().code, code::INVALID_CONFIG);
        for bad in [json!({}), json!("a"), json!([{}]), json!([null])] {
            assert_eq!(of(bad.clone()).unwrap_err().code, code::INVALID_CONFIG, "{bad}");
        }
    }
}
