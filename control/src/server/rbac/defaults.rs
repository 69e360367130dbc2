//! The roles and bindings of every cluster, as Kubernetes has them, for the kinds that there are here.
//!
//! ```text
//!  system:aggregate-to-view ─► view ─┐
//!  system:aggregate-to-edit ─────────┴► edit ─┐          cluster-admin ─► system:masters
//!  system:aggregate-to-admin ─────────────────┴► admin   system:basic-user, system:discovery ─► all
//! ```
//! At a start what is missing is made. What is there keeps what an operator made of it; only rules that it
//! lacks are added, as after an upgrade, and not even these where its annotation [`AUTOUPDATE`] is not
//! "true".
//!
//! Source: Kubernetes `plugin/pkg/auth/authorizer/rbac/bootstrappolicy/policy.go`, and
//! `pkg/registry/rbac/reconciliation`.

use futures_util::future::try_join_all;
use gantry_api::k8s_openapi::api::rbac::v1::PolicyRule;
use gantry_api::kinds::Kind;
use gantry_api::status::{Reason, Status};
use serde_json::{Value, json};

use super::escalation::uncovered;
use super::{AUTHENTICATED_GROUP, RBAC_GROUP};
use crate::server::identity::MASTERS_GROUP;
use crate::server::registry::{Registry, kind_named};
use crate::server::write::WriteOptions;

/// "true": the server may add what it would have made.
const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";
const READ: [&str; 3] = ["get", "list", "watch"];
const WRITE: [&str; 5] = ["create", "delete", "deletecollection", "patch", "update"];
const ALL: [&str; 8] = [
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];

/// Makes what is missing.
pub(in crate::server) async fn ensure(registry: &Registry) -> Result<(), Status> {
    let roles = kind_named("clusterroles")?;
    let bindings = kind_named("clusterrolebindings")?;
    let roles = self::roles().into_iter().map(|object| (roles, object));
    let bindings = self::bindings()
        .into_iter()
        .map(|object| (bindings, object));
    let one = |(kind, object)| ensure_one(registry, kind, object);
    // Side by side: the store makes them durable together.
    try_join_all(roles.chain(bindings).map(one)).await?;
    Ok(())
}

async fn ensure_one(registry: &Registry, kind: &'static Kind, object: Value) -> Result<(), Status> {
    let name = object["metadata"]["name"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let options = WriteOptions::default();
    if registry.get_entry(kind, "", &name).is_none() {
        let made = registry.create_value(kind, "", object, &options).await;
        return match made {
            Err(status) if status.reason != Reason::AlreadyExists => Err(status),
            _ => Ok(()),
        };
    }
    let entry = registry.get_entry(kind, "", &name);
    let Some(live) = entry.map(|entry| super::super::object::to_value(&entry)) else {
        return Ok(());
    };
    let Some(updated) = completed(&live?, &object) else {
        return Ok(());
    };
    let part = crate::server::rules::Part::Object;
    let update = registry.update_value(kind, "", &name, updated, part, &options);
    match update.await {
        Ok(_) => tracing::info!(role = name, "the rules that it lacked were added"),
        // Not worth a start that fails: the role is as the operator has it.
        Err(status) => tracing::warn!(role = name, %status, "its rules could not be completed"),
    }
    Ok(())
}

/// The live role with the rules that it lacks; `None` when it lacks none, or is not to be touched.
fn completed(live: &Value, wanted: &Value) -> Option<Value> {
    if live["metadata"]["annotations"][AUTOUPDATE] != "true" || wanted["rules"].is_null() {
        return None;
    }
    let rules = |object: &Value| -> Option<Vec<PolicyRule>> {
        match &object["rules"] {
            Value::Null => Some(Vec::new()),
            rules => serde_json::from_value(rules.clone()).ok(),
        }
    };
    let (held, wanted) = (rules(live)?, rules(wanted)?);
    let held: Vec<&PolicyRule> = held.iter().collect();
    let lacks = |rule: &&PolicyRule| {
        let missing = uncovered(&held, std::slice::from_ref(*rule));
        missing.is_ok_and(|missing| !missing.is_empty())
    };
    let missing: Vec<&PolicyRule> = wanted.iter().filter(lacks).collect();
    if missing.is_empty() {
        return None;
    }
    let mut all: Vec<&PolicyRule> = held.clone();
    all.extend(missing);
    let mut completed = live.clone();
    completed["rules"] = serde_json::to_value(all).ok()?;
    Some(completed)
}

fn rule(verbs: &[&str], group: &str, resources: &[&str]) -> Value {
    json!({"verbs": verbs, "apiGroups": [group], "resources": resources})
}

fn object(kind: &str, name: &str, labels: &[&str]) -> Value {
    let mut object = json!({
        "apiVersion": format!("{RBAC_GROUP}/v1"), "kind": kind,
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"},
            "annotations": {AUTOUPDATE: "true"},
        },
    });
    for label in labels {
        object["metadata"]["labels"][label] = json!("true");
    }
    object
}

fn role(name: &str, labels: &[&str], rules: Vec<Value>) -> Value {
    let mut role = object("ClusterRole", name, labels);
    role["rules"] = Value::Array(rules);
    role
}

fn aggregated(name: &str, labels: &[&str], selects: &str) -> Value {
    let mut role = object("ClusterRole", name, labels);
    role["aggregationRule"] = json!({"clusterRoleSelectors": [{"matchLabels": {selects: "true"}}]});
    role
}

const TO_ADMIN: &str = "rbac.authorization.k8s.io/aggregate-to-admin";
const TO_EDIT: &str = "rbac.authorization.k8s.io/aggregate-to-edit";
const TO_VIEW: &str = "rbac.authorization.k8s.io/aggregate-to-view";

fn roles() -> Vec<Value> {
    vec![
        role(
            "cluster-admin",
            &[],
            vec![
                rule(&["*"], "*", &["*"]),
                json!({"verbs": ["*"], "nonResourceURLs": ["*"]}),
            ],
        ),
        aggregated("admin", &[], TO_ADMIN),
        aggregated("edit", &[TO_ADMIN], TO_EDIT),
        aggregated("view", &[TO_EDIT], TO_VIEW),
        role(
            "system:aggregate-to-admin",
            &[TO_ADMIN],
            vec![
                rule(
                    &["create"],
                    "authorization.k8s.io",
                    &["localsubjectaccessreviews"],
                ),
                rule(&ALL, RBAC_GROUP, &["roles", "rolebindings"]),
            ],
        ),
        role("system:aggregate-to-edit", &[TO_EDIT], edit()),
        role("system:aggregate-to-view", &[TO_VIEW], view()),
        role(
            "system:basic-user",
            &[],
            vec![
                rule(
                    &["create"],
                    "authorization.k8s.io",
                    &["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
                ),
                rule(
                    &["create"],
                    "authentication.k8s.io",
                    &["selfsubjectreviews"],
                ),
            ],
        ),
        role(
            "system:discovery",
            &[],
            vec![json!({
                "verbs": ["get"],
                "nonResourceURLs": [
                    "/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/openapi", "/openapi/*",
                    "/readyz", "/version", "/version/",
                ],
            })],
        ),
    ]
}

fn edit() -> Vec<Value> {
    let pods = [
        "pods",
        "pods/attach",
        "pods/exec",
        "pods/portforward",
        "pods/proxy",
    ];
    vec![
        rule(
            &READ,
            "",
            &[
                "pods/attach",
                "pods/exec",
                "pods/portforward",
                "pods/proxy",
                "secrets",
                "services/proxy",
            ],
        ),
        rule(&["impersonate"], "", &["serviceaccounts"]),
        rule(&WRITE, "", &pods),
        rule(&["create"], "", &["pods/eviction", "serviceaccounts/token"]),
        rule(&["patch", "update"], "", &["pods/resize"]),
        rule(
            &WRITE,
            "",
            &[
                "configmaps",
                "events",
                "persistentvolumeclaims",
                "replicationcontrollers",
                "replicationcontrollers/scale",
                "secrets",
                "serviceaccounts",
                "services",
                "services/proxy",
            ],
        ),
        rule(
            &WRITE,
            "apps",
            &[
                "daemonsets",
                "deployments",
                "deployments/rollback",
                "deployments/scale",
                "replicasets",
                "replicasets/scale",
                "statefulsets",
                "statefulsets/scale",
            ],
        ),
        rule(&WRITE, "batch", &["cronjobs", "jobs"]),
        rule(&WRITE, "networking.k8s.io", &["networkpolicies"]),
        rule(&WRITE, "policy", &["poddisruptionbudgets"]),
        rule(&WRITE, "autoscaling", &["horizontalpodautoscalers"]),
        rule(&ALL, "coordination.k8s.io", &["leases"]),
    ]
}

fn view() -> Vec<Value> {
    vec![
        rule(
            &READ,
            "",
            &[
                "configmaps",
                "persistentvolumeclaims",
                "persistentvolumeclaims/status",
                "pods",
                "replicationcontrollers",
                "replicationcontrollers/scale",
                "serviceaccounts",
                "services",
                "services/status",
            ],
        ),
        rule(
            &READ,
            "",
            &[
                "events",
                "limitranges",
                "namespaces/status",
                "pods/flows",
                "pods/log",
                "pods/status",
                "replicationcontrollers/status",
                "resourcequotas",
                "resourcequotas/status",
            ],
        ),
        rule(&READ, "", &["namespaces"]),
        rule(&READ, "discovery.k8s.io", &["endpointslices"]),
        rule(
            &READ,
            "apps",
            &[
                "controllerrevisions",
                "daemonsets",
                "daemonsets/status",
                "deployments",
                "deployments/scale",
                "deployments/status",
                "replicasets",
                "replicasets/scale",
                "replicasets/status",
                "statefulsets",
                "statefulsets/scale",
                "statefulsets/status",
            ],
        ),
        rule(
            &READ,
            "batch",
            &["cronjobs", "cronjobs/status", "jobs", "jobs/status"],
        ),
        rule(&READ, "networking.k8s.io", &["networkpolicies"]),
        rule(
            &READ,
            "autoscaling",
            &[
                "horizontalpodautoscalers",
                "horizontalpodautoscalers/status",
            ],
        ),
        rule(
            &READ,
            "policy",
            &["poddisruptionbudgets", "poddisruptionbudgets/status"],
        ),
        rule(&READ, "metrics.k8s.io", &["pods", "nodes"]),
    ]
}

fn bindings() -> Vec<Value> {
    let binding = |role: &str, group: &str| {
        let mut binding = object("ClusterRoleBinding", role, &[]);
        binding["roleRef"] = json!({"apiGroup": RBAC_GROUP, "kind": "ClusterRole", "name": role});
        binding["subjects"] = json!([{"apiGroup": RBAC_GROUP, "kind": "Group", "name": group}]);
        binding
    };
    vec![
        binding("cluster-admin", MASTERS_GROUP),
        binding("system:basic-user", AUTHENTICATED_GROUP),
        binding("system:discovery", AUTHENTICATED_GROUP),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_role_lacks_is_added_and_the_operators_own_stays() {
        let wanted = role(
            "r",
            &[],
            vec![
                rule(&["get"], "", &["pods"]),
                rule(&["get"], "", &["nodes"]),
            ],
        );
        let mut live = role("r", &[], vec![rule(&["*"], "", &["pods", "secrets"])]);
        let completed = completed(&live, &wanted).unwrap();
        let expected = json!([
            rule(&["*"], "", &["pods", "secrets"]),
            rule(&["get"], "", &["nodes"])
        ]);
        assert_eq!(completed["rules"].as_array().unwrap().len(), 2);
        assert_eq!(completed["rules"][1]["resources"], expected[1]["resources"]);
        assert_eq!(super::completed(&completed, &wanted), None);
        live["metadata"]["annotations"][AUTOUPDATE] = json!("false");
        assert_eq!(super::completed(&live, &wanted), None);
        live["metadata"]["annotations"] = Value::Null;
        assert_eq!(super::completed(&live, &wanted), None);
    }
}
