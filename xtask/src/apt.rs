//! Debian's package manager: what it offers, and putting that there.

use crate::archive::{self, Offers};
use crate::{host, sh};
use anyhow::{Context, Result, bail};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Can this machine install packages at all? `Err` says why not.
pub fn available() -> Result<(), &'static str> {
    if host::which("apt-get").is_none() {
        Err("this machine has no apt-get")
    } else if !host::is_root() {
        Err("you are not root")
    } else {
        Ok(())
    }
}

/// The command a person types to get `packages`.
pub fn command_line(packages: &[String]) -> String {
    let sudo = if host::is_root() { "" } else { "sudo " };
    format!("{sudo}apt-get update && {sudo}apt-get install -y --no-install-recommends {}", packages.join(" "))
}

/// What the archive, as this machine last saw it, has of these packages.
pub fn offers(packages: &[&str]) -> Offers {
    let text = sh::capture(Command::new("apt-cache").arg("policy").args(packages).env("LC_ALL", "C"));
    archive::read(&text.unwrap_or_default())
}

/// Does the archive, as this machine last saw it, offer `package`?
pub fn offers_any(package: &str) -> bool {
    offers(&[package]).get(package).is_some_and(|offer| offer.candidate.is_some())
}

/// The LLVM that a package depends on.
pub fn llvm_of(package: &str) -> Option<u32> {
    let text = sh::capture(Command::new("apt-cache").args(["show", "--no-all-versions", package])).ok()?;
    archive::llvm_in(&text)
}

/// Asks the archive what it has by now; whether that went wholly well. A source that does not answer is no error
/// here: what matters is whether what is needed can be had, and that is looked at next.
pub fn refresh() -> Result<bool> {
    let fresh = sh::status(apt_get().args(["update", "-q", "-o", "APT::Update::Error-Mode=any"]))?.success();
    if !fresh {
        eprintln!("The package index could not be refreshed wholly; going on with what there is of it.");
    }
    Ok(fresh)
}

/// Installs these packages (or `NAME=VERSION`), newer ones over older ones, without letting their services start.
pub fn install(packages: &[String]) -> Result<()> {
    let _quiet = NoServices::new()?;
    let mut command = apt_get();
    command.arg("install").args(OPTIONS);
    if packages.iter().any(|package| package.contains('=')) {
        command.arg("--allow-downgrades"); // A version was chosen because no other will do.
    }
    sh::run(command.args(packages))
        .with_context(|| format!("packages could not be installed. Once that is mended: {}", command_line(packages)))
}

const OPTIONS: [&str; 8] = [
    "-y",
    "--no-install-recommends",
    "-o",
    "DPkg::Lock::Timeout=300",
    "-o",
    "Dpkg::Use-Pty=0",
    "-o",
    "Acquire::Retries=3",
];

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").env("PATH", host::search_path()).stdin(Stdio::null());
    command.arg("-q");
    command
}

/// While it lives, installing a package does not start its service. A policy that is already there
/// is somebody's decision: it stays.
struct NoServices {
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn new() -> Result<Self> {
        if Path::new(POLICY).exists() {
            return Ok(Self { ours: false });
        }
        let mut file = match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(POLICY) {
            Ok(file) => file,
            Err(error) => bail!("cannot write {POLICY}, which keeps services from starting: {error}"),
        };
        let guard = Self { ours: true };
        std::io::Write::write_all(&mut file, b"#!/bin/sh\nexit 101\n")?;
        Ok(guard)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = std::fs::remove_file(POLICY)
        {
            eprintln!("cannot remove {POLICY} ({error}): remove it, or no package will start its service");
        }
    }
}
