//! What a hook does with a packet.

use cirri_abi::DropReason;

/// What the hook does with the packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Let it go on to where it was going.
    Continue,
    /// Into the workload behind this device, past the device's own egress hook.
    Local {
        /// The node's side of the workload's device.
        ifindex: u32,
    },
    /// Out of this device, Ethernet header as it is.
    Device {
        /// The device.
        ifindex: u32,
    },
    /// Out of this device, to the neighbour that the kernel finds.
    Neighbour {
        /// The device.
        ifindex: u32,
        /// IPv4 neighbour in network order; 0 to ask the routes.
        peer: u32,
    },
    /// Up to this node's own stack, as if it had come by this device.
    Up {
        /// The device.
        ifindex: u32,
    },
    /// Drop it.
    Drop(DropReason),
}

/// A verdict in one register: kind in the low byte, then device or reason, then the neighbour.
///
/// Inside the packet path verdicts travel like this. Where ways with different verdicts meet, an enum
/// leaves the fields that a verdict does not have undefined, and the verifier refuses a program that
/// so much as moves them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packed {
    /// The register. The values 0, 1, 7, 8, 9 and from 11 on are nobody's, and free for hosts.
    pub word: u64,
}

impl Packed {
    /// [`Verdict::Continue`].
    pub const CONTINUE: Packed = Packed { word: 2 };

    /// [`Verdict::Local`].
    #[inline(always)]
    pub const fn local(ifindex: u32) -> Packed {
        Packed { word: 3 | device(ifindex) }
    }

    /// [`Verdict::Device`].
    #[inline(always)]
    pub const fn device(ifindex: u32) -> Packed {
        Packed { word: 4 | device(ifindex) }
    }

    /// [`Verdict::Neighbour`].
    #[inline(always)]
    pub const fn neighbour(ifindex: u32, peer: u32) -> Packed {
        Packed { word: 5 | device(ifindex) | (peer as u64) << 32 }
    }

    /// [`Verdict::Up`].
    #[inline(always)]
    pub const fn up(ifindex: u32) -> Packed {
        Packed { word: 10 | device(ifindex) }
    }

    /// [`Verdict::Drop`].
    #[inline(always)]
    pub const fn drop(reason: DropReason) -> Packed {
        Packed { word: 6 | (reason.code as u64) << 8 }
    }

    /// The verdict.
    #[inline(always)]
    pub const fn verdict(self) -> Verdict {
        let ifindex = (self.word >> 8) as u32 & 0xff_ffff;
        match self.word & 0xff {
            3 => Verdict::Local { ifindex },
            4 => Verdict::Device { ifindex },
            5 => Verdict::Neighbour { ifindex, peer: (self.word >> 32) as u32 },
            10 => Verdict::Up { ifindex },
            6 => Verdict::Drop(DropReason { code: (self.word >> 8) as u8 }),
            _ => Verdict::Continue,
        }
    }
}

/// Device numbers have 24 bits; the kernel counts them from 1.
#[inline(always)]
const fn device(ifindex: u32) -> u64 {
    (ifindex as u64 & 0xff_ffff) << 8
}
