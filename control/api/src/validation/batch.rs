//! Rules for Jobs and CronJobs; those of a Job's policies are in `job_policy.rs`.

use super::job_policy::{pod_failure_policy, success_policy};
use super::names;
use super::sets::immutable;
use super::workload::template;
use super::{not_negative, one_of};
use crate::cron::Schedule;
use crate::field::{FieldError, Path};
use jiff::tz::TimeZone;
use k8s_openapi::api::batch::v1::{CronJob, Job, JobSpec};

/// Longest name of a CronJob: eleven characters are left for the time of each Job.
const CRON_JOB_NAME_BYTES_MAX: usize = 52;
/// Pods of an Indexed Job at once, and indexes of it that may fail.
const INDEX_COUNT_MAX: i32 = 100_000;
/// Above so many completions, [`MANY_MAX`] holds for a Job with a limit per index: its status lists both
/// the completed and the failed ones.
const MANY_COMPLETIONS: i32 = 100_000;
/// Pods at once, and indexes that may fail, of a Job with many completions.
const MANY_MAX: i32 = 10_000;

/// A Job.
pub fn job(job: &Job) -> Vec<FieldError> {
    let path = Path::new("spec");
    let Some(spec) = &job.spec else {
        return vec![FieldError::required(&path, "")];
    };
    let mut errors = Vec::new();
    job_spec(spec, &path, &mut errors);
    let name = job.metadata.name.as_deref().unwrap_or_default();
    let last = spec.completions.unwrap_or(0).saturating_sub(1);
    // Pods of an Indexed Job have names for the network, the longest is the last one's.
    if spec.completion_mode.as_deref() == Some("Indexed") && last >= 0 && !name.is_empty() {
        let hostname = format!("{name}-{last}");
        if !names::dns1123_label(&hostname).is_empty() {
            let at = Path::new("metadata").child("name");
            let detail = format!("will not able to create pod with invalid DNS label: {hostname}");
            errors.push(FieldError::invalid(&at, name, &detail));
        }
    }
    errors
}

fn job_spec(spec: &JobSpec, path: &Path, errors: &mut Vec<FieldError>) {
    for (field, value) in [
        ("parallelism", spec.parallelism.map(i64::from)),
        ("completions", spec.completions.map(i64::from)),
        ("backoffLimit", spec.backoff_limit.map(i64::from)),
        (
            "backoffLimitPerIndex",
            spec.backoff_limit_per_index.map(i64::from),
        ),
        ("maxFailedIndexes", spec.max_failed_indexes.map(i64::from)),
        ("activeDeadlineSeconds", spec.active_deadline_seconds),
        (
            "ttlSecondsAfterFinished",
            spec.ttl_seconds_after_finished.map(i64::from),
        ),
    ] {
        not_negative(&path.child(field), value, errors);
    }
    let mode = spec.completion_mode.as_deref();
    one_of(
        &path.child("completionMode"),
        mode,
        &["NonIndexed", "Indexed"],
        errors,
    );
    indexes(spec, path, errors);
    if let Some(policy) = &spec.pod_failure_policy {
        let at = path.child("podFailurePolicy");
        pod_failure_policy(policy, spec, &at, errors);
    }
    if let Some(policy) = &spec.success_policy {
        let at = path.child("successPolicy");
        success_policy(policy, spec, &at, errors);
    }
    // A policy must know how a pod has ended.
    let policies: &[&str] = match spec.pod_failure_policy {
        Some(_) => &["Failed"],
        None => &["Failed", "TerminatingOrFailed"],
    };
    let policy = spec.pod_replacement_policy.as_deref();
    one_of(
        &path.child("podReplacementPolicy"),
        policy,
        policies,
        errors,
    );
    let at = path.child("template");
    template(Some(&spec.template), &at, &["OnFailure", "Never"], errors);
    let pod = spec.template.spec.as_ref();
    let restarts = pod.and_then(|pod| pod.restart_policy.as_deref());
    if spec.pod_failure_policy.is_some() && restarts == Some("OnFailure") {
        let detail = "only \"Never\" is supported when podFailurePolicy is specified";
        let at = at.child("spec").child("restartPolicy");
        errors.push(FieldError::invalid(&at, restarts, detail));
    }
}

/// What holds for indexes, and what only an Indexed Job may say.
fn indexes(spec: &JobSpec, path: &Path, errors: &mut Vec<FieldError>) {
    let (per_index, max_failed) = (spec.backoff_limit_per_index, spec.max_failed_indexes);
    let limit_at = path.child("backoffLimitPerIndex");
    let failed_at = path.child("maxFailedIndexes");
    if max_failed.is_some() && per_index.is_none() {
        let detail = "when maxFailedIndexes is specified";
        errors.push(FieldError::required(&limit_at, detail));
    }
    if spec.completion_mode.as_deref() != Some("Indexed") {
        let detail = "requires indexed completion mode";
        for (at, value) in [(&limit_at, per_index), (&failed_at, max_failed)] {
            if let Some(value) = value {
                errors.push(FieldError::invalid(at, value, detail));
            }
        }
        return;
    }
    let completions = spec.completions;
    if completions.is_none() {
        let at = path.child("completions");
        errors.push(FieldError::required(&at, "when completion mode is Indexed"));
    }
    let mut at_most = |field: &str, value: Option<i32>, most: i32, why: &str| {
        if let Some(value) = value.filter(|value| *value > most) {
            let detail = format!("must be less than or equal to {most}{why}");
            errors.push(FieldError::invalid(&path.child(field), value, &detail));
        }
    };
    let why = " when completion mode is Indexed";
    at_most("parallelism", spec.parallelism, INDEX_COUNT_MAX, why);
    at_most("maxFailedIndexes", max_failed, INDEX_COUNT_MAX, "");
    let many = completions.is_some_and(|completions| completions > MANY_COMPLETIONS);
    if many && per_index.is_some() {
        let why = format!(
            " when completions are above {MANY_COMPLETIONS} and used with backoff limit per index"
        );
        at_most("parallelism", spec.parallelism, MANY_MAX, &why);
        at_most("maxFailedIndexes", max_failed, MANY_MAX, &why);
        if max_failed.is_none() {
            let detail = format!("must be specified when completions is above {MANY_COMPLETIONS}");
            errors.push(FieldError::required(&failed_at, &detail));
        }
    }
    if let Some(max) = max_failed.filter(|max| completions.is_some_and(|all| *max > all)) {
        let detail = "must be less than or equal to completions";
        errors.push(FieldError::invalid(&failed_at, max, detail));
    }
}

/// What a Job is made of never changes; how many at once, and whether at all, may.
pub fn job_update(new: &Job, old: &Job) -> Vec<FieldError> {
    let (Some(new), Some(old)) = (&new.spec, &old.spec) else {
        return Vec::new();
    };
    let (mut errors, path) = (Vec::new(), Path::new("spec"));
    immutable(
        &new.selector,
        &old.selector,
        &path.child("selector"),
        &mut errors,
    );
    immutable(
        &new.template,
        &old.template,
        &path.child("template"),
        &mut errors,
    );
    let at = path.child("completionMode");
    immutable(&new.completion_mode, &old.completion_mode, &at, &mut errors);
    for (field, new, old) in [
        (
            "podFailurePolicy",
            serde_json::to_value(&new.pod_failure_policy),
            serde_json::to_value(&old.pod_failure_policy),
        ),
        (
            "backoffLimitPerIndex",
            serde_json::to_value(new.backoff_limit_per_index),
            serde_json::to_value(old.backoff_limit_per_index),
        ),
        (
            "managedBy",
            serde_json::to_value(&new.managed_by),
            serde_json::to_value(&old.managed_by),
        ),
        (
            "successPolicy",
            serde_json::to_value(&new.success_policy),
            serde_json::to_value(&old.success_policy),
        ),
    ] {
        let (new, old) = (new.unwrap_or_default(), old.unwrap_or_default());
        immutable(&new, &old, &path.child(field), &mut errors);
    }
    // An Indexed Job may be scaled together with its parallelism.
    let at = path.child("completions");
    if new.completion_mode.as_deref() != Some("Indexed") {
        immutable(&new.completions, &old.completions, &at, &mut errors);
    } else if new.completions != old.completions && new.completions != new.parallelism {
        let detail = "can only be modified in tandem with spec.parallelism";
        errors.push(FieldError::invalid(&at, new.completions, detail));
    }
    errors
}

/// A CronJob.
pub fn cron_job(job: &CronJob) -> Vec<FieldError> {
    let path = Path::new("spec");
    let spec = &job.spec;
    let mut errors = Vec::new();
    if job
        .metadata
        .name
        .as_ref()
        .is_some_and(|name| name.len() > CRON_JOB_NAME_BYTES_MAX)
    {
        let at = Path::new("metadata").child("name");
        errors.push(FieldError::too_long(&at, CRON_JOB_NAME_BYTES_MAX));
    }
    let at = path.child("schedule");
    if spec.schedule.is_empty() {
        errors.push(FieldError::required(&at, ""));
    } else if let Err(detail) = Schedule::parse(&spec.schedule) {
        errors.push(FieldError::invalid(&at, spec.schedule.as_str(), &detail));
    }
    if let Some(zone) = &spec.time_zone
        && TimeZone::get(zone).is_err()
    {
        let detail = "unknown time zone: use a name of the tz database, e.g. Europe/Berlin";
        errors.push(FieldError::invalid(
            &path.child("timeZone"),
            String::clone(zone),
            detail,
        ));
    }
    let policy = spec.concurrency_policy.as_deref();
    let policies = ["Allow", "Forbid", "Replace"];
    one_of(
        &path.child("concurrencyPolicy"),
        policy,
        &policies,
        &mut errors,
    );
    for (field, value) in [
        ("startingDeadlineSeconds", spec.starting_deadline_seconds),
        (
            "successfulJobsHistoryLimit",
            spec.successful_jobs_history_limit.map(i64::from),
        ),
        (
            "failedJobsHistoryLimit",
            spec.failed_jobs_history_limit.map(i64::from),
        ),
    ] {
        not_negative(&path.child(field), value, &mut errors);
    }
    let at = path.child("jobTemplate").child("spec");
    match &spec.job_template.spec {
        None => errors.push(FieldError::required(&at, "")),
        Some(spec) => job_spec(spec, &at, &mut errors),
    }
    errors
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
