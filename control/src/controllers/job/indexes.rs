//! Completion indexes: sets of them as the ranges that the API writes, `1,3-5`.
//!
//! A set costs as much as it has ranges, not as much as it has indexes: a Job may have millions.
//!
//! Invariant: ranges are in order, apart by at least one index, and never empty.

use std::fmt;

use gantry_api::k8s_openapi::api::core::v1::Pod;

/// Annotation and label of a pod of an Indexed Job.
pub(super) const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// Annotation: failures of the pod's index before it that count.
pub(super) const FAILURE_COUNT: &str = "batch.kubernetes.io/job-index-failure-count";
/// Annotation: failures of the pod's index before it that the pod failure policy ignored.
pub(super) const IGNORED_FAILURE_COUNT: &str =
    "batch.kubernetes.io/job-index-ignored-failure-count";

fn annotation(pod: &Pod, name: &str) -> Option<i32> {
    let number = pod.metadata.annotations.as_ref()?.get(name)?.parse().ok()?;
    (number >= 0).then_some(number)
}

/// The index of a pod.
pub(super) fn index_of(pod: &Pod) -> Option<i32> {
    annotation(pod, INDEX)
}

/// Failures of one index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Failures {
    /// Those that count towards `backoffLimitPerIndex`.
    pub(super) counted: i32,
    /// Those that the pod failure policy ignored; they lengthen the pause only.
    pub(super) ignored: i32,
}

impl Failures {
    /// Those before this pod. What somebody has spoilt counts as none.
    pub(super) fn before(pod: &Pod) -> Self {
        Self {
            counted: annotation(pod, FAILURE_COUNT).unwrap_or(0),
            ignored: annotation(pod, IGNORED_FAILURE_COUNT).unwrap_or(0),
        }
    }

    pub(super) fn total(self) -> i32 {
        self.counted.saturating_add(self.ignored)
    }

    /// With one more.
    pub(super) fn and(self, counts: bool) -> Self {
        Self {
            counted: self.counted.saturating_add(i32::from(counts)),
            ignored: self.ignored.saturating_add(i32::from(!counts)),
        }
    }
}

/// A set of indexes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Indexes(Vec<(i32, i32)>);

impl Indexes {
    /// Reads `1,3-5`. What is no range is left out, and so is what is not below `limit`: a Job that was
    /// scaled down has no such index any more.
    pub(super) fn parse(text: &str, limit: i32) -> Self {
        let range = |part: &str| -> Option<(i32, i32)> {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: i32 = first.parse().ok()?;
            let last = last.parse::<i32>().ok()?.min(limit.saturating_sub(1));
            (0 <= first && first <= last).then_some((first, last))
        };
        let mut ranges: Vec<(i32, i32)> = text.split(',').filter_map(range).collect();
        ranges.sort_unstable();
        let mut merged: Vec<(i32, i32)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    /// The first range that does not end below `index`.
    fn position(&self, index: i32) -> usize {
        self.0.partition_point(|(_, last)| *last < index)
    }

    pub(super) fn contains(&self, index: i32) -> bool {
        let range = self.0.get(self.position(index));
        range.is_some_and(|(first, _)| *first <= index)
    }

    /// Adds an index; false when it was there.
    pub(super) fn insert(&mut self, index: i32) -> bool {
        if self.contains(index) {
            return false;
        }
        let at = self.position(index);
        let joins_before = at > 0 && self.0[at - 1].1.saturating_add(1) == index;
        let joins_after = self.0.get(at).is_some_and(|(first, _)| *first - 1 == index);
        match (joins_before, joins_after) {
            (true, true) => {
                self.0[at - 1].1 = self.0[at].1;
                self.0.remove(at);
            }
            (true, false) => self.0[at - 1].1 = index,
            (false, true) => self.0[at].0 = index,
            (false, false) => self.0.insert(at, (index, index)),
        }
        true
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many indexes.
    pub(super) fn count(&self) -> i32 {
        let counts = self.0.iter().map(|(first, last)| last - first + 1);
        counts.fold(0, i32::saturating_add)
    }

    /// How many indexes both sets have.
    pub(super) fn count_shared(&self, other: &Self) -> i32 {
        let mut shared = 0_i32;
        for (first, last) in &self.0 {
            let from = other.position(*first);
            let met = other.0[from..]
                .iter()
                .take_while(|(start, _)| start <= last);
            for (start, end) in met {
                shared = shared.saturating_add(last.min(end) - first.max(start) + 1);
            }
        }
        shared
    }

    /// Indexes below `limit` that are not in the set, in order.
    pub(super) fn free(&self, limit: i32) -> impl Iterator<Item = i32> {
        let starts =
            std::iter::once(0).chain(self.0.iter().map(|(_, last)| last.saturating_add(1)));
        let ends = self.0.iter().map(|(first, _)| *first);
        let ends = ends.chain(std::iter::once(limit));
        starts
            .zip(ends)
            .flat_map(move |(start, end)| start..end.min(limit))
    }
}

impl Extend<i32> for Indexes {
    fn extend<I: IntoIterator<Item = i32>>(&mut self, indexes: I) {
        for index in indexes {
            self.insert(index);
        }
    }
}

impl fmt::Display for Indexes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (first, last)) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            match last - first {
                0 => write!(f, "{first}")?,
                1 => write!(f, "{first},{last}")?,
                _ => write!(f, "{first}-{last}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::btree_set;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn set(indexes: &BTreeSet<i32>) -> Indexes {
        let mut set = Indexes::default();
        // From the middle outwards, so that ranges are joined from both sides.
        let mut order: Vec<i32> = indexes.iter().copied().collect();
        order.sort_by_key(|index| (index - 30).abs());
        set.extend(order);
        set
    }

    proptest! {
        #[test]
        fn ranges_are_the_set(
            indexes in btree_set(0_i32..60, 0..40), others in btree_set(0_i32..60, 0..40),
            limit in 0_i32..70,
        ) {
            let ranges = set(&indexes);
            prop_assert!(ranges.0.windows(2).all(|two| two[0].1 + 1 < two[1].0), "{ranges}");
            prop_assert_eq!(&Indexes::parse(&ranges.to_string(), 60), &ranges);
            let below = indexes.iter().copied().filter(|index| *index < limit).collect();
            prop_assert_eq!(Indexes::parse(&ranges.to_string(), limit), set(&below));
            prop_assert_eq!(ranges.count(), i32::try_from(indexes.len()).unwrap());
            prop_assert!((0..60).all(|index| ranges.contains(index) == indexes.contains(&index)));
            let free: Vec<i32> = (0..limit).filter(|index| !indexes.contains(index)).collect();
            prop_assert_eq!(ranges.free(limit).collect::<Vec<_>>(), free);
            let shared = i32::try_from(indexes.intersection(&others).count()).unwrap();
            prop_assert_eq!(ranges.count_shared(&set(&others)), shared);
        }
    }

    #[test]
    fn what_is_no_range_is_left_out() {
        let text = "7,x,3-1,-2,5-6,2147483647,9-2147483647,,0";
        assert_eq!(Indexes::parse(text, 12).to_string(), "0,5-7,9-11");
        assert_eq!(Indexes::parse("0-5", 0).to_string(), "");
        let all = Indexes::parse("0-2147483646", i32::MAX);
        assert_eq!(all.count(), i32::MAX);
        assert_eq!(all.free(i32::MAX).next(), None);
    }
}
