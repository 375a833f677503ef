//! What the files of a folder say together. No input or output here.
//!
//! A state machine: files are told to it ([`Manifests::set`], [`leave`], [`remove`]), and a step ends with
//! [`Manifests::settle`]. Each file holds what it says, or said when it could last be read, of each object
//! ([`file::Hold`]), and keeps it until it can be read again or is gone. Of the files that hold an object one owns it:
//! what that one says is in force. All of it is written down ([`record`]), so that a restart changes nothing.
//!
//! [`leave`]: Manifests::leave
//! [`remove`]: Manifests::remove

mod file;
mod record;

pub use record::defines;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cirri_control::resource::{MAX_ERRORS, Resource, STAND_IN};

use super::names::shown;
use super::{Change, FileError, Memory};
use file::{Errors, File, Hold, Reading, at, digest, not_used, says_nothing};
use record::InForce;

/// As many errors of a folder are told apart.
const MAX_ALL_ERRORS: usize = 200;

/// What was in force before, and no file is known to say: as a file that is not there any more.
const EARLIER: &str = "?";

/// Of no file of manifests: how the names begin under which lost holds stand.
const NO_FILE: char = '?';

/// What all files say.
///
/// A change costs what the files that changed hold, whatever the number of the others.
#[derive(Default)]
pub(super) struct Manifests {
    dir: PathBuf,
    /// The number of the step that is being made.
    step: u64,
    /// The first step of those that count as one moment: a file that is renamed appears before the other is gone.
    moment: u64,
    files: BTreeMap<String, File>,
    /// Object → the files that hold it.
    mentions: BTreeMap<String, BTreeSet<String>>,
    /// Objects that something may have changed about in this step.
    touched: BTreeSet<String>,
    /// Object → the file whose version is in force.
    owners: BTreeMap<String, String>,
    /// File → objects that it defines and does not own.
    contested: BTreeMap<String, BTreeSet<String>>,
    /// As handed out, by this run or by one before.
    published: InForce,
    /// What files that are gone, or say something else now, held in this step.
    lost: BTreeMap<String, Hold>,
    /// Files of which something cannot be read, and that became what they are in this moment: what is lost may be in them.
    renewed: BTreeSet<String>,
    /// Files that are not there, but may be back in a moment.
    leaving: BTreeSet<String>,
    /// Those of `files` that are none.
    no_files: BTreeSet<String>,
    /// Files about which something may have changed that is written down.
    unsaved: BTreeSet<String>,
    /// File → a digest of what is written down of it.
    saved: BTreeMap<String, u64>,
    /// The folder does not say what there is: what was handed out stays.
    held: bool,
    errors: Vec<FileError>,
    /// What is wrong with the folder itself.
    folder_error: Option<FileError>,
    /// Names of files that are not read, and seem to be meant to be.
    misnamed: Vec<String>,
}

impl Manifests {
    /// Nothing was read yet; an earlier run left this. Files are named as they are in `dir`.
    pub(super) fn new(dir: &Path, memory: Memory) -> Manifests {
        let published: InForce = memory.objects.into_iter().map(|(key, it)| (key, it.map(Arc::new))).collect();
        let mut manifests = Manifests { dir: dir.to_owned(), step: 1, ..Manifests::default() };
        for (name, text) in memory.files {
            manifests.saved.insert(name.clone(), digest(text.as_bytes()));
            let Some((file, owned)) = record::read(&text, &published) else {
                manifests.unsaved.insert(name);
                continue;
            };
            let steps = file.holds.values().map(|hold| hold.since.max(hold.broke.unwrap_or_default()));
            let named = name.strip_prefix(NO_FILE).and_then(|step| step.parse().ok());
            manifests.step = manifests.step.max(steps.chain(named).max().unwrap_or_default() + 1);
            manifests.owners.extend(owned.into_iter().map(|key| (key, name.clone())));
            manifests.put(name, file);
        }
        let orphans = published.iter().filter(|(key, _)| !manifests.owners.contains_key(*key));
        let orphan = |version: &Option<Arc<Resource>>| Hold {
            version: version.clone(),
            read: version.as_ref().is_some_and(|it| !it.metadata().annotations.contains_key(STAND_IN)),
            since: 0,
            broke: None,
            times: 1,
            second: None,
            vague: false,
            line: 0,
        };
        let holds: BTreeMap<_, _> = orphans.map(|(key, version)| (key.clone(), orphan(version))).collect();
        if !holds.is_empty() {
            manifests.owners.extend(holds.keys().map(|key| (key.clone(), EARLIER.to_owned())));
            manifests.put(EARLIER.to_owned(), File { holds, ..File::default() });
            manifests.leave(EARLIER);
        }
        manifests.published = published;
        manifests.moment = manifests.step;
        manifests.touched.clear();
        manifests
    }

    /// How many objects are in force.
    pub(super) fn len(&self) -> usize {
        self.published.len()
    }

    /// All that may be in the folder.
    pub(super) fn files(&self) -> impl Iterator<Item = &String> {
        self.files.keys().filter(|name| !self.no_files.contains(*name))
    }

    pub(super) fn is_broken(&self, name: &str) -> bool {
        self.files.get(name).is_some_and(|file| !file.errors.shown.is_empty())
    }

    /// The file was read, or could not be. What is understood of it counts at once. A document that is not keeps its
    /// last good version; one that does not say which object it is keeps all that the file held and does not name.
    pub(super) fn set(&mut self, name: &str, content: Result<&[u8], String>) {
        let path = self.path_of(name);
        let mut before = self.take(name).unwrap_or_default();
        let was = before.broken;
        let file = match content {
            Ok(bytes) if says_nothing(bytes) => {
                let why = "is empty; its last content stays in force. Remove it, or write a comment into it, if it is \
                           to say nothing";
                before.unreadable(bytes, Errors::of(format!("{path}: {why}")), self.step)
            }
            Err(message) => before.unreadable(message.clone().as_bytes(), Errors::of(message), self.step),
            Ok(bytes) => {
                let owns = |key: &str| self.owners.get(key).is_some_and(|owner| owner == name);
                let reading = Reading { path: &path, step: self.step, owns: &owns };
                let file = File::read(&reading, bytes, &mut before.holds);
                self.lose(name, before.holds);
                file
            }
        };
        if !file.opaque {
            self.is_told(name);
        }
        // It may have become another, such as one that is renamed to its name.
        match file.broken {
            Some(now) if was != Some(now) => self.renewed.insert(name.to_owned()),
            Some(_) => false,
            None => self.renewed.remove(name),
        };
        self.put(name.to_owned(), file);
    }

    /// The file is not there. What it says counts until it is removed, unless another file says it. `false`: nothing
    /// is known of it.
    pub(super) fn leave(&mut self, name: &str) -> bool {
        let Some(file) = self.files.get_mut(name) else { return false };
        if file.left.is_none() {
            file.left = Some(self.step);
            file.errors = Errors::default();
            self.leaving.insert(name.to_owned());
            self.touched.extend(file.holds.keys().cloned());
        }
        true
    }

    /// The file is there, and its content is as it was. `false`: nothing is known of it.
    pub(super) fn stay(&mut self, name: &str) -> bool {
        let Some(file) = self.files.get_mut(name) else { return false };
        if file.left.take().is_some() {
            self.leaving.remove(name);
            self.touched.extend(file.holds.keys().cloned());
        }
        true
    }

    pub(super) fn remove(&mut self, name: &str) {
        if let Some(file) = self.take(name) {
            self.renewed.remove(name);
            self.is_told(name);
            self.lose(name, file.holds);
        }
    }

    /// What is wrong with the folder itself; and if it is `held`, it does not say what there is.
    pub(super) fn set_folder_error(&mut self, error: Option<FileError>, held: bool) {
        self.folder_error = error;
        self.held = held;
    }

    pub(super) fn set_misnamed(&mut self, names: Vec<String>) {
        self.misnamed = names;
    }

    /// That nothing is different from what was last handed out.
    pub(super) fn nothing_new(&self) -> Change {
        Change { errors: self.errors.clone(), ..Change::default() }
    }

    /// Ends a step. What is different from what was last handed out; nothing if nothing is.
    pub(super) fn settle(&mut self) -> Option<Change> {
        let mut change = Change::default();
        if !self.held {
            self.find_again();
            for key in std::mem::take(&mut self.touched) {
                self.publish(key, &mut change);
            }
            self.step += 1;
            // What leaves now may be what they are.
            if self.leaving.is_empty() {
                self.unsaved.append(&mut self.renewed);
                self.moment = self.step;
            }
            self.save(&mut change);
        }
        let errors = self.wrong();
        let same = change == Change::default() && errors == self.errors;
        self.errors = errors;
        (!same).then(|| Change { errors: self.errors.clone(), ..change })
    }

    fn path_of(&self, name: &str) -> String {
        shown(&self.dir, name)
    }

    fn put(&mut self, name: String, file: File) {
        for key in file.holds.keys() {
            self.mentions.entry(key.clone()).or_default().insert(name.clone());
            self.touched.insert(key.clone());
        }
        if !file.among.is_empty() {
            self.no_files.insert(name.clone());
        }
        self.unsaved.insert(name.clone());
        self.files.insert(name, file);
    }

    fn take(&mut self, name: &str) -> Option<File> {
        let file = self.files.remove(name)?;
        for key in file.holds.keys() {
            if let Some(files) = self.mentions.get_mut(key) {
                files.remove(name);
            }
            self.touched.insert(key.clone());
        }
        self.contested.remove(name);
        self.leaving.remove(name);
        self.no_files.remove(name);
        self.unsaved.insert(name.to_owned());
        Some(file)
    }

    /// A file says what it says, or is gone: it is not what was lost.
    fn is_told(&mut self, name: &str) {
        let may_be = |other: &&String| self.files.get(*other).is_some_and(|file| file.among.contains(name));
        for other in self.no_files.iter().filter(may_be).cloned().collect::<Vec<_>>() {
            let Some(file) = self.files.get_mut(&other) else { continue };
            file.among.remove(name);
            self.unsaved.insert(other.clone());
            if file.among.is_empty()
                && let Some(file) = self.take(&other)
            {
                self.lose(&other, file.holds);
            }
        }
    }

    /// A file does not hold this any more.
    fn lose(&mut self, name: &str, holds: BTreeMap<String, Hold>) {
        for (key, hold) in holds.into_iter().filter(|(_, hold)| hold.version.is_some()) {
            let first = |known: &Hold| {
                let owned = self.owners.get(&key).is_some_and(|owner| owner == name);
                owned || hold.since < known.since
            };
            if self.lost.get(&key).is_none_or(first) {
                self.lost.insert(key, hold);
            }
        }
    }

    /// What was lost in this step, and is read nowhere else, may have broken while it moved: it stays with the document
    /// that names it and cannot be read, or else with the files one of which may be it.
    fn find_again(&mut self) {
        let mut astray = BTreeMap::new();
        let is_opaque = |name: &&String| self.files.get(*name).is_some_and(|file| file.opaque);
        let among: BTreeSet<String> = self.renewed.iter().filter(is_opaque).cloned().collect();
        for (key, lost) in std::mem::take(&mut self.lost) {
            let holders: Vec<String> = self.mentions.get(&key).into_iter().flatten().cloned().collect();
            if holders.iter().any(|name| self.is_readable(name, &key) && self.is_new(name, &key)) {
                continue;
            }
            let mut found = false;
            for name in holders.iter().filter(|name| !self.no_files.contains(*name)) {
                let is_new = self.is_new(name, &key);
                let Some(file) = self.files.get_mut(name) else { continue };
                let Some(hold) = file.holds.get_mut(&key) else { continue };
                if hold.broke.is_none() {
                    continue;
                }
                // One that was there before says what it said. Of a file that had another definition nobody knows
                // whether it is still that file.
                let follows = match hold.read {
                    true => self.renewed.contains(name) && lost.lets_less_pass(hold),
                    false if hold.version.is_none() => true,
                    false => lost.read && is_new,
                };
                if is_new {
                    hold.since = lost.since;
                    found = true;
                }
                if follows {
                    file.find(&key, &lost);
                }
                self.unsaved.insert(name.clone());
            }
            if !found && !among.is_empty() {
                let mut hold = lost;
                hold.break_at(self.step);
                astray.insert(key, hold);
            }
        }
        if !astray.is_empty() {
            // In the order of steps, like everything of which nothing else says what comes first.
            let name = format!("{NO_FILE}{:020}", self.step);
            self.put(name, File { holds: astray, among, ..File::default() });
        }
    }

    fn is_new(&self, name: &str, key: &str) -> bool {
        self.since(name, key).is_some_and(|since| since >= self.moment)
    }

    fn hold(&self, name: &str, key: &str) -> Option<&Hold> {
        self.files.get(name)?.holds.get(key)
    }

    fn since(&self, name: &str, key: &str) -> Option<u64> {
        self.hold(name, key).map(|hold| hold.since)
    }

    fn is_readable(&self, name: &str, key: &str) -> bool {
        self.hold(name, key).is_some() && self.broke(name, key).is_none()
    }

    /// The step since which the file's word on the object is only remembered.
    fn broke(&self, name: &str, key: &str) -> Option<u64> {
        let file = self.files.get(name)?;
        file.holds.get(key)?.broke.into_iter().chain(file.left).min()
    }

    fn publish(&mut self, key: String, change: &mut Change) {
        let owner = self.choose(&key);
        let version = owner.as_ref().and_then(|name| self.hold(name, &key)?.version.clone());
        let holders = self.mentions.get(&key).cloned().unwrap_or_default();
        self.note_contested(&key, &holders, owner.as_ref());
        if holders.is_empty() {
            self.mentions.remove(&key);
            self.owners.remove(&key);
            if self.published.remove(&key).is_some() {
                change.removed.push(key);
            }
            return;
        }
        let before = match &owner {
            Some(owner) => self.owners.insert(key.clone(), owner.clone()),
            None => self.owners.remove(&key),
        };
        // Of a version that nobody knows there is nothing to say: what stands in the store stays.
        let news = version.is_some() && self.published.get(&key) != Some(&version);
        if news || before != owner {
            // Who owns an object, and who says what is in force, is written down.
            self.unsaved.extend(holders.into_iter().chain(before));
        }
        if let Some(version) = version.filter(|_| news) {
            change.upserted.push(Arc::clone(&version));
            self.published.insert(key, Some(version));
        }
    }

    /// The file whose version of an object is in force. One keeps it for as long as it is there; if it cannot be read
    /// any more, until another file defines the object anew.
    fn choose(&self, key: &str) -> Option<String> {
        let has_version = |name: &&String| self.hold(name, key).is_some_and(|hold| hold.version.is_some());
        let all: Vec<&String> = self.mentions.get(key).into_iter().flatten().filter(has_version).collect();
        // Of those that came at once, the one that says what was in force, then the first by name.
        let rank = |name: &&String| {
            let hold = self.hold(name, key);
            let differs = hold.map(|hold| self.published.get(key) != Some(&hold.version));
            (hold.map(|hold| hold.since), differs, (*name).clone())
        };
        // Where nobody knows which file it is, of two that are remembered the one that is certain to open nothing.
        let closed = |one: &'_ String, other: &&String| {
            let unsure = self.no_files.contains(one) || self.no_files.contains(*other);
            let holds = self.hold(one, key).zip(self.hold(other, key));
            unsure && holds.is_some_and(|(one, other)| other.lets_less_pass(one))
        };
        let owner = self.owners.get(key).filter(|owner| all.contains(owner));
        let mut first = owner.or_else(|| all.iter().copied().min_by_key(rank))?;
        loop {
            let Some(broke) = self.broke(first, key) else { return Some(first.clone()) };
            // What was never read was there before what came with it.
            let after = if self.since(first, key) == Some(broke) { broke + 1 } else { broke };
            let follows = |name: &&String| {
                self.is_readable(name, key) && self.since(name, key).is_some_and(|since| since >= after)
            };
            if let Some(successor) = all.iter().copied().filter(follows).min_by_key(rank) {
                return Some(successor.clone());
            }
            let remembered =
                all.iter().copied().fold(first, |one, other| if closed(one, &other) { other } else { one });
            if remembered == first {
                return Some(first.clone());
            }
            // It may have a successor of its own, as after a restart, when it is the owner.
            first = remembered;
        }
    }

    fn note_contested(&mut self, key: &str, holders: &BTreeSet<String>, owner: Option<&String>) {
        for name in holders {
            let is_contested = owner != Some(name) && self.is_readable(name, key);
            match self.contested.get_mut(name) {
                Some(keys) if !is_contested => drop(keys.remove(key)),
                Some(keys) => drop(keys.insert(key.to_owned())),
                None if is_contested => drop(self.contested.insert(name.clone(), BTreeSet::from([key.to_owned()]))),
                None => {}
            }
        }
    }

    /// What is written down, if it is not as it was.
    fn save(&mut self, change: &mut Change) {
        for name in std::mem::take(&mut self.unsaved).into_iter().filter(|name| name != EARLIER) {
            let owns = |key: &str| self.owners.get(key).is_some_and(|owner| *owner == name);
            let settled = !self.renewed.contains(&name);
            let record = self.files.get(&name).and_then(|file| record::write(file, settled, owns, &self.published));
            let now = record.as_ref().map(|text| digest(text.as_bytes()));
            if now == self.saved.get(&name).copied() {
                continue;
            }
            match now {
                Some(now) => self.saved.insert(name.clone(), now),
                None => self.saved.remove(&name),
            };
            change.files.push((name, record));
        }
    }

    /// All that is wrong, file by file.
    fn wrong(&self) -> Vec<FileError> {
        let mut all: Vec<FileError> = self.folder_error.iter().cloned().collect();
        if let Some(first) = self.misnamed.first() {
            let others = match self.misnamed.len() - 1 {
                0 => String::new(),
                others => format!(", nor are {others} more of such names"),
            };
            let path = self.path_of(first);
            let why = "manifests end in `.yaml`, `.yml` or `.json`, in small letters: rename it";
            all.push(FileError::new(path.clone(), &format!("{path}: is not read{others}; {why}")));
        }
        let mut more = 0;
        for (name, file) in &self.files {
            let contested = self.contested.get(name);
            let mut shown: Vec<String> = file.errors.shown.clone();
            let room = MAX_ERRORS.saturating_sub(shown.len());
            shown.extend(contested.into_iter().flatten().take(room).filter_map(|key| self.twice(name, key)));
            let rest = file.errors.more + contested.map_or(0, BTreeSet::len).saturating_sub(room);
            if shown.is_empty() {
                continue;
            }
            let path = self.path_of(name);
            if rest > 0 {
                shown.push(format!("{path}: {rest} more errors are not shown"));
            }
            let fits = shown.len().min(MAX_ALL_ERRORS.saturating_sub(all.len()));
            more += shown.len() - fits;
            all.extend(shown.drain(..fits).map(|message| FileError::new(path.clone(), &message)));
        }
        if more > 0 {
            let path = self.dir.display().to_string();
            all.push(FileError::new(path.clone(), &format!("{path}: {more} more errors are not shown")));
        }
        all
    }

    fn twice(&self, name: &str, key: &str) -> Option<String> {
        let (hold, owner) = (self.hold(name, key)?, self.owners.get(key)?);
        let owned = self.hold(owner, key)?;
        let why = match owned.broke {
            None => format!("it is already defined in {}", at(&self.path_of(owner), owned.line)),
            Some(_) if self.no_files.contains(owner) => {
                let one = self.files.get(owner)?.among.first()?;
                format!("what is in force may be in {}, which cannot be read", self.path_of(one))
            }
            Some(_) => format!("what {} said of it is in force, which cannot be read", self.path_of(owner)),
        };
        Some(not_used(&self.path_of(name), hold.line, hold.version.as_ref()?, &why))
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
