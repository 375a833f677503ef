//! The file behind the embedded store.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};

use super::{Change, Memory, SetAside, Value};
use crate::StoreError;

/// A redb file. An input/output error closes it; the next commit opens it again and brings it back to
/// what the memory says, which is the truth by then.
pub(super) struct StateFile {
    path: PathBuf,
    database: Option<Database>,
    set_aside: Option<SetAside>,
}

impl StateFile {
    /// Opens or creates the file; answers the state in it, without the leased keys of the process
    /// that wrote it.
    pub(super) fn open(path: PathBuf) -> Result<(Self, Memory), StoreError> {
        let (database, memory, set_aside) = match read(&path) {
            Ok((database, memory)) => (database, memory, None),
            Err(Unreadable::Refused(error)) => return Err(error),
            Err(Unreadable::Damaged(reason)) => {
                let aside = set_aside(&path, reason)?;
                let (database, memory) = read(&path).map_err(|error| error.into_error(&path))?;
                (database, memory, Some(aside))
            }
        };
        let mut file = StateFile { path, database: Some(database), set_aside };
        let memory = file.drop_leases(memory)?;
        Ok((file, memory))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn set_aside(&self) -> Option<&SetAside> {
        self.set_aside.as_ref()
    }

    /// An error closed the file: the next commit must be told the state before it.
    pub(super) fn is_closed(&self) -> bool {
        self.database.is_none()
    }

    /// Makes one revision durable. `before`: the state before it, needed if the file is closed.
    pub(super) fn commit(
        &mut self,
        revision: u64,
        changes: &[Change],
        before: Option<&Memory>,
    ) -> Result<(), StoreError> {
        let mut rewrite = None;
        let database = match self.database.take() {
            Some(database) => database,
            None => {
                let (database, found) = reopen(&self.path)?;
                // The write that failed may have reached the file after all, or the file was
                // damaged: then all of it is replaced. Otherwise nothing is missing in it.
                rewrite = before.filter(|before| before.revision != found.revision);
                database
            }
        };
        match write(&database, revision, changes, rewrite) {
            Ok(()) => {
                self.database = Some(database);
                Ok(())
            }
            // The file stays closed: redb takes nothing more before it is opened again.
            Err(error) => Err(explain(error, "write", &self.path)),
        }
    }

    /// Leaves the file that is open to itself, and writes what is at its path by now.
    pub(super) fn write_anew(&mut self, memory: &Memory) -> Result<(), StoreError> {
        self.database = None;
        self.commit(memory.revision, &[], Some(memory))
    }

    fn drop_leases(&mut self, mut memory: Memory) -> Result<Memory, StoreError> {
        let leased = memory.entries.iter().filter(|(_, value)| value.leased);
        let changes: Vec<Change> = leased.map(|(key, _)| Change::Delete(key.clone())).collect();
        if !changes.is_empty() {
            let revision = memory.revision + 1;
            self.commit(revision, &changes, None)?;
            memory.revision = revision;
            memory.entries.retain(|_, value| !value.leased);
        }
        Ok(memory)
    }
}

enum Unreadable {
    /// The content makes no sense; a new file may take its place.
    Damaged(String),
    /// The file may be fine; hands off.
    Refused(StoreError),
}

impl Unreadable {
    /// For a file that was created a moment ago and cannot be damaged already.
    fn into_error(self, path: &Path) -> StoreError {
        match self {
            Unreadable::Refused(error) => error,
            Unreadable::Damaged(reason) => StoreError::Io {
                doing: "create",
                path: path.to_owned(),
                source: io::Error::new(io::ErrorKind::InvalidData, reason),
            },
        }
    }
}

/// Opens the file, checks all of it and reads the state.
fn read(path: &Path) -> Result<(Database, Memory), Unreadable> {
    // redb panics on some kinds of damage; that is one more way to say it.
    let opened = catch_unwind(AssertUnwindSafe(|| -> Result<_, redb::Error> {
        let mut database = Database::create(path)?;
        database.check_integrity()?;
        let state = load(&database)?;
        Ok((database, state))
    }));
    let (database, state) = match opened {
        Ok(Ok(opened)) => opened,
        Ok(Err(error)) => return Err(classify(error, path)),
        Err(_) => return Err(Unreadable::Damaged("its structure is broken".into())),
    };
    match state {
        State::New => {
            write(&database, 0, &[], None).map_err(|error| Unreadable::Refused(explain(error, "create", path)))?;
            Ok((database, Memory::default()))
        }
        State::Written { schema, memory } if schema == SCHEMA => Ok((database, memory)),
        State::Written { schema, .. } => {
            Err(Unreadable::Refused(StoreError::Schema { path: path.to_owned(), found: schema, known: SCHEMA }))
        }
    }
}

/// Opens a file that an error closed.
fn reopen(path: &Path) -> Result<(Database, Memory), StoreError> {
    match read(path) {
        Ok(opened) => Ok(opened),
        Err(Unreadable::Refused(error)) => Err(error),
        Err(Unreadable::Damaged(reason)) => {
            set_aside(path, reason)?;
            read(path).map_err(|error| error.into_error(path))
        }
    }
}

enum State {
    New,
    Written { schema: u64, memory: Memory },
}

fn load(database: &Database) -> Result<State, redb::Error> {
    let transaction = database.begin_read()?;
    let meta = match transaction.open_table(META) {
        Ok(meta) => meta,
        Err(TableError::TableDoesNotExist(_)) => return Ok(State::New),
        Err(error) => return Err(error.into()),
    };
    let number = |name: &str| -> Result<u64, redb::Error> {
        let found = meta.get(name)?;
        found.map(|number| number.value()).ok_or_else(|| redb::Error::Corrupted(format!("`{name}` is missing")))
    };
    let schema = number(META_SCHEMA)?;
    let mut memory = Memory::default();
    // Another schema may keep its entries elsewhere: they are not looked at.
    if schema == SCHEMA {
        memory.revision = number(META_REVISION)?;
        for row in transaction.open_table(ENTRIES)?.iter()? {
            let (key, value) = row?;
            let (revision, leased, bytes) = value.value();
            let value = Value { bytes: bytes.to_owned(), revision, leased };
            memory.entries.insert(key.value().to_owned(), value);
        }
    }
    Ok(State::Written { schema, memory })
}

fn write(database: &Database, revision: u64, changes: &[Change], whole: Option<&Memory>) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    if whole.is_some() {
        transaction.delete_table(ENTRIES)?;
    }
    {
        let mut meta = transaction.open_table(META)?;
        meta.insert(META_SCHEMA, SCHEMA)?;
        meta.insert(META_REVISION, revision)?;
        let mut entries = transaction.open_table(ENTRIES)?;
        for (key, value) in whole.iter().flat_map(|memory| &memory.entries) {
            let row = (value.revision, value.leased, value.bytes.as_slice());
            entries.insert(key.as_str(), row)?;
        }
        for change in changes {
            match change {
                Change::Put { key, bytes, leased } => {
                    entries.insert(key.as_str(), (revision, *leased, bytes.as_slice()))?;
                }
                Change::Delete(key) => {
                    entries.remove(key.as_str())?;
                }
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

fn set_aside(path: &Path, reason: String) -> Result<SetAside, StoreError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".damaged");
    let aside = PathBuf::from(name);
    std::fs::rename(path, &aside).map_err(|source| StoreError::Corrupt {
        path: path.to_owned(),
        reason: reason.clone(),
        source,
    })?;
    tracing::warn!(
        file = %path.display(),
        kept_as = %aside.display(),
        %reason,
        "the state file is damaged: it was set aside and an empty one started; the state is \
         rebuilt from the manifests and the running workloads"
    );
    Ok(SetAside { path: aside, reason })
}

/// Is it the file's content, or something around it?
fn classify(error: redb::Error, path: &Path) -> Unreadable {
    match error {
        redb::Error::Io(source)
            if matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
        {
            Unreadable::Damaged(source.to_string())
        }
        error @ (redb::Error::Io(_) | redb::Error::DatabaseAlreadyOpen) => {
            Unreadable::Refused(explain(error, "open", path))
        }
        // Whatever else redb finds wrong is about what the file says.
        error => Unreadable::Damaged(error.to_string()),
    }
}

fn explain(error: redb::Error, doing: &'static str, path: &Path) -> StoreError {
    let path = path.to_owned();
    match error {
        redb::Error::DatabaseAlreadyOpen => StoreError::InUse { path },
        redb::Error::Io(source)
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
        {
            StoreError::DiskFull { path }
        }
        redb::Error::Io(source) => StoreError::Io { doing, path, source },
        error => StoreError::Io { doing, path, source: io::Error::other(error) },
    }
}

const SCHEMA: u64 = 1;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const META_SCHEMA: &str = "schema";
const META_REVISION: &str = "revision";

/// Key → (revision that wrote it, leased, value).
const ENTRIES: TableDefinition<'_, &str, (u64, bool, &[u8])> = TableDefinition::new("entries");
