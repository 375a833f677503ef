//! A directory of manifests as a source of resources.
//!
//! Every `*.yaml`, `*.yml` and `*.json` directly in the directory counts; names that start with a
//! dot do not. The kernel reports changes (inotify), nothing is polled. A file is read when its
//! writer closes it or when it is renamed into place, so that half a file is not read for a whole
//! one. Each document of a file stands for itself: what is understood is handed out, and one that cannot
//! be read keeps its last good version, and is reported.

mod manifests;
mod read;

pub use read::{read_bounded, read_file};

use std::{
    collections::BTreeSet,
    ffi::OsString,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use cirri_control::resource::Resource;
use futures::{
    FutureExt as _, StreamExt as _,
    stream::{self, BoxStream},
};
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};

use crate::StoreError;
use manifests::Manifests;

/// What changed since the last one. The first one holds everything.
///
/// Objects that are unreadable from the start have no last good version here, but what an earlier run stored may
/// be one. So keep what is stored of [`Change::unreadable`], and while a document is [`Change::opaque`] all that
/// is stored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    /// New or different resources.
    pub upserted: Vec<Resource>,
    /// New or different, for objects whose document can only be read in part and that have no last good version:
    /// what lets nothing pass that the document may forbid. To be used unless an earlier run stored a good one.
    pub stand_ins: Vec<Resource>,
    /// [`Resource::store_key`] of those that no document defines any more, not even one that cannot be read.
    pub removed: Vec<String>,
    /// [`Resource::store_key`] of all objects now whose document cannot be read and that have no last good version.
    pub unreadable: BTreeSet<String>,
    /// There is a document now that does not say which object it is.
    pub opaque: bool,
    /// All that is wrong now, not only what is new. Empty: all is well.
    pub errors: Vec<FileError>,
}

/// A file, or a part of it, that is not in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileError {
    /// Its path.
    pub file: String,
    /// What is wrong, where, and what to do.
    pub message: String,
}

/// Watches `dir`. Must be called within a tokio runtime. The stream never ends; dropping it ends
/// the watch. Should the directory go away, its last content stays in force until it is back.
///
/// # Errors
/// [`StoreError::Folder`] if `dir` is not a directory that can be watched.
pub fn watch(dir: impl AsRef<Path>) -> Result<BoxStream<'static, Change>, StoreError> {
    let folder = Folder::open(dir.as_ref())?;
    Ok(Box::pin(stream::unfold(folder, |mut folder| async move {
        let change = folder.next().await;
        Some((change, folder))
    })))
}

struct Folder {
    dir: PathBuf,
    /// Its name in the parent directory, where its return shows.
    name: OsString,
    events: EventStream<Vec<u8>>,
    /// None while the directory is gone.
    watched: Option<WatchDescriptor>,
    manifests: Manifests,
    /// The first change has been handed out.
    started: bool,
}

/// Which files to read again.
enum Stale {
    These(BTreeSet<String>),
    All,
}

impl Folder {
    fn open(dir: &Path) -> Result<Self, StoreError> {
        let failed = |source: io::Error| StoreError::Folder { path: dir.to_owned(), hint: hint(&source), source };
        let dir = std::path::absolute(dir).map_err(failed)?;
        let inotify = Inotify::init().map_err(failed)?;
        let mut watches = inotify.watches();
        let watched = watches.add(&dir, inside()).map_err(failed)?;
        if let Some(parent) = dir.parent() {
            watches.add(parent, beside()).map_err(failed)?;
        }
        Ok(Folder {
            name: dir.file_name().unwrap_or_default().to_owned(),
            events: inotify.into_event_stream(vec![0; 16 << 10]).map_err(failed)?,
            dir,
            watched: Some(watched),
            manifests: Manifests::default(),
            started: false,
        })
    }

    async fn next(&mut self) -> Change {
        if !self.started {
            self.read(Stale::All).await;
            self.started = true;
            return self.manifests.settle().unwrap_or_default();
        }
        loop {
            let mut stale = Stale::These(BTreeSet::new());
            let first = self.events.next().await;
            self.note(first, &mut stale);
            // Everything that has happened by now is one change.
            while let Some(more) = self.events.next().now_or_never() {
                self.note(more, &mut stale);
            }
            self.read(stale).await;
            if let Some(change) = self.manifests.settle() {
                return change;
            }
        }
    }

    fn note(&mut self, event: Option<io::Result<EventOwned>>, stale: &mut Stale) {
        let Some(Ok(event)) = event else {
            // Whatever was lost, a look at everything makes up for it.
            *stale = Stale::All;
            return;
        };
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            *stale = Stale::All;
        } else if Some(&event.wd) == self.watched.as_ref() {
            self.note_inside(&event, stale);
        } else if event.name.as_ref() == Some(&self.name) && self.watched.is_none() {
            self.come_back(stale);
        }
    }

    fn note_inside(&mut self, event: &EventOwned, stale: &mut Stale) {
        let gone = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT;
        if event.mask.intersects(gone | EventMask::IGNORED) {
            self.go_away();
            // It may be back already.
            self.come_back(stale);
            return;
        }
        let Some(name) = event.name.as_ref().and_then(|name| name.to_str()) else {
            return;
        };
        if name.starts_with("..") || event.mask.contains(EventMask::MOVED_FROM) {
            // A Kubernetes volume's files are links through one that is swapped. What was renamed within the
            // folder is seen under both names at once, so that what it holds is not gone between them.
            *stale = Stale::All;
        } else if is_manifest(name)
            && self.is_complete(name, event.mask)
            && let Stale::These(names) = stale
        {
            names.insert(self.path_of(name));
        }
    }

    /// May the file be read at this event?
    fn is_complete(&self, name: &str, mask: EventMask) -> bool {
        if mask.contains(EventMask::CREATE) {
            // Its writer has yet to close it, unless it is a link to what was there before.
            let metadata = std::fs::symlink_metadata(self.dir.join(name));
            return metadata.is_ok_and(|it| it.is_symlink() || it.nlink() > 1);
        }
        if mask.contains(EventMask::ATTRIB) {
            return self.manifests.is_broken(&self.path_of(name));
        }
        true
    }

    fn go_away(&mut self) {
        if let Some(watched) = self.watched.take() {
            // Fails if the kernel has removed it by itself.
            let _ = self.events.watches().remove(watched);
        }
        self.manifests.set_folder_error(Some(FileError {
            file: self.dir.display().to_string(),
            message: format!(
                "{} is gone; its last content stays in force. Create it again, or change \
                 store.folder",
                self.dir.display()
            ),
        }));
    }

    fn come_back(&mut self, stale: &mut Stale) {
        if let Ok(watched) = Watches::add(&mut self.events.watches(), &self.dir, inside()) {
            self.watched = Some(watched);
            self.manifests.set_folder_error(None);
            *stale = Stale::All;
        }
    }

    async fn read(&mut self, stale: Stale) {
        let names = match stale {
            Stale::These(names) => names,
            Stale::All if self.watched.is_none() => return,
            Stale::All => match self.present().await {
                Ok(present) => &present | &self.manifests.files(),
                Err(error) => {
                    self.manifests.set_folder_error(Some(FileError {
                        file: self.dir.display().to_string(),
                        message: format!(
                            "cannot list {}: {error}; its last content stays in force",
                            self.dir.display()
                        ),
                    }));
                    return;
                }
            },
        };
        for name in names {
            let path = PathBuf::from(&name);
            let content = tokio::task::spawn_blocking(move || read(&path)).await;
            match content.unwrap_or_else(|error| Found::Unreadable(error.to_string())) {
                Found::Content(bytes) => self.manifests.set(&name, Ok(&bytes)),
                Found::Nothing => self.manifests.remove(&name),
                Found::Unreadable(why) => {
                    self.manifests
                        .set(&name, Err(format!("{name}: cannot be read: {why}; its last content stays in force")));
                }
            }
        }
    }

    async fn present(&self) -> io::Result<BTreeSet<String>> {
        let mut listing = tokio::fs::read_dir(&self.dir).await?;
        let mut names = BTreeSet::new();
        while let Some(item) = listing.next_entry().await? {
            if let Some(name) = item.file_name().to_str().filter(|name| is_manifest(name)) {
                names.insert(self.path_of(name));
            }
        }
        Ok(names)
    }

    fn path_of(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }
}

/// What stands at a path.
enum Found {
    Content(Vec<u8>),
    Nothing,
    Unreadable(String),
}

fn read(path: &Path) -> Found {
    match read_file(path) {
        Ok(bytes) => Found::Content(bytes),
        Err(_) if path.is_dir() => Found::Nothing,
        Err(error) => match path.symlink_metadata() {
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => Found::Nothing,
            // A link is there, and says that there is something: what, it will say when its target is back.
            Ok(_) if error.kind() == io::ErrorKind::NotFound => Found::Unreadable("it is a link to nothing".to_owned()),
            _ => Found::Unreadable(error.to_string()),
        },
    }
}

fn is_manifest(name: &str) -> bool {
    let kind = Path::new(name).extension().and_then(|kind| kind.to_str());
    !name.starts_with('.') && matches!(kind, Some("yaml" | "yml" | "json"))
}

fn inside() -> WatchMask {
    WatchMask::CLOSE_WRITE
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVE
        | WatchMask::ATTRIB
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR
}

fn beside() -> WatchMask {
    WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::ONLYDIR
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
