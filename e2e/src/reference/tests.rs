//! The examples and sentences of the API documentation, one test each.

use std::net::IpAddr;

use super::{Connection, Direction, Judgement, Protocol, World};

/// Namespaces shop (team: shop) and tools (team: tools); shop has web, db and probe, tools has scan.
/// web and scan run on n1, the others on n2. db serves 5432 as `sql`.
const WORLD: &str = r#"
{kind: Namespace, metadata: {name: shop, labels: {team: shop}}}
---
{kind: Namespace, metadata: {name: tools, labels: {team: tools}}}
---
{kind: Node, metadata: {name: n1}}
---
{kind: Node, metadata: {name: n2}}
---
kind: Pod
metadata: {namespace: shop, name: web, labels: {app: web}}
spec: {nodeName: n1, containers: [{ports: [{containerPort: 80}]}]}
---
kind: Pod
metadata: {namespace: shop, name: db, labels: {app: db}}
spec: {nodeName: n2, containers: [{ports: [{containerPort: 5432, name: sql}, {containerPort: 5432, name: sql-u, protocol: UDP}]}]}
---
kind: Pod
metadata: {namespace: shop, name: probe, labels: {app: probe, tier: ops}}
spec: {nodeName: n2, containers: [{}]}
---
kind: Pod
metadata: {namespace: tools, name: scan, labels: {app: scan, tier: ops}}
spec: {nodeName: n1, containers: [{ports: [{containerPort: 9999, name: sql}]}]}
---
"#;

const ADDRESSES: [(&str, &str); 8] = [
    ("n1", "192.168.7.1"),
    ("n2", "192.168.7.2"),
    ("shop/web", "10.1.1.10"),
    ("shop/db", "10.1.2.11"),
    ("shop/db", "fd00::2:11"),
    ("shop/probe", "10.1.2.12"),
    ("tools/scan", "10.1.1.13"),
    ("tools/scan", "fd00::1:13"),
];

fn world(policies: &str) -> World {
    let mut world = World::read(&format!("{WORLD}{policies}")).unwrap();
    for (name, address) in ADDRESSES {
        world.give_address(name, address.parse().unwrap());
    }
    world
}

/// `from` and `to` are names of [`ADDRESSES`] (their first address) or addresses.
fn connection(from: &str, to: &str, protocol: Protocol, port: u16) -> Connection {
    let address = |name: &str| -> IpAddr {
        let known = ADDRESSES.iter().find(|(known, _)| *known == name).map_or(name, |(_, address)| address);
        known.parse().unwrap()
    };
    Connection { from: address(from), to: address(to), protocol, port }
}

fn tcp(world: &World, from: &str, to: &str, port: u16) -> bool {
    world.allowed(&connection(from, to, Protocol::Tcp, port))
}

fn refused(spec: &str) -> String {
    World::read(&format!("{{kind: NetworkPolicy, metadata: {{namespace: shop, name: p}}, spec: {spec}}}"))
        .unwrap_err()
        .to_string()
}

fn policy(spec: &str) -> World {
    world(&format!("{{kind: NetworkPolicy, metadata: {{namespace: shop, name: p}}, spec: {spec}}}"))
}

const DB: &str = "podSelector: {matchLabels: {app: db}}";

#[test]
fn pods_are_not_isolated_by_default() {
    let world = world("");
    assert!(tcp(&world, "tools/scan", "shop/db", 5432));
    let judgement = world.judge(&connection("tools/scan", "shop/db", Protocol::Tcp, 5432), Direction::Ingress);
    assert_eq!(judgement, Judgement::NotIsolated);
}

#[test]
fn one_policy_with_both_directions_and_all_peer_kinds() {
    let world = policy(&format!(
        "{{{DB}, policyTypes: [Ingress, Egress],
           ingress: [{{from: [{{ipBlock: {{cidr: 172.20.0.0/16, except: [172.20.5.0/24]}}}},
                              {{namespaceSelector: {{matchLabels: {{team: tools}}}}}},
                              {{podSelector: {{matchLabels: {{app: web}}}}}}],
                       ports: [{{protocol: TCP, port: 5432}}]}}],
           egress: [{{to: [{{ipBlock: {{cidr: 10.9.0.0/24}}}}], ports: [{{port: 5978}}]}}]}}"
    ));
    for from in ["172.20.4.4", "tools/scan", "shop/web"] {
        assert!(tcp(&world, from, "shop/db", 5432), "{from}");
        assert!(!tcp(&world, from, "shop/db", 5433), "{from}");
    }
    for from in ["172.20.5.4", "172.21.0.1", "shop/probe"] {
        assert!(!tcp(&world, from, "shop/db", 5432), "{from}");
    }
    assert!(!world.allowed(&connection("shop/web", "shop/db", Protocol::Udp, 5432)));
    assert!(tcp(&world, "shop/db", "10.9.0.200", 5978));
    assert!(!tcp(&world, "shop/db", "10.9.1.1", 5978));
    assert!(!tcp(&world, "shop/db", "10.9.0.200", 5979));
    assert!(!tcp(&world, "shop/db", "shop/web", 5978));
    assert!(tcp(&world, "shop/web", "shop/probe", 1), "others are not isolated");
}

#[test]
fn two_selectors_in_one_peer_mean_and_in_two_peers_or() {
    let ops = "podSelector: {matchLabels: {tier: ops}}";
    let tools = "namespaceSelector: {matchLabels: {team: tools}}";
    let both = policy(&format!("{{{DB}, ingress: [{{from: [{{{tools}, {ops}}}]}}]}}"));
    assert!(tcp(&both, "tools/scan", "shop/db", 1));
    assert!(!tcp(&both, "shop/probe", "shop/db", 1));
    let either = policy(&format!("{{{DB}, ingress: [{{from: [{{{tools}}}, {{{ops}}}]}}]}}"));
    assert!(tcp(&either, "tools/scan", "shop/db", 1));
    assert!(tcp(&either, "shop/probe", "shop/db", 1));
    assert!(!tcp(&either, "shop/web", "shop/db", 1));
}

#[test]
fn a_pod_selector_alone_means_the_policys_own_namespace() {
    let world = policy(&format!("{{{DB}, ingress: [{{from: [{{podSelector: {{}}}}]}}]}}"));
    assert!(tcp(&world, "shop/web", "shop/db", 1));
    assert!(!tcp(&world, "tools/scan", "shop/db", 1));
}

#[test]
fn an_empty_namespace_selector_means_all_pods_and_no_stranger() {
    let world = policy(&format!("{{{DB}, ingress: [{{from: [{{namespaceSelector: {{}}}}]}}]}}"));
    assert!(tcp(&world, "tools/scan", "shop/db", 1));
    assert!(!tcp(&world, "198.51.100.1", "shop/db", 1));
    assert!(!tcp(&world, "n1", "shop/db", 1));
}

#[test]
fn empty_lists_of_peers_and_ports_restrict_nothing_but_an_empty_list_of_rules_allows_nothing() {
    for rule in ["{}", "{from: []}", "{ports: []}", "{from: [], ports: []}", "{from: null}"] {
        let world = policy(&format!("{{{DB}, ingress: [{rule}]}}"));
        assert!(tcp(&world, "198.51.100.1", "shop/db", 1), "{rule}");
        assert!(world.allowed(&connection("198.51.100.1", "shop/db", Protocol::Other(1), 0)), "{rule}");
    }
    for section in ["", ", ingress: []", ", ingress: null"] {
        let world = policy(&format!("{{{DB}{section}}}"));
        assert!(!tcp(&world, "shop/web", "shop/db", 1), "{section}");
        assert!(tcp(&world, "shop/db", "shop/web", 1), "{section}");
    }
}

#[test]
fn policy_types_default_to_ingress_and_to_egress_too_if_there_is_an_egress_rule() {
    for (spec, ingress, egress) in [
        ("", true, false),
        ("egress: [{}]", true, true),
        ("egress: []", true, false),
        ("egress: null", true, false),
        ("policyTypes: [], egress: [{}]", true, true),
        ("policyTypes: [Egress]", false, true),
        ("policyTypes: [Ingress, Egress]", true, true),
    ] {
        let types = &policy(&format!("{{{DB}, {spec}}}")).policies[0].types;
        assert_eq!(types.contains(&Direction::Ingress), ingress, "{spec}");
        assert_eq!(types.contains(&Direction::Egress), egress, "{spec}");
    }
}

#[test]
fn a_section_outside_policy_types_is_not_enforced() {
    let web = "[{from: [{podSelector: {matchLabels: {app: web}}}]}]";
    let world = policy(&format!("{{{DB}, policyTypes: [Egress], ingress: {web}, egress: [{{}}]}}"));
    assert!(tcp(&world, "tools/scan", "shop/db", 1));
    let world =
        policy(&format!("{{{DB}, policyTypes: [Ingress], ingress: [{{}}], egress: [{{ports: [{{port: 1}}]}}]}}"));
    assert!(tcp(&world, "shop/db", "shop/web", 2));
}

#[test]
fn both_ends_must_agree() {
    let world = world(
        "{kind: NetworkPolicy, metadata: {namespace: shop, name: in}, spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}}
---
{kind: NetworkPolicy, metadata: {namespace: shop, name: out}, spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress]}}",
    );
    assert!(tcp(&world, "shop/probe", "shop/db", 1));
    assert!(!tcp(&world, "shop/web", "shop/db", 1));
    assert_eq!(
        world.judge(&connection("shop/web", "shop/db", Protocol::Tcp, 1), Direction::Egress),
        Judgement::Denied(vec!["shop/out".to_string()])
    );
}

#[test]
fn policies_add_up() {
    let one = |name: &str, app: &str| {
        format!(
            "{{kind: NetworkPolicy, metadata: {{namespace: shop, name: {name}}},
              spec: {{{DB}, ingress: [{{from: [{{podSelector: {{matchLabels: {{app: {app}}}}}}}]}}]}}}}\n---\n"
        )
    };
    let world = world(&format!("{}{}", one("a", "web"), one("b", "probe")));
    assert!(tcp(&world, "shop/web", "shop/db", 1));
    assert!(tcp(&world, "shop/probe", "shop/db", 1));
    assert!(!tcp(&world, "tools/scan", "shop/db", 1));
    assert_eq!(
        world.judge(&connection("shop/web", "shop/db", Protocol::Tcp, 1), Direction::Ingress),
        Judgement::Allowed(vec!["shop/a".to_string()])
    );
}

#[test]
fn an_ip_block_speaks_of_pods_and_nodes_and_the_outside_alike() {
    let world = policy(&format!(
        "{{{DB}, ingress: [{{from: [{{ipBlock: {{cidr: 10.1.1.13/32}}}}, {{ipBlock: {{cidr: 192.168.7.1/32}}}}]}}]}}"
    ));
    assert!(tcp(&world, "tools/scan", "shop/db", 1));
    assert!(tcp(&world, "n1", "shop/db", 1));
    assert!(!tcp(&world, "shop/web", "shop/db", 1));
    assert!(!tcp(&world, "fd00::1:13", "fd00::2:11", 1), "a block of one family says nothing about the other");
}

#[test]
fn what_one_block_leaves_out_another_peer_may_let_in() {
    let block = "{ipBlock: {cidr: 10.1.0.0/16, except: [10.1.1.0/24]}}";
    let world =
        policy(&format!("{{{DB}, ingress: [{{from: [{block}, {{podSelector: {{matchLabels: {{app: web}}}}}}]}}]}}"));
    assert!(tcp(&world, "shop/web", "shop/db", 1));
    assert!(!tcp(&world, "tools/scan", "shop/db", 1));
    assert!(tcp(&world, "shop/probe", "shop/db", 1));
}

#[test]
fn the_own_node_and_the_pod_itself_are_always_allowed() {
    let world = policy("{podSelector: {}, policyTypes: [Ingress, Egress]}");
    assert!(tcp(&world, "n2", "shop/db", 1));
    assert!(tcp(&world, "shop/db", "n2", 1));
    assert!(tcp(&world, "shop/db", "shop/db", 1));
    assert!(!tcp(&world, "n1", "shop/db", 1));
    assert!(!tcp(&world, "shop/db", "n1", 1));
    assert!(!tcp(&world, "shop/probe", "shop/db", 1), "a pod of the same node is not the node");
}

#[test]
fn a_named_port_is_looked_up_on_the_called_pod_with_its_protocol() {
    let world = policy(
        "{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{ports: [{port: sql}]}], egress: [{ports: [{port: sql}]}]}",
    );
    assert!(tcp(&world, "shop/web", "shop/db", 5432));
    assert!(!world.allowed(&connection("shop/web", "shop/db", Protocol::Udp, 5432)), "sql-u is another name");
    assert!(!tcp(&world, "shop/web", "shop/db", 9999));
    assert!(tcp(&world, "shop/web", "tools/scan", 9999), "the same name, another number");
    assert!(!tcp(&world, "shop/web", "tools/scan", 5432));
    assert!(!tcp(&world, "shop/web", "198.51.100.1", 5432), "a stranger has no named ports");
}

#[test]
fn a_port_range_includes_both_ends() {
    let world =
        policy(&format!("{{{DB}, ingress: [{{ports: [{{port: 100, endPort: 102}}, {{port: 7, endPort: 7}}]}}]}}"));
    let open: Vec<u16> = (0..200).filter(|port| tcp(&world, "shop/web", "shop/db", *port)).collect();
    assert_eq!(open, [7, 100, 101, 102]);
}

#[test]
fn a_protocol_that_is_not_named_is_not_allowed() {
    let world = policy(&format!("{{{DB}, ingress: [{{ports: [{{protocol: SCTP, port: 5432}}, {{protocol: UDP}}]}}]}}"));
    let allowed = |protocol, port| world.allowed(&connection("shop/web", "shop/db", protocol, port));
    assert!(allowed(Protocol::Sctp, 5432));
    assert!(!allowed(Protocol::Sctp, 5433));
    assert!(allowed(Protocol::Udp, 1));
    assert!(!allowed(Protocol::Tcp, 5432));
    assert!(!allowed(Protocol::Other(1), 0));
}

#[test]
fn the_four_operators() {
    for (expression, web, probe, scan) in [
        ("{key: app, operator: In, values: [web, scan]}", true, false, true),
        ("{key: app, operator: NotIn, values: [web]}", false, true, true),
        ("{key: tier, operator: NotIn, values: [ops]}", true, false, false),
        ("{key: tier, operator: Exists}", false, true, true),
        ("{key: tier, operator: DoesNotExist}", true, false, false),
    ] {
        let world = policy(&format!(
            "{{{DB}, ingress: [{{from: [{{namespaceSelector: {{}}, podSelector: {{matchExpressions: [{expression}]}}}}]}}]}}"
        ));
        let seen = ["shop/web", "shop/probe", "tools/scan"].map(|from| tcp(&world, from, "shop/db", 1));
        assert_eq!(seen, [web, probe, scan], "{expression}");
    }
}

#[test]
fn every_namespace_can_be_selected_by_its_name() {
    let world = policy(&format!(
        "{{{DB}, ingress: [{{from: [{{namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: tools}}}}}}]}}]}}"
    ));
    assert!(tcp(&world, "tools/scan", "shop/db", 1));
    assert!(!tcp(&world, "shop/web", "shop/db", 1));
}

#[test]
fn what_the_api_server_refuses_is_refused() {
    for (spec, about) in [
        (r#"{ingress: [{from: [{}]}]}"#, "neither a selector nor an ipBlock"),
        (r#"{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]}"#, "beside a selector"),
        (r#"{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]}"#, "not a strict part"),
        (r#"{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}"#, "not a strict part"),
        (r#"{ingress: [{ports: [{port: 10, endPort: 9}]}]}"#, "less than port"),
        (r#"{ingress: [{ports: [{port: sql, endPort: 9}]}]}"#, "without a numerical port"),
        (r#"{ingress: [{ports: [{port: "80"}]}]}"#, "neither a number nor a port's name"),
        (r#"{ingress: [{ports: [{port: 0}]}]}"#, "not in 1..65535"),
        (r#"{ingress: [{ports: [{protocol: tcp}]}]}"#, "none of TCP, UDP, SCTP"),
        (r#"{policyTypes: [ingress]}"#, "neither Ingress nor Egress"),
        (r#"{podSelector: {matchExpressions: [{key: a, operator: In}]}}"#, "does not go with"),
        (r#"{ingress: [{to: []}]}"#, "only \"from\" has a meaning"),
        (r#"{ingres: []}"#, "unknown field"),
    ] {
        let error = refused(spec);
        assert!(error.contains(about), "{spec}: {error}");
        assert!(error.contains("NetworkPolicy"), "{error}");
    }
}
