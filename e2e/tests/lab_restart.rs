//! An agent that is killed, restarted or replaced while traffic runs: nothing fails, nothing is forgotten, and the
//! rules hold meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use cirri_e2e::lab::{Conversation, Lab, Load, eventually, printed};

/// Two nodes' worth of pods: `client` may reach `near`, `far` and the world; `closed` takes nobody.
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
spec: {nodeName: node1, containers: [{name: c, image: none, ports: [{containerPort: 80}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: shop, labels: {app: web}}
spec: {nodeName: node2, containers: [{name: c, image: none, ports: [{containerPort: 80}]}]}
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
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: client}}}]
    ports: [{port: 80}]
  - from: [{podSelector: {matchLabels: {app: client}}}]
    ports: [{port: 1024, endPort: 65535}]
"#;
const NODES: [&str; 2] = ["node1", "node2"];
/// New connections a second on each path.
const RATE: u32 = 200;
/// How long the load runs; all that is done meanwhile takes less.
const SECONDS: u64 = 12;
/// How long an agent stays away, in milliseconds.
const AWAY: &str = "1500";

#[test]
fn no_connection_fails_while_agents_are_killed_and_all_is_as_before_with_an_overlay() {
    killed_under_load("kill_over", "overlay");
}

#[test]
fn no_connection_fails_while_agents_are_killed_and_all_is_as_before_with_direct_routing() {
    killed_under_load("kill_dir", "direct");
}

fn killed_under_load(name: &str, routing: &str) {
    let lab = Lab::up(name, 2, &["--routing", routing]).unwrap();
    lab.apply(SHOP).unwrap();
    assert_rules_hold(&lab);
    let mut quiet = quiet_conversations(&lab);
    let before = NODES.map(|node| state(&lab, node));
    let programs = NODES.map(|node| programs(&lab, node));
    let connections: Vec<_> = NODES.into_iter().zip(&quiet).map(|(node, _)| lab.recipes(node).unwrap()).collect();
    let renewed = NODES.map(|node| lab.counter(node, "recipes renewed").unwrap());
    let repeated = repeated_openings(&lab);

    let loads = start_loads(&lab);
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| lab.restart("node1", &["--kill", "--pause", AWAY]).unwrap());
        let away = until_away(&lab, "node1");
        assert_rules_hold(&lab);
        assert!(away && !killer.is_finished(), "the rules were not tried while the agent was away");
        killer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    lab.restart("node2", &["--kill", "--pause", AWAY]).unwrap();
    upgrade(&lab, "node1");
    finish(loads);

    for (index, node) in NODES.into_iter().enumerate() {
        assert_eq!(state(&lab, node), before[index], "{node} is not as before");
        let now = self::programs(&lab, node);
        assert_eq!(now.keys().collect::<Vec<_>>(), programs[index].keys().collect::<Vec<_>>());
        for (hook, ids) in &now {
            let same = *ids == programs[index][hook];
            assert_eq!(
                same,
                node == "node2",
                "{node} {hook}: {ids:?}; an upgrade replaces programs, a restart does not"
            );
            assert_eq!(ids.len(), 1, "{node} {hook}: {ids:?}");
        }
        let recipes = lab.recipes(node).unwrap();
        for conversation in &quiet {
            for (from, to) in [(conversation.from, conversation.to), (conversation.to, conversation.from)] {
                let was = connections[index].tcp(from, to);
                assert_eq!(recipes.tcp(from, to), was, "{node}: the recipe of {from} -> {to} changed");
            }
        }
    }
    quiet.iter_mut().for_each(Conversation::exchange);
    // A SYN that finds its connection open already begins it anew. All openers are the client's.
    let repeated = repeated_openings(&lab) - repeated;
    for (index, node) in NODES.into_iter().enumerate() {
        let more = lab.counter(node, "recipes renewed").unwrap() - renewed[index];
        assert!(
            more <= repeated,
            "{node} decided anew {more} times on connections that nothing happened to; {repeated} SYNs were repeated"
        );
    }
    assert_rules_hold(&lab);
}

#[test]
fn tables_of_another_abi_are_left_behind_and_connections_between_pods_go_on() {
    let lab = Lab::up("abi", 2, &[]).unwrap();
    lab.apply(SHOP).unwrap();
    let mut quiet: Vec<_> = quiet_conversations(&lab).into_iter().filter(|it| is_pod(it.to)).collect();
    let pins = pins(&lab, "node1");
    let sets = |()| -> BTreeSet<String> {
        let entries = std::fs::read_dir(&pins).unwrap().map(|entry| entry.unwrap().file_name());
        entries
            .map(|name| name.into_string().unwrap())
            .filter(|name| !["endpoints", "links", "programs"].contains(&name.as_str()))
            .collect()
    };
    let live = sets(()).into_iter().next().unwrap();
    let programs = programs(&lab, "node1");

    let loads = [("shop/near", "shop/client"), ("shop/far", "shop/client")];
    let addresses = lab.addresses().unwrap();
    let loads: Vec<_> = loads
        .iter()
        .map(|(to, from)| Load::start(&lab, from, SocketAddr::new(addresses[*to][0], 80), RATE, 4).unwrap())
        .collect();
    lab.kill_agent("node1").unwrap();
    // What an agent with other tables would have left. One that runs would put its pins back.
    std::fs::rename(pins.join(&live), pins.join("0123456789abcdef")).unwrap();
    lab.restart("node1", &[]).unwrap();
    finish(loads);

    assert_eq!(sets(()), BTreeSet::from([live]), "the old tables are not retired");
    let now = self::programs(&lab, "node1");
    assert!(programs.iter().all(|(hook, ids)| now[hook].is_disjoint(ids)), "{now:?} of {programs:?}");
    quiet.iter_mut().for_each(Conversation::exchange);
    assert_rules_hold(&lab);
}

fn pins(lab: &Lab, node: &str) -> PathBuf {
    PathBuf::from(format!("/sys/fs/bpf/cirri/lab-{}-{node}", lab.name()))
}

/// A stop in good order and a start that finds no programs of its own build.
fn upgrade(lab: &Lab, node: &str) {
    std::thread::scope(|scope| {
        let restart = scope.spawn(|| lab.restart(node, &["--pause", AWAY]).unwrap());
        // An agent that is there puts back what it kept, and it stops answering before it is gone.
        let pid = || lab.node(node).unwrap().pid;
        eventually("the agent is gone", Duration::from_secs(60), || pid().is_none());
        as_of_another_build(lab, node);
        assert_eq!(pid(), None, "{node} was back before its programs were another build's");
        restart.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// SYNs that the client's connections sent more than once, as a machine that is short of time has them.
fn repeated_openings(lab: &Lab) -> u64 {
    let counters = printed(&lab.netns("shop/client").unwrap(), &["cat", "/proc/net/netstat"]);
    let mut lines = counters.lines().filter_map(|line| line.strip_prefix("TcpExt: ")).map(str::split_whitespace);
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let (_, count) = names.zip(values).find(|(name, _)| *name == "TCPSynRetrans").unwrap();
    count.parse().unwrap()
}

/// Makes the programs that a node keeps for its next start look like those of another build.
fn as_of_another_build(lab: &Lab, node: &str) {
    let dir = pins(lab, node).join("programs");
    for entry in std::fs::read_dir(&dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let (program, _) = name.rsplit_once('-').unwrap();
        std::fs::rename(dir.join(&name), dir.join(format!("{program}-0123456789abcdef"))).unwrap();
    }
}

/// Connections without traffic, one on each path and family.
fn quiet_conversations(lab: &Lab) -> Vec<Conversation> {
    let addresses = lab.addresses().unwrap();
    let mut all = Vec::new();
    for to in ["shop/near", "shop/far", "world"] {
        for address in &addresses[to] {
            let mut conversation = Conversation::open(lab, "shop/client", to, *address).unwrap();
            conversation.exchange();
            all.push(conversation);
        }
    }
    assert_eq!(all.len(), 6);
    all
}

fn is_pod(address: SocketAddr) -> bool {
    let text = address.ip().to_string();
    text.starts_with("10.244.") || text.starts_with("fd00:10:244:")
}

fn start_loads(lab: &Lab) -> Vec<Load> {
    let addresses = lab.addresses().unwrap();
    let start = |to: &str, family: usize, rate| {
        let to = SocketAddr::new(addresses[to][family], 80);
        Load::start(lab, "shop/client", to, rate, SECONDS).unwrap()
    };
    vec![
        start("shop/near", 0, RATE),
        start("shop/far", 0, RATE),
        start("world", 0, RATE),
        start("shop/far", 1, RATE / 4),
        start("world", 1, RATE / 4),
    ]
}

fn finish(loads: Vec<Load>) {
    for load in loads {
        let name = load.name().to_string();
        let report = load.finish().unwrap();
        println!("{name}: {report:?}");
        assert!(report.connections > 0 && report.failed == 0, "{name}: {report:?}");
        assert!(report.long.ok && report.long.transfers > 0, "{name}: {report:?}");
    }
}

/// Waits until the agent does not answer any more; whether it came to that.
fn until_away(lab: &Lab, node: &str) -> bool {
    let mut asked = (0..10_000).map(|_| lab.ask::<serde_json::Value>(node, &["status"]));
    asked.any(|answer| answer.is_err())
}

fn assert_rules_hold(lab: &Lab) {
    for (to, verdict) in [("shop/near", "allowed"), ("shop/closed", "denied")] {
        let verdicts = lab.verdicts_wanted(verdict, "shop/client", to, 80).unwrap();
        let expected = [4, 6].map(|family| (family, verdict.to_string()));
        assert_eq!(verdicts, BTreeMap::from(expected), "shop/client -> {to}");
    }
}

/// What a restart must not change: endpoints with their addresses, identities and generations, and every table.
fn state(lab: &Lab, node: &str) -> BTreeMap<String, BTreeSet<String>> {
    let lines = |value: serde_json::Value| -> BTreeSet<String> {
        value.as_array().into_iter().flatten().map(|entry| entry.to_string()).collect()
    };
    let mut all = BTreeMap::new();
    all.insert("endpoint list".to_string(), lines(lab.ask(node, &["endpoint", "list"]).unwrap()));
    for map in ["ENDPOINTS", "DEVICES", "IPCACHE", "EPOCHS", "RULESETS", "NODE"] {
        let dump = lab.ask(node, &["map", "dump", map, "--limit", "0"]).unwrap();
        all.insert(map.to_string(), lines(dump));
    }
    assert!(all.values().all(|lines| !lines.is_empty()), "{all:?}");
    all
}

/// The numbers of the programs on a node's devices, by hook.
fn programs(lab: &Lab, node: &str) -> BTreeMap<String, BTreeSet<u32>> {
    let devices: Vec<serde_json::Value> = lab.ask(node, &["endpoint", "list"]).unwrap();
    let mut devices: Vec<String> =
        devices.iter().map(|endpoint| endpoint["host_ifname"].as_str().unwrap().to_string()).collect();
    devices.push("eth0".into());
    let inside = lab.netns(&format!("node:{node}")).unwrap();
    inside
        .run(|| {
            let mut all = BTreeMap::new();
            for device in devices {
                for (direction, name) in [(TcAttachType::Ingress, "ingress"), (TcAttachType::Egress, "egress")] {
                    let (_, programs) = SchedClassifier::query_tcx(&device, direction).unwrap();
                    if !programs.is_empty() {
                        all.insert(format!("{device} {name}"), programs.iter().map(|program| program.id()).collect());
                    }
                }
            }
            all
        })
        .unwrap()
}
