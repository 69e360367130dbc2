//! Rules, bindings and what covers what: the usual cases by name, the laws by random rules.

use gantry_api::k8s_openapi::api::rbac::v1::{
    ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::escalation::{TooMany, covers, uncovered};
use super::*;

fn rule(value: Value) -> PolicyRule {
    serde_json::from_value(value).unwrap()
}

fn what<'a>(verb: &'a str, resource: &'a str, namespace: &'a str, name: &'a str) -> Attributes<'a> {
    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    Attributes {
        verb,
        group: "",
        resource,
        subresource,
        namespace,
        name,
    }
}

#[test]
fn rules_match_as_kubernetes_has_them() {
    let log = rule(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods/log"]}));
    assert!(rule_allows(&log, &what("get", "pods/log", "a", "p")));
    assert!(!rule_allows(&log, &what("get", "pods", "a", "p")));
    assert!(!rule_allows(&log, &what("list", "pods/log", "a", "p")));
    let pods = rule(json!({"verbs": ["*"], "apiGroups": [""], "resources": ["pods"]}));
    assert!(rule_allows(&pods, &what("get", "pods", "a", "p")));
    assert!(!rule_allows(&pods, &what("create", "pods/exec", "a", "p")));
    let scale = rule(json!({"verbs": ["update"], "apiGroups": ["*"], "resources": ["*/scale"]}));
    let deployment = Attributes {
        group: "apps",
        ..what("update", "deployments/scale", "a", "d")
    };
    assert!(rule_allows(&scale, &deployment));
    assert!(!rule_allows(
        &scale,
        &what("update", "deployments", "a", "d")
    ));
    let all = rule(json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}));
    assert!(rule_allows(&all, &deployment));
    let apps = rule(json!({"verbs": ["*"], "apiGroups": [""], "resources": ["*"]}));
    assert!(!rule_allows(&apps, &deployment));
    let named = rule(json!({
        "verbs": ["*"], "apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["c"],
    }));
    assert!(rule_allows(&named, &what("get", "configmaps", "a", "c")));
    assert!(!rule_allows(&named, &what("get", "configmaps", "a", "d")));
    assert!(!rule_allows(&named, &what("list", "configmaps", "a", "")));
    assert!(!rule_allows(&named, &what("create", "configmaps", "a", "")));
    let urls = rule(json!({"verbs": ["*"], "nonResourceURLs": ["*"]}));
    assert!(!rule_allows(&urls, &what("get", "configmaps", "a", "c")));
}

fn cluster_roles(value: Value) -> Vec<ClusterRole> {
    serde_json::from_value(value).unwrap()
}

fn policy(cluster_roles: Value, roles: Value, cluster: Value, bindings: Value) -> Policy {
    let roles: Vec<Role> = serde_json::from_value(roles).unwrap();
    let cluster: Vec<ClusterRoleBinding> = serde_json::from_value(cluster).unwrap();
    let bindings: Vec<RoleBinding> = serde_json::from_value(bindings).unwrap();
    Policy::new(
        &self::cluster_roles(cluster_roles),
        &roles,
        &cluster,
        &bindings,
    )
}

fn read(resource: &str) -> Value {
    json!([{"verbs": ["get"], "apiGroups": [""], "resources": [resource]}])
}

fn reference(kind: &str, name: &str) -> Value {
    json!({"apiGroup": RBAC_GROUP, "kind": kind, "name": name})
}

fn may(policy: &Policy, user: &str, groups: &[&str], what: &Attributes<'_>) -> Option<String> {
    let groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
    let grant = policy.allows(user, &groups, what)?;
    Some(grant.by.to_string())
}

#[test]
fn bindings_give_to_their_subjects_in_their_namespace() {
    let policy = policy(
        json!([{"metadata": {"name": "pods"}, "rules": read("pods")}]),
        json!([{"metadata": {"name": "maps", "namespace": "a"}, "rules": read("configmaps")}]),
        json!([
            {"metadata": {"name": "ops"}, "roleRef": reference("ClusterRole", "pods"),
             "subjects": [{"kind": "Group", "name": "ops"}, {"kind": "ServiceAccount", "name": "x"}]},
            {"metadata": {"name": "wrong"}, "roleRef": reference("Role", "maps"),
             "subjects": [{"kind": "User", "name": "eve"}]},
        ]),
        json!([
            {"metadata": {"name": "b", "namespace": "a"}, "roleRef": reference("ClusterRole", "pods"),
             "subjects": [{"kind": "User", "name": "jane"}, {"kind": "ServiceAccount", "name": "ci"},
                          {"kind": "ServiceAccount", "name": "ci", "namespace": "b"}]},
            {"metadata": {"name": "m", "namespace": "a"}, "roleRef": reference("Role", "maps"),
             "subjects": [{"kind": "Group", "name": "system:authenticated"}]},
            {"metadata": {"name": "n", "namespace": "b"}, "roleRef": reference("Role", "maps"),
             "subjects": [{"kind": "User", "name": "eve"}]},
            {"metadata": {"name": "later", "namespace": "b"}, "roleRef": reference("Role", "none"),
             "subjects": [{"kind": "User", "name": "eve"}]},
        ]),
    );
    let pods = |namespace| what("get", "pods", namespace, "p");
    let jane = may(&policy, "jane", &[], &pods("a"));
    assert_eq!(
        jane.as_deref(),
        Some("RoleBinding \"a/b\" of ClusterRole \"pods\" to User \"jane\"")
    );
    assert_eq!(may(&policy, "jane", &[], &pods("b")), None);
    assert_eq!(may(&policy, "jane", &[], &pods("")), None);
    for place in ["", "a", "b"] {
        assert!(may(&policy, "joe", &["ops"], &pods(place)).is_some());
        assert_eq!(may(&policy, "ops", &["dev"], &pods(place)), None);
    }
    for (user, allowed) in [
        ("system:serviceaccount:a:ci", true),
        ("system:serviceaccount:b:ci", true),
        ("system:serviceaccount:c:ci", false),
        ("ci", false),
    ] {
        assert_eq!(
            may(&policy, user, &[], &pods("a")).is_some(),
            allowed,
            "{user}"
        );
    }
    let maps = |namespace| what("get", "configmaps", namespace, "c");
    assert!(may(&policy, "anyone", &[], &maps("a")).is_some());
    assert!(may(&policy, "anyone", &["system:authenticated"], &maps("a")).is_some());
    assert_eq!(may(&policy, "eve", &[], &maps("b")), None);
    assert_eq!(may(&policy, "eve", &[], &maps("")), None);
}

#[test]
fn a_namespace_counts_only_for_kinds_that_have_one() {
    let kind = |word| gantry_api::kinds::resolve(word).unwrap();
    assert_eq!(Attributes::of("get", kind("nodes"), "a", "n").namespace, "");
    assert_eq!(Attributes::of("get", kind("pods"), "a", "p").namespace, "a");
    assert_eq!(Attributes::of("get", kind("ns"), "b", "a").namespace, "a");
    assert_eq!(Attributes::of("list", kind("ns"), "b", "").namespace, "");
}

#[test]
fn aggregated_roles_have_the_rules_of_those_that_they_select() {
    let select = |label: &str| json!({"clusterRoleSelectors": [{"matchLabels": {label: "true"}}]});
    let bind = |name: &str| {
        json!({"metadata": {"name": name}, "roleRef": reference("ClusterRole", name),
               "subjects": [{"kind": "User", "name": name}]})
    };
    let policy = policy(
        json!([
            {"metadata": {"name": "admin"}, "aggregationRule": select("admin"), "rules": read("nodes")},
            {"metadata": {"name": "edit", "labels": {"admin": "true"}}, "aggregationRule": select("edit")},
            {"metadata": {"name": "maps", "labels": {"edit": "true"}}, "rules": read("configmaps")},
            {"metadata": {"name": "pods", "labels": {"admin": "true"}}, "rules": read("pods")},
            {"metadata": {"name": "x", "labels": {"y": "true"}}, "aggregationRule": select("x")},
            {"metadata": {"name": "y", "labels": {"x": "true"}}, "aggregationRule": select("y")},
        ]),
        json!([]),
        json!([bind("admin"), bind("edit"), bind("x")]),
        json!([]),
    );
    for (user, resource, allowed) in [
        ("admin", "pods", true),
        ("admin", "configmaps", true),
        ("admin", "nodes", false),
        ("edit", "configmaps", true),
        ("edit", "pods", false),
        ("x", "pods", false),
    ] {
        let found = may(&policy, user, &[], &what("get", resource, "a", "n"));
        assert_eq!(found.is_some(), allowed, "{user} {resource}");
    }
}

#[test]
fn rights_are_compared_one_by_one() {
    let held = [
        rule(json!({"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"]})),
        rule(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["configmaps"]})),
        rule(json!({"verbs": ["get"], "nonResourceURLs": ["/api/*"]})),
    ];
    let held: Vec<&PolicyRule> = held.iter().collect();
    let both =
        rule(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods", "configmaps"]}));
    assert_eq!(uncovered(&held, &[both]), Ok(Vec::new()));
    let more =
        rule(json!({"verbs": ["list"], "apiGroups": [""], "resources": ["pods", "configmaps"]}));
    let missing = uncovered(&held, &[more]).unwrap();
    let lists = rule(json!({"verbs": ["list"], "apiGroups": [""], "resources": ["configmaps"]}));
    assert_eq!(missing, [lists]);
    let url = |url: &str| rule(json!({"verbs": ["get"], "nonResourceURLs": [url]}));
    assert_eq!(uncovered(&held, &[url("/api/v1")]), Ok(Vec::new()));
    assert_eq!(
        uncovered(&held, &[url("/metrics")]),
        Ok(vec![url("/metrics")])
    );
    let many: Vec<String> = (0..200).map(|n| n.to_string()).collect();
    let many = rule(json!({"verbs": many, "apiGroups": many, "resources": many}));
    assert_eq!(uncovered(&held, std::slice::from_ref(&many)), Err(TooMany));
    let all = escalation::everything();
    let all: Vec<&PolicyRule> = all.iter().collect();
    assert_eq!(uncovered(&all, &[many]), Ok(Vec::new()));
}

fn some(words: &'static [&'static str], least: usize) -> impl Strategy<Value = Vec<String>> {
    let word = proptest::sample::select(words).prop_map(str::to_owned);
    proptest::collection::vec(word, least..3)
}

fn any_rule() -> impl Strategy<Value = PolicyRule> {
    (
        some(&["get", "list", "*"], 1),
        some(&["", "apps", "*"], 0),
        some(&["pods", "pods/log", "*/log", "nodes", "*"], 0),
        some(&["a", "b"], 0),
    )
        .prop_map(|(verbs, groups, resources, names)| PolicyRule {
            verbs,
            api_groups: Some(groups),
            resources: Some(resources),
            resource_names: Some(names),
            non_resource_urls: None,
        })
}

fn requests() -> Vec<Attributes<'static>> {
    let mut all = Vec::new();
    for verb in ["get", "list", "delete"] {
        for group in ["", "apps", "batch"] {
            for resource in ["pods", "pods/log", "nodes", "nodes/log", "jobs"] {
                for name in ["", "a", "b", "c"] {
                    all.push(Attributes {
                        group,
                        ..what(verb, resource, "n", name)
                    });
                }
            }
        }
    }
    all
}

proptest! {
    /// What is covered allows nothing that is not allowed already: nobody gains by writing it.
    #[test]
    fn what_is_covered_gives_nothing_new(held in proptest::collection::vec(any_rule(), 0..4), wanted in any_rule()) {
        let refs: Vec<&PolicyRule> = held.iter().collect();
        if uncovered(&refs, std::slice::from_ref(&wanted)) == Ok(Vec::new()) {
            for request in requests().iter().filter(|request| rule_allows(&wanted, request)) {
                prop_assert!(held.iter().any(|rule| rule_allows(rule, request)), "{:?}", request);
            }
        }
        prop_assert!(covers(&wanted, &wanted));
    }

    /// Rights only add up: one more binding, or one more rule, takes none away.
    #[test]
    fn more_bindings_take_nothing_away(first in any_rule(), second in any_rule()) {
        let of = |rules: &[PolicyRule]| {
            let role = ClusterRole { rules: Some(rules.to_vec()), ..cluster_roles(json!([{"metadata": {"name": "r"}}])).remove(0) };
            let binding: RoleBinding = serde_json::from_value(json!({
                "metadata": {"name": "b", "namespace": "n"}, "roleRef": reference("ClusterRole", "r"),
                "subjects": [{"kind": "User", "name": "u"}],
            })).unwrap();
            Policy::new(&[role], &[], &[], &[binding])
        };
        let (one, both) = (of(std::slice::from_ref(&first)), of(&[first.clone(), second]));
        for request in requests() {
            let before = may(&one, "u", &[], &request);
            prop_assert_eq!(before.is_some(), rule_allows(&first, &request));
            prop_assert!(before.is_none() || may(&both, "u", &[], &request).is_some());
            let elsewhere = Attributes { namespace: "m", ..request };
            prop_assert!(may(&both, "u", &[], &elsewhere).is_none());
            prop_assert!(may(&both, "v", &["u"], &request).is_none());
        }
    }
}
