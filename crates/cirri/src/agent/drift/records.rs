//! What this node wrote in the store, as others leave it: written anew where it is gone or says something else.
//!
//! Beside its own records (`nodes`, `ips`, `enforced`, its ranges in `pools`) a node upholds the identities of its
//! workloads. Those are shared: every node that has such a workload would write the same, and nobody writes over a
//! pair of records that agree with each other, whoever made them.

use std::collections::BTreeMap;
use std::time::Instant;

use cirri_abi::Identity;
use cirri_control::identity::labels_key;
use cirri_control::labels::IdentityLabels;

use cirri_store::STORE_ID;

use super::Findings;
use crate::agent::core::Core;
use crate::agent::problems::Finding;
use crate::agent::records::{self, IdentityRecord};
use crate::agent::view::View;
use crate::api::ProblemKind;

/// A record without a lease that is to be written anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mend {
    /// Its whole key.
    pub key: String,
    /// What belongs there.
    pub value: Vec<u8>,
    /// Whether nothing is there: then nothing is written over what somebody writes meanwhile.
    pub gone: bool,
}

impl Core {
    /// Whether a key of the store is one that this node answers for.
    pub fn answers_for(&self, key: &str) -> bool {
        let shared = || {
            key.strip_prefix(cirri_store::PREFIX)
                .is_some_and(|rest| rest.starts_with("identities/") || rest.starts_with("pools/"))
        };
        self.rows.published.desired(&key.to_owned()).is_some()
            || key == STORE_ID
            || key.starts_with(&records::ip_prefix(&self.node.name))
            || shared()
    }

    /// Compares what the store holds with what this node wrote there, if there was news of that or something is held
    /// back. What differs is due to be written, or stands in [`Core::mends`].
    pub fn compare_stored(&mut self, now: Instant) {
        let look = self.drift.stored || self.drift.repairs.next_look().is_some_and(|look| look <= now);
        // What was written is not all seen yet: it is looked at again with the next news.
        if !look || !self.filled || self.view.revision < self.written || !self.mends.is_empty() {
            return;
        }
        let mut findings = Findings::new();
        // Somebody may have written over what this node writes at the moment. That is told once that is done.
        self.drift.stored = self.compare_leased(now);
        self.compare_lasting(now, &mut findings);
        self.note_drift(&[ProblemKind::Record], findings, now);
    }

    /// Records on the lease. Whether one that differs is being written.
    fn compare_leased(&mut self, now: Instant) -> bool {
        let Core { rows, view, drift, node, .. } = self;
        let (mut again, mut under_way) = (Vec::new(), false);
        for (key, wanted) in rows.published.iter() {
            let found = view.value(key);
            if found == Some(wanted) {
                continue;
            }
            if rows.published.state(key).as_deref() != Some("done") {
                under_way = true;
            } else if ask(drift, key, found, "as this node wrote it", now) {
                again.push(key.clone());
            }
        }
        again.iter().for_each(|key| rows.published.suspect(key));
        let there = view.below(&records::ip_prefix(&node.name)).map(str::to_owned);
        let strays: Vec<String> = there.filter(|key| rows.published.state(key).is_none()).collect();
        for key in strays {
            if ask(drift, &key, view.value(&key), "nothing: this node has no such address", now) {
                rows.published.adopt(key, Vec::new());
            }
        }
        under_way
    }

    /// Records without a lease.
    fn compare_lasting(&mut self, now: Instant, findings: &mut Findings) {
        let mut mends = Vec::new();
        for (key, value, others) in self.lasting() {
            let found = self.view.value(&key);
            if found == Some(value.as_slice()) {
                continue;
            }
            if let Some(other) = others {
                let finding =
                    Finding::new(format!("it is {other}'s by now"), "see who has it; restart the agent there or here");
                findings.push((ProblemKind::Record, short(&key), finding.wanted(said(Some(&value)))));
            } else if ask(&mut self.drift, &key, found, "as it was allocated", now) {
                mends.push(Mend { gone: found.is_none(), key, value });
            }
        }
        // A new one each time: with the one that is known the store would say that it goes on as that.
        if self.view.value(STORE_ID).is_none() {
            match std::fs::read_to_string("/proc/sys/kernel/random/uuid") {
                Ok(id) => mends.push(Mend { key: STORE_ID.to_owned(), value: id.trim().into(), gone: true }),
                Err(error) => tracing::warn!(%error, "the store gets no id"),
            }
        }
        self.mends = mends;
    }

    /// What this node relies on without a lease: key, value, and who has it instead by records that agree.
    fn lasting(&self) -> Vec<(String, Vec<u8>, Option<String>)> {
        let mut all = Vec::new();
        let name = &self.node.name;
        for range in self.pools.iter().map(|pool| pool.cidr()) {
            let family = if range.addr().is_ipv4() { "v4" } else { "v6" };
            let key = format!("{}{range}", records::pool_prefix(family));
            let other = self.view.value(&key).and_then(|value| std::str::from_utf8(value).ok());
            let other = other.filter(|other| *other != name && self.view.nodes.contains_key(*other)).map(str::to_owned);
            all.push((key, name.clone().into_bytes(), other));
        }
        let numbered = self.endpoints.values().filter(|endpoint| !endpoint.unnumbered);
        let identities: BTreeMap<u32, &str> =
            numbered.map(|endpoint| (endpoint.identity, endpoint.labels.as_str())).collect();
        for (id, line) in identities {
            let Ok(labels) = IdentityLabels::parse(line) else { continue };
            if id >= Identity::MIN_ALLOCATED && !line.is_empty() {
                all.extend(identity_pair(&self.view, id, &labels));
            }
        }
        all
    }
}

/// The two records of an identity.
fn identity_pair(view: &View, id: u32, labels: &IdentityLabels) -> Vec<(String, Vec<u8>, Option<String>)> {
    let line = labels.canonical();
    let by_number = records::identity_key(id);
    let by_labels = key_of(view, labels);
    let record = IdentityRecord { id, labels: line.clone() };
    // Written as another version wrote it, it is the same.
    let same = read(view, &by_labels).is_some_and(|found| found == record);
    let record = match view.value(&by_labels).filter(|_| same) {
        Some(found) => found.to_vec(),
        None => serde_json::to_vec(&record).unwrap_or_default(),
    };
    let agreed = |id: u32, labels: &IdentityLabels| {
        view.value(&records::identity_key(id)) == Some(labels.canonical().as_bytes())
            && read(view, &key_of(view, labels))
                .is_some_and(|found| found.id == id && found.labels == labels.canonical())
    };
    // The number may be other labels' by now, or the labels may have another number.
    let there = view.value(&by_number).and_then(|text| IdentityLabels::parse(std::str::from_utf8(text).ok()?).ok());
    let others = there.filter(|there| there != labels && agreed(id, there)).map(|there| there.canonical());
    let moved = read(view, &by_labels).filter(|found| found.id != id && agreed(found.id, labels));
    if let Some(found) = moved {
        // Its workloads are on their way there: the old number is not given back to the labels.
        return vec![(by_labels, record, Some(format!("identity {}", found.id)))];
    }
    vec![(by_number, line.into_bytes(), others.clone()), (by_labels, record, others)]
}

/// The key of labels: that of their hash unless other labels with the same hash have it.
fn key_of(view: &View, labels: &IdentityLabels) -> String {
    let mut attempt = 0;
    loop {
        let key = records::labels_key(&labels_key(labels, attempt));
        let other = read(view, &key).and_then(|found| IdentityLabels::parse(&found.labels).ok());
        let collides =
            |other: &IdentityLabels| other != labels && records::labels_key(&labels_key(other, attempt)) == key;
        if !other.as_ref().is_some_and(collides) {
            return key;
        }
        attempt += 1;
    }
}

fn read(view: &View, key: &str) -> Option<IdentityRecord> {
    serde_json::from_slice(view.value(key)?).ok()
}

fn ask(drift: &mut super::Drift, key: &str, found: Option<&[u8]>, wanted: &str, now: Instant) -> bool {
    // Who changes the network has nothing to do with it.
    drift.repairs.ask(ProblemKind::Record, &short(key), [&said(found), wanted], "", now)
}

fn short(key: &str) -> String {
    key.strip_prefix(cirri_store::PREFIX).unwrap_or(key).to_owned()
}

/// A value in words, as much of it as fits a line.
fn said(value: Option<&[u8]>) -> String {
    const MOST: usize = 200;
    match value {
        None => "it is gone".to_owned(),
        Some(value) => {
            let text = String::from_utf8_lossy(value);
            format!("it says `{}`", text.chars().take(MOST).flat_map(char::escape_debug).collect::<String>())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cirri_store::{Entry, Event};

    fn labels(app: &str) -> IdentityLabels {
        IdentityLabels::parse(&format!("k8s:app={app}")).unwrap()
    }

    /// The two records that labels with a number have.
    fn pair(id: u32, app: &str) -> [(String, String); 2] {
        let record = IdentityRecord { id, labels: labels(app).canonical() };
        let by_labels = records::labels_key(&labels_key(&labels(app), 0));
        let by_number = (records::identity_key(id), labels(app).canonical());
        [by_number, (by_labels, serde_json::to_string(&record).unwrap())]
    }

    fn view(records: &[(String, String)]) -> View {
        let entry = |(key, value): &(String, String)| Entry {
            key: key.clone(),
            value: value.clone().into_bytes(),
            revision: 1,
        };
        let mut view = View::default();
        view.apply(Event::Snapshot(records.iter().map(entry).collect(), 1));
        view
    }

    /// Keys that are to be written for the labels `a` with the number 300, and those that are others' by now.
    fn judged(records: &[(String, String)]) -> (Vec<String>, Vec<String>) {
        let view = view(records);
        let wrong = identity_pair(&view, 300, &labels("a"));
        let wrong = wrong.into_iter().filter(|(key, value, _)| view.value(key) != Some(value.as_slice()));
        let (others, ours): (Vec<_>, Vec<_>) = wrong.partition(|(.., other)| other.is_some());
        let keys = |all: Vec<(String, Vec<u8>, Option<String>)>| all.into_iter().map(|(key, ..)| key).collect();
        (keys(ours), keys(others))
    }

    #[test]
    fn an_identity_is_written_anew_but_not_over_a_pair_of_records_that_agree() {
        let [by_number, by_labels] = pair(300, "a");
        let nobody = Vec::<String>::new;
        assert_eq!(judged(&[by_number.clone(), by_labels.clone()]), (nobody(), nobody()));
        assert_eq!(judged(&[]), (vec![by_number.0.clone(), by_labels.0.clone()], nobody()));
        for wrong in ["", "{", "k8s:app=forged"] {
            let spoilt = [(by_number.0.clone(), wrong.to_owned()), by_labels.clone()];
            assert_eq!(judged(&spoilt), (vec![by_number.0.clone()], nobody()), "{wrong}");
            let spoilt = [by_number.clone(), (by_labels.0.clone(), wrong.to_owned())];
            assert_eq!(judged(&spoilt), (vec![by_labels.0.clone()], nobody()), "{wrong}");
        }
        // A number that nothing else confirms.
        let renumbered = by_labels.1.replace("300", "301");
        assert_eq!(
            judged(&[by_number.clone(), (by_labels.0.clone(), renumbered)]),
            (vec![by_labels.0.clone()], nobody())
        );
        // In a store that was replaced others may have been faster.
        let [their_number, their_labels] = pair(300, "b");
        let (ours, others) = judged(&[their_number, their_labels]);
        assert_eq!((ours, others), (nobody(), vec![by_number.0.clone(), by_labels.0.clone()]));
        let moved = pair(301, "a");
        let (ours, others) = judged(&moved);
        assert_eq!((ours, others), (nobody(), vec![by_labels.0]));
    }
}
