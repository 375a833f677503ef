//! A lab on a machine that is used for other things, too. Needs root.
//!
//! What concerns the machine's named namespaces as a whole runs in a mount namespace with a `/run` of its own.

use std::process::Command;

use cirri_e2e::lab::{self, Lab};

/// Brings a lab up, changes it and takes it down, in a mount namespace in which nobody has named a namespace yet.
/// `{before}`, `{during}` and `{after}` are what somebody else does with `ip netns`.
const LIFE: &str = r#"
mount -t tmpfs none /run
trap '"$CIRRI" lab down --name "$NAME"' EXIT
pod() { printf 'kind: Pod\napiVersion: v1\nmetadata: {name: web}\nspec: {containers: [{name: c, ports: [{containerPort: %s}]}]}\n' "$1" > /run/web.yaml; }
{before}
"$CIRRI" lab up --name "$NAME"
pod 80; "$CIRRI" lab apply --name "$NAME" -f /run/web.yaml --wait
{during}
pod 81; "$CIRRI" lab apply --name "$NAME" -f /run/web.yaml --wait
"$CIRRI" lab down --name "$NAME"
{after}
trap - EXIT
if grep "/run/netns/cirri-$NAME-" /proc/self/mountinfo; then exit 1; fi
echo LEFT
ls /run/netns
"#;

/// Runs [`LIFE`] with these commands of somebody else; answers the names that are left, and fails with all it said.
fn life(name: &str, before: &str, during: &str, after: &str) -> Vec<String> {
    let lab = Lab::named(name);
    let script = LIFE.replace("{before}", before).replace("{during}", during).replace("{after}", after);
    let said = in_own_run(&lab, &script);
    let (_, left) = said.split_once("LEFT\n").unwrap();
    left.lines().map(str::to_owned).collect()
}

/// Runs a shell script in a mount namespace of its own, which must succeed; what it printed, errors included.
fn in_own_run(lab: &Lab, script: &str) -> String {
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-euc", &format!("exec 2>&1; {script}")])
        .env("CIRRI", lab::binary().unwrap())
        .env("NAME", lab.name())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}\n{said}", output.status);
    said
}

const ADD: &str = "ip netns add other";

#[test]
fn a_namespace_that_somebody_names_while_a_lab_is_up_keeps_it_from_nothing() {
    assert_eq!(life("during", "", ADD, ""), ["other"]);
}

#[test]
fn a_namespace_that_somebody_names_before_or_after_a_lab_stays_theirs() {
    assert_eq!(life("before", ADD, "", ""), ["other"]);
    assert_eq!(life("after", "", "", "ip netns add other; ip netns del other; ip netns add more"), ["more"]);
}

#[test]
fn what_was_mounted_before_the_directory_was_bound_over_itself_is_found_and_removed() {
    // What iproute2 did to the namespaces of an older version of the lab, and two of it at once to each other's.
    let bind = "mount --make-rprivate /run/netns; mount --rbind /run/netns /run/netns; mount --make-rshared /run/netns";
    assert_eq!(life("hidden", "", bind, ADD), ["other"]);
    assert_eq!(life("twice", ADD, &format!("{bind}; {bind}"), ""), ["other"]);
}

#[test]
fn what_the_callers_environment_says_to_its_own_agent_is_not_for_a_labs() {
    let lab = Lab::named("environ");
    let up = Command::new(lab::binary().unwrap())
        .args(["lab", "up", "--name", lab.name()])
        .env("CIRRI_NODE_NAME", "somebody")
        .env("CIRRI_STORE_KIND", "etcd")
        .env("CIRRI_SOCKET", "/run/somewhere.sock")
        .output()
        .unwrap();
    assert!(up.status.success(), "{up:?}");
    let status: serde_json::Value = lab.ask("node1", &["status"]).unwrap();
    assert_eq!(status["node"], "node1", "{status:#}");
}

#[test]
fn a_full_disk_is_named_and_the_log_that_the_error_points_to_is_there() {
    // Too small for etcd's log, which it gives back when it fails; too small for an agent's state.
    for (name, size, nodes) in [("fulletcd", "40m", 2), ("fullagent", "24k", 1)] {
        let lab = Lab::named(name);
        let said = in_own_run(
            &lab,
            &format!(
                "mount -t tmpfs -o size={size} none /run
                 if \"$CIRRI\" lab up --name \"$NAME\" --nodes {nodes} > /tmp/$NAME 2>&1; then exit 9; fi
                 cat /tmp/$NAME
                 for log in $(sed -n 's/.*log: \\([^)]*\\)).*/\\1/p' /tmp/$NAME); do test -f $log; echo KEPT; done
                 rm /tmp/$NAME
                 echo LISTED; \"$CIRRI\" lab list
                 \"$CIRRI\" lab down --name \"$NAME\"; ls /run/cirri/lab"
            ),
        );
        assert!(said.contains("no room on the disk") && said.contains("try again"), "{said}");
        let (failed, listed) = said.split_once("LISTED\n").unwrap();
        assert!(failed.contains("KEPT") || !failed.contains("log:"), "{said}");
        assert!(listed.contains("there are no labs"), "logs alone are no lab: {said}");
        assert!(listed.ends_with("there is no lab \"NAME\"\n".replace("NAME", lab.name()).as_str()), "{said}");
    }
}

#[test]
fn the_logs_of_a_lab_that_did_not_come_up_stay_until_its_next_command() {
    let lab = Lab::named("keeplogs");
    let pod = "kind: Pod\napiVersion: v1\nmetadata: {name: web}\nspec:\n  containers: [{name: c, command: [sh, -c, \
               'echo the reason; exit 1'], ports: [{containerPort: 80}]}]\n";
    let manifest = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    std::fs::write(manifest.path(), pod).unwrap();
    let file = manifest.path().display().to_string();
    let error = lab::run(["lab", "up", "--name", lab.name(), "-f", &file]).unwrap_err().to_string();
    let log = format!("/run/cirri/lab/{}/pods/default_web/c.log", lab.name());
    assert!(error.contains("the reason") && error.contains(&log), "{error}");
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "the reason\n");
    lab::run(["lab", "up", "--name", lab.name()]).unwrap();
    assert!(!std::path::Path::new(&log).exists(), "a new lab has its own");
}

#[test]
fn a_pod_whose_device_is_gone_or_that_its_agent_does_not_know_is_not_running_and_made_anew() {
    let lab = Lab::up("device", 1, &[]).unwrap();
    let pod = "kind: Pod\napiVersion: v1\nmetadata: {name: web}\nspec: {containers: [{name: c, ports: [{containerPort: 80}]}]}\n";
    lab.apply(pod).unwrap();
    let state = || lab.list().unwrap().pods[0].state.clone();
    assert_eq!(state(), "running");
    lab::printed(&lab.netns("default/web").unwrap(), &["ip", "link", "del", "eth0"]);
    assert_eq!(state(), "detached");
    lab.apply(pod).unwrap();
    assert_eq!(state(), "running");
    let allowed = || {
        let verdicts = lab.verdicts("world", "default/web", 80).unwrap();
        assert!(verdicts.values().all(|verdict| verdict == "allowed"), "{verdicts:?}");
    };
    allowed();

    // All three places where an agent keeps what it knows of a container.
    lab.kill_agent("node1").unwrap();
    let refused = lab.try_apply(pod).unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    let advice = format!("cirri lab restart --name {} node1", lab.name());
    assert!(refused.status.code() == Some(3) && said.contains(&advice), "{refused:?}");
    let kept = format!("/run/cirri/lab/{}/nodes/node1/state", lab.name());
    for place in std::fs::read_dir(kept).unwrap().map(|entry| entry.unwrap()) {
        if place.file_name().to_string_lossy().starts_with("endpoints") {
            std::fs::remove_dir_all(place.path()).unwrap();
        }
    }
    let pins = format!("/sys/fs/bpf/cirri/lab-{}-node1", lab.name());
    let removed = Command::new("find").args([&pins, "-path", "*endpoints*", "-delete"]).status().unwrap();
    assert!(removed.success());
    lab.restart("node1", &[]).unwrap();
    assert_eq!(state(), "detached");
    lab.apply(pod).unwrap();
    assert_eq!(state(), "running");
    allowed();
}

#[test]
fn nodes_may_have_dots_and_long_names_and_one_that_is_too_long_is_refused_before_anything_is_made() {
    let lab = Lab::named("nodename");
    let node = |name: &str| format!("kind: Node\napiVersion: v1\nmetadata: {{name: {name}}}\n---\n");
    let directory = tempfile::tempdir().unwrap();
    let up = |nodes: &[&str]| {
        std::fs::write(directory.path().join("nodes.yaml"), nodes.iter().map(|name| node(name)).collect::<String>())
            .unwrap();
        lab::output(["lab", "up", "--name", lab.name(), "-f", &directory.path().display().to_string()]).unwrap()
    };
    let refused = up(&["node.one", &"n".repeat(90)]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(["nodes.yaml: ", "metadata.name: ", "has room for "].iter().all(|word| said.contains(word)), "{said}");
    assert!(!std::path::Path::new("/run/cirri/lab").join(lab.name()).exists());
    let long = "n".repeat(50);
    let came = up(&["node.one", &long]);
    assert!(came.status.success(), "{}", String::from_utf8_lossy(&came.stderr));
    for name in ["node.one", &long] {
        let status: serde_json::Value = lab.ask(name, &["status"]).unwrap();
        assert_eq!(status["node"], name, "{status:#}");
    }
}
