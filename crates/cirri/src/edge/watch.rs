//! News of the file: the kernel tells (inotify), and SIGHUP asks for a look.
//!
//! The file is followed wherever its path leads: through links that are swapped, as with a volume of Kubernetes or
//! git-sync, and directories that go away and come back.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cirri_store::Paths;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How often what could not be watched is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// Tells when the file is to be read again.
pub struct Watch {
    paths: Paths,
    file: PathBuf,
    hangup: Signal,
    /// Not everything on the way could be watched.
    failed: bool,
}

impl Watch {
    /// Watches a file, which need not be there. Must be called within a runtime.
    ///
    /// # Errors
    /// Its directory cannot be watched.
    pub fn new(file: &Path) -> io::Result<Watch> {
        let file = std::path::absolute(file)?;
        let hangup = signal(SignalKind::hangup())?;
        let mut watch = Watch { paths: Paths::new(), file, hangup, failed: false };
        watch.follow()?;
        Ok(watch)
    }

    /// Waits until there is a reason to read the file. Cancel-safe.
    pub async fn changed(&mut self) {
        tokio::select! {
            _ = self.paths.next() => {}
            _ = self.hangup.recv() => {}
            () = tokio::time::sleep(AGAIN), if self.failed => {}
        }
        // Before the file is read: what changes from now on is news again.
        self.failed = self.follow().is_err();
    }

    fn follow(&mut self) -> io::Result<()> {
        self.paths.follow(None, std::slice::from_ref(&self.file)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[tokio::test]
    async fn a_file_that_is_written_or_renamed_into_place_is_news_and_its_neighbours_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lb.yaml");
        let mut watch = Watch::new(&file).unwrap();
        fs::write(dir.path().join("other.yaml"), "x").unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(50), watch.changed()).await;
        assert!(quiet.is_err(), "another file is no news");
        fs::write(&file, "a").unwrap();
        watch.changed().await;
        fs::write(dir.path().join("next"), "b").unwrap();
        fs::rename(dir.path().join("next"), &file).unwrap();
        watch.changed().await;
    }

    #[tokio::test]
    async fn a_file_behind_links_is_followed_when_they_are_swapped() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for version in ["..v1", "..v2"] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("lb.yaml"), version).unwrap();
        }
        symlink("..v1", at("..data")).unwrap();
        symlink("..data/lb.yaml", at("lb.yaml")).unwrap();
        symlink(dir.path(), at("here")).unwrap();
        let file = at("here").join("lb.yaml");
        let mut watch = Watch::new(&file).unwrap();
        symlink("..v2", at("..tmp")).unwrap();
        fs::rename(at("..tmp"), at("..data")).unwrap();
        watch.changed().await;
        // Where it leads now is watched.
        fs::write(at("..v2/lb.yaml"), "written").unwrap();
        watch.changed().await;
        fs::remove_dir_all(at("..v2")).unwrap();
        watch.changed().await;
        fs::create_dir(at("..v2")).unwrap();
        fs::write(at("..v2/lb.yaml"), "back").unwrap();
        while fs::read_to_string(&file).ok().as_deref() != Some("back") {
            watch.changed().await;
        }
    }
}
