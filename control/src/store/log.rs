//! The durable log: what of the store is on disk, and how it is read back.
//!
//! ```text
//!  table log        (revision, key) ─► tag, create revision, value   one row per change
//!  table data-keys  number ─► a wrapped key (seal.rs)                seal the values of Secrets
//!  table numbers, texts  name ─► number or text                      format, lineage, revision, compacted, resealing
//! ```
//! A value is written once. Rows leave when nobody can ask for them any more: a superseded value
//! goes when the change that superseded it leaves the history window, a deletion when it leaves the
//! window itself. So reading all rows in revision order rebuilds both the latest entries and the
//! history with its previous values, and the file stays at live data + window.
//!
//! A row whose value is to be sealed and is not, or by an old data key, is written anew by
//! [`Log::reseal`], a few rows a transaction; "resealing" is there until the last one was. Only then the old
//! data keys go.
//!
//! redb's one-phase commit is used: one fsync per batch, checksummed, the last valid commit wins.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};

use super::seal::{self, DataKeys, KeyFile, SEALED_PREFIX, Wrapped};
use super::{Change, Entry, Lineage, OpenError, Report, Revision};

const LOG: TableDefinition<'_, (u64, &str), &[u8]> = TableDefinition::new("log");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
const TEXTS: TableDefinition<'_, &str, &str> = TableDefinition::new("texts");

/// Wrapped data keys as JSON, by number.
const DATA_KEYS: TableDefinition<'_, u32, &str> = TableDefinition::new("data-keys");

/// Version of the row layout: 2 may have sealed rows.
const FORMAT: u64 = 2;
/// Without sealed rows; still read.
const FORMAT_CLEAR: u64 = 1;
/// redb's page cache: rows are read once, at the start, so it only serves the B-tree's inner pages.
const CACHE_BYTES: usize = 4 << 20;

const TAG_PUT: u8 = 1;
const TAG_DELETE: u8 = 2;
/// As [`TAG_PUT`], but the value is the number of a data key (4 bytes) and what it has sealed.
const TAG_SEALED: u8 = 3;
/// Tag and create revision.
const ROW_HEADER_BYTES: usize = 9;
/// Rows looked at in one step of resealing.
const RESEAL_ROW_COUNT: usize = 2_048;
/// Bytes written in one step.
const RESEAL_BYTES: usize = 2 << 20;

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

    /// Whether rows wait to be sealed, or sealed anew.
    fn is_resealing(&self) -> bool;

    /// Seals a few of them; durable when this returns.
    fn reseal(&mut self) -> Result<(), String>;

    /// Seals by a new key from now on, and makes the rows of older ones wait. Returns its id.
    fn rotate(&mut self) -> Result<String, String>;

    /// Gives space back to the file system; everything waits meanwhile.
    fn compact(&mut self) -> Result<(), String>;

    /// For people.
    fn report(&self) -> Report;
}

/// The log in a redb file.
pub(super) struct RedbLog {
    database: Database,
    path: PathBuf,
    sealing: Option<Sealing>,
}

/// How values are sealed.
struct Sealing {
    keys: DataKeys,
    file: KeyFile,
    /// Where the next look for rows to seal anew begins; `None`: there are none.
    next: Option<(Revision, String)>,
}

impl RedbLog {
    /// Opens or creates the file and reads all of it.
    ///
    /// * `keys` – the key file; without one nothing is sealed, and nothing that was can be read.
    pub(super) fn open(
        path: &Path,
        keys: Option<&Path>,
    ) -> Result<(Box<dyn Log>, Content), OpenError> {
        guarded(path, || {
            let shown = path.display().to_string();
            let database = redb::Builder::new()
                .set_cache_size(CACHE_BYTES)
                .create(path)
                .map_err(|error| open_error(&shown, error))?;
            RedbLog::load(database, path, keys)
        })
    }

    /// Reads the whole content of an open database, writing the first rows of a new one.
    pub(super) fn load(
        database: Database,
        path: &Path,
        keys: Option<&Path>,
    ) -> Result<(Box<dyn Log>, Content), OpenError> {
        let corrupt = |reason| OpenError::Corrupt {
            path: path.display().to_string(),
            reason,
        };
        initialise(&database).map_err(|error| corrupt(error.to_string()))?;
        check_format(&database).map_err(corrupt)?;
        let sealing = match keys {
            Some(keys) => Some(Sealing::open(&database, path, keys)?),
            None => {
                let (wrapped, _) = read_data_keys(&database).map_err(|e| corrupt(e.to_string()))?;
                if !wrapped.is_empty() {
                    return Err(OpenError::Key(seal::KeyError::Bad {
                        path: path.to_owned(),
                        reason: "opens with its key file only (--store-key)".to_owned(),
                    }));
                }
                None
            }
        };
        let content = read_content(&database, sealing.as_ref()).map_err(corrupt)?;
        let log = RedbLog {
            database,
            path: path.to_owned(),
            sealing,
        };
        Ok((Box::new(log), content))
    }

    fn write(&self, batch: &Batch<'_>) -> Result<(), Box<dyn std::error::Error>> {
        // Durability::Immediate is redb's default: commit returns after the fsync.
        let txn = self.database.begin_write()?;
        {
            let mut log = txn.open_table(LOG)?;
            let mut row = Vec::new();
            for change in batch.changes {
                encode_row(change, self.sealing.as_ref(), &mut row)?;
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
        let write = || self.write(batch).map_err(|error| error.to_string());
        let written = std::panic::catch_unwind(std::panic::AssertUnwindSafe(write));
        written.unwrap_or_else(|_| Err("its pages make no sense".to_owned()))
    }

    fn is_resealing(&self) -> bool {
        self.sealing.as_ref().is_some_and(|s| s.next.is_some())
    }

    fn reseal(&mut self) -> Result<(), String> {
        let Some(sealing) = &mut self.sealing else {
            return Ok(());
        };
        sealing
            .step(&self.database)
            .map_err(|error| error.to_string())
    }

    fn rotate(&mut self) -> Result<String, String> {
        let Some(sealing) = &mut self.sealing else {
            return Err("it was opened without a key".to_owned());
        };
        sealing.file = sealing.file.rotate().map_err(|error| error.to_string())?;
        sealing
            .renew(&self.database)
            .map_err(|error| error.to_string())?;
        Ok(sealing.file.first().id())
    }

    fn compact(&mut self) -> Result<(), String> {
        self.database
            .compact()
            .map(drop)
            .map_err(|error| error.to_string())
    }

    fn report(&self) -> Report {
        let metadata = std::fs::metadata(&self.path);
        Report {
            place: self.path.display().to_string(),
            bytes: metadata.map_or(0, |metadata| metadata.len()),
            sealed_by: self.sealing.as_ref().map(|s| s.file.first().id()),
            is_resealing: self.is_resealing(),
        }
    }
}

impl Sealing {
    /// Opens the data keys of a store, and makes the first, or the next if the key file has a new key.
    fn open(database: &Database, path: &Path, keys: &Path) -> Result<Sealing, OpenError> {
        let corrupt = |error: redb::Error| OpenError::Corrupt {
            path: path.display().to_string(),
            reason: error.to_string(),
        };
        let (wrapped, resealing) = read_data_keys(database).map_err(corrupt)?;
        let file = KeyFile::read_or_make(keys, wrapped.is_empty())?;
        let keys = match wrapped.is_empty() {
            true => DataKeys::none(),
            false => DataKeys::open(&wrapped, &file)?,
        };
        let wrapped_by = wrapped.values().next_back().map(|wrapped| &*wrapped.by);
        let is_current = wrapped_by == Some(&*file.first().id());
        let mut sealing = Sealing {
            keys,
            file,
            next: resealing.then(Default::default),
        };
        if !is_current {
            sealing.renew(database).map_err(|error| OpenError::Io {
                path: path.display().to_string(),
                reason: error.to_string(),
            })?;
        }
        Ok(sealing)
    }

    /// A new data key, of the first key in the file.
    fn renew(&mut self, database: &Database) -> Result<(), Box<dyn std::error::Error>> {
        let next = self.keys.next(self.file.first())?;
        let wrapped = serde_json::to_string(&next.wrapped)?;
        let txn = database.begin_write()?;
        {
            txn.open_table(DATA_KEYS)?
                .insert(next.number, wrapped.as_str())?;
            let mut numbers = txn.open_table(NUMBERS)?;
            numbers.insert("format", FORMAT)?;
            numbers.insert("resealing", 1)?;
        }
        // Before it is durable it must not seal anything: after an error it is as if it had never been.
        txn.commit()?;
        self.keys.take(next);
        self.next = Some(Default::default());
        Ok(())
    }

    /// Seals a few rows anew; at the end the old data keys go.
    fn step(&mut self, database: &Database) -> Result<(), Box<dyn std::error::Error>> {
        let Some((revision, key)) = self.next.clone() else {
            return Ok(());
        };
        let mut rows = Vec::new();
        let (mut bytes, mut next) = (0, None);
        {
            let txn = database.begin_read()?;
            let log = txn.open_table(LOG)?;
            for (looked, row) in log.range((revision, &*key)..)?.enumerate() {
                let (place, value) = row?;
                let (revision, key) = place.value();
                if looked >= RESEAL_ROW_COUNT || bytes >= RESEAL_BYTES {
                    next = Some((revision, key.to_owned()));
                    break;
                }
                if let Some(row) = self.anew(revision, key, value.value())? {
                    bytes += row.len();
                    rows.push((revision, key.to_owned(), row));
                }
            }
        }
        let is_last = next.is_none();
        if is_last || !rows.is_empty() {
            let txn = database.begin_write()?;
            {
                let mut log = txn.open_table(LOG)?;
                for (revision, key, row) in &rows {
                    log.insert((*revision, &**key), row.as_slice())?;
                }
                if is_last {
                    let mut kept = txn.open_table(DATA_KEYS)?;
                    kept.retain(|number, _| number == self.keys.current())?;
                    txn.open_table(NUMBERS)?.remove("resealing")?;
                }
            }
            txn.commit()?;
        }
        if is_last {
            self.keys.retire();
            let key = self.file.first().id();
            tracing::info!(key, "every Secret of the store is sealed by this key");
        }
        self.next = next;
        Ok(())
    }

    /// The row sealed by the newest data key; `None` if it is, or is not to be sealed.
    fn anew(
        &self,
        revision: Revision,
        key: &str,
        row: &[u8],
    ) -> Result<Option<Vec<u8>>, Box<dyn std::error::Error>> {
        if !key.starts_with(SEALED_PREFIX) {
            return Ok(None);
        }
        let (tag, create_revision, value) =
            decode_row(row).ok_or_else(|| format!("the row of {key} is cut short"))?;
        let number = value.get(..4).and_then(|number| number.try_into().ok());
        let is_newest = number.map(u32::from_le_bytes) == Some(self.keys.current());
        if tag == TAG_DELETE || (tag == TAG_SEALED && is_newest) {
            return Ok(None);
        }
        let value = match tag {
            TAG_SEALED => Bytes::from(unseal(Some(self), revision, key, value)?),
            _ => Bytes::copy_from_slice(value),
        };
        let entry = Entry {
            key: key.into(),
            value,
            create_revision,
            mod_revision: revision,
        };
        let mut row = Vec::new();
        encode_put(&entry, Some(self), &mut row)?;
        Ok(Some(row))
    }
}

/// The wrapped data keys, and whether rows wait to be sealed anew.
fn read_data_keys(database: &Database) -> Result<(BTreeMap<u32, Wrapped>, bool), redb::Error> {
    let txn = database.begin_read()?;
    let mut wrapped = BTreeMap::new();
    for row in txn.open_table(DATA_KEYS)?.iter()? {
        let (number, text) = row?;
        let key = serde_json::from_str(text.value()).map_err(|_| {
            redb::Error::Corrupted(format!("data key {} cannot be read", number.value()))
        })?;
        wrapped.insert(number.value(), key);
    }
    let resealing = txn.open_table(NUMBERS)?.get("resealing")?.is_some();
    Ok((wrapped, resealing))
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
    guarded(path, || {
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
    })
}

/// Reads a file that may be damaged. redb verifies the checksums of pages only after an unclean end; else
/// it trusts what it reads and panics where that makes no sense.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T, OpenError>) -> Result<T, OpenError> {
    let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
    read.unwrap_or_else(|panic| {
        let words = panic
            .downcast_ref::<&str>()
            .map(|words| (*words).to_owned());
        let words = words.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(OpenError::Corrupt {
            path: path.display().to_string(),
            reason: format!("its pages make no sense: {}", words.unwrap_or_default()),
        })
    })
}

/// A new file on its way to become a store: a restore fills it.
pub(super) struct Filling {
    database: Database,
    sealing: Sealing,
}

impl Filling {
    /// Creates the file; what is to be sealed will be by the first key in `keys`, which is made if it is
    /// not there.
    pub(super) fn create(path: &Path, keys: &Path) -> Result<Filling, String> {
        let database = redb::Builder::new()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|error| error.to_string())?;
        initialise(&database).map_err(|error| error.to_string())?;
        let sealing = Sealing::open(&database, path, keys).map_err(|error| error.to_string())?;
        Ok(Filling { database, sealing })
    }

    /// Adds entries; durable when this returns.
    pub(super) fn put(&self, entries: &[Entry]) -> Result<(), String> {
        let put = || -> Result<(), Box<dyn std::error::Error>> {
            let txn = self.database.begin_write()?;
            {
                let mut log = txn.open_table(LOG)?;
                let mut row = Vec::new();
                for entry in entries {
                    encode_put(entry, Some(&self.sealing), &mut row)?;
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
                let mut numbers = txn.open_table(NUMBERS)?;
                // Every row was sealed as it was put.
                numbers.remove("resealing")?;
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
        txn.open_table(DATA_KEYS)?;
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

/// Whether this program reads the layout.
fn check_format(database: &Database) -> Result<(), String> {
    let read = || -> Result<u64, redb::Error> {
        let txn = database.begin_read()?;
        let format = txn.open_table(NUMBERS)?.get("format")?;
        Ok(format.map_or(0, |format| format.value()))
    };
    match read().map_err(|error| error.to_string())? {
        FORMAT_CLEAR..=FORMAT => Ok(()),
        format => Err(format!(
            "its format is {format}, this program reads {FORMAT_CLEAR} to {FORMAT}"
        )),
    }
}

fn read_content(database: &Database, sealing: Option<&Sealing>) -> Result<Content, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let txn = database.begin_read().map_err(|e| text(&e))?;
    let numbers = txn.open_table(NUMBERS).map_err(|e| text(&e))?;
    let number = |name: &str| -> Result<u64, String> {
        let value = numbers.get(name).map_err(|e| text(&e))?;
        Ok(value.map_or(0, |v| v.value()))
    };
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
        content.replay(revision, key, row_value.value(), sealing)?;
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
    fn replay(
        &mut self,
        revision: Revision,
        key: &str,
        row: &[u8],
        sealing: Option<&Sealing>,
    ) -> Result<(), String> {
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
            (TAG_PUT | TAG_SEALED, previous) => {
                let value = match tag {
                    TAG_SEALED => unseal(sealing, revision, &key, value)?.into(),
                    _ => Bytes::copy_from_slice(value),
                };
                let entry = Arc::new(Entry {
                    key: Arc::clone(&key),
                    value,
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

fn encode_row(
    change: &Change,
    sealing: Option<&Sealing>,
    row: &mut Vec<u8>,
) -> Result<(), seal::KeyError> {
    match change {
        Change::Put { entry, .. } => encode_put(entry, sealing, row)?,
        Change::Delete { previous, .. } => {
            row.clear();
            row.push(TAG_DELETE);
            row.extend_from_slice(&previous.create_revision.to_le_bytes());
        }
    }
    Ok(())
}

fn encode_put(
    entry: &Entry,
    sealing: Option<&Sealing>,
    row: &mut Vec<u8>,
) -> Result<(), seal::KeyError> {
    row.clear();
    let create_revision = entry.create_revision.to_le_bytes();
    match sealing.filter(|_| entry.key.starts_with(SEALED_PREFIX)) {
        Some(sealing) => {
            let place = seal::place(&entry.key, entry.mod_revision);
            let (number, sealed) = sealing.keys.seal(&place, &entry.value)?;
            row.push(TAG_SEALED);
            row.extend_from_slice(&create_revision);
            row.extend_from_slice(&number.to_le_bytes());
            row.extend_from_slice(&sealed);
        }
        None => {
            row.push(TAG_PUT);
            row.extend_from_slice(&create_revision);
            row.extend_from_slice(&entry.value);
        }
    }
    Ok(())
}

/// Opens the value of a sealed row.
fn unseal(
    sealing: Option<&Sealing>,
    revision: Revision,
    key: &str,
    value: &[u8],
) -> Result<Vec<u8>, String> {
    let sealing = sealing.ok_or_else(|| {
        format!("{key} is sealed, and the store was opened without its key (--store-key)")
    })?;
    let (number, sealed) = value
        .split_first_chunk::<4>()
        .ok_or_else(|| format!("the row of {key} at revision {revision} is cut short"))?;
    let number = u32::from_le_bytes(*number);
    let opened = sealing
        .keys
        .open_value(number, &seal::place(key, revision), sealed);
    opened.ok_or_else(|| {
        format!("{key} at revision {revision} cannot be opened by data key {number}: it was changed since")
    })
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
