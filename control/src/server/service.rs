//! What a Service asks of the allocator, and how the answer gets into it. Pure.
//!
//! Source: Kubernetes' `pkg/registry/core/service/storage/alloc.go` (patchAllocatedValues,
//! needsClusterIP, needsNodePort, needsHCNodePort) for one IPv4 family.

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
    port_of(&port["nodePort"])
}

fn port_of(number: &Value) -> u16 {
    u16::try_from(number.as_u64().unwrap_or(0)).unwrap_or(u16::MAX)
}

/// Whether a node port tells outside load balancers if this Service has a pod on the node.
fn needs_health_check(service: &Value) -> bool {
    is_balancer(service) && service["spec"]["externalTrafficPolicy"] == "Local"
}

fn is_reached_from_outside(service: &Value) -> bool {
    let spec = &service["spec"];
    let external_ips = spec["externalIPs"].as_array();
    match service_type(service) {
        "NodePort" | "LoadBalancer" => true,
        "ClusterIP" => external_ips.is_some_and(|addresses| !addresses.is_empty()),
        _ => false,
    }
}

fn is_balancer(service: &Value) -> bool {
    service_type(service) == "LoadBalancer"
}

/// A field that only some Services have, and which.
type TypeField = (&'static str, fn(&Value) -> bool);

const TYPE_FIELDS: [TypeField; 4] = [
    ("allocateLoadBalancerNodePorts", is_balancer),
    ("externalTrafficPolicy", is_reached_from_outside),
    ("healthCheckNodePort", needs_health_check),
    ("loadBalancerClass", is_balancer),
];

fn health_check_port(service: &Value) -> u16 {
    port_of(&service["spec"]["healthCheckNodePort"])
}

/// The addresses and ports that a stored Service holds.
pub(crate) fn held(service: &Value) -> (Vec<Ipv4Addr>, Vec<u16>) {
    let addresses = cluster_ip(service).parse().into_iter().collect();
    let ports = ports(service).iter().map(node_port);
    let ports = ports.chain([health_check_port(service)]);
    (addresses, ports.filter(|port| *port != 0).collect())
}

/// Takes over from `old` what a client left out, and drops what its new type cannot have.
pub(crate) fn carry_allocated(old: &Value, new: &mut Value) {
    // `new` is as the client sent it: what is no map is refused later, by its path.
    if !new["spec"].is_object() {
        return;
    }
    drop_dependent_fields(old, new);
    if needs_health_check(old) && needs_health_check(new) && health_check_port(new) == 0 {
        new["spec"]["healthCheckNodePort"] = old["spec"]["healthCheckNodePort"].clone();
    }
    if has_cluster_ip(old) && has_cluster_ip(new) && cluster_ip(new).is_empty() {
        let address = cluster_ip(old).to_owned();
        set_cluster_ip(new, &address);
    }
    let old_ports = ports(old).to_vec();
    let (had, keeps) = (has_node_ports(old), has_node_ports(new));
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
        } else if had && !keeps && number != 0 && number == old_number {
            // A change of the type gives the port back; one that the client set stays, and is
            // refused by validation.
            fields.remove("nodePort");
        }
    }
}

/// Fields that only some types have go with the type, when the client did not change them: they are
/// what the server, or the last apply, wrote. One that the client set stays and is refused.
///
/// Source: dropTypeDependentFields.
fn drop_dependent_fields(old: &Value, new: &mut Value) {
    let gone: Vec<&str> = TYPE_FIELDS
        .iter()
        .filter(|(field, has)| has(old) && !has(new) && old["spec"][field] == new["spec"][field])
        .map(|(field, _)| *field)
        .collect();
    if let Some(spec) = new["spec"].as_object_mut() {
        spec.retain(|field, _| !gone.contains(&field.as_str()));
    }
}

/// Takes out of a Service what one with the type of `new` cannot have.
pub(crate) fn drop_for_type(service: &mut Value, new: &Value) {
    if let Some(spec) = service["spec"].as_object_mut() {
        let cannot = |field: &str| TYPE_FIELDS.iter().any(|(f, has)| *f == field && !has(new));
        spec.retain(|field, _| !cannot(field));
    }
    if has_node_ports(new) {
        return;
    }
    let ports = service["spec"]["ports"].as_array_mut();
    for port in ports.into_iter().flatten() {
        if let Value::Object(fields) = port {
            fields.remove("nodePort");
        }
    }
}

/// Refuses another cluster IP or health check port for a Service that has one.
pub(crate) fn check_address_change(old: &Value, new: &Value) -> Result<(), FieldError> {
    let (before, after) = (health_check_port(old), health_check_port(new));
    if needs_health_check(old) && needs_health_check(new) && before != 0 && before != after {
        let path = Path::new("spec").child("healthCheckNodePort");
        return Err(FieldError::invalid(&path, after, "field is immutable"));
    }
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
    if needs_health_check(service) {
        match health_check_port(service) {
            0 => wanted.draw_port_count += 1,
            number if wanted.ports.contains(&number) => {
                let path = Path::new("spec").child("healthCheckNodePort");
                let detail = AllocationError::Taken("port").to_string();
                return Err(FieldError::invalid(&path, number, &detail));
            }
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
    let mut drawn = claim.drawn_ports.iter();
    if needs_health_check(service)
        && health_check_port(service) == 0
        && let Some(number) = drawn.next()
    {
        service["spec"]["healthCheckNodePort"] = json!(number);
    }
    if !has_node_ports(service) {
        return;
    }
    let Some(ports) = service["spec"]["ports"].as_array_mut() else {
        return;
    };
    let empty = ports.iter_mut().filter(|port| node_port(port) == 0);
    for (port, number) in empty.zip(drawn) {
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
    if concerns_port && ports(service).iter().all(|p| node_port(p) == 0) {
        let path = spec.child("healthCheckNodePort");
        return FieldError::invalid(&path, health_check_port(service), &error.to_string());
    }
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

    fn balancer(policy: &str) -> Value {
        let port = json!([{"port": 80, "protocol": "TCP"}]);
        let mut service = service("LoadBalancer", port);
        service["spec"]["externalTrafficPolicy"] = json!(policy);
        service
    }

    #[test]
    fn local_load_balancers_have_a_health_check_port_of_their_own() {
        assert_eq!(wanted(&balancer("Cluster")).unwrap().draw_port_count, 1);
        let mut local = balancer("Local");
        assert_eq!(wanted(&local).unwrap().draw_port_count, 2);
        local["spec"]["healthCheckNodePort"] = json!(30_100);
        let asked = wanted(&local).unwrap();
        assert_eq!((asked.ports, asked.draw_port_count), (vec![30_100], 1));
        local["spec"]["ports"][0]["nodePort"] = json!(30_100);
        assert_eq!(
            wanted(&local).unwrap_err().field,
            "spec.healthCheckNodePort"
        );
        local["spec"]["ports"][0]["nodePort"] = json!(30_101);
        assert_eq!(held(&local).1, [30_101, 30_100]);
    }

    #[test]
    fn what_a_type_alone_has_goes_with_it() {
        let mut old = balancer("Local");
        old["spec"]["healthCheckNodePort"] = json!(30_100);
        old["spec"]["ports"][0]["nodePort"] = json!(30_101);
        old["spec"]["allocateLoadBalancerNodePorts"] = json!(true);
        old["spec"]["loadBalancerClass"] = json!("example.com/x");
        let mut same = old.clone();
        same["spec"]["healthCheckNodePort"] = Value::Null;
        carry_allocated(&old, &mut same);
        assert_eq!(same["spec"]["healthCheckNodePort"], 30_100);
        same["spec"]["healthCheckNodePort"] = json!(30_102);
        assert!(check_address_change(&old, &same).is_err());
        let mut inside = old.clone();
        inside["spec"]["type"] = json!("ClusterIP");
        carry_allocated(&old, &mut inside);
        for (field, _) in TYPE_FIELDS {
            assert!(inside["spec"].get(field).is_none(), "{field}");
        }
        assert_eq!(held(&inside).1, Vec::<u16>::new());
        let mut asked = old.clone();
        asked["spec"]["type"] = json!("ClusterIP");
        asked["spec"]["healthCheckNodePort"] = json!(30_103);
        carry_allocated(&old, &mut asked);
        assert_eq!(
            asked["spec"]["healthCheckNodePort"], 30_103,
            "refused later"
        );
    }

    #[test]
    fn a_port_set_by_hand_stays_where_none_is_allocated() {
        let mut old = balancer("Cluster");
        old["spec"]["allocateLoadBalancerNodePorts"] = json!(false);
        old["spec"]["ports"][0]["nodePort"] = json!(30_101);
        let mut new = old.clone();
        carry_allocated(&old, &mut new);
        assert_eq!(held(&new).1, [30_101]);
    }
}
