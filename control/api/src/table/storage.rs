//! Rows of volumes, claims and classes.

use super::{list, number, text};
use serde_json::Value;

/// The annotation of the class of claims that name none.
const DEFAULT_CLASS: &str = "storageclass.kubernetes.io/is-default-class";

fn name(object: &Value) -> String {
    text(object, "/metadata/name").to_owned()
}

fn modes(object: &Value, pointer: &str) -> String {
    let short = |mode: &Value| match mode.as_str() {
        Some("ReadWriteOnce") => "RWO",
        Some("ReadOnlyMany") => "ROX",
        Some("ReadWriteMany") => "RWX",
        Some("ReadWriteOncePod") => "RWOP",
        _ => "",
    };
    let all: Vec<&str> = list(object, pointer).iter().map(short).collect();
    all.join(",")
}

pub(super) fn claim(object: &Value, age: String, wide: bool) -> Vec<String> {
    let phase = match text(object, "/metadata/deletionTimestamp") {
        "" => text(object, "/status/phase"),
        _ => "Terminating",
    };
    let own = |pointer| text(object, pointer).to_owned();
    let mut cells = vec![
        name(object),
        phase.to_owned(),
        own("/spec/volumeName"),
        own("/status/capacity/storage"),
        modes(object, "/status/accessModes"),
        own("/spec/storageClassName"),
        age,
    ];
    if wide {
        cells.push(own("/spec/volumeMode"));
    }
    cells
}

pub(super) fn volume(object: &Value, age: String, wide: bool) -> Vec<String> {
    let own = |pointer| text(object, pointer).to_owned();
    let claim = match text(object, "/spec/claimRef/name") {
        "" => String::new(),
        claim => format!("{}/{claim}", text(object, "/spec/claimRef/namespace")),
    };
    let phase = match text(object, "/metadata/deletionTimestamp") {
        "" => text(object, "/status/phase"),
        _ => "Terminating",
    };
    let mut cells = vec![
        name(object),
        own("/spec/capacity/storage"),
        modes(object, "/spec/accessModes"),
        own("/spec/persistentVolumeReclaimPolicy"),
        phase.to_owned(),
        claim,
        own("/spec/storageClassName"),
        own("/status/reason"),
        age,
    ];
    if wide {
        cells.push(own("/spec/volumeMode"));
    }
    cells
}

pub(super) fn class(object: &Value, age: String) -> Vec<String> {
    let annotations = object.pointer("/metadata/annotations");
    let default = annotations.and_then(|all| all.get(DEFAULT_CLASS)) == Some(&"true".into());
    let mark = if default { " (default)" } else { "" };
    let expands = object.pointer("/allowVolumeExpansion") == Some(&Value::Bool(true));
    vec![
        name(object) + mark,
        text(object, "/provisioner").to_owned(),
        text(object, "/reclaimPolicy").to_owned(),
        text(object, "/volumeBindingMode").to_owned(),
        expands.to_string(),
        age,
    ]
}

pub(super) fn priority(object: &Value, age: String) -> Vec<String> {
    let default = object.pointer("/globalDefault") == Some(&Value::Bool(true));
    vec![
        name(object),
        number(object, "/value").to_string(),
        default.to_string(),
        age,
        text(object, "/preemptionPolicy").to_owned(),
    ]
}
