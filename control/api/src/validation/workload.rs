//! Rules for Deployments and ReplicaSets.

use super::{IMMUTABLE, names, not_negative, one_of};
use crate::field::{FieldError, Path};
use crate::selector::Selector;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStrategy, ReplicaSet};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;

/// A Deployment.
pub fn deployment(deployment: &Deployment) -> Vec<FieldError> {
    let path = Path::new("spec");
    let Some(spec) = &deployment.spec else {
        return vec![FieldError::required(&path, "")];
    };
    let mut errors = Vec::new();
    let number = |value: Option<i32>| value.map(i64::from);
    not_negative(&path.child("replicas"), number(spec.replicas), &mut errors);
    not_negative(
        &path.child("minReadySeconds"),
        number(spec.min_ready_seconds),
        &mut errors,
    );
    let limit = number(spec.revision_history_limit);
    not_negative(&path.child("revisionHistoryLimit"), limit, &mut errors);
    let deadline = spec.progress_deadline_seconds;
    not_negative(
        &path.child("progressDeadlineSeconds"),
        number(deadline),
        &mut errors,
    );
    if let Some(seconds) = deadline
        && seconds <= spec.min_ready_seconds.unwrap_or(0)
    {
        let path = path.child("progressDeadlineSeconds");
        errors.push(FieldError::invalid(
            &path,
            seconds,
            "must be greater than minReadySeconds",
        ));
    }
    selector(&spec.selector, Some(&spec.template), &path, &mut errors);
    template(
        Some(&spec.template),
        &path.child("template"),
        &["Always"],
        &mut errors,
    );
    if let Some(strategy) = &spec.strategy {
        self::strategy(strategy, &path.child("strategy"), &mut errors);
    }
    errors
}

/// A ReplicaSet.
pub fn replica_set(set: &ReplicaSet) -> Vec<FieldError> {
    let path = Path::new("spec");
    let Some(spec) = &set.spec else {
        return vec![FieldError::required(&path, "")];
    };
    let mut errors = Vec::new();
    not_negative(
        &path.child("replicas"),
        spec.replicas.map(i64::from),
        &mut errors,
    );
    let seconds = spec.min_ready_seconds.map(i64::from);
    not_negative(&path.child("minReadySeconds"), seconds, &mut errors);
    selector(&spec.selector, spec.template.as_ref(), &path, &mut errors);
    template(
        spec.template.as_ref(),
        &path.child("template"),
        &["Always"],
        &mut errors,
    );
    errors
}

pub(super) fn selector(
    selector: &LabelSelector,
    template: Option<&PodTemplateSpec>,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    let at = path.child("selector");
    let expressions = selector.match_expressions.as_deref().unwrap_or_default();
    if selector
        .match_labels
        .as_ref()
        .is_none_or(|labels| labels.is_empty())
        && expressions.is_empty()
    {
        errors.push(FieldError::required(&at, ""));
        return;
    }
    errors.extend(super::labels(
        selector.match_labels.as_ref(),
        &at.child("matchLabels"),
    ));
    for (i, expression) in expressions.iter().enumerate() {
        let key = at.child("matchExpressions").index(i).child("key");
        super::each(
            &key,
            &expression.key,
            names::qualified_name(&expression.key),
            errors,
        );
    }
    match Selector::from_api(selector) {
        Err(error) => {
            let value = serde_json::to_value(selector).unwrap_or(Value::Null);
            errors.push(FieldError::invalid(&at, value, &error.to_string()));
        }
        Ok(parsed) => {
            let labels = template.and_then(|t| t.metadata.as_ref()?.labels.clone());
            let labels = labels.unwrap_or_default();
            if !parsed.matches(&labels) {
                let path = path.child("template").child("metadata").child("labels");
                let value = serde_json::to_value(&labels).unwrap_or(Value::Null);
                let detail = "`selector` does not match template `labels`";
                errors.push(FieldError::invalid(&path, value, detail));
            }
        }
    }
}

/// A pod template whose pods restart by one of `policies`.
pub(super) fn template(
    template: Option<&PodTemplateSpec>,
    path: &Path,
    policies: &[&str],
    errors: &mut Vec<FieldError>,
) {
    let labels = template.and_then(|t| t.metadata.as_ref()?.labels.as_ref());
    errors.extend(super::labels(
        labels,
        &path.child("metadata").child("labels"),
    ));
    let path = path.child("spec");
    let Some(spec) = template.and_then(|t| t.spec.as_ref()) else {
        errors.push(FieldError::required(&path, ""));
        return;
    };
    errors.extend(super::pod_spec(spec, &path));
    errors.extend(super::no_ephemeral(spec, &path));
    let policy = spec.restart_policy.as_deref();
    one_of(&path.child("restartPolicy"), policy, policies, errors);
}

fn strategy(strategy: &DeploymentStrategy, path: &Path, errors: &mut Vec<FieldError>) {
    let kind = strategy.type_.as_deref();
    one_of(
        &path.child("type"),
        kind,
        &["Recreate", "RollingUpdate"],
        errors,
    );
    let Some(rolling) = &strategy.rolling_update else {
        return;
    };
    let path = path.child("rollingUpdate");
    if kind == Some("Recreate") {
        let detail = "may not be specified when strategy `type` is 'Recreate'";
        errors.push(FieldError::forbidden(&path, detail));
        return;
    }
    let unavailable = rolling.max_unavailable.as_ref();
    let surge = rolling.max_surge.as_ref();
    let unavailable_number = count(unavailable, &path.child("maxUnavailable"), errors);
    let surge_number = count(surge, &path.child("maxSurge"), errors);
    if unavailable_number == Some(0) && surge_number == Some(0) {
        let detail = "may not be 0 when `maxSurge` is 0";
        let value = match unavailable {
            Some(IntOrString::String(text)) => Value::from(text.as_str()),
            _ => Value::from(0),
        };
        errors.push(FieldError::invalid(
            &path.child("maxUnavailable"),
            value,
            detail,
        ));
    }
    if let Some(IntOrString::String(text)) = unavailable
        && unavailable_number.is_some_and(|n| n > 100)
    {
        let path = path.child("maxUnavailable");
        errors.push(FieldError::invalid(
            &path,
            text.as_str(),
            "must not be greater than 100%",
        ));
    }
}

/// The number in `3` or `25%`.
pub(super) fn count(
    value: Option<&IntOrString>,
    path: &Path,
    errors: &mut Vec<FieldError>,
) -> Option<i64> {
    match value? {
        IntOrString::Int(number) => {
            not_negative(path, Some(i64::from(*number)), errors);
            Some(i64::from(*number))
        }
        IntOrString::String(text) => {
            let number = text
                .strip_suffix('%')
                .filter(|t| t.bytes().all(|b| b.is_ascii_digit()));
            let number = number.and_then(|t| t.parse::<u16>().ok()).map(i64::from);
            if number.is_none() {
                let detail = "a valid percent string must be a numeric string followed by an \
                              ending '%' (e.g. '1%',  or '93%', regex used for validation is \
                              '[0-9]+%')";
                errors.push(FieldError::invalid(path, text.as_str(), detail));
            }
            number
        }
    }
}

/// A Deployment's selector never changes: its pods would be orphaned.
pub fn deployment_update(new: &Deployment, old: &Deployment) -> Vec<FieldError> {
    let selector = |d: &Deployment| d.spec.as_ref().map(|s| s.selector.clone());
    same_selector(selector(new), selector(old))
}

/// A ReplicaSet's selector never changes.
pub fn replica_set_update(new: &ReplicaSet, old: &ReplicaSet) -> Vec<FieldError> {
    let selector = |d: &ReplicaSet| d.spec.as_ref().map(|s| s.selector.clone());
    same_selector(selector(new), selector(old))
}

pub(super) fn same_selector(
    new: Option<LabelSelector>,
    old: Option<LabelSelector>,
) -> Vec<FieldError> {
    if new == old {
        return Vec::new();
    }
    let value = serde_json::to_value(new).unwrap_or(Value::Null);
    vec![FieldError::invalid(
        &Path::new("spec").child("selector"),
        value,
        IMMUTABLE,
    )]
}
