//! Settings below `/proc/sys/net` that are read again and again.

use std::{collections::BTreeMap, fs::File, io, os::unix::fs::FileExt as _};

use super::{Net, NetError};

/// Settings of one namespace whose files stay open: to look a path up costs eight times what reading costs.
///
/// An open file cannot show what is not there any more: the kernel answers ENOENT (`use_table` in
/// `fs/proc/proc_sysctl.c`) once its device is deleted, renamed or in another namespace. Then the name is looked up anew.
#[derive(Debug, Default)]
pub struct OpenSettings {
    files: BTreeMap<String, File>,
}

/// Files that stay open, for a process that may have 1,024 and needs most of them for other things. What goes beyond is
/// looked up every time.
const MOST_OPEN: usize = 384;
/// Bytes that nearly every setting fits in.
const USUAL: usize = 4096;

impl OpenSettings {
    /// Reads settings (`ipv4/conf/eth0/rp_filter`) of this network, always the same one; `None` for one that is not
    /// there. Files of others are closed.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn read<'a>(
        &mut self,
        net: &Net,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<Option<String>>, NetError> {
        let names: Vec<&str> = names.into_iter().collect();
        let mut before = std::mem::take(&mut self.files);
        let mut values = Vec::with_capacity(names.len());
        for name in &names {
            let kept = before.remove_entry(*name).and_then(|(name, file)| Some((read(&file).ok()?, name, file)));
            values.push(kept.map(|(value, name, file)| {
                self.files.insert(name, file);
                value
            }));
        }
        let missing: Vec<usize> = (0..names.len()).filter(|at| values[*at].is_none()).collect();
        if missing.is_empty() {
            return Ok(values);
        }
        // A file leads to the settings of the namespace it was opened in, whoever reads it.
        let opened = net.namespace.run_anywhere(|| {
            let open = |at: &usize| File::open(path(names[*at])).and_then(|file| Ok((read(&file)?, file))).ok();
            missing.iter().map(open).collect::<Vec<_>>()
        })?;
        for (at, opened) in missing.into_iter().zip(opened) {
            let Some((value, file)) = opened else { continue };
            values[at] = Some(value);
            if self.files.len() < MOST_OPEN {
                self.files.insert(names[at].to_owned(), file);
            }
        }
        Ok(values)
    }
}

/// Where a setting is.
pub(super) fn path(name: &str) -> String {
    format!("/proc/sys/net/{name}")
}

/// The value of a setting. The kernel gives some of them, lists of ports, to a read from the beginning alone: what did
/// not fit into its buffer is lost.
pub(super) fn read(file: &File) -> io::Result<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let mut usual = [0; USUAL];
    let length = file.read_at(&mut usual, 0)?;
    if let Some(all) = usual.get(..length).filter(|_| length < USUAL) {
        return Ok(text(all));
    }
    let mut long = vec![0; 1 << 20];
    let length = file.read_at(&mut long, 0)?;
    match long.get(..length).filter(|all| all.len() < long.len()) {
        Some(all) => Ok(text(all)),
        None => Err(io::Error::other("it is longer than a megabyte")),
    }
}
