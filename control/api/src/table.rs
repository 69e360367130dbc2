//! `get` as people read it: the columns of every kind, rendered once, for `gantry` and kubectl.
//!
//! Columns and texts are those of Kubernetes' `pkg/printers/internalversion/printers.go`. Rows are
//! made from JSON and the caller's clock; a field that is missing shows as `<none>` or
//! `<unknown>`, so an object of any age and origin has a row.

mod pod;
mod policy;
mod storage;
mod workload;

pub use pod::{PodSummary, summarize as pod_summary};
pub use policy::{metric_status, metric_text};

use crate::kinds::Kind;
use crate::proto::{TableColumn, TableRow};
use jiff::Timestamp;
use serde_json::Value;
use std::collections::BTreeMap;

const NONE: &str = "<none>";
/// Endpoints and ports that an EndpointSlice's row shows.
const SHOWN_MAX: usize = 3;

/// The columns of a kind; with `wide` also those of `-o wide`, with `namespace` NAMESPACE first.
#[must_use]
pub fn columns(kind: &Kind, wide: bool, namespace: bool) -> Vec<TableColumn> {
    let (names, wide_names) = names(kind);
    let column = |name: &str, wide_only| TableColumn {
        name: name.to_owned(),
        wide_only,
    };
    let first = (namespace && kind.namespaced).then(|| column("NAMESPACE", false));
    // Events show their wide columns in the middle.
    if kind.kind == "Event" && wide {
        let all = [
            "LAST SEEN",
            "TYPE",
            "REASON",
            "OBJECT",
            "SUBOBJECT",
            "SOURCE",
            "MESSAGE",
            "FIRST SEEN",
            "COUNT",
            "NAME",
        ];
        let wide_only = |name: &str| wide_names.contains(&name);
        return first
            .into_iter()
            .chain(all.iter().map(|name| column(name, wide_only(name))))
            .collect();
    }
    let wide_names = if wide { wide_names } else { &[] };
    first
        .into_iter()
        .chain(names.iter().map(|name| column(name, false)))
        .chain(wide_names.iter().map(|name| column(name, true)))
        .collect()
}

fn names(kind: &Kind) -> (&'static [&'static str], &'static [&'static str]) {
    match kind.kind {
        "Pod" => (
            &["NAME", "READY", "STATUS", "RESTARTS", "AGE"],
            &["IP", "NODE", "NOMINATED NODE", "READINESS GATES"],
        ),
        "Deployment" => (
            &["NAME", "READY", "UP-TO-DATE", "AVAILABLE", "AGE"],
            &["CONTAINERS", "IMAGES", "SELECTOR"],
        ),
        "ReplicaSet" => (
            &["NAME", "DESIRED", "CURRENT", "READY", "AGE"],
            &["CONTAINERS", "IMAGES", "SELECTOR"],
        ),
        "Service" => (
            &[
                "NAME",
                "TYPE",
                "CLUSTER-IP",
                "EXTERNAL-IP",
                "PORT(S)",
                "AGE",
            ],
            &["SELECTOR"],
        ),
        "Node" => (
            &["NAME", "STATUS", "ROLES", "AGE", "VERSION"],
            &[
                "INTERNAL-IP",
                "EXTERNAL-IP",
                "OS-IMAGE",
                "KERNEL-VERSION",
                "CONTAINER-RUNTIME",
            ],
        ),
        "DaemonSet" => (
            &[
                "NAME",
                "DESIRED",
                "CURRENT",
                "READY",
                "UP-TO-DATE",
                "AVAILABLE",
                "NODE SELECTOR",
                "AGE",
            ],
            &["CONTAINERS", "IMAGES", "SELECTOR"],
        ),
        "StatefulSet" => (&["NAME", "READY", "AGE"], &["CONTAINERS", "IMAGES"]),
        "ReplicationController" => (
            &["NAME", "DESIRED", "CURRENT", "READY", "AGE"],
            &["CONTAINERS", "IMAGES", "SELECTOR"],
        ),
        "Job" => (
            &["NAME", "STATUS", "COMPLETIONS", "DURATION", "AGE"],
            &["CONTAINERS", "IMAGES", "SELECTOR"],
        ),
        "CronJob" => (
            &[
                "NAME",
                "SCHEDULE",
                "TIMEZONE",
                "SUSPEND",
                "ACTIVE",
                "LAST SCHEDULE",
                "AGE",
            ],
            &["CONTAINERS", "IMAGES", "SELECTOR"],
        ),
        "PersistentVolumeClaim" => (
            &[
                "NAME",
                "STATUS",
                "VOLUME",
                "CAPACITY",
                "ACCESS MODES",
                "STORAGECLASS",
                "AGE",
            ],
            &["VOLUMEMODE"],
        ),
        "PersistentVolume" => (
            &[
                "NAME",
                "CAPACITY",
                "ACCESS MODES",
                "RECLAIM POLICY",
                "STATUS",
                "CLAIM",
                "STORAGECLASS",
                "REASON",
                "AGE",
            ],
            &["VOLUMEMODE"],
        ),
        "StorageClass" => (
            &[
                "NAME",
                "PROVISIONER",
                "RECLAIMPOLICY",
                "VOLUMEBINDINGMODE",
                "ALLOWVOLUMEEXPANSION",
                "AGE",
            ],
            &[],
        ),
        "PriorityClass" => (
            &["NAME", "VALUE", "GLOBAL-DEFAULT", "AGE", "PREEMPTIONPOLICY"],
            &[],
        ),
        "ResourceQuota" => (&["NAME", "REQUEST", "LIMIT", "AGE"], &[]),
        "LimitRange" => (&["NAME", "CREATED AT"], &[]),
        "HorizontalPodAutoscaler" => (
            &[
                "NAME",
                "REFERENCE",
                "TARGETS",
                "MINPODS",
                "MAXPODS",
                "REPLICAS",
                "AGE",
            ],
            &[],
        ),
        "PodDisruptionBudget" => (
            &[
                "NAME",
                "MIN AVAILABLE",
                "MAX UNAVAILABLE",
                "ALLOWED DISRUPTIONS",
                "AGE",
            ],
            &[],
        ),
        "ControllerRevision" => (&["NAME", "CONTROLLER", "REVISION", "AGE"], &[]),
        "ServiceAccount" => (&["NAME", "AGE"], &[]),
        "EndpointSlice" => (&["NAME", "ADDRESSTYPE", "PORTS", "ENDPOINTS", "AGE"], &[]),
        "NetworkPolicy" => (&["NAME", "POD-SELECTOR", "AGE"], &[]),
        "Event" => (
            &["LAST SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"],
            &["SUBOBJECT", "SOURCE", "FIRST SEEN", "COUNT", "NAME"],
        ),
        "ConfigMap" => (&["NAME", "DATA", "AGE"], &[]),
        "Secret" => (&["NAME", "TYPE", "DATA", "AGE"], &[]),
        "Namespace" => (&["NAME", "STATUS", "AGE"], &[]),
        "Lease" => (&["NAME", "HOLDER", "AGE"], &[]),
        _ => (&["NAME", "AGE"], &[]),
    }
}

/// The row of one object, cells in the order of [`columns`] with the same arguments.
#[must_use]
pub fn row(kind: &Kind, object: &Value, now: Timestamp, wide: bool, namespace: bool) -> TableRow {
    let name = text(object, "/metadata/name").to_owned();
    let own_namespace = text(object, "/metadata/namespace").to_owned();
    let mut cells = Vec::new();
    if namespace && kind.namespaced {
        cells.push(own_namespace.clone());
    }
    let age = age(object, now);
    let own = || name.clone();
    match kind.kind {
        "Pod" => cells.extend(pod::cells(object, now, wide)),
        "Deployment" => cells.extend(deployment(object, &age, wide)),
        "ReplicaSet" => cells.extend(replica_set(object, &age, wide)),
        "DaemonSet" => cells.extend(workload::daemon_set(object, age, wide)),
        "StatefulSet" => cells.extend(workload::stateful_set(object, age, wide)),
        "ReplicationController" => cells.extend(workload::replication(object, age, wide)),
        "Job" => cells.extend(workload::job(object, age, now, wide)),
        "CronJob" => cells.extend(workload::cron_job(object, age, now, wide)),
        "PersistentVolumeClaim" => cells.extend(storage::claim(object, age, wide)),
        "PersistentVolume" => cells.extend(storage::volume(object, age, wide)),
        "StorageClass" => cells.extend(storage::class(object, age)),
        "PriorityClass" => cells.extend(storage::priority(object, age)),
        "ResourceQuota" => cells.extend(policy::quota(object, age)),
        "HorizontalPodAutoscaler" => cells.extend(policy::autoscaler(object, age)),
        "PodDisruptionBudget" => cells.extend(policy::disruption_budget(object, age)),
        "LimitRange" => cells.extend([
            own(),
            text(object, "/metadata/creationTimestamp").to_owned(),
        ]),
        "ControllerRevision" => cells.extend(workload::revision(object, age)),
        "Service" => cells.extend(service(object, age, wide)),
        "Node" => cells.extend(node(object, age, wide)),
        "EndpointSlice" => cells.extend(endpoint_slice(object, age)),
        "NetworkPolicy" => {
            let pods = label_selector_text(object.pointer("/spec/podSelector"));
            cells.extend([own(), pods, age]);
        }
        "Event" => cells.extend(event(object, now, wide)),
        "ConfigMap" => {
            let count = map_len(object, "/data") + map_len(object, "/binaryData");
            cells.extend([own(), count.to_string(), age]);
        }
        "Secret" => {
            let kind = text(object, "/type").to_owned();
            cells.extend([own(), kind, map_len(object, "/data").to_string(), age]);
        }
        "Namespace" => cells.extend([own(), text(object, "/status/phase").to_owned(), age]),
        "Lease" => cells.extend([own(), text(object, "/spec/holderIdentity").to_owned(), age]),
        _ => cells.extend([own(), age]),
    }
    TableRow {
        cells,
        namespace: own_namespace,
        name,
    }
}

/// A text field; "" when absent or of another type.
fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

fn or_none(text: &str) -> String {
    if text.is_empty() {
        NONE.to_owned()
    } else {
        text.to_owned()
    }
}

fn number(object: &Value, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}

fn list<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object
        .pointer(pointer)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}

fn map_len(object: &Value, pointer: &str) -> usize {
    object
        .pointer(pointer)
        .and_then(Value::as_object)
        .map_or(0, serde_json::Map::len)
}

/// The time in a field, if it holds one.
fn time(object: &Value, pointer: &str) -> Option<Timestamp> {
    text(object, pointer).parse().ok()
}

/// How long ago the object was created, as kubectl writes it.
#[must_use]
pub fn age(object: &Value, now: Timestamp) -> String {
    since(time(object, "/metadata/creationTimestamp"), now)
}

fn since(then: Option<Timestamp>, now: Timestamp) -> String {
    match then {
        Some(then) => human_duration(now.as_second().saturating_sub(then.as_second())),
        None => "<unknown>".to_owned(),
    }
}

/// kubectl's short durations: `90s`, `3m12s`, `5h4m`, `2d3h`, `400d`.
#[must_use]
pub fn human_duration(seconds: i64) -> String {
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let pair = |large: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 {
            format!("{large}{unit}")
        } else {
            format!("{large}{unit}{small}{small_unit}")
        }
    };
    match seconds {
        ..-1 => "<invalid>".to_owned(), // clocks differ: up to a second is tolerated
        -1..0 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        _ if minutes < 10 => pair(minutes, "m", seconds % 60, "s"),
        _ if minutes < 180 => format!("{minutes}m"),
        _ if hours < 8 => pair(hours, "h", minutes % 60, "m"),
        _ if hours < 48 => format!("{hours}h"),
        _ if hours < 24 * 8 => pair(hours / 24, "d", hours % 24, "h"),
        _ if hours < 24 * 365 * 2 => format!("{}d", hours / 24),
        _ if hours < 24 * 365 * 8 => pair(hours / 24 / 365, "y", hours / 24 % 365, "d"),
        _ => format!("{}y", hours / 24 / 365),
    }
}

/// Labels or a selector's matchLabels as `a=b,c=d`.
#[must_use]
pub fn labels_text(labels: Option<&Value>) -> String {
    let map = labels.and_then(Value::as_object);
    let pairs: Vec<String> = map
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    or_none(&pairs.join(","))
}

/// A label selector as `a=b,c in (d,e)`; `<none>` when it is empty.
#[must_use]
pub fn label_selector_text(selector: Option<&Value>) -> String {
    let parsed = selector
        .and_then(|s| serde_json::from_value(s.clone()).ok())
        .and_then(|s| crate::selector::Selector::from_api(&s).ok());
    or_none(&parsed.map(|s| s.to_string()).unwrap_or_default())
}

fn template_cells(object: &Value) -> [String; 3] {
    let containers = list(object, "/spec/template/spec/containers");
    let join = |pointer| {
        containers
            .iter()
            .map(|c| text(c, pointer))
            .collect::<Vec<_>>()
            .join(",")
    };
    [
        join("/name"),
        join("/image"),
        label_selector_text(object.pointer("/spec/selector")),
    ]
}

fn deployment(object: &Value, age: &str, wide: bool) -> Vec<String> {
    let wanted = object
        .pointer("/spec/replicas")
        .and_then(Value::as_i64)
        .unwrap_or(1);
    let mut cells = vec![
        text(object, "/metadata/name").to_owned(),
        format!("{}/{wanted}", number(object, "/status/readyReplicas")),
        number(object, "/status/updatedReplicas").to_string(),
        number(object, "/status/availableReplicas").to_string(),
        age.to_owned(),
    ];
    if wide {
        cells.extend(template_cells(object));
    }
    cells
}

fn replica_set(object: &Value, age: &str, wide: bool) -> Vec<String> {
    let wanted = object
        .pointer("/spec/replicas")
        .and_then(Value::as_i64)
        .unwrap_or(1);
    let mut cells = vec![
        text(object, "/metadata/name").to_owned(),
        wanted.to_string(),
        number(object, "/status/replicas").to_string(),
        number(object, "/status/readyReplicas").to_string(),
        age.to_owned(),
    ];
    if wide {
        cells.extend(template_cells(object));
    }
    cells
}

fn service(object: &Value, age: String, wide: bool) -> Vec<String> {
    let kind = text(object, "/spec/type");
    let ports: Vec<String> = list(object, "/spec/ports")
        .iter()
        .map(|port| {
            let protocol = port
                .get("protocol")
                .and_then(Value::as_str)
                .unwrap_or("TCP");
            let node_port = number(port, "/nodePort");
            let own = number(port, "/port");
            if node_port > 0 {
                format!("{own}:{node_port}/{protocol}")
            } else {
                format!("{own}/{protocol}")
            }
        })
        .collect();
    let mut cells = vec![
        text(object, "/metadata/name").to_owned(),
        if kind.is_empty() {
            "ClusterIP".to_owned()
        } else {
            kind.to_owned()
        },
        or_none(text(object, "/spec/clusterIP")),
        external_ip(object, kind, wide),
        or_none(&ports.join(",")),
        age,
    ];
    if wide {
        cells.push(labels_text(object.pointer("/spec/selector")));
    }
    cells
}

fn external_ip(object: &Value, kind: &str, wide: bool) -> String {
    let mut addresses: Vec<&str> = list(object, "/spec/externalIPs")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    match kind {
        "ExternalName" => return or_none(text(object, "/spec/externalName")),
        "LoadBalancer" => {
            let ingress = list(object, "/status/loadBalancer/ingress");
            let shown = |i| match text(i, "/ip") {
                "" => text(i, "/hostname"),
                ip => ip,
            };
            addresses.splice(0..0, ingress.iter().map(shown));
            if addresses.is_empty() {
                return "<pending>".to_owned();
            }
        }
        _ => {}
    }
    let mut joined = addresses.join(",");
    if !wide && joined.len() > 16 && kind == "LoadBalancer" {
        joined.truncate(joined.floor_char_boundary(13));
        joined.push_str("...");
    }
    or_none(&joined)
}

fn node(object: &Value, age: String, wide: bool) -> Vec<String> {
    let ready = list(object, "/status/conditions")
        .iter()
        .find(|c| text(c, "/type") == "Ready");
    let mut status = match ready.map(|c| text(c, "/status")) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if object.pointer("/spec/unschedulable") == Some(&Value::Bool(true)) {
        status.push_str(",SchedulingDisabled");
    }
    let labels = object
        .pointer("/metadata/labels")
        .and_then(Value::as_object);
    let mut roles: Vec<&str> = labels
        .into_iter()
        .flatten()
        .filter_map(
            |(key, value)| match key.strip_prefix("node-role.kubernetes.io/") {
                Some(role) if !role.is_empty() => Some(role),
                _ if key == "kubernetes.io/role" => value.as_str().filter(|v| !v.is_empty()),
                _ => None,
            },
        )
        .collect();
    roles.sort_unstable();
    roles.dedup();
    let mut cells = vec![
        text(object, "/metadata/name").to_owned(),
        status,
        or_none(&roles.join(",")),
        age,
        text(object, "/status/nodeInfo/kubeletVersion").to_owned(),
    ];
    if wide {
        let address = |kind| {
            let addresses = list(object, "/status/addresses");
            let found = addresses.iter().find(|a| text(a, "/type") == kind);
            or_none(found.map(|a| text(a, "/address")).unwrap_or_default())
        };
        let info = |field: &str| match text(object, &format!("/status/nodeInfo/{field}")) {
            "" => "<unknown>".to_owned(),
            value => value.to_owned(),
        };
        cells.extend([
            address("InternalIP"),
            address("ExternalIP"),
            info("osImage"),
            info("kernelVersion"),
            info("containerRuntimeVersion"),
        ]);
    }
    cells
}

/// The first three, and how many more there are.
fn shortened(items: &[String]) -> String {
    let shown = items
        .iter()
        .take(SHOWN_MAX)
        .cloned()
        .collect::<Vec<_>>()
        .join(",");
    match items.len().saturating_sub(SHOWN_MAX) {
        0 => shown,
        more => format!("{shown} + {more} more..."),
    }
}

fn endpoint_slice(object: &Value, age: String) -> Vec<String> {
    let ports: Vec<String> = list(object, "/ports")
        .iter()
        .map(|port| match port.get("port").and_then(Value::as_i64) {
            Some(port) => port.to_string(),
            None => text(port, "/name").to_owned(),
        })
        .collect();
    let addresses: Vec<String> = list(object, "/endpoints")
        .iter()
        .flat_map(|endpoint| list(endpoint, "/addresses"))
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect();
    let unset = |text: String| {
        if text.is_empty() {
            "<unset>".to_owned()
        } else {
            text
        }
    };
    vec![
        text(object, "/metadata/name").to_owned(),
        text(object, "/addressType").to_owned(),
        unset(shortened(&ports)),
        unset(shortened(&addresses)),
        age,
    ]
}

/// When an event was seen first and last: events/v1 fields first, then the old ones.
#[must_use]
pub fn event_times(object: &Value) -> (Option<Timestamp>, Option<Timestamp>) {
    let at = |pointer| time(object, pointer);
    let created = at("/metadata/creationTimestamp");
    let first = at("/firstTimestamp")
        .or_else(|| at("/eventTime"))
        .or(created);
    let last = at("/series/lastObservedTime")
        .or_else(|| at("/lastTimestamp"))
        .or_else(|| at("/eventTime"))
        .or(created);
    (first, last)
}

fn event(object: &Value, now: Timestamp, wide: bool) -> Vec<String> {
    let (first, last) = event_times(object);
    let about = |field: &str| text(object, &format!("/involvedObject/{field}")).to_owned();
    let kind = about("kind").to_lowercase();
    let target = if about("name").is_empty() {
        kind
    } else {
        format!("{kind}/{}", about("name"))
    };
    let message = text(object, "/message").trim().to_owned();
    let mut cells = vec![
        since(last, now),
        text(object, "/type").to_owned(),
        text(object, "/reason").to_owned(),
        target,
    ];
    if !wide {
        cells.push(message);
        return cells;
    }
    let component = match text(object, "/source/component") {
        "" => text(object, "/reportingComponent"),
        component => component,
    };
    let source = match text(object, "/source/host") {
        "" => component.to_owned(),
        host => format!("{component}, {host}"),
    };
    let count = number(object, "/count")
        .max(number(object, "/series/count"))
        .max(1);
    cells.extend([
        about("fieldPath"),
        source,
        message,
        since(first, now),
        count.to_string(),
        text(object, "/metadata/name").to_owned(),
    ]);
    cells
}

/// Column widths for printing: the widest cell of each column, in characters.
#[must_use]
pub fn widths<'a>(rows: impl Iterator<Item = &'a [String]>) -> Vec<usize> {
    let mut widths = BTreeMap::new();
    for row in rows {
        for (i, cell) in row.iter().enumerate() {
            let width = widths.entry(i).or_insert(0);
            *width = cell.chars().count().max(*width);
        }
    }
    widths.into_values().collect()
}

#[cfg(test)]
mod tests;
