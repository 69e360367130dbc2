//! Pods that have ended here, beyond the time for which the control plane knows of them.
//!
//! ```text
//!  final status ─durable, pod not in the view─► tombstone ─24 h of this agent's time, or 10,000 newer─► gone
//!        ▲                                          │ the pod is in the view again: a restored store
//!        └──────────────────────────────────────────┘
//! ```
//! A store that is restored from a backup brings back pods that have ended since. Their UIDs never start
//! here again (rule 8): the last word that was kept is offered to the new history instead.
//!
//! Age is counted in hours that the agent has run, so a clock that jumps ends nothing, and a machine that
//! was off remembers longer. What is kept on disk, and how the hour outlives the agent, is in `finals.rs`.
//!
//! Pure: no clock and no I/O.

use std::collections::BTreeMap;

use crate::ids::PodUid;

/// As many pods are remembered, about 100 bytes of memory and one small file each; the oldest goes first.
pub(super) const TOMBSTONES_MAX: usize = 10_000;
/// Hours for which they are remembered: more than lie between two daily backups.
pub(super) const HOURS_MAX: u64 = 25;

/// A pod's tombstone, and the hour in which it was set: where its record is.
pub(super) type Tombstone = (PodUid, u64);

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Tombstones {
    /// Hours that the agent has run, over all its starts.
    hour: u64,
    hours: BTreeMap<PodUid, u64>,
}

impl Tombstones {
    /// * `hour` – that of the last start.
    /// * `found` – what earlier starts have left; of several the newest counts.
    pub(super) fn new(hour: u64, found: impl IntoIterator<Item = Tombstone>) -> Self {
        let mut hours = BTreeMap::new();
        for (uid, at) in found {
            let newest = hours.entry(uid).or_insert(at);
            *newest = at.max(*newest);
        }
        Self { hour, hours }
    }

    /// The hour that a tombstone is set in now.
    pub(super) fn hour(&self) -> u64 {
        self.hour
    }

    /// One hour more has passed. Returns it; what is older than [`HOURS_MAX`] is forgotten.
    pub(super) fn next_hour(&mut self) -> u64 {
        self.hour += 1;
        let hour = self.hour;
        self.hours.retain(|_, at| *at + HOURS_MAX > hour);
        hour
    }

    /// Remembers a pod. Returns the one that has to make room, if one has to.
    pub(super) fn set(&mut self, uid: PodUid) -> Option<Tombstone> {
        self.hours.insert(uid, self.hour);
        if self.hours.len() <= TOMBSTONES_MAX {
            return None;
        }
        let (oldest, _) = self.hours.iter().min_by_key(|(_, at)| **at)?;
        self.hours.remove_entry(&oldest.clone())
    }

    /// The hour in which this pod's was set.
    pub(super) fn of(&self, uid: &PodUid) -> Option<u64> {
        self.hours.get(uid).copied()
    }

    /// The pod has a final status that waits for the control plane once more.
    pub(super) fn take(&mut self, uid: &PodUid) {
        self.hours.remove(uid);
    }

    pub(super) fn len(&self) -> usize {
        self.hours.len()
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = Tombstone> {
        self.hours.iter().map(|(uid, hour)| (uid.clone(), *hour))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn uid(i: usize) -> PodUid {
        PodUid::new(&format!("u{i}")).unwrap()
    }

    #[test]
    fn a_tombstone_lasts_for_a_day_of_the_agents_own_time() {
        let mut tombstones = Tombstones::new(7, [(uid(0), 7), (uid(1), 3), (uid(0), 2)]);
        for _ in 1..HOURS_MAX {
            tombstones.next_hour();
            assert_eq!(tombstones.of(&uid(0)), Some(7));
        }
        assert_eq!(tombstones.of(&uid(1)), None, "older by four hours");
        assert_eq!(tombstones.next_hour(), 7 + HOURS_MAX);
        assert_eq!(tombstones.of(&uid(0)), None);
    }

    #[test]
    fn the_oldest_makes_room() {
        let mut tombstones = Tombstones::new(1, []);
        assert_eq!(tombstones.set(uid(0)), None);
        tombstones.next_hour();
        for i in 1..TOMBSTONES_MAX {
            assert_eq!(tombstones.set(uid(i)), None);
        }
        assert_eq!(tombstones.set(uid(TOMBSTONES_MAX)), Some((uid(0), 1)));
        assert_eq!(tombstones.all().count(), TOMBSTONES_MAX);
    }

    proptest! {
        /// Whatever is set, taken and aged: what was set last is there unless it was taken or a day has
        /// passed, and nothing else is.
        #[test]
        fn what_is_remembered_is_what_was_set_within_a_day(
            steps in proptest::collection::vec((0..3_u8, 0..5_usize), 0..120)
        ) {
            let mut tombstones = Tombstones::new(0, []);
            let mut model = BTreeMap::new();
            for (step, i) in steps {
                match step {
                    0 => {
                        tombstones.set(uid(i));
                        model.insert(uid(i), tombstones.hour());
                    }
                    1 => {
                        tombstones.take(&uid(i));
                        model.remove(&uid(i));
                    }
                    _ => drop(tombstones.next_hour()),
                }
                let now = tombstones.hour();
                let kept = model.iter().filter(|(_, at)| now - **at < HOURS_MAX);
                let kept: Vec<_> = kept.map(|(uid, at)| (uid.clone(), *at)).collect();
                prop_assert_eq!(tombstones.all().collect::<Vec<_>>(), kept);
            }
        }
    }
}
