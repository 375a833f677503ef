//! What a change of policy does to connections that are established: those it closes stop with their next packet, in
//! both directions; those it does not concern do not notice.

use std::fmt::Write;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use cirri_abi::epoch_slot;
use cirri_e2e::lab::{Conversation, Lab, QUIET, eventually};
use cirri_loader::Tables;
use serde_json::Value;

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
metadata: {name: other, namespace: shop, labels: {app: other}}
spec: {nodeName: node1, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: near, namespace: shop, labels: {app: near}}
spec: {nodeName: node1, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: shop, labels: {app: far}}
spec: {nodeName: node2, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: bystander, namespace: shop, labels: {app: bystander}}
spec: {nodeName: node1, containers: [{name: c, image: none}]}
"#;

/// Only `other` may reach `near` and `far`.
const INGRESS: &str = r#"
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: near-and-far, namespace: shop}
spec:
  podSelector: {matchExpressions: [{key: app, operator: In, values: [near, far]}]}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: other}}}]}]
"#;

/// `client` may reach nobody but `bystander`.
const EGRESS: &str = r#"
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: client, namespace: shop}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: bystander}}}]}]
"#;

/// Concerns a pod that talks to nobody.
const UNRELATED: &str = r#"
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: bystander, namespace: shop}
spec: {podSelector: {matchLabels: {app: bystander}}, policyTypes: [Ingress, Egress]}
"#;

/// What takes a while to write: many blocks of addresses, and a rule set that asks for each.
fn many_blocks() -> String {
    let mut policy = String::from(
        "
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: many, namespace: shop}
spec:
  podSelector: {matchLabels: {app: near}}
  ingress:
  - from:
",
    );
    for number in 0..2_000 {
        writeln!(policy, "    - {{ipBlock: {{cidr: 203.{}.{}.0/24}}}}", number / 250, number % 250).unwrap();
    }
    policy
}

const RENEWED: &str = "recipes renewed";
const NODES: [&str; 2] = ["node1", "node2"];

#[test]
fn a_policy_that_closes_a_connection_at_its_receiver_stops_the_next_packet_of_both_sides() {
    closes("close_in", INGRESS, |flow| {
        flow["ingress_rule"]["kind"] == "default-deny" && flow["ingress_rule"]["text"].as_str().is_some()
    });
}

#[test]
fn a_policy_that_closes_a_connection_at_its_sender_stops_the_next_packet_of_both_sides() {
    closes("close_out", EGRESS, |flow| flow["egress_rule"]["kind"] == "default-deny");
}

#[test]
fn programs_are_told_that_tables_change_while_they_change_and_no_longer() {
    let lab = Lab::up("writing", 2, &[]).unwrap();
    lab.apply(PODS).unwrap();
    let tables = Tables::open(Path::new("/sys/fs/bpf/cirri"), &format!("lab-{}-node1", lab.name())).unwrap();
    let told = || tables.epoch(epoch_slot::WRITING).unwrap() > 1;
    // Who looks may be without a processor during one change, not during all.
    for policy in [many_blocks().as_str(), ""].iter().cycle().take(40) {
        let manifests = [PODS, policy].concat();
        let seen = std::thread::scope(|scope| {
            let change = scope.spawn(|| lab.apply(&manifests).unwrap());
            let mut seen = false;
            while !change.is_finished() {
                seen |= told();
            }
            seen
        });
        eventually("programs are told that nothing changes any more", Duration::from_secs(60), || !told());
        if seen {
            return;
        }
    }
    panic!("programs are not told while tables change");
}

#[test]
fn what_rests_on_a_change_that_a_killed_agent_did_not_end_is_decided_anew() {
    let lab = Lab::up("unended", 2, &[]).unwrap();
    lab.apply(PODS).unwrap();
    let address = lab.addresses().unwrap()["shop/near"][0];
    let mut conversation = Conversation::open(&lab, "shop/client", "shop/near", address).unwrap();
    conversation.exchange();
    let tables = Tables::open(Path::new("/sys/fs/bpf/cirri"), &format!("lab-{}-node1", lab.name())).unwrap();
    let renewed = || lab.counter("node1", RENEWED).unwrap();

    let before = renewed();
    lab.kill_agent("node1").unwrap();
    lab.restart("node1", &[]).unwrap();
    conversation.exchange();
    assert_eq!(renewed(), before, "a restart alone is no reason");

    lab.kill_agent("node1").unwrap();
    // As it stands in the middle of a change.
    tables.set_writing(Some(cirri_abi::Tick { count: 1 })).unwrap();
    lab.restart("node1", &[]).unwrap();
    eventually("the change is ended", Duration::from_secs(60), || tables.epoch(epoch_slot::WRITING).unwrap() == 0);
    conversation.exchange();
    assert!(renewed() > before, "the connection did not feel the change");
}

fn closes(name: &str, policy: &str, names_the_rule: impl Fn(&Value) -> bool) {
    let lab = Lab::up(name, 2, &[]).unwrap();
    lab.apply(PODS).unwrap();
    let addresses = lab.addresses().unwrap();
    let open = |from: &str| -> Vec<Conversation> {
        let targets = ["shop/near", "shop/far"].into_iter();
        let each = targets.flat_map(|to| addresses[to].iter().map(move |address: &IpAddr| (to, *address)));
        let opened = each.map(|(to, address)| Conversation::open(&lab, from, to, address).unwrap());
        opened.collect()
    };
    // Two of each, so that each side's packet can be the first after the change.
    let (mut first_there, mut first_back) = (open("shop/client"), open("shop/client"));
    let mut allowed = open("shop/other");
    for conversation in first_there.iter_mut().chain(&mut first_back).chain(&mut allowed) {
        conversation.exchange();
    }

    lab.apply(&[PODS, policy].concat()).unwrap();
    std::thread::scope(|scope| {
        for conversation in &mut first_there {
            scope.spawn(|| {
                let (from, to) = (conversation.from, conversation.to);
                assert!(!conversation.there(QUIET).unwrap(), "{from} -> {to} still passes");
                assert!(!conversation.back(QUIET).unwrap(), "{to} -> {from} still passes after {from} was stopped");
            });
        }
        for conversation in &mut first_back {
            scope.spawn(|| {
                let (from, to) = (conversation.from, conversation.to);
                assert!(!conversation.back(QUIET).unwrap(), "{to} -> {from} still passes");
                assert!(!conversation.there(QUIET).unwrap(), "{from} -> {to} still passes after {to} was stopped");
            });
        }
    });
    allowed.iter_mut().for_each(Conversation::exchange);
    for conversation in &first_there {
        let drops: Vec<Value> = NODES.into_iter().flat_map(|node| drops(&lab, node, conversation)).collect();
        assert!(!drops.is_empty(), "no drop of {} -> {} is reported", conversation.from, conversation.to);
        for flow in &drops {
            assert!(flow["drop"]["name"] == "POLICY_DENIED" && names_the_rule(flow), "{flow}");
        }
    }

    // What was closed goes on where it was when the policy goes.
    lab.apply(PODS).unwrap();
    first_there.iter_mut().chain(&mut first_back).chain(&mut allowed).for_each(Conversation::exchange);
}

/// The drops of a connection that a node reported.
fn drops(lab: &Lab, node: &str, conversation: &Conversation) -> Vec<Value> {
    let (port, ip) = (conversation.from.port().to_string(), conversation.from.ip().to_string());
    lab.drops(node, &["--port", &port, "--ip", &ip]).unwrap()
}

#[test]
fn a_policy_that_does_not_concern_a_connection_leaves_its_recipes_alone() {
    let lab = Lab::up("unrelated", 2, &[]).unwrap();
    lab.apply(PODS).unwrap();
    let addresses = lab.addresses().unwrap();
    let mut conversations = Vec::new();
    for to in ["shop/near", "shop/far", "world"] {
        for address in &addresses[to] {
            conversations.push(Conversation::open(&lab, "shop/client", to, *address).unwrap());
        }
    }
    conversations.iter_mut().for_each(Conversation::exchange);
    let before = NODES.map(|node| lab.recipes(node).unwrap());
    let renewed = |()| NODES.map(|node| lab.counter(node, RENEWED).unwrap());
    let renewed_before = renewed(());

    lab.apply(&[PODS, UNRELATED].concat()).unwrap();
    const ROUNDS: u64 = 20;
    for _ in 0..ROUNDS {
        conversations.iter_mut().for_each(Conversation::exchange);
    }
    assert_eq!(renewed(()), renewed_before, "recipes were decided anew");
    let mut compared = 0;
    for (before, node) in before.iter().zip(NODES) {
        let now = lab.recipes(node).unwrap();
        for conversation in &conversations {
            let (from, to) = (conversation.from, conversation.to);
            for (from, to) in [(from, to), (to, from)] {
                let Some(was) = before.tcp(from, to) else { continue };
                let is = now.tcp(from, to).unwrap_or_else(|| panic!("{node}: the recipe of {from} -> {to} is gone"));
                assert_eq!((&is.epoch, &is.decision), (&was.epoch, &was.decision), "{node}: {from} -> {to}");
                assert!(is.packets >= was.packets + ROUNDS, "{node}: {from} -> {to} went another way: {was:?} {is:?}");
                compared += 1;
            }
        }
    }
    // Both directions on the one node, on both nodes, and towards the world (whose answers come under the node's
    // address), in both families.
    assert_eq!(compared, 2 * (2 + 4 + 1));

    // One that does concern it, and allows it, is what moves the counter.
    let more = "
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: near, namespace: shop}
spec: {podSelector: {matchLabels: {app: near}}, policyTypes: [Ingress], ingress: [{}]}
";
    lab.apply(&[PODS, UNRELATED, more].concat()).unwrap();
    conversations.iter_mut().for_each(Conversation::exchange);
    let [node1, node2] = renewed(());
    assert!(node1 > renewed_before[0], "a policy about a connection's receiver did not reach its recipes");
    assert_eq!(node2, renewed_before[1], "node2 has nothing to do with it");
}
