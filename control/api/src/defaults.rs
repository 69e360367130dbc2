//! What an object means where it says nothing: Kubernetes' defaulting for the kinds of Gantry.
//!
//! Idempotent: applying it twice changes nothing (a property test in `admission`). Fields that
//! Gantry does not honour yet (`enableServiceLinks`, …) get no default, so that an object never
//! claims more than was asked for. Source: Kubernetes' `pkg/apis/{core,apps}/v1/defaults.go`.

mod autoscaler;
mod limits;
mod storage;
mod workload;

pub use autoscaler::horizontal_pod_autoscaler;
pub use limits::limit_range;
pub use storage::{persistent_volume, persistent_volume_claim, priority_class, storage_class};
pub use workload::{cron_job, daemon_set, job, replication_controller, stateful_set};

use k8s_openapi::api::apps::v1::{
    Deployment, DeploymentStrategy, ReplicaSet, RollingUpdateDeployment,
};
use k8s_openapi::api::core::v1::{
    Container, EmptyDirVolumeSource, Pod, PodSpec, Probe, Secret, Service, ServicePort, Volume,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// Mode of files in configMap and secret volumes: 0644.
const FILE_MODE: i32 = 0o644;
/// Seconds a client stays with its backend under `sessionAffinity: ClientIP`: 3 hours.
const AFFINITY_TIMEOUT_S: i32 = 10_800;

fn text(value: &mut Option<String>, default: &str) {
    if value.as_ref().is_none_or(String::is_empty) {
        *value = Some(default.to_owned());
    }
}

/// Defaults of a Pod.
pub fn pod(pod: &mut Pod) {
    if let Some(spec) = &mut pod.spec {
        pod_spec(spec);
    }
}

/// Defaults of a PodSpec, in a Pod or in a template.
pub fn pod_spec(spec: &mut PodSpec) {
    text(&mut spec.restart_policy, "Always");
    text(&mut spec.dns_policy, "ClusterFirst");
    text(&mut spec.scheduler_name, "default-scheduler");
    spec.termination_grace_period_seconds.get_or_insert(30);
    spec.security_context.get_or_insert_default();
    // The two names of one field follow each other.
    if spec.service_account_name.is_none() {
        spec.service_account_name.clone_from(&spec.service_account);
    }
    let host_network = spec.host_network == Some(true);
    let init = spec.init_containers.iter_mut().flatten();
    for container in spec.containers.iter_mut().chain(init) {
        self::container(container, host_network);
    }
    for one in spec.ephemeral_containers.iter_mut().flatten() {
        let policy = pull_policy(one.image.as_deref().unwrap_or_default());
        text(&mut one.image_pull_policy, policy);
        text(&mut one.termination_message_path, "/dev/termination-log");
        text(&mut one.termination_message_policy, "File");
    }
    for volume in spec.volumes.iter_mut().flatten() {
        self::volume(volume);
    }
}

fn container(container: &mut Container, host_network: bool) {
    let policy = pull_policy(container.image.as_deref().unwrap_or_default());
    text(&mut container.image_pull_policy, policy);
    text(
        &mut container.termination_message_path,
        "/dev/termination-log",
    );
    text(&mut container.termination_message_policy, "File");
    for port in container.ports.iter_mut().flatten() {
        text(&mut port.protocol, "TCP");
        if host_network && port.host_port.unwrap_or(0) == 0 {
            port.host_port = Some(port.container_port);
        }
    }
    let variables = container.env.iter_mut().flatten();
    for field in variables.filter_map(|e| e.value_from.as_mut()?.field_ref.as_mut()) {
        text(&mut field.api_version, "v1");
    }
    let resources = container.resources.get_or_insert_default();
    if let Some(limits) = &resources.limits {
        let requests = resources.requests.get_or_insert_default();
        for (name, limit) in limits {
            requests
                .entry(name.clone())
                .or_insert_with(|| limit.clone());
        }
    }
    if let Some(lifecycle) = &mut container.lifecycle {
        let hooks = [&mut lifecycle.post_start, &mut lifecycle.pre_stop];
        for get in hooks
            .into_iter()
            .flatten()
            .filter_map(|h| h.http_get.as_mut())
        {
            text(&mut get.path, "/");
            text(&mut get.scheme, "HTTP");
        }
    }
    if let Some(probe) = &mut container.liveness_probe {
        self::probe(probe);
    }
    if let Some(probe) = &mut container.readiness_probe {
        self::probe(probe);
    }
    if let Some(probe) = &mut container.startup_probe {
        self::probe(probe);
    }
}

fn probe(probe: &mut Probe) {
    let positive = |value: &mut Option<i32>, default| {
        if value.unwrap_or(0) == 0 {
            *value = Some(default);
        }
    };
    positive(&mut probe.timeout_seconds, 1);
    positive(&mut probe.period_seconds, 10);
    positive(&mut probe.success_threshold, 1);
    positive(&mut probe.failure_threshold, 3);
    if let Some(http) = &mut probe.http_get {
        text(&mut http.path, "/");
        text(&mut http.scheme, "HTTP");
    }
    if let Some(grpc) = &mut probe.grpc {
        grpc.service.get_or_insert_default();
    }
}

fn volume(volume: &mut Volume) {
    if let Some(source) = &mut volume.config_map {
        source.default_mode.get_or_insert(FILE_MODE);
    } else if let Some(source) = &mut volume.secret {
        source.default_mode.get_or_insert(FILE_MODE);
    } else if let Some(source) = &mut volume.projected {
        source.default_mode.get_or_insert(FILE_MODE);
    } else if let Some(source) = &mut volume.downward_api {
        source.default_mode.get_or_insert(FILE_MODE);
        for field in source
            .items
            .iter_mut()
            .flatten()
            .filter_map(|i| i.field_ref.as_mut())
        {
            text(&mut field.api_version, "v1");
        }
    } else if let Some(source) = &mut volume.host_path {
        source.type_.get_or_insert_default();
    } else if *volume
        == (Volume {
            name: volume.name.clone(),
            ..Volume::default()
        })
    {
        volume.empty_dir = Some(EmptyDirVolumeSource::default());
    }
}

/// `Always` for `latest` and for images without a tag, `IfNotPresent` for the rest.
#[must_use]
pub fn pull_policy(image: &str) -> &'static str {
    if image.contains('@') {
        return "IfNotPresent";
    }
    // A colon before the last slash belongs to a registry's port.
    let last = image.rsplit('/').next().unwrap_or(image);
    match last.split_once(':') {
        None | Some((_, "latest")) => "Always",
        Some(_) => "IfNotPresent",
    }
}

/// Defaults of a Deployment.
pub fn deployment(deployment: &mut Deployment) {
    let Some(spec) = &mut deployment.spec else {
        return;
    };
    spec.replicas.get_or_insert(1);
    spec.revision_history_limit.get_or_insert(10);
    spec.progress_deadline_seconds.get_or_insert(600);
    let strategy = spec
        .strategy
        .get_or_insert_with(DeploymentStrategy::default);
    text(&mut strategy.type_, "RollingUpdate");
    if strategy.type_.as_deref() == Some("RollingUpdate") {
        let quarter = || IntOrString::String("25%".to_owned());
        let rolling = strategy
            .rolling_update
            .get_or_insert_with(RollingUpdateDeployment::default);
        rolling.max_unavailable.get_or_insert_with(quarter);
        rolling.max_surge.get_or_insert_with(quarter);
    }
    if let Some(pod) = &mut spec.template.spec {
        pod_spec(pod);
    }
}

/// Defaults of a ReplicaSet.
pub fn replica_set(set: &mut ReplicaSet) {
    let Some(spec) = &mut set.spec else { return };
    spec.replicas.get_or_insert(1);
    if let Some(pod) = spec.template.as_mut().and_then(|t| t.spec.as_mut()) {
        pod_spec(pod);
    }
}

/// Defaults of a Service; addresses and node ports are the registry's to allocate.
pub fn service(service: &mut Service) {
    let Some(spec) = &mut service.spec else {
        return;
    };
    text(&mut spec.type_, "ClusterIP");
    text(&mut spec.session_affinity, "None");
    let kind = spec.type_.as_deref().unwrap_or_default();
    if kind != "ExternalName" {
        text(&mut spec.internal_traffic_policy, "Cluster");
    }
    let external = spec
        .external_ips
        .as_ref()
        .is_some_and(|ips| !ips.is_empty());
    if matches!(kind, "NodePort" | "LoadBalancer") || (kind == "ClusterIP" && external) {
        text(&mut spec.external_traffic_policy, "Cluster");
    }
    if kind == "LoadBalancer" {
        spec.allocate_load_balancer_node_ports.get_or_insert(true);
    }
    if spec.session_affinity.as_deref() == Some("ClientIP") {
        let client_ip = spec
            .session_affinity_config
            .get_or_insert_default()
            .client_ip
            .get_or_insert_default();
        client_ip.timeout_seconds.get_or_insert(AFFINITY_TIMEOUT_S);
    }
    for port in spec.ports.iter_mut().flatten() {
        service_port(port);
    }
}

fn service_port(port: &mut ServicePort) {
    text(&mut port.protocol, "TCP");
    let unset = match &port.target_port {
        None | Some(IntOrString::Int(0)) => true,
        Some(IntOrString::String(name)) => name.is_empty(),
        Some(IntOrString::Int(_)) => false,
    };
    if unset {
        port.target_port = Some(IntOrString::Int(port.port));
    }
}

/// Defaults of a Secret: `stringData` becomes `data`, as it is only a way to write it.
pub fn secret(secret: &mut Secret) {
    text(&mut secret.type_, "Opaque");
    if let Some(texts) = secret.string_data.take() {
        let data = secret.data.get_or_insert_default();
        for (key, text) in texts {
            data.insert(key, k8s_openapi::ByteString(text.into_bytes()));
        }
    }
}

/// Defaults of an EndpointSlice.
pub fn endpoint_slice(slice: &mut EndpointSlice) {
    for port in slice.ports.iter_mut().flatten() {
        port.name.get_or_insert_default();
        text(&mut port.protocol, "TCP");
    }
}

/// Defaults of a NetworkPolicy: it is about incoming traffic, and about outgoing where it has rules
/// for it. Source: `pkg/apis/networking/v1/defaults.go`.
pub fn network_policy(policy: &mut NetworkPolicy) {
    let spec = policy.spec.get_or_insert_default();
    spec.pod_selector.get_or_insert_default();
    let incoming = spec
        .ingress
        .iter_mut()
        .flatten()
        .map(|rule| &mut rule.ports);
    let outgoing = spec.egress.iter_mut().flatten().map(|rule| &mut rule.ports);
    for port in incoming.chain(outgoing).flatten().flatten() {
        text(&mut port.protocol, "TCP");
    }
    let types = spec.policy_types.get_or_insert_default();
    if types.is_empty() {
        types.push("Ingress".to_owned());
        if spec.egress.iter().flatten().next().is_some() {
            types.push("Egress".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn pull_policy_follows_the_tag() {
        for (image, policy) in [
            ("nginx", "Always"),
            ("nginx:latest", "Always"),
            ("nginx:1.27", "IfNotPresent"),
            ("localhost:5000/nginx", "Always"),
            ("localhost:5000/nginx:1", "IfNotPresent"),
            ("nginx@sha256:00", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), policy, "{image}");
        }
    }

    #[test]
    fn a_small_pod_becomes_complete() {
        let mut pod: Pod = serde_json::from_value(json!({"spec": {
            "containers": [{"name": "a", "image": "nginx:1",
                "ports": [{"containerPort": 80}],
                "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "0.5"}},
                "readinessProbe": {"httpGet": {"port": 80}}}],
            "volumes": [{"name": "tmp"}, {"name": "c", "configMap": {"name": "x"}}]
        }}))
        .unwrap();
        super::pod(&mut pod);
        let pod: Value = serde_json::to_value(&pod).unwrap();
        let spec = &pod["spec"];
        assert_eq!(spec["restartPolicy"], "Always");
        assert_eq!(spec["terminationGracePeriodSeconds"], 30);
        assert_eq!(spec["volumes"][0]["emptyDir"], json!({}));
        assert_eq!(spec["volumes"][1]["configMap"]["defaultMode"], 420);
        let container = &spec["containers"][0];
        assert_eq!(container["imagePullPolicy"], "IfNotPresent");
        assert_eq!(container["ports"][0]["protocol"], "TCP");
        assert_eq!(
            container["resources"]["requests"],
            json!({"cpu": "0.5", "memory": "1Gi"})
        );
        assert_eq!(container["readinessProbe"]["httpGet"]["path"], "/");
        assert_eq!(container["readinessProbe"]["periodSeconds"], 10);
    }

    #[test]
    fn a_secret_keeps_only_data() {
        let mut secret: Secret =
            serde_json::from_value(json!({"stringData": {"a": "b"}, "data": {"a": "eA=="}}))
                .unwrap();
        super::secret(&mut secret);
        let secret = serde_json::to_value(&secret).unwrap();
        assert_eq!(secret["data"], json!({"a": "Yg=="}));
        assert!(secret.get("stringData").is_none());
    }
}
