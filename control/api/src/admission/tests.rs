use super::*;
use crate::kinds::{KINDS, resolve};
use proptest::prelude::*;
use serde_json::json;

fn kind(word: &str) -> &'static Kind {
    resolve(word).unwrap()
}

fn create(word: &str, object: &Value) -> Result<Prepared, Status> {
    prepare_create_value(kind(word), object.clone(), true)
}

fn causes(status: &Status) -> Vec<&str> {
    status
        .details
        .causes
        .iter()
        .map(|c| c.field.as_str())
        .collect()
}

fn deployment() -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {
            "replicas": 3, "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "nginx", "image": "nginx:1.27",
                    "ports": [{"containerPort": 80}]}]}
            }
        }
    })
}

#[test]
fn every_kind_of_the_table_is_served() {
    for kind in KINDS {
        assert!(served(kind).is_ok(), "{}", kind.kind);
    }
}

#[test]
fn an_ordinary_deployment_becomes_complete() {
    let prepared = create("deploy", &deployment()).unwrap();
    assert!(prepared.warnings.is_empty(), "{:?}", prepared.warnings);
    let spec = &prepared.object["spec"];
    assert_eq!(spec["strategy"]["rollingUpdate"]["maxSurge"], "25%");
    assert_eq!(spec["revisionHistoryLimit"], 10);
    assert_eq!(spec["template"]["spec"]["dnsPolicy"], "ClusterFirst");
    assert_eq!(prepared.object["kind"], "Deployment");
}

#[test]
fn a_selector_that_misses_its_template_is_refused() {
    let mut set = deployment();
    set["kind"] = json!("ReplicaSet");
    set["metadata"]["name"] = json!("frontend");
    set["spec"]["template"]["metadata"]["labels"] = json!({"app": "other"});
    let status = create("rs", &set).unwrap_err();
    assert_eq!(
        status.message,
        "ReplicaSet.apps \"frontend\" is invalid: spec.template.metadata.labels: Invalid value: \
         {\"app\":\"other\"}: `selector` does not match template `labels`"
    );
}

#[test]
fn negative_replicas_are_refused_in_kubernetes_words() {
    let mut bad = deployment();
    bad["spec"]["replicas"] = json!(-1);
    assert_eq!(
        create("deploy", &bad).unwrap_err().message,
        "Deployment.apps \"web\" is invalid: spec.replicas: Invalid value: -1: must be greater \
         than or equal to 0"
    );
}

#[test]
fn unknown_fields_are_refused_or_dropped_with_a_warning() {
    let mut object = deployment();
    object["spec"]["replica"] = json!(3);
    let status = create("deploy", &object).unwrap_err();
    assert!(
        status.message.ends_with("unknown field \"spec.replica\""),
        "{status}"
    );
    let prepared = prepare_create_value(kind("deploy"), object, false).unwrap();
    assert_eq!(prepared.warnings, ["unknown field \"spec.replica\""]);
    assert!(prepared.object["spec"].get("replica").is_none());
}

#[test]
fn a_broken_pod_names_every_field() {
    let status = create(
        "po",
        &json!({
            "metadata": {"name": "UPPER", "labels": {"a b": "c"}},
            "spec": {
                "restartPolicy": "Sometimes",
                "containers": [
                    {"name": "a", "image": "x", "ports": [{"containerPort": 0}],
                     "env": [{"name": "E", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}],
                     "volumeMounts": [{"name": "nope", "mountPath": "/a"}],
                     "resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}},
                     "livenessProbe": {"httpGet": {"port": "http"}}},
                    {"name": "a", "resources": {"limits": {"memory": "1Gib"}}}
                ],
                "volumes": [{"name": "v", "secret": {}}, {"name": "v", "emptyDir": {}}]
            }
        }),
    )
    .unwrap_err();
    let fields = causes(&status);
    for field in [
        "metadata.name",
        "metadata.labels",
        "spec.restartPolicy",
        "spec.containers[0].ports[0].containerPort",
        "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath",
        "spec.containers[0].volumeMounts[0].name",
        "spec.containers[0].resources.requests[cpu]",
        "spec.containers[0].livenessProbe.httpGet.port",
        "spec.containers[1].name",
        "spec.containers[1].image",
        "spec.containers[1].resources.limits[memory]",
        "spec.volumes[0].secret.secretName",
        "spec.volumes[1].name",
    ] {
        assert!(fields.contains(&field), "{field} in {fields:?}");
    }
}

#[test]
fn a_pods_spec_is_fixed_but_for_images() {
    let pod = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n1",
        "containers": [{"name": "c", "image": "x:1"}]}});
    let old = create("po", &pod).unwrap().object;
    let mut new = old.clone();
    new["spec"]["containers"][0]["image"] = json!("x:2");
    assert!(prepare_update(kind("po"), &old, new.clone(), true).is_ok());
    new["spec"]["containers"][0]["args"] = json!(["-v"]);
    let status = prepare_update(kind("po"), &old, new, true).unwrap_err();
    assert!(
        status
            .message
            .contains("spec: Forbidden: pod updates may not change"),
        "{status}"
    );
    let mut new = old.clone();
    new["spec"]["nodeName"] = json!("n2");
    assert!(prepare_update(kind("po"), &old, new, true).is_err());
}

#[test]
fn immutable_fields_stay() {
    let old = create("deploy", &deployment()).unwrap().object;
    let mut new = old.clone();
    new["spec"]["selector"] = json!({"matchLabels": {"a": "b"}});
    new["spec"]["template"]["metadata"]["labels"] = json!({"a": "b"});
    let status = prepare_update(kind("deploy"), &old, new, true).unwrap_err();
    assert!(status.message.contains("field is immutable"), "{status}");
    let map = json!({"metadata": {"name": "m"}, "immutable": true, "data": {"a": "1"}});
    let old = create("cm", &map).unwrap().object;
    let mut new = old.clone();
    new["data"]["a"] = json!("2");
    assert!(prepare_update(kind("cm"), &old, new, true).is_err());
}

#[test]
fn services_are_judged() {
    let service = |spec: Value| create("svc", &json!({"metadata": {"name": "web"}, "spec": spec}));
    let good = service(json!({"ports": [{"port": 80}], "selector": {"app": "web"}})).unwrap();
    assert_eq!(good.object["spec"]["ports"][0]["targetPort"], 80);
    assert_eq!(good.object["spec"]["type"], "ClusterIP");
    let status = service(json!({"ports": [{"port": 80}, {"port": 80}]})).unwrap_err();
    assert!(causes(&status).contains(&"spec.ports[0].name"), "{status}");
    assert!(causes(&status).contains(&"spec.ports[1]"), "{status}");
    assert!(service(json!({})).is_err());
    assert!(service(json!({"clusterIP": "None", "selector": {"a": "b"}})).is_ok());
    assert!(service(json!({"clusterIP": "1.2.3", "ports": [{"port": 1}]})).is_err());
    let bad = service(json!({"ports": [{"port": 80, "nodePort": 30000}]})).unwrap_err();
    assert_eq!(causes(&bad), ["spec.ports[0].nodePort"]);
    let sctp = service(json!({"ports": [{"port": 80, "protocol": "SCTP"}]})).unwrap_err();
    assert_eq!(causes(&sctp), ["spec.ports[0].protocol"]);
    assert!(sctp.message.contains("SCTP is not balanced"), "{sctp}");
}

#[test]
fn services_for_the_outside_are_judged() {
    let service = |kind: &str, extra: Value| {
        let mut spec = json!({"type": kind, "ports": [{"port": 80}]});
        let fields = spec.as_object_mut().unwrap();
        fields.extend(extra.as_object().unwrap().clone());
        create("svc", &json!({"metadata": {"name": "web"}, "spec": spec}))
    };
    let balancer = service("LoadBalancer", json!({})).unwrap().object;
    assert_eq!(balancer["spec"]["allocateLoadBalancerNodePorts"], true);
    assert_eq!(balancer["spec"]["externalTrafficPolicy"], "Cluster");
    let external = service("ClusterIP", json!({"externalIPs": ["192.0.2.1"]})).unwrap();
    assert_eq!(external.object["spec"]["externalTrafficPolicy"], "Cluster");
    let all = json!({"externalTrafficPolicy": "Local", "healthCheckNodePort": 30100,
        "loadBalancerClass": "example.com/x", "loadBalancerSourceRanges": [" 192.0.2.0/24 "],
        "loadBalancerIP": "192.0.2.1", "allocateLoadBalancerNodePorts": false});
    assert!(service("LoadBalancer", all.clone()).is_ok());
    let refused = service("ClusterIP", all).unwrap_err();
    for field in [
        "spec.externalTrafficPolicy",
        "spec.healthCheckNodePort",
        "spec.loadBalancerClass",
        "spec.loadBalancerSourceRanges",
        "spec.allocateLoadBalancerNodePorts",
    ] {
        assert!(causes(&refused).contains(&field), "{field}: {refused}");
    }
    for (kind, extra, field) in [
        (
            "LoadBalancer",
            json!({"loadBalancerSourceRanges": ["x"]}),
            "spec.loadBalancerSourceRanges[0]",
        ),
        (
            "LoadBalancer",
            json!({"loadBalancerIP": "x"}),
            "spec.loadBalancerIP",
        ),
        (
            "LoadBalancer",
            json!({"loadBalancerClass": "-"}),
            "spec.loadBalancerClass",
        ),
        (
            "LoadBalancer",
            json!({"healthCheckNodePort": 30100}),
            "spec.healthCheckNodePort",
        ),
        (
            "NodePort",
            json!({"externalIPs": ["127.0.0.1"]}),
            "spec.externalIPs[0]",
        ),
        (
            "NodePort",
            json!({"externalIPs": ["fe80::1"]}),
            "spec.externalIPs[0]",
        ),
        (
            "NodePort",
            json!({"externalIPs": ["224.0.0.9"]}),
            "spec.externalIPs[0]",
        ),
    ] {
        let status = service(kind, extra).unwrap_err();
        assert_eq!(causes(&status), [field], "{status}");
    }
}

#[test]
fn numbers_are_fine_as_quantities() {
    let pod = json!({"metadata": {"name": "a"}, "spec": {"containers": [
        {"name": "c", "image": "x:1", "resources": {"limits": {"cpu": 1, "memory": 1e9}}}]}});
    assert!(create("po", &pod).is_ok(), "{:?}", create("po", &pod));
}

#[test]
fn generated_names_need_only_a_prefix() {
    let pod = |meta: Value| {
        create(
            "po",
            &json!({"metadata": meta, "spec": {"containers": [
            {"name": "c", "image": "x"}]}}),
        )
    };
    assert!(pod(json!({"generateName": "web-"})).is_ok());
    assert!(pod(json!({})).is_err());
    assert!(pod(json!({"generateName": "Web-"})).is_err());
}

#[test]
fn status_writes_judge_only_types() {
    let pod = json!({"metadata": {"name": "a"}, "spec": {"containers": []},
        "status": {"phase": "Running"}});
    assert!(prepare_status(kind("po"), pod).is_ok());
    let bad = json!({"status": {"containerStatuses": "x"}});
    let status = prepare_status(kind("po"), bad).unwrap_err();
    assert!(
        status.message.contains("status.containerStatuses"),
        "{status}"
    );
}

#[test]
fn applying_twice_changes_nothing_and_a_removed_field_goes() {
    let first = serde_json::to_vec(&deployment()).unwrap();
    let live = apply(kind("deploy"), None, &first, true).unwrap().object;
    let again = apply(kind("deploy"), Some(&live), &first, true)
        .unwrap()
        .object;
    assert_eq!(again, live);
    let mut second = deployment();
    second["spec"]["template"]["spec"]["containers"][0]["ports"] = Value::Null;
    second["spec"].as_object_mut().unwrap().remove("replicas");
    let second = serde_json::to_vec(&second).unwrap();
    let merged = apply(kind("deploy"), Some(&live), &second, true)
        .unwrap()
        .object;
    // The field goes, and its default comes back.
    assert_eq!(merged["spec"]["replicas"], 1);
    assert!(
        merged["spec"]["template"]["spec"]["containers"][0]
            .get("ports")
            .is_none()
    );
}

#[test]
fn patches_go_through_the_same_rules() {
    let live = create("deploy", &deployment()).unwrap().object;
    let scale = br#"{"spec": {"replicas": 5}}"#;
    for patch_type in [PatchType::Strategic, PatchType::Merge] {
        let patched = patch(kind("deploy"), &live, patch_type, scale)
            .unwrap()
            .object;
        assert_eq!(patched["spec"]["replicas"], 5);
    }
    let operations = br#"[{"op": "replace", "path": "/spec/replicas", "value": -5}]"#;
    let status = patch(kind("deploy"), &live, PatchType::Json, operations).unwrap_err();
    assert_eq!(causes(&status), ["spec.replicas"]);
    assert!(patch(kind("deploy"), &live, PatchType::Json, b"{").is_err());
    assert!(
        patch(
            kind("deploy"),
            &live,
            PatchType::Merge,
            br#"{"spec": {"x": 1}}"#
        )
        .is_err()
    );
}

fn small_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..70_000).prop_map(Value::from),
        "[a-z0-9%:/.-]{0,6}".prop_map(Value::from),
    ];
    let keys = prop::sample::select(vec![
        "name",
        "image",
        "ports",
        "containerPort",
        "containers",
        "volumes",
        "emptyDir",
        "secret",
        "livenessProbe",
        "httpGet",
        "port",
        "replicas",
        "selector",
        "matchLabels",
        "template",
        "metadata",
        "labels",
        "spec",
        "strategy",
        "type",
        "resources",
        "limits",
        "cpu",
        "env",
        "valueFrom",
        "fieldRef",
        "data",
        "clusterIP",
        "rollingUpdate",
        "maxSurge",
    ]);
    leaf.prop_recursive(5, 40, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map(keys.clone(), inner, 0..6).prop_map(|map| {
                Value::Object(map.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
            }),
        ]
    })
}

proptest! {
    #[test]
    fn no_input_panics(spec in small_json(), which in 0..KINDS.len()) {
        let kind = &KINDS[which];
        let object = json!({"metadata": {"name": "x"}, "spec": spec.clone(), "data": spec});
        for strict in [true, false] {
            if let Ok(once) = prepare_create_value(kind, object.clone(), strict) {
                // Preparing what was prepared changes nothing: defaults are idempotent.
                let twice = prepare_create_value(kind, once.object.clone(), true).unwrap();
                prop_assert_eq!(&twice.object, &once.object);
                let same = prepare_update(kind, &once.object, once.object.clone(), true).unwrap();
                prop_assert_eq!(same.object, once.object);
            }
        }
    }
}

#[test]
fn a_mirror_pod_is_bound_from_the_start_and_no_pod_becomes_one() {
    let kind = resolve("pods").unwrap();
    let pod = |annotations: Value, node: &str| {
        json!({"metadata": {"name": "a", "namespace": "d", "annotations": annotations},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]}})
    };
    let mirror = json!({"kubernetes.io/config.mirror": "u"});
    let created = |object| prepare_create_value(kind, object, true).map(|p| p.object);
    let unbound = created(pod(mirror.clone(), "")).unwrap_err();
    assert!(
        unbound.message.contains("must set spec.nodeName"),
        "{unbound}"
    );
    let shown = created(pod(mirror.clone(), "n")).unwrap();
    let plain = created(pod(json!({}), "n")).unwrap();
    let update = |old: &Value, annotations: Value| {
        let mut new = old.clone();
        new["metadata"]["annotations"] = annotations;
        prepare_update(kind, old, new, true)
    };
    assert!(
        update(
            &shown,
            json!({"kubernetes.io/config.mirror": "u", "x": "y"})
        )
        .is_ok()
    );
    for (old, annotations) in [
        (&plain, mirror),
        (&shown, json!({})),
        (&shown, json!({"kubernetes.io/config.mirror": "v"})),
    ] {
        let refused = update(old, annotations).unwrap_err();
        assert!(refused.message.contains("config.mirror"), "{refused}");
    }
}
