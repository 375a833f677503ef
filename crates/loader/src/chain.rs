//! The order in which the classifiers of a device run: with tcx; without, see [`crate::clsact`].
//!
//! Whoever runs before our programs decides without them: what it accepts, no policy sees. So ours run first. Other
//! instances' programs on a device of the network are no harm there: each passes on what is not for it.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    maps::MapInfo,
    programs::{ProgramInfo, SchedClassifier, TcAttachType},
};
use cirri_abi::map;

use crate::{
    attach::{NETWORK, UNWRAP, attaching, device_name},
    error::LoadError,
    pins::at,
    sys::{self, Chained, Direction},
};

/// The place of one of our programs.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub program: &'static str,
    pub device: &'a str,
    pub ifindex: u32,
    pub direction: Direction,
}

/// A program of somebody else that runs before ours.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Before {
    /// The kernel's number of it; 0 for a filter without one.
    pub id: u32,
    /// Its name; empty if it has none.
    pub name: String,
}

/// `TCX_NEXT`: the next program decides.
const NEXT: i32 = -1;
/// `TCX_DROP`.
const DROP: i32 = 2;

/// Who runs before the program of this link; nobody if the link is not among them.
pub(crate) fn before(
    program: &str,
    ifindex: u32,
    direction: Direction,
    chain: &[Chained],
    link: u32,
) -> Option<Before> {
    let ours = chain.iter().position(|it| it.link == link)?;
    let earlier = chain.get(..ours).filter(|earlier| !earlier.is_empty())?;
    let infos = infos(ifindex, direction);
    let info = |id: u32| infos.iter().find(|info| info.id() == id);
    let of_an_instance = |info: &ProgramInfo| {
        let tables = info.map_ids().ok().flatten().unwrap_or_default();
        info.name_as_str().is_some_and(|name| is_of_an_instance(name, &tables))
    };
    let harmless = |it: &&Chained| is_shared(program) && info(it.program).is_some_and(of_an_instance);
    let foreign = earlier.iter().find(|it| !harmless(it))?;
    let name = info(foreign.program).and_then(|info| info.name_as_str()).unwrap_or_default().to_owned();
    Some(Before { id: foreign.program, name })
}

/// What the kernel says of a device's programs; nothing if one of them goes meanwhile.
fn infos(ifindex: u32, direction: Direction) -> Vec<ProgramInfo> {
    let direction = match direction {
        Direction::Ingress => TcAttachType::Ingress,
        Direction::Egress => TcAttachType::Egress,
    };
    let device = device_name(ifindex).unwrap_or_default();
    SchedClassifier::query_tcx(&device, direction).map(|(_, infos)| infos).unwrap_or_default()
}

/// Whether several instances may have this program on one device.
pub(crate) fn is_shared(program: &str) -> bool {
    [NETWORK, UNWRAP].into_iter().flatten().any(|(shared, _)| *shared == program)
}

/// Whether a program is that of a device of the network of some instance: by its name and the numbers of its tables.
pub(crate) fn is_of_an_instance(name: &str, tables: &[u32]) -> bool {
    let is_ours = |id: &u32| {
        let info = MapInfo::from_id(*id).ok();
        info.and_then(|info| info.name_as_str().map(str::to_owned))
            .is_some_and(|name| !name.is_empty() && map::ALL.iter().any(|map| map.name.starts_with(&name)))
    };
    is_shared(name) && tables.iter().any(is_ours)
}

/// Makes our program, which runs by this pinned link behind others, the first.
///
/// A link cannot be moved, and the kernel takes no program twice in one place. So a new link comes first with a
/// program that passes everything on; then the old one gets a program that drops everything, and the new one ours.
/// Nothing passes undecided at any time: what is on its way through the old order is dropped at its end.
pub(crate) fn move_to_front(
    program: BorrowedFd<'_>,
    place: Place<'_>,
    old: BorrowedFd<'_>,
    pin: &Path,
) -> Result<(), LoadError> {
    let Place { program: name, device, ifindex, direction } = place;
    let failed = || attaching::<io::Error>(name, device);
    let pass = sys::load_classifier(NEXT).map_err(failed())?;
    let shut = sys::load_classifier(DROP).map_err(failed())?;
    let new = sys::link_tcx_first(pass.as_fd(), ifindex, direction).map_err(failed())?;
    let aside = aside(pin);
    sys::pin(new.as_fd(), &aside).map_err(at(&aside, "pin"))?;
    // If it ends after any of these, the next attempt begins with `end_move`, and until then nothing passes.
    sys::update_link(old, shut.as_fd()).map_err(failed())?;
    sys::update_link(new.as_fd(), program).map_err(failed())?;
    fs::rename(&aside, pin).map_err(at(pin, "replace"))?;
    sys::detach_link(old).map_err(failed())
}

/// Takes away what a move left that did not come to its end.
pub(crate) fn end_move(pin: &Path) -> Result<(), LoadError> {
    let aside = aside(pin);
    match sys::open_pin(&aside) {
        Ok(link) => {
            // Off already, with its device, is well.
            let _ = sys::detach_link(link.as_fd());
            fs::remove_file(&aside).map_err(at(&aside, "unpin"))
        }
        Err(_) => Ok(()),
    }
}

/// Where the new link of a move is pinned until it takes the old one's place.
fn aside(pin: &Path) -> PathBuf {
    let mut name = pin.file_name().unwrap_or_default().to_owned();
    name.push("-new");
    pin.with_file_name(name)
}
