//! What the words after the pod mean: a Service by any of its names, or an address; a port by number or
//! name. Pure.

use std::net::IpAddr;

use gantry_api::proto;

use super::address;
use crate::services::index::{TCP, UDP};
use crate::view::{ServiceName, View};

/// Who is meant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Target {
    Service(ServiceName),
    /// No Service's.
    Address(IpAddr),
}

/// Resolves a name as the pod's resolver would, by the search list of its namespace.
///
/// # Errors
/// In words: what is wrong with it.
pub(super) fn resolve(view: &View, text: &str, namespace: &str) -> Result<Target, String> {
    if let Ok(ip) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
        let has = |service: &proto::Service| {
            let own = service.cluster_ips.iter().chain(&service.external_ips);
            let mut own = own.chain(&service.load_balancer_ips);
            own.any(|bytes| address(bytes) == Some(ip))
        };
        let found = view.services.iter().find(|(_, service)| has(service));
        return Ok(match found {
            Some((name, _)) => Target::Service(name.clone()),
            None => Target::Address(ip),
        });
    }
    let text = text.trim_end_matches('.').to_lowercase();
    let domain = view.settings.cluster_domain.to_lowercase();
    let text = match text.strip_suffix(&format!(".{domain}")) {
        Some(inner) if !domain.is_empty() => inner.to_owned(),
        _ => text,
    };
    let parts: Vec<&str> = text.split('.').collect();
    let (name, namespace) = match parts.as_slice() {
        [name] => (*name, namespace),
        [name, namespace] | [name, namespace, "svc"] => (*name, *namespace),
        _ => {
            return Err(format!(
                "{text} is no Service's name, and names outside are not explained"
            ));
        }
    };
    let name = ServiceName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    match view.services.contains_key(&name) {
        true => Ok(Target::Service(name)),
        false => Err(format!(
            "there is no Service {} in namespace {}: the name is answered NXDOMAIN",
            name.name, name.namespace
        )),
    }
}

/// The port of a Service that is meant.
///
/// # Errors
/// In words: which ports there are.
pub(super) fn service_port<'a>(
    service: &'a proto::Service,
    text: &str,
    udp: bool,
) -> Result<&'a proto::ServicePort, String> {
    let wanted = u32::from(if udp { UDP } else { TCP });
    let is_meant = |port: &&proto::ServicePort| match text.parse::<u32>() {
        Ok(number) => port.port == number,
        Err(_) => port.name == text,
    };
    let mut meant: Vec<&proto::ServicePort> = service.ports.iter().filter(is_meant).collect();
    meant.sort_by_key(|port| port.protocol != wanted);
    // By UDP only where it was asked for, or where there is nothing else.
    if let Some(port) = meant
        .into_iter()
        .find(|port| !udp || port.protocol == wanted)
    {
        return Ok(port);
    }
    let ports = service.ports.iter().map(|port| {
        let protocol = if port.protocol == u32::from(UDP) {
            "UDP"
        } else {
            "TCP"
        };
        match port.name.as_str() {
            "" => format!("{}/{protocol}", port.port),
            name => format!("{name} {}/{protocol}", port.port),
        }
    });
    let ports: Vec<String> = ports.collect();
    Err(format!(
        "the Service has no port {text}; it has {}",
        listed(&ports)
    ))
}

/// Words one after the other.
pub(super) fn listed(words: &[String]) -> String {
    match words {
        [] => "none".to_owned(),
        words => words.join(", "),
    }
}
