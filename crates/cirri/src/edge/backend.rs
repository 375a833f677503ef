//! A plain host behind a load balancer with `forwarding: dsr-ipip`: takes packets out of their wrapping.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use cirri_abi::map;
use cirri_loader::net::{Address, Net, NetError};
use cirri_loader::{Datapath, LoadOptions};

use super::devices;
use crate::exit::{Because, Error, Failure, Result};

/// What to do on a host that serves.
#[derive(Clone, Debug)]
pub struct BackendHost {
    /// Devices that wrapped packets come in by.
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
/// The name of the program.
const UNWRAP: &str = "unwrap";
/// The kernel answers for an address on whatever device it stands, unless it is told not to: settings
/// of the devices that packets come in by.
const SETTINGS: [(&str, &str); 2] = [("arp_ignore", "1"), ("arp_announce", "2")];

impl BackendHost {
    /// Attaches the program, which stays when this process ends, and adds the addresses.
    ///
    /// # Errors
    /// A device is missing, or the kernel refuses.
    pub async fn set_up(&self) -> Result<()> {
        let net = Net::here().because(Failure::Failed)?;
        self.check(&net).await?;
        for vip in &self.vips {
            self.add(&net, *vip).await.because(Failure::Failed)?;
        }
        let mut datapath = Datapath::load(&self.options()).because(Failure::Failed)?;
        // Only what is for this host itself is unwrapped.
        let own: Vec<IpAddr> = net.addresses().await.because(Failure::Failed)?.into_iter().map(|it| it.ip).collect();
        devices::tell_own(datapath.tables(), &own).because(Failure::Failed)?;
        for device in &self.devices {
            datapath.attach_unwrap(device).because(Failure::Failed)?;
        }
        datapath.retire().because(Failure::Failed)?;
        Ok(())
    }

    /// Takes away what [`BackendHost::set_up`] brought: from these devices, or all of it if they were the
    /// last.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn remove(&self) -> Result<()> {
        let net = Net::here().because(Failure::Failed)?;
        self.check(&net).await?;
        for vip in &self.vips {
            let device = net.link(LOOPBACK).await.because(Failure::Failed)?.index;
            net.delete_address(&host_address(*vip, device)).await.because(Failure::Failed)?;
        }
        let mut datapath = Datapath::load(&self.options()).because(Failure::Failed)?;
        for device in &self.devices {
            let link = net.link(device).await.because(Failure::Failed)?;
            datapath.detach(link.index).because(Failure::Failed)?;
        }
        let rest = datapath.attachments().because(Failure::Failed)?;
        drop(datapath);
        if !rest.iter().any(|it| it.program == UNWRAP) {
            Datapath::purge(&self.pin_root, &self.instance).because(Failure::Failed)?;
        }
        Ok(())
    }

    async fn check(&self, net: &Net) -> Result<()> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::new(Failure::Failed, "programs are loaded into the kernel").hint("run it as root"));
        }
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

    /// The address is the host's, but nobody on its network may hear so: the load balancer is asked for it.
    async fn add(&self, net: &Net, vip: IpAddr) -> std::result::Result<(), NetError> {
        if vip.is_ipv4() {
            for device in &self.devices {
                for (name, value) in SETTINGS {
                    net.set_sysctl(&format!("ipv4/conf/{device}/{name}"), value)?;
                }
            }
        }
        let device = net.link(LOOPBACK).await?.index;
        net.add_address(&host_address(vip, device)).await
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
        LoadOptions { pin_root: self.pin_root.clone(), instance: self.instance.clone(), sizes, hooking: None }
    }
}

fn host_address(ip: IpAddr, device: u32) -> Address {
    Address { ip, prefix: if ip.is_ipv4() { 32 } else { 128 }, device }
}
