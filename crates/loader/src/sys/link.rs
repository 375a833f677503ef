//! Links: programs on devices and cgroups, and the order in which they run.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use super::{Command, Id, Info, bpf, bpf_mut, object_info, own};

/// Most programs in one place of a device (`BPF_MPROG_MAX`).
const MOST: usize = 64;

/// Packets that come in by a device, or that go out by it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    /// They come in.
    Ingress,
    /// They go out.
    Egress,
}

/// A program among those of one place of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Chained {
    /// The kernel's number of it.
    pub program: u32,
    /// The kernel's number of its link; 0: it is attached without one.
    pub link: u32,
}

/// What a link is, from the kernel (`struct bpf_link_info`, as far as tcx, XDP and cgroups need it).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LinkInfo {
    pub kind: u32,
    pub id: u32,
    pub program: u32,
    _align: u32,
    /// A device's number and, for tcx, the direction; or a cgroup's number.
    object: [u32; 2],
}

impl LinkInfo {
    /// Device of a tcx or XDP link, 0 once it is gone.
    pub fn ifindex(&self) -> u32 {
        self.object[0]
    }

    /// Cgroup of a link to one, 0 once it is gone.
    pub fn cgroup(&self) -> u64 {
        let [first, second] = self.object;
        if cfg!(target_endian = "little") {
            u64::from(second) << 32 | u64::from(first)
        } else {
            u64::from(first) << 32 | u64::from(second)
        }
    }

    /// Whether what the link was attached to is gone.
    pub fn is_loose(&self) -> bool {
        const CGROUP: u32 = 3;
        if self.kind == CGROUP { self.cgroup() == 0 } else { self.ifindex() == 0 }
    }
}

impl Info for LinkInfo {}

/// What the kernel says about a link.
pub(crate) fn link_info(fd: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    object_info(fd, &mut info)?;
    Ok(info)
}

/// Attaches an XDP program to a device, the flags saying how (`XDP_FLAGS_*`).
///
/// aya would try the older way too when the kernel refuses; what that attaches cannot be kept by a pin.
pub(crate) fn link_xdp(program: BorrowedFd<'_>, ifindex: u32, flags: u32) -> io::Result<OwnedFd> {
    const XDP: u32 = 37;
    let attr = LinkCreate { program: program.as_raw_fd() as u32, target: ifindex, attach_type: XDP, flags };
    // SAFETY: `attr` is the whole argument and outlives the call.
    unsafe { bpf(Command::LinkCreate, &attr) }.map(own)
}

/// Attaches a classifier to what comes in by a device, behind all others (Linux 6.6).
pub(crate) fn link_tcx_ingress(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    link_tcx(program, ifindex, Direction::Ingress, 0)
}

/// Attaches a classifier to a device before all others. The kernel refuses one that is there already: `EEXIST`.
pub(crate) fn link_tcx_first(program: BorrowedFd<'_>, ifindex: u32, direction: Direction) -> io::Result<OwnedFd> {
    const BPF_F_BEFORE: u32 = 1 << 3;
    link_tcx(program, ifindex, direction, BPF_F_BEFORE)
}

fn link_tcx(program: BorrowedFd<'_>, ifindex: u32, direction: Direction, flags: u32) -> io::Result<OwnedFd> {
    let attr = LinkCreate {
        program: program.as_raw_fd() as u32,
        target: ifindex,
        attach_type: direction.attach_type(),
        flags,
    };
    // SAFETY: `attr` is the whole argument and outlives the call.
    unsafe { bpf(Command::LinkCreate, &attr) }.map(own)
}

/// The classifiers of a device of the calling thread's namespace, first to run first (Linux 6.6).
pub(crate) fn chain(ifindex: u32, direction: Direction) -> io::Result<Vec<Chained>> {
    let (mut programs, mut links) = ([0u32; MOST], [0u32; MOST]);
    let mut attr = Query {
        target: ifindex,
        attach_type: direction.attach_type(),
        programs: programs.as_mut_ptr() as u64,
        count: MOST as u32,
        links: links.as_mut_ptr() as u64,
        ..Query::default()
    };
    // SAFETY: both buffers hold `count` numbers, all that the kernel copies to each, and outlive the call; the kernel
    // writes the count of what is there to `attr`, which is mutable.
    unsafe { bpf_mut(Command::ProgramQuery, &mut attr) }?;
    let all = programs.into_iter().zip(links).take(attr.count as usize);
    Ok(all.map(|(program, link)| Chained { program, link }).collect())
}

/// Puts another program in the place of the link's, atomically.
pub(crate) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attr =
        LinkUpdate { link: link.as_raw_fd() as u32, program: program.as_raw_fd() as u32, ..LinkUpdate::default() };
    // SAFETY: `attr` is the whole argument and outlives the call.
    unsafe { bpf(Command::LinkUpdate, &attr) }.map(drop)
}

/// Takes a link's program off its device at once. Removing the last pin does it too, but later.
pub(crate) fn detach_link(fd: BorrowedFd<'_>) -> io::Result<()> {
    let attr = Id { id: fd.as_raw_fd() as u32, ..Id::default() };
    // SAFETY: `attr` is the whole argument and outlives the call.
    unsafe { bpf(Command::LinkDetach, &attr) }.map(drop)
}

impl Direction {
    /// `enum bpf_attach_type`.
    fn attach_type(self) -> u32 {
        match self {
            Direction::Ingress => 46,
            Direction::Egress => 47,
        }
    }
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// `struct bpf_attr` for asking what is attached, up to `revision`.
#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    _align: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}
