//! What a directory holds, without reading it.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::names::{Kind, kind_of, text_of};
use super::read::Stamp;

/// A directory. A volume that is mounted again, or a directory that is made anew, may have the device and the inode of
/// the one before it, but ends the watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Without links.
    pub(super) path: PathBuf,
    device: u64,
    inode: u64,
    /// The number of the watch on it.
    pub(super) watch: Option<i32>,
}

/// What the directory holds.
pub(super) struct Survey {
    pub(super) identity: Identity,
    /// What keeps it from being watched.
    pub(super) unwatched: Option<io::Error>,
    /// Manifests by name, with how they look now; `None`: it cannot be told.
    pub(super) files: BTreeMap<String, Option<Stamp>>,
    /// Those that are links.
    pub(super) links: Vec<PathBuf>,
    /// Names of what is not read, and seems to be meant to be.
    pub(super) misnamed: Vec<String>,
}

pub(super) fn survey(dir: &Path) -> io::Result<Survey> {
    let metadata = std::fs::metadata(dir)?;
    let path = std::fs::canonicalize(dir)?;
    let identity = Identity { path, device: metadata.dev(), inode: metadata.ino(), watch: None };
    let (files, links, misnamed) = (BTreeMap::new(), Vec::new(), Vec::new());
    let mut survey = Survey { identity, unwatched: None, files, links, misnamed };
    for item in std::fs::read_dir(dir)? {
        let item = item?;
        let name = item.file_name();
        match kind_of(&name) {
            Kind::Manifest => {}
            Kind::Misnamed => {
                survey.misnamed.push(text_of(&name));
                continue;
            }
            Kind::Other => continue,
        }
        // Below the path that was configured, wherever that leads now.
        let path = item.path();
        if item.file_type().is_ok_and(|kind| kind.is_symlink()) {
            survey.links.push(path.clone());
        }
        let stamp = std::fs::metadata(&path).ok().as_ref().map(Stamp::of);
        survey.files.insert(text_of(&name), stamp);
    }
    survey.misnamed.sort();
    Ok(survey)
}
