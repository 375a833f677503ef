//! `doctor`: what is here, what is missing and how to get it, and what the kernel can do. Changes nothing.

use crate::{apt, bpf, host, kernels, setup, sh, table, version};
use anyhow::{Result, bail};
use std::fs;
use std::process::Command;

pub fn command() -> Result<()> {
    let mut rows = vec![host_compiler()?];
    rows.extend(setup::COMPONENTS.into_iter().map(component));
    rows.extend(bpf_tools());
    rows.extend(setup::PACKAGES.iter().map(tool));
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

fn host_compiler() -> Result<Row> {
    let least = host::rust_version()?;
    let version = first_line(Command::new("rustc").arg("--version"));
    let fits =
        version.as_ref().is_some_and(|said| version::at_least(said.split(' ').nth(1).unwrap_or_default(), &least));
    let found = version.clone().map_or(String::new(), |said| format!("{said} is older than {least}: "));
    Ok(Row::needed(
        "rustc (host)",
        fits,
        version.unwrap_or_default(),
        format!("{found}`rustup update stable`; https://rustup.rs has rustup"),
    ))
}

fn component(component: &str) -> Row {
    let version = setup::component(component);
    let here = version.is_some();
    Row::needed(component, here, version.unwrap_or_default(), format!("rustup component add {component}"))
}

fn bpf_tools() -> Vec<Row> {
    let toolchain = match bpf::Toolchain::choose() {
        Ok(bpf::Found::Fits(toolchain)) => toolchain,
        Ok(bpf::Found::Unfit(found)) => {
            let found = if found.is_empty() { String::new() } else { format!("{}; ", found.join("; ")) };
            let way = format!("{found}`cargo xtask setup` gets Debian's, or: {}", bpf::BY_RUSTUP);
            return vec![Row::new("rustc (BPF)", State::Missing, way)];
        }
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

fn tool(package: &setup::Package) -> Row {
    let (here, found) = match package.look() {
        setup::Look::Fits { path, version: Some(version) } => (true, format!("{version}, {}", path.display())),
        setup::Look::Fits { path, version: None } => (true, path.display().to_string()),
        setup::Look::TooOld { path, version, least } => {
            (false, format!("{version}, {} is older than {least}: ", path.display()))
        }
        setup::Look::Missing => (false, String::new()),
    };
    let otherwise = format!("{found}{}   ({})", install(package.name), package.why);
    Row::needed(package.proof, here, found, otherwise)
}

fn install(package: &str) -> String {
    apt::command_line(&[package.to_owned()])
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
        Row::needed(
            "Linux",
            version >= kernel_version(kernels::SERIES[0]),
            &release,
            format!("{release} is too old: {} or newer", kernels::SERIES[0]),
        ),
        Row::needed("processor", host::architecture().is_ok(), std::env::consts::ARCH, "x86_64 or aarch64"),
        Row::needed("root", host::is_root(), "yes", "privileged commands need it: run them with sudo"),
        Row::needed("capabilities", lacking.is_empty(), "all of them", format!("lacking {}", lacking.join(", "))),
        Row::needed("BTF", host::has_btf(), host::BTF, "a kernel built with CONFIG_DEBUG_INFO_BTF=y"),
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
    match host::cgroup2() {
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

fn first_line(command: &mut Command) -> Option<String> {
    sh::capture(command).ok()?.lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_compare_as_numbers() {
        assert_eq!(kernel_version("6.18.44-fc-v595"), Some((6, 18)));
        assert!(kernel_version("6.10.1") > kernel_version("6.6.0"));
        assert_eq!(kernel_version("unknown"), None);
    }
}
