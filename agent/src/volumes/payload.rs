//! Which files a volume shall hold: pure. Keys become file names only after a check.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use gantry_api::k8s_openapi::api::core::v1::KeyToPath;
use serde_json::Value;

use super::{Context, VolumeError};
use crate::view::BlobKey;

/// Mode of files where nothing was said.
pub(super) const DEFAULT_MODE: u32 = 0o644;
/// Longest path of a file in a volume, bytes.
const PATH_BYTES_MAX: usize = 4096;

/// One file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct PayloadFile {
    pub(super) data: Vec<u8>,
    /// Permission bits.
    pub(super) mode: u32,
    /// Owner; none: root.
    pub(super) user: Option<u32>,
}

impl PayloadFile {
    pub(super) fn new(data: Vec<u8>, mode: u32) -> Self {
        let user = None;
        Self { data, mode, user }
    }
}

/// By path relative to the volume.
pub(super) type Payload = BTreeMap<String, PayloadFile>;

/// Where a payload comes from and how its files are called.
pub(super) struct Selection<'a> {
    /// `configmaps` or `secrets`
    pub(super) plural: &'static str,
    pub(super) name: &'a str,
    pub(super) items: Option<&'a [KeyToPath]>,
    pub(super) default_mode: Option<i32>,
    pub(super) optional: bool,
}

/// `configmap` or `secret`, as messages say it.
fn singular(plural: &str) -> &str {
    plural.trim_end_matches('s')
}

/// The object, or why the pod waits for it; none when it is missing and optional.
pub(super) fn object<'a>(
    context: &'a Context<'_>,
    volume: &str,
    selection: &Selection<'_>,
) -> Result<Option<&'a Value>, VolumeError> {
    let key = BlobKey {
        plural: selection.plural.to_owned(),
        namespace: context.namespace.to_owned(),
        name: selection.name.to_owned(),
    };
    match context.blobs.get(&key) {
        Some(value) => Ok(Some(value)),
        None if selection.optional => Ok(None),
        None => Err(VolumeError::Waiting(format!(
            "volume {volume:?}: {} {:?} not found",
            singular(selection.plural),
            selection.name
        ))),
    }
}

/// All keys of an object as bytes: `data` and `binaryData` of a ConfigMap, `data` of a Secret.
pub(super) fn entries(plural: &str, object: &Value) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let mut found = BTreeMap::new();
    let map = |field: &str| object.get(field).and_then(Value::as_object);
    let decode = |key: &str, value: &Value| -> Result<Vec<u8>, String> {
        let text = value.as_str().unwrap_or_default();
        BASE64_STANDARD
            .decode(text)
            .map_err(|_| format!("key {key:?} is not base64"))
    };
    for (key, value) in map("data").into_iter().flatten() {
        let bytes = match plural {
            "secrets" => decode(key, value)?,
            _ => value.as_str().unwrap_or_default().as_bytes().to_vec(),
        };
        found.insert(key.clone(), bytes);
    }
    for (key, value) in map("binaryData").into_iter().flatten() {
        found.insert(key.clone(), decode(key, value)?);
    }
    // Written by people who test with kubectl's own shorthand, normally folded in by the server.
    if plural == "secrets" {
        for (key, value) in map("stringData").into_iter().flatten() {
            found.insert(
                key.clone(),
                value.as_str().unwrap_or_default().as_bytes().to_vec(),
            );
        }
    }
    Ok(found)
}

/// The files that an object gives: every key, or the chosen items under their own paths.
pub(super) fn of_object(
    context: &Context<'_>,
    volume: &str,
    selection: &Selection<'_>,
) -> Result<Payload, VolumeError> {
    let invalid = |reason: String| VolumeError::Invalid {
        volume: volume.to_owned(),
        reason,
    };
    let what = format!("{} {:?}", singular(selection.plural), selection.name);
    let Some(object) = object(context, volume, selection)? else {
        return Ok(Payload::new());
    };
    let mut entries =
        entries(selection.plural, object).map_err(|e| invalid(format!("{what}: {e}")))?;
    let default_mode = mode(selection.default_mode, DEFAULT_MODE);
    let mut payload = Payload::new();
    let Some(items) = selection.items.filter(|i| !i.is_empty()) else {
        for (key, data) in entries {
            let path = check_path(&key).map_err(&invalid)?;
            payload.insert(path, PayloadFile::new(data, default_mode));
        }
        return Ok(payload);
    };
    for item in items {
        let path = check_path(&item.path).map_err(&invalid)?;
        match entries.get_mut(&item.key) {
            Some(data) => {
                let mode = mode(item.mode, default_mode);
                payload.insert(path, PayloadFile::new(data.clone(), mode));
            }
            None if selection.optional => {}
            // The key may come with the object's next version: the pod waits.
            None => {
                return Err(VolumeError::Waiting(format!(
                    "volume {volume:?}: {what} has no key {:?}",
                    item.key
                )));
            }
        }
    }
    Ok(payload)
}

/// Permission bits as the API gives them (decimal in JSON), or `default`.
pub(super) fn mode(mode: Option<i32>, default: u32) -> u32 {
    mode.and_then(|m| u32::try_from(m).ok())
        .map_or(default, |m| m & 0o777)
}

/// A relative path that stays below the volume and out of the writer's own `..` names.
pub(super) fn check_path(path: &str) -> Result<String, String> {
    let fail = |why: &str| Err(format!("file path {path:?}: {why}"));
    if path.is_empty() || path.len() > PATH_BYTES_MAX {
        return fail("want 1 to 4096 bytes");
    }
    if path.starts_with('/') || path.contains('\0') {
        return fail("want a relative path");
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/').filter(|p| !p.is_empty() && *p != ".") {
        if part == ".." {
            return fail("must not contain '..'");
        }
        if part.len() > 255 {
            return fail("a component longer than 255 bytes");
        }
        parts.push(part);
    }
    match parts.first() {
        None => fail("names no file"),
        Some(first) if first.starts_with("..") => fail("must not start with '..'"),
        Some(_) => Ok(parts.join("/")),
    }
}
