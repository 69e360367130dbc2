//! A pod's own fields as text: `fieldRef` and `resourceFieldRef`, for files and variables. Pure
//! but for the node's size, which stands in for a limit that is not set.

use std::collections::BTreeMap;

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod};
use gantry_api::quantity::Quantity;

/// `metadata.*` of a pod.
pub(super) fn of_metadata(pod: &Pod, path: &str) -> Result<String, String> {
    let meta = &pod.metadata;
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    if let Some((map, key)) = subscript(path) {
        let map = match map {
            "metadata.labels" => &meta.labels,
            "metadata.annotations" => &meta.annotations,
            _ => return Err(unsupported(path)),
        };
        return Ok(map
            .as_ref()
            .and_then(|m| m.get(key))
            .cloned()
            .unwrap_or_default());
    }
    match path {
        "metadata.name" => Ok(text(&meta.name)),
        "metadata.namespace" => Ok(text(&meta.namespace)),
        "metadata.uid" => Ok(text(&meta.uid)),
        "metadata.labels" => Ok(lines(meta.labels.as_ref())),
        "metadata.annotations" => Ok(lines(meta.annotations.as_ref())),
        _ => Err(unsupported(path)),
    }
}

fn unsupported(path: &str) -> String {
    format!("field path {path:?} is not supported")
}

/// `metadata.labels['key']`
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, rest) = path.split_once("['")?;
    Some((map, rest.strip_suffix("']")?))
}

/// `key="value"` per line, sorted, escaped as Go's %q does for ordinary text.
fn lines(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> = map
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={v:?}"))
        .collect();
    lines.join("\n")
}

/// `limits.cpu`, `requests.memory` and so on, in units of `divisor`, rounded up.
pub(super) fn of_resource(
    container: &Container,
    resource: &str,
    divisor: Option<&str>,
) -> Result<String, String> {
    let bad = || format!("resource {resource:?}: want limits.NAME or requests.NAME");
    let (list, name) = resource.split_once('.').ok_or_else(bad)?;
    let resources = container.resources.as_ref();
    let map = match list {
        "limits" => resources.and_then(|r| r.limits.as_ref()),
        "requests" => resources.and_then(|r| r.requests.as_ref()),
        _ => return Err(bad()),
    };
    let parse = |text: &str| Quantity::parse(text).map_err(|e| format!("quantity {text:?}: {e}"));
    let value = match map.and_then(|m| m.get(name)) {
        Some(quantity) => parse(&quantity.0)?,
        None if list == "limits" => of_node(name).unwrap_or(Quantity::from_units(0)),
        None => Quantity::from_units(0),
    };
    // "0" is what an absent divisor looks like once it went through the API.
    let divisor = parse(
        divisor
            .filter(|d| !d.is_empty() && *d != "0")
            .unwrap_or("1"),
    )?;
    let (value, divisor) = match name {
        "cpu" => (value.milli(), divisor.milli()),
        _ => (value.units(), divisor.units()),
    };
    let quotient = i128::from(value.max(0)).div_euclid(i128::from(divisor.max(1)));
    let rest = i128::from(value.max(0)).rem_euclid(i128::from(divisor.max(1)));
    Ok((quotient + i128::from(rest > 0)).to_string())
}

/// What the node has, for a container without a limit.
fn of_node(name: &str) -> Option<Quantity> {
    match name {
        "cpu" => {
            let cpus = std::thread::available_parallelism().ok()?;
            Some(Quantity::from_units(i64::try_from(cpus.get()).ok()?))
        }
        "memory" => {
            let text = std::fs::read_to_string("/proc/meminfo").ok()?;
            let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
            let kib: i64 = line.trim().trim_end_matches(" kB").parse().ok()?;
            Some(Quantity::from_bytes(kib.checked_mul(1024)?))
        }
        _ => None,
    }
}
