//! 100,000 malformed packets through the programs: the kernel says the same as the simulator to each.
//! Needs root.

mod support;

use std::time::{Duration, Instant};

use cirri_abi::{FlowEvent, Hook, Tick};
use cirri_datapath::Verdict;
use cirri_e2e::fixtures::{Answer, Host, NODE_MAC, Native};
use cirri_e2e::mutate::{Mutator, tables};
use cirri_e2e::pairs::agrees;
use cirri_e2e::say;
use cirri_sim::Frame;

const PACKETS: usize = 100_000;
/// After as many the tables begin empty again, long before the kernel's are full.
const ROUND: usize = 5000;
/// After that long, too: the simulator's clock stands still and the kernel's does not. What was silent for two ticks
/// loses its port to others, for one.
const TICK: Duration = Duration::from_nanos(1 << Tick::SHIFT);

#[test]
fn the_kernel_and_the_simulator_say_the_same_to_malformed_packets() {
    support::on_kernel(|kernel| {
        let mut mutator = Mutator::new(2, kernel.devices);
        let (mut run, mut passed, mut skipped, mut node) = (0, 0, 0, Native::new(kernel.devices));
        let (mut left, mut begun) = (0, Instant::now());
        while run < PACKETS {
            if left == 0 || begun.elapsed() >= TICK {
                kernel.reset();
                node = Native::new(kernel.devices);
                for change in tables(kernel.devices, 1) {
                    node.change(&change);
                    kernel.change(&change);
                }
                (left, begun) = (ROUND, Instant::now());
            }
            let (hook, mut frame) = mutator.packet();
            // A test run has no tunnel key, and the overlay device has a mind of its own about what
            // is malformed. So nobody sends these; all but the sender's check sees them.
            frame.tunnel = None;
            // The kernel says so by itself.
            frame.of_others = frame.bytes.get(..6) != Some(&NODE_MAC);
            let Some(theirs) = kernel.packet(hook, &frame) else {
                skipped += 1;
                continue;
            };
            let their_events = timeless(kernel.events());
            if begun.elapsed() >= TICK {
                continue;
            }
            (run, left) = (run + 1, left - 1);
            let ours = node.packet(hook, &frame).expect("the native host takes everything");
            let events = (timeless(node.events()), their_events);
            let Answer::Verdict(verdict) = ours.answer else { panic!("the native host answers everything") };
            let place = || format!("packet {run} at {}\n{frame:?}\n{events:?}", Hook::name(hook));
            assert!(agrees(verdict, theirs.answer), "native {verdict:?}, kernel {:?}: {}", theirs.answer, place());
            assert_eq!(events.0, events.1, "{}", place());
            if !matches!(verdict, Verdict::Drop(_)) {
                passed += 1;
                let bytes = |frame: Option<Frame>| frame.map(|frame| frame.bytes);
                assert_eq!(bytes(ours.frame), bytes(theirs.frame), "{}", place());
            }
        }
        say(format_args!("{run} malformed packets, {passed} passed; the kernel makes no packets of {skipped} more"));
        assert!(passed * 20 > PACKETS, "only {passed} of {PACKETS} passed: the mutations miss the mark");
    });
}

fn timeless(events: Vec<FlowEvent>) -> Vec<FlowEvent> {
    events.into_iter().map(|event| FlowEvent { time_ns: 0, generation: 0, ..event }).collect()
}
