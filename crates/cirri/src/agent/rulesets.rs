//! The rule sets of the identities that have workloads here. What cannot be made as its policies say is made so that it
//! is never more open than they are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cirri_abi::{Identity, PolicyEntry, PolicyKey, RulesetSlot};
use cirri_control::labels::IdentityLabels;
use cirri_control::policy::{CompileError, PolicyId, Trace, Workloads, closed};

use super::core::Core;
use super::rows::sort;

/// The entries of a rule set.
type Rules = Vec<(PolicyKey, PolicyEntry)>;

/// Why an identity's rule set is not just what its policies say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// Not all of it fits.
    #[error("who does not fit is not allowed, all else is in force: {why}")]
    TooLarge {
        /// Why.
        why: CompileError,
        /// By policy, how many peers of its rules are not allowed.
        left_out: BTreeMap<PolicyId, usize>,
    },
    /// The number's record is gone or names others.
    #[error(
        "identity {identity} is not known by the labels of its workloads, and they are judged by those; a new number is on its way"
    )]
    Stranger {
        /// The number.
        identity: u32,
    },
    /// The number has workloads of several labels.
    #[error(
        "workloads with the number {identity} have different labels, and nothing passes; new numbers are on their way"
    )]
    Mixed {
        /// The number.
        identity: u32,
    },
    /// A policy cannot be read, and nobody knows what it said.
    #[error(
        "a policy of namespace {namespace} cannot be read and is not known from before; identity {identity} keeps what it may have closed and allowed"
    )]
    Hole {
        /// The number.
        identity: u32,
        /// The namespace.
        namespace: String,
        /// What it may have been.
        trace: Trace,
    },
}

impl Core {
    pub(super) fn desire_rulesets(&mut self) {
        let wanted: BTreeMap<u32, RulesetSlot> =
            self.endpoints.values().map(|endpoint| (endpoint.identity, endpoint.ruleset)).collect();
        for (identity, slot) in &wanted {
            let is_stale = self.dirty.contains(identity) || self.is_stranger(*identity);
            if !is_stale && self.rows.rulesets.desired(slot).is_some() {
                continue;
            }
            let (entries, flaws) = self.make(*identity, *slot);
            self.rows.rulesets.set(*slot, Arc::new(entries));
            if flaws.is_empty() {
                self.flawed.remove(identity);
            } else if self.flawed.get(identity) != Some(&flaws) {
                flaws.iter().for_each(|flaw| tracing::error!(identity, %flaw, "rule set"));
                self.flawed.insert(*identity, flaws);
            }
        }
        self.flawed.retain(|identity, _| wanted.contains_key(identity));
        // What is dirty and has no workload here is compiled when one comes.
        self.dirty.clear();
        let live: BTreeSet<RulesetSlot> = wanted.into_values().collect();
        let unused: Vec<RulesetSlot> =
            self.rows.rulesets.iter().map(|(slot, _)| *slot).filter(|slot| !live.contains(slot)).collect();
        for slot in unused {
            self.rows.rulesets.unset(&slot);
        }
    }

    /// Whether policies may select workloads here that the compiler does not know by their number: it does not say when
    /// their rule sets change.
    pub(super) fn has_strangers(&self) -> bool {
        self.flawed.keys().any(|identity| self.is_stranger(*identity))
    }

    fn is_stranger(&self, identity: u32) -> bool {
        let flaws = self.flawed.get(&identity);
        flaws.into_iter().flatten().any(|flaw| matches!(flaw, Flaw::Stranger { .. } | Flaw::Mixed { .. }))
    }

    /// The rule set of an identity, and what is wrong with it.
    fn make(&self, identity: u32, slot: RulesetSlot) -> (Rules, Vec<Flaw>) {
        let number = Identity { id: identity };
        let mut flaws = Vec::new();
        let theirs: BTreeSet<&str> =
            self.endpoints.values().filter(|it| it.identity == identity).map(|it| it.labels.as_str()).collect();
        let labels = match theirs.into_iter().map(IdentityLabels::parse).collect::<Vec<_>>().as_slice() {
            // Without a namespace no policy would find them.
            [Ok(labels)] if labels.namespace().is_some() => labels.clone(),
            _ => return (sorted(closed(number).entries), vec![Flaw::Mixed { identity }]),
        };
        if self.cluster.labels(number) != Some(&labels) {
            flaws.push(Flaw::Stranger { identity });
        }
        let trace = self.trace(identity, slot, labels.namespace().unwrap_or_default());
        let workloads = Workloads { identity: number, labels: &labels, trace: trace.as_ref().map(|(_, trace)| trace) };
        let entries = match self.cluster.compile_for(&workloads) {
            Ok(ruleset) => ruleset.entries,
            Err(why) => {
                let before = self.rows.rulesets.desired(&slot).cloned().or_else(|| self.pinned(identity, slot));
                let fitted = self.cluster.compile_what_fits(&workloads, before.as_deref().map_or(&[], Vec::as_slice));
                flaws.push(Flaw::TooLarge { why, left_out: fitted.left_out });
                fitted.ruleset.entries
            }
        };
        flaws.extend(trace.map(|(namespace, trace)| Flaw::Hole { identity, namespace, trace }));
        (sorted(entries), flaws)
    }

    /// What is left, in the rule set that an earlier run made of it, of a policy that cannot be read now.
    fn trace(&self, identity: u32, slot: RulesetSlot, namespace: &str) -> Option<(String, Trace)> {
        if !self.view.lacks_policy(namespace) {
            return None;
        }
        let noted = self.flawed.get(&identity).into_iter().flatten().find_map(|flaw| match flaw {
            Flaw::Hole { trace, .. } => Some(trace.clone()),
            _ => None,
        });
        // Since it was made in this run it follows from what is known.
        let is_new = self.rows.rulesets.desired(&slot).is_none();
        let found = || {
            let known = |cookie| self.earlier_rules.contains(&cookie) || self.cluster.rule(cookie).is_some();
            Some(Trace::of(&self.pinned(identity, slot).filter(|_| is_new)?, known))
        };
        Some((namespace.to_owned(), noted.or_else(found)?))
    }

    /// The rule set that an earlier run left in the kernel for this identity.
    fn pinned(&self, identity: u32, slot: RulesetSlot) -> Option<Arc<Rules>> {
        let theirs = |row: &cirri_abi::Endpoint| row.identity.id == identity && row.ruleset == slot;
        let here = self.endpoints.keys().filter_map(|id| self.rows.endpoints.actual(id)).any(theirs);
        self.rows.rulesets.actual(&slot).filter(|_| here).cloned()
    }
}

fn sorted(mut entries: Rules) -> Rules {
    sort(&mut entries);
    entries
}
