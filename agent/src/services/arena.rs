//! Hands out ranges of a fixed number of places, and none again before its quarantine is over.
//!
//! ```text
//!           allocate                 free                    1 s later
//!  free ─────────────► handed out ─────────► in quarantine ────────────► free
//! ```
//! A program on another CPU may still be using what it has read of a range when the last frontend
//! leaves it; 1 s is far longer than any program runs, also when it is preempted. (Measured: ranges
//! reused after 2 or 8 switches, instead of after a time, did mix generations.)
//!
//! Invariants: handed out ranges never overlap; free neighbours are merged. Best fit, O(log n).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// How long a freed range stays untouched.
pub const QUARANTINE: Duration = Duration::from_secs(1);

/// No range of that length is free.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArenaFull {
    /// When the next quarantine ends and asking again may succeed; none: nothing is in quarantine.
    pub retry_at: Option<Duration>,
}

/// An allocator of ranges `base .. base + len`.
#[derive(Debug)]
pub struct Arena {
    by_base: BTreeMap<u32, u32>,
    by_len: BTreeSet<(u32, u32)>,
    /// (end of quarantine, base, len), ends ascending.
    quarantine: VecDeque<(Duration, u32, u32)>,
}

impl Arena {
    /// Places `first .. end`, all free but those in `used`, which must not overlap.
    ///
    /// * `release_at` – the free ones come out of quarantine then; zero: at once.
    pub fn new(first: u32, end: u32, used: &BTreeMap<u32, u32>, release_at: Duration) -> Self {
        let mut arena = Self {
            by_base: BTreeMap::new(),
            by_len: BTreeSet::new(),
            quarantine: VecDeque::new(),
        };
        let mut at = first;
        let after = std::iter::once((&end, &0));
        for (&base, &len) in used.range(first..end).chain(after) {
            if base > at {
                arena.quarantine.push_back((release_at, at, base - at));
            }
            at = at.max(base.saturating_add(len));
        }
        arena.release(Duration::ZERO);
        arena
    }

    /// Takes `len` places; `len` is at least 1.
    pub fn allocate(&mut self, len: u32, now: Duration) -> Result<u32, ArenaFull> {
        self.release(now);
        let Some(&(found, base)) = self.by_len.range((len, 0)..).next() else {
            return Err(ArenaFull {
                retry_at: self.quarantine.front().map(|(release_at, ..)| *release_at),
            });
        };
        self.by_len.remove(&(found, base));
        self.by_base.remove(&base);
        if found > len {
            self.add(base + len, found - len);
        }
        Ok(base)
    }

    /// Gives back what was handed out and may be in use by a reader until `now`.
    pub fn free(&mut self, base: u32, len: u32, now: Duration) {
        self.quarantine.push_back((now + QUARANTINE, base, len));
    }

    /// Gives back what was handed out and never published: no reader can know it.
    pub fn free_unpublished(&mut self, base: u32, len: u32) {
        self.merge(base, len);
    }

    /// Places that are not handed out: free, or free within a second.
    pub fn unused_count(&self) -> u32 {
        let in_quarantine = self.quarantine.iter().map(|(_, _, len)| len);
        self.by_base.values().chain(in_quarantine).sum()
    }

    fn release(&mut self, now: Duration) {
        while let Some(&(release_at, base, len)) = self.quarantine.front() {
            if release_at > now {
                return;
            }
            self.quarantine.pop_front();
            self.merge(base, len);
        }
    }

    fn merge(&mut self, mut base: u32, mut len: u32) {
        if let Some((&before, &before_len)) = self.by_base.range(..base).next_back()
            && before + before_len == base
        {
            self.by_base.remove(&before);
            self.by_len.remove(&(before_len, before));
            base = before;
            len += before_len;
        }
        if let Some(after_len) = self.by_base.remove(&(base + len)) {
            self.by_len.remove(&(after_len, base + len));
            len += after_len;
        }
        self.add(base, len);
    }

    fn add(&mut self, base: u32, len: u32) {
        self.by_base.insert(base, len);
        self.by_len.insert((len, base));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    #[test]
    fn a_freed_range_is_not_handed_out_for_a_second() {
        let mut arena = Arena::new(0, 10, &BTreeMap::new(), Duration::ZERO);
        let base = arena.allocate(10, NOW).unwrap();
        arena.free(base, 10, NOW);
        let soon = NOW + QUARANTINE - Duration::from_nanos(1);
        let full = arena.allocate(1, soon).unwrap_err();
        assert_eq!(full.retry_at, Some(NOW + QUARANTINE));
        assert_eq!(arena.allocate(10, NOW + QUARANTINE), Ok(0));
        assert_eq!(arena.allocate(1, NOW).unwrap_err().retry_at, None);
    }

    #[test]
    fn what_a_predecessor_used_stays_and_the_rest_waits() {
        let used = BTreeMap::from([(2, 3), (8, 2)]);
        let mut arena = Arena::new(1, 10, &used, NOW);
        assert!(arena.allocate(1, Duration::ZERO).is_err());
        // A node that has just started its agent is not out of places.
        assert_eq!(arena.unused_count(), 9 - 5);
        assert_eq!(arena.allocate(3, NOW), Ok(5));
        assert_eq!(arena.unused_count(), 1);
        assert_eq!(arena.allocate(1, NOW), Ok(1));
        assert!(arena.allocate(1, NOW).is_err());
    }

    proptest! {
        /// Whatever is asked and given back: handed out ranges never overlap, and when all is
        /// back and the quarantine over, the arena is one free range again.
        #[test]
        fn ranges_never_overlap(lens in prop::collection::vec((1u32..20, any::<bool>()), 1..200)) {
            let mut arena = Arena::new(3, 500, &BTreeMap::new(), Duration::ZERO);
            let mut held: Vec<(u32, u32)> = Vec::new();
            let mut now = NOW;
            for (len, give_back) in lens {
                now += Duration::from_millis(300);
                if let Ok(base) = arena.allocate(len, now) {
                    prop_assert!(base >= 3 && base + len <= 500);
                    let apart = |(b, l): &(u32, u32)| base + len <= *b || b + l <= base;
                    prop_assert!(held.iter().all(apart));
                    held.push((base, len));
                }
                if give_back && !held.is_empty() {
                    let (base, len) = held.swap_remove(held.len() / 2);
                    arena.free(base, len, now);
                }
            }
            for (base, len) in held {
                arena.free(base, len, now);
            }
            prop_assert_eq!(arena.allocate(497, now + QUARANTINE), Ok(3));
        }
    }
}
