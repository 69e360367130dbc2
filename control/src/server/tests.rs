//! The whole API over TLS: a server on a loopback port, clients with their own certificates.

use std::path::Path;
use std::time::Duration;

use clap::Parser as _;
use gantry_api::k8s_openapi::api::core::v1::{
    ConfigMap, Pod, Service as ApiService, ServiceAccount,
};
use gantry_api::proto::objects_client::ObjectsClient;
use gantry_api::proto::watch_event::Type;
use gantry_api::proto::{
    DeleteRequest, GetRequest, ListRequest, ObjectKey, PatchRequest, WatchEvent, WatchRequest,
    WriteReply, WriteRequest, patch_request,
};
use gantry_api::status::{Reason, Status};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::config::Arguments;
use crate::pki::{Authority, Credentials};
use crate::run::{Control, StartError};
use crate::server::WriteOptions;
use crate::server::registry::{DeleteOptions, Registry};
use crate::server::{identity, rbac};
use crate::store::Store;

mod audit;
mod authorization;
mod backups;
mod evictions;
mod impersonation;
mod limits;
mod replicas;

type Client = ObjectsClient<Channel>;

struct Cluster {
    dir: tempfile::TempDir,
    control: Control,
    stop: CancellationToken,
}

fn arguments(dir: &Path, listen: &str) -> Arguments {
    let path = |name: &str| dir.join(name).display().to_string();
    Arguments::parse_from([
        "gantry-control",
        "--listen",
        listen,
        "--data-dir",
        &path("data"),
        "--kubeconfig",
        &path("admin.kubeconfig"),
        "--agent-credentials",
        &format!("{}:node-a", path("agent")),
    ])
}

impl Cluster {
    async fn start() -> Cluster {
        Cluster::start_in(tempfile::tempdir().unwrap()).await
    }

    async fn start_in(dir: tempfile::TempDir) -> Cluster {
        let stop = CancellationToken::new();
        let arguments = arguments(dir.path(), "127.0.0.1:0");
        let control = Control::open(&arguments, &stop).await.unwrap();
        Cluster { dir, control, stop }
    }

    /// With scheduler and controllers.
    async fn start_whole() -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        let arguments = arguments(dir.path(), "127.0.0.1:0");
        let control = Control::start(&arguments, &stop).await.unwrap();
        Cluster { dir, control, stop }
    }

    async fn stop(self) -> tempfile::TempDir {
        self.stop.cancel();
        self.control.drain().await.unwrap();
        self.dir
    }

    fn registry(&self) -> &Registry {
        self.control.registry()
    }

    fn authority(&self) -> Authority {
        Authority::open(&self.dir.path().join("data")).unwrap()
    }

    async fn connect(&self, credentials: Option<&Credentials>) -> Client {
        ObjectsClient::new(self.channel(credentials))
    }

    fn channel(&self, credentials: Option<&Credentials>) -> Channel {
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.authority().certificate()));
        if let Some(credentials) = credentials {
            tls = tls.identity(Identity::from_pem(
                &credentials.certificate,
                &credentials.key,
            ));
        }
        let endpoint = Endpoint::from_shared(format!("https://{}", self.control.address()))
            .unwrap()
            .tls_config(tls)
            .unwrap();
        endpoint.connect_lazy()
    }

    async fn admin(&self) -> Client {
        let credentials = self
            .authority()
            .client("tester", "system:masters", 1)
            .unwrap();
        self.connect(Some(&credentials)).await
    }
}

fn key(plural: &str, namespace: &str, name: &str) -> Option<ObjectKey> {
    Some(ObjectKey {
        group: String::new(),
        plural: plural.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

fn write(plural: &str, object: &Value) -> WriteRequest {
    WriteRequest {
        key: key(plural, "", ""),
        json: serde_json::to_vec(object).unwrap().into(),
        strict: true,
        ..WriteRequest::default()
    }
}

fn config_map(name: &str, labels: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "data": {"a": "1"},
    })
}

fn object(reply: &WriteReply) -> Value {
    serde_json::from_slice(&reply.json).unwrap()
}

fn status<T: std::fmt::Debug>(result: Result<tonic::Response<T>, tonic::Status>) -> Status {
    Status::from(result.unwrap_err())
}

async fn created(client: &mut Client, plural: &str, value: &Value) -> Value {
    let reply = client
        .create(write(plural, value))
        .await
        .unwrap()
        .into_inner();
    assert!(reply.created);
    object(&reply)
}

async fn get(client: &mut Client, plural: &str, namespace: &str, name: &str) -> Value {
    let request = GetRequest {
        key: key(plural, namespace, name),
    };
    let reply = client.get(request).await.unwrap().into_inner();
    serde_json::from_slice(&reply.json).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verbs_work_over_tls() {
    let cluster = Cluster::start().await;
    let mut client = cluster.admin().await;
    let first = created(&mut client, "configmaps", &config_map("c", json!({}))).await;
    assert_eq!(get(&mut client, "configmaps", "default", "c").await, first);
    let again = status(
        client
            .create(write("configmaps", &config_map("c", json!({}))))
            .await,
    );
    assert_eq!(again.message, "configmaps \"c\" already exists");

    let mut changed = first.clone();
    changed["data"]["a"] = json!("2");
    let reply = client
        .update(write("configmaps", &changed))
        .await
        .unwrap()
        .into_inner();
    let second = object(&reply);
    assert_ne!(
        second["metadata"]["resourceVersion"],
        first["metadata"]["resourceVersion"]
    );
    assert_eq!(second["metadata"]["uid"], first["metadata"]["uid"]);
    let stale = status(client.update(write("configmaps", &changed)).await);
    assert_eq!(stale.reason, Reason::Conflict);
    assert!(
        stale.message.contains("the object has been modified"),
        "{stale}"
    );

    let patch = PatchRequest {
        key: key("configmaps", "default", "c"),
        r#type: patch_request::Type::Merge.into(),
        patch: br#"{"data":{"b":"3","a":null}}"#.as_slice().into(),
        ..PatchRequest::default()
    };
    let reply = client.patch(patch).await.unwrap().into_inner();
    assert_eq!(object(&reply)["data"], json!({"b": "3"}));

    let list = ListRequest {
        key: key("configmaps", "default", ""),
        ..ListRequest::default()
    };
    let list = client.list(list).await.unwrap().into_inner();
    assert_eq!(list.items.len(), 1);

    let delete = DeleteRequest {
        key: key("configmaps", "default", "c"),
        ..DeleteRequest::default()
    };
    client.delete(delete.clone()).await.unwrap();
    let gone = status(client.delete(delete).await);
    assert_eq!(gone.message, "configmaps \"c\" not found");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_are_rendered_by_the_server() {
    let cluster = Cluster::start().await;
    let mut client = cluster.admin().await;
    created(&mut client, "configmaps", &config_map("c", json!({}))).await;
    let list = ListRequest {
        key: key("configmaps", "default", ""),
        with_namespace: true,
        ..ListRequest::default()
    };
    let table = client.table(list).await.unwrap().into_inner();
    let names: Vec<_> = table.columns.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["NAMESPACE", "NAME", "DATA", "AGE"]);
    assert_eq!(table.rows.len(), 1);
    assert_eq!(table.rows[0].cells[..3], ["default", "c", "1"]);
    let watch = WatchRequest {
        key: key("configmaps", "default", "c"),
        as_table: true,
        ..WatchRequest::default()
    };
    let mut stream = client.watch(watch).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(first.columns.len(), 3);
    assert_eq!(first.row.unwrap().cells[..2], ["c", "1"]);
    assert!(first.json.is_empty());
    drop(stream);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_is_scaled_by_its_subresource() {
    let cluster = Cluster::start().await;
    let mut client = cluster.admin().await;
    let set = json!({
        "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "metadata": {"name": "r", "namespace": "default"},
        "spec": {
            "replicas": 0, "selector": {"matchLabels": {"a": "b"}},
            "template": {
                "metadata": {"labels": {"a": "b"}},
                "spec": {"containers": [{"name": "c", "image": "busybox"}]},
            },
        },
    });
    created(&mut client, "replicasets", &set).await;
    let scale = |replicas: i64| WriteRequest {
        key: key("replicasets", "default", "r"),
        subresource: "scale".to_owned(),
        ..write("replicasets", &json!({"spec": {"replicas": replicas}}))
    };
    let reply = client.update(scale(0)).await.unwrap().into_inner();
    assert!(reply.unchanged);
    let reply = client.update(scale(2)).await.unwrap().into_inner();
    assert_eq!(object(&reply)["kind"], "Scale");
    let live = get(&mut client, "replicasets", "default", "r").await;
    assert_eq!(live["spec"]["replicas"], 2);
    assert_eq!(live["metadata"]["generation"], 2);
    let negative = status(client.update(scale(-1)).await);
    assert!(negative.message.contains("spec.replicas"), "{negative}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn apply_creates_changes_and_then_leaves_alone() {
    let cluster = Cluster::start().await;
    let mut client = cluster.admin().await;
    let mut manifest = config_map("c", json!({"x": "1"}));
    let mut applied = async |manifest: &Value| {
        let reply = client.apply(write("configmaps", manifest)).await;
        reply.unwrap().into_inner()
    };
    assert!(applied(&manifest).await.created);
    assert!(applied(&manifest).await.unchanged);
    manifest["data"] = json!({"b": "2"});
    let reply = applied(&manifest).await;
    assert!(!reply.created && !reply.unchanged);
    assert_eq!(object(&reply)["data"], json!({"b": "2"}));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_objects_are_refused_with_reason_and_path() {
    let cluster = Cluster::start().await;
    let mut client = cluster.admin().await;
    let mut wrong = config_map("c", json!({}));
    wrong["metadta"] = json!({});
    let unknown = status(client.create(write("configmaps", &wrong)).await);
    assert_eq!(unknown.reason, Reason::BadRequest);
    assert!(unknown.message.contains("metadta"), "{unknown}");
    let mut lost = config_map("c", json!({}));
    lost["metadata"]["namespace"] = json!("nowhere");
    let lost = status(client.create(write("configmaps", &lost)).await);
    assert_eq!(lost.message, "namespaces \"nowhere\" not found");
    let gadgets = status(
        client
            .create(write("gadgets", &config_map("c", json!({}))))
            .await,
    );
    assert!(gadgets.message.contains("gadgets"), "{gadgets}");
    let mut named = config_map("", json!({}));
    named["metadata"] = json!({"generateName": "c-", "namespace": "default"});
    let named = created(&mut client, "configmaps", &named).await;
    assert_eq!(named["metadata"]["name"].as_str().unwrap().len(), 7);
    let dry = WriteRequest {
        dry_run: true,
        ..write("configmaps", &config_map("dry", json!({})))
    };
    client.create(dry).await.unwrap();
    let absent = GetRequest {
        key: key("configmaps", "default", "dry"),
    };
    assert_eq!(status(client.get(absent).await).reason, Reason::NotFound);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_masters_use_objects() {
    let cluster = Cluster::start().await;
    let agent = cluster.dir.path().join("agent");
    let read = |name: &str| std::fs::read_to_string(agent.join(name)).unwrap();
    let node = Credentials {
        certificate: read("client.crt"),
        key: read("client.key"),
    };
    let request = || GetRequest {
        key: key("namespaces", "", "default"),
    };
    let refused = status(cluster.connect(Some(&node)).await.get(request()).await);
    assert_eq!(refused.reason, Reason::Forbidden);
    assert!(refused.message.contains("system:node:node-a"), "{refused}");
    assert!(cluster.connect(None).await.get(request()).await.is_err());
    let stranger = Authority::open(tempfile::tempdir().unwrap().path()).unwrap();
    let stranger = stranger.client("x", "system:masters", 1).unwrap();
    assert!(
        cluster
            .connect(Some(&stranger))
            .await
            .get(request())
            .await
            .is_err()
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_credentials_are_named_as_such() {
    let cluster = Cluster::start().await;
    let expired = cluster
        .authority()
        .client("x", "system:masters", -1)
        .unwrap();
    let attempt = async || {
        let request = GetRequest {
            key: key("namespaces", "", "default"),
        };
        let error = cluster
            .connect(Some(&expired))
            .await
            .get(request)
            .await
            .unwrap_err();
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            text.push_str(&format!(": {error}"));
            source = error.source();
        }
        text
    };
    // TLS 1.3 tells a client only after its own handshake; the alert may lose against the close.
    let mut text = String::new();
    for _ in 0..50 {
        text = attempt().await;
        if text.to_lowercase().contains("certificateexpired") {
            break;
        }
    }
    assert!(text.to_lowercase().contains("certificateexpired"), "{text}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_speaks_for_its_own_node_only() {
    use gantry_api::proto::feed_client::FeedClient;
    use gantry_api::proto::{Hello, Lineage, NodeInfo, Up, down, up};
    // With controllers: the welcome waits for the node's pod prefix.
    let cluster = Cluster::start_whole().await;
    let node = |name: &str| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
    let hello = |name: &str| Up {
        message: Some(up::Message::Hello(Hello {
            node: name.to_owned(),
            boot_id: "boot".to_owned(),
            incarnation: 1,
            lineage: None::<Lineage>,
            info: Some(NodeInfo {
                node_json: serde_json::to_vec(&node(name)).unwrap().into(),
            }),
            ..Hello::default()
        })),
    };
    let credentials = cluster
        .authority()
        .client("system:node:a", "system:nodes", 1)
        .unwrap();
    let channel = cluster.channel(Some(&credentials));
    let session = async |name: &str| {
        let ups = tokio_stream::StreamExt::chain(
            tokio_stream::once(hello(name)),
            tokio_stream::pending(),
        );
        let mut downs = FeedClient::new(channel.clone())
            .session(ups)
            .await?
            .into_inner();
        tokio::time::timeout(Duration::from_secs(10), downs.message())
            .await
            .unwrap()
    };
    let first = session("a").await.unwrap().unwrap();
    assert!(
        matches!(first.message, Some(down::Message::Welcome(_))),
        "{first:?}"
    );
    let refused = Status::from(session("b").await.unwrap_err());
    assert_eq!(refused.reason, Reason::Forbidden);
    assert!(
        refused.message.contains("speak for node \"b\""),
        "{refused}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_token_goes_to_its_node_only_and_ends_with_the_pod() {
    use gantry_api::proto::TokenRequest;
    use gantry_api::proto::feed_client::FeedClient;
    let cluster = Cluster::start_whole().await;
    let mut admin = cluster.admin().await;
    for name in ["a", "b"] {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        created(&mut admin, "nodes", &node).await;
    }
    eventually("account default and the cluster's certificate", || {
        let registry = cluster.registry();
        let account = registry.get::<ServiceAccount>("default", "default");
        let root = registry.get::<ConfigMap>("default", "kube-root-ca.crt");
        account.unwrap().is_some() && root.unwrap().is_some()
    })
    .await;
    let root = get(&mut admin, "configmaps", "default", "kube-root-ca.crt").await;
    assert_eq!(root["data"]["ca.crt"], cluster.authority().certificate());
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"},
        "spec": {"nodeName": "a", "containers": [{"name": "c", "image": "x:1"}]},
    });
    let pod = created(&mut admin, "pods", &pod).await;
    let request = |audience: &[&str]| TokenRequest {
        namespace: "default".to_owned(),
        pod: "p".to_owned(),
        pod_uid: pod["metadata"]["uid"].as_str().unwrap().to_owned(),
        audiences: audience.iter().map(|a| (*a).to_owned()).collect(),
        expiration_s: 0,
    };
    let ask = async |node: &str, request: TokenRequest| {
        let user = format!("system:node:{node}");
        let credentials = cluster
            .authority()
            .client(&user, "system:nodes", 1)
            .unwrap();
        let mut feed = FeedClient::new(cluster.channel(Some(&credentials)));
        feed.issue_token(request)
            .await
            .map(tonic::Response::into_inner)
    };
    let stranger = Status::from(ask("b", request(&[])).await.unwrap_err());
    assert_eq!(stranger.reason, Reason::Forbidden, "{stranger}");
    let vault = Status::from(ask("a", request(&["vault"])).await.unwrap_err());
    assert!(vault.message.contains("asks for audience"), "{vault}");
    let reply = ask("a", request(&[])).await.unwrap();

    // The token is an identity: known, and without rights.
    let as_pod = async |token: &str| {
        let mut request = tonic::Request::new(GetRequest {
            key: key("pods", "default", "p"),
        });
        let header = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", header);
        status(cluster.connect(None).await.get(request).await)
    };
    let refused = as_pod(&reply.token).await;
    assert_eq!(refused.reason, Reason::Forbidden, "{refused}");
    assert!(
        refused
            .message
            .contains("system:serviceaccount:default:default"),
        "{refused}"
    );
    assert_eq!(as_pod("nonsense").await.reason, Reason::Unauthorized);
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
        "metadata": {}, "spec": {"token": reply.token}});
    let reviewed = created(&mut admin, "tokenreviews", &review).await;
    assert_eq!(
        reviewed["status"]["user"]["username"],
        "system:serviceaccount:default:default"
    );
    let options = DeleteOptions {
        grace_period_s: Some(0),
        ..DeleteOptions::default()
    };
    cluster
        .registry()
        .delete::<Pod>("default", "p", &options)
        .await
        .unwrap();
    let gone = as_pod(&reply.token).await;
    assert!(gone.message.contains("its pod is gone"), "{gone}");
    cluster.stop().await;
}

async fn next(stream: &mut tonic::Streaming<WatchEvent>) -> (Type, String) {
    let event = tokio::time::timeout(Duration::from_secs(10), stream.message());
    let event = event.await.unwrap().unwrap().unwrap();
    let name = serde_json::from_slice::<Value>(&event.json)
        .map(|object| object["metadata"]["name"].as_str().unwrap().to_owned());
    (event.r#type(), name.unwrap_or(event.resource_version))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_follows_a_selector_and_resumes() {
    let cluster = Cluster::start().await;
    let mut client = cluster.admin().await;
    created(
        &mut client,
        "configmaps",
        &config_map("one", json!({"app": "web"})),
    )
    .await;
    created(&mut client, "configmaps", &config_map("two", json!({}))).await;
    let watch = |version: &str| WatchRequest {
        key: key("configmaps", "default", ""),
        label_selector: "app=web".to_owned(),
        resource_version: version.to_owned(),
        ..WatchRequest::default()
    };
    let mut stream = client.watch(watch("")).await.unwrap().into_inner();
    assert_eq!(next(&mut stream).await, (Type::Added, "one".to_owned()));
    let (kind, start) = next(&mut stream).await;
    assert_eq!(kind, Type::Bookmark);

    let relabel = async |client: &mut Client, name: &str, labels: Value| {
        let object = config_map(name, labels);
        client.update(write("configmaps", &object)).await.unwrap();
    };
    relabel(&mut client, "two", json!({"app": "web"})).await;
    relabel(&mut client, "two", json!({"app": "web", "more": "1"})).await;
    relabel(&mut client, "one", json!({})).await;
    let delete = DeleteRequest {
        key: key("configmaps", "default", "two"),
        ..DeleteRequest::default()
    };
    client.delete(delete).await.unwrap();
    let expected = [
        (Type::Added, "two".to_owned()),
        (Type::Modified, "two".to_owned()),
        (Type::Deleted, "one".to_owned()),
        (Type::Deleted, "two".to_owned()),
    ];
    for expected in &expected {
        assert_eq!(next(&mut stream).await, *expected);
    }
    // The same again from the bookmark, on a server that was started anew.
    drop((stream, client));
    let cluster = Cluster::start_in(cluster.stop().await).await;
    let mut client = cluster.admin().await;
    let mut stream = client.watch(watch(&start)).await.unwrap().into_inner();
    assert_eq!(next(&mut stream).await.0, Type::Bookmark);
    for expected in &expected {
        assert_eq!(next(&mut stream).await, *expected);
    }
    let gone = client.watch(watch("999999")).await;
    assert_eq!(status(gone).reason, Reason::Expired);
    // A stop ends the stream in words.
    cluster.stop.cancel();
    let ended = tokio::time::timeout(Duration::from_secs(10), stream.message()).await;
    assert_eq!(
        Status::from(ended.unwrap().unwrap_err()).reason,
        Reason::ServiceUnavailable
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminating_namespace_takes_nothing_new() {
    let cluster = Cluster::start().await;
    let mut client = cluster.admin().await;
    let space = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}});
    created(&mut client, "namespaces", &space).await;
    let mut inside = config_map("c", json!({}));
    inside["metadata"]["namespace"] = json!("a");
    created(&mut client, "configmaps", &inside).await;
    let delete = |plural: &str, namespace: &str, name: &str| DeleteRequest {
        key: key(plural, namespace, name),
        ..DeleteRequest::default()
    };
    client.delete(delete("namespaces", "", "a")).await.unwrap();
    let mut going = get(&mut client, "namespaces", "", "a").await;
    assert_eq!(going["status"]["phase"], "Terminating");
    inside["metadata"]["name"] = json!("d");
    let refused = status(client.create(write("configmaps", &inside)).await);
    assert_eq!(refused.reason, Reason::Forbidden);
    assert!(
        refused.message.contains("because it is being terminated"),
        "{refused}"
    );
    // It goes last.
    going["spec"]["finalizers"] = json!([]);
    let early = status(client.update(write("namespaces", &going)).await);
    assert!(early.message.contains("1 configmaps"), "{early}");
    client.delete(delete("configmaps", "a", "c")).await.unwrap();
    client.update(write("namespaces", &going)).await.unwrap();
    let request = GetRequest {
        key: key("namespaces", "", "a"),
    };
    assert_eq!(status(client.get(request).await).reason, Reason::NotFound);
    let kept = status(client.delete(delete("namespaces", "", "default")).await);
    assert_eq!(kept.reason, Reason::Forbidden);
    cluster.stop().await;
}

fn service(name: &str, spec: Value) -> ApiService {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default"}, "spec": spec,
    }))
    .unwrap()
}

fn address(service: &ApiService) -> String {
    let spec = service.spec.clone().unwrap();
    assert_eq!(
        spec.cluster_ips.unwrap()[0],
        spec.cluster_ip.clone().unwrap()
    );
    spec.cluster_ip.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_get_addresses_once_also_across_a_restart() {
    let cluster = Cluster::start().await;
    let registry = cluster.registry();
    let ports = json!([{"port": 80}]);
    let plain = |name: &str| service(name, json!({"ports": ports, "selector": {"a": "b"}}));
    let creates = (0..20).map(|n| {
        let (registry, object) = (registry.clone(), plain(&format!("s{n}")));
        tokio::spawn(async move { registry.create(&object).await.unwrap() })
    });
    let mut taken = std::collections::BTreeSet::new();
    for create in creates.collect::<Vec<_>>() {
        assert!(taken.insert(address(&create.await.unwrap())));
    }
    let fixed = |name: &str, ip: &str| {
        service(
            name,
            json!({"ports": ports, "selector": {"a": "b"}, "clusterIP": ip}),
        )
    };
    let one = registry.create(&fixed("fixed", "10.96.0.7")).await.unwrap();
    assert_eq!(address(&one), "10.96.0.7");
    let headless = registry.create(&fixed("headless", "None")).await.unwrap();
    assert_eq!(headless.spec.unwrap().cluster_ip.unwrap(), "None");
    for ip in ["10.96.0.7", "10.96.0.10"] {
        let double = registry.create(&fixed("double", ip)).await.unwrap_err();
        assert_eq!(double.reason, Reason::Invalid);
        assert!(
            double.message.contains("provided IP is already allocated"),
            "{double}"
        );
    }
    let cluster = Cluster::start_in(cluster.stop().await).await;
    let registry = cluster.registry();
    assert!(
        registry
            .create(&fixed("double", "10.96.0.7"))
            .await
            .is_err()
    );
    let options = DeleteOptions::default();
    registry
        .delete::<ApiService>("default", "fixed", &options)
        .await
        .unwrap();
    registry
        .create(&fixed("double", "10.96.0.7"))
        .await
        .unwrap();

    let mut node_port = service(
        "np",
        json!({"type": "NodePort", "ports": [{"port": 80}], "selector": {"a": "b"}}),
    );
    let made = registry.create(&node_port).await.unwrap();
    let number = made.spec.clone().unwrap().ports.unwrap()[0]
        .node_port
        .unwrap();
    assert!((30_000..=32_767).contains(&number));
    // An update without it keeps it; another type gives it back.
    let kept = registry.update(&node_port).await.unwrap();
    assert_eq!(kept.spec, made.spec);
    node_port.metadata.name = Some("np2".to_owned());
    node_port.spec.as_mut().unwrap().ports.as_mut().unwrap()[0].node_port = Some(number);
    let double = registry.create(&node_port).await.unwrap_err();
    assert!(
        double.message.contains("spec.ports[0].nodePort"),
        "{double}"
    );
    let mut internal = kept;
    internal.spec.as_mut().unwrap().type_ = Some("ClusterIP".to_owned());
    registry.update(&internal).await.unwrap();
    registry.create(&node_port).await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_bound_deleted_gracefully_and_removed() {
    let cluster = Cluster::start().await;
    let registry = cluster.registry();
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "default"},
        "spec": {"containers": [{"name": "c", "image": "busybox"}]},
    }))
    .unwrap();
    let pod = registry.create(&pod).await.unwrap();
    let uid = pod.metadata.uid.clone().unwrap();
    let missing = registry.bind("default", "p", &uid, "n").await.unwrap_err();
    assert_eq!(missing.message, "nodes \"n\" not found");
    let node = serde_json::from_value(json!({"metadata": {"name": "n"}})).unwrap();
    let node: gantry_api::k8s_openapi::api::core::v1::Node = node;
    registry.create(&node).await.unwrap();
    let binds = (0..8).map(|_| {
        let (registry, uid) = (registry.clone(), uid.clone());
        tokio::spawn(async move { registry.bind("default", "p", &uid, "n").await.is_ok() })
    });
    let mut bound = 0;
    for bind in binds.collect::<Vec<_>>() {
        bound += usize::from(bind.await.unwrap());
    }
    assert_eq!(bound, 1);
    let options = DeleteOptions::default();
    registry
        .delete::<Pod>("default", "p", &options)
        .await
        .unwrap();
    let going: Pod = registry.get("default", "p").unwrap().unwrap();
    assert!(going.metadata.deletion_timestamp.is_some());
    // A late status does not lose the deletion; a stale one is refused.
    let mut late = pod.clone();
    late.status.get_or_insert_default().phase = Some("Succeeded".to_owned());
    assert_eq!(
        registry.update_status(&late).await.unwrap_err().reason,
        Reason::Conflict
    );
    late.metadata.resource_version = None;
    let late = registry.update_status(&late).await.unwrap();
    assert!(late.metadata.deletion_timestamp.is_some());
    registry
        .remove_pod("default", "p", "another")
        .await
        .unwrap();
    assert!(registry.get::<Pod>("default", "p").unwrap().is_some());
    registry.remove_pod("default", "p", &uid).await.unwrap();
    registry.remove_pod("default", "p", &uid).await.unwrap();
    assert!(registry.get::<Pod>("default", "p").unwrap().is_none());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_counted() {
    use gantry_api::k8s_openapi::api::core::v1::Event;
    let cluster = Cluster::start().await;
    let registry = cluster.registry();
    let event: Event = serde_json::from_value(json!({
        "metadata": {}, "reason": "BackOff", "message": "again", "type": "Warning",
        "involvedObject": {"kind": "Pod", "namespace": "default", "name": "p", "uid": "u"},
        "source": {"component": "gantry-agent"},
    }))
    .unwrap();
    for _ in 0..5 {
        registry.event(event.clone()).await;
    }
    let mut other = event.clone();
    other.message = Some("something else".to_owned());
    registry.event(other).await;
    let (_, mut events) = registry.list::<Event>(Some("default")).unwrap();
    events.sort_by_key(|event| event.count);
    assert_eq!(
        events.iter().map(|e| e.count.unwrap()).collect::<Vec<_>>(),
        [1, 5]
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_cannot_work_says_why() {
    let cluster = Cluster::start().await;
    let text = async |dir: &Path, listen: &str| {
        let stop = CancellationToken::new();
        let started = Control::start(&arguments(dir, listen), &stop).await;
        let error: StartError = started.err().unwrap();
        error.to_string()
    };
    let held = text(cluster.dir.path(), "127.0.0.1:0").await;
    assert!(
        held.contains("is in use by another gantry-control"),
        "{held}"
    );
    let other = tempfile::tempdir().unwrap();
    let address = cluster.control.address();
    let taken = text(other.path(), &address.to_string()).await;
    assert!(
        taken.contains(&format!("port {} on 127.0.0.1 is taken", address.port())),
        "{taken}"
    );
    let blocked = tempfile::tempdir().unwrap();
    std::fs::write(blocked.path().join("data"), "").unwrap();
    let blocked = text(blocked.path(), "127.0.0.1:0").await;
    assert!(blocked.contains("--data-dir"), "{blocked}");
    cluster.stop().await;
}

/// Waits until the condition holds.
async fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..300 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{what} did not happen within 15 s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_becomes_pods_and_its_namespace_goes_with_all_in_it() {
    use gantry_api::k8s_openapi::api::core::v1::Namespace;
    let cluster = Cluster::start_whole().await;
    let mut client = cluster.admin().await;
    let registry = cluster.registry();
    let space = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "demo"}});
    created(&mut client, "namespaces", &space).await;
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "demo"},
        "spec": {
            "replicas": 3, "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "c", "image": "nginx"}]},
            },
        },
    });
    let reply = client.apply(write("deployments", &deployment)).await;
    assert!(reply.unwrap().into_inner().created);
    let pods = || registry.list::<Pod>(Some("demo")).unwrap().1;
    eventually("three pods", || pods().len() == 3).await;
    // A copy of what the server returns, applied again, changes nothing.
    let again = client.apply(write("deployments", &deployment)).await;
    assert!(again.unwrap().into_inner().unchanged);
    let delete = DeleteRequest {
        key: key("namespaces", "", "demo"),
        ..DeleteRequest::default()
    };
    client.delete(delete).await.unwrap();
    eventually("the end of the namespace", || {
        registry.get::<Namespace>("", "demo").unwrap().is_none()
    })
    .await;
    assert!(pods().is_empty());
    cluster.stop().await;
}

/// Any JSON, with names that mean something here.
fn garbage() -> impl proptest::strategy::Strategy<Value = Value> {
    use proptest::prelude::*;
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z0-9.:-]{0,6}".prop_map(Value::from),
        Just(json!("None")),
        Just(json!("NodePort")),
    ];
    let name = proptest::sample::select(vec![
        "metadata",
        "spec",
        "status",
        "name",
        "namespace",
        "generateName",
        "uid",
        "ports",
        "port",
        "nodePort",
        "protocol",
        "clusterIP",
        "clusterIPs",
        "type",
        "finalizers",
        "labels",
        "data",
        "resourceVersion",
        "deletionTimestamp",
        "replicas",
        "template",
        "containers",
        "x",
    ]);
    leaf.prop_recursive(5, 48, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            proptest::collection::btree_map(name.clone().prop_map(str::to_owned), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_refused_without_a_panic_and_changes_nothing_else() {
    use gantry_api::kinds::KINDS;
    use proptest::strategy::{Strategy as _, ValueTree as _};
    use proptest::test_runner::TestRunner;
    let cluster = Cluster::start().await;
    let registry = cluster.registry();
    let options = WriteOptions::default();
    let master = identity::Identity {
        user: "tester".to_owned(),
        groups: vec![identity::MASTERS_GROUP.to_owned()],
        impersonated_by: None,
    };
    let ports = json!({"type": "NodePort", "ports": [{"port": 80}], "selector": {"a": "b"}});
    registry.create(&service("s", ports)).await.unwrap();
    let mut runner = TestRunner::default();
    for _ in 0..400 {
        let value = garbage().new_tree(&mut runner).unwrap().current();
        for kind in KINDS {
            let space = if kind.namespaced { "default" } else { "" };
            let dry = WriteOptions {
                dry_run: true,
                strict: false,
            };
            let _ = registry
                .create_value(kind, space, value.clone(), &dry)
                .await;
            let judge = rbac::Judge::new(registry, &master);
            let apply = registry.apply_value(kind, space, "s", value.clone(), &dry, &judge);
            let _ = apply.await;
        }
        let kind = gantry_api::kinds::by_plural("", "services").unwrap();
        for part in [super::Part::Object, super::Part::Status] {
            let update = registry.update_value(kind, "default", "s", value.clone(), part, &options);
            let _ = update.await;
        }
        let live: ApiService = registry.get("default", "s").unwrap().unwrap();
        assert!(live.metadata.uid.is_some() && live.spec.is_some());
    }
    cluster.stop().await;
}
