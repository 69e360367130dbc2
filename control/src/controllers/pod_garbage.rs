//! Pods whose node does not exist.
//!
//! ```text
//!  node gone ─► Failed, DisruptionTarget (DeletionByPodGC) ─► removed; finalizers may hold the object
//! ```
//! Nobody will ever report that their containers have ended, so this says it in the agent's place:
//! whoever waits for the end of such a pod (a Job with `podReplacementPolicy: Failed`, which holds it by
//! a finalizer) goes on, and its controller makes a replacement. A node that was seen to go takes its
//! pods along immediately; a node that was never seen may still be joining, so its pods (bound by hand)
//! wait [`QUARANTINE`].
//!
//! Invariant: an ended pod keeps its end; an agent that comes back does not take the new one back
//! (`feed/status.rs`).
//!
//! Source: Kubernetes `pkg/controller/podgc` (orphaned pods, 40 s quarantine).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Node, Pod, PodCondition};
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::status::Status;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::informer::{Delta, ObjectKey};
use super::queue::WorkQueue;
use super::{Context, Controller, pods};
use crate::server::registry::{DISRUPTION_TARGET, DeleteOptions};

/// How long a node that was never seen is waited for.
const QUARANTINE: Duration = Duration::from_secs(40);

/// Between two looks whether the hold after a restore is over.
const HELD_PAUSE: Duration = Duration::from_secs(1);

/// What is known of a node that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    /// Its object was removed before our eyes.
    Deleted,
    /// Not seen since this process looked first.
    Since(Instant),
}

/// How long to wait before the pods of a missing node go; `None`: no more.
fn wait(missing: Missing, now: Instant) -> Option<Duration> {
    match missing {
        Missing::Deleted => None,
        Missing::Since(since) => {
            let left = QUARANTINE.saturating_sub(now.duration_since(since));
            (!left.is_zero()).then_some(left)
        }
    }
}

/// The pod as ended by the loss of its node; `None` when it has ended before.
fn lost(pod: &Pod, now: Timestamp) -> Option<Pod> {
    if pods::is_finished(pod) {
        return None;
    }
    let mut pod = pod.clone();
    let status = pod.status.get_or_insert_default();
    status.phase = Some("Failed".to_owned());
    let condition = PodCondition {
        type_: DISRUPTION_TARGET.to_owned(),
        status: "True".to_owned(),
        reason: Some("DeletionByPodGC".to_owned()),
        message: Some("PodGC: node no longer exists".to_owned()),
        ..PodCondition::default()
    };
    pods::set_condition(status, condition, now);
    Some(pod)
}

struct PodGarbage {
    context: Arc<Context>,
    missing: Arc<Mutex<HashMap<String, Missing>>>,
}

impl Controller for PodGarbage {
    const NAME: &'static str = "pod-garbage-collector";
    type Key = ObjectKey;

    /// `key` names a node.
    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        if self.context.settings.hold.is_on() {
            return Ok(Some(HELD_PAUSE));
        }
        let caches = &self.context.caches;
        let orphans = caches.pods.on_node(&key.name);
        {
            let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
            if orphans.is_empty() || caches.nodes.get(key).is_some() {
                missing.remove(&key.name);
                return Ok(None);
            }
            let now = Instant::now();
            let known = missing
                .entry(key.name.clone())
                .or_insert(Missing::Since(now));
            if let Some(left) = wait(*known, now) {
                return Ok(Some(left));
            }
        }
        for pod in orphans {
            let pod_key = ObjectKey::of(&pod.metadata);
            tracing::info!(pod = %pod_key, node = key.name, "removing a pod: its node is gone");
            let options = DeleteOptions {
                grace_period_s: Some(0),
                uid: pod.metadata.uid.clone(),
                ..DeleteOptions::default()
            };
            let registry = &self.context.registry;
            if let Some(lost) = lost(&pod, Timestamp::now()) {
                super::ignore_not_found(registry.update_status(&lost).await)?;
            }
            let result = registry
                .delete::<Pod>(&pod_key.namespace, &pod_key.name, &options)
                .await;
            super::ignore_not_found(result)?;
        }
        // Once more, to forget the node when nothing of it is left.
        Ok(Some(Duration::from_secs(1)))
    }
}

/// Starts the worker.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let missing = Arc::new(Mutex::new(HashMap::new()));
    let (nodes, gone) = (queue.clone(), Arc::clone(&missing));
    context.caches.nodes.on_change(move |delta: &Delta<Node>| {
        let Some(name) = delta.object().metadata.name.clone() else {
            return;
        };
        if matches!(delta, Delta::Deleted(_)) {
            let mut gone = gone.lock().unwrap_or_else(PoisonError::into_inner);
            gone.insert(name.clone(), Missing::Deleted);
            nodes.add(ObjectKey::new("", name));
        }
    });
    let (bound, weak) = (queue.clone(), Arc::downgrade(context));
    context.caches.pods.on_change(move |delta: &Delta<Pod>| {
        let Delta::Applied { new, .. } = delta else {
            return;
        };
        let Some(node) = pods::node(new) else { return };
        let key = ObjectKey::new("", node);
        let Some(context) = weak.upgrade() else {
            return;
        };
        if context.caches.nodes.get(&key).is_none() {
            bound.add(key);
        }
    });
    let controller = PodGarbage {
        context: Arc::clone(context),
        missing,
    };
    super::spawn_workers(controller, &queue, 1, context, tasks, shutdown);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_without_a_node_has_failed_unless_it_has_ended() {
        let pod = |phase: &str| -> Pod {
            serde_json::from_value(json!({"status": {"phase": phase, "conditions": [
                {"type": "Ready", "status": "True"}]}}))
            .unwrap()
        };
        for phase in ["Pending", "Running", "Unknown"] {
            let lost = lost(&pod(phase), Timestamp::UNIX_EPOCH).unwrap();
            assert_eq!(pods::phase(&lost), "Failed");
            let condition = pods::condition(&lost, DISRUPTION_TARGET).unwrap();
            assert_eq!(condition.reason.as_deref(), Some("DeletionByPodGC"));
            assert!(pods::is_ready(&lost), "other conditions stay");
        }
        for phase in ["Succeeded", "Failed"] {
            assert_eq!(lost(&pod(phase), Timestamp::UNIX_EPOCH), None);
        }
    }

    #[test]
    fn pods_of_a_deleted_node_go_at_once_and_of_an_unknown_one_after_40_s() {
        let start = Instant::now();
        assert_eq!(wait(Missing::Deleted, start), None);
        let missing = Missing::Since(start);
        assert_eq!(wait(missing, start), Some(QUARANTINE));
        let left = wait(missing, start + Duration::from_secs(39));
        assert_eq!(left, Some(Duration::from_secs(1)));
        assert_eq!(wait(missing, start + Duration::from_secs(40)), None);
    }
}
