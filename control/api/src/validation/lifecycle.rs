//! Rules for the life of a pod and its containers: hooks, probes, restarts, deadlines, gates.
//!
//! Source: Kubernetes' `pkg/apis/core/validation/validation.go` (validatePodSpec,
//! validateInitContainers, validateLifecycle, validateProbe).

use super::{each, names, not_negative, one_of};
use crate::field::{FieldError, Path};
use k8s_openapi::api::core::v1::{
    Container, EphemeralContainer, HTTPGetAction, LifecycleHandler, PodDNSConfig, PodSpec, Probe,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Debugging leaves one each time and none can be removed; Kubernetes sets no limit, the node does.
const EPHEMERAL_MAX: usize = 32;
/// Kubernetes' limits of a pod's resolver configuration.
const NAMESERVERS_MAX: usize = 3;
const SEARCHES_MAX: usize = 32;
const SEARCHES_BYTES_MAX: usize = 2048;
/// What `lifecycle.stopSignal` may be, beside real-time signals.
const SIGNALS: &[&str] = &[
    "SIGABRT",
    "SIGALRM",
    "SIGBUS",
    "SIGCHLD",
    "SIGCONT",
    "SIGFPE",
    "SIGHUP",
    "SIGILL",
    "SIGINT",
    "SIGIO",
    "SIGKILL",
    "SIGPIPE",
    "SIGPROF",
    "SIGPWR",
    "SIGQUIT",
    "SIGSEGV",
    "SIGSTKFLT",
    "SIGSTOP",
    "SIGSYS",
    "SIGTERM",
    "SIGTRAP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGUSR1",
    "SIGUSR2",
    "SIGVTALRM",
    "SIGWINCH",
    "SIGXCPU",
    "SIGXFSZ",
];

/// What concerns the pod as a whole.
pub(super) fn pod(spec: &PodSpec, path: &Path, errors: &mut Vec<FieldError>) {
    let grace = path.child("terminationGracePeriodSeconds");
    not_negative(&grace, spec.termination_grace_period_seconds, errors);
    if let Some(seconds) = spec.active_deadline_seconds
        && !(1..=i64::from(i32::MAX)).contains(&seconds)
    {
        let detail = "must be between 1 and 2147483647, inclusive";
        let path = path.child("activeDeadlineSeconds");
        errors.push(FieldError::invalid(&path, seconds, detail));
    }
    if spec.share_process_namespace == Some(true) && spec.host_pid == Some(true) {
        let detail = "ShareProcessNamespace and HostPID cannot both be enabled";
        let path = path.child("shareProcessNamespace");
        errors.push(FieldError::invalid(&path, true, detail));
    }
    if spec.share_process_namespace == Some(true) && spec.host_users == Some(false) {
        let detail = "not supported by Gantry yet together with hostUsers: false";
        let path = path.child("shareProcessNamespace");
        errors.push(FieldError::forbidden(&path, detail));
    }
    for (i, gate) in spec.readiness_gates.iter().flatten().enumerate() {
        let path = path.child("readinessGates").index(i).child("conditionType");
        each(
            &path,
            &gate.condition_type,
            names::qualified_name(&gate.condition_type),
            errors,
        );
    }
    gates(spec, path, errors);
    for (i, alias) in spec.host_aliases.iter().flatten().enumerate() {
        let path = path.child("hostAliases").index(i);
        address(&alias.ip, &path.child("ip"), errors);
        for (i, name) in alias.hostnames.iter().flatten().enumerate() {
            let path = path.child("hostnames").index(i);
            each(&path, name, names::dns1123_subdomain(name), errors);
        }
    }
    if let Some(config) = &spec.dns_config {
        dns(config, &path.child("dnsConfig"), errors);
    }
}

fn gates(spec: &PodSpec, path: &Path, errors: &mut Vec<FieldError>) {
    let path = path.child("schedulingGates");
    let mut seen = BTreeSet::new();
    for (i, gate) in spec.scheduling_gates.iter().flatten().enumerate() {
        let path = path.index(i);
        each(
            &path.child("name"),
            &gate.name,
            names::qualified_name(&gate.name),
            errors,
        );
        if !seen.insert(gate.name.as_str()) {
            errors.push(FieldError::duplicate(&path, gate.name.as_str()));
        }
    }
    let bound = spec.node_name.as_ref().is_some_and(|n| !n.is_empty());
    if !seen.is_empty() && bound {
        let detail = "nodeName cannot be set until all schedulingGates have been cleared";
        errors.push(FieldError::forbidden(&path, detail));
    }
}

fn dns(config: &PodDNSConfig, path: &Path, errors: &mut Vec<FieldError>) {
    let servers = config.nameservers.as_deref().unwrap_or_default();
    if servers.len() > NAMESERVERS_MAX {
        let path = path.child("nameservers");
        errors.push(FieldError::too_many(&path, servers.len(), NAMESERVERS_MAX));
    }
    for (i, server) in servers.iter().enumerate() {
        address(server, &path.child("nameservers").index(i), errors);
    }
    let searches = config.searches.as_deref().unwrap_or_default();
    if searches.len() > SEARCHES_MAX {
        let path = path.child("searches");
        errors.push(FieldError::too_many(&path, searches.len(), SEARCHES_MAX));
    }
    let bytes = searches.iter().map(|s| s.len() + 1).sum::<usize>();
    if bytes > SEARCHES_BYTES_MAX + 1 {
        let detail = "must not have more than 2048 characters (including spaces) in the list";
        errors.push(FieldError::invalid(&path.child("searches"), "", detail));
    }
    for (i, search) in searches.iter().enumerate() {
        let path = path.child("searches").index(i);
        // A trailing dot says "absolute"; the dot alone, "no list at all".
        let name = search.strip_suffix('.').unwrap_or(search);
        if search != "." {
            each(&path, search, names::dns1123_subdomain(name), errors);
        }
    }
    for (i, option) in config.options.iter().flatten().enumerate() {
        if option.name.as_ref().is_none_or(String::is_empty) {
            let path = path.child("options").index(i);
            errors.push(FieldError::required(&path, "must not be empty"));
        }
    }
}

fn address(text: &str, path: &Path, errors: &mut Vec<FieldError>) {
    if text.parse::<IpAddr>().is_err() {
        let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
        errors.push(FieldError::invalid(path, text, detail));
    }
}

/// Ephemeral containers: names of their own, an image, and nothing that a container to look around
/// with has no use for.
pub(super) fn ephemeral(
    spec: &PodSpec,
    volumes: &BTreeSet<&str>,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    let init = spec.init_containers.iter().flatten();
    let others: BTreeSet<&str> = (spec.containers.iter().chain(init))
        .map(|c| c.name.as_str())
        .collect();
    let mut seen = BTreeSet::new();
    let all = spec.ephemeral_containers.as_deref().unwrap_or_default();
    if all.len() > EPHEMERAL_MAX {
        let path = path.child("ephemeralContainers");
        errors.push(FieldError::too_many(&path, all.len(), EPHEMERAL_MAX));
    }
    for (i, one) in all.iter().enumerate() {
        let path = path.child("ephemeralContainers").index(i);
        let name = &path.child("name");
        each(name, &one.name, names::dns1123_label(&one.name), errors);
        if others.contains(one.name.as_str()) || !seen.insert(one.name.as_str()) {
            errors.push(FieldError::duplicate(name, one.name.as_str()));
        }
        if one.image.as_ref().is_none_or(String::is_empty) {
            errors.push(FieldError::required(&path.child("image"), ""));
        }
        let target = one.target_container_name.as_deref().unwrap_or_default();
        if !target.is_empty() && !others.contains(target) {
            errors.push(FieldError::not_found(
                &path.child("targetContainerName"),
                target,
            ));
        }
        refused_of_ephemeral(one, &path, errors);
        for (i, mount) in one.volume_mounts.iter().flatten().enumerate() {
            let path = path.child("volumeMounts").index(i);
            if !volumes.contains(mount.name.as_str()) {
                errors.push(FieldError::not_found(
                    &path.child("name"),
                    mount.name.as_str(),
                ));
            }
            if mount.mount_path.is_empty() {
                errors.push(FieldError::required(&path.child("mountPath"), ""));
            }
            for (field, text) in [
                ("subPath", &mount.sub_path),
                ("subPathExpr", &mount.sub_path_expr),
            ] {
                if text.as_ref().is_some_and(|t| !t.is_empty()) {
                    let detail = "cannot be set for an Ephemeral Container";
                    errors.push(FieldError::forbidden(&path.child(field), detail));
                }
            }
        }
    }
}

fn refused_of_ephemeral(one: &EphemeralContainer, path: &Path, errors: &mut Vec<FieldError>) {
    let resources = one.resources.as_ref();
    for (field, set) in [
        ("lifecycle", one.lifecycle.is_some()),
        ("livenessProbe", one.liveness_probe.is_some()),
        ("ports", one.ports.as_ref().is_some_and(|p| !p.is_empty())),
        ("readinessProbe", one.readiness_probe.is_some()),
        (
            "resources",
            resources.is_some_and(|r| r.limits.is_some() || r.requests.is_some()),
        ),
        ("restartPolicy", one.restart_policy.is_some()),
        ("startupProbe", one.startup_probe.is_some()),
    ] {
        if set {
            let detail = "cannot be set for an Ephemeral Container";
            errors.push(FieldError::forbidden(&path.child(field), detail));
        }
    }
}

/// What only init containers and sidecars may or may not have.
pub(super) fn init_container(
    one: &Container,
    spec: &PodSpec,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    let policy = one.restart_policy.as_deref();
    one_of(&path.child("restartPolicy"), policy, &["Always"], errors);
    if policy == Some("Always") {
        hooks(one, spec, path, errors);
        return;
    }
    for (field, set) in [
        ("lifecycle", one.lifecycle.is_some()),
        ("livenessProbe", one.liveness_probe.is_some()),
        ("readinessProbe", one.readiness_probe.is_some()),
        ("startupProbe", one.startup_probe.is_some()),
    ] {
        if set {
            let detail = "may not be set for init containers without restartPolicy=Always";
            errors.push(FieldError::forbidden(&path.child(field), detail));
        }
    }
}

/// The hooks of a container.
pub(super) fn hooks(one: &Container, spec: &PodSpec, path: &Path, errors: &mut Vec<FieldError>) {
    let Some(lifecycle) = &one.lifecycle else {
        return;
    };
    let path = path.child("lifecycle");
    let grace_s = spec.termination_grace_period_seconds.unwrap_or(30);
    for (field, handler) in [
        ("postStart", &lifecycle.post_start),
        ("preStop", &lifecycle.pre_stop),
    ] {
        if let Some(handler) = handler {
            self::handler(handler, one, grace_s, &path.child(field), errors);
        }
    }
    if let Some(signal) = lifecycle.stop_signal.as_deref().filter(|s| !s.is_empty()) {
        let path = path.child("stopSignal");
        let real_time = signal.starts_with("SIGRTMIN") || signal.starts_with("SIGRTMAX");
        if real_time {
            let detail = "real-time signals are not supported: use a signal with a name of its own";
            errors.push(FieldError::invalid(&path, signal, detail));
        } else {
            one_of(&path, Some(signal), SIGNALS, errors);
        }
        if spec.os.is_none() {
            let detail = "may not be set for containers with empty `spec.os.name`";
            errors.push(FieldError::forbidden(&path, detail));
        }
    }
}

fn handler(
    handler: &LifecycleHandler,
    owner: &Container,
    grace_s: i64,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    let given = [
        handler.exec.is_some(),
        handler.http_get.is_some(),
        handler.sleep.is_some(),
        handler.tcp_socket.is_some(),
    ];
    match given.iter().filter(|set| **set).count() {
        1 => {}
        0 => errors.push(FieldError::required(path, "must specify a handler type")),
        _ => {
            let detail = "may not specify more than 1 handler type";
            errors.push(FieldError::forbidden(path, detail));
        }
    }
    if let Some(exec) = &handler.exec
        && exec.command.as_ref().is_none_or(Vec::is_empty)
    {
        let path = path.child("exec").child("command");
        errors.push(FieldError::required(&path, ""));
    }
    if let Some(get) = &handler.http_get {
        http(get, owner, &path.child("httpGet"), errors);
    }
    if let Some(sleep) = &handler.sleep
        && !(0..=grace_s).contains(&sleep.seconds)
    {
        let detail =
            format!("must be non-negative and less than terminationGracePeriodSeconds ({grace_s})");
        let path = path.child("sleep").child("seconds");
        errors.push(FieldError::invalid(&path, sleep.seconds, &detail));
    }
}

/// The probes of a container.
pub(super) fn probes(one: &Container, path: &Path, errors: &mut Vec<FieldError>) {
    for (field, probe, only_one) in [
        ("livenessProbe", &one.liveness_probe, true),
        ("readinessProbe", &one.readiness_probe, false),
        ("startupProbe", &one.startup_probe, true),
    ] {
        let Some(probe) = probe else {
            continue;
        };
        let path = path.child(field);
        self::probe(probe, one, &path, only_one, errors);
        let path = path.child("terminationGracePeriodSeconds");
        match probe.termination_grace_period_seconds {
            Some(_) if field == "readinessProbe" => {
                let detail = "must not be set for readinessProbes";
                errors.push(FieldError::invalid(&path, "", detail));
            }
            Some(seconds) if seconds <= 0 => {
                errors.push(FieldError::invalid(
                    &path,
                    seconds,
                    "must be greater than 0",
                ));
            }
            _ => {}
        }
    }
}

fn http(get: &HTTPGetAction, owner: &Container, path: &Path, errors: &mut Vec<FieldError>) {
    probe_port(&get.port, owner, &path.child("port"), errors);
    let scheme = get.scheme.as_deref();
    one_of(&path.child("scheme"), scheme, &["HTTP", "HTTPS"], errors);
}

fn probe(
    probe: &Probe,
    owner: &Container,
    path: &Path,
    only_one: bool,
    errors: &mut Vec<FieldError>,
) {
    let handlers = [
        probe.exec.is_some(),
        probe.http_get.is_some(),
        probe.tcp_socket.is_some(),
        probe.grpc.is_some(),
    ];
    match handlers.iter().filter(|set| **set).count() {
        1 => {}
        0 => errors.push(FieldError::required(path, "must specify a handler type")),
        _ => {
            let detail = "may not specify more than 1 handler type";
            errors.push(FieldError::forbidden(path, detail));
        }
    }
    for (field, value) in [
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("periodSeconds", probe.period_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ] {
        not_negative(&path.child(field), value.map(i64::from), errors);
    }
    if only_one && let Some(threshold) = probe.success_threshold.filter(|t| *t > 1) {
        let path = path.child("successThreshold");
        errors.push(FieldError::invalid(&path, threshold, "must be 1"));
    }
    if let Some(exec) = &probe.exec
        && exec.command.as_ref().is_none_or(Vec::is_empty)
    {
        errors.push(FieldError::required(
            &path.child("exec").child("command"),
            "",
        ));
    }
    if let Some(get) = &probe.http_get {
        http(get, owner, &path.child("httpGet"), errors);
    }
    if let Some(grpc) = &probe.grpc {
        for rule in names::port_number(grpc.port) {
            let path = path.child("grpc").child("port");
            errors.push(FieldError::invalid(&path, grpc.port, &rule));
        }
    }
    if let Some(tcp) = &probe.tcp_socket {
        probe_port(
            &tcp.port,
            owner,
            &path.child("tcpSocket").child("port"),
            errors,
        );
    }
}

fn probe_port(port: &IntOrString, owner: &Container, path: &Path, errors: &mut Vec<FieldError>) {
    match port {
        IntOrString::Int(number) => {
            for rule in names::port_number(*number) {
                errors.push(FieldError::invalid(path, *number, &rule));
            }
        }
        IntOrString::String(name) => {
            let before = errors.len();
            each(path, name, names::port_name(name), errors);
            let known = owner
                .ports
                .iter()
                .flatten()
                .any(|p| p.name.as_ref() == Some(name));
            if errors.len() == before && !known {
                // Kubernetes accepts this and the probe then fails for ever.
                errors.push(FieldError::not_found(path, name.as_str()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{pod, pod_update};
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::{Value, json};

    fn of(spec: &Value) -> Pod {
        serde_json::from_value(json!({ "spec": spec })).unwrap()
    }

    /// The paths that are refused.
    fn paths(spec: &Value) -> Vec<String> {
        pod(&of(spec)).into_iter().map(|e| e.field).collect()
    }

    #[test]
    fn what_a_life_cycle_may_not_say_is_refused_by_path() {
        let main = json!({"name": "a", "image": "x"});
        let probe = json!({"exec": {"command": ["x"]}});
        for (more, field) in [
            (
                json!({"activeDeadlineSeconds": 0}),
                "spec.activeDeadlineSeconds",
            ),
            (
                json!({"shareProcessNamespace": true, "hostPID": true}),
                "spec.shareProcessNamespace",
            ),
            (
                json!({"readinessGates": [{"conditionType": "a b"}]}),
                "spec.readinessGates[0].conditionType",
            ),
            (
                json!({"nodeName": "n", "schedulingGates": [{"name": "x"}]}),
                "spec.schedulingGates",
            ),
            (
                json!({"hostAliases": [{"ip": "x"}]}),
                "spec.hostAliases[0].ip",
            ),
            (
                json!({"dnsConfig": {"nameservers": ["1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"]}}),
                "spec.dnsConfig.nameservers",
            ),
            (
                json!({"initContainers": [{"name": "i", "image": "x", "restartPolicy": "Never"}]}),
                "spec.initContainers[0].restartPolicy",
            ),
            (
                json!({"initContainers": [{"name": "i", "image": "x", "livenessProbe": probe}]}),
                "spec.initContainers[0].livenessProbe",
            ),
            (
                json!({"containers": [{"name": "a", "image": "x", "restartPolicy": "Always"}]}),
                "spec.containers[0].restartPolicy",
            ),
            (
                json!({"containers": [{"name": "a", "image": "x",
                    "lifecycle": {"preStop": {"sleep": {"seconds": 31}}}}]}),
                "spec.containers[0].lifecycle.preStop.sleep.seconds",
            ),
            (
                json!({"containers": [{"name": "a", "image": "x", "lifecycle": {"postStart": {}}}]}),
                "spec.containers[0].lifecycle.postStart",
            ),
            (
                json!({"containers": [{"name": "a", "image": "x",
                    "livenessProbe": {"grpc": {"port": 0}}}]}),
                "spec.containers[0].livenessProbe.grpc.port",
            ),
            (
                json!({"containers": [{"name": "a", "image": "x", "readinessProbe":
                    {"tcpSocket": {"port": 1}, "terminationGracePeriodSeconds": 1}}]}),
                "spec.containers[0].readinessProbe.terminationGracePeriodSeconds",
            ),
            (
                json!({"ephemeralContainers": [{"name": "a", "image": "x"}]}),
                "spec.ephemeralContainers[0].name",
            ),
            (
                json!({"ephemeralContainers": [{"name": "d", "image": "x",
                    "targetContainerName": "b"}]}),
                "spec.ephemeralContainers[0].targetContainerName",
            ),
        ] {
            let mut spec = json!({"containers": [main]});
            for (key, value) in more.as_object().unwrap() {
                spec[key] = value.clone();
            }
            assert_eq!(paths(&spec), [field], "{more}");
        }
    }

    #[test]
    fn a_whole_life_is_accepted() {
        let probe = json!({"grpc": {"port": 1}, "terminationGracePeriodSeconds": 3});
        let spec = json!({
            "activeDeadlineSeconds": 60,
            "shareProcessNamespace": true,
            "os": {"name": "linux"},
            "readinessGates": [{"conditionType": "example.com/on"}],
            "dnsConfig": {"searches": ["a.b.", "."]},
            "initContainers": [{"name": "s", "image": "x", "restartPolicy": "Always",
                "startupProbe": probe, "lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}],
            "containers": [{"name": "a", "image": "x", "livenessProbe": probe,
                "lifecycle": {"stopSignal": "SIGQUIT",
                    "postStart": {"httpGet": {"port": 80}}}}],
        });
        assert_eq!(paths(&spec), Vec::<String>::new());
    }

    #[test]
    fn deadlines_shrink_gates_go_and_ephemeral_containers_stay() {
        let containers = json!([{"name": "a", "image": "x"}]);
        let with = |more: Value| {
            let mut spec = json!({ "containers": containers });
            for (key, value) in more.as_object().unwrap() {
                spec[key] = value.clone();
            }
            of(&spec)
        };
        let refused = |old: Value, new: Value| !pod_update(&with(new), &with(old)).is_empty();
        let deadline = |s: i64| json!({"activeDeadlineSeconds": s});
        assert!(!refused(deadline(9), deadline(5)) && refused(deadline(5), deadline(9)));
        assert!(!refused(json!({}), deadline(5)) && refused(deadline(5), json!({})));
        let gates = json!({"schedulingGates": [{"name": "g"}]});
        assert!(!refused(gates.clone(), json!({})) && refused(json!({}), gates));
        let one = json!({"ephemeralContainers": [{"name": "d", "image": "x"}]});
        assert!(!refused(json!({}), one.clone()) && refused(one, json!({})));
    }
}
