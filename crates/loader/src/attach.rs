//! Programs on devices: attached, replaced by an upgrade, taken off.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::programs::TcAttachType;

use crate::{
    chain, clsact,
    datapath::Datapath,
    edge,
    error::LoadError,
    features::Hooking,
    net::probe,
    pins::{Pins, at},
    socket_hooks::CGROUP,
    sys::{self, Direction, LinkInfo},
};

/// A program on a device, or on the sockets of a cgroup.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Attachment {
    /// The program's name, also that of its hook.
    pub program: String,
    /// The device; 0 for a cgroup.
    pub ifindex: u32,
}

pub(crate) const WORKLOAD: &[(&str, TcAttachType)] =
    &[("from_workload", TcAttachType::Ingress), ("to_workload", TcAttachType::Egress)];
pub(crate) const NETWORK: &[(&str, TcAttachType)] =
    &[("from_network", TcAttachType::Ingress), ("to_network", TcAttachType::Egress)];
pub(crate) const OVERLAY: &[(&str, TcAttachType)] =
    &[("from_overlay", TcAttachType::Ingress), ("to_overlay", TcAttachType::Egress)];
pub(crate) const UNWRAP: &[(&str, TcAttachType)] = &[("unwrap", TcAttachType::Ingress)];

/// The names of these programs.
pub(crate) fn names(programs: &[(&'static str, TcAttachType)]) -> Vec<&'static str> {
    programs.iter().map(|(name, _)| *name).collect()
}

/// Whether a program is one of these.
pub(crate) fn is_program(name: &str) -> bool {
    [WORKLOAD, NETWORK, OVERLAY, UNWRAP].into_iter().flatten().any(|(ours, _)| *ours == name)
}

impl Datapath {
    // === Attaching ===

    /// Puts the programs on the node's side of a workload's device, replacing those of an earlier
    /// run atomically. Answers the device's number.
    pub fn attach_workload(&mut self, device: &str) -> Result<u32, LoadError> {
        self.attach(device, WORKLOAD)
    }

    /// The same for a device of the node. What [`Datapath::attach_edge`] put there stays.
    pub fn attach_network(&mut self, device: &str) -> Result<u32, LoadError> {
        self.attach(device, NETWORK)
    }

    /// The same for the overlay device.
    pub fn attach_overlay(&mut self, device: &str) -> Result<u32, LoadError> {
        self.attach(device, OVERLAY)
    }

    /// The same for a device of a host that only serves: takes the packets that a load balancer sent it
    /// in IPIP out of their wrapping.
    pub fn attach_unwrap(&mut self, device: &str) -> Result<u32, LoadError> {
        self.attach(device, UNWRAP)
    }

    /// Takes all programs off a device. Nothing happens if there are none, or if it is gone.
    pub fn detach(&mut self, ifindex: u32) -> Result<(), LoadError> {
        if ifindex == CGROUP {
            return Ok(());
        }
        for (path, _) in self.pins.links_now()? {
            if attachment(&path).is_some_and(|it| it.ifindex == ifindex) {
                self.pins.drop_link(&path)?;
            }
        }
        self.held.retain(|attachment, _| attachment.ifindex != ifindex);
        self.set_edge_device(ifindex, None)?;
        clsact::keep_only(&self.pins, ifindex, &[])
    }

    /// Takes the programs off every device but these, as an earlier run with another configuration leaves some. A
    /// workload's keeps them, known or not: it would be open. Answers the numbers of the devices.
    pub fn leave_others(&mut self, stay: &BTreeSet<u32>) -> Result<BTreeSet<u32>, LoadError> {
        let attached = self.attachments()?;
        let of_workload = |it: &&Attachment| names(WORKLOAD).contains(&it.program.as_str());
        let workloads: BTreeSet<u32> = attached.iter().filter(of_workload).map(|it| it.ifindex).collect();
        let stays = |ifindex: &u32| *ifindex == CGROUP || stay.contains(ifindex) || workloads.contains(ifindex);
        let others: BTreeSet<u32> = attached.iter().map(|it| it.ifindex).filter(|ifindex| !stays(ifindex)).collect();
        others.iter().try_for_each(|ifindex| self.detach(*ifindex))?;
        Ok(others)
    }

    /// Everything that is attached: by a pinned link, device gone or not, or as a filter in the calling thread's
    /// namespace.
    pub fn attachments(&self) -> Result<Vec<Attachment>, LoadError> {
        attached_of(&self.pins)
    }

    /// Removes the links whose device or cgroup is gone.
    pub fn collect_links(&mut self) -> Result<Vec<Attachment>, LoadError> {
        let mut collected = Vec::new();
        for (path, info) in self.pins.links_now()? {
            if info.is_loose() {
                self.pins.drop_link(&path)?;
                collected.extend(attachment(&path));
            }
        }
        clsact::forget_gone(&self.pins);
        Ok(collected)
    }

    fn attach(&mut self, device: &str, programs: &[(&'static str, TcAttachType)]) -> Result<u32, LoadError> {
        let ifindex = device_number(device)?;
        self.programs.load(&names(programs))?;
        self.before_attaching(ifindex)?;
        for &(program, direction) in programs {
            let pin = self.pins.link(program, ifindex);
            match self.hooking {
                Hooking::Tcx => {
                    let place = chain::Place { program, device, ifindex, direction: direction_of(program) };
                    attach_tcx(self.programs.fd(program)?.as_fd(), place, &pin)?;
                }
                Hooking::Clsact => {
                    let classifier = self.programs.classifier(program)?;
                    let attached = clsact::attach(&self.pins, (program, classifier), direction, device, ifindex);
                    attached.map_err(attaching(program, device))?;
                }
            }
        }
        // What another version attached here and this one does not. The edge is the network's companion.
        let belongs = |program: &str| {
            programs.iter().any(|(name, _)| *name == program) || programs == NETWORK && program == edge::PROGRAM
        };
        for (path, _) in self.pins.links_now()? {
            if attachment(&path).is_some_and(|it| it.ifindex == ifindex && !belongs(&it.program)) {
                self.pins.drop_link(&path)?;
            }
        }
        let filters = if self.hooking == Hooking::Clsact { names(programs) } else { Vec::new() };
        clsact::keep_only(&self.pins, ifindex, &filters)?;
        self.after_attaching(ifindex)?;
        Ok(ifindex)
    }
}

/// Replaces the program of the pinned link, or makes the link and pins it. In the end the program runs first.
fn attach_tcx(program: BorrowedFd<'_>, place: chain::Place<'_>, pin: &Path) -> Result<(), LoadError> {
    let chain::Place { program: name, device, ifindex, direction } = place;
    chain::end_move(pin)?;
    let Some((link, info)) = pinned_on(pin, ifindex)? else {
        let link = sys::link_tcx_first(program, ifindex, direction).map_err(attaching(name, device))?;
        return sys::pin(link.as_fd(), pin).map_err(at(pin, "pin"));
    };
    // The number alone does not name a device: another namespace may have it too.
    let there = sys::chain(ifindex, direction).map_err(attaching(name, device))?;
    if !there.iter().any(|other| other.link == info.id) {
        return Err(LoadError::ForeignLink { path: pin.to_owned(), ifindex });
    }
    sys::update_link(link.as_fd(), program).map_err(attaching(name, device))?;
    match chain::before(name, ifindex, direction, &there, info.id) {
        Some(_) => chain::move_to_front(program, place, link.as_fd(), pin),
        None => Ok(()),
    }
}

/// What is attached by pinned links, device gone or not, and as filters.
pub(crate) fn attached_of(pins: &Pins) -> Result<Vec<Attachment>, LoadError> {
    let mut all: Vec<_> = pins.links_now()?.iter().filter_map(|(path, _)| attachment(path)).collect();
    all.extend(clsact::attachments(pins)?);
    all.sort();
    Ok(all)
}

/// The workloads' devices of an instance that are in the calling thread's namespace.
pub(crate) fn workloads(pins: &Pins) -> Result<Vec<String>, LoadError> {
    let mut devices = Vec::new();
    for (path, info) in pins.links_now()? {
        let ingress = attachment(&path).is_some_and(|it| it.program == WORKLOAD[0].0);
        let Some(device) = device_name(info.ifindex()).ok().filter(|_| ingress) else { continue };
        // The number alone does not name a device: another namespace may have it too.
        let here = match sys::chain(info.ifindex(), Direction::Ingress) {
            // It went just now, with its workload.
            Err(_) if device_name(info.ifindex()).is_err() => continue,
            other => other.map_err(attaching(WORKLOAD[0].0, &device))?,
        };
        if here.iter().any(|other| other.link == info.id) {
            devices.push(device);
        }
    }
    let filters = clsact::attachments(pins)?.into_iter().filter(|it| it.program == WORKLOAD[0].0);
    devices.extend(filters.filter_map(|it| device_name(it.ifindex).ok()));
    Ok(devices)
}

/// Which packets of its device a program gets.
pub(crate) fn direction_of(program: &str) -> Direction {
    let mut programs = [WORKLOAD, NETWORK, OVERLAY, UNWRAP].into_iter().flatten();
    match programs.find(|(name, _)| *name == program) {
        Some((_, TcAttachType::Egress)) => Direction::Egress,
        _ => Direction::Ingress,
    }
}

/// The pinned link, if it is on this device. One that is not is of a device that is gone: its pin is
/// removed.
pub(crate) fn pinned_on(pin: &Path, ifindex: u32) -> Result<Option<(OwnedFd, LinkInfo)>, LoadError> {
    let Some((link, info)) = pinned(pin)? else { return Ok(None) };
    if info.ifindex() == ifindex {
        return Ok(Some((link, info)));
    }
    fs::remove_file(pin).map_err(at(pin, "unpin"))?;
    Ok(None)
}

/// The pinned link, if there is one.
pub(crate) fn pinned(pin: &Path) -> Result<Option<(OwnedFd, LinkInfo)>, LoadError> {
    let link = match sys::open_pin(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(pin, "open")(error)),
    };
    let info = sys::link_info(link.as_fd()).map_err(at(pin, "ask for its link"))?;
    Ok(Some((link, info)))
}

pub(crate) fn attaching<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    program: &'static str,
    device: &str,
) -> impl FnOnce(E) -> LoadError {
    let device = device.to_owned();
    move |error| LoadError::Attach { program, device, error: error.into() }
}

pub(crate) fn attachment(pin: &Path) -> Option<Attachment> {
    let (program, ifindex) = pin.file_name()?.to_str()?.rsplit_once('-')?;
    Some(Attachment { program: program.to_owned(), ifindex: ifindex.parse().ok()? })
}

pub(crate) fn device_number(device: &str) -> Result<u32, LoadError> {
    let number = probe().and_then(|socket| Ok(rustix::net::netdevice::name_to_index(socket, device)?));
    number.map_err(|_| LoadError::NoDevice { device: device.into() })
}

pub(crate) fn device_name(ifindex: u32) -> io::Result<String> {
    Ok(rustix::net::netdevice::index_to_name(probe()?, ifindex)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_link_names_its_program_and_its_device() {
        let pin = Path::new("/sys/fs/bpf/cirri/default/links/from_workload-12");
        assert_eq!(attachment(pin), Some(Attachment { program: "from_workload".into(), ifindex: 12 }));
    }
}
