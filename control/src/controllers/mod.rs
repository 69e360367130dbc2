//! The controllers: one loop per kind that moves what is towards what is wanted.
//!
//! ```text
//!  store ─► informer ─► caches ─► handlers ─► work queue ─► worker: plan (pure) ─► act ─► registry ─► store
//!                         ▲                                    │
//!                         └──────── waits until the caches show its own writes
//! ```
//! Each file is one controller: a pure `plan` from what the caches show to the actions, and a thin
//! acting part that carries them out through [`Registry`] with preconditions. Controllers keep no
//! state of their own that a restart could lose; the exceptions (heartbeat observations, how
//! long a pod has borne a taint, the time since when a pod's node is missing) restart their clocks, which only delays them.
//!
//! Invariants: a key is in the hands of one worker; a worker looks at a key again only after the
//! caches show everything it wrote before; every action is idempotent; a failed key comes back with
//! back-off and starves nobody.

pub(crate) mod api_service;
mod autoscale;
mod cron_job;
mod daemon_set;
mod deployment;
mod disruption;
mod endpointslice;
mod ephemeral_volume;
mod garbage;
pub(crate) mod informer;
mod job;
mod load_balancer;
mod namespace;
mod node_health;
mod owned;
mod pod_cidr;
mod pod_garbage;
pub(crate) mod pods;
pub(crate) mod queue;
mod replicaset;
mod resource_quota;
mod revision;
mod service_account;
mod stateful_set;
pub(crate) mod taint_eviction;
mod volume_binder;
mod volume_reclaim;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::future::Future;
use std::hash::Hash;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use gantry_api::k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use gantry_api::k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use gantry_api::k8s_openapi::api::batch::v1::{CronJob, Job};
use gantry_api::k8s_openapi::api::coordination::v1::Lease;
use gantry_api::k8s_openapi::api::core::v1::{
    Event, EventSource, Namespace, Node, ObjectReference, PersistentVolume, PersistentVolumeClaim,
    Pod, ReplicationController, Service, ServiceAccount,
};
use gantry_api::k8s_openapi::api::discovery::v1::EndpointSlice;
use gantry_api::k8s_openapi::api::policy::v1::PodDisruptionBudget;
use gantry_api::k8s_openapi::api::storage::v1::StorageClass;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    LabelSelector, OwnerReference, Time,
};
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::selector::Selector;
use gantry_api::status::{Reason, Status};
use ipnet::Ipv4Net;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::hold::Hold;
use crate::ranges::Ranges;
use crate::server::registry::{Registry, Resource};
pub use autoscale::UsageSource;
pub use load_balancer::{AddressPool, PoolRange};
pub(crate) use node_health::is_ready as node_is_ready;
pub(crate) use volume_binder::{PROVISIONER, satisfies as volume_satisfies};
pub use volume_reclaim::VolumeRemover;

use informer::{Cache, Informer, ObjectKey, Sink};
use queue::WorkQueue;

/// Workers per controller: enough to keep the group commit of the store busy.
const WORKER_COUNT: usize = 4;

/// What the controllers must be told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Addresses of all pods; every node gets a part of it.
    pub cluster_cidr: Ranges,
    /// Prefix length of a node's part, in bits.
    pub node_prefix_len: u8,
    /// The same of its IPv6 part, in a cluster of both families.
    pub node_prefix_len_v6: u8,
    /// A node whose lease was not renewed for this long is not ready.
    pub node_grace_period: Duration,
    /// The CA's certificate (PEM), for pods to check the API with; empty: not published.
    pub ca_certificate: String,
    /// How often autoscalers look at what pods use.
    pub autoscale_interval: Duration,
    /// Addresses for Services of type LoadBalancer; empty: they stay pending.
    pub load_balancer_pool: AddressPool,
    /// After a restore: nobody is evicted, and nobody counts as lost, before it is over.
    pub hold: Hold,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cluster_cidr: Ipv4Net::new_assert(std::net::Ipv4Addr::new(10, 244, 0, 0), 16).into(),
            node_prefix_len: 24,
            node_prefix_len_v6: 64,
            node_grace_period: Duration::from_secs(40),
            ca_certificate: String::new(),
            autoscale_interval: Duration::from_secs(15),
            load_balancer_pool: AddressPool::default(),
            hold: Hold::default(),
        }
    }
}

/// The typed caches that controllers read.
struct Caches {
    pods: Arc<Cache<Pod>>,
    replica_sets: Arc<Cache<ReplicaSet>>,
    deployments: Arc<Cache<Deployment>>,
    daemon_sets: Arc<Cache<DaemonSet>>,
    stateful_sets: Arc<Cache<StatefulSet>>,
    replication_controllers: Arc<Cache<ReplicationController>>,
    jobs: Arc<Cache<Job>>,
    cron_jobs: Arc<Cache<CronJob>>,
    claims: Arc<Cache<PersistentVolumeClaim>>,
    volumes: Arc<Cache<PersistentVolume>>,
    storage_classes: Arc<Cache<StorageClass>>,
    services: Arc<Cache<Service>>,
    service_accounts: Arc<Cache<ServiceAccount>>,
    endpoint_slices: Arc<Cache<EndpointSlice>>,
    namespaces: Arc<Cache<Namespace>>,
    nodes: Arc<Cache<Node>>,
    leases: Arc<Cache<Lease>>,
    budgets: Arc<Cache<PodDisruptionBudget>>,
    scalers: Arc<Cache<HorizontalPodAutoscaler>>,
    /// Owners and dependents of every kind.
    graph: Arc<garbage::Graph>,
    /// What changes in namespaces with quotas.
    quota_changes: Arc<resource_quota::Changes>,
}

impl Caches {
    fn new() -> Self {
        Self {
            pods: Cache::new(pods::node),
            replica_sets: Cache::new(|_| None),
            deployments: Cache::new(|_| None),
            daemon_sets: Cache::new(|_| None),
            stateful_sets: Cache::new(|_| None),
            replication_controllers: Cache::new(|_| None),
            jobs: Cache::new(|_| None),
            cron_jobs: Cache::new(|_| None),
            claims: Cache::new(|_| None),
            volumes: Cache::new(|_| None),
            storage_classes: Cache::new(|_| None),
            services: Cache::new(|_| None),
            service_accounts: Cache::new(|_| None),
            endpoint_slices: Cache::new(|_| None),
            namespaces: Cache::new(|_| None),
            nodes: Cache::new(|_| None),
            leases: Cache::new(|_| None),
            budgets: Cache::new(|_| None),
            scalers: Cache::new(|_| None),
            graph: garbage::Graph::new(),
            quota_changes: resource_quota::Changes::new(),
        }
    }

    fn sinks(&self) -> Vec<Arc<dyn Sink>> {
        vec![
            Arc::clone(&self.pods) as Arc<dyn Sink>,
            Arc::clone(&self.replica_sets) as Arc<dyn Sink>,
            Arc::clone(&self.deployments) as Arc<dyn Sink>,
            Arc::clone(&self.daemon_sets) as Arc<dyn Sink>,
            Arc::clone(&self.stateful_sets) as Arc<dyn Sink>,
            Arc::clone(&self.replication_controllers) as Arc<dyn Sink>,
            Arc::clone(&self.jobs) as Arc<dyn Sink>,
            Arc::clone(&self.cron_jobs) as Arc<dyn Sink>,
            Arc::clone(&self.claims) as Arc<dyn Sink>,
            Arc::clone(&self.volumes) as Arc<dyn Sink>,
            Arc::clone(&self.storage_classes) as Arc<dyn Sink>,
            Arc::clone(&self.services) as Arc<dyn Sink>,
            Arc::clone(&self.service_accounts) as Arc<dyn Sink>,
            Arc::clone(&self.endpoint_slices) as Arc<dyn Sink>,
            Arc::clone(&self.namespaces) as Arc<dyn Sink>,
            Arc::clone(&self.nodes) as Arc<dyn Sink>,
            Arc::clone(&self.leases) as Arc<dyn Sink>,
            Arc::clone(&self.budgets) as Arc<dyn Sink>,
            Arc::clone(&self.scalers) as Arc<dyn Sink>,
            Arc::clone(&self.graph) as Arc<dyn Sink>,
            Arc::clone(&self.quota_changes) as Arc<dyn Sink>,
        ]
    }
}

impl Context {
    /// Whether the namespace is going: it takes no new objects, and that is no failure.
    fn is_leaving(&self, namespace: &str) -> bool {
        let namespace = self.caches.namespaces.get(&ObjectKey::new("", namespace));
        namespace.is_none_or(|namespace| namespace.metadata.deletion_timestamp.is_some())
    }
}

/// What every controller works with.
struct Context {
    registry: Registry,
    caches: Caches,
    informer: Informer,
    settings: Settings,
}

/// One controller: looks at one key at a time.
trait Controller: Send + Sync + 'static {
    /// For logs and events, e.g. `replicaset-controller`.
    const NAME: &'static str;
    /// What its queue holds.
    type Key: Clone + Eq + Hash + Display + Send + Sync + 'static;

    /// Moves one object towards what is wanted; returns when to look again without a change.
    fn reconcile(
        &self,
        key: &Self::Key,
    ) -> impl Future<Output = Result<Option<Duration>, Status>> + Send;
}

/// Runs every controller until shutdown.
pub async fn run(
    registry: Registry,
    settings: Settings,
    remover: Arc<dyn VolumeRemover>,
    usage: Arc<dyn UsageSource>,
    shutdown: CancellationToken,
) {
    let caches = Caches::new();
    let informer = Informer::new(registry.store().clone(), caches.sinks());
    let context = Arc::new(Context {
        registry,
        caches,
        informer,
        settings,
    });
    let mut tasks = JoinSet::new();
    // Handlers first: the informer's first list then fills every queue.
    replicaset::start::<ReplicaSet>(&context, &mut tasks, &shutdown);
    replicaset::start::<ReplicationController>(&context, &mut tasks, &shutdown);
    daemon_set::start(&context, &mut tasks, &shutdown);
    stateful_set::start(&context, &mut tasks, &shutdown);
    job::start(&context, &mut tasks, &shutdown);
    cron_job::start(&context, &mut tasks, &shutdown);
    volume_binder::start(&context, &mut tasks, &shutdown);
    ephemeral_volume::start(&context, &mut tasks, &shutdown);
    volume_reclaim::start(&context, remover, &mut tasks, &shutdown);
    deployment::start(&context, &mut tasks, &shutdown);
    endpointslice::start(&context, &mut tasks, &shutdown);
    namespace::start(&context, &mut tasks, &shutdown);
    service_account::start(&context, &mut tasks, &shutdown);
    garbage::start(&context, &mut tasks, &shutdown);
    node_health::start(&context, &mut tasks, &shutdown);
    taint_eviction::start(&context, &mut tasks, &shutdown);
    load_balancer::start(&context, &mut tasks, &shutdown);
    pod_cidr::start(&context, &mut tasks, &shutdown);
    pod_garbage::start(&context, &mut tasks, &shutdown);
    disruption::start(&context, &mut tasks, &shutdown);
    autoscale::start(&context, usage, &mut tasks, &shutdown);
    resource_quota::start(&context, &mut tasks, &shutdown);
    let feeding = Arc::clone(&context);
    let stop = shutdown.clone();
    tasks.spawn(async move { feeding.informer.run(&stop).await });
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            // Workers catch panics themselves: this is the informer or the harness. Without them the
            // controllers would stand still unnoticed, so all stop and the caller sees it.
            tracing::error!(%error, "a controller task ended: stopping all controllers");
            tasks.shutdown().await;
        }
    }
}

/// Spawns the workers of one controller.
fn spawn_workers<C: Controller>(
    controller: C,
    queue: &WorkQueue<C::Key>,
    worker_count: usize,
    context: &Arc<Context>,
    tasks: &mut JoinSet<()>,
    shutdown: &CancellationToken,
) {
    let controller = Arc::new(controller);
    for _ in 0..worker_count {
        let (controller, queue) = (Arc::clone(&controller), queue.clone());
        let (context, shutdown) = (Arc::clone(context), shutdown.clone());
        tasks.spawn(async move {
            tokio::select! {
                // Cancelled between or inside reconciles: every action is a transaction of its own.
                () = work(&*controller, &queue, &context) => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
}

async fn work<C: Controller>(controller: &C, queue: &WorkQueue<C::Key>, context: &Context) {
    context.informer.caught_up(0).await;
    loop {
        let key = queue.get().await;
        let outcome = AssertUnwindSafe(controller.reconcile(&key))
            .catch_unwind()
            .await;
        match outcome {
            Ok(Ok(again)) => {
                queue.forget(&key);
                if let Some(delay) = again {
                    queue.add_after(key.clone(), delay);
                }
            }
            Ok(Err(status)) => {
                if matches!(status.reason, Reason::Conflict | Reason::NotFound) {
                    tracing::debug!(controller = C::NAME, %key, %status, "outdated, trying again");
                } else {
                    tracing::warn!(controller = C::NAME, %key, %status, "failed, trying again");
                }
                queue.add_rate_limited(key.clone());
            }
            Err(_) => {
                tracing::error!(controller = C::NAME, %key, "panicked, trying again");
                queue.add_rate_limited(key.clone());
            }
        }
        // Only then may the key be looked at again: the caches show what was just written.
        context
            .informer
            .caught_up(context.registry.store().revision())
            .await;
        queue.done(&key);
    }
}

/// Type of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EventType {
    /// Something happened as it should.
    Normal,
    /// Something needs attention.
    Warning,
}

/// An event about an object, without a name: the registry names and counts it.
pub(crate) fn event_about<K: Resource>(
    object: &K,
    component: &str,
    type_: EventType,
    reason: &str,
    message: String,
) -> Event {
    let metadata = object.metadata();
    let now = Time(Timestamp::now());
    let mut event = Event {
        involved_object: ObjectReference {
            api_version: Some(K::API_VERSION.to_owned()),
            kind: Some(K::KIND.to_owned()),
            name: metadata.name.clone(),
            namespace: metadata.namespace.clone(),
            resource_version: metadata.resource_version.clone(),
            uid: metadata.uid.clone(),
            ..ObjectReference::default()
        },
        type_: Some(match type_ {
            EventType::Normal => "Normal".to_owned(),
            EventType::Warning => "Warning".to_owned(),
        }),
        reason: Some(reason.to_owned()),
        message: Some(message),
        source: Some(EventSource {
            component: Some(component.to_owned()),
            host: None,
        }),
        reporting_component: Some(component.to_owned()),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        count: Some(1),
        ..Event::default()
    };
    // Events about cluster-scoped objects live in namespace default, as in Kubernetes.
    let namespace = metadata
        .namespace
        .clone()
        .unwrap_or_else(|| "default".to_owned());
    event.metadata.namespace = Some(namespace);
    event
}

/// The owner reference of a controller to `owner`.
fn controller_reference<K: Resource>(owner: &K) -> OwnerReference {
    let metadata = owner.metadata();
    OwnerReference {
        api_version: K::API_VERSION.to_owned(),
        kind: K::KIND.to_owned(),
        name: metadata.name.clone().unwrap_or_default(),
        uid: metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The key of the controller of an object, when it is of kind `K`: what to look at when it changes.
fn controller_key<K: Resource, O: Resource>(object: &O) -> Option<ObjectKey> {
    let metadata = object.metadata();
    let owner = pods::controller_of(metadata)?;
    (owner.kind == K::KIND && owner.api_version == K::API_VERSION)
        .then(|| ObjectKey::new(metadata.namespace.clone().unwrap_or_default(), &owner.name))
}

/// Whether a workload's selector means an object with these labels. An empty or broken selector means
/// none: validation refuses both, and a workload that takes every pod would be worse than none.
fn selects(selector: &LabelSelector, labels: Option<&BTreeMap<String, String>>) -> bool {
    let Ok(selector) = Selector::from_api(selector) else {
        return false;
    };
    let empty = BTreeMap::new();
    !selector.is_empty() && selector.matches(labels.unwrap_or(&empty))
}

/// NotFound is what a deletion wants.
fn ignore_not_found<T>(result: Result<T, Status>) -> Result<(), Status> {
    match result {
        Ok(_) => Ok(()),
        Err(status) if status.reason == Reason::NotFound => Ok(()),
        Err(status) => Err(status),
    }
}
