//! The packet fixtures in the kernel: equality with the native run is the proof that both are one
//! packet path. Needs root.

mod support;

use cirri_e2e::fixtures::{all, run};
use cirri_e2e::say;

#[test]
fn every_fixture_holds_in_the_kernel() {
    support::on_kernel(|kernel| {
        let fixtures = all(kernel.devices);
        let (mut packets, mut skipped, mut failures) = (0, 0, Vec::new());
        for fixture in &fixtures {
            kernel.reset();
            match run(fixture, kernel) {
                Ok(ran) => {
                    packets += ran.packets;
                    skipped += ran.skipped;
                }
                Err(report) => failures.push(report),
            }
        }
        say(format_args!(
            "{} fixtures with {packets} packets ran in the kernel; {skipped} packets it cannot be given",
            fixtures.len()
        ));
        assert!(failures.is_empty(), "{} of {} fail:\n\n{}", failures.len(), fixtures.len(), failures.join("\n\n"));
        assert!(skipped * 20 < packets, "{skipped} of {packets} packets were not run");
    });
}
