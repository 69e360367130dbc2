//! ReplicaSets and ReplicationControllers: pods that are kept, adopted and released.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_set_adopts_releases_and_repairs() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let bare = |name: &str| {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": {"type": "backend"}},
            "spec": {"containers": [{"name": "c", "image": "i"}]},
        })
    };
    let _: Pod = cluster.create(bare("first")).await;
    let _: ReplicaSet = cluster
        .create(json!({
            "apiVersion": "apps/v1", "kind": "ReplicaSet",
            "metadata": {"name": "backend", "namespace": "default"},
            "spec": {
                "replicas": 3,
                "selector": {"matchLabels": {"type": "backend"}},
                "template": {
                    "metadata": {"labels": {"type": "backend"}},
                    "spec": {"containers": [{"name": "c", "image": "i"}]},
                },
            },
        }))
        .await;
    let ready = |count: i32| {
        let set: ReplicaSet = cluster.get("default", "backend").unwrap();
        let status = set.status.unwrap_or_default();
        status.replicas == count
            && status.available_replicas == Some(count)
            && status.observed_generation == set.metadata.generation
    };
    eventually("three, one of them adopted", || ready(3)).await;
    assert_eq!(cluster.list::<Pod>("default").len(), 3);
    let first: Pod = cluster.get("default", "first").unwrap();
    assert_eq!(
        pods::controller_of(&first.metadata).unwrap().kind,
        "ReplicaSet"
    );
    cluster
        .change("default", "first", |pod: &mut Pod| {
            pod.metadata
                .labels
                .get_or_insert_default()
                .insert("type".into(), "other".into());
        })
        .await;
    eventually("released and replaced", || {
        cluster.list::<Pod>("default").len() == 4
    })
    .await;
    let first: Pod = cluster.get("default", "first").unwrap();
    eventually("released", || {
        let first: Pod = cluster.get("default", "first").unwrap();
        pods::controller_of(&first.metadata).is_none()
    })
    .await;
    assert!(pods::is_active(&first));
    // A pod deleted by hand is replaced.
    eventually("three again", || ready(3)).await;
    let victim = cluster
        .list::<Pod>("default")
        .into_iter()
        .find(|pod| pods::controller_of(&pod.metadata).is_some());
    let victim = ObjectKey::of(&victim.unwrap().metadata);
    cluster
        .delete::<Pod>(&victim.namespace, &victim.name, Propagation::Background)
        .await;
    eventually("replaced", || {
        cluster.get::<Pod>("default", &victim.name).is_none() && ready(3)
    })
    .await;
    // An owner that does not exist takes its dependents along.
    let mut orphan = bare("orphan");
    orphan["metadata"]["labels"] = json!({});
    orphan["metadata"]["ownerReferences"] = json!([
        {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "no-such-uid"}
    ]);
    let _: Pod = cluster.create(orphan).await;
    eventually("collected", || {
        cluster.get::<Pod>("default", "orphan").is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replication_controller_keeps_its_count() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: ReplicationController = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "ReplicationController",
            "metadata": {"name": "rc", "namespace": "default"},
            "spec": {"replicas": 2, "template": template("rc")},
        }))
        .await;
    let ready = || {
        let rc: ReplicationController = cluster.get("default", "rc").unwrap();
        rc.status.and_then(|status| status.ready_replicas)
    };
    eventually("two are ready", || ready() == Some(2)).await;
    let pods: Vec<Pod> = cluster.list("default");
    let owner = pods[0].metadata.owner_references.as_ref().unwrap();
    assert_eq!(owner[0].kind, "ReplicationController");
    let name = pods[0].metadata.name.clone().unwrap();
    cluster
        .delete::<Pod>("default", &name, Propagation::Background)
        .await;
    eventually("it was replaced", || {
        cluster.get::<Pod>("default", &name).is_none() && ready() == Some(2)
    })
    .await;
}
