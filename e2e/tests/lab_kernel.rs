//! A node at work in a few words: what `cargo xtask kernels` also runs on other kernels. Needs root.

use cirri_e2e::edge::{EdgeLab, VIP, VIP6, ask_datagram, spread};
use cirri_e2e::lab::Lab;
use cirri_e2e::say;
use serde_json::Value;
use std::time::Instant;

/// A kernel in an emulated machine is slow, the verifier above all.
const PATIENT: &[&str] = &["--timeout", "1800"];
/// A server on each node, and a client.
const PODS: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web1, namespace: shop, labels: {app: web}}
spec: {nodeName: node1, containers: [{name: c, ports: [{containerPort: 80}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web2, namespace: shop, labels: {app: web}}
spec: {nodeName: node2, containers: [{name: c, ports: [{containerPort: 80}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {nodeName: node1, containers: [{name: c}]}
---
";

const POLICY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: nobody}}}]}]
---
";

const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: NodePort
  ipFamilyPolicy: PreferDualStack
  selector: {app: web}
  ports: [{port: 80}]
---
";

/// One lab for all of it: on a slow kernel most of the time goes into verifying the programs of its agents.
#[test]
fn a_node_works() {
    let lab = Lab::up("kern", 2, PATIENT).unwrap();
    part("pod", || pods_reach_each_other(&lab));
    part("policy", || a_policy_is_in_force(&lab));
    part("service", || a_service_answers(&lab));
}

/// `cargo xtask kernels` reads off which parts held.
fn part(name: &str, body: impl FnOnce()) {
    let begun = Instant::now();
    body();
    say(format_args!("@part {name} {}", begun.elapsed().as_secs()));
}

fn pods_reach_each_other(lab: &Lab) {
    lab.apply(PODS).unwrap();
    judge(lab, "shop/web1", "allowed");
    judge(lab, "shop/web2", "allowed");
}

fn a_policy_is_in_force(lab: &Lab) {
    lab.apply(&[PODS, POLICY].concat()).unwrap();
    judge(lab, "shop/web1", "denied");
    judge(lab, "shop/web2", "denied");
    lab.apply(&[PODS, &POLICY.replace("nobody", "client")].concat()).unwrap();
    judge(lab, "shop/web1", "allowed");
    judge(lab, "shop/web2", "allowed");
}

fn a_service_answers(lab: &Lab) {
    lab.apply(&[PODS, SERVICE].concat()).unwrap();
    // In the system call, and in the packet: a client of the world has no socket here.
    for from in ["shop/client", "node:node1", "world"] {
        let arguments = ["--from", from, "--to", "svc:shop/web", "--count", "20"];
        let vip: &[&str] = if from == "world" { &["--vip", "node:node1"] } else { &[] };
        let probed = lab.probe(&[&arguments, vip].concat()).unwrap();
        assert!(!probed.is_empty(), "{from}: nothing was tried");
        for cell in probed {
            assert_eq!(cell.verdict, "allowed", "{from}: {cell:?}");
            assert_eq!(cell.answers.len(), 2, "both backends serve: {from}: {cell:?}");
        }
    }
}

#[test]
fn a_load_balancer_balances() {
    let mut lab = EdgeLab::new(2);
    let _servers = lab.serve(8080);
    for acceleration in ["off", "generic", "native"] {
        let mut file = format!("acceleration: {acceleration}\nservices:\n");
        for (name, vip, prefix) in [("four", VIP, "10.77.0.1"), ("six", VIP6, "fd77::1")] {
            for protocol in ["TCP", "UDP"] {
                file += &format!(
                    "  - name: {name}-{protocol}\n    address: '{vip}'\n    port: 80\n    protocol: {protocol}\n    backends:\n"
                );
                for n in 1..=2 {
                    file += &format!("      - {{name: b{n}, address: '{prefix}{n}', port: 8080}}\n");
                }
            }
        }
        lab.write(&file);
        lab.start();
        for vip in [format!("{VIP}:80"), format!("[{VIP6}]:80")] {
            let talks = lab.connect_many(&vip, 30);
            assert_eq!(spread(&talks).len(), 2, "{acceleration} {vip}: {:?}", spread(&talks));
            ask_datagram(&lab.datagrams(&vip)).unwrap_or_else(|error| panic!("{acceleration} {vip}: {error}"));
        }
        let status: Value = lab.ask(&["status"]);
        let mode = if acceleration == "off" { "tc" } else { acceleration };
        assert_eq!(status["devices"][0]["mode"], mode, "{status:#}");
        lab.stop();
    }
}

fn judge(lab: &Lab, to: &str, verdict: &str) {
    let verdicts = lab.verdicts_wanted(verdict, "shop/client", to, 80).unwrap();
    assert_eq!(verdicts.len(), 2, "one of each family: {verdicts:?}");
    assert!(verdicts.values().all(|is| is == verdict), "{to}: {verdicts:?}");
}
