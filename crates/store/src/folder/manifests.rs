//! What the files of a folder say together. No input or output here.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cirri_control::resource::{Resource, read_documents};

use super::{Change, FileError};

/// The content of all files: of each document the last that could be understood.
///
/// A change costs what the files that changed hold, whatever the number of the others.
#[derive(Default)]
pub(super) struct Manifests {
    files: BTreeMap<String, File>,
    /// Object → the files that speak of it.
    mentions: BTreeMap<String, BTreeSet<String>>,
    /// Objects that something may have changed about since the last change was handed out.
    touched: BTreeSet<String>,
    /// Object → the file that defines it. The first one keeps it for as long as it does.
    owners: BTreeMap<String, String>,
    /// Objects that more than one file defines.
    contested: BTreeSet<String>,
    /// As last handed out.
    published: Whole,
    errors: Vec<FileError>,
    /// What is wrong with the folder itself.
    folder_error: Option<FileError>,
}

#[derive(Default)]
struct File {
    /// What its documents say, or said when they could last be understood.
    resources: BTreeMap<String, Arc<Resource>>,
    /// Objects of which nothing could be understood yet, and what is sure about them.
    unreadable: BTreeMap<String, Option<Arc<Resource>>>,
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
    resources: BTreeMap<String, Arc<Resource>>,
    /// Objects of which nothing could be understood yet.
    unreadable: BTreeMap<String, Option<Arc<Resource>>>,
}

impl Whole {
    fn names(&self, key: &str) -> bool {
        self.resources.contains_key(key) || self.unreadable.contains_key(key)
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
        let before = self.take(name).unwrap_or_default();
        let was_opaque = before.opaque && !before.newly_opaque;
        let mut file = match content {
            Ok(bytes) => File::read(name, bytes, before),
            Err(message) => File { opaque: true, leaving: false, errors: vec![message], ..before },
        };
        file.newly_opaque = file.opaque && !was_opaque;
        for key in file.keys() {
            self.mentions.entry(key.clone()).or_default().insert(name.to_owned());
            self.touched.insert(key.clone());
        }
        self.files.insert(name.to_owned(), file);
    }

    /// The file is not there. What it says counts until it is removed, unless another file says it. `false`: nothing
    /// is known of it.
    pub(super) fn leave(&mut self, name: &str) -> bool {
        let Some(file) = self.files.get_mut(name) else { return false };
        file.leaving = true;
        file.errors.clear();
        self.touched.extend(file.keys().cloned());
        true
    }

    /// The file is there, and its content is as it was. `false`: nothing is known of it.
    pub(super) fn stay(&mut self, name: &str) -> bool {
        let Some(file) = self.files.get_mut(name) else { return false };
        file.leaving = false;
        self.touched.extend(file.keys().cloned());
        true
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.take(name);
    }

    fn take(&mut self, name: &str) -> Option<File> {
        let file = self.files.remove(name)?;
        for key in file.keys() {
            if let Some(files) = self.mentions.get_mut(key) {
                files.remove(name);
            }
            self.touched.insert(key.clone());
        }
        Some(file)
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
        let touched = std::mem::take(&mut self.touched);
        self.adopt(&touched);
        let mut change = Change::default();
        let mut news = false;
        for key in touched {
            let had = self.published.names(&key);
            let (definition, unreadable) = self.agree(&key);
            let resource = replace(&mut self.published.resources, &key, definition);
            change.upserted.extend(resource.new);
            let stand_in = replace(&mut self.published.unreadable, &key, unreadable);
            change.stand_ins.extend(stand_in.new.flatten());
            news |= resource.changed || stand_in.changed;
            if had && !self.published.names(&key) {
                change.removed.push(key);
            }
        }
        let errors = self.wrong();
        news |= errors != self.errors;
        self.errors = errors;
        let Change { unreadable, opaque, errors, .. } = self.nothing_new();
        news.then_some(Change { unreadable, opaque, errors, ..change })
    }

    /// A document that broke while it moved to another file, or while its file was renamed, keeps its last good
    /// version as well. What no file says any more goes with the document that is it, or that may be.
    fn adopt(&mut self, touched: &BTreeSet<String>) {
        for key in touched {
            let Some(resource) = self.published.resources.get(key) else { continue };
            let mentions = self.mentions.entry(key.clone()).or_default();
            if mentions.iter().any(|name| self.files[name].resources.contains_key(key)) {
                continue;
            }
            let vague = || self.files.iter().find(|(_, file)| file.newly_opaque).map(|(name, _)| name.clone());
            if let Some(name) = mentions.first().cloned().or_else(vague)
                && let Some(file) = self.files.get_mut(&name)
            {
                file.unreadable.remove(key);
                file.resources.insert(key.clone(), Arc::clone(resource));
                mentions.insert(name);
            }
        }
        // What leaves now may be what it is.
        if !self.files.values().any(|file| file.leaving) {
            self.files.values_mut().for_each(|file| file.newly_opaque = false);
        }
    }

    /// The one definition of an object; and without one, that nothing can be understood of it, with what is sure.
    fn agree(&mut self, key: &str) -> (Option<Arc<Resource>>, Option<Option<Arc<Resource>>>) {
        let mentions = self.mentions.get(key);
        let files: Vec<(&String, &File)> =
            mentions.into_iter().flatten().filter_map(|name| self.files.get_key_value(name)).collect();
        let (leaving, staying): (Vec<_>, Vec<_>) =
            files.iter().filter(|(_, file)| file.resources.contains_key(key)).partition(|(_, file)| file.leaving);
        let had_it = staying.iter().find(|(name, _)| self.owners.get(key) == Some(name));
        let owner = had_it.or(staying.first()).or(leaving.first()).copied();
        match staying.len() > 1 {
            true => self.contested.insert(key.to_owned()),
            false => self.contested.remove(key),
        };
        let definition = owner.map(|(_, file)| Arc::clone(&file.resources[key]));
        let doubts: Vec<_> = files.iter().filter_map(|(_, file)| file.unreadable.get(key)).collect();
        let unreadable = match definition {
            None if !doubts.is_empty() => Some(doubts.into_iter().flatten().next().cloned()),
            _ => None,
        };
        match owner.map(|(name, _)| (*name).clone()) {
            Some(name) => self.owners.insert(key.to_owned(), name),
            None => self.owners.remove(key),
        };
        if mentions.is_none_or(BTreeSet::is_empty) {
            self.mentions.remove(key);
        }
        (definition, unreadable)
    }

    /// All that is wrong, file by file.
    fn wrong(&self) -> Vec<FileError> {
        let error = |file: &String, message: String| FileError { file: file.clone(), message };
        let own = self.files.iter().flat_map(|(name, file)| file.errors.iter().map(move |text| (name, text)));
        let mut errors: Vec<FileError> = own.map(|(name, text)| error(name, text.clone())).collect();
        for key in &self.contested {
            let (owner, files) = (&self.owners[key], &self.mentions[key]);
            for (name, file) in files.iter().filter_map(|name| self.files.get_key_value(name)) {
                if let Some(resource) = file.resources.get(key)
                    && name != owner
                    && !file.leaving
                {
                    errors.push(error(name, twice(name, owner, resource)));
                }
            }
        }
        errors.sort_by(|one, other| one.file.cmp(&other.file));
        self.folder_error.iter().cloned().chain(errors).collect()
    }
}

impl File {
    /// The objects that it speaks of.
    fn keys(&self) -> impl Iterator<Item = &String> {
        self.resources.keys().chain(self.unreadable.keys())
    }

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
                    place.insert(Arc::new(resource));
                }
                Entry::Occupied(_) => file.errors.push(twice(name, name, &resource)),
            }
        }
        let mut stand_ins: BTreeMap<String, Arc<Resource>> =
            documents.stand_ins.into_iter().map(|resource| (resource.store_key(), Arc::new(resource))).collect();
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

/// What became of one entry.
struct Replaced<T> {
    /// What is there now, if it is not as it was.
    new: Option<T>,
    changed: bool,
}

/// Makes an entry what it is now.
fn replace<T: Clone + PartialEq>(map: &mut BTreeMap<String, T>, key: &str, now: Option<T>) -> Replaced<T> {
    let changed = map.get(key) != now.as_ref();
    if changed {
        match &now {
            Some(now) => map.insert(key.to_owned(), now.clone()),
            None => map.remove(key),
        };
    }
    Replaced { new: now.filter(|_| changed), changed }
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
        change.upserted.iter().map(|resource| resource.name()).collect()
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
        let [stand_in] = &change.stand_ins[..] else { panic!("{change:?}") };
        let Resource::NetworkPolicy(stand_in) = &**stand_in else { panic!("{stand_in:?}") };
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
                // Nothing was overlooked that did not seem to change.
                manifests.touched = manifests.mentions.keys().chain(manifests.owners.keys()).cloned().collect();
                proptest::prop_assert_eq!(manifests.settle(), None);
            }
        }
    }
}
