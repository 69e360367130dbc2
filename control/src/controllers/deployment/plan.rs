//! What one Deployment does next: from its ReplicaSets and their pods to sizes and status.
//!
//! Invariants, checked by `tests` under any interleaving with the ReplicaSet controller and with
//! pods becoming ready: a rolling update takes the number of available pods never below
//! `replicas - maxUnavailable` and the number of pods never above `replicas + maxSurge`.
//!
//! Two differences from Kubernetes make that hold always and not only nearly always. Pods are
//! counted in the pod cache and not by ReplicaSet status, which lags behind. And nothing is scaled
//! while a ReplicaSet has not yet acted upon its newest size (`observedGeneration`), because it may
//! still be creating or deleting for the one before. The rest is `rolling.go`, `recreate.go` and
//! `sync.go` of Kubernetes' Deployment controller.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::apps::v1::{
    Deployment, DeploymentCondition, DeploymentSpec, DeploymentStatus, ReplicaSet, ReplicaSetSpec,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use gantry_api::k8s_openapi::jiff::Timestamp;

use super::annotations::{
    TEMPLATE_HASH, desired, desired_when_sized, is_rolling, limits, max_when_sized, revision,
    same_template, set_current, set_sizes, size, template_hash,
};
use super::status;
use crate::controllers::controller_reference;

/// One ReplicaSet of the Deployment with what its pods do.
#[derive(Debug, Clone)]
pub(super) struct Observed {
    pub(super) object: Arc<ReplicaSet>,
    /// Pods that are neither finished nor being deleted.
    pub(super) active: i32,
    /// Active pods that have been ready for minReadySeconds.
    pub(super) available: i32,
    /// Some pod has not finished, maybe while being deleted.
    pub(super) running: bool,
}

/// What to write.
#[derive(Debug)]
pub(super) struct Plan {
    /// The ReplicaSet of a new template.
    pub(super) create: Option<ReplicaSet>,
    /// ReplicaSets to change, each with the text of its event.
    pub(super) update: Vec<(ReplicaSet, Option<String>)>,
    /// Old, empty ReplicaSets beyond the history limit.
    pub(super) delete: Vec<Arc<ReplicaSet>>,
    /// The rollout number for the Deployment's own annotation.
    pub(super) revision: Option<i64>,
    /// The whole status.
    pub(super) status: DeploymentStatus,
    /// When to look again without a change.
    pub(super) again: Option<Duration>,
}

/// A ReplicaSet while it is being planned.
struct Draft {
    object: ReplicaSet,
    before: Option<Arc<ReplicaSet>>,
    active: i32,
    available: i32,
    running: bool,
}

impl Draft {
    fn size(&self) -> i32 {
        size(&self.object)
    }

    /// Pods that exist or will.
    fn claimed(&self) -> i32 {
        self.size().max(self.active)
    }

    /// Available pods that stay when the ReplicaSet has come down to its size: it deletes pods that
    /// are not ready first.
    fn available(&self) -> i32 {
        self.available.min(self.size())
    }

    /// The ReplicaSet has acted upon its newest spec.
    fn is_settled(&self) -> bool {
        let status = self.object.status.as_ref();
        let observed = status
            .and_then(|status| status.observed_generation)
            .unwrap_or(0);
        self.before.is_some() && observed >= self.object.metadata.generation.unwrap_or(0)
    }

    fn resize(&mut self, new_size: i32, desired: i32, max: i32) {
        self.object.spec.get_or_insert_default().replicas = Some(new_size);
        set_sizes(&mut self.object, desired, max);
    }
}

/// The Deployment and the drafts of its ReplicaSets, oldest first.
struct Planner<'a> {
    deployment: &'a Deployment,
    spec: &'a DeploymentSpec,
    drafts: Vec<Draft>,
    /// Index of the ReplicaSet of the current template.
    current: Option<usize>,
    desired: i32,
    surge: i32,
    unavailable: i32,
}

/// Decides what one Deployment does next. `None` when it has no spec (validation refuses that).
pub(super) fn plan(deployment: &Deployment, observed: &[Observed], now: Timestamp) -> Option<Plan> {
    let spec = deployment.spec.as_ref()?;
    let mut planner = Planner::new(deployment, spec, observed);
    let old_status = deployment.status.clone().unwrap_or_default();
    let mut conditions = old_status.conditions.unwrap_or_default();
    if deployment.metadata.deletion_timestamp.is_some() {
        return Some(planner.finish(conditions, false, Vec::new(), now));
    }
    status::note_pause(deployment, &mut conditions, now);
    planner.refresh_current(&mut conditions, now);
    let paused = status::is_paused(deployment);
    if paused || planner.is_scaling() {
        planner.scale();
        let delete = if paused {
            planner.surplus_history()
        } else {
            Vec::new()
        };
        return Some(planner.finish(conditions, false, delete, now));
    }
    if is_rolling(spec) {
        planner.ensure_current(&mut conditions, now);
        planner.roll();
    } else {
        planner.recreate(&mut conditions, now);
    }
    let delete = planner.surplus_history();
    Some(planner.finish(conditions, true, delete, now))
}

impl<'a> Planner<'a> {
    fn new(deployment: &'a Deployment, spec: &'a DeploymentSpec, observed: &[Observed]) -> Self {
        let mut drafts: Vec<Draft> = observed
            .iter()
            .map(|set| Draft {
                object: ReplicaSet::clone(&set.object),
                before: Some(Arc::clone(&set.object)),
                active: set.active,
                available: set.available,
                running: set.running,
            })
            .collect();
        drafts.sort_by(|a, b| {
            let key = |draft: &'_ Draft| {
                let metadata = &draft.object.metadata;
                (metadata.creation_timestamp.clone(), metadata.name.clone())
            };
            key(a).cmp(&key(b))
        });
        // The oldest one of equal templates, so that the answer never changes.
        let current = drafts.iter().position(|draft| {
            let template = draft
                .object
                .spec
                .as_ref()
                .and_then(|spec| spec.template.as_ref());
            template.is_some_and(|template| same_template(template, &spec.template))
        });
        let (surge, unavailable) = limits(deployment);
        let desired = desired(deployment);
        Self {
            deployment,
            spec,
            drafts,
            current,
            desired,
            surge,
            unavailable,
        }
    }

    fn max(&self) -> i32 {
        self.desired.saturating_add(self.surge)
    }

    fn is_old(&self, index: usize) -> bool {
        self.current != Some(index)
    }

    fn next_revision(&self) -> i64 {
        let old = self
            .drafts
            .iter()
            .enumerate()
            .filter(|(index, _)| self.is_old(*index));
        old.map(|(_, draft)| revision(&draft.object))
            .max()
            .unwrap_or(0)
            + 1
    }

    /// Keeps the current ReplicaSet's annotations and minReadySeconds up to date.
    fn refresh_current(&mut self, conditions: &mut Vec<DeploymentCondition>, now: Timestamp) {
        let next_revision = self.next_revision();
        let Some(index) = self.current else { return };
        let draft = &mut self.drafts[index];
        set_current(&mut draft.object, self.deployment, next_revision);
        let wanted = self.spec.min_ready_seconds.filter(|seconds| *seconds != 0);
        let set_spec = draft.object.spec.get_or_insert_default();
        if set_spec.min_ready_seconds.filter(|seconds| *seconds != 0) != wanted {
            set_spec.min_ready_seconds = wanted;
        }
        let known = status::find(conditions, "Progressing").is_some();
        if status::deadline(self.deployment).is_some() && !known {
            let name = draft.object.metadata.name.as_deref().unwrap_or_default();
            let message = format!("Found new replica set {name:?}");
            let reason = "FoundNewReplicaSet";
            let new = status::condition("Progressing", "True", reason, message, now);
            status::set(conditions, new);
        }
    }

    /// Makes the ReplicaSet of the current template if there is none.
    fn ensure_current(&mut self, conditions: &mut Vec<DeploymentCondition>, now: Timestamp) {
        if self.current.is_some() {
            return;
        }
        let settled = self.drafts.iter().all(Draft::is_settled);
        let object = self.new_set();
        let name = object.metadata.name.clone().unwrap_or_default();
        self.drafts.push(Draft {
            object,
            before: None,
            active: 0,
            available: 0,
            running: false,
        });
        let index = self.drafts.len() - 1;
        self.current = Some(index);
        let replicas = if settled { self.growth(index) } else { 0 };
        let (desired, max) = (self.desired, self.max());
        self.drafts[index].resize(replicas, desired, max);
        if status::deadline(self.deployment).is_some() {
            let message = format!("Created new replica set {name:?}");
            let reason = "NewReplicaSetCreated";
            let new = status::condition("Progressing", "True", reason, message, now);
            status::set(conditions, new);
        }
    }

    fn new_set(&self) -> ReplicaSet {
        let collisions = self
            .deployment
            .status
            .as_ref()
            .and_then(|s| s.collision_count);
        let hash = template_hash(&self.spec.template, collisions);
        let name = self.deployment.metadata.name.as_deref().unwrap_or_default();
        let mut template = self.spec.template.clone();
        let metadata = template.metadata.get_or_insert_default();
        let labels = metadata.labels.get_or_insert_default();
        labels.insert(TEMPLATE_HASH.to_owned(), hash.clone());
        let labels = labels.clone();
        let mut selector = self.spec.selector.clone();
        let wanted = selector.match_labels.get_or_insert_default();
        wanted.insert(TEMPLATE_HASH.to_owned(), hash.clone());
        let mut set = ReplicaSet {
            metadata: ObjectMeta {
                name: Some(format!("{name}-{hash}")),
                namespace: self.deployment.metadata.namespace.clone(),
                labels: Some(labels),
                owner_references: Some(vec![controller_reference(self.deployment)]),
                ..ObjectMeta::default()
            },
            spec: Some(ReplicaSetSpec {
                replicas: Some(0),
                min_ready_seconds: self.spec.min_ready_seconds,
                selector,
                template: Some(template),
            }),
            status: None,
        };
        set_current(&mut set, self.deployment, self.next_revision());
        set
    }

    /// By how much the set at `index` may grow now.
    fn growth(&self, index: usize) -> i32 {
        let wanted = self.desired - self.drafts[index].size();
        if !is_rolling(self.spec) {
            return wanted.max(0);
        }
        let claimed = self
            .drafts
            .iter()
            .map(Draft::claimed)
            .fold(0, i32::saturating_add);
        wanted.min(self.max() - claimed).max(0)
    }

    fn resize(&mut self, index: usize, new_size: i32) {
        let (desired, max) = (self.desired, self.max());
        self.drafts[index].resize(new_size, desired, max);
    }

    /// One step of a rolling update: grow the current set, or shrink old ones.
    fn roll(&mut self) {
        let Some(current) = self.current else { return };
        if !self.drafts.iter().all(Draft::is_settled) {
            return;
        }
        let have = self.drafts[current].size();
        if have > self.desired {
            return self.resize(current, self.desired);
        }
        let growth = self.growth(current);
        if growth > 0 {
            return self.resize(current, have + growth);
        }
        self.shrink_old(current);
    }

    fn shrink_old(&mut self, current: usize) {
        let min_available = self.desired - self.unavailable;
        let missing = self.drafts[current].size() - self.drafts[current].available();
        let total = self
            .drafts
            .iter()
            .map(Draft::size)
            .fold(0, i32::saturating_add);
        let budget = total - min_available - missing;
        if budget <= 0 {
            return;
        }
        // Old pods that are not available go first: they serve nobody and block the rollout.
        let mut left = budget;
        for index in (0..self.drafts.len()).filter(|index| *index != current) {
            let (have, available) = (self.drafts[index].size(), self.drafts[index].available());
            let step = (have - available).min(left);
            if step > 0 {
                self.resize(index, have - step);
                left -= step;
            }
        }
        let available = self
            .drafts
            .iter()
            .map(Draft::available)
            .fold(0, i32::saturating_add);
        let mut left = available - min_available;
        for index in (0..self.drafts.len()).filter(|index| *index != current) {
            let have = self.drafts[index].size();
            let step = have.min(left);
            if step > 0 {
                self.resize(index, have - step);
                left -= step;
            }
        }
    }

    /// Recreate: every old pod ends before the first new one is made.
    fn recreate(&mut self, conditions: &mut Vec<DeploymentCondition>, now: Timestamp) {
        let old: Vec<usize> = (0..self.drafts.len())
            .filter(|index| self.is_old(*index))
            .collect();
        let mut shrunk = false;
        for index in &old {
            if self.drafts[*index].size() > 0 {
                self.resize(*index, 0);
                shrunk = true;
            }
        }
        let busy = old.iter().any(|index| {
            let draft = &self.drafts[*index];
            draft.running || !draft.is_settled()
        });
        if shrunk || busy {
            return;
        }
        self.ensure_current(conditions, now);
        if let Some(current) = self.current
            && self.drafts[current].size() != self.desired
        {
            self.resize(current, self.desired);
        }
    }

    /// The Deployment's size was changed: its sets were sized for another one.
    fn is_scaling(&self) -> bool {
        self.drafts
            .iter()
            .filter(|draft| draft.size() > 0)
            .any(|draft| {
                desired_when_sized(&draft.object).is_some_and(|sized| sized != self.desired)
            })
    }

    /// Follows a change of size without moving the rollout on: every set in proportion.
    fn scale(&mut self) {
        let active: Vec<usize> = (0..self.drafts.len())
            .filter(|index| self.drafts[*index].size() > 0)
            .collect();
        // Drafts are ordered by age, so the last old one is the latest.
        let only = match active[..] {
            [] => self.current.or(self.drafts.len().checked_sub(1)),
            [only] => Some(only),
            _ => None,
        };
        if let Some(only) = only {
            return self.resize(only, self.desired);
        }
        if self.is_saturated() {
            let current = self.current;
            for index in active.into_iter().filter(|index| current != Some(*index)) {
                self.resize(index, 0);
            }
            return;
        }
        if is_rolling(self.spec) {
            self.scale_in_proportion(active);
        }
    }

    /// The current set has its full size, and all of it is available.
    fn is_saturated(&self) -> bool {
        self.current.is_some_and(|current| {
            let draft = &self.drafts[current];
            draft.size() == self.desired
                && desired_when_sized(&draft.object) == Some(self.desired)
                && draft.available() == self.desired
        })
    }

    fn scale_in_proportion(&mut self, mut active: Vec<usize>) {
        let allowed = if self.desired > 0 { self.max() } else { 0 };
        let total = active
            .iter()
            .map(|index| self.drafts[*index].size())
            .sum::<i32>();
        let to_add = allowed - total;
        // Larger first; of equal size newer first on the way up, older first on the way down.
        active.sort_by_key(|index| Reverse(self.drafts[*index].size()));
        if to_add > 0 {
            active.sort_by_key(|index| (Reverse(self.drafts[*index].size()), Reverse(*index)));
        }
        let mut added = 0;
        let mut sizes: Vec<(usize, i32)> = Vec::with_capacity(active.len());
        for index in active {
            let have = self.drafts[index].size();
            let share = self.share(index, to_add, added);
            sizes.push((index, have + share));
            added += share;
        }
        // What rounding left over goes to the largest.
        if let Some((_, largest)) = sizes.first_mut() {
            *largest = (*largest + to_add - added).max(0);
        }
        for (index, new_size) in sizes {
            self.resize(index, new_size);
        }
    }

    /// The part of `to_add` (negative: to remove) that one set takes, `added` being already given.
    fn share(&self, index: usize, to_add: i32, added: i32) -> i32 {
        let draft = &self.drafts[index];
        let have = draft.size();
        if have == 0 || to_add == 0 || to_add == added {
            return 0;
        }
        if self.desired == 0 {
            return -have;
        }
        let status = self.deployment.status.as_ref();
        let base = max_when_sized(&draft.object)
            .filter(|max| *max > 0)
            .or_else(|| status.and_then(|status| status.replicas))
            .filter(|base| *base > 0);
        let Some(base) = base.map(i64::from) else {
            return 0;
        };
        // Rounded to nearest: (2ab + c) / 2c.
        let scaled = i64::from(have) * i64::from(self.max());
        let new_size = (2 * scaled + base) / (2 * base);
        let share = i32::try_from(new_size)
            .unwrap_or(i32::MAX)
            .saturating_sub(have);
        let rest = to_add - added;
        if to_add > 0 {
            share.min(rest)
        } else {
            share.max(rest)
        }
    }

    /// Old and empty sets beyond the history limit, the oldest rollouts.
    fn surplus_history(&self) -> Vec<Arc<ReplicaSet>> {
        let Some(limit) = self.spec.revision_history_limit else {
            return Vec::new();
        };
        let mut old: Vec<&Draft> = self
            .drafts
            .iter()
            .enumerate()
            .filter(|(index, draft)| {
                self.is_old(*index) && draft.object.metadata.deletion_timestamp.is_none()
            })
            .map(|(_, draft)| draft)
            .collect();
        let surplus = old
            .len()
            .saturating_sub(usize::try_from(limit).unwrap_or(0));
        old.sort_by_key(|draft| revision(&draft.object));
        old.iter()
            .take(surplus)
            .filter(|draft| draft.claimed() == 0 && !draft.running && draft.is_settled())
            .filter(|draft| draft.object.status.as_ref().is_none_or(|s| s.replicas == 0))
            .filter_map(|draft| draft.before.clone())
            .collect()
    }

    /// Turns the drafts into writes and the status.
    fn finish(
        self,
        conditions: Vec<DeploymentCondition>,
        rolling_out: bool,
        delete: Vec<Arc<ReplicaSet>>,
        now: Timestamp,
    ) -> Plan {
        let sets: Vec<&ReplicaSet> = self.drafts.iter().map(|draft| &draft.object).collect();
        let current = self.current.map(|index| &self.drafts[index].object);
        let mut new = status::counts(self.deployment, &sets, current, conditions, now);
        let again = if rolling_out {
            status::judge_rollout(self.deployment, &sets, current, &mut new, now)
        } else {
            None
        };
        let revision = current.map(revision).filter(|revision| *revision > 0);
        let mut plan = Plan {
            create: None,
            update: Vec::new(),
            delete,
            revision,
            status: new,
            again,
        };
        for draft in self.drafts {
            match draft.before {
                None => plan.create = Some(draft.object),
                Some(before) if *before != draft.object => {
                    let event = scaling_text(&draft.object, size(&before));
                    plan.update.push((draft.object, event));
                }
                Some(_) => {}
            }
        }
        plan
    }
}

/// Kubernetes' wording of a ScalingReplicaSet event; `None` when the size stays.
pub(super) fn scaling_text(set: &ReplicaSet, before: i32) -> Option<String> {
    let after = size(set);
    let direction = match after.cmp(&before) {
        std::cmp::Ordering::Less => "down",
        std::cmp::Ordering::Equal => return None,
        std::cmp::Ordering::Greater => "up",
    };
    let name = set.metadata.name.as_deref().unwrap_or_default();
    Some(format!(
        "Scaled {direction} replica set {name} from {before} to {after}"
    ))
}
