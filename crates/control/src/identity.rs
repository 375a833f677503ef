//! The numbers of identities: which are taken, and which to try next.
//!
//! Numbers are shared by the cluster, so this only proposes: the store decides by creating both of
//! its keys in one transaction, or refusing because somebody was faster.

use crate::{hash::fnv64, hash::fnv128, labels::IdentityLabels};
use cirri_abi::Identity;
use std::collections::{BTreeMap, HashMap};

/// What is known of the cluster's identities. Reserved ones are known from the start.
#[derive(Clone, Debug)]
pub struct Identities {
    labels: BTreeMap<u32, IdentityLabels>,
    numbers: HashMap<IdentityLabels, u32>,
}

impl Default for Identities {
    fn default() -> Identities {
        let mut all = Identities { labels: BTreeMap::new(), numbers: HashMap::new() };
        for (identity, labels) in reserved() {
            all.insert(identity, labels);
        }
        all
    }
}

impl Identities {
    /// Only the reserved ones.
    pub fn new() -> Identities {
        Identities::default()
    }

    /// Notes that the number stands for the labels. Answers false if nothing changed.
    pub fn insert(&mut self, identity: Identity, labels: IdentityLabels) -> bool {
        if self.labels.get(&identity.id) == Some(&labels) {
            return false;
        }
        self.remove(identity);
        self.numbers.insert(labels.clone(), identity.id);
        self.labels.insert(identity.id, labels);
        true
    }

    /// Forgets the number.
    pub fn remove(&mut self, identity: Identity) -> Option<IdentityLabels> {
        let labels = self.labels.remove(&identity.id)?;
        if self.numbers.get(&labels) == Some(&identity.id) {
            self.numbers.remove(&labels);
        }
        Some(labels)
    }

    /// The number of the labels, if they have one.
    pub fn find(&self, labels: &IdentityLabels) -> Option<Identity> {
        self.numbers.get(labels).map(|&id| Identity { id })
    }

    /// The labels of the number.
    pub fn labels(&self, identity: Identity) -> Option<&IdentityLabels> {
        self.labels.get(&identity.id)
    }

    /// Every identity, by number.
    pub fn iter(&self) -> impl Iterator<Item = (Identity, &IdentityLabels)> {
        self.labels.iter().map(|(&id, labels)| (Identity { id }, labels))
    }

    /// A free number to try for the labels: the first free one from a place that the labels
    /// themselves name. So two agents that meet the same new labels try the same number and one of
    /// them finds the other's, while agents that meet different labels seldom collide. `attempt`
    /// moves on: raise it by one each time the store says that the number was taken.
    ///
    /// `None` if every number is taken.
    pub fn propose(&self, labels: &IdentityLabels, attempt: u32) -> Option<Identity> {
        let count = Identity::MAX_ALLOCATED - Identity::MIN_ALLOCATED + 1;
        let start = (fnv64(labels.canonical().as_bytes()) % u64::from(count)) as u32;
        let number = |i| Identity::MIN_ALLOCATED + (start + i) % count;
        (0..count)
            .map(number)
            .filter(|id| !self.labels.contains_key(id))
            .nth(attempt as usize)
            .map(|id| Identity { id })
    }
}

/// The identities that stand for themselves, with their one label.
pub fn reserved() -> impl Iterator<Item = (Identity, IdentityLabels)> {
    (1..Identity::MIN_ALLOCATED).filter_map(|id| {
        let identity = Identity { id };
        Some((identity, IdentityLabels::reserved(identity.reserved_name()?)))
    })
}

/// The last part of the store key `identities/labels/HASH`: 32 hexadecimal digits of the canonical
/// line. The record under it holds the labels too; compare them. If they differ (somebody made two
/// sets collide), try the key with the next `attempt`.
pub fn labels_key(labels: &IdentityLabels, attempt: u32) -> String {
    let hash = fnv128(labels.canonical().as_bytes());
    if attempt == 0 { format!("{hash:032x}") } else { format!("{hash:032x}-{attempt}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(app: usize) -> IdentityLabels {
        IdentityLabels::parse(&format!("k8s:app=a{app}")).unwrap()
    }

    #[test]
    fn the_same_labels_get_the_same_proposal_and_taken_numbers_are_passed_over() {
        let mut all = Identities::new();
        let first = all.propose(&labels(1), 0).unwrap();
        assert_eq!(all.propose(&labels(1), 0), Some(first));
        assert_ne!(all.propose(&labels(1), 1), Some(first));
        all.insert(first, labels(2));
        assert_ne!(all.propose(&labels(1), 0), Some(first));
        assert_eq!(all.find(&labels(2)), Some(first));
        assert_eq!(all.remove(first), Some(labels(2)));
        assert_eq!(all.find(&labels(2)), None);
    }

    #[test]
    fn reserved_numbers_are_known_and_never_proposed() {
        let all = Identities::new();
        assert_eq!(all.labels(Identity::HOST), Some(&IdentityLabels::reserved("host")));
        assert_eq!(all.labels(Identity::UNKNOWN), None);
        for i in 0..50 {
            let id = all.propose(&labels(i), 0).unwrap().id;
            assert!((Identity::MIN_ALLOCATED..=Identity::MAX_ALLOCATED).contains(&id));
        }
    }

    #[test]
    fn when_all_are_taken_there_is_none() {
        let mut all = Identities::new();
        for id in Identity::MIN_ALLOCATED..=Identity::MAX_ALLOCATED {
            all.insert(Identity { id }, labels(id as usize));
        }
        assert_eq!(all.propose(&IdentityLabels::parse("k8s:new=1").unwrap(), 0), None);
        all.remove(Identity { id: 4711 });
        assert_eq!(all.propose(&IdentityLabels::parse("k8s:new=1").unwrap(), 0), Some(Identity { id: 4711 }));
    }
}
