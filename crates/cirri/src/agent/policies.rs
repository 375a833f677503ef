//! Policies on their way into force, and what is said of them.

use std::collections::BTreeMap;

use cirri_control::policy::{self, CompileError, PolicyId, Refusal};
use cirri_control::resource::Resource;

use super::core::Core;
use super::rulesets::Flaw;
use super::view::{Change, Named};
use crate::api::{PolicyGet, PolicyInfo, RuleInfo};

impl Core {
    /// Takes policies that an earlier run had in force: they are not weighed again against what there is by now.
    pub(super) fn take_again(&mut self, policies: Vec<Change>) {
        for change in policies {
            if let Change::PolicyPut(name, _) = change
                && let Some((policy, _)) = self.view.policies.get(&name)
            {
                let changed = self.cluster.restore_policy(policy);
                self.note(changed);
            }
        }
    }

    /// Takes a policy of the store, or what stands in for it.
    pub(super) fn take_policy(&mut self, name: &Named, text: Vec<u8>) -> policy::Change {
        let Some((policy, _)) = self.view.policies.get(name) else { return policy::Change::default() };
        match self.cluster.upsert_policy(policy) {
            Ok(change) => {
                self.view.save_policy(name, text);
                change
            }
            Err(refused) => {
                tracing::error!(namespace = %name.0, policy = %name.1, error = %refused, "policy refused");
                self.view.save_refused(name, text);
                refused.change
            }
        }
    }

    /// Tries those again that were refused, if what was in their way may have gone.
    pub(super) fn retry_policies(&mut self) -> policy::Change {
        let retried = self.cluster.retry();
        for id in retried.accepted {
            tracing::info!(namespace = id.namespace, policy = id.name, "policy fits now");
            let name = (id.namespace, id.name);
            if let Some((policy, _)) = self.view.policies.get(&name) {
                let text = Resource::NetworkPolicy(policy.clone()).to_json();
                self.view.save_policy(&name, text.into_bytes());
            }
        }
        retried.change
    }

    /// The policies that were asked for.
    pub fn policy_infos(&self, wanted: &PolicyGet) -> Vec<PolicyInfo> {
        let is_wanted = |(namespace, name): &Named| {
            wanted.namespace.as_ref().is_none_or(|want| want == namespace)
                && wanted.name.as_ref().is_none_or(|want| want == name)
        };
        let mut rules: BTreeMap<Named, Vec<RuleInfo>> = BTreeMap::new();
        for rule in self.cluster.rules() {
            rules.entry((rule.namespace.clone(), rule.policy.clone())).or_default().push(RuleInfo {
                direction: rule.direction.to_string(),
                index: rule.index as u32,
                text: rule.text.clone(),
                cookie: rule.cookie,
            });
        }
        let mut endpoints: BTreeMap<u32, usize> = BTreeMap::new();
        for endpoint in self.endpoints.values() {
            *endpoints.entry(endpoint.identity).or_default() += 1;
        }
        let selected = self.cluster.selected(&endpoints);
        let refusals: BTreeMap<&PolicyId, Refusal> = self.cluster.refused().collect();
        let left_out = self.left_out();
        let one = |(name, (_, revision)): (&Named, &(_, u64))| {
            let mut rules = rules.remove(name).unwrap_or_default();
            rules.sort_by(|a, b| (&b.direction, a.index).cmp(&(&a.direction, b.index)));
            let id = PolicyId::network_policy(&name.0, &name.1);
            PolicyInfo {
                namespace: name.0.clone(),
                name: name.1.clone(),
                revision: *revision,
                state: state(refusals.get(&id), left_out.get(&id).copied(), *revision <= self.enforced_revision),
                endpoints: selected.get(&id).copied().unwrap_or_default(),
                rules,
            }
        };
        self.view.policies.iter().filter(|(name, _)| is_wanted(name)).map(one).collect()
    }

    /// Policies of which not everything fits, why, and how many peers of their rules are left out at the most.
    fn left_out(&self) -> BTreeMap<&PolicyId, (&CompileError, usize)> {
        let mut all = BTreeMap::new();
        for flaw in self.flawed.values().flatten() {
            let Flaw::TooLarge { why, left_out } = flaw else { continue };
            for (id, peers) in left_out {
                let known = all.entry(id).or_insert((why, *peers));
                if known.1 < *peers {
                    *known = (why, *peers);
                }
            }
        }
        all
    }
}

/// What is said of a policy: that it is enforced only if all of it is in every rule set that it belongs to.
fn state(refusal: Option<&Refusal>, left_out: Option<(&CompileError, usize)>, is_done: bool) -> String {
    match (refusal, left_out) {
        (Some(refusal), _) => refused(refusal),
        (None, Some((why, peers))) => format!("in part: {peers} peers of its rules are not allowed: {why}"),
        (None, None) if is_done => "enforced".to_owned(),
        (None, None) => "pending".to_owned(),
    }
}

/// What is said of a policy that is refused.
pub(super) fn refused(refusal: &Refusal) -> String {
    let holds = match refusal.has_last_good {
        true => "its last good version is in force, and what it selects is closed to all else",
        false => "what it selects is closed",
    };
    format!("refused: {}; {holds}", refusal.why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cirri_control::policy::PolicyError;

    #[test]
    fn a_policy_is_called_enforced_only_if_all_of_it_is() {
        let error = CompileError::UnknownIdentity { identity: cirri_abi::Identity { id: 300 } };
        let why = PolicyError::TooLarge(error.clone());
        let refusal = |has_last_good| Refusal { why: why.clone(), has_last_good };
        assert_eq!(state(None, None, true), "enforced");
        assert_eq!(state(None, None, false), "pending");
        assert!(state(None, Some((&error, 3)), true).starts_with("in part: 3 peers"));
        assert!(state(Some(&refusal(false)), None, true).ends_with("what it selects is closed"));
        let closed_beside = "its last good version is in force, and what it selects is closed to all else";
        assert!(state(Some(&refusal(true)), Some((&error, 3)), true).ends_with(closed_beside));
    }
}
