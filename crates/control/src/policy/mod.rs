//! Policies and identities in, rule sets out.
//!
//! [`Cluster`] holds what is known of both. Each change answers which identities' rule sets may
//! differ now; [`Cluster::compile`] makes the rule set of one, complete and always the same for the
//! same inputs, whatever order they came in. A policy that does not fit is refused ([`Refused`]) and closes what it
//! selects; an identity that outgrew its table gets what fits ([`Cluster::compile_what_fits`]). [`Cluster::explain`] answers the same question as the
//! tables do, from the rules themselves, and says what would have had to differ.
//!
//! What decides, for one direction of one workload: traffic with its own node always passes (the
//! packet path sees to that before it asks); if no policy closes the direction, what no rule denies
//! passes; otherwise, what some rule allows.

mod admission;
mod blocks;
mod closing;
mod compile;
mod explain;
mod fit;
mod index;
mod model;
mod selector;
#[cfg(test)]
mod tests;

pub use admission::{PolicyError, Refusal, Refused, Retried};
pub use blocks::Blocks;
pub use closing::{Closing, closing};
pub use compile::{CompileError, Ruleset, Workloads};
pub use explain::{Difference, Explanation, NearMiss, Party, Question};
pub use fit::{Fitted, Trace, allows, closed};
pub use model::{Direction, Peer, Policy, PolicyId, PortMatch, Rule, RuleInfo, RuleVerdict, Tier};
pub use selector::{Scope, Selector};

use crate::hash::fnv64;
use crate::labels::{IdentityLabels, LabelFilter};
use admission::Waiting;
use cirri_abi::{Cookie, Identity, map};
use index::SelectorIndex;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Everything that rule sets are compiled from.
///
/// Legal order: none. Policies and identities may come and go in any order, and the same contents
/// compile to the same rule sets. Which of several policies is refused if they do not fit together is the one exception:
/// whoever is in force stays.
#[derive(Clone, Debug)]
pub struct Cluster {
    limit: usize,
    filter: LabelFilter,
    identities: BTreeMap<u32, Arc<IdentityLabels>>,
    policies: BTreeMap<PolicyId, Installed>,
    index: SelectorIndex,
    blocks: Blocks,
    /// By the prefix of an address block, the policies that name it.
    named_by: BTreeMap<IpNet, BTreeSet<PolicyId>>,
    rules: BTreeMap<u32, RuleInfo>,
    /// By identity, a number of entries that its rule set does not exceed, where one is known.
    /// Spares counting everything again for each policy.
    bounds: BTreeMap<u32, usize>,
    /// Policies that are refused.
    waiting: Waiting,
}

#[derive(Clone, Debug)]
struct Installed {
    policy: Policy,
    /// One for each rule.
    cookies: Vec<u32>,
}

/// What a change asks the caller to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    identities: BTreeSet<u32>,
    /// The blocks changed: look up the `block` of every entry of the address cache again. See
    /// [`Blocks`] for the order.
    pub blocks: bool,
    /// [`Cluster::label_filter`] changed: make the labels of every pod of this node again, before
    /// the change counts as enforced. Until then the policy does not find all pods it selects.
    pub labels: bool,
    /// There are blocks that were not there: whoever allows a wider one has more entries.
    new_blocks: bool,
}

impl Change {
    /// Identities whose rule sets may differ now, by number.
    pub fn identities(&self) -> impl Iterator<Item = Identity> + '_ {
        self.identities.iter().map(|&id| Identity { id })
    }

    /// Whether the rule set of this identity may differ now.
    pub fn concerns(&self, identity: Identity) -> bool {
        self.identities.contains(&identity.id)
    }

    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Change::default()
    }

    /// Both changes as one.
    pub fn merge(&mut self, other: Change) {
        self.identities.extend(other.identities);
        self.blocks |= other.blocks;
        self.labels |= other.labels;
        self.new_blocks |= other.new_blocks;
    }
}

impl Default for Cluster {
    fn default() -> Cluster {
        Cluster::new(map::RULESET.max_entries as usize, LabelFilter::default())
    }
}

impl Cluster {
    /// Nothing yet. A rule set may have `limit` entries; `filter` is the configured label filter.
    pub fn new(limit: usize, filter: LabelFilter) -> Cluster {
        Cluster {
            limit,
            filter,
            identities: BTreeMap::new(),
            policies: BTreeMap::new(),
            index: SelectorIndex::default(),
            blocks: Blocks::default(),
            named_by: BTreeMap::new(),
            rules: BTreeMap::new(),
            bounds: BTreeMap::new(),
            waiting: Waiting::default(),
        }
    }

    /// Learns an identity's labels, or that they changed.
    pub fn upsert_identity(&mut self, identity: Identity, labels: IdentityLabels) -> Change {
        if self.identities.get(&identity.id).is_some_and(|old| **old == labels) {
            return Change::default();
        }
        let mut change = self.remove_identity(identity);
        self.index.insert(identity.id, &labels);
        self.identities.insert(identity.id, Arc::new(labels));
        change.identities.insert(identity.id);
        self.add_dependents(identity, &mut change);
        change
    }

    /// Forgets an identity.
    pub fn remove_identity(&mut self, identity: Identity) -> Change {
        let mut change = Change::default();
        if self.identities.contains_key(&identity.id) {
            change.identities.insert(identity.id);
            self.add_dependents(identity, &mut change);
            self.index.remove(identity.id);
            self.identities.remove(&identity.id);
            self.waiting.retry_all();
        }
        change
    }

    /// The labels of an identity.
    pub fn labels(&self, identity: Identity) -> Option<&IdentityLabels> {
        self.identities.get(&identity.id).map(Arc::as_ref)
    }

    /// Every policy in force, by name, and those that stand in for others.
    pub fn policies(&self) -> impl Iterator<Item = &Policy> {
        self.policies.values().map(|installed| &installed.policy)
    }

    /// The policies in force that select an identity, by name, and those that stand in for others.
    pub fn policies_of(&self, identity: Identity) -> impl Iterator<Item = &Policy> {
        self.installed_for(identity.id).map(|installed| &installed.policy)
    }

    /// By policy of the source, how many workloads it selects, or what stands in for it does, of so many workloads by
    /// identity.
    pub fn selected(&self, workloads: &BTreeMap<u32, usize>) -> BTreeMap<PolicyId, usize> {
        let mut selected = BTreeMap::new();
        for (identity, count) in workloads {
            let ids = self.installed_for(*identity).map(|installed| installed.policy.id.of_source());
            for id in ids.collect::<BTreeSet<PolicyId>>() {
                *selected.entry(id).or_default() += count;
            }
        }
        selected
    }

    /// What is known of the rule with this cookie.
    pub fn rule(&self, cookie: u32) -> Option<&RuleInfo> {
        self.rules.get(&cookie)
    }

    /// Every rule, by cookie.
    pub fn rules(&self) -> impl Iterator<Item = &RuleInfo> {
        self.rules.values()
    }

    /// The address blocks that policies name.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// The configured filter, and every key kept that some policy selects pods by.
    pub fn label_filter(&self) -> LabelFilter {
        let mut filter = self.filter.clone();
        for key in self.index.pod_keys().filter(|key| !self.filter.admits(key)) {
            filter.keep(key);
        }
        filter
    }

    /// Puts `policy` in the place of what has that name now. Answers what it touches.
    fn replace(&mut self, id: &PolicyId, policy: Option<Policy>) -> Change {
        let mut change = Change::default();
        let mut blocks = Vec::new();
        let old = self.policies.remove(id);
        let either = old.iter().map(|old| &old.policy).chain(&policy);
        let mut left_out: BTreeSet<String> = either.flat_map(Policy::pod_keys).collect();
        left_out.retain(|key| !self.filter.admits(key));
        let kept: Vec<bool> = left_out.iter().map(|key| self.index.asks_for(key)).collect();
        if let Some(old) = &old {
            change.identities.extend(self.index.matched(&old.policy.subject));
            self.index.release(id, &old.policy);
            for cookie in &old.cookies {
                self.rules.remove(cookie);
            }
        }
        // Take the new blocks before giving back the old ones, so that what both name stays.
        for block in policy.iter().flat_map(Policy::address_blocks) {
            blocks.extend(self.blocks.acquire(block));
        }
        change.new_blocks = !blocks.is_empty();
        for block in old.iter().flat_map(|old| old.policy.address_blocks()) {
            blocks.extend(self.blocks.release(block));
            if let Some(policies) = self.named_by.get_mut(&block.cidr.trunc()) {
                policies.remove(id);
                if policies.is_empty() {
                    self.named_by.remove(&block.cidr.trunc());
                }
            }
        }
        if let Some(policy) = policy {
            self.index.acquire(id, &policy, &self.identities);
            change.identities.extend(self.index.matched(&policy.subject));
            let cookies = self.number_rules(&policy);
            for block in policy.address_blocks() {
                self.named_by.entry(block.cidr.trunc()).or_default().insert(id.clone());
            }
            self.policies.insert(id.clone(), Installed { policy, cookies });
        }
        change.blocks = !blocks.is_empty();
        let wider = |net: &IpNet| {
            let net = *net;
            (0..=net.prefix_len()).filter_map(move |length| IpNet::new(net.addr(), length).ok())
        };
        let others = blocks.iter().flat_map(wider).filter_map(|wider| self.named_by.get(&wider.trunc()));
        for other in others.flatten().filter(|other| *other != id) {
            let Some(installed) = self.policies.get(other) else { continue };
            let more = installed.policy.most_entries_of_a_block();
            for identity in self.index.matched(&installed.policy.subject) {
                change.identities.insert(identity);
                if let Some(bound) = self.bounds.get_mut(&identity) {
                    *bound += more;
                }
            }
        }
        change.labels = left_out.iter().zip(kept).any(|(key, kept)| kept != self.index.asks_for(key));
        change
    }

    /// Gives each rule a cookie that depends on what it says and whose it is alone, so that it is
    /// the same after a restart and on every node, and moves with the rule when others are
    /// inserted before it.
    fn number_rules(&mut self, policy: &Policy) -> Vec<u32> {
        let mut cookies = Vec::new();
        for rule in &policy.rules {
            let text = rule.to_string();
            let hash = fnv64(format!("{}\n{}\n{text}", policy.id, rule.direction).as_bytes());
            let mut cookie = ((hash >> 32) ^ hash) as u32;
            while cookie < Cookie::FIRST_RULE || self.rules.contains_key(&cookie) {
                cookie = cookie.wrapping_add(1).max(Cookie::FIRST_RULE);
            }
            let info = RuleInfo {
                cookie,
                kind: policy.id.kind,
                namespace: policy.id.namespace.clone(),
                policy: policy.id.name.clone(),
                direction: rule.direction,
                index: rule.index,
                text,
            };
            self.rules.insert(cookie, info);
            cookies.push(cookie);
        }
        cookies
    }

    /// Adds those whose policies name `identity` as a peer.
    fn add_dependents(&mut self, identity: Identity, change: &mut Change) {
        for id in self.index.policies_with_peer(identity.id) {
            if let Some(installed) = self.policies.get(id) {
                change.identities.extend(self.index.matched(&installed.policy.subject));
            }
        }
        for id in &change.identities {
            self.bounds.remove(id);
        }
    }

    fn installed_for(&self, identity: u32) -> impl Iterator<Item = &Installed> {
        let ids = self.index.policies_with_subject(identity).into_iter().inspect(|_| crate::work::step());
        ids.filter_map(|id| self.policies.get(id))
    }
}
