//! etcd as the store of a cluster.

mod connection;
mod lease;
mod watch;
mod wire;

use std::{sync::Arc, time::Duration};

use futures::stream;
use prost::Message;
use tokio::time::{Instant, timeout};
use tonic::Code;

use crate::{Entry, EventStream, Health, STORE_ID, Store, StoreError};
use connection::{CallError, Connection};
use lease::Lease;
use watch::Watch;
use wire::{
    COMPARE_CREATE, Compare, DeleteRangeRequest, Header, KeyValue, PutRequest, RangeRequest, RangeResponse, RequestOp,
    TxnRequest, TxnResponse, WriteResponse,
};

/// How to reach etcd.
#[derive(Debug, Clone)]
pub struct EtcdOptions {
    /// `http://<host>:<port>`, all members of one cluster. One is used at a time; the next one when
    /// it fails.
    pub endpoints: Vec<String>,
    /// How long one endpoint may take to accept a connection.
    pub connect_timeout: Duration,
    /// How long a call tries, over all endpoints, before it fails.
    pub request_timeout: Duration,
    /// How long this process's leased keys outlive it (whole seconds; etcd may lengthen it).
    pub lease_ttl: Duration,
}

impl EtcdOptions {
    /// The defaults, for these endpoints.
    pub fn new(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        EtcdOptions {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            connect_timeout: Duration::from_secs(3),
            request_timeout: Duration::from_secs(10),
            lease_ttl: Duration::from_secs(60),
        }
    }
}

/// A client of an etcd v3 cluster. Clones share its connection and its lease.
///
/// The first leased write grants the lease; from then on it is kept alive in the background until
/// the last clone is dropped. It is not revoked then: its keys outlive a restart of the process by
/// up to the lease's time to live, and a process that writes them again takes them over.
#[derive(Clone)]
pub struct Etcd {
    inner: Arc<Inner>,
}

struct Inner {
    connection: Connection,
    lease: Lease,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.lease.stop();
    }
}

impl Etcd {
    /// Checks the options. Connects only when there is something to say, so etcd need not be up.
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`StoreError::NoEndpoints`], [`StoreError::BadEndpoint`].
    pub fn new(options: &EtcdOptions) -> Result<Self, StoreError> {
        let connection = Connection::new(options)?;
        let lease = Lease::new(connection.clone(), options.lease_ttl);
        Ok(Etcd { inner: Arc::new(Inner { connection, lease }) })
    }

    async fn call<Q, A>(&self, what: &'static str, method: &'static str, question: Q) -> Result<A, StoreError>
    where
        Q: Message + Clone + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let answered = self.inner.connection.call(method, question).await;
        let (answer, _) = answered.map_err(|error| error.into_store_error(what))?;
        Ok(answer)
    }

    /// A write that hangs on the lease: made with the leased keys locked, and made again if the
    /// lease turns out to be gone. Nothing: the key exists, and `how` does not go over it.
    async fn leased(&self, key: &str, value: &[u8], how: Write) -> Result<Option<u64>, StoreError> {
        let Inner { connection, lease } = &*self.inner;
        let started = Instant::now();
        let attempts = async {
            loop {
                let id = lease.id().await;
                let mut keys = lease.keys().await;
                match self.write_all(&[(key, value)], id, how).await {
                    Ok(written) => {
                        if written.is_some() {
                            keys.insert(key.to_owned(), value.to_owned());
                        }
                        return Ok(written);
                    }
                    Err(CallError::Answer(status)) if status.code() == Code::NotFound => {
                        lease.report_lost(id);
                    }
                    Err(error) => return Err(error.into_store_error("a leased write")),
                }
            }
        };
        // The lease has to be granted first, and that may take as long as the write.
        let limit = connection.timeout() * 2;
        timeout(limit, attempts).await.unwrap_or_else(|_| {
            Err(StoreError::Unreachable {
                endpoints: connection.names(),
                waited: started.elapsed(),
                last: "no lease was granted".into(),
            })
        })
    }

    /// Writes all `entries` in one transaction; answers its revision, or nothing if `how` forbids
    /// it. `lease`: 0 for none.
    async fn write_all(&self, entries: &[(&str, &[u8])], lease: i64, how: Write) -> Result<Option<u64>, CallError> {
        let keys = entries.iter().map(|(key, _)| *key);
        let mut question = TxnRequest {
            compare: Vec::new(),
            success: entries
                .iter()
                .map(|(key, value)| RequestOp { put: Some(put_request(key, value, lease)), range: None })
                .collect(),
            failure: Vec::new(),
        };
        if how == Write::New {
            question.compare = keys.clone().map(absent).collect();
            question.failure = keys.map(|key| RequestOp { range: Some(one_key(key)), put: None }).collect();
        }
        let connection = &self.inner.connection;
        let (answer, attempts): (TxnResponse, _) = connection.call(wire::TXN, question).await?;
        if answer.succeeded {
            return Ok(Some(revision(answer.header.as_ref())));
        }
        // An attempt whose answer was lost may have been the one that wrote them.
        let found = answer.responses.iter().map(|one| {
            let range = one.range.as_ref()?;
            range.kvs.first()
        });
        let ours = attempts > 1
            && entries.iter().zip(found).all(|((_, value), found)| found.is_some_and(|kv| kv.value == *value));
        Ok(ours.then(|| revision(answer.header.as_ref())))
    }
}

/// What a write does about keys that exist.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Write {
    /// Goes over them.
    Over,
    /// Does nothing at all.
    New,
}

#[async_trait::async_trait]
impl Store for Etcd {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let answer: RangeResponse = self.call("a read", wire::RANGE, one_key(key)).await?;
        Ok(answer.kvs.into_iter().find_map(entry))
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, u64), StoreError> {
        let (key, range_end) = wire::below(prefix);
        let question = RangeRequest { key, range_end, count_only: false };
        let answer: RangeResponse = self.call("a listing", wire::RANGE, question).await?;
        let revision = revision(answer.header.as_ref());
        Ok((answer.kvs.into_iter().filter_map(entry).collect(), revision))
    }

    fn watch(&self, prefix: &str) -> EventStream {
        let watch = Watch::new(self.inner.connection.clone(), prefix.to_owned());
        Box::pin(stream::unfold(watch, |mut watch| async move {
            let event = watch.next().await;
            Some((event, watch))
        }))
    }

    async fn put(&self, key: &str, value: &[u8], lease: bool) -> Result<u64, StoreError> {
        if lease {
            let written = self.leased(key, value, Write::Over).await?;
            return Ok(written.unwrap_or_default());
        }
        let mut keys = self.inner.lease.keys().await;
        // Held only for a key that changes sides, so that it is not written again under the lease.
        let held = keys.remove(key).map(|_| keys);
        let question = put_request(key, value, 0);
        let answer: WriteResponse = self.call("a write", wire::PUT, question).await?;
        drop(held);
        Ok(revision(answer.header.as_ref()))
    }

    async fn create(&self, key: &str, value: &[u8], lease: bool) -> Result<bool, StoreError> {
        if !lease {
            return self.create_all(&[(key, value)]).await;
        }
        let created = self.leased(key, value, Write::New).await?;
        Ok(created.is_some())
    }

    async fn create_all(&self, entries: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        let created = self.write_all(entries, 0, Write::New).await;
        let created = created.map_err(|error| error.into_store_error("a transaction"))?;
        Ok(created.is_some())
    }

    async fn delete(&self, key: &str) -> Result<u64, StoreError> {
        let mut keys = self.inner.lease.keys().await;
        let held = keys.remove(key).map(|_| keys);
        let question = DeleteRangeRequest { key: key.into(), range_end: Vec::new() };
        let answer: WriteResponse = self.call("a removal", wire::DELETE_RANGE, question).await?;
        drop(held);
        Ok(revision(answer.header.as_ref()))
    }

    async fn delete_prefix(&self, prefix: &str) -> Result<u64, StoreError> {
        let mut keys = self.inner.lease.keys().await;
        keys.retain(|key, _| !key.starts_with(prefix));
        let (key, range_end) = wire::below(prefix);
        let question = DeleteRangeRequest { key, range_end };
        let answer: WriteResponse = self.call("a removal", wire::DELETE_RANGE, question).await?;
        drop(keys);
        Ok(revision(answer.header.as_ref()))
    }

    async fn health(&self) -> Result<Health, StoreError> {
        let Inner { connection, lease } = &*self.inner;
        let asked = Instant::now();
        // A read through the leader: it works only if the cluster does.
        let call = self.call("a read", wire::RANGE, one_key(STORE_ID));
        let limit = HEALTH_TIMEOUT.min(connection.timeout());
        let answer: RangeResponse = timeout(limit, call).await.unwrap_or_else(|_| {
            Err(StoreError::Unreachable {
                endpoints: connection.names(),
                waited: asked.elapsed(),
                last: "the time for a health check is over".into(),
            })
        })?;
        let latency = asked.elapsed();
        let warning = lease
            .is_missing()
            .await
            .then(|| "the lease was lost and is not back yet: other nodes may not see this one".into());
        Ok(Health {
            backend: connection.name(&connection.current()).to_owned(),
            revision: revision(answer.header.as_ref()),
            id: answer.kvs.into_iter().next().map(|kv| kv.value),
            latency,
            warning,
        })
    }
}

/// An entry; nothing for a key that is not UTF-8, which no Cirri has written.
fn entry(kv: KeyValue) -> Option<Entry> {
    match String::from_utf8(kv.key) {
        Ok(key) => Some(Entry { key, value: kv.value, revision: kv.mod_revision.unsigned_abs() }),
        Err(error) => {
            tracing::warn!(key = ?error.as_bytes(), "a foreign key below Cirri's prefix was passed over");
            None
        }
    }
}

fn revision(header: Option<&Header>) -> u64 {
    header.map_or(0, |header| header.revision.unsigned_abs())
}

fn one_key(key: &str) -> RangeRequest {
    RangeRequest { key: key.into(), range_end: Vec::new(), count_only: false }
}

fn put_request(key: &str, value: &[u8], lease: i64) -> PutRequest {
    PutRequest { key: key.into(), value: value.into(), lease }
}

fn absent(key: &str) -> Compare {
    Compare { target: COMPARE_CREATE, key: key.into(), create_revision: Some(0) }
}

const HEALTH_TIMEOUT: Duration = Duration::from_secs(3);
