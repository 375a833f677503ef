//! The program at the very edge of the node: XDP, before the kernel makes anything of a packet.

use std::{fmt, io, os::fd::AsFd, path::Path};

use crate::{
    attach::{attaching, device_number, pinned_on},
    datapath::Datapath,
    error::{LoadError, MapError},
    ethernet,
    net::xdp_on,
    sys,
};

/// The program, also that of its pins.
pub(crate) const PROGRAM: &str = "edge";

/// How packets shall be met at a device's edge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EdgeWanted {
    /// By the programs of [`Datapath::attach_network`] alone.
    Off,
    /// By XDP behind the driver: works with every device, saves little.
    Generic,
    /// By XDP in the driver, or not at all.
    Native,
    /// By the first of native and generic that the device can, else as with [`EdgeWanted::Off`]; so also
    /// for virtual Ethernet pairs.
    BestEffort,
}

impl EdgeWanted {
    /// The same for a device whose program is attached again. What best effort once reached there is owed: to fall
    /// back, because somebody else has taken the place, is no choice but a fault that is told.
    #[must_use]
    pub fn again(self, reached: Option<EdgeMode>) -> Self {
        match (self, reached) {
            (EdgeWanted::BestEffort, Some(EdgeMode::Native)) => EdgeWanted::Native,
            (EdgeWanted::BestEffort, Some(EdgeMode::Generic)) => EdgeWanted::Generic,
            _ => self,
        }
    }
}

/// How packets are met at a device's edge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EdgeMode {
    /// XDP in the driver.
    Native,
    /// XDP behind the driver.
    Generic,
    /// Not by XDP: tc does it.
    Tc,
}

/// What became of a wish for a device's edge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EdgeStatus {
    /// The device.
    pub device: String,
    /// How packets are met.
    pub mode: EdgeMode,
    /// Why it is no better one; empty if there is none.
    pub reason: String,
}

impl fmt::Display for EdgeMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EdgeMode::Native => "native",
            EdgeMode::Generic => "generic",
            EdgeMode::Tc => "tc",
        })
    }
}

impl Datapath {
    /// Puts the XDP program on a device of the node, replacing that of an earlier run atomically if the
    /// mode stays the same. A change of mode leaves the packets in between to tc.
    ///
    /// The programs of [`Datapath::attach_network`] must be there too: they do all that this one leaves.
    pub fn attach_edge(&mut self, device: &str, wanted: EdgeWanted) -> Result<EdgeStatus, LoadError> {
        let ifindex = device_number(device)?;
        self.before_attaching(ifindex)?;
        let status = self.try_edge(device, ifindex, wanted);
        self.after_attaching(ifindex)?;
        // A device whose driver runs the program also takes what the program sends to it.
        let native = status.as_ref().is_ok_and(|status| status.mode == EdgeMode::Native);
        self.set_edge_device(ifindex, if native { ethernet::address(device).ok() } else { None })?;
        status
    }

    fn try_edge(&mut self, device: &str, ifindex: u32, wanted: EdgeWanted) -> Result<EdgeStatus, LoadError> {
        let modes: &[EdgeMode] = match wanted {
            EdgeWanted::Off => &[],
            EdgeWanted::Generic => &[EdgeMode::Generic],
            EdgeWanted::Native => &[EdgeMode::Native],
            // Its other end takes what the program sends back only if it has a program too.
            EdgeWanted::BestEffort if ethernet::is_veth(device).unwrap_or(false) => &[],
            EdgeWanted::BestEffort => &[EdgeMode::Native, EdgeMode::Generic],
        };
        let status = |mode, reason: String| EdgeStatus { device: device.to_owned(), mode, reason };
        let pin = self.pins.link(PROGRAM, ifindex);
        if let Some((link, info)) = pinned_on(&pin, ifindex)? {
            // The number alone does not name a device: another namespace may have it too.
            let now = xdp_on(ifindex).map_err(attaching(PROGRAM, device))?;
            let Some(now) = now.filter(|now| now.program == info.program) else {
                return Err(LoadError::ForeignLink { path: pin, ifindex });
            };
            if modes.first() == Some(&now.mode) {
                let program = self.programs.fd(PROGRAM)?;
                sys::update_link(link.as_fd(), program.as_fd()).map_err(attaching(PROGRAM, device))?;
                return Ok(status(now.mode, String::new()));
            }
            self.pins.drop_link(&pin)?;
        }
        let mut refusals = Vec::new();
        for mode in modes {
            match self.link_edge(ifindex, *mode, &pin) {
                Ok(()) => return Ok(status(*mode, refusals.join("; "))),
                Err(LinkRefused::ByKernel(error)) => refusals.push(format!("{mode}: {}", in_words(&error))),
                Err(LinkRefused::Else(error)) => return Err(error),
            }
        }
        match wanted {
            EdgeWanted::Off => Ok(status(EdgeMode::Tc, "acceleration is off".into())),
            EdgeWanted::BestEffort if modes.is_empty() => Ok(status(
                EdgeMode::Tc,
                "one end of a virtual Ethernet pair: native needs a program at its other end too, and generic is no \
                 faster than tc; ask for one of them if it is wanted"
                    .into(),
            )),
            EdgeWanted::BestEffort => Ok(status(EdgeMode::Tc, refusals.join("; "))),
            EdgeWanted::Generic | EdgeWanted::Native => Err(attaching(PROGRAM, device)(refusals.join("; "))),
        }
    }

    /// Takes the XDP program off a device; whether it was there.
    pub fn detach_edge(&mut self, ifindex: u32) -> Result<bool, LoadError> {
        self.set_edge_device(ifindex, None)?;
        let pin = self.pins.link(PROGRAM, ifindex);
        let there = pin.exists();
        if there {
            self.pins.drop_link(&pin)?;
        }
        Ok(there)
    }

    /// Says that a device takes frames before the stack, by its Ethernet address. Those past the table's end do not.
    pub(crate) fn set_edge_device(&mut self, ifindex: u32, address: Option<[u8; 6]>) -> Result<(), MapError> {
        let table = &self.tables().edge_devices;
        if ifindex < table.capacity() {
            let last = address.map_or(0, |mac| u32::from_ne_bytes([mac[2], mac[3], mac[4], mac[5]]));
            table.put(&ifindex, &last)?;
            self.edge_devices.insert(ifindex, last);
        }
        Ok(())
    }

    fn link_edge(&mut self, ifindex: u32, mode: EdgeMode, pin: &Path) -> Result<(), LinkRefused> {
        const GENERIC: u32 = 1 << 1;
        const NATIVE: u32 = 1 << 2;
        let flags = if mode == EdgeMode::Native { NATIVE } else { GENERIC };
        let program = self.programs.fd(PROGRAM).map_err(LinkRefused::Else)?;
        let link = sys::link_xdp(program.as_fd(), ifindex, flags).map_err(LinkRefused::ByKernel)?;
        let pinned = sys::pin(link.as_fd(), pin);
        pinned.map_err(|error| LinkRefused::Else(crate::pins::at(pin, "pin")(error)))
    }
}

enum LinkRefused {
    ByKernel(io::Error),
    Else(LoadError),
}

/// What drivers mean by their answers.
fn in_words(error: &io::Error) -> String {
    let meaning = match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "the driver cannot do this, or not with the device's present offloads",
        Some(libc::EBUSY | libc::EEXIST) => "another XDP program is on the device",
        Some(libc::ERANGE) => "the device's MTU is too large for it",
        Some(libc::EINVAL) => "the driver refuses, as many do if the MTU is too large",
        Some(libc::ENOSPC | libc::ENOMEM) => "the driver has too few queues or too little memory for it",
        _ => return error.to_string(),
    };
    format!("{meaning} ({error})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_it_means_and_what_the_kernel_said() {
        let words = in_words(&io::Error::from_raw_os_error(libc::EBUSY));
        assert!(words.contains("another XDP program") && words.contains("os error 16"), "{words}");
        assert!(in_words(&io::Error::from_raw_os_error(libc::EPERM)).contains("os error 1)"));
    }
}
