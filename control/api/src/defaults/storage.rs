//! Defaults of volumes, claims and classes. Source: Kubernetes' `pkg/apis/{core,storage}/v1`.

use super::text;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use k8s_openapi::api::storage::v1::StorageClass;

/// Defaults of a PersistentVolume.
pub fn persistent_volume(volume: &mut PersistentVolume) {
    let Some(spec) = &mut volume.spec else { return };
    text(&mut spec.persistent_volume_reclaim_policy, "Retain");
    text(&mut spec.volume_mode, "Filesystem");
    if let Some(source) = &mut spec.host_path {
        source.type_.get_or_insert_default();
    }
}

/// Defaults of a PersistentVolumeClaim.
pub fn persistent_volume_claim(claim: &mut PersistentVolumeClaim) {
    if let Some(spec) = &mut claim.spec {
        text(&mut spec.volume_mode, "Filesystem");
    }
}

/// Defaults of a StorageClass.
pub fn storage_class(class: &mut StorageClass) {
    text(&mut class.reclaim_policy, "Delete");
    text(&mut class.volume_binding_mode, "Immediate");
}

/// Defaults of a PriorityClass.
pub fn priority_class(class: &mut PriorityClass) {
    text(&mut class.preemption_policy, "PreemptLowerPriority");
}
