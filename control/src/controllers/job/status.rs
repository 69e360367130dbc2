//! The conditions of a Job, and its status once its pods are as planned. Pure.

use std::sync::Arc;

use gantry_api::k8s_openapi::api::batch::v1::{Job, JobCondition, JobStatus};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use gantry_api::k8s_openapi::jiff::Timestamp;

use super::observed::{Observed, has_tracking, uid, uncounted};
use super::plan::Plan;
use crate::controllers::pods;
use crate::controllers::replicaset::count;

/// How a Job ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct End {
    pub(super) succeeded: bool,
    reason: String,
    message: String,
}

impl End {
    pub(super) fn failed(reason: &str, message: String) -> Self {
        Self {
            succeeded: false,
            reason: reason.to_owned(),
            message,
        }
    }

    pub(super) fn succeeded(reason: &str, message: String) -> Self {
        Self {
            succeeded: true,
            reason: reason.to_owned(),
            message,
        }
    }

    /// The condition that says so while pods of the Job are left.
    pub(super) fn target(&self) -> &'static str {
        match self.succeeded {
            true => "SuccessCriteriaMet",
            false => "FailureTarget",
        }
    }

    /// The condition that says so at last.
    fn last(&self) -> &'static str {
        match self.succeeded {
            true => "Complete",
            false => "Failed",
        }
    }

    /// Reason and words.
    pub(super) fn why(&self) -> (&str, &str) {
        (&self.reason, &self.message)
    }
}

fn condition<'a>(status: &'a JobStatus, type_: &str) -> Option<&'a JobCondition> {
    let mut conditions = status.conditions.iter().flatten();
    conditions.find(|condition| condition.type_ == type_ && condition.status == "True")
}

/// The condition of this type is True.
pub(super) fn has_condition(job: &Job, type_: &str) -> bool {
    let status = job.status.as_ref();
    status.is_some_and(|status| condition(status, type_).is_some())
}

pub(super) fn is_finished(job: &Job) -> bool {
    has_condition(job, "Complete") || has_condition(job, "Failed")
}

/// How the Job ends, once that is decided.
pub(super) fn recorded_end(status: &JobStatus) -> Option<End> {
    let end = |type_: &str, succeeded: bool| {
        let condition = condition(status, type_)?;
        Some(End {
            succeeded,
            reason: condition.reason.clone().unwrap_or_default(),
            message: condition.message.clone().unwrap_or_default(),
        })
    };
    end("SuccessCriteriaMet", true).or_else(|| end("FailureTarget", false))
}

/// Sets a condition; unchanged when it says the same already.
pub(super) fn set_condition(
    status: &mut JobStatus,
    type_: &str,
    on: bool,
    why: (&str, &str),
    now: Timestamp,
) {
    let conditions = status.conditions.get_or_insert_default();
    let value = if on { "True" } else { "False" };
    if conditions
        .iter()
        .any(|c| c.type_ == type_ && c.status == value)
    {
        return;
    }
    conditions.retain(|condition| condition.type_ != type_);
    conditions.push(JobCondition {
        type_: type_.to_owned(),
        status: value.to_owned(),
        reason: Some(why.0.to_owned()),
        message: Some(why.1.to_owned()),
        last_probe_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    });
}

/// The rest of the status, once the pods are as planned.
pub(super) fn finish_status(
    observed: &Observed<'_>,
    status: &mut JobStatus,
    plan: &Plan,
    created: usize,
) {
    let now = observed.now;
    let going = |pod: &Arc<Pod>| plan.delete.contains(uid(pod));
    let active = observed.active();
    let alive: Vec<_> = active.into_iter().filter(|pod| !going(pod)).collect();
    let terminating = observed
        .pods
        .iter()
        .filter(|pod| (pods::is_terminating(pod) && !pods::is_finished(pod)) || going(pod));
    let terminating = terminating.count();
    status.active = Some(count(alive.len() + created)).filter(|n| *n > 0);
    status.ready = Some(count(
        alive.iter().filter(|pod| pods::is_ready(pod)).count(),
    ));
    status.terminating = Some(count(terminating));
    if let Some(end) = recorded_end(status) {
        let (succeeded, failed) = uncounted(status);
        let all_counted = succeeded.is_empty()
            && failed.is_empty()
            && !observed.pods.iter().any(|pod| has_tracking(pod));
        if all_counted && terminating == 0 && alive.is_empty() {
            if end.succeeded {
                status.completion_time.get_or_insert(Time(now));
            }
            set_condition(status, end.last(), true, end.why(), now);
        }
        return;
    }
    if observed.spec.suspend == Some(true) {
        let why = ("JobSuspended", "Job suspended");
        set_condition(status, "Suspended", true, why, now);
        status.start_time = None;
    } else if has_condition(observed.job, "Suspended") {
        let why = ("JobResumed", "Job resumed");
        set_condition(status, "Suspended", false, why, now);
        status.start_time = Some(Time(now));
    }
}
