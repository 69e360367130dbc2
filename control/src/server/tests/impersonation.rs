//! Asking as somebody else, over TLS: who may, who may not and in which words, and what the audit log says.

use gantry_api::proto::LogsRequest;
use gantry_api::proto::WhoAmIRequest;
use gantry_api::proto::access_client::AccessClient;
use gantry_api::proto::pods_client::PodsClient;

use super::*;

const RBAC: &str = "rbac.authorization.k8s.io";

/// A request as `user`, with groups.
fn as_user<T>(message: T, user: &str, groups: &[&str]) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    let metadata = request.metadata_mut();
    if !user.is_empty() {
        metadata.append("impersonate-user", user.parse().unwrap());
    }
    for group in groups {
        metadata.append("impersonate-group", group.parse().unwrap());
    }
    request
}

fn list(plural: &str) -> ListRequest {
    ListRequest {
        key: key(plural, "default", ""),
        ..ListRequest::default()
    }
}

/// `subject` gets a role of this name with these rules, everywhere.
async fn grant(admin: &mut Client, name: &str, subject: (&str, &str), rules: Value) {
    let role = json!({
        "apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRole", "metadata": {"name": name},
        "rules": rules,
    });
    created(admin, "clusterroles", &role).await;
    let binding = json!({
        "apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRoleBinding", "metadata": {"name": name},
        "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": name},
        "subjects": [{"apiGroup": RBAC, "kind": subject.0, "name": subject.1}],
    });
    created(admin, "clusterrolebindings", &binding).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_as_somebody_has_their_rights_and_no_others() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin().await;
    let reads = json!([{"verbs": ["list"], "apiGroups": [""], "resources": ["configmaps"]}]);
    grant(&mut admin, "joe-reads", ("User", "joe"), reads).await;
    let reads = json!([{"verbs": ["list"], "apiGroups": [""], "resources": ["secrets"]}]);
    grant(&mut admin, "ops-read", ("Group", "ops"), reads).await;
    // The administrator may be anybody, and is then nobody else.
    admin
        .list(as_user(list("configmaps"), "joe", &[]))
        .await
        .unwrap();
    let refused = status(admin.list(as_user(list("secrets"), "joe", &["dev"])).await);
    assert_eq!(
        refused.message,
        "secrets is forbidden: User \"joe\" cannot list resource \"secrets\" in API group \"\" in the \
         namespace \"default\""
    );
    admin
        .list(as_user(list("secrets"), "joe", &["ops"]))
        .await
        .unwrap();
    let mut access = AccessClient::new(
        cluster.channel(Some(
            &cluster
                .authority()
                .client("tester", "system:masters", 1)
                .unwrap(),
        )),
    );
    let asked = as_user(WhoAmIRequest::default(), "joe", &["ops"]);
    let who = access.who_am_i(asked).await.unwrap().into_inner();
    assert_eq!(
        (who.user.as_str(), who.groups.as_slice()),
        (
            "joe",
            &["ops".to_owned(), "system:authenticated".to_owned()][..],
        )
    );
    let account = "system:serviceaccount:default:robot";
    let asked = as_user(WhoAmIRequest::default(), account, &[]);
    let who = access.who_am_i(asked).await.unwrap().into_inner();
    assert!(
        who.groups
            .contains(&"system:serviceaccounts:default".to_owned()),
        "{who:?}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_is_told_in_kubernetes_words() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin().await;
    let credentials = cluster.authority().client("jane", "dev", 1).unwrap();
    let mut jane = cluster.connect(Some(&credentials)).await;
    let refused = status(jane.list(as_user(list("configmaps"), "joe", &[])).await);
    assert_eq!(refused.code, 403);
    assert_eq!(
        refused.message,
        "users \"joe\" is forbidden: User \"jane\" cannot impersonate resource \"users\" in API group \"\" at \
         the cluster scope"
    );
    let joe = json!([
        {"verbs": ["impersonate"], "apiGroups": [""], "resources": ["users"], "resourceNames": ["joe"]},
        {"verbs": ["impersonate"], "apiGroups": [""], "resources": ["groups"], "resourceNames": ["ops"]},
    ]);
    grant(&mut admin, "may-be-joe", ("User", "jane"), joe).await;
    let refused = status(jane.list(as_user(list("configmaps"), "joe", &[])).await);
    assert!(
        refused
            .message
            .starts_with("configmaps is forbidden: User \"joe\""),
        "{refused}"
    );
    for (user, groups, text) in [
        (
            "jim",
            &[][..],
            "users \"jim\" is forbidden: User \"jane\" cannot impersonate",
        ),
        (
            "joe",
            &["ops", "system:masters"],
            "groups \"system:masters\" is forbidden: User \"jane\"",
        ),
        (
            "system:serviceaccount:kube-system:admin",
            &[],
            "serviceaccounts \"admin\" is forbidden: User \"jane\" cannot impersonate resource \
             \"serviceaccounts\" in API group \"\" in the namespace \"kube-system\"",
        ),
        (
            "",
            &["ops"],
            "requested [\"ops\"] without impersonating a user",
        ),
    ] {
        let refused = status(jane.list(as_user(list("configmaps"), user, groups)).await);
        assert!(refused.message.starts_with(text), "{refused}");
    }
    // Part of a name is not understood: nothing is done.
    let mut request = as_user(list("configmaps"), "joe", &[]);
    request
        .metadata_mut()
        .append("impersonate-uid", "7".parse().unwrap());
    let refused = status(jane.list(request).await);
    assert_eq!(refused.code, 400, "{refused}");
    // A node's agent has no service but its own, whoever asks as it.
    let node = as_user(list("pods"), "system:node:a", &["system:nodes"]);
    let refused = status(admin.list(node).await);
    assert!(
        refused.message.contains("cannot use the service Objects"),
        "{refused}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_audit_log_names_both() {
    let (cluster, file) = audit::audited().await;
    let mut admin = cluster.admin().await;
    status(
        admin
            .list(as_user(list("configmaps"), "joe", &["ops"]))
            .await,
    );
    let credentials = cluster
        .authority()
        .client("tester", "system:masters", 1)
        .unwrap();
    let mut pods = PodsClient::new(cluster.channel(Some(&credentials)));
    let logs = LogsRequest {
        namespace: "default".to_owned(),
        pod: "p".to_owned(),
        ..LogsRequest::default()
    };
    assert!(pods.logs(as_user(logs, "joe", &[])).await.is_err());
    let credentials = cluster.authority().client("jane", "dev", 1).unwrap();
    let mut jane = cluster.connect(Some(&credentials)).await;
    status(jane.list(as_user(list("configmaps"), "joe", &[])).await);
    cluster.registry().flush_audit().await;
    let text = std::fs::read_to_string(&file).unwrap();
    let shown: Vec<String> = text
        .lines()
        .map(|line| {
            let event: Value = serde_json::from_str(line).unwrap();
            let name = |field: &str| event[field]["username"].as_str().unwrap_or("-").to_owned();
            let (verb, code) = (&event["verb"], &event["responseStatus"]["code"]);
            let uri = event["requestURI"].as_str().unwrap_or_default();
            let (user, other) = (name("user"), name("impersonatedUser"));
            format!(
                "{user} as {other}: {} {uri} {code}",
                verb.as_str().unwrap_or_default()
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            "tester as joe: list /api/v1/namespaces/default/configmaps 403",
            "tester as joe: get /api/v1/namespaces/default/pods/p/log 403",
            "jane as -: impersonate /api/v1/users/joe 403",
        ]
    );
    cluster.stop().await;
}
