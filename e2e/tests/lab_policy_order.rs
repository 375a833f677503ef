//! Rule sets that change together: one that opens a sender and one that closes its receiver, with many others between.
//! No new connection passes that neither state allows, none is refused that both allow, and none is cut.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use cirri_e2e::lab::{Lab, eventually};
use cirri_loader::net::Namespace;
use serde_json::json;

/// How long an event may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Workloads whose rule sets change with each state, and stand between the sender's and the receiver's.
const OTHERS: usize = 24;
const ROUNDS: usize = 12;
/// How long nothing may come until nothing is on its way.
const QUIET: Duration = Duration::from_millis(200);

fn pods() -> String {
    let others = (0..OTHERS).map(|number| format!("other-{number}"));
    let names = ["sender", "friend"].map(str::to_owned).into_iter().chain(others).chain(["receiver".to_owned()]);
    let pod = |name: String| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}\n\
             spec: {{nodeName: node1, containers: [{{name: c, image: none}}]}}\n"
        )
    };
    names.map(pod).collect()
}

/// A policy that allows an app to talk to others, or others to talk to it, on some ports.
fn policy(app: &str, direction: &str, others: &[&str], ports: &str) -> String {
    let (kind, side) = if direction == "Ingress" { ("ingress", "from") } else { ("egress", "to") };
    let peers = others.iter().map(|other| format!("{{podSelector: {{matchLabels: {{app: {other}}}}}}}"));
    let peers = peers.collect::<Vec<_>>().join(", ");
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {{name: {app}-{kind}, namespace: shop}}\n\
         spec: {{podSelector: {{matchLabels: {{app: {app}}}}}, policyTypes: [{direction}], \
         {kind}: [{{{side}: [{peers}]{ports}}}]}}\n"
    )
}

/// Neither state allows the sender to reach the receiver: one stops it where it leaves, the other where it arrives. Each
/// allows the friend to, and each allows something at both ends that the other does not.
fn state(number: usize) -> String {
    let ends = match number % 2 {
        0 => [policy("sender", "Egress", &["other-0"], ""), policy("receiver", "Ingress", &["friend", "sender"], "")],
        _ => [policy("sender", "Egress", &["receiver"], ""), policy("receiver", "Ingress", &["friend", "other-0"], "")],
    };
    let ports = format!(", ports: [{{protocol: TCP, port: {}}}]", 1000 + number);
    let others = (0..OTHERS).map(|other| policy(&format!("other-{other}"), "Egress", &["friend"], &ports));
    ends.into_iter().chain(others).collect()
}

#[test]
fn no_connection_passes_that_is_refused_before_and_after_a_change_of_both_its_ends() {
    let lab = Lab::up("order", 1, &[]).unwrap();
    lab.apply(&pods()).unwrap();
    enforce(&lab, &state(0));
    let address = lab.addresses().unwrap()["shop/receiver"][0];
    let receiver = lab.netns("shop/receiver").unwrap();
    let attack = Newcomers::start(&lab, "shop/sender", &receiver, address);
    let allowed = Newcomers::start(&lab, "shop/friend", &receiver, address);
    allowed.await_more();
    for round in 1..=ROUNDS {
        let before = attack.passed();
        enforce(&lab, &state(round));
        assert_eq!(attack.passed() - before, 0, "connections passed that no state allows, in round {round}");
        allowed.await_more();
    }
    // The attack was one: where nobody stops it, it passes.
    let open =
        policy("sender", "Egress", &["receiver"], "") + &policy("receiver", "Ingress", &["sender", "friend"], "");
    enforce(&lab, &open);
    eventually("the sender's connections pass", PATIENCE, || attack.passed() > 0);
    let (sent, passed) = allowed.finish();
    assert_eq!(sent, passed, "connections were refused that every state allows");
    attack.finish();
}

#[test]
fn an_established_connection_that_every_state_allows_goes_on_while_rule_sets_and_address_blocks_change() {
    let lab = Lab::up("order_blocks", 1, &[]).unwrap();
    lab.apply(&pods()).unwrap();
    let [friend, address] = ["shop/friend", "shop/receiver"].map(|pod| lab.addresses().unwrap()[pod][0]);
    // The friend is allowed by its address, which is in a block of its own in every second state.
    let block =
        |cidr: &str, policy: &str| policy.replace("from: [", &format!("from: [{{ipBlock: {{cidr: {cidr}}}}}, "));
    let state = |number: usize| {
        let peers = [["sender"], ["other-0"]][number % 2];
        let receiver = block("10.244.0.0/16", &policy("receiver", "Ingress", &peers, ""));
        let narrower = block(&format!("{friend}/32"), &policy("other-1", "Ingress", &["friend"], ""));
        let ports = format!(", ports: [{{protocol: TCP, port: {}}}]", 1000 + number);
        let others = (0..OTHERS).map(|other| policy(&format!("other-{other}"), "Egress", &["friend"], &ports));
        std::iter::once(receiver).chain((number % 2 == 1).then_some(narrower)).chain(others).collect::<String>()
    };
    enforce(&lab, &state(0));
    let receiver = lab.netns("shop/receiver").unwrap();
    let established = Newcomers::with(&lab, "shop/friend", &receiver, address, false);
    established.await_more();
    for round in 1..=ROUNDS {
        enforce(&lab, &state(round));
        established.await_more();
    }
    let (sent, passed) = established.finish();
    assert_eq!(sent, passed, "datagrams of an established connection were lost");
}

/// Writes policies as one file of the node's folder, and waits until they are in force.
fn enforce(lab: &Lab, policies: &str) {
    let folder = PathBuf::from(format!("/run/cirri/lab/{}/nodes/node1", lab.name()));
    fs::write(folder.join("beside"), policies).unwrap();
    fs::rename(folder.join("beside"), folder.join("manifests/policies.yaml")).unwrap();
    let mut agent = UnixStream::connect(lab.socket("node1")).unwrap();
    let question = json!({"method": "wait", "params": {"timeout_ms": PATIENCE.as_millis() as u64}});
    agent.write_all(format!("{question}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    agent.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("enforced_revision"), "{answer}");
}

/// Connections of one datagram each, one after the other, as fast as they go.
struct Newcomers {
    sent: Arc<AtomicU64>,
    passed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    threads: [JoinHandle<()>; 2],
}

impl Newcomers {
    fn start(lab: &Lab, from: &str, receiver: &Namespace, address: IpAddr) -> Newcomers {
        Newcomers::with(lab, from, receiver, address, true)
    }

    /// One connection with many datagrams, if they are not to be `new`.
    fn with(lab: &Lab, from: &str, receiver: &Namespace, address: IpAddr, new: bool) -> Newcomers {
        let any: SocketAddr = "0.0.0.0:0".parse().unwrap();
        let server = receiver.run(|| UdpSocket::bind(any)).unwrap().unwrap();
        server.set_read_timeout(Some(QUIET)).unwrap();
        let to = SocketAddr::new(address, server.local_addr().unwrap().port());
        let place = lab.netns(from).unwrap();
        let (sent, passed, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)), Arc::default());
        let sender = {
            let (sent, stop): (_, Arc<AtomicBool>) = (Arc::clone(&sent), Arc::clone(&stop));
            move || {
                let open = || place.run(|| UdpSocket::bind(any)).unwrap().unwrap();
                let mut socket = open();
                while !stop.load(Ordering::Relaxed) {
                    if new {
                        socket = open();
                    }
                    socket.send_to(&[1], to).unwrap();
                    sent.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        };
        let reader = {
            let (passed, stop) = (Arc::clone(&passed), Arc::clone(&stop));
            move || {
                loop {
                    let ended = stop.load(Ordering::Relaxed);
                    match server.recv_from(&mut [0]) {
                        Ok(_) => drop(passed.fetch_add(1, Ordering::Relaxed)),
                        Err(_) if ended => return,
                        Err(_) => {}
                    }
                }
            }
        };
        let threads = [std::thread::spawn(sender), std::thread::spawn(reader)];
        Newcomers { sent, passed, stop, threads }
    }

    fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Waits until more have passed that began after this call.
    fn await_more(&self) {
        let begun = self.sent.load(Ordering::Relaxed);
        eventually("connections pass", PATIENCE, || self.passed() > begun + 10);
    }

    /// Ends them; how many began, and how many passed.
    fn finish(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let [sender, reader] = self.threads;
        for thread in [sender, reader] {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        (self.sent.load(Ordering::Relaxed), self.passed.load(Ordering::Relaxed))
    }
}
