//! The etcd store against a real etcd.

mod support;

use std::time::Duration;

use cirri_store::{Etcd, EtcdOptions, Event, STORE_ID, Store, StoreError};
use support::{Cable, Server, connect, next, next_change};

#[tokio::test]
async fn what_is_put_is_listed_and_what_is_deleted_is_gone() {
    let server = Server::start().await;
    let store = server.client();
    let first = store.put("t/a", b"1", false).await.expect("put");
    let second = store.put("t/b", b"2", false).await.expect("put");
    store.put("u/c", b"3", false).await.expect("put");
    assert!(second > first);

    let (entries, revision) = store.list("t/").await.expect("list");
    let found: Vec<_> =
        entries.iter().map(|entry| (entry.key.as_str(), entry.value.as_slice(), entry.revision)).collect();
    assert_eq!(found, [("t/a", &b"1"[..], first), ("t/b", b"2", second)]);
    assert!(revision > second);
    assert_eq!(store.get("t/a").await.expect("get").expect("there").value, b"1");
    assert_eq!(store.get("t/").await.expect("get"), None);

    store.delete("t/a").await.expect("delete");
    assert_eq!(store.get("t/a").await.expect("get"), None);
    let gone = store.delete_prefix("t/").await.expect("delete");
    let (entries, revision) = store.list("").await.expect("list");
    assert_eq!(entries.len(), 1);
    assert_eq!(revision, gone);

    let health = store.health().await.expect("health");
    assert_eq!(health.backend, server.endpoint());
    assert_eq!((health.revision, health.warning), (gone, None));
}

#[tokio::test]
async fn a_watch_tells_all_in_order_and_when_a_revision_is_complete() {
    let server = Server::start().await;
    let store = server.client();
    let before = store.put("t/old", b"0", false).await.expect("put");
    let mut watch = store.watch("t/");
    let Event::Snapshot(entries, revision) = next(&mut watch).await else {
        panic!("a watch starts with a snapshot");
    };
    assert_eq!((entries.len(), revision), (1, before));

    assert!(store.create_all(&[("t/a", b"1"), ("t/b", b"2")]).await.expect("create"));
    let gone = store.delete("t/old").await.expect("delete");
    let mut seen = Vec::new();
    let mut complete = revision;
    while complete < gone {
        match next(&mut watch).await {
            Event::Put(entry) => {
                assert!(entry.revision > complete, "a change after its revision was complete");
                seen.push((entry.key, entry.revision));
            }
            Event::Delete { key, revision } => {
                assert!(revision > complete, "a change after its revision was complete");
                seen.push((key, revision));
            }
            Event::Progress(revision) => complete = complete.max(revision),
            Event::Snapshot(..) => panic!("nothing was lost"),
        }
    }
    let expected = [("t/a", gone - 1), ("t/b", gone - 1), ("t/old", gone)];
    assert_eq!(seen, expected.map(|(key, revision)| (key.to_owned(), revision)));
}

#[tokio::test]
async fn an_idle_watch_proves_that_it_has_seen_what_is_not_its_own() {
    let server = Server::start().await;
    let store = server.client();
    let mut watch = store.watch("t/");
    let Event::Snapshot(_, start) = next(&mut watch).await else {
        panic!("a watch starts with a snapshot");
    };
    let elsewhere = store.put("u/x", b"", false).await.expect("put");
    assert!(elsewhere > start);
    loop {
        match next(&mut watch).await {
            Event::Progress(revision) if revision >= elsewhere => break,
            Event::Progress(_) => {}
            other => panic!("nothing happened below t/: {other:?}"),
        }
    }
}

#[tokio::test]
async fn of_two_who_create_one_key_one_wins() {
    let server = Server::start().await;
    let (one, two) = (server.client(), server.client());
    for round in 0..20 {
        let key = format!("t/{round}");
        let other = format!("t/{round}/labels");
        let ones: [(&str, &[u8]); 2] = [(&key, b"one"), (&other, b"one")];
        let twos: [(&str, &[u8]); 2] = [(&key, b"two"), (&other, b"two")];
        let (first, second) = tokio::join!(one.create_all(&ones), two.create_all(&twos));
        let (first, second) = (first.expect("create"), second.expect("create"));
        assert!(first != second, "round {round}: {first} and {second}");
        let winner = if first { b"one" } else { b"two" };
        let (entries, _) = one.list(&key).await.expect("list");
        assert_eq!(entries.len(), 2);
        assert!(entries.iter().all(|entry| entry.value == winner));
    }
    assert!(!one.create("t/0", b"late", false).await.expect("create"));
    assert!(!one.create("t/0", b"late", true).await.expect("create"));
    let partly = one.create_all(&[("t/new", b"x"), ("t/0", b"x")]).await;
    assert!(!partly.expect("create"));
    assert_eq!(one.get("t/new").await.expect("get"), None);
}

#[tokio::test]
async fn leased_keys_leave_with_their_process() {
    let server = Server::start().await;
    let watcher = server.client();
    let mut watch = watcher.watch("t/");
    next(&mut watch).await;

    let node = server.client();
    node.put("t/stays", b"", false).await.expect("put");
    node.put("t/leaves", b"", true).await.expect("put");
    assert!(node.create("t/leaves-too", b"", true).await.expect("create"));
    for _ in 0..3 {
        assert!(matches!(next_change(&mut watch).await, Event::Put(_)));
    }
    drop(node);
    let mut left = Vec::new();
    while left.len() < 2 {
        match next_change(&mut watch).await {
            Event::Delete { key, .. } => left.push(key),
            other => panic!("only deletions are due: {other:?}"),
        }
    }
    left.sort();
    assert_eq!(left, ["t/leaves", "t/leaves-too"]);
    assert!(watcher.get("t/stays").await.expect("get").is_some());
}

#[tokio::test]
async fn a_lease_in_use_outlives_its_time() {
    let server = Server::start().await;
    let store = server.client();
    let put = store.put("t/node", b"", true).await.expect("put");
    let lease = server.leases();
    // Two lives of the lease, told by etcd's own progress reports.
    let mut watch = store.watch("t/");
    let end = tokio::time::Instant::now() + Duration::from_secs(5);
    while tokio::time::Instant::now() < end {
        assert!(!matches!(next(&mut watch).await, Event::Put(_) | Event::Delete { .. }));
    }
    assert_eq!(store.get("t/node").await.expect("get").expect("there").revision, put);
    assert_eq!(server.leases(), lease);
}

#[tokio::test]
async fn after_a_lease_was_revoked_its_keys_come_back_under_a_new_one() {
    let server = Server::start().await;
    let store = server.client();
    store.put("t/a", b"1", true).await.expect("put");
    store.put("t/b", b"2", true).await.expect("put");
    store.put("t/c", b"3", true).await.expect("put");
    store.delete("t/c").await.expect("delete");
    let mut watch = store.watch("t/");
    next(&mut watch).await;

    let revoked = server.leases();
    server.etcdctl(&["lease", "revoke", &revoked[0]]);
    let mut back = Vec::new();
    while back.len() < 2 {
        match next_change(&mut watch).await {
            Event::Put(entry) => back.push((entry.key, entry.value)),
            Event::Delete { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    back.sort();
    let expected = [("t/a", b"1"), ("t/b", b"2")];
    assert_eq!(back, expected.map(|(key, value)| (key.to_owned(), value.to_vec())));
    let leases = server.leases();
    assert_eq!(leases.len(), 1);
    assert_ne!(leases, revoked);
}

#[tokio::test]
async fn a_write_that_meets_a_revoked_lease_succeeds_under_a_new_one() {
    let server = Server::start().await;
    let store = server.client();
    store.put("t/a", b"1", true).await.expect("put");
    server.etcdctl(&["lease", "revoke", &server.leases()[0]]);
    // At once, before a keep-alive can have noticed.
    store.put("t/b", b"2", true).await.expect("put");
    let (entries, _) = store.list("t/").await.expect("list");
    assert_eq!(entries.len(), 2, "{entries:?}");
    assert_eq!(store.health().await.expect("health").warning, None);
}

#[tokio::test]
async fn after_a_partition_longer_than_the_lease_its_keys_come_back() {
    let server = Server::start().await;
    let cable = Cable::to(server.port()).await;
    let node = connect([cable.endpoint().as_str()]);
    node.put("t/node", b"1", true).await.expect("put");
    let observer = server.client();
    let mut watch = observer.watch("t/");
    next(&mut watch).await;

    cable.cut();
    assert!(matches!(next_change(&mut watch).await, Event::Delete { key, .. } if key == "t/node"));
    cable.mend();
    assert!(matches!(next_change(&mut watch).await, Event::Put(entry) if entry.value == b"1"));
}

#[tokio::test]
async fn a_watch_survives_the_death_of_etcd_without_loss_or_disorder() {
    let mut server = Server::start().await;
    let store = server.client();
    let mut watch = store.watch("t/");
    next(&mut watch).await;
    // Read all along, so that each death interrupts a live stream.
    let reader = tokio::spawn(async move {
        let mut seen = Vec::new();
        while seen.len() < 150 {
            match next_change(&mut watch).await {
                Event::Put(entry) => seen.push((String::from_utf8(entry.value).expect("UTF-8"), entry.revision)),
                other => panic!("{other:?}"),
            }
        }
        seen
    });
    let mut written = Vec::new();
    for round in 0..3 {
        for number in 0..50 {
            let value = format!("{round}/{number}");
            let revision = store.put("t/x", value.as_bytes(), false).await.expect("put");
            written.push((value, revision));
        }
        server.kill();
        server.restart().await;
    }
    assert_eq!(reader.await.expect("the reader"), written);
}

#[tokio::test]
async fn a_member_without_a_leader_is_not_trusted() {
    let mut members = Server::cluster(3).await;
    let endpoints: Vec<String> = members.iter().map(|member| member.endpoint().to_owned()).collect();
    let options = EtcdOptions { request_timeout: Duration::from_secs(20), ..EtcdOptions::new(endpoints.clone()) };
    let store = Etcd::new(&options).expect("options");
    let mut watch = store.watch("t/");
    next(&mut watch).await;

    // One less is still a cluster, if need be with a new leader.
    members[0].kill();
    store.put("t/x", b"1", false).await.expect("two of three");
    assert!(matches!(next_change(&mut watch).await, Event::Put(entry) if entry.value == b"1"));

    members[1].kill();
    let impatient = EtcdOptions { request_timeout: Duration::from_secs(3), ..EtcdOptions::new(endpoints) };
    let failed = Etcd::new(&impatient).expect("options").list("t/").await;
    assert!(matches!(failed, Err(StoreError::Unreachable { ref endpoints, .. }) if endpoints.len() == 3), "{failed:?}");

    for member in &mut members[..2] {
        member.spawn();
    }
    store.put("t/x", b"2", false).await.expect("three of three");
    assert!(matches!(next_change(&mut watch).await, Event::Put(entry) if entry.value == b"2"));
}

#[tokio::test]
async fn a_write_waits_for_etcd_to_come_back() {
    let mut server = Server::start().await;
    let store = server.client();
    store.put("t/x", b"1", true).await.expect("put");
    server.kill();
    let (put, ()) = tokio::join!(store.put("t/x", b"2", true), server.restart());
    put.expect("etcd is back in time");
    assert_eq!(store.get("t/x").await.expect("get").expect("there").value, b"2");
}

#[tokio::test]
async fn what_was_compacted_meanwhile_comes_as_a_snapshot() {
    let server = Server::start().await;
    let cable = Cable::to(server.port()).await;
    let far = connect([cable.endpoint().as_str()]);
    let near = server.client();
    near.put("t/goes", b"", false).await.expect("put");
    let mut watch = far.watch("t/");
    assert!(matches!(next(&mut watch).await, Event::Snapshot(entries, _) if entries.len() == 1));

    cable.cut();
    near.delete("t/goes").await.expect("delete");
    let last = near.put("t/new", b"1", false).await.expect("put");
    server.etcdctl(&["compact", &last.to_string()]);
    cable.mend();
    let Event::Snapshot(entries, revision) = next_change(&mut watch).await else {
        panic!("history is gone: only a snapshot will do");
    };
    assert_eq!(revision, last);
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].key, "t/new");

    let more = near.put("t/more", b"", false).await.expect("put");
    assert!(matches!(next_change(&mut watch).await, Event::Put(entry) if entry.revision == more));
}

#[tokio::test]
async fn a_store_with_other_data_comes_as_a_snapshot() {
    let server = Server::start().await;
    let cable = Cable::to(server.port()).await;
    let other = Server::start().await;
    let far = connect([cable.endpoint().as_str(), other.endpoint()]);
    let near = server.client();
    for _ in 0..5 {
        near.put("t/old", b"", false).await.expect("put");
    }
    let mut watch = far.watch("t/");
    assert!(matches!(next(&mut watch).await, Event::Snapshot(entries, _) if entries.len() == 1));
    // The second endpoint is another cluster, and behind: as after a restore from a backup.
    cable.cut();
    assert!(matches!(next_change(&mut watch).await, Event::Snapshot(entries, _) if entries.is_empty()));
}

#[tokio::test]
async fn data_that_were_lost_and_written_anew_come_as_a_snapshot_however_many_there_are_by_then() {
    let mut server = Server::start().await;
    let cable = Cable::to(server.port()).await;
    let far = connect([cable.endpoint().as_str()]);
    let near = server.client();
    near.put(STORE_ID, b"one", false).await.expect("put");
    let seen = near.put("t/old", b"", false).await.expect("put");
    let mut watch = far.watch("t/");
    assert!(matches!(next(&mut watch).await, Event::Snapshot(entries, _) if entries.len() == 1));

    cable.cut();
    server.kill();
    server.lose_data();
    server.restart().await;
    // etcd gives the cluster the number that it had.
    near.put(STORE_ID, b"two", false).await.expect("put");
    while near.put("t/new", b"", false).await.expect("put") <= seen + 1 {}
    cable.mend();
    let Event::Snapshot(entries, _) = next_change(&mut watch).await else {
        panic!("what went with the data is missed");
    };
    assert_eq!(entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["t/new"]);
    assert_eq!(near.health().await.expect("health").id.as_deref(), Some(&b"two"[..]));
}

#[tokio::test]
async fn one_dead_endpoint_of_two_is_no_trouble() {
    let server = Server::start().await;
    let cable = Cable::to(server.port()).await;
    cable.cut();
    let store = connect([cable.endpoint().as_str(), server.endpoint()]);
    store.put("t/x", b"1", true).await.expect("put");
    let mut watch = store.watch("t/");
    assert!(matches!(next(&mut watch).await, Event::Snapshot(entries, _) if entries.len() == 1));
    assert_eq!(store.health().await.expect("health").backend, server.endpoint());
}

#[tokio::test]
async fn without_etcd_the_error_says_what_was_tried() {
    let mut server = Server::start().await;
    server.kill();
    let options = EtcdOptions { request_timeout: Duration::from_millis(500), ..EtcdOptions::new([server.endpoint()]) };
    let store = Etcd::new(&options).expect("options");
    for failed in [
        store.put("t/x", b"", false).await.map(drop),
        store.put("t/x", b"", true).await.map(drop),
        store.health().await.map(drop),
    ] {
        let Err(StoreError::Unreachable { endpoints, waited, last }) = failed else {
            panic!("{failed:?}");
        };
        assert_eq!(endpoints, [server.endpoint()]);
        assert!(waited < Duration::from_secs(5), "{waited:?}");
        assert!(!last.is_empty());
    }
}

#[tokio::test]
async fn endpoints_that_cannot_be_used_are_refused_at_once() {
    let refused = |endpoint: &str| Etcd::new(&EtcdOptions::new([endpoint])).err();
    for endpoint in ["https://a:1", "ftp://a:1", "http://a", "http://a b:1"] {
        let error = refused(endpoint);
        assert!(matches!(error, Some(StoreError::BadEndpoint { .. })), "{endpoint}: {error:?}");
    }
    assert!(refused("127.0.0.1:2379").is_none());
    let none = Etcd::new(&EtcdOptions::new(Vec::<String>::new())).err();
    assert!(matches!(none, Some(StoreError::NoEndpoints)));
}
