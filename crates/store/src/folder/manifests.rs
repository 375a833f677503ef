//! What the files of a folder say together. No input or output here.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use cirri_control::resource::{Resource, read_documents};

use super::{Change, FileError};

/// The content of all files: of each document the last that could be understood.
#[derive(Default)]
pub(super) struct Manifests {
    files: BTreeMap<String, File>,
    /// Object → the file that defines it. The first one keeps it for as long as it does.
    owners: BTreeMap<String, String>,
    /// As last handed out.
    published: Whole,
    errors: Vec<FileError>,
    /// What is wrong with the folder itself.
    folder_error: Option<FileError>,
}

#[derive(Default)]
struct File {
    /// What its documents say, or said when they could last be understood.
    resources: BTreeMap<String, Resource>,
    /// Objects of which nothing could be understood yet, and what is sure about them.
    unreadable: BTreeMap<String, Option<Resource>>,
    /// A document of it does not say which object it is.
    opaque: bool,
    /// It was not so when the last change was handed out.
    newly_opaque: bool,
    /// It is not there, but may be back in a moment.
    leaving: bool,
    errors: Vec<String>,
}

/// What all files come to: one definition for each object.
#[derive(Default)]
struct Whole {
    resources: BTreeMap<String, Resource>,
    /// Objects of which nothing could be understood yet.
    unreadable: BTreeMap<String, Option<Resource>>,
}

impl Whole {
    fn names(&self, key: &str) -> bool {
        self.resources.contains_key(key) || self.unreadable.contains_key(key)
    }

    fn keys(&self) -> impl Iterator<Item = &String> {
        self.resources.keys().chain(self.unreadable.keys())
    }
}

impl Manifests {
    pub(super) fn files(&self) -> BTreeSet<String> {
        self.files.keys().cloned().collect()
    }

    pub(super) fn is_broken(&self, file: &str) -> bool {
        self.files.get(file).is_some_and(|file| !file.errors.is_empty())
    }

    /// The file was read, or could not be. What is understood of it counts at once. A document that is not keeps its
    /// last good version; one that does not say which object it is keeps all that the file held and does not name.
    pub(super) fn set(&mut self, name: &str, content: Result<&[u8], String>) {
        let before = self.files.remove(name).unwrap_or_default();
        let was_opaque = before.opaque && !before.newly_opaque;
        let mut file = match content {
            Ok(bytes) => File::read(name, bytes, before),
            Err(message) => File { opaque: true, leaving: false, errors: vec![message], ..before },
        };
        file.newly_opaque = file.opaque && !was_opaque;
        self.files.insert(name.to_owned(), file);
    }

    /// The file is not there. What it says counts until it is removed, unless another file says it. `false`: nothing
    /// is known of it.
    pub(super) fn leave(&mut self, name: &str) -> bool {
        let Some(file) = self.files.get_mut(name) else { return false };
        file.leaving = true;
        file.errors.clear();
        true
    }

    /// The file is there, and its content is as it was. `false`: nothing is known of it.
    pub(super) fn stay(&mut self, name: &str) -> bool {
        let Some(file) = self.files.get_mut(name) else { return false };
        file.leaving = false;
        true
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.files.remove(name);
    }

    pub(super) fn set_folder_error(&mut self, error: Option<FileError>) {
        self.folder_error = error;
    }

    /// That nothing is different from what was last handed out.
    pub(super) fn nothing_new(&self) -> Change {
        Change {
            unreadable: self.published.unreadable.keys().cloned().collect(),
            opaque: self.files.values().any(|file| file.opaque),
            errors: self.errors.clone(),
            ..Change::default()
        }
    }

    /// What is different from what was last handed out; nothing if nothing is.
    pub(super) fn settle(&mut self) -> Option<Change> {
        self.adopt();
        let (whole, owners, errors) = self.agree();
        let upserted = different(&self.published.resources, &whole.resources);
        let stand_ins = different(&self.published.unreadable, &whole.unreadable).into_iter().flatten();
        let change = Change {
            upserted,
            stand_ins: stand_ins.collect(),
            removed: self.published.keys().filter(|key| !whole.names(key)).cloned().collect(),
            unreadable: whole.unreadable.keys().cloned().collect(),
            opaque: self.files.values().any(|file| file.opaque),
            errors: errors.clone(),
            caught_up: 0,
        };
        let news = !change.upserted.is_empty() || !change.removed.is_empty();
        let same = !news && whole.unreadable == self.published.unreadable && errors == self.errors;
        self.published = whole;
        self.owners = owners;
        self.errors = errors;
        (!same).then_some(change)
    }

    /// A document that broke while it moved to another file, or while its file was renamed, keeps its last good
    /// version as well. What no file says any more goes with the document that is it, or that may be.
    fn adopt(&mut self) {
        let said: BTreeSet<&String> = self.files.values().flat_map(|file| file.resources.keys()).collect();
        let lost = self.published.resources.iter().filter(|(key, _)| !said.contains(key));
        let lost: Vec<(String, Resource)> = lost.map(|(key, it)| (key.clone(), it.clone())).collect();
        for (key, resource) in lost {
            let known = self.files.values_mut().find(|file| file.unreadable.contains_key(&key));
            let file = match known {
                Some(file) => Some(file),
                None => self.files.values_mut().find(|file| file.newly_opaque),
            };
            if let Some(file) = file {
                file.unreadable.remove(&key);
                file.resources.insert(key, resource);
            }
        }
        // What leaves now may be what it is.
        if !self.files.values().any(|file| file.leaving) {
            self.files.values_mut().for_each(|file| file.newly_opaque = false);
        }
    }

    /// One definition for each object, who gave it, and all that is wrong.
    fn agree(&self) -> (Whole, BTreeMap<String, String>, Vec<FileError>) {
        let mut owners: BTreeMap<String, String> = BTreeMap::new();
        let (leaving, staying): (Vec<_>, Vec<_>) = self.files.iter().partition(|(_, file)| file.leaving);
        for (name, file) in staying.into_iter().chain(leaving) {
            for key in file.resources.keys() {
                let had_it = !file.leaving && self.owners.get(key) == Some(name);
                if had_it || !owners.contains_key(key) {
                    owners.insert(key.clone(), name.clone());
                }
            }
        }
        let mut whole = Whole::default();
        let mut errors: Vec<FileError> = self.folder_error.iter().cloned().collect();
        for (name, file) in &self.files {
            let error = |message: String| FileError { file: name.clone(), message };
            errors.extend(file.errors.iter().cloned().map(error));
            for (key, resource) in &file.resources {
                let owner = &owners[key];
                if owner == name {
                    whole.resources.insert(key.clone(), resource.clone());
                } else if !file.leaving {
                    errors.push(error(twice(name, owner, resource)));
                }
            }
        }
        for (key, stand_in) in self.files.values().flat_map(|file| &file.unreadable) {
            if !whole.resources.contains_key(key) {
                let sure = whole.unreadable.entry(key.clone()).or_default();
                if sure.is_none() {
                    sure.clone_from(stand_in);
                }
            }
        }
        (whole, owners, errors)
    }
}

impl File {
    fn read(name: &str, bytes: &[u8], mut before: File) -> File {
        let documents = read_documents(name, bytes);
        let mut file = File { opaque: documents.opaque, ..File::default() };
        file.errors.extend(documents.errors.iter().map(ToString::to_string));
        if documents.more_errors > 0 {
            file.errors.push(format!("{name}: {} more errors are not shown", documents.more_errors));
        }
        for resource in documents.resources {
            match file.resources.entry(resource.store_key()) {
                Entry::Vacant(place) => {
                    place.insert(resource);
                }
                Entry::Occupied(_) => file.errors.push(twice(name, name, &resource)),
            }
        }
        let mut stand_ins: BTreeMap<String, Resource> =
            documents.stand_ins.into_iter().map(|resource| (resource.store_key(), resource)).collect();
        for key in documents.unreadable {
            if file.resources.contains_key(&key) {
                continue;
            }
            match before.resources.remove(&key) {
                Some(last_good) => drop(file.resources.insert(key, last_good)),
                None => {
                    let stand_in = stand_ins.remove(&key);
                    file.unreadable.insert(key, stand_in);
                }
            }
        }
        if file.opaque {
            for (key, last_good) in before.resources {
                file.unreadable.remove(&key);
                file.resources.entry(key).or_insert(last_good);
            }
            for (key, stand_in) in before.unreadable {
                if !file.resources.contains_key(&key) {
                    file.unreadable.entry(key).or_insert(stand_in);
                }
            }
        }
        file
    }
}

/// What is new in `now`, or not as it was.
fn different<T: Clone + PartialEq>(before: &BTreeMap<String, T>, now: &BTreeMap<String, T>) -> Vec<T> {
    now.iter().filter(|(key, value)| before.get(*key) != Some(value)).map(|(_, value)| value.clone()).collect()
}

fn twice(file: &str, owner: &str, resource: &Resource) -> String {
    let namespace = resource.namespace().map(|it| format!("{it}/"));
    let object = format!("{} {}{}", resource.kind(), namespace.unwrap_or_default(), resource.name());
    let place = if owner == file { "earlier in this file".to_owned() } else { format!("in {owner}") };
    format!("{object} in {file} is not used: it is already defined {place}. Remove one of the two")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(name: &str, label: &str) -> String {
        format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels: {{is: {label}}}\n")
    }

    fn names(change: &Change) -> Vec<&str> {
        change.upserted.iter().map(Resource::name).collect()
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_content_and_says_why() {
        let mut manifests = Manifests::default();
        manifests.set("a.yaml", Ok(namespace("one", "x").as_bytes()));
        assert_eq!(names(&manifests.settle().expect("new")), ["one"]);

        manifests.set("a.yaml", Ok(b"kind: [half"));
        let change = manifests.settle().expect("an error");
        assert!(change.upserted.is_empty() && change.removed.is_empty());
        assert_eq!(change.errors.len(), 1);
        assert_eq!(change.errors[0].file, "a.yaml");
        assert!(manifests.is_broken("a.yaml"));

        manifests.set("a.yaml", Ok(namespace("two", "x").as_bytes()));
        let change = manifests.settle().expect("mended");
        assert_eq!(names(&change), ["two"]);
        assert_eq!(change.removed, ["resources/Namespace/_/one"]);
        assert!(change.errors.is_empty());
    }

    #[test]
    fn of_two_files_that_define_one_object_the_later_is_refused_and_both_are_named() {
        let mut manifests = Manifests::default();
        manifests.set("b.yaml", Ok(namespace("one", "b").as_bytes()));
        manifests.settle();
        // Sorts first, but came second.
        manifests.set("a.yaml", Ok(namespace("one", "a").as_bytes()));
        let change = manifests.settle().expect("an error");
        assert!(change.upserted.is_empty());
        let error = &change.errors[0];
        assert_eq!(error.file, "a.yaml");
        assert!(error.message.contains("a.yaml") && error.message.contains("b.yaml"));

        manifests.remove("b.yaml");
        let change = manifests.settle().expect("the other takes over");
        assert_eq!(names(&change), ["one"]);
        assert!(change.removed.is_empty() && change.errors.is_empty());
    }

    #[test]
    fn of_two_definitions_in_one_file_the_first_is_used() {
        let mut manifests = Manifests::default();
        let both = format!("{}---\n{}", namespace("one", "first"), namespace("one", "second"));
        manifests.set("a.yaml", Ok(both.as_bytes()));
        let change = manifests.settle().expect("new");
        assert_eq!(names(&change), ["one"]);
        assert!(change.upserted[0].to_json().contains("first"));
        assert!(change.errors[0].message.contains("earlier in this file"));
    }

    #[test]
    fn what_says_the_same_in_other_words_is_no_change() {
        let mut manifests = Manifests::default();
        manifests.set("a.yaml", Ok(namespace("one", "x").as_bytes()));
        manifests.settle();
        let commented = format!("# hello\n{}", namespace("one", "x"));
        manifests.set("a.yaml", Ok(commented.as_bytes()));
        assert!(manifests.settle().is_none());
    }

    fn policy(name: &str, label: &str, port: &str) -> String {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}}}\n\
             spec: {{podSelector: {{matchLabels: {{app: {label}}}}}, ingress: [{{ports: [{{port: {port}}}]}}]}}\n"
        )
    }

    fn many(documents: &[String]) -> Vec<u8> {
        documents.join("\n---\n").into_bytes()
    }

    const KEY: &str = "resources/NetworkPolicy/default/";

    #[test]
    fn one_document_that_cannot_be_used_takes_no_other_with_it_and_keeps_its_last_good_version() {
        let mut manifests = Manifests::default();
        let good: Vec<String> = (0..10).map(|i| policy(&format!("p{i}"), "a", "80")).collect();
        manifests.set("a.yaml", Ok(&many(&good)));
        assert_eq!(manifests.settle().expect("new").upserted.len(), 10);

        for broken in [policy("p4", "b", "0"), "kind: [".to_owned(), "kind: \"half".to_owned(), "words".to_owned()] {
            let label = format!("b{}", broken.len());
            let mut all: Vec<String> = (0..10).map(|i| policy(&format!("p{i}"), &label, "80")).collect();
            all[4].clone_from(&broken);
            manifests.set("a.yaml", Ok(&many(&all)));
            let change = manifests.settle().expect("new");
            assert_eq!(change.upserted.len(), 9, "{broken}");
            assert!(change.removed.is_empty() && change.unreadable.is_empty(), "{broken}: {change:?}");
            assert_eq!(change.errors.len(), 1, "{broken}");
        }
        // Mended without one that is gone meanwhile: only now is it known to be gone.
        manifests.set("a.yaml", Ok(&many(&good[..4])));
        assert_eq!(manifests.settle().expect("gone").removed.len(), 6);
    }

    #[test]
    fn what_is_gone_beside_a_document_that_names_itself_is_gone() {
        let mut manifests = Manifests::default();
        manifests.set("a.yaml", Ok(&many(&[policy("p1", "a", "80"), policy("p2", "a", "80")])));
        manifests.settle();
        manifests.set("a.yaml", Ok(policy("p1", "a", "0").as_bytes()));
        assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p2")]);
        manifests.set("a.yaml", Ok(b""));
        assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p1")]);
    }

    #[test]
    fn a_document_that_breaks_while_it_moves_keeps_its_last_good_version() {
        for broken in [policy("p", "a", "0"), "kind: [".to_owned()] {
            let mut manifests = Manifests::default();
            manifests.set("a.yaml", Ok(policy("p", "a", "80").as_bytes()));
            manifests.settle();
            manifests.remove("a.yaml");
            manifests.set("b.yaml", Ok(broken.as_bytes()));
            let change = manifests.settle().expect("an error");
            assert!(change.removed.is_empty() && change.upserted.is_empty(), "{broken}: {change:?}");
            // It is renamed again.
            manifests.remove("b.yaml");
            manifests.set("c.yaml", Ok(broken.as_bytes()));
            assert!(manifests.settle().expect("an error").removed.is_empty(), "{broken}");
            manifests.remove("c.yaml");
            assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p")], "{broken}");
        }
    }

    #[test]
    fn what_leaves_stays_until_it_is_removed_and_another_may_take_over() {
        let mut manifests = Manifests::default();
        manifests.set("a.yaml", Ok(&many(&[policy("p1", "a", "80"), policy("p2", "a", "80")])));
        manifests.settle();
        assert!(manifests.leave("a.yaml") && !manifests.leave("b.yaml"));
        assert!(manifests.settle().is_none());
        manifests.set("b.yaml", Ok(policy("p1", "b", "80").as_bytes()));
        let change = manifests.settle().expect("new");
        assert_eq!((change.upserted.len(), change.errors.len()), (1, 0), "{change:?}");
        manifests.set("c.yaml", Ok(b"kind: ["));
        manifests.settle();
        manifests.remove("a.yaml");
        assert!(manifests.settle().is_none(), "the broken one may be the other");
        manifests.remove("c.yaml");
        assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p2")]);
    }

    #[test]
    fn what_was_broken_for_long_does_not_keep_what_is_removed_elsewhere() {
        let mut manifests = Manifests::default();
        manifests.set("a.yaml", Ok(policy("p", "a", "80").as_bytes()));
        manifests.set("b.yaml", Ok(b"kind: ["));
        manifests.settle();
        manifests.remove("a.yaml");
        assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p")]);
    }

    #[test]
    fn without_a_good_version_what_is_sure_stands_in_until_there_is_one() {
        let mut manifests = Manifests::default();
        manifests.set("a.yaml", Ok(policy("p", "a", "0").as_bytes()));
        let change = manifests.settle().expect("new");
        assert!(change.upserted.is_empty());
        assert_eq!(change.unreadable, BTreeSet::from([format!("{KEY}p")]));
        let [Resource::NetworkPolicy(stand_in)] = &change.stand_ins[..] else { panic!("{change:?}") };
        assert!(stand_in.spec.ingress.is_empty());
        // Another file has a good one.
        manifests.set("b.yaml", Ok(policy("p", "a", "80").as_bytes()));
        let change = manifests.settle().expect("good");
        assert_eq!((change.upserted.len(), change.unreadable.len()), (1, 0));
        // It goes, and what is left says no more than before: the good one stays with it.
        manifests.remove("b.yaml");
        assert!(manifests.settle().is_none());
        manifests.remove("a.yaml");
        assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p")]);
    }

    #[test]
    fn an_object_that_was_never_understood_is_gone_when_its_document_is() {
        let mut manifests = Manifests::default();
        manifests.set("a.yaml", Ok(policy("p", "5", "80").as_bytes()));
        let change = manifests.settle().expect("new");
        assert!(change.stand_ins.is_empty() && change.unreadable.len() == 1, "{change:?}");
        manifests.remove("a.yaml");
        assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p")]);
    }

    #[test]
    fn a_file_that_cannot_be_read_keeps_all_that_it_held() {
        let mut manifests = Manifests::default();
        manifests.set("a.yaml", Ok(&many(&[policy("p1", "a", "80"), policy("p2", "a", "80")])));
        manifests.settle();
        manifests.set("a.yaml", Err("a.yaml: cannot be read".to_owned()));
        let change = manifests.settle().expect("an error");
        assert!(change.removed.is_empty() && change.opaque, "{change:?}");
    }

    proptest::proptest! {
        /// An object is removed only when no document can be it any more.
        #[test]
        fn nothing_is_removed_that_a_document_may_still_be(
            steps in proptest::collection::vec((0..3usize, proptest::collection::vec((0..4usize, 0..4usize), 0..4)), 1..12)
        ) {
            let mut manifests = Manifests::default();
            let mut held = BTreeSet::new();
            for (file, documents) in steps {
                let said: Vec<String> = documents.iter().map(|(name, state)| match state {
                    0 | 1 => policy(&format!("p{name}"), "a", "80"),
                    2 => policy(&format!("p{name}"), "a", "0"),
                    _ => "kind: [".to_owned(),
                } ).collect();
                manifests.set(&format!("{file}.yaml"), Ok(&many(&said)));
                let change = manifests.settle().unwrap_or_default();
                for resource in &change.upserted {
                    held.insert(resource.store_key());
                }
                for key in &change.removed {
                    held.remove(key);
                    // What this file says now is neither it nor may be it.
                    let is_it = |(name, state): &(usize, usize)| *state == 3 || format!("{KEY}p{name}") == *key;
                    proptest::prop_assert!(!documents.iter().any(is_it), "{}", key);
                }
                // What is good is in force.
                for (name, _) in documents.iter().filter(|(_, state)| *state < 2) {
                    let key = format!("{KEY}p{name}");
                    proptest::prop_assert!(held.contains(&key), "{}", key);
                }
            }
        }
    }
}
