//! Labs beside each other, crashed labs, interrupted labs: each removes all of its own and touches nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cirri_e2e::lab::{self, Lab, eventually, printed};
use cirri_loader::net::Namespace;

const PODS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {nodeName: node1, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec: {nodeName: node2, containers: [{name: c, image: none, ports: [{containerPort: 80}]}]}
"#;
const CLOSED: &str = "
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {}, policyTypes: [Ingress]}
";
/// Exit code of a command that SIGINT stopped.
const INTERRUPTED: i32 = 130;
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn two_labs_with_the_same_addresses_do_not_see_each_other() {
    let outside = outside();
    let open = Lab::up("side_a", 2, &[]).unwrap();
    let closed = Lab::up("side_b", 2, &[]).unwrap();
    open.apply(PODS).unwrap();
    closed.apply(&[PODS, CLOSED].concat()).unwrap();
    assert_eq!(open.addresses().unwrap(), closed.addresses().unwrap(), "the same addresses, or this shows little");
    let all = |lab: &Lab, verdict: &str| {
        let verdicts = lab.verdicts_wanted(verdict, "shop/client", "shop/web", 80).unwrap();
        assert!(verdicts.values().all(|it| it == verdict), "{}: {verdicts:?}, not {verdict}", lab.name());
    };
    all(&open, "allowed");
    all(&closed, "denied");
    let gone = closed.name().to_string();
    drop(closed);
    assert_eq!(remains(&gone), BTreeSet::new());
    all(&open, "allowed");
    let gone = open.name().to_string();
    drop(open);
    assert_eq!(remains(&gone), BTreeSet::new());
    assert_eq!(self::outside(), outside);
}

#[test]
fn a_lab_into_which_others_look_meanwhile_goes_and_stays_gone() {
    for _ in 0..3 {
        let lab = Lab::up("looked", 1, &[]).unwrap();
        let gone = AtomicBool::new(false);
        let look = |program: &[&str]| {
            let look = ["lab", "exec", "--name", lab.name(), "--node", "node1", "--"];
            while !gone.load(Ordering::Relaxed) {
                lab::output([&look[..], program].concat()).unwrap();
            }
        };
        let down = std::thread::scope(|scope| {
            for program in [&["true"][..], &["true"], &["true"], &["sleep", "60"]] {
                scope.spawn(move || look(program));
            }
            eventually("somebody looks", Duration::from_secs(60), || processes_inside(lab.name()).len() > 2);
            let down = lab::run(["lab", "down", "--name", lab.name()]);
            gone.store(true, Ordering::Relaxed);
            down
        });
        down.unwrap();
        assert_eq!(remains(lab.name()), BTreeSet::new());
    }
}

#[test]
fn a_lab_whose_processes_were_all_killed_goes_with_down() {
    let lab = Lab::up("crashed", 2, &[]).unwrap();
    lab.apply(PODS).unwrap();
    let group = format!("{}/cirri-lab-{}/node2/shop_web/cgroup.procs", groups(), lab.name());
    assert_eq!(fs::read_to_string(&group).unwrap().lines().count(), 1, "the program of `web` is in its pod's group");
    let processes = processes_inside(lab.name());
    // Two agents, etcd, the world's server and that of `web`.
    assert_eq!(processes.len(), 5, "{processes:?}");
    processes.iter().for_each(|pid| lab::kill(*pid).unwrap());
    assert_ne!(lab.list().unwrap().state, "up");
    let gone = lab.name().to_string();
    drop(lab);
    assert_eq!(remains(&gone), BTreeSet::new());
    let again = lab::run(["lab", "down", "--name", &gone]).unwrap();
    assert!(String::from_utf8_lossy(&again.stdout).contains("there is no lab"), "down is no error twice");
}

#[test]
fn an_up_that_is_interrupted_or_killed_at_any_moment_leaves_nothing() {
    let outside = outside();
    let folder = tempfile::TempDir::new().unwrap();
    fs::write(folder.path().join("pods.yaml"), PODS).unwrap();
    // Until its output has this, or for the first until it has made anything at all.
    let moments = ["", "network ready", "etcd ready", "agents ready", "created", "runs on"];
    for moment in moments {
        let lab = Lab::named("stopped");
        let (code, told) = stopped_at(&lab, folder.path(), moment, "-INT");
        assert_eq!(code, Some(INTERRUPTED), "at {moment:?}: {told}");
        assert_eq!(remains(lab.name()), BTreeSet::new(), "at {moment:?}: {told}");
    }
    for moment in ["network ready", "agents ready"] {
        let lab = Lab::named("stopped");
        let (code, told) = stopped_at(&lab, folder.path(), moment, "-KILL");
        assert_eq!(code, None, "at {moment:?}: {told}");
        assert_ne!(remains(lab.name()), BTreeSet::new(), "it was killed too late to show anything");
        lab::run(["lab", "down", "--name", lab.name()]).unwrap();
        assert_eq!(remains(lab.name()), BTreeSet::new(), "down after a kill at {moment:?}");
    }
    assert_eq!(self::outside(), outside);
}

/// Starts `up`, sends it a signal at a moment, and waits for its end: its exit code and what it said.
fn stopped_at(lab: &Lab, manifests: &Path, moment: &str, signal: &str) -> (Option<i32>, String) {
    let mut up = Command::new(lab::binary().unwrap())
        .args(["lab", "up", "--name", lab.name(), "--nodes", "2", "-f"])
        .arg(manifests)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(up.stdout.take().unwrap());
    let mut told = String::new();
    if moment.is_empty() {
        eventually("it begins", PATIENCE, || {
            if up.try_wait().unwrap().is_some() {
                up.stderr.take().unwrap().read_to_string(&mut told).unwrap();
                panic!("it ended before it began: {told}");
            }
            !remains(lab.name()).is_empty()
        });
    }
    while !told.contains(moment) {
        assert!(output.read_line(&mut told).unwrap() > 0, "it ended before {moment:?}: {told}");
    }
    assert!(Command::new("kill").args([signal, &up.id().to_string()]).status().unwrap().success());
    output.read_to_string(&mut told).unwrap();
    up.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    (up.wait().unwrap().code(), told)
}

/// Everything on this machine that is a lab's: namespaces, pins, directories, processes.
fn remains(name: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let groups = groups();
    let places = [
        ("/run/netns", format!("cirri-{name}-")),
        ("/sys/fs/bpf/cirri", format!("lab-{name}-")),
        (groups.as_str(), format!("cirri-lab-{name}")),
    ];
    for (directory, prefix) in places {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            if file.starts_with(&prefix) {
                all.insert(format!("{directory}/{file}"));
            }
        }
    }
    let directory = format!("/run/cirri/lab/{name}");
    if Path::new(&directory).exists() {
        all.insert(directory.clone());
    }
    for process in numbered("/proc") {
        let command = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(&format!("{directory}/")) || command.contains(&format!("cirri-{name}-")) {
            all.insert(format!("process {process}: {command}"));
        }
    }
    all
}

/// Where control groups of version 2 are.
fn groups() -> String {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mut version_2 = mounts.lines().filter(|line| line.split(' ').nth(2) == Some("cgroup2"));
    version_2.next().and_then(|line| line.split(' ').nth(1)).expect("labs need them").to_string()
}

/// The processes in a lab's namespaces.
fn processes_inside(name: &str) -> BTreeSet<i32> {
    let namespaces: BTreeSet<u64> = fs::read_dir("/run/netns")
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&format!("cirri-{name}-")))
        .map(|entry| fs::metadata(entry.path()).unwrap().ino())
        .collect();
    let inside =
        |pid: &i32| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|netns| namespaces.contains(&netns.ino()));
    numbered("/proc").into_iter().filter(inside).collect()
}

fn numbered(directory: &str) -> BTreeSet<i32> {
    let entries = fs::read_dir(directory).unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok()).collect()
}

/// The network outside all labs, as far as a lab could have changed it.
fn outside() -> Vec<String> {
    let here = Namespace::current().unwrap();
    let shown = [
        &["ip", "-brief", "link"][..],
        &["ip", "-brief", "address"],
        &["ip", "-4", "route", "show", "table", "all"],
        &["ip", "-6", "route", "show", "table", "all"],
        &["ip", "rule"],
        &["tc", "qdisc"],
    ];
    let mut all: Vec<String> = shown.into_iter().map(|argv| printed(&here, argv)).collect();
    for switch in ["ipv4/ip_forward", "ipv4/conf/all/rp_filter", "ipv6/conf/all/forwarding"] {
        all.push(format!("{switch} {}", fs::read_to_string(format!("/proc/sys/net/{switch}")).unwrap()));
    }
    all
}
