use super::*;

fn plan(services: &str) -> Plan {
    let text = format!("devices: [eth0]\nservices:\n{services}");
    Plan::parse(Path::new("lb.yaml"), &text).unwrap()
}

fn ports(plan: &Plan) -> Vec<ServicePort> {
    let (pools, health, drained) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    plan.services.iter().map(|service| service_port(service, &pools, &health, &drained)).collect()
}

const TWO: &str = "  - {name: a, address: 203.0.113.1, port: 80, backends: [{address: 10.0.0.1}, {address: 10.0.0.2}]}
  - {name: b, address: 203.0.113.1, port: 81, backends: [{address: 10.0.0.1}]}
";

fn rows(books: &Books) -> Vec<String> {
    books.ports().map(|(_, port)| format!("{} at {}", port.id, port.frontends[0].port)).collect()
}

#[test]
fn what_stays_the_same_is_not_written_again() {
    let mut books = Books::new(Capacity::default());
    let wanted = ports(&plan(TWO));
    assert!(!settle(&mut books, &wanted).unwrap().is_empty());
    assert!(settle(&mut books, &wanted).unwrap().is_empty());
}

#[test]
fn services_may_swap_their_ports_and_those_that_are_gone_go() {
    let mut books = Books::new(Capacity::default());
    settle(&mut books, &ports(&plan(TWO))).unwrap();
    let swapped = TWO.replace("port: 80", "port: 8").replace("port: 81", "port: 80").replace("port: 8,", "port: 81,");
    settle(&mut books, &ports(&plan(&swapped))).unwrap();
    assert_eq!(rows(&books), ["lb/a:81/TCP (IPv4) at 81", "lb/b:80/TCP (IPv4) at 80"]);
    let first = TWO.lines().next().unwrap();
    let writes = settle(&mut books, &ports(&plan(first))).unwrap();
    assert_eq!(rows(&books), ["lb/a:80/TCP (IPv4) at 80"]);
    assert!(writes.iter().any(|write| matches!(write, Write::RemoveService(key) if key.port.number() == 81)));
}

#[test]
fn a_name_may_go_to_another_service() {
    let mut books = Books::new(Capacity::default());
    settle(&mut books, &ports(&plan(TWO))).unwrap();
    let renamed = TWO.replace("name: b", "name: c");
    settle(&mut books, &ports(&plan(&renamed))).unwrap();
    assert_eq!(rows(&books), ["lb/a:80/TCP (IPv4) at 80", "lb/c:81/TCP (IPv4) at 81"]);
}

#[test]
fn who_is_down_drained_or_weighs_nothing_gets_no_connections() {
    let plan = plan(
        "  - {name: a, address: 203.0.113.1, port: 80, health: {type: tcp}, backends: [
             {name: up, address: 10.0.0.1}, {name: down, address: 10.0.0.2},
             {name: drained, address: 10.0.0.3}, {name: light, address: 10.0.0.4, weight: 0}]}",
    );
    let target = |backend: &str| Target { service: "a".into(), backend: backend.into() };
    let health = BTreeMap::from([
        (target("up"), Health::new(None, Instant::now())),
        (target("down"), Health::new(Some(false), Instant::now())),
    ]);
    let drained = BTreeSet::from([target("drained"), target("down")]);
    let port = service_port(&plan.services[0], &BTreeMap::new(), &health, &drained);
    let states: Vec<u8> = port.backends.iter().map(|backend| backend.state).collect();
    assert_eq!(states, [BackendState::ACTIVE, BackendState::DOWN, BackendState::DRAINING, BackendState::DRAINING]);
    assert_eq!((port.inside, port.outside), (vec![0], vec![0]));
}

#[test]
fn a_backend_that_fails_is_taken_out_even_if_no_other_set_fits() {
    let mut books = Books::new(Capacity { slots: 2, ..Capacity::default() });
    let mut wanted = ports(&plan(TWO.lines().next().unwrap()));
    wanted[0].algorithm = cirri_abi::Algorithm::RANDOM;
    settle(&mut books, &wanted).unwrap();
    let mut failed = wanted[0].clone();
    failed.backends[1].state = BackendState::DOWN;
    failed.outside = vec![0];
    let (writes, outcome) = renew(&mut books, &[failed]);
    assert!(matches!(outcome, Err(ApplyError::Table(_))), "{outcome:?}");
    let down = |write: &&Write| matches!(write, Write::Backend(_, row) if row.state == BackendState::DOWN);
    assert_eq!((writes.iter().filter(down).count(), writes.len()), (1, 2), "{writes:?}");
}
