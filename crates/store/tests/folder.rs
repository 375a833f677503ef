//! The folder source on a real directory.

use std::{fs, path::Path, time::Duration};

use cirri_control::resource::Resource;
use cirri_store::{
    StoreError,
    folder::{Change, watch},
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
    change.upserted.iter().map(Resource::name).collect()
}

fn start(dir: &Path) -> BoxStream<'static, Change> {
    watch(dir).expect("watch")
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
    let error = watch(dir.path().join("missing")).err().expect("nothing there");
    assert!(matches!(error, StoreError::Folder { .. }));
    assert!(error.to_string().contains("Create the directory"), "{error}");
}
