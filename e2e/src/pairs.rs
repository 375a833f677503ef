//! Random (policies, packet) pairs: the reference evaluator against hosts of the packet path.

use cirri_abi::{DropReason, FlowEvent};
use cirri_datapath::Verdict;
use cirri_loader::trial::action;

use crate::fixtures::{Answer, Devices, Host, Native};
use crate::random::Scenario;
use crate::wiring::Wiring;

/// Runs a scenario's packets natively and compares each verdict with the reference evaluator's, and
/// everything with the other host's if there is one. Answers how many packets passed, how many were
/// dropped, and how many the other host could not be given.
///
/// # Panics
/// On the first difference, with seed, packet and manifests.
pub fn compare(
    scenario: &Scenario,
    direct: bool,
    devices: Devices,
    workloads: &[u32],
    mut other: Option<&mut dyn Host>,
) -> Counts {
    let wiring = Wiring::new(scenario, direct, devices, workloads);
    let mut native = Native::new(devices);
    for change in &wiring.tables {
        native.change(change);
        if let Some(other) = other.as_deref_mut() {
            other.change(change);
        }
    }
    let mut counts = Counts::default();
    for packet in &scenario.packets {
        let (hook, frame) = wiring.frame(packet);
        let describe = || format!("direct routing: {direct}\n{}", scenario.describe(packet));
        let Some(Answer::Verdict(verdict)) = native.packet(hook, &frame).map(|output| output.answer) else {
            panic!("the native host answers everything");
        };
        let events = native.events();
        match verdict {
            Verdict::Drop(DropReason::POLICY_DENIED) => counts.dropped += 1,
            Verdict::Drop(reason) => {
                panic!("native: dropped, but not by policy: {reason} ({})\n{}", reason.code, describe())
            }
            _ => counts.passed += 1,
        }
        let passes = !matches!(verdict, Verdict::Drop(_));
        assert_eq!(passes, scenario.expected(packet), "native: {verdict:?}, {events:?}\n{}", describe());
        let Some(other) = other.as_deref_mut() else { continue };
        let Some(output) = other.packet(hook, &frame) else {
            counts.skipped += 1;
            continue;
        };
        assert!(agrees(verdict, output.answer), "native {verdict:?}, {} {output:?}\n{}", other.name(), describe());
        let (ours, theirs) = (timeless(events), timeless(other.events()));
        assert_eq!(ours, theirs, "events, native and {}\n{}", other.name(), describe());
    }
    counts
}

/// What became of packets.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    /// Passed, as the reference evaluator says.
    pub passed: usize,
    /// Dropped by policy, as the reference evaluator says.
    pub dropped: usize,
    /// Not run on the other host.
    pub skipped: usize,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.passed += other.passed;
        self.dropped += other.dropped;
        self.skipped += other.skipped;
    }
}

/// Whether another host's answer is the same verdict, as far as it shows.
pub fn agrees(native: Verdict, other: Answer) -> bool {
    match other {
        Answer::Verdict(verdict) => verdict == native,
        Answer::Code(code) => {
            code == match native {
                Verdict::Continue => action::NEXT,
                Verdict::Drop(_) => 2,
                Verdict::Local { .. } | Verdict::Device { .. } | Verdict::Neighbour { .. } | Verdict::Up { .. } => 7,
            }
        }
        Answer::Edge(action) => {
            action
                == match native {
                    Verdict::Continue => 2,
                    Verdict::Drop(_) => 1,
                    Verdict::Device { .. } => 3,
                    Verdict::Local { .. } | Verdict::Neighbour { .. } | Verdict::Up { .. } => return false,
                }
        }
        Answer::Delivered(workloads) => workloads.iter().all(|(device, packets)| {
            let here = matches!(native, Verdict::Local { ifindex } if ifindex == *device);
            *packets == u64::from(here)
        }),
    }
}

/// Events without what differs from host to host: clocks, and how often tables were changed.
fn timeless(events: Vec<FlowEvent>) -> Vec<FlowEvent> {
    events.into_iter().map(|event| FlowEvent { time_ns: 0, generation: 0, ..event }).collect()
}
