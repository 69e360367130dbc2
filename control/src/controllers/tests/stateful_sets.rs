//! StatefulSets: names and an order.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stateful_sets_pods_have_names_and_an_order() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: StatefulSet = cluster
        .create(json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet",
            "metadata": {"name": "s", "namespace": "default"},
            "spec": {"replicas": 2, "serviceName": "s",
                "selector": {"matchLabels": {"app": "s"}}, "template": template("s")},
        }))
        .await;
    let serves = |name: &str| {
        let pod: Option<Pod> = cluster.get("default", name);
        pod.is_some_and(|pod| pods::is_ready(&pod) && !pods::is_terminating(&pod))
    };
    eventually("both serve", || {
        assert!(!serves("s-1") || serves("s-0"), "s-1 before s-0");
        serves("s-0") && serves("s-1")
    })
    .await;
    let done = |image: &str| {
        let set: StatefulSet = cluster.get("default", "s").unwrap();
        let status = set.status.unwrap();
        let pods: Vec<Pod> = cluster.list("default");
        let new = pods
            .iter()
            .all(|pod| pod.spec.as_ref().unwrap().containers[0].image.as_deref() == Some(image));
        new && status.current_revision == status.update_revision && status.ready_replicas == Some(2)
    };
    cluster
        .change("default", "s", |s: &mut StatefulSet| {
            let spec = s.spec.as_mut().unwrap();
            spec.template.spec.as_mut().unwrap().containers[0].image = Some("b:1".to_owned());
        })
        .await;
    eventually("rolled out", || done("b:1")).await;
    cluster
        .delete::<StatefulSet>("default", "s", Propagation::Background)
        .await;
    eventually("the pods go", || cluster.list::<Pod>("default").is_empty()).await;
}
