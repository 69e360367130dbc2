//! Jobs whose pods do not come to their end in peace.

use super::*;

/// A Job of one pod that runs on.
fn endless(spec: serde_json::Value) -> serde_json::Value {
    let mut job = json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {"name": "j", "namespace": "default"},
        "spec": {"template": {
            "metadata": {"labels": {RUNS_ON: ""}},
            "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "a:1",
                "resources": {"requests": {"cpu": "800m"}}}]},
        }},
    });
    for (field, value) in spec.as_object().unwrap() {
        job["spec"][field] = value.clone();
    }
    job
}

fn running_on(cluster: &Cluster, node: &str) -> Option<Pod> {
    let mut pods = cluster.list::<Pod>("default").into_iter();
    pods.find(|pod| pods::is_ready(pod) && pods::node(pod) == Some(node))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_whose_node_is_gone_is_replaced_also_where_its_end_is_waited_for() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "1").await;
    let _: Job = cluster
        .create(endless(json!({"podReplacementPolicy": "Failed"})))
        .await;
    eventually("it runs", || running_on(&cluster, "n1").is_some()).await;
    let first = running_on(&cluster, "n1").unwrap().metadata.uid;
    cluster.node("n2", "1").await;
    cluster
        .delete::<Node>("", "n1", Propagation::Background)
        .await;
    eventually("the failure counts", || {
        let job: Job = cluster.get("default", "j").unwrap();
        job.status.is_some_and(|status| status.failed == Some(1))
    })
    .await;
    eventually("the lost pod is gone", || {
        let pods: Vec<Pod> = cluster.list("default");
        pods.iter().all(|pod| pod.metadata.uid != first)
    })
    .await;
    eventually("its replacement runs", || {
        running_on(&cluster, "n2").is_some()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_victim_of_a_preemption_says_so_while_it_ends() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "1").await;
    let _: PriorityClass = cluster
        .create(json!({
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
            "metadata": {"name": "high"}, "value": 1000,
        }))
        .await;
    // What the Job's pod looked like at last: a finalizer of ours keeps it.
    let mut job = endless(json!({}));
    job["spec"]["template"]["metadata"]["finalizers"] = json!(["example.com/keep"]);
    let _: Job = cluster.create(job).await;
    eventually("it runs", || running_on(&cluster, "n1").is_some()).await;
    let victim = running_on(&cluster, "n1").unwrap().metadata.name.unwrap();
    let _: Pod = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "important", "namespace": "default"},
            "spec": {"priorityClassName": "high", "containers": [{"name": "c", "image": "a:1",
                "resources": {"requests": {"cpu": "800m"}}}]},
        }))
        .await;
    eventually("the victim is told why", || {
        let pod: Pod = cluster.get("default", &victim).unwrap();
        let condition = pods::condition(&pod, "DisruptionTarget");
        pods::is_terminating(&pod)
            && condition.is_some_and(|c| c.reason.as_deref() == Some("PreemptionByScheduler"))
    })
    .await;
}
