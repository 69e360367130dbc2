//! Rules for Jobs and CronJobs.

use super::sets::immutable;
use super::workload::template;
use super::{not_negative, one_of};
use crate::cron::Schedule;
use crate::field::{FieldError, Path};
use jiff::tz::TimeZone;
use k8s_openapi::api::batch::v1::{CronJob, Job, JobSpec};

/// Longest name of a CronJob: eleven characters are left for the time of each Job.
const CRON_JOB_NAME_BYTES_MAX: usize = 52;
/// Pods of an Indexed Job at once, and its completions.
const INDEX_COUNT_MAX: i32 = 100_000;

/// A Job.
pub fn job(job: &Job) -> Vec<FieldError> {
    let path = Path::new("spec");
    let Some(spec) = &job.spec else {
        return vec![FieldError::required(&path, "")];
    };
    let mut errors = Vec::new();
    job_spec(spec, &path, &mut errors);
    errors
}

fn job_spec(spec: &JobSpec, path: &Path, errors: &mut Vec<FieldError>) {
    for (field, value) in [
        ("parallelism", spec.parallelism.map(i64::from)),
        ("completions", spec.completions.map(i64::from)),
        ("backoffLimit", spec.backoff_limit.map(i64::from)),
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
    if mode == Some("Indexed") {
        let at = path.child("completions");
        match spec.completions {
            None => errors.push(FieldError::required(&at, "when completion mode is Indexed")),
            Some(count) if count > INDEX_COUNT_MAX => {
                let detail = format!("must be less than or equal to {INDEX_COUNT_MAX}");
                errors.push(FieldError::invalid(&at, count, &detail));
            }
            Some(_) => {}
        }
    }
    let policies = ["TerminatingOrFailed", "Failed"];
    let policy = spec.pod_replacement_policy.as_deref();
    one_of(
        &path.child("podReplacementPolicy"),
        policy,
        &policies,
        errors,
    );
    let at = path.child("template");
    template(Some(&spec.template), &at, &["OnFailure", "Never"], errors);
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
    // An Indexed Job may be scaled together with its parallelism.
    let scaled =
        new.completion_mode.as_deref() == Some("Indexed") && new.completions == new.parallelism;
    if !scaled {
        let at = path.child("completions");
        immutable(&new.completions, &old.completions, &at, &mut errors);
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
