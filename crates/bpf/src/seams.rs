//! Where the slow path is cut into subprograms.
//!
//! A stack frame may hold 512 bytes, summed over the chain of calls, so each stage has a frame of
//! its own. Arguments are plain pointers: BTF knows no Rust enums. Results travel in the scratch: a
//! result in a register would be a different constant for every way out of a stage, and the verifier
//! would walk all that follows once for each.

use core::{ffi::c_void, ptr};

use aya_ebpf::bindings::__sk_buff;
use cirri_abi::DropReason;
use cirri_datapath::{Next, Outcome, Refusal, Scratch, Stage, Verdict, run_stage, slow_path};

use crate::{maps::SCRATCH, skb::Skb, tables::Kernel};

/// The slow path, in a frame of its own: the fast path's stays small.
#[inline(always)]
pub fn slow(hook: u8, skb: &mut Skb) -> Verdict {
    #[inline(never)]
    fn seam(ctx: *mut __sk_buff, scratch: *mut c_void, hook: u32) {
        // SAFETY: the caller's own exclusive reference, lent for this call.
        let scratch = unsafe { &mut *scratch.cast::<Scratch>() };
        scratch.word = pack(Ok(Next::Done(slow_path(hook as u8, &mut Skb::new(ctx), &Kernel(ctx), scratch))));
    }
    let Some(scratch) = scratch() else {
        return Verdict::Drop(DropReason::NO_CONFIG);
    };
    seam(skb.context(), ptr::from_mut(scratch).cast(), hook as u32);
    match unpack(scratch.word) {
        Ok(Next::Done(verdict)) => verdict,
        Ok(_) => Verdict::Continue,
        Err(refusal) => Verdict::Drop(refusal.reason),
    }
}

/// One stage of it.
#[inline(always)]
pub fn run(stage: Stage, ctx: *mut __sk_buff, scratch: &mut Scratch) -> Outcome {
    macro_rules! seams {
        ($($name:ident: $stage:ident,)*) => {
            $(
                #[inline(never)]
                fn $name(ctx: *mut __sk_buff, scratch: *mut c_void) {
                    // SAFETY: the caller's own exclusive reference, lent for this call.
                    let scratch = unsafe { &mut *scratch.cast::<Scratch>() };
                    scratch.word = pack(run_stage(Stage::$stage, &mut Skb::new(ctx), &Kernel(ctx), scratch));
                }
            )*
            match stage { $(Stage::$stage => $name(ctx, ptr::from_mut(scratch).cast()),)* }
            unpack(scratch.word)
        };
    }
    seams! {
        parse: Parse,
        extension: Extension,
        transport: Transport,
        link_local: LinkLocal,
        related: Related,
        meet: Meet,
        revisit: Revisit,
        replace: Replace,
        advance: Advance,
        check_source: CheckSource,
        locate: Locate,
        judge: Judge,
        draft: Draft,
        masquerade: Masquerade,
        write: Write,
        report: Report,
    }
}

/// This CPU's scratch.
#[inline(always)]
fn scratch<'a>() -> Option<&'a mut Scratch> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: the slot is this CPU's own, and programs at tc hooks are not re-entered on one CPU
    // (softirq or bottom halves off). Zeroes, and whatever a stage leaves, are a valid `Scratch`.
    Some(unsafe { &mut *scratch })
}

/// An outcome as a register: kind in the low byte, then device or reason, then the neighbour.
#[inline(always)]
fn pack(outcome: Outcome) -> u64 {
    let device = |ifindex: u32| (ifindex as u64 & 0xff_ffff) << 8;
    match outcome {
        Ok(Next::Go) => 0,
        Ok(Next::Carry) => 1,
        Ok(Next::Done(Verdict::Continue)) => 2,
        Ok(Next::Done(Verdict::Local { ifindex })) => 3 | device(ifindex),
        Ok(Next::Done(Verdict::Device { ifindex })) => 4 | device(ifindex),
        Ok(Next::Done(Verdict::Neighbour { ifindex, peer })) => 5 | device(ifindex) | (peer as u64) << 32,
        Ok(Next::Done(Verdict::Drop(reason))) => 6 | (reason.code as u64) << 8,
        Err(Refusal { reason, quiet: false }) => 7 | (reason.code as u64) << 8,
        Err(Refusal { reason, quiet: true }) => 8 | (reason.code as u64) << 8,
    }
}

#[inline(always)]
fn unpack(word: u64) -> Outcome {
    let ifindex = (word >> 8) as u32 & 0xff_ffff;
    let reason = DropReason { code: (word >> 8) as u8 };
    match word & 0xff {
        0 => Ok(Next::Go),
        1 => Ok(Next::Carry),
        2 => Ok(Next::Done(Verdict::Continue)),
        3 => Ok(Next::Done(Verdict::Local { ifindex })),
        4 => Ok(Next::Done(Verdict::Device { ifindex })),
        5 => Ok(Next::Done(Verdict::Neighbour { ifindex, peer: (word >> 32) as u32 })),
        6 => Ok(Next::Done(Verdict::Drop(reason))),
        7 => Err(Refusal { reason, quiet: false }),
        _ => Err(Refusal { reason, quiet: true }),
    }
}
