//! Random sequences of events, held against an oracle that knows nothing of how the machine works.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use cirri_control::resource::{Resource, STAND_IN};
use proptest::prelude::*;

use super::{EARLIER, Manifests};
use crate::folder::{Change, FileError, Memory};

/// What a policy with one selector does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Says {
    Deny,
    Allow,
}

/// A document of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Document {
    /// Policy so and so.
    Good(usize, Says),
    /// It names its object and what it selects, and no more can be read.
    Misspelt(usize),
    Garbage,
}

#[derive(Clone, Debug)]
enum Event {
    Write(usize, Vec<Document>),
    /// The file cannot be read as a whole.
    Unreadable(usize),
    /// A document of it becomes garbage (`true`), or misspelt.
    Break(usize, usize, bool),
    Rename(usize, usize),
    /// Renamed, and broken at the same moment.
    RenameBroken(usize, usize),
    Copy(usize, usize),
    Delete(usize),
    /// The folder is away, or back.
    Away(bool),
    /// All files are others at once.
    Swap(Vec<(usize, Vec<Document>)>),
}

const FILES: usize = 4;
const NAMES: usize = 3;

fn document() -> impl Strategy<Value = Document> {
    prop_oneof![
        4 => (0..NAMES, prop_oneof![Just(Says::Deny), Just(Says::Allow)]).prop_map(|(name, says)| Document::Good(name, says)),
        1 => (0..NAMES).prop_map(Document::Misspelt),
        1 => Just(Document::Garbage),
    ]
}

fn documents() -> impl Strategy<Value = Vec<Document>> {
    prop::collection::vec(document(), 0..4)
}

fn event() -> impl Strategy<Value = Event> {
    let file = || 0..FILES;
    prop_oneof![
        6 => (file(), documents()).prop_map(|(file, text)| Event::Write(file, text)),
        1 => file().prop_map(Event::Unreadable),
        5 => (file(), 0..3_usize, any::<bool>()).prop_map(|(file, at, garbage)| Event::Break(file, at, garbage)),
        2 => (file(), file()).prop_map(|(from, to)| Event::Rename(from, to)),
        2 => (file(), file()).prop_map(|(from, to)| Event::RenameBroken(from, to)),
        2 => (file(), file()).prop_map(|(from, to)| Event::Copy(from, to)),
        2 => file().prop_map(Event::Delete),
        1 => any::<bool>().prop_map(Event::Away),
        1 => prop::collection::vec((file(), documents()), 0..3).prop_map(Event::Swap),
    ]
}

fn text(documents: &[Document]) -> Vec<u8> {
    let policy = |name: &usize, rules: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p{name}}}\n\
             spec: {{podSelector: {{}}, policyTypes: [Ingress], {rules}}}\n"
        )
    };
    let one = |document: &Document| match document {
        Document::Good(name, Says::Deny) => policy(name, "ingress: []"),
        Document::Good(name, Says::Allow) => policy(name, "ingress: [{}]"),
        Document::Misspelt(name) => policy(name, "ingress: [{portz: []}]"),
        Document::Garbage => "kind: [\n".to_owned(),
    };
    let all: Vec<String> = documents.iter().map(one).collect();
    format!("# Documents\n---\n{}", all.join("---\n")).into_bytes()
}

/// What is in the folder: `None` for a file that cannot be read.
type Disk = BTreeMap<usize, Option<Vec<Document>>>;

fn change(disk: &mut Disk, event: &Event) {
    match event {
        Event::Write(file, text) => drop(disk.insert(*file, Some(text.clone()))),
        Event::Unreadable(file) => drop(disk.insert(*file, None)),
        Event::Break(file, at, garbage) => {
            if let Some(Some(text)) = disk.get_mut(file)
                && let Some(document) = text.get_mut(*at)
            {
                *document = match document {
                    Document::Good(name, _) if !garbage => Document::Misspelt(*name),
                    _ => Document::Garbage,
                };
            }
        }
        Event::Rename(from, to) | Event::RenameBroken(from, to) => {
            if let Some(mut text) = disk.remove(from) {
                if matches!(event, Event::RenameBroken(..)) {
                    text = text.map(|_| vec![Document::Garbage]);
                }
                disk.insert(*to, text);
            }
        }
        Event::Copy(from, to) => {
            if let Some(text) = disk.get(from).cloned() {
                disk.insert(*to, text);
            }
        }
        Event::Delete(file) => drop(disk.remove(file)),
        Event::Away(_) => {}
        Event::Swap(files) => *disk = files.iter().map(|(file, text)| (*file, Some(text.clone()))).collect(),
    }
}

/// A run of the machine, and what is kept of it.
#[derive(Default)]
struct Run {
    manifests: Manifests,
    told: Disk,
    objects: BTreeMap<String, Arc<Resource>>,
    files: BTreeMap<String, String>,
}

impl Run {
    /// Ends, and begins with what is kept.
    fn restart(&mut self) {
        let read = |it: &Arc<Resource>| Resource::from_json(&it.to_json()).ok();
        let objects = self.objects.iter().map(|(key, it)| (key.clone(), read(it))).collect();
        self.manifests = Manifests::new(Path::new(""), Memory { objects, files: self.files.clone() });
        self.told.clear();
    }

    /// As the folder tells it: everything that is there, then what is not, then what does not come back.
    fn look(&mut self, disk: &Disk, away: bool) -> Vec<Change> {
        let error = || FileError::new("dir".to_owned(), "dir: is away");
        self.manifests.set_folder_error(away.then(error), away);
        if away {
            return self.take().into_iter().collect();
        }
        for (file, content) in disk {
            if self.told.get(file) == Some(content) {
                continue;
            }
            match content {
                Some(content) => self.manifests.set(&name(*file), Ok(&text(content))),
                None => self.manifests.set(&name(*file), Err("it cannot be read".to_owned())),
            }
        }
        self.told.clone_from(disk);
        let there: BTreeSet<String> = disk.keys().copied().map(name).collect();
        let gone: Vec<String> = self.manifests.files().filter(|name| !there.contains(*name)).cloned().collect();
        gone.iter().for_each(|name| assert!(self.manifests.leave(name)));
        let mut changes = Vec::new();
        changes.extend(self.take());
        gone.iter().for_each(|name| self.manifests.remove(name));
        changes.extend(self.take());
        changes
    }

    /// Ends a step, and keeps what is to be kept.
    fn take(&mut self) -> Option<Change> {
        let change = self.manifests.settle();
        if let Some(change) = &change {
            self.objects.extend(change.upserted.iter().map(|it| (it.store_key(), Arc::clone(it))));
            self.objects.retain(|key, _| !change.removed.contains(key));
            for (name, record) in &change.files {
                match record {
                    Some(record) => self.files.insert(name.clone(), record.clone()),
                    None => self.files.remove(name),
                };
            }
        }
        change
    }

    /// What is in force of a policy; a stand-in denies.
    fn says(&self, policy: usize) -> Option<Says> {
        let Resource::NetworkPolicy(policy) = &**self.objects.get(&key(policy))? else { return None };
        Some(if policy.spec.ingress.is_empty() { Says::Deny } else { Says::Allow })
    }
}

fn name(file: usize) -> String {
    format!("{file}.yaml")
}

fn key(policy: usize) -> String {
    format!("resources/NetworkPolicy/default/p{policy}")
}

/// What may be meant by the files, whatever their authors meant: of each file and policy all that it may say.
#[derive(Default)]
struct Oracle {
    /// What each file says of each policy in one reading or another; `None`: nothing.
    readings: BTreeMap<usize, [BTreeSet<Option<Says>>; NAMES]>,
}

impl Oracle {
    fn see(&mut self, before: &Disk, now: &Disk, event: &Event) {
        let known = std::mem::take(&mut self.readings);
        for (file, content) in now {
            let moved = moved_from(event, *file).filter(|from| before.contains_key(from));
            if before.get(file) == Some(content) && known.contains_key(file) {
                self.readings.insert(*file, known[file].clone());
                continue;
            }
            // Who was renamed is who he was.
            let was = moved.unwrap_or(*file);
            let of = |file: usize, policy: usize| known.get(&file).map(|all| all[policy].clone());
            // Put in the place of another, he may be that one, if he was nobody.
            let nobody = |says: &BTreeSet<Option<Says>>| *says != BTreeSet::from([None]);
            let old = |policy| of(was, policy).filter(nobody).or_else(|| of(*file, policy));
            let mut all = std::array::from_fn(|policy| readings(content.as_deref(), policy, old(policy)));
            if matches!(event, Event::Swap(_)) && !is_whole(content) {
                // Of files that all change at once each may hold what any held.
                for old in known.values() {
                    all.iter_mut().zip(old).for_each(|(all, old)| all.extend(old));
                }
            }
            self.readings.insert(*file, all);
        }
    }

    /// Whoever is denied in every reading.
    fn is_denied(&self, policy: usize) -> bool {
        let all: Vec<&BTreeSet<Option<Says>>> = self.readings.values().map(|all| &all[policy]).collect();
        let nobody_allows = all.iter().all(|says| !says.contains(&Some(Says::Allow)));
        nobody_allows && all.iter().any(|says| says.iter().all(|one| *one == Some(Says::Deny)) && !says.is_empty())
    }
}

fn moved_from(event: &Event, file: usize) -> Option<usize> {
    match event {
        Event::Rename(from, to) | Event::RenameBroken(from, to) if *to == file && from != to => Some(*from),
        _ => None,
    }
}

fn readings(
    content: Option<&[Document]>,
    policy: usize,
    old: Option<BTreeSet<Option<Says>>>,
) -> BTreeSet<Option<Says>> {
    let nothing = || BTreeSet::from([None]);
    let Some(content) = content else { return old.unwrap_or_else(nothing) };
    let mut all = BTreeSet::new();
    let first = content.iter().find_map(|one| match one {
        Document::Good(name, says) if *name == policy => Some(*says),
        _ => None,
    });
    let misspelt = content.contains(&Document::Misspelt(policy));
    if misspelt || content.contains(&Document::Garbage) {
        // It says what it said, or what can be read.
        match old {
            // What was never read denies, if it says whom.
            Some(old) if misspelt && old == nothing() => drop(all.insert(Some(Says::Deny))),
            None if misspelt => drop(all.insert(Some(Says::Deny))),
            old => all.extend(old.unwrap_or_else(nothing)),
        }
        if let Some(first) = first {
            all.insert(Some(first));
        }
    } else {
        all.insert(first);
    }
    all
}

/// Every document of the file can be read.
fn is_whole(content: &Option<Vec<Document>>) -> bool {
    content.as_ref().is_some_and(|all| all.iter().all(|document| matches!(document, Document::Good(..))))
}

fn defined(disk: &Disk, policy: usize) -> BTreeSet<Says> {
    let of = |documents: &Vec<Document>| {
        documents.iter().find_map(|document| match document {
            Document::Good(name, says) if *name == policy => Some(*says),
            _ => None,
        })
    };
    disk.values().flatten().filter_map(of).collect()
}

fn check(events: &[Event], restarts: &[bool]) -> Result<(), TestCaseError> {
    let (mut disk, mut away) = (Disk::new(), false);
    let (mut steady, mut restarted) = (Run::default(), Run::default());
    let mut oracle = Oracle::default();
    let back = [Event::Away(false)];
    for (number, event) in events.iter().chain(&back).enumerate() {
        if let Event::Away(now) = event {
            away = *now;
        }
        // What is changed while the folder is away, nobody sees.
        if !away {
            let before = disk.clone();
            change(&mut disk, event);
            oracle.see(&before, &disk, event);
        }
        if restarts.get(number).is_some_and(|it| *it) {
            restarted.restart();
        }
        let changes = steady.look(&disk, away);
        restarted.look(&disk, away);
        for policy in 0..NAMES {
            let says = steady.says(policy);
            prop_assert_eq!(says, restarted.says(policy), "p{} after {} with a restart", policy, number);
            // Denied in every reading, denied in force.
            if oracle.is_denied(policy) {
                prop_assert_eq!(
                    says,
                    Some(Says::Deny),
                    "p{} after {}: {:?} {:?}",
                    policy,
                    number,
                    oracle.readings,
                    changes
                );
            }
            // Where everything can be read, it says what is in force.
            if !away && disk.values().all(is_whole) {
                let defined = defined(&disk, policy);
                let fits = says.map_or(defined.is_empty(), |says| defined.contains(&says));
                prop_assert!(fits, "p{policy} after {number}: {says:?}, and the files say {defined:?}");
            }
        }
        prop_assert_eq!(&steady.objects, &restarted.objects, "after {}", number);
        prop_assert!(!restarted.manifests.files.contains_key(EARLIER));
    }
    Ok(())
}

proptest! {
    /// Whoever is denied in every possible reading is denied; with all files readable the result is theirs; and a
    /// restart makes no difference.
    #[test]
    fn no_order_of_events_opens_what_every_reading_forbids(
        events in prop::collection::vec(event(), 1..14),
        restarts in prop::collection::vec(any::<bool>(), 14),
    ) {
        check(&events, &restarts)?;
    }
}

#[test]
fn who_takes_over_what_is_lost_among_files_does_so_before_a_restart_too() {
    let events = [
        Event::Write(0, vec![Document::Good(1, Says::Allow)]),
        Event::Write(2, vec![Document::Misspelt(1)]),
        Event::Write(3, vec![Document::Good(1, Says::Deny)]),
        Event::RenameBroken(0, 2),
    ];
    check(&events, &[false, false, false, false, true]).unwrap();
}

#[test]
fn what_is_found_again_in_a_file_that_says_it_too_is_read_there_before_a_restart_too() {
    let events = [
        Event::Write(0, vec![Document::Good(1, Says::Deny)]),
        Event::Swap(vec![(1, vec![Document::Misspelt(1), Document::Good(1, Says::Deny)])]),
        Event::Away(false),
        Event::Write(2, vec![Document::Good(1, Says::Allow)]),
    ];
    check(&events, &[false, false, false, true]).unwrap();
}

#[test]
fn a_stand_in_has_its_mark() {
    let mut run = Run::default();
    run.look(&Disk::from([(0, Some(vec![Document::Misspelt(0)]))]), false);
    assert!(run.objects[&key(0)].metadata().annotations.contains_key(STAND_IN));
}
