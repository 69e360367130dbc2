//! Rules for NetworkPolicies. Source: `pkg/apis/networking/validation/validation.go`.

use super::{each, labels, names};
use crate::field::{FieldError, Path};
use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
const TYPES: &[&str] = &["Egress", "Ingress"];

/// A NetworkPolicy.
pub fn network_policy(policy: &NetworkPolicy) -> Vec<FieldError> {
    let path = Path::new("spec");
    let Some(spec) = &policy.spec else {
        return vec![FieldError::required(&path, "")];
    };
    let mut errors = Vec::new();
    if let Some(pods) = &spec.pod_selector {
        selector(pods, &path.child("podSelector"), &mut errors);
    }
    for (i, rule) in spec.ingress.iter().flatten().enumerate() {
        let path = path.child("ingress").index(i);
        ports(rule.ports.as_deref(), &path, &mut errors);
        peers(rule.from.as_deref(), &path.child("from"), &mut errors);
    }
    for (i, rule) in spec.egress.iter().flatten().enumerate() {
        let path = path.child("egress").index(i);
        ports(rule.ports.as_deref(), &path, &mut errors);
        peers(rule.to.as_deref(), &path.child("to"), &mut errors);
    }
    let types = spec.policy_types.as_deref().unwrap_or_default();
    let path = path.child("policyTypes");
    if types.len() > TYPES.len() {
        let detail = "may not specify more than two policyTypes";
        errors.push(FieldError::invalid(&path, types.join(","), detail));
        return errors;
    }
    for (i, name) in types.iter().enumerate() {
        if !TYPES.contains(&name.as_str()) {
            errors.push(FieldError::not_supported(
                &path.index(i),
                name.as_str(),
                TYPES,
            ));
        }
    }
    errors
}

fn ports(ports: Option<&[NetworkPolicyPort]>, rule: &Path, errors: &mut Vec<FieldError>) {
    for (i, port) in ports.into_iter().flatten().enumerate() {
        let path = rule.child("ports").index(i);
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        if !PROTOCOLS.contains(&protocol) {
            let path = path.child("protocol");
            errors.push(FieldError::not_supported(&path, protocol, PROTOCOLS));
        }
        let end_path = path.child("endPort");
        let mut no_end = |detail: &str| {
            if let Some(end) = port.end_port {
                errors.push(FieldError::invalid(&end_path, end, detail));
            }
        };
        match &port.port {
            None => no_end("may not be specified when `port` is not specified"),
            Some(IntOrString::String(name)) => {
                no_end("may not be specified when `port` is non-numeric");
                each(&path.child("port"), name, names::port_name(name), errors);
            }
            Some(IntOrString::Int(number)) => {
                for rule in names::port_number(*number) {
                    errors.push(FieldError::invalid(&path.child("port"), *number, &rule));
                }
                if let Some(end) = port.end_port {
                    if end < *number {
                        let detail = "must be greater than or equal to `port`";
                        errors.push(FieldError::invalid(&end_path, end, detail));
                    }
                    for rule in names::port_number(end) {
                        errors.push(FieldError::invalid(&end_path, end, &rule));
                    }
                }
            }
        }
    }
}

fn peers(peers: Option<&[NetworkPolicyPeer]>, path: &Path, errors: &mut Vec<FieldError>) {
    for (i, peer) in peers.into_iter().flatten().enumerate() {
        let path = path.index(i);
        if let Some(pods) = &peer.pod_selector {
            selector(pods, &path.child("podSelector"), errors);
        }
        if let Some(namespaces) = &peer.namespace_selector {
            selector(namespaces, &path.child("namespaceSelector"), errors);
        }
        if let Some(block) = &peer.ip_block {
            ip_block(block, &path.child("ipBlock"), errors);
        }
        let selects = peer.pod_selector.is_some() || peer.namespace_selector.is_some();
        if !selects && peer.ip_block.is_none() {
            errors.push(FieldError::required(&path, "must specify a peer"));
        } else if selects && peer.ip_block.is_some() {
            let detail = "may not specify both ipBlock and another peer";
            errors.push(FieldError::forbidden(&path, detail));
        }
    }
}

fn ip_block(block: &IPBlock, path: &Path, errors: &mut Vec<FieldError>) {
    let cidr_path = path.child("cidr");
    if block.cidr.is_empty() {
        errors.push(FieldError::required(&cidr_path, ""));
        return;
    }
    let whole = cidr(&block.cidr, &cidr_path, errors);
    for (i, text) in block.except.iter().flatten().enumerate() {
        let path = path.child("except").index(i);
        let (Some(except), Some(whole)) = (cidr(text, &path, errors), whole) else {
            continue;
        };
        if except == whole || !whole.contains(&except) {
            let detail = "must be a strict subset of `cidr`";
            errors.push(FieldError::invalid(&path, text.as_str(), detail));
        }
    }
}

/// Bits beyond the prefix are ignored, as Kubernetes has always done.
fn cidr(text: &str, path: &Path, errors: &mut Vec<FieldError>) -> Option<IpNet> {
    let net = text.parse::<IpNet>().ok().map(|net| net.trunc());
    let detail = match net {
        None => "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
        Some(IpNet::V6(v6)) if v6.addr().to_ipv4_mapped().is_some() && v6.prefix_len() >= 96 => {
            "must not have an IPv4-mapped IPv6 address"
        }
        Some(net) => return Some(net),
    };
    errors.push(FieldError::invalid(path, text, detail));
    None
}

/// A label selector that may be empty. Source: `apis/meta/v1/validation`.
fn selector(selector: &LabelSelector, path: &Path, errors: &mut Vec<FieldError>) {
    errors.extend(labels(
        selector.match_labels.as_ref(),
        &path.child("matchLabels"),
    ));
    for (i, expression) in selector.match_expressions.iter().flatten().enumerate() {
        let path = path.child("matchExpressions").index(i);
        let key = expression.key.as_str();
        each(&path.child("key"), key, names::qualified_name(key), errors);
        let values = expression.values.as_deref().unwrap_or_default();
        let at = path.child("values");
        match expression.operator.as_str() {
            "In" | "NotIn" if values.is_empty() => {
                let detail = "must be specified when `operator` is 'In' or 'NotIn'";
                errors.push(FieldError::required(&at, detail));
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                errors.push(FieldError::forbidden(&at, detail));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => {
                let detail = "not a valid selector operator";
                errors.push(FieldError::invalid(&path.child("operator"), other, detail));
            }
        }
        for (i, value) in values.iter().enumerate() {
            each(&at.index(i), value, names::label_value(value), errors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn errors(spec: &Value) -> Vec<String> {
        let policy = serde_json::from_value(json!({"spec": spec})).unwrap();
        let errors = network_policy(&policy);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_kubernetes_takes_is_taken() {
        for spec in [
            json!({}),
            json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
            json!({"ingress": [{}], "egress": [{"to": [], "ports": []}]}),
            json!({"ingress": [{"from": [
                {"podSelector": {}, "namespaceSelector": {"matchExpressions": [
                    {"key": "a", "operator": "NotIn", "values": ["b"]}]}},
                {"ipBlock": {"cidr": "10.0.0.1/8", "except": ["10.1.0.0/16"]}},
                {"ipBlock": {"cidr": "::/0", "except": ["2001:db8::/32"]}}],
                "ports": [{"port": 80, "endPort": 80}, {"port": "http", "protocol": "UDP"}, {}]}]}),
        ] {
            assert_eq!(errors(&spec), Vec::<String>::new(), "{spec}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_by_its_path() {
        let rule = |rule: Value| json!({"egress": [rule]});
        let port = |port: Value| rule(json!({"ports": [port]}));
        let peer = |peer: Value| rule(json!({"to": [peer]}));
        let block = |cidr: &str, except: &[&str]| {
            peer(json!({"ipBlock": {"cidr": cidr, "except": except}}))
        };
        let expression =
            |expression: Value| json!({"podSelector": {"matchExpressions": [expression]}});
        for (spec, wanted) in [
            (
                port(json!({"port": 0})),
                "spec.egress[0].ports[0].port: Invalid value: 0: ",
            ),
            (
                port(json!({"protocol": "ICMP"})),
                "spec.egress[0].ports[0].protocol: Unsupported",
            ),
            (
                port(json!({"port": 80, "endPort": 79})),
                "spec.egress[0].ports[0].endPort: Invalid value: 79: must be greater than or equal",
            ),
            (
                port(json!({"port": 80, "endPort": 65_536})),
                "spec.egress[0].ports[0].endPort: Invalid value: 65536: must be between",
            ),
            (
                port(json!({"port": "http", "endPort": 80})),
                "endPort: Invalid value: 80: may not be specified when `port` is non-numeric",
            ),
            (
                port(json!({"endPort": 80})),
                "endPort: Invalid value: 80: may not be specified when `port` is not specified",
            ),
            (
                peer(json!({})),
                "spec.egress[0].to[0]: Required value: must specify a peer",
            ),
            (
                peer(json!({"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}})),
                "spec.egress[0].to[0]: Forbidden: may not specify both ipBlock and another peer",
            ),
            (
                block("", &[]),
                "spec.egress[0].to[0].ipBlock.cidr: Required value",
            ),
            (
                block("10.0.0.0", &[]),
                "ipBlock.cidr: Invalid value: \"10.0.0.0\": must be a valid",
            ),
            (
                block("::ffff:10.0.0.0/104", &[]),
                "must not have an IPv4-mapped",
            ),
            (
                block("10.0.0.0/8", &["10.1.0.0/16", "11.0.0.0/16"]),
                "ipBlock.except[1]: Invalid value: \"11.0.0.0/16\": must be a strict subset",
            ),
            (
                block("10.0.0.0/8", &["10.9.0.0/8"]),
                "except[0]: Invalid value",
            ),
            (
                block("10.0.0.0/8", &["2001:db8::/32"]),
                "except[0]: Invalid value",
            ),
            (
                expression(json!({"key": "a", "operator": "In"})),
                "spec.podSelector.matchExpressions[0].values: Required value",
            ),
            (
                expression(json!({"key": "a", "operator": "Exists", "values": ["b"]})),
                "spec.podSelector.matchExpressions[0].values: Forbidden",
            ),
            (
                expression(json!({"key": "a", "operator": "Gt", "values": ["1"]})),
                "spec.podSelector.matchExpressions[0].operator: Invalid value",
            ),
            (
                json!({"podSelector": {"matchLabels": {"a": "-"}}}),
                "spec.podSelector.matchLabels[a]: Invalid value",
            ),
            (
                json!({"policyTypes": ["Both"]}),
                "spec.policyTypes[0]: Unsupported value: \"Both\"",
            ),
            (
                json!({"policyTypes": ["Ingress", "Egress", "Ingress"]}),
                "spec.policyTypes: Invalid value",
            ),
        ] {
            let errors = errors(&spec);
            assert_eq!(errors.len(), 1, "{spec}: {errors:?}");
            assert!(errors[0].contains(wanted), "{spec}: {errors:?}");
        }
    }
}
