//! Every crash that was found, as a named case; and the targets on simple inputs of their own.

use cirri_fuzz::{packets, policies};

#[test]
fn nothing_at_all() {
    packets(&[]);
    policies(&[]);
}

#[test]
fn packets_of_every_length_at_every_hook() {
    for kind in 0..=255 {
        for units in 0..20 {
            let mut input = vec![kind, units];
            input.extend((0..units as usize * 8).map(|at| {
                if at == 12 {
                    8
                } else if at == 14 {
                    0x45
                } else {
                    0
                }
            }));
            packets(&input);
        }
    }
}

#[test]
fn random_packets() {
    let mut state = 0x1234_5678_u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    for _ in 0..20_000 {
        let input: Vec<u8> = (0..200).map(|_| random()).collect();
        packets(&input);
    }
}

#[test]
fn manifests_that_are_none() {
    for text in ["---", "a: [", "kind: NetworkPolicy", "{}", "kind: Pod\nmetadata: {name: a}\n---\nkind: NetworkPolicy"]
    {
        policies(text.as_bytes());
    }
}

#[test]
fn a_policy_with_a_range_and_a_block() {
    policies(
        br#"{kind: Pod, apiVersion: v1, metadata: {name: a, namespace: x, labels: {app: a}}, spec: {containers: []}}
---
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: p, namespace: x}
spec:
  podSelector: {}
  ingress:
  - from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}]
    ports: [{port: 1, endPort: 65535}]
"#,
    );
}
