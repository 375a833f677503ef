//! How many entries each map has.

use std::collections::BTreeMap;

use cirri_abi::{Map, MapKind, map};

use crate::LoadError;

/// The size of every map: the ABI's, or what the configuration asks for.
pub(crate) fn sizes(wanted: &BTreeMap<String, u32>) -> Result<BTreeMap<&'static str, u32>, LoadError> {
    let mut sizes: BTreeMap<&'static str, u32> = map::ALL.iter().map(|map| (map.name, map.max_entries)).collect();
    for (name, size) in wanted {
        let Some(map) = map::ALL.iter().filter(|map| is_adjustable(map)).find(|map| map.name == name) else {
            let names: Vec<_> = map::ALL.iter().filter(|map| is_adjustable(map)).map(|map| map.name).collect();
            return Err(LoadError::Sizes(format!("{name} has no size to choose; these have: {}", names.join(", "))));
        };
        let ring = map.kind == MapKind::RingBuf;
        if ring && (!size.is_power_of_two() || *size < 4096) || *size == 0 {
            let rule = if ring { "a power of two of at least 4096 bytes" } else { "at least 1" };
            return Err(LoadError::Sizes(format!("{name}: {size} must be {rule}")));
        }
        sizes.insert(map.name, *size);
        if map.name == map::BACKENDS.name {
            sizes.insert(map::BACKEND_COUNTERS.name, *size);
        }
    }
    Ok(sizes)
}

/// The other arrays have a place for everything that can be named. That of counters of backends goes
/// with the table of backends.
fn is_adjustable(map: &Map) -> bool {
    matches!(map.kind, MapKind::LruHash | MapKind::Hash | MapKind::LpmTrie | MapKind::RingBuf)
        || [map::BACKENDS.name, map::SERVICE_SLOTS.name].contains(&map.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(name: &str, size: u32) -> Result<BTreeMap<&'static str, u32>, String> {
        sizes(&BTreeMap::from([(name.to_owned(), size)])).map_err(|error| error.to_string())
    }

    #[test]
    fn a_size_in_the_configuration_overrides_the_one_of_the_abi() {
        let sizes = wanted("FLOWS4", 1000).expect("a good size");
        assert_eq!((sizes["FLOWS4"], sizes["FLOWS6"]), (1000, map::FLOWS6.max_entries));
    }

    #[test]
    fn every_table_of_services_has_a_size_and_counters_of_backends_have_that_of_backends() {
        for name in ["SERVICES", "SERVICE_SLOTS", "AFFINITY", "SOURCE_RANGES", "PER_PACKET"] {
            assert_eq!(wanted(name, 1000).expect("a good size")[name], 1000);
        }
        let sizes = wanted("BACKENDS", 1000).expect("a good size");
        assert_eq!((sizes["BACKENDS"], sizes["BACKEND_COUNTERS"]), (1000, 1000));
    }

    #[test]
    fn sizes_that_cannot_be_are_refused_by_name() {
        for (name, size, says) in [
            ("FLOWS5", 1, "FLOWS4"),
            ("EPOCHS", 9, "FLOWS4"),
            ("SOCKETS", 9, "SERVICE_SLOTS"),
            ("BACKEND_COUNTERS", 9, "BACKENDS"),
            ("FLOWS4", 0, "at least 1"),
            ("EVENTS", 5000, "power of two"),
        ] {
            let error = wanted(name, size).expect_err("must be refused");
            assert!(error.contains(name) && error.contains(says), "{error}");
        }
    }
}
