//! Named network namespaces: made, entered, listed, removed.
//!
//! A namespace is entered by one thread made for it, never by the whole process. Programs spawned from such a thread
//! inherit its namespace, so that no code has to run between fork and exec.

use std::fs;
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use cirri_loader::net::{Namespace, Net, NetError};

/// Where named namespaces are mounted, the place `ip netns` uses too.
const DIR: &str = "/run/netns";

/// What tells two namespaces apart: device and inode of their nsfs file.
pub type NsId = (u64, u64);

/// The path of a named namespace.
pub fn path(name: &str) -> PathBuf {
    Namespace::path_of(name)
}

/// Makes a namespace, brings its loopback up and sets what every namespace of a lab shares.
///
/// # Errors
/// A name that exists already, missing privileges, or what the kernel refused.
pub fn create(name: &str) -> anyhow::Result<Namespace> {
    let namespace = Namespace::create_new(name)?;
    let prepared = block_on(async {
        let net = Net::of(namespace.clone())?;
        net.set_sysctl("ipv6/conf/default/accept_dad", "0")?;
        net.set_sysctl("ipv6/conf/default/accept_ra", "0")?;
        // Lets the prober send echo requests without raw sockets, as container runtimes do for their pods.
        net.set_sysctl("ipv4/ping_group_range", "0 2147483647")?;
        net.set_up("lo").await
    });
    prepared?.with_context(|| format!("cannot prepare the network namespace {name}"))?;
    Ok(namespace)
}

/// Removes a namespace by name; one that is not there is no error.
///
/// # Errors
/// What the kernel refused.
pub fn delete(name: &str) -> Result<(), NetError> {
    Namespace::delete(name).map(drop)
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
pub fn within<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
    Namespace::open(path)?.run(work)
}

/// Runs an async `work` to its end inside the namespace at `path`, on a runtime of its own.
///
/// # Errors
/// The namespace cannot be entered or the runtime cannot be made.
pub fn within_async<T: Send, F: Future<Output = T>>(path: &Path, work: impl FnOnce() -> F + Send) -> anyhow::Result<T> {
    within(path, || block_on(async { work().await }))?
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
