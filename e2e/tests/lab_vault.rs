//! A workload is never more open than its policies, whatever the order of events: the attachment, its Pod, its
//! policies and everything that was written before them come in every order, and no datagram passes that is forbidden.

mod vault;

use std::fs;
use std::time::{Duration, Instant};

use cirri_control::labels::IdentityLabels;
use cirri_e2e::lab::{self, eventually};
use serde_json::Value;
use vault::{Kind, Process, Store, Vault, denial, deny, others, pod};

/// How long a change may take until it is in force.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn no_packet_passes_before_the_policies_that_were_there_with_a_folder() {
    a_backlog_before_the_attachment(Store::folder("vault_f"), 1500);
}

#[test]
fn no_packet_passes_before_the_policies_that_were_there_with_etcd() {
    a_backlog_before_the_attachment(Store::etcd("vault_e"), 1800);
}

/// A policy is in force; others are written, then the Pod that it selects, and at once the runtime attaches it.
fn a_backlog_before_the_attachment(store: Store, ahead: usize) {
    store.put(&[deny("vault")]);
    store.settle();
    let vault = Vault::new(&store, "first");
    store.put(&others(ahead, 0));
    store.put(&[pod("vault", "vault")]);
    let asked = Instant::now();
    vault.add().unwrap();
    println!("attached {:?} after it was asked for, with {ahead} policies ahead", asked.elapsed());
    assert!(labels(&store).contains("k8s:app=vault"), "{}", labels(&store));
    store.settle();
    assert_eq!(vault.received(), 0, "datagrams passed that the policy forbids");
    // The attack was one: without its policy they pass.
    store.delete(Kind::Policy, "deny-vault");
    eventually("datagrams pass without a policy", PATIENCE, || vault.received() > 0);
    vault.del().unwrap();
}

#[test]
fn what_changes_together_comes_into_force_together_however_much_it_is() {
    let store = Store::folder("vault_t");
    // More than the agent takes in at once. The policy is the first of them, and its pod the last.
    let state = |app: &str, round| {
        let policy = denial("a", app);
        store.put_together(&[vec![policy], others(6000, round), vec![pod("vault", app)]].concat());
        store.settle();
    };
    state("vault", 0);
    let vault = Vault::new(&store, "first");
    vault.add().unwrap();
    for (round, app) in ["safe", "vault", "safe", "vault", "safe"].into_iter().enumerate() {
        state(app, round as u64 + 1);
        assert_eq!(vault.received(), 0, "datagrams passed that no state allows, in round {round}");
        assert!(labels(&store).contains(&format!("k8s:app={app}")), "{}", labels(&store));
    }
    // The attack was one.
    store.put_together(&[pod("vault", "vault")]);
    eventually("datagrams pass without a policy", PATIENCE, || vault.received() > 0);
}

#[test]
fn status_does_not_say_that_all_is_well_while_a_backlog_arrives_with_a_folder() {
    a_backlog_shows(Store::folder("status_f"));
}

#[test]
fn status_does_not_say_that_all_is_well_while_a_backlog_arrives_with_etcd() {
    a_backlog_shows(Store::etcd("status_e"));
}

fn a_backlog_shows(store: Store) {
    const AHEAD: usize = 2000;
    store.settle();
    let socket = store.lab.socket("node1");
    let backlog = others(AHEAD, 0);
    let is_well = || lab::output(["--socket", &socket, "status", "--check"]).unwrap().status.success();
    let in_force = || {
        let policies: Vec<Value> = store.lab.ask("node1", &["policy", "get"]).unwrap();
        policies.iter().filter(|policy| policy["state"] == "enforced").count()
    };
    store.put(&backlog);
    let well = is_well();
    let count = in_force();
    assert!(!well || count == AHEAD, "well with {count} of {AHEAD} policies in force");
    eventually("all is well in the end", 2 * PATIENCE, is_well);
    assert_eq!(in_force(), AHEAD);
}

#[test]
fn a_pod_that_the_store_does_not_show_is_refused_or_waited_for_and_a_container_without_a_name_is_not() {
    let store = Store::folder("unseen");
    store.put(&[deny("vault")]);
    store.settle();
    let vault = Vault::new(&store, "unseen");
    let refused = vault.try_add().unwrap_err();
    assert_eq!(refused["code"], 11, "the runtime must try again: {refused}");
    assert!(refused["msg"].as_str().unwrap().contains("shop/vault"), "{refused}");
    assert_eq!(endpoint(&store), Value::Null, "it is there all the same");

    // The runtime may be faster than the store.
    std::thread::scope(|scope| {
        let added = scope.spawn(|| vault.add());
        store.put(&[pod("vault", "vault")]);
        added.join().unwrap().unwrap();
    });
    assert!(labels(&store).contains("k8s:app=vault"), "{}", labels(&store));
    assert_eq!(vault.received(), 0);
    vault.del().unwrap();

    let nameless = Vault::nameless(&store, "nameless");
    nameless.add().unwrap();
    nameless.del().unwrap();
}

#[test]
fn a_pod_whose_object_is_deleted_while_it_runs_stays_who_it_is_until_it_is_detached() {
    let store = Store::folder("forced");
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {team: a}}\n".to_owned();
    let by_namespace = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
        metadata: {name: by-namespace, namespace: shop}\n\
        spec: {podSelector: {matchLabels: {app: vault}}, policyTypes: [Ingress],\n\
        ingress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}]}]}\n";
    store.put(&[namespace, by_namespace.to_owned(), pod("vault", "vault")]);
    store.settle();
    let vault = Vault::new(&store, "forced");
    vault.add().unwrap();
    let before = labels(&store);
    assert!(before.contains("k8s:app=vault") && before.contains("team=a"), "{before}");

    store.delete(Kind::Pod, "vault");
    store.delete(Kind::Namespace, "shop");
    store.settle();
    assert_eq!(labels(&store), before, "its objects are gone");
    store.lab.restart("node1", &["--kill"]).unwrap();
    store.settle();
    assert_eq!(labels(&store), before, "and the agent has started again");
    // A policy may ask for a label that identities leave out otherwise: it is known of a pod that is gone too.
    assert_eq!(vault.received(), 0, "datagrams passed that the policy forbids");

    // A new object of the name is a readable successor.
    store.put(&[pod("vault", "open")]);
    store.settle();
    assert!(labels(&store).contains("k8s:app=open"), "{}", labels(&store));
    eventually("datagrams pass", PATIENCE, || vault.received() > 0);
    vault.del().unwrap();
}

#[test]
fn another_pod_of_the_same_name_gives_a_container_nothing() {
    let store = Store::folder("namesake");
    let one_with =
        |uid: &str, app: &str| pod("vault", app).replace("name: vault,", &format!("name: vault, uid: {uid},"));
    store.put(&[deny("vault"), one_with("first", "vault")]);
    store.settle();
    let vault = Vault::with_uid(&store, "namesake", "first");
    vault.add().unwrap();
    let before = labels(&store);
    assert!(before.contains("k8s:app=vault"), "{before}");
    let second = Vault::with_uid(&store, "successor", "second");
    let refused = second.try_add().unwrap_err();
    assert_eq!(refused["code"], 11, "the runtime must try again: {refused}");
    assert!(refused["msg"].as_str().unwrap().contains("UID first, not second"), "{refused}");

    // As after a forced deletion of a StatefulSet's pod: the container of the first still runs.
    let elsewhere = pod("vault", "open").replace("node1", "node2").replace("name: vault,", "name: vault, uid: third,");
    for successor in [elsewhere, one_with("second", "open")] {
        store.delete(Kind::Pod, "vault");
        store.put(&[successor]);
        store.settle();
        assert_eq!(labels(&store), before, "its object is another pod's");
    }
    store.lab.restart("node1", &["--kill"]).unwrap();
    store.settle();
    assert_eq!(labels(&store), before, "and the agent has started again");
    assert_eq!(vault.received(), 0, "datagrams passed that the policy forbids");

    vault.del().unwrap();
    second.add().unwrap();
    assert!(labels(&store).contains("k8s:app=open"), "{}", labels(&store));
    second.del().unwrap();
}

#[test]
fn a_pod_that_is_deleted_while_it_is_attached_and_gets_its_number_is_who_it_was() {
    // Whoever asks for its number finds so many other labels first: time enough.
    const OTHERS: u32 = 3000;
    let store = Store::etcd("number");
    store.put(&[deny("vault"), pod("vault", "open")]);
    store.settle();
    let vault = Vault::new(&store, "number");
    vault.add().unwrap();
    let closed = labels_with(&store, "vault");
    vault.del().unwrap();
    // What came while it was open.
    vault.received();
    store.put_numbers(&closed, OTHERS, r#"{"id": 300, "labels": "k8s:app=other"}"#);
    store.put(&[pod("vault", "vault")]);
    store.settle();
    let asked = Instant::now();
    std::thread::scope(|scope| {
        let added = scope.spawn(|| vault.try_add());
        std::thread::sleep(Duration::from_millis(300));
        store.delete(Kind::Pod, "vault");
        store.settle();
        assert!(!added.is_finished(), "attached before the deletion was seen: {:?}", asked.elapsed());
        added.join().unwrap().unwrap();
    });
    println!("attached {:?} after it was asked for", asked.elapsed());
    assert!(labels(&store).contains("k8s:app=vault"), "{}", labels(&store));
    store.lab.restart("node1", &["--kill"]).unwrap();
    store.settle();
    assert!(labels(&store).contains("k8s:app=vault"), "and the agent has started again: {}", labels(&store));
    assert_eq!(vault.received(), 0, "datagrams passed that the policy forbids");
    store.delete(Kind::Policy, "deny-vault");
    eventually("datagrams pass without a policy", PATIENCE, || vault.received() > 0);
    vault.del().unwrap();
}

#[test]
fn labels_that_can_get_no_number_are_judged_at_once_and_cut_nobody_else_off() {
    let store = Store::etcd("unnumbered");
    store.put(&[deny("vault"), deny("open"), pod("vault", "open"), pod("twin", "open")]);
    store.settle();
    let (vault, twin) = (Vault::new(&store, "unnumbered"), Vault::twin(&store, "twin"));
    vault.add().unwrap();
    twin.add().unwrap();
    let (before, closed) = (endpoint(&store)["identity"].clone(), labels_with(&store, "vault"));
    store.put_numbers(&closed, 1, "no record");
    store.put(&[pod("vault", "vault")]);
    let has_none = || {
        let problems = store.lab.ask::<Value>("node1", &["status"]).unwrap_or_default()["problems"].to_string();
        problems.contains("no identity yet") && problems.contains("app=vault")
    };
    eventually("its labels have no number", PATIENCE, has_none);
    // From here on who has the former labels is open.
    store.delete(Kind::Policy, "deny-open");
    for restart in [false, true] {
        if restart {
            // The agent is back, and not all is enforced: the labels have no number.
            store.lab.restart("node1", &["--kill", "--timeout", "5"]).unwrap_err();
            eventually("its labels still have no number", PATIENCE, has_none);
        }
        assert!(labels(&store).contains("k8s:app=vault"), "restart: {restart}: {}", labels(&store));
        assert_eq!(endpoint(&store)["identity"], before, "others know it by the number that it had");
        let identities: Vec<Value> = store.lab.ask("node1", &["identity", "list"]).unwrap();
        let former = identities.iter().find(|identity| identity["id"] == before).unwrap();
        assert!(former["labels"].to_string().contains("k8s:app=open"), "the number got its labels: {former}");
        twin.received();
        eventually("datagrams pass to who has the former labels", PATIENCE, || twin.received() > 0);
        assert_eq!(vault.received(), 0, "datagrams passed that the policy forbids, restart: {restart}");
    }
    store.delete_number(&closed);
    store.settle();
    assert_ne!(endpoint(&store)["identity"], before);
    assert_eq!(vault.received(), 0, "datagrams passed that the policy forbids");
    store.put(&[pod("vault", "open")]);
    store.settle();
    assert_eq!(endpoint(&store)["identity"], before);
    eventually("datagrams pass", PATIENCE, || vault.received() > 0);
    twin.del().unwrap();
    vault.del().unwrap();
}

#[test]
fn what_the_store_spoils_stays_in_force_over_restarts_until_it_is_readable_or_gone() {
    let store = Store::etcd("spoilt");
    store.put(&[deny("vault"), pod("vault", "vault")]);
    store.settle();
    let vault = Vault::new(&store, "spoilt");
    vault.add().unwrap();
    let before = labels(&store);
    store.spoil(Kind::Policy, "deny-vault", "{\"kind\": \"Netw");
    store.spoil(Kind::Pod, "vault", "");
    for _ in 0..2 {
        store.lab.restart("node1", &["--kill"]).unwrap();
        store.settle();
        assert_eq!(labels(&store), before, "the Pod cannot be read");
        let problems = store.lab.ask::<Value>("node1", &["status"]).unwrap()["problems"].to_string();
        for object in ["NetworkPolicy shop/deny-vault", "Pod shop/vault"] {
            assert!(problems.contains(object), "{object} is not named: {problems}");
        }
        let socket = store.lab.socket("node1");
        assert_eq!(lab::output(["--socket", &socket, "status", "--check"]).unwrap().status.code(), Some(1));
    }
    assert_eq!(vault.received(), 0, "datagrams passed that the policy forbids");
    store.delete(Kind::Policy, "deny-vault");
    eventually("datagrams pass when the policy is deleted", PATIENCE, || vault.received() > 0);
    let _etcd = an_etcd_that_lost_its_data_opens_nothing(&store, &vault);
    vault.del().unwrap();
}

fn an_etcd_that_lost_its_data_opens_nothing(store: &Store, vault: &Vault<'_>) -> Process {
    // What closes the vault was never let in: it is kept like what was.
    store.put(&[vault::refused("vault"), pod("vault", "vault")]);
    store.settle();
    assert!(state(store, "deny-vault").starts_with("refused: "), "{}", state(store, "deny-vault"));
    vault.received();
    let etcd = store.lose_data();
    let missing = |object: &str| {
        let problems = store.lab.ask::<Value>("node1", &["status"]).unwrap()["problems"].clone();
        let named = problems.as_array().unwrap().iter().find(|it| it["object"] == "another store").cloned();
        named.filter(|it| it["found"].as_str().unwrap().contains(object))
    };
    let mut passed = 0;
    eventually("it is named", PATIENCE, || {
        passed += vault.received();
        passed > 0 || missing("NetworkPolicy shop/deny-vault").is_some()
    });
    assert_eq!(passed, 0, "datagrams passed although nobody deleted the policy");
    store.lab.restart("node1", &["--kill"]).unwrap();
    store.settle();
    let problem = missing("Pod shop/vault").expect("it is named after a restart");
    assert_eq!(vault.received(), 0, "datagrams passed although nobody deleted the policy");
    // It is filled again, the policy last.
    store.put(&[pod("vault", "vault")]);
    store.settle();
    assert!(missing("NetworkPolicy shop/deny-vault").is_some() && missing("Pod shop/vault").is_none());
    assert_eq!(vault.received(), 0, "datagrams passed although nobody deleted the policy");
    // Nobody wants it any more: as the remedy says.
    let remedy = problem["remedy"].as_str().unwrap();
    let (_, id) = remedy.trim_end_matches('`').rsplit_once(' ').unwrap();
    store.put_id(id);
    eventually("datagrams pass when the deletion is confirmed", PATIENCE, || vault.received() > 0);
    assert_eq!(missing(""), None);
    etcd
}

#[test]
fn a_store_file_that_is_spoilt_while_a_manifest_cannot_be_read_opens_nothing_and_is_named() {
    let store = Store::folder("lost");
    store.put(&[deny("vault"), pod("vault", "vault")]);
    store.settle();
    let vault = Vault::new(&store, "lost");
    vault.add().unwrap();
    let before = labels(&store);
    store.spoil(Kind::Policy, "deny-vault", "{ broken: [");
    store.spoil(Kind::Pod, "vault", "{ broken: [");
    store.settle();
    let file = format!("/run/cirri/lab/{}/nodes/node1/state/store.redb", store.lab.name());
    store.lab.kill_agent("node1").unwrap();
    let mut bytes = fs::read(&file).unwrap();
    bytes[..512].fill(0x5a);
    fs::write(&file, bytes).unwrap();
    store.lab.restart("node1", &[]).unwrap();
    store.settle();
    assert_eq!(labels(&store), before, "the Pod cannot be read");
    let problems = store.lab.ask::<Value>("node1", &["status"]).unwrap()["problems"].to_string();
    assert!(problems.contains(&file) && problems.contains("store.redb.damaged"), "it is not named: {problems}");
    // What is known of the files is known after the next start as well.
    store.lab.restart("node1", &["--kill"]).unwrap();
    store.settle();
    assert_eq!(vault.received(), 0, "datagrams passed that the policy forbids");
    store.delete(Kind::Policy, "deny-vault");
    eventually("datagrams pass when the policy is deleted", PATIENCE, || vault.received() > 0);
    vault.del().unwrap();
}

#[test]
fn an_endpoint_file_that_cannot_be_used_is_named_and_costs_the_pod_nothing() {
    let store = Store::folder("files");
    store.put(&[pod("vault", "vault")]);
    let vault = Vault::new(&store, "files");
    vault.add().unwrap();
    let before = endpoint(&store);
    let file = format!("/run/cirri/lab/{}/nodes/node1/state/endpoints/{}.json", store.lab.name(), before["id"]);
    let text = fs::read_to_string(&file).unwrap();
    let number = format!("\"ifindex\": {}", before["ifindex"]);
    assert!(text.contains(&number), "{text}");
    let spoilt = [
        String::new(),
        "no JSON".to_owned(),
        text[..text.len() / 2].to_owned(),
        text.replace(&number, "\"ifindex\": 4000"),
        text.replace(&format!("\"id\": {}", before["id"]), "\"id\": 77"),
        GONE.to_owned(),
        DIRECTORY.to_owned(),
    ];
    for how in spoilt {
        store.lab.kill_agent("node1").unwrap();
        match how.as_str() {
            GONE => fs::remove_file(&file).unwrap(),
            DIRECTORY => {
                fs::remove_file(&file).unwrap();
                fs::create_dir(&file).unwrap();
            }
            text => fs::write(&file, text).unwrap(),
        }
        store.lab.restart("node1", &[]).unwrap();
        store.settle();
        assert_eq!(endpoint(&store), before, "{how:?}");
        vault.received();
        eventually("its datagrams go on", PATIENCE, || vault.received() > 0);
        let problems = store.lab.ask::<Value>("node1", &["status"]).unwrap()["problems"].to_string();
        assert!(problems.contains(&file) && problems.contains("shop/vault"), "{how:?} is not named: {problems}");
        let socket = store.lab.socket("node1");
        assert_eq!(lab::output(["--socket", &socket, "status", "--check"]).unwrap().status.code(), Some(1));
        assert_eq!(fs::read_to_string(&file).unwrap(), text, "{how:?}: it is not written anew");
    }
    store.lab.restart("node1", &[]).unwrap();
    let status: Value = store.lab.ask("node1", &["status"]).unwrap();
    assert!(!status["problems"].to_string().contains(&file), "{status}");
    vault.del().unwrap();
}

#[test]
fn a_policy_that_outgrew_its_table_stays_in_force_over_restarts() {
    let store = Store::folder("outgrown");
    let vault = Vault::new(&store, "outgrown");
    // From all pods on single ports: 20,002 entries for the vault alone, and as many more for each other identity.
    let from_all = "ingress: [{from: [{namespaceSelector: {}}], ports: [";
    store.put(&[pod("vault", "vault"), vault::ports("many", from_all, 20_000, 5000)]);
    store.settle();
    vault.add().unwrap();
    store.settle();
    assert_eq!(state(&store, "many"), "enforced");
    assert_eq!(entries(&store), 40_002, "of the attacker and of itself");
    vault.relabel_attacker("once");
    assert_eq!(entries(&store), 60_002);
    vault.relabel_attacker("twice");
    vault.received();
    for restart in [false, true, true] {
        if restart {
            store.lab.restart("node1", &["--kill"]).unwrap();
            store.settle();
        }
        assert_eq!(vault.received(), 0, "datagrams passed that the policy forbids, restart: {restart}");
        assert_eq!(entries(&store), 60_002, "who was allowed is, who does not fit is not");
    }
    let said = state(&store, "many");
    assert!(said.starts_with("in part: ") && said.contains("65536 fit"), "{said}");
    store.delete(Kind::Policy, "many");
    eventually("datagrams pass without a policy", PATIENCE, || vault.received() > 0);
    vault.del().unwrap();
}

#[test]
fn what_a_refused_policy_selects_is_closed_until_it_fits_and_new_policies_reach_whoever_has_too_many() {
    let store = Store::folder("refused");
    let vault = Vault::new(&store, "refused");
    store.put(&[pod("vault", "vault")]);
    vault.add().unwrap();
    eventually("datagrams pass without a policy", PATIENCE, || vault.received() > 0);
    a_refused_policy_closes(&store, &vault);
    a_refused_policy_is_tried_again(&store, &vault);
    a_new_policy_reaches_whoever_has_too_many(&store, &vault);
    vault.del().unwrap();
}

fn a_refused_policy_closes(store: &Store, vault: &Vault<'_>) {
    store.put(&[vault::ports("huge", "ingress: [{ports: [", 65_535, 1)]);
    store.settle();
    vault.received();
    let said = state(store, "huge");
    assert_eq!(vault.received(), 0, "datagrams passed that no version of the policy allows: {said}");
    assert!(said.starts_with("refused: ") && said.ends_with("; what it selects is closed"), "{said}");
    let problems = store.lab.ask::<Value>("node1", &["status"]).unwrap()["problems"].to_string();
    assert!(problems.contains("/manifests/resources-NetworkPolicy-shop-huge.json"), "no file is named: {problems}");
    store.delete(Kind::Policy, "huge");
    store.settle();
}

fn a_refused_policy_is_tried_again(store: &Store, vault: &Vault<'_>) {
    let first = vault::ports("first", "ingress: [{ports: [", 34_000, 1);
    let second = vault::ports("second", "ingress: [{ports: [{protocol: UDP, port: 4000}, ", 34_000, 31_536);
    store.put(&[first]);
    store.settle();
    store.put(&[second]);
    store.settle();
    vault.received();
    assert_eq!(state(store, "first"), "enforced");
    assert!(state(store, "second").starts_with("refused: "), "{}", state(store, "second"));
    assert_eq!(vault.received(), 0, "datagrams passed by a policy that is refused");
    store.delete(Kind::Policy, "first");
    store.settle();
    assert_eq!(state(store, "second"), "enforced");
    eventually("datagrams pass by the policy that fits now", PATIENCE, || vault.received() > 0);
    store.delete(Kind::Policy, "second");
    store.settle();
}

fn a_new_policy_reaches_whoever_has_too_many(store: &Store, vault: &Vault<'_>) {
    let to_all = "policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}], ports: [";
    store.put(&[vault::ports("many", to_all, 20_000, 1)]);
    store.settle();
    vault.relabel_attacker("once");
    vault.relabel_attacker("twice");
    assert_eq!(entries(store), 60_002);
    eventually("datagrams pass without a policy for ingress", PATIENCE, || vault.received() > 0);
    store.put(&[deny("vault")]);
    store.settle();
    vault.received();
    assert_eq!(state(store, "deny-vault"), "enforced");
    assert_eq!(vault.received(), 0, "datagrams passed that the new policy forbids");
    assert_eq!(entries(store), 60_002, "what was allowed is");
}

/// Ways to spoil a file that are no text.
const GONE: &str = "gone";
const DIRECTORY: &str = "a directory";

#[test]
fn no_order_of_events_opens_what_the_final_state_forbids_with_a_folder() {
    every_order(Store::folder("orders_f"));
}

#[test]
fn no_order_of_events_opens_what_the_final_state_forbids_with_etcd() {
    every_order(Store::etcd("orders_e"));
}

/// Random orders of what can happen, from fixed seeds; `CIRRI_ORDERS` asks for more of them.
fn every_order(store: Store) {
    let orders = std::env::var("CIRRI_ORDERS").ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    for seed in 0..orders {
        let story = vault::order(&store, seed);
        println!("{seed}: {story}");
    }
}

/// What `policy get` says of a policy.
fn state(store: &Store, policy: &str) -> String {
    let policies: Vec<Value> = store.lab.ask("node1", &["policy", "get", policy]).unwrap();
    policies[0]["state"].as_str().unwrap().to_owned()
}

/// How many entries the rule set of the vault has.
fn entries(store: &Store) -> u64 {
    endpoint(store)["entries"].as_u64().unwrap()
}

/// The labels of the vault.
fn labels(store: &Store) -> String {
    endpoint(store)["labels"].to_string()
}

/// The labels of the vault, if it had this one.
fn labels_with(store: &Store, app: &str) -> IdentityLabels {
    let now: Vec<String> = serde_json::from_value(endpoint(store)["labels"].clone()).unwrap();
    IdentityLabels::parse(&now.join(";").replace("k8s:app=open", &format!("k8s:app={app}"))).unwrap()
}

/// What the first node's agent knows of the vault; `null` if nothing.
fn endpoint(store: &Store) -> Value {
    let endpoints: Vec<Value> = store.lab.ask("node1", &["endpoint", "list"]).unwrap();
    endpoints.into_iter().find(|endpoint| endpoint["pod"] == "vault").unwrap_or_default()
}
