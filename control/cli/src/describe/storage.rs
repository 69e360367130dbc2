//! `describe` of claims and volumes, in kubectl's words.

use super::text::{Text, field, items};
use super::{common, labels};
use serde_json::Value;

fn modes(object: &Value) -> String {
    let modes = items(object, "/spec/accessModes")
        .iter()
        .filter_map(Value::as_str);
    modes.collect::<Vec<_>>().join(",")
}

pub(super) fn claim(object: &Value, text: &mut Text) {
    common(object, true, text);
    text.line(0, "StorageClass", field(object, "/spec/storageClassName"));
    text.line(0, "Status", field(object, "/status/phase"));
    text.line(0, "Volume", field(object, "/spec/volumeName"));
    labels(object, text);
    text.line(
        0,
        "Requested",
        field(object, "/spec/resources/requests/storage"),
    );
    text.line(0, "Capacity", field(object, "/status/capacity/storage"));
    text.line(0, "Access Modes", &modes(object));
    text.line(0, "VolumeMode", field(object, "/spec/volumeMode"));
}

pub(super) fn volume(object: &Value, text: &mut Text) {
    common(object, false, text);
    labels(object, text);
    text.line(0, "StorageClass", field(object, "/spec/storageClassName"));
    text.line(0, "Status", field(object, "/status/phase"));
    let claim = match field(object, "/spec/claimRef/name") {
        "" => "<none>".to_owned(),
        name => format!("{}/{name}", field(object, "/spec/claimRef/namespace")),
    };
    text.line(0, "Claim", &claim);
    let policy = field(object, "/spec/persistentVolumeReclaimPolicy");
    text.line(0, "Reclaim Policy", policy);
    text.line(0, "Access Modes", &modes(object));
    text.line(0, "VolumeMode", field(object, "/spec/volumeMode"));
    text.line(0, "Capacity", field(object, "/spec/capacity/storage"));
    let path = match field(object, "/spec/local/path") {
        "" => field(object, "/spec/hostPath/path"),
        path => path,
    };
    text.line(0, "Path", path);
}
