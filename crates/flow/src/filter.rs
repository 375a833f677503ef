//! Which records a reader wants.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::record::{Flow, Party, Record};

/// Picks records: every field that is not empty must match (AND), by any of its values (OR).
///
/// A [`crate::Lost`] record passes every filter: nobody knows what was in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// Namespace of either end.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespace: Vec<String>,
    /// Either end: `pod` (any namespace) or `namespace/pod`; a trailing `*` matches the rest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pod: Vec<String>,
    /// The sender, written like `pod`, or an address or prefix.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<String>,
    /// The receiver, written like `from`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<String>,
    /// Address or prefix of either end.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ip: Vec<String>,
    /// Port of either end.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub port: Vec<u16>,
    /// `TCP`, `UDP`, `SCTP`, `ICMP`, `ICMPv6` or a number; case does not matter.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub protocol: Vec<String>,
    /// `forwarded`, `dropped`, `audit`, `redirected`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub verdict: Vec<String>,
    /// Drop reason: its number or its name, as `133` or `POLICY_DENIED`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reason: Vec<String>,
    /// Identity of either end: a number or a reserved name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub identity: Vec<String>,
    /// The service: `service` (any namespace) or `namespace/service`; a trailing `*` matches the rest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service: Vec<String>,
    /// `new`, `drop`, `renewed`, `close`.
    #[serde(rename = "type", skip_serializing_if = "Vec::is_empty")]
    pub kind: Vec<String>,
}

/// A filter that cannot match anything, and why.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FilterError {
    /// Not an address or prefix.
    #[error("`{0}` is neither an address nor a prefix; write 10.0.0.1, fd00::/64 or the like")]
    Address(String),
    /// Not one of the words that a field knows.
    #[error("`{value}` is no {field}; use one of: {known}")]
    Word {
        /// The field.
        field: &'static str,
        /// What stood there.
        value: String,
        /// What may stand there.
        known: &'static str,
    },
    /// Not a reason.
    #[error("`{0}` is no drop reason; use a number (133) or a name (POLICY_DENIED)")]
    Reason(String),
}

impl Filter {
    /// Refuses values that can never match: a typing error must not look like silence.
    ///
    /// # Errors
    /// Names the first such value and what may stand there.
    pub fn check(&self) -> Result<(), FilterError> {
        for ip in &self.ip {
            parse_net(ip).ok_or_else(|| FilterError::Address(ip.clone()))?;
        }
        words("verdict", &self.verdict, "forwarded, dropped, audit, redirected")?;
        words("type", &self.kind, "new, drop, renewed, close")?;
        for reason in &self.reason {
            let known = cirri_abi::DropReason::ALL
                .iter()
                .any(|known| reason.eq_ignore_ascii_case(known.name()) || reason.parse() == Ok(known.code));
            if !known {
                return Err(FilterError::Reason(reason.clone()));
            }
        }
        Ok(())
    }

    /// Whether a reader with this filter wants the record.
    pub fn matches(&self, record: &Record) -> bool {
        match record {
            Record::Lost(_) => true,
            Record::Flow(flow) => self.matches_flow(flow),
        }
    }

    fn matches_flow(&self, flow: &Flow) -> bool {
        let ends = [&flow.source, &flow.destination];
        let either = |test: &dyn Fn(&Party) -> bool| ends.iter().any(|end| test(end));
        any(&self.namespace, |want| either(&|end| end.namespace.as_deref() == Some(want.as_str())))
            && any(&self.pod, |want| either(&|end| is_pod(end, want)))
            && any(&self.from, |want| is_party(&flow.source, want))
            && any(&self.to, |want| is_party(&flow.destination, want))
            && any(&self.ip, |want| either(&|end| is_in(end, want)))
            && any(&self.port, |want| either(&|end| end.port == Some(*want)))
            && any(&self.protocol, |want| want.eq_ignore_ascii_case(&flow.protocol))
            && any(&self.verdict, |want| want.eq_ignore_ascii_case(flow.verdict.word()))
            && any(&self.reason, |want| {
                flow.drop
                    .as_ref()
                    .is_some_and(|drop| want.eq_ignore_ascii_case(&drop.name) || want.parse::<u8>() == Ok(drop.code))
            })
            && any(&self.identity, |want| either(&|end| is_identity(end, want)))
            && any(&self.service, |want| {
                flow.service.as_ref().is_some_and(|service| is_named(&service.namespace, &service.name, want))
            })
            && any(&self.kind, |want| want.eq_ignore_ascii_case(flow.kind.word()))
    }
}

fn any<T>(wanted: &[T], test: impl Fn(&T) -> bool) -> bool {
    wanted.is_empty() || wanted.iter().any(test)
}

fn words(field: &'static str, values: &[String], known: &'static str) -> Result<(), FilterError> {
    for value in values {
        if !known.split(", ").any(|word| word.eq_ignore_ascii_case(value)) {
            return Err(FilterError::Word { field, value: value.clone(), known });
        }
    }
    Ok(())
}

fn is_party(end: &Party, want: &str) -> bool {
    if parse_net(want).is_some() { is_in(end, want) } else { is_pod(end, want) }
}

fn is_pod(end: &Party, want: &str) -> bool {
    let (Some(namespace), Some(pod)) = (&end.namespace, &end.pod) else { return false };
    is_named(namespace, pod, want)
}

fn is_named(namespace: &str, name: &str, want: &str) -> bool {
    match want.split_once('/') {
        Some((want_namespace, want_name)) => want_namespace == namespace && glob(want_name, name),
        None => glob(want, name),
    }
}

fn glob(want: &str, name: &str) -> bool {
    match want.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => want == name,
    }
}

fn is_in(end: &Party, want: &str) -> bool {
    match (end.ip, parse_net(want)) {
        (Some(ip), Some(net)) => net.contains(&ip),
        _ => false,
    }
}

fn is_identity(end: &Party, want: &str) -> bool {
    match want.parse::<u32>() {
        Ok(number) => end.identity == number,
        Err(_) => end.labels.iter().any(|label| label.strip_prefix("reserved:") == Some(want)),
    }
}

fn parse_net(text: &str) -> Option<IpNet> {
    text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Decoder, tests};

    fn record() -> Record {
        let event = cirri_abi::FlowEvent { backend: 4, ..tests::dropped_syn() };
        Record::Flow(Box::new(Decoder::new("a", 0).decode(&event, &tests::Shop)))
    }

    fn strings(values: &[&str]) -> Vec<String> {
        values.iter().map(|value| (*value).to_owned()).collect()
    }

    #[test]
    fn values_of_one_field_are_alternatives_and_fields_must_all_hold() {
        let record = record();
        let mut filter = Filter { port: vec![443, 80], ..Filter::default() };
        assert!(filter.matches(&record));
        filter.verdict = strings(&["forwarded"]);
        assert!(!filter.matches(&record));
        filter.verdict.push("DROPPED".to_owned());
        assert!(filter.matches(&record));
    }

    #[test]
    fn every_field_can_say_yes_and_no() {
        type Set = fn(&mut Filter, Vec<String>);
        let cases: [(Set, &str, &str); 10] = [
            (|f, v| f.namespace = v, "shop", "other"),
            (|f, v| f.pod = v, "shop/w*", "other/web"),
            (|f, v| f.from = v, "10.0.0.0/24", "web"),
            (|f, v| f.to = v, "web", "10.0.0.9"),
            (|f, v| f.ip = v, "10.0.0.9", "10.0.0.8"),
            (|f, v| f.protocol = v, "tcp", "udp"),
            (|f, v| f.reason = v, "policy_denied", "130"),
            (|f, v| f.identity = v, "world-ipv4", "301"),
            (|f, v| f.service = v, "shop/web", "other/*"),
            (|f, v| f.kind = v, "drop", "new"),
        ];
        for (set, yes, no) in cases {
            let mut filter = Filter::default();
            set(&mut filter, strings(&[yes]));
            assert!(filter.matches(&record()), "{yes}");
            assert_eq!(filter.check(), Ok(()));
            set(&mut filter, strings(&[no]));
            assert!(!filter.matches(&record()), "{no}");
        }
    }

    #[test]
    fn a_loss_passes_every_filter() {
        let lost = Decoder::new("a", 0).lost("reader", 1, 0);
        assert!(Filter { port: vec![1], ..Filter::default() }.matches(&lost));
    }

    #[test]
    fn values_that_cannot_match_are_refused() {
        let bad = Filter { verdict: strings(&["droped"]), ..Filter::default() };
        assert!(bad.check().unwrap_err().to_string().contains("forwarded, dropped"));
        let bad = Filter { reason: strings(&["12"]), ..Filter::default() };
        assert_eq!(bad.check(), Err(FilterError::Reason("12".into())));
        let bad = Filter { ip: strings(&["10.0.0"]), ..Filter::default() };
        assert_eq!(bad.check(), Err(FilterError::Address("10.0.0".into())));
    }
}
