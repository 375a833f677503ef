//! CNI's CHECK: what changed since ADD, by hand or by later plugins of a chain.

use cirri_e2e::cni::{Attachment, assert_leftovers};
use cirri_e2e::kernel::TestNamespace;
use cirri_e2e::lab::{Lab, printed};
use cirri_loader::net::Namespace;
use serde_json::{Value, json};
use tempfile::TempDir;

#[test]
fn check_finds_everything_that_changed_since_add() {
    let lab = Lab::up("cnichk", 1, &[]).unwrap();
    let node = lab.netns("node:node1").unwrap();
    let (place, elsewhere) = (TestNamespace::new(), TestNamespace::new());
    // Devices that are made anew have no IPv6 there, as some administrators have it.
    printed(&node, &["sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1"]);
    let container = Attachment::new(&lab, "checked", place.namespace.path());
    let second = container.of("blue", "net1");
    let result = container.call("ADD", json!({})).unwrap();
    let two = second.call("ADD", json!({})).unwrap();
    let previous = json!({"prevResult": result});
    let own = |index: usize| result["ips"][index]["address"].as_str().unwrap().to_owned();
    let (v4, v6) = (own(0), own(1));
    let host = result["interfaces"][0]["name"].as_str().unwrap();
    let mac = result["interfaces"][1]["mac"].as_str().unwrap();
    assert_eq!(container.call("CHECK", previous.clone()), Ok(Value::Null));

    // What is done, and what undoes it.
    let routes = "ip route add 169.254.1.1 dev eth0 scope link && ip route add default via 169.254.1.1 dev eth0 onlink";
    let in_container: &[(&str, &str)] = &[
        // With its last address a device loses its routes.
        (&format!("ip addr del {v4} dev eth0"), &format!("ip addr add {v4} dev eth0 && {routes}")),
        (&format!("ip addr del {v6} dev eth0"), &format!("ip addr add {v6} dev eth0 nodad")),
        ("ip route del default", "ip route add default via 169.254.1.1 dev eth0 onlink"),
        ("ip route replace default dev net1", "ip route replace default via 169.254.1.1 dev eth0 onlink"),
        ("ip route del 169.254.1.1", "ip route add 169.254.1.1 dev eth0 scope link"),
        ("ip -6 route del default", "ip -6 route add default via fe80::1 dev eth0"),
        ("ip link set eth0 mtu 1300", &format!("ip link set eth0 mtu {}", result["interfaces"][1]["mtu"])),
        ("ip link set eth0 address 02:00:00:00:00:77", &format!("ip link set eth0 address {mac}")),
        ("sysctl -qw net.ipv6.conf.eth0.accept_ra=1", "sysctl -qw net.ipv6.conf.eth0.accept_ra=0"),
        ("ip link set lo down", "ip link set lo up"),
    ];
    let sh = |inside: &Namespace, command: &str| printed(inside, &["sh", "-c", command]);
    for (doing, undoing) in in_container {
        sh(&place.namespace, doing);
        assert_eq!(container.code("CHECK", previous.clone()), 101, "{doing}");
        sh(&place.namespace, undoing);
        assert_eq!(container.call("CHECK", previous.clone()), Ok(Value::Null), "{undoing}");
    }
    for family in ["-4", "-6"] {
        let rules = printed(&place.namespace, &["ip", family, "rule", "show", "pref", "19300"]);
        sh(&place.namespace, &format!("ip {family} rule del pref 19300"));
        assert_eq!(second.code("CHECK", json!({"prevResult": two})), 101, "{rules}");
        let rule = rules.trim().strip_prefix("19300:").unwrap().replace("proto 193", "protocol 193");
        sh(&place.namespace, &format!("ip {family} rule add pref 19300 {rule}"));
        assert_eq!(second.call("CHECK", json!({"prevResult": two})), Ok(Value::Null), "{rule}");
    }

    // The agent looks after the node's side by itself: either it has repaired it, or CHECK says it.
    let on_node: &[(&str, &str)] = &[
        (&format!("ip link set {host} down"), &format!("ip link set {host} up")),
        (
            &format!("ip link set {host} mtu 1300"),
            &format!("ip link set {host} mtu {}", result["interfaces"][0]["mtu"]),
        ),
        (&format!("ip route del {}", v4.trim_end_matches("/32")), "true"),
        (
            &format!("sysctl -qw net.ipv4.conf.{host}.rp_filter=1"),
            &format!("sysctl -qw net.ipv4.conf.{host}.rp_filter=0"),
        ),
    ];
    let shown = || {
        let links = printed(&node, &["ip", "-o", "link", "show", "dev", host]);
        let routes = printed(&node, &["ip", "route"]);
        (links, routes, printed(&node, &["sysctl", &format!("net.ipv4.conf.{host}.rp_filter")]))
    };
    for (doing, undoing) in on_node {
        let before = shown();
        sh(&node, doing);
        match container.call("CHECK", previous.clone()) {
            Err(error) => assert_eq!(error["code"], 101, "{doing}: {error}"),
            Ok(_) => assert_eq!(shown(), before, "{doing}"),
        }
        sh(&node, undoing);
        // Routes that went with it are made anew by an agent that starts.
        if container.call("CHECK", previous.clone()).is_err() {
            lab.kill_agent("node1").unwrap();
            lab.restart("node1", &[]).unwrap();
        }
        assert_eq!(container.call("CHECK", previous.clone()), Ok(Value::Null), "{undoing}");
    }

    // Routes as they were made, but for something; rules and narrower routes before them.
    let (own, all) = (v4.trim_end_matches("/32"), "default via 169.254.1.1 dev eth0 onlink");
    for (doing, undoing) in [
        (format!("ip route replace {all} mtu lock 600"), format!("ip route replace {all}")),
        (format!("ip route replace {all} src {own}"), format!("ip route replace {all}")),
        ("ip route add blackhole 0.0.0.0/1".to_owned(), "ip route del blackhole 0.0.0.0/1".to_owned()),
        ("ip -6 route add unreachable 8000::/1".to_owned(), "ip -6 route del unreachable 8000::/1".to_owned()),
        ("ip rule add pref 1 blackhole".to_owned(), "ip rule del pref 1".to_owned()),
    ] {
        sh(&place.namespace, &doing);
        assert_eq!(container.code("CHECK", previous.clone()), 101, "{doing}");
        sh(&place.namespace, &undoing);
        assert_eq!(container.call("CHECK", previous.clone()), Ok(Value::Null), "{undoing}");
    }

    // Another container's place, and another device in the same.
    let moved = Attachment { netns: elsewhere.namespace.path().to_owned(), ..container.clone() };
    assert_eq!(moved.code("CHECK", previous.clone()), 101, "another namespace");
    sh(&place.namespace, "ip link set eth0 down && ip link set eth0 name eth9 && ip link set eth9 up");
    assert_eq!(container.code("CHECK", previous.clone()), 101, "another name");
    let dressed = format!(
        "ip link add eth0 type veth peer name beside && ip link set eth0 address {mac} && ip link set eth0 up && \
         ip addr add {v4} dev eth0"
    );
    sh(&place.namespace, &dressed);
    assert_eq!(container.code("CHECK", previous.clone()), 101, "another device of its name");
    sh(&place.namespace, "ip link del eth0");
    let name = elsewhere.name();
    sh(&place.namespace, &format!("ip link set eth9 netns {name} && ip -n {name} link set eth9 name eth0"));
    assert_eq!(container.code("CHECK", previous.clone()), 101, "moved away");
    assert_eq!(moved.code("CHECK", previous), 101, "moved there");
    container.call("DEL", json!({})).unwrap();
    second.call("DEL", json!({})).unwrap();
    assert_leftovers(&lab, 0);
}

#[test]
fn check_goes_by_what_the_whole_chain_answered() {
    let lab = Lab::up("cnichain", 1, &[]).unwrap();
    let node = lab.netns("node:node1").unwrap();
    let (place, directory) = (TestNamespace::new(), TempDir::new().unwrap());
    let inside = &place.namespace;
    // A result of this version cannot tell an MTU.
    let container = Attachment { version: "1.0.0".to_owned(), ..Attachment::new(&lab, "chained", inside.path()) };
    let sh = |command: &str| printed(inside, &["sh", "-c", command]);
    let check = |result: &Value| container.call("CHECK", json!({"prevResult": result}));
    let ours = container.call("ADD", json!({})).unwrap();
    let own = ours["ips"][0]["address"].as_str().unwrap().trim_end_matches("/32").to_owned();

    let (mac, data) = ("02:00:00:00:12:34", directory.path());
    let tuned = container.chained("tuning", json!({"prevResult": ours, "mac": mac, "mtu": 1400, "dataDir": data}));
    assert_eq!(check(&tuned), Ok(Value::Null), "the result tells the Ethernet address, and cannot tell the MTU");
    printed(&node, &["ping", "-c", "1", "-W", "5", &own]);
    assert_eq!(check(&ours).unwrap_err()["code"], 101, "the chain did not answer that");
    let routed = container.chained("sbr", json!({"prevResult": tuned}));
    assert!(!sh("ip route").contains("default"), "the other plugin took the routes to a table of its own");
    assert_eq!(check(&routed), Ok(Value::Null));
    let list = |key: &str, more: Value| {
        let mut result = routed.clone();
        result[key].as_array_mut().unwrap().push(more);
        result
    };
    // What is done, what undoes it, and what the whole chain answered.
    let changes = [
        ("ip link set eth0 mtu 1500", "ip link set eth0 mtu 1400", routed.clone()),
        ("ip link set eth0 address 02:00:00:00:00:77", &format!("ip link set eth0 address {mac}"), routed.clone()),
        (&format!("ip rule del from {own}"), &format!("ip rule add from {own} table 100"), routed.clone()),
        (
            "ip route del default table 100",
            "ip route add default via 169.254.1.1 dev eth0 onlink table 100",
            routed.clone(),
        ),
        ("true", "ip addr add 192.0.2.9/32 dev eth0", list("ips", json!({"address": "192.0.2.9/32", "interface": 1}))),
        (
            "true",
            "ip route add 198.51.100.0/24 via 169.254.1.1 dev eth0 onlink",
            list("routes", json!({"dst": "198.51.100.7/24", "gw": "169.254.1.1"})),
        ),
    ];
    for (doing, undoing, result) in changes {
        sh(doing);
        assert_eq!(check(&result).expect_err(undoing)["code"], 101, "{doing}");
        sh(undoing);
        assert_eq!(check(&result), Ok(Value::Null), "{undoing}");
    }

    // What the result says of others, and in other words, is not this plugin's.
    let mut worded = list("ips", json!({"address": "192.0.2.77/24"}));
    worded["interfaces"][0]["sandbox"] = json!("");
    worded["routes"][1]["dst"] = json!("0::0/0");
    let former = json!({"name": "eth0", "mac": "02:00:00:00:00:99", "sandbox": "/run/netns/former"});
    worded["interfaces"].as_array_mut().unwrap().push(former);
    assert_eq!(check(&worded), Ok(Value::Null));
    // A plugin that takes routes away says so.
    worded["routes"] = json!([]);
    sh("ip rule del pref 32765 && ip -6 rule del pref 32765");
    assert_eq!(check(&worded), Ok(Value::Null));
    assert_eq!(check(&routed).unwrap_err()["code"], 101);
    container.call("DEL", json!({})).unwrap();
    assert_leftovers(&lab, 0);
}
