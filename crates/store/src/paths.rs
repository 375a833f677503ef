//! Paths that are followed wherever they lead: a link on the way may be swapped for another, a directory may go
//! away and come back.
//!
//! The kernel watches directories, not paths. So each directory on the way is watched for the name that the path
//! takes through it, and after each change the way is gone again.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Component, Path, PathBuf};

use futures::{FutureExt as _, StreamExt as _};
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask};

/// Watches paths. Dropping it ends that.
#[derive(Default)]
pub struct Paths {
    /// `None`: the kernel gives none (yet).
    events: Option<EventStream<Vec<u8>>>,
    watched: HashMap<WatchDescriptor, Watched>,
    /// The number of the watch on the directory whose content counts.
    number: Option<i32>,
}

/// What is looked for in one directory.
#[derive(Clone, Default)]
struct Watched {
    /// Names that a path takes.
    ways: BTreeSet<OsString>,
    /// Names of files whose content counts.
    files: BTreeSet<OsString>,
    /// Everything in it counts.
    content: bool,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// To this name in the directory whose content is watched.
    Inside(OsString, EventMask),
    /// A path may lead elsewhere now, or the file at its end is another: go the ways again ([`Paths::follow`]).
    Way,
    /// The file at the end of a path was written, and its writer closed it.
    Written,
}

impl Paths {
    /// Watches nothing yet.
    pub fn new() -> Paths {
        Paths::default()
    }

    /// From now on watches the ways to these files, and to the directory and what is in it. Must be called within a
    /// runtime. Answers the directory, all links resolved; `None` if it is not there.
    ///
    /// # Errors
    /// A directory cannot be watched: mostly a limit. The others are watched all the same. If the user has too many inotify
    /// instances, nothing is, and the next call tries again.
    pub fn follow(&mut self, directory: Option<&Path>, files: &[PathBuf]) -> io::Result<Option<PathBuf>> {
        let mut result = Ok(());
        let mut before = None;
        // What changes while it is looked at, is looked at again; who swaps faster than that is seen by the watch.
        for _ in 0..8 {
            let (wanted, end) = wanted(directory, files);
            let now = (wanted.keys().cloned().collect::<Vec<_>>(), end.clone());
            if before.as_ref() == Some(&now) {
                break;
            }
            before = Some(now);
            result = self.watch(wanted);
        }
        result.map(|()| before.and_then(|(_, end)| end))
    }

    /// Tells directories apart that [`Paths::follow`] found: the number of the watch on it, which ends with the directory.
    /// `None`: it is not there, or not watched.
    pub fn number(&self) -> Option<i32> {
        self.number
    }

    /// Waits for news; what has happened by then comes at once, each once. As long as nothing can be watched there are
    /// none. Cancel-safe.
    pub async fn next(&mut self) -> Vec<News> {
        loop {
            let first = match &mut self.events {
                Some(events) => events.next().await,
                None => std::future::pending().await,
            };
            let mut news = self.news(first);
            while let Some(more) = self.events.as_mut().and_then(|events| events.next().now_or_never()) {
                for one in self.news(more) {
                    if !news.contains(&one) {
                        news.push(one);
                    }
                }
            }
            if !news.is_empty() {
                return news;
            }
        }
    }

    fn watch(&mut self, wanted: BTreeMap<PathBuf, Watched>) -> io::Result<()> {
        let mut result = Ok(());
        let mut watched = HashMap::new();
        self.number = None;
        let events = match &mut self.events {
            Some(events) => events,
            none => none.insert(Inotify::init()?.into_event_stream(vec![0; 16 << 10])?),
        };
        for (path, one) in wanted {
            match events.watches().add(&path, one.mask()) {
                Ok(descriptor) => {
                    if one.content {
                        self.number = Some(descriptor.get_watch_descriptor_id());
                    }
                    watched.insert(descriptor, one);
                }
                // It went away just now: that shows in the directory above.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                Err(error) => result = Err(error),
            }
        }
        for descriptor in self.watched.keys().filter(|known| !watched.contains_key(*known)) {
            // Fails if the kernel has removed it by itself.
            let _ = events.watches().remove(descriptor.clone());
        }
        self.watched = watched;
        result
    }

    fn news(&self, event: Option<io::Result<EventOwned>>) -> Vec<News> {
        // Whatever was lost, a look at everything makes up for it.
        let Some(Ok(event)) = event else { return vec![News::Way] };
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            return vec![News::Way];
        }
        // One that is no longer watched.
        let Some(watched) = self.watched.get(&event.wd) else { return Vec::new() };
        let gone = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT | EventMask::IGNORED;
        if event.mask.intersects(gone) {
            return vec![News::Way];
        }
        let Some(name) = event.name else { return Vec::new() };
        let mut news = Vec::new();
        if watched.files.contains(&name) && event.mask.contains(EventMask::CLOSE_WRITE) {
            news.push(News::Written);
        } else if (watched.ways.contains(&name) || watched.files.contains(&name))
            && !event.mask.intersects(EventMask::CLOSE_WRITE | EventMask::ATTRIB)
        {
            news.push(News::Way);
        }
        if watched.content {
            news.push(News::Inside(name, event.mask));
        }
        news
    }
}

impl Watched {
    fn mask(&self) -> WatchMask {
        let mut mask = WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        if self.content || !self.files.is_empty() {
            mask |= WatchMask::CLOSE_WRITE;
        }
        if self.content {
            mask |= WatchMask::ATTRIB;
        }
        mask
    }
}

/// The directories to watch, and where the directory is.
fn wanted(directory: Option<&Path>, files: &[PathBuf]) -> (BTreeMap<PathBuf, Watched>, Option<PathBuf>) {
    let mut wanted: BTreeMap<PathBuf, Watched> = BTreeMap::new();
    let mut end = None;
    if let Some(directory) = directory {
        let way = way(directory);
        for (path, name) in way.steps {
            wanted.entry(path).or_default().ways.insert(name);
        }
        if let Some(inside) = way.end.filter(|inside| inside.is_dir()) {
            wanted.entry(inside.clone()).or_default().content = true;
            end = Some(inside);
        }
    }
    for file in files {
        let mut steps = way(file).steps;
        if let Some((path, name)) = steps.pop() {
            wanted.entry(path).or_default().files.insert(name);
        }
        for (path, name) in steps {
            wanted.entry(path).or_default().ways.insert(name);
        }
    }
    (wanted, end)
}

/// How a path leads from the root to its end.
#[derive(Debug, Default, PartialEq, Eq)]
struct Way {
    /// Each directory, and the name that is taken in it: also that of a link, and that which is missing.
    steps: Vec<(PathBuf, OsString)>,
    /// Where it ends; `None` if it leads nowhere.
    end: Option<PathBuf>,
}

/// As many links are followed; the kernel has the same limit (ELOOP).
const MAX_LINKS: usize = 40;

fn way(path: &Path) -> Way {
    let mut way = Way::default();
    let mut at = PathBuf::from("/");
    let mut names: VecDeque<OsString> = names(path).collect();
    let mut links = 0;
    while let Some(name) = names.pop_front() {
        if name == OsStr::new("..") {
            at.pop();
            continue;
        }
        way.steps.push((at.clone(), name.clone()));
        let next = at.join(&name);
        let Ok(metadata) = next.symlink_metadata() else { return way };
        if !metadata.is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        let Ok(target) = std::fs::read_link(&next) else { return way };
        if links > MAX_LINKS {
            return way;
        }
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        for name in self::names(&target).collect::<Vec<_>>().into_iter().rev() {
            names.push_front(name);
        }
    }
    way.end = Some(at);
    way
}

fn names(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}
