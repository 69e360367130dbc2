//! What one Service means: which frontends, and for each the backends of this moment.
//!
//! An endpoint of the API becomes a backend here and nowhere else. The rules are Kubernetes':
//! * headless and ExternalName Services have no frontend;
//! * only serving backends get connections; when none is serving, draining ones still do;
//! * of those, a client gets the ones hinted for its node, else for its zone, as long as every
//!   serving backend has such a hint (`trafficDistribution`); else all;
//! * a target is found by the port's name and protocol, so a named target port may differ per pod;
//! * `internalTrafficPolicy: Local` limits the cluster IPs to this node's backends. Addresses meant
//!   for the outside (node ports, external and load balancer IPs) are, for clients on a node, an
//!   abbreviation of the whole Service, whatever `externalTrafficPolicy` says;
//! * for clients outside of the nodes the same addresses are frontends of their own.
//!   `externalTrafficPolicy: Local` limits these to this node's backends; if only other nodes have
//!   any, connections are dropped, not refused: an outside balancer then asks another node;
//! * `loadBalancerSourceRanges` limits who may use the load balancer IPs from outside;
//! * the cluster's DNS address is served by each node's own resolver, if it has one.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ebpf_maps::services::{
    Addr, FrontendKey, SCOPE_ADDRESS, SCOPE_NODE_PORT, SCOPE_OUTSIDE_ADDRESS,
    SCOPE_OUTSIDE_NODE_PORT, is_v4_mapped, v4_mapped,
};
use gantry_api::proto;

use crate::view::{Backends, ServiceName};

/// IANA's number of TCP.
pub const TCP: u8 = 6;
/// IANA's number of UDP.
pub const UDP: u8 = 17;
/// The port of DNS.
const DNS_PORT: u16 = 53;
/// Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_TIMEOUT_DEFAULT_S: u32 = 10_800;

/// Where connections go. Ordered by address and port, so equal sets are equal lists.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Backend {
    /// 16 bytes, network order.
    pub addr: Addr,
    /// Network order.
    pub port_be: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// [`label32`] of the node's name.
    pub node_id: u32,
    /// [`label64`] of the pod's UID; 0: not a pod.
    pub pod_id: u64,
    /// It has not answered lately and gets one connection only: see [`super::ejection`].
    pub on_trial: bool,
}

/// Names a set within its Service.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SetName {
    /// The ServicePort's name, "" when it has none.
    pub port: String,
    /// IANA protocol number.
    pub proto: u8,
    /// The family of all addresses in the set.
    pub v6: bool,
    /// Limited to backends of this node.
    pub local: bool,
}

/// Frontends that share their backends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackendSet {
    /// Which of the Service's sets.
    pub name: SetName,
    /// Sorted, unique, never empty.
    pub frontends: Vec<FrontendKey>,
    /// Sorted, unique by address and port. Empty: connects are refused.
    pub backends: Vec<Backend>,
    /// Session affinity for so many seconds; 0: none.
    pub affinity_s: u32,
    /// Of two random backends the one with fewer of this node's connections.
    pub least_connections: bool,
    /// Backends of other nodes answer clients outside by themselves.
    pub direct_return: bool,
    /// Nodes elsewhere have backends that this set leaves out.
    pub elsewhere: bool,
    /// Those of `frontends` that only clients in `source_ranges` may use. Sorted.
    pub restricted: Vec<FrontendKey>,
    /// Sorted, unique; of the set's family.
    pub source_ranges: Vec<SourceRange>,
}

/// Addresses of clients that may use a load balancer IP.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SourceRange {
    /// 16 bytes, network order, zero beyond the prefix.
    pub addr: Addr,
    /// Bits of the 16 bytes: those of an IPv4 range and 96.
    pub prefix: u32,
}

/// What is the same for all Services of a node.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// This node's name: which backends are local.
    pub node: String,
    /// Its zone; "": not known.
    pub zone: String,
    /// Frontends that the node answers itself, whatever Service claims them.
    pub reserved: BTreeSet<FrontendKey>,
}

/// One Service, indexed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Indexed {
    /// One per port, family and traffic policy.
    pub sets: Vec<BackendSet>,
    /// What could not be understood, in words; the rest is in `sets`.
    pub faults: Vec<String>,
}

/// Indexes one Service. Pure; the order of its backends does not matter.
pub fn index(
    service: &proto::Service,
    backends: Option<&Backends>,
    surroundings: &Surroundings,
) -> Indexed {
    let mut indexed = Indexed::default();
    if service.r#type == "ExternalName" || service.cluster_ips.is_empty() {
        return indexed;
    }
    let faults = &mut indexed.faults;
    let cluster = addresses(&service.cluster_ips, "cluster IP", faults);
    let external = addresses(&service.external_ips, "external IP", faults);
    let balancer = addresses(&service.load_balancer_ips, "load balancer IP", faults);
    let source_ranges = source_ranges(service, faults);

    for port in &service.ports {
        let Some((proto, number)) = port_number(port, &mut indexed.faults) else {
            continue;
        };
        let node_port = node_port(port, &mut indexed.faults);
        for v6 in [false, true] {
            let keys = |addresses: &[Addr], scope: u8, into: &mut Vec<FrontendKey>| {
                let own = addresses.iter().filter(|addr| is_v4_mapped(addr) != v6);
                into.extend(own.map(|addr| FrontendKey {
                    addr: *addr,
                    port_be: number.to_be(),
                    proto,
                    scope,
                }));
            };
            // Of all backends, and of this node's.
            let mut by_policy: [Vec<FrontendKey>; 2] = Default::default();
            let [inside, outside] =
                [service.internal_local, service.external_local].map(usize::from);
            keys(&cluster, SCOPE_ADDRESS, &mut by_policy[inside]);
            let has_inside = !by_policy[inside].is_empty();
            keys(&external, SCOPE_ADDRESS, &mut by_policy[0]);
            keys(&balancer, SCOPE_ADDRESS, &mut by_policy[0]);
            keys(&external, SCOPE_OUTSIDE_ADDRESS, &mut by_policy[outside]);
            keys(&balancer, SCOPE_OUTSIDE_ADDRESS, &mut by_policy[outside]);
            if let Some(number) = node_port.filter(|_| has_inside) {
                let key = |scope| FrontendKey {
                    addr: if v6 { [0; 4] } else { v4_mapped(0) },
                    port_be: number.to_be(),
                    proto,
                    scope,
                };
                by_policy[0].push(key(SCOPE_NODE_PORT));
                by_policy[outside].push(key(SCOPE_OUTSIDE_NODE_PORT));
            }
            for (local, mut frontends) in [false, true].into_iter().zip(by_policy) {
                frontends.retain(|key| !surroundings.reserved.contains(key));
                if frontends.is_empty() {
                    continue;
                }
                frontends.sort_unstable();
                frontends.dedup();
                let name = SetName {
                    port: port.name.clone(),
                    proto,
                    v6,
                    local,
                };
                let chosen = choose_backends(service, backends, &name, surroundings);
                let everywhere = SetName {
                    local: false,
                    ..name.clone()
                };
                let elsewhere = local
                    && chosen.is_empty()
                    && !choose_backends(service, backends, &everywhere, surroundings).is_empty();
                let is_restricted = |key: &&FrontendKey| {
                    !service.source_ranges.is_empty()
                        && key.scope == SCOPE_OUTSIDE_ADDRESS
                        && balancer.contains(&key.addr)
                };
                let restricted: Vec<_> = frontends.iter().filter(is_restricted).copied().collect();
                let own = source_ranges
                    .iter()
                    .filter(|range| !restricted.is_empty() && is_v4_mapped(&range.addr) != v6);
                indexed.sets.push(BackendSet {
                    backends: chosen,
                    affinity_s: affinity_s(service),
                    least_connections: service.least_connections,
                    direct_return: service.direct_return,
                    elsewhere,
                    source_ranges: own.copied().collect(),
                    restricted,
                    name,
                    frontends,
                });
            }
        }
    }
    indexed
}

/// The name under which the node's own resolver is programmed: no Service has an empty namespace.
pub fn resolver_service() -> ServiceName {
    ServiceName {
        namespace: String::new(),
        name: "node-resolver".into(),
    }
}

/// The frontends of the cluster's DNS address, answered by the node's own resolver.
///
/// Nothing if the two addresses are of different families.
pub fn resolver_sets(cluster_dns: IpAddr, resolver: SocketAddr, node: &str) -> Vec<BackendSet> {
    if cluster_dns.is_ipv6() != resolver.is_ipv6() {
        return Vec::new();
    }
    let set = |proto| BackendSet {
        name: SetName {
            port: "dns".into(),
            proto,
            v6: resolver.is_ipv6(),
            local: true,
        },
        frontends: vec![FrontendKey {
            addr: addr_of(cluster_dns),
            port_be: DNS_PORT.to_be(),
            proto,
            scope: SCOPE_ADDRESS,
        }],
        backends: vec![Backend {
            addr: addr_of(resolver.ip()),
            port_be: resolver.port().to_be(),
            proto,
            node_id: label32(node),
            pod_id: 0,
            on_trial: false,
        }],
        affinity_s: 0,
        least_connections: false,
        direct_return: false,
        elsewhere: false,
        restricted: Vec::new(),
        source_ranges: Vec::new(),
    };
    vec![set(TCP), set(UDP)]
}

/// The maps' form of an address.
pub fn addr_of(address: IpAddr) -> Addr {
    match address {
        IpAddr::V4(v4) => v4_mapped(u32::from_ne_bytes(v4.octets())),
        IpAddr::V6(v6) => {
            let mut addr = [0; 4];
            for (word, bytes) in addr.iter_mut().zip(v6.octets().chunks_exact(4)) {
                *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
            addr
        }
    }
}

/// The other way: a v4-mapped address is an IPv4 address.
pub fn ip_of(addr: &Addr) -> IpAddr {
    let mut octets = [0; 16];
    for (bytes, word) in octets.chunks_exact_mut(4).zip(addr) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    IpAddr::from(octets).to_canonical()
}

/// An address of the feed: 4 or 16 bytes.
pub fn parse_address(bytes: &[u8]) -> Option<Addr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(addr_of(IpAddr::from(v4)));
    }
    <[u8; 16]>::try_from(bytes)
        .ok()
        .map(|v6| addr_of(IpAddr::from(v6)))
}

/// FNV-1a of a pod's UID: a label that needs no table and is the same after a restart. 0 for "".
pub fn label64(text: &str) -> u64 {
    if text.is_empty() {
        return 0;
    }
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// FNV-1a of a node's name. 0 for "".
pub fn label32(text: &str) -> u32 {
    if text.is_empty() {
        return 0;
    }
    text.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

fn affinity_s(service: &proto::Service) -> u32 {
    match (service.client_ip_affinity, service.affinity_timeout_s) {
        (false, _) => 0,
        (true, 0) => AFFINITY_TIMEOUT_DEFAULT_S,
        (true, timeout_s) => timeout_s,
    }
}

fn addresses(list: &[impl AsRef<[u8]>], what: &str, faults: &mut Vec<String>) -> Vec<Addr> {
    let mut parsed = Vec::with_capacity(list.len());
    for bytes in list.iter().map(AsRef::as_ref) {
        match parse_address(bytes) {
            Some(addr) => parsed.push(addr),
            None => faults.push(format!("{what}: {} bytes are no address", bytes.len())),
        }
    }
    parsed
}

fn port_number(port: &proto::ServicePort, faults: &mut Vec<String>) -> Option<(u8, u16)> {
    let proto = match u8::try_from(port.protocol) {
        Ok(proto @ (TCP | UDP)) => proto,
        _ => {
            let (protocol, name) = (port.protocol, &port.name);
            faults.push(format!(
                "port {name:?}: protocol {protocol} is not balanced, want 6 or 17"
            ));
            return None;
        }
    };
    match u16::try_from(port.port) {
        Ok(number @ 1..) => Some((proto, number)),
        _ => {
            faults.push(format!(
                "port {:?}: {} is no port number",
                port.name, port.port
            ));
            None
        }
    }
}

fn node_port(port: &proto::ServicePort, faults: &mut Vec<String>) -> Option<u16> {
    match u16::try_from(port.node_port) {
        Ok(0) => None,
        Ok(number) => Some(number),
        Err(_) => {
            let (name, number) = (&port.name, port.node_port);
            faults.push(format!("port {name:?}: {number} is no node port"));
            None
        }
    }
}

fn serves(service: &proto::Service, backend: &proto::Backend) -> bool {
    match backend.state() {
        proto::backend::State::Serving => true,
        proto::backend::State::NotReady => service.publish_not_ready,
        proto::backend::State::Draining => false,
    }
}

/// How close the backends of this node's clients are.
///
/// Source: Kubernetes `pkg/proxy/topology.go`: hints count only if every serving backend has one and
/// some are for this node, or zone; a part of the backends would otherwise get too little or nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Close {
    Node,
    Zone,
    Anywhere,
}

impl Close {
    fn of(
        service: &proto::Service,
        backends: Option<&Backends>,
        surroundings: &Surroundings,
    ) -> Self {
        let serving = || {
            let all = backends.into_iter().flat_map(Backends::values);
            all.filter(|backend| serves(service, backend))
        };
        if serving().next().is_none() {
            return Self::Anywhere;
        }
        let here = |close: Self| serving().any(|backend| close.takes(backend, surroundings));
        if serving().all(|backend| !backend.node_hints.is_empty()) && here(Self::Node) {
            return Self::Node;
        }
        if serving().all(|backend| !backend.zone_hints.is_empty()) && here(Self::Zone) {
            return Self::Zone;
        }
        Self::Anywhere
    }

    fn takes(self, backend: &proto::Backend, surroundings: &Surroundings) -> bool {
        match self {
            Self::Node => backend.node_hints.contains(&surroundings.node),
            Self::Zone => backend.zone_hints.contains(&surroundings.zone),
            Self::Anywhere => true,
        }
    }
}

fn source_ranges(service: &proto::Service, faults: &mut Vec<String>) -> Vec<SourceRange> {
    let mut ranges = BTreeSet::new();
    for range in &service.source_ranges {
        let bits = range.address.len() as u32 * 8;
        match parse_address(&range.address) {
            Some(addr) if range.prefix <= bits => {
                let prefix = range.prefix + (128 - bits);
                ranges.insert(SourceRange { addr, prefix });
            }
            // Nobody more may pass than was asked for.
            _ => faults.push(format!(
                "source range: {} bytes with prefix {} are no range",
                range.address.len(),
                range.prefix
            )),
        }
    }
    ranges.into_iter().collect()
}

/// The backends of one set: serving ones, else draining ones.
fn choose_backends(
    service: &proto::Service,
    backends: Option<&Backends>,
    name: &SetName,
    surroundings: &Surroundings,
) -> Vec<Backend> {
    use proto::backend::State;

    let mut serving = Vec::new();
    let mut draining = Vec::new();
    let close = match name.local {
        true => Close::Anywhere,
        false => Close::of(service, backends, surroundings),
    };
    for backend in backends.into_iter().flat_map(Backends::values) {
        if name.local && backend.node != surroundings.node {
            continue;
        }
        let into = match backend.state() {
            _ if serves(service, backend) => match close.takes(backend, surroundings) {
                true => &mut serving,
                false => continue,
            },
            State::Draining => &mut draining,
            State::Serving | State::NotReady => continue,
        };
        into.extend(targets(backend, name));
    }
    let mut chosen = if serving.is_empty() {
        draining
    } else {
        serving
    };
    // A backend that is listed twice must not get twice its share: the last one counts.
    let place = |backend: &Backend| (backend.addr, backend.port_be);
    chosen.sort_by_key(place);
    chosen.dedup_by(|later, kept| {
        let is_same = place(later) == place(kept);
        if is_same {
            *kept = *later;
        }
        is_same
    });
    chosen
}

/// Where one endpoint answers for a set: usually one address.
fn targets(backend: &proto::Backend, name: &SetName) -> impl Iterator<Item = Backend> {
    let port = backend
        .ports
        .iter()
        .find(|port| port.name == name.port && port.protocol == u32::from(name.proto));
    // None: this pod has no port of that name.
    let number = port
        .and_then(|port| u16::try_from(port.port).ok())
        .filter(|number| *number != 0);
    let addresses = backend
        .addresses
        .iter()
        .filter_map(|bytes| parse_address(bytes))
        .filter(|addr| is_v4_mapped(addr) != name.v6);
    let made = number.map(|number| {
        addresses.map(move |addr| Backend {
            addr,
            port_be: number.to_be(),
            proto: name.proto,
            node_id: label32(&backend.node),
            pod_id: label64(&backend.pod_uid),
            on_trial: false,
        })
    });
    made.into_iter().flatten()
}

#[cfg(test)]
mod tests;
