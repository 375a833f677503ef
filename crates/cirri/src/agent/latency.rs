//! How long changes take from being seen to being in force.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::api::LatencyInfo;

/// The newest of them.
#[derive(Debug, Default)]
pub struct Latency {
    /// When the first change that is not in force yet was seen.
    since: Option<Instant>,
    newest: VecDeque<Duration>,
    count: u64,
}

/// Changes that are kept.
const KEPT: usize = 4096;

impl Latency {
    /// Something changed. What follows before it is in force belongs to it.
    pub fn seen(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// Everything that was seen is in force.
    pub fn in_force(&mut self, now: Instant) {
        let Some(since) = self.since.take() else { return };
        self.count += 1;
        if self.newest.len() == KEPT {
            self.newest.pop_front();
        }
        self.newest.push_back(now.saturating_duration_since(since));
    }

    /// For `cirri status`.
    pub fn info(&self) -> LatencyInfo {
        let mut sorted: Vec<_> = self.newest.iter().copied().collect();
        sorted.sort_unstable();
        let at = |percent: usize| {
            let index = sorted.len().saturating_sub(1) * percent / 100;
            sorted.get(index).map_or(0, |took| took.as_micros().try_into().unwrap_or(u64::MAX))
        };
        let last = self.newest.back().map_or(0, |took| took.as_micros().try_into().unwrap_or(u64::MAX));
        LatencyInfo { count: self.count, last_us: last, p50_us: at(50), p99_us: at(99), max_us: at(100) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_that_come_before_the_first_is_in_force_count_as_one() {
        let (start, micros) = (Instant::now(), Duration::from_micros);
        let mut latency = Latency::default();
        latency.in_force(start);
        assert_eq!(latency.info(), LatencyInfo::default());
        latency.seen(start);
        latency.seen(start + micros(10));
        latency.in_force(start + micros(30));
        for took in 1..=99 {
            latency.seen(start);
            latency.in_force(start + micros(took));
        }
        let info = latency.info();
        assert_eq!((info.count, info.last_us, info.p50_us, info.p99_us, info.max_us), (100, 99, 49, 98, 99));
    }
}
