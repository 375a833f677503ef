//! What each command needs, what proves that it is there, and getting it.

use crate::{apt, bpf, host, sh};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;

/// What a command is about to do, and so which things must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Compile the BPF object and the host crates.
    Build,
    /// Run agents and pods in network namespaces.
    Lab,
    /// Run the privileged tests.
    Test,
    /// Measure.
    Bench,
}

impl Need {
    pub const ALL: &[Need] = &[Need::Build, Need::Lab, Need::Test, Need::Bench];
}

/// Something from Debian's archive.
pub struct Package {
    pub name: &'static str,
    /// A command, or the path of a file, that is there when the package is. Somebody who has it
    /// from elsewhere needs no package.
    pub proof: &'static str,
    pub need: Need,
    pub why: &'static str,
}

/// Everything but the BPF compiler and its LLVM, whose names depend on each other.
pub const PACKAGES: &[Package] = &[
    Package { name: "gcc", proof: "cc", need: Need::Build, why: "links the host's programs" },
    Package { name: "g++", proof: "c++", need: Need::Build, why: "builds bpf-linker's bridge to LLVM" },
    Package { name: "iproute2", proof: "ip", need: Need::Lab, why: "looks into a lab's namespaces" },
    Package { name: "etcd-server", proof: "etcd", need: Need::Lab, why: "the cluster's state with more than one node" },
    Package { name: "etcd-client", proof: "etcdctl", need: Need::Lab, why: "looks at that state" },
    Package { name: "redis-server", proof: "redis-server", need: Need::Lab, why: "a database among the demo's pods" },
    Package { name: "nginx-light", proof: "nginx", need: Need::Lab, why: "a web server among the demo's pods" },
    Package { name: "curl", proof: "curl", need: Need::Lab, why: "a client among the demo's pods" },
    Package { name: "ethtool", proof: "ethtool", need: Need::Lab, why: "completes checksums for XDP in a lab" },
    Package { name: "iputils-ping", proof: "ping", need: Need::Lab, why: "ICMP from a pod" },
    Package { name: "bpftool", proof: "bpftool", need: Need::Test, why: "shows programs and maps by name" },
    Package { name: "bind9-dnsutils", proof: "dig", need: Need::Test, why: "a DNS client of a service" },
    Package { name: "dnsmasq-base", proof: "dnsmasq", need: Need::Test, why: "a DNS server behind a service" },
    Package {
        name: "containerd",
        proof: "containerd",
        need: Need::Test,
        why: "a real runtime that calls the CNI plugin",
    },
    Package { name: "runc", proof: "runc", need: Need::Test, why: "starts containerd's containers" },
    Package { name: "bird2", proof: "bird", need: Need::Test, why: "announces a load balancer's addresses by BGP" },
    Package { name: "iptables", proof: "iptables-legacy", need: Need::Bench, why: "services as kube-proxy makes them" },
    Package {
        name: "nftables",
        proof: "nft",
        need: Need::Test,
        why: "packets that get lost on purpose; services by another filter",
    },
    Package { name: "iperf3", proof: "iperf3", need: Need::Bench, why: "throughput and its kernel baseline" },
];

/// Parts of the host's toolchain: command and rustup's name.
pub const COMPONENTS: [(&str, &str); 2] = [("cargo-fmt", "rustfmt"), ("cargo-clippy", "clippy")];

/// The packages with Debian's compiler that has its library's source.
pub const COMPILER: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// What builds the BPF object.
pub struct Tools {
    pub toolchain: bpf::Toolchain,
    pub linker: bpf::Linker,
}

/// Makes sure that everything `needs` asks for is there. Cheap when it is. Says what it installs
/// before it does, and where it cannot, exactly what to type.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let building = needs.contains(&Need::Build);
    let mut packages: Vec<String> = missing(needs).map(|p| p.name.to_owned()).collect();
    let mut toolchain = if building { bpf::Toolchain::choose()? } else { None };
    if building && toolchain.is_none() {
        packages.extend(COMPILER.map(str::to_owned));
    }
    packages.extend(toolchain.iter().flat_map(missing_llvm));
    get(&packages, toolchain.as_ref())?;

    if building && toolchain.is_none() {
        toolchain = bpf::Toolchain::choose()?;
        // Only now it is known which LLVM goes with the compiler.
        let llvm: Vec<String> = toolchain.iter().flat_map(missing_llvm).collect();
        get(&llvm, toolchain.as_ref())?;
    }
    if building {
        let toolchain = toolchain.context(bpf::TWO_WAYS)?;
        linker(&toolchain)?;
    }
    if needs.contains(&Need::Test) {
        components()?;
    }
    if needs.iter().any(|n| *n != Need::Build) {
        mount_bpffs()?;
    }
    Ok(())
}

/// The tools of the BPF build, set up when they are missing.
pub fn tools() -> Result<Tools> {
    ensure(&[Need::Build])?;
    let toolchain = bpf::Toolchain::choose()?.context(bpf::TWO_WAYS)?;
    let linker = bpf::Linker::find().context("bpf-linker was here a moment ago and is not any more")?;
    Ok(Tools { toolchain, linker })
}

pub fn is_there(proof: &str) -> bool {
    if proof.starts_with('/') { Path::new(proof).exists() } else { host::which(proof).is_some() }
}

/// What a compiler's LLVM must bring: package and proof.
pub fn llvm_packages(llvm: u32) -> [(String, String); 2] {
    [
        (format!("llvm-{llvm}-dev"), format!("/usr/include/llvm-c-{llvm}/llvm-c/Core.h")),
        (format!("libpolly-{llvm}-dev"), format!("/usr/lib/llvm-{llvm}/lib/libPolly.a")),
    ]
}

fn missing(needs: &[Need]) -> impl Iterator<Item = &'static Package> {
    PACKAGES.iter().filter(|p| needs.contains(&p.need) && !is_there(p.proof))
}

fn missing_llvm(toolchain: &bpf::Toolchain) -> Vec<String> {
    if bpf::Linker::find().is_some_and(|linker| linker.fits(toolchain)) && llvm_nm_is_there(toolchain) {
        return Vec::new(); // The headers only serve to build the linker.
    }
    llvm_packages(toolchain.version.llvm)
        .into_iter()
        .filter(|(_, proof)| !is_there(proof))
        .map(|(name, _)| name)
        .collect()
}

fn llvm_nm_is_there(toolchain: &bpf::Toolchain) -> bool {
    toolchain.llvm_prefix().join("bin/llvm-nm").exists()
}

fn get(packages: &[String], toolchain: Option<&bpf::Toolchain>) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    if let Err(why) = apt::available() {
        bail!(
            "{} missing, and {why}. Type this, then try again:\n{}",
            packages.join(", "),
            by_hand(packages, toolchain)
        );
    }
    sh::step(&format!("installing from Debian: {}", packages.join(" ")));
    apt::install(packages)?;
    let services: Vec<&str> =
        SERVICES.iter().filter(|(package, _)| packages.iter().any(|p| p == package)).map(|(_, s)| *s).collect();
    if !services.is_empty() {
        eprintln!(
            "Their services were not started, and Cirri does not use them. Without this they start at the next boot:\n  \
             systemctl disable {}",
            services.join(" ")
        );
    }
    Ok(())
}

/// Packages that bring a service, and its name.
const SERVICES: [(&str, &str); 5] = [
    ("etcd-server", "etcd"),
    ("redis-server", "redis-server"),
    ("nginx-light", "nginx"),
    ("containerd", "containerd"),
    ("bird2", "bird"),
];

/// Everything a person must type for what is missing, the linker included.
fn by_hand(packages: &[String], toolchain: Option<&bpf::Toolchain>) -> String {
    let mut lines = vec![format!("  {}", apt::command_line(packages))];
    if packages.iter().any(|p| COMPILER.contains(&p.as_str())) {
        lines.push("  # or, instead of the last three packages: rustup component add rust-src".to_owned());
        lines.push("  cargo xtask setup    # once more: LLVM and bpf-linker go by the compiler".to_owned());
    }
    if let Some(toolchain) = toolchain
        && packages.iter().any(|p| p.starts_with("llvm-"))
    {
        lines.push(format!("  {}", bpf::linker_command_line(toolchain.version.llvm)));
    }
    lines.join("\n")
}

fn linker(toolchain: &bpf::Toolchain) -> Result<()> {
    let found = bpf::Linker::find();
    if found.as_ref().is_some_and(|linker| linker.fits(toolchain)) {
        return Ok(());
    }
    let replaced = found.map_or(String::new(), |l| {
        let llvm = l.llvm.map_or("an LLVM of its own".to_owned(), |n| format!("LLVM {n}"));
        format!(", in place of {} with {llvm}", l.version)
    });
    sh::step(&format!(
        "installing bpf-linker {} for LLVM {} with cargo (a minute or two){replaced}",
        bpf::LINKER_VERSION,
        toolchain.version.llvm
    ));
    bpf::install_linker(toolchain)?;
    match bpf::Linker::find() {
        Some(linker) if linker.fits(toolchain) => Ok(()),
        Some(other) => bail!(
            "bpf-linker {} was installed, but {} ({}) comes first in PATH: remove that one",
            bpf::LINKER_VERSION,
            other.path.display(),
            other.version
        ),
        None => bail!("bpf-linker was installed but does not start: run `bpf-linker --version` to see why"),
    }
}

fn components() -> Result<()> {
    let missing: Vec<&str> = COMPONENTS.iter().filter(|(c, _)| !is_there(c)).map(|(_, name)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let command = format!("rustup component add {}", missing.join(" "));
    if !is_there("rustup") {
        bail!("{} missing from the host's Rust toolchain, and there is no rustup to add it with", missing.join(", "));
    }
    sh::step(&format!("adding to the host's Rust toolchain: {command}"));
    sh::run(Command::new("rustup").args(["component", "add"]).args(missing))
}

fn mount_bpffs() -> Result<()> {
    if host::has_bpffs() {
        return Ok(());
    }
    let command = format!("mount -t bpf bpf {}", host::BPFFS);
    if !host::is_root() {
        bail!("no BPF file system at {}, and you are not root. Type: sudo {command}", host::BPFFS);
    }
    sh::step(&format!("mounting the BPF file system: {command}"));
    sh::run(Command::new("mount").args(["-t", "bpf", "bpf", host::BPFFS]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_by_hand_covers_packages_and_linker() {
        let toolchain = bpf::Toolchain {
            name: "debian".into(),
            cargo: "/usr/bin/cargo".into(),
            rustc: "/usr/bin/rustc".into(),
            version: bpf::Version { release: "1.96.0".into(), llvm: 22 },
        };
        let text = by_hand(&["llvm-22-dev".into(), "etcd-server".into()], Some(&toolchain));
        assert!(text.contains("apt-get install -y --no-install-recommends llvm-22-dev etcd-server"), "{text}");
        assert!(text.contains("cargo install bpf-linker --version 0.13.0 --locked"), "{text}");
        assert!(text.contains("--features llvm-22"), "{text}");
    }

    #[test]
    fn a_missing_compiler_is_answered_with_both_ways() {
        let text = by_hand(&COMPILER.map(str::to_owned), None);
        assert!(text.contains("rustc-web") && text.contains("rustup component add rust-src"), "{text}");
    }

    #[test]
    fn each_package_is_named_once_and_says_why() {
        for (i, package) in PACKAGES.iter().enumerate() {
            assert!(PACKAGES.iter().skip(i + 1).all(|other| other.name != package.name), "{}", package.name);
            assert!(!package.why.is_empty() && !package.proof.is_empty(), "{}", package.name);
        }
    }
}
