//! The scheduler: gives every pod that waits a node.
//!
//! ```text
//!  store ── watch ──► Nodes (what each has and has promised)  ─┐
//!                └──► Pending (queue, back-off, unschedulable) ─┴─► filter ─► score ─► assume ─► bind (durable)
//!                        ▲                                           │ fits nowhere              │ refused
//!                        └──────── a change that can help ◄──────────┴───────────────────────────┘
//! ```
//! One task owns all state and decides; bindings and reports are written by tasks beside it, up to
//! [`IN_FLIGHT_COUNT_MAX`] at once, so that the store's group commit is filled; events about bindings follow
//! ([`announce`]). A pod takes its part
//! of a node when its binding is decided, not when it is seen: nothing is promised twice.
//!
//! Invariants: only pods of [`SCHEDULER_NAME`] without a node are decided about; a binding is a
//! compare-and-set from unbound; a victim of preemption has a lower priority and gets its grace.
//!
//! Source: Kubernetes `pkg/scheduler` (schedule_one.go).

mod announce;
mod filter;
mod nodes;
mod peers;
mod pending;
mod preempt;
mod request;
mod score;
mod volumes;

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Event, Node, Pod, PodCondition};
use gantry_api::k8s_openapi::api::policy::v1::PodDisruptionBudget;
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::status::{Reason, Status};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::announce::Announcer;
pub(crate) use self::filter::{Suits, node_satisfies, suits};
use self::nodes::Nodes;
use self::pending::{Pending, Wake};
use self::preempt::{Budget, Preemption};
use self::request::PodRequest;
use self::score::Decision;
use self::volumes::{Volumes, Waits};
use crate::controllers::informer::{REGISTRY_PREFIX, parse_store_key};
use crate::controllers::{EventType, event_about, pods};
use crate::server::registry::{DeleteOptions, Disruption, Registry, decode};
use crate::store::{Change, Entry, Watch};

/// Pods with another `schedulerName` are left alone.
const SCHEDULER_NAME: &str = "default-scheduler";
/// Bindings and reports under way at once.
const IN_FLIGHT_COUNT_MAX: usize = 256;
/// Changes taken in before pods are decided about again.
const CHANGE_COUNT_MAX: usize = 1_024;
/// The same failure of a pod is told again after this.
const REPORT_AGAIN: Duration = Duration::from_secs(60);
/// Pause before a watch that ended is started again.
const RELIST_PAUSE: Duration = Duration::from_millis(100);

/// What came of a task beside the deciding one.
enum Outcome {
    Bound {
        request: Arc<PodRequest>,
        node: Arc<str>,
        result: Result<(), Status>,
    },
    Reported,
}

/// The last thing said about a pod that fits nowhere.
struct Report {
    message: String,
    at: Instant,
}

struct Scheduler {
    registry: Registry,
    nodes: Nodes,
    pending: Pending,
    volumes: Volumes,
    reports: HashMap<Arc<str>, Report>,
    /// Store key to uid, of every pod that is counted or waits: a deletion names only the key.
    uids: HashMap<Arc<str>, Arc<str>>,
    /// Pods that were told to go for a more important one.
    leaving: HashSet<Arc<str>>,
    tasks: JoinSet<Outcome>,
    announcer: Announcer,
    /// Where the next search for a node starts.
    start: usize,
}

/// Schedules until shutdown.
pub async fn run(registry: Registry, shutdown: CancellationToken) {
    let announcer = Announcer::start(registry.clone());
    let mut scheduler = Scheduler {
        registry,
        nodes: Nodes::default(),
        pending: Pending::default(),
        volumes: Volumes::default(),
        reports: HashMap::new(),
        uids: HashMap::new(),
        leaving: HashSet::new(),
        tasks: JoinSet::new(),
        announcer,
        start: 0,
    };
    while !shutdown.is_cancelled() {
        let Some(mut watch) = scheduler.relist() else {
            continue;
        };
        if scheduler.follow(&mut watch, &shutdown).await {
            break;
        }
        tracing::warn!("the scheduler's watch fell behind: listing again");
        tokio::time::sleep(RELIST_PAUSE).await;
    }
}

impl Scheduler {
    /// Takes in the whole store; what is no longer there is forgotten.
    fn relist(&mut self) -> Option<Watch> {
        let (revision, entries) = self.registry.store().list(REGISTRY_PREFIX);
        let mut seen: HashSet<Arc<str>> = HashSet::new();
        let mut node_names: HashSet<String> = HashSet::new();
        self.volumes.clear();
        for entry in &entries {
            match parse_store_key(&entry.key) {
                Some(("nodes", key)) => {
                    node_names.insert(key.name);
                }
                Some(("pods", _)) => {}
                Some((plural, key)) => {
                    self.volumes.apply(plural, key, Some(entry));
                    continue;
                }
                None => continue,
            }
            self.apply_put(entry);
            seen.extend(self.uids.get(&entry.key).cloned());
        }
        let known: Vec<Arc<str>> = self
            .nodes
            .states()
            .iter()
            .map(|node| Arc::clone(&node.name))
            .collect();
        for name in known.iter().filter(|name| !node_names.contains(&***name)) {
            self.nodes.remove(name);
        }
        let mut uids = self.nodes.placed();
        uids.extend(self.pending.waiting());
        for uid in uids.iter().filter(|uid| !seen.contains(*uid)) {
            self.forget(uid);
        }
        self.uids.retain(|_, uid| seen.contains(uid));
        self.registry.store().watch(REGISTRY_PREFIX, revision).ok()
    }

    /// Decides until shutdown (true) or until the watch ends.
    async fn follow(&mut self, watch: &mut Watch, shutdown: &CancellationToken) -> bool {
        loop {
            self.schedule();
            let due = self.pending.next_due();
            let timer = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // All arms are cancel safe: changes and outcomes that are not taken stay.
                () = shutdown.cancelled() => return true,
                change = watch.next() => {
                    let Some(change) = change else { return false };
                    self.apply(&change);
                    for _ in 0..CHANGE_COUNT_MAX {
                        let Ok(Some(change)) = watch.try_next() else { break };
                        self.apply(&change);
                    }
                }
                Some(outcome) = self.tasks.join_next() => match outcome {
                    Ok(outcome) => self.settle(outcome),
                    Err(error) => tracing::error!(%error, "a scheduling task ended"),
                },
                () = timer => {}
            }
        }
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Put { entry, .. } => self.apply_put(entry),
            Change::Delete { key, .. } => self.apply_delete(key),
        }
    }

    fn apply_put(&mut self, entry: &Entry) {
        match parse_store_key(&entry.key).map(|(plural, _)| plural) {
            Some("nodes") => match decode::<Node>(entry) {
                Ok(node) => {
                    if self.nodes.put(&node) {
                        self.pending.wake(Wake::Node, Instant::now());
                    }
                }
                Err(status) => tracing::error!(%status, "cannot read a node"),
            },
            Some("pods") => match decode::<Pod>(entry) {
                Ok(pod) => self.apply_pod(&entry.key, &pod),
                Err(status) => tracing::error!(%status, "cannot read a pod"),
            },
            _ => self.apply_other(&entry.key, Some(entry)),
        }
    }

    /// Kinds that limit where pods may go.
    fn apply_other(&mut self, store_key: &str, entry: Option<&Entry>) {
        if let Some((plural, key)) = parse_store_key(store_key)
            && self.volumes.apply(plural, key, entry)
        {
            self.pending.wake(Wake::Node, Instant::now());
        }
    }

    fn apply_pod(&mut self, store_key: &Arc<str>, pod: &Pod) {
        let Some(request) = PodRequest::of(pod) else {
            return;
        };
        if let Some(old) = self
            .uids
            .insert(Arc::clone(store_key), Arc::clone(&request.uid))
            && old != request.uid
        {
            self.forget(&old);
        }
        if pods::is_finished(pod) {
            return self.forget(&request.uid);
        }
        if let Some(node) = pods::node(pod) {
            self.pending.remove(&request.uid);
            self.reports.remove(&request.uid);
            self.nodes.confirm(Arc::new(request), node);
            self.pending.wake(Wake::Placed, Instant::now());
            return;
        }
        let name = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.scheduler_name.as_deref());
        let ours = name.is_none_or(|name| name.is_empty() || name == SCHEDULER_NAME);
        if !ours || pods::is_terminating(pod) || request.is_gated {
            return self.pending.remove(&request.uid);
        }
        // While its binding is under way the pod still looks unbound: it stays where it is.
        if !self.nodes.has(&request.uid) {
            self.pending.put(request, Instant::now());
        }
    }

    fn apply_delete(&mut self, store_key: &Arc<str>) {
        match parse_store_key(store_key) {
            Some(("nodes", key)) => self.nodes.remove(&key.name),
            Some(("pods", _)) => {
                if let Some(uid) = self.uids.remove(store_key) {
                    self.forget(&uid);
                }
            }
            _ => self.apply_other(store_key, None),
        }
    }

    /// A pod is gone or has finished.
    fn forget(&mut self, uid: &Arc<str>) {
        self.pending.remove(uid);
        self.reports.remove(uid);
        self.leaving.remove(uid);
        if self.nodes.forget(uid) {
            self.pending.wake(Wake::Room, Instant::now());
        }
    }

    /// Decides about every active pod, as far as writes may be under way.
    fn schedule(&mut self) {
        let now = Instant::now();
        while self.tasks.len() < IN_FLIGHT_COUNT_MAX {
            let Some(request) = self.pending.take(now) else {
                break;
            };
            let request = match self.with_volumes(request) {
                Ok(request) => request,
                Err((request, message, blocked)) => {
                    self.pending.file_unschedulable(&request.uid, blocked, now);
                    self.report(request, message, now);
                    continue;
                }
            };
            let nodes = self.nodes.states();
            let (decision, looked_at) = score::decide(nodes, &request, self.start);
            self.start = (self.start + looked_at) % nodes.len().max(1);
            match decision {
                Decision::Bind(index) => {
                    let node = Arc::clone(&nodes[index].name);
                    self.nodes.assume(Arc::clone(&request), &node);
                    let registry = self.registry.clone();
                    self.tasks.spawn(async move {
                        let key = &request.key;
                        let (namespace, name) = (&key.namespace, &key.name);
                        let result = registry.bind(namespace, name, &request.uid, &node).await;
                        Outcome::Bound {
                            request,
                            node,
                            result,
                        }
                    });
                }
                Decision::Unschedulable(message, blocked) => {
                    self.pending.file_unschedulable(&request.uid, blocked, now);
                    let budgets = self.budgets();
                    let preemption = preempt::choose(self.nodes.states(), &request, &budgets);
                    if let Some(preemption) = preemption {
                        self.preempt(&request, preemption);
                    }
                    self.report(request, message, now);
                }
            }
        }
    }

    /// Which pods are not to go. Asked for only where some have to: budgets change more often than that.
    fn budgets(&self) -> Vec<Budget> {
        match self.registry.list::<PodDisruptionBudget>(None) {
            Ok((_, budgets)) => budgets.iter().filter_map(Budget::of).collect(),
            Err(status) => {
                tracing::error!(%status, "cannot read the disruption budgets");
                Vec::new()
            }
        }
    }

    /// Starts the deletion of the victims, once each.
    fn preempt(&mut self, request: &Arc<PodRequest>, preemption: Preemption) {
        let Preemption { node, victims } = preemption;
        // While earlier victims use their grace, nobody else has to go for the same pod.
        if victims
            .iter()
            .any(|victim| self.leaving.contains(&victim.uid))
        {
            return;
        }
        self.leaving
            .extend(victims.iter().map(|victim| Arc::clone(&victim.uid)));
        let (registry, request) = (self.registry.clone(), Arc::clone(request));
        self.tasks.spawn(async move {
            make_room(&registry, &request, &node, &victims).await;
            Outcome::Reported
        });
    }

    /// The request with where its volumes are; else why it waits.
    fn with_volumes(
        &self,
        request: Arc<PodRequest>,
    ) -> Result<Arc<PodRequest>, (Arc<PodRequest>, String, filter::Blocked)> {
        if request.claims.is_empty() {
            return Ok(request);
        }
        match self.volumes.needs(&request, self.nodes.states()) {
            Ok(volumes) => Ok(Arc::new(PodRequest {
                volumes,
                ..PodRequest::clone(&request)
            })),
            Err(Waits { why, blocked }) => {
                let count = self.nodes.states().len();
                let message = format!("0/{count} nodes are available: {why}.");
                Err((request, message, blocked))
            }
        }
    }

    fn settle(&mut self, outcome: Outcome) {
        let Outcome::Bound {
            request,
            node,
            result,
        } = outcome
        else {
            return;
        };
        let Err(status) = result else {
            // The watch may be behind: the pod stays assumed until it shows the binding.
            self.pending.remove(&request.uid);
            self.announcer.tell(bound_event(&request, &node));
            return;
        };
        tracing::debug!(pod = %request.key, %node, %status, "binding refused");
        let now = Instant::now();
        if self.nodes.forget_assumed(&request.uid) {
            self.pending.wake(Wake::Room, now);
        }
        self.pending.file_refused(&request.uid, now);
    }

    /// Tells the user why a pod waits, once per change of the reason or minute.
    fn report(&mut self, request: Arc<PodRequest>, message: String, now: Instant) {
        let known = self.reports.get(&request.uid);
        let fresh = |known: &&Report| now.duration_since(known.at) < REPORT_AGAIN;
        if known
            .filter(fresh)
            .is_some_and(|known| known.message == message)
        {
            return;
        }
        let report = Report {
            message: message.clone(),
            at: now,
        };
        self.reports.insert(Arc::clone(&request.uid), report);
        let registry = self.registry.clone();
        self.tasks.spawn(async move {
            tell(&registry, &request, &message).await;
            Outcome::Reported
        });
    }
}

fn bound_event(request: &PodRequest, node: &str) -> Event {
    let key = &request.key;
    let mut pod = Pod::default();
    pod.metadata.namespace = Some(key.namespace.clone());
    pod.metadata.name = Some(key.name.clone());
    pod.metadata.uid = Some(request.uid.to_string());
    let message = format!("Successfully assigned {key} to {node}");
    let (type_, reason) = (EventType::Normal, "Scheduled");
    event_about(&pod, SCHEDULER_NAME, type_, reason, message)
}

/// Deletes the victims, with their grace, and notes for whom.
async fn make_room(
    registry: &Registry,
    request: &PodRequest,
    node: &str,
    victims: &[Arc<PodRequest>],
) {
    let key = &request.key;
    match registry.get::<Pod>(&key.namespace, &key.name) {
        Ok(Some(mut pod)) if pod.metadata.uid.as_deref() == Some(&*request.uid) => {
            let status = pod.status.get_or_insert_default();
            status.nominated_node_name = Some(node.to_owned());
            if let Err(status) = registry.update_status(&pod).await {
                tracing::debug!(pod = %key, %status, "cannot nominate a node");
            }
        }
        _ => return,
    }
    for victim in victims {
        let other = &victim.key;
        let mut about = Pod::default();
        about.metadata.namespace = Some(other.namespace.clone());
        about.metadata.name = Some(other.name.clone());
        about.metadata.uid = Some(victim.uid.to_string());
        let options = DeleteOptions {
            uid: Some(victim.uid.to_string()),
            disruption: Some(Disruption {
                reason: "PreemptionByScheduler",
                message: format!(
                    "{SCHEDULER_NAME}: preempting to accommodate a higher priority pod"
                ),
            }),
            ..DeleteOptions::default()
        };
        match registry
            .delete::<Pod>(&other.namespace, &other.name, &options)
            .await
        {
            Ok(()) => {
                let message = format!(
                    "Preempted by pod {key} (priority {} over {}) on node {node}",
                    request.priority, victim.priority
                );
                let (type_, reason) = (EventType::Normal, "Preempted");
                let event = event_about(&about, SCHEDULER_NAME, type_, reason, message);
                registry.event(event).await;
            }
            Err(status) if status.reason == Reason::NotFound => {}
            Err(status) => tracing::warn!(pod = %other, %status, "cannot preempt"),
        }
    }
}

/// Writes the event and the condition of a pod that fits nowhere.
async fn tell(registry: &Registry, request: &PodRequest, message: &str) {
    let key = &request.key;
    let Ok(Some(mut pod)) = registry.get::<Pod>(&key.namespace, &key.name) else {
        return;
    };
    if pod.metadata.uid.as_deref() != Some(&*request.uid) || pods::node(&pod).is_some() {
        return;
    }
    let (type_, reason) = (EventType::Warning, "FailedScheduling");
    let event = event_about(&pod, SCHEDULER_NAME, type_, reason, message.to_owned());
    registry.event(event).await;
    let Some(conditions) = with_unschedulable(&pod, message, Timestamp::now()) else {
        return;
    };
    pod.status.get_or_insert_default().conditions = Some(conditions);
    match registry.update_status(&pod).await {
        Ok(_) => {}
        // It changed meanwhile, so it is decided about again.
        Err(status) if matches!(status.reason, Reason::Conflict | Reason::NotFound) => {}
        Err(status) => tracing::warn!(pod = %key, %status, "cannot record why a pod waits"),
    }
}

/// The pod's conditions with PodScheduled False; `None` when it says so already.
fn with_unschedulable(pod: &Pod, message: &str, now: Timestamp) -> Option<Vec<PodCondition>> {
    let old = pods::condition(pod, "PodScheduled");
    let is_false = |condition: &&PodCondition| condition.status == "False";
    let same = |condition: &PodCondition| {
        condition.reason.as_deref() == Some("Unschedulable")
            && condition.message.as_deref() == Some(message)
    };
    if old.filter(is_false).is_some_and(same) {
        return None;
    }
    let condition = PodCondition {
        type_: "PodScheduled".to_owned(),
        status: "False".to_owned(),
        reason: Some("Unschedulable".to_owned()),
        message: Some(message.to_owned()),
        ..PodCondition::default()
    };
    let mut status = pod.status.clone().unwrap_or_default();
    pods::set_condition(&mut status, condition, now);
    status.conditions
}
