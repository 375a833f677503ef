//! Writes to an embedded store until it is killed, or until its disk is full. The tests in
//! `tests/embedded.rs` start it as a process of its own.

use std::path::Path;

use cirri_store::{Embedded, Event, EventStream, Store, StoreError};
use futures::StreamExt;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["until-killed", path] => until_killed(Path::new(path)).await,
        ["small-disk", dir] => on_a_small_disk(Path::new(dir)).await,
        _ => panic!("usage: store_writer until-killed FILE | small-disk DIR"),
    }
}

async fn open(path: &Path) -> Embedded {
    Embedded::open(path).await.expect("open")
}

async fn next(watch: &mut EventStream) -> Event {
    watch.next().await.expect("a watch never ends")
}

async fn until_killed(path: &Path) {
    let store = open(path).await;
    let (_, mut revision) = store.list("").await.expect("list");
    loop {
        let key = format!("{revision:08}");
        let (left, right) = (format!("left/{key}"), format!("right/{key}"));
        let big = vec![1; 10_000];
        assert!(store.create_all(&[(&left, &big), (&right, &big)]).await.expect("create"));
        revision += 1;
        println!("{revision}");
    }
}

async fn on_a_small_disk(dir: &Path) {
    let path = dir.join("store.redb");
    let ballast = dir.join("ballast");
    let store = open(&path).await;
    std::fs::write(&ballast, vec![0; 2 << 20]).expect("room for ballast");

    let big = vec![1; 200_000];
    let mut written = 0;
    let error = loop {
        match store.put(&format!("t/{written}"), &big, false).await {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::DiskFull { .. }), "{error:?}");
    assert!(written > 0);
    // What was there is there, and says what is wrong.
    let (entries, revision) = store.list("t/").await.expect("list");
    assert_eq!((entries.len(), revision), (written, written as u64));
    let health = store.health().await.expect("health");
    assert!(health.warning.is_some_and(|text| text.contains("full")));
    let again = store.put("t/again", &big, false).await;
    assert!(matches!(again, Err(StoreError::DiskFull { .. })), "{again:?}");

    std::fs::remove_file(&ballast).expect("make room");
    let mut watch = store.watch("t/");
    store.put("t/after", b"", false).await.expect("there is room again");
    assert!(matches!(next(&mut watch).await, Event::Snapshot(entries, _) if entries.len() == written));
    assert!(matches!(next(&mut watch).await, Event::Put(_)));
    assert_eq!(store.health().await.expect("health").warning, None);
    drop((store, watch));

    let (entries, revision) = open(&path).await.list("t/").await.expect("list");
    assert_eq!((entries.len(), revision), (written + 1, written as u64 + 1));
    println!("all of it held");
}
