//! Admission that depends on the namespace that an object is for: what it may use, and what it may do.
//!
//! ```text
//!  fields, defaults, rules ─► account, priority, class ─► limits ─► level of security ─► quotas, charged in
//!     (gantry-api)             (pod_admission.rs)     (limit_range.rs)  (pod_security/)     the transaction that
//!                                                                                           writes (charge.rs)
//! ```
//! Each step is a pure decision over the object and what the namespace says; this file only looks up and
//! carries over. What a namespace does not have costs one look into the store's memory.
//!
//! Invariants: a refusal names what refuses, in Kubernetes' words; a mirror pod runs already and is refused
//! nothing; no set of concurrent writes takes more than a quota has.

mod charge;
mod limit_range;
mod pod_security;
pub(crate) mod quota;

pub(super) use charge::Gates;

use std::collections::BTreeMap;

use gantry_api::k8s_openapi::api::core::v1::{
    LimitRange, Namespace, PersistentVolumeClaim, Pod, PodTemplateSpec,
};
use gantry_api::kinds::Kind;
use gantry_api::status::Status;
use gantry_api::validation::MIRROR_ANNOTATION;
use serde_json::Value;

use super::object::metadata_text;
use super::registry::{Registry, Resource};

/// The object as its type.
fn typed<K: Resource>(object: &Value) -> Result<K, Status> {
    serde_json::from_value(object.clone())
        .map_err(|error| Status::internal(format!("cannot read back a {}: {error}", K::KIND)))
}

/// It stands for a pod that a node runs anyway.
fn is_mirror(object: &Value) -> bool {
    object["metadata"]["annotations"]
        .get(MIRROR_ANNOTATION)
        .is_some()
}

impl Registry {
    /// Objects of a kind in the namespace; nothing is parsed where there are none.
    fn of_namespace<K: Resource>(&self, namespace: &str) -> Result<Vec<K>, Status> {
        Ok(self.list::<K>(Some(namespace))?.1)
    }

    /// A new object: completed and judged by what its namespace says. Returns what its author should know.
    ///
    /// # Errors
    /// Forbidden, with what refuses and why.
    pub(super) fn admit_by_namespace(
        &self,
        kind: &'static Kind,
        object: &mut Value,
    ) -> Result<Vec<String>, Status> {
        if !kind.namespaced || is_mirror(object) {
            return Ok(Vec::new());
        }
        let namespace = metadata_text(object, "namespace").to_owned();
        self.limit(kind, &namespace, None, object)?;
        self.secure(kind, &namespace, object)
    }

    /// A changed object, judged by what its namespace says. Returns what its author should know.
    ///
    /// # Errors
    /// As [`Registry::admit_by_namespace`].
    pub(super) fn admit_change(
        &self,
        kind: &'static Kind,
        old: &Value,
        new: &mut Value,
    ) -> Result<Vec<String>, Status> {
        if kind.kind == "Namespace" {
            return self.rise(old, new);
        }
        if !kind.namespaced || is_mirror(old) {
            return Ok(Vec::new());
        }
        let namespace = metadata_text(old, "namespace").to_owned();
        self.limit(kind, &namespace, Some(old), new)?;
        let template = pod_security::template(kind.kind, new);
        let is_judged = match template {
            Some(_) => pod_security::template(kind.kind, old) != template,
            None => kind.kind == "Pod" && pod_security::is_significant(old, new),
        };
        match is_judged {
            true => self.secure(kind, &namespace, new),
            false => Ok(Vec::new()),
        }
    }

    /// The namespace's level of security: a pod that does more is refused, of a template the author is told.
    fn secure(
        &self,
        kind: &'static Kind,
        namespace: &str,
        object: &Value,
    ) -> Result<Vec<String>, Status> {
        let template = pod_security::template(kind.kind, object);
        let pod = match (template, kind.kind) {
            (Some(template), _) => template,
            (None, "Pod") => object,
            (None, _) => return Ok(Vec::new()),
        };
        let labels = match self.get::<Namespace>("", namespace)? {
            Some(space) => space.metadata.labels.unwrap_or_default(),
            // It is told so when the object is to be written.
            None => return Ok(Vec::new()),
        };
        let policy = pod_security::Policy::of(&labels);
        if policy.is_idle() {
            return Ok(Vec::new());
        }
        let pod: PodTemplateSpec = serde_json::from_value(pod.clone())
            .map_err(|error| Status::internal(format!("cannot read back a pod: {error}")))?;
        let Some(spec) = &pod.spec else {
            return Ok(Vec::new());
        };
        let metadata = pod.metadata.unwrap_or_default();
        let outcome = pod_security::judge(&policy, &metadata, spec, template.is_some());
        let name = metadata_text(object, "name");
        if let Some(audit) = outcome.audit {
            tracing::info!(namespace, kind = kind.kind, name, "{audit}");
        }
        if let Some(refusal) = outcome.refusal {
            return Err(Status::forbidden(kind, name, &refusal));
        }
        Ok(outcome.warning.into_iter().collect())
    }

    /// A namespace with another level: existing pods that it would refuse stay, and are named.
    fn rise(&self, old: &Value, new: &Value) -> Result<Vec<String>, Status> {
        let policy = |object: &Value| {
            let labels = object["metadata"]["labels"].clone();
            let labels: BTreeMap<String, String> =
                serde_json::from_value(labels).unwrap_or_default();
            pod_security::Policy::of(&labels)
        };
        let enforce = policy(new).enforce;
        if enforce == policy(old).enforce || enforce.level <= policy(old).enforce.level {
            return Ok(Vec::new());
        }
        let name = metadata_text(new, "name");
        let pods: Vec<Pod> = self.of_namespace(name)?;
        Ok(pod_security::existing(name, enforce, &pods))
    }

    /// LimitRanges: a new pod gets what it leaves out; what breaks a limit is refused. Of a change only
    /// other resources are judged: a limit does not hold for what was there before it.
    fn limit(
        &self,
        kind: &'static Kind,
        namespace: &str,
        old: Option<&Value>,
        object: &mut Value,
    ) -> Result<(), Status> {
        let is_pod = match kind.kind {
            "Pod" => true,
            "PersistentVolumeClaim" => false,
            _ => return Ok(()),
        };
        let ranges: Vec<LimitRange> = self.of_namespace(namespace)?;
        if ranges.is_empty()
            || old.is_some_and(|old| limit_range::same_resources(is_pod, old, object))
        {
            return Ok(());
        }
        if is_pod && old.is_none() {
            for range in &ranges {
                limit_range::set_defaults(object, range);
            }
        }
        for range in &ranges {
            let errors = if is_pod {
                limit_range::check_pod(&typed::<Pod>(object)?, range)
            } else {
                limit_range::check_claim(&typed::<PersistentVolumeClaim>(object)?, range)
            };
            if !errors.is_empty() {
                let name = metadata_text(object, "name");
                return Err(Status::forbidden(kind, name, &limit_range::joined(&errors)));
            }
        }
        Ok(())
    }
}
