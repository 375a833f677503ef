//! Spans of time that a user may choose: bounded where they are read, so that none is longer than a clock can count.

use std::time::{Duration, Instant};

use clap::builder::RangedU64ValueParser;

/// Longest span of an option: 30 days, in seconds.
const LONGEST_S: u64 = 30 * 24 * 60 * 60;

/// Reads an option in seconds.
pub fn seconds() -> RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(..=LONGEST_S)
}

/// Reads an option in milliseconds.
pub fn milliseconds() -> RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(..=LONGEST_S * 1000)
}

/// When a span is over that begins now. One that no option took (a record may say anything) ends with the longest.
pub fn from_now(span: Duration) -> Instant {
    Instant::now() + span.min(Duration::from_secs(LONGEST_S))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_span_is_longer_than_a_clock_can_count() {
        assert!(from_now(Duration::MAX) > Instant::now());
        assert!(from_now(Duration::from_secs(1)) <= Instant::now() + Duration::from_secs(1));
    }
}
