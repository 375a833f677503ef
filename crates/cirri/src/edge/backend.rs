//! A plain host behind a load balancer with `forwarding: dsr-ipip`: takes packets out of their wrapping.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use cirri_abi::map;
use cirri_loader::net::{Address, Net, NetError};
use cirri_loader::{Attachment, Datapath, LoadOptions, Place, Tables};

use super::devices;
use crate::exit::{Because, Error, Failure, Result};
use crate::settings::Settings;

/// What to do on a host that serves.
#[derive(Clone, Debug)]
pub struct BackendHost {
    /// Devices that wrapped packets come in by; to look at, none: all that were set up.
    pub devices: Vec<String>,
    /// Addresses of services that the host shall have, on its loopback device.
    pub vips: Vec<IpAddr>,
    /// Directory of a bpffs.
    pub pin_root: PathBuf,
    /// Name of the directory in it.
    pub instance: String,
}

/// The device that services' addresses stand on: nobody outside hears of them there.
const LOOPBACK: &str = "lo";
/// The kind of device that others put them on.
const DUMMY: &str = "dummy";
/// How long another such command for the same instance is waited for.
const OTHERS: Duration = Duration::from_secs(60);
/// The name of the program.
const UNWRAP: &str = "unwrap";
/// The kernel answers for an address on whatever device it stands, unless it is told not to: settings
/// of the devices that packets come in by.
const SETTINGS: [(&str, &str); 2] = [("arp_ignore", "1"), ("arp_announce", "2")];

impl BackendHost {
    /// Attaches the program, which stays when this process ends, and adds the addresses. If that fails, nothing
    /// stays of what this call brought, and all of what was there before.
    ///
    /// # Errors
    /// A device is missing, or the kernel refuses.
    pub async fn set_up(&self) -> Result<()> {
        let net = Net::here().because(Failure::Failed)?;
        self.check()?;
        Datapath::check_kernel().because(Failure::Failed)?;
        self.check_devices(&net).await?;
        let mut fresh = Vec::new();
        for device in &self.devices {
            let mut settings = self.settings(&net, device)?;
            if !settings.is_known().because(Failure::Failed)? {
                fresh.push(device.as_str());
            }
            settings.need_directories(&[&self.pin_root]).because(Failure::Failed)?;
        }
        let instance = match Datapath::claim_within(&self.pin_root, &self.instance, OTHERS).because(Failure::Failed) {
            Ok(instance) => instance,
            Err(error) => {
                for device in fresh {
                    self.settings(&net, device)?.remove_directories(None).because(Failure::Failed)?;
                }
                return Err(error);
            }
        };
        let brought = self.bring(&net).await;
        if brought.is_err()
            && let Err(left) = self.take_away(&net, &fresh, Some(&instance)).await
        {
            tracing::warn!(error = %left, "not all that was begun could be taken away; see --remove");
        }
        brought
    }

    /// Takes away what [`BackendHost::set_up`] brought to these devices, or all of it if they were the last. A device
    /// may be gone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn remove(&self) -> Result<()> {
        let net = Net::here().because(Failure::Failed)?;
        self.check()?;
        let devices: Vec<&str> = self.devices.iter().map(String::as_str).collect();
        // Which addresses are ours is recorded: one that the command line names may be the administrator's.
        let instance = Datapath::claim_if_there(&self.pin_root, &self.instance, OTHERS);
        self.take_away(&net, &devices, instance.because(Failure::Failed)?.as_ref()).await
    }

    /// Says by device what is not as [`BackendHost::set_up`] left it, of these devices or else of all that it was told
    /// of. Changes nothing.
    ///
    /// # Errors
    /// Nothing was set up, or the kernel does not tell.
    pub async fn look(&self) -> Result<Vec<(String, Vec<String>)>> {
        let net = Net::here().because(Failure::Failed)?;
        self.check()?;
        let known = self.settings(&net, "")?.owners().because(Failure::Failed)?;
        let known = known.iter().filter_map(|owner| owner.strip_prefix(&self.owner("")));
        let devices: Vec<String> = match self.devices.as_slice() {
            [] => known.map(str::to_owned).collect(),
            named => named.to_vec(),
        };
        if devices.is_empty() {
            return Err(Error::new(Failure::Failed, format!("nothing was set up here for instance {}", self.instance))
                .hint("set it up with `cirri lb backend --device DEVICE --vip ADDRESS`, or name its --instance"));
        }
        let told = self.is_told(&net).await;
        let mut all = Vec::new();
        for device in devices {
            let mut flaws = self.flaws(&net, &device).await?;
            flaws.extend(told.clone());
            all.push((device, flaws));
        }
        Ok(all)
    }

    /// What is wrong with one device, and with what was made for it.
    async fn flaws(&self, net: &Net, device: &str) -> Result<Vec<String>> {
        let settings = self.settings(net, device)?;
        let mut flaws = Vec::new();
        if !settings.is_known().because(Failure::Failed)? {
            flaws.push("nothing was set up for it".to_owned());
        }
        match net.find_link(device).await.because(Failure::Failed)? {
            None => flaws.push("the device is gone".to_owned()),
            Some(link) => {
                if !link.up || !link.carrier {
                    flaws.push(if link.up { "the device has no carrier" } else { "the device is down" }.to_owned());
                }
                let place = Place::Unwrap(link.index);
                let found = Datapath::instead_of(&self.pin_root, &self.instance, place).because(Failure::Failed)?;
                flaws.extend(found.map(|found| format!("{UNWRAP}: {found}; wanted: {}", found.wanted())));
            }
        }
        let differing = settings.differing().await.because(Failure::Failed)?;
        flaws.extend(differing.into_iter().map(|it| format!("{}: {}; wanted: {}", it.name, it.found, it.wanted)));
        let there = net.addresses().await.because(Failure::Failed)?;
        let missing = self.vips.iter().filter(|vip| !there.iter().any(|address| address.ip == **vip));
        let missing = missing.filter(|vip| !flaws.iter().any(|flaw| flaw.starts_with(&format!("{vip}/"))));
        let missing: Vec<String> = missing.map(|vip| format!("{vip}: no device has it")).collect();
        flaws.extend(missing);
        Ok(flaws)
    }

    /// What is wrong with what the program knows.
    async fn is_told(&self, net: &Net) -> Option<String> {
        let known = async {
            let (own, served) = self.addresses(net).await?;
            let tables = Tables::open(&self.pin_root, &self.instance)?;
            anyhow::Ok(devices::is_told(&tables, &own, &served)?)
        };
        match known.await {
            Ok(true) => None,
            Ok(false) => Some("the host's addresses are others than the program knows".to_owned()),
            Err(error) => Some(format!("its tables cannot be read: {error}")),
        }
    }

    async fn bring(&self, net: &Net) -> Result<()> {
        for device in &self.devices {
            self.add(net, device).await?;
        }
        let mut datapath = Datapath::load(&self.options()).because(Failure::Failed)?;
        // Only what is for this host, and in it for a service of it, is unwrapped.
        let (own, served) = self.addresses(net).await.because(Failure::Failed)?;
        devices::tell_own(datapath.tables(), &own).because(Failure::Failed)?;
        devices::tell_served(datapath.tables(), &served).because(Failure::Failed)?;
        for device in &self.devices {
            datapath.attach_unwrap(device).because(Failure::Failed)?;
        }
        datapath.retire().because(Failure::Failed)?;
        Ok(())
    }

    /// The numbers that devices had when they were set up: a name may be another's by now. Those of earlier versions are
    /// known by name alone, and who else has the number keeps the program.
    async fn numbers(&self, net: &Net, devices: &[&str]) -> Result<BTreeSet<u32>> {
        let claims = self.settings(net, "")?.claims().because(Failure::Failed)?;
        let prefix = self.claim("");
        let known = claims.keys().filter_map(|claim| numbered(claim.strip_prefix(&prefix)?));
        let (gone, stay): (Vec<_>, Vec<_>) = known.partition(|(device, _)| devices.contains(device));
        let mut numbers: BTreeSet<u32> = gone.iter().map(|(_, index)| *index).collect();
        for device in devices.iter().filter(|device| !gone.iter().any(|(it, _)| it == *device)) {
            numbers.extend(net.find_link(device).await.because(Failure::Failed)?.map(|link| link.index));
        }
        numbers.retain(|index| !stay.iter().any(|(_, it)| it == index));
        Ok(numbers)
    }

    /// The claim is that of the instance, if it is there.
    async fn take_away(&self, net: &Net, devices: &[&str], claim: Option<&File>) -> Result<()> {
        let unwraps = |it: &Attachment| it.program == UNWRAP;
        let attached = Datapath::attached(&self.pin_root, &self.instance).because(Failure::Failed)?;
        let mut rest = attached.len();
        if attached.iter().any(unwraps) {
            let mut datapath = Datapath::load(&self.options()).because(Failure::Failed)?;
            for index in self.numbers(net, devices).await? {
                datapath.detach(index).because(Failure::Failed)?;
            }
            // Links of devices that are gone.
            datapath.collect_links().because(Failure::Failed)?;
            rest = datapath.attachments().because(Failure::Failed)?.into_iter().filter(unwraps).count();
        }
        let owners = self.settings(net, "")?.owners().because(Failure::Failed)?;
        let ours = owners.iter().filter_map(|owner| owner.strip_prefix(&self.owner("")));
        let (left, stay): (Vec<&str>, Vec<&str>) = ours.partition(|device| devices.contains(device));
        // A program that nobody is recorded for is one of a device that nobody finds any more.
        if rest == 0 || stay.is_empty() && !left.is_empty() {
            Datapath::purge_claimed(&self.pin_root, &self.instance, claim).because(Failure::Failed)?;
        }
        for device in devices {
            let mut settings = self.settings(net, device)?;
            settings.release().await.because(Failure::Failed)?;
            settings.remove_directories(None).because(Failure::Failed)?;
        }
        Ok(())
    }

    /// What was changed for the sake of one device.
    fn settings(&self, net: &Net, device: &str) -> Result<Settings> {
        Settings::of(net, self.owner(device)).because(Failure::Failed)
    }

    /// The name that it is recorded under.
    fn owner(&self, device: &str) -> String {
        format!("lb-backend {} {device}", self.instance)
    }

    /// What is claimed of a device.
    fn claim(&self, device: &str) -> String {
        format!("{UNWRAP} {} {device}", self.instance)
    }

    fn check(&self) -> Result<()> {
        if rustix::process::geteuid().is_root() {
            return Ok(());
        }
        Err(Error::new(Failure::Failed, "programs are loaded into the kernel").hint("run it as root"))
    }

    async fn check_devices(&self, net: &Net) -> Result<()> {
        for device in &self.devices {
            if net.find_link(device).await.because(Failure::Failed)?.is_none() {
                let there: Vec<String> =
                    net.links().await.because(Failure::Failed)?.into_iter().map(|link| link.name).collect();
                return Err(Error::new(Failure::BadInput, format!("there is no device {device}"))
                    .hint(format!("devices: {}", there.join(", "))));
            }
        }
        Ok(())
    }

    /// Every address of the host, and those of services: they stand on a device that no packet comes in by.
    async fn addresses(&self, net: &Net) -> std::result::Result<(Vec<IpAddr>, Vec<IpAddr>), NetError> {
        let links = net.links().await?;
        let quiet = |index| links.iter().any(|it| it.index == index && (it.name == LOOPBACK || it.kind == DUMMY));
        let all = net.addresses().await?;
        let served = all.iter().filter(|it| quiet(it.device)).map(|it| it.ip).collect();
        Ok((all.into_iter().map(|it| it.ip).collect(), served))
    }

    /// The addresses are the host's, but nobody on its network may hear so: the load balancer is asked for them.
    async fn add(&self, net: &Net, device: &str) -> Result<()> {
        let mut settings = self.settings(net, device)?;
        // Also without an address of its own the device is known from here on.
        let index = net.link(device).await.because(Failure::Failed)?.index;
        let (by_name, by_number) = (self.claim(device), self.claim(&format!("{device} {index}")));
        settings.claim(&by_name).because(Failure::Failed)?;
        // The number that it had before it was made anew may be another's by now.
        settings.disclaim(|claim| claim != by_name && claim != by_number).because(Failure::Failed)?;
        settings.claim(&by_number).because(Failure::Failed)?;
        for vip in &self.vips {
            if vip.is_ipv4() {
                for (name, value) in SETTINGS {
                    settings.set(&format!("ipv4/conf/{device}/{name}"), value).because(Failure::Failed)?;
                }
            }
            let address = host_address(*vip, net.link(LOOPBACK).await.because(Failure::Failed)?.index);
            settings.add_address(&address).await.because(Failure::Failed)?;
        }
        Ok(())
    }

    /// One program and hardly any table: nothing is looked up here.
    fn options(&self) -> LoadOptions {
        let small = |map: &cirri_abi::Map| (map.name.to_owned(), 1024);
        let maps = [
            map::FLOWS4,
            map::FLOWS6,
            map::PENDING4,
            map::PENDING6,
            map::FRAGMENTS,
            map::AFFINITY,
            map::BACKENDS,
            map::SERVICE_SLOTS,
        ];
        let mut sizes: BTreeMap<String, u32> = maps.iter().map(small).collect();
        sizes.insert(map::EVENTS.name.to_owned(), 64 * 1024);
        let (pin_root, instance) = (self.pin_root.clone(), self.instance.clone());
        LoadOptions { pin_root, instance, sizes, hooking: None, uses: Vec::new() }
    }
}

/// A device and its number.
fn numbered(text: &str) -> Option<(&str, u32)> {
    let (device, index) = text.split_once(' ')?;
    Some((device, index.parse().ok()?))
}

fn host_address(ip: IpAddr, device: u32) -> Address {
    Address { ip, prefix: if ip.is_ipv4() { 32 } else { 128 }, device }
}
