//! `build`: the BPF object, and the one binary with the object in it.

use crate::{bpf, host, setup, sh};
use anyhow::Result;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Mutex;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    Debug,
    Release,
}

impl Profile {
    fn flag(self) -> Option<&'static str> {
        (self == Profile::Release).then_some("--release")
    }
}

/// The build that goes on while set-up is at work.
static AHEAD: Mutex<Option<Child>> = Mutex::new(None);

pub fn command(release: bool) -> Result<()> {
    let profile = if release { Profile::Release } else { Profile::Debug };
    expect(profile);
    let object = object()?;
    let binary = binary(profile)?;
    println!("object  {} ({} bytes)", object.display(), object.metadata()?.len());
    println!("binary  {} ({} bytes)", binary.display(), binary.metadata()?.len());
    Ok(())
}

/// Announces the builds of a command, before [`setup::ensure`]. On a checkout where nothing is built yet the crates
/// that do not need the BPF object are built meanwhile: set-up waits for the network and the disk for much of its time.
pub fn expect(profile: Profile) {
    sh::expect(2);
    if bpf::object_path().exists() {
        return;
    }
    setup::announce();
    // What embeds the object fails and is built later; --keep-going builds the rest, with the features it will have.
    let mut cargo = host::cargo();
    cargo.args(["build", "-p", "cirri", "--keep-going", "--quiet"]).args(profile.flag());
    let child = cargo.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    *AHEAD.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = child.ok();
}

/// Ends the build that goes on in the background, if one does: for the way out after an error.
pub fn abandon() {
    if let Some(mut child) = AHEAD.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
        // An error means that it has ended already.
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Builds the BPF object and answers where it is.
pub fn object() -> Result<PathBuf> {
    let tools = setup::tools()?;
    bpf::build_object(&tools.toolchain, &tools.linker)
}

/// Builds the product with the BPF object that [`object`] left, and answers where it is.
pub fn binary(profile: Profile) -> Result<PathBuf> {
    let directory = match profile {
        Profile::Debug => "debug",
        Profile::Release => "release",
    };
    sh::step(&format!("cirri ({directory})"));
    if let Some(mut child) = AHEAD.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
        // How it ended does not matter: what it left undone is done now, and what is wrong is said now.
        let _ = child.wait();
    }
    let mut cargo = host::cargo();
    cargo.args(["build", "-p", "cirri"]).args(profile.flag());
    sh::run(&mut cargo)?;
    Ok(host::target().join(directory).join("cirri"))
}
