//! The reader of events.

use std::io;

use aya::maps::{Map, MapData, RingBuf};
use cirri_abi::{CounterIndex, FlowEvent};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Duration, Instant},
};

use crate::{error::LoadError, error::MapError, plain::read, tables::Tables};

/// Reads the ring of events. Needs a tokio runtime with I/O and time.
///
/// While nothing comes it sleeps. The packet path wakes it with an event that finds the ring read to its end
/// (the kernel compares positions; both sides look again after they moved theirs, so that none of them
/// misses the other), and when much has gathered. In between it lets events gather: a wake-up for each costs
/// many times what the event does.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
    tables: Tables,
    lost: u64,
    /// When the ring was last found with something in it: what comes shortly after may gather.
    read: Option<Instant>,
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

/// How long events gather while there is traffic.
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
        Ok(Events { ring, tables, lost, read: None })
    }

    /// Waits for events and answers all there are, up to a few thousand. Cancel-safe: what was not
    /// answered is still in the ring.
    pub async fn next(&mut self) -> Result<Batch, MapError> {
        loop {
            self.let_gather().await?;
            let batch = drain(self.ring.get_mut());
            if !batch.is_empty() {
                self.read = Some(Instant::now());
                return self.with_losses(batch);
            }
            // Read to its end: the next event says so.
            self.woken().await?;
        }
    }

    /// Waits for what is left of the time since the ring was last read. The first event after that has woken
    /// this task already; a second wake-up says that much has gathered.
    async fn let_gather(&mut self) -> Result<(), MapError> {
        let Some(read) = self.read.take() else { return Ok(()) };
        let until = read + LOOK_EVERY;
        for _ in 0..2 {
            if let Ok(woken) = tokio::time::timeout_at(until, self.woken()).await {
                woken?;
            }
        }
        Ok(())
    }

    /// Waits until the packet path says that there is something.
    async fn woken(&mut self) -> Result<(), MapError> {
        let ready = self.ring.readable_mut().await;
        let mut ready = ready.map_err(|error| MapError::Kernel { map: "EVENTS".into(), action: "wait", error })?;
        ready.clear_ready();
        Ok(())
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
