//! The cluster's state as the store tells it: everything seen so far, parsed.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher};
use std::net::IpAddr;

use cirri_abi::Identity;
use cirri_control::cut::cut_message;
use cirri_control::identity::Identities;
use cirri_control::labels::IdentityLabels;
use cirri_control::resource::{Namespace, NetworkPolicy, Pod, Resource};
use cirri_store::{Entry, Event};
use serde::de::DeserializeOwned;

use super::records::{IpRecord, NodeRecord};

/// Namespace and name.
pub type Named = (String, String);

/// All that the store holds. Changes only by [`View::apply`].
///
/// A value that cannot be read keeps its last good content, and is listed in [`View::problems`].
#[derive(Debug, Default)]
pub struct View {
    entries: BTreeMap<String, Kept>,
    /// Namespaces by name.
    pub namespaces: BTreeMap<String, Namespace>,
    /// Pods.
    pub pods: BTreeMap<Named, Pod>,
    /// Policies with the revision that wrote them.
    pub policies: BTreeMap<Named, (NetworkPolicy, u64)>,
    /// Nodes by name.
    pub nodes: BTreeMap<String, NodeRecord>,
    /// Identities and what they stand for.
    pub identities: Identities,
    /// Workload addresses of the whole cluster.
    pub ips: BTreeMap<IpAddr, IpRecord>,
    /// The same by the workload that has them.
    workloads: BTreeMap<Named, BTreeSet<IpAddr>>,
    /// What cannot be read, by key.
    pub problems: BTreeMap<String, String>,
    /// Newest revision that was seen whole.
    pub revision: u64,
    /// Whether everything was seen at least once.
    pub synced: bool,
}

/// A value, as far as it is kept. Resources are many and large, and kept as what they mean: of their text only
/// a digest stays, to know the same text again.
#[derive(Debug, PartialEq)]
enum Kept {
    Value(Vec<u8>),
    Digest(Digest),
}

/// Two hashes of 64 bits.
pub type Digest = u128;

/// The digest of a text.
pub fn digest(text: &[u8]) -> Digest {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        hasher.write_u8(salt);
        hasher.write(text);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}

/// What an event changed, for those who keep something derived from it.
#[derive(Clone, Debug)]
pub enum Change {
    /// A policy is new or different.
    PolicyPut(Named),
    /// A policy is gone.
    PolicyGone(Named),
    /// An identity is known.
    IdentityPut(Identity),
    /// An identity is gone.
    IdentityGone(Identity),
    /// Pods or namespaces changed, and with them perhaps who workloads are.
    Labels,
    /// Nodes or workload addresses changed.
    Addresses,
    /// The addresses of a workload changed.
    Workload(Named),
    /// What is known about a node changed.
    Peer(String),
    /// A resource that services are made of is new or different.
    Source(Box<Resource>),
    /// Such a resource is gone: its kind, namespace and name.
    SourceGone(String, Option<String>, String),
}

impl View {
    /// Takes in one event.
    pub fn apply(&mut self, event: Event) -> Vec<Change> {
        let mut changes = Vec::new();
        match event {
            Event::Put(entry) => self.put(entry, &mut changes),
            Event::Delete { key, .. } => self.delete(&key, &mut changes),
            Event::Progress(revision) => self.revision = self.revision.max(revision),
            Event::Snapshot(entries, revision) => {
                let kept: BTreeSet<&str> = entries.iter().map(|entry| entry.key.as_str()).collect();
                let gone: Vec<String> =
                    self.entries.keys().filter(|key| !kept.contains(key.as_str())).cloned().collect();
                for key in gone {
                    self.delete(&key, &mut changes);
                }
                for entry in entries {
                    self.put(entry, &mut changes);
                }
                // A store that was replaced may have begun again from a small number.
                self.revision = revision;
                self.synced = true;
            }
        }
        changes
    }

    /// Every resource's key (as [`Resource::store_key`]) and the digest of its JSON.
    pub fn resources(&self) -> impl Iterator<Item = (&str, Digest)> {
        let prefix = super::records::resource_prefix();
        let from = self.entries.range(prefix.clone()..).take_while(move |(key, _)| key.starts_with(&prefix));
        from.filter_map(|(key, kept)| match kept {
            Kept::Digest(digest) => Some((&key[cirri_store::PREFIX.len()..], *digest)),
            Kept::Value(_) => None,
        })
    }

    /// Whole keys below a prefix.
    pub fn below<'a>(&'a self, prefix: &str) -> impl Iterator<Item = &'a str> + use<'a> {
        let prefix = prefix.to_owned();
        let from = self.entries.range(prefix.clone()..);
        from.map(|(key, _)| key.as_str()).take_while(move |key| key.starts_with(&prefix))
    }

    /// Where the store says that a workload is.
    pub fn records_of(&self, workload: &Named) -> impl Iterator<Item = &IpRecord> {
        self.workloads.get(workload).into_iter().flatten().filter_map(|ip| self.ips.get(ip))
    }

    /// The value of a whole key that is no resource's.
    pub fn value(&self, key: &str) -> Option<&[u8]> {
        match self.entries.get(key)? {
            Kept::Value(value) => Some(value),
            Kept::Digest(_) => None,
        }
    }

    fn put(&mut self, entry: Entry, changes: &mut Vec<Change>) {
        let kept = match parse_key(&entry.key) {
            Key::Resource => Kept::Digest(digest(&entry.value)),
            _ => Kept::Value(entry.value.clone()),
        };
        if self.entries.get(&entry.key) == Some(&kept) {
            return;
        }
        match self.read(&entry, changes).map_err(|why| cut_message(&why).into_owned()) {
            Ok(()) => {
                self.problems.remove(&entry.key);
            }
            Err(why) => {
                self.problems.insert(entry.key.clone(), why);
            }
        }
        self.entries.insert(entry.key, kept);
    }

    fn read(&mut self, entry: &Entry, changes: &mut Vec<Change>) -> Result<(), String> {
        let text = std::str::from_utf8(&entry.value).map_err(|error| error.to_string())?;
        match parse_key(&entry.key) {
            Key::Resource => match Resource::from_json(text).map_err(|error| error.to_string())? {
                Resource::Namespace(namespace) => {
                    self.namespaces.insert(namespace.metadata.name.clone(), namespace);
                    changes.push(Change::Labels);
                }
                Resource::Pod(pod) => {
                    changes.push(Change::Source(Box::new(Resource::Pod(pod.clone()))));
                    let named = (pod.namespace().to_owned(), pod.metadata.name.clone());
                    changes.push(Change::Workload(named.clone()));
                    self.pods.insert(named, pod);
                    changes.push(Change::Labels);
                }
                Resource::NetworkPolicy(policy) => {
                    let name = (policy.namespace().to_owned(), policy.metadata.name.clone());
                    self.policies.insert(name.clone(), (policy, entry.revision));
                    changes.push(Change::PolicyPut(name));
                }
                source => changes.push(Change::Source(Box::new(source))),
            },
            Key::Node(name) => {
                let record: NodeRecord = json(text)?;
                self.nodes.insert(name.to_owned(), record);
                changes.push(Change::Addresses);
                changes.push(Change::Peer(name.to_owned()));
            }
            Key::Identity(id) => {
                let labels = IdentityLabels::parse(text).map_err(|error| error.to_string())?;
                let identity = Identity { id };
                if self.identities.insert(identity, labels) {
                    changes.push(Change::IdentityPut(identity));
                }
            }
            Key::Ip(ip) => {
                let record: IpRecord = json(text)?;
                let named = (record.namespace.clone(), record.pod.clone());
                self.forget_ip(ip, changes);
                self.workloads.entry(named.clone()).or_default().insert(ip);
                self.ips.insert(ip, record);
                changes.push(Change::Addresses);
                changes.push(Change::Workload(named));
            }
            Key::Other => {}
        }
        Ok(())
    }

    fn delete(&mut self, key: &str, changes: &mut Vec<Change>) {
        let Some(kept) = self.entries.remove(key) else { return };
        self.problems.remove(key);
        match parse_key(key) {
            Key::Resource => {
                let mut parts = key[cirri_store::PREFIX.len()..].splitn(4, '/').skip(1);
                let (kind, namespace, name) = (parts.next(), parts.next(), parts.next());
                let (Some(kind), Some(namespace), Some(name)) = (kind, namespace, name) else { return };
                let named = (namespace.to_owned(), name.to_owned());
                let within = (namespace != "_").then(|| namespace.to_owned());
                changes.push(Change::SourceGone(kind.to_owned(), within, name.to_owned()));
                match kind {
                    "Namespace" if self.namespaces.remove(name).is_some() => changes.push(Change::Labels),
                    "Pod" if self.pods.remove(&named).is_some() => changes.push(Change::Labels),
                    "NetworkPolicy" if self.policies.remove(&named).is_some() => {
                        changes.push(Change::PolicyGone(named));
                    }
                    _ => {}
                }
            }
            Key::Node(name) => {
                self.nodes.remove(name);
                changes.push(Change::Addresses);
                changes.push(Change::Peer(name.to_owned()));
            }
            Key::Identity(id) => {
                let identity = Identity { id };
                if self.identities.remove(identity).is_some() {
                    changes.push(Change::IdentityGone(identity));
                }
            }
            Key::Ip(ip) => {
                // The address may have moved to another node: only its own record takes it away.
                let record = match &kept {
                    Kept::Value(value) => serde_json::from_slice::<IpRecord>(value).ok(),
                    Kept::Digest(_) => None,
                };
                if record.as_ref() == self.ips.get(&ip) {
                    self.forget_ip(ip, changes);
                    changes.push(Change::Addresses);
                }
            }
            Key::Other => {}
        }
    }

    /// An address is nobody's any more, or somebody else's in a moment.
    fn forget_ip(&mut self, ip: IpAddr, changes: &mut Vec<Change>) {
        let Some(record) = self.ips.remove(&ip) else { return };
        let named = (record.namespace, record.pod);
        if let Some(addresses) = self.workloads.get_mut(&named) {
            addresses.remove(&ip);
            if addresses.is_empty() {
                self.workloads.remove(&named);
            }
        }
        changes.push(Change::Workload(named));
    }
}

enum Key<'a> {
    Resource,
    Node(&'a str),
    Identity(u32),
    Ip(IpAddr),
    Other,
}

fn parse_key(key: &str) -> Key<'_> {
    let Some((head, rest)) = key.strip_prefix(cirri_store::PREFIX).and_then(|key| key.split_once('/')) else {
        return Key::Other;
    };
    match head {
        "resources" => Key::Resource,
        "nodes" => Key::Node(rest),
        "identities" => {
            let number = rest.strip_prefix("id/").and_then(|id| id.parse().ok());
            let allocated = Identity::MIN_ALLOCATED..=Identity::MAX_ALLOCATED;
            number.filter(|id| allocated.contains(id)).map_or(Key::Other, Key::Identity)
        }
        "ips" => rest.split_once('/').and_then(|(_, ip)| ip.parse().ok()).map_or(Key::Other, Key::Ip),
        _ => Key::Other,
    }
}

fn json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &str, revision: u64) -> Entry {
        Entry { key: format!("{}{key}", cirri_store::PREFIX), value: value.into(), revision }
    }

    fn pod(name: &str, app: &str) -> String {
        format!(
            r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{name}","namespace":"shop","labels":{{"app":"{app}"}}}},"spec":{{"containers":[{{"name":"c"}}]}}}}"#
        )
    }

    fn ip(node: &str, ip: &str) -> Entry {
        let value = format!(r#"{{"ip":"{ip}","identity":300,"node":"{node}","namespace":"shop","pod":"web"}}"#);
        entry(&format!("ips/{node}/{ip}"), &value, 1)
    }

    #[test]
    fn a_snapshot_replaces_what_was_known_and_says_only_what_differs() {
        let mut view = View::default();
        let first = vec![entry("resources/Pod/shop/a", &pod("a", "x"), 1), entry("identities/id/300", "k8s:app=x", 2)];
        let changes = view.apply(Event::Snapshot(first.clone(), 2));
        assert!(
            matches!(
                changes.as_slice(),
                [Change::Source(_), Change::Workload(_), Change::Labels, Change::IdentityPut(Identity { id: 300 })]
            ),
            "{changes:?}"
        );
        assert!(view.synced && view.revision == 2);
        assert!(view.apply(Event::Snapshot(first, 3)).is_empty());
        let changes = view.apply(Event::Snapshot(vec![], 4));
        let gone =
            |change: &Change| matches!(change, Change::SourceGone(kind, Some(_), name) if kind == "Pod" && name == "a");
        assert!(changes.iter().any(gone), "{changes:?}");
        assert!(view.pods.is_empty());
    }

    #[test]
    fn a_broken_value_keeps_the_last_good_one_and_is_reported() {
        let mut view = View::default();
        view.apply(Event::Put(entry("resources/Pod/shop/a", &pod("a", "x"), 1)));
        view.apply(Event::Put(entry("resources/Pod/shop/a", "{", 2)));
        assert_eq!((view.pods.len(), view.problems.len()), (1, 1));
        view.apply(Event::Put(entry("resources/Pod/shop/a", &pod("a", "y"), 3)));
        assert!(view.problems.is_empty());
        assert_eq!(view.resources().collect::<Vec<_>>(), [("resources/Pod/shop/a", digest(pod("a", "y").as_bytes()))]);
    }

    #[test]
    fn an_address_that_moved_is_not_taken_away_by_its_old_node() {
        let mut view = View::default();
        view.apply(Event::Put(ip("a", "10.0.0.1")));
        view.apply(Event::Put(ip("b", "10.0.0.1")));
        view.apply(Event::Delete { key: ip("a", "10.0.0.1").key, revision: 3 });
        assert_eq!(view.ips.values().map(|record| record.node.as_str()).collect::<Vec<_>>(), ["b"]);
        let web = ("shop".to_owned(), "web".to_owned());
        assert_eq!(view.records_of(&web).count(), 1);
        view.apply(Event::Delete { key: ip("b", "10.0.0.1").key, revision: 4 });
        assert!(view.ips.is_empty() && view.records_of(&web).count() == 0);
    }

    #[test]
    fn reserved_numbers_cannot_be_given_away() {
        let mut view = View::default();
        assert!(view.apply(Event::Put(entry("identities/id/1", "k8s:app=x", 1))).is_empty());
    }
}
