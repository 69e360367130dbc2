//! What goes with its owner or its namespace, and what stays.

use super::deployments::is_rolled_out;
use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreground_and_orphan_deletions_keep_their_promise() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: Deployment = cluster.create(deployment(2, "a")).await;
    eventually("rollout", || is_rolled_out(&cluster, 2)).await;
    cluster
        .delete::<Deployment>("default", "web", Propagation::Orphan)
        .await;
    eventually("the deployment goes alone", || {
        cluster.get::<Deployment>("default", "web").is_none()
    })
    .await;
    let sets: Vec<ReplicaSet> = cluster.list("default");
    assert_eq!(sets.len(), 1);
    assert_eq!(pods::controller_of(&sets[0].metadata), None);
    assert_eq!(cluster.list::<Pod>("default").len(), 2);
    // The same deployment again adopts the orphan and changes nothing.
    let before: Vec<_> = cluster
        .list::<Pod>("default")
        .into_iter()
        .map(|p| p.metadata.uid)
        .collect();
    let _: Deployment = cluster.create(deployment(2, "a")).await;
    eventually("adopted", || is_rolled_out(&cluster, 2)).await;
    let after: Vec<_> = cluster
        .list::<Pod>("default")
        .into_iter()
        .map(|p| p.metadata.uid)
        .collect();
    assert_eq!(before, after);
    cluster
        .delete::<Deployment>("default", "web", Propagation::Foreground)
        .await;
    eventually("all gone", || {
        cluster.get::<Deployment>("default", "web").is_none()
    })
    .await;
    assert!(
        cluster.list::<ReplicaSet>("default").is_empty(),
        "dependents go first"
    );
    assert!(
        cluster.list::<Pod>("default").is_empty(),
        "dependents go first"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_takes_its_contents_along() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: Namespace = cluster
        .create(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}))
        .await;
    let mut object = deployment(2, "a");
    object["metadata"]["namespace"] = json!("shop");
    let _: Deployment = cluster.create(object).await;
    let _: ConfigMap = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "held", "namespace": "shop", "finalizers": ["example.com/hold"]},
        }))
        .await;
    eventually("pods run", || {
        cluster
            .list::<Pod>("shop")
            .iter()
            .filter(|pod| pods::is_ready(pod))
            .count()
            == 2
    })
    .await;
    cluster
        .delete::<Namespace>("", "shop", Propagation::Background)
        .await;
    eventually("pods go", || cluster.list::<Pod>("shop").is_empty()).await;
    eventually("the finalizer is named", || {
        let namespace: Namespace = cluster.get("", "shop").unwrap();
        let conditions = namespace
            .status
            .and_then(|status| status.conditions)
            .unwrap_or_default();
        let text = "example.com/hold in 1 resource instances";
        conditions
            .iter()
            .any(|c| c.message.as_deref().unwrap_or_default().contains(text))
    })
    .await;
    cluster
        .change("shop", "held", |map: &mut ConfigMap| {
            map.metadata.finalizers = None
        })
        .await;
    eventually("the namespace goes", || {
        cluster.get::<Namespace>("", "shop").is_none()
    })
    .await;
}
