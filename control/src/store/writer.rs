//! The one writer: orders transactions, makes them durable in groups, then visible.
//!
//! ```text
//!            batch durable                          log write failed
//!  Writing ───────────────► Writing     Writing ───────────────────────► Stopped { doubtful batch }
//!                                          ▲   reopened, log = memory, or    │ every write refused,
//!                                          └── log = memory + the batch ─────┘ reopen tried each second
//! ```
//! It runs on its own OS thread because an fsync blocks. The loop takes what waits, up to
//! [`BATCH_TXN_COUNT_MAX`]: under load a batch fills while the one before it is being synced.
//!
//! Invariant: the index holds exactly what the log has confirmed. After a failed append the batch is
//! in doubt; the log commits all of it or nothing, so the reopened log's revision tells which.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use gantry_api::rules::{self, Rule};
use tokio::sync::{mpsc, oneshot, watch};

use super::index::{Dropped, Index};
use super::log::{Batch, Content, Log};
use super::{Backend, Change, Entry, OpenError, Precondition, Report, Revision, StoreError, Txn};

/// Most transactions per fsync: more raises the wait of each (3 ms at 256 on the measured machine).
const BATCH_TXN_COUNT_MAX: usize = 256;
/// Most bytes of values per fsync.
const BATCH_BYTES_MAX: usize = 8 << 20;
/// Transactions that may wait; further callers wait for room.
const QUEUE_TXN_COUNT_MAX: usize = 1_024;
/// Pause between attempts to reopen a failed log.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);

/// Opens the log again after a failure.
pub(super) type LogOpener =
    Box<dyn Fn() -> Result<(Box<dyn Log>, Content), OpenError> + Send + 'static>;

/// See [`super::write_in_a_task`].
pub(super) static WRITES_IN_A_TASK: AtomicBool = AtomicBool::new(false);

type Answer = oneshot::Sender<Result<Revision, StoreError>>;

enum Job {
    Commit(Txn, Answer),
    Close(oneshot::Sender<()>),
    /// Something that is not a transaction, between two batches.
    Aside(Box<dyn FnOnce(&mut Writer) + Send>),
}

/// The embedded backend: a queue in front of the writer thread.
pub(super) struct Embedded {
    queue: mpsc::Sender<Job>,
}

impl Embedded {
    /// Starts the writer thread; it ends when the last handle is dropped or at `close`.
    pub(super) fn start(
        index: Arc<Index>,
        wakeups: watch::Sender<Revision>,
        dropped: Dropped,
        log: Box<dyn Log>,
        opener: LogOpener,
    ) -> Result<Embedded, OpenError> {
        let (queue, jobs) = mpsc::channel(QUEUE_TXN_COUNT_MAX);
        let writer = Writer {
            index,
            wakeups,
            opener,
            mode: Mode::Writing(log),
            dropped,
            reseal_failed: false,
        };
        if WRITES_IN_A_TASK.load(Ordering::Relaxed) {
            tokio::spawn(writer.run_in_a_task(jobs));
            return Ok(Embedded { queue });
        }
        std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(jobs))
            .map_err(|error| OpenError::Io {
                path: "store-writer thread".to_owned(),
                reason: error.to_string(),
            })?;
        Ok(Embedded { queue })
    }
}

impl Embedded {
    /// Has the writer do something between two batches.
    async fn aside<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Writer) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let (answer, answered) = oneshot::channel();
        let job = Job::Aside(Box::new(move |writer| {
            // A caller that went away misses only the answer.
            let _ = answer.send(act(writer));
        }));
        let closed = || StoreError::Closed.to_string();
        self.queue.send(job).await.map_err(|_| closed())?;
        answered.await.map_err(|_| closed())?
    }
}

#[async_trait]
impl Backend for Embedded {
    async fn commit(&self, txn: Txn) -> Result<Revision, StoreError> {
        let (answer, answered) = oneshot::channel();
        let job = Job::Commit(txn, answer);
        self.queue.send(job).await.map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.queue.send(Job::Close(done)).await.is_ok() {
            // An error means that the thread is gone already, which is what was asked for.
            let _ = closed.await;
        }
    }

    async fn rotate_key(&self) -> Result<String, String> {
        self.aside(|writer| writer.log()?.rotate()).await
    }

    async fn compact(&self) -> Result<Revision, String> {
        self.aside(Writer::compact).await
    }

    async fn report(&self) -> Result<Report, String> {
        self.aside(|writer| Ok(writer.log()?.report())).await
    }
}

enum Mode {
    Writing(Box<dyn Log>),
    Stopped {
        reason: String,
        /// What the failed append tried to write.
        doubtful: Vec<Arc<Change>>,
        doubtful_revision: Revision,
        last_attempt: Instant,
    },
}

struct Writer {
    index: Arc<Index>,
    wakeups: watch::Sender<Revision>,
    opener: LogOpener,
    mode: Mode,
    /// Left the history window since the last append; goes with the next one.
    dropped: Dropped,
    /// The last step of sealing anew has failed: not tried again by itself.
    reseal_failed: bool,
}

impl Writer {
    fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(job) = self.wait(&mut jobs) {
            if let Some(done) = self.turn(job, &mut jobs) {
                drop(jobs);
                // Closes the file and its lock before the answer.
                drop(self);
                let _ = done.send(());
                return;
            }
        }
    }

    /// As [`Writer::run`], between other tasks of the runtime.
    async fn run_in_a_task(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(job) = jobs.recv().await {
            while self.reseal() {}
            if let Some(done) = self.turn(job, &mut jobs) {
                drop(jobs);
                drop(self);
                let _ = done.send(());
                return;
            }
        }
    }

    /// Does what waits, up to the size of a batch; who waits for the end, if that was asked for.
    fn turn(&mut self, job: Job, jobs: &mut mpsc::Receiver<Job>) -> Option<oneshot::Sender<()>> {
        let mut txns = Vec::new();
        let (mut closing, mut aside) = (None, None);
        let mut bytes = 0;
        let mut next = Some(job);
        while let Some(job) = next.take() {
            match job {
                Job::Commit(txn, answer) => {
                    bytes += txn.puts.iter().map(|(_, v)| v.len()).sum::<usize>();
                    txns.push((txn, answer));
                }
                Job::Close(done) => closing = Some(done),
                Job::Aside(act) => aside = Some(act),
            }
            let is_full = txns.len() >= BATCH_TXN_COUNT_MAX || bytes >= BATCH_BYTES_MAX;
            if closing.is_none() && aside.is_none() && !is_full {
                next = jobs.try_recv().ok();
            }
        }
        self.commit_batch(txns);
        if let Some(act) = aside {
            act(self);
        }
        closing
    }

    /// The next job. While rows wait to be sealed anew, a few are each time before it, more as long as
    /// nothing else is to be done.
    fn wait(&mut self, jobs: &mut mpsc::Receiver<Job>) -> Option<Job> {
        while self.reseal() {
            match jobs.try_recv() {
                Ok(job) => return Some(job),
                Err(mpsc::error::TryRecvError::Empty) => {}
                Err(mpsc::error::TryRecvError::Disconnected) => return None,
            }
        }
        jobs.blocking_recv()
    }

    /// Whether it has done some, and there may be more.
    fn reseal(&mut self) -> bool {
        let Mode::Writing(log) = &mut self.mode else {
            return false;
        };
        if self.reseal_failed || !log.is_resealing() {
            return false;
        }
        let Err(reason) = log.reseal() else {
            return true;
        };
        // Nothing is lost: they are as readable as before. The next rotation or start goes on.
        tracing::error!(%reason, "Secrets were not sealed by the new key yet");
        self.reseal_failed = true;
        false
    }

    fn log(&mut self) -> Result<&mut dyn Log, String> {
        self.reseal_failed = false;
        match &mut self.mode {
            Mode::Writing(log) => Ok(&mut **log),
            Mode::Stopped { reason, .. } => Err(format!("its log cannot be written: {reason}")),
        }
    }

    /// Forgets the history, in memory and then on disk.
    fn compact(&mut self) -> Result<Revision, String> {
        self.ensure_writing().map_err(|error| error.to_string())?;
        let mut dropped = self.index.compact();
        dropped.superseded.append(&mut self.dropped.superseded);
        self.dropped = dropped;
        let revision = self.index.revision();
        self.append(Vec::new(), revision)
            .map_err(|error| error.to_string())?;
        self.log()?.compact()?;
        Ok(revision)
    }

    fn commit_batch(&mut self, txns: Vec<(Txn, Answer)>) {
        if txns.is_empty() {
            return;
        }
        if let Err(error) = self.ensure_writing() {
            for (_, answer) in txns {
                let _ = answer.send(Err(error.clone()));
            }
            return;
        }
        let mut staged = Staged::new(&self.index);
        let outcomes: Vec<_> = txns
            .into_iter()
            .map(|(txn, answer)| (staged.take(txn), answer))
            .collect();
        let (changes, revision) = (staged.changes, staged.revision);
        let result = if changes.is_empty() {
            Ok(())
        } else if rules::is_off(Rule::DurableFirst) {
            self.publish(&changes, revision);
            Ok(())
        } else {
            self.append(changes, revision)
        };
        for (outcome, answer) in outcomes {
            // A caller that went away misses only the answer.
            let _ = answer.send(match (&result, outcome) {
                (Err(error), Ok(_)) => Err(error.clone()),
                (_, outcome) => outcome,
            });
        }
    }

    /// Makes changes durable, then visible.
    fn append(&mut self, changes: Vec<Arc<Change>>, revision: Revision) -> Result<(), StoreError> {
        let Mode::Writing(log) = &mut self.mode else {
            return Err(StoreError::Closed);
        };
        let batch = Batch {
            changes: &changes,
            revision,
            compacted: self.dropped.compacted,
            superseded: &self.dropped.superseded,
        };
        match log.append(&batch) {
            Ok(()) => {
                self.publish(&changes, revision);
                Ok(())
            }
            Err(reason) => {
                tracing::error!(%reason, "the store's log cannot be written: writes stop");
                self.mode = Mode::Stopped {
                    reason: reason.clone(),
                    doubtful: changes,
                    doubtful_revision: revision,
                    last_attempt: Instant::now(),
                };
                Err(unwritable(&reason))
            }
        }
    }

    fn publish(&mut self, changes: &[Arc<Change>], revision: Revision) {
        self.dropped = self.index.apply(changes, revision);
        // Nobody listening is fine.
        self.wakeups.send_replace(revision);
    }

    /// Returns once the log can be written, trying to reopen a failed one at most every second.
    fn ensure_writing(&mut self) -> Result<(), StoreError> {
        let Mode::Stopped {
            reason,
            doubtful,
            doubtful_revision,
            last_attempt,
        } = &mut self.mode
        else {
            return Ok(());
        };
        if last_attempt.elapsed() < REOPEN_PAUSE {
            return Err(unwritable(reason));
        }
        *last_attempt = Instant::now();
        let stopped = |reason: &mut String, now: String| {
            *reason = now;
            Err(unwritable(reason))
        };
        let (log, content) = match (self.opener)() {
            Ok(opened) => opened,
            Err(error) => return stopped(reason, error.to_string()),
        };
        let visible = self.index.revision();
        let (changes, revision) = if content.revision == visible {
            (Vec::new(), visible)
        } else if content.revision == *doubtful_revision {
            (std::mem::take(doubtful), *doubtful_revision)
        } else {
            let on_disk = content.revision;
            return stopped(
                reason,
                format!("the log is at revision {on_disk}, memory at {visible}: restart"),
            );
        };
        tracing::info!(revision, "the store's log can be written again");
        self.mode = Mode::Writing(log);
        if !changes.is_empty() {
            self.publish(&changes, revision);
        }
        Ok(())
    }
}

/// The transactions of one batch, checked against the index and each other.
struct Staged<'a> {
    index: &'a Index,
    /// What earlier transactions of the batch did to a key.
    overlay: HashMap<Arc<str>, Option<Arc<Entry>>>,
    changes: Vec<Arc<Change>>,
    revision: Revision,
}

impl Staged<'_> {
    fn new(index: &Index) -> Staged<'_> {
        Staged {
            index,
            overlay: HashMap::new(),
            changes: Vec::new(),
            revision: index.revision(),
        }
    }

    fn latest(&self, key: &str) -> Option<Arc<Entry>> {
        match self.overlay.get(key) {
            Some(staged) => staged.clone(),
            None => self.index.get(key),
        }
    }

    /// Stages one transaction; returns the revision it gets, or the current one if it changes
    /// nothing.
    fn take(&mut self, txn: Txn) -> Result<Revision, StoreError> {
        for precondition in &txn.preconditions {
            self.check(precondition)?;
        }
        let revision = self.revision + 1;
        let mut changes = Vec::with_capacity(txn.puts.len() + txn.deletes.len());
        for (key, value) in txn.puts {
            let previous = self.latest(&key);
            let entry = Arc::new(Entry {
                create_revision: previous.as_ref().map_or(revision, |p| p.create_revision),
                mod_revision: revision,
                value,
                // One allocation per key, however often it is written.
                key: previous.as_ref().map_or(key, |p| Arc::clone(&p.key)),
            });
            changes.push(Change::Put { entry, previous });
        }
        for key in txn.deletes {
            if let Some(previous) = self.latest(&key) {
                changes.push(Change::Delete {
                    key: Arc::clone(&previous.key),
                    previous,
                    revision,
                });
            }
        }
        if changes.is_empty() {
            return Ok(self.revision);
        }
        // The order in which the log returns them after a restart.
        changes.sort_by(|a, b| a.key().cmp(b.key()));
        for change in changes {
            let now = match &change {
                Change::Put { entry, .. } => Some(Arc::clone(entry)),
                Change::Delete { .. } => None,
            };
            self.overlay.insert(Arc::clone(change.key()), now);
            self.changes.push(Arc::new(change));
        }
        self.revision = revision;
        Ok(revision)
    }

    fn check(&self, precondition: &Precondition) -> Result<(), StoreError> {
        let key = precondition.key();
        let found = self.latest(key).map(|entry| entry.mod_revision);
        let (holds, expected) = match precondition {
            Precondition::At { revision, .. } => (found == Some(*revision), Some(*revision)),
            Precondition::Absent { .. } => (found.is_none(), None),
            Precondition::Exists { .. } => (found.is_some(), None),
        };
        if holds {
            return Ok(());
        }
        Err(StoreError::Conflict {
            key: Arc::clone(key),
            expected,
            found,
        })
    }
}

fn unwritable(reason: &str) -> StoreError {
    StoreError::Unavailable {
        reason: format!("its log: {reason}; reads go on, free space or repair the disk"),
    }
}
