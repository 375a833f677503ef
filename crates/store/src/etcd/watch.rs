//! One watch over a prefix that outlives connections, leaders and compactions.

use std::{collections::VecDeque, time::Duration};

use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use super::{
    connection::{Backoff, Connection, Current, describe},
    entry,
    wire::{self, EVENT_DELETE, Header, RangeRequest, RangeResponse, WatchCreateRequest, WatchRequest, WatchResponse},
};
use crate::{Event, StoreError};

pub(super) struct Watch {
    connection: Connection,
    prefix: String,
    /// What has been handed out; nothing yet, or no longer of use: a snapshot comes next.
    position: Option<Position>,
    stream: Option<Stream>,
    ready: VecDeque<Event>,
    backoff: Backoff,
}

/// Everything up to `revision` of `cluster` was handed out.
#[derive(Clone, Copy)]
struct Position {
    cluster: u64,
    revision: u64,
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
        // stays silent, so a store that was restored from a backup must be noticed here. The read
        // goes through the leader, so a member that lags behind cannot be mistaken for that.
        let (key, range_end) = wire::below(&self.prefix);
        let question = RangeRequest { key, range_end, count_only: self.position.is_some() };
        let (answer, _): (RangeResponse, _) =
            self.connection.call(wire::RANGE, question).await.map_err(|error| error.into_store_error("a listing"))?;
        let now = Position::of(answer.header.as_ref());
        let position = match self.position {
            None => {
                let entries = answer.kvs.into_iter().filter_map(entry).collect();
                self.ready.push_back(Event::Snapshot(entries, now.revision));
                self.position = Some(now);
                now
            }
            Some(then) if then.cluster != now.cluster || then.revision > now.revision => {
                tracing::warn!(
                    prefix = self.prefix,
                    seen = then.revision,
                    found = now.revision,
                    "etcd's data was replaced by older or other data; all of it is read again"
                );
                self.position = None;
                return Ok(());
            }
            Some(then) => then,
        };
        self.stream = Some(self.open(position.revision + 1).await?);
        Ok(())
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
            position.revision = position.revision.max(Position::of(answer.header.as_ref()).revision);
        }
        for event in answer.events {
            let Some(kv) = event.kv else { continue };
            let deleted = event.kind == EVENT_DELETE;
            let Some(entry) = entry(kv) else { continue };
            // The header may be ahead of the events while the watch catches up: only they count.
            position.revision = position.revision.max(entry.revision);
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

impl Position {
    fn of(header: Option<&Header>) -> Self {
        Position {
            cluster: header.map_or(0, |header| header.cluster_id),
            revision: header.map_or(0, |header| header.revision.unsigned_abs()),
        }
    }
}
