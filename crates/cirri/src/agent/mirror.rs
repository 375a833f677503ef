//! Manifests of a directory, kept in the embedded store: from there on they go the same way as on
//! a node of a cluster, and the last good content survives a restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cirri_control::resource::Resource;
use cirri_store::{Embedded, PREFIX, Store as _, StoreError, folder};
use futures::StreamExt;
use futures::stream::BoxStream;

use super::Shared;
use super::records::resource_prefix;

/// How long to wait before a write that failed is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// From the folder into the store.
pub struct Mirror {
    /// What the folder hands out.
    pub changes: BoxStream<'static, folder::Change>,
    /// Where it goes.
    pub store: Embedded,
}

/// Copies changes until the agent stops.
pub async fn run(shared: Arc<Shared>, Mirror { mut changes, store }: Mirror) {
    let mut first = true;
    while let Some(change) = changes.next().await {
        let errors: Vec<String> = change.errors.iter().map(|error| error.message.clone()).collect();
        let known = std::mem::replace(&mut shared.core.lock().await.folder_errors, errors.clone());
        for error in errors.iter().filter(|error| !known.contains(error)) {
            tracing::error!("{error}");
        }
        while let Err(error) = copy(&store, &change).await {
            tracing::error!(%error, "manifests are not in force yet; trying again");
            shared.core.lock().await.uncopied = Some(error.to_string());
            tokio::time::sleep(PAUSE).await;
        }
        shared.core.lock().await.uncopied = None;
        if first && let Ok(health) = shared.store.health().await {
            shared.core.lock().await.needed_revision = Some(health.revision);
            first = false;
        }
        shared.mirrored.send_replace(change.caught_up);
        shared.changed().await;
    }
}

/// All of a change at once: nobody sees half of a file, and thousands of removals are one.
async fn copy(store: &Embedded, change: &folder::Change) -> Result<(), StoreError> {
    let written = change.upserted.iter().map(|it| (it.store_key(), Some(it.to_json().into_bytes())));
    let removed = change.removed.iter().map(|key| (key.clone(), None));
    let entries: Vec<_> = written.chain(removed).map(|(key, value)| (format!("{PREFIX}{key}"), value)).collect();
    if !entries.is_empty() {
        store.write_all(&entries).await?;
    }
    Ok(())
}

/// What an earlier run copied, by the key that the folder has for it; `None` for what cannot be read.
pub async fn stored(store: &Embedded) -> Result<BTreeMap<String, Option<Resource>>, StoreError> {
    let (entries, _) = store.list(&resource_prefix()).await?;
    let read = |json: &[u8]| std::str::from_utf8(json).ok().and_then(|json| Resource::from_json(json).ok());
    let known = entries.iter().filter_map(|entry| Some((entry.key.strip_prefix(PREFIX)?, read(&entry.value))));
    Ok(known.map(|(key, resource)| (key.to_owned(), resource)).collect())
}
