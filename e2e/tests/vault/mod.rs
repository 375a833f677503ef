//! A container that must stay closed, an attacker on its node, and a store that events come from.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cirri_control::identity::labels_key;
use cirri_control::labels::IdentityLabels;
use cirri_control::resource::parse_documents;
use cirri_e2e::kernel::TestNamespace;
use cirri_e2e::lab::{self, Lab, eventually};
use cirri_loader::net::Namespace;
use cirri_store::{Etcd, EtcdOptions, PREFIX, STORE_ID, Store as _};
use serde_json::{Value, json};

use super::PATIENCE;

/// The port that datagrams are sent to.
const PORT: u16 = 4000;
/// How many addresses are tried.
const NEIGHBOURS: u8 = 4;
/// How long the attacker rests after each round: thousands of datagrams a second, but not all of a processor.
const PAUSE: Duration = Duration::from_millis(1);

/// Kinds that the tests delete.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Policy,
    Pod,
    Namespace,
}

impl Kind {
    fn key(self, name: &str) -> String {
        match self {
            Kind::Policy => format!("resources/NetworkPolicy/shop/{name}"),
            Kind::Pod => format!("resources/Pod/shop/{name}"),
            Kind::Namespace => format!("resources/Namespace/_/{name}"),
        }
    }
}

/// A lab and the way into what its agents read: a folder with a file an object, or etcd.
pub struct Store {
    pub lab: Lab,
    etcd: Option<Namespace>,
}

impl Store {
    pub fn folder(name: &str) -> Store {
        Store { lab: Lab::up(name, 1, &[]).unwrap(), etcd: None }
    }

    pub fn etcd(name: &str) -> Store {
        let lab = Lab::up(name, 2, &[]).unwrap();
        let etcd = Namespace::open(lab.list().unwrap().net).unwrap();
        Store { lab, etcd: Some(etcd) }
    }

    /// Writes objects in this order, as fast as that goes.
    pub fn put(&self, manifests: &[String]) {
        let objects = manifests.iter().flat_map(|text| parse_documents("test", text).unwrap());
        let objects: Vec<(String, String)> = objects.map(|object| (object.store_key(), object.to_json())).collect();
        if self.etcd.is_none() {
            for (key, text) in &objects {
                fs::write(self.file(key), text).unwrap();
            }
            return;
        }
        self.in_etcd(async |store| {
            for (key, text) in &objects {
                store.put(&format!("{PREFIX}{key}"), text.as_bytes(), false).await.unwrap();
            }
        });
    }

    /// Writes objects in one file of the folder, at once.
    pub fn put_together(&self, manifests: &[String]) {
        let place = self.file("together");
        let beside = place.parent().and_then(std::path::Path::parent).unwrap().join("together.json");
        let objects = manifests.iter().flat_map(|text| parse_documents("test", text).unwrap());
        let documents: Vec<String> = objects.map(|object| object.to_json()).collect();
        fs::write(&beside, documents.join("\n---\n")).unwrap();
        fs::rename(&beside, place.with_extension("yaml")).unwrap();
    }

    /// Writes a value as it is.
    pub fn spoil(&self, kind: Kind, name: &str, text: &str) {
        let key = kind.key(name);
        match self.etcd {
            None => fs::write(self.file(&key), text).unwrap(),
            Some(_) => self.in_etcd(async |store| {
                store.put(&format!("{PREFIX}{key}"), text.as_bytes(), false).await.unwrap();
            }),
        }
    }

    pub fn delete(&self, kind: Kind, name: &str) {
        let key = kind.key(name);
        match self.etcd {
            None => fs::remove_file(self.file(&key)).unwrap(),
            Some(_) => self.in_etcd(async |store| {
                store.delete(&format!("{PREFIX}{key}")).await.unwrap();
            }),
        }
    }

    /// Waits until everything that was written is in force on every node.
    pub fn settle(&self) {
        for node in self.lab.list().unwrap().nodes {
            let mut agent = UnixStream::connect(&node.socket).unwrap();
            let question = json!({"method": "wait", "params": {"timeout_ms": 2 * PATIENCE.as_millis() as u64}});
            agent.write_all(format!("{question}\n").as_bytes()).unwrap();
            let mut answer = String::new();
            agent.read_to_string(&mut answer).unwrap();
            assert!(answer.contains("enforced_revision"), "{}: {answer}", node.name);
        }
    }

    /// etcd loses its data and begins again at the same place, as what it was at first. It ends with the answer.
    pub fn lose_data(&self) -> Process {
        let directory = PathBuf::from(format!("/run/cirri/lab/{}", self.lab.name()));
        let pid = fs::read_to_string(directory.join("etcd.pid")).unwrap();
        let line = fs::read_to_string(format!("/proc/{}/cmdline", pid.trim())).unwrap();
        let words: Vec<&str> = line.split_terminator('\0').collect();
        assert!(Command::new("kill").args(["-9", pid.trim()]).status().unwrap().success());
        let namespace = self.etcd.as_ref().expect("a lab with etcd");
        let places =
            || words.iter().filter(|word| word.starts_with("--listen")).filter_map(|word| word.split("//").nth(1));
        let is_free = || namespace.run(|| places().all(|place| TcpListener::bind(place).is_ok())).unwrap();
        eventually("etcd ends", PATIENCE, is_free);
        fs::remove_dir_all(directory.join("etcd")).unwrap();
        let mut etcd = Command::new(words[0]);
        let log = fs::File::create(directory.join("etcd.log")).unwrap();
        etcd.args(&words[1..]).stdout(Stdio::null()).stderr(log);
        Process(namespace.run(|| etcd.spawn().unwrap()).unwrap())
    }

    /// Writes the store's own id.
    pub fn put_id(&self, id: &str) {
        self.in_etcd(async |store| {
            store.put(STORE_ID, id.as_bytes(), false).await.unwrap();
        });
    }

    /// Writes a text under the first keys where the number of labels is looked for.
    pub fn put_numbers(&self, labels: &IdentityLabels, count: u32, text: &str) {
        /// As many as a transaction takes.
        const AT_ONCE: usize = 100;
        let keys: Vec<String> = (0..count).map(|attempt| number_key(labels, attempt)).collect();
        self.in_etcd(async |store| {
            for keys in keys.chunks(AT_ONCE) {
                let entries: Vec<(&str, &[u8])> = keys.iter().map(|key| (key.as_str(), text.as_bytes())).collect();
                assert!(store.create_all(&entries).await.unwrap(), "{labels} had a number");
            }
        });
    }

    /// Removes what stands under the first of these keys.
    pub fn delete_number(&self, labels: &IdentityLabels) {
        self.in_etcd(async |store| {
            store.delete(&number_key(labels, 0)).await.unwrap();
        });
    }

    fn file(&self, key: &str) -> PathBuf {
        let folder = format!("/run/cirri/lab/{}/nodes/node1/manifests", self.lab.name());
        PathBuf::from(folder).join(format!("{}.json", key.replace('/', "-")))
    }

    fn in_etcd(&self, work: impl AsyncFnOnce(&Etcd) + Send) {
        let namespace = self.etcd.as_ref().expect("a lab with etcd");
        namespace
            .run(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let store = Etcd::new(&EtcdOptions::new(["http://172.31.255.1:2379"])).unwrap();
                    work(&store).await;
                });
            })
            .unwrap();
    }
}

fn number_key(labels: &IdentityLabels, attempt: u32) -> String {
    format!("{PREFIX}identities/labels/{}", labels_key(labels, attempt))
}

/// Ends when it is dropped.
pub struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Nobody may reach pods of this app.
pub fn deny(app: &str) -> String {
    denial(&format!("deny-{app}"), app)
}

/// The same by a version that is refused: it selects by a label that never counts as a pod's own.
pub fn refused(app: &str) -> String {
    deny(app).replace("matchLabels: {", "matchLabels: {io.kubernetes.pod.namespace: shop, ")
}

/// Policies that are about others; in each round about somebody else.
pub fn others(count: usize, round: u64) -> Vec<String> {
    (0..count).map(|number| denial(&format!("other{number}"), &format!("other{number}-{round}"))).collect()
}

pub fn denial(name: &str, app: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{podSelector: {{matchLabels: {{app: {app}}}}}, policyTypes: [Ingress]}}\n"
    )
}

/// A policy for the vault whose spec begins with `head`, up to its list of ports, and that has `count` single ones.
pub fn ports(name: &str, head: &str, count: u16, first: u16) -> String {
    let ports: Vec<String> =
        (first..=first + (count - 1)).map(|port| format!("{{protocol: TCP, port: {port}}}")).collect();
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{podSelector: {{matchLabels: {{app: vault}}}}, {head}{}]}}]}}\n",
        ports.join(", ")
    )
}

pub fn pod(name: &str, app: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {app}}}}}\n\
         spec: {{nodeName: node1, containers: [{{name: c, image: none}}]}}\n"
    )
}

const NAMED: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=vault";
const TWIN: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=twin";

/// A container that listens from before it is attached, and another on its node that sends to every address that it
/// may get, all the time.
pub struct Vault<'a> {
    store: &'a Store,
    id: String,
    /// What its runtime says in `CNI_ARGS`.
    arguments: String,
    place: TestNamespace,
    socket: UdpSocket,
    attacker: Option<Attacker>,
}

impl Vault<'_> {
    pub fn new<'a>(store: &'a Store, id: &str) -> Vault<'a> {
        Vault::of(store, id, NAMED)
    }

    /// Its runtime says which of the pods that have its name it is.
    pub fn with_uid<'a>(store: &'a Store, id: &str, uid: &str) -> Vault<'a> {
        Vault::of(store, id, &format!("{NAMED};K8S_POD_UID={uid}"))
    }

    /// Its runtime calls it `twin`.
    pub fn twin<'a>(store: &'a Store, id: &str) -> Vault<'a> {
        Vault::of(store, id, TWIN)
    }

    /// Its runtime knows no pods.
    pub fn nameless<'a>(store: &'a Store, id: &str) -> Vault<'a> {
        Vault::of(store, id, "")
    }

    fn of<'a>(store: &'a Store, id: &str, arguments: &str) -> Vault<'a> {
        let attacker = Attacker::start(store, id);
        let place = TestNamespace::new();
        let socket = place.namespace.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        Vault { store, id: id.to_owned(), arguments: arguments.to_owned(), place, socket, attacker: Some(attacker) }
    }

    /// Attaches it as a runtime does: one that is told to try again does.
    pub fn add(&self) -> Result<Value, Value> {
        let deadline = Instant::now() + 4 * PATIENCE;
        loop {
            match self.try_add() {
                Err(error) if error["code"] == 11 && Instant::now() < deadline => continue,
                outcome => return outcome,
            }
        }
    }

    /// Attaches it once.
    pub fn try_add(&self) -> Result<Value, Value> {
        plugin(&self.store.lab, "ADD", &self.id, &self.place, &self.arguments)
    }

    pub fn del(&self) -> Result<Value, Value> {
        plugin(&self.store.lab, "DEL", &self.id, &self.place, "")
    }

    /// Makes somebody else of the attacker, and waits until that is in force.
    pub fn relabel_attacker(&self, label: &str) {
        let manifest = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: attacker-{}, namespace: default, labels: {{is: {label}}}}}\n\
             spec: {{nodeName: node1, containers: [{{name: c, image: none}}]}}\n",
            self.id
        );
        self.store.put(&[manifest]);
        self.store.settle();
    }

    /// Datagrams that came since this was asked last.
    pub fn received(&self) -> usize {
        let mut count = 0;
        let mut buffer = [0; 16];
        while self.socket.recv(&mut buffer).is_ok() {
            count += 1;
        }
        count
    }
}

impl Drop for Vault<'_> {
    fn drop(&mut self) {
        let _ = self.del();
        if let Some(attacker) = self.attacker.take() {
            attacker.stop(self.store);
        }
    }
}

struct Attacker {
    id: String,
    place: TestNamespace,
    stop: Arc<AtomicBool>,
    sender: JoinHandle<()>,
}

impl Attacker {
    fn start(store: &Store, id: &str) -> Attacker {
        let id = format!("attacker-{id}");
        let place = TestNamespace::new();
        let added = plugin(&store.lab, "ADD", &id, &place, "").unwrap();
        let own = added["ips"].as_array().unwrap().iter().find_map(|ip| {
            let text = ip["address"].as_str()?;
            text.split('/').next()?.parse::<Ipv4Addr>().ok()
        });
        let [a, b, c, own] = own.unwrap().octets();
        let socket = place.namespace.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let sender = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // Addresses are given out in turn: the next one is of the vault, or a later one.
                for next in 1..=NEIGHBOURS {
                    let host = (u32::from(own) - 1 + u32::from(next)) % 254 + 1;
                    let to = SocketAddr::new(IpAddr::from([a, b, c, host as u8]), PORT);
                    // Nobody may be there.
                    let _ = socket.send_to(b"let me in", to);
                }
                std::thread::sleep(PAUSE);
            }
        });
        Attacker { id, place, stop, sender }
    }

    fn stop(self, store: &Store) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.sender.join();
        let _ = plugin(&store.lab, "DEL", &self.id, &self.place, "");
    }
}

fn plugin(lab: &Lab, verb: &str, id: &str, place: &TestNamespace, arguments: &str) -> Result<Value, Value> {
    let configuration = json!({
        "cniVersion": "1.1.0", "name": "vault", "type": "cirri-cni", "socket": lab.socket("node1"),
    });
    let mut child = Command::new(lab::binary().unwrap())
        .arg("cni")
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", id)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_NETNS", place.namespace.path())
        .env("CNI_PATH", "/opt/cni/bin")
        .env("CNI_ARGS", arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(configuration.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let answer = match output.stdout.as_slice() {
        [] => Value::Null,
        text => serde_json::from_slice(text).unwrap_or_else(|error| panic!("{verb}: {error}: {output:?}")),
    };
    if output.status.success() { Ok(answer) } else { Err(answer) }
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Policies about others are written: nothing waits for them.
    Backlog(usize),
    /// The policy is written.
    Policy,
    /// The policy is deleted.
    Unpolicy,
    /// The Pod is written, with this label.
    Pod(&'static str),
    /// The Pod's object is deleted.
    Unpod,
    /// The runtime attaches, once more if it already has: the container was made anew.
    Add,
    /// The agent is killed and started again.
    Restart,
}

/// Plays one order of events; answers it in words. The model is what the store holds: the workload is closed as soon as
/// and as long as its last known label is `vault` and the policy is there.
pub fn order(store: &Store, seed: u64) -> String {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut steps = vec![
        Step::Policy,
        Step::Add,
        Step::Pod("vault"),
        Step::Backlog(random.usize(0..3000)),
        Step::Backlog(random.usize(0..100)),
    ];
    if random.bool() {
        steps.push(Step::Pod("open"));
        steps.push(Step::Pod("vault"));
    }
    if random.bool() {
        steps.push(Step::Unpod);
    }
    if random.bool() {
        steps.push(Step::Unpolicy);
        steps.push(Step::Policy);
    }
    if random.u8(0..3) == 0 {
        steps.push(Step::Add);
    }
    if random.u8(0..4) == 0 {
        steps.push(Step::Restart);
    }
    random.shuffle(&mut steps);
    play(store, seed, &steps);
    format!("{steps:?}")
}

fn play(store: &Store, seed: u64, steps: &[Step]) {
    let vault = Vault::new(store, &format!("order{seed}"));
    let (mut policy, mut object, mut last, mut attached) = (false, None, None, false);
    // Whether anything that was so since the last count may have let datagrams in.
    let mut was_open = false;
    for (at, step) in steps.iter().enumerate() {
        match *step {
            Step::Backlog(count) => store.put(&others(count, seed)),
            Step::Policy => {
                store.put(&[deny("vault")]);
                policy = true;
            }
            Step::Unpolicy if policy => {
                store.delete(Kind::Policy, "deny-vault");
                policy = false;
            }
            Step::Unpolicy => {}
            Step::Pod(app) => {
                store.put(&[pod("vault", app)]);
                object = Some(app);
            }
            Step::Unpod if object.is_some() => {
                store.delete(Kind::Pod, "vault");
                object = None;
            }
            Step::Unpod => {}
            Step::Add if object.is_none() => {
                if attached {
                    vault.del().unwrap();
                    last = None;
                }
                // Whoever is not known waits; then it is written.
                std::thread::scope(|scope| {
                    let added = scope.spawn(|| vault.add());
                    store.put(&[pod("vault", "vault")]);
                    added.join().unwrap().unwrap_or_else(|error| panic!("{seed}: {steps:?} at {at}: {error}"));
                });
                object = Some("vault");
                attached = true;
            }
            Step::Add => {
                if attached {
                    vault.del().unwrap();
                    last = None;
                }
                vault.add().unwrap_or_else(|error| panic!("{seed}: {steps:?} at {at}: {error}"));
                attached = true;
            }
            Step::Restart => store.lab.restart("node1", &["--kill"]).unwrap(),
        }
        if attached {
            last = object.or(last);
        }
        let closed = policy && last == Some("vault");
        if attached && closed && was_open {
            // It was open, and is closed from when this is in force.
            store.settle();
            vault.received();
        }
        let received = vault.received();
        assert!(!(attached && closed) || received == 0, "{seed}: {steps:?} at {at}: {received} datagrams passed");
        was_open = attached && !closed;
    }
    store.settle();
    let closed = policy && last == Some("vault");
    let received = vault.received();
    if closed {
        assert_eq!(received, 0, "{seed}: {steps:?}: datagrams passed at last");
    } else {
        eventually("what nothing forbids passes", PATIENCE, || vault.received() > 0);
    }
    vault.del().unwrap();
    if object.is_some() {
        store.delete(Kind::Pod, "vault");
    }
    if policy {
        store.delete(Kind::Policy, "deny-vault");
    }
    store.settle();
}
