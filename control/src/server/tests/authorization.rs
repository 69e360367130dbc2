//! Who may do what, over TLS: users by certificates, service accounts by tokens.

use gantry_api::proto::images_client::ImagesClient;
use gantry_api::proto::images_input;
use gantry_api::proto::pods_client::PodsClient;
use gantry_api::proto::stats_client::StatsClient;
use gantry_api::proto::{
    ExecInput, ExecStart, FlowsRequest, ImagesInput, ImagesRequest, KindsRequest, LogsRequest,
    ServicesRequest, UsageRequest, exec_input,
};

use super::*;

const GROUP: &str = "rbac.authorization.k8s.io";

fn credentials(cluster: &Cluster, user: &str) -> Credentials {
    cluster.authority().client(user, "dev", 1).unwrap()
}

async fn client_of(cluster: &Cluster, user: &str) -> Client {
    cluster.connect(Some(&credentials(cluster, user))).await
}

fn list(plural: &str, namespace: &str) -> ListRequest {
    ListRequest {
        key: key(plural, namespace, ""),
        ..ListRequest::default()
    }
}

fn binding(name: &str, namespace: &str, role: (&str, &str), subject: Value) -> Value {
    let kind = match namespace {
        "" => "ClusterRoleBinding",
        _ => "RoleBinding",
    };
    let mut binding = json!({
        "apiVersion": format!("{GROUP}/v1"), "kind": kind,
        "metadata": {"name": name},
        "roleRef": {"apiGroup": GROUP, "kind": role.0, "name": role.1},
        "subjects": [subject],
    });
    if !namespace.is_empty() {
        binding["metadata"]["namespace"] = json!(namespace);
    }
    binding
}

fn user(name: &str) -> Value {
    json!({"apiGroup": GROUP, "kind": "User", "name": name})
}

fn role(name: &str, namespace: &str, rules: Value) -> Value {
    json!({
        "apiVersion": format!("{GROUP}/v1"), "kind": "Role",
        "metadata": {"name": name, "namespace": namespace}, "rules": rules,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_users_rights_come_and_go_with_bindings() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin().await;
    let mut jane = client_of(&cluster, "jane").await;
    let refused = status(jane.list(list("pods", "default")).await);
    assert_eq!(refused.reason, Reason::Forbidden);
    assert_eq!(
        refused.message,
        "pods is forbidden: User \"jane\" cannot list resource \"pods\" in API group \"\" in the \
         namespace \"default\""
    );
    let refused = status(jane.list(list("nodes", "default")).await);
    assert!(
        refused.message.ends_with("at the cluster scope"),
        "{refused}"
    );
    jane.kinds(KindsRequest {}).await.unwrap();

    let view = binding("view", "default", ("ClusterRole", "view"), user("jane"));
    created(&mut admin, "rolebindings", &view).await;
    jane.list(list("pods", "default")).await.unwrap();
    jane.table(list("deployments", "default")).await.unwrap();
    get(&mut jane, "namespaces", "", "default").await;
    let watch = WatchRequest {
        key: key("pods", "default", ""),
        ..WatchRequest::default()
    };
    drop(jane.watch(watch.clone()).await.unwrap());
    for (plural, namespace) in [
        ("pods", "kube-system"),
        ("pods", ""),
        ("secrets", "default"),
        ("nodes", "default"),
        ("namespaces", ""),
    ] {
        let refused = status(jane.list(list(plural, namespace)).await);
        assert_eq!(refused.reason, Reason::Forbidden, "{plural} {namespace}");
    }
    let refused = status(
        jane.create(write("configmaps", &config_map("c", json!({}))))
            .await,
    );
    assert!(
        refused
            .message
            .contains("cannot create resource \"configmaps\""),
        "{refused}"
    );

    let delete = DeleteRequest {
        key: key("rolebindings", "default", "view"),
        ..DeleteRequest::default()
    };
    assert_eq!(
        status(jane.delete(delete.clone()).await).reason,
        Reason::Forbidden
    );
    admin.delete(delete).await.unwrap();
    assert_eq!(
        status(jane.list(list("pods", "default")).await).reason,
        Reason::Forbidden
    );
    assert!(jane.watch(watch).await.is_err());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_verb_and_subresource_is_a_right_of_its_own() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin().await;
    let mut jane = client_of(&cluster, "jane").await;
    let rules = json!([
        {"verbs": ["patch"], "apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["mine"]},
        {"verbs": ["update"], "apiGroups": ["apps"], "resources": ["*/scale"]},
    ]);
    created(&mut admin, "roles", &role("r", "default", rules)).await;
    let bound = binding("b", "default", ("Role", "r"), user("jane"));
    created(&mut admin, "rolebindings", &bound).await;
    let mine = config_map("mine", json!({}));
    let refused = status(jane.apply(write("configmaps", &mine)).await);
    assert!(refused.message.contains("cannot create"), "{refused}");
    created(&mut admin, "configmaps", &mine).await;
    let changed = config_map("mine", json!({"a": "b"}));
    jane.apply(write("configmaps", &changed)).await.unwrap();
    let refused = status(jane.update(write("configmaps", &changed)).await);
    assert!(refused.message.contains("cannot update"), "{refused}");
    created(&mut admin, "configmaps", &config_map("other", json!({}))).await;
    let other = config_map("other", json!({"a": "b"}));
    let refused = status(jane.apply(write("configmaps", &other)).await);
    assert_eq!(
        refused.message,
        "configmaps \"other\" is forbidden: User \"jane\" cannot patch resource \"configmaps\" in API group \
         \"\" in the namespace \"default\""
    );

    let set = json!({
        "apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": "s", "namespace": "default"},
        "spec": {
            "replicas": 0, "selector": {"matchLabels": {"a": "b"}},
            "template": {
                "metadata": {"labels": {"a": "b"}},
                "spec": {"containers": [{"name": "c", "image": "x"}]},
            },
        },
    });
    created(&mut admin, "replicasets", &set).await;
    let scale = WriteRequest {
        key: key("replicasets", "default", "s"),
        subresource: "scale".to_owned(),
        ..write("replicasets", &json!({"spec": {"replicas": 0}}))
    };
    jane.update(scale.clone()).await.unwrap();
    let status_part = WriteRequest {
        subresource: "status".to_owned(),
        ..scale
    };
    let refused = status(jane.update(status_part).await);
    assert!(
        refused.message.contains("resource \"replicasets/status\""),
        "{refused}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_and_figures_need_rights_too() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin().await;
    let channel = cluster.channel(Some(&credentials(&cluster, "jane")));
    let mut pods = PodsClient::new(channel.clone());
    let mut stats = StatsClient::new(channel.clone());
    let mut images = ImagesClient::new(channel);
    let forbidden = |status: tonic::Status, what: &str| {
        let status = Status::from(status);
        assert_eq!(status.reason, Reason::Forbidden, "{status}");
        assert!(status.message.contains(what), "{status}");
    };
    let logs = LogsRequest {
        pod: "p".to_owned(),
        ..LogsRequest::default()
    };
    let exec = |attach: bool| {
        let start = ExecStart {
            pod: "p".to_owned(),
            command: vec!["ls".to_owned()],
            attach,
            ..ExecStart::default()
        };
        tokio_stream::once(ExecInput {
            input: Some(exec_input::Input::Start(start)),
        })
    };
    forbidden(
        pods.logs(logs.clone()).await.unwrap_err(),
        "get resource \"pods/log\"",
    );
    forbidden(
        pods.exec(exec(false)).await.unwrap_err(),
        "create resource \"pods/exec\"",
    );
    forbidden(
        pods.exec(exec(true)).await.unwrap_err(),
        "create resource \"pods/attach\"",
    );
    forbidden(
        stats.usage(UsageRequest::default()).await.unwrap_err(),
        "list resource \"pods\" in API group \"metrics.k8s.io\"",
    );
    forbidden(
        stats.flows(FlowsRequest::default()).await.unwrap_err(),
        "get resource \"pods/flows\"",
    );
    forbidden(
        stats
            .services(ServicesRequest::default())
            .await
            .unwrap_err(),
        "list resource \"services\"",
    );
    let list = ImagesInput {
        input: Some(images_input::Input::Request(ImagesRequest::default())),
    };
    forbidden(
        images.ask(tokio_stream::once(list)).await.unwrap_err(),
        "resource \"nodes/images\"",
    );
    let view = binding("view", "default", ("ClusterRole", "view"), user("jane"));
    created(&mut admin, "rolebindings", &view).await;
    let missing = Status::from(pods.logs(logs).await.unwrap_err());
    assert_eq!(missing.message, "pods \"p\" not found");
    forbidden(
        pods.exec(exec(false)).await.unwrap_err(),
        "create resource \"pods/exec\"",
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_gives_what_they_do_not_hold() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin().await;
    let mut jane = client_of(&cluster, "jane").await;
    let bound = binding("jane", "default", ("ClusterRole", "admin"), user("jane"));
    created(&mut admin, "rolebindings", &bound).await;

    let pods = json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}]);
    let mut held = created(&mut jane, "roles", &role("pods", "default", pods)).await;
    let everything = json!([{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]);
    let too_much = role("all", "default", everything.clone());
    let refused = status(jane.create(write("roles", &too_much)).await);
    assert_eq!(refused.reason, Reason::Forbidden);
    assert!(refused.message.contains("attempting to grant"), "{refused}");
    assert!(refused.message.contains("Verbs:[\"*\"]"), "{refused}");
    let refused = status(jane.apply(write("roles", &too_much)).await);
    assert!(refused.message.contains("attempting to grant"), "{refused}");
    held["rules"] = everything.clone();
    let refused = status(jane.update(write("roles", &held)).await);
    assert!(refused.message.contains("attempting to grant"), "{refused}");
    let patch = PatchRequest {
        key: key("roles", "default", "pods"),
        r#type: patch_request::Type::Merge.into(),
        patch: json!({"rules": everything}).to_string().into(),
        ..PatchRequest::default()
    };
    let refused = status(jane.patch(patch.clone()).await);
    assert!(refused.message.contains("attempting to grant"), "{refused}");
    let more = role("pods", "default", everything.clone());
    let refused = status(jane.apply(write("roles", &more)).await);
    assert!(refused.message.contains("attempting to grant"), "{refused}");
    let live = get(&mut admin, "roles", "default", "pods").await;
    assert_eq!(live["rules"][0]["verbs"], json!(["get"]));

    for role in [
        ("Role", "pods"),
        ("ClusterRole", "view"),
        ("ClusterRole", "admin"),
    ] {
        let bound = binding(role.1, "default", role, user("joe"));
        created(&mut jane, "rolebindings", &bound).await;
    }
    for role in [("ClusterRole", "cluster-admin"), ("ClusterRole", "none")] {
        let bound = binding("more", "default", role, user("jane"));
        let refused = status(jane.create(write("rolebindings", &bound)).await);
        assert_eq!(refused.reason, Reason::Forbidden, "{role:?}");
    }
    let robot = json!({"kind": "Robot", "name": "r"});
    let bound = binding("robot", "default", ("ClusterRole", "view"), robot);
    let refused = status(admin.create(write("rolebindings", &bound)).await);
    assert_eq!(refused.reason, Reason::Invalid);
    assert!(refused.message.contains("subjects[0].kind"), "{refused}");
    let everywhere = binding("all", "", ("ClusterRole", "view"), user("jane"));
    let refused = status(jane.create(write("clusterrolebindings", &everywhere)).await);
    assert!(refused.message.contains("cannot create"), "{refused}");
    let other = PatchRequest {
        key: key("rolebindings", "default", "view"),
        patch: br#"{"roleRef": {"name": "cluster-admin"}}"#.as_slice().into(),
        ..patch.clone()
    };
    let refused = status(jane.patch(other.clone()).await);
    assert!(
        refused.message.contains("cannot change roleRef"),
        "{refused}"
    );
    assert!(admin.patch(other).await.is_err());

    // By a label, a role gives its rules to all who hold the one that selects it.
    let writer = json!({
        "apiVersion": format!("{GROUP}/v1"), "kind": "ClusterRole", "metadata": {"name": "writer"},
        "rules": [{"verbs": ["get", "patch"], "apiGroups": [GROUP], "resources": ["clusterroles"],
                   "resourceNames": ["cluster-admin", "view"]}],
    });
    created(&mut admin, "clusterroles", &writer).await;
    let bound = binding("rex", "", ("ClusterRole", "writer"), user("rex"));
    created(&mut admin, "clusterrolebindings", &bound).await;
    let mut rex = client_of(&cluster, "rex").await;
    for (name, change) in [
        (
            "cluster-admin",
            json!({"metadata": {"labels": {"rbac.authorization.k8s.io/aggregate-to-view": "true"}}}),
        ),
        (
            "view",
            json!({"aggregationRule": {"clusterRoleSelectors": [{}]}}),
        ),
        ("view", json!({"aggregationRule": null, "rules": []})),
    ] {
        let patch = |change: &Value| PatchRequest {
            key: key("clusterroles", "", name),
            patch: change.to_string().into(),
            ..patch.clone()
        };
        let refused = status(rex.patch(patch(&change)).await);
        assert!(
            refused.message.contains("attempting to grant"),
            "{name} {change}: {refused}"
        );
        let note = json!({"metadata": {"annotations": {"note": "seen"}}});
        rex.patch(patch(&note)).await.unwrap();
    }
    let rules = json!([
        {"verbs": ["escalate"], "apiGroups": [GROUP], "resources": ["roles"]},
        {"verbs": ["bind"], "apiGroups": [GROUP], "resources": ["clusterroles"],
         "resourceNames": ["cluster-admin"]},
    ]);
    created(&mut admin, "roles", &role("raise", "default", rules)).await;
    let raise = binding("raise", "default", ("Role", "raise"), user("jane"));
    created(&mut admin, "rolebindings", &raise).await;
    jane.patch(patch).await.unwrap();
    let bound = binding(
        "more",
        "default",
        ("ClusterRole", "cluster-admin"),
        user("joe"),
    );
    created(&mut jane, "rolebindings", &bound).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_accounts_token_has_the_rights_of_its_bindings() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin().await;
    for name in ["ci", "other"] {
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "default"},
        });
        created(&mut admin, "serviceaccounts", &account).await;
    }
    let asked =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let token_of = |name: &str| WriteRequest {
        key: key("serviceaccounts", "default", name),
        subresource: "token".to_owned(),
        ..write("serviceaccounts", &asked)
    };
    let mut jane = client_of(&cluster, "jane").await;
    let refused = status(jane.create(token_of("ci")).await);
    assert!(
        refused
            .message
            .contains("create resource \"serviceaccounts/token\""),
        "{refused}"
    );
    let mut tokens = Vec::new();
    for name in ["ci", "other"] {
        let reply = admin.create(token_of(name)).await.unwrap().into_inner();
        let token = object(&reply)["status"]["token"]
            .as_str()
            .unwrap()
            .to_owned();
        tokens.push(token);
    }
    let lists = async |token: &str, namespace: &str| {
        let mut request = tonic::Request::new(list("pods", namespace));
        let header = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", header);
        cluster.connect(None).await.list(request).await.is_ok()
    };
    assert!(!lists(&tokens[0], "default").await);
    let account = json!({"kind": "ServiceAccount", "name": "ci", "namespace": "default"});
    let bound = binding("ci", "default", ("ClusterRole", "view"), account);
    created(&mut admin, "rolebindings", &bound).await;
    assert!(lists(&tokens[0], "default").await);
    assert!(!lists(&tokens[0], "kube-system").await);
    assert!(!lists(&tokens[1], "default").await);
    let all = json!({"apiGroup": GROUP, "kind": "Group", "name": "system:serviceaccounts:default"});
    let bound = binding("all", "", ("ClusterRole", "view"), all);
    created(&mut admin, "clusterrolebindings", &bound).await;
    assert!(lists(&tokens[1], "").await);

    // One that is bound to a Secret ends with it.
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "end", "namespace": "default"}});
    created(&mut admin, "secrets", &secret).await;
    let bound_to = |kind: &str, name: &str| {
        let reference = json!({"apiVersion": "v1", "kind": kind, "name": name});
        let asked = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"boundObjectRef": reference}});
        WriteRequest {
            json: asked.to_string().into(),
            ..token_of("ci")
        }
    };
    for (kind, name) in [
        ("Secret", "none"),
        ("Node", "none"),
        ("Pod", "none"),
        ("Service", "kubernetes"),
    ] {
        let refused = status(admin.create(bound_to(kind, name)).await);
        assert_eq!(refused.code, 400, "{kind}: {refused}");
    }
    let reply = admin
        .create(bound_to("Secret", "end"))
        .await
        .unwrap()
        .into_inner();
    let token = object(&reply)["status"]["token"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(lists(&token, "default").await);
    let gone = DeleteRequest {
        key: key("secrets", "default", "end"),
        ..DeleteRequest::default()
    };
    admin.delete(gone).await.unwrap();
    assert!(!lists(&token, "default").await);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_role_survives_a_start_and_nodes_get_nothing_by_bindings() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin().await;
    let mut role = get(&mut admin, "clusterroles", "", "system:aggregate-to-view").await;
    role["rules"] = json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}]);
    role["metadata"]["annotations"] =
        json!({"rbac.authorization.kubernetes.io/autoupdate": "false"});
    admin.update(write("clusterroles", &role)).await.unwrap();
    let nodes = json!({"apiGroup": GROUP, "kind": "Group", "name": "system:nodes"});
    let bound = binding("nodes", "", ("ClusterRole", "cluster-admin"), nodes);
    created(&mut admin, "clusterrolebindings", &bound).await;
    let delete = DeleteRequest {
        key: key("clusterroles", "", "edit"),
        ..DeleteRequest::default()
    };
    admin.delete(delete).await.unwrap();
    let cluster = Cluster::start_in(cluster.stop().await).await;
    let mut admin = cluster.admin().await;
    let kept = get(&mut admin, "clusterroles", "", "system:aggregate-to-view").await;
    assert_eq!(kept["rules"], role["rules"]);
    get(&mut admin, "clusterroles", "", "edit").await;
    let node = cluster
        .authority()
        .client("system:node:node-a", "system:nodes", 1)
        .unwrap();
    let mut node = cluster.connect(Some(&node)).await;
    assert_eq!(
        status(node.list(list("pods", "")).await).reason,
        Reason::Forbidden
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_can_ask_what_they_may_do() {
    use gantry_api::proto::access_client::AccessClient;
    use gantry_api::proto::{AccessReviewRequest, AccessRulesRequest, Subject, WhoAmIRequest};
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin().await;
    let view = binding("view", "default", ("ClusterRole", "view"), user("jane"));
    created(&mut admin, "rolebindings", &view).await;
    let mut jane = AccessClient::new(cluster.channel(Some(&credentials(&cluster, "jane"))));
    let ask = |verb: &str, resource: &str, namespace: &str| AccessReviewRequest {
        verb: verb.to_owned(),
        resource: resource.to_owned(),
        namespace: namespace.to_owned(),
        ..AccessReviewRequest::default()
    };
    let allowed = jane
        .review(ask("list", "pods", "default"))
        .await
        .unwrap()
        .into_inner();
    assert!(allowed.allowed);
    assert_eq!(
        allowed.reason,
        "RoleBinding \"default/view\" of ClusterRole \"view\" to User \"jane\""
    );
    for (verb, resource, namespace) in [
        ("create", "pods", "default"),
        ("list", "pods", ""),
        ("get", "nodes", "default"),
    ] {
        let asked = jane.review(ask(verb, resource, namespace)).await.unwrap();
        let reply = asked.into_inner();
        assert!(!reply.allowed, "{verb} {resource}: {}", reply.reason);
        assert!(
            reply.reason.starts_with("User \"jane\" cannot"),
            "{}",
            reply.reason
        );
    }
    let who = jane
        .who_am_i(WhoAmIRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(who.user, "jane");
    assert_eq!(who.groups, ["dev", "system:authenticated"]);
    let rules = AccessRulesRequest {
        namespace: "default".to_owned(),
        r#as: None,
    };
    let rules = jane.rules(rules).await.unwrap().into_inner().rules;
    let has = |resource: &str| {
        let holds =
            |rule: &gantry_api::proto::AccessRule| rule.resources.iter().any(|r| r == resource);
        rules.iter().any(holds)
    };
    assert!(has("pods/log") && has("selfsubjectreviews") && !has("secrets"));

    let as_joe = AccessReviewRequest {
        r#as: Some(Subject {
            user: "joe".to_owned(),
            groups: vec!["system:masters".to_owned()],
        }),
        ..ask("get", "secrets", "default")
    };
    let refused = Status::from(jane.review(as_joe.clone()).await.unwrap_err());
    assert_eq!(
        refused.message,
        "users \"joe\" is forbidden: User \"jane\" cannot impersonate resource \"users\" in API group \"\" at \
         the cluster scope"
    );
    let joe = json!({
        "apiVersion": format!("{GROUP}/v1"), "kind": "ClusterRole", "metadata": {"name": "joe"},
        "rules": [{"verbs": ["impersonate"], "apiGroups": [""], "resources": ["users"]}],
    });
    created(&mut admin, "clusterroles", &joe).await;
    let bound = binding("joe", "", ("ClusterRole", "joe"), user("jane"));
    created(&mut admin, "clusterrolebindings", &bound).await;
    let refused = Status::from(jane.review(as_joe).await.unwrap_err());
    assert!(refused.message.contains("resource \"groups\""), "{refused}");
    let as_joe = AccessReviewRequest {
        r#as: Some(Subject {
            user: "joe".to_owned(),
            groups: Vec::new(),
        }),
        ..ask("list", "pods", "default")
    };
    assert!(!jane.review(as_joe).await.unwrap().into_inner().allowed);
    cluster.stop().await;
}
