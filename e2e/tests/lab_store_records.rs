//! What agents write in etcd, spoilt, replaced and deleted by hand: its owner writes it anew within seconds, and who
//! changes it again and again is named. A node that is cleaned up takes its own along.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use cirri_e2e::lab::{self, Lab, eventually};
use cirri_loader::net::Namespace;
use cirri_store::{Etcd, EtcdOptions, PREFIX, Store as _};
use serde_json::Value;

/// How long the owner may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// For what is left alone for a while, on a busy machine.
const LONG: Duration = Duration::from_secs(40);

/// `client` may reach `web` on the other node, `other` may not.
const SHOP: &str = r#"
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
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: node2, containers: [{name: c, image: none, ports: [{containerPort: 80}]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
"#;

#[test]
fn every_record_that_an_agent_owns_is_right_again_within_seconds_however_it_was_spoilt() {
    let lab = Lab::up("records", 2, &[]).unwrap();
    lab.apply(SHOP).unwrap();
    let etcd = Store::of(&lab);
    assert_traffic(&lab, "before");
    let client = &lab.addresses().unwrap()["shop/client"][0];
    let endpoints: Vec<Value> = lab.ask("node1", &["endpoint", "list"]).unwrap();
    let id = endpoints.iter().find(|it| it["pod"] == "client").unwrap()["identity"].to_string();
    let labels = etcd.get(&format!("identities/id/{id}")).unwrap();
    let pools = etcd.below("pools/v4/");
    let pool = &pools.iter().find(|(_, value)| value == "node1").expect("node1 has a range").0;
    let by_labels = &etcd.below("identities/labels/").into_iter().find(|(_, value)| value.contains(&labels)).unwrap().0;

    let wrong_node = etcd.get("nodes/node1").unwrap().replace("172.31.255.11", "172.31.255.77");
    let wrong_ip = etcd.get(&format!("ips/node1/{client}")).unwrap().replace(&id, "300");
    let wrong_labels = etcd.get(by_labels).unwrap().replace(&id, "300");
    let records = [
        ("nodes/node1".to_owned(), wrong_node),
        (format!("ips/node1/{client}"), wrong_ip),
        ("enforced/node1".to_owned(), "{\"identities\":999999999}".to_owned()),
        (format!("identities/id/{id}"), "k8s:app=forged".to_owned()),
        (by_labels.clone(), wrong_labels),
        (pool.clone(), "nobody".to_owned()),
    ];
    let mut late = Vec::new();
    for (key, wrong) in &records {
        let before = etcd.get(key).unwrap();
        assert_ne!(*wrong, before, "{key}");
        for (how, value) in [("spoilt", Some("{")), ("replaced", Some(wrong)), ("deleted", None)] {
            match value {
                Some(value) => etcd.put(key, value),
                None => etcd.delete(key),
            }
            let began = Instant::now();
            while etcd.get(key).as_ref() != Some(&before) && began.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(20));
            }
            println!("{:5.2} s: {key} {how}", began.elapsed().as_secs_f64());
            if began.elapsed() >= PATIENCE {
                late.push(format!("{key} {how}"));
                etcd.put(key, &before);
            }
        }
        assert_traffic(&lab, key);
    }
    // An address that the node does not have, published in its name.
    etcd.put(
        "ips/node1/10.9.9.9",
        "{\"ip\":\"10.9.9.9\",\"identity\":2,\"node\":\"node1\",\"namespace\":\"x\",\"pod\":\"x\"}",
    );
    let began = Instant::now();
    while etcd.get("ips/node1/10.9.9.9").is_some() && began.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
    }
    if began.elapsed() >= PATIENCE {
        late.push("an address in the node's name".to_owned());
    }
    assert!(late.is_empty(), "not right within {PATIENCE:?}: {late:#?}");
    assert!(status(&lab)["repaired"]["record"].as_u64() >= Some(18), "{:#}", status(&lab)["repaired"]);
    eventually("all is well", LONG, || is_well(&lab));
}

#[test]
fn a_record_that_is_spoilt_again_the_moment_it_is_right_is_right_again() {
    /// Less often than what is repaired at once.
    const ROUNDS: usize = 18;
    let lab = Lab::up("recagain", 2, &[]).unwrap();
    lab.apply(SHOP).unwrap();
    let etcd = Store::of(&lab);
    let client = &lab.addresses().unwrap()["shop/client"][0];
    for key in ["nodes/node1".to_owned(), format!("ips/node1/{client}"), "enforced/node1".to_owned()] {
        let before = etcd.get(&key).unwrap();
        let key = format!("{PREFIX}{key}");
        // The next value comes before the agent has heard that its own was taken.
        let late = etcd.ask(async |etcd| {
            for round in 0..ROUNDS {
                etcd.put(&key, format!("{{{round}").as_bytes(), false).await.unwrap();
                let began = Instant::now();
                while etcd.get(&key).await.unwrap().is_none_or(|entry| entry.value != before.as_bytes()) {
                    if began.elapsed() > LONG {
                        return Some(round);
                    }
                }
            }
            None
        });
        assert_eq!(late, None, "{key} stays as it was spoilt in that round");
    }
}

#[test]
fn two_who_write_one_record_do_not_fight_for_ever_and_status_names_it() {
    let lab = Lab::up("recfight", 2, &[]).unwrap();
    lab.apply(SHOP).unwrap();
    let etcd = Store::of(&lab);
    let right = etcd.get("nodes/node1").unwrap();
    let wrong = right.replace("172.31.255.11", "172.31.255.77");
    let named = || {
        let problems = status(&lab)["problems"].clone();
        let is_it = |it: &Value| {
            it["what"] == "record" && it["object"] == "nodes/node1" && it["remedy"].as_str().unwrap().contains("again")
        };
        problems.as_array().unwrap().iter().any(is_it)
    };
    eventually("the fight is named", LONG, || {
        etcd.put("nodes/node1", &wrong);
        named()
    });
    assert!(!is_well(&lab), "status --check says that all is well");
    let repaired = || status(&lab)["repaired"]["record"].as_u64().unwrap();
    let (before, began) = (repaired(), Instant::now());
    while began.elapsed() < PATIENCE {
        etcd.put("nodes/node1", &wrong);
    }
    assert!(repaired() - before <= 2, "{} repairs in {PATIENCE:?}", repaired() - before);
    eventually("it is right when the other has stopped", LONG, || etcd.get("nodes/node1").as_ref() == Some(&right));
    eventually("all is well when the other has left it alone", LONG, || is_well(&lab));
    assert_traffic(&lab, "after it");
}

#[test]
fn the_keys_of_a_node_that_is_cleaned_up_go_with_it_and_no_others() {
    let lab = Lab::up("recclean", 2, &[]).unwrap();
    lab.apply(SHOP).unwrap();
    let etcd = Store::of(&lab);
    assert_traffic(&lab, "before");
    let cleanup = |node: &str, from: &str, to: &str| {
        let socket = lab.socket(node);
        let directory = Path::new(&socket).ancestors().nth(2).unwrap();
        let text = std::fs::read_to_string(directory.join("agent.yaml")).unwrap();
        assert!(text.contains(from), "{text}");
        let file = directory.join("cleanup.yaml");
        std::fs::write(&file, text.replace(from, to)).unwrap();
        let file = file.display().to_string();
        lab::printed(
            &Namespace::open(lab.node(node).unwrap().netns).unwrap(),
            &[&lab::binary().unwrap().display().to_string(), "agent", "--config", &file, "--cleanup"],
        )
    };
    let all = || etcd.below("").into_iter().collect::<BTreeMap<_, _>>();
    lab.kill_agent("node1").unwrap();
    let before = all();
    let said = cleanup("node1", "", "");
    let after = all();
    let gone: BTreeSet<&String> = before.keys().filter(|key| !after.contains_key(*key)).collect();
    let is_own = |key: &&String| {
        let named = ["nodes/node1", "enforced/node1", "caught-up/node1"].contains(&key.as_str());
        named || key.starts_with("ips/node1/") || key.starts_with("pools/") && before[*key] == "node1"
    };
    let own: BTreeSet<&String> = before.keys().filter(is_own).collect();
    assert!(own.len() >= 7, "two ranges, three addresses and more: {own:?}");
    assert_eq!(gone, own, "{said}");
    assert!(said.contains("keys of node node1"), "{said}");

    // Another store says that it is one.
    lab.kill_agent("node2").unwrap();
    let before = all();
    etcd.put("store-id", "another");
    let said = cleanup("node2", "", "");
    assert!(said.contains("stay in the store: the store is another one"), "{said}");
    etcd.put("store-id", &before["store-id"]);
    assert_eq!(all(), before);
    // Its state is gone by now, and it is told all the same by its record; not when the store is away.
    let said = cleanup("node2", "172.31.255.1:2379", "172.31.255.1:1");
    assert!(said.contains("stay in the store: ") && said.contains("etcdctl"), "{said}");
    cleanup("node2", "", "");
    let left = all();
    assert!(left.keys().all(|key| !key.contains("node2")) && !left.values().any(|value| value == "node2"), "{left:#?}");
}

/// The etcd of a lab, below the prefix of all keys.
struct Store(Namespace);

impl Store {
    fn of(lab: &Lab) -> Store {
        Store(Namespace::open(lab.list().unwrap().net).unwrap())
    }

    fn get(&self, key: &str) -> Option<String> {
        self.ask(async |etcd| etcd.get(&format!("{PREFIX}{key}")).await.unwrap())
            .map(|entry| String::from_utf8(entry.value).unwrap())
    }

    /// Keys and values.
    fn below(&self, prefix: &str) -> Vec<(String, String)> {
        let (entries, _) = self.ask(async |etcd| etcd.list(&format!("{PREFIX}{prefix}")).await.unwrap());
        let plain = |key: String| key[PREFIX.len()..].to_owned();
        entries.into_iter().map(|it| (plain(it.key), String::from_utf8(it.value).unwrap())).collect()
    }

    fn put(&self, key: &str, value: &str) {
        self.ask(async |etcd| etcd.put(&format!("{PREFIX}{key}"), value.as_bytes(), false).await.unwrap());
    }

    fn delete(&self, key: &str) {
        self.ask(async |etcd| etcd.delete(&format!("{PREFIX}{key}")).await.unwrap());
    }

    fn ask<T: Send>(&self, work: impl AsyncFnOnce(&Etcd) -> T + Send) -> T {
        let inside = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { work(&Etcd::new(&EtcdOptions::new(["http://172.31.255.1:2379"])).unwrap()).await })
        };
        self.0.run(inside).unwrap()
    }
}

fn assert_traffic(lab: &Lab, how: &str) {
    for (from, verdict) in [("shop/client", "allowed"), ("shop/other", "denied")] {
        eventually(&format!("{how}: {from} is {verdict}"), PATIENCE, || {
            let verdicts = lab.verdicts(from, "shop/web", 80).unwrap();
            verdicts.values().all(|it| it == verdict)
        });
    }
}

fn status(lab: &Lab) -> Value {
    lab.ask("node1", &["status"]).unwrap()
}

fn is_well(lab: &Lab) -> bool {
    lab::output(["--socket", &lab.socket("node1"), "status", "--check"]).unwrap().status.success()
}
