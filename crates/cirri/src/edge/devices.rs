//! The machine's side: devices with their programs, and what the packet path knows about addresses.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cirri_abi::{
    Addr, Identity, Ipcache, IpcacheKey, NodeConfig, Port, Service, ServiceKey, epoch_slot, ipcache_flag, node_flag,
    service_flag,
};
use cirri_loader::net::{Link, Net, NetError};
use cirri_loader::{Datapath, EdgeMode, EdgeStatus, EdgeWanted, LoadError, MapError, Place, Tables};

use super::api::DeviceStatus;
use super::plan::Plan;
use crate::agent::{Finding, Findings, IPV6_MTU, has_ipv6};
use crate::api::ProblemKind;
use crate::config::Acceleration;
use crate::settings::{Settings, SettingsError};

/// The devices of the plan that are there, and the addresses of the machine.
pub struct Machine {
    /// The plan's devices, by name; none: it is not there now.
    pub devices: BTreeMap<String, Option<Link>>,
    /// Source of translated connections.
    pub v4: Option<Ipv4Addr>,
    /// Source of translated connections.
    pub v6: Option<Ipv6Addr>,
    /// Every address of the machine.
    addresses: Vec<IpAddr>,
}

/// A machine that the plan does not fit.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The kernel.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A source that is nobody's.
    #[error("no device has {0}; correct {1}, or give the address to a device first: answers must come back here")]
    ForeignAddress(IpAddr, &'static str),
    /// Programs.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Tables.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// No such device.
    #[error("there is no device {0}; devices: {1}")]
    NoDevice(String, String),
    /// What comes for the machine's own source is told apart by its ports alone.
    #[error(
        "pool {0} has the address {1}, which is the load balancer's own source; give the pool another address, or leave \
         it out and widen snatPorts"
    )]
    OwnPool(String, IpAddr),
    /// Connections of a family need a source.
    #[error(
        "service {service} needs an {family} source for its connections, but no device of the plan has such an address; \
         set {key}, or forwarding: dsr-ipip"
    )]
    NoSource {
        /// The service.
        service: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// What to set.
        key: &'static str,
    },
}

impl Machine {
    /// Looks around.
    ///
    /// # Errors
    /// The kernel's. That a device or an address is missing is none: see [`Machine::check`] and [`Machine::flaws`].
    pub async fn look(plan: &Plan, net: &Net) -> Result<Machine, MachineError> {
        let mut devices = BTreeMap::new();
        for name in &plan.devices {
            devices.insert(name.clone(), net.find_link(name).await?);
        }
        let all = net.addresses().await?;
        let addresses: Vec<IpAddr> = all.iter().map(|address| address.ip).collect();
        let served = |ip: &IpAddr| plan.services.iter().any(|service| service.address == *ip);
        let first = |v6: bool| {
            plan.devices.iter().filter_map(|name| devices.get(name)?.as_ref()).find_map(|link: &Link| {
                let mut of = all.iter().filter(|address| address.device == link.index).map(|address| address.ip);
                // An address that is balanced may stand on a device, too, so that somebody answers for it.
                of.find(|ip| ip.is_ipv6() == v6 && is_global(ip) && !served(ip))
            })
        };
        // One that the file names stays the source while it is away: connections go on when it is back.
        let v4 = match (plan.address, first(false)) {
            (Some(v4), _) | (None, Some(IpAddr::V4(v4))) => Some(v4),
            _ => None,
        };
        let v6 = match (plan.address6, first(true)) {
            (Some(v6), _) | (None, Some(IpAddr::V6(v6))) => Some(v6),
            _ => None,
        };
        Ok(Machine { devices, v4, v6, addresses })
    }

    /// Whether the plan can work here.
    ///
    /// # Errors
    /// A device or a source is not there, or a service has no source for its connections.
    pub async fn check(&self, plan: &Plan, net: &Net) -> Result<(), MachineError> {
        if let Some((name, _)) = self.devices.iter().find(|(_, link)| link.is_none()) {
            let there: Vec<String> = net.links().await?.into_iter().map(|link| link.name).collect();
            return Err(MachineError::NoDevice(name.clone(), there.join(", ")));
        }
        if let Some((ip, key)) = self.foreign(plan).next() {
            return Err(MachineError::ForeignAddress(ip, key));
        }
        for pool in &plan.pools {
            let own = (pool.v4.filter(|v4| self.v4 == Some(*v4)).map(IpAddr::V4))
                .or(pool.v6.filter(|v6| self.v6 == Some(*v6)).map(IpAddr::V6));
            if let Some(ip) = own {
                return Err(MachineError::OwnPool(pool.name.clone(), ip));
            }
        }
        match self.without_source(plan).next() {
            Some((service, family, key)) => Err(MachineError::NoSource { service: service.to_owned(), family, key }),
            None => Ok(()),
        }
    }

    /// What the administrator took away from under the plan, or switched off. `stood`: addresses of pools that were on
    /// devices when the plan came; others are routed here.
    pub fn flaws(&self, plan: &Plan, stood: &BTreeSet<IpAddr>) -> Findings {
        let mut flaws = Findings::new();
        for (name, link) in &self.devices {
            let (found, remedy) = match link {
                None => ("it is gone", "bring it back; it is served again by itself"),
                Some(link) if !link.up => ("it is down", "bring it up; no packet comes or leaves by it until then"),
                Some(link) if !link.carrier => {
                    ("it has no carrier", "see its cable, or its other end: no packet comes or leaves by it")
                }
                Some(_) => continue,
            };
            flaws.push((ProblemKind::Device, name.clone(), Finding::new(found, remedy).wanted("up")));
        }
        let mut note = |object: String, found: &str, remedy: &str, wanted: &str| {
            flaws.push((ProblemKind::Address, object, Finding::new(found, remedy).wanted(wanted)));
        };
        for (ip, key) in self.foreign(plan) {
            let remedy = "give it back to its device; answers to translated connections do not come here until then";
            note(ip.to_string(), "no device has it", remedy, key);
        }
        for ip in stood.iter().filter(|ip| !self.addresses.contains(ip)) {
            let remedy = "give it back to its device, or have it routed here and let the file be read again (SIGHUP)";
            note(ip.to_string(), "no device has it any more", remedy, "a pool's address");
        }
        for (service, family, key) in self.without_source(plan) {
            let found = format!("no device of the plan has an {family} address for its connections");
            note(format!("of service {service}"), &found, &format!("give one to a device, or set {key}"), "a source");
        }
        flaws
    }

    /// Addresses of the plan's pools that stand on a device.
    pub fn pools_here(&self, plan: &Plan) -> BTreeSet<IpAddr> {
        plan.pool_addresses().filter(|ip| self.addresses.contains(ip)).collect()
    }

    /// Sources that the plan names and no device has, with their keys.
    fn foreign(&self, plan: &Plan) -> impl Iterator<Item = (IpAddr, &'static str)> {
        let named = [(plan.address.map(IpAddr::V4), "address"), (plan.address6.map(IpAddr::V6), "address6")];
        named.into_iter().filter_map(|(ip, key)| Some((ip?, key))).filter(|(ip, _)| !self.addresses.contains(ip))
    }

    /// Services whose connections have no source, with the family and what could be set.
    fn without_source<'a>(&self, plan: &'a Plan) -> impl Iterator<Item = (&'a str, &'static str, &'static str)> {
        plan.services.iter().filter_map(|service| {
            let translated = service.forwarding == super::config::ForwardingName::Snat && service.pool.is_none();
            let (source, family, key) = match service.address {
                IpAddr::V4(_) => (self.v4.is_some(), "IPv4", "address"),
                IpAddr::V6(_) => (self.v6.is_some(), "IPv6", "address6"),
            };
            (translated && !source).then_some((service.name.as_str(), family, key))
        })
    }

    /// Tells the packet path who this machine is; whether it knew otherwise.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tell(&self, plan: &Plan, tables: &Tables) -> Result<bool, MapError> {
        let node = NodeConfig {
            // Of no cluster, and with too many connections to tell of each.
            flags: node_flag::ALONE | node_flag::DROPS_ONLY,
            v4: self.v4.map_or(Addr::UNSPECIFIED, |v4| IpAddr::V4(v4).into()),
            v6: self.v6.map_or(Addr::UNSPECIFIED, |v6| IpAddr::V6(v6).into()),
            masquerade_first: Port::new(plan.snat_ports.first),
            masquerade_mask: (plan.snat_ports.count() - 1) as u16,
            ..NodeConfig::default()
        };
        let mut changed = tables.node()? != node;
        if changed {
            tables.set_node(&node)?;
        }
        let wanted = self.places(plan);
        changed |= put_places(tables, &wanted)?;
        if changed {
            tables.bump(epoch_slot::PLACES)?;
            tables.bump(epoch_slot::NODE)?;
        }
        Ok(changed)
    }

    /// Who is where: the machine itself, and the world.
    fn places(&self, plan: &Plan) -> HashMap<IpcacheKey, Ipcache> {
        let plain = |identity| Ipcache { identity, ..Ipcache::default() };
        let everywhere = |addr, prefix_len| IpcacheKey { prefix_len, addr };
        let mut all = HashMap::from([
            (everywhere(Addr::ANY_V4, 96), plain(Identity::WORLD_IPV4)),
            (everywhere(Addr::UNSPECIFIED, 0), plain(Identity::WORLD_IPV6)),
        ]);
        let served = |ip: &IpAddr| plan.services.iter().any(|service| service.address == *ip);
        let own = self.addresses.iter().copied().filter(is_global).chain(plan.pool_addresses());
        all.extend(own.filter(|ip| !served(ip)).map(host_row));
        all
    }
}

/// Tells the packet path the addresses of this host, and nothing else.
///
/// # Errors
/// The kernel's.
pub fn tell_own(tables: &Tables, addresses: &[IpAddr]) -> Result<(), MapError> {
    put_places(tables, &addresses.iter().copied().filter(is_global).map(host_row).collect()).map(drop)
}

/// For a host that unwraps: the addresses of its services, and no others.
///
/// # Errors
/// The kernel's.
pub fn tell_served(tables: &Tables, addresses: &[IpAddr]) -> Result<(), MapError> {
    let row = Service { flags: service_flag::REFUSE, ..Service::default() };
    let key = |ip: &IpAddr| ServiceKey { addr: (*ip).into(), ..ServiceKey::default() };
    let wanted: HashSet<ServiceKey> = addresses.iter().filter(|ip| is_global(ip)).map(key).collect();
    for (key, _) in tables.services.entries()?.into_iter().filter(|(key, _)| !wanted.contains(key)) {
        tables.services.delete(&key)?;
    }
    for key in &wanted {
        tables.services.put(key, &row)?;
    }
    Ok(())
}

/// Whether the packet path of a host that unwraps knows its addresses: all, and those of services.
///
/// # Errors
/// The kernel's.
pub fn is_told(tables: &Tables, own: &[IpAddr], served: &[IpAddr]) -> Result<bool, MapError> {
    let all = |addresses: &[IpAddr]| -> HashSet<Addr> {
        addresses.iter().filter(|ip| is_global(ip)).map(|ip| Addr::from(*ip)).collect()
    };
    let (hosts, services) = (tables.ipcache.entries()?, tables.services.entries()?);
    Ok(all(own) == hosts.iter().map(|(key, _)| key.addr).collect()
        && all(served) == services.iter().map(|(key, _)| key.addr).collect())
}

/// Makes the address cache hold exactly these rows; whether anything changed.
fn put_places(tables: &Tables, wanted: &HashMap<IpcacheKey, Ipcache>) -> Result<bool, MapError> {
    let found: HashMap<IpcacheKey, Ipcache> = tables.ipcache.entries()?.into_iter().collect();
    let mut changed = false;
    for (key, row) in wanted.iter().filter(|(key, row)| found.get(key) != Some(row)) {
        tables.ipcache.put(key, row)?;
        changed = true;
    }
    for key in found.keys().filter(|key| !wanted.contains_key(key)) {
        tables.ipcache.delete(key)?;
        changed = true;
    }
    Ok(changed)
}

fn host_row(ip: IpAddr) -> (IpcacheKey, Ipcache) {
    let row = Ipcache { identity: Identity::HOST, flags: ipcache_flag::HOST, ..Ipcache::default() };
    (IpcacheKey { prefix_len: 128, addr: ip.into() }, row)
}

/// Programs on the plan's devices.
#[derive(Default)]
pub struct Attached {
    devices: BTreeMap<String, (u32, Acceleration, DeviceStatus)>,
    /// What best effort reached, by the device's number.
    reached: BTreeMap<u32, EdgeMode>,
}

impl Attached {
    /// Attaches what is missing and takes away what is too much, with what was set for its sake.
    ///
    /// # Errors
    /// The first device that refuses. The others are done.
    pub fn follow(
        &mut self,
        plan: &Plan,
        machine: &Machine,
        datapath: &mut Datapath,
        settings: &mut Settings,
    ) -> Result<(), MachineError> {
        let attached = self.attach(plan, machine, datapath);
        let gone: Vec<String> = self.devices.keys().filter(|name| !plan.devices.contains(name)).cloned().collect();
        for name in gone {
            self.leave(&name, datapath)?;
            tracing::info!(device = name, "not served any more");
        }
        // What is attached to others is an earlier process's, or is left where it failed half-way.
        let ours = machine.devices.values().flatten().map(|link| link.index);
        datapath.leave_others(&ours.chain(self.devices.values().map(|(index, ..)| *index)).collect())?;
        settings.leave_other_devices(&plan.devices.iter().map(String::as_str).collect::<Vec<_>>())?;
        attached
    }

    /// Takes the programs off a device. One that is gone leaves pins; one that has another name by now has programs.
    fn leave(&mut self, name: &str, datapath: &mut Datapath) -> Result<(), LoadError> {
        let Some((index, ..)) = self.devices.remove(name) else { return Ok(()) };
        self.reached.remove(&index);
        datapath.detach(index)
    }

    /// Attaches what is missing; programs of an earlier process are replaced without a gap.
    ///
    /// # Errors
    /// The first device that refuses. The others are done.
    pub fn attach(&mut self, plan: &Plan, machine: &Machine, datapath: &mut Datapath) -> Result<(), MachineError> {
        let mut first = Ok(());
        for (name, link) in &machine.devices {
            let now = link.as_ref().map(|link| link.index);
            if self.devices.get(name).is_some_and(|(index, ..)| Some(*index) != now) {
                tracing::warn!(device = name, now, "device is gone; one of its name is served when it is there");
                self.leave(name, datapath)?;
            }
            let Some(link) = link else { continue };
            let known = self.devices.get(name);
            let done = known.is_some_and(|(_, wanted, _)| *wanted == plan.acceleration);
            if done && self.fallen().all(|(fallen, _)| fallen != name) {
                continue;
            }
            // Whatever becomes of it, it is not as it was.
            let before = self.devices.remove(name).map(|(.., status)| status);
            let wanted = wanted(plan.acceleration).again(self.reached.get(&link.index).copied());
            let attached = datapath.attach_network(name).and_then(|index| match datapath.attach_edge(name, wanted) {
                // It is served, by tc: what is new in the file need not wait for it.
                Err(error) if wanted != self::wanted(plan.acceleration) => {
                    Ok((index, EdgeStatus { device: name.clone(), mode: EdgeMode::Tc, reason: error.to_string() }))
                }
                other => other.map(|status| (index, status)),
            });
            match attached {
                // The number that it has now, which need not be the one that was seen.
                Ok((index, status)) => {
                    if plan.acceleration != Acceleration::BestEffort {
                        self.reached.remove(&index);
                    } else if status.mode != EdgeMode::Tc {
                        self.reached.insert(index, status.mode);
                    }
                    let status = told(&status);
                    if before.as_ref() != Some(&status) {
                        tracing::info!(device = name, mode = status.mode, reason = status.reason, "served");
                    }
                    self.devices.insert(name.clone(), (index, plan.acceleration, status));
                }
                Err(error) => first = first.and(Err(error)),
            }
        }
        Ok(first?)
    }

    /// Devices that best effort leaves to tc after it had reached more, and why.
    pub fn fallen(&self) -> impl Iterator<Item = (&String, &String)> {
        let tc = EdgeMode::Tc.to_string();
        let fallen = self
            .devices
            .iter()
            .filter(move |(_, (index, _, status))| status.mode == tc && self.reached.contains_key(index));
        fallen.map(|(name, (.., status))| (name, &status.reason))
    }

    /// Where programs are.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.devices.values().flat_map(|(index, _, status)| {
            let edge = (status.mode != EdgeMode::Tc.to_string()).then_some(Place::Edge(*index));
            [Some(Place::Network(*index)), edge].into_iter().flatten()
        })
    }

    /// The name of a device by its number.
    pub fn name(&self, ifindex: u32) -> String {
        let found = self.devices.iter().find(|(_, (index, ..))| *index == ifindex);
        found.map_or_else(|| ifindex.to_string(), |(name, _)| name.clone())
    }

    /// What was attached to a device is not as it was: it is attached again next.
    pub fn suspect(&mut self, ifindex: u32) {
        self.devices.retain(|_, (index, ..)| *index != ifindex);
    }

    /// Whether a device that is there has no programs, or is served worse than it was.
    pub fn is_lacking(&self, machine: &Machine) -> bool {
        let missing = machine.devices.iter().any(|(name, link)| link.is_some() && !self.devices.contains_key(name));
        missing || self.fallen().next().is_some()
    }

    /// Of every device of the plan how it is served.
    pub fn status(&self, plan: &Plan) -> Vec<DeviceStatus> {
        let one = |name: &String| match self.devices.get(name) {
            Some((.., status)) => status.clone(),
            None => DeviceStatus {
                name: name.clone(),
                mode: "missing".to_owned(),
                reason: "there is no such device now, or its programs are refused".to_owned(),
            },
        };
        plan.devices.iter().map(one).collect()
    }
}

/// Settings of the machine: the source ports of translated connections are for nobody else, and the
/// kernel may be asked for routes on behalf of packets that came in by these devices.
///
/// # Errors
/// A setting cannot be recorded or written.
pub fn apply_settings(plan: &Plan, machine: &Machine, net: &Net, settings: &mut Settings) -> Result<(), SettingsError> {
    settings.reserve(plan.snat_ports)?;
    for (name, link) in machine.devices.iter().filter_map(|(name, link)| Some((name, link.as_ref()?))) {
        settings.set(&format!("ipv4/conf/{name}/forwarding"), "1")?;
        if link.mtu >= IPV6_MTU && has_ipv6(net) {
            settings.set(&format!("ipv6/conf/{name}/forwarding"), "1")?;
        }
    }
    Ok(())
}

fn wanted(acceleration: Acceleration) -> EdgeWanted {
    match acceleration {
        Acceleration::Off => EdgeWanted::Off,
        Acceleration::Generic => EdgeWanted::Generic,
        Acceleration::Native => EdgeWanted::Native,
        Acceleration::BestEffort => EdgeWanted::BestEffort,
    }
}

fn told(status: &EdgeStatus) -> DeviceStatus {
    DeviceStatus { name: status.device.clone(), mode: status.mode.to_string(), reason: status.reason.clone() }
}

fn is_global(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}
