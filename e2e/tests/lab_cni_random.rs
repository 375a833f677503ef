//! Random sequences of what a runtime, an administrator and an accident can do to attachments, against a model
//! of what must be there after each step: nothing leaked, nothing lost, no default route gone.
//!
//! `CIRRI_CNI_SEQUENCES` says how many (20), `CIRRI_CNI_SEED` with which seed; every failure prints both.

use std::collections::{BTreeMap, BTreeSet};

use cirri_e2e::cni::{Attachment, assert_leftovers, endpoints};
use cirri_e2e::kernel::TestNamespace;
use cirri_e2e::lab::{Lab, printed};
use cirri_loader::net::Namespace;
use serde_json::{Value, json};

const SEQUENCES: u64 = 20;
const SEED: u64 = 193;
const CONTAINERS: usize = 3;
const LONGEST: usize = 10;
/// Network and device.
const NETWORKS: [(&str, &str); 2] = [("blue", "eth0"), ("green", "net1")];

/// A container and one of [`NETWORKS`].
type Key = (usize, usize);

#[test]
fn whatever_order_runtimes_and_accidents_come_in_nothing_leaks_and_nothing_is_lost() {
    let (sequences, seed) = (number("CIRRI_CNI_SEQUENCES", SEQUENCES), number("CIRRI_CNI_SEED", SEED));
    let lab = Lab::up("cnirand", 1, &[]).unwrap();
    let node = lab.netns("node:node1").unwrap();
    let before = stack(&node);
    let mut counts = BTreeMap::new();
    for sequence in 0..sequences {
        let mut random = fastrand::Rng::with_seed(seed.wrapping_add(sequence));
        let mut world = World::new(&lab, &node, sequence);
        for _ in 0..random.usize(3..=LONGEST) {
            let step = world.step(&mut random);
            *counts.entry(step).or_insert(0u32) += 1;
            world.check(seed);
        }
        world.end(seed);
        assert_leftovers(&lab, 0);
        assert_eq!(stack(&node), before, "seed {seed}, sequence {sequence}: the node is not as before");
    }
    cirri_e2e::say(format_args!("{sequences} sequences with seed {seed}: {counts:?}"));
}

/// What there must be.
struct World<'a> {
    lab: &'a Lab,
    node: &'a Namespace,
    sequence: u64,
    places: Vec<TestNamespace>,
    /// What is attached, and what ADD answered.
    attached: BTreeMap<Key, Value>,
    /// What somebody damaged: CHECK says so, nothing else must fail.
    damaged: BTreeSet<Key>,
    /// What ADD was asked for while the agent was away, or DEL.
    agent: bool,
    told: Vec<String>,
}

impl<'a> World<'a> {
    fn new(lab: &'a Lab, node: &'a Namespace, sequence: u64) -> World<'a> {
        let places = (0..CONTAINERS).map(|_| TestNamespace::new()).collect();
        let (attached, damaged) = Default::default();
        World { lab, node, sequence, places, attached, damaged, agent: true, told: Vec::new() }
    }

    /// Does one thing; what it is called.
    fn step(&mut self, random: &mut fastrand::Rng) -> &'static str {
        let key = (random.usize(..CONTAINERS), random.usize(..NETWORKS.len()));
        match random.u32(..100) {
            0..=34 => self.add(key),
            35..=54 => self.delete(key),
            55..=69 => self.compare(key),
            70..=77 => self.collect(key.1, random),
            78..=85 if self.agent => self.kill(),
            78..=85 => self.restart(),
            86..=90 => self.spoil_inside(key),
            91..=95 => self.take_device(key),
            _ => self.lose_namespace(key.0),
        }
    }

    fn add(&mut self, key: Key) -> &'static str {
        self.tell(format!("ADD {key:?}"));
        // An attachment without its device is made anew, and may get other addresses.
        let whole = self.attached.contains_key(&key) && !self.gone(key);
        let outcome = self.name(key).call("ADD", json!({}));
        if !self.agent {
            assert_eq!(outcome.unwrap_err()["code"], 11, "{}", self.story());
            return "ADD while the agent is away";
        }
        let result = outcome.unwrap_or_else(|error| panic!("{error}: {}", self.story()));
        if let Some(was) = self.attached.insert(key, result.clone()) {
            if whole {
                assert_eq!(was["ips"], result["ips"], "asked again, it is the same: {}", self.story());
                return "ADD again";
            }
            self.damaged.remove(&key);
        }
        "ADD"
    }

    fn delete(&mut self, key: Key) -> &'static str {
        self.tell(format!("DEL {key:?}"));
        let outcome = self.name(key).call("DEL", json!({}));
        assert_eq!(outcome, Ok(Value::Null), "{}", self.story());
        self.forget(key);
        if self.agent { "DEL" } else { "DEL while the agent is away" }
    }

    fn compare(&mut self, key: Key) -> &'static str {
        self.tell(format!("CHECK {key:?}"));
        let previous = self.attached.get(&key).cloned().unwrap_or_else(|| json!({}));
        let outcome = self.name(key).call("CHECK", json!({"prevResult": previous}));
        let code = outcome.as_ref().map_or_else(|error| error["code"].as_u64(), |_| None);
        let expected = match (self.agent, self.attached.contains_key(&key), self.damaged.contains(&key)) {
            (false, ..) => Some(11),
            (true, false, _) => Some(3),
            (true, true, true) => Some(101),
            (true, true, false) => None,
        };
        assert_eq!(code, expected, "{outcome:?}: {}", self.story());
        "CHECK"
    }

    fn collect(&mut self, network: usize, random: &mut fastrand::Rng) -> &'static str {
        let of_network: Vec<Key> = self.attached.keys().copied().filter(|(_, of)| *of == network).collect();
        let (valid, stale): (Vec<Key>, Vec<Key>) = of_network.into_iter().partition(|_| random.bool());
        self.tell(format!("GC of {network} but {valid:?}"));
        let named: Vec<Value> =
            valid.iter().map(|key| json!({"containerID": self.name(*key).id, "ifname": NETWORKS[network].1})).collect();
        let outcome = self.name((0, network)).call("GC", json!({"cni.dev/valid-attachments": named}));
        if !self.agent {
            assert_eq!(outcome.unwrap_err()["code"], 11, "{}", self.story());
            return "GC while the agent is away";
        }
        assert_eq!(outcome, Ok(Value::Null), "{}", self.story());
        stale.into_iter().for_each(|key| self.forget(key));
        "GC"
    }

    fn kill(&mut self) -> &'static str {
        self.tell("the agent is killed".to_owned());
        self.lab.kill_agent("node1").unwrap();
        self.agent = false;
        "kill"
    }

    fn restart(&mut self) -> &'static str {
        self.tell("the agent is back".to_owned());
        self.lab.restart("node1", &[]).unwrap();
        self.agent = true;
        // What has no device any more is not taken up again.
        let lost: Vec<Key> = self.attached.keys().copied().filter(|key| self.gone(*key)).collect();
        lost.into_iter().for_each(|key| self.forget(key));
        "restart"
    }

    /// Somebody in the container takes an address away.
    fn spoil_inside(&mut self, key: Key) -> &'static str {
        let Some(result) = self.attached.get(&key).filter(|_| !self.damaged.contains(&key)) else { return "nothing" };
        let address = result["ips"][0]["address"].as_str().unwrap().to_owned();
        self.tell(format!("{key:?} loses {address}"));
        printed(&self.places[key.0].namespace, &["ip", "addr", "del", &address, "dev", NETWORKS[key.1].1]);
        self.damaged.insert(key);
        "address taken away"
    }

    /// Somebody on the node deletes its device.
    fn take_device(&mut self, key: Key) -> &'static str {
        if !self.attached.contains_key(&key) || self.gone(key) {
            return "nothing";
        }
        self.tell(format!("the device of {key:?} is deleted"));
        let host = self.attached[&key]["interfaces"][0]["name"].as_str().unwrap();
        printed(self.node, &["ip", "link", "del", host]);
        self.damaged.insert(key);
        "device deleted"
    }

    /// The container's namespace goes without DEL, and the runtime finds out and deletes.
    fn lose_namespace(&mut self, container: usize) -> &'static str {
        self.tell(format!("the namespace of {container} is gone"));
        let lost = std::mem::replace(&mut self.places[container], TestNamespace::new());
        let path = lost.namespace.path().to_owned();
        drop(lost);
        for network in 0..NETWORKS.len() {
            let name = Attachment { netns: path.clone(), ..self.name((container, network)) };
            assert_eq!(name.call("DEL", json!({})), Ok(Value::Null), "{}", self.story());
            self.forget((container, network));
        }
        "namespace lost"
    }

    /// The agent has exactly what there must be, and every container that has something intact has one default
    /// route of each family.
    fn check(&self, seed: u64) {
        let story = || format!("seed {seed}: {}", self.story());
        assert!(!printed(self.node, &["ip", "route", "show", "default"]).is_empty(), "{}", story());
        if self.agent {
            let there: BTreeSet<(String, String)> = endpoints(self.lab)
                .iter()
                .map(|it| (it["container_id"].as_str().unwrap().to_owned(), it["network"].as_str().unwrap().to_owned()))
                .collect();
            let wanted: BTreeSet<(String, String)> =
                self.attached.keys().map(|key| self.name(*key)).map(|name| (name.id, name.network)).collect();
            assert_eq!(there, wanted, "{}", story());
        }
        for (container, place) in self.places.iter().enumerate() {
            let keys = || self.attached.keys().filter(|key| key.0 == container);
            // While the agent is away nobody makes another take over.
            if !self.agent || keys().count() == 0 || keys().any(|key| self.damaged.contains(key)) {
                continue;
            }
            for family in ["-4", "-6"] {
                let routes = printed(&place.namespace, &["ip", family, "route", "show", "default"]);
                assert_eq!(routes.lines().count(), 1, "container {container}, ip {family}: {routes}: {}", story());
            }
        }
    }

    fn end(mut self, seed: u64) {
        if !self.agent {
            self.restart();
            self.check(seed);
        }
        for key in (0..CONTAINERS).flat_map(|container| (0..NETWORKS.len()).map(move |network| (container, network))) {
            self.delete(key);
        }
        self.check(seed);
        for place in &self.places {
            let left = printed(&place.namespace, &["ip", "-o", "link"]);
            assert_eq!(left.lines().count(), 1, "{left}: {}", self.story());
            for family in ["-4", "-6"] {
                let rules = printed(&place.namespace, &["ip", family, "rule", "show", "pref", "19300"]);
                assert_eq!(rules, "", "{}", self.story());
            }
        }
    }

    fn name(&self, (container, network): Key) -> Attachment {
        let id = format!("random{}-{container}", self.sequence);
        let (network, ifname) = NETWORKS[network];
        Attachment::new(self.lab, &id, self.places[container].namespace.path()).of(network, ifname)
    }

    /// Whether its device is not there any more.
    fn gone(&self, key: Key) -> bool {
        let shown = printed(&self.places[key.0].namespace, &["ip", "-o", "link"]);
        !shown.contains(&format!(" {}@", NETWORKS[key.1].1))
    }

    fn forget(&mut self, key: Key) {
        self.attached.remove(&key);
        self.damaged.remove(&key);
    }

    fn tell(&mut self, step: String) {
        self.told.push(step);
    }

    fn story(&self) -> String {
        format!("sequence {}: {}", self.sequence, self.told.join("; "))
    }
}

/// Devices and routes of the node, without what changes by itself.
fn stack(node: &Namespace) -> String {
    let devices = "ip -o link | sed 's/^[0-9]*: //; s/ qlen.*//'";
    ["ip route", "ip -6 route", "ip rule", devices].map(|command| printed(node, &["sh", "-c", command])).join("--\n")
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}
