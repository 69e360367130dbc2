//! Jobs, and what becomes of pods that do not come to their end in peace.

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

/// The Job's pods, by index.
fn pods_of(cluster: &Cluster) -> std::collections::BTreeMap<String, Pod> {
    let pods = cluster.list::<Pod>("default").into_iter();
    pods.filter(pods::is_active)
        .filter_map(|pod| {
            let index = "batch.kubernetes.io/job-completion-index";
            let index = pod.metadata.annotations.as_ref()?.get(index)?.clone();
            Some((index, pod))
        })
        .collect()
}

/// Ends a pod as an agent would, with this exit code.
async fn end(cluster: &Cluster, pod: &Pod, code: i32) {
    let name = pod.metadata.name.as_deref().unwrap();
    // Else the agent would say so afterwards, and it would never end.
    eventually("the pod runs", || {
        let pod: Pod = cluster.get("default", name).unwrap();
        pod.status.unwrap_or_default().phase.as_deref() == Some("Running")
    })
    .await;
    loop {
        let mut pod: Pod = cluster.get("default", name).unwrap();
        let status = pod.status.get_or_insert_default();
        let phase = if code == 0 { "Succeeded" } else { "Failed" };
        status.phase = Some(phase.to_owned());
        status.container_statuses = serde_json::from_value(json!([{
            "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": code, "finishedAt": "2026-01-01T00:00:00Z"}},
        }]))
        .unwrap();
        match cluster.registry.update_status(&pod).await {
            Ok(_) => return,
            Err(status) => assert_eq!(status.reason, Reason::Conflict, "{status}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn indexes_fail_for_themselves_and_the_lost_pod_is_no_failure() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: Job = cluster
        .create(endless(json!({
            "completions": 3, "parallelism": 3, "completionMode": "Indexed",
            "backoffLimitPerIndex": 1, "podFailurePolicy": {"rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
                {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [42]}}]},
        })))
        .await;
    eventually("all run", || pods_of(&cluster).len() == 3).await;
    let pods = pods_of(&cluster);
    end(&cluster, &pods["0"], 42).await;
    end(&cluster, &pods["1"], 1).await;
    end(&cluster, &pods["2"], 0).await;
    let failures = |pod: &Pod| {
        let annotations = pod.metadata.annotations.clone().unwrap();
        annotations["batch.kubernetes.io/job-index-failure-count"].clone()
    };
    eventually("index 1 is tried again", || {
        pods_of(&cluster)
            .get("1")
            .is_some_and(|pod| failures(pod) == "1")
    })
    .await;
    let status = || {
        let job: Job = cluster.get("default", "j").unwrap();
        job.status.unwrap()
    };
    eventually("index 0 is given up", || {
        let status = status();
        status.failed_indexes.as_deref() == Some("0") && status.failed == Some(2)
    })
    .await;
    // Its node goes: that is nobody's failure, so it has its second try still.
    cluster.node("n2", "4").await;
    cluster
        .delete::<Node>("", "n1", Propagation::Background)
        .await;
    eventually("it is tried on another node", || {
        let pods = pods_of(&cluster);
        let pod = pods.get("1");
        pod.is_some_and(|pod| pods::node(pod) == Some("n2") && failures(pod) == "1")
    })
    .await;
    assert_eq!(status().failed, Some(2));
    end(&cluster, &pods_of(&cluster)["1"], 0).await;
    eventually("the Job has failed", || {
        let conditions = status().conditions.unwrap_or_default();
        let failed = conditions.iter().find(|c| c.type_ == "Failed");
        failed.is_some_and(|failed| failed.reason.as_deref() == Some("FailedIndexes"))
    })
    .await;
    let status = status();
    assert_eq!(status.completed_indexes.as_deref(), Some("1,2"));
    assert_eq!((status.failed, status.succeeded), (Some(2), Some(2)));
    let pods: Vec<Pod> = cluster.list("default");
    let is_free = |pod: &Pod| pod.metadata.finalizers.as_ref().is_none_or(Vec::is_empty);
    assert!(pods.iter().all(is_free), "no finalizer is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_counts_its_ends_once() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: Job = cluster
        .create(json!({
            "apiVersion": "batch/v1", "kind": "Job",
            "metadata": {"name": "j", "namespace": "default"},
            "spec": {"completions": 5, "parallelism": 2, "completionMode": "Indexed",
                "template": {"spec": {"restartPolicy": "Never",
                    "containers": [{"name": "c", "image": "a:1"}]}}},
        }))
        .await;
    eventually("the Job is complete", || {
        let job: Job = cluster.get("default", "j").unwrap();
        job.status.is_some_and(|status| {
            status.completion_time.is_some()
                && status.succeeded == Some(5)
                && status.completed_indexes.as_deref() == Some("0-4")
        })
    })
    .await;
    let pods: Vec<Pod> = cluster.list("default");
    assert_eq!(pods.len(), 5, "no index ran twice");
    assert!(
        pods.iter()
            .all(|pod| pod.metadata.finalizers.as_ref().is_none_or(Vec::is_empty))
    );
}
