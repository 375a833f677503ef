//! What is made for a process before it is sure to work, and goes if it does not.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use cirri_loader::net::Net;

use super::{Settings, SettingsError};

/// What was made for a start, and goes with one that fails.
#[derive(Debug)]
pub struct Made {
    owner: String,
    /// The state directory was not there.
    state: bool,
    /// Directories that were recorded.
    directories: BTreeSet<PathBuf>,
}

impl Made {
    /// Records these directories for an owner, as far as they are not there. First: nothing is made that nobody would
    /// remove.
    ///
    /// # Errors
    /// They cannot be recorded.
    pub fn record(owner: String, state_dir: &Path, pin_root: &Path) -> Result<Made, SettingsError> {
        let mut settings = Settings::of(&Net::here()?, owner.clone())?;
        let state = !state_dir.exists();
        let directories = settings.need_directories(&[state_dir, pin_root])?;
        Ok(Made { owner, state, directories })
    }

    /// The start fails: `forget` removes the owner's files from the state directory, if that is not an earlier run's.
    pub fn remove(&self, forget: impl FnOnce() -> io::Result<()>) {
        // One that was there has what an earlier run, or another process, left.
        if self.state
            && let Err(error) = forget()
        {
            tracing::warn!(%error, "files of a start that failed stay");
        }
        self.leave_directories();
    }

    /// Removes the directories that were recorded, if they are empty.
    pub fn leave_directories(&self) {
        let settings = Net::here().map_err(Into::into).and_then(|net| Settings::of(&net, self.owner.clone()));
        if let Err(error) = settings.and_then(|mut settings| settings.remove_directories(Some(&self.directories))) {
            tracing::warn!(%error, "directories of a start that failed stay");
        }
    }
}
