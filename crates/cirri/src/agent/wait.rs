//! Waiting until something is enforced.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cirri_control::resource;

use super::server::millis;
use super::view::{Digest, digest};
use super::{Shared, mirror};
use crate::api::{ApiError, Wait, Waited};
use crate::config::StoreKind;

const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);
/// How often the files of the folder are read again while they are waited for.
const READ_EVERY: Duration = Duration::from_secs(2);

/// Waits until a revision of the store is enforced by every table.
///
/// # Errors
/// `timeout`, with what is not done; `unavailable` if the store does not say what its newest
/// revision is.
pub async fn wait(shared: &Arc<Shared>, asked: &Wait) -> Result<Waited, ApiError> {
    let started = Instant::now();
    let patience = asked.timeout_ms.map_or(DEFAULT_PATIENCE, Duration::from_millis);
    let reached = tokio::time::timeout(patience, until_enforced(shared, asked)).await;
    match reached {
        Ok(enforced) => Ok(Waited { enforced_revision: enforced?, waited_ms: millis(started) }),
        Err(_) => Err(ApiError::new("timeout", unfinished(shared).await).hint("see `cirri status`")),
    }
}

async fn until_enforced(shared: &Arc<Shared>, asked: &Wait) -> Result<u64, ApiError> {
    let revision = match asked.revision {
        Some(revision) => revision,
        None => newest(shared).await?,
    };
    let mut enforced = shared.enforced.subscribe();
    let reached = enforced.wait_for(|enforced| enforced.is_some_and(|enforced| enforced >= revision)).await;
    match reached {
        Ok(enforced) => Ok(enforced.unwrap_or_default()),
        Err(_) => Err(ApiError::new("unavailable", "the agent is stopping")),
    }
}

/// The revision that holds everything that was written before the question.
async fn newest(shared: &Arc<Shared>) -> Result<u64, ApiError> {
    let store = shared.core.lock().await.config.store.clone();
    if store.kind == StoreKind::Folder {
        // The kernel reports a changed file at once, but not necessarily before this question.
        let mut progress = shared.enforced.subscribe();
        let (mut wanted, mut read) = (in_folder(&store.folder), Instant::now());
        loop {
            // Files may change while one waits; but reading them all after each row would take longer
            // than the rows.
            if read.elapsed() > READ_EVERY {
                (wanted, read) = (in_folder(&store.folder), Instant::now());
            }
            let held = mirror::held(shared).await;
            // What a broken file said last stays.
            let all_readable = shared.core.lock().await.folder_errors.is_empty();
            let missing = wanted.iter().any(|(key, digest)| held.get(key) != Some(digest));
            let stray = all_readable && held.keys().any(|key| !wanted.contains_key(key));
            if !missing && !stray {
                break;
            }
            progress.changed().await.map_err(|_| ApiError::new("unavailable", "the agent is stopping"))?;
        }
    }
    match shared.store.health().await {
        Ok(health) => Ok(health.revision),
        Err(error) => Err(ApiError::new("unavailable", error)),
    }
}

/// What the files of the folder say now. What cannot be read says nothing.
fn in_folder(folder: &std::path::Path) -> BTreeMap<String, Digest> {
    let mut wanted = BTreeMap::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        let is_manifest = path.extension().is_some_and(|it| ["yaml", "yml", "json"].iter().any(|known| it == *known));
        if hidden || !is_manifest {
            continue;
        }
        let Ok(bytes) = std::fs::read(&path) else { continue };
        let resources = resource::read_documents(&path.display().to_string(), &bytes).resources;
        wanted.extend(
            resources.into_iter().map(|resource| (resource.store_key(), digest(resource.to_json().as_bytes()))),
        );
    }
    wanted
}

async fn unfinished(shared: &Arc<Shared>) -> String {
    let core = shared.core.lock().await;
    let mut open = Vec::new();
    if !core.view.synced {
        open.push("the store was not seen whole yet".to_owned());
    }
    if core.pools.is_empty() {
        open.push("the node has no pod range yet".to_owned());
    }
    for labels in &core.unnumbered {
        open.push(format!("no identity yet for {labels}"));
    }
    for table in core.rows.status().into_iter().chain([core.serving.status()]) {
        if table.pending > 0 {
            open.push(format!("{}: {} rows pending", table.name, table.pending));
        }
        open.extend(table.errors.iter().map(|row| format!("{} {}: {}", table.name, row.key, row.error)));
    }
    format!("enforced {} of {} seen; {}", core.enforced_revision, core.view.revision, open.join("; "))
}
