//! From Kubernetes' objects to what the data plane of every node needs: pure functions.
//!
//! A backend's state is joined here and never read from a slice (rule 3 of the feed):
//!
//! ```text
//! Service ──► service                     deletionTimestamp          ──► DRAINING
//! EndpointSlice ─┐                        node dead, or pod ended    ──► NOT_READY
//! Pod ───────────┼─► backend, its state   ready or publishNotReady   ──► SERVING
//! Node ──────────┘                        else                       ──► NOT_READY
//! ```
//! so the revision that drains a pod is the revision of its deletion, and a slow writer of slices
//! cannot bring it back. Endpoints without a pod are taken as written.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use gantry_api::WIREGUARD_KEY_ANNOTATION;
use gantry_api::k8s_openapi::api::core::v1 as core;
use gantry_api::k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use gantry_api::proto;
use gantry_api::rules::{self, Rule};
use gantry_api::validation;
use ipnet::IpNet;

use crate::controllers::pods;

/// `namespace` and `name`.
pub(super) type Name = (String, String);

const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// The plural of claims; a claim brings its volume along.
pub(super) const CLAIMS: &str = "persistentvolumeclaims";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Who an endpoint is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum EndpointId {
    /// The pod of this namespace, name and UID.
    Pod {
        namespace: String,
        name: String,
        uid: String,
    },
    /// No pod: the slice's name and the address.
    Address { slice: String, address: String },
}

impl EndpointId {
    /// The last part of the backend's key.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Pod { uid, .. } => uid.clone(),
            Self::Address { slice, address } => format!("{slice}/{address}"),
        }
    }
}

/// What one slice says of one endpoint.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct EndpointFacts {
    address: Bytes,
    /// As written: used only without a pod.
    state: proto::backend::State,
    hostname: String,
    node: String,
    zone: String,
    zone_hints: Vec<String>,
    node_hints: Vec<String>,
}

/// What the join needs of an EndpointSlice.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct SliceFacts {
    /// The Service it belongs to.
    pub(super) service: Name,
    ports: Vec<proto::BackendPort>,
    /// Its members.
    pub(super) endpoints: BTreeMap<EndpointId, EndpointFacts>,
}

/// What the join needs of a Pod.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct PodFacts {
    pub(super) uid: String,
    /// Empty: not bound.
    pub(super) node: String,
    pub(super) deleting: bool,
    pub(super) ready: bool,
    /// Succeeded or Failed.
    pub(super) ended: bool,
    /// The ConfigMaps and Secrets it names: `plural`, name; none once it has ended.
    pub(super) blobs: BTreeSet<(&'static str, String)>,
}

/// What the join needs of a Node.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct NodeFacts {
    /// The node lifecycle controller gave it up: condition Ready is Unknown.
    pub(super) dead: bool,
    /// Condition Ready is True.
    pub(super) ready: bool,
    /// spec.podCIDRs, with commas; empty until allocated.
    pub(super) pod_cidr: String,
    /// status.addresses of type InternalIP.
    pub(super) addresses: Vec<Bytes>,
    zone: String,
    /// Its public key, 32 bytes; empty: it has told none.
    wireguard_key: Bytes,
}

fn address_bytes(text: &str) -> Option<Bytes> {
    match text.parse().ok()? {
        IpAddr::V4(address) => Some(Bytes::copy_from_slice(&address.octets())),
        IpAddr::V6(address) => Some(Bytes::copy_from_slice(&address.octets())),
    }
}

/// IANA's number; Kubernetes' default is TCP. None: a protocol that no data plane here knows.
fn protocol_number(name: Option<&str>) -> Option<u32> {
    match name {
        None | Some("" | "TCP") => Some(6),
        Some("UDP") => Some(17),
        Some("SCTP") => Some(132),
        Some(_) => None,
    }
}

fn port_number(port: Option<i32>) -> Option<u32> {
    port.and_then(|port| u16::try_from(port).ok())
        .map(u32::from)
}

/// The common part of a Service.
pub(super) fn service(service: &core::Service) -> proto::Service {
    let spec = service.spec.clone().unwrap_or_default();
    let cluster_ips = match spec.cluster_ips {
        Some(ips) if !ips.is_empty() => ips,
        _ => spec.cluster_ip.into_iter().collect(),
    };
    let ports = spec.ports.unwrap_or_default();
    let balancer = service
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_ref());
    let balancer_ips = ingress
        .into_iter()
        .flatten()
        // A proxy's address is the proxy's to answer.
        .filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"))
        .filter_map(|ingress| ingress.ip.as_deref());
    let is_balancer = spec.type_.as_deref() == Some("LoadBalancer");
    let ranges = spec.load_balancer_source_ranges.unwrap_or_default();
    let ranges = ranges.iter().filter(|_| is_balancer);
    let affinity = spec
        .session_affinity_config
        .and_then(|config| config.client_ip);
    proto::Service {
        uid: service.metadata.uid.clone().unwrap_or_default(),
        // "None" parses as no address: a headless Service has none.
        cluster_ips: cluster_ips
            .iter()
            .filter_map(|ip| address_bytes(ip))
            .collect(),
        ports: ports.iter().filter_map(service_port).collect(),
        r#type: spec.type_.unwrap_or_else(|| "ClusterIP".into()),
        external_name: spec.external_name.unwrap_or_default(),
        client_ip_affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
        affinity_timeout_s: affinity
            .and_then(|config| config.timeout_seconds)
            .and_then(|seconds| u32::try_from(seconds).ok())
            .unwrap_or(10_800), // Kubernetes' default: 3 h
        external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_ips: spec
            .external_ips
            .iter()
            .flatten()
            .filter_map(|ip| address_bytes(ip))
            .collect(),
        load_balancer_ips: balancer_ips.filter_map(address_bytes).collect(),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        least_connections: validation::least_connections(service),
        direct_return: validation::direct_return(service),
        source_ranges: ranges.filter_map(|range| source_range(range)).collect(),
        health_check_node_port: port_number(spec.health_check_node_port).unwrap_or(0),
    }
}

fn source_range(text: &str) -> Option<proto::SourceRange> {
    let range = text.trim().parse::<IpNet>().ok()?;
    let address = match range.network() {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    };
    Some(proto::SourceRange {
        address,
        prefix: u32::from(range.prefix_len()),
    })
}

fn service_port(port: &core::ServicePort) -> Option<proto::ServicePort> {
    Some(proto::ServicePort {
        name: port.name.clone().unwrap_or_default(),
        protocol: protocol_number(port.protocol.as_deref())?,
        port: port_number(Some(port.port))?,
        node_port: port_number(port.node_port).unwrap_or(0),
    })
}

impl SliceFacts {
    /// None for a slice of no Service.
    pub(super) fn new(slice: &EndpointSlice) -> Option<Self> {
        let namespace = slice.metadata.namespace.clone()?;
        let slice_name = slice.metadata.name.clone()?;
        let service = slice
            .metadata
            .labels
            .as_ref()?
            .get(SERVICE_NAME_LABEL)?
            .clone();
        let ports = slice.ports.iter().flatten().filter_map(|port| {
            Some(proto::BackendPort {
                name: port.name.clone().unwrap_or_default(),
                protocol: protocol_number(port.protocol.as_deref())?,
                port: port_number(port.port)?,
            })
        });
        let endpoints = slice.endpoints.iter().flatten();
        Some(Self {
            ports: ports.collect(),
            endpoints: endpoints
                .filter_map(|endpoint| endpoint_facts(&namespace, &slice_name, endpoint))
                .collect(),
            service: (namespace, service),
        })
    }
}

fn endpoint_facts(
    namespace: &str,
    slice: &str,
    endpoint: &Endpoint,
) -> Option<(EndpointId, EndpointFacts)> {
    // Kubernetes: the addresses of one endpoint are interchangeable and only the first is used.
    let address = endpoint.addresses.first()?;
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let state = if conditions.terminating == Some(true) {
        proto::backend::State::Draining
    } else if conditions.ready == Some(false) {
        proto::backend::State::NotReady
    } else {
        proto::backend::State::Serving // absent means ready
    };
    let hints = endpoint.hints.clone().unwrap_or_default();
    let zone_hints = hints.for_zones.into_iter().flatten();
    let node_hints = hints.for_nodes.into_iter().flatten();
    let facts = EndpointFacts {
        address: address_bytes(address)?,
        state,
        hostname: endpoint.hostname.clone().unwrap_or_default(),
        node: endpoint.node_name.clone().unwrap_or_default(),
        zone: endpoint.zone.clone().unwrap_or_default(),
        zone_hints: zone_hints.map(|zone| zone.name).collect(),
        node_hints: node_hints.map(|node| node.name).collect(),
    };
    let pod = endpoint
        .target_ref
        .as_ref()
        .filter(|target| target.kind.as_deref() == Some("Pod"));
    let id = match pod {
        Some(pod) => EndpointId::Pod {
            namespace: pod.namespace.clone().unwrap_or_else(|| namespace.into()),
            name: pod.name.clone()?,
            uid: pod.uid.clone()?,
        },
        None => EndpointId::Address {
            slice: slice.into(),
            address: address.clone(),
        },
    };
    Some((id, facts))
}

/// The pod behind an endpoint, if it has one, and the node that pod is on.
pub(super) struct PodOnNode<'a> {
    pub(super) pod: &'a PodFacts,
    /// None: no such Node object, which is as good as dead.
    pub(super) node: Option<&'a NodeFacts>,
}

/// One backend, joined from every slice of its Service that has it. None: there is no such backend.
///
/// * `members` – the slices with this endpoint, one per address family or set of ports.
/// * `pod` – the pod that the endpoint names, when it exists with that very UID.
pub(super) fn backend(
    id: &EndpointId,
    members: &[(&SliceFacts, &EndpointFacts)],
    pod: Option<&PodOnNode<'_>>,
    publish_not_ready: bool,
) -> Option<proto::Backend> {
    let (_, first) = members.first()?;
    let mut backend = proto::Backend {
        hostname: first.hostname.clone(),
        node: first.node.clone(),
        zone: first.zone.clone(),
        zone_hints: first.zone_hints.clone(),
        node_hints: first.node_hints.clone(),
        ..Default::default()
    };
    match id {
        EndpointId::Address { .. } => backend.set_state(first.state),
        EndpointId::Pod {
            namespace,
            name,
            uid,
        } => {
            let pod = pod?;
            backend.set_state(match rules::is_off(Rule::JoinInFeed) {
                false => pod_state(pod, publish_not_ready),
                true => first.state,
            });
            backend.node = pod.pod.node.clone();
            backend.pod_uid = uid.clone();
            backend.pod_name = name.clone();
            backend.pod_namespace = namespace.clone();
            if let (true, Some(node)) = (backend.zone.is_empty(), pod.node) {
                backend.zone = node.zone.clone();
            }
        }
    }
    for (slice, endpoint) in members {
        if !backend.addresses.contains(&endpoint.address) {
            backend.addresses.push(endpoint.address.clone());
        }
        for port in &slice.ports {
            if !backend.ports.contains(port) {
                backend.ports.push(port.clone());
            }
        }
    }
    Some(backend)
}

fn pod_state(pod: &PodOnNode<'_>, publish_not_ready: bool) -> proto::backend::State {
    let node_dead = pod.node.is_none_or(|node| node.dead);
    if pod.pod.deleting {
        proto::backend::State::Draining
    } else if node_dead || pod.pod.ended {
        proto::backend::State::NotReady
    } else if pod.pod.ready || publish_not_ready {
        proto::backend::State::Serving
    } else {
        proto::backend::State::NotReady
    }
}

impl PodFacts {
    pub(super) fn new(pod: &core::Pod) -> Self {
        let status = pod.status.as_ref();
        let phase = status.and_then(|status| status.phase.as_deref());
        let ended = matches!(phase, Some("Succeeded" | "Failed"));
        let conditions = status.and_then(|status| status.conditions.as_ref());
        let node = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.clone())
            .unwrap_or_default();
        let wants_blobs = !ended && !node.is_empty();
        let claims = if wants_blobs {
            pods::claims(pod)
        } else {
            Vec::new()
        };
        let claims = claims.into_iter().map(|name| (CLAIMS, name));
        Self {
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            deleting: pod.metadata.deletion_timestamp.is_some(),
            ready: conditions
                .into_iter()
                .flatten()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True"),
            ended,
            blobs: pod
                .spec
                .as_ref()
                .filter(|_| wants_blobs)
                .map(pod_blobs)
                .into_iter()
                .flatten()
                .chain(claims)
                .collect(),
            node,
        }
    }
}

/// The ConfigMaps and Secrets that a pod names in env, envFrom, volumes and imagePullSecrets.
pub(super) fn pod_blobs(spec: &core::PodSpec) -> BTreeSet<(&'static str, String)> {
    let mut blobs = BTreeSet::new();
    for secret in spec.image_pull_secrets.iter().flatten() {
        blobs.insert(("secrets", secret.name.clone()));
    }
    for container in spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
    {
        env_blobs(
            container.env.as_deref(),
            container.env_from.as_deref(),
            &mut blobs,
        );
    }
    for container in spec.ephemeral_containers.iter().flatten() {
        env_blobs(
            container.env.as_deref(),
            container.env_from.as_deref(),
            &mut blobs,
        );
    }
    for volume in spec.volumes.iter().flatten() {
        if let Some(source) = &volume.config_map {
            blobs.insert(("configmaps", source.name.clone()));
        }
        if let Some(name) = volume
            .secret
            .as_ref()
            .and_then(|source| source.secret_name.clone())
        {
            blobs.insert(("secrets", name));
        }
        let csi = volume.csi.as_ref();
        if let Some(secret) = csi.and_then(|source| source.node_publish_secret_ref.as_ref()) {
            blobs.insert(("secrets", secret.name.clone()));
        }
        let projected = volume
            .projected
            .iter()
            .flat_map(|source| source.sources.iter().flatten());
        for projection in projected {
            if let Some(source) = &projection.config_map {
                blobs.insert(("configmaps", source.name.clone()));
            }
            if let Some(source) = &projection.secret {
                blobs.insert(("secrets", source.name.clone()));
            }
        }
    }
    blobs.retain(|(_, name)| !name.is_empty());
    blobs
}

/// The Secrets that a volume's driver is given on a node: `namespace`, `name`.
pub(super) fn volume_secrets(volume: &core::PersistentVolume) -> BTreeSet<Name> {
    let source = volume.spec.as_ref().and_then(|spec| spec.csi.as_ref());
    let references = source.into_iter().flat_map(|source| {
        [
            source.node_publish_secret_ref.as_ref(),
            source.node_stage_secret_ref.as_ref(),
        ]
    });
    references
        .flatten()
        .filter_map(|secret| Some((secret.namespace.clone()?, secret.name.clone()?)))
        .filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty())
        .collect()
}

fn env_blobs(
    env: Option<&[core::EnvVar]>,
    env_from: Option<&[core::EnvFromSource]>,
    blobs: &mut BTreeSet<(&'static str, String)>,
) {
    for source in env
        .into_iter()
        .flatten()
        .filter_map(|var| var.value_from.as_ref())
    {
        if let Some(key) = &source.config_map_key_ref {
            blobs.insert(("configmaps", key.name.clone()));
        }
        if let Some(key) = &source.secret_key_ref {
            blobs.insert(("secrets", key.name.clone()));
        }
    }
    for source in env_from.into_iter().flatten() {
        if let Some(source) = &source.config_map_ref {
            blobs.insert(("configmaps", source.name.clone()));
        }
        if let Some(source) = &source.secret_ref {
            blobs.insert(("secrets", source.name.clone()));
        }
    }
}

/// All of them, with commas.
fn pod_cidrs(spec: &core::NodeSpec) -> String {
    match spec.pod_cidrs.as_deref() {
        Some(all) if !all.is_empty() => all.join(","),
        _ => spec.pod_cidr.clone().unwrap_or_default(),
    }
}

impl NodeFacts {
    pub(super) fn new(node: &core::Node) -> Self {
        let status = node.status.as_ref();
        let ready = status
            .and_then(|status| status.conditions.as_ref())
            .into_iter()
            .flatten()
            .find(|condition| condition.type_ == "Ready")
            .map(|condition| condition.status.as_str());
        let addresses = status
            .and_then(|status| status.addresses.as_ref())
            .into_iter()
            .flatten();
        Self {
            dead: ready == Some("Unknown"),
            ready: ready == Some("True"),
            pod_cidr: node.spec.as_ref().map(pod_cidrs).unwrap_or_default(),
            addresses: addresses
                .filter(|address| address.type_ == "InternalIP")
                .filter_map(|address| address_bytes(&address.address))
                .collect(),
            wireguard_key: node
                .metadata
                .annotations
                .as_ref()
                .and_then(|all| STANDARD.decode(all.get(WIREGUARD_KEY_ANNOTATION)?).ok())
                .filter(|key| key.len() == 32)
                .unwrap_or_default()
                .into(),
            zone: node
                .metadata
                .labels
                .as_ref()
                .and_then(|labels| labels.get(ZONE_LABEL).cloned())
                .unwrap_or_default(),
        }
    }

    /// Its route, once it has a pod prefix.
    pub(super) fn route(&self) -> Option<proto::NodeRoute> {
        (!self.pod_cidr.is_empty()).then(|| proto::NodeRoute {
            pod_cidr: self.pod_cidr.clone(),
            addresses: self.addresses.clone(),
            zone: self.zone.clone(),
            dead: self.dead,
            wireguard_key: self.wireguard_key.clone(),
        })
    }
}
