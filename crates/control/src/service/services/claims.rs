//! Who has an address and port that several want.
//!
//! Resources decide, not the order in which they came: every node must come to the same end. First
//! comes the kind of address: a cluster address and a node port are the cluster's own to give, one of a
//! load balancer was given by somebody, and one that its owner brings may be anybody's, so that nobody
//! can take today what is given to another tomorrow. Then the older one has it, as far as somebody kept
//! a record; then the one whose name comes first.

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
    /// It is about to end, and leaves its place to its successor.
    pub terminating: bool,
    /// No record of its creation.
    pub undated: bool,
    /// When it was created.
    pub created: String,
}

/// Address, port and protocol.
pub type Place = ([u8; 16], u16, u8);

/// One source's wish for one place. Less is earlier.
type Claim = (FrontendKind, Rank, Source);

/// Who wants what.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    /// By place, who wants it, best first.
    places: BTreeMap<Place, Vec<Claim>>,
    by_source: HashMap<Source, (Rank, Vec<(Place, FrontendKind)>)>,
    /// By place, for whom it matters who has it.
    watched: BTreeMap<Place, Vec<Source>>,
    by_watcher: HashMap<Source, Vec<Place>>,
}

impl Claims {
    /// Notes what a source wants now, and as what. Answers whom that may concern.
    pub fn set(&mut self, source: &Source, rank: &Rank, mut wanted: Vec<(Place, FrontendKind)>) -> Vec<Source> {
        wanted.sort_unstable();
        // A place that it wants as several is its as the best of them.
        wanted.dedup_by_key(|(place, _)| *place);
        let (old_rank, old) = self.by_source.remove(source).unwrap_or_default();
        let mut concerned = Vec::new();
        if old_rank != *rank || old != wanted {
            for (place, _) in &old {
                concerned.extend(self.watched.get(place).into_iter().flatten().cloned());
                if let Some(all) = self.places.get_mut(place) {
                    all.retain(|(.., other)| other != source);
                    concerned.extend(all.iter().map(|(.., other)| other.clone()));
                    if all.is_empty() {
                        self.places.remove(place);
                    }
                }
            }
            for (place, kind) in &wanted {
                concerned.extend(self.watched.get(place).into_iter().flatten().cloned());
                let all = self.places.entry(*place).or_default();
                concerned.extend(all.iter().map(|(.., other)| other.clone()));
                let claim = (*kind, rank.clone(), source.clone());
                all.insert(all.partition_point(|other| *other < claim), claim);
            }
        }
        if !wanted.is_empty() {
            self.by_source.insert(source.clone(), (rank.clone(), wanted));
        }
        concerned
    }

    /// Notes for which places it matters to a source who has them.
    pub fn watch(&mut self, source: &Source, mut places: Vec<Place>) {
        places.sort_unstable();
        places.dedup();
        let old = match places.is_empty() {
            true => self.by_watcher.remove(source),
            false => self.by_watcher.insert(source.clone(), places.clone()),
        };
        let old = old.unwrap_or_default();
        for place in old.iter().filter(|place| places.binary_search(place).is_err()) {
            if let Some(all) = self.watched.get_mut(place) {
                all.retain(|other| other != source);
                if all.is_empty() {
                    self.watched.remove(place);
                }
            }
        }
        for place in places.iter().filter(|place| old.binary_search(place).is_err()) {
            self.watched.entry(*place).or_default().push(source.clone());
        }
    }

    /// Who has a place, and as what.
    pub fn owner(&self, place: &Place) -> Option<(FrontendKind, &Source)> {
        self.places.get(place)?.first().map(|(kind, _, source)| (*kind, source))
    }

    /// Everybody who wants something at an address, or to whom it matters who has it.
    pub fn at(&self, addr: Addr) -> Vec<Source> {
        let octets = addr.octets();
        let range = (octets, 0, 0)..=(octets, u16::MAX, u8::MAX);
        let wanting = self.places.range(range.clone()).flat_map(|(_, all)| all.iter().map(|(.., source)| source));
        wanting.chain(self.watched.range(range).flat_map(|(_, all)| all)).cloned().collect()
    }
}

/// The place of a frontend.
pub fn place(frontend: &Frontend, protocol: u8) -> Place {
    (frontend.addr.octets(), frontend.port, protocol)
}

/// The place of a port of the node's own addresses, in the family of one of them.
pub fn node_place(addr: IpAddr, port: u16, protocol: u8) -> Place {
    let any = if addr.is_ipv6() { Addr::UNSPECIFIED } else { Addr::ANY_V4 };
    (any.octets(), port, protocol)
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
