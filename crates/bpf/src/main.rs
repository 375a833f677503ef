//! The kernel programs: maps, adapters, entry points. Nothing is decided here; see `cirri-datapath`.

#![no_std]
#![no_main]

mod maps;
mod seams;
mod skb;
mod tables;
mod wrap;

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1},
    helpers::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer},
    macros::classifier,
    programs::TcContext,
};
use cirri_abi::Hook;
use cirri_datapath::{Packet, Verdict, process};

use crate::{skb::Skb, tables::Kernel};

/// Packets that come out of a workload: tcx ingress of its device.
#[classifier]
pub fn from_workload(ctx: TcContext) -> i32 {
    run(Hook::FROM_WORKLOAD, ctx)
}

/// Packets that the node's stack sends into a workload: tcx egress of its device.
#[classifier]
pub fn to_workload(ctx: TcContext) -> i32 {
    run(Hook::TO_WORKLOAD, ctx)
}

/// Packets from the network: tcx ingress of the node's devices.
#[classifier]
pub fn from_network(ctx: TcContext) -> i32 {
    run(Hook::FROM_NETWORK, ctx)
}

/// Packets out of the overlay: tcx ingress of the overlay device.
#[classifier]
pub fn from_overlay(ctx: TcContext) -> i32 {
    run(Hook::FROM_OVERLAY, ctx)
}

/// Packets into the overlay: tcx egress of the overlay device.
#[classifier]
pub fn to_overlay(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx.skb.skb);
    if skb.decided() {
        return TC_ACT_OK;
    }
    act(seams::slow(Hook::TO_OVERLAY, &mut skb))
}

/// Does nothing: the floor that the other programs are measured beside.
#[classifier]
pub fn floor(_ctx: TcContext) -> i32 {
    TC_ACT_OK
}

#[inline(always)]
fn run(hook: u8, ctx: TcContext) -> i32 {
    let mut skb = Skb::new(ctx.skb.skb);
    let verdict = process(hook, &mut skb, &Kernel(ctx.skb.skb), |skb, _| seams::slow(hook, skb));
    act(verdict)
}

/// The one place where a verdict becomes an action.
#[inline(always)]
fn act(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Continue => TC_ACT_OK,
        // SAFETY: helpers without pointers.
        Verdict::Local { ifindex } => unsafe { bpf_redirect_peer(ifindex, 0) as i32 },
        // SAFETY: as above.
        Verdict::Device { ifindex } => unsafe { bpf_redirect(ifindex, 0) as i32 },
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
