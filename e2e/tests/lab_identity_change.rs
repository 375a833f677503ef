//! Datagrams at a steady rate while identities change: a label of the pod or of its namespace, a policy that
//! names a label for the first time, many policies at once; with every agent up, and with the receiver's away.
//! None is lost of those that stay allowed, and none passes that is not any more.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cirri_e2e::lab::{Conversation, Lab, QUIET, eventually};
use cirri_store::{Etcd, EtcdOptions, PREFIX, Store};
use serde_json::Value;

/// `client` and `server` on two nodes; `server` lets in pods of `app: client` from namespaces of `team: web`, and
/// `tier` is a label that a policy names.
fn pods(namespace_labels: &str, client_labels: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Namespace
metadata: {{name: shop, labels: {{team: web{namespace_labels}}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: client, namespace: shop, labels: {{app: client{client_labels}}}}}
spec: {{nodeName: node1, containers: [{{name: c, image: none}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: server, namespace: shop, labels: {{app: server, zone: here}}}}
spec: {{nodeName: node2, containers: [{{name: c, image: none}}]}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: server, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: server}}}}
  policyTypes: [Ingress, Egress]
  ingress: [{{from: [{{podSelector: {{matchLabels: {{app: client}}}}, namespaceSelector: {{matchLabels: {{team: web}}}}}}]}}]
  egress: [{{to: [{{podSelector: {{matchLabels: {{app: client}}}}}}]}}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: tiers, namespace: shop}}
spec: {{podSelector: {{matchLabels: {{tier: nobody}}}}, policyTypes: [Ingress]}}
"#
    )
}

/// Names a label that no policy named before.
const NAMES_ZONE: &str = "
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: zones, namespace: shop}
spec: {podSelector: {matchLabels: {zone: nowhere}}, policyTypes: [Ingress]}
";

/// Policies of others, with blocks that hold the pods' addresses.
fn fifty() -> String {
    let policy = |number: usize| {
        format!(
            "
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: other-{number}, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: other-{number}}}}}
  ingress: [{{from: [{{ipBlock: {{cidr: 10.{}.0.0/16}}}}, {{ipBlock: {{cidr: 10.244.0.0/{}}}}}]}}]
",
            number + 1,
            16 + number % 8
        )
    };
    (0..50).map(policy).collect()
}

#[test]
fn no_datagram_is_lost_when_identities_and_policies_change_with_the_overlay() {
    nothing_is_lost("idc_over", &[]);
}

#[test]
fn no_datagram_is_lost_when_identities_and_policies_change_with_direct_routing() {
    nothing_is_lost("idc_dir", &["--routing", "direct"]);
}

fn nothing_is_lost(name: &str, more: &[&str]) {
    let lab = Lab::up(name, 2, more).unwrap();
    lab.apply(&pods("", ", tier: a")).unwrap();
    let flows = Flow::both_ways(&lab);
    let zones = [&pods(", extra: x", ", tier: b"), NAMES_ZONE].concat();
    let steps = [
        pods(", extra: x", ", tier: a"),
        pods(", extra: x", ", tier: b"),
        zones.clone(),
        [&zones, fifty().as_str()].concat(),
        zones,
        pods("", ", tier: a"),
    ];
    let identity = || identity_of_client(&lab);
    let first = identity();
    let mut identities = BTreeSet::from([first]);
    for step in &steps {
        lab.apply(step).unwrap();
        identities.insert(identity());
    }
    assert!(identities.len() >= 3, "the client's identity did not change: {identities:?}");
    assert_eq!(identity(), first, "the first labels have the first identity");
    for flow in &flows {
        flow.await_sent(DATAGRAMS);
    }
    flows.into_iter().for_each(Flow::finish);
}

#[test]
fn new_connections_pass_whatever_identity_their_sender_gets() {
    // As long as it may be: the new identity is used when node2 says that it knows it, and not before.
    let lab = Lab::up("idc_new", 2, &["--set", "cluster.identityGraceSeconds=300"]).unwrap();
    lab.apply(&pods("", ", tier: a")).unwrap();
    let newcomers = Newcomers::of_both_families(&lab);
    let becomes = |tier: &str| {
        let before = identity_of_client(&lab);
        relabel_client(&lab, &format!(r#""app":"client","tier":"{tier}""#));
        eventually("the client has another identity", PATIENCE, || identity_of_client(&lab) != before);
    };
    for tier in ["b", "c", "d"] {
        becomes(tier);
        eventually("the new identity is used", PATIENCE, || is_announced(&lab));
        newcomers.iter().for_each(Newcomers::await_more);
    }
    lab.kill_agent("node2").unwrap();
    becomes("e");
    newcomers.iter().for_each(Newcomers::await_more);
    let told = tunnel_identity_of_client(&lab);
    newcomers.into_iter().for_each(Newcomers::finish);
    assert_ne!(told, 0, "node2 cannot have said that it knows the new identity");
}

#[test]
fn an_identity_that_changes_while_another_nodes_agent_is_away_cuts_no_connection() {
    let lab = Lab::up("idc_away", 2, &[]).unwrap();
    lab.apply(&pods("", ", tier: a")).unwrap();
    let addresses = lab.addresses().unwrap();
    let mut conversations: Vec<Conversation> = addresses["shop/server"]
        .iter()
        .map(|address| Conversation::open(&lab, "shop/client", "shop/server", *address).unwrap())
        .collect();
    conversations.iter_mut().for_each(Conversation::exchange);
    let flows = Flow::both_ways(&lab);
    let before = identity_of_client(&lab);

    lab.kill_agent("node2").unwrap();
    relabel_client(&lab, r#""app":"client","tier":"b""#);
    eventually("the client has another identity", Duration::from_secs(60), || identity_of_client(&lab) != before);
    // Beyond the time that the old one may be used.
    eventually("the new identity is used", PATIENCE, || is_announced(&lab));
    let sent = flows[0].sent.load(Ordering::Relaxed);
    flows[0].await_sent(sent + 3000);
    conversations.iter_mut().for_each(Conversation::exchange);

    lab.restart("node2", &[]).unwrap();
    lab.apply(&pods("", ", tier: b")).unwrap();
    conversations.iter_mut().for_each(Conversation::exchange);
    flows.into_iter().for_each(Flow::finish);
}

#[test]
fn an_identity_that_is_not_allowed_any_more_is_stopped_once_the_other_node_knows_it() {
    let lab = Lab::up("idc_deny", 2, &[]).unwrap();
    lab.apply(&pods("", "")).unwrap();
    let addresses = lab.addresses().unwrap();
    let open = || -> Vec<Conversation> {
        let each = addresses["shop/server"].iter();
        each.map(|address| Conversation::open(&lab, "shop/client", "shop/server", *address).unwrap()).collect()
    };
    // With every agent up: as soon as `apply` says that it is enforced.
    let denied = pods("", "").replace("labels: {app: client}", "labels: {app: stranger}");
    let mut conversations = open();
    conversations.iter_mut().for_each(Conversation::exchange);
    lab.apply(&denied).unwrap();
    for conversation in &mut conversations {
        assert!(!conversation.there(QUIET).unwrap(), "{} still passes", conversation.from);
    }
    lab.apply(&pods("", "")).unwrap();

    // With the receiver's agent away: no new connection by then, and no old one once it is back.
    let mut conversations = open();
    conversations.iter_mut().for_each(Conversation::exchange);
    let before = identity_of_client(&lab);
    lab.kill_agent("node2").unwrap();
    relabel_client(&lab, r#""app":"outcast""#);
    // Its labels are there before their number.
    eventually("the new identity is used", PATIENCE, || identity_of_client(&lab) != before && is_announced(&lab));
    for address in &addresses["shop/server"] {
        let opened = Conversation::open(&lab, "shop/client", "shop/server", *address);
        assert!(opened.is_err(), "an identity that node2 does not know opens a connection");
    }
    lab.restart("node2", &[]).unwrap();
    lab.apply(&denied.replace("stranger", "outcast")).unwrap();
    for conversation in &mut conversations {
        assert!(!conversation.there(QUIET).unwrap(), "{} still passes", conversation.from);
    }
}

#[test]
fn what_is_closed_stays_closed_while_its_workload_goes_from_one_closed_rule_set_to_another() {
    let lab = Lab::up("idc_closed", 2, &[]).unwrap();
    lab.apply(&pods("", "")).unwrap();
    let flows = Flow::both_ways(&lab);
    flows[0].await_sent(1000);
    let open = "ingress: [{from: [{podSelector: {matchLabels: {app: client}}, namespaceSelector: {matchLabels: {team: web}}}]}]";
    let as_server = pods("", "").replace(open, &format!("ingress: [{{from: [{}]}}]", blocks(1000, "203")));
    let as_moved = as_server.replace("app: server, zone", "app: moved, zone");
    assert!(as_server != pods("", "") && as_moved != as_server);
    let moved = format!(
        "
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: moved, namespace: shop}}
spec: {{podSelector: {{matchLabels: {{app: moved}}}}, ingress: [{{from: [{}]}}]}}
",
        blocks(1000, "204")
    );
    lab.apply(&[&as_server, moved.as_str()].concat()).unwrap();
    let closed: Vec<u64> = flows.iter().map(|flow| flow.sent.load(Ordering::Relaxed)).collect();
    for round in 0..20 {
        let server = if round % 2 == 0 { &as_moved } else { &as_server };
        // The blocks come and go with the rounds, so that addresses and rule sets are written together.
        let policy = moved.replace("cidr: 204", if round % 3 == 0 { "cidr: 205" } else { "cidr: 204" });
        lab.apply(&[server.as_str(), policy.as_str()].concat()).unwrap();
    }
    for (flow, since) in flows.into_iter().zip(closed) {
        flow.finish_closed(since);
    }
}

/// That many networks to allow.
fn blocks(count: usize, first: &str) -> String {
    let each =
        (0..count).map(|number| format!("{{ipBlock: {{cidr: {first}.{}.{}.0/24}}}}", number / 250, number % 250));
    each.collect::<Vec<_>>().join(", ")
}

/// Gives the client other labels while an agent is away: `lab apply` would ask for that first.
fn relabel_client(lab: &Lab, labels: &str) {
    let json = format!(
        r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"client","namespace":"shop","labels":{{{labels}}}}},"spec":{{"nodeName":"node1","containers":[{{"name":"c","image":"none"}}]}}}}"#
    );
    let inside = cirri_loader::net::Namespace::open(lab.list().unwrap().net).unwrap();
    let written = inside.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = Etcd::new(&EtcdOptions::new(["http://172.31.255.1:2379"])).unwrap();
            store.put(&format!("{PREFIX}resources/Pod/shop/client"), json.as_bytes(), false).await
        })
    });
    written.unwrap().unwrap();
}

/// What node1 says of the client.
fn client(lab: &Lab) -> Value {
    let endpoints: Value = lab.ask("node1", &["endpoint", "list"]).unwrap();
    let all = endpoints.as_array().cloned().unwrap_or_default();
    all.into_iter().find(|endpoint| endpoint["pod"] == "client").unwrap_or_else(|| panic!("no client in {endpoints}"))
}

fn identity_of_client(lab: &Lab) -> u64 {
    client(lab)["identity"].as_u64().unwrap()
}

/// The identity that other nodes are told instead; 0 for none.
fn tunnel_identity_of_client(lab: &Lab) -> u64 {
    client(lab)["tunnel_identity"].as_u64().unwrap()
}

/// Whether the client's packets carry the identity that it has, and not the former one.
fn is_announced(lab: &Lab) -> bool {
    let client = client(lab);
    client["tunnel_identity"] == 0 && client["state"] == "done"
}

/// Datagrams of each direction of each family that a run lasts at the least.
const DATAGRAMS: u64 = 24_001;
const EVERY: Duration = Duration::from_millis(1);
/// Room for what the receiver has not read yet.
const BUFFER: usize = 64 * 1024 * 1024;

/// How long an event may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Connections of one datagram each from the client to the server, one after the other.
struct Newcomers {
    passed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Newcomers {
    fn of_both_families(lab: &Lab) -> Vec<Newcomers> {
        lab.addresses().unwrap()["shop/server"].iter().map(|address| Newcomers::start(lab, *address)).collect()
    }

    fn start(lab: &Lab, address: IpAddr) -> Newcomers {
        let any = any_like(address);
        let server = lab.netns("shop/server").unwrap().run(|| UdpSocket::bind(any)).unwrap().unwrap();
        server.set_read_timeout(Some(PATIENCE / 4)).unwrap();
        let to = SocketAddr::new(address, server.local_addr().unwrap().port());
        let client = lab.netns("shop/client").unwrap();
        let (passed, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let run = {
            let (passed, stop) = (Arc::clone(&passed), Arc::clone(&stop));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let socket = client.run(|| UdpSocket::bind(any)).unwrap().unwrap();
                    socket.send_to(&[1], to).unwrap();
                    let number = passed.load(Ordering::Relaxed);
                    let arrived = server.recv_from(&mut [0]);
                    let (_, from) = arrived.unwrap_or_else(|error| panic!("connection {number} to {to}: {error}"));
                    assert_eq!(from.port(), socket.local_addr().unwrap().port());
                    passed.store(number + 1, Ordering::Relaxed);
                    std::thread::sleep(EVERY);
                }
            }
        };
        Newcomers { passed, stop, thread: std::thread::spawn(run) }
    }

    /// Waits until so many more have passed that some of them began after this call, or until one has not passed.
    fn await_more(&self) {
        let before = self.passed.load(Ordering::Relaxed);
        eventually("new connections pass", PATIENCE, || {
            self.thread.is_finished() || self.passed.load(Ordering::Relaxed) > before + 100
        });
    }

    /// Ends them; panics if one did not pass.
    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
}

/// Any address of the same family, and any port.
fn any_like(address: IpAddr) -> SocketAddr {
    if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap()
}

/// Numbered datagrams from one pod to another, each answered.
struct Flow {
    name: String,
    sent: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    arrived: Arc<Mutex<BTreeSet<u64>>>,
    answered: Arc<Mutex<BTreeSet<u64>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Flow {
    /// From the client to the server and the other way round, in both families.
    fn both_ways(lab: &Lab) -> Vec<Flow> {
        let addresses = lab.addresses().unwrap();
        let to_server = addresses["shop/server"].iter().map(|to| Flow::start(lab, "shop/client", "shop/server", *to));
        to_server.collect()
    }

    fn start(lab: &Lab, from: &str, to: &str, address: IpAddr) -> Flow {
        let any = any_like(address);
        let bind = |pod: &str| {
            let socket = lab.netns(pod).unwrap().run(|| UdpSocket::bind(any)).unwrap().unwrap();
            socket2::SockRef::from(&socket).set_recv_buffer_size(BUFFER).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            socket
        };
        let (client, server) = (bind(from), bind(to));
        client.connect((address, server.local_addr().unwrap().port())).unwrap();
        let (sent, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (arrived, answered) = (Arc::default(), Arc::default());
        let mut flow =
            Flow { name: format!("{from} -> {to} ({address})"), sent, stop, arrived, answered, threads: vec![] };
        let reader = client.try_clone().unwrap();
        flow.spawn({
            let (sent, stop) = (Arc::clone(&flow.sent), Arc::clone(&flow.stop));
            move || {
                let begun = Instant::now();
                let mut number = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    client.send(&number.to_be_bytes()).unwrap();
                    number += 1;
                    sent.store(number, Ordering::Relaxed);
                    let next = begun + EVERY * u32::try_from(number).unwrap();
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
            }
        });
        flow.spawn({
            let (arrived, stop) = (Arc::clone(&flow.arrived), Arc::clone(&flow.stop));
            move || {
                let mut buffer = [0; 8];
                // After its end too: the last are on their way, and their answers.
                let mut silent = 0;
                while silent < 20 || !stop.load(Ordering::Relaxed) {
                    match server.recv_from(&mut buffer) {
                        Ok((_, from)) => {
                            arrived.lock().unwrap().insert(u64::from_be_bytes(buffer));
                            server.send_to(&buffer, from).unwrap();
                            silent = 0;
                        }
                        Err(_) => silent += 1,
                    }
                }
            }
        });
        flow.spawn({
            let (answered, stop) = (Arc::clone(&flow.answered), Arc::clone(&flow.stop));
            move || {
                let mut buffer = [0; 8];
                let mut silent = 0;
                while silent < 30 || !stop.load(Ordering::Relaxed) {
                    match reader.recv(&mut buffer) {
                        Ok(_) => {
                            answered.lock().unwrap().insert(u64::from_be_bytes(buffer));
                            silent = 0;
                        }
                        Err(_) => silent += 1,
                    }
                }
            }
        });
        flow
    }

    fn spawn(&mut self, run: impl FnOnce() + Send + 'static) {
        self.threads.push(std::thread::spawn(run));
    }

    fn await_sent(&self, count: u64) {
        eventually(&format!("{count} datagrams are sent"), Duration::from_secs(600), || {
            self.sent.load(Ordering::Relaxed) >= count
        });
    }

    /// Ends it; panics if one arrived that was sent since it is closed.
    fn finish_closed(self, since: u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        let arrived = self.arrived.lock().unwrap();
        let passed: Vec<&u64> = arrived.range(since..).collect();
        let sent = self.sent.load(Ordering::Relaxed);
        cirri_e2e::say(format_args!("{}: {} of {} passed", self.name, passed.len(), sent - since));
        assert!(since > 1000 && sent > since, "{}: closed at {since} of {sent}", self.name);
        assert!(passed.is_empty(), "{}: {passed:?} passed since {since}", self.name);
    }

    /// Ends it; panics if one was lost.
    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        let sent = self.sent.load(Ordering::Relaxed);
        let lost = |all: &Mutex<BTreeSet<u64>>| -> Vec<u64> {
            let all = all.lock().unwrap();
            (0..sent).filter(|number| !all.contains(number)).collect()
        };
        let (there, back) = (lost(&self.arrived), lost(&self.answered));
        cirri_e2e::say(format_args!(
            "{}: {sent} datagrams, {} lost, {} unanswered",
            self.name,
            there.len(),
            back.len()
        ));
        assert!(there.is_empty() && back.is_empty(), "{}: lost {there:?}, unanswered {back:?} of {sent}", self.name);
    }
}
