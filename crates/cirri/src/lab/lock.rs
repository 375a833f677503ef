//! One command at a time changes a lab.
//!
//! Its lock is a file beside its directory, which is there also while the directory is not. Where no file can be made
//! any more (no inode is free, the file system is read-only) the directory itself is locked: a lab must be taken down
//! there, too. Whoever has the file locks the directory as well, so that both kinds exclude each other.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::state::{LabName, ROOT};

/// A lab's lock. Dropping it releases the lock and removes its file.
#[derive(Debug)]
pub struct Lock {
    /// The file, if one could be made.
    path: Option<PathBuf>,
    _held: Vec<File>,
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
        lock(Path::new(ROOT), self)
    }
}

fn lock(root: &Path, name: &LabName) -> Result<Lock, LockError> {
    let path = root.join(format!("{name}.lock"));
    let file = lock_file(root, &path, name);
    if matches!(file, Err(LockError::Held(_))) {
        return file.map(|file| Lock { path: Some(path), _held: vec![file] });
    }
    let directory = match File::open(root.join(name.to_string())) {
        Ok(directory) => try_lock(&directory, root, name)?.then_some(directory),
        Err(_) => None,
    };
    match (file, directory) {
        (Ok(file), directory) => {
            Ok(Lock { path: Some(path), _held: [Some(file), directory].into_iter().flatten().collect() })
        }
        (Err(LockError::Unmade { .. }), Some(directory)) => Ok(Lock { path: None, _held: vec![directory] }),
        (Err(error), _) => Err(error),
    }
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
fn try_lock(file: &File, path: &Path, name: &LabName) -> Result<bool, LockError> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(LockError::Held(name.clone())),
        Err(error) => Err(LockError::Failed { path: path.to_owned(), source: error.into() }),
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
    fn the_file_and_the_directory_exclude_each_other_and_one_of_them_is_enough() {
        let root = tempfile::tempdir().unwrap();
        let name: LabName = "t".parse().unwrap();
        let held = |outcome: Result<Lock, LockError>| matches!(outcome, Err(LockError::Held(_)));
        fs::create_dir(root.path().join("t")).unwrap();
        let first = lock(root.path(), &name).unwrap();
        assert!(held(lock(root.path(), &name)));
        // As if no file could be made: a directory stands in its place.
        let file = root.path().join("t.lock");
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert!(held(lock(root.path(), &name)), "the first has the directory, too");
        drop(first);
        let second = lock(root.path(), &name).unwrap();
        fs::remove_dir(&file).unwrap();
        assert!(held(lock(root.path(), &name)), "a file can be made again, and the directory is locked");
        drop(second);
        drop(lock(root.path(), &name).unwrap());
        assert!(!file.exists());
        // Nothing to be locked at all: where a directory must be there is a file.
        let error = lock(&root.path().join("t/f"), &name).map(drop);
        assert!(error.is_ok());
        fs::write(root.path().join("f"), "").unwrap();
        let error = lock(&root.path().join("f"), &name).unwrap_err().to_string();
        assert!(error.contains("a file stands where a directory must be"), "{error}");
    }
}
