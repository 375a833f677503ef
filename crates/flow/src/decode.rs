//! From the numbers of an event to a record with names.

use std::net::IpAddr;
use std::time::{Duration, UNIX_EPOCH};

use cirri_abi::{
    Action, Addr, Cookie, Direction, DropReason, EventKind, FlowEvent, Hook, Identity, Port, event_flag, proto,
};

use crate::record::{Backend, Drop, Flow, Icmp, Kind, Lost, Party, Record, Rule, RuleKind, ServicePort, Verdict};

/// Whoever knows what the numbers of an event stand for.
pub trait Names {
    /// The labels that an allocated identity stands for; `None` if it is not known (any more).
    fn labels(&self, identity: Identity) -> Option<Vec<String>>;
    /// The workload or node that has an address.
    fn place(&self, ip: IpAddr) -> Option<Place>;
    /// The rule that a cookie of at least [`Cookie::FIRST_RULE`] names.
    fn rule(&self, cookie: u32) -> Option<RuleText>;
    /// The service and the address of a backend by its number.
    fn backend(&self, number: u32) -> Option<Served>;
    /// The service that is behind an address, port and IP protocol.
    fn service(&self, ip: IpAddr, port: u16, protocol: u8) -> Option<ServicePort>;
}

/// A backend of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// What it serves.
    pub service: ServicePort,
    /// Its address.
    pub ip: IpAddr,
    /// Its port.
    pub port: u16,
}

/// Who has an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Namespace of the workload.
    pub namespace: Option<String>,
    /// Pod.
    pub pod: Option<String>,
    /// Node that it is on, or that it is.
    pub node: Option<String>,
}

/// A rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleText {
    /// `namespace/name` of the policy.
    pub policy: String,
    /// Which of its rules in that direction, from 0.
    pub index: u32,
    /// The rule in words.
    pub text: String,
}

/// Turns events into records.
#[derive(Clone, Debug)]
pub struct Decoder {
    node: String,
    /// Nanoseconds from the start of the monotonic clock to 1970, negated: what to add to an event's
    /// time for the time of day.
    boot_ns: u64,
}

impl Decoder {
    /// For the node of that name, on a machine whose monotonic clock started at `boot_ns`
    /// (nanoseconds since 1970: time of day minus the monotonic clock).
    pub fn new(node: impl Into<String>, boot_ns: u64) -> Decoder {
        Decoder { node: node.into(), boot_ns }
    }

    /// Names one event.
    pub fn decode(&self, event: &FlowEvent, names: &dyn Names) -> Flow {
        let tuple = &event.tuple;
        let time_ns = self.boot_ns.saturating_add(event.time_ns);
        let verdict = match event.verdict {
            cirri_abi::Verdict::FORWARDED => Verdict::Forwarded,
            cirri_abi::Verdict::DROPPED => Verdict::Dropped,
            cirri_abi::Verdict::AUDIT => Verdict::Audit,
            cirri_abi::Verdict::REDIRECTED => Verdict::Redirected,
            _ => Verdict::Unknown,
        };
        let kind = match event.kind {
            EventKind::NEW => Kind::New,
            EventKind::DROP => Kind::Drop,
            EventKind::RENEWED => Kind::Renewed,
            EventKind::CLOSE => Kind::Close,
            _ => Kind::Unknown,
        };
        let dropped = verdict == Verdict::Dropped;
        let reason = DropReason { code: event.reason };
        let (service, backend) = served(event, names);
        let is_icmp = matches!(tuple.proto, proto::ICMP | proto::ICMPV6);
        let mut flow = Flow {
            time: rfc3339(time_ns),
            time_ns,
            verdict,
            kind,
            drop: (event.reason != 0).then(|| Drop {
                code: reason.code,
                name: reason.name().to_owned(),
                text: reason.text().to_owned(),
            }),
            source: party(tuple.src, tuple.sport, tuple.proto, event.src_identity, names),
            destination: party(tuple.dst, tuple.dport, tuple.proto, event.dst_identity, names),
            protocol: protocol_name(tuple.proto),
            ip_version: if tuple.src.is_v4() { 4 } else { 6 },
            tcp_flags: (tuple.proto == proto::TCP).then(|| tcp_flag_names(event.tcp_flags)),
            icmp: is_icmp.then_some(Icmp { kind: event.icmp[0], code: event.icmp[1] }),
            hook: Hook::name(event.hook).to_owned(),
            direction: Direction::name(event.direction).to_owned(),
            endpoint: (event.endpoint != 0).then_some(event.endpoint),
            egress_rule: rule(event.egress_cookie, "egress", names),
            ingress_rule: rule(event.ingress_cookie, "ingress", names),
            generation: event.generation,
            service,
            backend,
            is_reply: event.flags & event_flag::REPLY != 0,
            length: event.length,
            action: (!dropped && event.action != 0).then(|| Action::name(event.action).to_owned()),
            ifindex: event.ifindex,
            node: self.node.clone(),
            summary: String::new(),
        };
        flow.summary = summary(&flow);
        flow
    }

    /// A record of events that were lost at `place`, noticed `time_ns` after boot.
    pub fn lost(&self, place: &str, count: u64, time_ns: u64) -> Record {
        let time = rfc3339(self.boot_ns.saturating_add(time_ns));
        Record::Lost(Lost { time, place: place.to_owned(), count })
    }
}

/// The name of an IP protocol.
pub(crate) fn protocol_name(number: u8) -> String {
    match number {
        proto::TCP => "TCP".to_owned(),
        proto::UDP => "UDP".to_owned(),
        proto::SCTP => "SCTP".to_owned(),
        proto::ICMP => "ICMP".to_owned(),
        proto::ICMPV6 => "ICMPv6".to_owned(),
        other => other.to_string(),
    }
}

/// Nanoseconds since 1970 as RFC 3339, to the nanosecond.
pub fn rfc3339(ns: u64) -> String {
    humantime::format_rfc3339_nanos(UNIX_EPOCH + Duration::from_nanos(ns)).to_string()
}

fn party(ip: Addr, port: Port, protocol: u8, identity: Identity, names: &dyn Names) -> Party {
    let ip = IpAddr::from(ip);
    let place = names.place(ip).unwrap_or_default();
    let labels = match identity.reserved_name() {
        Some(name) => vec![format!("reserved:{name}")],
        None => names.labels(identity).unwrap_or_default(),
    };
    let has_ports = matches!(protocol, proto::TCP | proto::UDP | proto::SCTP);
    Party {
        ip: Some(ip),
        port: has_ports.then(|| port.number()),
        identity: identity.id,
        labels,
        namespace: place.namespace,
        pod: place.pod,
        node: place.node,
    }
}

/// The service of a connection and who serves it.
fn served(event: &FlowEvent, names: &dyn Names) -> (Option<ServicePort>, Option<Backend>) {
    let tuple = &event.tuple;
    if event.backend == 0 {
        // Only who was refused asks for names that no number stands for.
        let refused = event.verdict == cirri_abi::Verdict::DROPPED;
        let asked = || names.service(tuple.dst.into(), tuple.dport.number(), tuple.proto);
        return (refused.then(asked).flatten(), None);
    }
    let number = event.backend;
    match names.backend(number) {
        None => (None, Some(Backend { number, ip: None, port: None, pod: None, node: None })),
        Some(Served { service, ip, port }) => {
            let place = names.place(ip).unwrap_or_default();
            let pod = place.namespace.zip(place.pod).map(|(namespace, pod)| format!("{namespace}/{pod}"));
            (Some(service), Some(Backend { number, ip: Some(ip), port: Some(port), pod, node: place.node }))
        }
    }
}

fn rule(cookie: u32, direction: &str, names: &dyn Names) -> Option<Rule> {
    let plain = |kind, text: String| Rule { kind, cookie, policy: None, index: None, text };
    Some(match cookie {
        Cookie::NONE => return None,
        Cookie::DEFAULT_ALLOW => plain(RuleKind::DefaultAllow, format!("default: no policy selects ({direction})")),
        Cookie::DEFAULT_DENY => plain(RuleKind::DefaultDeny, format!("implicit deny ({direction})")),
        Cookie::OWN_NODE => plain(RuleKind::OwnNode, "own node".to_owned()),
        _ => match names.rule(cookie) {
            Some(found) => Rule {
                kind: RuleKind::Rule,
                cookie,
                policy: Some(found.policy),
                index: Some(found.index),
                text: found.text,
            },
            None => plain(RuleKind::Gone, format!("a rule that was removed since ({direction}, cookie {cookie})")),
        },
    })
}

fn tcp_flag_names(flags: u8) -> String {
    const NAMES: [(u8, &str); 8] = [
        (0x02, "SYN"),
        (0x10, "ACK"),
        (0x01, "FIN"),
        (0x04, "RST"),
        (0x08, "PSH"),
        (0x20, "URG"),
        (0x40, "ECE"),
        (0x80, "CWR"),
    ];
    let set: Vec<&str> = NAMES.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| *name).collect();
    set.join(",")
}

fn summary(flow: &Flow) -> String {
    let mut text = flow.protocol.clone();
    if let Some(flags) = flow.tcp_flags.as_ref().filter(|flags| !flags.is_empty()) {
        text.push_str(&format!(" {flags}"));
    }
    if let Some(icmp) = flow.icmp {
        text.push_str(&format!(" type {} code {}", icmp.kind, icmp.code));
    }
    text.push_str(&format!(
        " from {} to {} {}",
        flow.source.name_and_port(),
        flow.destination.name_and_port(),
        flow.verdict.word()
    ));
    if let Some(service) = service_in_words(flow) {
        text.push_str(&format!(", {service}"));
    }
    if let Some(drop) = &flow.drop {
        text.push_str(&format!(": {} ({})", drop.text, drop.code));
    }
    if let Some(rule) = flow.deciding_rule() {
        text.push_str(&format!(" by {}", rule_in_words(rule)));
    }
    text
}

/// A rule as it stands in lines for people.
pub(crate) fn rule_in_words(rule: &Rule) -> String {
    match (&rule.policy, rule.index) {
        (Some(policy), Some(index)) => format!("policy {policy} rule {index}: {}", rule.text),
        _ => rule.text.clone(),
    }
}

/// The service and who serves it, as they stand in lines for people.
pub(crate) fn service_in_words(flow: &Flow) -> Option<String> {
    match (&flow.service, &flow.backend) {
        (None, None) => None,
        (Some(service), None) => Some(format!("service {service}")),
        (Some(service), Some(backend)) => Some(format!("service {service} by {}", backend.name())),
        (None, Some(backend)) => Some(backend.name()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use cirri_abi::Tuple;

    /// One pod `shop/web` (identity 300, 10.0.0.1), one rule, 17, and one service with one backend, 4.
    pub(crate) struct Shop;

    impl Names for Shop {
        fn labels(&self, identity: Identity) -> Option<Vec<String>> {
            (identity.id == 300).then(|| vec!["k8s:app=web".to_owned()])
        }
        fn place(&self, ip: IpAddr) -> Option<Place> {
            (ip == IpAddr::from([10, 0, 0, 1])).then(|| Place {
                namespace: Some("shop".into()),
                pod: Some("web".into()),
                node: Some("a".into()),
            })
        }
        fn rule(&self, cookie: u32) -> Option<RuleText> {
            (cookie == 17).then(|| RuleText { policy: "shop/web".into(), index: 0, text: "from app=client".into() })
        }
        fn backend(&self, number: u32) -> Option<Served> {
            (number == 4).then(|| Served { service: http(), ip: [10, 0, 0, 1].into(), port: 8080 })
        }
        fn service(&self, ip: IpAddr, port: u16, protocol: u8) -> Option<ServicePort> {
            ((ip, port, protocol) == ([10, 96, 0, 1].into(), 80, proto::TCP)).then(http)
        }
    }

    fn http() -> ServicePort {
        ServicePort { namespace: "shop".into(), name: "web".into(), port: "http".into() }
    }

    pub(crate) fn dropped_syn() -> FlowEvent {
        FlowEvent {
            time_ns: 5,
            tuple: Tuple {
                src: Addr::v4([10, 0, 0, 9]),
                dst: Addr::v4([10, 0, 0, 1]),
                sport: Port::new(40000),
                dport: Port::new(80),
                proto: proto::TCP,
                ..Tuple::default()
            },
            src_identity: Identity::WORLD_IPV4,
            dst_identity: Identity { id: 300 },
            ingress_cookie: Cookie::DEFAULT_DENY,
            kind: EventKind::DROP,
            verdict: cirri_abi::Verdict::DROPPED,
            reason: DropReason::POLICY_DENIED.code,
            hook: Hook::TO_WORKLOAD,
            tcp_flags: 2,
            endpoint: 7,
            ..FlowEvent::default()
        }
    }

    #[test]
    fn a_drop_says_who_and_why() {
        let flow = Decoder::new("a", 1_700_000_000_000_000_000).decode(&dropped_syn(), &Shop);
        assert_eq!(flow.time, "2023-11-14T22:13:20.000000005Z");
        assert_eq!(flow.destination.name(), "shop/web");
        assert_eq!(flow.source.labels, ["reserved:world-ipv4"]);
        assert_eq!(
            flow.summary,
            "TCP SYN from 10.0.0.9 (world-ipv4):40000 to shop/web:80 dropped: Policy denied (133) by implicit deny (ingress)"
        );
        assert_eq!(flow.drop.map(|drop| drop.name).as_deref(), Some("POLICY_DENIED"));
    }

    #[test]
    fn a_rule_is_named_and_a_removed_one_says_so() {
        let mut event = dropped_syn();
        event.verdict = cirri_abi::Verdict::FORWARDED;
        event.reason = 0;
        event.ingress_cookie = 17;
        let decoder = Decoder::new("a", 0);
        let flow = decoder.decode(&event, &Shop);
        assert_eq!(flow.deciding_rule().and_then(|rule| rule.policy.as_deref()), Some("shop/web"));
        event.ingress_cookie = 18;
        let flow = decoder.decode(&event, &Shop);
        assert_eq!(flow.deciding_rule().map(|rule| rule.kind), Some(RuleKind::Gone));
    }

    #[test]
    fn a_service_and_its_backend_are_named_and_a_forgotten_backend_keeps_its_number() {
        let mut event = dropped_syn();
        event.tuple.dst = Addr::v4([10, 96, 0, 1]);
        event.verdict = cirri_abi::Verdict::FORWARDED;
        event.reason = 0;
        event.ingress_cookie = Cookie::NONE;
        event.backend = 4;
        let decoder = Decoder::new("a", 0);
        let flow = decoder.decode(&event, &Shop);
        assert_eq!(
            flow.summary,
            "TCP SYN from 10.0.0.9 (world-ipv4):40000 to 10.96.0.1:80 forwarded, service shop/web:http by shop/web:8080"
        );
        event.backend = 5;
        let flow = decoder.decode(&event, &Shop);
        assert_eq!(flow.backend.map(|backend| backend.name()).as_deref(), Some("backend 5"));
        assert_eq!(flow.service, None);
    }

    #[test]
    fn a_refused_connection_names_the_service_that_nobody_serves() {
        let mut event = dropped_syn();
        event.tuple.dst = Addr::v4([10, 96, 0, 1]);
        event.reason = DropReason::NO_BACKEND.code;
        event.ingress_cookie = Cookie::NONE;
        let flow = Decoder::new("a", 0).decode(&event, &Shop);
        assert!(flow.summary.ends_with("service shop/web:http: Service backend not found (158)"), "{}", flow.summary);
    }

    #[test]
    fn icmp_has_a_type_and_no_port() {
        let mut event = dropped_syn();
        event.tuple.proto = proto::ICMP;
        event.icmp = [8, 0];
        let flow = Decoder::new("a", 0).decode(&event, &Shop);
        assert_eq!((flow.source.port, flow.tcp_flags, flow.icmp), (None, None, Some(Icmp { kind: 8, code: 0 })));
    }

    #[test]
    fn json_reads_back() {
        let flow = Decoder::new("a", 0).decode(&dropped_syn(), &Shop);
        let record = Record::Flow(Box::new(flow));
        let text = serde_json::to_string(&record).unwrap();
        assert!(text.starts_with(r#"{"record":"flow""#), "{text}");
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
    }
}
