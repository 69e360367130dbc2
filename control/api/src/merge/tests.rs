use super::*;
use proptest::prelude::*;
use serde_json::json;

fn pod(containers: &Value) -> Value {
    json!({"spec": {"containers": containers}})
}

#[test]
fn containers_merge_by_name() {
    let live = pod(&json!([{"name": "a", "image": "x:1", "tty": true}, {"name": "b"}]));
    let patch = pod(&json!([{"name": "a", "image": "x:2"}, {"name": "c"}]));
    assert_eq!(
        strategic(&live, &patch).unwrap(),
        pod(&json!([{"name": "a", "image": "x:2", "tty": true}, {"name": "b"}, {"name": "c"}]))
    );
}

#[test]
fn directives_delete_replace_and_order() {
    let live = pod(&json!([{"name": "a", "image": "1"}, {"name": "b"}]));
    let patch = pod(&json!([{"name": "a", "$patch": "delete"}]));
    assert_eq!(
        strategic(&live, &patch).unwrap(),
        pod(&json!([{"name": "b"}]))
    );
    let patch = pod(&json!([{"name": "a", "$patch": "replace", "tty": true}]));
    assert_eq!(
        strategic(&live, &patch).unwrap()["spec"]["containers"][0],
        json!({"name": "a", "tty": true})
    );
    let patch = pod(&json!([{"$patch": "replace"}, {"name": "z"}]));
    assert_eq!(
        strategic(&live, &patch).unwrap(),
        pod(&json!([{"name": "z"}]))
    );
    let patch = json!({"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}});
    assert_eq!(
        strategic(&live, &patch).unwrap()["spec"]["containers"][0]["name"],
        "b"
    );
    let live = json!({"metadata": {"finalizers": ["a", "b"], "labels": {"x": "1", "y": "2"}}});
    let patch = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"],
        "finalizers": ["c"], "labels": {"$patch": "replace", "z": "3"}}});
    assert_eq!(
        strategic(&live, &patch).unwrap(),
        json!({"metadata": {"finalizers": ["b", "c"], "labels": {"z": "3"}}})
    );
    let patch = json!({"metadata": {"labels": {"$patch": "delete"}}});
    assert_eq!(
        strategic(&live, &patch).unwrap(),
        json!({"metadata": {"finalizers": ["a", "b"]}})
    );
}

#[test]
fn broken_patches_are_errors_with_a_path() {
    let live = pod(&json!([{"name": "a"}]));
    let error = strategic(&live, &pod(&json!([{"image": "x"}]))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "spec.containers: an element lacks its merge key \"name\""
    );
    assert!(strategic(&live, &pod(&json!(["a"]))).is_err());
    assert!(strategic(&live, &json!([])).is_err());
    assert!(strategic(&live, &json!({"spec": {"$patch": "explode"}})).is_err());
}

#[test]
fn ports_of_two_protocols_stay_two() {
    let live = json!({"spec": {"ports": [
        {"port": 53, "protocol": "UDP", "name": "dns"}, {"port": 53, "protocol": "TCP", "name": "t"}]}});
    let merged = three_way_apply(&live, &live).unwrap();
    assert_eq!(merged["spec"], live["spec"]);
}

fn manifest() -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "labels": {"a": "1", "b": "2"}},
        "spec": {"replicas": 3, "template": {"spec": {
            "containers": [{"name": "nginx", "image": "nginx:1", "args": ["x"],
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]}],
            "volumes": [{"name": "v", "emptyDir": {}}]}}}
    })
}

#[test]
fn removed_fields_go_and_others_fields_stay() {
    let mut live = with_last_applied(&manifest());
    // Somebody else: a default, a label, an env variable, a scale.
    live["metadata"]["labels"]["theirs"] = json!("x");
    live["spec"]["template"]["spec"]["containers"][0]["imagePullPolicy"] = json!("Always");
    live["spec"]["template"]["spec"]["containers"][0]["env"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "THEIRS", "value": "x"}));
    live["status"] = json!({"replicas": 3});
    let mut new = manifest();
    new["metadata"]["labels"] = json!({"a": "1"});
    new["spec"]["template"]["spec"]["containers"][0]["env"] = json!([{"name": "B", "value": "9"}]);
    new["spec"].as_object_mut().unwrap().remove("replicas");
    new["spec"]["template"]["spec"]["volumes"][0] =
        json!({"name": "v", "configMap": {"name": "c"}});
    let merged = three_way_apply(&live, &new).unwrap();
    assert_eq!(
        merged["metadata"]["labels"],
        json!({"a": "1", "theirs": "x"})
    );
    let container = &merged["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["imagePullPolicy"], "Always");
    assert_eq!(
        container["env"],
        json!([{"name": "B", "value": "9"}, {"name": "THEIRS", "value": "x"}])
    );
    assert!(merged["spec"].get("replicas").is_none());
    assert_eq!(
        merged["spec"]["template"]["spec"]["volumes"],
        json!([{"name": "v", "configMap": {"name": "c"}}])
    );
    assert_eq!(merged["status"], json!({"replicas": 3}));
    assert_eq!(last_applied(&merged), new);
}

#[test]
fn a_switch_to_recreate_drops_the_rolling_parameters() {
    let mut live = with_last_applied(&manifest());
    live["spec"]["strategy"] =
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%"}});
    let mut new = manifest();
    new["spec"]["strategy"] = json!({"type": "Recreate"});
    let merged = three_way_apply(&live, &new).unwrap();
    assert_eq!(merged["spec"]["strategy"], json!({"type": "Recreate"}));
}

#[test]
fn an_annotation_of_others_stays_and_ours_is_no_part_of_itself() {
    let live = with_last_applied(&manifest());
    let again = with_last_applied(&live);
    assert_eq!(
        last_applied(&again),
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "web", "labels": {"a": "1", "b": "2"}, "annotations": {}},
            "spec": manifest()["spec"]
        })
    );
}

fn tree() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        (0i64..4).prop_map(Value::from),
        "[a-c]{0,2}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 30, 4, |inner| {
        let named = prop::collection::btree_map("[a-d]", inner.clone(), 0..4).prop_map(|map| {
            let items = map
                .into_iter()
                .map(|(name, value)| json!({"name": name, "value": value}));
            Value::Array(items.collect())
        });
        let keys = prop::sample::select(vec!["spec", "metadata", "labels", "x", "y", "args"]);
        let map = prop::collection::btree_map(keys, inner.clone(), 0..4);
        prop_oneof![
            (map, prop::option::of(named)).prop_map(|(map, named)| {
                let mut map: Map<String, Value> =
                    map.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
                if let Some(named) = named {
                    map.insert("containers".to_owned(), named);
                }
                Value::Object(map)
            }),
            prop::collection::vec(inner, 0..3).prop_map(Value::from),
        ]
    })
}

fn object() -> impl Strategy<Value = Value> {
    (tree(), "[a-c]{1,3}")
        .prop_map(|(tree, name)| json!({"metadata": {"name": name}, "spec": tree}))
}

proptest! {
    #[test]
    fn applying_twice_changes_nothing(live in object(), first in object(), second in object()) {
        let live = with_last_applied(&live);
        let once = three_way_apply(&live, &first).unwrap();
        prop_assert_eq!(&three_way_apply(&once, &first).unwrap(), &once);
        // From a fresh object the result is the manifest, whatever was applied between.
        let fresh = with_last_applied(&first);
        let there = three_way_apply(&fresh, &second).unwrap();
        let back = three_way_apply(&there, &first).unwrap();
        prop_assert_eq!(back, fresh);
    }

    #[test]
    fn a_strategic_patch_is_idempotent(live in object(), patch in object()) {
        let once = strategic(&live, &patch).unwrap();
        prop_assert_eq!(strategic(&once, &patch).unwrap(), once);
    }

    #[test]
    fn a_json_patch_of_the_difference_is_exact(a in object(), b in object()) {
        let operations = serde_json::to_value(json_patch::diff(&a, &b)).unwrap();
        prop_assert_eq!(json_patch(&a, operations).unwrap(), b);
    }

    #[test]
    fn a_merge_patch_onto_nothing_is_the_value(b in object()) {
        prop_assert_eq!(json_merge(&Value::Null, &b), b);
    }

    #[test]
    fn nothing_panics(live in tree(), patch in tree()) {
        let _ = strategic(&live, &patch);
        let _ = three_way_apply(&live, &patch);
        let _ = json_patch(&live, patch);
    }
}
