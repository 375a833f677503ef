//! Deletions that the agent did not carry out when it was asked.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::api::{Attachment, EndpointDelete};
use crate::{files, workload};

/// A deletion that waits for the agent.
#[derive(Clone, Debug)]
pub struct Queued {
    /// What to delete.
    pub deletion: EndpointDelete,
    /// The note; remove it once the deletion is done.
    pub path: PathBuf,
}

/// Takes the device away and notes the deletion for the agent.
///
/// # Errors
/// The note cannot be written. A device that is already gone is no error.
pub fn queue(state_dir: &Path, deletion: &EndpointDelete) -> io::Result<()> {
    let text = serde_json::to_vec(deletion)?;
    files::write_atomic(&note_of(state_dir, &deletion.attachment), &text)?;
    // The kernel removes both ends and the programs on them. If it cannot be done now, or the device is one
    // that says nothing of its owner, the agent does it when it reads the note.
    if let Err(error) = delete_devices(&deletion.attachment) {
        let _ = writeln!(io::stderr(), "cirri-cni: the device stays until the agent is back: {error}");
    }
    Ok(())
}

/// What waits, in no particular order. Notes that cannot be read are passed over.
///
/// # Errors
/// The directory cannot be read, unless it does not exist.
pub fn pending_deletions(state_dir: &Path) -> io::Result<Vec<Queued>> {
    let mut queued = Vec::new();
    for (path, text) in files::read_all(&deletions_directory(state_dir))? {
        match serde_json::from_slice(&text) {
            Ok(deletion) => queued.push(Queued { deletion, path }),
            Err(error) => tracing::warn!(path = %path.display(), %error, "a queued deletion cannot be read"),
        }
    }
    Ok(queued)
}

/// Where the notes are.
pub fn deletions_directory(state_dir: &Path) -> PathBuf {
    state_dir.join("deletions")
}

/// The note of an attachment, if its deletion waits.
pub fn note_of(state_dir: &Path, attachment: &Attachment) -> PathBuf {
    deletions_directory(state_dir).join(format!("{:016x}.json", workload::digest_of(attachment)))
}

fn delete_devices(attachment: &Attachment) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let net = cirri_loader::net::Net::here().map_err(io::Error::other)?;
        workload::delete_devices(&net, attachment).await.map_err(io::Error::other)
    })
}
