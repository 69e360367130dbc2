//! What a Service asks of the allocator, and how the answer gets into it. Pure.
//!
//! Source: Kubernetes' `pkg/registry/core/service/storage/alloc.go` (patchAllocatedValues,
//! needsClusterIP, needsNodePort) for one IPv4 family.

use std::net::Ipv4Addr;

use gantry_api::field::{FieldError, Path};
use serde_json::{Value, json};

use super::allocation::{AllocationError, Claim, Wanted};

fn service_type(service: &Value) -> &str {
    service["spec"]["type"].as_str().unwrap_or("ClusterIP")
}

fn has_cluster_ip(service: &Value) -> bool {
    service_type(service) != "ExternalName"
}

pub(crate) fn has_node_ports(service: &Value) -> bool {
    match service_type(service) {
        "NodePort" => true,
        "LoadBalancer" => service["spec"]["allocateLoadBalancerNodePorts"] != json!(false),
        _ => false,
    }
}

fn cluster_ip(service: &Value) -> &str {
    let spec = &service["spec"];
    let first = &spec["clusterIPs"][0];
    let text = spec["clusterIP"].as_str().filter(|ip| !ip.is_empty());
    text.or(first.as_str()).unwrap_or_default()
}

fn ports(service: &Value) -> &[Value] {
    service["spec"]["ports"]
        .as_array()
        .map_or(&[], Vec::as_slice)
}

fn protocol(port: &Value) -> &str {
    port["protocol"].as_str().unwrap_or("TCP")
}

fn node_port(port: &Value) -> u16 {
    let number = port["nodePort"].as_u64().unwrap_or(0);
    u16::try_from(number).unwrap_or(u16::MAX)
}

/// The addresses and ports that a stored Service holds.
pub(crate) fn held(service: &Value) -> (Vec<Ipv4Addr>, Vec<u16>) {
    let addresses = cluster_ip(service).parse().into_iter().collect();
    let ports = ports(service).iter().map(node_port).filter(|p| *p != 0);
    (addresses, ports.collect())
}

/// Takes over from `old` what a client left out, and drops what its new type cannot have.
pub(crate) fn carry_allocated(old: &Value, new: &mut Value) {
    // `new` is as the client sent it: what is no map is refused later, by its path.
    if !new["spec"].is_object() {
        return;
    }
    if has_cluster_ip(old) && has_cluster_ip(new) && cluster_ip(new).is_empty() {
        let address = cluster_ip(old).to_owned();
        set_cluster_ip(new, &address);
    }
    let old_ports = ports(old).to_vec();
    let keeps = has_node_ports(new);
    let Some(new_ports) = new["spec"]["ports"].as_array_mut() else {
        return;
    };
    for port in new_ports {
        let same = old_ports
            .iter()
            .find(|o| o["port"] == port["port"] && protocol(o) == protocol(port));
        let number = node_port(port);
        let old_number = same.map_or(0, node_port);
        let Value::Object(fields) = port else {
            continue;
        };
        if keeps && number == 0 && old_number != 0 {
            fields.insert("nodePort".to_owned(), json!(old_number));
        } else if !keeps && number != 0 && number == old_number {
            // A change of the type gives the port back; one that the client set stays, and is
            // refused by validation.
            fields.remove("nodePort");
        }
    }
}

/// Takes all node ports out.
pub(crate) fn remove_node_ports(service: &mut Value) {
    let ports = service["spec"]["ports"].as_array_mut();
    for port in ports.into_iter().flatten() {
        if let Value::Object(fields) = port {
            fields.remove("nodePort");
        }
    }
}

/// Refuses another cluster IP for a Service that has one.
pub(crate) fn check_address_change(old: &Value, new: &Value) -> Result<(), FieldError> {
    let (before, after) = (cluster_ip(old), cluster_ip(new));
    let keeps = has_cluster_ip(old) && has_cluster_ip(new);
    if !keeps || before.is_empty() || before == after {
        return Ok(());
    }
    let path = Path::new("spec").child("clusterIPs").index(0);
    Err(FieldError::invalid(&path, after, "may not change once set"))
}

/// What the Service needs from the allocator.
pub(crate) fn wanted(service: &Value) -> Result<Wanted, FieldError> {
    let mut wanted = Wanted::default();
    if has_cluster_ip(service) {
        match cluster_ip(service) {
            "" => wanted.draw_address = true,
            "None" => {}
            text => wanted.addresses.push(text.parse().map_err(|_| {
                let path = Path::new("spec").child("clusterIPs").index(0);
                FieldError::invalid(&path, text, "must be an IPv4 address of the service range")
            })?),
        }
    }
    for port in ports(service) {
        match node_port(port) {
            0 if has_node_ports(service) => wanted.draw_port_count += 1,
            0 => {}
            // The same number for TCP and UDP is one number.
            number if wanted.ports.contains(&number) => {}
            number => wanted.ports.push(number),
        }
    }
    Ok(wanted)
}

/// Writes what was drawn into the Service.
pub(crate) fn fill(service: &mut Value, claim: &Claim) {
    if let Some(address) = claim.drawn_address {
        set_cluster_ip(service, &address.to_string());
    } else {
        let address = cluster_ip(service).to_owned();
        if !address.is_empty() {
            set_cluster_ip(service, &address);
        }
    }
    if !has_node_ports(service) {
        return;
    }
    let Some(ports) = service["spec"]["ports"].as_array_mut() else {
        return;
    };
    let empty = ports.iter_mut().filter(|port| node_port(port) == 0);
    for (port, number) in empty.zip(&claim.drawn_ports) {
        port["nodePort"] = json!(number);
    }
}

fn set_cluster_ip(service: &mut Value, address: &str) {
    let spec = &mut service["spec"];
    spec["clusterIP"] = json!(address);
    spec["clusterIPs"] = json!([address]);
    for (field, value) in [
        ("ipFamilies", json!(["IPv4"])),
        ("ipFamilyPolicy", json!("SingleStack")),
    ] {
        if spec[field].is_null() {
            spec[field] = value;
        }
    }
}

/// The refusal of the allocator, at the field that asked.
pub(crate) fn refusal(service: &Value, wanted: &Wanted, error: &AllocationError) -> FieldError {
    let spec = Path::new("spec");
    let concerns_port = matches!(
        error,
        AllocationError::Taken("port") | AllocationError::OutOfRange { what: "port", .. }
    );
    if concerns_port {
        let index = ports(service).iter().position(|p| node_port(p) != 0);
        let index = index.unwrap_or_default();
        let path = spec.child("ports").index(index).child("nodePort");
        return FieldError::invalid(&path, node_port(&ports(service)[index]), &error.to_string());
    }
    let addresses: Vec<String> = wanted.addresses.iter().map(ToString::to_string).collect();
    let detail = match addresses.first() {
        Some(address) => format!("failed to allocate IP {address}: {error}"),
        None => format!("failed to allocate an IP or a node port: {error}"),
    };
    FieldError::invalid(&spec.child("clusterIPs"), json!(addresses), &detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(kind: &str, ports: Value) -> Value {
        json!({"spec": {"type": kind, "ports": ports}})
    }

    #[test]
    fn types_ask_for_what_they_need() {
        let port = json!([{"port": 80, "protocol": "TCP"}]);
        let wanted_of = |kind| wanted(&service(kind, port.clone())).unwrap();
        assert!(wanted_of("ClusterIP").draw_address);
        assert_eq!(wanted_of("ClusterIP").draw_port_count, 0);
        assert_eq!(wanted_of("NodePort").draw_port_count, 1);
        assert_eq!(wanted_of("ExternalName"), Wanted::default());
        let mut headless = service("ClusterIP", port.clone());
        headless["spec"]["clusterIP"] = json!("None");
        assert_eq!(wanted(&headless).unwrap(), Wanted::default());
    }

    #[test]
    fn an_update_keeps_what_it_leaves_out() {
        let mut old = service(
            "NodePort",
            json!([{"port": 80, "protocol": "TCP", "nodePort": 30080}]),
        );
        set_cluster_ip(&mut old, "10.96.1.5");
        let mut new = service("NodePort", json!([{"port": 80, "protocol": "TCP"}]));
        carry_allocated(&old, &mut new);
        assert_eq!(
            held(&new),
            (vec!["10.96.1.5".parse().unwrap()], vec![30080])
        );
        new["spec"]["type"] = json!("ClusterIP");
        carry_allocated(&old, &mut new);
        assert_eq!(held(&new).1, Vec::<u16>::new());
        new["spec"]["clusterIP"] = json!("10.96.1.6");
        assert!(check_address_change(&old, &new).is_err());
    }
}
