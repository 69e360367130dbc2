//! Which pods a Job makes and which it deletes. Pure.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::batch::v1::JobStatus;
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::backoff;
use super::indexes::Failures;
use super::observed::{Observed, Tally, uid};
use super::status::recorded_end;
use crate::controllers::pods;

/// Pods created in one pass.
const CREATE_COUNT_MAX: usize = 500;

/// A pod to make.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct NewPod {
    /// Its index; `None` for a Job without indexes.
    pub(super) index: Option<i32>,
    /// With `backoffLimitPerIndex`: the failures of its index so far.
    pub(super) failures: Option<Failures>,
}

/// What to do about one Job.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Plan {
    pub(super) create: Vec<NewPod>,
    /// Uids of pods to delete.
    pub(super) delete: BTreeSet<String>,
    /// They count neither as done nor as failed: their finalizer goes first.
    pub(super) forget: bool,
    /// When time alone changes something.
    pub(super) again: Option<Duration>,
}

impl Plan {
    fn look_again(&mut self, then: Timestamp, now: Timestamp) {
        let wait = until(then, now);
        self.again = Some(self.again.map_or(wait, |again| again.min(wait)));
    }
}

pub(super) fn until(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(then.duration_since(now)).unwrap_or_default()
}

/// Decides what one Job needs.
///
/// * `status` – with every end that is known in it, and with the Job's fate.
pub(super) fn plan(observed: &Observed<'_>, status: &JobStatus) -> Plan {
    let (spec, now) = (observed.spec, observed.now);
    let mut plan = Plan::default();
    let active = observed.active();
    let has_end = recorded_end(status).is_some();
    if has_end || spec.suspend == Some(true) {
        plan.delete = active.iter().map(|pod| uid(pod).to_owned()).collect();
        plan.forget = !has_end;
        return plan;
    }
    let deadline = spec.active_deadline_seconds.and_then(|seconds| {
        let start = status.start_time.as_ref()?.0;
        start.checked_add(SignedDuration::from_secs(seconds)).ok()
    });
    if let Some(deadline) = deadline {
        plan.look_again(deadline, now);
    }
    let tally = observed.tally(status);
    let parallelism = usize::try_from(spec.parallelism.unwrap_or(1)).unwrap_or(0);
    let wanted = match spec.completions {
        Some(total) => parallelism.min(usize::try_from(total - tally.succeeded).unwrap_or(0)),
        None if tally.succeeded > 0 => active.len(),
        None => parallelism,
    };
    plan.delete = surplus(observed, &tally, &active, wanted);
    if !plan.delete.is_empty() {
        plan.forget = true;
        return plan;
    }
    // Pods that are waited for hold their place.
    let leaving = observed
        .pods
        .iter()
        .filter(|pod| pods::is_terminating(pod) && observed.ended(pod).is_none());
    let held = active.len() + leaving.count();
    let missing = wanted.saturating_sub(held).min(CREATE_COUNT_MAX);
    if missing == 0 {
        return plan;
    }
    if spec.backoff_limit_per_index.is_some() {
        create_by_index(observed, &tally, missing, &mut plan);
        return plan;
    }
    if let Some(end) = backoff::until(observed).filter(|end| *end > now) {
        plan.look_again(end, now);
        return plan;
    }
    plan.create = if observed.is_indexed() {
        let free = free_indexes(observed, &tally).into_iter();
        let new = free.map(|index| NewPod {
            index: Some(index),
            failures: None,
        });
        new.take(missing).collect()
    } else {
        vec![NewPod::default(); missing]
    };
    plan
}

/// Pods that are too many: of no index of the Job or one that is over, a second one of an index, and then
/// those that have done the least.
fn surplus(
    observed: &Observed<'_>,
    tally: &Tally,
    active: &[&Arc<Pod>],
    wanted: usize,
) -> BTreeSet<String> {
    let is_over =
        |index: i32| tally.completed.contains(index) || tally.failed_indexes.contains(index);
    let mut by_worth = active.to_vec();
    by_worth.sort_by_key(|pod| {
        let created = pod.metadata.creation_timestamp.clone();
        (Reverse(pods::is_ready(pod)), created)
    });
    let mut taken = BTreeSet::new();
    let mut kept = Vec::new();
    let mut surplus = BTreeSet::new();
    for pod in by_worth {
        let index = observed.index_of(pod);
        let is_needed = index.is_some_and(|index| !is_over(index) && taken.insert(index));
        if observed.is_indexed() && !is_needed {
            surplus.insert(uid(pod).to_owned());
        } else {
            kept.push(pod);
        }
    }
    let rest = kept.iter().skip(wanted);
    surplus.extend(rest.map(|pod| uid(pod).to_owned()));
    surplus
}

/// Indexes that need a pod, in order: as many as one pass can make, and those that pause.
fn free_indexes(observed: &Observed<'_>, tally: &Tally) -> Vec<i32> {
    let mut taken = tally.completed.clone();
    let running = observed
        .pods
        .iter()
        .filter(|pod| observed.ended(pod).is_none());
    taken.extend(running.filter_map(|pod| observed.index_of(pod)));
    let limit = observed.spec.completions.unwrap_or(0);
    taken
        .free(limit)
        .filter(|index| !tally.failed_indexes.contains(*index))
        .take(CREATE_COUNT_MAX + observed.pods.len())
        .collect()
}

/// Every index pauses for itself: one that does takes no other's place.
fn create_by_index(observed: &Observed<'_>, tally: &Tally, missing: usize, plan: &mut Plan) {
    let now = observed.now;
    let failed: BTreeMap<i32, &Arc<Pod>> = observed.to_be_replaced(tally);
    for index in free_indexes(observed, tally) {
        if plan.create.len() == missing {
            return;
        }
        let last = failed.get(&index);
        let pause_end = last.and_then(|pod| backoff::until_replaced(pod));
        if let Some(end) = pause_end.filter(|end| *end > now) {
            plan.look_again(end, now);
            continue;
        }
        let failures = last.map_or(Failures::default(), |pod| {
            Failures::before(pod).and(observed.verdict(pod).counts())
        });
        plan.create.push(NewPod {
            index: Some(index),
            failures: Some(failures),
        });
    }
}
