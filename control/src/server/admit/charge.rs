//! Charging quotas: the transaction that writes an object also writes what is in use with it.
//!
//! ```text
//!  write ─► quotas of the namespace? none ─► no more work
//!              └─► gate of the namespace ─► read quotas ─► charge (pure) ─► transaction:
//!                    object, and each quota at the revision that was read ─► gate opens
//! ```
//! The precondition on the quota's revision is what makes it exact, also between several servers on one
//! store; the gate only spares writers of this process the rounds that they would lose. Namespaces without
//! a quota share group commits as before; in those with one, writes that use something go one by one.
//!
//! What is freed is counted by the quota controller (`controllers/resource_quota.rs`).

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use bytes::Bytes;
use gantry_api::k8s_openapi::api::core::v1::{
    PersistentVolumeClaim, Pod, ResourceQuota, ResourceQuotaSpec, Service,
};
use gantry_api::kinds::Kind;
use gantry_api::pod_resources::{Amounts, to_list};
use gantry_api::status::Status;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};

use super::super::object::{self, metadata_text};
use super::super::registry::{Registry, Resource, decode, kind_named};
use super::quota::{self, Content, Counted};
use super::{is_mirror, typed};
use crate::store::{Revision, Txn};

/// Namespaces share so many gates, by a hash of their name.
const GATE_COUNT: usize = 64;

/// Where writes that are charged wait for each other.
pub(in crate::server) struct Gates([Mutex<()>; GATE_COUNT]);

impl Default for Gates {
    fn default() -> Gates {
        Gates(std::array::from_fn(|_| Mutex::new(())))
    }
}

impl Gates {
    fn of(&self, namespace: &str) -> &Mutex<()> {
        let mut hasher = DefaultHasher::new();
        namespace.hash(&mut hasher);
        let slots = GATE_COUNT as u64;
        &self.0[usize::try_from(hasher.finish() % slots).unwrap_or(0)]
    }
}

/// What one write changes in the quotas of its namespace.
#[derive(Default)]
pub(in crate::server) struct Charge {
    quotas: Vec<(Arc<str>, Revision, Bytes)>,
}

impl Charge {
    /// The transaction with the quotas in it.
    pub(in crate::server) fn in_txn(self, mut txn: Txn) -> Txn {
        for (key, revision, bytes) in self.quotas {
            txn = txn.require_at(Arc::clone(&key), revision).put(key, bytes);
        }
        txn
    }
}

/// The object as quotas see it.
fn counted(kind: &Kind, object: &Value) -> Result<Counted, Status> {
    Ok(match kind.kind {
        "Pod" => Counted::Pod(Box::new(typed::<Pod>(object)?)),
        "Service" => Counted::Service(Box::new(typed::<Service>(object)?)),
        "PersistentVolumeClaim" => {
            Counted::Claim(Box::new(typed::<PersistentVolumeClaim>(object)?))
        }
        _ => Counted::Other,
    })
}

/// Whether a change of an object of this kind can use more than before.
fn changes_use(kind: &Kind) -> bool {
    matches!(kind.kind, "Pod" | "Service" | "PersistentVolumeClaim")
}

impl Registry {
    /// The gate of a namespace, when writes to it are charged.
    pub(in crate::server) async fn quota_gate(
        &self,
        kind: &Kind,
        namespace: &str,
    ) -> Result<Option<MutexGuard<'_, ()>>, Status> {
        if !kind.namespaced || kind.kind == "Event" {
            return Ok(None);
        }
        let prefix = kind_named("resourcequotas")?.store_prefix(Some(namespace));
        if kind.kind != "ResourceQuota" && self.inner.store.count(&prefix) == 0 {
            return Ok(None);
        }
        Ok(Some(self.inner.gates.of(namespace).lock().await))
    }

    /// As [`Registry::quota_gate`], for who counts anew.
    pub(crate) async fn quota_turn(&self, namespace: &str) -> MutexGuard<'_, ()> {
        self.inner.gates.of(namespace).lock().await
    }

    /// What a write uses more than before; `None` stands for an object that is new. The caller holds the
    /// gate.
    ///
    /// # Errors
    /// Forbidden, where a quota has not that much left.
    pub(in crate::server) fn charge(
        &self,
        kind: &Kind,
        old: Option<&Value>,
        new: &Value,
    ) -> Result<Charge, Status> {
        let mut charge = Charge::default();
        if is_mirror(new) || (old.is_some() && !changes_use(kind)) {
            return Ok(charge);
        }
        let namespace = metadata_text(new, "namespace");
        let prefix = kind_named("resourcequotas")?.store_prefix(Some(namespace));
        let (_, entries) = self.inner.store.list(&prefix);
        if entries.is_empty() {
            return Ok(charge);
        }
        let now = Timestamp::now();
        let old = old.map(|old| counted(kind, old)).transpose()?;
        let new_counted = counted(kind, new)?;
        for entry in entries {
            let quota: ResourceQuota = decode(&entry)?;
            let used = quota::charge(&quota, kind, old.as_ref(), &new_counted, now)
                .map_err(|why| Status::forbidden(kind, metadata_text(new, "name"), &why))?;
            if let Some(used) = used {
                let mut value = object::to_value(&entry)?;
                value["status"]["used"] = json!(to_list(&used));
                let bytes = object::encode(&value)?;
                charge
                    .quotas
                    .push((Arc::clone(&entry.key), entry.mod_revision, bytes));
            }
        }
        Ok(charge)
    }

    /// Writes into a quota what it limits and what is in use, so that it holds from its first moment. The
    /// caller holds the gate.
    pub(in crate::server) fn fill_quota(
        &self,
        object: &mut Value,
        is_new: bool,
    ) -> Result<(), Status> {
        let quota: ResourceQuota = typed(object)?;
        let spec = quota.spec.unwrap_or_default();
        let namespace = metadata_text(object, "namespace").to_owned();
        let mut used = self.count_used(&namespace, &spec)?;
        for name in ["resourcequotas", "count/resourcequotas"] {
            // It is not in the store yet.
            if is_new && let Some(count) = used.get_mut(name) {
                *count = count.plus(gantry_api::quantity::Quantity::from_units(1));
            }
        }
        object["status"] = json!({"hard": spec.hard.unwrap_or_default(), "used": to_list(&used)});
        Ok(())
    }

    fn count_used(&self, namespace: &str, spec: &ResourceQuotaSpec) -> Result<Amounts, Status> {
        let content = Content {
            pods: &self.shared::<Pod>(namespace)?,
            services: &self.shared::<Service>(namespace)?,
            claims: &self.shared::<PersistentVolumeClaim>(namespace)?,
            count: &|kind| self.inner.store.count(&kind.store_prefix(Some(namespace))),
        };
        Ok(quota::used(spec, &content, Timestamp::now()))
    }

    fn shared<K: Resource>(&self, namespace: &str) -> Result<Vec<Arc<K>>, Status> {
        Ok(self
            .of_namespace::<K>(namespace)?
            .into_iter()
            .map(Arc::new)
            .collect())
    }
}
