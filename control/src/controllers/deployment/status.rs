//! The status of a Deployment: counts and the conditions Available, Progressing, ReplicaFailure.
//!
//! ```text
//!  Progressing:  NewReplicaSetCreated / FoundNewReplicaSet ─► ReplicaSetUpdated ─► NewReplicaSetAvailable
//!                                     │ no progress for progressDeadlineSeconds        (rollout complete)
//!                                     └────► ProgressDeadlineExceeded (status False)
//! ```
//! Source: Kubernetes `pkg/controller/deployment/progress.go` and `sync.go`.

use std::time::Duration;

use gantry_api::k8s_openapi::api::apps::v1::{
    Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use gantry_api::k8s_openapi::jiff::Timestamp;

use super::annotations::{desired, limits, size};

/// The rollout is done.
const NEW_SET_AVAILABLE: &str = "NewReplicaSetAvailable";
/// The rollout made no progress in time.
const TIMED_OUT: &str = "ProgressDeadlineExceeded";
/// The Deployment is paused.
const PAUSED: &str = "DeploymentPaused";
/// The Deployment was paused and goes on.
const RESUMED: &str = "DeploymentResumed";

/// A condition of now.
pub(super) fn condition(
    type_: &str,
    status: &str,
    reason: &str,
    message: String,
    now: Timestamp,
) -> DeploymentCondition {
    DeploymentCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_transition_time: Some(Time(now)),
        last_update_time: Some(Time(now)),
    }
}

/// The condition of this type.
pub(super) fn find<'a>(
    conditions: &'a [DeploymentCondition],
    type_: &str,
) -> Option<&'a DeploymentCondition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Adds or replaces a condition; one of equal status and reason stays as it is, and the transition
/// time changes only with the status.
pub(super) fn set(conditions: &mut Vec<DeploymentCondition>, mut new: DeploymentCondition) {
    if let Some(old) = find(conditions, &new.type_) {
        if old.status == new.status && old.reason == new.reason {
            return;
        }
        if old.status == new.status {
            new.last_transition_time = old.last_transition_time.clone();
        }
    }
    conditions.retain(|condition| condition.type_ != new.type_);
    conditions.push(new);
}

/// The deadline, if progress is watched at all.
pub(super) fn deadline(deployment: &Deployment) -> Option<Duration> {
    let seconds = deployment.spec.as_ref()?.progress_deadline_seconds?;
    (seconds != i32::MAX).then(|| Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

/// Whether the Deployment is paused.
pub(super) fn is_paused(deployment: &Deployment) -> bool {
    deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.paused)
        .unwrap_or(false)
}

/// Records pausing and resuming, so that a pause does not count as lack of progress.
pub(super) fn note_pause(
    deployment: &Deployment,
    conditions: &mut Vec<DeploymentCondition>,
    now: Timestamp,
) {
    if deadline(deployment).is_none() {
        return;
    }
    let reason = find(conditions, "Progressing").and_then(|c| c.reason.as_deref());
    if reason == Some(TIMED_OUT) {
        return;
    }
    let (noted, paused) = (reason == Some(PAUSED), is_paused(deployment));
    let (reason, message) = match (paused, noted) {
        (true, false) => (PAUSED, "Deployment is paused"),
        (false, true) => (RESUMED, "Deployment is resumed"),
        _ => return,
    };
    set(
        conditions,
        condition("Progressing", "Unknown", reason, message.to_owned(), now),
    );
}

/// The sum of one number over the statuses of ReplicaSets.
fn sum<'a>(sets: impl Iterator<Item = &'a ReplicaSet>, of: fn(&ReplicaSet) -> i32) -> i32 {
    sets.map(of).fold(0, i32::saturating_add)
}

/// The counts, and Available.
pub(super) fn counts(
    deployment: &Deployment,
    sets: &[&ReplicaSet],
    current: Option<&ReplicaSet>,
    mut conditions: Vec<DeploymentCondition>,
    now: Timestamp,
) -> DeploymentStatus {
    let all = || sets.iter().copied();
    let actual = |set: &ReplicaSet| set.status.as_ref().map_or(0, |status| status.replicas);
    let ready = |set: &ReplicaSet| {
        set.status
            .as_ref()
            .and_then(|s| s.ready_replicas)
            .unwrap_or(0)
    };
    let available = sum(all(), |set| {
        set.status
            .as_ref()
            .and_then(|status| status.available_replicas)
            .unwrap_or(0)
    });
    let terminating = sum(all(), |set| {
        set.status
            .as_ref()
            .and_then(|status| status.terminating_replicas)
            .unwrap_or(0)
    });
    let (_, max_unavailable) = limits(deployment);
    let (status, reason, message) = if available >= desired(deployment) - max_unavailable {
        (
            "True",
            "MinimumReplicasAvailable",
            "Deployment has minimum availability.",
        )
    } else {
        let message = "Deployment does not have minimum availability.";
        ("False", "MinimumReplicasUnavailable", message)
    };
    set(
        &mut conditions,
        condition("Available", status, reason, message.to_owned(), now),
    );
    let old = deployment.status.as_ref();
    DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: Some(sum(all(), actual)),
        updated_replicas: Some(sum(current.into_iter(), actual)),
        ready_replicas: Some(sum(all(), ready)),
        available_replicas: Some(available),
        unavailable_replicas: Some((sum(all(), size) - available).max(0)),
        terminating_replicas: Some(terminating),
        collision_count: old.and_then(|status| status.collision_count),
        conditions: Some(conditions),
    }
}

/// Every pod is of the current template, wanted and available.
fn is_complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = Some(desired(deployment));
    status.updated_replicas == wanted
        && status.replicas == wanted
        && status.available_replicas == wanted
}

/// More new, ready or available pods, or fewer old ones, than at the last look.
fn has_progressed(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let n = |value: Option<i32>| value.unwrap_or(0);
    let outdated = |status: &DeploymentStatus| n(status.replicas) - n(status.updated_replicas);
    n(new.updated_replicas) > n(old.updated_replicas)
        || outdated(new) < outdated(old)
        || n(new.ready_replicas) > n(old.ready_replicas)
        || n(new.available_replicas) > n(old.available_replicas)
}

/// Sets Progressing and ReplicaFailure during a rollout; returns when the deadline is to be checked.
pub(super) fn judge_rollout(
    deployment: &Deployment,
    sets: &[&ReplicaSet],
    current: Option<&ReplicaSet>,
    status: &mut DeploymentStatus,
    now: Timestamp,
) -> Option<Duration> {
    let deadline = deadline(deployment);
    let old = deployment.status.clone().unwrap_or_default();
    let complete = is_complete(deployment, status);
    let progressed = has_progressed(&old, status);
    let settled = status.replicas == status.updated_replicas;
    let conditions = status.conditions.get_or_insert_default();
    let mut again = None;
    match deadline {
        None => conditions.retain(|condition| condition.type_ != "Progressing"),
        Some(deadline) => {
            let known = find(conditions, "Progressing").cloned();
            let reason = known
                .as_ref()
                .and_then(|condition| condition.reason.as_deref());
            let waited = known.as_ref().map(|condition| waited(condition, now));
            let subject = match current {
                Some(set) => format!("ReplicaSet {:?}", name(set)),
                None => {
                    let name = deployment.metadata.name.as_deref().unwrap_or_default();
                    format!("Deployment {name:?}")
                }
            };
            if settled && reason == Some(NEW_SET_AVAILABLE) {
                // No rollout is under way: lost pods are the ReplicaSet's business.
            } else if complete {
                let message = format!("{subject} has successfully progressed.");
                let new = condition("Progressing", "True", NEW_SET_AVAILABLE, message, now);
                set(conditions, new);
            } else if progressed {
                let message = format!("{subject} is progressing.");
                let mut new = condition("Progressing", "True", "ReplicaSetUpdated", message, now);
                if let Some(known) = known.filter(|known| known.status == "True") {
                    new.last_transition_time = known.last_transition_time;
                }
                // Removed first: an equal reason must still move lastUpdateTime.
                conditions.retain(|condition| condition.type_ != "Progressing");
                conditions.push(new);
                again = Some(deadline);
            } else if reason != Some(NEW_SET_AVAILABLE)
                && (reason == Some(TIMED_OUT) || waited.is_some_and(|waited| waited > deadline))
            {
                let message = format!("{subject} has timed out progressing.");
                set(
                    conditions,
                    condition("Progressing", "False", TIMED_OUT, message, now),
                );
            } else if let Some(waited) = waited {
                again = Some(deadline.saturating_sub(waited));
            }
        }
    }
    note_failure(sets, current, conditions);
    // A second more than the rest, so that clocks which round do not check too early.
    again.map(|rest| rest + Duration::from_secs(1))
}

fn waited(condition: &DeploymentCondition, now: Timestamp) -> Duration {
    let since = condition
        .last_update_time
        .as_ref()
        .map_or(now, |time| time.0);
    Duration::try_from(now.duration_since(since)).unwrap_or_default()
}

fn name(set: &ReplicaSet) -> &str {
    set.metadata.name.as_deref().unwrap_or_default()
}

/// Shows the failure of a ReplicaSet, the current one's first.
fn note_failure(
    sets: &[&ReplicaSet],
    current: Option<&ReplicaSet>,
    conditions: &mut Vec<DeploymentCondition>,
) {
    let of = |set: &&ReplicaSet| {
        let conditions = set.status.as_ref()?.conditions.as_ref()?;
        conditions
            .iter()
            .find(|condition| condition.type_ == "ReplicaFailure")
            .cloned()
    };
    match current.iter().chain(sets).find_map(of) {
        None => conditions.retain(|condition| condition.type_ != "ReplicaFailure"),
        Some(failure) => set(
            conditions,
            DeploymentCondition {
                type_: failure.type_,
                status: failure.status,
                reason: failure.reason,
                message: failure.message,
                last_transition_time: failure.last_transition_time.clone(),
                last_update_time: failure.last_transition_time,
            },
        ),
    }
}
