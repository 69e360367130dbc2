//! Host ports: a port of the node that is a port of one of its pods. Pure.
//!
//! ```text
//!  pods of this node ─┐
//!  its own addresses ─┴► [BackendSet] per pod ─► plan        the pod is the only backend
//! ```
//! A host port is a frontend at each address of *this* node (or at `hostIP` alone), for clients on the
//! node and for those outside. Another node's host port is that node's: it is not translated here. A
//! pod with host network has the port itself and needs no frontend. Loopback addresses are left alone:
//! every network namespace has its own.
//!
//! Invariants: pods in the order of their UIDs, the same list from the same view; a pod has frontends
//! from when its address is known until it has ended.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ebpf_maps::services::{Addr, FrontendKey, SCOPE_ADDRESS, SCOPE_OUTSIDE_ADDRESS, is_v4_mapped};
use gantry_api::k8s_openapi::api::core::v1::{ContainerPort, Pod};

use super::index::{
    Backend, BackendSet, SetName, TCP, UDP, addr_of, label32, label64, parse_address,
};
use crate::ids::PodUid;
use crate::pods::status::is_final;
use crate::view::{ServiceName, View};

/// What begins the name under which a pod's host ports are programmed: no Service has an empty
/// namespace.
const PREFIX: &str = "host-ports/";

/// The name under which a pod's host ports are programmed.
fn name_of(pod: &PodUid) -> ServiceName {
    ServiceName {
        namespace: String::new(),
        name: format!("{PREFIX}{pod}"),
    }
}

/// Whether this is such a name.
pub fn is_host_ports(name: &ServiceName) -> bool {
    name.namespace.is_empty() && name.name.starts_with(PREFIX)
}

/// The host ports of all pods that have some and an address.
///
/// * `node` – this node's name: its addresses are those of its entry in the view.
pub fn host_ports(view: &View, node: &str) -> BTreeMap<ServiceName, Vec<BackendSet>> {
    let own = view.nodes.get(node);
    let own = own.into_iter().flat_map(|route| &route.addresses);
    let own: Vec<Addr> = own.filter_map(|bytes| parse_address(bytes)).collect();
    let of_pods = view.pods.iter().filter_map(|(uid, pod)| {
        let sets = sets_of(uid, pod, &own, node);
        (!sets.is_empty()).then(|| (name_of(uid), sets))
    });
    of_pods.collect()
}

fn sets_of(uid: &PodUid, pod: &Pod, own: &[Addr], node: &str) -> Vec<BackendSet> {
    let (Some(spec), Some(status)) = (&pod.spec, &pod.status) else {
        return Vec::new();
    };
    if spec.host_network.unwrap_or(false) || is_final(status) {
        return Vec::new();
    }
    let addresses = status.pod_ips.iter().flatten();
    let addresses: Vec<Addr> = addresses
        .filter_map(|ip| ip.ip.parse().ok())
        .map(addr_of)
        .collect();
    // Sidecars have ports too, and keep running.
    let containers = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers);
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    let mut sets = Vec::new();
    for port in ports {
        for v6 in [false, true] {
            let address = addresses.iter().find(|addr| is_v4_mapped(addr) != v6);
            sets.extend(address.and_then(|addr| set_of(uid, port, *addr, own, node)));
        }
    }
    sets
}

/// None: it is no host port, or not one of this family.
fn set_of(
    uid: &PodUid,
    port: &ContainerPort,
    pod_addr: Addr,
    own: &[Addr],
    node: &str,
) -> Option<BackendSet> {
    let host_port = u16::try_from(port.host_port?).ok().filter(|n| *n != 0)?;
    let container_port = u16::try_from(port.container_port)
        .ok()
        .filter(|n| *n != 0)?;
    let proto = match port.protocol.as_deref() {
        None | Some("TCP") => TCP,
        Some("UDP") => UDP,
        Some(_) => return None, // refused by the API
    };
    let v6 = !is_v4_mapped(&pod_addr);
    let host_ip = port.host_ip.as_deref().unwrap_or_default();
    let host_ip: Option<IpAddr> = host_ip.parse().ok();
    let host_ip = host_ip.filter(|ip| !ip.is_unspecified()).map(addr_of);
    let at = match &host_ip {
        Some(addr) => std::slice::from_ref(addr),
        None => own,
    };
    let keys = at.iter().filter(|addr| is_v4_mapped(addr) != v6);
    let mut frontends: Vec<FrontendKey> = keys
        .flat_map(|addr| {
            [SCOPE_ADDRESS, SCOPE_OUTSIDE_ADDRESS].map(|scope| FrontendKey {
                addr: *addr,
                port_be: host_port.to_be(),
                proto,
                scope,
            })
        })
        .collect();
    frontends.sort_unstable();
    frontends.dedup();
    if frontends.is_empty() {
        return None;
    }
    Some(BackendSet {
        name: SetName {
            port: format!(
                "{host_port} at {}",
                port.host_ip.as_deref().unwrap_or_default()
            ),
            proto,
            v6,
            local: true,
        },
        frontends,
        backends: vec![Backend {
            addr: pod_addr,
            port_be: container_port.to_be(),
            proto,
            node_id: label32(node),
            pod_id: label64(uid.as_str()),
            on_trial: false,
        }],
        affinity_s: 0,
        least_connections: false,
        direct_return: false,
        elsewhere: false,
        restricted: Vec::new(),
        source_ranges: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use gantry_api::proto;
    use serde_json::json;

    use super::*;
    use crate::services::index::ip_of;

    fn view(spec: serde_json::Value, status: serde_json::Value) -> View {
        let pod = json!({"metadata": {"name": "p", "uid": "u1"}, "spec": spec, "status": status});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let route = |addresses: &[[u8; 4]]| {
            let addresses = addresses.iter().map(|a| a.to_vec().into()).collect();
            Arc::new(proto::NodeRoute {
                addresses,
                ..Default::default()
            })
        };
        let v6: Vec<u8> = "2001:db8::1"
            .parse::<std::net::Ipv6Addr>()
            .unwrap()
            .octets()
            .into();
        let mut own = proto::NodeRoute::clone(&route(&[[192, 0, 2, 1]]));
        own.addresses.push(v6.into());
        let nodes = [
            ("n1".to_owned(), Arc::new(own)),
            ("n2".to_owned(), route(&[[192, 0, 2, 2]])),
        ];
        View {
            rev: 1,
            nodes: Arc::new(nodes.into_iter().collect()),
            pods: Arc::new([(PodUid::new("u1").unwrap(), Arc::new(pod))].into()),
            ..View::default()
        }
    }

    /// Each frontend and backend in words.
    fn words(view: &View) -> Vec<String> {
        let sets = host_ports(view, "n1").into_values().flatten();
        sets.flat_map(|set| {
            let to = &set.backends[0];
            let to = format!("{}:{}", ip_of(&to.addr), u16::from_be(to.port_be));
            let from = set.frontends.into_iter().map(move |key| {
                let at = format!("{} {}", ip_of(&key.addr), u16::from_be(key.port_be));
                format!("{} {at} scope {} -> {to}", key.proto, key.scope)
            });
            from.collect::<Vec<_>>()
        })
        .collect()
    }

    fn ports(ports: serde_json::Value) -> serde_json::Value {
        json!({"containers": [{"name": "c", "ports": ports}]})
    }

    #[test]
    fn a_host_port_is_the_pods_at_the_nodes_own_addresses_in_both_families() {
        let spec = ports(json!([{"containerPort": 80, "hostPort": 8080}, {"containerPort": 81}]));
        let both = json!({"podIPs": [{"ip": "10.244.0.9"}, {"ip": "fd00::9"}]});
        let (inside, outside) = (SCOPE_ADDRESS, SCOPE_OUTSIDE_ADDRESS);
        let wanted = [
            format!("6 192.0.2.1 8080 scope {inside} -> 10.244.0.9:80"),
            format!("6 192.0.2.1 8080 scope {outside} -> 10.244.0.9:80"),
            format!("6 2001:db8::1 8080 scope {inside} -> fd00::9:80"),
            format!("6 2001:db8::1 8080 scope {outside} -> fd00::9:80"),
        ];
        assert_eq!(words(&view(spec, both)), wanted);
    }

    #[test]
    fn an_address_may_be_chosen_and_the_protocol_counts() {
        let port =
            json!({"containerPort": 53, "hostPort": 53, "protocol": "UDP", "hostIP": "192.0.2.7"});
        let one = json!({"podIPs": [{"ip": "10.244.0.9"}]});
        let found = words(&view(ports(json!([port])), one.clone()));
        assert!(
            found
                .iter()
                .all(|line| line.starts_with("17 192.0.2.7 53 ")),
            "{found:?}"
        );
        assert_eq!(found.len(), 2);
        let any = json!({"containerPort": 53, "hostPort": 53, "hostIP": "0.0.0.0"});
        let found = words(&view(ports(json!([any])), one));
        assert!(
            found.iter().all(|line| line.starts_with("6 192.0.2.1 53 ")),
            "{found:?}"
        );
    }

    #[test]
    fn only_pods_with_an_address_of_their_own_that_have_not_ended() {
        let spec = ports(json!([{"containerPort": 80, "hostPort": 80}]));
        assert!(words(&view(spec.clone(), json!({}))).is_empty());
        let ended = json!({"phase": "Succeeded", "podIPs": [{"ip": "10.244.0.9"}]});
        assert!(words(&view(spec.clone(), ended)).is_empty());
        let mut of_host = spec;
        of_host["hostNetwork"] = json!(true);
        let running = json!({"phase": "Running", "podIPs": [{"ip": "192.0.2.1"}]});
        assert!(words(&view(of_host, running)).is_empty());
    }
}
