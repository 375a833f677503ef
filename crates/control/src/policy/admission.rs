//! Which policies are let in, and what is in force of the others.
//!
//! A policy that is refused closes what it selects: its stand-in ([`Policy::stand_in`]) is in force beside its last
//! version that was let in, if there is one. It is tried again when something went that was in its way.

use super::{Change, Cluster, CompileError, Policy, PolicyId};
use crate::cut::cut;
use cirri_abi::Identity;
use std::collections::{BTreeMap, BTreeSet};

/// Why a policy is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// It selects by a label that pods cannot carry.
    #[error(
        "{policy} selects pods by the label {}, which is reserved and never counts as a pod's own; use namespaceSelector or another label",
        cut(.key)
    )]
    ReservedLabel {
        /// The policy.
        policy: PolicyId,
        /// The label's key.
        key: String,
    },
    /// A rule set would not fit its table.
    #[error(transparent)]
    TooLarge(#[from] CompileError),
}

impl PolicyError {
    /// Whose table is too small; only when less stands there it is worth another try.
    fn blocker(&self) -> Option<u32> {
        match self {
            PolicyError::ReservedLabel { .. } => None,
            PolicyError::TooLarge(error) => Some(error.identity().id),
        }
    }
}

/// A policy was not let in. What it selects is closed in the directions that it names; a version that was let in before
/// stays in force besides.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Refused {
    /// Why.
    pub why: PolicyError,
    /// What closing it changed.
    pub change: Change,
}

/// A policy that is refused now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub why: PolicyError,
    /// Whether an earlier version of it is in force.
    pub has_last_good: bool,
}

/// What came of trying again what was refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retried {
    /// Policies that are let in now.
    pub accepted: Vec<PolicyId>,
    /// What that changed.
    pub change: Change,
}

/// Policies that are refused, and what may help.
#[derive(Clone, Debug, Default)]
pub(super) struct Waiting {
    refused: BTreeMap<PolicyId, Waiter>,
    /// By identity whose table is in the way, the policies that wait for it.
    behind: BTreeMap<u32, BTreeSet<PolicyId>>,
    /// Of those, the ones whose table may have room now.
    again: BTreeSet<u32>,
}

#[derive(Clone, Debug)]
struct Waiter {
    policy: Policy,
    why: PolicyError,
    /// No less than the entries that it took when it was tried last.
    cost: usize,
}

impl Waiting {
    fn insert(&mut self, waiter: Waiter) {
        if let Some(blocker) = waiter.why.blocker() {
            self.behind.entry(blocker).or_default().insert(waiter.policy.id.clone());
        }
        self.refused.insert(waiter.policy.id.clone(), waiter);
    }

    fn remove(&mut self, id: &PolicyId) -> Option<Waiter> {
        let waiter = self.refused.remove(id)?;
        if let Some(blocker) = waiter.why.blocker()
            && let Some(behind) = self.behind.get_mut(&blocker)
        {
            behind.remove(id);
            if behind.is_empty() {
                self.behind.remove(&blocker);
            }
        }
        Some(waiter)
    }

    /// The rule sets of these may have become smaller.
    fn retry(&mut self, change: &Change) {
        self.again.extend(change.identities.iter().filter(|id| self.behind.contains_key(id)));
    }

    /// Any rule set may have, and a policy that is refused may cost less.
    pub(super) fn retry_all(&mut self) {
        self.again.extend(self.behind.keys());
    }

    /// The policies behind an identity, the cheapest first.
    fn behind(&self, blocker: u32) -> Vec<PolicyId> {
        let mut ids: Vec<&PolicyId> = self.behind.get(&blocker).into_iter().flatten().collect();
        ids.sort_by_key(|id| self.refused.get(id).map(|waiter| waiter.cost));
        ids.into_iter().cloned().collect()
    }
}

impl Cluster {
    /// Takes a policy, new or changed; a NetworkPolicy converts into one.
    ///
    /// Its cost is counted first: if a rule set would get larger than its table, it is refused.
    ///
    /// # Errors
    /// It is refused.
    pub fn upsert_policy(&mut self, policy: impl Into<Policy>) -> Result<Change, Box<Refused>> {
        let policy = policy.into();
        if let Some(known) = self.waiting.refused.get(&policy.id).filter(|known| known.policy == policy) {
            return Err(Box::new(Refused { why: known.why.clone(), change: Change::default() }));
        }
        let mut change = self.withdraw_refusal(&policy.id);
        match self.admit(&policy) {
            Ok(admitted) => {
                change.merge(admitted);
                Ok(change)
            }
            Err((why, cost)) => {
                let stand_in = policy.stand_in();
                change.merge(self.put(&stand_in.id.clone(), Some(stand_in)));
                self.waiting.insert(Waiter { policy, why: why.clone(), cost });
                Err(Box::new(Refused { why, change }))
            }
        }
    }

    /// Takes a policy that an earlier run let in: it was in force, whatever there is besides by now.
    pub fn restore_policy(&mut self, policy: impl Into<Policy>) -> Change {
        let policy = policy.into();
        self.put(&policy.id.clone(), Some(policy))
    }

    /// Takes a policy away.
    pub fn remove_policy(&mut self, id: &PolicyId) -> Change {
        let mut change = self.withdraw_refusal(id);
        change.merge(self.replace(id, None));
        self.waiting.retry(&change);
        change
    }

    /// Policies that are refused, by name.
    pub fn refused(&self) -> impl Iterator<Item = (&PolicyId, Refusal)> {
        self.waiting.refused.iter().map(|(id, waiter)| {
            (id, Refusal { why: waiter.why.clone(), has_last_good: self.policies.contains_key(id) })
        })
    }

    /// Tries refused policies again, if what was in their way may have gone since.
    ///
    /// Costs no more than a few counts of a table for each table that is in the way of some, however many those are:
    /// after that many failures with the cheapest ones the others wait on.
    pub fn retry(&mut self) -> Retried {
        let mut retried = Retried::default();
        while let Some(blocker) = self.waiting.again.pop_first() {
            let mut failures = 0;
            for id in self.waiting.behind(blocker) {
                let Some(mut waiter) = self.waiting.remove(&id) else { continue };
                match self.admit(&waiter.policy) {
                    Ok(change) => {
                        retried.change.merge(change);
                        retried.change.merge(self.replace(&id.stand_in(), None));
                        retried.accepted.push(id);
                    }
                    Err((why, cost)) => {
                        failures += usize::from(why.blocker() == Some(blocker));
                        waiter.why = why;
                        waiter.cost = cost;
                        self.waiting.insert(waiter);
                    }
                }
                if failures == MOST_FAILURES {
                    break;
                }
            }
        }
        retried
    }

    /// Puts a policy in, whatever it costs.
    fn put(&mut self, id: &PolicyId, policy: Option<Policy>) -> Change {
        let change = self.replace(id, policy);
        for identity in &change.identities {
            self.bounds.remove(identity);
        }
        change
    }

    /// The policy is not refused any more.
    fn withdraw_refusal(&mut self, id: &PolicyId) -> Change {
        match self.waiting.remove(id) {
            Some(_) => self.replace(&id.stand_in(), None),
            None => Change::default(),
        }
    }

    /// Puts a policy in the place of its last version; nothing changes if that would make a rule set too large. What it
    /// would have cost is told with the reason.
    fn admit(&mut self, policy: &Policy) -> Result<Change, (PolicyError, usize)> {
        let old = self.policies.get(&policy.id).map(|old| old.policy.clone());
        if old.as_ref() == Some(policy) {
            return Ok(Change::default());
        }
        if let Some(key) = policy.reserved_key() {
            return Err((PolicyError::ReservedLabel { key, policy: policy.id.clone() }, 0));
        }
        // Asked before it is replaced: only what policies name is known of.
        let before = old.as_ref().map(|old| Weight {
            cost: self.most_entries_of(old),
            subjects: self.index.matched(&old.subject).collect(),
        });
        let change = self.replace(&policy.id, Some(policy.clone()));
        let cost = self.most_entries_of(policy);
        let after = Weight { cost, subjects: self.index.matched(&policy.subject).collect() };
        match self.misfit(&change, &before.unwrap_or_default(), &after) {
            None => {
                self.waiting.retry(&change);
                Ok(change)
            }
            Some(error) => {
                self.put(&policy.id, old);
                Err((error.into(), cost))
            }
        }
    }

    /// The first of a change's identities whose rule set does not fit now.
    ///
    /// What does not grow is not looked at: the way out of too many rules leads through smaller policies.
    fn misfit(&mut self, change: &Change, before: &Weight, after: &Weight) -> Option<CompileError> {
        for identity in change.identities() {
            let cost = after.at(identity);
            if cost <= before.at(identity) && !change.new_blocks {
                // Not more than before, but perhaps something else.
                self.bounds.remove(&identity.id);
                continue;
            }
            // Adding up is quick and never too little. Only who might not fit is counted exactly.
            let mut bound = self.bounds.get(&identity.id).map_or(usize::MAX, |known| known + cost);
            if bound > self.limit {
                bound = self.bound(identity);
            }
            if bound > self.limit {
                bound = match self.count(identity) {
                    Ok(count) => count,
                    Err(error) => return Some(error),
                };
            }
            self.bounds.insert(identity.id, bound);
        }
        None
    }
}

/// What a version of a policy weighs.
#[derive(Default)]
struct Weight {
    /// No less than the entries that it takes.
    cost: usize,
    /// In whose rule sets.
    subjects: BTreeSet<u32>,
}

impl Weight {
    fn at(&self, identity: Identity) -> usize {
        if self.subjects.contains(&identity.id) { self.cost } else { 0 }
    }
}

/// So often one table is counted in vain before those that wait for it wait on.
const MOST_FAILURES: usize = 8;
