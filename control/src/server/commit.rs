//! What stands between a decision and the store: the namespace, the numbers of a Service, the commit.
//!
//! Commits of Services run in tasks of their own, so that a client that hangs up never leaves an
//! address claim behind whose write may still happen.

use std::net::IpAddr;
use std::sync::Arc;

use gantry_api::field::FieldError;
use gantry_api::kinds::{KINDS, Kind};
use gantry_api::status::{Reason, Status};
use serde_json::Value;

use super::allocation::Claim;
use super::object::{self, metadata_text};
use super::registry::{Registry, kind_named};
use super::{families, service};
use crate::store::{Entry, Revision, Store, StoreError, Txn};

/// Store keys whose objects hold addresses and ports.
const SERVICE_KEYS: &str = "/registry/services/";

impl Registry {
    /// The namespace an object is to be created in, if it takes content.
    pub(super) fn open_namespace(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
    ) -> Result<Arc<Entry>, Status> {
        let space_kind = kind_named("namespaces")?;
        let entry = self
            .get_entry(space_kind, "", namespace)
            .ok_or_else(|| Status::not_found(space_kind, namespace))?;
        if object::is_being_deleted(&object::to_value(&entry)?) {
            let detail = format!(
                "unable to create new content in namespace {namespace} because it is being terminated"
            );
            return Err(Status::forbidden(kind, name, &detail));
        }
        Ok(entry)
    }

    /// A namespace goes last: nothing may be left in it. It is terminating, so nothing comes new.
    pub(super) fn check_namespace_empty(&self, kind: &Kind, object: &Value) -> Result<(), Status> {
        if kind.kind != "Namespace" {
            return Ok(());
        }
        let name = metadata_text(object, "name");
        let namespaced = KINDS.iter().filter(|k| k.namespaced);
        let left: Vec<String> = namespaced
            .map(|k| {
                (
                    k.plural,
                    self.inner.store.count(&k.store_prefix(Some(name))),
                )
            })
            .filter(|(_, count)| *count > 0)
            .map(|(plural, count)| format!("{count} {plural}"))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        let detail = format!("it still has content: {}", left.join(", "));
        Err(Status::conflict(kind, name, &detail))
    }

    /// Claims what a Service wants and writes it into the object.
    pub(super) fn claim(
        &self,
        kind: &Kind,
        key: &Arc<str>,
        object: &mut Value,
    ) -> Result<Option<Claim>, Status> {
        if kind.kind != "Service" {
            return Ok(None);
        }
        let refuse = |object: &Value, error: FieldError| {
            Status::invalid(kind, metadata_text(object, "name"), &[error])
        };
        families::settle(object, self.inner.allocator.has_v6())
            .map_err(|error| refuse(object, error))?;
        let wanted = service::wanted(object).map_err(|error| refuse(object, error))?;
        let claim = self
            .inner
            .allocator
            .claim(key, &wanted)
            .map_err(|error| refuse(object, service::refusal(object, &wanted, &error)))?;
        service::fill(object, &claim);
        Ok(Some(claim))
    }

    pub(super) fn release(&self, claim: Option<Claim>) {
        if let Some(claim) = claim {
            self.inner.allocator.release(&claim);
        }
    }

    /// Commits in a task of its own and settles the claim by the outcome.
    pub(super) async fn commit(
        &self,
        txn: Txn,
        claim: Option<Claim>,
        key: &Arc<str>,
    ) -> Result<Revision, StoreError> {
        if !key.starts_with(SERVICE_KEYS) {
            return self.inner.store.commit(txn).await;
        }
        let (allocator, store) = (self.inner.allocator.clone(), self.inner.store.clone());
        let key = Arc::clone(key);
        let task = tokio::spawn(async move {
            let result = store.commit(txn).await;
            match (&result, claim) {
                (Ok(_), claim) => {
                    allocator.settle(&key, claim.as_ref(), || held_in_store(&store, &key));
                }
                // Unknown outcome: the numbers stay taken until the restart.
                (Err(StoreError::Unavailable { .. }), _) | (Err(_), None) => {}
                (Err(_), Some(claim)) => allocator.release(&claim),
            }
            result
        });
        task.await.map_err(|_| StoreError::Closed)?
    }
}

/// What the Service at `key` has, if there is one.
fn held_in_store(store: &Store, key: &str) -> (Vec<IpAddr>, Vec<u16>) {
    let entry = store.get(key);
    let value = entry.and_then(|entry| object::to_value(&entry).ok());
    value.as_ref().map(service::held).unwrap_or_default()
}

/// A failed commit as a client sees it.
pub(super) fn store_status(error: &StoreError) -> Status {
    match error {
        StoreError::Conflict { .. } => Status::new(Reason::Conflict, error.to_string()),
        StoreError::TooLarge { .. } => {
            Status::new(Reason::RequestEntityTooLarge, error.to_string())
        }
        StoreError::DuplicateKey { .. } => Status::internal(error.to_string()),
        StoreError::Unavailable { .. } | StoreError::Closed => {
            Status::unavailable(error.to_string())
        }
    }
}
