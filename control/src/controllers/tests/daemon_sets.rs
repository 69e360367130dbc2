//! DaemonSets: a pod on every node.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_set_is_on_every_node() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: DaemonSet = cluster
        .create(json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": {"name": "d", "namespace": "default"},
            "spec": {"selector": {"matchLabels": {"app": "d"}}, "template": template("d")},
        }))
        .await;
    let on_nodes = || {
        let pods = cluster.list::<Pod>("default").into_iter();
        let own = pods.filter(|pod| super::controller_key::<DaemonSet, Pod>(pod).is_some());
        let mut nodes: Vec<String> = own
            .filter(pods::is_ready)
            .filter_map(|pod| pods::node(&pod).map(str::to_owned))
            .collect();
        nodes.sort();
        nodes
    };
    eventually("on the first node", || on_nodes() == ["n1"]).await;
    cluster.node("n2", "4").await;
    eventually("on the new node", || on_nodes() == ["n1", "n2"]).await;
    eventually("counted", || {
        let set: DaemonSet = cluster.get("default", "d").unwrap();
        set.status
            .is_some_and(|status| status.desired_number_scheduled == 2)
    })
    .await;
    cluster
        .change("default", "d", |d: &mut DaemonSet| {
            let spec = d.spec.as_mut().unwrap();
            spec.template.spec.as_mut().unwrap().containers[0].image = Some("b:1".to_owned());
        })
        .await;
    eventually("rolled out", || {
        let set: DaemonSet = cluster.get("default", "d").unwrap();
        let generation = set.metadata.generation;
        set.status.is_some_and(|status| {
            status.observed_generation == generation
                && status.updated_number_scheduled == Some(2)
                && status.number_available == Some(2)
        })
    })
    .await;
}
