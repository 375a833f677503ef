//! The agent keeps services as the cluster's state says: through restarts, beside what others break, when there are ten
//! thousand of them, and when something is wrong with one.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use cirri_abi::{Addr, Backend, BackendState, Port, Service, ServiceKey, ServiceSlot};
use cirri_e2e::lab::{self, Lab, eventually, printed};
use cirri_loader::Tables;
use cirri_store::{Etcd, EtcdOptions, PREFIX, Store};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);
/// Maps that hold what services are made of; a restart must not change them.
const MAPS: [&str; 6] = ["SERVICES", "BACKENDS", "SERVICE_SLOTS", "NODE_PORTS", "SOURCE_RANGES", "EPOCHS"];

const SHOP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: node1, containers: [{name: c, image: none, ports: [{containerPort: 80}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, labels: {app: api}}
spec: {nodeName: node1, containers: [{name: c, image: none, ports: [{containerPort: 80}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  selector: {app: web}
  sessionAffinity: ClientIP
  loadBalancerSourceRanges: [198.51.100.0/24]
  ports: [{name: http, port: 80, nodePort: 30080}]
status: {loadBalancer: {ingress: [{ip: 192.0.2.10}]}}
"#;
const API: &str = r#"
---
apiVersion: v1
kind: Service
metadata:
  name: api
  namespace: shop
  annotations: {service.cilium.io/lb-algorithm: maglev}
spec:
  clusterIP: 10.96.0.11
  selector: {app: api}
  ports: [{name: http, port: 80}]
"#;

#[test]
fn services_outlive_a_restart_and_what_is_broken_or_left_over_is_put_right() {
    let lab = Lab::up("svcrest", 1, &[]).unwrap();
    let all = [SHOP, API].concat();
    lab.apply(&all).unwrap();
    let before = tables(&lab);
    let rows = |map: &str| before.iter().find(|(name, _)| *name == map).map(|(_, rows)| rows.len()).unwrap();
    // Three addresses and ports of one service, one of the other, and three addresses alone.
    assert_eq!(
        (rows("SERVICES"), rows("BACKENDS"), rows("NODE_PORTS"), rows("SOURCE_RANGES")),
        (7, 2, 1, 1),
        "{before:?}"
    );
    lab.restart("node1", &["--kill"]).unwrap();
    assert_eq!(tables(&lab), before, "after a restart");

    lab.kill_agent("node1").unwrap();
    damage(&lab);
    lab.restart("node1", &[]).unwrap();
    let now = tables(&lab);
    for (was, is) in before.iter().zip(&now).filter(|(was, _)| was.0 != "EPOCHS" && was.0 != "SERVICE_SLOTS") {
        assert_eq!(was, is, "after repair");
    }

    // A service that goes while the agent is away.
    lab.kill_agent("node1").unwrap();
    let manifests = lab.list().unwrap().directory.join("nodes/node1/manifests");
    std::fs::remove_file(manifests.join("Service.shop.api.yaml")).unwrap();
    lab.restart("node1", &[]).unwrap();
    let services: Vec<Value> = lab.ask("node1", &["service", "list"]).unwrap();
    assert!(services.iter().all(|service| service["name"] == "web") && services.len() == 1, "{services:?}");
    let left = dump(&lab, "SERVICES");
    assert!(left.len() == 5 && left.iter().all(|row| !row.contains("10.96.0.11")), "{left:?}");
    assert_eq!(dump(&lab, "BACKENDS").len(), 1);
}

/// What a fault could leave: a row changed, a backend emptied, and things that are nobody's.
fn damage(lab: &Lab) {
    let tables = Tables::open(Path::new("/sys/fs/bpf/cirri"), &format!("lab-{}-node1", lab.name())).unwrap();
    let entries = tables.services.entries().unwrap();
    let web = |key: &ServiceKey| key.addr == Addr::v4([10, 96, 0, 10]) && key.port.number() == 80;
    let (key, row) = entries.iter().find(|(key, _)| web(key)).unwrap();
    tables.services.put(key, &Service { inside_count: row.inside_count + 5, affinity: 1, ..*row }).unwrap();
    let lb = entries.iter().find(|(key, _)| key.addr == Addr::v4([192, 0, 2, 10]) && key.proto == 6).unwrap();
    assert!(tables.services.delete(&lb.0).unwrap());
    let stray = ServiceKey { addr: Addr::v4([10, 96, 9, 9]), port: Port::new(99), proto: 6, _pad: 0 };
    tables
        .services
        .put(&stray, &Service { id: 77, inside_first: 5000, inside_count: 1, ..Service::default() })
        .unwrap();
    let backend = Backend { state: BackendState::ACTIVE, service: 77, proto: 6, ..Backend::default() };
    tables.backends.put(&500, &Backend { addr: Addr::v4([10, 1, 1, 1]), port: Port::new(9), ..backend }).unwrap();
    tables.slots.put(&5000, &ServiceSlot { backend: 500 }).unwrap();
    tables.node_ports.put(&3, &u64::MAX).unwrap();
}

#[test]
fn a_node_answers_how_many_local_backends_a_service_has() {
    let lab = Lab::up("svchealth", 2, &[]).unwrap();
    let service = |name: &str, ip: u8, port: u16| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{type: LoadBalancer, \
             clusterIP: 10.96.1.{ip}, externalTrafficPolicy: Local, healthCheckNodePort: {port}, selector: {{app: web}}, \
             ports: [{{port: 80, nodePort: {}}}]}}\n",
            port + 100
        )
    };
    let taken = lab.netns("node:node2").unwrap().run(|| TcpListener::bind("0.0.0.0:32101")).unwrap().unwrap();
    let pods = SHOP.split("---\napiVersion: v1\nkind: Service").next().unwrap();
    let both = [pods, &service("lb", 1, 32100), &service("other", 2, 32101)].concat();
    lab.apply(&both).unwrap();

    let world = lab.netns("world").unwrap();
    let ask = |node: u8, port: u16| {
        let url = format!("http://172.31.255.{node}:{port}/healthz");
        printed(&world, &["curl", "-s", "--max-time", "5", "-w", " %{http_code} %{content_type}", &url])
    };
    let ready = r#"{"service":{"namespace":"shop","name":"lb"},"localEndpoints":1,"serviceProxyHealthy":true}"#;
    let none = ready.replace(":1,", ":0,");
    let answers =
        |node, expected: &str| eventually("the health check answers so", PATIENCE, || ask(node, 32100) == expected);
    answers(11, &format!("{ready} 200 application/json"));
    answers(12, &format!("{none} 503 application/json"));
    let ipv6 = printed(&world, &["curl", "-s", "--max-time", "5", "http://[fd00:c1:ab::11]:32100/"]);
    assert_eq!(ipv6, ready);

    // The port is somebody else's on the second node; that is told, and mended once it is free.
    let check = |lab: &Lab, port: u16| -> Value {
        let status: Value = lab.ask("node2", &["status"]).unwrap();
        let checks = status["services"]["health_checks"].as_array().unwrap().clone();
        checks.into_iter().find(|check| check["port"] == port).unwrap_or(Value::Null)
    };
    assert!(check(&lab, 32101)["error"].as_str().unwrap().contains("in use"), "{}", check(&lab, 32101));
    assert_eq!(check(&lab, 32100)["error"], "");
    drop(taken);
    eventually("a port that is free again answers", PATIENCE, || check(&lab, 32101)["error"] == "");

    // A service that is gone answers no more.
    lab.apply(&[pods, &service("other", 2, 32101)].concat()).unwrap();
    let refused = || world.run(|| std::net::TcpStream::connect("172.31.255.11:32100").is_err()).unwrap();
    eventually("a health check closes with its service", PATIENCE, refused);
}

#[test]
fn a_neighbour_that_is_found_elsewhere_makes_connections_look_for_it_again() {
    let lab = Lab::up("svcneigh", 2, &[]).unwrap();
    let node = lab.netns("node:node1").unwrap();
    let epoch = || -> u64 {
        let rows: Vec<Value> = lab.ask("node1", &["map", "dump", "EPOCHS", "--limit", "0"]).unwrap();
        let of_node = rows.iter().find(|row| row["key"] == "0");
        of_node.and_then(|row| row["value"].as_str()).map_or(0, |value| value.parse().unwrap())
    };
    // An address that nobody has, so that the kernel changes nothing by itself.
    let found = |mac: &str, state: &str| {
        printed(&node, &["ip", "neigh", "replace", "172.31.255.77", "lladdr", mac, "dev", "eth0", "nud", state]);
    };
    let before = epoch();
    found("02:00:00:00:00:01", "reachable");
    found("02:00:00:00:00:01", "stale");
    found("02:00:00:00:00:02", "reachable");
    eventually("the node's epoch moves", PATIENCE, || epoch() > before);
    assert_eq!(epoch(), before + u64::from(cirri_abi::epoch::STEP), "only the change of the address moves it");
}

/// A client that talks to a service once, waits for a line, and talks again, each time over one socket.
const TALK: &str = "exec 3<>/dev/udp/$0/53; printf one >&3; read -r -n 1 -t 5 -u 3 && echo answered; read -r; \
                    printf two >&3 || echo over; read -r -n 1 -t 5 -u 3 && echo answered";

#[test]
fn a_datagram_socket_ends_with_its_backend_and_others_do_not() {
    let lab = Lab::up("svcudp", 2, &[]).unwrap();
    let pod = |name: &str, node: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}\nspec: {{nodeName: \
             {node}, containers: [{{name: c, image: none, ports: [{{containerPort: 53, protocol: UDP}}]}}]}}\n"
        )
    };
    let service = |ip: u8, app: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: dns{ip}, namespace: shop}}\nspec: {{clusterIP: 10.96.0.{ip}, \
             selector: {{app: {app}}}, ports: [{{port: 53, protocol: UDP}}]}}\n"
        )
    };
    let pods = [
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n",
        &pod("client", "node1"),
        &pod("a", "node2"),
        &pod("b", "node2"),
    ]
    .concat();
    lab.apply(&[&pods, &*service(53, "a"), &service(54, "b")].concat()).unwrap();
    let mut talks = ["10.96.0.53", "10.96.0.54"].map(|to| Talk::start(&lab, to));
    for talk in &mut talks {
        assert_eq!(talk.line(), "answered");
    }
    // The first service goes to the other backend, which answers from now on; the second stays.
    lab.apply(&[&pods, &*service(53, "b"), &service(54, "b")].concat()).unwrap();
    let [mut moved, mut stayed] = talks;
    stayed.go_on();
    assert_eq!(stayed.line(), "answered");
    // That happens after the change is in force, beside all else.
    let log = lab.node("node1").unwrap().log;
    let ended =
        || std::fs::read_to_string(&log).unwrap().contains("sockets that were connected to backends that are gone");
    eventually("the agent ends a socket", PATIENCE, ended);
    moved.go_on();
    assert_eq!(moved.line(), "over", "the socket went on to a backend that is gone");
}

/// A client of [`TALK`], in a pod.
struct Talk {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Talk {
    fn start(lab: &Lab, to: &str) -> Talk {
        let mut child = Command::new(lab::binary().unwrap())
            .args(["lab", "exec", "--name", lab.name(), "shop/client", "--", "bash", "-c", TALK, to])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Talk { child, said }
    }

    /// The next line that it says.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line.trim_end().to_string()
    }

    fn go_on(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

#[test]
fn what_is_wrong_with_a_service_is_told_and_the_last_good_state_stays() {
    let lab = Lab::up("svcbad", 1, &["--set", "bpf.maps.backends=4"]).unwrap();
    lab.apply(SHOP).unwrap();
    let problems = |lab: &Lab| -> Vec<String> {
        let status: Value = lab.ask("node1", &["status"]).unwrap();
        serde_json::from_value(status["services"]["problems"].clone()).unwrap()
    };
    assert_eq!(problems(&lab), Vec::<String>::new());
    let good = dump(&lab, "SERVICES");
    let told = |more: &str, words: &[&str]| {
        lab.apply(&[SHOP, more].concat()).unwrap();
        let told = problems(&lab);
        let named = |problem: &&String| words.iter().all(|word| problem.contains(word));
        assert_eq!(told.iter().filter(named).count(), 1, "{words:?} once in {told:?}");
        assert!(good.is_subset(&dump(&lab, "SERVICES")), "the good service stays: {:?}", dump(&lab, "SERVICES"));
    };
    let service = |name: &str, spec: &str| {
        format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n")
    };
    let twice = service("zweite", "{clusterIP: 10.96.0.10, selector: {app: api}, ports: [{port: 80}]}");
    told(&twice, &["shop/web", "shop/zweite", "10.96.0.10"]);
    let node_port =
        "{type: NodePort, clusterIP: 10.96.0.12, selector: {app: api}, ports: [{port: 80, nodePort: 29999}]}";
    told(&service("far", node_port), &["shop/far", "29999", "30000"]);
    let family = "
---
apiVersion: v1
kind: Service
metadata: {name: wrong, namespace: shop, annotations: {service.cilium.io/lb-algorithm: best}}
spec: {clusterIP: 10.96.0.13, ports: [{port: 80}]}
";
    told(family, &["shop/wrong", "best", "maglev"]);
    // More backends than the table has room for.
    let endpoints: String = (1..=9).map(|i| format!("- {{addresses: [10.99.0.{i}]}}\n")).collect();
    let many = format!(
        "{}---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: many-1, namespace: shop, labels: \
         {{kubernetes.io/service-name: many}}}}\naddressType: IPv4\nports: [{{port: 80}}]\nendpoints:\n{endpoints}",
        service("many", "{clusterIP: 10.96.0.14, ports: [{port: 80}]}")
    );
    told(&many, &["shop/many", "9", "backends"]);
    let shown: Vec<Value> = lab.ask("node1", &["service", "get", "shop/many"]).unwrap();
    assert!(shown[0]["state"].as_str().unwrap().starts_with("error: "), "{shown:?}");
    // Gone with their cause.
    lab.apply(SHOP).unwrap();
    assert_eq!((problems(&lab), dump(&lab, "SERVICES")), (Vec::new(), good));
}

/// Services of the load, and backends of each.
const SERVICES: usize = 10_000;
const BACKENDS: usize = 10;
/// Changes of one service while all stand.
const CHANGES: usize = 200;

#[test]
fn ten_thousand_services_are_applied_and_one_change_costs_the_agent_hardly_anything_of_that() {
    let lab = Lab::up("svcload", 2, &[]).unwrap();
    let empty = figures(&lab);
    let resources = (0..SERVICES).flat_map(|n| [service(n), slice(n, 0)]);
    let entries: Vec<(String, Vec<u8>)> = resources.map(|(key, json)| (key, json.into_bytes())).collect();
    let begun = Instant::now();
    let revision = in_store(&lab, async |store| {
        for chunk in entries.chunks(100) {
            let chunk: Vec<(&str, &[u8])> = chunk.iter().map(|(key, json)| (key.as_str(), json.as_slice())).collect();
            store.put_all(&chunk).await.unwrap();
        }
        store.health().await.unwrap().revision
    });
    let written = begun.elapsed();
    wait_on(&lab, "node1", revision);
    let applied = begun.elapsed();
    wait_on(&lab, "node2", revision);
    let full = figures(&lab);
    println!("{SERVICES} services x {BACKENDS} backends: in etcd after {written:?}, in force after {applied:?}");
    let all = full.processor - empty.processor;
    println!("the agent took {all:?} of a processor for it");
    println!(
        "memory of the agent {} -> {} KiB, of its maps {} -> {} KiB",
        empty.agent, full.agent, empty.maps, full.maps
    );
    assert_eq!(full.ready as usize, SERVICES * BACKENDS);

    let (mut whole, mut agent) = (Vec::new(), Vec::new());
    let revision = in_store(&lab, async |store| {
        let mut revision = 0;
        for change in 0..CHANGES {
            let (key, json) = slice(change * 7 % SERVICES, change % 2 + 1);
            let begun = Instant::now();
            revision = store.put(&key, json.as_bytes(), false).await.unwrap();
            wait_on(&lab, "node1", revision);
            whole.push(begun.elapsed());
            let status: Value = lab.ask("node1", &["status"]).unwrap();
            agent.push(Duration::from_micros(status["latency"]["last_us"].as_u64().unwrap()));
        }
        revision
    });
    let percentile = |took: &mut Vec<Duration>, percent: usize| {
        took.sort_unstable();
        took[(took.len() - 1) * percent / 100]
    };
    println!(
        "one change, from before its write to etcd: p50 {:?}, p99 {:?}",
        percentile(&mut whole, 50),
        percentile(&mut whole, 99)
    );
    let p99 = percentile(&mut agent, 99);
    println!("one change, from seen to in force: p50 {:?}, p99 {p99:?}", percentile(&mut agent, 50));
    // How long it took when nobody was in its way; a look at every service would be a good part of all.
    let one = agent[0];
    assert!(one * 1000 < all, "{one:?} of {all:?}");

    let before = tables(&lab);
    let begun = Instant::now();
    lab.restart("node1", &["--kill"]).unwrap();
    wait_on(&lab, "node1", revision);
    println!("restart of the agent with all of them: {:?}", begun.elapsed());
    assert!(tables(&lab) == before, "a restart changes no row and moves no epoch");
}

/// What an agent and its maps take.
struct Figures {
    /// Resident, KiB.
    agent: u64,
    /// Of the kernel, KiB.
    maps: u64,
    /// Time of the agent.
    processor: Duration,
    /// Backends that may be given connections.
    ready: u64,
}

fn figures(lab: &Lab) -> Figures {
    let status: Value = lab.ask("node1", &["status"]).unwrap();
    let maps: Vec<Value> = lab.ask("node1", &["map", "list"]).unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", status["pid"])).unwrap();
    // Behind the name, which may hold blanks: the 12th and 13th are user and system time, in hundredths.
    let behind = stat.rsplit(") ").next().unwrap().split(' ').skip(11);
    let ticks: u64 = behind.take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    Figures {
        agent: status["memory_bytes"].as_u64().unwrap() >> 10,
        maps: maps.iter().map(|map| map["memory_bytes"].as_u64().unwrap()).sum::<u64>() >> 10,
        processor: Duration::from_millis(ticks * 10),
        ready: status["services"]["ready"].as_u64().unwrap(),
    }
}

/// A service, as the store has it.
fn service(n: usize) -> (String, String) {
    let json = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s{n}"), "namespace": "load"},
        "spec": {"clusterIP": format!("10.{}.{}.{}", 100 + n / 65_536, n / 256 % 256, n % 256), "ports": [{"name": "http", "port": 80}]}
    });
    (format!("{PREFIX}resources/Service/load/s{n}"), json.to_string())
}

/// Its backends; the first one's address says which version this is.
fn slice(n: usize, version: usize) -> (String, String) {
    let address = |i: usize| {
        let host = if i == 0 { 200 + version } else { i };
        format!("10.{}.{}.{host}", 200 + n / 256, n % 256)
    };
    let endpoints: Vec<Value> =
        (0..BACKENDS).map(|i| json!({"addresses": [address(i)], "conditions": {"ready": true}})).collect();
    let json = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("s{n}-1"), "namespace": "load", "labels": {"kubernetes.io/service-name": format!("s{n}")}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints
    });
    (format!("{PREFIX}resources/EndpointSlice/load/s{n}-1"), json.to_string())
}

/// Works with the lab's etcd, which answers inside the lab's network alone.
fn in_store<T: Send>(lab: &Lab, work: impl AsyncFnOnce(&Etcd) -> T + Send) -> T {
    let inside = cirri_loader::net::Namespace::open(lab.list().unwrap().net).unwrap();
    let done = inside.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { work(&Etcd::new(&EtcdOptions::new(["http://172.31.255.1:2379"])).unwrap()).await })
    });
    done.unwrap()
}

/// Waits until a node enforces a revision.
fn wait_on(lab: &Lab, node: &str, revision: u64) {
    let mut socket = UnixStream::connect(lab.socket(node)).unwrap();
    let question = json!({"method": "wait", "params": {"revision": revision, "timeout_ms": 120_000}});
    socket.write_all(format!("{question}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(socket).read_line(&mut answer).unwrap();
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert!(answer["result"]["enforced_revision"].as_u64() >= Some(revision), "{answer}");
}

fn tables(lab: &Lab) -> Vec<(&'static str, BTreeSet<String>)> {
    MAPS.iter().map(|map| (*map, dump(lab, map))).collect()
}

fn dump(lab: &Lab, map: &str) -> BTreeSet<String> {
    let rows: Vec<Value> = lab.ask("node1", &["map", "dump", map, "--limit", "0"]).unwrap();
    rows.iter().map(Value::to_string).collect()
}
