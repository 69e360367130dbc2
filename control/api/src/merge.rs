//! Merging objects: strategic merge patch, three-way apply, RFC 7396, RFC 6902.
//!
//! ```text
//! apply:  last applied ─┐
//!         new ──────────┼─► patch: deletions (last applied − new) + changes (new − live)
//!         live ─────────┘            └─► strategic(live, patch) ─► object
//! ```
//! A strategic merge merges lists of maps by a key (containers by name) where Kubernetes' types say
//! so; [`merge_key`] is that table. Directives: `$patch: delete | replace | merge`,
//! `$deleteFromPrimitiveList/<field>`, `$setElementOrder/<field>` (only orders), `$retainKeys`.
//!
//! Invariants, checked by `tests`: applying the same manifest twice changes nothing; a field that
//! leaves the manifest leaves the object; a field that somebody else set stays.
//! Source: `apimachinery/pkg/util/strategicpatch/patch.go`, patchStrategy tags of `core/v1`.

use serde_json::{Map, Value};

/// The annotation in which `apply` keeps the manifest as it was applied.
pub const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Nesting that a merge follows; JSON is parsed with the same limit.
const DEPTH_MAX: usize = 128;

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const ELEMENT_ORDER: &str = "$setElementOrder/";

/// Why a patch cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// A patch of an object must be an object.
    #[error("{path}: expected a map, found {found}")]
    NotAMap {
        /// Where.
        path: String,
        /// The value, shortened.
        found: String,
    },
    /// An element of a keyed list lacks its key.
    #[error("{path}: an element lacks its merge key {key:?}")]
    NoKey {
        /// Where.
        path: String,
        /// The key.
        key: &'static str,
    },
    /// A directive that is none of delete, replace, merge.
    #[error("{path}: unknown $patch directive {directive}")]
    Directive {
        /// Where.
        path: String,
        /// What it says.
        directive: String,
    },
    /// An RFC 6902 patch that does not parse or does not fit.
    #[error("{0}")]
    JsonPatch(String),
    /// Deeper than 128 levels.
    #[error("{0}: nested too deeply")]
    Depth(String),
}

/// How a list at a path merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ListRule {
    /// Replaced as a whole.
    Atomic,
    /// Maps, merged by this key.
    Keyed(&'static str),
    /// Scalars, merged as a set.
    Set,
}

/// Kubernetes' patchMergeKey of the list in `field` of a map found in `parent` (the name of the
/// field that holds the map or the list of maps).
fn list_rule(parent: &str, field: &str) -> ListRule {
    match (parent, field) {
        (_, "containers" | "initContainers" | "ephemeralContainers") => ListRule::Keyed("name"),
        (_, "env" | "volumes" | "imagePullSecrets" | "resourceClaims" | "schedulingGates") => {
            ListRule::Keyed("name")
        }
        (_, "volumeMounts") => ListRule::Keyed("mountPath"),
        (_, "volumeDevices") => ListRule::Keyed("devicePath"),
        (_, "hostAliases") => ListRule::Keyed("ip"),
        (_, "topologySpreadConstraints") => ListRule::Keyed("topologyKey"),
        ("containers" | "initContainers" | "ephemeralContainers", "ports") => {
            ListRule::Keyed("containerPort")
        }
        // A Service's ports; an EndpointSlice's stand at the top and are atomic.
        ("spec", "ports") => ListRule::Keyed("port"),
        ("metadata", "ownerReferences") => ListRule::Keyed("uid"),
        ("metadata", "finalizers") => ListRule::Set,
        ("status", "conditions" | "addresses") => ListRule::Keyed("type"),
        ("status", "podIPs" | "hostIPs") => ListRule::Keyed("ip"),
        _ => ListRule::Atomic,
    }
}

/// Whether a map keeps only the fields that the patch names (`patchStrategy:"retainKeys"`).
fn retains_keys(field: &str) -> bool {
    matches!(field, "strategy" | "volumes")
}

/// RFC 7396.
#[must_use]
pub fn json_merge(live: &Value, patch: &Value) -> Value {
    let mut result = live.clone();
    json_patch::merge(&mut result, patch);
    result
}

/// RFC 6902.
///
/// # Errors
/// When `operations` is no list of operations or one of them does not fit.
pub fn json_patch(live: &Value, operations: Value) -> Result<Value, MergeError> {
    let failed = |e: &dyn std::fmt::Display| MergeError::JsonPatch(e.to_string());
    let patch: json_patch::Patch = serde_json::from_value(operations).map_err(|e| failed(&e))?;
    let mut result = live.clone();
    json_patch::patch(&mut result, &patch).map_err(|e| failed(&e))?;
    Ok(result)
}

/// Kubernetes' strategic merge patch.
///
/// # Errors
/// When the patch is no map, an element of a keyed list has no key, or a directive is unknown.
pub fn strategic(live: &Value, patch: &Value) -> Result<Value, MergeError> {
    let (Value::Object(live), Value::Object(patch)) = (live, patch) else {
        let found = shortened(if live.is_object() { patch } else { live });
        return Err(MergeError::NotAMap {
            path: "(the object)".to_owned(),
            found,
        });
    };
    merge_map(
        live,
        patch,
        At {
            field: "",
            path: "",
            depth: 0,
        },
    )
    .map(Value::Object)
}

/// Where a merge stands.
#[derive(Clone, Copy)]
struct At<'a> {
    /// Name of the field that holds the map (or the list whose element it is).
    field: &'a str,
    path: &'a str,
    depth: usize,
}

impl At<'_> {
    fn join(self, field: &str) -> String {
        if self.path.is_empty() {
            field.to_owned()
        } else {
            format!("{}.{field}", self.path)
        }
    }
}

fn shortened(value: &Value) -> String {
    value.to_string().chars().take(60).collect()
}

fn directive<'a>(patch: &'a Map<String, Value>, at: At<'_>) -> Result<Option<&'a str>, MergeError> {
    match patch.get(PATCH) {
        None => Ok(None),
        Some(Value::String(word)) if matches!(word.as_str(), "delete" | "replace" | "merge") => {
            Ok(Some(word))
        }
        Some(other) => Err(MergeError::Directive {
            path: at.path.to_owned(),
            directive: shortened(other),
        }),
    }
}

fn is_directive(key: &str) -> bool {
    key == PATCH
        || key == RETAIN_KEYS
        || key.starts_with(DELETE_FROM)
        || key.starts_with(ELEMENT_ORDER)
}

fn merge_map(
    live: &Map<String, Value>,
    patch: &Map<String, Value>,
    at: At<'_>,
) -> Result<Map<String, Value>, MergeError> {
    if at.depth > DEPTH_MAX {
        return Err(MergeError::Depth(at.path.to_owned()));
    }
    match directive(patch, at)? {
        Some("delete") => return Ok(Map::new()),
        Some("replace") => return Ok(stripped_map(patch)),
        _ => {}
    }
    let mut result = live.clone();
    if let Some(Value::Array(keys)) = patch.get(RETAIN_KEYS) {
        result.retain(|key, _| keys.iter().any(|k| k.as_str() == Some(key)));
    }
    for (key, doomed) in patch {
        if let (Some(field), Value::Array(doomed)) = (key.strip_prefix(DELETE_FROM), doomed)
            && let Some(Value::Array(list)) = result.get_mut(field)
        {
            list.retain(|item| !doomed.contains(item));
        }
    }
    for (key, value) in patch.iter().filter(|(key, _)| !is_directive(key)) {
        let path = at.join(key);
        let inner = At {
            field: key,
            path: &path,
            depth: at.depth + 1,
        };
        match (result.get(key), value) {
            (_, Value::Null) => {
                result.remove(key);
            }
            (Some(Value::Object(old)), Value::Object(new)) => {
                let merged = merge_map(old, new, inner)?;
                let doomed = directive(new, inner)? == Some("delete");
                if doomed {
                    result.remove(key);
                } else {
                    result.insert(key.clone(), Value::Object(merged));
                }
            }
            (Some(Value::Array(old)), Value::Array(new)) => {
                let merged = merge_list(old, new, list_rule(at.field, key), inner)?;
                result.insert(key.clone(), Value::Array(merged));
            }
            (_, new) => {
                if new
                    .as_object()
                    .is_some_and(|m| m.get(PATCH) == Some(&"delete".into()))
                {
                    result.remove(key);
                } else {
                    result.insert(key.clone(), stripped(new));
                }
            }
        }
    }
    for (key, order) in patch {
        if let (Some(field), Value::Array(order)) = (key.strip_prefix(ELEMENT_ORDER), order)
            && let Some(Value::Array(list)) = result.get_mut(field)
        {
            reorder(list, order, list_rule(at.field, field));
        }
    }
    Ok(result)
}

fn merge_list(
    live: &[Value],
    patch: &[Value],
    rule: ListRule,
    at: At<'_>,
) -> Result<Vec<Value>, MergeError> {
    let is_replace = |v: &Value| {
        v.as_object()
            .is_some_and(|m| m.len() == 1 && m.get(PATCH) == Some(&"replace".into()))
    };
    if patch.iter().any(is_replace) {
        return Ok(patch
            .iter()
            .filter(|v| !is_replace(v))
            .map(stripped)
            .collect());
    }
    match rule {
        ListRule::Atomic => Ok(patch.iter().map(stripped).collect()),
        ListRule::Set => {
            let mut result = live.to_vec();
            for item in patch {
                if !result.contains(item) {
                    result.push(item.clone());
                }
            }
            Ok(result)
        }
        ListRule::Keyed(key) => merge_keyed(live, patch, key, at),
    }
}

/// An item of a list that is merged by `key`, with that key's value.
fn keyed_item<'v>(
    item: &'v Value,
    key: &'static str,
    at: At<'_>,
) -> Result<(&'v Map<String, Value>, &'v Value), MergeError> {
    let path = || at.path.to_owned();
    let map = item.as_object().ok_or_else(|| MergeError::NotAMap {
        path: path(),
        found: shortened(item),
    })?;
    let id = map
        .get(key)
        .ok_or_else(|| MergeError::NoKey { path: path(), key })?;
    Ok((map, id))
}

fn merge_keyed(
    live: &[Value],
    patch: &[Value],
    key: &'static str,
    at: At<'_>,
) -> Result<Vec<Value>, MergeError> {
    let mut result = live.to_vec();
    for item in patch {
        let (item, id) = keyed_item(item, key, at)?;
        let place = result.iter().position(|old| same_item(old, item, key));
        let path = format!("{}[{key}={}]", at.path, shortened(id));
        let inner = At {
            path: &path,
            depth: at.depth + 1,
            ..at
        };
        match (directive(item, inner)?, place) {
            (Some("delete"), _) => result.retain(|old| old.get(key) != Some(id)),
            (Some("replace"), Some(place)) => result[place] = Value::Object(stripped_map(item)),
            (_, Some(place)) => {
                if let Some(old) = result[place].as_object() {
                    let merged = merge_map(old, item, inner)?;
                    result[place] = Value::Object(merged);
                }
            }
            (_, None) => result.push(Value::Object(stripped_map(item))),
        }
    }
    Ok(result)
}

/// Whether two elements are the same one. Ports of one number differ by protocol: Kubernetes'
/// merge key forgets that and merges DNS's 53/UDP into 53/TCP.
fn same_item(old: &Value, new: &Map<String, Value>, key: &str) -> bool {
    let protocol = |p: Option<&Value>| {
        p.and_then(Value::as_str)
            .filter(|p| !p.is_empty())
            .unwrap_or("TCP")
            .to_owned()
    };
    old.get(key) == new.get(key)
        && (!matches!(key, "port" | "containerPort")
            || protocol(old.get("protocol")) == protocol(new.get("protocol")))
}

fn reorder(list: &mut [Value], order: &[Value], rule: ListRule) {
    let place = |item: &Value| match rule {
        ListRule::Keyed(key) => order
            .iter()
            .position(|o| o.get(key).is_some() && o.get(key) == item.get(key)),
        _ => order.iter().position(|o| o == item),
    };
    // Items that the order does not name keep their places relative to each other, at the end.
    list.sort_by_key(|item| place(item).unwrap_or(usize::MAX));
}

/// A patch's value as a plain value: without nulls and directives.
fn stripped(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(stripped_map(map)),
        Value::Array(list) => {
            let deleted = |v: &&Value| v.get(PATCH) == Some(&"delete".into());
            Value::Array(list.iter().filter(|v| !deleted(v)).map(stripped).collect())
        }
        other => other.clone(),
    }
}

fn stripped_map(map: &Map<String, Value>) -> Map<String, Value> {
    map.iter()
        .filter(|(key, value)| !value.is_null() && !is_directive(key))
        .map(|(key, value)| (key.clone(), stripped(value)))
        .collect()
}

/// The manifest with itself recorded in the last-applied annotation.
#[must_use]
pub fn with_last_applied(new: &Value) -> Value {
    let mut object = stripped(new);
    if let Some(annotations) = annotations_mut(&mut object) {
        annotations.remove(LAST_APPLIED);
    }
    drop_empty_annotations(&mut object, new);
    // kubectl ends the annotation with a line break; so a later stock kubectl sees no difference.
    let text = format!("{object}\n");
    if let Some(annotations) = annotations_mut(&mut object) {
        annotations.insert(LAST_APPLIED.to_owned(), Value::from(text));
    }
    object
}

/// `annotations_mut` makes the map: take it out again where the manifest had none.
fn drop_empty_annotations(object: &mut Value, manifest: &Value) {
    let had = manifest
        .pointer("/metadata/annotations")
        .is_some_and(Value::is_object);
    if !had && let Some(Value::Object(meta)) = object.get_mut("metadata") {
        meta.remove("annotations");
    }
}

fn annotations_mut(object: &mut Value) -> Option<&mut Map<String, Value>> {
    let meta = object
        .as_object_mut()?
        .entry("metadata")
        .or_insert_with(|| Map::new().into());
    let meta = meta.as_object_mut()?;
    meta.entry("annotations")
        .or_insert_with(|| Map::new().into())
        .as_object_mut()
}

/// What the live object says was applied last; an empty map when it says nothing (usable).
#[must_use]
pub fn last_applied(live: &Value) -> Value {
    live.pointer("/metadata/annotations")
        .and_then(|annotations| annotations.get(LAST_APPLIED))
        .and_then(Value::as_str)
        .and_then(|text| serde_json::from_str::<Value>(text).ok())
        .filter(Value::is_object)
        .unwrap_or_else(|| Map::new().into())
}

/// `kubectl apply`: what was in the last manifest and is not in `new` goes, what `new` says holds,
/// the rest of `live` stays.
///
/// # Errors
/// As [`strategic`].
pub fn three_way_apply(live: &Value, new: &Value) -> Result<Value, MergeError> {
    let old = last_applied(live);
    let new = with_last_applied(new);
    let (Value::Object(old), Value::Object(new_map), Value::Object(live_map)) = (&old, &new, live)
    else {
        let found = shortened(live);
        return Err(MergeError::NotAMap {
            path: "(the object)".to_owned(),
            found,
        });
    };
    let at = At {
        field: "",
        path: "",
        depth: 0,
    };
    apply_map(Some(old), new_map, live_map, at).map(Value::Object)
}

fn apply_map(
    old: Option<&Map<String, Value>>,
    new: &Map<String, Value>,
    live: &Map<String, Value>,
    at: At<'_>,
) -> Result<Map<String, Value>, MergeError> {
    if at.depth > DEPTH_MAX {
        return Err(MergeError::Depth(at.path.to_owned()));
    }
    let mut result = live.clone();
    for key in old.into_iter().flat_map(Map::keys) {
        let is_status = at.path.is_empty() && key == "status";
        if !is_status && !new.contains_key(key) {
            result.remove(key);
        }
    }
    if retains_keys(at.field) {
        // One of several alternatives: what another alternative left behind must go.
        result.retain(|key, _| new.contains_key(key));
    }
    for (key, value) in new {
        let path = at.join(key);
        let inner = At {
            field: key,
            path: &path,
            depth: at.depth + 1,
        };
        let before = old.and_then(|old| old.get(key));
        let merged = match (live.get(key), value) {
            (Some(Value::Object(live)), Value::Object(new)) => {
                let before = before.and_then(Value::as_object);
                Value::Object(apply_map(before, new, live, inner)?)
            }
            (Some(Value::Array(live)), Value::Array(new)) => {
                let before = before.and_then(Value::as_array).map(Vec::as_slice);
                let rule = list_rule(at.field, key);
                Value::Array(apply_list(
                    before.unwrap_or_default(),
                    new,
                    live,
                    rule,
                    inner,
                )?)
            }
            _ => value.clone(),
        };
        result.insert(key.clone(), merged);
    }
    Ok(result)
}

fn apply_list(
    old: &[Value],
    new: &[Value],
    live: &[Value],
    rule: ListRule,
    at: At<'_>,
) -> Result<Vec<Value>, MergeError> {
    // What stays of live: items that were not in the last manifest, or are still in the new one.
    match rule {
        ListRule::Atomic => Ok(new.to_vec()),
        ListRule::Set => {
            let kept = live
                .iter()
                .filter(|item| !old.contains(item) && !new.contains(item));
            Ok(new.iter().chain(kept).cloned().collect())
        }
        ListRule::Keyed(key) => {
            let find = |list: &'_ [Value], item: &Map<String, Value>| {
                list.iter()
                    .find(|other| same_item(other, item, key))
                    .cloned()
            };
            let mut result = Vec::new();
            for item in new {
                let (item, id) = keyed_item(item, key, at)?;
                let path = format!("{}[{key}={}]", at.path, shortened(id));
                let inner = At {
                    path: &path,
                    depth: at.depth + 1,
                    ..at
                };
                match find(live, item) {
                    Some(Value::Object(live)) => {
                        let before = find(old, item);
                        let before = before.as_ref().and_then(Value::as_object);
                        result.push(Value::Object(apply_map(before, item, &live, inner)?));
                    }
                    _ => result.push(Value::Object(item.clone())),
                }
            }
            for item in live {
                let Value::Object(map) = item else { continue };
                if find(new, map).is_none() && find(old, map).is_none() {
                    result.push(item.clone());
                }
            }
            Ok(result)
        }
    }
}

#[cfg(test)]
mod tests;
