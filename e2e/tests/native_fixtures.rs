//! The packet fixtures on the native host.

use cirri_e2e::fixtures::{Devices, Native, all, run};
use cirri_e2e::say;

const DEVICES: Devices = Devices { a: 10, b: 11, eth: 2, overlay: 3 };

#[test]
fn every_fixture_holds_natively() {
    let fixtures = all(DEVICES);
    let (mut packets, mut failures) = (0, Vec::new());
    for fixture in &fixtures {
        match run(fixture, &mut Native::new(fixture.world.devices)) {
            Ok(ran) => {
                packets += ran.packets;
                assert_eq!(ran.skipped, 0, "{}", fixture.about);
            }
            Err(report) => failures.push(report),
        }
    }
    say(format_args!("{} fixtures with {packets} packets ran natively", fixtures.len()));
    assert!(failures.is_empty(), "{} of {} fail:\n\n{}", failures.len(), fixtures.len(), failures.join("\n\n"));
    assert!(fixtures.len() >= 60);
}
