//! Deployments: roll-out, roll-back, scaling.

use super::*;

fn set_image(deployment: &mut Deployment, image: &str) {
    let spec = deployment.spec.as_mut().unwrap();
    spec.template.spec.as_mut().unwrap().containers[0].image = Some(image.to_owned());
}

fn progress(cluster: &Cluster) -> Option<(i32, i32, i32, String)> {
    let deployment: Deployment = cluster.get("default", "web")?;
    let status = deployment.status?;
    if status.observed_generation != deployment.metadata.generation {
        return None;
    }
    let conditions = status.conditions.unwrap_or_default();
    let reason = conditions
        .into_iter()
        .find(|c| c.type_ == "Progressing")?
        .reason?;
    let count = |n: Option<i32>| n.unwrap_or(0);
    Some((
        count(status.replicas),
        count(status.updated_replicas),
        count(status.available_replicas),
        reason,
    ))
}

pub(super) fn is_rolled_out(cluster: &Cluster, replicas: i32) -> bool {
    let done = (
        replicas,
        replicas,
        replicas,
        "NewReplicaSetAvailable".to_owned(),
    );
    progress(cluster) == Some(done)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_rolls_out_scales_and_takes_everything_along() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    cluster.node("n2", "4").await;
    let _: Service = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]},
        }))
        .await;
    let _: Deployment = cluster.create(deployment(3, "a")).await;
    eventually("first rollout", || is_rolled_out(&cluster, 3)).await;
    eventually("endpoints", || cluster.endpoints("web").len() == 3).await;
    let slices: Vec<EndpointSlice> = cluster.list("default");
    assert_eq!(slices.len(), 1);
    assert_eq!(
        slices[0].ports.as_ref().unwrap()[0].port,
        Some(8080),
        "named port resolved"
    );
    let nodes: std::collections::BTreeSet<String> = cluster
        .list::<Pod>("default")
        .iter()
        .filter_map(|pod| pods::node(pod).map(str::to_owned))
        .collect();
    assert_eq!(nodes.len(), 2, "both nodes are used");
    for node in ["n1", "n2"] {
        eventually("pod CIDR", || {
            let node: Node = cluster.get("", node).unwrap();
            node.spec.and_then(|spec| spec.pod_cidr).is_some()
        })
        .await;
    }

    cluster
        .change("default", "web", |d: &mut Deployment| set_image(d, "b"))
        .await;
    // Until it is done, never fewer than 3 available pods and never more than 4 in all.
    let start = tokio::time::Instant::now();
    while !is_rolled_out(&cluster, 3) {
        let all: Vec<Pod> = cluster.list("default");
        let active: Vec<&Pod> = all.iter().filter(|pod| pods::is_active(pod)).collect();
        let ready = active.iter().filter(|pod| pods::is_ready(pod)).count();
        assert!(
            ready >= 3 && active.len() <= 4,
            "{ready} ready of {}",
            active.len()
        );
        assert!(start.elapsed() < PATIENCE, "{:?}", progress(&cluster));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let now: Deployment = cluster.get("default", "web").unwrap();
    let revision = now.metadata.annotations.unwrap()["deployment.kubernetes.io/revision"].clone();
    assert_eq!(revision, "2");
    assert_eq!(
        cluster.list::<ReplicaSet>("default").len(),
        2,
        "the old one stays for rollback"
    );

    let resize =
        |replicas| move |d: &mut Deployment| d.spec.as_mut().unwrap().replicas = Some(replicas);
    cluster.change("default", "web", resize(6)).await;
    eventually("scaled up", || is_rolled_out(&cluster, 6)).await;
    cluster.change("default", "web", resize(2)).await;
    eventually("scaled down", || is_rolled_out(&cluster, 2)).await;
    eventually("endpoints follow", || cluster.endpoints("web").len() == 2).await;
    let events = cluster.events("ScalingReplicaSet");
    assert!(
        events
            .iter()
            .any(|e| e.starts_with("Scaled up replica set web-")),
        "{events:?}"
    );
    assert!(
        events
            .iter()
            .any(|e| e.ends_with(" from 2 to 6") || e.ends_with(" from 3 to 6"))
    );

    cluster
        .change("default", "web", |d: &mut Deployment| set_image(d, "a"))
        .await;
    eventually("rolled back", || is_rolled_out(&cluster, 2)).await;
    let now: Deployment = cluster.get("default", "web").unwrap();
    let revision = now.metadata.annotations.unwrap()["deployment.kubernetes.io/revision"].clone();
    assert_eq!(revision, "3");
    assert_eq!(
        cluster.list::<ReplicaSet>("default").len(),
        2,
        "the first one was used again"
    );

    cluster
        .delete::<Deployment>("default", "web", Propagation::Background)
        .await;
    eventually("collected", || {
        cluster.list::<ReplicaSet>("default").is_empty()
            && cluster.list::<Pod>("default").is_empty()
    })
    .await;
    eventually("no endpoints", || cluster.endpoints("web").is_empty()).await;
    cluster
        .delete::<Service>("default", "web", Propagation::Background)
        .await;
    eventually("slices collected", || {
        cluster.list::<EndpointSlice>("default").is_empty()
    })
    .await;
}
