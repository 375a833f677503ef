//! This process in another control group for a while, so that the programs on that group's sockets meet it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::lab::cgroup;

/// Where this process belongs; it goes back there with this guard.
pub struct Home {
    dir: PathBuf,
    now: PathBuf,
}

impl Home {
    /// Where it is now.
    pub fn new() -> Result<Home> {
        let text = std::fs::read_to_string("/proc/self/cgroup").context("cannot tell this process's control group")?;
        let own = text.lines().find_map(|line| line.strip_prefix("0::/")).context("no control group of version 2")?;
        let dir = cirri_loader::cgroup_root()?.join(own);
        Ok(Home { now: dir.clone(), dir })
    }

    /// Moves the process into a group, or with `None` back.
    pub fn enter(&mut self, group: Option<&Path>) -> Result<()> {
        let to = group.unwrap_or(&self.dir).to_owned();
        if to != self.now {
            cgroup::enter(&to)?;
            self.now = to;
        }
        Ok(())
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(error) = self.enter(None) {
            eprintln!("cirri: {error:#}");
        }
    }
}

/// A group of this process's own, removed with its guard.
pub struct Group(PathBuf);

impl Group {
    /// Makes it.
    pub fn new() -> Result<Group> {
        let dir = cirri_loader::cgroup_root()?.join(format!("cirri-bench-{}", std::process::id()));
        cgroup::create(&dir)?;
        Ok(Group(dir))
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = cgroup::remove(&self.0) {
            eprintln!("cirri: {error:#}");
        }
    }
}
