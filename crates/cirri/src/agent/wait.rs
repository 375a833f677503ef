//! Waiting until something is enforced.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::server::millis;
use super::{Shared, catch_up};
use crate::api::{ApiError, Wait, Waited};

const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);

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
        None => catch_up::caught_up(shared).await.map_err(|error| ApiError::new("unavailable", error))?,
    };
    let mut enforced = shared.enforced.subscribe();
    let reached = enforced.wait_for(|enforced| enforced.is_some_and(|enforced| enforced >= revision)).await;
    match reached {
        Ok(enforced) => Ok(enforced.unwrap_or_default()),
        Err(_) => Err(ApiError::new("unavailable", "the agent is stopping")),
    }
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
