//! What a run leaves behind of each file, so that the next one knows what the last one knew.

use std::collections::BTreeMap;
use std::sync::Arc;

use cirri_control::resource::Resource;
use serde::{Deserialize, Serialize};

use super::file::{File, Hold};

/// A file as it is written down.
#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Record {
    #[serde(skip_serializing_if = "Option::is_none")]
    broken: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    among: Vec<String>,
    objects: BTreeMap<String, Object>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Object {
    since: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    broke: Option<u64>,
    #[serde(default = "one", skip_serializing_if = "is_one")]
    times: usize,
    /// What it says is in force.
    #[serde(default, skip_serializing_if = "is_false")]
    owner: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    unread: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    vague: bool,
    #[serde(default, skip_serializing_if = "Version::is_in_force")]
    version: Version,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Version {
    /// What is in force, which is stored as itself.
    #[default]
    InForce,
    /// None is known.
    Unknown,
    /// Another, as JSON.
    Other(String),
}

impl Version {
    fn is_in_force(&self) -> bool {
        matches!(self, Version::InForce)
    }
}

fn one() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_one(times: &usize) -> bool {
    *times == 1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// Objects as they are in force; `None` for what cannot be read.
pub(super) type InForce = BTreeMap<String, Option<Arc<Resource>>>;

/// What is to be known of a file at the next start; nothing if there is nothing to know. `settled`: it was so before
/// this moment.
pub(super) fn write(file: &File, settled: bool, owns: impl Fn(&str) -> bool, in_force: &InForce) -> Option<String> {
    let object = |(key, hold): (&String, &Hold)| {
        let version = match &hold.version {
            None => Version::Unknown,
            Some(version) if in_force.get(key).is_some_and(|now| now.as_ref() == Some(version)) => Version::InForce,
            Some(version) => Version::Other(version.to_json()),
        };
        let Hold { since, broke, times, read, vague, .. } = *hold;
        (key.clone(), Object { since, broke, times, owner: owns(key), unread: !read, vague, version })
    };
    let record = Record {
        broken: file.broken.filter(|_| settled),
        among: file.among.iter().cloned().collect(),
        objects: file.holds.iter().map(object).collect(),
    };
    let is_plain = record.broken.is_none() && record.among.is_empty() && record.objects.is_empty();
    // Numbers and strings always have a form in JSON.
    (!is_plain).then(|| serde_json::to_string(&record).unwrap_or_default())
}

/// Whether a file of which this is known ([`Change::files`](crate::folder::Change::files)) defines an object as it is in
/// force.
pub fn defines(text: &str, key: &str) -> bool {
    let owns = |record: Record| record.objects.get(key).is_some_and(|object| object.owner);
    text.contains(key) && serde_json::from_str(text).is_ok_and(owns)
}

/// What an earlier run knew of a file, and which of its objects were in force; `None` if this version cannot tell.
pub(super) fn read(text: &str, in_force: &InForce) -> Option<(File, Vec<String>)> {
    let record: Record = serde_json::from_str(text).ok()?;
    let mut owned = Vec::new();
    let mut holds = BTreeMap::new();
    for (key, object) in record.objects {
        let version = match object.version {
            Version::Unknown => None,
            Version::InForce => in_force.get(&key).cloned().flatten(),
            Version::Other(json) => Some(Arc::new(Resource::from_json(&json).ok()?)),
        };
        if object.owner {
            owned.push(key.clone());
        }
        let Object { since, broke, times, unread, vague, .. } = object;
        // What was in force and cannot be read any more is not known.
        let read = !unread && version.is_some();
        holds.insert(key, Hold { version, read, since, broke, times, second: None, vague, line: 0 });
    }
    let among = record.among.into_iter().collect();
    Some((File { holds, broken: record.broken, among, ..File::default() }, owned))
}
