//! Where maps and links are kept on the BPF file system.
//!
//! ```text
//! <pin root>/<instance>/<ABI hash>/FLOWS4 ...     the maps, one complete set
//! <pin root>/<instance>/<ABI hash>-new/           a set being made; never used
//! <pin root>/<instance>/programs/              programs that passed the verifier, for the next start
//! <pin root>/<instance>/links/from_workload-12    program on device
//! <pin root>/<instance>/links/connect4-0          program on the sockets of a cgroup
//! <pin root>/<instance>/qdiscs/12                 device that was given a clsact qdisc; empty
//! <pin root>/<instance>/endpoints/3               what is known of an endpoint; see [`crate::Records`]
//! ```
//!
//! A set is made aside and renamed when it is complete and every program has passed the verifier,
//! so what stands under the hash alone is never half made. All of a set is used or none: recipes
//! rest on epochs, and flow entries beside fresh epochs could look valid when they are not.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use cirri_abi::{ABI_HASH, map};
use rustix::fs::{FlockOperation, flock};

use crate::{
    clsact,
    error::{LoadError, MapError},
    rulesets,
    sys::{self, LinkInfo, RawMap},
    table::compatible,
};

/// The directory of one instance.
#[derive(Clone, Debug)]
pub(crate) struct Pins {
    dir: PathBuf,
}

/// Whether the maps of an earlier run can be used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// There are none.
    Nothing,
    /// All of them, as the ABI and the configuration want them.
    Usable,
    /// Some are missing or have another shape; why.
    Unusable(String),
}

const NEW: &str = "-new";

impl Pins {
    /// The directory, made if it is not there.
    pub fn open(root: &Path, instance: &str) -> Result<Pins, LoadError> {
        // The BPF file system reserves names with a dot.
        let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if instance.is_empty() || !instance.chars().all(good) {
            return Err(LoadError::Sizes(format!(
                "instance name {instance:?} must be made of letters, digits, - and _ only"
            )));
        }
        let pins = Pins { dir: root.join(instance) };
        create(&pins.links())?;
        Ok(pins)
    }

    /// The directory, if it is there.
    pub fn at(root: &Path, instance: &str) -> Option<Pins> {
        let pins = Pins { dir: root.join(instance) };
        pins.dir.exists().then_some(pins)
    }

    /// Says that nobody else may use or remove the directory as long as the answer is kept; waits for another process that
    /// has it, so long at most. `None`: the directory is gone.
    pub fn claim(&self, patience: Duration) -> Result<Option<fs::File>, LoadError> {
        loop {
            let dir = match fs::File::open(&self.dir) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                other => other.map_err(at(&self.dir, "open"))?,
            };
            let claim = self.lock(dir, patience)?;
            // Whoever had it may have removed it before we locked it.
            if self.is_same(&claim) {
                return Ok(Some(claim));
            }
        }
    }

    fn lock(&self, dir: fs::File, patience: Duration) -> Result<fs::File, LoadError> {
        let busy = || LoadError::Busy { path: self.dir.clone() };
        let failed = |error: rustix::io::Errno| at(&self.dir, "lock")(error.into());
        match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if patience.is_zero() => return Err(busy()),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            locked => return locked.map(|()| dir).map_err(failed),
        }
        // A thread of its own, since nothing but the lock ends the wait for it; what comes too late is let go at once.
        let (tell, told) = mpsc::channel();
        thread::spawn(move || tell.send(flock(&dir, FlockOperation::LockExclusive).map(|()| dir)));
        told.recv_timeout(patience).map_err(|_| busy())?.map_err(failed)
    }

    /// Claims the directory anew if it is another one by now: a lock goes with what it was taken on.
    pub fn claim_again(&self, claim: &mut fs::File) -> Result<(), LoadError> {
        if !self.is_same(claim) {
            let gone = || at(&self.dir, "claim")(io::ErrorKind::NotFound.into());
            *claim = self.claim(Duration::ZERO)?.ok_or_else(gone)?;
        }
        Ok(())
    }

    /// Whether what was claimed is still what stands there.
    fn is_same(&self, claim: &fs::File) -> bool {
        let inode = |it: fs::Metadata| (it.dev(), it.ino());
        let now = fs::metadata(&self.dir).ok().map(inode);
        now.is_some() && claim.metadata().ok().map(inode) == now
    }

    /// The maps in use.
    pub fn live(&self) -> PathBuf {
        self.dir.join(format!("{ABI_HASH:016x}"))
    }

    fn new_set(&self) -> PathBuf {
        self.dir.join(format!("{ABI_HASH:016x}{NEW}"))
    }

    pub fn links(&self) -> PathBuf {
        self.dir.join("links")
    }

    /// Says of a device that its clsact qdisc was made for the instance.
    pub fn qdisc(&self, ifindex: u32) -> PathBuf {
        self.qdiscs().join(ifindex.to_string())
    }

    pub fn qdiscs(&self) -> PathBuf {
        self.dir.join("qdiscs")
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is known of endpoints, of the instance with this directory.
    pub fn endpoints(dir: &Path) -> PathBuf {
        dir.join("endpoints")
    }

    /// The programs that passed the verifier.
    pub fn programs(&self) -> PathBuf {
        self.dir.join("programs")
    }

    pub fn link(&self, program: &str, ifindex: u32) -> PathBuf {
        self.links().join(format!("{program}-{ifindex}"))
    }

    /// Looks at the maps that an earlier run left. A map is opened here only to ask for its shape.
    pub fn inspect(&self, sizes: &BTreeMap<&'static str, u32>) -> Result<Found, LoadError> {
        let live = self.live();
        if !live.exists() {
            return Ok(Found::Nothing);
        }
        match open_set(&live, sizes) {
            Ok(maps) => Ok(match maps.get(map::RULESETS.name).map_or(Ok(()), rulesets::try_outer) {
                Ok(()) => Found::Usable,
                Err(error) => Found::Unusable(format!("{} takes no rule sets: {error}", map::RULESETS.name)),
            }),
            Err(LoadError::Map(error @ MapError::Incompatible { .. })) => Ok(Found::Unusable(error.to_string())),
            Err(LoadError::Pin { path, error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Found::Unusable(format!("{} is missing", path.display())))
            }
            Err(error) => Err(error),
        }
    }

    /// Opens the maps in use, whatever sizes the configuration gave them.
    pub fn open_live(&self) -> Result<BTreeMap<&'static str, RawMap>, LoadError> {
        let mut maps = BTreeMap::new();
        for map in map::ALL {
            let raw = open_map(&self.live(), map)?;
            compatible(raw.info(), map, raw.info().max_entries)?;
            maps.insert(map.name, raw);
        }
        Ok(maps)
    }

    /// The numbers of the maps of all sets, also of other ABIs.
    pub fn map_ids(&self) -> BTreeSet<u32> {
        let of_set = |name: &String| fs::read_dir(self.dir.join(name)).into_iter().flatten().flatten();
        let sets = self.sets().unwrap_or_default();
        let pins = sets.iter().flat_map(of_set).map(|entry| entry.path());
        pins.filter_map(|pin| sys::map_id(sys::open_pin(&pin).ok()?.as_fd()).ok()).collect()
    }

    /// The names of the sets of maps.
    fn sets(&self) -> Result<Vec<String>, LoadError> {
        let entries = fs::read_dir(&self.dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let names = entries.map_err(at(&self.dir, "list"))?.into_iter().map(|it| it.file_name());
        let is_set = |name: &String| {
            let hash = name.strip_suffix(NEW).unwrap_or(name);
            hash.len() == 16 && hash.bytes().all(|c| c.is_ascii_hexdigit())
        };
        Ok(names.map(|name| name.to_string_lossy().into_owned()).filter(is_set).collect())
    }

    /// An empty directory for a new set.
    pub fn begin(&self) -> Result<PathBuf, LoadError> {
        let dir = self.new_set();
        remove(&dir)?;
        create(&dir)?;
        Ok(dir)
    }

    /// Makes the new set the live one. Programs that run on the old one keep it alive.
    pub fn commit(&self) -> Result<(), LoadError> {
        let live = self.live();
        remove(&live)?;
        fs::rename(self.new_set(), &live).map_err(at(&live, "make the new maps live"))
    }

    /// Gives up a new set.
    pub fn abandon(&self) {
        if let Err(error) = remove(&self.new_set()) {
            tracing::warn!("a half made set of maps stays behind and is removed at the next start: {error}");
        }
    }

    /// Removes the sets of other ABIs, and half made ones. Answers their names.
    pub fn retire_others(&self) -> Result<Vec<String>, LoadError> {
        let mut retired = Vec::new();
        for name in self.sets()? {
            if self.dir.join(&name) != self.live() {
                remove(&self.dir.join(&name))?;
                retired.push(name);
            }
        }
        Ok(retired)
    }

    /// Every pinned link with what the kernel says about it; none if somebody removed their directory.
    pub fn links_now(&self) -> Result<Vec<(PathBuf, LinkInfo)>, LoadError> {
        let dir = self.links();
        let mut links = Vec::new();
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(links),
            entries => entries.map_err(at(&dir, "list"))?,
        };
        for entry in entries {
            let path = match entry {
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                entry => entry.map_err(at(&dir, "list"))?.path(),
            };
            let fd = match sys::open_pin(&path) {
                // Somebody else took it away just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(at(&path, "open"))?,
            };
            let info = sys::link_info(fd.as_fd()).map_err(at(&path, "ask for its link"))?;
            links.push((path, info));
        }
        Ok(links)
    }

    /// Takes a pinned link off its device, which may be gone, and removes the pin.
    pub fn drop_link(&self, pin: &Path) -> Result<(), LoadError> {
        let fd = sys::open_pin(pin).map_err(at(pin, "open"))?;
        match sys::detach_link(fd.as_fd()) {
            Ok(()) => {}
            // Off already, with its device.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
            Err(error) => return Err(at(pin, "detach")(error)),
        }
        fs::remove_file(pin).map_err(at(pin, "unpin"))
    }

    /// Removes everything of the instance, which nobody else may use; links that were pinned are detached, and filters are
    /// taken off devices of the calling thread's namespace. `claimed` is the caller's claim, if it has one.
    pub fn purge(root: &Path, instance: &str, claimed: Option<&fs::File>) -> Result<(), LoadError> {
        let pins = Pins { dir: root.join(instance) };
        let own = match claimed {
            Some(_) => None,
            None => pins.claim(Duration::ZERO)?,
        };
        // Filters outlive the directory, and are known by their handles.
        if claimed.or(own.as_ref()).is_none() {
            return clsact::purge(&pins);
        }
        for (link, _) in pins.links_now()? {
            pins.drop_link(&link)?;
        }
        clsact::purge(&pins)?;
        remove(&pins.dir)?;
        // Not if others have pins there; another root is the administrator's.
        if root == Path::new(crate::datapath::PIN_ROOT) {
            let _ = fs::remove_dir(root);
        }
        Ok(())
    }
}

/// Opens every map of a set and checks its shape.
pub(crate) fn open_set(
    dir: &Path,
    sizes: &BTreeMap<&'static str, u32>,
) -> Result<BTreeMap<&'static str, RawMap>, LoadError> {
    let mut maps = BTreeMap::new();
    for map in map::ALL {
        let raw = open_map(dir, map)?;
        compatible(raw.info(), map, sizes.get(map.name).copied().unwrap_or(map.max_entries))?;
        maps.insert(map.name, raw);
    }
    Ok(maps)
}

fn open_map(dir: &Path, map: &cirri_abi::Map) -> Result<RawMap, LoadError> {
    let path = dir.join(map.name);
    let fd = sys::open_pin(&path).map_err(at(&path, "open"))?;
    RawMap::new(fd).map_err(at(&path, "ask for its map"))
}

pub(crate) fn at(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> LoadError {
    let path = path.to_owned();
    move |error| LoadError::Pin { path, action, error }
}

pub(crate) fn create(dir: &Path) -> Result<(), LoadError> {
    // Another instance that goes may take the root with it while we are about to use it.
    fs::create_dir_all(dir).or_else(|_| fs::create_dir_all(dir)).map_err(at(dir, "create"))
}

fn remove(dir: &Path) -> Result<(), LoadError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(dir, "remove")(error)),
        _ => Ok(()),
    }
}
