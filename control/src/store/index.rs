//! What readers see: the latest entry of every key, and the recent history for watches.
//!
//! One lock over plain maps: a list clones `Arc`s under it (about 10 ns per entry), nothing else
//! happens there. Changes in the history are numbered by position; a watch is such a position, so a
//! slow watcher costs nothing, and the window's size is the memory bound for all of them together.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use tokio::sync::watch;

use super::log::Content;
use super::{Change, Compacted, Entry, Revision};

/// Most changes kept for watches; as many as there are objects, where those are more. A watch that falls out
/// of the window costs its reader a list of everything, during which more is written the larger that is.
pub const HISTORY_CHANGE_COUNT_MAX: usize = 10_000;
/// Most bytes of values kept for watches; [`HISTORY_BYTES_PER_OBJECT`] for each object, where that is more.
pub const HISTORY_BYTES_MAX: usize = 16 << 20;
/// Half of a pod: the newest value of an object is in memory in any case.
const HISTORY_BYTES_PER_OBJECT: usize = 1 << 10;

/// The shared state of all readers.
pub(super) struct Index {
    state: RwLock<State>,
    /// Wakes watchers; its sender lives in the writer, so watches end when the writer does.
    wakeup: watch::Receiver<Revision>,
}

struct State {
    entries: BTreeMap<Arc<str>, Arc<Entry>>,
    revision: Revision,
    history: VecDeque<Arc<Change>>,
    history_bytes: usize,
    /// Position of `history[0]` in the sequence of all changes since the store was opened.
    history_start: u64,
    /// Every change with a greater revision is in `history`.
    compacted: Revision,
}

/// What left the history window: the log may forget it too.
#[derive(Default)]
pub(super) struct Dropped {
    /// The window now starts after this revision.
    pub(super) compacted: Revision,
    /// Values that nobody can ask for any more, as (revision, key).
    pub(super) superseded: Vec<(Revision, Arc<str>)>,
}

impl Index {
    /// The index over what the log holds, the sender that wakes its watchers, and what the log holds
    /// beyond the window.
    pub(super) fn new(content: Content) -> (Index, watch::Sender<Revision>, Dropped) {
        let (sender, wakeup) = watch::channel(content.revision);
        let history_bytes = content.history.iter().map(|c| c.value_bytes()).sum();
        let mut state = State {
            entries: content.entries,
            revision: content.revision,
            history: content.history.into(),
            history_bytes,
            history_start: 0,
            compacted: content.compacted,
        };
        let dropped = state.trim();
        let index = Index {
            state: RwLock::new(state),
            wakeup,
        };
        (index, sender, dropped)
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        // A panic while the lock is held cannot leave the maps half changed in a way that matters
        // more than losing every read: the process is about to be restarted anyway.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn revision(&self) -> Revision {
        self.read().revision
    }

    pub(super) fn oldest(&self) -> Revision {
        self.read().compacted
    }

    /// Forgets all of the history.
    pub(super) fn compact(&self) -> Dropped {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.forget(|_| true)
    }

    /// Another content, of which it is not known how it came about: every watch has to list again.
    pub(super) fn replace(&self, entries: BTreeMap<Arc<str>, Arc<Entry>>, revision: Revision) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        // One more than there were: also those that have seen all of it are behind.
        state.history_start += state.history.len() as u64 + 1;
        state.history.clear();
        state.history_bytes = 0;
        state.entries = entries;
        (state.revision, state.compacted) = (revision, revision);
    }

    pub(super) fn get(&self, key: &str) -> Option<Arc<Entry>> {
        self.read().entries.get(key).cloned()
    }

    pub(super) fn list(&self, prefix: &str) -> (Revision, Vec<Arc<Entry>>) {
        let state = self.read();
        let entries = state.range(prefix).cloned().collect();
        (state.revision, entries)
    }

    pub(super) fn count(&self, prefix: &str) -> usize {
        self.read().range(prefix).count()
    }

    pub(super) fn watch(
        self: &Arc<Self>,
        prefix: &str,
        after: Revision,
    ) -> Result<Watch, Compacted> {
        let state = self.read();
        if after < state.compacted || after > state.revision {
            return Err(state.compacted_error(after));
        }
        let offset = state.history.partition_point(|c| c.revision() <= after);
        Ok(Watch {
            prefix: prefix.into(),
            position: state.history_start + offset as u64,
            revision: after,
            ended: None,
            wakeup: self.wakeup.clone(),
            index: Arc::clone(self),
        })
    }

    /// Makes durable changes visible, all at once, and trims the history window.
    pub(super) fn apply(&self, changes: &[Arc<Change>], revision: Revision) -> Dropped {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        for change in changes {
            match &**change {
                Change::Put { entry, .. } => {
                    let key = Arc::clone(&entry.key);
                    state.entries.insert(key, Arc::clone(entry));
                }
                Change::Delete { key, .. } => {
                    state.entries.remove(key);
                }
            }
            state.history_bytes += change.value_bytes();
            state.history.push_back(Arc::clone(change));
        }
        state.revision = revision;
        state.trim()
    }
}

impl State {
    fn range(&self, prefix: &str) -> impl Iterator<Item = &Arc<Entry>> {
        self.entries
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(_, entry)| entry)
    }

    fn compacted_error(&self, requested: Revision) -> Compacted {
        Compacted {
            requested,
            oldest: self.compacted,
            current: self.revision,
        }
    }

    /// Drops whole transactions from the front until the window is within its bounds; the latest
    /// transaction always stays.
    fn trim(&mut self) -> Dropped {
        self.forget(|state| {
            let objects = state.entries.len();
            let count_max = HISTORY_CHANGE_COUNT_MAX.max(objects);
            let bytes_max = HISTORY_BYTES_MAX.max(objects * HISTORY_BYTES_PER_OBJECT);
            let is_large = state.history.len() > count_max || state.history_bytes > bytes_max;
            let oldest = state.history.front().map(|c| c.revision());
            is_large && oldest != Some(state.revision)
        })
    }

    /// Drops whole transactions from the front as long as `more` says so.
    fn forget(&mut self, more: impl Fn(&State) -> bool) -> Dropped {
        let mut dropped = Dropped::default();
        while more(self) {
            let Some(oldest) = self.history.front().map(|c| c.revision()) else {
                break;
            };
            while let Some(change) = self.history.front().filter(|c| c.revision() == oldest) {
                self.history_bytes -= change.value_bytes();
                superseded_by(change, &mut dropped.superseded);
                self.history.pop_front();
                self.history_start += 1;
            }
            self.compacted = oldest;
        }
        dropped.compacted = self.compacted;
        dropped
    }
}

/// The log rows that no reader needs once `change` has left the window.
fn superseded_by(change: &Change, rows: &mut Vec<(Revision, Arc<str>)>) {
    if let Some(previous) = change.previous() {
        rows.push((previous.mod_revision, Arc::clone(&previous.key)));
    }
    if let Change::Delete { key, revision, .. } = change {
        rows.push((*revision, Arc::clone(key)));
    }
}

/// A position in the history: yields each change under a prefix once, in order.
pub struct Watch {
    index: Arc<Index>,
    wakeup: watch::Receiver<Revision>,
    prefix: Arc<str>,
    position: u64,
    revision: Revision,
    ended: Option<Compacted>,
}

impl Watch {
    /// The next change; `None` when the watch has ended: see [`Watch::ended`].
    ///
    /// Cancel safe: a change is either returned or still there for the next call.
    pub async fn next(&mut self) -> Option<Arc<Change>> {
        loop {
            // Marked as seen before the look, so that a change after the look wakes us again.
            self.wakeup.borrow_and_update();
            match self.try_next() {
                Ok(Some(change)) => return Some(change),
                Ok(None) => self.wakeup.changed().await.ok()?,
                Err(_) => return None,
            }
        }
    }

    /// The next change if there is one now.
    pub fn try_next(&mut self) -> Result<Option<Arc<Change>>, Compacted> {
        if let Some(ended) = &self.ended {
            return Err(ended.clone());
        }
        let state = self.index.read();
        let Some(offset) = self.position.checked_sub(state.history_start) else {
            let error = state.compacted_error(self.revision);
            self.ended = Some(error.clone());
            return Err(error);
        };
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = state
            .history
            .range(offset.min(state.history.len())..)
            .enumerate()
            .find(|(_, change)| change.key().starts_with(&*self.prefix));
        match found {
            Some((skipped, change)) => {
                self.position += skipped as u64 + 1;
                self.revision = change.revision();
                Ok(Some(Arc::clone(change)))
            }
            None => {
                self.position = state.history_start + state.history.len() as u64;
                self.revision = state.revision;
                Ok(None)
            }
        }
    }

    /// Everything up to this revision under the prefix has been returned, except possibly later
    /// changes of the very transaction returned last.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Why the watch ended: it fell out of the history window. `None` while it is alive, and when
    /// the store was closed.
    pub fn ended(&self) -> Option<&Compacted> {
        self.ended.as_ref()
    }
}
