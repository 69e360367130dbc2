//! Counts of connections that have drifted from what is connected.
//!
//! The programs add at connect() and subtract when the socket goes. What they cannot see makes a count
//! drift: a Service that began to be counted while connections lived, a socket that ended without a
//! hook (MPTCP's subflows), an id that is another backend's now. A difference that is the same at two
//! looks in a row is drift; one that moves is traffic between the two readings of one look.

use std::collections::BTreeMap;

/// Backend id to number.
pub type Counts = BTreeMap<u32, i64>;

/// What to write, and the differences to give to the next look.
///
/// * `counted` – the counts of all backends that are counted; `held` – sockets connected to each.
/// * `before` – the differences of the last look.
pub fn corrections(counted: &Counts, held: &Counts, before: &Counts) -> (Counts, Counts) {
    let (mut right, mut differences) = (Counts::new(), Counts::new());
    for (id, count) in counted {
        let held = held.get(id).copied().unwrap_or(0);
        let difference = held - count;
        if difference == 0 {
            continue;
        }
        if before.get(id) == Some(&difference) {
            right.insert(*id, held);
        } else {
            differences.insert(*id, difference);
        }
    }
    (right, differences)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_difference_that_stays_is_repaired_and_one_that_moves_is_not() {
        let counts = |list: &[(u32, i64)]| list.iter().copied().collect::<Counts>();
        let (right, first) = corrections(
            &counts(&[(1, 5), (2, 3)]),
            &counts(&[(1, 2), (2, 4)]),
            &Counts::new(),
        );
        assert!(right.is_empty(), "one look says nothing");
        let (right, second) = corrections(
            &counts(&[(1, 6), (2, 3)]),
            &counts(&[(1, 3), (2, 5)]),
            &first,
        );
        assert_eq!(right, counts(&[(1, 3)]));
        assert_eq!(second, counts(&[(2, 2)]));
    }

    proptest! {
        /// In a quiet system two looks repair everything, and nothing that is right is written.
        #[test]
        fn two_looks_repair_everything(
            counted in prop::collection::btree_map(0u32..20, -5i64..20, 0..10),
            held in prop::collection::btree_map(0u32..20, 0i64..20, 0..10),
        ) {
            let (none, differences) = corrections(&counted, &held, &Counts::new());
            prop_assert!(none.is_empty());
            let (right, _) = corrections(&counted, &held, &differences);
            let mut repaired = counted.clone();
            repaired.extend(&right);
            for (id, count) in &repaired {
                prop_assert_eq!(*count, held.get(id).copied().unwrap_or(0));
            }
            prop_assert!(right.iter().all(|(id, count)| counted[id] != *count));
        }
    }
}
