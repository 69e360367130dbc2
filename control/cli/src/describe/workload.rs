//! `describe` of the workloads beside Deployments, in kubectl's words.

use super::text::{self, Text, field, items, number};
use super::{common, labels, pod, selector_text};
use serde_json::Value;

fn head(object: &Value, text: &mut Text) {
    common(object, true, text);
    text.line(0, "Selector", &selector_text(object));
    labels(object, text);
}

pub(super) fn daemon_set(object: &Value, text: &mut Text) {
    head(object, text);
    for (label, pointer) in [
        (
            "Desired Number of Nodes Scheduled",
            "/status/desiredNumberScheduled",
        ),
        (
            "Current Number of Nodes Scheduled",
            "/status/currentNumberScheduled",
        ),
        (
            "Number of Nodes Scheduled with Up-to-date Pods",
            "/status/updatedNumberScheduled",
        ),
        (
            "Number of Nodes Scheduled with Available Pods",
            "/status/numberAvailable",
        ),
        ("Number of Nodes Misscheduled", "/status/numberMisscheduled"),
    ] {
        text.line(0, label, &number(object, pointer).to_string());
    }
    pod::template(object, text);
}

pub(super) fn stateful_set(object: &Value, text: &mut Text) {
    head(object, text);
    let (desired, total) = (
        number(object, "/spec/replicas"),
        number(object, "/status/replicas"),
    );
    text.line(0, "Replicas", &format!("{desired} desired | {total} total"));
    text.line(
        0,
        "Update Strategy",
        field(object, "/spec/updateStrategy/type"),
    );
    let partition = number(object, "/spec/updateStrategy/rollingUpdate/partition");
    text.line(1, "Partition", &partition.to_string());
    pod::template(object, text);
    let claims = items(object, "/spec/volumeClaimTemplates");
    if claims.is_empty() {
        text.line(0, "Volume Claims", "<none>");
        return;
    }
    text.head(0, "Volume Claims");
    for claim in claims {
        text.line(1, "Name", field(claim, "/metadata/name"));
        text.line(1, "StorageClass", field(claim, "/spec/storageClassName"));
        text.line(
            1,
            "Capacity",
            field(claim, "/spec/resources/requests/storage"),
        );
    }
}

pub(super) fn job(object: &Value, text: &mut Text) {
    head(object, text);
    text.line(0, "Controlled By", &text::controller(object));
    text.line(
        0,
        "Parallelism",
        &number(object, "/spec/parallelism").to_string(),
    );
    let completions = object.pointer("/spec/completions").and_then(Value::as_i64);
    let completions = completions.map_or_else(|| "<unset>".to_owned(), |n| n.to_string());
    text.line(0, "Completions", &completions);
    text.line(0, "Completion Mode", field(object, "/spec/completionMode"));
    let suspended = object.pointer("/spec/suspend") == Some(&Value::Bool(true));
    text.line(0, "Suspend", &suspended.to_string());
    text.line(
        0,
        "Backoff Limit",
        &number(object, "/spec/backoffLimit").to_string(),
    );
    for (label, pointer) in [
        ("Start Time", "/status/startTime"),
        ("Completed At", "/status/completionTime"),
    ] {
        if !field(object, pointer).is_empty() {
            text.line(0, label, field(object, pointer));
        }
    }
    let counts = format!(
        "{} Active ({} Ready) / {} Succeeded / {} Failed",
        number(object, "/status/active"),
        number(object, "/status/ready"),
        number(object, "/status/succeeded"),
        number(object, "/status/failed"),
    );
    text.line(0, "Pods Statuses", &counts);
    if !field(object, "/status/completedIndexes").is_empty() {
        text.line(
            0,
            "Completed Indexes",
            field(object, "/status/completedIndexes"),
        );
    }
    pod::template(object, text);
    text::conditions(object, &["Type", "Status", "Reason"], text);
}

pub(super) fn cron_job(object: &Value, text: &mut Text) {
    common(object, true, text);
    labels(object, text);
    text.line(0, "Schedule", field(object, "/spec/schedule"));
    if !field(object, "/spec/timeZone").is_empty() {
        text.line(0, "Time Zone", field(object, "/spec/timeZone"));
    }
    text.line(
        0,
        "Concurrency Policy",
        field(object, "/spec/concurrencyPolicy"),
    );
    let suspended = object.pointer("/spec/suspend") == Some(&Value::Bool(true));
    text.line(0, "Suspend", if suspended { "True" } else { "False" });
    for (label, pointer) in [
        (
            "Successful Job History Limit",
            "/spec/successfulJobsHistoryLimit",
        ),
        ("Failed Job History Limit", "/spec/failedJobsHistoryLimit"),
    ] {
        text.line(0, label, &number(object, pointer).to_string());
    }
    if let Some(job) = object.pointer("/spec/jobTemplate") {
        pod::template(job, text);
    }
    let last = field(object, "/status/lastScheduleTime");
    text.line(
        0,
        "Last Schedule Time",
        if last.is_empty() { "<unset>" } else { last },
    );
    let active: Vec<&str> = items(object, "/status/active")
        .iter()
        .map(|job| field(job, "/name"))
        .collect();
    let active = if active.is_empty() {
        "<none>".to_owned()
    } else {
        active.join(", ")
    };
    text.line(0, "Active Jobs", &active);
}
