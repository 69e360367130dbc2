//! Services of type LoadBalancer, from creation to the address that the next one gets.

use super::*;

impl Cluster {
    async fn service(&self, name: &str, spec: serde_json::Value) -> Service {
        let metadata = json!({"name": name, "namespace": "default"});
        self.create(
            json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}),
        )
        .await
    }

    fn balancer_ips(&self, name: &str) -> Vec<String> {
        let service: Option<Service> = self.get("default", name);
        let status = service.and_then(|service| service.status?.load_balancer?.ingress);
        status.into_iter().flatten().filter_map(|i| i.ip).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_goes_from_one_service_to_the_next() {
    let range = "192.0.2.7-192.0.2.7".parse().unwrap();
    let cluster = Cluster::start_with(Settings {
        load_balancer_pool: AddressPool::new(vec![range]),
        ..Settings::default()
    })
    .await;
    let balancer = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local",
        "ports": [{"port": 80}]});
    let first = cluster
        .service("first", balancer.clone())
        .await
        .spec
        .unwrap();
    let check = first.health_check_node_port.unwrap();
    let node_port = first.ports.unwrap()[0].node_port.unwrap();
    assert!(check != 0 && node_port != 0 && check != node_port);
    let has = |name: &str| cluster.balancer_ips(name) == ["192.0.2.7"];
    eventually("the first has the address", || has("first")).await;
    cluster.service("second", balancer).await;
    let waits = |event: &String| event.contains("every one is taken");
    eventually("the second is told why it waits", || {
        cluster.events("NoAddress").iter().any(waits)
    })
    .await;
    cluster
        .change::<Service>("default", "first", |service| {
            service.spec.as_mut().unwrap().type_ = Some("ClusterIP".to_owned());
        })
        .await;
    eventually("the second has the address", || has("second")).await;
    assert!(cluster.balancer_ips("first").is_empty());
    let spec = cluster
        .get::<Service>("default", "first")
        .unwrap()
        .spec
        .unwrap();
    assert_eq!(spec.health_check_node_port, None);
    assert_eq!(spec.ports.unwrap()[0].node_port, None);
    cluster
        .delete::<Service>("default", "second", Propagation::Background)
        .await;
    let again = json!({"type": "LoadBalancer", "ports": [{"port": 80}]});
    cluster.service("third", again).await;
    eventually("the third has the address", || has("third")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_pool_services_stay_pending_and_are_told_what_to_do() {
    let cluster = Cluster::start().await;
    let spec = json!({"type": "LoadBalancer", "ports": [{"port": 80}]});
    cluster.service("web", spec).await;
    eventually("the event", || {
        let events = cluster.events("NoAddress");
        events
            .iter()
            .any(|event| event.contains("--load-balancer-pool"))
    })
    .await;
    assert!(cluster.balancer_ips("web").is_empty());
}
