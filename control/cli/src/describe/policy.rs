//! `describe` of what limits others, in kubectl's words.

use super::text::{Text, conditions, field, items, number, scalar};
use gantry_api::table;
use serde_json::Value;

/// What a scope means.
fn scope_help(scope: &str) -> &'static str {
    match scope {
        "Terminating" => {
            "Matches all pods that have an active deadline. These pods have a limited lifespan on a node before being actively terminated by the system."
        }
        "NotTerminating" => {
            "Matches all pods that do not have an active deadline. These pods usually include long running pods whose container command is not expected to terminate."
        }
        "BestEffort" => {
            "Matches all pods that do not have resource requirements set. These pods have a best effort quality of service."
        }
        "NotBestEffort" => {
            "Matches all pods that have at least one resource requirement set. These pods have a burstable or guaranteed quality of service."
        }
        _ => "",
    }
}

pub(super) fn quota(object: &Value, text: &mut Text) {
    text.line(0, "Name", field(object, "/metadata/name"));
    text.line(0, "Namespace", field(object, "/metadata/namespace"));
    let plain = items(object, "/spec/scopes")
        .iter()
        .filter_map(Value::as_str);
    let mut scopes: Vec<String> = plain.map(str::to_owned).collect();
    for expression in items(object, "/spec/scopeSelector/matchExpressions") {
        let values = items(expression, "/values").iter();
        let values: Vec<&str> = values.filter_map(Value::as_str).collect();
        let (name, operator) = (
            field(expression, "/scopeName"),
            field(expression, "/operator"),
        );
        let shown = match (operator, values.is_empty()) {
            ("Exists", _) => name.to_owned(),
            (operator, true) => format!("{name} {operator}"),
            (operator, false) => format!("{name} {operator} [{}]", values.join(", ")),
        };
        scopes.push(shown);
    }
    if !scopes.is_empty() {
        text.line(0, "Scopes", &scopes.join(", "));
        for scope in &scopes {
            let help = scope_help(scope);
            if !help.is_empty() {
                text.raw(&format!(" * {help}\n"));
            }
        }
    }
    let mut rows = vec![
        ["Resource", "Used", "Hard"].map(str::to_owned).to_vec(),
        ["--------", "----", "----"].map(str::to_owned).to_vec(),
    ];
    let hard = object.pointer("/status/hard").and_then(Value::as_object);
    for (name, most) in hard.into_iter().flatten() {
        let used = object
            .pointer("/status/used")
            .and_then(|used| used.get(name));
        rows.push(vec![
            name.clone(),
            used.and_then(Value::as_str).unwrap_or_default().to_owned(),
            most.as_str().unwrap_or_default().to_owned(),
        ]);
    }
    text.table(0, &rows);
}

pub(super) fn limit_range(object: &Value, text: &mut Text) {
    text.line(0, "Name", field(object, "/metadata/name"));
    text.line(0, "Namespace", field(object, "/metadata/namespace"));
    let header = [
        "Type",
        "Resource",
        "Min",
        "Max",
        "Default Request",
        "Default Limit",
        "Max Limit/Request Ratio",
    ];
    let rule: Vec<String> = header.iter().map(|name| "-".repeat(name.len())).collect();
    let mut rows = vec![header.map(str::to_owned).to_vec(), rule];
    for item in items(object, "/spec/limits") {
        let lists = [
            "min",
            "max",
            "defaultRequest",
            "default",
            "maxLimitRequestRatio",
        ]
        .map(|list| item.get(list).and_then(Value::as_object));
        let mut names: Vec<&String> = lists
            .iter()
            .flatten()
            .flat_map(|list| list.keys())
            .collect();
        names.sort();
        names.dedup();
        for name in names {
            let amount = |list: &Option<&serde_json::Map<String, Value>>| {
                let amount = list.and_then(|list| list.get(name)).and_then(Value::as_str);
                amount.unwrap_or("-").to_owned()
            };
            let mut row = vec![field(item, "/type").to_owned(), name.clone()];
            row.extend(lists.iter().map(amount));
            rows.push(row);
        }
    }
    text.table(0, &rows);
}

pub(super) fn disruption_budget(object: &Value, text: &mut Text) {
    text.line(0, "Name", field(object, "/metadata/name"));
    text.line(0, "Namespace", field(object, "/metadata/namespace"));
    for (label, pointer) in [
        ("Min available", "/spec/minAvailable"),
        ("Max unavailable", "/spec/maxUnavailable"),
    ] {
        let shown = object.pointer(pointer).map(scalar);
        text.line(0, label, &shown.unwrap_or_default());
    }
    let selector = gantry_api::table::label_selector_text(object.pointer("/spec/selector"));
    text.line(0, "Selector", &selector);
    text.head(0, "Status");
    for (label, name) in [
        ("Allowed disruptions", "disruptionsAllowed"),
        ("Current", "currentHealthy"),
        ("Desired", "desiredHealthy"),
        ("Total", "expectedPods"),
    ] {
        let count = number(object, &format!("/status/{name}"));
        text.line(4, label, &count.to_string());
    }
}

pub(super) fn autoscaler(object: &Value, text: &mut Text) {
    text.line(
        0,
        "CreationTimestamp",
        field(object, "/metadata/creationTimestamp"),
    );
    let target = field(object, "/spec/scaleTargetRef/kind");
    let name = field(object, "/spec/scaleTargetRef/name");
    text.line(0, "Reference", &format!("{target}/{name}"));
    text.line(0, "Metrics", "( current / target )");
    for metric in items(object, "/spec/metrics") {
        let of = match field(metric, "/containerResource/container") {
            "" => {
                let name = field(metric, "/resource/name");
                format!("resource {name} on pods")
            }
            container => {
                let name = field(metric, "/containerResource/name");
                format!("resource {name} of container {container:?} on pods")
            }
        };
        let percent = "/target/averageUtilization";
        let is_percent = ["/resource", "/containerResource"]
            .iter()
            .any(|source| metric.pointer(&format!("{source}{percent}")).is_some());
        let label = match is_percent {
            true => format!("{of}  (as a percentage of request)"),
            false => of,
        };
        let shown = table::metric_text(metric, table::metric_status(object, metric));
        let (_, values) = shown.split_once(": ").unwrap_or_default();
        text.line(2, &label, &values.replace('/', " / "));
    }
    text.line(
        0,
        "Min replicas",
        &number(object, "/spec/minReplicas").to_string(),
    );
    text.line(
        0,
        "Max replicas",
        &number(object, "/spec/maxReplicas").to_string(),
    );
    for (label, rules) in [("Scale Up", "scaleUp"), ("Scale Down", "scaleDown")] {
        let Some(rules) = object.pointer(&format!("/spec/behavior/{rules}")) else {
            continue;
        };
        text.head(0, &format!("Behavior {label}"));
        if let Some(window) = rules.get("stabilizationWindowSeconds") {
            let window = format!("{} seconds", scalar(window));
            text.line(2, "Stabilization Window", &window);
        }
        text.line(2, "Select Policy", field(rules, "/selectPolicy"));
        let policies = items(rules, "/policies").iter().map(|policy| {
            let (kind, value) = (field(policy, "/type"), number(policy, "/value"));
            let period = number(policy, "/periodSeconds");
            format!("Type: {kind}  Value: {value}  Period: {period} seconds")
        });
        text.lines(2, "Policies", &policies.collect::<Vec<_>>());
    }
    text.line(
        0,
        &format!("{target} pods"),
        &format!(
            "{} current / {} desired",
            number(object, "/status/currentReplicas"),
            number(object, "/status/desiredReplicas")
        ),
    );
    conditions(object, &["Type", "Status", "Reason", "Message"], text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn quotas_and_ranges_are_tables() {
        let object = json!({"metadata": {"name": "q", "namespace": "n"},
            "spec": {"scopes": ["BestEffort"]},
            "status": {"hard": {"pods": "4"}, "used": {"pods": "1"}}});
        let mut text = Text::default();
        quota(&object, &mut text);
        let shown = text.finish();
        assert!(
            shown.contains("Scopes:     BestEffort\n * Matches all pods that do"),
            "{shown}"
        );
        assert!(shown.contains("pods       1      4"), "{shown}");
        let object = json!({"metadata": {"name": "l", "namespace": "n"}, "spec": {"limits": [
            {"type": "Container", "max": {"cpu": "2"}, "default": {"cpu": "1", "memory": "1Gi"}}]}});
        let mut text = Text::default();
        limit_range(&object, &mut text);
        let shown = text.finish();
        let row = shown
            .lines()
            .find(|l| l.contains("memory"))
            .unwrap_or_default();
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(cells, ["Container", "memory", "-", "-", "-", "1Gi", "-"]);
    }
}
