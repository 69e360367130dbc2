//! ReplicaSets and ReplicationControllers: as many pods as asked for.
//!
//! ```text
//!  pods of the namespace ─► claim: adopt matching orphans, release what no longer matches
//!                              │ too few                     │ too many
//!                              ▼                             ▼
//!             create in batches of 1, 2, 4, …       delete the least useful first
//! ```
//! Invariants: an adopted or created pod has exactly one controller; a pod that is being deleted or
//! has finished is not counted; status is written after the pods, so `observedGeneration` says that
//! the spec of that generation has been acted upon (the Deployment controller relies on it).
//!
//! Source: Kubernetes `pkg/controller/replicaset`, `controller_utils.go` (ActivePodsWithRanks).

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use gantry_api::k8s_openapi::api::apps::v1::{
    ReplicaSet, ReplicaSetCondition, ReplicaSetSpec, ReplicaSetStatus,
};
use gantry_api::k8s_openapi::api::core::v1::{
    Pod, ReplicationController, ReplicationControllerCondition, ReplicationControllerStatus,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, Time};
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::status::{Reason, Status};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{Cache, Delta, ObjectKey};
use super::{Caches, Context, Controller, EventType, WORKER_COUNT, owned, pods, selects};
use crate::server::registry::{DeleteOptions, Resource};

/// Most pods created or deleted in one pass over one ReplicaSet, as in Kubernetes.
const BURST_COUNT_MAX: usize = 500;
/// Annotation by which a user says which pods to keep: lower goes first.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// A kind that is a ReplicaSet in all but the name: it is decided about as one.
pub(super) trait Replicated: Resource {
    /// The controller's name.
    const CONTROLLER: &'static str;
    fn cache(caches: &Caches) -> &Arc<Cache<Self>>;
    fn to_set(&self) -> ReplicaSet;
    /// The metadata and the status of a set.
    fn from_set(set: &ReplicaSet) -> Self;
}

impl Replicated for ReplicaSet {
    const CONTROLLER: &'static str = "replicaset-controller";

    fn cache(caches: &Caches) -> &Arc<Cache<Self>> {
        &caches.replica_sets
    }

    fn to_set(&self) -> ReplicaSet {
        self.clone()
    }

    fn from_set(set: &ReplicaSet) -> Self {
        set.clone()
    }
}

impl Replicated for ReplicationController {
    const CONTROLLER: &'static str = "replication-controller";

    fn cache(caches: &Caches) -> &Arc<Cache<Self>> {
        &caches.replication_controllers
    }

    fn to_set(&self) -> ReplicaSet {
        let spec = self.spec.clone().unwrap_or_default();
        let status = self.status.clone().unwrap_or_default();
        let condition = |old: ReplicationControllerCondition| ReplicaSetCondition {
            type_: old.type_,
            status: old.status,
            reason: old.reason,
            message: old.message,
            last_transition_time: old.last_transition_time,
        };
        let conditions = status.conditions;
        ReplicaSet {
            metadata: self.metadata.clone(),
            spec: Some(ReplicaSetSpec {
                min_ready_seconds: spec.min_ready_seconds,
                replicas: spec.replicas,
                selector: LabelSelector {
                    match_labels: spec.selector,
                    match_expressions: None,
                },
                template: spec.template,
            }),
            status: Some(ReplicaSetStatus {
                replicas: status.replicas,
                fully_labeled_replicas: status.fully_labeled_replicas,
                ready_replicas: status.ready_replicas,
                available_replicas: status.available_replicas,
                terminating_replicas: None,
                observed_generation: status.observed_generation,
                conditions: conditions.map(|all| all.into_iter().map(condition).collect()),
            }),
        }
    }

    fn from_set(set: &ReplicaSet) -> Self {
        let status = set.status.clone().unwrap_or_default();
        let condition = |new: ReplicaSetCondition| ReplicationControllerCondition {
            type_: new.type_,
            status: new.status,
            reason: new.reason,
            message: new.message,
            last_transition_time: new.last_transition_time,
        };
        let conditions = status.conditions;
        ReplicationController {
            metadata: set.metadata.clone(),
            spec: None,
            status: Some(ReplicationControllerStatus {
                replicas: status.replicas,
                fully_labeled_replicas: status.fully_labeled_replicas,
                ready_replicas: status.ready_replicas,
                available_replicas: status.available_replicas,
                observed_generation: status.observed_generation,
                conditions: conditions.map(|all| all.into_iter().map(condition).collect()),
            }),
        }
    }
}

/// What to do about one ReplicaSet.
#[derive(Debug, Default)]
struct Plan {
    /// Orphans that match the selector.
    adopt: Vec<Arc<Pod>>,
    /// Pods of ours that no longer match.
    release: Vec<Arc<Pod>>,
    /// Active pods that are ours and stay so (adopted ones included, victims excluded).
    keep: Vec<Arc<Pod>>,
    /// How many to create.
    create_count: usize,
    /// Which to delete.
    delete: Vec<Arc<Pod>>,
}

/// What the plan is made from.
struct Observed<'a> {
    set: &'a ReplicaSet,
    /// Pods whose controller is this set.
    owned: &'a [Arc<Pod>],
    /// Pods of the namespace without a controller.
    orphans: &'a [Arc<Pod>],
    /// Active pods per node of this set and its siblings under the same controller.
    crowd: &'a HashMap<String, usize>,
    now: Timestamp,
}

/// Decides what one ReplicaSet needs.
fn plan(observed: &Observed<'_>) -> Plan {
    let set = observed.set;
    let mut plan = Plan::default();
    let Some(spec) = &set.spec else { return plan };
    let matches = |pod: &Pod| selects(&spec.selector, pod.metadata.labels.as_ref());
    let leaving = set.metadata.deletion_timestamp.is_some();
    for pod in observed.owned.iter().filter(|pod| pods::is_active(pod)) {
        if matches(pod) {
            plan.keep.push(Arc::clone(pod));
        } else if !leaving {
            plan.release.push(Arc::clone(pod));
        }
    }
    if leaving {
        return plan;
    }
    for pod in observed
        .orphans
        .iter()
        .filter(|pod| pods::is_active(pod) && matches(pod))
    {
        plan.adopt.push(Arc::clone(pod));
        plan.keep.push(Arc::clone(pod));
    }
    let wanted = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
    let have = plan.keep.len();
    if have < wanted {
        plan.create_count = (wanted - have).min(BURST_COUNT_MAX);
    } else if have > wanted {
        let victim_count = (have - wanted).min(BURST_COUNT_MAX);
        plan.keep
            .sort_by_cached_key(|pod| usefulness(pod, observed));
        plan.delete = plan.keep.drain(..victim_count).collect();
    }
    plan
}

/// Sorts the least useful pod first. The parts, in order: assigned to a node, phase, ready, deletion
/// cost, alone on its node, ready for long, few restarts, old; times by powers of two, so that the
/// choice among pods of about one age is as good as random (by uid).
fn usefulness(pod: &Pod, observed: &Observed<'_>) -> impl Ord + use<> {
    let phase = match pods::phase(pod) {
        "Pending" | "" => 0,
        "Running" => 2,
        _ => 1,
    };
    let crowd = pods::node(pod)
        .and_then(|node| observed.crowd.get(node))
        .copied();
    let age = |time: Option<&Time>| time.map_or(0, |time| log2_seconds(time.0, observed.now));
    let ready = pods::is_ready(pod);
    let ready_since = pods::condition(pod, "Ready").filter(|_| ready);
    (
        pods::node(pod).is_some(),
        phase,
        ready,
        deletion_cost(&pod.metadata),
        Reverse(crowd.unwrap_or(0)),
        age(ready_since.and_then(|condition| condition.last_transition_time.as_ref())),
        Reverse(restart_count(pod)),
        age(pod.metadata.creation_timestamp.as_ref()),
        pod.metadata.uid.clone(),
    )
}

fn deletion_cost(metadata: &ObjectMeta) -> i32 {
    let annotations = metadata.annotations.as_ref();
    let cost = annotations.and_then(|annotations| annotations.get(DELETION_COST));
    cost.and_then(|cost| cost.parse().ok()).unwrap_or(0)
}

fn restart_count(pod: &Pod) -> i32 {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    statuses
        .into_iter()
        .flatten()
        .map(|status| status.restart_count)
        .max()
        .unwrap_or(0)
}

/// 0 for the future, else 1 + log2 of the seconds since.
fn log2_seconds(since: Timestamp, now: Timestamp) -> u32 {
    let seconds = u64::try_from(now.duration_since(since).as_secs()).unwrap_or(0);
    seconds.checked_ilog2().map_or(0, |log| log + 1)
}

/// The status that belongs to these pods, and when it changes by time alone.
fn status_of(
    set: &ReplicaSet,
    kept: &[Arc<Pod>],
    terminating: usize,
    failure: Option<(&str, &Status)>,
    now: Timestamp,
) -> (ReplicaSetStatus, Option<Duration>) {
    let empty = ReplicaSetSpec::default();
    let spec = set.spec.as_ref().unwrap_or(&empty);
    let template_labels = spec.template.as_ref().and_then(|t| t.metadata.as_ref());
    let template_labels = template_labels.and_then(|metadata| metadata.labels.as_ref());
    let min_ready_s = spec.min_ready_seconds.unwrap_or(0);
    let waits: Vec<Duration> = kept
        .iter()
        .filter_map(|pod| pods::until_available(pod, min_ready_s, now))
        .collect();
    let labeled = kept
        .iter()
        .filter(|pod| has_labels(&pod.metadata, template_labels));
    let old = set.status.clone().unwrap_or_default();
    let status = ReplicaSetStatus {
        replicas: count(kept.len()),
        fully_labeled_replicas: Some(count(labeled.count())),
        ready_replicas: Some(count(kept.iter().filter(|pod| pods::is_ready(pod)).count())),
        available_replicas: Some(count(waits.iter().filter(|wait| wait.is_zero()).count())),
        terminating_replicas: Some(count(terminating)),
        observed_generation: set.metadata.generation,
        conditions: failure_condition(old.conditions, failure, now),
    };
    let again = waits.into_iter().filter(|wait| !wait.is_zero()).min();
    (status, again)
}

/// A count as the API has it.
pub(super) fn count(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

fn has_labels(metadata: &ObjectMeta, wanted: Option<&BTreeMap<String, String>>) -> bool {
    let labels = metadata.labels.as_ref();
    let has = |(key, value): (&String, &String)| labels.and_then(|l| l.get(key)) == Some(value);
    wanted.is_none_or(|wanted| wanted.iter().all(has))
}

/// Sets or removes ReplicaFailure; unchanged when it says the same already.
fn failure_condition(
    conditions: Option<Vec<ReplicaSetCondition>>,
    failure: Option<(&str, &Status)>,
    now: Timestamp,
) -> Option<Vec<ReplicaSetCondition>> {
    let mut conditions = conditions.unwrap_or_default();
    match failure {
        None => conditions.retain(|condition| condition.type_ != "ReplicaFailure"),
        Some((reason, status)) => {
            let same = |c: &ReplicaSetCondition| {
                c.type_ == "ReplicaFailure" && c.reason.as_deref() == Some(reason)
            };
            if !conditions.iter().any(same) {
                conditions.retain(|condition| condition.type_ != "ReplicaFailure");
                conditions.push(ReplicaSetCondition {
                    type_: "ReplicaFailure".to_owned(),
                    status: "True".to_owned(),
                    reason: Some(reason.to_owned()),
                    message: Some(status.message.clone()),
                    last_transition_time: Some(Time(now)),
                });
            }
        }
    }
    (!conditions.is_empty()).then_some(conditions)
}

/// A pod of this set, for the registry to name.
fn pod_of<K: Replicated>(set: &ReplicaSet) -> Pod {
    let template = set
        .spec
        .as_ref()
        .and_then(|spec| spec.template.clone())
        .unwrap_or_default();
    let metadata = template.metadata.unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!(
                "{}-",
                set.metadata.name.as_deref().unwrap_or_default()
            )),
            namespace: set.metadata.namespace.clone(),
            labels: metadata.labels,
            annotations: metadata.annotations,
            finalizers: metadata.finalizers,
            owner_references: Some(vec![super::controller_reference(&K::from_set(set))]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}

struct Replicas<K> {
    context: Arc<Context>,
    kind: PhantomData<fn() -> K>,
}

impl<K: Replicated> Replicas<K> {
    fn crowd(&self, set: &ReplicaSet) -> HashMap<String, usize> {
        let mut crowd = HashMap::new();
        let caches = &self.context.caches;
        let siblings = match pods::controller_of(&set.metadata) {
            Some(owner) => caches.replica_sets.owned_by(&owner.uid),
            None => vec![Arc::new(set.clone())],
        };
        for sibling in siblings {
            let uid = sibling.metadata.uid.as_deref().unwrap_or_default();
            for pod in caches
                .pods
                .owned_by(uid)
                .iter()
                .filter(|pod| pods::is_active(pod))
            {
                if let Some(node) = pods::node(pod) {
                    *crowd.entry(node.to_owned()).or_insert(0) += 1;
                }
            }
        }
        crowd
    }

    /// Adopts and releases. The set is read again first: an outdated cache must not adopt for a set
    /// that is gone.
    async fn claim(&self, set: &ReplicaSet, plan: &Plan) -> Result<(), Status> {
        if plan.adopt.is_empty() && plan.release.is_empty() {
            return Ok(());
        }
        let key = ObjectKey::of(&set.metadata);
        let registry = &self.context.registry;
        let live: Option<K> = registry.get(&key.namespace, &key.name)?;
        let same = live.is_some_and(|live| {
            let live = live.metadata();
            live.uid == set.metadata.uid && live.deletion_timestamp.is_none()
        });
        if !same {
            return Err(Status::new(
                Reason::Conflict,
                format!("replica set {key} was replaced"),
            ));
        }
        for pod in &plan.adopt {
            let mut pod = Pod::clone(pod);
            let owners = pod.metadata.owner_references.get_or_insert_default();
            owners.push(super::controller_reference(&K::from_set(set)));
            registry.update(&pod).await?;
        }
        for pod in &plan.release {
            let mut pod = Pod::clone(pod);
            if let Some(owners) = &mut pod.metadata.owner_references {
                owners.retain(|owner| Some(&owner.uid) != set.metadata.uid.as_ref());
            }
            super::ignore_not_found(registry.update(&pod).await)?;
        }
        Ok(())
    }

    /// Creates in batches of 1, 2, 4, …: a quota or a broken template costs one request, not 500.
    async fn create(&self, set: &ReplicaSet, total: usize) -> (Vec<Arc<Pod>>, Option<Status>) {
        let mut created = Vec::new();
        let template = pod_of::<K>(set);
        let mut batch = 1.min(total);
        while batch > 0 {
            let requests = (0..batch).map(|_| self.context.registry.create(&template));
            let mut failure = None;
            for result in join_all(requests).await {
                match result {
                    Ok(pod) => {
                        let name = pod.metadata.name.as_deref().unwrap_or_default();
                        let message = format!("Created pod: {name}");
                        self.event(set, EventType::Normal, "SuccessfulCreate", message)
                            .await;
                        created.push(Arc::new(pod));
                    }
                    Err(status) => {
                        let message = format!("Error creating: {}", status.message);
                        self.event(set, EventType::Warning, "FailedCreate", message)
                            .await;
                        failure = Some(status);
                    }
                }
            }
            if failure.is_some() {
                return (created, failure);
            }
            batch = (batch * 2).min(total - created.len());
        }
        (created, None)
    }

    async fn delete(&self, set: &ReplicaSet, victims: &[Arc<Pod>]) -> Option<Status> {
        let requests = victims.iter().map(|pod| async move {
            let key = ObjectKey::of(&pod.metadata);
            let options = DeleteOptions {
                uid: pod.metadata.uid.clone(),
                ..DeleteOptions::default()
            };
            let registry = &self.context.registry;
            let result = registry
                .delete::<Pod>(&key.namespace, &key.name, &options)
                .await;
            (key, super::ignore_not_found(result))
        });
        let mut failure = None;
        for (key, result) in join_all(requests).await {
            match result {
                Ok(()) => {
                    let message = format!("Deleted pod: {}", key.name);
                    self.event(set, EventType::Normal, "SuccessfulDelete", message)
                        .await;
                }
                Err(status) => {
                    let message = format!("Error deleting: {}", status.message);
                    self.event(set, EventType::Warning, "FailedDelete", message)
                        .await;
                    failure = Some(status);
                }
            }
        }
        failure
    }

    async fn event(&self, set: &ReplicaSet, type_: EventType, reason: &str, message: String) {
        let event = super::event_about(&K::from_set(set), Self::NAME, type_, reason, message);
        self.context.registry.event(event).await;
    }

    async fn write_status(&self, set: &ReplicaSet, new: ReplicaSetStatus) -> Result<(), Status> {
        if set.status.as_ref() == Some(&new) {
            return Ok(());
        }
        let mut set = set.clone();
        set.status = Some(new);
        super::ignore_not_found(
            self.context
                .registry
                .update_status(&K::from_set(&set))
                .await,
        )
    }
}

impl<K: Replicated> Controller for Replicas<K> {
    const NAME: &'static str = K::CONTROLLER;
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let caches = &self.context.caches;
        let Some(object) = K::cache(caches).get(key) else {
            return Ok(None);
        };
        let set = object.to_set();
        let uid = set.metadata.uid.as_deref().unwrap_or_default();
        let mut owned = caches.pods.owned_by(uid);
        owned.retain(|pod| pods::controller_of(&pod.metadata).is_some_and(|c| c.uid == uid));
        let orphans = caches.pods.without_controller(&key.namespace);
        let observed = Observed {
            set: &set,
            owned: &owned,
            orphans: &orphans,
            crowd: &self.crowd(&set),
            now: Timestamp::now(),
        };
        let mut plan = plan(&observed);
        self.claim(&set, &plan).await?;
        let (created, mut failure) = self.create(&set, plan.create_count).await;
        plan.keep.extend(created);
        let mut reason = "FailedCreate";
        if let Some(status) = self.delete(&set, &plan.delete).await {
            failure = Some(status);
            reason = "FailedDelete";
        }
        let gone = |pod: &&Arc<Pod>| pods::is_terminating(pod) && !pods::is_finished(pod);
        let terminating = owned.iter().filter(gone).count() + plan.delete.len();
        let failed = failure.as_ref().map(|status| (reason, status));
        let (status, again) = status_of(&set, &plan.keep, terminating, failed, Timestamp::now());
        self.write_status(&set, status).await?;
        match failure {
            // A namespace that is being deleted takes no new pods: its deletion ends this set too.
            Some(_) if self.context.is_leaving(&key.namespace) => Ok(None),
            Some(status) => Err(status),
            None => Ok(again),
        }
    }
}

/// Starts the workers.
pub(super) fn start<K: Replicated>(
    context: &Arc<Context>,
    tasks: &mut JoinSet<()>,
    shutdown: &CancellationToken,
) {
    let caches = &context.caches;
    let queue = owned::queue(K::cache(caches), &caches.pods);
    let (owners, weak) = (queue.clone(), Arc::downgrade(context));
    caches.pods.on_change(move |delta: &Delta<Pod>| {
        let pod = delta.object();
        if pods::controller_of(&pod.metadata).is_some() {
            return;
        }
        // An orphan concerns every set whose selector matches it.
        let Some(context) = weak.upgrade() else {
            return;
        };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        for object in K::cache(&context.caches).in_namespace(namespace) {
            let set = object.to_set();
            let selector = set.spec.as_ref().map(|spec| &spec.selector);
            if selector.is_some_and(|s| selects(s, pod.metadata.labels.as_ref())) {
                owners.add(ObjectKey::of(&set.metadata));
            }
        }
    });
    let controller = Replicas::<K> {
        context: Arc::clone(context),
        kind: PhantomData,
    };
    super::spawn_workers(controller, &queue, WORKER_COUNT, context, tasks, shutdown);
}

#[cfg(test)]
#[path = "replicaset_tests.rs"]
mod tests;
