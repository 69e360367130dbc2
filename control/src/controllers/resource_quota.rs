//! ResourceQuotas: `status.used` follows what goes, ends or changes.
//!
//! ```text
//!  an object goes ──────────────► at once ┐
//!  an object comes or changes ──► within 1 s ┴─► gate of the namespace ─► count ─► status (compare-and-set)
//!  a pod outlives its grace, nothing happens ─► when it does, every 5 min ┘
//! ```
//! What comes is charged by the write that makes it (`server/admit/charge.rs`); this frees. It counts while it
//! holds the namespace's gate and after the caches show everything that was charged, so it never takes
//! back what a write has just charged.
//!
//! Source: Kubernetes `pkg/controller/resourcequota`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Pod, ResourceQuota, ResourceQuotaSpec};
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::pod_resources::{Amounts, to_list};
use gantry_api::status::Status;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{ObjectKey, Sink, parse_store_key};
use super::queue::WorkQueue;
use super::{Context, Controller};
use crate::server::admit::quota::{self, Content};
use crate::store::Entry;

/// The plural of quotas.
const QUOTAS: &str = "resourcequotas";
/// How long what only comes or changes may wait to be counted again: it has been charged.
const SETTLE: Duration = Duration::from_secs(1);
/// A count without a reason, as in Kubernetes.
const RESYNC: Duration = Duration::from_secs(300);

/// Looks at every change of every kind for namespaces that have quotas.
pub(super) struct Changes {
    queue: WorkQueue<ObjectKey>,
    /// Names of quotas by namespace.
    quotas: Mutex<BTreeMap<String, BTreeSet<String>>>,
}

impl Changes {
    pub(super) fn new() -> Arc<Changes> {
        Arc::new(Changes {
            queue: WorkQueue::new(),
            quotas: Mutex::default(),
        })
    }

    /// The quotas that count what is in this namespace.
    fn quotas_of(&self, namespace: &str) -> Vec<ObjectKey> {
        let quotas = self.quotas.lock().unwrap_or_else(PoisonError::into_inner);
        let names = quotas.get(namespace).into_iter().flatten();
        names.map(|name| ObjectKey::new(namespace, name)).collect()
    }

    fn learn(&self, key: &ObjectKey, is_there: bool) {
        let mut quotas = self.quotas.lock().unwrap_or_else(PoisonError::into_inner);
        let names = quotas.entry(key.namespace.clone()).or_default();
        if is_there {
            names.insert(key.name.clone());
        } else {
            names.remove(&key.name);
        }
        if names.is_empty() {
            quotas.remove(&key.namespace);
        }
    }
}

/// Kinds that come and go all the time and that no quota counts.
fn is_counted(plural: &str) -> bool {
    !matches!(plural, "events" | "leases")
}

impl Sink for Changes {
    fn plural(&self) -> Option<&'static str> {
        None
    }

    fn put(&self, entry: &Entry) {
        let Some((plural, key)) = parse_store_key(&entry.key) else {
            return;
        };
        if plural == QUOTAS {
            self.learn(&key, true);
        }
        if is_counted(plural) {
            for quota in self.quotas_of(&key.namespace) {
                self.queue.add_after(quota, SETTLE);
            }
        }
    }

    fn delete(&self, store_key: &str) {
        let Some((plural, key)) = parse_store_key(store_key) else {
            return;
        };
        if plural == QUOTAS {
            self.learn(&key, false);
        }
        if is_counted(plural) {
            for quota in self.quotas_of(&key.namespace) {
                self.queue.add(quota);
            }
        }
    }

    fn replace(&self, entries: &[&Entry]) {
        let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for entry in entries {
            if let Some((QUOTAS, key)) = parse_store_key(&entry.key) {
                all.entry(key.namespace.clone())
                    .or_default()
                    .insert(key.name.clone());
                self.queue.add(key);
            }
        }
        *self.quotas.lock().unwrap_or_else(PoisonError::into_inner) = all;
    }
}

struct Quotas {
    context: Arc<Context>,
}

impl Quotas {
    fn count(
        &self,
        namespace: &str,
        pods: &[Arc<Pod>],
        spec: &ResourceQuotaSpec,
        now: Timestamp,
    ) -> Amounts {
        let caches = &self.context.caches;
        let store = self.context.registry.store();
        let content = Content {
            pods,
            services: &caches.services.in_namespace(namespace),
            claims: &caches.claims.in_namespace(namespace),
            count: &|kind| store.count(&kind.store_prefix(Some(namespace))),
        };
        quota::used(spec, &content, now)
    }
}

impl Controller for Quotas {
    const NAME: &'static str = "resourcequota-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let (registry, caches) = (&self.context.registry, &self.context.caches);
        let _turn = registry.quota_turn(&key.namespace).await;
        let Some(mut quota) = registry.get::<ResourceQuota>(&key.namespace, &key.name)? else {
            return Ok(None);
        };
        // Then the caches show all that is charged in the quota as it was read; what is charged later, by
        // another server, makes the write below fail.
        let informer = &self.context.informer;
        informer.caught_up(registry.store().revision()).await;
        let pods = caches.pods.in_namespace(&key.namespace);
        let now = Timestamp::now();
        let spec = quota.spec.clone().unwrap_or_default();
        let used = Some(to_list(&self.count(&key.namespace, &pods, &spec, now)));
        let hard = Some(spec.hard.unwrap_or_default());
        let status = quota.status.get_or_insert_default();
        if status.used != used || status.hard != hard {
            (status.used, status.hard) = (used, hard);
            registry.update_status(&quota).await?;
        }
        Ok(Some(next_look(&pods, now)))
    }
}

/// When a pod that is being deleted will count no more; at the latest after [`RESYNC`].
fn next_look(pods: &[Arc<Pod>], now: Timestamp) -> Duration {
    let releases = pods.iter().filter_map(|pod| quota::released_at(pod));
    let waits = releases.filter_map(|at| Duration::try_from(at.duration_since(now)).ok());
    let first = waits.filter(|wait| !wait.is_zero()).min();
    // A moment later: at that very second it still counts.
    first.map_or(RESYNC, |wait| (wait + SETTLE).min(RESYNC))
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue = context.caches.quota_changes.queue.clone();
    let controller = Quotas {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, 1, context, tasks, shutdown);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_next_look_is_when_the_first_pod_is_released() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let pod = |metadata: serde_json::Value| -> Arc<Pod> {
            Arc::new(serde_json::from_value(json!({"metadata": metadata})).unwrap())
        };
        let going =
            |at: &str| pod(json!({"deletionTimestamp": at, "deletionGracePeriodSeconds": 30}));
        assert_eq!(next_look(&[pod(json!({}))], now), RESYNC);
        let past = going("2025-12-31T23:00:00Z");
        let soon = going("2026-01-01T00:00:10Z");
        let pods = [past, soon, going("2026-01-01T00:00:20Z")];
        assert_eq!(next_look(&pods, now), Duration::from_secs(41));
    }
}
