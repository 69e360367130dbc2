use super::*;
use crate::kinds::{KINDS, resolve};
use proptest::prelude::*;
use serde_json::json;

fn now() -> Timestamp {
    "2026-01-01T01:00:00Z".parse().unwrap()
}

fn cells(word: &str, object: &Value, wide: bool) -> Vec<String> {
    row(resolve(word).unwrap(), object, now(), wide, false).cells
}

fn pod(status: &Value) -> Value {
    json!({
        "metadata": {"name": "a", "namespace": "d", "creationTimestamp": "2026-01-01T00:55:00Z"},
        "spec": {"containers": [{"name": "c"}, {"name": "d"}], "initContainers": [{"name": "i"}],
            "nodeName": "n1"},
        "status": status
    })
}

#[test]
fn durations_read_like_kubectl() {
    for (seconds, text) in [
        (-5, "<invalid>"),
        (-1, "0s"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (192, "3m12s"),
        (600, "10m"),
        (10_799, "179m"),
        (10_800, "3h"),
        (11_520, "3h12m"),
        (8 * 3600 + 60, "8h"),
        (49 * 3600, "2d1h"),
        (8 * 86_400, "8d"),
        (800 * 86_400, "2y70d"),
        (4000 * 86_400, "10y"),
    ] {
        assert_eq!(human_duration(seconds), text, "{seconds}");
    }
}

#[test]
fn a_policy_shows_whom_it_is_about() {
    let mut policy = json!({"metadata": {"name": "p", "creationTimestamp": "2026-01-01T00:55:00Z"},
        "spec": {"podSelector": {"matchLabels": {"app": "db"}}}});
    assert_eq!(cells("netpol", &policy, false), ["p", "app=db", "5m"]);
    policy["spec"]["podSelector"] = json!({});
    assert_eq!(cells("netpol", &policy, false)[1], "<none>");
}

#[test]
fn quotas_and_budgets_show_what_is_left() {
    let quota = json!({"metadata": {"name": "q", "creationTimestamp": "2026-01-01T00:55:00Z"},
        "status": {"hard": {"pods": "4", "limits.cpu": "2"}, "used": {"pods": "1"}}});
    assert_eq!(
        cells("quota", &quota, false),
        ["q", "pods: 1/4", "limits.cpu: 0/2", "5m"]
    );
    let budget = json!({"metadata": {"name": "b", "creationTimestamp": "2026-01-01T00:55:00Z"},
        "spec": {"maxUnavailable": "25%"}, "status": {"disruptionsAllowed": 1}});
    assert_eq!(cells("pdb", &budget, false), ["b", "N/A", "25%", "1", "5m"]);
}

#[test]
fn an_autoscaler_shows_what_it_aims_at() {
    let metric = |name: &str, target: Value| json!({"type": "Resource", "resource": {"name": name, "target": target}});
    let scaler = json!({"metadata": {"name": "s", "creationTimestamp": "2026-01-01T00:55:00Z"},
        "spec": {"minReplicas": 2, "maxReplicas": 9,
            "scaleTargetRef": {"kind": "Deployment", "name": "web"}, "metrics": [
            metric("cpu", json!({"averageUtilization": 80})),
            metric("memory", json!({"averageValue": "64Mi"}))]},
        "status": {"currentReplicas": 3, "currentMetrics": [
            {"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": 12}}}]}});
    assert_eq!(
        cells("hpa", &scaler, false),
        [
            "s",
            "Deployment/web",
            "cpu: 12%/80%, memory: <unknown>/64Mi",
            "2",
            "9",
            "3",
            "5m"
        ]
    );
}

#[test]
fn pod_status_follows_the_containers() {
    let running = |ready| json!({"ready": ready, "restartCount": 0, "state": {"running": {}}});
    let state = |state: Value| {
        json!({"ready": false, "restartCount": 2, "state": state,
        "lastState": {"terminated": {"finishedAt": "2026-01-01T00:59:00Z"}}})
    };
    for (status, expected) in [
        (json!({"phase": "Pending"}), ["0/2", "Pending", "0"]),
        (
            json!({"phase": "Running", "containerStatuses": [running(true), running(true)]}),
            ["2/2", "Running", "0"],
        ),
        (
            json!({"phase": "Pending", "containerStatuses":
                [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}),
            ["0/2", "ContainerCreating", "0"],
        ),
        (
            json!({"phase": "Running", "containerStatuses":
                [running(true), state(json!({"waiting": {"reason": "CrashLoopBackOff"}}))]}),
            ["1/2", "CrashLoopBackOff", "2 (60s ago)"],
        ),
        (
            json!({"phase": "Failed", "containerStatuses":
                [state(json!({"terminated": {"exitCode": 3}}))]}),
            ["0/2", "ExitCode:3", "2 (60s ago)"],
        ),
        (
            json!({"phase": "Running",
                "conditions": [{"type": "Ready", "status": "True"}], "containerStatuses":
                [state(json!({"terminated": {"exitCode": 0, "reason": "Completed"}})), running(true)]}),
            ["1/2", "Running", "2 (60s ago)"],
        ),
        (
            json!({"phase": "Pending", "initContainerStatuses": [{"state": {"running": {}}}]}),
            ["0/2", "Init:0/1", "0"],
        ),
        (
            json!({"phase": "Pending", "initContainerStatuses":
                [{"restartCount": 1, "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}]}),
            ["0/2", "Init:Error", "1"],
        ),
        (
            json!({"phase": "Failed", "reason": "Evicted"}),
            ["0/2", "Evicted", "0"],
        ),
    ] {
        let cells = cells("po", &pod(&status), false);
        assert_eq!(cells[0], "a");
        assert_eq!(cells[1..4], expected, "{status}");
        assert_eq!(cells[4], "5m");
    }
}

#[test]
fn a_deleted_pod_is_terminating_until_it_has_ended() {
    let mut object = pod(&json!({"phase": "Running"}));
    object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:59:00Z");
    assert_eq!(cells("po", &object, false)[2], "Terminating");
    object["status"]["phase"] = json!("Succeeded");
    assert_eq!(cells("po", &object, false)[2], "Succeeded");
}

#[test]
fn services_and_nodes_read_like_kubectl() {
    let service = json!({"metadata": {"name": "web"}, "spec": {"type": "NodePort",
        "clusterIP": "10.96.0.1", "selector": {"app": "web"},
        "ports": [{"port": 80, "nodePort": 31940, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}});
    assert_eq!(
        cells("svc", &service, true),
        [
            "web",
            "NodePort",
            "10.96.0.1",
            "<none>",
            "80:31940/TCP,53/UDP",
            "<unknown>",
            "app=web"
        ]
    );
    let node = json!({"metadata": {"name": "n", "labels": {
            "node-role.kubernetes.io/control-plane": "", "node-role.kubernetes.io/": ""}},
        "spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
            "nodeInfo": {"kubeletVersion": "v0.1.0"}}});
    assert_eq!(
        cells("no", &node, false),
        [
            "n",
            "Ready,SchedulingDisabled",
            "control-plane",
            "<unknown>",
            "v0.1.0"
        ]
    );
    assert_eq!(cells("no", &node, true)[5], "10.0.0.1");
}

#[test]
fn endpoints_and_events_read_like_kubectl() {
    let endpoints: Vec<Value> = (1..=5)
        .map(|i| json!({"addresses": [format!("10.0.0.{i}")]}))
        .collect();
    let slice = json!({"metadata": {"name": "web-x"}, "addressType": "IPv4",
        "ports": [{"port": 80}], "endpoints": endpoints});
    assert_eq!(
        cells("endpointslices", &slice, false)[3],
        "10.0.0.1,10.0.0.2,10.0.0.3 + 2 more..."
    );
    let event = json!({"metadata": {"name": "e"}, "type": "Normal", "reason": "Started",
        "message": "Started container\n", "lastTimestamp": "2026-01-01T00:59:30Z",
        "involvedObject": {"kind": "Pod", "name": "web"}});
    assert_eq!(
        cells("ev", &event, false),
        ["30s", "Normal", "Started", "pod/web", "Started container"]
    );
}

#[test]
fn every_row_has_a_cell_per_column() {
    for kind in KINDS {
        for (wide, namespace) in [(false, false), (true, false), (true, true)] {
            let row = row(kind, &json!({}), now(), wide, namespace);
            assert_eq!(
                row.cells.len(),
                columns(kind, wide, namespace).len(),
                "{}",
                kind.kind
            );
        }
    }
}

proptest! {
    #[test]
    fn durations_never_panic(seconds in any::<i64>()) {
        prop_assert!(!human_duration(seconds).is_empty());
    }
}
