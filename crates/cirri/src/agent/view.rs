//! The cluster's state as the store tells it: everything seen so far, parsed.

mod former;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher};
use std::net::IpAddr;

use cirri_abi::Identity;
use cirri_control::cut::cut_message;
use cirri_control::identity::Identities;
use cirri_control::labels::IdentityLabels;
use cirri_control::resource::{Namespace, NetworkPolicy, Pod, Resource, STAND_IN, read_documents};
use cirri_store::{Entry, Event, STORE_ID};
use serde::de::DeserializeOwned;

use super::records::{self, EnforcedRecord, IdentityRecord, IpRecord, NodeRecord};
use former::Former;

pub use former::Missing;

/// Namespace and name.
pub type Named = (String, String);

/// All that the store holds. Changes only by [`View::apply`].
///
/// A value that cannot be read keeps its last good content, and is listed in [`View::problems`]. The
/// last good content outlives the agent: see [`View::restore`] and [`View::take_unsaved`].
#[derive(Debug, Default)]
pub struct View {
    entries: BTreeMap<String, Kept>,
    /// Keys of which some content could be read, now or earlier.
    good: BTreeSet<String>,
    /// Good content that is not saved yet, by key; `None` for what is gone.
    unsaved: BTreeMap<String, Option<Vec<u8>>>,
    /// What is held of a store that another one replaced.
    former: Former,
    /// Namespaces by name.
    pub namespaces: BTreeMap<String, Namespace>,
    /// Pods.
    pub pods: BTreeMap<Named, Pod>,
    /// Policies with the revision that wrote them.
    pub policies: BTreeMap<Named, (NetworkPolicy, u64)>,
    /// Nodes by name.
    pub nodes: BTreeMap<String, NodeRecord>,
    /// What nodes say that they enforce, by name.
    pub enforced: BTreeMap<String, EnforcedRecord>,
    /// Identities and what they stand for.
    pub identities: Identities,
    /// The revisions that wrote them; not of one that was just allocated here.
    pub identity_revisions: BTreeMap<u32, u64>,
    /// Workload addresses of the whole cluster.
    pub ips: BTreeMap<IpAddr, IpRecord>,
    /// The same by the workload that has them.
    workloads: BTreeMap<Named, BTreeSet<IpAddr>>,
    /// Why a value cannot be read, by key.
    problems: BTreeMap<String, String>,
    /// Newest revision that was seen whole.
    pub revision: u64,
    /// Whether everything was seen at least once.
    pub synced: bool,
    /// How often everything was seen.
    snapshots: u64,
}

/// A value, as far as it is kept. Resources are many and large, and kept as what they mean: of their text only
/// a digest stays, to know the same text again.
#[derive(Debug, PartialEq)]
enum Kept {
    Value(Vec<u8>),
    Digest(Digest),
}

impl Kept {
    fn of(entry: &Entry) -> Kept {
        match parse_key(&entry.key) {
            Key::Resource => Kept::Digest(digest(&entry.value)),
            _ => Kept::Value(entry.value.clone()),
        }
    }
}

/// Two hashes of 64 bits.
type Digest = u128;

/// The digest of a text.
fn digest(text: &[u8]) -> Digest {
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
    /// A policy is new or different. Its text is saved once it is in force: see [`View::save_policy`].
    PolicyPut(Named, Vec<u8>),
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
                self.replace(entries, &mut changes);
                // A store that was replaced may have begun again from a small number.
                self.revision = revision;
                self.synced = true;
                self.snapshots += 1;
            }
        }
        self.settle(&mut changes);
        changes
    }

    /// Takes in what an earlier run saved of a key, before anything else. It holds until the store
    /// says something readable, or that the key is gone. A policy that was refused comes after its last good content.
    pub fn restore(&mut self, key: String, value: Vec<u8>) -> Vec<Change> {
        let mut changes = Vec::new();
        if key == STORE_ID {
            self.former.restore(value);
            return changes;
        }
        let entry = Entry { key: records::refused_resource(&key).unwrap_or(key), value, revision: 0 };
        match self.read(&entry, &mut changes) {
            Ok(()) => {
                self.problems.remove(&entry.key);
                self.entries.insert(entry.key.clone(), Kept::of(&entry));
                self.good.insert(entry.key);
            }
            // A policy that nobody could read yet, either.
            Err(why) if policy_of(&entry.key).is_some() => {
                self.entries.insert(entry.key.clone(), Kept::of(&entry));
                self.problems.insert(entry.key, cut_message(&why).into_owned());
            }
            Err(why) => tracing::warn!(key = entry.key, why, "saved by another version, and not understood"),
        }
        changes
    }

    /// What is to be saved, so that the last good content outlives the agent.
    pub fn take_unsaved(&mut self) -> Vec<(String, Option<Vec<u8>>)> {
        std::mem::take(&mut self.unsaved).into_iter().collect()
    }

    /// It could not be saved; newer content stands.
    pub fn return_unsaved(&mut self, unsaved: Vec<(String, Option<Vec<u8>>)>) {
        for (key, value) in unsaved {
            self.unsaved.entry(key).or_insert(value);
        }
    }

    /// The policy was taken: this text is its last good content.
    pub fn save_policy(&mut self, (namespace, name): &Named, text: Vec<u8>) {
        let key = format!("{}NetworkPolicy/{namespace}/{name}", records::resource_prefix());
        self.unsaved.insert(key, Some(text));
        self.unsaved.insert(refused_key(namespace, name), None);
    }

    /// The policy was refused: what it closes, beside its last good content, is closed after a restart too.
    pub fn save_refused(&mut self, (namespace, name): &Named, text: Vec<u8>) {
        self.unsaved.insert(refused_key(namespace, name), Some(text));
    }

    /// What cannot be read: the object, and why and what holds instead.
    pub fn problems(&self) -> impl Iterator<Item = (String, String)> {
        self.problems.iter().map(|(key, why)| (object(key), self.problem(key, why)))
    }

    /// Whether the namespace has a policy of which nothing could ever be read.
    pub fn lacks_policy(&self, namespace: &str) -> bool {
        let prefix = format!("{}NetworkPolicy/{namespace}/", records::resource_prefix());
        let from = self.problems.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix));
        from.into_iter().any(|(key, _)| !self.good.contains(key))
    }

    fn problem(&self, key: &str, why: &str) -> String {
        let holds = match self.good.contains(key) {
            true if self.is_stand_in(key) => "it was never known: whom it may concern is closed",
            true => "its last good content holds",
            false => "nothing is known of it",
        };
        format!("cannot be read, {holds}: {why} (key {key})")
    }

    /// Whether what holds of a resource only stands in for it.
    fn is_stand_in(&self, key: &str) -> bool {
        let held = match key.strip_prefix(&records::resource_prefix()).and_then(|rest| rest.split_once('/')) {
            Some(("NetworkPolicy", _)) => policy_of(key).and_then(|named| Some(&self.policies.get(&named)?.0.metadata)),
            Some(("Namespace", rest)) => {
                rest.strip_prefix("_/").and_then(|name| Some(&self.namespaces.get(name)?.metadata))
            }
            _ => None,
        };
        held.is_some_and(|metadata| metadata.annotations.contains_key(STAND_IN))
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

    /// The id of the store that was seen last, and how often it was seen whole: differs from before once another one is seen.
    pub fn store(&self) -> (Option<&[u8]>, u64) {
        (self.value(STORE_ID), self.snapshots)
    }

    /// The value of a whole key that is no resource's.
    pub fn value(&self, key: &str) -> Option<&[u8]> {
        match self.entries.get(key)? {
            Kept::Value(value) => Some(value),
            Kept::Digest(_) => None,
        }
    }

    fn put(&mut self, entry: Entry, changes: &mut Vec<Change>) {
        let kept = Kept::of(&entry);
        if self.entries.get(&entry.key) == Some(&kept) {
            return self.written_again(&entry, changes);
        }
        self.former.let_go(&entry.key);
        self.entries.insert(entry.key.clone(), kept);
        match self.read(&entry, changes).map_err(|why| cut_message(&why).into_owned()) {
            Ok(()) => {
                self.problems.remove(&entry.key);
                self.keep(entry);
            }
            Err(why) => {
                if !self.good.contains(&entry.key) || self.is_stand_in(&entry.key) {
                    self.stand_in(&entry, changes);
                }
                tracing::error!("{} {}", object(&entry.key), self.problem(&entry.key, &why));
                self.problems.insert(entry.key.clone(), why);
                if !self.good.contains(&entry.key) && policy_of(&entry.key).is_some() {
                    // That there is one must be known after a restart: see [`View::lacks_policy`].
                    self.unsaved.insert(entry.key, Some(entry.value));
                }
            }
        }
    }

    /// Of what was never readable: what lets nothing pass that it may forbid, if it says enough for that.
    fn stand_in(&mut self, entry: &Entry, changes: &mut Vec<Change>) {
        let is_it = |resource: &Resource| format!("{}{}", cirri_store::PREFIX, resource.store_key()) == entry.key;
        let Some(stand_in) = read_documents("", &entry.value).stand_ins.into_iter().find(is_it) else { return };
        let value = stand_in.to_json().into_bytes();
        let entry = Entry { key: entry.key.clone(), value, revision: entry.revision };
        match self.read(&entry, changes) {
            Ok(()) => self.keep(entry),
            Err(why) => tracing::error!(key = entry.key, why, "nothing can stand in for it"),
        }
    }

    /// It was read, and is to be saved; a policy once it is in force: see [`View::save_policy`].
    fn keep(&mut self, entry: Entry) {
        self.good.insert(entry.key.clone());
        let is_saved_elsewhere = policy_of(&entry.key).is_some() || entry.key == STORE_ID;
        // Nobody but the agent says what is refused.
        if !is_saved_elsewhere && records::refused_resource(&entry.key).is_none() {
            self.unsaved.insert(entry.key, Some(entry.value));
        }
    }

    /// The content is known; its revision is another, or was not known: what is restored has none.
    fn written_again(&mut self, entry: &Entry, changes: &mut Vec<Change>) {
        if let Some((_, revision)) = policy_of(&entry.key).and_then(|named| self.policies.get_mut(&named)) {
            *revision = entry.revision;
        }
        if let Key::Identity(id) = parse_key(&entry.key)
            && let Some(revision) = self.identity_revisions.get_mut(&id)
            && std::mem::replace(revision, entry.revision) != entry.revision
        {
            // Others wait for this node to say that it knows the identity of that revision.
            changes.push(Change::IdentityPut(Identity { id }));
        }
    }

    fn read(&mut self, entry: &Entry, changes: &mut Vec<Change>) -> Result<(), String> {
        let text = std::str::from_utf8(&entry.value).map_err(|error| error.to_string())?;
        match parse_key(&entry.key) {
            Key::Resource => match resource(&entry.key, text)? {
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
                    changes.push(Change::PolicyPut(name, entry.value.clone()));
                }
                source => changes.push(Change::Source(Box::new(source))),
            },
            Key::Node(name) => {
                let record: NodeRecord = json(text)?;
                is_of(record.name.as_str(), name)?;
                self.nodes.insert(name.to_owned(), record);
                changes.push(Change::Addresses);
                changes.push(Change::Peer(name.to_owned()));
            }
            Key::Enforced(name) => {
                self.enforced.insert(name.to_owned(), json(text)?);
            }
            Key::Identity(id) => {
                let labels = IdentityLabels::parse(text).map_err(|error| error.to_string())?;
                if text.is_empty() || labels.canonical() != text {
                    return Err("it is no line of labels".to_owned());
                }
                let identity = Identity { id };
                self.identity_revisions.insert(id, entry.revision);
                // One that was allocated here is known already; since when, only now.
                self.identities.insert(identity, labels);
                changes.push(Change::IdentityPut(identity));
            }
            Key::Ip(node, ip) => {
                let record: IpRecord = json(text)?;
                is_of(record.node.as_str(), node)?;
                is_of(&record.ip, &ip)?;
                let named = (record.namespace.clone(), record.pod.clone());
                self.forget_ip(ip, changes);
                self.workloads.entry(named.clone()).or_default().insert(ip);
                self.ips.insert(ip, record);
                changes.push(Change::Addresses);
                changes.push(Change::Workload(named));
            }
            Key::Labels => json::<IdentityRecord>(text)?.check()?,
            Key::Other => {}
        }
        Ok(())
    }

    fn delete(&mut self, key: &str, changes: &mut Vec<Change>) {
        let was_held = self.former.let_go(key);
        // The id is saved when it counts: see [`View::settle`].
        if (self.entries.remove(key).is_none() && !was_held) || key == STORE_ID {
            return;
        }
        self.problems.remove(key);
        self.good.remove(key);
        self.unsaved.insert(key.to_owned(), None);
        if let Some((namespace, name)) = policy_of(key) {
            self.unsaved.insert(refused_key(&namespace, &name), None);
        }
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
            Key::Enforced(name) => {
                self.enforced.remove(name);
            }
            Key::Identity(id) => {
                let identity = Identity { id };
                self.identity_revisions.remove(&id);
                if self.identities.remove(identity).is_some() {
                    changes.push(Change::IdentityGone(identity));
                }
            }
            Key::Ip(node, ip) => {
                // The address may have moved to another node: only its own record takes it away.
                if self.ips.get(&ip).is_some_and(|record| record.node == node) {
                    self.forget_ip(ip, changes);
                    changes.push(Change::Addresses);
                }
            }
            Key::Labels | Key::Other => {}
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
    Enforced(&'a str),
    Identity(u32),
    /// The key of labels that have a number.
    Labels,
    /// The node's, and the address.
    Ip(&'a str, IpAddr),
    Other,
}

fn parse_key(key: &str) -> Key<'_> {
    let Some((head, rest)) = key.strip_prefix(cirri_store::PREFIX).and_then(|key| key.split_once('/')) else {
        return Key::Other;
    };
    match head {
        "resources" => Key::Resource,
        "nodes" => Key::Node(rest),
        "identities" if rest.starts_with("labels/") => Key::Labels,
        "enforced" => Key::Enforced(rest),
        "identities" => {
            let number = rest.strip_prefix("id/").and_then(|id| id.parse().ok());
            let allocated = Identity::MIN_ALLOCATED..=Identity::MAX_ALLOCATED;
            number.filter(|id| allocated.contains(id)).map_or(Key::Other, Key::Identity)
        }
        "ips" => {
            let place = rest.split_once('/').and_then(|(node, ip)| Some((node, ip.parse().ok()?)));
            place.map_or(Key::Other, |(node, ip)| Key::Ip(node, ip))
        }
        _ => Key::Other,
    }
}

/// What a key stands for, in words.
fn object(key: &str) -> String {
    let rest = key.strip_prefix(cirri_store::PREFIX).unwrap_or(key);
    match rest.splitn(4, '/').collect::<Vec<_>>().as_slice() {
        ["resources", kind, "_", name] => format!("{kind} {name}"),
        ["resources", kind, namespace, name] => format!("{kind} {namespace}/{name}"),
        _ => rest.to_owned(),
    }
}

/// Namespace and name of a policy's key.
fn policy_of(key: &str) -> Option<Named> {
    let (namespace, name) =
        key.strip_prefix(cirri_store::PREFIX)?.strip_prefix("resources/NetworkPolicy/")?.split_once('/')?;
    Some((namespace.to_owned(), name.to_owned()))
}

/// Where the text of a policy is saved that is refused.
fn refused_key(namespace: &str, name: &str) -> String {
    format!("{}{namespace}/{name}", records::refused_prefix())
}

/// The resource under a key. One that names another is not read: it would not be found when it is gone.
fn resource(key: &str, text: &str) -> Result<Resource, String> {
    let resource = Resource::from_json(text).map_err(|error| error.to_string())?;
    is_of(resource.store_key().as_str(), &key[cirri_store::PREFIX.len()..])?;
    Ok(resource)
}

/// What a value says of itself must be what its key says.
fn is_of<T: PartialEq + ?Sized + std::fmt::Display>(said: &T, meant: &T) -> Result<(), String> {
    if said == meant { Ok(()) } else { Err(format!("it says that it is {said}")) }
}

fn json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests;
