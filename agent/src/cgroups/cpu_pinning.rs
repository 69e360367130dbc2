//! Exclusive CPUs for Guaranteed containers that ask for whole ones. Pure.
//!
//! ```text
//! online CPUs, in the order of cores ─┬─ reserved ones ───────────────┐
//!                                     ├─ free ones ───────────────────┴─► shared: everybody else
//!                                     └─ exclusive, per container: kept while it fits, else the first free
//! ```
//! Nothing is written down: what is held is read from the cpusets of what runs.
//!
//! Invariants, checked by `tests`: no CPU is exclusive to two containers or exclusive and shared;
//! the shared set is never empty; a container that runs never moves; who gets nothing is named.
//!
//! Source: the kubelet's static CPU manager policy (`pkg/kubelet/cm/cpumanager/policy_static.go`).

use std::collections::{BTreeMap, BTreeSet};

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod};

use super::requests::{QosClass, limits_of, qos_class};
use crate::ids::PodUid;

/// Numbers of CPUs.
pub type CpuSet = BTreeSet<u32>;

/// A container of a pod.
pub type ContainerKey = (PodUid, String);

/// More than any machine has; a list that names more is not read.
const CPU_MAX: u32 = 8_192;

/// The kernel's list format: `0-3,8`. None when it is not one.
pub fn parse(list: &str) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last >= CPU_MAX {
            return None;
        }
        set.extend(first..=last);
    }
    Some(set)
}

/// As the kernel takes it: `0-3,8`.
pub fn show(set: &CpuSet) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for cpu in set {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *cpu => *last = *cpu,
            _ => parts.push((*cpu, *cpu)),
        }
    }
    let text = |(first, last): &(u32, u32)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    parts.iter().map(text).collect::<Vec<_>>().join(",")
}

/// How many CPUs of its own a container gets; 0 for most.
pub fn exclusive_count(pod: &Pod, container: &Container) -> usize {
    let spec = pod.spec.as_ref();
    let runs_to_its_end = spec.is_some_and(|s| {
        let init = s.init_containers.iter().flatten();
        let sidecar = container.restart_policy.as_deref() == Some("Always");
        !sidecar && init.into_iter().any(|c| c.name == container.name)
    });
    if runs_to_its_end || qos_class(pod) != QosClass::Guaranteed {
        return 0;
    }
    match limits_of(container.resources.as_ref()).cpu_millicores {
        Some(millicores) if millicores % 1000 == 0 => {
            usize::try_from(millicores / 1000).unwrap_or(usize::MAX)
        }
        _ => 0,
    }
}

/// What is given to whom.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Assignment {
    /// Exclusive CPUs.
    pub exclusive: BTreeMap<ContainerKey, CpuSet>,
    /// For everybody else.
    pub shared: CpuSet,
    /// Those for which there were not enough.
    pub refused: BTreeSet<ContainerKey>,
}

/// Gives out CPUs.
///
/// * `order` – all online CPUs, siblings of one core beside each other.
/// * `reserved_count` – so many of the first stay shared; at least one does.
/// * `wanted` – how many each container gets.
/// * `held` – what containers that run have.
pub fn assign(
    order: &[u32],
    reserved_count: usize,
    wanted: &BTreeMap<ContainerKey, usize>,
    held: &BTreeMap<ContainerKey, CpuSet>,
) -> Assignment {
    let mut free: Vec<u32> = order.iter().copied().skip(reserved_count.max(1)).collect();
    let mut assignment = Assignment::default();
    for (key, count) in wanted {
        let Some(set) = held.get(key).filter(|set| set.len() == *count) else {
            continue;
        };
        if *count > 0 && set.iter().all(|cpu| free.contains(cpu)) {
            free.retain(|cpu| !set.contains(cpu));
            assignment.exclusive.insert(key.clone(), set.clone());
        }
    }
    for (key, count) in wanted {
        if *count == 0 || assignment.exclusive.contains_key(key) {
            continue;
        }
        if *count > free.len() {
            assignment.refused.insert(key.clone());
            continue;
        }
        let set = free.drain(..*count).collect();
        assignment.exclusive.insert(key.clone(), set);
    }
    let taken: CpuSet = assignment.exclusive.values().flatten().copied().collect();
    assignment.shared = order
        .iter()
        .copied()
        .filter(|c| !taken.contains(c))
        .collect();
    assignment
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn lists_are_the_kernels() {
        for text in ["0", "0-3", "0-3,8", "1,3,5-7"] {
            assert_eq!(show(&parse(text).unwrap()), text);
        }
        assert_eq!(parse("\n"), Some(CpuSet::new()));
        assert_eq!((parse("a"), parse("0-99999999")), (None, None));
    }

    #[test]
    fn only_whole_cpus_of_guaranteed_pods_are_exclusive() {
        let count = |resources: Value| {
            let pod: Pod = serde_json::from_value(
                json!({"spec": {"containers": [{"name": "a", "resources": resources}]}}),
            )
            .unwrap();
            let container = pod.spec.as_ref().unwrap().containers[0].clone();
            exclusive_count(&pod, &container)
        };
        assert_eq!(count(json!({"limits": {"cpu": "2", "memory": "1Gi"}})), 2);
        assert_eq!(
            count(json!({"limits": {"cpu": "2000m", "memory": "1Gi"}})),
            2
        );
        assert_eq!(
            count(json!({"limits": {"cpu": "1500m", "memory": "1Gi"}})),
            0
        );
        assert_eq!(count(json!({"limits": {"cpu": "2"}})), 0);
        assert_eq!(count(json!({})), 0);
    }

    fn key(id: u8) -> ContainerKey {
        (PodUid::new(&format!("p{id}")).unwrap(), "c".into())
    }

    proptest! {
        #[test]
        fn cpus_are_given_once_and_what_runs_stays(
            cpu_count in 1u32..24, reserved in 0usize..4,
            steps in prop::collection::vec((0u8..8, 0usize..6), 1..30),
        ) {
            let order: Vec<u32> = (0..cpu_count).collect();
            let mut wanted: BTreeMap<ContainerKey, usize> = BTreeMap::new();
            let mut before = Assignment::default();
            for (id, count) in steps {
                // A container comes, or goes.
                if wanted.remove(&key(id)).is_none() {
                    wanted.insert(key(id), count);
                }
                let now = assign(&order, reserved, &wanted, &before.exclusive);
                let mut seen = CpuSet::new();
                for (key, set) in &now.exclusive {
                    prop_assert_eq!(set.len(), wanted[key]);
                    for cpu in set {
                        prop_assert!(seen.insert(*cpu), "twice: {}", cpu);
                        prop_assert!(!now.shared.contains(cpu));
                    }
                    if let Some(old) = before.exclusive.get(key) {
                        prop_assert_eq!(old, set, "a running container has moved");
                    }
                }
                prop_assert!(!now.shared.is_empty());
                prop_assert_eq!(now.shared.len() + seen.len(), order.len());
                for refused in &now.refused {
                    let room = order.len().saturating_sub(reserved.max(1)).saturating_sub(seen.len());
                    prop_assert!(wanted[refused] > room);
                }
                // Derived again from what runs, it is the same.
                let again = assign(&order, reserved, &wanted, &now.exclusive);
                prop_assert_eq!(&again, &now);
                before = now;
            }
        }
    }
}
