//! Manifests of a directory, kept in the embedded store: from there on they go the same way as on
//! a node of a cluster, and the last good content survives a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use cirri_control::resource::Resource;
use cirri_store::{Embedded, PREFIX, Store as _, StoreError, folder};
use futures::StreamExt;
use futures::stream::BoxStream;

use super::Shared;
use super::records::{refused_prefix, refused_resource, resource_prefix};

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
        let known: BTreeSet<String> = known.into_iter().collect();
        for error in errors.iter().filter(|error| !known.contains(*error)) {
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

/// Where it stands what a run knew of the files of its folder.
pub fn files_prefix() -> String {
    format!("{PREFIX}folder/")
}

/// All of a change at once: nobody sees half of a file, thousands of removals are one, and what is known of the files
/// is of the same moment as what is in force.
async fn copy(store: &Embedded, change: &folder::Change) -> Result<(), StoreError> {
    let written = change.upserted.iter().map(|it| (it.store_key(), Some(it.to_json().into_bytes())));
    let removed = change.removed.iter().map(|key| (key.clone(), None));
    let objects = written.chain(removed).map(|(key, value)| (format!("{PREFIX}{key}"), value));
    let prefix = files_prefix();
    let files = change.files.iter().map(|(name, text)| {
        let text = text.as_ref().map(|text| text.clone().into_bytes());
        (format!("{prefix}{name}"), text)
    });
    let entries: Vec<_> = objects.chain(files).collect();
    if !entries.is_empty() {
        store.write_all(&entries).await?;
    }
    Ok(())
}

/// What an earlier run copied.
pub async fn stored(store: &Embedded) -> Result<folder::Memory, StoreError> {
    let (entries, _) = store.list(&resource_prefix()).await?;
    let read = |json: &[u8]| std::str::from_utf8(json).ok().and_then(|json| Resource::from_json(json).ok());
    let known = entries.iter().filter_map(|entry| Some((entry.key.strip_prefix(PREFIX)?, read(&entry.value))));
    let objects = known.map(|(key, resource)| (key.to_owned(), resource)).collect();
    let prefix = files_prefix();
    let (entries, _) = store.list(&prefix).await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let known = entries.iter().filter_map(|entry| Some((entry.key.strip_prefix(&prefix)?, text(&entry.value))));
    let files = known.map(|(name, text)| (name.to_owned(), text)).collect();
    Ok(folder::Memory { objects, files })
}

/// A store that is new, because its file was lost or spoilt, gets back what was in force: the agent has saved that, and
/// would take the empty store for one from which everything was deleted. Answers how many objects that are.
pub async fn recover(store: &Embedded, saved: &Embedded) -> Result<usize, StoreError> {
    if store.health().await?.revision > 0 {
        return Ok(0);
    }
    let (objects, _) = saved.list(&resource_prefix()).await?;
    let (files, _) = saved.list(&files_prefix()).await?;
    // Without a file, and without a word of a folder, what is saved is another store's.
    if files.is_empty() && store.set_aside().is_none() {
        return Ok(0);
    }
    let (refused, _) = saved.list(&refused_prefix()).await?;
    let mut objects: BTreeMap<String, Vec<u8>> = objects.into_iter().map(|entry| (entry.key, entry.value)).collect();
    // The store had this version, beside which the last good one is in force.
    objects.extend(refused.into_iter().filter_map(|entry| Some((refused_resource(&entry.key)?, entry.value))));
    let count = objects.len();
    let files = files.into_iter().map(|entry| (entry.key, entry.value));
    let entries: Vec<_> = objects.into_iter().chain(files).map(|(key, value)| (key, Some(value))).collect();
    if !entries.is_empty() {
        store.write_all(&entries).await?;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const POLICY: &str = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"p","namespace":"shop"},"spec":{"podSelector":{},"policyTypes":["Ingress"]}}"#;

    fn change() -> folder::Change {
        let policy = Resource::from_json(POLICY).unwrap();
        let files = vec![("p.yaml".to_owned(), Some("{}".to_owned()))];
        folder::Change { upserted: vec![Arc::new(policy)], files, ..folder::Change::default() }
    }

    async fn open(dir: &Path, name: &str) -> Embedded {
        Embedded::open(dir.join(name)).await.unwrap()
    }

    #[tokio::test]
    async fn what_a_run_copied_is_what_the_next_one_begins_with() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path(), "store").await;
        copy(&store, &change()).await.unwrap();
        let memory = stored(&store).await.unwrap();
        assert_eq!((memory.objects.len(), memory.files["p.yaml"].as_str()), (1, "{}"));
        assert!(memory.objects["resources/NetworkPolicy/shop/p"].is_some());
        let gone = vec![("p.yaml".to_owned(), None)];
        let removed = vec!["resources/NetworkPolicy/shop/p".to_owned()];
        copy(&store, &folder::Change { removed, files: gone, ..folder::Change::default() }).await.unwrap();
        assert_eq!(stored(&store).await.unwrap(), folder::Memory::default());
    }

    #[tokio::test]
    async fn a_store_that_was_lost_or_spoilt_gets_back_what_was_saved() {
        let dir = tempfile::tempdir().unwrap();
        // The agent saves all that it sees of the store.
        let saved = open(dir.path(), "saved").await;
        copy(&saved, &change()).await.unwrap();
        for spoil in [false, true] {
            if spoil {
                std::fs::write(dir.path().join("store"), vec![7; 4096]).unwrap();
            }
            let store = open(dir.path(), "store").await;
            assert_eq!(store.set_aside().is_some(), spoil);
            assert_eq!(recover(&store, &saved).await.unwrap(), 1);
            assert_eq!(stored(&store).await.unwrap(), stored(&saved).await.unwrap());
            // One that is whole is left alone.
            let removed = vec!["resources/NetworkPolicy/shop/p".to_owned()];
            copy(&store, &folder::Change { removed, ..folder::Change::default() }).await.unwrap();
            assert_eq!(recover(&store, &saved).await.unwrap(), 0);
            assert!(stored(&store).await.unwrap().objects.is_empty());
        }
        // A policy that was refused comes back as what the folder said last.
        let refused = POLICY.replace("Ingress", "Egress").into_bytes();
        saved.put(&format!("{}shop/p", refused_prefix()), &refused, false).await.unwrap();
        let store = open(dir.path(), "third").await;
        assert_eq!(recover(&store, &saved).await.unwrap(), 1);
        assert_eq!(store.list(&resource_prefix()).await.unwrap().0[0].value, refused);
        // What was saved of etcd is none of a folder.
        let of_etcd = open(dir.path(), "etcd").await;
        copy(&of_etcd, &folder::Change { files: Vec::new(), ..change() }).await.unwrap();
        assert_eq!(recover(&open(dir.path(), "new").await, &of_etcd).await.unwrap(), 0);
    }
}
