//! DaemonSets: one pod on every node that suits.
//!
//! ```text
//!  nodes × template ─► should one run there? ─► missing: create, bound to the node by affinity
//!                                               surplus, failed, on the wrong node: delete
//!  pods of an old template ─► within maxUnavailable: delete;  within maxSurge: a new one beside it
//! ```
//! The scheduler places the pods as any others; the affinity leaves it one node. They tolerate what
//! makes a node unfit for ordinary pods (not ready, cordoned, under pressure).
//!
//! Source: Kubernetes `pkg/controller/daemon` (daemon_controller.go, update.go).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetSpec, DaemonSetStatus};
use gantry_api::k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Toleration,
};
use gantry_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::status::Status;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{Delta, ObjectKey};
use super::replicaset::count;
use super::revision::{self, HASH_LABEL};
use super::{Context, Controller, WORKER_COUNT, owned, pods};
use crate::scheduler::{Suits, suits};

/// A failed pod is replaced at the earliest this long after its creation: a pod that the node refuses
/// at once must not be made in a loop.
const FAILED_AGE_MIN_S: i64 = 10;
/// Pods created in one pass.
const CREATE_COUNT_MAX: usize = 250;

/// What the plan is made from.
struct Observed<'a> {
    spec: &'a DaemonSetSpec,
    leaving: bool,
    /// Every node, and whether pods of this set may start and stay there.
    nodes: &'a BTreeMap<String, Suits>,
    pods: &'a [Arc<Pod>],
    /// The hash of the template as it is.
    hash: &'a str,
    now: Timestamp,
}

/// What to do about one DaemonSet.
#[derive(Debug, Default, PartialEq)]
struct Plan {
    /// Nodes to create a pod for.
    create: Vec<String>,
    /// Uids of pods to delete.
    delete: Vec<String>,
    again: Option<Duration>,
    status: DaemonSetStatus,
}

fn uid(pod: &Pod) -> String {
    pod.metadata.uid.clone().unwrap_or_default()
}

/// The node that a pod is bound to, or that its affinity leaves it.
fn target(pod: &Pod) -> Option<&str> {
    if let Some(node) = pods::node(pod) {
        return Some(node);
    }
    let affinity = pod
        .spec
        .as_ref()?
        .affinity
        .as_ref()?
        .node_affinity
        .as_ref()?;
    let required = affinity
        .required_during_scheduling_ignored_during_execution
        .as_ref()?;
    let fields = required
        .node_selector_terms
        .first()?
        .match_fields
        .as_ref()?;
    let name = fields.iter().find(|field| field.key == "metadata.name")?;
    name.values.as_ref()?.first().map(String::as_str)
}

/// A number of pods, or a percentage of `total` rounded up.
fn scaled(value: Option<&IntOrString>, total: usize, default: usize) -> usize {
    let number = value.map(|value| owned::pod_count(value, count(total), true));
    number.map_or(default, |number| usize::try_from(number).unwrap_or(0))
}

/// Decides what one DaemonSet needs.
fn plan(observed: &Observed<'_>) -> Plan {
    let mut plan = Plan::default();
    let mut by_node: BTreeMap<&str, Vec<&Arc<Pod>>> = BTreeMap::new();
    for pod in observed.pods {
        // Pods of nodes that are gone are the pod collector's.
        if let Some(node) = target(pod) {
            by_node.entry(node).or_default().push(pod);
        }
    }
    if !observed.leaving {
        for (node, suits) in observed.nodes {
            let here = by_node
                .get(node.as_str())
                .map(Vec::as_slice)
                .unwrap_or_default();
            plan_node(observed, node, *suits, here, &mut plan);
        }
        plan.create.truncate(CREATE_COUNT_MAX);
        let strategy = observed.spec.update_strategy.as_ref();
        if strategy.and_then(|s| s.type_.as_deref()) != Some("OnDelete") {
            plan_update(observed, &by_node, &mut plan);
        }
    }
    plan.status = status_of(observed, &by_node, &mut plan.again);
    plan
}

fn plan_node(
    observed: &Observed<'_>,
    node: &str,
    suits: Suits,
    here: &[&Arc<Pod>],
    plan: &mut Plan,
) {
    let mut alive: Vec<&Arc<Pod>> = Vec::new();
    let mut waits = false;
    for pod in here {
        if pods::is_terminating(pod) {
            // Its successor comes when it is gone: two at once would fight for ports and paths.
            waits = true;
        } else if pods::is_finished(pod) {
            let created = pod.metadata.creation_timestamp.as_ref();
            let age_s = created.map_or(i64::MAX, |t| observed.now.duration_since(t.0).as_secs());
            waits = true;
            if age_s >= FAILED_AGE_MIN_S {
                plan.delete.push(uid(pod));
            } else {
                let left = u64::try_from(FAILED_AGE_MIN_S - age_s).unwrap_or(1);
                let left = Duration::from_secs(left);
                plan.again = Some(plan.again.map_or(left, |again| again.min(left)));
            }
        } else {
            alive.push(pod);
        }
    }
    if !suits.may_stay {
        plan.delete.extend(alive.iter().map(|pod| uid(pod)));
    } else if alive.is_empty() {
        if suits.may_start && !waits {
            plan.create.push(node.to_owned());
        }
    } else {
        // One of each template may live while the set surges; of several the best and oldest stays.
        let is_new = |pod: &&Arc<Pod>| revision::hash_of(pod) == observed.hash;
        for group in [true, false] {
            let mut same: Vec<_> = alive.iter().filter(|pod| is_new(pod) == group).collect();
            same.sort_by_key(|pod| {
                (
                    !pods::is_ready(pod),
                    pods::node(pod).is_none(),
                    pod.metadata.creation_timestamp.clone(),
                    uid(pod),
                )
            });
            plan.delete.extend(same.iter().skip(1).map(|pod| uid(pod)));
        }
    }
}

/// Replaces pods of old templates, as far as the strategy lets it.
fn plan_update(observed: &Observed<'_>, by_node: &BTreeMap<&str, Vec<&Arc<Pod>>>, plan: &mut Plan) {
    let wanted = observed
        .nodes
        .values()
        .filter(|suits| suits.may_start)
        .count();
    let strategy = observed.spec.update_strategy.as_ref();
    let rolling = strategy.and_then(|s| s.rolling_update.as_ref());
    let surge = scaled(rolling.and_then(|r| r.max_surge.as_ref()), wanted, 0);
    let unavailable = scaled(rolling.and_then(|r| r.max_unavailable.as_ref()), wanted, 1);
    let min_ready_s = observed.spec.min_ready_seconds.unwrap_or(0);
    let is_available = |pod: &Arc<Pod>| {
        let wait = pods::until_available(pod, min_ready_s, observed.now);
        wait.is_some_and(|wait| wait.is_zero())
    };
    let (mut without, mut surging) = (0, 0);
    let mut candidates: Vec<(&str, &Arc<Pod>)> = Vec::new();
    for (node, suits) in observed.nodes {
        if !suits.may_start {
            continue;
        }
        let here = by_node
            .get(node.as_str())
            .map(Vec::as_slice)
            .unwrap_or_default();
        let kept = |pod: &&&Arc<Pod>| pods::is_active(pod) && !plan.delete.contains(&uid(pod));
        let alive: Vec<_> = here.iter().filter(kept).collect();
        let new = alive
            .iter()
            .find(|pod| revision::hash_of(pod) == observed.hash);
        let old = alive
            .iter()
            .find(|pod| revision::hash_of(pod) != observed.hash);
        match (old, new) {
            (Some(old), Some(new)) if surge > 0 => {
                surging += 1;
                if is_available(new) || !is_available(old) {
                    plan.delete.push(uid(old));
                }
            }
            (Some(old), Some(new)) if is_available(new) => plan.delete.push(uid(old)),
            (Some(old), Some(_)) if !is_available(old) => {
                without += 1;
                plan.delete.push(uid(old));
            }
            // It still serves here, its successor does not yet.
            (Some(old), Some(_)) => candidates.push((node, old)),
            (Some(old), None) if !is_available(old) && surge == 0 => {
                // It serves nobody: replacing it costs nothing.
                without += 1;
                plan.delete.push(uid(old));
            }
            (Some(old), None) => candidates.push((node, old)),
            (None, Some(new)) if is_available(new) => {}
            (None, _) => without += 1,
        }
    }
    if surge > 0 {
        let room = surge.saturating_sub(surging);
        let more = candidates
            .iter()
            .take(room)
            .map(|(node, _)| (*node).to_owned());
        plan.create.extend(more);
    } else {
        let room = unavailable.saturating_sub(without);
        plan.delete
            .extend(candidates.iter().take(room).map(|(_, old)| uid(old)));
    }
}

fn status_of(
    observed: &Observed<'_>,
    by_node: &BTreeMap<&str, Vec<&Arc<Pod>>>,
    again: &mut Option<Duration>,
) -> DaemonSetStatus {
    let mut status = DaemonSetStatus::default();
    let (mut desired, mut current, mut misplaced) = (0_usize, 0_usize, 0_usize);
    let (mut ready, mut available, mut updated) = (0_usize, 0_usize, 0_usize);
    let min_ready_s = observed.spec.min_ready_seconds.unwrap_or(0);
    for (node, suits) in observed.nodes {
        let here = by_node
            .get(node.as_str())
            .map(Vec::as_slice)
            .unwrap_or_default();
        let alive: Vec<_> = here.iter().filter(|pod| pods::is_active(pod)).collect();
        if !suits.may_start {
            misplaced += usize::from(!alive.is_empty() && !suits.may_stay);
            continue;
        }
        desired += 1;
        current += usize::from(!alive.is_empty());
        ready += usize::from(alive.iter().any(|pod| pods::is_ready(pod)));
        updated += usize::from(alive.iter().any(|p| revision::hash_of(p) == observed.hash));
        let waits = alive
            .iter()
            .filter_map(|pod| pods::until_available(pod, min_ready_s, observed.now));
        match waits.min() {
            Some(wait) if wait.is_zero() => available += 1,
            Some(wait) => *again = Some(again.map_or(wait, |again| again.min(wait))),
            None => {}
        }
    }
    status.desired_number_scheduled = count(desired);
    status.current_number_scheduled = count(current);
    status.number_misscheduled = count(misplaced);
    status.number_ready = count(ready);
    status.updated_number_scheduled = Some(count(updated));
    status.number_available = Some(count(available)).filter(|n| *n > 0);
    status.number_unavailable = Some(count(desired - available)).filter(|n| *n > 0);
    status
}

/// What pods of the set put up with, beside what the template says.
fn tolerate(spec: &mut PodSpec) {
    let mut taints = vec![
        ("not-ready", "NoExecute"),
        ("unreachable", "NoExecute"),
        ("disk-pressure", "NoSchedule"),
        ("memory-pressure", "NoSchedule"),
        ("pid-pressure", "NoSchedule"),
        ("unschedulable", "NoSchedule"),
    ];
    if spec.host_network == Some(true) {
        taints.push(("network-unavailable", "NoSchedule"));
    }
    let own = spec.tolerations.get_or_insert_default();
    for (taint, effect) in taints {
        let toleration = Toleration {
            key: Some(format!("node.kubernetes.io/{taint}")),
            operator: Some("Exists".to_owned()),
            effect: Some(effect.to_owned()),
            ..Toleration::default()
        };
        if !own.contains(&toleration) {
            own.push(toleration);
        }
    }
}

/// A pod of the set as it would run on any node.
fn pod_of(set: &DaemonSet, spec: &DaemonSetSpec, hash: &str) -> Pod {
    let mut pod = owned::pod_of(set, &spec.template);
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(HASH_LABEL.to_owned(), hash.to_owned());
    tolerate(pod.spec.get_or_insert_default());
    pod
}

/// The same pod for one node.
fn pod_for(pod: &Pod, node: &str) -> Pod {
    let mut pod = pod.clone();
    let field = NodeSelectorRequirement {
        key: "metadata.name".to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    let affinity = pod
        .spec
        .get_or_insert_default()
        .affinity
        .get_or_insert_default();
    let required = &mut affinity
        .node_affinity
        .get_or_insert_default()
        .required_during_scheduling_ignored_during_execution;
    let own = required.take().map(|required| required.node_selector_terms);
    // The set's own terms decided already; each is narrowed to this node.
    let mut terms = own
        .filter(|terms| !terms.is_empty())
        .unwrap_or_else(|| vec![NodeSelectorTerm::default()]);
    for term in &mut terms {
        term.match_fields = Some(vec![field.clone()]);
    }
    *required = Some(NodeSelector {
        node_selector_terms: terms,
    });
    pod
}

struct DaemonSets {
    context: Arc<Context>,
}

impl Controller for DaemonSets {
    const NAME: &'static str = "daemonset-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let context = &self.context;
        let Some(set) = context.caches.daemon_sets.get(key) else {
            return Ok(None);
        };
        let Some(spec) = set.spec.clone() else {
            return Ok(None);
        };
        let pods = owned::claim(context, &*set, &spec.selector).await?;
        let leaving = set.metadata.deletion_timestamp.is_some();
        if leaving || context.is_leaving(&key.namespace) {
            return Ok(None);
        }
        let history = revision::record(context, &*set, &spec.template).await?;
        let model = pod_of(&set, &spec, &history.current);
        let nodes = context.caches.nodes.all();
        let judged = nodes.iter().map(|node| {
            let name = node.metadata.name.clone().unwrap_or_default();
            let suits = suits(node, &model);
            (name, suits)
        });
        let nodes: BTreeMap<String, Suits> = judged.collect();
        let observed = Observed {
            spec: &spec,
            leaving,
            nodes: &nodes,
            pods: &pods,
            hash: &history.current,
            now: Timestamp::now(),
        };
        let plan = plan(&observed);
        for pod in pods.iter().filter(|pod| plan.delete.contains(&uid(pod))) {
            owned::delete(context, &*set, pod, Self::NAME).await?;
        }
        for node in &plan.create {
            owned::create(context, &*set, &pod_for(&model, node), Self::NAME).await?;
        }
        let limit = spec.revision_history_limit;
        revision::truncate(context, &history, limit, pods.iter().map(|pod| &**pod)).await?;
        let mut status = plan.status;
        status.observed_generation = set.metadata.generation;
        if set.status.as_ref() != Some(&status) {
            let mut new = DaemonSet::clone(&set);
            new.status = Some(status);
            super::ignore_not_found(context.registry.update_status(&new).await)?;
        }
        Ok(plan.again)
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let caches = &context.caches;
    let queue = owned::queue(&caches.daemon_sets, &caches.pods);
    let (all, weak) = (queue.clone(), Arc::downgrade(context));
    caches.nodes.on_change(move |delta: &Delta<Node>| {
        // A heartbeat changes nothing about where pods may be.
        let facts = |node: &Node| {
            let spec = node.spec.as_ref();
            (
                node.metadata.labels.clone(),
                spec.map(|spec| (spec.taints.clone(), spec.unschedulable)),
                super::node_is_ready(node),
            )
        };
        let mut states = delta.states().map(|node| facts(node));
        let first = states.next();
        if matches!(delta, Delta::Applied { old: Some(_), .. }) && first == states.next() {
            return;
        }
        let Some(context) = weak.upgrade() else {
            return;
        };
        for set in context.caches.daemon_sets.all() {
            all.add(ObjectKey::of(&set.metadata));
        }
    });
    let controller = DaemonSets {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, WORKER_COUNT, context, tasks, shutdown);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn pod(number: usize, node: usize, hash: &str, ready: bool) -> Arc<Pod> {
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": format!("p{number}"), "uid": format!("u{number}"),
                    "labels": {HASH_LABEL: hash}},
                "spec": {"nodeName": format!("n{node}"), "containers": []},
                "status": {"phase": "Running", "conditions": [
                    {"type": "Ready", "status": if ready { "True" } else { "False" }}]},
            }))
            .unwrap(),
        )
    }

    fn spec(surge: i32, unavailable: i32) -> DaemonSetSpec {
        serde_json::from_value(json!({
            "selector": {}, "template": {},
            "updateStrategy": {"type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}},
        }))
        .unwrap()
    }

    proptest! {
        /// From any state the set comes to one new pod on every node that suits and none elsewhere;
        /// on the way no more pods are missing or doubled than the strategy says.
        #[test]
        fn every_set_converges_within_its_strategy(
            suiting in proptest::collection::vec(any::<bool>(), 1..6),
            start in proptest::collection::vec((0_usize..6, any::<bool>(), any::<bool>()), 0..10),
            surge in 0_i32..3,
        ) {
            let unavailable = i32::from(surge == 0);
            let spec = spec(surge, unavailable);
            let nodes: BTreeMap<String, Suits> = suiting.iter().enumerate().map(|(i, fits)| {
                (format!("n{i}"), Suits { may_start: *fits, may_stay: *fits })
            }).collect();
            let mut pods: Vec<Arc<Pod>> = start.iter().enumerate()
                .filter(|(_, (node, _, _))| *node < suiting.len())
                .map(|(i, (node, new, ready))| pod(i, *node, if *new { "b" } else { "a" }, *ready))
                .collect();
            let mut number = 100;
            let observe = |pods: &[Arc<Pod>]| plan(&Observed {
                spec: &spec, leaving: false, nodes: &nodes, pods, hash: "b", now: Timestamp::UNIX_EPOCH,
            });
            let serving = |pods: &[Arc<Pod>]| (0..suiting.len()).filter(|i| {
                pods.iter().any(|p| pods::node(p) == Some(&format!("n{i}")) && pods::is_ready(p))
            }).count();
            for _ in 0..40 {
                let plan = observe(&pods);
                let before = serving(&pods);
                let all_served = suiting.iter().enumerate().all(|(i, fits)| !fits
                    || pods.iter().any(|p| pods::node(p) == Some(&format!("n{i}")) && pods::is_ready(p)));
                pods.retain(|pod| !plan.delete.contains(&uid(pod)));
                let suited = suiting.iter().filter(|fits| **fits).count();
                if all_served {
                    let lost = before.min(suited).saturating_sub(serving(&pods));
                    let budget = usize::try_from(unavailable).unwrap();
                    prop_assert!(lost <= budget, "{lost} nodes lost their pod");
                }
                for node in &plan.create {
                    number += 1;
                    let index = node[1..].parse().unwrap();
                    pods.push(pod(number, index, "b", true));
                }
                pods = pods.into_iter().map(|p| {
                    let hash = revision::hash_of(&p).to_owned();
                    let node = pods::node(&p).unwrap()[1..].parse().unwrap();
                    let n = uid(&p)[1..].parse().unwrap();
                    // New pods become ready; old broken ones stay broken.
                    if hash == "b" { pod(n, node, "b", true) } else { p }
                }).collect();
            }
            for (i, fits) in suiting.iter().enumerate() {
                let name = format!("n{i}");
                let here: Vec<_> = pods.iter().filter(|p| pods::node(p) == Some(&name)).collect();
                prop_assert_eq!(here.len(), usize::from(*fits));
                prop_assert!(here.iter().all(|p| revision::hash_of(p) == "b"));
            }
            let last = observe(&pods);
            prop_assert!(last.create.is_empty() && last.delete.is_empty());
        }
    }

    #[test]
    fn a_pod_is_narrowed_to_its_node_and_tolerates_a_sick_one() {
        let set: DaemonSet = serde_json::from_value(json!({
            "metadata": {"name": "d"}, "spec": {"selector": {}, "template": {"spec": {
                "containers": [], "affinity": {"nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "disk", "operator": "Exists"}]}]}}}}}},
        }))
        .unwrap();
        let model = pod_of(&set, set.spec.as_ref().unwrap(), "h");
        let pod = pod_for(&model, "n1");
        assert_eq!(target(&pod), Some("n1"));
        let text = serde_json::to_string(&pod).unwrap();
        assert!(text.contains("node.kubernetes.io/unschedulable") && text.contains("\"disk\""));
    }
}
