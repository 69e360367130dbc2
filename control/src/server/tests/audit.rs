//! The audit log: what is asked for over TLS is in it, and what is secret is not.

use super::*;
use gantry_api::proto::LogsRequest;
use gantry_api::proto::pods_client::PodsClient;

/// A control plane with an audit log, and where that is.
pub(super) async fn audited() -> (Cluster, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("audit.log");
    let stop = CancellationToken::new();
    let mut arguments = arguments(dir.path(), "127.0.0.1:0");
    arguments.audit_log = Some(file.clone());
    let control = Control::open(&arguments, &stop).await.unwrap();
    (Cluster { dir, control, stop }, file)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_is_noted_and_no_content() {
    let (cluster, file) = audited().await;
    let mut admin = cluster.admin().await;
    let secret = json!({"apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "s", "namespace": "default"}, "stringData": {"password": "open-sesame"}});
    created(&mut admin, "secrets", &secret).await;
    let mut wrong = secret.clone();
    wrong["metadata"]["name"] = json!("w");
    wrong["type"] = json!("kubernetes.io/tls");
    status(admin.create(write("secrets", &wrong)).await);
    get(&mut admin, "secrets", "default", "s").await;
    let map = config_map("c", json!({}));
    admin.apply(write("configmaps", &map)).await.unwrap();
    let patch = PatchRequest {
        key: key("configmaps", "default", "c"),
        r#type: patch_request::Type::Merge.into(),
        patch: br#"{"data":{"a":"open-sesame"}}"#.as_slice().into(),
        dry_run: true,
        ..PatchRequest::default()
    };
    admin.patch(patch).await.unwrap();
    let credentials = cluster.authority().client("jane", "dev", 1).unwrap();
    let mut jane = cluster.connect(Some(&credentials)).await;
    let list = ListRequest {
        key: key("deployments", "default", ""),
        ..ListRequest::default()
    };
    status(jane.list(list).await);
    let logs = LogsRequest {
        namespace: "default".to_owned(),
        pod: "p".to_owned(),
        ..LogsRequest::default()
    };
    let mut pods = PodsClient::new(cluster.channel(Some(&credentials)));
    assert!(pods.logs(logs).await.is_err());
    cluster.registry().flush_audit().await;
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(!text.contains("open-sesame"), "{text}");
    let events: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let shown: Vec<(&str, &str, &str, i64)> = events
        .iter()
        .map(|event| {
            let text = |pointer: &str| event.pointer(pointer).unwrap().as_str().unwrap();
            let code = event["responseStatus"]["code"].as_i64().unwrap();
            assert_eq!(text("/apiVersion"), "audit.k8s.io/v1");
            assert_eq!(text("/level"), "Metadata");
            (
                text("/user/username"),
                text("/verb"),
                text("/requestURI"),
                code,
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            (
                "tester",
                "create",
                "/api/v1/namespaces/default/secrets/s",
                201
            ),
            (
                "tester",
                "create",
                "/api/v1/namespaces/default/secrets/w",
                422
            ),
            ("tester", "get", "/api/v1/namespaces/default/secrets/s", 200),
            (
                "tester",
                "patch",
                "/api/v1/namespaces/default/configmaps/c",
                200
            ),
            (
                "tester",
                "patch",
                "/api/v1/namespaces/default/configmaps/c",
                200
            ),
            (
                "jane",
                "list",
                "/apis/apps/v1/namespaces/default/deployments",
                403
            ),
            ("jane", "get", "/api/v1/namespaces/default/pods/p/log", 403),
        ]
    );
    assert_eq!(events[1]["responseStatus"].get("message"), None);
    assert_eq!(events[0]["sourceIPs"], json!(["127.0.0.1"]));
    assert_eq!(events[4]["annotations"]["gantry.dev/dry-run"], "true");
    assert_eq!(
        events[6]["annotations"]["authorization.k8s.io/decision"],
        "forbid"
    );
    assert_eq!(events[6]["objectRef"]["subresource"], "log");
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    cluster.stop().await;
}
