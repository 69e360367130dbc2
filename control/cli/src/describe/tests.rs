use super::*;
use serde_json::json;

#[test]
fn a_pod_shows_its_reasons_and_timeline() {
    let pod = json!({
        "metadata": {"name": "web", "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": "web", "tier": "a"},
            "ownerReferences": [{"kind": "ReplicaSet", "name": "web-1", "controller": true}]},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "nginx:1",
                "env": [{"name": "P", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
                "resources": {"requests": {"cpu": "250m"}}}],
            "volumes": [{"name": "v", "configMap": {"name": "m"}}]},
        "status": {"phase": "Pending", "containerStatuses": [{"name": "c", "ready": false,
            "restartCount": 2, "state": {"waiting": {"reason": "CreateContainerConfigError",
            "message": "configmap \"m\" not found"}}}]}
    });
    let events = [json!({"reason": "Timeline", "message": "running after 31.0 ms: network 3.1"})];
    let mut text = Text::default();
    pod::describe(&pod, &events, &mut text);
    let text = text.finish();
    for line in [
        "Name:            web\n",
        "Labels:          app=web\n                 tier=a\n",
        "Controlled By:   ReplicaSet/web-1\n",
        "Start Timeline:  running after 31.0 ms: network 3.1\n",
        "Status:          CreateContainerConfigError\n",
        "      Message:  configmap \"m\" not found\n",
        "P: <set to the key 'k' in secret 's'>",
        "ConfigMap (a volume populated by a ConfigMap)",
    ] {
        assert!(text.contains(line), "{line:?} in\n{text}");
    }
}

#[test]
fn events_are_a_table_with_counts() {
    let events = [
        json!({"type": "Warning", "reason": "BackOff", "message": "m", "count": 3,
        "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:01:00Z",
        "source": {"component": "gantry-agent"}}),
    ];
    let mut text = Text::default();
    event_lines(&events, "2026-01-01T00:02:00Z".parse().unwrap(), &mut text);
    let text = text.finish();
    assert!(
        text.contains("Warning   BackOff   60s (x3 over 2m)   gantry-agent   m"),
        "{text}"
    );
    let mut text = Text::default();
    event_lines(&[], Timestamp::UNIX_EPOCH, &mut text);
    assert_eq!(text.finish(), "Events:  <none>\n");
}

#[test]
fn any_object_can_be_described_without_its_fields() {
    for describe in [deployment, replica_set, config_map, secret] {
        let mut text = Text::default();
        describe(&json!({}), &mut text);
        text.finish();
    }
    let mut text = Text::default();
    pod::describe(&json!({}), &[], &mut text);
    node(&json!({}), &[], &mut text);
    service(&json!({}), &[], &mut text);
    text.finish();
}

#[test]
fn a_secrets_values_stay_secret() {
    let mut text = Text::default();
    secret(
        &json!({"metadata": {"name": "s"}, "data": {"k": "c2VjcmV0"}}),
        &mut text,
    );
    assert!(text.finish().contains("k:  6 bytes"));
}

#[test]
fn endpoints_show_what_is_ready() {
    let slices = [json!({"ports": [{"name": "", "port": 8080}], "endpoints": [
        {"addresses": ["10.0.0.1"]},
        {"addresses": ["10.0.0.2"], "conditions": {"ready": false}},
        {"addresses": ["fd00::1"], "conditions": {"ready": true}}]})];
    assert_eq!(
        endpoints(&json!({"port": 80}), &slices),
        "10.0.0.1:8080,[fd00::1]:8080"
    );
    assert_eq!(endpoints(&json!({"port": 80}), &[]), "<none>");
}
