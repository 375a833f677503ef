//! A packet before the stack, at XDP.

use core::ptr;

use aya_ebpf::{
    bindings::xdp_md,
    helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail},
};
use cirri_datapath::{Packet, TunnelKey, Wire, adjusted};

pub struct Raw {
    ctx: *mut xdp_md,
}

impl Raw {
    #[inline(always)]
    pub fn new(ctx: *mut xdp_md) -> Raw {
        Raw { ctx }
    }

    /// Start and end of the packet, read as volatile for the reason given at `Skb::at`.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        // SAFETY: fields of the context.
        unsafe {
            (
                ptr::read_volatile(&raw const (*self.ctx).data) as usize,
                ptr::read_volatile(&raw const (*self.ctx).data_end) as usize,
            )
        }
    }

    #[inline(always)]
    fn at(&self, offset: u32, size: usize) -> Option<*mut u8> {
        let (start, end) = self.bounds();
        let at = start + (offset & 0xfff) as usize;
        (at + size <= end).then_some(at as *mut u8)
    }

    /// Moves the bytes of a `W` at `to + by` to `to`.
    #[inline(always)]
    fn bring_forward<W: Wire>(&mut self, to: u32, by: u32) -> bool {
        match self.load::<W>(to + by) {
            Some(bytes) => self.store(to, &bytes),
            None => false,
        }
    }
}

impl Packet for Raw {
    const RAW: bool = true;

    #[inline(always)]
    fn load<W: Wire>(&self, offset: u32) -> Option<W> {
        let at = self.at(offset, size_of::<W>())?;
        // SAFETY: in bounds, checked just above; every bit pattern is a valid `W`, and the target's loads
        // allow any alignment for packets.
        Some(unsafe { ptr::read(at.cast::<W>()) })
    }

    #[inline(always)]
    fn store<W: Wire>(&mut self, offset: u32, value: &W) -> bool {
        let Some(at) = self.at(offset, size_of::<W>()) else {
            return false;
        };
        // SAFETY: as in `load`.
        unsafe { ptr::write(at.cast::<W>(), *value) };
        true
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        let (start, end) = self.bounds();
        // Through memory, so that LLVM does not mix the subtraction with others: the verifier allows it
        // between these two only.
        let mut length = 0;
        // SAFETY: a local variable.
        unsafe {
            ptr::write_volatile(&mut length, (end - start) as u32);
            ptr::read_volatile(&length)
        }
    }

    /// A tag still stands in the bytes here, and makes the packet one that is not read.
    #[inline(always)]
    fn tagged(&self) -> bool {
        false
    }

    /// The device's address is not known here; at least no group's frame is ours alone.
    #[inline(always)]
    fn is_for_us(&self) -> bool {
        match self.load::<u16>(0) {
            Some(start) => start.to_ne_bytes()[0] & 1 == 0,
            None => false,
        }
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: a field of the context, volatile for the reason given at `Skb::ifindex`.
        unsafe { ptr::read_volatile(&raw const (*self.ctx).ingress_ifindex) }
    }

    /// All that a driver gives before the stack is linear.
    #[inline(always)]
    fn pull(&mut self, _length: u32) {}

    #[inline(always)]
    fn open(&mut self, at: u32, bytes: u32) -> bool {
        // SAFETY: the context is the program's own; pointers into the packet are not kept.
        if unsafe { bpf_xdp_adjust_head(self.ctx, -(bytes as i32)) } != 0 {
            return false;
        }
        // The Ethernet header, and one or two pieces of twenty bytes: what is moved at once takes stack.
        self.bring_forward::<[u16; 7]>(0, bytes)
            && (at < 34 || self.bring_forward::<[u16; 10]>(14, bytes))
            && (at < 54 || self.bring_forward::<[u16; 10]>(34, bytes))
    }

    /// Nothing is unpacked before the stack.
    #[inline(always)]
    fn close(&mut self, _bytes: u32) -> bool {
        false
    }

    #[inline(always)]
    fn resize(&mut self, length: u32) -> bool {
        let delta = length as i32 - self.length() as i32;
        // SAFETY: as in `open`.
        unsafe { bpf_xdp_adjust_tail(self.ctx, delta) == 0 }
    }

    #[inline(always)]
    fn is_segmented(&self) -> bool {
        false
    }

    #[inline(always)]
    fn update_l3_checksum(&mut self, offset: u32, delta: u32) -> bool {
        let Some(old) = self.load::<u16>(offset) else {
            return false;
        };
        self.store(offset, &adjusted(old, delta))
    }

    #[inline(always)]
    fn update_l4_checksum(&mut self, offset: u32, delta: u32, _pseudo: bool, udp: bool, _v6: bool) -> bool {
        let Some(old) = self.load::<u16>(offset) else {
            return false;
        };
        if udp && old == 0 {
            return true;
        }
        let new = adjusted(old, delta);
        self.store(offset, &if udp && new == 0 { 0xffff } else { new })
    }

    #[inline(always)]
    fn tunnel_key(&self) -> Option<TunnelKey> {
        None
    }

    #[inline(always)]
    fn set_tunnel_key(&mut self, _peer: u32, _vni: u32) -> bool {
        false
    }

    #[inline(always)]
    fn decided(&self) -> bool {
        false
    }

    #[inline(always)]
    fn set_decided(&mut self) {}

    #[inline(always)]
    fn set_for_us(&mut self) {}
}
