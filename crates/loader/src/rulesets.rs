//! Rule sets as the kernel keeps them: tables of their own, which an outer table holds by slot.
//!
//! The outer table is made here too, although the object describes it. Kernels before 6.2 take an inner table
//! only if it knows as much of its types as the template that the outer one was made with (`timer_off` in
//! `bpf_map_meta_equal`); aya makes the template with BTF, and rule sets have none.

use std::{io, os::fd::AsFd, path::Path};

use cirri_abi::map;

use crate::{error::LoadError, pins::at, sys, sys::RawMap};

/// A key of the outer table that no packet asks for: slots have 16 bits.
const NOBODY: u32 = u32::MAX;

/// An empty rule set with room for so many entries.
pub(crate) fn inner(entries: u32, name: &str) -> io::Result<RawMap> {
    RawMap::create(&map::RULESET, entries, None, name)
}

/// An outer table with so many places.
pub(crate) fn outer(places: u32) -> io::Result<RawMap> {
    let template = inner(map::RULESET.max_entries, "template")?;
    RawMap::create(&map::RULESETS, places, Some(&template), map::RULESETS.name)
}

/// The same, pinned in the directory of a set, where the object finds it.
pub(crate) fn pin_outer(dir: &Path, places: u32) -> Result<(), LoadError> {
    let path = dir.join(map::RULESETS.name);
    outer(places).and_then(|outer| sys::pin(outer.as_fd(), &path)).map_err(at(&path, "make the table of rule sets"))
}

/// Whether rule sets can be put into an outer table, by trying. It may be in use.
pub(crate) fn try_outer(outer: &RawMap) -> io::Result<()> {
    outer.update_inner(&NOBODY.to_ne_bytes(), &inner(1, "trial")?)?;
    outer.delete(&NOBODY.to_ne_bytes()).map(drop)
}

/// Tries all that rule sets need, on tables that nobody uses.
pub(crate) fn try_out() -> io::Result<()> {
    let (outer, set) = (outer(1)?, inner(1, "trial")?);
    let entry = (vec![0; map::RULESET.key_size as usize], vec![0; map::RULESET.value_size as usize]);
    set.update_batch(&entry.0, &entry.1, 1).map_err(|(_, error)| error)?;
    set.lookup_batch(None, 1)?;
    set.freeze()?;
    outer.update_inner(&NOBODY.to_ne_bytes(), &set)?;
    outer.lookup_batch(None, 1).map(drop)
}
