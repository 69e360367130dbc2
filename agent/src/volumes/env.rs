//! A container's environment variables, as the kubelet makes them.
//!
//! ```text
//! Services of the namespace ─► envFrom (ConfigMaps, Secrets) ─► env, in order, with $(VAR) replaced ─► later wins
//! ```
//! Source: Kubernetes `pkg/kubelet/kubelet_pods.go` (makeEnvironmentVariables), `pkg/kubelet/envvars`.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::{Container, EnvFromSource, EnvVarSource, Pod};
use gantry_api::proto;
use imbl::OrdMap;
use serde_json::Value;

use super::{Blobs, field, payload};
use crate::runtime::spec::command::expand;
use crate::view::{BlobKey, ServiceName};

/// Everything variables are made from.
#[derive(Clone, Copy)]
pub struct EnvInput<'a> {
    /// Whose.
    pub container: &'a Container,
    /// Its pod.
    pub pod: &'a Pod,
    /// ConfigMaps and Secrets.
    pub blobs: &'a Blobs,
    /// All Services of the cluster.
    pub services: &'a OrdMap<ServiceName, Arc<proto::Service>>,
    /// `status.podIPs`
    pub pod_addresses: &'a [IpAddr],
    /// `status.hostIPs`
    pub host_addresses: &'a [IpAddr],
    /// `spec.nodeName`
    pub node_name: &'a str,
}

/// Why a container cannot be configured: Kubernetes' reason `CreateContainerConfigError`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EnvError {
    /// A ConfigMap or Secret, or a key in it, is not there (yet).
    #[error("{0}")]
    Missing(String),
    /// The variable's source cannot be read.
    #[error("variable {name:?}: {reason}")]
    Invalid {
        /// env[].name
        name: String,
        /// What is wrong.
        reason: String,
    },
}

/// All variables, each name once, in the order in which they were first set.
pub fn resolve(input: &EnvInput<'_>) -> Result<Vec<(String, String)>, EnvError> {
    let mut set = Variables::default();
    for (name, value) in service_variables(input) {
        set.put(name, value);
    }
    for source in input.container.env_from.iter().flatten() {
        from_object(input, source, &mut set)?;
    }
    for variable in input.container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (Some(value), _) if !value.is_empty() => expand(value, |name| set.get(name)),
            (_, Some(source)) => match from_source(input, &variable.name, source)? {
                Some(value) => value,
                None => continue, // optional and missing: the variable is not set
            },
            _ => String::new(),
        };
        set.put(variable.name.clone(), value);
    }
    Ok(set.list)
}

#[derive(Default)]
struct Variables {
    list: Vec<(String, String)>,
    position: HashMap<String, usize>,
}

impl Variables {
    fn put(&mut self, name: String, value: String) {
        match self
            .position
            .get(&name)
            .and_then(|at| self.list.get_mut(*at))
        {
            Some(slot) => slot.1 = value,
            None => {
                self.position.insert(name.clone(), self.list.len());
                self.list.push((name, value));
            }
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.list.get(*self.position.get(name)?)?;
        Some(value)
    }
}

/// `[-._a-zA-Z][-._a-zA-Z0-9]*`, the API's rule for variable names.
fn is_variable_name(name: &str) -> bool {
    let start = |b: u8| b.is_ascii_alphabetic() || matches!(b, b'-' | b'.' | b'_');
    name.bytes().next().is_some_and(start) && name.bytes().all(|b| start(b) || b.is_ascii_digit())
}

fn object<'a>(input: &EnvInput<'a>, plural: &str, name: &str) -> Option<&'a Value> {
    let key = BlobKey {
        plural: plural.to_owned(),
        namespace: namespace(input).to_owned(),
        name: name.to_owned(),
    };
    input.blobs.get(&key).map(Arc::as_ref)
}

fn namespace<'a>(input: &EnvInput<'a>) -> &'a str {
    input.pod.metadata.namespace.as_deref().unwrap_or("default")
}

fn from_object(
    input: &EnvInput<'_>,
    source: &EnvFromSource,
    set: &mut Variables,
) -> Result<(), EnvError> {
    let (plural, kind, name, optional) = match (&source.config_map_ref, &source.secret_ref) {
        (Some(r), _) => (
            "configmaps",
            "configmap",
            &r.name,
            r.optional.unwrap_or(false),
        ),
        (None, Some(r)) => ("secrets", "secret", &r.name, r.optional.unwrap_or(false)),
        (None, None) => return Ok(()),
    };
    let Some(object) = object(input, plural, name) else {
        if optional {
            return Ok(());
        }
        return Err(EnvError::Missing(format!("{kind} {name:?} not found")));
    };
    let invalid = |reason| EnvError::Invalid {
        name: format!("envFrom {kind} {name}"),
        reason,
    };
    let prefix = source.prefix.as_deref().unwrap_or("");
    let mut skipped = Vec::new();
    // Variables are text: binaryData is not among them, as in Kubernetes.
    let binary = object.get("binaryData").and_then(Value::as_object);
    for (key, bytes) in payload::entries(plural, object).map_err(invalid)? {
        let full = format!("{prefix}{key}");
        let text = String::from_utf8(bytes).ok().filter(|t| !t.contains('\0'));
        match text {
            Some(text) if is_variable_name(&full) => {
                if binary.is_none_or(|b| !b.contains_key(&key)) {
                    set.put(full, text);
                }
            }
            _ => skipped.push(full),
        }
    }
    if !skipped.is_empty() {
        let pod = input.pod.metadata.name.as_deref().unwrap_or("");
        tracing::warn!(pod, container = %input.container.name, keys = ?skipped,
            "envFrom {kind} {name:?}: keys skipped: no valid variable name or no text");
    }
    Ok(())
}

fn from_source(
    input: &EnvInput<'_>,
    variable: &str,
    source: &EnvVarSource,
) -> Result<Option<String>, EnvError> {
    let invalid = |reason| EnvError::Invalid {
        name: variable.to_owned(),
        reason,
    };
    if let Some(reference) = &source.field_ref {
        return of_field(input, &reference.field_path)
            .map(Some)
            .map_err(invalid);
    }
    if let Some(reference) = &source.resource_field_ref {
        let name = reference
            .container_name
            .as_deref()
            .filter(|n| !n.is_empty());
        let spec = input.pod.spec.as_ref();
        let container = match name {
            None => Some(input.container),
            Some(name) => spec.and_then(|s| s.containers.iter().find(|c| c.name == name)),
        };
        let container = container.ok_or_else(|| invalid(format!("no container {name:?}")))?;
        let divisor = reference.divisor.as_ref().map(|d| d.0.as_str());
        return field::of_resource(container, &reference.resource, divisor)
            .map(Some)
            .map_err(invalid);
    }
    let (plural, kind, name, key, optional) =
        match (&source.config_map_key_ref, &source.secret_key_ref) {
            (Some(r), _) => ("configmaps", "configmap", &r.name, &r.key, r.optional),
            (None, Some(r)) => ("secrets", "secret", &r.name, &r.key, r.optional),
            (None, None) => return Err(invalid("valueFrom names no supported source".to_owned())),
        };
    let missing = |text: String| match optional {
        Some(true) => Ok(None),
        _ => Err(EnvError::Missing(text)),
    };
    let Some(object) = object(input, plural, name) else {
        return missing(format!("{kind} {name:?} not found"));
    };
    let mut entries = payload::entries(plural, object).map_err(invalid)?;
    match entries.remove(key) {
        None => missing(format!(
            "couldn't find key {key:?} in {kind} {}/{name}",
            namespace(input)
        )),
        Some(bytes) => match String::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => Ok(Some(text)),
            _ => Err(invalid(format!(
                "key {key:?} of {kind} {name:?} is no text"
            ))),
        },
    }
}

fn of_field(input: &EnvInput<'_>, path: &str) -> Result<String, String> {
    let first = |list: &[IpAddr]| list.first().map(ToString::to_string).unwrap_or_default();
    let all = |list: &[IpAddr]| {
        list.iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(",")
    };
    Ok(match path {
        "spec.nodeName" => input.node_name.to_owned(),
        "spec.serviceAccountName" => {
            let spec = input.pod.spec.as_ref();
            spec.and_then(|s| s.service_account_name.clone())
                .unwrap_or_default()
        }
        "status.podIP" => first(input.pod_addresses),
        "status.podIPs" => all(input.pod_addresses),
        "status.hostIP" => first(input.host_addresses),
        "status.hostIPs" => all(input.host_addresses),
        // The whole maps are for volumes only.
        "metadata.labels" | "metadata.annotations" => {
            return Err(format!(
                "field path {path:?} is not supported for a variable"
            ));
        }
        _ => return field::of_metadata(input.pod, path),
    })
}

/// `WEB_SERVICE_HOST` and so on: the namespace's Services, and `kubernetes` of `default`.
fn service_variables(input: &EnvInput<'_>) -> Vec<(String, String)> {
    let links = input
        .pod
        .spec
        .as_ref()
        .and_then(|s| s.enable_service_links)
        .unwrap_or(true);
    let own = namespace(input);
    let mut variables = Vec::new();
    let api = ServiceName {
        namespace: "default".into(),
        name: "kubernetes".into(),
    };
    if let Some(service) = input.services.get(&api) {
        of_service(&api.name, service, &mut variables);
    }
    if !links {
        return variables;
    }
    let first = ServiceName {
        namespace: own.into(),
        name: String::new(),
    };
    // Only the namespace is walked: a pod's start does not cost the cluster's Services.
    let of_own = input.services.range(first..);
    for (name, service) in of_own.take_while(|(name, _)| name.namespace == own) {
        if *name != api {
            of_service(&name.name, service, &mut variables);
        }
    }
    variables
}

fn of_service(name: &str, service: &proto::Service, variables: &mut Vec<(String, String)>) {
    let address = service
        .cluster_ips
        .first()
        .and_then(|bytes| match bytes.len() {
            4 => <[u8; 4]>::try_from(&bytes[..]).ok().map(IpAddr::from),
            16 => <[u8; 16]>::try_from(&bytes[..]).ok().map(IpAddr::from),
            _ => None,
        });
    let (Some(address), Some(first)) = (address, service.ports.first()) else {
        return; // headless, or no port
    };
    let upper = |text: &str| text.to_ascii_uppercase().replace('-', "_");
    let prefix = upper(name);
    let host = match address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    };
    let protocol = |number: u32| match number {
        17 => "udp",
        132 => "sctp",
        _ => "tcp",
    };
    let mut put = |name: String, value: String| variables.push((name, value));
    put(format!("{prefix}_SERVICE_HOST"), address.to_string());
    put(format!("{prefix}_SERVICE_PORT"), first.port.to_string());
    for port in service.ports.iter().filter(|p| !p.name.is_empty()) {
        put(
            format!("{prefix}_SERVICE_PORT_{}", upper(&port.name)),
            port.port.to_string(),
        );
    }
    let url =
        |port: &proto::ServicePort| format!("{}://{host}:{}", protocol(port.protocol), port.port);
    put(format!("{prefix}_PORT"), url(first));
    for port in &service.ports {
        let kind = protocol(port.protocol);
        let base = format!("{prefix}_PORT_{}_{}", port.port, kind.to_ascii_uppercase());
        put(base.clone(), url(port));
        put(format!("{base}_PROTO"), kind.to_owned());
        put(format!("{base}_PORT"), port.port.to_string());
        put(format!("{base}_ADDR"), address.to_string());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn blobs() -> Blobs {
        let key = |plural: &str, name: &str| BlobKey {
            plural: plural.to_owned(),
            namespace: "shop".to_owned(),
            name: name.to_owned(),
        };
        [
            (
                key("configmaps", "conf"),
                json!({"data": {"color": "red", "bad key": "x", "9x": "y"}}),
            ),
            (
                key("secrets", "pass"),
                json!({"data": {"word": "aHVudGVy", "raw": "/w=="}}),
            ),
        ]
        .map(|(k, v)| (k, Arc::new(v)))
        .into()
    }

    fn try_env(container: Value, pod: Value) -> Result<HashMap<String, String>, EnvError> {
        let container: Container = serde_json::from_value(container).unwrap();
        let mut pod: Pod = serde_json::from_value(pod).unwrap();
        pod.metadata.namespace = Some("shop".to_owned());
        let web = ServiceName {
            namespace: "shop".into(),
            name: "web-page".into(),
        };
        let service = proto::Service {
            cluster_ips: vec![vec![10, 96, 0, 7].into()],
            ports: vec![proto::ServicePort {
                name: "http".into(),
                protocol: 6,
                port: 80,
                ..Default::default()
            }],
            ..Default::default()
        };
        let input = EnvInput {
            container: &container,
            pod: &pod,
            blobs: &blobs(),
            services: &OrdMap::unit(web, Arc::new(service)),
            pod_addresses: &["10.244.0.5".parse().unwrap()],
            host_addresses: &["192.0.2.1".parse().unwrap()],
            node_name: "worker",
        };
        resolve(&input).map(|list| list.into_iter().collect())
    }

    fn env(container: Value) -> HashMap<String, String> {
        let pod = json!({"metadata": {"name": "p", "labels": {"app": "web"}}, "spec": {"containers": []}});
        try_env(container, pod).unwrap()
    }

    #[test]
    fn values_come_from_everywhere_and_later_ones_win() {
        let env = env(json!({"name": "c",
            "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}},
            "envFrom": [{"prefix": "P_", "configMapRef": {"name": "conf"}},
                        {"configMapRef": {"name": "conf"}},
                        {"secretRef": {"name": "none", "optional": true}}],
            "env": [
                {"name": "A", "value": "one"},
                {"name": "B", "value": "$(A)-$$(A)-$(NOPE)-$(WEB_PAGE_SERVICE_HOST)"},
                {"name": "color", "value": "blue"},
                {"name": "PASS", "valueFrom": {"secretKeyRef": {"name": "pass", "key": "word"}}},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
                {"name": "MEM", "valueFrom": {"resourceFieldRef":
                    {"resource": "limits.memory", "divisor": "1Mi"}}},
                {"name": "GONE", "valueFrom": {"configMapKeyRef":
                    {"name": "conf", "key": "none", "optional": true}}},
                {"name": "EMPTY"}]}));
        let get = |name: &str| env.get(name).map(String::as_str);
        assert_eq!(get("B"), Some("one-$(A)-$(NOPE)-10.96.0.7"));
        assert_eq!((get("color"), get("P_color")), (Some("blue"), Some("red")));
        assert_eq!(
            (get("bad key"), get("9x"), get("P_9x")),
            (None, None, Some("y"))
        );
        assert_eq!(
            (get("PASS"), get("IP"), get("APP")),
            (Some("hunter"), Some("10.244.0.5"), Some("web"))
        );
        assert_eq!(
            (get("NODE"), get("CPU"), get("MEM")),
            (Some("worker"), Some("2"), Some("64"))
        );
        assert_eq!((get("GONE"), get("EMPTY")), (None, Some("")));
        assert_eq!(get("WEB_PAGE_SERVICE_PORT_HTTP"), Some("80"));
        assert_eq!(get("WEB_PAGE_PORT_80_TCP"), Some("tcp://10.96.0.7:80"));
        assert_eq!(get("WEB_PAGE_PORT_80_TCP_ADDR"), Some("10.96.0.7"));
    }

    #[test]
    fn service_links_can_be_turned_off() {
        let pod = json!({"metadata": {}, "spec": {"containers": [], "enableServiceLinks": false}});
        assert!(try_env(json!({"name": "c"}), pod).unwrap().is_empty());
    }

    #[test]
    fn what_is_missing_is_named() {
        let pod = json!({"metadata": {}, "spec": {"containers": []}});
        let error = |container: Value| try_env(container, pod.clone()).unwrap_err().to_string();
        let from =
            |source: Value| json!({"name": "c", "env": [{"name": "A", "valueFrom": source}]});
        assert_eq!(
            error(json!({"name": "c", "envFrom": [{"configMapRef": {"name": "x"}}]})),
            "configmap \"x\" not found"
        );
        assert_eq!(
            error(from(json!({"secretKeyRef": {"name": "pass", "key": "no"}}))),
            "couldn't find key \"no\" in secret shop/pass"
        );
        let raw = error(from(
            json!({"secretKeyRef": {"name": "pass", "key": "raw"}}),
        ));
        assert!(raw.contains("no text") && raw.contains("\"A\""), "{raw}");
        assert!(error(from(json!({"fieldRef": {"fieldPath": "spec.x"}}))).contains("spec.x"));
    }
}
