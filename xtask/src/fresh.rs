//! `fresh`: what a new user meets. Set-up and the demo on a small Debian that has nothing, whose package index is old.
//!
//! The machine is a root file system of debootstrap's below `target/fresh`, entered in namespaces of its own (mounts
//! and processes): what is installed there does not touch this machine. It takes its package sources, certificates and
//! rustup from here. Its index is refreshed and then robbed of every list with a compiler that will do: that is how an
//! index looks that is some months old.

use crate::{bpf, host, product, sh, table, version};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// What must be there before `cargo xtask` itself can be compiled, as the guide says.
const FIRST: &str = "g++,ca-certificates";
/// The compiler by which an index is told to be old.
const COMPILER: &str = "rustc-web";
/// All of it.
const OLD: [&str; 3] = [COMPILER, "cargo-web", "rust-web-src"];
/// Set-up while no package source answers. cargo's registry does, or nothing could be compiled at all.
const NO_ARCHIVE: &str = "\
    trap 'rm /etc/apt/apt.conf.d/zz-dead' EXIT
    echo 'Acquire::http::Proxy \"http://127.0.0.1:9\"; Acquire::Retries \"0\";' > /etc/apt/apt.conf.d/zz-dead
    cargo xtask setup";
/// Steps of a first run there.
const STEPS: usize = 7;
/// The lab's name: the machine's demo has another.
const LAB: &str = "fresh";

pub fn command(keep: bool) -> Result<()> {
    product::need_root("fresh")?;
    let place = host::target().join("fresh");
    let base = base(&place)?;
    let machine = Machine::new(&place, base, keep)?;
    machine.copy_checkout()?;
    let least = host::rust_version()?;

    let mut rows = Vec::new();
    let mut check = |what: &str, run: &dyn Fn() -> Result<String>| {
        sh::step(what);
        let begun = Instant::now();
        let seen = run();
        let (good, detail) = match &seen {
            Ok(detail) => ("ok", detail.clone()),
            Err(error) => ("FAILED", format!("{error:#}")),
        };
        rows.push(vec![what.to_owned(), good.to_owned(), sh::clock(begun.elapsed()), detail]);
        seen.map(drop)
    };
    let outcome = (|| {
        check("an old index, no source answers: what was found and what is needed is said", &|| {
            let said = machine.fails(NO_ARCHIVE)?;
            contains(&said, &["could not be refreshed", COMPILER, &least, bpf::BY_RUSTUP])
        })?;
        check("the compiler that an old index offers is there: the first command of the README", &|| {
            // As set-up itself once did, which then gave up.
            machine.works(&format!("apt-get install -y -q --no-install-recommends {}", OLD.join(" ")))?;
            let said = machine.works(&format!("cargo xtask demo --name {LAB}"))?;
            let steps = said.lines().filter(|line| line.starts_with("==> [")).count();
            // Index, packages, linker, two mounts, the BPF programs, Cirri.
            let whole = format!("==> [{STEPS} of {STEPS}, ");
            if steps != STEPS || !said.contains(&whole) {
                bail!("{steps} steps said where they are, not {STEPS}");
            }
            contains(&said, &["minutes", "checks held"])
        })?;
        check("set up already: nothing is installed, no index asked", &|| {
            let said = machine.works("cargo xtask demo --help && cargo xtask build")?;
            lacks(&said, &["apt-get", "bpf-linker 0"])
        })?;
        check("a source that does not answer, a package that is gone: it is got from the others", &|| {
            machine.works("apt-get purge -y -q curl")?;
            machine.add_dead_source()?;
            let said = machine.works(&format!("cargo xtask demo --name {LAB}"))?;
            contains(&said, &["could not be refreshed wholly", "installing from Debian: curl", "checks held"])
        })?;
        check("a program of one's own that is too old: it is named", &|| {
            machine.put_old_curl()?;
            let said = machine.fails("cargo xtask demo")?;
            contains(&said, &["/usr/local/bin/curl", "7.64.0", "7.84"])
        })
    })();
    println!("\n{}", table::render(&["what", "", "min:s", "seen"], &rows));
    outcome
}

fn contains(said: &str, parts: &[&str]) -> Result<String> {
    match parts.iter().find(|part| !said.contains(**part)) {
        None => Ok(parts.join(", ")),
        Some(part) => bail!("it does not say `{part}`"),
    }
}

fn lacks(said: &str, parts: &[&str]) -> Result<String> {
    match parts.iter().find(|part| said.contains(**part)) {
        None => Ok(String::new()),
        Some(part) => bail!("it says `{part}`"),
    }
}

/// The root file system that every run begins with. Made once.
fn base(place: &Path) -> Result<PathBuf> {
    let base = place.join("base");
    let done = place.join("base.done");
    if done.exists() {
        return Ok(base);
    }
    if base.exists() {
        fs::remove_dir_all(&base)?; // Half of one.
    }
    fs::create_dir_all(place)?;
    sh::step("making a Debian of its own: debootstrap");
    let codename = codename()?;
    let (program, scripts) = debootstrap(place)?;
    let mut command = Command::new(program);
    if let Some(scripts) = scripts {
        command.env("DEBOOTSTRAP_DIR", scripts);
    }
    command.env("PATH", host::search_path()).args(["--variant=minbase", &format!("--include={FIRST}"), &codename]);
    sh::run(command.arg(&base).arg(mirror()?))?;
    for file in ["etc/apt/sources.list", "etc/resolv.conf", "etc/hosts"] {
        let _ = fs::remove_file(base.join(file)); // Replaced by this machine's, if it has one.
    }
    for name in [
        "etc/apt/sources.list",
        "etc/apt/sources.list.d",
        "etc/apt/apt.conf.d",
        "etc/apt/trusted.gpg.d",
        "usr/share/keyrings",
        "etc/ssl/certs",
        "usr/local/share/ca-certificates",
        "usr/share/ca-certificates",
        "etc/resolv.conf",
        "etc/hosts",
    ] {
        let from = Path::new("/").join(name);
        if from.exists() {
            let to = base.join(name);
            let parent = to.parent().context("a path below the root")?;
            fs::create_dir_all(parent)?;
            sh::run(Command::new("cp").args(["-aLT", "--remove-destination"]).arg(&from).arg(&to))?;
        }
    }
    rustup(&base)?;
    // Nobody keeps this machine: its packages need not be on the disk for certain before the next is unpacked.
    fs::write(base.join("etc/dpkg/dpkg.cfg.d/unsafe-io"), "force-unsafe-io\n")?;
    fs::write(&done, "")?;
    Ok(base)
}

fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(str::to_owned).context("this is no Debian: /etc/os-release has no VERSION_CODENAME")
}

/// Where this machine's package manager has the release from.
fn mirror() -> Result<String> {
    let arguments = ["indextargets", "--format", "$(CODENAME)|$(REPO_URI)", "Created-By: Packages"];
    let text = sh::capture(Command::new("apt-get").args(arguments))?;
    let codename = codename()?;
    let release = text.lines().find_map(|line| line.strip_prefix(&codename)?.strip_prefix('|'));
    release.map(str::to_owned).with_context(|| format!("no package source of this machine has {codename}"))
}

/// debootstrap and its scripts: this machine's, else the package's, unpacked and not installed.
fn debootstrap(place: &Path) -> Result<(PathBuf, Option<PathBuf>)> {
    if let Some(path) = host::which("debootstrap") {
        return Ok((path, None));
    }
    let unpacked = place.join("debootstrap");
    fs::create_dir_all(&unpacked)?;
    sh::run(Command::new("apt-get").args(["download", "-q", "debootstrap"]).current_dir(&unpacked))?;
    let package = fs::read_dir(&unpacked)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get brought no debootstrap")?;
    sh::run(Command::new("dpkg").arg("-x").arg(package).arg(&unpacked))?;
    Ok((unpacked.join("usr/sbin/debootstrap"), Some(unpacked.join("usr/share/debootstrap"))))
}

/// rustup, as its installer leaves it: one program under many names. Its toolchains are lent, see [`Machine::enter`].
fn rustup(base: &Path) -> Result<()> {
    let rustup = host::which("rustup").context("rustup is not here to be lent")?;
    let bin = base.join("root/.cargo/bin");
    fs::create_dir_all(&bin)?;
    fs::copy(&rustup, bin.join("rustup"))?;
    for name in ["cargo", "rustc", "rustdoc", "rustfmt", "cargo-fmt", "cargo-clippy", "clippy-driver"] {
        symlink("rustup", bin.join(name))?;
    }
    fs::create_dir_all(base.join("root/.rustup"))?;
    Ok(())
}

/// A machine that begins as the base and is changed by what runs on it.
struct Machine {
    base: PathBuf,
    /// What is changed lies here.
    changes: PathBuf,
    keep: bool,
}

impl Machine {
    fn new(place: &Path, base: PathBuf, keep: bool) -> Result<Self> {
        let changes = place.join(format!("machine-{}", std::process::id()));
        for part in ["upper", "work", "root"] {
            fs::create_dir_all(changes.join(part))?;
        }
        let machine = Self { base, changes, keep };
        machine.make_index_old()?;
        Ok(machine)
    }

    /// Refreshes the index, then takes every list away that has a compiler which will do.
    fn make_index_old(&self) -> Result<()> {
        sh::step("its package index is made an old one");
        self.works("apt-get update -q")?;
        let least = host::rust_version()?;
        let script = format!("apt-cache madison {COMPILER}; ls /var/lib/apt/lists");
        let said = self.works(&script)?;
        let fitting: Vec<String> = said
            .lines()
            .filter_map(|line| {
                let mut fields = line.split('|').map(str::trim);
                let (name, offered, source) = (fields.next()?, fields.next()?, fields.next()?);
                (name == COMPILER && version::at_least(offered, &least)).then(|| source.to_owned())
            })
            .filter_map(|source| {
                source.split(' ').nth(1).map(|suite| suite.split('/').next().unwrap_or(suite).to_owned())
            })
            .collect();
        for suite in fitting {
            self.works(&format!("rm -f /var/lib/apt/lists/*_dists_{suite}_*"))?;
        }
        let left = self.works(&format!("apt-cache madison {COMPILER}"))?;
        let offered = left.lines().filter_map(|line| line.split('|').nth(1));
        if let Some(version) = offered.map(str::trim).find(|offered| version::at_least(offered, &least)) {
            bail!("the index still has {COMPILER} {version}: an old one cannot be made of it");
        }
        Ok(())
    }

    /// The files of this checkout that git knows or would: no builds.
    fn copy_checkout(&self) -> Result<()> {
        let to = self.changes.join("upper/root/cirri");
        fs::create_dir_all(&to)?;
        let script = "git ls-files -z --cached --others --exclude-standard | tar -c --null --no-recursion \
                      --ignore-failed-read -T - | tar -x -C \"$1\"";
        sh::run(Command::new("sh").args(["-ec", script, "sh"]).arg(&to).current_dir(host::workspace()))
    }

    fn add_dead_source(&self) -> Result<()> {
        let list = self.changes.join("upper/etc/apt/sources.list.d");
        fs::create_dir_all(&list)?;
        Ok(fs::write(list.join("dead.list"), "deb http://127.0.0.1:9/debian none main\n")?)
    }

    fn put_old_curl(&self) -> Result<()> {
        let bin = self.changes.join("upper/usr/local/bin");
        fs::create_dir_all(&bin)?;
        let file = bin.join("curl");
        fs::write(&file, "#!/bin/sh\necho curl 7.64.0\n")?;
        Ok(fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o755))?)
    }

    /// Runs a script on it that must succeed; what it said.
    fn works(&self, script: &str) -> Result<String> {
        let (good, said) = self.enter(script)?;
        if good { Ok(said) } else { bail!("`{script}` failed") }
    }

    /// Runs a script on it that must fail; what it said.
    fn fails(&self, script: &str) -> Result<String> {
        let (good, said) = self.enter(script)?;
        if good { bail!("`{script}` did not fail") } else { Ok(said) }
    }

    /// Its mounts and processes are its own; they end with the script. /sys comes without what is mounted below it: set-up has that to do, too.
    fn enter(&self, script: &str) -> Result<(bool, String)> {
        const INSIDE: &str = r#"
            base=$1 changes=$2 rustup=$3 script=$4 root=$2/root
            mount -t overlay overlay -o "lowerdir=$base,upperdir=$changes/upper,workdir=$changes/work" "$root"
            mount -t proc proc "$root/proc"
            mount --bind /sys "$root/sys"
            mount --rbind /dev "$root/dev"
            mount -t tmpfs tmpfs "$root/run"
            mount --bind -o ro "$rustup" "$root/root/.rustup"
            exec chroot "$root" sh -ec "cd /root; [ ! -d cirri ] || cd cirri; exec 2>&1; $script"
        "#;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]);
        command.args(["sh", "-euc", INSIDE, "sh"]).args([&self.base, &self.changes, &host::rustup_home()]).arg(script);
        command
            .env_clear()
            .env("HOME", "/root")
            .env("PATH", "/root/.cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        for (name, value) in std::env::vars_os() {
            let text = name.to_string_lossy().to_lowercase();
            if text.ends_with("_proxy") || text == "term" {
                command.env(name, value);
            }
        }
        let mut said = String::new();
        let status = sh::stream(&mut command, |line| {
            said += line;
            said.push('\n');
        })?;
        Ok((status.success(), said))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.keep {
            eprintln!("what was changed on that machine is in {}", self.changes.display());
        } else if let Err(error) = fs::remove_dir_all(&self.changes) {
            eprintln!("cannot remove {}: {error}", self.changes.display());
        }
    }
}
