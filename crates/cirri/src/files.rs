//! Small files that must be whole or not there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::fs::{Access, FlockOperation, access, flock, statvfs};

/// How often it is tried to use a directory that somebody removes meanwhile.
const TRIES: usize = 100;

/// Writes a file so that a reader finds the old text, the new text or nothing, never a part; also
/// after a power failure. Creates its directory. Readable by the owner only. A directory of that name
/// is set aside.
///
/// # Errors
/// The file system's. Nothing is left behind then. What a process leaves that is killed in the middle, [`sweep`] finds.
pub fn write_atomic(path: &Path, text: &[u8]) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(directory)?;
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = directory.join(name);
    if path.is_dir() {
        // Not ours: a file does not take its place, nor is it emptied.
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".{}.aside", std::process::id()));
        fs::rename(path, aside)?;
    }
    // As long as it is locked somebody writes it.
    let written = locked(&temporary, FlockOperation::LockExclusive).and_then(|mut file| {
        file.set_len(0)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    if let Err(error) = written {
        // The first error is the one that matters; a leftover is swept.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    File::open(directory)?.sync_all()
}

/// Removes what [`write_atomic`] left in a directory whose process was killed in the middle, of files of these names: a
/// directory may be others' too. A file that somebody still writes is locked; numbers of processes say less: they are
/// given again, and another container's are not seen.
pub fn sweep(directory: &Path, is_ours: impl Fn(&str) -> bool) {
    let is_temporary = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".tmp"));
        let parts = name.and_then(|name| name.rsplit_once('.'));
        parts.is_some_and(|(name, number)| number.parse::<u32>().is_ok() && is_ours(name))
    };
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()).filter(|path| is_temporary(path)) {
        // What cannot be removed disturbs nobody.
        if let Ok(Some(_nobodys)) = lock(&path) {
            let _ = fs::remove_file(&path);
        }
    }
}

/// Makes sure that a file could be made in a directory, which need not be there yet. It writes nothing, so that it can be
/// asked often.
///
/// # Errors
/// The file system's, or that nothing is free on it.
pub fn is_writable(directory: &Path) -> io::Result<()> {
    let directory = directory.ancestors().find(|directory| directory.exists()).unwrap_or(Path::new("/"));
    let wrong = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", directory.display()));
    access(directory, Access::WRITE_OK | Access::EXEC_OK).map_err(|error| wrong(error.into()))?;
    let system = statvfs(directory).map_err(|error| wrong(error.into()))?;
    // A file system without a table of inodes counts none.
    if system.f_bfree == 0 || (system.f_files > 0 && system.f_ffree == 0) {
        return Err(wrong(io::ErrorKind::StorageFull.into()));
    }
    Ok(())
}

/// Every `*.json` of a directory; nothing if there is no such directory. What others remove meanwhile, the directory too, is
/// not there.
///
/// # Errors
/// The file system's.
pub fn read_all(directory: &Path) -> io::Result<Vec<(PathBuf, Vec<u8>)>> {
    read_each(directory)?.into_iter().map(|(path, text)| Ok((path, text?))).collect()
}

/// The same; a file that cannot be read stands for itself.
///
/// # Errors
/// The directory cannot be read.
pub fn read_each(directory: &Path) -> io::Result<Vec<(PathBuf, io::Result<Vec<u8>>)>> {
    sweep(directory, |name| name.ends_with(".json"));
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = match entry {
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            other => other?.path(),
        };
        if path.extension().is_some_and(|extension| extension == "json") {
            match fs::read(&path) {
                Err(_) if is_gone(&path) => {}
                text => files.push((path, text)),
            }
        }
    }
    Ok(files)
}

/// Removes a file that may be gone already.
///
/// # Errors
/// The file system's.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A file system that is read-only says so before it looks for the file.
        Err(_) if is_gone(path) => Ok(()),
        other => other,
    }
}

/// Whether nothing is there, not even a link that leads nowhere.
fn is_gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Locks a file, which is made if it is not there, as long as the answer is kept; `None`: somebody else has it.
///
/// # Errors
/// The file system's.
pub fn lock(path: &Path) -> io::Result<Option<File>> {
    match locked(path, FlockOperation::NonBlockingLockExclusive) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        other => other.map(Some),
    }
}

/// The same in a directory that is made if it is not there. Who leaves removes the file, and then the directory.
///
/// # Errors
/// As for [`lock`].
pub fn lock_in(directory: &Path, name: &str) -> io::Result<Option<File>> {
    in_made(directory, || lock(&directory.join(name)))
}

/// Makes a directory and opens something in it, or itself; again if its last owner removed it in between.
///
/// # Errors
/// It cannot be made, or what `open` says.
pub fn in_made<T>(directory: &Path, open: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let mut tries = 0;
    loop {
        match fs::create_dir_all(directory).and_then(|()| open()) {
            // What cannot be made at all says the same, but every time.
            Err(error) if went_meanwhile(directory, &error) && tries < TRIES => tries += 1,
            opened => return opened,
        }
    }
}

/// Whether making or opening a directory failed because somebody removed it at that moment.
fn went_meanwhile(directory: &Path, error: &io::Error) -> bool {
    match error.kind() {
        io::ErrorKind::NotFound => true,
        // It was there, and gone when it was looked at, unless something else stands there.
        io::ErrorKind::AlreadyExists => !fs::symlink_metadata(directory).is_ok_and(|it| !it.is_dir()),
        _ => false,
    }
}

fn locked(path: &Path, how: FlockOperation) -> io::Result<File> {
    loop {
        let file = File::options().create(true).write(true).truncate(false).mode(0o600).open(path)?;
        flock(&file, how)?;
        // Whoever had it may have removed it meanwhile.
        let ours = file.metadata()?.ino();
        if fs::metadata(path).is_ok_and(|now| now.ino() == ours) {
            return Ok(file);
        }
    }
}

/// Removes a directory if it is there and empty.
///
/// # Errors
/// The file system's, but not that it is gone or has something in it.
pub fn remove_empty(directory: &Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        other => other,
    }
}

/// Removes a directory, with all in it, that may be gone already.
///
/// # Errors
/// Names the directory.
pub fn remove_tree(path: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_temporary_files_are_not() {
        let dir = std::env::temp_dir().join(format!("cirri-files-{}", std::process::id()));
        write_atomic(&dir.join("a.json"), b"1").unwrap();
        write_atomic(&dir.join("a.json"), b"2").unwrap();
        fs::write(dir.join("b.json.tmp"), b"somebody's").unwrap();
        assert_eq!(read_all(&dir).unwrap(), [(dir.join("a.json"), b"2".to_vec())]);
        remove(&dir.join("a.json")).unwrap();
        remove(&dir.join("a.json")).unwrap();
        assert!(read_all(&dir).unwrap().is_empty());
        remove_empty(&dir).unwrap();
        assert!(dir.exists(), "b is still in it");
        fs::remove_dir_all(&dir).unwrap();
        assert!(read_all(&dir).unwrap().is_empty());
        remove_empty(&dir).unwrap();
    }

    #[test]
    fn what_a_writer_left_that_was_killed_is_removed_and_what_somebody_writes_is_not() {
        let dir = std::env::temp_dir().join(format!("cirri-sweep-{}", std::process::id()));
        write_atomic(&dir.join("a.json"), b"1").unwrap();
        let left = ["a.json.7.tmp".to_owned(), format!("b.json.{}.tmp", std::process::id())].map(|name| dir.join(name));
        left.iter().for_each(|path| fs::write(path, b"half").unwrap());
        let others = dir.join("x.9.tmp");
        fs::write(&others, b"somebody's").unwrap();
        let busy = dir.join("c.json.8.tmp");
        let writer = lock(&busy).unwrap().expect("nobody has it");
        let there = |()| left.iter().map(|path| path.exists()).chain([busy.exists()]).collect::<Vec<_>>();
        assert_eq!(read_all(&dir).unwrap().len(), 1);
        assert_eq!(there(()), [false, false, true]);
        remove(&dir.join("a.json")).unwrap();
        sweep(&dir, |name| name == "c.json");
        assert!(busy.exists(), "somebody writes it");
        drop(writer);
        sweep(&dir, |name| name != "c.json" && name != "x");
        assert!(busy.exists(), "it is not ours");
        sweep(&dir, |name| name == "c.json");
        assert!(!busy.exists() && others.exists());
        remove(&others).unwrap();
        remove_empty(&dir).unwrap();
        assert!(!dir.exists());
    }

    #[test]
    fn what_others_remove_while_a_directory_is_read_is_not_there() {
        let dir = std::env::temp_dir().join(format!("cirri-moving-{}", std::process::id()));
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let files = ["a.json", "b.json", "c.json"].map(|name| dir.join(name));
                    fs::create_dir(&dir).unwrap();
                    files.iter().for_each(|file| fs::write(file, b"1").unwrap());
                    files.iter().for_each(|file| fs::remove_file(file).unwrap());
                    fs::remove_dir(&dir).unwrap();
                }
            });
            let read = (0..5000).try_for_each(|_| read_all(&dir).map(drop));
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            read.unwrap();
        });
        let nowhere = dir.join("nowhere.json");
        fs::create_dir_all(&dir).unwrap();
        std::os::unix::fs::symlink(dir.join("gone"), &nowhere).unwrap();
        assert_eq!(read_all(&dir).unwrap_err().kind(), io::ErrorKind::NotFound, "a link that leads nowhere is there");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_directory_that_its_last_owner_leaves_keeps_nobody_from_locking_in_it() {
        let above = std::env::temp_dir().join(format!("cirri-lock-in-{}", std::process::id()));
        let (directory, held) = (above.join("state"), std::sync::atomic::AtomicBool::new(false));
        let order = std::sync::atomic::Ordering::SeqCst;
        let comes_and_goes = || {
            let mut had = 0;
            while had < 1000 {
                let Some(lock) = lock_in(&directory, "own.lock").unwrap() else { continue };
                assert!(!held.swap(true, order), "two have it");
                held.store(false, order);
                remove(&directory.join("own.lock")).unwrap();
                remove_empty(&directory).unwrap();
                remove_empty(&above).unwrap();
                drop(lock);
                had += 1;
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(comes_and_goes);
            }
        });
        assert!(!above.exists());
    }

    #[test]
    fn a_lock_is_one_owners_also_when_its_file_was_removed_under_him() {
        let path = std::env::temp_dir().join(format!("cirri-lock-{}", std::process::id()));
        let first = lock(&path).unwrap().expect("nobody has it");
        assert!(lock(&path).unwrap().is_none());
        remove(&path).unwrap();
        let second = lock(&path).unwrap().expect("another file now");
        drop(first);
        assert!(lock(&path).unwrap().is_none(), "the second one has it");
        drop(second);
        remove(&path).unwrap();
    }
}
