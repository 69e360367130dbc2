//! Pods that wait for a node, get one, or have to leave it.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_wait_with_a_reason_and_follow_their_nodes() {
    let cluster = Cluster::start().await;
    cluster.node("small", "1").await;
    let _: Pod = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "big", "namespace": "default", "labels": {"app": "big"}},
            "spec": {"containers": [{
                "name": "c", "image": "i", "resources": {"requests": {"cpu": "2"}},
            }]},
        }))
        .await;
    let wanted = "0/1 nodes are available: 1 Insufficient cpu.";
    eventually("the reason is told", || {
        cluster
            .events("FailedScheduling")
            .iter()
            .any(|message| message == wanted)
            && cluster.get::<Pod>("default", "big").is_some_and(|pod| {
                pods::condition(&pod, "PodScheduled").is_some_and(|condition| {
                    condition.reason.as_deref() == Some("Unschedulable")
                        && condition.message.as_deref() == Some(wanted)
                })
            })
    })
    .await;
    cluster.node("large", "8").await;
    eventually("it gets the new node", || {
        let pod: Pod = cluster.get("default", "big").unwrap();
        pods::node(&pod) == Some("large")
    })
    .await;
    eventually("told", || {
        cluster.events("Scheduled") == ["Successfully assigned default/big to large"]
    })
    .await;
    cluster
        .delete::<Node>("", "large", Propagation::Background)
        .await;
    eventually("it goes with its node", || {
        cluster.get::<Pod>("default", "big").is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_important_pod_gets_the_room_of_a_lesser_one() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "1").await;
    let _: PriorityClass = cluster
        .create(json!({
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
            "metadata": {"name": "high"}, "value": 1000,
        }))
        .await;
    let pod = |name: &str, class: Option<&str>| {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"priorityClassName": class, "containers": [{"name": "c", "image": "a:1",
                "resources": {"requests": {"cpu": "800m"}}}]},
        })
    };
    let _: Pod = cluster.create(pod("lesser", None)).await;
    eventually("the first runs", || {
        cluster
            .get::<Pod>("default", "lesser")
            .is_some_and(|pod| pods::is_ready(&pod))
    })
    .await;
    let _: Pod = cluster.create(pod("important", Some("high"))).await;
    eventually("the second runs", || {
        cluster
            .get::<Pod>("default", "important")
            .is_some_and(|pod| pods::is_ready(&pod))
    })
    .await;
    assert!(cluster.get::<Pod>("default", "lesser").is_none());
    let told = cluster.events("Preempted");
    assert!(
        told.iter().any(|text| text.contains("default/important")),
        "{told:?}"
    );
}
