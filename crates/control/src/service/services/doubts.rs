//! What is not served although nobody else has it: packets that would come back to where they came
//! from, or that would speak for the nodes themselves.

use super::choose::Endpoint;
use super::claims::{self, Place, Source};
use super::{ServiceName, Services};
use crate::service::{Frontend, FrontendKind, protocol_name};
use cirri_abi::{VXLAN_PORT, proto};
use std::net::SocketAddr;

impl Services {
    /// Why a source does not have a frontend that it asks for; `None`: it has it.
    pub(super) fn refusal(&self, source: &Source, frontend: &Frontend, protocol: u8) -> Option<String> {
        let name = format!("{}/{}", claims::describe(frontend), protocol_name(protocol));
        if frontend.shared && is_overlay(protocol, frontend.port) {
            return Some(format!(
                "{name} is where nodes send each other the packets of pods, and is not served; choose another port"
            ));
        }
        let other = |place: &Place| self.claims.owner(place).filter(|(_, owner)| *owner != source);
        // A node port holds for every address of a node.
        let as_node_port = || {
            let place = claims::node_place(frontend.addr.into(), frontend.port, protocol);
            other(&place).filter(|(kind, _)| frontend.shared && *kind < frontend.kind)
        };
        let (_, owner) = other(&claims::place(frontend, protocol)).or_else(as_node_port)?;
        Some(format!(
            "{name} belongs to {owner}, which comes first (ClusterIP before NodePort, LoadBalancer, ExternalIP and \
             HostPort; then the older, then by name), and is not served for this one; give one of them another address \
             or port"
        ))
    }

    /// Why an endpoint of a service is not used; `None`: it is.
    pub(super) fn doubt(&self, service: &ServiceName, endpoint: &Endpoint, protocol: u8) -> Option<String> {
        let at_node = self.nodes.is_node(endpoint.addr);
        let name = format!("{}/{}", SocketAddr::new(endpoint.addr, endpoint.port), protocol_name(protocol));
        // Clients outside would reach it with a node's address as theirs, and it believes nodes.
        if at_node && is_overlay(protocol, endpoint.port) {
            return Some(format!(
                "the endpoint {name} is where a node takes the packets of pods from others, and is not used; serve \
                 from another port"
            ));
        }
        let [exact, node_port] = places(endpoint, protocol);
        let place = if at_node { node_port } else { exact };
        let (kind, owner) = self.claims.owner(&place)?;
        let Source::Service(owner_name) = owner else { return None };
        let comes_back = match kind {
            // Other addresses of a node are programs' too: one in its network may well listen where a
            // load balancer's address leads to.
            _ if at_node => kind == FrontendKind::NodePort,
            // Anybody may bring an address; nobody elsewhere loses an endpoint by that.
            FrontendKind::ExternalIp => owner_name.namespace == service.namespace,
            _ => true,
        };
        let addr = if at_node { cirri_abi::Addr::UNSPECIFIED } else { endpoint.addr.into() };
        let frontend = claims::describe(&Frontend { addr, port: endpoint.port, kind, shared: at_node });
        comes_back.then(|| {
            format!(
                "the endpoint {name} is {frontend} of {owner} itself, so that packets could go round for ever, and is \
                 not used; name the endpoints behind it instead"
            )
        })
    }

    /// The places on whose owners it depends whether an endpoint is used. The first is watched for its
    /// address too, which may become a node's.
    pub(super) fn watched(&self, endpoint: &Endpoint, protocol: u8) -> impl Iterator<Item = Place> + use<> {
        let count = if self.nodes.is_node(endpoint.addr) { 2 } else { 1 };
        places(endpoint, protocol).into_iter().take(count)
    }
}

/// An endpoint's place, and that of a node port with its number.
fn places(endpoint: &Endpoint, protocol: u8) -> [Place; 2] {
    let Endpoint { addr, port, .. } = endpoint;
    [(cirri_abi::Addr::from(*addr).octets(), *port, protocol), claims::node_place(*addr, *port, protocol)]
}

/// The port of the overlay.
fn is_overlay(protocol: u8, port: u16) -> bool {
    protocol == proto::UDP && port == VXLAN_PORT
}
