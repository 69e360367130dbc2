//! Waits for a floor: has every node programmed a revision? Pure.
//!
//! ```text
//!  ask(rev) ──► due ──sent──► in flight ──► answered: the last word, the wait is gone
//!                ▲               │ ├─► who is missing so far
//!                └── stream broken ┘
//! ```
//! A floor is the answer to a wait, never remembered: an answer counts for those who wait for that
//! very revision at that time, and for nobody who asks later. At most [`IN_FLIGHT_MAX`] are on the
//! wire; the lowest revision goes first, since its answer comes first.

use std::collections::BTreeMap;

use gantry_api::proto;
use gantry_api::rules::{self, Rule};
use tokio::sync::watch;

/// Waits sent and not answered; the control plane takes 256.
const IN_FLIGHT_MAX: usize = 64;

/// All waits of this node, by revision: those of one revision share theirs. Beside them the last answer,
/// which is kept only when the simulation has switched that rule off.
#[derive(Default)]
pub(super) struct FloorWaits(BTreeMap<u64, Wait>, Option<proto::Floor>);

struct Wait {
    is_sent: bool,
    answer: watch::Sender<Option<proto::Floor>>,
}

impl FloorWaits {
    /// Waits for `rev`; dropping the receiver ends it.
    pub(super) fn ask(&mut self, rev: u64) -> watch::Receiver<Option<proto::Floor>> {
        self.0.retain(|_, wait| !wait.answer.is_closed());
        let wait = self.0.entry(rev).or_insert_with(|| Wait {
            is_sent: false,
            answer: watch::Sender::new(None),
        });
        if let Some(old) = self.1.as_ref().filter(|floor| floor.rev >= rev) {
            wait.answer.send_replace(Some(old.clone()));
        }
        wait.answer.subscribe()
    }

    /// The next one to be sent.
    pub(super) fn take_next(&mut self) -> Option<u64> {
        self.0.retain(|_, wait| !wait.answer.is_closed());
        if self.0.values().filter(|wait| wait.is_sent).count() >= IN_FLIGHT_MAX {
            return None;
        }
        let (rev, wait) = self.0.iter_mut().find(|(_, wait)| !wait.is_sent)?;
        wait.is_sent = true;
        Some(*rev)
    }

    /// Hands an answer to those who wait for it.
    pub(super) fn answered(&mut self, floor: proto::Floor) {
        let rev = floor.waited;
        let is_last = floor.missing_count == 0;
        if is_last && rules::is_off(Rule::FloorIsAnswer) {
            self.1 = Some(floor.clone());
        }
        if let Some(wait) = self.0.get(&rev) {
            wait.answer.send_replace(Some(floor));
        }
        if is_last {
            self.0.remove(&rev);
        }
    }

    /// What was sent is asked again on the next stream.
    pub(super) fn broken(&mut self) {
        for wait in self.0.values_mut() {
            wait.is_sent = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floor(waited: u64, missing: u32) -> proto::Floor {
        proto::Floor {
            waited,
            missing_count: missing,
            ..Default::default()
        }
    }

    #[test]
    fn pods_of_one_revision_ask_once_and_an_answer_is_not_kept() {
        let mut waits = FloorWaits::default();
        let (one, two) = (waits.ask(7), waits.ask(7));
        assert_eq!(waits.take_next(), Some(7));
        assert_eq!(waits.take_next(), None);
        waits.answered(floor(7, 2));
        assert_eq!(one.borrow().as_ref().map(|f| f.missing_count), Some(2));
        waits.answered(floor(7, 0));
        assert_eq!(two.borrow().as_ref().map(|f| f.missing_count), Some(0));
        // Later: what was true then need not be true now.
        let later = waits.ask(7);
        assert!(later.borrow().is_none());
        assert_eq!(waits.take_next(), Some(7));
    }

    #[test]
    fn an_answer_to_another_wait_is_none() {
        let mut waits = FloorWaits::default();
        let wait = waits.ask(7);
        waits.take_next();
        waits.answered(floor(9, 0));
        assert!(wait.borrow().is_none());
    }

    #[test]
    fn a_broken_stream_asks_again_and_who_has_left_is_not_asked_for() {
        let mut waits = FloorWaits::default();
        let (kept, left) = (waits.ask(3), waits.ask(4));
        assert_eq!((waits.take_next(), waits.take_next()), (Some(3), Some(4)));
        drop(left);
        waits.broken();
        assert_eq!((waits.take_next(), waits.take_next()), (Some(3), None));
        drop(kept);
    }

    #[test]
    fn the_wire_holds_a_limited_number_and_the_lowest_goes_first() {
        let mut waits = FloorWaits::default();
        let held: Vec<_> = (0..200).rev().map(|rev| waits.ask(rev)).collect();
        let sent: Vec<u64> = std::iter::from_fn(|| waits.take_next()).collect();
        assert_eq!(sent, (0..IN_FLIGHT_MAX as u64).collect::<Vec<_>>());
        waits.answered(floor(0, 0));
        assert_eq!(waits.take_next(), Some(IN_FLIGHT_MAX as u64));
        drop(held);
    }
}
