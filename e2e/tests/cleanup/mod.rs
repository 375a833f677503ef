//! A machine of its own, and all that the kernel and the file system say of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use cirri_e2e::kernel::TestNamespace;
use cirri_e2e::lab::{binary, eventually, printed};
use serde_json::{Value, json};

/// How long anything is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A machine with one device, in a network namespace of its own.
pub struct Machine {
    pub net: TestNamespace,
    /// Namespace of a pod.
    pub pod: TestNamespace,
    pub directory: tempfile::TempDir,
    pub name: String,
}

/// A process that is stopped with its guard.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Asks it to stop, and waits.
    pub fn stop(mut self) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.0.wait().unwrap();
    }
}

impl Machine {
    pub fn new(name: &str) -> Machine {
        let machine = Machine {
            net: TestNamespace::new(),
            pod: TestNamespace::new(),
            directory: tempfile::tempdir().unwrap(),
            name: format!("{name}-{}", std::process::id()),
        };
        for line in [
            "link set lo up",
            "link add eth0 type veth peer name wire",
            "link add eth1 type veth peer name wire1",
            "addr add 192.0.2.1/24 dev eth0",
            "addr add 2001:db8:2::1/64 dev eth0 nodad",
            "link set eth0 up",
            "link set wire up",
            "link set eth1 up",
            "link set wire1 up",
            "route add default via 192.0.2.254",
        ] {
            machine.ip(line);
        }
        // What an administrator has set: none of it may be lost.
        machine.set("ipv4/ip_local_reserved_ports", "8472,32768-32800");
        machine.set("ipv4/conf/all/rp_filter", "2");
        machine.set("ipv4/conf/eth0/rp_filter", "1");
        machine.set("ipv4/ip_forward", "0");
        machine.set("ipv4/conf/eth1/forwarding", "1");
        machine.set("ipv4/conf/all/accept_redirects", "0");
        fs::create_dir_all(machine.path("manifests")).unwrap();
        machine
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn ip(&self, arguments: &str) -> String {
        let mut argv = vec!["ip"];
        argv.extend(arguments.split_whitespace());
        printed(&self.net.namespace, &argv)
    }

    pub fn set(&self, name: &str, value: &str) {
        printed(&self.net.namespace, &["sh", "-c", &format!("printf '{value}\n' > /proc/sys/net/{name}")]);
    }

    pub fn get(&self, name: &str) -> String {
        printed(&self.net.namespace, &["cat", &format!("/proc/sys/net/{name}")]).trim().to_owned()
    }

    pub fn agent_file(&self, instance: &str, more: &str) -> String {
        let file = self.path(&format!("{instance}.yaml"));
        let text = format!(
            "node: {{name: n, devices: [eth0]}}\nstore: {{kind: folder, folder: {}}}\nstateDir: {}\n\
             bpf: {{instance: {instance}, pinRoot: /sys/fs/bpf/{}/pins, maps: {{flows: 16384, pending: 16384}}}}\n\
             services: {{socket: {{mode: off}}}}\n{more}",
            self.path("manifests").display(),
            self.path(&format!("var/cirri/state-{instance}")).display(),
            self.name,
        );
        fs::write(&file, text).unwrap();
        file.display().to_string()
    }

    /// The same instance, with another state directory.
    pub fn stolen_file(&self, instance: &str) -> String {
        let stolen = fs::read_to_string(self.agent_file(instance, "")).unwrap();
        let file = self.path("stolen.yaml");
        fs::write(&file, stolen.replace(&format!("state-{instance}"), "state-stolen")).unwrap();
        file.display().to_string()
    }

    pub fn agent(&self, instance: &str) -> Running {
        let file = self.agent_file(instance, "");
        let running = self.spawn(&["agent", "--config", &file], instance);
        let socket = self.path(&format!("var/cirri/state-{instance}/agent.sock"));
        eventually("the agent is ready", PATIENCE, || socket.exists());
        running
    }

    pub fn spawn(&self, arguments: &[&str], log: &str) -> Running {
        let log = fs::File::options().create(true).append(true).open(self.path(&format!("{log}.log"))).unwrap();
        let mut command = Command::new(binary().unwrap());
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        Running(self.net.namespace.run(|| command.spawn()).unwrap().unwrap())
    }

    pub fn cirri(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(binary().unwrap());
        command.args(arguments);
        self.net.namespace.run(|| command.output()).unwrap().unwrap()
    }

    pub fn well(&self, arguments: &[&str]) {
        let output = self.cirri(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A file of a load balancer.
    pub fn lb_file(&self, name: &str, more: &str) -> String {
        let file = self.path(&format!("{name}.yaml"));
        let text = format!(
            "devices: [eth0]\nacceleration: off\nstateDir: {}\nbpf: {{instance: {instance}-{name}, pinRoot: /sys/fs/bpf/{instance}/lb, maps: {{flows: 16384, pending: 16384}}}}\n\
             services: [{{name: web, address: 203.0.113.10, port: 80, backends: [{{address: 192.0.2.7, port: 80}}]}}]\n{more}",
            self.path(&format!("lb/state-{name}")).display(),
            instance = self.name,
        );
        fs::write(&file, text).unwrap();
        file.display().to_string()
    }

    pub fn lb(&self, name: &str, file: &str) -> Running {
        let running = self.spawn(&["lb", "--config", file], name);
        eventually("it runs", PATIENCE, || self.path(&format!("lb/state-{name}/lb.sock")).exists());
        running
    }

    /// Attaches a pod as a runtime does.
    pub fn add_pod(&self, instance: &str) {
        self.add(instance, "eth0");
    }

    /// The same, with this name of the device in it.
    pub fn add(&self, instance: &str, device: &str) -> Value {
        fs::write(
            self.path("manifests/web.yaml"),
            "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: c, image: none}]}\n",
        )
        .unwrap();
        let output = self.cni("ADD", instance, device, &Value::Null);
        assert!(output.status.success(), "ADD: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Calls the plugin as a runtime does.
    pub fn cni(&self, command: &str, instance: &str, device: &str, before: &Value) -> Output {
        let socket = self.path(&format!("var/cirri/state-{instance}/agent.sock"));
        let mut configuration = json!({"cniVersion": "1.1.0", "name": "cirri", "type": "cirri-cni", "socket": socket.display().to_string()});
        if !before.is_null() {
            configuration["prevResult"] = before.clone();
        }
        let mut plugin = Command::new(binary().unwrap());
        plugin
            .arg("cni")
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", "c1")
            .env("CNI_NETNS", format!("/run/netns/{}", self.pod.name()))
            .env("CNI_IFNAME", device)
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = self.net.namespace.run(|| plugin.spawn()).unwrap().unwrap();
        child.stdin.take().unwrap().write_all(configuration.to_string().as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    /// Whether the kernel has done what it does by itself and in its own time, which must not look like a difference:
    /// every device that has come up has an address of its own, and nobody objected to it.
    pub fn is_settled(&self) -> bool {
        let devices: Vec<Value> = serde_json::from_str(&self.ip("-j addr")).unwrap();
        let has = |list: &Value, it: &str| list.as_array().unwrap().contains(&Value::from(it));
        devices.iter().all(|device| {
            let addresses = device["addr_info"].as_array().unwrap();
            // With an MTU below 1280 a device has no IPv6.
            let can_have = device["link_type"] == "ether" && device["mtu"].as_u64().unwrap() >= 1280;
            let gets_one = can_have && ["UP", "LOWER_UP"].iter().all(|it| has(&device["flags"], it));
            let own = |it: &Value| it["family"] == "inet6" && it["scope"] == "link";
            (!gets_one || addresses.iter().any(own)) && addresses.iter().all(|it| it["tentative"].is_null())
        })
    }

    /// Everything that the kernel and the file system say of this machine.
    pub fn state(&self) -> BTreeMap<&'static str, BTreeSet<String>> {
        eventually("the addresses are good", PATIENCE, || self.is_settled());
        let lines = |text: String| text.lines().map(|line| line.trim().to_owned()).collect::<BTreeSet<_>>();
        let shell = |script: &str| lines(printed(&self.net.namespace, &["sh", "-c", script]));
        let found = |path: &Path| {
            let output = Command::new("find").arg(path).output().unwrap();
            lines(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let mine = |all: BTreeSet<String>| -> BTreeSet<String> {
            all.into_iter().filter(|line| line.contains(&self.name)).collect()
        };
        let cookie = self.net.namespace.cookie().unwrap();
        BTreeMap::from([
            ("links", shell("ip -d -o link | sed 's/ promiscuity.*//'")),
            ("qdiscs", shell("tc qdisc show")),
            ("addresses", shell("ip -o addr | sed 's/valid_lft.*//'")),
            ("routes", shell("ip route show table all; ip -6 route show table all | sed 's/ expires [0-9]*sec//'")),
            ("rules", shell("ip rule; ip -6 rule")),
            ("neighbours", shell("ip neigh show nud permanent")),
            (
                "settings",
                shell(
                    "cd /proc/sys/net && grep -r '' ipv4 ipv6 2>/dev/null | grep -v 'stable_secret\\|tcp_mem\\|udp_mem\\|fib_sync_mem\\|/neigh/'",
                ),
            ),
            ("pins", mine(found(Path::new("/sys/fs/bpf")))),
            (
                "mounts",
                lines(fs::read_to_string("/proc/self/mounts").unwrap())
                    .into_iter()
                    .filter(|it| it.contains(" bpf ") || it.contains(" cgroup2 ") || it.contains(&self.name))
                    .collect(),
            ),
            (
                "records",
                found(Path::new("/run/cirri-settings"))
                    .into_iter()
                    .filter(|it| it.ends_with(&format!("/{cookie:x}.json")))
                    .collect(),
            ),
            (
                "files",
                found(self.directory.path())
                    .into_iter()
                    .filter(|it| !it.ends_with(".yaml") && !it.ends_with(".log"))
                    .collect(),
            ),
        ])
    }

    #[track_caller]
    pub fn assert_state(&self, before: &BTreeMap<&'static str, BTreeSet<String>>, what: &str) {
        let now = self.state();
        for (kind, lines) in before {
            let gone: Vec<_> = lines.difference(&now[kind]).collect();
            let left: Vec<_> = now[kind].difference(lines).collect();
            assert!(gone.is_empty() && left.is_empty(), "{what}: {kind}: gone {gone:#?}, left {left:#?}");
        }
    }
}
