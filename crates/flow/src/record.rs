//! The record that users see. Its JSON is an interface: fields are added, never changed.

use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// One line of the flow log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Record {
    /// Something happened to a connection.
    Flow(Box<Flow>),
    /// Something happened that nobody will learn about.
    Lost(Lost),
}

/// Events that did not arrive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lost {
    /// When the loss was noticed, RFC 3339 with nanoseconds.
    pub time: String,
    /// Where: `kernel-ring` (the packet path found its ring full) or `reader` (a follower was too
    /// slow and the ring in memory went over it).
    pub place: String,
    /// How many.
    pub count: u64,
}

/// One thing that happened to a connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    /// When, RFC 3339 with nanoseconds.
    pub time: String,
    /// The same, nanoseconds since 1970.
    pub time_ns: u64,
    /// What happened to the packet.
    pub verdict: Verdict,
    /// What the event is about.
    pub kind: Kind,
    /// Why it was dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop: Option<Drop>,
    /// Who sent the packet.
    pub source: Party,
    /// Whom it was for.
    pub destination: Party,
    /// `TCP`, `UDP`, `SCTP`, `ICMP`, `ICMPv6`, or the protocol's number.
    pub protocol: String,
    /// 4 or 6.
    pub ip_version: u8,
    /// TCP flags, as `SYN,ACK`; only for TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_flags: Option<String>,
    /// ICMP type and code; only for ICMP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp: Option<Icmp>,
    /// Where the packet was met: `from-workload`, `to-workload`, `from-network`, ...
    pub hook: String,
    /// `ingress` or `egress`, as the endpoint sees it.
    pub direction: String,
    /// Number of the endpoint on this node that the verdict is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<u16>,
    /// The rule asked for leaving the sender.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_rule: Option<Rule>,
    /// The rule asked for entering the receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress_rule: Option<Rule>,
    /// Epoch of the rule set that decided.
    pub generation: u32,
    /// The service that the connection is for, if it is for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServicePort>,
    /// Who was chosen to serve it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<Backend>,
    /// Whether the packet answers.
    pub is_reply: bool,
    /// Length of the packet from the Ethernet header on, bytes.
    pub length: u32,
    /// What the decision does: `local`, `tunnel`, `device`, `continue`; absent for drops.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// Index of the device that the packet was met on.
    pub ifindex: u32,
    /// Name of the node that saw it.
    pub node: String,
    /// One sentence that says it all.
    pub summary: String,
}

/// What happened to the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Passed on.
    Forwarded,
    /// Dropped; the reason says why.
    Dropped,
    /// Passed, though a rule that only audits would have dropped it.
    Audit,
    /// Sent to a proxy.
    Redirected,
    /// A number that this version does not know.
    Unknown,
}

/// What the event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A connection was decided on and may begin.
    New,
    /// A packet was dropped.
    Drop,
    /// A connection was decided on again, because something it rests on changed.
    Renewed,
    /// A FIN or RST went by.
    Close,
    /// A number that this version does not know.
    Unknown,
}

/// Why a packet was dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drop {
    /// The number that people know from Cilium, 130 to 255.
    pub code: u8,
    /// Its name, as `POLICY_DENIED`.
    pub name: String,
    /// Its text, as `Policy denied`.
    pub text: String,
}

/// One end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Party {
    /// Its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// Its port; absent for protocols without ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The number that stands for its labels.
    pub identity: u32,
    /// Those labels, sorted, as `k8s:app=web`.
    pub labels: Vec<String>,
    /// Its namespace, if it is a workload that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its pod, if it is a workload that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The node it is on, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// A port of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Namespace of the service.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The port's name, or its number if it has none.
    pub port: String,
}

/// Who serves a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Its number in the tables.
    pub number: u32,
    /// Its address; absent if the number is not known (any more).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// Its port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// `namespace/pod`, if it is a workload that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The node it is on, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// ICMP type and code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Icmp {
    /// The type.
    #[serde(rename = "type")]
    pub kind: u8,
    /// The code.
    pub code: u8,
}

/// What decided in one direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// What sort of answer it was.
    pub kind: RuleKind,
    /// The number in the tables.
    pub cookie: u32,
    /// `namespace/name` of the policy; only for [`RuleKind::Rule`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Which of its rules in that direction, from 0; only for [`RuleKind::Rule`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    /// In words.
    pub text: String,
}

/// Sorts of answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuleKind {
    /// A rule of a policy.
    Rule,
    /// No policy selects the endpoint in this direction, so that everything may pass.
    DefaultAllow,
    /// Policies select the endpoint and none of their rules allows it.
    DefaultDeny,
    /// Traffic between a workload and its own node always passes.
    OwnNode,
    /// A rule that is no longer known: it was removed between the verdict and now.
    Gone,
}

impl Record {
    /// When, RFC 3339.
    pub fn time(&self) -> &str {
        match self {
            Record::Flow(flow) => &flow.time,
            Record::Lost(lost) => &lost.time,
        }
    }
}

impl Verdict {
    /// The word for people.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Forwarded => "forwarded",
            Verdict::Dropped => "dropped",
            Verdict::Audit => "audit",
            Verdict::Redirected => "redirected",
            Verdict::Unknown => "unknown",
        }
    }
}

impl Kind {
    /// The word for people.
    pub fn word(self) -> &'static str {
        match self {
            Kind::New => "new",
            Kind::Drop => "drop",
            Kind::Renewed => "renewed",
            Kind::Close => "close",
            Kind::Unknown => "unknown",
        }
    }
}

impl Flow {
    /// The rule that the verdict is due to: of a drop the one that refused, else the one of the
    /// flow's own direction, else any that was asked.
    pub fn deciding_rule(&self) -> Option<&Rule> {
        let (own, other) = if self.direction == "egress" {
            (self.egress_rule.as_ref(), self.ingress_rule.as_ref())
        } else {
            (self.ingress_rule.as_ref(), self.egress_rule.as_ref())
        };
        if self.verdict == Verdict::Dropped {
            for rule in [own, other].into_iter().flatten() {
                if rule.kind == RuleKind::DefaultDeny {
                    return Some(rule);
                }
            }
        }
        own.or(other)
    }
}

impl Backend {
    /// The pod or the address, and the port; the number alone if nothing else is known.
    pub fn name(&self) -> String {
        match (self.ip, self.port, &self.pod) {
            (Some(_), Some(port), Some(pod)) => format!("{pod}:{port}"),
            (Some(ip), Some(port), None) => std::net::SocketAddr::new(ip, port).to_string(),
            _ => format!("backend {}", self.number),
        }
    }
}

impl std::fmt::Display for ServicePort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}:{}", self.namespace, self.name, self.port)
    }
}

impl Party {
    /// `namespace/pod`, or what is known instead: a reserved name, or the address.
    pub fn name(&self) -> String {
        match (&self.namespace, &self.pod) {
            (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
            _ => {
                let reserved = self.labels.iter().find_map(|label| label.strip_prefix("reserved:"));
                match (reserved, self.ip) {
                    (Some(reserved), Some(ip)) if reserved != "unknown" => format!("{ip} ({reserved})"),
                    (_, Some(ip)) => ip.to_string(),
                    (Some(reserved), None) => reserved.to_owned(),
                    (None, None) => "?".to_owned(),
                }
            }
        }
    }

    /// [`Party::name`] and the port.
    pub fn name_and_port(&self) -> String {
        match self.port {
            Some(port) if self.pod.is_none() && self.ip.is_some_and(|ip| ip.is_ipv6()) => {
                format!("[{}]:{port}", self.name())
            }
            Some(port) => format!("{}:{port}", self.name()),
            None => self.name(),
        }
    }
}
