use std::collections::BTreeMap;
use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::{Node, Pod};
use serde_json::json;

use super::filter::{self, Blocked};
use super::nodes::Nodes;
use super::pending::{Pending, Wake};
use super::request::PodRequest;
use super::score::{Decision, decide};
use std::time::Duration;
use tokio::time::Instant;

fn node(name: &str, cpu: &str) -> Node {
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "size": cpu}},
        "status": {
            "allocatable": {"cpu": cpu, "memory": "64Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }))
    .unwrap()
}

fn request(name: &str, spec: serde_json::Value) -> PodRequest {
    let pod: Pod = serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": name},
        "spec": spec,
    }))
    .unwrap();
    PodRequest::of(&pod).unwrap()
}

fn wants_cpu(name: &str, cpu: &str) -> PodRequest {
    let resources = json!({"requests": {"cpu": cpu, "memory": "1Gi"}});
    request(
        name,
        json!({"containers": [{"name": "c", "resources": resources}]}),
    )
}

fn cluster(nodes: &[Node]) -> Nodes {
    let mut state = Nodes::default();
    for node in nodes {
        state.put(node);
    }
    state
}

fn chosen(nodes: &Nodes, pod: &PodRequest) -> Result<String, String> {
    match decide(nodes.states(), pod, 0).0 {
        Decision::Bind(index) => Ok(nodes.states()[index].name.to_string()),
        Decision::Unschedulable(message, _) => Err(message),
    }
}

#[test]
fn of_4_12_and_16_cpus_the_16_win_a_pod_that_wants_10() {
    let nodes = cluster(&[node("a4", "4"), node("b12", "12"), node("c16", "16")]);
    let pod = wants_cpu("p", "10");
    assert_eq!(chosen(&nodes, &pod), Ok("c16".to_owned()));
    let small: Vec<_> = nodes
        .states()
        .iter()
        .filter(|n| filter::check(n, &pod).is_err())
        .collect();
    assert_eq!(small.len(), 1);
    assert_eq!(&*small[0].name, "a4");
}

#[test]
fn what_is_assumed_is_not_promised_twice() {
    let mut nodes = cluster(&[node("a", "4"), node("b", "4")]);
    let mut placed = Vec::new();
    for index in 0..4 {
        let pod = Arc::new(wants_cpu(&format!("p{index}"), "2"));
        let name = chosen(&nodes, &pod).unwrap();
        nodes.assume(pod, &name);
        placed.push(name);
    }
    placed.sort();
    assert_eq!(placed, ["a", "a", "b", "b"]);
    let fifth = chosen(&nodes, &wants_cpu("p4", "2"));
    assert_eq!(
        fifth,
        Err("0/2 nodes are available: 2 Insufficient cpu.".to_owned())
    );
    nodes.forget_assumed("p0");
    assert!(chosen(&nodes, &wants_cpu("p4", "2")).is_ok());
}

#[test]
fn reasons_are_counted_in_kubernetes_words() {
    let mut cordoned = node("cordoned", "16");
    cordoned.spec.get_or_insert_default().unschedulable = Some(true);
    let mut silent = node("silent", "16");
    silent.status.as_mut().unwrap().conditions.as_mut().unwrap()[0].status = "Unknown".to_owned();
    let tainted: Node = {
        let mut value = serde_json::to_value(node("tainted", "16")).unwrap();
        value["spec"] =
            json!({"taints": [{"key": "dedicated", "value": "gpu", "effect": "NoSchedule"}]});
        serde_json::from_value(value).unwrap()
    };
    let all = [node("a", "1"), node("b", "2"), cordoned, silent, tainted];
    let nodes = cluster(&all);
    let mut pod = wants_cpu("p", "2");
    pod.node_selector = BTreeMap::from([("size".to_owned(), "1".to_owned())]);
    assert_eq!(
        chosen(&nodes, &pod).unwrap_err(),
        "0/5 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match Pod's node \
         affinity/selector, 1 node(s) had untolerated taint {dedicated: gpu}, 1 node(s) were not \
         ready, 1 node(s) were unschedulable."
    );
    let none = chosen(&Nodes::default(), &pod).unwrap_err();
    assert_eq!(none, "no nodes available to schedule pods");
    let tolerant = request(
        "t",
        json!({
            "containers": [{"name": "c"}],
            "tolerations": [{"key": "dedicated", "operator": "Exists"}],
            "nodeSelector": {"kubernetes.io/hostname": "tainted"},
        }),
    );
    assert_eq!(chosen(&nodes, &tolerant), Ok("tainted".to_owned()));
}

#[test]
fn host_ports_and_pod_count_are_taken_into_account() {
    let mut nodes = cluster(&[node("a", "4")]);
    let with_port = |name: &str| {
        let ports = json!([{"containerPort": 80, "hostPort": 80}]);
        request(name, json!({"containers": [{"name": "c", "ports": ports}]}))
    };
    nodes.assume(Arc::new(with_port("first")), "a");
    assert_eq!(
        chosen(&nodes, &with_port("second")).unwrap_err(),
        "0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports."
    );
    for index in 1..110 {
        let pod = request(&format!("p{index}"), json!({"containers": [{"name": "c"}]}));
        nodes.assume(Arc::new(pod), "a");
    }
    let more = request("more", json!({"containers": [{"name": "c"}]}));
    let told = "0/1 nodes are available: 1 Too many pods.";
    assert_eq!(chosen(&nodes, &more).unwrap_err(), told);
}

#[test]
fn required_node_affinity_has_alternatives_of_requirements() {
    let nodes = cluster(&[node("a", "4"), node("b", "8"), node("c", "16")]);
    let with_terms = |terms: serde_json::Value| {
        request(
            "p",
            json!({
                "containers": [{"name": "c"}],
                "affinity": {"nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms},
                }},
            }),
        )
    };
    let expression = |key: &str, operator: &str, values: &[&str]| json!({"key": key, "operator": operator, "values": values});
    let fits = |terms: serde_json::Value| {
        let pod = with_terms(terms);
        let fitting = nodes
            .states()
            .iter()
            .filter(|node| filter::check(node, &pod).is_ok());
        fitting
            .map(|node| node.name.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        fits(json!([{"matchExpressions": [expression("size", "Gt", &["4"])]}])),
        ["b", "c"]
    );
    let both = [
        expression("size", "Gt", &["4"]),
        expression("size", "NotIn", &["16"]),
    ];
    assert_eq!(fits(json!([{"matchExpressions": both}])), ["b"]);
    let alternatives = json!([
        {"matchFields": [expression("metadata.name", "In", &["a"])]},
        {"matchExpressions": [expression("size", "In", &["16"])]},
    ]);
    assert_eq!(fits(alternatives), ["a", "c"]);
    assert!(
        fits(json!([{}])).is_empty(),
        "an empty term matches nothing"
    );
}

#[test]
fn a_large_cluster_is_searched_in_turns() {
    let all: Vec<Node> = (0..1000)
        .map(|index| node(&format!("n{index}"), "4"))
        .collect();
    let nodes = cluster(&all);
    let (decision, looked_at) = decide(nodes.states(), &wants_cpu("p", "1"), 900);
    assert!(matches!(decision, Decision::Bind(_)));
    assert_eq!(looked_at, 420, "42 % of 1000");
}

#[test]
fn waiting_pods_come_back_by_time_or_when_something_helps() {
    let second = Duration::from_secs(1);
    let start = Instant::now();
    let mut pending = Pending::default();
    pending.put(wants_cpu("low", "1"), start);
    let mut urgent = wants_cpu("urgent", "1");
    urgent.priority = 10;
    pending.put(urgent, start);
    assert_eq!(
        &*pending.take(start).unwrap().uid,
        "urgent",
        "priority first"
    );
    let low = pending.take(start).unwrap();
    assert!(pending.take(start).is_none());
    let by_room = Blocked { by_room: true };
    pending.file_unschedulable(&low.uid, by_room, start);
    pending.wake(Wake::Room, start + second / 2);
    assert!(
        pending.take(start + second / 2).is_none(),
        "the back-off of 1 s is not over"
    );
    assert_eq!(pending.next_due(), Some(start + second));
    assert!(pending.take(start + second).is_some());
    // Blocked by something that room does not help with.
    pending.file_unschedulable(&low.uid, Blocked::default(), start + second);
    pending.wake(Wake::Room, start + 100 * second);
    assert!(pending.take(start + 100 * second).is_none());
    pending.wake(Wake::Node, start + 100 * second);
    assert!(pending.take(start + 100 * second).is_some());
    pending.file_unschedulable(&low.uid, Blocked::default(), start + 100 * second);
    assert!(
        pending.take(start + 400 * second).is_some(),
        "after 5 minutes in any case"
    );
    for _ in 0..10 {
        pending.file_refused(&low.uid, start);
        let due = pending.next_due().unwrap();
        assert!(due <= start + 10 * second, "the back-off ends at 10 s");
        assert!(pending.take(due).is_some());
    }
    pending.remove(&low.uid);
    pending.remove("urgent");
    assert!(pending.waiting().is_empty() && pending.next_due().is_none());
}
