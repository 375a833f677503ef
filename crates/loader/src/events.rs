//! The reader of events.

use std::{io, time::Duration};

use aya::maps::{Map, MapData, RingBuf};
use cirri_abi::{CounterIndex, FlowEvent};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{error::LoadError, error::MapError, plain::read, tables::Tables};

/// Reads the ring of events. Needs a tokio runtime with I/O and time.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
    tables: Tables,
    lost: u64,
}

/// Some events, in the order of the ring, and what was lost before the last of them.
#[derive(Clone, Default, Debug)]
pub struct Batch {
    /// The events.
    pub events: Vec<FlowEvent>,
    /// Events that found the ring full since the last batch: the reader was too slow.
    pub lost: u64,
    /// Entries of another size than an event; never there unless programs and build differ.
    pub malformed: u64,
}

/// How often the ring is looked into. The packet path wakes its reader only when much has gathered: a
/// wake-up for each event costs many times what the event does.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Most events of a batch, so that a flood cannot keep one from being handled.
const MOST: usize = 4096;

impl Events {
    pub(crate) fn new(map: Map, tables: Tables) -> Result<Events, LoadError> {
        let kernel = |error| MapError::Kernel { map: "EVENTS".into(), action: "open", error };
        let ring = RingBuf::try_from(map).map_err(|error| kernel(io::Error::other(error)))?;
        // SAFETY: the descriptor that `RingBuf` answers is the map's, which it owns, and stays the
        // same and open until the ring is dropped.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
        let ring = ring.map_err(|error| kernel(error.into()))?;
        let lost = tables.counter(CounterIndex::LOST_EVENTS)?.packets;
        Ok(Events { ring, tables, lost })
    }

    /// Waits for events and answers all there are, up to a few thousand. Cancel-safe: what was not
    /// answered is still in the ring.
    pub async fn next(&mut self) -> Result<Batch, MapError> {
        loop {
            let batch = drain(self.ring.get_mut());
            if !batch.is_empty() {
                return self.with_losses(batch);
            }
            let Ok(waited) = tokio::time::timeout(LOOK_EVERY, self.ring.readable_mut()).await else {
                continue;
            };
            let mut ready = waited.map_err(|error| MapError::Kernel { map: "EVENTS".into(), action: "wait", error })?;
            let batch = drain(ready.get_inner_mut());
            if !batch.is_empty() {
                // Stays ready: the next call looks into the ring before it waits.
                return self.with_losses(batch);
            }
            // Empty since it was announced; what comes from now on is announced anew.
            ready.clear_ready();
        }
    }

    fn with_losses(&mut self, mut batch: Batch) -> Result<Batch, MapError> {
        let lost = self.tables.counter(CounterIndex::LOST_EVENTS)?.packets;
        batch.lost = lost.saturating_sub(std::mem::replace(&mut self.lost, lost));
        Ok(batch)
    }
}

impl Batch {
    fn is_empty(&self) -> bool {
        self.events.is_empty() && self.malformed == 0
    }
}

fn drain(ring: &mut RingBuf<MapData>) -> Batch {
    let mut batch = Batch::default();
    while batch.events.len() < MOST {
        match ring.next() {
            Some(item) if item.len() == size_of::<FlowEvent>() => batch.events.extend(read::<FlowEvent>(&item)),
            Some(_) => batch.malformed += 1,
            None => break,
        }
    }
    batch
}
