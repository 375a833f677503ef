//! The only user-space room that touches the kernel: it loads the packet programs, attaches and
//! upgrades them, reads and writes their tables, reads their events, collects ended flows, and sets
//! up devices, routes and namespaces.
//!
//! Begin at [`Datapath`] for the programs and their [`Tables`], at [`net::Net`] for the network.
//! Nothing here decides anything: what the tables should hold is `cirri-control`'s business.
//!
//! `unsafe` is permitted here and in `bpf` alone. It stands in `plain` (values as bytes), `sys`
//! (the bpf system call) and one line of `events`, and nowhere else.

#![deny(missing_docs)]

mod attach;
mod audit;
mod bill;
mod chain;
mod clsact;
mod datapath;
mod edge;
mod error;
mod ethernet;
mod events;
mod features;
pub mod gc;
mod lease;
pub mod net;
mod pins;
mod plain;
mod programs;
mod records;
mod rulesets;
mod sizes;
mod socket_hooks;
mod sys;
mod table;
mod tables;
pub mod trial;
mod warnings;

pub use attach::Attachment;
pub use audit::{Audit, Found, Misplaced, Place};
pub use bill::Bill;
pub use chain::Before;
pub use datapath::{Datapath, LoadOptions, ProgramStatus, Retired, Use};
pub use edge::{EdgeMode, EdgeStatus, EdgeWanted};
pub use error::{LoadError, MapError, VerifierLog};
pub use events::{Batch, Events};
pub use features::{Hooking, OLDEST_KERNEL};
pub use lease::is_being_written;
pub use records::Records;
pub use socket_hooks::cgroup_root;
pub use table::{Chunk, Cursor, Table};
pub use tables::{MapStatus, RawEntry, Tables};
pub use trial::Trial;
