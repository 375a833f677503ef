//! One line per record, for people.

use crate::decode::{rule_in_words, service_in_words};
use crate::record::{Record, Verdict};

const RED: &str = "\x1b[31m";
const GREEN: &str = "\x1b[32m";
const YELLOW: &str = "\x1b[33m";
const DIM: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

/// One line without colours.
pub fn compact(record: &Record) -> String {
    compact_with(record, false)
}

/// One line, with colours if asked:
/// `10:00:00.000 dropped new a shop/client:4000 -> shop/web:80 TCP SYN  Policy denied (133)  [implicit deny]`.
pub fn compact_with(record: &Record, colour: bool) -> String {
    let paint = |code: &str, text: &str| if colour { format!("{code}{text}{RESET}") } else { text.to_owned() };
    let clock = record.time().get(11..23).unwrap_or(record.time());
    let flow = match record {
        Record::Flow(flow) => flow,
        Record::Lost(lost) => {
            let text = format!("{} events were lost ({})", lost.count, lost.place);
            return format!("{} {}", paint(DIM, clock), paint(YELLOW, &text));
        }
    };
    let verdict_colour = match flow.verdict {
        Verdict::Forwarded | Verdict::Redirected => GREEN,
        Verdict::Dropped => RED,
        Verdict::Audit | Verdict::Unknown => YELLOW,
    };
    let mut line = format!(
        "{} {} {} {} {} {} {} {}",
        paint(DIM, clock),
        paint(verdict_colour, &format!("{:<9}", flow.verdict.word())),
        flow.node,
        flow.source.name_and_port(),
        if flow.is_reply { "<-" } else { "->" },
        flow.destination.name_and_port(),
        flow.protocol,
        flow.direction,
    );
    if let Some(flags) = flow.tcp_flags.as_deref().filter(|flags| !flags.is_empty()) {
        line.push_str(&format!(" {flags}"));
    }
    if let Some(icmp) = flow.icmp {
        line.push_str(&format!(" type {} code {}", icmp.kind, icmp.code));
    }
    match &flow.drop {
        Some(drop) => line.push_str(&format!("  {}", paint(RED, &format!("{} ({})", drop.text, drop.code)))),
        None => line.push_str(&format!(" {}", flow.kind.word())),
    }
    if let Some(service) = service_in_words(flow) {
        line.push_str(&format!("  {service}"));
    }
    if let Some(rule) = flow.deciding_rule() {
        line.push_str(&format!("  {}", paint(DIM, &format!("[{}]", rule_in_words(rule)))));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Decoder, tests};

    #[test]
    fn a_line_names_both_ends_the_reason_and_the_rule() {
        let flow = Decoder::new("a", 0).decode(&tests::dropped_syn(), &tests::Shop);
        let record = Record::Flow(Box::new(flow));
        assert_eq!(
            compact(&record),
            "00:00:00.000 dropped   a 10.0.0.9 (world-ipv4):40000 -> shop/web:80 TCP ingress SYN  Policy denied (133)  [implicit deny (ingress)]"
        );
        assert!(compact_with(&record, true).contains(RED));
    }

    #[test]
    fn a_loss_is_a_line_too() {
        let record = Decoder::new("a", 0).lost("kernel-ring", 12, 0);
        assert_eq!(compact(&record), "00:00:00.000 12 events were lost (kernel-ring)");
    }
}
