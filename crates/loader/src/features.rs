//! What the kernel must have, asked before anything is loaded: one clear line each.

use std::{os::unix::fs::MetadataExt as _, path::Path};

use aya::{maps::MapType, util::KernelVersion};
use rustix::{
    fs::statfs,
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, setrlimit},
};

use crate::error::LoadError;

/// How programs are attached to devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hooking {
    /// tcx links (Linux 6.6 and later): replaced atomically, kept by pins.
    Tcx,
    /// A clsact qdisc with one filter a direction: replaced in place, kept by the device.
    Clsact,
}

/// Checks privileges and the kernel, and makes sure that `pin_root` is on a BPF file system.
pub(crate) fn check(pin_root: &Path) -> Result<Hooking, LoadError> {
    privileges()?;
    bpffs(pin_root)?;
    if aya::features().btf().is_none() {
        return Err(LoadError::Missing {
            what: "the kernel does not load BTF".into(),
            hint: "it needs Linux 5.15 or later with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF",
        });
    }
    let kinds = [
        (MapType::LruHash, "LRU hash maps"),
        (MapType::LpmTrie, "longest-prefix maps"),
        (MapType::HashOfMaps, "maps of maps"),
        (MapType::RingBuf, "ring buffers"),
        (MapType::SkStorage, "storage in sockets"),
    ];
    for (kind, name) in kinds {
        if !matches!(aya::sys::is_map_supported(kind), Ok(true)) {
            return Err(LoadError::Missing {
                what: format!("the kernel has no {name}"),
                hint: "it needs Linux 5.15 or later",
            });
        }
    }
    let version = KernelVersion::current().ok();
    if version.is_some_and(|version| version < KernelVersion::new(5, 11, 0)) {
        lift_memlock();
    }
    // tcx came with Linux 6.6 (commit e420bed02507).
    if version.is_some_and(|version| version >= KernelVersion::new(6, 6, 0)) {
        return Ok(Hooking::Tcx);
    }
    tracing::info!("the kernel has no tcx (Linux 6.6); programs are attached with clsact");
    Ok(Hooking::Clsact)
}

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

/// Mounts the BPF file system in its usual place if nobody has.
pub(crate) fn bpffs(pin_root: &Path) -> Result<(), LoadError> {
    const USUAL: &str = "/sys/fs/bpf";
    if is_bpffs(pin_root) {
        return Ok(());
    }
    if pin_root.starts_with(USUAL) {
        match mount("bpf", USUAL, "bpf", MountFlags::empty(), None) {
            Ok(()) => tracing::info!("mounted the BPF file system at {USUAL}"),
            Err(error) => tracing::warn!("mounting the BPF file system at {USUAL}: {error}"),
        }
    }
    if is_bpffs(pin_root) {
        return Ok(());
    }
    Err(LoadError::Missing {
        what: format!("{} is not on a BPF file system", pin_root.display()),
        hint: "run `mount -t bpf bpf /sys/fs/bpf` and set bpf.pinRoot below it",
    })
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
    let there = path.ancestors().find(|ancestor| ancestor.exists());
    there.and_then(|path| statfs(path).ok()).is_some_and(|fs| fs.f_type as u32 == MAGIC)
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
    use super::*;

    #[test]
    fn a_file_system_is_found_among_the_mounts_by_its_number() {
        let mounts = "22 1 0:21 / /sys rw - sysfs sysfs rw\n39 22 0:39 / /sys/fs/bpf rw - bpf bpf rw\n";
        assert!(is_mounted(mounts, (0, 39)));
        assert!(!is_mounted(mounts, (0, 3)) && !is_mounted(mounts, (0, 45)));
    }
}
