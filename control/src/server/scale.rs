//! The scale subresource: `autoscaling/v1` Scale as a view of a workload's `spec.replicas`. Pure.

use gantry_api::field::{FieldError, Path};
use gantry_api::kinds::Kind;
use gantry_api::status::Status;
use serde_json::{Value, json};

use super::object::metadata_text;
use super::write::Written;

fn check_kind(kind: &Kind) -> Result<(), Status> {
    if matches!(
        kind.kind,
        "Deployment" | "ReplicaSet" | "StatefulSet" | "ReplicationController"
    ) {
        return Ok(());
    }
    let text = format!("{} have no scale subresource", kind.qualified_resource());
    Err(Status::not_served(text))
}

/// A workload as a Scale.
pub(super) fn view(kind: &Kind, object: &Value) -> Result<Value, Status> {
    check_kind(kind)?;
    let metadata = |field: &str| object["metadata"][field].clone();
    Ok(json!({
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": {
            "name": metadata("name"),
            "namespace": metadata("namespace"),
            "uid": metadata("uid"),
            "resourceVersion": metadata("resourceVersion"),
            "creationTimestamp": metadata("creationTimestamp"),
        },
        "spec": {"replicas": object["spec"]["replicas"].as_i64().unwrap_or(1)},
        "status": {"replicas": object["status"]["replicas"].as_i64().unwrap_or(0)},
    }))
}

/// The workload with the replica count of a Scale.
pub(super) fn applied(kind: &Kind, object: &Value, scale: &Value) -> Result<Value, Status> {
    check_kind(kind)?;
    let replicas = &scale["spec"]["replicas"];
    if replicas.as_i64().is_none_or(|count| count < 0) {
        let path = Path::new("spec").child("replicas");
        let detail = "must be greater than or equal to 0";
        let error = FieldError::invalid(&path, replicas.clone(), detail);
        return Err(Status::invalid(
            kind,
            metadata_text(object, "name"),
            &[error],
        ));
    }
    let mut object = object.clone();
    object["spec"]["replicas"] = replicas.clone();
    // A version or uid in the Scale is a precondition, as in any update.
    for field in ["resourceVersion", "uid"] {
        let wanted = metadata_text(scale, field);
        if !wanted.is_empty() {
            object["metadata"][field] = json!(wanted);
        }
    }
    Ok(object)
}

/// The answer: the Scale, not the workload.
pub(super) fn written(kind: &Kind, written: Written) -> Result<Written, Status> {
    Ok(Written {
        object: view(kind, &written.object)?,
        ..written
    })
}
