//! The network namespaces of a lab's pods: what they are called, and whose they are.
//!
//! A pod's record names its namespace before there is one, so that a command may be killed at any moment: what it
//! leaves is in a record, and goes with it. A pod's namespace that no record names is nobody's.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::Context;

use super::names;
use super::netns;
use super::process;
use super::state::{Lab, PodKey, PodRecord};

/// Gives out names, each once: several pods are made at the same time.
pub struct Spaces {
    prefix: String,
    taken: Mutex<BTreeSet<PathBuf>>,
}

impl Spaces {
    /// Those of a lab with these pods.
    pub fn of(lab: &Lab, pods: &[PodRecord]) -> Self {
        Self { prefix: prefix(lab), taken: Mutex::new(owned(lab, pods)) }
    }

    /// The path of a pod's namespace, which is not there yet. `a-b/c` and `a/b-c` would have the same: the later gets a
    /// number.
    pub fn claim(&self, key: &PodKey) -> PathBuf {
        let name = names::fitting(&format!("{}{}-{}", self.prefix, key.namespace, key.name), names::LONGEST);
        let numbered = (2..).map(|number| format!("{name}-{number}"));
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |path: &PathBuf| !taken.contains(path) && !path.exists();
        let path = std::iter::once(name.clone()).chain(numbered).map(|name| netns::path(&name)).find(free);
        let path = path.unwrap_or_else(|| netns::path(&name));
        taken.insert(path.clone());
        path
    }
}

/// Removes the namespaces of pods that nobody's record names, with all that lives there; answers their names.
///
/// # Errors
/// What would not go.
pub fn sweep(lab: &Lab, pods: &[PodRecord]) -> anyhow::Result<Vec<String>> {
    let owned = owned(lab, pods);
    let nobodys = |name: &String| !owned.contains(&netns::path(name));
    let names: Vec<String> = netns::list(&prefix(lab)).into_iter().filter(nobodys).collect();
    for name in &names {
        if let Some(id) = netns::id(&netns::path(name)) {
            process::kill(&process::inside(&[id]))?;
        }
        netns::delete(name).with_context(|| format!("cannot remove the network namespace {name}"))?;
    }
    Ok(names)
}

fn prefix(lab: &Lab) -> String {
    format!("{}pod-", lab.name.prefix())
}

/// A node may have a name that begins like a pod's.
fn owned(lab: &Lab, pods: &[PodRecord]) -> BTreeSet<PathBuf> {
    let nodes = lab.nodes.iter().map(|node| node.netns.as_path());
    nodes.chain(pods.iter().map(|pod| pod.netns.as_path())).map(Path::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::super::state::{LabName, Routing};
    use super::*;

    #[test]
    fn no_two_pods_claim_the_same_name_and_none_that_of_a_node() {
        let name: LabName = "t".parse().unwrap();
        let lab = Lab::described(&name, &["pod-a-b".into()], Routing::Overlay, &[]);
        let spaces = Spaces::of(&lab, &[]);
        let claimed = ["a/b", "a/b-c", "a-b/c"].map(|key| spaces.claim(&key.parse().unwrap()));
        let names = claimed.each_ref().map(|path| path.file_name().unwrap().to_str().unwrap());
        assert_eq!(names, ["cirri-t-pod-a-b-2", "cirri-t-pod-a-b-c", "cirri-t-pod-a-b-c-2"]);
    }
}
