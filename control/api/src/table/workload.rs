//! Rows of the workloads beside Deployments.

use super::{
    label_selector_text, labels_text, list, number, or_none, since, template_cells, text, time,
};
use jiff::Timestamp;
use serde_json::Value;

fn name(object: &Value) -> String {
    text(object, "/metadata/name").to_owned()
}

fn counts(object: &Value, pointers: &[&str]) -> Vec<String> {
    let one = |pointer: &&str| number(object, pointer).to_string();
    pointers.iter().map(one).collect()
}

pub(super) fn daemon_set(object: &Value, age: String, wide: bool) -> Vec<String> {
    let mut cells = vec![name(object)];
    cells.extend(counts(
        object,
        &[
            "/status/desiredNumberScheduled",
            "/status/currentNumberScheduled",
            "/status/numberReady",
            "/status/updatedNumberScheduled",
            "/status/numberAvailable",
        ],
    ));
    cells.push(labels_text(
        object.pointer("/spec/template/spec/nodeSelector"),
    ));
    cells.push(age);
    if wide {
        cells.extend(template_cells(object));
    }
    cells
}

pub(super) fn stateful_set(object: &Value, age: String, wide: bool) -> Vec<String> {
    let ready = number(object, "/status/readyReplicas");
    let wanted = number(object, "/spec/replicas");
    let mut cells = vec![name(object), format!("{ready}/{wanted}"), age];
    if wide {
        let [containers, images, _] = template_cells(object);
        cells.extend([containers, images]);
    }
    cells
}

pub(super) fn replication(object: &Value, age: String, wide: bool) -> Vec<String> {
    let mut cells = vec![name(object)];
    cells.extend(counts(
        object,
        &[
            "/spec/replicas",
            "/status/replicas",
            "/status/readyReplicas",
        ],
    ));
    cells.push(age);
    if wide {
        let [containers, images, _] = template_cells(object);
        cells.extend([
            containers,
            images,
            labels_text(object.pointer("/spec/selector")),
        ]);
    }
    cells
}

fn is_true(object: &Value, type_: &str) -> bool {
    let conditions = list(object, "/status/conditions");
    let found = conditions.iter().find(|c| text(c, "/type") == type_);
    found.is_some_and(|c| text(c, "/status") == "True")
}

pub(super) fn job(object: &Value, age: String, now: Timestamp, wide: bool) -> Vec<String> {
    let status = if is_true(object, "Complete") {
        "Complete"
    } else if is_true(object, "Failed") {
        "Failed"
    } else if !text(object, "/metadata/deletionTimestamp").is_empty() {
        "Terminating"
    } else if is_true(object, "Suspended") {
        "Suspended"
    } else if is_true(object, "FailureTarget") {
        "FailureTarget"
    } else if is_true(object, "SuccessCriteriaMet") {
        "SuccessCriteriaMet"
    } else {
        "Running"
    };
    let succeeded = number(object, "/status/succeeded");
    let completions = match object.pointer("/spec/completions").and_then(Value::as_i64) {
        Some(wanted) => format!("{succeeded}/{wanted}"),
        None if number(object, "/spec/parallelism") > 1 => {
            format!("{succeeded}/1 of {}", number(object, "/spec/parallelism"))
        }
        None => format!("{succeeded}/1"),
    };
    let duration = match time(object, "/status/startTime") {
        None => String::new(),
        start => since(start, time(object, "/status/completionTime").unwrap_or(now)),
    };
    let mut cells = vec![name(object), status.to_owned(), completions, duration, age];
    if wide {
        cells.extend(template_cells(object));
    }
    cells
}

pub(super) fn cron_job(object: &Value, age: String, now: Timestamp, wide: bool) -> Vec<String> {
    let suspended = object.pointer("/spec/suspend") == Some(&Value::Bool(true));
    let last = match time(object, "/status/lastScheduleTime") {
        None => super::NONE.to_owned(),
        last => since(last, now),
    };
    let mut cells = vec![
        name(object),
        text(object, "/spec/schedule").to_owned(),
        or_none(text(object, "/spec/timeZone")),
        if suspended { "True" } else { "False" }.to_owned(),
        list(object, "/status/active").len().to_string(),
        last,
        age,
    ];
    if wide {
        let job = object.pointer("/spec/jobTemplate").unwrap_or(&Value::Null);
        let [containers, images, _] = template_cells(job);
        let selector = label_selector_text(job.pointer("/spec/selector"));
        cells.extend([containers, images, selector]);
    }
    cells
}

pub(super) fn revision(object: &Value, age: String) -> Vec<String> {
    let owners = list(object, "/metadata/ownerReferences");
    let controller = owners.iter().find(|o| o["controller"] == true);
    let controller = controller.map_or_else(String::new, |owner| {
        format!(
            "{}.apps/{}",
            text(owner, "/kind").to_lowercase(),
            text(owner, "/name")
        )
    });
    let number = number(object, "/revision").to_string();
    vec![name(object), or_none(&controller), number, age]
}
