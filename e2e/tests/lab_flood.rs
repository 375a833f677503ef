//! A workload that floods: others do not feel it.

use std::net::IpAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use cirri_e2e::lab::{Conversation, Flood, Lab, Recipes};
use serde_json::Value;

const PODS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: attacker, namespace: shop, labels: {app: attacker}}
spec: {nodeName: node1, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: victim, namespace: shop, labels: {app: victim}}
spec: {nodeName: node1, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {nodeName: node1, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: shop, labels: {app: far}}
spec: {nodeName: node2, containers: [{name: c, image: none}]}
"#;
const PACKETS: u64 = 1_000_000;
/// Established connections without traffic on each path: the least recently used entries of their table.
const IDLE: usize = 100;
/// Between two rounds of exchanges.
const PAUSE: Duration = Duration::from_millis(10);
/// How long a busy connection may take for one exchange while the machine is flooded.
const STALL: Duration = Duration::from_secs(2);

#[test]
fn a_million_syns_from_one_pod_evict_no_established_connection_of_another_and_stop_none() {
    let lab = Lab::up("flood", 2, &[]).unwrap();
    lab.apply(PODS).unwrap();
    let addresses = lab.addresses().unwrap();
    let mut idle = Vec::new();
    let mut busy = Vec::new();
    for to in ["shop/victim", "shop/far", "world"] {
        for address in &addresses[to] {
            idle.extend(Conversation::open_many(&lab, "shop/client", to, *address, IDLE).unwrap());
            busy.push(Conversation::open(&lab, "shop/client", to, *address).unwrap());
        }
    }
    idle.iter_mut().chain(&mut busy).for_each(Conversation::exchange);
    let nodes = ["node1", "node2"];
    let before = nodes.map(|node| lab.recipes(node).unwrap());
    assert!(before[0].len() >= idle.len(), "{} recipes of {} connections", before[0].len(), idle.len());
    let pid = lab.node("node1").unwrap().pid;

    let ipv4 = |whose: &str| match addresses[whose][0] {
        IpAddr::V4(address) => address,
        IpAddr::V6(address) => panic!("{whose} has {address} first"),
    };
    let flood = Flood {
        from: ipv4("shop/attacker"),
        to: vec![ipv4("shop/victim"), ipv4("world"), ipv4("shop/far")],
        packets: PACKETS,
    };
    let attacker = lab.netns("shop/attacker").unwrap();
    let (stop, stopped) = channel();
    let (flooded, slowest) = std::thread::scope(|scope| {
        let talking = scope.spawn(|| talk_until(&mut busy, stopped));
        let flooded = flood.run(&attacker);
        drop(stop);
        let slowest = talking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (flooded.unwrap(), slowest)
    });
    let pending = entries(&lab, "PENDING4");
    println!("{flooded:?}; slowest exchange meanwhile {slowest:?}; pending (entries, of) {pending:?}");
    assert_eq!(flooded.sent + flooded.refused, PACKETS);
    assert!(flooded.refused < PACKETS / 100, "{flooded:?}");
    assert!(slowest < STALL, "an established connection stood still for {slowest:?}");

    // The flood did arrive: it filled the table of unfinished connections, which is bounded.
    let decided = lab.counter("node1", "slow path decided").unwrap();
    assert!(decided > PACKETS / 2, "only {decided} packets were decided on");
    assert!(pending.0 > pending.1 / 2 && pending.0 <= pending.1, "{pending:?}");
    assert_eq!(lab.node("node1").unwrap().pid, pid, "the agent did not survive");
    for (before, node) in before.iter().zip(nodes) {
        assert_all_there(node, before, &lab.recipes(node).unwrap());
    }
    idle.iter_mut().chain(&mut busy).for_each(Conversation::exchange);
    // What could not be told is counted.
    let status: Value = lab.ask("node1", &["status"]).unwrap();
    let told = |name: &str| status["flows"][name].as_u64().unwrap();
    assert!(told("seen") + told("lost") >= decided, "{} and {decided} decisions", status["flows"]);
    assert_eq!(status["counters"]["events lost"]["packets"].as_u64().unwrap_or_default(), told("lost"));
    // And whoever comes next is served.
    let mut late = Conversation::open(&lab, "shop/client", "shop/victim", addresses["shop/victim"][0]).unwrap();
    late.exchange();
}

/// Exchanges over all of them, again and again; the longest that one exchange took.
fn talk_until(busy: &mut [Conversation], stopped: Receiver<()>) -> Duration {
    let (mut slowest, mut rounds) = (Duration::ZERO, 0);
    while stopped.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
        for conversation in &mut *busy {
            let begun = Instant::now();
            conversation.exchange();
            slowest = slowest.max(begun.elapsed());
        }
        rounds += 1;
    }
    assert!(rounds > 10, "only {rounds} rounds fitted into the flood");
    slowest
}

fn assert_all_there(node: &str, before: &Recipes, now: &Recipes) {
    let there: std::collections::BTreeSet<&String> = now.iter().map(|(tuple, _)| tuple).collect();
    let evicted: Vec<&String> = before.iter().map(|(tuple, _)| tuple).filter(|tuple| !there.contains(tuple)).collect();
    assert!(evicted.is_empty(), "{node}: {} of {} recipes are gone: {evicted:?}", evicted.len(), before.len());
}

/// Entries of a map of node1, and how many it can hold.
fn entries(lab: &Lab, map: &str) -> (u64, u64) {
    let maps: Vec<Value> = lab.ask("node1", &["map", "list"]).unwrap();
    let map = maps.iter().find(|it| it["name"] == map).unwrap();
    (map["entries"].as_u64().unwrap(), map["max_entries"].as_u64().unwrap())
}
