//! What requests and limits mean for the kernel: pure, no file is touched here.
//!
//! ```text
//! Pod ─► effective requests, limits ─► QoS class, CPU shares, CPU quota, memory, pids ─► [Setting] per cgroup version
//!         (sidecar and init rules)              kubelet's formulas                          one file each
//! ```
//! Invariants, checked by `tests`:
//! * weight and shares are monotonic in the CPU request and stay in the kernel's range;
//! * a pod is Guaranteed only if every limit equals its request, BestEffort only if there is none;
//! * the pod's amounts are never below those of any of its containers.
//!
//! Source: Kubernetes `pkg/kubelet/cm/helpers_linux.go` (shares, quota, pod config),
//! `component-helpers/resource/helpers.go` (init and sidecar rules), `pkg/apis/core/v1/helper/qos`,
//! `pkg/kubelet/qos/policy.go` (oom score). Shares to weight: opencontainers/cgroups v0.0.5, the
//! same formula as libcontainer 0.7, so that pod and container level agree.

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use gantry_api::k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use gantry_api::quantity;

/// The length of a CPU bandwidth period, microseconds.
pub const CPU_PERIOD_US: u64 = 100_000;
/// The kernel refuses a shorter quota than this, microseconds.
const CPU_QUOTA_MIN_US: u64 = 1_000;
/// `cpu.shares` range of the kernel.
const SHARES_MIN: u64 = 2;
const SHARES_MAX: u64 = 262_144;
/// Processes and threads a pod may have unless configured: stops a fork bomb, far above real use.
pub const POD_PIDS_MAX: u64 = 4_096;

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

    fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// What a cgroup gets. The same type serves a pod and a container.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodLimits {
    /// Relative CPU time, `cpu.shares` scale (2 ..= 262144).
    pub cpu_shares: u64,
    /// CPU time per [`CPU_PERIOD_US`], microseconds; none: no ceiling.
    pub cpu_quota_us: Option<u64>,
    /// Bytes; none: no ceiling.
    pub memory_limit_bytes: Option<u64>,
    /// Tasks; none: no ceiling.
    pub pids_max: Option<u64>,
    /// What was requested, thousandths of a CPU: the QoS level's share is their sum.
    pub cpu_request_millicores: u64,
}

/// Thousandths of a CPU to `cpu.shares`, as kubelet's `MilliCPUToShares`.
pub fn cpu_shares(millicores: u64) -> u64 {
    (millicores.saturating_mul(1024) / 1000).clamp(SHARES_MIN, SHARES_MAX)
}

/// Thousandths of a CPU to microseconds per [`CPU_PERIOD_US`], as kubelet's `MilliCPUToQuota`;
/// none for 0, which means no ceiling.
pub fn cpu_quota_us(millicores: u64) -> Option<u64> {
    (millicores > 0)
        .then(|| (millicores.saturating_mul(CPU_PERIOD_US) / 1000).max(CPU_QUOTA_MIN_US))
}

/// `cpu.shares` to `cpu.weight` (1 ..= 10000): a quadratic in the logarithm through
/// (2, 1), (1024, 100), (262144, 10000), so that the default of one is the default of the other.
pub fn cpu_weight(shares: u64) -> u64 {
    if shares <= SHARES_MIN {
        return 1;
    }
    if shares >= SHARES_MAX {
        return 10_000;
    }
    let l = (shares as f64).log2();
    let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
    // 1024 must give 100, not 101 by a rounding error of the last bit.
    ((10f64.powf(exponent) - 1e-9).ceil() as u64).clamp(1, 10_000)
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

fn limits_of(resources: Option<&ResourceRequirements>) -> Amounts {
    let map = resources.and_then(|r| r.limits.as_ref());
    amounts(|name| map.and_then(|m| m.get(name)))
}

/// Requests, each defaulting to the limit as the API server does it.
fn requests_of(resources: Option<&ResourceRequirements>) -> Amounts {
    let map = resources.and_then(|r| r.requests.as_ref());
    amounts(|name| map.and_then(|m| m.get(name))).or(limits_of(resources))
}

fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Sums over a pod: containers and sidecars together, or the largest moment of the init phase.
fn pod_sum(spec: &PodSpec, of: impl Fn(Option<&ResourceRequirements>) -> Amounts) -> Amounts {
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

fn all_containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
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

/// The pod's cgroup: a ceiling only where every container has one (or the pod itself states it).
pub fn pod_limits(pod: &Pod, pids_max: Option<u64>) -> PodLimits {
    let Some(spec) = pod.spec.as_ref() else {
        return limits_from(Amounts::default(), Amounts::default(), pids_max);
    };
    let stated = limits_of(spec.resources.as_ref());
    let sum = pod_sum(spec, limits_of);
    let declared = |get: fn(Amounts) -> Option<u64>| {
        get(stated).is_some()
            || all_containers(spec).all(|c| get(limits_of(c.resources.as_ref())).is_some())
    };
    let ceiling = Amounts {
        cpu_millicores: sum
            .cpu_millicores
            .filter(|_| declared(|a| a.cpu_millicores)),
        memory_bytes: sum.memory_bytes.filter(|_| declared(|a| a.memory_bytes)),
    };
    limits_from(pod_sum(spec, requests_of), ceiling, pids_max)
}

/// One container's cgroup. Pids are limited at the pod's level only.
pub fn container_limits(container: &Container) -> PodLimits {
    let resources = container.resources.as_ref();
    limits_from(requests_of(resources), limits_of(resources), None)
}

fn limits_from(requests: Amounts, limits: Amounts, pids_max: Option<u64>) -> PodLimits {
    let request = requests.cpu_millicores.unwrap_or(0);
    PodLimits {
        cpu_shares: cpu_shares(request),
        cpu_quota_us: limits.cpu_millicores.and_then(cpu_quota_us),
        memory_limit_bytes: limits.memory_bytes,
        pids_max,
        cpu_request_millicores: request,
    }
}

/// `/proc/<pid>/oom_score_adj` of a container: the less of its request it may miss, the lower.
///
/// * `memory_capacity_bytes` – the node's memory.
pub fn oom_score_adj(pod: &Pod, container: &Container, memory_capacity_bytes: u64) -> i32 {
    const GUARANTEED: i32 = -997;
    let critical = pod
        .spec
        .as_ref()
        .and_then(|s| s.priority_class_name.as_deref());
    if critical == Some("system-node-critical") {
        return GUARANTEED;
    }
    match qos_class(pod) {
        QosClass::Guaranteed => GUARANTEED,
        QosClass::BestEffort => 1000,
        QosClass::Burstable => {
            let request = requests_of(container.resources.as_ref())
                .memory_bytes
                .unwrap_or(0);
            let share = u128::from(request) * 1000 / u128::from(memory_capacity_bytes.max(1));
            let score = 1000 - i32::try_from(share).unwrap_or(1000);
            // Above every Guaranteed container, below every BestEffort one.
            score.clamp(1000 + GUARANTEED, 999)
        }
    }
}

/// One write: which controller's hierarchy (v1) or directory (v2), which file, what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Setting {
    /// `cpu`, `memory` or `pids`.
    pub controller: &'static str,
    /// The file's name.
    pub file: &'static str,
    /// What is written.
    pub value: String,
}

fn setting(controller: &'static str, file: &'static str, value: impl ToString) -> Setting {
    Setting {
        controller,
        file,
        value: value.to_string(),
    }
}

/// The files of the unified hierarchy.
pub fn settings_v2(limits: &PodLimits) -> Vec<Setting> {
    let max = |v: Option<u64>| v.map_or_else(|| "max".to_owned(), |v| v.to_string());
    vec![
        setting("cpu", "cpu.weight", cpu_weight(limits.cpu_shares)),
        setting(
            "cpu",
            "cpu.max",
            format!("{} {CPU_PERIOD_US}", max(limits.cpu_quota_us)),
        ),
        setting("memory", "memory.max", max(limits.memory_limit_bytes)),
        setting("pids", "pids.max", max(limits.pids_max)),
    ]
}

/// The files of the v1 hierarchies. The period comes first: a quota is judged against it.
pub fn settings_v1(limits: &PodLimits) -> Vec<Setting> {
    let or = |v: Option<u64>, none: &str| v.map_or_else(|| none.to_owned(), |v| v.to_string());
    vec![
        setting("cpu", "cpu.shares", limits.cpu_shares),
        setting("cpu", "cpu.cfs_period_us", CPU_PERIOD_US),
        setting("cpu", "cpu.cfs_quota_us", or(limits.cpu_quota_us, "-1")),
        setting(
            "memory",
            "memory.limit_in_bytes",
            or(limits.memory_limit_bytes, "-1"),
        ),
        setting("pids", "pids.max", or(limits.pids_max, "max")),
    ]
}

#[cfg(test)]
mod tests;
