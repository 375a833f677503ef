//! Flows: what the packet path reported, with names on it.
//!
//! An [`cirri_abi::FlowEvent`] holds numbers. [`Decoder`] turns it into a [`Flow`] with the help of
//! whoever knows the [`Names`]; a [`Ring`] keeps the newest of them and lets any number of readers
//! follow; a [`Filter`] picks; [`compact`] prints one line.
//!
//! What was lost on the way is a record of its own ([`Lost`]), so that a reader never takes a gap
//! for silence.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod decode;
mod filter;
mod print;
mod record;
mod ring;

pub use decode::{Decoder, Names, Place, RuleText, Served, rfc3339};
pub use filter::{Filter, FilterError};
pub use print::{compact, compact_with};
pub use record::{Backend, Drop, Flow, Icmp, Kind, Lost, Party, Record, Rule, RuleKind, ServicePort, Verdict};
pub use ring::{Batch, Ring};
