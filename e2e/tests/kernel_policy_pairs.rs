//! 10,000 random (policies, packet) pairs: reference evaluator, simulator and kernel say the same.
//! Needs root.

mod support;

use cirri_e2e::fixtures::Host;
use cirri_e2e::pairs::{Counts, compare};
use cirri_e2e::random::Scenario;
use cirri_e2e::say;

const SCENARIOS: u64 = 100;
const PACKETS: u16 = 100;

#[test]
fn reference_simulator_and_kernel_decide_alike() {
    support::on_kernel(|kernel| {
        let (devices, workloads) = (kernel.devices, kernel.workloads);
        let mut counts = Counts::default();
        for seed in 0..SCENARIOS {
            // Other seeds than the native test's.
            let scenario = Scenario::generate(seed + 1_000_000, PACKETS);
            kernel.reset();
            counts += compare(&scenario, seed % 3 == 0, devices, &workloads, Some(kernel as &mut dyn Host));
        }
        say(format_args!("{} pairs passed, {} were dropped", counts.passed, counts.dropped));
        assert_eq!(counts.passed + counts.dropped, SCENARIOS as usize * PACKETS as usize);
        assert_eq!(counts.skipped, 0, "every packet can be given to the kernel");
    });
}
