//! `cirri lb` in front of real servers, with real clients. Needs root.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use cirri_e2e::edge::{self, EdgeLab, PATIENCE, Server, VIP, VIP6, ask_datagram, spread};
use serde_json::Value;

/// Services at port 80 of both families: TCP and UDP, served at port 8080.
fn services(more: &str) -> String {
    let mut all = String::from("services:\n");
    for (name, vip, prefix) in [("four", VIP, "10.77.0.1"), ("six", VIP6, "fd77::1")] {
        for protocol in ["TCP", "UDP"] {
            all += &format!(
                "  - name: {name}-{protocol}\n    address: '{vip}'\n    port: 80\n    protocol: {protocol}\n{more}    backends:\n"
            );
            for n in 1..=3 {
                all += &format!("      - {{name: b{n}, address: '{prefix}{n}', port: 8080}}\n");
            }
        }
    }
    all
}

fn refused_at_once(what: impl FnOnce() -> io::Result<()>) {
    let begun = Instant::now();
    let error = what().expect_err("must be refused");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
    assert!(begun.elapsed() < Duration::from_secs(1), "only after {:?}", begun.elapsed());
}

#[test]
fn connections_are_translated_spread_counted_and_refused_in_every_mode() {
    let mut lab = EdgeLab::new(3);
    let _servers = lab.serve(8080);
    for (acceleration, mode) in [("native", "native"), ("generic", "generic"), ("off", "tc"), ("best-effort", "tc")] {
        lab.write(&format!("acceleration: {acceleration}\n{}", services("")));
        lab.start();
        let status: Value = lab.ask(&["status"]);
        assert_eq!(status["devices"][0]["mode"], mode, "{status:#}");
        for (vip, own) in [(VIP.to_owned(), "10.77.0.1"), (format!("[{VIP6}]"), "fd77::1")] {
            let own: IpAddr = own.parse().unwrap();
            let to = format!("{vip}:80");
            let mut talks = lab.connect_many(&to, 60);
            talks.iter_mut().for_each(edge::Talk::goes_on);
            assert_eq!(spread(&talks).len(), 3, "{acceleration} {to}: {:?}", spread(&talks));
            assert!(talks.iter().all(|talk| talk.seen.ip() == own), "{acceleration} {to}: {}", talks[0].seen);
            let sockets: Vec<_> = (0..30).map(|_| lab.datagrams(&to)).collect();
            let answers: Vec<(String, IpAddr)> = sockets
                .iter()
                .map(|socket| ask_datagram(socket).unwrap_or_else(|error| panic!("{acceleration} {to}: {error}")))
                .collect();
            let served: std::collections::BTreeSet<&String> = answers.iter().map(|(name, _)| name).collect();
            assert_eq!(served.len(), 3, "{acceleration} {to}");
            assert!(answers.iter().all(|(_, seen)| *seen == own));
            refused_at_once(|| lab.connect(&format!("{vip}:81")).map(drop));
            let unused = lab.datagrams(&format!("{vip}:81"));
            refused_at_once(|| {
                unused.send(b"who")?;
                unused.recv(&mut [0; 10]).map(drop)
            });
        }
        lab.stop();
    }
    lab.start();
    let stats: Value = lab.ask(&["stats", "four-TCP", "--over", "0"]);
    let total = &stats["services"][0]["total"];
    assert_eq!(total["connections"], 240, "{stats:#}");
    assert!(total["answers"].as_u64() > Some(240) && total["bytes"].as_u64() > Some(240 * 60), "{stats:#}");
    let list: Value = lab.ask(&["list", "six-UDP"]);
    let shares: Vec<f64> =
        list[0]["backends"].as_array().unwrap().iter().map(|it| it["share"].as_f64().unwrap()).collect();
    assert!(shares.iter().all(|share| (share - 1.0 / 3.0).abs() < 0.01), "{shares:?}");
}

#[test]
fn a_socket_that_the_environment_names_for_an_agent_is_not_the_load_balancers() {
    let mut lab = EdgeLab::new(1);
    let _servers = lab.serve(8080);
    lab.write(&services(""));
    lab.start();
    let file = lab.file();
    let asked = |more: &[&str]| {
        let mut command = std::process::Command::new(cirri_e2e::lab::binary().unwrap());
        command.env("CIRRI_SOCKET", "/run/an-agents.sock").args(["lb", "status"]).args(more).arg("--config");
        command.arg(&file).output().unwrap()
    };
    let output = asked(&[]);
    assert!(output.status.success(), "{output:?}");
    // What the command line names is what is asked, also with a file.
    let output = asked(&["--socket", "/nowhere.sock"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("/nowhere.sock"), "{said}");
    // Where nothing else names one, an agent's is still taken from there.
    let mut agent = std::process::Command::new(cirri_e2e::lab::binary().unwrap());
    let said = agent.env("CIRRI_SOCKET", "/elsewhere.sock").arg("status").output().unwrap();
    assert!(String::from_utf8_lossy(&said.stderr).contains("/elsewhere.sock"), "{said:?}");
}

#[test]
fn a_change_of_the_file_is_in_force_at_once_and_no_connection_notices() {
    let mut lab = EdgeLab::new(3);
    let _servers = lab.serve(8080);
    lab.write(&services(""));
    lab.start();
    let to = format!("{VIP}:80");
    let mut talks = lab.connect_many(&to, 40);
    // One backend goes, a service comes.
    let without = services("").replace("      - {name: b2, address: '10.77.0.12', port: 8080}\n", "");
    let more = "  - {name: more, address: 203.0.113.11, port: 8000, backends: [{address: 10.77.0.12, port: 8080}]}\n";
    lab.reload(&format!("{without}{more}"));
    let now = lab.connect_many(&to, 40);
    assert_eq!(spread(&now).keys().collect::<Vec<_>>(), ["b1", "b3"]);
    assert_eq!(lab.connect("203.0.113.11:8000").unwrap().backend, "b2");
    talks.iter_mut().for_each(edge::Talk::goes_on);

    // A mistake changes nothing, and is told.
    lab.write(&services("").replace("name: six-TCP", "name: four-TCP"));
    let status = lab.status_when("told of the mistake", |status| status["config"]["in_force"] == false);
    let error = status["config"]["error"].as_str().unwrap();
    assert!(error.contains("four-TCP") && error.contains("lb.yaml:"), "{error}");
    assert!(lab.log_text().contains("its last good version is"));
    assert_eq!(lab.connect("203.0.113.11:8000").unwrap().backend, "b2");
    talks.iter_mut().for_each(edge::Talk::goes_on);

    // Corrected; SIGHUP reads it again without a change.
    lab.reload(&services(""));
    assert_eq!(spread(&lab.connect_many(&to, 60)).len(), 3);
    refused_or_silent(&lab, "203.0.113.11:8000");
    let loads = lab.loads();
    lab.signal("HUP");
    lab.loaded_after(loads);
    talks.iter_mut().for_each(edge::Talk::goes_on);
}

/// An address that is not served any more is nobody's: its packets end at the load balancer's own stack.
fn refused_or_silent(lab: &EdgeLab, to: &str) {
    let to = to.parse().unwrap();
    let connected =
        lab.client.namespace.run(|| std::net::TcpStream::connect_timeout(&to, Duration::from_millis(500))).unwrap();
    assert!(connected.is_err(), "{to} is still served");
}

#[test]
fn a_drained_backend_keeps_what_it_has_over_restarts_and_gets_no_more() {
    let mut lab = EdgeLab::new(3);
    let _servers = lab.serve(8080);
    lab.write(&services(""));
    lab.start();
    let to = format!("{VIP}:80");
    let mut talks = lab.connect_many(&to, 40);
    assert!(spread(&talks).contains_key("b2"));
    let drained: Value = lab.ask(&["drain", "four-TCP/b2"]);
    assert_eq!(drained["backends"], serde_json::json!(["four-TCP/b2"]));
    let others = |lab: &EdgeLab| {
        let counts = spread(&lab.connect_many(&to, 40));
        assert_eq!(counts.keys().collect::<Vec<_>>(), ["b1", "b3"]);
    };
    others(&lab);
    lab.stop();
    lab.start();
    others(&lab);
    let list: Value = lab.ask(&["list", "four-TCP"]);
    let b2 = &list[0]["backends"][1];
    assert_eq!(
        (&b2["state"], &b2["reason"], &b2["share"]),
        (&"draining".into(), &"drained by hand".into(), &0.0.into())
    );
    talks.iter_mut().for_each(edge::Talk::goes_on);
    let _: Value = lab.ask(&["undrain", "10.77.0.12"]);
    assert!(spread(&lab.connect_many(&to, 60)).contains_key("b2"));
    // By address it fits both protocols; a name that fits nobody is refused.
    let drained: Value = lab.ask(&["drain", "10.77.0.12:8080"]);
    assert_eq!(drained["backends"].as_array().unwrap().len(), 2);
    let file = lab.file();
    let unknown = lab.command(&["drain", "b9", "--config", &file.to_string_lossy()]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("no backend b9"));
}

const CHECKED: &str = "    health: {type: tcp, port: 8080, interval: 100ms, timeout: 500ms, rise: 2, fall: 2}\n";

#[test]
fn a_backend_that_fails_is_left_and_one_that_returns_is_used_again() {
    let mut lab = EdgeLab::new(3);
    let mut servers = lab.serve(8080);
    lab.write(&services(CHECKED));
    lab.start();
    let to = format!("{VIP}:80");
    let up = |count: u64| move |status: &Value| status["backends"]["active"].as_u64() == Some(count);
    lab.status_when("all up", |status| {
        status["health"].as_array().unwrap().iter().all(|health| health["state"] == "up")
    });
    let mut talks = lab.connect_many(&to, 40);
    let socket = (0..).map(|_| lab.datagrams(&to)).find(|socket| ask_datagram(socket).unwrap().0 == "b2").unwrap();
    servers.remove("b2").unwrap().end();
    lab.status_when("one of each service down", up(8));
    assert_eq!(spread(&lab.connect_many(&to, 40)).keys().collect::<Vec<_>>(), ["b1", "b3"]);
    // Its datagrams go elsewhere, the others' connections go on.
    let answered = (0..5).find_map(|_| ask_datagram(&socket).ok()).expect("another serves it");
    assert_ne!(answered.0, "b2");
    for talk in talks.iter_mut().filter(|talk| talk.backend != "b2") {
        talk.goes_on();
    }
    // Found out once, it stays known over a restart.
    lab.kill();
    lab.start();
    let list: Value = lab.ask(&["list", "four-TCP"]);
    assert_eq!(list[0]["backends"][1]["state"], "down", "{list:#}");
    assert_eq!(spread(&lab.connect_many(&to, 40)).keys().collect::<Vec<_>>(), ["b1", "b3"]);

    // Nobody left: refused at once, and told.
    servers.clear();
    let status = lab.status_when("all down", |status| status["backends"]["down"].as_u64() == Some(12));
    assert_eq!(status["refusing"].as_array().unwrap().len(), 4);
    refused_at_once(|| lab.connect(&to).map(drop));
    refused_at_once(|| {
        let socket = lab.datagrams(&to);
        socket.send(b"who")?;
        socket.recv(&mut [0; 10]).map(drop)
    });
    let check = lab.command(&["status", "--check", "--config", &lab.file().to_string_lossy()]);
    assert_eq!(check.status.code(), Some(1));

    let _servers = lab.serve(8080);
    lab.status_when("all back", up(12));
    assert_eq!(spread(&lab.connect_many(&to, 60)).len(), 3);
}

#[test]
fn a_restart_loses_no_connection_and_down_leaves_nothing() {
    let mut lab = EdgeLab::new(3);
    let _servers = lab.serve(8080);
    lab.write(&services(""));
    lab.start();
    let to = format!("{VIP}:80");
    let mut talks = lab.connect_many(&to, 40);
    let before: Value = lab.ask(&["list"]);
    for end in [EdgeLab::kill, EdgeLab::stop] {
        end(&mut lab);
        // Nobody runs: what stands goes on, what comes is served.
        talks.iter_mut().for_each(edge::Talk::goes_on);
        assert_eq!(spread(&lab.connect_many(&to, 60)).len(), 3);
        lab.start();
        talks.iter_mut().for_each(edge::Talk::goes_on);
        assert_eq!(lab.ask::<Value>(&["list"]), before, "numbers and tables are the same");
    }
    let second = lab.command(&["--config", &lab.file().to_string_lossy()]);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("a load balancer runs"));
    let running = lab.command(&["down", "--config", &lab.file().to_string_lossy()]);
    assert_eq!(running.status.code(), Some(1), "not while it runs");
    lab.stop();
    let down = lab.command(&["down", "--config", &lab.file().to_string_lossy()]);
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
    assert!(!lab.pins().exists());
    let link = edge::run(&lab.lb, "ip -details link show eth0");
    assert!(!link.contains("xdp"), "{link}");
    let reserved = edge::run(&lab.lb, "sysctl -n net.ipv4.ip_local_reserved_ports");
    assert_eq!(reserved.trim(), "");
    assert!(talks[0].exchange().is_err(), "nobody translates any more");
}

#[test]
fn only_clients_in_the_ranges_are_let_in() {
    let mut lab = EdgeLab::new(3);
    let _servers = lab.serve(8080);
    let ranged = "  - {name: far, address: 203.0.113.11, port: 80, sourceRanges: [192.0.2.0/24], backends: [{address: 10.77.0.11, port: 8080}]}
  - {name: near, address: 203.0.113.12, port: 80, sourceRanges: [10.77.0.0/28], backends: [{address: 10.77.0.11, port: 8080}]}\n";
    lab.write(&format!("services:\n{ranged}"));
    lab.start();
    lab.connect("203.0.113.12:80").unwrap().goes_on();
    let to = "203.0.113.11:80".parse().unwrap();
    let connected =
        lab.client.namespace.run(|| std::net::TcpStream::connect_timeout(&to, Duration::from_millis(500))).unwrap();
    assert!(connected.is_err());
    let status = lab.status_when("told of the drop", |status| {
        status["drops"]
            .as_array()
            .unwrap()
            .iter()
            .any(|drops| drops["reason"] == 177 && !drops["clients"].as_array().unwrap().is_empty())
    });
    let drops = status["drops"].as_array().unwrap().iter().find(|drops| drops["reason"] == 177).unwrap();
    assert_eq!(drops["clients"][0]["address"], "10.77.0.2");
    assert_eq!(drops["clients"][0]["destination"], "203.0.113.11:80/TCP");
}

#[test]
fn a_full_pool_drops_and_names_the_client_that_holds_it() {
    let mut lab = EdgeLab::new(1);
    let _servers = lab.serve(8080);
    edge::run(&lab.lb, "ip address add 10.77.0.9/32 dev eth0");
    edge::run(&lab.client, "ip address add 10.77.0.3/24 dev eth0");
    lab.write(
        "pools: [{name: tiny, address: 10.77.0.9, ports: 40000-40015}]
services: [{name: web, address: 203.0.113.10, port: 80, pool: tiny, backends: [{address: 10.77.0.11, port: 8080}]}]",
    );
    lab.start();
    let talks = lab.connect_many("203.0.113.10:80", 14);
    assert!(
        talks
            .iter()
            .all(|talk| talk.seen.ip().to_string() == "10.77.0.9" && (40000..40016).contains(&talk.seen.port()))
    );
    let to = "203.0.113.10:80".parse().unwrap();
    let mut more = Vec::new();
    let full = lab.client.namespace.run(|| {
        for _ in 0..8 {
            match std::net::TcpStream::connect_timeout(&to, Duration::from_millis(500)) {
                Ok(stream) => more.push(stream),
                Err(_) => return true,
            }
        }
        false
    });
    assert!(full.unwrap(), "sixteen ports held more than sixteen connections");
    let status = lab.status_when("told of the pool", |status| {
        status["pools"].as_array().unwrap().iter().any(|pool| pool["name"] == "tiny")
            && status["drops"]
                .as_array()
                .unwrap()
                .iter()
                .any(|drops| drops["reason"] == 167 && !drops["clients"].as_array().unwrap().is_empty())
    });
    let tiny = status["pools"].as_array().unwrap().iter().find(|pool| pool["name"] == "tiny").unwrap();
    assert_eq!(tiny["size"], 16);
    assert!(tiny["used"].as_u64() >= Some(14), "{tiny:#}");
    assert_eq!(tiny["clients"][0]["address"], "10.77.0.2", "{tiny:#}");
    let pools: Value = lab.ask(&["pools", "tiny"]);
    assert_eq!(pools[0]["clients"][0]["address"], "10.77.0.2");
    drop(talks);
}

#[test]
fn the_backend_answers_itself_when_packets_come_in_ipip() {
    let mut lab = EdgeLab::new(3);
    let wrapped = services("    forwarding: dsr-ipip\n").replace("port: 8080", "port: 80");
    lab.write(&wrapped);
    lab.start();
    let hosts = BackendHosts::set_up(&lab, &["--device", "eth0", "--vip", VIP, "--vip", VIP6]);
    let mut servers = Vec::new();
    for (name, place) in &lab.backends {
        for address in [format!("{VIP}:80"), format!("[{VIP6}]:80")] {
            servers.push(Server::at(place, name, &address));
        }
    }
    for to in [format!("{VIP}:80"), format!("[{VIP6}]:80")] {
        let mut talks = lab.connect_many(&to, 60);
        talks.iter_mut().for_each(edge::Talk::goes_on);
        assert_eq!(spread(&talks).len(), 3);
        assert!(talks.iter().all(|talk| talk.seen == talk.own), "{} and {}", talks[0].seen, talks[0].own);
        let (_, seen) = ask_datagram(&lab.datagrams(&to)).unwrap();
        assert_eq!(seen, talks[0].own.ip());
    }
    let stats: Value = lab.ask(&["stats", "four-TCP", "--over", "0"]);
    let total = &stats["services"][0]["total"];
    assert_eq!((&total["connections"], &total["answers"]), (&60.into(), &0.into()), "{stats:#}");
    drop(servers);
    let instances: Vec<String> = lab.backends.keys().map(|name| hosts.instance(name)).collect();
    drop(hosts);
    assert!(!instances.iter().any(|instance| lab.pins().with_file_name(instance).exists()));
    assert!(!lab.backends.values().any(|place| edge::run(place, "ip address show dev lo").contains(VIP)));
    let to = format!("{VIP}:80").parse().unwrap();
    let connected = lab.client.namespace.run(|| std::net::TcpStream::connect_timeout(&to, Duration::from_secs(1)));
    assert!(connected.unwrap().is_err(), "nobody unwraps any more");
}

/// What makes load balancers side by side worth having: a router that knows one less sends a connection's
/// packets to another, which has never seen it.
#[test]
fn another_load_balancer_goes_on_where_one_stopped() {
    let mut lab = EdgeLab::new(3);
    let wrapped = "services: [{name: web, address: 203.0.113.10, port: 80, forwarding: dsr-ipip, backends: [
        {address: 10.77.0.11}, {address: 10.77.0.12}, {address: 10.77.0.13}]}]";
    lab.write(wrapped);
    lab.start();
    let second = lab.second(lab.host("lb2", 4), wrapped);
    let hosts = BackendHosts::set_up(&lab, &["--device", "eth0", "--vip", VIP]);
    let servers: Vec<Server> =
        lab.backends.iter().map(|(name, place)| Server::at(place, name, &format!("{VIP}:80"))).collect();
    let mut talks = lab.connect_many(&format!("{VIP}:80"), 60);
    assert_eq!(spread(&talks).len(), 3);
    edge::run(&lab.client, "ip route replace 203.0.113.0/24 via 10.77.0.4");
    talks.iter_mut().for_each(edge::Talk::goes_on);
    drop((servers, hosts, second));
}

#[test]
fn two_load_balancers_on_one_device_both_serve() {
    let mut lab = EdgeLab::new(2);
    let _servers = lab.serve(8080);
    let services = |vip: &str| {
        format!(
            "services: [{{name: web, address: {vip}, port: 80, backends: [{{address: 10.77.0.11, port: 8080}}, \
             {{address: 10.77.0.12, port: 8080}}]}}]"
        )
    };
    lab.write(&format!("acceleration: off\nsnatPorts: 49152-57343\n{}", services(VIP)));
    lab.start();
    let mut first = lab.connect_many(&format!("{VIP}:80"), 10);
    let second = lab.beside(&format!("snatPorts: 57344-65535\n{}", services("203.0.113.11")));
    let mut both = lab.connect_many(&format!("{VIP}:80"), 10);
    both.extend(lab.connect_many("203.0.113.11:80", 10));
    first.iter_mut().chain(&mut both).for_each(edge::Talk::goes_on);
    drop(second);
    first.iter_mut().for_each(edge::Talk::goes_on);
}

/// `cirri lb backend` on every backend.
struct BackendHosts<'a> {
    lab: &'a EdgeLab,
    arguments: Vec<String>,
}

impl<'a> BackendHosts<'a> {
    fn set_up(lab: &'a EdgeLab, arguments: &[&str]) -> BackendHosts<'a> {
        let hosts = BackendHosts { lab, arguments: arguments.iter().map(|word| (*word).to_owned()).collect() };
        hosts.each(&[]);
        hosts
    }

    fn instance(&self, name: &str) -> String {
        format!("{}-{name}", self.lab.pins().file_name().unwrap().to_string_lossy())
    }

    fn each(&self, more: &[&str]) {
        for (name, place) in &self.lab.backends {
            let instance = self.instance(name);
            let words: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
            let ran =
                edge::command_in(&place.namespace, &[&["backend", "--instance", &instance][..], &words, more].concat());
            let done = ran.status.success() || std::thread::panicking();
            assert!(done, "{}", String::from_utf8_lossy(&ran.stderr));
        }
    }
}

impl Drop for BackendHosts<'_> {
    fn drop(&mut self) {
        self.each(&["--remove"]);
    }
}

#[test]
fn what_cannot_work_is_said_before_anything_changes() {
    let lab = EdgeLab::new(1);
    let file = lab.file();
    let file = file.to_string_lossy();
    let one = "services: [{name: web, address: 203.0.113.10, port: 80, backends: [{address: 10.77.0.11}]}]";
    let cases = [
        (format!("devices: [eth9]\n{one}"), "there is no device eth9; devices: lo, eth0"),
        (format!("address: 10.77.0.99\n{one}"), "no device has 10.77.0.99; correct address"),
        (
            format!("pools: [{{name: own, address: 10.77.0.1, ports: 1024-2047}}]\n{one}"),
            "pool own has the address 10.77.0.1",
        ),
        (
            one.replace("203.0.113.10", "10.77.0.1").replace("services", "address: 10.77.0.1\nservices"),
            "load balancer's own address",
        ),
        (one.replace("port: 80", "port: 65536"), "port 65536 is out of range"),
        (one.replace("port: 80", "port: 80, algorithm: fair"), "fair"),
        (one.replace("10.77.0.11", "'fd77::11'"), "another family"),
        (
            format!("{}, {}", one.trim_end_matches(']'), "{name: two, address: 203.0.113.10, port: 80}]"),
            "is service web's already",
        ),
        (format!("{one}\nacceleration: fastest"), "fastest"),
    ];
    for (text, said) in cases {
        lab.write(&text);
        let ran = lab.command(&["--config", &file]);
        let error = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!(ran.status.code(), Some(2), "{text}: {error}");
        assert!(error.contains(said), "{text}: {error}");
        assert!(!lab.pins().exists(), "{text}");
    }
    lab.write(one);
    assert!(lab.command(&["check", "--config", &file]).status.success());
    let nobody = lab.command(&["status", "--config", &file]);
    assert_eq!(nobody.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("no load balancer answers"));
    assert_eq!(lab.command(&[]).status.code(), Some(2), "neither a file nor a command");
}

/// The first packet of each connection carries the service's address in an IP option, and the client's
/// address as its source: what a Cirri node needs to answer itself. What it does with it is shown by the
/// tests of services in clusters.
#[test]
fn a_first_packet_with_a_dsr_option_names_the_service() {
    let mut lab = EdgeLab::new(1);
    let text = services("    forwarding: dsr-option\n");
    let only_b1: String = text
        .lines()
        .filter(|line| !line.contains("name: b2") && !line.contains("name: b3"))
        .map(|line| format!("{line}\n"))
        .collect();
    lab.write(&only_b1);
    lab.start();
    let wire = lab.backends["b1"].namespace.run(|| {
        // Every frame that comes in.
        let all = i32::from(0x0003_u16.to_be());
        socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, Some(all.into()))
    });
    let mut wire = wire.unwrap().unwrap();
    wire.set_read_timeout(Some(PATIENCE)).unwrap();
    let vip4: std::net::Ipv4Addr = VIP.parse().unwrap();
    let vip6: std::net::Ipv6Addr = VIP6.parse().unwrap();
    let v4 = [&[0x9a, 8][..], &80_u16.to_be_bytes(), &vip4.octets()].concat();
    for (to, option, v6) in [(format!("{VIP}:80"), v4, false), (format!("[{VIP6}]:80"), vip6.octets().to_vec(), true)] {
        let to: std::net::SocketAddr = to.parse().unwrap();
        // Nobody answers as the service here, so it does not come to a connection.
        let client = lab.client.namespace.clone();
        let connecting = std::thread::spawn(move || {
            client.run(|| std::net::TcpStream::connect_timeout(&to, Duration::from_millis(500)).is_ok()).unwrap()
        });
        let deadline = Instant::now() + PATIENCE;
        let frame = loop {
            assert!(Instant::now() < deadline, "no such packet for {to}");
            let mut frame = [0; 2048];
            let length = io::Read::read(&mut wire, &mut frame).unwrap();
            let frame = &frame[..length];
            let ours = if v6 {
                frame[12..14] == [0x86, 0xdd] && frame[20] == 60
            } else {
                frame[12..14] == [8, 0] && frame[14] == 0x47
            };
            if ours {
                break frame.to_vec();
            }
        };
        assert!(!connecting.join().unwrap());
        let (source, destination) =
            if v6 { (&frame[22..38], &frame[38..54]) } else { (&frame[26..30], &frame[30..34]) };
        let (client, backend): (IpAddr, IpAddr) = if v6 {
            ("fd77::2".parse().unwrap(), "fd77::11".parse().unwrap())
        } else {
            ([10, 77, 0, 2].into(), [10, 77, 0, 11].into())
        };
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        assert_eq!((source, destination), (&octets(client)[..], &octets(backend)[..]));
        let headers = if v6 { &frame[54..78] } else { &frame[34..42] };
        if v6 {
            assert_eq!((headers[0], headers[1], headers[2]), (6, 2, 0x1b), "{headers:x?}");
            assert_eq!((&headers[4..20], &headers[20..22]), (&option[..], &80_u16.to_be_bytes()[..]), "{headers:x?}");
        } else {
            assert_eq!(headers, option);
        }
    }
}

#[test]
fn lost_packets_and_a_restart_are_no_failed_backend() {
    let mut lab = EdgeLab::new(3);
    let _servers = lab.serve(8080);
    // Two of three requests for a connection are lost on the way to b1.
    edge::run(
        &lab.backends["b1"],
        "nft add table inet lossy ; add chain inet lossy in { type filter hook input priority 0 ; } ; \
         add rule inet lossy in tcp dport 8080 tcp flags syn / syn,ack numgen inc mod 3 < 2 counter drop",
    );
    let lost = |lab: &EdgeLab| -> u64 {
        let rules = edge::run(&lab.backends["b1"], "nft list table inet lossy");
        let mut words = rules.split_whitespace().skip_while(|word| *word != "packets").skip(1);
        words.next().unwrap().parse().unwrap()
    };
    let backends: String =
        (1..=3).map(|n| format!("      - {{name: b{n}, address: 10.77.0.1{n}, port: 8080}}\n")).collect();
    lab.write(&format!(
        "services:\n  - name: web\n    address: {VIP}\n    port: 80\n\
         \x20   health: {{type: tcp, interval: 100ms, timeout: 900ms, rise: 1, fall: 2}}\n    backends:\n{backends}"
    ));
    for _ in 0..2 {
        let before = lost(&lab);
        lab.start();
        // Many checks have lost some by then.
        let status = lab.status_when("checked", |_| lost(&lab) > before + 20);
        let health = status["health"].as_array().unwrap();
        assert!(health.iter().all(|it| it["state"] == "up" && it["changes"] == 0), "{status:#}");
        lab.kill();
    }
}
