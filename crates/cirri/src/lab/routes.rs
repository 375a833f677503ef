//! The router's way to the addresses that services have outside the cluster.
//!
//! Whole ranges lead to the first node, like the static routes of a small site. A service may name another node for
//! its addresses ([`super::service::VIA`]); addresses that its owner brings get a route in any case.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Context;
use cirri_control::resource::Resource;

use super::allot::{CLUSTER, LOAD_BALANCER};
use super::manifests::{Rejected, describe};
use super::process::write_json;
use super::service::{Service, VIA};
use super::state::Lab;
use super::underlay;

/// By address the node that the router sends it to.
pub type Routes = BTreeMap<IpAddr, String>;

/// The routes that these services need beside those of whole ranges.
///
/// # Errors
/// [`Rejected`] if one names a node that is not there.
pub fn wanted(lab: &Lab, resources: &[Resource]) -> Result<Routes, Rejected> {
    let mut routes = Routes::new();
    for resource in resources.iter().filter(|resource| resource.kind() == "Service") {
        let refused = |problem: String| Rejected(vec![format!("{}: {problem}", describe(resource))]);
        let service = Service::read(&resource.to_json()).map_err(|error| refused(format!("{error:#}")))?;
        let via = service.metadata.annotations.get(VIA);
        if let Some(node) = via {
            lab.node(node).map_err(|problem| refused(format!("metadata.annotations[{VIA}]: {problem}")))?;
        }
        let first = lab.nodes.first().map_or(String::new(), |node| node.name.clone());
        let node = via.cloned().unwrap_or(first);
        for address in service.load_balancer_ips().into_iter().chain(service.spec.external_ips.clone()) {
            let covered = LOAD_BALANCER.iter().any(|range| range.contains(&address));
            if via.is_some() || !covered {
                routes.insert(address, node.clone());
            }
        }
    }
    Ok(routes)
}

/// Makes the router's routes to single addresses equal to these.
///
/// # Errors
/// What the kernel refused.
pub fn put(lab: &Lab, wanted: &Routes) -> anyhow::Result<()> {
    let file = file(lab);
    let before: Routes = match fs::read_to_string(&file) {
        Ok(text) => serde_json::from_str(&text).with_context(|| format!("{} is damaged", file.display()))?,
        Err(_) => Routes::new(),
    };
    if before == *wanted {
        return Ok(());
    }
    let gone: Vec<IpAddr> = before.keys().filter(|address| !wanted.contains_key(*address)).copied().collect();
    let mut put = Vec::new();
    for (address, node) in wanted.iter().filter(|(address, node)| before.get(*address) != Some(*node)) {
        put.push((lab.node(node)?, (*address).into()));
    }
    underlay::change_routes(lab, &gone, &put)?;
    write_json(&file, wanted)
}

/// Tells the router the way to the ranges of services.
///
/// # Errors
/// What the kernel refused.
pub fn put_ranges(lab: &Lab) -> anyhow::Result<()> {
    let Some(first) = lab.nodes.first() else { return Ok(()) };
    // The cluster's own range too, as with the pods: that nobody outside is served there can be tried.
    let ranges: Vec<_> = CLUSTER.into_iter().chain(LOAD_BALANCER).map(|range| (first, range)).collect();
    underlay::change_routes(lab, &[], &ranges)
}

fn file(lab: &Lab) -> PathBuf {
    lab.name.directory().join("routes.json")
}

#[cfg(test)]
mod tests {
    use cirri_control::resource::parse_documents;

    use super::super::state::Routing;
    use super::*;

    fn routes(annotations: &str, external: &str, ingress: &str) -> Result<Routes, Rejected> {
        let lab = Lab::described(&"t".parse().unwrap(), &["n1".into(), "n2".into()], Routing::Overlay, &[]);
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web, annotations: {{{annotations}}}}}\nspec: {{type: LoadBalancer, externalIPs: [{external}], ports: [{{port: 80}}]}}\nstatus: {{loadBalancer: {{ingress: [{{ip: {ingress}}}]}}}}\n"
        );
        wanted(&lab, &parse_documents("t.yaml", &text).unwrap())
    }

    #[test]
    fn only_what_a_range_does_not_cover_or_a_service_asks_for_gets_a_route() {
        let route = |address: &str, node: &str| (address.parse::<IpAddr>().unwrap(), node.to_owned());
        assert_eq!(routes("", "", "203.0.113.130").unwrap(), Routes::new());
        assert_eq!(routes("", "192.0.2.1", "203.0.113.130").unwrap(), [route("192.0.2.1", "n1")].into());
        let via = routes("lab.cirri.io/via: n2", "192.0.2.1", "203.0.113.130").unwrap();
        assert_eq!(via, [route("192.0.2.1", "n2"), route("203.0.113.130", "n2")].into());
        let Rejected(problems) = routes("lab.cirri.io/via: n3", "", "203.0.113.130").unwrap_err();
        assert!(problems[0].contains("lab.cirri.io/via") && problems[0].contains("n3"), "{problems:?}");
    }
}
