//! The namespace test kit.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod cases;
pub mod cni;
pub mod edge;
pub mod fixtures;
pub mod kernel;
pub mod lab;
pub mod mutate;
pub mod pairs;
pub mod pinned;
pub mod random;
pub mod reference;
pub mod services;
pub mod wiring;

/// Says how much a test did, past the test harness, which keeps what passing tests print to itself:
/// what was left out must not look as if it had passed.
pub fn say(what: impl std::fmt::Display) {
    use std::io::Write;
    // Nobody to say it to is no failure of the test.
    let _ = writeln!(std::io::stderr(), "{what}");
}
