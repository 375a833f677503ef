//! What somebody else did to the kernel's tables is found and made right.

use super::*;
use cirri_abi::Backend as Row;

/// Two services, one with ranges of clients and a node port, one with a Maglev table.
fn two() -> (Tables, Kernel) {
    let mut tables = Tables::new(small());
    let mut kernel = Kernel::default();
    let mut first = service(1, [1, 2]);
    first.frontends.push(node_port(30_080));
    first.ranges = vec!["10.0.0.0/8".parse().unwrap()];
    let second = ServicePort { algorithm: Algorithm::MAGLEV, maglev_size: Some(251), ..service(2, [3, 4]) };
    kernel.carry_out(tables.set(&first).unwrap());
    kernel.carry_out(tables.set(&second).unwrap());
    (tables, kernel)
}

/// Makes right what is different, in the order of kinds, and answers what it was.
fn repair(tables: &Tables, kernel: &mut Kernel) -> Vec<(String, &'static str)> {
    let differences = tables.compare(&kernel.restored());
    for difference in &differences {
        match difference.write.clone() {
            Write::Backend(number, row) if row == Row::default() => {
                kernel.backends.remove(&number);
            }
            Write::Backend(number, row) => {
                kernel.backends.insert(number, row);
            }
            Write::Slots { first, backends } => {
                kernel.slots[first as usize..first as usize + backends.len()].copy_from_slice(&backends);
            }
            Write::Service(key, row) => {
                kernel.services.insert(key, row);
            }
            Write::RemoveService(key) => {
                kernel.services.remove(&key);
            }
            Write::Range(key) => {
                kernel.ranges.insert(key);
            }
            Write::RemoveRange(key) => {
                kernel.ranges.remove(&key);
            }
            Write::NodePorts { word, bits } => {
                kernel.node_ports.insert(word, bits);
            }
            Write::Bump(slot) => kernel.bumps.push(slot),
        }
    }
    let epochs = |it: &&Difference| !matches!(it.write, Write::Bump(_));
    differences.iter().filter(epochs).map(|it| (it.object.clone(), it.found)).collect()
}

#[test]
fn tables_that_nobody_touched_are_as_they_were_written_also_after_a_restart() {
    let (tables, kernel) = two();
    assert_eq!(tables.compare(&kernel.restored()), []);
    let mut again = Tables::new(small());
    again.restore(kernel.restored());
    assert_eq!(again.compare(&kernel.restored()), [], "before anybody claims what was left");
    let ports: Vec<ServicePort> = tables.ports().map(|(_, port)| port.clone()).collect();
    for port in &ports {
        assert_eq!(again.set(port).unwrap(), [], "{}", port.id);
    }
    assert_eq!(again.sweep(), []);
    assert_eq!(again.compare(&kernel.restored()), []);
}

#[test]
fn every_kind_of_entry_that_is_deleted_altered_or_added_is_named_and_made_right() {
    type Damage = fn(&mut Kernel);
    let key = |service: u8| ServiceKey { addr: Addr::v4([10, 96, 0, service]), port: Port::new(80), proto: 6, _pad: 0 };
    let stray = ServiceKey { addr: Addr::v4([10, 96, 0, 9]), port: Port::new(80), proto: 6, _pad: 0 };
    assert_eq!((key(1).addr, stray.port.number()), (Addr::v4([10, 96, 0, 1]), 80));
    let cases: [(&str, Damage, &str); 11] = [
        (
            "a row is deleted",
            |k| k.services.retain(|key, _| key.addr != Addr::v4([10, 96, 0, 1])),
            "SERVICES 10.96.0.1:80",
        ),
        ("a row leads elsewhere", |k| k.services.values_mut().for_each(|row| row.inside_first = 7), "SERVICES"),
        (
            "a row is added",
            |k| {
                let key = ServiceKey { addr: Addr::v4([10, 96, 0, 9]), port: Port::new(80), proto: 6, _pad: 0 };
                k.services.insert(key, Service::default());
            },
            "SERVICES 10.96.0.9:80",
        ),
        (
            "a backend is emptied",
            |k| {
                k.backends.remove(&1);
            },
            "BACKENDS 1 (10.244.0.1:8080)",
        ),
        ("a backend is another", |k| k.backends.get_mut(&2).unwrap().addr = Addr::v4([6, 6, 6, 6]), "BACKENDS 2"),
        (
            "a backend is added",
            |k| {
                k.backends.insert(9, Row { service: 7, ..k.backends[&1] });
            },
            "BACKENDS 9",
        ),
        ("a slot is another", |k| k.slots[1] = 1, "SERVICE_SLOTS 0..2 (shop/s1:http/TCP"),
        (
            "a Maglev table is even",
            |k| {
                let row = *k.services.values().find(|row| row.algorithm == Algorithm::MAGLEV).unwrap();
                k.slots[row.inside_first as usize..][..row.inside_count as usize].fill(3);
            },
            "(shop/s2:http/TCP",
        ),
        ("a range is gone", |k| k.ranges.clear(), "SOURCE_RANGES of service 1"),
        (
            "a range is added",
            |k| {
                k.ranges.insert(RangeKey { service: 2, ..RangeKey::default() });
            },
            "SOURCE_RANGES of service 2",
        ),
        ("node ports are cleared", |k| k.node_ports.clear(), "NODE_PORTS 30080..30143"),
    ];
    for (what, damage, named) in cases {
        let (tables, mut kernel) = two();
        let (whole, epochs) = (kernel.restored(), kernel.bumps.len());
        damage(&mut kernel);
        let found = repair(&tables, &mut kernel);
        assert!(found.iter().any(|(object, _)| object.contains(named)), "{what}: {found:?}");
        assert!(kernel.bumps.len() > epochs, "{what}: recipes that were made from it live on");
        let sorted = |restored: Restored| {
            let mut backends = restored.backends;
            backends.sort_by_key(|(number, _)| *number);
            let services: BTreeMap<String, Service> =
                restored.services.iter().map(|(key, row)| (format!("{key:?}"), *row)).collect();
            (services, backends, restored.slots, restored.node_ports)
        };
        assert_eq!(sorted(kernel.restored()), sorted(whole), "{what}");
        assert_eq!(repair(&tables, &mut kernel), [], "{what}: again");
    }
}
