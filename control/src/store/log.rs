//! The durable log: what of the store is on disk, and how it is read back.
//!
//! ```text
//!  table log   (revision, key) ─► tag, create revision, value     one row per change
//!  table meta  name ─► number or text                             format, lineage, revision, compacted
//! ```
//! A value is written once. Rows leave when nobody can ask for them any more: a superseded value
//! goes when the change that superseded it leaves the history window, a deletion when it leaves the
//! window itself. So reading all rows in revision order rebuilds both the latest entries and the
//! history with its previous values, and the file stays at live data + window.
//!
//! redb's one-phase commit is used: one fsync per batch, checksummed, the last valid commit wins.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};

use super::{Change, Entry, Lineage, OpenError, Revision};

const LOG: TableDefinition<'_, (u64, &str), &[u8]> = TableDefinition::new("log");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
const TEXTS: TableDefinition<'_, &str, &str> = TableDefinition::new("texts");

/// Version of the row layout.
const FORMAT: u64 = 1;
/// redb's page cache: rows are read once, at the start, so it only serves the B-tree's inner pages.
const CACHE_BYTES: usize = 4 << 20;

const TAG_PUT: u8 = 1;
const TAG_DELETE: u8 = 2;
/// Tag and create revision.
const ROW_HEADER_BYTES: usize = 9;

/// What the log holds, as the index wants it.
pub(super) struct Content {
    pub(super) lineage: Lineage,
    pub(super) revision: Revision,
    pub(super) compacted: Revision,
    pub(super) entries: BTreeMap<Arc<str>, Arc<Entry>>,
    pub(super) history: Vec<Arc<Change>>,
}

/// What one durable commit writes.
pub(super) struct Batch<'a> {
    pub(super) changes: &'a [Arc<Change>],
    /// The store's revision after it.
    pub(super) revision: Revision,
    /// Start of the history window after it.
    pub(super) compacted: Revision,
    /// Rows to forget.
    pub(super) superseded: &'a [(Revision, Arc<str>)],
}

/// Where batches become durable. All or nothing; an error means: unknown, reopen to see.
pub(super) trait Log: Send {
    /// Returns when the batch is durable.
    fn append(&mut self, batch: &Batch<'_>) -> Result<(), String>;
}

/// The log in a redb file.
pub(super) struct RedbLog {
    database: Database,
}

impl RedbLog {
    /// Opens or creates the file and reads all of it.
    pub(super) fn open(path: &Path) -> Result<(Box<dyn Log>, Content), OpenError> {
        let shown = path.display().to_string();
        let database = redb::Builder::new()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|error| open_error(&shown, error))?;
        RedbLog::load(database).map_err(|reason| OpenError::Corrupt {
            path: shown,
            reason,
        })
    }

    /// Reads the whole content of an open database, writing the first rows of a new one.
    pub(super) fn load(database: Database) -> Result<(Box<dyn Log>, Content), String> {
        initialise(&database).map_err(|error| error.to_string())?;
        let content = read_content(&database)?;
        Ok((Box::new(RedbLog { database }), content))
    }

    fn write(&self, batch: &Batch<'_>) -> Result<(), redb::Error> {
        // Durability::Immediate is redb's default: commit returns after the fsync.
        let txn = self.database.begin_write()?;
        {
            let mut log = txn.open_table(LOG)?;
            let mut row = Vec::new();
            for change in batch.changes {
                encode_row(change, &mut row);
                log.insert((change.revision(), &**change.key()), row.as_slice())?;
            }
            for (revision, key) in batch.superseded {
                log.remove((*revision, &**key))?;
            }
            let mut numbers = txn.open_table(NUMBERS)?;
            numbers.insert("revision", batch.revision)?;
            numbers.insert("compacted", batch.compacted)?;
        }
        txn.commit()?;
        Ok(())
    }
}

impl Log for RedbLog {
    fn append(&mut self, batch: &Batch<'_>) -> Result<(), String> {
        self.write(batch).map_err(|error| error.to_string())
    }
}

/// A store that is there, locked as long as this lives.
pub(super) struct Held {
    _database: Database,
    pub(super) lineage: Lineage,
    pub(super) revision: Revision,
}

/// Locks the store at `path` against a control plane and reads which history it is; `None` without one.
pub(super) fn hold(path: &Path) -> Result<Option<Held>, OpenError> {
    if !path.exists() {
        return Ok(None);
    }
    let shown = path.display().to_string();
    let database = redb::Builder::new()
        .set_cache_size(CACHE_BYTES)
        .open(path)
        .map_err(|error| open_error(&shown, error))?;
    let (lineage, revision) = read_history(&database).map_err(|reason| OpenError::Corrupt {
        path: shown,
        reason,
    })?;
    Ok(Some(Held {
        _database: database,
        lineage,
        revision,
    }))
}

/// A new file on its way to become a store: a restore fills it.
pub(super) struct Filling {
    database: Database,
}

impl Filling {
    /// Creates the file.
    pub(super) fn create(path: &Path) -> Result<Filling, String> {
        let database = redb::Builder::new()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|error| error.to_string())?;
        Ok(Filling { database })
    }

    /// Adds entries; durable when this returns.
    pub(super) fn put(&self, entries: &[Entry]) -> Result<(), String> {
        let put = || -> Result<(), redb::Error> {
            let txn = self.database.begin_write()?;
            {
                let mut log = txn.open_table(LOG)?;
                let mut row = Vec::new();
                for entry in entries {
                    encode_put(entry, &mut row);
                    log.insert((entry.mod_revision, &*entry.key), row.as_slice())?;
                }
            }
            txn.commit()?;
            Ok(())
        };
        put().map_err(|error| error.to_string())
    }

    /// Makes it a store: of this history, at this revision, with no older one to watch from.
    pub(super) fn finish(self, lineage: &Lineage, revision: Revision) -> Result<(), String> {
        let finish = || -> Result<(), redb::Error> {
            let txn = self.database.begin_write()?;
            {
                txn.open_table(LOG)?;
                let mut numbers = txn.open_table(NUMBERS)?;
                numbers.insert("format", FORMAT)?;
                numbers.insert("lineage-counter", lineage.counter)?;
                numbers.insert("revision", revision)?;
                numbers.insert("compacted", revision)?;
                let mut texts = txn.open_table(TEXTS)?;
                texts.insert("lineage-id", &*lineage.id)?;
            }
            txn.commit()?;
            Ok(())
        };
        finish().map_err(|error| error.to_string())
    }
}

fn open_error(path: &str, error: DatabaseError) -> OpenError {
    let path = path.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen => OpenError::Locked { path },
        DatabaseError::Storage(redb::StorageError::Io(error)) => OpenError::Io {
            path,
            reason: error.to_string(),
        },
        other => OpenError::Corrupt {
            path,
            reason: other.to_string(),
        },
    }
}

/// Gives a new file its format and lineage.
fn initialise(database: &Database) -> Result<(), redb::Error> {
    let txn = database.begin_write()?;
    {
        let mut numbers = txn.open_table(NUMBERS)?;
        txn.open_table(LOG)?;
        let mut texts = txn.open_table(TEXTS)?;
        if numbers.get("format")?.is_none() {
            numbers.insert("format", FORMAT)?;
            numbers.insert("lineage-counter", 1)?;
            let id = uuid::Uuid::new_v4().to_string();
            texts.insert("lineage-id", id.as_str())?;
        }
    }
    txn.commit()?;
    Ok(())
}

fn read_content(database: &Database) -> Result<Content, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let txn = database.begin_read().map_err(|e| text(&e))?;
    let numbers = txn.open_table(NUMBERS).map_err(|e| text(&e))?;
    let number = |name: &str| -> Result<u64, String> {
        let value = numbers.get(name).map_err(|e| text(&e))?;
        Ok(value.map_or(0, |v| v.value()))
    };
    let format = number("format")?;
    if format != FORMAT {
        return Err(format!(
            "its format is {format}, this program reads {FORMAT}"
        ));
    }
    let (lineage, revision) = read_history(database)?;
    let mut content = Content {
        lineage,
        revision,
        compacted: number("compacted")?,
        entries: BTreeMap::new(),
        history: Vec::new(),
    };
    let log = txn.open_table(LOG).map_err(|e| text(&e))?;
    for row in log.iter().map_err(|e| text(&e))? {
        let (row_key, row_value) = row.map_err(|e| text(&e))?;
        let (revision, key) = row_key.value();
        content.replay(revision, key, row_value.value())?;
    }
    Ok(content)
}

/// Which history a file holds, and how far.
fn read_history(database: &Database) -> Result<(Lineage, Revision), String> {
    let read = || -> Result<(Lineage, Revision), redb::Error> {
        let txn = database.begin_read()?;
        let numbers = txn.open_table(NUMBERS)?;
        let number = |name: &str| -> Result<u64, redb::Error> {
            Ok(numbers.get(name)?.map_or(0, |v| v.value()))
        };
        let texts = txn.open_table(TEXTS)?;
        let id = texts.get("lineage-id")?;
        let lineage = Lineage {
            counter: number("lineage-counter")?,
            id: id.map(|v| v.value().to_owned()).unwrap_or_default(),
        };
        Ok((lineage, number("revision")?))
    };
    read().map_err(|error| error.to_string())
}

impl Content {
    /// Takes the next row in (revision, key) order.
    fn replay(&mut self, revision: Revision, key: &str, row: &[u8]) -> Result<(), String> {
        let Some((tag, create_revision, value)) = decode_row(row) else {
            return Err(format!(
                "the row of {key} at revision {revision} is cut short"
            ));
        };
        if revision > self.revision {
            return Err(format!(
                "{key} is at revision {revision}, past the last one, {}",
                self.revision
            ));
        }
        let previous = self.entries.get(key).cloned();
        let key: Arc<str> = previous
            .as_ref()
            .map_or_else(|| key.into(), |p| Arc::clone(&p.key));
        let change = match (tag, previous) {
            (TAG_PUT, previous) => {
                let entry = Arc::new(Entry {
                    key: Arc::clone(&key),
                    value: Bytes::copy_from_slice(value),
                    create_revision,
                    mod_revision: revision,
                });
                self.entries.insert(key, Arc::clone(&entry));
                Change::Put { entry, previous }
            }
            (TAG_DELETE, Some(previous)) => {
                self.entries.remove(&key);
                Change::Delete {
                    key,
                    previous,
                    revision,
                }
            }
            (TAG_DELETE, None) => return Err(format!("{key} is deleted but was never written")),
            (other, _) => return Err(format!("the row of {key} has the unknown tag {other}")),
        };
        if revision > self.compacted {
            self.history.push(Arc::new(change));
        }
        Ok(())
    }
}

fn encode_row(change: &Change, row: &mut Vec<u8>) {
    row.clear();
    match change {
        Change::Put { entry, .. } => encode_put(entry, row),
        Change::Delete { previous, .. } => {
            row.push(TAG_DELETE);
            row.extend_from_slice(&previous.create_revision.to_le_bytes());
        }
    }
}

fn encode_put(entry: &Entry, row: &mut Vec<u8>) {
    row.clear();
    row.push(TAG_PUT);
    row.extend_from_slice(&entry.create_revision.to_le_bytes());
    row.extend_from_slice(&entry.value);
}

fn decode_row(row: &[u8]) -> Option<(u8, Revision, &[u8])> {
    let (header, value) = row.split_at_checked(ROW_HEADER_BYTES)?;
    let (tag, create_revision) = header.split_first()?;
    let create_revision = u64::from_le_bytes(create_revision.try_into().ok()?);
    Some((*tag, create_revision, value))
}

/// Rows in the log of a closed store.
#[cfg(test)]
pub(super) fn row_count(path: &Path) -> usize {
    use redb::ReadableTableMetadata as _;
    let database = Database::open(path).unwrap();
    let txn = database.begin_read().unwrap();
    let rows = txn.open_table(LOG).unwrap().len().unwrap();
    usize::try_from(rows).unwrap()
}
