//! What a Service asks of the allocator, and how the answer gets into it. Pure.
//!
//! Source: Kubernetes' `pkg/registry/core/service/storage/alloc.go` (patchAllocatedValues,
//! needsClusterIP, needsNodePort, needsHCNodePort).

use std::net::IpAddr;

use gantry_api::field::{FieldError, Path};
use serde_json::{Value, json};

use super::allocation::{AllocationError, Claim, Wanted};
use super::families::{self, families, family_of};

fn service_type(service: &Value) -> &str {
    service["spec"]["type"].as_str().unwrap_or("ClusterIP")
}

pub(super) fn has_cluster_ip(service: &Value) -> bool {
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

/// All of them, in the order of the families; `None` of a headless Service is one.
pub(super) fn cluster_ips(service: &Value) -> Vec<&str> {
    let all = service["spec"]["clusterIPs"].as_array();
    let all = all.into_iter().flatten().filter_map(Value::as_str);
    let all: Vec<&str> = all.filter(|ip| !ip.is_empty()).collect();
    match (all.is_empty(), cluster_ip(service)) {
        (true, "") => Vec::new(),
        (true, first) => vec![first],
        (false, _) => all,
    }
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
pub(crate) fn held(service: &Value) -> (Vec<IpAddr>, Vec<u16>) {
    let addresses = cluster_ips(service).into_iter();
    let addresses = addresses.filter_map(|ip| ip.parse().ok()).collect();
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
    if has_cluster_ip(old) && has_cluster_ip(new) {
        families::carry(old, new);
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
    if !has_cluster_ip(old) || !has_cluster_ip(new) {
        return Ok(());
    }
    let (before, after) = (cluster_ips(old), cluster_ips(new));
    for (index, before) in before.iter().enumerate() {
        let changed = match after.get(index) {
            Some(after) => (after != before).then_some(*after),
            // The second may go.
            None => (index == 0).then_some(""),
        };
        if let Some(after) = changed {
            let path = Path::new("spec").child("clusterIPs").index(index);
            return Err(FieldError::invalid(&path, after, "may not change once set"));
        }
    }
    Ok(())
}

/// What the Service needs from the allocator.
pub(crate) fn wanted(service: &Value) -> Result<Wanted, FieldError> {
    let mut wanted = Wanted::default();
    if has_cluster_ip(service) {
        let ips = cluster_ips(service);
        for (index, text) in ips.iter().enumerate().filter(|(_, ip)| **ip != "None") {
            wanted.addresses.push(text.parse().map_err(|_| {
                let path = Path::new("spec").child("clusterIPs").index(index);
                FieldError::invalid(&path, *text, "must be an address of the service range")
            })?);
        }
        if ips.first() != Some(&"None") {
            let families = families(service);
            let lacks = |family| families.iter().skip(ips.len()).any(|it| *it == family);
            wanted.draw_address = lacks("IPv4") || families.is_empty() && ips.is_empty();
            wanted.draw_address_v6 = lacks("IPv6");
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
    let mut ips: Vec<String> = cluster_ips(service)
        .into_iter()
        .map(str::to_owned)
        .collect();
    let drawn = [claim.drawn_address, claim.drawn_address_v6];
    ips.extend(
        drawn
            .into_iter()
            .flatten()
            .map(|address| address.to_string()),
    );
    if !ips.is_empty() {
        // In the order of the families.
        let order = families(service);
        let place = |ip: &String| {
            order
                .iter()
                .position(|family| Some(*family) == family_of(ip))
        };
        ips.sort_by_key(place);
        service["spec"]["clusterIP"] = json!(ips[0]);
        service["spec"]["clusterIPs"] = json!(ips);
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
        old["spec"]["clusterIP"] = json!("10.96.1.5");
        old["spec"]["clusterIPs"] = json!(["10.96.1.5"]);
        let mut new = service("NodePort", json!([{"port": 80, "protocol": "TCP"}]));
        carry_allocated(&old, &mut new);
        assert_eq!(
            held(&new),
            (vec!["10.96.1.5".parse().unwrap()], vec![30080])
        );
        new["spec"]["type"] = json!("ClusterIP");
        carry_allocated(&old, &mut new);
        assert_eq!(held(&new).1, Vec::<u16>::new());
        new["spec"]["clusterIPs"] = json!(["10.96.1.6"]);
        assert!(check_address_change(&old, &new).is_err());
    }

    #[test]
    fn a_service_of_both_families_gets_what_it_lacks_in_its_order() {
        use super::super::allocation::Allocator;
        let ranges = "10.96.0.0/16,fd96::/112".parse().unwrap();
        let allocator = Allocator::new(ranges, &[]);
        let mut both = service("ClusterIP", json!([{"port": 80, "protocol": "TCP"}]));
        both["spec"]["ipFamilyPolicy"] = json!("RequireDualStack");
        both["spec"]["ipFamilies"] = json!(["IPv6"]);
        families::settle(&mut both, true).unwrap();
        let asked = wanted(&both).unwrap();
        assert!(asked.draw_address && asked.draw_address_v6);
        let claim = allocator.claim(&"k".into(), &asked).unwrap();
        fill(&mut both, &claim);
        let ips = cluster_ips(&both);
        assert_eq!(both["spec"]["clusterIP"], ips[0]);
        assert_eq!(
            ips.iter().map(|ip| family_of(ip)).collect::<Vec<_>>(),
            [Some("IPv6"), Some("IPv4")]
        );
        assert_eq!(held(&both).0.len(), 2);
        // The first one stays for good, the second one may go.
        let mut one = both.clone();
        one["spec"]["clusterIPs"] = json!([ips[0]]);
        assert!(check_address_change(&both, &one).is_ok());
        one["spec"]["clusterIPs"] = json!([ips[1]]);
        assert!(check_address_change(&both, &one).is_err());
        // What it has is asked for again, and nothing more.
        let asked = wanted(&both).unwrap();
        assert_eq!(
            (
                asked.addresses.len(),
                asked.draw_address,
                asked.draw_address_v6
            ),
            (2, false, false)
        );
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
