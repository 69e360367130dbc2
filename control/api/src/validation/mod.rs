//! Rules that objects must keep, with the path of each field that breaks one.
//!
//! Pure functions from a defaulted object to [`FieldError`]s; the texts are Kubernetes'
//! (`pkg/apis/*/validation/validation.go`). `admission` calls them; nothing else needs to.

mod autoscaler;
mod batch;
mod disruption;
mod job_policy;
mod lifecycle;
mod limit_range;
pub mod names;
mod network_policy;
mod pod;
mod quota;
mod resources;
mod security;
mod service;
mod sets;
mod storage;
mod volume;
mod workload;

pub use autoscaler::horizontal_pod_autoscaler;
pub use batch::{cron_job, job, job_update};
pub use disruption::disruption_budget;
pub use limit_range::limit_range;
pub use network_policy::network_policy;
pub use pod::{MIRROR_ANNOTATION, no_ephemeral, pod, pod_spec, pod_update};
pub use quota::{resource_quota, resource_quota_update};
pub use service::{direct_return, endpoint_slice, least_connections, service, service_update};
pub use sets::{
    daemon_set, daemon_set_update, replication_controller, stateful_set, stateful_set_update,
};
pub use storage::{
    SYSTEM_PRIORITIES, claim_spec, persistent_volume, persistent_volume_claim,
    persistent_volume_claim_update, persistent_volume_update, priority_class,
    priority_class_update, storage_class, storage_class_update,
};
pub use workload::{deployment, deployment_update, replica_set, replica_set_update};

use crate::field::{FieldError, Path};
use crate::kinds::Kind;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::collections::BTreeMap;

/// All annotations of an object together, in bytes.
const ANNOTATIONS_BYTES_MAX: usize = 256 * 1024;
/// All values of a ConfigMap or Secret together, in bytes.
const DATA_BYTES_MAX: usize = 1024 * 1024;
/// Kubernetes' text for a changed field that may not change.
const IMMUTABLE: &str = "field is immutable";

/// What a broken rule about numbers says.
const NOT_NEGATIVE: &str = "must be greater than or equal to 0";

fn each(field: &Path, value: &str, broken: Vec<String>, errors: &mut Vec<FieldError>) {
    errors.extend(
        broken
            .into_iter()
            .map(|rule| FieldError::invalid(field, value, &rule)),
    );
}

fn not_negative(field: &Path, value: Option<i64>, errors: &mut Vec<FieldError>) {
    if let Some(value) = value.filter(|v| *v < 0) {
        errors.push(FieldError::invalid(field, value, NOT_NEGATIVE));
    }
}

/// An enumeration: empty counts as not given.
fn one_of(field: &Path, value: Option<&str>, allowed: &[&str], errors: &mut Vec<FieldError>) {
    if let Some(value) = value.filter(|v| !v.is_empty() && !allowed.contains(v)) {
        errors.push(FieldError::not_supported(field, value, allowed));
    }
}

/// `metadata` of any object. An absent name is fine where `generateName` stands: the registry
/// fills it in.
pub fn metadata(kind: &Kind, meta: &ObjectMeta) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let path = Path::new("metadata");
    let name = meta.name.as_deref().unwrap_or_default();
    let prefix = meta.generate_name.as_deref().unwrap_or_default();
    if name.is_empty() && prefix.is_empty() {
        let detail = "name or generateName is required";
        errors.push(FieldError::required(&path.child("name"), detail));
    }
    if !name.is_empty() {
        each(
            &path.child("name"),
            name,
            object_name(kind, name),
            &mut errors,
        );
    }
    if !prefix.is_empty() {
        // A prefix may end in a dash, since a suffix follows.
        let checked = format!("{prefix}x");
        each(
            &path.child("generateName"),
            prefix,
            object_name(kind, &checked),
            &mut errors,
        );
    }
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    if !kind.namespaced && !namespace.is_empty() {
        let detail = "not allowed on this type";
        errors.push(FieldError::forbidden(&path.child("namespace"), detail));
    } else if !namespace.is_empty() {
        let broken = names::dns1123_label(namespace);
        each(&path.child("namespace"), namespace, broken, &mut errors);
    }
    errors.extend(labels(meta.labels.as_ref(), &path.child("labels")));
    annotations(meta, &path.child("annotations"), &mut errors);
    for (i, finalizer) in meta.finalizers.iter().flatten().enumerate() {
        let broken = names::qualified_name(finalizer);
        each(
            &path.child("finalizers").index(i),
            finalizer,
            broken,
            &mut errors,
        );
    }
    owners(meta, &path.child("ownerReferences"), &mut errors);
    errors
}

fn object_name(kind: &Kind, name: &str) -> Vec<String> {
    match kind.kind {
        "Namespace" => names::dns1123_label(name),
        "Service" => names::dns1035_label(name),
        // Roles may be called `system:node`: any one part of a path is a name.
        "Role" | "RoleBinding" | "ClusterRole" | "ClusterRoleBinding" => names::path_segment(name),
        _ => names::dns1123_subdomain(name),
    }
}

fn annotations(meta: &ObjectMeta, path: &Path, errors: &mut Vec<FieldError>) {
    let mut total = 0;
    for (key, value) in meta.annotations.iter().flatten() {
        each(
            path,
            key,
            names::qualified_name(&key.to_lowercase()),
            errors,
        );
        total += key.len() + value.len();
    }
    if total > ANNOTATIONS_BYTES_MAX {
        errors.push(FieldError::too_long(path, ANNOTATIONS_BYTES_MAX));
    }
}

fn owners(meta: &ObjectMeta, path: &Path, errors: &mut Vec<FieldError>) {
    let mut controllers = 0;
    for (i, owner) in meta.owner_references.iter().flatten().enumerate() {
        let path = path.index(i);
        for (field, value) in [
            ("apiVersion", &owner.api_version),
            ("kind", &owner.kind),
            ("name", &owner.name),
            ("uid", &owner.uid),
        ] {
            if value.is_empty() {
                errors.push(FieldError::required(
                    &path.child(field),
                    "must not be empty",
                ));
            }
        }
        controllers += usize::from(owner.controller == Some(true));
    }
    if controllers > 1 {
        let detail = "Only one reference can have Controller set to true";
        errors.push(FieldError::invalid(path, controllers, detail));
    }
}

/// A map of labels.
pub fn labels(labels: Option<&BTreeMap<String, String>>, path: &Path) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for (key, value) in labels.into_iter().flatten() {
        each(path, key, names::qualified_name(key), &mut errors);
        each(
            &path.key(key),
            value,
            names::label_value(value),
            &mut errors,
        );
    }
    errors
}

/// Fields of `metadata` that no update may change.
pub fn metadata_update(new: &ObjectMeta, old: &ObjectMeta) -> Vec<FieldError> {
    let path = Path::new("metadata");
    let mut errors = Vec::new();
    for (field, new, old) in [
        ("name", &new.name, &old.name),
        ("namespace", &new.namespace, &old.namespace),
    ] {
        if new != old {
            let value = new.as_deref().unwrap_or_default();
            errors.push(FieldError::invalid(&path.child(field), value, IMMUTABLE));
        }
    }
    errors
}

/// A ConfigMap's keys and size.
pub fn config_map(map: &ConfigMap) -> Vec<FieldError> {
    let texts = map
        .data
        .iter()
        .flatten()
        .map(|(key, value)| ("data", key, value.len()));
    let bytes = map
        .binary_data
        .iter()
        .flatten()
        .map(|(key, value)| ("binaryData", key, value.0.len()));
    let mut errors = data(texts.chain(bytes));
    for key in map.data.iter().flatten().map(|(key, _)| key) {
        if map
            .binary_data
            .as_ref()
            .is_some_and(|m| m.contains_key(key))
        {
            let path = Path::new("data").key(key);
            errors.push(FieldError::invalid(
                &path,
                key.as_str(),
                "duplicate of key in binaryData",
            ));
        }
    }
    errors
}

/// A Secret's keys, size, and what its type requires.
pub fn secret(secret: &Secret) -> Vec<FieldError> {
    let entries = secret.data.iter().flatten();
    let mut errors = data(entries.map(|(key, value)| ("data", key, value.0.len())));
    let required: &[&str] = match secret.type_.as_deref().unwrap_or_default() {
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        _ => &[],
    };
    for key in required {
        if !secret
            .data
            .as_ref()
            .is_some_and(|data| data.contains_key(*key))
        {
            errors.push(FieldError::required(&Path::new("data").key(key), ""));
        }
    }
    errors
}

fn data<'a>(entries: impl Iterator<Item = (&'static str, &'a String, usize)>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let mut total = 0_usize;
    for (field, key, size) in entries {
        each(
            &Path::new(field).key(key),
            key,
            names::config_key(key),
            &mut errors,
        );
        total = total.saturating_add(size);
    }
    if total > DATA_BYTES_MAX {
        errors.push(FieldError::too_long(&Path::new("data"), DATA_BYTES_MAX));
    }
    errors
}

/// `immutable: true` holds for the data, and cannot be taken back.
pub fn immutable_data<T: PartialEq>(
    was_immutable: bool,
    is_immutable: bool,
    old: &T,
    new: &T,
) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if was_immutable {
        let detail = "field is immutable when `immutable` is set";
        if !is_immutable {
            errors.push(FieldError::forbidden(&Path::new("immutable"), detail));
        }
        if old != new {
            errors.push(FieldError::forbidden(&Path::new("data"), detail));
        }
    }
    errors
}

/// An Event names an object and lives in its namespace.
pub fn event(event: &Event) -> Vec<FieldError> {
    let about = event
        .involved_object
        .namespace
        .as_deref()
        .unwrap_or_default();
    let own = event.metadata.namespace.as_deref().unwrap_or_default();
    // Events about cluster-scoped objects live in `default`.
    let expected = if about.is_empty() { "default" } else { about };
    if own.is_empty() || own == expected {
        return Vec::new();
    }
    let path = Path::new("involvedObject").child("namespace");
    vec![FieldError::invalid(
        &path,
        about,
        "does not match event.namespace",
    )]
}

/// A Lease's numbers.
pub fn lease(lease: &Lease) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let Some(spec) = &lease.spec else {
        return errors;
    };
    if let Some(seconds) = spec.lease_duration_seconds.filter(|s| *s <= 0) {
        let path = Path::new("spec").child("leaseDurationSeconds");
        errors.push(FieldError::invalid(
            &path,
            seconds,
            "must be greater than 0",
        ));
    }
    let transitions = spec.lease_transitions.map(i64::from);
    not_negative(
        &Path::new("spec").child("leaseTransitions"),
        transitions,
        &mut errors,
    );
    errors
}
