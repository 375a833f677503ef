//! One command at a time changes a lab.
//!
//! Its lock is a file beside its directory, which is there also while the directory is not. Where no file can be made
//! any more (no inode is free, the file system is read-only) the directory itself is locked: a lab must be taken down
//! there, too. Whoever has the file locks the directory as well, so that both kinds exclude each other.
//!
//! Control groups and pins are one for all mount namespaces, those files are not. So a lab's group is locked, too: a lab
//! that is being made or removed has no process by which others could see that it is another mount namespace's.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::cgroup;
use super::state::{LabName, ROOT};

/// A lab's lock. Dropping it releases the lock and removes its file.
#[derive(Debug)]
pub struct Lock {
    /// The file, if one could be made.
    path: Option<PathBuf>,
    held: Vec<File>,
}

/// Why a lab cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another command has it.
    #[error("another command is changing the lab \"{0}\": wait for it, or stop it")]
    Held(LabName),
    /// Neither is there a file nor can one be made.
    #[error("cannot make {path}{}", advice(.source))]
    Unmade {
        /// The file, or the directory that it is to be in.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// The file system cannot lock.
    #[error("cannot lock {path}")]
    Failed {
        /// What was to be locked.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
            " (a file stands where a directory must be: move it out of the way)"
        }
        _ => "",
    }
}

impl LabName {
    /// Takes the lab's lock, so that two commands never change it at once. Held until dropped.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn lock(&self) -> Result<Lock, LockError> {
        lock(Path::new(ROOT), cgroup::of_lab(self).ok().as_deref(), self)
    }

    /// Makes the lab's control group, and locks it as [`LabName::lock`] does one that is there.
    ///
    /// # Errors
    /// It cannot be made, or another mount namespace has such a lab.
    pub fn make_group(&self) -> anyhow::Result<File> {
        let path = cgroup::of_lab(self)?;
        cgroup::create(&path)?;
        let group = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        try_lock(&group, &path, self)?;
        Ok(group)
    }

    /// Whether a command is changing the lab.
    pub fn is_locked(&self) -> bool {
        is_locked(Path::new(ROOT), self)
    }
}

fn is_locked(root: &Path, name: &LabName) -> bool {
    [format!("{name}.lock"), name.to_string()].iter().any(|it| is_held(&root.join(it)))
}

/// Whether somebody has locked this.
pub fn is_held(path: &Path) -> bool {
    let shared = |file| rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
    File::open(path).is_ok_and(|file| shared(file) == Err(Errno::WOULDBLOCK))
}

fn lock(root: &Path, group: Option<&Path>, name: &LabName) -> Result<Lock, LockError> {
    let path = root.join(format!("{name}.lock"));
    let mut lock = Lock { path: None, held: Vec::new() };
    let unmade = match lock_file(root, &path, name) {
        Ok(file) => {
            lock.held.push(file);
            lock.path = Some(path);
            None
        }
        Err(error @ LockError::Unmade { .. }) => Some(error),
        Err(error) => return Err(error),
    };
    lock.add(&root.join(name.to_string()), name)?;
    if let Some(error) = unmade.filter(|_| lock.held.is_empty()) {
        return Err(error);
    }
    if let Some(group) = group {
        lock.add(group, name)?;
    }
    Ok(lock)
}

fn lock_file(root: &Path, path: &Path, name: &LabName) -> Result<File, LockError> {
    let unmade = |path: &Path| {
        let path = path.to_owned();
        |source| LockError::Unmade { path, source }
    };
    fs::create_dir_all(root).map_err(unmade(root))?;
    loop {
        let file = File::options().create(true).truncate(false).write(true).open(path).map_err(unmade(path))?;
        try_lock(&file, path, name)?;
        // The previous holder removes the file: a lock on a removed file would exclude nobody.
        if fs::metadata(path).is_ok_and(|now| file.metadata().is_ok_and(|ours| now.ino() == ours.ino())) {
            return Ok(file);
        }
    }
}

/// Locks what is open; an error if somebody else has.
fn try_lock(file: &File, path: &Path, name: &LabName) -> Result<(), LockError> {
    let locked = match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        // Who only looks shares it, for a moment.
        Err(Errno::WOULDBLOCK) if rustix::fs::flock(file, FlockOperation::NonBlockingLockShared).is_ok() => {
            rustix::fs::flock(file, FlockOperation::LockExclusive)
        }
        other => other,
    };
    match locked {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(LockError::Held(name.clone())),
        Err(error) => Err(LockError::Failed { path: path.to_owned(), source: error.into() }),
    }
}

impl Lock {
    /// Locks a directory, too, if it is there: what cannot be opened is not.
    fn add(&mut self, directory: &Path, name: &LabName) -> Result<(), LockError> {
        if let Ok(there) = File::open(directory) {
            try_lock(&there, directory, name)?;
            self.held.push(there);
        }
        Ok(())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_only_looks_whether_a_lab_is_locked_keeps_nobody_from_locking_it() {
        let root = tempfile::tempdir().unwrap();
        let name: LabName = "t".parse().unwrap();
        let path = root.path().join("t.lock");
        fs::write(&path, "").unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    is_locked(root.path(), &name);
                }
            });
            let all = (0..5000).try_for_each(|_| lock(root.path(), None, &name).map(drop));
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            all.unwrap();
        });
    }

    #[test]
    fn a_lab_that_another_mount_namespace_changes_is_locked_by_its_group() {
        let [root, hidden, groups] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let name: LabName = "t".parse().unwrap();
        let group = groups.path().join("t");
        drop(lock(root.path(), Some(&group), &name).unwrap());
        fs::create_dir(&group).unwrap();
        let first = lock(root.path(), Some(&group), &name).unwrap();
        assert!(is_held(&group));
        assert!(matches!(lock(hidden.path(), Some(&group), &name), Err(LockError::Held(_))));
        assert!(!hidden.path().join("t.lock").exists(), "who is refused leaves no file");
        drop(first);
        assert!(!is_held(&group));
        drop(lock(hidden.path(), Some(&group), &name).unwrap());
    }

    #[test]
    fn the_file_and_the_directory_exclude_each_other_and_one_of_them_is_enough() {
        let root = tempfile::tempdir().unwrap();
        let name: LabName = "t".parse().unwrap();
        let held = |outcome: Result<Lock, LockError>| matches!(outcome, Err(LockError::Held(_)));
        fs::create_dir(root.path().join("t")).unwrap();
        assert!(!is_locked(root.path(), &name));
        let first = lock(root.path(), None, &name).unwrap();
        assert!(held(lock(root.path(), None, &name)));
        assert!(is_locked(root.path(), &name));
        // As if no file could be made: a directory stands in its place.
        let file = root.path().join("t.lock");
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert!(held(lock(root.path(), None, &name)), "the first has the directory, too");
        drop(first);
        let second = lock(root.path(), None, &name).unwrap();
        assert!(is_locked(root.path(), &name), "by the directory");
        fs::remove_dir(&file).unwrap();
        assert!(held(lock(root.path(), None, &name)), "a file can be made again, and the directory is locked");
        drop(second);
        drop(lock(root.path(), None, &name).unwrap());
        assert!(!file.exists());
        // Nothing to be locked at all: where a directory must be there is a file.
        let error = lock(&root.path().join("t/f"), None, &name).map(drop);
        assert!(error.is_ok());
        fs::write(root.path().join("f"), "").unwrap();
        let error = lock(&root.path().join("f"), None, &name).unwrap_err().to_string();
        assert!(error.contains("a file stands where a directory must be"), "{error}");
    }
}
