//! What an instance has on the BPF file system, seen and altered by `bpftool`, as somebody else would.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

/// The directory of an instance: endpoints, links, programs, and the maps under the hash of the ABI.
#[derive(Clone, Debug)]
pub struct Pinned(pub PathBuf);

/// Key and value of an entry, as words of hexadecimal bytes.
pub type Words = (Vec<String>, Vec<String>);

impl Pinned {
    /// The names of all pins.
    pub fn names(&self) -> String {
        let mut all = BTreeSet::new();
        for directory in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            for file in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
                all.insert(file.path().strip_prefix(&self.0).unwrap().display().to_string());
            }
        }
        format!("{:#?}", all)
    }

    /// The directory of the maps.
    pub fn maps(&self) -> PathBuf {
        let mut entries = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path());
        let is_other = |path: &PathBuf| ["endpoints", "links", "programs"].iter().any(|name| path.ends_with(name));
        entries.find(|path| !is_other(path)).expect("a set of maps")
    }

    /// What `bpftool` prints; panics unless it succeeds.
    pub fn bpftool(&self, arguments: &[&str]) -> String {
        let run = Command::new("bpftool").args(arguments).output().unwrap();
        assert!(run.status.success(), "bpftool {arguments:?}: {run:?}");
        String::from_utf8_lossy(&run.stdout).into_owned()
    }

    /// The entries of a map, as words of hexadecimal bytes.
    pub fn entries(&self, map: &str) -> Vec<Words> {
        let path = self.maps().join(map).display().to_string();
        let text = self.bpftool(&["-j", "map", "dump", "pinned", &path]);
        let words = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().map(|word| word.as_str().unwrap().to_owned()).collect()
        };
        let all: Vec<Value> = serde_json::from_str(&text).unwrap();
        all.iter().map(|entry| (words(&entry["key"]), words(&entry["value"]))).collect()
    }

    /// A map, as text to compare.
    pub fn shown(&self, map: &str) -> String {
        let all = self.entries(map).into_iter().map(|(key, value)| format!("{} = {}", key.join(" "), value.join(" ")));
        format!("{map} {:#?}", all.collect::<BTreeSet<_>>())
    }

    /// How many entries of a map are not zero.
    pub fn occupied(&self, map: &str) -> usize {
        self.entries(map).iter().filter(|(_, value)| is_some(value)).count()
    }

    /// Of a map of maps: which slots have one.
    pub fn slots(&self, map: &str) -> String {
        format!("{:?}", self.entries(map).into_iter().map(|(key, _)| key.join(" ")).collect::<BTreeSet<_>>())
    }

    /// Removes all entries of a map.
    pub fn delete_entries(&self, map: &str) {
        let path = self.maps().join(map).display().to_string();
        for (key, _) in self.entries(map) {
            let mut arguments = vec!["map", "delete", "pinned", &path, "key"];
            arguments.extend(key.iter().map(String::as_str));
            self.bpftool(&arguments);
        }
    }

    /// Writes zeros into the first entries that have something.
    pub fn clear_entries(&self, map: &str) {
        let path = self.maps().join(map).display().to_string();
        for (key, value) in self.entries(map).into_iter().filter(|(_, value)| is_some(value)).take(3) {
            let zeros = vec!["0x00"; value.len()];
            let mut arguments = vec!["map", "update", "pinned", &path, "key"];
            arguments.extend(key.iter().map(String::as_str));
            arguments.push("value");
            arguments.extend(zeros);
            self.bpftool(&arguments);
        }
    }

    /// Takes a program off: `from_workload-12`, program and device.
    pub fn detach(&self, link: &str) {
        let pin = self.0.join("links").join(link).display().to_string();
        self.bpftool(&["link", "detach", "pinned", &pin]);
    }

    /// The same, if it is not off already.
    pub fn detach_if_there(&self, link: &str) {
        let pin = self.0.join("links").join(link);
        drop(Command::new("bpftool").args(["link", "detach", "pinned"]).arg(pin).output().unwrap());
    }

    /// What a link is attached to, as the kernel says.
    pub fn attached(&self, link: &str) -> String {
        let pin = self.0.join("links").join(link).display().to_string();
        let run = Command::new("bpftool").args(["-j", "link", "show", "pinned", &pin]).output().unwrap();
        let link: Value = serde_json::from_slice(&run.stdout).unwrap_or_default();
        format!("{} {} {}", link["type"], link["devname"], link["cgroup_id"])
    }
}

fn is_some(value: &[String]) -> bool {
    value.iter().any(|word| word != "0x00")
}
