//! The packet path over ordinary collections and a virtual clock.
//!
//! [`Node`] holds what the kernel's maps hold; [`Node::run`] sends a [`Frame`] through the very
//! source that runs in the kernel. Tests, fuzz targets and `cirri policy simulate` stand on it.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod frame;
mod node;
mod prefix;
mod services;

pub use frame::{Build, Frame, Icmp, RawFrame, TcpFlags, build, checksum_errors};
pub use node::{Node, Ran, Ruleset};
pub use services::SimSocket;
