use super::*;
use proptest::prelude::*;

const POD: &str =
    "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop}\nspec: {containers: [{name: c}]}\n";

fn namespace(name: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n")
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}

fn read(text: &str) -> Documents {
    read_documents("f.yaml", text.as_bytes())
}

fn names(documents: &Documents) -> Vec<&str> {
    documents.resources.iter().map(Resource::name).collect()
}

fn errors(documents: &Documents) -> Vec<String> {
    documents.errors.iter().map(ToString::to_string).collect()
}

#[test]
fn a_kind_of_another_program_is_named_and_takes_nothing_with_it() {
    let foreign =
        "apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata: {name: x}\nspec: [[[\n";
    let foreign = foreign.replace("[[[", "{anything: [1]}");
    let documents = read(&format!("{}---\n{foreign}---\n{}", namespace("one"), namespace("two")));
    assert_eq!(names(&documents), ["one", "two"]);
    assert!(!documents.opaque && documents.unreadable.is_empty());
    let errors = errors(&documents);
    assert_eq!(errors.len(), 1);
    assert!(errors[0].starts_with("f.yaml:7:7: kind: \"CustomResourceDefinition\" is not a kind"), "{errors:?}");
    // Of the same name, but of another group.
    let knative = "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: web}\nspec: {template: {}}\n";
    let documents = read(&format!("{knative}---\n{}", namespace("one")));
    assert_eq!((names(&documents), documents.opaque), (vec!["one"], false));
    assert!(errors_of(&documents).contains("Service of serving.knative.dev/v1"), "{documents:?}");
}

fn errors_of(documents: &Documents) -> String {
    errors(documents).join("\n")
}

#[test]
fn one_invalid_document_among_good_ones_is_named_with_its_object() {
    let documents = read(&format!(
        "{}---\n{}---\n{}",
        namespace("one"),
        policy("p", "{podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 0}]}]}"),
        namespace("two")
    ));
    assert_eq!(names(&documents), ["one", "two"]);
    assert_eq!(documents.unreadable, BTreeSet::from(["resources/NetworkPolicy/shop/p".to_owned()]));
    assert!(!documents.opaque);
    let text = errors_of(&documents);
    assert!(
        text.starts_with("f.yaml:9:") && text.contains("NetworkPolicy shop/p: spec.ingress[0].ports[0].port"),
        "{text}"
    );
}

#[test]
fn what_is_between_two_markers_cannot_break_what_is_before_or_after() {
    let broken = [
        "kind: [",
        "a: \"never closed",
        "a: 'never closed",
        "{",
        "\tkind: Pod",
        "a: b: c",
        "a: *nobody",
        "a: 1\na: 2",
        "? [",
        "!!binary |\n  ???: - {",
        "%YAML 9.9",
        "just words",
        "- a\n- b",
        "kind: Pod",
        "kind: 5\napiVersion: v1",
        "metadata: {name: x}",
    ];
    for broken in broken {
        let documents = read(&format!("{}---\n{broken}\n---\n{}", namespace("one"), namespace("two")));
        assert_eq!(names(&documents), ["one", "two"], "{broken}");
        assert!(documents.opaque && documents.errors.len() == 1, "{broken}: {documents:?}");
        let line = documents.errors[0].position().line;
        assert!((6..=8).contains(&line), "{broken}: {documents:?}");
    }
    let invalid = [namespace("one").as_bytes(), b"---\nkind: \xff\xfe\n---\n", namespace("two").as_bytes()].concat();
    let documents = read_documents("f.yaml", &invalid);
    assert_eq!((names(&documents), documents.opaque), (vec!["one", "two"], true));
    assert!(errors_of(&documents).starts_with("f.yaml:6: not valid YAML: it is not UTF-8"), "{documents:?}");
}

#[test]
fn an_item_of_a_list_stands_for_itself() {
    let text = "apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: one}}
- {apiVersion: v1, kind: Namespace, metadata: {name: BAD}}
- {apiVersion: apps/v1, kind: Deployment, metadata: {name: web}}
- {apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}, spec: {podSelector: 5}}
- {apiVersion: v1, kind: Namespace, metadata: {name: two}}
";
    let documents = read(text);
    assert_eq!(names(&documents), ["one", "two"]);
    assert_eq!(documents.errors.iter().map(|error| error.position().line).collect::<Vec<_>>(), [5, 6, 7]);
    assert!(documents.opaque, "the second may be any");
    assert!(documents.unreadable.contains("resources/NetworkPolicy/default/p"), "{documents:?}");
    assert!(documents.stand_ins.is_empty(), "nothing says whom it selects");
}

#[test]
fn what_was_understood_and_what_was_not_is_known_by_its_place() {
    let broken = policy("p", "{podSelector: {}, wrong: 1}");
    let text = format!("{}---\n{broken}---\n{}---\n{broken}", namespace("one"), POD);
    let documents = read(&text);
    let lines: Vec<u64> = documents.places.iter().map(|place| place.line).collect();
    assert_eq!((names(&documents), lines), (vec!["one", "web"], vec![1, 11]));
    let named: Vec<(&str, u64)> = documents.named.iter().map(|(key, place)| (key.as_str(), place.line)).collect();
    assert_eq!(named, [("resources/NetworkPolicy/shop/p", 6)]);
    // It may be any object of its name, and is none for sure.
    let vague = read("apiVersion: v1\nkind: Nobodys\nmetadata: {name: web}\n");
    assert!(vague.named.is_empty() && vague.unreadable.len() > 1, "{vague:?}");
}

#[test]
fn an_error_is_one_line_whatever_the_keys_and_values_are() {
    for text in [
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: \"a\\nb: c\"}\n",
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, \"x\\ny\": 1}\n",
        "apiVersion: \"v1\\r\\n\"\nkind: Namespace\nmetadata: {name: a}\n",
        "apiVersion: v1\nkind: \"Name\\nspace\"\nmetadata: {name: a}\n",
        "a: *\"x\\ny\"\nb: [",
        "a: 1\n\"b\\nc\": 2\n\"b\\nc\": 3\n",
    ] {
        let errors = errors_of(&read(text));
        assert!(!errors.is_empty() && !errors.contains(['\n', '\r']), "{errors}");
    }
}

#[test]
fn a_misspelt_kind_or_version_is_the_object_that_it_was_meant_to_be() {
    let good = policy("p", "{podSelector: {}}");
    for (right, wrong) in [
        ("NetworkPolicy", "NetworkPolcy"),
        ("NetworkPolicy", "networkpolicy"),
        ("networking.k8s.io/v1", "networking.k8s.io/v1beta1"),
        ("networking.k8s.io/v1", "extensions/v1beta1"),
        ("networking.k8s.io/v1", "networking.k8s.i0/v1"),
        ("apiVersion: networking.k8s.io/v1\n", ""),
    ] {
        let documents = read(&good.replacen(right, wrong, 1));
        assert!(documents.resources.is_empty() && documents.errors.len() == 1, "{wrong}: {documents:?}");
        assert!(documents.unreadable.contains("resources/NetworkPolicy/shop/p"), "{wrong}: {documents:?}");
    }
    for (version, kind) in [
        ("rbac.authorization.k8s.io/v1", "Role"),
        ("batch/v1", "Job"),
        ("coordination.k8s.io/v1", "Lease"),
        ("networking.k8s.io/v1", "Ingress"),
        ("cilium.io/v2", "CiliumNetworkPolicy"),
        ("projectcalico.org/v3", "NetworkPolicy"),
        ("v1", "Endpoints"),
    ] {
        let documents = read(&format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x}}\nrules: []\n"));
        assert!(
            matches!(documents.errors[0], ResourceError::Kind { .. }) && !documents.opaque,
            "{kind}: {documents:?}"
        );
    }
}

#[test]
fn an_object_whose_name_is_in_doubt_may_be_any() {
    for doubtful in [
        POD.replace("namespace: shop", "namespce: shop").replace("name: c}", "name: C}"),
        POD.replace(", namespace: shop", "").replace("spec:", "namespace: shop\nspec:"),
        POD.replace("name: web", "name: Web"),
        POD.replace("name: web, ", ""),
        POD.replace("namespace: shop", "namespace: 5"),
    ] {
        let documents = read(&doubtful);
        assert!(documents.opaque && documents.unreadable.is_empty(), "{doubtful}: {documents:?}");
    }
}

#[test]
fn a_policy_that_can_be_read_in_part_has_a_stand_in_that_allows_nothing_more() {
    let stand_in = |spec: &str| {
        let documents = read(&policy("p", spec));
        assert_eq!(documents.errors.len(), 1, "{spec}: {documents:?}");
        documents.stand_ins.into_iter().next().map(|resource| match resource {
            Resource::NetworkPolicy(policy) => {
                assert!(policy.spec.ingress.is_empty() && policy.spec.egress.is_empty());
                assert!(policy.metadata.annotations.contains_key(crate::resource::STAND_IN));
                let labels: Vec<String> =
                    policy.spec.pod_selector.match_labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
                (labels.join(","), policy.spec.policy_types.len())
            }
            other => panic!("{other:?}"),
        })
    };
    let app = "podSelector: {matchLabels: {app: web}}";
    assert_eq!(stand_in(&format!("{{{app}, ingress: [{{ports: [{{port: 0}}]}}]}}")), Some(("app=web".into(), 1)));
    assert_eq!(stand_in(&format!("{{{app}, ingres: []}}")), Some(("app=web".into(), 2)));
    assert_eq!(stand_in(&format!("{{{app}, egress: 5}}")), Some(("app=web".into(), 2)));
    assert_eq!(stand_in(&format!("{{{app}, policyTypes: [Egres]}}")), Some(("app=web".into(), 2)));
    assert_eq!(stand_in(&format!("{{{app}, policyTypes: [Egress], egress: 5}}")), Some(("app=web".into(), 1)));
    assert_eq!(stand_in("{podSelector: {}, ingress: 5}"), Some((String::new(), 1)));
    assert_eq!(stand_in("{podSelector: {matchLabels: {app: web, tier: 5}}}"), Some(("app=web".into(), 1)));
    assert_eq!(stand_in("{podSelector: {matchLabels: {app: 5}}}"), None);
    assert_eq!(stand_in("{podSelecter: {matchLabels: {app: web}}}"), None);
    let whole =
        policy("p", "{podSelector: {}, ingress: [{}]}").replace("namespace: shop", "namespace: shop, labels: {a: 5}");
    match &read(&whole).stand_ins[..] {
        [Resource::NetworkPolicy(policy)] => assert_eq!(policy.spec.ingress.len(), 1, "the mistake is elsewhere"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn markers_marks_breaks_and_directives_are_read_as_yaml_has_it() {
    let (one, two) = (namespace("one"), namespace("two"));
    for text in [
        format!("{one}---\n{two}"),
        format!("---\n{one}---\n{two}---\n"),
        format!("# nothing\n---\n\n---\n{one}--- # a comment\n{two}"),
        format!("{one}...\n{two}"),
        format!("{one}...\n---\n{two}...\n"),
        format!("%YAML 1.2\n---\n{one}...\n%YAML 1.2\n---\n{two}"),
        format!("\u{feff}{one}---\n{two}"),
        format!("\u{feff}---\n{one}---\n{two}"),
        format!("{one}---\n{two}").replace('\n', "\r\n"),
        format!("{one}---\n{two}").replace('\n', "\r"),
        format!("{one}---\t\n{two}"),
        format!("{one}--- {{apiVersion: v1, kind: Namespace, metadata: {{name: two}}}}"),
        format!("{one}---\n{}", r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"two"}}"#),
    ] {
        let documents = read(&text);
        assert_eq!((names(&documents), documents.is_whole()), (vec!["one", "two"], true), "{text:?}: {documents:?}");
    }
    for text in ["", "\u{feff}", "# nothing\n", "---\n", "---\n# nothing\n---\n...\n", "\r\n", "null\n", "---\n~\n"] {
        assert_eq!(read(text), Documents::default(), "{text:?}");
    }
    let noted = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: one\n  annotations:\n    note: |\n      a\n      ---\n      b\n    more: \"x\n      --- y\"\n    dashes: ---x\n---x: y\n";
    let documents = read(noted);
    assert_eq!((documents.errors.len(), documents.errors[0].position().line), (1, 13), "{documents:?}");
    let documents = read(noted.trim_end_matches("---x: y\n"));
    assert_eq!((names(&documents), documents.is_whole()), (vec!["one"], true), "{documents:?}");
}

#[test]
fn lines_are_counted_through_the_file() {
    let text = format!("{}---\r\n# note\r\n---\n{}", namespace("one"), policy("p", "\n  podSelector: {}\n  extra: 1"));
    let documents = read(&text);
    assert!(
        errors_of(&documents).starts_with("f.yaml:13:3: NetworkPolicy shop/p: spec.extra: unknown field"),
        "{documents:?}"
    );
    let twice = format!("{}---\n{}", namespace("one"), "a: 1\nb: 2\na: 3\n");
    assert!(errors_of(&read(&twice)).starts_with("f.yaml:8:1: not valid YAML: "), "{:?}", errors_of(&read(&twice)));
}

#[test]
fn a_long_comment_is_read_over() {
    let comment = "  # a line of a licence\n".repeat(5_000);
    let text = format!("apiVersion: v1\nkind: Namespace\n{comment}metadata:\n{comment}  name: one\n{comment}");
    assert_eq!(names(&read(&text)), ["one"]);
}

#[test]
fn of_a_million_broken_documents_the_first_are_told() {
    let documents = read(&"---\nx\n".repeat(100_000));
    assert_eq!((documents.errors.len(), documents.more_errors), (MAX_ERRORS, 100_000 - MAX_ERRORS));
}

proptest! {
    /// Cutting is what the YAML parser does itself, as long as it can read on.
    #[test]
    fn cut_documents_are_those_that_the_parser_finds(
        parts in prop::collection::vec(prop_oneof![
            Just("---\n"), Just("--- "), Just("...\n"), Just("a: 1\n"), Just("b: |\n  ---\n  text\n"), Just("# c\n"),
            Just("c: \"x\n  ---\n  y\"\n"), Just("d: [1,\n  ---,\n  2]\n"), Just("\n"), Just("- x\n"), Just("---x: 1\n"),
            Just("\r\n"), Just("{e: 1}\n"), Just("%YAML 1.2\n"),
        ], 0..12)
    ) {
        let text = parts.concat();
        if let Ok(whole) = serde_saphyr::from_multiple::<serde_json::Value>(&text) {
            let mut cut = Vec::new();
            for chunk in split(text.as_bytes()) {
                let chunk = std::str::from_utf8(chunk.bytes).unwrap();
                cut.extend(serde_saphyr::from_multiple::<serde_json::Value>(chunk).expect(chunk));
            }
            prop_assert_eq!(whole, cut, "{:?}", text);
        }
    }

    /// What is before and after stays, and nothing is lost between the pieces.
    #[test]
    fn nothing_between_two_documents_can_hide_them(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        let text = [namespace("one").as_bytes(), b"---\n", &bytes, b"\n---\n", namespace("two").as_bytes()].concat();
        let documents = read_documents("f.yaml", &text);
        let names = names(&documents);
        prop_assert_eq!(names.first(), Some(&"one"), "{:?}", documents);
        prop_assert_eq!(names.last(), Some(&"two"), "{:?}", documents);
        prop_assert!(documents.errors.iter().all(|error| error.to_string().len() < 1000));
    }
}

#[test]
fn a_list_of_one_kind_is_unfolded_whether_its_items_say_their_kind_or_not() {
    let policy = |more: &str| format!("{{{more}metadata: {{name: p}}, spec: {{podSelector: {{}}}}}}");
    for more in ["", "kind: NetworkPolicy, ", "apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, "] {
        let list = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicyList\nmetadata: {resourceVersion: \"7\"}\n";
        let documents = read(&format!("{list}items: [{}]\n", policy(more)));
        assert_eq!((documents.resources.len(), documents.errors.as_slice()), (1, &[][..]), "{more}");
        assert_eq!(documents.resources[0].store_key(), "resources/NetworkPolicy/default/p");
    }
    let documents = read("apiVersion: v1\nkind: PodList\nitems: [{kind: Service, metadata: {name: s}}]\n");
    assert!(documents.unreadable.contains("resources/Service/default/s"), "{documents:?}");
    let text = documents.errors[0].to_string();
    assert!(text.contains("\"Service\" does not go with the list"), "{text}");
    for elsewhere in ["v1\nkind: ConfigMapList", "apps/v1\nkind: DeploymentList"] {
        let documents = read(&format!("apiVersion: {elsewhere}\nitems: [{{metadata: {{name: p}}}}]\n"));
        assert!(!documents.opaque && documents.unreadable.is_empty() && documents.errors.len() == 1, "{documents:?}");
    }
}

#[test]
fn a_list_without_items_does_not_say_that_there_is_nothing() {
    for kind in ["List", "PodList"] {
        assert_eq!(read(&format!("apiVersion: v1\nkind: {kind}\nitems: []\n")), Documents::default());
        for nothing in ["", "items:\n", "items: null\n", "items: {}\n", "item: []\n"] {
            let documents = read(&format!("apiVersion: v1\nkind: {kind}\n{nothing}"));
            assert!(documents.opaque && documents.errors.len() == 1, "{kind} {nothing}: {documents:?}");
        }
    }
}

#[test]
fn a_kind_that_nobody_has_holds_what_has_its_name() {
    let document = |version: &str, kind: &str| {
        read(&format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: p, namespace: shop}}\nspec: {{}}\n"))
    };
    for (version, kind) in [
        ("networking.k8s.io/v1", "networkpolicies"),
        ("networking.k8s.io/v1", "NP"),
        ("networking.k8s.oi/v1", "NetworkPolicy"),
        ("v1", "netpol"),
    ] {
        let documents = document(version, kind);
        assert_eq!(documents.stand_ins.len(), usize::from(version != "v1"), "{kind}: {documents:?}");
        assert!(documents.unreadable.contains("resources/NetworkPolicy/shop/p"), "{kind}: {documents:?}");
        let text = documents.errors[0].to_string();
        assert!(text.starts_with("f.yaml:") && text.contains(kind), "{text}");
    }
    for (version, kind) in [("v1", "Secret"), ("networking.k8s.io/v1", "Ingress"), ("apps/v1", "Deployment")] {
        let documents = document(version, kind);
        assert!(documents.unreadable.is_empty() && !documents.opaque && documents.errors.len() == 1, "{documents:?}");
    }
    assert!(read("kind: netpol\n").opaque);
}

#[test]
fn a_stand_in_forbids_what_a_field_that_nobody_knows_may_have_forbidden() {
    use crate::resource::PolicyType::{Egress, Ingress};
    let stands_in = |spec: &str| {
        let documents = read(&policy("p", spec));
        assert!(documents.resources.is_empty(), "{spec}");
        documents.stand_ins.into_iter().next().map(|it| match it {
            Resource::NetworkPolicy(policy) => (policy.spec.pod_selector.match_labels.len(), policy.spec.policy_types),
            other => panic!("{other:?}"),
        })
    };
    let both = vec![Ingress, Egress];
    assert_eq!(stands_in("{podSelector: {matchLabels: {a: b}}, policyType: [Egress]}"), Some((1, both.clone())));
    assert_eq!(stands_in("{podSelector: {}, policyTypes: [Ingress], egres: []}"), Some((0, both)));
    assert_eq!(stands_in("{ingress: [{form: []}]}"), Some((0, vec![Ingress])), "without a selector it is all pods");
    assert_eq!(stands_in("{podSelecter: {matchLabels: {a: b}}}"), None);
}

#[test]
fn a_namespace_with_one_bad_label_has_the_others() {
    let documents =
        read("apiVersion: v1\nkind: Namespace\nmetadata: {name: n, labels: {tenant: evil, owner: \"Jane Doe\"}}\n");
    let [Resource::Namespace(namespace)] = &documents.stand_ins[..] else { panic!("{documents:?}") };
    let labels: Vec<&str> = namespace.metadata.labels.values().map(String::as_str).collect();
    assert_eq!(labels, ["n", "evil"]);
    assert!(documents.unreadable.contains("resources/Namespace/_/n") && documents.errors.len() == 1);
}
