//! Who of a service's endpoints may be given to whom.

use crate::resource::{EndpointHints, TrafficPolicy};
use std::net::IpAddr;
use std::sync::Arc;

/// One endpoint of one service port.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// Where.
    pub addr: IpAddr,
    /// On which port.
    pub port: u16,
    /// It takes connections.
    pub ready: bool,
    /// It terminates, and still takes connections if nobody else does (KEP-1669).
    pub lingering: bool,
    /// It is on this node.
    pub local: bool,
    /// Share of new connections.
    pub weight: u16,
    /// Its node.
    pub node: Option<Arc<str>>,
    /// What it is.
    pub name: Option<Arc<str>>,
    /// Who is to use it.
    pub hints: Option<Arc<EndpointHints>>,
}

/// Where clients are that hints are followed for.
#[derive(Clone, Copy, Debug)]
pub struct Near<'a> {
    /// Their node.
    pub node: &'a str,
    /// Its zone.
    pub zone: Option<&'a str>,
}

/// The endpoints that clients may be given, as indexes: those of the node or all; the ready ones, or
/// if there are none the lingering ones. `near`: where hints are followed.
pub fn choose(endpoints: &[Endpoint], policy: TrafficPolicy, near: Option<Near<'_>>) -> Vec<usize> {
    let here = |endpoint: &Endpoint| policy == TrafficPolicy::Cluster || endpoint.local;
    let pick = |wanted: &dyn Fn(&Endpoint) -> bool| -> Vec<usize> {
        let fits = |(index, endpoint): (usize, &Endpoint)| (here(endpoint) && wanted(endpoint)).then_some(index);
        endpoints.iter().enumerate().filter_map(fits).collect()
    };
    let ready = pick(&|endpoint| endpoint.ready);
    if ready.is_empty() {
        return weighty(endpoints, pick(&|endpoint| endpoint.lingering));
    }
    let hinted = near.filter(|_| policy == TrafficPolicy::Cluster).and_then(|near| hinted(endpoints, &ready, near));
    weighty(endpoints, hinted.unwrap_or(ready))
}

/// Who is hinted at for clients there. Only if every one of the set has hints, and somebody is meant:
/// hints that are half written would send everybody to a few.
fn hinted(endpoints: &[Endpoint], set: &[usize], near: Near<'_>) -> Option<Vec<usize>> {
    let hints: Option<Vec<&EndpointHints>> = set.iter().map(|index| endpoints[*index].hints.as_deref()).collect();
    let hints = hints?;
    let meant = |names: &dyn for<'h> Fn(&'h EndpointHints) -> &'h [String], place: &str| {
        if hints.iter().any(|hints| names(hints).is_empty()) {
            return None;
        }
        let here = |hints: &EndpointHints| names(hints).iter().any(|name| name == place);
        let chosen: Vec<usize> = set.iter().zip(&hints).filter(|(_, hints)| here(hints)).map(|(at, _)| *at).collect();
        Some(chosen).filter(|chosen| !chosen.is_empty())
    };
    let by_node = meant(&|hints| hints.for_nodes.as_slice(), near.node);
    by_node.or_else(|| meant(&|hints| hints.for_zones.as_slice(), near.zone?))
}

/// Weight 0 is for those who get no new connections.
fn weighty(endpoints: &[Endpoint], set: Vec<usize>) -> Vec<usize> {
    set.into_iter().filter(|index| endpoints[*index].weight > 0).collect()
}
