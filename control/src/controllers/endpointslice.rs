//! EndpointSlices: which pods stand behind a Service.
//!
//! ```text
//!  Service (selector, ports) ─┐
//!  pods (address, conditions) ─┼─► one group per (address type, resolved ports) ─► slices of ≤ 100
//!  slices as they are ─────────┘
//! ```
//! Named target ports are looked up in each pod, so pods of one Service can differ in their ports:
//! each set of ports has slices of its own. A Service without endpoints keeps one empty slice per
//! address family.
//!
//! Invariants, checked by `tests`: no slice above [`ENDPOINT_COUNT_MAX`]; each pod once per family;
//! planning what was just planned changes nothing; endpoints stay in the slice where they are, so
//! one pod's change writes one slice.
//!
//! Source: Kubernetes `staging/src/k8s.io/endpointslice/reconciler.go` and `trafficdist`.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use gantry_api::k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use gantry_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use gantry_api::status::Status;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{Delta, ObjectKey};
use super::queue::WorkQueue;
use super::{Context, Controller, pods};
use crate::server::registry::DeleteOptions;

/// Workers. Each writes one slice and waits until that is durable and seen: so many writes share an
/// fsync when thousands of Services are created at once. They are tasks and cost nothing idle.
const WORKER_COUNT: usize = 32;
/// Endpoints of one slice, as in Kubernetes (`--max-endpoints-per-slice`).
const ENDPOINT_COUNT_MAX: usize = 100;
/// Label with the name of the Service.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label with the writer of the slice.
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// This controller as a writer.
const MANAGER: &str = "endpointslice-controller.k8s.io";
/// Label of slices whose Service has no cluster IP.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Node label with the failure zone.
const ZONE: &str = "topology.kubernetes.io/zone";

/// What to write.
#[derive(Debug, Default)]
struct Plan {
    create: Vec<EndpointSlice>,
    update: Vec<EndpointSlice>,
    delete: Vec<Arc<EndpointSlice>>,
}

/// Resolved ports, in the order of the Service.
type Ports = Vec<EndpointPort>;
/// Endpoints by the uid of their pod; ordered, so that the plan does not depend on chance.
type Endpoints = BTreeMap<String, Endpoint>;

/// Decides which slices a Service needs. `zones` are the zones of nodes by name.
fn plan(
    service: &Service,
    selected: &[Arc<Pod>],
    existing: &[Arc<EndpointSlice>],
    zones: &HashMap<String, String>,
) -> Plan {
    let families = families(service);
    let mut total = Plan::default();
    for slice in existing {
        if !families.contains(&slice.address_type.as_str()) {
            total.delete.push(Arc::clone(slice));
        }
    }
    for family in families {
        let mut groups = groups(service, selected, family, zones);
        if groups.is_empty() {
            groups.push((Ports::new(), Endpoints::new()));
        }
        let slices: Vec<&Arc<EndpointSlice>> = existing
            .iter()
            .filter(|slice| slice.address_type == family)
            .collect();
        let plan = plan_family(service, family, groups, &slices);
        total.create.extend(plan.create);
        total.update.extend(plan.update);
        total.delete.extend(plan.delete);
    }
    total
}

/// The address families of a Service; one without any is taken as IPv4.
fn families(service: &Service) -> Vec<&'static str> {
    let families = service
        .spec
        .as_ref()
        .and_then(|spec| spec.ip_families.as_deref());
    let known = families
        .into_iter()
        .flatten()
        .filter_map(|family| match family.as_str() {
            "IPv4" => Some("IPv4"),
            "IPv6" => Some("IPv6"),
            _ => None,
        });
    let mut known: Vec<&str> = known.collect();
    known.dedup();
    if known.is_empty() {
        known.push("IPv4");
    }
    known
}

/// The wanted endpoints of one family, by their resolved ports.
fn groups(
    service: &Service,
    selected: &[Arc<Pod>],
    family: &str,
    zones: &HashMap<String, String>,
) -> Vec<(Ports, Endpoints)> {
    let mut groups: Vec<(Ports, Endpoints)> = Vec::new();
    for pod in selected.iter().filter(|pod| !pods::is_finished(pod)) {
        let Some(address) = address_of(pod, family) else {
            continue;
        };
        let Some(uid) = pod.metadata.uid.clone() else {
            continue;
        };
        let ports = resolve_ports(service, pod);
        let endpoint = endpoint_of(service, pod, address, zones);
        match groups.iter_mut().find(|(known, _)| *known == ports) {
            Some((_, endpoints)) => {
                endpoints.insert(uid, endpoint);
            }
            None => groups.push((ports, Endpoints::from([(uid, endpoint)]))),
        }
    }
    groups
}

/// The pod's address of this family.
fn address_of(pod: &Pod, family: &str) -> Option<String> {
    let status = pod.status.as_ref()?;
    let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    let first = status.pod_ip.as_deref();
    let matches = |address: &&str| match address.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(_)) => family == "IPv4",
        Ok(std::net::IpAddr::V6(_)) => family == "IPv6",
        Err(_) => false,
    };
    all.chain(first).find(matches).map(str::to_owned)
}

/// The Service's ports in this pod; a named target port that the pod lacks is left out.
fn resolve_ports(service: &Service, pod: &Pod) -> Ports {
    let ports = service
        .spec
        .as_ref()
        .and_then(|spec| spec.ports.as_deref())
        .unwrap_or_default();
    let resolved = ports.iter().filter_map(|port| {
        Some(EndpointPort {
            name: Some(port.name.clone().unwrap_or_default()),
            port: Some(target_port(port, pod)?),
            protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".to_owned())),
            app_protocol: port.app_protocol.clone(),
        })
    });
    resolved.collect()
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<i32> {
    let wanted = match &port.target_port {
        None | Some(IntOrString::Int(0)) => return Some(port.port),
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) => name,
    };
    let spec = pod.spec.as_ref()?;
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    // A restartable init container is a sidecar: it serves as long as the pod.
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let all = spec.containers.iter().chain(sidecars);
    let mut ports = all.flat_map(|container| container.ports.iter().flatten());
    let found = ports.find(|container_port| {
        container_port.name.as_deref() == Some(wanted)
            && container_port.protocol.as_deref().unwrap_or("TCP") == protocol
    });
    found.map(|container_port| container_port.container_port)
}

fn endpoint_of(
    service: &Service,
    pod: &Pod,
    address: String,
    zones: &HashMap<String, String>,
) -> Endpoint {
    let spec = service.spec.as_ref();
    let serving = pods::is_ready(pod);
    let terminating = pods::is_terminating(pod);
    let unready_too = spec
        .and_then(|spec| spec.publish_not_ready_addresses)
        .unwrap_or(false);
    let pod_spec = pod.spec.as_ref();
    let subdomain = pod_spec.and_then(|spec| spec.subdomain.as_ref());
    let hostname = pod_spec.and_then(|spec| spec.hostname.clone());
    let named = subdomain.is_some() && subdomain == service.metadata.name.as_ref();
    let node = pods::node(pod).map(str::to_owned);
    let zone = node.as_ref().and_then(|node| zones.get(node)).cloned();
    let ready = unready_too || (serving && !terminating);
    let distribution = spec.and_then(|spec| spec.traffic_distribution.as_deref());
    let hints = distribution.filter(|_| ready);
    let hints =
        hints.and_then(|distribution| hints_of(distribution, node.as_deref(), zone.as_deref()));
    Endpoint {
        addresses: vec![address],
        hints,
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: hostname.filter(|hostname| named && !hostname.is_empty()),
        zone,
        node_name: node,
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    }
}

/// Whose clients should get a ready endpoint. Nothing where it is not known: then nobody's traffic
/// is kept close, see the agents' `services::index`.
fn hints_of(distribution: &str, node: Option<&str>, zone: Option<&str>) -> Option<EndpointHints> {
    let for_zones = zone.map(|name| vec![ForZone { name: name.into() }]);
    let hints = match distribution {
        "PreferClose" | "PreferSameZone" => EndpointHints {
            for_zones,
            for_nodes: None,
        },
        "PreferSameNode" => EndpointHints {
            for_zones,
            for_nodes: node.map(|name| vec![ForNode { name: name.into() }]),
        },
        _ => return None,
    };
    (hints != EndpointHints::default()).then_some(hints)
}

/// A slice while its family is being planned.
struct Draft<'a> {
    before: &'a Arc<EndpointSlice>,
    endpoints: Vec<Endpoint>,
    changed: bool,
}

fn plan_family(
    service: &Service,
    family: &str,
    groups: Vec<(Ports, Endpoints)>,
    slices: &[&Arc<EndpointSlice>],
) -> Plan {
    let mut plan = Plan::default();
    let mut create = Vec::new();
    let has_endpoints = groups.iter().any(|(_, endpoints)| !endpoints.is_empty());
    let mut claimed = vec![false; slices.len()];
    for (ports, endpoints) in groups {
        let mut drafts = Vec::new();
        for (slice, claimed) in slices.iter().zip(&mut claimed) {
            let theirs = slice.ports.as_deref().unwrap_or_default();
            if !*claimed && theirs == ports {
                *claimed = true;
                drafts.push(*slice);
            }
        }
        let (mut drafts, fresh) = fill(&drafts, endpoints);
        if !has_endpoints && drafts.is_empty() && fresh.is_empty() {
            create.push((ports.clone(), Vec::new()));
        }
        create.extend(
            fresh
                .into_iter()
                .map(|endpoints| (ports.clone(), endpoints)),
        );
        let mut keep_empty = !has_endpoints;
        for draft in drafts.drain(..) {
            if draft.endpoints.is_empty() && !std::mem::take(&mut keep_empty) {
                plan.delete.push(Arc::clone(draft.before));
                continue;
            }
            let mut new = EndpointSlice::clone(draft.before);
            if draft.changed {
                new.endpoints = Some(draft.endpoints);
            }
            set_metadata(service, &mut new);
            if new != **draft.before {
                plan.update.push(new);
            }
        }
    }
    let unclaimed = slices.iter().zip(claimed).filter(|(_, claimed)| !claimed);
    plan.delete
        .extend(unclaimed.map(|(slice, _)| Arc::clone(slice)));
    // A slice that would go can take what a new one would hold: one write instead of two.
    for (ports, endpoints) in create {
        match plan.delete.pop() {
            Some(old) => {
                let mut new = EndpointSlice::clone(&old);
                new.ports = Some(ports);
                new.endpoints = Some(endpoints);
                set_metadata(service, &mut new);
                plan.update.push(new);
            }
            None => plan
                .create
                .push(new_slice(service, family, ports, endpoints)),
        }
    }
    plan
}

/// Puts the endpoints into slices: each where it is, the rest where slices change anyway, then into
/// the fullest slice that takes all of it, then into new ones (returned).
fn fill<'a>(
    slices: &[&'a Arc<EndpointSlice>],
    mut wanted: Endpoints,
) -> (Vec<Draft<'a>>, Vec<Vec<Endpoint>>) {
    let mut drafts: Vec<Draft<'a>> = Vec::with_capacity(slices.len());
    for &slice in slices {
        let old = slice.endpoints.as_deref().unwrap_or_default();
        let mut endpoints = Vec::with_capacity(old.len());
        for endpoint in old {
            let uid = endpoint
                .target_ref
                .as_ref()
                .and_then(|target| target.uid.as_ref());
            if endpoints.len() < ENDPOINT_COUNT_MAX
                && let Some(kept) = uid.and_then(|uid| wanted.remove(uid))
            {
                endpoints.push(kept);
            }
        }
        let changed = endpoints != old;
        drafts.push(Draft {
            before: slice,
            endpoints,
            changed,
        });
    }
    let mut rest: Vec<Endpoint> = wanted.into_values().collect();
    for draft in drafts.iter_mut().filter(|draft| draft.changed) {
        let room = ENDPOINT_COUNT_MAX.saturating_sub(draft.endpoints.len());
        draft.endpoints.extend(rest.drain(..room.min(rest.len())));
    }
    let over = rest.len() % ENDPOINT_COUNT_MAX;
    let fits = |draft: &&mut Draft<'_>| draft.endpoints.len() + over <= ENDPOINT_COUNT_MAX;
    if over > 0
        && let Some(draft) = drafts
            .iter_mut()
            .filter(fits)
            .max_by_key(|draft| draft.endpoints.len())
    {
        draft.endpoints.extend(rest.drain(..over));
        draft.changed = true;
    }
    let fresh = rest
        .chunks(ENDPOINT_COUNT_MAX)
        .map(<[Endpoint]>::to_vec)
        .collect();
    (drafts, fresh)
}

fn new_slice(
    service: &Service,
    family: &str,
    ports: Ports,
    endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    let name = service.metadata.name.as_deref().unwrap_or_default();
    let mut slice = EndpointSlice {
        address_type: family.to_owned(),
        endpoints: Some(endpoints),
        metadata: ObjectMeta {
            generate_name: Some(format!("{name}-")),
            namespace: service.metadata.namespace.clone(),
            owner_references: Some(vec![super::controller_reference(service)]),
            ..ObjectMeta::default()
        },
        ports: Some(ports),
    };
    set_metadata(service, &mut slice);
    slice
}

/// The Service's own labels and the ones that tie the slice to it.
fn set_metadata(service: &Service, slice: &mut EndpointSlice) {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    let name = service.metadata.name.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.to_owned(), name);
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    let cluster_ip = service
        .spec
        .as_ref()
        .and_then(|spec| spec.cluster_ip.as_deref());
    if cluster_ip == Some("None") {
        labels.insert(HEADLESS.to_owned(), String::new());
    } else {
        labels.remove(HEADLESS);
    }
    slice.metadata.labels = Some(labels);
}

/// The selector of a Service that has endpoints made for it.
fn selector(service: &Service) -> Option<&BTreeMap<String, String>> {
    let spec = service.spec.as_ref()?;
    let selector = spec
        .selector
        .as_ref()
        .filter(|selector| !selector.is_empty())?;
    (spec.type_.as_deref() != Some("ExternalName")).then_some(selector)
}

fn is_selected(selector: &BTreeMap<String, String>, metadata: &ObjectMeta) -> bool {
    let labels = metadata.labels.as_ref();
    selector
        .iter()
        .all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
}

/// Whether a change of a pod can change an endpoint.
fn is_relevant(old: &Pod, new: &Pod) -> bool {
    let addresses = |pod: &Pod| {
        pod.status
            .as_ref()
            .map(|status| (status.pod_ip.clone(), status.pod_ips.clone()))
    };
    old.metadata.labels != new.metadata.labels
        || pods::is_ready(old) != pods::is_ready(new)
        || pods::is_terminating(old) != pods::is_terminating(new)
        || pods::is_finished(old) != pods::is_finished(new)
        || pods::node(old) != pods::node(new)
        || addresses(old) != addresses(new)
}

struct EndpointSlices {
    context: Arc<Context>,
}

impl Controller for EndpointSlices {
    const NAME: &'static str = "endpointslice-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let caches = &self.context.caches;
        let registry = &self.context.registry;
        // Of a Service that is gone the garbage collector takes the slices.
        let Some(service) = caches.services.get(key) else {
            return Ok(None);
        };
        let leaving = service.metadata.deletion_timestamp.is_some();
        let Some(selector) = selector(&service).filter(|_| !leaving) else {
            return Ok(None);
        };
        let mut selected = caches.pods.in_namespace(&key.namespace);
        selected.retain(|pod| is_selected(selector, &pod.metadata));
        let uid = service.metadata.uid.as_deref().unwrap_or_default();
        let mut existing = caches.endpoint_slices.owned_by(uid);
        existing.retain(|slice| {
            let labels = slice.metadata.labels.as_ref();
            let manager = labels.and_then(|labels| labels.get(MANAGED_BY));
            manager.is_some_and(|manager| manager == MANAGER)
                && slice.metadata.deletion_timestamp.is_none()
        });
        let plan = plan(&service, &selected, &existing, &self.zones());
        for slice in &plan.update {
            registry.update(slice).await?;
        }
        for slice in &plan.create {
            registry.create(slice).await?;
        }
        for slice in &plan.delete {
            let key = ObjectKey::of(&slice.metadata);
            let options = DeleteOptions {
                uid: slice.metadata.uid.clone(),
                ..DeleteOptions::default()
            };
            let result = registry
                .delete::<EndpointSlice>(&key.namespace, &key.name, &options)
                .await;
            super::ignore_not_found(result)?;
        }
        Ok(None)
    }
}

impl EndpointSlices {
    fn zones(&self) -> HashMap<String, String> {
        let zone = |node: &Arc<gantry_api::k8s_openapi::api::core::v1::Node>| {
            let zone = node.metadata.labels.as_ref()?.get(ZONE)?.clone();
            Some((node.metadata.name.clone()?, zone))
        };
        self.context
            .caches
            .nodes
            .all()
            .iter()
            .filter_map(zone)
            .collect()
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let caches = &context.caches;
    let own = queue.clone();
    caches
        .services
        .on_change(move |delta| own.add(ObjectKey::of(&delta.object().metadata)));
    let (services, weak) = (queue.clone(), Arc::downgrade(context));
    caches.pods.on_change(move |delta: &Delta<Pod>| {
        if let Delta::Applied {
            new,
            old: Some(old),
        } = delta
            && !is_relevant(old, new)
        {
            return;
        }
        let Some(context) = weak.upgrade() else {
            return;
        };
        let namespace = delta
            .object()
            .metadata
            .namespace
            .as_deref()
            .unwrap_or_default();
        for service in context.caches.services.in_namespace(namespace) {
            let Some(selector) = selector(&service) else {
                continue;
            };
            if delta
                .states()
                .any(|pod| is_selected(selector, &pod.metadata))
            {
                services.add(ObjectKey::of(&service.metadata));
            }
        }
    });
    let owners = queue.clone();
    caches.endpoint_slices.on_change(move |delta| {
        if let Some(key) = super::controller_key::<Service, EndpointSlice>(&**delta.object()) {
            owners.add(key);
        }
    });
    let controller = EndpointSlices {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, WORKER_COUNT, context, tasks, shutdown);
}

#[cfg(test)]
#[path = "endpointslice_tests.rs"]
mod tests;
