//! StatefulSets: pods with names, an order, and claims that outlive them.
//!
//! ```text
//!  web-0 ─ ready ─► web-1 ─ ready ─► web-2        scale up, in order (OrderedReady)
//!  web-2 ─ gone ──► web-1 ...                     scale down and update, in reverse
//!  <claim>-web-0 is made before web-0 and stays when it goes
//! ```
//! Per pass at most one step that the order forbids to overlap: the next pass begins when the caches
//! show its outcome. With `Parallel` creations and deletions do not wait for each other. Updates take
//! down as many pods as `maxUnavailable` leaves, one unless it says more; in order they come back one
//! by one.
//!
//! Invariants: no two pods of one ordinal exist (names are the lock); a pod below the partition keeps
//! the old template, also when it is made again; an update makes no more pods unavailable than
//! `maxUnavailable`, and replaces one that is so anyway; claims are deleted only where the policy says so.
//!
//! Source: Kubernetes `pkg/controller/statefulset` (stateful_set_control.go).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec, StatefulSetStatus};
use gantry_api::k8s_openapi::api::core::v1::{
    PersistentVolumeClaim, PersistentVolumeClaimVolumeSource, Pod, PodTemplateSpec, Volume,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::status::{Reason, Status};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::ObjectKey;
use super::replicaset::count;
use super::revision::{self, HASH_LABEL, History};
use super::{Context, Controller, EventType, WORKER_COUNT, event_about, owned, pods};
use crate::server::registry::DeleteOptions;

/// Label with the pod's name: a Service can select one pod.
const POD_NAME_LABEL: &str = "statefulset.kubernetes.io/pod-name";
/// Label with the ordinal.
const POD_INDEX_LABEL: &str = "apps.kubernetes.io/pod-index";

/// What the plan is made from.
struct Observed<'a> {
    set: &'a StatefulSet,
    spec: &'a StatefulSetSpec,
    /// Pods of the set by ordinal.
    pods: &'a BTreeMap<i32, Arc<Pod>>,
    /// Hash of the template as it is, and of the one that all pods had last.
    update: &'a str,
    current: &'a str,
    now: Timestamp,
}

/// What to do about one StatefulSet.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// Ordinals to create, with the hash of the template.
    create: Vec<(i32, String)>,
    /// Ordinals to delete.
    delete: Vec<i32>,
    again: Option<Duration>,
}

/// The ordinal in the name of a pod of this set.
fn ordinal(set: &str, pod: &str) -> Option<i32> {
    let text = pod.strip_prefix(set)?.strip_prefix('-')?;
    let number: i32 = text.parse().ok()?;
    (number >= 0 && number.to_string() == text).then_some(number)
}

/// Ordinals that the set wants.
fn wanted(spec: &StatefulSetSpec) -> std::ops::Range<i32> {
    let start = spec.ordinals.as_ref().and_then(|o| o.start).unwrap_or(0);
    start..start.saturating_add(spec.replicas.unwrap_or(1).max(0))
}

fn partition(spec: &StatefulSetSpec) -> i32 {
    let strategy = spec.update_strategy.as_ref();
    let rolling = strategy.and_then(|s| s.rolling_update.as_ref());
    rolling.and_then(|r| r.partition).unwrap_or(0)
}

/// How many pods an update may leave unavailable: at least one.
fn max_unavailable(spec: &StatefulSetSpec) -> usize {
    let strategy = spec.update_strategy.as_ref();
    let rolling = strategy.and_then(|s| s.rolling_update.as_ref());
    let value = rolling.and_then(|r| r.max_unavailable.as_ref());
    let total = spec.replicas.unwrap_or(1);
    let number = value.map_or(1, |value| owned::pod_count(value, total, false));
    usize::try_from(number).unwrap_or(0).max(1)
}

fn rolls(spec: &StatefulSetSpec) -> bool {
    let strategy = spec.update_strategy.as_ref();
    strategy.and_then(|s| s.type_.as_deref()) != Some("OnDelete")
}

/// Decides what one StatefulSet needs.
fn plan(observed: &Observed<'_>) -> Plan {
    let (set, spec) = (observed.set, observed.spec);
    let mut plan = Plan::default();
    if set.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let ordered = spec.pod_management_policy.as_deref() != Some("Parallel");
    let min_ready_s = spec.min_ready_seconds.unwrap_or(0);
    let mut is_available = |pod: &Pod| match pods::until_available(pod, min_ready_s, observed.now) {
        Some(wait) if wait.is_zero() => true,
        Some(wait) => {
            plan.again = Some(plan.again.map_or(wait, |again| again.min(wait)));
            false
        }
        None => false,
    };
    let mut all_available = true;
    let (mut create, mut delete) = (Vec::new(), Vec::new());
    for at in wanted(spec) {
        match observed.pods.get(&at) {
            None => {
                let hash = match rolls(spec) && at >= spec_start(spec) + partition(spec) {
                    true => observed.update,
                    false if !rolls(spec) => observed.update,
                    false => observed.current,
                };
                create.push((at, hash.to_owned()));
                all_available = false;
            }
            Some(pod) if pods::is_terminating(pod) => all_available = false,
            // A pod of a set never ends by itself: it is made again under its name.
            Some(pod) if pods::is_finished(pod) => {
                delete.push(at);
                all_available = false;
            }
            Some(pod) => all_available &= is_available(pod),
        }
        if ordered && !all_available {
            plan.create = create;
            plan.delete = delete;
            return plan;
        }
    }
    // Surplus pods go from the highest on; in order each waits for the one before.
    let range = wanted(spec);
    let surplus = observed
        .pods
        .iter()
        .rev()
        .filter(|(at, _)| !range.contains(at));
    for (at, pod) in surplus {
        if pods::is_terminating(pod) {
            if ordered {
                return plan;
            }
            continue;
        }
        delete.push(*at);
        if ordered {
            plan.delete = delete;
            return plan;
        }
    }
    if create.is_empty() && delete.is_empty() && rolls(spec) {
        delete = next_updates(observed, &mut is_available);
    }
    plan.create = create;
    plan.delete = delete;
    plan
}

fn spec_start(spec: &StatefulSetSpec) -> i32 {
    spec.ordinals.as_ref().and_then(|o| o.start).unwrap_or(0)
}

/// Pods of an old template to replace now, from the highest on.
fn next_updates(observed: &Observed<'_>, is_available: &mut impl FnMut(&Pod) -> bool) -> Vec<i32> {
    let first = spec_start(observed.spec) + partition(observed.spec);
    let most = max_unavailable(observed.spec);
    let mut serving: BTreeSet<i32> = wanted(observed.spec).collect();
    serving.retain(|at| {
        let pod = observed.pods.get(at);
        pod.is_some_and(|pod| !pods::is_terminating(pod) && is_available(pod))
    });
    let mut unavailable = wanted(observed.spec).len() - serving.len();
    let mut next = Vec::new();
    for at in wanted(observed.spec).rev().filter(|at| *at >= first) {
        let Some(pod) = observed.pods.get(&at) else {
            continue;
        };
        if pods::is_terminating(pod) || revision::hash_of(pod) == observed.update {
            continue;
        }
        // One that does not serve has nothing to lose: the new template may be its cure.
        if !serving.contains(&at) {
            next.push(at);
        } else if unavailable < most {
            unavailable += 1;
            next.push(at);
        }
    }
    next
}

/// The claim of a template for one ordinal.
fn claim_name(template: &PersistentVolumeClaim, set: &str, ordinal: i32) -> String {
    let name = template.metadata.name.as_deref().unwrap_or_default();
    format!("{name}-{set}-{ordinal}")
}

fn retention(spec: &StatefulSetSpec, when: &str) -> bool {
    let policy = spec.persistent_volume_claim_retention_policy.as_ref();
    let value = policy.and_then(|policy| match when {
        "deleted" => policy.when_deleted.as_deref(),
        _ => policy.when_scaled.as_deref(),
    });
    value == Some("Delete")
}

/// The claims of one ordinal.
fn claims_of(set: &StatefulSet, spec: &StatefulSetSpec, at: i32) -> Vec<PersistentVolumeClaim> {
    let name = set.metadata.name.as_deref().unwrap_or_default();
    let templates = spec.volume_claim_templates.iter().flatten();
    let labels = spec.selector.match_labels.clone();
    templates
        .map(|template| {
            let mut own = template.metadata.labels.clone().unwrap_or_default();
            own.extend(labels.clone().unwrap_or_default());
            PersistentVolumeClaim {
                metadata: ObjectMeta {
                    namespace: set.metadata.namespace.clone(),
                    name: Some(claim_name(template, name, at)),
                    labels: Some(own),
                    annotations: template.metadata.annotations.clone(),
                    // A claim that goes with the set is owned by it: the collector does the rest.
                    owner_references: retention(spec, "deleted")
                        .then(|| vec![super::controller_reference(set)]),
                    ..ObjectMeta::default()
                },
                spec: template.spec.clone(),
                status: None,
            }
        })
        .collect()
}

/// The pod of one ordinal.
fn pod_of(
    set: &StatefulSet,
    spec: &StatefulSetSpec,
    template: &PodTemplateSpec,
    hash: &str,
    at: i32,
) -> Pod {
    let set_name = set.metadata.name.as_deref().unwrap_or_default();
    let name = format!("{set_name}-{at}");
    let mut pod = owned::pod_of(set, template);
    pod.metadata.generate_name = Some(format!("{set_name}-"));
    pod.metadata.name = Some(name.clone());
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(POD_NAME_LABEL.to_owned(), name.clone());
    labels.insert(POD_INDEX_LABEL.to_owned(), at.to_string());
    labels.insert(HASH_LABEL.to_owned(), hash.to_owned());
    let pod_spec = pod.spec.get_or_insert_default();
    pod_spec.hostname = Some(name);
    pod_spec.subdomain = spec.service_name.clone().filter(|name| !name.is_empty());
    let volumes = pod_spec.volumes.get_or_insert_default();
    for template in spec.volume_claim_templates.iter().flatten() {
        let volume = template.metadata.name.clone().unwrap_or_default();
        volumes.retain(|own| own.name != volume);
        volumes.push(Volume {
            name: volume,
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim_name(template, set_name, at),
                read_only: None,
            }),
            ..Volume::default()
        });
    }
    if volumes.is_empty() {
        pod_spec.volumes = None;
    }
    pod
}

fn status_of(observed: &Observed<'_>, created: usize) -> StatefulSetStatus {
    let spec = observed.spec;
    let alive: Vec<&Arc<Pod>> = observed
        .pods
        .values()
        .filter(|p| pods::is_active(p))
        .collect();
    let min_ready_s = spec.min_ready_seconds.unwrap_or(0);
    let of = |hash: &str| {
        alive
            .iter()
            .filter(|p| revision::hash_of(p) == hash)
            .count()
    };
    let ready = alive.iter().filter(|pod| pods::is_ready(pod)).count();
    let available = alive.iter().filter(|pod| {
        let wait = pods::until_available(pod, min_ready_s, observed.now);
        wait.is_some_and(|wait| wait.is_zero())
    });
    let available = available.count();
    let updated = of(observed.update);
    let replicas = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
    // The rollout is over when every pod is of the new template and serves.
    let done = updated == replicas && ready == replicas && alive.len() == replicas && created == 0;
    let current = if done {
        observed.update
    } else {
        observed.current
    };
    StatefulSetStatus {
        replicas: count(alive.len() + created),
        ready_replicas: Some(count(ready)),
        available_replicas: Some(count(available)),
        current_replicas: Some(count(of(current))),
        updated_replicas: Some(count(updated)),
        current_revision: Some(revision_name(observed.set, current)),
        update_revision: Some(revision_name(observed.set, observed.update)),
        collision_count: Some(0),
        observed_generation: observed.set.metadata.generation,
        conditions: None,
    }
}

fn revision_name(set: &StatefulSet, hash: &str) -> String {
    format!(
        "{}-{hash}",
        set.metadata.name.as_deref().unwrap_or_default()
    )
}

struct StatefulSets {
    context: Arc<Context>,
}

impl StatefulSets {
    /// Makes the claims of one ordinal that are not there.
    async fn ensure_claims(
        &self,
        set: &StatefulSet,
        spec: &StatefulSetSpec,
        at: i32,
    ) -> Result<(), Status> {
        let registry = &self.context.registry;
        for claim in claims_of(set, spec, at) {
            let key = ObjectKey::of(&claim.metadata);
            let live: Option<PersistentVolumeClaim> = registry.get(&key.namespace, &key.name)?;
            if live.is_some_and(|live| live.metadata.deletion_timestamp.is_some()) {
                let text = format!("claim {key} is being deleted: waiting until it is gone");
                return Err(Status::new(Reason::Conflict, text));
            }
            match registry.create(&claim).await {
                Ok(_) => {
                    let message = format!("Created claim {} for pod {at}", key.name);
                    let (type_, reason) = (EventType::Normal, "SuccessfulCreate");
                    let event = event_about(set, Self::NAME, type_, reason, message);
                    registry.event(event).await;
                }
                Err(status) if status.reason == Reason::AlreadyExists => {}
                Err(status) => return Err(status),
            }
        }
        Ok(())
    }

    /// Deletes claims of ordinals that were scaled away, where the policy says so.
    async fn drop_claims(
        &self,
        set: &StatefulSet,
        spec: &StatefulSetSpec,
        pods: &BTreeMap<i32, Arc<Pod>>,
    ) -> Result<(), Status> {
        if !retention(spec, "scaled") || spec.volume_claim_templates.is_none() {
            return Ok(());
        }
        let registry = &self.context.registry;
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        let name = set.metadata.name.as_deref().unwrap_or_default();
        let templates: BTreeSet<String> = spec
            .volume_claim_templates
            .iter()
            .flatten()
            .filter_map(|template| template.metadata.name.as_ref())
            .map(|template| format!("{template}-{name}"))
            .collect();
        let claims: Vec<PersistentVolumeClaim> = registry.list(Some(namespace))?.1;
        for claim in claims {
            let claim_name = claim.metadata.name.as_deref().unwrap_or_default();
            let at = templates
                .iter()
                .find_map(|prefix| ordinal(prefix, claim_name));
            let Some(at) = at.filter(|at| !wanted(spec).contains(at) && !pods.contains_key(at))
            else {
                continue;
            };
            tracing::debug!(
                claim = claim_name,
                at,
                "claim goes: its pod was scaled away"
            );
            let options = DeleteOptions {
                uid: claim.metadata.uid.clone(),
                ..DeleteOptions::default()
            };
            let result = registry
                .delete::<PersistentVolumeClaim>(namespace, claim_name, &options)
                .await;
            super::ignore_not_found(result)?;
        }
        Ok(())
    }

    async fn carry_out(
        &self,
        set: &StatefulSet,
        observed: &Observed<'_>,
        plan: &Plan,
        history: &History,
    ) -> Result<usize, Status> {
        for at in &plan.delete {
            if let Some(pod) = observed.pods.get(at) {
                owned::delete(&self.context, set, pod, Self::NAME).await?;
            }
        }
        let spec = observed.spec;
        for (at, hash) in &plan.create {
            self.ensure_claims(set, spec, *at).await?;
            // An old template that is lost cannot be used any more.
            let old = (*hash != observed.update)
                .then(|| history.template(hash))
                .flatten();
            let (template, hash) = match old {
                Some(template) => (template, hash.as_str()),
                None => (spec.template.clone(), observed.update),
            };
            let pod = pod_of(set, spec, &template, hash, *at);
            match owned::create(&self.context, set, &pod, Self::NAME).await {
                Err(status) if status.reason == Reason::AlreadyExists => {}
                result => {
                    result?;
                }
            }
        }
        Ok(plan.create.len())
    }
}

impl Controller for StatefulSets {
    const NAME: &'static str = "statefulset-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let context = &self.context;
        let Some(set) = context.caches.stateful_sets.get(key) else {
            return Ok(None);
        };
        let Some(spec) = set.spec.clone() else {
            return Ok(None);
        };
        let owned = owned::claim(context, &*set, &spec.selector).await?;
        if set.metadata.deletion_timestamp.is_some() || context.is_leaving(&key.namespace) {
            return Ok(None);
        }
        let history = revision::record(context, &*set, &spec.template).await?;
        let by_ordinal = owned.iter().filter_map(|pod| {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            Some((ordinal(&key.name, name)?, Arc::clone(pod)))
        });
        let by_ordinal: BTreeMap<i32, Arc<Pod>> = by_ordinal.collect();
        let known = set
            .status
            .as_ref()
            .and_then(|status| status.current_revision.clone());
        let prefix = format!("{}-", key.name);
        let current = known.and_then(|name| name.strip_prefix(&prefix).map(str::to_owned));
        let current = current.unwrap_or_else(|| history.current.clone());
        let observed = Observed {
            set: &set,
            spec: &spec,
            pods: &by_ordinal,
            update: &history.current,
            current: &current,
            now: Timestamp::now(),
        };
        let plan = plan(&observed);
        let created = self.carry_out(&set, &observed, &plan, &history).await?;
        self.drop_claims(&set, &spec, &by_ordinal).await?;
        let limit = spec.revision_history_limit;
        if current == history.current {
            let pods = owned.iter().map(|pod| &**pod);
            revision::truncate(context, &history, limit, pods).await?;
        }
        let status = status_of(&observed, created);
        if set.status.as_ref() != Some(&status) {
            let mut new = StatefulSet::clone(&set);
            new.status = Some(status);
            super::ignore_not_found(context.registry.update_status(&new).await)?;
        }
        Ok(plan.again)
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let caches = &context.caches;
    let queue = owned::queue(&caches.stateful_sets, &caches.pods);
    let controller = StatefulSets {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, WORKER_COUNT, context, tasks, shutdown);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn set(replicas: i32, partition: i32, policy: &str) -> StatefulSet {
        with_unavailable(replicas, partition, policy, json!(null))
    }

    fn with_unavailable(
        replicas: i32,
        partition: i32,
        policy: &str,
        unavailable: serde_json::Value,
    ) -> StatefulSet {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "a"},
            "spec": {"replicas": replicas, "serviceName": "web", "podManagementPolicy": policy,
                "selector": {}, "template": {"spec": {"containers": []}},
                "updateStrategy": {"type": "RollingUpdate", "rollingUpdate":
                    {"partition": partition, "maxUnavailable": unavailable}},
                "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {}}]},
        }))
        .unwrap()
    }

    fn pod(at: i32, hash: &str, ready: bool, leaving: bool) -> Arc<Pod> {
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": format!("web-{at}"), "labels": {HASH_LABEL: hash},
                    "deletionTimestamp": leaving.then_some("2026-01-01T00:00:00Z")},
                "spec": {"containers": []},
                "status": {"phase": "Running", "conditions": [
                    {"type": "Ready", "status": if ready { "True" } else { "False" }}]},
            }))
            .unwrap(),
        )
    }

    fn planned(set: &StatefulSet, pods: &BTreeMap<i32, Arc<Pod>>, update: &str) -> Plan {
        plan(&Observed {
            set,
            spec: set.spec.as_ref().unwrap(),
            pods,
            update,
            current: "a",
            now: Timestamp::UNIX_EPOCH,
        })
    }

    proptest! {
        /// From any state, with an agent that takes its time, a set comes to its replicas and
        /// templates; in order, no pod is made while one before it is not ready; an update takes no pod
        /// that serves where too many do not.
        #[test]
        fn every_set_converges_in_order(
            replicas in 0_i32..5, partition in 0_i32..5, parallel in any::<bool>(), most in 1_usize..4,
            start in proptest::collection::btree_map(0_i32..7, (any::<bool>(), any::<bool>()), 0..7),
            slowness in proptest::collection::vec(any::<bool>(), 200),
        ) {
            let policy = if parallel { "Parallel" } else { "OrderedReady" };
            let set = with_unavailable(replicas, partition, policy, json!(most));
            let mut pods: BTreeMap<i32, Arc<Pod>> = start.iter().map(|(at, (new, ready))| {
                (*at, pod(*at, if *new { "b" } else { "a" }, *ready, false))
            }).collect();
            let mut slow = slowness.into_iter().chain(std::iter::repeat(false));
            let mut rounds = 0;
            loop {
                let plan = planned(&set, &pods, "b");
                let serves = |at: &i32| pods.get(at)
                    .is_some_and(|pod| pods::is_ready(pod) && !pods::is_terminating(pod));
                let down = (0..replicas).filter(|at| !serves(at)).count();
                let taken = plan.delete.iter().filter(|at| (0..replicas).contains(*at) && serves(at));
                let taken = taken.count();
                prop_assert!(taken == 0 || down + taken <= most, "{plan:?}");
                if !parallel {
                    prop_assert!(plan.create.len() + plan.delete.len() <= most, "{plan:?}");
                    prop_assert!(plan.create.len() <= 1, "{plan:?}");
                    if let Some((at, _)) = plan.create.first() {
                        let before = pods.range(..at);
                        prop_assert!(before.into_iter().all(|(_, pod)| pods::is_ready(pod)));
                    }
                }
                for at in &plan.delete {
                    let hash = revision::hash_of(&pods[at]).to_owned();
                    pods.insert(*at, pod(*at, &hash, false, true));
                }
                for (at, hash) in &plan.create {
                    prop_assert!(!pods.contains_key(at));
                    pods.insert(*at, pod(*at, hash, false, false));
                }
                // The agent: one pod at a time goes or becomes ready.
                let mut moved = false;
                for at in pods.keys().copied().collect::<Vec<_>>() {
                    if slow.next() == Some(true) { moved = true; continue; }
                    let old = pods[&at].clone();
                    if pods::is_terminating(&old) { pods.remove(&at); moved = true; }
                    else if !pods::is_ready(&old) {
                        let hash = revision::hash_of(&old).to_owned();
                        pods.insert(at, pod(at, &hash, true, false));
                        moved = true;
                    }
                }
                rounds += 1;
                prop_assert!(rounds < 400);
                if plan.create.is_empty() && plan.delete.is_empty() && !moved { break; }
            }
            prop_assert_eq!(pods.keys().copied().collect::<Vec<_>>(), (0..replicas).collect::<Vec<_>>());
            for (at, pod) in &pods {
                if *at >= partition {
                    prop_assert_eq!(revision::hash_of(pod), "b");
                }
            }
        }
    }

    #[test]
    fn a_pod_has_its_name_its_claims_and_its_service() {
        let set = set(3, 0, "OrderedReady");
        let spec = set.spec.as_ref().unwrap();
        let pod = pod_of(&set, spec, &spec.template, "h", 2);
        assert_eq!(pod.metadata.name.as_deref(), Some("web-2"));
        let pod_spec = pod.spec.unwrap();
        assert_eq!(pod_spec.hostname.as_deref(), Some("web-2"));
        assert_eq!(pod_spec.subdomain.as_deref(), Some("web"));
        let claim = pod_spec.volumes.unwrap()[0].persistent_volume_claim.clone();
        assert_eq!(claim.unwrap().claim_name, "data-web-2");
        let claims = claims_of(&set, spec, 2);
        assert_eq!(claims[0].metadata.name.as_deref(), Some("data-web-2"));
        assert!(
            claims[0].metadata.owner_references.is_none(),
            "it outlives the set"
        );
    }

    #[test]
    fn ordinals_are_read_exactly() {
        assert_eq!(ordinal("web", "web-12"), Some(12));
        for name in ["web-", "web-01", "web--1", "web-x", "other-1", "web"] {
            assert_eq!(ordinal("web", name), None, "{name}");
        }
    }

    #[test]
    fn an_update_takes_as_many_as_may_be_unavailable() {
        let all = |broken: &[i32]| -> BTreeMap<i32, Arc<Pod>> {
            let pod = |at| (at, pod(at, "a", !broken.contains(&at), false));
            (0..10).map(pod).collect()
        };
        for (unavailable, broken, expected) in [
            (json!(null), vec![], vec![9]),
            (json!(3), vec![], vec![9, 8, 7]),
            (json!("25%"), vec![], vec![9, 8]),
            (json!("5%"), vec![], vec![9]),
            // What is down counts, and is replaced without counting twice.
            (json!(2), vec![4], vec![9, 4]),
            (json!(1), vec![4], vec![4]),
        ] {
            let set = with_unavailable(10, 0, "Parallel", unavailable.clone());
            let plan = planned(&set, &all(&broken), "b");
            assert_eq!(plan.delete, expected, "{unavailable} {broken:?}");
        }
        // In order all serve before an update goes on.
        let set = with_unavailable(10, 8, "OrderedReady", json!(5));
        assert_eq!(
            planned(&set, &all(&[]), "b").delete,
            [9, 8],
            "not below the partition"
        );
        assert_eq!(planned(&set, &all(&[3]), "b"), Plan::default());
        // What is on its way counts.
        let mut pods = all(&[]);
        pods.insert(9, pod(9, "b", false, false));
        pods.insert(8, pod(8, "a", true, true));
        let set = with_unavailable(10, 0, "Parallel", json!(3));
        assert_eq!(planned(&set, &pods, "b").delete, [7]);
    }

    #[test]
    fn below_the_partition_the_old_template_comes_back() {
        let set = set(2, 1, "OrderedReady");
        let pods = BTreeMap::from([(1, pod(1, "b", true, false))]);
        let plan = planned(&set, &pods, "b");
        assert_eq!(plan.create, [(0, "a".to_owned())]);
    }
}
