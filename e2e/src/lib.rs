//! The namespace test kit.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod cases;
pub mod fixtures;
pub mod kernel;
pub mod lab;
pub mod mutate;
pub mod pairs;
pub mod random;
pub mod reference;
pub mod wiring;
