//! What requests and limits mean for the kernel: pure, no file is touched here.
//!
//! ```text
//! Pod ─► requests.rs: amounts, class ─► [`Limits`] of the pod and of each container ─► settings.rs: one file each
//!                                        kubelet's formulas, [`Policy`] of the node
//! ```
//! Invariants, checked by `tests`:
//! * weight and shares are monotonic in the CPU request and stay in the kernel's range;
//! * min <= low or high <= max; burst <= quota;
//! * the pod's limits are never below those of any of its containers.
//!
//! Source: Kubernetes `pkg/kubelet/cm/helpers_linux.go` (shares, quota, pod config),
//! `pkg/kubelet/qos/policy.go` (oom score), KEP-2570 (memory QoS). Shares to weight:
//! opencontainers/cgroups v0.0.5, the same formula as libcontainer 0.7, so that pod and container
//! level agree.
//!
//! Memory protection is tiered: a Guaranteed pod's request is `memory.min` (never reclaimed), a
//! Burstable one's is `memory.low` (reclaimed last), so that many Burstable requests cannot drive
//! the node into an OOM. `memory.high` is off unless the node's policy has a throttling factor: a
//! container between high and max is slowed down rather than killed, which not everybody wants.

use std::collections::BTreeMap;

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod};

pub use super::requests::{
    Amounts, QosClass, container_hugepages, pod_hugepages, pod_requests, qos_class,
};
use super::requests::{all_containers, limits_of, pod_sum, requests_of};

/// The length of a CPU bandwidth period, microseconds.
pub const CPU_PERIOD_US: u64 = 100_000;
/// The kernel refuses a shorter quota than this, microseconds.
const CPU_QUOTA_MIN_US: u64 = 1_000;
/// `cpu.shares` range of the kernel.
const SHARES_MIN: u64 = 2;
const SHARES_MAX: u64 = 262_144;
/// Processes and threads a pod may have unless configured: stops a fork bomb, far above real use.
pub const POD_PIDS_MAX: u64 = 4_096;
/// `memory.high` is a multiple of this.
const PAGE_BYTES: u64 = 4_096;
/// A pod with this annotation may save up unused CPU quota: percent of the quota, 0 to 100.
pub const CPU_BURST_ANNOTATION: &str = "gantry.dev/cpu-burst-percent";

/// What the operator has set for all pods of this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Processes and threads of one pod; none: no ceiling.
    pub pod_pids_max: Option<u64>,
    /// Where between request and limit a container is slowed down, percent; 0: never.
    pub memory_throttling_percent: u64,
    /// What all pods together may use, 0: no ceiling. Stands for the limit of a container that has
    /// none.
    pub memory_allocatable_bytes: u64,
    /// CPU of all pods together, thousandths; their weight against the system's processes.
    pub cpu_allocatable_millicores: u64,
    /// Processes and threads of all pods together; none: no ceiling.
    pub pids_allocatable: Option<u64>,
    /// Guaranteed containers with whole CPUs get them for themselves.
    pub exclusive_cpus: bool,
    /// CPUs that stay shared whatever is asked for.
    pub reserved_cpu_count: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            pod_pids_max: Some(POD_PIDS_MAX),
            memory_throttling_percent: 0,
            memory_allocatable_bytes: 0,
            cpu_allocatable_millicores: 0,
            pids_allocatable: None,
            exclusive_cpus: false,
            reserved_cpu_count: 1,
        }
    }
}

/// What a cgroup gets. The same type serves a pod and a container.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Relative CPU time, `cpu.shares` scale (2 ..= 262144).
    pub cpu_shares: u64,
    /// CPU time per [`CPU_PERIOD_US`], microseconds; none: no ceiling.
    pub cpu_quota_us: Option<u64>,
    /// Unused quota that may be saved up, microseconds; at most the quota.
    pub cpu_burst_us: u64,
    /// Bytes; none: no ceiling.
    pub memory_limit_bytes: Option<u64>,
    /// Bytes from which its processes are slowed down and reclaimed from; none: never.
    pub memory_high_bytes: Option<u64>,
    /// Bytes that are never reclaimed.
    pub memory_min_bytes: u64,
    /// Bytes that are reclaimed last.
    pub memory_low_bytes: u64,
    /// The OOM killer takes all processes of the cgroup or none.
    pub oom_group: bool,
    /// Tasks; none: no ceiling.
    pub pids_max: Option<u64>,
    /// Bytes of huge pages by page size; a size that is not named gets none.
    pub hugepages: BTreeMap<u64, u64>,
    /// CPUs of its own, where the node gives out such.
    pub exclusive_cpus: usize,
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

/// The burst that the pod's annotation asks for; the API has checked it.
fn cpu_burst_us(pod: &Pod, quota_us: Option<u64>) -> u64 {
    let annotations = pod.metadata.annotations.as_ref();
    let percent: u64 = annotations
        .and_then(|a| a.get(CPU_BURST_ANNOTATION)?.parse().ok())
        .unwrap_or(0);
    quota_us.unwrap_or(0).saturating_mul(percent.min(100)) / 100
}

/// `memory.high` of KEP-2570: the request, and the factor's share of what lies above it.
fn memory_high_bytes(requests: Amounts, limits: Amounts, policy: &Policy) -> Option<u64> {
    let top = limits
        .memory_bytes
        .or(Some(policy.memory_allocatable_bytes).filter(|b| *b > 0))?;
    let request = requests.memory_bytes.unwrap_or(0);
    let above = top
        .checked_sub(request)
        .filter(|above| *above > 0 && policy.memory_throttling_percent > 0)?;
    let share = above.saturating_mul(policy.memory_throttling_percent.min(100)) / 100;
    let high = (request + share) / PAGE_BYTES * PAGE_BYTES;
    (high > request).then_some(high)
}

/// The pod's cgroup: a ceiling only where every container has one (or the pod itself states it).
pub fn pod_limits(pod: &Pod, policy: &Policy) -> Limits {
    let class = qos_class(pod);
    let Some(spec) = pod.spec.as_ref() else {
        return limits_from(pod, class, Amounts::default(), Amounts::default());
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
    Limits {
        pids_max: policy.pod_pids_max,
        hugepages: pod_hugepages(pod),
        ..limits_from(pod, class, pod_sum(spec, requests_of), ceiling)
    }
}

/// One container's cgroup. Pids are limited at the pod's level only.
pub fn container_limits(pod: &Pod, container: &Container, policy: &Policy) -> Limits {
    let resources = container.resources.as_ref();
    let (requests, limits) = (requests_of(resources), limits_of(resources));
    let class = qos_class(pod);
    let high = memory_high_bytes(requests, limits, policy);
    Limits {
        memory_high_bytes: high.filter(|_| class != QosClass::Guaranteed),
        oom_group: true,
        exclusive_cpus: super::cpu_pinning::exclusive_count(pod, container),
        hugepages: container_hugepages(container),
        ..limits_from(pod, class, requests, limits)
    }
}

fn limits_from(pod: &Pod, class: QosClass, requests: Amounts, limits: Amounts) -> Limits {
    let request = requests.cpu_millicores.unwrap_or(0);
    let cpu_quota_us = limits.cpu_millicores.and_then(cpu_quota_us);
    let memory = requests.memory_bytes.unwrap_or(0);
    let protected = |wanted: bool| if wanted { memory } else { 0 };
    Limits {
        cpu_shares: cpu_shares(request),
        cpu_quota_us,
        cpu_burst_us: cpu_burst_us(pod, cpu_quota_us),
        memory_limit_bytes: limits.memory_bytes,
        memory_min_bytes: protected(class == QosClass::Guaranteed),
        memory_low_bytes: protected(class == QosClass::Burstable),
        cpu_request_millicores: request,
        ..Limits::default()
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

#[cfg(test)]
mod tests;
