//! Disruption budgets and evictions, over TLS.

use super::*;
use gantry_api::k8s_openapi::api::policy::v1::PodDisruptionBudget;

fn eviction(name: &str) -> WriteRequest {
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": {"name": name, "namespace": "default"}});
    WriteRequest {
        key: key("pods", "default", name),
        subresource: "eviction".to_owned(),
        ..write("pods", &eviction)
    }
}

/// A pod of a node, made ready.
async fn ready_pod(cluster: &Cluster, client: &mut Client, name: &str) {
    let pod = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": "a"}},
        "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "x:1"}]}});
    let made = created(client, "pods", &pod).await;
    let mut pod: Pod = serde_json::from_value(made).unwrap();
    let status = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
    pod.status = Some(serde_json::from_value(status).unwrap());
    pod.metadata.resource_version = None;
    cluster.registry().update_status(&pod).await.unwrap();
}

fn allowed(cluster: &Cluster) -> i32 {
    let budget: PodDisruptionBudget = cluster.registry().get("default", "b").unwrap().unwrap();
    let status = budget.status.unwrap_or_default();
    match status.observed_generation == budget.metadata.generation {
        true => status.disruptions_allowed.unwrap_or(0),
        false => -1,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_lets_as_many_go_as_it_has_room_for() {
    let cluster = Cluster::start_whole().await;
    let mut admin = cluster.admin().await;
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}});
    created(&mut admin, "nodes", &node).await;
    for i in 0..6 {
        ready_pod(&cluster, &mut admin, &format!("p{i}")).await;
    }
    let budget = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": {"name": "b", "namespace": "default"},
        "spec": {"minAvailable": 4, "selector": {"matchLabels": {"app": "a"}}}});
    created(&mut admin, "poddisruptionbudgets", &budget).await;
    eventually("two may go", || allowed(&cluster) == 2).await;

    // All at once: two go, the others are refused, in Kubernetes' words.
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..6 {
        let mut client = cluster.admin().await;
        tasks.spawn(async move {
            let evicted = client.create(eviction(&format!("p{i}"))).await;
            evicted.map_err(Status::from)
        });
    }
    let (mut gone, mut refused) = (0, Vec::new());
    while let Some(result) = tasks.join_next().await {
        match result.unwrap() {
            Ok(_) => gone += 1,
            Err(status) => refused.push(status),
        }
    }
    assert_eq!(gone, 2, "{refused:?}");
    for status in &refused {
        assert_eq!(
            (status.code, status.reason),
            (429, Reason::TooManyRequests),
            "{status}"
        );
        assert_eq!(
            status.message,
            "Cannot evict pod as it would violate the pod's disruption budget."
        );
    }
    let why = refused
        .last()
        .map(|status| status.details.causes[0].message.clone())
        .unwrap();
    assert!(
        why.starts_with("The disruption budget b needs 4 healthy pods and has "),
        "{why}"
    );
    let leaving: Vec<Pod> = cluster.registry().list(Some("default")).unwrap().1;
    let leaving = leaving
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_some());
    for pod in leaving.clone() {
        let conditions = pod.status.clone().unwrap().conditions.unwrap();
        let target = conditions
            .iter()
            .find(|c| c.type_ == "DisruptionTarget")
            .unwrap();
        assert_eq!(target.reason.as_deref(), Some("EvictionByEvictionAPI"));
    }
    assert_eq!(leaving.count(), 2);
    eventually("counted", || allowed(&cluster) == 0).await;

    // What does not serve may go, and an absent pod is not found.
    let pending = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "pending", "namespace": "default", "labels": {"app": "a"}},
        "spec": {"schedulerName": "none", "containers": [{"name": "c", "image": "x:1"}]}});
    created(&mut admin, "pods", &pending).await;
    admin.create(eviction("pending")).await.unwrap();
    assert_eq!(
        status(admin.create(eviction("nobody")).await).reason,
        Reason::NotFound
    );

    // One more becomes ready: one more may go.
    ready_pod(&cluster, &mut admin, "p6").await;
    eventually("room again", || allowed(&cluster) == 1).await;
    let list = ListRequest {
        key: key("poddisruptionbudgets", "default", ""),
        ..ListRequest::default()
    };
    let table = admin.table(list).await.unwrap().into_inner();
    assert_eq!(table.rows[0].cells[..4], ["b", "4", "N/A", "1"]);
    admin.create(eviction("p6")).await.unwrap();
    let both = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": {"name": "w", "namespace": "default"},
        "spec": {"minAvailable": 1, "maxUnavailable": 1}});
    let refused = status(admin.create(write("poddisruptionbudgets", &both)).await);
    assert!(refused.message.contains("cannot be both set"), "{refused}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_eviction_is_a_right_of_its_own() {
    let cluster = Cluster::start().await;
    let credentials = cluster.authority().client("jane", "dev", 1).unwrap();
    let mut jane = cluster.connect(Some(&credentials)).await;
    let refused = status(jane.create(eviction("p")).await);
    assert_eq!(refused.reason, Reason::Forbidden);
    assert!(
        refused
            .message
            .contains("cannot create resource \"pods/eviction\""),
        "{refused}"
    );
    let wrong = WriteRequest {
        key: key("configmaps", "default", "c"),
        ..eviction("c")
    };
    let mut admin = cluster.admin().await;
    let refused = status(admin.create(wrong).await);
    assert_eq!(refused.reason, Reason::MethodNotAllowed, "{refused}");
    cluster.stop().await;
}
