//! Rows of services between the books (`control`) and the kernel's tables.

use std::collections::BTreeSet;

use cirri_abi::{Backend, BackendState, RangeKey, ServiceKey};
use cirri_control::service::table::{Restored, Write};
use cirri_loader::{MapError, Tables};

/// Rows read at once.
const CHUNK: usize = 4096;

/// Carries changes out, in their order.
///
/// # Errors
/// The kernel's. What came before is done.
pub fn carry_out(tables: &Tables, writes: &[Write]) -> Result<(), MapError> {
    for write in writes {
        match write {
            Write::Backend(number, backend) => {
                // What an earlier owner of the number was given is not the new one's.
                if tables.backends.get(number)?.is_none_or(|old| !same(&old, backend)) {
                    tables.clear_backend_counter(*number)?;
                }
                tables.backends.put(number, backend)?;
            }
            Write::Slots { first, backends } => {
                let slots: Vec<_> =
                    (*first..).zip(backends.iter().map(|&backend| cirri_abi::ServiceSlot { backend })).collect();
                tables.slots.put_all(&slots)?;
            }
            Write::Service(key, row) => tables.services.put(key, row)?,
            Write::RemoveService(key) => drop(tables.services.delete(key)?),
            Write::Range(key) => tables.source_ranges.put(key, &1)?,
            Write::RemoveRange(key) => drop(tables.source_ranges.delete(key)?),
            Write::NodePorts { word, bits } => tables.node_ports.put(word, bits)?,
            Write::Bump(slot) => drop(tables.bump(*slot)?),
        }
    }
    Ok(())
}

/// What an earlier process left.
///
/// # Errors
/// The kernel's.
pub fn found(tables: &Tables) -> Result<Restored, MapError> {
    let services = tables.services.entries()?;
    let end = services
        .iter()
        .flat_map(|(_, row)| [row.inside_first + row.inside_count, row.outside_first + row.outside_count])
        .max()
        .unwrap_or_default();
    let mut slots = Vec::with_capacity(end as usize);
    let mut at = None;
    while (slots.len() as u32) < end {
        let chunk = tables.slots.chunk(at.as_ref(), CHUNK)?;
        slots.extend(chunk.entries.iter().map(|(_, slot)| slot.backend));
        at = chunk.next;
        if at.is_none() {
            break;
        }
    }
    slots.truncate(end as usize);
    let mut backends = tables.backends.entries()?;
    backends.retain(|(_, backend)| *backend != Backend::default());
    let mut node_ports = tables.node_ports.entries()?;
    node_ports.retain(|(_, bits)| *bits != 0);
    let ranges: Vec<RangeKey> = tables.source_ranges.entries()?.into_iter().map(|(key, _)| key).collect();
    Ok(Restored { services, backends, slots, ranges, node_ports })
}

/// The backends that an earlier process had found down: frontend, and backend's address and port.
pub fn found_down(found: &Restored) -> BTreeSet<Down> {
    let down: Vec<&Backend> = found
        .backends
        .iter()
        .map(|(_, backend)| backend)
        .filter(|backend| backend.state == BackendState::DOWN)
        .collect();
    let mut all = BTreeSet::new();
    for (key, row) in &found.services {
        for backend in down.iter().filter(|backend| backend.service == row.id) {
            all.insert(Down::new(key, backend.addr.into(), backend.port.number()));
        }
    }
    all
}

/// A backend of a service, as the tables name both.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Down {
    frontend: (std::net::IpAddr, u16, u8),
    backend: (std::net::IpAddr, u16),
}

impl Down {
    /// The backend at this address and port, behind this row.
    pub fn new(key: &ServiceKey, address: std::net::IpAddr, port: u16) -> Down {
        Down { frontend: (key.addr.into(), key.port.number(), key.proto), backend: (address, port) }
    }
}

/// Whether two rows are of the same backend, whatever its state.
fn same(a: &Backend, b: &Backend) -> bool {
    Backend { state: 0, ..*a } == Backend { state: 0, ..*b } || b.state == BackendState::ABSENT
}

#[cfg(test)]
mod tests {
    use super::*;
    use cirri_abi::{Addr, Port, Service};

    #[test]
    fn who_was_down_is_found_by_the_names_of_the_tables() {
        let vip = Addr::v4([203, 0, 113, 10]);
        let key = ServiceKey { addr: vip, port: Port::new(80), proto: 6, _pad: 0 };
        let backend = |last, state| Backend {
            addr: Addr::v4([10, 0, 0, last]),
            port: Port::new(8080),
            proto: 6,
            state,
            service: 7,
            ..Backend::default()
        };
        let found = Restored {
            services: vec![(key, Service { id: 7, ..Service::default() })],
            backends: vec![(1, backend(1, BackendState::ACTIVE)), (2, backend(2, BackendState::DOWN))],
            ..Restored::default()
        };
        let down = found_down(&found);
        assert!(down.contains(&Down::new(&key, [10, 0, 0, 2].into(), 8080)));
        assert_eq!(down.len(), 1);
    }

    #[test]
    fn a_state_does_not_make_another_backend_and_an_address_does() {
        let one = Backend { service: 1, state: BackendState::ACTIVE, ..Backend::default() };
        assert!(same(&one, &Backend { state: BackendState::DOWN, ..one }));
        assert!(!same(&one, &Backend { service: 2, ..one }));
        assert!(same(&one, &Backend::default()), "one that goes keeps its counts until another comes");
    }
}
