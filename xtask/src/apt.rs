//! Debian's packages: what is missing, and putting it there.

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

/// Does the package archive, as this machine last saw it, offer `package`?
pub fn offers(package: &str) -> bool {
    sh::capture(Command::new("apt-cache").args(["policy", package])).is_ok_and(|text| has_candidate(&text))
}

/// Installs packages without letting their services start. The archive's index is refreshed only
/// when it lacks a package or points at files that are gone.
pub fn install(packages: &[String]) -> Result<()> {
    let _quiet = NoServices::new()?;
    let mut fresh = false;
    if !packages.iter().all(|p| offers(p)) {
        refresh()?;
        fresh = true;
    }
    let mut result = sh::run(apt_get().arg("install").args(OPTIONS).args(packages));
    if result.is_err() && !fresh && !sh::interrupted() {
        refresh()?;
        result = sh::run(apt_get().arg("install").args(OPTIONS).args(packages));
    }
    result.with_context(|| format!("packages could not be installed. Once that is mended: {}", command_line(packages)))
}

const OPTIONS: [&str; 6] = ["-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"];

fn refresh() -> Result<()> {
    sh::step("apt-get update: the package index is missing or too old");
    // One broken third-party source makes the whole update fail; what matters is whether the
    // installation then finds its packages, and that says so itself.
    if !sh::status(apt_get().args(["update", "-q"]))?.success() {
        eprintln!("apt-get update had trouble; trying to install anyway");
    }
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").env("PATH", host::search_path()).stdin(Stdio::null());
    command.arg("-q");
    command
}

fn has_candidate(policy: &str) -> bool {
    policy.lines().filter_map(|l| l.trim().strip_prefix("Candidate:")).any(|c| c.trim() != "(none)")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_offered_when_it_has_a_candidate() {
        assert!(has_candidate("runc:\n  Installed: (none)\n  Candidate: 1.1.5+ds1-1\n"));
        assert!(!has_candidate("gone:\n  Installed: (none)\n  Candidate: (none)\n"));
        assert!(!has_candidate(""));
    }
}
