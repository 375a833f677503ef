//! Pods: a namespace each, attached by the real CNI plugin, with programs in it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use rustix::fs::inotify;
use serde::Deserialize;
use serde_json::json;

use super::cgroup;
use super::echo::{Port, READY, Transport};
use super::interrupt::Interrupt;
use super::logs;
use super::names;
use super::netns;
use super::process::{self, ProcessId, Start, own_binary};
use super::spaces::Spaces;
use super::state::{Container, ECHO_PROGRAM, Lab, Node, PodKey, PodRecord, PodSpec};

/// The device of a pod.
const IFNAME: &str = "eth0";
const CNI_VERSION: &str = "1.1.0";
/// How often to look whether a program listens. The kernel tells nobody when a socket begins to.
const LISTEN_POLL: Duration = Duration::from_millis(10);
/// How long a wait may keep an interruption waiting.
const INTERRUPT_CHECK: Duration = Duration::from_millis(100);
/// How much of a log an error quotes.
const QUOTE_MAX: u64 = 400;

/// Makes a pod: namespace, attachment, programs. Whatever comes of it stands in its record.
///
/// # Errors
/// The step that failed. What was made until then stays for [`remove`], which the next apply or `down` calls.
pub fn create(lab: &Lab, key: &PodKey, spec: &PodSpec, node: &Node, spaces: &Spaces) -> anyhow::Result<PodRecord> {
    let unique = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let netns = if spec.host_network { node.netns.clone() } else { spaces.claim(key) };
    let called = format!("{}-{}-{}", lab.name, key.namespace, key.name);
    let mut record = PodRecord {
        key: key.clone(),
        node: node.name.clone(),
        netns,
        container_id: format!("{}-{unique:x}", names::fitting(&called, names::LONGEST)),
        addresses: Vec::new(),
        spec: spec.clone(),
        complete: false,
        error: None,
    };
    // Written before anything is made, which is then found, whatever happens.
    record.save(lab).with_context(|| format!("pod {key}"))?;
    let made = build(lab, &mut record, node);
    match &made {
        Ok(()) => record.complete = true,
        Err(error) => record.error = Some(format!("{error:#}")),
    }
    record.save(lab)?;
    made.with_context(|| format!("pod {key}")).map(|()| record)
}

/// Whether the pod has its network: its own namespace with its device, or that of its node.
pub fn is_attached(record: &PodRecord) -> bool {
    if record.spec.host_network {
        return record.netns.exists();
    }
    // Of the thread that reads it, which is inside.
    let devices = netns::within(&record.netns, || fs::read_to_string("/proc/thread-self/net/dev"));
    devices.is_ok_and(|text| text.is_ok_and(|text| has_device(&text, IFNAME)))
}

/// Whether a table of `/proc/net/dev` has a device.
fn has_device(table: &str, name: &str) -> bool {
    table.lines().any(|line| line.split_once(':').is_some_and(|(device, _)| device.trim() == name))
}

/// Stops a pod's programs, detaches it and removes its namespace and records. What is gone already is no error.
///
/// # Errors
/// The namespace or a process would not go; or the CNI plugin failed, after everything else was removed.
pub fn remove(lab: &Lab, record: &PodRecord) -> anyhow::Result<()> {
    let leaders: Vec<ProcessId> = record.programs(lab).into_iter().filter_map(|(_, process)| process).collect();
    process::kill_groups(&leaders)?;
    let group = cgroup::of_pod(&lab.name, record)?;
    process::kill(&cgroup::inside(&group))?;
    let mut detached = Ok(());
    if !record.spec.host_network {
        if let Some(id) = netns::id(&record.netns) {
            process::kill(&process::inside(&[id]))?;
        }
        if let Ok(node) = lab.node(&record.node) {
            detached = cni(lab, node, "DEL", record).map(drop);
        }
        if let Some(name) = record.netns.file_name().and_then(|name| name.to_str()) {
            netns::delete(name).with_context(|| format!("cannot remove the network namespace {name}"))?;
        }
    }
    cgroup::remove(&group)?;
    let directory = lab.pod_directory(&record.key);
    fs::remove_dir_all(&directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    detached.with_context(|| format!("pod {}", record.key))
}

/// Waits until the programs listen on the TCP ports that their containers declare.
///
/// # Errors
/// A program ended before, or does not listen in time.
pub fn await_listening(lab: &Lab, record: &PodRecord, deadline: Instant, interrupt: &Interrupt) -> anyhow::Result<()> {
    for container in record.spec.containers.iter().filter(|container| !container.argv.is_empty()) {
        for port in container.ports.iter().filter(|port| port.protocol == Transport::Tcp) {
            let directory = lab.pod_directory(&record.key);
            let file = directory.join(format!("{}.pid", container.name));
            loop {
                let Some(process) = process::recorded(&file) else {
                    let log = directory.join(format!("{}.log", container.name));
                    bail!("pod {}: {} ended before it listened on {port}{}", record.key, container.name, quote(&log));
                };
                if listens(process, port.number) {
                    break;
                }
                interrupt.check()?;
                if Instant::now() >= deadline {
                    bail!("pod {}: {} does not listen on {port}", record.key, container.name);
                }
                std::thread::sleep(LISTEN_POLL);
            }
        }
    }
    Ok(())
}

/// Waits until a program of the pod writes a line from now on that `is` what is waited for; `None`: not in time, or the
/// pod is gone.
///
/// # Errors
/// Its log cannot be watched. [`super::interrupt::Interrupted`].
pub fn await_line(
    lab: &Lab,
    record: &PodRecord,
    program: &str,
    is: impl Fn(&str) -> bool,
    deadline: Instant,
    interrupt: &Interrupt,
) -> anyhow::Result<Option<String>> {
    let log = lab.pod_directory(&record.key).join(format!("{program}.log"));
    let failed = || format!("cannot follow {}", log.display());
    // Watched before the first look: what is written in between is then not missed.
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watch, &log, inotify::WatchFlags::MODIFY).with_context(failed)?;
    let mut file = fs::File::open(&log).with_context(failed)?;
    file.seek(SeekFrom::End(0)).with_context(failed)?;
    let mut read = String::new();
    let mut space = [MaybeUninit::uninit(); 4096];
    loop {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(failed)?;
        read += &String::from_utf8_lossy(&bytes);
        // Without a newline a line may still grow.
        let whole = read.rfind('\n').map_or(0, |end| end + 1);
        if let Some(line) = read[..whole].lines().find(|line| is(line)) {
            return Ok(Some(line.to_owned()));
        }
        read.drain(..whole);
        interrupt.check()?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        process::first_readable(&[watch.as_fd()], left.min(INTERRUPT_CHECK));
        let mut events = inotify::Reader::new(&watch, &mut space);
        while events.next().is_ok() {}
    }
}

fn build(lab: &Lab, record: &mut PodRecord, node: &Node) -> anyhow::Result<()> {
    if record.spec.host_network {
        record.addresses = vec![node.ipv4.into(), node.ipv6.into()];
    } else {
        netns::create(record.netns.file_name().and_then(|name| name.to_str()).unwrap_or_default())?;
        record.addresses = cni(lab, node, "ADD", record)?;
    }
    record.save(lab)?;
    start_echo(lab, record)?;
    for container in record.spec.containers.iter().filter(|container| !container.argv.is_empty()) {
        start_program(lab, record, container)?;
    }
    Ok(())
}

/// One container with its program.
fn start_program(lab: &Lab, record: &PodRecord, container: &Container) -> anyhow::Result<()> {
    let mut env = BTreeMap::from([("HOSTNAME".to_owned(), record.key.name.clone())]);
    env.extend(container.env.clone());
    // It is nobody's child once this command ends, and is found again by its record.
    start(lab, record, &container.name, &container.argv, &env, false).map(drop)
}

/// The echo server for all containers that only declare ports; returns when all ports are open.
fn start_echo(lab: &Lab, record: &PodRecord) -> anyhow::Result<()> {
    let ports: Vec<Port> =
        record.spec.containers.iter().filter(|c| c.is_echo()).flat_map(|c| c.ports.iter().copied()).collect();
    if ports.is_empty() {
        return Ok(());
    }
    let argv = echo_argv(&record.key.to_string(), &record.addresses, &ports)?;
    let child = start(lab, record, ECHO_PROGRAM, &argv, &BTreeMap::new(), true)?;
    await_ready(child, &lab.pod_directory(&record.key).join(format!("{ECHO_PROGRAM}.log")))
}

/// The command line of an echo server.
///
/// # Errors
/// The path of this program is not known.
pub fn echo_argv(name: &str, addresses: &[IpAddr], ports: &[Port]) -> anyhow::Result<Vec<String>> {
    let mut argv = vec![own_binary()?, "lab".into(), "__echo".into(), "--name".into(), name.into()];
    for address in addresses {
        argv.extend(["--address".into(), address.to_string()]);
    }
    argv.extend(ports.iter().map(Port::to_string));
    Ok(argv)
}

/// Waits for an echo server's word that all of its ports are open.
///
/// # Errors
/// It ended instead; the error quotes its log.
pub fn await_ready(mut child: Child, log: &Path) -> anyhow::Result<()> {
    let stdout = child.stdout.take().context("the echo server has no standard output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line.trim_end() == READY {
        return Ok(());
    }
    let status = child.wait()?;
    bail!("the echo server ended ({status}){}", quote(log))
}

fn start(
    lab: &Lab,
    record: &PodRecord,
    program: &str,
    argv: &[String],
    env: &BTreeMap<String, String>,
    pipe_stdout: bool,
) -> anyhow::Result<Child> {
    let directory = lab.pod_directory(&record.key);
    let log = directory.join(format!("{program}.log"));
    // Programs write files of their own; beside our records a `nginx.pid` would replace one.
    let work = directory.join(logs::WORK);
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let cgroup = cgroup::of_pod(&lab.name, record)?;
    Start { netns: &record.netns, cgroup: &cgroup, argv, env, directory: &work, log: &log, pipe_stdout }
        .spawn(&directory.join(format!("{program}.pid")))
}

/// The addresses in an answer to ADD, the part of it that the lab needs.
#[derive(Default, Deserialize)]
struct CniResult {
    #[serde(default)]
    ips: Vec<CniAddress>,
}

#[derive(Deserialize)]
struct CniAddress {
    address: ipnet::IpNet,
}

#[derive(Deserialize)]
struct CniError {
    msg: String,
    #[serde(default)]
    details: String,
}

/// Runs the CNI plugin the way a container runtime on that node would.
fn cni(lab: &Lab, node: &Node, command: &str, record: &PodRecord) -> anyhow::Result<Vec<IpAddr>> {
    let socket = lab.agent_socket(&node.name);
    let configuration = json!({"cniVersion": CNI_VERSION, "name": "cirri", "type": "cirri-cni", "socket": socket});
    let arguments =
        format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={}", record.key.namespace, record.key.name);
    let mut plugin = Command::new(own_binary()?);
    plugin
        .arg("cni")
        // Ctrl-C at the terminal ends the lab's command between two steps, not a plugin in the middle of one.
        .process_group(0)
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", &record.container_id)
        .env("CNI_NETNS", &record.netns)
        .env("CNI_IFNAME", IFNAME)
        .env("CNI_PATH", "/opt/cni/bin")
        .env("CNI_ARGS", arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(process::append_to(&lab.node_directory(&node.name).join("cni.log"))?);
    let mut child = netns::within(&node.netns, || plugin.spawn())?.context("cannot start the CNI plugin")?;
    let mut input = child.stdin.take().context("the CNI plugin has no standard input")?;
    // A plugin that fails before it reads says why on its standard output.
    let _ = input.write_all(configuration.to_string().as_bytes());
    drop(input);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout);
        return Err(match serde_json::from_str::<CniError>(&text) {
            Ok(error) if error.details.is_empty() => anyhow::anyhow!("CNI {command}: {}", error.msg),
            Ok(error) => anyhow::anyhow!("CNI {command}: {} ({})", error.msg, error.details),
            Err(_) => anyhow::anyhow!("CNI {command}: the plugin ended with {}: {}", output.status, text.trim()),
        });
    }
    if command != "ADD" {
        return Ok(Vec::new());
    }
    let result: CniResult = serde_json::from_slice(&output.stdout).context("CNI ADD: the answer is not a result")?;
    Ok(result.ips.into_iter().map(|ip| ip.address.addr()).collect())
}

/// Whether anything in the process's network namespace listens on a TCP port.
fn listens(process: ProcessId, port: u16) -> bool {
    ["tcp", "tcp6"].iter().any(|table| {
        fs::read_to_string(format!("/proc/{}/net/{table}", process.pid))
            .is_ok_and(|table| table.lines().skip(1).any(|line| is_listener(line, port)))
    })
}

/// Whether a line of `/proc/net/tcp` is a listener on this port: its second field is the local `address:port` in
/// hexadecimal, its fourth the state, where 0A is LISTEN.
fn is_listener(line: &str, port: u16) -> bool {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let local = fields.next().and_then(|local| local.rsplit_once(':')).map(|(_, port)| port);
    let state = fields.nth(1);
    state == Some("0A") && local.and_then(|local| u16::from_str_radix(local, 16).ok()) == Some(port)
}

/// The end of a log as a part of an error: `: "…" (log: …)`.
pub fn quote(log: &Path) -> String {
    let end = fs::File::open(log).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(QUOTE_MAX)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    });
    let end = end.unwrap_or_default();
    match end.trim().lines().last() {
        Some(last) => format!(": {} (log: {})", last.trim(), log.display()),
        None => format!(" (log: {})", log.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_told_from_a_connection_to_the_same_port() {
        let listener = "   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1";
        let connection =
            "   1: 0100007F:0050 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 1 1";
        assert!(is_listener(listener, 80));
        assert!(!is_listener(listener, 81));
        assert!(!is_listener(connection, 80));
    }

    #[test]
    fn a_device_is_found_by_its_whole_name() {
        let table = "Inter-|   Receive\n face |bytes\n    lo:       0       0\n  eth01: 1 2\n";
        assert!(has_device(table, "lo") && !has_device(table, "eth0") && !has_device(table, "face |bytes"));
        assert!(has_device("  eth0: 1 2\n", "eth0"));
    }

    #[test]
    fn the_own_listener_is_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let own = ProcessId::current(std::process::id().try_into().unwrap()).unwrap();
        assert!(listens(own, listener.local_addr().unwrap().port()));
    }
}
