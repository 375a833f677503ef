//! Real programs through services: curl with HTTP keep-alive against nginx, dig against dnsmasq, what a cloud's load
//! balancer asks of `healthCheckNodePort`, and programs of the host that want a node port for themselves.

use cirri_e2e::lab::{self, Lab, LabError};

/// Requests over one connection.
const REQUESTS: usize = 6;

const MANIFESTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web1, namespace: shop, labels: {app: web}}
spec: {nodeName: node1, containers: [{name: nginx, ports: [{name: http, containerPort: 80}], command: [sh, -c], args: [NGINX]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web2, namespace: shop, labels: {app: web}}
spec: {nodeName: node2, containers: [{name: nginx, ports: [{name: http, containerPort: 80}], command: [sh, -c], args: [NGINX]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: dns1, namespace: shop, labels: {app: dns}}
spec: {nodeName: node1, containers: [{name: dnsmasq, ports: [{containerPort: 53, protocol: UDP}, {name: tcp, containerPort: 53}], command: [dnsmasq], args: DNSMASQ}]}
---
apiVersion: v1
kind: Pod
metadata: {name: dns2, namespace: shop, labels: {app: dns}}
spec: {nodeName: node2, containers: [{name: dnsmasq, ports: [{containerPort: 53, protocol: UDP}, {name: tcp, containerPort: 53}], command: [dnsmasq], args: DNSMASQ}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {nodeName: node1, containers: [{name: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: packets, namespace: shop, annotations: {cirri.io/service-translation: packet}}
spec: {nodeName: node1, containers: [{name: c}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  ipFamilyPolicy: RequireDualStack
  clusterIPs: [10.96.0.80, "fd00:10:96::80"]
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http, nodePort: 30080}]
status: {loadBalancer: {ingress: [{ip: 203.0.113.180}, {ip: "2001:db8:1b::80"}]}}
---
apiVersion: v1
kind: Service
metadata: {name: dns, namespace: shop}
spec:
  ipFamilyPolicy: RequireDualStack
  clusterIPs: [10.96.0.53, "fd00:10:96::53"]
  externalIPs: [192.0.2.53]
  selector: {app: dns}
  ports: [{name: udp, port: 53, protocol: UDP}, {name: tcp, port: 53}]
---
apiVersion: v1
kind: Service
metadata: {name: near, namespace: shop}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  healthCheckNodePort: 30999
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
"#;

const NGINX: &str = r#"'printf "daemon off; pid nginx.id; error_log stderr; events {} http { access_log off; server { listen 80; listen [::]:80; location / { return 200 \"$HOSTNAME\\n\"; } } }" > nginx.conf && exec nginx -p . -e stderr -c nginx.conf'"#;
const DNSMASQ: &str = r#"[--keep-in-foreground, --conf-file=/dev/null, --pid-file=, --user=root, --no-resolv, --no-hosts, --address=/web.test/192.0.2.80, "--address=/web.test/2001:db8::80"]"#;

/// Who asks: arguments of `cirri lab exec`, and the addresses of the web server and of the name server.
const CLIENTS: [(&str, &[&str], &[&str]); 4] = [
    ("shop/client", &["10.96.0.80", "[fd00:10:96::80]", "172.31.255.12:30080"], &["10.96.0.53", "fd00:10:96::53"]),
    ("shop/packets", &["10.96.0.80", "[fd00:10:96::80]", "172.31.255.12:30080"], &["10.96.0.53", "fd00:10:96::53"]),
    ("node:node1", &["10.96.0.80", "[fd00:10:96::80]", "127.0.0.1:30080"], &["10.96.0.53", "fd00:10:96::53"]),
    ("world", &["203.0.113.180", "[2001:db8:1b::80]", "172.31.255.12:30080"], &["192.0.2.53"]),
];

#[test]
fn real_programs_use_services() {
    let lab = Lab::up("programs", 2, &[]).unwrap();
    let manifests = MANIFESTS.replace("NGINX", NGINX).replace("DNSMASQ", DNSMASQ);
    lab.apply(&manifests).unwrap();
    for (who, web, dns) in CLIENTS {
        for address in web {
            keep_alive(&lab, who, address);
        }
        for address in dns {
            resolve(&lab, who, address);
        }
    }
    health(&lab, &manifests);
    bind(&lab);
}

/// Several requests over one connection, which are answered by one and the same server.
fn keep_alive(lab: &Lab, who: &str, address: &str) {
    let url = format!("http://{address}/");
    let mut command = vec!["curl", "--silent", "--show-error", "--max-time", "5", "--write-out", "%{num_connects}\n"];
    command.extend(std::iter::repeat_n(url.as_str(), REQUESTS));
    let printed = exec(lab, who, &command).unwrap();
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines.len(), 2 * REQUESTS, "{who} -> {url}: {printed}");
    for (index, answer) in lines.chunks(2).enumerate() {
        let connects = if index == 0 { "1" } else { "0" };
        assert_eq!(answer, [lines[0], connects], "{who} -> {url}: {printed}");
    }
    assert!(matches!(lines[0], "web1" | "web2"), "{who} -> {url}: {printed}");
}

/// Names, by datagrams and by TCP. dig refuses an answer that comes from another address than it asked.
fn resolve(lab: &Lab, who: &str, server: &str) {
    let server = format!("@{server}");
    for (kind, answer) in [("A", "192.0.2.80"), ("AAAA", "2001:db8::80")] {
        for transport in ["+notcp", "+tcp"] {
            let command = ["dig", "+short", "+tries=1", "+time=3", transport, &server, "web.test", kind];
            let printed = exec(lab, who, &command).unwrap();
            assert_eq!(printed.trim(), answer, "{who}: {command:?}");
        }
    }
}

/// Each node says whether it has endpoints, and how many.
fn health(lab: &Lab, manifests: &str) {
    let ask = |node: &str| {
        let url = format!("http://{node}:30999/healthz");
        let command = ["curl", "--silent", "--show-error", "--max-time", "5", "--write-out", " %{http_code}", &url];
        exec(lab, "world", &command).unwrap()
    };
    for node in ["172.31.255.11", "172.31.255.12"] {
        let answer = ask(node);
        assert!(answer.ends_with(" 200") && answer.contains("\"localEndpoints\":1"), "{node}: {answer}");
    }
    let without = manifests.split("---").filter(|document| !document.contains("name: web2,"));
    lab.apply(&without.collect::<Vec<_>>().join("---")).unwrap();
    assert!(ask("172.31.255.11").ends_with(" 200"));
    let answer = ask("172.31.255.12");
    assert!(answer.ends_with(" 503") && answer.contains("\"localEndpoints\":0"), "{answer}");
}

/// A program of the host does not get a node port; its neighbours are free, and so are a pod's own ports.
fn bind(lab: &Lab) {
    let binary = lab::binary().unwrap();
    let listen = |who: &str, port: &str| {
        let binary = binary.to_str().unwrap();
        exec(lab, who, &["timeout", "1", binary, "lab", "__echo", "--name", "x/x", port])
    };
    let refused = |outcome: Result<String, LabError>| outcome.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(refused(listen("node:node1", "30080/tcp")).contains("Operation not permitted"));
    // Ended by `timeout`, after it listened.
    for (who, port) in [("node:node1", "30080/udp"), ("node:node1", "30081/tcp"), ("shop/client", "30080/tcp")] {
        let ended = refused(listen(who, port));
        assert!(ended.contains("124") && !ended.contains("not permitted"), "{who} {port}: {ended}");
    }
}

/// What a program prints that runs in a pod, a node or the world.
fn exec(lab: &Lab, who: &str, command: &[&str]) -> Result<String, LabError> {
    let mut arguments = vec!["lab", "exec", "--name", lab.name()];
    match who.strip_prefix("node:") {
        Some(node) => arguments.extend(["--node", node]),
        None if who == "world" => arguments.push("--world"),
        None => arguments.push(who),
    }
    arguments.push("--");
    arguments.extend(command);
    let output = lab::run(arguments)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
