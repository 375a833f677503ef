//! The embedded store: what it promises, and what it does when the machine does not.

use std::{
    io::{BufRead, BufReader},
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
};

use cirri_store::{Embedded, Event, EventStream, Store, StoreError};
use futures::{FutureExt, StreamExt};

async fn open(path: &Path) -> Embedded {
    Embedded::open(path).await.expect("open")
}

async fn next(watch: &mut EventStream) -> Event {
    watch.next().await.expect("a watch never ends")
}

#[tokio::test]
async fn a_file_that_was_removed_is_written_anew_with_all_that_was_in_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store");
    let store = Embedded::open(&path).await.expect("open");
    store.put("t/a", b"1", false).await.expect("put");
    let revision = store.put("t/b", b"2", false).await.expect("put");
    std::fs::remove_file(&path).expect("remove");
    store.write_anew().await.expect("written anew");
    store.put("t/c", b"3", false).await.expect("put");
    drop(store);
    let store = Embedded::open(&path).await.expect("open");
    let (entries, now) = store.list("t/").await.expect("list");
    assert_eq!((now, store.set_aside()), (revision + 1, None));
    let found: Vec<_> = entries.iter().map(|it| (it.key.as_str(), it.value.as_slice(), it.revision)).collect();
    assert_eq!(found, [("t/a", &b"1"[..], 1), ("t/b", b"2", 2), ("t/c", b"3", 3)]);
}

#[tokio::test]
async fn state_and_revisions_outlive_the_process_and_leased_keys_do_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store.redb");
    let store = open(&path).await;
    assert!(store.create("t/a", b"1", false).await.expect("create"));
    assert!(!store.create("t/a", b"2", false).await.expect("create"));
    assert!(!store.create_all(&[("t/b", b"x"), ("t/a", b"x")]).await.expect("create"));
    assert!(store.create_all(&[("t/b", b"1"), ("t/c", b"1")]).await.expect("create"));
    store.put("t/leased", b"", true).await.expect("put");
    assert_eq!(store.delete("t/nothing").await.expect("delete"), 3);
    let last = store.delete("t/c").await.expect("delete");
    assert_eq!(last, 4);
    let (before, _) = store.list("t/").await.expect("list");
    assert_eq!(before.len(), 3);
    drop(store);

    let store = open(&path).await;
    assert_eq!(store.set_aside(), None);
    let (after, revision) = store.list("t/").await.expect("list");
    assert_eq!(after, before[..2]);
    assert_eq!(revision, last + 1, "the removal of leased keys is a revision");
    assert_eq!(store.put("t/a", b"2", false).await.expect("put"), revision + 1);
}

#[tokio::test]
async fn a_watch_gets_a_snapshot_then_each_revision_whole_and_in_order() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = open(&dir.path().join("store.redb")).await;
    store.put("t/a", b"1", false).await.expect("put");
    let mut watch = store.watch("t/");
    store.create_all(&[("t/b", b"2"), ("u/b", b"2")]).await.expect("create");
    store.put("u/c", b"3", false).await.expect("put");
    store.delete_prefix("t/").await.expect("delete");

    assert!(matches!(next(&mut watch).await, Event::Snapshot(entries, 1) if entries.len() == 1));
    assert!(matches!(next(&mut watch).await, Event::Put(entry) if entry.key == "t/b" && entry.revision == 2));
    assert_eq!(next(&mut watch).await, Event::Progress(2));
    assert_eq!(next(&mut watch).await, Event::Progress(3));
    for key in ["t/a", "t/b"] {
        let key = key.to_owned();
        assert_eq!(next(&mut watch).await, Event::Delete { key, revision: 4 });
    }
    assert_eq!(next(&mut watch).await, Event::Progress(4));
    assert!(watch.next().now_or_never().is_none());
}

#[tokio::test]
async fn a_watch_that_fell_behind_gets_a_snapshot() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = open(&dir.path().join("store.redb")).await;
    let mut watch = store.watch("t/");
    next(&mut watch).await;
    let mut last = 0;
    for number in 0..5000_u32 {
        last = store.put("t/x", &number.to_be_bytes(), false).await.expect("put");
    }
    let Event::Snapshot(entries, revision) = next(&mut watch).await else {
        panic!("history is gone: only a snapshot will do");
    };
    assert_eq!((entries[0].revision, revision), (last, last));
}

#[tokio::test]
async fn of_many_who_create_one_key_one_wins() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = open(&dir.path().join("store.redb")).await;
    let attempts = (0..32_u8).map(|number| {
        let store = store.clone();
        async move { store.create("t/x", &[number], false).await.expect("create") }
    });
    let won = futures::future::join_all(attempts).await;
    assert_eq!(won.iter().filter(|won| **won).count(), 1);
}

#[tokio::test]
async fn two_agents_cannot_share_one_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store.redb");
    let _first = open(&path).await;
    let second = Embedded::open(&path).await.err();
    assert!(matches!(second, Some(StoreError::InUse { .. })), "{second:?}");
}

#[tokio::test]
async fn a_damaged_file_is_set_aside_and_a_new_one_started() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store.redb");
    let store = open(&path).await;
    for number in 0..200 {
        store.put(&format!("t/{number}"), &[7; 500], false).await.expect("put");
    }
    drop(store);
    let good = std::fs::read(&path).expect("read");

    let mut cases = vec![
        ("not a store at all", b"hello".to_vec()),
        ("cut off", good[..good.len() / 2].to_vec()),
        ("only the first page", good[..4096].to_vec()),
    ];
    // A value on disk that nobody wrote: the first page that holds many of them.
    let mut flipped = good.clone();
    let at = flipped.windows(64).position(|window| window == [7; 64]).expect("a value");
    flipped[at] = 8;
    cases.push(("one flipped byte", flipped));

    for (case, content) in cases {
        std::fs::write(&path, &content).expect("write");
        let store = open(&path).await;
        let aside = store.set_aside().unwrap_or_else(|| panic!("{case}: was taken for good"));
        assert!(aside.path.exists(), "{case}: not kept");
        let warning = store.health().await.expect("health").warning;
        assert!(warning.is_some_and(|text| text.contains(&aside.reason)), "{case}");
        let (entries, _) = store.list("").await.expect("list");
        assert!(entries.is_empty(), "{case}");
        store.put("t/x", b"", false).await.expect("put");
    }
    std::fs::write(&path, b"").expect("write");
    assert_eq!(open(&path).await.set_aside(), None, "an empty file is a new one");
}

#[tokio::test]
async fn a_file_of_another_schema_is_left_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store.redb");
    let database = redb::Database::create(&path).expect("create");
    let write = database.begin_write().expect("begin");
    let meta = redb::TableDefinition::<&str, u64>::new("meta");
    write.open_table(meta).expect("table").insert("schema", 99).expect("insert");
    write.commit().expect("commit");
    drop(database);

    let error = Embedded::open(&path).await.err();
    assert!(matches!(error, Some(StoreError::Schema { found: 99, .. })), "{error:?}");
    let files = std::fs::read_dir(dir.path()).expect("list").count();
    assert_eq!(files, 1, "it was not set aside");
    let database = redb::Database::open(&path).expect("still a store");
    let read = redb::ReadableDatabase::begin_read(&database).expect("begin");
    let found = read.open_table(meta).expect("table").get("schema").expect("get");
    assert_eq!(found.expect("there").value(), 99);
}

#[tokio::test]
async fn keys_put_together_are_one_revision() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = open(&dir.path().join("store.redb")).await;
    let before = store.put("t/a", b"0", false).await.expect("put");
    let after = store.put_all(&[("t/a", b"1"), ("t/b", b"1")]).await.expect("put");
    assert_eq!(after, before + 1);
    let (entries, revision) = store.list("t/").await.expect("list");
    assert_eq!(revision, after);
    assert!(entries.iter().all(|entry| entry.value == b"1" && entry.revision == after), "{entries:?}");
}

#[tokio::test]
async fn what_was_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store.redb");
    let mut acknowledged = 0;
    for _ in 0..5 {
        let mut child = writer("until-killed", &path).stdout(Stdio::piped()).spawn().expect("start the writer");
        let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let revisions = lines.filter_map(|line| line.ok()?.parse::<u64>().ok());
        for revision in revisions.take(40) {
            assert!(revision > acknowledged, "{revision} after {acknowledged}");
            acknowledged = revision;
        }
        child.kill().expect("kill");
        child.wait().expect("wait");

        let store = open(&path).await;
        assert_eq!(store.set_aside(), None);
        let (lefts, revision) = store.list("left/").await.expect("list");
        assert!(revision >= acknowledged, "{revision} < {acknowledged}");
        // Whole revisions only: each pair was written at once.
        let (rights, _) = store.list("right/").await.expect("list");
        let revisions =
            |entries: &[cirri_store::Entry]| -> Vec<u64> { entries.iter().map(|entry| entry.revision).collect() };
        assert_eq!(revisions(&lefts), revisions(&rights));
        assert_eq!(lefts.len() as u64, revision);
        acknowledged = revision;
    }
}

#[test]
fn a_full_disk_is_an_error_and_no_loss() {
    // A disk of 6 MiB, in a mount namespace of its own.
    let dir = tempfile::tempdir().expect("a directory");
    let root = std::fs::metadata("/proc/self").expect("proc").uid() == 0;
    let child = writer("small-disk", dir.path());
    let output = Command::new("unshare")
        .arg(if root { "-m" } else { "-rm" })
        .args(["sh", "-c", "mount -t tmpfs -o size=6m none \"$0\" && exec \"$@\""])
        .arg(dir.path())
        .arg(child.get_program())
        .args(child.get_args())
        .output()
        .expect("start unshare");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "all of it held");
}

/// The program whose process the tests end or starve: `examples/store_writer.rs`.
fn writer(what: &str, path: &Path) -> Command {
    let tests = std::env::current_exe().expect("this program");
    let examples = tests.parent().and_then(Path::parent).expect("target/PROFILE/deps").join("examples");
    let program = examples.join("store_writer");
    assert!(program.exists(), "{} is not built: `cargo test --examples` does", program.display());
    let mut command = Command::new(program);
    command.arg(what).arg(path);
    command
}

#[tokio::test]
async fn keys_are_written_and_removed_in_one_revision() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store.redb");
    let store = Embedded::open(&path).await.expect("open");
    let first = store.write_all(&[("a".into(), Some(b"1".to_vec())), ("b".into(), Some(b"2".to_vec()))]).await;
    let second = store.write_all(&[("a".into(), None), ("c".into(), Some(b"3".to_vec())), ("gone".into(), None)]).await;
    assert_eq!(second.expect("written"), first.expect("written") + 1);
    drop(store);
    let store = Embedded::open(&path).await.expect("open again");
    let (entries, _) = store.list("").await.expect("list");
    assert_eq!(entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["b", "c"]);
}
