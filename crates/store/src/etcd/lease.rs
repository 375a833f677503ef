//! The process's lease, and the keys that hang on it.
//!
//! One background task holds the lease: grants it, keeps it alive, and when etcd no longer knows
//! it, grants a new one and writes every leased key again.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{
    sync::{Mutex, MutexGuard, watch},
    task::AbortHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tonic::{Code, Status};

use super::{
    connection::{Backoff, CallError, Connection},
    wire::{
        self, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, PutRequest,
        WriteResponse,
    },
};

/// Cloning shares it.
#[derive(Clone)]
pub(super) struct Lease {
    shared: Arc<Shared>,
}

struct Shared {
    connection: Connection,
    ttl: Duration,
    /// The leased keys as they should be. Locked for the length of each write of a leased key, so
    /// that writing them again never puts an older value over a newer one.
    keys: Mutex<BTreeMap<String, Vec<u8>>>,
    /// The lease in force; none while there is no working one.
    id: watch::Sender<Option<i64>>,
    /// The lease that etcd last said does not exist; 0 for none.
    lost: watch::Sender<i64>,
    /// Runs from the first need of a lease on: who only reads has none.
    task: OnceLock<AbortHandle>,
}

impl Lease {
    pub(super) fn new(connection: Connection, ttl: Duration) -> Self {
        Lease {
            shared: Arc::new(Shared {
                connection,
                ttl,
                keys: Mutex::new(BTreeMap::new()),
                id: watch::Sender::new(None),
                lost: watch::Sender::new(0),
                task: OnceLock::new(),
            }),
        }
    }

    /// The keys, locked. Hold it while writing or deleting a key that is or may be leased.
    pub(super) async fn keys(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.shared.keys.lock().await
    }

    /// The lease in force, once there is one.
    pub(super) async fn id(&self) -> i64 {
        let task = || tokio::spawn(self.clone().run()).abort_handle();
        self.shared.task.get_or_init(task);
        let mut id = self.shared.id.subscribe();
        let found = id.wait_for(Option::is_some).await;
        // The sender lives in `shared`, so there is always an answer some day.
        found.ok().and_then(|id| *id).unwrap_or_default()
    }

    /// etcd said that lease `id` does not exist.
    pub(super) fn report_lost(&self, id: i64) {
        self.shared.id.send_if_modified(|current| {
            let ours = *current == Some(id);
            if ours {
                *current = None;
            }
            ours
        });
        self.shared.lost.send_replace(id);
    }

    /// Keys are leased, and there is no lease: other nodes may have lost sight of this one.
    pub(super) async fn is_missing(&self) -> bool {
        self.shared.id.borrow().is_none() && !self.keys().await.is_empty()
    }

    /// Lets the lease run out; its keys go when it ends.
    pub(super) fn stop(&self) {
        if let Some(task) = self.shared.task.get() {
            task.abort();
        }
    }

    /// Holds the lease for as long as it is polled.
    async fn run(self) {
        let mut backoff = Backoff::new();
        loop {
            match self.grant().await {
                Ok((id, ttl)) => {
                    backoff = Backoff::new();
                    // Kept alive from the start: writing all keys again may take longer than it
                    // lives.
                    tokio::select! {
                        () = self.keep_alive(id, ttl) => {}
                        () = self.put_in_force(id) => {}
                    }
                    self.shared.id.send_replace(None);
                    tracing::warn!(lease = id, "etcd ended the lease; its keys are written again under a new one");
                }
                Err(error) => {
                    let error = error.into_store_error("a lease");
                    tracing::warn!(%error, "no lease yet");
                    sleep(backoff.pause()).await;
                }
            }
        }
    }

    async fn grant(&self) -> Result<(i64, Duration), CallError> {
        let question = LeaseGrantRequest { ttl: self.shared.ttl.as_secs().max(1) as i64 };
        let connection = &self.shared.connection;
        let (answer, _): (LeaseGrantResponse, _) = connection.call(wire::LEASE_GRANT, question).await?;
        if answer.id == 0 {
            return Err(CallError::Answer(Status::internal(answer.error)));
        }
        Ok((answer.id, Duration::from_secs(answer.ttl.max(1) as u64)))
    }

    /// Writes all keys under lease `id`, then lets others use it. Returns if the lease is gone.
    async fn put_in_force(&self, id: i64) {
        if self.write_again(id).await {
            self.shared.id.send_replace(Some(id));
            std::future::pending().await
        }
    }

    /// Puts every leased key under lease `id`. False: the lease ended meanwhile.
    async fn write_again(&self, id: i64) -> bool {
        let names: Vec<String> = self.keys().await.keys().cloned().collect();
        let mut backoff = Backoff::new();
        for name in names {
            loop {
                // Let go between attempts: who wants to delete the key must not wait for etcd twice.
                let keys = self.keys().await;
                let Some(value) = keys.get(&name) else { break };
                let question = PutRequest { key: name.clone().into_bytes(), value: value.clone(), lease: id };
                let connection = &self.shared.connection;
                let put: Result<(WriteResponse, _), _> = connection.call(wire::PUT, question).await;
                match put {
                    Ok(_) => break,
                    Err(CallError::Answer(status)) if status.code() == Code::NotFound => return false,
                    Err(error) => {
                        let error = error.into_store_error("a leased key");
                        tracing::warn!(key = name, %error, "a leased key is not written again yet");
                    }
                }
                drop(keys);
                sleep(backoff.pause()).await;
            }
        }
        true
    }

    /// Returns when the lease is gone. While etcd is out of reach the lease may live or not: etcd
    /// says so once it is back.
    async fn keep_alive(&self, id: i64, ttl: Duration) {
        // A third of the life leaves two more tries; five seconds bound how long a revoked lease
        // goes unnoticed.
        let every = (ttl / 3).min(Duration::from_secs(5));
        let mut next = Instant::now() + every;
        let mut backoff = Backoff::new();
        let mut lost = self.shared.lost.subscribe();
        loop {
            tokio::select! {
                () = sleep_until(next) => {}
                _ = lost.wait_for(|lost| *lost == id) => return,
            }
            let current = self.shared.connection.current();
            let question = LeaseKeepAliveRequest { id };
            let beat = async {
                let mut answers: tonic::Streaming<LeaseKeepAliveResponse> =
                    wire::stream(current.channel.clone(), wire::LEASE_KEEP_ALIVE, question).await?;
                answers.message().await
            };
            match timeout(self.shared.connection.timeout(), beat).await {
                Ok(Ok(Some(answer))) if answer.ttl <= 0 => return,
                Ok(Ok(Some(_))) => {
                    backoff = Backoff::new();
                    next = Instant::now() + every;
                }
                Ok(Err(status)) if status.code() == Code::NotFound => return,
                unanswered => {
                    tracing::debug!(?unanswered, "keep-alive was not answered");
                    self.shared.connection.move_on(&current);
                    next = Instant::now() + backoff.pause();
                }
            }
        }
    }
}
