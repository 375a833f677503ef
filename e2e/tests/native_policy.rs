//! The policy compiler against the reference evaluator: rule sets of random worlds, looked up the way
//! that the packet path is told to, and asked about random packets.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cirri_abi::{Direction as Side, Identity, PolicyEntry, PolicyKey, policy_flag};
use cirri_control::labels::IdentityLabels;
use cirri_control::policy::{Cluster, Ruleset};
use cirri_control::resource::{Resource, parse_documents};
use cirri_e2e::cases;
use cirri_e2e::random::{OTHER_NODE, Packet, Scenario, THIS_NODE};
use cirri_e2e::reference::{Direction, Judgement, Protocol};
use ipnet::IpNet;

const SCENARIOS: u64 = 400;
const PACKETS: u16 = 60;

#[test]
fn rule_sets_decide_as_the_reference_evaluator_does() {
    let mut compared = 0;
    for seed in 0..SCENARIOS {
        let scenario = Scenario::generate(seed, PACKETS);
        let tables = Tables::of(&scenario);
        for packet in &scenario.packets {
            for (direction, judgement) in scenario.judgements(packet) {
                if judgement == Judgement::OwnNode {
                    // The packet path lets the own node pass before it asks a rule set.
                    continue;
                }
                let found = tables.decide(packet, direction);
                let allowed = found.flags & policy_flag::ALLOW != 0;
                assert_eq!(
                    allowed,
                    judgement.allows(),
                    "{direction:?}: the rule set answers {found:?}\n{}",
                    scenario.describe(packet)
                );
                tables.check_rule(found, direction, &judgement, || scenario.describe(packet));
                compared += 1;
            }
        }
    }
    assert!(compared > 20_000, "only {compared} decisions were compared");
}

#[test]
fn the_order_in_which_policies_come_and_go_changes_nothing() {
    for seed in 0..SCENARIOS / 4 {
        let scenario = Scenario::generate(seed, 1);
        let straight = Tables::of(&scenario);
        let mut shuffled = straight.clone();
        let mut policies: Vec<_> = straight.cluster.policies().cloned().collect();
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..2 {
            rng.shuffle(&mut policies);
            for policy in &policies {
                shuffled.cluster.remove_policy(&policy.id);
            }
            rng.shuffle(&mut policies);
            for policy in &policies {
                shuffled.cluster.upsert_policy(policy.clone()).unwrap();
            }
        }
        shuffled.compile();
        assert_eq!(straight.rulesets, shuffled.rulesets, "seed {seed}\n{}", scenario.manifests);
    }
}

#[test]
fn the_manifests_of_every_case_are_accepted() {
    for case in cases::all().unwrap() {
        let addresses = cases::Addresses::invented(&case).unwrap();
        let text = format!("{}\n---\n{}", case.surroundings(), case.policies(&addresses).unwrap());
        let ours = case.world(&addresses).unwrap().policies.len();
        let resources = parse_documents(&case.name, &text).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let theirs = resources.iter().filter(|resource| matches!(resource, Resource::NetworkPolicy(_))).count();
        assert_eq!(theirs, ours, "{}", case.name);
    }
}

/// What the tables of [`THIS_NODE`] hold.
#[derive(Clone)]
struct Tables {
    cluster: Cluster,
    identities: BTreeMap<IpAddr, Identity>,
    rulesets: BTreeMap<u32, Ruleset>,
}

impl Tables {
    fn of(scenario: &Scenario) -> Tables {
        let resources = parse_documents("scenario", &scenario.manifests)
            .unwrap_or_else(|error| panic!("seed {}: {error}\n{}", scenario.seed, scenario.manifests));
        let mut cluster = Cluster::default();
        let mut namespaces = BTreeMap::new();
        let mut identities = BTreeMap::new();
        let mut numbers: BTreeMap<String, Identity> = BTreeMap::new();
        for resource in &resources {
            if let Resource::Namespace(namespace) = resource {
                namespaces.insert(resource.name().to_string(), namespace);
            }
        }
        for resource in &resources {
            match resource {
                Resource::NetworkPolicy(policy) => {
                    cluster.upsert_policy(policy).unwrap_or_else(|error| panic!("seed {}: {error}", scenario.seed));
                }
                Resource::Pod(pod) => {
                    let namespace = namespaces.get(pod.namespace()).copied();
                    let labels = IdentityLabels::of_pod(pod, namespace, "default", &cluster.label_filter());
                    let next = Identity { id: Identity::MIN_ALLOCATED + numbers.len() as u32 };
                    let identity = *numbers.entry(labels.canonical()).or_insert(next);
                    cluster.upsert_identity(identity, labels);
                    let full = format!("{}/{}", pod.namespace(), resource.name());
                    let known = scenario.world.pods.iter().find(|known| known.full_name() == full);
                    let addresses = known.map(|pod| pod.addresses.clone()).unwrap_or_default();
                    identities.extend(addresses.into_iter().map(|address| (address, identity)));
                }
                Resource::Namespace(_) | Resource::Node(_) | Resource::Service(_) | Resource::EndpointSlice(_) => {}
            }
        }
        for (name, identity) in [(THIS_NODE, Identity::HOST), (OTHER_NODE, Identity::REMOTE_NODE)] {
            let nodes = scenario.world.nodes.iter().filter(|node| node.name == name);
            identities.extend(nodes.flat_map(|node| &node.addresses).map(|address| (*address, identity)));
        }
        let mut tables = Tables { cluster, identities, rulesets: BTreeMap::new() };
        tables.compile();
        tables
    }

    fn compile(&mut self) {
        for identity in self.identities.values().filter(|identity| identity.id >= Identity::MIN_ALLOCATED) {
            self.rulesets.insert(identity.id, self.cluster.compile(*identity).unwrap());
        }
    }

    fn identity(&self, address: IpAddr) -> Identity {
        let world = if address.is_ipv4() { Identity::WORLD_IPV4 } else { Identity::WORLD_IPV6 };
        self.identities.get(&address).copied().unwrap_or(world)
    }

    /// The lookup as `cirri_abi`'s policy tables are documented.
    fn decide(&self, packet: &Packet, direction: Direction) -> PolicyEntry {
        let (own, peer, side) = match direction {
            Direction::Egress => (packet.src, packet.dst, Side::EGRESS),
            Direction::Ingress => (packet.dst, packet.src, Side::INGRESS),
        };
        let ruleset = &self.rulesets[&self.identity(own).id];
        let block = self.cluster.blocks().block_of(IpNet::from(peer));
        let proto = match packet.protocol {
            Protocol::Tcp => cirri_abi::proto::TCP,
            Protocol::Udp => cirri_abi::proto::UDP,
            Protocol::Sctp => cirri_abi::proto::SCTP,
            Protocol::Other(number) => number,
        };
        let port = packet.dport.to_be_bytes();
        let peers = [self.identity(peer), Identity { id: block }, Identity { id: 0 }];
        let asked = peers.iter().enumerate().filter(|(at, peer)| *at != 1 || peer.id != 0);
        asked
            .filter_map(|(_, peer)| longest(ruleset, &PolicyKey::full(*peer, side, proto, port)))
            // Of equals the earlier: `max_by_key` would keep the later.
            .rev()
            .max_by_key(|entry| (entry.precedence, entry.prefix_len))
            .unwrap_or_else(|| panic!("the rule set has no default: {ruleset:?}"))
    }

    /// The rule that the entry names must be of a policy that allows this.
    fn check_rule(&self, found: PolicyEntry, direction: Direction, judgement: &Judgement, what: impl Fn() -> String) {
        let Some(rule) = self.cluster.rule(found.cookie) else {
            assert!(!matches!(judgement, Judgement::Allowed(_)), "no rule is named: {found:?}\n{}", what());
            return;
        };
        let name = format!("{}/{}", rule.namespace, rule.policy);
        let Judgement::Allowed(policies) = judgement else { panic!("{name} is named: {}", what()) };
        assert!(policies.contains(&name), "{name} is named\n{}", what());
        assert_eq!(rule.direction.to_string(), format!("{direction:?}").to_lowercase());
    }
}

/// The trie's answer: of the entries whose prefix covers the key, the longest.
fn longest(ruleset: &Ruleset, asked: &PolicyKey) -> Option<PolicyEntry> {
    let covers = |key: &PolicyKey| {
        let bits = |key: &PolicyKey| {
            let head = u64::from(key.peer) << 32 | u64::from(key.direction) << 24 | u64::from(key.proto) << 16;
            head | u64::from(u16::from_be_bytes(key.port))
        };
        let ignored = PolicyKey::FULL_BITS - key.prefix_len;
        (bits(key) ^ bits(asked)) >> ignored == 0
    };
    ruleset.entries.iter().filter(|(key, _)| covers(key)).max_by_key(|(key, _)| key.prefix_len).map(|(_, entry)| *entry)
}
