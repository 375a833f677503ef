//! What the files of a folder say together. No input or output here.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cirri_control::resource::{Resource, STAND_IN, read_documents};

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
    /// As last handed out, by this run or by one before.
    published: BTreeMap<String, Known>,
    /// The folder does not say what there is: what was handed out stays.
    held: bool,
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

/// What is known of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Its definition, or the last that could be understood.
    Good(Arc<Resource>),
    /// That a document speaks of it, and what is sure of what it forbids.
    Doubtful(Option<Arc<Resource>>),
}

impl Manifests {
    /// Nothing was read yet; an earlier run handed this out, by [`Resource::store_key`].
    pub(super) fn new(before: BTreeMap<String, Option<Resource>>) -> Manifests {
        let known = |resource: Option<Resource>| match resource.map(Arc::new) {
            Some(resource) if !resource.metadata().annotations.contains_key(STAND_IN) => Known::Good(resource),
            doubtful => Known::Doubtful(doubtful),
        };
        let published: BTreeMap<String, Known> = before.into_iter().map(|(key, it)| (key, known(it))).collect();
        Manifests { touched: published.keys().cloned().collect(), published, ..Manifests::default() }
    }

    /// How many objects are in force.
    pub(super) fn len(&self) -> usize {
        self.published.len()
    }

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
            Ok(bytes) if says_nothing(bytes) => {
                let why = "is empty; its last content stays in force. Remove it, or write a comment into it, if it is \
                           to say nothing";
                File { opaque: true, leaving: false, errors: vec![format!("{name}: {why}")], ..before }
            }
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

    /// What is wrong with the folder itself; and if it is `held`, it does not say what there is.
    pub(super) fn set_folder_error(&mut self, error: Option<FileError>, held: bool) {
        self.folder_error = error;
        self.held = held;
    }

    /// That nothing is different from what was last handed out.
    pub(super) fn nothing_new(&self) -> Change {
        Change { errors: self.errors.clone(), ..Change::default() }
    }

    /// What is different from what was last handed out; nothing if nothing is.
    pub(super) fn settle(&mut self) -> Option<Change> {
        let mut change = Change::default();
        if !self.held {
            let touched = std::mem::take(&mut self.touched);
            self.adopt(&touched);
            for key in touched {
                self.publish(key, &mut change);
            }
        }
        let errors = self.wrong();
        let same = change == Change::default() && errors == self.errors;
        self.errors = errors;
        (!same).then(|| Change { errors: self.errors.clone(), ..change })
    }

    fn publish(&mut self, key: String, change: &mut Change) {
        let now = self.agree(&key);
        let before = self.published.get(&key);
        if before == now.as_ref() {
            return;
        }
        match now {
            None => {
                self.published.remove(&key);
                change.removed.push(key);
            }
            // What stood in for it still does.
            Some(Known::Doubtful(None)) if before.is_some() => {}
            Some(now) => {
                if let Known::Good(resource) | Known::Doubtful(Some(resource)) = &now {
                    change.upserted.push(Arc::clone(resource));
                }
                self.published.insert(key, now);
            }
        }
    }

    /// A document that broke while it moved to another file, or while its file was renamed, keeps its last good
    /// version as well. What no file says any more goes with the document that is it, or that may be.
    fn adopt(&mut self, touched: &BTreeSet<String>) {
        for key in touched {
            let Some(Known::Good(resource)) = self.published.get(key) else { continue };
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

    /// The one definition of an object; without one, what is sure of it.
    fn agree(&mut self, key: &str) -> Option<Known> {
        let mentions = self.mentions.get(key);
        let files: Vec<(&String, &File)> =
            mentions.into_iter().flatten().filter_map(|name| self.files.get_key_value(name)).collect();
        let (leaving, staying): (Vec<_>, Vec<_>) =
            files.iter().filter(|(_, file)| file.resources.contains_key(key)).partition(|(_, file)| file.leaving);
        let had_it = staying.iter().find(|(name, file)| match (self.owners.get(key), self.published.get(key)) {
            (Some(owner), _) => owner == *name,
            // In an earlier run.
            (None, Some(Known::Good(published))) => file.resources.get(key) == Some(published),
            (None, _) => false,
        });
        let owner = had_it.or(staying.first()).or(leaving.first()).copied();
        match staying.len() > 1 {
            true => self.contested.insert(key.to_owned()),
            false => self.contested.remove(key),
        };
        let doubts: Vec<_> = files.iter().filter_map(|(_, file)| file.unreadable.get(key)).collect();
        let known = match owner {
            Some((_, file)) => Some(Known::Good(Arc::clone(&file.resources[key]))),
            None if doubts.is_empty() => None,
            None => Some(Known::Doubtful(doubts.into_iter().flatten().next().cloned())),
        };
        match owner.map(|(name, _)| (*name).clone()) {
            Some(name) => self.owners.insert(key.to_owned(), name),
            None => self.owners.remove(key),
        };
        if mentions.is_none_or(BTreeSet::is_empty) {
            self.mentions.remove(key);
        }
        known
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

/// Whether a file holds not even a comment, from which one could tell that this is meant.
fn says_nothing(bytes: &[u8]) -> bool {
    const NOTHING: [&str; 4] = ["---", "...", "null", "~"];
    let text = String::from_utf8_lossy(bytes).replace('\u{feff}', " ");
    text.split_whitespace().all(|word| NOTHING.contains(&word))
}

fn twice(file: &str, owner: &str, resource: &Resource) -> String {
    let namespace = resource.namespace().map(|it| format!("{it}/"));
    let object = format!("{} {}{}", resource.kind(), namespace.unwrap_or_default(), resource.name());
    let place = if owner == file { "earlier in this file".to_owned() } else { format!("in {owner}") };
    format!("{object} in {file} is not used: it is already defined {place}. Remove one of the two")
}

#[cfg(test)]
mod tests;
