//! The registry: one door for every write of anyone, with gantry-api's defaults and
//! validation, admission and allocation behind it, and the store at the end.
//!
//! ```text
//!  gRPC ── JSON ──► write.rs ──┐
//!                              ├─► admission ─► rules.rs ─► allocation.rs ─► store.commit
//!  scheduler, controllers,     │   fields,      metadata,    cluster IPs,     compare-and-set
//!  feed ── types ──► this file ┘   defaults,    deletion     node ports       durable
//!                                  validation,               quotas (admit/)
//!                                  admit/
//! ```
//! Reads come from the store's memory: a value read here is the latest durable one. A write that
//! names a `resourceVersion` is a compare-and-set; one that does not is decided again on the newest
//! object until it is taken.

use std::net::Ipv4Addr;
use std::sync::{Arc, OnceLock};

use gantry_api::k8s_openapi;
use gantry_api::k8s_openapi::api::core::v1::Event;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use gantry_api::kinds::{self, Kind};
use gantry_api::status::Status;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::admit;
use super::allocation::Allocator;
use super::audit::AuditLog;
use super::event::Events;
use super::object;
use super::pod_admission;
use super::rbac;
use super::rules::Part;
use super::service;
use super::write::WriteOptions;
use crate::ranges::Ranges;
use crate::store::{Revision, Store};

pub(crate) use super::event::EVENT_COUNT_MAX;
pub use super::object::decode;
pub use super::rules::{
    DISRUPTION_TARGET, DeleteOptions, Disruption, FOREGROUND_FINALIZER, NAMESPACE_FINALIZER,
    ORPHAN_FINALIZER, Propagation,
};

/// Namespaces that exist from the first start on.
const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// A Kubernetes type with metadata; every such type of `k8s-openapi` is one.
pub trait Resource:
    k8s_openapi::Resource
    + k8s_openapi::Metadata<Ty = ObjectMeta>
    + Serialize
    + DeserializeOwned
    + Clone
    + Send
    + Sync
    + 'static
{
}

impl<K> Resource for K where
    K: k8s_openapi::Resource
        + k8s_openapi::Metadata<Ty = ObjectMeta>
        + Serialize
        + DeserializeOwned
        + Clone
        + Send
        + Sync
        + 'static
{
}

/// What the registry must know of the cluster.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Cluster IPs are taken from here.
    pub service_cidr: Ranges,
    /// Cluster IPs and whose they are, whatever else is written: the store key of a Service, or words
    /// for what is none, as the node-local resolver.
    pub reserved_addresses: Vec<(Ipv4Addr, String)>,
}

/// The registry; clones share it.
#[derive(Clone)]
pub struct Registry {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) store: Store,
    pub(super) allocator: Allocator,
    pub(super) gates: admit::Gates,
    pub(super) events: Events,
    pub(super) patience: OnceLock<Patience>,
    pub(super) audit: OnceLock<AuditLog>,
    pub(super) access: rbac::Access,
}

/// How long pods that say nothing about it stay on a node that is not ready, or not heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Seconds on a node that is not ready.
    pub not_ready_s: i64,
    /// Seconds on a node that is not heard of.
    pub unreachable_s: i64,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            not_ready_s: 300,
            unreachable_s: 300,
        }
    }
}

impl Registry {
    /// A registry over `store`; reads every Service and Event once.
    pub fn new(store: Store, settings: &Settings) -> Registry {
        let allocator = Allocator::new(settings.service_cidr, &settings.reserved_addresses);
        let events = Events::restore(&store);
        restore_allocations(&store, &allocator);
        let inner = Inner {
            store,
            allocator,
            gates: admit::Gates::default(),
            events,
            patience: OnceLock::new(),
            audit: OnceLock::new(),
            access: rbac::Access::default(),
        };
        Registry {
            inner: Arc::new(inner),
        }
    }

    /// Says how long pods stay on nodes that have gone; the first word counts, without one
    /// [`Patience::default`].
    #[must_use]
    pub fn with_patience(self, patience: Patience) -> Registry {
        let _ = self.inner.patience.set(patience); // said before
        self
    }

    /// Notes every request of users in this log.
    #[must_use]
    pub(crate) fn with_audit_log(self, log: Option<AuditLog>) -> Registry {
        if let Some(log) = log {
            let _ = self.inner.audit.set(log); // said before
        }
        self
    }

    pub(crate) fn audit(&self) -> Option<&AuditLog> {
        self.inner.audit.get()
    }

    /// Waits until what was noted is in the file.
    pub async fn flush_audit(&self) {
        if let Some(audit) = self.audit() {
            audit.flush().await;
        }
    }

    pub(super) fn patience(&self) -> Patience {
        self.inner.patience.get().copied().unwrap_or_default()
    }

    /// Creates what every cluster has; changes nothing that exists.
    pub async fn ensure_defaults(&self) -> Result<(), Status> {
        let kind = kind_named("namespaces")?;
        for name in NAMESPACES {
            if self.get_entry(kind, "", name).is_some() {
                continue;
            }
            let object =
                json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
            self.create_value(kind, "", object, &WriteOptions::default())
                .await?;
        }
        for (plural, object) in pod_admission::default_classes() {
            let kind = kind_named(plural)?;
            let name = object["metadata"]["name"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
            if self.get_entry(kind, "", &name).is_none() {
                self.create_value(kind, "", object, &WriteOptions::default())
                    .await?;
            }
        }
        rbac::ensure_defaults(self).await
    }

    /// The store: for lists and watches by key.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// The object, or `None`; `namespace` is "" for cluster-scoped kinds.
    pub fn get<K: Resource>(&self, namespace: &str, name: &str) -> Result<Option<K>, Status> {
        let kind = kind_of::<K>()?;
        let entry = self.get_entry(kind, namespace, name);
        entry.map(|entry| decode(&entry)).transpose()
    }

    /// All objects of a kind, in one namespace or everywhere, at one revision.
    pub fn list<K: Resource>(&self, namespace: Option<&str>) -> Result<(Revision, Vec<K>), Status> {
        let kind = kind_of::<K>()?;
        let (revision, entries) = self.inner.store.list(&kind.store_prefix(namespace));
        let objects = entries.iter().map(|entry| decode(entry));
        Ok((revision, objects.collect::<Result<_, _>>()?))
    }

    /// Creates the object; a `generateName` becomes a name.
    pub async fn create<K: Resource>(&self, object: &K) -> Result<K, Status> {
        let kind = kind_of::<K>()?;
        let namespace = namespace_of(object);
        let value = self
            .create_value(kind, namespace, to_json(object)?, &WriteOptions::default())
            .await?
            .object;
        from_json(value)
    }

    /// Replaces all but the status; a compare-and-set when `metadata.resourceVersion` is set.
    pub async fn update<K: Resource>(&self, object: &K) -> Result<K, Status> {
        self.replace(object, Part::Object).await
    }

    /// Replaces the status alone; a compare-and-set when `metadata.resourceVersion` is set.
    pub async fn update_status<K: Resource>(&self, object: &K) -> Result<K, Status> {
        self.replace(object, Part::Status).await
    }

    async fn replace<K: Resource>(&self, object: &K, part: Part) -> Result<K, Status> {
        let kind = kind_of::<K>()?;
        let name = object.metadata().name.as_deref().unwrap_or_default();
        let namespace = namespace_of(object);
        let options = WriteOptions::default();
        let value = self
            .update_value(kind, namespace, name, to_json(object)?, part, &options)
            .await?
            .object;
        from_json(value)
    }

    /// Deletes the object, or starts its deletion where finalizers or a node still hold it.
    pub async fn delete<K: Resource>(
        &self,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<(), Status> {
        let kind = kind_of::<K>()?;
        self.delete_value(kind, namespace, name, options, false)
            .await?;
        Ok(())
    }

    /// Binds an unbound pod to a node, for good.
    ///
    /// # Errors
    /// Conflict when it is bound, being deleted or of another uid; not found when the pod or the
    /// node does not exist.
    pub async fn bind(
        &self,
        namespace: &str,
        pod: &str,
        uid: &str,
        node: &str,
    ) -> Result<(), Status> {
        self.bind_value(namespace, pod, uid, node).await
    }

    /// Lets a pod go whose containers have ended and of which nothing is left on its node; finalizers
    /// may still hold the object. A pod that is gone already, or of another uid, is no error.
    pub async fn remove_pod(&self, namespace: &str, name: &str, uid: &str) -> Result<(), Status> {
        self.remove_pod_value(namespace, name, uid).await
    }

    /// Records an event, or counts it where the same one was recorded within the last hour. Best
    /// effort: a failure is logged.
    pub async fn event(&self, event: Event) {
        self.inner.events.record(&self.inner.store, event).await;
    }

    /// Removes events past their time, until cancelled.
    pub async fn run_maintenance(&self, token: tokio_util::sync::CancellationToken) {
        self.inner.events.expire(&self.inner.store, token).await;
    }

    pub(super) fn get_entry(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
    ) -> Option<Arc<crate::store::Entry>> {
        self.inner.store.get(&kind.store_key(namespace, name))
    }
}

/// Notes what the Services in the store hold.
fn restore_allocations(store: &Store, allocator: &Allocator) {
    let Some(kind) = kinds::by_plural("", "services") else {
        return;
    };
    for entry in store.list(&kind.store_prefix(None)).1 {
        let Ok(value) = object::to_value(&entry) else {
            tracing::error!(key = %entry.key, "a Service in the store cannot be read");
            continue;
        };
        let (addresses, ports) = service::held(&value);
        let doubles = allocator.restore(&entry.key, &addresses, &ports);
        if !doubles.is_empty() {
            tracing::error!(key = %entry.key, ?doubles, "a Service holds what another one has");
        }
    }
}

/// The kind behind a type.
pub(super) fn kind_of<K: Resource>() -> Result<&'static Kind, Status> {
    kinds::of::<K>().ok_or_else(|| {
        let text = format!(
            "{} {} is not a kind of this server",
            K::API_VERSION,
            K::KIND
        );
        Status::not_served(text)
    })
}

/// The kind with this plural, which this program itself needs.
pub(super) fn kind_named(plural: &str) -> Result<&'static Kind, Status> {
    kinds::by_plural("", plural)
        .ok_or_else(|| Status::not_served(format!("{plural} is not a kind of this server")))
}

fn namespace_of<K: Resource>(object: &K) -> &str {
    object.metadata().namespace.as_deref().unwrap_or_default()
}

fn to_json<K: Resource>(object: &K) -> Result<Value, Status> {
    serde_json::to_value(object)
        .map_err(|error| Status::internal(format!("cannot encode a {}: {error}", K::KIND)))
}

fn from_json<K: Resource>(value: Value) -> Result<K, Status> {
    serde_json::from_value(value)
        .map_err(|error| Status::internal(format!("cannot read back a {}: {error}", K::KIND)))
}
