//! Rules for volumes, claims, classes of storage and of priority.

use super::sets::immutable;
use super::{each, names, one_of, volume as sources};
use crate::field::{FieldError, Path};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimSpec,
    PersistentVolumeSpec, SecretReference,
};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use k8s_openapi::api::storage::v1::StorageClass;

const ACCESS_MODES: [&str; 4] = [
    "ReadWriteOnce",
    "ReadOnlyMany",
    "ReadWriteMany",
    "ReadWriteOncePod",
];
/// Higher values are for the classes of the system.
const PRIORITY_MAX: i32 = 1_000_000_000;
/// Classes that every cluster has, with their values.
pub const SYSTEM_PRIORITIES: [(&str, i32); 2] = [
    ("system-cluster-critical", 2_000_000_000),
    ("system-node-critical", 2_000_001_000),
];

fn access_modes(modes: Option<&Vec<String>>, path: &Path, errors: &mut Vec<FieldError>) {
    let modes = modes.map(Vec::as_slice).unwrap_or_default();
    if modes.is_empty() {
        errors.push(FieldError::required(
            path,
            "at least 1 access mode is required",
        ));
    }
    for (i, mode) in modes.iter().enumerate() {
        one_of(&path.index(i), Some(mode), &ACCESS_MODES, errors);
    }
}

fn size(text: Option<&str>, path: &Path, errors: &mut Vec<FieldError>) {
    match text.map(|text| (text, Quantity::parse(text))) {
        None => errors.push(FieldError::required(path, "")),
        Some((text, Ok(size))) if size.units() <= 0 => {
            errors.push(FieldError::invalid(path, text, "must be greater than zero"));
        }
        Some((text, Err(error))) => {
            errors.push(FieldError::invalid(path, text, &error.to_string()));
        }
        Some(_) => {}
    }
}

/// A PersistentVolume.
pub fn persistent_volume(volume: &PersistentVolume) -> Vec<FieldError> {
    let path = Path::new("spec");
    let Some(spec) = &volume.spec else {
        return vec![FieldError::required(&path, "")];
    };
    let mut errors = Vec::new();
    access_modes(
        spec.access_modes.as_ref(),
        &path.child("accessModes"),
        &mut errors,
    );
    let storage = spec.capacity.as_ref().and_then(|list| list.get("storage"));
    let at = path.child("capacity").key("storage");
    size(
        storage.map(|quantity| quantity.0.as_str()),
        &at,
        &mut errors,
    );
    let policy = spec.persistent_volume_reclaim_policy.as_deref();
    let at = path.child("persistentVolumeReclaimPolicy");
    one_of(&at, policy, &["Retain", "Delete"], &mut errors);
    match source_count(spec) {
        0 => errors.push(FieldError::required(&path, "must specify a volume type")),
        1 => {}
        _ => errors.push(FieldError::forbidden(
            &path,
            "may not specify more than 1 volume type",
        )),
    }
    for (field, source) in [
        (
            "hostPath",
            spec.host_path.as_ref().map(|source| &source.path),
        ),
        ("local", spec.local.as_ref().map(|source| &source.path)),
    ] {
        if let Some(text) = source {
            let at = path.child(field).child("path");
            if !text.starts_with('/') || text.split('/').any(|part| part == "..") {
                let detail = "must be an absolute path without '..'";
                errors.push(FieldError::invalid(&at, text.as_str(), detail));
            }
        }
    }
    if let Some(source) = &spec.csi {
        csi(source, &path.child("csi"), &mut errors);
    }
    if let Some(source) = &spec.nfs {
        let path = path.child("nfs");
        sources::nfs(&source.server, &source.path, &path, &mut errors);
    }
    if spec.local.is_some() && spec.node_affinity.is_none() {
        let at = path.child("nodeAffinity");
        errors.push(FieldError::required(
            &at,
            "Local volume requires node affinity",
        ));
    }
    errors
}

/// How many sources are given, those that Gantry refuses by path included.
fn source_count(spec: &PersistentVolumeSpec) -> usize {
    let given = [
        spec.csi.is_some(),
        spec.host_path.is_some(),
        spec.local.is_some(),
        spec.nfs.is_some(),
        spec.aws_elastic_block_store.is_some(),
        spec.azure_disk.is_some(),
        spec.azure_file.is_some(),
        spec.cephfs.is_some(),
        spec.cinder.is_some(),
        spec.fc.is_some(),
        spec.flex_volume.is_some(),
        spec.flocker.is_some(),
        spec.gce_persistent_disk.is_some(),
        spec.glusterfs.is_some(),
        spec.iscsi.is_some(),
        spec.photon_persistent_disk.is_some(),
        spec.portworx_volume.is_some(),
        spec.quobyte.is_some(),
        spec.rbd.is_some(),
        spec.scale_io.is_some(),
        spec.storageos.is_some(),
        spec.vsphere_volume.is_some(),
    ];
    given.iter().filter(|is_set| **is_set).count()
}

fn csi(source: &CSIPersistentVolumeSource, path: &Path, errors: &mut Vec<FieldError>) {
    sources::csi_driver(&path.child("driver"), &source.driver, errors);
    if source.volume_handle.is_empty() {
        errors.push(FieldError::required(&path.child("volumeHandle"), ""));
    }
    for (field, secret) in [
        (
            "controllerExpandSecretRef",
            &source.controller_expand_secret_ref,
        ),
        (
            "controllerPublishSecretRef",
            &source.controller_publish_secret_ref,
        ),
        ("nodeExpandSecretRef", &source.node_expand_secret_ref),
        ("nodePublishSecretRef", &source.node_publish_secret_ref),
        ("nodeStageSecretRef", &source.node_stage_secret_ref),
    ] {
        if let Some(secret) = secret {
            secret_reference(secret, &path.child(field), errors);
        }
    }
}

fn secret_reference(secret: &SecretReference, path: &Path, errors: &mut Vec<FieldError>) {
    for (field, text, is_label) in [
        ("name", &secret.name, false),
        ("namespace", &secret.namespace, true),
    ] {
        let field = path.child(field);
        match text.as_deref().filter(|text| !text.is_empty()) {
            None => errors.push(FieldError::required(&field, "")),
            Some(text) if is_label => each(&field, text, names::dns1123_label(text), errors),
            Some(text) => each(&field, text, names::dns1123_subdomain(text), errors),
        }
    }
}

/// Where a volume is never changes.
pub fn persistent_volume_update(new: &PersistentVolume, old: &PersistentVolume) -> Vec<FieldError> {
    let (Some(new), Some(old)) = (&new.spec, &old.spec) else {
        return Vec::new();
    };
    let (mut errors, path) = (Vec::new(), Path::new("spec"));
    immutable(&new.local, &old.local, &path.child("local"), &mut errors);
    immutable(&new.csi, &old.csi, &path.child("csi"), &mut errors);
    immutable(&new.nfs, &old.nfs, &path.child("nfs"), &mut errors);
    immutable(
        &new.host_path,
        &old.host_path,
        &path.child("hostPath"),
        &mut errors,
    );
    immutable(
        &new.volume_mode,
        &old.volume_mode,
        &path.child("volumeMode"),
        &mut errors,
    );
    if old.node_affinity.is_some() {
        let at = path.child("nodeAffinity");
        immutable(&new.node_affinity, &old.node_affinity, &at, &mut errors);
    }
    errors
}

/// A PersistentVolumeClaim.
pub fn persistent_volume_claim(claim: &PersistentVolumeClaim) -> Vec<FieldError> {
    let mut errors = Vec::new();
    claim_spec(claim.spec.as_ref(), &Path::new("spec"), &mut errors);
    errors
}

/// The spec of a claim, in a claim or in a template.
pub fn claim_spec(
    spec: Option<&PersistentVolumeClaimSpec>,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    let Some(spec) = spec else {
        errors.push(FieldError::required(path, ""));
        return;
    };
    access_modes(
        spec.access_modes.as_ref(),
        &path.child("accessModes"),
        errors,
    );
    let requests = spec.resources.as_ref().and_then(|r| r.requests.as_ref());
    let storage = requests.and_then(|list| list.get("storage"));
    let at = path.child("resources").child("requests").key("storage");
    size(storage.map(|quantity| quantity.0.as_str()), &at, errors);
    for (field, name) in [
        ("storageClassName", &spec.storage_class_name),
        ("volumeName", &spec.volume_name),
    ] {
        if let Some(name) = name.as_deref().filter(|name| !name.is_empty()) {
            super::each(
                &path.child(field),
                name,
                names::dns1123_subdomain(name),
                errors,
            );
        }
    }
}

/// A claim's spec never changes once it is bound, but for its volume's name and its size.
pub fn persistent_volume_claim_update(
    new: &PersistentVolumeClaim,
    old: &PersistentVolumeClaim,
) -> Vec<FieldError> {
    let (Some(new), Some(old)) = (&new.spec, &old.spec) else {
        return Vec::new();
    };
    let mut same = new.clone();
    if old.volume_name.as_ref().is_none_or(String::is_empty) {
        same.volume_name.clone_from(&old.volume_name);
    }
    // The default class is filled in later than the claim is made.
    if old.storage_class_name.is_none() {
        same.storage_class_name.clone_from(&old.storage_class_name);
    }
    if same == *old {
        return Vec::new();
    }
    let detail = "spec is immutable after creation except resources.requests for bound claims";
    vec![FieldError::forbidden(&Path::new("spec"), detail)]
}

/// A StorageClass.
pub fn storage_class(class: &StorageClass) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if class.provisioner.is_empty() {
        errors.push(FieldError::required(&Path::new("provisioner"), ""));
    }
    let policy = class.reclaim_policy.as_deref();
    one_of(
        &Path::new("reclaimPolicy"),
        policy,
        &["Delete", "Retain"],
        &mut errors,
    );
    let mode = class.volume_binding_mode.as_deref();
    let modes = ["Immediate", "WaitForFirstConsumer"];
    one_of(&Path::new("volumeBindingMode"), mode, &modes, &mut errors);
    errors
}

/// What a StorageClass makes never changes: claims were bound by it.
pub fn storage_class_update(new: &StorageClass, old: &StorageClass) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let at = |field| Path::new(field);
    immutable(
        &new.provisioner,
        &old.provisioner,
        &at("provisioner"),
        &mut errors,
    );
    immutable(
        &new.parameters,
        &old.parameters,
        &at("parameters"),
        &mut errors,
    );
    immutable(
        &new.reclaim_policy,
        &old.reclaim_policy,
        &at("reclaimPolicy"),
        &mut errors,
    );
    let (new, old) = (&new.volume_binding_mode, &old.volume_binding_mode);
    immutable(new, old, &at("volumeBindingMode"), &mut errors);
    errors
}

/// A PriorityClass.
pub fn priority_class(class: &PriorityClass) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let name = class.metadata.name.as_deref().unwrap_or_default();
    let at = Path::new("value");
    let system = SYSTEM_PRIORITIES.iter().find(|(system, _)| *system == name);
    match (class.value, system) {
        (value, Some((_, expected))) if value == Some(*expected) => {}
        (_, None) if name.starts_with("system-") => {
            let detail =
                "priority class names with 'system-' prefix are reserved for system use only";
            errors.push(FieldError::forbidden(
                &Path::new("metadata").child("name"),
                detail,
            ));
        }
        (Some(value), None) if value > PRIORITY_MAX => {
            let detail =
                format!("maximum allowed value of a user defined priority is {PRIORITY_MAX}");
            errors.push(FieldError::forbidden(&at, &detail));
        }
        (_, Some(_)) => {
            errors.push(FieldError::forbidden(
                &at,
                "the system's classes have fixed values",
            ));
        }
        _ => {}
    }
    let policy = class.preemption_policy.as_deref();
    let policies = ["PreemptLowerPriority", "Never"];
    one_of(
        &Path::new("preemptionPolicy"),
        policy,
        &policies,
        &mut errors,
    );
    errors
}

/// A class's value never changes: pods carry it already.
pub fn priority_class_update(new: &PriorityClass, old: &PriorityClass) -> Vec<FieldError> {
    let mut errors = Vec::new();
    immutable(&new.value, &old.value, &Path::new("value"), &mut errors);
    let (new, old) = (&new.preemption_policy, &old.preemption_policy);
    immutable(new, old, &Path::new("preemptionPolicy"), &mut errors);
    errors
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn volume(source: Value) -> PersistentVolume {
        let mut spec = json!({"accessModes": ["ReadWriteMany"], "capacity": {"storage": "1Gi"}});
        spec.as_object_mut()
            .unwrap()
            .extend(source.as_object().unwrap().clone());
        serde_json::from_value(json!({"metadata": {"name": "v"}, "spec": spec})).unwrap()
    }

    #[test]
    fn what_a_persistent_volume_may_say() {
        let secret = json!({"name": "s", "namespace": "n"});
        let csi = json!({"driver": "a.b", "volumeHandle": "h", "nodePublishSecretRef": secret});
        for fine in [
            json!({"csi": csi}),
            json!({"nfs": {"server": "filer", "path": "/"}, "mountOptions": ["nfsvers=4.2"]}),
            json!({"iscsi": {"targetPortal": "p", "iqn": "q", "lun": 0}}),
        ] {
            let errors = persistent_volume(&volume(fine.clone()));
            assert!(errors.is_empty(), "{fine}: {errors:?}");
        }
        for (bad, field) in [
            (json!({}), "spec"),
            (
                json!({"csi": csi, "nfs": {"server": "a", "path": "/"}}),
                "spec",
            ),
            (
                json!({"csi": {"driver": "a", "volumeHandle": ""}}),
                "spec.csi.volumeHandle",
            ),
            (
                json!({"csi": {"driver": "", "volumeHandle": "h"}}),
                "spec.csi.driver",
            ),
            (
                json!({"csi": {"driver": "a", "volumeHandle": "h",
                    "nodeStageSecretRef": {"name": "s"}}}),
                "spec.csi.nodeStageSecretRef.namespace",
            ),
            (
                json!({"nfs": {"server": "a", "path": "b"}}),
                "spec.nfs.path",
            ),
        ] {
            let errors = persistent_volume(&volume(bad.clone()));
            let fields: Vec<&str> = errors.iter().map(|e| e.field.as_str()).collect();
            assert_eq!(fields, [field], "{bad}");
        }
        let other = json!({"csi": {"driver": "a.b", "volumeHandle": "other"}});
        let errors = persistent_volume_update(&volume(other), &volume(json!({"csi": csi})));
        assert_eq!(errors[0].field, "spec.csi");
    }
}
