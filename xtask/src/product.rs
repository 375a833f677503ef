//! Commands that hand over to the product: they become it, so that it sees every signal itself.

use crate::build::{self, Profile};
use crate::setup::{self, Need};
use crate::{host, sh};
use anyhow::{Result, bail};
use std::path::Path;
use std::process::Command;

pub fn demo(arguments: &[String]) -> Result<()> {
    need_root("demo")?;
    build::expect(Profile::Debug);
    setup::ensure(&[Need::Build, Need::Lab])?;
    build::object()?;
    let binary = build::binary(Profile::Debug)?;
    sh::exec(command(&binary).arg("demo").args(arguments))
}

pub fn bench(arguments: &[String]) -> Result<()> {
    need_root("bench")?;
    build::expect(Profile::Release);
    setup::ensure(&[Need::Build, Need::Lab, Need::Bench])?;
    build::object()?;
    let binary = build::binary(Profile::Release)?;
    let mut bench = command(&binary);
    if arguments.is_empty() {
        bench.args(["bench", "all", "--out", "docs/bench"]);
    } else {
        bench.arg("bench").args(arguments);
    }
    sh::exec(&mut bench)
}

/// The product, run at the checkout's root with a PATH that has the lab's programs.
pub fn command(binary: &Path) -> Command {
    let mut command = Command::new(binary);
    command.current_dir(host::workspace()).env("PATH", host::search_path());
    command
}

/// Namespaces and BPF programs belong to root.
pub fn need_root(name: &str) -> Result<()> {
    if !host::is_root() {
        bail!(
            "`cargo xtask {name}` loads BPF programs and makes network namespaces: run it as root (sudo -E env \"PATH=$PATH\" cargo xtask {name})"
        );
    }
    Ok(())
}
