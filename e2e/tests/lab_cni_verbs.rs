//! The CNI plugin by hand, verb by verb, and with what runtimes get wrong.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use cirri_e2e::cni::{Attachment, answer, assert_leftovers, endpoints, state_dir};
use cirri_e2e::kernel::TestNamespace;
use cirri_e2e::lab::{self, Lab, eventually, printed};
use cirri_loader::net::Namespace;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long the agent may take to come to something.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn every_verb_answers_as_the_specification_says() {
    let lab = Lab::up("verbs", 1, &[]).unwrap();
    let place = TestNamespace::new();
    let container = Attachment::new(&lab, "by-hand", place.namespace.path());

    let versions = container.call("VERSION", json!({"cniVersion": "1.1.0"})).unwrap();
    assert_eq!(versions["cniVersion"], "1.1.0");
    assert!(versions["supportedVersions"].as_array().unwrap().contains(&json!("1.0.0")), "{versions}");
    assert_eq!(container.call("STATUS", json!({})), Ok(Value::Null));

    let added = container.call("ADD", json!({})).unwrap();
    let ips: Vec<&str> = added["ips"].as_array().unwrap().iter().map(|ip| ip["address"].as_str().unwrap()).collect();
    assert_eq!(ips.len(), 2, "{added}");
    assert!(ips[0].ends_with("/32") && ips[1].ends_with("/128"), "{ips:?}");
    assert_eq!(added["interfaces"][1]["name"], "eth0");
    assert_eq!(added["interfaces"][1]["sandbox"], container.netns.to_str().unwrap());
    let shown = printed(&place.namespace, &["ip", "-o", "addr", "show", "dev", "eth0"]);
    assert!(ips.iter().all(|ip| shown.contains(ip.split('/').next().unwrap())), "{shown}");
    assert_eq!(container.call("ADD", json!({})).unwrap()["ips"], added["ips"], "asked again, it is the same");

    let previous = json!({"prevResult": added});
    assert_eq!(container.call("CHECK", previous.clone()), Ok(Value::Null));
    let mut other = added.clone();
    other["ips"][0]["address"] = json!("10.9.9.9/32");
    assert_eq!(container.code("CHECK", json!({"prevResult": other})), 101);

    for _ in 0..2 {
        assert_eq!(container.call("DEL", previous.clone()), Ok(Value::Null), "DEL succeeds however often");
    }
    assert_eq!(container.code("CHECK", previous), 3);
    assert_leftovers(&lab, 0);

    let kept = TestNamespace::new();
    let kept = Attachment::new(&lab, "kept", kept.namespace.path());
    container.call("ADD", json!({})).unwrap();
    kept.call("ADD", json!({})).unwrap();
    let valid = json!({"cni.dev/valid-attachments": [{"containerID": "kept", "ifname": "eth0"}]});
    assert_eq!(container.call("GC", valid), Ok(Value::Null));
    let left = endpoints(&lab);
    assert_eq!((left.len(), &left[0]["container_id"]), (1, &json!("kept")), "{left:?}");
    assert_leftovers(&lab, 1);

    assert_eq!(container.code("GC", json!({})), 7, "a GC that names nothing must not remove everything");
    assert_eq!(container.code("ADD", json!({"cniVersion": "9.0.0"})), 1);
    assert_eq!(container.refusal("ADD", json!({"cniVersion": "9.0.0"}))["cniVersion"], "9.0.0", "as it was asked for");
    assert_eq!(container.code("FETCH", json!({})), 4);
    for (verb, more) in [("STATUS", json!({"socket": 7})), ("ADD", json!({"runtimeConfig": {"mac": 7}}))] {
        let error = container.refusal(verb, more);
        assert_eq!((&error["code"], &error["cniVersion"]), (&json!(7), &json!("1.1.0")), "{error}");
    }
    assert_eq!(answer("ADD", container.feed("ADD", "{")).unwrap_err()["code"], 6);
    assert_eq!(container.code("GC", json!({"cniVersion": "1.0.0", "cni.dev/valid-attachments": []})), 1);
    assert_eq!(container.code("STATUS", json!({"cniVersion": "1.0.0"})), 1);
    assert_eq!(container.code("CHECK", json!({"cniVersion": "0.3.1"})), 1);
    assert_eq!(endpoints(&lab).len(), 1, "a GC that is refused removes nothing");
    assert_leftovers(&lab, 1);
    let configuration = json!({"cniVersion": "1.1.0", "name": "cirri", "socket": container.socket}).to_string();
    for verb in ["ADD", "VERSION", "FETCH"] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let lost = container.feed_into(full, verb, &configuration).wait().unwrap();
        assert!(!lost.success(), "{verb}: nobody has its answer");
    }
    // What DEL does not need it does not read, and nothing is what Go writes `null` for.
    let needless = json!({"runtimeConfig": 7, "args": {"cni": null}, "prevResult": null, "stateDir": null});
    assert_eq!(container.call("DEL", needless), Ok(Value::Null));

    lab.kill_agent("node1").unwrap();
    assert_eq!(container.code("ADD", json!({})), 11, "the runtime tries again later");
    assert_eq!(container.code("STATUS", json!({})), 50);
    assert_eq!(kept.call("DEL", json!({})), Ok(Value::Null), "DEL works while the agent is down");
    lab.restart("node1", &[]).unwrap();
    assert_eq!(endpoints(&lab), Vec::<Value>::new());
    assert_leftovers(&lab, 0);
}

#[test]
fn a_network_namespace_that_no_container_can_have_is_refused_before_anything_changes() {
    let lab = Lab::up("cnins", 1, &[]).unwrap();
    let node = lab.netns("node:node1").unwrap();
    let (place, directory) = (TestNamespace::new(), TempDir::new().unwrap());
    let other = Attachment::new(&lab, "other", place.namespace.path());
    other.call("ADD", json!({})).unwrap();

    let path = |name: &str| directory.path().join(name);
    symlink(node.path(), path("link")).unwrap();
    fs::write(path("bind"), "").unwrap();
    run("mount", &["--bind", node.path().to_str().unwrap(), path("bind").to_str().unwrap()]);
    let _bind = Unmount(path("bind"));
    fs::write(path("file"), "no namespace").unwrap();
    run("mkfifo", &[path("fifo").to_str().unwrap()]);
    let agent = lab.node("node1").unwrap().pid.unwrap();
    let of_node = [
        node.path().to_owned(),
        path("link"),
        path("bind"),
        format!("/proc/{agent}/ns/net").into(),
        "/proc/self/ns/net".into(),
    ];
    let no_network: [PathBuf; 7] = [
        // That of the machine, as far as it can be looked at.
        "/proc/1/ns/net".into(),
        path("file"),
        path("fifo"),
        directory.path().to_owned(),
        format!("/proc/{agent}/ns/mnt").into(),
        format!("/proc/{agent}/status").into(),
        path("nothing"),
    ];
    let of_container = [place.namespace.path().to_owned()];

    let before = stack(&node);
    let inside = stack(&place.namespace);
    for (says, paths) in [("node's own", &of_node[..]), ("namespace", &no_network), ("default/other", &of_container)] {
        for netns in paths {
            let container = Attachment { ifname: "eth7".to_owned(), ..Attachment::new(&lab, "bad", netns) };
            let error = container.refusal("ADD", json!({}));
            assert_eq!(error["code"], 8, "{}: {error}", netns.display());
            assert!(error["msg"].as_str().unwrap().contains(says), "{}: {error}", netns.display());
            assert_eq!(container.call("DEL", json!({})), Ok(Value::Null), "{}", netns.display());
        }
    }
    assert_eq!(stack(&node), before, "the node's network was touched");
    assert_eq!(stack(&place.namespace), inside, "another container was touched");
    assert_leftovers(&lab, 1);
}

#[test]
fn gc_takes_what_belongs_to_its_network_and_nothing_else() {
    let lab = Lab::up("cnigc", 1, &[]).unwrap();
    let places: Vec<TestNamespace> = (0..4).map(|_| TestNamespace::new()).collect();
    let container = |index: usize, id: &str, network: &str| {
        Attachment::new(&lab, id, places[index].namespace.path()).of(network, "eth0")
    };
    let (stale, valid) = (container(0, "stale", "blue"), container(1, "valid", "blue"));
    // Two runtimes may call their containers alike.
    let namesake = container(2, "stale", "green");
    let older = Attachment { version: "1.0.0".to_owned(), ..container(3, "older", "blue") };
    for attachment in [&stale, &valid, &namesake, &older] {
        attachment.call("ADD", json!({})).unwrap();
    }
    assert_eq!(endpoints(&lab).len(), 4, "the network is a part of an attachment's name");

    let named = json!({"cni.dev/valid-attachments": [{"containerID": "valid", "ifname": "eth0"}]});
    stale.call("GC", named).unwrap();
    let left = |lab: &Lab| {
        let mut left: Vec<String> = endpoints(lab)
            .iter()
            .map(|it| format!("{}/{}", it["network"].as_str().unwrap(), it["container_id"].as_str().unwrap()))
            .collect();
        left.sort();
        left
    };
    assert_eq!(left(&lab), ["blue/older", "blue/valid", "green/stale"], "who has no GC is not in its list");
    assert_leftovers(&lab, 3);
    stale.of("red", "eth0").call("GC", json!({"cni.dev/valid-attachments": []})).unwrap();
    assert_eq!(left(&lab).len(), 3, "of a network that has nothing here");
    // As Go writes a list that nothing was put into.
    namesake.call("GC", json!({"cni.dev/valid-attachments": null})).unwrap();
    assert_eq!(left(&lab), ["blue/older", "blue/valid"]);
    older.call("DEL", json!({})).unwrap();
    valid.call("DEL", json!({})).unwrap();
    assert_leftovers(&lab, 0);
}

#[test]
fn a_device_that_is_anothers_is_never_deleted_whatever_its_name() {
    let lab = Lab::up("cnidev", 1, &[]).unwrap();
    let node = lab.netns("node:node1").unwrap();
    let place = TestNamespace::new();
    let container = Attachment::new(&lab, "mine", place.namespace.path());
    let name_of = |result: &Value| result["interfaces"][0]["name"].as_str().unwrap().to_owned();
    let own = name_of(&container.call("ADD", json!({})).unwrap());
    container.call("DEL", json!({})).unwrap();

    // As another attachment's would be, whose hash has the same 32 bits.
    let foreign = |name: &str| {
        printed(&node, &["ip", "link", "add", name, "type", "veth", "peer", "name", "foreignpeer"]);
        printed(&node, &["ip", "link", "set", name, "alias", "cirri other/other/eth0"]);
    };
    let is_there = |name: &str| printed(&node, &["ip", "-o", "link"]).contains(&format!(" {name}@"));
    foreign(&own);
    let second = name_of(&container.call("ADD", json!({})).unwrap());
    assert_ne!(second, own);
    assert!(is_there(&own), "ADD took away a device of another");
    container.call("DEL", json!({})).unwrap();
    assert!(is_there(&own) && !is_there(&second), "DEL");

    container.call("ADD", json!({})).unwrap();
    lab.kill_agent("node1").unwrap();
    container.call("DEL", json!({})).unwrap();
    assert!(is_there(&own) && !is_there(&second), "DEL while the agent is down");
    container.call("DEL", json!({})).unwrap();
    lab.restart("node1", &[]).unwrap();
    assert!(is_there(&own), "the agent's start");

    // The device is replaced while the agent is down.
    printed(&node, &["ip", "link", "del", &own]);
    assert_eq!(name_of(&container.call("ADD", json!({})).unwrap()), own);
    lab.kill_agent("node1").unwrap();
    printed(&node, &["ip", "link", "del", &own]);
    foreign(&own);
    lab.restart("node1", &[]).unwrap();
    assert_eq!(endpoints(&lab), Vec::<Value>::new());
    assert!(is_there(&own), "the agent's start, with a file that names it");
    printed(&node, &["ip", "link", "del", &own]);
    assert_leftovers(&lab, 0);
}

#[test]
fn of_two_attachments_the_first_has_the_default_route_and_the_other_takes_over() {
    // Two addresses of IPv4 in all.
    let lab = Lab::up("cnitwo", 1, &["--set", "cluster.podCidrV4PerNode=30"]).unwrap();
    let node = lab.node("node1").unwrap();
    let place = TestNamespace::new();
    let inside = &place.namespace;
    let first = Attachment::new(&lab, "two", inside.path());
    let second = first.of("blue", "net1");
    let default = |device: &str| {
        for family in ["-4", "-6"] {
            let shown = printed(inside, &["ip", family, "route", "show", "default"]);
            assert_eq!(shown.lines().count(), 1, "ip {family}: {shown}");
            assert!(shown.contains(&format!("dev {device} ")), "ip {family}: {shown}");
        }
    };
    let reaches = |result: &Value| {
        for (ip, target) in result["ips"].as_array().unwrap().iter().zip(&node.addresses) {
            let own = ip["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
            printed(inside, &["ping", "-c", "1", "-W", "5", "-I", &own, &target.to_string()]);
            let node = lab.netns("node:node1").unwrap();
            printed(&node, &["ping", "-c", "1", "-W", "5", &own]);
        }
    };
    let one = first.call("ADD", json!({})).unwrap();
    default("eth0");
    assert_eq!(second.call("STATUS", json!({})), Ok(Value::Null));
    let two = second.call("ADD", json!({})).unwrap();
    default("eth0");
    assert_eq!(two["routes"], json!([]), "it has no default route to tell of");
    let full = second.refusal("STATUS", json!({}));
    assert!(full["code"] == 50 && full["msg"].as_str().unwrap().contains("all 2 addresses of"), "{full}");
    reaches(&one);
    reaches(&two);
    for (attachment, result) in [(&first, &one), (&second, &two)] {
        assert_eq!(attachment.call("CHECK", json!({"prevResult": result})), Ok(Value::Null));
    }

    second.call("DEL", json!({})).unwrap();
    default("eth0");
    reaches(&one);
    for family in ["-4", "-6"] {
        assert!(!printed(inside, &["ip", family, "rule"]).contains("19300"), "a rule stays");
    }

    let two = second.call("ADD", json!({})).unwrap();
    lab.kill_agent("node1").unwrap();
    lab.restart("node1", &[]).unwrap();
    first.call("DEL", json!({})).unwrap();
    default("net1");
    reaches(&two);
    assert_eq!(second.call("CHECK", json!({"prevResult": two})), Ok(Value::Null));
    let one = first.call("ADD", json!({})).unwrap();
    default("net1");
    reaches(&one);
    second.call("DEL", json!({})).unwrap();
    default("eth0");
    first.call("DEL", json!({})).unwrap();
    assert_leftovers(&lab, 0);

    // The path that ADD was given ends with its process, but the namespace lives.
    let ways: [(&str, bool, bool); 3] = [
        ("DEL names another", false, false),
        ("the other attachment has another", true, false),
        ("a second ADD had another", false, true),
    ];
    for (way, other_is_lasting, added_again) in ways {
        let mut holder = inside.run(|| Command::new("sleep").arg("infinity").spawn()).unwrap().unwrap();
        let fleeting =
            |it: &Attachment| Attachment { netns: format!("/proc/{}/ns/net", holder.id()).into(), ..it.clone() };
        let dead = fleeting(&first);
        dead.call("ADD", json!({})).unwrap();
        let other = if other_is_lasting { second.clone() } else { fleeting(&second) };
        other.call("ADD", json!({})).unwrap();
        if added_again {
            first.call("ADD", json!({})).unwrap();
        }
        holder.kill().unwrap();
        holder.wait().unwrap();
        let deleted = if other_is_lasting || added_again { &dead } else { &first };
        deleted.call("DEL", json!({})).unwrap();
        for family in ["-4", "-6"] {
            let shown = printed(inside, &["ip", family, "route", "show", "default"]);
            assert!(shown.contains("dev net1 "), "{way}: {shown}");
        }
        second.call("DEL", json!({})).unwrap();
        for family in ["-4", "-6"] {
            assert!(!printed(inside, &["ip", family, "rule"]).contains("19300"), "{way}: a rule stays");
        }
    }
    assert_leftovers(&lab, 0);

    // Somebody else's network came first.
    printed(inside, &["ip", "link", "add", "bridged", "type", "veth", "peer", "name", "bridge"]);
    printed(inside, &["ip", "link", "set", "bridge", "up"]);
    printed(inside, &["ip", "addr", "add", "192.0.2.2/24", "dev", "bridged"]);
    printed(inside, &["ip", "link", "set", "bridged", "up"]);
    printed(inside, &["ip", "route", "add", "default", "via", "192.0.2.1"]);
    let two = second.call("ADD", json!({})).unwrap();
    assert!(printed(inside, &["ip", "route", "show", "default"]).contains("dev bridged"));
    reaches(&two);
    second.call("DEL", json!({})).unwrap();
    assert!(printed(inside, &["ip", "route", "show", "default"]).contains("dev bridged"));
}

#[test]
fn addresses_that_are_asked_for_are_given_or_refused_with_the_reason() {
    let lab = Lab::up("cniask", 1, &[]).unwrap();
    let places: Vec<TestNamespace> = (0..4).map(|_| TestNamespace::new()).collect();
    let container = |index: usize, args: &str| Attachment {
        args: args.to_owned(),
        ..Attachment::new(&lab, &format!("asks{index}"), places[index].namespace.path())
    };
    let first = container(0, "").call("ADD", json!({})).unwrap();
    let ip = |result: &Value, index: usize| {
        result["ips"][index]["address"].as_str().unwrap().split('/').next().unwrap().to_owned()
    };
    // The neighbours of what the node gives by itself are its own too.
    let beside = |index: usize, last: &str| {
        let given = ip(&first, index);
        let (head, separator) = if index == 0 {
            (given.rsplit_once('.').unwrap().0, ".")
        } else {
            (given.rsplit_once(':').unwrap().0, ":")
        };
        format!("{head}{separator}{last}")
    };
    let (v4, v6) = (beside(0, "77"), beside(1, "77"));
    let mac = "02:00:5e:00:53:07";

    let both = json!({"runtimeConfig": {"ips": [format!("{v4}/24"), &v6], "mac": mac}});
    let given = container(1, "").call("ADD", both.clone()).unwrap();
    assert_eq!((ip(&given, 0), ip(&given, 1)), (v4.clone(), v6.clone()));
    assert_eq!(given["interfaces"][1]["mac"], mac);
    let shown = printed(&places[1].namespace, &["ip", "addr", "show", "dev", "eth0"]);
    assert!([&v4, &v6, mac].iter().all(|it| shown.contains(*it)), "{shown}");
    assert_eq!(container(1, "").call("ADD", both).unwrap()["ips"], given["ips"], "asked again, it is the same");
    let other = json!({"runtimeConfig": {"ips": [beside(0, "78")]}});
    assert_eq!(container(1, "").code("ADD", other), 100, "asked again for another");

    let refused = |index: usize, args: &str, more: Value, code: u64, says: &str| {
        let error = container(index, args).refusal("ADD", more);
        assert_eq!(error["code"], code, "{error}");
        assert!(error["msg"].as_str().unwrap().contains(says), "{says}: {error}");
    };
    refused(2, &format!("IP={v4}"), json!({}), 100, "in use by default/asks1");
    refused(2, "", json!({"args": {"cni": {"ips": [&v6]}}}), 100, "in use by default/asks1");
    refused(2, "IP=192.0.2.7", json!({}), 4, "CNI_ARGS: IP: 192.0.2.7 is in none of this node's ranges");
    refused(2, "IP=web", json!({}), 4, "no address");
    refused(2, "", json!({"runtimeConfig": {"ips": [beside(0, "80"), beside(0, "81")]}}), 7, "both");
    refused(2, "", json!({"runtimeConfig": {"ips": [beside(0, "0")]}}), 7, "gives out");
    refused(2, "", json!({"args": {"cni": {"ips": ["192.0.2.7"]}}}), 7, "args.cni.ips: 192.0.2.7 is in none");
    refused(2, "", json!({"runtimeConfig": {"mac": "web"}}), 7, "runtimeConfig.mac: `web` is no Ethernet address");
    refused(2, "", json!({"runtimeConfig": {"mac": mac}}), 100, "default/asks1");
    refused(2, "MAC=02:c1:44:12:10:01", json!({}), 4, "Ethernet address");
    refused(2, "MAC=01:00:00:00:00:01", json!({}), 4, "Ethernet address");
    assert_leftovers(&lab, 2);

    // What was refused holds nothing: half of what it asked for was free.
    let half = json!({"runtimeConfig": {"ips": [beside(0, "90"), &v6]}});
    refused(2, "", half, 100, "in use");
    let old = container(2, &format!("IgnoreUnknown=1;IP={}", beside(0, "90"))).call("ADD", json!({})).unwrap();
    assert_eq!(ip(&old, 0), beside(0, "90"));
    // The newer way counts.
    let newer = json!({"args": {"cni": {"ips": [beside(0, "91")]}}, "runtimeConfig": {"mac": "", "ips": null}});
    let newer = container(3, &format!("MAC=;IP={}", beside(0, "92"))).call("ADD", newer).unwrap();
    assert_eq!(ip(&newer, 0), beside(0, "91"));
    container(1, "").call("DEL", json!({})).unwrap();
    container(2, "").call("DEL", json!({})).unwrap();
    let again = container(1, &format!("IP={v4}")).call("ADD", json!({})).unwrap();
    assert_eq!(ip(&again, 0), v4, "one that was deleted is free at once for whoever asks for it");
}

#[test]
fn names_that_no_pod_can_have_are_refused() {
    let lab = Lab::up("cnname", 1, &[]).unwrap();
    let place = TestNamespace::new();
    let called =
        |args: &str| Attachment { args: args.to_owned(), ..Attachment::new(&lab, "by_hand", place.namespace.path()) };
    let long = "a".repeat(64);
    for bad in [
        "K8S_POD_NAMESPACE=../etc;K8S_POD_NAME=web",
        "K8S_POD_NAMESPACE=Shop;K8S_POD_NAME=web",
        "K8S_POD_NAMESPACE=a.b;K8S_POD_NAME=web",
        "K8S_POD_NAMESPACE=;K8S_POD_NAME=web",
        &format!("K8S_POD_NAMESPACE={long};K8S_POD_NAME=web"),
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=we/b",
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=",
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web\n",
        "K8S_POD_NAME=hopeful_newton",
        "K8S_POD_NAME=",
        "K8S_POD_NAME=a..b",
        "K8S_POD_NAME=web;K8S_POD_NAME=vault",
        "K8S_POD_NAME",
        "COLOUR=blue",
    ] {
        assert_eq!(called(bad).code("ADD", json!({})), 4, "{bad}");
    }
    for ifname in ["all", "default", "eth%d", "a/b", "a:b", "sixteencharacter", "..", "ethà", "eth\u{a0}"] {
        let container = Attachment { ifname: ifname.to_owned(), ..called("") };
        let error = container.refusal("ADD", json!({}));
        assert!(error["code"] == 4 && error["msg"].as_str().unwrap().contains("CNI_IFNAME"), "{ifname}: {error}");
    }
    for id in ["", "_x", "a/b", &"a".repeat(300)] {
        let container = Attachment { id: id.to_owned(), ..called("") };
        assert_eq!(container.code("ADD", json!({})), 4, "{id}");
    }
    for network in ["a/b", "_a", "../a"] {
        assert_eq!(called("").of(network, "eth0").code("ADD", json!({})), 7, "{network}");
    }
    assert_leftovers(&lab, 0);
    called("IgnoreUnknown=true;COLOUR=blue;K8S_POD_NAME=web.0").call("ADD", json!({})).unwrap();
    called("K8S_POD_NAMESPACE=../etc").call("DEL", json!({})).expect("DEL does not mind");
    called("").call("ADD", json!({})).expect("a container's id is a name for want of a better one");
    assert_leftovers(&lab, 1);
}

#[test]
fn a_container_that_is_added_again_for_another_pod_is_refused() {
    let lab = Lab::up("cniwho", 1, &[]).unwrap();
    let place = TestNamespace::new();
    let add = |args: &str| {
        let container = Attachment::new(&lab, "who", place.namespace.path());
        Attachment { args: args.to_owned(), ..container }.call("ADD", json!({}))
    };
    let added = add("K8S_POD_NAME=web;K8S_POD_UID=a").unwrap();
    let before = endpoints(&lab);
    for other in ["K8S_POD_NAME=vault", "K8S_POD_NAME=web;K8S_POD_NAMESPACE=shop", "K8S_POD_NAME=web;K8S_POD_UID=b"] {
        let error = add(other).expect_err("it has the identity of another");
        assert_eq!(error["code"], 100, "{other}: {error}");
        assert!(error["msg"].as_str().unwrap().contains("attached already as default/web"), "{other}: {error}");
        assert_eq!(endpoints(&lab), before, "{other}");
    }
    for same in ["K8S_POD_NAME=web;K8S_POD_UID=a", "K8S_POD_NAME=web"] {
        assert_eq!(add(same).unwrap()["ips"], added["ips"], "{same}: asked again, it is the same");
    }
    Attachment::new(&lab, "who", place.namespace.path()).call("DEL", json!({})).unwrap();
    assert_eq!(add("K8S_POD_NAME=vault").map(drop), Ok(()), "after DEL it may be another");
}

#[test]
fn an_agent_that_dies_or_sleeps_while_it_is_asked_loses_nothing() {
    let lab = Lab::up("cnidie", 1, &[]).unwrap();
    let places: Vec<TestNamespace> = (0..3).map(|_| TestNamespace::new()).collect();
    // Made while the agent can be asked where its node is.
    let containers: Vec<Attachment> = (0..places.len())
        .map(|index| Attachment::new(&lab, &format!("dies{index}"), places[index].namespace.path()))
        .collect();
    let container = |index: usize| &containers[index];
    container(0).call("ADD", json!({})).unwrap();

    let agent = lab.node("node1").unwrap().pid.unwrap();
    let signal = |signal: &str| run("kill", &[signal, &agent.to_string()]);
    signal("-STOP");
    let (added, deleted) = (container(1).start("ADD", &json!({})), container(0).start("DEL", &json!({})));
    for plugin in [&added, &deleted] {
        eventually("the plugin waits for the answer", PATIENCE, || waits_for_answer(plugin.id()));
    }
    lab::kill(agent).unwrap();
    let error = answer("ADD", added).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert!(
        error["msg"].as_str().unwrap().contains("stopped") && !error["msg"].as_str().unwrap().contains("version"),
        "{error}"
    );
    assert_eq!(answer("DEL", deleted), Ok(Value::Null));
    assert!(!printed(&places[0].namespace, &["ip", "link"]).contains("eth0"), "the device goes at once");
    lab.restart("node1", &[]).unwrap();
    assert_eq!(endpoints(&lab), Vec::<Value>::new());
    assert_leftovers(&lab, 0);

    // The plugin is killed while the agent sleeps: DEL comes before the ADD that it is about is done.
    let agent = lab.node("node1").unwrap().pid.unwrap();
    let signal = |signal: &str| run("kill", &[signal, &agent.to_string()]);
    signal("-STOP");
    let mut given_up = container(2).start("ADD", &json!({}));
    eventually("the plugin waits for the answer", PATIENCE, || waits_for_answer(given_up.id()));
    given_up.kill().unwrap();
    given_up.wait().unwrap();
    let deleted = container(2).start("DEL", &json!({}));
    signal("-CONT");
    assert_eq!(answer("DEL", deleted), Ok(Value::Null));
    let log = || fs::read_to_string(state_dir(&lab).with_file_name("agent.log")).unwrap();
    eventually("the ADD is done with", PATIENCE, || log().contains("the plugin went away"));
    assert_eq!(endpoints(&lab), Vec::<Value>::new());
    assert_leftovers(&lab, 0);

    // A note of a deletion that failed is not meant for what is added later, and is carried out without a restart.
    let note = |file: &str, id: &str| {
        let directory = state_dir(&lab).join("deletions");
        fs::create_dir_all(&directory).unwrap();
        let text = json!({"network": "cirri", "container_id": id, "ifname": "eth0"}).to_string();
        fs::write(directory.join("half"), text).unwrap();
        fs::rename(directory.join("half"), directory.join(file)).unwrap();
    };
    container(0).call("ADD", json!({})).unwrap();
    note("0.json", "dies0");
    eventually("the note is carried out", PATIENCE, || endpoints(&lab).is_empty());
    assert_leftovers(&lab, 0);

    // What is written about it cannot be removed: it stays known until that can be, whoever asks and how often.
    container(0).call("ADD", json!({})).unwrap();
    let records = state_dir(&lab).join("endpoints");
    run("mount", &["--bind", records.to_str().unwrap(), records.to_str().unwrap()]);
    let read_only = Unmount(records.clone());
    run("mount", &["-o", "remount,bind,ro", records.to_str().unwrap()]);
    let error = container(0).refusal("STATUS", json!({}));
    assert!(error["code"] == 50 && error["msg"].as_str().unwrap().contains("endpoints: "), "{error}");
    for _ in 0..2 {
        assert_eq!(container(0).code("GC", json!({"cni.dev/valid-attachments": []})), 100);
        assert_eq!(container(0).call("DEL", json!({})), Ok(Value::Null), "it is noted");
    }
    assert_eq!((endpoints(&lab).len(), fs::read_dir(&records).unwrap().count()), (1, 1));
    assert_eq!(container(1).code("ADD", json!({})), 100);
    assert_eq!(endpoints(&lab).len(), 1, "what could not be attached is gone");
    drop(read_only);
    assert_eq!(container(0).call("DEL", json!({})), Ok(Value::Null));
    assert_eq!(endpoints(&lab), Vec::<Value>::new());
    let notes = state_dir(&lab).join("deletions");
    eventually("the note is done with", PATIENCE, || fs::read_dir(&notes).unwrap().count() == 0);
    assert_leftovers(&lab, 0);
    assert_eq!(container(0).call("STATUS", json!({})), Ok(Value::Null));
}

#[test]
fn an_attachment_is_undone_whose_plugin_is_killed_while_others_are_told_of_it() {
    let lab = Lab::up("cnitell", 2, &["--set", "pods.unseen=attach", "--set", "pods.patienceSeconds=1"]).unwrap();
    let places: Vec<TestNamespace> = (0..2).map(|_| TestNamespace::new()).collect();
    let containers: Vec<Attachment> = ["first", "second"]
        .iter()
        .zip(&places)
        .map(|(id, place)| Attachment::new(&lab, id, place.namespace.path()))
        .collect();
    containers[0].call("ADD", json!({})).unwrap();
    let record = fs::read_to_string(format!("/run/cirri/lab/{}/etcd.pid", lab.name())).unwrap();
    let etcd = record.split_whitespace().next().unwrap();
    run("kill", &["-STOP", etcd]);
    let mut plugin = containers[1].start("ADD", &json!({}));
    eventually("it is attached", PATIENCE, || endpoints(&lab).len() == 2);
    plugin.kill().unwrap();
    let ended = plugin.wait().unwrap();
    assert_eq!(ended.signal(), Some(9), "it had its answer already: {ended}");
    eventually("it is undone", PATIENCE, || endpoints(&lab).len() == 1);
    run("kill", &["-CONT", etcd]);
    assert!(!printed(&places[1].namespace, &["ip", "link"]).contains("eth0"));
    eventually("the store answers", PATIENCE, || containers[1].call("STATUS", json!({})).is_ok());
    assert_leftovers(&lab, 1);
    containers[1].call("ADD", json!({})).unwrap();
    assert_leftovers(&lab, 2);
}

#[test]
fn status_says_that_the_store_does_not_answer() {
    let lab = Lab::up("cnistore", 2, &[]).unwrap();
    let place = TestNamespace::new();
    let container = Attachment::new(&lab, "asks", place.namespace.path());
    assert_eq!(container.call("STATUS", json!({})), Ok(Value::Null));
    let record = fs::read_to_string(format!("/run/cirri/lab/{}/etcd.pid", lab.name())).unwrap();
    let etcd = record.split_whitespace().next().unwrap();
    run("kill", &["-STOP", etcd]);
    // Its threads stop one by one, and the last may still answer.
    eventually("STATUS says it", PATIENCE, || {
        let answer = container.call("STATUS", json!({}));
        let says = |error: Value| error["code"] == 50 && error["msg"].as_str().unwrap().contains("the store holds");
        answer.is_err_and(says)
    });
    run("kill", &["-CONT", etcd]);
    eventually("the store is back", PATIENCE, || container.call("STATUS", json!({})).is_ok());
}

/// Every device, address, route and rule of a namespace.
fn stack(namespace: &Namespace) -> String {
    let shown = ["-o link", "-4 -o addr", "-4 route show table all", "-6 route", "-4 rule", "-6 rule"]
        .map(|what| printed(namespace, &["sh", "-c", &format!("ip {what}")]));
    shown.join("--\n")
}

/// Whether a plugin reads from its socket: all that it had to say is said.
fn waits_for_answer(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|place| place.contains("unix_stream"))
}

fn run(program: &str, arguments: &[&str]) {
    assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program} {arguments:?}");
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
