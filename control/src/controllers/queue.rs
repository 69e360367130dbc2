//! The work queue of every controller: which object to look at next.
//!
//! ```text
//!            add                    get                       done (not dirty)
//!  ─────────────────► waiting ──────────────► processing ──────────────────────► gone
//!  add_after │           ▲                        │ add while processing ⇒ dirty
//!            ▼   due     │                        │
//!         delayed ───────┘◄── add_rate_limited ───┘ done (dirty) ⇒ waiting
//! ```
//! Invariants, checked by `tests::properties`: a key is never processed twice at the same time; a
//! key added while it waits is processed once; a key added while it is processed is processed again;
//! no added key is lost; a delayed key keeps its earliest time.
//!
//! [`Core`] decides and has no clock; [`WorkQueue`] adds the clock, the lock and the waiting.
//! Source: client-go `util/workqueue` (queue, delaying queue, rate limiter: 5 ms doubling to 1000 s).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// First back-off of a failing key; it doubles with each failure.
pub(crate) const BACKOFF_MIN: Duration = Duration::from_millis(5);
/// Longest back-off of a failing key.
pub(crate) const BACKOFF_MAX: Duration = Duration::from_secs(1000);

/// The back-off after `failures` failures in a row (0 = the first failure).
pub(crate) fn backoff(failures: u32) -> Duration {
    let factor = 1_u32.checked_shl(failures).unwrap_or(u32::MAX);
    BACKOFF_MIN
        .checked_mul(factor)
        .map_or(BACKOFF_MAX, |delay| delay.min(BACKOFF_MAX))
}

/// One entry of the delay heap. `serial` makes the order total without asking for an order of keys.
#[derive(Debug)]
struct Delayed<K> {
    due: Instant,
    serial: u64,
    key: K,
}

impl<K> PartialEq for Delayed<K> {
    fn eq(&self, other: &Self) -> bool {
        (self.due, self.serial) == (other.due, other.serial)
    }
}
impl<K> Eq for Delayed<K> {}
impl<K> PartialOrd for Delayed<K> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<K> Ord for Delayed<K> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.serial).cmp(&(other.due, other.serial))
    }
}

/// The queue's state; every method is told the time.
#[derive(Debug)]
struct Core<K> {
    /// Keys to hand out, oldest first; each is also in `dirty`.
    waiting: VecDeque<K>,
    /// Keys that need a look: waiting, or added again while being processed.
    dirty: HashSet<K>,
    /// Keys that some worker has.
    processing: HashSet<K>,
    /// Keys to add later; entries that `due` no longer names are stale and skipped.
    heap: BinaryHeap<Reverse<Delayed<K>>>,
    /// The serial of the one valid heap entry per delayed key, and its time.
    due: HashMap<K, (Instant, u64)>,
    /// Failures in a row per key.
    failures: HashMap<K, u32>,
    serial: u64,
}

impl<K: Clone + Eq + Hash> Core<K> {
    fn new() -> Self {
        Self {
            waiting: VecDeque::new(),
            dirty: HashSet::new(),
            processing: HashSet::new(),
            heap: BinaryHeap::new(),
            due: HashMap::new(),
            failures: HashMap::new(),
            serial: 0,
        }
    }

    fn add(&mut self, key: K) {
        if self.dirty.insert(key.clone()) && !self.processing.contains(&key) {
            self.waiting.push_back(key);
        }
    }

    fn add_at(&mut self, key: K, due: Instant) {
        if self
            .due
            .get(&key)
            .is_some_and(|(earlier, _)| *earlier <= due)
        {
            return;
        }
        self.serial += 1;
        self.due.insert(key.clone(), (due, self.serial));
        self.heap.push(Reverse(Delayed {
            due,
            serial: self.serial,
            key,
        }));
    }

    fn fail(&mut self, key: &K) -> Duration {
        let failures = self.failures.entry(key.clone()).or_insert(0);
        let delay = backoff(*failures);
        *failures = failures.saturating_add(1);
        delay
    }

    /// Moves what is due to the waiting line; returns when the next delayed key is due.
    fn advance(&mut self, now: Instant) -> Option<Instant> {
        loop {
            let next = self.heap.peek()?;
            let valid = self
                .due
                .get(&next.0.key)
                .is_some_and(|(_, s)| *s == next.0.serial);
            if valid && next.0.due > now {
                return Some(next.0.due);
            }
            if let Some(Reverse(entry)) = self.heap.pop()
                && valid
            {
                self.due.remove(&entry.key);
                self.add(entry.key);
            }
        }
    }

    fn take(&mut self) -> Option<K> {
        let key = self.waiting.pop_front()?;
        self.dirty.remove(&key);
        self.processing.insert(key.clone());
        Some(key)
    }

    fn done(&mut self, key: &K) {
        self.processing.remove(key);
        if self.dirty.contains(key) {
            self.waiting.push_back(key.clone());
        }
    }
}

/// A deduplicating, delaying, rate-limited queue of keys. Cheap to clone; clones share the queue.
pub(crate) struct WorkQueue<K> {
    inner: Arc<Inner<K>>,
}

struct Inner<K> {
    core: Mutex<Core<K>>,
    changed: Notify,
}

impl<K> Clone for WorkQueue<K> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<K: Clone + Eq + Hash> WorkQueue<K> {
    /// An empty queue.
    pub(crate) fn new() -> Self {
        let inner = Inner {
            core: Mutex::new(Core::new()),
            changed: Notify::new(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    fn core(&self) -> MutexGuard<'_, Core<K>> {
        // No method of Core leaves it half-changed, so a panic elsewhere cannot have broken it.
        self.inner
            .core
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The key needs a look now.
    pub(crate) fn add(&self, key: K) {
        self.core().add(key);
        self.inner.changed.notify_one();
    }

    /// The key needs a look after `delay`, unless it already has an earlier appointment.
    pub(crate) fn add_after(&self, key: K, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        self.core().add_at(key, Instant::now() + delay);
        self.inner.changed.notify_one();
    }

    /// The key failed: it comes back after its back-off, which doubles until [`Self::forget`].
    pub(crate) fn add_rate_limited(&self, key: K) {
        let delay = self.core().fail(&key);
        self.add_after(key, delay);
    }

    /// The key succeeded: its next failure starts from the shortest back-off.
    pub(crate) fn forget(&self, key: &K) {
        self.core().failures.remove(key);
    }

    /// The next key, when there is one. The caller owes a [`Self::done`].
    ///
    /// Cancel safe: a key is taken only when it is returned.
    pub(crate) async fn get(&self) -> K {
        loop {
            let changed = self.inner.changed.notified();
            let deadline = {
                let mut core = self.core();
                let deadline = core.advance(Instant::now());
                if let Some(key) = core.take() {
                    let more = !core.waiting.is_empty() || deadline.is_some();
                    drop(core);
                    if more {
                        // One permit is stored at most: wake the next worker for what is left.
                        self.inner.changed.notify_one();
                    }
                    return key;
                }
                deadline
            };
            match deadline {
                Some(deadline) => {
                    tokio::select! {
                        // Both arms are cancel safe: the state is read again after either.
                        () = changed => {}
                        () = tokio::time::sleep_until(deadline) => {}
                    }
                }
                None => changed.await,
            }
        }
    }

    /// The worker is finished with the key; if it was added meanwhile it waits again.
    pub(crate) fn done(&self, key: &K) {
        self.core().done(key);
        self.inner.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Op {
        Add(u8),
        After(u8, u64),
        Fail(u8),
        Take,
        Done(usize),
        Pass(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0_u8..5).prop_map(Op::Add),
            (0_u8..5, 0_u64..2000).prop_map(|(k, ms)| Op::After(k, ms)),
            (0_u8..5).prop_map(Op::Fail),
            Just(Op::Take),
            (0_usize..5).prop_map(Op::Done),
            (0_u64..1500).prop_map(Op::Pass),
        ]
    }

    #[test]
    fn backoff_doubles_from_5_ms_and_stops_at_1000_s() {
        assert_eq!(backoff(0), Duration::from_millis(5));
        assert_eq!(backoff(1), Duration::from_millis(10));
        assert_eq!(backoff(10), Duration::from_millis(5120));
        assert_eq!(backoff(17), Duration::from_millis(655_360));
        assert_eq!(backoff(18), Duration::from_secs(1000));
        assert_eq!(backoff(500), Duration::from_secs(1000));
    }

    proptest! {
        #[test]
        fn properties(ops in proptest::collection::vec(op(), 0..200)) {
            let mut now = Instant::now();
            let mut core: Core<u8> = Core::new();
            let mut busy: Vec<u8> = Vec::new();
            // Keys that were added and not handed out since; with the time from which it must hold.
            let mut owed: HashMap<u8, Instant> = HashMap::new();
            for op in ops {
                match op {
                    Op::Add(k) => { core.add(k); owed.insert(k, now); }
                    Op::After(k, ms) => {
                        let due = now + Duration::from_millis(ms);
                        core.add_at(k, due);
                        let at = owed.entry(k).or_insert(due);
                        *at = (*at).min(due);
                    }
                    Op::Fail(k) => {
                        let due = now + core.fail(&k);
                        core.add_at(k, due);
                        let at = owed.entry(k).or_insert(due);
                        *at = (*at).min(due);
                    }
                    Op::Take => {
                        core.advance(now);
                        if let Some(k) = core.take() {
                            prop_assert!(!busy.contains(&k), "two workers have {k}");
                            prop_assert!(owed.get(&k).is_some_and(|at| *at <= now), "{k} too early");
                            busy.push(k);
                            owed.remove(&k);
                            if let Some((due, _)) = core.due.get(&k) { owed.insert(k, *due); }
                        }
                    }
                    Op::Done(i) => if !busy.is_empty() {
                        let k = busy.swap_remove(i % busy.len());
                        core.done(&k);
                    },
                    Op::Pass(ms) => now += Duration::from_millis(ms),
                }
            }
            // Drain: every owed key comes out once, and nothing else does.
            for k in busy.drain(..) { core.done(&k); }
            now += Duration::from_secs(2000);
            core.advance(now);
            let mut left: Vec<u8> = std::iter::from_fn(|| core.take()).collect();
            left.sort_unstable();
            let mut expected: Vec<u8> = owed.into_keys().collect();
            expected.sort_unstable();
            prop_assert_eq!(left, expected);
        }
    }

    #[tokio::test]
    async fn workers_share_the_queue_and_delays_are_kept() {
        let queue: WorkQueue<u8> = WorkQueue::new();
        let start = Instant::now();
        queue.add_after(9, Duration::from_millis(40));
        queue.add(1);
        queue.add(1);
        queue.add(2);
        assert_eq!(queue.get().await, 1);
        let (a, b) = tokio::join!(queue.get(), async {
            queue.add(1); // While 1 is processed: again after done, not before.
            queue.get().await
        });
        assert_eq!((a, b), (2, 9));
        assert!(start.elapsed() >= Duration::from_millis(40));
        queue.done(&1);
        assert_eq!(queue.get().await, 1);
    }
}
