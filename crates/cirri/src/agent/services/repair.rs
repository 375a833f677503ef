//! Taking over what an earlier run left in the tables of services.

use cirri_control::service::table::Restored;
use cirri_loader::{MapError, Table, Tables};

use super::Serving;

impl Serving {
    /// Reads the kernel's tables. The same things keep their numbers; what differs from what is wanted is
    /// repaired once that is known. Until then nothing is written.
    ///
    /// # Errors
    /// A table cannot be read.
    pub fn adopt(&mut self, tables: &Tables) -> Result<(), MapError> {
        let found = found(tables)?;
        let Restored { services, backends, ranges, node_ports, .. } = &found;
        self.resumed = !(services.is_empty() && backends.is_empty() && node_ports.is_empty() && ranges.is_empty());
        if self.resumed {
            tracing::info!(addresses = services.len(), backends = backends.len(), "services of an earlier run");
            self.books.restore(found);
        }
        Ok(())
    }
}

/// What the tables of services hold.
///
/// # Errors
/// A table cannot be read.
pub fn found(tables: &Tables) -> Result<Restored, MapError> {
    let services = tables.services.entries()?;
    let backends = occupied(&tables.backends)?;
    let node_ports = occupied(&tables.node_ports)?;
    let ranges: Vec<_> = tables.source_ranges.entries()?.into_iter().map(|(key, _)| key).collect();
    let end = services
        .iter()
        .flat_map(|(_, row)| [(row.inside_first, row.inside_count), (row.outside_first, row.outside_count)]);
    let end = end.filter(|(_, count)| *count > 0).map(|(first, count)| first.saturating_add(count)).max();
    let slots = first_slots(tables, end.unwrap_or_default())?;
    Ok(Restored { services, backends, slots, ranges, node_ports })
}

/// The entries of an array that are not zero.
fn occupied<V: cirri_abi::Plain + Default + PartialEq>(table: &Table<u32, V>) -> Result<Vec<(u32, V)>, MapError> {
    let mut all = Vec::new();
    let mut at = None;
    loop {
        let chunk = table.chunk(at.as_ref(), CHUNK)?;
        all.extend(chunk.entries.into_iter().filter(|(_, value)| *value != V::default()));
        match chunk.next {
            Some(next) => at = Some(next),
            None => return Ok(all),
        }
    }
}

/// The slots before `end`.
fn first_slots(tables: &Tables, end: u32) -> Result<Vec<u32>, MapError> {
    let mut slots = Vec::with_capacity(end as usize);
    let mut at = None;
    while slots.len() < end as usize {
        let chunk = tables.slots.chunk(at.as_ref(), CHUNK)?;
        slots.extend(chunk.entries.into_iter().map(|(_, slot)| slot.backend));
        match chunk.next {
            Some(next) => at = Some(next),
            None => break,
        }
    }
    Ok(slots)
}

/// Entries that are read at once.
const CHUNK: usize = 8192;
