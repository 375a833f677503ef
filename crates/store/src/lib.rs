//! Where cluster state lives: an embedded file, etcd, or a folder of manifests.
//!
//! [`Store`] is one flat, ordered map of keys with a revision that only grows. Every write makes a
//! new revision; a watch hands all changes below a prefix out in the order of their revisions. What
//! a node must know fits in one watch, so each agent sees one total order of the whole cluster.
//!
//! * [`Embedded`]: one file, one process. For a node on its own.
//! * [`Etcd`]: shared by many agents. Keys can be bound to a lease, so that they leave with the node.
//! * [`folder`]: not a store but a source: the manifests in a directory, parsed, as they change.
#![forbid(unsafe_code)]

mod embedded;
mod error;
mod etcd;
pub mod folder;
mod paths;

pub use embedded::{Embedded, SetAside};
pub use error::StoreError;
pub use etcd::{Etcd, EtcdOptions};
pub use paths::{News, Paths};

use std::time::Duration;

use futures::stream::BoxStream;

/// All keys of this version of Cirri start with this.
pub const PREFIX: &str = "cirri/v1/";

/// The key of the store's own id, which agents write where there is none: data with another id, or without one, are not
/// those of before. etcd's number of a cluster does not tell that: it follows from the members' addresses, and is the same
/// after their data were lost.
pub const STORE_ID: &str = "cirri/v1/store-id";

/// One key as it was at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The whole key, [`PREFIX`] included.
    pub key: String,
    /// What was written.
    pub value: Vec<u8>,
    /// The revision that last wrote the key.
    pub revision: u64,
}

/// What a watch yields, in the order of revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The key was written.
    Put(Entry),
    /// The key went away: deleted, or its lease ended.
    Delete {
        /// The whole key.
        key: String,
        /// The revision that removed it.
        revision: u64,
    },
    /// Every change up to and including this revision has been handed out. One revision may hold
    /// many changes, so only this (or a snapshot) says that a revision is complete. Follows each
    /// group of changes, and comes now and then while nothing below the prefix changes.
    Progress(u64),
    /// Everything below the prefix at one revision: replaces all that was known, and counts as
    /// progress. First event of each watch; comes again when history was lost (compaction, a slow
    /// reader, a store that was replaced).
    Snapshot(Vec<Entry>, u64),
}

/// A watch. It never ends and never fails: it reconnects by itself. Dropping it ends the watch.
pub type EventStream = BoxStream<'static, Event>;

/// What [`Store::health`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Which store answered: a path or an endpoint.
    pub backend: String,
    /// The store's newest revision.
    pub revision: u64,
    /// What it holds under [`STORE_ID`].
    pub id: Option<Vec<u8>>,
    /// How long the answer took.
    pub latency: Duration,
    /// What an operator should know although the store answers.
    pub warning: Option<String>,
}

/// Shared state with revisions.
///
/// Calls may be made from any task, in any order. A call that fails may be tried again: writes are
/// idempotent. Keys are UTF-8; prefixes are matched byte by byte, so end them with `/`.
#[async_trait::async_trait]
pub trait Store: Send + Sync {
    /// One key, or nothing.
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// All entries below `prefix` in key order, and the revision they were read at.
    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, u64), StoreError>;

    /// All changes below `prefix`, starting with a [`Event::Snapshot`].
    fn watch(&self, prefix: &str) -> EventStream;

    /// Writes a key; answers the revision. `lease`: the key belongs to this process and goes away
    /// with it. A leased key is written again by itself if the lease was lost meanwhile.
    async fn put(&self, key: &str, value: &[u8], lease: bool) -> Result<u64, StoreError>;

    /// Writes several keys without a lease; answers the last revision. In one revision where the
    /// store can: a durable write takes the disk as long for one key as for a thousand.
    async fn put_all(&self, entries: &[(&str, &[u8])]) -> Result<u64, StoreError> {
        let mut revision = 0;
        for (key, value) in entries {
            revision = self.put(key, value, false).await?;
        }
        Ok(revision)
    }

    /// Writes a key that does not exist. `false`: it exists and nothing was written. When the
    /// answer to an attempt was lost, an existing key with the same value counts as written by us:
    /// let the value name its owner where that matters.
    async fn create(&self, key: &str, value: &[u8], lease: bool) -> Result<bool, StoreError>;

    /// Writes several keys in one revision, if none of them exists. `false`: at least one exists
    /// and nothing was written. Lost answers: as for [`Store::create`].
    async fn create_all(&self, entries: &[(&str, &[u8])]) -> Result<bool, StoreError>;

    /// Removes a key; answers the revision. Removing what is not there is no error.
    async fn delete(&self, key: &str) -> Result<u64, StoreError>;

    /// Removes everything below `prefix` in one revision; answers the revision.
    async fn delete_prefix(&self, prefix: &str) -> Result<u64, StoreError>;

    /// Asks the store a question that it can only answer when it works; bounded in time.
    async fn health(&self) -> Result<Health, StoreError>;
}
