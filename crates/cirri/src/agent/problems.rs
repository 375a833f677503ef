//! What is not well on this node, and since when.
//!
//! Whoever looks after something says with [`Problems::put`] or [`Problems::replace`]
//! what he finds; `cirri status` shows all of it. What can be told from the state
//! of the core is derived in [`Core::note_problems`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use cirri_control::cut::cut;
use cirri_control::policy::PolicyId;
use cirri_store::{STORE_ID, folder};

use super::core::Core;
use super::mirror;
use super::narrowed::NO_ROOM;
use super::policies::refused;
use super::rulesets::{Flaw, without_slot};
use super::view::Missing;
use crate::api::{Problem, ProblemKind, StoreStatus};
use crate::config::StoreKind;

/// Every problem that is known now.
#[derive(Debug, Default)]
pub struct Problems {
    known: BTreeMap<(ProblemKind, String), Known>,
}

/// What was found, what was wanted, and what to do about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Finding {
    /// What is there.
    pub found: String,
    /// What should be there; may be empty.
    pub wanted: String,
    /// What to do; empty if the agent does it by itself.
    pub remedy: String,
}

#[derive(Debug)]
struct Known {
    since: String,
    finding: Finding,
}

impl Problems {
    /// There is this problem. One that is known already keeps its age.
    pub fn put(&mut self, what: ProblemKind, object: impl Into<String>, finding: Finding) {
        let known = self
            .known
            .entry((what, object.into()))
            .or_insert_with(|| Known { since: now(), finding: Finding::default() });
        known.finding = finding;
    }

    /// Of this kind there are exactly these, by object.
    pub fn replace(&mut self, what: ProblemKind, findings: impl IntoIterator<Item = (String, Finding)>) {
        let findings: BTreeMap<String, Finding> = findings.into_iter().collect();
        self.known.retain(|(kind, object), _| *kind != what || findings.contains_key(object));
        for (object, finding) in findings {
            self.put(what, object, finding);
        }
    }

    /// All of them, by kind and object.
    pub fn list(&self) -> Vec<Problem> {
        let one = |((what, object), known): (&(ProblemKind, String), &Known)| Problem {
            what: *what,
            object: object.clone(),
            since: known.since.clone(),
            found: known.finding.found.clone(),
            wanted: known.finding.wanted.clone(),
            remedy: known.finding.remedy.clone(),
        };
        self.known.iter().map(one).collect()
    }
}

impl Finding {
    /// That was found, and this is to be done about it.
    pub fn new(found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { found: found.into(), wanted: String::new(), remedy: remedy.into() }
    }

    /// Adds what was wanted.
    pub fn wanted(mut self, wanted: impl Into<String>) -> Finding {
        self.wanted = wanted.into();
        self
    }
}

impl Core {
    /// Brings [`Core::problems`] up to date with all that the core knows.
    pub fn note_problems(&mut self, store: &StoreStatus) {
        let mut found: Vec<(ProblemKind, String, Finding)> = Vec::new();
        let mut note = |what, object: &str, finding| found.push((what, object.to_owned(), finding));
        if !store.healthy {
            let finding = Finding::new(store.error.clone(), "bring the store back; the last good state is in force");
            note(ProblemKind::Store, &store.kind, finding.wanted("an answer"));
        } else if !self.view.synced {
            let finding = Finding::new("not seen whole yet", "wait; what was pinned is in force");
            note(ProblemKind::Store, &store.kind, finding);
        }
        for error in &self.folder_errors {
            let (object, _) = error.split_once(": ").unwrap_or((error, ""));
            note(ProblemKind::Manifest, object, Finding::new(error, "correct the manifest"));
        }
        if let Some(why) = &self.uncopied {
            let finding = Finding::new(why.clone(), "it is tried again; what was in force stays");
            note(ProblemKind::Store, "changes of the folder", finding.wanted("in force"));
        }
        for (object, found) in self.view.problems() {
            note(ProblemKind::StoredObject, &object, Finding::new(found, "write it anew or delete it"));
        }
        for (path, found) in &self.spoilt_files {
            let finding = Finding::new(found.clone(), "find out what spoilt it; this goes with the next start");
            note(ProblemKind::StoredObject, path, finding);
        }
        if let Some(Missing { objects, id }) = self.view.missing() {
            let confirm = match self.config.store.kind {
                StoreKind::Etcd => format!("`etcdctl put {STORE_ID} {}`", cut(&id)),
                StoreKind::Folder => "stop the agent, remove seen.redb in its stateDir, and start it".to_owned(),
            };
            let found = format!("it is another one than before, and lacks {objects}; what was enforced stays enforced");
            let remedy =
                format!("bring the former one back, or write them into this one; if they are to go: {confirm}");
            note(ProblemKind::Store, "another store", Finding::new(found, remedy).wanted("what was in force"));
        }
        if let Some(why) = &self.unsaved {
            let finding = Finding::new(why.clone(), "it is tried again; until then a restart may not know the newest");
            note(ProblemKind::Store, "last good content", finding.wanted("saved"));
        }
        if self.is_behind {
            let finding = Finding::new("it holds more than was seen so far", "wait");
            note(ProblemKind::Pending, &store.kind, finding);
        }
        for (id, refusal) in self.cluster.refused() {
            let object = format!("{}/{}", id.namespace, id.name);
            let file = self.file_of(id).map(|file| format!(" in {}", file.display())).unwrap_or_default();
            let remedy = format!("correct the policy{file}");
            note(ProblemKind::Policy, &object, Finding::new(refused(&refusal), remedy));
        }
        for (slot, flaws) in &self.flawed {
            let Some(whose) = self.endpoints.values().find(|endpoint| endpoint.ruleset == *slot) else { continue };
            let object = match whose.unnumbered {
                true => format!("of {}/{}", whose.namespace, whose.pod),
                false => format!("of identity {}", whose.identity),
            };
            let of_policies = flaws.iter().any(|flaw| matches!(flaw, Flaw::TooLarge { .. } | Flaw::Hole { .. }));
            let remedy = if of_policies { "correct its policies" } else { "wait; the store is asked for a number" };
            let found: Vec<String> = flaws.iter().map(ToString::to_string).collect();
            note(ProblemKind::RuleSet, &object, Finding::new(found.join("; "), remedy));
        }
        for slot in self.narrowed.rules.keys() {
            let Some(whose) = self.endpoints.values().find(|endpoint| endpoint.ruleset == *slot) else { continue };
            let finding = Finding::new(NO_ROOM, "raise bpf.maps.ipcache and restart the agent");
            note(ProblemKind::RuleSet, &format!("of {}/{}", whose.namespace, whose.pod), finding);
        }
        if self.filled {
            for (object, finding) in without_slot(&self.endpoints) {
                note(ProblemKind::RuleSet, &object, finding);
            }
        }
        for labels in &self.unnumbered {
            let finding = Finding::new("no identity yet", "it is asked of the store until there is one");
            note(ProblemKind::Identity, &labels.to_string(), finding);
        }
        let services = self.services_status();
        for problem in &services.problems {
            let (object, text) = problem.split_once(": ").unwrap_or((problem, problem));
            note(ProblemKind::Service, object, Finding::new(text, "correct the resource"));
        }
        for check in services.health_checks.iter().filter(|check| !check.error.is_empty()) {
            let object = format!("port {} for {}", check.port, check.service);
            note(ProblemKind::HealthCheck, &object, Finding::new(&check.error, "free the port"));
        }
        if !services.socket.error.is_empty() {
            let finding = Finding::new(&services.socket.error, "see services.socket in the configuration");
            note(ProblemKind::Sockets, &services.socket.cgroup, finding.wanted("translated in the system call"));
        }
        for table in self.rows.status().into_iter().chain([self.serving.status()]) {
            if table.pending > 0 {
                let finding = Finding::new(format!("{} rows are not done yet", table.pending), "wait");
                note(ProblemKind::Pending, &table.name, finding);
            }
            for row in &table.errors {
                let found = format!("{} (tried {} times)", row.error, row.attempts);
                let finding = Finding::new(found, "it is tried again; see the log");
                note(ProblemKind::Row, &format!("{} {}", table.name, row.key), finding);
            }
        }
        for what in DERIVED {
            let of = found.iter().filter(|(kind, ..)| kind == what);
            self.problems.replace(*what, of.map(|(_, object, finding)| (object.clone(), finding.clone())));
        }
    }

    /// The file of the folder that a policy stands in, if there is one.
    fn file_of(&self, id: &PolicyId) -> Option<PathBuf> {
        let key = format!("resources/NetworkPolicy/{}/{}", id.namespace, id.name);
        let prefix = mirror::files_prefix();
        let defines = |file: &&str| {
            let text = self.view.value(file).and_then(|text| std::str::from_utf8(text).ok());
            text.is_some_and(|text| folder::defines(text, &key))
        };
        Some(folder::path_of(&self.config.store.folder, &self.view.below(&prefix).find(defines)?[prefix.len()..]))
    }
}

/// The kinds that [`Core::note_problems`] finds; all others are said by those who look after them.
const DERIVED: &[ProblemKind] = &[
    ProblemKind::Store,
    ProblemKind::Manifest,
    ProblemKind::StoredObject,
    ProblemKind::Policy,
    ProblemKind::RuleSet,
    ProblemKind::Identity,
    ProblemKind::Service,
    ProblemKind::HealthCheck,
    ProblemKind::Sockets,
    ProblemKind::Pending,
    ProblemKind::Row,
];

fn now() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    cirri_flow::rfc3339(now.as_nanos().try_into().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_keeps_its_age_until_it_is_cleared_and_others_of_its_kind_come_and_go() {
        let mut problems = Problems::default();
        problems.put(ProblemKind::Device, "eth0", Finding::new("down", ""));
        problems.known.get_mut(&(ProblemKind::Device, "eth0".to_owned())).unwrap().since = "then".to_owned();
        let both = ["eth0", "eth1"].map(|name| (name.to_owned(), Finding::new("gone", "bring it back")));
        problems.replace(ProblemKind::Device, both);
        problems.put(ProblemKind::Setting, "ip_forward", Finding::new("0", "").wanted("1"));
        let list = problems.list();
        assert_eq!(list.len(), 3);
        assert_eq!((list[0].object.as_str(), list[0].since.as_str(), list[0].found.as_str()), ("eth0", "then", "gone"));
        problems.replace(ProblemKind::Device, []);
        problems.replace(ProblemKind::Setting, []);
        assert!(problems.list().is_empty());
    }
}
