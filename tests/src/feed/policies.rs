//! A NetworkPolicy's way from the API to a node's tables.

use gantry_agent::policy::compile::Ruling;
use gantry_agent::policy::prefix::Prefix;
use gantry_agent::policy::{Limits, LocalPod, compile};
use gantry_api::k8s_openapi::api::core::v1::Namespace;

use super::*;

/// What the node's tables would be: every pod of the node is `id` 1, 2, ... by its name.
fn tables(view: &View) -> gantry_agent::policy::compile::Wanted {
    let mut pods: Vec<&Arc<Pod>> = view.pods.values().collect();
    pods.sort_by_key(|pod| pod.metadata.name.clone());
    let local = (1..).zip(pods).map(|(id, pod)| LocalPod {
        id,
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        name: pod.metadata.name.clone().unwrap_or_default(),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        ports: Vec::new(),
    });
    let local: Vec<LocalPod> = local.collect();
    let limits = Limits {
        peers: 1_000,
        rules: 1_000,
    };
    let (wanted, stuck) = compile(&local, &view.policies, &view.peers, limits);
    assert!(stuck.is_empty());
    wanted
}

fn host(address: &str) -> Prefix {
    Prefix::from(address.parse::<std::net::IpAddr>().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_reaches_the_node_with_the_addresses_of_its_peers() {
    let (store, lib) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(store.path(), "127.0.0.1:0").await;
    let agent = Agent::start(&control.url(), "n1", lib.path());
    agent.live().await;
    let peer = control.create_pod("peer", "n1").await;
    control.create_pod("web", "n1").await;
    let status = |address: &str| PodStatus {
        phase: Some("Running".into()),
        pod_ip: Some(address.into()),
        ..Default::default()
    };
    let report = |address: &str| {
        let reporter = &agent.handle.reporter;
        reporter.status(&peer, "default", "peer", &status(address), false, false);
    };
    report("10.244.7.9");
    let policy: NetworkPolicy = serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "default"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [
            {"podSelector": {"matchLabels": {"app": "web"}},
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "default"}}},
            {"ipBlock": {"cidr": "192.0.2.0/24"}}]}]}}))
    .unwrap();
    control.registry.create(&policy).await.unwrap();
    let has = |address: &'static str| {
        move |view: &View| {
            tables(view)
                .peers
                .contains_key(&host(address))
                .then_some(())
        }
    };
    agent
        .until("the peer's address is there", has("10.244.7.9"))
        .await;
    let wanted = tables(&agent.view());
    assert_eq!(wanted.peers.len(), 2, "{wanted:?}");
    let rulings: Vec<_> = wanted.endpoints.values().collect();
    assert_eq!(rulings.len(), 2);
    for ruling in rulings {
        assert!(matches!(ruling.ingress, Ruling::Rules(_)), "{ruling:?}");
        assert_eq!(ruling.egress, Ruling::Open);
    }

    report("10.244.7.10");
    agent
        .until("its new address is there", has("10.244.7.10"))
        .await;
    let gone = |view: &View| (!tables(view).peers.contains_key(&host("10.244.7.9"))).then_some(());
    agent.until("its old address has gone", gone).await;

    // The label that the policy asks for is the namespace's own: another selector has no members.
    let mut other = policy.clone();
    let spec = other.spec.as_mut().unwrap();
    let from = spec.ingress.as_mut().unwrap()[0].from.as_mut().unwrap();
    from[0].namespace_selector =
        Some(serde_json::from_value(json!({"matchLabels": {"team": "a"}})).unwrap());
    control.registry.update(&other).await.unwrap();
    let alone = |view: &View| view.peers.is_empty().then_some(());
    agent.until("no namespace is of team a", alone).await;
    let mut namespace = control
        .registry
        .get::<Namespace>("", "default")
        .unwrap()
        .unwrap();
    namespace
        .metadata
        .labels
        .get_or_insert_default()
        .insert("team".into(), "a".into());
    control.registry.update(&namespace).await.unwrap();
    agent
        .until("the namespace is of team a", has("10.244.7.10"))
        .await;

    control
        .registry
        .delete::<NetworkPolicy>("default", "p", &DeleteOptions::default())
        .await
        .unwrap();
    let nothing = |view: &View| (view.policies.is_empty() && view.peers.is_empty()).then_some(());
    agent.until("nothing is left of it", nothing).await;
    assert_eq!(agent.handle.reporter.counters().digest_mismatches, 0);
    agent.stop().await;
    control.stop().await;
}
