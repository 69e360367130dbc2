//! Where the volumes of a pod's claims are, as far as that limits its node.
//!
//! | claim | the pod may go |
//! |---|---|
//! | bound | to nodes of its volume |
//! | unbound, class binds at the first consumer | where a volume is free, or anywhere if one can be made |
//! | unbound, class binds at once; absent | nowhere until that changes |
//!
//! Source: Kubernetes' scheduler plugin VolumeBinding.

use std::collections::BTreeMap;

use gantry_api::k8s_openapi::api::core::v1::{
    NodeSelector, PersistentVolume, PersistentVolumeClaim,
};
use gantry_api::k8s_openapi::api::storage::v1::StorageClass;

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
    pub(super) fn needs(&self, pod: &PodRequest) -> Result<Vec<VolumeNeed>, String> {
        pod.claims
            .iter()
            .map(|name| self.need(&pod.key.namespace, name))
            .collect()
    }

    fn need(&self, namespace: &str, name: &str) -> Result<VolumeNeed, String> {
        let claim = self.claims.get(&ObjectKey::new(namespace, name));
        let claim = claim.ok_or_else(|| format!("persistentvolumeclaim {name:?} not found"))?;
        if claim.metadata.deletion_timestamp.is_some() {
            return Err(format!("persistentvolumeclaim {name:?} is being deleted"));
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
            return Err("pod has unbound immediate PersistentVolumeClaims".to_owned());
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
