//! The CNI plugin: translates a runtime's call to the agent's socket and back.
//!
//! It decides nothing. The one thing it does by itself is DEL when the agent does not do it: the device
//! goes at once, and a note in the state directory tells the agent to free the rest.

mod queue;
mod result;
mod spec;

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use cirri_loader::net::Namespace;
use serde_json::Value;

use crate::api::{
    ApiError, Attachment, EndpointAdd, EndpointAdded, EndpointCheck, EndpointDelete, EndpointGc, Obstacle, Readiness,
    Removed,
};
use crate::client::{self, CallError};
use crate::workload;
use spec::{CniError, NetConf, code};

pub use queue::{deletions_directory, note_of, pending_deletions};

/// For `cirri cni --help`.
pub const ABOUT: &str = "\
Attach a container: the CNI plugin, versions 0.3.1 to 1.1.0 (ADD, DEL, CHECK, GC, STATUS, VERSION).

A container runtime runs it with CNI_COMMAND and its siblings in the environment and the network
configuration on standard input. Install it by linking the binary as `cirri-cni` into the runtime's
plugin directory. Keys of its own: `socket` (the agent's, default /run/cirri/agent.sock) and
`stateDir` (default: where the socket is). A configuration:

  {\"cniVersion\": \"1.1.0\", \"name\": \"cirri\", \"type\": \"cirri-cni\"}

The pod is named by K8S_POD_NAMESPACE and K8S_POD_NAME in CNI_ARGS; without them it is
`default/` and the start of the container's id. Addresses may be asked for by the capabilities `ips` and
`mac`, by `args.cni`, or by IP and MAC in CNI_ARGS.";

/// Most characters of a pod's name.
const LONGEST_NAME: usize = 63;
/// Bytes of a network configuration; one of GC names every attachment of the node.
const LONGEST_INPUT: u64 = 16 << 20;
/// How long an answer may take. Attaching takes milliseconds; a store that does not answer, seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether the binary was started under the plugin's name.
pub fn invoked_as_plugin() -> bool {
    let name = std::env::args_os().next().map(PathBuf::from);
    name.as_deref().and_then(Path::file_name).is_some_and(|name| name == "cirri-cni")
}

/// A variable of the environment, empty ones left out.
type Env<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Runs the command that the environment names.
pub fn main() -> ExitCode {
    let env = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let outcome = read(io::stdin()).and_then(|input| run(&input, &env));
    let (text, exit) = match outcome {
        Ok(Some(value)) => (value.to_string(), ExitCode::SUCCESS),
        Ok(None) => (String::new(), ExitCode::SUCCESS),
        Err(failed) => (failed.error.to_json(&failed.version).to_string(), ExitCode::FAILURE),
    };
    match say(&mut io::stdout(), &text) {
        Ok(()) => exit,
        Err(error) => {
            // Nobody may read this either.
            let _ = say(&mut io::stderr(), &format!("cirri-cni: the answer cannot be written: {error}\n"));
            ExitCode::FAILURE
        }
    }
}

/// Writes all of a text now: what waits in a buffer for the end of the process is lost without a word.
fn say(to: &mut impl Write, text: &str) -> io::Result<()> {
    to.write_all(text.as_bytes())?;
    to.flush()
}

/// A refusal, in the version that the runtime speaks.
#[derive(Debug)]
struct Failed {
    version: String,
    error: CniError,
}

/// The network configuration.
fn read(from: impl Read) -> Result<String, Failed> {
    let failed = |error| Failed { version: spec::VERSIONS[0].to_owned(), error };
    let mut input = String::new();
    match from.take(LONGEST_INPUT + 1).read_to_string(&mut input) {
        Ok(read) if read as u64 > LONGEST_INPUT => Err(failed(CniError::new(
            code::DECODE,
            format!("the network configuration is longer than {} MiB", LONGEST_INPUT >> 20),
            "see the CNI specification",
        ))),
        Ok(_) => Ok(input),
        Err(error) => {
            Err(failed(CniError::new(code::IO, format!("cannot read the configuration: {error}"), "give it on stdin")))
        }
    }
}

fn run(input: &str, env: Env<'_>) -> Result<Option<Value>, Failed> {
    dispatch(input, env).map_err(|error| {
        let version = spec::asked_version(input).unwrap_or_else(|| spec::VERSIONS[0].to_owned());
        Failed { version, error }
    })
}

fn dispatch(input: &str, env: Env<'_>) -> Result<Option<Value>, CniError> {
    let command = need(env, "CNI_COMMAND")?;
    if command == "VERSION" {
        return Ok(Some(spec::versions(input)));
    }
    let conf = NetConf::read(input)?;
    let since = |first: &str| conf.is_at_least(first, &command);
    match command.as_str() {
        "ADD" => add(&conf, env).map(Some),
        "DEL" => del(&conf, env).map(|()| None),
        "CHECK" => since("0.4.0").and_then(|()| check(&conf, env)).map(|()| None),
        "GC" => since("1.1.0").and_then(|()| gc(&conf)).map(|()| None),
        "STATUS" => since("1.1.0").and_then(|()| status(&conf)).map(|()| None),
        other => Err(CniError::new(
            code::INVALID_ENVIRONMENT,
            format!("CNI_COMMAND is `{other}`"),
            "use ADD, DEL, CHECK, GC, STATUS or VERSION",
        )),
    }
}

fn add(conf: &NetConf, env: Env<'_>) -> Result<Value, CniError> {
    let attachment = attachment(conf, env)?;
    let netns = need(env, "CNI_NETNS")?;
    let mut args = spec::Arguments::parse(&optional(env, "CNI_ARGS")?.unwrap_or_default())?;
    let (namespace, pod) = (args.take("K8S_POD_NAMESPACE"), args.take("K8S_POD_NAME"));
    let (mac, addresses) = (conf.mac(&mut args)?, conf.addresses(&mut args)?);
    let previous = conf.previous_result()?;
    let (of_mac, of_addresses) = (mac.as_ref().map(|it| it.way), addresses.as_ref().map(|it| it.way));
    let params = EndpointAdd {
        // Runtimes that are not Kubernetes' have names too, but no pods.
        pod_named: namespace.is_some() && pod.is_some(),
        pod_uid: args.take("K8S_POD_UID").unwrap_or_default(),
        namespace: namespace.unwrap_or_else(|| "default".to_owned()),
        pod: pod.unwrap_or_else(|| attachment.container_id.chars().take(LONGEST_NAME).collect()),
        mac: mac.map(|it| it.value),
        addresses: addresses.map_or_else(Vec::new, |it| it.value),
        network: attachment.network,
        container_id: attachment.container_id,
        ifname: attachment.ifname,
        netns: netns.clone(),
        gc: conf.is_at_least("1.1.0", "GC").is_ok(),
    };
    let added: EndpointAdded = client::call(&conf.socket, "endpoint.add", &params, PATIENCE).map_err(|error| {
        // What is wrong stands where the runtime said it.
        let way = match &error {
            CallError::Refused(refusal) if refusal.code == "bad-mac" => of_mac,
            CallError::Refused(refusal) if refusal.code == "bad-address" => of_addresses,
            _ => None,
        };
        match (way, error) {
            (Some(way), CallError::Refused(ApiError { message, hint, .. })) => way.refusal(message, hint),
            (_, error) => from_call(error, code::REFUSED),
        }
    })?;
    let ours = result::added(&conf.cni_version, &params.ifname, &netns, &added);
    Ok(match previous {
        Some(previous) => result::after(previous, ours),
        None => ours,
    })
}

/// Succeeds, or leaves its note and succeeds: a runtime that is refused keeps the whole container, and what
/// the agent could not do now it will do when it can.
fn del(conf: &NetConf, env: Env<'_>) -> Result<(), CniError> {
    // That the namespace has no name, or none that can be said, keeps nothing from being deleted.
    let netns = env("CNI_NETNS").and_then(|path| path.into_string().ok());
    let deletion = EndpointDelete { attachment: attachment(conf, env)?, netns };
    let Err(why) = client::call::<Removed>(&conf.socket, "endpoint.delete", &deletion, PATIENCE) else {
        return Ok(());
    };
    let state_dir = state_dir(conf);
    queue::queue(&state_dir, &deletion).map_err(|error| {
        CniError::new(
            code::IO,
            format!("{why}, and the deletion cannot be noted in {}: {error}", state_dir.display()),
            "start the agent or free the disk, then delete again",
        )
    })
}

fn check(conf: &NetConf, env: Env<'_>) -> Result<(), CniError> {
    let attachment = attachment(conf, env)?;
    let netns = need(env, "CNI_NETNS")?;
    let previous = conf.previous_result()?.ok_or_else(|| {
        CniError::new(code::INVALID_CONFIG, "CHECK needs `prevResult`", "the runtime must pass what ADD answered")
    })?;
    let differs = |text: String| {
        let text = format!("prevResult is not what there is: {text}");
        CniError::new(code::CHECK_FAILED, text, "delete the container and add it again")
    };
    // By what they are: there are many paths to one namespace.
    let place = Namespace::open(&netns).ok();
    let is_place = |path: &str| {
        let other = || Namespace::open(path).ok();
        place.as_ref().zip(other()).is_some_and(|(place, other)| place.is_same(&other).unwrap_or(false))
    };
    let told = result::told(previous, &attachment.ifname, &is_place);
    let params = EndpointCheck { attachment, netns, told };
    let now: EndpointAdded = client::call(&conf.socket, "endpoint.check", &params, PATIENCE)
        .map_err(|error| from_call(error, code::CHECK_FAILED))?;
    match result::differences(&now, previous).as_slice() {
        [] => Ok(()),
        found => Err(differs(found.join("; "))),
    }
}

fn gc(conf: &NetConf) -> Result<(), CniError> {
    let valid = conf.valid_attachments()?;
    let params = EndpointGc { network: conf.name.clone(), valid };
    client::call::<Removed>(&conf.socket, "endpoint.gc", &params, PATIENCE)
        .map(drop)
        .map_err(|error| from_call(error, code::REFUSED))
}

fn status(conf: &NetConf) -> Result<(), CniError> {
    let unavailable = |why: &str, advice: &str| Err(CniError::new(code::NOT_AVAILABLE, why, advice));
    match client::call::<Readiness>(&conf.socket, "endpoint.ready", &serde_json::json!({}), PATIENCE) {
        Ok(Readiness { obstacles }) if obstacles.is_empty() => Ok(()),
        Ok(Readiness { obstacles }) => {
            let all = |part: fn(&Obstacle) -> &str| obstacles.iter().map(part).collect::<Vec<_>>().join("; ");
            unavailable(&all(|it| &it.found), &all(|it| &it.remedy))
        }
        Err(error) => {
            let advice = advice(&error);
            unavailable(&error.to_string(), advice)
        }
    }
}

fn from_call(error: CallError, refused: u32) -> CniError {
    let advice = advice(&error);
    match error {
        CallError::Refused(ApiError { code, message, hint }) => {
            let number = match code.as_str() {
                "not-found" => code::UNKNOWN_CONTAINER,
                "bad-name" => code::INVALID_ENVIRONMENT,
                "bad-netns" => code::INVALID_NETNS,
                "unavailable" | "timeout" => code::TRY_AGAIN_LATER,
                _ => refused,
            };
            CniError::new(number, message, hint)
        }
        CallError::NoAgent { .. } | CallError::Stopped | CallError::Busy(_) | CallError::Broken(_) => {
            CniError::new(code::TRY_AGAIN_LATER, error, advice)
        }
        other => CniError::new(refused, other, advice),
    }
}

/// What to do when the agent cannot be asked.
fn advice(error: &CallError) -> &'static str {
    match error {
        CallError::NoAgent { .. } => "start the agent",
        CallError::Stopped | CallError::Broken(_) => "try again when the agent is back",
        CallError::Busy(_) => "try again; see `cirri status` for what keeps the agent busy",
        _ => "",
    }
}

fn attachment(conf: &NetConf, env: Env<'_>) -> Result<Attachment, CniError> {
    let attachment = Attachment {
        network: conf.name.clone(),
        container_id: need(env, "CNI_CONTAINERID")?,
        ifname: need(env, "CNI_IFNAME")?,
    };
    let wrong =
        |what: &str, rule: &str| Err(CniError::new(code::INVALID_ENVIRONMENT, format!("{what} is not valid"), rule));
    if !spec::is_plain(&attachment.container_id) {
        return wrong("CNI_CONTAINERID", "letters, digits, `_`, `.` and `-`, the first a letter or digit");
    }
    let ifname = &attachment.ifname;
    // The kernel numbers names with `%`, and has settings called `all` and `default`. It looks at bytes, and takes 0xa0
    // for a blank, which is a part of many letters.
    let forbidden = |c: char| "/:%".contains(c) || !c.is_ascii_graphic();
    if ifname.len() > 15 || [".", "..", "all", "default"].contains(&ifname.as_str()) || ifname.contains(forbidden) {
        return wrong(
            "CNI_IFNAME",
            "at most 15 characters of ASCII, no slash, colon, percent sign or blank; not `all`, `default`",
        );
    }
    if workload::owner(&attachment).len() > workload::LONGEST_OWNER {
        return wrong("CNI_CONTAINERID", "with the network's name it must have 230 characters at most");
    }
    Ok(attachment)
}

fn need(env: Env<'_>, name: &str) -> Result<String, CniError> {
    optional(env, name)?.ok_or_else(|| {
        CniError::new(
            code::INVALID_ENVIRONMENT,
            format!("{name} is not set"),
            "this is a CNI plugin, run by a container runtime; see `cirri cni --help`",
        )
    })
}

fn optional(env: Env<'_>, name: &str) -> Result<Option<String>, CniError> {
    let text = |value: OsString| {
        value.into_string().map_err(|value| {
            let text = format!("{name} is not valid: `{}` is no UTF-8", value.display());
            CniError::new(code::INVALID_ENVIRONMENT, text, "the runtime must pass another")
        })
    };
    env(name).map(text).transpose()
}

fn state_dir(conf: &NetConf) -> PathBuf {
    let beside = || conf.socket.parent().unwrap_or(Path::new("/run/cirri")).to_owned();
    conf.state_dir.clone().unwrap_or_else(beside)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_with(input: &str, env: &[(&str, &str)]) -> Result<Option<Value>, CniError> {
        let env = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        run(input, &env).map_err(|failed| failed.error)
    }

    const CONTAINER: [(&str, &str); 3] =
        [("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/run/netns/x")];

    fn with(command: &str) -> Vec<(&str, &str)> {
        [("CNI_COMMAND", command)].into_iter().chain(CONTAINER).collect()
    }

    #[test]
    fn version_lists_what_is_spoken() {
        let ask = |input| run_with(input, &[("CNI_COMMAND", "VERSION")]).unwrap().unwrap();
        assert_eq!(ask("")["supportedVersions"], serde_json::json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
        assert_eq!(ask("")["cniVersion"], "1.1.0");
        assert_eq!(ask(r#"{"cniVersion":"0.4.0"}"#)["cniVersion"], "0.4.0", "the runtime's own");
        assert_eq!(ask(r#"{"cniVersion":"9.9.9"}"#)["cniVersion"], "9.9.9");
        assert_eq!(ask(r#"{"cniVersion":"\u0007"}"#)["cniVersion"], "1.1.0");
    }

    #[test]
    fn every_wrong_call_has_its_code() {
        let conf = r#"{"cniVersion":"1.1.0","name":"n","type":"cirri-cni"}"#;
        let code = |input: &str, env: &[(&str, &str)]| run_with(input, env).unwrap_err().code;
        assert_eq!(code(conf, &[]), code::INVALID_ENVIRONMENT);
        assert_eq!(code("{", &with("ADD")), code::DECODE);
        assert_eq!(code(r#"{"cniVersion":"0.1.0","name":"n"}"#, &with("ADD")), code::INCOMPATIBLE_VERSION);
        assert_eq!(code(r#"{"cniVersion":"1.1.0"}"#, &with("ADD")), code::INVALID_CONFIG);
        assert_eq!(code(conf, &with("MAKE")), code::INVALID_ENVIRONMENT);
        assert_eq!(code(conf, &with("GC")), code::INVALID_CONFIG);
        assert_eq!(
            code(conf, &[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "../x"), ("CNI_IFNAME", "e")]),
            code::INVALID_ENVIRONMENT
        );
    }

    #[test]
    fn a_refusal_is_in_the_version_that_was_asked_for() {
        let version = |input: &str, command: &'static str| {
            run(input, &|name: &str| (name == "CNI_COMMAND").then(|| OsString::from(command))).unwrap_err().version
        };
        assert_eq!(version(r#"{"cniVersion":"1.1.0","name":7}"#, "ADD"), "1.1.0");
        assert_eq!(version(r#"{"cniVersion":"1.0.0","name":"n","socket":{}}"#, "ADD"), "1.0.0");
        assert_eq!(version(r#"{"cniVersion":"9.0.0","name":"n"}"#, "ADD"), "9.0.0");
        assert_eq!(version(r#"{"cniVersion":"1.1.0","name":"n"}"#, "MAKE"), "1.1.0");
        assert_eq!(version("{", "ADD"), "0.3.1", "what cannot be read asks for none");
    }

    #[test]
    fn a_variable_that_is_no_name_of_a_device_is_named() {
        use std::os::unix::ffi::OsStringExt;
        let conf = r#"{"cniVersion":"1.1.0","name":"n"}"#;
        for ifname in [&b"eth\xa0"[..], "eth\u{a0}".as_bytes(), "ethà".as_bytes(), b"eth\xff", b"eth 0", b"eth\x7f"] {
            let env = |name: &str| match name {
                "CNI_COMMAND" => Some("DEL".into()),
                "CNI_CONTAINERID" => Some("c1".into()),
                "CNI_IFNAME" => Some(OsString::from_vec(ifname.to_vec())),
                _ => None,
            };
            let error = run(conf, &env).unwrap_err().error;
            assert_eq!(error.code, code::INVALID_ENVIRONMENT, "{error:?}");
            assert!(error.msg.contains("CNI_IFNAME") && error.msg.contains("valid"), "{error:?}");
        }
    }

    #[test]
    fn an_answer_that_cannot_be_written_is_an_error_also_if_it_fits_a_buffer() {
        let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
        assert!(say(&mut io::LineWriter::new(full()), "{}").is_err());
        say(&mut io::sink(), "{}").unwrap();
    }

    #[test]
    fn a_configuration_that_is_too_long_is_refused_with_the_limit_and_read_no_further() {
        let mut input = io::repeat(b' ').take(2 * LONGEST_INPUT);
        let error = read(&mut input).map(|read| read.len()).unwrap_err().error;
        assert_eq!((error.code, input.limit()), (code::DECODE, LONGEST_INPUT - 1));
        assert!(error.to_json("1.1.0")["msg"].as_str().unwrap().contains("longer than 16 MiB"), "{error:?}");
        assert_eq!(read(io::repeat(b' ').take(LONGEST_INPUT)).unwrap().len() as u64, LONGEST_INPUT);
    }

    #[test]
    fn without_an_agent_add_asks_to_come_back_and_del_is_noted_once() {
        let dir = std::env::temp_dir().join(format!("cirri-cni-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let conf = format!(r#"{{"cniVersion":"1.1.0","name":"n","socket":"{}/agent.sock"}}"#, dir.display());
        assert_eq!(run_with(&conf, &with("ADD")).unwrap_err().code, code::TRY_AGAIN_LATER);
        assert_eq!(run_with(&conf, &with("STATUS")).unwrap_err().code, code::NOT_AVAILABLE);
        // DEL does not mind what it does not need.
        let needless = conf.replace("1.1.0\",", "1.1.0\",\"runtimeConfig\":7,\"args\":[],\"prevResult\":\"\",");
        for conf in [&conf, &needless] {
            assert_eq!(run_with(conf, &with("DEL")).unwrap(), None);
        }
        let queued = pending_deletions(&dir).unwrap();
        assert_eq!(queued.len(), 1);
        let attachment = Attachment { network: "n".into(), container_id: "c1".into(), ifname: "eth0".into() };
        assert_eq!(queued[0].deletion, EndpointDelete { attachment, netns: Some("/run/netns/x".into()) });
        // As an earlier version wrote it.
        let older = r#"{"network":"n","container_id":"c1","ifname":"eth0"}"#;
        std::fs::write(&queued[0].path, older).unwrap();
        assert_eq!(pending_deletions(&dir).unwrap()[0].deletion.netns, None);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
