//! What a namespace may use, and what its pods may do, over TLS.

use super::*;
use gantry_api::k8s_openapi::api::core::v1::ResourceQuota;

async fn namespace(client: &mut Client, name: &str, labels: Value) {
    let space = json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": labels}});
    created(client, "namespaces", &space).await;
}

fn quota(namespace: &str, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ResourceQuota",
        "metadata": {"name": "q", "namespace": namespace}, "spec": spec})
}

fn pod(namespace: &str, name: &str, resources: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {"containers": [{"name": "c", "image": "x:1", "resources": resources}]}})
}

fn used(cluster: &Cluster, namespace: &str, resource: &str) -> String {
    let quota: ResourceQuota = cluster.registry().get(namespace, "q").unwrap().unwrap();
    let used = quota.status.unwrap().used.unwrap();
    used.get(resource).map(|q| q.0.clone()).unwrap_or_default()
}

async fn delete(client: &mut Client, plural: &str, namespace: &str, name: &str) {
    let request = DeleteRequest {
        key: key(plural, namespace, name),
        grace_period_s: Some(0),
        ..DeleteRequest::default()
    };
    client.delete(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_clients_at_once_do_not_overrun_a_quota() {
    let cluster = Cluster::start_whole().await;
    let mut admin = cluster.admin().await;
    namespace(&mut admin, "n", json!({})).await;
    let hard = json!({"hard": {"pods": "7", "requests.cpu": "650m", "count/configmaps": "20"}});
    created(&mut admin, "resourcequotas", &quota("n", hard)).await;
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..50 {
        let mut client = cluster.admin().await;
        tasks.spawn(async move {
            let resources = json!({"requests": {"cpu": "100m"}});
            let pod = pod("n", &format!("p{i}"), resources);
            client
                .create(write("pods", &pod))
                .await
                .map_err(Status::from)
        });
    }
    let mut refusals = Vec::new();
    let mut taken = 0;
    while let Some(result) = tasks.join_next().await {
        match result.unwrap() {
            Ok(_) => taken += 1,
            Err(status) => refusals.push(status),
        }
    }
    assert_eq!(taken, 6, "{refusals:?}");
    for status in &refusals {
        assert_eq!(status.reason, Reason::Forbidden, "{status}");
    }
    let last = refusals.last().unwrap();
    assert!(
        last.message.ends_with(
            "exceeded quota: q, requested: requests.cpu=100m, used: requests.cpu=600m, limited: \
             requests.cpu=650m"
        ),
        "{last}"
    );
    assert_eq!(used(&cluster, "n", "pods"), "6");
    // What goes is free again, and only that.
    let all = list_pods(&mut admin).await;
    delete(&mut admin, "pods", "n", &all[0]).await;
    eventually("one is free", || {
        used(&cluster, "n", "requests.cpu") == "500m"
    })
    .await;
    let more = pod("n", "more", json!({"requests": {"cpu": "150m"}}));
    created(&mut admin, "pods", &more).await;
    let over = pod("n", "over", json!({"requests": {"cpu": "1m"}}));
    let refused = status(admin.create(write("pods", &over)).await);
    assert!(
        refused
            .message
            .starts_with("pods \"over\" is forbidden: exceeded quota: q"),
        "{refused}"
    );
    cluster.stop().await;
}

async fn list_pods(client: &mut Client) -> Vec<String> {
    let list = ListRequest {
        key: key("pods", "n", ""),
        ..ListRequest::default()
    };
    let reply = client.list(list).await.unwrap().into_inner();
    let names = reply.items.iter().map(|item| {
        let object: Value = serde_json::from_slice(item).unwrap();
        object["metadata"]["name"].as_str().unwrap().to_owned()
    });
    names.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_counts_what_is_there_and_every_kind() {
    let cluster = Cluster::start_whole().await;
    let mut admin = cluster.admin().await;
    namespace(&mut admin, "n", json!({})).await;
    let map = |name: &str| {
        let mut map = config_map(name, json!({}));
        map["metadata"]["namespace"] = json!("n");
        map
    };
    created(&mut admin, "configmaps", &map("before")).await;
    eventually("the certificate of the namespace", || {
        let kind = gantry_api::kinds::resolve("configmaps").unwrap();
        cluster
            .registry()
            .store()
            .count(&kind.store_prefix(Some("n")))
            == 2
    })
    .await;
    let hard = json!({"hard": {"configmaps": "3", "count/deployments.apps": "0",
        "services.nodeports": "1", "requests.storage": "1Gi"}});
    let made = created(&mut admin, "resourcequotas", &quota("n", hard)).await;
    assert_eq!(made["status"]["used"]["configmaps"], "2");
    created(&mut admin, "configmaps", &map("third")).await;
    let refused = status(admin.create(write("configmaps", &map("fourth"))).await);
    assert_eq!(
        refused.message,
        "configmaps \"fourth\" is forbidden: exceeded quota: q, requested: configmaps=1, used: \
         configmaps=3, limited: configmaps=3"
    );
    let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "d", "namespace": "n"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {
            "metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "c", "image": "x:1"}]}}}});
    let refused = status(admin.apply(write("deployments", &deployment)).await);
    assert!(
        refused
            .message
            .contains("requested: count/deployments.apps=1, used: count/deployments.apps=0"),
        "{refused}"
    );
    let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {"name": "c", "namespace": "n"}, "spec": {
            "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}}});
    let refused = status(admin.create(write("persistentvolumeclaims", &claim)).await);
    assert!(
        refused.message.contains("requests.storage=2Gi"),
        "{refused}"
    );

    // A Service that becomes more than it was is charged by the difference.
    let service = |kind: &str, ports: &[u16]| {
        let ports: Vec<Value> = ports
            .iter()
            .map(|p| json!({"name": format!("p{p}"), "port": p}))
            .collect();
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "n"},
            "spec": {"type": kind, "selector": {"a": "b"}, "ports": ports}})
    };
    let plain = service("ClusterIP", &[80, 81]);
    admin.apply(write("services", &plain)).await.unwrap();
    let refused = status(
        admin
            .apply(write("services", &service("NodePort", &[80, 81])))
            .await,
    );
    assert!(
        refused.message.contains("services.nodeports=2"),
        "{refused}"
    );
    admin
        .apply(write("services", &service("NodePort", &[80])))
        .await
        .unwrap();
    assert_eq!(used(&cluster, "n", "services.nodeports"), "1");

    // A larger quota holds at once, with all counts.
    let larger = json!({"hard": {"configmaps": "4", "services": "1"}});
    let reply = admin
        .apply(write("resourcequotas", &quota("n", larger)))
        .await
        .unwrap();
    let object = object(&reply.into_inner());
    assert_eq!(object["status"]["hard"]["configmaps"], "4");
    assert_eq!(object["status"]["used"]["services"], "1");
    created(&mut admin, "configmaps", &map("fourth")).await;
    let list = ListRequest {
        key: key("resourcequotas", "n", ""),
        ..ListRequest::default()
    };
    let table = admin.table(list).await.unwrap().into_inner();
    assert!(
        table.rows[0].cells[1].contains("configmaps: 4/4"),
        "{table:?}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scopes_and_resizes_are_charged() {
    let cluster = Cluster::start_whole().await;
    let mut admin = cluster.admin().await;
    namespace(&mut admin, "n", json!({})).await;
    let spec = json!({"hard": {"pods": "1", "limits.cpu": "1"}, "scopes": ["NotBestEffort"]});
    created(&mut admin, "resourcequotas", &quota("n", spec)).await;
    for name in ["a", "b"] {
        created(&mut admin, "pods", &pod("n", name, json!({}))).await;
    }
    let refused = status(
        admin
            .create(write(
                "pods",
                &pod("n", "c", json!({"requests": {"cpu": "1"}})),
            ))
            .await,
    );
    assert_eq!(
        refused.message,
        "pods \"c\" is forbidden: failed quota: q: must specify limits.cpu for: c"
    );
    created(
        &mut admin,
        "pods",
        &pod(
            "n",
            "c",
            json!({"limits": {"cpu": "1"}, "requests": {"cpu": "100m"}}),
        ),
    )
    .await;
    let resize = |cpu: &str| PatchRequest {
        key: key("pods", "n", "c"),
        r#type: patch_request::Type::Strategic.into(),
        patch:
            json!({"spec": {"containers": [{"name": "c", "resources": {"limits": {"cpu": cpu}}}]}})
                .to_string()
                .into(),
        subresource: "resize".to_owned(),
        ..PatchRequest::default()
    };
    let refused = status(admin.patch(resize("1100m")).await);
    assert!(
        refused.message.contains("requested: limits.cpu=100m"),
        "{refused}"
    );
    admin.patch(resize("600m")).await.unwrap();
    eventually("freed", || used(&cluster, "n", "limits.cpu") == "600m").await;
    admin.patch(resize("1")).await.unwrap();
    assert_eq!(used(&cluster, "n", "limits.cpu"), "1");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_range_completes_and_refuses() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin().await;
    namespace(&mut admin, "n", json!({})).await;
    let range = json!({"apiVersion": "v1", "kind": "LimitRange",
        "metadata": {"name": "l", "namespace": "n"}, "spec": {"limits": [
            {"type": "Container", "default": {"cpu": "500m"}, "defaultRequest": {"cpu": "100m"},
             "max": {"cpu": "1"}},
            {"type": "PersistentVolumeClaim", "max": {"storage": "1Gi"}}]}});
    created(&mut admin, "limitranges", &range).await;
    let plain = created(&mut admin, "pods", &pod("n", "plain", json!({}))).await;
    let resources = &plain["spec"]["containers"][0]["resources"];
    assert_eq!(resources["requests"]["cpu"], "100m");
    assert_eq!(resources["limits"]["cpu"], "500m");
    assert_eq!(plain["status"]["qosClass"], "Burstable");
    assert_eq!(
        plain["metadata"]["annotations"]["kubernetes.io/limit-ranger"],
        "LimitRanger plugin set: cpu request for container c; cpu limit for container c"
    );
    let large = pod("n", "large", json!({"limits": {"cpu": "2"}}));
    let refused = status(admin.create(write("pods", &large)).await);
    assert_eq!(
        refused.message,
        "pods \"large\" is forbidden: maximum cpu usage per Container is 1, but limit is 2"
    );
    let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {"name": "c", "namespace": "n"}, "spec": {
            "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}}});
    let refused = status(admin.create(write("persistentvolumeclaims", &claim)).await);
    assert!(
        refused.message.ends_with(
            "maximum storage usage per PersistentVolumeClaim is 1Gi, but request is 2Gi"
        ),
        "{refused}"
    );
    // An apply of the same pod sees what the range put in as nothing of its author's.
    let reply = admin
        .apply(write("pods", &pod("n", "plain", json!({}))))
        .await
        .unwrap();
    assert_eq!(
        object(&reply.into_inner())["spec"]["containers"][0]["resources"]["limits"]["cpu"],
        "500m"
    );
    let wrong = json!({"apiVersion": "v1", "kind": "LimitRange",
        "metadata": {"name": "w", "namespace": "n"}, "spec": {"limits": [
            {"type": "Container", "min": {"cpu": "2"}, "max": {"cpu": "1"}}]}});
    let refused = status(admin.create(write("limitranges", &wrong)).await);
    assert!(
        refused
            .message
            .contains("min value 2 is greater than max value 1"),
        "{refused}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn levels_of_security_refuse_warn_and_name_what_runs() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin().await;
    let prefix = "pod-security.kubernetes.io";
    namespace(
        &mut admin,
        "open",
        json!({format!("{prefix}/warn"): "baseline"}),
    )
    .await;
    let mut bad = pod("open", "bad", json!({}));
    bad["spec"]["hostNetwork"] = json!(true);
    let reply = admin.apply(write("pods", &bad)).await.unwrap().into_inner();
    assert_eq!(
        reply.warnings,
        ["would violate PodSecurity \"baseline:latest\": host namespaces (hostNetwork=true)"]
    );
    // The level rises: what runs stays, and is named.
    let labels = json!({format!("{prefix}/enforce"): "baseline"});
    let patch = PatchRequest {
        key: key("namespaces", "", "open"),
        r#type: patch_request::Type::Merge.into(),
        patch: json!({"metadata": {"labels": labels}}).to_string().into(),
        ..PatchRequest::default()
    };
    let reply = admin.patch(patch).await.unwrap().into_inner();
    assert_eq!(
        reply.warnings,
        [
            "existing pods in namespace \"open\" violate the new PodSecurity enforce level \"baseline:latest\"",
            "bad: host namespaces",
        ]
    );
    bad["metadata"]["name"] = json!("more");
    let refused = status(admin.create(write("pods", &bad)).await);
    assert_eq!(refused.reason, Reason::Forbidden);
    assert_eq!(
        refused.message,
        "pods \"more\" is forbidden: violates PodSecurity \"baseline:latest\": host namespaces \
         (hostNetwork=true)"
    );
    // Of a template the author is told, also by a change of it.
    let mut deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "d", "namespace": "open"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {
            "metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "c", "image": "x:1"}]}}}});
    let reply = admin
        .apply(write("deployments", &deployment))
        .await
        .unwrap();
    assert_eq!(reply.into_inner().warnings, Vec::<String>::new());
    deployment["spec"]["template"]["spec"]["containers"][0]["securityContext"] =
        json!({"privileged": true});
    let reply = admin
        .apply(write("deployments", &deployment))
        .await
        .unwrap();
    let warnings = reply.into_inner().warnings;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].contains("privileged (container \"c\""),
        "{warnings:?}"
    );
    deployment["metadata"]["labels"] = json!({"x": "y"});
    let reply = admin
        .apply(write("deployments", &deployment))
        .await
        .unwrap();
    assert_eq!(reply.into_inner().warnings, Vec::<String>::new());

    // A container added to a pod that runs is judged as the pod.
    created(&mut admin, "pods", &pod("open", "fine", json!({}))).await;
    let debug = PatchRequest {
        key: key("pods", "open", "fine"),
        r#type: patch_request::Type::Strategic.into(),
        patch: json!({"spec": {"ephemeralContainers": [{"name": "d", "image": "x:1",
            "securityContext": {"privileged": true}}]}})
        .to_string()
        .into(),
        subresource: "ephemeralcontainers".to_owned(),
        ..PatchRequest::default()
    };
    let refused = status(admin.patch(debug).await);
    assert!(
        refused.message.contains("privileged (container \"d\""),
        "{refused}"
    );
    let wrong = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "w",
        "labels": {format!("{prefix}/enforce"): "strict"}}});
    let refused = status(admin.create(write("namespaces", &wrong)).await);
    assert!(
        refused
            .message
            .contains("must be one of privileged, baseline, restricted"),
        "{refused}"
    );
    cluster.stop().await;
}
