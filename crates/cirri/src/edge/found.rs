//! Which backends an earlier process had found up or down, as the kernel's tables tell.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cirri_abi::{Backend, BackendState, ServiceKey};
use cirri_control::service::table::Restored;

/// The backends that an earlier process balanced to, and whether they were up. Who drained was up.
pub fn found(found: &Restored) -> BTreeMap<BackendKey, bool> {
    let mut of_service: BTreeMap<u32, Vec<&Backend>> = BTreeMap::new();
    for (_, backend) in &found.backends {
        of_service.entry(backend.service).or_default().push(backend);
    }
    let mut all = BTreeMap::new();
    for (key, row) in &found.services {
        for backend in of_service.get(&row.id).into_iter().flatten() {
            let up = backend.state != BackendState::DOWN;
            all.insert(BackendKey::new(key, backend.addr.into(), backend.port.number()), up);
        }
    }
    all
}

/// A backend of a service, as the tables name both.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BackendKey {
    frontend: (IpAddr, u16, u8),
    backend: (IpAddr, u16),
}

impl BackendKey {
    /// The backend at this address and port, behind this row.
    pub fn new(key: &ServiceKey, address: IpAddr, port: u16) -> BackendKey {
        BackendKey { frontend: (key.addr.into(), key.port.number(), key.proto), backend: (address, port) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cirri_abi::{Addr, Port, Service};

    #[test]
    fn who_was_up_and_who_was_down_is_found_by_the_names_of_the_tables() {
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
            backends: vec![
                (1, backend(1, BackendState::ACTIVE)),
                (2, backend(2, BackendState::DOWN)),
                (3, backend(3, BackendState::DRAINING)),
            ],
            ..Restored::default()
        };
        let named = |last| BackendKey::new(&key, [10, 0, 0, last].into(), 8080);
        let wanted = BTreeMap::from([(named(1), true), (named(2), false), (named(3), true)]);
        assert_eq!(super::found(&found), wanted);
    }
}
