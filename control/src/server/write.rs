//! The verbs on untyped objects: read, decide (`admission`, `rules`), compare-and-set, again if needed.
//!
//! Every loop here ends: a write that names a revision fails at the first conflict, any other one
//! after [`ATTEMPT_COUNT_MAX`] rounds.

use std::sync::Arc;

use gantry_api::admission::{self, Prepared};
use gantry_api::field::{FieldError, Path};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::kinds::Kind;
use gantry_api::status::{Reason, Status};
use gantry_api::validation::MIRROR_ANNOTATION;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::commit::store_status;
use super::object::{self, metadata_mut, metadata_text};
use super::registry::{Registry, kind_named};
use super::rules::{self, DeleteOptions, Outcome, Part};
use super::service;
use crate::store::{Entry, Revision, StoreError, Txn};

/// Rounds of read, decide, write before a busy object is reported.
const ATTEMPT_COUNT_MAX: usize = 32;
/// Draws of a name from `generateName`.
const NAME_DRAW_COUNT_MAX: usize = 8;

/// How a write is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// Everything but the commit.
    pub dry_run: bool,
    /// Unknown fields are refused; otherwise they are dropped and named in the warnings.
    pub strict: bool,
}

/// The outcome of a write.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// The object afterwards; before, when it was removed.
    pub object: Value,
    /// Each names a field path.
    pub warnings: Vec<String>,
    /// It did not exist before.
    pub created: bool,
    /// Nothing was written.
    pub unchanged: bool,
}

/// What a round decided, and what must come with it.
pub(super) struct Decision {
    outcome: Outcome,
    /// The Service to allocate for, filled in place.
    allocate: bool,
    /// What else is written, at the revision that was read.
    also: Vec<(Arc<str>, Revision, bytes::Bytes)>,
    /// What it uses more than before is charged to the quotas of its namespace.
    charge: bool,
    /// Further keys that must exist.
    required: Vec<String>,
    warnings: Vec<String>,
}

impl From<Outcome> for Decision {
    fn from(outcome: Outcome) -> Decision {
        Decision {
            outcome,
            allocate: false,
            also: Vec::new(),
            charge: false,
            required: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

impl Registry {
    /// Creates an object in `namespace` ("" for cluster-scoped kinds).
    pub async fn create_value(
        &self,
        kind: &'static Kind,
        namespace: &str,
        object: Value,
        options: &WriteOptions,
    ) -> Result<Written, Status> {
        let mut object = object;
        set_namespace(kind, namespace, &mut object)?;
        refuse_version(&object)?;
        let prepared = admission::prepare_create_value(kind, object, options.strict)?;
        refuse_mirror(kind, &prepared.object)?;
        self.create_prepared(kind, prepared, options.dry_run).await
    }

    /// Shows a static pod of a node; the caller has seen to it that it is that node's.
    pub(crate) async fn create_mirror(&self, pod: &Pod) -> Result<(), Status> {
        let kind = kind_named("pods")?;
        let encode = |error| Status::internal(format!("cannot encode a Pod: {error}"));
        let mut object = serde_json::to_value(pod).map_err(encode)?;
        let namespace = metadata_text(&object, "namespace").to_owned();
        set_namespace(kind, &namespace, &mut object)?;
        let prepared = admission::prepare_create_value(kind, object, false)?;
        self.create_prepared(kind, prepared, false).await?;
        Ok(())
    }

    /// Creates an object that admission has passed.
    pub(super) async fn create_prepared(
        &self,
        kind: &'static Kind,
        prepared: Prepared,
        dry_run: bool,
    ) -> Result<Written, Status> {
        let Prepared {
            mut object,
            mut warnings,
        } = prepared;
        self.admit(kind, &mut object)?;
        warnings.extend(self.admit_by_namespace(kind, &mut object)?);
        let generate = metadata_text(&object, "generateName").to_owned();
        let drawn = metadata_text(&object, "name").is_empty() && !generate.is_empty();
        let uid = uuid::Uuid::new_v4().to_string();
        let mut round = 0;
        loop {
            round += 1;
            if drawn {
                let name = rules::generated_name(&generate);
                metadata_mut(&mut object).insert("name".to_owned(), json!(name));
            }
            rules::prepare_create(kind, &mut object, &uid, Timestamp::now());
            match self.insert(kind, &object, dry_run).await {
                Err(status)
                    if drawn
                        && status.reason == Reason::AlreadyExists
                        && round < NAME_DRAW_COUNT_MAX => {}
                result => {
                    return result.map(|object| Written {
                        object,
                        warnings,
                        created: true,
                        unchanged: false,
                    });
                }
            }
        }
    }

    /// Writes a complete new object; returns it as stored.
    async fn insert(
        &self,
        kind: &'static Kind,
        new: &Value,
        dry_run: bool,
    ) -> Result<Value, Status> {
        let name = metadata_text(new, "name");
        let namespace = metadata_text(new, "namespace");
        let key: Arc<str> = kind.store_key(namespace, name).into();
        let gate = self.quota_gate(kind, namespace).await?;
        for _ in 0..ATTEMPT_COUNT_MAX {
            let mut object = new.clone();
            let mut txn = Txn::new().require_absent(Arc::clone(&key));
            if kind.namespaced {
                let space = self.open_namespace(kind, namespace, name)?;
                // At this revision: a namespace that begins to go takes no new content.
                txn = txn.require_at(Arc::clone(&space.key), space.mod_revision);
            }
            if self.inner.store.get(&key).is_some() {
                return Err(Status::already_exists(kind, name));
            }
            if gate.is_some() {
                txn = self.charge(kind, None, &object)?.in_txn(txn);
            }
            if kind.kind == "ResourceQuota" {
                self.fill_quota(&mut object, true)?;
            }
            let claim = self.claim(kind, &key, &mut object)?;
            if dry_run {
                self.release(claim);
                return Ok(object);
            }
            let txn = txn.put(Arc::clone(&key), object::encode(&object)?);
            match self.commit(txn, claim, &key).await {
                Ok(revision) => return Ok(with_revision(object, revision)),
                Err(StoreError::Conflict { key: at, .. }) if at == key => {
                    return Err(Status::already_exists(kind, name));
                }
                // The namespace, or what is left of a quota, has changed: decided again.
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(store_status(&error)),
            }
        }
        Err(busy(kind, name))
    }

    /// Replaces the object or its status.
    pub async fn update_value(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        object: Value,
        part: Part,
        options: &WriteOptions,
    ) -> Result<Written, Status> {
        let change = |_: &Value| Ok(object.clone());
        self.change_value(kind, namespace, name, part, options, change)
            .await
    }

    /// Changes the object by a function of its present state, as patch and apply do.
    ///
    /// `change` gets the object as a client sees it and returns the whole new one.
    pub async fn change_value(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        part: Part,
        options: &WriteOptions,
        change: impl Fn(&Value) -> Result<Value, Status> + Send + Sync,
    ) -> Result<Written, Status> {
        self.mutate(kind, namespace, name, options.dry_run, |old| {
            let mut new = change(old)?;
            set_namespace(kind, namespace, &mut new)?;
            set_name(name, &mut new)?;
            rules::check_identity(kind, old, &new)?;
            let mut decision = replace(kind, old, new, part, options.strict)?;
            if let Outcome::Put(new) = &mut decision.outcome
                && part != Part::Status
            {
                decision.warnings.extend(self.admit_change(kind, old, new)?);
                decision.charge = true;
            }
            Ok(decision)
        })
        .await
    }

    /// Deletes the object, or starts its deletion.
    pub async fn delete_value(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
        dry_run: bool,
    ) -> Result<Written, Status> {
        if kind.kind == "Namespace" && ["default", "kube-system", "kube-public"].contains(&name) {
            let detail = "this namespace may not be deleted";
            return Err(Status::forbidden(kind, name, detail));
        }
        let now = Timestamp::now();
        self.mutate(kind, namespace, name, dry_run, |old| {
            Ok(rules::prepare_delete(kind, old, options, now)?.into())
        })
        .await
    }

    /// Deletes a pod as its disruption budget allows, which is counted down with it.
    pub(super) async fn evict_value(
        &self,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
        dry_run: bool,
    ) -> Result<Written, Status> {
        let kind = kind_named("pods")?;
        let now = Timestamp::now();
        self.mutate(kind, namespace, name, dry_run, |old| {
            rules::check_uid(kind, old, options.uid.as_deref().unwrap_or_default())?;
            Ok(Decision {
                also: self.disrupt(old, now)?,
                ..rules::prepare_delete(kind, old, options, now)?.into()
            })
        })
        .await
    }

    pub(super) async fn bind_value(
        &self,
        namespace: &str,
        pod: &str,
        uid: &str,
        node: &str,
    ) -> Result<(), Status> {
        let kind = kind_named("pods")?;
        let node_kind = kind_named("nodes")?;
        let node_key = node_kind.store_key("", node);
        let now = Timestamp::now();
        self.mutate(kind, namespace, pod, false, |old| {
            if self.inner.store.get(&node_key).is_none() {
                return Err(Status::not_found(node_kind, node));
            }
            Ok(Decision {
                required: vec![node_key.clone()],
                ..rules::prepare_bind(kind, old, uid, node, now)?.into()
            })
        })
        .await?;
        Ok(())
    }

    pub(super) async fn remove_pod_value(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
    ) -> Result<(), Status> {
        let kind = kind_named("pods")?;
        let now = Timestamp::now();
        let result = self
            .mutate(kind, namespace, name, false, |old| {
                if metadata_text(old, "uid") != uid {
                    return Ok(Outcome::Unchanged.into());
                }
                Ok(rules::prepare_pod_removal(old, now).into())
            })
            .await;
        match result {
            Err(status) if status.reason != Reason::NotFound => Err(status),
            _ => Ok(()),
        }
    }

    /// Reads, decides, writes; decides again when somebody else wrote meanwhile.
    async fn mutate(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        dry_run: bool,
        decide: impl Fn(&Value) -> Result<Decision, Status>,
    ) -> Result<Written, Status> {
        for _ in 0..ATTEMPT_COUNT_MAX {
            let entry = self
                .get_entry(kind, namespace, name)
                .ok_or_else(|| Status::not_found(kind, name))?;
            let old = object::to_value(&entry)?;
            let decision = decide(&old)?;
            match self.write(kind, &entry, old, decision, dry_run).await {
                Err(StoreError::Conflict { .. }) => {}
                Ok(result) => return result,
                Err(error) => return Err(store_status(&error)),
            }
        }
        Err(busy(kind, name))
    }

    /// The transaction of a change, with what it uses more charged; a quota with a new count.
    async fn charged(
        &self,
        kind: &'static Kind,
        old: &Value,
        object: &mut Value,
        txn: Txn,
    ) -> Result<(Option<tokio::sync::MutexGuard<'_, ()>>, Txn), Status> {
        let namespace = metadata_text(object, "namespace");
        let gate = self.quota_gate(kind, namespace).await?;
        if gate.is_none() {
            return Ok((None, txn));
        }
        if kind.kind == "ResourceQuota" {
            self.fill_quota(object, false)?;
        }
        Ok((gate, self.charge(kind, Some(old), object)?.in_txn(txn)))
    }

    /// Carries out one decision. The outer error is the store's, the inner one is final.
    async fn write(
        &self,
        kind: &'static Kind,
        entry: &Entry,
        old: Value,
        decision: Decision,
        dry_run: bool,
    ) -> Result<Result<Written, Status>, StoreError> {
        let warnings = decision.warnings;
        let written = |object: Value, unchanged: bool| Written {
            object,
            warnings,
            created: false,
            unchanged,
        };
        let key = &entry.key;
        let mut txn = Txn::new().require_at(Arc::clone(key), entry.mod_revision);
        for required in decision.required {
            txn = txn.require_exists(required);
        }
        for (key, revision, bytes) in decision.also {
            txn = txn.require_at(Arc::clone(&key), revision).put(key, bytes);
        }
        match decision.outcome {
            Outcome::Unchanged => Ok(Ok(written(old, true))),
            Outcome::Remove => {
                if let Err(status) = self.check_namespace_empty(kind, &old) {
                    return Ok(Err(status));
                }
                if !dry_run {
                    self.commit(txn.delete(Arc::clone(key)), None, key).await?;
                }
                Ok(Ok(written(old, false)))
            }
            Outcome::Put(mut object) => {
                let charged = match decision.charge {
                    true => self.charged(kind, &old, &mut object, txn).await,
                    false => Ok((None, txn)),
                };
                // The gate stays closed until the commit is done.
                let (_gate, txn) = match charged {
                    Ok(charged) => charged,
                    Err(status) => return Ok(Err(status)),
                };
                let claim = if decision.allocate {
                    match self.claim(kind, key, &mut object) {
                        Ok(claim) => claim,
                        Err(status) => return Ok(Err(status)),
                    }
                } else {
                    None
                };
                if dry_run {
                    self.release(claim);
                    return Ok(Ok(written(object, false)));
                }
                let bytes = match object::encode(&object) {
                    Ok(bytes) => bytes,
                    Err(status) => {
                        self.release(claim);
                        return Ok(Err(status));
                    }
                };
                let txn = txn.put(Arc::clone(key), bytes);
                let revision = self.commit(txn, claim, key).await?;
                Ok(Ok(written(with_revision(object, revision), false)))
            }
        }
    }
}

/// The decision of an update: `new` is what the client wants.
pub(super) fn replace(
    kind: &Kind,
    old: &Value,
    mut new: Value,
    part: Part,
    strict: bool,
) -> Result<Decision, Status> {
    let is_service = kind.kind == "Service" && part == Part::Object;
    let prepared = match part {
        Part::Object => {
            if is_service {
                service::carry_allocated(old, &mut new);
            }
            let prepared = admission::prepare_update(kind, old, new, strict)?;
            rules::check_ephemeral(kind, old, &prepared.object)?;
            prepared
        }
        Part::Ephemeral => {
            admission::prepare_update(kind, old, rules::with_ephemeral(old, &new), strict)?
        }
        Part::Status => admission::prepare_status(kind, new)?,
    };
    let new = rules::carry_over(kind, old, prepared.object, part);
    if is_service {
        service::check_address_change(old, &new)
            .map_err(|error| Status::invalid(kind, metadata_text(old, "name"), &[error]))?;
    }
    Ok(Decision {
        outcome: rules::finish_update(kind, old, new)?,
        allocate: is_service,
        also: Vec::new(),
        charge: false,
        required: Vec::new(),
        warnings: prepared.warnings,
    })
}

/// A mirror pod shows what a node runs: only the feed makes one.
pub(super) fn refuse_mirror(kind: &Kind, object: &Value) -> Result<(), Status> {
    if kind.kind != "Pod" || object["metadata"]["annotations"][MIRROR_ANNOTATION].is_null() {
        return Ok(());
    }
    let detail = format!(
        "annotation {MIRROR_ANNOTATION}: only a node makes mirror pods, of the manifests in its \
         static pod directory; leave the annotation out"
    );
    Err(Status::forbidden(
        kind,
        metadata_text(object, "name"),
        &detail,
    ))
}

fn refuse_version(object: &Value) -> Result<(), Status> {
    if metadata_text(object, "resourceVersion").is_empty() {
        return Ok(());
    }
    Err(Status::bad_request(
        "resourceVersion should not be set on objects to be created",
    ))
}

/// Makes the object's namespace the request's; refuses what is no object at all, which writing into
/// it would hide.
pub(super) fn set_namespace(
    kind: &Kind,
    namespace: &str,
    object: &mut Value,
) -> Result<(), Status> {
    let metadata = &object["metadata"];
    if !object.is_object() || !(metadata.is_object() || metadata.is_null()) {
        let text = format!(
            "{}: the object and its metadata must be maps of fields",
            kind.kind
        );
        return Err(Status::bad_request(text));
    }
    let own = metadata_text(object, "namespace").to_owned();
    if !kind.namespaced {
        metadata_mut(object).remove("namespace");
        return Ok(());
    }
    let namespace = if namespace.is_empty() {
        &own
    } else {
        namespace
    };
    if namespace.is_empty() {
        let error = FieldError::required(&Path::new("metadata").child("namespace"), "");
        return Err(Status::invalid(
            kind,
            metadata_text(object, "name"),
            &[error],
        ));
    }
    if !own.is_empty() && own != namespace {
        return Err(Status::bad_request(format!(
            "the namespace of the provided object does not match the namespace sent on the request: \
             {own:?} and {namespace:?}"
        )));
    }
    metadata_mut(object).insert("namespace".to_owned(), json!(namespace));
    Ok(())
}

/// Makes the object's name the request's.
fn set_name(name: &str, object: &mut Value) -> Result<(), Status> {
    let own = metadata_text(object, "name");
    if !own.is_empty() && own != name {
        return Err(Status::bad_request(format!(
            "the name of the object ({own}) does not match the name on the request ({name})"
        )));
    }
    metadata_mut(object).insert("name".to_owned(), json!(name));
    Ok(())
}

fn with_revision(mut object: Value, revision: Revision) -> Value {
    metadata_mut(&mut object).insert("resourceVersion".to_owned(), json!(revision.to_string()));
    object
}

fn busy(kind: &Kind, name: &str) -> Status {
    let detail = "it is being changed too often; please try again";
    Status::conflict(kind, name, detail)
}
