//! A kernel out of Debian's archive, and the file system that it boots on.

use super::directory;
use super::steps::Step;
use crate::{apt, host, sh};
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A kernel, taken apart.
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// What is booted.
    pub image: PathBuf,
    /// `lib/modules/RELEASE` of its package.
    modules: PathBuf,
}

/// Modules that a node uses, by name; what they need comes with them. A kernel that has one built in needs no file.
const MODULES: [&str; 12] = [
    "veth",
    "vxlan",
    "dummy",
    "bridge",
    "sch_ingress",
    "cls_bpf",
    "act_bpf",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "ipip",
    "vrf",
];

/// Programs of this machine that the binary and the tests call.
const TOOLS: [&str; 6] = ["ip", "tc", "ethtool", "etcd", "nginx", "curl"];

/// Gets the newest kernel of a series, such as 6.1, that the archive offers. An old index may name none, or one that
/// the archive has no more; then it is refreshed.
pub fn kernel(series: &str) -> Result<Kernel> {
    match offered(series) {
        Err(_) if host::is_root() && !sh::interrupted() => {
            sh::step("refreshing the package index: apt-get update");
            apt::refresh()?;
            offered(series)
        }
        done => done,
    }
}

fn offered(series: &str) -> Result<Kernel> {
    let names = sh::capture(Command::new("apt-cache").args(["pkgnames", &format!("linux-image-{series}.")]))?;
    let package = newest(&names, series).with_context(|| {
        format!(
            "the package archive offers no linux-image-{series}.…-cloud-amd64. If you have such a package from \
             elsewhere: `cargo xtask kernels FILE.deb`"
        )
    })?;
    let kernel = Kernel::named(package.trim_start_matches("linux-image-"))?;
    if !kernel.is_unpacked() {
        sh::step(&format!("getting {package}"));
        let home = kernel.home();
        remove(&home)?;
        fs::create_dir_all(&home)?;
        let download = ["download", "-q", "-o", "APT::Sandbox::User=root", &package];
        sh::run(Command::new("apt-get").args(download).current_dir(&home))?;
        let archive = only_file(&home, "deb")?;
        kernel.unpack(&archive)?;
        fs::remove_file(&archive)?;
    }
    Ok(kernel)
}

/// The kernel of a package that somebody has.
pub fn kernel_of(package: &Path) -> Result<Kernel> {
    let name = package.file_name().unwrap_or_default().to_string_lossy();
    let release = name.strip_prefix("linux-image-").and_then(|rest| rest.split_once('_')).map(|(release, _)| release);
    let release =
        release.with_context(|| format!("{name} is not called as Debian calls kernels: linux-image-RELEASE_….deb"))?;
    let kernel = Kernel::named(release)?;
    if !kernel.is_unpacked() {
        kernel.unpack(package)?;
    }
    Ok(kernel)
}

impl Kernel {
    fn named(release: &str) -> Result<Kernel> {
        if host::architecture()? != "x86_64" {
            bail!("other kernels are tried on x86_64 only");
        }
        let unpacked = directory().join(release).join("package");
        Ok(Kernel {
            image: unpacked.join("boot").join(format!("vmlinuz-{release}")),
            modules: unpacked.join("lib/modules").join(release),
            release: release.to_owned(),
        })
    }

    /// 6.1 of 6.1.0-57-cloud-amd64.
    pub fn series(&self) -> String {
        self.release.split('.').take(2).collect::<Vec<_>>().join(".")
    }

    fn home(&self) -> PathBuf {
        directory().join(&self.release)
    }

    /// The index of the modules is what is made last.
    fn is_unpacked(&self) -> bool {
        self.modules.join("modules.dep").exists()
    }

    fn unpack(&self, package: &Path) -> Result<()> {
        let to = self.home().join("package");
        remove(&to)?;
        fs::create_dir_all(&to)?;
        sh::run(Command::new("dpkg").arg("-x").arg(package).arg(&to))?;
        sh::run(Command::new("depmod").arg("-b").arg(&to).arg(&self.release).env("PATH", host::search_path()))
    }
}

/// Files that the guest has beside the kernel's: from where, to where.
pub struct Programs(Vec<(PathBuf, PathBuf)>);

/// The binary and the tests that the steps want, without their debug information, and the tools they call.
pub fn programs(binary: &Path, steps: &[&Step]) -> Result<Programs> {
    let stripped = directory().join("programs");
    remove(&stripped)?;
    fs::create_dir_all(&stripped)?;
    let mut wanted = vec![("cirri".to_owned(), binary.to_owned())];
    let tests: BTreeSet<&str> = steps.iter().flat_map(|step| step.tests).copied().collect();
    if !tests.is_empty() {
        wanted.extend(test_binaries(&tests)?);
    }
    let mut files = Vec::new();
    for (name, path) in wanted {
        let to = stripped.join(&name);
        sh::run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&to).arg(&path))?;
        files.push((to, Path::new("/bin").join(name)));
    }
    if !tests.is_empty() {
        for tool in TOOLS {
            let path =
                host::which(tool).with_context(|| format!("{tool} was here a moment ago and is not any more"))?;
            files.push((path.clone(), path));
        }
    }
    let libraries = libraries(files.iter().map(|(from, _)| from.as_path()))?;
    files.extend(libraries.into_iter().map(|library| (library.clone(), library)));
    let busybox = host::which("busybox").context("busybox was here a moment ago and is not any more")?;
    files.push((busybox, "/bin/busybox".into()));
    Ok(Programs(files))
}

/// Writes the file system as an archive that the kernel unpacks into memory.
pub fn build(kernel: &Kernel, programs: &Programs, script: &str) -> Result<PathBuf> {
    let home = kernel.home();
    let root = home.join("root");
    remove(&root)?;
    for place in ["applets", "bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var"] {
        fs::create_dir_all(root.join(place))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;
    std::os::unix::fs::symlink("busybox", root.join("bin/sh"))?;
    for (from, to) in &programs.0 {
        copy(from, &inside(&root, to))?;
    }
    let names = copy_modules(kernel, &root)?;
    fs::write(root.join("modules.wanted"), names.join("\n"))?;
    fs::write(root.join("init"), script)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let image = home.join("initramfs");
    let archive = fs::File::create(&image).with_context(|| format!("cannot write {}", image.display()))?;
    let line = "find . | busybox cpio -o -H newc 2>/dev/null";
    sh::run(
        Command::new("sh")
            .args(["-c", line])
            .current_dir(&root)
            .stdout(archive)
            .stdin(Stdio::null())
            .env("PATH", host::search_path()),
    )?;
    remove(&root)?;
    Ok(image)
}

/// Copies the modules, those that they need, and the indexes; answers which of [`MODULES`] there are.
fn copy_modules(kernel: &Kernel, root: &Path) -> Result<Vec<String>> {
    let needs = fs::read_to_string(kernel.modules.join("modules.dep"))?;
    let to = inside(root, &Path::new("/lib/modules").join(&kernel.release));
    fs::create_dir_all(&to)?;
    for index in fs::read_dir(&kernel.modules)? {
        let path = index?.path();
        if path.is_file()
            && let Some(name) = path.file_name()
        {
            copy(&path, &to.join(name))?;
        }
    }
    let mut there = Vec::new();
    for wanted in MODULES {
        let line = needs.lines().find(|line| line.split(':').next().is_some_and(|file| module_name(file) == wanted));
        let Some((file, more)) = line.and_then(|line| line.split_once(':')) else { continue };
        for file in std::iter::once(file).chain(more.split_whitespace()) {
            copy(&kernel.modules.join(file), &to.join(file))?;
        }
        there.push(wanted.to_owned());
    }
    Ok(there)
}

/// `kernel/drivers/net/veth.ko.xz` is `veth`.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or_default();
    name.split('.').next().unwrap_or_default().replace('-', "_")
}

/// The test binaries of `e2e/tests` with these names, built.
fn test_binaries(names: &BTreeSet<&str>) -> Result<Vec<(String, PathBuf)>> {
    sh::step("the tests that run inside");
    let mut cargo = host::cargo();
    cargo.args(["test", "-p", "cirri-e2e", "--no-run", "--message-format=json"]);
    for name in names {
        cargo.args(["--test", name]);
    }
    let messages = sh::capture(&mut cargo)?;
    let built = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let name = message.get("target")?.get("name")?.as_str()?.to_owned();
        let path = message.get("executable")?.as_str()?.into();
        names.contains(name.as_str()).then_some((name, path))
    };
    let found: Vec<(String, PathBuf)> = messages.lines().filter_map(built).collect();
    match names.iter().find(|name| !found.iter().any(|(other, _)| other == *name)) {
        Some(missing) => bail!("cargo built no test binary {missing}"),
        None => Ok(found),
    }
}

/// The libraries that programs are linked with, theirs included.
fn libraries<'a>(programs: impl Iterator<Item = &'a Path>) -> Result<BTreeSet<PathBuf>> {
    let mut all = BTreeSet::new();
    for program in programs {
        let output = Command::new("ldd").arg(program).output().context("cannot start `ldd`")?;
        // A static program is no dynamic one, which `ldd` says by failing.
        all.extend(linked(&String::from_utf8_lossy(&output.stdout)).map(PathBuf::from));
    }
    Ok(all)
}

fn linked(ldd: &str) -> impl Iterator<Item = &str> {
    ldd.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
}

/// Of Debian's cloud kernels of a series the newest.
fn newest(names: &str, series: &str) -> Option<String> {
    let numbers = |name: &str| -> Vec<u64> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
    };
    names
        .lines()
        .filter(|name| name.starts_with(&format!("linux-image-{series}.")) && name.ends_with("-cloud-amd64"))
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
}

fn only_file(directory: &Path, extension: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new(extension)) {
            return Ok(path);
        }
    }
    bail!("{} has no .{extension} file", directory.display())
}

fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_of_a_series_is_found_by_its_numbers() {
        let names = "linux-image-6.1.0-9-cloud-amd64\nlinux-image-6.1.0-57-cloud-amd64\nlinux-image-6.1.0-57-amd64\n\
                     linux-image-6.1.0-57-cloud-amd64-dbg\nlinux-image-6.12.117+deb12-cloud-amd64\n\
                     linux-image-6.12.100+deb12-cloud-amd64\nlinux-image-6.12-cloud-amd64\n";
        assert_eq!(newest(names, "6.1").as_deref(), Some("linux-image-6.1.0-57-cloud-amd64"));
        assert_eq!(newest(names, "6.12").as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(newest(names, "5.10"), None);
    }

    #[test]
    fn libraries_and_modules_are_read_off() {
        let ldd = "\tlinux-vdso.so.1 (0x0)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x0)\n\t/lib64/ld-linux-x86-64.so.2 (0x0)\n";
        let all: Vec<&str> = linked(ldd).collect();
        assert_eq!(all, ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert_eq!(module_name("kernel/net/sched/act_bpf.ko.xz"), "act_bpf");
        assert_eq!(module_name("kernel/net/sched/sch-ingress.ko"), "sch_ingress");
    }
}
