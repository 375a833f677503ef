//! Settings of all devices at once, as the kernel tells them by netlink: a file for each would cost a hundred times that.

use std::{collections::BTreeMap, io};

use rtnetlink::{
    packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable},
    sys::protocols::NETLINK_ROUTE,
};

use super::{
    Net, NetError,
    wire::{Scope, ask},
};

/// What the kernel does with packets that come in by a device.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct DeviceSettings {
    /// `ipv4/conf/DEVICE/forwarding`.
    pub forwarding_v4: Option<i32>,
    /// `ipv4/conf/DEVICE/rp_filter`.
    pub rp_filter: Option<i32>,
    /// `ipv6/conf/DEVICE/forwarding`.
    pub forwarding_v6: Option<i32>,
}

/// A question about a family, or the answer about a device (`struct netconfmsg` and its attributes).
#[derive(Clone, Default, PartialEq, Eq, Debug)]
struct Netconf {
    family: u8,
    device: u32,
    forwarding: Option<i32>,
    rp_filter: Option<i32>,
}

impl Net {
    /// The settings of every device, by its number.
    pub fn device_settings(&self, v6: bool) -> Result<BTreeMap<u32, DeviceSettings>, NetError> {
        let families = [Some(libc::AF_INET), v6.then_some(libc::AF_INET6)];
        let mut all: BTreeMap<u32, DeviceSettings> = BTreeMap::new();
        for family in families.into_iter().flatten() {
            let request = Netconf { family: family as u8, ..Netconf::default() };
            let answers = self.namespace.run_anywhere(|| ask(NETLINK_ROUTE, request, Scope::All))?;
            for answer in answers.map_err(|error| self.failed("settings of devices", "list", error))? {
                let settings = all.entry(answer.device).or_default();
                if family == libc::AF_INET {
                    (settings.forwarding_v4, settings.rp_filter) = (answer.forwarding, answer.rp_filter);
                } else {
                    settings.forwarding_v6 = answer.forwarding;
                }
            }
        }
        Ok(all)
    }
}

/// The family, padded as netlink wants it.
const HEADER: usize = 4;

impl NetlinkSerializable for Netconf {
    fn message_type(&self) -> u16 {
        const RTM_GETNETCONF: u16 = 82;
        RTM_GETNETCONF
    }

    fn buffer_len(&self) -> usize {
        HEADER
    }

    fn serialize(&self, buffer: &mut [u8]) {
        if let Some(first) = buffer.first_mut() {
            *first = self.family;
        }
    }
}

impl NetlinkDeserializable for Netconf {
    type Error = io::Error;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Netconf, io::Error> {
        const NETCONFA_IFINDEX: u16 = 1;
        const NETCONFA_FORWARDING: u16 = 2;
        const NETCONFA_RP_FILTER: u16 = 3;
        let mut told = Netconf { family: payload.first().copied().unwrap_or_default(), ..Netconf::default() };
        let mut rest = payload.get(HEADER..).unwrap_or_default();
        while let [a, b, c, d, ..] = *rest {
            let (length, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
            let value = rest.get(4..length).and_then(|value| value.try_into().ok()).map(i32::from_ne_bytes);
            match kind {
                // Those of `all` and `default` are negative.
                NETCONFA_IFINDEX => told.device = value.unwrap_or_default().cast_unsigned(),
                NETCONFA_FORWARDING => told.forwarding = value,
                NETCONFA_RP_FILTER => told.rp_filter = value,
                _ => {}
            }
            rest = rest.get(length.max(4).next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(told)
    }
}
