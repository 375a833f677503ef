//! The kernel programs: maps, adapters, entry points. Nothing is decided here; see `cirri-datapath`.

#![no_std]
#![no_main]

mod maps;
mod seams;
mod services;
mod skb;
mod socket;
mod tables;
mod wrap;
mod xdp;

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_INGRESS, TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh,
        bpf_redir_neigh__bindgen_ty_1, xdp_action, xdp_md,
    },
    helpers::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use cirri_abi::{Hook, node_flag};
use cirri_datapath::{
    Packet, Services, Verdict, fast_path, may_be_datagram_for_service, may_be_echo_request, unwrap_for_host,
};

use crate::{services::Maps, skb::Skb, tables::Kernel, xdp::Raw};

/// Packets that come out of a workload: tcx ingress of its device.
#[classifier]
pub fn from_workload(ctx: TcContext) -> i32 {
    run::<{ Hook::FROM_WORKLOAD }>(ctx)
}

/// Packets that the node's stack sends into a workload: tcx egress of its device.
#[classifier]
pub fn to_workload(ctx: TcContext) -> i32 {
    run::<{ Hook::TO_WORKLOAD }>(ctx)
}

/// Packets from the network: tcx ingress of the node's devices.
#[classifier]
pub fn from_network(ctx: TcContext) -> i32 {
    run::<{ Hook::FROM_NETWORK }>(ctx)
}

/// Packets of the network before the stack: XDP of the node's devices. What is for a service and for
/// another node goes on from here; everything else goes on to the stack, and `from_network`.
#[xdp]
pub fn edge(ctx: XdpContext) -> u32 {
    match fast_xdp(ctx.ctx) {
        SLOW => act_xdp(ctx.ctx, seams::xdp::slow(Hook::FROM_NETWORK, ctx.ctx).verdict()),
        action => action as u32,
    }
}

/// Packets that the node's stack sends to the network: tcx egress of the node's devices. Only answers of
/// the node's own backends are of interest, and what may be for a service's address and was not translated in the
/// system call: echo requests, and datagrams to ports that no service has.
#[classifier]
pub fn to_network(ctx: TcContext) -> i32 {
    let serves = match Maps.node() {
        Some(node) => node.flags & node_flag::HOST_BACKENDS != 0,
        None => false,
    };
    let skb = Skb::new(ctx.skb.skb);
    if skb.decided() || !(serves || may_be_echo_request(&skb) || may_be_datagram_for_service(&skb, &Maps)) {
        return GO_ON;
    }
    run::<{ Hook::TO_NETWORK }>(ctx)
}

/// For a plain host behind a load balancer that sends in IPIP: takes the outer header off what is for
/// a service of this host. The stack then sees the packet as its client sent it.
#[classifier]
pub fn unwrap(ctx: TcContext) -> i32 {
    act(unwrap_for_host(&mut Skb::new(ctx.skb.skb), &Kernel(ctx.skb.skb)).verdict())
}

/// Packets out of the overlay: tcx ingress of the overlay device.
#[classifier]
pub fn from_overlay(ctx: TcContext) -> i32 {
    run::<{ Hook::FROM_OVERLAY }>(ctx)
}

/// Packets into the overlay: tcx egress of the overlay device.
#[classifier]
pub fn to_overlay(ctx: TcContext) -> i32 {
    if Skb::new(ctx.skb.skb).decided() {
        return GO_ON;
    }
    act(seams::tc::slow(Hook::TO_OVERLAY, ctx.skb.skb).verdict())
}

/// Does nothing: the floor that the other programs are measured beside.
#[classifier]
pub fn floor(_ctx: TcContext) -> i32 {
    TC_ACT_OK
}

/// The same before the stack.
#[xdp]
pub fn floor_edge(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

#[inline(always)]
fn run<const HOOK: u8>(ctx: TcContext) -> i32 {
    match fast::<HOOK>(ctx.skb.skb) {
        SLOW => act(seams::tc::slow(HOOK, ctx.skb.skb).verdict()),
        action => action,
    }
}

/// What passes on passes to whoever comes after us, and to the stack after them: `TCX_NEXT`, in a filter "unspecified".
/// `TC_ACT_OK` would end it here, and another instance's programs on the device would never see what is for them.
const GO_ON: i32 = TC_ACT_UNSPEC;

/// What the fast paths answer when they leave a packet to the slow one: no action has this number.
const SLOW: i32 = i32::MIN;

/// The fast path, in a frame of its own. Whatever way it gives up, the verifier sees the same program
/// go on, and walks the slow path once.
#[inline(never)]
fn fast<const HOOK: u8>(ctx: *mut __sk_buff) -> i32 {
    match fast_path(HOOK, &mut Skb::new(ctx), &Kernel(ctx)) {
        Some(packed) => act(packed.verdict()),
        None => SLOW,
    }
}

/// The same at XDP.
#[inline(never)]
fn fast_xdp(ctx: *mut xdp_md) -> i32 {
    match fast_path(Hook::FROM_NETWORK, &mut Raw::new(ctx), &Kernel(ctx)) {
        Some(packed) => act_xdp(ctx, packed.verdict()) as i32,
        None => SLOW,
    }
}

/// What a verdict is at XDP.
#[inline(always)]
fn act_xdp(ctx: *mut xdp_md, verdict: Verdict) -> u32 {
    match verdict {
        Verdict::Drop(_) => xdp_action::XDP_DROP,
        Verdict::Device { ifindex } if ifindex == Raw::new(ctx).ifindex() => xdp_action::XDP_TX,
        // SAFETY: helper without pointers.
        Verdict::Device { ifindex } => unsafe { bpf_redirect(ifindex, 0) as u32 },
        _ => xdp_action::XDP_PASS,
    }
}

/// The one place where a verdict becomes an action.
#[inline(always)]
fn act(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Continue => GO_ON,
        // SAFETY: helpers without pointers.
        Verdict::Local { ifindex } => unsafe { bpf_redirect_peer(ifindex, 0) as i32 },
        // SAFETY: as above.
        Verdict::Device { ifindex } => unsafe { bpf_redirect(ifindex, 0) as i32 },
        // SAFETY: as above.
        Verdict::Up { ifindex } => unsafe { bpf_redirect(ifindex, BPF_F_INGRESS as u64) as i32 },
        Verdict::Neighbour { ifindex, peer: 0 } => {
            // SAFETY: a null parameter block asks the kernel's routes (bpf-helpers(7)).
            unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
        }
        Verdict::Neighbour { ifindex, peer } => {
            let mut params = bpf_redir_neigh {
                nh_family: skb::AF_INET,
                __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: [peer, 0, 0, 0] },
            };
            // SAFETY: the block lives on this stack and its size is passed.
            unsafe { bpf_redirect_neigh(ifindex, &mut params, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
        }
        Verdict::Drop(_) => TC_ACT_SHOT,
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses an endless loop, so a program that could panic never loads.
    loop {}
}

/// The programs call helpers that only GPL-compatible programs may; the licence of the source is Apache-2.0.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
