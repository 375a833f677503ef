use std::time::{Duration, Instant};

use super::*;

fn entry(key: &str, value: &str, revision: u64) -> Entry {
    Entry { key: format!("{}{key}", cirri_store::PREFIX), value: value.into(), revision }
}

fn pod(name: &str, app: &str) -> String {
    format!(
        r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{name}","namespace":"shop","labels":{{"app":"{app}"}}}},"spec":{{"containers":[{{"name":"c"}}]}}}}"#
    )
}

fn ip(node: &str, ip: &str) -> Entry {
    let value = format!(r#"{{"ip":"{ip}","identity":300,"node":"{node}","namespace":"shop","pod":"web"}}"#);
    entry(&format!("ips/{node}/{ip}"), &value, 1)
}

#[test]
fn a_snapshot_replaces_what_was_known_and_says_only_what_differs() {
    let mut view = View::default();
    let first = vec![entry("resources/Pod/shop/a", &pod("a", "x"), 1), entry("identities/id/300", "k8s:app=x", 2)];
    let changes = view.apply(Event::Snapshot(first.clone(), 2));
    assert!(
        matches!(
            changes.as_slice(),
            [Change::Source(_), Change::Workload(_), Change::Labels, Change::IdentityPut(Identity { id: 300 })]
        ),
        "{changes:?}"
    );
    assert!(view.synced && view.revision == 2);
    assert!(view.apply(Event::Snapshot(first, 3)).is_empty());
    let changes = view.apply(Event::Snapshot(vec![], 4));
    let gone =
        |change: &Change| matches!(change, Change::SourceGone(kind, Some(_), name) if kind == "Pod" && name == "a");
    assert!(changes.iter().any(gone), "{changes:?}");
    assert!(view.pods.is_empty());
}

#[test]
fn a_broken_value_keeps_the_last_good_one_and_is_reported() {
    let mut view = View::default();
    view.apply(Event::Put(entry("resources/Pod/shop/a", &pod("a", "x"), 1)));
    view.apply(Event::Put(entry("resources/Pod/shop/a", "{", 2)));
    assert_eq!((view.pods.len(), view.problems.len()), (1, 1));
    let said: Vec<(String, String)> = view.problems().collect();
    assert_eq!(said[0].0, "Pod shop/a");
    assert!(said[0].1.starts_with("cannot be read, its last good content holds: "), "{said:?}");
    view.apply(Event::Put(entry("resources/Pod/shop/a", &pod("a", "y"), 3)));
    assert_eq!(view.problems().count(), 0);
}

const ALL: [(&str, &str); 6] = [
    (
        "resources/NetworkPolicy/shop/deny",
        r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"deny","namespace":"shop"},"spec":{"podSelector":{},"policyTypes":["Ingress"]}}"#,
    ),
    ("resources/Namespace/_/shop", r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"shop"}}"#),
    (
        "resources/Pod/shop/a",
        r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a","namespace":"shop"},"spec":{"containers":[{"name":"c"}]}}"#,
    ),
    ("identities/id/300", "k8s:app=x"),
    ("nodes/a", r#"{"name":"a","v4":"192.0.2.1","v6":null,"pod_v4":null,"pod_v6":null}"#),
    ("ips/a/10.0.0.1", r#"{"ip":"10.0.0.1","identity":300,"node":"a","namespace":"shop","pod":"web"}"#),
];

fn known(view: &View) -> [usize; 6] {
    let identity = view.identities.labels(Identity { id: 300 });
    [
        view.policies.len(),
        view.namespaces.len(),
        view.pods.len(),
        usize::from(identity.is_some()),
        view.nodes.len(),
        view.ips.len(),
    ]
}

/// What an agent saves while these events come; policies are taken as they come.
fn saved(view: &mut View, events: impl IntoIterator<Item = Event>, file: &mut BTreeMap<String, Vec<u8>>) {
    for event in events {
        for change in view.apply(event) {
            if let Change::PolicyPut(named, text) = change {
                view.save_policy(&named, text);
            }
        }
        for (key, value) in view.take_unsaved() {
            match value {
                Some(value) => file.insert(key, value),
                None => file.remove(&key),
            };
        }
    }
}

#[test]
fn what_was_good_outlives_the_agent_whatever_object_it_is_until_it_is_gone_or_readable() {
    for spoilt in ["", "{", "\u{0}", "null", "[]", r#"{"name":"b"}"#, r#"{"kind":"Pod"}"#] {
        let good = ALL.map(|(key, value)| entry(key, value, 1));
        let broken = ALL.map(|(key, _)| entry(key, spoilt, 2));
        let mut file = BTreeMap::new();
        saved(&mut View::default(), [Event::Snapshot(good.to_vec(), 1)], &mut file);
        assert_eq!(file.len(), ALL.len());

        // Spoilt while the agent is away, or while it runs and then restarts: twice.
        for _ in 0..2 {
            let mut view = View::default();
            for (key, value) in file.clone() {
                view.restore(key, value);
            }
            assert!(!view.synced, "the store was not seen");
            saved(&mut view, [Event::Snapshot(broken.to_vec(), 2)], &mut file);
            assert_eq!(known(&view), [1; 6], "{spoilt:?}");
            assert_eq!(view.problems().count(), 6, "{spoilt:?}");
            saved(&mut view, broken.clone().map(Event::Put), &mut file);
            assert_eq!((known(&view), file.len()), ([1; 6], 6), "{spoilt:?}");
        }
        let mut view = View::default();
        for (key, value) in file.clone() {
            view.restore(key, value);
        }
        let deletions = ALL.map(|(key, _)| Event::Delete { key: entry(key, "", 0).key, revision: 3 });
        saved(&mut view, [Event::Snapshot(broken.to_vec(), 2)].into_iter().chain(deletions), &mut file);
        assert_eq!((known(&view), file.len(), view.problems().count()), ([0; 6], 0, 0), "{spoilt:?}");
    }
}

#[test]
fn what_went_while_the_agent_was_away_is_gone_and_a_refused_policy_keeps_its_last_good_text() {
    let mut file = BTreeMap::new();
    let good = ALL.map(|(key, value)| entry(key, value, 1));
    saved(&mut View::default(), [Event::Snapshot(good.to_vec(), 1)], &mut file);
    let mut view = View::default();
    for (key, value) in file.clone() {
        view.restore(key, value);
    }
    let changed = ALL[0].1.replace("Ingress", "Egress");
    view.apply(Event::Put(entry(ALL[0].0, &changed, 2)));
    // Nobody took it.
    assert_eq!(view.take_unsaved(), []);
    saved(&mut view, [Event::Snapshot(Vec::new(), 3)], &mut file);
    assert_eq!((known(&view), file.len()), ([0; 6], 0));
}

#[test]
fn a_policy_that_was_never_readable_closes_whom_it_selects_and_does_so_after_a_restart() {
    let broken = ALL[0].1.replace(r#""podSelector":{}"#, r#""podSelector":{"matchLabels":{"app":"vault"}},"portz":[]"#);
    let isolates = |view: &View| {
        let (policy, _) = view.policies.values().next().expect("a stand-in");
        let spec = &policy.spec;
        assert!(spec.ingress.is_empty() && spec.egress.is_empty(), "{spec:?}");
        assert_eq!(spec.pod_selector.match_labels.get("app").map(String::as_str), Some("vault"));
    };
    let mut file = BTreeMap::new();
    let mut view = View::default();
    saved(&mut view, [Event::Snapshot(vec![entry(ALL[0].0, &broken, 1)], 1)], &mut file);
    isolates(&view);
    let said: Vec<(String, String)> = view.problems().collect();
    assert!(said[0].1.contains("never known"), "{said:?}");
    assert!(!view.lacks_policy("shop"));

    // Another version that cannot be used either.
    let other = broken.replace("vault", "safe");
    saved(&mut view, [Event::Put(entry(ALL[0].0, &other, 2))], &mut file);
    assert!(view.policies.values().all(|(policy, _)| policy.spec.pod_selector.match_labels["app"] == "safe"));
    saved(&mut view, [Event::Put(entry(ALL[0].0, &broken, 3))], &mut file);

    // Then nothing of it can be read any more, and the agent starts anew.
    let mut view = View::default();
    for (key, value) in file.clone() {
        view.restore(key, value);
    }
    saved(&mut view, [Event::Snapshot(vec![entry(ALL[0].0, "{", 2)], 2)], &mut file);
    isolates(&view);
    assert!(view.problems().next().is_some_and(|(_, why)| why.contains("never known")));
    saved(&mut view, [Event::Put(entry(ALL[0].0, ALL[0].1, 3))], &mut file);
    assert_eq!(view.problems().count(), 0);
    assert!(view.policies.values().all(|(policy, _)| policy.spec.pod_selector.match_labels.is_empty()));
    saved(&mut view, [Event::Snapshot(Vec::new(), 4)], &mut file);
    assert_eq!((known(&view), file.len()), ([0; 6], 0));
}

#[test]
fn revisions_of_what_an_earlier_run_saved_are_learnt_from_the_store() {
    let mut view = View::default();
    view.restore(entry("identities/id/300", "", 0).key, b"k8s:app=x".to_vec());
    assert_eq!(view.identity_revisions[&300], 0);
    let stored = entry("identities/id/300", "k8s:app=x", 22);
    let changes = view.apply(Event::Snapshot(vec![stored.clone()], 30));
    assert!(matches!(changes.as_slice(), [Change::IdentityPut(Identity { id: 300 })]), "{changes:?}");
    assert_eq!(view.identity_revisions[&300], 22);
    assert!(view.apply(Event::Snapshot(vec![stored], 31)).is_empty(), "nothing is news twice");
}

#[test]
fn a_value_under_anothers_key_is_not_read() {
    let mut view = View::default();
    view.apply(Event::Put(entry("resources/Pod/shop/a", &pod("b", "x"), 1)));
    view.apply(Event::Put(entry("resources/Pod/shop/c", ALL[0].1, 1)));
    view.apply(Event::Put(Entry { key: ip("a", "10.0.0.1").key, ..ip("b", "10.0.0.1") }));
    assert_eq!(known(&view), [0; 6]);
    assert_eq!(view.problems().count(), 3);
}

#[test]
fn an_address_that_moved_is_not_taken_away_by_its_old_node() {
    let mut view = View::default();
    view.apply(Event::Put(ip("a", "10.0.0.1")));
    view.apply(Event::Put(ip("b", "10.0.0.1")));
    view.apply(Event::Delete { key: ip("a", "10.0.0.1").key, revision: 3 });
    assert_eq!(view.ips.values().map(|record| record.node.as_str()).collect::<Vec<_>>(), ["b"]);
    let web = ("shop".to_owned(), "web".to_owned());
    assert_eq!(view.records_of(&web).count(), 1);
    view.apply(Event::Delete { key: ip("b", "10.0.0.1").key, revision: 4 });
    assert!(view.ips.is_empty() && view.records_of(&web).count() == 0);
}

#[test]
fn reserved_numbers_cannot_be_given_away() {
    let mut view = View::default();
    assert!(view.apply(Event::Put(entry("identities/id/1", "k8s:app=x", 1))).is_empty());
}

fn with_id(id: &str, entries: &[Entry]) -> Vec<Entry> {
    entries.iter().cloned().chain([entry("store-id", id, 1)]).collect()
}

fn restarted(file: &BTreeMap<String, Vec<u8>>) -> View {
    let mut view = View::default();
    for (key, value) in file.clone() {
        view.restore(key, value);
    }
    view
}

#[test]
fn what_another_store_lacks_stays_over_restarts_until_it_is_written_or_said_to_be_deleted() {
    let good = ALL.map(|(key, value)| entry(key, value, 7));
    let mut seen = BTreeMap::new();
    saved(&mut View::default(), [Event::Snapshot(with_id("one", &good), 7)], &mut seen);

    // Its data are lost while agents run, or while they are away; nobody or somebody gave it an id by then.
    for empty in [Vec::new(), with_id("two", &[])] {
        let mut file = seen.clone();
        let mut view = restarted(&file);
        for _ in 0..2 {
            saved(&mut view, [Event::Snapshot(empty.clone(), 2)], &mut file);
            assert_eq!(known(&view), [1; 6]);
            assert!(view.missing().is_some_and(|it| {
                it.objects.starts_with("3 of the objects in force (Namespace shop, ") && it.id == "one"
            }));
            assert!(view.policies.values().all(|(_, revision)| *revision == 0) && view.identity_revisions.is_empty());
            assert_eq!(view.value(&good[4].key), None, "its node has to write it again");
            saved(&mut view, [Event::Put(entry("store-id", "two", 3))], &mut file);
            view = restarted(&file);
        }
        // It is filled again: what was written is held no more, and can be deleted.
        saved(&mut view, [Event::Snapshot(empty, 3), Event::Put(entry("store-id", "two", 3))], &mut file);
        let gone = Event::Delete { key: good[0].key.clone(), revision: 5 };
        saved(&mut view, [Event::Put(entry(ALL[0].0, ALL[0].1, 4)), gone], &mut file);
        assert_eq!(known(&view), [0, 1, 1, 1, 1, 1]);

        let mut filled = view;
        let mut other = file.clone();
        saved(&mut filled, good.iter().cloned().map(Event::Put), &mut other);
        assert_eq!(filled.missing(), None);
        let mut view = restarted(&other);
        saved(&mut view, [Event::Snapshot(with_id("two", &[]), 9)], &mut other);
        assert_eq!(known(&view), [0; 6], "a deletion in the store that is known");

        // Or somebody says that nothing else was meant to be there.
        let mut view = restarted(&file);
        saved(&mut view, [Event::Snapshot(with_id("two", &[]), 6)], &mut file);
        assert_eq!(known(&view), [0, 1, 1, 1, 1, 1]);
        saved(&mut view, [Event::Put(entry("store-id", "one", 7))], &mut file);
        assert_eq!((known(&view), file.len()), ([0; 6], 1));
    }
}

#[test]
fn the_same_store_with_older_data_is_followed_and_one_without_an_id_as_before() {
    let good = ALL.map(|(key, value)| entry(key, value, 7));
    for id in [Some("one"), None] {
        let of = |entries: &[Entry]| id.map_or_else(|| entries.to_vec(), |id| with_id(id, entries));
        let mut file = BTreeMap::new();
        let mut view = View::default();
        saved(&mut view, [Event::Snapshot(of(&good), 9), Event::Snapshot(of(&good[..2]), 3)], &mut file);
        assert_eq!((known(&view), view.revision), ([1, 1, 0, 0, 0, 0], 3));
        assert_eq!(view.missing(), None);
        let mut view = restarted(&file);
        saved(&mut view, [Event::Snapshot(of(&[]), 2)], &mut file);
        assert_eq!((known(&view), view.missing()), ([0; 6], None));
    }
}

#[test]
fn what_agents_wrote_is_held_as_long_as_their_leases_last_while_the_store_answers() {
    let good = ALL.map(|(key, value)| entry(key, value, 7));
    let mut view = View::default();
    let others = |id: &str| Event::Snapshot(with_id(id, &good[..2]), 2);
    saved(&mut view, [Event::Snapshot(with_id("one", &good), 7), others("two")], &mut BTreeMap::new());
    let (start, lease) = (Instant::now(), Duration::from_secs(900));
    let at = |seconds: u64| start + Duration::from_secs(seconds);
    let held = |view: &mut View, answers: bool, seconds: u64| {
        view.end_records(answers, lease, at(seconds));
        known(view)[3..] == [1; 3]
    };
    // The Pod is missing: perhaps nobody else writes into this store.
    assert!(held(&mut view, true, 0) && held(&mut view, true, 2000));
    view.apply(Event::Put(good[2].clone()));
    assert!(held(&mut view, true, 2000) && held(&mut view, true, 2899));
    // It does not answer for longer than that, and then is another one again.
    assert!(held(&mut view, false, 2901) && held(&mut view, false, 9000));
    assert!(held(&mut view, true, 9001) && held(&mut view, true, 9900));
    view.apply(Event::Snapshot(with_id("three", &good[..3]), 3));
    assert!(held(&mut view, true, 9902) && held(&mut view, true, 10_801));
    // One node is at work and has written its record.
    view.apply(Event::Put(good[4].clone()));
    view.end_records(true, lease, at(10_802));
    assert_eq!(known(&view), [1, 1, 1, 0, 1, 0]);
    assert!(view.end_records(true, lease, at(99_999)).is_empty());
}

#[test]
fn a_policy_that_was_never_readable_keeps_what_it_may_have_closed_in_another_store_too() {
    let policy = "resources/NetworkPolicy/shop/deny";
    for restarts in [false, true] {
        let (mut view, mut file) = (View::default(), BTreeMap::new());
        saved(&mut view, [Event::Snapshot(with_id("one", &[entry(policy, "{", 1)]), 1)], &mut file);
        assert!(view.lacks_policy("shop"));
        if restarts {
            view = restarted(&file);
            assert!(view.lacks_policy("shop"));
        }
        saved(&mut view, [Event::Snapshot(with_id("two", &[]), 2)], &mut file);
        assert!(view.lacks_policy("shop") && view.missing().is_some_and(|it| it.objects.contains("shop/deny")));
        let gone = Event::Delete { key: entry(policy, "", 0).key, revision: 3 };
        saved(&mut view, [gone], &mut file);
        assert!(!view.lacks_policy("shop") && view.missing().is_none());
        assert_eq!(file.keys().collect::<Vec<_>>(), [STORE_ID]);
    }
}

#[test]
fn a_refused_policy_is_known_after_a_restart_over_whatever_store_until_it_is_gone_or_taken() {
    let good = entry(ALL[0].0, ALL[0].1, 1);
    let refused = entry(ALL[0].0, &ALL[0].1.replace("Ingress", "Egress"), 2);
    let is_saved = |key: &&String| records::refused_resource(key).is_some();
    for has_last_good in [false, true] {
        let (mut view, mut file) = (View::default(), BTreeMap::new());
        let first = if has_last_good { vec![good.clone()] } else { Vec::new() };
        saved(&mut view, [Event::Snapshot(with_id("one", &first), 1)], &mut file);
        let [Change::PolicyPut(named, text)] = &view.apply(Event::Put(refused.clone()))[..] else { panic!() };
        view.save_refused(named, text.clone());
        saved(&mut view, [Event::Progress(2)], &mut file);
        assert_eq!(file.get(&good.key), has_last_good.then_some(&good.value), "what is in force");

        // In force first, then what is refused: as [`Core::restore`] does.
        let again = |file: &BTreeMap<String, Vec<u8>>| {
            let mut view = restarted(&file.iter().filter(|(key, _)| !is_saved(key)).map(owned).collect());
            let mut changes = Vec::new();
            for (key, value) in file.iter().filter(|(key, _)| is_saved(key)).map(owned) {
                changes.extend(view.restore(key, value));
            }
            assert!(matches!(&changes[..], [Change::PolicyPut(_, text)] if *text == refused.value), "{changes:?}");
            view
        };
        let mut view = again(&file);
        let same = Event::Snapshot(with_id("one", std::slice::from_ref(&refused)), 3);
        assert!(view.apply(same).is_empty(), "it is known");
        let mut view = again(&file);
        saved(&mut view, [Event::Snapshot(with_id("two", &[]), 3)], &mut file);
        assert!(view.missing().is_some() && view.policies.len() == 1);
        again(&file);
        let mut other = file.clone();
        saved(&mut view, [Event::Put(entry(ALL[0].0, ALL[0].1, 4))], &mut other);
        assert_eq!((other.keys().find(is_saved), other.get(&good.key)), (None, Some(&good.value)));
        saved(&mut again(&file), [Event::Snapshot(with_id("one", &[]), 5)], &mut file);
        assert_eq!(file.keys().collect::<Vec<_>>(), [STORE_ID]);
    }
    // Written into the store by somebody, it says nothing.
    let mut file = BTreeMap::new();
    saved(&mut View::default(), [Event::Put(entry("refused/shop/deny", ALL[0].1, 1))], &mut file);
    assert!(file.is_empty());
}

fn owned((key, value): (&String, &Vec<u8>)) -> (String, Vec<u8>) {
    (key.clone(), value.clone())
}
