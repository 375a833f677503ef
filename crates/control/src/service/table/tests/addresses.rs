//! Whom addresses are open to, and what they refuse as a whole.

use super::*;

#[test]
fn ranges_close_addresses_for_the_world_and_no_others() {
    let mut tables = Tables::new(small());
    let mut kernel = Kernel::default();
    let world = Addr::v4([203, 0, 113, 1]);
    let mut port = service(1, [1]);
    port.frontends.push(Frontend { addr: world, port: 80, kind: FrontendKind::LoadBalancer, shared: false });
    port.frontends.push(node_port(30_000));
    port.ranges = vec!["192.0.2.7/24".parse().unwrap(), "fd00::/8".parse().unwrap()];
    kernel.carry_out(tables.set(&port).unwrap());
    let flags = |kernel: &Kernel| {
        let mut flags: Vec<u32> = kernel.services.iter().filter(|(k, _)| k.proto != 0).map(|(_, r)| r.flags).collect();
        flags.sort_unstable();
        flags
    };
    assert_eq!(flags(&kernel), [0, service_flag::INSIDE_ONLY, service_flag::RANGES]);
    let expected = RangeKey { prefix_len: 32 + 96 + 24, service: 1, addr: Addr::v4([192, 0, 2, 0]) };
    assert_eq!(kernel.ranges, HashSet::from([expected]));
    port.ranges_deny = true;
    kernel.carry_out(tables.set(&port).unwrap());
    assert_eq!(flags(&kernel)[2], service_flag::RANGES | service_flag::RANGES_DENY);
    kernel.carry_out(tables.set(&ServicePort { ranges: Vec::new(), ..port }).unwrap());
    assert_eq!((flags(&kernel)[2], kernel.ranges.len()), (service_flag::INSIDE_ONLY, 0));
}

#[test]
fn an_address_with_other_uses_refuses_nothing() {
    let mut tables = Tables::new(small());
    let mut kernel = Kernel::default();
    let refuses = |kernel: &Kernel| kernel.services.values().any(|row| row.flags & service_flag::REFUSE != 0);
    let host = Frontend { addr: Addr::v4([192, 0, 2, 1]), port: 80, kind: FrontendKind::LoadBalancer, shared: true };
    let mut port = ServicePort { frontends: vec![host], ..service(1, [1]) };
    kernel.carry_out(tables.set(&port).unwrap());
    assert!(!refuses(&kernel));
    assert_eq!(kernel.node_ports, BTreeMap::from([(1, 1 << 16)]), "its packets are looked at");
    let other = ServicePort { frontends: vec![Frontend { port: 81, shared: false, ..host }], ..service(2, [2]) };
    kernel.carry_out(tables.set(&other).unwrap());
    assert!(!refuses(&kernel), "one of its rows says so");
    port.frontends[0].shared = false;
    kernel.carry_out(tables.set(&port).unwrap());
    assert!(refuses(&kernel), "the node lost the address");
    assert_eq!(kernel.node_ports, BTreeMap::from([(1, 0)]));
    port.frontends[0].shared = true;
    kernel.carry_out(tables.set(&port).unwrap());
    assert!(!refuses(&kernel), "and got it back");
    kernel.carry_out(tables.remove(&id(1)));
    assert!(refuses(&kernel));
    kernel.carry_out(tables.remove(&id(2)));
    assert_eq!((kernel.services.len(), tables.usage()), (0, Usage::default()));
}

#[test]
fn an_address_that_its_owner_brings_refuses_nothing() {
    let refuses = |kernel: &Kernel| kernel.services.values().any(|row| row.flags & service_flag::REFUSE != 0);
    let addr = Addr::v4([198, 51, 100, 1]);
    let at = |service, port, kind| ServicePort {
        frontends: vec![Frontend { addr, port, kind, shared: false }],
        ..self::service(service, [service as u32])
    };
    let brought = at(1, 5353, FrontendKind::ExternalIp);
    let mut tables = Tables::new(small());
    let mut kernel = Kernel::default();
    kernel.carry_out(tables.set(&brought).unwrap());
    assert!(!refuses(&kernel), "its other ports are somebody else's");
    assert_eq!((kernel.node_ports.len(), tables.usage().services), (0, 1));
    // Nor does it open the ports of one that was given to another.
    kernel.carry_out(tables.set(&at(2, 80, FrontendKind::LoadBalancer)).unwrap());
    assert!(refuses(&kernel));
    // A process before this one left a refusal that is nobody's any more.
    kernel.carry_out(tables.remove(&id(2)));
    assert!(!refuses(&kernel));
    let refused = Service { flags: service_flag::REFUSE, ..Service::default() };
    kernel.services.insert(ServiceKey { addr, ..ServiceKey::default() }, refused);
    let mut again = Tables::new(small());
    again.restore(kernel.restored());
    kernel.carry_out(again.set(&brought).unwrap());
    kernel.carry_out(again.sweep());
    assert!(!refuses(&kernel));
    kernel.carry_out(again.remove(&id(1)));
    assert_eq!((kernel.services.len(), again.usage()), (0, Usage::default()));
}
