//! Attaching and detaching workloads: what CNI asks for.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cirri_abi::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, Identity};
use cirri_loader::net::{self, Namespace, Net, NetError, Route, VethEnd};

use super::Shared;
use super::allocate::{self, AllocateError};
use super::core::Core;
use super::endpoint::Endpoint;
use super::node;
use crate::api::{Address, ApiError, Attachment, EndpointAdd, EndpointAdded};
use crate::workload;

/// How long an answer may wait for other nodes to be able to learn of the workload.
const PUBLISH_PATIENCE: Duration = Duration::from_secs(3);

/// Attaches a workload: its rules are in force before anybody learns that it is there.
///
/// Asked again for the same attachment it answers with what is there.
///
/// # Errors
/// What went wrong; nothing of the workload is left then.
pub async fn add(shared: &Arc<Shared>, asked: &EndpointAdd) -> Result<EndpointAdded, ApiError> {
    let started = Instant::now();
    let attachment = Attachment { container_id: asked.container_id.clone(), ifname: asked.ifname.clone() };
    let mac = match &asked.mac {
        Some(text) => workload::parse_mac(text)
            .ok_or_else(|| ApiError::new("bad-request", format!("`{text}` is no unicast Ethernet address")))?,
        None => workload::default_mac(&attachment),
    };
    let identity = number_labels(shared, &asked.namespace, &asked.pod).await?;

    let mut core = shared.core.lock().await;
    if let Some(endpoint) = core.endpoint_of(&attachment) {
        if endpoint.netns == asked.netns && device_is_there(&core, endpoint).await {
            return Ok(answer(&core, endpoint));
        }
        // The runtime lost it without saying so.
        remove(&mut core, &attachment).await?;
    }
    let mut endpoint = reserve(&mut core, asked, &attachment, identity, mac)?;
    let made = create(&mut core, &mut endpoint, started).await;
    if let Err(error) = made {
        if let Err(left) = remove(&mut core, &attachment).await {
            tracing::warn!(endpoint = endpoint.id, error = %left, "not all of a failed attachment could be removed");
        }
        return Err(error);
    }
    let answer = answer(&core, &endpoint);
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
    Ok(answer)
}

/// Detaches a workload; whether there was one. What is already gone is no error.
///
/// # Errors
/// The device cannot be removed, or the file of the endpoint.
pub async fn delete(shared: &Arc<Shared>, attachment: &Attachment) -> Result<bool, ApiError> {
    let mut core = shared.core.lock().await;
    let there = remove(&mut core, attachment).await?;
    drop(core);
    shared.publish.notify_one();
    Ok(there)
}

/// Detaches every workload that is not named; how many.
///
/// # Errors
/// As for [`delete`].
pub async fn collect(shared: &Arc<Shared>, valid: &[Attachment]) -> Result<usize, ApiError> {
    let mut core = shared.core.lock().await;
    let stale: Vec<Attachment> = core
        .endpoints
        .values()
        .map(|endpoint| endpoint.attachment.clone())
        .filter(|attachment| !valid.contains(attachment))
        .collect();
    for attachment in &stale {
        remove(&mut core, attachment).await?;
    }
    drop(core);
    shared.publish.notify_one();
    Ok(stale.len())
}

/// Whether a workload is as it was attached.
///
/// # Errors
/// What is missing.
pub async fn check(shared: &Arc<Shared>, attachment: &Attachment) -> Result<u16, ApiError> {
    let core = shared.core.lock().await;
    let endpoint = core.endpoint_of(attachment).ok_or_else(|| {
        ApiError::new("not-found", format!("{} has no {} here", attachment.container_id, attachment.ifname))
            .hint("add it first")
    })?;
    if !device_is_there(&core, endpoint).await {
        let text = format!("its device {} is gone", endpoint.host_ifname);
        return Err(ApiError::new("internal", text).hint("delete the container and add it again"));
    }
    match core.rows.endpoints.state(&endpoint.id).as_deref() {
        Some("done") => Ok(endpoint.id),
        state => Err(ApiError::new("internal", format!("its state is {}", state.unwrap_or("unknown")))),
    }
}

/// The identity of a pod's labels, allocated if need be. Not under the lock: the store may be slow.
async fn number_labels(shared: &Arc<Shared>, namespace: &str, pod: &str) -> Result<Identity, ApiError> {
    let (labels, known) = {
        let core = shared.core.lock().await;
        if !core.is_ready() {
            return Err(ApiError::new("unavailable", "the store was not seen whole yet, or the node has no pod range")
                .hint("see `cirri status`; the store must be reachable once"));
        }
        let labels = core.labels_of(namespace, pod, &core.cluster.label_filter());
        if let Some(identity) = core.view.identities.find(&labels) {
            return Ok(identity);
        }
        (labels, core.view.identities.clone())
    };
    let identity = allocate::identity(shared.store.as_ref(), &known, &labels).await.map_err(|error| match error {
        AllocateError::NoIdentity => ApiError::new("exhausted", error),
        error => ApiError::new("unavailable", format!("no identity for {namespace}/{pod}: {error}")),
    })?;
    shared.core.lock().await.learn_identity(identity, &labels);
    Ok(identity)
}

/// Takes number, slot and addresses.
fn reserve(
    core: &mut Core,
    asked: &EndpointAdd,
    attachment: &Attachment,
    identity: Identity,
    mac: [u8; 6],
) -> Result<Endpoint, ApiError> {
    let exhausted = |what: &str| ApiError::new("exhausted", format!("no {what} left on this node"));
    let mut addresses = Vec::new();
    let (mut v4, mut v6) = (None, None);
    for index in 0..core.pools.len() {
        match core.pools[index].allocate() {
            Ok(IpAddr::V4(ip)) => v4 = Some(ip),
            Ok(IpAddr::V6(ip)) => v6 = Some(ip),
            Err(error) => {
                release(core, &addresses);
                return Err(ApiError::new("exhausted", error));
            }
        }
        addresses = v4.map(IpAddr::V4).into_iter().chain(v6.map(IpAddr::V6)).collect();
    }
    let slot = core.ruleset_slots.take(&identity.id);
    let id = core.endpoint_ids.take(attachment);
    let (Some(ruleset), Some(id)) = (slot, id) else {
        core.endpoint_ids.release(attachment);
        release(core, &addresses);
        return Err(exhausted(if slot.is_none() { "slot for a rule set" } else { "endpoint number" }));
    };
    let labels = core.view.identities.labels(identity).map(ToString::to_string).unwrap_or_default();
    Ok(Endpoint {
        id,
        attachment: attachment.clone(),
        netns: asked.netns.clone(),
        netns_cookie: 0,
        namespace: asked.namespace.clone(),
        pod: asked.pod.clone(),
        identity: identity.id,
        labels,
        mac,
        v4,
        v6,
        host_ifname: workload::host_ifname(attachment),
        ifindex: 0,
        ruleset,
        ready_ms: 0.0,
    })
}

fn release(core: &mut Core, addresses: &[IpAddr]) {
    for ip in addresses {
        for pool in &mut core.pools {
            pool.release(*ip);
        }
    }
}

/// Makes the device and puts the rules in force. The inside comes up last.
async fn create(core: &mut Core, endpoint: &mut Endpoint, started: Instant) -> Result<(), ApiError> {
    let internal = |error: NetError| ApiError::new("internal", error);
    let inside = Namespace::open(&endpoint.netns).map_err(|error| {
        ApiError::new("bad-request", error).hint("the runtime must create the network namespace before ADD")
    })?;
    endpoint.netns_cookie = inside.cookie().map_err(internal)?;
    // Noted before anything is made, so that a crash leaves nothing that nobody knows of.
    core.endpoints.insert(endpoint.id, endpoint.clone());
    save(core, endpoint)?;

    let (net, mtu) = (core.net.clone(), core.node.mtu);
    // A device of that name is left over from a crash, or the note above would have named it.
    net.delete_link(&endpoint.host_ifname).await.map_err(internal)?;
    let outer = VethEnd { name: endpoint.host_ifname.clone(), mac: Some(GATEWAY_MAC), mtu: Some(mtu), namespace: None };
    let inner = VethEnd {
        name: endpoint.attachment.ifname.clone(),
        mac: Some(endpoint.mac),
        mtu: Some(mtu),
        namespace: Some(inside.clone()),
    };
    net.create_veth(&outer, &inner).await.map_err(internal)?;
    let device = net.link(&endpoint.host_ifname).await.map_err(|error| {
        let text = format!("no device made: {error}; is there a {} inside already?", endpoint.attachment.ifname);
        ApiError::new("internal", text)
    })?;
    endpoint.ifindex = device.index;
    // Not a packet may pass before: whoever is inside already can bring the other end up at any time.
    core.datapath
        .attach_workload(&endpoint.host_ifname)
        .map_err(|error| ApiError::new("internal", format!("no programs on its device: {error}")))?;
    node::quiet(&net, &endpoint.host_ifname).map_err(internal)?;
    net.set_up(&endpoint.host_ifname).await.map_err(internal)?;

    core.endpoints.insert(endpoint.id, endpoint.clone());
    core.place(&(endpoint.namespace.clone(), endpoint.pod.clone()));
    core.touch();
    core.desire();
    core.reconcile(Instant::now()).await;
    in_force(core, endpoint)?;

    set_up_inside(endpoint, inside).await.map_err(internal)?;
    endpoint.ready_ms = started.elapsed().as_secs_f64() * 1000.0;
    // Labels may have changed the identity meanwhile: only the time is ours to write.
    if let Some(kept) = core.endpoints.get_mut(&endpoint.id) {
        kept.ready_ms = endpoint.ready_ms;
        *endpoint = kept.clone();
    }
    save(core, endpoint)
}

fn save(core: &Core, endpoint: &Endpoint) -> Result<(), ApiError> {
    let state_dir = &core.config.state_dir.0;
    endpoint.save(state_dir).map_err(|error| {
        ApiError::new("internal", format!("cannot write to {}: {error}", state_dir.display()))
            .hint("free the disk or change stateDir")
    })
}

/// Whether everything that the workload needs is in the kernel.
fn in_force(core: &Core, endpoint: &Endpoint) -> Result<(), ApiError> {
    let rows = &core.rows;
    let mut states = vec![
        ("rule set", rows.rulesets.state(&endpoint.ruleset)),
        ("endpoint", rows.endpoints.state(&endpoint.id)),
        ("programs", rows.attachments.state(&endpoint.host_ifname)),
    ];
    for ip in endpoint.addresses() {
        states.push(("address", rows.ipcache.state(&ip.into())));
        states.push(("route", rows.routes.state(&ip.into())));
    }
    match states.into_iter().find(|(_, state)| state.as_deref() != Some("done")) {
        None => Ok(()),
        Some((what, state)) => {
            let state = state.unwrap_or_else(|| "missing".to_owned());
            Err(ApiError::new("internal", format!("its {what} is not in force: {state}")).hint("see `cirri status`"))
        }
    }
}

async fn set_up_inside(endpoint: &Endpoint, inside: Namespace) -> Result<(), NetError> {
    let net = Net::of(inside)?;
    let name = &endpoint.attachment.ifname;
    let device = net.link(name).await?.index;
    if endpoint.v6.is_some() {
        net.set_sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), "0")?;
        net.set_sysctl(&format!("ipv6/conf/{name}/accept_dad"), "0")?;
        net.set_sysctl(&format!("ipv6/conf/{name}/accept_ra"), "0")?;
    }
    net.set_up("lo").await?;
    net.set_up(name).await?;
    for ip in endpoint.addresses() {
        let prefix = if ip.is_ipv4() { 32 } else { 128 };
        net.add_address(&net::Address { ip, prefix, device }).await?;
    }
    if endpoint.v4.is_some() {
        let gateway = IpAddr::from(GATEWAY_V4);
        net.put_route(&Route::host(gateway, device, None)).await?;
        net.put_route(&Route::default_via(gateway, device)).await?;
    }
    if endpoint.v6.is_some() {
        net.put_route(&Route::default_via(GATEWAY_V6.into(), device)).await?;
    }
    Ok(())
}

/// Takes a workload away: its device first, so that nothing flows, then all that was known of it.
async fn remove(core: &mut Core, attachment: &Attachment) -> Result<bool, ApiError> {
    let name = workload::host_ifname(attachment);
    core.net.delete_link(&name).await.map_err(|error| ApiError::new("internal", error))?;
    let id = core.endpoint_ids.release(attachment);
    let Some(endpoint) = id.and_then(|id| core.endpoints.remove(&id)) else { return Ok(false) };
    release(core, &endpoint.addresses().collect::<Vec<_>>());
    core.place(&(endpoint.namespace.clone(), endpoint.pod.clone()));
    core.touch();
    core.desire();
    core.reconcile(Instant::now()).await;
    if let Err(error) = core.datapath.collect_links() {
        tracing::warn!(%error, "pins of a device that is gone stay until the next start");
    }
    endpoint.forget(&core.config.state_dir.0).map_err(|error| {
        ApiError::new("internal", format!("cannot remove the file of endpoint {}: {error}", endpoint.id))
    })?;
    tracing::info!(endpoint = endpoint.id, namespace = endpoint.namespace, pod = endpoint.pod, "detached");
    Ok(true)
}

async fn device_is_there(core: &Core, endpoint: &Endpoint) -> bool {
    let device = core.net.find_link(&endpoint.host_ifname).await;
    device.is_ok_and(|device| device.is_some_and(|device| device.index == endpoint.ifindex))
}

fn answer(core: &Core, endpoint: &Endpoint) -> EndpointAdded {
    let prefix = |ip: &IpAddr| if ip.is_ipv4() { 32 } else { 128 };
    EndpointAdded {
        id: endpoint.id,
        identity: endpoint.identity,
        host_ifname: endpoint.host_ifname.clone(),
        host_mac: workload::mac_text(GATEWAY_MAC),
        mac: workload::mac_text(endpoint.mac),
        mtu: core.node.mtu,
        addresses: endpoint.addresses().map(|ip| Address { ip, prefix: prefix(&ip) }).collect(),
        gateway_v4: endpoint.v4.map(|_| GATEWAY_V4.into()),
        gateway_v6: endpoint.v6.map(|_| GATEWAY_V6.into()),
        ready_ms: endpoint.ready_ms,
    }
}
