//! Jobs: pods that run to their end, as often as asked for.
//!
//! ```text
//!  created ─► active pods (parallelism) ─► ended pods counted exactly once ─► Complete
//!     ▲ suspend / resume                     │ too many failures, deadline ─► Failed ─► ttl ─► gone
//! ```
//! Counting: a pod carries finalizer [`TRACKING`] until its end is in the status. An ended pod is first
//! written into `uncountedTerminatedPods`, then loses its finalizer, then moves into the counters: a
//! crash between any two steps neither loses nor doubles it.
//!
//! Invariants: a finished Job starts nothing; counters never fall; active and terminating pods together
//! never exceed the parallelism, but for pods of the Job that somebody else made.
//!
//! Source: Kubernetes `pkg/controller/job`, KEP-2307 (tracking without lingering pods).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::batch::v1::{
    Job, JobCondition, JobSpec, JobStatus, UncountedTerminatedPods,
};
use gantry_api::k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use gantry_api::k8s_openapi::jiff::{SignedDuration, Timestamp};
use gantry_api::status::Status;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::ObjectKey;
use super::replicaset::count;
use super::{Context, Controller, EventType, WORKER_COUNT, event_about, owned, pods};
use crate::server::registry::{DeleteOptions, Propagation};

/// Keeps an ended pod until it is counted.
pub(super) const TRACKING: &str = "batch.kubernetes.io/job-tracking";
/// Annotation and label of a pod of an Indexed Job.
const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// Pause after the first failure; it doubles with each.
const BACKOFF_MIN_S: i64 = 10;
/// Longest pause.
const BACKOFF_MAX_S: i64 = 600;
/// Pods created in one pass.
const CREATE_COUNT_MAX: usize = 500;

/// What the plan is made from.
struct Observed<'a> {
    job: &'a Job,
    spec: &'a JobSpec,
    pods: &'a [Arc<Pod>],
    now: Timestamp,
}

/// Why a Job ends.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Complete,
    Failed {
        reason: &'static str,
        message: String,
    },
}

/// What to do about one Job.
#[derive(Debug, Default, PartialEq)]
struct Plan {
    /// Indexes of pods to create; `None` for a Job without indexes.
    create: Vec<Option<i32>>,
    /// Uids of pods to delete, which count neither as done nor as failed.
    delete: Vec<String>,
    end: Option<End>,
    /// When time alone changes something.
    again: Option<Duration>,
}

fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

fn has_tracking(pod: &Pod) -> bool {
    let finalizers = pod.metadata.finalizers.as_deref().unwrap_or_default();
    finalizers.iter().any(|f| f == TRACKING)
}

fn index_of(pod: &Pod) -> Option<i32> {
    let annotations = pod.metadata.annotations.as_ref()?;
    annotations.get(INDEX)?.parse().ok()
}

fn is_indexed(spec: &JobSpec) -> bool {
    spec.completion_mode.as_deref() == Some("Indexed")
}

/// How a pod of the Job has ended; `None` while it has not.
fn ended(spec: &JobSpec, pod: &Pod) -> Option<bool> {
    match pods::phase(pod) {
        "Succeeded" => return Some(true),
        "Failed" => return Some(false),
        _ => {}
    }
    // A pod that is being deleted is replaced at once, unless the Job waits for its end.
    let waits = spec.pod_replacement_policy.as_deref() == Some("Failed");
    let unbound = pods::node(pod).is_none();
    (pods::is_terminating(pod) && (!waits || unbound)).then_some(false)
}

/// The condition of this type is True.
fn has_condition(job: &Job, type_: &str) -> bool {
    let conditions = job
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref());
    let mut conditions = conditions.unwrap_or_default().iter();
    conditions.any(|condition| condition.type_ == type_ && condition.status == "True")
}

fn is_finished(job: &Job) -> bool {
    has_condition(job, "Complete") || has_condition(job, "Failed")
}

/// `1,3-5` as a set.
fn parse_indexes(text: &str) -> BTreeSet<i32> {
    let mut indexes = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<i32>(), last.parse::<i32>()) {
            indexes.extend(first..=last);
        }
    }
    indexes
}

/// A set as `1,3-5`.
fn format_indexes(indexes: &BTreeSet<i32>) -> String {
    let mut ranges: Vec<(i32, i32)> = Vec::new();
    for index in indexes {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *index => *last = *index,
            _ => ranges.push((*index, *index)),
        }
    }
    let text = |(first, last): &(i32, i32)| match last - first {
        0 => first.to_string(),
        1 => format!("{first},{last}"),
        _ => format!("{first}-{last}"),
    };
    ranges.iter().map(text).collect::<Vec<_>>().join(",")
}

/// The status with every end that is not counted yet written into `uncountedTerminatedPods`.
fn note_ended(observed: &Observed<'_>) -> JobStatus {
    let mut status = observed.job.status.clone().unwrap_or_default();
    let mut uncounted = status.uncounted_terminated_pods.take().unwrap_or_default();
    let succeeded = uncounted.succeeded.get_or_insert_default();
    let failed = uncounted.failed.get_or_insert_default();
    let mut indexes = parse_indexes(status.completed_indexes.as_deref().unwrap_or_default());
    let limit = observed.spec.completions.unwrap_or(i32::MAX);
    for pod in observed.pods.iter().filter(|pod| has_tracking(pod)) {
        let own = uid(pod).to_owned();
        if succeeded.contains(&own) || failed.contains(&own) {
            continue;
        }
        match ended(observed.spec, pod) {
            Some(true) if is_indexed(observed.spec) => {
                // The second success of an index is no further completion.
                let fresh = index_of(pod).filter(|index| (0..limit).contains(index));
                if fresh.is_some_and(|index| indexes.insert(index)) {
                    succeeded.push(own);
                }
            }
            Some(true) => succeeded.push(own),
            Some(false) => failed.push(own),
            None => {}
        }
    }
    if is_indexed(observed.spec) {
        status.completed_indexes = Some(format_indexes(&indexes)).filter(|t| !t.is_empty());
    }
    status.uncounted_terminated_pods = Some(uncounted);
    status
}

/// Moves ends into the counters whose pods have lost their finalizer or are gone.
fn count_ended(status: &mut JobStatus, tracked: &BTreeSet<&str>) {
    let Some(mut uncounted) = status.uncounted_terminated_pods.take() else {
        return;
    };
    let settle = |uids: &mut Option<Vec<String>>, counter: &mut Option<i32>| {
        let list = uids.get_or_insert_default();
        let before = list.len();
        list.retain(|uid| tracked.contains(uid.as_str()));
        let settled = count(before - list.len());
        *counter = Some(counter.unwrap_or(0).saturating_add(settled));
        if list.is_empty() {
            *uids = None;
        }
    };
    settle(&mut uncounted.succeeded, &mut status.succeeded);
    settle(&mut uncounted.failed, &mut status.failed);
    status.uncounted_terminated_pods = Some(uncounted);
}

/// Ends that the status knows: (succeeded, failed).
fn ends(status: &JobStatus) -> (i32, i32) {
    let uncounted = status.uncounted_terminated_pods.clone().unwrap_or_default();
    let length = |list: Option<Vec<String>>| count(list.unwrap_or_default().len());
    (
        status.succeeded.unwrap_or(0) + length(uncounted.succeeded),
        status.failed.unwrap_or(0) + length(uncounted.failed),
    )
}

/// Restarts of containers in pods that restart in place.
fn restart_count(pods: &[&Arc<Pod>]) -> i32 {
    let statuses = pods.iter().filter_map(|pod| pod.status.as_ref());
    let all = statuses.flat_map(|status| {
        let containers = status.container_statuses.iter().flatten();
        containers.chain(status.init_container_statuses.iter().flatten())
    });
    all.map(|container| container.restart_count).sum()
}

/// Until when no new pod is started: 10 s after the last failure, doubling with each.
fn backoff_until(pods: &[Arc<Pod>], spec: &JobSpec) -> Option<Timestamp> {
    let failed = pods.iter().filter(|pod| ended(spec, pod) == Some(false));
    let times: Vec<Timestamp> = failed.filter_map(|pod| finish_time(pod)).collect();
    let last = times.iter().max()?;
    let doublings = u32::try_from(times.len() - 1).unwrap_or(u32::MAX).min(10);
    let pause_s = (BACKOFF_MIN_S << doublings).min(BACKOFF_MAX_S);
    last.checked_add(SignedDuration::from_secs(pause_s)).ok()
}

fn finish_time(pod: &Pod) -> Option<Timestamp> {
    let statuses = pod.status.as_ref()?.container_statuses.iter().flatten();
    let ends = statuses.filter_map(|s| s.state.as_ref()?.terminated.as_ref()?.finished_at.clone());
    ends.map(|time| time.0).max()
}

/// Decides what one Job needs, given what its status knows of ends.
fn plan(observed: &Observed<'_>, status: &JobStatus) -> Plan {
    let (spec, now) = (observed.spec, observed.now);
    let mut plan = Plan::default();
    let active: Vec<&Arc<Pod>> = observed
        .pods
        .iter()
        .filter(|pod| ended(spec, pod).is_none() && !pods::is_terminating(pod))
        .collect();
    let everything = || {
        active
            .iter()
            .map(|pod| uid(pod).to_owned())
            .collect::<Vec<_>>()
    };
    let (succeeded, failed) = ends(status);
    let done = match spec.completions {
        Some(wanted) => succeeded >= wanted,
        None => succeeded > 0 && active.is_empty(),
    };
    plan.end = if done {
        Some(End::Complete)
    } else {
        failure(observed, status, &active, failed)
    };
    if plan.end.is_some() || observed.job.metadata.deletion_timestamp.is_some() {
        plan.delete = everything();
        return plan;
    }
    if spec.suspend == Some(true) {
        plan.delete = everything();
        return plan;
    }
    let deadline = spec.active_deadline_seconds.and_then(|seconds| {
        let start = status.start_time.as_ref()?.0;
        start.checked_add(SignedDuration::from_secs(seconds)).ok()
    });
    plan.again = deadline.map(|deadline| until(deadline, now));
    // Pods that wait for their end hold their place.
    let leaving = observed
        .pods
        .iter()
        .filter(|pod| pods::is_terminating(pod) && ended(spec, pod).is_none());
    let held = active.len() + leaving.count();
    let parallelism = usize::try_from(spec.parallelism.unwrap_or(1)).unwrap_or(0);
    let wanted = match spec.completions {
        Some(total) => parallelism.min(usize::try_from(total - succeeded).unwrap_or(0)),
        None if succeeded > 0 => active.len(),
        None => parallelism,
    };
    if active.len() > wanted {
        // The youngest have done the least.
        let mut by_age = active.clone();
        by_age.sort_by_key(|pod| {
            (
                pods::is_ready(pod),
                std::cmp::Reverse(pod.metadata.creation_timestamp.clone()),
            )
        });
        let surplus = active.len() - wanted;
        plan.delete = by_age
            .iter()
            .take(surplus)
            .map(|pod| uid(pod).to_owned())
            .collect();
        return plan;
    }
    let missing = wanted.saturating_sub(held).min(CREATE_COUNT_MAX);
    if missing == 0 {
        return plan;
    }
    if let Some(until_then) = backoff_until(observed.pods, spec).filter(|then| *then > now) {
        let wait = until(until_then, now);
        plan.again = Some(plan.again.map_or(wait, |again| again.min(wait)));
        return plan;
    }
    plan.create = if is_indexed(spec) {
        let mut taken = parse_indexes(status.completed_indexes.as_deref().unwrap_or_default());
        let running = observed
            .pods
            .iter()
            .filter(|pod| ended(spec, pod).is_none());
        taken.extend(running.filter_map(|pod| index_of(pod)));
        let all = 0..spec.completions.unwrap_or(0);
        let free = all.filter(|index| !taken.contains(index));
        free.take(missing).map(Some).collect()
    } else {
        vec![None; missing]
    };
    plan
}

fn until(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(then.duration_since(now)).unwrap_or_default()
}

/// Why the Job has failed, if it has.
fn failure(
    observed: &Observed<'_>,
    status: &JobStatus,
    active: &[&Arc<Pod>],
    failed: i32,
) -> Option<End> {
    let spec = observed.spec;
    let limit = spec.backoff_limit.unwrap_or(6);
    let template = spec.template.spec.as_ref();
    let in_place = template.and_then(|t| t.restart_policy.as_deref()) == Some("OnFailure");
    let restarts = restart_count(active);
    let restarted_too_often = in_place && restarts > 0 && restarts >= limit;
    if failed > limit || restarted_too_often {
        return Some(End::Failed {
            reason: "BackoffLimitExceeded",
            message: "Job has reached the specified backoff limit".to_owned(),
        });
    }
    let deadline_s = spec.active_deadline_seconds?;
    let start = status.start_time.as_ref()?.0;
    let passed = observed.now.duration_since(start) >= SignedDuration::from_secs(deadline_s);
    (passed && spec.suspend != Some(true)).then(|| End::Failed {
        reason: "DeadlineExceeded",
        message: "Job was active longer than specified deadline".to_owned(),
    })
}

/// Sets a condition; unchanged when it says the same already.
fn set_condition(status: &mut JobStatus, type_: &str, on: bool, why: (&str, &str), now: Timestamp) {
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
fn finish_status(observed: &Observed<'_>, status: &mut JobStatus, plan: &Plan, created: usize) {
    let now = observed.now;
    let going = |pod: &&Arc<Pod>| plan.delete.iter().any(|victim| victim == uid(pod));
    let alive: Vec<_> = observed
        .pods
        .iter()
        .filter(|pod| pods::is_active(pod) && !going(pod))
        .collect();
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
    let suspended = observed.spec.suspend == Some(true);
    let was_suspended = has_condition(observed.job, "Suspended");
    match &plan.end {
        Some(End::Complete) => {
            let why = (
                "CompletionsReached",
                "Reached expected number of succeeded pods",
            );
            set_condition(status, "SuccessCriteriaMet", true, why, now);
            if terminating == 0 && alive.is_empty() {
                status.completion_time.get_or_insert(Time(now));
                set_condition(status, "Complete", true, why, now);
            }
        }
        Some(End::Failed { reason, message }) => {
            set_condition(status, "FailureTarget", true, (reason, message), now);
            if terminating == 0 && alive.is_empty() {
                set_condition(status, "Failed", true, (reason, message), now);
            }
        }
        None if suspended => {
            set_condition(
                status,
                "Suspended",
                true,
                ("JobSuspended", "Job suspended"),
                now,
            );
            status.start_time = None;
        }
        None if was_suspended => {
            set_condition(
                status,
                "Suspended",
                false,
                ("JobResumed", "Job resumed"),
                now,
            );
            status.start_time = Some(Time(now));
        }
        None => {}
    }
}

/// A pod of the Job, of this index.
fn pod_of(job: &Job, spec: &JobSpec, index: Option<i32>) -> Pod {
    let mut pod = owned::pod_of(job, &spec.template);
    pod.metadata
        .finalizers
        .get_or_insert_default()
        .push(TRACKING.to_owned());
    let Some(index) = index else { return pod };
    let name = job.metadata.name.as_deref().unwrap_or_default();
    pod.metadata.generate_name = Some(format!("{name}-{index}-"));
    let text = index.to_string();
    for map in [&mut pod.metadata.annotations, &mut pod.metadata.labels] {
        map.get_or_insert_default()
            .insert(INDEX.to_owned(), text.clone());
    }
    if let Some(spec) = &mut pod.spec {
        spec.hostname
            .get_or_insert_with(|| format!("{name}-{index}"));
        let variable = EnvVar {
            name: "JOB_COMPLETION_INDEX".to_owned(),
            value_from: Some(EnvVarSource {
                field_ref: Some(ObjectFieldSelector {
                    field_path: format!("metadata.annotations['{INDEX}']"),
                    ..ObjectFieldSelector::default()
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        };
        let init = spec.init_containers.iter_mut().flatten();
        for container in spec.containers.iter_mut().chain(init) {
            let variables = container.env.get_or_insert_default();
            if variables.iter().all(|known| known.name != variable.name) {
                variables.push(variable.clone());
            }
        }
    }
    pod
}

struct Jobs {
    context: Arc<Context>,
}

impl Jobs {
    async fn write(&self, job: &mut Job, mut status: JobStatus) -> Result<(), Status> {
        let empty = UncountedTerminatedPods::default();
        if status.uncounted_terminated_pods.as_ref().is_some_and(|u| {
            let none = |list: &Option<Vec<String>>| list.as_ref().is_none_or(Vec::is_empty);
            none(&u.succeeded) && none(&u.failed)
        }) {
            status.uncounted_terminated_pods = Some(empty);
        }
        if job.status.as_ref() == Some(&status) {
            return Ok(());
        }
        job.status = Some(status);
        *job = self.context.registry.update_status(job).await?;
        Ok(())
    }

    async fn untrack(&self, pod: &Pod) -> Result<(), Status> {
        if !has_tracking(pod) {
            return Ok(());
        }
        let key = ObjectKey::of(&pod.metadata);
        let registry = &self.context.registry;
        let Some(mut live) = registry.get::<Pod>(&key.namespace, &key.name)? else {
            return Ok(());
        };
        if live.metadata.uid != pod.metadata.uid || !has_tracking(&live) {
            return Ok(());
        }
        if let Some(finalizers) = &mut live.metadata.finalizers {
            finalizers.retain(|finalizer| finalizer != TRACKING);
        }
        super::ignore_not_found(registry.update(&live).await)
    }

    /// Counts what has ended; the status afterwards is in `job`.
    async fn track(&self, job: &mut Job, pods: &[Arc<Pod>], now: Timestamp) -> Result<(), Status> {
        let spec = job.spec.clone().unwrap_or_default();
        let observed = Observed {
            job,
            spec: &spec,
            pods,
            now,
        };
        let mut status = note_ended(&observed);
        let uncounted = status.uncounted_terminated_pods.clone().unwrap_or_default();
        let listed: Vec<String> = [uncounted.succeeded, uncounted.failed]
            .into_iter()
            .flatten()
            .flatten()
            .collect();
        let gone = pods
            .iter()
            .filter(|pod| has_tracking(pod) && ended(&spec, pod).is_some());
        let release: Vec<Arc<Pod>> = gone.cloned().collect();
        if listed.is_empty() && release.is_empty() {
            return Ok(());
        }
        self.write(job, status.clone()).await?;
        for pod in &release {
            self.untrack(pod).await?;
        }
        status = job.status.clone().unwrap_or_default();
        let released: BTreeSet<&str> = release.iter().map(|pod| uid(pod)).collect();
        let tracked = pods
            .iter()
            .filter(|pod| has_tracking(pod))
            .map(|pod| uid(pod));
        let tracked = tracked.filter(|uid| !released.contains(uid)).collect();
        count_ended(&mut status, &tracked);
        self.write(job, status).await
    }

    /// A finished Job goes when its time is over.
    async fn expire(&self, job: &Job, now: Timestamp) -> Result<Option<Duration>, Status> {
        let ttl_s = job
            .spec
            .as_ref()
            .and_then(|spec| spec.ttl_seconds_after_finished);
        let Some(ttl_s) = ttl_s else { return Ok(None) };
        let conditions = job
            .status
            .as_ref()
            .and_then(|status| status.conditions.as_deref());
        let finished = conditions.unwrap_or_default().iter();
        let finished = finished.filter(|c| matches!(&*c.type_, "Complete" | "Failed"));
        let since = finished
            .filter_map(|c| c.last_transition_time.as_ref())
            .map(|t| t.0)
            .max();
        let ttl = SignedDuration::from_secs(i64::from(ttl_s));
        let end = since
            .and_then(|since| since.checked_add(ttl).ok())
            .unwrap_or(now);
        if end > now {
            return Ok(Some(until(end, now)));
        }
        let key = ObjectKey::of(&job.metadata);
        let options = DeleteOptions {
            uid: job.metadata.uid.clone(),
            propagation: Propagation::Foreground,
            ..DeleteOptions::default()
        };
        let result = self
            .context
            .registry
            .delete::<Job>(&key.namespace, &key.name, &options);
        super::ignore_not_found(result.await)?;
        Ok(None)
    }

    async fn carry_out(&self, job: &Job, pods: &[Arc<Pod>], plan: &Plan) -> Result<usize, Status> {
        let spec = job.spec.clone().unwrap_or_default();
        for pod in pods
            .iter()
            .filter(|pod| plan.delete.iter().any(|v| v == uid(pod)))
        {
            // Without the finalizer first: this end counts neither way.
            self.untrack(pod).await?;
            owned::delete(&self.context, job, pod, Self::NAME).await?;
        }
        let mut created = 0;
        for index in &plan.create {
            let pod = pod_of(job, &spec, *index);
            owned::create(&self.context, job, &pod, Self::NAME).await?;
            created += 1;
        }
        Ok(created)
    }
}

impl Controller for Jobs {
    const NAME: &'static str = "job-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let Some(job) = self.context.caches.jobs.get(key) else {
            return Ok(None);
        };
        let (mut job, now) = (Job::clone(&job), Timestamp::now());
        let spec = job.spec.clone().unwrap_or_default();
        let selector = spec.selector.clone().unwrap_or_default();
        let pods = owned::claim(&self.context, &job, &selector).await?;
        let leaving = job.metadata.deletion_timestamp.is_some();
        if is_finished(&job) || leaving {
            for pod in pods.iter().filter(|p| leaving || ended(&spec, p).is_some()) {
                self.untrack(pod).await?;
            }
            return if leaving {
                Ok(None)
            } else {
                self.expire(&job, now).await
            };
        }
        if job
            .status
            .as_ref()
            .is_none_or(|status| status.start_time.is_none())
            && spec.suspend != Some(true)
        {
            let mut status = job.status.clone().unwrap_or_default();
            status.start_time = Some(Time(now));
            self.write(&mut job, status).await?;
        }
        self.track(&mut job, &pods, now).await?;
        let mut status = job.status.clone().unwrap_or_default();
        let observed = Observed {
            job: &job,
            spec: &spec,
            pods: &pods,
            now,
        };
        let plan = plan(&observed, &status);
        let created = match self.carry_out(&job, &pods, &plan).await {
            Err(_) if self.context.is_leaving(&key.namespace) => return Ok(None),
            result => result?,
        };
        finish_status(&observed, &mut status, &plan, created);
        self.write(&mut job, status).await?;
        if is_finished(&job) {
            let (type_, reason, message) = match &plan.end {
                Some(End::Failed { reason, message }) => {
                    (EventType::Warning, *reason, message.clone())
                }
                _ => (EventType::Normal, "Completed", "Job completed".to_owned()),
            };
            let event = event_about(&job, Self::NAME, type_, reason, message);
            self.context.registry.event(event).await;
            return self.expire(&job, now).await;
        }
        Ok(plan.again)
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue = owned::queue(&context.caches.jobs, &context.caches.pods);
    let controller = Jobs {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, WORKER_COUNT, context, tasks, shutdown);
}

#[cfg(test)]
#[path = "job_tests.rs"]
mod tests;
