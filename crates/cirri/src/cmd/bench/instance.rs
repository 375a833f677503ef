//! The packet programs on maps of their own, gone with their guard; and what killed runs left.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cirri_loader::net::Namespace;
use cirri_loader::{Datapath, LoadOptions};

const PREFIX: &str = "bench-";

/// Loaded programs and their maps.
pub struct Instance {
    pub datapath: Datapath,
    root: PathBuf,
    name: String,
}

impl Instance {
    /// Loads; `number` tells the instances of one process apart.
    pub fn load(root: &Path, number: usize) -> Result<Instance> {
        Instance::load_with(root, number, &[])
    }

    /// The same, with so many entries in some maps.
    pub fn load_with(root: &Path, number: usize, sizes: &[(&str, u32)]) -> Result<Instance> {
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let sizes = sizes.iter().map(|(map, entries)| ((*map).to_owned(), *entries)).collect();
        let options =
            LoadOptions { pin_root: root.to_owned(), instance: name.clone(), sizes, ..LoadOptions::default() };
        let datapath = Datapath::load(&options).inspect_err(|_| purge(root, &name))?;
        Ok(Instance { datapath, root: root.to_owned(), name })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        purge(&self.root, &self.name);
    }
}

fn purge(root: &Path, name: &str) {
    if let Err(error) = Datapath::purge(root, name) {
        eprintln!("cirri: {error}");
    }
}

/// Removes pins and namespaces of processes that are no more.
pub fn sweep(root: &Path) {
    let gone = |name: &str| {
        let process = name.split('-').next().unwrap_or_default();
        process.bytes().all(|digit| digit.is_ascii_digit()) && !Path::new("/proc").join(process).exists()
    };
    for name in names(root) {
        if name.strip_prefix(PREFIX).is_some_and(gone) {
            purge(root, &name);
        }
    }
    for name in names(Path::new("/run/netns")) {
        if name.strip_prefix("cirri-bench-").is_some_and(gone) {
            // Another process may sweep at the same time.
            let _ = Namespace::delete(&name);
        }
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
