use super::*;
use crate::resource::{LabelSelector, Resource, parse_documents};
use crate::work::{cost_of, steps_of};
use cirri_abi::{Direction as AbiDirection, PolicyEntry, PolicyKey, policy_flag};
use std::net::IpAddr;

mod closing;
mod property;
mod refused;

/// What the packet path would find: the lookup contract of the abi, word for word.
fn look_up(rules: &Ruleset, identity: u32, block: u32, direction: u8, proto: u8, port: u16) -> PolicyEntry {
    let longest = |peer: u32| {
        let matching = |key: &PolicyKey| {
            let [high, low] = key.port;
            let prefix = u16::from_be_bytes([high, low]);
            let significant = key.prefix_len.saturating_sub(PolicyKey::PROTO_BITS);
            let mask = if significant == 0 { 0 } else { u16::MAX << (16 - significant) };
            key.peer == peer
                && key.direction == direction
                && (key.prefix_len == PolicyKey::STATIC_BITS || key.proto == proto)
                && port & mask == prefix
        };
        rules.entries.iter().filter(|(key, _)| matching(key)).max_by_key(|(key, _)| key.prefix_len).map(|(_, e)| *e)
    };
    let mut best: Option<PolicyEntry> = None;
    let blocks = if block == 0 { None } else { longest(block) };
    for found in [longest(identity), blocks, longest(0)].into_iter().flatten() {
        if best.is_none_or(|b| (found.precedence, found.prefix_len) > (b.precedence, b.prefix_len)) {
            best = Some(found);
        }
    }
    best.expect("a complete rule set always answers")
}

const WEB: Identity = Identity { id: 300 };
const CLIENT: Identity = Identity { id: 301 };
const OTHER: Identity = Identity { id: 302 };
const TCP: u8 = cirri_abi::proto::TCP;
const UDP: u8 = cirri_abi::proto::UDP;
const IN: u8 = AbiDirection::INGRESS;
const OUT: u8 = AbiDirection::EGRESS;

fn pod_labels(namespace: &str, more: &str) -> IdentityLabels {
    IdentityLabels::parse(&format!(
        "k8s:io.kubernetes.pod.namespace={namespace};\
         k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name={namespace};{more}"
    ))
    .unwrap()
}

/// Three pods: web and client in `shop`, other in `lab`.
fn cluster() -> Cluster {
    let mut cluster = Cluster::default();
    for (identity, labels) in [
        (WEB, pod_labels("shop", "k8s:app=web;cirri:named-ports=http/TCP/8080")),
        (CLIENT, pod_labels("shop", "k8s:app=client;cirri:named-ports=http/TCP/9090")),
        (OTHER, pod_labels("lab", "k8s:app=client")),
    ] {
        cluster.upsert_identity(identity, labels);
    }
    cluster
}

fn policy(name: &str, spec: &str) -> Policy {
    let text = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}"
    );
    match parse_documents("test.yaml", &text).unwrap_or_else(|error| panic!("{error}\n{text}")).remove(0) {
        Resource::NetworkPolicy(policy) => Policy::from(&policy),
        other => panic!("expected a policy, got {other:?}"),
    }
}

fn id(name: &str) -> PolicyId {
    PolicyId::network_policy("shop", name)
}

struct Probe<'a>(&'a Cluster, Ruleset);

impl Probe<'_> {
    fn of(cluster: &Cluster, identity: Identity) -> Probe<'_> {
        Probe(cluster, cluster.compile(identity).unwrap())
    }
    fn entry(&self, peer: Identity, address: &str, direction: u8, proto: u8, port: u16) -> PolicyEntry {
        let address: IpAddr = address.parse().unwrap();
        look_up(&self.1, peer.id, self.0.blocks().block_of(address.into()), direction, proto, port)
    }
    fn allows(&self, peer: Identity, direction: u8, proto: u8, port: u16) -> bool {
        self.entry(peer, "203.0.113.9", direction, proto, port).flags & policy_flag::ALLOW != 0
    }
    fn allows_address(&self, address: &str) -> bool {
        // World, a node and a pod alike: the address decides.
        let found = [Identity::WORLD, Identity::REMOTE_NODE, OTHER]
            .map(|peer| self.entry(peer, address, IN, TCP, 80).flags & policy_flag::ALLOW != 0);
        assert!(found.iter().all(|f| *f == found[0]), "{address}: {found:?}");
        found[0]
    }
}

/// Everything that shows of a cluster; not what it remembers to be quick.
fn contents(cluster: &Cluster) -> String {
    let Cluster { limit, filter, identities, policies, index, blocks, named_by, rules, bounds: _, waiting } = cluster;
    format!("{limit} {filter:?} {identities:?} {policies:?} {index:?} {blocks:?} {named_by:?} {rules:?} {waiting:?}")
}

#[test]
fn without_policies_everything_passes_and_an_unknown_identity_has_no_rules() {
    let cluster = cluster();
    let rules = cluster.compile(WEB).unwrap();
    assert!(!rules.isolates_ingress && !rules.isolates_egress);
    let cookies: Vec<u32> = rules.entries.iter().map(|(_, entry)| entry.cookie).collect();
    assert_eq!(cookies, [Cookie::DEFAULT_ALLOW, Cookie::DEFAULT_ALLOW]);
    let unknown = Identity { id: 999 };
    assert_eq!(cluster.compile(unknown), Err(CompileError::UnknownIdentity { identity: unknown }));
}

#[test]
fn a_policy_closes_its_direction_for_all_but_what_it_allows() {
    let mut cluster = cluster();
    let rule = "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}, {protocol: UDP, port: 1000, endPort: 1999}]}]}";
    let change = cluster.upsert_policy(policy("p", rule)).unwrap();
    assert_eq!(change.identities().collect::<Vec<_>>(), [WEB]);
    let web = Probe::of(&cluster, WEB);
    assert!(web.allows(CLIENT, IN, TCP, 80));
    assert!(web.allows(CLIENT, IN, UDP, 1000) && web.allows(CLIENT, IN, UDP, 1999));
    assert!(!web.allows(CLIENT, IN, UDP, 999) && !web.allows(CLIENT, IN, UDP, 2000));
    assert!(!web.allows(CLIENT, IN, UDP, 80) && !web.allows(CLIENT, IN, TCP, 81));
    assert!(!web.allows(CLIENT, IN, cirri_abi::proto::ICMP, 8));
    assert!(!web.allows(OTHER, IN, TCP, 80), "the same label in another namespace");
    assert!(!web.allows(Identity::WORLD, IN, TCP, 80));
    assert!(!web.allows(Identity::REMOTE_NODE, IN, TCP, 22));
    assert!(web.allows(OTHER, OUT, TCP, 80), "the other direction stays open");
    assert!(Probe::of(&cluster, CLIENT).allows(WEB, IN, TCP, 80), "others stay open");
}

#[test]
fn policies_add_up_and_leave_no_trace() {
    let mut cluster = cluster();
    let before = cluster.clone();
    cluster.upsert_policy(policy("none", "{podSelector: {}}")).unwrap();
    assert!(!Probe::of(&cluster, WEB).allows(CLIENT, IN, TCP, 80));
    cluster.upsert_policy(policy("all", "{podSelector: {matchLabels: {app: web}}, ingress: [{}]}")).unwrap();
    let web = Probe::of(&cluster, WEB);
    assert!(web.allows(Identity::WORLD, IN, cirri_abi::proto::ICMP, 8));
    assert!(!Probe::of(&cluster, CLIENT).allows(WEB, IN, TCP, 80));
    let change = cluster.remove_policy(&id("all"));
    assert!(change.concerns(WEB) && !change.concerns(CLIENT));
    assert!(cluster.remove_policy(&id("all")).is_empty());
    cluster.remove_policy(&id("none"));
    assert_eq!(contents(&cluster), contents(&before), "nothing of the policies is left");
}

#[test]
fn selectors_of_one_peer_must_both_match_and_peers_add_up() {
    let mut cluster = cluster();
    let lab = "namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: lab}}";
    let both = format!(
        "{{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{from: [{{{lab}, podSelector: {{matchLabels: {{app: client}}}}}}]}}]}}"
    );
    cluster.upsert_policy(policy("p", &both)).unwrap();
    let web = Probe::of(&cluster, WEB);
    assert!(web.allows(OTHER, IN, TCP, 1) && !web.allows(CLIENT, IN, TCP, 1));
    let either = both
        .replace(", podSelector: {matchLabels: {app: client}}}]", "}, {podSelector: {matchLabels: {app: client}}}]");
    cluster.upsert_policy(policy("p", &either)).unwrap();
    let web = Probe::of(&cluster, WEB);
    assert!(
        web.allows(OTHER, IN, TCP, 1) && web.allows(CLIENT, IN, TCP, 1) && !web.allows(Identity::WORLD, IN, TCP, 1)
    );
    cluster.upsert_policy(policy("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}")).unwrap();
    let web = Probe::of(&cluster, WEB);
    assert!(web.allows(OTHER, IN, TCP, 1) && !web.allows(Identity::WORLD, IN, TCP, 1), "pods, not the world");
}

#[test]
fn address_blocks_mean_whoever_has_the_address() {
    let mut cluster = cluster();
    let rule = "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}]}]}";
    assert!(cluster.upsert_policy(policy("p", rule)).unwrap().blocks);
    let web = Probe::of(&cluster, WEB);
    assert!(web.allows_address("10.0.0.1") && web.allows_address("10.2.0.1"));
    assert!(!web.allows_address("10.1.2.3") && !web.allows_address("11.0.0.1") && !web.allows_address("fd00::1"));
    // Another policy's smaller blocks must not cut holes into this one's.
    let inner = "{podSelector: {matchLabels: {app: client}}, egress: [{to: [{ipBlock: {cidr: 10.2.0.0/16}}, {ipBlock: {cidr: 10.1.2.0/24}}]}]}";
    let change = cluster.upsert_policy(policy("q", inner)).unwrap();
    assert!(change.blocks && change.concerns(WEB), "its entries grow by the new blocks");
    let web = Probe::of(&cluster, WEB);
    assert!(web.allows_address("10.0.0.1") && web.allows_address("10.2.0.1") && !web.allows_address("10.1.2.3"));
    assert!(cluster.remove_policy(&id("q")).concerns(WEB));
    let wide = "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: '::/0'}}]}]}";
    cluster.upsert_policy(policy("r", wide)).unwrap();
    assert!(Probe::of(&cluster, WEB).allows_address("fd00::1") && !Probe::of(&cluster, WEB).allows_address("8.8.8.8"));
}

#[test]
fn named_ports_resolve_on_the_receiver_and_unresolved_allow_nothing() {
    let mut cluster = cluster();
    let ingress = |port: &str| format!("{{podSelector: {{}}, ingress: [{{ports: [{{port: {port}}}]}}]}}");
    cluster.upsert_policy(policy("p", &ingress("http"))).unwrap();
    let web = Probe::of(&cluster, WEB);
    assert!(web.allows(OTHER, IN, TCP, 8080) && !web.allows(OTHER, IN, TCP, 9090) && !web.allows(OTHER, IN, UDP, 8080));
    assert!(Probe::of(&cluster, CLIENT).allows(OTHER, IN, TCP, 9090));
    cluster.upsert_policy(policy("p", &ingress("missing"))).unwrap();
    let web = Probe::of(&cluster, WEB);
    assert!(!web.allows(OTHER, IN, TCP, 8080) && !web.allows(OTHER, IN, TCP, 1));

    for to in ["", "to: [{podSelector: {}}], "] {
        let egress = format!(
            "{{podSelector: {{matchLabels: {{app: client}}}}, egress: [{{{to}ports: [{{port: http}}]}}], policyTypes: [Egress]}}"
        );
        cluster.upsert_policy(policy("p", &egress)).unwrap();
        let client = Probe::of(&cluster, CLIENT);
        assert!(client.allows(WEB, OUT, TCP, 8080) && !client.allows(WEB, OUT, TCP, 9090), "{to}");
        assert!(client.allows(CLIENT, OUT, TCP, 9090) && !client.allows(CLIENT, OUT, TCP, 8080), "{to}");
        assert!(!client.allows(Identity::WORLD, OUT, TCP, 8080) && !client.allows(OTHER, OUT, TCP, 8080), "{to}");
    }
    // A new receiver with that name changes the rules of those who may reach it.
    let new = Identity { id: 400 };
    let change = cluster.upsert_identity(new, pod_labels("shop", "cirri:named-ports=http/TCP/7070"));
    assert!(change.concerns(CLIENT));
    assert!(Probe::of(&cluster, CLIENT).allows(new, OUT, TCP, 7070));
}

#[test]
fn beside_a_named_port_a_numbered_one_takes_a_single_entry() {
    let mut cluster = cluster();
    let spec = "{podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{ports: [{port: http}, {port: 53, protocol: UDP}]}]}";
    cluster.upsert_policy(policy("p", spec)).unwrap();
    let client = Probe::of(&cluster, CLIENT);
    assert!(client.allows(WEB, OUT, UDP, 53) && client.allows(Identity::WORLD, OUT, UDP, 53));
    let of_number = |port: u16| client.1.entries.iter().filter(|(key, _)| key.port == port.to_be_bytes()).count();
    assert_eq!((of_number(53), of_number(8080), of_number(9090)), (1, 1, 1), "named ports are each receiver's own");
}

#[test]
fn deny_and_tiers_decide_before_what_is_specific() {
    let mut cluster = cluster();
    let web = Selector::new(
        Some(&LabelSelector { match_labels: [("app".into(), "web".into())].into(), ..Default::default() }),
        Scope::Named("shop"),
    );
    let rule = |index, tier, verdict, peer, ports| Rule {
        direction: Direction::Ingress,
        index,
        tier,
        order: 0,
        verdict,
        peers: vec![peer],
        ports: vec![ports],
    };
    let tcp = |first, last| PortMatch::Range { protocol: crate::resource::Protocol::Tcp, first, last };
    let mut tiers = Policy {
        id: PolicyId { kind: "Test", namespace: String::new(), name: "tiers".into(), is_stand_in: false },
        subject: web,
        isolates_ingress: true,
        isolates_egress: false,
        rules: vec![
            rule(0, Tier::Normal, RuleVerdict::Allow, Peer::Pods(Selector::every_pod()), tcp(80, 80)),
            rule(1, Tier::Normal, RuleVerdict::Deny, Peer::Any, tcp(0, 1023)),
            rule(2, Tier::Admin, RuleVerdict::Allow, Peer::Pods(Selector::every_pod()), tcp(22, 22)),
            rule(3, Tier::Normal, RuleVerdict::Allow, Peer::Any, PortMatch::Any),
            rule(4, Tier::Baseline, RuleVerdict::Deny, Peer::Any, tcp(9000, 9000)),
        ],
    };
    cluster.upsert_policy(tiers.clone()).unwrap();
    let probe = Probe::of(&cluster, WEB);
    assert!(!probe.allows(CLIENT, IN, TCP, 80), "a deny beats a more specific allow of its tier");
    assert!(probe.allows(CLIENT, IN, TCP, 22), "a stronger tier beats the deny");
    assert!(!probe.allows(Identity::WORLD, IN, TCP, 22));
    assert!(probe.allows(CLIENT, IN, TCP, 9000), "baseline is silent where a policy closes");
    tiers.isolates_ingress = false;
    tiers.rules.remove(3);
    cluster.upsert_policy(tiers).unwrap();
    let probe = Probe::of(&cluster, WEB);
    assert!(!probe.allows(CLIENT, IN, TCP, 9000) && probe.allows(CLIENT, IN, TCP, 9001));
}

#[test]
fn a_stronger_short_prefix_is_not_hidden_by_a_weaker_long_one() {
    let mut cluster = cluster();
    let any = |index, verdict, ports| Rule {
        direction: Direction::Ingress,
        index,
        tier: Tier::Normal,
        order: 0,
        verdict,
        peers: vec![Peer::Any],
        ports: vec![ports],
    };
    let port = PortMatch::Range { protocol: crate::resource::Protocol::Tcp, first: 80, last: 80 };
    let policy = Policy {
        id: id("p"),
        subject: Selector::every_pod(),
        isolates_ingress: true,
        isolates_egress: false,
        rules: vec![any(0, RuleVerdict::Deny, PortMatch::Any), any(1, RuleVerdict::Allow, port)],
    };
    cluster.upsert_policy(policy).unwrap();
    assert!(!Probe::of(&cluster, WEB).allows(CLIENT, IN, TCP, 80));
    assert_eq!(cluster.entries_of(WEB), 2, "what can never answer takes no room");
}

#[test]
fn cookies_stay_with_their_rules() {
    let mut cluster = cluster();
    let texts = |cluster: &Cluster| -> BTreeMap<String, u32> {
        cluster.rules().map(|rule| (rule.text.clone(), rule.cookie)).collect()
    };
    cluster
        .upsert_policy(policy("p", "{podSelector: {}, ingress: [{ports: [{port: 1}]}, {ports: [{port: 2}]}]}"))
        .unwrap();
    let first = texts(&cluster);
    let more = "{podSelector: {}, ingress: [{ports: [{port: 3}]}, {ports: [{port: 1}]}, {ports: [{port: 2}]}]}";
    cluster.upsert_policy(policy("p", more)).unwrap();
    let second = texts(&cluster);
    assert_eq!((first.len(), second.len()), (2, 3));
    assert!(first.iter().all(|(text, cookie)| second[text] == *cookie), "{first:?} {second:?}");
    assert!(cluster.rules().all(|rule| rule.cookie >= Cookie::FIRST_RULE && rule.policy == "p"));
    let moved = cluster.rule(first["allow from anywhere on TCP 2"]).unwrap();
    assert_eq!((moved.index, moved.direction, moved.namespace.as_str()), (2, Direction::Ingress, "shop"));
    let twins = "{podSelector: {}, ingress: [{ports: [{port: 1}]}, {ports: [{port: 1}]}]}";
    cluster.upsert_policy(policy("p", twins)).unwrap();
    assert_eq!(cluster.rules().count(), 2, "equal rules have cookies of their own");
}

#[test]
fn a_change_concerns_only_those_whose_rules_differ() {
    let mut cluster = cluster();
    let rule =
        "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]}";
    cluster.upsert_policy(policy("p", rule)).unwrap();
    assert!(cluster.upsert_policy(policy("p", rule)).unwrap().is_empty(), "the same again");
    let new = Identity { id: 400 };
    let change = cluster.upsert_identity(new, pod_labels("shop", "k8s:app=client;k8s:x=y"));
    assert_eq!(change.identities().collect::<Vec<_>>(), [WEB, new]);
    assert!(Probe::of(&cluster, WEB).allows(new, IN, TCP, 80));
    let change = cluster.upsert_identity(new, pod_labels("shop", "k8s:app=idle"));
    assert!(change.concerns(WEB));
    assert!(!Probe::of(&cluster, WEB).allows(new, IN, TCP, 80));
    assert!(!cluster.upsert_identity(Identity { id: 401 }, pod_labels("shop", "k8s:app=idle")).concerns(WEB));
    assert!(!cluster.remove_identity(new).concerns(WEB));
    assert!(cluster.remove_identity(CLIENT).concerns(WEB));
    assert!(!Probe::of(&cluster, WEB).allows(CLIENT, IN, TCP, 80));
}

#[test]
fn what_does_not_fit_is_refused_with_the_rule_that_costs_most() {
    let mut cluster = Cluster::new(20, LabelFilter::default());
    cluster.upsert_identity(WEB, pod_labels("shop", "k8s:app=web"));
    let small = policy("p", "{podSelector: {}, ingress: [{ports: [{port: 1}]}]}");
    cluster.upsert_policy(small.clone()).unwrap();
    let before = contents(&cluster);
    let large = "{podSelector: {}, ingress: [{ports: [{port: 1}]}], egress: [{ports: [{port: 5}]}, {ports: [{port: 1, endPort: 65534}]}]}";
    let error = cluster.upsert_policy(policy("p", large)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the rules of identity 300 take more table entries than there are: 20 fit; egress rule 1 of NetworkPolicy shop/p takes 30: \
         narrow its peers or its ports, or split the workloads that it selects"
    );
    cluster.upsert_policy(small.clone()).unwrap();
    assert_eq!(contents(&cluster), before, "nothing is half applied");
    // 34 = 2 built in, 1 + 1 + 30: exactly what compiling without the limit gives.
    let mut free = Cluster::default();
    free.upsert_identity(WEB, pod_labels("shop", "k8s:app=web"));
    free.upsert_policy(policy("p", large)).unwrap();
    assert_eq!(free.compile(WEB).unwrap().entries.len(), 34);

    // Identities may outgrow a table later. Then compiling says so, and a smaller policy is taken.
    let peers = "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {}}]}]}";
    cluster.upsert_policy(policy("peers", peers)).unwrap();
    for id in 1000..1030 {
        cluster.upsert_identity(Identity { id }, pod_labels("shop", ""));
    }
    let error = cluster.compile(WEB).unwrap_err();
    assert!(matches!(error, CompileError::TooLarge { rule_entries: 31, .. }), "{error}");
    cluster.upsert_policy(policy("p", "{podSelector: {}}")).unwrap();
    assert!(cluster.upsert_policy(small).is_err(), "growing is refused still");
}

#[test]
fn a_policy_that_makes_the_table_of_another_too_large_is_refused() {
    let mut cluster = Cluster::new(8, LabelFilter::default());
    for (id, app) in [(300, "web"), (301, "client"), (302, "third")] {
        cluster.upsert_identity(Identity { id }, pod_labels("shop", &format!("k8s:app={app}")));
    }
    let to = |app: &str, base: u8| {
        // One entry of its own, three blocks.
        let block = format!("{{cidr: 10.{base}.0.0/16, except: [10.{base}.1.0/24, 10.{base}.2.0/24]}}");
        format!("{{podSelector: {{matchLabels: {{app: {app}}}}}, egress: [{{to: [{{ipBlock: {block}}}]}}]}}")
    };
    let wide = "{podSelector: {matchLabels: {app: web}}, egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}}]}]}";
    cluster.upsert_policy(policy("web", wide)).unwrap();
    cluster.upsert_policy(policy("client", &to("client", 0))).unwrap();
    assert_eq!(cluster.entries_of(WEB), 6, "two defaults, its own block, and three more inside that");
    let error = cluster.upsert_policy(policy("third", &to("third", 1))).unwrap_err();
    assert!(
        error.to_string().starts_with("the rules of identity 300 take more table entries than there are: 8 fit"),
        "{error}"
    );
    assert_eq!(cluster.entries_of(WEB), 6);
}

#[test]
fn a_selector_of_many_values_goes_as_quickly_as_it_comes() {
    let cost = |count: usize| {
        let mut cluster = cluster();
        let values: Vec<String> = (0..count).map(|number| format!("v{number}")).collect();
        let values = values.join(", ");
        let spec = format!("{{podSelector: {{matchExpressions: [{{key: app, operator: In, values: [{values}]}}]}}}}");
        let (many, more) = (policy("many", &spec), policy("more", &spec.replace("[v0, ", "[v1, w0, ")));
        cost_of(|| {
            cluster.upsert_policy(many).unwrap();
            cluster.upsert_policy(more).unwrap();
            cluster.remove_policy(&id("many"));
            cluster.remove_policy(&id("more"));
        })
        .0
    };
    let (few, many) = (cost(2_000), cost(20_000));
    // Ten times as much if each is looked at once, a hundred times if each is held against each other.
    assert!(many < few * 40, "{few:?} {many:?}");
}

#[test]
fn many_blocks_with_exceptions_cost_what_they_come_to() {
    let mut cluster = cluster();
    let peer = |number| format!("{{ipBlock: {{cidr: 0.0.0.0/0, except: [10.0.{}.{}/32]}}}}", number >> 8, number & 255);
    let peers: Vec<String> = (0..4_000).map(peer).collect();
    let many = policy("many", &format!("{{podSelector: {{}}, ingress: [{{from: [{}]}}]}}", peers.join(", ")));
    let (steps, probe) = steps_of(|| {
        cluster.upsert_policy(many).unwrap();
        Probe::of(&cluster, WEB)
    });
    assert!(steps < 20 * 4_000, "{steps} blocks and entries were looked at");
    // Each exception is what all other peers mean.
    assert!(probe.allows_address("10.0.0.7") && probe.allows_address("192.0.2.1"));
}

#[test]
fn many_policies_with_an_exception_each_cost_what_they_come_to() {
    let mut cluster = cluster();
    let mut all = 0;
    for number in 0..400 {
        let except = format!("10.0.{}.{}/32", number >> 8, number & 255);
        let spec = format!(
            "{{podSelector: {{}}, ingress: [{{from: [{{ipBlock: {{cidr: 0.0.0.0/0, except: [{except}]}}}}]}}]}}"
        );
        let policy = policy(&format!("p{number}"), &spec);
        all += steps_of(|| cluster.upsert_policy(policy).unwrap()).0;
    }
    assert!(all < 20 * 400 * 400, "{all} blocks, entries and policies were looked at");
    assert_eq!(cluster.entries_of(WEB), 1 + 400 + 2);
}

#[test]
fn of_equal_rules_the_first_by_name_answers() {
    let mut cluster = cluster();
    for name in ["b", "a", "c"] {
        cluster.upsert_policy(policy(name, "{podSelector: {}, ingress: [{}, {}]}")).unwrap();
    }
    let entry = Probe::of(&cluster, WEB).entry(CLIENT, "10.0.0.1", IN, TCP, 80);
    let rule = cluster.rule(entry.cookie).unwrap();
    assert_eq!((rule.policy.as_str(), rule.index), ("a", 0));
}

#[test]
fn a_policy_may_select_by_a_label_that_identities_leave_out() {
    let mut cluster = cluster();
    assert!(!cluster.label_filter().admits("pod-template-hash"));
    let by_hash = "{podSelector: {matchExpressions: [{key: pod-template-hash, operator: DoesNotExist}]}}";
    assert!(cluster.upsert_policy(policy("p", by_hash)).unwrap().labels);
    assert!(cluster.label_filter().admits("pod-template-hash"));
    assert!(cluster.remove_policy(&id("p")).labels);
    assert!(!cluster.label_filter().admits("pod-template-hash"));
    let forged =
        "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {io.kubernetes.pod.namespace: a}}}]}]}";
    let error = cluster.upsert_policy(policy("p", forged)).unwrap_err();
    assert!(error.to_string().contains("io.kubernetes.pod.namespace"), "{error}");
}

fn ask(cluster: &Cluster, from: Identity, to: Identity, port: u16) -> Explanation {
    let party =
        |identity| Party { identity, labels: cluster.labels(identity).cloned().unwrap_or_default(), address: None };
    cluster.explain(&Question { direction: Direction::Ingress, from: party(from), to: party(to), protocol: TCP, port })
}

#[test]
fn explain_names_the_rule_and_what_would_have_had_to_differ() {
    let mut cluster = cluster();
    let rule = "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}, {from: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{protocol: UDP, port: 53}]}]}";
    cluster.upsert_policy(policy("p", rule)).unwrap();
    let yes = ask(&cluster, CLIENT, WEB, 80);
    assert_eq!((yes.verdict, yes.rule.unwrap().index, yes.nearest.len()), (RuleVerdict::Allow, 0, 0));
    let port = ask(&cluster, CLIENT, WEB, 81);
    assert_eq!((port.verdict, port.cookie, port.isolated_by), (RuleVerdict::Deny, Cookie::DEFAULT_DENY, vec![id("p")]));
    assert_eq!(port.nearest.len(), 1);
    assert_eq!(port.nearest[0].differs, [Difference::Port("TCP 80".into())]);
    let peer = ask(&cluster, OTHER, WEB, 80);
    assert_eq!(peer.nearest[0].differs, [Difference::Peer("pods with app=client in namespace shop".into())]);
    let open = ask(&cluster, WEB, CLIENT, 80);
    assert_eq!((open.verdict, open.cookie, open.rule), (RuleVerdict::Allow, Cookie::DEFAULT_ALLOW, None));
    assert_eq!(ask(&cluster, Identity::HOST, WEB, 81).cookie, Cookie::OWN_NODE);
}
