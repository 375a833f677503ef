//! What people and programs are told.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use cirri_abi::{BackendState, DropReason};
use cirri_loader::MapError;

use super::Shared;
use super::api::{
    BackendInfo, BackendStats, HealthStatus, PoolStatus, ServiceInfo, ServiceStats, Stats, Status, TableUse, Traffic,
};
use super::core::{Core, service_key};
use super::pools::{self, Source};
use crate::agent::{counters_by_name, resident_memory};
use crate::api::ApiError;

/// Name of the source that services have which name no pool.
pub const DEFAULT_POOL: &str = "default";

/// Everything for `cirri lb status`.
///
/// # Errors
/// The kernel does not tell.
pub async fn status(shared: &Arc<Shared>) -> Result<Status, ApiError> {
    let (mut status, full) = {
        // In this order, as everybody takes them who needs both.
        let machine = shared.machine.lock().await;
        let core = shared.core.lock().await;
        let drops = shared.drops.lock().unwrap_or_else(PoisonError::into_inner).status(&core.tables);
        let drops = drops.map_err(internal)?;
        let full = drops.iter().any(|it| it.reason == DropReason::NO_MASQUERADE_PORT.code);
        let mut backends = BTreeMap::new();
        for service in &core.plan.services {
            for backend in &service.backends {
                let (state, _) = core.state(service, backend);
                *backends.entry(BackendState::name(state).to_owned()).or_default() += 1;
            }
        }
        let serves = |service: &super::plan::Service| {
            service.backends.iter().any(|backend| core.state(service, backend).0 == BackendState::ACTIVE)
        };
        let refusing: Vec<String> =
            core.plan.services.iter().filter(|service| !serves(service)).map(|service| service.name.clone()).collect();
        let config = shared.config.lock().unwrap_or_else(PoisonError::into_inner).status(&shared.file);
        let mut warnings = Vec::new();
        if !config.error.is_empty() {
            warnings.push(format!("the file is not in force, its last good version is: {}", config.error));
        }
        warnings.extend(core.behind.iter().map(|why| format!("the kernel's tables are not as they shall be: {why}")));
        warnings.extend(machine.trouble.iter().cloned());
        let status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instance: core.plan.bpf.instance.clone(),
            abi: format!("{:016x}", cirri_abi::ABI_HASH),
            pid: std::process::id(),
            uptime_s: shared.started.elapsed().as_secs(),
            memory_bytes: resident_memory(),
            config,
            addresses: machine.sources(),
            devices: machine.attached.status(&core.plan),
            services: core.plan.services.len(),
            refusing,
            backends,
            health: health(&core),
            pools: Vec::new(),
            tables: uses(&core).map_err(internal)?,
            counters: counters_by_name(&core.tables)?,
            drops,
            warnings,
            problems: machine.drift.problems(),
            repaired: machine.drift.repaired(),
        };
        (status, full)
    };
    if full {
        status.pools = pools(shared, &[]).await?;
    }
    Ok(status)
}

/// Everything for `cirri lb list`.
///
/// # Errors
/// The kernel does not tell.
pub fn list(core: &Core) -> Result<Vec<ServiceInfo>, ApiError> {
    let mut all = Vec::with_capacity(core.plan.services.len());
    for service in &core.plan.services {
        let row = core.tables.services.get(&service_key(service)).map_err(internal)?.unwrap_or_default();
        let mut places: BTreeMap<u32, u32> = BTreeMap::new();
        for slot in row.outside_first..row.outside_first + row.outside_count {
            if let Some(slot) = core.tables.slots.get(&slot).map_err(internal)? {
                *places.entry(slot.backend).or_default() += 1;
            }
        }
        let numbers: BTreeMap<(IpAddr, u16), u32> = core
            .books
            .backends(&service.id())
            .into_iter()
            .map(|(number, backend)| ((backend.addr, backend.port), number))
            .collect();
        let backends = service.backends.iter().map(|backend| {
            let (state, reason) = core.state(service, backend);
            let number = numbers.get(&(backend.address, backend.port)).copied().unwrap_or_default();
            let got = places.get(&number).copied().unwrap_or_default();
            BackendInfo {
                name: backend.name.clone(),
                address: backend.address,
                port: backend.port,
                weight: backend.weight,
                state: BackendState::name(state).to_owned(),
                reason,
                share: f64::from(got) / f64::from(row.outside_count.max(1)),
                number,
            }
        });
        all.push(ServiceInfo {
            name: service.name.clone(),
            address: service.address,
            port: service.port,
            protocol: service.protocol.to_string(),
            algorithm: service.algorithm_name().to_owned(),
            slots: row.outside_count,
            forwarding: cirri_abi::Forwarding::name(service.forwarding.number()).to_owned(),
            affinity_s: service.affinity,
            pool: service.pool.clone().unwrap_or_default(),
            source_ranges: service.source_ranges.iter().map(ToString::to_string).collect(),
            state: if row.outside_count > 0 { "serving" } else { "refusing" }.to_owned(),
            backends: backends.collect(),
        });
    }
    Ok(all)
}

/// Everything for `cirri lb stats`.
///
/// # Errors
/// The kernel does not tell.
pub fn stats(core: &Core) -> Result<Stats, ApiError> {
    let mut services = Vec::with_capacity(core.plan.services.len());
    for service in &core.plan.services {
        let numbered = core.books.backends(&service.id());
        let counters = core.tables.backend_counters(numbered.iter().map(|(number, _)| *number)).map_err(internal)?;
        let counters: BTreeMap<u32, _> = counters.into_iter().collect();
        let mut backends = Vec::with_capacity(service.backends.len());
        for backend in &service.backends {
            let of = |(_, row): &&(u32, &cirri_control::service::Backend)| {
                (row.addr, row.port) == (backend.address, backend.port)
            };
            let counter = numbered.iter().find(of).and_then(|(number, _)| counters.get(number)).copied();
            let counter = counter.unwrap_or_default();
            backends.push(BackendStats {
                name: backend.name.clone(),
                address: backend.to_string(),
                total: Traffic {
                    connections: counter.connections,
                    packets: counter.packets,
                    bytes: counter.bytes,
                    answers: counter.answers,
                    rates: None,
                },
            });
        }
        let total = backends.iter().fold(Traffic::default(), |sum, backend| sum.plus(backend.total));
        services.push(ServiceStats { name: service.name.clone(), frontend: service.to_string(), total, backends });
    }
    Ok(Stats { at_s: super::monotonic_s(), services })
}

/// Who holds the ports of sources: of those that are named, or of all.
///
/// # Errors
/// There is none of a name, or the kernel does not tell.
pub async fn pools(shared: &Arc<Shared>, names: &[String]) -> Result<Vec<PoolStatus>, ApiError> {
    let own = shared.machine.lock().await.sources();
    let (tables, mut sources) = {
        let core = shared.core.lock().await;
        let default = Source { name: DEFAULT_POOL.to_owned(), addresses: own, ports: core.plan.snat_ports };
        let named = core.plan.pools.iter().map(|pool| Source {
            name: pool.name.clone(),
            addresses: pool.v4.map(IpAddr::V4).into_iter().chain(pool.v6.map(IpAddr::V6)).collect(),
            ports: pool.ports,
        });
        (core.tables.clone(), [default].into_iter().chain(named).collect::<Vec<_>>())
    };
    if let Some(unknown) = names.iter().find(|name| !sources.iter().any(|source| source.name == **name)) {
        let known: Vec<&str> = sources.iter().map(|source| source.name.as_str()).collect();
        return Err(ApiError::new("not-found", format!("there is no pool {unknown}"))
            .hint(format!("pools: {}", known.join(", "))));
    }
    sources.retain(|source| names.is_empty() || names.contains(&source.name));
    let counted = tokio::task::spawn_blocking(move || pools::count(&tables, &sources)).await;
    counted.map_err(|error| ApiError::new("internal", error))?.map_err(internal)
}

fn health(core: &Core) -> Vec<HealthStatus> {
    let now = Instant::now();
    core.health
        .iter()
        .map(|(target, health)| HealthStatus {
            service: target.service.clone(),
            backend: target.backend.clone(),
            check: core.checks.describe(target).unwrap_or_default(),
            state: health.state().to_owned(),
            since_s: now.saturating_duration_since(health.since).as_secs(),
            changes: health.changes,
            last: health.last.clone(),
        })
        .collect()
}

fn uses(core: &Core) -> Result<Vec<TableUse>, MapError> {
    let (usage, capacity) = (core.books.usage(), core.books.capacity());
    let one = |name: &str, used: u64, size: u32| TableUse { name: name.to_owned(), used, size: size.into() };
    Ok(vec![
        one("service rows", usage.services.into(), capacity.services),
        one("backends", usage.backends.into(), capacity.backends),
        one("places of backends", usage.slots.into(), capacity.slots),
        one("source ranges", usage.ranges.into(), capacity.ranges),
    ])
}

fn internal(error: MapError) -> ApiError {
    ApiError::new("internal", error)
}
