//! Writes are carried out on a model of the kernel's tables that checks every single step.

mod addresses;
mod audit;

use super::*;
use crate::service::{Frontend, FrontendKind};
use crate::work::{assert_in_proportion, cost_of};
use cirri_abi::{Algorithm, BackendState, Port, proto, service_flag};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::time::Duration;

/// The kernel's tables.
#[derive(Clone, Debug, Default)]
struct Kernel {
    services: HashMap<ServiceKey, Service>,
    backends: HashMap<u32, cirri_abi::Backend>,
    slots: Vec<u32>,
    ranges: HashSet<RangeKey>,
    node_ports: BTreeMap<u32, u64>,
    bumps: Vec<u16>,
    /// It was broken before: what must hold does not yet.
    broken: bool,
}

/// What a client meets at one address: everything but numbers.
type Row = (u32, u32, u32, u8, u8, Vec<(Addr, u16, u8)>, Vec<(Addr, u16, u8)>, BTreeSet<(u32, [u8; 16])>);

impl Kernel {
    fn carry_out(&mut self, writes: Vec<Write>) {
        for write in writes {
            let text = format!("{write:?}");
            match write {
                Write::Backend(number, backend) if backend == cirri_abi::Backend::default() => {
                    assert!(self.backends.remove(&number).is_some(), "{text}: nobody had the number");
                }
                Write::Backend(number, backend) => {
                    self.backends.insert(number, backend);
                }
                Write::Slots { first, backends } => {
                    let range = first..first + backends.len() as u32;
                    for row in self.services.values() {
                        for (live, count) in
                            [(row.inside_first, row.inside_count), (row.outside_first, row.outside_count)]
                        {
                            let apart = count == 0 || live + count <= range.start || range.end <= live;
                            assert!(apart, "{text}: a row leads to {live}+{count}");
                        }
                    }
                    if self.slots.len() < range.end as usize {
                        self.slots.resize(range.end as usize, 0);
                    }
                    self.slots[range.start as usize..range.end as usize].copy_from_slice(&backends);
                }
                Write::Service(key, row) => {
                    self.services.insert(key, row);
                }
                Write::RemoveService(key) => assert!(self.services.remove(&key).is_some(), "{text}: no such row"),
                Write::Range(key) => assert!(self.ranges.insert(key), "{text}: twice"),
                Write::RemoveRange(key) => assert!(self.ranges.remove(&key), "{text}: no such range"),
                Write::NodePorts { word, bits } => {
                    self.node_ports.insert(word, bits);
                }
                Write::Bump(slot) => self.bumps.push(slot),
            }
            self.check(&text);
        }
    }

    /// What must hold after every single write.
    fn check(&self, write: &str) {
        if self.broken {
            return;
        }
        for (key, row) in &self.services {
            for number in self
                .set(row.inside_first, row.inside_count)
                .iter()
                .chain(self.set(row.outside_first, row.outside_count))
            {
                let backend = self.backends.get(number);
                let backend =
                    backend.unwrap_or_else(|| panic!("after {write}: {key:?} leads to the empty number {number}"));
                assert_eq!((backend.service, backend.proto), (row.id, key.proto), "after {write}: {key:?}");
            }
        }
    }

    fn set(&self, first: u32, count: u32) -> &[u32] {
        &self.slots[first as usize..(first + count) as usize]
    }

    /// Everything that clients can tell.
    fn seen(&self) -> (BTreeMap<String, Row>, BTreeMap<u32, u64>, usize) {
        let named = |numbers: &[u32]| -> Vec<(Addr, u16, u8)> {
            let named = |number| self.backends.get(number).map(|b| (b.addr, b.port.number(), b.state)).unwrap();
            numbers.iter().map(named).collect()
        };
        let rows = self.services.iter().map(|(key, row)| {
            let ranges = self.ranges.iter().filter(|range| range.service == row.id);
            let row = (
                row.flags,
                row.affinity,
                row.pool,
                row.algorithm,
                row.forwarding,
                named(self.set(row.inside_first, row.inside_count)),
                named(self.set(row.outside_first, row.outside_count)),
                ranges.map(|range| (range.prefix_len, range.addr.octets())).collect(),
            );
            (format!("{} {} {}", key.addr, key.port.number(), key.proto), row)
        });
        let ports = self.node_ports.iter().filter(|(_, bits)| **bits != 0).map(|(word, bits)| (*word, *bits));
        (rows.collect(), ports.collect(), self.backends.len())
    }

    fn restored(&self) -> Restored {
        Restored {
            services: self.services.iter().map(|(key, row)| (*key, *row)).collect(),
            backends: self.backends.iter().map(|(number, backend)| (*number, *backend)).collect(),
            slots: self.slots.clone(),
            ranges: self.ranges.iter().copied().collect(),
            node_ports: self.node_ports.iter().map(|(word, bits)| (*word, *bits)).collect(),
        }
    }
}

fn id(service: usize) -> PortId {
    let (namespace, port) = ("shop".to_string(), "http".to_string());
    PortId { namespace, service: format!("s{service}"), port, protocol: proto::TCP, v6: false }
}

fn cluster_ip(service: usize, port: u16) -> Frontend {
    let service = service as u32;
    let addr = Addr::v4([10, 96, (service >> 8) as u8, service as u8]);
    Frontend { addr, port, kind: FrontendKind::ClusterIp, shared: false }
}

fn node_port(port: u16) -> Frontend {
    Frontend { addr: Addr::ANY_V4, port, kind: FrontendKind::NodePort, shared: false }
}

fn backend(number: u32) -> Backend {
    let addr = std::net::Ipv4Addr::from(0x0af4_0000 + number);
    Backend { addr: addr.into(), port: 8080, state: BackendState::ACTIVE, weight: 1, node: None, name: None }
}

/// A service with backends that everybody may be given.
fn service(number: usize, backends: impl IntoIterator<Item = u32>) -> ServicePort {
    let backends: Vec<Backend> = backends.into_iter().map(backend).collect();
    ServicePort {
        frontends: vec![cluster_ip(number, 80)],
        inside: (0..backends.len()).collect(),
        outside: (0..backends.len()).collect(),
        backends,
        ..ServicePort::new(id(number))
    }
}

fn small() -> Capacity {
    Capacity { services: 64, backends: 64, slots: 2048, ranges: 16 }
}

#[test]
fn one_service_writes_these_rows_in_this_order() {
    let mut tables = Tables::new(small());
    let mut port = service(1, [1, 2]);
    port.frontends.push(node_port(30_080));
    let writes = tables.set(&port).unwrap();
    let row = |number: u32| cirri_abi::Backend {
        addr: Addr::v4([10, 244, 0, number as u8]),
        port: Port::new(8080),
        proto: 6,
        state: BackendState::ACTIVE,
        service: 1,
        _pad: [0; 2],
    };
    let key = |addr, port| ServiceKey { addr, port: Port::new(port), proto: 6, _pad: 0 };
    let cluster = Addr::v4([10, 96, 0, 1]);
    let slot = epoch_slot::FIRST_SERVICE + 1;
    let served = |flags| Service { id: 1, flags, inside_count: 2, outside_count: 2, slot, ..Service::default() };
    let refused = Service { flags: service_flag::REFUSE, slot: epoch_slot::FIRST_SERVICE, ..Service::default() };
    assert_eq!(
        writes,
        [
            Write::Backend(1, row(1)),
            Write::Backend(2, row(2)),
            Write::Slots { first: 0, backends: vec![1, 2] },
            Write::Service(key(cluster, 80), served(service_flag::INSIDE_ONLY)),
            Write::Service(key(Addr::ANY_V4, 30_080), served(0)),
            Write::NodePorts { word: 470, bits: 1 },
            Write::Service(ServiceKey { addr: cluster, ..ServiceKey::default() }, refused),
            Write::Bump(slot),
        ]
    );
    assert_eq!(tables.set(&port).unwrap(), [], "nothing changed");
    assert_eq!(tables.backend(2), Some((&port.id, &port.backends[1])));
    assert_eq!(tables.port(&port.id), Some((1, &port)));
    assert_eq!(tables.usage(), Usage { ports: 1, services: 3, backends: 2, slots: 2, ranges: 0 });
}

#[test]
fn a_backend_that_drains_is_told_after_the_row_and_one_that_returns_before_it() {
    let mut tables = Tables::new(small());
    let both = service(1, [1, 2]);
    tables.set(&both).unwrap();
    let mut draining = both.clone();
    draining.backends[1].state = BackendState::DRAINING;
    draining.inside = vec![0];
    draining.outside = vec![0];
    let kinds = |writes: &[Write]| {
        let kind = |write: &Write| match write {
            Write::Backend(n, row) => format!("backend {n} {}", BackendState::name(row.state)),
            Write::Slots { backends, .. } => format!("slots {backends:?}"),
            Write::Service(..) => "row".into(),
            other => format!("{other:?}").chars().take(4).collect(),
        };
        writes.iter().map(kind).collect::<Vec<_>>()
    };
    assert_eq!(kinds(&tables.set(&draining).unwrap()), ["slots [1]", "row", "backend 2 draining", "Bump"]);
    assert_eq!(kinds(&tables.set(&both).unwrap()), ["backend 2 active", "slots [1, 2]", "row", "Bump"]);
    assert_eq!(kinds(&tables.set(&service(1, [2])).unwrap()), ["slots [2]", "row", "backend 1 absent", "Bump"]);
}

#[test]
fn who_comes_second_to_an_address_is_refused_and_both_are_named() {
    let mut tables = Tables::new(small());
    tables.set(&service(1, [1])).unwrap();
    let mut second = service(2, [2]);
    second.frontends = vec![cluster_ip(2, 80), cluster_ip(1, 80)];
    let before = tables.usage();
    assert_eq!(
        tables.set(&second).unwrap_err().to_string(),
        "shop/s2:http/TCP (IPv4) wants 10.96.0.1 port 80, which shop/s1:http/TCP (IPv4) has and keeps; \
         give one of them another address or port"
    );
    assert_eq!(tables.usage(), before, "nothing of it was taken");
    tables.remove(&id(1));
    tables.set(&second).unwrap();
    assert_eq!(
        tables.owner(&ServiceKey { addr: Addr::v4([10, 96, 0, 1]), port: Port::new(80), proto: 6, _pad: 0 }),
        Some(&id(2))
    );
}

#[test]
fn what_does_not_fit_is_refused_in_one_sentence_and_changes_nothing() {
    let cases: [(Capacity, ServicePort, &str); 5] = [
        (
            Capacity { services: 3, ..small() },
            service(2, [2]),
            "shop/s2:http/TCP (IPv4) needs 2 more rows of addresses, but 1 of 3 are free; nothing of it was changed, \
             remove services or raise the capacity",
        ),
        (
            Capacity { backends: 4, ..small() },
            service(2, [2, 3, 4]),
            "shop/s2:http/TCP (IPv4) needs 3 more backends, but 2 of 4 are free",
        ),
        (Capacity { slots: 4, ..small() }, service(2, [2, 3, 4]), "needs 4 more slots, but 3 of 4 are free"),
        (
            Capacity { ranges: 1, ..small() },
            ServicePort {
                ranges: vec!["10.0.0.0/8".parse().unwrap(), "11.0.0.0/8".parse().unwrap()],
                ..service(2, [2])
            },
            "needs 2 more ranges of clients, but 1 of 1 are free",
        ),
        (
            Capacity { slots: 8, ..small() },
            ServicePort { outside: vec![0], ..service(2, [2, 3, 4, 5]) },
            "needs 1 more slots",
        ),
    ];
    for (capacity, port, expected) in cases {
        let mut kernel = Kernel::default();
        let mut tables = Tables::new(capacity);
        kernel.carry_out(tables.set(&service(1, [1])).unwrap());
        if capacity.slots == 8 {
            kernel.carry_out(tables.set(&service(3, [6, 7])).unwrap());
            kernel.carry_out(tables.set(&service(4, [8])).unwrap());
        }
        let (before, seen) = (tables.usage(), kernel.seen());
        let error = tables.set(&port).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!((tables.usage(), kernel.seen()), (before, seen), "{error}");
        kernel.carry_out(tables.remove(&id(1)));
    }
}

#[test]
fn a_change_that_does_not_fit_withdraws_who_left() {
    let mut kernel = Kernel::default();
    let mut tables = Tables::new(Capacity { slots: 4, ..small() });
    let before = ServicePort { algorithm: Algorithm::RANDOM, ..service(1, [1, 2, 3, 4]) };
    kernel.carry_out(tables.set(&before).unwrap());
    let seen = kernel.seen();
    let mut now = service(1, [1, 3, 4]);
    now.backends[1].state = BackendState::DRAINING;
    now.backends[2].state = BackendState::DOWN;
    (now.inside, now.outside) = (vec![0], vec![0]);
    assert!(matches!(tables.set(&now), Err(TableError::Full { .. })));
    let writes = tables.withdraw(&now);
    assert_eq!(writes.last(), Some(&Write::Bump(epoch_of(1))));
    kernel.carry_out(writes);
    let states: Vec<u8> = (1..=4).map(|number| kernel.backends[&number].state).collect();
    let (gone, down) = (BackendState::ABSENT, BackendState::DOWN);
    assert_eq!(states, [BackendState::ACTIVE, gone, gone, down], "nobody chooses one that is not active or drains");
    assert_eq!(tables.withdraw(&now), [], "once");
    kernel.carry_out(tables.set(&before).unwrap());
    assert_eq!(kernel.seen(), seen, "the old ones are there again");
    assert_eq!(tables.withdraw(&service(2, [9])), [], "nothing of it stands");
}

#[test]
fn what_is_not_valid_is_refused() {
    let mut six = service(1, [1]);
    six.backends[0].addr = "fd00::1".parse().unwrap();
    let mut frontend = service(1, [1]);
    frontend.frontends[0].addr = Addr::UNSPECIFIED;
    let mut zero = service(1, [1]);
    zero.frontends[0].port = 0;
    let maglev = ServicePort { algorithm: Algorithm::MAGLEV, maglev_size: Some(1000), ..service(1, [1]) };
    for (port, expected) in [
        (six, "has the backend fd00::1, which is of the other family"),
        (frontend, "is to be reached at ::, which is of the other family"),
        (zero, "names port 0; use 1 to 65535"),
        (maglev, "wants a Maglev table of 1000 slots; use one of 251,"),
    ] {
        let error = Tables::new(small()).set(&port).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn clients_inside_have_a_set_of_their_own_at_addresses_for_the_world() {
    let mut tables = Tables::new(small());
    let mut kernel = Kernel::default();
    let mut port = service(1, [1, 2, 3]);
    port.frontends.push(node_port(30_000));
    (port.inside, port.outside, port.within) = (vec![0], vec![1], Some(vec![0, 1]));
    kernel.carry_out(tables.set(&port).unwrap());
    let sets = |kernel: &Kernel, number: u16| {
        let row = kernel.services.iter().find(|(key, _)| key.port.number() == number).unwrap().1;
        [(row.inside_first, row.inside_count), (row.outside_first, row.outside_count)]
            .map(|(first, count)| kernel.set(first, count).to_vec())
    };
    assert_eq!((sets(&kernel, 80), sets(&kernel, 30_000)), ([vec![1], vec![2]], [vec![1, 2], vec![2]]));
    assert_eq!(tables.usage().slots, 1 + 1 + 2);
    port.within = Some(vec![1]);
    kernel.carry_out(tables.set(&port).unwrap());
    assert_eq!((sets(&kernel, 80), sets(&kernel, 30_000)), ([vec![1], vec![2]], [vec![2], vec![2]]));
    assert_eq!(tables.usage().slots, 2, "what is alike stands once");
}

#[test]
fn two_nodes_agree_on_every_slot_of_a_maglev_set() {
    let names = |order: &[u32]| -> Vec<Addr> {
        let mut kernel = Kernel::default();
        let mut tables = Tables::new(Capacity::default());
        kernel.carry_out(tables.set(&service(9, 200..200 + order[0])).unwrap());
        let mut port = ServicePort { algorithm: Algorithm::MAGLEV, ..service(1, order.iter().copied()) };
        for (index, backend) in port.backends.iter_mut().enumerate() {
            backend.weight = 1 + (order[index] % 3) as u16;
        }
        kernel.carry_out(tables.set(&port).unwrap());
        let row = kernel.services.values().find(|row| row.algorithm == Algorithm::MAGLEV).unwrap();
        assert_eq!((row.inside_first, row.inside_count), (row.outside_first, row.outside_count), "one table for both");
        kernel.set(row.outside_first, row.outside_count).iter().map(|n| kernel.backends[n].addr).collect()
    };
    let order: Vec<u32> = (1..=100).collect();
    let mut other = order.clone();
    other.reverse();
    let (one, two) = (names(&order), names(&other));
    assert_eq!(one.len(), 16_381);
    assert_eq!(one, two);
}

#[test]
fn a_new_process_keeps_every_number_and_writes_nothing() {
    let mut kernel = Kernel::default();
    let mut tables = Tables::new(Capacity::default());
    let mut ports: Vec<ServicePort> = (1..20).map(|n| service(n, (n as u32 * 10)..(n as u32 * 10 + 7))).collect();
    ports[3].algorithm = Algorithm::MAGLEV;
    ports[4].frontends.push(node_port(30_004));
    ports[5].outside = vec![1];
    ports[6].ranges = vec!["192.0.2.0/24".parse().unwrap()];
    for port in ports.iter().rev() {
        kernel.carry_out(tables.set(port).unwrap());
    }
    kernel.carry_out(tables.remove(&id(7)));
    let numbers: Vec<_> =
        tables.ports().map(|(number, port)| (number, port.id.clone(), ids(&tables, &port.id))).collect();
    let mut again = Tables::new(Capacity::default());
    again.restore(kernel.restored());
    for port in ports.iter().filter(|port| port.id != id(7)) {
        assert_eq!(again.set(port).unwrap(), [], "{}", port.id);
    }
    assert_eq!(again.sweep(), []);
    assert_eq!(numbers, again.ports().map(|(n, port)| (n, port.id.clone(), ids(&again, &port.id))).collect::<Vec<_>>());
    assert_eq!(again.usage(), tables.usage());
}

fn ids(tables: &Tables, id: &PortId) -> Vec<u32> {
    tables.backends(id).into_iter().map(|(number, _)| number).collect()
}

#[test]
fn a_broken_table_is_put_right() {
    let mut kernel = Kernel::default();
    let mut tables = Tables::new(small());
    kernel.carry_out(tables.set(&service(1, [1, 2])).unwrap());
    kernel.carry_out(tables.set(&service(2, [3, 4])).unwrap());
    // Two services in one range, two numbers for one place, and an address row and bits of nobody.
    let first = kernel.services.values().find(|row| row.id == 1).unwrap().inside_first;
    for row in kernel.services.values_mut().filter(|row| row.id == 2) {
        (row.inside_first, row.outside_first) = (first, first);
    }
    kernel.backends.insert(40, kernel.backends[&1]);
    let refused = Service { flags: service_flag::REFUSE, ..Service::default() };
    kernel.services.insert(ServiceKey { addr: Addr::v4([9, 9, 9, 9]), ..ServiceKey::default() }, refused);
    kernel.node_ports.insert(3, 0xff);
    kernel.broken = true;
    let mut again = Tables::new(small());
    again.restore(kernel.restored());
    for port in [service(1, [1, 2]), service(2, [3, 4])] {
        kernel.carry_out(again.set(&port).unwrap());
    }
    kernel.carry_out(again.sweep());
    kernel.broken = false;
    kernel.check("the sweep");
    let mut fresh = Kernel::default();
    let mut other = Tables::new(small());
    for port in [service(1, [1, 2]), service(2, [3, 4])] {
        fresh.carry_out(other.set(&port).unwrap());
    }
    assert_eq!(kernel.seen(), fresh.seen());
}

/// What the rows of a number of services with ten backends each cost, and one change among them.
fn costs(count: usize) -> [Duration; 2] {
    let ports: Vec<ServicePort> = (0..count).map(|n| service(n, (n as u32 * 10)..(n as u32 * 10 + 10))).collect();
    let mut tables = Tables::new(Capacity::default());
    let (all, ()) = cost_of(|| ports.iter().for_each(|port| drop(tables.set(port).unwrap())));
    let changed = ports[..1000].iter().cloned().map(|mut port| {
        port.backends.pop();
        port.inside.pop();
        port.outside.pop();
        port
    });
    let changed: Vec<ServicePort> = changed.collect();
    let (some, ()) = cost_of(|| changed.iter().for_each(|port| drop(tables.set(port).unwrap())));
    [all, some / changed.len() as u32]
}

#[test]
fn ten_times_as_many_services_cost_ten_times_as_much_and_a_change_costs_nothing_to_speak_of() {
    assert_in_proportion(costs(1_000), costs(10_000));
}

#[derive(Clone, Debug)]
enum Step {
    Set(Box<ServicePort>),
    Remove(usize),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let backends = proptest::collection::vec((0u32..12, 0u16..4, 1u8..4), 0..6);
    let frontends = proptest::collection::btree_set(0u16..4, 1..3);
    let traits = (any::<bool>(), any::<bool>(), 0u32..2, proptest::collection::btree_set(8u8..12, 0..3));
    let set = (0usize..5, backends, frontends, traits, any::<u8>()).prop_map(
        |(number, backends, frontends, traits, subset)| {
            let (maglev, node, affinity, ranges) = traits;
            let mut port = service(number, backends.iter().map(|(at, ..)| *at));
            for (backend, (_, weight, state)) in port.backends.iter_mut().zip(&backends) {
                (backend.weight, backend.state) = (*weight, *state);
            }
            let ready = |at: &usize| port.backends[*at].state == BackendState::ACTIVE;
            port.inside = (0..backends.len()).filter(ready).collect();
            port.outside = (0..backends.len()).filter(ready).filter(|at| subset & (1 << at) != 0).collect();
            port.within =
                (subset & 64 != 0).then(|| port.outside.iter().copied().filter(|_| subset & 128 != 0).collect());
            // A shared address now and then, so that services meet.
            port.frontends =
                frontends.into_iter().map(|at| cluster_ip(if at == 3 { 77 } else { number }, 80 + at)).collect();
            if affinity == 1 {
                // An address that is not only for services, now and then.
                port.frontends[0].shared = maglev;
            }
            if subset & 32 != 0 {
                port.frontends[0].kind = FrontendKind::ExternalIp;
            }
            if node {
                port.frontends.push(node_port(30_000 + number as u16));
            }
            port.algorithm = if maglev { Algorithm::MAGLEV } else { Algorithm::RANDOM };
            port.affinity = affinity;
            port.ranges = ranges.into_iter().map(|bits| format!("10.0.0.0/{bits}").parse().unwrap()).collect();
            Step::Set(Box::new(port))
        },
    );
    prop_oneof![6 => set, 2 => (0usize..5).prop_map(Step::Remove), 1 => Just(Step::Restart)]
}

proptest! {
    /// After any history the tables say what a fresh build says, were sound after every single
    /// write, and lost nothing of what they hold.
    #[test]
    fn any_history_ends_in_the_rows_of_a_fresh_build(steps in proptest::collection::vec(step(), 1..40)) {
        let mut kernel = Kernel::default();
        let mut tables = Tables::new(small());
        let mut standing: BTreeMap<PortId, ServicePort> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Set(port) => match tables.set(&port) {
                    Ok(writes) => {
                        let quiet = writes.is_empty();
                        prop_assert!(quiet || writes.last() == Some(&Write::Bump(epoch_of(tables.port(&port.id).unwrap().0))));
                        kernel.carry_out(writes);
                        standing.insert(port.id.clone(), *port);
                    }
                    Err(TableError::Taken { owner, .. }) => prop_assert!(standing.contains_key(&owner)),
                    Err(error) => {
                        prop_assert!(matches!(error, TableError::Full { .. }), "{}", error);
                        kernel.carry_out(tables.withdraw(&port));
                    }
                },
                Step::Remove(number) => {
                    kernel.carry_out(tables.remove(&id(number)));
                    standing.remove(&id(number));
                }
                Step::Restart => {
                    tables.restore(kernel.restored());
                    for port in standing.values() {
                        kernel.carry_out(tables.set(port).unwrap());
                    }
                    kernel.carry_out(tables.sweep());
                }
            }
        }
        let mut fresh = Kernel::default();
        let mut other = Tables::new(small());
        for port in standing.values() {
            // What was withdrawn for a change that did not fit returns.
            kernel.carry_out(tables.set(port).unwrap());
            fresh.carry_out(other.set(port).unwrap());
        }
        prop_assert_eq!(kernel.seen(), fresh.seen());
        prop_assert_eq!(tables.usage(), other.usage());
        for id in standing.keys() {
            kernel.carry_out(tables.remove(id));
        }
        prop_assert_eq!(tables.usage(), Usage::default());
        prop_assert_eq!(kernel.seen(), Kernel::default().seen());
    }
}
