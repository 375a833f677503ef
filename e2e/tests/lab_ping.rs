//! What people try first: a ping of a service's address, from a pod, from a node and from outside; and whether the
//! gateway's address is taken.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::Output;
use std::time::Duration;

use cirri_e2e::lab::{self, Lab, eventually};
use serde_json::Value;

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {nodeName: node1, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: node2, containers: [{name: c, image: none, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
";

#[test]
fn services_addresses_answer_pings_and_the_gateways_address_is_taken() {
    let lab = Lab::up("ping", 2, &[]).unwrap();
    lab.apply(SHOP).unwrap();
    let services: Value = lab.ask("node1", &["service", "list"]).unwrap();
    let mut pinged = 0;
    for address in addresses(&services) {
        for whose in ["shop/client", "node:node1", "node:node2", "world"] {
            // The longer one takes three fragments.
            for bytes in ["56", "4000"] {
                let ping = inside(&lab, whose, &["ping", "-n", "-c", "1", "-W", "5", "-s", bytes, &address]);
                let said = String::from_utf8_lossy(&ping.stdout);
                assert!(ping.status.success(), "{whose} -> {address}, {bytes} bytes: {said}");
                pinged += 1;
            }
        }
    }
    assert_eq!(pinged, 4 * 4 * 2, "two addresses of each family: {services}");

    // The kernel's own duplicate address detection, which the pod's device does without.
    let set = "echo 1 > /proc/sys/net/ipv6/conf/eth0/accept_dad; echo 1 > /proc/sys/net/ipv6/conf/eth0/dad_transmits";
    assert!(inside(&lab, "shop/client", &["sh", "-c", set]).status.success());
    assert!(inside(&lab, "shop/client", &["ip", "address", "add", "fe80::1/64", "dev", "eth0"]).status.success());
    eventually("the address is found to be taken", Duration::from_secs(30), || {
        let shown = inside(&lab, "shop/client", &["ip", "-6", "address", "show", "dev", "eth0"]).stdout;
        String::from_utf8_lossy(&shown).contains("dadfailed")
    });
}

/// The addresses that the service has as a whole; a node port is at the nodes' own.
fn addresses(services: &Value) -> BTreeSet<String> {
    let frontends = services.as_array().into_iter().flatten().filter_map(|service| service["frontends"].as_array());
    let addresses = frontends.flatten().filter_map(|frontend| frontend["ip"].as_str());
    addresses.filter(|address| address.parse::<IpAddr>().is_ok()).map(str::to_owned).collect()
}

/// Runs a program where people do: of a node, in its control group, so that its system calls are looked at too.
fn inside(lab: &Lab, whose: &str, argv: &[&str]) -> Output {
    let place = match whose.split_once(':') {
        Some((_, node)) => vec!["--node", node],
        None if whose == "world" => vec!["--world"],
        None => vec![whose],
    };
    let exec = ["lab", "exec", "--name", lab.name()];
    lab::output(exec.into_iter().chain(place).chain(["--"]).chain(argv.iter().copied())).expect("cirri runs")
}
