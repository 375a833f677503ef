//! `build`: the BPF object, and the one binary with the object in it.

use crate::{bpf, host, setup, sh};
use anyhow::Result;
use std::path::PathBuf;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    Debug,
    Release,
}

pub fn command(release: bool) -> Result<()> {
    let object = object()?;
    let binary = binary(if release { Profile::Release } else { Profile::Debug })?;
    println!("object  {} ({} bytes)", object.display(), object.metadata()?.len());
    println!("binary  {} ({} bytes)", binary.display(), binary.metadata()?.len());
    Ok(())
}

/// Builds the BPF object and answers where it is.
pub fn object() -> Result<PathBuf> {
    let tools = setup::tools()?;
    bpf::build_object(&tools.toolchain, &tools.linker)
}

/// Builds the product with the BPF object that [`object`] left, and answers where it is.
pub fn binary(profile: Profile) -> Result<PathBuf> {
    let mut cargo = host::cargo();
    cargo.args(["build", "-p", "cirri"]);
    let directory = match profile {
        Profile::Debug => "debug",
        Profile::Release => {
            cargo.arg("--release");
            "release"
        }
    };
    sh::step(&format!("cirri ({directory})"));
    sh::run(&mut cargo)?;
    Ok(host::target().join(directory).join("cirri"))
}
