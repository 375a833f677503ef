//! What the kernel must have, tried before anything is changed: one clear line that names all it lacks.
//!
//! Versions say little: distributions take things into older kernels, and leave others out of new ones. So
//! each thing is tried with what will really be used: maps are made, and rule sets put where they belong; a
//! small program calls each helper; hooks are attached to, in a network namespace that is gone afterwards.

use std::{fs::File, io, os::fd::AsFd, os::unix::fs::MetadataExt as _, path::Path, thread};

use aya::{
    maps::MapType,
    programs::{ProgramType, tc::qdisc_add_clsact},
    sys::{BpfHelper, is_helper_supported, is_map_supported},
    util::KernelVersion,
};
use rustix::{
    fs::{FlockOperation, flock, statfs},
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, setrlimit},
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::{
    error::LoadError,
    net::{probe, put_filter},
    rulesets,
    sys::{self, ProbeKind},
};

/// The oldest kernel that Cirri is for: the oldest that `cargo xtask kernels` tries. The guide and `cargo xtask
/// doctor` say the same.
pub const OLDEST_KERNEL: (u8, u8) = (6, 1);

/// How programs are attached to devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hooking {
    /// tcx links (Linux 6.6 and later): replaced atomically, kept by pins.
    Tcx,
    /// A clsact qdisc with one filter a direction: replaced in place, kept by the device.
    Clsact,
}

/// Checks privileges and tries what Cirri uses of the kernel. Changes nothing. Answers the best way to attach.
pub(crate) fn check() -> Result<Hooking, LoadError> {
    privileges()?;
    let version = KernelVersion::current().ok();
    if version.is_some_and(|version| version < KernelVersion::new(5, 11, 0)) {
        lift_memlock();
    }
    let mut lacks = Vec::new();
    lacks.extend(NEEDS.iter().filter(|need| (need.try_it)().is_err()).map(|need| named(need.what, need.since)));
    lacks.extend(HELPERS.iter().filter(|helper| !helper.is_there()).map(Helper::named));
    let hooking = hooking(version).unwrap_or_else(|lacking| {
        lacks.extend(lacking);
        Hooking::Clsact
    });
    if !lacks.is_empty() {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        return Err(LoadError::Kernel { release, lacks });
    }
    let (major, minor) = OLDEST_KERNEL;
    if version.is_some_and(|version| version < KernelVersion::new(major, minor, 0)) {
        tracing::warn!("this kernel has all that is used, but is older than Linux {major}.{minor}, the oldest tried");
    }
    if hooking == Hooking::Clsact {
        tracing::info!("the kernel has no tcx (Linux 6.6); programs are attached with clsact");
    }
    Ok(hooking)
}

fn named(what: &str, since: &str) -> String {
    format!("{what} (Linux {since})")
}

// === Maps ===

/// Something that is tried.
struct Need {
    what: &'static str,
    /// A version that has it; the first one where that is known.
    since: &'static str,
    try_it: fn() -> io::Result<()>,
}

const NEEDS: &[Need] = &[
    Need { what: "BTF (CONFIG_DEBUG_INFO_BTF)", since: "4.18", try_it: || there(aya::features().btf().is_some()) },
    Need { what: "LRU hash maps", since: "4.10", try_it: || map(MapType::LruHash) },
    Need { what: "per-CPU maps", since: "4.6", try_it: || map(MapType::PerCpuArray) },
    Need { what: "longest-prefix maps", since: "4.11", try_it: || map(MapType::LpmTrie) },
    Need { what: "ring buffers", since: "5.8", try_it: || map(MapType::RingBuf) },
    Need { what: "storage in sockets", since: "5.2", try_it: || map(MapType::SkStorage) },
    Need { what: "maps in maps, read in batches", since: "5.19", try_it: rulesets::try_out },
    Need { what: "cookies of network namespaces", since: "5.14", try_it: cookie },
    Need { what: "programs on the sockets of a cgroup (CONFIG_CGROUP_BPF)", since: "5.8", try_it: sockets },
    Need { what: "XDP links", since: "5.9", try_it: || in_trial_namespace(xdp).unwrap_or(Ok(())) },
];

fn there(is: bool) -> io::Result<()> {
    if is { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

fn map(kind: MapType) -> io::Result<()> {
    there(matches!(is_map_supported(kind), Ok(true)))
}

fn cookie() -> io::Result<()> {
    sys::namespace_cookie(probe()?.as_fd()).map(drop)
}

// === Helpers ===

/// A helper as one kind of program calls it.
struct Helper {
    of: ProgramType,
    number: BpfHelper,
    name: &'static str,
    /// As for [`Need`].
    since: &'static str,
}

impl Helper {
    const fn new(of: ProgramType, number: BpfHelper, name: &'static str, since: &'static str) -> Helper {
        Helper { of, number, name, since }
    }

    /// A question that cannot be answered is left to the verifier, which says more.
    fn is_there(&self) -> bool {
        is_helper_supported(self.of, self.number).unwrap_or(true)
    }

    fn named(&self) -> String {
        let of = match self.of {
            ProgramType::Xdp => "XDP",
            ProgramType::CgroupSockAddr => "sockets",
            _ => "tc",
        };
        format!("{} in programs of {of} (Linux {})", self.name, self.since)
    }
}

const TC: ProgramType = ProgramType::SchedClassifier;
const XDP: ProgramType = ProgramType::Xdp;
const SOCKETS: ProgramType = ProgramType::CgroupSockAddr;

/// Every helper that the object calls (a test compares), those that every kernel with BTF has left out.
const HELPERS: &[Helper] = &[
    Helper::new(TC, BpfHelper::BPF_FUNC_redirect_peer, "bpf_redirect_peer", "5.10"),
    Helper::new(TC, BpfHelper::BPF_FUNC_redirect_neigh, "bpf_redirect_neigh", "5.10"),
    Helper::new(TC, BpfHelper::BPF_FUNC_fib_lookup, "bpf_fib_lookup", "4.18"),
    Helper::new(TC, BpfHelper::BPF_FUNC_skb_adjust_room, "bpf_skb_adjust_room", "4.13"),
    Helper::new(TC, BpfHelper::BPF_FUNC_ktime_get_coarse_ns, "bpf_ktime_get_coarse_ns", "5.11"),
    Helper::new(TC, BpfHelper::BPF_FUNC_ringbuf_output, "bpf_ringbuf_output", "5.8"),
    Helper::new(TC, BpfHelper::BPF_FUNC_ringbuf_query, "bpf_ringbuf_query", "5.8"),
    Helper::new(XDP, BpfHelper::BPF_FUNC_fib_lookup, "bpf_fib_lookup", "4.18"),
    Helper::new(XDP, BpfHelper::BPF_FUNC_xdp_adjust_tail, "bpf_xdp_adjust_tail", "4.18"),
    Helper::new(XDP, BpfHelper::BPF_FUNC_ktime_get_coarse_ns, "bpf_ktime_get_coarse_ns", "5.11"),
    Helper::new(SOCKETS, BpfHelper::BPF_FUNC_get_netns_cookie, "bpf_get_netns_cookie", "5.7"),
    Helper::new(SOCKETS, BpfHelper::BPF_FUNC_sk_storage_get, "bpf_sk_storage_get", "6.1"),
    Helper::new(SOCKETS, BpfHelper::BPF_FUNC_ktime_get_coarse_ns, "bpf_ktime_get_coarse_ns", "5.11"),
    Helper::new(SOCKETS, BpfHelper::BPF_FUNC_set_retval, "bpf_set_retval", "5.18"),
];

// === Hooks ===

/// `lo`, in every network namespace.
const LOOPBACK: u32 = 1;

/// Every hook of sockets: the kernel says at loading whether it has it.
fn sockets() -> io::Result<()> {
    const CONNECT_TO_BIND_AND_NAMES: [u32; 10] = [8, 9, 10, 11, 14, 15, 19, 20, 29, 30];
    CONNECT_TO_BIND_AND_NAMES.iter().try_for_each(|hook| sys::load_probe(ProbeKind::SockAddr { hook: *hook }).map(drop))
}

fn xdp() -> io::Result<()> {
    const GENERIC: u32 = 1 << 1;
    let program = sys::load_probe(ProbeKind::Xdp)?;
    sys::link_xdp(program.as_fd(), LOOPBACK, GENERIC).map(drop)
}

/// tcx if it can be attached to, else clsact; else what is missing.
fn hooking(version: Option<KernelVersion>) -> Result<Hooking, Vec<String>> {
    match in_trial_namespace(tcx) {
        Some(Ok(())) => return Ok(Hooking::Tcx),
        Some(Err(_)) => {}
        // tcx came with Linux 6.6 (commit e420bed02507).
        None if version.is_some_and(|version| version >= KernelVersion::new(6, 6, 0)) => return Ok(Hooking::Tcx),
        None => return Ok(Hooking::Clsact),
    }
    match in_trial_namespace(clsact).unwrap_or(Ok(())) {
        Ok(()) => Ok(Hooking::Clsact),
        Err(error) => {
            Err(vec![named("tcx", "6.6"), format!("clsact (CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF; {error})")])
        }
    }
}

fn tcx() -> io::Result<()> {
    let program = sys::load_probe(ProbeKind::Classifier)?;
    sys::link_tcx_ingress(program.as_fd(), LOOPBACK).map(drop)
}

fn clsact() -> io::Result<()> {
    let program = sys::load_probe(ProbeKind::Classifier)?;
    qdisc_add_clsact("lo").map_err(io::Error::other)?;
    put_filter(LOOPBACK, program.as_fd())
}

/// Runs it on a thread of its own, in a network namespace that goes with it. `None`: this process may not make
/// one, so that nothing is tried.
fn in_trial_namespace(inside: fn() -> io::Result<()>) -> Option<io::Result<()>> {
    let body = move || {
        // SAFETY: only NEWNET is unshared, which concerns this thread's sockets to be and nothing that
        // another thread could observe; descriptors stay shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.ok().map(|()| inside())
    };
    thread::scope(|scope| scope.spawn(body).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

// === Privileges and the file system ===

fn privileges() -> Result<(), LoadError> {
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_ADMIN: u64 = 1 << 21;
    const BPF: u64 = 1 << 39;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or_default();
    if effective & SYS_ADMIN != 0 || effective & (BPF | NET_ADMIN) == BPF | NET_ADMIN {
        return Ok(());
    }
    Err(LoadError::Missing {
        what: "this process may not load packet programs".into(),
        hint: "run it as root, or give it CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
    })
}

/// Where the BPF file system usually is.
const USUAL_BPFFS: &str = "/sys/fs/bpf";

/// Mounts the BPF file system in its usual place if nobody has, and makes sure that `pin_root` is on one.
pub(crate) fn bpffs(pin_root: &Path) -> Result<(), LoadError> {
    if is_bpffs(pin_root) {
        return Ok(());
    }
    if pin_root.starts_with(USUAL_BPFFS)
        && let Err(error) = mount_bpffs()
    {
        tracing::warn!("mounting the BPF file system at {USUAL_BPFFS}: {error}");
    }
    if is_bpffs(pin_root) {
        return Ok(());
    }
    Err(LoadError::Missing {
        what: format!("{} is not on a BPF file system", pin_root.display()),
        hint: "run `mount -t bpf bpf /sys/fs/bpf` and set bpf.pinRoot below it",
    })
}

/// Each mount is a file system of its own: a second one would hide the pins of the first.
fn mount_bpffs() -> io::Result<()> {
    let directory = File::open(USUAL_BPFFS)?;
    // Agents of one machine start at once. The lock goes with the file.
    flock(&directory, FlockOperation::LockExclusive)?;
    if !is_bpffs(Path::new(USUAL_BPFFS)) {
        mount("bpf", USUAL_BPFFS, "bpf", MountFlags::empty(), None)?;
        tracing::info!("mounted the BPF file system at {USUAL_BPFFS}");
    }
    Ok(())
}

/// Whether pins in this directory end with the mount namespace of this process: the file system is mounted there
/// alone, and not where the machine's first process is.
pub(crate) fn ends_with_us(pin_root: &Path) -> bool {
    let there = pin_root.ancestors().find_map(|ancestor| std::fs::metadata(ancestor).ok());
    match (there, std::fs::read_to_string("/proc/1/mountinfo")) {
        (Some(there), Ok(mounts)) => {
            let device = (rustix::fs::major(there.dev()), rustix::fs::minor(there.dev()));
            !is_mounted(&mounts, device)
        }
        // It cannot be told.
        _ => false,
    }
}

/// Whether a file system with this device number is among the mounts.
fn is_mounted(mounts: &str, (major, minor): (u32, u32)) -> bool {
    let device = format!("{major}:{minor}");
    mounts.lines().any(|line| line.split(' ').nth(2) == Some(&device))
}

fn is_bpffs(path: &Path) -> bool {
    const MAGIC: u32 = 0xcafe_4a11;
    // One question for each: a directory may go between two.
    let there = path.ancestors().find_map(|ancestor| statfs(ancestor).ok());
    there.is_some_and(|fs| fs.f_type as u32 == MAGIC)
}

/// Before Linux 5.11 maps count against this limit. Without the privilege it stays as it is, and
/// creating a map says so.
fn lift_memlock() {
    if let Err(error) = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }) {
        tracing::warn!("the limit of locked memory stays as it is: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Helpers by number that every kernel has which loads BTF: maps, the clocks, packets' bytes and checksums.
    const OLD: &[u32] = &[1, 2, 3, 5, 7, 10, 11, 12, 20, 21, 23, 31, 32, 38, 39, 44];

    #[test]
    fn every_helper_that_the_object_calls_is_asked_for() {
        let object = aya_obj::Object::parse(crate::datapath::OBJECT).expect("it parses");
        let asked: BTreeSet<u32> = HELPERS.iter().map(|helper| helper.number as u32).collect();
        let calls = object.functions.values().flat_map(|function| &function.instructions);
        let called: BTreeSet<u32> =
            calls.filter(|it| it.code == 0x85 && it.src_reg() == 0).map(|it| it.imm as u32).collect();
        assert!(called.len() > 10, "{called:?}");
        let unasked: Vec<_> = called.iter().filter(|it| !asked.contains(it) && !OLD.contains(it)).collect();
        assert!(unasked.is_empty(), "not asked for: {unasked:?}");
        let uncalled: Vec<_> = asked.difference(&called).collect();
        assert!(uncalled.is_empty(), "asked for in vain: {uncalled:?}");
    }

    #[test]
    fn what_is_lacking_is_told_in_one_line() {
        let lacks = vec![named("ring buffers", "5.8"), HELPERS.last().map(Helper::named).unwrap_or_default()];
        let error = LoadError::Kernel { release: "5.4.0-1".into(), lacks };
        assert_eq!(
            error.to_string(),
            "Linux 5.4.0-1 lacks ring buffers (Linux 5.8), bpf_set_retval in programs of sockets (Linux 5.18); Cirri \
             needs Linux 6.1 or later"
        );
    }

    #[test]
    fn a_file_system_is_found_among_the_mounts_by_its_number() {
        let mounts = "22 1 0:21 / /sys rw - sysfs sysfs rw\n39 22 0:39 / /sys/fs/bpf rw - bpf bpf rw\n";
        assert!(is_mounted(mounts, (0, 39)));
        assert!(!is_mounted(mounts, (0, 3)) && !is_mounted(mounts, (0, 45)));
    }
}
