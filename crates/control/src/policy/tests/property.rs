//! Random clusters: the compiled tables, looked up as the packet path does, answer like the rules
//! themselves, and neither order nor history shows.

use super::*;
use crate::resource::{IpBlock, Operator, Protocol, SelectorRequirement};
use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::select;

const NAMESPACES: [&str; 2] = ["shop", "lab"];
const ADDRESSES: [&str; 6] = ["10.0.0.1", "10.1.0.1", "10.1.2.1", "11.0.0.1", "fd00::1", "fd00:1::1"];
const PORTS: [u16; 6] = [0, 79, 80, 81, 8080, 65_535];

fn selector() -> impl Strategy<Value = Selector> {
    let requirement = (select(vec!["a", "b"]), select(vec!["1", "2"]), 0..4u8).prop_map(|(key, value, operator)| {
        let (operator, values) = match operator {
            0 => (Operator::In, vec![value.to_string()]),
            1 => (Operator::NotIn, vec![value.to_string()]),
            2 => (Operator::Exists, vec![]),
            _ => (Operator::DoesNotExist, vec![]),
        };
        SelectorRequirement { key: key.into(), operator, values }
    });
    (proptest::collection::vec(requirement, 0..3), select(vec!["", "shop", "lab"])).prop_map(|(found, namespace)| {
        let pods = LabelSelector { match_expressions: found, ..LabelSelector::default() };
        match namespace {
            "" => Selector::new(Some(&pods), Scope::Labelled(&LabelSelector::default())),
            name => Selector::new(Some(&pods), Scope::Named(name)),
        }
    })
}

fn peer() -> impl Strategy<Value = Peer> {
    let blocks: Vec<(&str, &[&str])> = vec![
        ("0.0.0.0/0", &["10.0.0.0/8"]),
        ("10.0.0.0/8", &["10.1.0.0/16"]),
        ("10.0.0.0/8", &[]),
        ("10.1.0.0/16", &["10.1.2.0/24"]),
        ("10.1.2.0/24", &[]),
        ("::/0", &["fd00:1::/32"]),
        ("fd00::/16", &[]),
    ];
    let net = |text: &str| -> IpNet { text.parse().unwrap() };
    prop_oneof![
        Just(Peer::Any),
        selector().prop_map(Peer::Pods),
        select(blocks).prop_map(move |(cidr, except)| {
            Peer::Addresses(IpBlock { cidr: net(cidr), except: except.iter().map(|e| net(e)).collect() })
        }),
    ]
}

fn ports() -> impl Strategy<Value = PortMatch> {
    let protocol = || select(vec![Protocol::Tcp, Protocol::Udp]);
    prop_oneof![
        Just(PortMatch::Any),
        protocol().prop_map(PortMatch::Protocol),
        (protocol(), select(PORTS.to_vec()), select(PORTS.to_vec())).prop_map(|(protocol, a, b)| PortMatch::Range {
            protocol,
            first: a.min(b),
            last: a.max(b)
        }),
        (protocol(), select(vec!["http", "dns"]))
            .prop_map(|(protocol, name)| PortMatch::Named { protocol, name: name.into() }),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    let tier = prop_oneof![1 => Just(Tier::Admin), 4 => Just(Tier::Normal), 1 => Just(Tier::Baseline)];
    let verdict = prop_oneof![3 => Just(RuleVerdict::Allow), 1 => Just(RuleVerdict::Deny)];
    let direction = select(Direction::BOTH.to_vec());
    let some = 1..3;
    let (peers, ports) = (proptest::collection::vec(peer(), some.clone()), proptest::collection::vec(ports(), some));
    (direction, tier, 0..2u16, verdict, peers, ports).prop_map(|(direction, tier, order, verdict, peers, ports)| Rule {
        direction,
        index: 0,
        tier,
        order,
        verdict,
        peers,
        ports,
    })
}

fn policies() -> impl Strategy<Value = Vec<Policy>> {
    let one = (selector(), any::<bool>(), any::<bool>(), proptest::collection::vec(rule(), 0..4));
    proptest::collection::vec(one, 0..5).prop_map(|all| {
        let named = all.into_iter().enumerate().map(|(i, (subject, isolates_ingress, isolates_egress, mut rules))| {
            for (index, rule) in rules.iter_mut().enumerate() {
                rule.index = index;
            }
            Policy { id: id(&format!("p{i}")), subject, isolates_ingress, isolates_egress, rules }
        });
        named.collect()
    })
}

fn identities() -> impl Strategy<Value = BTreeMap<u32, IdentityLabels>> {
    let labels = (
        select(NAMESPACES.to_vec()),
        select(vec!["", "k8s:a=1", "k8s:a=2"]),
        select(vec!["", "k8s:b=1", "k8s:b=2"]),
        select(vec!["", "cirri:named-ports=dns/UDP/81,http/TCP/80", "cirri:named-ports=http/TCP/8080"]),
    );
    let labels = labels.prop_map(|(namespace, a, b, ports)| pod_labels(namespace, &format!("{a};{b};{ports}")));
    proptest::collection::btree_map(256..262u32, labels, 1..5)
}

fn built(identities: &BTreeMap<u32, IdentityLabels>, policies: &[Policy]) -> Cluster {
    let mut cluster = Cluster::default();
    for (&id, labels) in identities {
        cluster.upsert_identity(Identity { id }, labels.clone());
    }
    for policy in policies {
        cluster.upsert_policy(policy.clone()).unwrap();
    }
    cluster
}

/// What can happen to an agent.
#[derive(Clone, Debug)]
enum Event {
    Put(Policy),
    Remove(usize),
    Identity(u32, IdentityLabels),
    Gone(u32),
    Restart,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let one = prop_oneof![
        6 => policies().prop_map(|all| all.into_iter().map(Event::Put).collect()),
        2 => (0..5usize).prop_map(|number| vec![Event::Remove(number)]),
        3 => identities().prop_map(|all| all.into_iter().map(|(id, labels)| Event::Identity(id, labels)).collect()),
        1 => (256..262u32).prop_map(|id| vec![Event::Gone(id)]),
        1 => Just(vec![Event::Restart]),
    ];
    proptest::collection::vec(one, 1..8).prop_map(|all: Vec<Vec<Event>>| all.into_iter().flatten().collect())
}

/// An agent whose tables are small.
struct Agent {
    cluster: Cluster,
    /// What the store holds.
    policies: BTreeMap<PolicyId, Policy>,
    identities: BTreeMap<u32, IdentityLabels>,
    /// What it saved: the last versions that it let in.
    saved: BTreeMap<PolicyId, Policy>,
    /// What it wrote.
    kernel: BTreeMap<u32, Vec<(PolicyKey, PolicyEntry)>>,
}

impl Agent {
    fn take(&mut self, event: Event) {
        match event {
            Event::Put(policy) => {
                self.policies.insert(policy.id.clone(), policy.clone());
                self.put(policy);
            }
            Event::Remove(number) => {
                let id = id(&format!("p{number}"));
                self.policies.remove(&id);
                self.saved.remove(&id);
                self.cluster.remove_policy(&id);
            }
            Event::Identity(id, labels) => {
                self.identities.insert(id, labels.clone());
                self.cluster.upsert_identity(Identity { id }, labels);
            }
            Event::Gone(id) => {
                self.identities.remove(&id);
                self.kernel.remove(&id);
                self.cluster.remove_identity(Identity { id });
            }
            Event::Restart => {
                self.cluster = Cluster::new(self.cluster.limit, LabelFilter::default());
                for (&id, labels) in &self.identities {
                    self.cluster.upsert_identity(Identity { id }, labels.clone());
                }
                self.saved.values().for_each(|policy| drop(self.cluster.restore_policy(policy.clone())));
                let news = self.policies.values().filter(|policy| self.saved.get(&policy.id) != Some(*policy));
                news.cloned().collect::<Vec<_>>().into_iter().for_each(|policy| self.put(policy));
            }
        }
        for id in self.cluster.retry().accepted {
            self.saved.insert(id.clone(), self.policies[&id].clone());
        }
        for &id in self.identities.keys() {
            let before = self.kernel.get(&id).map_or(&[][..], Vec::as_slice);
            let (rules, _) = super::refused::ruleset(&self.cluster, Identity { id }, before);
            self.kernel.insert(id, rules.entries);
        }
    }

    fn put(&mut self, policy: Policy) {
        if self.cluster.upsert_policy(policy.clone()).is_ok() {
            self.saved.insert(policy.id.clone(), policy);
        }
    }

    /// A cluster with room for all: the policies of the store, and besides a refused one its last version that was let
    /// in.
    fn reference(&self) -> Cluster {
        let mut all = self.policies.clone();
        for (id, old) in self.saved.iter().filter(|(id, old)| self.policies[id] != **old) {
            all.insert(id.stand_in(), Policy { id: id.stand_in(), ..old.clone() });
        }
        built(&self.identities, &all.into_values().collect::<Vec<_>>())
    }
}

type Step<'a> = Box<dyn Fn(&mut Cluster) -> Change + 'a>;

fn tables(cluster: &Cluster) -> Vec<Ruleset> {
    cluster.identities.keys().map(|&id| cluster.compile(Identity { id }).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn tables_answer_like_the_rules(identities in identities(), policies in policies()) {
        let cluster = built(&identities, &policies);
        let mut peers: Vec<(Identity, IdentityLabels)> =
            identities.iter().map(|(&id, labels)| (Identity { id }, labels.clone())).collect();
        peers.push((Identity::WORLD, IdentityLabels::reserved("world")));
        for (&subject, labels) in &identities {
            let rules = cluster.compile(Identity { id: subject }).unwrap();
            let own = Party { identity: Identity { id: subject }, labels: labels.clone(), address: None };
            for (peer, direction) in peers.iter().flat_map(|peer| Direction::BOTH.map(|direction| (peer, direction))) {
                for (address, port) in ADDRESSES.iter().flat_map(|address| PORTS.map(|port| (address, port))) {
                    for protocol in [TCP, UDP, cirri_abi::proto::ICMP] {
                        let address: IpAddr = address.parse().unwrap();
                        let block = cluster.blocks().block_of(address.into());
                        let found = look_up(&rules, peer.0.id, block, direction.number(), protocol, port);
                        let other = Party { identity: peer.0, labels: peer.1.clone(), address: Some(address) };
                        let (from, to) = match direction {
                            Direction::Ingress => (other, own.clone()),
                            Direction::Egress => (own.clone(), other),
                        };
                        let wanted = cluster.explain(&Question { direction, from, to, protocol, port });
                        let allowed = found.flags & policy_flag::ALLOW != 0;
                        prop_assert_eq!(allowed, allows(&rules.entries, [peer.0.id, block], direction, protocol, port));
                        prop_assert_eq!(allowed, wanted.verdict == RuleVerdict::Allow, "{:?}", (peer, address, port));
                        prop_assert_eq!(found.cookie, wanted.cookie, "{:?}", (peer, address, protocol, port));
                    }
                }
            }
        }
    }

    #[test]
    fn nobody_is_more_open_than_the_policies_of_the_store_whatever_happens(events in events(), limit in 4..60usize) {
        let mut agent = Agent {
            cluster: Cluster::new(limit, LabelFilter::default()),
            policies: BTreeMap::new(),
            identities: BTreeMap::new(),
            saved: BTreeMap::new(),
            kernel: BTreeMap::new(),
        };
        for event in events {
            agent.take(event);
            let reference = agent.reference();
            let refused = agent.cluster.refused().count();
            prop_assert_eq!(refused, agent.policies.iter().filter(|(id, policy)| agent.saved.get(id) != Some(*policy)).count());
            for (&subject, labels) in &agent.identities {
                let entries = agent.kernel[&subject].clone();
                prop_assert!(entries.len() <= limit);
                let rules = Ruleset { identity: Identity { id: subject }, isolates_ingress: false, isolates_egress: false, entries };
                let own = Party { identity: Identity { id: subject }, labels: labels.clone(), address: None };
                for ((&peer, peer_labels), direction) in agent.identities.iter().flat_map(|it| Direction::BOTH.map(|direction| (it, direction))) {
                    for (address, port, protocol) in [("10.1.2.1", 80, TCP), ("10.0.0.1", 8080, TCP), ("fd00:1::1", 81, UDP), ("11.0.0.1", 0, TCP)] {
                        let address: IpAddr = address.parse().unwrap();
                        let block = agent.cluster.blocks().block_of(address.into());
                        let found = look_up(&rules, peer, block, direction.number(), protocol, port);
                        let other = Party { identity: Identity { id: peer }, labels: peer_labels.clone(), address: Some(address) };
                        let (from, to) = match direction {
                            Direction::Ingress => (other, own.clone()),
                            Direction::Egress => (own.clone(), other),
                        };
                        let wanted = reference.explain(&Question { direction, from, to, protocol, port });
                        let is_open = found.flags & policy_flag::ALLOW != 0;
                        prop_assert!(!is_open || wanted.verdict == RuleVerdict::Allow, "{subject} {peer} {direction} {address} {port}");
                    }
                }
            }
        }
    }

    #[test]
    fn order_and_history_do_not_show(identities in identities(), policies in policies(), passing in policies()) {
        let straight = built(&identities, &policies);
        let mut winding = Cluster::default();
        for policy in passing.iter().chain(policies.iter().rev()) {
            winding.upsert_policy(policy.clone()).unwrap();
        }
        winding.upsert_identity(Identity { id: 999 }, pod_labels("shop", "k8s:a=1"));
        for (&id, labels) in identities.iter().rev() {
            winding.upsert_identity(Identity { id }, labels.clone());
        }
        for policy in &passing[policies.len().min(passing.len())..] {
            winding.remove_policy(&policy.id);
        }
        winding.remove_identity(Identity { id: 999 });
        prop_assert_eq!(tables(&winding), tables(&straight));
        prop_assert_eq!(contents(&winding), contents(&straight));
    }

    #[test]
    fn whoever_is_not_named_by_a_change_has_the_same_table(
        identities in identities(), policies in policies(), late in policies(), labels in select(vec!["k8s:a=1", "k8s:b=2;cirri:named-ports=http/TCP/80"])
    ) {
        let mut cluster = built(&identities, &policies);
        let new = Identity { id: 400 };
        let mut steps: Vec<Step<'_>> = Vec::new();
        steps.push(Box::new(|cluster| cluster.upsert_identity(new, pod_labels("shop", labels))));
        for policy in &late {
            steps.push(Box::new(|cluster| cluster.upsert_policy(policy.clone()).unwrap()));
        }
        steps.push(Box::new(|cluster| cluster.upsert_identity(new, pod_labels("lab", ""))));
        steps.push(Box::new(|cluster| cluster.remove_identity(new)));
        for policy in &policies {
            steps.push(Box::new(|cluster| cluster.remove_policy(&policy.id)));
        }
        for step in steps {
            let before: BTreeMap<u32, Ruleset> = tables(&cluster).into_iter().map(|rules| (rules.identity.id, rules)).collect();
            let change = step(&mut cluster);
            for (&id, &bound) in &cluster.bounds {
                let entries = cluster.entries_of(Identity { id });
                prop_assert!(entries <= bound, "{} entries, at most {} expected", entries, bound);
            }
            for rules in tables(&cluster) {
                if !change.concerns(rules.identity) {
                    prop_assert_eq!(before.get(&rules.identity.id), Some(&rules));
                }
            }
        }
    }
}
