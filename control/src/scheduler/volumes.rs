//! Where the volumes of a pod's claims are, as far as that limits its node.
//!
//! | claim | the pod may go |
//! |---|---|
//! | bound | to nodes of its volume |
//! | unbound, class binds at the first consumer | where a volume is free, or anywhere if one can be made |
//! | unbound, class binds at once; absent | nowhere until that changes |
//! | ReadWriteOncePod, and another pod has it | nowhere until that pod is gone |
//! | of an ephemeral volume, not made for this pod | nowhere |
//!
//! Source: Kubernetes' scheduler plugin VolumeBinding.

use std::collections::BTreeMap;

use gantry_api::k8s_openapi::api::core::v1::{
    NodeSelector, PersistentVolume, PersistentVolumeClaim,
};
use gantry_api::k8s_openapi::api::storage::v1::StorageClass;

use super::filter::Blocked;
use super::nodes::NodeState;
use super::request::PodRequest;
use crate::controllers::informer::ObjectKey;
use crate::controllers::{PROVISIONER, volume_satisfies};
use crate::server::registry::decode;
use crate::store::Entry;

/// What one claim asks of a node.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct VolumeNeed {
    /// Any of these will do; `None` is every node.
    pub(super) alternatives: Vec<Option<NodeSelector>>,
    pub(super) refusal: &'static str,
}

/// Why no node will do for now.
#[derive(Debug, PartialEq)]
pub(super) struct Waits {
    /// For the user.
    pub(super) why: String,
    /// What else than a change of claims, volumes or classes can help.
    pub(super) blocked: Blocked,
}

impl From<String> for Waits {
    fn from(why: String) -> Self {
        let blocked = Blocked::default();
        Self { why, blocked }
    }
}

/// The claims, volumes and classes there are.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    claims: BTreeMap<ObjectKey, PersistentVolumeClaim>,
    volumes: BTreeMap<ObjectKey, PersistentVolume>,
    classes: BTreeMap<ObjectKey, StorageClass>,
}

impl Volumes {
    /// Takes a change of a kind that is kept here; says whether it is one.
    pub(super) fn apply(&mut self, plural: &str, key: ObjectKey, entry: Option<&Entry>) -> bool {
        fn set<K>(map: &mut BTreeMap<ObjectKey, K>, key: ObjectKey, value: Option<K>) {
            match value {
                Some(value) => map.insert(key, value),
                None => map.remove(&key),
            };
        }
        match plural {
            "persistentvolumeclaims" => {
                set(
                    &mut self.claims,
                    key,
                    entry.and_then(|entry| decode(entry).ok()),
                );
            }
            "persistentvolumes" => {
                set(
                    &mut self.volumes,
                    key,
                    entry.and_then(|entry| decode(entry).ok()),
                );
            }
            "storageclasses" => {
                set(
                    &mut self.classes,
                    key,
                    entry.and_then(|entry| decode(entry).ok()),
                );
            }
            _ => return false,
        }
        true
    }

    /// Forgets everything, before a new list.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// What the claims of a pod ask of its node.
    ///
    /// # Errors
    /// Why no node will do for now.
    pub(super) fn needs(
        &self,
        pod: &PodRequest,
        nodes: &[NodeState],
    ) -> Result<Vec<VolumeNeed>, Waits> {
        let claims = pod.claims.iter();
        claims.map(|name| self.need(pod, name, nodes)).collect()
    }

    fn need(&self, pod: &PodRequest, name: &str, nodes: &[NodeState]) -> Result<VolumeNeed, Waits> {
        let namespace = &pod.key.namespace;
        let claim = self.claims.get(&ObjectKey::new(namespace, name));
        let claim = claim.ok_or_else(|| format!("persistentvolumeclaim {name:?} not found"))?;
        if claim.metadata.deletion_timestamp.is_some() {
            return Err(format!("persistentvolumeclaim {name:?} is being deleted").into());
        }
        let mut owners = claim.metadata.owner_references.iter().flatten();
        let is_own = pod.own_claims.iter().any(|own| own == name);
        if is_own && !owners.any(|owner| *owner.uid == *pod.uid) {
            let why = format!("persistentvolumeclaim {name:?} was not made for this pod");
            return Err(why.into());
        }
        if is_for_one_pod(claim) && is_used_by_another(nodes, pod, name) {
            return Err(Waits {
                why: format!(
                    "persistentvolumeclaim {name:?} has access mode ReadWriteOncePod and is in use \
                     by another pod"
                ),
                blocked: Blocked::ROOM,
            });
        }
        let spec = claim.spec.as_ref();
        let affinity = |volume: &PersistentVolume| {
            volume
                .spec
                .as_ref()?
                .node_affinity
                .as_ref()?
                .required
                .clone()
        };
        let bound = spec.and_then(|spec| spec.volume_name.as_deref());
        if let Some(volume) = bound.filter(|name| !name.is_empty()) {
            let found = self.volumes.get(&ObjectKey::new("", volume));
            let found = found.ok_or_else(|| format!("persistentvolume {volume:?} not found"))?;
            return Ok(VolumeNeed {
                alternatives: vec![affinity(found)],
                refusal: "node(s) had volume node affinity conflict",
            });
        }
        let class = spec.and_then(|spec| spec.storage_class_name.as_deref());
        let class = class.and_then(|class| self.classes.get(&ObjectKey::new("", class)));
        let is_made = class.is_some_and(|class| class.provisioner == PROVISIONER);
        let waits = class.and_then(|class| class.volume_binding_mode.as_deref());
        if !is_made && waits != Some("WaitForFirstConsumer") {
            let why = "pod has unbound immediate PersistentVolumeClaims";
            return Err(why.to_owned().into());
        }
        let free = self
            .volumes
            .values()
            .filter(|volume| volume_satisfies(volume, claim, None));
        let mut alternatives: Vec<_> = free.map(affinity).collect();
        if is_made {
            alternatives.push(None);
        }
        Ok(VolumeNeed {
            alternatives,
            refusal: "node(s) didn't find available persistent volumes to bind",
        })
    }
}

fn is_for_one_pod(claim: &PersistentVolumeClaim) -> bool {
    let modes = claim.spec.as_ref().and_then(|s| s.access_modes.as_ref());
    modes.is_some_and(|modes| modes.iter().any(|mode| mode == "ReadWriteOncePod"))
}

/// Whether a pod that has a node uses the claim.
fn is_used_by_another(nodes: &[NodeState], pod: &PodRequest, name: &str) -> bool {
    let mut placed = nodes.iter().flat_map(|node| node.pods.iter());
    placed.any(|other| {
        let same = other.key.namespace == pod.key.namespace && other.uid != pod.uid;
        same && other.claims.iter().any(|claim| claim == name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::k8s_openapi::api::core::v1::{Node, Pod};
    use serde_json::{Value, json};

    fn pod(name: &str, volume: &Value) -> PodRequest {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "a", "uid": format!("uid of {name}")},
            "spec": {"containers": [], "volumes": [volume]},
        }))
        .unwrap();
        PodRequest::of(&pod).unwrap()
    }

    fn volumes(claim: Value) -> Volumes {
        let mut volumes = Volumes::default();
        let claim: PersistentVolumeClaim = serde_json::from_value(claim).unwrap();
        volumes.claims.insert(ObjectKey::of(&claim.metadata), claim);
        let class: StorageClass = serde_json::from_value(
            json!({"metadata": {"name": "local"}, "provisioner": PROVISIONER}),
        )
        .unwrap();
        volumes.classes.insert(ObjectKey::new("", "local"), class);
        volumes
    }

    #[test]
    fn a_claim_for_one_pod_is_not_shared() {
        let volumes = volumes(
            json!({"metadata": {"name": "c", "namespace": "a"}, "spec": {
            "storageClassName": "local", "accessModes": ["ReadWriteOncePod"]}}),
        );
        let source = json!({"name": "v", "persistentVolumeClaim": {"claimName": "c"}});
        let (first, second) = (pod("first", &source), pod("second", &source));
        let mut node = NodeState::of(&Node::default());
        assert!(volumes.needs(&first, std::slice::from_ref(&node)).is_ok());
        node.pods.push(std::sync::Arc::new(first.clone()));
        let waits = volumes.needs(&second, std::slice::from_ref(&node));
        let waits = waits.unwrap_err();
        assert!(waits.why.contains("ReadWriteOncePod"), "{waits:?}");
        assert_eq!(
            waits.blocked,
            Blocked::ROOM,
            "it tries again when the other is gone"
        );
        assert!(
            volumes.needs(&first, std::slice::from_ref(&node)).is_ok(),
            "its own"
        );
    }

    #[test]
    fn an_ephemeral_volumes_claim_is_the_pods_own_or_none() {
        let claim = |owner: &str| {
            volumes(
                json!({"metadata": {"name": "p-v", "namespace": "a", "ownerReferences": [
                {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": owner}]},
                "spec": {"storageClassName": "local"}}),
            )
        };
        let template = json!({"spec": {"accessModes": ["ReadWriteOnce"]}});
        let source = json!({"name": "v", "ephemeral": {"volumeClaimTemplate": template}});
        let wanted = pod("p", &source);
        assert!(claim("uid of p").needs(&wanted, &[]).is_ok());
        let waits = claim("another").needs(&wanted, &[]).unwrap_err();
        assert!(waits.why.contains("not made for this pod"), "{waits:?}");
    }
}
