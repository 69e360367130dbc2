//! What NetworkPolicies need to know of a pod: one reading of it, for the control plane and the node.
//!
//! A pod on the host's network is neither selected nor a peer: its packets have the node's
//! addresses. (Kubernetes leaves this open; other implementations do the same.) A pod that has ended
//! has no address any more, whatever its status still says.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use std::net::IpAddr;

use crate::proto;

/// Namespace and name under which the node's own resolver is a peer: manifests allow names by the labels
/// of the DNS pods that other clusters have, and here there are none. No pod can be called so.
pub const RESOLVER_PEER: (&str, &str) = ("kube-system", "kube-dns.");

/// Whether policies speak of this pod: it has an address of its own and has not ended.
#[must_use]
pub fn takes_part(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    let spec = pod.spec.as_ref();
    let host_network = spec.is_some_and(|spec| spec.host_network == Some(true));
    !host_network && !matches!(phase, Some("Succeeded" | "Failed"))
}

/// The addresses in a pod's status, one per family.
#[must_use]
pub fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else {
        return Vec::new();
    };
    let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    let mut addresses = Vec::new();
    for text in status.pod_ip.as_deref().into_iter().chain(all) {
        match text.parse() {
            Ok(address) if !addresses.contains(&address) => addresses.push(address),
            _ => {}
        }
    }
    addresses
}

/// The named ports of a pod, the first of each name and protocol, as a Service's `targetPort` finds
/// them: containers, then init containers that go on running. Source: `pkg/api/v1/pod/util.go`.
#[must_use]
pub fn named_ports(spec: &PodSpec) -> Vec<proto::BackendPort> {
    let goes_on = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let beside = spec.init_containers.iter().flatten().filter(goes_on);
    let mut ports: Vec<proto::BackendPort> = Vec::new();
    for port in spec
        .containers
        .iter()
        .chain(beside)
        .flat_map(|container| container.ports.iter().flatten())
    {
        let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) else {
            continue;
        };
        let Some(protocol) = protocol_number(port.protocol.as_deref()) else {
            continue;
        };
        let Ok(number) = u16::try_from(port.container_port) else {
            continue;
        };
        if !ports
            .iter()
            .any(|p| p.name == name && p.protocol == protocol)
        {
            ports.push(proto::BackendPort {
                name: name.to_owned(),
                protocol,
                port: u32::from(number),
            });
        }
    }
    ports
}

/// IANA's number of a protocol that policies can name; Kubernetes' default is TCP.
#[must_use]
pub fn protocol_number(name: Option<&str>) -> Option<u32> {
    match name {
        None | Some("" | "TCP") => Some(6),
        Some("UDP") => Some(17),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: serde_json::Value, status: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"spec": spec, "status": status})).unwrap()
    }

    #[test]
    fn named_ports_are_the_first_of_their_name_and_protocol() {
        let pod = pod(
            json!({"containers": [
                {"name": "a", "ports": [{"name": "web", "containerPort": 80}, {"containerPort": 81}]},
                {"name": "b", "ports": [{"name": "web", "containerPort": 90},
                    {"name": "web", "containerPort": 53, "protocol": "UDP"},
                    {"name": "s", "containerPort": 1, "protocol": "SCTP"}]}],
                "initContainers": [
                    {"name": "i", "ports": [{"name": "gone", "containerPort": 1}]},
                    {"name": "j", "restartPolicy": "Always",
                        "ports": [{"name": "side", "containerPort": 2}]}]}),
            json!({}),
        );
        let ports = named_ports(pod.spec.as_ref().unwrap());
        let ports: Vec<_> = ports
            .iter()
            .map(|p| (p.name.as_str(), p.protocol, p.port))
            .collect();
        assert_eq!(ports, [("web", 6, 80), ("web", 17, 53), ("side", 6, 2)]);
    }

    #[test]
    fn pods_of_the_host_and_ended_pods_take_no_part() {
        let none = json!({"containers": []});
        assert!(takes_part(&pod(none.clone(), json!({"phase": "Pending"}))));
        assert!(!takes_part(&pod(none.clone(), json!({"phase": "Failed"}))));
        let host = json!({"containers": [], "hostNetwork": true});
        assert!(!takes_part(&pod(host, json!({"phase": "Running"}))));
        let both = json!({"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]});
        let wanted: Vec<IpAddr> = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        assert_eq!(addresses(&pod(none, both)), wanted);
    }
}
