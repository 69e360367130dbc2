//! The one door for objects: from a client's bytes to what the registry may store, or a [`Status`].
//!
//! ```text
//! JSON bytes ─► decode (unknown fields) ─► support (not honoured yet) ─► defaults ─► validation ─► object
//!                  refused or warned          refused or warned                        refused
//! ```
//! * [`prepare_create`]: a new object;
//! * [`prepare_update`]: a new version of a stored one (immutable fields are compared);
//! * [`prepare_status`]: a new `.status`: typed, nothing else judged;
//! * [`apply`] and [`patch`]: merge first (see [`crate::merge`]), then as above.
//!
//! All are pure. What only a server knows is left to the registry: uid, creationTimestamp,
//! resourceVersion, generation, names from `generateName`, addresses, whose status is kept.
//! The namespace is not judged either: the registry fills it in before.

use crate::decode::{self, Decoded};
use crate::field::{FieldError, Path};
use crate::kinds::Kind;
use crate::merge;
use crate::status::Status;
use crate::{defaults, pod_security, support, validation};
use k8s_openapi::api::apps::v1::{
    ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet,
};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Event, LimitRange, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod,
    ReplicationController, ResourceQuota, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// An object that may be stored, and what its author should know.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// The object: typed, defaulted, valid; apiVersion and kind included.
    pub object: Value,
    /// Each names a field path: unknown and dropped, or accepted without effect.
    pub warnings: Vec<String>,
}

/// How [`patch`] combines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchType {
    /// Kubernetes' strategic merge patch: lists merge by key.
    Strategic,
    /// RFC 7396: lists are replaced.
    Merge,
    /// RFC 6902: a list of operations.
    Json,
}

/// Prepares a new object.
///
/// * `strict` – unknown fields are refused; else they are dropped with a warning.
///
/// # Errors
/// BadRequest (no JSON, wrong type, unknown field), Invalid (causes name the fields),
/// RequestEntityTooLarge.
pub fn prepare_create(kind: &Kind, json: &[u8], strict: bool) -> Result<Prepared, Status> {
    prepare_create_value(kind, decode::parse(json)?, strict)
}

/// [`prepare_create`] for an object that is parsed already.
///
/// # Errors
/// As there.
pub fn prepare_create_value(kind: &Kind, object: Value, strict: bool) -> Result<Prepared, Status> {
    served(kind)?.prepare(kind, object, None, strict)
}

/// Prepares a new version of `old`. Its `.status` may be anything: the registry keeps the old one.
///
/// # Errors
/// As [`prepare_create`], and Invalid when an immutable field changes.
pub fn prepare_update(
    kind: &Kind,
    old: &Value,
    new: Value,
    strict: bool,
) -> Result<Prepared, Status> {
    served(kind)?.prepare(kind, new, Some(old), strict)
}

/// Prepares an object of which only `.status` will be taken.
///
/// # Errors
/// BadRequest when a field has the wrong type.
pub fn prepare_status(kind: &Kind, object: Value) -> Result<Prepared, Status> {
    served(kind)?.retype(kind, object)
}

/// `kubectl apply`: creates, or merges three ways (last applied, live, new).
///
/// # Errors
/// As [`prepare_create`] and [`prepare_update`].
pub fn apply(
    kind: &Kind,
    live: Option<&Value>,
    json: &[u8],
    strict: bool,
) -> Result<Prepared, Status> {
    let mut new = decode::parse(json)?;
    decode::check_type(kind, &mut new)?;
    // Unknown fields are judged in what the user wrote, before they are merged and recorded.
    let (new, mut warnings) = served(kind)?.without_unknown(kind, new, strict)?;
    let mut prepared = match live {
        None => prepare_create_value(kind, merge::with_last_applied(&new), strict)?,
        Some(live) => {
            let merged = merge::three_way_apply(live, &new)
                .map_err(|e| Status::bad_request(format!("cannot apply: {e}")))?;
            prepare_update(kind, live, merged, strict)?
        }
    };
    warnings.append(&mut prepared.warnings);
    Ok(Prepared {
        warnings,
        ..prepared
    })
}

/// Applies a patch to `live`.
///
/// # Errors
/// BadRequest when the patch is malformed or does not fit, else as [`prepare_update`].
pub fn patch(
    kind: &Kind,
    live: &Value,
    patch_type: PatchType,
    patch: &[u8],
) -> Result<Prepared, Status> {
    let patched = merge_patch(live, patch_type, patch)?;
    prepare_update(kind, live, patched, true)
}

/// Applies a patch to `live` of which only `.status` will be taken.
///
/// # Errors
/// As [`patch`].
pub fn patch_status(
    kind: &Kind,
    live: &Value,
    patch_type: PatchType,
    patch: &[u8],
) -> Result<Prepared, Status> {
    prepare_status(kind, merge_patch(live, patch_type, patch)?)
}

fn merge_patch(live: &Value, patch_type: PatchType, patch: &[u8]) -> Result<Value, Status> {
    if patch.len() > decode::OBJECT_BYTES_MAX {
        let text = format!("the patch is {} bytes long, too many", patch.len());
        return Err(Status::bad_request(text));
    }
    let patch = decode::parse_value(patch)
        .map_err(|e| Status::bad_request(format!("the patch is no valid JSON: {e}")))?;
    let result = match patch_type {
        PatchType::Strategic => merge::strategic(live, &patch),
        PatchType::Merge => Ok(merge::json_merge(live, &patch)),
        PatchType::Json => merge::json_patch(live, patch),
    };
    result.map_err(|e| Status::bad_request(format!("the patch cannot be applied: {e}")))
}

/// A kind's part in the pipeline.
trait Served:
    k8s_openapi::Metadata<Ty = ObjectMeta> + Serialize + DeserializeOwned + Clone + 'static
{
    fn set_defaults(&mut self) {}
    fn validate(&self) -> Vec<FieldError> {
        Vec::new()
    }
    fn validate_create(&self) -> Vec<FieldError> {
        Vec::new()
    }
    fn validate_update(&self, _old: &Self) -> Vec<FieldError> {
        Vec::new()
    }
}

impl Served for ConfigMap {
    fn validate(&self) -> Vec<FieldError> {
        validation::config_map(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::immutable_data(
            old.immutable == Some(true),
            self.immutable == Some(true),
            &(&old.data, &old.binary_data),
            &(&self.data, &self.binary_data),
        )
    }
}

impl Served for Secret {
    fn set_defaults(&mut self) {
        defaults::secret(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::secret(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::immutable_data(
            old.immutable == Some(true),
            self.immutable == Some(true),
            &old.data,
            &self.data,
        )
    }
}

impl Served for Event {
    fn validate(&self) -> Vec<FieldError> {
        validation::event(self)
    }
}

impl Served for ResourceQuota {
    fn validate(&self) -> Vec<FieldError> {
        validation::resource_quota(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::resource_quota_update(self, old)
    }
}

impl Served for LimitRange {
    fn set_defaults(&mut self) {
        defaults::limit_range(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::limit_range(self)
    }
}

impl Served for HorizontalPodAutoscaler {
    fn set_defaults(&mut self) {
        defaults::horizontal_pod_autoscaler(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::horizontal_pod_autoscaler(self)
    }
}

impl Served for PodDisruptionBudget {
    fn validate(&self) -> Vec<FieldError> {
        validation::disruption_budget(self)
    }
}

impl Served for Lease {
    fn validate(&self) -> Vec<FieldError> {
        validation::lease(self)
    }
}

impl Served for Namespace {
    fn validate(&self) -> Vec<FieldError> {
        pod_security::validate(self.metadata.labels.as_ref())
    }
}

impl Served for Node {}

impl Served for ServiceAccount {}

impl Served for Pod {
    fn set_defaults(&mut self) {
        defaults::pod(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::pod(self)
    }

    fn validate_create(&self) -> Vec<FieldError> {
        let path = Path::new("spec");
        let spec = self.spec.as_ref();
        spec.map_or_else(Vec::new, |spec| validation::no_ephemeral(spec, &path))
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::pod_update(self, old)
    }
}

impl Served for Service {
    fn set_defaults(&mut self) {
        defaults::service(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::service(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::service_update(self, old)
    }
}

impl Served for EndpointSlice {
    fn set_defaults(&mut self) {
        defaults::endpoint_slice(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::endpoint_slice(self)
    }
}

impl Served for NetworkPolicy {
    fn set_defaults(&mut self) {
        defaults::network_policy(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::network_policy(self)
    }
}

impl Served for Deployment {
    fn set_defaults(&mut self) {
        defaults::deployment(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::deployment(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::deployment_update(self, old)
    }
}

impl Served for ReplicaSet {
    fn set_defaults(&mut self) {
        defaults::replica_set(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::replica_set(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::replica_set_update(self, old)
    }
}

impl Served for ControllerRevision {}

impl Served for DaemonSet {
    fn set_defaults(&mut self) {
        defaults::daemon_set(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::daemon_set(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::daemon_set_update(self, old)
    }
}

impl Served for StatefulSet {
    fn set_defaults(&mut self) {
        defaults::stateful_set(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::stateful_set(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::stateful_set_update(self, old)
    }
}

impl Served for ReplicationController {
    fn set_defaults(&mut self) {
        defaults::replication_controller(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::replication_controller(self)
    }
}

impl Served for Job {
    fn set_defaults(&mut self) {
        defaults::job(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::job(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::job_update(self, old)
    }
}

impl Served for CronJob {
    fn set_defaults(&mut self) {
        defaults::cron_job(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::cron_job(self)
    }
}

impl Served for PersistentVolume {
    fn set_defaults(&mut self) {
        defaults::persistent_volume(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::persistent_volume(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::persistent_volume_update(self, old)
    }
}

impl Served for PersistentVolumeClaim {
    fn set_defaults(&mut self) {
        defaults::persistent_volume_claim(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::persistent_volume_claim(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::persistent_volume_claim_update(self, old)
    }
}

impl Served for StorageClass {
    fn set_defaults(&mut self) {
        defaults::storage_class(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::storage_class(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::storage_class_update(self, old)
    }
}

impl Served for PriorityClass {
    fn set_defaults(&mut self) {
        defaults::priority_class(self);
    }

    fn validate(&self) -> Vec<FieldError> {
        validation::priority_class(self)
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        validation::priority_class_update(self, old)
    }
}

impl Served for Role {}

impl Served for RoleBinding {}

impl Served for ClusterRole {}

impl Served for ClusterRoleBinding {}

/// [`Served`] without its type, so that a kind is looked up once.
trait Pipeline: Sync {
    fn prepare(
        &self,
        kind: &Kind,
        object: Value,
        old: Option<&Value>,
        strict: bool,
    ) -> Result<Prepared, Status>;
    fn retype(&self, kind: &Kind, object: Value) -> Result<Prepared, Status>;
    fn without_unknown(
        &self,
        kind: &Kind,
        object: Value,
        strict: bool,
    ) -> Result<(Value, Vec<String>), Status>;
}

struct Of<K>(std::marker::PhantomData<fn() -> K>);

impl<K: Served> Pipeline for Of<K> {
    fn prepare(
        &self,
        kind: &Kind,
        mut object: Value,
        old: Option<&Value>,
        strict: bool,
    ) -> Result<Prepared, Status> {
        decode::check_type(kind, &mut object)?;
        let Decoded {
            object: mut typed,
            unknown,
        } = decode::decode::<K>(kind, &object)?;
        if strict && !unknown.is_empty() {
            return Err(decode::unknown_fields(kind, &unknown));
        }
        let mut warnings = unknown_warnings(&unknown);
        // What is dropped needs no second judgement.
        let known = if unknown.is_empty() {
            object
        } else {
            to_value(&typed)?
        };
        let support::Findings {
            mut errors,
            warnings: unsupported,
        } = support::check(kind, &known);
        warnings.extend(unsupported);
        typed.set_defaults();
        errors.extend(validation::metadata(kind, typed.metadata()));
        errors.extend(typed.validate());
        if let Some(old) = old {
            let old = decode::decode::<K>(kind, old)?.object;
            errors.extend(validation::metadata_update(
                typed.metadata(),
                old.metadata(),
            ));
            errors.extend(typed.validate_update(&old));
        } else {
            errors.extend(typed.validate_create());
        }
        if !errors.is_empty() {
            let name = typed.metadata().name.as_deref().unwrap_or_default();
            return Err(Status::invalid(kind, name, &errors));
        }
        Ok(Prepared {
            object: to_value(&typed)?,
            warnings,
        })
    }

    fn retype(&self, kind: &Kind, mut object: Value) -> Result<Prepared, Status> {
        decode::check_type(kind, &mut object)?;
        let Decoded { object, unknown } = decode::decode::<K>(kind, &object)?;
        Ok(Prepared {
            object: to_value(&object)?,
            warnings: unknown_warnings(&unknown),
        })
    }

    fn without_unknown(
        &self,
        kind: &Kind,
        object: Value,
        strict: bool,
    ) -> Result<(Value, Vec<String>), Status> {
        let Decoded {
            object: typed,
            unknown,
        } = decode::decode::<K>(kind, &object)?;
        if unknown.is_empty() {
            return Ok((object, Vec::new()));
        }
        if strict {
            return Err(decode::unknown_fields(kind, &unknown));
        }
        Ok((to_value(&typed)?, unknown_warnings(&unknown)))
    }
}

fn unknown_warnings(unknown: &[String]) -> Vec<String> {
    unknown
        .iter()
        .map(|field| format!("unknown field {field:?}"))
        .collect()
}

fn to_value<K: Serialize>(object: &K) -> Result<Value, Status> {
    serde_json::to_value(object)
        .map_err(|e| Status::internal(format!("cannot encode the object: {e}")))
}

fn served(kind: &Kind) -> Result<&'static dyn Pipeline, Status> {
    macro_rules! of {
        ($kind:ty) => {
            &Of::<$kind>(std::marker::PhantomData)
        };
    }
    Ok(match kind.kind {
        "ConfigMap" => of!(ConfigMap),
        "Event" => of!(Event),
        "Namespace" => of!(Namespace),
        "Node" => of!(Node),
        "Pod" => of!(Pod),
        "ResourceQuota" => of!(ResourceQuota),
        "LimitRange" => of!(LimitRange),
        "PodDisruptionBudget" => of!(PodDisruptionBudget),
        "HorizontalPodAutoscaler" => of!(HorizontalPodAutoscaler),
        "Secret" => of!(Secret),
        "Service" => of!(Service),
        "ServiceAccount" => of!(ServiceAccount),
        "Deployment" => of!(Deployment),
        "ReplicaSet" => of!(ReplicaSet),
        "DaemonSet" => of!(DaemonSet),
        "StatefulSet" => of!(StatefulSet),
        "ControllerRevision" => of!(ControllerRevision),
        "ReplicationController" => of!(ReplicationController),
        "Job" => of!(Job),
        "CronJob" => of!(CronJob),
        "PersistentVolume" => of!(PersistentVolume),
        "PersistentVolumeClaim" => of!(PersistentVolumeClaim),
        "StorageClass" => of!(StorageClass),
        "PriorityClass" => of!(PriorityClass),
        "Role" => of!(Role),
        "RoleBinding" => of!(RoleBinding),
        "ClusterRole" => of!(ClusterRole),
        "ClusterRoleBinding" => of!(ClusterRoleBinding),
        "Lease" => of!(Lease),
        "EndpointSlice" => of!(EndpointSlice),
        "NetworkPolicy" => of!(NetworkPolicy),
        other => {
            let text = format!("the server does not serve kind {other:?}");
            return Err(Status::not_served(text));
        }
    })
}

#[cfg(test)]
mod tests;
