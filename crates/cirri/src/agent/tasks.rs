//! The loops that carry things between the store, the core and the kernel.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cirri_abi::{Identity, epoch_slot};
use cirri_control::identity::Identities;
use cirri_control::ipam::ClusterPool;
use cirri_control::labels::IdentityLabels;
use cirri_loader::net::{ForeignRoutes, Neighbours};
use cirri_store::{Event, PREFIX};
use futures::{FutureExt, StreamExt};
use ipnet::IpNet;

use super::Shared;
use super::allocate::{self, AllocateError};
use super::drift::Mend;

/// Events taken in before the tables are filled again.
const CHUNK: usize = 4096;
/// How long to wait before something that the store refused is tried again.
const PAUSE: Duration = Duration::from_secs(1);
/// How long to wait before epochs that the kernel refused to move are tried again.
const EPOCH_PAUSE: Duration = Duration::from_millis(100);
/// How long changes of routes are gathered.
const ROUTE_BURST: Duration = Duration::from_millis(20);
const HEALTH_EVERY: Duration = Duration::from_secs(2);
/// A store that takes longer than this to say that it works is reported as away.
const HEALTH_PATIENCE: Duration = Duration::from_secs(2);

/// Takes in what the store says.
pub async fn watch(shared: Arc<Shared>) {
    let mut events = shared.store.watch(PREFIX).ready_chunks(CHUNK);
    while let Some(mut chunk) = events.next().await {
        // What changes together comes into force together: a group that the chunk cut in two is waited for.
        while !chunk.last().is_some_and(is_whole)
            && let Some(more) = events.next().await
        {
            chunk.extend(more);
        }
        let seen = Instant::now();
        {
            let mut core = shared.core.lock().await;
            if chunk.iter().any(|event| !matches!(event, Event::Progress(_))) {
                core.latency.seen(seen);
            }
            for event in chunk {
                let whole = matches!(event, Event::Snapshot(..));
                let concerned = match &event {
                    Event::Delete { key, .. } => core.answers_for(key),
                    Event::Put(entry) => core.answers_for(&entry.key),
                    Event::Snapshot(..) => true,
                    Event::Progress(_) => false,
                };
                core.drift.stored |= concerned;
                core.apply(event);
                if whole {
                    // It may be another store's: revisions of before say nothing about what is in force of it.
                    core.written = 0;
                    core.desired_revision = 0;
                    core.enforced_revision = 0;
                    shared.enforced.send_modify(|enforced| *enforced = enforced.map(|_| 0));
                    core.compare_published();
                }
            }
            core.compare_stored(seen);
        }
        // What is enforced is saved before: it must hold after a restart too.
        save(&shared).await;
        shared.changed().await;
        shared.seen.send_replace(shared.core.lock().await.view.revision);
    }
    tracing::error!("the store's watch ended");
}

/// Whether everything up to a revision has come with an event.
fn is_whole(event: &Event) -> bool {
    matches!(event, Event::Progress(_) | Event::Snapshot(..))
}

/// Saves what can be read now, so that it holds after a restart although it may be unreadable then.
async fn save(shared: &Shared) {
    let unsaved = shared.core.lock().await.view.take_unsaved();
    if unsaved.is_empty() {
        return;
    }
    let saved = shared.saved.write_all(&unsaved).await;
    let mut core = shared.core.lock().await;
    core.unsaved = saved.as_ref().err().map(ToString::to_string);
    if let Err(error) = saved {
        tracing::error!(%error, "what is enforced is not saved for a restart; it is tried again");
        core.view.return_unsaved(unsaved);
    }
}

/// Makes connections ask the node's routes again when somebody else changed those: recipes hold the
/// neighbour that a route led to.
pub async fn routes(shared: Arc<Shared>, mut news: ForeignRoutes) {
    while news.changed().await {
        // Daemons change routes in bursts; one renewal does for what came at once.
        tokio::time::sleep(ROUTE_BURST).await;
        while news.changed().now_or_never() == Some(true) {}
        let core = shared.core.lock().await;
        if let Err(error) = core.tables.bump(epoch_slot::NODE) {
            tracing::error!(%error, "established connections may go on by a route that is gone");
        }
    }
    tracing::error!("routes are not watched any more");
}

/// Makes connections find their neighbour again when its Ethernet address changed: recipes hold it.
pub async fn neighbours(shared: Arc<Shared>, mut news: Neighbours) {
    let net = shared.core.lock().await.net.clone();
    let mut known: BTreeMap<(u32, IpAddr), [u8; 6]> = BTreeMap::new();
    match net.neighbours_found().await {
        Ok(found) => known.extend(found.iter().map(|neighbour| ((neighbour.device, neighbour.ip), neighbour.mac))),
        Err(error) => tracing::warn!(%error, "neighbours that are known already cannot be read"),
    }
    while let Some(change) = news.changed().await {
        // One that does not answer keeps its address until it has another.
        let Some(mac) = change.mac else { continue };
        let Some(was) = known.insert((change.device, change.ip), mac) else { continue };
        if was == mac {
            continue;
        }
        tracing::info!(neighbour = %change.ip, "its Ethernet address changed");
        let core = shared.core.lock().await;
        if let Err(error) = core.tables.bump(epoch_slot::NODE) {
            tracing::error!(%error, "established connections may go on to a neighbour that is gone");
        }
    }
    tracing::error!("neighbours are not watched any more");
}

/// Makes the kernel like the tables, whenever something is due.
pub async fn reconcile(shared: Arc<Shared>) {
    loop {
        let next = {
            let mut core = shared.core.lock().await;
            let grace = core.announce(Instant::now());
            core.reconcile(Instant::now()).await;
            if core.note_enforced() || !core.rows.published.is_done() {
                shared.publish.notify_one();
            }
            shared.sockets.notify_one();
            let numbered = core.unnumbered.is_empty() && core.announcing.is_empty();
            if core.filled && numbered && core.rows.is_done() && core.serving.is_done() && !core.interrupted {
                core.retire();
                if core.enforced_revision != core.desired_revision {
                    core.latency.in_force(Instant::now());
                }
                core.enforced_revision = core.desired_revision;
                shared.enforced.send_replace(Some(core.enforced_revision));
            } else {
                shared.enforced.send_modify(|_| {});
            }
            let again = core.interrupted.then(|| Instant::now() + EPOCH_PAUSE);
            core.rows.next_due().into_iter().chain(core.serving.next_due()).chain(grace).chain(again).min()
        };
        let pause = async {
            match next {
                Some(next) => tokio::time::sleep_until(next.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shared.wake.notified() => {}
            () = pause => {}
        }
    }
}

/// Makes the store like the table of what this node publishes. Without the lock while it waits.
pub async fn publish(shared: Arc<Shared>) {
    loop {
        let due = {
            let core = shared.core.lock().await;
            if core.filled { core.rows.published.due(Instant::now()) } else { Vec::new() }
        };
        mend(&shared).await;
        let worked = !due.is_empty();
        for row in due {
            let outcome = match &row.desired {
                Some(value) => shared.store.put(&row.key, value, true).await,
                None => shared.store.delete(&row.key).await,
            };
            if let Err(error) = &outcome {
                tracing::warn!(key = row.key, %error, "not published; it is tried again");
            }
            let mut core = shared.core.lock().await;
            core.written = core.written.max(outcome.as_ref().copied().unwrap_or_default());
            core.rows.published.settle(&row.key, row.desired, outcome.map(drop), Instant::now());
        }
        if worked {
            // What was written over meanwhile is told by no more news.
            shared.core.lock().await.compare_stored(Instant::now());
            shared.settled.send_replace(());
            shared.wake.notify_one();
            // Rows may have changed while they were written.
            continue;
        }
        let next = shared.core.lock().await.rows.published.next_due();
        let pause = async {
            match next {
                Some(next) => tokio::time::sleep_until(next.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shared.publish.notified() => {}
            () = pause => {}
        }
    }
}

/// Writes anew what was found to be gone or spoilt. What is not done is found again.
async fn mend(shared: &Shared) {
    let mends = shared.core.lock().await.mends.clone();
    for Mend { key, value, gone } in &mends {
        let outcome = match gone {
            // Not over what somebody else has written meanwhile.
            true => shared.store.create(key, value, false).await.map(|_| 0),
            false => shared.store.put(key, value, false).await,
        };
        let mut core = shared.core.lock().await;
        match outcome {
            Ok(revision) => core.written = core.written.max(revision),
            Err(error) => {
                tracing::warn!(key, %error, "not written anew; it is tried again");
                core.drift.stored = true;
            }
        }
    }
    if !mends.is_empty() {
        let mut core = shared.core.lock().await;
        core.mends.clear();
        core.compare_stored(Instant::now());
        if !core.mends.is_empty() {
            shared.publish.notify_one();
        }
    }
}

/// Gets numbers for labels that have none.
pub async fn number(shared: Arc<Shared>) {
    loop {
        let (wanted, known) = {
            let core = shared.core.lock().await;
            let known = if core.unnumbered.is_empty() { Identities::default() } else { core.view.identities.clone() };
            (core.unnumbered.clone(), known)
        };
        let mut failed = false;
        for labels in wanted {
            match allocate::identity(shared.store.as_ref(), &known, &labels).await {
                Ok(identity) => learn(&shared, identity, &labels).await,
                Err(error) => {
                    failed = true;
                    tracing::warn!(%labels, %error, "no identity; it is tried again");
                }
            }
        }
        let pause = async { if failed { tokio::time::sleep(PAUSE).await } else { std::future::pending().await } };
        tokio::select! {
            () = shared.number.notified() => {}
            () = pause => {}
        }
    }
}

async fn learn(shared: &Arc<Shared>, identity: Identity, labels: &IdentityLabels) {
    shared.core.lock().await.learn_identity(identity, labels);
    shared.changed().await;
}

/// Gets the node's pod ranges, then is done.
pub async fn join(shared: Arc<Shared>) {
    let (cluster, name, v6) = {
        let core = shared.core.lock().await;
        (core.config.cluster.clone(), core.node.name.clone(), core.node.v6.is_some())
    };
    let mut pools = vec![(IpNet::V4(cluster.pod_cidr_v4), cluster.pod_cidr_v4_per_node)];
    if v6 {
        pools.push((IpNet::V6(cluster.pod_cidr_v6), cluster.pod_cidr_v6_per_node));
    }
    loop {
        match ranges(&shared, &pools, &name).await {
            Ok(ranges) => {
                let mut core = shared.core.lock().await;
                match core.set_ranges(&ranges) {
                    Ok(()) => tracing::info!(?ranges, "pod ranges"),
                    Err(error) => tracing::error!(%error, "the node's pod range cannot be used"),
                }
                drop(core);
                return shared.changed().await;
            }
            Err(error) => {
                tracing::warn!(%error, "no pod range yet; it is tried again");
                note_failure(&shared, &error.to_string());
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn ranges(shared: &Arc<Shared>, pools: &[(IpNet, u8)], name: &str) -> Result<Vec<IpNet>, AllocateError> {
    let mut ranges = Vec::new();
    let known = shared.core.lock().await.view.nodes.clone();
    for (cidr, per_node) in pools {
        let pool = ClusterPool::new(*cidr, *per_node)?;
        ranges.push(allocate::range(shared.store.as_ref(), &pool, name, &known).await?);
    }
    Ok(ranges)
}

/// Asks the store how it is, for `cirri status`.
pub async fn health(shared: Arc<Shared>) {
    let mut pause = tokio::time::interval(HEALTH_EVERY);
    pause.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        pause.tick().await;
        let answer = tokio::time::timeout(HEALTH_PATIENCE, shared.store.health()).await;
        let answers = matches!(answer, Ok(Ok(_)));
        match answer {
            Ok(Ok(health)) => {
                let mut status = shared.store_status.lock().unwrap_or_else(PoisonError::into_inner);
                status.healthy = true;
                status.since.clear();
                status.error = health.warning.unwrap_or_default();
            }
            Ok(Err(error)) => note_failure(&shared, &error.to_string()),
            Err(_) => note_failure(&shared, &format!("no answer for {} s", HEALTH_PATIENCE.as_secs())),
        }
        if shared.core.lock().await.end_held_records(answers, Instant::now()) {
            shared.changed().await;
        }
        save(&shared).await;
    }
}

fn note_failure(shared: &Shared, error: &str) {
    let mut status = shared.store_status.lock().unwrap_or_else(PoisonError::into_inner);
    status.healthy = false;
    if status.since.is_empty() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        status.since = cirri_flow::rfc3339(now.as_nanos().try_into().unwrap_or(u64::MAX));
    }
    status.error = error.to_owned();
}
