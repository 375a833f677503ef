//! Devices.

use std::{io, os::fd::AsRawFd};

use futures::TryStreamExt;
use rtnetlink::{
    LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan,
    packet_route::{
        RouteNetlinkMessage,
        link::{InfoData, InfoVeth, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    },
    sys::protocols::NETLINK_ROUTE,
};

use super::{Namespace, Net, NetError, absent_is_false, kernel, wire};

/// A device as the kernel describes it.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Link {
    /// Its number in this namespace.
    pub index: u32,
    /// Its name in this namespace.
    pub name: String,
    /// Its Ethernet address, if it has one.
    pub mac: Option<[u8; 6]>,
    /// Largest packet, bytes from the IP header on.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Whether what it needs to send is there: a cable, the other end.
    pub carrier: bool,
    /// Whether the kernel asks nobody for Ethernet addresses there, and answers nobody (`ip link set DEVICE arp off`).
    pub noarp: bool,
    /// Its kind (`veth`, `vxlan`, `bridge`); empty for hardware and `lo`.
    pub kind: String,
    /// The bridge that it is a port of.
    pub controller: Option<u32>,
    /// The device at its other end (veth), by its number there.
    pub peer: Option<u32>,
    /// What somebody wrote on it (`ip link set DEVICE alias TEXT`); empty for nothing.
    pub alias: String,
    /// Of an overlay device: how it is made.
    pub vxlan: Option<Vxlan>,
}

/// How an overlay device is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Vxlan {
    /// Its UDP port.
    pub port: u16,
    /// Whether it takes peer and VNI from each packet's metadata.
    pub collect_metadata: bool,
    /// Whether it does something else besides: filters VNIs, has another header, learns or has a peer of its own.
    pub odd: bool,
}

/// One end of a pair of virtual Ethernet devices.
#[derive(Clone, Default, Debug)]
pub struct VethEnd {
    /// Its name.
    pub name: String,
    /// Its Ethernet address; the kernel picks one otherwise.
    pub mac: Option<[u8; 6]>,
    /// Largest packet; 1500 otherwise.
    pub mtu: Option<u32>,
    /// Where it shall be; the namespace of the [`Net`] otherwise.
    pub namespace: Option<Namespace>,
}

/// The numbers of the devices of the calling thread's namespace.
pub(crate) fn devices() -> io::Result<Vec<u32>> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let answers = wire::ask(NETLINK_ROUTE, request, wire::Scope::All)?.into_iter();
    Ok(answers
        .filter_map(|it| if let RouteNetlinkMessage::NewLink(link) = it { Some(link.header.index) } else { None })
        .collect())
}

impl Net {
    /// All devices.
    pub async fn links(&self) -> Result<Vec<Link>, NetError> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let links = self.list("devices", request, wire::Scope::All, |message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        })?;
        Ok(links.iter().map(described).collect())
    }

    /// The device with this name, if there is one.
    pub async fn find_link(&self, name: &str) -> Result<Option<Link>, NetError> {
        self.find(name, self.handle.link().get().match_name(name)).await
    }

    /// The device with this number, if there is one.
    pub async fn find_link_by_index(&self, index: u32) -> Result<Option<Link>, NetError> {
        self.find(&index.to_string(), self.handle.link().get().match_index(index)).await
    }

    /// The device with this name.
    pub async fn link(&self, name: &str) -> Result<Link, NetError> {
        let absent = || NetError::NoLink { namespace: self.namespace.path().into(), link: name.into() };
        self.find_link(name).await?.ok_or_else(absent)
    }

    /// Makes a pair of devices, each at once with its name, address and size and in its namespace.
    /// If the first exists already nothing is changed. Both are down.
    pub async fn create_veth(&self, end: &VethEnd, peer: &VethEnd) -> Result<(), NetError> {
        let mut other = LinkMessageBuilder::<LinkUnspec>::new().name(&peer.name);
        if let Some(mac) = peer.mac {
            other = other.address(mac.to_vec());
        }
        if let Some(mtu) = peer.mtu {
            other = other.mtu(mtu);
        }
        if let Some(namespace) = &peer.namespace {
            other = other.setns_by_fd(namespace.file().as_raw_fd());
        }
        let mut pair = LinkMessageBuilder::<LinkVeth>::new(&end.name, &peer.name)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(other.build())));
        if let Some(mac) = end.mac {
            pair = pair.address(mac.to_vec());
        }
        if let Some(mtu) = end.mtu {
            pair = pair.mtu(mtu);
        }
        if let Some(namespace) = &end.namespace {
            pair = pair.setns_by_fd(namespace.file().as_raw_fd());
        }
        self.create_link(&end.name, pair.build()).await
    }

    /// Makes an overlay device that takes peer and VNI from each packet's metadata. Down.
    pub async fn create_vxlan(&self, name: &str, port: u16, mtu: u32) -> Result<(), NetError> {
        let device = LinkMessageBuilder::<LinkVxlan>::new(name)
            .collect_metadata(true)
            .learning(false)
            .port(port)
            .udp_csum(false)
            .udp_zero_csum6_tx(true)
            .udp_zero_csum6_rx(true)
            .mtu(mtu)
            .arp(false);
        self.create_link(name, device.build()).await
    }

    /// Makes a bridge. Down.
    pub async fn create_bridge(&self, name: &str) -> Result<(), NetError> {
        // Nobody asks for multicast listeners here: snooping could only lose neighbour solicitations.
        self.create_link(name, LinkBridge::new(name).mcast_snooping(false).build()).await
    }

    /// Brings a device up.
    pub async fn set_up(&self, name: &str) -> Result<(), NetError> {
        let link = self.link(name).await?;
        if link.up {
            return Ok(());
        }
        self.change(name, "bring up", LinkUnspec::new_with_index(link.index).up()).await
    }

    /// Takes a device down.
    pub async fn set_down(&self, name: &str) -> Result<(), NetError> {
        let link = self.link(name).await?;
        self.change(name, "take down", LinkUnspec::new_with_index(link.index).down()).await
    }

    /// Makes the kernel ask nobody for Ethernet addresses there, and answer nobody.
    pub async fn set_noarp(&self, name: &str) -> Result<(), NetError> {
        let link = self.link(name).await?;
        self.change(name, "turn ARP off", LinkUnspec::new_with_index(link.index).arp(false)).await
    }

    /// Sets the largest packet.
    pub async fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), NetError> {
        let link = self.link(name).await?;
        if link.mtu == mtu {
            return Ok(());
        }
        self.change(name, "set the MTU", LinkUnspec::new_with_index(link.index).mtu(mtu)).await
    }

    /// Sets the Ethernet address.
    pub async fn set_mac(&self, name: &str, mac: [u8; 6]) -> Result<(), NetError> {
        let link = self.link(name).await?;
        if link.mac == Some(mac) {
            return Ok(());
        }
        self.change(name, "set the address", LinkUnspec::new_with_index(link.index).address(mac.to_vec())).await
    }

    /// Writes on a device whose it is: up to 255 bytes, which `ip link` shows.
    pub async fn set_alias(&self, index: u32, alias: &str) -> Result<(), NetError> {
        let mut message = LinkUnspec::new_with_index(index).build();
        message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
        let changed = self.handle.link().change(message).execute().await;
        self.checked(|| format!("device {index}"), "write the alias of", changed)
    }

    /// Gives a device another name. It must be down on kernels before 6.2.
    pub async fn rename(&self, name: &str, to: &str) -> Result<(), NetError> {
        let link = self.link(name).await?;
        self.change(name, "rename", LinkUnspec::new_with_index(link.index).name(to)).await
    }

    /// Moves a device into another namespace; there it is down and without addresses.
    pub async fn move_to(&self, name: &str, namespace: &Namespace) -> Result<(), NetError> {
        let link = self.link(name).await?;
        let moved = LinkUnspec::new_with_index(link.index).setns_by_fd(namespace.file().as_raw_fd());
        self.change(name, "move to another namespace", moved).await
    }

    /// Makes a device a port of a bridge.
    pub async fn set_controller(&self, name: &str, bridge: &str) -> Result<(), NetError> {
        let (link, bridge) = (self.link(name).await?, self.link(bridge).await?);
        self.change(name, "make it a port", LinkUnspec::new_with_index(link.index).controller(bridge.index)).await
    }

    /// Makes a device no bridge's port any more.
    pub async fn unset_controller(&self, name: &str) -> Result<(), NetError> {
        let link = self.link(name).await?;
        self.change(name, "take it out of its bridge", LinkUnspec::new_with_index(link.index).nocontroller()).await
    }

    /// Removes a device, and with a veth its other end; whether there was one.
    pub async fn delete_link(&self, name: &str) -> Result<bool, NetError> {
        let Some(link) = self.find_link(name).await? else { return Ok(false) };
        self.delete_link_by_index(link.index).await
    }

    /// The same for one that is known by its number: a name may be another's by now.
    pub async fn delete_link_by_index(&self, index: u32) -> Result<bool, NetError> {
        absent_is_false(self.handle.link().del(index).execute().await)
            .map_err(|error| self.failed(format!("device {index}"), "delete", error))
    }

    async fn find(&self, what: &str, request: rtnetlink::LinkGetRequest) -> Result<Option<Link>, NetError> {
        let found = request.execute().try_next().await;
        match found.map_err(kernel) {
            Ok(link) => Ok(link.as_ref().map(described)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(self.failed(format!("device {what}"), "look up", error)),
        }
    }

    async fn create_link(&self, name: &str, message: LinkMessage) -> Result<(), NetError> {
        match self.handle.link().add(message).execute().await.map_err(kernel) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => {
                Err(self.failed(format!("device {name}"), "create", error))
            }
            _ => Ok(()),
        }
    }

    async fn change(
        &self,
        name: &str,
        action: &'static str,
        to: LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), NetError> {
        let changed = self.handle.link().change(to.build()).execute().await;
        self.checked(|| format!("device {name}"), action, changed)
    }
}

fn described(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        noarp: message.header.flags.contains(LinkFlags::Noarp),
        kind: String::new(),
        controller: None,
        peer: None,
        alias: String::new(),
        vxlan: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::Link(index) => link.peer = Some(*index),
            LinkAttribute::IfAlias(alias) => link.alias.clone_from(alias),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
                        LinkInfo::Data(InfoData::Vxlan(parts)) => link.vxlan = Some(vxlan(parts)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link
}

fn vxlan(parts: &[InfoVxlan]) -> Vxlan {
    let mut all = Vxlan::default();
    for part in parts {
        match part {
            InfoVxlan::Port(port) => all.port = *port,
            InfoVxlan::CollectMetadata(on) => all.collect_metadata = *on,
            InfoVxlan::Id(number) | InfoVxlan::Link(number) => all.odd |= *number != 0,
            InfoVxlan::Learning(on)
            | InfoVxlan::Proxy(on)
            | InfoVxlan::Rsc(on)
            | InfoVxlan::L2Miss(on)
            | InfoVxlan::L3Miss(on)
            | InfoVxlan::RemCsumTX(on)
            | InfoVxlan::RemCsumRX(on)
            | InfoVxlan::Vnifilter(on)
            | InfoVxlan::McRoute(on) => all.odd |= *on,
            InfoVxlan::Group(ip) | InfoVxlan::Local(ip) => all.odd |= !ip.is_unspecified(),
            InfoVxlan::Group6(_)
            | InfoVxlan::Local6(_)
            | InfoVxlan::Gbp
            | InfoVxlan::Gpe
            | InfoVxlan::RemCsumNoPartial => all.odd = true,
            _ => {}
        }
    }
    all
}
