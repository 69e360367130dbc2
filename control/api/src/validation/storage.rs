//! Rules for volumes, claims, classes of storage and of priority.

use super::sets::immutable;
use super::{names, one_of};
use crate::field::{FieldError, Path};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{
    PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimSpec,
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
    let sources = [spec.host_path.is_some(), spec.local.is_some()];
    match sources.iter().filter(|is_set| **is_set).count() {
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
    if spec.local.is_some() && spec.node_affinity.is_none() {
        let at = path.child("nodeAffinity");
        errors.push(FieldError::required(
            &at,
            "Local volume requires node affinity",
        ));
    }
    errors
}

/// Where a volume is never changes.
pub fn persistent_volume_update(new: &PersistentVolume, old: &PersistentVolume) -> Vec<FieldError> {
    let (Some(new), Some(old)) = (&new.spec, &old.spec) else {
        return Vec::new();
    };
    let (mut errors, path) = (Vec::new(), Path::new("spec"));
    immutable(&new.local, &old.local, &path.child("local"), &mut errors);
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
