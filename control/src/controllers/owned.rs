//! What the workload controllers share: the pods of an owner, adopted, created and deleted.
//!
//! ```text
//!  pods of the namespace ─► owned by uid, and orphans that the selector matches (adopted)
//! ```
//! An orphan is adopted only for an owner that still exists: it is read again before.

use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use gantry_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use gantry_api::status::{Reason, Status};

use super::informer::{Cache, Delta, ObjectKey};
use super::queue::WorkQueue;
use super::{Context, EventType, controller_key, event_about, pods, selects};
use crate::server::registry::{DeleteOptions, Resource};

/// A queue of owners to look at: an owner when it changes, and when a pod that it controls does.
pub(super) fn queue<K: Resource>(own: &Cache<K>, pods: &Cache<Pod>) -> WorkQueue<ObjectKey> {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let changed = queue.clone();
    own.on_change(move |delta: &Delta<K>| {
        changed.add(ObjectKey::of(delta.object().metadata()));
    });
    let owners = queue.clone();
    pods.on_change(move |delta: &Delta<Pod>| {
        for pod in delta.states() {
            if let Some(key) = controller_key::<K, Pod>(&**pod) {
                owners.add(key);
            }
        }
    });
    queue
}

/// The pods whose controller is `owner`, after adopting those that match its selector.
pub(super) async fn claim<K: Resource>(
    context: &Context,
    owner: &K,
    selector: &LabelSelector,
) -> Result<Vec<Arc<Pod>>, Status> {
    let metadata = owner.metadata();
    let uid = metadata.uid.as_deref().unwrap_or_default();
    let key = ObjectKey::of(metadata);
    let mut owned = context.caches.pods.owned_by(uid);
    owned.retain(|pod| pods::controller_of(&pod.metadata).is_some_and(|c| c.uid == uid));
    if metadata.deletion_timestamp.is_some() {
        return Ok(owned);
    }
    let mut orphans = context.caches.pods.without_controller(&key.namespace);
    orphans.retain(|pod| pods::is_active(pod) && selects(selector, pod.metadata.labels.as_ref()));
    if orphans.is_empty() {
        return Ok(owned);
    }
    let live: Option<K> = context.registry.get(&key.namespace, &key.name)?;
    let same = live.is_some_and(|live| {
        let live = live.metadata();
        live.uid == metadata.uid && live.deletion_timestamp.is_none()
    });
    if !same {
        let text = format!("{} {key} was replaced", K::KIND);
        return Err(Status::new(Reason::Conflict, text));
    }
    for orphan in orphans {
        let mut pod = Pod::clone(&orphan);
        let owners = pod.metadata.owner_references.get_or_insert_default();
        owners.push(super::controller_reference(owner));
        owned.push(Arc::new(context.registry.update(&pod).await?));
    }
    Ok(owned)
}

/// A pod of `owner` by its template; the caller names it.
pub(super) fn pod_of<K: Resource>(owner: &K, template: &PodTemplateSpec) -> Pod {
    let metadata = template.metadata.clone().unwrap_or_default();
    let own = owner.metadata();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", own.name.as_deref().unwrap_or_default())),
            namespace: own.namespace.clone(),
            labels: metadata.labels,
            annotations: metadata.annotations,
            finalizers: metadata.finalizers,
            owner_references: Some(vec![super::controller_reference(owner)]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// A number of pods, or a percentage of `total`; what is neither counts as 0 (validation refuses it).
pub(super) fn pod_count(value: &IntOrString, total: i32, round_up: bool) -> i32 {
    match value {
        IntOrString::Int(n) => (*n).max(0),
        IntOrString::String(text) => {
            let percent = text
                .strip_suffix('%')
                .and_then(|digits| digits.parse::<i64>().ok());
            let scaled = percent.unwrap_or(0).max(0).saturating_mul(i64::from(total));
            let pods = if round_up {
                scaled.saturating_add(99) / 100
            } else {
                scaled / 100
            };
            i32::try_from(pods).unwrap_or(i32::MAX)
        }
    }
}

/// Creates a pod and says so in an event about its owner.
pub(super) async fn create<K: Resource>(
    context: &Context,
    owner: &K,
    pod: &Pod,
    component: &str,
) -> Result<Pod, Status> {
    let result = context.registry.create(pod).await;
    let (type_, reason, message) = match &result {
        Ok(pod) => {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            (
                EventType::Normal,
                "SuccessfulCreate",
                format!("Created pod: {name}"),
            )
        }
        Err(status) => (
            EventType::Warning,
            "FailedCreate",
            format!("Error creating: {}", status.message),
        ),
    };
    let event = event_about(owner, component, type_, reason, message);
    context.registry.event(event).await;
    result
}

/// Starts a pod's deletion and says so in an event about its owner.
pub(super) async fn delete<K: Resource>(
    context: &Context,
    owner: &K,
    pod: &Pod,
    component: &str,
) -> Result<(), Status> {
    if pods::is_terminating(pod) {
        return Ok(());
    }
    let key = ObjectKey::of(&pod.metadata);
    let options = DeleteOptions {
        uid: pod.metadata.uid.clone(),
        ..DeleteOptions::default()
    };
    let registry = &context.registry;
    let result = registry
        .delete::<Pod>(&key.namespace, &key.name, &options)
        .await;
    let (type_, reason, message) = match &result {
        Ok(()) => (
            EventType::Normal,
            "SuccessfulDelete",
            format!("Deleted pod: {}", key.name),
        ),
        Err(status) if status.reason == Reason::NotFound => return Ok(()),
        Err(status) => (
            EventType::Warning,
            "FailedDelete",
            format!("Error deleting: {}", status.message),
        ),
    };
    registry
        .event(event_about(owner, component, type_, reason, message))
        .await;
    result
}
