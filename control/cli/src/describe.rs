//! `gantry describe`: one object in detail, with the events about it.
//!
//! Labels and layout follow kubectl; a pod also shows where its start went (see the agent's
//! `pods/timeline.rs`).

mod network_policy;
mod pod;
mod policy;
mod storage;
mod text;
mod workload;

use crate::Global;
use crate::connection::{Session, key};
use crate::events;
use crate::failure::Failure;
use crate::names::targets;
use crate::output;
use clap::Args;
use gantry_api::kinds::{Kind, resolve};
use gantry_api::proto::ListRequest;
use gantry_api::table;
use jiff::Timestamp;
use serde_json::Value;
use text::{Text, field, items, label_lines, number};

#[derive(Args, Debug)]
pub(crate) struct Describe {
    /// Types and names: pod web, pod/web, nodes
    #[arg(required = true, value_name = "TYPE|TYPE/NAME")]
    words: Vec<String>,
    /// Label selector
    #[arg(short = 'l', long, default_value = "", hide_default_value = true)]
    selector: String,
    /// All namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
}

/// Events that a description shows.
const EVENTS_MAX: usize = 50;

impl Describe {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let targets = targets(&self.words)?;
        let session = Session::open(global).await?;
        let mut first = true;
        let mut failed = false;
        for target in targets {
            let mut objects = Vec::new();
            for name in &target.names {
                match session.get(session.key(target.kind, name)).await {
                    Ok(object) => objects.push(object),
                    Err(failure @ Failure::Server { .. }) => {
                        eprintln!("{failure}");
                        failed = true;
                    }
                    Err(failure) => return Err(failure),
                }
            }
            if target.names.is_empty() {
                let namespace = if self.all_namespaces {
                    ""
                } else {
                    session.namespace.as_str()
                };
                let request = ListRequest {
                    key: Some(key(target.kind, namespace, "")),
                    label_selector: self.selector.clone(),
                    ..ListRequest::default()
                };
                objects = session.list(request).await?.0;
                if objects.is_empty() {
                    eprintln!("No resources found in {} namespace.", session.namespace);
                }
            }
            for object in objects {
                if !first {
                    output::print("\n\n")?;
                }
                first = false;
                output::print(&describe(&session, target.kind, &object).await?)?;
            }
        }
        if failed {
            Err(Failure::Reported)
        } else {
            Ok(())
        }
    }
}

async fn describe(session: &Session, kind: &Kind, object: &Value) -> Result<String, Failure> {
    let now = Timestamp::now();
    let events = if kind.kind == "Event" {
        Vec::new()
    } else {
        events::about(session, kind, object).await?
    };
    let mut text = Text::default();
    match kind.kind {
        "Pod" => pod::describe(object, &events, &mut text),
        "Node" => {
            let pods = pods_of_node(session, object).await?;
            node(object, &pods, &mut text);
        }
        "Service" => {
            let slices = slices_of_service(session, object).await?;
            service(object, &slices, &mut text);
        }
        "Deployment" => deployment(object, &mut text),
        "ReplicaSet" => replica_set(object, &mut text),
        "DaemonSet" => workload::daemon_set(object, &mut text),
        "StatefulSet" => workload::stateful_set(object, &mut text),
        "ReplicationController" => replica_set(object, &mut text),
        "Job" => workload::job(object, &mut text),
        "CronJob" => workload::cron_job(object, &mut text),
        "PersistentVolumeClaim" => storage::claim(object, &mut text),
        "PersistentVolume" => storage::volume(object, &mut text),
        "NetworkPolicy" => network_policy::describe(object, &mut text),
        "ResourceQuota" => policy::quota(object, &mut text),
        "LimitRange" => policy::limit_range(object, &mut text),
        "HorizontalPodAutoscaler" => {
            common(object, true, &mut text);
            labels(object, &mut text);
            policy::autoscaler(object, &mut text);
        }
        "PodDisruptionBudget" => policy::disruption_budget(object, &mut text),
        "ConfigMap" => config_map(object, &mut text),
        "Secret" => secret(object, &mut text),
        _ => generic(kind, object, &mut text),
    }
    if !["Event", "LimitRange", "ResourceQuota"].contains(&kind.kind) {
        event_lines(&events, now, &mut text);
    }
    Ok(text.finish())
}

fn event_lines(events: &[Value], now: Timestamp, text: &mut Text) {
    if events.is_empty() {
        text.line(0, "Events", "<none>");
        return;
    }
    text.head(0, "Events");
    let header = ["Type", "Reason", "Age", "From", "Message"]
        .map(str::to_owned)
        .to_vec();
    let rule = ["----", "------", "----", "----", "-------"]
        .map(str::to_owned)
        .to_vec();
    let mut rows = vec![header, rule];
    let skipped = events.len().saturating_sub(EVENTS_MAX);
    for event in events.iter().skip(skipped) {
        let (first, last) = table::event_times(event);
        let since = |then: Option<Timestamp>| match then {
            Some(then) => table::human_duration(now.as_second() - then.as_second()),
            None => "<unknown>".to_owned(),
        };
        let count = number(event, "/count").max(number(event, "/series/count"));
        let age = if count > 1 {
            format!("{} (x{count} over {})", since(last), since(first))
        } else {
            since(last)
        };
        let from = match field(event, "/source/component") {
            "" => field(event, "/reportingComponent"),
            component => component,
        };
        let text = |pointer| field(event, pointer).trim().to_owned();
        rows.push(vec![
            text("/type"),
            text("/reason"),
            age,
            from.to_owned(),
            text("/message"),
        ]);
    }
    text.table(2, &rows);
}

fn common(object: &Value, namespaced: bool, text: &mut Text) {
    text.line(0, "Name", field(object, "/metadata/name"));
    if namespaced {
        text.line(0, "Namespace", field(object, "/metadata/namespace"));
    }
}

fn labels(object: &Value, text: &mut Text) {
    text.lines(
        0,
        "Labels",
        &label_lines(object.pointer("/metadata/labels")),
    );
    text.lines(0, "Annotations", &text::annotation_lines(object));
}

async fn pods_of_node(session: &Session, node: &Value) -> Result<Vec<Value>, Failure> {
    let pods = resolve("pods").ok_or_else(|| Failure::local("this build does not know pods"))?;
    let request = ListRequest {
        key: Some(key(pods, "", "")),
        field_selector: format!("spec.nodeName={}", field(node, "/metadata/name")),
        ..ListRequest::default()
    };
    Ok(session.list(request).await?.0)
}

fn node(object: &Value, pods: &[Value], text: &mut Text) {
    common(object, false, text);
    let row = resolve("nodes").map(|kind| table::row(kind, object, Timestamp::now(), false, false));
    let roles = row
        .and_then(|row| row.cells.get(2).cloned())
        .unwrap_or_default();
    text.line(0, "Roles", &roles);
    labels(object, text);
    text.line(
        0,
        "CreationTimestamp",
        field(object, "/metadata/creationTimestamp"),
    );
    text.lines(0, "Taints", &text::taint_lines(object));
    let unschedulable = object.pointer("/spec/unschedulable") == Some(&Value::Bool(true));
    text.line(
        0,
        "Unschedulable",
        if unschedulable { "true" } else { "false" },
    );
    text.head(0, "Conditions");
    let header = [
        "Type",
        "Status",
        "LastHeartbeatTime",
        "LastTransitionTime",
        "Reason",
        "Message",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for condition in items(object, "/status/conditions") {
        let cells = [
            "/type",
            "/status",
            "/lastHeartbeatTime",
            "/lastTransitionTime",
            "/reason",
            "/message",
        ];
        rows.push(
            cells
                .map(|pointer| field(condition, pointer).to_owned())
                .to_vec(),
        );
    }
    text.table(2, &rows);
    text.head(0, "Addresses");
    for address in items(object, "/status/addresses") {
        text.line(2, field(address, "/type"), field(address, "/address"));
    }
    for (title, pointer) in [
        ("Capacity", "/status/capacity"),
        ("Allocatable", "/status/allocatable"),
    ] {
        text.head(0, title);
        for (name, value) in object
            .pointer(pointer)
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            text.line(2, name, value.as_str().unwrap_or_default());
        }
    }
    text.head(0, "System Info");
    let info = object
        .pointer("/status/nodeInfo")
        .and_then(Value::as_object);
    for (name, value) in info.into_iter().flatten() {
        text.line(2, name, value.as_str().unwrap_or_default());
    }
    text.line(0, "PodCIDR", field(object, "/spec/podCIDR"));
    text.line(
        0,
        "Non-terminated Pods",
        &format!("({} in total)", pods.len()),
    );
    let header = ["Namespace", "Name", "CPU Requests", "Memory Requests"].map(str::to_owned);
    let mut rows = vec![header.to_vec()];
    for pod in pods {
        let namespace = field(pod, "/metadata/namespace").to_owned();
        let name = field(pod, "/metadata/name").to_owned();
        rows.push(vec![
            namespace,
            name,
            pod::requested(pod, "cpu"),
            pod::requested(pod, "memory"),
        ]);
    }
    text.table(2, &rows);
}

async fn slices_of_service(session: &Session, service: &Value) -> Result<Vec<Value>, Failure> {
    let slices = resolve("endpointslices")
        .ok_or_else(|| Failure::local("this build does not know EndpointSlices"))?;
    let request = ListRequest {
        key: Some(key(slices, field(service, "/metadata/namespace"), "")),
        label_selector: format!(
            "kubernetes.io/service-name={}",
            field(service, "/metadata/name")
        ),
        ..ListRequest::default()
    };
    Ok(session.list(request).await?.0)
}

fn service(object: &Value, slices: &[Value], text: &mut Text) {
    common(object, true, text);
    labels(object, text);
    text.line(
        0,
        "Selector",
        &table::labels_text(object.pointer("/spec/selector")),
    );
    text.line(0, "Type", field(object, "/spec/type"));
    text.line(0, "IP Family Policy", field(object, "/spec/ipFamilyPolicy"));
    let join = |pointer: &str| -> String {
        items(object, pointer)
            .iter()
            .filter_map(Value::as_str)
            .collect::<Vec<_>>()
            .join(",")
    };
    text.line(0, "IP Families", &join("/spec/ipFamilies"));
    text.line(0, "IP", field(object, "/spec/clusterIP"));
    text.line(0, "IPs", &join("/spec/clusterIPs"));
    for port in items(object, "/spec/ports") {
        let name = match field(port, "/name") {
            "" => "<unset>",
            name => name,
        };
        let protocol = field(port, "/protocol");
        text.line(
            0,
            "Port",
            &format!("{name}  {}/{protocol}", number(port, "/port")),
        );
        let target = port.get("targetPort").map(text::scalar).unwrap_or_default();
        text.line(0, "TargetPort", &format!("{target}/{protocol}"));
        if number(port, "/nodePort") > 0 {
            let node_port = number(port, "/nodePort");
            text.line(0, "NodePort", &format!("{name}  {node_port}/{protocol}"));
        }
        text.line(0, "Endpoints", &endpoints(port, slices));
    }
    text.line(
        0,
        "Session Affinity",
        field(object, "/spec/sessionAffinity"),
    );
    text.line(
        0,
        "Internal Traffic Policy",
        field(object, "/spec/internalTrafficPolicy"),
    );
}

/// Ready endpoints of one port, as `address:port`.
fn endpoints(port: &Value, slices: &[Value]) -> String {
    let mut shown = Vec::new();
    for slice in slices {
        let own = items(slice, "/ports")
            .iter()
            .find(|p| field(p, "/name") == field(port, "/name"))
            .map_or(0, |p| number(p, "/port"));
        for endpoint in items(slice, "/endpoints") {
            if endpoint.pointer("/conditions/ready") == Some(&Value::Bool(false)) {
                continue;
            }
            for address in items(endpoint, "/addresses")
                .iter()
                .filter_map(Value::as_str)
            {
                shown.push(if address.contains(':') {
                    format!("[{address}]:{own}")
                } else {
                    format!("{address}:{own}")
                });
            }
        }
    }
    match shown.len() {
        0 => "<none>".to_owned(),
        1..=3 => shown.join(","),
        count => format!("{} + {} more...", shown[..3].join(","), count - 3),
    }
}

fn selector_text(object: &Value) -> String {
    table::labels_text(object.pointer("/spec/selector/matchLabels"))
}

fn deployment(object: &Value, text: &mut Text) {
    common(object, true, text);
    text.line(
        0,
        "CreationTimestamp",
        field(object, "/metadata/creationTimestamp"),
    );
    labels(object, text);
    text.line(0, "Selector", &selector_text(object));
    let status = |name: &str| number(object, &format!("/status/{name}"));
    text.line(
        0,
        "Replicas",
        &format!(
            "{} desired | {} updated | {} total | {} available | {} unavailable",
            number(object, "/spec/replicas"),
            status("updatedReplicas"),
            status("replicas"),
            status("availableReplicas"),
            status("unavailableReplicas"),
        ),
    );
    text.line(0, "StrategyType", field(object, "/spec/strategy/type"));
    text.line(
        0,
        "MinReadySeconds",
        &number(object, "/spec/minReadySeconds").to_string(),
    );
    if let Some(rolling) = object.pointer("/spec/strategy/rollingUpdate") {
        let part = |name: &str| rolling.get(name).map(text::scalar).unwrap_or_default();
        let shown = format!(
            "{} max unavailable, {} max surge",
            part("maxUnavailable"),
            part("maxSurge")
        );
        text.line(0, "RollingUpdateStrategy", &shown);
    }
    pod::template(object, text);
    text::conditions(object, &["Type", "Status", "Reason"], text);
}

fn replica_set(object: &Value, text: &mut Text) {
    common(object, true, text);
    text.line(0, "Selector", &selector_text(object));
    labels(object, text);
    text.line(0, "Controlled By", &text::controller(object));
    let current = number(object, "/status/replicas");
    let desired = number(object, "/spec/replicas");
    text.line(
        0,
        "Replicas",
        &format!("{current} current / {desired} desired"),
    );
    pod::template(object, text);
}

fn config_map(object: &Value, text: &mut Text) {
    common(object, true, text);
    labels(object, text);
    text.blank();
    text.raw("Data\n====\n");
    for (key, value) in object
        .pointer("/data")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        let value = value.as_str().unwrap_or_default().trim_end_matches('\n');
        text.raw(&format!("{key}:\n----\n{value}\n\n"));
    }
    let binary = object.pointer("/binaryData").and_then(Value::as_object);
    for (key, value) in binary.into_iter().flatten() {
        let bytes = value.as_str().map_or(0, text::base64_len);
        text.raw(&format!("{key}: {bytes} bytes\n\n"));
    }
}

/// Sizes only: a description ends up in chats and tickets.
fn secret(object: &Value, text: &mut Text) {
    common(object, true, text);
    labels(object, text);
    text.line(0, "Type", field(object, "/type"));
    text.blank();
    text.raw("Data\n====\n");
    for (key, value) in object
        .pointer("/data")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        let bytes = value.as_str().map_or(0, text::base64_len);
        text.raw(&format!("{key}:  {bytes} bytes\n"));
    }
}

fn generic(kind: &Kind, object: &Value, text: &mut Text) {
    common(object, kind.namespaced, text);
    labels(object, text);
    text.line(0, "API Version", &kind.api_version());
    text.line(0, "Kind", kind.kind);
    let hidden = ["apiVersion", "kind", "metadata"];
    let mut rest = object.clone();
    if let Some(map) = rest.as_object_mut() {
        map.retain(|key, _| !hidden.contains(&key.as_str()));
    }
    if rest.as_object().is_some_and(|map| !map.is_empty()) {
        text.raw(&gantry_api::manifest::to_yaml(&rest));
    }
}

#[cfg(test)]
mod tests;
