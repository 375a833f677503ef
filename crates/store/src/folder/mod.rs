//! A directory of manifests as a source of resources.
//!
//! Every `*.yaml`, `*.yml` and `*.json` directly in the directory counts; names that start with a dot do not, and
//! such an ending in capitals is reported. The kernel reports changes (inotify), also of the links that lead to the
//! directory or from it, and everything is looked at now and then, for what no kernel reports: a volume mounted over
//! it, a file written elsewhere. A file that is being written is not read until its writer closes it. Each document of
//! a file stands for itself: what is understood is handed out, and one that cannot be read keeps its last good version,
//! and is reported.

mod manifests;
mod names;
mod read;
mod survey;

pub use manifests::defines;
pub use names::path_of;
pub use read::{Writers, read_bounded, read_file};

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use cirri_control::cut::cut_message;
use cirri_control::resource::Resource;
use futures::FutureExt as _;
use futures::stream::{self, BoxStream};
use inotify::EventMask;
use tokio::sync::watch;

use crate::StoreError;
use crate::paths::{News, Paths};
use manifests::Manifests;
use names::{Kind, kind_of, shown, text_of};
use read::{Found, Stamp};
use survey::{Identity, Survey, survey};

/// How often everything is looked at, for what is not reported.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A file is gone when it is gone for so long: editors and version control take one away before they put the next
/// in its place, and what it protects must not lie open in between.
const GONE_AFTER: Duration = Duration::from_millis(500);
/// A folder that was away, or is another one, may be filled yet as long as there was something new in it so lately.
const QUIET_AFTER: Duration = Duration::from_secs(5);

/// How often everything is read again that another directory was put in place of meanwhile, before that is an error.
const MAX_TRIES: usize = 8;

/// What an earlier run left: an empty one if there was none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Memory {
    /// The objects that it handed out and did not remove, by [`Resource::store_key`]; `None` for what cannot be read
    /// any more.
    pub objects: BTreeMap<String, Option<Resource>>,
    /// What it knew of each file: [`Change::files`].
    pub files: BTreeMap<String, String>,
}

/// What changed since the last one. The first one is about what an earlier run handed out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    /// New or different resources. For an object whose document can only be read in part, and that has no last good
    /// version, it is what lets nothing pass that the document may forbid ([`STAND_IN`]).
    ///
    /// [`STAND_IN`]: cirri_control::resource::STAND_IN
    pub upserted: Vec<Arc<Resource>>,
    /// [`Resource::store_key`] of those that no document defines any more, not even one that cannot be read.
    pub removed: Vec<String>,
    /// What is to be known at the next start ([`Memory::files`]), by a name that need not be a file's; `None`: nothing
    /// more. It belongs to the rest of the change: both are written, or neither.
    pub files: Vec<(String, Option<String>)>,
    /// All that is wrong now, not only what is new. Empty: all is well.
    pub errors: Vec<FileError>,
    /// Number of the last question of [`CatchUp::ask`] that this answers: all that was in the
    /// folder at that moment has been handed out.
    pub caught_up: u64,
}

/// Asks a watched folder to hand out what is in it now. Clones ask the same folder.
#[derive(Debug, Clone)]
pub struct CatchUp {
    asked: watch::Sender<u64>,
}

impl CatchUp {
    /// The number of this question: the first change with a `caught_up` as large holds, with those
    /// before it, every file that was complete when this was called. It comes even if there is
    /// nothing new to say. Of a folder that was away or replaced, and is being filled, what it held counts as there.
    pub fn ask(&self) -> u64 {
        let mut number = 0;
        self.asked.send_modify(|asked| {
            *asked += 1;
            number = *asked;
        });
        number
    }
}

/// A file, or a part of it, that is not in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileError {
    /// Its path.
    pub file: String,
    /// What is wrong, where, and what to do: one line, of bounded length.
    pub message: String,
}

impl FileError {
    fn new(file: String, message: &str) -> FileError {
        FileError { file, message: cut_message(message).into_owned() }
    }
}

/// Watches `dir`. Must be called within a tokio runtime. The stream never ends; dropping it ends
/// the watch. Should the directory go away, its last content stays in force until it is back. `before` is what an
/// earlier run left. `writers` says whether a file is being written.
///
/// # Errors
/// [`StoreError::Folder`] if `dir` is not a directory that can be read. One that cannot be watched, as a limit is reached,
/// is looked at every few seconds, and is reported.
pub fn watch(
    dir: impl AsRef<Path>,
    before: Memory,
    writers: Writers,
) -> Result<(BoxStream<'static, Change>, CatchUp), StoreError> {
    let (asked, questions) = watch::channel(0);
    let folder = Folder::open(dir.as_ref(), before, writers, questions)?;
    let changes = stream::unfold(folder, |mut folder| async move {
        let change = folder.next().await;
        Some((change, folder))
    });
    Ok((Box::pin(changes), CatchUp { asked }))
}

struct Folder {
    dir: PathBuf,
    paths: Paths,
    writers: Writers,
    /// Numbers of the questions of [`CatchUp`].
    questions: watch::Receiver<u64>,
    /// The last of them that was answered.
    answered: u64,
    /// The directory that was read last.
    read: Option<Identity>,
    /// The directory cannot be read, or is not to be believed.
    failed: bool,
    /// The files as they were when they were read.
    seen: BTreeMap<String, Stamp>,
    manifests: Manifests,
    /// Files that are not there, and when that counts.
    leaving: BTreeMap<String, Instant>,
    /// The directory is being filled, and until when nothing counts as gone.
    filling: Option<Instant>,
    /// The first change has been handed out.
    started: bool,
}

/// Why everything is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// Something was reported.
    News,
    /// The start, or just to be sure. What is being written for so long is reported.
    Time,
}

impl Folder {
    fn open(dir: &Path, before: Memory, writers: Writers, questions: watch::Receiver<u64>) -> Result<Self, StoreError> {
        let failed = |source: io::Error| StoreError::Folder { path: dir.to_owned(), hint: hint(&source), source };
        let dir = std::path::absolute(dir).map_err(failed)?;
        std::fs::read_dir(&dir).map_err(failed)?;
        let manifests = Manifests::new(&dir, before);
        Ok(Folder {
            dir,
            paths: Paths::new(),
            writers,
            questions,
            answered: 0,
            read: None,
            failed: false,
            seen: BTreeMap::new(),
            manifests,
            leaving: BTreeMap::new(),
            filling: None,
            started: false,
        })
    }

    async fn next(&mut self) -> Change {
        if !self.started {
            let asked = *self.questions.borrow();
            self.look(Occasion::Time, BTreeSet::new()).await;
            self.started = true;
            // What is leaving is gone or back before the answer.
            if self.leaving.is_empty() {
                self.answered = asked;
                if *self.questions.borrow_and_update() != asked {
                    self.questions.mark_changed();
                }
            }
            return Change { caught_up: self.answered, ..self.manifests.settle().unwrap_or_default() };
        }
        loop {
            let until = self.leaving.values().min().copied().map(|at| self.filling.map_or(at, |quiet| quiet.max(at)));
            let wait = until.map_or(LOOK_EVERY, |until| until.saturating_duration_since(Instant::now()));
            let mut asked = None;
            tokio::select! {
                news = self.paths.next() => self.take(news).await,
                Ok(()) = self.questions.changed() => {
                    asked = Some(*self.questions.borrow_and_update());
                    // What the kernel has reported may not have come here yet.
                    self.look(Occasion::News, BTreeSet::new()).await;
                    let until = self.leaving.values().max().copied();
                    // How long it is filled nobody knows, and what it held is in force meanwhile.
                    if let Some(until) = until.filter(|_| self.filling.is_none()) {
                        // What is leaving is gone or back before the answer.
                        tokio::time::sleep(until.saturating_duration_since(Instant::now())).await;
                        self.let_go().await;
                    }
                }
                () = tokio::time::sleep(wait) => match until {
                    Some(_) => self.let_go().await,
                    None => self.look(Occasion::Time, BTreeSet::new()).await,
                }
            }
            let change = self.manifests.settle();
            if change.is_some() || asked.is_some() {
                self.answered = asked.unwrap_or(self.answered);
                let change = change.unwrap_or_else(|| self.manifests.nothing_new());
                return Change { caught_up: self.answered, ..change };
            }
        }
    }

    async fn take(&mut self, news: Vec<News>) {
        let (mut stale, mut all) = (BTreeSet::new(), self.failed);
        for one in news {
            match one {
                News::Way | News::Written => all = true,
                News::Inside(name, mask) => {
                    match kind_of(&name) {
                        Kind::Manifest => {}
                        Kind::Misnamed => {
                            all = true;
                            continue;
                        }
                        Kind::Other => continue,
                    }
                    let path = self.dir.join(&name);
                    let name = text_of(&name);
                    // What was renamed within the folder is seen under both names at once, so that what it holds is
                    // not gone between them; and a link has a way of its own.
                    all |= mask.contains(EventMask::MOVED_FROM) || path.is_symlink();
                    if self.is_complete(&name, mask) {
                        stale.insert(name);
                    }
                }
            }
        }
        if all {
            return self.look(Occasion::News, stale).await;
        }
        let found = self.fetch(stale).await;
        self.take_in(found, Occasion::News);
    }

    /// May the file be read at this event?
    fn is_complete(&self, name: &str, mask: EventMask) -> bool {
        if mask.contains(EventMask::CREATE) {
            // Its writer has yet to close it, unless it is a link to what was there before.
            let metadata = std::fs::symlink_metadata(path_of(&self.dir, name));
            return metadata.is_ok_and(|it| it.is_symlink() || it.nlink() > 1);
        }
        if mask.contains(EventMask::ATTRIB) {
            return self.manifests.is_broken(name);
        }
        true
    }

    /// Goes the ways again and reads what is not as it was, and `stale` in any case. What was read counts only if the
    /// ways still lead to the same directory then: of one that is taken away meanwhile each file seems to be gone.
    async fn look(&mut self, occasion: Occasion, stale: BTreeSet<String>) {
        let mut now = self.survey(None).await;
        for _ in 0..MAX_TRIES {
            let survey = match now {
                Ok(survey) => survey,
                Err(error) => {
                    let what = "its last content stays in force. Create it again, or change store.folder";
                    return self.fail(format!("cannot be read: {error}; {what}"));
                }
            };
            if survey.files.is_empty() && self.manifests.len() > 0 && !self.was_read(&survey.identity) {
                // As a volume leaves it that is unmounted, or whoever is about to fill it.
                let count = self.manifests.len();
                return self.fail(format!(
                    "is empty, and was not when it was read last; the {count} objects from it stay in force until \
                     there is a manifest (one with a comment alone if there are to be none)"
                ));
            }
            let mut wanted = stale.clone();
            for (name, stamp) in &survey.files {
                if stamp.is_none() || self.seen.get(name) != stamp.as_ref() {
                    wanted.insert(name.clone());
                }
            }
            wanted.extend(self.manifests.files().filter(|name| !survey.files.contains_key(*name)).cloned());
            let mut found = self.fetch(wanted).await;
            now = self.survey(Some(survey.links)).await;
            let Some(after) = now.as_ref().ok().filter(|after| after.identity == survey.identity) else { continue };
            let is_back = |name: &str, what: &Found| matches!(what, Found::Nothing) && after.files.contains_key(name);
            for (name, _) in found.extract_if(.., |(name, what)| is_back(name, what)) {
                self.seen.remove(&name);
                self.leaving.remove(&name);
                self.manifests.stay(&name);
            }
            let error = after.unwatched.as_ref().map(|error| {
                let every = LOOK_EVERY.as_secs();
                format!("cannot be watched ({error}), and is looked at every {every} s. {}", hint(error))
            });
            self.manifests.set_misnamed(after.misnamed.clone());
            return self.believe(survey.identity, found, error, occasion);
        }
        self.fail("changes faster than it can be read; its last content stays in force".to_owned());
    }

    fn was_read(&self, identity: &Identity) -> bool {
        // Without a watch nobody knows.
        identity.watch.is_some() && self.read.as_ref() == Some(identity)
    }

    /// This is what the directory holds.
    fn believe(&mut self, identity: Identity, found: Vec<(String, Found)>, error: Option<String>, occasion: Occasion) {
        // A link that leads elsewhere now: there all was put in place whole, and what it lacks is gone. A directory that
        // was away, or is another one at the same path, may be filled yet.
        let other = self.read.as_ref().filter(|before| **before != identity);
        let elsewhere = other.map(|before| before.path != identity.path);
        let swapped = !self.failed && elsewhere == Some(true);
        if self.failed || elsewhere == Some(false) {
            self.filling = Some(Instant::now() + QUIET_AFTER);
        }
        self.read = Some(identity);
        self.failed = false;
        match error {
            None => self.manifests.set_folder_error(None, false),
            Some(error) => self.report(&error, false),
        }
        self.take_in(found, occasion);
        if swapped {
            self.filling = None;
            self.leaving.values_mut().for_each(|at| *at = Instant::now());
            self.remove_due();
        }
    }

    /// Files that did not come back are gone, if the directory is still there.
    async fn let_go(&mut self) {
        let occasion = if self.filling.is_some() { Occasion::Time } else { Occasion::News };
        self.look(occasion, BTreeSet::new()).await;
        self.remove_due();
    }

    fn remove_due(&mut self) {
        let now = Instant::now();
        if self.filling.is_some_and(|quiet| quiet > now) {
            return;
        }
        self.filling = None;
        let due: Vec<String> =
            self.leaving.iter().filter(|(_, at)| **at <= now).map(|(name, _)| name.clone()).collect();
        for name in due {
            self.leaving.remove(&name);
            self.manifests.remove(&name);
        }
    }

    /// Follows all ways and says what is at their end; `links` are those that are known.
    async fn survey(&mut self, links: Option<Vec<PathBuf>>) -> io::Result<Survey> {
        let survey = || {
            let dir = self.dir.clone();
            let survey = tokio::task::spawn_blocking(move || survey(&dir));
            survey.map(|done| done.unwrap_or_else(|error| Err(io::Error::other(error))))
        };
        let links = match links {
            Some(links) => links,
            // Their ways are watched before what is at their ends counts.
            None => survey().await.map(|survey| survey.links).unwrap_or_default(),
        };
        let followed = self.paths.follow(Some(&self.dir), &links);
        let mut survey = survey().await?;
        survey.identity.watch = self.paths.number();
        survey.unwatched = followed.err();
        Ok(survey)
    }

    /// Something is wrong with the folder as a whole: what it held stays, also what seemed to leave it just now.
    fn fail(&mut self, why: String) {
        for name in std::mem::take(&mut self.leaving).into_keys() {
            self.manifests.stay(&name);
        }
        self.filling = None;
        self.failed = true;
        self.report(&why, true);
    }

    fn report(&mut self, why: &str, held: bool) {
        let file = self.dir.display().to_string();
        let message = format!("{file}: {why}");
        self.manifests.set_folder_error(Some(FileError::new(file, &message)), held);
    }

    async fn fetch(&self, names: BTreeSet<String>) -> Vec<(String, Found)> {
        let mut all = Vec::new();
        for name in names {
            let (path, writers) = (path_of(&self.dir, &name), self.writers);
            let found = match path.file_name().map(kind_of) {
                Some(Kind::Manifest) => tokio::task::spawn_blocking(move || read::fetch(&path, writers)).await,
                _ => Ok(Found::Nothing),
            };
            all.push((name, found.unwrap_or_else(|error| Found::Unreadable(error.to_string()))));
        }
        all
    }

    fn take_in(&mut self, found: Vec<(String, Found)>, occasion: Occasion) {
        for (name, found) in found {
            let path = shown(&self.dir, &name);
            self.seen.remove(&name);
            if !matches!(found, Found::Nothing) {
                self.leaving.remove(&name);
            }
            if matches!(found, Found::Content(..) | Found::BeingWritten) && self.filling.is_some() {
                self.filling = Some(Instant::now() + QUIET_AFTER);
            }
            match found {
                Found::Content(bytes, stamp) => {
                    self.manifests.set(&name, Ok(&bytes));
                    self.seen.insert(name, stamp);
                }
                Found::Nothing => {
                    if self.manifests.leave(&name) {
                        self.leaving.entry(name).or_insert_with(|| Instant::now() + GONE_AFTER);
                    }
                }
                // Its writer's end is reported, and then it is read.
                Found::BeingWritten if occasion == Occasion::News && self.manifests.stay(&name) => {}
                Found::BeingWritten => {
                    let why = "is being written; its last content stays in force until its writer closes it";
                    self.manifests.set(&name, Err(format!("{path}: {why}")));
                }
                Found::Unreadable(why) => {
                    let why = format!("{path}: cannot be read: {why}; its last content stays in force");
                    self.manifests.set(&name, Err(why));
                }
            }
        }
        if self.leaving.is_empty() {
            // All that it held is back.
            self.filling = None;
        }
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "Create the directory, or change store.folder",
        io::ErrorKind::NotADirectory => "store.folder must name a directory, not a file",
        io::ErrorKind::PermissionDenied => "Give the agent the right to read the directory",
        // The kernel's answer when a user may watch no more: ENOSPC and EMFILE.
        io::ErrorKind::StorageFull => "Raise the sysctl fs.inotify.max_user_watches",
        _ => "If the limit is reached, raise the sysctl fs.inotify.max_user_instances",
    }
}
