//! When a new identity is used towards other nodes.
//!
//! Through the overlay a packet says who sent it, and the receiver's node judges it by that. Rule sets that
//! were made before an identity was there refuse it. So a workload whose identity changes is told to others
//! under its old one until all of them have said that their rule sets know the new one (`enforced/<node>` in
//! the store), or until a grace time is over. Its address stands for the same: its record in the store changes with
//! its packets. Its own rules, and those of this node, change at once.

use std::collections::BTreeMap;
use std::time::Instant;

use super::core::Core;
use super::records::{self, EnforcedRecord};

impl Core {
    /// Workloads whose identity all others know by now, or that have waited long enough, use it. Answers
    /// when the next has.
    pub fn announce(&mut self, now: Instant) -> Option<Instant> {
        // Who the others are is not known before the store was seen whole.
        let ready = self.is_ready();
        let mut done = Vec::new();
        for (id, until) in &self.announcing {
            let Some(endpoint) = self.endpoints.get(id) else {
                done.push((*id, None));
                continue;
            };
            let behind = self.behind(endpoint.identity);
            if endpoint.tunnel_identity == 0 || (ready && behind.is_none()) {
                done.push((*id, None));
            } else if *until <= now {
                done.push((*id, behind.map(str::to_owned)));
            }
        }
        for (id, behind) in done {
            self.announcing.remove(&id);
            let Some(endpoint) = self.endpoints.get_mut(&id) else { continue };
            if let Some(peer) = behind {
                let identity = endpoint.identity;
                tracing::warn!(endpoint = id, identity, peer, "the node has not said that it knows the identity; used");
            }
            if std::mem::take(&mut endpoint.tunnel_identity) == 0 {
                continue;
            }
            if let Err(error) = self.ledger.save(endpoint) {
                tracing::warn!(endpoint = id, %error, "its file is behind; a restart repairs it");
            }
            let endpoint = endpoint.clone();
            self.rows.endpoints.set(id, endpoint.row());
            for ip in endpoint.addresses() {
                let (key, record) = (records::ip_key(&self.node.name, ip), self.ip_record(&endpoint, ip));
                self.rows.published.set(key, serde_json::to_vec(&record).unwrap_or_default());
            }
        }
        self.announcing.values().min().copied()
    }

    /// A node whose rule sets may not know an identity.
    fn behind(&self, identity: u32) -> Option<&str> {
        let written = self.view.identity_revisions.get(&identity);
        let knows = |name: &str| {
            let enforced = self.view.enforced.get(name);
            written.zip(enforced).is_some_and(|(written, enforced)| enforced.identities >= *written)
        };
        self.peers().map(|peer| peer.name.as_str()).find(|name| !knows(name))
    }

    /// Which identities the rule sets will know when they are as desired.
    pub(super) fn desire_identities(&mut self) {
        let mut words: BTreeMap<u32, u64> = BTreeMap::new();
        for (identity, _) in self.view.identities.iter() {
            *words.entry(identity.id / u64::BITS).or_default() |= 1 << (identity.id % u64::BITS);
        }
        self.rows.identities.replace(words);
        self.newest_identity = self.view.identity_revisions.values().max().copied().unwrap_or_default();
    }

    /// What the others may rely on, once the kernel's tables are as desired; whether that is news.
    pub fn note_enforced(&mut self) -> bool {
        if !self.filled || !self.rows.rulesets.is_done() || !self.rows.identities.is_done() {
            return false;
        }
        if std::mem::replace(&mut self.known_identities, self.newest_identity) == self.newest_identity {
            return false;
        }
        let (key, value) = self.enforced_record();
        self.rows.published.set(key, value);
        true
    }

    /// The record of what this node enforces.
    pub(super) fn enforced_record(&self) -> (String, Vec<u8>) {
        let record = EnforcedRecord { identities: self.known_identities };
        let json = serde_json::to_vec(&record).unwrap_or_default();
        (records::enforced_key(&self.node.name), json)
    }
}
