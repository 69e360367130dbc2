//! Jobs: pods that run to their end, as often as asked for.
//!
//! ```text
//!  created ─► active pods (parallelism) ─► ended pods counted once ─► SuccessCriteriaMet ─► Complete ┐
//!     ▲ suspend, resume                      │ limits, deadline, policy                              ├─► ttl
//!     └──────────────────────────────────────┴─────────────────────► FailureTarget ─────► Failed ────┘
//! ```
//! A pass has two halves. `settle.rs` notes what has ended and decides the Job's fate; that is written
//! before any pod is let go. `plan.rs` then decides which pods to make and to delete. Both are pure, as is
//! what they read (`observed.rs`, `policy.rs`, `backoff.rs`, `indexes.rs`); this file acts.
//!
//! Counting: a pod carries finalizer [`observed::TRACKING`] until its end is in the status. An ended pod
//! is first written into `uncountedTerminatedPods`, then loses its finalizer, then moves into the
//! counters: a crash between any two steps neither loses nor doubles it. With `backoffLimitPerIndex` the
//! last failed pod of an index keeps its finalizer until its replacement has taken over the number of
//! failures.
//!
//! Invariants: a finished Job starts nothing; a decided fate does not change; counters never fall, but for
//! those of indexes that were scaled away; no index has both failed and succeeded; active and terminating
//! pods together never exceed the parallelism, but for pods of the Job that somebody else made.
//!
//! Source: Kubernetes `pkg/controller/job`, KEP-2307 (tracking without lingering pods), KEP-3329 (pod
//! failure policy), KEP-3850 (back-off limit per index), KEP-3998 (success policy). One difference: an index
//! that pauses takes no other's place, where upstream looks at the lowest free indexes only.

mod backoff;
mod indexes;
mod observed;
mod plan;
mod pod;
mod policy;
mod settle;
mod status;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::batch::v1::{Job, JobStatus};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::k8s_openapi::jiff::{SignedDuration, Timestamp};
use gantry_api::status::Status;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::observed::{Observed, TRACKING, has_tracking, uid};
use self::plan::{Plan, plan, until};
use self::settle::{count_ended, settle};
use self::status::{finish_status, is_finished, recorded_end};
use super::informer::ObjectKey;
use super::{Context, Controller, EventType, WORKER_COUNT, event_about, owned};
use crate::server::registry::{DeleteOptions, Propagation};

struct Jobs {
    context: Arc<Context>,
}

fn without_tracking(pod: &Pod) -> Pod {
    let mut pod = pod.clone();
    if let Some(finalizers) = &mut pod.metadata.finalizers {
        finalizers.retain(|finalizer| finalizer != TRACKING);
    }
    pod
}

impl Jobs {
    async fn write(&self, job: &mut Job, status: JobStatus) -> Result<(), Status> {
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
        let Some(live) = registry.get::<Pod>(&key.namespace, &key.name)? else {
            return Ok(());
        };
        if live.metadata.uid != pod.metadata.uid || !has_tracking(&live) {
            return Ok(());
        }
        super::ignore_not_found(registry.update(&without_tracking(&live)).await)
    }

    /// Lets pods go whose ends are written; returns all pods as they are then.
    async fn release(
        &self,
        mut pods: Vec<Arc<Pod>>,
        release: &BTreeSet<String>,
    ) -> Result<Vec<Arc<Pod>>, Status> {
        for pod in &mut pods {
            if release.contains(uid(pod)) {
                self.untrack(pod).await?;
                *pod = Arc::new(without_tracking(pod));
            }
        }
        Ok(pods)
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
        for pod in pods.iter().filter(|pod| plan.delete.contains(uid(pod))) {
            if plan.forget {
                self.untrack(pod).await?;
            }
            owned::delete(&self.context, job, pod, Self::NAME).await?;
        }
        for new in &plan.create {
            let pod = pod::pod_of(job, &spec, *new);
            owned::create(&self.context, job, &pod, Self::NAME).await?;
        }
        Ok(plan.create.len())
    }

    /// Says in an event how a Job has ended.
    async fn tell_end(&self, job: &Job) {
        let end = job.status.as_ref().and_then(recorded_end);
        let (type_, reason, message) = match &end {
            Some(end) if !end.succeeded => {
                let (reason, message) = end.why();
                (EventType::Warning, reason, message)
            }
            _ => (EventType::Normal, "Completed", "Job completed"),
        };
        let event = event_about(job, Self::NAME, type_, reason, message.to_owned());
        self.context.registry.event(event).await;
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
        if leaving || is_finished(&job) {
            for pod in &pods {
                self.untrack(pod).await?;
            }
            return match leaving {
                true => Ok(None),
                false => self.expire(&job, now).await,
            };
        }
        let observed = Observed {
            job: &job,
            spec: &spec,
            pods: &pods,
            now,
        };
        let settled = settle(&observed);
        self.write(&mut job, settled.status).await?;
        let pods = self.release(pods, &settled.release).await?;
        let mut status = job.status.clone().unwrap_or_default();
        let before = job.clone();
        let observed = Observed {
            job: &before,
            spec: &spec,
            pods: &pods,
            now,
        };
        count_ended(&observed, &mut status);
        // Counted, whatever becomes of the plan.
        self.write(&mut job, status.clone()).await?;
        let plan = plan(&observed, &status);
        let created = match self.carry_out(&job, &pods, &plan).await {
            Err(_) if self.context.is_leaving(&key.namespace) => return Ok(None),
            result => result?,
        };
        finish_status(&observed, &mut status, &plan, created);
        self.write(&mut job, status).await?;
        if is_finished(&job) {
            self.tell_end(&job).await;
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
mod tests;
