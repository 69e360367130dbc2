//! Rules for Services and EndpointSlices.

use super::{IMMUTABLE, each, names, one_of};
use crate::field::{FieldError, Path};
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
/// Kubernetes' limits of one EndpointSlice.
const ENDPOINTS_MAX: usize = 1000;
const SLICE_PORTS_MAX: usize = 20_000;
const ENDPOINT_ADDRESSES_MAX: usize = 100;
const CLUSTER_IPS_MAX: usize = 2;
/// Far more than any Service has; every node keeps each one.
const EXTERNAL_IPS_MAX: usize = 256;
const SOURCE_RANGES_MAX: usize = 256;
/// `sessionAffinityConfig.clientIP.timeoutSeconds`: one day.
const AFFINITY_TIMEOUT_MAX_S: i32 = 86_400;

/// `spec.trafficDistribution`; PreferClose is the old name of PreferSameZone.
const DISTRIBUTIONS: &[&str] = &["PreferClose", "PreferSameNode", "PreferSameZone"];
/// How a Service's connections are spread over its backends.
pub(super) const LOAD_BALANCING_ANNOTATION: &str = "gantry.dev/load-balancing";
const LEAST_CONNECTIONS: &str = "least-connections";
/// Whether backends of other nodes answer clients outside by themselves.
const DIRECT_RETURN_ANNOTATION: &str = "gantry.dev/direct-server-return";
const RANDOM: &str = "random";

/// A Service.
pub fn service(service: &Service) -> Vec<FieldError> {
    let path = Path::new("spec");
    let Some(spec) = &service.spec else {
        return vec![FieldError::required(&path, "")];
    };
    let mut errors = Vec::new();
    let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
    let kinds = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    one_of(&path.child("type"), Some(kind), &kinds, &mut errors);
    let headless = spec.cluster_ip.as_deref() == Some("None");
    let all_ports = spec.ports.as_deref().unwrap_or_default();
    if all_ports.is_empty() && !headless && kind != "ExternalName" {
        errors.push(FieldError::required(&path.child("ports"), ""));
    }
    if headless && matches!(kind, "NodePort" | "LoadBalancer") {
        let detail = format!("may not be set to 'None' for {kind} services");
        errors.push(FieldError::invalid(
            &path.child("clusterIPs").index(0),
            "None",
            &detail,
        ));
    }
    if kind == "ExternalName" {
        external_name(spec, &path, &mut errors);
    }
    ports(all_ports, kind, &path, &mut errors);
    errors.extend(super::labels(
        spec.selector.as_ref(),
        &path.child("selector"),
    ));
    addresses(spec, &path, &mut errors);
    let text = Option::as_deref;
    let affinity = text(&spec.session_affinity);
    one_of(
        &path.child("sessionAffinity"),
        affinity,
        &["ClientIP", "None"],
        &mut errors,
    );
    let timeout = spec
        .session_affinity_config
        .as_ref()
        .and_then(|c| c.client_ip.as_ref());
    if let Some(seconds) = timeout.and_then(|c| c.timeout_seconds)
        && !(1..=AFFINITY_TIMEOUT_MAX_S).contains(&seconds)
    {
        let path = path
            .child("sessionAffinityConfig")
            .child("clientIP")
            .child("timeoutSeconds");
        let detail = "must be greater than 0 and less than or equal to 86400";
        errors.push(FieldError::invalid(&path, seconds, detail));
    }
    for (field, value) in [
        ("externalTrafficPolicy", &spec.external_traffic_policy),
        ("internalTrafficPolicy", &spec.internal_traffic_policy),
    ] {
        one_of(
            &path.child(field),
            text(value),
            &["Cluster", "Local"],
            &mut errors,
        );
    }
    let distribution = text(&spec.traffic_distribution);
    let field = path.child("trafficDistribution");
    one_of(&field, distribution, DISTRIBUTIONS, &mut errors);
    let annotations = service.metadata.annotations.as_ref();
    if let Some(value) = annotations.and_then(|a| a.get(LOAD_BALANCING_ANNOTATION)) {
        let known = [LEAST_CONNECTIONS, RANDOM];
        if !known.contains(&value.as_str()) {
            let path = Path::new("metadata").child("annotations");
            let path = path.key(LOAD_BALANCING_ANNOTATION);
            errors.push(FieldError::not_supported(&path, value.as_str(), &known));
        }
    }
    if let Some(value) = annotations.and_then(|a| a.get(DIRECT_RETURN_ANNOTATION)) {
        let known = ["false", "true"];
        if !known.contains(&value.as_str()) {
            let path = Path::new("metadata").child("annotations");
            let path = path.key(DIRECT_RETURN_ANNOTATION);
            errors.push(FieldError::not_supported(&path, value.as_str(), &known));
        }
    }
    outside(spec, kind, &path, &mut errors);
    errors
}

/// Whether what comes from outside goes on to the backend's node as it is, which answers.
pub fn direct_return(service: &Service) -> bool {
    let annotations = service.metadata.annotations.as_ref();
    annotations
        .and_then(|a| a.get(DIRECT_RETURN_ANNOTATION))
        .is_some_and(|value| value == "true")
}

/// Whether a Service's connections go to the backend with fewer of them, of two chosen at random.
pub fn least_connections(service: &Service) -> bool {
    let annotations = service.metadata.annotations.as_ref();
    let chosen = annotations.and_then(|a| a.get(LOAD_BALANCING_ANNOTATION));
    chosen.is_some_and(|value| value == LEAST_CONNECTIONS)
}

/// What only Services have that are reached from outside the cluster.
fn outside(spec: &ServiceSpec, kind: &str, path: &Path, errors: &mut Vec<FieldError>) {
    let balancer = kind == "LoadBalancer";
    let external_ips = spec
        .external_ips
        .as_ref()
        .is_some_and(|ips| !ips.is_empty());
    let reached = balancer || kind == "NodePort" || (kind == "ClusterIP" && external_ips);
    let policy = spec.external_traffic_policy.as_deref();
    if let Some(policy) = policy.filter(|policy| !reached && !policy.is_empty()) {
        let detail = "may only be set for externally-accessible services";
        let path = path.child("externalTrafficPolicy");
        errors.push(FieldError::invalid(&path, policy, detail));
    }
    if let Some(port) = spec.health_check_node_port.filter(|port| *port != 0) {
        let path = path.child("healthCheckNodePort");
        if !balancer || policy != Some("Local") {
            let detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` \
                          is 'Local'";
            errors.push(FieldError::invalid(&path, port, detail));
        }
        for rule in names::port_number(port) {
            errors.push(FieldError::invalid(&path, port, &rule));
        }
    }
    let ranges = spec
        .load_balancer_source_ranges
        .as_deref()
        .unwrap_or_default();
    for (field, is_set) in [
        (
            "allocateLoadBalancerNodePorts",
            spec.allocate_load_balancer_node_ports.is_some(),
        ),
        ("loadBalancerClass", spec.load_balancer_class.is_some()),
        ("loadBalancerSourceRanges", !ranges.is_empty()),
    ] {
        if is_set && !balancer {
            let detail = "may only be used when `type` is 'LoadBalancer'";
            errors.push(FieldError::forbidden(&path.child(field), detail));
        }
    }
    if let Some(class) = spec.load_balancer_class.as_deref().filter(|_| balancer) {
        let path = path.child("loadBalancerClass");
        each(&path, class, names::qualified_name(class), errors);
    }
    let ranges_path = path.child("loadBalancerSourceRanges");
    if ranges.len() > SOURCE_RANGES_MAX {
        errors.push(FieldError::too_many(
            &ranges_path,
            ranges.len(),
            SOURCE_RANGES_MAX,
        ));
        return;
    }
    for (i, range) in ranges.iter().enumerate() {
        // Kubernetes allows spaces around them, since they were once an annotation.
        if range.trim().parse::<ipnet::IpNet>().is_err() {
            let detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            errors.push(FieldError::invalid(
                &ranges_path.index(i),
                range.as_str(),
                detail,
            ));
        }
    }
    if let Some(address) = spec
        .load_balancer_ip
        .as_deref()
        .filter(|text| !text.is_empty())
    {
        self::address(&path.child("loadBalancerIP"), address, errors);
    }
}

fn external_name(spec: &ServiceSpec, path: &Path, errors: &mut Vec<FieldError>) {
    let name = spec.external_name.as_deref().unwrap_or_default();
    let name_path = path.child("externalName");
    if name.is_empty() {
        errors.push(FieldError::required(&name_path, ""));
    } else {
        let name = name.strip_suffix('.').unwrap_or(name);
        each(
            &name_path,
            name,
            names::dns1123_subdomain(&name.to_lowercase()),
            errors,
        );
    }
    if spec.cluster_ip.as_ref().is_some_and(|ip| !ip.is_empty()) {
        let detail = "may not be set for ExternalName services";
        errors.push(FieldError::forbidden(&path.child("clusterIPs"), detail));
    }
}

fn ports(ports: &[ServicePort], kind: &str, path: &Path, errors: &mut Vec<FieldError>) {
    let mut port_names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    let mut node_ports = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let path = path.child("ports").index(i);
        let name = port.name.as_deref().unwrap_or_default();
        if name.is_empty() && ports.len() > 1 {
            errors.push(FieldError::required(&path.child("name"), ""));
        } else if !name.is_empty() {
            each(
                &path.child("name"),
                name,
                names::dns1123_label(name),
                errors,
            );
            if !port_names.insert(name) {
                errors.push(FieldError::duplicate(&path.child("name"), name));
            }
        }
        for rule in names::port_number(port.port) {
            errors.push(FieldError::invalid(&path.child("port"), port.port, &rule));
        }
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        one_of(&path.child("protocol"), Some(protocol), PROTOCOLS, errors);
        if !numbers.insert((port.port, protocol)) {
            let value = format!("{protocol}/{}", port.port);
            errors.push(FieldError::duplicate(&path, value));
        }
        let target = &path.child("targetPort");
        match &port.target_port {
            Some(IntOrString::Int(number)) => {
                for rule in names::port_number(*number) {
                    errors.push(FieldError::invalid(target, *number, &rule));
                }
            }
            Some(IntOrString::String(name)) => each(target, name, names::port_name(name), errors),
            None => {}
        }
        let Some(node_port) = port.node_port.filter(|p| *p != 0) else {
            continue;
        };
        let path = path.child("nodePort");
        if matches!(kind, "ClusterIP" | "ExternalName") {
            let detail = format!("may not be used when `type` is '{kind}'");
            errors.push(FieldError::forbidden(&path, &detail));
        }
        for rule in names::port_number(node_port) {
            errors.push(FieldError::invalid(&path, node_port, &rule));
        }
        if !node_ports.insert((node_port, protocol)) {
            errors.push(FieldError::duplicate(&path, node_port));
        }
    }
}

fn addresses(spec: &ServiceSpec, path: &Path, errors: &mut Vec<FieldError>) {
    let ips = spec.cluster_ips.as_deref().unwrap_or_default();
    if ips.len() > CLUSTER_IPS_MAX {
        errors.push(FieldError::too_many(
            &path.child("clusterIPs"),
            ips.len(),
            CLUSTER_IPS_MAX,
        ));
    }
    for (i, ip) in ips.iter().enumerate().filter(|(_, ip)| *ip != "None") {
        address(&path.child("clusterIPs").index(i), ip, errors);
    }
    let first = spec.cluster_ip.as_deref().unwrap_or_default();
    if !first.is_empty() && first != "None" {
        address(&path.child("clusterIP"), first, errors);
    }
    if let Some(other) = ips.first().filter(|ip| !first.is_empty() && *ip != first) {
        let detail = "must have the same value as `clusterIP`";
        errors.push(FieldError::invalid(
            &path.child("clusterIPs"),
            other.as_str(),
            detail,
        ));
    }
    let external = spec.external_ips.as_deref().unwrap_or_default();
    let external_path = path.child("externalIPs");
    if external.len() > EXTERNAL_IPS_MAX {
        errors.push(FieldError::too_many(
            &external_path,
            external.len(),
            EXTERNAL_IPS_MAX,
        ));
    }
    for (i, ip) in external.iter().take(EXTERNAL_IPS_MAX).enumerate() {
        address(&external_path.index(i), ip, errors);
        not_special(&external_path.index(i), ip, errors);
    }
    for (i, family) in spec.ip_families.iter().flatten().enumerate() {
        let path = path.child("ipFamilies").index(i);
        one_of(&path, Some(family), &["IPv4", "IPv6"], errors);
        let before = spec.ip_families.iter().flatten().take(i);
        if before.into_iter().any(|other| other == family) {
            errors.push(FieldError::duplicate(&path, family.as_str()));
        }
    }
    let policies = ["SingleStack", "PreferDualStack", "RequireDualStack"];
    one_of(
        &path.child("ipFamilyPolicy"),
        spec.ip_family_policy.as_deref(),
        &policies,
        errors,
    );
}

fn address(path: &Path, text: &str, errors: &mut Vec<FieldError>) {
    if text.parse::<IpAddr>().is_err() {
        let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
        errors.push(FieldError::invalid(path, text, detail));
    }
}

/// Traffic to an address that means something else everywhere is not to be taken over.
fn not_special(path: &Path, text: &str, errors: &mut Vec<FieldError>) {
    let Ok(ip) = text.parse::<IpAddr>() else {
        return;
    };
    let (link_local, multicast) = match ip {
        IpAddr::V4(v4) => (v4.is_link_local(), v4.octets().starts_with(&[224, 0, 0])),
        IpAddr::V6(v6) => (
            v6.is_unicast_link_local(),
            v6.segments()[0] & 0xff0f == 0xff02,
        ),
    };
    for (is_such, detail) in [
        (
            ip.is_unspecified(),
            format!("may not be unspecified ({ip})"),
        ),
        (
            ip.is_loopback(),
            "may not be in the loopback range (127.0.0.0/8, ::1/128)".to_owned(),
        ),
        (
            link_local,
            "may not be in the link-local range (169.254.0.0/16, fe80::/10)".to_owned(),
        ),
        (
            multicast,
            "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)".to_owned(),
        ),
    ] {
        if is_such {
            errors.push(FieldError::invalid(path, text, &detail));
        }
    }
}

/// A Service keeps its address, and its load balancer class, as long as it has one.
pub fn service_update(new: &Service, old: &Service) -> Vec<FieldError> {
    let (Some(new), Some(old)) = (&new.spec, &old.spec) else {
        return Vec::new();
    };
    let balancer = |s: &ServiceSpec| s.type_.as_deref() == Some("LoadBalancer");
    if balancer(new) && balancer(old) && new.load_balancer_class != old.load_balancer_class {
        let path = Path::new("spec").child("loadBalancerClass");
        let class = new.load_balancer_class.as_deref().unwrap_or_default();
        return vec![FieldError::invalid(&path, class, "may not change once set")];
    }
    let external = |s: &ServiceSpec| s.type_.as_deref() == Some("ExternalName");
    let old_ip = old.cluster_ip.as_deref().unwrap_or_default();
    let new_ip = new.cluster_ip.as_deref().unwrap_or_default();
    // An absent address means "as it is": the registry fills it in.
    if external(new) || external(old) || old_ip.is_empty() || new_ip.is_empty() || old_ip == new_ip
    {
        return Vec::new();
    }
    let path = Path::new("spec").child("clusterIPs").index(0);
    vec![FieldError::invalid(&path, new_ip, IMMUTABLE)]
}

/// An EndpointSlice.
pub fn endpoint_slice(slice: &EndpointSlice) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let kind = slice.address_type.as_str();
    let path = Path::new("addressType");
    if kind.is_empty() {
        errors.push(FieldError::required(&path, ""));
    }
    one_of(&path, Some(kind), &["FQDN", "IPv4", "IPv6"], &mut errors);
    let endpoints = slice.endpoints.as_deref().unwrap_or_default();
    let path = Path::new("endpoints");
    if endpoints.len() > ENDPOINTS_MAX {
        errors.push(FieldError::too_many(&path, endpoints.len(), ENDPOINTS_MAX));
        return errors;
    }
    for (i, endpoint) in endpoints.iter().enumerate() {
        let path = path.index(i).child("addresses");
        if endpoint.addresses.is_empty() {
            errors.push(FieldError::required(
                &path,
                "must contain at least 1 address",
            ));
        }
        if endpoint.addresses.len() > ENDPOINT_ADDRESSES_MAX {
            let count = endpoint.addresses.len();
            errors.push(FieldError::too_many(&path, count, ENDPOINT_ADDRESSES_MAX));
        }
        for (i, text) in endpoint
            .addresses
            .iter()
            .take(ENDPOINT_ADDRESSES_MAX)
            .enumerate()
        {
            endpoint_address(kind, text, &path.index(i), &mut errors);
        }
    }
    let ports = slice.ports.as_deref().unwrap_or_default();
    let path = Path::new("ports");
    if ports.len() > SLICE_PORTS_MAX {
        errors.push(FieldError::too_many(&path, ports.len(), SLICE_PORTS_MAX));
    }
    let mut port_names = BTreeSet::new();
    for (i, port) in ports.iter().take(SLICE_PORTS_MAX).enumerate() {
        let path = path.index(i);
        let name = port.name.as_deref().unwrap_or_default();
        if !port_names.insert(name) {
            errors.push(FieldError::duplicate(&path.child("name"), name));
        }
        one_of(
            &path.child("protocol"),
            port.protocol.as_deref(),
            PROTOCOLS,
            &mut errors,
        );
        for rule in port.port.map(names::port_number).unwrap_or_default() {
            errors.push(FieldError::invalid(&path.child("port"), port.port, &rule));
        }
    }
    errors
}

fn endpoint_address(kind: &str, text: &str, path: &Path, errors: &mut Vec<FieldError>) {
    match kind {
        "IPv4" if text.parse::<Ipv4Addr>().is_err() => {
            errors.push(FieldError::invalid(
                path,
                text,
                "must be a valid IPv4 address",
            ));
        }
        "IPv6" if text.parse::<Ipv6Addr>().is_err() => {
            errors.push(FieldError::invalid(
                path,
                text,
                "must be a valid IPv6 address",
            ));
        }
        "FQDN" => each(path, text, names::dns1123_subdomain(text), errors),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn unknown_ways_to_spread_connections_are_refused_by_path() {
        let refusals = |balancing: &str, distribution: &str| {
            let service = serde_json::from_value(json!({
                "metadata": {"name": "s", "annotations": {LOAD_BALANCING_ANNOTATION: balancing}},
                "spec": {"ports": [{"port": 80}], "trafficDistribution": distribution},
            }));
            let errors = super::service(&service.unwrap());
            errors.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        for distribution in DISTRIBUTIONS {
            assert!(refusals("random", distribution).is_empty());
        }
        assert!(refusals("least-connections", "PreferClose").is_empty());
        let refused = refusals("round-robin", "Nearby");
        assert_eq!(refused.len(), 2, "{refused:?}");
        assert!(
            refused[0].starts_with("spec.trafficDistribution: Unsupported"),
            "{refused:?}"
        );
        let path = "metadata.annotations[gantry.dev/load-balancing]: Unsupported value";
        assert!(refused[1].starts_with(path), "{refused:?}");
    }
}
