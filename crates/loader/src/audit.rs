//! Whether programs and maps are still where they were put.
//!
//! A program whose link loses its last pin falls off its device, and nothing stops the packets then. So the
//! links are also held open here: as long as the agent runs, removing a pin takes nothing off, and the pin is
//! put back. What was taken off all the same (detached, replaced) is named, for whoever attaches it again.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fmt, fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirEntryExt as _,
    },
    path::Path,
};

use cirri_abi::map;

use crate::{
    attach::{self, Attachment},
    chain::{self, Before},
    clsact,
    datapath::Datapath,
    edge,
    error::{LoadError, MapError},
    features::Hooking,
    pins::{Pins, at, create},
    socket_hooks, sys,
};

/// Links that are held open, by program and device.
pub(crate) type Held = BTreeMap<Attachment, HeldLink>;

/// A link that is held open.
#[derive(Debug)]
pub(crate) struct HeldLink {
    link: OwnedFd,
    /// The kernel's number of it.
    id: u32,
}

/// Where programs should be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Place {
    /// On a workload's device.
    Workload(u32),
    /// On a device of the node.
    Network(u32),
    /// Before the stack of a device of the node.
    Edge(u32),
    /// On the overlay device.
    Overlay(u32),
    /// On a device of a host that only serves.
    Unwrap(u32),
    /// On the sockets of a cgroup.
    Sockets,
}

/// Something that is not where it was put.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Misplaced {
    /// Where it was to be.
    pub place: Place,
    /// The program.
    pub program: String,
    /// What is there instead.
    pub found: Found,
}

/// What is found in the place of a program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    /// Nothing: it was taken off.
    Nothing,
    /// Another program in its link, by the kernel's number of it.
    Other(u32),
    /// The program, but behind one of somebody else, which decides without it.
    Behind(Before),
}

impl Found {
    /// What should be there instead.
    pub fn wanted(&self) -> &'static str {
        match self {
            Found::Behind(_) => "the first program there",
            Found::Nothing | Found::Other(_) => "attached",
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Nothing => f.write_str("the program was taken off"),
            Found::Other(id) => write!(f, "program {id} stands in its place"),
            Found::Behind(Before { id: 0, .. }) => f.write_str("a filter of somebody else runs before it"),
            Found::Behind(Before { id, name }) if name.is_empty() => {
                write!(f, "program {id} of somebody else runs before it")
            }
            Found::Behind(Before { id, name }) => write!(f, "program {id} ({name}) of somebody else runs before it"),
        }
    }
}

/// What [`Datapath::audit`] found.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Audit {
    /// Programs that must be attached again.
    pub misplaced: Vec<Misplaced>,
    /// Pins that were gone, and were put back: names below the directory of the instance.
    pub repinned: Vec<String>,
    /// Pins that are gone and could not be put back, and why.
    pub unpinned: Vec<(String, String)>,
    /// Entries of maps that this writes by itself, that were altered, and were written again.
    pub rewritten: Vec<String>,
    /// Somebody else took the instance when its directory had gone, by the directory's name.
    pub taken: Option<String>,
}

impl Datapath {
    /// Compares programs and pins with what should be there, and puts back pins that are gone.
    ///
    /// # Errors
    /// The pins cannot be listed.
    pub fn audit(&mut self, places: &[Place]) -> Result<Audit, LoadError> {
        let mut audit = Audit::default();
        self.audit_directory(&mut audit);
        self.audit_maps(&mut audit);
        self.audit_kept(&mut audit);
        let pinned = self.hold()?;
        let wanted: BTreeSet<Attachment> = places.iter().flat_map(Place::attachments).collect();
        // Who asks need not know yet what was attached a moment ago.
        self.held.retain(|attachment, _| wanted.contains(attachment) || pinned.contains(attachment));
        audit.misplaced = self.misplaced(places);
        for it in audit.misplaced.iter().filter(|it| !matches!(it.found, Found::Behind(_))) {
            // The link that comes next is another one.
            self.held.remove(&it.attachment());
        }
        for (attachment, held) in self.held.iter().filter(|(attachment, _)| !pinned.contains(attachment)) {
            put_back(&self.pins.link(&attachment.program, attachment.ifindex), &held.link, &mut audit);
        }
        self.audit_edge_devices(&pinned, &mut audit)?;
        Ok(audit)
    }

    /// The programs that were put somewhere and are not there, as far as that can be told without loading any.
    /// What was attached by other means than this process's is not known.
    pub fn misplaced(&self, places: &[Place]) -> Vec<Misplaced> {
        // The same few programs are in all of the places.
        let mut numbers = BTreeMap::new();
        let mut misplaced = Vec::new();
        for place in places {
            for attachment in place.attachments() {
                let ours = numbers.entry(attachment.program.clone()).or_insert_with_key(|name| self.programs.id(name));
                if let Some(found) = self.found(*place, &attachment, *ours) {
                    misplaced.push(Misplaced { place: *place, program: attachment.program, found });
                }
            }
        }
        misplaced
    }

    /// What is found instead of the programs that some process of an instance attached in the calling thread's namespace,
    /// as far as their links tell whoever asks; `None`: they are there. Changes nothing.
    ///
    /// # Errors
    /// The pins cannot be read.
    pub fn instead_of(pin_root: &Path, instance: &str, place: Place) -> Result<Option<Found>, LoadError> {
        let pins = Pins::at(pin_root, instance);
        for attachment in place.attachments() {
            let (ifindex, direction) = (attachment.ifindex, attach::direction_of(&attachment.program));
            let link =
                pins.as_ref().map_or(Ok(None), |pins| attach::pinned(&pins.link(&attachment.program, ifindex)))?;
            let found = match link.filter(|(_, info)| info.ifindex() == ifindex) {
                // The number alone does not name a device: another namespace may have it too.
                Some((_, info)) => match sys::chain(ifindex, direction) {
                    Ok(chain) if chain.iter().any(|it| it.link == info.id) => {
                        chain::before(&attachment.program, ifindex, direction, &chain, info.id).map(Found::Behind)
                    }
                    _ => Some(Found::Nothing),
                },
                // Kernels without tcx pin no link.
                None => {
                    let placed = pins.as_ref().and_then(|pins| clsact::placed(pins, &attachment).ok().flatten());
                    placed.map_or(Some(Found::Nothing), |placed| placed.before.map(Found::Behind))
                }
            };
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// What is found instead of a program, which has this number; `None`: the program.
    fn found(&self, place: Place, attachment: &Attachment, ours: Option<u32>) -> Option<Found> {
        if self.hooking == Hooking::Clsact && !matches!(place, Place::Sockets | Place::Edge(_)) {
            return match clsact::placed(&self.pins, attachment) {
                Ok(Some(there)) if ours.is_some_and(|ours| ours != there.program) => Some(Found::Other(there.program)),
                Ok(Some(there)) => there.before.map(Found::Behind),
                Ok(None) => Some(Found::Nothing),
                // What cannot be asked is not called gone.
                Err(_) => None,
            };
        }
        let Some(held) = self.held.get(attachment) else { return Some(Found::Nothing) };
        let direction = attach::direction_of(&attachment.program);
        // Of its device the kernel tells all programs in their order; what is elsewhere can only be asked by the link.
        if !matches!(place, Place::Sockets | Place::Edge(_))
            && let Ok(chain) = sys::chain(attachment.ifindex, direction)
        {
            let Some(there) = chain.iter().find(|it| it.link == held.id) else { return Some(Found::Nothing) };
            if ours.is_some_and(|ours| ours != there.program) {
                return Some(Found::Other(there.program));
            }
            let before = chain::before(&attachment.program, attachment.ifindex, direction, &chain, held.id);
            return before.map(Found::Behind);
        }
        match sys::link_info(held.link.as_fd()).ok().filter(|info| !info.is_loose()) {
            Some(info) => ours.filter(|ours| *ours != info.program).map(|_| Found::Other(info.program)),
            None => Some(Found::Nothing),
        }
    }

    /// Opens every pinned link that is not held yet; all that are pinned.
    fn hold(&mut self) -> Result<BTreeSet<Attachment>, LoadError> {
        let dir = self.pins.links();
        let mut pinned = BTreeSet::new();
        for name in names(&dir).map_err(at(&dir, "list"))? {
            let path = dir.join(name);
            let Some(attachment) = attach::attachment(&path) else { continue };
            if !self.held.contains_key(&attachment)
                && let Ok(link) = sys::open_pin(&path)
                && let Ok(info) = sys::link_info(link.as_fd())
            {
                self.held.insert(attachment.clone(), HeldLink { link, id: info.id });
            }
            pinned.insert(attachment);
        }
        Ok(pinned)
    }

    /// Before programs are attached to a device (or to sockets): links that lost their pins are found again by them, and
    /// the directory of new ones is there.
    pub(crate) fn before_attaching(&mut self, ifindex: u32) -> Result<(), LoadError> {
        create(&self.pins.links())?;
        let of_it = self.held.iter().filter(|(attachment, _)| attachment.ifindex == ifindex);
        for (attachment, held) in of_it {
            let pin = self.pins.link(&attachment.program, ifindex);
            if !pin.exists() && sys::link_info(held.link.as_fd()).is_ok_and(|info| !info.is_loose()) {
                put_back(&pin, &held.link, &mut Audit::default());
            }
        }
        Ok(())
    }

    /// After that: what is pinned there now is held, and nothing else.
    pub(crate) fn after_attaching(&mut self, ifindex: u32) -> Result<(), LoadError> {
        self.held.retain(|attachment, _| attachment.ifindex != ifindex);
        self.hold().map(drop)
    }

    /// The directory of the instance: a start of another process must find it, and its claim.
    fn audit_directory(&mut self, audit: &mut Audit) {
        let links = self.pins.links();
        if !links.exists()
            && let Err(error) = create(&links)
        {
            audit.unpinned.push((shown(&links), error.to_string()));
            return;
        }
        let Some(claim) = &mut self.claim else { return };
        if let Err(error) = self.pins.claim_again(claim) {
            match error {
                LoadError::Busy { path } => audit.taken = Some(path.display().to_string()),
                error => audit.unpinned.push((shown(&links), error.to_string())),
            }
        }
    }

    /// The pins that the next start finds maps by. One that was looked at is not opened again: as long as it is there,
    /// no other has its inode's number, and none leads to another map.
    fn audit_maps(&mut self, audit: &mut Audit) {
        let live = self.pins.live();
        let there = inodes(&live);
        for map in map::ALL {
            let Some(raw) = self.tables().raw(map.name) else { continue };
            let inode = there.get(OsStr::new(map.name)).copied();
            if inode.is_some() && self.right_pins.get(map.name).copied() == inode {
                continue;
            }
            let path = live.join(map.name);
            match sys::open_pin(&path).and_then(|there| sys::map_id(there.as_fd())) {
                Ok(there) if there == raw.info().id => {
                    self.right_pins.extend(inode.map(|inode| (map.name, inode)));
                    continue;
                }
                // Another map under our name would be taken up by the next start.
                Ok(_) => {
                    if let Err(error) = fs::remove_file(&path) {
                        audit.unpinned.push((shown(&path), format!("another map is pinned there: {error}")));
                        continue;
                    }
                }
                Err(_) => {}
            }
            put_back(&path, raw, audit);
        }
    }

    /// The pins that the next start finds programs by.
    fn audit_kept(&self, audit: &mut Audit) {
        let there: BTreeSet<OsString> = names(&self.pins.programs()).unwrap_or_default().into_iter().collect();
        for (path, program) in self.programs.kept() {
            if path.file_name().is_some_and(|name| !there.contains(name)) {
                put_back(&path, program, audit);
            }
        }
    }

    /// `EDGE_DEVICES`: a wrong Ethernet address there sends frames to nobody.
    fn audit_edge_devices(&self, pinned: &BTreeSet<Attachment>, audit: &mut Audit) -> Result<(), MapError> {
        let edge = |ifindex| Attachment { program: edge::PROGRAM.to_owned(), ifindex };
        // Without a program before the stack nobody reads it.
        if !pinned.iter().any(|it| it.program == edge::PROGRAM) {
            return Ok(());
        }
        for (ifindex, there) in self.tables().edge_devices.entries()? {
            let wanted = match self.edge_devices.get(&ifindex) {
                Some(wanted) => *wanted,
                // Of an earlier run, which its program serves until it is attached anew.
                None if pinned.contains(&edge(ifindex)) => continue,
                None => 0,
            };
            if there != wanted {
                self.tables().edge_devices.put(&ifindex, &wanted)?;
                audit.rewritten.push(format!("{} {ifindex}", map::EDGE_DEVICES.name));
            }
        }
        Ok(())
    }
}

impl Misplaced {
    fn attachment(&self) -> Attachment {
        Attachment { program: self.program.clone(), ifindex: self.place.number() }
    }
}

impl Place {
    /// The number of the device; none for sockets.
    pub fn device(&self) -> Option<u32> {
        Some(self.number()).filter(|_| *self != Place::Sockets)
    }

    fn attachments(&self) -> Vec<Attachment> {
        let programs = match self {
            Place::Workload(_) => attach::names(attach::WORKLOAD),
            Place::Network(_) => attach::names(attach::NETWORK),
            Place::Overlay(_) => attach::names(attach::OVERLAY),
            Place::Unwrap(_) => attach::names(attach::UNWRAP),
            Place::Edge(_) => vec![edge::PROGRAM],
            Place::Sockets => socket_hooks::PROGRAMS.to_vec(),
        };
        let one = |program: &str| Attachment { program: program.to_owned(), ifindex: self.number() };
        programs.into_iter().map(one).collect()
    }

    fn number(&self) -> u32 {
        match *self {
            Place::Workload(ifindex)
            | Place::Network(ifindex)
            | Place::Overlay(ifindex)
            | Place::Unwrap(ifindex)
            | Place::Edge(ifindex) => ifindex,
            Place::Sockets => socket_hooks::CGROUP,
        }
    }
}

/// What is in a directory; nothing if that is gone.
fn names(dir: &Path) -> io::Result<Vec<OsString>> {
    match fs::read_dir(dir) {
        Ok(entries) => Ok(entries.flatten().map(|entry| entry.file_name()).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The numbers of the inodes in a directory, by name; none if it is gone.
fn inodes(dir: &Path) -> BTreeMap<OsString, u64> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| (entry.file_name(), entry.ino())).collect()
}

/// A pin, as it is told of.
fn shown(path: &Path) -> String {
    let parts: Vec<_> = path.iter().rev().take(2).map(|part| part.to_string_lossy()).collect();
    parts.into_iter().rev().collect::<Vec<_>>().join("/")
}

fn put_back(path: &Path, object: &impl AsFd, audit: &mut Audit) {
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    match made.and_then(|()| sys::pin(object.as_fd(), path)) {
        Ok(()) => audit.repinned.push(shown(path)),
        Err(error) => audit.unpinned.push((shown(path), error.to_string())),
    }
}
