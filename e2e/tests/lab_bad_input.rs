//! What is wrong gets one clear error that says what to do, and the last good state stays in force.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use cirri_e2e::kernel::TestNamespace;
use cirri_e2e::lab::{self, Conversation, Lab, eventually, printed};
use cirri_e2e::pinned::Pinned;
use serde_json::Value;
use tempfile::TempDir;

const PODS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {nodeName: node1, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, image: none, ports: [{containerPort: 80}]}]}
"#;
/// Nobody may reach `web`.
const DENY: &str = "
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress]}
";
/// Exit codes as `cirri --help` has them.
const FAILED: i32 = 1;
const BAD_INPUT: i32 = 2;
const NOT_REACHABLE: i32 = 3;
/// How soon an agent takes note of something that is not announced to it.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn manifests_that_are_wrong_are_refused_by_file_line_and_field_and_change_nothing() {
    let lab = Lab::up("manifests", 1, &[]).unwrap();
    let good = [PODS, DENY].concat();
    lab.apply(&good).unwrap();
    let refused = |more: &str, code: i32, words: &[&str]| {
        let output = lab.try_apply(&[&good, more].concat()).unwrap();
        said(&output, code, words);
        assert_denied(&lab, "after a manifest was refused");
    };
    let file = "all.yaml:";
    refused("---\nkind: [NetworkPolicy\n", BAD_INPUT, &[file, "YAML"]);
    let misspelt = DENY.replace("name: web", "name: other").replace("policyTypes", "policyType");
    refused(&misspelt, BAD_INPUT, &[file, "spec.policyType", "did you mean `policyTypes`"]);
    let selector = DENY.replace("name: web", "name: other").replace("{app: web}", "{app: [web]}");
    refused(&selector, BAD_INPUT, &[file, "matchLabels"]);
    // The same object twice, and the two contradict each other.
    let opposite = DENY.replace("policyTypes: [Ingress]", "policyTypes: [Ingress], ingress: [{}]");
    refused(&opposite, BAD_INPUT, &["shop/web", "keep one"]);

    // A version of the policy that would not fit: the one before it holds.
    let output = lab.try_apply(&[PODS, &too_large()].concat()).unwrap();
    said(&output, FAILED, &["shop/web", "ingress rule 1", "65536 fit", "narrow"]);
    assert_denied(&lab, "while a policy is refused");
    let policies: Vec<Value> = lab.ask("node1", &["policy", "get"]).unwrap();
    assert!(policies[0]["state"].as_str().unwrap().starts_with("refused"), "{policies:?}");
    lab.apply(PODS).unwrap();
    assert_allowed(&lab, "when the policy is gone");
}

#[test]
fn a_file_of_the_folder_that_breaks_keeps_its_last_good_content() {
    let lab = Lab::up("folder", 1, &[]).unwrap();
    lab.apply(PODS).unwrap();
    let file = PathBuf::from(format!("/run/cirri/lab/{}/nodes/node1/manifests/mine.yaml", lab.name()));
    let problems = || {
        let status: Value = lab.ask("node1", &["status"]).unwrap();
        status["problems"].to_string()
    };
    fs::write(&file, DENY).unwrap();
    eventually("the policy is taken", PATIENCE, || !policies(&lab).is_empty());
    assert_denied(&lab, "by a file of the folder");

    fs::write(&file, DENY.replace("spec:", "spec: [")).unwrap();
    eventually("the broken file is named", PATIENCE, || problems().contains("mine.yaml:"));
    assert_denied(&lab, "while the file is broken");
    let socket = lab.socket("node1");
    let output = lab::output(["--socket", &socket, "status", "--check"]).unwrap();
    assert_eq!(output.status.code(), Some(FAILED), "status --check says that all is well: {output:?}");

    // A restart reads the broken file only, and must not open anything.
    lab.restart("node1", &["--kill"]).unwrap();
    assert_denied(&lab, "after a restart with a broken file");

    fs::write(&file, "# nothing\n").unwrap();
    eventually("the mended file is taken", PATIENCE, || policies(&lab).is_empty() && problems() == "[]");
    assert_allowed(&lab, "when the file asks for nothing");
}

#[test]
fn one_document_that_cannot_be_used_takes_no_other_with_it_and_opens_nothing() {
    let lab = Lab::up("documents", 1, &[]).unwrap();
    lab.apply(PODS).unwrap();
    let file = PathBuf::from(format!("/run/cirri/lab/{}/nodes/node1/manifests/mine.yaml", lab.name()));
    let problems = || {
        let status: Value = lab.ask("node1", &["status"]).unwrap();
        status["problems"].to_string()
    };
    let foreign = "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: shop}\n";
    let not_yaml = "---\nkind: [half\n";
    fs::write(&file, [foreign, DENY, not_yaml].concat()).unwrap();
    eventually("the policy is taken", PATIENCE, || !policies(&lab).is_empty());
    assert_denied(&lab, "beside a document of another kind and one that is no YAML");
    let problems_now = problems();
    for said in ["mine.yaml:3:", "Deployment", "not valid YAML"] {
        assert!(problems_now.contains(said), "{said}: {problems_now}");
    }
    let output = lab::output(["--socket", &lab.socket("node1"), "status", "--check"]).unwrap();
    assert_eq!(output.status.code(), Some(FAILED), "status --check says that all is well: {output:?}");
    let output = lab::output(["policy", "check", file.to_str().unwrap()]).unwrap();
    said(&output, BAD_INPUT, &["mine.yaml:3:", "Deployment", "not valid YAML"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("NetworkPolicy"), "{output:?}");

    fs::write(&file, "# nothing\n").unwrap();
    eventually("the policy is gone", PATIENCE, || policies(&lab).is_empty() && problems() == "[]");
    assert_allowed(&lab, "when the file asks for nothing");
    // Its first version has a mistake in what it allows; whom it selects is clear.
    fs::write(&file, DENY.replace("policyTypes: [Ingress]", "ingress: [{ports: [{port: 0}]}]")).unwrap();
    eventually("a stand-in is taken", PATIENCE, || !policies(&lab).is_empty());
    assert_denied(&lab, "while nothing but the selector can be read");
    assert!(problems().contains("NetworkPolicy shop/web: spec.ingress[0].ports[0].port"), "{}", problems());
    fs::write(&file, DENY.replace("policyTypes: [Ingress]", "ingress: [{ports: [{port: 80}]}]")).unwrap();
    eventually("the mended policy is taken", PATIENCE, || problems() == "[]");
    eventually("it is in force", PATIENCE, || {
        lab.verdicts("shop/client", "shop/web", 80).is_ok_and(|all| all.values().all(|it| it == "allowed"))
    });
}

#[test]
fn etcd_may_be_killed_traffic_and_rules_stay_and_the_next_change_is_enforced_when_it_is_back() {
    let lab = Lab::up("etcd", 2, &[]).unwrap();
    let pods = PODS.replace("spec: {containers", "spec: {nodeName: node2, containers");
    let denied = [&pods, DENY].concat();
    lab.apply(&denied).unwrap();
    assert_denied(&lab, "across nodes");
    let client = lab.addresses().unwrap()["shop/client"][0];
    let mut conversation = Conversation::open(&lab, "node:node1", "shop/client", client).unwrap();

    let etcd = Etcd::of(&lab);
    etcd.kill();
    for node in ["node1", "node2"] {
        eventually("the store's absence shows", PATIENCE, || {
            let status: Value = lab.ask(node, &["status"]).unwrap();
            let store = &status["store"];
            store["healthy"] == false && store["since"].as_str().is_some_and(|since| since.starts_with("20"))
        });
    }
    assert_denied(&lab, "while etcd is away");
    let output = lab.try_apply(&pods).unwrap();
    let down = format!("`cirri lab down --name {}`", lab.name());
    said(&output, NOT_REACHABLE, &["etcd does not answer", &down]);
    let begun = Instant::now();
    let short = ["lab", "restart", "--name", lab.name(), "node1", "--timeout", "2"];
    said(&lab::output(short).unwrap(), NOT_REACHABLE, &["etcd does not answer", &down]);
    assert!(begun.elapsed() < PATIENCE);
    assert_denied(&lab, "after a change that could not be stored");

    // An agent that starts meanwhile goes on with what is pinned.
    let restarts = ["lab", "restart", "--name", lab.name(), "node2", "--kill"];
    let before = lab.node("node2").unwrap().pid;
    let restart = Command::new(lab::binary().unwrap()).args(restarts).stdout(Stdio::null()).spawn().unwrap();
    eventually("another agent answers", PATIENCE, || {
        let node = lab.node("node2").unwrap();
        node.state == "ready" && node.pid != before
    });
    assert_denied(&lab, "after a restart without etcd");
    conversation.exchange();

    let _etcd = etcd.start();
    assert!(Process(restart).0.wait().unwrap().success(), "the agent did not recover with its store");
    lab.apply(&denied).unwrap();
    assert_denied(&lab, "when etcd is back");
    lab.apply(&pods).unwrap();
    assert_allowed(&lab, "by the first change after etcd came back");
    for node in ["node1", "node2"] {
        eventually("the store is well again", PATIENCE, || {
            let status: Value = lab.ask(node, &["status"]).unwrap();
            status["store"]["healthy"] == true && status["store"]["since"] == ""
        });
    }
    conversation.exchange();
}

#[test]
fn an_agent_whose_etcd_was_never_there_says_so_and_attaches_nobody() {
    let place = Place::new();
    let store = "store: {kind: etcd, etcd: {endpoints: [\"http://192.0.2.1:2379\"]}}\n";
    let agent = place.start(store);
    eventually("the store's absence shows", PATIENCE, || {
        let text = String::from_utf8(place.cirri(&["status"]).stdout).unwrap();
        text.contains("NOT REACHABLE since 20")
    });
    said(&place.cirri(&["status", "--check"]), FAILED, &["not everything is well"]);
    let refused = place.attach();
    assert_eq!(refused.status.code(), Some(FAILED));
    let error: Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert_eq!(error["code"], 11, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("store"), "{error}");
    assert!(printed(&place.namespace.namespace, &["ip", "-o", "link"]).matches("lxc").count() == 0);
    drop(agent);
}

#[test]
fn an_exception_that_finds_no_room_allows_nothing_and_is_named() {
    let lab = Lab::up("noroom", 1, &["--set", "bpf.maps.ipcache=64"]).unwrap();
    let closed = "
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: client, namespace: shop}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
";
    // The world is one of the exceptions, and the last of them: no room is left for it.
    let IpAddr::V4(world) = lab.addresses().unwrap()["world"][0] else { panic!("no IPv4 address of the world") };
    let first = world.octets()[0];
    let mut exceptions: Vec<String> = (0..100).map(|number| format!("{first}.0.{number}.0/24")).collect();
    exceptions.push(format!("{world}/32"));
    let except = |exceptions: &[String]| {
        let exceptions = exceptions.join(", ");
        format!("{closed}  egress: [{{to: [{{ipBlock: {{cidr: {first}.0.0.0/8, except: [{exceptions}]}}}}]}}]\n")
    };
    let judge = |verdict: &str, when: &str| {
        let all = lab.verdicts_wanted(verdict, "shop/client", "world", 80).unwrap();
        assert_eq!(all[&4], verdict, "{when}");
    };
    lab.apply(&[PODS, closed].concat()).unwrap();
    judge("denied", "before");
    lab.write(&[PODS, &except(&exceptions)].concat()).unwrap();
    let says = |words: &str| lab.ask::<Value>("node1", &["status"]).unwrap().to_string().contains(words);
    eventually("the table is full", PATIENCE, || says("IPCACHE is full"));
    judge("denied", "with an exception that finds no room");
    assert!(says("cannot be told from those around them"));
    // It is what the agent wrote, so no comparison takes it for the work of somebody else.
    let pins = Pinned(format!("/sys/fs/bpf/cirri/lab-{}-node1", lab.name()).into());
    let rulesets = pins.shown("RULESETS");
    for _ in 0..2 {
        let devices = pins.shown("DEVICES");
        pins.delete_entries("DEVICES");
        eventually("a comparison comes by", PATIENCE, || pins.shown("DEVICES") == devices);
    }
    assert_eq!(pins.shown("RULESETS"), rulesets, "the rule set was written again");

    // With room for all it is as the policy says, and without the exception the world is reached.
    lab.apply(&[PODS, &except(&exceptions[90..])].concat()).unwrap();
    judge("denied", "with the exception");
    lab.apply(&[PODS, &except(&exceptions[90..100])].concat()).unwrap();
    judge("allowed", "without it");
}

#[test]
fn a_full_disk_refuses_new_workloads_keeps_the_others_and_heals_by_itself() {
    let place = Place::new();
    let folder = place.directory.path().join("manifests");
    fs::create_dir(&folder).unwrap();
    let store = format!("store: {{kind: folder, folder: {}}}\n", folder.display());
    let ballast = place.state().join("ballast");
    let fill = || {
        let mut rest = fs::File::create(&ballast).unwrap();
        while std::io::Write::write(&mut rest, &[0; 512]).is_ok_and(|written| written > 0) {}
    };
    // From the start.
    fill();
    said(&place.run(&store), FAILED, &["full", "Free space"]);
    fs::remove_file(&ballast).unwrap();

    let agent = place.start(&store);
    eventually("a workload is attached", PATIENCE, || place.attach().status.success());
    let attached: Vec<Value> = place.ask(&["endpoint", "list"]);
    assert_eq!(attached.len(), 1);
    let other = TestNamespace::new();
    fill();
    let refused = place.attach_to(&other, "late");
    let error: Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert!(!refused.status.success(), "{error}");
    let text = error.to_string();
    assert!(text.contains("full") || text.contains("No space left"), "{error}");
    assert_eq!(place.ask(&["endpoint", "list"]), attached, "a refused workload left something, or took another's");
    assert_eq!(printed(&place.namespace.namespace, &["ip", "-o", "link"]).matches("lxc").count(), 1);

    fs::remove_file(&ballast).unwrap();
    eventually("there is room again", PATIENCE, || place.attach_to(&other, "late").status.success());
    assert_eq!(place.ask(&["endpoint", "list"]).len(), 2);
    drop(agent);
}

#[test]
fn commands_that_cannot_work_say_why_and_what_to_do() {
    let place = Place::new();
    let wrong = |text: &str, words: &[&str]| {
        let file = place.directory.path().join("wrong.yaml");
        fs::write(&file, text).unwrap();
        said(&lab::output(["agent", "--config", file.to_str().unwrap()]).unwrap(), BAD_INPUT, words);
    };
    wrong("node:\n  name: a\n  nmae: b\n", &["wrong.yaml:3", "nmae", "name"]);
    wrong("routing: {mode: sideways}\n", &["wrong.yaml:1", "sideways", "overlay"]);
    wrong("masquerade: {ports: 1000-2000}\n", &["1000-2000", "power of two"]);
    wrong("node: [\n", &["wrong.yaml:1"]);
    let output = lab::output(["agent", "--config", "/nowhere/agent.yaml"]).unwrap();
    said(&output, BAD_INPUT, &["/nowhere/agent.yaml"]);
    let output = lab::output(["--socket", "/nowhere/agent.sock", "status"]).unwrap();
    said(&output, NOT_REACHABLE, &["/nowhere/agent.sock", "start"]);
    let output = lab::output(["policy", "check", "/nowhere/policy.yaml"]).unwrap();
    said(&output, BAD_INPUT, &["/nowhere/policy.yaml"]);

    let binary = place.directory.path().join("cirri");
    fs::copy(lab::binary().unwrap(), &binary).unwrap();
    fs::set_permissions(place.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for command in [&["agent"][..], &["lab", "up", "--name", "nobodys"]] {
        let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
        let output = Command::new("setpriv").args(nobody).arg(&binary).args(command).output().unwrap();
        said(&output, FAILED, &["root"]);
    }

    // Without a BPF file system nothing could be kept over a restart.
    let pins = format!("bpf: {{pinRoot: {}}}\n", place.directory.path().join("pins").display());
    said(&place.run(&pins), FAILED, &["BPF file system", "mount -t bpf"]);
    said(&place.run("node: {ipv4: 203.0.113.77}\n"), BAD_INPUT, &["203.0.113.77", "node.ipv4"]);
}

/// The command ended with this code, and one message with all of these words.
fn said(output: &Output, code: i32, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}{}", String::from_utf8_lossy(&output.stdout));
    let messages = stderr.lines().filter(|line| line.starts_with("cirri: ")).count();
    assert!(messages == 1, "{messages} messages: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "`{word}` is not in: {stderr}");
    }
    assert!(!stderr.contains("panicked") && !stderr.contains("RUST_BACKTRACE"), "{stderr}");
}

fn policies(lab: &Lab) -> Vec<Value> {
    lab.ask("node1", &["policy", "get"]).unwrap()
}

fn assert_denied(lab: &Lab, when: &str) {
    assert_verdict(lab, "denied", when);
}

fn assert_allowed(lab: &Lab, when: &str) {
    assert_verdict(lab, "allowed", when);
}

fn assert_verdict(lab: &Lab, verdict: &str, when: &str) {
    let verdicts = lab.verdicts_wanted(verdict, "shop/client", "shop/web", 80).unwrap();
    assert!(verdicts.len() == 2 && verdicts.values().all(|it| it == verdict), "{when}: {verdicts:?}, not {verdict}");
}

/// 4,000 prefixes times 59 ports.
fn too_large() -> String {
    let mut policy =
        DENY.replace("policyTypes: [Ingress]}", "policyTypes: [Ingress], ingress: [{ports: [{port: 9}]}, {");
    let prefixes = (0..4000).map(|n| format!("{{ipBlock: {{cidr: 198.{}.{}.0/24}}}}", n / 20, n % 20));
    policy += &format!("from: [{}],", prefixes.collect::<Vec<_>>().join(","));
    let ports = (1..60).map(|n| format!("{{port: {}}}", 2 * n));
    policy + &format!(" ports: [{}]}}]}}\n", ports.collect::<Vec<_>>().join(","))
}

/// The etcd of a lab, to be killed and started again as it was.
struct Etcd {
    pid: i32,
    argv: Vec<String>,
    net: cirri_loader::net::Namespace,
}

impl Etcd {
    fn of(lab: &Lab) -> Etcd {
        let listed = lab.list().unwrap();
        let pid: i32 = fs::read_to_string(listed.directory.join("etcd.pid")).unwrap().trim().parse().unwrap();
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        let argv = command.split_terminator('\0').map(str::to_string).collect();
        Etcd { pid, argv, net: cirri_loader::net::Namespace::open(listed.net).unwrap() }
    }

    fn kill(&self) {
        lab::kill(self.pid).unwrap();
    }

    fn start(&self) -> Process {
        let mut command = Command::new(&self.argv[0]);
        command.args(&self.argv[1..]).stdout(Stdio::null()).stderr(Stdio::null());
        Process(self.net.run(|| command.spawn()).unwrap().unwrap())
    }
}

/// A process that ends with its guard.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already, perhaps.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A node without a lab: a namespace with one device, and a small disk for the agent's state.
struct Place {
    directory: TempDir,
    namespace: TestNamespace,
    workload: TestNamespace,
}

impl Place {
    fn new() -> Place {
        let place = Place {
            directory: TempDir::new().unwrap(),
            namespace: TestNamespace::new(),
            workload: TestNamespace::new(),
        };
        for command in [
            "ip link set lo up",
            "ip link add eth0 type veth peer name eth1",
            "ip addr add 192.0.2.1/24 dev eth0",
            "ip link set eth0 up",
            "ip link set eth1 up",
        ] {
            printed(&place.namespace.namespace, &command.split(' ').collect::<Vec<_>>());
        }
        fs::create_dir(place.state()).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "none"]).arg(place.state()).status();
        assert!(mounted.unwrap().success());
        place
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    fn socket(&self) -> PathBuf {
        self.state().join("agent.sock")
    }

    fn instance(&self) -> String {
        self.namespace.name().to_string()
    }

    fn configuration(&self, more: &str) -> PathBuf {
        let file = self.directory.path().join("agent.yaml");
        let mut text = format!("stateDir: {}\n{more}", self.state().display());
        for (key, value) in [
            ("node", "{name: alone, ipv4: 192.0.2.1}"),
            ("store", &format!("{{folder: {}}}", self.directory.path().display())),
            ("bpf", &format!("{{instance: {}}}", self.instance())),
        ] {
            if !more.starts_with(&format!("{key}:")) {
                text += &format!("{key}: {value}\n");
            }
        }
        fs::write(&file, text).unwrap();
        file
    }

    fn command(&self, more: &str) -> Command {
        let mut command = Command::new(lab::binary().unwrap());
        command.args(["agent", "--config"]).arg(self.configuration(more));
        command
    }

    /// Runs an agent that must end by itself.
    fn run(&self, more: &str) -> Output {
        let mut command = self.command(more);
        self.namespace.namespace.run(|| command.output()).unwrap().unwrap()
    }

    /// Starts an agent and waits until it answers.
    fn start(&self, more: &str) -> Process {
        let log = fs::File::create(self.directory.path().join("agent.log")).unwrap();
        let mut command = self.command(more);
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let agent = Process(self.namespace.namespace.run(|| command.spawn()).unwrap().unwrap());
        eventually("the agent answers", 4 * PATIENCE, || self.cirri(&["status"]).status.success());
        agent
    }

    fn cirri(&self, arguments: &[&str]) -> Output {
        let socket = self.socket();
        lab::output(["--socket", socket.to_str().unwrap()].iter().chain(arguments)).unwrap()
    }

    fn ask(&self, arguments: &[&str]) -> Vec<Value> {
        let output = self.cirri(&[arguments, &["-o", "json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    fn attach(&self) -> Output {
        self.attach_to(&self.workload, "first")
    }

    fn attach_to(&self, workload: &TestNamespace, id: &str) -> Output {
        let configuration = format!(
            r#"{{"cniVersion": "1.1.0", "name": "cirri", "type": "cirri-cni", "socket": "{}"}}"#,
            self.socket().display()
        );
        let mut child = Command::new(lab::binary().unwrap())
            .arg("cni")
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", id)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", workload.namespace.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), configuration.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(self.state()).status();
        let purged = cirri_loader::Datapath::purge(Path::new("/sys/fs/bpf/cirri"), &self.instance());
        if !std::thread::panicking() {
            assert!(unmounted.unwrap().success());
            purged.unwrap();
        }
    }
}
