//! Puts a backup in the place of a store whose control plane is stopped.
//!
//! ```text
//!  verify all of FILE ─► lock the store ─► fill store.redb.new ─► files of the control plane
//!                        ─► the old store stays as store.redb.before-restore ─► rename (the moment)
//! ```
//! The restored store is a new lineage: nobody may take one of its revisions for one of the history that
//! was lost. Its revisions go on [`REVISION_GAP`] above every one that was given, with nothing below kept
//! for watches, so that a client with a version from before lists again. An entry [`RESTORED_KEY`] says that
//! the control plane has to find out what runs before it places or ends anything (see `hold`).
//!
//! A crash at any instant leaves the old store in place, or the new one; what is beside it is removed or
//! replaced by the next restore.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::backup::{Damage, Frame, Header, Reader};
use super::etcd;
use super::log::{Filling, hold};
use super::seal::KeyFile;
use super::{Entry, Lineage, OpenError, Revision};

/// The store's file below the data directory.
pub const STORE_FILE: &str = "store.redb";
/// The entry that a restore leaves, until it was found out what runs. Its `mod_revision` is the first of
/// the new lineage.
pub const RESTORED_KEY: &str = "/gantry/restored";
/// What is backed up.
pub const BACKUP_PREFIX: &str = "/registry/";
/// Between the largest revision that may have been given and the first of the restored store: more than
/// can have been written between the backup and the loss. etcd's own advice for Kubernetes.
const REVISION_GAP: u64 = 1_000_000_000;
/// Bytes of values per transaction of the new file.
const BATCH_BYTES: usize = 4 << 20;
const READ_BUFFER_BYTES: usize = 1 << 20;

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The backup cannot be used.
    #[error("{path} cannot be restored: {reason}; nothing was changed")]
    Backup {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: Box<Damage>,
    },
    /// The control plane runs.
    #[error("gantry-control runs on {path}: stop it first; nothing was changed")]
    Running {
        /// The store's file.
        path: String,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {path}: {reason}; the store is as it was")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The data directory is another cluster's.
    #[error(
        "{path} is of another cluster than the backup: nodes of one do not trust the other; give an empty --data-dir, or put that directory aside; nothing was changed"
    )]
    OtherCluster {
        /// What differs.
        path: PathBuf,
    },
}

/// The key files of a restore; they may be the same.
#[derive(Clone, Debug)]
pub struct Keys {
    /// Opens the backup. It need not be there for one in clear.
    pub backup: PathBuf,
    /// Seals the restored store; made if it is not there.
    pub store: PathBuf,
}

/// What a restore has made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Of what the backup was.
    pub header: Header,
    /// The history that begins now.
    pub lineage: Lineage,
    /// Its first revision.
    pub revision: Revision,
    /// How many objects it has.
    pub entries: u64,
    /// Where the store that was there is now.
    pub before: Option<PathBuf>,
}

fn failed(action: &'static str, path: &Path, reason: impl std::fmt::Display) -> RestoreError {
    RestoreError::Io {
        action,
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

fn open(file: &Path, keys: &Keys) -> Result<Reader<BufReader<File>>, RestoreError> {
    let source = File::open(file).map_err(|error| failed("read", file, error))?;
    let opening = KeyFile::read(&keys.backup).map_err(|reason| bad(file, reason.into()))?;
    Reader::new(BufReader::with_capacity(READ_BUFFER_BYTES, source), opening)
        .map_err(|reason| bad(file, reason))
}

fn bad(file: &Path, reason: Damage) -> RestoreError {
    RestoreError::Backup {
        path: file.to_owned(),
        reason: Box::new(reason),
    }
}

/// Restores `file` into the directory `data_dir`, which exists.
///
/// * `files` – takes the files of the control plane, once the backup was found whole, before the store.
pub fn restore(
    file: &Path,
    data_dir: &Path,
    keys: &Keys,
    files: impl FnOnce(Vec<(String, bytes::Bytes)>) -> Result<(), RestoreError>,
) -> Result<Restored, RestoreError> {
    let carried = verify(file, keys)?;
    let path = data_dir.join(STORE_FILE);
    let held = match hold(&path) {
        Ok(held) => held,
        Err(OpenError::Locked { path }) => return Err(RestoreError::Running { path }),
        // A store that cannot be read is what backups are for.
        Err(error) => {
            tracing::warn!(%error, "the store that is there cannot be read");
            None
        }
    };
    let fresh = data_dir.join("store.redb.new");
    let mut reader = open(file, keys)?;
    let header = reader.header().clone();
    let known = held
        .as_ref()
        .map(|held| (held.lineage.counter, held.revision));
    let (lineage, revision) = next_history(&header, known, unix_seconds());
    files(carried)?;
    remove(&fresh)?;
    let wrong = |reason: String| failed("write", &fresh, reason);
    let filling = Filling::create(&fresh, &keys.store).map_err(wrong)?;
    let entries = fill(
        &mut reader,
        &filling,
        revision,
        |reason| bad(file, reason),
        wrong,
    )?;
    filling.finish(&lineage, revision).map_err(wrong)?;
    let before = keep(&path, data_dir)?;
    match before {
        Some(_) => fs::rename(&fresh, &path),
        // Fails if a control plane has begun a store here meanwhile.
        None => fs::hard_link(&fresh, &path).and_then(|()| fs::remove_file(&fresh)),
    }
    .map_err(|error| failed("put in place", &path, error))?;
    sync(data_dir)?;
    // Until here nobody else could open the old one.
    drop(held);
    Ok(Restored {
        header,
        lineage,
        revision,
        entries,
        before,
    })
}

/// Restores `file` into etcd, as [`restore`] does into a file; what etcd held of ours is gone then.
pub async fn restore_etcd(
    file: &Path,
    servers: etcd::Servers,
    keys: &Keys,
    files: impl FnOnce(Vec<(String, bytes::Bytes)>) -> Result<(), RestoreError>,
) -> Result<Restored, RestoreError> {
    let carried = verify(file, keys)?;
    let mut reader = open(file, keys)?;
    let header = reader.header().clone();
    let (now_s, files) = (unix_seconds(), || files(carried));
    let filling = etcd::Filling::begin(servers, &keys.store, &header, now_s, files);
    let mut filling = filling.await?;
    let mut entries = 0;
    while let Some(frame) = reader.read().map_err(|reason| bad(file, reason))? {
        if let Frame::Entry(entry) = frame {
            entries += 1;
            filling.put(entry).await?;
        }
    }
    let (lineage, revision) = filling.finish(&header).await?;
    Ok(Restored {
        header,
        lineage,
        revision,
        entries,
        before: None,
    })
}

/// Reads all of the backup; returns the control plane's files in it.
fn verify(file: &Path, keys: &Keys) -> Result<Vec<(String, bytes::Bytes)>, RestoreError> {
    let mut reader = open(file, keys)?;
    let mut files = Vec::new();
    while let Some(frame) = reader.read().map_err(|reason| bad(file, reason))? {
        if let Frame::File { name, content } = frame {
            files.push((name, content));
        }
    }
    Ok(files)
}

/// The lineage of the restored store and its first revision: above all that is known of.
///
/// * `held` – the lineage's counter and the revision of the store that is replaced.
pub(super) fn next_history(
    header: &Header,
    held: Option<(u64, Revision)>,
    now_s: u64,
) -> (Lineage, Revision) {
    let (counter, revision) = held.unwrap_or_default();
    let counter = (header.lineage_counter.max(counter) + 1).max(now_s);
    let lineage = Lineage {
        counter,
        id: uuid::Uuid::new_v4().to_string(),
    };
    (lineage, header.revision.max(revision) + REVISION_GAP)
}

fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

/// Removes what an earlier restore may have left.
fn remove(path: &Path) -> Result<(), RestoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(failed("remove", path, error))
        }
        _ => Ok(()),
    }
}

/// Writes the objects; how many there are.
fn fill(
    reader: &mut Reader<BufReader<File>>,
    filling: &Filling,
    revision: Revision,
    unreadable: impl Fn(Damage) -> RestoreError,
    unwritable: impl Fn(String) -> RestoreError,
) -> Result<u64, RestoreError> {
    let (mut batch, mut bytes, mut entries) = (Vec::new(), 0, 0);
    while let Some(frame) = reader.read().map_err(&unreadable)? {
        let Frame::Entry(entry) = frame else {
            continue;
        };
        bytes += entry.value.len();
        entries += 1;
        batch.push(entry);
        if bytes >= BATCH_BYTES {
            filling.put(&batch).map_err(&unwritable)?;
            (bytes, batch) = (0, Vec::new());
        }
    }
    batch.push(Entry {
        key: RESTORED_KEY.into(),
        value: serde_json::to_vec(reader.header())
            .unwrap_or_default()
            .into(),
        create_revision: revision,
        mod_revision: revision,
    });
    filling.put(&batch).map_err(&unwritable)?;
    Ok(entries)
}

/// A second name for the store that is there: the restore may turn out to be the mistake.
fn keep(path: &Path, data_dir: &Path) -> Result<Option<PathBuf>, RestoreError> {
    if !path.exists() {
        return Ok(None);
    }
    let before = data_dir.join("store.redb.before-restore");
    remove(&before)?;
    fs::hard_link(path, &before).map_err(|error| failed("keep a copy as", &before, error))?;
    Ok(Some(before))
}

fn sync(directory: &Path) -> Result<(), RestoreError> {
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| failed("sync", directory, error))
}
