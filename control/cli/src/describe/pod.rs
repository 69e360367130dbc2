//! Pods and pod templates in detail.

use super::text::{Text, conditions, controller, field, items, label_lines, number, scalar};
use gantry_api::quantity::Quantity;
use gantry_api::table;
use serde_json::Value;

pub(super) fn describe(pod: &Value, events: &[Value], text: &mut Text) {
    super::common(pod, true, text);
    let node = match (field(pod, "/spec/nodeName"), field(pod, "/status/hostIP")) {
        ("", _) => "<none>".to_owned(),
        (node, "") => node.to_owned(),
        (node, ip) => format!("{node}/{ip}"),
    };
    text.line(0, "Node", &node);
    text.line(0, "Start Time", field(pod, "/status/startTime"));
    super::labels(pod, text);
    let summary = table::pod_summary(pod);
    if pod
        .pointer("/metadata/deletionTimestamp")
        .is_some_and(|t| !t.is_null())
    {
        let grace = number(pod, "/metadata/deletionGracePeriodSeconds");
        let since = field(pod, "/metadata/deletionTimestamp");
        text.line(0, "Status", &format!("Terminating (since {since})"));
        text.line(0, "Termination Grace Period", &format!("{grace}s"));
    } else {
        text.line(0, "Status", &summary.status);
    }
    text.line(0, "Reason", field(pod, "/status/reason"));
    text.line(0, "Message", field(pod, "/status/message"));
    text.line(0, "IP", field(pod, "/status/podIP"));
    let ips: Vec<String> = items(pod, "/status/podIPs")
        .iter()
        .map(|ip| field(ip, "/ip").to_owned())
        .collect();
    text.line(0, "IPs", &ips.join(", "));
    text.line(0, "Controlled By", &controller(pod));
    // What the agent measured, told once per pod.
    let timeline = events
        .iter()
        .rev()
        .find(|e| field(e, "/reason") == "Timeline");
    text.line(
        0,
        "Start Timeline",
        timeline.map(|e| field(e, "/message")).unwrap_or_default(),
    );
    start_steps(pod, text);
    containers(pod, "/spec", "/status", text);
    conditions(pod, &["Type", "Status", "Reason", "Message"], text);
    volumes(items(pod, "/spec/volumes"), text);
    text.line(0, "QoS Class", field(pod, "/status/qosClass"));
    text.lines(
        0,
        "Node-Selectors",
        &label_lines(pod.pointer("/spec/nodeSelector")),
    );
}

/// When each step of the start happened, from what the status says.
fn start_steps(pod: &Value, text: &mut Text) {
    let created = field(pod, "/metadata/creationTimestamp");
    let condition = |kind: &str| {
        let all = items(pod, "/status/conditions");
        let found = all
            .iter()
            .find(|c| field(c, "/type") == kind && field(c, "/status") == "True");
        found
            .map(|c| field(c, "/lastTransitionTime"))
            .unwrap_or_default()
    };
    let started = items(pod, "/status/containerStatuses")
        .iter()
        .map(|c| field(c, "/state/running/startedAt"))
        .filter(|time| !time.is_empty())
        .max()
        .unwrap_or_default();
    let steps: Vec<String> = [
        ("created", created),
        ("scheduled", condition("PodScheduled")),
        ("accepted", field(pod, "/status/startTime")),
        ("started", started),
        ("ready", condition("Ready")),
    ]
    .iter()
    .filter(|(_, time)| !time.is_empty())
    .map(|(step, time)| format!("{step} {}", clock(time)))
    .collect();
    text.line(0, "Start", &steps.join(", "));
}

/// `12:01:02Z` of `2026-01-01T12:01:02Z`.
fn clock(time: &str) -> &str {
    time.split_once('T').map_or(time, |(_, clock)| clock)
}

pub(super) fn template(owner: &Value, text: &mut Text) {
    let Some(template) = owner.pointer("/spec/template") else {
        return;
    };
    text.head(0, "Pod Template");
    text.lines(
        2,
        "Labels",
        &label_lines(template.pointer("/metadata/labels")),
    );
    containers(template, "/spec", "/none", text);
    volumes(items(template, "/spec/volumes"), text);
}

fn containers(owner: &Value, spec: &str, status: &str, text: &mut Text) {
    for (title, list, statuses) in [
        ("Init Containers", "initContainers", "initContainerStatuses"),
        ("Containers", "containers", "containerStatuses"),
        (
            "Ephemeral Containers",
            "ephemeralContainers",
            "ephemeralContainerStatuses",
        ),
    ] {
        let all = items(owner, &format!("{spec}/{list}"));
        if all.is_empty() {
            continue;
        }
        text.head(0, title);
        let statuses = items(owner, &format!("{status}/{statuses}"));
        for container in all {
            let name = field(container, "/name");
            let status = statuses.iter().find(|s| field(s, "/name") == name);
            self::container(container, status, text);
        }
    }
}

fn container(container: &Value, status: Option<&Value>, text: &mut Text) {
    text.head(2, field(container, "/name"));
    if let Some(status) = status {
        text.line(4, "Container ID", field(status, "/containerID"));
    }
    text.line(4, "Image", field(container, "/image"));
    if let Some(status) = status {
        text.line(4, "Image ID", field(status, "/imageID"));
    }
    let ports: Vec<String> = items(container, "/ports")
        .iter()
        .map(|p| format!("{}/{}", number(p, "/containerPort"), field(p, "/protocol")))
        .collect();
    text.line(4, "Ports", &ports.join(", "));
    for (label, pointer) in [("Command", "/command"), ("Args", "/args")] {
        let words: Vec<String> = items(container, pointer).iter().map(scalar).collect();
        text.line(4, label, &words.join(" "));
    }
    if let Some(status) = status {
        state("State", status.get("state"), text);
        if status
            .pointer("/lastState")
            .and_then(Value::as_object)
            .is_some_and(|s| !s.is_empty())
        {
            state("Last State", status.get("lastState"), text);
        }
        let ready = status.get("ready") == Some(&Value::Bool(true));
        text.line(4, "Ready", if ready { "True" } else { "False" });
        text.line(
            4,
            "Restart Count",
            &number(status, "/restartCount").to_string(),
        );
    }
    for (label, pointer) in [
        ("Limits", "/resources/limits"),
        ("Requests", "/resources/requests"),
    ] {
        let map = container.pointer(pointer).and_then(Value::as_object);
        let parts: Vec<String> = map
            .into_iter()
            .flatten()
            .map(|(k, v)| format!("{k} {}", scalar(v)))
            .collect();
        text.line(4, label, &parts.join(", "));
    }
    for (label, pointer) in [
        ("Liveness", "/livenessProbe"),
        ("Readiness", "/readinessProbe"),
        ("Startup", "/startupProbe"),
    ] {
        text.line(
            4,
            label,
            &container.pointer(pointer).map(probe).unwrap_or_default(),
        );
    }
    for (label, pointer) in [
        ("Post Start", "/lifecycle/postStart"),
        ("Pre Stop", "/lifecycle/preStop"),
    ] {
        text.line(
            4,
            label,
            &container.pointer(pointer).map(action).unwrap_or_default(),
        );
    }
    text.line(
        4,
        "Target Container",
        field(container, "/targetContainerName"),
    );
    if field(container, "/restartPolicy") == "Always" {
        text.line(4, "Restart Policy", "Always (sidecar)");
    }
    let environment: Vec<String> = items(container, "/env").iter().map(variable).collect();
    text.lines(4, "Environment", &environment);
    let mounts: Vec<String> = items(container, "/volumeMounts")
        .iter()
        .map(|mount| {
            let read_only = mount.get("readOnly") == Some(&Value::Bool(true));
            let mode = if read_only { "ro" } else { "rw" };
            format!(
                "{} from {} ({mode})",
                field(mount, "/mountPath"),
                field(mount, "/name")
            )
        })
        .collect();
    text.lines(4, "Mounts", &mounts);
}

fn state(label: &str, state: Option<&Value>, text: &mut Text) {
    let Some(state) = state else { return };
    if let Some(running) = state.get("running") {
        text.line(4, label, "Running");
        text.line(6, "Started", field(running, "/startedAt"));
    } else if let Some(ended) = state.get("terminated") {
        text.line(4, label, "Terminated");
        text.line(6, "Reason", field(ended, "/reason"));
        text.line(6, "Message", field(ended, "/message"));
        text.line(6, "Exit Code", &number(ended, "/exitCode").to_string());
        text.line(6, "Started", field(ended, "/startedAt"));
        text.line(6, "Finished", field(ended, "/finishedAt"));
    } else {
        text.line(4, label, "Waiting");
        let waiting = state.get("waiting").unwrap_or(&Value::Null);
        text.line(6, "Reason", field(waiting, "/reason"));
        text.line(6, "Message", field(waiting, "/message"));
    }
}

/// What a probe or a hook does.
fn action(probe: &Value) -> String {
    if let Some(http) = probe.get("httpGet") {
        let scheme = field(http, "/scheme").to_lowercase();
        let port = http.get("port").map(scalar).unwrap_or_default();
        format!(
            "http-get {scheme}://{}:{port}{}",
            field(http, "/host"),
            field(http, "/path")
        )
    } else if let Some(tcp) = probe.get("tcpSocket") {
        let port = tcp.get("port").map(scalar).unwrap_or_default();
        format!("tcp-socket {}:{port}", field(tcp, "/host"))
    } else if let Some(grpc) = probe.get("grpc") {
        let port = number(grpc, "/port");
        format!("grpc <pod>:{port} {}", field(grpc, "/service"))
            .trim_end()
            .to_owned()
    } else if let Some(sleep) = probe.get("sleep") {
        format!("sleep {}s", number(sleep, "/seconds"))
    } else {
        let words: Vec<String> = items(probe, "/exec/command").iter().map(scalar).collect();
        format!("exec [{}]", words.join(" "))
    }
}

fn probe(probe: &Value) -> String {
    let what = action(probe);
    let seconds = |name: &str| number(probe, &format!("/{name}"));
    format!(
        "{what} delay={}s timeout={}s period={}s #success={} #failure={}",
        seconds("initialDelaySeconds"),
        seconds("timeoutSeconds"),
        seconds("periodSeconds"),
        seconds("successThreshold"),
        seconds("failureThreshold"),
    )
}

fn variable(variable: &Value) -> String {
    let name = field(variable, "/name");
    let Some(from) = variable.get("valueFrom") else {
        return format!("{name}: {}", field(variable, "/value"));
    };
    let of = |kind: &str, pointer: &str| {
        let source = from.get(pointer)?;
        let (key, object) = (field(source, "/key"), field(source, "/name"));
        Some(format!(
            "{name}: <set to the key '{key}' in {kind} '{object}'>"
        ))
    };
    of("secret", "secretKeyRef")
        .or_else(|| of("config map", "configMapKeyRef"))
        .unwrap_or_else(|| format!("{name}: ({})", field(from, "/fieldRef/fieldPath")))
}

fn volumes(volumes: &[Value], text: &mut Text) {
    if volumes.is_empty() {
        return;
    }
    text.head(0, "Volumes");
    for volume in volumes {
        text.head(2, field(volume, "/name"));
        let source = volume
            .as_object()
            .into_iter()
            .flatten()
            .find(|(key, _)| *key != "name");
        let Some((kind, source)) = source else {
            continue;
        };
        let (kind, pointer, label) = match kind.as_str() {
            "configMap" => (
                "ConfigMap (a volume populated by a ConfigMap)",
                "/name",
                "Name",
            ),
            "secret" => (
                "Secret (a volume populated by a Secret)",
                "/secretName",
                "SecretName",
            ),
            "hostPath" => ("HostPath (bare host directory volume)", "/path", "Path"),
            "emptyDir" => (
                "EmptyDir (a temporary directory that shares a pod's lifetime)",
                "/medium",
                "Medium",
            ),
            other => (other, "/name", "Name"),
        };
        text.line(4, "Type", kind);
        text.line(4, label, field(source, pointer));
    }
}

/// The sum of what the containers request of a resource.
pub(super) fn requested(pod: &Value, resource: &str) -> String {
    items(pod, "/spec/containers")
        .iter()
        .filter_map(|c| Quantity::parse(field(c, &format!("/resources/requests/{resource}"))).ok())
        .reduce(Quantity::plus)
        .map_or_else(|| "0".to_owned(), |sum| sum.to_string())
}
