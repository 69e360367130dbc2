//! The ends of pods, and the fate of the Job, written down before anything is let go. Pure.
//!
//! ```text
//!  ended ─► noted (uncountedTerminatedPods, completedIndexes, failedIndexes) ─► finalizer gone ─► counted
//!             └─ together with the Job's fate: FailureTarget or SuccessCriteriaMet
//! ```
//! The fate is decided once: what made it (a pod that matched a rule) may be gone at the next look.

use std::collections::BTreeSet;

use gantry_api::k8s_openapi::api::batch::v1::JobStatus;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use gantry_api::k8s_openapi::jiff::SignedDuration;

use super::observed::{Observed, Tally, has_tracking, uid, uncounted};
use super::policy::{Verdict, is_success};
use super::status::{End, recorded_end, set_condition};
use crate::controllers::replicaset::count;

/// Pods that are noted and let go in one pass: it bounds the status and keeps other Jobs' waits short.
const RELEASE_COUNT_MAX: usize = 500;

/// What the first half of a pass comes to.
#[derive(Debug)]
pub(super) struct Settled {
    /// To be written before anything else.
    pub(super) status: JobStatus,
    /// Uids of pods that may lose their finalizer then.
    pub(super) release: BTreeSet<String>,
}

/// Notes what has ended, and what becomes of the Job.
pub(super) fn settle(observed: &Observed<'_>) -> Settled {
    let mut status = observed.job.status.clone().unwrap_or_default();
    if observed.spec.suspend != Some(true) {
        status.start_time.get_or_insert(Time(observed.now));
    }
    let tally = observed.tally(&status);
    if observed.is_indexed() {
        status.completed_indexes = Some(tally.completed.to_string()).filter(|t| !t.is_empty());
        status.succeeded = Some(tally.succeeded).filter(|n| *n > 0);
        let per_index = observed.spec.backoff_limit_per_index;
        status.failed_indexes = per_index.map(|_| tally.failed_indexes.to_string());
    }
    let end = recorded_end(&status).or_else(|| {
        let end = decide(observed, &status, &tally)?;
        set_condition(&mut status, end.target(), true, end.why(), observed.now);
        Some(end)
    });
    let mut settled = Settled {
        status,
        release: BTreeSet::new(),
    };
    note(observed, &tally, end.as_ref(), &mut settled);
    settled
}

/// Lists pods by uid, as far as one pass goes.
fn note(observed: &Observed<'_>, tally: &Tally, end: Option<&End>, settled: &mut Settled) {
    let kept = observed.to_be_replaced(tally);
    let kept: BTreeSet<&str> = kept.values().map(|pod| uid(pod)).collect();
    let (succeeded, failed) = uncounted(&settled.status);
    let mut noted: BTreeSet<String> = succeeded.iter().chain(failed).cloned().collect();
    let mut lists = settled.status.uncounted_terminated_pods.take();
    let lists = lists.get_or_insert_default();
    for pod in observed.pods.iter().filter(|pod| has_tracking(pod)) {
        let ended = observed.ended(pod);
        let may_go = match ended {
            Some(true) => true,
            Some(false) => !kept.contains(uid(pod)),
            None => false,
        };
        if !may_go && end.is_none() {
            continue;
        }
        if settled.release.len() == RELEASE_COUNT_MAX {
            break;
        }
        settled.release.insert(uid(pod).to_owned());
        let fresh = !noted.contains(uid(pod)) && observed.can_count(pod);
        // A Job that has failed takes the pods along that still run; one that has succeeded needs them
        // no more, which is no failure.
        let has_failed = match ended {
            Some(succeeded) => !succeeded,
            None => end.is_some_and(|end| !end.succeeded),
        };
        let own = uid(pod).to_owned();
        if ended == Some(true) {
            // An index is noted by its number.
            if fresh && !observed.is_indexed() {
                lists.succeeded.get_or_insert_default().push(own.clone());
                noted.insert(own);
            }
        } else if has_failed && fresh && observed.verdict(pod).counts() {
            lists.failed.get_or_insert_default().push(own.clone());
            noted.insert(own);
        }
    }
    settled.status.uncounted_terminated_pods = Some(std::mem::take(lists));
}

/// Moves ends into the counters whose pods have lost their finalizer or are gone.
///
/// * `observed` – as after the release.
pub(super) fn count_ended(observed: &Observed<'_>, status: &mut JobStatus) {
    let tracked = observed.pods.iter().filter(|pod| has_tracking(pod));
    let tracked: BTreeSet<&str> = tracked.map(|pod| uid(pod)).collect();
    let Some(mut uncounted) = status.uncounted_terminated_pods.take() else {
        return;
    };
    let settle = |uids: &mut Option<Vec<String>>, counter: &mut Option<i32>| {
        let list = uids.get_or_insert_default();
        let before = list.len();
        list.retain(|uid| tracked.contains(uid.as_str()));
        let settled = count(before - list.len());
        if settled > 0 {
            *counter = Some(counter.unwrap_or(0).saturating_add(settled));
        }
        if list.is_empty() {
            *uids = None;
        }
    };
    if observed.is_indexed() {
        // Counted by index, also where an older version has listed them.
        uncounted.succeeded = None;
    }
    settle(&mut uncounted.succeeded, &mut status.succeeded);
    settle(&mut uncounted.failed, &mut status.failed);
    status.uncounted_terminated_pods = Some(uncounted);
}

/// Whether, and how, the Job ends now. The order is upstream's.
fn decide(observed: &Observed<'_>, status: &JobStatus, tally: &Tally) -> Option<End> {
    let spec = observed.spec;
    let mut ended = observed.pods.iter();
    let by_policy = ended.find_map(|pod| match observed.ended(pod) {
        Some(false) => match observed.verdict(pod) {
            Verdict::FailJob(words) => Some(words),
            _ => None,
        },
        _ => None,
    });
    if let Some(words) = by_policy {
        return Some(End::failed("PodFailurePolicy", words));
    }
    if tally.failed > spec.backoff_limit.unwrap_or(6) || has_restarted_too_often(observed) {
        let words = "Job has reached the specified backoff limit";
        return Some(End::failed("BackoffLimitExceeded", words.to_owned()));
    }
    if has_passed_deadline(observed, status) {
        let words = "Job was active longer than specified deadline";
        return Some(End::failed("DeadlineExceeded", words.to_owned()));
    }
    let given_up = tally.failed_indexes.count();
    if spec.max_failed_indexes.is_some_and(|max| given_up > max) {
        let words = "Job has exceeded the specified maximal number of failed indexes";
        return Some(End::failed("MaxFailedIndexesExceeded", words.to_owned()));
    }
    let completions = spec.completions;
    if given_up > 0
        && completions.is_some_and(|all| given_up.saturating_add(tally.succeeded) >= all)
    {
        let words = "Job has failed indexes".to_owned();
        return Some(End::failed("FailedIndexes", words));
    }
    if observed.is_indexed()
        && let Some(words) = is_success(
            spec.success_policy.as_ref(),
            completions.unwrap_or(0),
            &tally.completed,
        )
    {
        return Some(End::succeeded("SuccessPolicy", words));
    }
    let done = match completions {
        Some(wanted) => tally.succeeded >= wanted,
        None => tally.succeeded > 0 && observed.active().is_empty(),
    };
    done.then(|| {
        let words = "Reached expected number of succeeded pods".to_owned();
        End::succeeded("CompletionsReached", words)
    })
}

/// Pods that restart in place count by their restarts.
fn has_restarted_too_often(observed: &Observed<'_>) -> bool {
    let template = observed.spec.template.spec.as_ref();
    if template.and_then(|t| t.restart_policy.as_deref()) != Some("OnFailure") {
        return false;
    }
    let active = observed.active();
    let statuses = active.iter().filter_map(|pod| pod.status.as_ref());
    let all = statuses.flat_map(|status| {
        let containers = status.container_statuses.iter().flatten();
        containers.chain(status.init_container_statuses.iter().flatten())
    });
    let restarts = all.map(|container| container.restart_count);
    let restarts = restarts.fold(0, i32::saturating_add);
    restarts > 0 && restarts >= observed.spec.backoff_limit.unwrap_or(6)
}

fn has_passed_deadline(observed: &Observed<'_>, status: &JobStatus) -> bool {
    let deadline_s = observed.spec.active_deadline_seconds;
    let (Some(deadline_s), Some(start)) = (deadline_s, status.start_time.as_ref()) else {
        return false;
    };
    let passed = observed.now.duration_since(start.0) >= SignedDuration::from_secs(deadline_s);
    passed && observed.spec.suspend != Some(true)
}
