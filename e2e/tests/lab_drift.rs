//! A node that drifts: what the agent made in the kernel is taken away, altered or got in the way of, by hand, as
//! network managers and people do. Each is made right or named within seconds, and then all is well again.
//!
//! What is there is read from the kernel (`ip`, `bpftool`, `/proc/sys`), never from the agent.

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use cirri_e2e::lab::{Lab, eventually, output, printed};
use cirri_loader::net::Namespace;
use serde_json::Value;

/// For what takes some seconds, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(40);

const SHOP: &str = r#"
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
struct World {
    lab: Lab,
    node: Namespace,
    /// Its pins: links, and the maps under the hash of the ABI.
    pins: PathBuf,
    /// The node's side of the device of `near`, its number, and the pod's addresses.
    device: String,
    ifindex: u32,
    v4: String,
    v6: String,
    /// Its peer's pod range.
    range: String,
    /// What the device to the network has beside programs, as `ip` takes it: addresses, and routes by them.
    addresses: Vec<String>,
    uplink_routes: Vec<String>,
}

/// What is done by hand, and what comes of it.
struct Case {
    name: &'static str,
    damage: fn(&World),
    comes: Comes,
}

enum Comes {
    /// It is made right: the kernel is again as this finds it.
    Repaired(fn(&World) -> String),
    /// It is named by kind and object, until somebody does this.
    Named(&'static str, fn(&World) -> String, fn(&World)),
}
use Comes::{Named, Repaired};

impl World {
    fn ip(&self, arguments: &str) -> String {
        let mut argv = vec!["ip"];
        argv.extend(arguments.split_whitespace());
        printed(&self.node, &argv)
    }

    fn json(&self, arguments: &str) -> Vec<Value> {
        let text = self.ip(&format!("-j {arguments}"));
        if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text).unwrap() }
    }

    /// Every link has the same numbers of things that do not change by themselves.
    fn link(&self, name: &str) -> String {
        let all = self.json("-d link show");
        let link = all.iter().find(|link| link["ifname"] == name).cloned().unwrap_or_default();
        let up = link["flags"].as_array().is_some_and(|flags| flags.contains(&"UP".into()));
        let data = &link["linkinfo"]["info_data"];
        format!(
            "{name}: up {up}, mtu {}, master {}, address {}, port {}, external {}",
            link["mtu"], link["master"], link["address"], data["port"], data["external"]
        )
    }

    /// The same for the overlay's, whose address is picked by the kernel.
    fn overlay(&self) -> String {
        let text = self.link("cirri_vxlan");
        let (before, after) = text.split_once(", address ").unwrap();
        format!("{before}{}", &after[after.find(", ").unwrap()..])
    }

    /// As an administrator would: the kernel forgot addresses and routes with the device or the address.
    fn bring_eth0_back(&self) {
        self.ip("link set eth0 up");
        for address in &self.addresses {
            self.ip(&format!("addr replace {address} dev eth0"));
        }
        for route in &self.uplink_routes {
            self.ip(route);
        }
    }

    fn routes(&self) -> String {
        let shown = |family: &str| {
            let routes = self.json(&format!("{family} route show table main proto 193"));
            let one = |route: Value| {
                // The overlay's number may be another; its name is not.
                format!("{} {} {} {} {}", route["type"], route["dst"], route["gateway"], route["dev"], route["prefsrc"])
            };
            routes.into_iter().map(one).collect::<BTreeSet<_>>()
        };
        format!("{:#?}", (shown("-4"), shown("-6")))
    }

    fn neighbours(&self) -> String {
        let all = self.json("neigh show nud permanent");
        let shown = all.iter().map(|it| format!("{} {} {}", it["dst"], it["dev"], it["lladdr"]));
        format!("{:#?}", shown.collect::<BTreeSet<_>>())
    }

    fn sysctl(&self, name: &str) -> String {
        printed(&self.node, &["cat", &format!("/proc/sys/net/{name}")])
    }

    fn write_sysctl(&self, name: &str, value: &str) {
        printed(&self.node, &["sh", "-c", &format!("printf '{value}\n' > /proc/sys/net/{name}")]);
    }

    /// The programs on the node's devices and where their links are, by what `bpftool` says.
    fn programs(&self) -> String {
        let net = printed(&self.node, &["bpftool", "-j", "net", "show"]);
        let net: Value = serde_json::from_str(&net).unwrap();
        let all = net[0]["tc"].as_array().cloned().unwrap_or_default();
        let shown = all.iter().map(|it| format!("{} {} {}", it["devname"], it["kind"], it["name"]));
        format!("{:#?}", shown.collect::<BTreeSet<_>>())
    }

    fn pinned(&self) -> String {
        let mut all = BTreeSet::new();
        for directory in fs::read_dir(&self.pins).into_iter().flatten().flatten() {
            for file in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
                all.insert(file.path().strip_prefix(&self.pins).unwrap().display().to_string());
            }
        }
        // Of the overlay's device the number may be another.
        format!("{:#?}", all)
    }

    fn maps(&self) -> PathBuf {
        let entries = fs::read_dir(&self.pins).unwrap().map(|entry| entry.unwrap().path());
        entries.into_iter().find(|path| !path.ends_with("links")).expect("a set of maps")
    }

    fn bpftool(&self, arguments: &[&str]) -> String {
        let run = Command::new("bpftool").args(arguments).output().unwrap();
        assert!(run.status.success(), "bpftool {arguments:?}: {run:?}");
        String::from_utf8_lossy(&run.stdout).into_owned()
    }

    /// The entries of a map, as words of hexadecimal bytes.
    fn entries(&self, map: &str) -> Vec<(Vec<String>, Vec<String>)> {
        let path = self.maps().join(map).display().to_string();
        let text = self.bpftool(&["-j", "map", "dump", "pinned", &path]);
        let words = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().map(|word| word.as_str().unwrap().to_owned()).collect()
        };
        let all: Vec<Value> = serde_json::from_str(&text).unwrap();
        all.iter().map(|entry| (words(&entry["key"]), words(&entry["value"]))).collect()
    }

    fn shown(&self, map: &str) -> String {
        let all = self.entries(map).into_iter().map(|(key, value)| format!("{} = {}", key.join(" "), value.join(" ")));
        format!("{map} {:#?}", all.collect::<BTreeSet<_>>())
    }

    /// Of a map of maps: which slots have one.
    fn slots(&self, map: &str) -> String {
        format!("{:?}", self.entries(map).into_iter().map(|(key, _)| key.join(" ")).collect::<BTreeSet<_>>())
    }

    fn delete_entries(&self, map: &str) {
        let path = self.maps().join(map).display().to_string();
        for (key, _) in self.entries(map) {
            let mut arguments = vec!["map", "delete", "pinned", &path, "key"];
            arguments.extend(key.iter().map(String::as_str));
            self.bpftool(&arguments);
        }
    }

    /// Writes zeros into the first entries that have something.
    fn clear_entries(&self, map: &str) {
        let path = self.maps().join(map).display().to_string();
        let some = |(_, value): &(Vec<String>, Vec<String>)| value.iter().any(|word| word != "0x00");
        for (key, value) in self.entries(map).into_iter().filter(some).take(3) {
            let zeros = vec!["0x00"; value.len()];
            let mut arguments = vec!["map", "update", "pinned", &path, "key"];
            arguments.extend(key.iter().map(String::as_str));
            arguments.push("value");
            arguments.extend(zeros);
            self.bpftool(&arguments);
        }
    }

    fn detach(&self, link: &str) {
        let pin = self.pins.join("links").join(link).display().to_string();
        self.bpftool(&["link", "detach", "pinned", &pin]);
    }

    /// What a link is attached to, as the kernel says.
    fn attached(&self, link: &str) -> String {
        let pin = self.pins.join("links").join(link).display().to_string();
        let run = Command::new("bpftool").args(["-j", "link", "show", "pinned", &pin]).output().unwrap();
        let link: Value = serde_json::from_slice(&run.stdout).unwrap_or_default();
        format!("{} {} {}", link["type"], link["devname"], link["cgroup_id"])
    }

    fn status(&self) -> Value {
        self.lab.ask("node1", &["status"]).unwrap()
    }

    fn names(&self, what: &str, object: &str) -> bool {
        let status = self.status();
        let problems = status["problems"].as_array().cloned().unwrap_or_default();
        let named = |it: &Value| it["what"] == what && it["object"].as_str().is_some_and(|it| it.contains(object));
        problems.iter().any(named)
    }

    fn is_well(&self) -> bool {
        output(["--socket", &self.lab.socket("node1"), "status", "--check"]).unwrap().status.success()
    }

    fn assert_traffic(&self, what: &str) {
        for (to, verdict) in [("shop/near", "allowed"), ("shop/far", "allowed"), ("shop/closed", "denied")] {
            let verdicts = self.lab.verdicts("shop/client", to, 80).unwrap();
            assert!(verdicts.values().all(|it| it == verdict), "{what}: {to} {verdicts:?}");
        }
        let service = self.lab.verdicts("shop/client", "svc:shop/web", 80).unwrap();
        assert!(service.values().all(|it| it == "allowed"), "{what}: the service {service:?}");
    }
}

const CASES: &[Case] = &[
    Case {
        name: "routes flushed (IPv4)",
        damage: |w| drop(w.ip("route flush table main proto 193")),
        comes: Repaired(World::routes),
    },
    Case {
        name: "routes flushed (IPv6)",
        damage: |w| drop(w.ip("-6 route flush table main proto 193")),
        comes: Repaired(World::routes),
    },
    Case {
        name: "a route deleted",
        damage: |w| drop(w.ip(&format!("route del {}", w.v4))),
        comes: Repaired(World::routes),
    },
    Case {
        name: "a route replaced by another's",
        damage: |w| drop(w.ip(&format!("route replace blackhole {}", w.v4))),
        comes: Repaired(World::routes),
    },
    Case {
        name: "a route stands before ours (IPv6, smaller metric)",
        damage: |w| drop(w.ip(&format!("-6 route add {}/128 dev eth0 metric 1", w.v6))),
        comes: Named(
            "route",
            |w| w.v6.clone(),
            |w| drop(w.ip(&format!("-6 route del {}/128 dev eth0 metric 1", w.v6))),
        ),
    },
    Case {
        name: "permanent neighbours flushed",
        damage: |w| drop(w.ip("neigh flush nud permanent")),
        comes: Repaired(World::neighbours),
    },
    Case {
        name: "a neighbour with another Ethernet address",
        damage: |w| {
            drop(w.ip(&format!("neigh replace {} dev {} lladdr 02:00:00:00:00:99 nud permanent", w.v4, w.device)))
        },
        comes: Repaired(World::neighbours),
    },
    Case {
        name: "a policy rule stands before the main table",
        damage: |w| drop(w.ip(&format!("rule add pref 10 to {} blackhole", w.range))),
        comes: Named("route", |w| w.range.clone(), |w| drop(w.ip("rule del pref 10"))),
    },
    Case {
        name: "the rule of the main table is gone",
        damage: |w| drop(w.ip("rule del pref 32766")),
        comes: Named("route", |_| "policy rules of IPv4".to_owned(), |w| drop(w.ip("rule add pref 32766 table main"))),
    },
    Case {
        name: "the overlay device deleted",
        damage: |w| drop(w.ip("link del cirri_vxlan")),
        comes: Repaired(|w| w.overlay() + &w.routes()),
    },
    Case {
        name: "the overlay device down",
        damage: |w| drop(w.ip("link set cirri_vxlan down")),
        comes: Repaired(|w| w.overlay() + &w.routes()),
    },
    Case {
        name: "the overlay device with another MTU",
        damage: |w| drop(w.ip("link set cirri_vxlan mtu 1200")),
        comes: Repaired(World::overlay),
    },
    Case {
        name: "the overlay device made otherwise",
        damage: |w| {
            w.ip("link del cirri_vxlan");
            // The agent may be faster: then there is one of the name.
            let add = ["ip", "link", "add", "cirri_vxlan", "type", "vxlan", "id", "7", "dstport", "4790"];
            drop(w.node.run(|| Command::new(add[0]).args(&add[1..]).output()).unwrap());
        },
        comes: Repaired(|w| w.overlay() + &w.routes()),
    },
    Case {
        name: "the overlay device renamed",
        damage: |w| {
            w.ip("link set cirri_vxlan down");
            drop(
                w.node
                    .run(|| Command::new("ip").args("link set cirri_vxlan name other0 up".split(' ')).output())
                    .unwrap(),
            );
        },
        comes: Repaired(|w| w.overlay() + &w.routes()),
    },
    Case {
        name: "a workload's device down",
        damage: |w| drop(w.ip(&format!("link set {} down", w.device))),
        comes: Repaired(|w| w.link(&w.device) + &w.routes() + &w.neighbours()),
    },
    Case {
        name: "a workload's device with another MTU",
        damage: |w| drop(w.ip(&format!("link set {} mtu 900", w.device))),
        comes: Repaired(|w| w.link(&w.device)),
    },
    Case {
        name: "a workload's device with another Ethernet address",
        damage: |w| drop(w.ip(&format!("link set {} address 02:00:00:00:00:77", w.device))),
        comes: Repaired(|w| w.link(&w.device)),
    },
    Case {
        name: "a workload's device in a bridge",
        damage: |w| {
            w.ip("link add br-other type bridge");
            w.ip(&format!("link set {} master br-other", w.device));
        },
        comes: Repaired(|w| w.link(&w.device)),
    },
    Case {
        name: "a workload's device renamed",
        damage: |w| {
            w.ip(&format!("link set {} down", w.device));
            let rename = format!("link set {} name other1 up", w.device);
            drop(w.node.run(|| Command::new("ip").args(rename.split(' ')).output()).unwrap());
        },
        comes: Repaired(|w| w.link(&w.device) + &w.routes()),
    },
    Case {
        name: "the device to the network down",
        damage: |w| drop(w.ip("link set eth0 down")),
        comes: Named("device", |_| "eth0".to_owned(), World::bring_eth0_back),
    },
    Case {
        name: "the node's address removed",
        damage: |w| drop(w.ip(&format!("addr del {} dev eth0", w.addresses[0]))),
        comes: Named("address", |w| w.addresses[0].split('/').next().unwrap().to_owned(), World::bring_eth0_back),
    },
    Case {
        name: "programs detached from a workload's device",
        damage: |w| w.detach(&format!("from_workload-{}", w.ifindex)),
        comes: Repaired(World::programs),
    },
    Case {
        name: "programs detached from the device to the network",
        damage: |w| {
            let eth0 = w.json("link show eth0")[0]["ifindex"].clone();
            w.detach(&format!("from_network-{eth0}"));
        },
        comes: Repaired(World::programs),
    },
    Case {
        name: "a program detached from the sockets",
        damage: |w| w.detach("connect4-0"),
        comes: Repaired(|w| w.attached("connect4-0")),
    },
    Case {
        name: "a pin of a link removed",
        damage: |w| fs::remove_file(w.pins.join(format!("links/to_workload-{}", w.ifindex))).unwrap(),
        comes: Repaired(|w| w.pinned() + &w.programs()),
    },
    Case {
        name: "the pin of a map removed",
        damage: |w| fs::remove_file(w.maps().join("IPCACHE")).unwrap(),
        comes: Repaired(World::pinned),
    },
    Case {
        name: "all pins removed",
        damage: |w| fs::remove_dir_all(&w.pins).unwrap(),
        comes: Repaired(|w| w.pinned() + &w.programs()),
    },
    Case {
        name: "the address cache emptied",
        damage: |w| w.delete_entries("IPCACHE"),
        comes: Repaired(|w| w.shown("IPCACHE")),
    },
    Case {
        name: "endpoints removed",
        damage: |w| w.delete_entries("ENDPOINTS"),
        comes: Repaired(|w| w.shown("ENDPOINTS")),
    },
    Case {
        name: "devices altered",
        damage: |w| w.clear_entries("DEVICES"),
        comes: Repaired(|w| w.shown("DEVICES") + &w.shown("ENDPOINTS")),
    },
    Case {
        name: "rule sets removed",
        damage: |w| w.delete_entries("RULESETS"),
        comes: Repaired(|w| w.slots("RULESETS")),
    },
    Case { name: "the node's row cleared", damage: |w| w.clear_entries("NODE"), comes: Repaired(|w| w.shown("NODE")) },
    Case {
        name: "services removed",
        damage: |w| w.delete_entries("SERVICES"),
        comes: Repaired(|w| w.shown("SERVICES")),
    },
    Case {
        name: "forwarding turned off",
        damage: |w| w.write_sysctl("ipv4/ip_forward", "0"),
        comes: Repaired(|w| w.sysctl("ipv4/ip_forward")),
    },
    Case {
        name: "the reverse-path filter turned on",
        damage: |w| {
            for device in ["all", "eth0", &w.device] {
                w.write_sysctl(&format!("ipv4/conf/{device}/rp_filter"), "1");
            }
        },
        comes: Repaired(|w| {
            ["all", "eth0", &w.device].map(|it| w.sysctl(&format!("ipv4/conf/{it}/rp_filter"))).concat()
        }),
    },
    Case {
        name: "the reserved ports given away",
        damage: |w| w.write_sysctl("ipv4/ip_local_reserved_ports", ""),
        comes: Repaired(|w| w.sysctl("ipv4/ip_local_reserved_ports")),
    },
];

#[test]
fn every_kind_of_drift_is_made_right_or_named_and_then_all_is_well() {
    let world = world("drift");
    let mut failed = Vec::new();
    for case in CASES {
        let tried = catch_unwind(AssertUnwindSafe(|| try_case(&world, case)));
        println!("{}: {}", case.name, if tried.is_ok() { "ok" } else { "FAILED" });
        if tried.is_err() {
            failed.push(case.name);
            // The next case must not stand on the ruins of this one.
            let _ = world.lab.restart("node1", &[]);
        }
    }
    assert!(failed.is_empty(), "{} of {} kinds: {failed:#?}", failed.len(), CASES.len());
    world.assert_traffic("after all of it");
    let repaired = world.status()["repaired"].clone();
    for kind in ["device", "route", "program", "pin", "map", "setting"] {
        assert!(repaired[kind].as_u64() > Some(0), "{kind} is not counted: {repaired}");
    }
}

fn try_case(world: &World, case: &Case) {
    eventually("all is well before", PATIENCE, || world.is_well());
    match &case.comes {
        Repaired(state) => {
            let before = state(world);
            (case.damage)(world);
            eventually(case.name, PATIENCE, || state(world) == before);
        }
        Named(what, object, mend) => {
            (case.damage)(world);
            let object = object(world);
            let named = catch_unwind(AssertUnwindSafe(|| {
                eventually(case.name, PATIENCE, || world.names(what, &object));
                assert!(!world.is_well(), "{}: status --check says that all is well", case.name);
            }));
            mend(world);
            named.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    }
    eventually("all is well after it", PATIENCE, || world.is_well());
    world.assert_traffic(case.name);
}

#[test]
fn two_who_manage_one_route_do_not_fight_for_ever_and_status_says_so() {
    let world = world("drift_fight");
    let (node, route) = (world.node.clone(), format!("route del {}", world.v4));
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || {
        let mut deleted = 0;
        while stopped.try_recv().is_err() {
            let done = node.run(|| Command::new("ip").args(route.split(' ')).output()).unwrap().unwrap();
            deleted += u32::from(done.status.success());
            // Awaits nothing: this is what a manager that polls does.
            std::thread::sleep(Duration::from_millis(50));
        }
        deleted
    });
    eventually("the fight is named", PATIENCE, || world.names("route", &world.v4));
    let repaired = |()| world.status()["repaired"]["route"].as_u64().unwrap();
    let before = repaired(());
    let problem = world.status()["problems"][0].clone();
    assert!(problem["remedy"].as_str().unwrap().contains("again and again"), "{problem}");
    // Rationed: over the next seconds hardly any more, although the other goes on.
    std::thread::sleep(Duration::from_secs(5));
    assert!(repaired(()) - before <= 2, "{} repairs in five seconds", repaired(()) - before);
    stop.send(()).unwrap();
    assert!(other.join().unwrap() > 0);
    eventually("the route is back", PATIENCE, || world.routes().contains(&format!("\"{}\"", world.v4)));
}

#[test]
fn a_workload_whose_namespace_goes_without_del_is_named_and_then_its_address_is_free() {
    let lab = Lab::up("drift_gone", 1, &["--set", "node.releaseAfterSeconds=4"]).unwrap();
    lab.apply(&SHOP.replace("nodeName: node2", "nodeName: node1")).unwrap();
    let socket = lab.socket("node1");
    let pod = lab.list().unwrap().pods.into_iter().find(|pod| pod.name == "near").unwrap();
    // One that lost its name only is alive: its processes hold it.
    let name = pod.netns.file_name().unwrap().to_str().unwrap().to_owned();
    let inside = Namespace::open(&pod.netns).unwrap();
    let processes: BTreeSet<i32> = processes_in(&inside);
    assert!(!processes.is_empty());
    assert!(Namespace::delete(&name).unwrap());
    drop(inside);
    let endpoints = |()| -> Vec<Value> { lab.ask("node1", &["endpoint", "list"]).unwrap() };
    let near = |()| endpoints(()).into_iter().find(|it| it["pod"] == "near");
    std::thread::sleep(Duration::from_secs(6));
    assert!(near(()).is_some(), "a namespace that only lost its name was released");
    // Now it is gone for good, and nobody says DEL.
    processes.iter().for_each(|pid| cirri_e2e::lab::kill(*pid).unwrap());
    let problems = |()| lab.ask::<Value>("node1", &["status"]).unwrap()["problems"].to_string();
    eventually("it is named", PATIENCE, || problems(()).contains("shop/near"));
    eventually("it is released", PATIENCE, || near(()).is_none());
    eventually("all is well", PATIENCE, || {
        output(["--socket", &socket, "status", "--check"]).unwrap().status.success()
    });
}

fn processes_in(namespace: &Namespace) -> BTreeSet<i32> {
    use std::os::unix::fs::MetadataExt;
    let wanted = namespace.file().metadata().unwrap().ino();
    let all = fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|it| it.ino() == wanted)).collect()
}

fn world(name: &str) -> World {
    let lab = Lab::up(name, 2, &[]).unwrap();
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
    let world = World {
        addresses: addresses.collect(),
        uplink_routes,
        node: lab.netns("node:node1").unwrap(),
        pins: PathBuf::from(format!("/sys/fs/bpf/cirri/lab-{}-node1", lab.name())),
        device: near["host_ifname"].as_str().unwrap().to_owned(),
        ifindex: near["ifindex"].as_u64().unwrap().try_into().unwrap(),
        v4: address(0),
        v6: address(1),
        range: status["pod_cidrs"][0].as_str().unwrap().to_owned(),
        lab,
    };
    world.assert_traffic("before");
    world
}
