//! Facts about this machine and this checkout.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
/// lacks them, and Debian keeps `nginx` and `bpftool` there. A path is looked at where it says.
pub fn which(name: &str) -> Option<PathBuf> {
    if name.starts_with('/') {
        return Some(PathBuf::from(name)).filter(|path| path.exists());
    }
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

/// The oldest Rust that the workspace's crates are compiled with, as Cargo.toml has it.
pub fn rust_version() -> Result<String> {
    let file = workspace().join("Cargo.toml");
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let version = text.lines().find_map(|line| line.strip_prefix("rust-version")?.split('"').nth(1));
    version.map(str::to_owned).with_context(|| format!("{} names no rust-version", file.display()))
}

/// The number in what a program says of its version. Programs ask for it in several ways, and some answer on standard
/// error.
pub fn version_of(path: &Path) -> Option<String> {
    let flag = match path.file_name()?.to_str()? {
        "ip" | "ping" => "-V",
        "nginx" => "-v",
        "etcdctl" => "version",
        _ => "--version",
    };
    let output = Command::new(path).arg(flag).env("ETCDCTL_API", "3").stdin(Stdio::null()).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    number(&String::from_utf8_lossy(&text))
}

/// The first word that looks like a version.
fn number(text: &str) -> Option<String> {
    let words = text.split(|c: char| c.is_whitespace() || matches!(c, ',' | '=' | '/' | '(' | ')'));
    words
        .map(|word| word.trim_start_matches('v').trim_start_matches("iproute2-"))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))
        .map(str::to_owned)
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

/// The kernel's types, which maps and programs are loaded by.
pub const BTF: &str = "/sys/kernel/btf/vmlinux";

pub fn has_btf() -> bool {
    Path::new(BTF).exists()
}

/// Is a BPF file system mounted where pins go?
pub fn has_bpffs() -> bool {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    rustix::fs::statfs(BPFFS).is_ok_and(|fs| fs.f_type == BPF_FS_MAGIC)
}

/// Where control groups of version 2 are mounted.
pub fn cgroup2() -> Option<String> {
    mount_of(&std::fs::read_to_string("/proc/mounts").unwrap_or_default(), "cgroup2").map(str::to_owned)
}

fn mount_of<'a>(mounts: &'a str, kind: &str) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let place = fields.next()?;
        (fields.next()? == kind).then_some(place)
    })
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
    fn the_workspace_names_the_rust_it_needs() {
        assert!(crate::version::at_least(&rust_version().unwrap(), "1.85"), "the edition alone needs that");
    }

    #[test]
    fn versions_are_found_in_what_programs_say() {
        assert_eq!(number("etcd Version: 3.4.23\nGit SHA").as_deref(), Some("3.4.23"));
        assert_eq!(number("ip utility, iproute2-6.1.0, libbpf 1.1.2").as_deref(), Some("6.1.0"));
        assert_eq!(number("nginx version: nginx/1.22.1").as_deref(), Some("1.22.1"));
        assert_eq!(number("Redis server v=7.0.15 sha=00000000:0").as_deref(), Some("7.0.15"));
        assert_eq!(number("/usr/sbin/bpftool v7.1.0").as_deref(), Some("7.1.0"));
        assert_eq!(number("g++ (Debian 12.2.0-14+deb12u1) 12.2.0").as_deref(), Some("12.2.0-14+deb12u1"));
        assert_eq!(number("no number"), None);
    }

    #[test]
    fn a_command_is_found_only_when_it_can_be_started() {
        assert!(which("sh").is_some());
        assert!(which("no-such-command-here").is_none());
        assert!(!is_executable(Path::new("/etc/passwd")));
    }

    #[test]
    fn a_mount_is_found_by_its_kind() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_of(mounts, "cgroup2"), Some("/sys/fs/cgroup/unified"));
        assert_eq!(mount_of(mounts, "bpf"), None);
    }
}
