//! Disruption budgets: how many of a set of pods may go now.
//!
//! ```text
//!  pods, their controllers, budgets ─► plan (pure): expected, desired, healthy ─► status.disruptionsAllowed
//!  an eviction counts down and notes the pod ──────► noted pods count as gone until they are, at most 2 min
//! ```
//! Written as a compare-and-set: an eviction in between makes it count again.
//!
//! Source: Kubernetes `pkg/controller/disruption`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::apps::v1::{ReplicaSet, StatefulSet};
use gantry_api::k8s_openapi::api::core::v1::{Pod, ReplicationController};
use gantry_api::k8s_openapi::api::policy::v1::{
    PodDisruptionBudget, PodDisruptionBudgetSpec, PodDisruptionBudgetStatus,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use gantry_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use gantry_api::k8s_openapi::jiff::{SignedDuration, Timestamp};
use gantry_api::status::Status;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{Cache, Delta, ObjectKey};
use super::queue::WorkQueue;
use super::{Caches, Context, Controller, EventType, event_about, pods};
use crate::server::covers;
use crate::server::registry::Resource;

/// An eviction that has not ended its pod by then has not happened.
const DISRUPTION_TIMEOUT: SignedDuration = SignedDuration::from_secs(120);
/// Whether something may go, as a condition.
const DISRUPTION_ALLOWED: &str = "DisruptionAllowed";

/// The number that a count or a percentage of `total` means, rounded up.
pub(super) fn scaled(value: &IntOrString, total: i64) -> i64 {
    match value {
        IntOrString::Int(number) => i64::from(*number),
        IntOrString::String(text) => {
            let percent = text.trim_end_matches('%').parse::<i64>().unwrap_or(0);
            (percent.saturating_mul(total).saturating_add(99)) / 100
        }
    }
}

/// What the pods' controllers want together.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Scale {
    wanted: i64,
}

/// What a budget is decided from.
struct Observed<'a> {
    budget: &'a PodDisruptionBudget,
    /// The pods that it covers.
    pods: &'a [Arc<Pod>],
    /// What their controllers want, or why that is not known.
    scale: Result<Scale, String>,
    now: Timestamp,
}

/// A budget's status, and when to look again without a change.
struct Plan {
    status: PodDisruptionBudgetStatus,
    again: Option<Duration>,
}

/// How many pods there should be, and how many of them healthy.
fn wanted(spec: &PodDisruptionBudgetSpec, observed: &Observed<'_>) -> Result<(i64, i64), String> {
    let scale = || observed.scale.clone().map(|scale| scale.wanted);
    if let Some(most) = &spec.max_unavailable {
        let expected = scale()?;
        let desired = (expected - scaled(most, expected)).max(0);
        return Ok((expected, desired));
    }
    match &spec.min_available {
        Some(IntOrString::Int(least)) => {
            let expected = i64::try_from(observed.pods.len()).unwrap_or(i64::MAX);
            Ok((expected, i64::from(*least)))
        }
        Some(percent) => {
            let expected = scale()?;
            Ok((expected, scaled(percent, expected)))
        }
        None => Ok((0, 0)),
    }
}

/// Decides what one budget's status is.
fn plan(observed: &Observed<'_>) -> Plan {
    let budget = observed.budget;
    let old = budget.status.clone().unwrap_or_default();
    let spec = budget.spec.clone().unwrap_or_default();
    let there: BTreeMap<&str, &Arc<Pod>> = observed
        .pods
        .iter()
        .filter_map(|pod| Some((pod.metadata.name.as_deref()?, pod)))
        .collect();
    // Evictions on their way: their pods are there and do not know it yet.
    let mut disrupted = old.disrupted_pods.clone().unwrap_or_default();
    disrupted.retain(|name, since| {
        let is_on_its_way = there
            .get(name.as_str())
            .is_some_and(|pod| !pods::is_terminating(pod));
        is_on_its_way && observed.now.duration_since(since.0) < DISRUPTION_TIMEOUT
    });
    let again = disrupted.values().filter_map(|since| {
        let end = DISRUPTION_TIMEOUT - observed.now.duration_since(since.0);
        Duration::try_from(end).ok()
    });
    let again = again.min();
    let is_healthy = |pod: &&Arc<Pod>| {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        !pods::is_terminating(pod) && !disrupted.contains_key(name) && pods::is_ready(pod)
    };
    let healthy = observed.pods.iter().filter(is_healthy).count();
    let healthy = i64::try_from(healthy).unwrap_or(i64::MAX);
    let narrow = |n: i64| Some(i32::try_from(n).unwrap_or(i32::MAX));
    let (allowed, expected, desired, condition) = match wanted(&spec, observed) {
        Ok((expected, desired)) => {
            let room = if expected <= 0 {
                0
            } else {
                (healthy - desired).max(0)
            };
            let (value, reason) = match room {
                0 => ("False", "InsufficientPods"),
                _ => ("True", "SufficientPods"),
            };
            (room, expected, desired, (value, reason, String::new()))
        }
        // Nothing may go while it is not known how many there should be.
        Err(why) => (
            0,
            i64::from(old.expected_pods.unwrap_or(0)),
            i64::from(old.desired_healthy.unwrap_or(0)),
            ("False", "SyncFailed", why),
        ),
    };
    let generation = budget.metadata.generation;
    let (value, reason, message) = condition;
    let status = PodDisruptionBudgetStatus {
        conditions: Some(with_condition(
            &old,
            (value, reason, message),
            generation,
            observed.now,
        )),
        current_healthy: narrow(healthy),
        desired_healthy: narrow(desired),
        disrupted_pods: Some(disrupted).filter(|d| !d.is_empty()),
        disruptions_allowed: narrow(allowed),
        expected_pods: narrow(expected),
        observed_generation: generation,
    };
    Plan { status, again }
}

fn with_condition(
    old: &PodDisruptionBudgetStatus,
    (value, reason, message): (&str, &str, String),
    observed_generation: Option<i64>,
    now: Timestamp,
) -> Vec<Condition> {
    let mut all = old.conditions.clone().unwrap_or_default();
    let known = all.iter().position(|c| c.type_ == DISRUPTION_ALLOWED);
    let since = known
        .map(|at| &all[at])
        .filter(|c| c.status == value)
        .map_or(Time(now), |c| c.last_transition_time.clone());
    let condition = Condition {
        type_: DISRUPTION_ALLOWED.to_owned(),
        status: value.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: since,
        observed_generation,
    };
    match known {
        Some(at) => all[at] = condition,
        None => all.push(condition),
    }
    all
}

/// Whether two statuses differ in more than the moment at which they were made.
fn differs(old: &PodDisruptionBudgetStatus, new: &PodDisruptionBudgetStatus) -> bool {
    let bare = |status: &PodDisruptionBudgetStatus| {
        let mut status = status.clone();
        status.disrupted_pods = status.disrupted_pods.filter(|d| !d.is_empty());
        status
    };
    bare(old) != bare(new)
}

struct Disruptions {
    context: Arc<Context>,
}

fn of<K: Resource>(cache: &Cache<K>, namespace: &str, name: &str, uid: &str) -> Option<Arc<K>> {
    let found = cache.get(&ObjectKey::new(namespace, name))?;
    let is_it = found.metadata().uid.as_deref() == Some(uid);
    is_it.then_some(found)
}

/// What the controllers of these pods want together, each counted once.
fn scale_of(caches: &Caches, pods: &[Arc<Pod>]) -> Result<Scale, String> {
    let mut seen = BTreeSet::new();
    let mut wanted = 0_i64;
    for pod in pods {
        let (namespace, name) = (
            pod.metadata.namespace.as_deref().unwrap_or_default(),
            pod.metadata.name.as_deref().unwrap_or_default(),
        );
        let Some(owner) = pods::controller_of(&pod.metadata) else {
            return Err(format!("found no controller ref for pod {name:?}"));
        };
        let lost = || format!("found no controllers for pod {name:?}");
        let (uid, replicas) = match owner.kind.as_str() {
            "ReplicaSet" => {
                let set = of(&caches.replica_sets, namespace, &owner.name, &owner.uid)
                    .ok_or_else(lost)?;
                of_replica_set(caches, &set)
            }
            "StatefulSet" => {
                let set: Arc<StatefulSet> =
                    of(&caches.stateful_sets, namespace, &owner.name, &owner.uid)
                        .ok_or_else(lost)?;
                let replicas = set.spec.as_ref().and_then(|s| s.replicas);
                (owner.uid.clone(), replicas)
            }
            "ReplicationController" => {
                let set: Arc<ReplicationController> = of(
                    &caches.replication_controllers,
                    namespace,
                    &owner.name,
                    &owner.uid,
                )
                .ok_or_else(lost)?;
                let replicas = set.spec.as_ref().and_then(|s| s.replicas);
                (owner.uid.clone(), replicas)
            }
            other => {
                return Err(format!(
                    "{} does not implement the scale subresource",
                    plural_of(other)
                ));
            }
        };
        if seen.insert(uid) {
            wanted += i64::from(replicas.unwrap_or(1));
        }
    }
    Ok(Scale { wanted })
}

fn plural_of(kind: &str) -> String {
    gantry_api::kinds::resolve(kind)
        .map_or_else(|| kind.to_lowercase(), |kind| kind.qualified_resource())
}

/// The Deployment of a ReplicaSet knows how many there should be; in a rollout the set does not.
fn of_replica_set(caches: &Caches, set: &ReplicaSet) -> (String, Option<i32>) {
    let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
    let owner = pods::controller_of(&set.metadata).filter(|owner| owner.kind == "Deployment");
    let deployment =
        owner.and_then(|owner| of(&caches.deployments, namespace, &owner.name, &owner.uid));
    match deployment {
        Some(deployment) => (
            deployment.metadata.uid.clone().unwrap_or_default(),
            deployment.spec.as_ref().and_then(|s| s.replicas),
        ),
        None => (
            set.metadata.uid.clone().unwrap_or_default(),
            set.spec.as_ref().and_then(|s| s.replicas),
        ),
    }
}

impl Controller for Disruptions {
    const NAME: &'static str = "disruption-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let caches = &self.context.caches;
        let Some(budget) = caches.budgets.get(key) else {
            return Ok(None);
        };
        let pods: Vec<Arc<Pod>> = caches
            .pods
            .in_namespace(&key.namespace)
            .into_iter()
            .filter(|pod| !pods::is_finished(pod) && covers(&budget, pod))
            .collect();
        let scale = scale_of(caches, &pods);
        let needs_scale = budget.spec.as_ref().is_some_and(|spec| {
            spec.max_unavailable.is_some()
                || matches!(spec.min_available, Some(IntOrString::String(_)))
        });
        if let (true, Err(why)) = (needs_scale, &scale) {
            let message = format!("Failed to calculate the number of expected pods: {why}");
            let event = event_about(
                &*budget,
                Self::NAME,
                EventType::Warning,
                "CalculateExpectedPodCountFailed",
                message,
            );
            self.context.registry.event(event).await;
        }
        let plan = plan(&Observed {
            budget: &budget,
            pods: &pods,
            scale,
            now: Timestamp::now(),
        });
        if differs(&budget.status.clone().unwrap_or_default(), &plan.status) {
            let mut new = PodDisruptionBudget::clone(&budget);
            new.status = Some(plan.status);
            self.context.registry.update_status(&new).await?;
        }
        Ok(plan.again)
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let own = queue.clone();
    let caches = &context.caches;
    caches
        .budgets
        .on_change(move |delta: &Delta<PodDisruptionBudget>| {
            own.add(ObjectKey::of(&delta.object().metadata));
        });
    let (budgets, of_pods) = (Arc::clone(&caches.budgets), queue.clone());
    caches.pods.on_change(move |delta: &Delta<Pod>| {
        let namespace = delta.object().metadata.namespace.clone();
        for budget in budgets.in_namespace(&namespace.unwrap_or_default()) {
            if delta.states().any(|pod| covers(&budget, pod)) {
                of_pods.add(ObjectKey::of(&budget.metadata));
            }
        }
    });
    on_scale(&caches.deployments, &caches.budgets, &queue);
    on_scale(&caches.replica_sets, &caches.budgets, &queue);
    on_scale(&caches.stateful_sets, &caches.budgets, &queue);
    on_scale(&caches.replication_controllers, &caches.budgets, &queue);
    let controller = Disruptions {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, 1, context, tasks, shutdown);
}

/// A workload that changes may want another number of pods.
fn on_scale<K: Resource>(
    workloads: &Cache<K>,
    budgets: &Arc<Cache<PodDisruptionBudget>>,
    queue: &WorkQueue<ObjectKey>,
) {
    let (budgets, queue) = (Arc::clone(budgets), queue.clone());
    workloads.on_change(move |delta: &Delta<K>| {
        let namespace = delta.object().metadata().namespace.clone();
        for budget in budgets.in_namespace(&namespace.unwrap_or_default()) {
            queue.add(ObjectKey::of(&budget.metadata));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn now() -> Timestamp {
        "2026-01-01T00:10:00Z".parse().unwrap()
    }

    fn pod(name: &str, ready: bool) -> Arc<Pod> {
        let ready = if ready { "True" } else { "False" };
        let pod = json!({"metadata": {"name": name},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]}});
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn status(
        spec: Value,
        pods: &[Arc<Pod>],
        scale: Result<i64, &str>,
    ) -> PodDisruptionBudgetStatus {
        let budget = json!({"metadata": {"name": "b", "generation": 3}, "spec": spec});
        let budget = serde_json::from_value(budget).unwrap();
        let scale = scale.map(|wanted| Scale { wanted }).map_err(str::to_owned);
        let (now, budget) = (now(), &budget);
        plan(&Observed {
            budget,
            pods,
            scale,
            now,
        })
        .status
    }

    fn numbers(status: &PodDisruptionBudgetStatus) -> (i32, i32, i32, i32) {
        (
            status.disruptions_allowed.unwrap(),
            status.expected_pods.unwrap(),
            status.desired_healthy.unwrap(),
            status.current_healthy.unwrap(),
        )
    }

    #[test]
    fn counts_and_percentages_are_kubernetes() {
        let pods: Vec<_> = (0..4).map(|i| pod(&format!("p{i}"), i < 3)).collect();
        for (spec, expected) in [
            (json!({"minAvailable": 2}), (1, 4, 2, 3)),
            (json!({"minAvailable": 9}), (0, 4, 9, 3)),
            (json!({"minAvailable": "50%"}), (0, 5, 3, 3)),
            (json!({"maxUnavailable": 3}), (1, 5, 2, 3)),
            (json!({"maxUnavailable": "30%"}), (0, 5, 3, 3)),
            (json!({"maxUnavailable": "100%"}), (3, 5, 0, 3)),
        ] {
            assert_eq!(
                numbers(&status(spec.clone(), &pods, Ok(5))),
                expected,
                "{spec}"
            );
        }
        let lost = status(
            json!({"maxUnavailable": 1}),
            &pods,
            Err("found no controller ref"),
        );
        assert_eq!(lost.disruptions_allowed, Some(0));
        let condition = &lost.conditions.unwrap()[0];
        assert_eq!(
            (condition.reason.as_str(), condition.message.as_str()),
            ("SyncFailed", "found no controller ref")
        );
        // A plain count needs no controller.
        let alone = status(json!({"minAvailable": 1}), &pods, Err("none"));
        assert_eq!(alone.disruptions_allowed, Some(2));
    }

    #[test]
    fn an_eviction_on_its_way_counts_until_it_is_too_late() {
        let pods = [pod("a", true), pod("b", true), pod("c", true)];
        let at = |disrupted: Value| {
            let budget: PodDisruptionBudget = serde_json::from_value(json!({
                "metadata": {"name": "b"}, "spec": {"minAvailable": 1},
                "status": {"disruptedPods": disrupted, "currentHealthy": 0, "desiredHealthy": 0,
                    "disruptionsAllowed": 0, "expectedPods": 0}}))
            .unwrap();
            let scale = Ok(Scale { wanted: 3 });
            plan(&Observed {
                budget: &budget,
                pods: &pods,
                scale,
                now: now(),
            })
        };
        let fresh = at(json!({"a": "2026-01-01T00:09:00Z", "gone": "2026-01-01T00:09:50Z"}));
        assert_eq!(numbers(&fresh.status), (1, 3, 1, 2));
        assert_eq!(fresh.status.disrupted_pods.unwrap().len(), 1);
        assert_eq!(fresh.again, Some(Duration::from_secs(60)));
        let late = at(json!({"a": "2026-01-01T00:07:00Z"}));
        assert_eq!(numbers(&late.status), (2, 3, 1, 3));
        assert_eq!(late.again, None);
    }

    proptest! {
        /// What is allowed to go leaves as many healthy as wanted.
        #[test]
        fn what_may_go_leaves_enough(
            ready in proptest::collection::vec(any::<bool>(), 0..12), wanted in 0..14_i64,
            least in 0..12_i32, percent in 0..101_i32, by in 0..3_u8,
        ) {
            let pods: Vec<_> = ready.iter().enumerate().map(|(i, r)| pod(&format!("p{i}"), *r)).collect();
            let spec = match by {
                0 => json!({"minAvailable": least}),
                1 => json!({"minAvailable": format!("{percent}%")}),
                _ => json!({"maxUnavailable": format!("{percent}%")}),
            };
            let status = status(spec, &pods, Ok(wanted));
            let healthy = ready.iter().filter(|r| **r).count();
            let (allowed, _, desired, current) = numbers(&status);
            prop_assert_eq!(usize::try_from(current).unwrap(), healthy);
            prop_assert!(allowed >= 0);
            if allowed > 0 {
                prop_assert_eq!(current - allowed, desired);
            }
        }
    }
}
