//! What types cannot say about a file, with the place where it is said.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use cirri_abi::map;
use cirri_control::cut::cut_message;
use cirri_control::service::maglev;
use serde_saphyr::{Location, Spanned};

use super::{Backend, Check, Plan, PlanError, Pool, Probe, Service, SocketText};
use crate::config::{Algorithm, PortRange};
use crate::edge::config::{self, CodeRange, File, ForwardingName, HealthKind, PortNumber, Protocol};

/// Largest weight of a backend: a random choice holds a backend once for each of it.
const HEAVIEST: u16 = 256;
/// Affinity is kept for a day at most.
const LONGEST_AFFINITY: u32 = 86_400;

/// Turns a file into a plan.
///
/// # Errors
/// The first thing that is wrong.
pub fn plan(path: &Path, file: File) -> Result<Plan, PlanError> {
    Checker { path }.plan(file)
}

struct Checker<'a> {
    path: &'a Path,
}

impl Checker<'_> {
    fn plan(&self, file: File) -> Result<Plan, PlanError> {
        self.whole(&file)?;
        let pools = self.pools(&file)?;
        let mut services = Vec::with_capacity(file.services.len());
        for service in &file.services {
            services.push(self.service(&file, &pools, service)?);
        }
        self.names(&file)?;
        self.frontends(&file, &services)?;
        self.loops(&file, &services)?;
        let plan = Plan {
            devices: file.devices,
            acceleration: file.acceleration,
            address: file.address,
            address6: file.address6,
            snat_ports: file.snat_ports,
            pools,
            services,
            state_dir: file.state_dir,
            bpf: file.bpf,
            log: file.log,
        };
        self.capacity(&plan)?;
        Ok(plan)
    }

    fn whole(&self, file: &File) -> Result<(), PlanError> {
        if file.devices.is_empty() {
            return Err(
                self.refuse("devices is empty; name the devices that clients and backends are behind, as [eth0]")
            );
        }
        for (place, device) in file.devices.iter().enumerate() {
            if file.devices[..place].contains(device) {
                return Err(self.refuse(format!("devices names {device} twice")));
            }
        }
        let instance = &file.bpf.instance;
        let simple = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if instance.is_empty() || instance.len() > 64 || !instance.chars().all(simple) {
            return Err(self.refuse(format!("bpf.instance is `{instance}`; use up to 64 letters, digits, `-` and `_`")));
        }
        if !file.state_dir.is_absolute() {
            return Err(self.refuse(format!("stateDir is `{}`; write an absolute path", file.state_dir.display())));
        }
        Ok(())
    }

    fn pools(&self, file: &File) -> Result<Vec<Pool>, PlanError> {
        let mut pools: Vec<Pool> = Vec::new();
        for Spanned { value: pool, referenced: at, .. } in &file.pools {
            self.name(*at, "a pool", &pool.name)?;
            let wrong = |what: String| Err(self.at(*at, format!("pool {}: {what}", pool.name)));
            if pools.iter().any(|known| known.name == pool.name) {
                return wrong("there is another pool of this name; rename one".to_owned());
            }
            if pool.address.is_none() && pool.address6.is_none() {
                return wrong("it has no address; give it address, address6 or both".to_owned());
            }
            let shares_address = |v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>| {
                pool.address.is_some() && pool.address == v4 || pool.address6.is_some() && pool.address6 == v6
            };
            for other in &pools {
                if shares_address(other.v4, other.v6) && overlap(other.ports, pool.ports) {
                    return wrong(format!(
                        "it has an address and ports of pool {}; take another address, or ports that do not overlap",
                        other.name
                    ));
                }
            }
            pools.push(Pool { name: pool.name.clone(), v4: pool.address, v6: pool.address6, ports: pool.ports });
        }
        if pools.len() >= map::SNAT_POOLS.max_entries as usize {
            return Err(self.refuse(format!(
                "{} pools are more than the {} that fit",
                pools.len(),
                map::SNAT_POOLS.max_entries - 1
            )));
        }
        Ok(pools)
    }

    fn service(&self, file: &File, pools: &[Pool], found: &Spanned<config::Service>) -> Result<Service, PlanError> {
        let Spanned { value: service, referenced: at, .. } = found;
        self.name(*at, "a service", &service.name)?;
        let wrong = |what: String| Err(self.at(*at, format!("service {}: {what}", service.name)));
        let defaults = &file.defaults;
        let address = service.address;
        if let Some(why) = unusable(address) {
            return wrong(format!("{address} is {why}; take an address of its own"));
        }
        let algorithm = service.algorithm.or(defaults.algorithm).unwrap_or(Algorithm::Maglev);
        let maglev_size = service.maglev_size.or(defaults.maglev_size).filter(|_| algorithm == Algorithm::Maglev);
        if let Some(size) = maglev_size
            && !maglev::SIZES.contains(&size)
        {
            return wrong(format!(
                "maglevSize {size} is none of the prime sizes that there are: {}",
                listed(&maglev::SIZES)
            ));
        }
        if service.maglev_size.is_some() && algorithm == Algorithm::Random {
            return wrong("it has a maglevSize, but its algorithm is random; remove one of the two".to_owned());
        }
        let affinity = service.affinity.or(defaults.affinity).unwrap_or_default();
        if affinity > LONGEST_AFFINITY {
            return wrong(format!("affinity is {affinity} seconds; take at most {LONGEST_AFFINITY} (a day)"));
        }
        if let Some(range) = service.source_ranges.iter().find(|range| range.addr().is_ipv6() != address.is_ipv6()) {
            return wrong(format!("sourceRanges has {range}, which no client of {address} can be in"));
        }
        let forwarding = service.forwarding.or(defaults.forwarding).unwrap_or_default();
        if service.protocol == Protocol::Sctp && forwarding == ForwardingName::Snat {
            return wrong(
                "snat gives connections another source port, which SCTP's checksum does not allow; \
                 set forwarding: dsr-ipip"
                    .to_owned(),
            );
        }
        let pool = self.pool_of(*at, file, pools, service, forwarding)?;
        let mut backends: Vec<Backend> = Vec::with_capacity(service.backends.len());
        let mut before = Known::default();
        for backend in &service.backends {
            let backend = self.backend(service, forwarding, backend, &mut before)?;
            backends.push(backend);
        }
        let health = match service.health.as_ref().or(defaults.health.as_ref()) {
            Some(health) => {
                let wrong = |what| self.at(*at, format!("service {}: health: {what}", service.name));
                Some(check(health, service).map_err(wrong)?)
            }
            None => None,
        };
        Ok(Service {
            name: service.name.clone(),
            address,
            port: service.port.0,
            protocol: service.protocol,
            algorithm,
            maglev_size,
            forwarding,
            affinity,
            source_ranges: service.source_ranges.clone(),
            pool,
            backends,
            health,
        })
    }

    /// A pool means something for translated connections alone.
    fn pool_of(
        &self,
        at: Location,
        file: &File,
        pools: &[Pool],
        service: &config::Service,
        forwarding: ForwardingName,
    ) -> Result<Option<String>, PlanError> {
        let wrong = |what: String| Err(self.at(at, format!("service {}: {what}", service.name)));
        if service.pool.is_some() && forwarding != ForwardingName::Snat {
            return wrong(
                "it has a pool, but its connections keep their source (forwarding); remove the pool".to_owned(),
            );
        }
        let name = service.pool.as_ref().or(file.defaults.pool.as_ref()).filter(|_| forwarding == ForwardingName::Snat);
        let Some(name) = name else { return Ok(None) };
        let Some(pool) = pools.iter().find(|pool| pool.name == *name) else {
            let known: Vec<&str> = pools.iter().map(|pool| pool.name.as_str()).collect();
            let known = if known.is_empty() { "there are none".to_owned() } else { known.join(", ") };
            return wrong(format!("there is no pool {name}; pools: {known}"));
        };
        let (has, key) = match service.address {
            IpAddr::V4(_) => (pool.v4.is_some(), "address"),
            IpAddr::V6(_) => (pool.v6.is_some(), "address6"),
        };
        if !has {
            return wrong(format!("pool {name} has no {key}, which {} needs", service.address));
        }
        Ok(Some(name.clone()))
    }

    fn backend(
        &self,
        service: &config::Service,
        forwarding: ForwardingName,
        found: &Spanned<config::Backend>,
        before: &mut Known,
    ) -> Result<Backend, PlanError> {
        let Spanned { value: backend, referenced: at, .. } = found;
        let port = backend.port.unwrap_or(service.port).0;
        let spelled = SocketText(backend.address, port).to_string();
        let name = backend.name.clone().unwrap_or_else(|| spelled.clone());
        let wrong = |what: String| Err(self.at(*at, format!("service {}, backend {name}: {what}", service.name)));
        if backend.name.is_some() {
            self.name(*at, "a backend", &name)?;
        }
        if backend.address.is_ipv6() != service.address.is_ipv6() {
            return wrong(format!(
                "{} is of another family than the service's address {}; families are not translated",
                backend.address, service.address
            ));
        }
        if let Some(why) = unusable(backend.address) {
            return wrong(format!("{} is {why}; nobody can be reached there", backend.address));
        }
        if forwarding == ForwardingName::DsrIpip && port != service.port.0 {
            return wrong(format!(
                "port {port} differs from the service's {}, and with dsr-ipip nothing translates it; \
                 serve on the service's port, or use snat",
                service.port.0
            ));
        }
        if service.protocol == Protocol::Sctp && port != service.port.0 {
            return wrong(format!(
                "port {port} differs from the service's {}, and SCTP's checksum does not let ports be translated; \
                 serve on the service's port",
                service.port.0
            ));
        }
        if backend.weight > HEAVIEST {
            return wrong(format!("weight {} is more than {HEAVIEST}", backend.weight));
        }
        if !before.names.insert(name.clone()) {
            return wrong("the service has another backend of this name; rename one".to_owned());
        }
        if let Some(other) = before.places.insert((backend.address, port), name.clone()) {
            return wrong(format!("{spelled} is backend {other} already; give one of them more weight instead"));
        }
        Ok(Backend { name, address: backend.address, port, weight: backend.weight })
    }

    fn names(&self, file: &File) -> Result<(), PlanError> {
        let mut seen = BTreeMap::new();
        for service in &file.services {
            if let Some(before) = seen.insert(&service.value.name, service.referenced) {
                return Err(self.at(
                    service.referenced,
                    format!(
                        "service {}: there is another service of this name in line {}; rename one",
                        service.value.name,
                        before.line()
                    ),
                ));
            }
        }
        Ok(())
    }

    fn frontends(&self, file: &File, services: &[Service]) -> Result<(), PlanError> {
        let mut seen: BTreeMap<_, (&Service, Location)> = BTreeMap::new();
        for (service, Spanned { referenced: at, .. }) in services.iter().zip(&file.services) {
            let key = (service.address, service.port, service.protocol.number());
            if let Some((other, before)) = seen.insert(key, (service, *at)) {
                return Err(self.at(
                    *at,
                    format!(
                        "service {}: {service} is service {}'s already (line {}); change the address, port or protocol \
                         of one",
                        service.name,
                        other.name,
                        before.line()
                    ),
                ));
            }
            let sources = [file.address.map(IpAddr::from), file.address6.map(IpAddr::from)];
            if sources.contains(&Some(service.address)) {
                return Err(self.at(
                    *at,
                    format!(
                        "service {}: {} is the load balancer's own address, which translated connections come from; \
                         give the service an address of its own",
                        service.name, service.address
                    ),
                ));
            }
            let of = |pool: &&config::Pool| {
                [pool.address.map(IpAddr::from), pool.address6.map(IpAddr::from)].contains(&Some(service.address))
            };
            if let Some(pool) = file.pools.iter().map(|pool| &pool.value).find(of) {
                return Err(self.at(
                    *at,
                    format!(
                        "service {}: {} is an address of pool {}; give the service an address of its own",
                        service.name, service.address, pool.name
                    ),
                ));
            }
        }
        Ok(())
    }

    /// A backend that is a service would be sent back here for ever.
    fn loops(&self, file: &File, services: &[Service]) -> Result<(), PlanError> {
        let served: BTreeMap<IpAddr, &Service> = services.iter().map(|service| (service.address, service)).collect();
        for (service, found) in services.iter().zip(&file.services) {
            for (backend, Spanned { referenced: at, .. }) in service.backends.iter().zip(&found.value.backends) {
                if let Some(other) = served.get(&backend.address) {
                    return Err(self.at(
                        *at,
                        format!(
                            "service {}, backend {}: {} is the address of service {}; name those who serve",
                            service.name, backend.name, backend.address, other.name
                        ),
                    ));
                }
            }
        }
        Ok(())
    }

    fn capacity(&self, plan: &Plan) -> Result<(), PlanError> {
        let sizes = &plan.bpf.maps;
        let size = |wanted: u32, map: &cirri_abi::Map| if wanted > 0 { wanted } else { map.max_entries } as usize;
        let most = size(sizes.slots, &map::SERVICE_SLOTS);
        if plan.slots() > most {
            let maglev: Vec<usize> = plan.services.iter().map(Service::slots).collect();
            return Err(self.refuse(format!(
                "{} services need {} places in their tables of backends ({} for the largest), more than the {most} that \
                 fit; set a smaller maglevSize, or a larger bpf.maps.slots",
                plan.services.len(),
                plan.slots(),
                maglev.into_iter().max().unwrap_or_default()
            )));
        }
        let backends: usize = plan.services.iter().map(|service| service.backends.len()).sum();
        let most = size(sizes.backends, &map::BACKENDS);
        if backends >= most {
            return Err(self.refuse(format!(
                "{backends} backends are more than the {} that fit; set a larger bpf.maps.backends",
                most - 1
            )));
        }
        // Every address has a row of its own, for the ports that are not named.
        let rows =
            plan.services.len() + plan.services.iter().map(|service| service.address).collect::<BTreeSet<_>>().len();
        let most = size(sizes.services, &map::SERVICES);
        if rows > most {
            return Err(self.refuse(format!(
                "{} services need {rows} rows, more than the {most} that fit; set a larger bpf.maps.services",
                plan.services.len()
            )));
        }
        Ok(())
    }

    fn name(&self, at: Location, what: &str, name: &str) -> Result<(), PlanError> {
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
        if name.is_empty() || name.len() > 128 || !name.chars().all(good) {
            return Err(self.at(
                at,
                format!("`{name}` is no name for {what}; use 1 to 128 letters, digits, `-`, `_`, `.` and `:`"),
            ));
        }
        Ok(())
    }

    fn refuse(&self, what: impl fmt::Display) -> PlanError {
        PlanError(format!("{}: {}", self.path.display(), cut_message(&what.to_string())))
    }

    fn at(&self, at: Location, what: impl fmt::Display) -> PlanError {
        let what = what.to_string();
        PlanError(format!("{}:{}:{}: {}", self.path.display(), at.line(), at.column(), cut_message(&what)))
    }
}

/// The backends of a service so far.
#[derive(Default)]
struct Known {
    names: BTreeSet<String>,
    places: BTreeMap<(IpAddr, u16), String>,
}

fn check(health: &config::Health, service: &config::Service) -> Result<Check, String> {
    let port = health.port.map(|PortNumber(port)| port);
    if port.is_none() && service.protocol != Protocol::Tcp {
        return Err(format!("a {} port cannot be tried; name a TCP port with health.port", service.protocol));
    }
    let probe = match health.kind {
        HealthKind::Tcp => {
            let http =
                [("path", health.path.is_some()), ("host", health.host.is_some()), ("expect", health.expect.is_some())];
            if let Some((key, _)) = http.into_iter().find(|(_, set)| *set) {
                return Err(format!("{key} is for type http; remove it, or set type: http"));
            }
            Probe::Tcp
        }
        HealthKind::Http => {
            let path = health.path.clone().unwrap_or_else(|| "/".to_owned());
            let host = health.host.clone();
            let plain = |text: &str| text.chars().all(|c| c.is_ascii_graphic());
            if !path.starts_with('/') || !plain(&path) {
                return Err(format!("path `{path}` must begin with / and hold no blanks"));
            }
            if let Some(host) = host.as_ref().filter(|host| host.is_empty() || !plain(host)) {
                return Err(format!("host `{host}` is no name of a host"));
            }
            Probe::Http { path, host, expect: health.expect.unwrap_or(CodeRange { first: 200, last: 399 }) }
        }
    };
    let (interval, timeout) = (health.interval.0, health.timeout.0);
    if !(Duration::from_millis(50)..=Duration::from_secs(3600)).contains(&interval) {
        return Err(format!("interval is {interval:?}; take 50ms to 60m"));
    }
    if timeout.is_zero() || timeout > Duration::from_secs(60) {
        return Err(format!("timeout is {timeout:?}; take more than nothing and at most 60s"));
    }
    if !(1..=100).contains(&health.rise) || !(1..=100).contains(&health.fall) {
        return Err(format!("rise is {} and fall {}; take 1 to 100", health.rise, health.fall));
    }
    Ok(Check { probe, port, interval, timeout, rise: health.rise, fall: health.fall })
}

/// Why nobody is served or serves at an address.
fn unusable(address: IpAddr) -> Option<&'static str> {
    match address {
        _ if address.is_unspecified() => Some("the unspecified address"),
        _ if address.is_multicast() => Some("a multicast address"),
        _ if address.is_loopback() => Some("a loopback address"),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("the broadcast address"),
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Some("an IPv4 address in IPv6 form"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some("a link-local address"),
        _ => None,
    }
}

fn overlap(a: PortRange, b: PortRange) -> bool {
    a.first <= b.last && b.first <= a.last
}

fn listed(numbers: &[u32]) -> String {
    numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}
