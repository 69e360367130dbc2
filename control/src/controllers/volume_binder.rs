//! Volumes: which claim has which volume, where new ones are made, and what becomes of old ones.
//!
//! ```text
//!  claim ─► Pending ─ static: the smallest free volume that satisfies it ──────────┐
//!              │      class with provisioner gantry.io/local: a directory of the   ├─► Bound ─► claim deleted
//!              │      node that the first pod with the claim was placed on ────────┘              │
//!              └ WaitForFirstConsumer: not before that pod has a node      volume: Released ◄─────┘
//!                                                                          then: `volume_reclaim`
//! ```
//! The volume's `spec.claimRef` with the claim's uid decides: it is written first, and a claim whose
//! volume says otherwise is not bound. A claim that a pod uses stays until the pod is gone (finalizer
//! [`CLAIM_IN_USE`]), a volume that is bound until its claim is gone (`volume_reclaim`).
//!
//! Source: Kubernetes `pkg/controller/volume/persistentvolume`, `pvcprotection`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{
    HostPathVolumeSource, Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm,
    ObjectReference, PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimSpec,
    PersistentVolumeSpec, Pod, VolumeNodeAffinity,
};
use gantry_api::k8s_openapi::api::storage::v1::StorageClass;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use gantry_api::quantity::Quantity;
use gantry_api::selector::Selector;
use gantry_api::status::{Reason, Status};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{Delta, ObjectKey};
use super::queue::WorkQueue;
use super::{Context, Controller, EventType, event_about, pods};
use crate::scheduler::node_satisfies;

/// The provisioner of class `local`.
pub(crate) const PROVISIONER: &str = "gantry.io/local";
/// Where volumes of class `local` are on a node.
pub(super) const LOCAL_VOLUMES: &str = "/var/lib/gantry/volumes";
/// Keeps a claim while a pod uses it.
const CLAIM_IN_USE: &str = "kubernetes.io/pvc-protection";
/// Who made a volume.
pub(super) const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
/// A claim that waits is looked at again after this, whatever happened.
const RESYNC: Duration = Duration::from_secs(15);

/// What a claim needs next.
#[derive(Debug, PartialEq)]
enum Step {
    /// Nothing: it is as it should be.
    Nothing,
    /// The claim's status says otherwise than this phase.
    Phase(&'static str),
    /// This volume is to be the claim's.
    Bind(String),
    /// A volume is to be made on this node.
    Provision(String),
    /// It waits; the reason is for the user.
    Wait(&'static str, String),
}

/// What a claim is judged by.
struct Observed<'a> {
    claim: &'a PersistentVolumeClaim,
    class: Option<&'a StorageClass>,
    volumes: &'a [Arc<PersistentVolume>],
    /// The node of the first pod that uses the claim, once it has one.
    node: Option<&'a Node>,
    /// Some pod uses it.
    is_used: bool,
}

fn bytes(
    list: Option<
        &BTreeMap<String, gantry_api::k8s_openapi::apimachinery::pkg::api::resource::Quantity>,
    >,
) -> i64 {
    let text = list.and_then(|list| list.get("storage"));
    text.and_then(|text| Quantity::parse(&text.0).ok())
        .map_or(0, |size| size.units())
}

/// Whether the volume is meant for this claim alone, whether bound or reserved by its author.
fn is_reserved(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Option<bool> {
    let reference = volume.spec.as_ref()?.claim_ref.as_ref()?;
    let same_name =
        reference.namespace == claim.metadata.namespace && reference.name == claim.metadata.name;
    let same_uid = reference.uid.is_none() || reference.uid == claim.metadata.uid;
    Some(same_name && same_uid)
}

/// Whether the volume can serve the claim on this node (if one is known).
pub(crate) fn satisfies(
    volume: &PersistentVolume,
    claim: &PersistentVolumeClaim,
    node: Option<&Node>,
) -> bool {
    let (Some(has), Some(wants)) = (&volume.spec, &claim.spec) else {
        return false;
    };
    if volume.metadata.deletion_timestamp.is_some() || is_reserved(volume, claim) == Some(false) {
        return false;
    }
    let class = |name: &Option<String>| name.clone().unwrap_or_default();
    let requests = wants.resources.as_ref().and_then(|r| r.requests.as_ref());
    let modes = has.access_modes.as_deref().unwrap_or_default();
    let mut wanted_modes = wants.access_modes.iter().flatten();
    let labels = volume.metadata.labels.clone().unwrap_or_default();
    let selected = wants.selector.as_ref().is_none_or(|selector| {
        Selector::from_api(selector).is_ok_and(|selector| selector.matches(&labels))
    });
    let affinity = has
        .node_affinity
        .as_ref()
        .and_then(|affinity| affinity.required.as_ref());
    class(&has.storage_class_name) == class(&wants.storage_class_name)
        && has.volume_mode == wants.volume_mode
        && bytes(has.capacity.as_ref()) >= bytes(requests)
        && wanted_modes.all(|mode| modes.contains(mode))
        && selected
        && node
            .zip(affinity)
            .is_none_or(|(node, required)| node_satisfies(node, required))
}

/// Decides what one claim needs.
fn plan(observed: &Observed<'_>) -> Step {
    let claim = observed.claim;
    let Some(spec) = &claim.spec else {
        return Step::Nothing;
    };
    let phase = claim
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    let named = spec.volume_name.as_deref().filter(|name| !name.is_empty());
    let find = |name: &str| {
        let mut all = observed.volumes.iter();
        all.find(|volume| volume.metadata.name.as_deref() == Some(name))
    };
    if let Some(name) = named {
        return match find(name) {
            None if phase == Some("Bound") => Step::Phase("Lost"),
            None => Step::Wait(
                "FailedBinding",
                format!("volume {name:?} does not exist yet"),
            ),
            Some(volume) => match is_reserved(volume, claim) {
                Some(true) if has_uid(volume) && phase != Some("Bound") => Step::Phase("Bound"),
                Some(true) if has_uid(volume) => Step::Nothing,
                Some(false) => Step::Wait(
                    "FailedBinding",
                    format!("volume {name:?} has another claim"),
                ),
                _ => Step::Bind(name.to_owned()),
            },
        };
    }
    if claim.metadata.deletion_timestamp.is_some() {
        return Step::Nothing;
    }
    // Written into the volume, not yet into the claim.
    let ours = observed.volumes.iter().find(|volume| {
        is_reserved(volume, claim) == Some(true) && volume.metadata.deletion_timestamp.is_none()
    });
    if let Some(name) = ours.and_then(|volume| volume.metadata.name.clone()) {
        return Step::Bind(name);
    }
    let provisioned = observed
        .class
        .is_some_and(|class| class.provisioner == PROVISIONER);
    let waits = provisioned
        || observed.class.is_some_and(|class| {
            class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer")
        });
    if waits && observed.node.is_none() {
        let text = match observed.is_used {
            true => "waiting for the pod that uses it to be scheduled",
            false => "waiting for first consumer to be created before binding",
        };
        return Step::Wait("WaitForFirstConsumer", text.to_owned());
    }
    let fitting = observed
        .volumes
        .iter()
        .filter(|v| satisfies(v, claim, observed.node));
    let best = fitting.min_by_key(|volume| {
        let spec = volume.spec.as_ref();
        (
            bytes(spec.and_then(|spec| spec.capacity.as_ref())),
            volume.metadata.name.clone(),
        )
    });
    if let Some(name) = best.and_then(|volume| volume.metadata.name.clone()) {
        return Step::Bind(name);
    }
    match (
        observed.node.and_then(|node| node.metadata.name.clone()),
        observed.class,
    ) {
        (Some(node), Some(_)) if provisioned && spec.selector.is_none() => Step::Provision(node),
        (_, Some(class)) if !provisioned && class.provisioner != "kubernetes.io/no-provisioner" => {
            let text = format!(
                "nobody here provisions {:?}: make a volume by hand or use class local",
                class.provisioner
            );
            Step::Wait("ExternalProvisioning", text)
        }
        (_, None)
            if spec
                .storage_class_name
                .as_ref()
                .is_some_and(|name| !name.is_empty()) =>
        {
            let name = spec.storage_class_name.as_deref().unwrap_or_default();
            Step::Wait(
                "ProvisioningFailed",
                format!("storageclass.storage.k8s.io {name:?} not found"),
            )
        }
        _ => {
            let text = "no persistent volumes available for this claim and no storage class is set";
            Step::Wait("FailedBinding", text.to_owned())
        }
    }
}

fn has_uid(volume: &PersistentVolume) -> bool {
    let reference = volume
        .spec
        .as_ref()
        .and_then(|spec| spec.claim_ref.as_ref());
    reference.is_some_and(|reference| reference.uid.is_some())
}

/// A directory of a node as the claim's volume.
fn local_volume(
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
    node: &str,
) -> PersistentVolume {
    let uid = claim.metadata.uid.clone().unwrap_or_default();
    let name = format!("pvc-{uid}");
    let empty = PersistentVolumeClaimSpec::default();
    let spec = claim.spec.as_ref().unwrap_or(&empty);
    let requests = spec.resources.as_ref().and_then(|r| r.requests.clone());
    let on_node = NodeSelectorRequirement {
        key: "kubernetes.io/hostname".to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    PersistentVolume {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            annotations: Some([(PROVISIONED_BY.to_owned(), PROVISIONER.to_owned())].into()),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeSpec {
            access_modes: spec.access_modes.clone(),
            capacity: requests,
            claim_ref: Some(reference(claim)),
            storage_class_name: spec.storage_class_name.clone(),
            volume_mode: spec.volume_mode.clone(),
            persistent_volume_reclaim_policy: class.reclaim_policy.clone(),
            // The node's agent makes the directory when the first pod mounts it.
            host_path: Some(HostPathVolumeSource {
                path: format!("{LOCAL_VOLUMES}/{name}"),
                type_: Some("DirectoryOrCreate".to_owned()),
            }),
            node_affinity: Some(VolumeNodeAffinity {
                required: Some(NodeSelector {
                    node_selector_terms: vec![NodeSelectorTerm {
                        match_expressions: Some(vec![on_node]),
                        match_fields: None,
                    }],
                }),
            }),
            ..PersistentVolumeSpec::default()
        }),
        status: None,
    }
}

fn reference(claim: &PersistentVolumeClaim) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("PersistentVolumeClaim".to_owned()),
        namespace: claim.metadata.namespace.clone(),
        name: claim.metadata.name.clone(),
        uid: claim.metadata.uid.clone(),
        resource_version: claim.metadata.resource_version.clone(),
        ..ObjectReference::default()
    }
}

struct Claims {
    context: Arc<Context>,
}

impl Claims {
    async fn event(&self, claim: &PersistentVolumeClaim, reason: &str, message: String) {
        let type_ = match reason {
            "FailedBinding" | "ProvisioningFailed" => EventType::Warning,
            _ => EventType::Normal,
        };
        let event = event_about(claim, Self::NAME, type_, reason, message);
        self.context.registry.event(event).await;
    }

    /// The volume first: it decides.
    async fn bind(&self, claim: &PersistentVolumeClaim, name: &str) -> Result<(), Status> {
        let registry = &self.context.registry;
        let Some(mut volume) = registry.get::<PersistentVolume>("", name)? else {
            return Ok(());
        };
        if is_reserved(&volume, claim) == Some(false) {
            return Err(Status::new(
                Reason::Conflict,
                format!("volume {name} was taken"),
            ));
        }
        if !has_uid(&volume) {
            volume.spec.get_or_insert_default().claim_ref = Some(reference(claim));
            registry.update(&volume).await?;
        }
        let mut claim = claim.clone();
        let spec = claim.spec.get_or_insert_default();
        if spec.volume_name.as_deref() != Some(name) {
            spec.volume_name = Some(name.to_owned());
            claim = registry.update(&claim).await?;
        }
        self.set_phase(&claim, "Bound", Some(&volume)).await?;
        self.set_volume_phase(&volume, "Bound").await
    }

    async fn set_phase(
        &self,
        claim: &PersistentVolumeClaim,
        phase: &str,
        volume: Option<&PersistentVolume>,
    ) -> Result<(), Status> {
        let mut claim = claim.clone();
        let status = claim.status.get_or_insert_default();
        let old = status.clone();
        status.phase = Some(phase.to_owned());
        if let Some(spec) = volume.and_then(|volume| volume.spec.as_ref()) {
            status.access_modes.clone_from(&spec.access_modes);
            status.capacity.clone_from(&spec.capacity);
        }
        if *status == old {
            return Ok(());
        }
        super::ignore_not_found(self.context.registry.update_status(&claim).await)
    }

    async fn set_volume_phase(&self, volume: &PersistentVolume, phase: &str) -> Result<(), Status> {
        let registry = &self.context.registry;
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        let Some(mut volume) = registry.get::<PersistentVolume>("", name)? else {
            return Ok(());
        };
        let status = volume.status.get_or_insert_default();
        if status.phase.as_deref() == Some(phase) {
            return Ok(());
        }
        status.phase = Some(phase.to_owned());
        super::ignore_not_found(registry.update_status(&volume).await)
    }

    /// Protects a claim that lives; lets one go that nobody uses.
    async fn protect(
        &self,
        claim: &PersistentVolumeClaim,
        is_used: bool,
    ) -> Result<PersistentVolumeClaim, Status> {
        let mut claim = claim.clone();
        let leaving = claim.metadata.deletion_timestamp.is_some();
        let finalizers = claim.metadata.finalizers.get_or_insert_default();
        let has = finalizers.iter().any(|f| f == CLAIM_IN_USE);
        if !leaving && !has {
            finalizers.push(CLAIM_IN_USE.to_owned());
        } else if leaving && has && !is_used {
            finalizers.retain(|f| f != CLAIM_IN_USE);
        } else {
            return Ok(claim);
        }
        self.context.registry.update(&claim).await
    }

    /// The pods of the namespace that use the claim and have not ended.
    fn users(&self, key: &ObjectKey) -> Vec<Arc<Pod>> {
        let mut users = self.context.caches.pods.in_namespace(&key.namespace);
        users.retain(|pod| !pods::is_finished(pod) && pods::claims(pod).contains(&key.name));
        users
    }
}

impl Controller for Claims {
    const NAME: &'static str = "persistentvolume-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let caches = &self.context.caches;
        if key.namespace.is_empty() {
            return self.reconcile_volume(key).await;
        }
        let Some(claim) = caches.claims.get(key) else {
            return Ok(None);
        };
        let users = self.users(key);
        let claim = match self.protect(&claim, !users.is_empty()).await {
            Err(status) if status.reason == Reason::NotFound => return Ok(None),
            result => result?,
        };
        let class = claim
            .spec
            .as_ref()
            .and_then(|spec| spec.storage_class_name.as_deref());
        let class = class.and_then(|name| caches.storage_classes.get(&ObjectKey::new("", name)));
        let node = users.iter().find_map(|pod| pods::node(pod));
        let node = node.and_then(|name| caches.nodes.get(&ObjectKey::new("", name)));
        let observed = Observed {
            claim: &claim,
            class: class.as_deref(),
            volumes: &caches.volumes.all(),
            node: node.as_deref(),
            is_used: !users.is_empty(),
        };
        match plan(&observed) {
            Step::Nothing => return Ok(None),
            Step::Phase("Bound") => {
                let name = claim
                    .spec
                    .as_ref()
                    .and_then(|spec| spec.volume_name.clone());
                self.bind(&claim, &name.unwrap_or_default()).await?;
            }
            Step::Phase(phase) => {
                self.set_phase(&claim, phase, None).await?;
                let text = "Bound claim has lost its PersistentVolume: its data is gone with it";
                self.event(&claim, "ClaimLost", text.to_owned()).await;
            }
            Step::Bind(name) => self.bind(&claim, &name).await?,
            Step::Provision(node) => {
                let Some(class) = &class else { return Ok(None) };
                let volume = local_volume(&claim, class, &node);
                match self.context.registry.create(&volume).await {
                    Err(status) if status.reason != Reason::AlreadyExists => return Err(status),
                    _ => {}
                }
                let name = volume.metadata.name.clone().unwrap_or_default();
                self.bind(&claim, &name).await?;
                let text = format!("Successfully provisioned volume {name} on node {node}");
                self.event(&claim, "ProvisioningSucceeded", text).await;
            }
            Step::Wait(reason, message) => {
                self.set_phase(&claim, "Pending", None).await?;
                self.event(&claim, reason, message).await;
                return Ok(Some(RESYNC));
            }
        }
        Ok(None)
    }
}

impl Claims {
    async fn reconcile_volume(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let Some(volume) = self.context.caches.volumes.get(key) else {
            return Ok(None);
        };
        let claim_ref = volume
            .spec
            .as_ref()
            .and_then(|spec| spec.claim_ref.as_ref());
        let Some(claim_ref) = claim_ref.filter(|claim_ref| claim_ref.uid.is_some()) else {
            self.set_volume_phase(&volume, "Available").await?;
            return Ok(None);
        };
        let namespace = claim_ref.namespace.as_deref().unwrap_or_default();
        let name = claim_ref.name.as_deref().unwrap_or_default();
        let claim: Option<PersistentVolumeClaim> = self.context.registry.get(namespace, name)?;
        let lives = claim.is_some_and(|claim| claim.metadata.uid == claim_ref.uid);
        let phase = volume.status.as_ref().and_then(|s| s.phase.as_deref());
        if lives {
            self.set_volume_phase(&volume, "Bound").await?;
        } else if phase != Some("Failed") {
            self.set_volume_phase(&volume, "Released").await?;
        }
        Ok(None)
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let caches = &context.caches;
    let (own, weak) = (queue.clone(), Arc::downgrade(context));
    caches
        .claims
        .on_change(move |delta: &Delta<PersistentVolumeClaim>| {
            own.add(ObjectKey::of(&delta.object().metadata));
            // The volume of a claim that goes is released.
            let name = delta
                .object()
                .spec
                .as_ref()
                .and_then(|spec| spec.volume_name.clone());
            if let (Delta::Deleted(_), Some(name), Some(_)) = (delta, name, weak.upgrade()) {
                own.add(ObjectKey::new("", name));
            }
        });
    let (volumes, weak) = (queue.clone(), Arc::downgrade(context));
    caches
        .volumes
        .on_change(move |delta: &Delta<PersistentVolume>| {
            volumes.add(ObjectKey::of(&delta.object().metadata));
            let Some(context) = weak.upgrade() else {
                return;
            };
            // A free volume may be what a claim waits for; a lost one is what a claim had.
            for claim in context.caches.claims.all() {
                volumes.add(ObjectKey::of(&claim.metadata));
            }
        });
    let users = queue.clone();
    caches.pods.on_change(move |delta: &Delta<Pod>| {
        for pod in delta.states() {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            for claim in pods::claims(pod) {
                users.add(ObjectKey::new(namespace, claim));
            }
        }
    });
    let (classes, weak) = (queue.clone(), Arc::downgrade(context));
    caches
        .storage_classes
        .on_change(move |_: &Delta<StorageClass>| {
            let Some(context) = weak.upgrade() else {
                return;
            };
            for claim in context.caches.claims.all() {
                classes.add(ObjectKey::of(&claim.metadata));
            }
        });
    let controller = Claims {
        context: Arc::clone(context),
    };
    // One worker: two claims must not choose the same volume from one view.
    super::spawn_workers(controller, &queue, 1, context, tasks, shutdown);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn claim(name: &str, size: i64, class: &str) -> PersistentVolumeClaim {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "a", "uid": name},
            "spec": {"storageClassName": class, "accessModes": ["ReadWriteOnce"],
                "volumeMode": "Filesystem",
                "resources": {"requests": {"storage": size.to_string()}}},
        }))
        .unwrap()
    }

    fn volume(name: &str, size: i64, node: Option<&str>) -> PersistentVolume {
        let terms = node.map(|node| {
            json!({"required": {"nodeSelectorTerms": [{"matchExpressions": [
            {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}]}})
        });
        serde_json::from_value(json!({
            "metadata": {"name": name},
            "spec": {"capacity": {"storage": size.to_string()}, "accessModes": ["ReadWriteOnce"],
                "storageClassName": "disk", "volumeMode": "Filesystem", "nodeAffinity": terms},
        }))
        .unwrap()
    }

    fn class(mode: &str, provisioner: &str) -> StorageClass {
        serde_json::from_value(json!({
            "metadata": {"name": "disk"}, "provisioner": provisioner, "volumeBindingMode": mode,
        }))
        .unwrap()
    }

    fn node(name: &str) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        }))
        .unwrap()
    }

    #[test]
    fn a_claim_waits_for_its_pod_and_then_stays_on_its_node() {
        let wanted = claim("c", 5, "disk");
        let class = class("WaitForFirstConsumer", "kubernetes.io/no-provisioner");
        let volumes: Vec<_> = [volume("far", 5, Some("b")), volume("near", 9, Some("a"))]
            .into_iter()
            .map(Arc::new)
            .collect();
        let judged = |node: Option<&Node>| {
            plan(&Observed {
                claim: &wanted,
                class: Some(&class),
                volumes: &volumes,
                node,
                is_used: true,
            })
        };
        assert!(matches!(
            judged(None),
            Step::Wait("WaitForFirstConsumer", _)
        ));
        assert_eq!(judged(Some(&node("a"))), Step::Bind("near".to_owned()));
        assert!(matches!(judged(Some(&node("c"))), Step::Wait(..)));
    }

    #[test]
    fn class_local_makes_a_directory_of_the_pods_node() {
        let (wanted, class) = (
            claim("c", 5, "disk"),
            class("WaitForFirstConsumer", PROVISIONER),
        );
        let a = node("a");
        let observed = Observed {
            claim: &wanted,
            class: Some(&class),
            volumes: &[],
            node: Some(&a),
            is_used: true,
        };
        assert_eq!(plan(&observed), Step::Provision("a".to_owned()));
        let made = local_volume(&wanted, &class, "a");
        assert!(satisfies(&made, &wanted, Some(&a)));
        assert!(!satisfies(&made, &claim("other", 5, "disk"), Some(&a)));
    }

    proptest! {
        /// However claims and volumes come, no volume gets two claims and none that is too small.
        #[test]
        fn no_volume_is_given_twice(
            sizes in proptest::collection::vec(1_i64..10, 0..8),
            wanted in proptest::collection::vec(1_i64..10, 0..8),
        ) {
            let class = class("Immediate", "kubernetes.io/no-provisioner");
            let mut volumes: Vec<Arc<PersistentVolume>> = sizes.iter().enumerate()
                .map(|(i, size)| Arc::new(volume(&format!("v{i}"), *size, None))).collect();
            let claims: Vec<_> = wanted.iter().enumerate()
                .map(|(i, size)| claim(&format!("c{i}"), *size, "disk")).collect();
            let mut given = BTreeMap::new();
            for one in &claims {
                let step = plan(&Observed {
                    claim: one, class: Some(&class), volumes: &volumes, node: None, is_used: false,
                });
                if let Step::Bind(name) = step {
                    let at = volumes.iter().position(|v| v.metadata.name.as_ref() == Some(&name)).unwrap();
                    let mut bound = PersistentVolume::clone(&volumes[at]);
                    prop_assert!(bytes(bound.spec.as_ref().unwrap().capacity.as_ref())
                        >= bytes(one.spec.as_ref().unwrap().resources.as_ref().unwrap().requests.as_ref()));
                    bound.spec.as_mut().unwrap().claim_ref = Some(reference(one));
                    volumes[at] = Arc::new(bound);
                    prop_assert!(given.insert(name, one.metadata.name.clone()).is_none());
                }
            }
            let largest_free = sizes.iter().enumerate()
                .filter(|(i, _)| !given.contains_key(&format!("v{i}"))).map(|(_, s)| *s).max();
            for (one, size) in claims.iter().zip(&wanted) {
                let has = given.values().any(|name| *name == one.metadata.name);
                prop_assert!(has || largest_free.is_none_or(|free| free < *size));
            }
        }
    }
}
