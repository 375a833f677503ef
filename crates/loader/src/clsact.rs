//! Programs on devices without tcx: filters of a clsact qdisc.
//!
//! No pin tells of a filter, so they are looked for on the devices of the calling thread's namespace. An instance's is
//! known by its handle or, as earlier versions had one handle for all, by a program that works on the instance's maps.

use std::{fs, io, mem::ManuallyDrop, os::unix::ffi::OsStrExt as _};

use aya::programs::{
    SchedClassifier, TcAttachType,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, qdisc_add_clsact},
};
use rustix::fs::{FlockOperation, flock};

use crate::{
    attach::{Attachment, device_name, direction_of, is_program},
    chain::{self, Before},
    error::LoadError,
    net::{self, Filter},
    pins::{Pins, at, create},
    sys::{self, Direction},
};

/// The first that a filter can have.
const PRIORITY: u16 = 1;
/// Of the handles of our filters, the half that nobody else picks.
const MAJOR: u32 = 0xc144 << 16;

/// What is in the place of a program.
pub(crate) struct Placed {
    /// The number of the program there.
    pub program: u32,
    /// Who runs before it.
    pub before: Option<Before>,
}

/// The handles of an instance's filters; of their own, as several instances may serve on one device. The rule is the same
/// in every version. A filter has one of the two; the other is for the one that replaces it at the front.
fn handles(pins: &Pins) -> [u32; 2] {
    const FNV: [u32; 2] = [0x811c_9dc5, 0x0100_0193];
    let bytes = pins.dir().as_os_str().as_bytes();
    let hash = bytes.iter().fold(FNV[0], |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(FNV[1]));
    // The minor number is not 1, which every instance had once.
    let handle = MAJOR | (hash % 0x7ffe * 2 + 2);
    [handle, handle + 1]
}

/// Replaces the instance's filter with this program's, or makes it. In the end it is the first.
pub(crate) fn attach(
    pins: &Pins,
    (program, classifier): (&str, &mut SchedClassifier),
    direction: TcAttachType,
    device: &str,
    ifindex: u32,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let there = net::filters_on(ifindex, is_ingress(direction))?;
    let mut own = there.iter().filter(|it| is_own(pins, it));
    let first = own.next();
    // What a move that was cut short left.
    own.try_for_each(net::delete_filter)?;
    let behind = first.filter(|it| before(program, &there, it).is_some());
    let id = match first {
        Some(first) if behind.is_none() => {
            let link = SchedClassifierLink::attached(device, direction, PRIORITY, first.handle.into(), None)?;
            classifier.attach_to_link(link)?
        }
        _ => {
            let _lock = lock_qdiscs()?;
            // The qdisc may be there already, from others; if adding it fails for another reason, attaching fails too
            // and says so.
            let qdisc = qdisc_add_clsact(device);
            if qdisc.is_ok() {
                create(&pins.qdisc(ifindex))?;
            }
            let [one, other] = handles(pins);
            let handle = if behind.is_some_and(|it| it.handle == one) { other } else { one };
            let options = NlOptions { priority: PRIORITY, handle: handle.into(), classid: None };
            let added = classifier.attach_with_options(device, direction, TcAttachOptions::Netlink(options));
            added.map_err(|error| match qdisc {
                Ok(()) => error.to_string(),
                Err(qdisc) => format!("{error} (adding clsact: {qdisc})"),
            })?
        }
    };
    // The filter shall stay when this process ends; dropping the link would remove it.
    let _kept = ManuallyDrop::new(classifier.take_link(id)?);
    // A filter cannot be moved, but of one priority the newest runs first. Until the old one goes some packets meet
    // both, and none passes undecided.
    behind.map_or(Ok(()), net::delete_filter)?;
    Ok(())
}

/// Takes the instance's filters off a device, but for those of its handles with these programs; and the qdisc, if it
/// was made for them and has no others.
pub(crate) fn keep_only(pins: &Pins, ifindex: u32, programs: &[&str]) -> Result<(), LoadError> {
    let found = on(pins, ifindex).map_err(asking(ifindex))?;
    let stays = |it: &Filter| is_own(pins, it) && programs.contains(&it.name.as_str());
    for filter in found.iter().filter(|it| !stays(it)) {
        net::delete_filter(filter).map_err(asking(ifindex))?;
    }
    let made = pins.qdisc(ifindex);
    if !made.exists() || found.iter().any(stays) {
        return Ok(());
    }
    let _lock = lock_qdiscs().map_err(asking(ifindex))?;
    if all_on(ifindex).map_err(asking(ifindex))?.is_empty() {
        net::delete_clsact(ifindex).map_err(asking(ifindex))?;
    }
    fs::remove_dir(&made).map_err(at(&made, "remove"))
}

/// As long as the answer is kept no other instance puts its first filter on a device of the calling thread's namespace, or
/// removes a qdisc that seems to have none: it would take that filter along.
fn lock_qdiscs() -> io::Result<fs::File> {
    let namespace = fs::File::open("/proc/thread-self/ns/net")?;
    flock(&namespace, FlockOperation::LockExclusive)?;
    Ok(namespace)
}

/// The programs of an instance on all devices.
pub(crate) fn attachments(pins: &Pins) -> Result<Vec<Attachment>, LoadError> {
    let mut all = Vec::new();
    for ifindex in devices()? {
        let found = on(pins, ifindex).map_err(asking(ifindex))?;
        all.extend(found.into_iter().map(|it| Attachment { program: it.name, ifindex }));
    }
    Ok(all)
}

/// Takes all filters of an instance off all devices.
pub(crate) fn purge(pins: &Pins) -> Result<(), LoadError> {
    devices()?.into_iter().try_for_each(|ifindex| keep_only(pins, ifindex, &[]))
}

/// Forgets the qdiscs of devices that are gone.
pub(crate) fn forget_gone(pins: &Pins) {
    for entry in fs::read_dir(pins.qdiscs()).into_iter().flatten().flatten() {
        let ifindex = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if ifindex.is_some_and(|ifindex| device_name(ifindex).is_err()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// What is in the place of an instance's program; `None`: there is no filter.
pub(crate) fn placed(pins: &Pins, attachment: &Attachment) -> io::Result<Option<Placed>> {
    let ingress = direction_of(&attachment.program) == Direction::Ingress;
    let there = net::filters_on(attachment.ifindex, ingress)?;
    let own = there.iter().find(|it| is_own(pins, it));
    Ok(own.map(|own| Placed { program: own.program, before: before(&attachment.program, &there, own) }))
}

/// Who runs before a program's filter, of all that are there.
fn before(program: &str, there: &[Filter], own: &Filter) -> Option<Before> {
    let tables = |it: &Filter| sys::program_maps(it.program).unwrap_or_default();
    let harmless = |it: &Filter| chain::is_shared(program) && chain::is_of_an_instance(&it.name, &tables(it));
    let foreign = there.iter().take_while(|it| *it != own).find(|it| it.chain == own.chain && !harmless(it))?;
    Some(Before { id: foreign.program, name: foreign.name.clone() })
}

fn devices() -> Result<Vec<u32>, LoadError> {
    net::devices().map_err(|error| LoadError::Filters { device: "all devices".to_owned(), error })
}

/// The filters of an instance on a device.
fn on(pins: &Pins, ifindex: u32) -> io::Result<Vec<Filter>> {
    let mut found = all_on(ifindex)?;
    found.retain(|it| is_program(&it.name) && (is_own(pins, it) || is_of_its_maps(pins, it)));
    Ok(found)
}

fn all_on(ifindex: u32) -> io::Result<Vec<Filter>> {
    Ok([net::filters_on(ifindex, true)?, net::filters_on(ifindex, false)?].concat())
}

/// Whether a filter has one of the instance's handles.
fn is_own(pins: &Pins, filter: &Filter) -> bool {
    filter.chain == 0 && filter.priority == PRIORITY && handles(pins).contains(&filter.handle)
}

/// Whether a filter with a handle of ours works on the instance's maps.
fn is_of_its_maps(pins: &Pins, filter: &Filter) -> bool {
    let maps = || sys::program_maps(filter.program).unwrap_or_default();
    filter.chain == 0
        && filter.priority == PRIORITY
        && filter.handle & 0xffff_0000 == MAJOR
        && !pins.map_ids().is_disjoint(&maps().into_iter().collect())
}

fn is_ingress(direction: TcAttachType) -> bool {
    matches!(direction, TcAttachType::Ingress)
}

fn asking(ifindex: u32) -> impl FnOnce(io::Error) -> LoadError {
    let device = device_name(ifindex).unwrap_or_else(|_| ifindex.to_string());
    move |error| LoadError::Filters { device, error }
}
