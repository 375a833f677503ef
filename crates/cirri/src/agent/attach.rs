//! Attaching and detaching workloads: what CNI asks for.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cirri_abi::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, Identity};
use cirri_loader::net::{Namespace, NetError};

use tokio::sync::MutexGuard;

use super::allocate::{self, AllocateError};
use super::core::Core;
use super::endpoint::{Endpoint, HasDefault, Seen};
use super::wanted::Wanted;
use super::{Shared, catch_up, deletions, devices, inside, node};
use crate::api::{
    Address, ApiError, Attachment, EndpointAdd, EndpointAdded, EndpointDelete, EndpointGc, ValidAttachment,
};
use crate::config::Unseen;
use crate::workload;

/// How long an answer may wait for other nodes to be able to learn of the workload.
const PUBLISH_PATIENCE: Duration = Duration::from_secs(3);

/// Attaches a workload: first it is known who it is and all rules that were written before the
/// question are in force for it, then its device comes up.
///
/// Asked again for the same attachment it answers with what is there. `is_heard` is asked at the end: nobody
/// could delete what nobody knows of.
///
/// # Errors
/// What went wrong; nothing of the workload is left then. `unavailable`: the store did not show in
/// time what it held when this was called, or it holds no such pod; see `pods` in the configuration.
pub async fn add(
    shared: &Arc<Shared>,
    asked: &EndpointAdd,
    is_heard: impl Fn() -> bool,
) -> Result<EndpointAdded, ApiError> {
    let started = Instant::now();
    let wanted = Wanted::of(asked)?;
    if let Some(answer) = attached(&mut *shared.core.lock().await, &wanted).await? {
        return Ok(answer);
    }
    let mut seen = see(shared, asked, started).await?;
    let (mut core, identity) = numbered(shared, asked, &mut seen).await?;
    if let Some(answer) = attached(&mut core, &wanted).await? {
        return Ok(answer);
    }
    let place = wanted.place(&core)?;
    let mut endpoint = reserve(&mut core, &wanted, place.cookie, identity, &seen).await?;
    let mut made = create(&mut core, &mut endpoint, &place.inside, started).await;
    if made.is_ok() && !is_heard() {
        // Its DEL may have come and gone while this waited.
        made = Err(unheard(asked));
    }
    if let Err(error) = made {
        if let Err(left) = remove(&mut core, &wanted.attachment, Some(&wanted.netns)).await {
            tracing::warn!(endpoint = endpoint.id, error = %left, "not all of a failed attachment could be removed");
        }
        return Err(error);
    }
    let answer = answer(&core, &endpoint);
    core.unanswered.insert(endpoint.id);
    drop(core);
    tracing::info!(
        endpoint = answer.id,
        namespace = asked.namespace,
        pod = asked.pod,
        identity = answer.identity,
        ready_ms = answer.ready_ms,
        "attached"
    );
    shared.publish.notify_one();
    // Best effort: it works here already, and the publisher goes on by itself.
    let _ = tokio::time::timeout(PUBLISH_PATIENCE, shared.published(answer.addresses.iter().map(|a| a.ip))).await;
    let mut core = shared.core.lock().await;
    // If the runtime has asked again meanwhile, it is that answer that counts.
    if core.unanswered.remove(&endpoint.id) && !is_heard() {
        remove(&mut core, &wanted.attachment, Some(&wanted.netns)).await?;
        shared.publish.notify_one();
        return Err(unheard(asked));
    }
    Ok(answer)
}

fn unheard(asked: &EndpointAdd) -> ApiError {
    tracing::info!(container = asked.container_id, "not attached: the plugin went away before it had its answer");
    ApiError::new("unavailable", "the plugin went away")
}

/// The answer for an attachment that is there already. One that the runtime deleted meanwhile or lost goes,
/// once it is certain that the new one can be.
async fn attached(core: &mut Core, wanted: &Wanted) -> Result<Option<EndpointAdded>, ApiError> {
    let place = wanted.place(core)?;
    deletions::before_add(core, &wanted.attachment, &wanted.netns).await?;
    let Some(endpoint) = core.endpoint_of(&wanted.attachment) else { return Ok(None) };
    if endpoint.netns_cookie == place.cookie && device_is_there(core, endpoint).await {
        wanted.agrees_with(endpoint)?;
        // The newest path is the likeliest to lead there later.
        let (netns, answered) = (wanted.netns.clone(), endpoint.has_default);
        let endpoint = Endpoint { netns, answered, ..endpoint.clone() };
        core.unanswered.remove(&endpoint.id);
        if core.endpoints.get(&endpoint.id) != Some(&endpoint) {
            if let Err(error) = core.ledger.save(&endpoint) {
                tracing::warn!(endpoint = endpoint.id, %error, "its file is behind");
            }
            core.endpoints.insert(endpoint.id, endpoint.clone());
        }
        return Ok(Some(answer(core, &endpoint)));
    }
    // The runtime lost it without saying so.
    remove(core, &wanted.attachment, Some(&wanted.netns)).await?;
    Ok(None)
}

/// Detaches a workload; whether there was one. What is already gone is no error.
///
/// # Errors
/// The device cannot be removed, or the file of the endpoint.
pub async fn delete(shared: &Arc<Shared>, asked: &EndpointDelete) -> Result<bool, ApiError> {
    let mut core = shared.core.lock().await;
    let there = remove(&mut core, &asked.attachment, asked.netns.as_deref()).await?;
    drop(core);
    shared.publish.notify_one();
    Ok(there)
}

/// Detaches every workload of a network that is not named; how many. Those whose runtime attached them by
/// a version of CNI without GC stay: it does not name them, and another runtime that shares the network's
/// name does not know them.
///
/// # Errors
/// As for [`delete`], of the first that would not go; the others are gone.
pub async fn collect(shared: &Arc<Shared>, asked: &EndpointGc) -> Result<usize, ApiError> {
    let mut core = shared.core.lock().await;
    let is_named = |attachment: &Attachment| {
        let is_it = |valid: &ValidAttachment| {
            (&valid.container_id, &valid.ifname) == (&attachment.container_id, &attachment.ifname)
        };
        asked.valid.iter().any(is_it)
    };
    let stale: Vec<Attachment> = core
        .endpoints
        .values()
        .filter(|endpoint| endpoint.gc && endpoint.attachment.network == asked.network)
        .map(|endpoint| endpoint.attachment.clone())
        .filter(|attachment| !is_named(attachment))
        .collect();
    let mut outcome = Ok(stale.len());
    for attachment in &stale {
        if let Err(error) = remove(&mut core, attachment, None).await {
            tracing::warn!(container = attachment.container_id, %error, "GC goes on with the others");
            outcome = outcome.and(Err(error));
        }
    }
    drop(core);
    shared.publish.notify_one();
    outcome
}

/// Waits until the agent has seen what the store held when this was called, and the pod that the
/// runtime names: who that is stays known, should its object go while it is attached.
async fn see(shared: &Arc<Shared>, asked: &EndpointAdd, started: Instant) -> Result<Seen, ApiError> {
    let pods = {
        let core = shared.core.lock().await;
        if !core.is_ready() {
            return Err(ApiError::new("unavailable", "the store was not seen whole yet, or the node has no pod range")
                .hint("see `cirri status`; the store must be reachable once"));
        }
        core.config.pods
    };
    let patience = Duration::from_secs(pods.patience_seconds);
    let deadline = tokio::time::Instant::from_std(started + patience);
    let caught_up = tokio::time::timeout_at(deadline, catch_up::caught_up(shared)).await;
    let (namespace, pod) = (&asked.namespace, &asked.pod);
    let why = match caught_up {
        Ok(Ok(_)) if !asked.pod_named => return Ok(shared.core.lock().await.seen(asked)),
        Ok(Ok(_)) => match tokio::time::timeout_at(deadline, pod_seen(shared, asked)).await {
            Ok(seen) => return seen,
            Err(_) => shared.core.lock().await.unseen(asked),
        },
        Ok(Err(error)) => format!("what the store holds is not known: {error}"),
        Err(_) => format!("the agent is more than {} s behind the store", patience.as_secs()),
    };
    match pods.unseen {
        Unseen::Refuse => Err(ApiError::new("unavailable", format!("{namespace}/{pod} is not attached yet: {why}"))
            .hint("the runtime tries again; see `cirri status`, and `pods.unseen` in the configuration")),
        Unseen::Attach => {
            tracing::warn!(namespace, pod, why, "attached by what is known, as pods.unseen asks for");
            Ok(shared.core.lock().await.seen(asked))
        }
    }
}

/// Returns when the store has shown the pod.
async fn pod_seen(shared: &Arc<Shared>, asked: &EndpointAdd) -> Result<Seen, ApiError> {
    let mut news = shared.seen.subscribe();
    loop {
        let seen = shared.core.lock().await.seen(asked);
        if seen.pod.is_some() {
            return Ok(seen);
        }
        news.changed().await.map_err(|_| ApiError::new("unavailable", "the agent is stopping"))?;
    }
}

/// The identity of a pod's labels, allocated if need be, and the lock under which they are its labels. Its object may
/// change meanwhile (`seen` follows), or go.
async fn numbered<'a>(
    shared: &'a Arc<Shared>,
    asked: &EndpointAdd,
    seen: &mut Seen,
) -> Result<(MutexGuard<'a, Core>, Identity), ApiError> {
    let (namespace, pod) = (&asked.namespace, &asked.pod);
    loop {
        let core = shared.core.lock().await;
        let now = core.seen(asked);
        seen.update(now.pod.as_ref(), now.namespace.as_ref());
        let labels = core.labels_of_seen(seen, namespace, pod, &core.cluster.label_filter());
        if let Some(identity) = core.view.identities.find(&labels) {
            return Ok((core, identity));
        }
        let known = core.view.identities.clone();
        // Not under the lock: the store may be slow. The labels may be others when it has answered.
        drop(core);
        let identity =
            allocate::identity(shared.store.as_ref(), &known, &labels).await.map_err(|error| match error {
                AllocateError::NoIdentity => ApiError::new("exhausted", error),
                error => ApiError::new("unavailable", format!("no identity for {namespace}/{pod}: {error}")),
            })?;
        shared.core.lock().await.learn_identity(identity, &labels);
    }
}

/// Takes number, slot, name and addresses.
async fn reserve(
    core: &mut Core,
    wanted: &Wanted,
    netns_cookie: u64,
    identity: Identity,
    seen: &Seen,
) -> Result<Endpoint, ApiError> {
    let attachment = &wanted.attachment;
    let mac = wanted.choose_mac(core)?;
    let host_ifname = devices::free_name(core, attachment).await?;
    let addresses = wanted.take_addresses(core)?;
    let slot = core.ruleset_slots.take(&identity.id);
    let id = core.endpoint_ids.take(attachment);
    let (Some(ruleset), Some(id)) = (slot, id) else {
        core.endpoint_ids.release(attachment);
        core.release(&addresses);
        let what = if slot.is_none() { "slot for a rule set" } else { "endpoint number" };
        return Err(ApiError::new("exhausted", format!("no {what} left on this node")));
    };
    let labels = core.view.identities.labels(identity).map(ToString::to_string).unwrap_or_default();
    let mut endpoint = Endpoint {
        id,
        attachment: attachment.clone(),
        netns: wanted.netns.clone(),
        netns_cookie,
        namespace: wanted.namespace.clone(),
        pod: wanted.pod.clone(),
        pod_uid: wanted.pod_uid.clone(),
        identity: identity.id,
        tunnel_identity: 0,
        labels,
        unnumbered: false,
        mac,
        v4: addresses.iter().find_map(|ip| if let IpAddr::V4(v4) = ip { Some(*v4) } else { None }),
        v6: addresses.iter().find_map(|ip| if let IpAddr::V6(v6) = ip { Some(*v6) } else { None }),
        host_ifname,
        ifindex: 0,
        mtu: core.node.mtu,
        has_default: HasDefault { v4: false, v6: false },
        answered: HasDefault { v4: false, v6: false },
        chain_noted: false,
        chained: Vec::new(),
        gc: wanted.gc,
        ruleset,
        ready_ms: 0.0,
        seen: Seen::default(),
    };
    endpoint.remember(seen.pod.as_ref(), seen.namespace.as_ref());
    Ok(endpoint)
}

/// Makes the device and puts the rules in force. The inside comes up last.
async fn create(
    core: &mut Core,
    endpoint: &mut Endpoint,
    inside: &Namespace,
    started: Instant,
) -> Result<(), ApiError> {
    let internal = |error: NetError| ApiError::new("internal", error);
    // Noted before anything is made, so that a crash leaves nothing that nobody knows of.
    core.endpoints.insert(endpoint.id, endpoint.clone());
    save(core, endpoint)?;

    let net = core.net.clone();
    endpoint.ifindex = devices::create(&net, endpoint, inside).await?;
    core.datapath
        .attach_workload(&endpoint.host_ifname)
        .map_err(|error| ApiError::new("internal", format!("no programs on its device: {error}")))?;
    node::quiet(&net, &endpoint.host_ifname, endpoint.mtu).map_err(internal)?;

    core.raising = Some(endpoint.id);
    core.endpoints.insert(endpoint.id, endpoint.clone());
    core.place(&(endpoint.namespace.clone(), endpoint.pod.clone()));
    core.touch();
    core.desire();
    core.reconcile(Instant::now()).await;
    core.raising = None;
    rules_in_force(core, endpoint)?;

    // Not a packet may pass before: whoever is inside already can bring the other end up at any time.
    net.set_up(&endpoint.host_ifname).await.map_err(internal)?;
    core.desire_routes();
    core.reconcile(Instant::now()).await;
    reachable(core, endpoint)?;

    inside::set_up(endpoint, inside.clone()).await.map_err(internal)?;
    endpoint.ready_ms = started.elapsed().as_secs_f64() * 1000.0;
    // Labels may have changed the identity meanwhile: only this is ours to write.
    if let Some(kept) = core.endpoints.get_mut(&endpoint.id) {
        kept.ready_ms = endpoint.ready_ms;
        (kept.has_default, kept.answered) = (endpoint.has_default, endpoint.has_default);
        *endpoint = kept.clone();
    }
    save(core, endpoint)
}

fn save(core: &Core, endpoint: &Endpoint) -> Result<(), ApiError> {
    core.ledger.save(endpoint).map_err(|error| ApiError::new("internal", error))
}

/// Whether everything that decides about the workload's packets is in the kernel.
fn rules_in_force(core: &Core, endpoint: &Endpoint) -> Result<(), ApiError> {
    let rows = &core.rows;
    let mut states = vec![
        ("rule set", rows.rulesets.state(&endpoint.ruleset)),
        ("endpoint", rows.endpoints.state(&endpoint.id)),
        ("programs", rows.attachments.state(&endpoint.host_ifname)),
    ];
    states.extend(endpoint.addresses().map(|ip| ("address", rows.ipcache.state(&ip.into()))));
    all_done(states)
}

/// Whether the node's stack reaches it.
fn reachable(core: &Core, endpoint: &Endpoint) -> Result<(), ApiError> {
    all_done(endpoint.addresses().map(|ip| ("route", core.rows.routes.state(&ip.into()))))
}

fn all_done(states: impl IntoIterator<Item = (&'static str, Option<String>)>) -> Result<(), ApiError> {
    match states.into_iter().find(|(_, state)| state.as_deref() != Some("done")) {
        None => Ok(()),
        Some((what, state)) => {
            let state = state.unwrap_or_else(|| "missing".to_owned());
            Err(ApiError::new("internal", format!("its {what} is not in force: {state}")).hint("see `cirri status`"))
        }
    }
}

/// Takes a workload away: its device first, so that nothing flows, then all that was known of it. `netns` is what the
/// runtime calls the container's network namespace now.
///
/// # Errors
/// Something stays; then the workload stays known, so that whoever tries again finds it.
pub async fn remove(core: &mut Core, attachment: &Attachment, netns: Option<&str>) -> Result<bool, ApiError> {
    core.raising = None;
    let internal = |error: NetError| ApiError::new("internal", error);
    let Some(endpoint) = core.endpoint_of(attachment).cloned() else {
        workload::delete_devices(&core.net, attachment).await.map_err(internal)?;
        return Ok(false);
    };
    devices::delete(&core.net, &endpoint).await.map_err(internal)?;
    // While anything is written of it, it is known, and nobody else gets its number or addresses.
    core.ledger.forget(&endpoint).map_err(|error| {
        ApiError::new("internal", format!("what is written about endpoint {} stays: {error}", endpoint.id))
    })?;
    core.endpoint_ids.release(&endpoint.attachment);
    core.endpoints.remove(&endpoint.id);
    core.drift.containers.forget(endpoint.id);
    core.unanswered.remove(&endpoint.id);
    core.release(&endpoint.addresses().collect::<Vec<_>>());
    leave(core, &endpoint, netns).await;
    core.place(&(endpoint.namespace.clone(), endpoint.pod.clone()));
    core.touch();
    core.desire();
    core.reconcile(Instant::now()).await;
    if let Err(error) = core.datapath.collect_links() {
        tracing::warn!(%error, "pins of a device that is gone stay until the next start");
    }
    tracing::info!(endpoint = endpoint.id, namespace = endpoint.namespace, pod = endpoint.pod, "detached");
    Ok(true)
}

/// Leaves the container as one without this attachment: without its rules, and with the default route by
/// another attachment if it has one. Mostly there is no container any more.
pub async fn leave(core: &mut Core, gone: &Endpoint, netns: Option<&str>) {
    let Some(inside) = core.way_into(gone, netns) else {
        let mut alive = None;
        for other in core.beside(gone) {
            if device_is_there(core, other).await {
                alive = Some(other);
            }
        }
        if let Some(Endpoint { attachment, .. }) = alive {
            tracing::warn!(
                endpoint = gone.id,
                container = attachment.container_id,
                "no known path leads to its network namespace, which lives: it may have no default route, and rules of \
                 what was detached; delete the container and add it again"
            );
        }
        return;
    };
    if let Err(error) = inside::clear(gone, inside.clone()).await {
        tracing::warn!(endpoint = gone.id, %error, "rules of its addresses stay in the container");
    }
    let others: Vec<u16> = core.beside(gone).map(|other| other.id).collect();
    for id in others {
        let Some(endpoint) = core.endpoints.get_mut(&id) else { continue };
        match inside::take_default(endpoint, inside.clone()).await {
            Ok(false) => {}
            Ok(true) => {
                tracing::info!(endpoint = id, device = endpoint.attachment.ifname, "has the default route now");
                if let Err(error) = core.ledger.save(endpoint) {
                    tracing::warn!(endpoint = id, %error, "its file is behind");
                }
            }
            Err(error) => tracing::warn!(endpoint = id, %error, "the container may have no default route"),
        }
    }
}

async fn device_is_there(core: &Core, endpoint: &Endpoint) -> bool {
    let device = core.net.find_link(&endpoint.host_ifname).await;
    device.is_ok_and(|device| device.is_some_and(|device| device.index == endpoint.ifindex))
}

/// What ADD answers for a workload.
pub fn answer(core: &Core, endpoint: &Endpoint) -> EndpointAdded {
    let prefix = |ip: &IpAddr| if ip.is_ipv4() { 32 } else { 128 };
    EndpointAdded {
        id: endpoint.id,
        identity: endpoint.identity,
        host_ifname: endpoint.host_ifname.clone(),
        host_mac: workload::mac_text(GATEWAY_MAC),
        mac: workload::mac_text(endpoint.mac),
        mtu: if endpoint.mtu == 0 { core.node.mtu } else { endpoint.mtu },
        addresses: endpoint.addresses().map(|ip| Address { ip, prefix: prefix(&ip) }).collect(),
        gateway_v4: endpoint.v4.map(|_| GATEWAY_V4.into()),
        gateway_v6: endpoint.v6.map(|_| GATEWAY_V6.into()),
        default_v4: endpoint.v4.is_some() && endpoint.has_default.v4,
        default_v6: endpoint.v6.is_some() && endpoint.has_default.v6,
        ready_ms: endpoint.ready_ms,
    }
}
