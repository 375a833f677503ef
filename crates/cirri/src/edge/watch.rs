//! News of the file: the kernel tells (inotify), and SIGHUP asks for a look.
//!
//! The file is read when its writer closes it or when it is renamed into place, so that half a file is
//! not taken for a whole one; also when the directory it stands in is a link that is swapped, as with a
//! volume of Kubernetes.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use futures::{FutureExt, StreamExt};
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchMask};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Tells when the file is to be read again.
pub struct Watch {
    events: EventStream<Vec<u8>>,
    name: OsString,
    hangup: Signal,
}

impl Watch {
    /// Watches a file, which need not be there. Must be called within a runtime.
    ///
    /// # Errors
    /// Its directory cannot be watched.
    pub fn new(file: &Path) -> io::Result<Watch> {
        let file = std::path::absolute(file)?;
        let directory = file.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let inotify = Inotify::init()?;
        let mask = WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::CREATE;
        inotify.watches().add(directory, mask)?;
        Ok(Watch {
            events: inotify.into_event_stream(vec![0; 4096])?,
            name: file.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned(),
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits until there is a reason to read the file. Cancel-safe.
    pub async fn changed(&mut self) {
        loop {
            tokio::select! {
                event = self.events.next() => {
                    let mut concerned = self.concerns(event);
                    // Everything that has happened by now is one change.
                    while let Some(more) = self.events.next().now_or_never() {
                        concerned |= self.concerns(more);
                    }
                    if concerned {
                        return;
                    }
                }
                _ = self.hangup.recv() => return,
            }
        }
    }

    fn concerns(&self, event: Option<io::Result<EventOwned>>) -> bool {
        // Whatever was lost, a look makes up for it.
        let Some(Ok(event)) = event else { return true };
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            return true;
        }
        let swapped = event.name.as_ref().is_some_and(|name| name.as_encoded_bytes().starts_with(b".."));
        // Created: its writer has yet to close it, unless it is a link to what was there before.
        let whole = !event.mask.contains(EventMask::CREATE);
        swapped || whole && event.name.as_ref() == Some(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_file_that_is_written_or_renamed_into_place_is_news_and_its_neighbours_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lb.yaml");
        let mut watch = Watch::new(&file).unwrap();
        std::fs::write(dir.path().join("other.yaml"), "x").unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(50), watch.changed()).await;
        assert!(quiet.is_err(), "another file is no news");
        std::fs::write(&file, "a").unwrap();
        watch.changed().await;
        std::fs::write(dir.path().join("next"), "b").unwrap();
        std::fs::rename(dir.path().join("next"), &file).unwrap();
        watch.changed().await;
        std::os::unix::fs::symlink(&file, dir.path().join("..data")).unwrap();
        watch.changed().await;
    }
}
