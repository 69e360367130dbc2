//! Rows of what limits others: quotas, disruption budgets, autoscalers.

use super::{number, text};
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
