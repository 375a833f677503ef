//! Carrying out writes.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};

use cirri_abi::{BackendState, ServiceSlot, proto};
use cirri_control::service::table::Write;
use cirri_loader::{MapError, Tables};

/// A backend that takes nothing any more.
pub struct Released {
    /// Its number.
    pub number: u32,
    /// Where its datagrams went, if it was one for datagrams.
    pub datagrams: Option<SocketAddr>,
}

/// Whether a write takes nothing away.
pub fn adds(write: &Write) -> bool {
    match write {
        Write::Backend(_, row) => row.state == BackendState::ACTIVE || row.state == BackendState::DRAINING,
        Write::Slots { .. } | Write::Service(..) | Write::Range(_) | Write::NodePorts { .. } | Write::Bump(_) => true,
        Write::RemoveService(_) | Write::RemoveRange(_) => false,
    }
}

/// The writes of one service port, in their order.
pub fn one(writes: &[Write]) -> Vec<Cow<'_, Write>> {
    writes.iter().map(Cow::Borrowed).collect()
}

/// Writes of several service ports that only add, put together by kind: first who serves, then the sets,
/// then the addresses that lead to them, then the epochs.
pub fn together<'a>(writes: impl Iterator<Item = &'a Write>) -> Vec<Cow<'a, Write>> {
    let mut sorted: Vec<Cow<'a, Write>> = writes.map(Cow::Borrowed).collect();
    // Stable: of two writes of one word of node ports the later one holds both ports.
    sorted.sort_by_key(|write| match write.as_ref() {
        Write::Backend(..) => 0,
        Write::Slots { .. } => 1,
        Write::Range(_) | Write::RemoveRange(_) => 2,
        Write::Service(..) | Write::RemoveService(_) => 3,
        Write::NodePorts { .. } => 4,
        Write::Bump(_) => 5,
    });
    sorted
}

/// Does the writes of service ports in their order, whoever had the numbers before. On error a first part
/// of them is done; all may be done again.
///
/// # Errors
/// The kernel's.
pub fn carry_out(tables: &Tables, writes: &[Write]) -> Result<(), MapError> {
    write(tables, &one(writes), |_| true, &mut Vec::new())
}

/// Does them, those of one kind that follow each other at once. `counted` says which numbers of backends
/// may have counters of an owner before; `released` learns which take nothing any more. On error a first part
/// of them is done; all may be done again.
///
/// # Errors
/// The kernel's.
pub fn write(
    tables: &Tables,
    writes: &[Cow<'_, Write>],
    counted: impl Fn(&u32) -> bool,
    released: &mut Vec<Released>,
) -> Result<(), MapError> {
    let mut rest = writes;
    while let Some(first) = rest.first() {
        let kind = std::mem::discriminant(first.as_ref());
        let same = rest.iter().take_while(|write| std::mem::discriminant(write.as_ref()) == kind).count();
        let (now, later) = rest.split_at(same);
        write_kind(tables, now, &counted, released)?;
        rest = later;
    }
    Ok(())
}

/// Writes of one kind.
fn write_kind(
    tables: &Tables,
    writes: &[Cow<'_, Write>],
    counted: &impl Fn(&u32) -> bool,
    released: &mut Vec<Released>,
) -> Result<(), MapError> {
    let (mut backends, mut slots, mut services) = (Vec::new(), Vec::new(), Vec::new());
    for write in writes {
        match write.as_ref() {
            Write::Backend(number, row) => {
                if row.state == BackendState::ABSENT || row.state == BackendState::DOWN {
                    released.extend(
                        tables
                            .backends
                            .get(number)?
                            .map(|was| Released { number: *number, datagrams: datagrams(&was) }),
                    );
                } else if counted(number) && tables.backends.get(number)?.is_none_or(|was| was.service != row.service) {
                    tables.clear_backend_counter(*number)?;
                }
                backends.push((*number, *row));
            }
            Write::Slots { first, backends } => {
                slots.extend((*first..).zip(backends.iter().map(|backend| ServiceSlot { backend: *backend })));
            }
            Write::Service(key, row) => services.push((*key, *row)),
            Write::RemoveService(key) => drop(tables.services.delete(key)?),
            Write::Range(key) => tables.source_ranges.put(key, &1)?,
            Write::RemoveRange(key) => drop(tables.source_ranges.delete(key)?),
            Write::NodePorts { word, bits } => tables.node_ports.put(word, bits)?,
            Write::Bump(slot) => drop(tables.bump(*slot)?),
        }
    }
    tables.backends.put_all(&backends)?;
    tables.slots.put_all(&slots)?;
    tables.services.put_all(&services)
}

fn datagrams(was: &cirri_abi::Backend) -> Option<SocketAddr> {
    let kept = was.state == BackendState::ACTIVE || was.state == BackendState::DRAINING;
    (kept && was.proto == proto::UDP).then(|| SocketAddr::new(IpAddr::from(was.addr), was.port.number()))
}

#[cfg(test)]
mod tests {
    use cirri_abi::{Backend, Service, ServiceKey};

    use super::*;

    #[test]
    fn what_only_adds_is_put_together_so_that_nothing_leads_to_what_is_not_there() {
        let backend = |state| Write::Backend(1, Backend { state, ..Backend::default() });
        let row = Write::Service(ServiceKey::default(), Service::default());
        let bits = |bits| Write::NodePorts { word: 3, bits };
        let slots = Write::Slots { first: 0, backends: vec![1] };
        let group = [backend(BackendState::ACTIVE), slots.clone(), row.clone(), bits(1), Write::Bump(7)];
        let other = [backend(BackendState::DRAINING), slots.clone(), row.clone(), bits(3), Write::Bump(8)];
        let all: Vec<Write> = together(group.iter().chain(&other)).into_iter().map(Cow::into_owned).collect();
        let expected = [
            backend(BackendState::ACTIVE),
            backend(BackendState::DRAINING),
            slots.clone(),
            slots,
            row.clone(),
            row,
            bits(1),
            bits(3),
            Write::Bump(7),
            Write::Bump(8),
        ];
        assert_eq!(all, expected);
        assert!(group.iter().chain(&other).all(adds));
        assert!(!adds(&backend(BackendState::ABSENT)) && !adds(&Write::RemoveService(ServiceKey::default())));
    }
}
