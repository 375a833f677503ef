//! `cirri lab apply` on a real lab: what is made anew, what is left alone, what goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use cirri_e2e::lab::{self, Lab};

const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\n";

#[test]
fn a_pod_is_made_anew_when_its_program_or_node_changes_and_goes_on_when_its_labels_do() {
    let lab = Lab::up("apply", 2, &[]).unwrap();
    let kept = pod("kept", "app: kept", "node2", "sleep 1000");
    let first = pod("web", "app: web", "node1", "sleep 1000");
    lab.apply(&[NAMESPACE, &kept, &first].concat()).unwrap();
    let before = programs(&lab);
    let identity = identities(&lab)["shop/web"];

    lab.apply(&[NAMESPACE, &kept, &pod("web", "app: changed", "node1", "sleep 1000")].concat()).unwrap();
    assert_eq!(programs(&lab), before, "the same processes run");
    assert_ne!(identities(&lab)["shop/web"], identity, "as somebody else");

    lab.apply(&[NAMESPACE, &kept, &pod("web", "app: web", "node1", "sleep 2000")].concat()).unwrap();
    let restarted = programs(&lab);
    assert_ne!(restarted["shop/web"].1, before["shop/web"].1, "another process runs");
    assert_eq!(restarted["shop/kept"], before["shop/kept"]);

    lab.apply(&[NAMESPACE, &kept, &pod("web", "app: web", "node2", "sleep 2000")].concat()).unwrap();
    let moved = programs(&lab);
    assert_eq!(moved["shop/web"].0, "node2");
    assert_eq!(moved["shop/kept"], before["shop/kept"]);
    let endpoints: Vec<serde_json::Value> = lab.ask("node1", &["endpoint", "list"]).unwrap();
    assert!(endpoints.is_empty(), "nothing of it stays on the node it left: {endpoints:?}");
    let verdicts = lab.verdicts_wanted("allowed", "shop/kept", "shop/web", 80).unwrap();
    assert!(verdicts.values().all(|verdict| verdict == "allowed"), "{verdicts:?}");
}

#[test]
fn the_manifests_of_a_folder_are_the_whole_truth_and_none_empties_the_lab() {
    let lab = Lab::up("folder", 1, &[]).unwrap();
    let folder = Folder::new(lab.name());
    let list = r#"{"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "shop"},
         "spec": {"containers": [{"name": "c", "ports": [{"containerPort": 80}]}]}}]}"#;
    folder.write("world.json", list);
    folder.write("notes.txt", "kind: nonsense");
    folder.write("backup.yaml~", "{");
    folder.apply(&lab).unwrap();
    assert_eq!(lab.list().unwrap().pods.len(), 1);

    // Names as long as they may be: more than a file's can have.
    let (long, meta) = ("w".repeat(252), "metadata: {namespace: shop, name:");
    let policy = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n{meta} {long}}}\nspec: {{podSelector: {{}}}}\n---\n"
    );
    let pod = format!(
        "apiVersion: v1\nkind: Pod\n{meta} {long}}}\nspec: {{containers: [{{name: c, ports: [{{containerPort: 80}}]}}]}}\n"
    );
    folder.write("long.yaml", &[policy, pod].concat());
    folder.apply(&lab).unwrap();
    let before = programs(&lab);
    assert_eq!(before.len(), 2, "{before:?}");
    folder.apply(&lab).unwrap();
    assert_eq!(programs(&lab), before, "nothing changed");
    fs::remove_file(folder.0.join("long.yaml")).unwrap();
    folder.apply(&lab).unwrap();
    let policies: Vec<serde_json::Value> = lab.ask("node1", &["policy", "get"]).unwrap();
    assert_eq!((programs(&lab).len(), policies.len()), (1, 0), "{policies:?}");

    // What somebody put among the lab's own files: to read it would take for ever.
    let pipe = format!("/run/cirri/lab/{}/nodes/node1/manifests/Pod.shop.pipe.yaml", lab.name());
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let apply =
        ["60", lab::binary().unwrap().to_str().unwrap(), "lab", "apply", "--name", lab.name(), "-f"].map(String::from);
    let stopped = Command::new("timeout").args(apply).arg(&folder.0).output().unwrap();
    let said = String::from_utf8_lossy(&stopped.stderr);
    assert!(
        stopped.status.code() == Some(1) && said.contains(&pipe) && said.contains("no regular file"),
        "{stopped:?}"
    );
    fs::remove_file(pipe).unwrap();

    folder.write("broken.yaml", "kind: Pod\nspec: [");
    let refused = folder.apply(&lab).unwrap_err().to_string();
    assert!(refused.contains("broken.yaml") && refused.contains("nothing was changed"), "{refused}");
    assert_eq!(lab.list().unwrap().pods.len(), 1);

    // As a volume leaves it whose content went away: it says that there is something, and not what.
    for file in ["world.json", "broken.yaml"] {
        fs::remove_file(folder.0.join(file)).unwrap();
    }
    std::os::unix::fs::symlink("..data/world.json", folder.0.join("world.json")).unwrap();
    let refused = folder.apply(&lab).unwrap_err().to_string();
    assert!(refused.contains("world.json: cannot be read") && refused.contains("nothing was changed"), "{refused}");
    assert_eq!(lab.list().unwrap().pods.len(), 1);

    fs::remove_file(folder.0.join("world.json")).unwrap();
    folder.apply(&lab).unwrap();
    assert!(lab.list().unwrap().pods.is_empty());
    let endpoints: Vec<serde_json::Value> = lab.ask("node1", &["endpoint", "list"]).unwrap();
    assert!(endpoints.is_empty(), "{endpoints:?}");
}

#[test]
fn what_an_apply_that_was_killed_has_made_is_known_and_goes() {
    let lab = Lab::up("killed", 1, &[]).unwrap();
    let folder = Folder::new(lab.name());
    let pods = |count: usize| {
        let pod = |number| {
            format!(
                "kind: Pod\napiVersion: v1\nmetadata: {{name: p{number}}}\nspec: {{containers: [{{name: c}}]}}\n---\n"
            )
        };
        (0..count).map(pod).collect::<String>()
    };
    let prefix = format!("cirri-{}-pod-", lab.name());
    let entries = |path: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let spaces =
        || -> BTreeSet<String> { entries("/run/netns").into_iter().filter(|name| name.starts_with(&prefix)).collect() };
    let recorded = || -> BTreeSet<String> {
        let pods = format!("/run/cirri/lab/{}/pods", lab.name());
        let read = |pod: String| fs::read_to_string(format!("{pods}/{pod}/pod.json")).ok();
        let records = entries(&pods).into_iter().filter_map(read);
        let netns = |text: String| {
            let record: serde_json::Value = serde_json::from_str(&text).unwrap();
            record["netns"].as_str().unwrap().trim_start_matches("/run/netns/").to_owned()
        };
        records.map(netns).collect()
    };
    folder.write("all.yaml", &pods(12));
    // Killed in the moment in which the first namespaces are there, again and again.
    for _ in 0..3 {
        let mut apply = Command::new(lab::binary().unwrap())
            .args(["lab", "apply", "--name", lab.name(), "-f"])
            .arg(&folder.0)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while spaces().is_empty() && apply.try_wait().unwrap().is_none() {
            std::hint::spin_loop();
        }
        apply.kill().unwrap();
        apply.wait().unwrap();
        assert!(!spaces().is_empty(), "it was killed too early to show anything");
        let unknown: Vec<String> = spaces().difference(&recorded()).cloned().collect();
        assert!(unknown.is_empty(), "nobody's record names them: {unknown:?}");
        folder.write("all.yaml", "# none\n");
        folder.apply(&lab).unwrap();
        assert_eq!(spaces(), BTreeSet::new());
        folder.write("all.yaml", &pods(12));
    }
    // As a lab of an older version may have them.
    let left = Command::new("ip").args(["netns", "add", &format!("{prefix}default-left")]).status();
    assert!(left.unwrap().success());
    folder.apply(&lab).unwrap();
    assert_eq!((spaces().len(), spaces()), (12, recorded()));
}

/// A directory of manifests that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("cirri-e2e-folder-{name}"));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.0.join(file), text).unwrap();
    }

    fn apply(&self, lab: &Lab) -> Result<(), lab::LabError> {
        let folder = self.0.display().to_string();
        lab::run(["lab", "apply", "--name", lab.name(), "--wait", "-f", &folder]).map(drop)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A pod that runs a shell command next to an echo server on port 80.
fn pod(name: &str, labels: &str, node: &str, command: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{{labels}}}}}\n\
         spec:\n  nodeName: {node}\n  containers:\n  - {{name: c, command: [sh, -c, 'exec {command}']}}\n  \
         - {{name: echo, ports: [{{containerPort: 80}}]}}\n---\n"
    )
}

/// Each pod's node and the ids of its processes.
fn programs(lab: &Lab) -> BTreeMap<String, (String, Vec<u64>)> {
    let described = |pod: &serde_json::Value| {
        let ids = pod["programs"].as_array().unwrap().iter().map(|program| program["pid"].as_u64().unwrap());
        (pod["node"].as_str().unwrap().to_owned(), ids.collect())
    };
    each_pod(lab, described)
}

fn identities(lab: &Lab) -> BTreeMap<String, u64> {
    each_pod(lab, |pod| pod["identity"].as_u64().unwrap())
}

fn each_pod<T>(lab: &Lab, what: impl Fn(&serde_json::Value) -> T) -> BTreeMap<String, T> {
    let output = lab::run(["lab", "list", "--name", lab.name(), "-o", "json"]).unwrap();
    let labs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let name =
        |pod: &serde_json::Value| format!("{}/{}", pod["namespace"].as_str().unwrap(), pod["name"].as_str().unwrap());
    labs[0]["pods"].as_array().unwrap().iter().map(|pod| (name(pod), what(pod))).collect()
}
