//! Reading one manifest, within bounds, and whole.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use cirri_control::resource::MAX_FILE_BYTES;

/// Says whether a file is being written; `None` if that cannot be known.
pub type Writers = fn(&File) -> Option<bool>;

/// How a file looks without being read: device, inode, size, and when it was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp([i128; 5]);

impl Stamp {
    pub(super) fn of(file: &Metadata) -> Stamp {
        let nanoseconds = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        Stamp([
            file.dev().into(),
            file.ino().into(),
            file.size().into(),
            nanoseconds(file.mtime(), file.mtime_nsec()),
            nanoseconds(file.ctime(), file.ctime_nsec()),
        ])
    }
}

/// What stands at a path.
pub(super) enum Found {
    Content(Vec<u8>, Stamp),
    Nothing,
    BeingWritten,
    Unreadable(String),
}

pub(super) fn fetch(path: &Path, writers: Writers) -> Found {
    match read_whole(path, writers) {
        Ok(Some((bytes, stamp))) => Found::Content(bytes, stamp),
        Ok(None) => Found::BeingWritten,
        Err(_) if path.is_dir() => Found::Unreadable("it is a directory".to_owned()),
        Err(error) => match path.symlink_metadata() {
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => Found::Nothing,
            // A link is there, and says that there is something: what, it will say when its target is back.
            Ok(_) if error.kind() == io::ErrorKind::NotFound => Found::Unreadable("it is a link to nothing".to_owned()),
            _ => Found::Unreadable(error.to_string()),
        },
    }
}

/// The content, unless somebody wrote it before or meanwhile and may not be done.
fn read_whole(path: &Path, writers: Writers) -> io::Result<Option<(Vec<u8>, Stamp)>> {
    let file = open(path)?;
    let before = Stamp::of(&file.metadata()?);
    if writers(&file) == Some(true) {
        return Ok(None);
    }
    let bytes = read_bounded(&file)?;
    let same = Stamp::of(&file.metadata()?) == before && writers(&file) != Some(true);
    Ok(same.then_some((bytes, before)))
}

/// A file's content, if nobody is writing it; `None`: somebody is.
///
/// # Errors
/// As for [`read_bounded`], and if it is no regular file.
pub fn read_file(path: &Path, writers: Writers) -> io::Result<Option<Vec<u8>>> {
    Ok(read_whole(path, writers)?.map(|(bytes, _)| bytes))
}

fn open(path: &Path) -> io::Result<File> {
    let metadata = fs::metadata(path)?;
    // A pipe would never end, and to open it would wait for a writer.
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(too_large());
    }
    File::open(path)
}

fn too_large() -> io::Error {
    let limit = MAX_FILE_BYTES >> 20;
    io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {limit} MiB: split it"))
}

/// All that comes, up to [`MAX_FILE_BYTES`].
///
/// # Errors
/// The reader's, or `FileTooLarge`.
pub fn read_bounded(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(too_large());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_ends_is_refused_when_it_is_too_much() {
        let error = read_bounded(io::repeat(b'-')).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert!(error.to_string().contains("64 MiB"), "{error}");
        assert!(read_file(Path::new("/dev/zero"), |_| None).is_err());
    }
}
