//! The floor: up to which revision has every node programmed the common part? Pure.
//!
//! A drain waits for the floor to reach the revision of the pod's deletion. Participants are the
//! registered nodes that were not declared dead, connected or not: a silent one holds every drain
//! until it is given up. A node that has programmed the last change of the common part is as good
//! as at the head, since nothing after it concerns it.
//!
//! [`Waits`] are those of one stream. One that is not answered in time gets a last word with the
//! names of the missing nodes, before the owner of the pod gives up waiting.

use std::time::Duration;

use gantry_api::proto;
use tokio::time::Instant;

/// Names told to the one who waits.
const MISSING_MAX: usize = 3;

/// Waits of one agent; it keeps to fewer itself.
const WAITS_MAX: usize = 256;
/// When the owner is told who is missing: it waits 1 s at most.
const TOLD_AFTER: Duration = Duration::from_millis(700);
/// Nobody waits any more.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(2);

/// What one stream waits for.
#[derive(Default)]
pub(super) struct Waits(Vec<Wait>);

struct Wait {
    rev: u64,
    since: Instant,
    told: bool,
}

impl Waits {
    /// False: there are too many.
    pub(super) fn add(&mut self, rev: u64, now: Instant) -> bool {
        self.0.push(Wait {
            rev,
            since: now,
            told: false,
        });
        self.0.len() <= WAITS_MAX
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// When time alone makes an answer due.
    pub(super) fn due_at(&self) -> Option<Instant> {
        let due = |wait: &Wait| match wait.told {
            false => wait.since + TOLD_AFTER,
            true => wait.since + FORGOTTEN_AFTER,
        };
        self.0.iter().map(due).min()
    }

    /// What is to be said now.
    pub(super) fn answers(&mut self, floors: &Floors, now: Instant) -> Vec<proto::Floor> {
        let mut answers = Vec::new();
        self.0.retain_mut(|wait| {
            let waited = now.saturating_duration_since(wait.since);
            if let Some(answer) = floors.reached(wait.rev) {
                answers.push(answer);
                return false;
            }
            if !wait.told && waited >= TOLD_AFTER {
                wait.told = true;
                answers.push(floors.at(wait.rev));
            }
            waited < FORGOTTEN_AFTER
        });
        answers
    }
}

/// One look at what the nodes have acked; not kept, because the set of participants changes.
pub(super) struct Floors {
    acked: Vec<(String, u64)>,
}

impl Floors {
    /// * `acked` – participants with the revision each has programmed.
    /// * `head` – the revision of the index; `common_rev` – the last change of the common part.
    pub(super) fn new(mut acked: Vec<(String, u64)>, head: u64, common_rev: u64) -> Self {
        for (_, rev) in &mut acked {
            if *rev >= common_rev {
                *rev = head;
            }
        }
        Self { acked }
    }

    /// The answer to a wait for `rev`, if the floor has reached it.
    pub(super) fn reached(&self, rev: u64) -> Option<proto::Floor> {
        let answer = self.at(rev);
        answer.missing.is_empty().then_some(answer)
    }

    /// The floor as it is, and who is still below `rev`.
    pub(super) fn at(&self, rev: u64) -> proto::Floor {
        let below = || self.acked.iter().filter(|(_, acked)| *acked < rev);
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        // Registered, and no commit since: a node that joins or returns.
        let name = |(name, acked): &(String, u64)| match acked {
            0 => format!("{name} (not yet back)"),
            _ => name.clone(),
        };
        proto::Floor {
            waited: rev,
            missing_count: number(below().count()),
            rev: self
                .acked
                .iter()
                .map(|(_, acked)| *acked)
                .min()
                .unwrap_or(rev),
            nodes: number(self.acked.len()),
            missing: below().map(name).take(MISSING_MAX).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floors(acked: &[(&str, u64)], head: u64, common_rev: u64) -> Floors {
        let acked = acked
            .iter()
            .map(|(name, rev)| ((*name).to_owned(), *rev))
            .collect();
        Floors::new(acked, head, common_rev)
    }

    #[test]
    fn the_slowest_node_holds_the_floor_and_is_named() {
        let floors = floors(&[("a", 9), ("b", 4)], 10, 8);
        assert!(floors.reached(4).is_some());
        assert!(floors.reached(5).is_none());
        assert_eq!(floors.at(5).missing, ["b"]);
        assert_eq!(floors.at(5).rev, 4);
    }

    #[test]
    fn a_node_that_joins_or_returns_holds_the_floor_until_its_first_commit() {
        let floors = floors(&[("a", 9), ("b", 0)], 10, 8);
        assert!(floors.reached(1).is_none());
        assert_eq!(floors.at(9).missing, ["b (not yet back)"]);
    }

    #[test]
    fn at_most_three_are_named_and_all_are_counted() {
        let floor = floors(&[("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 7)], 10, 8).at(5);
        assert_eq!(floor.missing, ["a", "b", "c"]);
        assert_eq!((floor.missing_count, floor.nodes, floor.waited), (4, 5, 5));
    }

    #[test]
    fn a_node_at_the_last_common_change_is_at_the_head() {
        // Revision 9 changed nothing that nodes share: nobody will ever ack it by a commit.
        assert!(floors(&[("a", 8)], 9, 8).reached(9).is_some());
    }

    #[test]
    fn a_wait_is_answered_once_named_once_and_forgotten() {
        let (start, mut waits) = (Instant::now(), Waits::default());
        assert!(waits.add(3, start) && waits.add(9, start));
        let look = floors(&[("a", 4), ("b", 12)], 12, 11);
        let answered = waits.answers(&look, start);
        assert_eq!(answered.len(), 1, "{answered:?}");
        assert_eq!((answered[0].waited, answered[0].missing.len()), (3, 0));
        assert_eq!(waits.due_at(), Some(start + TOLD_AFTER));
        let named = waits.answers(&look, start + TOLD_AFTER);
        assert_eq!(
            (named[0].waited, named[0].missing.as_slice()),
            (9, &["a".to_owned()][..])
        );
        assert!(waits.answers(&look, start + TOLD_AFTER).is_empty(), "once");
        assert!(waits.answers(&look, start + FORGOTTEN_AFTER).is_empty());
        assert!(waits.is_empty() && waits.due_at().is_none());
    }

    #[test]
    fn one_answer_serves_all_waits_at_or_below_it() {
        let (start, mut waits) = (Instant::now(), Waits::default());
        (1..=100).for_each(|rev| assert!(waits.add(rev, start)));
        assert_eq!(
            waits.answers(&floors(&[("a", 100)], 100, 100), start).len(),
            100
        );
    }

    #[test]
    fn without_nodes_every_floor_is_reached() {
        assert_eq!(floors(&[], 9, 8).reached(9).unwrap().nodes, 0);
    }
}
