//! Which identities each selector matches, kept up to date, so that a new identity or policy costs
//! what it touches and not what there is.

use super::{Policy, PolicyId, Selector};
use crate::labels::IdentityLabels;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

#[derive(Clone, Debug, Default)]
pub(super) struct SelectorIndex {
    selectors: BTreeMap<Arc<Selector>, Uses>,
    /// Selectors by key and value of a label of which all that they match has at least one; see [`Selector::anchors`].
    anchored: BTreeMap<String, BTreeMap<String, BTreeSet<Interned>>>,
    /// Selectors without such a label: asked about every identity.
    broad: BTreeSet<Interned>,
    /// By identity, the selectors that match it.
    matched_by: BTreeMap<u32, BTreeSet<Interned>>,
    /// Pod label keys that selectors ask for, and how often.
    pod_keys: BTreeMap<String, usize>,
}

/// A selector of the index, and a digest of it. There is one of each: to compare what they say takes as long as
/// that is, and one of many values stands in as many sets.
#[derive(Clone, Debug)]
struct Interned {
    digest: u64,
    selector: Arc<Selector>,
}

impl Interned {
    fn new(selector: Arc<Selector>) -> Interned {
        let mut hasher = DefaultHasher::new();
        selector.hash(&mut hasher);
        Interned { digest: hasher.finish(), selector }
    }
}

impl PartialEq for Interned {
    fn eq(&self, other: &Interned) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Interned {}

impl PartialOrd for Interned {
    fn partial_cmp(&self, other: &Interned) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Interned {
    fn cmp(&self, other: &Interned) -> Ordering {
        match Arc::ptr_eq(&self.selector, &other.selector) {
            true => Ordering::Equal,
            false => self.digest.cmp(&other.digest).then_with(|| self.selector.cmp(&other.selector)),
        }
    }
}

/// Who uses a selector, and whom it matches.
#[derive(Clone, Debug, Default)]
struct Uses {
    matches: BTreeSet<u32>,
    subject_of: BTreeSet<PolicyId>,
    peer_of: BTreeSet<PolicyId>,
}

impl SelectorIndex {
    /// Identities that the selector matches; empty for one that no policy uses.
    pub fn matched(&self, selector: &Selector) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.selectors.get(selector).map_or(&NOBODY, |uses| &uses.matches).iter().copied()
    }

    /// Policies whose subject the identity is, by name.
    pub fn policies_with_subject(&self, identity: u32) -> BTreeSet<&PolicyId> {
        self.uses_of(identity).flat_map(|uses| &uses.subject_of).collect()
    }

    /// Policies that name the identity as a peer.
    pub fn policies_with_peer(&self, identity: u32) -> BTreeSet<&PolicyId> {
        self.uses_of(identity).flat_map(|uses| &uses.peer_of).collect()
    }

    /// Pod label keys that selectors in use ask for.
    pub fn pod_keys(&self) -> impl Iterator<Item = &str> {
        self.pod_keys.keys().map(String::as_str)
    }

    /// Whether a selector in use asks for the pod label key.
    pub fn asks_for(&self, key: &str) -> bool {
        self.pod_keys.contains_key(key)
    }

    /// Notes the selectors of a policy.
    pub fn acquire(&mut self, id: &PolicyId, policy: &Policy, identities: &BTreeMap<u32, Arc<IdentityLabels>>) {
        self.intern(&policy.subject, identities).subject_of.insert(id.clone());
        for selector in policy.peer_selectors() {
            self.intern(&selector, identities).peer_of.insert(id.clone());
        }
    }

    /// Drops the selectors of a policy that no other uses.
    pub fn release(&mut self, id: &PolicyId, policy: &Policy) {
        for selector in policy.peer_selectors().iter().chain([&policy.subject]) {
            let Some(uses) = self.selectors.get_mut(selector) else { continue };
            uses.subject_of.remove(id);
            uses.peer_of.remove(id);
            if uses.subject_of.is_empty() && uses.peer_of.is_empty() {
                self.forget(selector);
            }
        }
    }

    /// Notes an identity.
    pub fn insert(&mut self, identity: u32, labels: &IdentityLabels) {
        let anchored = labels.iter().filter_map(|(key, value)| self.anchored.get(key)?.get(value)).flatten();
        let matching: BTreeSet<Interned> =
            anchored.chain(&self.broad).filter(|selector| selector.selector.matches(labels)).cloned().collect();
        for selector in &matching {
            if let Some(uses) = self.selectors.get_mut(&selector.selector) {
                uses.matches.insert(identity);
            }
        }
        self.matched_by.insert(identity, matching);
    }

    /// Forgets an identity.
    pub fn remove(&mut self, identity: u32) {
        for selector in self.matched_by.remove(&identity).unwrap_or_default() {
            if let Some(uses) = self.selectors.get_mut(&selector.selector) {
                uses.matches.remove(&identity);
            }
        }
    }

    fn uses_of(&self, identity: u32) -> impl Iterator<Item = &Uses> {
        self.matched_by
            .get(&identity)
            .into_iter()
            .flatten()
            .filter_map(|selector| self.selectors.get(&selector.selector))
    }

    fn intern(&mut self, selector: &Selector, identities: &BTreeMap<u32, Arc<IdentityLabels>>) -> &mut Uses {
        if !self.selectors.contains_key(selector) {
            let shared = Interned::new(Arc::new(selector.clone()));
            let matches = identities.iter().filter(|(_, labels)| selector.matches(labels)).map(|(id, _)| *id);
            let matches: BTreeSet<u32> = matches.collect();
            for id in &matches {
                self.matched_by.entry(*id).or_default().insert(shared.clone());
            }
            let anchors = selector.anchors();
            if anchors.is_empty() {
                self.broad.insert(shared.clone());
            }
            for (key, value) in anchors {
                let values = self.anchored.entry(key).or_default();
                values.entry(value).or_default().insert(shared.clone());
            }
            for key in selector.pod_keys() {
                *self.pod_keys.entry(key.to_owned()).or_default() += 1;
            }
            self.selectors.insert(shared.selector, Uses { matches, ..Uses::default() });
        }
        self.selectors.get_mut(selector).expect("it was inserted above")
    }

    fn forget(&mut self, selector: &Selector) {
        let Some((shared, uses)) = self.selectors.remove_entry(selector) else { return };
        let shared = Interned::new(shared);
        for id in uses.matches {
            if let Some(selectors) = self.matched_by.get_mut(&id) {
                selectors.remove(&shared);
            }
        }
        for key in selector.pod_keys() {
            if let Some(count) = self.pod_keys.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    self.pod_keys.remove(key);
                }
            }
        }
        self.broad.remove(&shared);
        for (key, value) in selector.anchors() {
            let Some(values) = self.anchored.get_mut(&key) else { continue };
            if let Some(selectors) = values.get_mut(&value) {
                selectors.remove(&shared);
                if selectors.is_empty() {
                    values.remove(&value);
                }
            }
            if values.is_empty() {
                self.anchored.remove(&key);
            }
        }
    }
}

static NOBODY: BTreeSet<u32> = BTreeSet::new();
