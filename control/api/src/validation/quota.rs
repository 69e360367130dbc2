//! Rules for ResourceQuotas. Source: Kubernetes' `ValidateResourceQuota`.

use super::sets::immutable;
use super::{each, names};
use crate::field::{FieldError, Path};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{ResourceQuota, ResourceQuotaSpec};

/// Names without a slash that a quota may limit.
const STANDARD: [&str; 19] = [
    "configmaps",
    "cpu",
    "ephemeral-storage",
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "memory",
    "persistentvolumeclaims",
    "pods",
    "replicationcontrollers",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
    "requests.storage",
    "resourcequotas",
    "secrets",
    "services",
    "services.loadbalancers",
    "services.nodeports",
];
/// Of those, counts: whole numbers.
const COUNTS: [&str; 9] = [
    "configmaps",
    "persistentvolumeclaims",
    "pods",
    "replicationcontrollers",
    "resourcequotas",
    "secrets",
    "services",
    "services.loadbalancers",
    "services.nodeports",
];
/// Of those, what pods use.
const OF_PODS: [&str; 10] = [
    "cpu",
    "ephemeral-storage",
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "memory",
    "pods",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];
const SCOPES: [&str; 6] = [
    "Terminating",
    "NotTerminating",
    "BestEffort",
    "NotBestEffort",
    "PriorityClass",
    "CrossNamespacePodAffinity",
];
const EXISTS_ONLY: &str = "must be 'Exist' when scope is any of ResourceQuotaScopeTerminating, \
     ResourceQuotaScopeNotTerminating, ResourceQuotaScopeBestEffort, \
     ResourceQuotaScopeNotBestEffort or ResourceQuotaScopeCrossNamespacePodAffinity";

/// A ResourceQuota.
pub fn resource_quota(quota: &ResourceQuota) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let Some(spec) = &quota.spec else {
        return errors;
    };
    let path = Path::new("spec");
    for (name, text) in spec.hard.iter().flatten() {
        let at = path.child("hard").key(name);
        if name.contains('/') {
            each(&at, name, names::qualified_name(name), &mut errors);
        } else if !STANDARD.contains(&name.as_str()) && !is_pages(name) {
            let detail = "must be a standard resource for quota";
            errors.push(FieldError::invalid(&at, name.as_str(), detail));
        }
        match Quantity::parse(&text.0) {
            Err(error) => {
                errors.push(FieldError::invalid(
                    &at,
                    text.0.as_str(),
                    &error.to_string(),
                ));
            }
            Ok(amount) if amount.is_negative() => {
                errors.push(FieldError::invalid(
                    &at,
                    text.0.as_str(),
                    super::NOT_NEGATIVE,
                ));
            }
            Ok(amount) if is_count(name) && !amount.is_whole() => {
                let detail = "must be an integer";
                errors.push(FieldError::invalid(&at, text.0.as_str(), detail));
            }
            Ok(_) => {}
        }
    }
    let plain: Vec<&str> = spec.scopes.iter().flatten().map(String::as_str).collect();
    scopes(&plain, spec, &path.child("scopes"), &mut errors);
    selector(spec, &path.child("scopeSelector"), &mut errors);
    errors
}

fn is_pages(name: &str) -> bool {
    let name = name.strip_prefix("requests.").unwrap_or(name);
    name.starts_with("hugepages-")
}

fn is_count(name: &str) -> bool {
    COUNTS.contains(&name) || name.starts_with("count/")
}

/// Scopes that there are, that fit what is limited, and that do not exclude each other.
fn scopes(scopes: &[&str], spec: &ResourceQuotaSpec, path: &Path, errors: &mut Vec<FieldError>) {
    let mut refuse = |detail: &str| {
        errors.push(FieldError::invalid(path, scopes.to_vec(), detail));
    };
    for scope in scopes {
        if !SCOPES.contains(scope) {
            refuse("unsupported scope");
            continue;
        }
        let fits = |name: &str| match *scope {
            "BestEffort" => name == "pods",
            _ => OF_PODS.contains(&name),
        };
        let names = spec.hard.iter().flatten().map(|(name, _)| name.as_str());
        let unfit = names.filter(|name| STANDARD.contains(name) && !fits(name));
        for _ in unfit {
            refuse("unsupported scope applied to resource");
        }
    }
    for pair in [
        ["BestEffort", "NotBestEffort"],
        ["Terminating", "NotTerminating"],
    ] {
        if pair.iter().all(|scope| scopes.contains(scope)) {
            refuse("conflicting scopes");
        }
    }
}

fn selector(spec: &ResourceQuotaSpec, path: &Path, errors: &mut Vec<FieldError>) {
    let Some(selector) = &spec.scope_selector else {
        return;
    };
    let expressions = selector.match_expressions.iter().flatten();
    let names: Vec<&str> = expressions.clone().map(|e| e.scope_name.as_str()).collect();
    scopes(&names, spec, &path.child("matchExpressions"), errors);
    for (i, expression) in expressions.enumerate() {
        let path = path.child("matchExpressions").index(i);
        let values = expression.values.as_deref().unwrap_or_default();
        let operator = expression.operator.as_str();
        if expression.scope_name != "PriorityClass" && operator != "Exists" {
            let at = path.child("operator");
            errors.push(FieldError::invalid(&at, operator, EXISTS_ONLY));
        }
        match operator {
            "In" | "NotIn" if values.is_empty() => errors.push(FieldError::required(
                &path.child("values"),
                "must be at least one value when `operator` is 'In' or 'NotIn' for scope selector",
            )),
            "Exists" | "DoesNotExist" if !values.is_empty() => errors.push(FieldError::invalid(
                &path.child("values"),
                values.to_vec(),
                "must be no value when `operator` is 'Exist' or 'DoesNotExist' for scope selector",
            )),
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.push(FieldError::invalid(
                &path.child("operator"),
                other,
                "not a valid selector operator",
            )),
        }
    }
}

/// What it is about cannot change: counts would be of other objects.
pub fn resource_quota_update(new: &ResourceQuota, old: &ResourceQuota) -> Vec<FieldError> {
    let scopes = |quota: &ResourceQuota| {
        let mut scopes = quota.spec.clone()?.scopes.unwrap_or_default();
        scopes.sort();
        Some(scopes)
    };
    let selector = |quota: &ResourceQuota| quota.spec.clone()?.scope_selector;
    let mut errors = Vec::new();
    let path = Path::new("spec");
    immutable(
        &scopes(new).unwrap_or_default(),
        &scopes(old).unwrap_or_default(),
        &path.child("scopes"),
        &mut errors,
    );
    immutable(
        &selector(new),
        &selector(old),
        &path.child("scopeSelector"),
        &mut errors,
    );
    errors
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn errors(spec: Value) -> Vec<String> {
        let quota: ResourceQuota = serde_json::from_value(json!({"spec": spec})).unwrap();
        resource_quota(&quota)
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn what_there_is_may_be_limited() {
        let hard = json!({"pods": "4", "requests.cpu": "1500m", "count/deployments.apps": "2",
            "requests.nvidia.com/gpu": "1", "hugepages-2Mi": "4Mi", "requests.hugepages-2Mi": "4Mi",
            "fast.storageclass.storage.k8s.io/requests.storage": "1Gi"});
        assert_eq!(errors(json!({"hard": hard})), Vec::<String>::new());
        for (name, amount, words) in [
            ("disks", "1", "must be a standard resource for quota"),
            ("pods", "1500m", "must be an integer"),
            ("count/jobs.batch", "500m", "must be an integer"),
            ("cpu", "-1", "must be greater than or equal to 0"),
            ("cpu", "x", "quantities must match"),
        ] {
            let all = errors(json!({"hard": {name: amount}}));
            assert_eq!(all.len(), 1, "{all:?}");
            assert!(
                all[0].contains(words) && all[0].contains(&format!("spec.hard[{name}]")),
                "{all:?}"
            );
        }
    }

    #[test]
    fn scopes_fit_what_is_limited_and_each_other() {
        for (spec, words) in [
            (
                json!({"scopes": ["BestEffort", "NotBestEffort"]}),
                "conflicting scopes",
            ),
            (
                json!({"hard": {"cpu": "1"}, "scopes": ["BestEffort"]}),
                "unsupported scope applied to resource",
            ),
            (json!({"scopes": ["Nice"]}), "unsupported scope"),
            (
                json!({"scopeSelector": {"matchExpressions": [
                    {"scopeName": "PriorityClass", "operator": "In"}]}}),
                "must be at least one value",
            ),
            (
                json!({"scopeSelector": {"matchExpressions": [
                    {"scopeName": "Terminating", "operator": "In", "values": ["a"]}]}}),
                "must be 'Exist'",
            ),
        ] {
            let all = errors(spec);
            assert!(all.iter().any(|text| text.contains(words)), "{all:?}");
        }
        let fine = json!({"hard": {"pods": "1"}, "scopeSelector": {"matchExpressions": [
            {"scopeName": "PriorityClass", "operator": "In", "values": ["high"]}]}});
        assert_eq!(errors(fine), Vec::<String>::new());
    }
}
