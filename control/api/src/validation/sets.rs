//! Rules for DaemonSets, StatefulSets and ReplicationControllers.

use super::workload::{count, same_selector, selector, template};
use super::{IMMUTABLE, not_negative, one_of};
use crate::field::{FieldError, Path};
use k8s_openapi::api::apps::v1::{DaemonSet, StatefulSet};
use k8s_openapi::api::core::v1::ReplicationController;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;

const STRATEGIES: [&str; 2] = ["RollingUpdate", "OnDelete"];

/// A DaemonSet.
pub fn daemon_set(set: &DaemonSet) -> Vec<FieldError> {
    let path = Path::new("spec");
    let Some(spec) = &set.spec else {
        return vec![FieldError::required(&path, "")];
    };
    let mut errors = Vec::new();
    let number = |value: Option<i32>| value.map(i64::from);
    not_negative(
        &path.child("minReadySeconds"),
        number(spec.min_ready_seconds),
        &mut errors,
    );
    let limit = number(spec.revision_history_limit);
    not_negative(&path.child("revisionHistoryLimit"), limit, &mut errors);
    selector(&spec.selector, Some(&spec.template), &path, &mut errors);
    template(
        Some(&spec.template),
        &path.child("template"),
        &["Always"],
        &mut errors,
    );
    if let Some(strategy) = &spec.update_strategy {
        let path = path.child("updateStrategy");
        one_of(
            &path.child("type"),
            strategy.type_.as_deref(),
            &STRATEGIES,
            &mut errors,
        );
        if let Some(rolling) = &strategy.rolling_update {
            let path = path.child("rollingUpdate");
            let at = path.child("maxUnavailable");
            let unavailable = count(rolling.max_unavailable.as_ref(), &at, &mut errors);
            let surge = count(
                rolling.max_surge.as_ref(),
                &path.child("maxSurge"),
                &mut errors,
            );
            if unavailable == Some(0) && surge == Some(0) {
                errors.push(FieldError::invalid(
                    &at,
                    0,
                    "cannot be 0 when maxSurge is 0",
                ));
            }
            if unavailable.unwrap_or(0) > 0 && surge.unwrap_or(0) > 0 {
                let detail = "may not be set when maxUnavailable is not 0";
                errors.push(FieldError::invalid(&path.child("maxSurge"), surge, detail));
            }
        }
    }
    errors
}

/// A DaemonSet's selector never changes.
pub fn daemon_set_update(new: &DaemonSet, old: &DaemonSet) -> Vec<FieldError> {
    let selector = |s: &DaemonSet| s.spec.as_ref().map(|s| s.selector.clone());
    same_selector(selector(new), selector(old))
}

/// A StatefulSet.
pub fn stateful_set(set: &StatefulSet) -> Vec<FieldError> {
    let path = Path::new("spec");
    let Some(spec) = &set.spec else {
        return vec![FieldError::required(&path, "")];
    };
    let mut errors = Vec::new();
    let number = |value: Option<i32>| value.map(i64::from);
    for (field, value) in [
        ("replicas", spec.replicas),
        ("minReadySeconds", spec.min_ready_seconds),
        ("revisionHistoryLimit", spec.revision_history_limit),
    ] {
        not_negative(&path.child(field), number(value), &mut errors);
    }
    let policy = spec.pod_management_policy.as_deref();
    let policies = ["OrderedReady", "Parallel"];
    one_of(
        &path.child("podManagementPolicy"),
        policy,
        &policies,
        &mut errors,
    );
    selector(&spec.selector, Some(&spec.template), &path, &mut errors);
    let claims = spec.volume_claim_templates.iter().flatten();
    // The claims' volumes come with the pods: what mounts them in the template is no dangling name.
    let mut with_claims = spec.template.clone();
    if let Some(pod) = &mut with_claims.spec {
        let volumes = pod.volumes.get_or_insert_default();
        for claim in claims.clone() {
            let name = claim.metadata.name.clone().unwrap_or_default();
            volumes.retain(|volume| volume.name != name);
            volumes.push(k8s_openapi::api::core::v1::Volume {
                name,
                empty_dir: Some(k8s_openapi::api::core::v1::EmptyDirVolumeSource::default()),
                ..k8s_openapi::api::core::v1::Volume::default()
            });
        }
    }
    template(
        Some(&with_claims),
        &path.child("template"),
        &["Always"],
        &mut errors,
    );
    for (i, claim) in claims.enumerate() {
        let path = path.child("volumeClaimTemplates").index(i);
        if claim.metadata.name.as_ref().is_none_or(String::is_empty) {
            errors.push(FieldError::required(
                &path.child("metadata").child("name"),
                "",
            ));
        }
        super::claim_spec(claim.spec.as_ref(), &path.child("spec"), &mut errors);
    }
    if let Some(strategy) = &spec.update_strategy {
        let path = path.child("updateStrategy");
        one_of(
            &path.child("type"),
            strategy.type_.as_deref(),
            &STRATEGIES,
            &mut errors,
        );
        if let Some(rolling) = &strategy.rolling_update {
            let path = path.child("rollingUpdate");
            let at = path.child("partition");
            not_negative(&at, number(rolling.partition), &mut errors);
            let at = path.child("maxUnavailable");
            let value = rolling.max_unavailable.as_ref();
            let most = count(value, &at, &mut errors);
            let refuse = |detail: &str| {
                let value = serde_json::to_value(value).unwrap_or(Value::Null);
                FieldError::invalid(&at, value, detail)
            };
            if most == Some(0) {
                errors.push(refuse("cannot be 0"));
            }
            if matches!(value, Some(IntOrString::String(_))) && most.is_some_and(|most| most > 100)
            {
                errors.push(refuse("must not be greater than 100%"));
            }
        }
    }
    if let Some(ordinals) = &spec.ordinals {
        let path = path.child("ordinals").child("start");
        not_negative(&path, number(ordinals.start), &mut errors);
    }
    if let Some(policy) = &spec.persistent_volume_claim_retention_policy {
        let path = path.child("persistentVolumeClaimRetentionPolicy");
        let values = ["Retain", "Delete"];
        one_of(
            &path.child("whenDeleted"),
            policy.when_deleted.as_deref(),
            &values,
            &mut errors,
        );
        one_of(
            &path.child("whenScaled"),
            policy.when_scaled.as_deref(),
            &values,
            &mut errors,
        );
    }
    errors
}

/// Of a StatefulSet only what does not touch identity may change.
pub fn stateful_set_update(new: &StatefulSet, old: &StatefulSet) -> Vec<FieldError> {
    let (Some(new), Some(old)) = (&new.spec, &old.spec) else {
        return Vec::new();
    };
    let mut same = new.clone();
    same.replicas = old.replicas;
    same.template = old.template.clone();
    same.update_strategy.clone_from(&old.update_strategy);
    same.min_ready_seconds = old.min_ready_seconds;
    same.ordinals.clone_from(&old.ordinals);
    same.revision_history_limit = old.revision_history_limit;
    same.persistent_volume_claim_retention_policy
        .clone_from(&old.persistent_volume_claim_retention_policy);
    if same == *old {
        return Vec::new();
    }
    let detail = "updates to statefulset spec for fields other than 'replicas', 'ordinals', \
                  'template', 'updateStrategy', 'revisionHistoryLimit', \
                  'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";
    vec![FieldError::forbidden(&Path::new("spec"), detail)]
}

/// A ReplicationController.
pub fn replication_controller(controller: &ReplicationController) -> Vec<FieldError> {
    let path = Path::new("spec");
    let Some(spec) = &controller.spec else {
        return vec![FieldError::required(&path, "")];
    };
    let mut errors = Vec::new();
    let number = |value: Option<i32>| value.map(i64::from);
    not_negative(&path.child("replicas"), number(spec.replicas), &mut errors);
    let seconds = number(spec.min_ready_seconds);
    not_negative(&path.child("minReadySeconds"), seconds, &mut errors);
    let wanted = LabelSelector {
        match_labels: spec.selector.clone(),
        ..LabelSelector::default()
    };
    selector(&wanted, spec.template.as_ref(), &path, &mut errors);
    template(
        spec.template.as_ref(),
        &path.child("template"),
        &["Always"],
        &mut errors,
    );
    errors
}

/// A field that may not change.
pub(super) fn immutable<T: PartialEq + serde::Serialize>(
    new: &T,
    old: &T,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    if new != old {
        let value = serde_json::to_value(new).unwrap_or(Value::Null);
        errors.push(FieldError::invalid(path, value, IMMUTABLE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_stateful_set_may_leave_some_pods_unavailable_but_not_none() {
        let errors = |unavailable: Value| {
            let mut set: StatefulSet = serde_json::from_value(json!({
                "spec": {"serviceName": "s", "selector": {"matchLabels": {"a": "b"}},
                    "updateStrategy": {"type": "RollingUpdate",
                        "rollingUpdate": {"maxUnavailable": unavailable}},
                    "template": {"metadata": {"labels": {"a": "b"}},
                        "spec": {"containers": [{"name": "c", "image": "i"}]}}},
            }))
            .unwrap();
            crate::defaults::stateful_set(&mut set);
            let errors = stateful_set(&set);
            errors.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        for fine in [json!(null), json!(1), json!(7), json!("1%"), json!("100%")] {
            assert_eq!(errors(fine), Vec::<String>::new());
        }
        let at = "spec.updateStrategy.rollingUpdate.maxUnavailable: Invalid value";
        for (wrong, detail) in [
            (json!(0), ": 0: cannot be 0"),
            (json!("0%"), ": \"0%\": cannot be 0"),
            (json!("101%"), ": \"101%\": must not be greater than 100%"),
            (json!("some"), ": \"some\": a valid percent string"),
            (json!(-1), ": -1: must be greater than or equal to 0"),
        ] {
            let found = errors(wrong);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].starts_with(&format!("{at}{detail}")), "{found:?}");
        }
    }
}
