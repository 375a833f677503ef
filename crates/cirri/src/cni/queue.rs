//! Deletions that came while the agent was down.

use std::io;
use std::path::{Path, PathBuf};

use crate::api::Attachment;
use crate::files;
use crate::workload::host_ifname;

/// A deletion that waits for the agent.
#[derive(Clone, Debug)]
pub struct Queued {
    /// What to delete.
    pub attachment: Attachment,
    /// The note; remove it once the deletion is done.
    pub path: PathBuf,
}

/// Takes the device away and notes the deletion for the agent.
///
/// # Errors
/// The note cannot be written. A device that is already gone is no error.
pub fn queue(state_dir: &Path, attachment: &Attachment) -> io::Result<()> {
    let name = host_ifname(attachment);
    let text = serde_json::to_vec(attachment)?;
    files::write_atomic(&directory(state_dir).join(format!("{name}.json")), &text)?;
    // The kernel removes both ends and the programs on them. If it cannot be done now, the agent
    // does it when it reads the note.
    if let Err(error) = delete_device(&name) {
        eprintln!("cirri-cni: {name} stays until the agent is back: {error}");
    }
    Ok(())
}

/// What waits, in no particular order. Notes that cannot be read are passed over.
///
/// # Errors
/// The directory cannot be read, unless it does not exist.
pub fn pending_deletions(state_dir: &Path) -> io::Result<Vec<Queued>> {
    let mut queued = Vec::new();
    for (path, text) in files::read_all(&directory(state_dir))? {
        match serde_json::from_slice(&text) {
            Ok(attachment) => queued.push(Queued { attachment, path }),
            Err(error) => tracing::warn!(path = %path.display(), %error, "a queued deletion cannot be read"),
        }
    }
    Ok(queued)
}

fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("deletions")
}

fn delete_device(name: &str) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let net = cirri_loader::net::Net::here().map_err(io::Error::other)?;
        net.delete_link(name).await.map(drop).map_err(io::Error::other)
    })
}
