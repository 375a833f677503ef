//! Files that the agent keeps open: what it writes into one that somebody removed is lost with its end.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Instant;

use cirri_store::Embedded;

use super::Findings;
use crate::agent::Shared;
use crate::agent::core::Core;
use crate::agent::problems::Finding;
use crate::api::ProblemKind;

/// A file that was opened, and the inode that it had.
#[derive(Debug)]
pub struct OpenFile {
    path: PathBuf,
    /// `None`: it was removed, and what is there by now is half of it at the most.
    inode: Option<(u64, u64)>,
}

/// What is at the path of a file instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instead {
    /// Nothing is.
    Nothing,
    /// Another file is.
    Another,
}

impl Instead {
    /// What is said of it.
    pub fn words(self) -> &'static str {
        match self {
            Instead::Nothing => "it was removed",
            Instead::Another => "another file stands in its place",
        }
    }
}

impl OpenFile {
    /// That at a path, as it is now.
    ///
    /// # Errors
    /// It is not there.
    pub fn at(path: PathBuf) -> io::Result<OpenFile> {
        Ok(OpenFile { inode: Some(inode(&path)?), path })
    }

    /// What is at its path instead; nothing if that is the file.
    pub fn replaced(&self) -> Option<Instead> {
        match (inode(&self.path), self.inode) {
            (Ok(now), Some(then)) if now == then => None,
            (Ok(_), Some(_)) => Some(Instead::Another),
            _ => Some(Instead::Nothing),
        }
    }
}

fn inode(path: &PathBuf) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Core {
    /// Files that are not at their places any more. The socket is made again, and one that was removed is to be written
    /// anew; another that stands in its place is somebody's, and named.
    pub(super) fn compare_files(&mut self, now: Instant, findings: &mut Findings) {
        if let Some(server_socket) = self.drift.server_socket.clone() {
            server_socket.look(
                |object, [found, wanted]| self.drift.repair(ProblemKind::File, object, found, wanted, now),
                findings,
            );
        }
        for file in &self.drift.files {
            let Some(instead) = file.replaced() else { continue };
            let path = file.path.display().to_string();
            let wanted = "the file that the agent writes";
            if instead == Instead::Nothing {
                if self.drift.repairs.ask(ProblemKind::File, &path, [instead.words(), wanted], "", now) {
                    self.drift.removed.push(file.path.clone());
                }
                continue;
            }
            let remedy = "remove it, and the agent writes its own anew; else the next start begins with this one, and what \
                          the agent remembers of objects that are refused now is lost";
            let finding = Finding::new(instead.words(), remedy).wanted(wanted);
            findings.push((ProblemKind::File, path, finding));
        }
    }
}

impl Shared {
    /// Writes anew what was found removed. What is not done is found again.
    pub(super) async fn write_removed(&self) {
        let removed = std::mem::take(&mut self.core.lock().await.drift.removed);
        for path in removed {
            let Some(file) = self.files().find(|file| file.path() == path) else { continue };
            let written = file.write_anew().await;
            let mut core = self.core.lock().await;
            let Some(known) = core.drift.files.iter_mut().find(|known| known.path == path) else { continue };
            if let Err(error) = &written {
                tracing::error!(file = %path.display(), %error, "not written anew; it is tried again");
            }
            known.inode = written.ok().and_then(|()| inode(&path).ok());
        }
    }

    /// The stores of this agent that are files.
    fn files(&self) -> impl Iterator<Item = &Embedded> {
        [Some(&self.saved), self.mirror.as_ref()].into_iter().flatten()
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
        assert_eq!(file.replaced(), Some(Instead::Nothing));
        fs::write(&path, "b").unwrap();
        assert_eq!(file.replaced(), Some(Instead::Another));
        let half = OpenFile { inode: None, ..file };
        assert_eq!(half.replaced(), Some(Instead::Nothing), "what a failed write left is no other's");
    }
}
