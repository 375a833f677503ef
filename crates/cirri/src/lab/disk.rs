//! A full disk, named: whoever meets it says something else, or cannot even write down what.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;

use super::interrupt::Interrupted;
use super::lock::LockError;
use super::manifests::Rejected;
use super::state::LabName;

/// With less than this an agent or etcd does not even start.
const LEAST: u64 = 1 << 20;
/// How the C library and Go put it.
const WORDS: [&str; 2] = ["No space left on device", "no space left on device"];

/// The error, with the full or read-only disk named if that is what it comes from.
pub fn explain(lab: &LabName, error: anyhow::Error) -> anyhow::Error {
    blame(lab, error, false)
}

/// The same for a lab that does not come up: what its programs have met stands in their logs, all of them new.
pub fn explain_start(lab: &LabName, error: anyhow::Error) -> anyhow::Error {
    blame(lab, error, true)
}

fn blame(lab: &LabName, error: anyhow::Error, logs_are_new: bool) -> anyhow::Error {
    if error.is::<Rejected>() || error.is::<Interrupted>() || matches!(error.downcast_ref(), Some(LockError::Held(_))) {
        return error;
    }
    let directory = lab.directory();
    // What failed may have been its making; then the disk is that of a directory above.
    let there = directory.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let Ok(disk) = rustix::fs::statvfs(there) else { return error };
    let place = directory.display();
    if disk.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return error.context(format!(
            "the disk that {place} is on is mounted read-only: `mount -o remount,rw` its mount point (`findmnt -T {}` \
             names it), then try again",
            there.display()
        ));
    }
    if disk.f_favail == 0 && disk.f_files > 0 {
        return error.context(format!(
            "no file can be made on the disk that {place} is on, all {} inodes are taken: remove files there, or give it \
             more (`mount -o remount,nr_inodes=…` for a tmpfs), then try again",
            disk.f_files
        ));
    }
    let left = disk.f_bavail.saturating_mul(disk.f_frsize);
    let full = left < LEAST;
    let said = error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::StorageFull)
    });
    // etcd takes 64 MB for its log at once and gives them back when it fails: the disk looks well again.
    let noted = || logs_are_new && logs(there).iter().any(|log| mentions(log));
    if !(full || said || noted()) {
        return error;
    }
    let size = disk.f_blocks.saturating_mul(disk.f_frsize);
    error.context(format!(
        "no room on the disk that {place} is on ({} of {} MB are free now; a lab with etcd takes some 100): make room, then \
         try again",
        left >> 20,
        size >> 20
    ))
}

fn mentions(log: &Path) -> bool {
    fs::read(log).is_ok_and(|bytes| {
        let text = String::from_utf8_lossy(&bytes);
        WORDS.iter().any(|words| text.contains(words))
    })
}

/// The logs of a lab's own programs: its agents, etcd, the host outside.
fn logs(lab: &Path) -> Vec<PathBuf> {
    let nodes = fs::read_dir(lab.join("nodes")).into_iter().flatten().flatten().map(|node| node.path());
    let all = nodes.chain([lab.to_owned()]).flat_map(|directory| {
        fs::read_dir(directory).into_iter().flatten().flatten().map(|file| file.path()).collect::<Vec<_>>()
    });
    all.filter(|path| path.extension().is_some_and(|extension| extension == "log")).collect()
}
