//! Deployments: rollouts from one pod template to the next.
//!
//! ```text
//!  Deployment ──owns──► ReplicaSet of the current template  ──owns──► pods
//!             └────────► ReplicaSets of older templates (kept for rollback, size 0)
//! ```
//! * `plan.rs` decides sizes: rolling update, recreate, pause, proportional scaling, history;
//! * `status.rs` decides the counts and conditions;
//! * `annotations.rs` knows what is written on ReplicaSets: revision, sizes, template hash;
//! * this file claims ReplicaSets, carries the plan out and writes events in Kubernetes' wording.

mod annotations;
mod plan;
mod status;

use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::status::{Reason, Status};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub(super) use self::annotations::template_hash;
use self::plan::{Observed, Plan};
use super::informer::{Delta, ObjectKey};
use super::queue::WorkQueue;
use super::replicaset::count;
use super::{Context, Controller, EventType, WORKER_COUNT, pods, selects};
use crate::server::registry::DeleteOptions;

struct Deployments {
    context: Arc<Context>,
}

impl Deployments {
    /// The ReplicaSets of this Deployment: adopts matching orphans, releases what no longer matches.
    async fn claim(&self, deployment: &Deployment) -> Result<Vec<Arc<ReplicaSet>>, Status> {
        let key = ObjectKey::of(&deployment.metadata);
        let uid = deployment.metadata.uid.as_deref().unwrap_or_default();
        let Some(spec) = &deployment.spec else {
            return Ok(Vec::new());
        };
        let matches = |set: &ReplicaSet| selects(&spec.selector, set.metadata.labels.as_ref());
        let sets = &self.context.caches.replica_sets;
        let registry = &self.context.registry;
        let leaving = deployment.metadata.deletion_timestamp.is_some();
        let mut claimed = Vec::new();
        for set in sets.owned_by(uid) {
            let ours = pods::controller_of(&set.metadata).is_some_and(|owner| owner.uid == uid);
            if ours && (matches(&set) || leaving) {
                claimed.push(set);
            } else if ours {
                let mut released = ReplicaSet::clone(&set);
                if let Some(owners) = &mut released.metadata.owner_references {
                    owners.retain(|owner| owner.uid != uid);
                }
                super::ignore_not_found(registry.update(&released).await)?;
            }
        }
        let mut checked = leaving;
        for set in sets.without_controller(&key.namespace) {
            if leaving || set.metadata.deletion_timestamp.is_some() || !matches(&set) {
                continue;
            }
            if !checked {
                // An outdated cache must not adopt for a Deployment that is gone.
                let live: Option<Deployment> = registry.get(&key.namespace, &key.name)?;
                let same = live.is_some_and(|live| {
                    live.metadata.uid == deployment.metadata.uid
                        && live.metadata.deletion_timestamp.is_none()
                });
                if !same {
                    let message = format!("deployment {key} was replaced");
                    return Err(Status::new(Reason::Conflict, message));
                }
                checked = true;
            }
            let mut adopted = ReplicaSet::clone(&set);
            let owners = adopted.metadata.owner_references.get_or_insert_default();
            owners.push(super::controller_reference(deployment));
            claimed.push(Arc::new(registry.update(&adopted).await?));
        }
        Ok(claimed)
    }

    fn observe(&self, set: Arc<ReplicaSet>, min_ready_s: i32, now: Timestamp) -> Observed {
        let uid = set.metadata.uid.as_deref().unwrap_or_default();
        let mut owned = self.context.caches.pods.owned_by(uid);
        owned.retain(|pod| pods::controller_of(&pod.metadata).is_some_and(|c| c.uid == uid));
        let running = owned.iter().any(|pod| !pods::is_finished(pod));
        owned.retain(|pod| pods::is_active(pod));
        let is_available = |pod: &&Arc<Pod>| {
            pods::until_available(pod, min_ready_s, now).is_some_and(|wait| wait.is_zero())
        };
        Observed {
            active: count(owned.len()),
            available: count(owned.iter().filter(is_available).count()),
            running,
            object: set,
        }
    }

    async fn act(&self, deployment: &Deployment, plan: Plan) -> Result<(), Status> {
        let registry = &self.context.registry;
        let mut new_status = plan.status;
        if let Some(set) = &plan.create
            && let Err(failure) = self.create(deployment, set, &mut new_status).await
        {
            // The status tells the user why; the failure itself brings the key back.
            self.write_status(deployment, new_status).await?;
            return Err(failure);
        }
        for (set, event) in &plan.update {
            registry.update(set).await?;
            if let Some(message) = event {
                self.scaled(deployment, message.clone()).await;
            }
        }
        for set in &plan.delete {
            let key = ObjectKey::of(&set.metadata);
            let options = DeleteOptions {
                uid: set.metadata.uid.clone(),
                ..DeleteOptions::default()
            };
            let result = registry
                .delete::<ReplicaSet>(&key.namespace, &key.name, &options)
                .await;
            super::ignore_not_found(result)?;
        }
        let deployment = self.write_revision(deployment, plan.revision).await?;
        self.write_status(&deployment, new_status).await
    }

    /// Creates the ReplicaSet of a new template. A name taken by another template counts as a
    /// collision, which changes the next hash.
    async fn create(
        &self,
        deployment: &Deployment,
        set: &ReplicaSet,
        new_status: &mut DeploymentStatus,
    ) -> Result<(), Status> {
        let failure = match self.context.registry.create(set).await {
            Ok(_) => {
                if let Some(message) = plan::scaling_text(set, 0) {
                    self.scaled(deployment, message).await;
                }
                return Ok(());
            }
            Err(failure) => failure,
        };
        if failure.reason == Reason::AlreadyExists {
            // The caches show our own writes, so it is not ours: another object has the name.
            let collisions = new_status.collision_count.unwrap_or(0);
            new_status.collision_count = Some(collisions.saturating_add(1));
            return Err(failure);
        }
        let namespace = deployment.metadata.namespace.as_deref().unwrap_or_default();
        if self.context.is_leaving(namespace) {
            return Ok(());
        }
        let name = set.metadata.name.as_deref().unwrap_or_default();
        let message = format!(
            "Failed to create new replica set {name:?}: {}",
            failure.message
        );
        let reason = "ReplicaSetCreateError";
        if status::deadline(deployment).is_some() {
            let now = Timestamp::now();
            let new = status::condition("Progressing", "False", reason, message.clone(), now);
            status::set(new_status.conditions.get_or_insert_default(), new);
        }
        let event = super::event_about(deployment, Self::NAME, EventType::Warning, reason, message);
        self.context.registry.event(event).await;
        Err(failure)
    }

    async fn scaled(&self, deployment: &Deployment, message: String) {
        let (type_, reason) = (EventType::Normal, "ScalingReplicaSet");
        let event = super::event_about(deployment, Self::NAME, type_, reason, message);
        self.context.registry.event(event).await;
    }

    async fn write_revision(
        &self,
        deployment: &Deployment,
        revision: Option<i64>,
    ) -> Result<Deployment, Status> {
        let mut deployment = deployment.clone();
        let Some(revision) = revision.map(|revision| revision.to_string()) else {
            return Ok(deployment);
        };
        let annotations = deployment.metadata.annotations.get_or_insert_default();
        if annotations.get(annotations::REVISION) == Some(&revision) {
            return Ok(deployment);
        }
        annotations.insert(annotations::REVISION.to_owned(), revision);
        self.context.registry.update(&deployment).await
    }

    async fn write_status(
        &self,
        deployment: &Deployment,
        new: DeploymentStatus,
    ) -> Result<(), Status> {
        if deployment.status.as_ref() == Some(&new) {
            return Ok(());
        }
        let mut deployment = deployment.clone();
        deployment.status = Some(new);
        super::ignore_not_found(self.context.registry.update_status(&deployment).await)
    }
}

impl Controller for Deployments {
    const NAME: &'static str = "deployment-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let Some(deployment) = self.context.caches.deployments.get(key) else {
            return Ok(None);
        };
        let now = Timestamp::now();
        let spec = deployment.spec.as_ref();
        let min_ready_s = spec.and_then(|spec| spec.min_ready_seconds).unwrap_or(0);
        let sets = self.claim(&deployment).await?;
        let observed: Vec<Observed> = sets
            .into_iter()
            .map(|set| self.observe(set, min_ready_s, now))
            .collect();
        let Some(plan) = plan::plan(&deployment, &observed, now) else {
            return Ok(None);
        };
        let again = plan.again;
        self.act(&deployment, plan).await?;
        Ok(again)
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let caches = &context.caches;
    let own = queue.clone();
    caches
        .deployments
        .on_change(move |delta| own.add(ObjectKey::of(&delta.object().metadata)));
    let (owners, weak) = (queue.clone(), Arc::downgrade(context));
    caches
        .replica_sets
        .on_change(move |delta: &Delta<ReplicaSet>| {
            for set in delta.states() {
                if let Some(key) = super::controller_key::<Deployment, ReplicaSet>(&**set) {
                    owners.add(key);
                }
            }
            let set = delta.object();
            if pods::controller_of(&set.metadata).is_some() {
                return;
            }
            let Some(context) = weak.upgrade() else {
                return;
            };
            let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
            for deployment in context.caches.deployments.in_namespace(namespace) {
                let selector = deployment.spec.as_ref().map(|spec| &spec.selector);
                if selector.is_some_and(|s| selects(s, set.metadata.labels.as_ref())) {
                    owners.add(ObjectKey::of(&deployment.metadata));
                }
            }
        });
    // Recreate waits for the last old pod to be gone; every other change of a pod arrives as a
    // change of its ReplicaSet's status.
    let (owners, weak) = (queue.clone(), Arc::downgrade(context));
    caches.pods.on_change(move |delta: &Delta<Pod>| {
        let Delta::Deleted(pod) = delta else { return };
        let Some(context) = weak.upgrade() else {
            return;
        };
        let Some(set_key) = super::controller_key::<ReplicaSet, Pod>(&**pod) else {
            return;
        };
        let Some(set) = context.caches.replica_sets.get(&set_key) else {
            return;
        };
        if let Some(key) = super::controller_key::<Deployment, ReplicaSet>(&*set) {
            owners.add(key);
        }
    });
    let controller = Deployments {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, WORKER_COUNT, context, tasks, shutdown);
}

#[cfg(test)]
mod tests;
