//! The compiler and linker of the BPF programs, and building their object.
//!
//! The programs need `-Z build-std=core` for a target without a prebuilt core, so the compiler must
//! come with the source of its own library; and bpf-linker must be built against an LLVM at least
//! as new as the compiler's, or it cannot read what the compiler wrote.

use crate::archive::CompilerNeeds;
use crate::{apt, host, sh};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version of bpf-linker this project is built with.
pub const LINKER_VERSION: &str = "0.13.0";
/// The LLVM releases that version can be built against.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
/// Names the compiler to use instead of the one found.
const CHOICE: &str = "CIRRI_BPF_TOOLCHAIN";

/// What to type for a compiler of rustup's.
pub const BY_RUSTUP: &str = "rustup update stable && rustup component add rust-src --toolchain stable";

/// What the programs need of their compiler. It compiles crates of the workspace, so that their `rust-version` is its.
pub fn needs(least: &str) -> CompilerNeeds<'_> {
    CompilerNeeds { least, llvm: LINKER_LLVM }
}

/// A Rust compiler that can build the BPF programs.
#[derive(Debug, Clone)]
pub struct Toolchain {
    /// `debian`, or rustup's name for it.
    pub name: String,
    pub cargo: PathBuf,
    pub rustc: PathBuf,
    pub version: Version,
}

/// What `rustc -vV` says of a compiler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    pub release: String,
    /// Its LLVM's major number.
    pub llvm: u32,
}

impl Toolchain {
    /// The one asked for by name, else the first that will do: rustup's in use, a rustup nightly, any other of rustup,
    /// Debian's.
    pub fn choose() -> Result<Found> {
        let least = host::rust_version()?;
        let needs = needs(&least);
        if let Ok(name) = std::env::var(CHOICE) {
            let chosen = candidates().into_iter().find(|c| c.name == name || c.name.starts_with(&format!("{name}-")));
            let Some(chosen) = chosen else {
                bail!("{CHOICE}={name}: no such toolchain with its library's source (component rust-src) is installed")
            };
            let toolchain = chosen.open()?;
            return match needs.judge(&toolchain.version.release, toolchain.version.llvm) {
                Ok(()) => Ok(Found::Fits(toolchain)),
                Err(problem) => {
                    bail!("{CHOICE}={name}: {}: {problem}; needed: {}", toolchain.in_words(), needs.describe())
                }
            };
        }
        let mut unfit = Vec::new();
        for candidate in candidates() {
            let name = candidate.name.clone();
            let judged = candidate.open().map_err(|error| format!("{name}: {error:#}")).and_then(|toolchain| {
                let judged = needs.judge(&toolchain.version.release, toolchain.version.llvm);
                judged.map_err(|problem| format!("{}: {problem}", toolchain.in_words()))?;
                // A nightly may be ahead of every LLVM that can be had here.
                if !toolchain.can_have_llvm() {
                    return Err(format!("{}: no llvm-{}-dev to be had", toolchain.in_words(), toolchain.version.llvm));
                }
                Ok(toolchain)
            });
            match judged {
                Ok(toolchain) => return Ok(Found::Fits(toolchain)),
                Err(problem) => unfit.push(problem),
            }
        }
        Ok(Found::Unfit(unfit))
    }

    /// As `rustc 1.96.0 (debian), LLVM 22`.
    pub fn in_words(&self) -> String {
        format!("rustc {} ({}), LLVM {}", self.version.release, self.name, self.version.llvm)
    }

    /// Where Debian puts the LLVM this compiler was built with.
    pub fn llvm_prefix(&self) -> PathBuf {
        format!("/usr/lib/llvm-{}", self.version.llvm).into()
    }

    fn can_have_llvm(&self) -> bool {
        self.llvm_prefix().join("bin/llvm-config").exists()
            || apt::offers_any(&format!("llvm-{}-dev", self.version.llvm))
    }
}

/// What was found when a compiler was looked for.
#[derive(Debug)]
pub enum Found {
    /// One that will do.
    Fits(Toolchain),
    /// None; why each that comes with its library's source will not do.
    Unfit(Vec<String>),
}

impl Found {
    pub fn fits(self) -> Option<Toolchain> {
        match self {
            Self::Fits(toolchain) => Some(toolchain),
            Self::Unfit(_) => None,
        }
    }
}

/// A bpf-linker that is installed.
#[derive(Debug)]
pub struct Linker {
    pub path: PathBuf,
    pub version: String,
    /// The LLVM it is linked with; `None`: statically, so that it cannot be told.
    pub llvm: Option<u32>,
}

impl Linker {
    pub fn find() -> Option<Self> {
        let path = host::which("bpf-linker")?;
        // Fails when its LLVM library is gone: then it is as good as not there.
        let text = sh::capture(Command::new(&path).arg("--version")).ok()?;
        let version = text.split_whitespace().nth(1)?.to_owned();
        let llvm = fs::read(&path).ok().and_then(|bytes| linked_llvm(&bytes));
        Some(Self { path, version, llvm })
    }

    pub fn fits(&self, toolchain: &Toolchain) -> bool {
        self.version == LINKER_VERSION && self.llvm.is_none_or(|llvm| llvm >= toolchain.version.llvm)
    }
}

/// The command that installs the linker for `toolchain`, as a person types it.
pub fn linker_command_line(llvm: u32) -> String {
    format!(
        "LLVM_PREFIX=/usr/lib/llvm-{llvm} cargo install bpf-linker --version {LINKER_VERSION} \
         --locked --force --no-default-features --features llvm-{llvm}"
    )
}

pub fn install_linker(toolchain: &Toolchain) -> Result<()> {
    let llvm = toolchain.version.llvm;
    let mut cargo = host::cargo();
    cargo.env("LLVM_PREFIX", toolchain.llvm_prefix()).args(["install", "bpf-linker", "--version", LINKER_VERSION]);
    cargo.args(["--locked", "--force", "--no-default-features", "--features", &format!("llvm-{llvm}")]);
    // What it is for LLVM does, which is built already: optimising the linker itself costs minutes and gains nothing.
    for (key, value) in [("OPT_LEVEL", "1"), ("LTO", "off"), ("CODEGEN_UNITS", "16"), ("DEBUG", "0")] {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{key}"), value);
    }
    sh::run(&mut cargo).with_context(|| {
        format!("bpf-linker could not be installed. Once that is mended: {}", linker_command_line(llvm))
    })
}

/// Where the object is that `cargo build` embeds.
pub fn object_path() -> PathBuf {
    host::workspace().join("target/bpf/cirri.bpf.o")
}

/// Builds the programs and answers where the object is. Its file is touched only when its bytes
/// changed, so that the crate that embeds it is not built again for nothing.
pub fn build_object(toolchain: &Toolchain, linker: &Linker) -> Result<PathBuf> {
    let root = host::workspace();
    let manifest = root.join("crates/bpf/Cargo.toml");
    if !manifest.exists() {
        bail!("{} is not there: this checkout lacks the BPF programs", manifest.display());
    }
    let built_in = host::target().join("bpf-build");
    let architecture = host::architecture()?;
    sh::step(&format!(
        "BPF programs ({architecture}) with rustc {} of {}, LLVM {}",
        toolchain.version.release, toolchain.name, toolchain.version.llvm
    ));
    let flags = [
        format!("--cfg=bpf_target_arch=\"{architecture}\""),
        "-Cdebuginfo=2".to_owned(), // BTF is made from it; without it no map has a type.
        "-Clink-arg=--btf".to_owned(),
        "-Clink-arg=-O3".to_owned(),
        // Else LLVM leaves every copy and every zeroing to byte loops that the verifier walks.
        "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
        format!("-Clinker={}", linker.path.display()),
    ];
    let mut cargo = Command::new(&toolchain.cargo);
    for inherited in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET", "RUSTUP_TOOLCHAIN"]
    {
        cargo.env_remove(inherited);
    }
    cargo
        .current_dir(&root)
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .args(["build", "--release", "-Z", "build-std=core", "--target", "bpfel-unknown-none"])
        .arg("--manifest-path")
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&built_in);
    sh::run(&mut cargo)?;

    let built = built_in.join("bpfel-unknown-none/release/cirri-bpf");
    refuse_panics(toolchain, &built)?;
    let object = object_path();
    copy_if_changed(&built, &object)?;
    Ok(object)
}

/// A panic in a BPF program is a jump the verifier refuses, or worse, one it does not.
fn refuse_panics(toolchain: &Toolchain, object: &Path) -> Result<()> {
    let nm = toolchain.llvm_prefix().join("bin/llvm-nm");
    let symbols = sh::capture(Command::new(nm).args(["--demangle", "--format=just-symbols"]).arg(object))?;
    let panics = panicking(&symbols);
    if !panics.is_empty() {
        bail!(
            "the BPF object can panic: it contains {}. Find the indexing, division or unwrap that brings it in",
            panics.join(", ")
        );
    }
    Ok(())
}

fn panicking(symbols: &str) -> Vec<&str> {
    symbols.lines().map(str::trim).filter(|s| s.contains("panicking")).collect()
}

fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("the build left no {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    let directory = to.parent().context("the object's path has no directory")?;
    fs::create_dir_all(directory)?;
    let partial = to.with_extension("partial");
    fs::write(&partial, new)?;
    fs::rename(&partial, to).with_context(|| format!("cannot write {}", to.display()))
}

/// A place a toolchain can be, whose library's source is there.
struct Candidate {
    name: String,
    bin: PathBuf,
}

impl Candidate {
    fn open(self) -> Result<Toolchain> {
        let (cargo, rustc) = (self.bin.join("cargo"), self.bin.join("rustc"));
        let said = sh::capture(Command::new(&rustc).arg("-vV"))?;
        let version = parse_version(&said)
            .with_context(|| format!("{} -vV names no release or LLVM version", rustc.display()))?;
        Ok(Toolchain { name: self.name, cargo, rustc, version })
    }
}

fn candidates() -> Vec<Candidate> {
    let mut all: Vec<Candidate> = fs::read_dir(host::rustup_home().join("toolchains"))
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(|entry| has_source(&entry.path()))
        .map(|entry| Candidate {
            name: entry.file_name().to_string_lossy().into_owned(),
            bin: entry.path().join("bin"),
        })
        .collect();
    let active = std::env::var("RUSTUP_TOOLCHAIN").unwrap_or_default();
    all.sort_by_key(|c| (c.name != active, !c.name.starts_with("nightly"), c.name.clone()));
    if has_source(Path::new("/usr")) && Path::new("/usr/bin/cargo").exists() && Path::new("/usr/bin/rustc").exists() {
        all.push(Candidate { name: "debian".to_owned(), bin: "/usr/bin".into() });
    }
    all
}

fn has_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
}

fn parse_version(text: &str) -> Option<Version> {
    let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "));
    let release = field("release")?.to_owned();
    let llvm = field("LLVM version")?.split('.').next()?.parse().ok()?;
    Some(Version { release, llvm })
}

/// The major number of the LLVM library that an executable names.
fn linked_llvm(executable: &[u8]) -> Option<u32> {
    const NAME: &[u8] = b"libLLVM.so.";
    let at = executable.windows(NAME.len()).position(|window| window == NAME)? + NAME.len();
    let digits: String =
        executable.get(at..)?.iter().map(|&b| char::from(b)).take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_says_its_release_and_llvm() {
        let text = "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(parse_version(text), Some(Version { release: "1.96.0".into(), llvm: 22 }));
        assert_eq!(parse_version("rustc 1.96.0\nrelease: 1.96.0\n"), None);
    }

    #[test]
    fn the_linkers_llvm_is_read_from_the_library_it_names() {
        assert_eq!(linked_llvm(b"\0libc.so.6\0libLLVM.so.22.1\0"), Some(22));
        assert_eq!(linked_llvm(b"static"), None);
    }

    #[test]
    fn a_linker_older_than_the_compiler_does_not_fit() {
        let toolchain = Toolchain {
            name: "debian".into(),
            cargo: "/usr/bin/cargo".into(),
            rustc: "/usr/bin/rustc".into(),
            version: Version { release: "1.96.0".into(), llvm: 22 },
        };
        let linker = |version: &str, llvm| Linker { path: "bpf-linker".into(), version: version.into(), llvm };
        assert!(linker(LINKER_VERSION, Some(22)).fits(&toolchain));
        assert!(linker(LINKER_VERSION, Some(23)).fits(&toolchain));
        assert!(linker(LINKER_VERSION, None).fits(&toolchain));
        assert!(!linker(LINKER_VERSION, Some(21)).fits(&toolchain));
        assert!(!linker("0.9.0", Some(22)).fits(&toolchain));
    }

    #[test]
    fn panicking_symbols_are_named() {
        let symbols = "from_workload\ncore::panicking::panic_bounds_check\nENDPOINTS\n";
        assert_eq!(panicking(symbols), ["core::panicking::panic_bounds_check"]);
        assert!(panicking("from_workload\nENDPOINTS\n").is_empty());
    }

    #[test]
    fn an_unchanged_object_keeps_its_time() {
        let directory = std::env::temp_dir().join(format!("xtask-copy-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let (from, to) = (directory.join("from"), directory.join("sub/to"));
        fs::write(&from, "one").unwrap();
        copy_if_changed(&from, &to).unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH;
        fs::File::options().write(true).open(&to).unwrap().set_modified(long_ago).unwrap();
        copy_if_changed(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().modified().unwrap(), long_ago);
        fs::write(&from, "two").unwrap();
        copy_if_changed(&from, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"two");
        fs::remove_dir_all(&directory).unwrap();
    }
}
