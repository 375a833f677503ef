//! Repairs and their rations: two who manage the same thing must not keep each other busy for ever.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::agent::problems::Finding;
use crate::api::ProblemKind;

/// How many times one thing is repaired at once. Who sets up a node by hand changes one thing a dozen times within a
/// minute, and a device takes its routes along each time.
const ALLOWANCE: u32 = 20;
/// How often after that; and for how long it must be left alone to be no problem any more.
const REFILL: Duration = Duration::from_secs(10);

/// What was repaired, and how often.
#[derive(Debug, Default)]
pub struct Repairs {
    /// Things that were repaired lately.
    lately: BTreeMap<(ProblemKind, String), Repaired>,
    /// Repairs since the start, by kind.
    count: BTreeMap<ProblemKind, u64>,
}

#[derive(Debug)]
struct Repaired {
    /// How many repairs may still be made.
    left: u32,
    /// When the last one was added to these.
    refilled: Instant,
    /// All that were made.
    count: u64,
    /// When it was last found otherwise than it was left.
    differed: Instant,
    /// What is wrong, from when it is held back until it was left alone for a while.
    held: Option<Finding>,
}

impl Repairs {
    /// Something is not as it was left; whether it may be repaired now. Says so in the log and counts it. `by`: who
    /// changed the network last, or nobody.
    pub fn ask(&mut self, what: ProblemKind, object: &str, [found, wanted]: [&str; 2], by: &str, now: Instant) -> bool {
        let repaired = self.lately.entry((what, object.to_owned())).or_insert_with(|| Repaired {
            left: ALLOWANCE,
            refilled: now,
            count: 0,
            differed: now,
            held: None,
        });
        repaired.refill(now);
        repaired.differed = now;
        if repaired.left == 0 {
            let count = repaired.count;
            if repaired.held.is_none() {
                tracing::error!(%what, object, found, wanted, count, by, "changed again and again; repaired less often");
            }
            let remedy = format!(
                "it was repaired {count} times, and somebody{} changes it again and again: find out who, and stop that",
                if by.is_empty() { String::new() } else { format!(" (the last one to change the network was {by})") }
            );
            repaired.held = Some(Finding::new(found, remedy).wanted(wanted));
            return false;
        }
        repaired.left -= 1;
        repaired.count += 1;
        *self.count.entry(what).or_default() += 1;
        tracing::warn!(%what, object, found, wanted, by, "drift: it is made right");
        true
    }

    /// What is held back of a kind that was just compared. What was left alone for a while is forgotten.
    pub fn held(&mut self, kind: ProblemKind, now: Instant) -> Vec<(String, Finding)> {
        let of = |what: &ProblemKind| *what == kind;
        self.lately.retain(|(what, _), repaired| !(of(what) && repaired.is_over(now)));
        let all = self.lately.iter().filter(|((what, _), _)| of(what));
        all.filter_map(|((_, object), repaired)| Some((object.clone(), repaired.held.clone()?))).collect()
    }

    /// When to look again at what is held back: it may be repaired then, or be no problem any more.
    pub fn next_look(&self) -> Option<Instant> {
        let held = self.lately.values().filter(|repaired| repaired.held.is_some());
        held.map(|repaired| repaired.refilled.min(repaired.differed) + REFILL).min()
    }

    /// Repairs since the start, by kind.
    pub fn count(&self) -> BTreeMap<ProblemKind, u64> {
        self.count.clone()
    }
}

impl Repaired {
    fn refill(&mut self, now: Instant) {
        while self.left < ALLOWANCE && now.duration_since(self.refilled) >= REFILL {
            self.left += 1;
            self.refilled += REFILL;
        }
        if self.left == ALLOWANCE {
            self.refilled = now;
        }
    }

    /// Whether all of it is forgotten. What is wrong is so earlier.
    fn is_over(&mut self, now: Instant) -> bool {
        self.refill(now);
        if now.duration_since(self.differed) >= REFILL {
            self.held = None;
        }
        self.left == ALLOWANCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repairs_of_one_thing_are_rationed_and_named_until_it_is_left_alone() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut repairs = Repairs::default();
        let ask = |repairs: &mut Repairs, object: &str, at: Instant| {
            repairs.ask(ProblemKind::Route, object, ["gone", "there"], "", at)
        };
        let made = (0..100).filter(|step| ask(&mut repairs, "a", after(step * 100))).count();
        assert_eq!(made, ALLOWANCE as usize, "within {REFILL:?}");
        assert!(ask(&mut repairs, "b", after(9_900)), "another thing has nothing to do with it");
        let held = repairs.held(ProblemKind::Route, after(9_900));
        let [(object, finding)] = held.as_slice() else { panic!("{held:?}") };
        assert!(object == "a" && finding.found == "gone" && finding.wanted == "there", "{finding:?}");
        assert!(finding.remedy.contains(&format!("{ALLOWANCE} times")), "{finding:?}");

        // One is due then, without that anybody tells.
        assert_eq!(repairs.next_look(), Some(after(10_000)));
        assert!(
            ask(&mut repairs, "a", after(10_100)) && !ask(&mut repairs, "a", after(10_200)),
            "one every {REFILL:?}"
        );
        assert_eq!(repairs.count()[&ProblemKind::Route], u64::from(ALLOWANCE) + 2);

        // Only who looks can say that it is left alone.
        assert!(repairs.held(ProblemKind::Map, after(60_000)).is_empty());
        assert!(!repairs.held(ProblemKind::Route, after(20_100)).is_empty());
        assert_eq!(repairs.next_look(), Some(after(20_200)));
        assert!(repairs.held(ProblemKind::Route, after(20_200)).is_empty());
        assert_eq!(repairs.next_look(), None);
        // Until the ration is whole again, it is remembered how often it was.
        assert_eq!(repairs.lately.len(), 1);
        repairs.held(ProblemKind::Route, after(300_000));
        assert!(repairs.lately.is_empty());
    }
}
