//! A store that is another one than before: its data were lost, or the agent was led to the wrong one.
//!
//! What such a store lacks was not deleted in it. So content of the former store is held until a successor is seen, or
//! the store says under the former one's id that it goes on as that. Until then the former id is the one that is
//! saved: a restart changes nothing.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use cirri_store::{Entry, STORE_ID};

use super::{Change, Identity, Kept, Key, View, object, parse_key, policy_of};

/// How many objects a message names.
const NAMED: usize = 3;

/// What another store does not have.
#[derive(Debug, Default)]
pub struct Former {
    /// The id of the last store whose content was seen whole, or made up for.
    id: Option<Vec<u8>>,
    /// Whole keys that the store of now does not have, and whose content stays.
    held: BTreeSet<String>,
    /// Until when what agents wrote is held; none: that does not end now.
    until: Option<Instant>,
}

/// Objects that are in force although the store lacks them.
#[derive(Debug, PartialEq, Eq)]
pub struct Missing {
    /// How many, and the first of them by name.
    pub objects: String,
    /// The id of the store that had them.
    pub id: String,
}

impl Former {
    /// What an earlier run knew.
    pub(super) fn restore(&mut self, id: Vec<u8>) {
        self.id = Some(id);
    }

    /// It is in the store again, or gone for good. Whether it was held.
    pub(super) fn let_go(&mut self, key: &str) -> bool {
        self.held.remove(key)
    }
}

impl View {
    /// Takes in all that the store holds.
    pub(super) fn replace(&mut self, entries: Vec<Entry>, changes: &mut Vec<Change>) {
        // Into this one agents may not have written anything yet.
        self.former.until = None;
        let found = entries.iter().find(|entry| entry.key == STORE_ID).map(|entry| &entry.value);
        let is_another = self.former.id.is_some() && self.former.id.as_ref() != found;
        let there: BTreeSet<&str> = entries.iter().map(|entry| entry.key.as_str()).collect();
        let known = self.entries.keys().chain(&self.former.held);
        let gone: Vec<String> = known.filter(|key| !there.contains(key.as_str())).cloned().collect();
        for key in gone {
            match is_another {
                true => self.hold(key, changes),
                false => self.delete(&key, changes),
            }
        }
        for entry in entries {
            self.put(entry, changes);
        }
        if let Some(Missing { objects, .. }) = self.missing() {
            tracing::error!(
                "the store is another one than before, and lacks {objects}; what was enforced stays enforced"
            );
        }
    }

    /// Keeps the content of a key that another store does not have.
    fn hold(&mut self, key: String, changes: &mut Vec<Change>) {
        match parse_key(&key) {
            // Whoever wrote it writes it again, and until then it is true of the former store alone.
            Key::Enforced(_) | Key::Labels | Key::Other => return self.delete(&key, changes),
            // So are its revisions.
            Key::Identity(id) => {
                self.identity_revisions.remove(&id);
                changes.push(Change::IdentityPut(Identity { id }));
            }
            Key::Resource => {
                if let Some((_, revision)) = policy_of(&key).and_then(|named| self.policies.get_mut(&named)) {
                    *revision = 0;
                }
            }
            Key::Node(_) | Key::Ip(..) => {}
        }
        self.entries.remove(&key);
        // Of what was never readable it is still not known what it forbids.
        if self.good.contains(&key) {
            self.problems.remove(&key);
        }
        self.former.held.insert(key);
    }

    /// The store of now is the one that is known once nothing of another is held. If it says that it goes on as the
    /// known one, what it lacks was deleted.
    pub(super) fn settle(&mut self, changes: &mut Vec<Change>) {
        let Some(Kept::Value(now)) = self.entries.get(STORE_ID) else { return };
        if self.former.id.as_ref() == Some(now) {
            for key in self.former.held.clone() {
                self.delete(&key, changes);
            }
        } else if self.former.held.is_empty() {
            self.former.id = Some(now.clone());
            self.unsaved.insert(STORE_ID.to_owned(), Some(now.clone()));
        }
    }

    /// Ends what agents wrote into the former store, and none of them into this one, after as long as their leases last:
    /// who is still at work has written it anew by then. Time in which the store does not answer (`answers`) does not
    /// count, as nobody can write; and as long as resources are missing the store may be one that nobody else writes into.
    pub fn end_records(&mut self, answers: bool, lease: Duration, now: Instant) -> Vec<Change> {
        let mut changes = Vec::new();
        let records: Vec<String> =
            self.former.held.iter().filter(|key| !matches!(parse_key(key), Key::Resource)).cloned().collect();
        if records.is_empty() || !answers || self.missing().is_some() {
            self.former.until = None;
        } else if *self.former.until.get_or_insert(now + lease) <= now {
            records.iter().for_each(|key| self.delete(key, &mut changes));
            self.settle(&mut changes);
        }
        changes
    }

    /// The resources that are held, if any.
    pub fn missing(&self) -> Option<Missing> {
        let held: Vec<&String> =
            self.former.held.iter().filter(|key| matches!(parse_key(key), Key::Resource)).collect();
        let names: Vec<String> = held.iter().take(NAMED).map(|key| object(key)).collect();
        let more = if held.len() > NAMED { ", …" } else { "" };
        let id = String::from_utf8_lossy(self.former.id.as_deref().unwrap_or_default()).into_owned();
        let objects = format!("{} of the objects in force ({}{more})", held.len(), names.join(", "));
        (!held.is_empty()).then_some(Missing { objects, id })
    }
}
