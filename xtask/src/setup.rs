//! What each command needs, what proves that it is there in a version that will do, and getting it.

use crate::archive::{self, Family, Shortage};
use crate::{apt, bpf, host, sh, version};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
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
    /// Boot other kernels.
    Kernels,
    /// Measure.
    Bench,
}

impl Need {
    pub const ALL: &[Need] = &[Need::Build, Need::Lab, Need::Test, Need::Kernels, Need::Bench];
}

/// Something from Debian's archive.
pub struct Package {
    pub name: &'static str,
    /// A command, or the path of a file, that is there when the package is. Somebody who has it
    /// from elsewhere needs no package.
    pub proof: &'static str,
    /// The oldest release that will do; `None`: any that a supported system has.
    pub least: Option<&'static str>,
    pub need: Need,
    pub why: &'static str,
}

/// Everything but the BPF compiler and its LLVM, whose names depend on each other.
pub const PACKAGES: &[Package] = &[
    package("gcc", "cc", Need::Build, "links the host's programs"),
    // LLVM's headers are C++17.
    package("g++", "c++", Need::Build, "builds bpf-linker's bridge to LLVM").since("7.4"),
    package("iproute2", "ip", Need::Lab, "looks into a lab's namespaces"),
    // The agents speak version 3 of its API as that release has it (watches that report progress).
    package("etcd-server", "etcd", Need::Lab, "the cluster's state with more than one node").since("3.4"),
    package("etcd-client", "etcdctl", Need::Lab, "looks at that state"),
    package("redis-server", "redis-server", Need::Lab, "a database among the demo's pods"),
    package("nginx-light", "nginx", Need::Lab, "a web server among the demo's pods"),
    // --rate, and %header in what it reports.
    package("curl", "curl", Need::Lab, "a client among the demo's pods").since("7.84"),
    package("ethtool", "ethtool", Need::Lab, "completes checksums for XDP in a lab"),
    package("iputils-ping", "ping", Need::Lab, "ICMP from a pod"),
    package("bpftool", "bpftool", Need::Test, "shows programs and maps by name"),
    package("bind9-dnsutils", "dig", Need::Test, "a DNS client of a service"),
    package("dnsmasq-base", "dnsmasq", Need::Test, "a DNS server behind a service"),
    // The first that speaks CNI 1.0.
    package("containerd", "containerd", Need::Test, "a real runtime that calls the CNI plugin").since("1.6"),
    package("runc", "runc", Need::Test, "starts containerd's containers"),
    package("containernetworking-plugins", "/usr/lib/cni/loopback", Need::Test, "containerd's CRI asks it first"),
    // Networks by CNI, several on a container.
    package("podman", "podman", Need::Test, "another, with two networks on a container").since("4.0"),
    package("bird2", "bird", Need::Test, "announces a load balancer's addresses by BGP"),
    package("qemu-system-x86", "qemu-system-x86_64", Need::Kernels, "boots other kernels"),
    package("busybox-static", "busybox", Need::Kernels, "the system on such a kernel"),
    package("kmod", "depmod", Need::Kernels, "finds what its modules need"),
    package("iptables", "iptables-legacy", Need::Bench, "services as kube-proxy makes them"),
    package("nftables", "nft", Need::Test, "packets that get lost on purpose; services by another filter"),
    package("iperf3", "iperf3", Need::Bench, "throughput and its kernel baseline"),
];

const fn package(name: &'static str, proof: &'static str, need: Need, why: &'static str) -> Package {
    Package { name, proof, least: None, need, why }
}

/// Parts of the host's toolchain, as rustup calls them.
pub const COMPONENTS: [&str; 2] = ["rustfmt", "clippy"];

/// What is there of a package.
pub enum Look {
    Missing,
    TooOld { path: PathBuf, version: String, least: &'static str },
    Fits { path: PathBuf, version: Option<String> },
}

impl Package {
    const fn since(mut self, least: &'static str) -> Self {
        self.least = Some(least);
        self
    }

    /// Looks for the command, and at its version.
    pub fn look(&self) -> Look {
        let Some(path) = host::which(self.proof) else { return Look::Missing };
        let version = host::version_of(&path);
        match (self.least, version) {
            (Some(least), Some(version)) if !version::at_least(&version, least) => {
                Look::TooOld { path, version, least }
            }
            (_, version) => Look::Fits { path, version },
        }
    }

    /// The same, without asking programs for a version that does not matter.
    fn is_lacking(&self) -> bool {
        match self.least {
            None => !is_there(self.proof),
            Some(_) => !matches!(self.look(), Look::Fits { .. }),
        }
    }
}

/// What builds the BPF object.
pub struct Tools {
    pub toolchain: bpf::Toolchain,
    pub linker: bpf::Linker,
}

/// Makes sure that everything `needs` asks for is there. Cheap when it is. Says what it installs
/// before it does, and where it cannot, what was found, what is needed and what to type.
pub fn ensure(needs: &[Need]) -> Result<()> {
    if needs.iter().any(|n| *n != Need::Build) && !host::has_btf() {
        bail!(
            "this kernel has no {}: no program can be loaded, and nothing was installed for it. It takes a kernel built \
               with CONFIG_DEBUG_INFO_BTF=y; `cargo xtask doctor` says what else",
            host::BTF
        );
    }
    let mut lacking = Lacking::look(needs)?;
    sh::expect(lacking.steps());
    if lacking.wants_packages() {
        packages(needs, &lacking)?;
        lacking = Lacking::look(needs)?;
        lacking.still()?;
    }
    if let Some(toolchain) = &lacking.linker_for {
        linker(toolchain)?;
    }
    if !lacking.components.is_empty() {
        components(&lacking.components)?;
    }
    if needs.iter().any(|n| *n != Need::Build) {
        mount_bpffs()?;
        mount_cgroup2()?;
    }
    Ok(())
}

/// Says how long a first run takes, before anything is begun.
pub fn announce() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let minutes = first_run_minutes(cores);
    eprintln!(
        "Nothing is built here yet. On a new machine this takes about {minutes} minutes ({cores} processors); most of \
         it is\nbuilding bpf-linker and Cirri itself. Each step says when it begins."
    );
}

/// Minutes of one processor's time for building bpf-linker, the BPF programs and Cirri, and minutes for packages. All of
/// it took a new user 13 minutes on two processors, one thing after the other.
const BUILD_MINUTES: usize = 20;
const PACKAGE_MINUTES: usize = 3;

fn first_run_minutes(cores: usize) -> usize {
    // The last crates are built one after the other, whatever there is of processors.
    PACKAGE_MINUTES + BUILD_MINUTES.div_ceil(cores.clamp(1, 4))
}

/// The tools of the BPF build, set up when they are missing.
pub fn tools() -> Result<Tools> {
    ensure(&[Need::Build])?;
    let toolchain =
        bpf::Toolchain::choose()?.fits().context("the BPF compiler was here a moment ago and is not any more")?;
    let linker = bpf::Linker::find().context("bpf-linker was here a moment ago and is not any more")?;
    Ok(Tools { toolchain, linker })
}

/// What is not there, or not in a version that will do.
struct Lacking {
    packages: Vec<&'static Package>,
    /// There is no compiler for the BPF programs; why each that was found will not do.
    compiler: Option<Vec<String>>,
    /// The compiler for which there is no linker.
    linker_for: Option<bpf::Toolchain>,
    /// What must be there of its LLVM.
    llvm: Vec<String>,
    components: Vec<&'static str>,
    /// File systems that are not mounted.
    mounts: usize,
}

impl Lacking {
    fn look(needs: &[Need]) -> Result<Self> {
        let packages = PACKAGES.iter().filter(|p| needs.contains(&p.need) && p.is_lacking()).collect();
        let mut lacking =
            Self { packages, compiler: None, linker_for: None, llvm: Vec::new(), components: Vec::new(), mounts: 0 };
        if needs.contains(&Need::Build) {
            match bpf::Toolchain::choose()? {
                bpf::Found::Unfit(found) => lacking.compiler = Some(found),
                bpf::Found::Fits(toolchain) => {
                    lacking.llvm = missing_llvm(&toolchain);
                    let fits = bpf::Linker::find().is_some_and(|linker| linker.fits(&toolchain));
                    lacking.linker_for = (!fits).then_some(toolchain);
                }
            }
        }
        if needs.contains(&Need::Test) {
            lacking.components = COMPONENTS.into_iter().filter(|name| component(name).is_none()).collect();
        }
        if needs.iter().any(|n| *n != Need::Build) {
            lacking.mounts = usize::from(!host::has_bpffs()) + usize::from(host::cgroup2().is_none());
        }
        Ok(lacking)
    }

    fn wants_packages(&self) -> bool {
        !self.packages.is_empty() || self.compiler.is_some() || !self.llvm.is_empty()
    }

    /// The steps that it takes to get all of it.
    fn steps(&self) -> usize {
        let linker = self.compiler.is_some() || self.linker_for.is_some();
        // The package index, then the packages.
        let once = usize::from(linker) + usize::from(!self.components.is_empty()) + self.mounts;
        2 * usize::from(self.wants_packages()) + once
    }

    /// Fails if packages are lacking although they were installed just now.
    fn still(&self) -> Result<()> {
        let mut problems = Vec::new();
        for package in &self.packages {
            problems.push(match package.look() {
                Look::TooOld { path, version, least } => format!(
                    "{} was installed, but {} ({version}, needed: {least} or newer) comes first in PATH: remove that one",
                    package.name,
                    path.display()
                ),
                _ => format!("{} was installed, but there is no {} in PATH", package.name, package.proof),
            });
        }
        if let Some(found) = &self.compiler {
            problems.push(format!("a compiler was installed, but none will do: {}", found.join("; ")));
        }
        if !self.llvm.is_empty() {
            problems.push(format!("{} were installed, but what they bring is not there", self.llvm.join(" ")));
        }
        if problems.is_empty() { Ok(()) } else { bail!("{}", problems.join("\n")) }
    }
}

/// Refreshes the index, looks at the versions that are offered, and installs all that is lacking at once.
fn packages(needs: &[Need], lacking: &Lacking) -> Result<()> {
    if let Err(why) = apt::available() {
        bail!("{why}, and something is missing. Type this, then try again:\n{}", by_hand(lacking));
    }
    sh::step("refreshing the package index: apt-get update");
    let refreshed = apt::refresh()?;
    // What is offered now may let a compiler do that did not before.
    let lacking = Lacking::look(needs)?;
    let mut names: Vec<&str> = lacking.packages.iter().map(|package| package.name).collect();
    names.extend(lacking.llvm.iter().map(String::as_str));
    for family in &Family::ALL {
        names.extend(family.packages());
    }
    let offers = apt::offers(&names);
    let nothing = archive::Offer::default();
    let of = |name: &str| offers.get(name).unwrap_or(&nothing);

    let (mut arguments, mut shortages, mut typed) = (Vec::new(), Vec::new(), Vec::new());
    let mut take = |name: &str, least: Option<&str>, offer: &archive::Offer| match offer
        .choose(name, |offered| least.is_none_or(|least| version::at_least(offered, least)))
    {
        Some(argument) => arguments.push(argument),
        None => shortages.push(Shortage::of(name, least, offer)),
    };
    for package in &lacking.packages {
        take(package.name, package.least, of(package.name));
    }
    let mut llvm = lacking.llvm.clone();
    let least = host::rust_version()?;
    let mut compiler = Ok(Vec::new());
    if let Some(unfit) = &lacking.compiler {
        let needs = bpf::needs(&least);
        match archive::choose_compiler(&offers, &needs, apt::llvm_of) {
            Ok(chosen) => {
                llvm.extend(llvm_packages(chosen.llvm).map(|(name, _)| name));
                compiler = Ok(chosen.arguments);
            }
            Err(found) => {
                let what = "a Rust compiler with its library's source, for the BPF programs".to_owned();
                compiler = Err(Shortage { what, needs: needs.describe(), found: [unfit.clone(), found].concat() });
            }
        }
    }
    let llvm: Vec<&str> = llvm.iter().map(String::as_str).collect();
    let llvm_offers = apt::offers(&llvm);
    for name in llvm {
        take(name, None, llvm_offers.get(name).unwrap_or(&nothing));
    }
    match compiler {
        Ok(more) => arguments.extend(more),
        Err(shortage) => {
            shortages.push(shortage);
            typed.push(bpf::BY_RUSTUP.to_owned());
            typed.push(
                "# or name an archive in /etc/apt/sources.list.d that has a newer one (Debian's security".to_owned(),
            );
            typed.push("# archive has rustc-web as its browsers need it)".to_owned());
            typed.push("cargo xtask setup".to_owned());
        }
    }
    if !shortages.is_empty() {
        bail!("{}", archive::explain(&shortages, refreshed, &typed));
    }
    if arguments.is_empty() {
        return Ok(());
    }
    sh::step(&format!("installing from Debian: {}", arguments.join(" ")));
    apt::install(&arguments)?;
    let services: Vec<&str> =
        SERVICES.iter().filter(|(package, _)| arguments.iter().any(|p| p == package)).map(|(_, s)| *s).collect();
    if !services.is_empty() {
        eprintln!(
            "Their services were not started, and Cirri does not use them. Without this they start at the next boot:\n  \
             systemctl disable {}",
            services.join(" ")
        );
    }
    Ok(())
}

pub fn is_there(proof: &str) -> bool {
    host::which(proof).is_some()
}

/// What a compiler's LLVM must bring: package and proof.
pub fn llvm_packages(llvm: u32) -> [(String, String); 2] {
    [
        (format!("llvm-{llvm}-dev"), format!("/usr/include/llvm-c-{llvm}/llvm-c/Core.h")),
        (format!("libpolly-{llvm}-dev"), format!("/usr/lib/llvm-{llvm}/lib/libPolly.a")),
    ]
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

/// Packages that bring a service, and its name.
const SERVICES: [(&str, &str); 5] = [
    ("etcd-server", "etcd"),
    ("redis-server", "redis-server"),
    ("nginx-light", "nginx"),
    ("containerd", "containerd"),
    ("bird2", "bird"),
];

/// Everything a person must type for what is lacking, the linker included.
fn by_hand(lacking: &Lacking) -> String {
    let mut packages: Vec<String> = lacking.packages.iter().map(|package| package.name.to_owned()).collect();
    packages.extend(lacking.llvm.iter().cloned());
    let mut lines = Vec::new();
    if let Some(found) = &lacking.compiler {
        packages.extend(Family::ALL[0].packages().map(str::to_owned));
        lines.extend(found.iter().map(|found| format!("  # will not do for the BPF programs: {found}")));
        lines.push(format!("  # instead of the last three packages of the next line also: {}", bpf::BY_RUSTUP));
    }
    for package in lacking.packages.iter().filter(|package| package.least.is_some()) {
        lines.push(format!("  # {}: {} or newer", package.name, package.least.unwrap_or_default()));
    }
    if !packages.is_empty() {
        lines.push(format!("  {}", apt::command_line(&packages)));
    }
    match &lacking.linker_for {
        Some(toolchain) => lines.push(format!("  {}", bpf::linker_command_line(toolchain.version.llvm))),
        None if lacking.compiler.is_some() => {
            lines.push("  cargo xtask setup    # once more: LLVM and bpf-linker go by the compiler".to_owned());
        }
        None => {}
    }
    lines.join("\n")
}

fn linker(toolchain: &bpf::Toolchain) -> Result<()> {
    let replaced = bpf::Linker::find().map_or(String::new(), |l| {
        let llvm = l.llvm.map_or("an LLVM of its own".to_owned(), |n| format!("LLVM {n}"));
        format!(", in place of {} with {llvm}", l.version)
    });
    sh::step(&format!(
        "building bpf-linker {} for LLVM {} with cargo{replaced}",
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

/// The version of a component, if it is there: rustup leaves the command of one that is not.
pub fn component(name: &str) -> Option<String> {
    let subcommand = if name == "rustfmt" { "fmt" } else { name };
    let said = sh::capture(host::cargo().args([subcommand, "--version"])).ok()?;
    said.lines().next().map(str::to_owned)
}

fn components(missing: &[&str]) -> Result<()> {
    let command = format!("rustup component add {}", missing.join(" "));
    if !is_there("rustup") {
        bail!("{} missing from the host's Rust toolchain, and there is no rustup to add it with", missing.join(", "));
    }
    sh::step(&format!("adding to the host's Rust toolchain: {command}"));
    sh::run(Command::new("rustup").args(["component", "add"]).args(missing))?;
    match missing.iter().find(|name| component(name).is_none()) {
        None => Ok(()),
        Some(name) => bail!("`{command}` brought no {name} that starts: `rustup show` says which toolchain is in use"),
    }
}

fn mount_bpffs() -> Result<()> {
    if host::has_bpffs() {
        return Ok(());
    }
    let command = format!("mount -t bpf bpf {}", host::BPFFS);
    if !host::is_root() {
        bail!("no BPF file system at {}, and you are not root. Type: sudo {command}", host::BPFFS);
    }
    // A second mount would hide what is in the first. The lock goes with the file.
    let directory = std::fs::File::open(host::BPFFS)?;
    directory.lock()?;
    if host::has_bpffs() {
        return Ok(());
    }
    sh::step(&format!("mounting the BPF file system: {command}"));
    sh::run(Command::new("mount").args(["-t", "bpf", "bpf", host::BPFFS]))
}

/// Services, in a lab as elsewhere, need control groups of version 2, which a plain container lacks.
fn mount_cgroup2() -> Result<()> {
    if host::cgroup2().is_some() {
        return Ok(());
    }
    // Beside groups of version 1 it has a directory of its own, as systemd has it.
    let place = if Path::new("/sys/fs/cgroup/cpu").exists() { "/sys/fs/cgroup/unified" } else { "/sys/fs/cgroup" };
    let command = format!("mount -t cgroup2 none {place}");
    if !host::is_root() {
        bail!("no control groups of version 2 are mounted, and you are not root. Type: sudo {command}");
    }
    sh::step(&format!("mounting control groups of version 2: {command}"));
    if !Path::new(place).exists() {
        std::fs::create_dir(place).with_context(|| format!("cannot make {place}"))?;
    }
    sh::run(Command::new("mount").args(["-t", "cgroup2", "none", place]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lacking() -> Lacking {
        Lacking {
            packages: Vec::new(),
            compiler: None,
            linker_for: None,
            llvm: Vec::new(),
            components: Vec::new(),
            mounts: 0,
        }
    }

    fn named(name: &str) -> &'static Package {
        PACKAGES.iter().find(|package| package.name == name).unwrap()
    }

    #[test]
    fn what_is_typed_by_hand_covers_packages_and_linker() {
        let toolchain = bpf::Toolchain {
            name: "debian".into(),
            cargo: "/usr/bin/cargo".into(),
            rustc: "/usr/bin/rustc".into(),
            version: bpf::Version { release: "1.96.0".into(), llvm: 22 },
        };
        let text = by_hand(&Lacking {
            packages: vec![named("etcd-server")],
            llvm: vec!["llvm-22-dev".into()],
            linker_for: Some(toolchain),
            ..lacking()
        });
        assert!(text.contains("apt-get install -y --no-install-recommends etcd-server llvm-22-dev"), "{text}");
        assert!(text.contains("cargo install bpf-linker --version 0.13.0 --locked"), "{text}");
        assert!(text.contains("--features llvm-22") && text.contains("etcd-server: 3.4 or newer"), "{text}");
    }

    #[test]
    fn a_missing_compiler_is_answered_with_both_ways_and_what_was_found() {
        let text = by_hand(&Lacking { compiler: Some(vec!["rustc 1.85.0 (debian): older".into()]), ..lacking() });
        for part in ["rustc-web", "rustup component add rust-src", "1.85.0"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_program_that_is_too_old_is_lacking_and_one_of_any_version_is_not() {
        let directory = std::env::temp_dir().join(format!("xtask-look-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let program = directory.join("tool");
        let tool = |version: &str, least| {
            std::fs::write(&program, format!("#!/bin/sh\necho tool {version}\n")).unwrap();
            std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            let proof: &'static str = program.display().to_string().leak();
            Package { least, ..package("tool", proof, Need::Lab, "a test") }
        };
        assert!(tool("7.80.1", Some("7.84")).is_lacking());
        assert!(!tool("7.88.1", Some("7.84")).is_lacking());
        assert!(!tool("0.1", None).is_lacking());
        let Look::TooOld { version, .. } = tool("7.9", Some("7.84")).look() else { panic!("it is too old") };
        assert_eq!(version, "7.9");
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(package("tool", "/no/such/tool", Need::Lab, "a test").is_lacking());
    }

    #[test]
    fn the_steps_are_known_before_the_first() {
        assert_eq!(lacking().steps(), 0);
        assert_eq!(Lacking { packages: vec![named("curl")], ..lacking() }.steps(), 2);
        let compiler = Lacking { compiler: Some(Vec::new()), components: vec!["clippy"], mounts: 2, ..lacking() };
        assert_eq!(compiler.steps(), 6, "index, packages, linker, components, two mounts");
    }

    #[test]
    fn each_package_is_named_once_and_says_why() {
        for (i, package) in PACKAGES.iter().enumerate() {
            assert!(PACKAGES.iter().skip(i + 1).all(|other| other.name != package.name), "{}", package.name);
            assert!(!package.why.is_empty() && !package.proof.is_empty(), "{}", package.name);
        }
    }
}
