//! Rules for LimitRanges. Source: Kubernetes' `ValidateLimitRange`.

use std::collections::{BTreeMap, BTreeSet};

use super::{each, names};
use crate::field::{FieldError, Path};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{LimitRange, LimitRangeItem};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

const TYPES: [&str; 3] = ["Pod", "Container", "PersistentVolumeClaim"];
/// Names without a slash that a container may have.
const STANDARD: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];

type List = Option<BTreeMap<String, ApiQuantity>>;

/// A LimitRange.
pub fn limit_range(range: &LimitRange) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let mut types = BTreeSet::new();
    let items = range.spec.iter().flat_map(|spec| &spec.limits);
    for (i, item) in items.enumerate() {
        let path = Path::new("spec").child("limits").index(i);
        let at = path.child("type");
        if !TYPES.contains(&item.type_.as_str()) {
            errors.push(FieldError::not_supported(&at, item.type_.as_str(), &TYPES));
        }
        if !types.insert(&item.type_) {
            errors.push(FieldError::duplicate(&at, item.type_.as_str()));
        }
        if item.type_ == "Pod" {
            for (field, list) in [
                ("default", &item.default),
                ("defaultRequest", &item.default_request),
            ] {
                if list.as_ref().is_some_and(|list| !list.is_empty()) {
                    let detail = "may not be specified when `type` is 'Pod'";
                    errors.push(FieldError::forbidden(&path.child(field), detail));
                }
            }
        }
        let states_storage = |list: &List| list.iter().flatten().any(|(name, _)| name == "storage");
        let is_bounded = [&item.min, &item.max].into_iter().any(states_storage);
        if item.type_ == "PersistentVolumeClaim" && !is_bounded {
            let detail =
                "either minimum or maximum storage value is required, but neither was provided";
            errors.push(FieldError::required(&path, detail));
        }
        amounts(item, &path, &mut errors);
    }
    errors
}

/// The numbers of one item, and how they relate.
fn amounts(item: &LimitRangeItem, path: &Path, errors: &mut Vec<FieldError>) {
    let fields = [
        ("max", &item.max),
        ("min", &item.min),
        ("default", &item.default),
        ("defaultRequest", &item.default_request),
        ("maxLimitRequestRatio", &item.max_limit_request_ratio),
    ];
    let mut all: BTreeSet<&str> = BTreeSet::new();
    for (field, list) in fields {
        for (name, text) in list.iter().flatten() {
            let at = path.child(field).key(name);
            let is_storage = item.type_ == "PersistentVolumeClaim" && name == "storage";
            if name.contains('/') {
                each(&at, name, names::qualified_name(name), errors);
            } else if !is_storage
                && !STANDARD.contains(&name.as_str())
                && !name.starts_with("hugepages-")
            {
                let detail = "must be a standard limit type or fully qualified";
                errors.push(FieldError::invalid(&at, name.as_str(), detail));
            }
            if let Err(error) = Quantity::parse(&text.0) {
                errors.push(FieldError::invalid(
                    &at,
                    text.0.as_str(),
                    &error.to_string(),
                ));
            }
            all.insert(name);
        }
    }
    for name in all {
        relations(item, name, path, errors);
    }
}

fn relations(item: &LimitRangeItem, name: &str, path: &Path, errors: &mut Vec<FieldError>) {
    let of = |list: &List| Quantity::parse(&list.as_ref()?.get(name)?.0).ok();
    let (max, min) = (of(&item.max), of(&item.min));
    let (limit, request) = (of(&item.default), of(&item.default_request));
    let mut refuse = |field: &str, value: Quantity, detail: String| {
        let at = path.child(field).key(name);
        errors.push(FieldError::invalid(&at, value.to_string(), &detail));
    };
    // What may not be less than what, and where it is said.
    for (low, high, field, words) in [
        (min, max, "min", ["min", "max"]),
        (min, request, "defaultRequest", ["min", "default request"]),
        (request, max, "defaultRequest", ["default request", "max"]),
        (
            request,
            limit,
            "defaultRequest",
            ["default request", "default limit"],
        ),
        (min, limit, "default", ["min", "default"]),
        (limit, max, "default", ["default", "max"]),
    ] {
        let (Some(low), Some(high)) = (low, high) else {
            continue;
        };
        if low > high {
            let shown = if field == words[0] || field == "defaultRequest" && words[0] != "min" {
                low
            } else {
                high
            };
            let detail = format!(
                "{} value {low} is greater than {} value {high}",
                words[0], words[1]
            );
            refuse(field, shown, detail);
        }
    }
    let Some(ratio) = of(&item.max_limit_request_ratio) else {
        return;
    };
    if ratio < Quantity::from_units(1) {
        let detail = format!("ratio {ratio} is less than 1");
        refuse("maxLimitRequestRatio", ratio, detail);
    }
    if let (Some(max), Some(min)) = (max, min)
        && !min.is_zero()
        && ratio.as_f64() > max.as_f64() / min.as_f64()
    {
        let most = max.as_f64() / min.as_f64();
        let detail = format!("ratio {ratio} is greater than max/min = {most:.6}");
        refuse("maxLimitRequestRatio", ratio, detail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn errors(limits: Value) -> Vec<String> {
        let range = json!({"spec": {"limits": limits}});
        let range: LimitRange = serde_json::from_value(range).unwrap();
        limit_range(&range)
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn numbers_must_fit_each_other() {
        let fine = json!([
            {"type": "Container", "min": {"cpu": "100m"}, "defaultRequest": {"cpu": "200m"},
             "default": {"cpu": "500m"}, "max": {"cpu": "1"}, "maxLimitRequestRatio": {"cpu": "4"}},
            {"type": "Pod", "max": {"memory": "1Gi", "example.com/x": "2"}},
            {"type": "PersistentVolumeClaim", "min": {"storage": "1Gi"}},
        ]);
        assert_eq!(errors(fine), Vec::<String>::new());
        for (item, words) in [
            (
                json!({"type": "Container", "min": {"cpu": "2"}, "max": {"cpu": "1"}}),
                "spec.limits[0].min[cpu]: Invalid value: \"2\": min value 2 is greater than max value 1",
            ),
            (
                json!({"type": "Container", "default": {"cpu": "2"}, "max": {"cpu": "1"}}),
                "default value 2 is greater than max value 1",
            ),
            (
                json!({"type": "Container", "defaultRequest": {"cpu": "2"}, "default": {"cpu": "1"}}),
                "default request value 2 is greater than default limit value 1",
            ),
            (
                json!({"type": "Container", "maxLimitRequestRatio": {"cpu": "500m"}}),
                "ratio 500m is less than 1",
            ),
            (
                json!({"type": "Container", "min": {"cpu": "1"}, "max": {"cpu": "2"},
                       "maxLimitRequestRatio": {"cpu": "3"}}),
                "ratio 3 is greater than max/min = 2.000000",
            ),
            (
                json!({"type": "Pod", "default": {"cpu": "1"}}),
                "may not be specified when `type` is 'Pod'",
            ),
            (
                json!({"type": "PersistentVolumeClaim"}),
                "either minimum or maximum storage value is required",
            ),
            (
                json!({"type": "Container", "max": {"disk": "1"}}),
                "must be a standard limit type or fully qualified",
            ),
        ] {
            let all = errors(json!([item]));
            assert!(all.iter().any(|text| text.contains(words)), "{all:?}");
        }
        let twice = json!([{"type": "Pod"}, {"type": "Pod"}]);
        assert!(errors(twice)[0].contains("Duplicate value"));
    }
}
