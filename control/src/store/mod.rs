//! The store: every object of the cluster, at one revision, durable before anyone hears of it.
//!
//! ```text
//!  commit(txn) ─► queue ─► writer thread: check preconditions, number, one durable log commit
//!                              │ after the fsync                    (writer.rs)     (log.rs)
//!                              ▼
//!                    index: latest entries + history window ─► get, list, watch   (index.rs)
//! ```
//! Reads never touch the disk. Writes are grouped: whatever waits while one batch is made durable
//! forms the next batch. A watcher owns no queue, only a cursor into the shared history window; one
//! that falls out of the window is told [`Compacted`] and lists again.
//!
//! Invariants:
//! * a revision is given to one transaction, grows by 1, and is never given again, also after a
//!   crash; an entry's `mod_revision` is the revision of the transaction that wrote it;
//! * what `commit` has answered survives `kill -9` and power loss;
//! * readers see a transaction as a whole or not at all, and only after it is durable;
//! * after a failed log write, writes are refused until the log was reopened and agrees with memory;
//!   reads go on.
//!
//! [`Backend`] is the seam for another store ([`etcd`]): it orders and persists transactions, and feeds
//! the same index. Keys are Kubernetes' own: `/registry/<plural>/<namespace>/<name>`.

pub mod backup;
mod etcd;
mod index;
mod log;
mod restore;
pub mod seal;
mod writer;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

pub use etcd::{Candidate, Leader, Replica, Servers as EtcdServers, Tls as EtcdTls};
pub use index::{HISTORY_BYTES_MAX, HISTORY_CHANGE_COUNT_MAX, Watch};
pub use restore::{
    BACKUP_PREFIX, Keys, RESTORED_KEY, RestoreError, Restored, STORE_FILE, restore, restore_etcd,
};

#[cfg(test)]
pub(crate) use etcd::tests as etcd_tests;

use index::Index;
use log::RedbLog;
use writer::Embedded;

/// The store's one clock: the number of the latest transaction. 0 is the empty store.
pub type Revision = u64;

/// Largest value of one entry: etcd's own request limit, which Kubernetes' clients know.
pub const VALUE_BYTES_MAX: usize = 1_572_864;
/// Longest key in bytes: four path segments of at most 253 bytes fit.
pub const KEY_BYTES_MAX: usize = 1_024;
/// Most operations of one transaction; a store may take fewer: [`Store::operation_count_max`].
pub const TXN_OPERATION_COUNT_MAX: usize = 512;

/// Which history of the store this is. A restore from a backup starts a new one, so that a revision
/// of the old history is never mistaken for one of the new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lineage {
    /// Orders lineages of one cluster: a restore takes a larger one.
    pub counter: u64,
    /// Random; tells two histories with the same counter apart.
    pub id: String,
}

/// One object as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `/registry/<plural>/<namespace>/<name>`.
    pub key: Arc<str>,
    /// The object as JSON.
    pub value: Bytes,
    /// Revision of the transaction that created the key.
    pub create_revision: Revision,
    /// Revision of the transaction that wrote this value.
    pub mod_revision: Revision,
}

/// One step of one key. All changes of a transaction carry its revision and follow each other in
/// the order of their keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The key has a new value.
    Put {
        /// The new value.
        entry: Arc<Entry>,
        /// What it replaces; `None` when the key is new.
        previous: Option<Arc<Entry>>,
    },
    /// The key is gone.
    Delete {
        /// The key.
        key: Arc<str>,
        /// Its last value.
        previous: Arc<Entry>,
        /// Revision of the transaction that removed it.
        revision: Revision,
    },
}

impl Change {
    /// The key that changed.
    pub fn key(&self) -> &Arc<str> {
        match self {
            Change::Put { entry, .. } => &entry.key,
            Change::Delete { key, .. } => key,
        }
    }

    /// Revision of the transaction that made the change.
    pub fn revision(&self) -> Revision {
        match self {
            Change::Put { entry, .. } => entry.mod_revision,
            Change::Delete { revision, .. } => *revision,
        }
    }

    /// The value before the change.
    pub fn previous(&self) -> Option<&Arc<Entry>> {
        match self {
            Change::Put { previous, .. } => previous.as_ref(),
            Change::Delete { previous, .. } => Some(previous),
        }
    }

    /// Bytes of value that the history keeps because of this change.
    fn value_bytes(&self) -> usize {
        match self {
            Change::Put { entry, .. } => entry.value.len(),
            Change::Delete { .. } => 0,
        }
    }
}

/// What must hold for a transaction to be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Precondition {
    /// The key exists and was last written at this revision.
    At {
        /// The key.
        key: Arc<str>,
        /// Its expected `mod_revision`.
        revision: Revision,
    },
    /// The key does not exist.
    Absent {
        /// The key.
        key: Arc<str>,
    },
    /// The key exists, whatever its value.
    Exists {
        /// The key.
        key: Arc<str>,
    },
}

impl Precondition {
    fn key(&self) -> &Arc<str> {
        match self {
            Precondition::At { key, .. }
            | Precondition::Absent { key }
            | Precondition::Exists { key } => key,
        }
    }
}

/// Preconditions and operations that take effect together or not at all.
#[derive(Clone, Debug, Default)]
pub struct Txn {
    preconditions: Vec<Precondition>,
    puts: Vec<(Arc<str>, Bytes)>,
    deletes: Vec<Arc<str>>,
}

impl Txn {
    /// An empty transaction.
    pub fn new() -> Txn {
        Txn::default()
    }

    /// Requires that `key` was last written at `revision`.
    #[must_use]
    pub fn require_at(mut self, key: impl Into<Arc<str>>, revision: Revision) -> Txn {
        let key = key.into();
        self.preconditions.push(Precondition::At { key, revision });
        self
    }

    /// Requires that `key` does not exist.
    #[must_use]
    pub fn require_absent(mut self, key: impl Into<Arc<str>>) -> Txn {
        self.preconditions
            .push(Precondition::Absent { key: key.into() });
        self
    }

    /// Requires that `key` exists.
    #[must_use]
    pub fn require_exists(mut self, key: impl Into<Arc<str>>) -> Txn {
        self.preconditions
            .push(Precondition::Exists { key: key.into() });
        self
    }

    /// Writes `value` at `key`.
    #[must_use]
    pub fn put(mut self, key: impl Into<Arc<str>>, value: impl Into<Bytes>) -> Txn {
        self.puts.push((key.into(), value.into()));
        self
    }

    /// Removes `key`; removing an absent key changes nothing.
    #[must_use]
    pub fn delete(mut self, key: impl Into<Arc<str>>) -> Txn {
        self.deletes.push(key.into());
        self
    }
}

/// A revision below the history window, or not of this history: list again and watch from there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "revision {requested} is not in the history any more (kept: {oldest} to {current}): list again"
)]
pub struct Compacted {
    /// What was asked for.
    pub requested: Revision,
    /// The lowest revision after which a watch can start.
    pub oldest: Revision,
    /// The store's revision.
    pub current: Revision,
}

/// Why a transaction was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A precondition does not hold. Read again, decide again.
    #[error("{key} is at revision {found:?}, the transaction expects {expected:?}")]
    Conflict {
        /// The key of the precondition.
        key: Arc<str>,
        /// Expected `mod_revision`; `None`: absent (or any, for [`Precondition::Exists`]).
        expected: Option<Revision>,
        /// Actual `mod_revision`; `None`: absent.
        found: Option<Revision>,
    },
    /// The value, key or transaction is larger than the store takes. A retry does not help.
    #[error("{what} {key:?} is {size}, the limit is {limit}")]
    TooLarge {
        /// What is too large, with its unit.
        what: &'static str,
        /// The key concerned.
        key: Arc<str>,
        /// Its size.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// One transaction names a key in two operations. A retry does not help.
    #[error("{key} is written twice in one transaction")]
    DuplicateKey {
        /// The key.
        key: Arc<str>,
    },
    /// The transaction could not be written: nothing of it is visible, but it may appear once the log, or
    /// etcd, works again. Read before a retry.
    #[error("the store cannot write: {reason}")]
    Unavailable {
        /// What the log said.
        reason: String,
    },
    /// The store is shutting down.
    #[error("the store is closed")]
    Closed,
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds the file.
    #[error("{path} is in use by another gantry-control: stop it, or give another --data-dir")]
    Locked {
        /// The file.
        path: String,
    },
    /// The file cannot be opened or read.
    #[error("cannot open the store {path}: {reason}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// What is sealed in it cannot be opened.
    #[error("the store's Secrets cannot be read: {0}")]
    Key(#[from] seal::KeyError),
    /// The control planes over one etcd are of one cluster.
    #[error(
        "{path} is the store of another cluster, whose nodes would not trust this control plane: copy the \
         directory pki of one that serves it, or remove this one's and restore a backup"
    )]
    OtherCluster {
        /// The servers.
        path: String,
    },
    /// The file is not a store of this version.
    #[error("{path} is damaged or of another version: {reason}; restore it from a backup")]
    Corrupt {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Orders and persists transactions, and applies the durable ones to the index.
#[async_trait]
trait Backend: Send + Sync {
    /// Returns the transaction's revision once it is durable and visible to readers.
    async fn commit(&self, txn: Txn) -> Result<Revision, StoreError>;

    /// See [`Store::operation_count_max`].
    fn operation_count_max(&self) -> usize {
        TXN_OPERATION_COUNT_MAX
    }

    /// See [`Store::fresh`].
    async fn fresh(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Finishes what is queued, refuses the rest, closes the log.
    async fn close(&self);

    /// See [`Store::rotate_key`].
    async fn rotate_key(&self) -> Result<String, String>;

    /// See [`Store::compact`].
    async fn compact(&self) -> Result<Revision, String>;

    /// See [`Store::report`].
    async fn report(&self) -> Result<Report, String>;
}

/// From now on, stores that are opened write in a task of the caller's runtime instead of a thread of
/// their own: for the simulation, where one thread is everything and its order is the seed's.
pub fn write_in_a_task() {
    writer::WRITES_IN_A_TASK.store(true, std::sync::atomic::Ordering::Relaxed);
}

/// What a store says of itself, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The file, or the servers.
    pub place: String,
    /// Its size.
    pub bytes: u64,
    /// The id of the key that seals Secrets; `None`: they are in clear.
    pub sealed_by: Option<String>,
    /// Some are still sealed by an older key, or in clear.
    pub is_resealing: bool,
}

/// A handle to the store; clones share it.
#[derive(Clone)]
pub struct Store {
    index: Arc<Index>,
    backend: Arc<dyn Backend>,
    lineage: Arc<Lineage>,
}

impl Store {
    /// Opens the embedded store without a key, creating the file if it does not exist: nothing is
    /// sealed, and a store in which something is cannot be opened. Blocks while it reads the whole log
    /// into memory.
    pub fn open(path: &Path) -> Result<Store, OpenError> {
        let path = path.to_owned();
        Store::open_with(Box::new(move || RedbLog::open(&path, None)))
    }

    /// The same with the key file `keys`: Secrets are sealed. It is made with a first key if it does not
    /// exist and nothing was sealed yet.
    pub fn open_sealed(path: &Path, keys: &Path) -> Result<Store, OpenError> {
        let (path, keys) = (path.to_owned(), keys.to_owned());
        Store::open_with(Box::new(move || RedbLog::open(&path, Some(&keys))))
    }

    /// Opens the store in etcd: to read, and, by the [`Candidate`], to write when no other control plane does.
    ///
    /// * `keys` – as in [`Store::open_sealed`]: every control plane has the same.
    /// * `cluster` – digest of what else they have in common.
    /// * `lost` – cancelled when this one has to end: it does not lead any more, or the store is another one.
    pub async fn open_etcd(
        servers: EtcdServers,
        keys: &Path,
        cluster: &str,
        lost: tokio_util::sync::CancellationToken,
        stop: &tokio_util::sync::CancellationToken,
    ) -> Result<(Store, Candidate), OpenError> {
        let opened = etcd::open(servers, keys, cluster, lost, stop).await?;
        let store = Store {
            index: opened.index,
            backend: opened.backend,
            lineage: Arc::new(opened.lineage),
        };
        Ok((store, opened.candidate))
    }

    fn open_with(opener: writer::LogOpener) -> Result<Store, OpenError> {
        let (log, content) = opener()?;
        let lineage = Arc::new(content.lineage.clone());
        let (index, wakeups, dropped) = Index::new(content);
        let index = Arc::new(index);
        let backend = Embedded::start(Arc::clone(&index), wakeups, dropped, log, opener)?;
        Ok(Store {
            index,
            backend: Arc::new(backend),
            lineage,
        })
    }

    /// The revision of the latest visible transaction.
    pub fn revision(&self) -> Revision {
        self.index.revision()
    }

    /// Which history this is.
    pub fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// The latest value of `key`.
    pub fn get(&self, key: &str) -> Option<Arc<Entry>> {
        self.index.get(key)
    }

    /// Every entry whose key starts with `prefix`, in key order, at one revision.
    pub fn list(&self, prefix: &str) -> (Revision, Vec<Arc<Entry>>) {
        self.index.list(prefix)
    }

    /// How many entries have a key that starts with `prefix`, without cloning any.
    pub fn count(&self, prefix: &str) -> usize {
        self.index.count(prefix)
    }

    /// Every change with a revision greater than `after` under `prefix`, in order, then live.
    ///
    /// # Errors
    /// [`Compacted`] when changes after `after` are not all kept any more, or when `after` lies in
    /// the future (it is then of another history).
    pub fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, Compacted> {
        self.index.watch(prefix, after)
    }

    /// Takes the transaction if its preconditions hold; it is durable when this returns.
    ///
    /// A caller that goes away does not take the transaction back.
    pub async fn commit(&self, txn: Txn) -> Result<Revision, StoreError> {
        check_limits(&txn)?;
        self.backend.commit(txn).await
    }

    /// Most operations, and most preconditions, that one transaction may have here.
    pub fn operation_count_max(&self) -> usize {
        self.backend.operation_count_max()
    }

    /// Waits until readers see everything that was acknowledged before this call, also by other control planes
    /// over the same store.
    pub async fn fresh(&self) -> Result<(), StoreError> {
        self.backend.fresh().await
    }

    /// Makes a new key, by which Secrets are sealed from now on; those of older keys follow while the
    /// store works. Returns its id. The older keys stay in the key file.
    pub async fn rotate_key(&self) -> Result<String, String> {
        self.backend.rotate_key().await
    }

    /// Forgets the history: watches that are behind are told [`Compacted`]. Gives the space back.
    pub async fn compact(&self) -> Result<Revision, String> {
        self.backend.compact().await
    }

    /// What the store says of itself.
    pub async fn report(&self) -> Result<Report, String> {
        self.backend.report().await
    }

    /// The lowest revision after which a watch can start.
    pub fn oldest(&self) -> Revision {
        self.index.oldest()
    }

    /// Finishes what is queued and closes the log; later commits get [`StoreError::Closed`], and
    /// watches end.
    pub async fn close(&self) {
        self.backend.close().await;
    }
}

/// Refuses what could not be taken whatever the store holds.
fn check_limits(txn: &Txn) -> Result<(), StoreError> {
    let operation_count = txn.puts.len() + txn.deletes.len();
    let keys = txn.puts.iter().map(|(key, _)| key).chain(&txn.deletes);
    let mut seen = std::collections::BTreeSet::new();
    for key in keys {
        if key.len() > KEY_BYTES_MAX {
            return Err(StoreError::TooLarge {
                what: "key length in bytes of",
                key: Arc::clone(key),
                size: key.len(),
                limit: KEY_BYTES_MAX,
            });
        }
        if operation_count > TXN_OPERATION_COUNT_MAX {
            return Err(StoreError::TooLarge {
                what: "operation count of the transaction at",
                key: Arc::clone(key),
                size: operation_count,
                limit: TXN_OPERATION_COUNT_MAX,
            });
        }
        if !seen.insert(key) {
            return Err(StoreError::DuplicateKey {
                key: Arc::clone(key),
            });
        }
    }
    match txn
        .puts
        .iter()
        .find(|(_, value)| value.len() > VALUE_BYTES_MAX)
    {
        Some((key, value)) => Err(StoreError::TooLarge {
            what: "size in bytes of",
            key: Arc::clone(key),
            size: value.len(),
            limit: VALUE_BYTES_MAX,
        }),
        None => Ok(()),
    }
}
