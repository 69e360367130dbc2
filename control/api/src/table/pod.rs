//! A pod's row: kubectl's STATUS is no field but a reading of phase, reasons and container states.

use super::{list, number, or_none, since, text, time};
use jiff::Timestamp;
use serde_json::Value;
use std::collections::BTreeSet;

/// What a pod's row says, before it becomes text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSummary {
    /// Containers that are ready.
    pub ready: usize,
    /// Containers in the spec.
    pub total: usize,
    /// `Running`, `CrashLoopBackOff`, `Init:0/1`, `Terminating`, ….
    pub status: String,
    /// Restarts of all containers.
    pub restarts: i64,
    /// When the last one ended.
    pub last_restart: Option<Timestamp>,
}

/// Reads a pod as `kubectl get pods` does.
#[must_use]
pub fn summarize(pod: &Value) -> PodSummary {
    let phase = text(pod, "/status/phase");
    let own_reason = text(pod, "/status/reason");
    let mut summary = PodSummary {
        ready: 0,
        total: list(pod, "/spec/containers").len() + sidecars(pod).len(),
        status: if own_reason.is_empty() {
            phase
        } else {
            own_reason
        }
        .to_owned(),
        restarts: 0,
        last_restart: None,
    };
    let initializing = init_containers(pod, &mut summary);
    if !initializing || condition(pod, "Initialized") {
        // From here only the restarts of sidecars and main containers count.
        (summary.restarts, summary.last_restart) = (0, None);
        let sidecars = sidecars(pod);
        for status in list(pod, "/status/initContainerStatuses") {
            if sidecars.contains(text(status, "/name")) {
                count_restarts(status, &mut summary);
            }
        }
        containers(pod, &mut summary);
    }
    if pod
        .pointer("/metadata/deletionTimestamp")
        .is_some_and(|t| !t.is_null())
    {
        if own_reason == "NodeLost" {
            "Unknown".clone_into(&mut summary.status);
        } else if !matches!(phase, "Succeeded" | "Failed") {
            "Terminating".clone_into(&mut summary.status);
        }
    }
    summary
}

fn condition(pod: &Value, kind: &str) -> bool {
    list(pod, "/status/conditions")
        .iter()
        .any(|c| text(c, "/type") == kind && text(c, "/status") == "True")
}

fn count_restarts(status: &Value, summary: &mut PodSummary) {
    summary.restarts = summary
        .restarts
        .saturating_add(number(status, "/restartCount"));
    let ended = time(status, "/lastState/terminated/finishedAt");
    summary.last_restart = summary.last_restart.max(ended);
}

/// How a container ended: its reason, else its signal or exit code.
fn ending(terminated: &Value) -> String {
    match (text(terminated, "/reason"), number(terminated, "/signal")) {
        ("", 0) => format!("ExitCode:{}", number(terminated, "/exitCode")),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

/// Names of the init containers that run beside the main ones.
fn sidecars(pod: &Value) -> BTreeSet<&str> {
    let init = list(pod, "/spec/initContainers").iter();
    init.filter(|c| text(c, "/restartPolicy") == "Always")
        .map(|c| text(c, "/name"))
        .collect()
}

/// Whether the pod still runs its init containers; then also what its status is.
fn init_containers(pod: &Value, summary: &mut PodSummary) -> bool {
    let total = list(pod, "/spec/initContainers").len();
    let sidecars = sidecars(pod);
    for (i, status) in list(pod, "/status/initContainerStatuses")
        .iter()
        .enumerate()
    {
        count_restarts(status, summary);
        let is_true = |field: &str| status.get(field) == Some(&Value::Bool(true));
        if sidecars.contains(text(status, "/name")) && is_true("started") {
            summary.ready += usize::from(is_true("ready"));
            continue;
        }
        if let Some(terminated) = status.pointer("/state/terminated") {
            if number(terminated, "/exitCode") == 0 {
                continue;
            }
            summary.status = format!("Init:{}", ending(terminated));
        } else {
            summary.status = match text(status, "/state/waiting/reason") {
                "" | "PodInitializing" => format!("Init:{i}/{total}"),
                reason => format!("Init:{reason}"),
            };
        }
        return true;
    }
    false
}

fn containers(pod: &Value, summary: &mut PodSummary) {
    let mut has_running = false;
    for status in list(pod, "/status/containerStatuses").iter().rev() {
        count_restarts(status, summary);
        let waiting = text(status, "/state/waiting/reason");
        if !waiting.is_empty() {
            waiting.clone_into(&mut summary.status);
        } else if let Some(terminated) = status.pointer("/state/terminated") {
            summary.status = ending(terminated);
        } else if status.get("ready") == Some(&Value::Bool(true))
            && status.pointer("/state/running").is_some()
        {
            has_running = true;
            summary.ready += 1;
        }
    }
    // One container is done, another runs on.
    if summary.status == "Completed" && has_running {
        let status = if condition(pod, "Ready") {
            "Running"
        } else {
            "NotReady"
        };
        status.clone_into(&mut summary.status);
    }
}

pub(super) fn cells(pod: &Value, now: Timestamp, wide: bool) -> Vec<String> {
    let summary = summarize(pod);
    let restarts = match summary.last_restart {
        Some(ended) if summary.restarts > 0 => {
            format!("{} ({} ago)", summary.restarts, since(Some(ended), now))
        }
        _ => summary.restarts.to_string(),
    };
    let mut cells = vec![
        text(pod, "/metadata/name").to_owned(),
        format!("{}/{}", summary.ready, summary.total),
        summary.status,
        restarts,
        super::age(pod, now),
    ];
    if wide {
        cells.extend([
            or_none(text(pod, "/status/podIP")),
            or_none(text(pod, "/spec/nodeName")),
            or_none(text(pod, "/status/nominatedNodeName")),
            super::NONE.to_owned(),
        ]);
    }
    cells
}
