//! From bytes to a typed object: strict about fields, precise about where.
//!
//! ```text
//! bytes ─► parse (size, depth, duplicate keys) ─► Value ─► decode::<K> (types, unknown fields) ─► K
//! ```
//! Nothing is dropped silently: an unknown field is returned by its path (`spec.replica`,
//! `spec.containers[0].foo`), and the caller refuses it or warns.

use crate::kinds::Kind;
use crate::status::{Cause, Reason, Status};
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;

/// The largest object that is taken, in bytes. The same as etcd's default request limit.
pub const OBJECT_BYTES_MAX: usize = 1_536 * 1024;
/// At most this many unknown fields are reported for one object.
const UNKNOWN_FIELDS_MAX: usize = 64;

/// Parses one JSON object; the nesting limit is serde_json's (128).
///
/// # Errors
/// Too large, no JSON, no object, or a key that occurs twice in one map.
pub fn parse(json: &[u8]) -> Result<Value, Status> {
    if json.len() > OBJECT_BYTES_MAX {
        let text = format!(
            "the object is {} bytes long, {OBJECT_BYTES_MAX} are allowed: split it",
            json.len()
        );
        return Err(Status::new(Reason::RequestEntityTooLarge, text));
    }
    let value = parse_value(json)
        .map_err(|e| Status::bad_request(format!("the object is no valid JSON: {e}")))?;
    if !value.is_object() {
        return Err(Status::bad_request(
            "the object is no JSON object (a map of fields)",
        ));
    }
    Ok(value)
}

/// Parses any JSON value, refusing duplicate keys.
///
/// # Errors
/// serde_json's, with line and column.
pub fn parse_value(json: &[u8]) -> Result<Value, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = UniqueKeys.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// Builds a `Value` as serde_json does, but an error when a map has the same key twice.
struct UniqueKeys;

impl<'de> DeserializeSeed<'de> for UniqueKeys {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = seq.next_element_seed(Self)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(serde::de::Error::custom(format!("duplicate field {key:?}")));
            }
            map.insert(key, access.next_value_seed(Self)?);
        }
        Ok(Value::Object(map))
    }
}

/// Checks that the object says it is of `kind`; fills in apiVersion and kind when both are absent.
///
/// # Errors
/// When they name something else.
pub fn check_type(kind: &Kind, object: &mut Value) -> Result<(), Status> {
    let Some(map) = object.as_object_mut() else {
        return Err(Status::bad_request(
            "the object is no JSON object (a map of fields)",
        ));
    };
    let expected = [
        ("apiVersion", kind.api_version()),
        ("kind", kind.kind.to_owned()),
    ];
    for (field, expected) in expected {
        match map.get(field) {
            None | Some(Value::Null) => {
                map.insert(field.to_owned(), expected.into());
            }
            Some(Value::String(found)) if *found == expected => {}
            Some(found) => {
                let text = format!(
                    "{field} is {found}, but the request is about {} ({expected:?})",
                    kind.qualified_resource()
                );
                return Err(Status::bad_request(text));
            }
        }
    }
    Ok(())
}

/// A typed object and the paths of the fields that its type does not have.
#[derive(Debug)]
pub struct Decoded<K> {
    /// The object.
    pub object: K,
    /// Paths of unknown fields, at most 64, in document order.
    pub unknown: Vec<String>,
}

/// Reads `value` as a `K`.
///
/// # Errors
/// A value of the wrong type, with its path: `spec.replicas: invalid type: string "x", expected
/// i32`.
pub fn decode<K: DeserializeOwned>(kind: &Kind, value: &Value) -> Result<Decoded<K>, Status> {
    let mut unknown = Vec::new();
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
    let result = serde_ignored::deserialize(tracked, collect(&mut unknown));
    match result {
        Ok(object) => Ok(Decoded { object, unknown }),
        Err(error) => {
            let field = track.path().to_string();
            let message = format!("{}: {field}: {error}", unhandled(kind));
            let mut status = Status::bad_request(message);
            status.details.causes.push(Cause {
                reason: "FieldValueInvalid".to_owned(),
                message: error.to_string(),
                field,
            });
            Err(status)
        }
    }
}

/// Of one type for all kinds: a closure of the generic function above would be a type of its own for
/// each, and with it every type of the API compiled once more for each kind that holds it (eight
/// copies of a pod's specification).
fn collect(unknown: &mut Vec<String>) -> impl FnMut(serde_ignored::Path<'_>) {
    |path| {
        if unknown.len() < UNKNOWN_FIELDS_MAX {
            unknown.push(ignored_path(&path));
        }
    }
}

fn unhandled(kind: &Kind) -> String {
    format!(
        "{} in version {:?} cannot be handled as a {}",
        kind.kind, kind.version, kind.kind
    )
}

/// The refusal of unknown fields, as Kubernetes words it.
#[must_use]
pub fn unknown_fields(kind: &Kind, unknown: &[String]) -> Status {
    let texts: Vec<String> = unknown
        .iter()
        .map(|f| format!("unknown field {f:?}"))
        .collect();
    let message = format!(
        "{}: strict decoding error: {}",
        unhandled(kind),
        texts.join(", ")
    );
    let mut status = Status::bad_request(message);
    status.details.causes = unknown
        .iter()
        .map(|field| Cause {
            reason: "FieldValueNotSupported".to_owned(),
            message: format!("unknown field {field:?}"),
            field: field.clone(),
        })
        .collect();
    status
}

fn ignored_path(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", ignored_path(parent)),
        Path::Map { parent, key } => match ignored_path(parent) {
            parent if parent.is_empty() => key.clone(),
            parent => format!("{parent}.{key}"),
        },
        // Layers of Option and newtypes are no part of the document.
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => ignored_path(parent),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::resolve;
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    fn pods() -> &'static Kind {
        resolve("pods").unwrap()
    }

    #[test]
    fn unknown_fields_are_named_by_path() {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "nam": 1},
            "spec": {"containers": [{"name": "c"}, {"name": "d", "foo": {"bar": 1}}],
                     "restartPolcy": "Never"}});
        let decoded = decode::<Pod>(pods(), &pod).unwrap();
        assert_eq!(
            decoded.unknown,
            [
                "metadata.nam",
                "spec.containers[1].foo",
                "spec.restartPolcy"
            ]
        );
        let status = unknown_fields(pods(), &decoded.unknown);
        assert!(
            status
                .message
                .contains("strict decoding error: unknown field \"metadata.nam\", "),
            "{status}"
        );
    }

    #[test]
    fn a_wrong_type_is_named_by_path() {
        let pod = json!({"apiVersion": "v1", "kind": "Pod",
            "spec": {"containers": [{"name": "c", "ports": [{"containerPort": "http"}]}]}});
        let status = decode::<Pod>(pods(), &pod).unwrap_err();
        assert!(
            status
                .message
                .contains("spec.containers[0].ports[0].containerPort: invalid type"),
            "{status}"
        );
        assert_eq!(
            status.details.causes[0].field,
            "spec.containers[0].ports[0].containerPort"
        );
    }

    #[test]
    fn broken_input_is_refused_with_its_place() {
        let status = parse(br#"{"a": 1, "b": {"c": 1, "c": 2}}"#).unwrap_err();
        assert!(
            status.message.contains("duplicate field \"c\" at line 1"),
            "{status}"
        );
        assert!(parse(b"[]").unwrap_err().message.contains("no JSON object"));
        assert!(parse(b"{} x").is_err());
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        assert!(parse(format!("{{\"a\": {deep}}}").as_bytes()).is_err());
        let large = format!("{{\"a\": \"{}\"}}", "x".repeat(OBJECT_BYTES_MAX));
        assert_eq!(parse(large.as_bytes()).unwrap_err().code, 413);
    }

    #[test]
    fn the_type_must_be_the_requested_one() {
        let mut object = json!({"kind": "Pod"});
        check_type(pods(), &mut object).unwrap();
        assert_eq!(object["apiVersion"], "v1");
        let mut object = json!({"kind": "Node", "apiVersion": "v1"});
        let status = check_type(pods(), &mut object).unwrap_err();
        assert!(status.message.contains("kind is \"Node\""), "{status}");
    }
}
