//! What of a lab is on this machine, and so which labs there are: up, half up, or what is left of them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::state::{LabName, ROOT};
use super::{cgroup, lock, logs, netns};

/// Where the agents pin their maps and programs.
pub const PIN_ROOT: &str = "/sys/fs/bpf/cirri";

/// Whether anything of a lab is there, up or crashed.
pub fn exists(name: &LabName) -> bool {
    (name.directory().exists() && !logs::alone(&name.directory()))
        || !netns::list(&name.prefix()).is_empty()
        || !pins(name).is_empty()
        || cgroup::of_lab(name).is_ok_and(|group| group.exists())
}

/// The labs of this machine, also those of which only a namespace, pins or a control group is left.
pub fn all() -> Vec<LabName> {
    // Logs alone are what is kept of a lab that did not come up.
    let is_lab = |name: &String| !logs::alone(&Path::new(ROOT).join(name));
    let directories = directories(Path::new(ROOT)).into_iter().filter(is_lab);
    let namespaces = netns::list("cirri-").into_iter().filter_map(|name| of_namespace(&name).map(str::to_owned));
    let seen: BTreeSet<LabName> = directories.chain(namespaces).filter_map(|name| name.parse().ok()).collect();

    let pins = directories_named(PIN_ROOT.as_ref(), of_pins);
    let groups = cgroup::hierarchy().map(|root| directories_named(&root, of_group)).unwrap_or_default();
    let left = pins.into_iter().chain(groups).filter(|name| !seen.contains(name) && !is_elsewhere(name));
    let left: Vec<LabName> = left.collect();
    let all: BTreeSet<LabName> = seen.into_iter().chain(left).collect();
    all.into_iter().collect()
}

/// The pin directories of a lab's agents.
pub fn pins(name: &LabName) -> Vec<PathBuf> {
    let prefix = name.bpf_instance("");
    let entries = fs::read_dir(PIN_ROOT).into_iter().flatten().flatten();
    entries.filter(|e| e.file_name().as_bytes().starts_with(prefix.as_bytes())).map(|e| e.path()).collect()
}

/// Whether it lives in another mount namespace, whose files are not seen here: pins and control groups are one for all.
/// One without processes does as long as somebody makes or removes it: see [`super::lock`].
fn is_elsewhere(name: &LabName) -> bool {
    let mounts = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let own = mounts("self");
    let group = cgroup::of_lab(name).unwrap_or_default();
    lock::is_held(&group)
        || cgroup::inside(&group)
            .iter()
            .filter_map(|process| mounts(&process.pid.to_string()))
            .any(|it| Some(it) != own)
}

fn directories(below: &Path) -> Vec<String> {
    let entries = fs::read_dir(below).into_iter().flatten().flatten();
    let entries = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn directories_named(below: &Path, whose: fn(&str) -> Option<&str>) -> Vec<LabName> {
    directories(below).iter().filter_map(|name| whose(name)?.parse().ok()).collect()
}

/// The lab of a network namespace: `cirri-<lab>-` and something that a lab makes. Others' names begin so, too.
fn of_namespace(name: &str) -> Option<&str> {
    let (lab, what) = name.strip_prefix("cirri-")?.split_once('-')?;
    let is_node = || what.strip_prefix("node").is_some_and(|number| number.parse::<u16>().is_ok());
    (["net", "world"].contains(&what) || what.starts_with("pod-") || is_node()).then_some(lab)
}

/// The lab of an agent's pins: `lab-<lab>-<node>`.
fn of_pins(name: &str) -> Option<&str> {
    name.strip_prefix("lab-")?.split_once('-').map(|(lab, _)| lab)
}

/// The lab of a control group: `cirri-lab-<lab>`.
fn of_group(name: &str) -> Option<&str> {
    name.strip_prefix("cirri-lab-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_is_known_by_whatever_is_left_of_it_and_nothing_of_others_is_taken_for_one() {
        for (name, lab) in [
            ("cirri-a-net", Some("a")),
            ("cirri-a-world", Some("a")),
            ("cirri-a_b-node12", Some("a_b")),
            ("cirri-a-pod-shop-web", Some("a")),
            ("cirri-bench-12-x", None),
            ("cirri-a-nodex", None),
            ("cirri-net", None),
        ] {
            assert_eq!(of_namespace(name), lab, "{name}");
        }
        assert_eq!((of_pins("lab-a-node-1"), of_pins("lab-a"), of_pins("default")), (Some("a"), None, None));
        assert_eq!((of_group("cirri-lab-a"), of_group("cirri-bench-1")), (Some("a"), None));
    }
}
