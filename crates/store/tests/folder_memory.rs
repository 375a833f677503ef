//! The folder source on a real directory: what cannot be read keeps what it said, also when the agent was away
//! meanwhile, when a file has a new name, and when there is a second definition.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use cirri_control::resource::{Resource, STAND_IN};
use cirri_store::folder::{CatchUp, Change, Memory, watch};
use futures::{StreamExt, stream::BoxStream};

/// No YAML: it may be any object.
const GARBAGE: &str = "{ broken: [\n";

fn policy(name: &str, rules: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}}}\n\
         spec:\n  podSelector: {{matchLabels: {{app: vault}}}}\n  policyTypes: [Ingress]\n  {rules}\n"
    )
}

fn deny(name: &str) -> String {
    policy(name, "ingress: []")
}

fn allow(name: &str) -> String {
    policy(name, "ingress: [{}]")
}

/// Says which object it is, and what it selects, and no more.
fn misspelt(name: &str) -> String {
    policy(name, "ingress: [{portz: []}]")
}

/// An agent's folder, and what the agent keeps of it.
struct World {
    parent: tempfile::TempDir,
    objects: BTreeMap<String, String>,
    files: BTreeMap<String, String>,
    running: Option<(BoxStream<'static, Change>, CatchUp)>,
    errors: Vec<String>,
}

impl World {
    fn new() -> World {
        let parent = tempfile::tempdir().expect("a directory");
        fs::create_dir(parent.path().join("manifests")).expect("create");
        World { parent, objects: BTreeMap::new(), files: BTreeMap::new(), running: None, errors: Vec::new() }
    }

    fn dir(&self) -> PathBuf {
        self.parent.path().join("manifests")
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.at(name), text).expect("write");
    }

    fn start(&mut self) {
        let read = |text: &String| Resource::from_json(text).ok();
        let objects = self.objects.iter().map(|(key, text)| (key.clone(), read(text))).collect();
        let before = Memory { objects, files: self.files.clone() };
        self.running = Some(watch(self.dir(), before, |_| Some(false)).expect("watch"));
    }

    fn stop(&mut self) {
        self.running = None;
    }

    /// Takes in one change.
    async fn next(&mut self) -> Change {
        let (changes, _) = self.running.as_mut().expect("it runs");
        let change = tokio::time::timeout(Duration::from_secs(20), changes.next()).await;
        let change = change.expect("a change").expect("a watch never ends");
        self.objects.extend(change.upserted.iter().map(|it| (it.store_key(), it.to_json())));
        self.objects.retain(|key, _| !change.removed.contains(key));
        for (name, record) in change.files.clone() {
            match record {
                Some(record) => self.files.insert(name, record),
                None => self.files.remove(&name),
            };
        }
        self.errors = change.errors.iter().map(|error| error.message.clone()).collect();
        change
    }

    /// Returns when all that is in the folder now counts.
    async fn settle(&mut self) {
        let question = self.running.as_ref().expect("it runs").1.ask();
        while self.next().await.caught_up < question {}
    }

    /// Runs once through.
    async fn run(&mut self) {
        self.start();
        self.settle().await;
        self.stop();
    }

    fn says(&self, name: &str) -> &'static str {
        match self.objects.get(&format!("resources/NetworkPolicy/default/{name}")) {
            None => "nothing",
            Some(text) if text.contains(STAND_IN) => "stand-in",
            Some(text) if text.contains("\"ingress\":[{") => "allow",
            Some(_) => "deny",
        }
    }
}

#[tokio::test]
async fn of_two_broken_files_each_keeps_what_it_held() {
    let mut world = World::new();
    world.write("a.yaml", &deny("pa"));
    world.write("b.yaml", &deny("pb"));
    world.run().await;
    world.write("a.yaml", GARBAGE);
    world.write("b.yaml", GARBAGE);
    world.start();
    world.settle().await;
    assert_eq!((world.says("pa"), world.says("pb")), ("deny", "deny"));
    world.write("a.yaml", &deny("pa"));
    world.settle().await;
    assert_eq!((world.says("pa"), world.says("pb")), ("deny", "deny"), "b is still broken");
    world.write("b.yaml", &deny("other"));
    world.settle().await;
    assert_eq!((world.says("pa"), world.says("pb"), world.says("other")), ("deny", "nothing", "deny"));
}

#[tokio::test]
async fn a_definition_that_was_not_used_does_not_take_over_when_the_other_breaks() {
    for broken in [GARBAGE.to_owned(), misspelt("px")] {
        for restart in [false, true] {
            let mut world = World::new();
            world.write("a.yaml", &deny("px"));
            world.start();
            world.settle().await;
            world.write("b.yaml", &allow("px"));
            world.settle().await;
            assert!(world.errors.concat().contains("is not used"), "{:?}", world.errors);
            if restart {
                world.stop();
            }
            world.write("a.yaml", &broken);
            if restart {
                world.start();
            }
            world.settle().await;
            assert_eq!(world.says("px"), "deny", "{broken} {restart}");
            // Broken and renamed at once.
            if restart {
                world.stop();
            }
            fs::rename(world.at("a.yaml"), world.at("c.yaml")).expect("rename");
            if restart {
                world.start();
            }
            world.settle().await;
            assert_eq!(world.says("px"), "deny", "{broken} {restart}");
            fs::remove_file(world.at("c.yaml")).expect("remove");
            world.settle().await;
            assert_eq!(world.says("px"), "allow", "the other is really gone");
        }
    }
}

#[tokio::test]
async fn of_two_definitions_in_one_file_the_second_does_not_take_over_when_the_first_breaks() {
    for broken in [GARBAGE.to_owned(), misspelt("px")] {
        for restart in [false, true] {
            let mut world = World::new();
            world.write("a.yaml", &format!("{}---\n{}", deny("px"), allow("px")));
            world.start();
            world.settle().await;
            assert_eq!(world.says("px"), "deny");
            if restart {
                world.stop();
            }
            world.write("a.yaml", &format!("{broken}---\n{}", allow("px")));
            if restart {
                world.start();
            }
            world.settle().await;
            assert_eq!(world.says("px"), "deny", "{broken} {restart}");
            assert!(world.errors.concat().contains("is not used"), "{:?}", world.errors);
            world.write("a.yaml", &allow("px"));
            world.settle().await;
            assert_eq!((world.says("px"), world.errors.len()), ("allow", 0));
        }
    }
}

#[tokio::test]
async fn a_stand_in_stays_like_a_good_version_over_restarts_and_renames() {
    for restart in [false, true] {
        let mut world = World::new();
        world.write("a.yaml", &misspelt("px"));
        world.start();
        world.settle().await;
        assert_eq!(world.says("px"), "stand-in");
        for (from, to) in [("a.yaml", "a.yaml"), ("a.yaml", "b.yaml"), ("b.yaml", "c.yaml")] {
            if restart {
                world.stop();
            }
            world.write(from, GARBAGE);
            fs::rename(world.at(from), world.at(to)).expect("rename");
            if restart {
                world.start();
            }
            world.settle().await;
            assert_eq!(world.says("px"), "stand-in", "{to} {restart}");
        }
        world.write("c.yaml", &allow("px"));
        world.settle().await;
        assert_eq!(world.says("px"), "allow");
    }
}

#[tokio::test]
async fn a_directory_that_is_another_under_the_same_number_was_not_emptied() {
    // A file system that gives a new directory the number of the one before it.
    if std::env::var_os("IN_A_NAMESPACE").is_none() {
        let name = "a_directory_that_is_another_under_the_same_number_was_not_emptied";
        let test = std::env::current_exe().expect("this test");
        let mut inside = Command::new("unshare");
        inside.args(["--user", "--map-root-user", "--mount"]).arg(test).args(["--exact", name, "--nocapture"]);
        let status = inside.env("IN_A_NAMESPACE", "1").status().expect("unshare, of util-linux");
        assert!(status.success());
        return;
    }
    let mut world = World::new();
    let dir = world.dir();
    let mount = || assert!(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&dir).status().unwrap().success());
    let unmount = || assert!(Command::new("umount").arg("-l").arg(&dir).status().unwrap().success());
    mount();
    world.write("a.yaml", &deny("px"));
    world.start();
    world.settle().await;
    let identity = number(&world.dir());
    unmount();
    mount();
    assert_eq!(number(&world.dir()), identity, "the kernel numbers them otherwise: this shows nothing");
    world.settle().await;
    assert_eq!(world.says("px"), "deny");
    assert!(world.errors.concat().contains("is empty"), "{:?}", world.errors);
    world.write("b.yaml", &deny("py"));
    world.settle().await;
    assert_eq!((world.says("px"), world.says("py")), ("deny", "deny"), "it may be filled yet");
    while world.says("px") == "deny" {
        world.next().await;
    }
    assert_eq!((world.says("px"), world.says("py")), ("nothing", "deny"));
    // Emptied on purpose.
    fs::remove_file(world.at("b.yaml")).expect("remove");
    world.settle().await;
    assert_eq!((world.says("py"), world.errors.len()), ("nothing", 0), "{:?}", world.errors);
}

fn number(dir: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = fs::metadata(dir).expect("it is there");
    (metadata.dev(), metadata.ino())
}

#[tokio::test]
async fn a_file_that_is_away_for_a_moment_at_the_start_is_not_gone() {
    let mut world = World::new();
    world.write("a.yaml", &deny("px"));
    world.write("b.yaml", &deny("py"));
    world.run().await;
    fs::rename(world.at("a.yaml"), world.at("away")).expect("rename");
    world.start();
    world.next().await;
    assert_eq!(world.says("px"), "deny");
    fs::rename(world.at("away"), world.at("a.yaml")).expect("rename");
    world.settle().await;
    assert_eq!(world.says("px"), "deny");
    fs::remove_file(world.at("a.yaml")).expect("remove");
    world.stop();
    world.run().await;
    assert_eq!(world.says("px"), "nothing");
}

#[tokio::test]
async fn what_can_be_read_takes_the_place_of_what_an_unreadable_file_held() {
    for restart in [false, true] {
        let mut world = World::new();
        world.write("a.yaml", &allow("px"));
        world.start();
        world.settle().await;
        world.write("a.yaml", GARBAGE);
        world.settle().await;
        assert_eq!(world.says("px"), "allow");
        if restart {
            world.stop();
        }
        world.write("c.yaml", &deny("px"));
        if restart {
            world.start();
        }
        world.settle().await;
        assert_eq!(world.says("px"), "deny", "{restart}");
        world.stop();
        world.start();
        world.settle().await;
        assert_eq!(world.says("px"), "deny", "{restart}");
    }
}

#[tokio::test]
async fn what_is_read_while_the_folder_goes_away_counts_for_nothing() {
    use std::os::unix::fs::symlink;

    let mut world = World::new();
    let parent = world.parent.path().to_owned();
    fs::remove_dir(world.dir()).expect("remove");
    for version in ["v1", "v2"] {
        fs::create_dir(parent.join(version)).expect("create");
        for number in 0..50 {
            fs::write(parent.join(version).join(format!("{number:03}.yaml")), deny(&format!("p{number}")))
                .expect("write");
        }
    }
    let (link, next) = (world.dir(), parent.join("next"));
    symlink("v1", &link).expect("link");
    world.start();
    world.settle().await;
    let swaps = std::thread::spawn(move || {
        for round in 0..600_u32 {
            symlink(if round % 2 == 0 { "v2" } else { "v1" }, &next).expect("link");
            fs::rename(&next, &link).expect("rename");
            // The link goes away at another moment of the reading each time.
            (0..round * 50).for_each(|_| std::hint::spin_loop());
            fs::remove_file(&link).expect("remove");
            symlink("v1", &link).expect("link");
        }
    });
    let mut gone = Vec::new();
    while !swaps.is_finished() {
        let question = world.running.as_ref().expect("it runs").1.ask();
        while {
            let change = world.next().await;
            gone.extend(change.removed);
            change.caught_up < question
        } {}
    }
    swaps.join().expect("it swapped");
    assert_eq!(gone, Vec::<String>::new(), "both folders hold all of them");
}

#[tokio::test]
async fn errors_name_their_lines_and_are_bounded() {
    let mut world = World::new();
    let namespace = |name: &str| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n");
    world.write("a.yaml", &format!("{}---\n{}", namespace("one"), namespace("two")));
    world.run().await;
    world.write("b.yaml", &format!("# A copy.\n---\n{}---\n{}", namespace("two"), namespace("two")));
    world.start();
    world.settle().await;
    let [first, second] = &world.errors[..] else { panic!("{:?}", world.errors) };
    let (a, b) = (world.at("a.yaml").display().to_string(), world.at("b.yaml").display().to_string());
    assert!(first.starts_with(&format!("{b}:7:")) && first.contains("line 3"), "{first}");
    assert!(second.starts_with(&format!("{b}:3:")) && second.contains(&format!("{a}:5")), "{second}");

    // Copies of many, within a file and beside it, and many files that are broken.
    let many: Vec<String> = (0..300).map(|number| namespace(&format!("n{number}"))).collect();
    world.write("a.yaml", &many.join("---\n"));
    world.settle().await;
    world.write("b.yaml", &[many.join("---\n"), many.join("---\n")].join("---\n"));
    world.settle().await;
    assert_eq!(world.errors.len(), 51);
    assert!(world.errors[50].contains("550 more errors are not shown"), "{}", world.errors[50]);
    (0..300).for_each(|number| world.write(&format!("c{number}.yaml"), "kind: [\n"));
    world.settle().await;
    assert!(world.errors.len() <= 201, "{}", world.errors.len());
    let last = world.errors.last().expect("errors");
    assert!(last.contains("151 more errors are not shown"), "{last}");
    assert!(world.errors.iter().all(|error| error.chars().count() < 1100));
}

#[tokio::test]
async fn an_error_is_one_line_whatever_the_file_is_called() {
    let mut world = World::new();
    world.write("a\nb: c.yaml", "kind: [\n");
    world.write("a\u{1b}[31m.yaml", "");
    world.run().await;
    assert_eq!(world.errors.len(), 2);
    assert!(world.errors.iter().all(|error| !error.contains(char::is_control)), "{:?}", world.errors);
}
