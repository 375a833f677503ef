//! The node that drifts, and what is seen of it from outside: by `ip`, `bpftool` and `/proc/sys`, never by the agent.

mod cases;

use std::collections::BTreeSet;
use std::fs;
use std::mem::ManuallyDrop;
use std::path::PathBuf;
use std::process::Command;

use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions};
use cirri_e2e::kernel::TestInstance;
use cirri_e2e::lab::{Lab, output, printed};
use cirri_e2e::pinned::Pinned;
use cirri_loader::net::Namespace;
use serde_json::Value;

pub use cases::{CASES, Case, Comes, DIRECT};

pub const SHOP: &str = r#"
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
metadata: {name: near, namespace: shop, labels: {app: web}}
spec: {nodeName: node1, containers: [{name: c, image: none, ports: [{name: http, containerPort: 80}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: shop, labels: {app: web}}
spec: {nodeName: node2, containers: [{name: c, image: none, ports: [{name: http, containerPort: 80}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: closed, namespace: shop, labels: {app: closed}}
spec: {nodeName: node1, containers: [{name: c, image: none, ports: [{containerPort: 80}]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: shop}
spec: {podSelector: {matchLabels: {app: closed}}, policyTypes: [Ingress]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIPs: [10.96.0.80], selector: {app: web}, ports: [{port: 80, targetPort: http}]}
"#;

/// The node that drifts.
pub struct World {
    pub lab: Lab,
    pub node: Namespace,
    /// Its pins.
    pub pins: Pinned,
    /// The node's side of the device of `near`, its number, and the pod's addresses.
    pub device: String,
    pub ifindex: u32,
    pub v4: String,
    pub v6: String,
    /// Its peer's pod range.
    pub range: String,
    pub range6: String,
    /// A pod of the peer.
    pub far: String,
    /// What the device to the network has beside programs, as `ip` takes it: addresses, and routes by them.
    pub addresses: Vec<String>,
    pub uplink_routes: Vec<String>,
}

impl World {
    pub fn ip(&self, arguments: &str) -> String {
        let mut argv = vec!["ip"];
        argv.extend(arguments.split_whitespace());
        printed(&self.node, &argv)
    }

    /// Runs a shell's commands in the container of `near`.
    pub fn inside_near(&self, script: &str) {
        drop(printed(&self.lab.netns("shop/near").unwrap(), &["sh", "-ec", script]));
    }

    pub fn json(&self, arguments: &str) -> Vec<Value> {
        let text = self.ip(&format!("-j {arguments}"));
        if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text).unwrap() }
    }

    /// Every link has the same numbers of things that do not change by themselves.
    pub fn link(&self, name: &str) -> String {
        let all = self.json("-d link show");
        let link = all.iter().find(|link| link["ifname"] == name).cloned().unwrap_or_default();
        let up = link["flags"].as_array().is_some_and(|flags| flags.contains(&"UP".into()));
        let data = &link["linkinfo"]["info_data"];
        let noarp = link["flags"].as_array().is_some_and(|flags| flags.contains(&"NOARP".into()));
        format!(
            "{name}: up {up}, noarp {noarp}, mtu {}, master {}, alias {}, address {}, port {}, external {}, others {}",
            link["mtu"],
            link["master"],
            link["ifalias"],
            link["address"],
            data["port"],
            data["external"],
            ["vnifilter", "gpe", "gbp"].iter().any(|flag| is_set(data, flag)),
        )
    }

    /// The same for the overlay's, whose address is picked by the kernel.
    pub fn overlay(&self) -> String {
        let text = self.link("cirri_vxlan");
        let (before, after) = text.split_once(", address ").unwrap();
        format!("{before}{}", &after[after.find(", ").unwrap()..])
    }

    /// As an administrator would: the kernel forgot addresses and routes with the device or the address.
    pub fn bring_eth0_back(&self) {
        self.ip("link set eth0 up");
        for address in &self.addresses {
            self.ip(&format!("addr replace {address} dev eth0"));
        }
        for route in &self.uplink_routes {
            self.ip(route);
        }
    }

    pub fn routes(&self) -> String {
        let shown = |family: &str| {
            let routes = self.json(&format!("{family} route show table main proto 193"));
            let one = |route: Value| {
                // The overlay's number may be another; its name is not.
                let Value::Object(route) = route else { return String::new() };
                ["type", "dst", "gateway", "dev", "prefsrc", "metrics"]
                    .map(|it| route.get(it).unwrap_or(&Value::Null).to_string())
                    .join(" ")
            };
            routes.into_iter().map(one).collect::<BTreeSet<_>>()
        };
        format!("{:#?}", (shown("-4"), shown("-6")))
    }

    pub fn neighbours(&self) -> String {
        let all = self.json("neigh show nud permanent");
        let shown = all.iter().map(|it| format!("{} {} {}", it["dst"], it["dev"], it["lladdr"]));
        format!("{:#?}", shown.collect::<BTreeSet<_>>())
    }

    pub fn sysctl(&self, name: &str) -> String {
        printed(&self.node, &["cat", &format!("/proc/sys/net/{name}")])
    }

    pub fn write_sysctl(&self, name: &str, value: &str) {
        printed(&self.node, &["sh", "-c", &format!("printf '{value}\n' > /proc/sys/net/{name}")]);
    }

    /// The programs on the node's devices and where their links are, by what `bpftool` says.
    pub fn programs(&self) -> String {
        let net = printed(&self.node, &["bpftool", "-j", "net", "show"]);
        let net: Value = serde_json::from_str(&net).unwrap();
        let all = net[0]["tc"].as_array().cloned().unwrap_or_default();
        let shown = all.iter().map(|it| format!("{} {} {}", it["devname"], it["kind"], it["name"]));
        format!("{:#?}", shown.collect::<BTreeSet<_>>())
    }

    /// Does what would take so long that the agent might see half of it.
    pub fn while_stopped(&self, work: impl FnOnce()) {
        let pid = self.lab.node("node1").unwrap().pid.unwrap().to_string();
        let signal = |name: &str| assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
        signal("-STOP");
        work();
        signal("-CONT");
    }

    /// Makes the overlay's device otherwise.
    pub fn remake_overlay(&self, how: &str) {
        self.while_stopped(|| {
            self.ip("link del cirri_vxlan");
            self.ip(&format!("link add cirri_vxlan type vxlan {how}"));
        });
    }

    /// The route to the workload, as `ip` takes it.
    pub fn route_to_near(&self) -> String {
        self.ip(&format!("route show {}", self.v4)).trim().to_owned()
    }

    /// Takes the other end of the node's wire down, or up.
    pub fn set_wire(&self, state: &str) {
        let last = self.addresses[0].split(['.', '/']).nth(3).unwrap();
        let router = Namespace::open(self.lab.list().unwrap().net).unwrap();
        printed(&router, &["ip", "link", "set", &format!("port{last}"), state]);
    }

    /// Of the agent's state directory.
    pub fn state(&self, name: &str) -> PathBuf {
        PathBuf::from(self.lab.socket("node1")).with_file_name(name)
    }

    /// The names in a directory of it.
    pub fn names_in(&self, name: &str) -> String {
        let names = fs::read_dir(self.state(name)).into_iter().flatten().flatten().map(|it| it.file_name());
        format!("{:?}", names.collect::<BTreeSet<_>>())
    }

    /// Where the settings that were changed are recorded.
    pub fn record(&self) -> PathBuf {
        PathBuf::from(format!("/run/cirri-settings/{:x}.json", self.node.cookie().unwrap()))
    }

    /// Puts a program of somebody else before all others on what comes in by a device, for as long as this runs.
    pub fn stand_before(&self, device: &str) {
        let instance = TestInstance::new();
        let attached = self.node.run(|| {
            let mut stranger = instance.load();
            let floor = stranger.program_mut("floor").unwrap();
            let first = TcAttachOptions::TcxOrder(LinkOrder::first());
            let link = floor.attach_with_options(device, TcAttachType::Ingress, first).unwrap();
            let _kept = ManuallyDrop::new(floor.take_link(link).unwrap());
        });
        attached.unwrap();
    }

    /// The program that runs first on what comes in by a device.
    pub fn first_program(&self, device: &str) -> String {
        let query = || SchedClassifier::query_tcx(device, TcAttachType::Ingress).unwrap().1;
        let first = self.node.run(|| query().first().and_then(|it| it.name_as_str().map(str::to_owned)));
        first.unwrap().unwrap_or_default()
    }

    pub fn status(&self) -> Value {
        self.lab.ask("node1", &["status"]).unwrap()
    }

    pub fn names(&self, what: &str, object: &str) -> bool {
        let status = self.status();
        let problems = status["problems"].as_array().cloned().unwrap_or_default();
        let named = |it: &Value| it["what"] == what && it["object"].as_str().is_some_and(|it| it.contains(object));
        problems.iter().any(named)
    }

    /// How many the agent has made: what looks right may not have been damaged yet.
    pub fn repairs(&self) -> u64 {
        self.status()["repaired"].as_object().unwrap().values().filter_map(Value::as_u64).sum()
    }

    pub fn is_well(&self) -> bool {
        output(["--socket", &self.lab.socket("node1"), "status", "--check"]).unwrap().status.success()
    }

    pub fn assert_traffic(&self, what: &str) {
        for (to, verdict) in [("shop/near", "allowed"), ("shop/far", "allowed"), ("shop/closed", "denied")] {
            let verdicts = self.lab.verdicts_wanted(verdict, "shop/client", to, 80).unwrap();
            assert!(verdicts.values().all(|it| it == verdict), "{what}: {to} {verdicts:?}");
        }
        let service = self.lab.verdicts_wanted("allowed", "shop/client", "svc:shop/web", 80).unwrap();
        assert!(service.values().all(|it| it == "allowed"), "{what}: the service {service:?}");
    }
}

/// Whether `ip` shows a flag, which is there or not.
fn is_set(data: &Value, flag: &str) -> bool {
    data.get(flag).is_some_and(|value| *value != Value::Bool(false))
}

/// A lab of two nodes with a client, servers and a service.
pub fn world(name: &str) -> World {
    let world = world_with(name, &[]);
    world.assert_traffic("before");
    world
}

/// The same, with more arguments.
pub fn world_with(name: &str, more: &[&str]) -> World {
    let lab = Lab::up(name, 2, more).unwrap();
    lab.apply(SHOP).unwrap();
    let endpoints: Vec<Value> = lab.ask("node1", &["endpoint", "list"]).unwrap();
    let near = endpoints.iter().find(|endpoint| endpoint["pod"] == "near").unwrap();
    let status: Value = lab.ask("node2", &["status"]).unwrap();
    let address = |at: usize| near["addresses"][at].as_str().unwrap().to_owned();
    let node = lab.netns("node:node1").unwrap();
    let lines = |arguments: &[&str]| -> Vec<String> { printed(&node, arguments).lines().map(str::to_owned).collect() };
    let global = lines(&["ip", "-o", "addr", "show", "dev", "eth0", "scope", "global"]);
    let addresses = global.iter().map(|line| {
        let nodad = if line.contains("inet6") { " nodad" } else { "" };
        format!("{}{nodad}", line.split_whitespace().nth(3).unwrap())
    });
    let mut uplink_routes = Vec::new();
    for family in ["-4", "-6"] {
        let routes = lines(&["ip", family, "route", "show", "default"]);
        uplink_routes.extend(routes.iter().map(|route| format!("{family} route replace {}", route.trim())));
    }
    World {
        addresses: addresses.collect(),
        uplink_routes,
        node: lab.netns("node:node1").unwrap(),
        pins: Pinned(PathBuf::from(format!("/sys/fs/bpf/cirri/lab-{}-node1", lab.name()))),
        device: near["host_ifname"].as_str().unwrap().to_owned(),
        ifindex: near["ifindex"].as_u64().unwrap().try_into().unwrap(),
        v4: address(0),
        v6: address(1),
        range: status["pod_cidrs"][0].as_str().unwrap().to_owned(),
        range6: status["pod_cidrs"][1].as_str().unwrap().to_owned(),
        far: lab.addresses().unwrap()["shop/far"][0].to_string(),
        lab,
    }
}
