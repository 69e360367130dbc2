//! What a pod asks of a node, taken from its object once.
//!
//! Source: Kubernetes `pkg/api/v1/resource` (PodRequests), `framework.NodeInfo`.

use std::collections::BTreeMap;
use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::{Container, NodeSelector, Pod, PodSpec, Toleration};
use gantry_api::k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use gantry_api::quantity::Quantity;

use super::peers::Rules;
use super::volumes::VolumeNeed;
use crate::controllers::informer::ObjectKey;
use crate::controllers::pods;

/// CPU that a pod without a request is scored with, so that such pods spread too.
const CPU_MILLICORES_UNASKED: i64 = 100;
/// Memory that a pod without a request is scored with.
const MEMORY_BYTES_UNASKED: i64 = 200 << 20;

/// Amounts of what nodes have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Resources {
    pub(super) cpu_millicores: i64,
    pub(super) memory_bytes: i64,
    pub(super) storage_bytes: i64,
    /// Everything else by name, in whole units: devices, huge pages.
    pub(super) other: BTreeMap<String, i64>,
}

impl Resources {
    /// Reads a resource list; what is no quantity counts as nothing (validation refuses it).
    pub(super) fn of(list: Option<&BTreeMap<String, ApiQuantity>>) -> Self {
        let mut resources = Self::default();
        for (name, quantity) in list.into_iter().flatten() {
            let Ok(quantity) = Quantity::parse(&quantity.0) else {
                continue;
            };
            match name.as_str() {
                "cpu" => resources.cpu_millicores = quantity.milli(),
                "memory" => resources.memory_bytes = quantity.units(),
                "ephemeral-storage" => resources.storage_bytes = quantity.units(),
                "pods" => {}
                _ => {
                    resources.other.insert(name.clone(), quantity.units());
                }
            }
        }
        resources
    }

    fn combine(&mut self, other: &Self, with: fn(i64, i64) -> i64) {
        self.cpu_millicores = with(self.cpu_millicores, other.cpu_millicores);
        self.memory_bytes = with(self.memory_bytes, other.memory_bytes);
        self.storage_bytes = with(self.storage_bytes, other.storage_bytes);
        for (name, amount) in &other.other {
            let mine = self.other.entry(name.clone()).or_insert(0);
            *mine = with(*mine, *amount);
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.combine(other, i64::saturating_add);
    }

    pub(super) fn subtract(&mut self, other: &Self) {
        self.combine(other, i64::saturating_sub);
    }

    fn raise_to(&mut self, other: &Self) {
        self.combine(other, i64::max);
    }
}

/// A port of the node that the pod wants for itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct HostPort {
    pub(super) address: String,
    pub(super) protocol: String,
    pub(super) port: i32,
}

impl HostPort {
    /// Whether both cannot be on one node.
    pub(super) fn conflicts_with(&self, other: &Self) -> bool {
        let any = |address: &str| matches!(address, "" | "0.0.0.0" | "::");
        self.port == other.port
            && self.protocol == other.protocol
            && (self.address == other.address || any(&self.address) || any(&other.address))
    }
}

/// A pod as the scheduler sees it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PodRequest {
    pub(super) key: ObjectKey,
    pub(super) uid: Arc<str>,
    pub(super) priority: i32,
    pub(super) resources: Resources,
    /// As `resources`, with a little where nothing is asked for.
    pub(super) scored: Resources,
    pub(super) host_ports: Vec<HostPort>,
    pub(super) node_selector: BTreeMap<String, String>,
    pub(super) required_affinity: Option<NodeSelector>,
    pub(super) tolerations: Vec<Toleration>,
    /// It waits rather than push others out.
    pub(super) never_preempts: bool,
    /// Its labels, and what it says about other pods.
    pub(super) rules: Rules,
    /// The claims it uses, by name.
    pub(super) claims: Vec<String>,
    /// Those of them that must have been made for this very pod.
    pub(super) own_claims: Vec<String>,
    /// Where their volumes are: looked up anew for every decision.
    pub(super) volumes: Vec<VolumeNeed>,
    /// Somebody must take these away before the pod may be scheduled.
    pub(super) is_gated: bool,
}

impl PodRequest {
    /// What this pod asks for; `None` when it has no spec or uid.
    pub(super) fn of(pod: &Pod) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        let resources = requests(spec);
        let mut scored = resources.clone();
        if scored.cpu_millicores == 0 {
            scored.cpu_millicores = CPU_MILLICORES_UNASKED;
        }
        if scored.memory_bytes == 0 {
            scored.memory_bytes = MEMORY_BYTES_UNASKED;
        }
        let affinity = spec
            .affinity
            .as_ref()
            .and_then(|affinity| affinity.node_affinity.as_ref());
        Some(Self {
            key: ObjectKey::of(&pod.metadata),
            uid: pod.metadata.uid.as_deref()?.into(),
            priority: spec.priority.unwrap_or(0),
            resources,
            scored,
            host_ports: host_ports(spec),
            node_selector: spec.node_selector.clone().unwrap_or_default(),
            required_affinity: affinity.and_then(|a| {
                a.required_during_scheduling_ignored_during_execution
                    .clone()
            }),
            tolerations: spec.tolerations.clone().unwrap_or_default(),
            never_preempts: spec.preemption_policy.as_deref() == Some("Never"),
            rules: Rules::of(
                spec,
                pod.metadata.namespace.as_deref().unwrap_or_default(),
                pod.metadata.labels.clone().unwrap_or_default(),
            ),
            claims: pods::claims(pod),
            own_claims: pods::ephemeral_claims(pod),
            volumes: Vec::new(),
            is_gated: spec
                .scheduling_gates
                .as_ref()
                .is_some_and(|gates| !gates.is_empty()),
        })
    }
}

fn container_requests(container: &Container) -> Resources {
    Resources::of(
        container
            .resources
            .as_ref()
            .and_then(|resources| resources.requests.as_ref()),
    )
}

fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// What the pod needs at its peak: all containers and sidecars together, or one init container with
/// the sidecars before it, plus the overhead. A request of the whole pod replaces the sum.
fn requests(spec: &PodSpec) -> Resources {
    let mut total = Resources::default();
    for container in &spec.containers {
        total.add(&container_requests(container));
    }
    let (mut sidecars, mut init_peak) = (Resources::default(), Resources::default());
    for container in spec.init_containers.iter().flatten() {
        let mut now = container_requests(container);
        if is_sidecar(container) {
            sidecars.add(&now);
            now = sidecars.clone();
        } else {
            now.add(&sidecars);
        }
        init_peak.raise_to(&now);
    }
    total.add(&sidecars);
    total.raise_to(&init_peak);
    if let Some(whole) = spec
        .resources
        .as_ref()
        .and_then(|whole| whole.requests.as_ref())
    {
        let asked = Resources::of(Some(whole));
        if whole.contains_key("cpu") {
            total.cpu_millicores = asked.cpu_millicores;
        }
        if whole.contains_key("memory") {
            total.memory_bytes = asked.memory_bytes;
        }
    }
    total.add(&Resources::of(spec.overhead.as_ref()));
    total
}

fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    let on_host = spec.host_network.unwrap_or(false);
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|c| is_sidecar(c));
    let containers = spec.containers.iter().chain(sidecars);
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    let wanted = ports.filter_map(|port| {
        let number = port.host_port.filter(|number| *number > 0);
        Some(HostPort {
            address: port.host_ip.clone().unwrap_or_default(),
            protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
            port: number.or_else(|| on_host.then_some(port.container_port))?,
        })
    });
    wanted.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::k8s_openapi::api::core::v1::{ContainerPort, ResourceRequirements};

    fn container(cpu: &str, restart_policy: Option<&str>) -> Container {
        let requests = BTreeMap::from([("cpu".to_owned(), ApiQuantity(cpu.to_owned()))]);
        Container {
            resources: Some(ResourceRequirements {
                requests: Some(requests),
                ..ResourceRequirements::default()
            }),
            restart_policy: restart_policy.map(str::to_owned),
            ..Container::default()
        }
    }

    fn cpu_of(containers: &[&str], init: &[(&str, bool)]) -> i64 {
        let spec = PodSpec {
            containers: containers.iter().map(|cpu| container(cpu, None)).collect(),
            init_containers: Some(
                init.iter()
                    .map(|(cpu, sidecar)| container(cpu, sidecar.then_some("Always")))
                    .collect(),
            ),
            ..PodSpec::default()
        };
        requests(&spec).cpu_millicores
    }

    #[test]
    fn the_peak_of_init_containers_and_containers_counts() {
        assert_eq!(cpu_of(&["500m", "1"], &[]), 1500);
        assert_eq!(cpu_of(&["500m"], &[("2", false)]), 2000);
        assert_eq!(cpu_of(&["500m"], &[("1", true), ("2", false)]), 3000);
        assert_eq!(cpu_of(&["2500m"], &[("2", false), ("1", true)]), 3500);
    }

    #[test]
    fn host_network_makes_container_ports_host_ports() {
        let mut container = container("1", None);
        container.ports = Some(vec![ContainerPort {
            container_port: 80,
            ..ContainerPort::default()
        }]);
        let mut spec = PodSpec {
            containers: vec![container],
            ..PodSpec::default()
        };
        assert!(host_ports(&spec).is_empty());
        spec.host_network = Some(true);
        let ports = host_ports(&spec);
        assert_eq!((ports[0].port, &*ports[0].protocol), (80, "TCP"));
    }

    #[test]
    fn host_ports_conflict_by_address_protocol_and_number() {
        let port = |address: &str, protocol: &str, port| HostPort {
            address: address.to_owned(),
            protocol: protocol.to_owned(),
            port,
        };
        let any = port("", "TCP", 80);
        assert!(any.conflicts_with(&port("10.0.0.1", "TCP", 80)));
        assert!(!any.conflicts_with(&port("", "UDP", 80)));
        assert!(!any.conflicts_with(&port("", "TCP", 81)));
        let one = port("10.0.0.1", "TCP", 80);
        assert!(!one.conflicts_with(&port("10.0.0.2", "TCP", 80)));
        assert!(one.conflicts_with(&one));
    }
}
