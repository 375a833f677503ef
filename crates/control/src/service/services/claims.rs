//! Who has an address and port that several want.
//!
//! Resources decide, not the order in which they came: every node must come to the same end. The
//! older one has it, as far as somebody kept a record; then the one whose name comes first.

use super::{PodKey, ServiceName};
use crate::service::{Frontend, FrontendKind};
use cirri_abi::Addr;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What service ports are made of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// A service. Services come before pods.
    Service(Arc<ServiceName>),
    /// A pod of this node that asks for ports of it.
    Pod(Arc<PodKey>),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Service(name) => write!(f, "Service {name}"),
            Source::Pod(pod) => write!(f, "Pod {}/{}", pod.namespace, pod.name),
        }
    }
}

/// Who comes first. Less is earlier; the source itself decides between equals.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// A pod, which comes after all services.
    pub pod: bool,
    /// It is about to end, and leaves its place to its successor.
    pub terminating: bool,
    /// No record of its creation.
    pub undated: bool,
    /// When it was created.
    pub created: String,
}

/// Address, port and protocol.
pub type Place = ([u8; 16], u16, u8);

/// Who wants what.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    /// By place, who wants it, best first.
    places: BTreeMap<Place, Vec<(Rank, Source)>>,
    by_source: HashMap<Source, (Rank, Vec<Place>)>,
}

impl Claims {
    /// Notes what a source wants now. Answers which others may win or lose by that.
    pub fn set(&mut self, source: &Source, rank: &Rank, mut wanted: Vec<Place>) -> Vec<Source> {
        wanted.sort_unstable();
        wanted.dedup();
        let (old_rank, old) = self.by_source.remove(source).unwrap_or_default();
        let mut concerned = Vec::new();
        if old_rank != *rank || old != wanted {
            for place in &old {
                if let Some(all) = self.places.get_mut(place) {
                    all.retain(|(_, other)| other != source);
                    concerned.extend(all.iter().map(|(_, other)| other.clone()));
                    if all.is_empty() {
                        self.places.remove(place);
                    }
                }
            }
            for place in &wanted {
                let all = self.places.entry(*place).or_default();
                concerned.extend(all.iter().map(|(_, other)| other.clone()));
                let claim = (rank.clone(), source.clone());
                all.insert(all.partition_point(|other| *other < claim), claim);
            }
        }
        if !wanted.is_empty() {
            self.by_source.insert(source.clone(), (rank.clone(), wanted));
        }
        concerned
    }

    /// Who has a frontend.
    pub fn owner(&self, frontend: &Frontend, protocol: u8) -> Option<&Source> {
        self.places.get(&place(frontend, protocol))?.first().map(|(_, source)| source)
    }

    /// Everybody who wants something at an address.
    pub fn at(&self, addr: Addr) -> Vec<Source> {
        let octets = addr.octets();
        let all = self.places.range((octets, 0, 0)..=(octets, u16::MAX, u8::MAX));
        all.flat_map(|(_, all)| all.iter().map(|(_, source)| source.clone())).collect()
    }
}

/// The place of a frontend.
pub fn place(frontend: &Frontend, protocol: u8) -> Place {
    (frontend.addr.octets(), frontend.port, protocol)
}

/// The place of a health check port: a TCP port of the node.
pub fn health_check(port: u16) -> Frontend {
    Frontend { addr: Addr::ANY_V4, port, kind: FrontendKind::NodePort, shared: false }
}

/// A frontend as people see it.
pub fn describe(frontend: &Frontend) -> String {
    match IpAddr::from(frontend.addr) {
        addr if addr.is_unspecified() => format!("{} {}", frontend.kind.name(), frontend.port),
        addr => format!("{} {}", frontend.kind.name(), SocketAddr::new(addr, frontend.port)),
    }
}
