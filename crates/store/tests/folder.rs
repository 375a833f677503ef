//! The folder source on a real directory.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use cirri_store::{
    StoreError,
    folder::{Change, Memory, watch},
};
use futures::{StreamExt, stream::BoxStream};

fn namespace(name: &str, label: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels: {{is: {label}}}\n")
}

async fn next(changes: &mut BoxStream<'static, Change>) -> Change {
    let change = tokio::time::timeout(Duration::from_secs(10), changes.next()).await;
    change.expect("a change within 10 s").expect("a watch never ends")
}

fn names(change: &Change) -> Vec<&str> {
    change.upserted.iter().map(|resource| resource.name()).collect()
}

fn start(dir: &Path) -> BoxStream<'static, Change> {
    watch(dir, Memory::default(), writers).expect("watch").0
}

#[tokio::test]
async fn it_starts_with_everything_and_goes_on_with_changes() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str| dir.path().join(name);
    fs::write(file("a.yaml"), namespace("one", "x")).expect("write");
    fs::write(file("b.yml"), namespace("two", "x")).expect("write");
    fs::write(file("notes.txt"), "not: [a manifest").expect("write");
    fs::write(file(".hidden.yaml"), "not: [a manifest").expect("write");
    let mut changes = start(dir.path());
    let first = next(&mut changes).await;
    assert_eq!(names(&first), ["one", "two"]);
    assert!(first.errors.is_empty(), "{first:?}");

    fs::write(file("c.json"), r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"three"}}"#).expect("write");
    assert_eq!(names(&next(&mut changes).await), ["three"]);
    // As editors do it: write elsewhere, then rename.
    fs::write(file(".a.yaml.tmp"), namespace("one", "y")).expect("write");
    fs::rename(file(".a.yaml.tmp"), file("a.yaml")).expect("rename");
    assert_eq!(names(&next(&mut changes).await), ["one"]);
    fs::remove_file(file("b.yml")).expect("remove");
    assert_eq!(next(&mut changes).await.removed, ["resources/Namespace/_/two"]);
    fs::rename(file("c.json"), file("c.bak")).expect("rename");
    assert_eq!(next(&mut changes).await.removed, ["resources/Namespace/_/three"]);
}

#[tokio::test]
async fn a_file_is_read_when_its_writer_is_done_with_it() {
    use std::io::Write;

    let dir = tempfile::tempdir().expect("a directory");
    let mut changes = start(dir.path());
    assert_eq!(next(&mut changes).await, Change::default());
    let text = namespace("one", "x");
    let mut file = fs::File::create(dir.path().join("a.yaml")).expect("create");
    file.write_all(&text.as_bytes()[..20]).expect("write");
    // A change elsewhere shows that the half file was passed over.
    fs::write(dir.path().join("b.yaml"), namespace("two", "x")).expect("write");
    let change = next(&mut changes).await;
    assert_eq!((names(&change), change.errors.len()), (vec!["two"], 0));
    file.write_all(&text.as_bytes()[20..]).expect("write");
    drop(file);
    assert_eq!(names(&next(&mut changes).await), ["one"]);
}

#[tokio::test]
async fn a_broken_file_is_reported_with_its_path_and_changes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.yaml");
    fs::write(&path, namespace("one", "x")).expect("write");
    let mut changes = start(dir.path());
    next(&mut changes).await;
    for broken in [b"kind: [".to_vec(), b"\xff\xfe".to_vec()] {
        fs::write(&path, broken).expect("write");
        let change = next(&mut changes).await;
        assert!(change.upserted.is_empty() && change.removed.is_empty(), "{change:?}");
        let path = path.display().to_string();
        assert_eq!(change.errors[0].file, path);
        assert!(change.errors[0].message.contains(&path), "{change:?}");
    }
    fs::write(&path, namespace("one", "y")).expect("write");
    let change = next(&mut changes).await;
    assert_eq!((names(&change), change.errors.len()), (vec!["one"], 0));
}

#[tokio::test]
async fn a_directory_that_goes_away_keeps_its_content_until_it_is_back() {
    let parent = tempfile::tempdir().expect("a directory");
    let dir = parent.path().join("manifests");
    fs::create_dir(&dir).expect("create");
    fs::write(dir.join("a.yaml"), namespace("one", "x")).expect("write");
    let mut changes = start(&dir);
    next(&mut changes).await;

    fs::rename(&dir, parent.path().join("elsewhere")).expect("rename");
    let change = next(&mut changes).await;
    assert!(change.removed.is_empty());
    assert_eq!(change.errors[0].file, dir.display().to_string());

    fs::rename(parent.path().join("elsewhere"), &dir).expect("rename");
    assert_eq!(next(&mut changes).await, Change::default());
    fs::write(dir.join("b.yaml"), namespace("two", "x")).expect("write");
    assert_eq!(names(&next(&mut changes).await), ["two"]);
}

#[tokio::test]
async fn a_mounted_volume_that_swaps_all_files_at_once_is_followed() {
    use std::os::unix::fs::symlink;

    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    for (version, label) in [("..v1", "x"), ("..v2", "y")] {
        fs::create_dir(at(version)).expect("create");
        fs::write(at(version).join("a.yaml"), namespace("one", label)).expect("write");
    }
    symlink("..v1", at("..data")).expect("link");
    symlink("..data/a.yaml", at("a.yaml")).expect("link");
    let mut changes = start(dir.path());
    assert!(next(&mut changes).await.upserted[0].to_json().contains("\"x\""));
    symlink("..v2", at("..tmp")).expect("link");
    fs::rename(at("..tmp"), at("..data")).expect("rename");
    assert!(next(&mut changes).await.upserted[0].to_json().contains("\"y\""));
}

#[tokio::test]
async fn a_folder_that_is_none_is_an_error_that_says_what_to_do() {
    let dir = tempfile::tempdir().expect("a directory");
    let error = watch(dir.path().join("missing"), Memory::default(), writers).err().expect("nothing there");
    assert!(matches!(error, StoreError::Folder { .. }));
    assert!(error.to_string().contains("Create the directory"), "{error}");
}

/// Whether this process writes a file: what the agent asks of the kernel with a lease.
fn writers(file: &fs::File) -> Option<bool> {
    use std::os::unix::fs::MetadataExt;

    let same =
        |other: &fs::Metadata| file.metadata().is_ok_and(|file| (file.dev(), file.ino()) == (other.dev(), other.ino()));
    for fd in fs::read_dir("/proc/self/fd").ok()?.flatten() {
        if !fs::metadata(fd.path()).is_ok_and(|other| same(&other)) {
            continue;
        }
        let info = fs::read_to_string(Path::new("/proc/self/fdinfo").join(fd.file_name())).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).map(str::trim);
        if flags.and_then(|flags| u32::from_str_radix(flags, 8).ok()).is_some_and(|flags| flags & 3 != 0) {
            return Some(true);
        }
    }
    Some(false)
}

/// Puts a link in place of another at once, as git-sync and Kubernetes do.
fn swap(link: &Path, target: &str) {
    let next = link.with_extension("next");
    std::os::unix::fs::symlink(target, &next).expect("link");
    fs::rename(&next, link).expect("rename");
}

fn label(change: &Change) -> String {
    let labels = change.upserted.iter().filter_map(|it| it.metadata().labels.get("is").cloned());
    labels.collect::<Vec<_>>().join(",")
}

#[tokio::test]
async fn a_folder_that_is_a_link_is_followed_when_it_is_swapped() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    for version in ["v1", "v2", "v3"] {
        fs::create_dir(at(version)).expect("create");
        fs::write(at(version).join("a.yaml"), namespace("one", version)).expect("write");
    }
    fs::write(at("v1").join("b.yaml"), namespace("two", "v1")).expect("write");
    swap(&at("current"), "v1");
    swap(&at("manifests"), "current");
    let mut changes = start(&at("manifests"));
    assert_eq!(label(&next(&mut changes).await), "v1,v1");
    // The link behind the link, then the first.
    swap(&at("current"), "v2");
    let change = next(&mut changes).await;
    assert_eq!((label(&change).as_str(), change.removed.len(), change.errors.len()), ("v2", 1, 0));
    swap(&at("manifests"), "v3");
    assert_eq!(label(&next(&mut changes).await), "v3");
    // The new one is watched, and the old ones are not.
    fs::write(at("v1").join("a.yaml"), namespace("one", "old")).expect("write");
    fs::write(at("v3").join("a.yaml"), namespace("one", "new")).expect("write");
    assert_eq!(label(&next(&mut changes).await), "new");
    // A link to nothing keeps what there was.
    swap(&at("manifests"), "nowhere");
    let change = next(&mut changes).await;
    assert_eq!((change.removed.len(), change.errors.len()), (0, 1), "{change:?}");
    swap(&at("manifests"), "v2");
    let change = next(&mut changes).await;
    assert_eq!((label(&change).as_str(), change.errors.len()), ("v2", 0));
}

#[tokio::test]
async fn links_of_files_are_followed_wherever_they_lead() {
    use std::os::unix::fs::symlink;

    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    for folder in ["manifests", "v1", "v2"] {
        fs::create_dir(at(folder)).expect("create");
    }
    for version in ["v1", "v2"] {
        fs::write(at(version).join("a.yaml"), namespace("one", version)).expect("write");
    }
    swap(&at("current"), "v1");
    symlink("../current/a.yaml", at("manifests").join("a.yaml")).expect("link");
    let mut changes = start(&at("manifests"));
    assert_eq!(label(&next(&mut changes).await), "v1");
    swap(&at("current"), "v2");
    assert_eq!(label(&next(&mut changes).await), "v2");
    fs::write(at("v2").join("a.yaml"), namespace("one", "written")).expect("write");
    assert_eq!(label(&next(&mut changes).await), "written");
    fs::write(at("v2").join("next"), namespace("one", "renamed")).expect("write");
    fs::rename(at("v2").join("next"), at("v2").join("a.yaml")).expect("rename");
    assert_eq!(label(&next(&mut changes).await), "renamed");
    // What the link leads to is gone for a while: the link still says that there is something.
    fs::rename(at("v2"), at("away")).expect("rename");
    let change = next(&mut changes).await;
    assert_eq!((change.removed.len(), change.errors.len()), (0, 1), "{change:?}");
    assert!(change.errors[0].message.contains("a link to nothing"), "{change:?}");
    fs::rename(at("away"), at("v2")).expect("rename");
    let change = next(&mut changes).await;
    assert_eq!((change.upserted.len(), change.removed.len(), change.errors.len()), (0, 0, 0), "{change:?}");
    // Links that lead in a circle, and through a file.
    for (to, why) in [("../manifests/a.yaml", "symbolic link"), ("../v2/a.yaml/x", "ot a directory")] {
        swap(&at("manifests").join("a.yaml"), to);
        let change = next(&mut changes).await;
        assert_eq!((change.removed.len(), change.errors.len()), (0, 1), "{change:?}");
        assert!(change.errors[0].message.contains(why), "{change:?}");
    }
    swap(&at("manifests").join("a.yaml"), "../v2/a.yaml");
    let change = next(&mut changes).await;
    assert_eq!((change.upserted.len(), change.removed.len(), change.errors.len()), (0, 0, 0), "{change:?}");
    fs::remove_file(at("manifests").join("a.yaml")).expect("remove");
    assert_eq!(next(&mut changes).await.removed.len(), 1);
}

#[tokio::test]
async fn a_folder_whose_parents_go_away_is_read_again_when_they_are_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let (parent, away) = (dir.path().join("etc"), dir.path().join("away"));
    let manifests = parent.join("cirri/manifests");
    fs::create_dir_all(&manifests).expect("create");
    fs::write(manifests.join("a.yaml"), namespace("one", "x")).expect("write");
    let mut changes = start(&manifests);
    next(&mut changes).await;
    fs::rename(&parent, &away).expect("rename");
    let change = next(&mut changes).await;
    assert_eq!((change.removed.len(), change.errors.len()), (0, 1), "{change:?}");
    // Another of the same name, not filled yet: as a volume leaves it that is unmounted.
    fs::create_dir_all(&manifests).expect("create");
    let change = next(&mut changes).await;
    assert_eq!((change.removed.len(), change.errors.len()), (0, 1), "{change:?}");
    assert!(change.errors[0].message.contains("empty"), "{change:?}");
    fs::write(manifests.join("b.yaml"), namespace("two", "y")).expect("write");
    let change = next(&mut changes).await;
    assert_eq!((names(&change), change.removed.len(), change.errors.len()), (vec!["two"], 0, 0));
    assert_eq!(next(&mut changes).await.removed.len(), 1, "it does not come back");
}

#[tokio::test]
async fn a_file_that_is_being_written_is_not_read_half() {
    use std::io::Write;

    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let text = format!("{}---\n{}", namespace("one", "x"), namespace("two", "x"));
    let half = text.find("---").expect("two documents");
    // At the start.
    let mut file = fs::File::create(at("a.yaml")).expect("create");
    file.write_all(&text.as_bytes()[..half]).expect("write");
    let mut changes = start(dir.path());
    let change = next(&mut changes).await;
    assert!(change.upserted.is_empty(), "{change:?}");
    assert!(change.errors[0].message.contains("is being written"), "{change:?}");
    file.write_all(&text.as_bytes()[half..]).expect("write");
    drop(file);
    let change = next(&mut changes).await;
    assert_eq!((names(&change), change.errors.len()), (vec!["one", "two"], 0));

    // Emptied and written again, while something else has everything looked at.
    let mut file = fs::File::create(at("a.yaml")).expect("truncate");
    fs::write(at("b.yaml"), namespace("three", "x")).expect("write");
    fs::rename(at("b.yaml"), at("c.yaml")).expect("rename");
    let mut change = next(&mut changes).await;
    while change.upserted.is_empty() {
        change = next(&mut changes).await;
    }
    assert_eq!((names(&change), change.removed.len()), (vec!["three"], 0), "{change:?}");
    // A second writer is done; the first is not.
    fs::File::options().append(true).open(at("a.yaml")).expect("open").write_all(b"# two\n").expect("write");
    fs::write(at("d.yaml"), namespace("four", "x")).expect("write");
    let change = next(&mut changes).await;
    assert_eq!((names(&change), change.removed.len()), (vec!["four"], 0), "{change:?}");
    // It is renamed meanwhile.
    fs::rename(at("a.yaml"), at("e.yaml")).expect("rename");
    fs::write(at("f.yaml"), namespace("five", "x")).expect("write");
    let mut change = next(&mut changes).await;
    while change.upserted.is_empty() {
        assert!(change.removed.is_empty(), "{change:?}");
        change = next(&mut changes).await;
    }
    assert!(change.removed.is_empty(), "{change:?}");
    file.write_all(text.replace("is: x", "is: y").as_bytes()).expect("write");
    drop(file);
    let mut labels = String::new();
    while labels.is_empty() {
        labels = label(&next(&mut changes).await);
    }
    assert_eq!(labels, "y,y");
}

#[tokio::test]
async fn a_manifest_that_is_no_file_is_named_and_nobody_waits_for_it() {
    let dir = tempfile::tempdir().expect("a directory");
    std::os::unix::fs::symlink("/dev/zero", dir.path().join("a.yaml")).expect("link");
    fs::write(dir.path().join("b.yaml"), namespace("one", "x")).expect("write");
    let change = next(&mut start(dir.path())).await;
    assert_eq!(names(&change), ["one"]);
    assert!(change.errors[0].message.contains("no regular file"), "{change:?}");
}

#[tokio::test]
async fn a_question_is_answered_with_all_that_was_there_when_it_was_asked() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut changes, catch_up) = watch(dir.path(), Memory::default(), writers).expect("watch");
    assert_eq!(next(&mut changes).await, Change::default());
    for round in 0..50 {
        let written = [format!("a{round}"), format!("b{round}")];
        for name in &written {
            fs::write(dir.path().join(format!("{name}.yaml")), namespace(name, "x")).expect("write");
        }
        let question = catch_up.ask();
        let mut seen = Vec::new();
        loop {
            let change = next(&mut changes).await;
            seen.extend(change.upserted.iter().map(|resource| resource.name().to_owned()));
            if change.caught_up >= question {
                break;
            }
        }
        assert_eq!(seen, written);
    }
    fs::remove_file(dir.path().join("a0.yaml")).expect("remove");
    let question = catch_up.ask();
    let mut removed = Vec::new();
    while {
        let change = next(&mut changes).await;
        removed.extend(change.removed);
        change.caught_up < question
    } {}
    assert_eq!(removed, ["resources/Namespace/_/a0"], "what was gone is gone");
    let question = catch_up.ask();
    assert_eq!(
        next(&mut changes).await,
        Change { caught_up: question, ..Change::default() },
        "nothing is an answer too"
    );
}

#[tokio::test]
async fn a_folder_that_is_empty_when_the_agent_is_back_takes_nothing_away() {
    let dir = tempfile::tempdir().expect("a directory");
    let one = namespace("one", "x");
    let stored = cirri_control::resource::parse_documents("before", &one).expect("a resource").remove(0);
    let objects = BTreeMap::from([(stored.store_key(), Some(stored))]);
    let before = Memory { objects, ..Memory::default() };
    let mut changes = watch(dir.path(), before, writers).expect("watch").0;
    let change = next(&mut changes).await;
    assert!(change.removed.is_empty() && change.errors[0].message.contains("is empty"), "{change:?}");
    // What is put there is not all of it, perhaps, but it is what there is.
    fs::write(dir.path().join("a.yaml"), namespace("two", "x")).expect("write");
    let change = next(&mut changes).await;
    assert_eq!((names(&change), change.removed.len(), change.errors.len()), (vec!["two"], 0, 0));
    assert_eq!(next(&mut changes).await.removed.len(), 1, "it does not come back");
}

#[tokio::test]
async fn a_directory_in_the_place_of_a_file_takes_nothing_away() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.yaml");
    fs::write(&path, namespace("one", "x")).expect("write");
    let mut changes = start(dir.path());
    next(&mut changes).await;
    fs::remove_file(&path).expect("remove");
    fs::create_dir(&path).expect("create");
    let change = next(&mut changes).await;
    assert!(change.removed.is_empty() && change.errors[0].message.contains("is a directory"), "{change:?}");
    fs::remove_dir(&path).expect("remove");
    while next(&mut changes).await.removed.is_empty() {}
}

#[tokio::test]
async fn a_file_whose_name_is_no_utf8_is_read_like_any_other() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &[u8]| dir.path().join(OsStr::from_bytes(name));
    fs::write(at(b"deny.yaml"), namespace("one", "x")).expect("write");
    fs::write(at(b"other\xff.yaml"), namespace("two", "x")).expect("write");
    let mut changes = start(dir.path());
    assert_eq!(names(&next(&mut changes).await), ["one", "two"]);
    // Beside it one of nearly the same name.
    fs::rename(at(b"deny.yaml"), at(b"deny\xff.yaml")).expect("rename");
    fs::write(at(b"deny\xfe.yaml"), namespace("three", "x")).expect("write");
    let (mut seen, mut gone) = (Vec::new(), Vec::new());
    let until = tokio::time::Instant::now() + Duration::from_secs(2);
    while let Ok(Some(change)) = tokio::time::timeout_at(until, changes.next()).await {
        seen.extend(names(&change).into_iter().map(str::to_owned));
        gone.extend(change.removed);
    }
    assert_eq!((seen, gone), (vec!["three".to_owned()], Vec::new()));
    fs::write(at(b"deny\xff.yaml"), namespace("one", "y")).expect("write");
    assert_eq!(label(&next(&mut changes).await), "y");
    fs::write(at(b"deny\xff.yaml"), "kind: [\n").expect("write");
    let change = next(&mut changes).await;
    assert!(change.errors[0].file.ends_with("/deny\\xff.yaml"), "{change:?}");
    fs::remove_file(at(b"deny\xff.yaml")).expect("remove");
    while next(&mut changes).await.removed != ["resources/Namespace/_/one"] {}
}

#[tokio::test]
async fn a_manifest_with_an_ending_in_capitals_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    fs::write(at("a.yaml"), namespace("one", "x")).expect("write");
    let mut changes = start(dir.path());
    assert_eq!(next(&mut changes).await.errors, []);
    fs::write(at("b.YAML"), namespace("two", "x")).expect("write");
    let change = next(&mut changes).await;
    let error = &change.errors[0];
    assert!(error.file.ends_with("/b.YAML") && error.message.contains("is not read; manifests end in"), "{change:?}");
    fs::rename(at("b.YAML"), at("b.yaml")).expect("rename");
    let change = next(&mut changes).await;
    assert_eq!((names(&change), change.errors.len()), (vec!["two"], 0));
}

/// All changes of this time.
async fn during(changes: &mut BoxStream<'static, Change>, time: Duration) -> Vec<Change> {
    let (mut all, until) = (Vec::new(), tokio::time::Instant::now() + time);
    while let Ok(Some(change)) = tokio::time::timeout_at(until, changes.next()).await {
        all.push(change);
    }
    all
}

fn removed(changes: &[Change]) -> Vec<&str> {
    changes.iter().flat_map(|change| &change.removed).map(String::as_str).collect()
}

#[tokio::test]
async fn a_folder_that_comes_back_keeps_what_it_held_until_nobody_fills_it_any_more() {
    let parent = tempfile::tempdir().expect("a directory");
    let at = |name: &str| parent.path().join(name);
    // It is seen that it is away, or not: then another is in its place at once.
    for at_once in [false, true] {
        fs::create_dir(at("d")).expect("create");
        for name in ["a", "y", "z"] {
            fs::write(at("d").join(format!("{name}.yaml")), namespace(name, "x")).expect("write");
        }
        let mut changes = start(&at("d"));
        next(&mut changes).await;
        if at_once {
            fs::create_dir(at("new")).expect("create");
            fs::copy(at("d/a.yaml"), at("new/a.yaml")).expect("copy");
        }
        fs::rename(at("d"), at("old")).expect("rename");
        if at_once {
            fs::rename(at("new"), at("d")).expect("rename");
        } else {
            fs::create_dir(at("d")).expect("create");
            fs::copy(at("old/a.yaml"), at("d/a.yaml")).expect("copy");
        }
        let mut held = Vec::new();
        for round in 0..3 {
            held.extend(during(&mut changes, Duration::from_secs(2)).await);
            fs::write(at("d").join(format!("b{round}.yaml")), namespace(&format!("b{round}"), "x")).expect("write");
        }
        held.extend(during(&mut changes, Duration::from_secs(2)).await);
        assert_eq!(removed(&held), [""; 0], "at once: {at_once}");
        let read: Vec<&str> = held.iter().flat_map(names).collect();
        assert_eq!(read, ["b0", "b1", "b2"], "what is put there counts at once");
        fs::copy(at("old/z.yaml"), at("d/z.yaml")).expect("copy");
        let changes_then = during(&mut changes, Duration::from_secs(8)).await;
        assert_eq!(removed(&changes_then), ["resources/Namespace/_/y"], "at once: {at_once}");
        // It is a folder like any other again.
        fs::remove_file(at("d/z.yaml")).expect("remove");
        let changes_then = during(&mut changes, Duration::from_secs(3)).await;
        assert_eq!(removed(&changes_then), ["resources/Namespace/_/z"], "at once: {at_once}");
        fs::remove_dir_all(at("d")).expect("remove");
        fs::remove_dir_all(at("old")).expect("remove");
    }
}

#[tokio::test]
async fn a_folder_that_cannot_be_watched_at_the_start_is_looked_at() {
    // Limits of one's own.
    if std::env::var_os("IN_A_NAMESPACE").is_none() {
        let mut inside = std::process::Command::new("unshare");
        inside.args(["--user", "--map-root-user"]).arg(std::env::current_exe().expect("this test"));
        inside.args(["--exact", "a_folder_that_cannot_be_watched_at_the_start_is_looked_at", "--nocapture"]);
        assert!(inside.env("IN_A_NAMESPACE", "1").status().expect("unshare, of util-linux").success());
        return;
    }
    for limit in ["instances", "watches"] {
        let limit = format!("/proc/sys/user/max_inotify_{limit}");
        let dir = tempfile::tempdir().expect("a directory");
        let file = |name: &str| dir.path().join(name);
        fs::write(file("a.yaml"), namespace("one", "x")).expect("write");
        let before = fs::read_to_string(&limit).expect("a limit");
        fs::write(&limit, "0").expect("none");
        let mut changes = start(dir.path());
        let change = next(&mut changes).await;
        assert_eq!(names(&change), ["one"]);
        assert!(change.errors[0].message.contains("cannot be watched"), "{change:?}");
        fs::write(file("b.yaml"), namespace("two", "x")).expect("write");
        assert_eq!(names(&next(&mut changes).await), ["two"], "{limit}");
        fs::remove_file(file("b.yaml")).expect("remove");
        assert_eq!(next(&mut changes).await.removed, ["resources/Namespace/_/two"], "{limit}");
        fs::write(&limit, before.trim()).expect("as it was");
        assert_eq!(next(&mut changes).await.errors, [], "{limit}");
        fs::write(file("c.yaml"), namespace("three", "x")).expect("write");
        let at_once = during(&mut changes, Duration::from_secs(2)).await;
        assert_eq!(at_once.iter().flat_map(names).collect::<Vec<_>>(), ["three"], "{limit}");
    }
}
