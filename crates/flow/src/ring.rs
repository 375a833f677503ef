//! The newest records, bounded, with followers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::record::Record;

/// Keeps the newest `capacity` records. Cloning gives another handle to the same ring.
///
/// Records are numbered from 0. A reader keeps the number of the next record it wants and asks for
/// a [`Batch`] from there; what the ring has already let go is counted in [`Batch::lost`]. Writers
/// never wait for readers.
#[derive(Clone, Debug)]
pub struct Ring {
    shared: Arc<Shared>,
}

/// Records that a reader got.
#[derive(Clone, Debug)]
pub struct Batch {
    /// In the order they were written.
    pub records: Vec<Arc<Record>>,
    /// Number to ask from next.
    pub next: u64,
    /// How many records between the number asked for and the first given are gone.
    pub lost: u64,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    written: Notify,
}

#[derive(Debug)]
struct Inner {
    records: VecDeque<Arc<Record>>,
    /// Number of the front record.
    first: u64,
    capacity: usize,
}

impl Ring {
    /// An empty ring for at least one record.
    pub fn new(capacity: usize) -> Ring {
        let capacity = capacity.max(1);
        let inner = Inner { records: VecDeque::new(), first: 0, capacity };
        Ring { shared: Arc::new(Shared { inner: Mutex::new(inner), written: Notify::new() }) }
    }

    /// Appends records and wakes those who follow. The oldest make room.
    pub fn push(&self, records: impl IntoIterator<Item = Record>) {
        let mut inner = self.lock();
        for record in records {
            if inner.records.len() == inner.capacity {
                inner.records.pop_front();
                inner.first += 1;
            }
            inner.records.push_back(Arc::new(record));
        }
        drop(inner);
        self.shared.written.notify_waiters();
    }

    /// Number that the next record will get.
    pub fn end(&self) -> u64 {
        let inner = self.lock();
        inner.first + inner.records.len() as u64
    }

    /// How many records it holds, and how many it can hold.
    pub fn fill(&self) -> (usize, usize) {
        let inner = self.lock();
        (inner.records.len(), inner.capacity)
    }

    /// Up to `limit` records from number `from` on, without waiting.
    pub fn read(&self, from: u64, limit: usize) -> Batch {
        let inner = self.lock();
        let start = from.max(inner.first);
        let skip = (start - inner.first) as usize;
        let records: Vec<_> = inner.records.iter().skip(skip).take(limit).cloned().collect();
        Batch { next: start + records.len() as u64, lost: start - from, records }
    }

    /// The same, but waits until there is at least one record.
    pub async fn follow(&self, from: u64, limit: usize) -> Batch {
        loop {
            // Registered before the look, so that a record written in between wakes us.
            let written = self.shared.written.notified();
            let batch = self.read(from, limit);
            if !batch.records.is_empty() {
                return batch;
            }
            written.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics half way, so a poisoned ring is still a whole one.
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::Decoder;

    fn records(range: std::ops::Range<u64>) -> Vec<Record> {
        let decoder = Decoder::new("a", 0);
        range.map(|n| decoder.lost("kernel-ring", n, 0)).collect()
    }

    fn counts(batch: &Batch) -> Vec<u64> {
        batch
            .records
            .iter()
            .map(|record| match &**record {
                Record::Lost(lost) => lost.count,
                Record::Flow(_) => panic!("only losses were written"),
            })
            .collect()
    }

    #[test]
    fn the_oldest_make_room_and_a_slow_reader_learns_how_many_it_missed() {
        let ring = Ring::new(3);
        ring.push(records(0..5));
        let batch = ring.read(1, 10);
        assert_eq!((counts(&batch), batch.next, batch.lost), (vec![2, 3, 4], 5, 1));
        let batch = ring.read(batch.next, 10);
        assert_eq!((counts(&batch), batch.next, batch.lost), (vec![], 5, 0));
    }

    #[test]
    fn a_limit_is_kept_and_the_rest_comes_next() {
        let ring = Ring::new(8);
        ring.push(records(0..5));
        let batch = ring.read(0, 2);
        assert_eq!(counts(&batch), [0, 1]);
        assert_eq!(counts(&ring.read(batch.next, 10)), [2, 3, 4]);
    }

    #[tokio::test]
    async fn a_follower_wakes_when_something_is_written() {
        let ring = Ring::new(4);
        let reader = ring.clone();
        let (batch, ()) = tokio::join!(reader.follow(0, 10), async {
            tokio::task::yield_now().await;
            ring.push(records(7..8));
        });
        assert_eq!(counts(&batch), [7]);
    }
}
