//! Whether programs and maps are still where they were put.
//!
//! A program whose link loses its last pin falls off its device, and nothing stops the packets then. So the
//! links are also held open here: as long as the agent runs, removing a pin takes nothing off, and the pin is
//! put back. What was taken off all the same (detached, replaced) is named, for whoever attaches it again.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use cirri_abi::map;

use crate::{
    attach::{self, Attachment},
    datapath::Datapath,
    edge,
    error::LoadError,
    features::Hooking,
    pins::at,
    socket_hooks, sys,
};

/// Links that are held open, by program and device.
pub(crate) type Held = BTreeMap<Attachment, OwnedFd>;

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
    pub program: &'static str,
    /// What is there instead.
    pub found: Found,
}

/// What is found in the place of a program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// Nothing: it was taken off.
    Nothing,
    /// Another program in its link, by the kernel's number of it.
    Other(u32),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Nothing => f.write_str("the program was taken off"),
            Found::Other(id) => write!(f, "program {id} stands in its place"),
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
}

impl Datapath {
    /// Compares programs and pins with what should be there, and puts back pins that are gone.
    ///
    /// # Errors
    /// The pins cannot be listed.
    pub fn audit(&mut self, places: &[Place]) -> Result<Audit, LoadError> {
        let mut audit = Audit::default();
        self.audit_maps(&mut audit);
        self.audit_kept(&mut audit);
        let wanted: Vec<(Place, &'static str, u32)> = places.iter().flat_map(|place| place.programs()).collect();
        self.hold()?;
        let keep = |held: &Attachment| {
            wanted.iter().any(|(_, program, ifindex)| held.program == *program && held.ifindex == *ifindex)
        };
        self.held.retain(|attachment, _| keep(attachment));
        for (place, program, ifindex) in wanted {
            if self.hooking == Hooking::Clsact && !matches!(place, Place::Sockets | Place::Edge(_)) {
                if !attach::has_filter(ifindex, program) {
                    audit.misplaced.push(Misplaced { place, program, found: Found::Nothing });
                }
                continue;
            }
            if let Some(found) = self.audit_link(program, ifindex, &mut audit) {
                audit.misplaced.push(Misplaced { place, program, found });
            }
        }
        Ok(audit)
    }

    /// Opens every pinned link that is not held yet.
    pub(crate) fn hold(&mut self) -> Result<(), LoadError> {
        let dir = self.pins.links();
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(at(&dir, "list")(error)),
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let Some(attachment) = attach::attachment(&path) else { continue };
            if self.held.get(&attachment).is_none_or(is_loose) {
                let Ok(fd) = sys::open_pin(&path) else { continue };
                self.held.insert(attachment, fd);
            }
        }
        Ok(())
    }

    /// What is wrong with the link of a program, if anything is. A pin that is gone is put back.
    fn audit_link(&mut self, program: &'static str, ifindex: u32, audit: &mut Audit) -> Option<Found> {
        let attachment = Attachment { program: program.to_owned(), ifindex };
        let pin = self.pins.link(program, ifindex);
        let Some(link) = self.held.get(&attachment) else { return Some(Found::Nothing) };
        let info = sys::link_info(link.as_fd()).ok().filter(|info| !info.is_loose());
        let Some(info) = info else {
            self.held.remove(&attachment);
            return Some(Found::Nothing);
        };
        if !pin.exists() {
            put_back(&pin, format!("links/{program}-{ifindex}"), link, audit);
        }
        let ours = self
            .programs
            .fd(program)
            .and_then(|fd| sys::program_id(fd.as_fd()).map_err(at(&pin, "ask for the program of")));
        match ours {
            Ok(ours) if ours == info.program => None,
            Ok(_) => Some(Found::Other(info.program)),
            // Of a program that is not loaded nothing can be said.
            Err(_) => None,
        }
    }

    /// The pins that the next start finds programs by.
    fn audit_kept(&self, audit: &mut Audit) {
        for (path, program) in self.programs.kept().filter(|(path, _)| !path.exists()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            put_back(&path, format!("programs/{name}"), program, audit);
        }
    }

    fn audit_maps(&self, audit: &mut Audit) {
        let live = self.pins.live();
        let set = live.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for map in map::ALL {
            let (path, name) = (live.join(map.name), format!("{set}/{}", map.name));
            let Some(raw) = self.tables().raw(map.name) else { continue };
            let there = sys::open_pin(&path).and_then(sys::RawMap::new);
            match there {
                Ok(there) if there.info().id == raw.info().id => continue,
                // Another map under our name would be taken up by the next start.
                Ok(_) => {
                    if let Err(error) = fs::remove_file(&path) {
                        audit.unpinned.push((name, format!("another map is pinned there: {error}")));
                        continue;
                    }
                }
                Err(_) => {}
            }
            put_back(&path, name, raw, audit);
        }
    }
}

impl Place {
    fn programs(&self) -> Vec<(Place, &'static str, u32)> {
        let of = |programs: Vec<&'static str>, ifindex| {
            programs.into_iter().map(|program| (*self, program, ifindex)).collect()
        };
        match *self {
            Place::Workload(ifindex) => of(attach::names(attach::WORKLOAD), ifindex),
            Place::Network(ifindex) => of(attach::names(attach::NETWORK), ifindex),
            Place::Overlay(ifindex) => of(attach::names(attach::OVERLAY), ifindex),
            Place::Unwrap(ifindex) => of(attach::names(attach::UNWRAP), ifindex),
            Place::Edge(ifindex) => of(vec![edge::PROGRAM], ifindex),
            Place::Sockets => of(socket_hooks::PROGRAMS.to_vec(), socket_hooks::CGROUP),
        }
    }
}

fn is_loose(link: &OwnedFd) -> bool {
    sys::link_info(link.as_fd()).map_or(true, |info| info.is_loose())
}

fn put_back(path: &Path, name: String, object: &impl AsFd, audit: &mut Audit) {
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    match made.and_then(|()| sys::pin(object.as_fd(), path)) {
        Ok(()) => audit.repinned.push(name),
        Err(error) => audit.unpinned.push((name, error.to_string())),
    }
}
