//! `doctor`: what is here, what is missing and how to get it, and what the kernel can do. Changes nothing.

use crate::{apt, bpf, host, setup, sh, table};
use anyhow::{Result, bail};
use std::fs;
use std::path::Path;
use std::process::Command;

pub fn command() -> Result<()> {
    let mut rows = vec![host_compiler()];
    rows.extend(setup::COMPONENTS.iter().map(|(command, name)| component(command, name)));
    rows.extend(bpf_tools());
    rows.extend(setup::PACKAGES.iter().map(|p| tool(p.proof, p.name, p.why)));
    print("Tools", &rows);
    let kernel = kernel();
    print("Kernel", &kernel);

    let missing = rows.iter().chain(&kernel).filter(|row| row.state == State::Missing).count();
    if missing > 0 {
        bail!("{missing} needed things are missing; `cargo xtask setup` gets what can be installed");
    }
    println!("Everything needed is here.");
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Here,
    /// Cirri does without, in a way that the row says.
    Lacking,
    Missing,
}

struct Row {
    what: String,
    state: State,
    /// The version or place when it is here; else what to do.
    detail: String,
}

impl Row {
    fn new(what: &str, state: State, detail: impl Into<String>) -> Self {
        Self { what: what.to_owned(), state, detail: detail.into() }
    }

    fn needed(what: &str, here: bool, detail: impl Into<String>, otherwise: impl Into<String>) -> Self {
        if here { Self::new(what, State::Here, detail) } else { Self::new(what, State::Missing, otherwise) }
    }
}

fn print(title: &str, rows: &[Row]) {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let mark = match row.state {
                State::Here => "ok",
                State::Lacking => "without",
                State::Missing => "MISSING",
            };
            vec![row.what.clone(), mark.to_owned(), row.detail.clone()]
        })
        .collect();
    println!("{}", sh::bold(title));
    println!("{}", table::render(&["what", "state", "version, or what to do"], &cells));
}

fn host_compiler() -> Row {
    let version = first_line(Command::new("rustc").arg("--version"));
    Row::needed("rustc (host)", version.is_some(), version.unwrap_or_default(), "https://rustup.rs, toolchain stable")
}

fn component(command: &str, component: &str) -> Row {
    let path = host::which(command);
    let here = path.is_some();
    let version = path.and_then(|p| first_line(Command::new(p).arg("--version")));
    Row::needed(component, here, version.unwrap_or_default(), format!("rustup component add {component}"))
}

fn bpf_tools() -> Vec<Row> {
    let toolchain = match bpf::Toolchain::choose() {
        Ok(Some(toolchain)) => toolchain,
        Ok(None) => return vec![Row::new("rustc (BPF)", State::Missing, one_line(bpf::TWO_WAYS))],
        Err(error) => return vec![Row::new("rustc (BPF)", State::Missing, format!("{error:#}"))],
    };
    let llvm = toolchain.version.llvm;
    let mut rows = vec![Row::new(
        "rustc (BPF)",
        State::Here,
        format!("{} of {}, LLVM {llvm}, {}", toolchain.version.release, toolchain.name, toolchain.rustc.display()),
    )];
    let linker = bpf::Linker::find();
    let fits = linker.as_ref().is_some_and(|linker| linker.fits(&toolchain));
    rows.push(Row::needed(
        "bpf-linker",
        fits,
        linker.map_or(String::new(), |l| {
            let llvm = l.llvm.map_or("LLVM linked in".to_owned(), |n| format!("LLVM {n}"));
            format!("{}, {llvm}, {}", l.version, l.path.display())
        }),
        bpf::linker_command_line(llvm),
    ));
    for (package, proof) in setup::llvm_packages(llvm) {
        let here = setup::is_there(&proof);
        // Only building the linker takes these.
        let otherwise = if fits { State::Lacking } else { State::Missing };
        let detail = if here { proof } else { format!("{}   (builds bpf-linker)", install(&package)) };
        rows.push(Row::new(&package, if here { State::Here } else { otherwise }, detail));
    }
    rows
}

fn tool(proof: &str, package: &str, why: &str) -> Row {
    let path = host::which(proof);
    let version = path.as_ref().and_then(|path| version_of(path, proof));
    let found = match (path, version) {
        (Some(path), Some(version)) => format!("{version}, {}", path.display()),
        (Some(path), None) => path.display().to_string(),
        (None, _) => String::new(),
    };
    Row::needed(proof, !found.is_empty(), found, format!("{}   ({why})", install(package)))
}

fn install(package: &str) -> String {
    apt::command_line(&[package.to_owned()])
}

/// The number in what a program says of its version. Programs ask for it in several ways, and some
/// answer on standard error.
fn version_of(path: &Path, name: &str) -> Option<String> {
    let flag = match name {
        "ip" | "ping" => "-V",
        "nginx" => "-v",
        "etcdctl" => "version",
        _ => "--version",
    };
    let output = Command::new(path).arg(flag).env("ETCDCTL_API", "3").output().ok()?;
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

fn kernel() -> Vec<Row> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let version = kernel_version(&release);
    let since = |major: u32, minor: u32| version.is_some_and(|v| v >= (major, minor));
    let capabilities = effective_capabilities();
    let lacking: Vec<&str> =
        CAPABILITIES.iter().filter(|(bit, _)| capabilities & (1 << bit) == 0).map(|(_, name)| *name).collect();

    let tcx = if since(6, 6) {
        Row::new("tcx", State::Here, "since Linux 6.6")
    } else {
        Row::new("tcx", State::Lacking, "needs Linux 6.6; programs are attached with clsact instead")
    };
    vec![
        Row::needed("Linux", since(6, 3), &release, format!("{release} is too old: 6.3 or newer")),
        Row::needed("processor", host::architecture().is_ok(), std::env::consts::ARCH, "x86_64 or aarch64"),
        Row::needed("root", host::is_root(), "yes", "privileged commands need it: run them with sudo"),
        Row::needed("capabilities", lacking.is_empty(), "all of them", format!("lacking {}", lacking.join(", "))),
        Row::needed(
            "BTF",
            Path::new("/sys/kernel/btf/vmlinux").exists(),
            "/sys/kernel/btf/vmlinux",
            "a kernel built with CONFIG_DEBUG_INFO_BTF=y",
        ),
        jit(),
        tcx,
        Row::needed("bpffs", host::has_bpffs(), host::BPFFS, format!("mount -t bpf bpf {}", host::BPFFS)),
        cgroup2(),
        vxlan(),
    ]
}

/// Bit and name of what the agent and the lab use.
const CAPABILITIES: [(u32, &str); 5] =
    [(12, "CAP_NET_ADMIN"), (13, "CAP_NET_RAW"), (21, "CAP_SYS_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];

fn jit() -> Row {
    let on = fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").is_ok_and(|v| v.trim() != "0");
    if on {
        Row::new("BPF JIT", State::Here, "on")
    } else {
        Row::new("BPF JIT", State::Lacking, "off or unreadable: packets are slow; sysctl -w net.core.bpf_jit_enable=1")
    }
}

fn cgroup2() -> Row {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    match mount_of(&mounts, "cgroup2") {
        Some(place) => Row::new("cgroup2", State::Here, place),
        None => Row::new("cgroup2", State::Lacking, "not mounted: mount -t cgroup2 none /sys/fs/cgroup"),
    }
}

/// Tries it, in a network namespace that is gone with the command.
fn vxlan() -> Row {
    const ADD: [&str; 9] = ["--net", "ip", "link", "add", "probe", "type", "vxlan", "external", "dstport"];
    if !host::is_root() {
        return Row::new("vxlan", State::Lacking, "not tried: that takes root");
    }
    let tried = sh::capture(Command::new("unshare").args(ADD).arg("8472").env("PATH", host::search_path()));
    match tried {
        Ok(_) => Row::new("vxlan", State::Here, "a device in external mode can be made"),
        Err(error) => Row::new("vxlan", State::Lacking, format!("routing.mode: direct works without; {error}")),
    }
}

fn effective_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let hex = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    hex.and_then(|h| u64::from_str_radix(h.trim(), 16).ok()).unwrap_or_default()
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn mount_of<'a>(mounts: &'a str, kind: &str) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let place = fields.next()?;
        (fields.next()? == kind).then_some(place)
    })
}

fn first_line(command: &mut Command) -> Option<String> {
    sh::capture(command).ok()?.lines().next().map(str::to_owned)
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        assert_eq!(number("etcd Version: 3.4.23\nGit SHA").as_deref(), Some("3.4.23"));
        assert_eq!(number("ip utility, iproute2-6.1.0, libbpf 1.1.2").as_deref(), Some("6.1.0"));
        assert_eq!(number("nginx version: nginx/1.22.1").as_deref(), Some("1.22.1"));
        assert_eq!(number("Redis server v=7.0.15 sha=00000000:0").as_deref(), Some("7.0.15"));
        assert_eq!(number("/usr/sbin/bpftool v7.1.0").as_deref(), Some("7.1.0"));
        assert_eq!(number("no number"), None);
    }

    #[test]
    fn kernel_releases_compare_as_numbers() {
        assert_eq!(kernel_version("6.18.44-fc-v595"), Some((6, 18)));
        assert!(kernel_version("6.10.1") > kernel_version("6.6.0"));
        assert_eq!(kernel_version("unknown"), None);
    }

    #[test]
    fn a_mount_is_found_by_its_kind() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_of(mounts, "cgroup2"), Some("/sys/fs/cgroup/unified"));
        assert_eq!(mount_of(mounts, "bpf"), None);
    }
}
