//! What becomes of volumes that nobody has any more.
//!
//! ```text
//!             claim deleted                     Delete, made by class local      directory gone
//!  Bound ─────────────────► Released ─────────────────────────────► node asked ─────────────► object gone
//!  (the binder's part)         ├ Retain: stays, the data too            └ away, refused: asked again
//!                              └ Delete, made by hand: Failed; nobody here knows how to delete it
//! ```
//! A volume that is bound is not deleted before its claim (finalizer [`IN_USE`]). The directory goes
//! before the object: while there is something on a disk, something in the API says so. The node is
//! asked over its own stream; it removes by name, below its directory of volumes, and nothing else.
//!
//! Source: Kubernetes `pkg/controller/volume/{persistentvolume,pvprotection}`.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use gantry_api::k8s_openapi::api::core::v1::{Node, PersistentVolume};
use gantry_api::status::{Reason, Status};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{Delta, ObjectKey};
use super::queue::WorkQueue;
use super::volume_binder::{LOCAL_VOLUMES, PROVISIONED_BY, PROVISIONER};
use super::{Context, Controller, EventType, WORKER_COUNT, event_about};
use crate::server::registry::DeleteOptions;

/// Keeps a volume while a claim has it.
const IN_USE: &str = "kubernetes.io/pv-protection";
/// A node that is away or refuses is asked again after this.
const RESYNC: Duration = Duration::from_secs(15);

/// Who deletes what a volume held, on its node.
pub trait VolumeRemover: Send + Sync + 'static {
    /// Removes the directory of this volume; absent is fine. Returns when it is gone.
    fn remove<'a>(&'a self, node: &'a str, volume: &'a str) -> BoxFuture<'a, Result<(), Status>>;
}

/// What a volume needs next.
#[derive(Debug, PartialEq)]
enum Step {
    /// Nothing for now.
    Nothing,
    /// Its finalizer.
    Protect,
    /// Nobody has it: its finalizer goes.
    Release,
    /// Its directory on this node goes, then the object.
    Remove(String),
    /// It stays as it is and the user is told.
    Fail,
}

/// Decides what one volume needs.
fn plan(volume: &PersistentVolume) -> Step {
    let Some(spec) = &volume.spec else {
        return Step::Nothing;
    };
    let leaving = volume.metadata.deletion_timestamp.is_some();
    let mut finalizers = volume.metadata.finalizers.iter().flatten();
    let has = finalizers.any(|finalizer| finalizer == IN_USE);
    if !leaving && !has {
        return Step::Protect;
    }
    let phase = volume.status.as_ref().and_then(|s| s.phase.as_deref());
    let has_claim = spec.claim_ref.as_ref().is_some_and(|c| c.uid.is_some());
    let deletes = spec.persistent_volume_reclaim_policy.as_deref() == Some("Delete");
    match phase {
        Some("Released") if deletes => match local_node(volume) {
            Some(node) => Step::Remove(node),
            None if leaving => Step::Release,
            None => Step::Fail,
        },
        // The binder says when its claim is gone.
        Some("Released" | "Failed") if leaving => Step::Release,
        _ if leaving && !has_claim => Step::Release,
        _ => Step::Nothing,
    }
}

/// The node of a volume that class `local` made.
fn local_node(volume: &PersistentVolume) -> Option<String> {
    let annotations = volume.metadata.annotations.as_ref()?;
    let spec = volume.spec.as_ref()?;
    let path = &spec.host_path.as_ref()?.path;
    let name = volume.metadata.name.as_deref()?;
    let made = annotations.get(PROVISIONED_BY).map(String::as_str) == Some(PROVISIONER);
    let affinity = spec.node_affinity.as_ref()?.required.as_ref()?;
    let [term] = affinity.node_selector_terms.as_slice() else {
        return None;
    };
    let [only] = term.match_expressions.as_deref()? else {
        return None;
    };
    let [node] = only.values.as_deref()? else {
        return None;
    };
    (made && *path == format!("{LOCAL_VOLUMES}/{name}")).then(|| node.clone())
}

struct Reclaim {
    context: Arc<Context>,
    remover: Arc<dyn VolumeRemover>,
}

impl Reclaim {
    /// The newest state, changed; a volume that is gone is fine.
    async fn change(
        &self,
        volume: &PersistentVolume,
        change: impl FnOnce(&mut Vec<String>),
    ) -> Result<(), Status> {
        let mut volume = volume.clone();
        change(volume.metadata.finalizers.get_or_insert_default());
        super::ignore_not_found(self.context.registry.update(&volume).await)
    }

    async fn release(&self, volume: &PersistentVolume) -> Result<(), Status> {
        let change = |finalizers: &mut Vec<String>| finalizers.retain(|f| f != IN_USE);
        self.change(volume, change).await
    }

    async fn tell(&self, volume: &PersistentVolume, message: String) {
        let (type_, reason) = (EventType::Warning, "VolumeFailedDelete");
        let event = event_about(volume, Self::NAME, type_, reason, message);
        self.context.registry.event(event).await;
    }

    /// The directory first, then the object.
    async fn remove(&self, volume: &PersistentVolume, node: &str) -> Result<(), Status> {
        let registry = &self.context.registry;
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        self.remover.remove(node, name).await?;
        tracing::info!(
            volume = name,
            node,
            "the directory of a released volume is gone"
        );
        let options = DeleteOptions {
            uid: volume.metadata.uid.clone(),
            ..DeleteOptions::default()
        };
        let deleted = registry
            .delete::<PersistentVolume>("", name, &options)
            .await;
        super::ignore_not_found(deleted)?;
        match registry.get::<PersistentVolume>("", name)? {
            Some(left) if left.metadata.uid == volume.metadata.uid => self.release(&left).await,
            _ => Ok(()),
        }
    }

    async fn fail(&self, volume: &PersistentVolume) -> Result<(), Status> {
        let text = "reclaim policy Delete: only volumes that class local has made are deleted; \
                    remove its directory and this object by hand";
        let mut volume = volume.clone();
        let status = volume.status.get_or_insert_default();
        status.phase = Some("Failed".to_owned());
        status.message = Some(text.to_owned());
        self.tell(&volume, text.to_owned()).await;
        super::ignore_not_found(self.context.registry.update_status(&volume).await)
    }
}

impl Controller for Reclaim {
    const NAME: &'static str = "persistentvolume-reclaimer";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let Some(volume) = self.context.caches.volumes.get(key) else {
            return Ok(None);
        };
        match plan(&volume) {
            Step::Nothing => {}
            Step::Protect => {
                let change = |finalizers: &mut Vec<String>| finalizers.push(IN_USE.to_owned());
                self.change(&volume, change).await?;
            }
            Step::Release => self.release(&volume).await?,
            Step::Fail => self.fail(&volume).await?,
            Step::Remove(node) => match self.remove(&volume, &node).await {
                Err(status) if status.reason == Reason::Conflict => return Err(status),
                Err(status) => {
                    let text = status.message;
                    let message = format!("its directory on node {node} is still there: {text}");
                    self.tell(&volume, message).await;
                    return Ok(Some(RESYNC));
                }
                Ok(()) => {}
            },
        }
        Ok(None)
    }
}

/// Starts the workers.
pub(super) fn start(
    context: &Arc<Context>,
    remover: Arc<dyn VolumeRemover>,
    tasks: &mut JoinSet<()>,
    shutdown: &CancellationToken,
) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let own = queue.clone();
    context
        .caches
        .volumes
        .on_change(move |delta: &Delta<PersistentVolume>| {
            own.add(ObjectKey::of(&delta.object().metadata));
        });
    // A node that comes back is asked at once.
    let (nodes, weak) = (queue.clone(), Arc::downgrade(context));
    context.caches.nodes.on_change(move |delta: &Delta<Node>| {
        let Delta::Applied { new, old } = delta else {
            return;
        };
        let was = old.as_ref().is_some_and(|old| super::node_is_ready(old));
        if let Some(context) = weak.upgrade().filter(|_| super::node_is_ready(new) && !was) {
            for volume in context.caches.volumes.all() {
                nodes.add(ObjectKey::of(&volume.metadata));
            }
        }
    });
    let controller = Reclaim {
        context: Arc::clone(context),
        remover,
    };
    super::spawn_workers(controller, &queue, WORKER_COUNT, context, tasks, shutdown);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn volume(policy: &str, phase: &str, more: &Value) -> PersistentVolume {
        let volume = json!({
            "metadata": {"name": "pvc-1", "finalizers": [IN_USE],
                "annotations": {PROVISIONED_BY: PROVISIONER}},
            "spec": {"persistentVolumeReclaimPolicy": policy,
                "claimRef": {"uid": "u"},
                "hostPath": {"path": "/var/lib/gantry/volumes/pvc-1"},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                    {"key": "kubernetes.io/hostname", "operator": "In", "values": ["n"]}]}]}}},
            "status": {"phase": phase},
        });
        serde_json::from_value(gantry_api::merge::json_merge(&volume, more)).unwrap()
    }

    #[test]
    fn only_released_volumes_of_class_local_are_removed() {
        let none = json!({});
        assert_eq!(plan(&volume("Delete", "Bound", &none)), Step::Nothing);
        assert_eq!(plan(&volume("Retain", "Released", &none)), Step::Nothing);
        let removed = Step::Remove("n".to_owned());
        assert_eq!(plan(&volume("Delete", "Released", &none)), removed);
        let foreign = [
            json!({"metadata": {"annotations": {PROVISIONED_BY: "x"}}}),
            json!({"spec": {"hostPath": {"path": "/etc"}}}),
            json!({"spec": {"hostPath": {"path": "/var/lib/gantry/volumes/pvc-2"}}}),
            json!({"spec": {"nodeAffinity": null}}),
        ];
        for more in foreign {
            assert_eq!(
                plan(&volume("Delete", "Released", &more)),
                Step::Fail,
                "{more}"
            );
        }
        assert_eq!(plan(&volume("Delete", "Failed", &none)), Step::Nothing);
    }

    #[test]
    fn a_volume_that_is_bound_stays_until_its_claim_is_gone() {
        let bare = volume(
            "Retain",
            "Available",
            &json!({"metadata": {"finalizers": null}}),
        );
        assert_eq!(plan(&bare), Step::Protect);
        let leaving = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
        assert_eq!(plan(&volume("Retain", "Bound", &leaving)), Step::Nothing);
        assert_eq!(plan(&volume("Retain", "Released", &leaving)), Step::Release);
        assert_eq!(plan(&volume("Delete", "Failed", &leaving)), Step::Release);
        let mut free = leaving;
        free["spec"] = json!({"claimRef": null});
        assert_eq!(plan(&volume("Retain", "Available", &free)), Step::Release);
    }
}
