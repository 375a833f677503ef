//! What the kernel tests share: namespaces and pin directories that clean up after themselves.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use cirri_loader::{
    Datapath, LoadOptions,
    net::{Namespace, Net, VethEnd},
};

/// A network namespace that is removed with its guard. Look into it with
/// `nsenter --net=/run/netns/NAME`.
pub struct TestNamespace {
    /// The namespace.
    pub namespace: Namespace,
    name: String,
}

impl TestNamespace {
    /// A new, empty namespace; panics without root.
    #[expect(clippy::new_without_default, reason = "a default that makes a namespace would surprise")]
    pub fn new() -> TestNamespace {
        let name = unique("ldns");
        let namespace = Namespace::create(&name).expect("the kernel tests need root");
        TestNamespace { namespace, name }
    }

    /// Its name below `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its devices and routes; needs a tokio runtime.
    pub fn net(&self) -> Net {
        Net::of(self.namespace.clone()).expect("netlink opens in a new namespace")
    }
}

impl Drop for TestNamespace {
    fn drop(&mut self) {
        let deleted = Namespace::delete(&self.name);
        if !std::thread::panicking() {
            deleted.expect("the namespace of a test goes with it");
        }
    }
}

/// A pin directory of its own that is removed with its guard; links in it are detached.
pub struct TestInstance {
    /// What [`TestInstance::load`] loads with.
    pub options: LoadOptions,
}

impl TestInstance {
    /// Small maps, so that a test loads in milliseconds.
    #[expect(clippy::new_without_default, reason = "every one is another")]
    pub fn new() -> TestInstance {
        let small = ["FLOWS4", "FLOWS6", "PENDING4", "PENDING6", "FRAGMENTS"];
        let sizes = small.iter().map(|name| ((*name).to_owned(), 16_384)).collect();
        TestInstance { options: LoadOptions { instance: unique("ldtest"), sizes, ..LoadOptions::default() } }
    }

    /// Loads, as an agent does at its start.
    pub fn load(&self) -> Datapath {
        Datapath::load(&self.options).expect("the programs load")
    }

    /// The pin directory.
    pub fn dir(&self) -> PathBuf {
        self.options.pin_root.join(&self.options.instance)
    }

    /// Where the maps in use are pinned.
    pub fn maps(&self) -> PathBuf {
        self.dir().join(format!("{:016x}", cirri_abi::ABI_HASH))
    }
}

impl Drop for TestInstance {
    fn drop(&mut self) {
        let purged = Datapath::purge(&self.options.pin_root, &self.options.instance);
        if !std::thread::panicking() {
            purged.expect("the pins of a test go with it");
        }
    }
}

/// A veth pair with both ends in one namespace; answers the number of the first.
pub async fn veth(net: &Net, name: &str, peer: &str) -> u32 {
    let end = |name: &str| VethEnd { name: name.into(), ..VethEnd::default() };
    net.create_veth(&end(name), &end(peer)).await.expect("a veth pair");
    net.link(name).await.expect("its first end").index
}

/// The names in a directory, sorted.
pub fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("the directory is there");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
