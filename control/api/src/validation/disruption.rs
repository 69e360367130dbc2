//! Rules for PodDisruptionBudgets. Source: Kubernetes' `ValidatePodDisruptionBudgetSpec`.

use super::workload::count;
use super::{each, names, one_of};
use crate::field::{FieldError, Path};
use crate::selector::Selector;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;

/// A PodDisruptionBudget.
pub fn disruption_budget(budget: &PodDisruptionBudget) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let Some(spec) = &budget.spec else {
        return errors;
    };
    let path = Path::new("spec");
    if spec.min_available.is_some() && spec.max_unavailable.is_some() {
        errors.push(FieldError::invalid_as_a_whole(
            &path,
            "minAvailable and maxUnavailable cannot be both set",
        ));
    }
    for (field, value) in [
        ("minAvailable", &spec.min_available),
        ("maxUnavailable", &spec.max_unavailable),
    ] {
        let at = path.child(field);
        let number = count(value.as_ref(), &at, &mut errors);
        if let (Some(IntOrString::String(text)), Some(101..)) = (value, number) {
            let detail = "must not be greater than 100%";
            errors.push(FieldError::invalid(&at, text.as_str(), detail));
        }
    }
    one_of(
        &path.child("unhealthyPodEvictionPolicy"),
        spec.unhealthy_pod_eviction_policy.as_deref(),
        &["AlwaysAllow", "IfHealthyBudget"],
        &mut errors,
    );
    if let Some(selector) = &spec.selector {
        label_selector(selector, &path.child("selector"), &mut errors);
    }
    errors
}

/// A selector that may be empty.
fn label_selector(selector: &LabelSelector, path: &Path, errors: &mut Vec<FieldError>) {
    errors.extend(super::labels(
        selector.match_labels.as_ref(),
        &path.child("matchLabels"),
    ));
    for (i, expression) in selector.match_expressions.iter().flatten().enumerate() {
        let key = path.child("matchExpressions").index(i).child("key");
        let broken = names::qualified_name(&expression.key);
        each(&key, &expression.key, broken, errors);
    }
    if let Err(error) = Selector::from_api(selector) {
        let value = serde_json::to_value(selector).unwrap_or(Value::Null);
        errors.push(FieldError::invalid(path, value, &error.to_string()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_budget_says_one_thing() {
        let errors = |spec: Value| -> Vec<String> {
            let budget = serde_json::from_value(json!({"spec": spec})).unwrap();
            let errors = disruption_budget(&budget);
            errors.iter().map(ToString::to_string).collect()
        };
        for fine in [
            json!({"minAvailable": 1, "selector": {}}),
            json!({"maxUnavailable": "100%", "unhealthyPodEvictionPolicy": "AlwaysAllow"}),
        ] {
            assert_eq!(errors(fine), Vec::<String>::new());
        }
        for (spec, words) in [
            (
                json!({"minAvailable": 1, "maxUnavailable": 1}),
                "cannot be both set",
            ),
            (
                json!({"minAvailable": "101%"}),
                "spec.minAvailable: Invalid value: \"101%\": must not be greater than 100%",
            ),
            (
                json!({"maxUnavailable": -1}),
                "must be greater than or equal to 0",
            ),
            (json!({"maxUnavailable": "some"}), "a valid percent string"),
            (
                json!({"unhealthyPodEvictionPolicy": "Never"}),
                "supported values: \"AlwaysAllow\", \"IfHealthyBudget\"",
            ),
            (
                json!({"selector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}}),
                "spec.selector",
            ),
        ] {
            let all = errors(spec);
            assert!(all.iter().any(|text| text.contains(words)), "{all:?}");
        }
    }
}
