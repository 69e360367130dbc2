//! What a request makes of an object: the server's own fields, generations, deletion. Pure.
//!
//! ```text
//!            delete                  finalizers gone, Pod: released or grace 0
//!  present ─────────► being deleted ──────────────────────────────────────────► gone
//!     │      no finalizer, nothing to wait for                                   ▲
//!     └──────────────────────────────────────────────────────────────────────────┘
//! ```
//! Invariants: `uid`, `creationTimestamp` and `deletionTimestamp` never change once set by the
//! server; an update of the object leaves `.status` alone and the other way round; a grace period
//! only shrinks; no finalizer is added to an object that is being deleted.
//!
//! Source of the rules and texts: Kubernetes' `apiserver/pkg/registry/rest/{create,update,delete}.go`.

use gantry_api::field::{FieldError, Path};
use gantry_api::kinds::Kind;
use gantry_api::rules::{Rule, is_off};
use gantry_api::status::Status;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::object::{
    carry_field, carry_metadata, finalizers, is_being_deleted, metadata_mut, metadata_text,
};
use super::qos::qos_class;
use crate::store::Revision;

/// Finalizer that keeps an owner until its dependents are gone.
pub const FOREGROUND_FINALIZER: &str = "foregroundDeletion";
/// Finalizer that keeps an owner until its dependents have forgotten it.
pub const ORPHAN_FINALIZER: &str = "orphan";
/// In `spec.finalizers` of every Namespace: it has content to delete first.
pub const NAMESPACE_FINALIZER: &str = "kubernetes";

/// Longest `generateName` that leaves room for the suffix in a 63-byte label.
const GENERATE_NAME_BYTES_MAX: usize = 58;
/// Kubernetes' alphabet for name suffixes: no vowels, no characters that look alike.
const SUFFIX_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LENGTH: usize = 5;

/// Fields that only the server sets, and that a write keeps as they are.
const KEPT_METADATA: [&str; 5] = [
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
];

/// Which part of an object a write may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Everything but `.status` of a kind that has it.
    Object,
    /// `.status` alone.
    Status,
    /// A Pod's `.spec.ephemeralContainers` alone.
    Ephemeral,
}

/// What happens to the dependents of a deleted object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Propagation {
    /// They are collected afterwards.
    #[default]
    Background,
    /// The object stays until they are gone.
    Foreground,
    /// They stay, without an owner.
    Orphan,
}

/// Condition of a pod that ends through no fault of its own.
pub const DISRUPTION_TARGET: &str = "DisruptionTarget";

/// Why the cluster itself ends a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disruption {
    /// The condition's reason, e.g. `PreemptionByScheduler`.
    pub reason: &'static str,
    /// Its message.
    pub message: String,
}

/// How to delete.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteOptions {
    /// Pods: seconds between SIGTERM and SIGKILL instead of the pod's own; 0 removes the object at
    /// once.
    pub grace_period_s: Option<i64>,
    /// Only if the object has this uid.
    pub uid: Option<String>,
    /// What happens to dependents.
    pub propagation: Propagation,
    /// Pods: written as condition [`DISRUPTION_TARGET`] together with the deletion, so that no pod has
    /// it and stays.
    pub disruption: Option<Disruption>,
}

/// What a request makes of an object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// It is stored like this.
    Put(Value),
    /// It goes.
    Remove,
    /// It stays as it is.
    Unchanged,
}

/// `now` as metadata carries it: UTC, whole seconds.
pub(crate) fn time_text(now: Timestamp) -> String {
    now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The moment an API time names.
fn parse_time(value: &Value) -> Option<Timestamp> {
    value.as_str()?.parse().ok()
}

/// A name from `generateName`: the prefix, cut, and five random characters.
pub(crate) fn generated_name(prefix: &str) -> String {
    let cut = prefix.floor_char_boundary(GENERATE_NAME_BYTES_MAX);
    let suffix = (0..SUFFIX_LENGTH)
        .map(|_| char::from(SUFFIX_ALPHABET[rand::random_range(0..SUFFIX_ALPHABET.len())]));
    prefix[..cut].chars().chain(suffix).collect()
}

/// Whether the kind counts changes of its wanted state in `metadata.generation`.
fn has_generation(kind: &Kind) -> bool {
    let core = ["Pod", "ReplicationController"];
    kind.has_status
        && (["apps", "batch", "policy"].contains(&kind.group) || core.contains(&kind.kind))
}

/// Gives a new object what only the server sets. The name is already there.
pub(crate) fn prepare_create(kind: &Kind, object: &mut Value, uid: &str, now: Timestamp) {
    let name = metadata_text(object, "name").to_owned();
    let metadata = metadata_mut(object);
    for field in [
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
    ] {
        metadata.remove(field);
    }
    metadata.insert("uid".to_owned(), json!(uid));
    metadata.insert("creationTimestamp".to_owned(), json!(time_text(now)));
    if has_generation(kind) {
        metadata.insert("generation".to_owned(), json!(1));
    }
    match kind.kind {
        // A node registers together with what it has.
        "Node" => {}
        "Pod" => {
            let class = qos_class(object);
            object["status"] = json!({"phase": "Pending", "qosClass": class});
        }
        "Namespace" => {
            metadata_mut(object)
                .entry("labels")
                .or_insert_with(|| json!({}))["kubernetes.io/metadata.name"] = json!(name);
            object["spec"]["finalizers"] = json!([NAMESPACE_FINALIZER]);
            object["status"] = json!({"phase": "Active"});
        }
        "Job" => {
            object["status"] = json!({});
            tie_job_to_its_pods(object, &name, uid);
        }
        _ if kind.has_status => object["status"] = json!({}),
        _ => {}
    }
}

/// A Job's pods are told from all others by its uid, unless the user chose a selector.
fn tie_job_to_its_pods(job: &mut Value, name: &str, uid: &str) {
    if job["spec"]["manualSelector"] == json!(true) {
        return;
    }
    let labels = &mut job["spec"]["template"]["metadata"]["labels"];
    if !labels.is_object() {
        *labels = json!({});
    }
    for prefix in ["", "batch.kubernetes.io/"] {
        labels[format!("{prefix}controller-uid")] = json!(uid);
        labels[format!("{prefix}job-name")] = json!(name);
    }
    job["spec"]["selector"] = json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}});
}

/// The revision that a write expects; `None` when it does not say.
pub(crate) fn expected_revision(kind: &Kind, object: &Value) -> Result<Option<Revision>, Status> {
    let text = metadata_text(object, "resourceVersion");
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        let path = Path::new("metadata").child("resourceVersion");
        let error = FieldError::invalid(&path, text, "must be a number given out by this server");
        Status::invalid(kind, metadata_text(object, "name"), &[error])
    })
}

/// Refuses a write that is meant for another object of the same name or an older version of it.
pub(crate) fn check_identity(kind: &Kind, old: &Value, new: &Value) -> Result<(), Status> {
    let name = metadata_text(old, "name");
    check_uid(kind, old, metadata_text(new, "uid"))?;
    let expected = expected_revision(kind, new)?;
    if expected.is_some() && expected != expected_revision(kind, old)? {
        return Err(Status::modified(kind, name));
    }
    Ok(())
}

pub(crate) fn check_uid(kind: &Kind, old: &Value, uid: &str) -> Result<(), Status> {
    let actual = metadata_text(old, "uid");
    if uid.is_empty() || uid == actual {
        return Ok(());
    }
    let detail =
        format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {actual}");
    Err(Status::conflict(kind, metadata_text(old, "name"), &detail))
}

/// Keeps what the request may not change.
pub(crate) fn carry_over(kind: &Kind, old: &Value, new: Value, part: Part) -> Value {
    let mut result = match part {
        Part::Object => new,
        Part::Status => {
            let mut result = old.clone();
            carry_field(&mut result, &new, "status");
            result
        }
        Part::Ephemeral => with_ephemeral(old, &new),
    };
    for field in KEPT_METADATA.into_iter().chain(["name", "namespace"]) {
        carry_metadata(&mut result, old, field);
    }
    carry_metadata(&mut result, old, "resourceVersion");
    for field in ["selfLink", "managedFields"] {
        metadata_mut(&mut result).remove(field);
    }
    if part == Part::Object {
        if kind.has_status {
            carry_field(&mut result, old, "status");
        }
        let going = is_being_deleted(old);
        if kind.kind == "Namespace" && !going {
            carry_field(&mut result, old, "spec");
        }
    }
    result
}

/// The pod with the ephemeral containers of another version of it.
pub(crate) fn with_ephemeral(old: &Value, new: &Value) -> Value {
    let mut result = old.clone();
    let ephemeral = &new["spec"]["ephemeralContainers"];
    if !ephemeral.is_null() {
        result["spec"]["ephemeralContainers"] = ephemeral.clone();
    }
    result
}

/// Refuses a write of the whole pod that adds ephemeral containers: they have a right of their own.
pub(crate) fn check_ephemeral(kind: &Kind, old: &Value, new: &Value) -> Result<(), Status> {
    let list = |pod: &Value| {
        let list = pod["spec"]["ephemeralContainers"].as_array().cloned();
        list.unwrap_or_default()
    };
    if kind.kind != "Pod" || list(old) == list(new) {
        return Ok(());
    }
    let detail = "pod updates may not change it: use the ephemeralcontainers subresource";
    let path = Path::new("spec").child("ephemeralContainers");
    let error = FieldError::forbidden(&path, detail);
    Err(Status::invalid(kind, metadata_text(old, "name"), &[error]))
}

/// What an update makes of the object: `new` is complete, defaulted and valid.
pub(crate) fn finish_update(kind: &Kind, old: &Value, mut new: Value) -> Result<Outcome, Status> {
    if is_being_deleted(old) {
        refuse_new_finalizers(kind, old, &new)?;
    }
    if new == *old {
        return Ok(Outcome::Unchanged);
    }
    if has_generation(kind) && wanted_state(old) != wanted_state(&new) {
        let generation = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
        metadata_mut(&mut new).insert("generation".to_owned(), json!(generation));
    }
    if may_go(kind, &new) {
        return Ok(Outcome::Remove);
    }
    Ok(Outcome::Put(new))
}

/// Everything but the metadata and the status.
fn wanted_state(object: &Value) -> Vec<(&String, &Value)> {
    let fields = object.as_object().into_iter().flatten();
    fields
        .filter(|(name, _)| !["metadata", "status"].contains(&name.as_str()))
        .collect()
}

fn refuse_new_finalizers(kind: &Kind, old: &Value, new: &Value) -> Result<(), Status> {
    let before = finalizers(old);
    let added: Vec<&str> = finalizers(new)
        .into_iter()
        .filter(|f| !before.contains(f))
        .collect();
    if added.is_empty() {
        return Ok(());
    }
    let detail = format!(
        "no new finalizers can be added if the object is being deleted, found new finalizers {added:?}"
    );
    let error = FieldError::forbidden(&Path::new("metadata").child("finalizers"), &detail);
    Err(Status::invalid(kind, metadata_text(new, "name"), &[error]))
}

/// Whether nothing holds the object any more, once its deletion was asked for.
fn may_go(kind: &Kind, object: &Value) -> bool {
    if !is_being_deleted(object) || !finalizers(object).is_empty() {
        return false;
    }
    match kind.kind {
        // The node still has it: `remove_pod` or a grace period of 0 lets it go.
        "Pod" => object["metadata"]["deletionGracePeriodSeconds"] == json!(0),
        "Namespace" => object["spec"]["finalizers"]
            .as_array()
            .is_none_or(Vec::is_empty),
        _ => true,
    }
}

/// What a deletion makes of the object.
pub(crate) fn prepare_delete(
    kind: &Kind,
    old: &Value,
    options: &DeleteOptions,
    now: Timestamp,
) -> Result<Outcome, Status> {
    check_uid(kind, old, options.uid.as_deref().unwrap_or_default())?;
    let mut new = old.clone();
    add_propagation_finalizer(&mut new, options.propagation);
    match kind.kind {
        "Pod" => {
            shorten_grace(&mut new, pod_grace_s(old, options)?, now);
            // What ends anyway, or has ended, does so for another reason.
            let goes_on = !is_being_deleted(old) && !has_ended(old);
            if let Some(disruption) = options.disruption.as_ref().filter(|_| goes_on) {
                let condition = json!({
                    "type": DISRUPTION_TARGET, "status": "True", "reason": disruption.reason,
                    "message": disruption.message, "lastTransitionTime": time_text(now),
                });
                set_condition(&mut new, condition);
            }
        }
        _ if is_being_deleted(old) => {}
        _ => {
            let metadata = metadata_mut(&mut new);
            metadata.insert("deletionTimestamp".to_owned(), json!(time_text(now)));
            metadata.insert("deletionGracePeriodSeconds".to_owned(), json!(0));
        }
    }
    if kind.kind == "Namespace" {
        new["status"]["phase"] = json!("Terminating");
    }
    if may_go(kind, &new) {
        return Ok(Outcome::Remove);
    }
    if new == *old {
        return Ok(Outcome::Unchanged);
    }
    if has_generation(kind) && !is_being_deleted(old) {
        let generation = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
        metadata_mut(&mut new).insert("generation".to_owned(), json!(generation));
    }
    Ok(Outcome::Put(new))
}

fn add_propagation_finalizer(object: &mut Value, propagation: Propagation) {
    let name = match propagation {
        Propagation::Background => return,
        Propagation::Foreground => FOREGROUND_FINALIZER,
        Propagation::Orphan => ORPHAN_FINALIZER,
    };
    // The last word counts: a second delete may choose differently.
    let mut names: Vec<String> = finalizers(object)
        .into_iter()
        .filter(|f| ![FOREGROUND_FINALIZER, ORPHAN_FINALIZER].contains(f))
        .map(str::to_owned)
        .collect();
    names.push(name.to_owned());
    metadata_mut(object).insert("finalizers".to_owned(), json!(names));
}

/// Seconds a pod gets to stop: what the request says, else the pod; an unbound pod runs nowhere.
fn pod_grace_s(pod: &Value, options: &DeleteOptions) -> Result<i64, Status> {
    if let Some(grace_s) = options.grace_period_s.filter(|s| *s < 0) {
        let text = format!("gracePeriodSeconds is {grace_s}, it must not be negative");
        return Err(Status::bad_request(text));
    }
    if pod["spec"]["nodeName"]
        .as_str()
        .unwrap_or_default()
        .is_empty()
    {
        return Ok(0);
    }
    let own = pod["spec"]["terminationGracePeriodSeconds"].as_i64();
    Ok(options.grace_period_s.or(own).unwrap_or(30).max(0))
}

/// Starts the deletion of a pod, or brings its end forward.
fn shorten_grace(pod: &mut Value, grace_s: i64, now: Timestamp) {
    let metadata = metadata_mut(pod);
    let running = metadata.get("deletionTimestamp").and_then(parse_time).zip(
        metadata
            .get("deletionGracePeriodSeconds")
            .and_then(Value::as_i64),
    );
    let start = match running {
        Some((_, running_s)) if running_s <= grace_s => return,
        Some((end, running_s)) => end
            .checked_sub(SignedDuration::from_secs(running_s))
            .unwrap_or(now),
        None => now,
    };
    let end = start
        .checked_add(SignedDuration::from_secs(grace_s))
        .unwrap_or(Timestamp::MAX);
    metadata.insert("deletionTimestamp".to_owned(), json!(time_text(end)));
    metadata.insert("deletionGracePeriodSeconds".to_owned(), json!(grace_s));
}

fn has_ended(pod: &Value) -> bool {
    matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed")
    )
}

/// Puts a condition in the place of the one of its type.
fn set_condition(pod: &mut Value, condition: Value) {
    let mut conditions: Vec<Value> = pod["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|other| other["type"] != condition["type"])
        .cloned()
        .collect();
    conditions.push(condition);
    pod["status"]["conditions"] = Value::Array(conditions);
}

/// The pod has ended and nothing of it is left on its node.
pub(crate) fn prepare_pod_removal(pod: &Value, now: Timestamp) -> Outcome {
    let mut new = pod.clone();
    if is_being_deleted(&new) {
        metadata_mut(&mut new).insert("deletionGracePeriodSeconds".to_owned(), json!(0));
    } else {
        shorten_grace(&mut new, 0, now);
    }
    if finalizers(&new).is_empty() {
        Outcome::Remove
    } else {
        Outcome::Put(new)
    }
}

/// Binds an unbound pod to a node.
pub(crate) fn prepare_bind(
    kind: &Kind,
    pod: &Value,
    uid: &str,
    node: &str,
    now: Timestamp,
) -> Result<Outcome, Status> {
    let name = metadata_text(pod, "name");
    check_uid(kind, pod, uid)?;
    if is_being_deleted(pod) {
        let detail = format!("pod {name} is being deleted, cannot be assigned to a host");
        return Err(Status::conflict(kind, name, &detail));
    }
    let bound = pod["spec"]["nodeName"].as_str().unwrap_or_default();
    if !bound.is_empty() && !is_off(Rule::BoundOnce) {
        let detail = format!("pod {name} is already assigned to node {bound:?}");
        return Err(Status::conflict(kind, name, &detail));
    }
    let mut new = pod.clone();
    new["spec"]["nodeName"] = json!(node);
    let condition = json!({
        "type": "PodScheduled", "status": "True", "lastProbeTime": null,
        "lastTransitionTime": time_text(now),
    });
    set_condition(&mut new, condition);
    Ok(Outcome::Put(new))
}

#[cfg(test)]
mod tests;
