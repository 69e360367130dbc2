//! One look at a Job and its pods, and what it adds up to. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use gantry_api::k8s_openapi::api::batch::v1::{Job, JobSpec, JobStatus};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::k8s_openapi::jiff::Timestamp;

use super::backoff::finish_time;
use super::indexes::{Failures, Indexes, index_of};
use super::policy::{Verdict, judge};
use crate::controllers::pods;
use crate::controllers::replicaset::count;

/// Keeps an ended pod until it is counted.
pub(super) const TRACKING: &str = "batch.kubernetes.io/job-tracking";

/// What decisions are made from.
pub(super) struct Observed<'a> {
    pub(super) job: &'a Job,
    pub(super) spec: &'a JobSpec,
    pub(super) pods: &'a [Arc<Pod>],
    pub(super) now: Timestamp,
}

/// What has ended so far, whether it is in the counters, on the way there, or not noted yet: it stays the
/// same while ends are noted, released and counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) succeeded: i32,
    pub(super) failed: i32,
    /// Indexes that have succeeded.
    pub(super) completed: Indexes,
    /// Indexes that are given up; none of them has succeeded. Empty without `backoffLimitPerIndex`.
    pub(super) failed_indexes: Indexes,
}

pub(super) fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

pub(super) fn has_tracking(pod: &Pod) -> bool {
    let finalizers = pod.metadata.finalizers.as_deref().unwrap_or_default();
    finalizers.iter().any(|f| f == TRACKING)
}

/// Uids that are noted as succeeded and as failed.
pub(super) fn uncounted(status: &JobStatus) -> (&[String], &[String]) {
    let lists = status.uncounted_terminated_pods.as_ref();
    let succeeded = lists.and_then(|lists| lists.succeeded.as_deref());
    let failed = lists.and_then(|lists| lists.failed.as_deref());
    (succeeded.unwrap_or_default(), failed.unwrap_or_default())
}

impl Observed<'_> {
    pub(super) fn is_indexed(&self) -> bool {
        self.spec.completion_mode.as_deref() == Some("Indexed")
    }

    /// Indexes are below this.
    fn index_limit(&self) -> i32 {
        self.spec.completions.unwrap_or(0)
    }

    /// The index of a pod, when the Job has such an index.
    pub(super) fn index_of(&self, pod: &Pod) -> Option<i32> {
        index_of(pod).filter(|index| self.is_indexed() && *index < self.index_limit())
    }

    /// Whether the pod's end can count: an Indexed Job knows only its indexes.
    pub(super) fn can_count(&self, pod: &Pod) -> bool {
        !self.is_indexed() || self.index_of(pod).is_some()
    }

    /// How a pod of the Job has ended; `None` while it has not.
    pub(super) fn ended(&self, pod: &Pod) -> Option<bool> {
        match pods::phase(pod) {
            "Succeeded" => return Some(true),
            "Failed" => return Some(false),
            _ => {}
        }
        // A pod that is being deleted is replaced at once, unless its end is waited for: because the Job
        // says so, or because a policy must know how it has ended.
        let waits = self.spec.pod_replacement_policy.as_deref() == Some("Failed")
            || self.spec.pod_failure_policy.is_some();
        let unbound = pods::node(pod).is_none();
        (pods::is_terminating(pod) && (!waits || unbound)).then_some(false)
    }

    pub(super) fn verdict(&self, pod: &Pod) -> Verdict {
        judge(self.spec.pod_failure_policy.as_ref(), pod)
    }

    /// Pods that are neither finished nor going.
    pub(super) fn active(&self) -> Vec<&Arc<Pod>> {
        let pods = self.pods.iter();
        pods.filter(|pod| pods::is_active(pod)).collect()
    }

    /// Whether this end gives up the pod's index.
    fn fails_index(&self, pod: &Pod) -> bool {
        let Some(limit) = self.spec.backoff_limit_per_index else {
            return false;
        };
        match self.verdict(pod) {
            Verdict::FailIndex => true,
            verdict => verdict.counts() && Failures::before(pod).counted >= limit,
        }
    }

    /// Adds up.
    ///
    /// * `status` – the Job's, or the one that is to become it.
    pub(super) fn tally(&self, status: &JobStatus) -> Tally {
        let limit = self.index_limit();
        let read = |text: &Option<String>| Indexes::parse(text.as_deref().unwrap_or(""), limit);
        let mut tally = Tally::default();
        if self.is_indexed() {
            tally.completed = read(&status.completed_indexes);
        }
        if self.spec.backoff_limit_per_index.is_some() {
            tally.failed_indexes = read(&status.failed_indexes);
        }
        let (succeeded, failed) = uncounted(status);
        tally.failed = status
            .failed
            .unwrap_or(0)
            .saturating_add(count(failed.len()));
        tally.succeeded = status
            .succeeded
            .unwrap_or(0)
            .saturating_add(count(succeeded.len()));
        let noted: BTreeSet<&str> = succeeded.iter().chain(failed).map(String::as_str).collect();
        let tracked = || {
            let pods = self.pods.iter();
            pods.filter(|pod| has_tracking(pod) && self.can_count(pod))
        };
        for pod in tracked().filter(|pod| !noted.contains(uid(pod))) {
            match self.ended(pod) {
                Some(true) => match self.index_of(pod) {
                    // An index that was given up stays so, the second success of one is no further one.
                    Some(index) if tally.failed_indexes.contains(index) => {}
                    Some(index) => drop(tally.completed.insert(index)),
                    None => tally.succeeded = tally.succeeded.saturating_add(1),
                },
                Some(false) if self.verdict(pod).counts() => {
                    tally.failed = tally.failed.saturating_add(1);
                }
                Some(false) | None => {}
            }
        }
        if self.is_indexed() {
            tally.succeeded = tally.completed.count();
        }
        for pod in tracked().filter(|pod| self.ended(pod) == Some(false) && self.fails_index(pod)) {
            if let Some(index) = self.index_of(pod).filter(|i| !tally.completed.contains(*i)) {
                tally.failed_indexes.insert(index);
            }
        }
        tally
    }

    /// With `backoffLimitPerIndex`: the last failed pod of every index that still needs one. It is kept
    /// until its replacement exists, which takes over its number of failures.
    pub(super) fn to_be_replaced(&self, tally: &Tally) -> BTreeMap<i32, &Arc<Pod>> {
        let mut last: BTreeMap<i32, &Arc<Pod>> = BTreeMap::new();
        if self.spec.backoff_limit_per_index.is_none() {
            return last;
        }
        let active: BTreeSet<i32> = self
            .active()
            .iter()
            .filter_map(|pod| self.index_of(pod))
            .collect();
        let failed = self.pods.iter().filter(|pod| has_tracking(pod));
        for pod in failed.filter(|pod| self.ended(pod) == Some(false)) {
            let Some(index) = self.index_of(pod) else {
                continue;
            };
            let over = tally.completed.contains(index) || tally.failed_indexes.contains(index);
            if over || active.contains(&index) {
                continue;
            }
            let rank = |pod: &Pod| (Failures::before(pod).total(), finish_time(pod));
            let known = last.entry(index).or_insert(pod);
            if rank(known) < rank(pod) {
                *known = pod;
            }
        }
        last
    }
}
