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
    let by_room = Blocked::ROOM;
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

fn labelled(name: &str, app: &str, extra: serde_json::Value) -> PodRequest {
    let mut spec = json!({"containers": [{"name": "c"}]});
    spec.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default", "uid": name, "labels": {"app": app}},
        "spec": spec,
    }))
    .unwrap();
    PodRequest::of(&pod).unwrap()
}

fn zoned(name: &str, zone: &str) -> Node {
    let mut node = node(name, "16");
    let labels = node.metadata.labels.get_or_insert_default();
    labels.insert("zone".to_owned(), zone.to_owned());
    node
}

/// The third of three replicas waits on two nodes, and says why.
#[test]
fn required_anti_affinity_keeps_replicas_apart_both_ways() {
    let mut nodes = cluster(&[node("a", "16"), node("b", "16")]);
    let apart = json!({"affinity": {"podAntiAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [{
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchLabels": {"app": "web"}}}]}}});
    for index in 0..2 {
        let pod = labelled(&format!("web-{index}"), "web", apart.clone());
        let name = chosen(&nodes, &pod).unwrap();
        nodes.assume(Arc::new(pod), &name);
    }
    assert_eq!(
        chosen(&nodes, &labelled("web-2", "web", apart)).unwrap_err(),
        "0/2 nodes are available: 2 node(s) didn't match pod anti-affinity rules."
    );
    // A pod without rules of its own is kept away by those that run.
    assert_eq!(
        chosen(&nodes, &labelled("plain", "web", json!({}))).unwrap_err(),
        "0/2 nodes are available: 2 node(s) didn't satisfy existing pods anti-affinity rules."
    );
    assert!(chosen(&nodes, &labelled("other", "db", json!({}))).is_ok());
}

#[test]
fn affinity_follows_its_peer_and_the_first_of_a_kind_may_start() {
    let mut nodes = cluster(&[zoned("a", "x"), zoned("b", "y")]);
    let near = |app: &str| {
        json!({"affinity": {"podAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [{
            "topologyKey": "zone", "labelSelector": {"matchLabels": {"app": app}}}]}}})
    };
    let lonely = chosen(&nodes, &labelled("p", "web", near("db"))).unwrap_err();
    assert!(
        lonely.contains("didn't match pod affinity rules"),
        "{lonely}"
    );
    assert!(chosen(&nodes, &labelled("first", "web", near("web"))).is_ok());
    nodes.assume(Arc::new(labelled("db", "db", json!({}))), "b");
    assert_eq!(
        chosen(&nodes, &labelled("p", "web", near("db"))),
        Ok("b".to_owned())
    );
}

#[test]
fn preferences_decide_between_nodes_that_fit() {
    let mut nodes = cluster(&[zoned("a", "x"), zoned("b", "y")]);
    let preferred = json!({"affinity": {"nodeAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": {
            "matchExpressions": [{"key": "zone", "operator": "In", "values": ["y"]}]}}]}}});
    assert_eq!(
        chosen(&nodes, &labelled("p", "web", preferred)),
        Ok("b".to_owned())
    );
    nodes.assume(Arc::new(labelled("noisy", "noisy", json!({}))), "b");
    nodes.assume(Arc::new(labelled("busy", "x", json!({}))), "a");
    let away = json!({"affinity": {"podAntiAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": {
            "topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "noisy"}}}}]}}});
    assert_eq!(
        chosen(&nodes, &labelled("p", "web", away)),
        Ok("a".to_owned())
    );
}

#[test]
fn a_node_that_is_short_takes_no_pod_that_would_go_next() {
    let mut short = serde_json::to_value(node("a", "4")).unwrap();
    let conditions = short["status"]["conditions"].as_array_mut().unwrap();
    conditions.push(json!({"type": "MemoryPressure", "status": "True"}));
    let mut nodes = cluster(&[serde_json::from_value(short.clone()).unwrap()]);
    let best_effort = request("b", json!({"containers": [{"name": "c"}]}));
    let refused = chosen(&nodes, &best_effort).unwrap_err();
    assert!(
        refused.contains("untolerated taint {node.kubernetes.io/memory-pressure: }"),
        "{refused}"
    );
    // What asks for something is not evicted first, and a toleration is a decision of the user's.
    assert_eq!(chosen(&nodes, &wants_cpu("g", "1")).unwrap(), "a");
    let tolerant = json!({"containers": [{"name": "c"}], "tolerations": [
        {"key": "node.kubernetes.io/memory-pressure", "operator": "Exists"}]});
    assert_eq!(chosen(&nodes, &request("t", tolerant)).unwrap(), "a");
    for type_ in ["DiskPressure", "PIDPressure"] {
        short["status"]["conditions"][1]["type"] = json!(type_);
        nodes.put(&serde_json::from_value(short.clone()).unwrap());
        assert!(chosen(&nodes, &wants_cpu("g", "1")).is_err(), "{type_}");
    }
    // Over, or not known any more: pods come again.
    for status in ["False", "Unknown"] {
        short["status"]["conditions"][1]["status"] = json!(status);
        nodes.put(&serde_json::from_value(short.clone()).unwrap());
        assert_eq!(chosen(&nodes, &best_effort).unwrap(), "a");
    }
}

#[test]
fn spread_never_exceeds_its_skew() {
    let all = [zoned("a", "x"), zoned("b", "x"), zoned("c", "y")];
    let mut nodes = cluster(&all);
    let spread = json!({"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone",
        "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {"matchLabels": {"app": "web"}}}]});
    let mut per_zone = BTreeMap::from([("x", 0_i64), ("y", 0)]);
    for index in 0..8 {
        let pod = labelled(&format!("w{index}"), "web", spread.clone());
        let name = chosen(&nodes, &pod).unwrap();
        *per_zone
            .get_mut(if name == "c" { "y" } else { "x" })
            .unwrap() += 1;
        assert!((per_zone["x"] - per_zone["y"]).abs() <= 1, "{per_zone:?}");
        nodes.assume(Arc::new(pod), &name);
    }
    let unlabelled = cluster(&[node("d", "16")]);
    let refused = chosen(&unlabelled, &labelled("p", "web", spread)).unwrap_err();
    assert!(refused.contains("missing required label"), "{refused}");
}

proptest::proptest! {
    /// Victims have lower priorities, all of them are needed, and without them the pod fits.
    #[test]
    fn preemption_takes_no_more_than_needed(
        placed in proptest::collection::vec((0_usize..3, 0_i32..5, 1_u32..5), 0..14),
        priority in 0_i32..6, wanted in 1_u32..8,
    ) {
        let mut nodes = cluster(&[node("n0", "8"), node("n1", "8"), node("n2", "8")]);
        for (index, (at, own, cpu)) in placed.iter().enumerate() {
            let mut pod = wants_cpu(&format!("p{index}"), &cpu.to_string());
            pod.priority = *own;
            nodes.assume(Arc::new(pod), &format!("n{at}"));
        }
        let mut pod = wants_cpu("important", &wanted.to_string());
        pod.priority = priority;
        proptest::prop_assume!(chosen(&nodes, &pod).is_err());
        let fits_without = |gone: &[Arc<PodRequest>], node: &str| {
            let mut state = nodes.states().iter().find(|n| *n.name == *node).unwrap().clone();
            gone.iter().for_each(|victim| state.subtract(victim));
            filter::check(&state, &pod).is_ok()
        };
        match super::preempt::choose(nodes.states(), &pod, &[]) {
            Some(found) => {
                proptest::prop_assert!(found.victims.iter().all(|v| v.priority < priority));
                proptest::prop_assert!(fits_without(&found.victims, &found.node));
                for kept in 0..found.victims.len() {
                    let mut fewer = found.victims.clone();
                    fewer.remove(kept);
                    proptest::prop_assert!(!fits_without(&fewer, &found.node));
                }
            }
            None => for state in nodes.states() {
                let lower: Vec<_> = state.pods.iter().filter(|p| p.priority < priority).cloned().collect();
                proptest::prop_assert!(!fits_without(&lower, &state.name));
            },
        }
        pod.never_preempts = true;
        proptest::prop_assert!(super::preempt::choose(nodes.states(), &pod, &[]).is_none());
    }
}

#[test]
fn pods_without_a_budget_go_first_and_a_node_with_them_wins() {
    let pod = |name: &str, app: &str, priority: i32| {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "default", "uid": name, "labels": {"app": app}},
            "spec": {"priority": priority, "containers": [{"name": "c",
                "resources": {"requests": {"cpu": "1"}}}]}}))
        .unwrap();
        PodRequest::of(&pod).unwrap()
    };
    let budget = |allowed: i32| {
        let budget =
            serde_json::from_value(json!({"metadata": {"name": "b", "namespace": "default"},
            "spec": {"selector": {"matchLabels": {"app": "db"}}},
            "status": {"disruptionsAllowed": allowed, "currentHealthy": 1, "desiredHealthy": 1,
                "expectedPods": 1}}))
            .unwrap();
        [super::preempt::Budget::of(&budget).unwrap()]
    };
    let important = pod("important", "x", 100);
    // On one node: the one without a budget, although it matters more.
    let mut nodes = cluster(&[node("n1", "2")]);
    nodes.assume(Arc::new(pod("db", "db", 0)), "n1");
    nodes.assume(Arc::new(pod("web", "web", 10)), "n1");
    let victims = |nodes: &Nodes, allowed: i32| -> Vec<String> {
        let choice = super::preempt::choose(nodes.states(), &important, &budget(allowed)).unwrap();
        choice.victims.iter().map(|v| v.uid.to_string()).collect()
    };
    assert_eq!(victims(&nodes, 0), ["web"]);
    assert_eq!(victims(&nodes, 1), ["db"]);
    // Of two nodes: the one without a protected victim.
    let mut nodes = cluster(&[node("n1", "1"), node("n2", "1")]);
    nodes.assume(Arc::new(pod("db", "db", 0)), "n1");
    nodes.assume(Arc::new(pod("web", "web", 10)), "n2");
    assert_eq!(victims(&nodes, 0), ["web"]);
    assert_eq!(victims(&nodes, 1), ["db"]);
    // Where nothing else helps, the budget is overruled.
    let mut nodes = cluster(&[node("n1", "1")]);
    nodes.assume(Arc::new(pod("db", "db", 0)), "n1");
    assert_eq!(victims(&nodes, 0), ["db"]);
}
