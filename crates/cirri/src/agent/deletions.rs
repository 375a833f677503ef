//! Deletions that the plugin noted because the agent did not answer: carried out at the start, and whenever
//! a note appears.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use inotify::{EventStream, Inotify, WatchMask};

use super::core::Core;
use super::{Shared, attach};
use crate::api::{ApiError, Attachment, EndpointDelete};
use crate::{cni, files};

/// How long to wait before a deletion that failed is tried again; also how often to look where the kernel
/// does not tell of new notes.
const PAUSE: Duration = Duration::from_secs(5);

/// Carries out what is noted now. Whether nothing is left.
pub async fn carry_out(shared: &Arc<Shared>) -> bool {
    let state_dir = shared.core.lock().await.config.state_dir.0.clone();
    let queued = match cni::pending_deletions(&state_dir) {
        Ok(queued) => queued,
        Err(error) => {
            tracing::error!(%error, "queued deletions cannot be read");
            return false;
        }
    };
    let mut done = true;
    for deletion in queued {
        let mut core = shared.core.lock().await;
        // Another ADD of the same attachment may have carried it out: what there is now is not meant.
        if !deletion.path.exists() {
            continue;
        }
        let EndpointDelete { attachment, netns } = &deletion.deletion;
        if let Err(error) = delete(&mut core, attachment, netns.as_deref(), &deletion.path).await {
            tracing::error!(container = attachment.container_id, %error, "deletion stays queued");
            done = false;
        }
    }
    shared.publish.notify_one();
    done
}

/// Carries out every note to come, until the agent stops.
pub async fn follow(shared: Arc<Shared>) {
    let directory = cni::deletions_directory(&shared.core.lock().await.config.state_dir.0);
    let mut news = watch(&directory)
        .inspect_err(|error| tracing::warn!(%error, "new notes of deletions are looked for at intervals"))
        .ok();
    loop {
        // After the watch was there, so that no note is missed.
        let done = carry_out(&shared).await;
        match &mut news {
            Some(news) if done => drop(news.next().await),
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Carries out the deletion that is noted for an attachment, if there is one: what is attached now is not
/// what was deleted. `netns` is what ADD says of the container.
///
/// # Errors
/// As for [`attach::delete`].
pub async fn before_add(core: &mut Core, attachment: &Attachment, netns: &str) -> Result<(), ApiError> {
    let note = cni::note_of(&core.config.state_dir.0, attachment);
    if note.exists() { delete(core, attachment, Some(netns), &note).await } else { Ok(()) }
}

async fn delete(core: &mut Core, attachment: &Attachment, netns: Option<&str>, note: &Path) -> Result<(), ApiError> {
    attach::remove(core, attachment, netns).await?;
    files::remove(note).map_err(|error| ApiError::new("internal", format!("cannot remove {}: {error}", note.display())))
}

fn watch(directory: &Path) -> std::io::Result<EventStream<Vec<u8>>> {
    std::fs::create_dir_all(directory)?;
    let inotify = Inotify::init()?;
    // Notes are written beside and renamed into place.
    inotify.watches().add(directory, WatchMask::MOVED_TO)?;
    inotify.into_event_stream(vec![0; 4096])
}
