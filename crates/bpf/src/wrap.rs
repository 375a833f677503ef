//! For measuring: puts the packet back as it was, then jumps to the program under test.
//!
//! `BPF_PROG_TEST_RUN` with `repeat` hands the packet that a program has rewritten to its next run.
//! This program, run in place of the measured one, restores the headers and the metadata first, and
//! may give every run another flow. No device ever has it attached.

use core::ptr;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, bpf_tunnel_key, bpf_tunnel_key__bindgen_ty_1, xdp_action},
    btf_maps::{Array, ProgramArray},
    helpers::{bpf_skb_set_tunnel_key, bpf_xdp_adjust_head, bpf_xdp_adjust_tail},
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};

/// Bytes of headers that are restored; the packet must have them in its linear part.
const HEADERS: usize = 80;
/// Ports of this many flows before the destination port is moved on: `SPORT_FIRST` and the next.
const SPORTS: u64 = 1 << 14;
const SPORT_FIRST: u16 = 10_000;
/// `bpf_tunnel_key` up to and with `local_ipv4`.
const TUNNEL_KEY_SIZE: u32 = 44;

/// What user space writes (`cirri_loader::Trial`): sixteen words.
#[repr(C)]
struct Template {
    headers: [u64; HEADERS / 8],
    /// Counts the runs; its low bits under `mask` are the flow's number.
    counter: u64,
    mask: u64,
    /// 1: the transport header follows an IPv6 header, else an IPv4 one.
    v6: u64,
    /// The mark; at XDP, the packet's length.
    mark: u64,
    /// Identity to come out of the overlay with; 0 for a packet that did not.
    vni: u64,
    /// The node it came from; IPv4, host order.
    remote: u64,
}

#[btf_map]
static TEMPLATE: Array<[u64; 16], 1> = Array::new();
#[btf_map]
static MEASURED: ProgramArray<1> = ProgramArray::new();
#[btf_map]
static MEASURED_EDGE: ProgramArray<1> = ProgramArray::new();

const _: () = assert!(size_of::<Template>() == size_of::<[u64; 16]>());

/// Restores the packet and jumps.
#[classifier]
pub fn wrap(ctx: TcContext) -> i32 {
    let Some(template) = TEMPLATE.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: the map's only value, 128 bytes of words, which any bits are good for; one program
    // runs at a time.
    let template = unsafe { &mut *template.cast::<Template>() };
    // SAFETY: fields of the context, volatile as in `Skb::at`.
    let (start, end) = unsafe {
        (ptr::read_volatile(&raw const (*ctx.skb.skb).data), ptr::read_volatile(&raw const (*ctx.skb.skb).data_end))
    };
    let packet = start as usize;
    if packet + HEADERS > end as usize {
        return TC_ACT_SHOT;
    }
    // SAFETY: the bytes were checked above.
    unsafe { restore(packet, template) };
    // SAFETY: writable fields of the context.
    unsafe {
        (*ctx.skb.skb).mark = template.mark as u32;
        (*ctx.skb.skb).tc_index = 0;
        (*ctx.skb.skb).cb = [0; 5];
    }
    if template.vni != 0 && !came_from(&ctx, template.remote as u32, template.vni as u32) {
        return TC_ACT_SHOT;
    }
    // SAFETY: nothing here needs to be dropped.
    unsafe { MEASURED.tail_call(&ctx, 0) };
    TC_ACT_SHOT
}

/// The same at XDP, where the packet's length is put back too: what was opened for an outer header.
#[xdp]
pub fn wrap_edge(ctx: XdpContext) -> u32 {
    let Some(template) = TEMPLATE.get_ptr_mut(0) else {
        return xdp_action::XDP_ABORTED;
    };
    // SAFETY: as in `wrap`.
    let template = unsafe { &mut *template.cast::<Template>() };
    // SAFETY: fields of the context, volatile as in `Skb::at`.
    let bounds = || unsafe {
        (
            ptr::read_volatile(&raw const (*ctx.ctx).data) as usize,
            ptr::read_volatile(&raw const (*ctx.ctx).data_end) as usize,
        )
    };
    let (start, end) = bounds();
    // SAFETY: a constant pointer's value through memory, so that the verifier sees a number from here on.
    let length = unsafe {
        let mut length = 0;
        ptr::write_volatile(&mut length, (end - start) as i32);
        ptr::read_volatile(&length)
    };
    let grown = length - template.mark as i32;
    // SAFETY: the context is the program's own; the bounds are read again.
    unsafe {
        if grown > 0 {
            bpf_xdp_adjust_head(ctx.ctx, grown);
        } else if grown < 0 {
            // An answer is cut off behind.
            bpf_xdp_adjust_tail(ctx.ctx, -grown);
        }
    }
    let (packet, end) = bounds();
    if packet + HEADERS > end {
        return xdp_action::XDP_ABORTED;
    }
    // SAFETY: the bytes were checked above.
    unsafe { restore(packet, template) };
    // SAFETY: nothing here needs to be dropped.
    unsafe { MEASURED_EDGE.tail_call(&ctx, 0) };
    xdp_action::XDP_ABORTED
}

/// Writes the headers, and another flow's ports if there are to be many.
///
/// # Safety
///
/// `packet` points to at least [`HEADERS`] bytes of the packet.
#[inline(always)]
unsafe fn restore(packet: usize, template: &mut Template) {
    for (i, word) in template.headers.iter().enumerate() {
        // SAFETY: within the bytes that the caller checked. The address may be misaligned: the target's
        // stores allow that for packets, and the verifier knows (as in `Skb::load`).
        unsafe { ptr::write((packet + i * 8) as *mut u64, *word) };
    }
    if template.mask == 0 {
        return;
    }
    let flow = template.counter & template.mask;
    template.counter = template.counter.wrapping_add(1);
    let transport = packet + if template.v6 != 0 { 54 } else { 34 };
    let sport = (SPORT_FIRST + (flow & (SPORTS - 1)) as u16).to_be();
    // SAFETY: as above.
    unsafe {
        ptr::write(transport as *mut u16, sport);
        let dport = (transport + 2) as *mut u16;
        let moved = u16::from_be(ptr::read(dport)).wrapping_add((flow / SPORTS) as u16);
        ptr::write(dport, moved.to_be());
    }
}

/// Makes the packet one out of the overlay. The kernel has one kind of tunnel metadata for both
/// directions: what is set as the local address here is read back as the remote one.
#[inline(always)]
fn came_from(ctx: &TcContext, remote: u32, vni: u32) -> bool {
    // SAFETY: zeroes are a valid key.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = vni;
    key.tunnel_ttl = 64;
    key.__bindgen_anon_1 = bpf_tunnel_key__bindgen_ty_1 { remote_ipv4: remote };
    key.__bindgen_anon_3.local_ipv4 = remote;
    // SAFETY: the buffer is as large as the size passed.
    unsafe { bpf_skb_set_tunnel_key(ctx.skb.skb, &mut key, TUNNEL_KEY_SIZE, 0) == 0 }
}
