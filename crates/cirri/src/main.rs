//! `cirri`: identity-based networking, security and observability for Linux workloads.
#![forbid(unsafe_code)]

mod agent;
mod api;
mod cli;
mod client;
mod cmd;
mod cni;
mod config;
mod demo;
mod edge;
mod exit;
mod files;
mod lab;
mod listener;
mod output;
mod pinned;
mod settings;
mod span;
mod workload;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
