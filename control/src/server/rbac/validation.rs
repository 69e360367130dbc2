//! What makes a rule or a binding mean something: one that never could is refused, not stored. Pure.
//!
//! Source: Kubernetes `pkg/apis/rbac/validation/validation.go`, names and texts.

use gantry_api::field::{FieldError, Path};
use gantry_api::kinds::Kind;
use serde_json::Value;

use super::RBAC_GROUP;

/// What is wrong with a role or a binding. What has another type than it should is decoding's business.
pub(super) fn errors(kind: &Kind, object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    match kind.kind {
        "Role" | "ClusterRole" => {
            let path = Path::new("rules");
            for (index, rule) in items(object, "rules").iter().enumerate() {
                check_rule(kind, rule, &path.index(index), &mut errors);
            }
        }
        _ => {
            check_role(kind, &object["roleRef"], &mut errors);
            let path = Path::new("subjects");
            for (index, subject) in items(object, "subjects").iter().enumerate() {
                check_subject(kind, subject, &path.index(index), &mut errors);
            }
        }
    }
    errors
}

fn items<'a>(object: &'a Value, field: &str) -> &'a [Value] {
    object[field].as_array().map_or(&[], Vec::as_slice)
}

fn check_rule(kind: &Kind, rule: &Value, path: &Path, errors: &mut Vec<FieldError>) {
    let has = |field: &str| !items(rule, field).is_empty();
    if !has("verbs") {
        let detail = "verbs must contain at least one value";
        errors.push(FieldError::required(&path.child("verbs"), detail));
    }
    if has("nonResourceURLs") {
        let urls = path.child("nonResourceURLs");
        let value = || rule["nonResourceURLs"].clone();
        if kind.namespaced {
            let detail = "namespaced rules cannot apply to non-resource URLs";
            errors.push(FieldError::invalid(&urls, value(), detail));
        }
        if has("apiGroups") || has("resources") || has("resourceNames") {
            let detail = "rules cannot apply to both regular resources and non-resource URLs";
            errors.push(FieldError::invalid(&urls, value(), detail));
        }
        return;
    }
    for (field, detail) in [
        (
            "apiGroups",
            "resource rules must supply at least one api group",
        ),
        (
            "resources",
            "resource rules must supply at least one resource",
        ),
    ] {
        if !has(field) {
            errors.push(FieldError::required(&path.child(field), detail));
        }
    }
}

fn check_role(kind: &Kind, role: &Value, errors: &mut Vec<FieldError>) {
    let path = Path::new("roleRef");
    let text = |field: &str| role[field].as_str().unwrap_or_default();
    let group = text("apiGroup");
    if !group.is_empty() && group != RBAC_GROUP {
        let detail = format!("must be {RBAC_GROUP}");
        errors.push(FieldError::invalid(&path.child("apiGroup"), group, &detail));
    }
    let allowed: &[&str] = match kind.namespaced {
        true => &["Role", "ClusterRole"],
        false => &["ClusterRole"],
    };
    if !allowed.contains(&text("kind")) {
        let detail = format!("must be {}", allowed.join(" or "));
        errors.push(FieldError::invalid(
            &path.child("kind"),
            text("kind"),
            &detail,
        ));
    }
    if text("name").is_empty() {
        errors.push(FieldError::required(&path.child("name"), ""));
    }
}

fn check_subject(kind: &Kind, subject: &Value, path: &Path, errors: &mut Vec<FieldError>) {
    let text = |field: &str| subject[field].as_str().unwrap_or_default();
    if text("name").is_empty() {
        errors.push(FieldError::required(&path.child("name"), ""));
    }
    let group = match text("kind") {
        "User" | "Group" => RBAC_GROUP,
        "ServiceAccount" => {
            // In a binding of a namespace, it is that namespace's account.
            if text("namespace").is_empty() && !kind.namespaced {
                errors.push(FieldError::required(&path.child("namespace"), ""));
            }
            ""
        }
        other => {
            let detail = "must be User, Group or ServiceAccount";
            errors.push(FieldError::invalid(&path.child("kind"), other, detail));
            return;
        }
    };
    let given = text("apiGroup");
    if !given.is_empty() && given != group {
        let detail = format!("must be {group:?}");
        errors.push(FieldError::invalid(&path.child("apiGroup"), given, &detail));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::kinds::resolve;
    use serde_json::json;

    fn fields(kind: &str, object: Value) -> Vec<String> {
        let errors = errors(resolve(kind).unwrap(), &object);
        errors.into_iter().map(|error| error.field).collect()
    }

    #[test]
    fn rules_that_mean_nothing_are_named() {
        let fine = json!({"rules": [{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}]});
        assert_eq!(fields("role", fine), Vec::<String>::new());
        let urls = json!({"rules": [{"verbs": ["get"], "nonResourceURLs": ["/x"]}]});
        assert_eq!(fields("clusterrole", urls.clone()), Vec::<String>::new());
        assert_eq!(fields("role", urls), ["rules[0].nonResourceURLs"]);
        let none = json!({"rules": [{}]});
        let missing = ["rules[0].verbs", "rules[0].apiGroups", "rules[0].resources"];
        assert_eq!(fields("role", none), missing);
        assert_eq!(fields("role", json!({"rules": "x"})), Vec::<String>::new());
    }

    #[test]
    fn bindings_that_bind_nobody_are_named() {
        let binding = |kind: &str, subject: Value| json!({"roleRef": {"apiGroup": RBAC_GROUP, "kind": kind, "name": "r"}, "subjects": [subject]});
        let jane = json!({"apiGroup": RBAC_GROUP, "kind": "User", "name": "jane"});
        let fine = binding("Role", jane.clone());
        assert_eq!(fields("rolebinding", fine.clone()), Vec::<String>::new());
        assert_eq!(fields("clusterrolebinding", fine), ["roleRef.kind"]);
        let account = json!({"kind": "ServiceAccount", "name": "ci"});
        let of = |kind: &str| fields(kind, binding("ClusterRole", account.clone()));
        assert_eq!(of("rolebinding"), Vec::<String>::new());
        assert_eq!(of("clusterrolebinding"), ["subjects[0].namespace"]);
        let robot = json!({"kind": "Robot"});
        let wrong = ["subjects[0].name", "subjects[0].kind"];
        assert_eq!(fields("rolebinding", binding("Role", robot)), wrong);
    }
}
