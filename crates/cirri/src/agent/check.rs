//! CHECK: whether everything that ADD made is still as it made it, or as a later plugin of the chain made it.

use std::sync::Arc;
use std::time::Instant;

use cirri_abi::{Addr, GATEWAY_MAC};
use cirri_loader::net::{Link, Namespace, NetError};
use cirri_loader::{MapError, Misplaced, Place};

use super::core::Core;
use super::endpoint::Endpoint;
use super::inside::{self, Found};
use super::rows::ipcache_key;
use super::{Shared, attach, devices, node};
use crate::api::{ApiError, EndpointAdded, EndpointCheck, Told};
use crate::workload;

/// What ADD answered, if all of it still holds.
///
/// # Errors
/// `not-found`: there is no such attachment. `internal`: everything that is not as it was made, in one line.
pub async fn check(shared: &Arc<Shared>, asked: &EndpointCheck) -> Result<EndpointAdded, ApiError> {
    let mut core = shared.core.lock().await;
    let attachment = &asked.attachment;
    let endpoint = core.endpoint_of(attachment).cloned().ok_or_else(|| {
        ApiError::new("not-found", format!("{} has no {} here", attachment.container_id, attachment.ifname))
            .hint("add it first")
    })?;
    let again = "delete the container and add it again";
    // After the question whether there is such an attachment: of none a runtime was told of none.
    let told = asked.told.as_ref().ok_or_else(|| {
        let text = format!("prevResult is not what there is: it has no interface {}", attachment.ifname);
        ApiError::new("internal", text).hint(again)
    })?;
    let (mac, found) = differences(&core, &endpoint, &asked.netns, told).await?;
    if !found.is_empty() {
        return Err(ApiError::new("internal", found.join("; ")).hint(again));
    }
    match mac.filter(|mac| *mac != endpoint.mac) {
        None => Ok(attach::answer(&core, &endpoint)),
        Some(mac) => {
            let endpoint = learn_mac(&mut core, endpoint, mac).await?;
            Ok(attach::answer(&core, &endpoint))
        }
    }
}

/// A later plugin of the chain gave the device another Ethernet address: what comes from the node's stack is sent to
/// that from now on. Before, the container threw it away.
async fn learn_mac(core: &mut Core, endpoint: Endpoint, mac: [u8; 6]) -> Result<Endpoint, ApiError> {
    let is_others = |other: &&Endpoint| other.id != endpoint.id && other.mac == mac;
    if let Some(Endpoint { namespace, pod, .. }) = core.endpoints.values().find(is_others) {
        let text = format!("{} is the Ethernet address of {namespace}/{pod}, too", workload::mac_text(mac));
        return Err(ApiError::new("internal", text).hint("have the plugins of the chain give each its own"));
    }
    tracing::info!(endpoint = endpoint.id, mac = workload::mac_text(mac), "another plugin gave it this address");
    let endpoint = Endpoint { mac, ..endpoint };
    core.ledger.save(&endpoint).map_err(|error| ApiError::new("internal", error))?;
    core.endpoints.insert(endpoint.id, endpoint.clone());
    core.touch();
    core.desire();
    core.reconcile(Instant::now()).await;
    Ok(endpoint)
}

/// The Ethernet address inside, and what is not as it should be.
async fn differences(
    core: &Core,
    endpoint: &Endpoint,
    netns: &str,
    told: &Told,
) -> Result<(Option<[u8; 6]>, Vec<String>), ApiError> {
    let internal = |error: NetError| ApiError::new("internal", error);
    let inside = Namespace::open(netns).map_err(internal)?;
    if inside.cookie().map_err(internal)? != endpoint.netns_cookie {
        let text = format!("{netns} is another network namespace than the one that was attached ({})", endpoint.netns);
        return Ok((None, vec![text]));
    }
    let Found { device, mac, differences: mut found } =
        inside::compare(endpoint, told, inside).await.map_err(internal)?;
    match core.net.find_link_by_index(endpoint.ifindex).await.map_err(internal)? {
        Some(outer) if devices::is_of(&outer, endpoint) => found.extend(of_device(core, endpoint, &outer, device)),
        _ => found.push(format!("its device {} is gone from the node", endpoint.host_ifname)),
    }
    found.extend(of_stack(core, endpoint).await.map_err(internal)?);
    found.extend(of_tables(core, endpoint).map_err(|error| ApiError::new("internal", error))?);
    Ok((mac, found))
}

/// The node's side of the device.
fn of_device(core: &Core, endpoint: &Endpoint, outer: &Link, inner: Option<u32>) -> Vec<String> {
    let name = &endpoint.host_ifname;
    let mut found = Vec::new();
    let mut expect = |is_so: bool, text: String| {
        if !is_so {
            found.push(text);
        }
    };
    expect(outer.name == *name, format!("its device {name} is called {} now", outer.name));
    expect(outer.up, format!("its device {name} is down"));
    expect(outer.mac == Some(GATEWAY_MAC), format!("its device {name} has another Ethernet address"));
    let mtu = endpoint.mtu;
    expect(mtu == 0 || outer.mtu == mtu, format!("its device {name} has the MTU {}, not {mtu}", outer.mtu));
    expect(inner.is_none() || outer.peer == inner, format!("its device {name} leads to another device"));
    expect(outer.controller.is_none(), format!("its device {name} is a port of another"));
    let v6 = node::has_ipv6(&core.net) && outer.mtu >= node::IPV6_MTU;
    for (setting, value) in node::quiet_settings(&outer.name, v6) {
        let now = core.net.sysctl(&setting).unwrap_or_else(|_| "gone".to_owned());
        expect(now == value, format!("the node's setting {setting} is {now}, not {value}"));
    }
    for Misplaced { program, found, .. } in core.datapath.misplaced(&[Place::Workload(outer.index)]) {
        expect(false, format!("{program} on {name}: {found}"));
    }
    found
}

/// What the node's stack knows of its addresses.
async fn of_stack(core: &Core, endpoint: &Endpoint) -> Result<Vec<String>, NetError> {
    let (routes, neighbours) = (core.net.routes().await?, core.net.neighbours().await?);
    let mut found = Vec::new();
    for ip in endpoint.addresses() {
        let Some(wanted) = core.rows.routes.desired(&ip.into()) else { continue };
        if !routes.iter().any(|found| found.plain && found.route == wanted.route) {
            found.push(format!("the node has no route to {ip} by {}", endpoint.host_ifname));
        }
        let knows = |mac| {
            let is_it = |known: &&cirri_loader::net::Neighbour| {
                (known.ip, known.device, known.mac) == (ip, wanted.route.device, mac)
            };
            neighbours.iter().any(|known| is_it(&known))
        };
        if !wanted.neighbour.is_none_or(knows) {
            found.push(format!("the node does not know the Ethernet address of {ip}"));
        }
    }
    Ok(found)
}

/// What the packet path knows of it.
fn of_tables(core: &Core, endpoint: &Endpoint) -> Result<Vec<String>, MapError> {
    let mut found = Vec::new();
    let row = endpoint.row();
    if core.tables.devices.get(&row.ifindex)? != Some(row) {
        found.push("the packet path does not know its device".to_owned());
    }
    for ip in endpoint.addresses() {
        if core.tables.endpoints.get(&Addr::from(ip))? != Some(row) {
            found.push(format!("the packet path does not know {ip} as its address"));
        }
        let wanted = core.rows.ipcache.desired(&ip.into());
        if core.tables.ipcache.get(&ipcache_key(ip.into()))?.as_ref() != wanted {
            found.push(format!("the packet path does not know who is at {ip}"));
        }
    }
    let state = core.rows.rulesets.state(&endpoint.ruleset);
    if state.as_deref() != Some("done") {
        found.push(format!("its rule set is not in force: {}", state.as_deref().unwrap_or("missing")));
    }
    Ok(found)
}
