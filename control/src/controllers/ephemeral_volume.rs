//! Ephemeral volumes: a claim per volume of the pod, which lives exactly as long as the pod.
//!
//! ```text
//!  Pod p, volumes[v].ephemeral ─► PersistentVolumeClaim p-v, owned by the pod ─► binder, scheduler, agent
//!  Pod p is gone ─► the garbage collector deletes the claim, the binder what was provisioned for it
//! ```
//! A claim of that name which was not made for this pod is never used: whoever has it would lose its
//! data with the pod. The pod waits then, and an event says why.
//!
//! Source: Kubernetes `pkg/controller/volume/ephemeral`.

use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Volume};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use gantry_api::status::{Reason, Status};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{Delta, ObjectKey};
use super::queue::WorkQueue;
use super::{Context, Controller, EventType, WORKER_COUNT, event_about, pods};

/// A name that somebody else's claim has may become free without a change that is seen here.
const RESYNC: Duration = Duration::from_secs(30);

/// The claim that this volume of the pod asks for; `None`: the volume is of another kind.
fn claim_of(pod: &Pod, volume: &Volume) -> Option<PersistentVolumeClaim> {
    let template = volume.ephemeral.as_ref()?.volume_claim_template.as_ref()?;
    let labels = template.metadata.as_ref().and_then(|m| m.labels.clone());
    let annotations = template
        .metadata
        .as_ref()
        .and_then(|m| m.annotations.clone());
    Some(PersistentVolumeClaim {
        metadata: ObjectMeta {
            namespace: pod.metadata.namespace.clone(),
            name: Some(pods::ephemeral_claim(pod, volume)),
            labels,
            annotations,
            owner_references: Some(vec![super::controller_reference(pod)]),
            ..ObjectMeta::default()
        },
        spec: Some(template.spec.clone()),
        status: None,
    })
}

struct EphemeralVolumes {
    context: Arc<Context>,
}

impl EphemeralVolumes {
    /// Makes one claim; `false` when its name is somebody else's.
    async fn ensure(&self, pod: &Pod, claim: &PersistentVolumeClaim) -> Result<bool, Status> {
        let registry = &self.context.registry;
        let key = ObjectKey::of(&claim.metadata);
        let live: Option<PersistentVolumeClaim> = registry.get(&key.namespace, &key.name)?;
        match live {
            Some(live) if pods::is_owned_by(&live.metadata, pod) => return Ok(true),
            Some(_) => {}
            None => match registry.create(claim).await {
                Ok(_) => return Ok(true),
                Err(status) if status.reason != Reason::AlreadyExists => return Err(status),
                Err(_) => {}
            },
        }
        let message = format!(
            "PersistentVolumeClaim {:?} was not made for this pod: delete it, or rename the pod or \
             its volume",
            key.name
        );
        let event = event_about(
            pod,
            Self::NAME,
            EventType::Warning,
            "FailedBinding",
            message,
        );
        registry.event(event).await;
        Ok(false)
    }
}

impl Controller for EphemeralVolumes {
    const NAME: &'static str = "ephemeral-volume-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let Some(pod) = self.context.caches.pods.get(key) else {
            return Ok(None);
        };
        let done = pods::is_terminating(&pod) || pods::is_finished(&pod);
        if done || self.context.is_leaving(&key.namespace) {
            return Ok(None);
        }
        let mut all = true;
        let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        for claim in volumes.filter_map(|volume| claim_of(&pod, volume)) {
            all &= self.ensure(&pod, &claim).await?;
        }
        Ok((!all).then_some(RESYNC))
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let new = queue.clone();
    context.caches.pods.on_change(move |delta: &Delta<Pod>| {
        // Volumes never change, so a pod that was seen needs no second look.
        let Delta::Applied {
            new: pod,
            old: None,
        } = delta
        else {
            return;
        };
        let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        if volumes.into_iter().any(|v| v.ephemeral.is_some()) {
            new.add(ObjectKey::of(&pod.metadata));
        }
    });
    let owners = queue.clone();
    context
        .caches
        .claims
        .on_change(move |delta: &Delta<PersistentVolumeClaim>| {
            let gone = matches!(delta, Delta::Deleted(_));
            let owner = super::controller_key::<Pod, PersistentVolumeClaim>(delta.object());
            if let Some(key) = owner.filter(|_| gone) {
                owners.add(key);
            }
        });
    let controller = EphemeralVolumes {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, WORKER_COUNT, context, tasks, shutdown);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_claim_is_the_template_under_the_pods_name_and_goes_with_the_pod() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "a", "uid": "u"},
            "spec": {"containers": [], "volumes": [
                {"name": "scratch", "ephemeral": {"volumeClaimTemplate": {
                    "metadata": {"labels": {"x": "y"}},
                    "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "local"}}}},
                {"name": "e", "emptyDir": {}}]},
        }))
        .unwrap();
        let volumes = pod.spec.as_ref().unwrap().volumes.as_ref().unwrap();
        assert_eq!(claim_of(&pod, &volumes[1]), None);
        let claim = claim_of(&pod, &volumes[0]).unwrap();
        assert_eq!(claim.metadata.name.as_deref(), Some("p-scratch"));
        assert_eq!(pods::claims(&pod), ["p-scratch"]);
        assert!(pods::is_owned_by(&claim.metadata, &pod));
        assert_eq!(claim.metadata.labels.unwrap()["x"], "y");
        assert_eq!(
            claim.spec.unwrap().storage_class_name.as_deref(),
            Some("local")
        );
        let mut other = pod.clone();
        other.metadata.uid = Some("another".to_owned());
        assert!(!pods::is_owned_by(
            &claim_of(&pod, &volumes[0]).unwrap().metadata,
            &other
        ));
    }
}
