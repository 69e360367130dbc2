//! CronJobs: a Job at each moment that the schedule names.
//!
//! ```text
//!  schedule, last start, now ─► the latest moment that was missed ─► Job <name>-<minutes since 1970>
//!                               Forbid: not while one runs; Replace: the running one goes first
//! ```
//! The name comes from the moment, so a second attempt at the same moment makes no second Job. Of
//! several missed moments only the latest is started.
//!
//! Source: Kubernetes `pkg/controller/cronjob` (cronjob_controllerv2.go).

use std::sync::Arc;
use std::time::Duration;

use gantry_api::cron::Schedule;
use gantry_api::k8s_openapi::api::batch::v1::{CronJob, CronJobSpec, CronJobStatus, Job};
use gantry_api::k8s_openapi::api::core::v1::ObjectReference;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use gantry_api::k8s_openapi::jiff::{SignedDuration, Timestamp, tz::TimeZone};
use gantry_api::status::{Reason, Status};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{Delta, ObjectKey};
use super::queue::WorkQueue;
use super::{Context, Controller, EventType, WORKER_COUNT, event_about, pods};
use crate::server::registry::DeleteOptions;

/// Annotation of a Job: the moment it was made for.
const SCHEDULED: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";
/// Missed moments that are stepped through one by one.
const MISSED_COUNT_MAX: usize = 100;

/// What to do about one CronJob.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// The moment to start a Job for.
    start: Option<Timestamp>,
    /// Names of Jobs that go: beyond the history, or replaced.
    delete: Vec<String>,
    /// A moment was left out since a Job still runs.
    skipped: bool,
    again: Option<Duration>,
}

fn name(metadata: &ObjectMeta) -> &str {
    metadata.name.as_deref().unwrap_or_default()
}

fn condition_time(job: &Job, type_: &str) -> Option<Timestamp> {
    let conditions = job.status.as_ref()?.conditions.as_deref()?;
    let found = conditions
        .iter()
        .find(|c| c.type_ == type_ && c.status == "True")?;
    Some(
        found
            .last_transition_time
            .as_ref()
            .map_or(Timestamp::MIN, |time| time.0),
    )
}

fn is_running(job: &Job) -> bool {
    condition_time(job, "Complete").is_none() && condition_time(job, "Failed").is_none()
}

/// The latest moment in (after, now]; many missed ones are skipped by doubling steps.
fn latest_missed(
    schedule: &Schedule,
    zone: &TimeZone,
    after: Timestamp,
    now: Timestamp,
) -> Option<Timestamp> {
    let mut from = after;
    let mut latest = None;
    for _ in 0..MISSED_COUNT_MAX {
        match schedule.next(from, zone).filter(|next| *next <= now) {
            Some(next) => {
                latest = Some(next);
                from = next;
            }
            None => return latest,
        }
    }
    // A long absence: look backwards from now, twice as far each time.
    let mut span_s = 60;
    loop {
        let start = now
            .checked_sub(SignedDuration::from_secs(span_s))
            .ok()?
            .max(after);
        if let Some(mut found) = schedule.next(start, zone).filter(|next| *next <= now) {
            while let Some(next) = schedule.next(found, zone).filter(|next| *next <= now) {
                found = next;
            }
            return Some(found);
        }
        if start == after {
            return latest;
        }
        span_s = span_s.saturating_mul(2);
    }
}

/// Decides what one CronJob needs.
fn plan(cron: &CronJob, spec: &CronJobSpec, jobs: &[Arc<Job>], now: Timestamp) -> Plan {
    let mut plan = Plan {
        delete: surplus(spec, jobs),
        ..Plan::default()
    };
    let zone = match spec.time_zone.as_deref() {
        None | Some("") => Ok(TimeZone::UTC),
        Some(zone) => TimeZone::get(zone),
    };
    let (Ok(schedule), Ok(zone)) = (Schedule::parse(&spec.schedule), zone) else {
        return plan;
    };
    if spec.suspend == Some(true) || cron.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let next = schedule.next(now, &zone);
    plan.again = next.map(|next| Duration::try_from(next.duration_since(now)).unwrap_or_default());
    let last = cron
        .status
        .as_ref()
        .and_then(|status| status.last_schedule_time.as_ref());
    let created = cron.metadata.creation_timestamp.as_ref();
    let Some(mut after) = last.or(created).map(|time| time.0) else {
        return plan;
    };
    if let Some(deadline_s) = spec.starting_deadline_seconds {
        let earliest = now.checked_sub(SignedDuration::from_secs(deadline_s));
        after = after.max(earliest.unwrap_or(after));
    }
    let Some(moment) = latest_missed(&schedule, &zone, after, now) else {
        return plan;
    };
    let running: Vec<&Arc<Job>> = jobs.iter().filter(|job| is_running(job)).collect();
    match spec.concurrency_policy.as_deref() {
        Some("Forbid") if !running.is_empty() => {
            plan.skipped = true;
            return plan;
        }
        Some("Replace") => {
            let names = running.iter().map(|job| name(&job.metadata).to_owned());
            plan.delete.extend(names);
        }
        _ => {}
    }
    plan.start = Some(moment);
    plan
}

/// Finished Jobs beyond the history limits, oldest first.
fn surplus(spec: &CronJobSpec, jobs: &[Arc<Job>]) -> Vec<String> {
    let mut names = Vec::new();
    for (type_, limit) in [
        ("Complete", spec.successful_jobs_history_limit.unwrap_or(3)),
        ("Failed", spec.failed_jobs_history_limit.unwrap_or(1)),
    ] {
        let ended = jobs
            .iter()
            .filter(|job| condition_time(job, type_).is_some());
        let mut ended: Vec<&Arc<Job>> = ended.collect();
        ended.sort_by_key(|job| {
            let start = job
                .status
                .as_ref()
                .and_then(|status| status.start_time.clone());
            (start, job.metadata.name.clone())
        });
        let keep = usize::try_from(limit).unwrap_or(0);
        let count = ended.len().saturating_sub(keep);
        names.extend(
            ended
                .iter()
                .take(count)
                .map(|job| name(&job.metadata).to_owned()),
        );
    }
    names
}

/// The Job of one moment.
fn job_of(cron: &CronJob, spec: &CronJobSpec, moment: Timestamp) -> Job {
    let template = spec.job_template.clone();
    let metadata = template.metadata.unwrap_or_default();
    let mut annotations = metadata.annotations.unwrap_or_default();
    let text = moment.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    annotations.insert(SCHEDULED.to_owned(), text);
    let minutes = moment.as_second() / 60;
    Job {
        metadata: ObjectMeta {
            namespace: cron.metadata.namespace.clone(),
            name: Some(format!("{}-{minutes}", name(&cron.metadata))),
            labels: metadata.labels,
            annotations: Some(annotations),
            owner_references: Some(vec![super::controller_reference(cron)]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}

/// What is known of the Jobs; `started` is the moment of the newest.
fn status_of(cron: &CronJob, jobs: &[Arc<Job>], started: Option<Timestamp>) -> CronJobStatus {
    let mut status = cron.status.clone().unwrap_or_default();
    let running = jobs.iter().filter(|job| is_running(job));
    let active: Vec<ObjectReference> = running
        .map(|job| ObjectReference {
            api_version: Some("batch/v1".to_owned()),
            kind: Some("Job".to_owned()),
            namespace: job.metadata.namespace.clone(),
            name: job.metadata.name.clone(),
            uid: job.metadata.uid.clone(),
            ..ObjectReference::default()
        })
        .collect();
    status.active = Some(active).filter(|active| !active.is_empty());
    if let Some(started) = started {
        status.last_schedule_time = Some(Time(started));
    }
    let done = jobs
        .iter()
        .filter_map(|job| condition_time(job, "Complete"))
        .max();
    if let Some(done) = done.filter(|done| *done > Timestamp::MIN) {
        let known = status.last_successful_time.as_ref().map(|time| time.0);
        if known.is_none_or(|known| known < done) {
            status.last_successful_time = Some(Time(done));
        }
    }
    status
}

struct CronJobs {
    context: Arc<Context>,
}

impl CronJobs {
    async fn event(&self, cron: &CronJob, type_: EventType, reason: &str, message: String) {
        let event = event_about(cron, Self::NAME, type_, reason, message);
        self.context.registry.event(event).await;
    }

    async fn delete(&self, cron: &CronJob, namespace: &str, job: &str) -> Result<(), Status> {
        let options = DeleteOptions::default();
        let result = self
            .context
            .registry
            .delete::<Job>(namespace, job, &options)
            .await;
        super::ignore_not_found(result)?;
        let message = format!("Deleted job {job}");
        self.event(cron, EventType::Normal, "SuccessfulDelete", message)
            .await;
        Ok(())
    }
}

impl Controller for CronJobs {
    const NAME: &'static str = "cronjob-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let Some(cron) = self.context.caches.cron_jobs.get(key) else {
            return Ok(None);
        };
        let spec = cron.spec.clone();
        let own = cron.metadata.uid.as_deref().unwrap_or_default();
        let mut jobs = self.context.caches.jobs.owned_by(own);
        jobs.retain(|job| pods::controller_of(&job.metadata).is_some_and(|c| c.uid == own));
        let plan = plan(&cron, &spec, &jobs, Timestamp::now());
        for job in &plan.delete {
            self.delete(&cron, &key.namespace, job).await?;
        }
        jobs.retain(|job| !plan.delete.iter().any(|gone| gone == name(&job.metadata)));
        if plan.skipped {
            let message = "Not starting job because prior execution is running and concurrency \
                           policy is Forbid";
            self.event(
                &cron,
                EventType::Normal,
                "JobAlreadyActive",
                message.to_owned(),
            )
            .await;
        }
        if let Some(moment) = plan.start {
            let job = job_of(&cron, &spec, moment);
            match self.context.registry.create(&job).await {
                Ok(job) => {
                    let message = format!("Created job {}", name(&job.metadata));
                    self.event(&cron, EventType::Normal, "SuccessfulCreate", message)
                        .await;
                    jobs.push(Arc::new(job));
                }
                Err(status) if status.reason == Reason::AlreadyExists => {}
                Err(_) if self.context.is_leaving(&key.namespace) => return Ok(None),
                Err(status) => {
                    let message = format!("Error creating job: {}", status.message);
                    self.event(&cron, EventType::Warning, "FailedCreate", message)
                        .await;
                    return Err(status);
                }
            }
        }
        let status = status_of(&cron, &jobs, plan.start);
        if cron.status.as_ref() != Some(&status) {
            let mut new = CronJob::clone(&cron);
            new.status = Some(status);
            super::ignore_not_found(self.context.registry.update_status(&new).await)?;
        }
        Ok(plan.again)
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let own = queue.clone();
    context
        .caches
        .cron_jobs
        .on_change(move |delta: &Delta<CronJob>| {
            own.add(ObjectKey::of(&delta.object().metadata));
        });
    let owners = queue.clone();
    context.caches.jobs.on_change(move |delta: &Delta<Job>| {
        for job in delta.states() {
            if let Some(key) = super::controller_key::<CronJob, Job>(&**job) {
                owners.add(key);
            }
        }
    });
    let controller = CronJobs {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, WORKER_COUNT, context, tasks, shutdown);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn cron(schedule: &str, policy: &str) -> CronJob {
        serde_json::from_value(json!({
            "metadata": {"name": "c", "creationTimestamp": "2026-01-01T00:00:30Z"},
            "spec": {"schedule": schedule, "concurrencyPolicy": policy,
                "successfulJobsHistoryLimit": 1, "failedJobsHistoryLimit": 0,
                "jobTemplate": {"spec": {"template": {}}}},
        }))
        .unwrap()
    }

    fn job(name: &str, end: Option<&str>) -> Arc<Job> {
        let conditions = end.map(|end| json!([{"type": end, "status": "True"}]));
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": name}, "status": {"conditions": conditions},
            }))
            .unwrap(),
        )
    }

    fn planned(cron: &CronJob, jobs: &[Arc<Job>], now: &str) -> Plan {
        plan(cron, &cron.spec, jobs, now.parse().unwrap())
    }

    #[test]
    fn the_latest_missed_moment_is_started_once() {
        let mut cron = cron("*/10 * * * *", "Allow");
        let early = planned(&cron, &[], "2026-01-01T00:09:00Z");
        assert_eq!(
            (early.start, early.again),
            (None, Some(Duration::from_secs(60)))
        );
        let late = planned(&cron, &[], "2026-01-01T00:35:00Z");
        let moment: Timestamp = "2026-01-01T00:30:00Z".parse().unwrap();
        assert_eq!(late.start, Some(moment));
        cron.status = Some(status_of(&cron, &[], late.start));
        assert_eq!(planned(&cron, &[], "2026-01-01T00:36:00Z").start, None);
        let made = job_of(&cron, &cron.spec, moment);
        assert_eq!(
            made.metadata.name.unwrap(),
            format!("c-{}", moment.as_second() / 60)
        );
        // A year of absence.
        let later = planned(&cron, &[], "2027-01-01T00:05:00Z").start.unwrap();
        assert_eq!(later.to_string(), "2027-01-01T00:00:00Z");
    }

    #[test]
    fn a_running_job_is_joined_kept_alone_or_replaced() {
        let running = [job("r", None)];
        let now = "2026-01-01T00:10:00Z";
        assert!(
            planned(&cron("*/5 * * * *", "Allow"), &running, now)
                .start
                .is_some()
        );
        let forbidden = planned(&cron("*/5 * * * *", "Forbid"), &running, now);
        assert!(forbidden.start.is_none() && forbidden.skipped);
        let replaced = planned(&cron("*/5 * * * *", "Replace"), &running, now);
        assert!(replaced.start.is_some());
        assert_eq!(replaced.delete, ["r"]);
    }

    proptest! {
        /// The history keeps at most what the limits say, and never a running Job goes with it.
        #[test]
        fn history_is_limited(ends in proptest::collection::vec(0_u8..3, 0..12), keep in 0_i32..4) {
            let mut cron = cron("0 0 1 1 *", "Allow");
            cron.spec.successful_jobs_history_limit = Some(keep);
            let jobs: Vec<Arc<Job>> = ends.iter().enumerate().map(|(i, end)| {
                job(&format!("j{i:02}"), [None, Some("Complete"), Some("Failed")][usize::from(*end)])
            }).collect();
            let gone = planned(&cron, &jobs, "2026-01-01T00:10:00Z").delete;
            let left = |type_: &str| jobs.iter().filter(|job| {
                condition_time(job, type_).is_some()
                    && !gone.contains(job.metadata.name.as_ref().unwrap())
            }).count();
            let complete = ends.iter().filter(|end| **end == 1).count();
            prop_assert_eq!(left("Complete"), complete.min(usize::try_from(keep).unwrap()));
            prop_assert_eq!(left("Failed"), 0);
            let running = jobs.iter().filter(|job| is_running(job));
            prop_assert!(running.into_iter().all(|job| !gone.contains(job.metadata.name.as_ref().unwrap())));
        }
    }
}
