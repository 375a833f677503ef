//! All backends of a service are replaced, five times, while clients of all kinds use it: nobody notices.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Duration;

use cirri_e2e::lab::{LOAD_PATIENCE, Lab, Load, eventually};
use serde_json::Value;

/// How often everything is replaced.
const ROUNDS: u32 = 5;
/// Backends at a time, spread over both nodes.
const BACKENDS: u32 = 4;
/// New connections a second of each of the three clients.
const RATE: &str = "100";
/// How long a long connection lasts: a backend that terminates is busy so long at most.
const LONG_SECONDS: &str = "4";
/// How long a backend may take to become idle.
const IDLE: Duration = Duration::from_secs(20);

const CLIENTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {nodeName: node1, containers: [{name: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: packets, namespace: shop, annotations: {cirri.io/service-translation: packet}}
spec: {nodeName: node2, containers: [{name: c}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.80
  loadBalancerIP: 203.0.113.180
  selector: {app: web}
  ports: [{port: 80}]
"#;

#[test]
fn backends_are_replaced_five_times_and_no_connection_fails() {
    let lab = Lab::up("rolling", 2, &[]).unwrap();
    lab.apply(&manifests(&[(0, "ready")])).unwrap();
    let (inside, outside): (SocketAddr, SocketAddr) =
        ("10.96.0.80:80".parse().unwrap(), "203.0.113.180:80".parse().unwrap());
    let patience = ["--timeout", LOAD_PATIENCE];
    let load = ["--rate", RATE, "--seconds", "600", "--longs", "4", "--long-seconds", LONG_SECONDS];
    let arguments = [&load[..], &patience[..]].concat();
    let start = |from, to| Load::with(&lab, from, to, &arguments).unwrap();
    let loads = [start("shop/client", inside), start("shop/packets", inside), start("world", outside)];

    for round in 0..ROUNDS {
        // The new ones beside the old ones, then the old ones terminate, then they go.
        lab.apply(&manifests(&[(round, "ready"), (round + 1, "ready")])).unwrap();
        lab.apply(&manifests(&[(round, "terminating"), (round + 1, "ready")])).unwrap();
        for index in 0..BACKENDS {
            let pod = format!("shop/{}", name(round, index));
            eventually(&format!("{pod} is idle"), IDLE, || connections(&lab, &pod) == 0);
        }
        lab.apply(&manifests(&[(round + 1, "ready")])).unwrap();
    }

    let mut told = String::new();
    for load in loads {
        let name = load.name().to_string();
        let report = load.stop().unwrap();
        cirri_e2e::say(format!(
            "{name}: {} connections, slowest {:.1} ms; {} long ones, longest gap {:.1} ms",
            report.connections, report.max_ms, report.long.transfers, report.long.longest_gap_ms
        ));
        let enough = report.connections > 1000 && report.long.transfers > u64::from(ROUNDS);
        if report.failed > 0 || !report.long.ok || !enough {
            let _ = writeln!(told, "{name}: {report:?}");
        }
    }
    assert!(told.is_empty(), "{told}");
    let services: Value = lab.ask("node1", &["service", "list"]).unwrap();
    assert!(services.to_string().contains("web"), "{services}");
}

fn name(generation: u32, index: u32) -> String {
    format!("web-{generation}-{index}")
}

/// The clients, the service and these generations of backends.
fn manifests(generations: &[(u32, &str)]) -> String {
    let mut text = CLIENTS.to_string();
    for (generation, state) in generations {
        for index in 0..BACKENDS {
            let (name, node) = (name(*generation, index), index % 2 + 1);
            let end = if *state == "terminating" { ", deletionTimestamp: \"2030-01-01T00:00:00Z\"" } else { "" };
            let _ = write!(
                text,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: web}}{end}}}\n\
                 spec: {{nodeName: node{node}, containers: [{{name: c, ports: [{{containerPort: 80}}]}}]}}\n"
            );
        }
    }
    text
}

/// Connections to a pod's port that are open, in either family.
fn connections(lab: &Lab, pod: &str) -> usize {
    let tables = lab.netns(pod).unwrap().run(|| {
        ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap())
    });
    let open = |line: &&str| {
        let mut fields = line.split_whitespace().skip(1);
        let port = fields.next().and_then(|local| local.rsplit_once(':')).map(|(_, port)| port);
        // LISTEN, TIME_WAIT and CLOSE are nobody's business any more.
        port == Some("0050") && !matches!(fields.nth(1), Some("0A" | "06" | "07"))
    };
    tables.unwrap().iter().map(|table| table.lines().filter(open).count()).sum()
}
