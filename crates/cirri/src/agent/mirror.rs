//! Manifests of a directory, kept in the embedded store: from there on they go the same way as on
//! a node of a cluster, and the last good content survives a restart.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use cirri_control::resource::{Resource, STAND_IN};
use cirri_store::{PREFIX, StoreError, folder};
use futures::StreamExt;

use super::Shared;
use super::records::resource_prefix;

/// How long to wait before a write that failed is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// Copies changes until the agent stops.
pub async fn run(shared: Arc<Shared>, mut changes: futures::stream::BoxStream<'static, folder::Change>) {
    let mut first = true;
    // All that the files ask for, by key; and whether the store was held against it.
    let (mut wanted, mut compared) = (BTreeSet::new(), false);
    while let Some(change) = changes.next().await {
        let errors: Vec<String> = change.errors.iter().map(|error| error.message.clone()).collect();
        let known = std::mem::replace(&mut shared.core.lock().await.folder_errors, errors.clone());
        for error in errors.iter().filter(|error| !known.contains(error)) {
            tracing::error!("{error}");
        }
        wanted.extend(change.upserted.iter().map(|resource| format!("{PREFIX}{}", resource.store_key())));
        wanted.extend(change.unreadable.iter().map(|key| format!("{PREFIX}{key}")));
        for key in &change.removed {
            wanted.remove(&format!("{PREFIX}{key}"));
        }
        // What an earlier run stored and no file says any more goes; but not while there is a document that
        // may be it, for all that can be read of it.
        let compare = !compared && !change.opaque;
        while let Err(error) = copy(&shared, &change, compare.then_some(&wanted)).await {
            tracing::error!(%error, "manifests are not in force yet; trying again");
            tokio::time::sleep(PAUSE).await;
        }
        compared |= compare;
        if first && let Ok(health) = shared.store.health().await {
            shared.core.lock().await.needed_revision = Some(health.revision);
            first = false;
        }
        shared.mirrored.send_replace(change.caught_up);
        shared.changed().await;
    }
}

fn is_stand_in(json: &[u8]) -> bool {
    let resource = std::str::from_utf8(json).ok().and_then(|json| Resource::from_json(json).ok());
    resource.is_some_and(|resource| resource.metadata().annotations.contains_key(STAND_IN))
}

async fn copy(shared: &Arc<Shared>, change: &folder::Change, all: Option<&BTreeSet<String>>) -> Result<(), StoreError> {
    let entry = |resource: &Arc<Resource>| (format!("{PREFIX}{}", resource.store_key()), resource.to_json());
    let mut upserted: Vec<(String, String)> = change.upserted.iter().map(entry).collect();
    for (key, json) in change.stand_ins.iter().map(entry) {
        // An earlier run may have stored a good version.
        let stored = shared.store.get(&key).await?;
        if stored.is_none_or(|stored| is_stand_in(&stored.value)) {
            upserted.push((key, json));
        }
    }
    if !upserted.is_empty() {
        let entries: Vec<(&str, &[u8])> = upserted.iter().map(|(key, json)| (key.as_str(), json.as_bytes())).collect();
        shared.store.put_all(&entries).await?;
    }
    for key in &change.removed {
        shared.store.delete(&format!("{PREFIX}{key}")).await?;
    }
    if let Some(all) = all {
        let (entries, _) = shared.store.list(&resource_prefix()).await?;
        for entry in entries.iter().filter(|entry| !all.contains(&entry.key)) {
            shared.store.delete(&entry.key).await?;
        }
    }
    Ok(())
}
