//! Tables, rule sets, events and collection on the kernel's maps. Needs root.

use std::{collections::BTreeMap, time::Duration};

use aya::{TestRun, programs::TestRunOptions};
use cirri_abi::{
    Addr, Affinity, AffinityKey, Backend, BackendCounter, BackendState, Cookie, CounterIndex, Endpoint, FlowKey4,
    Identity, Ipcache, IpcacheKey, PolicyEntry, PolicyKey, Port, RangeKey, Recipe, Rewrite, Service, ServiceKey,
    ServiceSlot, SnatPool, State, Tick, Tuple, policy_flag, proto,
};
use cirri_e2e::kernel::TestInstance;
use cirri_loader::{MapError, gc::Collector};

fn host(n: u32) -> Addr {
    Addr::v4(n.to_be_bytes())
}

fn rule(peer: u32, cookie: u32) -> (PolicyKey, PolicyEntry) {
    let key = PolicyKey { prefix_len: PolicyKey::STATIC_BITS, peer, ..PolicyKey::default() };
    let entry = PolicyEntry {
        cookie,
        flags: policy_flag::ALLOW,
        prefix_len: PolicyKey::STATIC_BITS as u8,
        ..PolicyEntry::default()
    };
    (key, entry)
}

#[test]
fn an_endpoint_can_be_written_read_listed_and_deleted() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let endpoints = &datapath.tables().endpoints;
    let endpoint = Endpoint { id: 3, ifindex: 12, v4: host(1), ..Endpoint::default() };
    endpoints.put(&host(1), &endpoint).expect("written");
    assert_eq!(endpoints.get(&host(1)).expect("read"), Some(endpoint));
    assert_eq!(endpoints.get(&host(2)).expect("read"), None);
    assert_eq!(endpoints.entries().expect("listed"), [(host(1), endpoint)]);
    assert!(endpoints.delete(&host(1)).expect("deleted"));
    assert!(!endpoints.delete(&host(1)).expect("deleted again"));
}

#[test]
fn twenty_thousand_prefixes_are_written_in_batches_and_the_longest_match_answers() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let ipcache = &datapath.tables().ipcache;
    let key = |addr, prefix_len| IpcacheKey { prefix_len, addr };
    let is = |id| Ipcache { identity: Identity { id }, ..Ipcache::default() };
    let hosts: Vec<_> = (0..20_000).map(|n| (key(host(0x0a00_0000 + n), 128), is(1000 + n))).collect();
    ipcache.put_all(&hosts).expect("written");
    ipcache.put(&key(host(0x0a00_0000), 104), &is(3)).expect("written");

    assert_eq!(ipcache.get(&key(host(0x0a00_0007), 128)).expect("read"), Some(is(1007)));
    assert_eq!(ipcache.get(&key(host(0x0aff_0000), 128)).expect("read"), Some(is(3)));
    assert_eq!(ipcache.get(&key(host(0x0b00_0000), 128)).expect("read"), None);
    let listed: BTreeMap<_, _> = ipcache
        .entries()
        .expect("listed")
        .into_iter()
        .map(|(key, value)| ((key.addr.word(), key.prefix_len), value))
        .collect();
    assert_eq!(listed.len(), 20_001);
    assert!(hosts.iter().all(|(key, value)| listed.get(&(key.addr.word(), key.prefix_len)) == Some(value)));
}

#[test]
fn a_walk_in_small_steps_sees_every_flow_once() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let flows = &datapath.tables().flows4;
    let flow = |n: u32| (FlowKey4 { src: n, ..FlowKey4::default() }, Recipe { out: n, ..Recipe::default() });
    flows.put_all(&(0..5000).map(flow).collect::<Vec<_>>()).expect("written");
    let mut seen = Vec::new();
    let mut at = None;
    loop {
        let chunk = flows.chunk(at.as_ref(), 7).expect("walked");
        seen.extend(chunk.entries.iter().map(|(key, recipe)| (key.src, recipe.out)));
        match chunk.next {
            Some(next) => at = Some(next),
            None => break,
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..5000).map(|n| (n, n)).collect::<Vec<_>>());
}

#[test]
fn a_full_table_says_which_and_how_to_raise_it() {
    let mut instance = TestInstance::new();
    instance.options.sizes.insert("ENDPOINTS".into(), 10);
    let datapath = instance.load();
    let endpoints: Vec<_> = (0..11).map(|n| (host(n), Endpoint::default())).collect();
    let error = datapath.tables().endpoints.put_all(&endpoints).expect_err("must not fit");
    assert!(matches!(&error, MapError::Full { map, max_entries: 10 } if map == "ENDPOINTS"), "{error}");
    assert!(error.to_string().contains("bpf.maps"), "{error}");
}

#[test]
fn a_rule_set_goes_live_whole_with_one_new_generation_and_survives_a_restart() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let tables = datapath.tables();
    assert_eq!(tables.read_ruleset(5).expect("read"), None);

    let old: Vec<_> = (0..3000).map(|n| rule(256 + n, Cookie::FIRST_RULE + n)).collect();
    assert_eq!(tables.install_ruleset(5, &old).expect("installed"), 8);
    let new = [rule(0, Cookie::DEFAULT_ALLOW)];
    assert_eq!(tables.install_ruleset(6, &new).expect("installed"), 8, "another slot has an epoch of its own");
    let mut live = tables.read_ruleset(5).expect("read").expect("there is one");
    live.sort_by_key(|(key, _)| key.peer);
    assert_eq!(live, old);

    let before = tables.ruleset_ids().expect("listed");
    assert_eq!(tables.install_ruleset(5, &new).expect("installed"), 16);
    let now = tables.ruleset_ids().expect("listed");
    assert!(now[&5] != before[&5] && now[&6] == before[&6], "{before:?}, {now:?}");
    drop(datapath);
    let datapath = instance.load();
    let tables = datapath.tables();
    assert_eq!(tables.read_ruleset(5).expect("read").expect("there is one"), new);
    assert_eq!(tables.ruleset_ids().expect("listed").into_keys().collect::<Vec<_>>(), [5, 6]);
    assert!(tables.remove_ruleset(5).expect("removed"));
    assert_eq!(tables.read_ruleset(5).expect("read"), None);
    assert_eq!(tables.epoch(5).expect("read"), 24, "removing it reaches established flows too");
}

#[test]
fn a_rule_set_whose_entries_collapse_is_refused_and_the_old_one_stays() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let tables = datapath.tables();
    let good = [rule(256, 16)];
    tables.install_ruleset(5, &good).expect("installed");
    let error = tables.install_ruleset(5, &[rule(256, 16), rule(256, 17)]).expect_err("must be refused");
    assert!(matches!(error, MapError::Incomplete { slot: 5, written: 1, wanted: 2 }), "{error}");
    assert_eq!(tables.read_ruleset(5).expect("read").expect("there is one"), good);
    assert_eq!(tables.epoch(5).expect("read"), 8);
}

#[test]
fn of_rule_sets_that_go_live_together_those_that_are_refused_hold_up_no_other() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let tables = datapath.tables();
    let old = [rule(256, 16)];
    tables.install_ruleset(6, &old).expect("installed");
    let (new, collapsing) = ([rule(0, Cookie::DEFAULT_ALLOW)], [rule(256, 16), rule(256, 17)]);
    let outcomes = tables.install_rulesets(&[(5, &new), (6, &collapsing), (0, &new), (7, &[]), (8, &new)]);
    let said: Vec<_> = outcomes.into_iter().map(|outcome| outcome.map_err(|error| error.to_string())).collect();
    assert_eq!([&said[0], &said[3], &said[4]], [&Ok(8); 3]);
    assert!(said[1].is_err() && said[2].is_err(), "{said:?}");
    let live = |slot| tables.read_ruleset(slot).expect("read");
    assert_eq!([5, 6, 7, 8].map(live).map(Option::unwrap), [&new[..], &old, &[], &new].map(<[_]>::to_vec));
    assert_eq!(tables.epoch(6).expect("read"), 8, "what stays in force is not decided again");
    assert_eq!(tables.install_rulesets(&[]).len(), 0);
}

#[test]
fn an_epoch_moves_by_one_in_the_middle_of_a_change_and_to_the_next_step_at_its_end() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let tables = datapath.tables();
    let install = || tables.install_ruleset(5, &[rule(0, Cookie::DEFAULT_ALLOW)]).expect("installed");
    assert_eq!(install(), 8);
    tables.set_writing(Some(cirri_loader::gc::now())).expect("written");
    assert_eq!([install(), install()], [9; 2]);
    assert_eq!(tables.bump(5).expect("moved"), 16);
    tables.set_writing(None).expect("written");
    assert_eq!(install(), 24);

    // Nobody ended this one. The next is not taken for it.
    tables.set_writing(Some(cirri_loader::gc::now())).expect("written");
    assert_eq!(install(), 25);
    drop(datapath);
    let datapath = instance.load();
    let tables = datapath.tables();
    tables.set_writing(Some(cirri_loader::gc::now())).expect("written");
    assert_eq!(tables.install_ruleset(5, &[]).expect("installed"), 33);
}

#[test]
fn slots_that_are_no_rule_sets_and_rule_sets_too_large_are_refused() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let tables = datapath.tables();
    assert!(matches!(tables.install_ruleset(0, &[]), Err(MapError::Slot { slot: 0 })));
    assert!(matches!(tables.install_ruleset(4096, &[]), Err(MapError::Slot { slot: 4096 })));
    let many: Vec<_> = (0..65_537).map(|n| rule(n, n)).collect();
    assert!(matches!(tables.install_ruleset(5, &many), Err(MapError::Full { .. })));
    assert_eq!(tables.read_ruleset(5).expect("read"), None);
}

#[test]
fn tables_of_services_are_written_in_batches_and_read_back() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let tables = datapath.tables();
    let slots: Vec<_> = (0..100_000).map(|n| (n + 7, ServiceSlot { backend: n % 30_000 + 1 })).collect();
    tables.slots.put_all(&slots).expect("written");
    let listed = tables.slots.entries().expect("listed");
    assert_eq!(listed.len(), tables.slots.capacity() as usize, "an array has all its entries");
    let written = listed.get(7..100_007).expect("they are there");
    assert_eq!(written, slots);
    assert!(listed.iter().skip(100_007).all(|(_, slot)| slot.backend == 0));
    assert!(tables.slots.put_all(&[(tables.slots.capacity(), ServiceSlot { backend: 1 })]).is_err());

    let backend = |n: u32| Backend {
        addr: host(0x0a00_0000 + n),
        port: Port::new(80),
        proto: proto::TCP,
        state: BackendState::ACTIVE,
        service: n / 3,
        ..Backend::default()
    };
    tables.backends.put_all(&(1..30_001).map(|n| (n, backend(n))).collect::<Vec<_>>()).expect("written");
    assert_eq!(tables.backends.get(&30_000).expect("read"), Some(backend(30_000)));
    assert_eq!(tables.backends.get(&30_001).expect("read"), Some(Backend::default()));

    let key = |n: u32| ServiceKey {
        addr: host(0x0a60_0000 + n),
        port: Port::new(80),
        proto: proto::TCP,
        ..ServiceKey::default()
    };
    let service = |n: u32| Service { id: n + 1, inside_first: n, inside_count: 3, ..Service::default() };
    let services: Vec<_> = (0..10_000).map(|n| (key(n), service(n))).collect();
    tables.services.put_all(&services).expect("written");
    assert_eq!(tables.services.get(&key(9_999)).expect("read"), Some(service(9_999)));
    assert_eq!(tables.services.entries().expect("listed").len(), 10_000);
    assert_eq!(tables.services.delete_all(services.iter().map(|(key, _)| key)).expect("deleted"), 10_000);
}

#[test]
fn every_other_table_of_services_holds_what_is_put_there() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let tables = datapath.tables();
    let client = AffinityKey { client: host(9), service: 4, cookie: 0 };
    let kept = Affinity { backend: 11, last_used: Tick { count: 5 } };
    tables.affinity.put(&client, &kept).expect("written");
    assert_eq!(tables.affinity.get(&client).expect("read"), Some(kept));

    let range = |service, bits: u32| RangeKey { prefix_len: 32 + 96 + bits, service, addr: host(0xc633_6400) };
    tables.source_ranges.put_all(&[(range(4, 24), 1), (range(5, 32), 1)]).expect("written");
    let client = |service, last: u32| RangeKey { addr: host(0xc633_6400 + last), ..range(service, 32) };
    let in_range = |service, last| tables.source_ranges.get(&client(service, last)).expect("read").is_some();
    assert!(in_range(4, 77) && in_range(5, 0), "what a service names matches");
    assert!(!in_range(5, 77) && !in_range(6, 0), "and nothing else does");

    let pool = SnatPool { v4: host(1), first: Port::new(32_768), mask: 0x7fff, ..SnatPool::default() };
    tables.snat_pools.put(&3, &pool).expect("written");
    assert_eq!(tables.snat_pools.get(&3).expect("read"), Some(pool));
    tables.node_ports.put(&(30_080 / 64), &(1 << (30_080 % 64))).expect("written");
    assert_eq!(tables.node_ports.get(&470).expect("read"), Some(1));
    tables.per_packet.put(&u64::MAX, &1).expect("written");
    assert_eq!(tables.per_packet.entries().expect("listed"), [(u64::MAX, 1)]);
}

#[test]
fn counters_of_a_backend_are_summed_over_the_cpus_and_cleared_one_by_one() {
    let mut instance = TestInstance::new();
    instance.options.sizes.insert("BACKENDS".into(), 100);
    let datapath = instance.load();
    let tables = datapath.tables();
    let pinned = aya::maps::MapData::from_pin(instance.maps().join("BACKEND_COUNTERS")).expect("pinned");
    let mut counters = aya::maps::PerCpuArray::<_, [u64; 4]>::try_from(aya::maps::Map::PerCpuArray(pinned))
        .expect("counters of each CPU");
    let cpus = aya::util::nr_cpus().expect("asked") as u64;
    for number in [2, 3] {
        let each = (0..cpus).map(|cpu| [1, 10 + cpu, 100, number.into()]).collect::<Vec<_>>();
        counters.set(number, each.try_into().expect("one for each"), 0).expect("written");
    }
    let sum = |number: u64| BackendCounter {
        connections: cpus,
        packets: 10 * cpus + cpus * (cpus - 1) / 2,
        bytes: 100 * cpus,
        answers: number * cpus,
    };
    assert_eq!(
        tables.backend_counters([1, 2, 3, 100]).expect("read"),
        [(1, BackendCounter::default()), (2, sum(2)), (3, sum(3))],
        "a number past the end has no counter"
    );
    tables.clear_backend_counter(2).expect("cleared");
    assert_eq!(tables.backend_counters([2, 3]).expect("read"), [(2, BackendCounter::default()), (3, sum(3))]);
    drop(datapath);
    assert!(instance.load().resumed(), "counters have as many places as backends");
}

#[test]
fn every_map_tells_its_memory_and_all_that_hold_entries_can_be_dumped() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let tables = datapath.tables();
    tables.install_ruleset(5, &[rule(0, 1)]).expect("installed");
    let status = tables.status().expect("listed");
    assert_eq!(status.len(), cirri_abi::map::ALL.len());
    assert!(status.iter().all(|map| map.id > 0), "{status:?}");
    // Some kinds take memory with their entries only.
    let memory = |name: &str| status.iter().find(|map| map.name == name).expect("it is listed").memory;
    assert!(memory("FLOWS4") >= 16_384 * 112 && memory("EVENTS") >= 4 * 1024 * 1024, "{status:?}");
    for map in status.iter().filter(|map| !["EVENTS", "SOCKETS"].contains(&map.name)) {
        let dump = tables.dump(map.name, 3).expect(map.name);
        assert!(dump.len() <= 3 && dump.iter().all(|(key, _)| key.len() == map.key_size as usize), "{}", map.name);
    }
    assert_eq!(tables.dump("RULESETS", 10).expect("dumped").len(), 1);
    assert_eq!(tables.dump("EPOCHS", 3).expect("dumped").len(), 3);
    for (name, holds) in [("EVENTS", "events"), ("SOCKETS", "inside sockets")] {
        let error = tables.dump(name, 1).expect_err("must be refused");
        assert!(matches!(error, MapError::NoEntries { .. }) && error.to_string().contains(holds), "{error}");
    }
    assert!(tables.dump("NOPE", 1).expect_err("must be refused").to_string().contains("FLOWS4"));
}

/// An Ethernet frame with an IPv4 UDP packet from a sender that nobody knows.
fn frame() -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0x66, 0xcb, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0x30, 0x39, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]);
    frame
}

#[tokio::test]
async fn events_arrive_in_order_and_those_that_found_the_ring_full_are_counted() {
    let mut instance = TestInstance::new();
    instance.options.sizes.insert("EVENTS".into(), 4096);
    let mut datapath = instance.load();
    let mut events = datapath.events().expect("opened").expect("the first reader");
    assert!(datapath.events().expect("asked").is_none(), "there is one reader");
    let run = |datapath: &mut cirri_loader::Datapath, repeat| {
        let frame = frame();
        let options = TestRunOptions { data_in: Some(&frame), repeat, ..TestRunOptions::default() };
        datapath.program_mut("from_workload").expect("it is there").test_run(options).expect("it runs");
    };
    run(&mut datapath, 1);
    let batch = tokio::time::timeout(Duration::from_secs(5), events.next()).await.expect("in time").expect("read");
    assert_eq!((batch.events.len(), batch.lost, batch.malformed), (1, 0, 0));

    run(&mut datapath, 500);
    let batch = tokio::time::timeout(Duration::from_secs(5), events.next()).await.expect("in time").expect("read");
    assert!(batch.events.windows(2).all(|pair| pair[0].time_ns <= pair[1].time_ns));
    assert_eq!(batch.events.len() as u64 + batch.lost, 500, "each is read or counted as lost");
    assert!(batch.lost > 400, "{}", batch.lost);

    run(&mut datapath, 1);
    let batch = tokio::time::timeout(Duration::from_secs(5), events.next()).await.expect("in time").expect("read");
    assert_eq!((batch.events.len(), batch.lost), (1, 0), "a full ring recovers");
    let lost = datapath.tables().counters().expect("read")[CounterIndex::LOST_EVENTS as usize];
    assert_eq!(lost, datapath.tables().counter(CounterIndex::LOST_EVENTS).expect("read"));
}

#[tokio::test]
async fn a_reader_that_waits_is_woken_by_the_first_event() {
    let instance = TestInstance::new();
    let mut datapath = instance.load();
    let mut events = datapath.events().expect("opened").expect("the first reader");
    let waiting = tokio::spawn(async move { events.next().await.expect("read").events.len() });
    tokio::task::yield_now().await;
    let frame = frame();
    let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::default() };
    datapath.program_mut("from_workload").expect("it is there").test_run(options).expect("it runs");
    let read = tokio::time::timeout(Duration::from_secs(5), waiting).await.expect("in time").expect("no panic");
    assert_eq!(read, 1);
}

#[tokio::test]
async fn a_reader_sleeps_while_nothing_comes() {
    let instance = TestInstance::new();
    let mut datapath = instance.load();
    let mut events = datapath.events().expect("opened").expect("the first reader");
    let mut next = std::pin::pin!(events.next());
    let mut looks = 0;
    let counted = std::future::poll_fn(|context| {
        looks += 1;
        next.as_mut().poll(context)
    });
    let quiet = tokio::time::timeout(Duration::from_secs(1), counted).await;
    assert!(quiet.is_err(), "nothing came");
    // Once to begin, and once for the end of the second; and the kernel may wake it in vain.
    assert!(looks < 5, "{looks} looks into an empty ring within a second");
}

#[tokio::test]
async fn no_event_falls_between_the_last_look_and_sleep() {
    let instance = TestInstance::new();
    let mut datapath = instance.load();
    let mut events = datapath.events().expect("opened").expect("the first reader");
    let (seen, news) = std::sync::mpsc::channel::<()>();
    const ROUNDS: usize = 300;
    // Each event comes when the reader has just been given the one before, a little later every time.
    let sender = std::thread::spawn(move || {
        let frame = frame();
        for round in 0..ROUNDS {
            let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::default() };
            datapath.program_mut("from_workload").expect("it is there").test_run(options).expect("it runs");
            if news.recv().is_err() {
                return;
            }
            (0..round * 300).for_each(|_| std::hint::spin_loop());
        }
    });
    for round in 0..ROUNDS {
        let batch = tokio::time::timeout(Duration::from_secs(60), events.next()).await;
        let batch = batch.unwrap_or_else(|_| panic!("event {round} woke nobody")).expect("read");
        assert_eq!(batch.events.len(), 1);
        seen.send(()).expect("it waits");
    }
    sender.join().expect("sent");
}

#[test]
fn collection_removes_ended_connections_in_pairs_and_leaves_the_living() {
    let instance = TestInstance::new();
    let datapath = instance.load();
    let tables = datapath.tables();
    let tuple = |n: u32, protocol| Tuple {
        src: host(0x0a00_0000 + n),
        dst: host(0x0a01_0000),
        sport: Port::new(40_000),
        dport: Port::new(80),
        proto: protocol,
        ..Tuple::default()
    };
    let now = Tick { count: 100_000 };
    let seen = |ago: u32, state| Recipe { last_seen: Tick { count: now.count - ago }, state, ..Recipe::default() };
    let pair = |n: u32, protocol, there: Recipe, back: Recipe| {
        let tuple = tuple(n, protocol);
        let opposite = tuple.rewritten(&there).turned();
        tables.flows4.put(&tuple.key4(), &there).expect("written");
        tables.flows4.put(&opposite.key4(), &back).expect("written");
        (tuple.key4(), opposite.key4())
    };
    let dead = pair(1, proto::UDP, seen(70, State::ESTABLISHED), seen(70, State::ESTABLISHED));
    let half = pair(2, proto::UDP, seen(70, State::ESTABLISHED), seen(3, State::ESTABLISHED));
    let alive = pair(3, proto::TCP, seen(5000, State::ESTABLISHED), seen(5000, State::ESTABLISHED));
    let node = host(0xc0a8_0001);
    let masquerade = pair(
        4,
        proto::TCP,
        Recipe { rewrite: Rewrite::SOURCE, source: node, source_port: Port::new(50_000), ..seen(20, State::CLOSING) },
        Recipe {
            rewrite: Rewrite::DESTINATION,
            destination: host(0x0a00_0004),
            destination_port: Port::new(40_000),
            ..seen(20, State::CLOSING)
        },
    );
    // Half of a pair was evicted; and one of which the other half may not be written yet.
    let orphan = tuple(6, proto::TCP).key4();
    tables.flows4.put(&orphan, &seen(1, State::ESTABLISHED)).expect("written");
    let young = tuple(7, proto::TCP).key4();
    tables.flows4.put(&young, &Recipe { since: now, ..seen(0, State::ESTABLISHED) }).expect("written");
    let lonely = tuple(5, proto::TCP);
    tables.pending6.put(&lonely, &seen(70, State::NEW)).expect("written");

    let mut collector = Collector::new(tables.clone());
    let mut removed = 0;
    let mut kept = 0;
    let steps = (1..=1000).find(|_| {
        let swept = collector.sweep(now, 2).expect("swept");
        removed += swept.removed;
        kept += swept.kept_for_opposite;
        swept.complete
    });
    assert!(steps.is_some_and(|steps| steps > 1), "it goes on where it stopped");
    assert_eq!((removed, kept), (6, 1));
    let left = |key: &FlowKey4| tables.flows4.get(key).expect("read").is_some();
    assert_eq!([left(&dead.0), left(&dead.1)], [false; 2]);
    assert_eq!([left(&orphan), left(&young)], [false, true]);
    assert_eq!([left(&masquerade.0), left(&masquerade.1)], [false; 2]);
    assert_eq!([left(&half.0), left(&half.1), left(&alive.0), left(&alive.1)], [true; 4]);
    assert_eq!(tables.pending6.entries().expect("listed"), []);
}
