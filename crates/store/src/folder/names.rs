//! Which files are manifests, by their names alone, and how they are called.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

/// What a name says of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Manifest,
    /// It would be one if its ending were in small letters.
    Misnamed,
    Other,
}

pub(super) fn kind_of(name: &OsStr) -> Kind {
    let ending = Path::new(name).extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let is_one = |ending: &str| matches!(ending, "yaml" | "yml" | "json");
    match name.as_bytes().starts_with(b".") {
        false if is_one(ending) => Kind::Manifest,
        false if is_one(&ending.to_ascii_lowercase()) => Kind::Misnamed,
        _ => Kind::Other,
    }
}

/// A file's name as text. A byte that is no UTF-8 becomes `/xff`: no name has a slash, so no two files are called alike.
pub(super) fn text_of(name: &OsStr) -> String {
    let mut text = String::new();
    for chunk in name.as_bytes().utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            // A string takes whatever comes.
            let _ = write!(text, "/x{byte:02x}");
        }
    }
    text
}

/// Where the file stands that a folder calls so, also as in [`Change::files`](super::Change::files).
pub fn path_of(dir: &Path, text: &str) -> PathBuf {
    let mut parts = text.split("/x");
    let mut name = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let byte = part.split_at_checked(2).and_then(|(byte, rest)| Some((u8::from_str_radix(byte, 16).ok()?, rest)));
        match byte {
            Some((byte, rest)) => {
                name.push(byte);
                name.extend(rest.bytes());
            }
            None => name.extend(b"/x".iter().copied().chain(part.bytes())),
        }
    }
    dir.join(OsString::from_vec(name))
}

/// The same for people, who can type it.
pub(super) fn shown(dir: &Path, text: &str) -> String {
    dir.join(text.replace("/x", "\\x")).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_text_that_no_other_is() {
        let names: [&[u8]; 7] = [
            b"a.yaml",
            b"a\xff.yaml",
            b"a\\xff.yaml",
            b"a\xfe.yaml",
            b"\xff\xff.yaml",
            b"\xc3.yml",
            "\u{fffd}.yaml".as_bytes(),
        ];
        let texts: std::collections::BTreeSet<String> =
            names.iter().map(|name| text_of(OsStr::from_bytes(name))).collect();
        assert_eq!(texts.len(), names.len(), "{texts:?}");
        for name in names {
            let name = OsStr::from_bytes(name);
            assert_eq!(path_of(Path::new("/d"), &text_of(name)), Path::new("/d").join(name));
            assert_eq!(kind_of(name), Kind::Manifest, "{name:?}");
        }
        assert_eq!(shown(Path::new("/d"), &text_of(OsStr::from_bytes(b"a\xff.yaml"))), "/d/a\\xff.yaml");
    }
}
