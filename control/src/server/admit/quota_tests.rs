use super::*;
use gantry_api::kinds::resolve;
use gantry_api::pod_resources::to_list;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn pod(cpu: &str, more: Value) -> Pod {
    let mut pod = json!({"metadata": {"name": "p"}, "status": {"phase": "Pending"}, "spec": {
        "containers": [{"name": "a", "resources": {"requests": {"cpu": cpu}}}]}});
    for (field, value) in more.as_object().unwrap() {
        pod["spec"][field] = value.clone();
    }
    serde_json::from_value(pod).unwrap()
}

fn counted(pod: Pod) -> Counted {
    Counted::Pod(Box::new(pod))
}

fn quota(spec: Value, used: Value) -> ResourceQuota {
    let hard = spec["hard"].clone();
    serde_json::from_value(json!({"metadata": {"name": "q"}, "spec": spec,
        "status": {"hard": hard, "used": used}}))
    .unwrap()
}

fn text(amounts: &Amounts) -> String {
    printed(amounts.iter().map(|(name, amount)| (name, *amount)))
}

#[test]
fn objects_use_what_kubernetes_counts() {
    let usage = |word: &str, counted: Counted| text(&counted.usage(resolve(word).unwrap(), now()));
    let mut one = pod("500m", json!({}));
    assert_eq!(
        usage("pod", counted(one.clone())),
        "count/pods=1,cpu=500m,pods=1,requests.cpu=500m"
    );
    one.status.as_mut().unwrap().phase = Some("Succeeded".to_owned());
    assert_eq!(usage("pod", counted(one)), "count/pods=1");
    let gone: Pod = serde_json::from_value(json!({"metadata": {
        "deletionTimestamp": "2025-12-31T23:00:00Z", "deletionGracePeriodSeconds": 30}, "spec": {"containers": []}}))
    .unwrap();
    assert_eq!(usage("pod", counted(gone)), "count/pods=1");
    let service: Service = serde_json::from_value(
        json!({"spec": {"type": "LoadBalancer", "ports": [{"port": 1}, {"port": 2}]}}),
    )
    .unwrap();
    assert_eq!(
        usage("svc", Counted::Service(Box::new(service))),
        "count/services=1,services=1,services.loadbalancers=1,services.nodeports=2"
    );
    let claim: PersistentVolumeClaim = serde_json::from_value(json!({"spec": {
        "storageClassName": "fast", "resources": {"requests": {"storage": "1Gi"}}}}))
    .unwrap();
    assert_eq!(
        usage("pvc", Counted::Claim(Box::new(claim))),
        "count/persistentvolumeclaims=1,fast.storageclass.storage.k8s.io/persistentvolumeclaims=1,\
         fast.storageclass.storage.k8s.io/requests.storage=1Gi,persistentvolumeclaims=1,\
         requests.storage=1Gi"
    );
    assert_eq!(usage("deploy", Counted::Other), "count/deployments.apps=1");
    assert_eq!(
        usage("cm", Counted::Other),
        "configmaps=1,count/configmaps=1"
    );
}

#[test]
fn refusals_are_in_kubernetes_words() {
    let kind = resolve("pod").unwrap();
    let refused = |spec: Value, used: Value, pod: Pod| {
        charge(&quota(spec, used), kind, None, &counted(pod), now()).unwrap_err()
    };
    let hard = json!({"hard": {"pods": "4", "requests.cpu": "2"}});
    let used = json!({"pods": "4", "requests.cpu": "1500m"});
    assert_eq!(
        refused(hard.clone(), used.clone(), pod("600m", json!({}))),
        "exceeded quota: q, requested: pods=1,requests.cpu=600m, used: pods=4,requests.cpu=1500m, \
         limited: pods=4,requests.cpu=2"
    );
    let limited = json!({"hard": {"limits.cpu": "2", "limits.memory": "1Gi"}});
    assert_eq!(
        refused(limited, json!({}), pod("1", json!({}))),
        "failed quota: q: must specify limits.cpu for: a; limits.memory for: a"
    );
    assert_eq!(
        refused(hard.clone(), json!({}), pod("1", json!({}))),
        "status unknown for quota: q, resources: pods,requests.cpu"
    );
    let used = json!({"pods": "3", "requests.cpu": "1500m"});
    let fits = quota(hard, used);
    let taken = charge(&fits, kind, None, &counted(pod("500m", json!({}))), now());
    assert_eq!(text(&taken.unwrap().unwrap()), "pods=4,requests.cpu=2");
}

#[test]
fn a_change_is_charged_by_its_difference_and_less_is_never_refused() {
    let kind = resolve("pod").unwrap();
    let full = quota(
        json!({"hard": {"requests.cpu": "1", "pods": "1"}}),
        json!({"requests.cpu": "1", "pods": "1"}),
    );
    let change = |from: &str, to: &str| {
        let (old, new) = (counted(pod(from, json!({}))), counted(pod(to, json!({}))));
        charge(&full, kind, Some(&old), &new, now())
    };
    assert_eq!(change("1", "1"), Ok(None));
    assert_eq!(change("1", "500m"), Ok(None));
    assert_eq!(
        change("1", "1100m"),
        Err(
            "exceeded quota: q, requested: requests.cpu=100m, used: requests.cpu=1, limited: \
             requests.cpu=1"
                .to_owned()
        )
    );
}

#[test]
fn scopes_choose_pods() {
    let fits = |pod: &Pod, spec: Value| is_in_scopes(pod, &serde_json::from_value(spec).unwrap());
    let mut plain = pod("1", json!({}));
    plain.status.as_mut().unwrap().qos_class = Some("BestEffort".to_owned());
    let ends = pod(
        "1",
        json!({"activeDeadlineSeconds": 5, "priorityClassName": "high"}),
    );
    let scope = |name: &str| json!({"scopes": [name]});
    let class = |operator: &str, values: &[&str]| {
        json!({"scopeSelector": {"matchExpressions": [
        {"scopeName": "PriorityClass", "operator": operator, "values": values}]}})
    };
    for (spec, of_plain, of_ends) in [
        (scope("Terminating"), false, true),
        (scope("NotTerminating"), true, false),
        (scope("BestEffort"), true, false),
        (scope("NotBestEffort"), false, true),
        (scope("PriorityClass"), false, true),
        (class("In", &["high", "low"]), false, true),
        (class("NotIn", &["high"]), true, false),
        (class("DoesNotExist", &[]), true, false),
        (
            json!({"scopes": ["BestEffort", "Terminating"]}),
            false,
            false,
        ),
        (json!({}), true, true),
    ] {
        assert_eq!(fits(&plain, spec.clone()), of_plain, "{spec}");
        assert_eq!(fits(&ends, spec.clone()), of_ends, "{spec}");
    }
    let far = pod(
        "1",
        json!({"affinity": {"podAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "k", "namespaceSelector": {}}]}}}),
    );
    assert!(fits(&far, scope("CrossNamespacePodAffinity")));
    assert!(!fits(&plain, scope("CrossNamespacePodAffinity")));
}

proptest! {
    /// Charged one by one or counted afterwards: the same, and never above the limit.
    #[test]
    fn charges_add_up_to_a_count(wants in proptest::collection::vec(1..900_i64, 0..24), most in 1..4000_i64) {
        let kind = resolve("pod").unwrap();
        let spec: ResourceQuotaSpec = serde_json::from_value(
            json!({"hard": {"pods": "12", "requests.cpu": format!("{most}m"), "count/pods": "100"}})).unwrap();
        let none = |_: &Kind| 0;
        let count = |pods: &[Arc<Pod>]| {
            used(&spec, &Content { pods, services: &[], claims: &[], count: &none }, now())
        };
        let mut taken: Vec<Arc<Pod>> = Vec::new();
        let mut quota = ResourceQuota { spec: Some(spec.clone()), ..ResourceQuota::default() };
        let status = quota.status.get_or_insert_default();
        status.hard = spec.hard.clone();
        status.used = Some(to_list(&count(&[])));
        for want in wants {
            let pod = pod(&format!("{want}m"), json!({}));
            if let Ok(Some(used)) = charge(&quota, kind, None, &counted(pod.clone()), now()) {
                taken.push(Arc::new(pod));
                prop_assert_eq!(&used, &count(&taken));
                quota.status.get_or_insert_default().used = Some(to_list(&used));
            }
        }
        let all = count(&taken);
        prop_assert!(all["requests.cpu"] <= Quantity::from_milli(most));
        prop_assert!(all["pods"] <= Quantity::from_units(12));
    }
}
