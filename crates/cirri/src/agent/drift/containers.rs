//! What ADD made inside containers, as somebody leaves it: named, and not repaired, as the container owns its network.
//!
//! The kernel tells of devices, addresses, routes and rules there, so a container in which nothing changes costs next to
//! nothing. Who listens in a namespace keeps it alive, so nobody listens any more where the name that leads to it is gone.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cirri_loader::net::{Link, Namespace, NamespaceNews};
use tokio::task::JoinHandle;

use super::{BUSY, EVERY, Findings, NETWORK, cpu_time};
use crate::agent::core::Core;
use crate::agent::endpoint::Endpoint;
use crate::agent::problems::Finding;
use crate::agent::{Shared, inside};
use crate::api::ProblemKind;

/// How long after ADD what is found otherwise is taken for what later plugins of the chain made.
const CHAIN: Duration = Duration::from_secs(5);
/// No container is compared more often, whatever happens in it.
const PAUSE: Duration = Duration::from_millis(500);

/// The containers that are listened in.
#[derive(Debug, Default)]
pub struct Containers {
    followed: BTreeMap<u16, Followed>,
}

#[derive(Debug)]
struct Followed {
    /// What leads to the namespace, and its inode.
    name: PathBuf,
    inode: (u64, u64),
    /// What is not as it was made.
    found: Vec<String>,
    task: JoinHandle<()>,
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Containers {
    /// It is detached.
    pub fn forget(&mut self, id: u16) {
        self.followed.remove(&id);
    }
}

impl Shared {
    /// Listens in containers that are new, and in those no more that are gone.
    pub(super) fn follow_containers(self: &Arc<Self>, core: &mut Core) {
        let is_named = |followed: &Followed| inode(&followed.name) == Some(followed.inode);
        core.drift.containers.followed.retain(|_, followed| is_named(followed) && !followed.task.is_finished());
        let is_new =
            |endpoint: &&Endpoint| endpoint.ifindex != 0 && !core.drift.containers.followed.contains_key(&endpoint.id);
        let new: Vec<(u16, Option<Namespace>)> =
            core.endpoints.values().filter(is_new).map(|it| (it.id, core.way_into(it, None))).collect();
        for (id, inside) in new {
            let Some(inside) = inside else { continue };
            let name = inside.path().to_owned();
            let Some(inode) = inode(&name) else { continue };
            let task = tokio::task::spawn_local(follow(Arc::clone(self), id));
            core.drift.containers.followed.insert(id, Followed { name, inode, found: Vec::new(), task });
        }
    }
}

impl Core {
    /// A workload and its namespace, which is not kept open: a node may have hundreds, and a process a thousand files.
    fn container(&self, id: u16) -> Option<(Endpoint, Namespace)> {
        let endpoint = self.endpoints.get(&id)?;
        Some((endpoint.clone(), self.way_into(endpoint, None)?))
    }

    /// Says what is otherwise in containers whose devices are there.
    pub(super) fn compare_containers(&self, links: &[Link], findings: &mut Findings) {
        for (id, followed) in &self.drift.containers.followed {
            let Some(endpoint) = self.endpoints.get(id).filter(|_| !followed.found.is_empty()) else { continue };
            if !links.iter().any(|link| link.index == endpoint.ifindex) {
                continue;
            }
            let remedy = "put it right in the container, or delete that and add it again: nothing is changed there";
            let finding = Finding::new(followed.found.join("; "), remedy).wanted("as it was attached");
            findings.push((ProblemKind::Endpoint, super::workloads::name(endpoint), finding));
        }
    }
}

/// Compares a container when there is news of it, and now and then.
async fn follow(shared: Arc<Shared>, id: u16) {
    while !shared.core.lock().await.endpoints.get(&id).is_none_or(|endpoint| endpoint.chain_noted) {
        tokio::time::sleep(CHAIN).await;
        note_chain(&shared, id).await;
    }
    let mut is_first = true;
    loop {
        let began = cpu_time();
        // Listening before it is compared, nothing is missed; and not at all in the pause, whatever happens there.
        let news = listen(&shared, id).await;
        let count = look(&shared, id).await.unwrap_or_else(|error| {
            tracing::warn!(endpoint = id, error, "its container cannot be compared");
            1
        });
        let took = cpu_time().saturating_sub(began);
        // Each in its turn, also those that began together.
        let turn = EVERY * NETWORK * if is_first { u32::from(id) % count + 1 } else { count };
        is_first = false;
        let _ = tokio::time::timeout(turn, told(news)).await;
        tokio::time::sleep(took.saturating_mul(BUSY).max(PAUSE)).await;
    }
}

async fn listen(shared: &Shared, id: u16) -> Option<NamespaceNews> {
    let (_, inside) = shared.core.lock().await.container(id)?;
    NamespaceNews::of(&inside)
        .inspect_err(|error| tracing::warn!(endpoint = id, %error, "changes in its container are noticed late"))
        .ok()
}

/// Waits for news; for ever if nobody tells any.
async fn told(news: Option<NamespaceNews>) {
    let is_told = match news {
        Some(mut news) => news.changed().await,
        None => false,
    };
    if !is_told {
        std::future::pending().await
    }
}

/// Notes what is otherwise as the chain's. The file says so, for the next start.
async fn note_chain(shared: &Shared, id: u16) {
    let Some((endpoint, inside)) = shared.core.lock().await.container(id) else { return };
    let Ok(chained) = inside::compare_made(&endpoint, inside).await else { return };
    let mut core = shared.core.lock().await;
    let Core { endpoints, ledger, .. } = &mut *core;
    let Some(endpoint) = endpoints.get_mut(&id) else { return };
    if !chained.is_empty() {
        tracing::info!(
            endpoint = id,
            ?chained,
            "a later plugin of the chain has made the container otherwise than ADD"
        );
    }
    endpoint.chain_noted = true;
    endpoint.chained = chained;
    if let Err(error) = ledger.save(endpoint) {
        tracing::warn!(endpoint = id, %error, "its file is behind");
    }
}

/// Notes what is otherwise. Answers how many containers there are.
async fn look(shared: &Arc<Shared>, id: u16) -> Result<u32, String> {
    let Some((endpoint, inside)) = shared.core.lock().await.container(id) else { return Ok(1) };
    let mut found = inside::compare_made(&endpoint, inside).await.map_err(|error| error.to_string())?;
    found.retain(|difference| !endpoint.chained.contains(difference));
    let mut core = shared.core.lock().await;
    let containers = &mut core.drift.containers;
    let count = containers.followed.len().try_into().unwrap_or(u32::MAX).max(1);
    if let Some(followed) = containers.followed.get_mut(&id)
        && followed.found != found
    {
        tracing::warn!(endpoint = id, pod = endpoint.pod, ?found, was = ?followed.found, "drift in a container");
        followed.found = found;
        drop(core);
        shared.compare(true, false, false, 0).await;
    }
    Ok(count)
}

fn inode(name: &PathBuf) -> Option<(u64, u64)> {
    std::fs::metadata(name).ok().map(|it| (it.dev(), it.ino()))
}
