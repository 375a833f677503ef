//! Which backends an earlier process had found down, as the kernel's tables tell.

use std::collections::BTreeSet;
use std::net::IpAddr;

use cirri_abi::{Backend, BackendState, ServiceKey};
use cirri_control::service::table::Restored;

/// The backends that an earlier process had found down: frontend, and backend's address and port.
pub fn found(found: &Restored) -> BTreeSet<Down> {
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
    frontend: (IpAddr, u16, u8),
    backend: (IpAddr, u16),
}

impl Down {
    /// The backend at this address and port, behind this row.
    pub fn new(key: &ServiceKey, address: IpAddr, port: u16) -> Down {
        Down { frontend: (key.addr.into(), key.port.number(), key.proto), backend: (address, port) }
    }
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
        let down = super::found(&found);
        assert!(down.contains(&Down::new(&key, [10, 0, 0, 2].into(), 8080)));
        assert_eq!(down.len(), 1);
    }
}
