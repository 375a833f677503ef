//! `cirri lb` while 100,000 new flows a second are offered, backends fail and return, and the process is
//! killed and replaced. Needs root.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cirri_e2e::edge::{self, EdgeLab, Offer, Talk, VIP, ask_datagram};
use serde_json::Value;

/// New flows a second.
const RATE: u32 = 100_000;
/// Established connections that must not notice, and datagram flows.
const TALKS: usize = 300;
const SOCKETS: usize = 100;
/// A round of everything takes this long at least, and, until the rate was reached once, this long at most: who offers
/// flows shares the machine.
const ROUND: Duration = Duration::from_secs(4);
const LONGEST_ROUND: Duration = Duration::from_secs(180);

/// A service that matters, checked; and two that only take what is offered, one of each way.
fn services() -> String {
    let backends = |port: u16| {
        let one = |n| format!("{{name: b{n}, address: 10.77.0.1{n}, port: {port}}}");
        format!("[{}]", [one(1), one(2), one(3)].join(", "))
    };
    format!(
        "services:
  - {{name: web, address: {VIP}, port: 80, backends: {web}, health: &check {{type: tcp, port: 8080, interval: 100ms, timeout: 1s, rise: 2, fall: 2}} }}
  - {{name: dns, address: {VIP}, port: 80, protocol: UDP, backends: {web}, health: *check}}
  - {{name: sink, address: {VIP}, port: 9, protocol: UDP, backends: {sink}}}
  - {{name: sink-ipip, address: {VIP}, port: 10, protocol: UDP, forwarding: dsr-ipip, backends: {ipip}}}
",
        web = backends(8080),
        sink = backends(9),
        ipip = backends(10),
    )
}

#[test]
fn no_established_flow_of_a_healthy_backend_moves_under_100000_new_flows_a_second() {
    let mut lab = EdgeLab::new(3);
    let mut servers = lab.serve(8080);
    // What takes the flows that are offered, and reads none.
    let _sinks: Vec<UdpSocket> =
        lab.backends.values().map(|it| it.namespace.run(|| UdpSocket::bind("0.0.0.0:9")).unwrap().unwrap()).collect();
    lab.write(&services());
    lab.start();
    lab.status_when("all up", |status| status["health"].as_array().unwrap().iter().all(|it| it["state"] == "up"));
    // Where the flows that are offered say they come from.
    edge::run(&lab.lb, "ip route add 10.128.0.0/9 via 10.77.0.2");
    let to = format!("{VIP}:80");
    let mut talks = lab.connect_many(&to, TALKS);
    talks.iter_mut().for_each(Talk::goes_on);
    let sockets: Vec<(UdpSocket, String)> = (0..SOCKETS)
        .map(|_| {
            let socket = lab.datagrams(&to);
            let (backend, _) = ask_datagram(&socket).unwrap();
            (socket, backend)
        })
        .collect();
    assert_eq!(edge::spread(&talks).len(), 3);
    let numbers = |lab: &EdgeLab| -> BTreeMap<String, Value> {
        let list: Vec<Value> = lab.ask(&["list", "web"]);
        list[0]["backends"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| (it["name"].to_string(), it["number"].clone()))
            .collect()
    };
    let before = numbers(&lab);

    for port in [9, 10] {
        let (stop, peak) = (AtomicBool::new(false), AtomicU64::new(0));
        let offer = Offer { to: VIP.parse().unwrap(), port, rate: RATE };
        let client = lab.client.namespace.clone();
        let begun = Instant::now();
        let offered = std::thread::scope(|scope| {
            let offering = scope.spawn(|| offer.run(&client, &stop, &peak).unwrap());
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                // b2 fails and returns, twice; in between the process is killed, and told to stop.
                for end in [EdgeLab::kill, EdgeLab::stop] {
                    servers.remove("b2").unwrap().end();
                    lab.status_when("b2 down", |status| status["backends"]["down"].as_u64() == Some(2));
                    go_on(&mut talks, &sockets);
                    let fresh = lab.connect_many(&to, 20);
                    assert!(!edge::spread(&fresh).contains_key("b2"));
                    end(&mut lab);
                    go_on(&mut talks, &sockets);
                    lab.start();
                    go_on(&mut talks, &sockets);
                    servers.insert("b2".to_owned(), edge::Server::start(&lab.backends["b2"], "b2", 8080));
                    lab.status_when("b2 back", |status| !status["backends"].as_object().unwrap().contains_key("down"));
                    go_on(&mut talks, &sockets);
                }
                let reached = || peak.load(Ordering::Relaxed) >= u64::from(RATE);
                while begun.elapsed() < if reached() { ROUND } else { LONGEST_ROUND } {
                    go_on(&mut talks, &sockets);
                }
            }));
            stop.store(true, Ordering::Relaxed);
            let offered = offering.join().unwrap();
            outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            offered
        });
        println!("port {port}: {offered:?}: {:.0} flows a second", offered.rate());
        // Beside everything else that the machine does the average may be less.
        assert!(offered.peak >= u64::from(RATE), "{offered:?}: never {RATE} in a second");
        assert_eq!(numbers(&lab), before);
        // What was offered did arrive, and was decided on.
        let stats: Value = lab.ask(&["stats", if port == 9 { "sink" } else { "sink-ipip" }, "--over", "0"]);
        assert!(stats["services"][0]["total"]["connections"].as_u64() > Some(offered.sent / 10), "{stats:#}");
    }
    println!("{:#}", lab.ask::<Value>(&["status"])["counters"]);
}

/// Everything that was given to a backend other than b2, which fails, goes on there.
fn go_on(talks: &mut [Talk], sockets: &[(UdpSocket, String)]) {
    for talk in talks.iter_mut().filter(|talk| talk.backend != "b2") {
        talk.goes_on();
    }
    for (socket, backend) in sockets.iter().filter(|(_, backend)| backend != "b2") {
        assert_eq!(ask_datagram(socket).expect("an answer").0, *backend);
    }
}
