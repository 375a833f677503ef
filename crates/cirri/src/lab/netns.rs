//! Named network namespaces: made, entered, listed, removed.
//!
//! A namespace is entered by one thread made for it, never by the whole process. Programs spawned from such a thread
//! inherit its namespace, so that no code has to run between fork and exec.

use std::fs::{self, File};
use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::thread::LinkNameSpaceType;

/// Where named namespaces are mounted, the place `ip netns` uses too.
const DIR: &str = "/run/netns";

/// What tells two namespaces apart: device and inode of their nsfs file.
pub type NsId = (u64, u64);

/// The path of a named namespace.
pub fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

/// Makes a namespace, brings its loopback up and sets what every namespace of a lab shares.
///
/// # Errors
/// A name that exists already, missing privileges, or what the kernel refused.
pub fn create(name: &str) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(DIR).with_context(|| format!("cannot make {DIR}"))?;
    let target = path(name);
    File::create_new(&target).with_context(|| format!("cannot make the network namespace {name}"))?;
    let made = on_own_thread(|| {
        unshare_network()?;
        rustix::mount::mount_bind("/proc/thread-self/ns/net", &target)?;
        sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        sysctl("net.ipv6.conf.default.accept_ra", "0")?;
        // Lets the prober send echo requests without raw sockets, as container runtimes do for their pods.
        sysctl("net.ipv4.ping_group_range", "0 2147483647")?;
        block_on(super::underlay::loopback_up())?
    });
    if let Err(error) = made {
        // The file must not outlive the failure: it would look like a namespace of this lab.
        let _ = delete(name);
        return Err(error.context(format!("cannot make the network namespace {name}")));
    }
    Ok(target)
}

/// Removes a namespace by name; one that is not there is no error.
///
/// # Errors
/// What the kernel refused.
pub fn delete(name: &str) -> io::Result<()> {
    let target = path(name);
    match rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH) {
        // Not mounted: a leftover file, which the next line removes.
        Ok(()) | Err(rustix::io::Errno::INVAL) => {}
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    match fs::remove_file(&target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The names of all namespaces that begin with `prefix`, sorted.
pub fn list(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(DIR) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    names
}

/// Which namespace a path (`/run/netns/…`, `/proc/…/ns/net`) stands for; `None` if it is gone.
pub fn id(path: &Path) -> Option<NsId> {
    let meta = fs::metadata(path).ok()?;
    Some((meta.dev(), meta.ino()))
}

/// Runs `work` on a thread inside the namespace at `path`.
///
/// # Errors
/// The namespace cannot be entered. What `work` itself returns is passed through.
pub fn within<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    on_own_thread(|| {
        enter(path)?;
        Ok(work())
    })
}

/// Runs an async `work` to its end inside the namespace at `path`, on a runtime of its own.
///
/// # Errors
/// The namespace cannot be entered or the runtime cannot be made.
pub fn within_async<T: Send, F: Future<Output = T>>(path: &Path, work: impl FnOnce() -> F + Send) -> anyhow::Result<T> {
    within(path, || block_on(async { work().await }))?
}

/// Moves the calling thread into the namespace at `path`.
///
/// # Errors
/// The path is no network namespace, or the process may not enter it.
pub fn enter(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open the network namespace {}", path.display()))?;
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter the network namespace {}", path.display()))
}

/// Runs a future to its end on a small runtime on this thread.
///
/// # Errors
/// The runtime cannot be made (no file descriptors left, for one).
pub fn block_on<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot make an async runtime")?;
    Ok(runtime.block_on(work))
}

/// Sets one kernel setting of the calling thread's network namespace.
///
/// # Errors
/// The kernel refused the value.
pub fn sysctl(name: &str, value: &str) -> anyhow::Result<()> {
    let file = format!("/proc/sys/{}", name.replace('.', "/"));
    fs::write(&file, value).with_context(|| format!("cannot set {name} to {value}"))
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[expect(
    deprecated,
    reason = "the safe form was deprecated for the FILES flag alone, which can break other threads; NEWNET cannot"
)]
fn unshare_network() -> rustix::io::Result<()> {
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET)
}
