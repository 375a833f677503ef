use super::*;

const GOOD: &str = r#"
devices: [eth0]
pools:
  - {name: wide, address: 198.51.100.7, ports: 32768-65535}
defaults:
  health: {type: tcp, interval: 500ms, timeout: 0.2}
services:
  - name: web
    address: 203.0.113.10
    port: 80
    pool: wide
    backends:
      - {name: web-1, address: 10.1.0.11, port: 8080}
      - {address: 10.1.0.12, port: 8080, weight: 3}
  - name: dns
    address: 203.0.113.10
    port: 53
    protocol: UDP
    algorithm: random
    forwarding: dsr-ipip
    affinity: 60
    sourceRanges: [192.0.2.0/24]
    backends: [{address: 10.1.0.13}]
    health: {type: http, port: 8080, path: /healthy, expect: 200, interval: 2, rise: 1, fall: 2}
  - name: six
    address: 2001:db8::80
    port: 443
    maglevSize: 16381
    backends: [{address: "fd00::1", weight: 0}]
"#;

fn parse(text: &str) -> Result<Plan, String> {
    Plan::parse(Path::new("lb.yaml"), text).map_err(|error| error.to_string())
}

#[test]
fn a_file_is_filled_in_with_defaults() {
    let plan = parse(GOOD).unwrap();
    let [web, dns, six] = &plan.services[..] else { panic!("{plan:?}") };
    assert_eq!(plan.acceleration, Acceleration::BestEffort);
    assert_eq!(
        (web.algorithm, web.forwarding, web.pool.as_deref()),
        (Algorithm::Maglev, ForwardingName::Snat, Some("wide"))
    );
    assert_eq!(web.backends[1].name, "10.1.0.12:8080");
    let health = web.health.as_ref().unwrap();
    assert_eq!((health.interval, health.timeout), (Duration::from_millis(500), Duration::from_millis(200)));
    assert_eq!(dns.backends[0].port, 53);
    let health = dns.health.as_ref().unwrap();
    let expect = CodeRange { first: 200, last: 200 };
    assert_eq!(health.probe, Probe::Http { path: "/healthy".into(), host: None, expect });
    assert_eq!((six.maglev_size, six.to_string().as_str()), (Some(16_381), "[2001:db8::80]:443/TCP"));
    assert_eq!(web.id().to_string(), "lb/web:80/TCP (IPv4)");
}

#[test]
fn what_aliases_stand_for_is_bounded_by_the_size_of_the_file() {
    let name = "x".repeat(10_000);
    let text = format!("log: &a {name}\ndevices: [{}]\n", vec!["*a"; 3_000].join(","));
    let error = parse(&text).map(drop).unwrap_err();
    assert!(error.starts_with("lb.yaml:2:") && error.ends_with(&limit("bytes of text", &text)), "{error}");
}

/// It is asked of files that are wrong otherwise, so that types bound nothing.
#[test]
fn what_aliases_stand_for_is_bounded_where_only_the_state_directory_is_asked_for() {
    let mut text = format!("a0: &a0 [{}]\n", vec!["1"; 4_000].join(","));
    for level in 1..=2 {
        text += &format!("a{level}: &a{level} [{}]\n", vec![format!("*a{}", level - 1); 1_000].join(","));
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &text).unwrap();
    let error = Plan::state_dir_of(file.path()).unwrap_err().to_string();
    assert!(error.ends_with(&limit("values", &text)), "{error}");
}

/// How the refusal of a text ends that has too much of something.
fn limit(what: &str, text: &str) -> String {
    format!("{what} with its aliases, the limit for a document of {} bytes", text.len())
}

/// Every error names the place and what is wrong there.
#[test]
fn bad_input_gives_one_clear_error() {
    let with = |from: &str, to: &str| {
        assert!(GOOD.contains(from), "{from}");
        GOOD.replace(from, to)
    };
    let same_frontend = with("port: 53\n    protocol: UDP", "port: 80").replace("port: 8080, path", "path");
    let cases: Vec<(String, &[&str])> = vec![
        (same_frontend, &["lb.yaml:15:", "service dns", "203.0.113.10:80/TCP", "service web", "line 8"]),
        (with("port: 80\n", "port: 70000\n"), &["lb.yaml:10:", "70000", "1 to 65535"]),
        (with("port: 80\n", "port: 0\n"), &["lb.yaml:10:", "port 0", "1 to 65535"]),
        (with("algorithm: random", "algorithm: magic"), &["lb.yaml:19:", "magic", "maglev"]),
        (with("address: 10.1.0.11", "address: \"fd00::5\""), &["lb.yaml:13:", "web-1", "fd00::5", "another family"]),
        (with("{address: 10.1.0.13}", "{address: 10.1.0.13, port: 5353}"), &["lb.yaml:23:", "5353", "53", "dsr-ipip"]),
        (with("name: dns", "name: web"), &["lb.yaml:15:", "service web", "line 8", "rename"]),
        (with("10.1.0.12, port: 8080", "10.1.0.11, port: 8080"), &["lb.yaml:14:", "10.1.0.11:8080", "web-1"]),
        (with("{address: 10.1.0.12,", "{name: web-1, address: 10.1.0.12,"), &["lb.yaml:14:", "of this name"]),
        (with("maglevSize: 16381", "maglevSize: 1000"), &["service six", "1000", "16381"]),
        (with("pool: wide", "pool: narrow"), &["service web", "no pool narrow", "wide"]),
        (with("10.1.0.13", "203.0.113.10"), &["service dns", "203.0.113.10", "is the address of service"]),
        (with("port: 8080, path", "path"), &["service dns", "health", "UDP", "health.port"]),
        (with("192.0.2.0/24", "2001:db8::/64"), &["service dns", "sourceRanges"]),
        (with("devices: [eth0]", "devices: []"), &["lb.yaml", "devices is empty"]),
        (with("devices: [eth0]", "device: [eth0]"), &["lb.yaml:2:", "device"]),
        (with("affinity: 60", "affinity: 90000"), &["service dns", "affinity", "86400"]),
        (with("weight: 3", "weight: 300"), &["300", "256"]),
        (with("port: 443\n", "port: 443\n    protocol: SCTP\n"), &["service six", "SCTP", "dsr-ipip"]),
        (with("rise: 1", "rise: 0"), &["rise", "1 to 100"]),
        (with("2001:db8::80", "::ffff:1.2.3.4"), &["service six", "IPv4 address in IPv6 form"]),
        (with("203.0.113.10\n    port: 80", "198.51.100.7\n    port: 80"), &["service web", "pool wide"]),
        (
            with("devices: [eth0]", "devices: [eth0]\nbpf: {maps: {slots: 20000}}"),
            &["3 services", "20000", "maglevSize"],
        ),
        (with("devices: [eth0]", "devices: [eth0]\nbpf: {maps: {backends: 4}}"), &["4 backends", "bpf.maps.backends"]),
        (with("devices: [eth0]", "devices: [eth0]\nbpf: {maps: {services: 4}}"), &["5 rows", "bpf.maps.services"]),
    ];
    for (text, wanted) in cases {
        let error = parse(&text).unwrap_err();
        assert!(!error.contains('\n'), "{error}");
        for part in wanted {
            assert!(error.contains(part), "no {part:?} in: {error}");
        }
    }
}

#[test]
fn times_and_codes_are_written_in_several_ways() {
    let health = |text: &str| parse(&GOOD.replace("interval: 2, rise", text));
    for (text, millis) in
        [("interval: 1m, rise", 60_000), ("interval: 1.5s, rise", 1500), ("interval: 250ms, rise", 250)]
    {
        let plan = health(text).unwrap();
        assert_eq!(plan.services[1].health.as_ref().unwrap().interval, Duration::from_millis(millis));
    }
    for text in ["interval: soon, rise", "interval: -1, rise", "interval: 1h, rise"] {
        let error = health(text).unwrap_err();
        assert!(error.contains("no time") && error.contains("lb.yaml:24:"), "{error}");
    }
    let error = parse(&GOOD.replace("expect: 200", "expect: 399-200")).unwrap_err();
    assert!(error.contains("399-200"), "{error}");
}
