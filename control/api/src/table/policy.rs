//! Rows of what limits others: quotas, disruption budgets, autoscalers.

use super::{list, number, or_none, text};
use serde_json::Value;

/// Requests and limits side by side, as `used/hard`.
pub(super) fn quota(object: &Value, age: String) -> Vec<String> {
    let hard = object
        .pointer("/status/hard")
        .or_else(|| object.pointer("/spec/hard"));
    let used = object.pointer("/status/used");
    let (mut requests, mut limits) = (Vec::new(), Vec::new());
    for (name, most) in hard.and_then(Value::as_object).into_iter().flatten() {
        let used = used.and_then(|used| used.get(name)).and_then(Value::as_str);
        let shown = format!(
            "{name}: {}/{}",
            used.unwrap_or("0"),
            most.as_str().unwrap_or_default()
        );
        if name.starts_with("limits.") {
            limits.push(shown);
        } else {
            requests.push(shown);
        }
    }
    vec![
        text(object, "/metadata/name").to_owned(),
        requests.join(", "),
        limits.join(", "),
        age,
    ]
}

/// A count, a percentage, or `N/A`.
pub(super) fn count(value: Option<&Value>) -> String {
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        _ => "N/A".to_owned(),
    }
}

pub(super) fn disruption_budget(object: &Value, age: String) -> Vec<String> {
    vec![
        text(object, "/metadata/name").to_owned(),
        count(object.pointer("/spec/minAvailable")),
        count(object.pointer("/spec/maxUnavailable")),
        number(object, "/status/disruptionsAllowed").to_string(),
        age,
    ]
}

/// Metrics that a row shows.
const METRICS_SHOWN_MAX: usize = 2;

/// One metric as `cpu: 12%/80%`; what is not known yet is `<unknown>`.
#[must_use]
pub fn metric_text(spec: &Value, current: Option<&Value>) -> String {
    let source = match text(spec, "/type") {
        "ContainerResource" => "containerResource",
        _ => "resource",
    };
    let name = text(spec, &format!("/{source}/name"));
    let target = spec.pointer(&format!("/{source}/target"));
    let now = current.and_then(|current| current.pointer(&format!("/{source}/current")));
    let percent = |value: Option<&Value>| {
        let percent = value?.get("averageUtilization")?.as_i64()?;
        Some(format!("{percent}%"))
    };
    let amount = |value: Option<&Value>| {
        let amount = value?.get("averageValue")?.as_str()?;
        Some(amount.to_owned())
    };
    let (now, wanted) = match percent(target) {
        Some(wanted) => (percent(now), Some(wanted)),
        None => (amount(now), amount(target)),
    };
    let unknown = || "<unknown>".to_owned();
    let container = text(spec, "/containerResource/container");
    let name = match container {
        "" => name.to_owned(),
        container => format!("{name} of {container}"),
    };
    format!(
        "{name}: {}/{}",
        now.unwrap_or_else(unknown),
        wanted.unwrap_or_else(unknown)
    )
}

/// The status of the metric at the same place in the spec.
#[must_use]
pub fn metric_status<'a>(object: &'a Value, spec: &Value) -> Option<&'a Value> {
    let of = |metric: &Value| {
        let at = |pointer| text(metric, pointer).to_owned();
        [
            at("/type"),
            at("/resource/name"),
            at("/containerResource/name"),
            at("/containerResource/container"),
        ]
    };
    let mut all = list(object, "/status/currentMetrics").iter();
    all.find(|metric| of(metric) == of(spec))
}

pub(super) fn autoscaler(object: &Value, age: String) -> Vec<String> {
    let metrics = list(object, "/spec/metrics");
    let shown: Vec<String> = metrics
        .iter()
        .take(METRICS_SHOWN_MAX)
        .map(|spec| metric_text(spec, metric_status(object, spec)))
        .collect();
    let mut targets = or_none(&shown.join(", "));
    if metrics.len() > METRICS_SHOWN_MAX {
        targets = format!("{targets} + {} more...", metrics.len() - METRICS_SHOWN_MAX);
    }
    let least = match number(object, "/spec/minReplicas") {
        0 => "<unset>".to_owned(),
        least => least.to_string(),
    };
    vec![
        text(object, "/metadata/name").to_owned(),
        format!(
            "{}/{}",
            text(object, "/spec/scaleTargetRef/kind"),
            text(object, "/spec/scaleTargetRef/name")
        ),
        targets,
        least,
        number(object, "/spec/maxReplicas").to_string(),
        number(object, "/status/currentReplicas").to_string(),
        age,
    ]
}
