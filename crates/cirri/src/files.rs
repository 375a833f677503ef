//! Small files that must be whole or not there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Writes a file so that a reader finds the old text, the new text or nothing, never a part; also
/// after a power failure. Creates its directory. Readable by the owner only.
///
/// # Errors
/// The file system's. Nothing is left behind then.
pub fn write_atomic(path: &Path, text: &[u8]) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(directory)?;
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = directory.join(name);
    let written = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(text).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        // The first error is the one that matters; a leftover is passed over by `read_all`.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    File::open(directory)?.sync_all()
}

/// Every `*.json` of a directory; nothing if there is no such directory.
///
/// # Errors
/// The file system's.
pub fn read_all(directory: &Path) -> io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            files.push((path.clone(), fs::read(&path)?));
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
        other => other,
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
        fs::write(dir.join("b.json.7.tmp"), b"half").unwrap();
        assert_eq!(read_all(&dir).unwrap(), [(dir.join("a.json"), b"2".to_vec())]);
        remove(&dir.join("a.json")).unwrap();
        remove(&dir.join("a.json")).unwrap();
        assert!(read_all(&dir).unwrap().is_empty());
        fs::remove_dir_all(&dir).unwrap();
        assert!(read_all(&dir).unwrap().is_empty());
    }
}
