//! The embedded store: one file, one process, no other software.
//!
//! The state is small, so all of it is held in memory; the file is there to survive a restart.
//! A write goes to the file first and becomes visible only once it is durable: what a reader or a
//! watch saw once is there after a crash too.

mod file;

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use futures::stream;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, broadcast};

use crate::{Entry, Event, EventStream, Health, STORE_ID, Store, StoreError};
use file::StateFile;

/// A store in one file.
///
/// Clones share the file. It is closed when the last clone and the last watch are gone. Leased keys
/// end with the process: those that an earlier process left behind are removed at opening.
#[derive(Clone)]
pub struct Embedded {
    inner: Arc<Inner>,
}

/// A damaged file that was moved out of the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetAside {
    /// Where it is now.
    pub path: PathBuf,
    /// What was wrong with it.
    pub reason: String,
}

impl Embedded {
    /// Opens the store at `path`, and creates it if there is none.
    ///
    /// A damaged file is renamed to `<path>.damaged`, with a warning, and an empty store takes its
    /// place: everything in it follows from the manifests and the running workloads.
    ///
    /// # Errors
    /// [`StoreError::InUse`], [`StoreError::Schema`], [`StoreError::DiskFull`],
    /// [`StoreError::Io`]; [`StoreError::Corrupt`] if a damaged file cannot be renamed.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref().to_owned();
        blocking(move || {
            let (file, memory) = StateFile::open(path)?;
            let inner = Inner {
                path: file.path().to_owned(),
                set_aside: file.set_aside().cloned(),
                memory: Mutex::new(memory),
                file: Arc::new(AsyncMutex::new(file)),
                changes: broadcast::Sender::new(WATCH_BACKLOG),
            };
            Ok(Embedded { inner: Arc::new(inner) })
        })
        .await
    }

    /// The damaged file that opening found and moved away, if any.
    pub fn set_aside(&self) -> Option<&SetAside> {
        self.inner.set_aside.as_ref()
    }

    /// Where its file is.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Writes keys, and removes those without a value, in one revision; answers the revision.
    ///
    /// # Errors
    /// As for [`Store::put`]; nothing was written then.
    pub async fn write_all(&self, entries: &[(String, Option<Vec<u8>>)]) -> Result<u64, StoreError> {
        let one = |(key, value): &(String, Option<Vec<u8>>)| match value {
            Some(value) => Change::put(key, value, false),
            None => Change::Delete(key.clone()),
        };
        let changes = entries.iter().map(one).collect();
        let (revision, ()) = self.write(|_| (changes, ())).await?;
        Ok(revision)
    }

    /// Writes the file anew, with all that is known. For one that somebody removed: what is written into it is lost with
    /// its end.
    ///
    /// # Errors
    /// As for [`Store::put`]; the next write tries again.
    pub async fn write_anew(&self) -> Result<(), StoreError> {
        let mut file = Arc::clone(&self.inner.file).lock_owned().await;
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            // Only the holder of the file changes the memory.
            let memory = inner.memory().clone();
            file.write_anew(&memory)
        })
        .await
    }

    /// Makes the changes that `plan` chooses by the present state one new revision. No change, no
    /// new revision. Answers the newest revision and what `plan` answered.
    ///
    /// Runs to its end even if the caller is dropped, so that file and memory cannot part.
    async fn write<T, P>(&self, plan: P) -> Result<(u64, T), StoreError>
    where
        T: Send + 'static,
        P: FnOnce(&Memory) -> (Vec<Change>, T) + Send + 'static,
    {
        let file = Arc::clone(&self.inner.file).lock_owned().await;
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.write(file, plan)).await
    }
}

#[async_trait::async_trait]
impl Store for Embedded {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(self.inner.memory().get(key))
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, u64), StoreError> {
        let memory = self.inner.memory();
        Ok((memory.below(prefix), memory.revision))
    }

    fn watch(&self, prefix: &str) -> EventStream {
        let watch = Watch::new(Arc::clone(&self.inner), prefix.to_owned());
        Box::pin(stream::unfold(watch, |mut watch| async move {
            let event = watch.next().await;
            Some((event, watch))
        }))
    }

    async fn put(&self, key: &str, value: &[u8], lease: bool) -> Result<u64, StoreError> {
        let change = Change::put(key, value, lease);
        let (revision, ()) = self.write(|_| (vec![change], ())).await?;
        Ok(revision)
    }

    async fn put_all(&self, entries: &[(&str, &[u8])]) -> Result<u64, StoreError> {
        let changes = entries.iter().map(|(key, value)| Change::put(key, value, false)).collect();
        let (revision, ()) = self.write(|_| (changes, ())).await?;
        Ok(revision)
    }

    async fn create(&self, key: &str, value: &[u8], lease: bool) -> Result<bool, StoreError> {
        self.create_changes(vec![Change::put(key, value, lease)]).await
    }

    async fn create_all(&self, entries: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        let changes = entries.iter().map(|(key, value)| Change::put(key, value, false)).collect();
        self.create_changes(changes).await
    }

    async fn delete(&self, key: &str) -> Result<u64, StoreError> {
        let key = key.to_owned();
        let (revision, ()) = self
            .write(move |memory| {
                let there = memory.entries.contains_key(&key);
                (there.then_some(Change::Delete(key)).into_iter().collect(), ())
            })
            .await?;
        Ok(revision)
    }

    async fn delete_prefix(&self, prefix: &str) -> Result<u64, StoreError> {
        let prefix = prefix.to_owned();
        let (revision, ()) = self
            .write(move |memory| {
                let doomed = memory.range(&prefix);
                (doomed.map(|(key, _)| Change::Delete(key.clone())).collect(), ())
            })
            .await?;
        Ok(revision)
    }

    async fn health(&self) -> Result<Health, StoreError> {
        let asked = Instant::now();
        let memory = self.inner.memory();
        let warning = memory.fault.clone().or_else(|| {
            let aside = self.inner.set_aside.as_ref()?;
            Some(format!("the former file was damaged ({}) and is kept as {}", aside.reason, aside.path.display()))
        });
        Ok(Health {
            backend: self.inner.path.display().to_string(),
            revision: memory.revision,
            id: memory.get(STORE_ID).map(|entry| entry.value),
            latency: asked.elapsed(),
            warning,
        })
    }
}

impl Embedded {
    async fn create_changes(&self, changes: Vec<Change>) -> Result<bool, StoreError> {
        let (_, created) = self
            .write(move |memory| {
                let mut keys = changes.iter().map(Change::key);
                if keys.any(|key| memory.entries.contains_key(key)) { (Vec::new(), false) } else { (changes, true) }
            })
            .await?;
        Ok(created)
    }
}

struct Inner {
    path: PathBuf,
    set_aside: Option<SetAside>,
    /// What readers see: durable, never ahead of the file.
    memory: Mutex<Memory>,
    /// Held for a whole write: writes are made one after the other.
    file: Arc<AsyncMutex<StateFile>>,
    /// Sent to with `memory` locked, so that the order of batches is the order of revisions and a
    /// snapshot taken under the same lock fits between two of them.
    changes: broadcast::Sender<Arc<Batch>>,
}

impl Inner {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        // Nothing panics between two related updates, so a poisoned lock guards good state.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write<T>(
        &self,
        mut file: OwnedMutexGuard<StateFile>,
        plan: impl FnOnce(&Memory) -> (Vec<Change>, T),
    ) -> Result<(u64, T), StoreError> {
        // Only the holder of the file changes the memory, so what is read here stays true.
        let (changes, answer, before) = {
            let memory = self.memory();
            let (changes, answer) = plan(&memory);
            (changes, answer, file.is_closed().then(|| memory.clone()))
        };
        if changes.is_empty() {
            return Ok((self.memory().revision, answer));
        }
        let revision = self.memory().revision + 1;
        let written = file.commit(revision, &changes, before.as_ref());

        let mut memory = self.memory();
        if let Err(error) = written {
            memory.fault = Some(error.to_string());
            return Err(error);
        }
        memory.fault = None;
        memory.revision = revision;
        let events = changes.into_iter().map(|change| memory.apply(change, revision)).collect();
        // No receiver is no error: nobody watches.
        let _ = self.changes.send(Arc::new(Batch { revision, events }));
        Ok((revision, answer))
    }
}

/// The whole state.
#[derive(Clone, Default)]
struct Memory {
    revision: u64,
    entries: BTreeMap<String, Value>,
    /// Why the last write failed, until one succeeds.
    fault: Option<String>,
}

#[derive(Clone)]
struct Value {
    bytes: Vec<u8>,
    revision: u64,
    leased: bool,
}

impl Memory {
    fn get(&self, key: &str) -> Option<Entry> {
        let value = self.entries.get(key)?;
        Some(value.entry(key))
    }

    fn below(&self, prefix: &str) -> Vec<Entry> {
        let range = self.range(prefix);
        range.map(|(key, value)| value.entry(key)).collect()
    }

    fn range(&self, prefix: &str) -> impl Iterator<Item = (&String, &Value)> {
        self.entries
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
    }

    fn apply(&mut self, change: Change, revision: u64) -> Event {
        match change {
            Change::Put { key, bytes, leased } => {
                let value = Value { bytes, revision, leased };
                let event = Event::Put(value.entry(&key));
                self.entries.insert(key, value);
                event
            }
            Change::Delete(key) => {
                self.entries.remove(&key);
                Event::Delete { key, revision }
            }
        }
    }
}

impl Value {
    fn entry(&self, key: &str) -> Entry {
        Entry { key: key.to_owned(), value: self.bytes.clone(), revision: self.revision }
    }
}

/// One key's part of a revision.
enum Change {
    Put { key: String, bytes: Vec<u8>, leased: bool },
    Delete(String),
}

impl Change {
    fn put(key: &str, bytes: &[u8], leased: bool) -> Self {
        Change::Put { key: key.to_owned(), bytes: bytes.to_owned(), leased }
    }

    fn key(&self) -> &str {
        match self {
            Change::Put { key, .. } | Change::Delete(key) => key,
        }
    }
}

/// One revision, as watches get it.
struct Batch {
    revision: u64,
    events: Vec<Event>,
}

struct Watch {
    inner: Arc<Inner>,
    prefix: String,
    changes: broadcast::Receiver<Arc<Batch>>,
    ready: VecDeque<Event>,
}

impl Watch {
    fn new(inner: Arc<Inner>, prefix: String) -> Self {
        let (changes, snapshot) = Self::start(&inner, &prefix);
        Watch { inner, prefix, changes, ready: VecDeque::from([snapshot]) }
    }

    fn start(inner: &Inner, prefix: &str) -> (broadcast::Receiver<Arc<Batch>>, Event) {
        let memory = inner.memory();
        let snapshot = Event::Snapshot(memory.below(prefix), memory.revision);
        (inner.changes.subscribe(), snapshot)
    }

    async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return event;
            }
            match self.changes.recv().await {
                Ok(batch) => {
                    let ours = batch.events.iter().filter(|event| match event {
                        Event::Put(entry) => entry.key.starts_with(&self.prefix),
                        Event::Delete { key, .. } => key.starts_with(&self.prefix),
                        Event::Progress(_) | Event::Snapshot(..) => true,
                    });
                    self.ready.extend(ours.cloned());
                    self.ready.push_back(Event::Progress(batch.revision));
                }
                // Too slow, and batches were dropped: what is true now replaces them. (Closed
                // cannot be: `inner` holds the sender.)
                Err(_) => {
                    let (changes, snapshot) = Self::start(&self.inner, &self.prefix);
                    self.changes = changes;
                    self.ready.push_back(snapshot);
                }
            }
        }
    }
}

/// Runs file work where it may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(failed) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down: nobody will look at the answer.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Revisions a watch may lag behind before it gets a new snapshot instead.
const WATCH_BACKLOG: usize = 4096;
