//! The floor: up to which revision has every node programmed the common part? Pure.
//!
//! A drain waits for the floor to reach the revision of the pod's deletion. Participants are the
//! registered nodes that were not declared dead, connected or not. A node that has programmed the
//! last change of the common part is as good as at the head, since nothing after it concerns it.

use gantry_api::proto;

/// Names told to the one who waits.
const MISSING_MAX: usize = 3;

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
        let below = self.acked.iter().filter(|(_, acked)| *acked < rev);
        proto::Floor {
            rev: self
                .acked
                .iter()
                .map(|(_, acked)| *acked)
                .min()
                .unwrap_or(rev),
            nodes: u32::try_from(self.acked.len()).unwrap_or(u32::MAX),
            missing: below
                .map(|(name, _)| name.clone())
                .take(MISSING_MAX)
                .collect(),
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
    fn a_node_at_the_last_common_change_is_at_the_head() {
        // Revision 9 changed nothing that nodes share: nobody will ever ack it by a commit.
        assert!(floors(&[("a", 8)], 9, 8).reached(9).is_some());
    }

    #[test]
    fn without_nodes_every_floor_is_reached() {
        assert_eq!(floors(&[], 9, 8).reached(9).unwrap().nodes, 0);
    }
}
