use super::*;

pub(super) fn one(text: &str) -> Resource {
    let mut all = parse_documents("test.yaml", text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(all.len(), 1);
    all.remove(0)
}

pub(super) fn refused(text: &str) -> String {
    match parse_documents("test.yaml", text) {
        Ok(all) => panic!("accepted: {all:?}\n{text}"),
        Err(error) => error.to_string(),
    }
}

fn policy(spec: &str) -> NetworkPolicy {
    match one(&policy_text(spec)) {
        Resource::NetworkPolicy(policy) => policy,
        other => panic!("expected a policy, got {other:?}"),
    }
}

fn policy_text(spec: &str) -> String {
    let spec: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    format!("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata:\n  name: p\nspec:\n{spec}")
}

#[test]
fn policy_types_default_as_the_api_server_has_it() {
    use PolicyType::{Egress, Ingress};
    let cases: &[(&str, &[PolicyType])] = &[
        ("podSelector: {}", &[Ingress]),
        ("podSelector: {}\negress: []", &[Ingress]),
        ("podSelector: {}\negress:", &[Ingress]),
        ("podSelector: {}\negress: [{}]", &[Ingress, Egress]),
        ("podSelector: {}\npolicyTypes: []\negress: [{}]", &[Ingress, Egress]),
        ("podSelector: {}\npolicyTypes: [Egress]\ningress: [{}]", &[Egress]),
        ("policyTypes: [Egress, Ingress]", &[Egress, Ingress]),
    ];
    for (spec, expected) in cases {
        assert_eq!(policy(spec).spec.policy_types, *expected, "{spec}");
    }
}

#[test]
fn a_policy_is_read_whole() {
    let policy = policy(
        "podSelector:
  matchLabels: {app: web}
  matchExpressions:
  - {key: tier, operator: In, values: [a, b]}
ingress:
- from:
  - ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}
  - namespaceSelector: {}
    podSelector: {}
  ports:
  - port: 80
  - {protocol: UDP, port: 5000, endPort: 6000}
  - {protocol: SCTP}
  - port: http",
    );
    assert_eq!(policy.namespace(), "default");
    let rule = &policy.spec.ingress[0];
    assert!(matches!(&rule.from[0], PolicyPeer::Addresses { ip_block } if ip_block.except.len() == 1));
    let anyone = Some(LabelSelector::default());
    assert_eq!(rule.from[1], PolicyPeer::Pods { pod_selector: anyone.clone(), namespace_selector: anyone });
    let port = |protocol, port, end_port| PolicyPort { protocol, port, end_port };
    assert_eq!(
        rule.ports,
        [
            port(Protocol::Tcp, Some(PortRef::Number(80)), None),
            port(Protocol::Udp, Some(PortRef::Number(5000)), Some(6000)),
            port(Protocol::Sctp, None, None),
            port(Protocol::Tcp, Some(PortRef::Name("http".into())), None),
        ]
    );
}

#[test]
fn an_error_names_file_line_column_field_and_remedy() {
    assert_eq!(
        refused(&policy_text("podSelector: {}\ningress:\n- from:\n  - podSelecter: {}")),
        "test.yaml:9:7: NetworkPolicy default/p: spec.ingress[0].from[0].podSelecter: unknown field; \
         did you mean `podSelector`? Otherwise remove it"
    );
    assert_eq!(
        refused(&policy_text("podSelector: {}\ningress:\n- ports:\n  - {port: 80, endPort: 70}")),
        "test.yaml:9:27: NetworkPolicy default/p: spec.ingress[0].ports[0].endPort: 70 is below port 80; make it at least `port`"
    );
    assert_eq!(
        refused("apiVersion: v1\nkind: Pod\nmetadata: {name: 5}\nspec: {}\n"),
        "test.yaml:3:18: Pod: metadata.name: expected a string, found a number; for a string, write \"5\" in quotes"
    );
    let broken = refused("apiVersion: v1\nkind: [\n");
    assert!(broken.starts_with("test.yaml:") && broken.contains("not valid YAML"), "{broken}");
}

#[test]
fn what_cannot_be_valid_is_refused() {
    let cases = [
        ("podSelector: {}\nextra: 1", "spec.extra"),
        ("podSelector: {matchLabels: {'a b': c}}", "spec.podSelector.matchLabels.a b"),
        ("podSelector: {matchLabels: {a: -c}}", "spec.podSelector.matchLabels.a"),
        ("podSelector: {matchLabels: {a: 1}}", "spec.podSelector.matchLabels.a"),
        ("podSelector: {matchExpressions: [{key: a, operator: In}]}", "matchExpressions[0]"),
        ("podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}", "matchExpressions[0]"),
        ("podSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}", "matchExpressions[0].operator"),
        ("policyTypes: [ingress]", "spec.policyTypes[0]"),
        ("policyTypes: [Ingress, Ingress]", "spec.policyTypes[1]"),
        ("ingress: [{from: [{}]}]", "spec.ingress[0].from[0]"),
        ("ingress: [{to: []}]", "spec.ingress[0].to"),
        ("egress: [{from: []}]", "spec.egress[0].from"),
        ("ingress: {}", "spec.ingress"),
        ("ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]", "spec.ingress[0].from[0]"),
        ("ingress: [{from: [{ipBlock: {cidr: 10.0.0.0}}]}]", "ipBlock.cidr"),
        ("ingress: [{from: [{ipBlock: {}}]}]", "ipBlock.cidr"),
        ("ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]", "except[0]"),
        ("ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]", "except[0]"),
        ("ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: ['fd00::/16']}}]}]", "except[0]"),
        ("ingress: [{ports: [{port: 0}]}]", "ports[0].port"),
        ("ingress: [{ports: [{port: 65536}]}]", "ports[0].port"),
        ("ingress: [{ports: [{port: '80'}]}]", "ports[0].port"),
        ("ingress: [{ports: [{port: 80.5}]}]", "ports[0].port"),
        ("ingress: [{ports: [{port: http, endPort: 90}]}]", "ports[0].endPort"),
        ("ingress: [{ports: [{endPort: 90}]}]", "ports[0].endPort"),
        ("ingress: [{ports: [{protocol: tcp}]}]", "ports[0].protocol"),
        ("ingress: [{ports: [{protocol: ICMP}]}]", "ports[0].protocol"),
    ];
    for (spec, field) in cases {
        let error = refused(&policy_text(spec));
        assert!(error.contains(field), "{spec}\n{error}");
    }
}

#[test]
fn headers_are_checked() {
    let cases = [
        ("kind: Pod", "apiVersion"),
        ("apiVersion: v1", "kind"),
        ("{apiVersion: v1, kind: Deployment}", "kind"),
        ("{apiVersion: v1, kind: NetworkPolicy}", "apiVersion"),
        ("{apiVersion: v1, kind: Namespace, metadata: {name: a, namespace: b}}", "metadata.namespace"),
        ("{apiVersion: v1, kind: Namespace, metadata: {name: A}}", "metadata.name"),
        ("{apiVersion: v1, kind: Namespace, metadata: {generateName: a-}}", "metadata.name"),
        ("{apiVersion: v1, kind: Namespace, metadata: {name: a, label: {}}}", "metadata.label"),
        ("{apiVersion: v1, kind: Namespace, metadata: {name: a}, metadata: {name: b}}", "YAML"),
        ("- 1", "document"),
    ];
    for (text, field) in cases {
        let error = refused(text);
        assert!(error.contains(field), "{text}\n{error}");
    }
}

#[test]
fn a_real_pod_passes_and_a_misspelled_one_does_not() {
    let text = "
apiVersion: v1
kind: Pod
metadata:
  name: web-0
  labels: {app: web}
  annotations: {Example.com/Note: 'a; b'}
  ownerReferences: [{kind: StatefulSet, name: web}]
spec:
  nodeName: node-1
  nodeSelector: {disk: ssd}
  tolerations: [{operator: Exists}]
  securityContext: {runAsUser: 1000}
  volumes: [{name: data, emptyDir: {}}]
  containers:
  - name: web
    image: nginx
    command: [nginx]
    args: [-g, daemon off;]
    env: [{name: A, value: '1'}, {name: B, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    ports: [{name: http, containerPort: 80, hostPort: 8080}, {containerPort: 53, protocol: UDP}]
    readinessProbe: {httpGet: {path: /, port: http}}
status:
  phase: Running
  podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]
";
    let Resource::Pod(pod) = one(text) else { panic!("not a pod") };
    assert_eq!((pod.namespace(), pod.spec.service_account_name.as_str()), ("default", "default"));
    assert_eq!(pod.spec.node_name.as_deref(), Some("node-1"));
    assert_eq!(pod.spec.containers[0].ports[1].protocol, Protocol::Udp);
    assert_eq!(pod.status.pod_ips.len(), 2);
    for (right, wrong) in [
        ("nodeName:", "nodename:"),
        ("containers:", "container:"),
        ("command:", "comand:"),
        ("containerPort: 53", "containerPort: 0"),
        ("metadata:", "metaData:"),
    ] {
        refused(&text.replacen(right, wrong, 1));
    }
}

#[test]
fn lists_unfold_empty_documents_pass_and_defaults_are_filled_in() {
    let text = "
---
# nothing here
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: shop}}
- apiVersion: v1
  kind: Node
  metadata: {name: n1}
  spec: {podCIDR: 10.244.1.0/24}
  status: {addresses: [{type: InternalIP, address: 192.0.2.1}], capacity: {cpu: '2'}}
---
{apiVersion: v1, kind: Pod, metadata: {name: y, namespace: shop}, spec: {containers: [{name: c}]}}
";
    let all = parse_documents("test.yaml", text).unwrap();
    let keys: Vec<String> = all.iter().map(Resource::store_key).collect();
    assert_eq!(keys, ["resources/Namespace/_/shop", "resources/Node/_/n1", "resources/Pod/shop/y"]);
    assert_eq!(all[0].metadata().labels.get(NAMESPACE_NAME_LABEL).map(String::as_str), Some("shop"));
    let Resource::Node(node) = &all[1] else { panic!("not a node") };
    assert_eq!(node.spec.pod_cidrs, ["10.244.1.0/24".parse().unwrap()]);
    assert_eq!(parse_documents("empty.yaml", "").unwrap(), []);
    assert_eq!(parse_documents("empty.yaml", "# only a comment\n---\n").unwrap(), []);
}

#[test]
fn yaml_is_read_as_version_1_2() {
    let Resource::Pod(pod) = one(
        "{apiVersion: v1, kind: Pod, metadata: {name: y, labels: {on: no, y: yes}}, spec: {containers: [{name: n}]}}",
    ) else {
        panic!("not a pod")
    };
    let labels: Vec<_> = pod.metadata.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!((pod.metadata.name.as_str(), labels), ("y", vec!["on=no".to_string(), "y=yes".to_string()]));
}

#[test]
fn json_comes_back_as_it_went() {
    let texts = [
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {a: b}, annotations: {n: \"x \\\"y\\\" \\n \\u263a \\ud83d\\ude00 / \\\\ \\t\"}}}",
        "{apiVersion: v1, kind: Node, metadata: {name: n1}, spec: {podCIDRs: [10.0.0.0/24, 'fd00::/64']}, status: {addresses: [{type: Hostname, address: n1}]}}",
        "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {hostNetwork: true, containers: [{name: c, image: i, command: [a], args: ['5', 'null', ''], env: [{name: A, value: 'yes'}], ports: [{name: x, containerPort: 1, hostPort: 2}]}]}, status: {podIPs: [{ip: 'fd00::1'}]}}",
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}, spec: {podSelector: {matchExpressions: [{key: a, operator: NotIn, values: ['1']}]}, ingress: [{from: [{podSelector: {}}, {ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}], ports: [{port: http}, {port: 1, endPort: 9, protocol: UDP}]}], egress: [{}]}}",
    ];
    for text in texts {
        let resource = one(text);
        let json = resource.to_json();
        assert_eq!(Resource::from_json(&json).unwrap_or_else(|e| panic!("{e}\n{json}")), resource, "{json}");
    }
    assert!(Resource::from_json("").is_err());
    assert!(Resource::from_json(&format!("{0}\n---\n{0}", one(texts[0]).to_json())).is_err());
}

#[test]
fn a_resource_that_is_deep_or_aliased_without_end_is_refused_not_followed() {
    for depth in [100, 1_000, 100_000] {
        refused(&format!("{}{}", "[".repeat(depth), "]".repeat(depth)));
    }
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..12 {
        let refs = vec![format!("*a{}", i - 1); 10].join(", ");
        bomb.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
    }
    refused(&bomb);
}

#[test]
fn init_containers_that_go_on_are_containers_of_the_pod() {
    let text = "
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  containers: [{name: c, ports: [{name: http, containerPort: 80}]}]
  initContainers:
  - {name: proxy, restartPolicy: Always, ports: [{name: admin, containerPort: 15000, hostPort: 15000}]}
  - {name: migrate, ports: [{name: over, containerPort: 1}]}
";
    let resource = one(text);
    let Resource::Pod(pod) = &resource else { panic!("not a pod") };
    let running: Vec<&str> = pod.spec.running().map(|container| container.name.as_str()).collect();
    assert_eq!(running, ["c", "proxy"]);
    assert_eq!(Resource::from_json(&resource.to_json()).unwrap(), resource);
    refused(&text.replace("name: proxy", "name: c"));
    refused(&text.replace("containerPort: 15000", "containerPort: 0"));
}

#[test]
fn what_aliases_stand_for_is_bounded_by_the_size_of_the_document() {
    let pod = |name: &str, labels: &str| {
        format!(
            "- {{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {labels}}}, spec: {{containers: [{{name: c}}]}}}}\n"
        )
    };
    let pods: String = (0..2_000).map(|i| pod(&format!("p{i}"), "*l")).collect();
    let list = format!("apiVersion: v1\nkind: List\nitems:\n{}{pods}", pod("first", "&l {app: web, tier: front}"));
    assert_eq!(parse_documents("test.yaml", &list).unwrap().len(), 2_001, "one set of labels for all");

    let long = "x".repeat(10_000);
    let (many, depth) = (vec!["*a"; 3_000].join(","), 40);
    let nested = (0..depth).map(|i| format!("&n{i} [")).collect::<String>() + &vec!["1"; 8_000].join(",");
    for (bomb, limit) in [
        (format!("a: &a [{}]\nb: [{many}]\n", vec!["1"; 100].join(",")), "values with its aliases"),
        (format!("a: &a {long}\nb: [{many}]\n"), "bytes of text with its aliases"),
        (format!("a: &a {{? {long} : 1}}\nb: [{many}]\n"), "bytes of text with its aliases"),
        (format!("a: &a {{k: {long}}}\nb:\n{}", "- {<<: *a}\n".repeat(3_000)), "bytes of text with its aliases"),
        (format!("a: {nested}{}\n", "]".repeat(depth)), "values with its aliases"),
        (format!("a: {}", "{a: ".repeat(70) + &"}".repeat(70)), "nested more than 48 deep"),
        (format!("a: [{}]\n", vec!["1"; 60_000].join(",")), "values with its aliases"),
    ] {
        let error = refused(&bomb);
        assert!(error.contains(limit) && error.contains(&format!("{} bytes", bomb.len())), "{error}\n{}", &bomb[..80]);
    }
}

#[test]
fn thousands_of_ports_are_told_apart() {
    let ports = |last: &str| -> String {
        let port = |i: u32| format!("{{name: p{i}, port: {i}}}");
        (1..=8_000).map(port).chain([last.to_owned()]).collect::<Vec<_>>().join(", ")
    };
    let service = |last: &str| {
        format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: web}}, spec: {{clusterIP: 10.96.0.1, ports: [{}]}}}}",
            ports(last)
        )
    };
    let slice = |last: &str| {
        format!(
            "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: web}}, addressType: IPv4, ports: [{}]}}",
            ports(last)
        )
    };
    for text in [service("{name: other, port: 50000}"), slice("{name: other, port: 50000}")] {
        one(&text);
    }
    for (text, what) in [
        (service("{name: p7, port: 50000}"), "a second port is named \"p7\""),
        (service("{name: other, port: 7}"), "a second port is TCP 7"),
        (slice("{name: p7, port: 50000}"), "a second port is named \"p7\""),
    ] {
        assert!(refused(&text).contains(what), "{what}");
    }
}

#[test]
fn ports_cost_what_they_come_to_and_not_the_square_of_it() {
    let ports = |count: u32| -> String {
        let port = |i: u32| format!(r#"{{"name": "p{i}", "port": {i}}}"#);
        (1..=count).map(port).collect::<Vec<_>>().join(", ")
    };
    let service = |count| {
        format!(
            r#"{{"apiVersion": "v1", "kind": "Service", "metadata": {{"name": "web"}}, "spec": {{"clusterIP": "10.96.0.1", "ports": [{}]}}}}"#,
            ports(count)
        )
    };
    let slice = |count| {
        format!(
            r#"{{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {{"name": "web"}}, "addressType": "IPv4", "ports": [{}]}}"#,
            ports(count)
        )
    };
    let cost = |text: &str| {
        let reading = || {
            let begun = time_on_processor();
            Resource::from_json(text).unwrap();
            time_on_processor() - begun
        };
        (0..3).map(|_| reading()).min().unwrap()
    };
    for (kind, few, many) in [("Service", service(8_000), service(32_000)), ("slice", slice(8_000), slice(32_000))] {
        let (few, many) = (cost(&few), cost(&many));
        assert!(many < 8 * few, "{kind}: four times as many ports cost {many} ns, not {few} ns");
    }
}

/// Nanoseconds that this thread has run, whatever else the machine does.
fn time_on_processor() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn what_is_echoed_of_input_is_cut() {
    let long = "9".repeat(1_000_000);
    let key = "k".repeat(1_000_000);
    let pod = |field: &str| {
        format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {{containers: [{{name: c}}], {field}}}\n")
    };
    for text in [
        policy_text(&format!("ingress: [{{ports: [{{port: {long}}}]}}]")),
        policy_text(&format!("ingress: [{{ports: [{{port: 0.{long}}}]}}]")),
        policy_text(&format!("ingress: [{{ports: [{{protocol: '{long}'}}]}}]")),
        policy_text(&format!("ingress: [{{from: [{{ipBlock: {{cidr: '{long}'}}}}]}}]")),
        policy_text(&format!("podSelector: {{matchLabels: {{? {key} : '-'}}}}")),
        policy_text(&format!("podSelector: {{matchLabels: {{a: {key}}}}}")),
        policy_text(&format!("podSelector: {{matchExpressions: [{{key: a, operator: {key}}}]}}")),
        policy_text(&format!("? {key}\n: 1")),
        pod(&format!("nodeName: {key}")),
        pod(&format!("? {key} : 1")),
        format!("apiVersion: v1\nkind: {key}\n"),
        format!("apiVersion: {key}\nkind: Pod\n"),
        format!("apiVersion: {key}/v1.x\nkind: Pod\n").replace("k/", "k.x/"),
        format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {key}}}\n"),
        format!("a: *{key}\n"),
        format!("{key}: 1\n{key}: 2\n"),
        format!("!{key} a: 1\n"),
        format!("a: !!int {key}\n"),
        format!("a: \"{key}"),
        format!("a: {key}: {key}"),
    ] {
        let error = refused(&text);
        assert!(error.chars().count() < 700, "{} characters: {}", error.len(), crate::cut::cut_to(&error, 300));
    }
}
