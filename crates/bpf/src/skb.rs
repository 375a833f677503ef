//! A packet at a tc hook.

use core::{mem::MaybeUninit, ptr};

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR,
        BPF_F_ZERO_CSUM_TX,
        bpf_adj_room_mode::{BPF_ADJ_ROOM_MAC, BPF_ADJ_ROOM_NET},
        bpf_tunnel_key, bpf_tunnel_key__bindgen_ty_1,
    },
    helpers::{
        bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_change_type, bpf_skb_get_tunnel_key,
        bpf_skb_pull_data, bpf_skb_set_tunnel_key,
    },
};
use cirri_datapath::{Packet, TunnelKey, Wire, adjusted};

pub const AF_INET: u32 = 2;
const PACKET_HOST: u32 = 0;
/// Bytes of an Ethernet header.
const ETHERNET: u32 = 14;
/// Mark of packets that a hook of this node has decided on: Cilium's "overlay" (its contract C12).
/// The kernel clears marks when a packet leaves a network namespace, so a workload cannot set it.
const MARK_DECIDED: u32 = 0x0400;
/// IPv6 addresses in the pseudo header (`BPF_F_IPV6`, Linux 6.16): the bindings lack it.
const BPF_F_IPV6: u64 = 1 << 7;
/// Bytes of `bpf_tunnel_key` up to and without `local_ipv4`: what every kernel since 4.9 accepts.
const TUNNEL_KEY_SIZE: u32 = 28;

pub struct Skb {
    ctx: *mut __sk_buff,
}

impl Skb {
    #[inline(always)]
    pub fn new(ctx: *mut __sk_buff) -> Skb {
        Skb { ctx }
    }

    /// Pointer to `size` bytes at `offset`, if the packet has them in its linear part.
    #[inline(always)]
    fn at(&self, offset: u32, size: usize) -> Option<*mut u8> {
        // SAFETY: fields of the context, read as volatile so that LLVM cannot promote them across
        // a subprogram's edge as plain integers (the verifier must see packet pointers).
        let (start, end) = unsafe {
            (ptr::read_volatile(&raw const (*self.ctx).data), ptr::read_volatile(&raw const (*self.ctx).data_end))
        };
        let offset = (offset & 0xfff) as usize;
        let at = start as usize + offset;
        (at + size <= end as usize).then_some(at as *mut u8)
    }
}

impl Packet for Skb {
    const RAW: bool = false;

    #[inline(always)]
    fn load<W: Wire>(&self, offset: u32) -> Option<W> {
        let at = self.at(offset, size_of::<W>())?;
        // SAFETY: in bounds, checked just above; every bit pattern is a valid `W`. The address may
        // be misaligned for `W`: the target's loads allow that for packets, and the verifier knows.
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
        // SAFETY: a field of the context.
        unsafe { (*self.ctx).len }
    }

    #[inline(always)]
    fn tagged(&self) -> bool {
        // SAFETY: a field of the context.
        unsafe { (*self.ctx).vlan_present != 0 }
    }

    #[inline(always)]
    fn is_for_us(&self) -> bool {
        // SAFETY: a field of the context.
        unsafe { (*self.ctx).pkt_type == PACKET_HOST }
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: a field of the context, volatile so that LLVM makes no pointer out of a choice between
        // this and another number: the verifier allows only plain context pointers.
        unsafe { ptr::read_volatile(&raw const (*self.ctx).ifindex) }
    }

    #[inline(always)]
    fn pull(&mut self, length: u32) {
        // SAFETY: fields of the context, as in `at`.
        let linear = unsafe {
            (ptr::read_volatile(&raw const (*self.ctx).data_end) as u64)
                .wrapping_sub(ptr::read_volatile(&raw const (*self.ctx).data) as u64)
        };
        let wanted = if self.length() < length { self.length() } else { length };
        if linear < wanted as u64 {
            // SAFETY: the context is the program's own; pointers into the packet are not kept.
            unsafe { bpf_skb_pull_data(self.ctx, wanted) };
        }
    }

    #[inline(always)]
    fn open(&mut self, at: u32, bytes: u32) -> bool {
        // If it is an outer IP header the kernel must know where the inner one begins, to cut segments.
        let (mode, flags) = match (at, bytes) {
            (ETHERNET, 20) => (BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4),
            (ETHERNET, 40) => (BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6),
            (ETHERNET, _) => (BPF_ADJ_ROOM_MAC, 0),
            _ => (BPF_ADJ_ROOM_NET, 0),
        };
        // SAFETY: the context is the program's own; pointers into the packet are not kept.
        unsafe { bpf_skb_adjust_room(self.ctx, bytes as i32, mode, flags as u64) == 0 }
    }

    #[inline(always)]
    fn close(&mut self, bytes: u32) -> bool {
        // SAFETY: as above.
        unsafe { bpf_skb_adjust_room(self.ctx, -(bytes as i32), BPF_ADJ_ROOM_MAC, 0) == 0 }
    }

    #[inline(always)]
    fn resize(&mut self, length: u32) -> bool {
        // SAFETY: as above.
        unsafe { bpf_skb_change_tail(self.ctx, length, 0) == 0 }
    }

    #[inline(always)]
    fn is_segmented(&self) -> bool {
        // SAFETY: a field of the context.
        unsafe { (*self.ctx).gso_segs > 1 }
    }

    #[inline(always)]
    fn update_l3_checksum(&mut self, offset: u32, delta: u32) -> bool {
        // As `bpf_l3_csum_replace` does, without the call: no device computes this one, and a header whose
        // checksum is right adds nothing to a sum over the packet.
        let Some(old) = self.load::<u16>(offset) else {
            return false;
        };
        self.store(offset, &adjusted(old, delta))
    }

    #[inline(always)]
    fn update_l4_checksum(&mut self, offset: u32, delta: u32, pseudo: bool, udp: bool, v6: bool) -> bool {
        let mut flags = 0;
        if pseudo {
            flags |= BPF_F_PSEUDO_HDR as u64;
            if v6 {
                flags |= BPF_F_IPV6;
            }
        }
        if udp {
            flags |= BPF_F_MARK_MANGLED_0 as u64;
        }
        // SAFETY: size 0 says that `to` is a difference (bpf-helpers(7)).
        let replace = |flags| unsafe { bpf_l4_csum_replace(self.ctx, offset, 0, delta as u64, flags) == 0 };
        // An older kernel does not know the flag, and does without it.
        replace(flags) || (flags & BPF_F_IPV6 != 0 && replace(flags & !BPF_F_IPV6))
    }

    #[inline(always)]
    fn tunnel_key(&self) -> Option<TunnelKey> {
        let mut key = MaybeUninit::<bpf_tunnel_key>::zeroed();
        // SAFETY: the buffer is as large as the size passed; zeroes are a valid key.
        let key = unsafe {
            if bpf_skb_get_tunnel_key(self.ctx, key.as_mut_ptr(), TUNNEL_KEY_SIZE, 0) != 0 {
                return None;
            }
            key.assume_init()
        };
        // SAFETY: without BPF_F_TUNINFO_IPV6 the address is IPv4, in host order.
        Some(TunnelKey { vni: key.tunnel_id & 0xff_ffff, remote: unsafe { key.__bindgen_anon_1.remote_ipv4 }.to_be() })
    }

    #[inline(always)]
    fn set_tunnel_key(&mut self, peer: u32, vni: u32) -> bool {
        // SAFETY: zeroes are a valid key.
        let mut key = unsafe { MaybeUninit::<bpf_tunnel_key>::zeroed().assume_init() };
        key.tunnel_id = vni & 0xff_ffff;
        key.tunnel_ttl = 64;
        key.__bindgen_anon_1 = bpf_tunnel_key__bindgen_ty_1 { remote_ipv4: u32::from_be(peer) };
        // SAFETY: the buffer is as large as the size passed.
        unsafe { bpf_skb_set_tunnel_key(self.ctx, &mut key, TUNNEL_KEY_SIZE, BPF_F_ZERO_CSUM_TX as u64) == 0 }
    }

    #[inline(always)]
    fn decided(&self) -> bool {
        // SAFETY: a field of the context.
        unsafe { (*self.ctx).mark == MARK_DECIDED }
    }

    #[inline(always)]
    fn set_decided(&mut self) {
        // SAFETY: a writable field of the context.
        unsafe { (*self.ctx).mark = MARK_DECIDED };
    }

    #[inline(always)]
    fn set_for_us(&mut self) {
        // SAFETY: helper without pointers but the context.
        unsafe { bpf_skb_change_type(self.ctx, PACKET_HOST) };
    }
}
