//! The rule sets of the identities that have workloads here, and of workloads whose labels have no identity. What
//! cannot be made as its policies say is made so that it is never more open than they are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cirri_abi::{Identity, PolicyEntry, PolicyKey, RulesetSlot};
use cirri_control::labels::IdentityLabels;
use cirri_control::policy::{CompileError, PolicyId, Trace, Workloads, closed};

use super::core::Core;
use super::endpoint::Endpoint;
use super::problems::Finding;
use super::rows::sort;
use super::slots::Slots;

/// The entries of a rule set.
pub(super) type Rules = Vec<(PolicyKey, PolicyEntry)>;

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
        let slotted = self.endpoints.values().filter(|endpoint| endpoint.ruleset != 0);
        let wanted: BTreeMap<RulesetSlot, u32> =
            slotted.map(|endpoint| (endpoint.ruleset, endpoint.identity)).collect();
        for (slot, identity) in &wanted {
            let is_stale = self.dirty.contains(identity) || self.is_stranger(*slot);
            if !is_stale && self.rows.rulesets.desired(slot).is_some() {
                continue;
            }
            let (entries, flaws) = self.make(*identity, *slot);
            self.rows.rulesets.set(*slot, Arc::new(entries));
            if flaws.is_empty() {
                self.flawed.remove(slot);
            } else if self.flawed.get(slot) != Some(&flaws) {
                for flaw in &flaws {
                    match flaw {
                        // Mostly for the moment in which its labels get their number.
                        Flaw::Stranger { .. } => tracing::info!(identity, %flaw, "rule set"),
                        _ => tracing::error!(identity, %flaw, "rule set"),
                    }
                }
                self.flawed.insert(*slot, flaws);
            }
        }
        self.flawed.retain(|slot, _| wanted.contains_key(slot));
        // What is dirty and has no workload here is compiled when one comes.
        self.dirty.clear();
        let unused: Vec<RulesetSlot> =
            self.rows.rulesets.iter().map(|(slot, _)| *slot).filter(|slot| !wanted.contains_key(slot)).collect();
        for slot in unused {
            self.rows.rulesets.unset(&slot);
        }
    }

    /// Whether a workload has no slot for its rule set, and there is one by now.
    pub(super) fn has_slot_for_another(&self) -> bool {
        self.endpoints.values().any(|endpoint| can_take_slot(endpoint, &self.ruleset_slots))
    }

    /// Whether policies may select workloads here that the compiler does not know by their number: it does not say when
    /// their rule sets change.
    pub(super) fn has_strangers(&self) -> bool {
        self.flawed.keys().any(|slot| self.is_stranger(*slot))
    }

    fn is_stranger(&self, slot: RulesetSlot) -> bool {
        let flaws = self.flawed.get(&slot);
        flaws.into_iter().flatten().any(|flaw| matches!(flaw, Flaw::Stranger { .. } | Flaw::Mixed { .. }))
    }

    /// The rule set of the workloads with a slot, and what is wrong with it.
    fn make(&self, identity: u32, slot: RulesetSlot) -> (Rules, Vec<Flaw>) {
        let number = Identity { id: identity };
        let mut flaws = Vec::new();
        let theirs: BTreeSet<&str> =
            self.endpoints.values().filter(|it| it.ruleset == slot).map(|it| it.labels.as_str()).collect();
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
        let noted = self.flawed.get(&slot).into_iter().flatten().find_map(|flaw| match flaw {
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

/// In the order in which rule sets compare.
pub(super) fn sorted(mut entries: Rules) -> Rules {
    sort(&mut entries);
    entries
}

/// Whether a workload has no slot, and there is one for it.
pub(super) fn can_take_slot(endpoint: &Endpoint, slots: &Slots<u32>) -> bool {
    endpoint.ruleset == 0 && (!slots.is_full() || slots.get(&endpoint.ruleset_of()).is_some())
}

/// Gives a workload the slot of its rule set. If none is left it has none: nothing passes. Whether it has one.
pub(super) fn take_slot(endpoint: &mut Endpoint, slots: &mut Slots<u32>) -> bool {
    endpoint.ruleset = slots.take(&endpoint.ruleset_of()).unwrap_or_default();
    endpoint.ruleset != 0
}

/// The workloads that have none.
pub(super) fn without_slot(endpoints: &BTreeMap<u16, Endpoint>) -> impl Iterator<Item = (String, Finding)> {
    endpoints.values().filter(|endpoint| endpoint.ruleset == 0).map(|endpoint| {
        let remedy = "delete pods, or exclude labels that only name an instance";
        let finding = Finding::new("no slot for its rule set is left on this node, and nothing passes", remedy);
        (format!("of {}/{}", endpoint.namespace, endpoint.pod), finding)
    })
}

#[cfg(test)]
mod tests {
    use cirri_abi::epoch_slot;

    use super::*;
    use crate::agent::endpoint::tests::endpoint;

    #[test]
    fn a_workload_without_a_slot_is_closed_and_named_until_there_is_one() {
        let mut slots = Slots::new(epoch_slot::FIRST_RULESET..=epoch_slot::FIRST_RULESET + 1);
        let mut of_others = Endpoint { id: 4, identity: 301, pod: "other".to_owned(), ..endpoint() };
        let mut relabelled = Endpoint { unnumbered: true, ..endpoint() };
        assert!(take_slot(&mut endpoint(), &mut slots) && take_slot(&mut of_others, &mut slots));
        // Its former labels have a slot: it does not stay with their rules.
        assert!(!take_slot(&mut relabelled, &mut slots));
        assert!(relabelled.row().ruleset < epoch_slot::FIRST_RULESET, "a slot that no rule set can be in");
        assert!(!can_take_slot(&relabelled, &slots));
        let named = |of: [&Endpoint; 2]| {
            let endpoints = of.map(|endpoint| (endpoint.id, endpoint.clone())).into();
            without_slot(&endpoints).map(|(object, finding)| format!("{object}: {}", finding.found)).collect::<Vec<_>>()
        };
        let said = "of shop/web: no slot for its rule set is left on this node, and nothing passes";
        assert_eq!(named([&relabelled, &of_others]), [said]);

        slots.release(&of_others.ruleset_of());
        assert!(can_take_slot(&relabelled, &slots) && take_slot(&mut relabelled, &mut slots));
        assert_eq!(relabelled.ruleset, of_others.ruleset);
        assert!(!can_take_slot(&relabelled, &slots));
        assert!(named([&relabelled, &of_others]).is_empty());

        // With the labels of others again it has the rule set that they have, although no slot is free.
        let mut back = Endpoint { unnumbered: false, ruleset: 0, ..relabelled };
        assert!(slots.is_full() && can_take_slot(&back, &slots) && take_slot(&mut back, &mut slots));
        assert_eq!(slots.get(&back.identity), Some(back.ruleset));
    }
}
