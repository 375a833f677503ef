//! The packet fixtures on the native host.

use cirri_e2e::fixtures::{Devices, Native, all, run};

const DEVICES: Devices = Devices { a: 10, b: 11, eth: 2, overlay: 3 };

#[test]
fn every_fixture_holds_natively() {
    let fixtures = all(DEVICES);
    let failures: Vec<String> =
        fixtures.iter().filter_map(|fixture| run(fixture, &mut Native::new(fixture.world.devices)).err()).collect();
    println!("{} fixtures ran natively", fixtures.len());
    assert!(failures.is_empty(), "{} of {} fail:\n\n{}", failures.len(), fixtures.len(), failures.join("\n\n"));
    assert!(fixtures.len() >= 60);
}
