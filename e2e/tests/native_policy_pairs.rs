//! Random policies and packets: the packet path decides as the reference evaluator does.

use cirri_e2e::fixtures::Devices;
use cirri_e2e::pairs::{Counts, compare};
use cirri_e2e::random::Scenario;
use cirri_e2e::say;

const DEVICES: Devices = Devices { a: 10, b: 11, eth: 2, overlay: 3 };
const WORKLOADS: [u32; 5] = [10, 11, 12, 13, 14];
const SCENARIOS: u64 = 1000;
const PACKETS: u16 = 60;

#[test]
fn the_packet_path_decides_as_the_reference_evaluator_does() {
    let mut counts = Counts::default();
    for seed in 0..SCENARIOS {
        let scenario = Scenario::generate(seed, PACKETS);
        counts += compare(&scenario, seed % 3 == 0, DEVICES, &WORKLOADS, None);
    }
    say(format_args!("{} pairs passed, {} were dropped", counts.passed, counts.dropped));
    assert_eq!(counts.passed + counts.dropped, SCENARIOS as usize * PACKETS as usize);
}
