//! Rules for Pods and pod templates.

use super::{IMMUTABLE, each, lifecycle, names, one_of, security, volume};
use crate::field::{FieldError, Path};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{Container, EnvVar, Pod, PodSpec, ResourceRequirements};
use std::collections::BTreeSet;

/// Containers in one pod, init containers included; Kubernetes sets no limit, the agent's tables do.
const CONTAINERS_MAX: usize = 64;
const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
/// Fields of the pod that an environment variable may take its value from.
const FIELD_PATHS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

/// A pod with this annotation may save up unused CPU quota: percent of the quota.
pub(super) const CPU_BURST_ANNOTATION: &str = "gantry.dev/cpu-burst-percent";

/// On a mirror pod, which shows what a node runs on its own account: the UID of the static pod.
pub const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

fn mirrored(pod: &Pod) -> Option<&String> {
    pod.metadata.annotations.as_ref()?.get(MIRROR_ANNOTATION)
}

fn mirror_path() -> Path {
    let annotations = Path::new("metadata").child("annotations");
    annotations.key(MIRROR_ANNOTATION)
}

/// A Pod.
pub fn pod(pod: &Pod) -> Vec<FieldError> {
    let mut errors = match &pod.spec {
        Some(spec) => pod_spec(spec, &Path::new("spec")),
        None => vec![FieldError::required(&Path::new("spec"), "")],
    };
    super::resources::burst(pod.metadata.annotations.as_ref(), &mut errors);
    crate::bandwidth::validate(pod.metadata.annotations.as_ref(), &mut errors);
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    if let Some(value) = mirrored(pod).filter(|_| node.unwrap_or_default().is_empty()) {
        let detail = "must set spec.nodeName if mirror pod annotation is set";
        errors.push(FieldError::invalid(&mirror_path(), value.as_str(), detail));
    }
    errors
}

/// A PodSpec at `path`.
pub fn pod_spec(spec: &PodSpec, path: &Path) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let text = Option::as_deref;
    let policies = ["Always", "OnFailure", "Never"];
    one_of(
        &path.child("restartPolicy"),
        text(&spec.restart_policy),
        &policies,
        &mut errors,
    );
    let policies = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    one_of(
        &path.child("dnsPolicy"),
        text(&spec.dns_policy),
        &policies,
        &mut errors,
    );
    let nameservers = spec
        .dns_config
        .as_ref()
        .and_then(|c| c.nameservers.as_ref());
    if spec.dns_policy.as_deref() == Some("None") && nameservers.is_none_or(Vec::is_empty) {
        let detail = "must provide at least one DNS nameserver when `dnsPolicy` is None";
        errors.push(FieldError::required(
            &path.child("dnsConfig").child("nameservers"),
            detail,
        ));
    }
    lifecycle::pod(spec, path, &mut errors);
    for (field, name) in [("hostname", &spec.hostname), ("subdomain", &spec.subdomain)] {
        if let Some(name) = name.as_deref().filter(|n| !n.is_empty()) {
            each(
                &path.child(field),
                name,
                names::dns1123_label(name),
                &mut errors,
            );
        }
    }
    if let Some(node) = spec.node_name.as_deref().filter(|n| !n.is_empty()) {
        each(
            &path.child("nodeName"),
            node,
            names::dns1123_subdomain(node),
            &mut errors,
        );
    }
    errors.extend(super::labels(
        spec.node_selector.as_ref(),
        &path.child("nodeSelector"),
    ));
    security::pod(spec, path, &mut errors);
    let volumes = volume::volumes(
        spec.volumes.as_deref().unwrap_or_default(),
        path,
        &mut errors,
    );
    if spec.containers.is_empty() {
        errors.push(FieldError::required(&path.child("containers"), ""));
    }
    let init = spec.init_containers.as_deref().unwrap_or_default();
    if spec.containers.len() + init.len() > CONTAINERS_MAX {
        let count = spec.containers.len() + init.len();
        errors.push(FieldError::too_many(
            &path.child("containers"),
            count,
            CONTAINERS_MAX,
        ));
    }
    lifecycle::ephemeral(spec, &volumes, path, &mut errors);
    let mut seen = Seen::default();
    let host_network = spec.host_network == Some(true);
    for (i, one) in spec.containers.iter().enumerate() {
        let path = path.child("containers").index(i);
        container(one, &path, &volumes, host_network, &mut seen, &mut errors);
        if one.restart_policy.is_some() {
            let detail = "may not be set for non-init containers";
            errors.push(FieldError::forbidden(&path.child("restartPolicy"), detail));
        }
        lifecycle::hooks(one, spec, &path, &mut errors);
    }
    // Init containers run before the others: their host ports do not meet.
    seen.host_ports.clear();
    for (i, one) in init.iter().enumerate() {
        let path = path.child("initContainers").index(i);
        container(one, &path, &volumes, host_network, &mut seen, &mut errors);
        lifecycle::init_container(one, spec, &path, &mut errors);
    }
    super::resources::spec(spec, path, &mut errors);
    errors
}

/// Names that must be unique over all containers of a pod.
#[derive(Default)]
struct Seen<'a> {
    containers: BTreeSet<&'a str>,
    /// Number, protocol, address.
    host_ports: BTreeSet<(i32, &'a str, &'a str)>,
}

fn container<'a>(
    one: &'a Container,
    path: &Path,
    volumes: &BTreeSet<&str>,
    host_network: bool,
    seen: &mut Seen<'a>,
    errors: &mut Vec<FieldError>,
) {
    if one.name.is_empty() {
        errors.push(FieldError::required(&path.child("name"), ""));
    } else {
        each(
            &path.child("name"),
            &one.name,
            names::dns1123_label(&one.name),
            errors,
        );
        if !seen.containers.insert(&one.name) {
            errors.push(FieldError::duplicate(
                &path.child("name"),
                one.name.as_str(),
            ));
        }
    }
    let image = one.image.as_deref().unwrap_or_default();
    if image.is_empty() {
        errors.push(FieldError::required(&path.child("image"), ""));
    } else if image.trim() != image {
        let detail = "must not have leading or trailing whitespace";
        errors.push(FieldError::invalid(&path.child("image"), image, detail));
    }
    let policies = ["Always", "IfNotPresent", "Never"];
    let policy = one.image_pull_policy.as_deref();
    one_of(&path.child("imagePullPolicy"), policy, &policies, errors);
    let policies = ["FallbackToLogsOnError", "File"];
    let policy = one.termination_message_policy.as_deref();
    one_of(
        &path.child("terminationMessagePolicy"),
        policy,
        &policies,
        errors,
    );
    ports(one, path, host_network, seen, errors);
    for (i, variable) in one.env.iter().flatten().enumerate() {
        environment(variable, &path.child("env").index(i), errors);
    }
    for (i, source) in one.env_from.iter().flatten().enumerate() {
        let path = path.child("envFrom").index(i);
        match (&source.config_map_ref, &source.secret_ref) {
            (Some(_), Some(_)) => {
                let detail = "may not have more than one field specified at a time";
                errors.push(FieldError::invalid(&path, "", detail));
            }
            (None, None) => {
                let detail = "must specify one of: `configMapRef` or `secretRef`";
                errors.push(FieldError::invalid(&path, "", detail));
            }
            (Some(map), None) if map.name.is_empty() => {
                errors.push(FieldError::required(
                    &path.child("configMapRef").child("name"),
                    "",
                ));
            }
            (None, Some(secret)) if secret.name.is_empty() => {
                errors.push(FieldError::required(
                    &path.child("secretRef").child("name"),
                    "",
                ));
            }
            _ => {}
        }
    }
    volume::mounts(one, path, volumes, errors);
    if let Some(resources) = &one.resources {
        self::resources(resources, &path.child("resources"), errors);
    }
    lifecycle::probes(one, path, errors);
    security::container(one, path, errors);
}

fn ports<'a>(
    one: &'a Container,
    path: &Path,
    host_network: bool,
    seen: &mut Seen<'a>,
    errors: &mut Vec<FieldError>,
) {
    let mut port_names = BTreeSet::new();
    for (i, port) in one.ports.iter().flatten().enumerate() {
        let path = path.child("ports").index(i);
        let number = &path.child("containerPort");
        for rule in names::port_number(port.container_port) {
            errors.push(FieldError::invalid(number, port.container_port, &rule));
        }
        if let Some(name) = port.name.as_deref().filter(|n| !n.is_empty()) {
            each(&path.child("name"), name, names::port_name(name), errors);
            if !port_names.insert(name) {
                errors.push(FieldError::duplicate(&path.child("name"), name));
            }
        }
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        one_of(&path.child("protocol"), Some(protocol), PROTOCOLS, errors);
        let Some(host_port) = port.host_port.filter(|p| *p != 0) else {
            continue;
        };
        if let Some(ip) = port.host_ip.as_deref().filter(|ip| !ip.is_empty())
            && ip.parse::<std::net::IpAddr>().is_err()
        {
            let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            errors.push(FieldError::invalid(&path.child("hostIP"), ip, detail));
        }
        let path = path.child("hostPort");
        for rule in names::port_number(host_port) {
            errors.push(FieldError::invalid(&path, host_port, &rule));
        }
        if host_network && host_port != port.container_port {
            let detail = "must match `containerPort` when `hostNetwork` is true";
            errors.push(FieldError::invalid(&path, host_port, detail));
        }
        let host_ip = port.host_ip.as_deref().unwrap_or_default();
        if !seen.host_ports.insert((host_port, protocol, host_ip)) {
            errors.push(FieldError::duplicate(
                &path,
                format!("{protocol}//{host_port}"),
            ));
        }
    }
}

fn environment(variable: &EnvVar, path: &Path, errors: &mut Vec<FieldError>) {
    if variable.name.is_empty() {
        errors.push(FieldError::required(&path.child("name"), ""));
    } else {
        each(
            &path.child("name"),
            &variable.name,
            names::env_name(&variable.name),
            errors,
        );
    }
    let Some(source) = &variable.value_from else {
        return;
    };
    let path = path.child("valueFrom");
    if variable.value.as_ref().is_some_and(|v| !v.is_empty()) {
        let detail = "may not be specified when `value` is not empty";
        errors.push(FieldError::invalid(&path, "", detail));
    }
    let given = [
        source.field_ref.is_some(),
        source.config_map_key_ref.is_some(),
        source.secret_key_ref.is_some(),
        source.resource_field_ref.is_some(),
    ];
    match given.iter().filter(|set| **set).count() {
        1 => {}
        0 => {
            let detail = "must specify one of: `fieldRef`, `configMapKeyRef` or `secretKeyRef`";
            errors.push(FieldError::invalid(&path, "", detail));
        }
        _ => {
            let detail = "may not have more than one field specified at a time";
            errors.push(FieldError::invalid(&path, "", detail));
        }
    }
    if let Some(field) = &source.field_ref {
        field_path(
            &field.field_path,
            &path.child("fieldRef").child("fieldPath"),
            errors,
        );
    }
    let map = source
        .config_map_key_ref
        .as_ref()
        .map(|r| ("configMapKeyRef", &r.name, &r.key));
    let secret = source
        .secret_key_ref
        .as_ref()
        .map(|r| ("secretKeyRef", &r.name, &r.key));
    for (field, name, key) in map.into_iter().chain(secret) {
        let path = path.child(field);
        if name.is_empty() {
            errors.push(FieldError::required(&path.child("name"), ""));
        }
        if key.is_empty() {
            errors.push(FieldError::required(&path.child("key"), ""));
        } else {
            each(&path.child("key"), key, names::config_key(key), errors);
        }
    }
}

fn field_path(text: &str, path: &Path, errors: &mut Vec<FieldError>) {
    let key = ["metadata.labels['", "metadata.annotations['"]
        .iter()
        .find_map(|prefix| text.strip_prefix(prefix)?.strip_suffix("']"));
    if let Some(key) = key {
        each(
            path,
            text,
            names::qualified_name(&key.to_lowercase()),
            errors,
        );
    } else if text.is_empty() {
        errors.push(FieldError::required(path, ""));
    } else {
        one_of(path, Some(text), FIELD_PATHS, errors);
    }
}

pub(super) fn quantity(path: &Path, text: &str, errors: &mut Vec<FieldError>) -> Option<Quantity> {
    match Quantity::parse(text) {
        Ok(value) if value.is_negative() => {
            errors.push(FieldError::invalid(path, text, super::NOT_NEGATIVE));
            None
        }
        Ok(value) => Some(value),
        Err(error) => {
            errors.push(FieldError::invalid(path, text, &error.to_string()));
            None
        }
    }
}

pub(super) fn resources(
    resources: &ResourceRequirements,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    for (name, limit) in resources.limits.iter().flatten() {
        quantity(&path.child("limits").key(name), &limit.0, errors);
    }
    for (name, request) in resources.requests.iter().flatten() {
        let path = path.child("requests").key(name);
        let request_value = quantity(&path, &request.0, errors);
        let limit = resources
            .limits
            .as_ref()
            .and_then(|limits| limits.get(name));
        let limit_value = limit.and_then(|limit| Quantity::parse(&limit.0).ok());
        if let (Some(value), Some(limit)) = (request_value, limit_value)
            && value > limit
        {
            let detail = format!("must be less than or equal to {name} limit of {limit}");
            errors.push(FieldError::invalid(&path, request.0.as_str(), &detail));
        }
    }
}

/// What a new Pod or a template may not have: ephemeral containers come by their own subresource.
pub fn no_ephemeral(spec: &PodSpec, path: &Path) -> Vec<FieldError> {
    let given = spec.ephemeral_containers.iter().flatten().next();
    let detail = "cannot be set on create: use the ephemeralcontainers subresource (gantry debug)";
    given
        .map(|_| FieldError::forbidden(&path.child("ephemeralContainers"), detail))
        .into_iter()
        .collect()
}

/// What may change in a Pod: images, and a few numbers that only shrink.
pub fn pod_update(new: &Pod, old: &Pod) -> Vec<FieldError> {
    let (Some(new_spec), Some(old_spec)) = (&new.spec, &old.spec) else {
        return Vec::new();
    };
    let mut errors = Vec::new();
    if mirrored(new) != mirrored(old) {
        let detail =
            "a pod becomes no mirror pod, and a mirror pod stays one of the same static pod";
        errors.push(FieldError::forbidden(&mirror_path(), detail));
    }
    let path = Path::new("spec");
    // Give the old spec everything that may differ: what still differs may not.
    let mut allowed = old_spec.clone();
    // Whether this request may add some is the registry's question: only their subresource may.
    let ephemeral = |spec: &PodSpec| spec.ephemeral_containers.clone().unwrap_or_default();
    let newest = ephemeral(new_spec);
    if ephemeral(old_spec).iter().all(|one| newest.contains(one)) {
        allowed
            .ephemeral_containers
            .clone_from(&new_spec.ephemeral_containers);
    } else {
        let detail = "existing ephemeral containers may not be changed or removed";
        errors.push(FieldError::forbidden(
            &path.child("ephemeralContainers"),
            detail,
        ));
        return errors;
    }
    allowed.tolerations.clone_from(&new_spec.tolerations);
    let deadline = |spec: &PodSpec| spec.active_deadline_seconds.unwrap_or(i64::MAX);
    if deadline(new_spec) <= deadline(old_spec) {
        allowed.active_deadline_seconds = new_spec.active_deadline_seconds;
    }
    // A gate is opened by taking it away; it cannot come back.
    let gates = |spec: &PodSpec| spec.scheduling_gates.clone().unwrap_or_default();
    let before = gates(old_spec);
    if gates(new_spec).iter().all(|gate| before.contains(gate)) {
        allowed
            .scheduling_gates
            .clone_from(&new_spec.scheduling_gates);
    }
    if old_spec
        .termination_grace_period_seconds
        .is_some_and(|s| s < 0)
    {
        allowed.termination_grace_period_seconds = new_spec.termination_grace_period_seconds;
    }
    for (old, new) in allowed.containers.iter_mut().zip(&new_spec.containers) {
        old.image.clone_from(&new.image);
    }
    let init = allowed.init_containers.iter_mut().flatten();
    for (old, new) in init.zip(new_spec.init_containers.iter().flatten()) {
        old.image.clone_from(&new.image);
    }
    super::resources::allow(new_spec, old_spec, &mut allowed, &mut errors);
    // A binding: the registry's `bind` sets it once.
    if old_spec.node_name.as_ref().is_none_or(String::is_empty) {
        allowed.node_name.clone_from(&new_spec.node_name);
    } else if old_spec.node_name != new_spec.node_name {
        let value = new_spec.node_name.as_deref().unwrap_or_default();
        errors.push(FieldError::invalid(
            &path.child("nodeName"),
            value,
            IMMUTABLE,
        ));
        return errors;
    }
    if allowed != *new_spec {
        let detail = "pod updates may not change fields other than \
                      `spec.containers[*].image`,`spec.initContainers[*].image`,\
                      `spec.containers[*].resources` (cpu and memory),\
                      `spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing \
                      tolerations)";
        errors.push(FieldError::forbidden(&path, detail));
    }
    errors
}
