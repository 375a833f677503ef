//! What does not fit: it closes what it selects, and comes into force as soon as it fits.

use super::*;

/// Pods of namespace `shop`, by number.
fn shop(limit: usize, pods: &[(u32, &str)]) -> Cluster {
    let mut cluster = Cluster::new(limit, LabelFilter::default());
    for (id, app) in pods {
        cluster.upsert_identity(Identity { id: *id }, pod_labels("shop", &format!("k8s:app={app}")));
    }
    cluster
}

/// A policy for `web` that lets everybody in on single ports.
fn single_ports(name: &str, count: u16, first: u16) -> Policy {
    let ports: Vec<String> = (first..first + count).map(|port| format!("{{port: {port}}}")).collect();
    policy(
        name,
        &format!("{{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{ports: [{}]}}]}}", ports.join(", ")),
    )
}

fn is_closed(cluster: &Cluster, identity: Identity) -> [bool; 2] {
    let rules = cluster.compile(identity).unwrap();
    [rules.isolates_ingress, rules.isolates_egress]
}

#[test]
fn a_policy_that_is_refused_in_its_first_version_closes_what_it_selects() {
    let mut cluster = shop(20, &[(300, "web"), (301, "client")]);
    let both = "policyTypes: [Ingress, Egress], ingress: [{ports: [{port: 1, endPort: 65534}]}]";
    assert!(
        cluster
            .upsert_policy(policy("large", &format!("{{podSelector: {{matchLabels: {{app: web}}}}, {both}}}")))
            .is_err()
    );
    assert_eq!(is_closed(&cluster, WEB), [true, true]);
    assert_eq!(is_closed(&cluster, CLIENT), [false, false]);
    let forged = "{podSelector: {matchLabels: {app: client}}, ingress: [{from: [{podSelector: {matchLabels: {io.kubernetes.pod.namespace: a}}}]}, {ports: [{port: 1}]}]}";
    assert!(cluster.upsert_policy(policy("reserved", forged)).is_err());
    assert_eq!(is_closed(&cluster, CLIENT), [true, false]);
    assert!(!Probe::of(&cluster, CLIENT).allows(WEB, IN, TCP, 1), "none of its rules is in force");
    let mut other = shop(20, &[(300, "web"), (301, "client")]);
    // Nobody knows which pods have the label: all may.
    let subject = "{podSelector: {matchLabels: {app: web, io.kubernetes.pod.namespace: a}}, policyTypes: [Egress]}";
    assert!(other.upsert_policy(policy("subject", subject)).is_err());
    assert_eq!((is_closed(&other, WEB), is_closed(&other, CLIENT)), ([false, true], [false, false]));
}

#[test]
fn a_refused_policy_is_in_force_when_what_was_in_its_way_goes() {
    let mut cluster = shop(20, &[(300, "web"), (301, "client")]);
    let empty = contents(&cluster);
    let allows = |cluster: &Cluster, port| Probe::of(cluster, WEB).allows(CLIENT, IN, TCP, port);
    cluster.upsert_policy(single_ports("a", 12, 100)).unwrap();
    assert!(cluster.upsert_policy(single_ports("b", 12, 200)).is_err());
    assert!(allows(&cluster, 100) && !allows(&cluster, 200));
    cluster.remove_policy(&id("a"));
    assert_eq!(cluster.retry().accepted, [id("b")]);
    assert!(!allows(&cluster, 100) && allows(&cluster, 200), "another is gone");
    assert!(cluster.upsert_policy(single_ports("a", 12, 100)).is_err());
    cluster.upsert_policy(single_ports("b", 1, 200)).unwrap();
    let retried = cluster.retry();
    assert!(retried.accepted == [id("a")] && retried.change.concerns(WEB));
    assert_eq!(cluster.retry(), Retried::default(), "there is nothing to try");
    assert!(allows(&cluster, 100) && allows(&cluster, 200), "another is smaller");
    cluster.remove_policy(&id("a"));
    cluster.remove_policy(&id("b"));
    assert_eq!(contents(&cluster), empty, "nothing is left");
}

#[test]
fn counting_stops_when_there_are_too_many() {
    let mut cluster = shop(100, &[(300, "web"), (301, "web2")]);
    let peers: Vec<String> =
        (0..300).map(|number| format!("{{ipBlock: {{cidr: 10.0.{}.{}/32}}}}", number / 100, number % 100)).collect();
    let ports: Vec<String> = (0..300).map(|number| format!("{{port: {}}}", 2 * number + 1)).collect();
    let spec =
        format!("{{podSelector: {{}}, ingress: [{{from: [{}], ports: [{}]}}]}}", peers.join(", "), ports.join(", "));
    let (steps, refused) = steps_of(|| cluster.upsert_policy(policy("product", &spec)));
    assert!(refused.unwrap_err().to_string().contains("takes 90000"));
    assert!(steps < 10 * 300, "{steps} blocks and entries were looked at, and 100 fit");
}

#[test]
fn names_of_ports_are_found_without_looking_at_all_of_them_for_each() {
    const MANY: u16 = 500;
    let mut cluster = shop(5000, &[(301, "client")]);
    let named: Vec<String> = (0..MANY).map(|number| format!("p{number:05}/TCP/{}", number + 1)).collect();
    let labels = pod_labels("shop", &format!("k8s:app=web;cirri:named-ports={}", named.join(",")));
    cluster.upsert_identity(WEB, labels);
    let names: Vec<String> = (0..MANY).map(|number| format!("{{port: p{number:05}}}")).collect();
    let ingress = policy("in", &format!("{{podSelector: {{}}, ingress: [{{ports: [{}]}}]}}", names.join(", ")));
    let egress = policy(
        "out",
        &format!("{{podSelector: {{}}, policyTypes: [Egress], egress: [{{ports: [{}]}}]}}", names.join(", ")),
    );
    let (steps, ()) = steps_of(|| {
        cluster.upsert_policy(ingress).unwrap();
        cluster.upsert_policy(egress).unwrap();
        cluster.compile(WEB).unwrap();
    });
    assert!(Probe::of(&cluster, CLIENT).allows(WEB, OUT, TCP, MANY));
    assert!(Probe::of(&cluster, WEB).allows(CLIENT, IN, TCP, MANY));
    assert!(steps <= 20 * usize::from(MANY), "{steps} ports were looked at");
}

/// The rule set of an identity, as an agent has it: complete, or what fits of it when that was in force.
pub(super) fn ruleset(
    cluster: &Cluster,
    identity: Identity,
    before: &[(PolicyKey, PolicyEntry)],
) -> (Ruleset, BTreeMap<PolicyId, usize>) {
    let labels = cluster.labels(identity).unwrap();
    match cluster.compile(identity) {
        Ok(ruleset) => (ruleset, BTreeMap::new()),
        Err(_) => {
            let fitted = cluster.compile_what_fits(&Workloads { identity, labels, trace: None }, before);
            (fitted.ruleset, fitted.left_out)
        }
    }
}

/// Five ports for all pods of the namespace.
const FOR_ALL: &str = "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {}}], ports: [{port: 1}, {port: 3}, {port: 5}, {port: 7}, {port: 9}]}]}";

#[test]
fn whoever_outgrew_its_table_keeps_what_it_was_allowed_and_new_policies_reach_it() {
    let mut cluster = shop(20, &[(300, "web"), (301, "client"), (310, "last")]);
    cluster.upsert_policy(policy("all", FOR_ALL)).unwrap();
    let before = cluster.compile(WEB).unwrap();
    assert_eq!(before.entries.len(), 17);
    // Its number comes before others', and it is new all the same.
    let new = Identity { id: 305 };
    cluster.upsert_identity(new, pod_labels("shop", "k8s:app=new"));
    assert!(cluster.compile(WEB).is_err());
    let (outgrown, left_out) = ruleset(&cluster, WEB, &before.entries);
    assert_eq!(outgrown.entries, before.entries);
    assert_eq!(left_out, BTreeMap::from([(id("all"), 1)]));

    // A restart: what was let in by an earlier run is, and the kernel has the table.
    let mut again = shop(20, &[(300, "web"), (301, "client"), (305, "new"), (310, "last")]);
    assert!(again.restore_policy(policy("all", FOR_ALL)).concerns(WEB));
    assert_eq!(ruleset(&again, WEB, &outgrown.entries).0.entries, before.entries);
    // Without that table as many are allowed as fit.
    let afresh = ruleset(&again, WEB, &[]).0;
    assert!(afresh.isolates_ingress && afresh.entries.len() == 17);

    // Another policy closes the other direction.
    cluster.upsert_policy(policy("egress", "{podSelector: {}, policyTypes: [Egress]}")).unwrap();
    let closed = ruleset(&cluster, WEB, &outgrown.entries).0;
    assert!(closed.isolates_egress);
    assert_eq!(look_up(&closed, CLIENT.id, 0, OUT, TCP, 1).cookie, Cookie::DEFAULT_DENY);
    assert_ne!(look_up(&closed, CLIENT.id, 0, IN, TCP, 1).flags & policy_flag::ALLOW, 0);
    // The policy changes, and its peers are not strangers for that; of the others as many go in as fit.
    cluster.upsert_policy(policy("all", &FOR_ALL.replace("{port: 1}, ", ""))).unwrap();
    cluster.upsert_identity(Identity { id: 304 }, pod_labels("shop", "k8s:app=newer"));
    let changed = ruleset(&cluster, WEB, &closed.entries).0;
    let allows = |peer, port| look_up(&changed, peer, 0, IN, TCP, port).flags & policy_flag::ALLOW != 0;
    assert_eq!([300, 301, 304, 305, 310].map(|peer| allows(peer, 3)), [true, true, true, false, true]);
    assert!(!allows(CLIENT.id, 1));
    // Room again.
    cluster.remove_identity(Identity { id: 304 });
    assert!(cluster.compile(WEB).is_ok());
}

#[test]
fn a_number_that_stands_for_others_now_has_the_rights_that_those_have() {
    let mut cluster = shop(20, &[(300, "web"), (301, "client"), (310, "last")]);
    let only = FOR_ALL.replace(
        "podSelector: {}}",
        "podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [thief]}]}}",
    );
    cluster.upsert_policy(policy("all", &only)).unwrap();
    let before = cluster.compile(WEB).unwrap();
    cluster.upsert_identity(Identity { id: 305 }, pod_labels("shop", "k8s:app=new"));
    cluster.upsert_identity(Identity { id: 306 }, pod_labels("shop", "k8s:app=newer"));
    cluster.upsert_identity(Identity { id: 310 }, pod_labels("shop", "k8s:app=thief"));
    let rules = ruleset(&cluster, WEB, &before.entries).0;
    assert_eq!(look_up(&rules, 310, 0, IN, TCP, 1).cookie, Cookie::DEFAULT_DENY);
    assert_ne!(look_up(&rules, CLIENT.id, 0, IN, TCP, 1).flags & policy_flag::ALLOW, 0);
}

#[test]
fn workloads_are_judged_by_their_labels_whatever_their_number_stands_for() {
    let mut cluster = shop(20, &[(300, "web"), (301, "client")]);
    cluster.upsert_policy(policy("closed", "{podSelector: {matchLabels: {app: client}}}")).unwrap();
    cluster.upsert_policy(policy("eg", "{podSelector: {matchLabels: {app: web}}, policyTypes: [Egress]}")).unwrap();
    let labels = pod_labels("shop", "k8s:app=client");
    for identity in [WEB, Identity { id: 999 }] {
        let rules = cluster.compile_for(&Workloads { identity, labels: &labels, trace: None }).unwrap();
        assert_eq!((rules.isolates_ingress, rules.isolates_egress), (true, false));
    }
}

#[test]
fn what_a_policy_that_nobody_can_read_closed_stays_closed_and_known_policies_close_more() {
    let mut cluster = shop(20, &[(300, "web"), (301, "client"), (302, "other")]);
    let from = |app| {
        format!(
            "{{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{from: [{{podSelector: {{matchLabels: {{app: {app}}}}}}}]}}]}}"
        )
    };
    cluster.upsert_policy(policy("known", &from("other"))).unwrap();
    cluster.upsert_policy(policy("lost", &from("client"))).unwrap();
    let before = cluster.compile(WEB).unwrap();
    cluster.remove_policy(&id("lost"));
    let earlier: BTreeSet<u32> = cluster.rules().map(|rule| rule.cookie).collect();
    let trace = Trace::of(&before.entries, |cookie| earlier.contains(&cookie));
    // What is known of goes and comes.
    cluster.remove_policy(&id("known"));
    cluster.upsert_policy(policy("eg", "{podSelector: {}, policyTypes: [Egress]}")).unwrap();
    let labels = cluster.labels(WEB).unwrap();
    let rules = cluster.compile_for(&Workloads { identity: WEB, labels, trace: Some(&trace) }).unwrap();
    let allows =
        |peer: Identity, direction| look_up(&rules, peer.id, 0, direction, TCP, 1).flags & policy_flag::ALLOW != 0;
    assert!(rules.isolates_ingress && rules.isolates_egress && !allows(Identity::WORLD, OUT));
    assert!(allows(CLIENT, IN), "the lost policy may have allowed it");
    assert!(!allows(OTHER, IN), "the known policy did, and is gone");
    // A peer that went is nobody.
    cluster.remove_identity(CLIENT);
    let labels = cluster.labels(WEB).unwrap();
    let rules = cluster.compile_for(&Workloads { identity: WEB, labels, trace: Some(&trace) }).unwrap();
    assert_eq!(look_up(&rules, CLIENT.id, 0, IN, TCP, 1).cookie, Cookie::DEFAULT_DENY);
}

#[test]
fn many_that_wait_for_one_table_cost_a_few_counts_and_only_when_it_changes() {
    let mut cluster = shop(50, &[(300, "web"), (301, "client")]);
    cluster.upsert_policy(single_ports("first", 40, 1)).unwrap();
    for number in 0..200 {
        assert!(cluster.upsert_policy(single_ports(&format!("p{number}"), 45, 1000)).is_err());
    }
    let (steps, _) = steps_of(|| {
        cluster.upsert_policy(policy("client", "{podSelector: {matchLabels: {app: client}}}")).unwrap();
        assert!(cluster.retry().accepted.is_empty());
    });
    assert!(steps < 100, "{steps} for a policy about others");
    let (steps, retried) = steps_of(|| {
        cluster.upsert_policy(single_ports("first", 39, 1)).unwrap();
        cluster.retry()
    });
    assert!(retried.accepted.is_empty() && steps < 16 * 4 * 50 + 10 * 201, "{steps} steps");
    cluster.remove_policy(&id("first"));
    assert_eq!(cluster.retry().accepted.len(), 200, "they are of the same ports");
}

#[test]
fn whom_policies_select_is_counted_by_identity_and_not_by_policy() {
    let mut cluster = shop(50, &[(300, "web"), (301, "client")]);
    for number in 0..100 {
        cluster.upsert_policy(policy(&format!("p{number}"), "{podSelector: {}}")).unwrap();
    }
    assert!(cluster.upsert_policy(single_ports("refused", 60, 1)).is_err());
    let (steps, selected) = steps_of(|| cluster.selected(&BTreeMap::from([(300, 3), (301, 4), (302, 5)])));
    assert_eq!((selected.len(), selected[&id("p7")], selected[&id("refused")]), (101, 7, 3));
    assert_eq!(steps, 201);
}
