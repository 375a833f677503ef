//! The node's side of workloads' devices: named, made, and removed only if they are ours.
//!
//! A name holds 32 bits of a hash and may be another's. Whose a device is stands in its alias, and in the
//! file of its endpoint.

use cirri_abi::GATEWAY_MAC;
use cirri_loader::net::{Link, Namespace, Net, NetError, VethEnd};

use super::core::Core;
use super::endpoint::Endpoint;
use crate::api::{ApiError, Attachment};
use crate::workload;

/// Names to try. That as many are taken by others is no coincidence any more.
const TRIES: u32 = 16;

/// A name that no device of the node has and no endpoint. What is left of an earlier device of this
/// attachment goes first.
///
/// # Errors
/// All names are taken, or the kernel does not tell.
pub async fn free_name(core: &Core, attachment: &Attachment) -> Result<String, ApiError> {
    let internal = |error: NetError| ApiError::new("internal", error);
    workload::delete_devices(&core.net, attachment).await.map_err(internal)?;
    let links = core.net.links().await.map_err(internal)?;
    let is_free = |name: &String| {
        !links.iter().any(|link| link.name == *name)
            && !core.endpoints.values().any(|endpoint| endpoint.host_ifname == *name)
    };
    (0..TRIES).map(|number| workload::host_ifname(attachment, number)).find(is_free).ok_or_else(|| {
        let first = workload::host_ifname(attachment, 0);
        ApiError::new("exhausted", format!("{first} and {} other names for its device are taken", TRIES - 1))
            .hint("rename or remove devices that others made under such names")
    })
}

/// Makes a workload's device, both ends down; the number of the node's side.
///
/// # Errors
/// The container has a device of that name already, or the kernel refuses.
pub async fn create(net: &Net, endpoint: &Endpoint, inside: &Namespace) -> Result<u32, ApiError> {
    let internal = |error: NetError| ApiError::new("internal", error);
    let ifname = &endpoint.attachment.ifname;
    let container = Net::of(inside.clone()).map_err(internal)?;
    if container.find_link(ifname).await.map_err(internal)?.is_some() {
        let text = format!("the container has a device {ifname} already, and it is not this node's");
        return Err(ApiError::new("conflict", text).hint("remove it, or give this attachment another CNI_IFNAME"));
    }
    let mtu = Some(endpoint.mtu);
    let outer = VethEnd { name: endpoint.host_ifname.clone(), mac: Some(GATEWAY_MAC), mtu, namespace: None };
    let inner = VethEnd { name: ifname.clone(), mac: Some(endpoint.mac), mtu, namespace: Some(inside.clone()) };
    net.create_veth(&outer, &inner).await.map_err(internal)?;
    let device = net.link(&endpoint.host_ifname).await.map_err(internal)?;
    if !is_unmarked(&device) {
        let text = format!("somebody else just made a device {}", endpoint.host_ifname);
        return Err(ApiError::new("conflict", text).hint("try again"));
    }
    net.set_alias(device.index, &workload::owner(&endpoint.attachment)).await.map_err(internal)?;
    Ok(device.index)
}

/// Removes a workload's device; what is gone is no error, what is another's stays.
///
/// # Errors
/// The kernel does not do it.
pub async fn delete(net: &Net, endpoint: &Endpoint) -> Result<(), NetError> {
    for link in net.links().await? {
        if is_of(&link, endpoint) {
            net.delete_link_by_index(link.index).await?;
        }
    }
    Ok(())
}

/// Whether a device is a workload's.
pub fn is_of(link: &Link, endpoint: &Endpoint) -> bool {
    if workload::is_owner(&link.alias) {
        return link.alias == workload::owner(&endpoint.attachment);
    }
    let numbered = link.index == endpoint.ifindex;
    if !link.alias.is_empty() {
        // Somebody wrote something else there, as tools do that watch devices. It is the same device.
        return numbered && is_made(link);
    }
    // One that an earlier version made, or that was made just before a crash.
    link.name == endpoint.host_ifname && (numbered || endpoint.ifindex == 0) && is_made(link)
}

/// Whether a device is as one is right after [`Net::create_veth`] made it for a workload.
fn is_unmarked(link: &Link) -> bool {
    link.alias.is_empty() && is_made(link)
}

/// Whether it is made as those of workloads are, and of no others.
fn is_made(link: &Link) -> bool {
    link.kind == "veth" && link.mac == Some(GATEWAY_MAC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::endpoint::tests::endpoint;

    #[test]
    fn a_device_is_known_whatever_somebody_wrote_on_it_but_not_by_its_number_alone() {
        let endpoint = Endpoint { ifindex: 7, host_ifname: "lxc1".to_owned(), ..endpoint() };
        let owner = workload::owner(&endpoint.attachment);
        let link = |index, alias: &str, kind: &str, mac| Link {
            index,
            name: "lxc1".to_owned(),
            mac: Some(mac),
            kind: kind.to_owned(),
            alias: alias.to_owned(),
            ..Link::default()
        };
        let other = [2, 0, 0, 0, 0, 9];
        assert!(is_of(&link(7, &owner, "veth", GATEWAY_MAC), &endpoint));
        assert!(is_of(&link(9, &owner, "veth", other), &endpoint), "one that says whose it is");
        assert!(is_of(&link(7, "uplink of near", "veth", GATEWAY_MAC), &endpoint));
        assert!(is_of(&link(7, "", "veth", GATEWAY_MAC), &endpoint));
        assert!(!is_of(&link(7, "cirri other/c/eth0", "veth", GATEWAY_MAC), &endpoint), "another workload's");
        assert!(!is_of(&link(8, "uplink of near", "veth", GATEWAY_MAC), &endpoint));
        assert!(!is_of(&link(7, "uplink of near", "veth", other), &endpoint), "its number is another's by now");
        assert!(!is_of(&link(7, "uplink of near", "dummy", GATEWAY_MAC), &endpoint));
    }
}
