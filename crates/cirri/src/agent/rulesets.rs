//! The rule sets of the identities that have workloads here: made, or kept where they cannot be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cirri_abi::{Cookie, Identity, PolicyEntry, PolicyKey, RulesetSlot};
use cirri_control::labels::IdentityLabels;
use cirri_control::policy::CompileError;

use super::core::Core;
use super::rows::sort;

impl Core {
    pub(super) fn desire_rulesets(&mut self) {
        let wanted: BTreeMap<u32, RulesetSlot> =
            self.endpoints.values().map(|endpoint| (endpoint.identity, endpoint.ruleset)).collect();
        for (identity, slot) in &wanted {
            if !self.dirty.contains(identity) && self.rows.rulesets.desired(slot).is_some() {
                continue;
            }
            match self.compile(*identity, *slot) {
                Ok(entries) => {
                    self.uncompiled.remove(identity);
                    self.rows.rulesets.set(*slot, Arc::new(entries));
                }
                Err(error) => {
                    tracing::error!(identity, %error, "no new rule set");
                    self.uncompiled.insert(*identity, error);
                    if self.rows.rulesets.desired(slot).is_none() {
                        let entries = self.pinned(*identity, *slot).unwrap_or_else(|| Arc::new(closed()));
                        self.rows.rulesets.set(*slot, entries);
                    }
                }
            }
        }
        self.uncompiled.retain(|identity, _| wanted.contains_key(identity));
        // What is dirty and has no workload here is compiled when one comes.
        self.dirty.clear();
        let live: BTreeSet<RulesetSlot> = wanted.into_values().collect();
        let unused: Vec<RulesetSlot> =
            self.rows.rulesets.iter().map(|(slot, _)| *slot).filter(|slot| !live.contains(slot)).collect();
        for slot in unused {
            self.rows.rulesets.unset(&slot);
        }
    }

    /// The rule set of an identity, if enough is known to make it.
    fn compile(&self, identity: u32, slot: RulesetSlot) -> Result<Rules, Uncompiled> {
        let number = Identity { id: identity };
        let labels = self.cluster.labels(number);
        let is_of = |labels: &IdentityLabels| {
            let canonical = labels.canonical();
            self.endpoints.values().all(|endpoint| endpoint.identity != identity || endpoint.labels == canonical)
        };
        let Some(labels) = labels.filter(|labels| is_of(labels)) else {
            return Err(Uncompiled::Stranger { identity });
        };
        let namespace = labels.namespace().unwrap_or_default();
        let never_compiled = self.rows.rulesets.desired(&slot).is_none() || self.uncompiled.contains_key(&identity);
        if never_compiled && self.view.lacks_policy(namespace) && self.pinned(identity, slot).is_some() {
            return Err(Uncompiled::Hole { identity, namespace: namespace.to_owned() });
        }
        let mut ruleset = self.cluster.compile(number)?;
        sort(&mut ruleset.entries);
        Ok(ruleset.entries)
    }

    /// The rule set that an earlier run left in the kernel for this identity.
    fn pinned(&self, identity: u32, slot: RulesetSlot) -> Option<Arc<Rules>> {
        let theirs = |row: &cirri_abi::Endpoint| row.identity.id == identity && row.ruleset == slot;
        let here = self.endpoints.keys().filter_map(|id| self.rows.endpoints.actual(id)).any(theirs);
        self.rows.rulesets.actual(&slot).filter(|_| here).cloned()
    }
}

/// The entries of a rule set.
type Rules = Vec<(PolicyKey, PolicyEntry)>;

/// Why an identity's rule set is not made anew. The last good one is in force, or none that lets
/// anything pass.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Uncompiled {
    /// The compiler refused.
    #[error(transparent)]
    Refused(#[from] CompileError),
    /// Its record is gone or names others.
    #[error("identity {identity} is not known by the labels of its workloads; a new number is on its way")]
    Stranger {
        /// The number.
        identity: u32,
    },
    /// A policy cannot be read, and nobody knows what it said.
    #[error(
        "a policy of namespace {namespace} cannot be read and is not known from before; identity {identity} keeps its rules"
    )]
    Hole {
        /// The number.
        identity: u32,
        /// The namespace.
        namespace: String,
    },
}

/// A rule set that lets nothing pass.
fn closed() -> Rules {
    let key = |direction| PolicyKey { prefix_len: PolicyKey::STATIC_BITS, direction, ..PolicyKey::default() };
    let deny = PolicyEntry {
        cookie: Cookie::DEFAULT_DENY,
        prefix_len: PolicyKey::STATIC_BITS as u8,
        ..PolicyEntry::default()
    };
    let mut entries =
        [cirri_abi::Direction::INGRESS, cirri_abi::Direction::EGRESS].map(|direction| (key(direction), deny)).to_vec();
    sort(&mut entries);
    entries
}
