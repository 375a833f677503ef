//! One watch over a prefix that outlives connections, leaders and compactions.

use std::{collections::VecDeque, time::Duration};

use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use super::{
    connection::{Backoff, Connection, Current, describe},
    entry, one_key, revision,
    wire::{self, EVENT_DELETE, RangeRequest, RangeResponse, WatchCreateRequest, WatchRequest, WatchResponse},
};
use crate::{Event, STORE_ID, StoreError};

pub(super) struct Watch {
    connection: Connection,
    prefix: String,
    /// What has been handed out; nothing yet, or no longer of use: a snapshot comes next.
    position: Option<Position>,
    stream: Option<Stream>,
    ready: VecDeque<Event>,
    backoff: Backoff,
}

/// Everything up to `revision` of the store was handed out.
struct Position {
    store: Name,
    revision: u64,
}

/// What a store is known by.
#[derive(PartialEq, Eq)]
struct Name {
    /// etcd's number of the cluster. Data that were lost leave it as it is.
    cluster: u64,
    /// What stands under [`STORE_ID`].
    id: Option<Vec<u8>>,
}

struct Stream {
    over: Current,
    since: Instant,
    answers: Streaming<WatchResponse>,
}

/// What an answer means for the stream it came on.
enum Next {
    Go,
    Restart(String),
}

impl Watch {
    pub(super) fn new(connection: Connection, prefix: String) -> Self {
        Watch { connection, prefix, position: None, stream: None, ready: VecDeque::new(), backoff: Backoff::new() }
    }

    pub(super) async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return event;
            }
            let why = match self.step().await {
                Next::Go => continue,
                Next::Restart(why) => why,
            };
            tracing::warn!(prefix = self.prefix, %why, "the watch was interrupted; it goes on where it was");
            if let Some(stream) = self.stream.take() {
                self.connection.move_on(&stream.over);
                // A stream that lasted is no sign of trouble that lasts.
                if stream.since.elapsed() > Duration::from_secs(10) {
                    self.backoff = Backoff::new();
                }
            }
            sleep(self.backoff.pause()).await;
        }
    }

    async fn step(&mut self) -> Next {
        let Some(stream) = &mut self.stream else {
            return match self.start().await {
                Ok(()) => Next::Go,
                Err(error) => Next::Restart(error.to_string()),
            };
        };
        match stream.answers.message().await {
            Ok(Some(answer)) => self.take(answer),
            Ok(None) => Next::Restart("etcd closed the stream".into()),
            Err(status) => Next::Restart(describe(&status)),
        }
    }

    /// Finds out where the store is, and opens the stream at the place where this watch is.
    async fn start(&mut self) -> Result<(), StoreError> {
        // Also for a watch that only goes on: a stream that starts beyond the newest revision just
        // stays silent, and one of other data goes on as if nothing was missing, so a store whose data were lost or
        // restored must be noticed here. The read goes through the leader, so a member that lags behind cannot be
        // mistaken for that.
        let answer = self.read(one_key(STORE_ID)).await?;
        let now = Name::of(&answer);
        let found = revision(answer.header.as_ref());
        let from = match &self.position {
            None => {
                let (key, range_end) = wire::below(&self.prefix);
                let answer = self.read(RangeRequest { key, range_end, count_only: false }).await?;
                let revision = revision(answer.header.as_ref());
                let entries = answer.kvs.into_iter().filter_map(entry).collect();
                self.ready.push_back(Event::Snapshot(entries, revision));
                self.position = Some(Position { store: now, revision });
                revision
            }
            Some(then) if then.store != now || then.revision > found => {
                tracing::warn!(
                    prefix = self.prefix,
                    seen = then.revision,
                    found,
                    "etcd's data was replaced by older or other data; all of it is read again"
                );
                self.position = None;
                return Ok(());
            }
            Some(then) => then.revision,
        };
        self.stream = Some(self.open(from + 1).await?);
        Ok(())
    }

    async fn read(&self, question: RangeRequest) -> Result<RangeResponse, StoreError> {
        let answered = self.connection.call(wire::RANGE, question).await;
        answered.map(|(answer, _)| answer).map_err(|error| error.into_store_error("a listing"))
    }

    async fn open(&self, from: u64) -> Result<Stream, StoreError> {
        let over = self.connection.current();
        let (key, range_end) = wire::below(&self.prefix);
        let question = WatchRequest {
            create: Some(WatchCreateRequest {
                key,
                range_end,
                start_revision: i64::try_from(from).unwrap_or(i64::MAX),
                progress_notify: true,
            }),
        };
        let opening = wire::stream(over.channel.clone(), wire::WATCH, question);
        let since = Instant::now();
        let failed = match timeout(self.connection.timeout(), opening).await {
            Ok(Ok(answers)) => {
                return Ok(Stream { over, since, answers });
            }
            Ok(Err(status)) => describe(&status),
            Err(_) => format!("{} is silent", self.connection.name(&over)),
        };
        self.connection.move_on(&over);
        Err(StoreError::Unreachable { endpoints: self.connection.names(), waited: since.elapsed(), last: failed })
    }

    fn take(&mut self, answer: WatchResponse) -> Next {
        if answer.canceled {
            if answer.compact_revision != 0 {
                // The history in between is gone, so only a snapshot can bridge it. That is no
                // failure: go on at once.
                tracing::info!(
                    prefix = self.prefix,
                    oldest = answer.compact_revision,
                    "history was compacted; all of it is read again"
                );
                self.position = None;
                self.stream = None;
                return Next::Go;
            }
            return Next::Restart(format!("etcd cancelled it: {}", answer.cancel_reason));
        }
        let Some(position) = &mut self.position else {
            return Next::Restart("an answer without a question".into());
        };
        if answer.created {
            return Next::Go;
        }
        if answer.events.is_empty() {
            // Sent only while nothing is under way to this watch, so its revision is proof.
            position.revision = position.revision.max(revision(answer.header.as_ref()));
        }
        for event in answer.events {
            let Some(kv) = event.kv else { continue };
            let deleted = event.kind == EVENT_DELETE;
            let Some(entry) = entry(kv) else { continue };
            // The header may be ahead of the events while the watch catches up: only they count.
            position.revision = position.revision.max(entry.revision);
            if entry.key == STORE_ID {
                position.store.id = (!deleted).then(|| entry.value.clone());
            }
            self.ready.push_back(if deleted {
                Event::Delete { key: entry.key, revision: entry.revision }
            } else {
                Event::Put(entry)
            });
        }
        // etcd never splits a revision unless asked to, so what it sent is complete.
        self.ready.push_back(Event::Progress(position.revision));
        Next::Go
    }
}

impl Name {
    /// That of the store that answered the question for its id.
    fn of(answer: &RangeResponse) -> Self {
        Name {
            cluster: answer.header.as_ref().map_or(0, |header| header.cluster_id),
            id: answer.kvs.first().map(|kv| kv.value.clone()),
        }
    }
}
