use cirri_control::resource::parse_documents;

use super::*;

fn namespace(name: &str, label: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels: {{is: {label}}}\n")
}

fn names(change: &Change) -> Vec<&str> {
    change.upserted.iter().map(|resource| resource.name()).collect()
}

#[test]
fn a_broken_file_keeps_its_last_good_content_and_says_why() {
    let mut manifests = Manifests::default();
    manifests.set("a.yaml", Ok(namespace("one", "x").as_bytes()));
    assert_eq!(names(&manifests.settle().expect("new")), ["one"]);

    manifests.set("a.yaml", Ok(b"kind: [half"));
    let change = manifests.settle().expect("an error");
    assert!(change.upserted.is_empty() && change.removed.is_empty());
    assert_eq!(change.errors.len(), 1);
    assert_eq!(change.errors[0].file, "a.yaml");
    assert!(manifests.is_broken("a.yaml"));

    manifests.set("a.yaml", Ok(namespace("two", "x").as_bytes()));
    let change = manifests.settle().expect("mended");
    assert_eq!(names(&change), ["two"]);
    assert_eq!(change.removed, ["resources/Namespace/_/one"]);
    assert!(change.errors.is_empty());
}

#[test]
fn of_two_files_that_define_one_object_the_later_is_refused_and_both_are_named() {
    let mut manifests = Manifests::default();
    manifests.set("b.yaml", Ok(namespace("one", "b").as_bytes()));
    manifests.settle();
    // Sorts first, but came second.
    manifests.set("a.yaml", Ok(namespace("one", "a").as_bytes()));
    let change = manifests.settle().expect("an error");
    assert!(change.upserted.is_empty());
    let error = &change.errors[0];
    assert_eq!(error.file, "a.yaml");
    assert!(error.message.contains("a.yaml") && error.message.contains("b.yaml"));

    manifests.remove("b.yaml");
    let change = manifests.settle().expect("the other takes over");
    assert_eq!(names(&change), ["one"]);
    assert!(change.removed.is_empty() && change.errors.is_empty());
}

#[test]
fn of_two_definitions_in_one_file_the_first_is_used() {
    let mut manifests = Manifests::default();
    let both = format!("{}---\n{}", namespace("one", "first"), namespace("one", "second"));
    manifests.set("a.yaml", Ok(both.as_bytes()));
    let change = manifests.settle().expect("new");
    assert_eq!(names(&change), ["one"]);
    assert!(change.upserted[0].to_json().contains("first"));
    assert!(change.errors[0].message.contains("earlier in this file"));
}

#[test]
fn what_says_the_same_in_other_words_is_no_change() {
    let mut manifests = Manifests::default();
    manifests.set("a.yaml", Ok(namespace("one", "x").as_bytes()));
    manifests.settle();
    let commented = format!("# hello\n{}", namespace("one", "x"));
    manifests.set("a.yaml", Ok(commented.as_bytes()));
    assert!(manifests.settle().is_none());
}

fn policy(name: &str, label: &str, port: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}}}\n\
         spec: {{podSelector: {{matchLabels: {{app: {label}}}}}, ingress: [{{ports: [{{port: {port}}}]}}]}}\n"
    )
}

fn many(documents: &[String]) -> Vec<u8> {
    documents.join("\n---\n").into_bytes()
}

const KEY: &str = "resources/NetworkPolicy/default/";

#[test]
fn one_document_that_cannot_be_used_takes_no_other_with_it_and_keeps_its_last_good_version() {
    let mut manifests = Manifests::default();
    let good: Vec<String> = (0..10).map(|i| policy(&format!("p{i}"), "a", "80")).collect();
    manifests.set("a.yaml", Ok(&many(&good)));
    assert_eq!(manifests.settle().expect("new").upserted.len(), 10);

    for broken in [policy("p4", "b", "0"), "kind: [".to_owned(), "kind: \"half".to_owned(), "words".to_owned()] {
        let label = format!("b{}", broken.len());
        let mut all: Vec<String> = (0..10).map(|i| policy(&format!("p{i}"), &label, "80")).collect();
        all[4].clone_from(&broken);
        manifests.set("a.yaml", Ok(&many(&all)));
        let change = manifests.settle().expect("new");
        assert_eq!(change.upserted.len(), 9, "{broken}");
        assert!(change.removed.is_empty(), "{broken}: {change:?}");
        assert_eq!(change.errors.len(), 1, "{broken}");
    }
    // Mended without one that is gone meanwhile: only now is it known to be gone.
    manifests.set("a.yaml", Ok(&many(&good[..4])));
    assert_eq!(manifests.settle().expect("gone").removed.len(), 6);
}

#[test]
fn what_is_gone_beside_a_document_that_names_itself_is_gone() {
    let mut manifests = Manifests::default();
    manifests.set("a.yaml", Ok(&many(&[policy("p1", "a", "80"), policy("p2", "a", "80")])));
    manifests.settle();
    manifests.set("a.yaml", Ok(policy("p1", "a", "0").as_bytes()));
    assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p2")]);
    manifests.set("a.yaml", Ok(b"# none"));
    assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p1")]);
}

#[test]
fn a_document_that_breaks_while_it_moves_keeps_its_last_good_version() {
    for broken in [policy("p", "a", "0"), "kind: [".to_owned()] {
        let mut manifests = Manifests::default();
        manifests.set("a.yaml", Ok(policy("p", "a", "80").as_bytes()));
        manifests.settle();
        manifests.remove("a.yaml");
        manifests.set("b.yaml", Ok(broken.as_bytes()));
        let change = manifests.settle().expect("an error");
        assert!(change.removed.is_empty() && change.upserted.is_empty(), "{broken}: {change:?}");
        // It is renamed again.
        manifests.remove("b.yaml");
        manifests.set("c.yaml", Ok(broken.as_bytes()));
        assert!(manifests.settle().expect("an error").removed.is_empty(), "{broken}");
        manifests.remove("c.yaml");
        assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p")], "{broken}");
    }
}

#[test]
fn what_leaves_stays_until_it_is_removed_and_another_may_take_over() {
    let mut manifests = Manifests::default();
    manifests.set("a.yaml", Ok(&many(&[policy("p1", "a", "80"), policy("p2", "a", "80")])));
    manifests.settle();
    assert!(manifests.leave("a.yaml") && !manifests.leave("b.yaml"));
    assert!(manifests.settle().is_none());
    manifests.set("b.yaml", Ok(policy("p1", "b", "80").as_bytes()));
    let change = manifests.settle().expect("new");
    assert_eq!((change.upserted.len(), change.errors.len()), (1, 0), "{change:?}");
    manifests.set("c.yaml", Ok(b"kind: ["));
    manifests.settle();
    manifests.remove("a.yaml");
    let change = manifests.settle().unwrap_or_default();
    assert!(change.removed.is_empty() && change.upserted.is_empty(), "the broken one may be the other: {change:?}");
    manifests.remove("c.yaml");
    assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p2")]);
}

#[test]
fn what_was_broken_for_long_does_not_keep_what_is_removed_elsewhere() {
    let mut manifests = Manifests::default();
    manifests.set("a.yaml", Ok(policy("p", "a", "80").as_bytes()));
    manifests.set("b.yaml", Ok(b"kind: ["));
    manifests.settle();
    manifests.remove("a.yaml");
    assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p")]);
}

#[test]
fn without_a_good_version_what_is_sure_stands_in_until_there_is_one() {
    let mut manifests = Manifests::default();
    manifests.set("a.yaml", Ok(policy("p", "a", "0").as_bytes()));
    let change = manifests.settle().expect("new");
    let [stand_in] = &change.upserted[..] else { panic!("{change:?}") };
    let Resource::NetworkPolicy(stand_in) = &**stand_in else { panic!("{stand_in:?}") };
    assert!(stand_in.spec.ingress.is_empty());
    // Another file has a good one.
    manifests.set("b.yaml", Ok(policy("p", "a", "80").as_bytes()));
    let change = manifests.settle().expect("good");
    assert_eq!(change.upserted.len(), 1);
    // It goes, and what is left says what it said before.
    manifests.remove("b.yaml");
    let change = manifests.settle().expect("the stand-in");
    assert!(change.upserted[0].metadata().annotations.contains_key(STAND_IN), "{change:?}");
    manifests.remove("a.yaml");
    assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p")]);
}

#[test]
fn an_object_that_was_never_understood_is_gone_when_its_document_is() {
    let mut manifests = Manifests::default();
    manifests.set("a.yaml", Ok(policy("p", "5", "80").as_bytes()));
    let change = manifests.settle().expect("new");
    assert!(change.upserted.is_empty() && change.errors.len() == 1, "{change:?}");
    manifests.remove("a.yaml");
    let change = manifests.settle().expect("no error");
    assert!(change.removed.is_empty() && change.errors.is_empty(), "{change:?}");
}

#[test]
fn a_file_that_cannot_be_read_keeps_all_that_it_held() {
    let mut manifests = Manifests::default();
    manifests.set("a.yaml", Ok(&many(&[policy("p1", "a", "80"), policy("p2", "a", "80")])));
    manifests.settle();
    manifests.set("a.yaml", Err("a.yaml: cannot be read".to_owned()));
    let change = manifests.settle().expect("an error");
    assert!(change.removed.is_empty(), "{change:?}");
}

proptest::proptest! {
    /// An object is removed only when no document can be it any more.
    #[test]
    fn nothing_is_removed_that_a_document_may_still_be(
        steps in proptest::collection::vec((0..3usize, proptest::collection::vec((0..4usize, 0..4usize), 0..4)), 1..12)
    ) {
        let mut manifests = Manifests::default();
        let mut held = BTreeSet::new();
        for (file, documents) in steps {
            let said: Vec<String> = documents.iter().map(|(name, state)| match state {
                0 | 1 => policy(&format!("p{name}"), "a", "80"),
                2 => policy(&format!("p{name}"), "a", "0"),
                _ => "kind: [".to_owned(),
            } ).collect();
            manifests.set(&format!("{file}.yaml"), Ok(&many(&said)));
            let change = manifests.settle().unwrap_or_default();
            for resource in &change.upserted {
                held.insert(resource.store_key());
            }
            for key in &change.removed {
                held.remove(key);
                // What this file says now is neither it nor may be it.
                let is_it = |(name, state): &(usize, usize)| *state == 3 || format!("{KEY}p{name}") == *key;
                proptest::prop_assert!(!documents.iter().any(is_it), "{}", key);
            }
            // What is good is in force.
            for (name, _) in documents.iter().filter(|(_, state)| *state < 2) {
                let key = format!("{KEY}p{name}");
                proptest::prop_assert!(held.contains(&key), "{}", key);
            }
            // Nothing was overlooked that did not seem to change.
            manifests.touched = manifests.mentions.keys().chain(manifests.owners.keys()).cloned().collect();
            proptest::prop_assert_eq!(manifests.settle(), None);
        }
    }
}

#[test]
fn an_empty_file_takes_nothing_away() {
    let mut manifests = Manifests::default();
    manifests.set("a.yaml", Ok(policy("p", "a", "80").as_bytes()));
    manifests.settle();
    for empty in [&b""[..], b" \n\t\n", b"---\n", b"---\nnull\n...\n", "\u{feff}".as_bytes(), b"~"] {
        manifests.set("a.yaml", Ok(empty));
        if let Some(change) = manifests.settle() {
            assert!(change.removed.is_empty() && change.errors[0].message.contains("is empty"), "{change:?}");
        }
    }
    manifests.set("a.yaml", Ok(b"# nothing\n"));
    assert_eq!(manifests.settle().expect("gone").removed, [format!("{KEY}p")]);
}

/// What an earlier version handed out, which did not write down what files it is from, as far as it can be read.
fn earlier(before: &[(&str, Option<&str>)]) -> Manifests {
    let read = |text: &str| parse_documents("before", text).expect("a resource").remove(0);
    let objects = before.iter().map(|(name, text)| (format!("{KEY}{name}"), text.map(read)));
    Manifests::new(Path::new(""), Memory { objects: objects.collect(), ..Memory::default() })
}

/// What a run hands out that begins with it.
fn after(before: &[(&str, Option<&str>)], files: &[(&str, &[u8])]) -> Change {
    let mut manifests = earlier(before);
    files.iter().for_each(|(name, bytes)| manifests.set(name, Ok(bytes)));
    let mut change = manifests.settle().unwrap_or_default();
    manifests.remove(EARLIER);
    let then = manifests.settle().unwrap_or_default();
    change.upserted.extend(then.upserted);
    let errors = manifests.nothing_new().errors;
    Change { removed: then.removed, errors, upserted: change.upserted, ..Change::default() }
}

#[test]
fn what_an_earlier_run_handed_out_goes_only_when_no_document_is_it_or_may_be() {
    let (good, broken) = (policy("p", "a", "80"), policy("p", "a", "0"));
    let before = [("p", Some(good.as_str()))];
    assert_eq!(after(&before, &[]).removed, [format!("{KEY}p")]);
    assert_eq!(after(&before, &[("a.yaml", good.as_bytes())]), Change::default());
    for file in [broken.as_bytes(), b"kind: [", b""] {
        let change = after(&before, &[("a.yaml", file)]);
        assert!(change.removed.is_empty() && change.upserted.is_empty() && !change.errors.is_empty(), "{change:?}");
    }
    // What cannot be read any more is no last good version.
    let change = after(&[("p", None)], &[("a.yaml", broken.as_bytes())]);
    assert!(change.upserted[0].metadata().annotations.contains_key(STAND_IN), "{change:?}");
    assert_eq!(after(&[("p", None)], &[("a.yaml", good.as_bytes())]).upserted.len(), 1);
    assert_eq!(after(&[("p", None)], &[]).removed.len(), 1);
}

#[test]
fn of_two_files_that_define_one_object_the_one_that_was_in_force_stays_so() {
    let (strict, lax) = (policy("p", "a", "80"), policy("p", "b", "81"));
    let files = [("a.yaml", lax.as_bytes()), ("b.yaml", strict.as_bytes())];
    let change = after(&[("p", Some(&strict))], &files);
    assert!(change.upserted.is_empty() && change.removed.is_empty(), "{change:?}");
    assert_eq!(change.errors[0].file, "a.yaml");
}

#[test]
fn a_stand_in_of_an_earlier_run_is_no_last_good_version() {
    let broken = policy("p", "a", "0");
    let first = after(&[], &[("a.yaml", broken.as_bytes())]);
    let stored = first.upserted[0].to_json();
    let before = [("p", Some(stored.as_str()))];
    assert!(after(&before, &[("a.yaml", broken.as_bytes())]).upserted.is_empty());
    let better = policy("p", "b", "0");
    assert_eq!(after(&before, &[("a.yaml", better.as_bytes())]).upserted.len(), 1);
}
