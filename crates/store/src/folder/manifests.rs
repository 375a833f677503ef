//! What the files of a folder say together. No input or output here.

use std::collections::{BTreeMap, BTreeSet};

use cirri_control::resource::{Resource, parse_documents};

use super::{Change, FileError};

/// The content of all files: for each the last that could be read and parsed.
#[derive(Default)]
pub(super) struct Manifests {
    files: BTreeMap<String, File>,
    /// Object → the file that defines it. The first one keeps it for as long as it does.
    owners: BTreeMap<String, String>,
    /// As last handed out.
    published: BTreeMap<String, Resource>,
    errors: Vec<FileError>,
    /// What is wrong with the folder itself.
    folder_error: Option<FileError>,
}

#[derive(Default)]
struct File {
    resources: Vec<Resource>,
    error: Option<String>,
}

impl Manifests {
    pub(super) fn files(&self) -> BTreeSet<String> {
        self.files.keys().cloned().collect()
    }

    pub(super) fn is_broken(&self, file: &str) -> bool {
        self.files.get(file).is_some_and(|file| file.error.is_some())
    }

    /// The file was read. Does not parse: the former content stays, and the error stands beside it.
    pub(super) fn set(&mut self, name: &str, text: Result<&str, String>) {
        let file = self.files.entry(name.to_owned()).or_default();
        let parsed = text.and_then(|text| parse_documents(name, text).map_err(|error| error.to_string()));
        match parsed {
            Ok(resources) => *file = File { resources, error: None },
            Err(message) => file.error = Some(message),
        }
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.files.remove(name);
    }

    pub(super) fn set_folder_error(&mut self, error: Option<FileError>) {
        self.folder_error = error;
    }

    /// What is different from what was last handed out; nothing if nothing is.
    pub(super) fn settle(&mut self) -> Option<Change> {
        let (desired, owners, errors) = self.agree();
        let upserted = desired
            .iter()
            .filter(|(key, resource)| self.published.get(*key) != Some(resource))
            .map(|(_, resource)| resource.clone())
            .collect();
        let gone = self.published.keys().filter(|key| !desired.contains_key(*key));
        let change = Change { upserted, removed: gone.cloned().collect(), errors: errors.clone() };
        let same = change.upserted.is_empty() && change.removed.is_empty() && errors == self.errors;
        self.published = desired;
        self.owners = owners;
        self.errors = errors;
        (!same).then_some(change)
    }

    /// One definition for each object, who gave it, and all that is wrong.
    fn agree(&self) -> (BTreeMap<String, Resource>, BTreeMap<String, String>, Vec<FileError>) {
        let mut owners = BTreeMap::new();
        for (name, file) in &self.files {
            for resource in &file.resources {
                let key = resource.store_key();
                let had_it = self.owners.get(&key) == Some(name);
                if had_it || !owners.contains_key(&key) {
                    owners.insert(key, name.clone());
                }
            }
        }
        let mut desired = BTreeMap::new();
        let mut errors: Vec<FileError> = self.folder_error.iter().cloned().collect();
        for (name, file) in &self.files {
            errors.extend(file.error.iter().map(|message| FileError { file: name.clone(), message: message.clone() }));
            let mut here = BTreeSet::new();
            for resource in &file.resources {
                let key = resource.store_key();
                let owner = &owners[&key];
                if owner == name && here.insert(key.clone()) {
                    desired.insert(key, resource.clone());
                } else {
                    errors.push(refused(name, owner, resource));
                }
            }
        }
        (desired, owners, errors)
    }
}

fn refused(file: &str, owner: &str, resource: &Resource) -> FileError {
    let namespace = resource.namespace().map(|it| format!("{it}/"));
    let object = format!("{} {}{}", resource.kind(), namespace.unwrap_or_default(), resource.name());
    let place = if owner == file { "earlier in this file".to_owned() } else { format!("in {owner}") };
    FileError {
        file: file.to_owned(),
        message: format!("{object} in {file} is not used: it is already defined {place}. Remove one of the two"),
    }
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
        manifests.set("a.yaml", Ok(&namespace("one", "x")));
        assert_eq!(names(&manifests.settle().expect("new")), ["one"]);

        manifests.set("a.yaml", Ok("kind: [half"));
        let change = manifests.settle().expect("an error");
        assert!(change.upserted.is_empty() && change.removed.is_empty());
        assert_eq!(change.errors.len(), 1);
        assert_eq!(change.errors[0].file, "a.yaml");
        assert!(manifests.is_broken("a.yaml"));

        manifests.set("a.yaml", Ok(&namespace("two", "x")));
        let change = manifests.settle().expect("mended");
        assert_eq!(names(&change), ["two"]);
        assert_eq!(change.removed, ["resources/Namespace/_/one"]);
        assert!(change.errors.is_empty());
    }

    #[test]
    fn of_two_files_that_define_one_object_the_later_is_refused_and_both_are_named() {
        let mut manifests = Manifests::default();
        manifests.set("b.yaml", Ok(&namespace("one", "b")));
        manifests.settle();
        // Sorts first, but came second.
        manifests.set("a.yaml", Ok(&namespace("one", "a")));
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
        manifests.set("a.yaml", Ok(&both));
        let change = manifests.settle().expect("new");
        assert_eq!(names(&change), ["one"]);
        assert!(change.upserted[0].to_json().contains("first"));
        assert!(change.errors[0].message.contains("earlier in this file"));
    }

    #[test]
    fn what_says_the_same_in_other_words_is_no_change() {
        let mut manifests = Manifests::default();
        manifests.set("a.yaml", Ok(&namespace("one", "x")));
        manifests.settle();
        let commented = format!("# hello\n{}", namespace("one", "x"));
        manifests.set("a.yaml", Ok(&commented));
        assert!(manifests.settle().is_none());
    }
}
