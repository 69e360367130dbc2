//! Node heartbeats: a node whose lease is not renewed is not ready, and neither are its pods.
//!
//! ```text
//!  Lease renewed ⇒ silence 0          silence > grace              renewed again
//!  Ready as the agent reports ──────────────────────► Ready Unknown ─────────────► as reported
//!                                     (NodeStatusUnknown)
//! ```
//! Silence is counted by this process's own monotonic clock, from the last change of the lease that
//! it saw: no wall clock of any node matters, and a control plane that (re)started gives every node
//! the full grace period. Time in which this process itself stood still is not counted either.
//!
//! Pods of a silent node get condition Ready False (reason NodeNotReady), their ContainersReady
//! stays as the agent reported it; when the node is back, Ready follows from ContainersReady until
//! the agent's next report.
//!
//! ```text
//!  Ready    taints, NoSchedule and NoExecute
//!  True     none
//!  False    node.kubernetes.io/not-ready
//!  Unknown  node.kubernetes.io/unreachable
//! ```
//! Who leaves a node with such a taint, and when, is decided by [`super::taint_eviction`]. While not one
//! node is ready, the taints are NoSchedule only: it is more likely that this machine is cut off than that
//! all others are gone (Kubernetes: full disruption), and there is nowhere to go.
//!
//! Source: Kubernetes `pkg/controller/nodelifecycle` (nodeMonitorPeriod, MarkPodsNotReady).

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, PodCondition, Taint};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::status::{Reason, Status};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::informer::ObjectKey;
use super::{Context, EventType, pods};

/// Where the leases of nodes are.
const LEASE_NAMESPACE: &str = "kube-node-lease";
/// How often the leases are looked at.
const PERIOD: Duration = Duration::from_secs(1);
/// Most silence that one look adds: if the looks themselves were late, no node is to blame.
const SILENCE_PER_LOOK_MAX: Duration = Duration::from_secs(3);
/// Reason of a node's conditions while nothing is heard of it.
const STATUS_UNKNOWN: &str = "NodeStatusUnknown";
/// Reason of a node's conditions when nothing was ever heard of it.
const NEVER_UPDATED: &str = "NodeStatusNeverUpdated";
/// Reason of the Ready condition of pods on a node that is not ready.
const NODE_NOT_READY: &str = "NodeNotReady";
/// Taints of a node that is not ready, and of one that is not heard of.
const TAINTS: [&str; 2] = [
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
];
/// Conditions that only the agent knows.
const REPORTED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// What is remembered of one node between two looks.
#[derive(Debug, Default, Clone)]
struct Observation {
    /// The lease as last seen; changes with every renewal.
    lease_version: Option<String>,
    silence: Duration,
    /// The agent's last conditions, when they were overwritten.
    reported: Option<Vec<NodeCondition>>,
    /// Its pods have the Ready condition that goes with a node that is (not) heard; `None`: perhaps not.
    marked: Option<bool>,
}

impl Observation {
    /// Adds one look at the lease, `elapsed` after the one before.
    fn look(&mut self, lease_version: Option<String>, elapsed: Duration) {
        if lease_version.is_some() && lease_version != self.lease_version {
            self.lease_version = lease_version;
            self.silence = Duration::ZERO;
        } else {
            self.silence += elapsed.min(SILENCE_PER_LOOK_MAX);
        }
    }
}

fn node_conditions(node: &Node) -> &[NodeCondition] {
    node.status
        .as_ref()
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default()
}

/// The conditions of a silent node; `None` when they say so already.
fn silenced(node: &Node, now: Timestamp) -> Option<Vec<NodeCondition>> {
    let old = node_conditions(node);
    let mut new = old.to_vec();
    for type_ in REPORTED {
        match new.iter_mut().find(|condition| condition.type_ == type_) {
            Some(condition) if condition.status == "Unknown" => {}
            Some(condition) => {
                "Unknown".clone_into(&mut condition.status);
                condition.reason = Some(STATUS_UNKNOWN.to_owned());
                condition.message = Some("Node agent stopped posting node status.".to_owned());
                condition.last_transition_time = Some(Time(now));
            }
            None => new.push(NodeCondition {
                type_: type_.to_owned(),
                status: "Unknown".to_owned(),
                reason: Some(NEVER_UPDATED.to_owned()),
                message: Some("Node agent never posted node status.".to_owned()),
                last_heartbeat_time: None,
                last_transition_time: Some(Time(now)),
            }),
        }
    }
    (new != old).then_some(new)
}

/// The conditions of a node that is heard again; `None` when the agent has reported meanwhile.
fn restored(node: &Node, reported: &[NodeCondition], now: Timestamp) -> Option<Vec<NodeCondition>> {
    let old = node_conditions(node);
    let mut new = old.to_vec();
    for condition in &mut new {
        let ours =
            condition.status == "Unknown" && condition.reason.as_deref() == Some(STATUS_UNKNOWN);
        let before = reported
            .iter()
            .find(|before| before.type_ == condition.type_);
        if let Some(before) = before.filter(|_| ours) {
            *condition = NodeCondition {
                last_transition_time: Some(Time(now)),
                ..before.clone()
            };
        }
    }
    (new != old).then_some(new)
}

fn ready_status(node: &Node) -> Option<&str> {
    let conditions = node_conditions(node).iter();
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    ready.next().map(|condition| condition.status.as_str())
}

/// The node's taints as its Ready condition wants them; `None` when they are right.
fn tainted(node: &Node, somebody_is_ready: bool, now: Timestamp) -> Option<Vec<Taint>> {
    let key = match ready_status(node)? {
        "True" => None,
        "False" => Some(TAINTS[0]),
        _ => Some(TAINTS[1]),
    };
    let effects: &[&str] = match (key, somebody_is_ready) {
        (Some(_), true) => &["NoSchedule", "NoExecute"],
        (Some(_), false) => &["NoSchedule"],
        (None, _) => &[],
    };
    let spec = node.spec.as_ref();
    let old = spec
        .and_then(|spec| spec.taints.as_deref())
        .unwrap_or_default();
    let is_wanted =
        |taint: &Taint| Some(taint.key.as_str()) == key && effects.contains(&taint.effect.as_str());
    let is_ours = |taint: &Taint| TAINTS.contains(&taint.key.as_str());
    let mut new: Vec<Taint> = old
        .iter()
        .filter(|taint| !is_ours(taint) || is_wanted(taint))
        .cloned()
        .collect();
    for effect in effects {
        let is_there = new
            .iter()
            .any(|taint| Some(taint.key.as_str()) == key && taint.effect == *effect);
        if !is_there {
            new.push(Taint {
                key: key.unwrap_or_default().to_owned(),
                effect: (*effect).to_owned(),
                time_added: Some(Time(now)),
                ..Taint::default()
            });
        }
    }
    (new != old).then_some(new)
}

/// Whether the agent's word on the node is Ready True.
pub(crate) fn is_ready(node: &Node) -> bool {
    let ready = node_conditions(node)
        .iter()
        .find(|condition| condition.type_ == "Ready");
    ready.is_some_and(|condition| condition.status == "True")
}

/// The Ready condition that a pod should get because of its node; `None` when it has the right one.
fn pod_ready(pod: &Pod, node_is_heard: bool, now: Timestamp) -> Option<PodCondition> {
    let ready = pods::condition(pod, "Ready")?;
    let ours = ready.status == "False" && ready.reason.as_deref() == Some(NODE_NOT_READY);
    let mut new = ready.clone();
    if !node_is_heard && ready.status == "True" {
        "False".clone_into(&mut new.status);
        new.reason = Some(NODE_NOT_READY.to_owned());
        new.message = Some("Nothing is heard of the node.".to_owned());
    } else if node_is_heard && ours && containers_and_gates_are_ready(pod) {
        "True".clone_into(&mut new.status);
        new.reason = None;
        new.message = None;
    } else {
        return None;
    }
    new.last_transition_time = Some(Time(now));
    Some(new)
}

fn containers_and_gates_are_ready(pod: &Pod) -> bool {
    let is_true = |type_: &str| pods::condition(pod, type_).is_some_and(|c| c.status == "True");
    let gates = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.readiness_gates.as_deref());
    let mut gates = gates.unwrap_or_default().iter();
    is_true("ContainersReady") && gates.all(|gate| is_true(&gate.condition_type))
}

/// Nodes of which a pod has changed. A look at every pod every second would be most of what many quiet nodes
/// cost.
#[derive(Clone, Default)]
struct ChangedPods(Arc<Mutex<HashSet<String>>>);

impl ChangedPods {
    fn note(&self, pod: &Pod) {
        let Some(node) = pods::node(pod) else { return };
        let mut nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !nodes.contains(node) {
            nodes.insert(node.to_owned());
        }
    }

    fn take(&self) -> HashSet<String> {
        let mut nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut nodes)
    }
}

struct NodeHealth {
    context: Arc<Context>,
    observations: HashMap<String, Observation>,
    changed: ChangedPods,
}

impl NodeHealth {
    /// One look at every node.
    async fn look(&mut self, elapsed: Duration) {
        // Before the caches are read: what changes from here on is for the next look.
        for name in self.changed.take() {
            if let Some(observation) = self.observations.get_mut(&name) {
                observation.marked = None;
            }
        }
        let nodes = self.context.caches.nodes.all();
        let exists = |name: &String| nodes.iter().any(|n| n.metadata.name.as_ref() == Some(name));
        if self.observations.len() > nodes.len() {
            self.observations.retain(|name, _| exists(name));
        }
        let somebody_is_ready = nodes.iter().any(|node| ready_status(node) == Some("True"));
        for node in &nodes {
            if let Err(status) = self.look_at(node, elapsed, somebody_is_ready).await {
                let name = node.metadata.name.as_deref().unwrap_or_default();
                // The next look tries again, with a newer state.
                if status.reason == Reason::Conflict {
                    tracing::debug!(node = name, %status, "node changed meanwhile");
                } else {
                    tracing::warn!(node = name, %status, "cannot record the health of a node");
                }
            }
        }
    }

    async fn look_at(
        &mut self,
        node: &Node,
        elapsed: Duration,
        somebody_is_ready: bool,
    ) -> Result<(), Status> {
        let name = node.metadata.name.clone().unwrap_or_default();
        let lease = self
            .context
            .caches
            .leases
            .get(&ObjectKey::new(LEASE_NAMESPACE, &*name));
        let version = lease.and_then(|lease| lease.metadata.resource_version.clone());
        let observation = self.observations.entry(name.clone()).or_default();
        observation.look(version, elapsed);
        let heard = observation.silence <= self.context.settings.node_grace_period;
        let now = Timestamp::now();
        if !heard && let Some(new) = silenced(node, now) {
            let silence = observation.silence;
            observation.reported = Some(node_conditions(node).to_vec());
            self.write_conditions(node, new).await?;
            tracing::warn!(
                node = name,
                silence_s = silence.as_secs(),
                "node is not heard of"
            );
            let message = format!("Node {name} status is now: NodeNotReady");
            let (component, reason) = ("node-controller", "NodeNotReady");
            let event = super::event_about(node, component, EventType::Normal, reason, message);
            self.context.registry.event(event).await;
        } else if heard && let Some(reported) = observation.reported.take() {
            if let Some(new) = restored(node, &reported, now) {
                observation.reported = Some(reported);
                self.write_conditions(node, new).await?;
                if let Some(observation) = self.observations.get_mut(&name) {
                    observation.reported = None;
                }
            }
            tracing::info!(node = name, "node is heard of again");
        }
        if let Some(taints) = tainted(node, somebody_is_ready, now) {
            let mut node = node.clone();
            node.spec.get_or_insert_default().taints = Some(taints);
            // Of what this look has seen: a condition that it has just written is followed by the next.
            super::ignore_not_found(self.context.registry.update(&node).await)?;
        }
        let observation = self.observations.entry(name.clone()).or_default();
        if observation.marked == Some(heard) {
            return Ok(());
        }
        observation.marked = None;
        self.mark_pods(&name, heard, now).await?;
        if let Some(observation) = self.observations.get_mut(&name) {
            observation.marked = Some(heard);
        }
        Ok(())
    }

    async fn write_conditions(&self, node: &Node, new: Vec<NodeCondition>) -> Result<(), Status> {
        let mut node = node.clone();
        node.status.get_or_insert_default().conditions = Some(new);
        super::ignore_not_found(self.context.registry.update_status(&node).await)
    }

    async fn mark_pods(&self, node: &str, heard: bool, now: Timestamp) -> Result<(), Status> {
        let mut outcome = Ok(());
        for pod in self.context.caches.pods.on_node(node) {
            if pods::is_finished(&pod) {
                continue;
            }
            let Some(condition) = pod_ready(&pod, heard, now) else {
                continue;
            };
            let mut pod = Pod::clone(&pod);
            let conditions = pod
                .status
                .get_or_insert_default()
                .conditions
                .get_or_insert_default();
            if let Some(ready) = conditions.iter_mut().find(|c| c.type_ == condition.type_) {
                *ready = condition;
            }
            // One pod that changed meanwhile does not keep the others.
            let result = self.context.registry.update_status(&pod).await;
            outcome = outcome.and(super::ignore_not_found(result));
        }
        outcome
    }
}

/// Starts the looking task.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let changed = ChangedPods::default();
    let noted = changed.clone();
    context.caches.pods.on_change(move |delta| {
        noted.note(delta.object());
    });
    let context = Arc::clone(context);
    let shutdown = shutdown.clone();
    tasks.spawn(async move {
        let mut health = NodeHealth {
            context,
            observations: HashMap::new(),
            changed,
        };
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last = Instant::now();
        loop {
            tokio::select! {
                // Both arms are cancel safe: a tick that is not taken comes again.
                _ = ticks.tick() => {}
                () = shutdown.cancelled() => return,
            }
            health.context.informer.caught_up(0).await;
            let elapsed = last.elapsed();
            last = Instant::now();
            health.look(elapsed).await;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::k8s_openapi::api::core::v1::{NodeStatus, PodStatus};

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn node(status: &str) -> Node {
        let ready = NodeCondition {
            type_: "Ready".to_owned(),
            status: status.to_owned(),
            reason: Some("AgentReady".to_owned()),
            ..NodeCondition::default()
        };
        let status = NodeStatus {
            conditions: Some(vec![ready]),
            ..NodeStatus::default()
        };
        Node {
            status: Some(status),
            ..Node::default()
        }
    }

    fn with(mut node: Node, conditions: Vec<NodeCondition>) -> Node {
        node.status.as_mut().unwrap().conditions = Some(conditions);
        node
    }

    #[test]
    fn silence_counts_from_the_last_renewal_and_not_while_we_stand_still() {
        let second = Duration::from_secs(1);
        let mut observation = Observation::default();
        observation.look(Some("1".to_owned()), second);
        for _ in 0..41 {
            observation.look(Some("1".to_owned()), second);
        }
        assert_eq!(observation.silence, 41 * second);
        observation.look(Some("2".to_owned()), second);
        assert_eq!(observation.silence, Duration::ZERO);
        observation.look(Some("2".to_owned()), 3600 * second);
        assert_eq!(observation.silence, SILENCE_PER_LOOK_MAX);
    }

    #[test]
    fn only_nodes_with_changed_pods_are_named_and_once() {
        let changed = ChangedPods::default();
        let mut pod = Pod::default();
        changed.note(&pod); // waits for a node
        pod.spec.get_or_insert_default().node_name = Some("n".to_owned());
        changed.note(&pod);
        changed.note(&pod);
        assert_eq!(changed.take(), HashSet::from(["n".to_owned()]));
        assert!(changed.take().is_empty());
    }

    #[test]
    fn a_node_without_a_lease_gets_the_grace_period_from_its_first_look() {
        let mut observation = Observation::default();
        observation.look(None, Duration::from_secs(1));
        observation.look(None, Duration::from_secs(1));
        assert_eq!(observation.silence, Duration::from_secs(2));
    }

    #[test]
    fn a_silent_node_is_unknown_until_it_is_heard_again() {
        let before = node("True");
        let unknown = silenced(&before, now()).unwrap();
        assert_eq!(unknown.len(), REPORTED.len());
        assert!(
            unknown
                .iter()
                .all(|condition| condition.status == "Unknown")
        );
        assert_eq!(unknown[0].reason.as_deref(), Some(STATUS_UNKNOWN));
        let after = with(before.clone(), unknown);
        assert!(!is_ready(&after));
        assert_eq!(silenced(&after, now()), None, "idempotent");
        let again = restored(&after, node_conditions(&before), now()).unwrap();
        assert!(is_ready(&with(after.clone(), again)));
        // The agent was faster and says otherwise: its word stands.
        assert_eq!(
            restored(&node("False"), node_conditions(&before), now()),
            None
        );
    }

    #[test]
    fn taints_follow_ready_and_others_stay() {
        let own = Taint {
            key: "dedicated".to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        };
        let shown = |taints: &[Taint]| -> Vec<String> {
            taints
                .iter()
                .map(|t| format!("{}:{}", t.key, t.effect))
                .collect()
        };
        let mut node = node("True");
        node.spec.get_or_insert_default().taints = Some(vec![own]);
        assert_eq!(tainted(&node, true, now()), None);
        for (status, heard, wanted) in [
            (
                "False",
                true,
                &["not-ready:NoSchedule", "not-ready:NoExecute"][..],
            ),
            (
                "Unknown",
                true,
                &["unreachable:NoSchedule", "unreachable:NoExecute"],
            ),
            ("False", false, &["not-ready:NoSchedule"]),
            ("Unknown", false, &["unreachable:NoSchedule"]),
            (
                "Unknown",
                true,
                &["unreachable:NoSchedule", "unreachable:NoExecute"],
            ),
            ("True", true, &[]),
        ] {
            let conditions = node.status.as_mut().unwrap().conditions.as_mut().unwrap();
            status.clone_into(&mut conditions[0].status);
            let new = tainted(&node, heard, now()).unwrap();
            node.spec.as_mut().unwrap().taints = Some(new.clone());
            let wanted = wanted
                .iter()
                .map(|name| format!("node.kubernetes.io/{name}"));
            let all: Vec<String> = ["dedicated:NoSchedule".to_owned()]
                .into_iter()
                .chain(wanted)
                .collect();
            assert_eq!(shown(&new), all);
            let later = Timestamp::UNIX_EPOCH;
            assert_eq!(
                tainted(&node, heard, later),
                None,
                "idempotent, the time stays"
            );
        }
        assert_eq!(
            tainted(&Node::default(), true, now()),
            None,
            "nothing is known"
        );
    }

    #[test]
    fn pods_follow_their_node_and_come_back_with_their_containers() {
        let condition = |type_: &str, status: &str| PodCondition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            ..PodCondition::default()
        };
        let pod = |conditions: Vec<PodCondition>| Pod {
            status: Some(PodStatus {
                conditions: Some(conditions),
                ..PodStatus::default()
            }),
            ..Pod::default()
        };
        let containers = condition("ContainersReady", "True");
        let healthy = pod(vec![condition("Ready", "True"), containers.clone()]);
        assert_eq!(pod_ready(&healthy, true, now()), None);
        let lost = pod_ready(&healthy, false, now()).unwrap();
        assert_eq!(
            (&*lost.status, lost.reason.as_deref()),
            ("False", Some(NODE_NOT_READY))
        );
        let marked = pod(vec![lost.clone(), containers]);
        assert_eq!(pod_ready(&marked, false, now()), None, "idempotent");
        assert_eq!(pod_ready(&marked, true, now()).unwrap().status, "True");
        let failing = pod(vec![lost, condition("ContainersReady", "False")]);
        assert_eq!(pod_ready(&failing, true, now()), None);
        let unready = pod(vec![condition("Ready", "False")]);
        assert_eq!(pod_ready(&unready, true, now()), None, "not our word");
    }
}
