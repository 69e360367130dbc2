//! What a pod asks for: amounts of its containers, summed by Kubernetes' rules, and its class. Pure.
//!
//! Invariants, checked by `limits::tests`: a pod is Guaranteed only if every limit equals its
//! request, BestEffort only if there is none; the pod's amounts are never below those of any of its
//! containers.
//!
//! Source: `component-helpers/resource/helpers.go` (init and sidecar rules),
//! `pkg/apis/core/v1/helper/qos`.

use std::collections::BTreeMap;

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use gantry_api::k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use gantry_api::quantity;

/// Kubernetes' quality-of-service class of a pod.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum QosClass {
    /// Limits equal requests for CPU and memory of every container.
    Guaranteed,
    /// Something is requested or limited.
    Burstable,
    /// Nothing is.
    BestEffort,
}

impl QosClass {
    /// All classes, in the order in which their cgroups are made.
    pub const ALL: [Self; 3] = [Self::Guaranteed, Self::Burstable, Self::BestEffort];

    /// `status.qosClass`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }

    /// The directory below `/gantry`.
    pub fn dir(self) -> &'static str {
        match self {
            Self::Guaranteed => "guaranteed",
            Self::Burstable => "burstable",
            Self::BestEffort => "besteffort",
        }
    }
}

/// CPU and memory of one container or one pod; none where nothing was said.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Amounts {
    /// Thousandths of a CPU.
    pub cpu_millicores: Option<u64>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
}

impl Amounts {
    fn zip(self, other: Self, join: impl Fn(u64, u64) -> u64) -> Self {
        let one = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(join(a, b)),
            (a, b) => a.or(b),
        };
        Self {
            cpu_millicores: one(self.cpu_millicores, other.cpu_millicores),
            memory_bytes: one(self.memory_bytes, other.memory_bytes),
        }
    }

    fn plus(self, other: Self) -> Self {
        self.zip(other, u64::saturating_add)
    }

    fn max(self, other: Self) -> Self {
        self.zip(other, u64::max)
    }

    fn or(self, other: Self) -> Self {
        Self {
            cpu_millicores: self.cpu_millicores.or(other.cpu_millicores),
            memory_bytes: self.memory_bytes.or(other.memory_bytes),
        }
    }

    pub(super) fn is_empty(self) -> bool {
        self == Self::default()
    }
}

fn amounts<'a>(get: impl Fn(&str) -> Option<&'a Quantity>) -> Amounts {
    // Quantities were validated by the API; one that cannot be read counts as absent, as 0 does.
    let parse = |name: &str| quantity::Quantity::parse(&get(name)?.0).ok();
    let positive = |value: i64| u64::try_from(value).ok().filter(|v| *v > 0);
    Amounts {
        cpu_millicores: parse("cpu").and_then(|q| positive(q.milli())),
        memory_bytes: parse("memory").and_then(|q| positive(q.units())),
    }
}

pub(super) fn limits_of(resources: Option<&ResourceRequirements>) -> Amounts {
    let map = resources.and_then(|r| r.limits.as_ref());
    amounts(|name| map.and_then(|m| m.get(name)))
}

/// Requests, each defaulting to the limit as the API server does it.
pub(super) fn requests_of(resources: Option<&ResourceRequirements>) -> Amounts {
    let map = resources.and_then(|r| r.requests.as_ref());
    amounts(|name| map.and_then(|m| m.get(name))).or(limits_of(resources))
}

fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Sums over a pod: containers and sidecars together, or the largest moment of the init phase.
pub(super) fn pod_sum(
    spec: &PodSpec,
    of: impl Fn(Option<&ResourceRequirements>) -> Amounts,
) -> Amounts {
    let mut running = Amounts::default();
    for container in &spec.containers {
        running = running.plus(of(container.resources.as_ref()));
    }
    let mut sidecars = Amounts::default();
    let mut init_peak = Amounts::default();
    for container in spec.init_containers.iter().flatten() {
        let own = of(container.resources.as_ref());
        if is_sidecar(container) {
            running = running.plus(own);
            sidecars = sidecars.plus(own);
            init_peak = init_peak.max(sidecars);
        } else {
            init_peak = init_peak.max(own.plus(sidecars));
        }
    }
    let overhead = amounts(|name| spec.overhead.as_ref().and_then(|o| o.get(name)));
    // Pod-level resources, where given, replace the sum; overhead comes on top of either.
    let stated = of(spec.resources.as_ref());
    let sum = stated.or(running.max(init_peak));
    // Overhead raises a ceiling that exists; it does not make one.
    Amounts {
        cpu_millicores: sum
            .cpu_millicores
            .map(|v| v.saturating_add(overhead.cpu_millicores.unwrap_or(0))),
        memory_bytes: sum
            .memory_bytes
            .map(|v| v.saturating_add(overhead.memory_bytes.unwrap_or(0))),
    }
}

/// The pod's effective requests (what the scheduler counts).
pub fn pod_requests(pod: &Pod) -> Amounts {
    pod.spec
        .as_ref()
        .map(|spec| pod_sum(spec, requests_of))
        .unwrap_or_default()
}

pub(super) fn all_containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
}

/// The pod's class, as the API server computes it. Only CPU and memory count.
pub fn qos_class(pod: &Pod) -> QosClass {
    let Some(spec) = pod.spec.as_ref() else {
        return QosClass::BestEffort;
    };
    let pairs: Vec<(Amounts, Amounts)> = match spec.resources.as_ref() {
        Some(own) if !requests_of(Some(own)).is_empty() => {
            vec![(requests_of(Some(own)), limits_of(Some(own)))]
        }
        _ => all_containers(spec)
            .map(|c| {
                (
                    requests_of(c.resources.as_ref()),
                    limits_of(c.resources.as_ref()),
                )
            })
            .collect(),
    };
    if pairs.iter().all(|(requests, _)| requests.is_empty()) {
        return QosClass::BestEffort;
    }
    let complete = pairs
        .iter()
        .all(|(_, limits)| limits.cpu_millicores.is_some() && limits.memory_bytes.is_some());
    let total = |pick: fn(&(Amounts, Amounts)) -> Amounts| {
        pairs
            .iter()
            .map(pick)
            .fold(Amounts::default(), Amounts::plus)
    };
    if complete && total(|p| p.0) == total(|p| p.1) {
        QosClass::Guaranteed
    } else {
        QosClass::Burstable
    }
}

/// Bytes of huge pages by page size: `hugepages-2Mi: 4Mi` is {2 MiB: 4 MiB}. Requests equal limits.
fn hugepages_of(resources: Option<&ResourceRequirements>) -> BTreeMap<u64, u64> {
    let limits = resources.and_then(|r| r.limits.as_ref());
    let pair = |(name, amount): (&String, &Quantity)| {
        let size = quantity::Quantity::parse(name.strip_prefix("hugepages-")?).ok()?;
        let amount = quantity::Quantity::parse(&amount.0).ok()?;
        Some((
            u64::try_from(size.units()).ok()?,
            u64::try_from(amount.units()).ok()?,
        ))
    };
    limits.into_iter().flatten().filter_map(pair).collect()
}

/// Huge pages of one container.
pub fn container_hugepages(container: &Container) -> BTreeMap<u64, u64> {
    hugepages_of(container.resources.as_ref())
}

/// Huge pages of a pod: what it states itself, else the sum of its containers or the largest init
/// container.
pub fn pod_hugepages(pod: &Pod) -> BTreeMap<u64, u64> {
    let Some(spec) = pod.spec.as_ref() else {
        return BTreeMap::new();
    };
    let stated = hugepages_of(spec.resources.as_ref());
    if !stated.is_empty() {
        return stated;
    }
    let mut running: BTreeMap<u64, u64> = BTreeMap::new();
    let mut init_peak: BTreeMap<u64, u64> = BTreeMap::new();
    let sidecars = spec.init_containers.iter().flatten();
    for container in spec
        .containers
        .iter()
        .chain(sidecars.filter(|c| is_sidecar(c)))
    {
        for (size, bytes) in container_hugepages(container) {
            let sum = running.entry(size).or_default();
            *sum = sum.saturating_add(bytes);
        }
    }
    for container in spec.init_containers.iter().flatten() {
        for (size, bytes) in container_hugepages(container) {
            let peak = init_peak.entry(size).or_default();
            *peak = bytes.max(*peak);
        }
    }
    for (size, bytes) in init_peak {
        let sum = running.entry(size).or_default();
        *sum = bytes.max(*sum);
    }
    running
}

/// Bytes of `ephemeral-storage` that a pod's containers request together.
pub fn pod_disk_request(pod: &Pod) -> u64 {
    let containers = pod.spec.iter().flat_map(|s| s.containers.iter());
    containers
        .filter_map(|c| {
            let resources = c.resources.as_ref()?;
            let of = |map: &Option<BTreeMap<String, Quantity>>| {
                let text = map.as_ref()?.get("ephemeral-storage")?.0.clone();
                u64::try_from(quantity::Quantity::parse(&text).ok()?.units()).ok()
            };
            of(&resources.requests).or_else(|| of(&resources.limits))
        })
        .fold(0, u64::saturating_add)
}
