//! What comes first where rule sets change together.

use super::*;
use cirri_abi::Cookie;
use proptest::prelude::*;
use std::collections::BTreeMap;

type Rules = Vec<(PolicyKey, PolicyEntry)>;

const BLOCK: u32 = Identity::MIN_BLOCK;
const PEERS: [u32; 4] = [0, CLIENT.id, OTHER.id, BLOCK];
/// Any protocol; TCP; four ports, two, and one.
const PREFIXES: [(u32, u8, u16); 7] =
    [(40, 0, 0), (48, TCP, 0), (48, UDP, 0), (62, TCP, 0), (63, TCP, 2), (64, TCP, 2), (64, TCP, 5)];

fn entry(peer: u32, (prefix_len, proto, port): (u32, u8, u16), precedence: u32, flags: u8) -> (PolicyKey, PolicyEntry) {
    let key = PolicyKey { prefix_len, peer, direction: IN, proto, port: port.to_be_bytes() };
    (key, PolicyEntry { precedence, flags, prefix_len: prefix_len as u8, ..PolicyEntry::default() })
}

/// Every question that the rules of these tests tell apart: who asks, and for what.
fn questions() -> impl Iterator<Item = ([u32; 2], u8, u16)> {
    let who = [[CLIENT.id, 0], [OTHER.id, 0], [CLIENT.id, BLOCK], [OTHER.id, BLOCK]];
    let what = (0..8).map(|port| (TCP, port)).chain([(UDP, 0)]);
    who.into_iter().flat_map(move |who| what.clone().map(move |(proto, port)| (who, proto, port)))
}

fn allowed(rules: &Rules, (who, proto, port): ([u32; 2], u8, u16)) -> bool {
    allows(rules, who, Direction::Ingress, proto, port)
}

/// Whether peers are one rule set's by identity and the other's by block, or both of one.
fn is_mixed(all: [&Rules; 2], [identity, block]: [u32; 2]) -> bool {
    let names = |peer: u32| all.iter().any(|rules| rules.iter().any(|(key, _)| key.peer == peer));
    block != 0 && names(block) && names(identity)
}

fn rules() -> impl Strategy<Value = Rules> {
    let one = (prop::sample::select(&PEERS[..]), prop::sample::select(&PREFIXES[..]), 0u32..4, 0u8..2);
    prop::collection::vec(one, 0..8).prop_map(|all| {
        let entries = all.into_iter().map(|(peer, prefix, precedence, flags)| entry(peer, prefix, precedence, flags));
        // As a table of the kernel: one a key.
        let table: BTreeMap<_, _> =
            entries.map(|it| ((it.0.peer, it.0.prefix_len, it.0.proto, it.0.port), it)).collect();
        table.into_values().collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]
    #[test]
    fn nothing_passes_on_the_way_that_neither_end_of_it_allows(before in rules(), after in rules()) {
        let step = closing(&before, &after);
        for question in questions() {
            let (was, is) = (allowed(&before, question), allowed(&after, question));
            match &step {
                Closing::Nothing => prop_assert!(is || !was, "{question:?} is closed"),
                Closing::All => prop_assert!(was || !is, "{question:?} is opened"),
                Closing::Part(part) => {
                    let passes = allowed(part, question);
                    prop_assert!(!passes || (was && is), "{question:?} passes by {part:?}");
                    prop_assert!(passes || !(was && is) || is_mixed([&before, &after], question.0), "{question:?} does not");
                }
            }
        }
    }
}

/// A default, and who is allowed by a rule.
fn ruleset(default: u8, peers: &[u32]) -> Rules {
    let allow = |peer: &u32| entry(*peer, PREFIXES[1], 9, policy_flag::ALLOW);
    let cookie = if default == 0 { Cookie::DEFAULT_DENY } else { Cookie::DEFAULT_ALLOW };
    let (key, any) = entry(0, PREFIXES[0], 0, default);
    std::iter::once((key, PolicyEntry { cookie, ..any })).chain(peers.iter().map(allow)).collect()
}

#[test]
fn what_closes_comes_first_as_it_is_or_in_part() {
    let (open, shut) = (ruleset(policy_flag::ALLOW, &[]), ruleset(0, &[]));
    let (client, other) = (ruleset(0, &[CLIENT.id]), ruleset(0, &[OTHER.id]));
    assert_eq!(closing(&client, &client), Closing::Nothing);
    assert_eq!(closing(&shut, &client), Closing::Nothing);
    assert_eq!(closing(&client, &open), Closing::Nothing);
    assert_eq!(closing(&open, &client), Closing::All);
    assert_eq!(closing(&client, &shut), Closing::All);
    let Closing::Part(part) = closing(&client, &other) else { panic!("one is closed and one is opened") };
    assert!(questions().all(|question| !allowed(&part, question)));
    let both = ruleset(0, &[CLIENT.id, OTHER.id]);
    let Closing::Part(part) = closing(&both, &ruleset(0, &[OTHER.id, WEB.id])) else { panic!("the same") };
    assert!(allowed(&part, ([OTHER.id, 0], TCP, 80)) && !allowed(&part, ([CLIENT.id, 0], TCP, 80)));
    assert!(!allowed(&part, ([WEB.id, 0], TCP, 80)));
    // What is only audited passes, and goes on being reported.
    let audited = [shut[0], entry(OTHER.id, PREFIXES[1], 9, policy_flag::AUDIT)];
    let Closing::Part(part) = closing(&both, &[&audited[..], &[entry(WEB.id, PREFIXES[1], 9, 1)]].concat()) else {
        panic!("the same")
    };
    let of_other = part.iter().find(|(key, _)| key.peer == OTHER.id && key.prefix_len == 48).unwrap().1;
    assert_eq!(of_other.flags, policy_flag::AUDIT);
}

#[test]
fn of_equals_it_counts_whether_one_or_anybody_is_denied() {
    let block = entry(BLOCK, PREFIXES[0], 3, policy_flag::ALLOW);
    let (before, after) = (vec![entry(CLIENT.id, PREFIXES[0], 3, 0), block], vec![entry(0, PREFIXES[0], 3, 0), block]);
    let question = ([CLIENT.id, BLOCK], TCP, 0);
    assert!(!allowed(&before, question) && allowed(&after, question));
    assert!(matches!(closing(&before, &after), Closing::Part(_)), "it opens that, and closes others");
    assert!(matches!(closing(&after, &before), Closing::Part(_)));
}

#[test]
fn what_does_not_fit_in_between_is_closed() {
    // Each of 2,000 peers would need what is said of anybody's 60 ports.
    let ports: Rules = (0..60).map(|port| entry(0, (64, TCP, port), 9, policy_flag::ALLOW)).collect();
    let peers: Rules = (1000..3000).map(|peer| entry(peer, PREFIXES[1], 9, policy_flag::ALLOW)).collect();
    let (shut, both) = (ruleset(0, &[]), [&ports[..], &peers[..]].concat());
    let before = [&shut[..], &both[..]].concat();
    let after = [&shut[..], &both[1..], &ruleset(0, &[5])[1..]].concat();
    let Closing::Part(part) = closing(&before, &after) else { panic!("one is closed and one is opened") };
    assert_eq!(part, closed(Identity::UNKNOWN).entries);
}
