//! What one file says, and what it said when it could last be read.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher as _};
use std::sync::Arc;

use cirri_control::resource::{MAX_ERRORS, Position, Resource, read_documents};

/// A file, or what a file held that is not there any more.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct File {
    /// What it says of each object that it speaks of, or may speak of.
    pub holds: BTreeMap<String, Hold>,
    /// A document of it does not say which object it is, or it cannot be read at all.
    pub opaque: bool,
    /// A digest of what it is, if not all of it can be read.
    pub broken: Option<u64>,
    /// The step at which it was not there any more. It may be back in a moment.
    pub left: Option<u64>,
    /// It is no file: one of these may be what it was.
    pub among: BTreeSet<String>,
    pub errors: Errors,
}

/// What a file says of one object. What cannot be read any more is kept as it was.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Hold {
    /// The definition, or what stands in for it; `None`: nothing but its name is known.
    pub version: Option<Arc<Resource>>,
    /// The version was read, and is no stand-in.
    pub read: bool,
    /// The step at which the file began to say this.
    pub since: u64,
    /// The step since which it cannot be read.
    pub broke: Option<u64>,
    /// As many documents of the file were the object.
    pub times: usize,
    /// What a document of the file says that can be read and does not count: one that cannot comes first, or may.
    pub second: Option<Arc<Resource>>,
    /// Nothing says for sure that the document which cannot be read is this object.
    pub vague: bool,
    /// Where it stands; 0 if nobody knows.
    pub line: u64,
}

/// What is wrong with a file. As many are told apart as with its documents.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Errors {
    pub shown: Vec<String>,
    pub more: usize,
}

impl Errors {
    pub fn of(message: String) -> Errors {
        Errors { shown: vec![message], more: 0 }
    }

    /// The message is made only if it is shown.
    pub fn push(&mut self, message: impl FnOnce() -> String) {
        match self.shown.len() < MAX_ERRORS {
            true => self.shown.push(message()),
            false => self.more += 1,
        }
    }
}

/// Where and when a file is read.
pub(super) struct Reading<'a> {
    /// Its path, for messages.
    pub path: &'a str,
    /// The number of the step.
    pub step: u64,
    /// Whether what it says of an object is in force.
    pub owns: &'a dyn Fn(&str) -> bool,
}

/// What the readable documents of a file say of an object: the first of them, and how many there are.
struct Found {
    resource: Arc<Resource>,
    place: Position,
    times: usize,
}

impl File {
    /// Nothing of it can be read now; what it said holds.
    pub fn unreadable(self, content: &[u8], errors: Errors, step: u64) -> File {
        let mut file = File { opaque: true, broken: Some(digest(content)), left: None, errors, ..self };
        file.holds.values_mut().for_each(|hold| hold.break_at(step));
        file
    }

    /// What it says now. Takes out of `before` what it still holds of what it held: the rest is lost.
    pub fn read(reading: &Reading<'_>, bytes: &[u8], before: &mut BTreeMap<String, Hold>) -> File {
        let documents = read_documents(reading.path, bytes);
        let mut errors = Errors { shown: Vec::new(), more: documents.more_errors };
        documents.errors.iter().for_each(|error| errors.push(|| error.to_string()));
        let mut found: BTreeMap<String, Found> = BTreeMap::new();
        for (resource, place) in documents.resources.into_iter().zip(documents.places) {
            let key = resource.store_key();
            match found.get_mut(&key) {
                None => drop(found.insert(key, Found { resource: Arc::new(resource), place, times: 1 })),
                Some(first) => {
                    first.times += 1;
                    errors.push(|| {
                        let line = first.place.line;
                        let why = format!("it is already defined earlier in this file, in line {line}");
                        not_used(reading.path, place.line, &resource, &why)
                    });
                }
            }
        }
        let mut stand_ins: BTreeMap<String, Arc<Resource>> = BTreeMap::new();
        for resource in documents.stand_ins {
            stand_ins.entry(resource.store_key()).or_insert_with(|| Arc::new(resource));
        }
        let mut holds = BTreeMap::new();
        for key in &documents.unreadable {
            let old = before.remove(key);
            let broken = Broken {
                stand_in: stand_ins.remove(key),
                named: documents.named.get(key),
                step: reading.step,
                line: documents.named.get(key).map_or(0, |place| place.line),
            };
            let hold = match found.remove(key) {
                Some(found) => beside(reading, key, found, old, Some(&broken), &mut errors),
                None => broken.hold(old, 0),
            };
            holds.insert(key.clone(), hold);
        }
        let nobody = Broken { stand_in: None, named: None, step: reading.step, line: 0 };
        let doubt = documents.opaque.then_some(&nobody);
        for (key, found) in found {
            let hold = beside(reading, &key, found, before.remove(&key), doubt, &mut errors);
            holds.insert(key, hold);
        }
        if documents.opaque {
            for (key, mut hold) in std::mem::take(before) {
                hold.break_at(reading.step);
                holds.entry(key).or_insert(hold);
            }
        }
        let file = File { holds, opaque: documents.opaque, errors, ..File::default() };
        File { broken: (!file.is_whole()).then(|| digest(bytes)), ..file }
    }

    /// What was lost is found again with an object of this file that cannot be read.
    pub fn find(&mut self, key: &str, lost: &Hold) {
        let Some(hold) = self.holds.get_mut(key) else { return };
        hold.version.clone_from(&lost.version);
        hold.read = lost.read;
        if hold.second.is_some() && hold.second == hold.version {
            // The file says it in so many words: as if it had been known when the file was read.
            (hold.second, hold.broke) = (None, None);
        }
        if self.is_whole() {
            self.broken = None;
        }
    }

    /// Whether all that it says of objects can be read.
    fn is_whole(&self) -> bool {
        !self.opaque && self.holds.values().all(|hold| hold.broke.is_none())
    }
}

impl Hold {
    pub fn break_at(&mut self, step: u64) {
        self.broke.get_or_insert(step);
    }

    /// Whether it is certain that this lets nothing pass which the other forbids, and it is another.
    pub fn lets_less_pass(&self, other: &Hold) -> bool {
        let (Some(one), Some(other)) = (&self.version, &other.version) else { return false };
        let (Resource::NetworkPolicy(one), Resource::NetworkPolicy(other)) = (&**one, &**other) else { return false };
        let (one, other) = (&one.spec, &other.spec);
        one != other
            && one.pod_selector == other.pod_selector
            && other.policy_types.iter().all(|it| one.policy_types.contains(it))
            && one.ingress.iter().all(|it| other.ingress.contains(it))
            && one.egress.iter().all(|it| other.egress.contains(it))
    }
}

/// A document that cannot be read, and is an object or may be.
struct Broken<'a> {
    stand_in: Option<Arc<Resource>>,
    /// Where the first document begins that is the object without doubt.
    named: Option<&'a Position>,
    step: u64,
    line: u64,
}

impl Broken<'_> {
    fn hold(&self, old: Option<Hold>, readable: usize) -> Hold {
        let old = old.map(|old| Hold { second: None, ..old });
        let mut hold = old.unwrap_or(Hold {
            version: None,
            read: false,
            since: self.step,
            broke: None,
            times: 1,
            second: None,
            vague: self.named.is_none(),
            line: self.line,
        });
        if !hold.read && self.stand_in.is_some() {
            hold.version.clone_from(&self.stand_in);
        }
        hold.times = hold.times.max(readable + 1);
        hold.break_at(self.step);
        hold
    }
}

/// A definition that can be read. It counts, unless a document of the same file that cannot be read (`doubt`) comes
/// first, or may come first: one that was not used does not take over because of a typing error in the other.
fn beside(
    reading: &Reading<'_>,
    key: &str,
    found: Found,
    old: Option<Hold>,
    doubt: Option<&Broken<'_>>,
    errors: &mut Errors,
) -> Hold {
    let Found { resource, place, times } = found;
    if let Some(doubt) = doubt {
        let comes_first = doubt.named.is_some_and(|named| (named.line, named.column) < (place.line, place.column));
        // One of those that were there is not there any more, and nobody knows which.
        let fewer = old.as_ref().is_some_and(|old| old.times > times);
        if comes_first || fewer {
            let kept = doubt.hold(old.clone(), times);
            if kept.version.as_ref().is_some_and(|version| *version != resource) {
                errors.push(|| {
                    let why = "a document of this file that cannot be read comes first, or may, and what is known of \
                               it stays in force";
                    not_used(reading.path, place.line, &resource, why)
                });
                return Hold { second: Some(Arc::clone(&resource)), ..kept };
            }
        }
    }
    let stays = |old: &Hold| (reading.owns)(key) || old.version.as_ref() == Some(&resource);
    let since = old.filter(stays).map_or(reading.step, |old| old.since);
    Hold {
        version: Some(resource),
        read: true,
        since,
        broke: None,
        times,
        second: None,
        vague: false,
        line: place.line,
    }
}

/// What is said of a definition that does not count.
pub(super) fn not_used(path: &str, line: u64, resource: &Resource, why: &str) -> String {
    let namespace = resource.namespace().map(|it| format!("{it}/"));
    let object = format!("{} {}{}", resource.kind(), namespace.unwrap_or_default(), resource.name());
    format!("{}: {object} is not used: {why}. Remove one of the two", at(path, line))
}

/// A line of a file, as errors name it.
pub(super) fn at(path: &str, line: u64) -> String {
    match line {
        0 => path.to_owned(),
        line => format!("{path}:{line}"),
    }
}

/// Knows the same content again.
pub(super) fn digest(content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(content);
    hasher.finish()
}

/// Whether a file holds not even a comment, from which one could tell that this is meant.
pub(super) fn says_nothing(bytes: &[u8]) -> bool {
    const NOTHING: [&str; 4] = ["---", "...", "null", "~"];
    let text = String::from_utf8_lossy(bytes).replace('\u{feff}', " ");
    text.split_whitespace().all(|word| NOTHING.contains(&word))
}
