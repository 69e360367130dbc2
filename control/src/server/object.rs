//! Objects as JSON values: metadata access, the stored bytes, and what readers get.
//!
//! The store numbers a write only when it takes it, so stored bytes carry no `resourceVersion`;
//! readers get it from the entry. `apiVersion`, `kind` and `metadata` are always written first, so
//! that it is put in by splicing bytes, without parsing the object.

use bytes::Bytes;
use gantry_api::status::Status;
use serde_json::{Map, Value};

use crate::server::registry::Resource;
use crate::store::{Entry, Revision};

/// What precedes the first field of the metadata in stored bytes.
const METADATA_START: &[u8] = b"\"metadata\":{";

/// Fields that belong to the server: what a client sends in them is not stored.
const SERVER_FIELDS: [&str; 3] = ["resourceVersion", "selfLink", "managedFields"];

/// The object's metadata; an empty one is made where it is missing or not a map.
pub(crate) fn metadata_mut(object: &mut Value) -> &mut Map<String, Value> {
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    let slot = &mut object["metadata"];
    if !slot.is_object() {
        *slot = Value::Object(Map::new());
    }
    match slot {
        Value::Object(map) => map,
        // Made an object right above.
        _ => unreachable!("metadata is a map"),
    }
}

/// A text field of the metadata; "" when absent.
pub(crate) fn metadata_text<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap_or_default()
}

/// The names in `metadata.finalizers`.
pub(crate) fn finalizers(object: &Value) -> Vec<&str> {
    let list = object["metadata"]["finalizers"].as_array();
    list.into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

/// Whether deletion was asked for.
pub(crate) fn is_being_deleted(object: &Value) -> bool {
    !object["metadata"]["deletionTimestamp"].is_null()
}

/// Copies a field of the metadata from `old`, or removes it where `old` has none.
pub(crate) fn carry_metadata(object: &mut Value, old: &Value, field: &str) {
    let metadata = metadata_mut(object);
    match old["metadata"].get(field) {
        Some(value) => metadata.insert(field.to_owned(), value.clone()),
        None => metadata.remove(field),
    };
}

/// Copies a top-level field from `old`, or removes it where `old` has none.
pub(crate) fn carry_field(object: &mut Value, old: &Value, field: &str) {
    if let Value::Object(map) = object {
        match old.get(field) {
            Some(value) => map.insert(field.to_owned(), value.clone()),
            None => map.remove(field),
        };
    }
}

/// The bytes to store.
pub(crate) fn encode(object: &Value) -> Result<Bytes, Status> {
    let failed = |error: serde_json::Error| Status::internal(format!("cannot encode: {error}"));
    let Value::Object(fields) = object else {
        return Err(Status::bad_request("the object is not a JSON object"));
    };
    let mut metadata = fields.get("metadata").cloned().unwrap_or_default();
    if let Value::Object(map) = &mut metadata {
        for field in SERVER_FIELDS {
            map.remove(field);
        }
    }
    let mut bytes = Vec::with_capacity(1024);
    bytes.push(b'{');
    let first = ["apiVersion", "kind"].map(|name| (name, fields.get(name)));
    let first = first
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)));
    let rest = fields
        .iter()
        .filter(|(name, _)| !["apiVersion", "kind", "metadata"].contains(&name.as_str()))
        .map(|(name, value)| (name.as_str(), value));
    for (name, value) in first.chain([("metadata", &metadata)]).chain(rest) {
        if bytes.len() > 1 {
            bytes.push(b',');
        }
        serde_json::to_writer(&mut bytes, name).map_err(failed)?;
        bytes.push(b':');
        serde_json::to_writer(&mut bytes, value).map_err(failed)?;
    }
    bytes.push(b'}');
    Ok(bytes.into())
}

/// An entry as a client gets it: the stored bytes with `resourceVersion` put in.
pub fn present(entry: &Entry, revision: Revision) -> Bytes {
    let start = entry
        .value
        .windows(METADATA_START.len())
        .position(|window| window == METADATA_START);
    let Some(start) = start else {
        // Not written by `encode`; only a store of another program can hold such bytes.
        return entry.value.clone();
    };
    let (head, tail) = entry.value.split_at(start + METADATA_START.len());
    let comma = if tail.starts_with(b"}") { "" } else { "," };
    let version = format!("\"resourceVersion\":\"{revision}\"{comma}");
    let mut bytes = Vec::with_capacity(entry.value.len() + version.len());
    bytes.extend_from_slice(head);
    bytes.extend_from_slice(version.as_bytes());
    bytes.extend_from_slice(tail);
    bytes.into()
}

/// An entry as a JSON value, `resourceVersion` included.
pub fn to_value(entry: &Entry) -> Result<Value, Status> {
    let mut value: Value = serde_json::from_slice(&entry.value).map_err(|e| damaged(entry, &e))?;
    let version = Value::String(entry.mod_revision.to_string());
    metadata_mut(&mut value).insert("resourceVersion".to_owned(), version);
    Ok(value)
}

/// An entry as its Kubernetes type, `resourceVersion` included. What a watch of the store yields is
/// to be read with this, so that a later update is a compare-and-set.
pub fn decode<K: Resource>(entry: &Entry) -> Result<K, Status> {
    let mut object: K = serde_json::from_slice(&entry.value).map_err(|e| damaged(entry, &e))?;
    object.metadata_mut().resource_version = Some(entry.mod_revision.to_string());
    Ok(object)
}

fn damaged(entry: &Entry, error: &serde_json::Error) -> Status {
    let (key, revision) = (&entry.key, entry.mod_revision);
    Status::internal(format!(
        "{key} at revision {revision} cannot be read: {error}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn entry(object: &Value) -> Entry {
        Entry {
            key: "/registry/configmaps/a/b".into(),
            value: encode(object).unwrap(),
            create_revision: 1,
            mod_revision: 42,
        }
    }

    #[test]
    fn the_version_goes_into_the_objects_own_metadata() {
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "data": {"metadata": "\"metadata\":{", "kind": "x"},
            "aaa": {"metadata": {"name": "inner"}},
            "metadata": {"name": "b", "resourceVersion": "7", "managedFields": []},
        });
        let presented: Value = serde_json::from_slice(&present(&entry(&object), 42)).unwrap();
        let mut expected = object;
        expected["metadata"] = json!({"name": "b", "resourceVersion": "42"});
        assert_eq!(presented, expected);
        assert_eq!(to_value(&entry(&presented)).unwrap(), expected);
    }

    proptest! {
        #[test]
        fn presented_bytes_equal_the_parsed_value(
            name in "[a-z]{1,9}", data in proptest::collection::btree_map(".{0,9}", ".{0,20}", 0..6),
        ) {
            let object = json!({
                "apiVersion": "v1", "kind": "ConfigMap", "data": data, "metadata": {"name": name},
            });
            let entry = entry(&object);
            let presented: Value = serde_json::from_slice(&present(&entry, 42)).unwrap();
            prop_assert_eq!(presented, to_value(&entry).unwrap());
        }
    }
}
