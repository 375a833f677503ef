//! One file per command.

pub mod agent;
pub mod bench;
pub mod config;
pub mod endpoint;
pub mod identity;
pub mod lb;
pub mod map;
pub mod monitor;
pub mod observe;
pub mod policy;
pub mod service;
pub mod status;
