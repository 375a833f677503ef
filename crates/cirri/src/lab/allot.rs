//! What an API server and a cloud would give to a service that does not ask for it by name: cluster addresses, node
//! ports, health check ports, and a load balancer's addresses.
//!
//! The choice follows from the service's name, so that the same manifests come out alike in every lab; what a service
//! has in the store already it keeps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cirri_control::resource::Resource;
use ipnet::IpNet;
use serde_json::{Value, json};

use super::manifests::{Rejected, describe};
use super::service::Service;

/// Cluster addresses.
pub const CLUSTER: [IpNet; 2] = [
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 0)), 16),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0)), 112),
];
/// Addresses of load balancers.
pub const LOAD_BALANCER: [IpNet; 2] = [
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 128)), 25),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x1b, 0, 0, 0, 0, 0)), 112),
];
/// Node ports: the first, and how many.
const NODE_PORTS: (u16, u16) = (30_000, 2768);
/// Addresses of a range that are left to those who choose by hand.
const BY_HAND: u32 = 32;

/// Fills in what the services among these resources leave open. `stored` is what the store holds now.
///
/// # Errors
/// [`Rejected`] if a range is used up.
pub fn allot(resources: Vec<Resource>, stored: &BTreeMap<String, String>) -> Result<Vec<Resource>, Rejected> {
    let mut documents: BTreeMap<usize, (String, Value, Service)> = BTreeMap::new();
    let mut taken = Taken::default();
    for (index, resource) in resources.iter().enumerate().filter(|(_, resource)| resource.kind() == "Service") {
        let text = resource.to_json();
        // What a resource writes of itself is JSON.
        let document: Value = serde_json::from_str(&text).map_err(|error| refused(resource, &error.to_string()))?;
        let service = Service::read(&text).map_err(|error| refused(resource, &format!("{error:#}")))?;
        taken.add(&service);
        documents.insert(index, (resource.store_key(), document, service));
    }
    // What was given before, unless somebody asks for it by name now.
    let before: BTreeMap<usize, Service> = documents
        .iter()
        .filter_map(|(index, (key, ..))| Some((*index, Service::read(stored.get(key)?).ok()?)))
        .collect();
    let mut allotment = Allotment { taken, reserved: Taken::default() };
    before.values().for_each(|service| allotment.reserved.add(service));

    let mut all = Vec::new();
    for (index, resource) in resources.into_iter().enumerate() {
        let Some((key, mut document, service)) = documents.remove(&index) else {
            all.push(resource);
            continue;
        };
        if service.spec.kind == "ExternalName" || service.is_headless() {
            all.push(resource);
            continue;
        }
        let filled = allotment
            .fill(&key, &mut document, &service, before.get(&index))
            .and_then(|()| Resource::from_json(&document.to_string()).map_err(|error| error.to_string()));
        all.push(filled.map_err(|problem| refused(&resource, &problem))?);
    }
    Ok(all)
}

fn refused(resource: &Resource, problem: &str) -> Rejected {
    Rejected(vec![format!("{}: {problem}", describe(resource))])
}

/// What belongs to somebody.
#[derive(Debug, Default)]
struct Taken {
    cluster: BTreeSet<IpAddr>,
    load_balancer: BTreeSet<IpAddr>,
    ports: BTreeSet<u16>,
}

impl Taken {
    fn add(&mut self, service: &Service) {
        self.cluster.extend(service.cluster_ips());
        self.load_balancer.extend(service.load_balancer_ips());
        self.load_balancer.extend(service.spec.load_balancer_ip);
        self.load_balancer.extend(&service.spec.external_ips);
        self.ports.extend(service.spec.ports.iter().map(|port| port.node_port).filter(|port| *port > 0));
        self.ports.extend([service.spec.health_check_node_port].into_iter().filter(|port| *port > 0));
    }
}

struct Allotment {
    /// Asked for by name, or given in this round.
    taken: Taken,
    /// Given before; nobody else gets it while its owner is there.
    reserved: Taken,
}

impl Allotment {
    fn fill(
        &mut self,
        key: &str,
        document: &mut Value,
        service: &Service,
        before: Option<&Service>,
    ) -> Result<(), String> {
        let families = families(service);
        let mut addresses = service.cluster_ips();
        for v6 in families.iter().copied() {
            if addresses.iter().all(|address| address.is_ipv6() != v6) {
                let kept = before.and_then(|before| before.cluster_ips().into_iter().find(|a| a.is_ipv6() == v6));
                addresses.push(self.address(Kind::Cluster, v6, key, kept)?);
            }
        }
        // In the order of the families: the first is the service's main one.
        addresses.sort_by_key(|address| families.iter().position(|v6| *v6 == address.is_ipv6()));
        document["spec"]["clusterIP"] = json!(addresses.first());
        document["spec"]["clusterIPs"] = json!(addresses);
        document["spec"]["ipFamilies"] =
            addresses.iter().map(|address| if address.is_ipv6() { "IPv6" } else { "IPv4" }).collect();

        let balanced = service.spec.kind == "LoadBalancer";
        let wants_ports = service.spec.kind == "NodePort"
            || balanced && service.spec.allocate_load_balancer_node_ports != Some(false);
        for (index, port) in
            service.spec.ports.iter().enumerate().filter(|(_, port)| wants_ports && port.node_port == 0)
        {
            let same = |other: &&super::service::ServicePort| {
                (&other.name, other.port, &other.protocol) == (&port.name, port.port, &port.protocol)
            };
            let kept = before.and_then(|before| before.spec.ports.iter().find(same)).map(|port| port.node_port);
            document["spec"]["ports"][index]["nodePort"] = json!(self.port(&format!("{key}#{index}"), kept)?);
        }
        let local = service.spec.external_traffic_policy.as_deref() == Some("Local");
        if balanced && local && service.spec.health_check_node_port == 0 {
            let kept = before.map(|before| before.spec.health_check_node_port);
            document["spec"]["healthCheckNodePort"] = json!(self.port(&format!("{key}#health"), kept)?);
        }
        if balanced && service.load_balancer_ips().is_empty() {
            let mut ingress = Vec::new();
            for v6 in families {
                let asked = service.spec.load_balancer_ip.filter(|address| address.is_ipv6() == v6);
                let kept = before.and_then(|b| b.load_balancer_ips().into_iter().find(|a| a.is_ipv6() == v6));
                let address = match asked {
                    Some(address) => address,
                    None => self.address(Kind::LoadBalancer, v6, key, kept)?,
                };
                ingress.push(json!({"ip": address}));
            }
            document["status"]["loadBalancer"]["ingress"] = ingress.into();
        }
        Ok(())
    }

    fn address(&mut self, kind: Kind, v6: bool, key: &str, kept: Option<IpAddr>) -> Result<IpAddr, String> {
        let range = match kind {
            Kind::Cluster => CLUSTER[usize::from(v6)],
            Kind::LoadBalancer => LOAD_BALANCER[usize::from(v6)],
        };
        let (taken, reserved) = match kind {
            Kind::Cluster => (&mut self.taken.cluster, &self.reserved.cluster),
            Kind::LoadBalancer => (&mut self.taken.load_balancer, &self.reserved.load_balancer),
        };
        if let Some(kept) = kept.filter(|kept| range.contains(kept) && !taken.contains(kept)) {
            taken.insert(kept);
            return Ok(kept);
        }
        let bits = range.max_prefix_len() - range.prefix_len();
        // The first is the range's name, the last its broadcast address.
        let (first, count) = (BY_HAND, (1_u32 << bits) - BY_HAND - 1);
        let start = hash(&format!("{key}/{v6}")) % count;
        let candidates = (0..count).map(|step| nth(range, first + (start + step) % count));
        let free = candidates.into_iter().find(|address| !taken.contains(address) && !reserved.contains(address));
        let free = free.ok_or_else(|| format!("no address of {range} is left"))?;
        taken.insert(free);
        Ok(free)
    }

    fn port(&mut self, key: &str, kept: Option<u16>) -> Result<u16, String> {
        let (first, count) = NODE_PORTS;
        let is_one = |port: &u16| (first..first + count).contains(port);
        if let Some(kept) = kept.filter(|kept| is_one(kept) && !self.taken.ports.contains(kept)) {
            self.taken.ports.insert(kept);
            return Ok(kept);
        }
        let start = hash(key) % u32::from(count);
        let candidates = (0..u32::from(count)).map(|step| (start + step) % u32::from(count));
        let mut candidates = candidates.filter_map(|offset| first.checked_add(u16::try_from(offset).ok()?));
        let free = candidates.find(|port| !self.taken.ports.contains(port) && !self.reserved.ports.contains(port));
        let free = free.ok_or("no node port is left")?;
        self.taken.ports.insert(free);
        Ok(free)
    }
}

enum Kind {
    Cluster,
    LoadBalancer,
}

/// The families of a service, the main one first; whether each is IPv6.
fn families(service: &Service) -> Vec<bool> {
    let mut families: Vec<bool> = service.spec.ip_families.iter().map(|family| family == "IPv6").collect();
    families.extend(service.cluster_ips().iter().map(IpAddr::is_ipv6));
    if families.is_empty() {
        families.push(false);
    }
    if matches!(service.spec.ip_family_policy.as_deref(), Some("PreferDualStack" | "RequireDualStack")) {
        families.push(!families[0]);
    }
    let first = families[0];
    let second = families.contains(&!first);
    if second { vec![first, !first] } else { vec![first] }
}

fn nth(range: IpNet, n: u32) -> IpAddr {
    match range.network() {
        IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits() | n).into(),
        IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits() | u128::from(n)).into(),
    }
}

/// FNV-1a.
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use cirri_control::resource::parse_documents;

    use super::*;

    fn manifest(name: &str, spec: &str) -> String {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}, ports: [{{name: a, port: 80}}, {{name: b, port: 81}}]}}\n"
        )
    }

    fn allotted(text: &str, stored: &BTreeMap<String, String>) -> Vec<Service> {
        let resources = allot(parse_documents("t.yaml", text).unwrap(), stored).unwrap();
        resources.iter().map(|resource| Service::read(&resource.to_json()).unwrap()).collect()
    }

    #[test]
    fn a_service_gets_what_its_type_and_families_need_and_the_same_every_time() {
        let text = [
            manifest("one", "type: ClusterIP"),
            manifest("two", "type: NodePort, ipFamilyPolicy: RequireDualStack"),
            manifest("three", "type: LoadBalancer, ipFamilies: [IPv6], externalTrafficPolicy: Local"),
            manifest("four", "clusterIP: None"),
        ]
        .concat();
        let all = allotted(&text, &BTreeMap::new());
        assert_eq!(all, allotted(&text, &BTreeMap::new()));
        let families: Vec<Vec<bool>> =
            all.iter().map(|service| service.cluster_ips().iter().map(IpAddr::is_ipv6).collect()).collect();
        assert_eq!(families, [vec![false], vec![false, true], vec![true], vec![]]);
        for service in &all[..3] {
            assert!(service.cluster_ips().iter().all(|address| CLUSTER.iter().any(|range| range.contains(address))));
        }
        let ports = |service: &Service| service.spec.ports.iter().filter(|port| port.node_port >= 30_000).count();
        assert_eq!(all.iter().map(ports).collect::<Vec<_>>(), [0, 2, 2, 0]);
        assert!(all[2].load_balancer_ips().iter().all(|address| LOAD_BALANCER[1].contains(address)));
        assert_eq!((all[2].load_balancer_ips().len(), all[1].load_balancer_ips().len()), (1, 0));
        assert!(all[2].spec.health_check_node_port >= 30_000 && all[1].spec.health_check_node_port == 0);
    }

    #[test]
    fn what_is_asked_for_by_name_stands_and_nobody_else_gets_it() {
        let alone = allotted(&manifest("one", "type: NodePort"), &BTreeMap::new());
        let wanted = alone[0].cluster_ips()[0];
        let other = manifest("zero", &format!("type: NodePort, clusterIP: {wanted}"));
        let both = allotted(&[manifest("one", "type: NodePort"), other].concat(), &BTreeMap::new());
        assert_eq!(both[1].cluster_ips(), [wanted]);
        assert_ne!(both[0].cluster_ips(), [wanted]);
        let ports: BTreeSet<u16> = both.iter().flat_map(|s| s.spec.ports.iter().map(|port| port.node_port)).collect();
        assert_eq!(ports.len(), 4);
    }

    #[test]
    fn what_a_service_has_it_keeps() {
        let text = manifest("one", "type: LoadBalancer, clusterIP: 10.96.7.7");
        let first = allot(parse_documents("t.yaml", &text).unwrap(), &BTreeMap::new()).unwrap();
        let stored = BTreeMap::from([(first[0].store_key(), first[0].to_json())]);
        let again = allotted(&manifest("one", "type: LoadBalancer"), &stored);
        assert_eq!(again[0].cluster_ips(), ["10.96.7.7".parse::<IpAddr>().unwrap()]);
        assert_eq!(again, [Service::read(&first[0].to_json()).unwrap()]);
    }
}
