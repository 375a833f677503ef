//! Running and timing a program on a packet, without a device (`BPF_PROG_TEST_RUN`).

use std::time::Duration;

use aya::{
    Ebpf,
    maps::{Array, MapData, ProgramArray},
    programs::{TestRun, TestRunOptions},
};

use crate::{LoadError, MapError, edge, programs::Programs};

/// Runs loaded programs on packets of the caller's making.
///
/// A run goes through the program `wrap` (for XDP `wrap_edge`), which puts the packet's first [`Trial::HEADERS`] bytes
/// and its metadata back before each repetition and jumps to the program under test: the kernel
/// itself would hand the rewritten packet to the next repetition. What the way there costs is what
/// the program `floor` (for XDP `floor_edge`) costs in the same kind of run.
///
/// Tables are the real ones: what a program writes in one run the next one finds.
pub struct Trial<'a> {
    programs: &'a mut Programs,
    template: Array<MapData, [u64; 16]>,
    measured: ProgramArray<MapData>,
    measured_edge: ProgramArray<MapData>,
}

/// A packet, how it is met, and how often.
#[derive(Clone, Debug)]
pub struct Shot<'a> {
    /// From the Ethernet header on; at least [`Trial::HEADERS`] bytes.
    pub packet: &'a [u8],
    /// The device it is met on, in the network namespace of the calling thread.
    pub ifindex: u32,
    /// Its mark; frames at the edge have none.
    pub mark: u32,
    /// Out of the overlay, not at the edge: the sender's identity, and the node it came from (IPv4, host order).
    pub tunnel: Option<(u32, u32)>,
    /// How many flows: 0 leaves ports as they are, else a power of two. The source port of flow
    /// `n` is 10000 + n % 16384, and n / 16384 is added to the destination port.
    pub flows: u64,
    /// Number of the first flow.
    pub first: u64,
    /// How often.
    pub repeat: u32,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Landing {
    /// What the last repetition answered: an [`action`], of `edge` an [`edge_action`].
    pub action: u32,
    /// The packet after it.
    pub packet: Vec<u8>,
    /// Mean time of a repetition, the way to the program included; whole nanoseconds.
    pub each: Duration,
}

/// `TC_ACT_*` as programs answer.
pub mod action {
    /// Go on, to the next program of the device, and at last the stack: `TCX_NEXT`.
    pub const NEXT: u32 = u32::MAX;
    /// Drop.
    pub const SHOT: u32 = 2;
    /// To another device or namespace.
    pub const REDIRECT: u32 = 7;
}

/// `XDP_*` as the program `edge` answers.
pub mod edge_action {
    /// The program failed.
    pub const ABORTED: u32 = 0;
    /// Drop.
    pub const DROP: u32 = 1;
    /// Go on.
    pub const PASS: u32 = 2;
    /// Back out of the device it came in by.
    pub const TX: u32 = 3;
    /// To another device.
    pub const REDIRECT: u32 = 4;
}

impl<'a> Trial<'a> {
    /// Bytes of a packet that are restored before each repetition.
    pub const HEADERS: usize = 80;

    pub(crate) fn new(programs: &'a mut Programs) -> Result<Trial<'a>, LoadError> {
        let ebpf = programs.object_mut();
        let template = taken(ebpf, TEMPLATE, Array::try_from)?;
        let measured = taken(ebpf, MEASURED, ProgramArray::try_from)?;
        let measured_edge = taken(ebpf, MEASURED_EDGE, ProgramArray::try_from)?;
        Ok(Trial { programs, template, measured, measured_edge })
    }

    /// Runs a program.
    pub fn run(&mut self, program: &str, shot: &Shot<'_>) -> Result<Landing, LoadError> {
        if shot.packet.len() < Self::HEADERS {
            return Err(LoadError::Object(format!(
                "a packet of {} bytes cannot be restored: {} are needed",
                shot.packet.len(),
                Self::HEADERS
            )));
        }
        let at_edge = matches!(program, edge::PROGRAM | FLOOR_EDGE);
        let (measured, map) =
            if at_edge { (&mut self.measured_edge, MEASURED_EDGE) } else { (&mut self.measured, MEASURED) };
        let target = self.programs.fd(program)?;
        measured.set(0, target, 0).map_err(|error| in_map(map, "update", error))?;
        self.template.set(0, template(shot, at_edge), 0).map_err(|error| in_map(TEMPLATE, "update", error))?;
        let mut out = vec![0; shot.packet.len() + 256];
        let (skb, frame) = (skb_context(shot.ifindex), frame_context(shot));
        let options = TestRunOptions {
            data_in: Some(shot.packet),
            data_out: Some(&mut out),
            ctx_in: Some(if at_edge { &frame } else { &skb }),
            repeat: shot.repeat,
            ..TestRunOptions::default()
        };
        let result = match at_edge {
            true => self.programs.xdp(WRAP_EDGE)?.test_run(options),
            false => self.programs.classifier(WRAP)?.test_run(options),
        };
        let result = result.map_err(failed(program))?;
        out.truncate(result.data_size_out as usize);
        Ok(Landing { action: result.return_value, packet: out, each: result.duration })
    }
}

/// Whether a program is for trials: no device ever has it, and the next start does not want it.
pub(crate) fn is_ours(name: &str) -> bool {
    matches!(name, WRAP | WRAP_EDGE | FLOOR | FLOOR_EDGE)
}

const WRAP: &str = "wrap";
const WRAP_EDGE: &str = "wrap_edge";
const FLOOR: &str = "floor";
const FLOOR_EDGE: &str = "floor_edge";
const TEMPLATE: &str = "TEMPLATE";
const MEASURED: &str = "MEASURED";
const MEASURED_EDGE: &str = "MEASURED_EDGE";

/// The words that `wrap` works from (`crates/bpf/src/wrap.rs`).
fn template(shot: &Shot<'_>, at_edge: bool) -> [u64; 16] {
    let mut words = [0; 16];
    for (word, bytes) in words.iter_mut().zip(shot.packet.as_chunks::<8>().0).take(Trial::HEADERS / 8) {
        *word = u64::from_ne_bytes(*bytes);
    }
    let v6 = shot.packet.get(12..14) == Some(&[0x86, 0xdd]);
    let (vni, remote) = shot.tunnel.unwrap_or_default();
    // A frame at the edge has no mark, and may be another size after a repetition.
    let mark = if at_edge { shot.packet.len() as u64 } else { shot.mark.into() };
    let settings = [shot.first, shot.flows.saturating_sub(1), v6.into(), mark, vni.into(), remote.into()];
    for (word, setting) in words.iter_mut().skip(Trial::HEADERS / 8).zip(settings) {
        *word = setting;
    }
    words
}

/// `struct __sk_buff` up to its `ifindex`; all else must be zero.
fn skb_context(ifindex: u32) -> [u8; 192] {
    const IFINDEX: usize = 40;
    let mut context = [0; 192];
    for (byte, value) in context.iter_mut().skip(IFINDEX).zip(ifindex.to_ne_bytes()) {
        *byte = value;
    }
    context
}

/// `struct xdp_md`: the frame from 0 to its length, the device it came in by, the first queue.
fn frame_context(shot: &Shot<'_>) -> [u8; 24] {
    let mut context = [0; 24];
    let words = [0, shot.packet.len() as u32, 0, shot.ifindex, 0, 0];
    for (bytes, word) in context.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *bytes = word.to_ne_bytes();
    }
    context
}

fn taken<T>(
    ebpf: &mut Ebpf,
    name: &'static str,
    typed: impl FnOnce(aya::maps::Map) -> Result<T, aya::maps::MapError>,
) -> Result<T, LoadError> {
    let map = ebpf.take_map(name).ok_or_else(|| LoadError::Object(format!("there is no map {name}")))?;
    typed(map).map_err(|error| in_map(name, "open", error))
}

fn in_map(map: &'static str, action: &'static str, error: aya::maps::MapError) -> LoadError {
    MapError::Kernel { map: map.into(), action, error: std::io::Error::other(error) }.into()
}

fn failed(program: &str) -> impl FnOnce(aya::programs::ProgramError) -> LoadError {
    let program = program.to_owned();
    move |error| LoadError::Program { program, error: Box::new(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_at_the_edge_tells_its_length_and_its_device() {
        let shot = Shot { packet: &[0; 90], ifindex: 3, mark: 0, tunnel: None, flows: 0, first: 0, repeat: 1 };
        let words: Vec<u32> =
            frame_context(&shot).as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word)).collect();
        assert_eq!(words, [0, 90, 0, 3, 0, 0]);
    }

    #[test]
    fn the_template_holds_the_headers_and_then_the_settings() {
        let mut packet = vec![7; 96];
        packet.splice(12..14, [0x86, 0xdd]);
        let shot =
            Shot { packet: &packet, ifindex: 3, mark: 5, tunnel: Some((258, 9)), flows: 1024, first: 11, repeat: 1 };
        let words = template(&shot, false);
        assert_eq!(words[0], 0x0707_0707_0707_0707);
        assert_eq!(words[9], 0x0707_0707_0707_0707);
        assert_eq!(words[10..], [11, 1023, 1, 5, 258, 9]);
        assert_eq!(template(&shot, true)[13], 96);
    }
}
