//! Reading one manifest, within bounds.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use cirri_control::resource::MAX_FILE_BYTES;

/// A manifest, or why it cannot be had: missing, no file, past [`MAX_FILE_BYTES`].
///
/// # Errors
/// The system's, or `FileTooLarge`.
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    // A pipe would never end, and to open it would wait for a writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    read_bounded(File::open(path)?)
}

/// All that comes, up to [`MAX_FILE_BYTES`].
///
/// # Errors
/// The reader's, or `FileTooLarge`.
pub fn read_bounded(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let limit = MAX_FILE_BYTES >> 20;
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {limit} MiB: split it")));
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
        assert!(read_file(Path::new("/dev/zero")).is_err());
    }
}
