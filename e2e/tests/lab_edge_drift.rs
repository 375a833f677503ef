//! What a load balancer made in the kernel is taken away or altered by hand: it is made right, and counted. Needs root.

use std::fs;
use std::process::{Child, Command, Output, Stdio};

use cirri_e2e::edge::{self, EdgeLab, PATIENCE, VIP, run};
use cirri_e2e::lab::{self, eventually};
use cirri_e2e::pinned::Pinned;
use serde_json::Value;

/// What is done by hand, and what must be as before after it.
type Case<'a> = (&'a str, &'a dyn Fn(), &'a dyn Fn() -> String);

#[test]
fn what_is_taken_from_a_load_balancer_is_put_back() {
    let mut lab = EdgeLab::new(2);
    let _servers = lab.serve(8080);
    run(&lab.lb, "ip address add 10.77.0.9/32 dev eth0");
    let service = format!(
        "acceleration: native\npools: [{{name: own, address: 10.77.0.9, ports: 32768-65535}}]\nservices: [{{name: web, \
         address: {VIP}, port: 80, pool: own, backends: [{{address: 10.77.0.11, port: 8080}}, \
         {{address: 10.77.0.12, port: 8080}}]}}]"
    );
    lab.write(&service);
    lab.start();
    let status = |()| lab.ask::<Value>(&["status"]);
    assert_eq!(status(())["devices"][0]["mode"], "native");
    let repairs = |()| -> u64 {
        let repaired = status(())["repaired"].as_object().cloned().unwrap();
        repaired.values().filter_map(Value::as_u64).sum()
    };
    let pins = Pinned(lab.pins());
    let link: Value = serde_json::from_str(&run(&lab.lb, "ip -j link show eth0")).unwrap();
    let pin = |program: &str| format!("{program}-{}", link[0]["ifindex"]);
    let forwarding = "cat /proc/sys/net/ipv4/conf/eth0/forwarding";
    let map = |name: &'static str| move |pins: &Pinned| pins.shown(name);
    let shown = |name: &'static str| {
        let pins = pins.clone();
        move || map(name)(&pins)
    };
    let cases: &[Case<'_>] = &[
        ("the program before the stack", &|| pins.detach(&pin("edge")), &|| pins.attached(&pin("edge"))),
        ("the program in the stack", &|| pins.detach(&pin("from_network")), &|| pins.attached(&pin("from_network"))),
        ("all pins", &|| fs::remove_dir_all(&pins.0).unwrap(), &|| pins.names()),
        ("services", &|| pins.delete_entries("SERVICES"), &shown("SERVICES")),
        ("backends", &|| pins.clear_entries("BACKENDS"), &shown("BACKENDS")),
        ("pools", &|| pins.clear_entries("SNAT_POOLS"), &shown("SNAT_POOLS")),
        ("addresses", &|| pins.delete_entries("IPCACHE"), &shown("IPCACHE")),
        ("the node", &|| pins.clear_entries("NODE"), &shown("NODE")),
        ("devices", &|| pins.clear_entries("EDGE_DEVICES"), &shown("EDGE_DEVICES")),
        ("a setting", &|| drop(run(&lab.lb, "sysctl -qw net.ipv4.conf.eth0.forwarding=0")), &|| {
            run(&lab.lb, forwarding)
        }),
    ];
    for (name, damage, state) in cases {
        let (before, count) = (state(), repairs(()));
        damage();
        eventually(name, PATIENCE, || state() == before && repairs(()) > count);
    }
    let (file, socket) = (lab.file().display().to_string(), lab.socket());
    eventually("that the socket was removed is said", PATIENCE, || {
        // Made again already, perhaps.
        let _ = fs::remove_file(&socket);
        let asked = lab.command(&["status", "--config", &file]);
        let said = String::from_utf8_lossy(&asked.stderr).into_owned();
        asked.status.code() == Some(3) && said.contains("somebody removed the socket") && said.contains("ask again")
    });
    eventually("the socket is made again", PATIENCE, || socket.exists());
    let status = lab.status_when("well", |status| status["problems"] == Value::Array(Vec::new()));
    for kind in ["program", "pin", "map", "setting", "file"] {
        assert!(status["repaired"][kind].as_u64() > Some(0), "{kind} is not counted: {status:#}");
    }
    assert!(lab.command(&["status", "--check", "--config", &file]).status.success());
    let mut talks = lab.connect_many(&format!("{VIP}:80"), 20);
    talks.iter_mut().for_each(edge::Talk::goes_on);
}

#[test]
fn a_place_before_the_stack_that_best_effort_had_and_lost_is_named_and_taken_again() {
    let mut lab = EdgeLab::new(1);
    let _servers = lab.serve(8080);
    // Its driver cannot do it; a pair's device would be left to tc from the beginning.
    run(&lab.lb, "ip link add spare type bridge");
    run(&lab.lb, "ip link set spare up");
    lab.write(&format!(
        "devices: [eth0, spare]\nacceleration: best-effort\nservices: [{{name: web, address: {VIP}, port: 80, \
         backends: [{{address: 10.77.0.11, port: 8080}}]}}]"
    ));
    lab.start();
    let mode = |()| {
        let status = lab.ask::<Value>(&["status"]);
        let devices = status["devices"].as_array().cloned().unwrap_or_default();
        let spare = devices.into_iter().find(|device| device["name"] == "spare");
        spare.map(|device| device["mode"].clone())
    };
    assert_eq!(mode(()), Some("generic".into()));
    let pins = Pinned(lab.pins());
    let link: Value = serde_json::from_str(&run(&lab.lb, "ip -j link show spare")).unwrap();
    let pin = format!("edge-{}", link[0]["ifindex"]);
    let before = pins.attached(&pin);

    let programs = fs::read_dir(pins.0.join("programs")).unwrap().map(|entry| entry.unwrap().path());
    let any = programs.into_iter().find(|path| path.display().to_string().contains("/edge-")).unwrap();
    let attach = ["net", "attach", "xdpgeneric", "pinned", any.to_str().unwrap(), "dev", "spare"];
    eventually("somebody else was faster", PATIENCE, || {
        pins.detach_if_there(&pin);
        lab.lb.namespace.run(|| Command::new("bpftool").args(attach).output()).unwrap().unwrap().status.success()
    });
    let file = lab.file().display().to_string();
    let is_well = |()| lab.command(&["status", "--check", "--config", &file]).status.success();
    eventually("it is named", PATIENCE, || {
        let problems = lab.ask::<Value>(&["status"])["problems"].to_string();
        problems.contains("another XDP program") && !is_well(())
    });
    run(&lab.lb, "bpftool net detach xdpgeneric dev spare");
    eventually("it is back when the other has gone", PATIENCE, || pins.attached(&pin) == before);
    eventually("all is well", PATIENCE, || is_well(()) && mode(()) == Some("generic".into()));
}

#[test]
fn devices_and_addresses_that_go_are_named_and_taken_up_when_they_return() {
    let mut lab = EdgeLab::new(1);
    let _servers = lab.serve(8080);
    // Nothing tells of this device but news of it: it has neither addresses nor routes.
    let make_spare = |lab: &EdgeLab| {
        run(&lab.lb, "ip link add spare type bridge");
        run(&lab.lb, "sysctl -qw net.ipv6.conf.spare.disable_ipv6=1");
        run(&lab.lb, "ip link set spare up");
    };
    let number = |lab: &EdgeLab| -> u64 {
        let link: Value = serde_json::from_str(&run(&lab.lb, "ip -j link show spare")).unwrap();
        link[0]["ifindex"].as_u64().unwrap()
    };
    let forwarding = |lab: &EdgeLab| run(&lab.lb, "cat /proc/sys/net/ipv4/conf/spare/forwarding").trim().to_owned();
    run(&lab.lb, "sysctl -qw net.ipv4.conf.default.forwarding=0");
    make_spare(&lab);
    for own in ["10.77.0.8", "10.77.0.9"] {
        run(&lab.lb, &format!("ip address add {own}/32 dev eth0"));
    }
    lab.write(&format!(
        "devices: [eth0, spare]\nacceleration: generic\naddress: 10.77.0.8\npools: [{{name: own, address: 10.77.0.9, \
         ports: 32768-65535}}, {{name: routed, address: 10.77.9.9, ports: 32768-65535}}]\nservices: [{{name: web, \
         address: {VIP}, port: 80, backends: [{{address: 10.77.0.11, port: 8080}}]}}]"
    ));
    lab.start();
    let file = lab.file().display().to_string();
    let check = |()| lab.command(&["status", "--check", "--config", &file]).status.code();
    assert_eq!(check(()), Some(0), "{:#}", lab.ask::<Value>(&["status"]));

    let cases = [
        ("device", "spare", "is down", "link set spare down", "link set spare up"),
        ("address", "10.77.0.8", "no device", "address del 10.77.0.8/32 dev eth0", "address add 10.77.0.8/32 dev eth0"),
        ("address", "10.77.0.9", "no device", "address del 10.77.0.9/32 dev eth0", "address add 10.77.0.9/32 dev eth0"),
    ];
    for (what, object, found, damage, mend) in cases {
        run(&lab.lb, &format!("ip {damage}"));
        lab.status_when(&format!("{object} is named"), |status| {
            let problems = status["problems"].as_array().unwrap();
            let is_it = |it: &Value| {
                it["what"] == what && it["object"] == object && it["found"].as_str().unwrap().contains(found)
            };
            problems.len() == 1 && problems.iter().all(is_it)
        });
        assert_eq!(check(()), Some(1), "{object}");
        run(&lab.lb, &format!("ip {mend}"));
        eventually(&format!("{object} is well again"), PATIENCE, || check(()) == Some(0));
    }
    let addresses = |()| Pinned(lab.pins()).shown("IPCACHE");
    let before = addresses(());
    run(&lab.lb, "ip address add 10.77.0.7/32 dev eth0");
    eventually("a new address is the machine's", PATIENCE, || addresses(()) != before);

    let pins = Pinned(lab.pins());
    let links = |()| -> Vec<String> {
        let all = fs::read_dir(pins.0.join("links")).unwrap().map(|it| it.unwrap().file_name());
        all.map(|name| name.to_string_lossy().into_owned()).collect()
    };
    let (old, count) = (number(&lab), links(()).len());
    run(&lab.lb, "ip link del spare");
    lab.status_when("the device is missing", |status| status["devices"][1]["mode"] == "missing");
    assert_eq!(check(()), Some(1));
    assert!(!links(()).iter().any(|name| name.ends_with(&format!("-{old}"))), "dead pins: {:?}", links(()));
    make_spare(&lab);
    assert_ne!(number(&lab), old);
    eventually("the device is served again", PATIENCE, || check(()) == Some(0) && links(()).len() == count);
    assert_eq!(forwarding(&lab), "1");
    // It is nobody's work that was undone, and so nothing is repaired: what is, later, is one and not the second.
    let repaired = |()| lab.ask::<Value>(&["status"])["repaired"].clone();
    assert_eq!(repaired(()), serde_json::json!({}));
    let pin = format!("from_network-{}", number(&lab));
    let attached = pins.attached(&pin);
    pins.detach(&pin);
    eventually("its program is put back", PATIENCE, || pins.attached(&pin) == attached);
    lab.status_when("counted once", |status| status["repaired"] == serde_json::json!({"program": 1}));
    lab.connect(&format!("{VIP}:80")).unwrap().goes_on();
    lab.stop();
    assert!(lab.command(&["down", "--config", &file]).status.success());
    assert_eq!(forwarding(&lab), "0", "the setting of the device that returned is put back");
}

/// A pod network's agent beside the load balancer. Dropping it takes away what it made.
struct Agent<'a> {
    child: Child,
    lab: &'a EdgeLab,
    directory: tempfile::TempDir,
    instance: String,
}

impl<'a> Agent<'a> {
    /// On the load balancer's node and device, with these manifests.
    fn start(lab: &'a EdgeLab, manifests: &str) -> Agent<'a> {
        let directory = tempfile::tempdir().unwrap();
        let instance = format!("{}-agent", lab.pins().file_name().unwrap().to_string_lossy());
        let at = |name: &str| directory.path().join(name).display().to_string();
        fs::create_dir(at("manifests")).unwrap();
        fs::write(at("manifests/all.yaml"), manifests).unwrap();
        let text = format!(
            "node: {{name: n, devices: [eth0]}}\nstore: {{kind: folder, folder: {}}}\nstateDir: {}\nmasquerade: {{ports: \
             49152-57343}}\nbpf: {{instance: {instance}, maps: {{flows: 16384, pending: 16384}}}}\nservices: {{socket: \
             {{mode: off}}}}",
            at("manifests"),
            at("state"),
        );
        fs::write(at("agent.yaml"), text).unwrap();
        let log = fs::File::create(at("log")).unwrap();
        let mut command = Command::new(lab::binary().unwrap());
        command.args(["agent", "--config", &at("agent.yaml")]).stdin(Stdio::null()).stdout(log.try_clone().unwrap());
        let child = lab.lb.namespace.run(|| command.stderr(log).spawn()).unwrap().unwrap();
        let agent = Agent { child, lab, directory, instance };
        eventually("the agent answers", 3 * PATIENCE, || agent.ask(&["status"]).status.success());
        agent
    }

    fn ask(&self, question: &[&str]) -> Output {
        let socket = self.directory.path().join("state/agent.sock").display().to_string();
        lab::output([&["--socket", &socket], question, &["-o", "json"]].concat()).unwrap()
    }

    fn status(&self) -> Value {
        serde_json::from_slice(&self.ask(&["status"]).stdout).unwrap()
    }

    fn pins(&self) -> Pinned {
        Pinned(self.lab.pins().with_file_name(&self.instance))
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        // Ended already, perhaps.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let file = self.directory.path().join("agent.yaml");
        let mut command = Command::new(lab::binary().unwrap());
        command.args(["agent", "--cleanup", "--config"]).arg(file);
        let cleaned = self.lab.lb.namespace.run(|| command.output()).unwrap().unwrap();
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let said = String::from_utf8_lossy(&cleaned.stderr).into_owned();
        assert!(cleaned.status.success() || std::thread::panicking(), "{said}");
        if std::thread::panicking() {
            eprintln!("what the agent said:\n{log}{said}");
        }
    }
}

#[test]
fn a_load_balancer_and_an_agent_on_one_device_both_serve_and_neither_takes_the_other_for_drift() {
    let mut lab = EdgeLab::new(2);
    let _servers = lab.serve(8080);
    lab.write(&format!(
        "acceleration: off\nsnatPorts: 57344-65535\nservices: [{{name: web, address: {VIP}, port: 80, backends: \
         [{{address: 10.77.0.11, port: 8080}}, {{address: 10.77.0.12, port: 8080}}]}}]"
    ));
    lab.start();
    let first = lab.connect_many(&format!("{VIP}:80"), 10);
    let agent = Agent::start(
        &lab,
        "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {externalIPs: [203.0.113.11], \
         ports: [{name: web, port: 80, targetPort: 8080}]}}\n---\n{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, \
         metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}, addressType: IPv4, \
         endpoints: [{addresses: [10.77.0.11]}, {addresses: [10.77.0.12]}], ports: [{name: web, port: 8080}]}\n",
    );
    eventually("the agent serves", PATIENCE, || lab.connect("203.0.113.11:80").is_ok());
    let both_serve = |mut talks: Vec<edge::Talk>| {
        talks.extend(lab.connect_many(&format!("{VIP}:80"), 10));
        talks.extend(lab.connect_many("203.0.113.11:80", 10));
        talks.iter_mut().for_each(edge::Talk::goes_on);
    };
    both_serve(first);
    // Each makes right what is its own, once, and is content with its place beside the other.
    let link: Value = serde_json::from_str(&run(&lab.lb, "ip -j link show eth0")).unwrap();
    let pin = format!("from_network-{}", link[0]["ifindex"]);
    let repaired = |()| [lab.ask::<Value>(&["status"]), agent.status()].map(|status| status["repaired"].clone());
    let (none, one) = (serde_json::json!({}), serde_json::json!({"program": 1}));
    assert_eq!(repaired(()), [none.clone(), none.clone()]);
    Pinned(lab.pins()).detach(&pin);
    eventually("the load balancer's is put back", PATIENCE, || repaired(()) == [one.clone(), none.clone()]);
    both_serve(Vec::new());
    agent.pins().detach(&pin);
    eventually("the agent's is put back", PATIENCE, || repaired(()) == [one.clone(), one.clone()]);
    both_serve(Vec::new());
    drop(agent);
    lab.connect_many(&format!("{VIP}:80"), 10).iter_mut().for_each(edge::Talk::goes_on);
}
