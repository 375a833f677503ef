//! A lab on a machine that is used for other things, too. Needs root.
//!
//! What concerns the machine's named namespaces as a whole runs in a mount namespace with a `/run` of its own.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use cirri_e2e::lab::{self, Lab, eventually};

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
        let verdicts = lab.verdicts_wanted("allowed", "world", "default/web", 80).unwrap();
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

/// What the other tests ask, on a machine that is slow.
#[test]
fn who_is_late_counts_as_allowed_and_whose_first_packets_were_dropped_does_not() {
    const PATIENCE: Duration = Duration::from_secs(60);
    let lab = Lab::up("late", 1, &[]).unwrap();
    let pod = "kind: Pod\napiVersion: v1\nmetadata: {name: web}\n\
               spec: {containers: [{name: c, ports: [{containerPort: 80}]}]}\n";
    let deny = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny}\n\
                spec: {podSelector: {}, policyTypes: [Ingress]}\n";
    // A try has a port of its own in each family. After two the prober asks again.
    let tries = |verdict: &str| {
        let flows = lab.flows("node1", &["--verdict", verdict]).unwrap();
        let to_web = flows.iter().filter(|flow| flow["destination"]["port"] == 80);
        to_web.map(|flow| flow["source"].to_string()).collect::<BTreeSet<_>>().len()
    };
    let mended = |verdict: &str, mend: &dyn Fn()| {
        let before = tries(verdict);
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| lab.verdicts_wanted("allowed", "world", "default/web", 80).unwrap());
            eventually("it is asked again", PATIENCE, || tries(verdict) > before + 4);
            mend();
            asked.join().unwrap()
        })
    };
    lab.apply(&[pod, deny].concat()).unwrap();
    let dropped = mended("dropped", &|| lab.apply(pod).unwrap());
    assert!(dropped.len() == 2 && dropped.values().all(|it| it.contains("POLICY_DENIED")), "{dropped:?}");

    let output = lab::run(["lab", "list", "--name", lab.name(), "-o", "json"]).unwrap();
    let listed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let server = listed[0]["pods"][0]["programs"][0]["pid"].to_string();
    let signal = |name: &str| assert!(Command::new("kill").args([name, &server]).status().unwrap().success());
    signal("-STOP");
    let late = mended("forwarded", &|| signal("-CONT"));
    assert!(late.len() == 2 && late.values().all(|it| it == "allowed"), "{late:?}");
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

/// What a script may use of a lab's commands: `code WORD COMMAND…` prints the word and how the command ended, `groups`
/// takes the control groups away from the script.
const TOOLS: &str = r#"
code() { word=$1; shift; code=0; "$@" || code=$?; echo "$word $code"; }
groups() { for place in $(awk '$3 == "cgroup2" { print $2 }' /proc/mounts); do umount -l "$place"; done; }
lab() { verb=$1; shift; "$CIRRI" lab "$verb" --name "$NAME" "$@"; }
agent() { grep '^State:' "/proc/$(cat "/run/cirri/lab/$NAME/nodes/node1/agent.pid")/status" | grep -v '[ZX] (' > /dev/null && echo RUNS; }
"#;

/// The part of what a script said between two words.
fn between<'a>(said: &'a str, from: &str, to: &str) -> &'a str {
    let (_, rest) = said.split_once(from).unwrap_or_else(|| panic!("no {from}: {said}"));
    rest.split_once(to).unwrap_or_else(|| panic!("no {to}: {said}")).0
}

#[test]
fn without_control_groups_a_lab_is_left_alone_or_goes_and_none_is_begun() {
    let lab = Lab::named("groups");
    let script = "
        mount -t tmpfs none /run
        trap 'lab down || true' EXIT
        lab up
        groups
        code RESTART lab restart node1
        agent
        code DOWN lab down
        ls /run/netns /run/cirri/lab; echo LEFT
        code AGAIN lab down
        code UP lab up
        ls /run/netns; echo MADE";
    let said = in_own_run(&lab, &[TOOLS, script].concat());
    let mount = "no control groups of version 2 are mounted";
    assert!(between(&said, "next:", "RESTART 1").contains(mount), "{said}");
    assert!(between(&said, "RESTART 1", "DOWN 1").contains("RUNS"), "the agent was stopped all the same: {said}");
    assert!(between(&said, "RUNS", "DOWN 1").contains(mount), "{said}");
    assert_eq!(between(&said, "DOWN 1\n", "LEFT").trim(), "/run/cirri/lab:\n\n/run/netns:", "{said}");
    assert!(between(&said, "LEFT", "AGAIN 0").contains("there is no lab"), "{said}");
    assert!(between(&said, "AGAIN 0", "UP 1").contains(mount), "{said}");
    assert_eq!(between(&said, "UP 1\n", "MADE"), "", "{said}");
}

#[test]
fn without_a_free_inode_or_on_a_read_only_disk_what_is_wrong_is_named_and_the_lab_can_go() {
    let lab = Lab::named("inodes");
    let script = "
        mount -t tmpfs -o nr_inodes=500 none /run
        trap 'lab down || true' EXIT
        printf 'kind: Pod\napiVersion: v1\nmetadata: {name: web}\nspec: {containers: [{name: c}]}\n' > /run/web.yaml
        lab up
        number=0; while : 2> /dev/null > /run/fill$number; do number=$((number + 1)); done
        code APPLY lab apply -f /run/web.yaml
        code RESTART lab restart node1
        agent
        code DOWN lab down
        ls /run/netns; echo LEFT
        rm /run/fill*
        lab up
        mount --rbind /run /run
        mount -o remount,bind,ro /run
        code RESTART2 lab restart node1
        agent
        code DOWN2 lab down
        mount -o remount,bind,rw /run
        code AGAIN lab down
        ls /run/netns; echo LEFT2";
    // A shell ends at a redirection that fails, if the command is one of its own.
    let script = script.replace(": 2> /dev/null > /run/fill$number", "touch /run/fill$number 2> /dev/null");
    let said = in_own_run(&lab, &[TOOLS, &script].concat());
    let refused = between(&said, "next:", "APPLY 1");
    assert!(["/run/cirri/lab", "inodes", "remount,nr_inodes"].iter().all(|word| refused.contains(word)), "{said}");
    assert!(between(&said, "APPLY 1", "RESTART 1").contains("inodes"), "{said}");
    assert!(between(&said, "RESTART 1", "DOWN 0").contains("RUNS"), "{said}");
    assert_eq!(between(&said, "DOWN 0\n", "LEFT"), "", "{said}");
    let read_only = "is mounted read-only";
    assert!(between(&said, "LEFT", "RESTART2 1").contains(read_only), "{said}");
    assert!(between(&said, "RESTART2 1", "DOWN2 1").contains("RUNS"), "{said}");
    assert!(between(&said, "RESTART2 1", "DOWN2 1").contains(read_only), "{said}");
    assert_eq!(between(&said, "AGAIN 0\n", "LEFT2"), "", "{said}");
}

#[test]
fn one_lab_that_does_not_go_keeps_no_other_and_little_that_is_left_is_seen() {
    let lab = Lab::named("all");
    // Nothing of this machine's own labs is to be seen here.
    let script = "
        mount -t tmpfs none /run
        mount -t tmpfs none /sys/fs/bpf
        mkdir /run/cirri; touch /run/cirri/lab
        code FILE lab up
        rm /run/cirri/lab
        groups
        mkdir -p /run/cirri/lab/a_held /sys/fs/bpf/cirri/lab-c_pins-node1
        ip netns add cirri-b_left-world
        code ALL flock /run/cirri/lab/a_held.lock \"$CIRRI\" lab down --all
        ls /run/cirri/lab /run/netns /sys/fs/bpf/cirri; echo LEFT";
    let said = in_own_run(&lab, &[TOOLS, script].concat());
    assert!(between(&said, "", "FILE 1").contains("cannot make /run/cirri/lab (a file stands"), "{said}");
    let all = between(&said, "FILE", "ALL 1");
    assert!(all.contains("another command is changing the lab \"a_held\""), "{said}");
    let left = between(&said, "ALL 1\n", "LEFT");
    assert!(left.contains("a_held") && !left.contains("b_left") && !left.contains("c_pins"), "{said}");
}

#[test]
fn of_two_who_find_no_bpf_file_system_one_mounts_it() {
    // The other one is this script: it has the lock, as whoever is about to mount.
    const BOTH: &str = r#"
        exec 2>&1
        while umount --lazy /sys/fs/bpf 2>/dev/null; do :; done
        exec 9</sys/fs/bpf
        flock 9
        inode=$(stat --format %i /sys/fs/bpf)
        "$CIRRI" lb backend --device lo 9<&- &
        until grep -- "-> FLOCK .*:$inode " /proc/locks || ! kill -0 $!; do sleep 0.1; done
        mount -t bpf bpf /sys/fs/bpf
        exec 9<&-
        wait $!
        grep " /sys/fs/bpf " /proc/self/mountinfo
    "#;
    let mut both = Command::new("unshare");
    both.args(["--mount", "--propagation", "private", "--net", "sh", "-euc", BOTH]);
    let output = both.env("CIRRI", lab::binary().unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}\n{said}", output.status);
    assert_eq!(said.matches(" /sys/fs/bpf ").count(), 1, "{said}");
}

#[test]
fn a_lab_that_another_mount_namespace_makes_or_removes_is_not_taken_for_one_that_crashed() {
    let lab = Lab::named("elsewhere");
    let script = "
        mount -t tmpfs none /run
        group=$(awk '$3 == \"cgroup2\" { print $2; exit }' /proc/mounts)/cirri-lab-$NAME
        mkdir $group
        trap 'rmdir $group' EXIT
        \"$CIRRI\" lab list; echo LEFT
        flock $group \"$CIRRI\" lab list; echo BUSY
        code DOWN flock $group \"$CIRRI\" lab down --name \"$NAME\"";
    let said = in_own_run(&lab, &[TOOLS, script].concat());
    let named = format!("lab {} (", lab.name());
    assert!(between(&said, "", "LEFT").contains(&named), "what a crash left is seen: {said}");
    assert!(!between(&said, "LEFT", "BUSY").contains(&named), "{said}");
    assert!(between(&said, "BUSY", "DOWN 1").contains("another command is changing"), "{said}");
}
