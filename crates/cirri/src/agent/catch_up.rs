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
    let then = Seen::now(shared).await;
    let Newest { mut revision, id } = newest(shared).await?;
    // Another store than the one that was seen so far, or the same with older data: its numbers say nothing about that.
    let is_another = revision < then.revision || id != then.id;
    if shared.core.lock().await.view.revision < revision && shared.catch_up.is_none() {
        // etcd counts others' writes too, and tells of them only now and then: a write of our own
        // comes with all that was before it.
        let key = records::caught_up_key(&shared.core.lock().await.node.name);
        revision = shared.store.put(&key, b"", true).await?;
    }
    let mut seen = shared.seen.subscribe();
    loop {
        let reached = *seen.borrow_and_update() >= revision;
        if reached && !(is_another && Seen::now(shared).await.is_of_same_store(&then)) {
            return Ok(revision);
        }
        seen.changed().await.map_err(|_| Unknown::Stopping)?;
    }
}

/// What the agent has seen.
struct Seen {
    revision: u64,
    id: Option<Vec<u8>>,
    snapshots: u64,
}

impl Seen {
    async fn now(shared: &Shared) -> Seen {
        let view = &shared.core.lock().await.view;
        let (id, snapshots) = view.store();
        Seen { revision: view.revision, id: id.map(<[u8]>::to_vec), snapshots }
    }

    fn is_of_same_store(&self, then: &Seen) -> bool {
        self.snapshots == then.snapshots && self.id == then.id
    }
}

/// What the source said last of itself.
pub struct Newest {
    /// The revision that holds everything that was in the source when it was asked.
    pub revision: u64,
    /// Which store said so.
    pub id: Option<Vec<u8>>,
}

/// Asks the source.
///
/// # Errors
/// See [`Unknown`].
pub async fn newest(shared: &Shared) -> Result<Newest, Unknown> {
    if let Some(folder) = &shared.catch_up {
        let question = folder.ask();
        let mut mirrored = shared.mirrored.subscribe();
        mirrored.wait_for(|answered| *answered >= question).await.map_err(|_| Unknown::Stopping)?;
    }
    let health = shared.store.health().await?;
    Ok(Newest { revision: health.revision, id: health.id })
}
