//! One map with typed keys and values.

use std::{io, marker::PhantomData, sync::Arc};

use cirri_abi::{Map, MapKind, Plain};

use crate::{
    error::MapError,
    plain::{bytes, bytes_of_all, read},
    sys::{MapInfo, Position, RawMap},
};

/// A map that can be looked up, written and walked.
///
/// Clones share the map. Every operation is one system call, or one a thousand entries for the
/// batch operations; none blocks. Concurrent use is safe; a walk beside writers sees an entry that
/// is there throughout at least once, and others perhaps.
#[derive(Debug)]
pub struct Table<K, V> {
    raw: Arc<RawMap>,
    name: &'static str,
    _types: PhantomData<fn(K) -> V>,
}

/// Entries a batch operation moves at once: large enough that the system call does not count,
/// small enough that a bucket's lock is not held for long.
pub(crate) const BATCH: usize = 1024;

impl<K: Plain, V: Plain> Table<K, V> {
    /// `raw` must have been checked by [`compatible`].
    pub(crate) fn new(raw: Arc<RawMap>, map: &Map) -> Result<Self, MapError> {
        let sizes = (size_of::<K>(), size_of::<V>());
        if (raw.info().key_size as usize, raw.info().value_size as usize) != sizes {
            return Err(MapError::Incompatible {
                map: map.name.into(),
                actual: format!("key {} and value {} bytes", raw.info().key_size, raw.info().value_size),
                expected: format!("key {} and value {} bytes", sizes.0, sizes.1),
            });
        }
        Ok(Table { raw, name: map.name, _types: PhantomData })
    }

    /// The map's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The most entries it can hold.
    pub fn capacity(&self) -> u32 {
        self.raw.info().max_entries
    }

    /// The value under exactly this key. For prefixes: the one that matches longest.
    pub fn get(&self, key: &K) -> Result<Option<V>, MapError> {
        let mut value = vec![0; self.raw.value_bytes()];
        let found = self.raw.lookup(bytes(key), &mut value).map_err(|error| self.failed("lookup", error))?;
        Ok(if found { read(&value) } else { None })
    }

    /// Writes an entry, over an older one if there is one.
    pub fn put(&self, key: &K, value: &V) -> Result<(), MapError> {
        self.raw.update(bytes(key), bytes(value)).map_err(|error| self.failed("update", error))
    }

    /// Writes many entries. On error a first part of them is written.
    pub fn put_all(&self, entries: &[(K, V)]) -> Result<(), MapError> {
        for chunk in entries.chunks(BATCH) {
            let keys: Vec<K> = chunk.iter().map(|entry| entry.0).collect();
            let values: Vec<V> = chunk.iter().map(|entry| entry.1).collect();
            self.raw
                .update_batch(bytes_of_all(&keys), bytes_of_all(&values), chunk.len())
                .map_err(|(_, error)| self.failed("update", error))?;
        }
        Ok(())
    }

    /// Removes an entry; whether there was one.
    pub fn delete(&self, key: &K) -> Result<bool, MapError> {
        self.raw.delete(bytes(key)).map_err(|error| self.failed("delete", error))
    }

    /// Removes many entries; how many there were.
    pub fn delete_all<'a>(&self, keys: impl IntoIterator<Item = &'a K>) -> Result<usize, MapError> {
        let mut deleted = 0;
        for key in keys {
            deleted += usize::from(self.delete(key)?);
        }
        Ok(deleted)
    }

    /// All entries.
    pub fn entries(&self) -> Result<Vec<(K, V)>, MapError> {
        let mut all = Vec::new();
        let mut at = None;
        loop {
            let chunk = self.chunk(at.as_ref(), BATCH)?;
            all.extend(chunk.entries);
            match chunk.next {
                Some(next) => at = Some(next),
                None => return Ok(all),
            }
        }
    }

    /// About `count` entries from a place on (`None`: the beginning).
    pub fn chunk(&self, from: Option<&Cursor>, count: usize) -> Result<Chunk<K, V>, MapError> {
        let batch = self
            .raw
            .lookup_batch(from.map(|cursor| &cursor.0), count)
            .map_err(|error| self.failed("walking it", error))?;
        let keys = batch.keys.chunks_exact(size_of::<K>());
        let values = batch.values.chunks_exact(self.raw.value_bytes());
        let entries = keys.zip(values).filter_map(|(key, value)| Some((read(key)?, read(value)?))).collect();
        Ok(Chunk { entries, next: batch.next.map(Cursor) })
    }

    fn failed(&self, action: &'static str, error: io::Error) -> MapError {
        failed(self.name, self.raw.info(), action, error)
    }
}

/// Some entries of a table.
#[derive(Clone, Debug)]
pub struct Chunk<K, V> {
    /// The entries.
    pub entries: Vec<(K, V)>,
    /// Where to go on; `None`: that was all.
    pub next: Option<Cursor>,
}

/// A place in a walk over a table; stays good while entries come and go.
#[derive(Clone, Debug)]
pub struct Cursor(pub(crate) Position);

impl<K, V> Clone for Table<K, V> {
    fn clone(&self) -> Self {
        Table { raw: Arc::clone(&self.raw), name: self.name, _types: PhantomData }
    }
}

/// Names the map in an error of the kernel.
pub(crate) fn failed(map: &str, info: &MapInfo, action: &'static str, error: io::Error) -> MapError {
    let full = [libc::E2BIG, libc::ENOSPC].map(Some).contains(&error.raw_os_error());
    if full && action == "update" {
        return MapError::Full { map: map.into(), max_entries: info.max_entries };
    }
    MapError::Kernel { map: map.into(), action, error }
}

/// Whether the kernel's map is the one that the ABI describes.
///
/// A map of another shape must never be used: the kernel would write past the buffers that are
/// made for the expected one.
pub(crate) fn compatible(info: &MapInfo, map: &Map, max_entries: u32) -> Result<(), MapError> {
    // A ring has no keys; its size must be that of the ABI or of the configuration as well.
    let expected = MapInfo {
        kind: map.kind as u32,
        id: info.id,
        key_size: map.key_size,
        value_size: map.value_size,
        max_entries,
        flags: map.flags,
    };
    if *info == expected {
        return Ok(());
    }
    Err(MapError::Incompatible { map: map.name.into(), actual: shape(info), expected: shape(&expected) })
}

fn shape(info: &MapInfo) -> String {
    let kinds = [
        MapKind::Hash,
        MapKind::Array,
        MapKind::PerCpuArray,
        MapKind::LruHash,
        MapKind::LpmTrie,
        MapKind::HashOfMaps,
        MapKind::SkStorage,
        MapKind::RingBuf,
    ];
    let kind = kinds.into_iter().find(|kind| *kind as u32 == info.kind);
    let kind = kind.map_or_else(|| format!("type {}", info.kind), |kind| format!("{kind:?}"));
    format!(
        "{kind}, key {}, value {}, {} entries, flags {:#x}",
        info.key_size, info.value_size, info.max_entries, info.flags
    )
}

#[cfg(test)]
mod tests {
    use cirri_abi::map;

    use super::*;

    fn info_of(map: &Map) -> MapInfo {
        MapInfo {
            kind: map.kind as u32,
            id: 7,
            key_size: map.key_size,
            value_size: map.value_size,
            max_entries: map.max_entries,
            flags: map.flags,
        }
    }

    #[test]
    fn a_map_as_the_abi_has_it_is_compatible() {
        for map in map::ALL {
            compatible(&info_of(map), map, map.max_entries).expect(map.name);
        }
    }

    #[test]
    fn a_map_that_differs_in_anything_is_refused_and_the_error_says_in_what() {
        let good = info_of(&map::FLOWS4);
        let bad = [
            MapInfo { kind: MapKind::Hash as u32, ..good },
            MapInfo { key_size: 20, ..good },
            MapInfo { value_size: 256, ..good },
            MapInfo { max_entries: 5, ..good },
            MapInfo { flags: 1, ..good },
        ];
        for info in bad {
            let error =
                compatible(&info, &map::FLOWS4, map::FLOWS4.max_entries).expect_err("must be refused").to_string();
            assert!(error.contains("FLOWS4") && error.contains(&shape(&info)), "{error}");
        }
    }
}
