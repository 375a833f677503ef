//! Where the slow path is cut into subprograms.
//!
//! A stack frame may hold 512 bytes, summed over the chain of calls, so each stage has a frame of
//! its own. Arguments are plain pointers: BTF knows no Rust enums. Results travel in the scratch: a
//! result in a register would be a different constant for every way out of a stage, and the verifier
//! would walk all that follows once for each.

use core::{ffi::c_void, ptr};

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use cirri_abi::{DropReason, Hook};
use cirri_datapath::{Next, Outcome, Packed, Packet, Refusal, Scratch, Stage, run_stage, slow_path};

use crate::{
    maps::SCRATCH,
    skb::Skb,
    tables::{Context, Kernel},
    xdp::Raw,
};

/// The subprograms of one kind of packet: `slow`, the slow path in a frame of its own, so that the fast
/// path's stays small; and `run`, one stage of it.
macro_rules! seams {
    ($module:ident, $context:ty, $packet:ident, [$($name:ident: $stage:ident,)*]) => {
        pub mod $module {
            use super::*;

            /// The slow path.
            #[inline(always)]
            pub fn slow(hook: u8, ctx: *mut $context) -> Packed {
                #[inline(never)]
                fn seam(ctx: *mut $context, scratch: *mut c_void, hook: u32) {
                    // SAFETY: the caller's own exclusive reference, lent for this call.
                    let scratch = unsafe { &mut *scratch.cast::<Scratch>() };
                    // Before the stack there is one hook only; a constant keeps the others' ways out.
                    let hook = if <$packet as Packet>::RAW { Hook::FROM_NETWORK } else { hook as u8 };
                    scratch.word = slow_path(hook, &mut $packet::new(ctx), &Kernel(ctx), scratch).word;
                }
                let Some(scratch) = scratch() else {
                    return Packed::drop(DropReason::NO_CONFIG);
                };
                seam(ctx, ptr::from_mut(scratch).cast(), hook as u32);
                Packed { word: scratch.word }
            }

            /// One stage of it. What a kind of packet never comes to has no subprogram.
            #[inline(always)]
            pub fn run(stage: Stage, ctx: *mut $context, scratch: &mut Scratch) -> Outcome {
                $(
                    #[inline(never)]
                    fn $name(ctx: *mut $context, scratch: *mut c_void) {
                        // SAFETY: the caller's own exclusive reference, lent for this call.
                        let scratch = unsafe { &mut *scratch.cast::<Scratch>() };
                        scratch.word = pack(run_stage(Stage::$stage, &mut $packet::new(ctx), &Kernel(ctx), scratch));
                    }
                )*
                match stage {
                    $(Stage::$stage => $name(ctx, ptr::from_mut(scratch).cast()),)*
                    #[allow(unreachable_patterns, reason = "one kind of packet comes to every stage")]
                    _ => return Err(DropReason::MISSED_TAIL_CALL.into()),
                }
                unpack(scratch.word)
            }
        }
    };
}

seams!(tc, __sk_buff, Skb, [
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
    echo: Echo,
    serve: Serve,
    judge: Judge,
    draft: Draft,
    translate: Translate,
    reclaim: Reclaim,
    write: Write,
    mark: Mark,
    answer: Answer,
    answer_v6: AnswerV6,
    send_back: SendBack,
    report: Report,
]);

seams!(xdp, xdp_md, Raw, [
    parse: Parse,
    extension: Extension,
    transport: Transport,
    meet: Meet,
    revisit: Revisit,
    replace: Replace,
    advance: Advance,
    check_source: CheckSource,
    locate: Locate,
    echo: Echo,
    serve: Serve,
    judge: Judge,
    draft: Draft,
    translate: Translate,
    reclaim: Reclaim,
    write: Write,
    mark: Mark,
    answer: Answer,
    answer_v6: AnswerV6,
    send_back: SendBack,
    report: Report,
]);

impl Context for *mut __sk_buff {
    #[inline(always)]
    fn pointer(self) -> *mut c_void {
        self.cast()
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        // SAFETY: a field of the context.
        unsafe { (*self).ifindex }
    }

    #[inline(always)]
    fn run(self, stage: Stage, scratch: &mut Scratch) -> Outcome {
        tc::run(stage, self, scratch)
    }
}

impl Context for *mut xdp_md {
    #[inline(always)]
    fn pointer(self) -> *mut c_void {
        self.cast()
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        // SAFETY: a field of the context.
        unsafe { (*self).ingress_ifindex }
    }

    #[inline(always)]
    fn run(self, stage: Stage, scratch: &mut Scratch) -> Outcome {
        xdp::run(stage, self, scratch)
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

/// An outcome as a register: a verdict's own, or a number that is no verdict's.
#[inline(always)]
fn pack(outcome: Outcome) -> u64 {
    match outcome {
        Ok(Next::Go) => 0,
        Ok(Next::Carry) => 1,
        Ok(Next::Done(packed)) => packed.word,
        Err(Refusal { reason, quiet: true, .. }) => 8 | (reason.code as u64) << 8,
        Err(Refusal { reason, answer: true, .. }) => 9 | (reason.code as u64) << 8,
        Err(Refusal { reason, .. }) => 7 | (reason.code as u64) << 8,
    }
}

#[inline(always)]
fn unpack(word: u64) -> Outcome {
    let reason = DropReason { code: (word >> 8) as u8 };
    match word & 0xff {
        0 => Ok(Next::Go),
        1 => Ok(Next::Carry),
        7 => Err(Refusal { reason, quiet: false, answer: false }),
        8 => Err(Refusal { reason, quiet: true, answer: false }),
        9 => Err(Refusal { reason, quiet: false, answer: true }),
        _ => Ok(Next::Done(Packed { word })),
    }
}
