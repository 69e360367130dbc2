//! Namespaces: deleting one deletes everything in it first.
//!
//! ```text
//!  Active ──delete──► Terminating (spec.finalizers: kubernetes) ──contents gone──► finalizer removed ──► gone
//!                        │ ▲ contents left: deleted, named in the conditions
//!                        └─┘
//! ```
//! From the first moment of its deletion the registry refuses new objects in a namespace, so the
//! contents only shrink. Pods get their grace period. Objects that finalizers hold are named in
//! condition NamespaceFinalizersRemaining.
//!
//! Source: Kubernetes `pkg/controller/namespace/deletion`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;
use gantry_api::k8s_openapi::api::core::v1::{Namespace, NamespaceCondition, Pod};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::kinds::{KINDS, Kind};
use gantry_api::status::{Reason, Status};
use serde::Deserialize;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{Delta, ObjectKey};
use super::queue::WorkQueue;
use super::{Context, Controller, WORKER_COUNT};
use crate::server::registry::DeleteOptions;
use crate::store::Entry;

/// The entry of `spec.finalizers` that this controller removes.
const FINALIZER: &str = "kubernetes";
/// Pause between two looks at contents that take their time.
const RETRY: Duration = Duration::from_secs(1);
/// Deletions under way at once.
const DELETION_COUNT_MAX: usize = 64;

/// What is left of one kind.
#[derive(Debug, Default, PartialEq, Eq)]
struct Remaining {
    object_count: usize,
    /// How many objects each finalizer holds.
    finalizers: BTreeMap<String, usize>,
}

/// The part of an object that is looked at.
#[derive(Deserialize)]
struct Partial {
    metadata: PartialMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PartialMetadata {
    #[serde(default)]
    name: String,
    #[serde(default)]
    finalizers: Vec<String>,
    deletion_timestamp: Option<String>,
}

fn read(entry: &Entry) -> Result<PartialMetadata, Status> {
    let partial: Partial = serde_json::from_slice(&entry.value)
        .map_err(|error| Status::internal(format!("cannot read {}: {error}", entry.key)))?;
    Ok(partial.metadata)
}

/// The conditions that tell what a deletion waits for; unchanged ones keep their time.
fn conditions(
    old: &[NamespaceCondition],
    remaining: &BTreeMap<&str, Remaining>,
    failure: Option<&str>,
    now: Timestamp,
) -> Vec<NamespaceCondition> {
    let counts: Vec<String> = remaining
        .iter()
        .map(|(plural, left)| format!("{plural} has {} resource instances", left.object_count))
        .collect();
    let mut held: BTreeMap<&str, usize> = BTreeMap::new();
    for (finalizer, count) in remaining.values().flat_map(|left| &left.finalizers) {
        *held.entry(finalizer).or_insert(0) += count;
    }
    let held: Vec<String> = held
        .iter()
        .map(|(finalizer, count)| format!("{finalizer} in {count} resource instances"))
        .collect();
    let failure_text = failure
        .map(|failure| format!("Failed to delete all resource types, 1 remaining: {failure}"));
    let content = (!counts.is_empty())
        .then(|| format!("Some resources are remaining: {}", counts.join(", ")));
    let finalizers = (!held.is_empty()).then(|| {
        format!(
            "Some content in the namespace has finalizers remaining: {}",
            held.join(", ")
        )
    });
    let all = [
        (
            "NamespaceDeletionContentFailure",
            ("ContentDeletionFailed", failure_text),
            (
                "ContentDeleted",
                "All content successfully deleted, may be waiting on finalization",
            ),
        ),
        (
            "NamespaceContentRemaining",
            ("SomeResourcesRemain", content),
            ("ContentRemoved", "All content successfully removed"),
        ),
        (
            "NamespaceFinalizersRemaining",
            ("SomeFinalizersRemain", finalizers),
            (
                "ContentHasNoFinalizers",
                "All content-preserving finalizers finished",
            ),
        ),
    ];
    let condition =
        |(type_, (bad, text), (good, good_text)): (&str, (&str, Option<String>), (&str, &str))| {
            let status = if text.is_some() { "True" } else { "False" };
            let reason = if text.is_some() { bad } else { good };
            let message = text.unwrap_or_else(|| good_text.to_owned());
            let known = old.iter().find(|condition| condition.type_ == type_);
            let since = known
                .filter(|known| known.status == status)
                .and_then(|known| known.last_transition_time.clone());
            NamespaceCondition {
                type_: type_.to_owned(),
                status: status.to_owned(),
                reason: Some(reason.to_owned()),
                message: Some(message),
                last_transition_time: since.or(Some(Time(now))),
            }
        };
    let mut new: Vec<NamespaceCondition> = all.map(condition).into();
    let others = old
        .iter()
        .filter(|old| !new.iter().any(|new| new.type_ == old.type_));
    let others: Vec<NamespaceCondition> = others.cloned().collect();
    new.extend(others);
    new
}

struct Namespaces {
    context: Arc<Context>,
}

impl Namespaces {
    /// Asks for the deletion of everything of one kind in the namespace.
    async fn delete_contents(&self, kind: &'static Kind, namespace: &str) -> Result<(), Status> {
        let registry = &self.context.registry;
        let (_, entries) = registry.store().list(&kind.store_prefix(Some(namespace)));
        let deletions = stream::iter(entries).map(|entry| async move {
            let metadata = read(&entry)?;
            if metadata.deletion_timestamp.is_some() {
                return Ok(());
            }
            let options = DeleteOptions::default();
            let result = registry
                .delete_value(kind, namespace, &metadata.name, &options, false)
                .await;
            super::ignore_not_found(result)
        });
        let mut deletions = deletions.buffer_unordered(DELETION_COUNT_MAX);
        let mut outcome = Ok(());
        // One object that cannot be deleted does not keep the others.
        while let Some(result) = deletions.next().await {
            outcome = outcome.and(result);
        }
        outcome
    }

    fn remaining(&self, kind: &Kind, namespace: &str) -> Result<Remaining, Status> {
        let (_, entries) = self
            .context
            .registry
            .store()
            .list(&kind.store_prefix(Some(namespace)));
        let mut remaining = Remaining {
            object_count: entries.len(),
            ..Remaining::default()
        };
        for entry in &entries {
            for finalizer in read(entry)?.finalizers {
                *remaining.finalizers.entry(finalizer).or_insert(0) += 1;
            }
        }
        Ok(remaining)
    }

    /// Lets the namespace go: its contents are gone.
    async fn finalize(&self, mut namespace: Namespace) -> Result<(), Status> {
        if let Some(spec) = &mut namespace.spec
            && let Some(finalizers) = &mut spec.finalizers
        {
            finalizers.retain(|finalizer| finalizer != FINALIZER);
        }
        super::ignore_not_found(self.context.registry.update(&namespace).await)
    }
}

impl Controller for Namespaces {
    const NAME: &'static str = "namespace-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        // Read from the registry: the answer must be newer than the cached contents.
        let registry = &self.context.registry;
        let Some(mut namespace) = registry.get::<Namespace>("", &key.name)? else {
            return Ok(None);
        };
        let finalizers = namespace
            .spec
            .as_ref()
            .and_then(|spec| spec.finalizers.as_deref());
        let ours = finalizers.is_some_and(|finalizers| finalizers.iter().any(|f| f == FINALIZER));
        if namespace.metadata.deletion_timestamp.is_none() || !ours {
            return Ok(None);
        }
        let mut failure: Option<Status> = None;
        let mut remaining = BTreeMap::new();
        for kind in KINDS.iter().filter(|kind| kind.namespaced) {
            if let Err(status) = self.delete_contents(kind, &key.name).await {
                failure = Some(status);
            }
        }
        for kind in KINDS.iter().filter(|kind| kind.namespaced) {
            let left = self.remaining(kind, &key.name)?;
            if left.object_count > 0 {
                remaining.insert(kind.plural, left);
            }
        }
        if remaining.is_empty() {
            return match self.finalize(namespace).await {
                // A last event may have slipped in: it goes in the next round.
                Err(status) if status.reason == Reason::Conflict => Ok(Some(RETRY)),
                other => other.map(|()| None),
            };
        }
        let status = namespace.status.get_or_insert_default();
        let old = status.conditions.clone().unwrap_or_default();
        let text = failure.as_ref().map(|failure| failure.message.as_str());
        let new = conditions(&old, &remaining, text, Timestamp::now());
        if new != old {
            status.conditions = Some(new);
            super::ignore_not_found(registry.update_status(&namespace).await)?;
        }
        failure.map_or(Ok(Some(RETRY)), Err)
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let own = queue.clone();
    context
        .caches
        .namespaces
        .on_change(move |delta: &Delta<Namespace>| {
            if delta.object().metadata.deletion_timestamp.is_some() {
                own.add(ObjectKey::of(&delta.object().metadata));
            }
        });
    // Pods are what a deletion waits for; the last one to go wakes it.
    let (pods, weak) = (queue.clone(), Arc::downgrade(context));
    context.caches.pods.on_change(move |delta: &Delta<Pod>| {
        let Delta::Deleted(pod) = delta else { return };
        let Some(context) = weak.upgrade() else {
            return;
        };
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        if context.is_leaving(&namespace) {
            pods.add(ObjectKey::new("", namespace));
        }
    });
    let controller = Namespaces {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, WORKER_COUNT, context, tasks, shutdown);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_name_what_is_left_and_keep_their_time() {
        let early: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let late: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let left = |object_count, finalizers: &[(&str, usize)]| Remaining {
            object_count,
            finalizers: finalizers
                .iter()
                .map(|(f, n)| ((*f).to_owned(), *n))
                .collect(),
        };
        let remaining =
            BTreeMap::from([("pods", left(2, &[])), ("secrets", left(1, &[("a/b", 1)]))]);
        let first = conditions(&[], &remaining, None, early);
        let text = |type_: &str, of: &[NamespaceCondition]| {
            let found = of.iter().find(|c| c.type_ == type_).unwrap();
            (found.status.clone(), found.message.clone().unwrap())
        };
        assert_eq!(
            text("NamespaceContentRemaining", &first).1,
            "Some resources are remaining: pods has 2 resource instances, \
             secrets has 1 resource instances"
        );
        assert_eq!(
            text("NamespaceFinalizersRemaining", &first).1,
            "Some content in the namespace has finalizers remaining: a/b in 1 resource instances"
        );
        assert_eq!(text("NamespaceDeletionContentFailure", &first).0, "False");
        assert_eq!(
            conditions(&first, &remaining, None, late),
            first,
            "idempotent"
        );
        let second = conditions(&first, &BTreeMap::new(), Some("no"), late);
        let failed = &second[0];
        assert_eq!(failed.last_transition_time, Some(Time(late)));
        assert_eq!(text("NamespaceContentRemaining", &second).0, "False");
    }
}
