//! Taking over what an earlier run left in the tables of services.

use cirri_abi::{Service, ServiceKey};
use cirri_control::service::table::{Restored, Tables as Books, Write};
use cirri_loader::{MapError, Table, Tables};

use super::{Serving, write};

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

    /// Compares the kernel's tables with what was written there, once all of it was. `repair` is asked about each
    /// entry that somebody else changed, by its name and what became of it; what it agrees to is written again.
    ///
    /// # Errors
    /// A table cannot be read.
    pub fn compare(&mut self, tables: &Tables, repair: impl FnMut(&str, &str) -> bool) -> Result<(), MapError> {
        if self.swept && self.is_done() {
            let writes = changed(&self.books, tables, Reach::Whole, repair)?;
            self.push(None, writes, false);
        }
        Ok(())
    }
}

/// How much of the tables of services is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// All of it. That costs what the tables can hold, however little they do.
    Whole,
    /// What was written. What somebody added is not seen.
    Written,
}

/// So few rows are sooner asked for one by one than found in their table.
const FEW: u32 = 1024;

/// The writes that make the tables of services right where somebody else changed them, as far as `repair` agrees: it is
/// asked about each entry, by its name and what became of it.
///
/// # Errors
/// A table cannot be read.
pub fn changed(
    books: &Books,
    tables: &Tables,
    reach: Reach,
    mut repair: impl FnMut(&str, &str) -> bool,
) -> Result<Vec<Write>, MapError> {
    let found = match reach {
        Reach::Written if books.usage().services <= FEW => found_written(books, tables)?,
        _ => found_up_to(tables, books.last_backend())?,
    };
    let mut writes: Vec<Write> = Vec::new();
    for difference in books.compare(&found) {
        let epoch = matches!(difference.write, Write::Bump(_));
        if if epoch { !writes.is_empty() } else { repair(&difference.object, difference.found) } {
            writes.push(difference.write);
        }
    }
    Ok(write::together(writes.iter()).into_iter().map(|write| write.into_owned()).collect())
}

/// What the tables of services hold.
///
/// # Errors
/// A table cannot be read.
pub fn found(tables: &Tables) -> Result<Restored, MapError> {
    found_up_to(tables, u32::MAX)
}

/// The same, with the backends up to this number alone: most of their table is empty.
fn found_up_to(tables: &Tables, last_backend: u32) -> Result<Restored, MapError> {
    let services = tables.services.entries()?;
    let node_ports = occupied(&tables.node_ports, u32::MAX)?;
    found_beside(tables, services, node_ports, last_backend)
}

/// The same, of rows and node ports those alone that were written.
fn found_written(books: &Books, tables: &Tables) -> Result<Restored, MapError> {
    let (mut services, mut node_ports) = (Vec::new(), Vec::new());
    for key in books.written_rows() {
        services.extend(tables.services.get(&key)?.map(|row| (key, row)));
    }
    for word in books.written_node_ports() {
        node_ports.extend(tables.node_ports.get(&word)?.map(|bits| (word, bits)));
    }
    found_beside(tables, services, node_ports, books.last_backend())
}

/// What is found beside these rows and node ports.
fn found_beside(
    tables: &Tables,
    services: Vec<(ServiceKey, Service)>,
    node_ports: Vec<(u32, u64)>,
    last_backend: u32,
) -> Result<Restored, MapError> {
    let backends = occupied(&tables.backends, last_backend)?;
    let ranges: Vec<_> = tables.source_ranges.entries()?.into_iter().map(|(key, _)| key).collect();
    let end = services
        .iter()
        .flat_map(|(_, row)| [(row.inside_first, row.inside_count), (row.outside_first, row.outside_count)]);
    let end = end.filter(|(_, count)| *count > 0).map(|(first, count)| first.saturating_add(count)).max();
    let slots = first_slots(tables, end.unwrap_or_default())?;
    Ok(Restored { services, backends, slots, ranges, node_ports })
}

/// The entries of an array up to `last` that are not zero.
fn occupied<V>(table: &Table<u32, V>, last: u32) -> Result<Vec<(u32, V)>, MapError>
where
    V: cirri_abi::Plain + Default + PartialEq,
{
    let mut all = Vec::new();
    let mut at = None;
    let size = CHUNK.min(last.saturating_add(1) as usize);
    loop {
        let chunk = table.chunk(at.as_ref(), size)?;
        let end = chunk.entries.last().is_none_or(|(number, _)| *number >= last);
        all.extend(chunk.entries.into_iter().filter(|(number, value)| *number <= last && *value != V::default()));
        match chunk.next {
            Some(next) if !end => at = Some(next),
            _ => return Ok(all),
        }
    }
}

/// The slots before `end`.
fn first_slots(tables: &Tables, end: u32) -> Result<Vec<u32>, MapError> {
    let mut slots = Vec::with_capacity(end as usize);
    let mut at = None;
    while slots.len() < end as usize {
        let chunk = tables.slots.chunk(at.as_ref(), CHUNK.min(end as usize - slots.len()))?;
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
