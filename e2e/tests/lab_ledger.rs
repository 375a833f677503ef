//! What is written about a running pod is lost: its files, their copies, what the kernel keeps of it. It keeps its
//! network as long as one of them is left; of which none is left is named and stays closed.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cirri_e2e::cni::{Attachment, assert_leftovers, endpoints, state_dir};
use cirri_e2e::kernel::{TestNamespace, names_in};
use cirri_e2e::lab::{self, Conversation, Lab, eventually};
use serde_json::{Value, json};

/// How long something may take that nothing announces.
const PATIENCE: Duration = Duration::from_secs(40);
/// How long nothing must arrive where nothing may pass.
const QUIET: Duration = Duration::from_secs(1);

/// `client` may reach `web`; `closed` takes nobody.
const SHOP: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {nodeName: node1, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: node1, containers: [{name: c, image: none, ports: [{containerPort: 80}]}]}
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
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
"#;
/// The pods of it.
const PODS: usize = 3;

#[test]
fn pods_whose_files_and_copies_are_all_lost_keep_their_network_their_rules_and_their_runtime() {
    let lab = Lab::up("ledger", 1, &[]).unwrap();
    lab.apply(SHOP).unwrap();
    let (place, other_place) = (TestNamespace::new(), TestNamespace::new());
    let mine = Attachment::new(&lab, "mine", place.namespace.path()).of("hand", "eth0");
    let other = Attachment::new(&lab, "other", other_place.namespace.path()).of("hand", "eth0");
    let added = mine.call("ADD", json!({})).unwrap();
    let mut open: Vec<Conversation> = conversations(&lab);
    let files: Vec<PathBuf> = files(&lab);
    assert_eq!(files.len(), 2 * (PODS + 1), "{files:?}");

    let spoil: [(&str, &dyn Fn()); 4] = [
        ("emptied", &|| files.iter().for_each(|file| fs::write(file, "").unwrap())),
        ("overwritten", &|| files.iter().for_each(|file| fs::write(file, "\u{0}no JSON").unwrap())),
        ("deleted", &|| files.iter().for_each(|file| fs::remove_file(file).unwrap())),
        ("deleted with their directories", &|| {
            ["endpoints", "endpoints.copy"].iter().for_each(|it| fs::remove_dir_all(state_dir(&lab).join(it)).unwrap());
        }),
    ];
    let mut left: Vec<Value> = Vec::new();
    for (how, spoil) in spoil {
        let before = endpoints(&lab);
        lab.kill_agent("node1").unwrap();
        spoil();
        lab.restart("node1", &[]).unwrap();
        assert_eq!(endpoints(&lab), before, "{how}");
        open.iter_mut().for_each(Conversation::exchange);
        assert_rules_hold(&lab, how);
        assert_eq!(mine.call("CHECK", json!({"prevResult": added})), Ok(Value::Null), "{how}");
        assert_eq!(mine.call("ADD", json!({})).unwrap()["ips"], added["ips"], "{how}: asked again, it is the same");
        // Nobody else gets an address that is in use.
        let ips = other.call("ADD", json!({})).unwrap()["ips"].clone();
        assert!(!left.contains(&ips), "{how}: {ips} are of one that has just left");
        left.push(ips);
        let addresses: Vec<Value> = endpoints(&lab).iter().map(|it| it["addresses"].clone()).collect();
        let unique = addresses.iter().filter(|it| addresses.iter().filter(|other| other == it).count() == 1);
        assert_eq!(unique.count(), PODS + 2, "{how}: {addresses:?}");
        assert_eq!(other.call("DEL", json!({})), Ok(Value::Null), "{how}");

        let problems = status(&lab)["problems"].to_string();
        let main = files.iter().filter(|file| file.parent().unwrap().ends_with("endpoints"));
        for file in main.map(|file| file.display().to_string()) {
            assert!(problems.contains(&file), "{how}: {file} is not named: {problems}");
        }
        assert!(problems.contains("shop/web is taken up"), "{how}: {problems}");
        assert!(!is_well(&lab), "{how}: status --check says that all is well");
        assert_eq!(self::files(&lab), files, "{how}: they are not written anew");
    }
    lab.restart("node1", &[]).unwrap();
    eventually("all is well when the files are there again", PATIENCE, || is_well(&lab));
    mine.call("GC", json!({"cni.dev/valid-attachments": []})).unwrap();
    assert_leftovers(&lab, PODS);
    assert_eq!(mine.call("DEL", json!({})), Ok(Value::Null));
    open.iter_mut().for_each(Conversation::exchange);
}

#[test]
fn a_container_of_which_nothing_is_left_is_named_and_closed_until_it_is_added_again() {
    let lab = Lab::up("stray", 1, &[]).unwrap();
    lab.apply(SHOP).unwrap();
    let place = TestNamespace::new();
    let mine = Attachment::new(&lab, "mine", place.namespace.path()).of("hand", "eth0");
    let added = mine.call("ADD", json!({})).unwrap();
    let mut open = conversations(&lab);
    let me = endpoints(&lab).into_iter().find(|it| it["container_id"] == "mine").unwrap();
    let (id, device) = (me["id"].to_string(), me["host_ifname"].as_str().unwrap());
    let client = lab.addresses().unwrap()["shop/client"][0];
    assert!(reaches(&place, client), "before");

    lab.kill_agent("node1").unwrap();
    for file in files(&lab).into_iter().filter(|file| file.file_stem().unwrap() == id.as_str()) {
        fs::remove_file(file).unwrap();
    }
    // An earlier version kept nothing there.
    let kept = kept(&lab).join(&id);
    if kept.exists() {
        fs::remove_file(kept).unwrap();
    }
    for round in 0..2 {
        lab.restart("node1", &[]).unwrap();
        assert_eq!(endpoints(&lab).len(), PODS, "{round}");
        let named = |problem: &Value| {
            let found = problem["found"].as_str().unwrap();
            problem["what"] == "endpoint" && problem["object"] == device && found.contains("hand/mine/eth0")
        };
        assert!(status(&lab)["problems"].as_array().unwrap().iter().any(named), "{round}: {:#}", status(&lab));
        assert!(!is_well(&lab), "{round}: status --check says that all is well");
        assert!(!reaches(&place, client), "{round}: it is open");
        assert_eq!(mine.code("CHECK", json!({"prevResult": added})), 3, "{round}");
        open.iter_mut().for_each(Conversation::exchange);
        assert_rules_hold(&lab, "of the others");
    }
    assert_eq!(mine.call("DEL", json!({})), Ok(Value::Null));
    eventually("all is well without it", PATIENCE, || is_well(&lab));
    mine.call("ADD", json!({})).unwrap();
    assert!(reaches(&place, client), "after it was added again");
    assert!(is_well(&lab));
    mine.call("DEL", json!({})).unwrap();
    assert_leftovers(&lab, PODS);
}

/// From `client` to `web`, one of each family.
fn conversations(lab: &Lab) -> Vec<Conversation> {
    let web = lab.addresses().unwrap()["shop/web"].clone();
    web.into_iter().map(|ip| Conversation::open(lab, "shop/client", "shop/web", ip).unwrap()).collect()
}

fn assert_rules_hold(lab: &Lab, how: &str) {
    for (to, verdict) in [("shop/web", "allowed"), ("shop/closed", "denied")] {
        let verdicts = lab.verdicts_wanted(verdict, "shop/client", to, 80).unwrap();
        assert!(verdicts.values().all(|it| it == verdict), "{how}: client to {to}: {verdicts:?}");
    }
}

/// Whether an echo comes back.
fn reaches(from: &TestNamespace, to: IpAddr) -> bool {
    let (to, seconds) = (to.to_string(), QUIET.as_secs().to_string());
    let output = from.namespace.run(|| Command::new("ping").args(["-c", "1", "-W", &seconds, &to]).output());
    output.unwrap().unwrap().status.success()
}

/// Every file and every copy of the first node's endpoints, sorted.
fn files(lab: &Lab) -> Vec<PathBuf> {
    let in_place = |place: &str| {
        let directory = state_dir(lab).join(place);
        names_in(&directory).into_iter().map(move |name| directory.join(name)).collect::<Vec<_>>()
    };
    ["endpoints", "endpoints.copy"].into_iter().flat_map(in_place).collect()
}

/// Where the kernel keeps what is known of them.
fn kept(lab: &Lab) -> PathBuf {
    Path::new("/sys/fs/bpf/cirri").join(format!("lab-{}-node1/endpoints", lab.name()))
}

fn status(lab: &Lab) -> Value {
    lab.ask("node1", &["status"]).unwrap()
}

fn is_well(lab: &Lab) -> bool {
    lab::output(["--socket", &lab.socket("node1"), "status", "--check"]).unwrap().status.success()
}
