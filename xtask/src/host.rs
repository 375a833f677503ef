//! Facts about this machine and this checkout.

use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The root of the checkout. Taken from `cargo run` when it is there, so that a moved checkout is
/// found without compiling again.
pub fn workspace() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    here.parent().map_or(here.clone(), Path::to_path_buf)
}

/// Where cargo puts what it builds for the host.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// The cargo that runs this, without what it told this process about the xtask package: a build
/// script that watches such a variable would otherwise run again each time.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command.current_dir(workspace());
    command
}

/// Where `name` would be started from. The administrator's directories count: many a user's PATH
/// lacks them, and Debian keeps `nginx` and `bpftool` there.
pub fn which(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&search_path()).map(|dir| dir.join(name)).find(|path| is_executable(path))
}

/// PATH with cargo's and the administrator's directories at its end.
pub fn search_path() -> std::ffi::OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut all: Vec<PathBuf> = std::env::split_paths(&path).collect();
    for extra in [cargo_home().join("bin"), "/usr/sbin".into(), "/sbin".into(), "/usr/local/sbin".into()] {
        if !all.contains(&extra) {
            all.push(extra);
        }
    }
    std::env::join_paths(all).unwrap_or(path)
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The processor in the words both cargo and the BPF headers use.
pub fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        known @ ("x86_64" | "aarch64") => Ok(known),
        other => bail!("Cirri is built and tested on x86_64 and aarch64; this machine is {other}"),
    }
}

pub fn cargo_home() -> PathBuf {
    std::env::var_os("CARGO_HOME").map_or_else(|| home().join(".cargo"), PathBuf::from)
}

pub fn rustup_home() -> PathBuf {
    std::env::var_os("RUSTUP_HOME").map_or_else(|| home().join(".rustup"), PathBuf::from)
}

pub const BPFFS: &str = "/sys/fs/bpf";

/// Is a BPF file system mounted where pins go?
pub fn has_bpffs() -> bool {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    rustix::fs::statfs(BPFFS).is_ok_and(|fs| fs.f_type == BPF_FS_MAGIC)
}

fn home() -> PathBuf {
    std::env::home_dir().unwrap_or_else(|| "/root".into())
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_the_one_with_this_package() {
        assert!(workspace().join("xtask/Cargo.toml").is_file());
    }

    #[test]
    fn a_command_is_found_only_when_it_can_be_started() {
        assert!(which("sh").is_some());
        assert!(which("no-such-command-here").is_none());
        assert!(!is_executable(Path::new("/etc/passwd")));
    }
}
