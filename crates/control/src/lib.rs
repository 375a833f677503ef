//! What the tables should hold.
//!
//! Resources come in as text, desired rows go out; in between everything is a pure function: no
//! I/O, no clock, no async. Whoever calls carries things in and out.
//!
//! The way through: [`resource::parse_documents`] reads manifests; [`labels::IdentityLabels`] says
//! who a pod is; [`identity::Identities`] gives that a number; [`policy::Cluster`] holds policies and identities
//! and compiles the rule set of each; [`ipam`] hands out addresses; [`service::Services`] makes service ports of
//! resources, and [`service::table`] the rows of each.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod cut;
pub mod identity;
pub mod ipam;
pub mod labels;
pub mod policy;
pub mod resource;
pub mod service;

mod hash;
mod work;
