//! Files that the agent keeps open: what it writes into one that somebody removed is lost with its end.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Instant;

use super::Findings;
use crate::agent::core::Core;
use crate::agent::problems::Finding;
use crate::api::ProblemKind;

/// A file that was opened, and the inode that it had.
#[derive(Debug)]
pub struct OpenFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl OpenFile {
    /// That at a path, as it is now.
    ///
    /// # Errors
    /// It is not there.
    pub fn at(path: PathBuf) -> io::Result<OpenFile> {
        Ok(OpenFile { inode: inode(&path)?, path })
    }

    /// What is at its path instead; nothing if that is the file.
    pub fn replaced(&self) -> Option<&'static str> {
        match inode(&self.path) {
            Ok(inode) if inode == self.inode => None,
            Ok(_) => Some("another file stands in its place"),
            Err(_) => Some("it was removed"),
        }
    }
}

fn inode(path: &PathBuf) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Core {
    /// Files that are not at their places any more are named: nobody but the next start could open them again. The
    /// socket is made again.
    pub(super) fn compare_files(&mut self, now: Instant, findings: &mut Findings) {
        if let Some(door) = self.drift.door.clone() {
            door.look(
                |object, [found, wanted]| self.drift.repair(ProblemKind::File, object, found, wanted, now),
                findings,
            );
        }
        for file in &self.drift.files {
            if let Some(found) = file.replaced() {
                let remedy = "restart the agent while manifests and store are right: until then all goes on, but what the \
                              agent remembers of objects that are refused now is lost at its next start";
                let finding = Finding::new(found, remedy).wanted("the file that the agent writes");
                findings.push((ProblemKind::File, file.path.display().to_string(), finding));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_gone_or_replaced_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("seen.redb");
        fs::write(&path, "a").unwrap();
        let file = OpenFile::at(path.clone()).unwrap();
        fs::write(&path, "b").unwrap();
        assert_eq!(file.replaced(), None);
        fs::rename(&path, directory.path().join("aside")).unwrap();
        assert_eq!(file.replaced(), Some("it was removed"));
        fs::write(&path, "b").unwrap();
        assert_eq!(file.replaced(), Some("another file stands in its place"));
    }
}
