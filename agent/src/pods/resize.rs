//! In-place resize: whether a pod's new requests and limits fit this node, and what that means for
//! each of its containers. Pure.
//!
//! ```text
//!  spec ≠ allocated ─► fits allocatable? ─ never ─► Infeasible ─┐   the pod goes on with what it has:
//!                              │ └─ not now ─► Deferred ────────┴─► condition PodResizePending
//!                              └─ yes ─► allocated := spec ─► cgroup files, or a restart where
//!                                        resizePolicy says so ─► condition PodResizeInProgress until done
//! ```
//! *Allocated* is what the node has granted, and the only thing that the rest of the agent sees: the
//! pod of the worker's state carries it instead of the spec's. A restarted agent finds it in the
//! pod's status (`containerStatuses[].allocatedResources` and `.resources`).
//!
//! Source: Kubernetes `pkg/kubelet/allocation` and KEP-1287.

use std::collections::BTreeMap;
use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod, PodStatus, ResourceRequirements};
use gantry_api::k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::cgroups::limits::pod_requests;
use crate::cgroups::requests::Amounts;

/// What can be resized.
const RESIZABLE: [&str; 2] = ["cpu", "memory"];

/// Requests and limits by container.
pub type Allocated = BTreeMap<String, ResourceRequirements>;

/// What stands in the way of a resize.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pending {
    /// The node is too small for it, whatever else runs.
    Infeasible(String),
    /// It fits when others have gone.
    Deferred(String),
}

/// How a resize stands, for the pod's conditions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Not granted.
    Pending(Pending),
    /// Granted, and not yet what the kernel holds; the error of the last try.
    InProgress(Option<String>),
}

/// A container whose resources change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// Its name.
    pub container: String,
    /// `resizePolicy` asks for a restart on this change.
    pub restart: bool,
}

/// What the node gives to pods, and what other pods have of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Room {
    /// The node's allocatable.
    pub allocatable: Amounts,
    /// Requests of all other pods here.
    pub taken: Amounts,
}

/// The decision on a newest pod.
#[derive(Clone, PartialEq, Debug)]
pub struct Decision {
    /// The pod with what it is granted; the newest itself where it is granted all.
    pub pod: Arc<Pod>,
    /// Why it is not what its spec asks for.
    pub pending: Option<Pending>,
    /// What the grant changes.
    pub changes: Vec<Change>,
}

fn containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    let spec = pod.spec.iter();
    spec.flat_map(|s| s.init_containers.iter().flatten().chain(&s.containers))
}

/// What a pod's containers have: after an agent restart from their status, else from the spec.
pub fn allocated(pod: &Pod, status: &PodStatus) -> Allocated {
    let statuses = status
        .init_container_statuses
        .iter()
        .flatten()
        .chain(status.container_statuses.iter().flatten());
    let granted: BTreeMap<&str, ResourceRequirements> = statuses
        .filter_map(|s| Some((s.name.as_str(), s.resources.clone()?)))
        .collect();
    containers(pod)
        .map(|c| {
            let spec = c.resources.clone().unwrap_or_default();
            let own = granted.get(c.name.as_str()).cloned();
            (c.name.clone(), own.unwrap_or(spec))
        })
        .collect()
}

/// Decides what the pod is granted. `room` is asked only when the pod grows: it looks at all pods.
pub fn decide(newest: &Arc<Pod>, allocated: &Allocated, room: impl FnOnce() -> Room) -> Decision {
    let changes: Vec<Change> = containers(newest)
        .filter_map(|c| change(c, allocated.get(&c.name)?))
        .collect();
    if changes.is_empty() {
        return Decision {
            pod: Arc::clone(newest),
            pending: None,
            changes,
        };
    }
    let held = with(newest, allocated);
    // A smaller pod always fits: a node that is too full anyway gets room by it.
    let pending = match grows(&pod_requests(&held), &pod_requests(newest)) {
        true => obstacle(&pod_requests(newest), &room()),
        false => None,
    };
    match pending {
        Some(pending) => Decision {
            pod: held,
            pending: Some(pending),
            changes: Vec::new(),
        },
        None => Decision {
            pod: Arc::clone(newest),
            pending: None,
            changes,
        },
    }
}

/// The pod as its spec has it, with what it holds for resources: the same object where that is what
/// its spec asks for.
pub fn with(newest: &Arc<Pod>, allocated: &Allocated) -> Arc<Pod> {
    let none = ResourceRequirements::default();
    let holds = |container: &Container| {
        let held = allocated.get(&container.name);
        held.is_none_or(|held| container.resources.as_ref().unwrap_or(&none) == held)
    };
    if containers(newest).all(holds) {
        return Arc::clone(newest);
    }
    let mut pod = Pod::clone(newest);
    if let Some(spec) = &mut pod.spec {
        let init = spec.init_containers.iter_mut().flatten();
        for container in init.chain(&mut spec.containers) {
            if let Some(held) = allocated.get(&container.name) {
                container.resources = Some(held.clone());
            }
        }
    }
    Arc::new(pod)
}

type List = Option<BTreeMap<String, Quantity>>;

/// Amounts in thousandths, so that `1` and `1000m` are the same.
fn milli(list: &List, name: &str) -> Option<i64> {
    let text = &list.as_ref()?.get(name)?.0;
    let quantity = gantry_api::quantity::Quantity::parse(text).ok()?;
    Some(match name {
        "cpu" => quantity.milli(),
        _ => quantity.units(),
    })
}

fn differs(a: &ResourceRequirements, b: &ResourceRequirements, name: &str) -> bool {
    milli(&a.requests, name) != milli(&b.requests, name)
        || milli(&a.limits, name) != milli(&b.limits, name)
}

fn change(container: &Container, held: &ResourceRequirements) -> Option<Change> {
    let wanted = container.resources.clone().unwrap_or_default();
    let changed: Vec<&str> = RESIZABLE
        .into_iter()
        .filter(|name| differs(&wanted, held, name))
        .collect();
    let policies = container.resize_policy.iter().flatten();
    let restart = policies
        .filter(|p| p.restart_policy == "RestartContainer")
        .any(|p| changed.contains(&p.resource_name.as_str()));
    (!changed.is_empty()).then(|| Change {
        container: container.name.clone(),
        restart,
    })
}

fn grows(held: &Amounts, wanted: &Amounts) -> bool {
    wanted.cpu_millicores.unwrap_or(0) > held.cpu_millicores.unwrap_or(0)
        || wanted.memory_bytes.unwrap_or(0) > held.memory_bytes.unwrap_or(0)
}

fn obstacle(wanted: &Amounts, room: &Room) -> Option<Pending> {
    let figures = [
        (
            "cpu",
            wanted.cpu_millicores,
            room.allocatable.cpu_millicores,
            room.taken.cpu_millicores,
        ),
        (
            "memory",
            wanted.memory_bytes,
            room.allocatable.memory_bytes,
            room.taken.memory_bytes,
        ),
    ];
    let mut deferred = None;
    for (name, wanted, has, taken) in figures {
        let (wanted, taken) = (wanted.unwrap_or(0), taken.unwrap_or(0));
        let Some(has) = has else {
            continue; // not limited here
        };
        let show = |amount: u64| match name {
            "cpu" => format!("{amount}m"),
            _ => crate::pressure::victim::bytes_text(amount),
        };
        if wanted > has {
            return Some(Pending::Infeasible(format!(
                "Node didn't have enough capacity: {name}, requested: {}, capacity: {}",
                show(wanted),
                show(has)
            )));
        }
        if wanted > has.saturating_sub(taken) {
            deferred = Some(Pending::Deferred(format!(
                "Node didn't have enough resource: {name}, requested: {}, used: {}, capacity: {}",
                show(wanted),
                show(taken),
                show(has)
            )));
        }
    }
    deferred
}

/// Requests of all pods of the view but one, together.
pub fn taken<'a>(others: impl Iterator<Item = &'a Pod>) -> Amounts {
    let mut sum = Amounts::default();
    for requests in others.map(pod_requests) {
        let add =
            |a: Option<u64>, b: Option<u64>| Some(a.unwrap_or(0).saturating_add(b.unwrap_or(0)));
        sum.cpu_millicores = add(sum.cpu_millicores, requests.cpu_millicores);
        sum.memory_bytes = add(sum.memory_bytes, requests.memory_bytes);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn pod(cpu: u64, memory_mi: u64, policy: Value) -> Arc<Pod> {
        let amounts = json!({"cpu": format!("{cpu}m"), "memory": format!("{memory_mi}Mi")});
        let pod = serde_json::from_value(json!({"spec": {"containers": [{
            "name": "main",
            "resources": {"requests": amounts, "limits": amounts},
            "resizePolicy": policy,
        }]}}));
        Arc::new(pod.unwrap())
    }

    fn held(pod: &Pod) -> Allocated {
        allocated(pod, &PodStatus::default())
    }

    fn room(cpu: u64, taken: u64) -> Room {
        Room {
            allocatable: Amounts {
                cpu_millicores: Some(cpu),
                memory_bytes: Some(1 << 30),
            },
            taken: Amounts {
                cpu_millicores: Some(taken),
                memory_bytes: None,
            },
        }
    }

    #[test]
    fn a_resize_is_granted_deferred_or_infeasible() {
        let before = held(&pod(100, 64, json!([])));
        let newest = pod(500, 64, json!([]));
        let granted = decide(&newest, &before, || room(1000, 400));
        assert_eq!((granted.pod == newest, granted.pending), (true, None));
        assert_eq!(granted.changes.len(), 1);
        let deferred = decide(&newest, &before, || room(1000, 600));
        assert!(
            matches!(&deferred.pending, Some(Pending::Deferred(w)) if w.contains("used: 600m"))
        );
        assert_eq!(deferred.pod, pod(100, 64, json!([])));
        assert!(Arc::ptr_eq(&with(&newest, &held(&newest)), &newest));
        let infeasible = decide(&newest, &before, || room(400, 0));
        assert!(matches!(infeasible.pending, Some(Pending::Infeasible(_))));
        // Less is always possible, also on a node that is too full.
        let smaller = decide(&pod(50, 64, json!([])), &before, || room(10, 1000));
        assert_eq!((smaller.pending, smaller.changes.len()), (None, 1));
    }

    #[test]
    fn only_the_resource_that_changes_can_ask_for_a_restart() {
        let policy = json!([
            {"resourceName": "cpu", "restartPolicy": "NotRequired"},
            {"resourceName": "memory", "restartPolicy": "RestartContainer"},
        ]);
        let before = held(&pod(100, 64, policy.clone()));
        let restart = |cpu, memory| {
            let newest = pod(cpu, memory, policy.clone());
            decide(&newest, &before, || room(4000, 0)).changes[0].restart
        };
        assert!(!restart(200, 64));
        assert!(restart(100, 128));
    }

    #[test]
    fn another_spelling_is_no_change_and_a_status_is_believed() {
        let before = held(&pod(1000, 64, json!([])));
        let mut same = pod(1000, 64, json!([]));
        let list: ResourceRequirements = serde_json::from_value(
            json!({"requests": {"cpu": "1", "memory": "65536Ki"}, "limits": {"cpu": "1", "memory": "64Mi"}}),
        )
        .unwrap();
        let spec = Arc::make_mut(&mut same).spec.as_mut().unwrap();
        spec.containers[0].resources = Some(list.clone());
        let decision = decide(&same, &before, Room::default);
        assert!(decision.changes.is_empty() && Arc::ptr_eq(&decision.pod, &same));
        let status: PodStatus = serde_json::from_value(json!({"containerStatuses": [{
            "name": "main", "image": "", "imageID": "", "ready": true, "restartCount": 0,
            "resources": {"requests": {"cpu": "1", "memory": "65536Ki"},
                          "limits": {"cpu": "1", "memory": "64Mi"}}}]}))
        .unwrap();
        assert_eq!(allocated(&pod(5, 5, json!([])), &status)["main"], list);
    }

    proptest! {
        #[test]
        fn what_is_granted_fits_or_is_less_than_before(
            from in (1u64..2000, 1u64..512), to in (1u64..2000, 1u64..512),
            cpu in 0u64..2000, taken in 0u64..2000,
        ) {
            let before = pod(from.0, from.1, json!([]));
            let newest = pod(to.0, to.1, json!([]));
            let decision = decide(&newest, &held(&before), || room(cpu, taken));
            let granted = pod_requests(&decision.pod).cpu_millicores.unwrap();
            prop_assert_eq!(decision.pending.is_some(), decision.pod != newest);
            if decision.pending.is_none() && (to.0 > from.0 || to.1 > from.1) {
                prop_assert!(granted <= cpu.saturating_sub(taken));
            }
            if decision.pending.is_some() {
                prop_assert_eq!(granted, from.0);
                prop_assert!(decision.changes.is_empty());
            }
            // Granting is final: decided again, nothing changes.
            let again = decide(&decision.pod, &held(&decision.pod), || room(cpu, taken));
            prop_assert!(again.changes.is_empty() && again.pending.is_none());
        }
    }
}
