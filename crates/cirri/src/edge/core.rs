//! What the load balancer knows, and the kernel's tables made like it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cirri_abi::{Addr, BackendState, Port, ServiceKey, SnatPool};
use cirri_control::service::table::{Capacity, Tables as Books, Write};
use cirri_control::service::{Backend, Frontend, FrontendKind, PortId, ServicePort};
use cirri_loader::{MapError, Tables};

use super::found::{self, BackendKey};
use super::health::{Checks, Health, Outcome, Target};
use super::plan::{Plan, Pool, Service};
use crate::agent::{Reach, changed_services, found_services, write_services};
use crate::files;

/// Everything that is known of what is balanced, and its rows in the kernel.
pub struct Core {
    /// What is in force.
    pub plan: Plan,
    /// The kernel's tables.
    pub tables: Tables,
    /// Who has which rows of them.
    pub books: Books,
    /// Numbers of pools, by name.
    pub pools: BTreeMap<String, u32>,
    /// Health of the backends that are checked.
    pub health: BTreeMap<Target, Health>,
    /// The checks.
    pub checks: Checks,
    /// Backends that somebody drained by hand.
    pub drained: BTreeSet<Target>,
    /// Whether backends were up for an earlier process, until the plan is first in force.
    found_up: BTreeMap<BackendKey, bool>,
    /// Whether the kernel refused a row: the books are ahead of it then.
    pub behind: Option<String>,
}

/// Why a plan is not in force. Nothing was changed, unless the kernel failed half-way.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// It does not fit.
    #[error(transparent)]
    Table(#[from] cirri_control::service::table::TableError),
    /// The kernel.
    #[error("{0}; it is tried again")]
    Kernel(#[from] MapError),
    /// What is to survive a restart cannot be written down.
    #[error("cannot write {path}: {source}")]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// The file of drained backends in the state directory.
pub const DRAINED: &str = "drained.json";

impl Core {
    /// With what an earlier process left. Nothing is in force but that, until [`Core::apply`].
    ///
    /// # Errors
    /// The kernel's, or the state directory cannot be read.
    pub fn resume(plan: Plan, tables: Tables, checks: Checks) -> Result<Core, ApplyError> {
        let found = found_services(&tables)?;
        let found_up = found::found(&found);
        let mut books = Books::new(capacity(&tables));
        books.restore(found);
        let drained = read_drained(&plan.state_dir)?;
        let mut core = Core {
            plan,
            tables,
            books,
            pools: BTreeMap::new(),
            health: BTreeMap::new(),
            checks,
            drained,
            found_up,
            behind: None,
        };
        core.pools = core.adopted_pools()?;
        Ok(core)
    }

    /// Puts a plan in force: all of it or, on error, nothing.
    ///
    /// # Errors
    /// See [`ApplyError`]. After an error of the kernel call [`Core::catch_up`].
    pub fn apply(&mut self, plan: Plan) -> Result<(), ApplyError> {
        let health = self.health_of(&plan);
        let drained: BTreeSet<Target> = targets(&plan).filter(|target| self.drained.contains(target)).collect();
        let (pools, rows) = self.numbered(&plan);
        let wanted: Vec<ServicePort> =
            plan.services.iter().map(|service| service_port(service, &pools, &health, &drained)).collect();
        let mut books = self.books.clone();
        let writes = settle(&mut books, &wanted)?;
        if drained != self.drained {
            write_drained(&plan.state_dir, &drained)?;
        }
        // From here on only the kernel can fail, and the books are what it shall be like.
        (self.books, self.plan, self.pools, self.health, self.drained) = (books, plan, pools, health, drained);
        self.found_up.clear();
        self.checks.follow(&self.plan);
        for (number, row) in rows {
            self.kernel(|tables| tables.snat_pools.put(&number, &row))?;
        }
        self.write(&writes)
    }

    /// Takes in outcomes of checks. Each service whose backends changed state is written once, however many of them
    /// did.
    ///
    /// # Errors
    /// The kernel's.
    pub fn note(&mut self, outcomes: &[Outcome]) -> Result<(), ApplyError> {
        let changed: BTreeSet<String> =
            outcomes.iter().filter(|it| self.is_news(it)).map(|it| it.target.service.clone()).collect();
        if changed.is_empty() { Ok(()) } else { self.refresh(changed) }
    }

    /// Whether a backend went up or down by an outcome.
    fn is_news(&mut self, outcome: &Outcome) -> bool {
        let Outcome { target, result } = outcome;
        let service = self.plan.services.iter().find(|service| service.name == target.service);
        // One that was on its way when the plan changed.
        let Some((check, health)) =
            service.and_then(|service| service.health.as_ref()).zip(self.health.get_mut(target))
        else {
            return false;
        };
        if !health.note(result, check, Instant::now()) {
            return false;
        }
        let Target { service, backend } = target;
        match result {
            Ok(_) => tracing::info!(service, backend, "backend is back"),
            Err(error) => tracing::warn!(service, backend, error, "backend is down; its connections go to others"),
        }
        true
    }

    /// Drains backends, or takes that back. Answers those that a name fits.
    ///
    /// # Errors
    /// It cannot be written down, or the kernel's.
    pub fn set_drained(&mut self, name: &str, drained: bool) -> Result<Vec<Target>, ApplyError> {
        let fits = self.named(name);
        let mut all = self.drained.clone();
        for target in &fits {
            if drained {
                all.insert(target.clone());
            } else {
                all.remove(target);
            }
        }
        if all != self.drained {
            write_drained(&self.plan.state_dir, &all)?;
            self.drained = all;
            self.refresh(fits.iter().map(|target| target.service.clone()))?;
        }
        Ok(fits)
    }

    /// The backends that a name fits: `NAME`, `SERVICE/NAME`, an address, an address and port.
    pub fn named(&self, name: &str) -> Vec<Target> {
        let (service, backend) = match name.split_once('/') {
            Some((service, backend)) => (Some(service), backend),
            None => (None, name),
        };
        let mut fits = Vec::new();
        for it in self.plan.services.iter().filter(|it| service.is_none_or(|service| it.name == service)) {
            for one in &it.backends {
                if one.name == backend || one.address.to_string() == backend || one.to_string() == backend {
                    fits.push(Target { service: it.name.clone(), backend: one.name.clone() });
                }
            }
        }
        fits
    }

    /// After the kernel refused a row: reads its tables again and makes them as they shall be.
    ///
    /// # Errors
    /// It refuses still.
    pub fn catch_up(&mut self) -> Result<(), ApplyError> {
        let mut books = Books::new(self.books.capacity());
        books.restore(found_services(&self.tables)?);
        self.books = books;
        self.behind = None;
        self.apply(self.plan.clone())
    }

    /// Makes rows right that somebody else changed, as far as they are looked at and `repair` agrees: it is asked about
    /// each, by its name and what became of it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn repair(&mut self, reach: Reach, mut repair: impl FnMut(&str, &str) -> bool) -> Result<(), ApplyError> {
        let (_, rows) = self.numbered(&self.plan);
        for (number, row) in rows {
            if repair(&format!("SNAT_POOLS {number}"), "altered") {
                self.kernel(|tables| tables.snat_pools.put(&number, &row))?;
            }
        }
        let writes = changed_services(&self.books, &self.tables, reach, repair)?;
        self.write(&writes)
    }

    /// The state of a backend as the tables are to have it, and why it is not active.
    pub fn state(&self, service: &Service, backend: &super::plan::Backend) -> (u8, String) {
        let target = Target { service: service.name.clone(), backend: backend.name.clone() };
        let state = state_of(&target, backend.weight, &self.health, &self.drained);
        let reason = match state {
            BackendState::DOWN => self.health.get(&target).map(|health| health.last.clone()).unwrap_or_default(),
            BackendState::DRAINING if self.drained.contains(&target) => "drained by hand".to_owned(),
            BackendState::DRAINING => "weight 0".to_owned(),
            _ => String::new(),
        };
        (state, reason)
    }

    /// Writes services anew whose backends changed state.
    fn refresh(&mut self, services: impl IntoIterator<Item = String>) -> Result<(), ApplyError> {
        let names: BTreeSet<String> = services.into_iter().collect();
        let services = self.plan.services.iter().filter(|service| names.contains(&service.name));
        let ports: Vec<_> =
            services.map(|service| service_port(service, &self.pools, &self.health, &self.drained)).collect();
        let (writes, outcome) = renew(&mut self.books, &ports);
        self.write(&writes)?;
        outcome
    }

    fn write(&mut self, writes: &[Write]) -> Result<(), ApplyError> {
        self.kernel(|tables| write_services(tables, writes))
    }

    fn kernel(&mut self, act: impl FnOnce(&Tables) -> Result<(), MapError>) -> Result<(), ApplyError> {
        act(&self.tables).map_err(|error| {
            self.behind = Some(error.to_string());
            error.into()
        })
    }

    /// Health for a plan's checks: what is known stays.
    fn health_of(&self, plan: &Plan) -> BTreeMap<Target, Health> {
        let now = Instant::now();
        let mut all = BTreeMap::new();
        for service in plan.services.iter().filter(|service| service.health.is_some()) {
            for backend in &service.backends {
                let target = Target { service: service.name.clone(), backend: backend.name.clone() };
                let known = self.health.get(&target).cloned().unwrap_or_else(|| {
                    let key = BackendKey::new(&service_key(service), backend.address, backend.port);
                    Health::new(self.found_up.get(&key).copied(), now)
                });
                all.insert(target, known);
            }
        }
        all
    }

    /// A number for every pool of a plan, and the rows that the kernel lacks. A pool keeps its number as
    /// long as its name, so that no service is given another's source while both change.
    fn numbered(&self, plan: &Plan) -> (BTreeMap<String, u32>, Vec<(u32, SnatPool)>) {
        let mut numbers: BTreeMap<String, u32> = self.pools.clone();
        numbers.retain(|name, _| plan.pool(name).is_some());
        let mut taken: BTreeSet<u32> = self.pools.values().copied().collect();
        for pool in &plan.pools {
            if !numbers.contains_key(&pool.name)
                && let Some(free) = (1..cirri_abi::map::SNAT_POOLS.max_entries).find(|number| taken.insert(*number))
            {
                numbers.insert(pool.name.clone(), free);
            }
        }
        let mut rows = Vec::new();
        for pool in &plan.pools {
            let Some(number) = numbers.get(&pool.name) else { continue };
            let row = pool_row(pool);
            if self.tables.snat_pools.get(number).ok().flatten() != Some(row) {
                rows.push((*number, row));
            }
        }
        (numbers, rows)
    }

    /// The numbers that pools had in the process before, told by their rows.
    fn adopted_pools(&self) -> Result<BTreeMap<String, u32>, MapError> {
        let rows = self.tables.snat_pools.entries()?;
        let mut adopted = BTreeMap::new();
        for pool in &self.plan.pools {
            let row = pool_row(pool);
            if let Some((number, _)) = rows.iter().find(|(number, found)| *number > 0 && *found == row) {
                adopted.insert(pool.name.clone(), *number);
            }
        }
        Ok(adopted)
    }
}

/// The key of a service's row.
pub fn service_key(service: &Service) -> ServiceKey {
    ServiceKey {
        addr: Addr::from(service.address),
        port: Port::new(service.port),
        proto: service.protocol.number(),
        _pad: 0,
    }
}

/// Takes service ports whose backends changed state. Whoever failed gets nothing more, whether or not another set
/// of slots fits.
fn renew(books: &mut Books, ports: &[ServicePort]) -> (Vec<Write>, Result<(), ApplyError>) {
    let (mut writes, mut outcome) = (Vec::new(), Ok(()));
    for port in ports {
        match books.set(port) {
            Ok(more) => writes.extend(more),
            Err(error) => {
                writes.extend(books.withdraw(port));
                outcome = Err(error.into());
            }
        }
    }
    (writes, outcome)
}

/// Makes the books hold exactly these service ports.
fn settle(books: &mut Books, wanted: &[ServicePort]) -> Result<Vec<Write>, ApplyError> {
    let ids: BTreeSet<&PortId> = wanted.iter().map(|port| &port.id).collect();
    let gone: Vec<PortId> = books.ports().map(|(_, port)| port.id.clone()).filter(|id| !ids.contains(id)).collect();
    // A service that has the address of another now, which has one of its own: that one gives way.
    let displaced: Vec<PortId> = wanted
        .iter()
        .filter_map(|port| {
            let frontend = port.frontends.first()?;
            let key =
                ServiceKey { addr: frontend.addr, port: Port::new(frontend.port), proto: port.id.protocol, _pad: 0 };
            books.owner(&key).filter(|owner| **owner != port.id && ids.contains(owner)).cloned()
        })
        .collect();
    let mut writes = Vec::new();
    for id in gone.iter().chain(&displaced) {
        writes.extend(books.remove(id));
    }
    for port in wanted {
        writes.extend(books.set(port)?);
    }
    writes.extend(books.sweep());
    Ok(writes)
}

fn service_port(
    service: &Service,
    pools: &BTreeMap<String, u32>,
    health: &BTreeMap<Target, Health>,
    drained: &BTreeSet<Target>,
) -> ServicePort {
    let mut port = ServicePort::new(service.id());
    port.frontends = vec![Frontend {
        addr: Addr::from(service.address),
        port: service.port,
        kind: FrontendKind::LoadBalancer,
        shared: false,
    }];
    for (index, backend) in service.backends.iter().enumerate() {
        let target = Target { service: service.name.clone(), backend: backend.name.clone() };
        let state = state_of(&target, backend.weight, health, drained);
        if state == BackendState::ACTIVE {
            port.outside.push(index);
        }
        port.backends.push(Backend {
            addr: backend.address,
            port: backend.port,
            state,
            weight: backend.weight,
            node: None,
            name: Some(backend.name.as_str().into()),
        });
    }
    port.inside = port.outside.clone();
    port.inside_only_cluster_ip = false;
    port.affinity = service.affinity;
    port.algorithm = service.algorithm_number();
    port.maglev_size = service.maglev_size;
    port.forwarding = service.forwarding.number();
    port.pool = service.pool.as_ref().and_then(|name| pools.get(name)).copied().unwrap_or_default();
    port.ranges = service.source_ranges.clone();
    port
}

fn state_of(target: &Target, weight: u16, health: &BTreeMap<Target, Health>, drained: &BTreeSet<Target>) -> u8 {
    if health.get(target).is_some_and(|health| !health.is_up()) {
        BackendState::DOWN
    } else if drained.contains(target) || weight == 0 {
        BackendState::DRAINING
    } else {
        BackendState::ACTIVE
    }
}

fn targets(plan: &Plan) -> impl Iterator<Item = Target> + '_ {
    plan.services.iter().flat_map(|service| {
        let of =
            |backend: &super::plan::Backend| Target { service: service.name.clone(), backend: backend.name.clone() };
        service.backends.iter().map(of)
    })
}

fn pool_row(pool: &Pool) -> SnatPool {
    SnatPool {
        v4: pool.v4.map_or(Addr::UNSPECIFIED, |v4| IpAddr::V4(v4).into()),
        v6: pool.v6.map_or(Addr::UNSPECIFIED, |v6| IpAddr::V6(v6).into()),
        first: Port::new(pool.ports.first),
        mask: (pool.ports.count() - 1) as u16,
        _pad: 0,
    }
}

fn capacity(tables: &Tables) -> Capacity {
    Capacity {
        services: tables.services.capacity(),
        backends: tables.backends.capacity(),
        slots: tables.slots.capacity(),
        ranges: tables.source_ranges.capacity(),
    }
}

fn read_drained(state_dir: &Path) -> Result<BTreeSet<Target>, ApplyError> {
    let path = state_dir.join(DRAINED);
    let text = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        other => other.map_err(|source| ApplyError::State { path: path.clone(), source })?,
    };
    let names: Vec<(String, String)> =
        serde_json::from_slice(&text).map_err(|error| ApplyError::State { path, source: error.into() })?;
    Ok(names.into_iter().map(|(service, backend)| Target { service, backend }).collect())
}

fn write_drained(state_dir: &Path, drained: &BTreeSet<Target>) -> Result<(), ApplyError> {
    let path = state_dir.join(DRAINED);
    let names: Vec<(&str, &str)> =
        drained.iter().map(|target| (target.service.as_str(), target.backend.as_str())).collect();
    let text = serde_json::to_vec(&names).unwrap_or_default();
    files::write_atomic(&path, &text).map_err(|source| ApplyError::State { path, source })
}

/// How long to wait before rows that the kernel refused are tried again.
pub const RETRY: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
