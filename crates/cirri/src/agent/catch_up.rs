//! Waiting until the agent has seen what was in the source when it was asked.
//!
//! The watch tells what happened, and may be behind: a policy that was written before a question
//! must not be missed by its answer.

use cirri_store::StoreError;

use super::{Shared, records};

/// Why nobody knows what the source holds.
#[derive(Debug, thiserror::Error)]
pub enum Unknown {
    /// The store did not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The agent is stopping.
    #[error("the agent is stopping")]
    Stopping,
}

/// Returns when the agent has seen everything that the source held when this was called: all
/// complete files of the folder, or all writes that etcd had acknowledged. Answers the revision.
///
/// Waits as long as that takes: bound it.
///
/// # Errors
/// See [`Unknown`].
pub async fn caught_up(shared: &Shared) -> Result<u64, Unknown> {
    let mut revision = newest(shared).await?;
    if shared.core.lock().await.view.revision < revision && shared.catch_up.is_none() {
        // etcd counts others' writes too, and tells of them only now and then: a write of our own
        // comes with all that was before it.
        let key = records::caught_up_key(&shared.core.lock().await.node.name);
        revision = shared.store.put(&key, b"", true).await?;
    }
    let mut seen = shared.seen.subscribe();
    seen.wait_for(|seen| *seen >= revision).await.map_err(|_| Unknown::Stopping)?;
    Ok(revision)
}

/// The revision that holds everything that was in the source when this was called.
///
/// # Errors
/// See [`Unknown`].
pub async fn newest(shared: &Shared) -> Result<u64, Unknown> {
    if let Some(folder) = &shared.catch_up {
        let question = folder.ask();
        let mut mirrored = shared.mirrored.subscribe();
        mirrored.wait_for(|answered| *answered >= question).await.map_err(|_| Unknown::Stopping)?;
    }
    Ok(shared.store.health().await?.revision)
}
