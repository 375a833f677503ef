//! What the layouts mean: forms of an address, turned and rewritten tuples, the order of precedence.

use std::net::IpAddr;

use cirri_abi::{Addr, Port, Recipe, Rewrite, Tuple, precedence};

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

fn tuple(src: &str, sport: u16, dst: &str, dport: u16) -> Tuple {
    Tuple {
        src: addr(src),
        dst: addr(dst),
        sport: Port::new(sport),
        dport: Port::new(dport),
        proto: 6,
        ..Tuple::default()
    }
}

#[test]
fn an_address_keeps_its_family_and_stands_in_network_order() {
    let v4 = addr("10.1.2.3");
    assert!(v4.is_v4());
    assert_eq!(v4.octets(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3]);
    assert_eq!(v4.word().to_ne_bytes(), [10, 1, 2, 3]);
    assert_eq!(IpAddr::from(v4).to_string(), "10.1.2.3");
    let v6 = addr("2001:db8::1");
    assert!(!v6.is_v4() && !Addr::UNSPECIFIED.is_v4());
    assert_eq!(IpAddr::from(v6).to_string(), "2001:db8::1");
    assert_eq!(Port::new(8472).be.to_ne_bytes(), [0x21, 0x18]);
}

#[test]
fn the_answer_of_a_masqueraded_packet_leads_back_to_its_sender() {
    let out = tuple("10.1.2.3", 40_000, "192.0.2.1", 443);
    let forward = Recipe {
        rewrite: Rewrite::SOURCE,
        source: addr("172.16.0.1"),
        source_port: Port::new(50_000),
        ..Recipe::default()
    };
    let answer = out.rewritten(&forward).turned();
    assert_eq!(answer, tuple("192.0.2.1", 443, "172.16.0.1", 50_000));
    let reverse = Recipe {
        rewrite: Rewrite::DESTINATION,
        destination: out.src,
        destination_port: out.sport,
        ..Recipe::default()
    };
    assert_eq!(answer.rewritten(&reverse).turned(), out);
    assert_eq!(out.key4().tuple(), out);
}

#[test]
fn a_deny_beats_an_allow_of_its_priority_and_loses_to_a_stronger_one() {
    let (deny, allow) = (255, 1);
    assert!(precedence(5, deny) > precedence(5, allow));
    assert!(precedence(4, allow) > precedence(5, deny));
    assert!(precedence(0xff_ffff, allow) > 0, "the default entries have precedence 0");
}

#[test]
fn the_answer_of_a_connection_with_both_ends_rewritten_leads_back_to_its_client() {
    let client = tuple("198.51.100.10", 40_000, "172.31.255.11", 30_080);
    let forward = Recipe {
        rewrite: Rewrite::BOTH,
        source: addr("172.31.255.11"),
        source_port: Port::new(50_000),
        destination: addr("10.244.1.2"),
        destination_port: Port::new(8080),
        ..Recipe::default()
    };
    let answer = client.rewritten(&forward).turned();
    assert_eq!(answer, tuple("10.244.1.2", 8080, "172.31.255.11", 50_000));
    let reverse = Recipe {
        rewrite: Rewrite::BOTH,
        source: client.dst,
        source_port: client.dport,
        destination: client.src,
        destination_port: client.sport,
        ..Recipe::default()
    };
    assert_eq!(answer.rewritten(&reverse).turned(), client);
}
