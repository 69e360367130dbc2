//! Rules for HorizontalPodAutoscalers. Source: Kubernetes' `pkg/apis/autoscaling/validation`.

use super::one_of;
use crate::field::{FieldError, Path};
use crate::quantity::Quantity;
use k8s_openapi::api::autoscaling::v2::{
    HPAScalingRules, HorizontalPodAutoscaler, HorizontalPodAutoscalerSpec, MetricSpec, MetricTarget,
};

/// Longest period of a policy.
const PERIOD_S_MAX: i32 = 1800;
/// Longest stabilization window.
const WINDOW_S_MAX: i32 = 3600;
/// Resources that agents measure.
const MEASURED: [&str; 2] = ["cpu", "memory"];

/// A HorizontalPodAutoscaler.
pub fn horizontal_pod_autoscaler(scaler: &HorizontalPodAutoscaler) -> Vec<FieldError> {
    let path = Path::new("spec");
    let spec = &scaler.spec;
    let mut errors = Vec::new();
    range(spec, &path, &mut errors);
    let target = path.child("scaleTargetRef");
    for (field, text) in [
        ("kind", &spec.scale_target_ref.kind),
        ("name", &spec.scale_target_ref.name),
    ] {
        if text.is_empty() {
            errors.push(FieldError::required(&target.child(field), ""));
        }
    }
    for (i, metric) in spec.metrics.iter().flatten().enumerate() {
        self::metric(metric, &path.child("metrics").index(i), &mut errors);
    }
    if let Some(behavior) = &spec.behavior {
        for (field, rules) in [
            ("scaleUp", &behavior.scale_up),
            ("scaleDown", &behavior.scale_down),
        ] {
            if let Some(rules) = rules {
                self::rules(rules, &path.child("behavior").child(field), &mut errors);
            }
        }
    }
    errors
}

fn range(spec: &HorizontalPodAutoscalerSpec, path: &Path, errors: &mut Vec<FieldError>) {
    let least = spec.min_replicas.unwrap_or(1);
    if least < 1 {
        let detail = "must be greater than or equal to 1";
        errors.push(FieldError::invalid(
            &path.child("minReplicas"),
            least,
            detail,
        ));
    }
    let at = path.child("maxReplicas");
    if spec.max_replicas < 1 {
        errors.push(FieldError::invalid(
            &at,
            spec.max_replicas,
            "must be greater than 0",
        ));
    }
    if spec.max_replicas < least {
        let detail = "must be greater than or equal to `minReplicas`";
        errors.push(FieldError::invalid(&at, spec.max_replicas, detail));
    }
}

fn metric(metric: &MetricSpec, path: &Path, errors: &mut Vec<FieldError>) {
    let at = path.child("type");
    let (name, target, place) = match metric.type_.as_str() {
        "Resource" => match &metric.resource {
            Some(source) => (&source.name, &source.target, path.child("resource")),
            None => {
                let detail = "must populate information for the given metric source";
                errors.push(FieldError::required(&path.child("resource"), detail));
                return;
            }
        },
        "ContainerResource" => match &metric.container_resource {
            Some(source) => {
                let place = path.child("containerResource");
                if source.container.is_empty() {
                    let detail = "must specify a container";
                    errors.push(FieldError::required(&place.child("container"), detail));
                }
                (&source.name, &source.target, place)
            }
            None => {
                let detail = "must populate information for the given metric source";
                let at = path.child("containerResource");
                errors.push(FieldError::required(&at, detail));
                return;
            }
        },
        "" => {
            errors.push(FieldError::required(
                &at,
                "must specify a metric source type",
            ));
            return;
        }
        other => {
            let served = ["ContainerResource", "Resource"];
            errors.push(FieldError::not_supported(&at, other, &served));
            return;
        }
    };
    if name.is_empty() {
        let detail = "must specify a resource name";
        errors.push(FieldError::required(&place.child("name"), detail));
    } else {
        one_of(&place.child("name"), Some(name), &MEASURED, errors);
    }
    self::target(target, &place.child("target"), errors);
}

fn target(target: &MetricTarget, path: &Path, errors: &mut Vec<FieldError>) {
    let kinds = ["AverageValue", "Utilization", "Value"];
    if target.type_.is_empty() {
        let detail = "must specify a metric target type";
        errors.push(FieldError::required(&path.child("type"), detail));
    }
    one_of(&path.child("type"), Some(&target.type_), &kinds, errors);
    if target.value.is_some() {
        let detail =
            "may not set a target value for a resource: it is averageValue or averageUtilization";
        errors.push(FieldError::forbidden(&path.child("value"), detail));
    }
    let value = path.child("averageValue");
    match (target.average_utilization, &target.average_value) {
        (None, None) => {
            let at = path.child("averageUtilization");
            let detail = "must set either a target raw value or a target utilization";
            errors.push(FieldError::required(&at, detail));
        }
        (Some(_), Some(_)) => {
            let detail = "may not set both a target raw value and a target utilization";
            errors.push(FieldError::forbidden(&value, detail));
        }
        (Some(percent), None) if percent < 1 => {
            let at = path.child("averageUtilization");
            errors.push(FieldError::invalid(&at, percent, "must be greater than 0"));
        }
        (None, Some(amount)) => match Quantity::parse(&amount.0) {
            Ok(parsed) if parsed > Quantity::from_units(0) => {}
            Ok(_) => {
                let detail = "must be positive";
                errors.push(FieldError::invalid(&value, amount.0.as_str(), detail));
            }
            Err(error) => {
                let detail = error.to_string();
                errors.push(FieldError::invalid(&value, amount.0.as_str(), &detail));
            }
        },
        _ => {}
    }
}

fn rules(rules: &HPAScalingRules, path: &Path, errors: &mut Vec<FieldError>) {
    let at = path.child("stabilizationWindowSeconds");
    if let Some(seconds) = rules.stabilization_window_seconds {
        if seconds < 0 {
            let detail = "must be greater than or equal to zero";
            errors.push(FieldError::invalid(&at, seconds, detail));
        } else if seconds > WINDOW_S_MAX {
            let detail = format!("must be less than or equal to {WINDOW_S_MAX}");
            errors.push(FieldError::invalid(&at, seconds, &detail));
        }
    }
    let select = rules.select_policy.as_deref();
    let at = path.child("selectPolicy");
    one_of(&at, select, &["Disabled", "Max", "Min"], errors);
    if let Some(text) = &rules.tolerance {
        let at = path.child("tolerance");
        match Quantity::parse(&text.0) {
            Ok(amount) if !amount.is_negative() => {}
            Ok(_) => {
                let detail = "must be greater than or equal to zero";
                errors.push(FieldError::invalid(&at, text.0.as_str(), detail));
            }
            Err(error) => {
                errors.push(FieldError::invalid(
                    &at,
                    text.0.as_str(),
                    &error.to_string(),
                ));
            }
        }
    }
    let policies = rules.policies.as_deref().unwrap_or_default();
    let at = path.child("policies");
    if policies.is_empty() {
        let detail = "must specify at least one Policy";
        errors.push(FieldError::required(&at, detail));
    }
    for (i, policy) in policies.iter().enumerate() {
        let at = at.index(i);
        let kind = at.child("type");
        one_of(&kind, Some(&policy.type_), &["Percent", "Pods"], errors);
        if policy.value <= 0 {
            let detail = "must be greater than zero";
            errors.push(FieldError::invalid(
                &at.child("value"),
                policy.value,
                detail,
            ));
        }
        let period = at.child("periodSeconds");
        if policy.period_seconds <= 0 {
            let detail = "must be greater than zero";
            errors.push(FieldError::invalid(&period, policy.period_seconds, detail));
        } else if policy.period_seconds > PERIOD_S_MAX {
            let detail = format!("must be less than or equal to {PERIOD_S_MAX}");
            errors.push(FieldError::invalid(&period, policy.period_seconds, &detail));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn errors(more: Value) -> Vec<String> {
        let mut scaler = json!({"metadata": {"name": "s"}, "spec": {"maxReplicas": 3,
            "scaleTargetRef": {"kind": "Deployment", "name": "d", "apiVersion": "apps/v1"}}});
        for (field, value) in more.as_object().unwrap() {
            scaler["spec"][field] = value.clone();
        }
        let mut scaler: HorizontalPodAutoscaler = serde_json::from_value(scaler).unwrap();
        crate::defaults::horizontal_pod_autoscaler(&mut scaler);
        let errors = horizontal_pod_autoscaler(&scaler);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_scaler_has_a_range_a_target_and_a_rate() {
        let resource = |target: Value| {
            json!({"metrics": [{"type": "Resource", "resource": {
            "name": "cpu", "target": target}}]})
        };
        let up = |rules: Value| json!({"behavior": {"scaleUp": rules}});
        for fine in [
            json!({}),
            resource(json!({"type": "AverageValue", "averageValue": "100m"})),
            up(json!({"stabilizationWindowSeconds": 3600})),
            json!({"metrics": [{"type": "ContainerResource", "containerResource": {"name": "memory",
                "container": "c", "target": {"type": "Utilization", "averageUtilization": 60}}}]}),
        ] {
            assert_eq!(errors(fine.clone()), Vec::<String>::new(), "{fine}");
        }
        for (spec, words) in [
            (
                json!({"minReplicas": 0}),
                "spec.minReplicas: Invalid value: 0: must be greater than or equal to 1",
            ),
            (
                json!({"minReplicas": 5}),
                "must be greater than or equal to `minReplicas`",
            ),
            (
                json!({"scaleTargetRef": {"kind": "Deployment", "name": ""}}),
                "spec.scaleTargetRef.name: Required value",
            ),
            (
                resource(json!({"type": "Utilization"})),
                "must set either a target raw value or a target utilization",
            ),
            (
                resource(
                    json!({"type": "Utilization", "averageUtilization": 5, "averageValue": "1"}),
                ),
                "may not set both a target raw value and a target utilization",
            ),
            (
                resource(json!({"type": "Utilization", "averageUtilization": 0})),
                "must be greater than 0",
            ),
            (
                json!({"metrics": [{"type": "Pods"}]}),
                "supported values: \"ContainerResource\", \"Resource\"",
            ),
            (
                up(json!({"policies": [{"type": "Pods", "value": 1, "periodSeconds": 1801}]})),
                "must be less than or equal to 1800",
            ),
            (
                up(json!({"policies": []})),
                "must specify at least one Policy",
            ),
            (
                up(json!({"selectPolicy": "Some"})),
                "spec.behavior.scaleUp.selectPolicy",
            ),
        ] {
            let all = errors(spec);
            assert!(
                all.iter().any(|text| text.contains(words)),
                "{words}: {all:?}"
            );
        }
    }
}
