//! Desired rows, what the kernel (or the store) really holds, and how far apart they are.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::time::{Duration, Instant};

use crate::api::{RowError, TableStatus};

/// A table of desired rows with one reconciler.
///
/// Sources call [`Table::set`], [`Table::unset`] or [`Table::replace`]; the reconciler takes the
/// rows that are [`Table::due`], makes the world like them, and reports with [`Table::settle`]. A
/// row that failed is due again after a pause that doubles each time. What a reconciler found in
/// the world at start goes in by [`Table::adopt`], so that a restart repairs only what differs.
#[derive(Clone, Debug)]
pub struct Table<K, V> {
    name: &'static str,
    rows: BTreeMap<K, Row<V>>,
    /// Keys of the rows that are not [`State::Done`]: questions about what is left to do must not cost
    /// a walk over everything that is done.
    open: BTreeSet<K>,
}

#[derive(Clone, Debug)]
struct Row<V> {
    /// `None`: it should not be there.
    desired: Option<V>,
    /// What was last written, or found at start. `None`: nothing.
    actual: Option<V>,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    /// The reconciler has not come to it.
    Pending,
    /// The world is as desired.
    Done,
    /// It was tried.
    Failed { why: String, attempts: u32, next: Instant },
}

/// A row for the reconciler.
#[derive(Clone, Debug)]
pub struct Due<K, V> {
    /// Its key.
    pub key: K,
    /// What to make of it; `None`: remove it.
    pub desired: Option<V>,
    /// What is there.
    pub actual: Option<V>,
}

/// A row that the world holds otherwise than it was left.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference<K, V> {
    /// Its key.
    pub key: K,
    /// What was left there; `None`: nothing.
    pub wanted: Option<V>,
    /// What is there; `None`: nothing.
    pub found: Option<V>,
}

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl<V> Row<V> {
    fn is_due(&self, now: Instant) -> bool {
        match &self.state {
            State::Pending => true,
            State::Done => false,
            State::Failed { next, .. } => *next <= now,
        }
    }
}

impl<K: Ord + Clone + Display, V: Clone + PartialEq> Table<K, V> {
    /// Empty.
    pub fn new(name: &'static str) -> Table<K, V> {
        Table { name, rows: BTreeMap::new(), open: BTreeSet::new() }
    }

    /// The row should be like this.
    pub fn set(&mut self, key: K, value: V) {
        self.desire(key, Some(value));
    }

    /// The row should not be there.
    pub fn unset(&mut self, key: &K) {
        if self.rows.contains_key(key) {
            self.desire(key.clone(), None);
        }
    }

    /// Exactly these rows should be there.
    pub fn replace(&mut self, rows: BTreeMap<K, V>) {
        let gone: Vec<K> = self.rows.keys().filter(|key| !rows.contains_key(key)).cloned().collect();
        for key in gone {
            self.desire(key, None);
        }
        for (key, value) in rows {
            self.desire(key, Some(value));
        }
    }

    /// The world holds this row already. Without a later [`Table::set`] it is removed.
    pub fn adopt(&mut self, key: K, value: V) {
        let row = self.rows.entry(key.clone()).or_insert(Row { desired: None, actual: None, state: State::Pending });
        let done = row.desired.as_ref() == Some(&value);
        row.state = if done { State::Done } else { State::Pending };
        row.actual = Some(value);
        self.note(key);
    }

    /// The world is not what it was written to be: this row must be looked at again.
    pub fn suspect(&mut self, key: &K) {
        if let Some(row) = self.rows.get_mut(key) {
            row.actual = None;
            row.state = State::Pending;
            self.note(key.clone());
        }
    }

    /// Where the world, which holds exactly `found`, is not as it was left: rows that are done and differ,
    /// and rows that nobody here knows.
    pub fn differences(&self, found: &BTreeMap<K, V>) -> Vec<Difference<K, V>> {
        let done = self.rows.iter().filter(|(_, row)| matches!(row.state, State::Done));
        let differ = done.filter(|(key, row)| row.desired.as_ref() != found.get(key)).map(|(key, row)| Difference {
            key: key.clone(),
            wanted: row.desired.clone(),
            found: found.get(key).cloned(),
        });
        let strays = found.iter().filter(|(key, _)| !self.rows.contains_key(key)).map(|(key, value)| Difference {
            key: key.clone(),
            wanted: None,
            found: Some(value.clone()),
        });
        differ.chain(strays).collect()
    }

    /// Takes in what the world holds: the row is due, to be made as it should be.
    pub fn found(&mut self, difference: Difference<K, V>) {
        match difference.found {
            Some(value) => self.adopt(difference.key, value),
            None => self.suspect(&difference.key),
        }
    }

    /// Rows to work on now.
    pub fn due(&self, now: Instant) -> Vec<Due<K, V>> {
        self.open_rows()
            .filter(|(_, row)| row.is_due(now))
            .map(|(key, row)| Due { key: key.clone(), desired: row.desired.clone(), actual: row.actual.clone() })
            .collect()
    }

    /// What came of a row. `desired` is what the reconciler was asked for: if that changed
    /// meanwhile, the row is due again.
    pub fn settle<E: Display>(&mut self, key: &K, desired: Option<V>, outcome: Result<(), E>, now: Instant) {
        let Some(row) = self.rows.get_mut(key) else { return };
        match outcome {
            Ok(()) => {
                row.actual = desired;
                if row.actual != row.desired {
                    row.state = State::Pending;
                } else if row.desired.is_some() {
                    row.state = State::Done;
                } else {
                    self.rows.remove(key);
                }
            }
            Err(error) => {
                let attempts = match &row.state {
                    State::Failed { attempts, .. } => attempts + 1,
                    State::Pending | State::Done => 1,
                };
                let pause = FIRST_PAUSE.saturating_mul(1 << (attempts - 1).min(20)).min(LONGEST_PAUSE);
                row.state = State::Failed { why: error.to_string(), attempts, next: now + pause };
            }
        }
        self.note(key.clone());
    }

    /// When the next row that failed is due; `None` if none failed.
    pub fn next_due(&self) -> Option<Instant> {
        self.open_rows()
            .filter_map(|(_, row)| match &row.state {
                State::Failed { next, .. } => Some(*next),
                State::Pending | State::Done => None,
            })
            .min()
    }

    /// Whether there are rows to work on now.
    pub fn is_due(&self, now: Instant) -> bool {
        self.open_rows().any(|(_, row)| row.is_due(now))
    }

    /// Rows that should be there, and could not be written as they should be.
    pub fn failed(&self) -> impl Iterator<Item = (&K, &V)> {
        let failed = self.open_rows().filter(|(_, row)| matches!(row.state, State::Failed { .. }));
        failed.filter_map(|(key, row)| Some((key, row.desired.as_ref()?)))
    }

    /// Whether every row is as desired.
    pub fn is_done(&self) -> bool {
        self.open.is_empty()
    }

    /// `pending`, `done`, `error: why`, or nothing if there is no such row.
    pub fn state(&self, key: &K) -> Option<String> {
        self.rows.get(key).map(|row| match &row.state {
            State::Pending => "pending".to_owned(),
            State::Done => "done".to_owned(),
            State::Failed { why, .. } => format!("error: {why}"),
        })
    }

    /// What the row should be.
    pub fn desired(&self, key: &K) -> Option<&V> {
        self.rows.get(key)?.desired.as_ref()
    }

    /// What was last written of the row, or found at the start.
    pub fn actual(&self, key: &K) -> Option<&V> {
        self.rows.get(key)?.actual.as_ref()
    }

    /// What was last written of all rows, or found at the start.
    pub fn written(&self) -> impl Iterator<Item = &V> {
        self.rows.values().filter_map(|row| row.actual.as_ref())
    }

    /// All rows that should be there.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.rows.iter().filter_map(|(key, row)| Some((key, row.desired.as_ref()?)))
    }

    /// For `cirri status`.
    pub fn status(&self) -> TableStatus {
        let done = self.rows.len() - self.open.len();
        let mut status = TableStatus { name: self.name.to_owned(), done, pending: 0, errors: Vec::new() };
        for (key, row) in self.open_rows() {
            match &row.state {
                State::Done => {}
                State::Pending => status.pending += 1,
                State::Failed { why, attempts, .. } => {
                    status.errors.push(RowError { key: key.to_string(), error: why.clone(), attempts: *attempts });
                }
            }
        }
        status
    }

    fn desire(&mut self, key: K, desired: Option<V>) {
        let row = self.rows.entry(key.clone()).or_insert(Row { desired: None, actual: None, state: State::Pending });
        if desired.is_none() && row.actual.is_none() && matches!(row.state, State::Pending) {
            self.rows.remove(&key);
            self.open.remove(&key);
            return;
        }
        // A write that failed may have done half of its work: what is there is not what was there before.
        let failed = matches!(row.state, State::Failed { .. });
        if row.desired != desired {
            row.state = if desired == row.actual && !failed { State::Done } else { State::Pending };
            row.desired = desired;
        } else if row.actual == row.desired && !failed {
            row.state = State::Done;
        }
        self.note(key);
    }

    /// Keeps [`Table::open`] right for a row that may have changed its state.
    fn note(&mut self, key: K) {
        match self.rows.get(&key) {
            Some(row) if !matches!(row.state, State::Done) => {
                self.open.insert(key);
            }
            _ => {
                self.open.remove(&key);
            }
        }
    }

    fn open_rows(&self) -> impl Iterator<Item = (&K, &Row<V>)> {
        self.open.iter().filter_map(|key| Some((key, self.rows.get(key)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settle(table: &mut Table<&'static str, u32>, key: &'static str, outcome: Result<(), &str>, now: Instant) {
        let desired = table.desired(&key).copied();
        table.settle(&key, desired, outcome, now);
    }

    fn due(table: &Table<&'static str, u32>, now: Instant) -> Vec<(&'static str, Option<u32>, Option<u32>)> {
        table.due(now).into_iter().map(|due| (due.key, due.desired, due.actual)).collect()
    }

    #[test]
    fn a_row_is_written_once_and_again_when_it_changes() {
        let now = Instant::now();
        let mut table = Table::new("t");
        table.set("a", 1);
        assert_eq!(due(&table, now), [("a", Some(1), None)]);
        settle(&mut table, "a", Ok(()), now);
        table.set("a", 1);
        assert!(due(&table, now).is_empty() && table.is_done());
        table.set("a", 2);
        assert_eq!(due(&table, now), [("a", Some(2), Some(1))]);
    }

    #[test]
    fn a_failure_waits_longer_each_time_and_is_visible() {
        let now = Instant::now();
        let mut table = Table::new("t");
        table.set("a", 1);
        settle(&mut table, "a", Err("no"), now);
        assert_eq!(table.state(&"a").as_deref(), Some("error: no"));
        assert!(due(&table, now).is_empty());
        let second = now + FIRST_PAUSE;
        assert_eq!(due(&table, second).len(), 1);
        settle(&mut table, "a", Err("no"), second);
        assert_eq!(table.next_due(), Some(second + FIRST_PAUSE * 2));
        assert_eq!(table.status().errors[0].attempts, 2);
    }

    #[test]
    fn what_was_found_at_start_is_kept_repaired_or_removed() {
        let now = Instant::now();
        let mut table = Table::new("t");
        table.adopt("same", 1);
        table.adopt("wrong", 1);
        table.adopt("stray", 1);
        table.replace(BTreeMap::from([("same", 1), ("wrong", 2)]));
        assert_eq!(due(&table, now), [("stray", None, Some(1)), ("wrong", Some(2), Some(1))]);
        settle(&mut table, "stray", Ok(()), now);
        assert_eq!(table.state(&"stray"), None);
    }

    #[test]
    fn what_somebody_else_deleted_altered_or_added_is_due_again() {
        let now = Instant::now();
        let mut table = Table::new("t");
        for (key, value) in [("gone", 1), ("altered", 2), ("whole", 3), ("late", 4)] {
            table.set(key, value);
        }
        for key in ["gone", "altered", "whole"] {
            settle(&mut table, key, Ok(()), now);
        }
        let differences = table.differences(&BTreeMap::from([("altered", 9), ("whole", 3), ("stray", 7)]));
        let keys: Vec<_> = differences.iter().map(|difference| difference.key).collect();
        assert_eq!(keys, ["altered", "gone", "stray"], "what nobody wrote yet cannot be missing");
        differences.into_iter().for_each(|difference| table.found(difference));
        let expected =
            [("altered", Some(2), Some(9)), ("gone", Some(1), None), ("late", Some(4), None), ("stray", None, Some(7))];
        assert_eq!(due(&table, now), expected);
    }

    #[test]
    fn a_change_during_the_work_is_not_lost() {
        let now = Instant::now();
        let mut table = Table::new("t");
        table.set("a", 1);
        table.set("a", 2);
        table.settle(&"a", Some(1), Ok::<(), &str>(()), now);
        assert_eq!(due(&table, now), [("a", Some(2), Some(1))]);
        table.unset(&"a");
        assert_eq!(due(&table, now), [("a", None, Some(1))]);
    }

    #[test]
    fn a_row_that_failed_is_written_also_if_it_is_to_be_as_it_was() {
        let now = Instant::now();
        let mut table = Table::new("t");
        table.set("a", 1);
        settle(&mut table, "a", Ok(()), now);
        table.set("a", 2);
        settle(&mut table, "a", Err("half of it is there"), now);
        assert!(!table.is_due(now) && table.failed().eq([(&"a", &2)]));
        table.set("a", 1);
        assert_eq!(due(&table, now), [("a", Some(1), Some(1))]);
        settle(&mut table, "a", Ok(()), now);
        assert!(table.is_done() && table.failed().next().is_none());
    }

    #[test]
    fn a_row_that_could_not_be_written_is_what_it_was() {
        let (now, mut table) = (Instant::now(), Table::new("t"));
        table.adopt("a", 1);
        table.set("a", 2);
        table.set("b", 3);
        settle(&mut table, "a", Err("full"), now);
        assert_eq!(table.written().collect::<Vec<_>>(), [&1]);
        settle(&mut table, "a", Ok(()), now);
        assert_eq!(table.written().collect::<Vec<_>>(), [&2]);
    }

    #[test]
    fn a_row_that_was_never_written_leaves_without_work() {
        let mut table = Table::new("t");
        table.set("a", 1);
        table.unset(&"a");
        assert!(table.is_done() && table.state(&"a").is_none());
    }
}
