//! Services: from resources to the kernel's tables, and what goes with them.
//!
//! Resources change [`Serving::sources`]; [`Serving::take_changes`] asks which service ports changed,
//! gives them their numbers, and queues the writes; [`Serving::carry_out`] does them in that order.
//! Only what changed is looked at. The queue is empty exactly when every service is in force.

mod health;
mod info;
mod repair;
mod sockets;
mod write;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cirri_abi::{BackendState, proto};
use cirri_control::service::table::{Capacity, TableError, Tables as Books, Write};
use cirri_control::service::{self, PortId, ServicePort, Services, Settings};
use cirri_loader::{EdgeStatus, Tables};

use super::node::Node;
use crate::api::{HealthCheckInfo, RowError, TableStatus};
use crate::config::{self, Config};

pub use health::serve as serve_health;
pub use info::count;
pub use repair::{Reach, changed, found};
pub use sockets::end as end_sockets;
pub use write::carry_out;

/// Services of the cluster, and how far they are in force on this node.
pub struct Serving {
    /// What resources say.
    pub sources: Services,
    /// Who has which number and row.
    pub books: Books,
    /// Writes that are not done yet, in order.
    queue: VecDeque<Group>,
    /// Why the first of them failed.
    failure: Option<Failure>,
    /// Service ports that do not fit into the tables; what they were before is in force.
    refused: BTreeMap<PortId, (ServicePort, TableError)>,
    /// Whether what an earlier run left and nobody wants was removed.
    swept: bool,
    /// Backends that another run may have left counters of: all of them.
    resumed: bool,
    /// Numbers of backends that were given back.
    used: HashSet<u32>,
    /// How many service ports have a datagram backend, and keep its flows.
    datagrams: HashMap<SocketAddr, u32>,
    /// Datagram backends that are over: sockets that are connected to them must end.
    over: BTreeSet<SocketAddr>,
    /// This node's addresses.
    own: HashSet<IpAddr>,
    /// Backends at one of them.
    on_node: usize,
    /// What became of the ports of `healthCheckNodePort`.
    pub health: Vec<HealthCheckInfo>,
    /// How the node's devices are served.
    pub edges: BTreeMap<String, EdgeStatus>,
    /// Why sockets are not translated although they should be.
    pub socket_error: String,
}

/// The key of the one row of [`super::rows::Rows::sockets`].
pub const SOCKETS: &str = "sockets";

/// Writes that belong together.
#[derive(Debug)]
struct Group {
    /// Whose; `None` for what an earlier run left.
    id: Option<Arc<PortId>>,
    writes: Vec<Write>,
    /// Nothing of it takes anything away, and nothing leads to it yet: it may be done together with others.
    adds: bool,
}

#[derive(Debug)]
struct Failure {
    why: String,
    attempts: u32,
    next: Instant,
}

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

impl Serving {
    /// Nothing is served yet.
    pub fn new(config: &Config, node: &Node, tables: &Tables) -> Serving {
        let capacity = Capacity {
            services: tables.services.capacity(),
            backends: tables.backends.capacity(),
            slots: tables.slots.capacity(),
            ranges: tables.source_ranges.capacity(),
        };
        Serving::with(settings(config, node), capacity)
    }

    fn with(settings: Settings, capacity: Capacity) -> Serving {
        Serving {
            own: settings.node_addresses.iter().copied().collect(),
            sources: Services::new(settings),
            books: Books::new(capacity),
            queue: VecDeque::new(),
            failure: None,
            refused: BTreeMap::new(),
            swept: false,
            resumed: false,
            used: HashSet::new(),
            datagrams: HashMap::new(),
            over: BTreeSet::new(),
            on_node: 0,
            health: Vec::new(),
            edges: BTreeMap::new(),
            socket_error: String::new(),
        }
    }

    /// The node's addresses changed.
    pub fn set_node(&mut self, config: &Config, node: &Node) {
        self.sources.set_settings(settings(config, node));
        self.own = node.addresses.iter().copied().collect();
        self.on_node = self.books.ports().map(|(_, port)| self.count_on_node(port)).sum();
    }

    /// Whether a backend is in the node's own network namespace: its answers leave by the node's stack.
    pub fn has_host_backends(&self) -> bool {
        self.on_node > 0
    }

    /// Takes in what resources say now. Only with everything known: what an earlier run left and nobody
    /// wants is removed by the first call. Whether anything changed.
    pub fn take_changes(&mut self) -> bool {
        let changes = self.sources.changes();
        let any = !changes.is_empty();
        let mut freed = false;
        for (id, port) in changes {
            freed |= self.books.port(&id).is_some();
            match port {
                Some(port) => self.take(port),
                None => self.drop_port(&id),
            }
        }
        if !std::mem::replace(&mut self.swept, true) {
            let writes = self.books.sweep();
            freed |= !writes.is_empty();
            self.push(None, writes, false);
        }
        if freed {
            // What did not fit may fit now.
            for (port, _) in std::mem::take(&mut self.refused).into_values() {
                self.take(port);
            }
        }
        any
    }

    /// Whether every service is in force.
    pub fn is_done(&self) -> bool {
        self.queue.is_empty()
    }

    /// When the writes that failed are tried again.
    pub fn next_due(&self) -> Option<Instant> {
        self.failure.as_ref().map(|failure| failure.next)
    }

    /// Does what is queued, as far as the kernel takes it.
    pub fn carry_out(&mut self, tables: &Tables, now: Instant) {
        if self.failure.as_ref().is_some_and(|failure| failure.next > now) {
            return;
        }
        while !self.queue.is_empty() {
            let adding = self.queue.iter().take_while(|group| group.adds).count().max(1);
            let writes = match adding {
                1 => write::one(&self.queue[0].writes),
                _ => write::together(self.queue.iter().take(adding).flat_map(|group| &group.writes)),
            };
            let counted = |number: &u32| self.resumed || self.used.contains(number);
            let mut released = Vec::new();
            let outcome = write::write(tables, &writes, counted, &mut released);
            for released in released {
                self.used.insert(released.number);
                self.over.extend(released.datagrams.filter(|to| !self.datagrams.contains_key(to)));
            }
            match outcome {
                Ok(()) => {
                    self.queue.drain(..adding);
                    self.failure = None;
                }
                Err(error) => {
                    let attempts = self.failure.as_ref().map_or(0, |failure| failure.attempts) + 1;
                    let pause = FIRST_PAUSE.saturating_mul(1 << (attempts - 1).min(20)).min(LONGEST_PAUSE);
                    tracing::warn!(%error, "services not done; they are tried again");
                    self.failure = Some(Failure { why: error.to_string(), attempts, next: now + pause });
                    return;
                }
            }
        }
    }

    /// Datagram backends that went away since the last call.
    pub fn take_over(&mut self) -> BTreeSet<SocketAddr> {
        std::mem::take(&mut self.over)
    }

    /// For `cirri status`.
    pub fn status(&self) -> TableStatus {
        let waiting: BTreeSet<_> = self.queue.iter().map(|group| &group.id).collect();
        let failed = |failure: &Failure| {
            let first = self.queue.front().and_then(|group| group.id.as_ref());
            let key = first.map_or_else(|| "what an earlier run left".to_owned(), |id| id.to_string());
            RowError { key, error: failure.why.clone(), attempts: failure.attempts }
        };
        let errors: Vec<_> = self.failure.iter().map(failed).collect();
        TableStatus {
            name: "services".to_owned(),
            done: (self.books.usage().ports as usize).saturating_sub(waiting.len()),
            pending: waiting.len() - errors.len().min(waiting.len()),
            errors,
        }
    }

    fn take(&mut self, port: ServicePort) {
        let before = self.books.port(&port.id).map(|(_, port)| port.clone());
        match self.books.set(&port) {
            Ok(writes) => {
                self.refused.remove(&port.id);
                // What another run left may be under a port that is new to us.
                let adds = before.is_none() && (self.swept || !self.resumed);
                self.tally(before.as_ref(), Some(&port));
                self.push(Some(port.id), writes, adds);
            }
            Err(error) => {
                tracing::error!(%error, "service refused; what it was before is in force");
                if matches!(error, TableError::Full { .. }) {
                    let writes = self.books.withdraw(&port);
                    self.push(Some(port.id.clone()), writes, false);
                }
                self.refused.insert(port.id.clone(), (port, error));
            }
        }
    }

    fn drop_port(&mut self, id: &PortId) {
        self.refused.remove(id);
        let before = self.books.port(id).map(|(_, port)| port.clone());
        let writes = self.books.remove(id);
        self.tally(before.as_ref(), None);
        self.push(Some(id.clone()), writes, false);
    }

    fn push(&mut self, id: Option<PortId>, writes: Vec<Write>, adds: bool) {
        if !writes.is_empty() {
            let adds = adds && writes.iter().all(write::adds);
            self.queue.push_back(Group { id: id.map(Arc::new), writes, adds });
        }
    }

    /// Keeps the counts right when a service port changes.
    fn tally(&mut self, before: Option<&ServicePort>, after: Option<&ServicePort>) {
        self.on_node += after.map_or(0, |port| self.count_on_node(port));
        self.on_node -= before.map_or(0, |port| self.count_on_node(port));
        for to in after.into_iter().flat_map(datagram_backends) {
            *self.datagrams.entry(to).or_default() += 1;
        }
        for to in before.into_iter().flat_map(datagram_backends) {
            if let Some(count) = self.datagrams.get_mut(&to) {
                *count -= 1;
                if *count == 0 {
                    self.datagrams.remove(&to);
                }
            }
        }
    }

    fn count_on_node(&self, port: &ServicePort) -> usize {
        port.backends.iter().filter(|backend| self.own.contains(&backend.addr)).count()
    }
}

/// Where a service port's datagrams may still go.
fn datagram_backends(port: &ServicePort) -> impl Iterator<Item = SocketAddr> {
    let kept = |state: u8| state == BackendState::ACTIVE || state == BackendState::DRAINING;
    let datagrams = port.id.protocol == proto::UDP;
    let backends = port.backends.iter().filter(move |backend| datagrams && kept(backend.state));
    backends.map(|backend| SocketAddr::new(backend.addr, backend.port))
}

fn settings(config: &Config, node: &Node) -> Settings {
    let services = &config.services;
    Settings {
        node: node.name.clone(),
        node_addresses: node.addresses.clone(),
        node_ports: (services.node_ports.first, services.node_ports.last),
        algorithm: match services.algorithm {
            config::Algorithm::Random => cirri_abi::Algorithm::RANDOM,
            config::Algorithm::Maglev => cirri_abi::Algorithm::MAGLEV,
        },
        forwarding: match services.forwarding {
            config::Forwarding::Snat => service::Mode::Snat,
            config::Forwarding::Dsr => service::Mode::Dsr,
            config::Forwarding::Hybrid => service::Mode::Hybrid,
        },
        dispatch: match services.dispatch {
            config::Dispatch::Option => service::Dispatch::Option,
            config::Dispatch::Ipip => service::Dispatch::Ipip,
        },
        maglev_size: (services.maglev_size > 0).then_some(services.maglev_size),
        external_cluster_ips: services.external_cluster_ips,
        topology: services.topology,
    }
}

#[cfg(test)]
mod tests {
    use cirri_control::service::{Backend, Frontend, FrontendKind};

    use super::*;

    fn serving() -> Serving {
        let settings = Settings { node_addresses: vec![[172, 16, 0, 1].into()], ..Settings::default() };
        Serving::with(settings, Capacity { backends: 4, ..Capacity::default() })
    }

    /// A datagram service at 10.96.0.`n` with these backends.
    fn port(n: u8, backends: &[[u8; 4]]) -> ServicePort {
        let id = PortId {
            namespace: "shop".to_owned(),
            service: format!("s{n}"),
            port: "dns".to_owned(),
            protocol: proto::UDP,
            v6: false,
        };
        let backend = |addr: &[u8; 4]| Backend {
            addr: (*addr).into(),
            port: 53,
            state: BackendState::ACTIVE,
            weight: 1,
            node: None,
            name: None,
        };
        ServicePort {
            frontends: vec![Frontend {
                addr: cirri_abi::Addr::v4([10, 96, 0, n]),
                port: 53,
                kind: FrontendKind::ClusterIp,
                shared: false,
            }],
            backends: backends.iter().map(backend).collect(),
            inside: (0..backends.len()).collect(),
            ..ServicePort::new(id)
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name_and_taken_as_soon_as_there_is_room() {
        let mut serving = serving();
        serving.take(port(1, &[[10, 0, 0, 1], [10, 0, 0, 2]]));
        serving.take(port(2, &[[10, 0, 0, 3], [10, 0, 0, 4]]));
        let problems = serving.problems();
        assert!(
            problems.len() == 1 && problems[0].contains("shop/s2") && problems[0].contains("backends"),
            "{problems:?}"
        );
        let infos = serving.infos(&crate::api::ServiceGet::default());
        assert!(infos[0].state == "pending" && infos[1].state.starts_with("error: "), "{infos:?}");

        serving.drop_port(&port(1, &[]).id);
        for (port, _) in std::mem::take(&mut serving.refused).into_values() {
            serving.take(port);
        }
        assert!(serving.problems().is_empty() && serving.books.usage().backends == 2);
        assert!(!serving.is_done() && serving.status().pending == 2);
    }

    #[test]
    fn a_change_that_does_not_fit_takes_away_what_is_gone() {
        let mut serving = serving();
        serving.take(port(1, &[[10, 0, 0, 1], [10, 0, 0, 2]]));
        let replaced = port(1, &[[10, 0, 0, 2], [10, 0, 0, 3], [10, 0, 0, 4]]);
        serving.take(replaced);
        assert_eq!((serving.problems().len(), serving.queue.len()), (1, 2), "{:?}", serving.problems());
        let gone: Vec<_> = serving.queue[1]
            .writes
            .iter()
            .filter_map(|write| match write {
                Write::Backend(_, row) => Some((IpAddr::from(row.addr), row.state)),
                _ => None,
            })
            .collect();
        assert_eq!(gone, [([10, 0, 0, 1].into(), BackendState::ABSENT)]);
        assert!(!serving.queue[1].adds);
    }

    #[test]
    fn backends_on_the_node_and_of_datagrams_are_counted_through_changes() {
        let mut serving = serving();
        let shared: SocketAddr = ([10, 0, 0, 1], 53).into();
        serving.take(port(1, &[[10, 0, 0, 1], [172, 16, 0, 1]]));
        serving.take(port(2, &[[10, 0, 0, 1]]));
        assert!(serving.has_host_backends() && serving.datagrams.len() == 2 && serving.datagrams[&shared] == 2);
        serving.take(port(1, &[]));
        assert!(!serving.has_host_backends() && serving.datagrams[&shared] == 1);
        serving.drop_port(&port(2, &[]).id);
        assert!(serving.datagrams.is_empty());
    }
}
